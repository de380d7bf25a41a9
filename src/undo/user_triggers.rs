//! User triggers are left out while rows are put back: what they had done is in the images of their tables already.
//!
//! Constraints stay: they are triggers too, which PostgreSQL marks as internal. That marks apart what the setting
//! `session_replication_role` does not, and it takes no lock and writes no catalog. Two ways are needed:
//!
//! * The executor has a copy of each result relation's triggers of its own. In the copies of the statements that run
//!   meanwhile, foreign keys' actions included, user triggers are disabled.
//! * A partition gets such a copy only when the first row is routed to it, where no hook is called. There it is the trigger's
//!   function that is not run: PostgreSQL asks before each function that it looks up whether a hook wants to see it.

use core::ffi::c_char;
use core::ptr;
use core::sync::atomic::{AtomicBool, Ordering::Relaxed};

use pgrx::pg_sys;

use crate::pg::backend_local::BackendCell;
use crate::pg::ffi;

/// Whether they are left out now.
static LEFT_OUT: AtomicBool = AtomicBool::new(false);

/// Whom PostgreSQL asked about functions before us, while it asks us.
type Before = (pg_sys::needs_fmgr_hook_type, pg_sys::fmgr_hook_type);
static BEFORE: BackendCell<Option<Before>> = BackendCell::new(None);

/// From now on they are left out. Only for that long is PostgreSQL told to ask us for functions: every call of one that is
/// not core's own would pay for it.
pub fn leave_out() {
    // SAFETY: this backend's own pointers, which are read when a function is looked up.
    unsafe {
        if BEFORE.get().is_none() {
            BEFORE.set(Some((pg_sys::needs_fmgr_hook, pg_sys::fmgr_hook)));
            pg_sys::needs_fmgr_hook = Some(needs_function);
            pg_sys::fmgr_hook = Some(function);
        }
    }
    LEFT_OUT.store(true, Relaxed);
}

/// They fire as ever.
pub fn let_fire() {
    LEFT_OUT.store(false, Relaxed);
    // SAFETY: as above; a library that was loaded meanwhile may call our hooks, which then stay.
    unsafe {
        let (needs, is): (pg_sys::needs_fmgr_hook_type, pg_sys::fmgr_hook_type) =
            (Some(needs_function), Some(function));
        let ours = pg_sys::needs_fmgr_hook.map(|hook| hook as usize) == needs.map(|hook| hook as usize)
            && pg_sys::fmgr_hook.map(|hook| hook as usize) == is.map(|hook| hook as usize);
        if ours && let Some(before) = BEFORE.replace(None) {
            (pg_sys::needs_fmgr_hook, pg_sys::fmgr_hook) = before;
        }
    }
}

/// Whether they are left out now.
#[inline(always)]
pub fn are_left_out() -> bool {
    LEFT_OUT.load(Relaxed)
}

/// Whether [`function`] is to be called before and after a function.
#[expect(ffi_unwind_calls, reason = "plain old frame")]
unsafe extern "C-unwind" fn needs_function(oid: pg_sys::Oid) -> bool {
    let before = BEFORE.get().and_then(|(needs, _)| needs);
    // SAFETY: plain old frame.
    unsafe { is_left_out(oid) || before.is_some_and(|needs| needs(oid)) }
}

#[expect(ffi_unwind_calls, reason = "plain old frame")]
unsafe extern "C-unwind" fn function(
    event: pg_sys::FmgrHookEventType::Type,
    called: *mut pg_sys::FmgrInfo,
    private: *mut pg_sys::Datum,
) {
    let before = BEFORE.get().and_then(|(_, before)| before);
    // SAFETY: plain old frame; what was looked up for this call is called next.
    unsafe {
        if event == pg_sys::FmgrHookEventType::FHET_START && is_left_out((*called).fn_oid) {
            (*called).fn_addr = Some(nothing);
        }
        if let Some(before) = before {
            before(event, called, private);
        }
    }
}

/// What `pg_trigger.tgenabled` has for a trigger that is disabled.
const DISABLED: c_char = b'D' as c_char;

/// Disables the user triggers of the relations that a query, which has just been started, writes to.
///
/// # Safety
/// The query was started and not yet run.
pub unsafe fn disable(query_desc: *const pg_sys::QueryDesc) {
    // SAFETY: the caller's promise; the list holds result relations, each with triggers of its own or without any.
    unsafe {
        let opened = (*(*query_desc).estate).es_opened_result_relations;
        let count = if opened.is_null() { 0 } else { usize::try_from((*opened).length).unwrap_or(0) };
        for place in 0..count {
            let relation = (*(*opened).elements.add(place)).ptr_value.cast::<pg_sys::ResultRelInfo>();
            let triggers = (*relation).ri_TrigDesc;
            if triggers.is_null() {
                continue;
            }
            for at in 0..usize::try_from((*triggers).numtriggers).unwrap_or(0) {
                let trigger = (*triggers).triggers.add(at);
                if !(*trigger).tgisinternal {
                    (*trigger).tgenabled = DISABLED;
                }
            }
        }
    }
}

/// Whether a function is one that is not to be run now. Constraints are core's own functions, for which nobody is asked.
///
/// # Safety
/// In a plain old frame: an unknown function raises.
#[expect(ffi_unwind_calls, reason = "plain old frame")]
unsafe fn is_left_out(function: pg_sys::Oid) -> bool {
    // SAFETY: the caller's promise.
    are_left_out() && unsafe { ffi::get_func_rettype(function) } == pg_sys::TRIGGEROID
}

/// What runs in a trigger function's place: it lets the row be written as it is.
///
/// # Safety
/// As PostgreSQL calls a trigger function.
unsafe extern "C-unwind" fn nothing(call: pg_sys::FunctionCallInfo) -> pg_sys::Datum {
    // SAFETY: the caller's promise; the context is the trigger's data, and a BEFORE trigger's rows are in it.
    unsafe {
        (*call).isnull = false;
        let data = (*call).context.cast::<pg_sys::TriggerData>();
        let update = (*data).tg_event & pg_sys::TRIGGER_EVENT_OPMASK == pg_sys::TRIGGER_EVENT_UPDATE;
        let is_row = (*data).tg_event & pg_sys::TRIGGER_EVENT_ROW != 0;
        let row = match (is_row, update) {
            (false, _) => ptr::null_mut(),
            (true, true) => (*data).tg_newtuple,
            (true, false) => (*data).tg_trigtuple,
        };
        pg_sys::Datum::from(row)
    }
}

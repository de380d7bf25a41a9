//! Whether a function is called by the client's own top-level statement: by nothing that somebody else wrote, or that runs
//! with somebody else's rights or at a time of its own choosing.
//!
//! What decides is where the call itself comes from, not what is active around it. PostgreSQL gives a function the
//! expression that calls it. That is the client's if it is run by the executor of the client's portal (and not by one that
//! is nested in it), and has a place in the text (an expression that was stored has none: of a view, rule, policy, default,
//! index, constraint or trigger). A function of language SQL that was dissolved into the statement would bring places of
//! its own text along; the plan lists what it was made from, so no such function is suffered in it.

use core::ffi::{CStr, c_char};
use core::ptr;

use pgrx::pg_sys;
use rules::error::Error;

use super::actor::{Actor, role_name};
use super::portal::{OUTERMOST, is_the_clients};
use crate::pg::backend_local::BackendCell;
use crate::pg::ffi::{self, Opaque};
use crate::pg::function::{self, Arguments, Returns};
use crate::pg::{encoding, preload};

/// Runs a function's body where the client's own statement calls it.
///
/// # Errors
/// WG006 where something else does; as [`function::call`] otherwise.
pub fn call(arguments: &Arguments, body: fn(&Arguments) -> Returns) -> Returns {
    if preload::is_attached() {
        // SAFETY: PostgreSQL calls with a look-up of the function, and what is active is alive.
        if let Some(reason) = unsafe { why_not(arguments.look_up()) } {
            return Err(refused(arguments, &reason).into());
        }
    }
    function::call(arguments, body)
}

fn refused(arguments: &Arguments, reason: &str) -> Error {
    // SAFETY: NULL for an unknown function, and the argument's type as the call declares it.
    let (name, of_number) = unsafe {
        let look_up = arguments.look_up();
        let name = encoding::from_c(pg_sys::get_func_name((*look_up).fn_oid)).unwrap_or_default();
        (name, pg_sys::get_fn_expr_argtype(look_up.cast_mut(), 0) == pg_sys::INT8OID)
    };
    let number = if of_number { arguments.get::<i64>(0) } else { None };
    let given = match (name.as_str(), number) {
        ("request", Some(event)) => format!("{event}, reason => 'why this is right'"),
        ("request", None) => "$$UPDATE orders SET … WHERE …$$, reason => 'why this is right'".to_owned(),
        ("break_glass", _) => "$$UPDATE orders SET … WHERE …$$, reason => 'why nobody else can be asked'".to_owned(),
        ("trust_key", _) => "'deploy', '-----BEGIN PUBLIC KEY-----…'".to_owned(),
        ("distrust_key", _) => "'deploy'".to_owned(),
        (_, Some(number)) => number.to_string(),
        (_, None) => "7".to_owned(),
    };
    let select = if name == "execute" { "SELECT * FROM" } else { "SELECT" };
    let hint = format!("{select} writeguard.{name}({given});");
    Error::NotOwnStatement { function: name, reason: reason.to_owned(), hint }
}

/// What stands against it, as the end of a sentence that begins with "Here"; none: the client's own statement calls.
unsafe fn why_not(look_up: *const pg_sys::FmgrInfo) -> Option<String> {
    // SAFETY: statics of this process; what is active is alive, and so are its statement and its executor's state.
    unsafe {
        if pg_sys::MyBackendType != pg_sys::BackendType::B_BACKEND {
            return Some("it is called by a process that serves no client".into());
        }
        let (mut user, mut context) = (pg_sys::InvalidOid, 0);
        pg_sys::GetUserIdAndSecContext(&mut user, &mut context);
        if context & pg_sys::SECURITY_RESTRICTED_OPERATION as i32 != 0 {
            return Some("it is called by maintenance, or for a view's rows".into());
        }
        if context != 0 {
            return Some("it is called with the rights of a function's owner".into());
        }
        let role = Actor::current().role();
        if user != role {
            let (user, role) = (role_name(user), role_name(role));
            return Some(format!("it is called as \"{user}\", and the session acts as \"{role}\""));
        }
        let portal = pg_sys::ActivePortal;
        let outermost = OUTERMOST.get().portal;
        if portal.is_null() || outermost.is_null() {
            return Some("no statement of the client's is running".into());
        }
        let is_its_own = if portal == outermost { is_sent(portal) } else { is_executed(outermost, portal) };
        let statement = if is_its_own { only_statement(portal) } else { ptr::null_mut() };
        let query = (*portal).queryDesc;
        let is_plain_select = !statement.is_null()
            && (*portal).strategy == pg_sys::PortalStrategy::PORTAL_ONE_SELECT
            && (*statement).commandType == pg_sys::CmdType::CMD_SELECT
            && !(*statement).hasModifyingCTE;
        if !is_plain_select || query.is_null() || (*query).plannedstmt != statement || (*query).estate.is_null() {
            return Some("the client's statement is no SELECT of it, or another one runs inside".into());
        }
        if (*look_up).fn_mcxt != (*(*query).estate).es_query_cxt {
            return Some("it is called from inside of a function, a trigger or a block".into());
        }
        let expression: *const pg_sys::FuncExpr = (*look_up).fn_expr.cast();
        let is_call = !expression.is_null()
            && (*expression).xpr.type_ == pg_sys::NodeTag::T_FuncExpr
            && (*expression).funcid == (*look_up).fn_oid
            && (*expression).funcformat == pg_sys::CoercionForm::COERCE_EXPLICIT_CALL;
        if !is_call || (*expression).location < 0 {
            return Some(
                "the call is not written in the statement, but in something that it uses: a view, rule, policy, \
                         default, operator, aggregate or cast"
                    .into(),
            );
        }
        if has_dissolved(statement) {
            return Some("the statement uses a function that is not PostgreSQL's own and not written in C".into());
        }
        None
    }
}

/// Whether a portal runs what the client itself sent, and not what something prepared for it.
unsafe fn is_sent(portal: pg_sys::Portal) -> bool {
    // SAFETY: the portal is alive.
    unsafe {
        let name = (*portal).prepStmtName;
        is_the_clients(portal) && (name.is_null() || is_prepared_by_client(ffi::FetchPreparedStatement(name, false)))
    }
}

/// Whether `portal` is what the client's own EXECUTE runs.
unsafe fn is_executed(outermost: pg_sys::Portal, portal: pg_sys::Portal) -> bool {
    // SAFETY: both are alive, and so are their statements.
    unsafe {
        let statement = only_statement(outermost);
        if statement.is_null() || (*statement).utilityStmt.is_null() || !is_the_clients(outermost) {
            return false;
        }
        let utility = (*statement).utilityStmt;
        if (*utility).type_ != pg_sys::NodeTag::T_ExecuteStmt || (*portal).visible || !is_sent(outermost) {
            return false;
        }
        let prepared = ffi::FetchPreparedStatement((*utility.cast::<pg_sys::ExecuteStmt>()).name, false);
        // An EXECUTE of something else may run in a parameter's expression.
        is_prepared_by_client(prepared) && {
            let (source, text) = ((*(*prepared).plansource).query_string, (*portal).sourceText);
            !source.is_null() && !text.is_null() && CStr::from_ptr(source) == CStr::from_ptr(text)
        }
    }
}

unsafe fn only_statement(portal: pg_sys::Portal) -> *mut pg_sys::PlannedStmt {
    // SAFETY: the portal is alive.
    unsafe {
        let list = (*portal).stmts;
        if list.is_null() || (*list).length != 1 { ptr::null_mut() } else { (*(*list).elements).ptr_value.cast() }
    }
}

/// Marks a prepared statement as one that the client's own PREPARE made. The mark goes with the statement.
unsafe extern "C-unwind" fn made_by_client(_argument: Opaque) {}

/// Keeps the compiler from giving another function the same address as the mark.
static MARKED: BackendCell<u64> = BackendCell::new(0);

/// A PREPARE of the client's own is done.
///
/// # Safety
/// Called from a plain old frame in `hooks`, after the command.
#[expect(ffi_unwind_calls, reason = "plain old frame")]
pub unsafe fn prepared(name: *const c_char) {
    // SAFETY: the statement is alive, and its memory is what it was made in.
    unsafe {
        let portal = pg_sys::ActivePortal;
        if portal.is_null() || OUTERMOST.get().portal != portal || !is_sent(portal) {
            return;
        }
        let prepared = ffi::FetchPreparedStatement(name, false);
        if !prepared.is_null() {
            let context = (*(*prepared).plansource).context;
            let outside = pg_sys::CurrentMemoryContext;
            pg_sys::CurrentMemoryContext = context;
            let mark = ffi::palloc(size_of::<pg_sys::MemoryContextCallback>()).cast::<pg_sys::MemoryContextCallback>();
            pg_sys::CurrentMemoryContext = outside;
            (*mark).func = Some(made_by_client);
            (*mark).arg = (&raw const MARKED).cast_mut().cast();
            ffi::MemoryContextRegisterResetCallback(context, mark);
        }
    }
}

unsafe fn is_prepared_by_client(prepared: *const pg_sys::PreparedStatement) -> bool {
    // SAFETY: NULL, or alive.
    unsafe {
        if prepared.is_null() {
            return false;
        }
        if !(*prepared).from_sql {
            return true;
        }
        let mut callback = (*(*(*prepared).plansource).context).reset_cbs;
        while !callback.is_null() {
            if (*callback).arg == (&raw const MARKED).cast_mut().cast() {
                return true;
            }
            callback = (*callback).next;
        }
        false
    }
}

/// The languages whose functions have no text that could be dissolved; their OIDs are PostgreSQL's own.
const INTERNAL: u32 = 12;
const C: u32 = 13;

/// Whether a plan was made from a function whose text could have been dissolved in it: from any that is neither
/// PostgreSQL's own nor written in C. (By what the catalog says now; who can make one of C is superuser.)
unsafe fn has_dissolved(statement: *const pg_sys::PlannedStmt) -> bool {
    let is_function = pg_sys::SysCacheIdentifier::PROCOID as i32;
    let mut hashes = Vec::new();
    // SAFETY: the statement is alive; a plain scan of a catalog, whose error unwinds to the guard around us.
    unsafe {
        let items = (*statement).invalItems;
        let count = if items.is_null() { 0 } else { usize::try_from((*items).length).unwrap_or(0) };
        for index in 0..count {
            let item: *const pg_sys::PlanInvalItem = (*(*items).elements.add(index)).ptr_value.cast();
            if (*item).cacheId == is_function && !hashes.contains(&(*item).hashValue) {
                hashes.push((*item).hashValue);
            }
        }
        if hashes.is_empty() {
            return false;
        }
        let lock = pg_sys::AccessShareLock as pg_sys::LOCKMODE;
        let relation = pg_sys::table_open(pg_sys::ProcedureRelationId, lock);
        let scan = pg_sys::systable_beginscan(relation, pg_sys::InvalidOid, false, ptr::null_mut(), 0, ptr::null_mut());
        loop {
            let tuple = pg_sys::systable_getnext(scan);
            if tuple.is_null() {
                break;
            }
            let header = (*tuple).t_data;
            let row: *const pg_sys::FormData_pg_proc = header.cast::<u8>().add((*header).t_hoff.into()).cast();
            if [INTERNAL, C].contains(&u32::from((*row).prolang)) {
                let none = pg_sys::Datum::from(0);
                let hash = pg_sys::GetSysCacheHashValue(is_function, (*row).oid.into(), none, none, none);
                hashes.retain(|known| *known != hash);
            }
        }
        pg_sys::systable_endscan(scan);
        pg_sys::table_close(relation, lock);
    }
    !hashes.is_empty()
}

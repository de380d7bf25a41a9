//! Which of the client's commands is running: the portal of the outermost executor run or utility command.
//!
//! The frames around the executor and around utility commands note it. Where something runs that the client did not ask
//! for (a deferred trigger at a commit, a held cursor, a fast-path call, a function's cursor while a statement is planned)
//! there is none, until that is over.

use core::ffi::CStr;
use core::ptr;

use pgrx::pg_sys;

use crate::pg::backend_local::BackendCell;
use crate::pg::ffi;

/// The outermost command now running, as the hooks saw it.
#[derive(Clone, Copy)]
pub struct Outermost {
    pub portal: pg_sys::Portal,
    /// Something runs that is no command of the client's: a deferred trigger, a held cursor at a commit, a fast-path call.
    not_the_clients: bool,
}

/// NULL portal: nothing of the client's runs, or what runs has no portal.
const NOTHING: Outermost = Outermost { portal: ptr::null_mut(), not_the_clients: false };
pub static OUTERMOST: BackendCell<Outermost> = BackendCell::new(NOTHING);

/// What a frame around the executor or a utility command is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Frame {
    /// Something that the outermost one set off.
    Inner,
    /// The outermost one; it calls [`leave`] when it is done.
    Outermost,
}

/// Notes the command as the outermost one, if it is.
///
/// # Safety
/// Called by the frames in `hooks`.
#[inline(always)]
pub unsafe fn enter() -> Frame {
    // SAFETY: statics of this thread.
    unsafe {
        let outermost = OUTERMOST.get();
        if !outermost.portal.is_null() || outermost.not_the_clients {
            return Frame::Inner;
        }
        let portal = pg_sys::ActivePortal;
        if portal.is_null() || !is_the_clients(portal) {
            // Nor is any portal that it opens inside.
            OUTERMOST.set(Outermost { not_the_clients: true, ..NOTHING });
            return Frame::Outermost;
        }
        OUTERMOST.set(Outermost { portal, ..NOTHING });
        Frame::Outermost
    }
}

/// Whether what begins now is the outermost command.
#[inline(always)]
pub fn is_next_outermost() -> bool {
    let Outermost { portal, not_the_clients } = OUTERMOST.get();
    portal.is_null() && !not_the_clients
}

/// Whether the client asked for what runs in this portal, where no other one is around it. Not so for a function's
/// cursor, whose columns nobody chose a format for: it may run while a statement is planned or bound, in a deferred
/// trigger or in a fast-path call. Nor for a held cursor that a commit runs to its end. Those belong to the message as a
/// whole.
#[inline(always)]
pub unsafe fn is_the_clients(portal: pg_sys::Portal) -> bool {
    // SAFETY: the active portal is alive.
    unsafe {
        let of_function = !(*portal).tupDesc.is_null() && (*portal).formats.is_null();
        let held = (*portal).strategy == pg_sys::PortalStrategy::PORTAL_ONE_SELECT && !(*portal).holdStore.is_null();
        !of_function && !held
    }
}

/// The portal of the client's command that is running or about to run; NULL where none is.
///
/// # Safety
/// Called from a plain old frame in `hooks`, or from what it calls.
pub unsafe fn clients_portal() -> pg_sys::Portal {
    // SAFETY: statics of this thread; the active portal is alive.
    unsafe {
        let Outermost { portal, not_the_clients } = OUTERMOST.get();
        let active = pg_sys::ActivePortal;
        if !portal.is_null() || not_the_clients || active.is_null() || !is_the_clients(active) {
            return portal;
        }
        active
    }
}

/// Whether nothing of the outermost command follows what returns now: the last of its portal's statements, or, `ran_out`,
/// a query that gave all of its rows.
///
/// # Safety
/// Called from the outermost frame, before [`leave`].
pub unsafe fn is_over(returns: *const pg_sys::PlannedStmt, ran_out: bool) -> bool {
    // SAFETY: the outermost portal is alive while it runs, and so is its list.
    unsafe {
        let portal = OUTERMOST.get().portal;
        if portal.is_null() {
            return false;
        }
        if (*portal).strategy == pg_sys::PortalStrategy::PORTAL_ONE_SELECT {
            return ran_out;
        }
        let list = (*portal).stmts;
        let last = if list.is_null() { 0 } else { usize::try_from((*list).length).unwrap_or(0) };
        last > 0 && ptr::addr_eq((*(*list).elements.add(last - 1)).ptr_value, returns)
    }
}

/// Whether nothing of the client's is active: after a rollback, that an error took the outermost command with it.
pub fn nothing_runs() -> bool {
    // SAFETY: a static of this process.
    unsafe { pg_sys::ActivePortal.is_null() }
}

/// The outermost command returned.
#[inline(always)]
pub fn leave() {
    OUTERMOST.set(NOTHING);
}

/// A (sub)transaction was rolled back. When nothing of the client's is active any more, an error took the outermost
/// command with it.
pub fn rolled_back() {
    if nothing_runs() {
        leave();
    }
}

/// The portal that the client's message of that time made; NULL: it is gone, or none was made. PostgreSQL lists its
/// portals nowhere but in the memory that they live in, the newest first; named they are there too.
///
/// # Safety
/// In a client backend, outside of a change of its portals.
pub unsafe fn clients_portal_made_at(time: pg_sys::TimestampTz) -> pg_sys::Portal {
    // SAFETY: walks the tree of memory contexts; a portal's memory lives as long as the portal.
    unsafe {
        let is = |context: pg_sys::MemoryContext, name: &CStr| CStr::from_ptr((*context).name) == name;
        let mut all = (*pg_sys::TopMemoryContext).firstchild;
        while !all.is_null() && !is(all, c"TopPortalContext") {
            all = (*all).nextchild;
        }
        let mut context = if all.is_null() { all } else { (*all).firstchild };
        while !context.is_null() {
            if is(context, c"PortalContext") && !(*context).ident.is_null() {
                let name = (*context).ident;
                let unnamed = ffi::GetPortalByName(c"".as_ptr());
                let is_unnamed = !unnamed.is_null() && (*unnamed).portalContext == context;
                let portal = if is_unnamed { unnamed } else { ffi::GetPortalByName(name) };
                let is_it = !portal.is_null()
                    && (*portal).portalContext == context
                    && (*portal).creation_time == time
                    && is_the_clients(portal);
                if is_it {
                    return portal;
                }
            }
            context = (*context).nextchild;
        }
        ptr::null_mut()
    }
}

/// Which part of the client's string a portal's command is; rules may have added others, which are in no string.
///
/// # Safety
/// The portal is alive.
pub unsafe fn part_of_string(portal: pg_sys::Portal) -> (i32, i32) {
    // SAFETY: the portal is running what is in its list.
    unsafe {
        let list = (*portal).stmts;
        let count = if list.is_null() { 0 } else { usize::try_from((*list).length).unwrap_or(0) };
        (0..count)
            .map(|index| (*(*list).elements.add(index)).ptr_value.cast::<pg_sys::PlannedStmt>())
            .find(|statement| (**statement).canSetTag)
            .map_or((-1, 0), |statement| ((*statement).stmt_location, (*statement).stmt_len))
    }
}

//! Which command of the client is running.
//!
//! A statement is one command of the client with all that it sets off. The client's commands run in portals, and what they set
//! off runs inside the outermost of them; so the frames in `hooks` note the portal of the outermost executor run or utility
//! command, and the first covered write inside opens a statement for it. A portal that is suspended and resumed is still the
//! same statement; a reset callback on its memory tells when it is gone. Writes outside any portal (deferred triggers at the end of an
//! implicit transaction, fast-path calls, background processes) belong to the statement that started at the same time.
//!
//! Every commit starts the counts again, because meters are also marked with their transaction.

use core::ffi::c_char;
use core::ptr;

use pgrx::pg_sys;

use super::budget::Serial;
use crate::ffi::{self, Backend, Opaque};

/// The outermost command now running, as the hooks saw it.
#[derive(Clone, Copy)]
pub struct Outermost {
    pub portal: pg_sys::Portal,
    /// The string that the client sent, and the part of it that is this command.
    source: *const c_char,
    location: i32,
    length: i32,
}

/// NULL portal: nothing of the client's runs, or what runs has no portal.
static OUTERMOST: Backend<Outermost> =
    Backend::new(Outermost { portal: ptr::null_mut(), source: ptr::null(), location: -1, length: 0 });

/// Notes the command as the outermost one, if it is; the caller then calls [`leave`] when it is done.
///
/// # Safety
/// Called by the frames in `hooks`; `source` is NULL or a C string that outlives the command.
#[inline(always)]
pub unsafe fn enter(source: *const c_char, pstmt: *const pg_sys::PlannedStmt) -> bool {
    // SAFETY: statics of this thread; `pstmt` is NULL or the statement being run.
    unsafe {
        let outermost = &mut *OUTERMOST.get();
        if !outermost.portal.is_null() || pg_sys::ActivePortal.is_null() {
            return false;
        }
        outermost.portal = pg_sys::ActivePortal;
        outermost.source = source;
        if !pstmt.is_null() {
            outermost.location = (*pstmt).stmt_location;
            outermost.length = (*pstmt).stmt_len;
        }
        true
    }
}

/// The outermost command returned.
#[inline(always)]
pub fn leave() {
    // SAFETY: a static of this thread.
    unsafe { (*OUTERMOST.get()).portal = ptr::null_mut() }
}

/// A (sub)transaction was rolled back. When nothing of the client's is active any more, an error took the outermost command with it.
pub fn rolled_back() {
    // SAFETY: statics of this thread.
    unsafe {
        if pg_sys::ActivePortal.is_null() {
            leave();
        }
    }
}

/// A statement that charged, or may charge, covered rows.
struct Statement {
    serial: Serial,
    /// NULL when the portal is gone.
    portal: pg_sys::Portal,
    started: pg_sys::TimestampTz,
    source: *const c_char,
    location: i32,
    length: i32,
    /// The text, kept when the portal goes before its deferred triggers have run. Empty while the portal is there.
    kept_text: Vec<u8>,
    callback: pg_sys::MemoryContextCallback,
}

struct State {
    last_serial: Serial,
    /// Place of the current statement among `all`.
    current: Option<usize>,
    #[expect(clippy::vec_box, reason = "PostgreSQL keeps pointers to the callbacks inside")]
    all: Vec<Box<Statement>>,
}

static STATE: Backend<State> = Backend::new(State { last_serial: 0, current: None, all: Vec::new() });

fn state() -> &'static mut State {
    // SAFETY: single-threaded, and nothing below calls back into this file while it holds the reference.
    unsafe { &mut *STATE.get() }
}

/// The statement that a covered write belongs to now; opens it when it is the first.
pub fn current() -> Serial {
    // SAFETY: statics of this thread; GetCurrentStatementStartTimestamp reads a static.
    let (outermost, now) = unsafe { (*OUTERMOST.get(), ffi::GetCurrentStatementStartTimestamp()) };
    let state = state();
    if let Some(current) = state.current {
        let statement = &mut state.all[current];
        let same =
            if outermost.portal.is_null() { statement.started == now } else { statement.portal == outermost.portal };
        if same {
            return statement.serial;
        }
    }
    let resumed = (!outermost.portal.is_null())
        .then(|| state.all.iter().position(|statement| statement.portal == outermost.portal))
        .flatten();
    let place = resumed.unwrap_or_else(|| open(state, outermost));
    let statement = &mut state.all[place];
    statement.started = now;
    state.current = Some(place);
    statement.serial
}

#[cold]
fn open(state: &mut State, outermost: Outermost) -> usize {
    let free = state.all.iter().position(|statement| statement.portal.is_null());
    let place = free.unwrap_or_else(|| {
        state.all.push(Box::new(Statement {
            serial: 0,
            portal: ptr::null_mut(),
            started: 0,
            source: ptr::null(),
            location: -1,
            length: 0,
            kept_text: Vec::new(),
            callback: pg_sys::MemoryContextCallback::default(),
        }));
        state.all.len() - 1
    });
    state.last_serial += 1;
    let serial = state.last_serial;
    let statement = &mut state.all[place];
    statement.serial = serial;
    statement.portal = outermost.portal;
    statement.kept_text.clear();
    // SAFETY: outside a portal the only text is that of the message being worked on, NULL between messages.
    unsafe {
        if outermost.portal.is_null() {
            statement.source = pg_sys::debug_query_string;
            statement.location = -1;
            statement.length = 0;
            keep_text(statement);
            statement.source = ptr::null();
        } else {
            statement.source = outermost.source;
            statement.location = outermost.location;
            statement.length = outermost.length;
            statement.callback.func = Some(portal_gone);
            statement.callback.arg = ptr::from_mut::<Statement>(statement).cast();
            pg_sys::MemoryContextRegisterResetCallback((*outermost.portal).portalContext, &mut statement.callback);
        }
    }
    place
}

/// Longest text kept of a statement whose portal is gone, in bytes. A longer one matches no token any more.
const KEPT_TEXT: usize = 64 * 1024;

/// Copies the text into a buffer that is used again and again.
fn keep_text(statement: &mut Statement) {
    let mut kept = core::mem::take(&mut statement.kept_text);
    kept.clear();
    if let Some(text) = cut(statement) {
        kept.extend_from_slice(&text[..text.len().min(KEPT_TEXT)]);
    }
    statement.kept_text = kept;
}

/// The memory of a statement's portal goes. Deferred triggers may still have to say which statement they belong to.
unsafe extern "C-unwind" fn portal_gone(argument: Opaque) {
    // SAFETY: the argument is the boxed statement that registered this; it is never freed. The source string lives in
    // the portal's memory, which is freed after this call, or in the message's.
    unsafe {
        let statement = &mut *argument.cast::<Statement>();
        keep_text(statement);
        statement.portal = ptr::null_mut();
        statement.source = ptr::null();
    }
}

/// The part of the client's string that is this statement, as it was sent.
fn cut(statement: &Statement) -> Option<&[u8]> {
    if statement.source.is_null() {
        return None;
    }
    // SAFETY: `source` is NULL or alive as long as the portal is.
    let bytes = unsafe { core::ffi::CStr::from_ptr(statement.source) }.to_bytes();
    let from = usize::try_from(statement.location).unwrap_or(0).min(bytes.len());
    let to = match usize::try_from(statement.length) {
        Ok(length) if length > 0 => from.saturating_add(length).min(bytes.len()),
        _ => bytes.len(),
    };
    bytes.get(from..to)
}

/// Whether another statement than the current one may go on later.
pub fn may_resume(serial: Serial) -> bool {
    state().all.iter().any(|statement| statement.serial == serial && !statement.portal.is_null())
}

/// The client's text of the current statement, without surrounding blanks and final semicolon.
pub fn text() -> String {
    let state = state();
    let Some(statement) = state.current.map(|current| &state.all[current]) else {
        return String::new();
    };
    let text = String::from_utf8_lossy(cut(statement).unwrap_or(&statement.kept_text));
    crate::token::statement::normalize(&text).to_owned()
}

/// The parameters the client bound to the current statement; NULL when there are none.
pub fn parameters() -> pg_sys::ParamListInfo {
    let state = state();
    let portal = state.current.map_or(ptr::null_mut(), |current| state.all[current].portal);
    // SAFETY: a portal that is not NULL is alive.
    if portal.is_null() { ptr::null_mut() } else { unsafe { (*portal).portalParams } }
}

/// The transaction is over; a procedure that commits goes on in the same statement.
pub fn end_transaction() {
    let state = state();
    if let Some(current) = state.current
        && state.all[current].portal.is_null()
    {
        state.current = None;
    }
}

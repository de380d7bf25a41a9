//! Which command of the client is running.
//!
//! A statement is one command of the client with all that it sets off. The client's commands run in portals, and what
//! they set off runs inside the outermost of them; so the frames in `hooks` note the portal of the outermost executor
//! run or utility command, and the first covered write inside opens a statement for it. A portal that is suspended and
//! resumed is still the same statement; a reset callback on its memory tells when it is gone. Writes outside any
//! portal of the client's (deferred triggers at a commit, fast-path calls, background processes) belong to the
//! statement that started at the same time.
//!
//! What `execute` runs for a request is a statement of its own, with the reviewed text, inside the client's one: its
//! rows and its lifts are told apart from all that the client's statement does besides.
//!
//! Every commit starts the counts again, because meters are also marked with their transaction.

use core::ffi::{CStr, c_char};
use core::ptr;
use std::borrow::Cow;

use pgrx::pg_sys;

use super::limits::ledger::{Place, Serial};
use crate::event::statement::{Excerpt, MOST_BYTES};
use crate::pg::backend_local::{BackendCell, BackendLocal, Borrowed};
use crate::pg::encoding;
use crate::pg::ffi::{self, Opaque};
#[cfg(feature = "pg18")]
use crate::token::statement::start_of;
use crate::token::statement::{StatementHash, bounds};

/// The outermost command now running, as the hooks saw it.
#[derive(Clone, Copy)]
pub struct Outermost {
    pub portal: pg_sys::Portal,
    /// Something runs that is no command of the client's: a deferred trigger, a held cursor at a commit, a fast-path call.
    not_the_clients: bool,
}

/// NULL portal: nothing of the client's runs, or what runs has no portal.
const NOTHING: Outermost = Outermost { portal: ptr::null_mut(), not_the_clients: false };
static OUTERMOST: BackendCell<Outermost> = BackendCell::new(NOTHING);

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

/// Whether the client asked for what runs in this portal, where no other one is around it. Not so for a function's
/// cursor, whose columns nobody chose a format for: it may run while a statement is planned or bound, in a deferred
/// trigger or in a fast-path call. Nor for a held cursor that a commit runs to its end. Those belong to the message as a
/// whole.
#[inline(always)]
unsafe fn is_the_clients(portal: pg_sys::Portal) -> bool {
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

/// Runs `body` for the client's command of which something is about to be run, with the place that its rows will be
/// charged to.
///
/// # Safety
/// Called inside the executor's start, which has no frame of its own.
pub unsafe fn about_to_run<T>(body: impl FnOnce(Place) -> T) -> T {
    // SAFETY: reads statics.
    let (frame, level) = unsafe { (enter(), ffi::GetCurrentTransactionNestLevel()) };
    let result = body(Place { statement: current(), level });
    if frame == Frame::Outermost {
        leave();
    }
    result
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

/// A statement that charged, or may charge, covered rows.
struct Statement {
    serial: Serial,
    /// NULL when the portal is gone, or when there is none.
    portal: pg_sys::Portal,
    /// Opened before the portal it belongs to, if any: by a function that ran while the statement was planned.
    awaits_portal: bool,
    started: pg_sys::TimestampTz,
    /// The client's text, without surrounding blanks and final semicolon.
    text: Text,
    callback: pg_sys::MemoryContextCallback,
}

/// A part of the client's string: where it is, for as long as the string is there, and its beginning, copied, because what
/// it was copied from may go before the statement does.
struct Text {
    /// The client's string, where the statement has no portal that has it.
    source: *const c_char,
    /// The part of the string.
    from: usize,
    to: usize,
    /// Used again and again.
    kept: Vec<u8>,
}

/// What is known of the string that the client's message has, whose commands come one after the other: without this,
/// each of them would look at all that stands before it and behind it.
struct ClientString {
    /// NULL: nothing is known. Forgotten when the message's memory goes.
    source: *const c_char,
    length: usize,
    /// Up to where it was cut into pieces: the end of a command.
    scanned: usize,
    callback: pg_sys::MemoryContextCallback,
    /// The callback waits for the memory to go.
    registered: bool,
}

static CLIENT_STRING: BackendLocal<ClientString> = BackendLocal::new(ClientString {
    source: ptr::null(),
    length: 0,
    scanned: 0,
    callback: pg_sys::MemoryContextCallback { func: None, arg: ptr::null_mut(), next: ptr::null_mut() },
    registered: false,
});

/// The run of a request's text.
struct Executed {
    serial: Serial,
    text: String,
    parameters: usize,
}

struct State {
    /// Something was charged in this transaction, or set that ends with it.
    touched: bool,
    /// Runs, because one does not go on inside another.
    executed: Option<Executed>,
    last_serial: Serial,
    /// Place of the current statement among `all`.
    current: Option<usize>,
    /// Some of them may wait for their portal.
    some_wait: bool,
    #[expect(clippy::vec_box, reason = "PostgreSQL keeps pointers to the callbacks inside")]
    all: Vec<Box<Statement>>,
}

static STATE: BackendLocal<State> = BackendLocal::new(State {
    touched: false,
    executed: None,
    last_serial: 0,
    current: None,
    some_wait: false,
    all: Vec::new(),
});

#[track_caller]
fn state() -> Borrowed<State> {
    STATE.borrow()
}

/// The statement that a covered write belongs to now; opens it when it is the first.
pub fn current() -> Serial {
    // SAFETY: reads a static.
    let (outermost, now) = (OUTERMOST.get(), unsafe { ffi::GetCurrentStatementStartTimestamp() });
    let state = &mut *state();
    state.touched = true;
    if let Some(executed) = &state.executed {
        return executed.serial;
    }
    if let Some(current) = state.current {
        let statement = &state.all[current];
        let goes_on =
            if outermost.portal.is_null() { statement.started == now } else { statement.portal == outermost.portal };
        if goes_on {
            return statement.serial;
        }
    }
    let known = (!outermost.portal.is_null()).then(|| of_portal(state, outermost.portal)).flatten();
    let place = known.unwrap_or_else(|| open(state, outermost));
    let statement = &mut state.all[place];
    statement.started = now;
    state.current = Some(place);
    statement.serial
}

/// What runs from now on is the reviewed statement of a request, until [`end_execution`].
pub fn begin_execution(text: String, parameters: usize) -> Serial {
    let mut state = state();
    state.touched = true;
    state.last_serial += 1;
    state.executed = Some(Executed { serial: state.last_serial, text, parameters });
    state.last_serial
}

/// The run is over, whichever way it went.
pub fn end_execution() {
    state().executed = None;
}

/// Whether the reviewed statement of a request is running.
#[inline]
pub fn is_executing() -> bool {
    state().executed.is_some()
}

/// The statement of a portal, where it has one already; perhaps one that was opened while the portal's own message was
/// planned or bound, when what ran had no portal yet.
fn of_portal(state: &mut State, portal: pg_sys::Portal) -> Option<usize> {
    if let Some(place) = state.all.iter().position(|statement| statement.portal == portal) {
        return Some(place);
    }
    if !state.some_wait {
        return None;
    }
    // SAFETY: the outermost portal is running.
    let created = unsafe { (*portal).creation_time };
    let place = state.all.iter().position(|statement| statement.awaits_portal && statement.started == created)?;
    attach(&mut state.all[place], portal);
    Some(place)
}

/// Another statement is about to wait for its portal, so what waits has it by now or never will: its message is over, or
/// that command of its string is. Never more than one waits, and none is given up whose portal can still run.
#[cold]
fn settle_waiting(state: &mut State) {
    state.some_wait = false;
    for statement in state.all.iter_mut().filter(|statement| statement.awaits_portal) {
        statement.awaits_portal = false;
        // SAFETY: reads a static; a portal that is found is alive.
        unsafe {
            if statement.started != ffi::GetCurrentStatementStartTimestamp()
                && let portal = clients_portal_made_at(statement.started)
                && !portal.is_null()
            {
                attach(statement, portal);
            }
        }
    }
}

/// The portal that the client's message of that time made; NULL: it is gone, or none was made. PostgreSQL lists its
/// portals nowhere but in the memory that they live in, the newest first; named they are there too.
unsafe fn clients_portal_made_at(time: pg_sys::TimestampTz) -> pg_sys::Portal {
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

fn open(state: &mut State, outermost: Outermost) -> usize {
    if state.some_wait && outermost.portal.is_null() {
        settle_waiting(state);
    }
    let free = state.all.iter().position(|statement| statement.portal.is_null() && !statement.awaits_portal);
    let place = free.unwrap_or_else(|| {
        state.all.push(Box::new(Statement {
            serial: 0,
            portal: ptr::null_mut(),
            awaits_portal: false,
            started: 0,
            text: Text { source: ptr::null(), from: 0, to: 0, kept: Vec::new() },
            callback: pg_sys::MemoryContextCallback::default(),
        }));
        state.all.len() - 1
    });
    state.last_serial += 1;
    let statement = &mut state.all[place];
    statement.serial = state.last_serial;
    if outermost.portal.is_null() {
        statement.awaits_portal = true;
        state.some_wait = true;
        // SAFETY: NULL or the string of the message that is being worked on.
        unsafe { statement.text.keep(pg_sys::debug_query_string, -1, 0) };
    } else {
        attach(statement, outermost.portal);
    }
    place
}

/// Ties a statement to the client's portal, until that is gone.
fn attach(statement: &mut Statement, portal: pg_sys::Portal) {
    statement.portal = portal;
    statement.awaits_portal = false;
    statement.callback.func = Some(portal_gone);
    statement.callback.arg = ptr::from_mut::<Statement>(statement).cast();
    // SAFETY: the outermost portal is running, and so is the text it was made from. The boxed statement is never
    // freed.
    unsafe {
        let (location, length) = part_of_string(portal);
        statement.text.keep((*portal).sourceText, location, length);
        ffi::MemoryContextRegisterResetCallback((*portal).portalContext, &mut statement.callback);
    }
}

/// Which part of the client's string a portal's command is; rules may have added others, which are in no string.
unsafe fn part_of_string(portal: pg_sys::Portal) -> (i32, i32) {
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

/// A buffer that grew past this many bytes is given back with its transaction.
const KEPT_BUFFER: usize = 4 * 1024;

impl Text {
    /// Notes the part of a string that is a statement, and copies its beginning.
    unsafe fn keep(&mut self, source: *const c_char, location: i32, length: i32) {
        self.kept.clear();
        (self.source, self.from, self.to) = (source, 0, 0);
        if source.is_null() {
            return;
        }
        // SAFETY: the caller's promise: a C string, of which the location is a part.
        let bytes = unsafe { core::slice::from_raw_parts(source.cast::<u8>(), length_of(source)) };
        let first = usize::try_from(location).unwrap_or(0).min(bytes.len());
        let to = match usize::try_from(length) {
            Ok(length) if length > 0 => first.saturating_add(length).min(bytes.len()),
            _ => bytes.len(),
        };
        // SAFETY: as above.
        let from = unsafe { start(source, bytes, first, to) };
        let part = bounds(&bytes[from..to]);
        (self.from, self.to) = (from + part.start, from + part.end);
        self.kept.extend_from_slice(encoding::beginning(&bytes[self.from..self.to], MOST_BYTES));
    }

    /// All of the text, in the server's encoding, where it is still to be had: a copy of a short one, and a long one where
    /// it is, until the message is over. `portal` is the statement's, or NULL.
    unsafe fn whole(&self, portal: pg_sys::Portal) -> Option<Cow<'static, [u8]>> {
        if self.kept.len() == self.to - self.from {
            return Some(Cow::Owned(self.kept.clone()));
        }
        // SAFETY: the portal is alive, and its text with it, unless the portal is NULL; the client's string is, as long
        // as it is known.
        unsafe {
            let source = if !portal.is_null() {
                (*portal).sourceText
            } else if self.source == (*CLIENT_STRING.get()).source {
                self.source
            } else {
                return None;
            };
            Some(Cow::Borrowed(core::slice::from_raw_parts(source.cast::<u8>().add(self.from), self.to - self.from)))
        }
    }

    /// A copy of what is kept, and how many bytes there are in all.
    fn beginning(&self) -> (Vec<u8>, usize) {
        (self.kept.clone(), self.to - self.from)
    }

    /// Nothing needs it any more.
    fn forget(&mut self) {
        self.kept.clear();
        self.kept.shrink_to(KEPT_BUFFER);
        (self.source, self.from, self.to) = (ptr::null(), 0, 0);
    }
}

/// The length of a C string. That of the client's message is asked for by each command in it, and is counted once.
unsafe fn length_of(source: *const c_char) -> usize {
    // SAFETY: the caller's promise. The callback is a static, and the message's memory goes with the next message at the
    // latest; what was registered twice would make a ring.
    unsafe {
        let string = CLIENT_STRING.get();
        if (*string).source == source {
            return (*string).length;
        }
        let length = core::ffi::CStr::from_ptr(source).count_bytes();
        let is_messages =
            source == pg_sys::debug_query_string && pg_sys::MyBackendType == pg_sys::BackendType::B_BACKEND;
        if is_messages && !pg_sys::MessageContext.is_null() {
            ((*string).source, (*string).length, (*string).scanned) = (source, length, 0);
            if !core::mem::replace(&mut (*string).registered, true) {
                (*string).callback.func = Some(message_gone);
                ffi::MemoryContextRegisterResetCallback(pg_sys::MessageContext, &raw mut (*string).callback);
            }
        }
        length
    }
}

/// The memory of the client's message goes.
unsafe extern "C-unwind" fn message_gone(_argument: Opaque) {
    // SAFETY: a static of this process.
    unsafe {
        let string = CLIENT_STRING.get();
        ((*string).source, (*string).registered) = (ptr::null(), false);
    }
}

/// Where the text of a statement begins that has its first word at `first` and its end at `to`. Up to 17 PostgreSQL's
/// parser says that itself.
#[cfg(not(feature = "pg18"))]
unsafe fn start(_source: *const c_char, _bytes: &[u8], first: usize, _to: usize) -> usize {
    first
}

/// The same: each part of the client's string is cut into pieces once, however many commands it has.
#[cfg(feature = "pg18")]
unsafe fn start(source: *const c_char, bytes: &[u8], first: usize, to: usize) -> usize {
    // SAFETY: statics of this process.
    unsafe {
        let string = CLIENT_STRING.get();
        let is_known = (*string).source == source;
        let done = if is_known && (*string).scanned <= first { (*string).scanned } else { 0 };
        let from = done + start_of(&bytes[done..], first - done, !pg_sys::standard_conforming_strings);
        if is_known {
            (*string).scanned = to;
        }
        from
    }
}

/// The memory of a statement's portal goes.
unsafe extern "C-unwind" fn portal_gone(argument: Opaque) {
    // SAFETY: the argument is the boxed statement that registered this; it is never freed.
    unsafe { (*argument.cast::<Statement>()).portal = ptr::null_mut() }
}

/// The current statement, where there is one; opens none.
pub fn running() -> Option<Serial> {
    let state = state();
    state.current.map(|current| state.all[current].serial)
}

/// Whether a statement may go on later.
pub fn may_resume(serial: Serial) -> bool {
    let alive = |statement: &Statement| !statement.portal.is_null() || statement.awaits_portal;
    let state = state();
    state.executed.as_ref().is_some_and(|executed| executed.serial == serial)
        || state.all.iter().any(|statement| statement.serial == serial && alive(statement))
}

/// The beginning of the client's text of the current statement, without surrounding blanks and final semicolon; of the
/// reviewed text while a request is executed.
pub fn excerpt() -> Excerpt {
    let (kept, all) = {
        let state = state();
        match (&state.executed, state.current) {
            (Some(executed), _) => return Excerpt::of(&executed.text),
            (None, Some(current)) => state.all[current].text.beginning(),
            (None, None) => return Excerpt::default(),
        }
    };
    Excerpt::of_server(&kept, all)
}

/// Gives the hash the text of the current statement, as [`excerpt`] has its beginning. False where not all of it is to be
/// had any more.
pub fn hash_text(hash: &mut StatementHash) -> bool {
    let whole = {
        let state = state();
        match (&state.executed, state.current) {
            (Some(executed), _) => {
                encoding::in_utf8(&encoding::to_server(&executed.text), |part| hash.text(part));
                return true;
            }
            (None, Some(current)) => {
                let statement = &state.all[current];
                // SAFETY: a portal that is not NULL is alive.
                unsafe { statement.text.whole(statement.portal) }
            }
            (None, None) => return true,
        }
    };
    let Some(whole) = whole else { return false };
    encoding::in_utf8(&whole, |part| hash.text(part));
    true
}

/// The parameters the client bound to the current statement; NULL when there are none.
pub fn parameters() -> pg_sys::ParamListInfo {
    let state = state();
    let portal = state.current.map_or(ptr::null_mut(), |current| state.all[current].portal);
    // SAFETY: a portal that is not NULL is alive.
    if portal.is_null() { ptr::null_mut() } else { unsafe { (*portal).portalParams } }
}

/// How many parameters the client bound to the current statement, or the request has that is executed.
pub fn parameter_count() -> usize {
    if let Some(executed) = &state().executed {
        return executed.parameters;
    }
    let parameters = parameters();
    // SAFETY: NULL or the parameters of a portal that is alive.
    let count = if parameters.is_null() { 0 } else { unsafe { (*parameters).numParams } };
    usize::try_from(count).unwrap_or(0)
}

/// Something of this library's is to be told of the transaction's end.
pub fn touch() {
    state().touched = true;
}

/// Whether anything was charged in the transaction that ends; asks once.
#[inline(always)]
pub fn take_touched() -> bool {
    core::mem::replace(&mut state().touched, false)
}

/// One of the client's commands is over and the next one begins, though perhaps in the same string: what a COMMIT sets
/// off is not charged to the command before it.
#[inline(always)]
pub fn between_commands() {
    state().current = None;
}

/// The transaction is over; a procedure that commits goes on in the same statement, which this tells.
pub fn end_transaction() -> bool {
    let state = &mut *state();
    state.executed = None;
    let is_over = |one: &&mut Statement| one.portal.is_null() && one.text.kept.capacity() > KEPT_BUFFER;
    state.all.iter_mut().map(|one| &mut **one).filter(is_over).for_each(|one| one.text.forget());
    if core::mem::replace(&mut state.some_wait, false) {
        state.all.iter_mut().for_each(|statement| statement.awaits_portal = false);
    }
    if let Some(current) = state.current
        && state.all[current].portal.is_null()
    {
        state.current = None;
    }
    state.current.is_some()
}

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
//! rows and its lifts are kept apart from all else that the client's statement does.
//!
//! Every commit starts the counts again, because meters are also marked with their transaction.

use core::ffi::CStr;
use core::ptr;

use pgrx::pg_sys;
use rules::words::{Place, Serial};

use super::excerpt::Excerpt;
use super::portal::{self, Frame, OUTERMOST, Outermost};
use super::statement_text::Text;
use super::{transaction_block, xact};
use crate::pg::backend_local::{BackendLocal, Borrowed};
use crate::pg::encoding;
use crate::pg::ffi::{self, Opaque};

/// What ties a statement to its portal and its command. Never freed and never borrowed, because PostgreSQL keeps a pointer
/// to it: it is read and written in place.
struct Tie {
    /// NULL when the portal is gone, or when there is none.
    portal: pg_sys::Portal,
    callback: pg_sys::MemoryContextCallback,
    /// The next command of the client's string has begun.
    is_over: bool,
    /// Of the memory that PostgreSQL has for one command of a string, and whether it waits for that to go.
    command: pg_sys::MemoryContextCallback,
    awaits_end: bool,
}

/// A statement that charged, or may charge, covered rows.
struct Statement {
    serial: Serial,
    tie: *mut Tie,
    /// Opened before the portal it belongs to, if any: by a function that ran while the statement was planned.
    awaits_portal: bool,
    started: pg_sys::TimestampTz,
    /// The client's text, without surrounding blanks and final semicolon.
    text: Text,
}

impl Statement {
    fn new() -> Self {
        let tie = Tie {
            portal: ptr::null_mut(),
            callback: pg_sys::MemoryContextCallback::default(),
            is_over: false,
            command: pg_sys::MemoryContextCallback::default(),
            awaits_end: false,
        };
        Self { serial: 0, tie: Box::into_raw(Box::new(tie)), awaits_portal: false, started: 0, text: Text::new() }
    }

    /// NULL when the portal is gone, or when there is none.
    fn portal(&self) -> pg_sys::Portal {
        // SAFETY: as `Tie` says.
        unsafe { (*self.tie).portal }
    }

    /// Whether it may be the statement of a portal that is still to come.
    fn awaits_portal(&self) -> bool {
        self.awaits_portal && !self.is_over()
    }

    /// Whether the next command of the client's string has begun.
    fn is_over(&self) -> bool {
        // SAFETY: as `Tie` says.
        unsafe { (*self.tie).is_over }
    }

    /// Ties it to the client's portal, until that is gone.
    ///
    /// # Safety
    /// The portal is alive, and so is the text that it was made from.
    unsafe fn attach(&mut self, to: pg_sys::Portal) {
        self.awaits_portal = false;
        // SAFETY: the caller's promise, and as `Tie` says.
        unsafe {
            (*self.tie).portal = to;
            (*self.tie).callback.func = Some(portal_gone);
            (*self.tie).callback.arg = self.tie.cast();
            let (location, length) = portal::part_of_string(to);
            if self.text.keep((*to).sourceText, location, length) {
                self.await_end();
            }
            ffi::MemoryContextRegisterResetCallback((*to).portalContext, &raw mut (*self.tie).callback);
        }
    }

    /// Registers for the moment when its command is over and another one of the client's string begins: all but the last
    /// one have memory of their own.
    #[cold]
    fn await_end(&mut self) {
        // SAFETY: walks the tree of memory contexts. As `Tie` says; what it waits for already is the same memory, because
        // that of the command before is gone.
        unsafe {
            let mut context = pg_sys::MessageContext;
            context = if context.is_null() { context } else { (*context).firstchild };
            while !context.is_null() && CStr::from_ptr((*context).name) != c"per-parsetree message context" {
                context = (*context).nextchild;
            }
            if !context.is_null() && !core::mem::replace(&mut (*self.tie).awaits_end, true) {
                (*self.tie).command.func = Some(command_over);
                (*self.tie).command.arg = self.tie.cast();
                ffi::MemoryContextRegisterResetCallback(context, &raw mut (*self.tie).command);
            }
        }
    }
}

/// The memory of a command goes that is not the last one of its string.
unsafe extern "C-unwind" fn command_over(argument: Opaque) {
    // SAFETY: the argument is the tie that registered this; it is never freed.
    unsafe { ((*argument.cast::<Tie>()).awaits_end, (*argument.cast::<Tie>()).is_over) = (false, true) }
}

/// Whether what runs without a portal, after a command of a string, runs while a later one is planned. It may as well be
/// set off by the commit at the string's end, and belongs to the command before then.
#[cold]
fn next_is_planned() -> bool {
    // SAFETY: these read statics. A commit by COMMIT is no part of any command before it. Without a block the string has
    // an implicit one, which its end closes first; but a subtransaction looks the same in both cases.
    unsafe {
        transaction_block::is_explicit()
            || (ffi::GetCurrentTransactionNestLevel() == 1 && ffi::IsTransactionBlock())
            || (pg_sys::ActivePortal.is_null() && ffi::pg_trigger_depth(ptr::null_mut()).value() == 0)
    }
}

/// Reset callback on the memory of a statement's portal.
unsafe extern "C-unwind" fn portal_gone(argument: Opaque) {
    // SAFETY: the argument is the tie that registered this; it is never freed.
    unsafe { (*argument.cast::<Tie>()).portal = ptr::null_mut() }
}

/// The run of a request's text.
struct Executed {
    serial: Serial,
    text: String,
    parameters: usize,
}

struct State {
    /// The run of a request's text, if there is one: one never runs inside another.
    executed: Option<Executed>,
    last_serial: Serial,
    /// Place of the current statement among `all`.
    current: Option<usize>,
    /// Some of them may wait for their portal.
    some_wait: bool,
    all: Vec<Statement>,
}

static STATE: BackendLocal<State> =
    BackendLocal::new(State { executed: None, last_serial: 0, current: None, some_wait: false, all: Vec::new() });

#[track_caller]
fn state() -> Borrowed<State> {
    STATE.borrow()
}

/// The statement that a covered write belongs to now; opens it when it is the first.
pub fn current() -> Serial {
    // SAFETY: reads a static.
    let (outermost, now) = (OUTERMOST.get(), unsafe { ffi::GetCurrentStatementStartTimestamp() });
    xact::touch();
    let state = &mut *state();
    if let Some(executed) = &state.executed {
        return executed.serial;
    }
    if let Some(current) = state.current {
        let statement = &state.all[current];
        let goes_on = if outermost.portal.is_null() {
            statement.started == now && !(statement.is_over() && next_is_planned())
        } else {
            statement.portal() == outermost.portal
        };
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
    xact::touch();
    let mut state = state();
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
    if let Some(place) = state.all.iter().position(|statement| statement.portal() == portal) {
        return Some(place);
    }
    if !state.some_wait {
        return None;
    }
    // SAFETY: the outermost portal is running.
    let created = unsafe { (*portal).creation_time };
    let place = state.all.iter().position(|statement| statement.awaits_portal() && statement.started == created)?;
    // SAFETY: it is running.
    unsafe { state.all[place].attach(portal) };
    Some(place)
}

/// Another statement is about to wait for its portal, so what waits has it by now or never will: its message is over, or
/// that command of its string is. Never more than one waits, and none is given up whose portal can still run.
#[cold]
fn settle_waiting(state: &mut State) {
    state.some_wait = false;
    for statement in state.all.iter_mut().filter(|statement| statement.awaits_portal()) {
        statement.awaits_portal = false;
        // SAFETY: reads a static; a portal that is found is alive.
        unsafe {
            if statement.started != ffi::GetCurrentStatementStartTimestamp()
                && let portal = portal::clients_portal_made_at(statement.started)
                && !portal.is_null()
            {
                statement.attach(portal);
            }
        }
    }
}

fn open(state: &mut State, outermost: Outermost) -> usize {
    if state.some_wait && outermost.portal.is_null() {
        settle_waiting(state);
    }
    let free = state.all.iter().position(|statement| statement.portal().is_null() && !statement.awaits_portal());
    let place = free.unwrap_or_else(|| {
        state.all.push(Statement::new());
        state.all.len() - 1
    });
    state.last_serial += 1;
    let statement = &mut state.all[place];
    statement.serial = state.last_serial;
    // SAFETY: as `Tie` says.
    unsafe { (*statement.tie).is_over = false };
    if outermost.portal.is_null() {
        statement.awaits_portal = true;
        state.some_wait = true;
        // SAFETY: NULL or the string of the message that is being worked on.
        unsafe { statement.text.keep(pg_sys::debug_query_string, -1, 0) };
        statement.await_end();
    } else {
        // SAFETY: it is running.
        unsafe { statement.attach(outermost.portal) };
    }
    place
}

/// Runs `body` for the client's command of which something is about to be run, with the place that its rows will be
/// charged to.
///
/// # Safety
/// Called inside the executor's start, which has no frame of its own.
pub unsafe fn about_to_run<T>(body: impl FnOnce(Place) -> T) -> T {
    // SAFETY: reads statics.
    let (frame, level) = unsafe { (portal::enter(), ffi::GetCurrentTransactionNestLevel()) };
    let result = body(Place { statement: current(), level });
    if frame == Frame::Outermost {
        portal::leave();
    }
    result
}

/// The current statement, where there is one; opens none.
pub fn running() -> Option<Serial> {
    let state = state();
    state.current.map(|current| state.all[current].serial)
}

/// Whether a statement may still change rows: its portal is alive, or it waits for one.
pub fn may_resume(serial: Serial) -> bool {
    let alive = |statement: &Statement| !statement.portal().is_null() || statement.awaits_portal();
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

/// Gives `take` the text of the current statement in UTF-8, part by part, as [`excerpt`] has its beginning. False where not all
/// of it is to be had any more.
pub fn whole_text(mut take: impl FnMut(&[u8])) -> bool {
    let whole = {
        let state = state();
        match (&state.executed, state.current) {
            (Some(executed), _) => {
                encoding::in_utf8(&encoding::to_server(&executed.text), take);
                return true;
            }
            (None, Some(current)) => {
                let statement = &state.all[current];
                // SAFETY: a portal that is not NULL is alive.
                unsafe { statement.text.whole(statement.portal()) }
            }
            (None, None) => return true,
        }
    };
    let Some(whole) = whole else { return false };
    encoding::in_utf8(&whole, &mut take);
    true
}

/// The parameters the client bound to the current statement; NULL when there are none.
pub fn parameters() -> pg_sys::ParamListInfo {
    let state = state();
    let portal = state.current.map_or(ptr::null_mut(), |current| state.all[current].portal());
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

/// One of the client's commands is over and the next one begins, though perhaps in the same string: what a COMMIT sets
/// off is not charged to the command before it.
#[inline(always)]
pub fn between_commands() {
    state().current = None;
}

/// The transaction is over. True where the statement continues, as in a procedure that commits.
pub fn end_transaction() -> bool {
    let state = &mut *state();
    state.executed = None;
    for over in state.all.iter_mut().filter(|one| one.portal().is_null()) {
        over.text.give_back();
    }
    if core::mem::replace(&mut state.some_wait, false) {
        state.all.iter_mut().for_each(|statement| statement.awaits_portal = false);
    }
    if let Some(current) = state.current
        && state.all[current].portal().is_null()
    {
        state.current = None;
    }
    state.current.is_some()
}

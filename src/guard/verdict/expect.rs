//! Which write has to meet `writeguard.expect_rows`, and what happens when it does not.
//!
//! It is the client's own command: what it sent, also by way of EXECUTE, EXPLAIN ANALYZE or COPY (…) TO. What functions
//! and triggers do is not. The executor is handed the very string that a portal was made from, so a query of the client's
//! command is known by that string's address; whatever runs inside has a string of its own. The expectation is used up
//! when the command begins, and decided when it has changed its last row and its AFTER triggers have not run yet.
//! EXECUTE runs a portal of its own and is decided by the command tag that comes out of it.
//!
//! Not seen: a command that a rule replaces by nothing. It runs nothing at all, and leaves the expectation as it is.

use core::ffi::c_char;
use core::ptr;

use pgrx::pg_sys;
use rules::error::Error;
use rules::words::RelationName;

use crate::event::rate_limit;
use crate::event::record::{Event, Kind};
use crate::pg::backend_local::{BackendLocal, Borrowed};
use crate::pg::ereport::{PendingError, guarded};
use crate::pg::ffi;
use crate::policy::{catalog, relation};
use crate::session::{expectation, portal, settings, statement, xact};

/// A string that queries are known by, and the nest level of the transaction that it was noted in: after an error its
/// memory may be somebody else's.
#[derive(Clone, Copy)]
struct Source {
    text: *const c_char,
    level: i32,
}

impl Source {
    const NONE: Self = Self { text: ptr::null(), level: 0 };

    fn note(text: *const c_char) -> Self {
        // SAFETY: reads a static.
        Self { text, level: unsafe { ffi::GetCurrentTransactionNestLevel() } }
    }

    fn is(self, text: *const c_char) -> bool {
        !self.text.is_null() && self.text == text
    }
}

struct State {
    /// The command that has begun and is not decided yet.
    command: Source,
    /// What it has to meet.
    expected: i32,
    /// No query of the command sets its tag: a rule does something else instead.
    replaced: bool,
    /// What EXPLAIN explains, where that is a prepared statement.
    explained: Source,
}

static STATE: BackendLocal<State> =
    BackendLocal::new(State { command: Source::NONE, expected: 0, replaced: false, explained: Source::NONE });

#[track_caller]
fn state() -> Borrowed<State> {
    STATE.borrow()
}

/// Whether a command is running that has something to meet.
#[inline(always)]
pub fn is_pending() -> bool {
    !state().command.text.is_null()
}

/// A (sub)transaction of this level was rolled back, perhaps by an error in a command; 0: the transaction is over.
pub fn roll_back(level: i32) {
    let mut state = state();
    if state.command.level >= level {
        state.command = Source::NONE;
    }
    if state.explained.level >= level {
        state.explained = Source::NONE;
    }
}

/// The word of a command tag that shows how many rows were changed.
fn word_of_tag(tag: pg_sys::CommandTag::Type) -> Option<&'static str> {
    match tag {
        pg_sys::CommandTag::CMDTAG_UPDATE => Some("update"),
        pg_sys::CommandTag::CMDTAG_DELETE => Some("delete"),
        pg_sys::CommandTag::CMDTAG_MERGE => Some("merge"),
        _ => None,
    }
}

fn word_of(operation: pg_sys::CmdType::Type) -> Option<&'static str> {
    match operation {
        pg_sys::CmdType::CMD_UPDATE => Some("update"),
        pg_sys::CmdType::CMD_DELETE => Some("delete"),
        pg_sys::CmdType::CMD_MERGE => Some("merge"),
        _ => None,
    }
}

/// Whether a query is what gives such a command its tag.
unsafe fn sets_tag(statement: *const pg_sys::PlannedStmt) -> bool {
    // SAFETY: a planned statement that is being run.
    unsafe { (*statement).canSetTag && word_of((*statement).commandType).is_some() }
}

/// Before a query is started while something is expected: uses the expectation up if the client's command begins here.
///
/// # Safety
/// Called from a plain old frame with the arguments of ExecutorStart.
#[cold]
pub unsafe fn starting(query_desc: *const pg_sys::QueryDesc, eflags: i32) {
    // SAFETY: the caller's promise; a client's portal is alive while it runs.
    unsafe {
        let portal = portal::clients_portal();
        if portal.is_null() || eflags & pg_sys::EXEC_FLAG_EXPLAIN_ONLY as i32 != 0 {
            return;
        }
        let text = (*query_desc).sourceText;
        if state().command.is(text) {
            // A further query of a command that has begun; what was SET meanwhile is for the next one.
            return;
        }
        let mut replaced = false;
        if text == (*portal).sourceText && word_of_tag((*portal).commandTag).is_some() {
            // Rules may have added others, also before the one with the tag.
            let list = (*portal).stmts;
            let count = if list.is_null() { 0 } else { usize::try_from((*list).length).unwrap_or(0) };
            replaced = !(0..count).any(|index| sets_tag((*(*list).elements.add(index)).ptr_value.cast()));
        } else {
            // Inside of EXPLAIN or COPY.
            let is_the_clients = text == (*portal).sourceText || state().explained.is(text);
            if !is_the_clients || !sets_tag((*query_desc).plannedstmt) {
                return;
            }
        }
        let expected = expectation::use_up();
        xact::touch();
        let mut state = state();
        (state.command, state.expected, state.replaced) = (Source::note(text), expected, replaced);
    }
}

/// After ExecutorRun while a command has something to meet. Gives what to raise.
///
/// # Safety
/// `query_desc` was just run; called from a plain old frame.
#[cold]
pub unsafe fn after_run(query_desc: *const pg_sys::QueryDesc) -> *mut PendingError {
    // SAFETY: the caller's promise.
    unsafe {
        let (command, expected, replaced) = {
            let state = state();
            (state.command, state.expected, state.replaced)
        };
        let plan = (*query_desc).plannedstmt;
        if !command.is((*query_desc).sourceText) || !(replaced || sets_tag(plan)) {
            return ptr::null_mut();
        }
        state().command = Source::NONE;
        if !replaced {
            let operation = word_of((*query_desc).operation).unwrap_or_default();
            let rows = (*(*query_desc).estate).es_processed;
            return decide(operation, expected, rows, || target(plan));
        }
        let portal = portal::clients_portal();
        let tag = if portal.is_null() { None } else { word_of_tag((*portal).commandTag) };
        decide(tag.unwrap_or_default(), expected, 0, || None)
    }
}

/// Before a utility command of the client's runs while something is expected. Gives what an EXECUTE has to meet, else
/// [`settings::NO_EXPECTATION`].
///
/// # Safety
/// Called from the outermost frame.
#[cold]
pub unsafe fn utility_starting(command: *mut pg_sys::Node) -> i32 {
    state().explained = Source::NONE;
    // SAFETY: the caller's promise; a node is what its type says.
    unsafe {
        if portal::clients_portal().is_null() {
            return settings::NO_EXPECTATION;
        }
        match (*command).type_ {
            pg_sys::NodeTag::T_ExecuteStmt => {
                let source = prepared(command.cast());
                if !source.is_null() && word_of_tag((*source).commandTag).is_some() {
                    return expectation::use_up();
                }
            }
            pg_sys::NodeTag::T_ExplainStmt => {
                let query: *mut pg_sys::Query = (*command.cast::<pg_sys::ExplainStmt>()).query.cast();
                if !query.is_null()
                    && (*query).type_ == pg_sys::NodeTag::T_Query
                    && !(*query).utilityStmt.is_null()
                    && (*(*query).utilityStmt).type_ == pg_sys::NodeTag::T_ExecuteStmt
                {
                    let source = prepared((*query).utilityStmt.cast());
                    if !source.is_null() {
                        xact::touch();
                        state().explained = Source::note((*source).query_string);
                    }
                }
            }
            _ => {}
        }
        settings::NO_EXPECTATION
    }
}

/// What was prepared under the name that an EXECUTE gives; NULL where there is nothing.
unsafe fn prepared(execute: *const pg_sys::ExecuteStmt) -> *mut pg_sys::CachedPlanSource {
    // SAFETY: an EXECUTE's name is a C string; an unknown one gives NULL.
    unsafe {
        let entry = ffi::FetchPreparedStatement((*execute).name, false);
        if entry.is_null() { ptr::null_mut() } else { (*entry).plansource }
    }
}

/// After an EXECUTE that had something to meet. Gives what to raise.
///
/// # Safety
/// Called from the outermost frame with the EXECUTE and its completion, which may be NULL.
#[cold]
pub unsafe fn after_execute(
    execute: *const pg_sys::ExecuteStmt,
    completion: *const pg_sys::QueryCompletion,
    expected: i32,
) -> *mut PendingError {
    // SAFETY: the caller's promise.
    unsafe {
        let Some(completion) = completion.as_ref() else { return ptr::null_mut() };
        let Some(operation) = word_of_tag(completion.commandTag) else { return ptr::null_mut() };
        decide(operation, expected, completion.nprocessed, || target_of_prepared(prepared(execute)))
    }
}

/// The table that a plan's own command names.
unsafe fn target(statement: *const pg_sys::PlannedStmt) -> Option<pg_sys::Oid> {
    // SAFETY: a planned statement; result relations are places in its range table, counted from one.
    unsafe {
        let plan = (*statement).planTree;
        let place = if (*plan).type_ == pg_sys::NodeTag::T_ModifyTable {
            (*plan.cast::<pg_sys::ModifyTable>()).nominalRelation
        } else {
            ffi::first_result_relation(statement)
        };
        entry((*statement).rtable, place)
    }
}

/// The table that a prepared statement names, where it is still prepared.
unsafe fn target_of_prepared(source: *const pg_sys::CachedPlanSource) -> Option<pg_sys::Oid> {
    // SAFETY: NULL or a prepared statement; its list holds queries, result relations are places in their range tables.
    unsafe {
        let list = source.as_ref()?.query_list;
        let count = if list.is_null() { 0 } else { usize::try_from((*list).length).unwrap_or(0) };
        (0..count)
            .map(|index| (*(*list).elements.add(index)).ptr_value.cast::<pg_sys::Query>())
            .find(|query| (**query).canSetTag)
            .and_then(|query| entry((*query).rtable, u32::try_from((*query).resultRelation).unwrap_or(0)))
    }
}

unsafe fn entry(range_table: *const pg_sys::List, place: u32) -> Option<pg_sys::Oid> {
    // SAFETY: NULL or a list of range table entries.
    unsafe {
        let index = usize::try_from(place).ok()?.checked_sub(1)?;
        let list = range_table.as_ref()?;
        if index >= usize::try_from(list.length).unwrap_or(0) {
            return None;
        }
        let relation = (*(*list.elements.add(index)).ptr_value.cast::<pg_sys::RangeTblEntry>()).relid;
        (relation != pg_sys::InvalidOid).then_some(relation)
    }
}

/// Refuses a command that changed another number of rows, after its event is on disk or its time is over.
fn decide(
    operation: &'static str,
    expected: i32,
    rows: u64,
    target: impl FnOnce() -> Option<pg_sys::Oid>,
) -> *mut PendingError {
    // Only what is in force is used up, so there is no negative one.
    let expected = u64::from(expected.unsigned_abs());
    if rows == expected {
        return ptr::null_mut();
    }
    guarded(|| {
        let relation: Option<RelationName> = target().and_then(relation::relation_name);
        // Opens the statement, so that its text is at hand.
        statement::current();
        let mut event = Event::new(Kind::ExpectationFailed);
        event.operation = Some(operation.to_owned());
        event.relation = relation.as_ref().map(RelationName::to_sql);
        event.scope = Some("expectation".to_owned());
        event.row_limit = Some(expected);
        event.rows = Some(rows);
        event.tell_statement(&statement::excerpt());
        let id = match catalog::installed() {
            Ok(true) => rate_limit::record_and_wait(&event)?,
            // There is no table to store it in.
            Ok(false) => {
                event.log();
                None
            }
            Err(error) => {
                event.log();
                return Err(error.into());
            }
        };
        Err(Error::Expectation { operation, relation, expected, rows }.recorded(id).into())
    })
}

//! What happens past a limit: an override in order lifts it for this statement, anything else is refused and recorded.
//!
//! A lift belongs to the statement and to the subtransaction it was made in. When that is rolled back the lift goes
//! with it, as does the use of its token; when the transaction commits, each lift that is left becomes an `overridden`
//! event in the same commit.

use std::rc::Rc;

use pgrx::pg_sys;

use super::budget::{Ledger, MeterId, Past, Place, Serial};
use super::statement;
use crate::error::{Error, WayOut};
use crate::event::record::{Event, Kind};
use crate::event::{queue, store};
use crate::ffi::{self, Backend};
use crate::policy::table::Loaded;
use crate::raise::{Failure, log_line};
use crate::session;
use crate::settings;
use crate::token::check::{self, Grant};
use crate::token::statement::statement_hash;
use crate::words::{Operation, Override, RelationName, Scope};

/// A write that went past a limit.
pub struct Attempt<'a> {
    pub relation: &'a RelationName,
    pub operation: Operation,
    pub policy: &'a Rc<Loaded>,
    pub meter: MeterId,
    pub past: Past,
    pub place: Place,
    /// The planner's or the catalog's estimate of the rows.
    pub estimate: Option<u64>,
}

struct Lift {
    meter: MeterId,
    statement: Serial,
    level: i32,
    event: Event,
}

struct Granted {
    statement: Serial,
    level: i32,
    grant: Grant,
    /// The meters of the tables that were charged so far, each with its reviewed rows; none for a table that was not
    /// reviewed.
    tables: Vec<(MeterId, Option<u64>)>,
}

struct State {
    lifts: Vec<Lift>,
    granted: Vec<Granted>,
    /// The subtransactions in which a statement is run to be taken back: nothing is refused in them.
    rehearsals: Vec<i32>,
    /// The last statement recorded as running with the guard switched off.
    disabled: Serial,
    /// What the current statement was refused already, inside exception blocks: the meter, and the event's id.
    refused: Vec<(Serial, MeterId, Option<i64>)>,
}

static STATE: Backend<State> = Backend::new(State {
    lifts: Vec::new(),
    granted: Vec::new(),
    rehearsals: Vec::new(),
    disabled: 0,
    refused: Vec::new(),
});

fn state() -> &'static mut State {
    // SAFETY: single-threaded; no reference is kept across SPI.
    unsafe { &mut *STATE.get() }
}

/// Whether the policy behind `meter` is lifted for this statement, and the flag that lifted it is still armed: a
/// function's SET clause, say, lifts nothing after the function.
#[inline]
pub fn is_lifted(meter: MeterId, statement: Serial) -> bool {
    let state = state();
    let lifted = || state.lifts.iter().any(|lift| lift.meter == meter && lift.statement == statement);
    !state.rehearsals.is_empty() || lifted() && session::flag()
}

/// Whether more than the limits decides about a statement's further rows.
pub fn has_say(statement: Serial) -> bool {
    is_rehearsing() || is_granted(statement) || has_lift(statement)
}

/// Whether a statement lifted anything, so that its count is needed until the transaction ends.
pub fn has_lift(statement: Serial) -> bool {
    state().lifts.iter().any(|lift| lift.statement == statement)
}

/// Whether anything is lifted in this transaction.
pub fn has_lifts() -> bool {
    !state().lifts.is_empty()
}

/// Whether a token was accepted for this statement, so that its rows per table are bounded.
#[inline]
pub fn is_granted(statement: Serial) -> bool {
    state().granted.iter().any(|granted| granted.statement == statement)
}

/// Whether a statement is run to be taken back.
pub fn is_rehearsing() -> bool {
    !state().rehearsals.is_empty()
}

/// Nothing is refused until the subtransaction that was just begun is rolled back, whichever way that comes about.
pub fn begin_rehearsal() {
    // SAFETY: reads a static.
    state().rehearsals.push(unsafe { ffi::GetCurrentTransactionNestLevel() });
}

/// Decides about a write past a limit. Ok: it is lifted and may go on.
///
/// # Errors
/// WG001, WG005 or WG006, after the refusal's event is on disk or its time is over; a foreign error when waiting
/// was interrupted.
pub fn decide(attempt: &Attempt<'_>) -> Result<(), Failure> {
    let statement = attempt.place.statement;
    if is_lifted(attempt.meter, statement) {
        return Ok(());
    }
    let policy = &attempt.policy.policy;
    let flag = session::flag();
    match policy.override_ {
        Override::Never => refuse(attempt),
        Override::Flag if flag => {
            lift(attempt, None);
            Ok(())
        }
        Override::Flag => refuse(attempt),
        Override::Token => {
            if flag && let Some(request) = granted_request(statement) {
                lift(attempt, Some(request));
                return Ok(());
            }
            match session::token() {
                Some(token) if flag => {
                    let grant = spend(&token, attempt)?;
                    let request = grant.request;
                    let tables = Vec::new();
                    state().granted.push(Granted { statement, level: attempt.place.level, grant, tables });
                    lift(attempt, Some(request));
                    Ok(())
                }
                _ => refuse(attempt),
            }
        }
    }
}

fn granted_request(statement: Serial) -> Option<i64> {
    state().granted.iter().find(|granted| granted.statement == statement).map(|granted| granted.grant.request)
}

/// The client's parameters as text, as their types' output functions print them.
///
/// # Errors
/// What such a function raises.
fn parameters() -> Result<Vec<Option<String>>, ffi::Foreign> {
    let list = statement::parameters();
    let mut texts = Vec::new();
    if list.is_null() {
        return Ok(texts);
    }
    // SAFETY: the portal is alive, so its parameters are; those that a hook would fetch are not bound by a client.
    unsafe {
        for index in 0..usize::try_from((*list).numParams).unwrap_or(0) {
            let parameter = &*(*list).params.as_ptr().add(index);
            if parameter.isnull {
                texts.push(None);
                continue;
            }
            let mut output = pg_sys::InvalidOid;
            let mut is_varlena = false;
            pg_sys::getTypeOutputInfo(parameter.ptype, &mut output, &mut is_varlena);
            let mut text = core::ptr::null_mut();
            let value = parameter.value;
            ffi::protect(|| text = ffi::OidOutputFunctionCall(output, value))?;
            texts.push(ffi::text(text));
        }
    }
    Ok(texts)
}

fn spend(token: &str, attempt: &Attempt<'_>) -> Result<Grant, Failure> {
    let hash = statement_hash(&statement::text(), &parameters()?);
    check::spend(token, &hash, attempt.relation).or_else(|error| refuse_token(attempt, error))
}

fn describe(event: &mut Event, attempt: &Attempt<'_>) {
    let (scope, limit) = limit_of(attempt);
    event.policy = Some(attempt.policy.policy.name.clone());
    event.mode = Some("enforce".into());
    event.operation = Some(attempt.operation.word().into());
    event.relation = Some(attempt.relation.to_sql());
    event.scope = Some(scope.to_string());
    event.row_limit = limit;
    event.rows_estimated = attempt.estimate;
    event.statement = Some(session::without_token(statement::text()));
}

fn limit_of(attempt: &Attempt<'_>) -> (Scope, Option<u64>) {
    let policy = &attempt.policy.policy;
    match attempt.past {
        Past::Statement => (Scope::Statement, policy.max_rows),
        Past::Transaction => (Scope::Transaction, policy.max_rows_per_transaction),
    }
}

fn lift(attempt: &Attempt<'_>, request: Option<i64>) {
    let statement = attempt.place.statement;
    if state().lifts.iter().any(|lift| lift.meter == attempt.meter && lift.statement == statement) {
        return;
    }
    let mut event = Event::new(Kind::Overridden);
    describe(&mut event, attempt);
    event.approval = request;
    let lift = Lift { meter: attempt.meter, statement: attempt.place.statement, level: attempt.place.level, event };
    state().lifts.push(lift);
}

fn refuse(attempt: &Attempt<'_>) -> Result<(), Failure> {
    let (scope, limit) = limit_of(attempt);
    let limit = limit.unwrap_or_default();
    let policy = &attempt.policy.policy;
    let mut event = Event::new(Kind::Blocked);
    describe(&mut event, attempt);
    event.rows = Some(limit.saturating_add(1));
    let id = record_once(&event, attempt)?;
    let way_out = match policy.override_ {
        Override::Never => WayOut::Never,
        Override::Flag => WayOut::SetFlag,
        Override::Token if session::token().is_some() && !session::flag() => WayOut::FlagForToken,
        Override::Token => WayOut::Request {
            event: id,
            statement: event.statement.unwrap_or_default(),
            parameters: statement::parameter_count(),
        },
    };
    Err(Failure::Ours(Error::Limit {
        operation: attempt.operation,
        relation: attempt.relation.clone(),
        policy: policy.name.clone(),
        scope,
        limit,
        estimate: attempt.estimate,
        way_out,
    }))
}

fn refuse_token<T>(attempt: &Attempt<'_>, error: Error) -> Result<T, Failure> {
    let mut event = Event::new(Kind::TokenRefused);
    describe(&mut event, attempt);
    event.approval = error.request();
    event.reason = Some(match error.detail() {
        Some(detail) => format!("{error}. {detail}"),
        None => error.to_string(),
    });
    record_and_wait(&event)?;
    Err(Failure::Ours(error))
}

/// Records a refusal, unless this statement was refused by the same policy before: one event per statement and policy.
fn record_once(event: &Event, attempt: &Attempt<'_>) -> Result<Option<i64>, ffi::Foreign> {
    let (statement, meter) = (attempt.place.statement, attempt.meter);
    state().refused.retain(|(of, ..)| *of == statement);
    if let Some((_, _, id)) = state().refused.iter().find(|(_, refused, _)| *refused == meter) {
        return Ok(*id);
    }
    let id = record_and_wait(event)?;
    state().refused.push((statement, meter, id));
    Ok(id)
}

/// Logs and queues an event that must survive the rollback, and waits for it; gives its id when it is stored in time.
fn record_and_wait(event: &Event) -> Result<Option<i64>, ffi::Foreign> {
    event.log();
    // SAFETY: a static. Without a postmaster nobody would ever store it.
    if !unsafe { pg_sys::IsUnderPostmaster } {
        return Ok(None);
    }
    match enqueue(event)? {
        Some(ticket) => Ok(queue::wait(ticket)?.filter(|id| *id > 0)),
        None => {
            queue::count_unqueued();
            log_line("pg_writeguard: the event queue is full; the event before this line is in this log only", None);
            Ok(None)
        }
    }
}

/// Queues an event; where there is no room, waits for some as long as a refused write may wait at all.
fn enqueue(event: &Event) -> Result<Option<queue::Ticket>, ffi::Foreign> {
    const PAUSE: i64 = 10;
    let json = event.shortened(queue::statement_bytes()).ascii_json();
    let mut left = settings::event_timeout();
    loop {
        let ticket = queue::push(json.as_bytes(), true);
        if ticket.is_some() || left <= 0 {
            return Ok(ticket);
        }
        // SAFETY: nothing but a raw call inside.
        unsafe { ffi::protect(|| ffi::sleep_on_latch(PAUSE)) }?;
        left -= PAUSE;
    }
}

/// Whether a statement under an accepted token is still within what was reviewed, after rows of this table were
/// charged.
pub fn within_grant(ledger: &Ledger, statement: Serial, table: MeterId, name: &str) -> bool {
    let Some(granted) = state().granted.iter_mut().find(|granted| granted.statement == statement) else {
        return true;
    };
    let reviewed = match granted.tables.iter().find(|(meter, _)| *meter == table) {
        Some((_, reviewed)) => *reviewed,
        None => {
            let reviewed = granted.grant.rows.get(name).copied();
            granted.tables.push((table, reviewed));
            reviewed
        }
    };
    match (reviewed, granted.grant.max_rows) {
        (None, _) => ledger.in_statement(table, statement) == 0,
        (Some(reviewed), None) => ledger.in_statement(table, statement) <= reviewed,
        (Some(_), Some(max_rows)) => {
            let total: u64 = granted.tables.iter().map(|(meter, _)| ledger.in_statement(*meter, statement)).sum();
            total <= max_rows
        }
    }
}

/// Refuses a statement that went past what was reviewed. `rows` are those charged so far by qualified table name.
///
/// # Errors
/// WG006 when a table, or all together where the approver said so, got more rows than reviewed.
pub fn check_grant(attempt: &Attempt<'_>, rows: &[(String, u64)]) -> Result<(), Failure> {
    let statement = attempt.place.statement;
    let Some(granted) = state().granted.iter().find(|granted| granted.statement == statement) else {
        return Ok(());
    };
    let Some((name, allowed)) = granted.grant.exceeded(rows) else { return Ok(()) };
    let request = granted.grant.request;
    let error = Error::TokenRefused {
        request: Some(request),
        reason: "the write changes more rows than were reviewed".into(),
        detail: Some(format!(
            "Request {request} was approved for {} in \"{name}\", and this is number {}; nothing was changed.",
            crate::words::count(allowed),
            allowed.saturating_add(1)
        )),
        hint: format!(
            "SELECT writeguard.request({}, reason => 'why this is right');",
            crate::words::literal(&statement::text())
        ),
        relation: Some(attempt.relation.clone()),
    };
    refuse_token(attempt, error)
}

/// Whether a statement was recorded already as running with the guard switched off.
pub fn knows_disabled(statement: Serial) -> bool {
    state().disabled == statement
}

/// Records, once per statement, a covered write that runs while the guard is switched off. Nobody waits for it.
pub fn record_disabled(relation: &RelationName, operation: Operation, serial: Serial) {
    state().disabled = serial;
    let mut event = Event::new(Kind::Disabled);
    event.operation = Some(operation.word().into());
    event.relation = Some(relation.to_sql());
    event.statement = Some(session::without_token(statement::text()));
    event.log();
    // SAFETY: a static.
    if unsafe { pg_sys::IsUnderPostmaster } {
        let json = event.shortened(queue::statement_bytes()).ascii_json();
        if queue::push(json.as_bytes(), false).is_none() {
            queue::count_unqueued();
        }
    }
}

/// A subtransaction of this level was rolled back.
pub fn roll_back(level: i32) {
    let state = state();
    state.lifts.retain(|lift| lift.level < level);
    state.granted.retain(|granted| granted.level < level);
    state.rehearsals.retain(|begun| *begun < level);
}

/// A subtransaction of this level was released.
pub fn release(level: i32) {
    let state = state();
    for lift in state.lifts.iter_mut().filter(|lift| lift.level >= level) {
        lift.level = level - 1;
    }
    for granted in state.granted.iter_mut().filter(|granted| granted.level >= level) {
        granted.level = level - 1;
    }
}

/// Before the commit: every lift that is left becomes an event of this transaction.
///
/// # Errors
/// WG008 when the event cannot be written; the transaction then does not commit.
pub fn before_commit(ledger: &Ledger) -> Result<(), Error> {
    let lifts = core::mem::take(&mut state().lifts);
    // SAFETY: no portal is active any more, so that our SQL has to bring its snapshot along.
    // What the transaction wrote it may record, also when it was made read-only since.
    let read_only = unsafe {
        pg_sys::PushActiveSnapshot(pg_sys::GetTransactionSnapshot());
        let read_only = pg_sys::XactReadOnly;
        pg_sys::XactReadOnly = false;
        read_only
    };
    for lift in lifts {
        let mut event = lift.event;
        event.rows = Some(ledger.in_statement(lift.meter, lift.statement));
        // SAFETY: reads the transaction state.
        let xid = unsafe { pg_sys::GetTopFullTransactionIdIfAny().value };
        event.xid = (xid != 0).then(|| xid.to_string());
        store::insert(&event)?;
    }
    // SAFETY: pushed above; after an error the transaction's abort pops it.
    unsafe {
        pg_sys::XactReadOnly = read_only;
        pg_sys::PopActiveSnapshot();
    }
    Ok(())
}

/// The transaction is over.
pub fn end_transaction() {
    let state = state();
    state.lifts.clear();
    state.granted.clear();
    state.refused.clear();
    state.rehearsals.clear();
}

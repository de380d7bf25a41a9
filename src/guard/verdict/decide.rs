//! What happens past a limit: an override in order lifts it for this statement, anything else is refused and recorded.

use std::rc::Rc;

use pgrx::pg_sys;
use rules::error::{Error, LetPass, Over, WayOut, request_call};
use rules::lexer::depends_on_backslashes;
use rules::limits::gcra::Room;
use rules::limits::ledger::{MeterId, Past};
use rules::policy::model::Policy;
use rules::token::claims::SIGN_AGAIN;
use rules::token::grant::{Excess, Grant, Source};
use rules::token::statement::StatementHash;
use rules::words::{Deed, Mode, Operation, Override, Place, RelationName, Scope, Serial, count, duration};

use super::{overrides, reviewed_objects, reviewed_rows};
use crate::event::at_commit::record_at_commit;
use crate::event::rate_limit::{self, Class};
use crate::event::record::{Event, Kind};
use crate::event::statement::{hinted, is_kept_whole, tells_all};
use crate::guard::limits::observe::{Counted, Noted};
use crate::pg::backend_local::{BackendCell, BackendLocal, Borrowed};
use crate::pg::ereport::Failure;
use crate::pg::function::MOST_BYTES;
use crate::pg::stray::put_bytes;
use crate::pg::{encoding, ffi};
use crate::policy::table::Loaded;
use crate::session::{actor, statement};
use crate::token::{check, required_approvals};
use crate::undo::capture::row_capture;

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

struct State {
    /// The last statement recorded as running with the guard switched off.
    disabled: Serial,
    /// What the current statement was refused already, inside exception blocks: the meter, and the event's id.
    refused: Vec<(Serial, MeterId, Option<i64>)>,
}

/// What the DDL that is being decided about does to a table.
static DDL: BackendCell<Deed> = BackendCell::new(PLAIN_DROP);
const PLAIN_DROP: Deed = Deed::ddl("drop");

/// Decides, in `body`, about DDL that messages are to call so.
pub fn called<T>(deed: Deed, body: impl FnOnce() -> T) -> T {
    struct Ends(Deed);
    impl Drop for Ends {
        fn drop(&mut self) {
            DDL.set(self.0);
        }
    }
    let _ends = Ends(DDL.get());
    DDL.set(deed);
    body()
}

fn deed(operation: Operation) -> Deed {
    if operation == Operation::Drop { DDL.get() } else { operation.into() }
}

static STATE: BackendLocal<State> = BackendLocal::new(State { disabled: 0, refused: Vec::new() });

#[track_caller]
fn state() -> Borrowed<State> {
    STATE.borrow()
}

/// Decides about a write past a limit. Ok: the policy is lifted, and the write continues.
///
/// # Errors
/// WG001, WG002, WG005 or WG006, after the refusal's event is on disk or its time is over; a foreign error when waiting
/// was interrupted.
pub fn decide(attempt: &Attempt<'_>) -> Result<(), Failure> {
    let statement = attempt.place.statement;
    if overrides::is_lifted(attempt.meter, statement) {
        return Ok(());
    }
    let policy = &attempt.policy.policy;
    let flag = actor::flag();
    let executed = overrides::executed_by(statement);
    match policy.override_ {
        Override::Never => refuse(attempt),
        Override::Flag if flag || executed.is_some() => lift(attempt, executed.as_ref()),
        Override::Flag => refuse(attempt),
        Override::Token => {
            if let Some(source) = overrides::granted_by(statement) {
                check_source(&source, attempt)?;
                return lift(attempt, Some(&source));
            }
            match actor::token() {
                Some(token) if flag => {
                    let grant = spend(&token, attempt)?;
                    let source = grant.source.clone();
                    check_source(&source, attempt)?;
                    overrides::accept(grant, statement, attempt.place.level);
                    lift(attempt, Some(&source))
                }
                _ => refuse(attempt),
            }
        }
    }
}

/// The client's parameters, as their types' output functions print them in every session alike.
///
/// # Errors
/// What such a function raises.
#[expect(ffi_unwind_calls, reason = "inside protect")]
fn hash_parameters(hash: &mut StatementHash) -> Result<(), ffi::PgError> {
    let list = statement::parameters();
    if list.is_null() {
        return Ok(());
    }
    // SAFETY: the portal is alive, so its parameters are; those that a hook would fetch are not bound by a client.
    unsafe {
        for index in 0..usize::try_from((*list).numParams).unwrap_or(0) {
            let parameter = &*(*list).params.as_ptr().add(index);
            if parameter.isnull {
                hash.null();
                continue;
            }
            let mut output = pg_sys::InvalidOid;
            let mut is_varlena = false;
            pg_sys::getTypeOutputInfo(parameter.ptype, &mut output, &mut is_varlena);
            let mut text: *mut core::ffi::c_char = core::ptr::null_mut();
            let value = parameter.value;
            ffi::protect(|| {
                let level = ffi::print_plainly();
                text = ffi::OidOutputFunctionCall(output, value).cast();
                ffi::AtEOXact_GUC(true, level);
            })?;
            hash.value();
            encoding::in_utf8(core::ffi::CStr::from_ptr(text).to_bytes(), |part| hash.text(part));
            pg_sys::pfree(text.cast());
        }
    }
    Ok(())
}

fn spend(token: &str, attempt: &Attempt<'_>) -> Result<Grant, Failure> {
    let mut hash = StatementHash::default();
    let (mut text, mut has_backslash) = (Vec::new(), false);
    let is_whole = statement::whole_text(|part| {
        hash.text(part);
        has_backslash |= part.contains(&b'\\');
        if text.len() <= MOST_BYTES {
            put_bytes(&mut text, part);
        }
    });
    if is_whole && has_backslash && (text.len() > MOST_BYTES || depends_on_backslashes(&text)) {
        let error = Error::TokenRefused {
            request: None,
            reason: "its text has a backslash in a string constant, and may have been read in another way than it was reviewed"
                .into(),
            detail: Some("What standard_conforming_strings was when the text was sent is not known any more.".into()),
            hint: "SELECT id, statement FROM writeguard.my_requests; (and have it executed by its number)".into(),
            relation: Some(attempt.relation.clone()),
        };
        return refuse_token(attempt, error);
    }
    if !is_whole {
        let error = Error::TokenRefused {
            request: None,
            reason: "the whole text of the statement is not at hand any more".into(),
            detail: None,
            hint: "BEGIN; (then the statement again, and the write before COMMIT)".into(),
            relation: Some(attempt.relation.clone()),
        };
        return refuse_token(attempt, error);
    }
    hash_parameters(&mut hash)?;
    check::spend(token, &hash.finish(), attempt.relation).or_else(|error| refuse_token(attempt, error))
}

/// The policy must have the approvals that it asks for: the token was approved for what was refused then.
fn demand(request: i64, attempt: &Attempt<'_>) -> Result<(), Failure> {
    required_approvals::check(request, &attempt.policy.policy, attempt.relation, &hinted(&statement::excerpt()))
        .or_else(|error| refuse_token(attempt, error))
}

fn describe(event: &mut Event, attempt: &Attempt<'_>) {
    let (scope, limit) = limit_of(attempt);
    event.policy = Some(attempt.policy.policy.name.clone());
    event.mode = Some(attempt.policy.policy.mode.word().into());
    event.operation = Some(attempt.operation.word().into());
    event.relation = Some(attempt.relation.to_sql());
    event.scope = Some(scope.to_string());
    event.row_limit = limit;
    event.rows_estimated = attempt.estimate;
    event.tell_statement(&statement::excerpt());
}

fn limit_of(attempt: &Attempt<'_>) -> (Scope, Option<u64>) {
    let policy = &attempt.policy.policy;
    match attempt.past {
        Past::Statement => (Scope::Statement, policy.max_rows),
        Past::Transaction => (Scope::Transaction, policy.max_rows_per_transaction),
        Past::Rate(_) => (Scope::Rate, policy.rate.map(|rate| rate.rows)),
        Past::Fraction(limit, _) => (Scope::Fraction, Some(limit)),
        Past::Block => (Scope::Block, Some(1)),
        Past::Unnarrowed => (Scope::Where, None),
    }
}

/// What a limit is counted over, in words, and what else is worth knowing of it.
fn explain(attempt: &Attempt<'_>) -> (String, Option<String>) {
    let policy = &attempt.policy.policy;
    match attempt.past {
        Past::Statement | Past::Block | Past::Unnarrowed => ("statement".into(), None),
        Past::Transaction => ("transaction".into(), None),
        Past::Rate(room) => (duration(policy.rate.map_or(0, |rate| rate.interval)), room.map(Room::told)),
        Past::Fraction(_, held) => {
            let part = policy.max_fraction.unwrap_or_default();
            let note =
                format!("The limit is {part} of the about {} that the table holds, and never below 10.", count(held));
            ("statement".into(), Some(note))
        }
    }
}

/// A write went past a limit of a policy of mode observe or warn: it continues, and is recorded when its statement is over.
/// `counted`: by what its rows are. `reason`: what else there is to say.
pub fn to_note(attempt: &Attempt<'_>, counted: Counted, reason: Option<String>) -> Noted {
    let policy = &attempt.policy.policy;
    let mut event = Event::new(if policy.mode == Mode::Warn { Kind::Warned } else { Kind::Observed });
    describe(&mut event, attempt);
    event.reason = reason;
    let (per, _) = explain(attempt);
    let over = match (attempt.past, event.row_limit) {
        (Past::Block, _) => Over::Block,
        (_, Some(limit)) => Over::Limit { limit, per },
        (_, None) => Over::Where,
    };
    let warning = LetPass {
        deed: deed(attempt.operation),
        relation: attempt.relation.clone(),
        policy: policy.name.clone(),
        over,
    };
    let Attempt { meter, place, .. } = *attempt;
    Noted { statement: place.statement, meter, mode: policy.mode, counted, highest: 0, event, warning }
}

/// Whether one approval by somebody outside, who is a member of no role here, is all that a policy asks for.
fn is_enough_alone(policy: &Policy) -> bool {
    policy.approvers.is_none() && policy.min_approvals <= 1
}

/// Refuses a token from outside for a policy that asks for more.
fn check_source(source: &Source, attempt: &Attempt<'_>) -> Result<(), Failure> {
    let policy = &attempt.policy.policy;
    if let Some(request) = source.request() {
        return demand(request, attempt);
    }
    if is_enough_alone(policy) {
        return Ok(());
    }
    let error = Error::TokenRefused {
        request: None,
        reason: "its signature is not enough for this policy".into(),
        detail: Some(format!(
            "Policy \"{}\" asks for approvers of this database, or for more than one. It is {}.",
            policy.name,
            source.reason().unwrap_or_default()
        )),
        hint: "SELECT writeguard.request('…', reason => 'why this is right');".into(),
        relation: Some(attempt.relation.clone()),
    };
    refuse_token(attempt, error)
}

fn lift(attempt: &Attempt<'_>, source: Option<&Source>) -> Result<(), Failure> {
    row_capture::check(attempt.place.statement)?;
    row_capture::overridden(attempt.place.statement);
    let mut event = Event::new(Kind::Overridden);
    describe(&mut event, attempt);
    event.approval = source.and_then(Source::request);
    event.reason = source.and_then(Source::reason);
    overrides::lift(attempt.meter, attempt.place.statement, attempt.place.level, event);
    Ok(())
}

fn refuse(attempt: &Attempt<'_>) -> Result<(), Failure> {
    let (_, limit) = limit_of(attempt);
    let policy = &attempt.policy.policy;
    let mut event = Event::new(Kind::Blocked);
    describe(&mut event, attempt);
    event.rows = limit.map(|limit| limit.saturating_add(1));
    let id = record_once(&event, attempt)?;
    if attempt.past == Past::Block {
        let (deed, relation, policy) = (deed(attempt.operation), attempt.relation.clone(), policy.name.clone());
        return Err(Error::NeedsBlock { deed, relation, policy }.recorded(id).into());
    }
    let way_out = match policy.override_ {
        Override::Never => WayOut::Never,
        Override::Flag => WayOut::SetFlag,
        Override::Token if actor::token().is_some() && !actor::flag() => WayOut::FlagForToken,
        Override::Token => {
            let excerpt = statement::excerpt();
            WayOut::Request {
                // The event is no request of its own where it lacks a part of the statement.
                by_event: tells_all() && is_kept_whole(&excerpt) && excerpt.is_shown_exactly(),
                statement: hinted(&excerpt),
                parameters: statement::parameter_count(),
            }
        }
    };
    let (operation, relation, estimate) = (attempt.operation, attempt.relation.clone(), attempt.estimate);
    let (per, note) = explain(attempt);
    let policy = policy.name.clone();
    let error = match limit {
        Some(limit) => Error::Limit { deed: deed(operation), relation, policy, per, limit, note, estimate, way_out },
        None => Error::Unnarrowed { operation, relation, policy, estimate, way_out },
    };
    Err(error.recorded(id).into())
}

fn refuse_token<T>(attempt: &Attempt<'_>, error: Error) -> Result<T, Failure> {
    let mut event = Event::new(Kind::TokenRefused);
    describe(&mut event, attempt);
    Err(rate_limit::record_refusal(event, error))
}

/// Records a refusal, unless this statement was refused by the same policy before: one event per statement and policy.
fn record_once(event: &Event, attempt: &Attempt<'_>) -> Result<Option<i64>, ffi::PgError> {
    let (statement, meter) = (attempt.place.statement, attempt.meter);
    state().refused.retain(|(of, ..)| *of == statement || statement::may_resume(*of));
    if let Some((_, _, id)) = state().refused.iter().find(|(of, refused, _)| (*of, *refused) == (statement, meter)) {
        return Ok(*id);
    }
    let id = rate_limit::record_and_wait(event)?;
    state().refused.push((statement, meter, id));
    Ok(id)
}

/// Refuses a statement that went past what was reviewed. `rows` are those charged so far by qualified table name.
///
/// # Errors
/// WG006 when a table, or all together where the approver said so, got more rows than reviewed.
pub fn check_grant(attempt: &Attempt<'_>, rows: &[(String, u64)]) -> Result<(), Failure> {
    let statement = attempt.place.statement;
    let Some((source, excess)) = overrides::exceeded(statement, rows) else { return Ok(()) };
    let relation = Some(attempt.relation.clone());
    let error = match &source {
        Source::Request(request) => {
            let request = *request;
            let (reason, detail) = match excess {
                Excess::Table(name) => (
                    "the write changes a table that was not reviewed",
                    format!(
                        "No row of \"{name}\" was among those that request {request} was approved for; nothing was changed."
                    ),
                ),
                Excess::Rows { tables, allowed } => (
                    "the write changes more rows than were reviewed",
                    format!(
                        "Request {request} was approved for {} in \"{tables}\", and this is number {}; nothing was \
                         changed.",
                        count(allowed),
                        allowed.saturating_add(1)
                    ),
                ),
            };
            let (reason, detail) = (reason.to_owned(), Some(detail));
            let hint = request_again();
            if overrides::executed_by(statement).is_some() {
                Error::ExecutionRefused { request, reason, detail, hint, relation }
            } else {
                Error::TokenRefused { request: Some(request), reason, detail, hint, relation }
            }
        }
        Source::Outside { .. } => {
            let token = source.reason().unwrap_or_default();
            let (reason, detail) = match excess {
                Excess::Table(name) => (
                    "the write changes a table that it was not signed for",
                    format!("It is {token}, and does not name \"{name}\"; nothing was changed."),
                ),
                Excess::Rows { tables, allowed } => (
                    "the write changes more rows than it was signed for",
                    format!(
                        "It is {token}, for {} in \"{tables}\", and this is number {}; nothing was changed.",
                        count(allowed),
                        allowed.saturating_add(1)
                    ),
                ),
            };
            let (reason, detail) = (reason.to_owned(), Some(detail));
            Error::TokenRefused { request: None, reason, detail, hint: SIGN_AGAIN.to_owned(), relation }
        }
    };
    refuse_token(attempt, error)
}

/// Compares the rows that statements changed with those that their tokens are for: of `over`, which is over but for what it
/// deferred, or of all in the transaction, which is about to commit.
///
/// # Errors
/// WG006 where they are others.
pub fn check_rows(over: Option<Serial>) -> Result<(), Failure> {
    let all = overrides::all_that_await_rows();
    for (statement, grant) in all.into_iter().filter(|(statement, _)| over.is_none_or(|over| over == *statement)) {
        let request = grant.source.request().unwrap_or_default();
        let reviewed = grant.relations.as_ref();
        let met = reviewed.and_then(|reviewed| reviewed_objects::not_reviewed(statement, reviewed));
        if let Some(relation) = met {
            let reason = reviewed_objects::NOT_REVIEWED;
            let detail = reviewed_objects::told(&relation, request);
            return Err(refuse_after(statement, over.is_some(), request, reason, detail, Some(relation)));
        }
        let mut others = reviewed_rows::others(&grant, &[statement]);
        if others.is_some() && over.is_none() {
            // What it deferred until the end of its block is a statement of its own, by its limits and not by its rows.
            let at_the_end = statement::current();
            others = others.filter(|_| reviewed_rows::others(&grant, &[statement, at_the_end]).is_some());
        }
        match others {
            None => overrides::has_reviewed_rows(statement),
            Some(others) if over.is_some() && grant.fires_late && others.may_be_unfinished() => {}
            Some(others) => {
                let (reason, detail) = ("the write changes other rows than were reviewed", others.told(request));
                return Err(refuse_after(statement, over.is_some(), request, reason, detail, others.relation));
            }
        }
    }
    Ok(())
}

/// Refuses the token of a statement that has changed all its rows. `is_current`: it is the one that is at hand.
fn refuse_after(
    statement: Serial,
    is_current: bool,
    request: i64,
    reason: &str,
    detail: String,
    relation: Option<RelationName>,
) -> Failure {
    let mut event = overrides::event_of(statement).unwrap_or_else(|| Event::new(Kind::TokenRefused));
    event.kind = Kind::TokenRefused;
    let hint = if is_current {
        request_again()
    } else {
        "SELECT writeguard.request('…', reason => 'why this is right');".into()
    };
    let (reason, detail) = (reason.to_owned(), Some(detail));
    rate_limit::record_refusal(event, Error::TokenRefused { request: Some(request), reason, detail, hint, relation })
}

/// The call that asks for the approval of the current statement once more.
pub fn request_again() -> String {
    request_call(None, &hinted(&statement::excerpt()), statement::parameter_count())
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
    event.tell_statement(&statement::excerpt());
    rate_limit::record(Class::SwitchedOff, &event);
}

/// Records DDL on a covered table that none of its policies limits, once it commits. `why` its rows are concerned, where
/// that is not plain.
///
/// # Errors
/// WG008 where the transaction is being prepared and the event cannot be written.
pub fn record_uncovered(relation: &str, policy: Option<&str>, why: &str) -> Result<(), Error> {
    // Opens the statement, so that its text is at hand.
    let serial = statement::current();
    let mut event = Event::new(Kind::Uncovered);
    event.policy = policy.map(str::to_owned);
    event.operation = Some(Operation::Drop.word().into());
    event.relation = Some(relation.to_owned());
    event.reason = Some(why.to_owned()).filter(|why| !why.is_empty());
    record_at_commit(event, serial, &statement::excerpt())
}

/// The transaction is over.
pub fn end_transaction() {
    state().refused.clear();
}

/// Whether its end has nothing to forget here.
#[inline(always)]
pub fn is_clean() -> bool {
    state().refused.is_empty()
}

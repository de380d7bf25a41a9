//! What was lifted on purpose, and what bounds it.
//!
//! A lift belongs to the statement and to the subtransaction it was made in. When that is rolled back the lift goes with it, as
//! does the use of its token; when the transaction commits, each lift that is left becomes an `overridden` event in the same
//! commit. A rehearsal lifts everything until it is taken back.

use rules::error::Error;
use rules::limits::ledger::{Ledger, MeterId};
use rules::token::grant::{Excess, Grant, Source};
use rules::words::Serial;
use rustc_hash::{FxBuildHasher, FxHashMap};

use crate::event::record::{Event, top_xid};
use crate::event::store::{at_the_end, insert};
use crate::pg::backend_local::{BackendCell, BackendLocal, Borrowed};
use crate::session::{actor, rehearsing};
use crate::undo::capture::store::{self, Overridden};

struct Lift {
    meter: MeterId,
    statement: Serial,
    level: i32,
    event: Event,
}

/// What a grant needs besides to lift a policy.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Needs {
    /// A token's: the flag.
    Flag,
    /// Of a request that is being executed: that was said by executing it.
    Nothing,
    /// Of a request that was executed: it lifts nothing any more.
    Over,
}

struct Granted {
    statement: Serial,
    level: i32,
    grant: Grant,
    needs: Needs,
    /// The rows that it changed are still to be compared with the reviewed ones.
    awaits_rows: bool,
    /// The meters of the tables that were charged so far, each with its reviewed rows; none for a table that was not
    /// reviewed.
    tables: Vec<(MeterId, Option<u64>)>,
}

struct State {
    lifts: Vec<Lift>,
    /// The same by statement: one transaction may have tens of thousands of them.
    lifted: FxHashMap<Serial, Vec<MeterId>>,
    /// Bytes of the statements in their events.
    told: usize,
    granted: Vec<Granted>,
}

static STATE: BackendLocal<State> = BackendLocal::new(State {
    lifts: Vec::new(),
    lifted: FxHashMap::with_hasher(FxBuildHasher),
    told: 0,
    granted: Vec::new(),
});

#[track_caller]
fn state() -> Borrowed<State> {
    STATE.borrow()
}

/// Whether the policy behind `meter` is lifted for this statement, and the flag that lifted it is still armed: a
/// function's SET clause, say, lifts nothing after the function.
#[inline]
pub fn is_lifted(meter: MeterId, statement: Serial) -> bool {
    let lifted = || state().lifted.get(&statement).is_some_and(|meters| meters.contains(&meter));
    rehearsing::is_on() || lifted() && (actor::flag() || executed_by(statement).is_some())
}

/// Whether more than the limits decides about a statement's further rows.
pub fn bounds(statement: Serial) -> bool {
    is_granted(statement) || has_lift(statement)
}

/// Whether a statement lifted anything, so that its count is needed until the transaction ends.
pub fn has_lift(statement: Serial) -> bool {
    state().lifted.contains_key(&statement)
}

/// Whether anything is lifted in this transaction.
pub fn has_lifts() -> bool {
    !state().lifts.is_empty()
}

/// Whether a token was accepted in this transaction whose rows may still have to be compared with the reviewed ones.
static AWAITS_ROWS: BackendCell<bool> = BackendCell::new(false);

/// Whether there may be such a statement; one compare for every command.
#[inline(always)]
pub fn awaits_rows() -> bool {
    AWAITS_ROWS.get()
}

/// Whether the rows of this statement are still to be compared with the reviewed ones.
pub fn awaits_rows_of(statement: Serial) -> bool {
    state().granted.iter().any(|granted| granted.awaits_rows && granted.statement == statement)
}

/// The statements, and what was reviewed, whose rows are still to be compared.
pub fn all_that_await_rows() -> Vec<(Serial, Grant)> {
    let state = state();
    let awaiting = state.granted.iter().filter(|granted| granted.awaits_rows);
    awaiting.map(|granted| (granted.statement, granted.grant.clone())).collect()
}

/// The rows of a statement are the reviewed ones.
pub fn has_reviewed_rows(statement: Serial) {
    state().granted.iter_mut().filter(|granted| granted.statement == statement).for_each(|granted| {
        granted.awaits_rows = false;
    });
}

/// What a commit would record of a statement that was lifted.
pub fn event_of(statement: Serial) -> Option<Event> {
    state().lifts.iter().find(|lift| lift.statement == statement).map(|lift| lift.event.clone())
}

/// Whether a token was accepted for this statement, so that its rows per table are bounded.
#[inline]
pub fn is_granted(statement: Serial) -> bool {
    state().granted.iter().any(|granted| granted.statement == statement)
}

/// Who gave the token that was accepted for this statement, if that still lifts anything.
pub fn granted_by(statement: Serial) -> Option<Source> {
    let flag = actor::flag();
    source(statement, |granted| granted.needs == Needs::Nothing || flag && granted.needs == Needs::Flag)
}

/// The request that this statement executes now; it needs no flag.
pub fn executed_by(statement: Serial) -> Option<Source> {
    source(statement, |granted| granted.needs == Needs::Nothing)
}

fn source(statement: Serial, lifts: impl Fn(&Granted) -> bool) -> Option<Source> {
    let state = state();
    let mut granted = state.granted.iter();
    granted.find(|granted| granted.statement == statement && lifts(granted)).map(|granted| granted.grant.source.clone())
}

/// Lifts a policy for a statement; once is enough. `event` is what the commit will record.
pub fn lift(meter: MeterId, statement: Serial, level: i32, mut event: Event) {
    let state = &mut *state();
    let meters = state.lifted.entry(statement).or_default();
    if meters.contains(&meter) {
        return;
    }
    meters.push(meter);
    if state.told > MOST_TOLD {
        event = event.shortened(TOLD_AFTER_THAT);
    }
    state.told += event.statement.as_ref().map_or(0, String::len);
    state.lifts.push(Lift { meter, statement, level, event });
}

/// Bytes that the statements of a transaction's overrides have in all until it commits, and what each further one has
/// then.
const MOST_TOLD: usize = 4 * 1024 * 1024;
const TOLD_AFTER_THAT: usize = 512;

/// A token was accepted for a statement and spent in this subtransaction.
pub fn accept(grant: Grant, statement: Serial, level: i32) {
    let awaits_rows = grant.binds_more_than_numbers();
    if awaits_rows {
        AWAITS_ROWS.set(true);
    }
    state().granted.push(Granted { statement, level, grant, needs: Needs::Flag, awaits_rows, tables: Vec::new() });
}

/// An approved request is executed as this statement, and spent in this subtransaction.
pub fn begin_execution(grant: Grant, statement: Serial, level: i32) {
    // Its rows are compared as soon as it is over, by who executes it.
    let (needs, awaits_rows) = (Needs::Nothing, false);
    state().granted.push(Granted { statement, level, grant, needs, awaits_rows, tables: Vec::new() });
}

/// The execution is over: what it lifted stays lifted, and nothing more is.
pub fn end_execution(statement: Serial) {
    state().granted.iter_mut().filter(|granted| granted.statement == statement).for_each(|granted| {
        granted.needs = Needs::Over;
    });
}

/// Whether the rows of a table are to be counted although no policy covers it now: they were reviewed, and the request
/// is being executed.
pub fn is_reviewed(name: &str) -> bool {
    let state = state();
    let mut granted = state.granted.iter();
    granted.any(|granted| granted.needs == Needs::Nothing && granted.grant.reviewed(name).is_some())
}

/// Counts tables that were charged before the token was accepted.
pub fn count_in<'a>(statement: Serial, charged: impl Iterator<Item = (&'a str, MeterId)>) {
    let mut state = state();
    let Some(granted) = state.granted.iter_mut().find(|granted| granted.statement == statement) else { return };
    for (name, table) in charged {
        if !granted.tables.iter().any(|(meter, _)| *meter == table) {
            granted.tables.push((table, granted.grant.reviewed(name)));
        }
    }
}

/// Whether a statement under an accepted token is still within what was reviewed, after rows of this table were
/// charged.
pub fn within_grant(ledger: &Ledger, statement: Serial, table: MeterId, name: &str) -> bool {
    let mut state = state();
    let Some(granted) = state.granted.iter_mut().find(|granted| granted.statement == statement) else {
        return true;
    };
    let reviewed = match granted.tables.iter().find(|(meter, _)| *meter == table) {
        Some((_, reviewed)) => *reviewed,
        None => {
            let reviewed = granted.grant.reviewed(name);
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

/// Where a statement went past what was reviewed, and who gave the token. `rows` are those charged so far by qualified
/// table name.
pub fn exceeded(statement: Serial, rows: &[(String, u64)]) -> Option<(Source, Excess)> {
    let state = state();
    let granted = state.granted.iter().find(|granted| granted.statement == statement)?;
    Some((granted.grant.source.clone(), granted.grant.exceeded(rows)?))
}

/// A subtransaction of this level was rolled back.
pub fn roll_back(level: i32) {
    let state = &mut *state();
    let lifted = &mut state.lifted;
    state.lifts.retain(|lift| {
        let stays = lift.level < level;
        if !stays && let Some(meters) = lifted.get_mut(&lift.statement) {
            meters.retain(|meter| *meter != lift.meter);
            if meters.is_empty() {
                lifted.remove(&lift.statement);
            }
        }
        stays
    });
    state.granted.retain(|granted| granted.level < level);
}

/// A subtransaction of this level was released.
pub fn release(level: i32) {
    let mut state = state();
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
pub fn before_commit(ledger: Borrowed<Ledger>) -> Result<(), Error> {
    let mut lifts = {
        let mut state = state();
        state.lifted.clear();
        core::mem::take(&mut state.lifts)
    };
    for lift in &mut lifts {
        lift.event.rows = Some(ledger.in_statement(lift.meter, lift.statement));
    }
    // What is written may have triggers of its own.
    drop(ledger);
    let overridden: Vec<Overridden> =
        lifts.iter().map(|lift| Overridden { statement: lift.statement, approval: lift.event.approval }).collect();
    at_the_end(|| {
        let changes = store::before_commit(&overridden)?;
        for lift in lifts {
            let mut event = lift.event;
            event.xid = top_xid();
            if let Some((_, change)) = changes.iter().find(|(statement, _)| *statement == lift.statement) {
                let change = format!("change {change}");
                event.reason = Some(event.reason.map_or(change.clone(), |reason| format!("{reason}; {change}")));
            }
            insert(&event)?;
        }
        Ok(())
    })
}

/// The transaction is over.
pub fn end_transaction() {
    AWAITS_ROWS.set(false);
    let mut state = state();
    if state.lifts.is_empty() && state.granted.is_empty() && state.told == 0 {
        return;
    }
    state.lifts.clear();
    state.lifted.clear();
    state.told = 0;
    state.granted.clear();
}

/// Whether its end has nothing to forget here.
#[inline(always)]
pub fn is_clean() -> bool {
    let state = state();
    state.lifts.is_empty() && state.granted.is_empty() && state.told == 0
}

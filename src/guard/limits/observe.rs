//! Statements that went past a limit of a policy of mode observe or warn.
//!
//! Noted when the limit is passed, while names can still be looked up, and recorded when the client's statement is over, with
//! the number that it came to by then; where it died, with the number so far. In a transaction block that is the end of the
//! command, otherwise the commit, because deferred triggers are a part of the statement. Nothing waits for the record.

use rules::error::LetPass;
use rules::limits::ledger::{Ledger, MeterId};
use rules::words::{Mode, Serial};

use crate::event::rate_limit::{self, Class};
use crate::event::record::Event;
use crate::pg::backend_local::{BackendLocal, Borrowed};
use crate::pg::contained::contained;
use crate::pg::ereport::{PendingError, guarded, warn};
use crate::pg::ffi::{self, PgError};
use crate::session::statement;

/// What the rows of an event are counted by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Counted {
    /// The statement's rows on tables that the policy is about.
    Statement,
    /// Those of them that count to its limit per statement.
    ToStatement,
    /// The transaction's.
    Transaction,
    /// The statement's rows in another meter: of one table or tree of partitions, say.
    In(MeterId),
    /// A rate was used up when the statement had asked for `before` rows; what it asked for after that comes on top.
    Beyond { asked: MeterId, limit: u64, before: u64 },
    /// They cannot be.
    Unknown,
}

/// A statement and a policy whose limit it went past.
pub struct Noted {
    pub statement: Serial,
    /// The policy's.
    pub meter: MeterId,
    pub mode: Mode,
    pub counted: Counted,
    /// The highest number so far, where a rollback inside the statement took rows back.
    pub highest: u64,
    /// All but its time and its rows.
    pub event: Event,
    pub warning: LetPass,
}

impl Noted {
    fn rows(&self, ledger: &Ledger) -> Option<u64> {
        let in_statement = |meter| ledger.in_statement(meter, self.statement);
        let rows = match self.counted {
            Counted::Statement => in_statement(self.meter),
            Counted::Transaction => ledger.in_transaction(self.meter),
            Counted::ToStatement => ledger.counted_in_statement(self.meter, self.statement),
            Counted::In(meter) => in_statement(meter),
            Counted::Beyond { asked, limit, before } => limit + in_statement(asked).saturating_sub(before),
            Counted::Unknown => return None,
        };
        Some(rows.max(self.highest))
    }
}

static NOTED: BackendLocal<Vec<Noted>> = BackendLocal::new(Vec::new());

#[track_caller]
fn noted() -> Borrowed<Vec<Noted>> {
    NOTED.borrow()
}

/// Whether anything waits to be recorded.
#[inline(always)]
pub fn any() -> bool {
    !noted().is_empty()
}

/// Whether a statement has something to be recorded, so that its counts are still needed.
pub fn waits(statement: Serial) -> bool {
    noted().iter().any(|noted| noted.statement == statement)
}

/// Notes that a statement went past a policy's limit; once is enough.
///
/// # Errors
/// What interrupts the telling of an earlier statement's.
pub fn note(ledger: Borrowed<Ledger>, new: Noted) -> Result<(), PgError> {
    if noted().iter().any(|noted| (noted.statement, noted.meter) == (new.statement, new.meter)) {
        return Ok(());
    }
    // In a pipeline statements follow each other before anything commits. The new one is noted whatever comes of that.
    let statement = new.statement;
    noted().push(new);
    record(ledger, true, |noted| noted.statement != statement && !statement::may_resume(noted.statement))
}

/// Adds a sentence to what will be recorded of a statement and a policy.
pub fn explain(statement: Serial, meter: MeterId, sentence: &str) {
    let of = |noted: &&mut Noted| (noted.statement, noted.meter) == (statement, meter);
    if let Some(noted) = noted().iter_mut().find(of) {
        noted.event.reason = Some(sentence.to_owned());
    }
}

/// The outermost frame of a command returns. `is_over`: nothing of that command follows.
pub fn left(ledger: Borrowed<Ledger>, is_over: bool) -> *mut PendingError {
    // SAFETY: reads the transaction's state.
    if !is_over || !unsafe { ffi::IsTransactionBlock() } {
        return core::ptr::null_mut();
    }
    guarded(|| match statement::running() {
        Some(over) => Ok(record(ledger, true, |noted| noted.statement == over)?),
        None => Ok(()),
    })
}

/// Before a commit: nothing is charged to this transaction's statements any more.
pub fn before_commit(ledger: Borrowed<Ledger>) -> *mut PendingError {
    guarded(|| Ok(record(ledger, true, |_| true)?))
}

/// Before a subtransaction's rows are taken back: the attempt is what counts.
pub fn rolling_back(ledger: &Ledger) {
    for noted in noted().iter_mut() {
        noted.highest = noted.rows(ledger).unwrap_or(0);
    }
}

/// An error took the client's command with it. The client has its error; a warning would say nothing more.
pub fn died(ledger: Borrowed<Ledger>) {
    let recorded = contained("recording what a statement that died went past", || {
        // Nothing is sent to the client, so nothing interrupts it.
        let _told_nobody = record(ledger, false, |_| true);
    });
    if !recorded {
        noted().clear();
    }
}

/// Records what is noted of some statements, one by one, so that an error on the way leaves the rest noted. `tell`: the
/// client as well, where the mode is warn. The ledger is given back before anything is sent.
///
/// # Errors
/// What interrupts the telling; what is noted still is recorded when the transaction aborts for it.
fn record(ledger: Borrowed<Ledger>, tell: bool, of: impl Fn(&Noted) -> bool) -> Result<(), PgError> {
    for noted in noted().iter_mut().filter(|noted| of(noted)) {
        noted.highest = noted.rows(&ledger).unwrap_or(0);
    }
    drop(ledger);
    loop {
        let Some(place) = noted().iter().position(&of) else { return Ok(()) };
        let one = noted().remove(place);
        let rows = (one.counted != Counted::Unknown).then_some(one.highest);
        let mut event = one.event;
        event.rows = rows;
        event.happens_now();
        rate_limit::record(Class::LookedOn, &event);
        if tell && one.mode == Mode::Warn {
            // SAFETY: reads the transaction's state.
            warn(&one.warning, rows, unsafe { ffi::IsTransactionBlock() })?;
        }
    }
}

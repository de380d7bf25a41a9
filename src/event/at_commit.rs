//! Events of what happens only with a commit: kept until then, and forgotten with the subtransaction that they are of.
//!
//! They are queued when the commit is done, so that it cannot fail any more; a transaction that is prepared takes them
//! along, like the events that `store` writes.

use std::rc::Rc;

use super::record::{Event, top_xid};
use super::statement::told;
use super::{queue, store};
use crate::error::Error;
use crate::ffi;
use crate::pg::backend_local::{BackendLocal, Borrowed};

struct Pending {
    level: i32,
    event: Event,
    /// Further objects of the same command that have no event of their own.
    further: u64,
    /// Apart from the event: one command may be the statement of thousands of events.
    statement: Rc<Statement>,
}

struct Statement {
    text: String,
    told: Option<String>,
}

static PENDING: BackendLocal<Vec<Pending>> = BackendLocal::new(Vec::new());

#[track_caller]
fn pending() -> Borrowed<Vec<Pending>> {
    PENDING.borrow()
}

/// Events that one command may have; what it does to further objects is told as a number.
const MOST_PER_COMMAND: usize = 100;

/// Records an event when, and if, what is being done now commits. `statement` is the text of the client's statement.
pub fn record_at_commit(event: Event, statement: String) {
    let same = pending().iter().rev().take_while(|pending| pending.statement.text == statement).count();
    // SAFETY: reads a static.
    let level = unsafe { ffi::GetCurrentTransactionNestLevel() };
    if same >= MOST_PER_COMMAND
        && let Some(last) = pending().last_mut().filter(|last| last.level == level)
    {
        last.further += 1;
        return;
    }
    let last = pending().last().map(|last| Rc::clone(&last.statement));
    let statement = match last {
        Some(last) if last.text == statement => last,
        _ => Rc::new(Statement { told: told(statement.clone()), text: statement }),
    };
    pending().push(Pending { level, event, further: 0, statement });
}

/// Whether there is anything to record.
#[inline(always)]
pub fn any() -> bool {
    !pending().is_empty()
}

/// What is to be recorded, with all that is known by now.
fn take() -> impl Iterator<Item = Event> {
    let xid = top_xid();
    core::mem::take(&mut *pending()).into_iter().map(move |Pending { mut event, further, statement, .. }| {
        event.xid.clone_from(&xid);
        event.statement.clone_from(&statement.told);
        if further > 0 {
            let more = format!("And {further} further tables by the same statement.");
            event.reason = Some(event.reason.map_or(more.clone(), |reason| format!("{reason} {more}")));
        }
        event
    })
}

/// The commit is done: nobody waits for these events.
pub fn committed() {
    take().for_each(|event| queue::record(&event));
}

/// The transaction is about to be prepared: these events are a part of it.
///
/// # Errors
/// WG008 when the extension's tables are missing.
pub fn before_prepare() -> Result<(), Error> {
    store::at_the_end(|| take().try_for_each(|event| store::insert(&event).map(|_| ())))
}

/// A subtransaction of this level was rolled back.
pub fn roll_back(level: i32) {
    pending().retain(|pending| pending.level < level);
}

/// A subtransaction of this level was released.
pub fn release(level: i32) {
    for pending in pending().iter_mut().filter(|pending| pending.level >= level) {
        pending.level = level - 1;
    }
}

/// The transaction is over.
pub fn end_transaction() {
    pending().clear();
}

//! Events of what happens only with a commit: kept until then, and forgotten with the subtransaction that they are of.

use std::rc::Rc;

use super::queue;
use super::record::{Event, top_xid};
use crate::ffi::{self, Backend};

struct Pending {
    level: i32,
    event: Event,
    /// Apart from the event: one command may be the statement of thousands of events.
    statement: Rc<str>,
}

static PENDING: Backend<Vec<Pending>> = Backend::new(Vec::new());

fn pending() -> &'static mut Vec<Pending> {
    // SAFETY: single-threaded; no reference is kept across a call.
    unsafe { &mut *PENDING.get() }
}

/// Records an event when, and if, what is being done now commits. `statement` is the text of the client's statement.
pub fn record_at_commit(event: Event, statement: &str) {
    let statement = match pending().last() {
        Some(last) if &*last.statement == statement => Rc::clone(&last.statement),
        _ => Rc::from(statement),
    };
    // SAFETY: reads a static.
    let level = unsafe { ffi::GetCurrentTransactionNestLevel() };
    pending().push(Pending { level, event, statement });
}

/// Whether there is anything to record.
#[inline(always)]
pub fn any() -> bool {
    !pending().is_empty()
}

/// Just before the commit, or before the transaction is prepared for one: nobody waits for these events.
pub fn before_commit() {
    let xid = top_xid();
    for Pending { mut event, statement, .. } in core::mem::take(pending()) {
        event.xid.clone_from(&xid);
        event.statement = Some(statement.as_ref().to_owned());
        queue::record(&event);
    }
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

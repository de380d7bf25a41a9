//! What the policies say of a statement that is rehearsed: which of them cover rows that it changes, and which would
//! refuse it here and now. A request is about the latter, for a token has to lift them.

use std::rc::Rc;

use crate::ffi::Backend;
use crate::policy::table::Loaded;
use crate::words::{Operation, RelationName};

/// A policy that covers something which a rehearsal changed.
#[derive(Debug)]
pub struct Concern {
    pub policy: Rc<Loaded>,
    /// Where the rehearsal met it first; where it would refuse first, if it would.
    pub relation: RelationName,
    pub operation: Operation,
    pub refuses: bool,
    /// The number of rows that it refuses to let pass, where it is one.
    pub limit: Option<u64>,
}

static CONCERNS: Backend<Vec<Concern>> = Backend::new(Vec::new());

fn concerns() -> &'static mut Vec<Concern> {
    // SAFETY: single-threaded; no reference is kept across a call.
    unsafe { &mut *CONCERNS.get() }
}

/// A rehearsal begins. Gives what [`end`] wants back: one may be inside another.
pub fn begin() -> Vec<Concern> {
    core::mem::take(concerns())
}

/// The rehearsal is over. Gives each policy once, in the order in which they were met.
pub fn end(outer: Vec<Concern>) -> Vec<Concern> {
    core::mem::replace(concerns(), outer)
}

/// Whether the rehearsal has met this policy as one that would refuse.
pub fn refuses(policy: &Loaded) -> bool {
    concerns().iter().any(|known| known.refuses && known.policy.revision == policy.revision)
}

/// Notes a policy that covers, or that would refuse, at that `limit`.
pub fn note(policy: &Rc<Loaded>, relation: &RelationName, operation: Operation, refuses: bool, limit: Option<u64>) {
    match concerns().iter_mut().find(|known| known.policy.revision == policy.revision) {
        Some(known) if refuses && !known.refuses => {
            (known.relation, known.operation, known.refuses) = (relation.clone(), operation, true);
            known.limit = limit;
        }
        Some(_) => {}
        None => {
            let (policy, relation) = (Rc::clone(policy), relation.clone());
            concerns().push(Concern { policy, relation, operation, refuses, limit });
        }
    }
}

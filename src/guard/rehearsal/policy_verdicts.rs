//! What the policies say of a statement that is rehearsed: which of them cover rows that it changes, and which would
//! refuse it here and now. A request is about the latter, for a token has to lift them.

use std::rc::Rc;

use rules::limits::ledger::Ledger;
use rules::words::{Operation, Place, RelationName, Serial};
use rustc_hash::{FxBuildHasher, FxHashMap};

use crate::guard::limits::binding::Binding;
use crate::guard::limits::extra_limits::Charged;
use crate::pg::backend_local::{BackendCell, BackendLocal, Borrowed};
use crate::policy::table::{Loaded, Revision};

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

/// Each policy once, in the order in which they were met.
#[derive(Debug)]
pub struct Concerns {
    met: Vec<Concern>,
    /// Places in `met` by the policies' revisions.
    places: FxHashMap<Revision, usize>,
}

impl Concerns {
    const NONE: Self = Self { met: Vec::new(), places: FxHashMap::with_hasher(FxBuildHasher) };
}

static CONCERNS: BackendLocal<Concerns> = BackendLocal::new(Concerns::NONE);

#[track_caller]
fn concerns() -> Borrowed<Concerns> {
    CONCERNS.borrow()
}

static REFUSED_WITHOUT_ROWS: BackendCell<bool> = BackendCell::new(false);

/// What is rehearsed would be refused even if it changed no row.
pub fn note_refused_without_rows() {
    REFUSED_WITHOUT_ROWS.set(true);
}

/// Whether the last rehearsal met something that is refused whatever number of rows it changes.
pub fn is_refused_without_rows() -> bool {
    REFUSED_WITHOUT_ROWS.get()
}

/// A rehearsal begins. Gives what [`end`] wants back: one may be inside another.
pub fn begin() -> Concerns {
    REFUSED_WITHOUT_ROWS.set(false);
    core::mem::replace(&mut *concerns(), Concerns::NONE)
}

/// The rehearsal is over. Gives each policy once, in the order in which they were met.
pub fn end(outer: Concerns) -> Vec<Concern> {
    core::mem::replace(&mut *concerns(), outer).met
}

/// The transaction is over, and with it every rehearsal.
pub fn end_transaction() {
    *concerns() = Concerns::NONE;
}

/// Whether its end has nothing to forget here.
#[inline(always)]
pub fn is_clean() -> bool {
    concerns().met.is_empty()
}

/// Notes what the policies of rows that a rehearsal has just charged say to them. `suspended` tells whether another statement
/// may continue later.
pub fn met(
    ledger: &mut Ledger,
    binding: &Binding,
    operation: Operation,
    rows: u64,
    place: Place,
    suspended: impl Fn(Serial) -> bool + Copy,
) {
    let past = |limit: Option<u64>, rows: u64| limit.filter(|limit| rows > *limit);
    for charge in binding.charges(operation).iter().filter(|charge| !refuses(&charge.policy)) {
        let policy = &charge.policy.policy;
        let charged = Charged { policy: &charge.policy, rows, place };
        let limit = past(policy.max_rows, ledger.counted_in_statement(charge.meter, place.statement))
            .or_else(|| past(policy.max_rows_per_transaction, ledger.in_transaction(charge.meter)))
            .or_else(|| charge.more.as_ref()?.would_refuse(ledger, &charged, suspended));
        note(&charge.policy, &binding.relation, operation, limit.is_some(), limit);
    }
}

/// Whether the rehearsal has met this policy as one that would refuse.
fn refuses(policy: &Loaded) -> bool {
    let concerns = concerns();
    concerns.places.get(&policy.revision).is_some_and(|place| concerns.met[*place].refuses)
}

/// Notes a policy that covers, or that would refuse, at that `limit`.
pub fn note(policy: &Rc<Loaded>, relation: &RelationName, operation: Operation, refuses: bool, limit: Option<u64>) {
    let mut concerns = concerns();
    let Concerns { met, places } = &mut *concerns;
    match places.get(&policy.revision).and_then(|place| met.get_mut(*place)) {
        Some(known) if refuses && !known.refuses => {
            (known.relation, known.operation, known.refuses) = (relation.clone(), operation, true);
            known.limit = limit;
        }
        Some(_) => {}
        None => {
            let (policy, relation) = (Rc::clone(policy), relation.clone());
            places.insert(policy.revision, met.len());
            met.push(Concern { policy, relation, operation, refuses, limit });
        }
    }
}

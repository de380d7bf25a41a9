//! Which meters the rows of a relation are charged to, for the acting role; kept until a policy, a name, an ancestor or a membership changes.

use std::rc::Rc;

use pgrx::pg_sys;
use rustc_hash::FxHashMap;

use super::budget::{Ledger, MeterId, Past, Place, Serial};
use super::decide::{self, Attempt};
use super::statement;
use crate::error::Error;
use crate::ffi::Backend;
use crate::policy::catalog::{self, COUNTED};
use crate::policy::table::{Loaded, Revision};
use crate::raise::{Failure, Raise, guarded};
use crate::session::Actor;
use crate::settings;
use crate::words::{Operation, RelationName};

/// A policy's budget that a relation's rows are charged to.
pub struct Charge {
    pub meter: MeterId,
    pub policy: Rc<Loaded>,
}

/// A covered relation.
pub struct Binding {
    pub relation: RelationName,
    /// The relation's qualified name, as tokens have it.
    pub name: String,
    /// Counts the relation's own rows.
    pub rows: MeterId,
    /// By operation, in the order of [`COUNTED`].
    charges: [Vec<Charge>; 3],
}

impl Binding {
    /// The budgets of an operation.
    #[inline]
    pub fn charges(&self, operation: Operation) -> &[Charge] {
        match operation {
            Operation::Update => &self.charges[0],
            Operation::Delete => &self.charges[1],
            Operation::Truncate => &self.charges[2],
            Operation::Drop => &[],
        }
    }
}

/// Past this many relations the answers are thrown away and found again.
const MOST_BINDINGS: usize = 20_000;

/// The answers for one relation, by acting role.
type Answers = Vec<(Actor, Option<Rc<Binding>>)>;

struct Book {
    ledger: Ledger,
    generation: u64,
    bindings: FxHashMap<u32, Answers>,
    policies: FxHashMap<Revision, MeterId>,
    relations: FxHashMap<u32, (MeterId, String)>,
    /// Meters may be in use by nobody any more; all are dropped after the transaction.
    stale: bool,
}

static BOOK: Backend<Option<Book>> = Backend::new(None);

fn book() -> &'static mut Book {
    // SAFETY: single-threaded; references end before anything that may come back here (SPI, invalidations).
    unsafe {
        (*BOOK.get()).get_or_insert_with(|| Book {
            ledger: Ledger::new(),
            generation: 0,
            bindings: FxHashMap::default(),
            policies: FxHashMap::default(),
            relations: FxHashMap::default(),
            stale: false,
        })
    }
}

/// The numbers.
pub fn ledger() -> &'static mut Ledger {
    &mut book().ledger
}

/// Forgets answers that may be stale. Invalidations must have been accepted.
#[inline]
fn refresh(book: &mut Book) {
    let generation = catalog::generation();
    if book.generation != generation || book.bindings.len() > MOST_BINDINGS {
        book.bindings.clear();
        book.generation = generation;
        book.stale = true;
    } else if catalog::any_changed() {
        for relation in catalog::take_changed() {
            book.bindings.remove(&relation);
        }
    }
}

/// What a relation's rows are charged to; none where no policy covers it. One hash look-up after the first time.
///
/// # Errors
/// WG008 when a policy cannot be worked with; a foreign error when reading them was interrupted.
#[inline]
pub fn binding(relation: pg_sys::Oid, actor: Actor) -> Result<Option<Rc<Binding>>, Failure> {
    let book = book();
    refresh(book);
    if let Some(known) = book.bindings.get(&u32::from(relation))
        && let Some((_, binding)) = known.iter().find(|(of, _)| *of == actor)
    {
        return Ok(binding.clone());
    }
    bind(relation, actor)
}

#[cold]
fn bind(relation: pg_sys::Oid, actor: Actor) -> Result<Option<Rc<Binding>>, Failure> {
    let covering = catalog::covering(relation, actor)?;
    let book = book();
    // Reading the policies may have processed invalidations; then this answer is kept for the new generation.
    refresh(book);
    let binding = covering.map(|covering| {
        let name = covering.relation.to_sql();
        let rows = match book.relations.get(&u32::from(relation)) {
            Some((meter, known)) if *known == name => *meter,
            _ => {
                let meter = book.ledger.add(None, None);
                book.relations.insert(u32::from(relation), (meter, name.clone()));
                meter
            }
        };
        let mut charges = covering.applying.map(|policies| {
            policies
                .into_iter()
                .map(|policy| {
                    let meter = *book.policies.entry(policy.revision).or_insert_with(|| {
                        book.ledger.add(policy.policy.max_rows, policy.policy.max_rows_per_transaction)
                    });
                    Charge { meter, policy }
                })
                .collect::<Vec<_>>()
        });
        debug_assert_eq!(charges.len(), COUNTED.len());
        for charges in &mut charges {
            // The smallest limit is the one to name in the error.
            charges.sort_by_key(|charge| charge.policy.policy.max_rows.unwrap_or(u64::MAX));
        }
        Rc::new(Binding { relation: covering.relation, name, rows, charges })
    });
    book.bindings.entry(u32::from(relation)).or_default().push((actor, binding.clone()));
    Ok(binding)
}

/// Charges rows to a relation's budgets. Null: they may stay; otherwise what to raise.
///
/// Runs once per row: no allocation, no lock, nothing that raises, unless a limit is passed.
#[inline]
pub fn charge(binding: &Binding, operation: Operation, rows: u64, place: Place, estimate: Option<u64>) -> *mut Raise {
    if !settings::enabled() {
        return switched_off(binding, operation, place);
    }
    let ledger = ledger();
    let goes_on = |serial: Serial| statement::may_resume(serial) || decide::has_lift(serial);
    ledger.charge(binding.rows, rows, place, goes_on);
    for charge in binding.charges(operation) {
        if let Some(past) = ledger.charge(charge.meter, rows, place, goes_on)
            && !decide::is_lifted(charge.meter, place.statement)
        {
            let raise = past_limit(binding, operation, charge, past, place, estimate);
            if !raise.is_null() {
                return raise;
            }
        }
    }
    if decide::is_granted(place.statement)
        && !decide::within_grant(ledger, place.statement, binding.rows, &binding.name)
    {
        return past_review(binding, operation, place, estimate);
    }
    core::ptr::null_mut()
}

#[cold]
fn switched_off(binding: &Binding, operation: Operation, place: Place) -> *mut Raise {
    if decide::knows_disabled(place.statement) {
        return core::ptr::null_mut();
    }
    guarded(|| {
        decide::record_disabled(&binding.relation, operation, place.statement);
        Ok(())
    })
}

#[cold]
fn past_limit(
    binding: &Binding,
    operation: Operation,
    charge: &Charge,
    past: Past,
    place: Place,
    estimate: Option<u64>,
) -> *mut Raise {
    guarded(|| {
        let attempt = Attempt {
            relation: &binding.relation,
            operation,
            policy: &charge.policy,
            meter: charge.meter,
            past,
            place,
            estimate,
        };
        decide::decide(&attempt)?;
        if decide::is_granted(place.statement) {
            // Tables that were charged before the token was spent count as well.
            decide::check_grant(&attempt, &rows_by_table(place.statement))?;
        }
        Ok(())
    })
}

#[cold]
fn past_review(binding: &Binding, operation: Operation, place: Place, estimate: Option<u64>) -> *mut Raise {
    guarded(|| {
        let Some(charge) = binding.charges(operation).first() else {
            return Ok(());
        };
        let attempt = Attempt {
            relation: &binding.relation,
            operation,
            policy: &charge.policy,
            meter: charge.meter,
            past: Past::Statement,
            place,
            estimate,
        };
        decide::check_grant(&attempt, &rows_by_table(place.statement))
    })
}

/// Runs what may find that nothing can be decided. While the guard is switched off that is no reason to refuse.
pub fn deciding<F: FnOnce() -> Result<(), Failure>>(body: F) -> *mut Raise {
    guarded(|| match body() {
        Err(Failure::Ours(Error::Undecided { .. })) if !settings::enabled() => Ok(()),
        result => result,
    })
}

/// Rows charged in a statement by qualified table name.
pub fn rows_by_table(statement: Serial) -> Vec<(String, u64)> {
    let book = book();
    book.relations
        .values()
        .map(|(meter, name)| (name.clone(), book.ledger.in_statement(*meter, statement)))
        .filter(|(_, rows)| *rows > 0)
        .collect()
}

/// The transaction is over.
pub fn end_transaction() {
    let book = book();
    book.ledger.end_transaction();
    if book.stale {
        book.stale = false;
        book.bindings.clear();
        book.policies.clear();
        book.relations.clear();
        book.ledger.clear();
    }
}

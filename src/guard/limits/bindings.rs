//! Which meters the rows of a relation are charged to, for the acting role; kept until a policy, a name, an ancestor
//! or a membership changes.

use std::collections::BTreeMap;
use std::rc::Rc;

use pgrx::pg_sys;
use rules::error::Error;
use rules::limits::ledger::{Ledger, MeterId};
use rules::policy::steady::{self, Steady};
use rules::words::{Operation, RelationName};
use rustc_hash::FxBuildHasher;
use rustc_hash::FxHashMap;

use super::binding::{Binding, Charge};
use super::extra_limits::Further;
use crate::guard::rehearsal::account;
use crate::guard::verdict::overrides;
use crate::pg::backend_local::{BackendLocal, Borrowed};
use crate::pg::ereport::{Failure, PendingError, guarded};
use crate::policy::catalog::Applying;
use crate::policy::relation::relation_name;
use crate::policy::table::Revision;
use crate::policy::{catalog, invalidation, size, target};
use crate::session::actor::Actor;
use crate::session::{settings, statement};
use crate::stat::counters;

/// Past this many relations the answers are thrown away and found again.
const MOST_BINDINGS: usize = 20_000;

/// The answers for one relation, by acting role.
type Answers = Vec<(Actor, Option<Rc<Binding>>)>;

/// What was found, and the meters that it needs.
pub struct Book {
    /// What [`invalidation::changes`] and [`invalidation::generation`] gave when the answers were good.
    changes: u64,
    generation: u64,
    bindings: FxHashMap<u32, Answers>,
    /// The answer that was asked for last: the next question is mostly the same.
    recent: Option<(u32, Actor, Option<Rc<Binding>>)>,
    pub policies: FxHashMap<Revision, MeterId>,
    /// By qualified name, which is what tokens go by: a table that is put in another's place has no rows of its own. In
    /// the order in which errors name them.
    pub relations: BTreeMap<Rc<str>, MeterId>,
    pub further: Further,
    /// Meters may be in use by nobody any more; all are dropped after the transaction.
    stale: bool,
}

impl Book {
    /// A relation's qualified name, and what counts its rows.
    fn counted(&mut self, relation: &RelationName) -> (Rc<str>, MeterId) {
        let name: Rc<str> = relation.to_sql().into();
        match self.relations.get_key_value(&name) {
            Some((name, meter)) => (Rc::clone(name), *meter),
            None => {
                let meter = LEDGER.borrow().add(None, None);
                self.relations.insert(Rc::clone(&name), meter);
                (name, meter)
            }
        }
    }
}

static BOOK: BackendLocal<Book> = BackendLocal::new(Book {
    changes: 0,
    generation: 0,
    bindings: FxHashMap::with_hasher(FxBuildHasher),
    recent: None,
    policies: FxHashMap::with_hasher(FxBuildHasher),
    relations: BTreeMap::new(),
    further: Further::new(),
    stale: false,
});

/// What is known.
#[track_caller]
pub fn book() -> Borrowed<Book> {
    BOOK.borrow()
}

/// The numbers. Apart from the book, which is borrowed where rows are charged by what stands in it.
pub static LEDGER: BackendLocal<Ledger> = BackendLocal::new(Ledger::new());

/// Forgets answers that may be stale. Invalidations must have been accepted.
fn refresh(book: &mut Book) {
    let generation = invalidation::generation();
    let changed = target::take_changed();
    if book.generation != generation || book.bindings.len() > MOST_BINDINGS {
        book.bindings.clear();
        book.recent = None;
        book.generation = generation;
        book.stale = true;
    } else if !changed.is_empty() {
        book.recent = None;
        for relation in changed {
            book.bindings.remove(&relation);
        }
    }
    book.changes = invalidation::changes();
}

/// What a relation's rows are charged to; none where no policy covers it. One hash look-up after the first time.
///
/// # Errors
/// WG008 when a policy cannot be worked with; a foreign error when reading them was interrupted.
#[inline]
pub fn binding(relation: pg_sys::Oid, actor: Actor) -> Result<Option<Rc<Binding>>, Failure> {
    {
        let book = book();
        if catalog::answers_hold(book.changes)
            && let Some((of, by, binding)) = &book.recent
            && *of == u32::from(relation)
            && *by == actor
        {
            return Ok(binding.clone());
        }
    }
    look_up(relation, actor)
}

fn look_up(relation: pg_sys::Oid, actor: Actor) -> Result<Option<Rc<Binding>>, Failure> {
    catalog::settle();
    let known = {
        let mut book = book();
        refresh(&mut book);
        find(&book, relation, actor).cloned()
    };
    let (binding, lasts) = match known {
        Some(binding) => (binding, true),
        None => bind(relation, actor)?,
    };
    if lasts {
        book().recent = Some((u32::from(relation), actor, binding.clone()));
    }
    Ok(binding)
}

/// What a relation's rows are charged to, as [`binding`]; while a request is executed also a table that no policy covers
/// now, if it was reviewed, and in a preview any other: it has nothing but a count.
///
/// # Errors
/// As [`binding`].
#[inline]
pub fn binding_to_count(relation: pg_sys::Oid, actor: Actor) -> Result<Option<Rc<Binding>>, Failure> {
    let binding = binding(relation, actor)?;
    if binding.is_none() && account::counts_everything() {
        return Ok(relation_name(relation).map(counting));
    }
    if statement::is_executing() && binding.as_ref().is_none_or(|binding| binding.policies().next().is_none()) {
        return Ok(reviewed(relation).or(binding));
    }
    Ok(binding)
}

/// Whether rows are counted that one of these operations changes.
#[inline]
pub fn is_counted(binding: &Binding, operations: &[Operation]) -> bool {
    operations.iter().any(|operation| !binding.charges(*operation).is_empty())
        || account::counts_everything()
        || statement::is_executing() && binding.policies().next().is_none() && overrides::is_reviewed(&binding.name)
}

#[cold]
fn reviewed(relation: pg_sys::Oid) -> Option<Rc<Binding>> {
    let name = relation_name(relation)?;
    if !overrides::is_reviewed(&name.to_sql()) {
        return None;
    }
    Some(counting(name))
}

/// What only counts the rows of a relation.
fn counting(name: RelationName) -> Rc<Binding> {
    let (sql, rows) = book().counted(&name);
    Rc::new(Binding::new(Rc::new(name), sql, rows, counters::UNCOUNTED, Default::default()))
}

fn find(book: &Book, relation: pg_sys::Oid, actor: Actor) -> Option<&Option<Rc<Binding>>> {
    book.bindings.get(&u32::from(relation))?.iter().find(|(of, _)| *of == actor).map(|(_, binding)| binding)
}

/// What [`binding`] would give, where that is known already. Neither raises nor looks anything up.
#[inline]
pub fn known(relation: pg_sys::Oid, actor: Actor) -> Option<Option<Rc<Binding>>> {
    let book = book();
    if !catalog::answers_hold(book.changes) {
        return None;
    }
    match &book.recent {
        Some((of, by, binding)) if *of == u32::from(relation) && *by == actor => Some(binding.clone()),
        _ => find(&book, relation, actor).cloned(),
    }
}

/// Finds out what a relation's rows are charged to, and whether that holds until an invalidation comes.
#[cold]
fn bind(relation: pg_sys::Oid, actor: Actor) -> Result<(Option<Rc<Binding>>, bool), Failure> {
    // Looking it up may process invalidations.
    let read = steady::read(invalidation::changes, || catalog::covering(relation, actor))?;
    refresh(&mut book());
    let Some(Steady { value: covering, lasts }) = read else {
        return Err(Failure::Ours(Error::Undecided {
            reason: "policies, names or memberships change faster than they can be read".into(),
            hint: "SELECT pg_catalog.pg_sleep(1);".into(),
            relation: relation_name(relation),
        }));
    };
    let binding = covering.map(|covering| {
        let fractions =
            covering.applying.iter().flatten().any(|applying| applying.policy.policy.max_fraction.is_some());
        let tree = size::root_of_tree(relation);
        let root = if fractions { tree } else { relation };
        let counted = if tree == relation { None } else { relation_name(tree).map(Rc::new) };
        let mut book = book();
        let book = &mut *book;
        let (name, rows) = book.counted(&covering.relation);
        let covered = Rc::new(covering.relation);
        let stat = counters::place_of(counted.as_ref().unwrap_or(&covered), actor.role());
        let mut ledger = LEDGER.borrow();
        let charges = covering.applying.map(|applying| {
            applying
                .into_iter()
                .map(|Applying { policy, whole, beside }| {
                    // One for all tables, whichever of its limits apply there.
                    let meter = *book
                        .policies
                        .entry(policy.revision)
                        .or_insert_with(|| ledger.add(whole.policy.max_rows, whole.policy.max_rows_per_transaction));
                    let more = book.further.of(&mut ledger, &policy, root);
                    Charge { meter, policy, beside, more }
                })
                .collect::<Vec<_>>()
        });
        Rc::new(Binding::new(covered, name, rows, stat, charges))
    });
    // Nearly always there is one role.
    if lasts {
        let mut book = book();
        let answers = book.bindings.entry(u32::from(relation)).or_insert_with(|| Vec::with_capacity(1));
        answers.push((actor, binding.clone()));
    }
    Ok((binding, lasts))
}

/// Runs what may find that nothing can be decided. While the guard is switched off that is no reason to refuse.
pub fn deciding<F: FnOnce() -> Result<(), Failure>>(body: F) -> *mut PendingError {
    guarded(|| match body() {
        Err(Failure::Ours(Error::Undecided { .. })) if !settings::enabled() => Ok(()),
        result => result,
    })
}

/// What counts the rows of the table of that name.
pub fn meter_of(name: &str) -> Option<MeterId> {
    book().relations.get(name).copied()
}

/// The transaction is over: where meters may be in use by nobody any more, all of them are dropped.
pub fn forget_stale(ledger: &mut Ledger) {
    let mut book = book();
    if book.stale {
        book.stale = false;
        book.bindings.clear();
        book.recent = None;
        book.policies.clear();
        book.relations.clear();
        book.further.clear();
        ledger.clear();
        counters::clear();
    }
}

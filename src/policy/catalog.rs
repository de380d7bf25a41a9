//! The policies of this database as this backend sees them, and for any relation and acting role the ones that apply.
//!
//! Read on the first covered write and again after a change. Changes arrive as ordinary cache invalidations, with
//! their commit and never for a rolled-back one. Answers depend on names, ancestors and memberships besides. What an
//! invalidation is about decides what is thrown away: the answers about some relations (see `target`) for a relation or
//! a schema, all of them for a policy, none for what no answer depends on, however often others make and drop it.
//! Memberships are looked up again after a change of roles, and matter only where they came out otherwise.

use std::rc::Rc;

use pgrx::pg_sys;
use rules::error::{Error, LOAD_IT_LAST, NO_SHARED_MEMORY, WHY_NO_SHARED_MEMORY};
use rules::limits::ledger::Beside;
use rules::policy::limit::Limit;
use rules::policy::model::Policy;
use rules::policy::resolve::{self, Candidate, Target};
use rules::words::{Mode, Operation, RelationName};
use rustc_hash::{FxBuildHasher, FxHashMap, FxHashSet};

use super::conditions::{self, Condition, Now};
use super::relation::{never_covered, role_oid};
use super::table::{self, Loaded, Place, Policies};
use super::{invalidation, target};
use crate::pg::backend_local::{BackendLocal, Borrowed};
use crate::pg::ereport::Failure;
use crate::pg::ffi::PgError;
use crate::pg::preload;
use crate::session::actor::{Actor, role_name};

/// What was read.
struct State {
    policies: Option<Rc<Policies>>,
    /// For which of the policies the conditions hold, by their places.
    in_force: Vec<bool>,
    /// What that depended on; none where no policy has conditions.
    now: Option<Now>,
    /// Memberships by acting role, as of `roles_seen`.
    actors: FxHashMap<Actor, Rc<resolve::Actor>>,
    /// Of the changes of roles, those that `actors` knows of.
    roles_seen: u64,
}

/// Acting roles whose memberships this backend keeps; past that it starts again.
const MOST_ACTORS: usize = 1_000;

static STATE: BackendLocal<State> = BackendLocal::new(State {
    policies: None,
    in_force: Vec::new(),
    now: None,
    actors: FxHashMap::with_hasher(FxBuildHasher),
    roles_seen: 0,
});

#[track_caller]
fn state() -> Borrowed<State> {
    STATE.borrow()
}

/// Whether nothing has changed since `changes`, as far as that is known without looking anything up.
#[inline]
pub fn answers_hold(changes: u64) -> bool {
    invalidation::CHANGES.get() == changes && state().now.as_ref().is_none_or(Now::is_current)
}

/// Looks whether other policies are in force than before, or acting roles are members of others; all answers change with
/// that.
pub fn settle() {
    settle_conditions();
    let policies = state().policies.clone();
    if let Some(policies) = policies {
        settle_roles(&policies);
    }
}

fn settle_conditions() {
    if state().now.as_ref().is_none_or(Now::is_current) {
        return;
    }
    let policies = state().policies.clone();
    if let Some(policies) = policies {
        let (in_force, now) = in_force(&policies);
        let mut state = state();
        state.now = now;
        if state.in_force != in_force {
            state.in_force = in_force;
            invalidation::drop_answers();
        }
    }
}

fn settle_roles(policies: &Policies) {
    let seen = invalidation::ROLE_CHANGES.get();
    if state().roles_seen == seen {
        return;
    }
    let known: Vec<(Actor, Rc<resolve::Actor>)> =
        state().actors.iter().map(|(actor, known)| (*actor, Rc::clone(known))).collect();
    // A change that arrives while these are looked up makes another round, and so does an error.
    if known.iter().any(|(actor, known)| memberships(&actor.roles(), policies) != **known) {
        state().actors.clear();
        invalidation::drop_answers();
    }
    state().roles_seen = seen;
}

/// For which policies the conditions hold, and what that depends on.
fn in_force(policies: &Policies) -> (Vec<bool>, Option<Now>) {
    let all = || policies.loaded.iter().map(|loaded| &loaded.policy);
    (all().map(conditions::hold).collect(), all().any(Policy::is_conditional).then(Now::current))
}

/// Takes back the claim that what was read is valid, unless reading it came to its end.
struct Reading {
    done: bool,
}

impl Drop for Reading {
    fn drop(&mut self) {
        if !self.done {
            invalidation::VALID.set(false);
            invalidation::FOUND.set(false);
        }
    }
}

/// Readings before the policies are given up.
const MOST_READINGS: usize = 64;

/// The policies in force.
///
/// They are read as of one snapshot, taken after this was called. So where an invalidation comes meanwhile (it may be about
/// anything: PostgreSQL forgets all it knows when too many come in) what was read is what the statement goes by, as if it
/// had come a moment earlier; whoever asks next reads again. Only where the table is must still be so.
///
/// # Errors
/// What waiting for the table's lock may raise.
fn policies() -> Result<Rc<Policies>, PgError> {
    invalidation::register();
    for _ in 0..MOST_READINGS {
        if invalidation::FOUND.get()
            && invalidation::VALID.get()
            && let Some(policies) = &state().policies
        {
            return Ok(Rc::clone(policies));
        }
        // Claimed before reading: a change that arrives while we read is not lost.
        let mut reading = Reading { done: false };
        invalidation::FOUND.set(true);
        let place = table::find();
        let before = state().policies.clone();
        let same = invalidation::PLACE.replace(place) == place && before.is_some();
        if !(same && invalidation::VALID.get()) {
            invalidation::VALID.set(true);
            let policies = match place {
                Place::NotInstalled => Rc::new(Policies::not_installed()),
                Place::Missing => Rc::new(Policies::unreadable("table writeguard.policy is not there".into())),
                Place::Table(table) => match Policies::read(table, before.as_ref())? {
                    Some(policies) => policies,
                    // Dropped since it was found.
                    None => continue,
                },
            };
            // Where they are as they were there is nothing to set up.
            if before.is_none_or(|before| !Rc::ptr_eq(&before, &policies)) {
                let (in_force, now) = in_force(&policies);
                let role_hashes = policies.roles.iter().filter_map(|role| invalidation::role_hash(role)).collect();
                *invalidation::ROLE_HASHES.borrow() = role_hashes;
                let mut state = state();
                state.policies = Some(policies);
                // Memberships are those in roles that policies name.
                state.actors.clear();
                state.in_force = in_force;
                state.now = now;
            }
        }
        reading.done = true;
        if !(invalidation::FOUND.get() && invalidation::VALID.get())
            && table::find() == place
            && let Some(policies) = &state().policies
        {
            return Ok(Rc::clone(policies));
        }
    }
    Ok(Rc::new(Policies::unreadable("table writeguard.policy comes and goes".into())))
}

/// Whether the extension may be installed in this database, as far as this backend knows; looks nothing up.
pub fn may_be_installed() -> bool {
    state().policies.as_ref().is_none_or(|policies| policies.installed)
}

/// Whether the extension is installed in this database.
///
/// # Errors
/// What waiting for the table's lock may raise.
pub fn installed() -> Result<bool, PgError> {
    Ok(policies()?.installed)
}

/// The policies with a rate, in force or not.
///
/// # Errors
/// What waiting for the policy table's lock may raise.
pub fn with_rates() -> Result<Vec<Rc<Loaded>>, PgError> {
    Ok(policies()?.loaded.iter().filter(|loaded| loaded.policy.rate.is_some()).cloned().collect())
}

/// Whether no policy that names the table, in force or not, keeps its rows out of requests.
///
/// # Errors
/// What waiting for the policy table's lock may raise.
pub fn shows_samples(relation: pg_sys::Oid) -> Result<bool, PgError> {
    let policies = policies()?;
    let Some(target) = target::find(relation) else { return Ok(true) };
    let places = policies.naming(&target);
    let hides = |place: &usize| {
        let policy = &policies.loaded[*place].policy;
        !policy.samples && resolve::names(policy, &target)
    };
    Ok(!places.iter().any(hides))
}

/// The acting role with its memberships, for all roles that policies name.
fn actor(actor: Actor, policies: &Policies) -> Rc<resolve::Actor> {
    settle_roles(policies);
    let known = state().actors.get(&actor).map(Rc::clone);
    if let Some(known) = known {
        return known;
    }
    let known = Rc::new(memberships(&actor.roles(), policies));
    let mut state = state();
    if state.actors.len() >= MOST_ACTORS {
        // What is forgotten cannot be compared with what a later look-up gives.
        state.actors.clear();
        invalidation::drop_answers();
    }
    state.actors.insert(actor, Rc::clone(&known));
    known
}

/// The names of roles, and which of those that policies name they are members of. From now on a change of any of them is
/// noticed.
pub fn memberships(roles: &[pg_sys::Oid], policies: &Policies) -> resolve::Actor {
    let itself: FxHashSet<String> = roles.iter().map(|role| role_name(*role)).collect();
    let hash = |role: &pg_sys::Oid| {
        // By its bytes: a name that was made in another database may be no text here. SAFETY: NULL for an unknown role.
        let name = unsafe { pg_sys::GetUserNameFromId(*role, true) };
        let of = || target::hash_of(pg_sys::SysCacheIdentifier::AUTHNAME, pg_sys::Datum::from(name));
        (!name.is_null()).then(of)
    };
    let hashes: Vec<u32> = roles.iter().filter_map(hash).collect();
    invalidation::ROLE_HASHES.borrow().extend(hashes);
    let member_of = policies
        .roles
        .iter()
        .filter(|name| !itself.contains(name.as_str()))
        .filter(|name| {
            role_oid(name).is_some_and(|of| {
                // SAFETY: syscache look-ups.
                roles.iter().any(|role| unsafe { pg_sys::is_member_of_role_nosuper(*role, of) })
            })
        })
        .cloned()
        .collect();
    resolve::Actor { itself, member_of }
}

/// What the policies say of one relation for one acting role.
pub struct Covering {
    pub relation: RelationName,
    /// The policies of which something applies to each operation, in the order of [`Operation::ALL`].
    pub applying: [Vec<Applying>; Operation::ALL.len()],
}

/// A policy as it applies to one relation, acting role and operation.
pub struct Applying {
    /// With those of its limits that apply, and no others.
    pub policy: Rc<Loaded>,
    /// With all its limits.
    pub whole: Rc<Loaded>,
    /// Of the limits that count rows in one budget for all tables, those that others set aside here.
    pub beside: Beside,
}

impl Applying {
    fn of(loaded: &Rc<Loaded>, candidate: &Candidate) -> Self {
        let is_aside = |limit| candidate.set_aside_by(limit).is_some();
        let beside = Beside { statement: is_aside(Limit::Rows), transaction: is_aside(Limit::RowsPerTransaction) };
        let policy = if candidate.applying == loaded.policy.states() {
            Rc::clone(loaded)
        } else {
            Rc::new(Loaded { policy: loaded.policy.only(candidate.applying), revision: loaded.revision })
        };
        Self { policy, whole: Rc::clone(loaded), beside }
    }
}

/// What an answer came from.
#[derive(PartialEq)]
pub struct From {
    /// Others are elsewhere: they are read while these are there, and those that did not change stay where they are.
    policies: *const Policies,
    target: Option<Target>,
    acting: Option<Rc<resolve::Actor>>,
}

/// The policies that apply to a relation for an acting role, none where no policy does; and what that came from.
///
/// # Errors
/// WG008 when a policy cannot be worked with: what it would limit is unknown, so every table is covered by it. A
/// foreign error when reading the policies was interrupted.
pub fn covering(relation: pg_sys::Oid, actor_now: Actor) -> Result<(From, Option<Covering>), Failure> {
    if !target::has_room() {
        invalidation::drop_answers();
    }
    let policies = policies()?;
    let mut from = From { policies: Rc::as_ptr(&policies), target: None, acting: None };
    let none = policies.loaded.is_empty() && policies.broken.is_empty() && policies.unreadable.is_none();
    if none || never_covered(relation).is_some() {
        // A change of its schema or persistence makes this answer stale; a policy set later does so for all.
        target::depend(relation, relation);
        return Ok((from, None));
    }
    let Some(target) = target::find(relation) else {
        return Ok((from, None));
    };
    if let Some(reason) = &policies.unreadable {
        return Err(Error::Undecided {
            reason: reason.clone(),
            hint: "ALTER EXTENSION pg_writeguard UPDATE;".into(),
            relation: Some(target.name),
        }
        .into());
    }
    if let Some(broken) = policies.broken.first() {
        return Err(Error::Undecided {
            reason: format!("policy \"{}\" cannot be read: {}", broken.name, broken.reason),
            hint: format!("SELECT writeguard.drop_policy({});", rules::words::literal(&broken.name)),
            relation: Some(target.name),
        }
        .into());
    }
    let acting = actor(actor_now, &policies);
    let (places, _) = by_force(policies.naming(&target));
    let fitting = resolve::fitting(&policies.loaded, &places, &target, &acting);
    let applying = Operation::ALL.map(|operation| {
        resolve::candidates(&policies.loaded, &fitting, operation)
            .into_iter()
            .map(|candidate| (&policies.loaded[candidate.policy], candidate))
            .filter(|(loaded, candidate)| resolve::is_charged(&loaded.policy, candidate))
            .map(|(loaded, candidate)| Applying::of(loaded, &candidate))
            .collect::<Vec<_>>()
    });
    let covered = applying.iter().any(|policies| !policies.is_empty());
    if covered && !preload::is_attached() {
        // No event could be stored and no rate kept.
        let reason = format!("{}. {}", NO_SHARED_MEMORY, WHY_NO_SHARED_MEMORY.trim_end_matches('.'));
        return Err(Error::Undecided { reason, hint: LOAD_IT_LAST.into(), relation: Some(target.name) }.into());
    }
    from.acting = Some(acting);
    let covering = covered.then(|| Covering { relation: target.name.clone(), applying });
    from.target = Some(target);
    Ok((from, covering))
}

/// Separates the places of policies that are in force from those that take no part now.
fn by_force(places: Vec<usize>) -> (Vec<usize>, Vec<usize>) {
    let state = state();
    places.into_iter().partition(|place| state.in_force.get(*place).copied().unwrap_or(true))
}

/// A limit of a policy as `effective()` shows it.
pub struct Explained {
    pub operation: Operation,
    pub loaded: Rc<Loaded>,
    /// None for a policy that states no limit.
    pub limit: Option<Limit>,
    /// Why it does not apply.
    pub why_not: Option<WhyNot>,
}

/// Why a limit that a policy states does not apply.
pub enum WhyNot {
    SetAsideBy(String),
    /// A condition of the policy does not hold for this session now.
    Condition(Condition),
    /// It has none itself: it exempts.
    Exempts,
    /// There is none.
    NoLimit,
}

/// Every limit of every policy that covers a relation for a role and one of these operations, for `effective()`. By
/// operation, and then by policy.
///
/// # Errors
/// What waiting for the policy table's lock may raise.
pub fn explain(
    relation: pg_sys::Oid,
    roles: &[pg_sys::Oid],
    operations: &[Operation],
) -> Result<Vec<Explained>, PgError> {
    let policies = policies()?;
    settle();
    if never_covered(relation).is_some() {
        return Ok(Vec::new());
    }
    let Some(target) = target::find(relation) else {
        return Ok(Vec::new());
    };
    let acting = memberships(roles, &policies);
    let (taking_part, not_now) = by_force(policies.naming(&target));
    let mut found = Vec::new();
    for operation in operations {
        for (places, in_force) in [(&taking_part, true), (&not_now, false)] {
            let fitting = resolve::fitting(&policies.loaded, places, &target, &acting);
            for candidate in resolve::candidates(&policies.loaded, &fitting, *operation) {
                let loaded = &policies.loaded[candidate.policy];
                let condition =
                    || if in_force { None } else { conditions::failing(&loaded.policy).map(WhyNot::Condition) };
                let explained =
                    |limit, why_not| Explained { operation: *operation, loaded: Rc::clone(loaded), limit, why_not };
                if loaded.policy.states().is_empty() {
                    let exempts = loaded.policy.mode == Mode::Exempt;
                    let nothing = if exempts { WhyNot::Exempts } else { WhyNot::NoLimit };
                    found.push(explained(None, condition().or(Some(nothing))));
                    continue;
                }
                for limit in loaded.policy.states().iter() {
                    let by = candidate.set_aside_by(limit).filter(|_| in_force);
                    let aside = by.map(|by| WhyNot::SetAsideBy(policies.loaded[by].policy.name.clone()));
                    let why_not = aside.or_else(condition);
                    found.push(explained(Some(limit), why_not));
                }
            }
        }
    }
    Ok(found)
}

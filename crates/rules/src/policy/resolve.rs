//! Which limits of several policies apply to one table, one acting role and one operation.
//!
//! Decided limit by limit, so that a policy that is added takes no other limit away than those that it states. A limit
//! is set aside only by a policy that states the same one, or exempts, and is more specific on table or on role and no
//! less specific on the other; all that remain apply together. Pure: names and memberships come in, the answer goes out.

use std::collections::{BTreeSet, HashMap};
use std::rc::Rc;

use rustc_hash::FxHashSet;

use super::limit::{Limit, Limits};
use super::model::Policy;
use super::pattern::Fit;
use crate::words::{Mode, Operation, RelationName};

/// Something that has a policy: policies are kept in several ways, and resolved in one.
pub trait AsPolicy {
    /// The policy.
    fn as_policy(&self) -> &Policy;
}

impl AsPolicy for Policy {
    fn as_policy(&self) -> &Policy {
        self
    }
}

impl<T: AsPolicy> AsPolicy for Rc<T> {
    fn as_policy(&self) -> &Policy {
        (**self).as_policy()
    }
}

/// How closely a policy names the acting role; the greater is the more specific.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum RoleFit {
    /// `public`.
    Everybody,
    /// A role that the acting role is a member of.
    Member,
    /// Login, session_user or the role that is SET.
    Itself,
}

/// The acting role as resolution sees it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Actor {
    /// Login, session_user, and the role that is SET, where one is.
    pub itself: FxHashSet<String>,
    /// Every role that one of these is a member of; being superuser makes nobody a member.
    pub member_of: FxHashSet<String>,
}

/// A relation as resolution sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    pub name: RelationName,
    /// Partition or inheritance ancestors with their distance, 1 for a parent.
    pub ancestors: Vec<(RelationName, u32)>,
}

/// What became of the limits of a policy that covers the table, the role and the operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Candidate {
    /// Its place among the policies given.
    pub policy: usize,
    /// Those of its limits that apply.
    pub applying: Limits,
    /// For each limit that it states, in the order of [`Limit::ALL`], the place of the policy that sets it aside.
    set_aside: [Option<usize>; Limit::ALL.len()],
}

impl Candidate {
    /// The place of the policy that sets the limit aside; none where it applies, or is not stated.
    pub fn set_aside_by(&self, limit: Limit) -> Option<usize> {
        self.set_aside[limit as usize]
    }

    /// The places of all that set a limit of it aside, with the limit.
    pub fn set_aside(&self) -> impl Iterator<Item = (Limit, usize)> {
        Limit::ALL.into_iter().filter_map(|limit| Some((limit, self.set_aside_by(limit)?)))
    }
}

fn role_fit(policy: &Policy, actor: &Actor) -> Option<RoleFit> {
    policy
        .roles
        .iter()
        .filter_map(|role| {
            if actor.itself.contains(role) {
                Some(RoleFit::Itself)
            } else if actor.member_of.contains(role) {
                Some(RoleFit::Member)
            } else {
                (role == "public").then_some(RoleFit::Everybody)
            }
        })
        .max()
}

fn table_fit(policy: &Policy, target: &Target) -> Option<Fit> {
    policy.tables.iter().filter_map(|pattern| pattern.fit(&target.name, &target.ancestors)).max()
}

/// Whether the table is, by its own name or an ancestor's, among those that the policy names.
pub fn names(policy: &Policy, target: &Target) -> bool {
    table_fit(policy, target).is_some()
}

/// Where to look for the policies that may cover a table: however many there are, those with exact names only are
/// found by name, and those with a literal schema by that.
#[derive(Debug, Default)]
pub struct Index {
    by_name: HashMap<RelationName, Vec<usize>>,
    by_schema: HashMap<String, Vec<usize>>,
    elsewhere: Vec<usize>,
}

impl Index {
    /// The index of `policies`.
    pub fn new(policies: &[impl AsPolicy]) -> Self {
        let mut index = Self::default();
        for (place, policy) in policies.iter().enumerate() {
            for pattern in &policy.as_policy().tables {
                let places = match (pattern.exact(), pattern.schema()) {
                    (Some(name), _) => index.by_name.entry(name).or_default(),
                    (None, Some(schema)) => index.by_schema.entry(schema.to_owned()).or_default(),
                    (None, None) => &mut index.elsewhere,
                };
                if places.last() != Some(&place) {
                    places.push(place);
                }
            }
        }
        index
    }

    /// The places of the policies that may cover the table, in order and each once.
    pub fn naming(&self, target: &Target) -> Vec<usize> {
        let names = || core::iter::once(&target.name).chain(target.ancestors.iter().map(|(name, _)| name));
        let exact = names().filter_map(|name| self.by_name.get(name)).flatten();
        let schemas: BTreeSet<&str> = names().map(|name| name.schema.as_str()).collect();
        let in_schema = schemas.into_iter().filter_map(|schema| self.by_schema.get(schema)).flatten();
        let mut places: Vec<usize> = exact.chain(in_schema).chain(&self.elsewhere).copied().collect();
        places.sort_unstable();
        places.dedup();
        places
    }
}

/// The place of a policy, and how closely it names a table and a role.
pub type Fitting = (usize, Fit, RoleFit);

/// Whether one names table and role more closely than the other: more so on one of them, and no less on either.
pub fn is_closer(one: &Fitting, other: &Fitting) -> bool {
    let ((_, table, role), (_, other_table, other_role)) = (one, other);
    table >= other_table && role >= other_role && (table, role) != (other_table, other_role)
}

/// All policies that cover the table for this role, whatever the operation. `places` are those that may.
pub fn fitting(policies: &[impl AsPolicy], places: &[usize], target: &Target, actor: &Actor) -> Vec<Fitting> {
    places
        .iter()
        .filter_map(|place| Some((*place, policies.get(*place)?.as_policy())))
        .filter_map(|(place, policy)| {
            // The cheaper question first.
            let role = role_fit(policy, actor)?;
            Some((place, table_fit(policy, target)?, role))
        })
        .collect()
}

/// Policies that set aside the same: they name the table and the role as closely as each other.
struct Setters<'a> {
    table: Fit,
    role: RoleFit,
    /// They only look on, and set aside none that refuses.
    looks_on: bool,
    /// The updates that they cover.
    columns: Option<&'a [String]>,
    /// For each limit, in the order of [`Limit::ALL`], the place of the first of them that states it or exempts from it.
    stating: [Option<usize>; Limit::ALL.len()],
}

impl Setters<'_> {
    fn set_aside(&self, limit: Limit, policy: &Policy, table: Fit, role: RoleFit) -> Option<usize> {
        let is_closer = self.table >= table && self.role >= role && (self.table, self.role) != (table, role);
        let covers_all = match (self.columns, &policy.columns) {
            (None, _) => true,
            (Some(_), None) => false,
            // Both are in order.
            (Some(mine), Some(columns)) => columns.iter().all(|column| mine.binary_search(column).is_ok()),
        };
        let may = !self.looks_on || policy.mode.looks_on();
        self.stating[limit as usize].filter(|_| is_closer && may && covers_all)
    }
}

/// What can set anything aside, the most specific first.
///
/// However many policies there are, they differ in a handful of ways in how closely they fit.
fn setters<'a>(policies: &'a [impl AsPolicy], covering: &[Fitting]) -> Vec<Setters<'a>> {
    let mut setters: Vec<Setters<'a>> = Vec::new();
    let mut known = HashMap::new();
    for (place, table, role) in covering.iter().copied() {
        let policy = policies[place].as_policy();
        let stated = |limit: Limit| policy.mode == Mode::Exempt || policy.states().contains(limit);
        // Clients choose their application's name, so a policy that depends on it sets nothing aside.
        if policy.application.is_some() || !Limit::ALL.into_iter().any(stated) {
            continue;
        }
        let (looks_on, columns) = (policy.mode.looks_on(), policy.columns.as_deref());
        let of_kind = *known.entry((table, role, looks_on, columns)).or_insert_with(|| {
            setters.push(Setters { table, role, looks_on, columns, stating: [None; Limit::ALL.len()] });
            setters.len() - 1
        });
        for limit in Limit::ALL.into_iter().filter(|limit| stated(*limit)) {
            setters[of_kind].stating[limit as usize].get_or_insert(place);
        }
    }
    setters.sort_by_key(|setters| core::cmp::Reverse((setters.table, setters.role)));
    setters
}

/// Those of them that cover the operation, each with what became of its limits.
pub fn candidates(policies: &[impl AsPolicy], fitting: &[Fitting], operation: Operation) -> Vec<Candidate> {
    let covers = |(place, ..): &&Fitting| policies[*place].as_policy().operations & operation.bit() != 0;
    let covering: Vec<Fitting> = fitting.iter().filter(covers).copied().collect();
    let setters = setters(policies, &covering);
    covering
        .into_iter()
        .map(|(place, table, role)| {
            let policy = policies[place].as_policy();
            let by = |limit: Limit| {
                let may_be = !policy.always && policy.states().contains(limit);
                let mut setters = setters.iter().filter(|_| may_be);
                setters.find_map(|setters| setters.set_aside(limit, policy, table, role))
            };
            let set_aside = Limit::ALL.map(by);
            let applying = policy.states().iter().filter(|limit| set_aside[*limit as usize].is_none()).collect();
            Candidate { policy: place, applying, set_aside }
        })
        .collect()
}

/// Policies with at least one limit that applies, and those that state none: they cover the table, and refuse nothing.
pub fn is_charged(policy: &Policy, candidate: &Candidate) -> bool {
    policy.mode != Mode::Exempt && (!candidate.applying.is_empty() || policy.states().is_empty())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::policy::pattern::Pattern;
    use crate::words::{Mode, Override};

    fn policy(table: &str, role: &str) -> Policy {
        Policy {
            name: format!("{table}/{role}"),
            tables: vec![Pattern::parse(table).unwrap()],
            roles: vec![role.into()],
            application: None,
            client: None,
            schedule: None,
            operations: Operation::Update.bit(),
            max_rows: Some(1),
            max_rows_per_transaction: None,
            rate: None,
            max_fraction: None,
            require_transaction: None,
            require_where: None,
            mode: Mode::Enforce,
            override_: Override::Token,
            approvers: None,
            min_approvals: 1,
            comment: None,
            undo: None,
            samples: true,
            always: false,
            columns: None,
            same_rows: true,
        }
    }

    fn target() -> Target {
        Target {
            name: RelationName::new("public", "leaf"),
            ancestors: vec![(RelationName::new("public", "mid"), 1), (RelationName::new("public", "root"), 2)],
        }
    }

    fn actor() -> Actor {
        let one = |name: &str| core::iter::once(name.to_owned()).collect();
        Actor { itself: one("app"), member_of: one("team") }
    }

    fn of_update(policies: &[Policy], places: &[usize]) -> Vec<Candidate> {
        candidates(policies, &fitting(policies, places, &target(), &actor()), Operation::Update)
    }

    fn applying(policies: &[Policy]) -> Vec<String> {
        of_update(policies, &Index::new(policies).naming(&target()))
            .iter()
            .filter(|candidate| !candidate.applying.is_empty())
            .map(|candidate| policies[candidate.policy].name.clone())
            .collect()
    }

    #[test]
    fn the_more_specific_sets_the_other_aside() {
        for pair in [
            ["public.leaf/public", "public.mid/public"],
            ["public.mid/public", "public.root/public"],
            ["public.root/public", "public.*/public"],
            ["public.*/public", "*.*/public"],
            ["*.*/app", "*.*/team"],
            ["*.*/team", "*.*/public"],
            ["public.leaf/app", "*.*/public"],
        ] {
            let policies = pair.map(|text| {
                let (table, role) = text.split_once('/').unwrap();
                policy(table, role)
            });
            assert_eq!(applying(&policies), [pair[0]], "{pair:?}");
        }
    }

    #[test]
    fn more_specific_on_one_and_less_on_the_other_apply_together() {
        let policies = [policy("public.leaf", "public"), policy("*.*", "app")];
        assert_eq!(applying(&policies).len(), 2);
    }

    #[test]
    fn ties_apply_together() {
        assert_eq!(applying(&[policy("*.*", "public"), policy("*.leaf", "public")]).len(), 2);
    }

    #[test]
    fn another_operation_sets_nothing_aside() {
        let mut exact = policy("public.leaf", "app");
        exact.operations = Operation::Delete.bit();
        assert_eq!(applying(&[exact, policy("*.*", "public")]), ["*.*/public"]);
    }

    #[test]
    fn strangers_are_not_covered() {
        assert!(applying(&[policy("public.leaf", "stranger"), policy("public.other", "public")]).is_empty());
    }

    proptest! {
        /// Where anything covers the table, something applies: policies never set each other aside in a circle.
        #[test]
        fn something_always_applies(picks in proptest::collection::vec((0usize..8, 0usize..4), 1..8)) {
            let tables =
                ["public.leaf", "public.mid", "public.root", "public.*", "*.*", "*.leaf", "other.*", "public.*f"];
            let roles = ["public", "team", "app", "stranger"];
            let policies: Vec<Policy> = picks.iter().map(|(table, role)| policy(tables[*table], roles[*role])).collect();
            let places = Index::new(&policies).naming(&target());
            let found = of_update(&policies, &places);
            let all: Vec<usize> = (0..policies.len()).collect();
            prop_assert_eq!(&found, &of_update(&policies, &all));
            prop_assert!(found.is_empty() || found.iter().any(|candidate| !candidate.applying.is_empty()));
            for (_, by) in found.iter().flat_map(Candidate::set_aside) {
                prop_assert!(found.iter().any(|other| other.policy == by));
            }
        }
    }
}

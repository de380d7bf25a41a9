//! Which of several policies apply to one table, one acting role and one operation.
//!
//! A policy is set aside only by another that is more specific on table or on role and no less specific on the other;
//! all that remain apply together. Pure: names and memberships come in, the answer goes out.

use std::collections::{BTreeSet, HashMap};
use std::rc::Rc;

use rustc_hash::FxHashSet;

use super::model::Policy;
use super::pattern::Fit;
use crate::words::{Operation, RelationName};

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
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
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

/// What became of a policy that covers the table, the role and the operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Candidate {
    /// Its place among the policies given.
    pub policy: usize,
    /// The place of a policy that sets it aside; none: it applies.
    pub set_aside_by: Option<usize>,
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

/// Those of them that cover the operation, each with the one that sets it aside, if any.
pub fn candidates(policies: &[impl AsPolicy], fitting: &[Fitting], operation: Operation) -> Vec<Candidate> {
    let covers = |(place, ..): &&Fitting| policies[*place].as_policy().operations & operation.bit() != 0;
    let covering: Vec<Fitting> = fitting.iter().filter(covers).copied().collect();
    // However many policies there are, they differ in a handful of ways in how closely they fit. Clients choose their
    // application's name, so a policy that depends on it sets nothing aside.
    let mut kinds: Vec<Fitting> = Vec::new();
    for kind in covering.iter().filter(|(place, ..)| policies[*place].as_policy().application.is_none()) {
        if !kinds.iter().any(|(_, table, role)| (*table, *role) == (kind.1, kind.2)) {
            kinds.push(*kind);
        }
    }
    covering
        .iter()
        .map(|(policy, table, role)| Candidate {
            policy: *policy,
            set_aside_by: kinds
                .iter()
                .filter(|(_, by_table, by_role)| {
                    (by_table > table && by_role >= role) || (by_role > role && by_table >= table)
                })
                .max_by_key(|(_, by_table, by_role)| (*by_table, *by_role))
                .map(|(index, ..)| *index),
        })
        .collect()
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
            require_transaction: false,
            require_where: false,
            mode: Mode::Enforce,
            override_: Override::Token,
            approvers: None,
            min_approvals: 1,
            comment: None,
            undo: None,
            samples: true,
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
            .filter(|candidate| candidate.set_aside_by.is_none())
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
            prop_assert!(found.is_empty() || found.iter().any(|candidate| candidate.set_aside_by.is_none()));
            for candidate in &found {
                if let Some(by) = candidate.set_aside_by {
                    prop_assert!(found.iter().any(|other| other.policy == by));
                }
            }
        }
    }
}

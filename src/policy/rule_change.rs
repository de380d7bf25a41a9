//! What changes for whoever upgrades from a version in which a policy set others aside as a whole: since 0.3.0 that is
//! decided limit by limit.

use std::collections::BTreeMap;

use pgrx::{PgLogLevel, pg_sys};
use rules::policy::limit::Limits;
use rules::policy::resolve::{self, Fitting, Target};
use rules::words::{Operation, RelationName, literal};

use super::relation::{coverable_tables, relation_of, role_oid};
use super::table::{self, Place, Policies};
use super::{catalog, target};
use crate::pg::ereport::{Failure, tell};
use crate::pg::function::{Arguments, Returns, sql_function};

sql_function!(
    /// `warn_of_policies()`: a WARNING for each policy of which more applies now than before the upgrade.
    writeguard_warn_of_policies, pg_finfo_writeguard_warn_of_policies, warn_of_policies, not_preloaded_too
);

/// Policies that are told one by one.
const MOST_TOLD: usize = 50;

/// A policy, and another one that is set aside by it no longer as a whole: by their places.
type Pair = (usize, usize);

/// Where that is seen first, which limits apply there, and on how many tables.
struct Seen {
    table: RelationName,
    limits: Limits,
    tables: usize,
}

fn warn_of_policies(_arguments: &Arguments) -> Returns {
    let Place::Table(oid) = table::find() else { return Ok(None) };
    let Some(policies) = Policies::read(oid, None)? else { return Ok(None) };
    let mut seen: BTreeMap<Pair, Seen> = BTreeMap::new();
    for name in coverable_tables() {
        pgrx::check_for_interrupts!();
        let Some(target) = relation_of(&name).and_then(target::find) else { continue };
        for (pair, limits) in newly_applying(&policies, &target) {
            let first = || Seen { table: name.clone(), limits: Limits::default(), tables: 0 };
            let seen = seen.entry(pair).or_insert_with(first);
            seen.limits = seen.limits.iter().chain(limits.iter()).collect();
            seen.tables += 1;
        }
    }
    tell_all(&policies, &seen)?;
    Ok(None)
}

/// For one table: the policies of which something applies that another one set aside, for any role that it names.
fn newly_applying(policies: &Policies, target: &Target) -> BTreeMap<Pair, Limits> {
    let places = policies.naming(target);
    let mut found: BTreeMap<Pair, Limits> = BTreeMap::new();
    let roles = places.iter().flat_map(|place| &policies.loaded[*place].policy.roles);
    let roles: std::collections::BTreeSet<&String> = roles.collect();
    for role in roles {
        let oids: Vec<pg_sys::Oid> = role_oid(role).into_iter().collect();
        let actor = catalog::memberships(&oids, policies);
        let fitting = resolve::fitting(&policies.loaded, &places, target, &actor);
        for operation in Operation::ALL {
            for candidate in resolve::candidates(&policies.loaded, &fitting, operation) {
                let Some(closer) =
                    fitting.iter().find(|one| set_aside_before(policies, one, &candidate, &fitting, operation))
                else {
                    continue;
                };
                // That nothing is required refuses nothing.
                let policy = &policies.loaded[candidate.policy].policy;
                let refusing: Limits = candidate.applying.iter().filter(|limit| policy.asks(*limit)).collect();
                if !refusing.is_empty() {
                    let limits = found.entry((closer.0, candidate.policy)).or_default();
                    *limits = limits.iter().chain(refusing.iter()).collect();
                }
            }
        }
    }
    found
}

/// Whether a policy set the candidate aside, all of it, by the rule that was.
fn set_aside_before(
    policies: &Policies,
    by: &Fitting,
    candidate: &resolve::Candidate,
    fitting: &[Fitting],
    operation: Operation,
) -> bool {
    let policy = &policies.loaded[by.0].policy;
    let takes_part = policy.operations & operation.bit() != 0 && policy.application.is_none();
    let mut own = fitting.iter().filter(|one| one.0 == candidate.policy);
    takes_part && own.any(|own| resolve::is_closer(by, own))
}

fn tell_all(policies: &Policies, seen: &BTreeMap<Pair, Seen>) -> Result<(), Failure> {
    let name = |place: usize| &policies.loaded[place].policy.name;
    for ((by, aside), Seen { table, limits, tables }) in seen.iter().take(MOST_TOLD) {
        let columns: Vec<&str> = limits.iter().map(|limit| limit.column()).collect();
        let others = match tables - 1 {
            0 => String::new(),
            others => format!(" and {others} more"),
        };
        tell(
            PgLogLevel::WARNING,
            &format!(
                "policy \"{}\" now applies to table \"{table}\"{others} beside policy \"{}\": {}",
                name(*aside),
                name(*by),
                columns.join(", ")
            ),
            Some(
                "Until this version the more specific policy set it aside as a whole; now it does so only for the limits that it states itself.",
            ),
            Some(&format!("SELECT * FROM writeguard.effective({});", literal(&table.to_sql()))),
        )?;
    }
    if seen.len() > MOST_TOLD {
        let rest = seen.len() - MOST_TOLD;
        tell(PgLogLevel::WARNING, &format!("{rest} more pairs of policies apply together now"), None, None)?;
    }
    Ok(())
}

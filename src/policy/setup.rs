//! What only the library knows of its own setup, for `check_setup`: whether it was preloaded, what waits in the queue,
//! and which policies cannot be read or name no table. Works without the preload, and on a standby.

use pgrx::datum::JsonB;
use serde_json::{Value, json};

use super::pattern::Pattern;
use super::relation::{coverable_tables, never_covered, relation_of};
use super::table::{self, Place, Policies};
use crate::event::{memory, queue};
use crate::function::{Arguments, Returns, sql_function, value};
use crate::raise::Failure;
use crate::words::RelationName;

sql_function!(
    /// `setup_facts() → jsonb`: the first row of `check_setup`'s query.
    writeguard_setup_facts, pg_finfo_writeguard_setup_facts, setup_facts, not_preloaded_too
);

fn setup_facts(_arguments: &Arguments) -> Returns {
    let [_, _, late, in_log_only] = queue::counters();
    value(JsonB(json!({
        "preloaded": memory::is_there(),
        "library": env!("CARGO_PKG_VERSION"),
        "late": late,
        "in_log_only": in_log_only,
        "waiting_since": queue::waiting_since(),
        "policies": defects()?,
    })))
}

/// Policies that do not do what they say: policy, defect (`unreadable`, `broken`, `table`, `pattern`), the element of
/// `tables` that it is about, and the reason.
fn defects() -> Result<Vec<Value>, Failure> {
    let unreadable = |reason: String| vec![json!({"defect": "unreadable", "reason": reason})];
    let policies = match table::find() {
        Place::NotInstalled => return Ok(Vec::new()),
        Place::Missing => None,
        Place::Table(oid) => Policies::read(oid, None)?,
    };
    let Some(policies) = policies else {
        return Ok(unreadable("table writeguard.policy is not there".into()));
    };
    if let Some(reason) = policies.unreadable {
        return Ok(unreadable(reason));
    }
    let mut found: Vec<Value> = policies
        .broken
        .iter()
        .map(|broken| json!({"policy": broken.name, "defect": "broken", "reason": broken.reason}))
        .collect();
    let all_exact =
        policies.loaded.iter().flat_map(|loaded| &loaded.policy.tables).all(|pattern| pattern.exact().is_some());
    let tables = if all_exact { Vec::new() } else { coverable_tables() };
    for policy in policies.loaded.iter().map(|loaded| &loaded.policy) {
        pgrx::check_for_interrupts!();
        for pattern in &policy.tables {
            if let Some((defect, reason)) = defect(pattern, &tables) {
                found.push(json!({
                    "policy": policy.name, "defect": defect, "element": pattern.to_string(), "reason": reason,
                }));
            }
        }
    }
    Ok(found)
}

/// Why an element of `tables` covers nothing, if so.
fn defect(pattern: &Pattern, tables: &[RelationName]) -> Option<(&'static str, &'static str)> {
    match pattern.exact() {
        Some(name) => match relation_of(&name) {
            None => Some(("table", "does not exist")),
            Some(relation) => never_covered(relation).map(|reason| ("table", reason)),
        },
        None => {
            let matches = tables.iter().any(|table| pattern.fit(table, &[]).is_some());
            (!matches).then_some(("pattern", "matches nothing"))
        }
    }
}

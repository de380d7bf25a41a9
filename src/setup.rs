//! What only the library knows of its own setup, for `check_setup`: whether it was preloaded, what waits in the queue,
//! and which policies cannot be read or name no table. Works without the preload, and on a standby.

use std::collections::BTreeSet;

use pgrx::{Spi, pg_sys};
use rules::policy::model::Policy;
use rules::policy::pattern::Pattern;
use rules::words::RelationName;
use rustc_hash::FxHashMap;
use serde_json::{Value, json};

use crate::event::record::in_utc;
use crate::event::{outbox, queue, serve};
use crate::pg::ereport::Failure;
use crate::pg::function::{Arguments, Returns, jsonb, sql_function};
use crate::pg::{owner, preload};
use crate::policy::key::never_undone;
use crate::policy::relation::{coverable_tables, never_covered, relation_name, relation_of, with_descendants};
use crate::policy::table::{self, Place, Policies};
use crate::stat;

sql_function!(
    /// `_setup_facts() → jsonb`: the first row of `check_setup`'s query.
    writeguard_setup_facts, pg_finfo_writeguard_setup_facts, setup_facts, not_preloaded_too
);

fn setup_facts(_arguments: &Arguments) -> Returns {
    let counters = queue::counters();
    let statistics = stat::memory::slots();
    Ok(jsonb(
        &json!({
            "preloaded": preload::is_attached(),
            "unattached": preload::was() && !preload::is_attached(),
            "library": env!("CARGO_PKG_VERSION"),
            "configured": configured()?,
            "late": counters.late,
            "in_log_only": counters.in_log_only,
            "set_aside": counters.set_aside,
            "starved": counters.starved,
            "kept_worker": serve::has_kept(),
            "unsent_since": outbox::unsent_since().map(in_utc),
            "waiting_since": queue::waiting_since(),
            "policies": defects()?,
            // What 0.2.0 asks for: a policy that looks on sets none aside any more that refuses.
            "looking_on": [],
            "stat_evicted": statistics.evicted,
            "stat_behind": statistics.stored_at.map(seconds_since),
        })
        .to_string(),
    ))
}

/// `shared_preload_libraries` as the server's files have it now, empty where they have none; `None` where the owner of
/// `check_setup` may not read them.
fn configured() -> Result<Option<String>, Failure> {
    // With an error where it waits for a restart.
    const LAST: &str = "SELECT setting FROM pg_catalog.pg_file_settings
        WHERE lower(name) = 'shared_preload_libraries' ORDER BY seqno DESC LIMIT 1";
    // SAFETY: a look into the catalog.
    if !unsafe { pg_sys::superuser() } {
        return Ok(None);
    }
    let last = Spi::connect_mut(|client| owner::rows(client, LAST, &[]))?;
    Ok(Some(last.into_iter().next().unwrap_or_default()))
}

/// Seconds since a point in time.
fn seconds_since(at: pgrx::pg_sys::TimestampTz) -> i64 {
    // SAFETY: reads the clock.
    (unsafe { pgrx::pg_sys::GetCurrentTimestamp() } - at) / 1_000_000
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
    if let Some(reason) = &policies.unreadable {
        return Ok(unreadable(reason.clone()));
    }
    let mut found: Vec<Value> = policies
        .broken
        .iter()
        .map(|broken| json!({"policy": broken.name, "defect": "broken", "reason": broken.reason}))
        .collect();
    let all_exact =
        policies.loaded.iter().flat_map(|loaded| &loaded.policy.tables).all(|pattern| pattern.exact().is_some());
    let tables = if all_exact { Vec::new() } else { coverable_tables() };
    let mut in_schema: FxHashMap<&str, Vec<&RelationName>> = FxHashMap::default();
    for table in &tables {
        in_schema.entry(&table.schema).or_default().push(table);
    }
    // Many policies name the same tables.
    let mut known: FxHashMap<&Pattern, Option<(&str, &str)>> = FxHashMap::default();
    for policy in policies.loaded.iter().map(|loaded| &loaded.policy) {
        for pattern in &policy.tables {
            pgrx::check_for_interrupts!();
            let found_one = *known.entry(pattern).or_insert_with(|| defect(pattern, &tables, &in_schema));
            if let Some((defect, reason)) = found_one {
                found.push(json!({
                    "policy": policy.name, "defect": defect, "element": pattern.to_string(), "reason": reason,
                }));
            }
        }
        if policy.undo.is_some() {
            found.extend(not_undone(policy, &tables));
        }
    }
    Ok(found)
}

/// The tables of a policy with `undo` whose rows could not be put back. Of partitions, the tree as a whole.
fn not_undone(policy: &Policy, tables: &[RelationName]) -> Vec<Value> {
    let exact = policy.tables.iter().filter_map(Pattern::exact).filter_map(|name| relation_of(&name));
    let below = exact.flat_map(with_descendants).filter_map(relation_name);
    let matched = tables.iter().filter(|table| {
        pgrx::check_for_interrupts!();
        policy.tables.iter().any(|pattern| pattern.fit(table, &[]).is_some())
    });
    let names: BTreeSet<RelationName> = below.chain(matched.cloned()).collect();
    let reason = |name: &RelationName| {
        let relation = relation_of(name)?;
        // SAFETY: a syscache look-up.
        let is_partition = unsafe { pg_sys::get_rel_relispartition(relation) };
        if is_partition || never_covered(relation).is_some() { None } else { never_undone(relation) }
    };
    let defect = |name: RelationName| {
        let reason = reason(&name)?;
        Some(json!({"policy": policy.name, "defect": "undo", "element": name.to_sql(), "reason": reason}))
    };
    names.into_iter().filter_map(defect).collect()
}

/// Why an element of `tables` covers nothing, if so.
fn defect(
    pattern: &Pattern,
    tables: &[RelationName],
    in_schema: &FxHashMap<&str, Vec<&RelationName>>,
) -> Option<(&'static str, &'static str)> {
    match pattern.exact() {
        Some(name) => match relation_of(&name) {
            None => Some(("table", "does not exist")),
            Some(relation) => never_covered(relation).map(|reason| ("table", reason)),
        },
        None => {
            let fits = |table: &RelationName| pattern.fit(table, &[]).is_some();
            let matches = match pattern.schema() {
                Some(schema) => in_schema.get(schema).into_iter().flatten().any(|table| fits(table)),
                None => tables.iter().any(fits),
            };
            (!matches).then_some(("pattern", "matches nothing"))
        }
    }
}

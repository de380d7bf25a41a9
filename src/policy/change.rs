//! Policies into their table, as one statement each for comparing and for writing, and with an event for each that is another
//! one now. What `set_policy`, `alter_policy` and `import_policies` have in common.

use std::collections::HashMap;

use pgrx::spi::SpiClient;
use rules::error::Error;
use rules::policy::document::{self, Given};
use rules::policy::model;
use serde::Deserialize;
use serde_json::Value;

use super::schema_compat;
use crate::event::record::{Event, Kind as EventKind};
use crate::event::store;
use crate::pg::owner;

/// Two imports at a time would each compare with what the other one is about to change.
pub const LOCK: &str = "LOCK TABLE writeguard.policy IN SHARE ROW EXCLUSIVE MODE";

/// What a document would do: $1 the policies, $2 one with all defaults, $3 whether others are dropped.
const COMPARE: &str = "WITH given AS MATERIALIZED ( \
       SELECT n.name, pg_catalog.to_jsonb(n) AS columns \
       FROM pg_catalog.jsonb_populate_recordset(NULL::writeguard.policy, $1::pg_catalog.jsonb) AS n), \
     stored AS MATERIALIZED (SELECT p.name, pg_catalog.to_jsonb(p) AS columns FROM writeguard.policy AS p \
       WHERE $3 OR p.name OPERATOR(pg_catalog.=) ANY (SELECT g.name FROM given AS g)), \
     defaults AS (SELECT pg_catalog.to_jsonb(n) AS columns \
       FROM pg_catalog.jsonb_populate_record(NULL::writeguard.policy, $2::pg_catalog.jsonb) AS n), \
     compared AS (SELECT COALESCE(g.name, s.name) AS name, g.columns AS given, s.columns AS stored, \
         CASE WHEN s.name IS NULL THEN 'created' WHEN g.name IS NULL THEN 'dropped' \
              WHEN g.columns OPERATOR(pg_catalog.=) s.columns THEN 'unchanged' ELSE 'changed' END AS action \
       FROM given AS g FULL JOIN stored AS s ON s.name OPERATOR(pg_catalog.=) g.name \
       WHERE g.name IS NOT NULL OR $3) \
     SELECT pg_catalog.jsonb_build_object('name', c.name, 'action', c.action, 'difference', \
       CASE WHEN c.action OPERATOR(pg_catalog.<>) 'unchanged' THEN ( \
         SELECT pg_catalog.jsonb_object_agg(now.key, \
           CASE c.action WHEN 'created' THEN pg_catalog.jsonb_build_object('to', next.value) \
                         WHEN 'dropped' THEN pg_catalog.jsonb_build_object('from', now.value) \
                         ELSE pg_catalog.jsonb_build_object('from', now.value, 'to', next.value) END) \
         FROM pg_catalog.jsonb_each(COALESCE(c.stored, d.columns)) AS now \
         JOIN pg_catalog.jsonb_each(COALESCE(c.given, d.columns)) AS next ON next.key OPERATOR(pg_catalog.=) now.key \
         WHERE now.key OPERATOR(pg_catalog.<>) 'name' AND now.value OPERATOR(pg_catalog.<>) next.value) END \
       )::pg_catalog.text \
     FROM compared AS c CROSS JOIN defaults AS d ORDER BY c.name COLLATE pg_catalog.\"C\"";

fn write_all() -> String {
    format!(
        "INSERT INTO writeguard.policy \
         SELECT n.* FROM pg_catalog.jsonb_populate_recordset(NULL::writeguard.policy, $1::pg_catalog.jsonb) AS n \
         ON CONFLICT (name) DO UPDATE SET {}",
        schema_compat::assignments()
    )
}

const DROP: &str = "DELETE FROM writeguard.policy AS p \
     USING pg_catalog.jsonb_array_elements_text($1::pg_catalog.jsonb) AS gone (name) \
     WHERE p.name OPERATOR(pg_catalog.=) gone.name";

/// What becomes of one policy.
#[derive(Debug, Deserialize)]
pub struct Outcome {
    pub name: String,
    pub action: String,
    /// Per changed column what it was and what it will be.
    pub difference: Option<Value>,
}

/// What becomes of each policy, by name.
///
/// # Errors
/// WG008 where the extension's tables are not as the library knows them.
pub fn compare(
    client: &mut SpiClient<'_>,
    policies: &HashMap<String, String>,
    prune: bool,
) -> Result<Vec<Outcome>, Error> {
    let given = array(policies.values());
    let defaults = serde_json::to_string(&defaults()?).unwrap_or_default();
    let rows = owner::rows(client, COMPARE, &[owner::json(&given), owner::json(&defaults), prune.into()])?;
    rows.iter()
        .map(|row| {
            serde_json::from_str(row).map_err(|error| Error::Undecided {
                reason: format!("own statement gave something else: {error}"),
                hint: "ALTER EXTENSION pg_writeguard UPDATE;".into(),
                relation: None,
            })
        })
        .collect()
}

/// Writes what [`compare`] found to be new, and drops what it found to go.
///
/// # Errors
/// What the writes raise.
pub fn write(
    client: &mut SpiClient<'_>,
    policies: &HashMap<String, String>,
    outcomes: &[Outcome],
) -> Result<(), Error> {
    let of = |action: fn(&str) -> bool| outcomes.iter().filter(move |outcome| action(&outcome.action));
    let new: Vec<&String> = of(|action| matches!(action, "created" | "changed"))
        .filter_map(|outcome| policies.get(&outcome.name))
        .collect();
    let gone: Vec<&str> = of(|action| action == "dropped").map(|outcome| outcome.name.as_str()).collect();
    if !new.is_empty() {
        owner::rows(client, &write_all(), &[owner::json(&array(new))])?;
    }
    if !gone.is_empty() {
        owner::rows(client, DROP, &[owner::json(&Value::from(gone).to_string())])?;
    }
    Ok(())
}

/// A policy of which nothing was said but a name.
fn defaults() -> Result<model::Document, Error> {
    let mut nothing_given = Given::new();
    nothing_given.insert("name".into(), "p".into());
    let mut defaults = document::with_defaults(nothing_given)?;
    schema_compat::fill(&mut defaults);
    Ok(defaults)
}

const LOCK_ONE: &str = "SELECT name FROM writeguard.policy WHERE name OPERATOR(pg_catalog.=) $1 FOR UPDATE";

/// Waits for whoever is changing the policy of that name. What is read of it from then on is what will be replaced.
///
/// # Errors
/// What the lock raises.
pub fn lock_one(name: &str) -> Result<(), Error> {
    owner::connect(|client| owner::rows(client, LOCK_ONE, &[name.into()])).map(drop)
}

/// Stores one policy, given as JSON of all its columns, and says what became of it.
///
/// # Errors
/// Where it cannot be stored, or its event.
pub fn store_one(name: String, json: String) -> Result<Outcome, Error> {
    let policies = HashMap::from([(name, json)]);
    let outcomes = owner::connect(|client| {
        let outcomes = compare(client, &policies, false)?;
        write(client, &policies, &outcomes)?;
        Ok(outcomes)
    })?;
    record(&outcomes)?;
    outcomes.into_iter().next().ok_or_else(|| Error::Undecided {
        reason: "own statement gave nothing".into(),
        hint: "ALTER EXTENSION pg_writeguard UPDATE;".into(),
        relation: None,
    })
}

impl Outcome {
    /// The columns that went back to their defaults, by name, with the values that they had.
    pub fn reset(&self) -> Vec<(&str, &Value)> {
        let defaults = defaults().ok().and_then(|defaults| serde_json::to_value(defaults).ok()).unwrap_or_default();
        let columns = self.difference.as_ref().and_then(Value::as_object).into_iter().flatten();
        columns
            .filter(|(name, values)| self.action == "changed" && values.get("to") == defaults.get(name.as_str()))
            .filter_map(|(name, values)| Some((name.as_str(), values.get("from")?)))
            .collect()
    }
}

/// A JSON array.
fn array<'a>(elements: impl IntoIterator<Item = &'a String>) -> String {
    let elements: Vec<&str> = elements.into_iter().map(String::as_str).collect();
    format!("[{}]", elements.join(","))
}

/// One event for each policy that is another one now, with what each of its columns was and is.
///
/// # Errors
/// Where the events cannot be stored.
pub fn record(outcomes: &[Outcome]) -> Result<(), Error> {
    let template = Event::new(EventKind::PolicyChanged);
    let events: Vec<Event> = outcomes
        .iter()
        .filter(|outcome| outcome.action != "unchanged")
        .map(|outcome| {
            let mut event = template.clone();
            event.policy = Some(outcome.name.clone());
            event.reason = Some(match &outcome.difference {
                Some(difference) => format!("{}: {difference}", outcome.action),
                None => outcome.action.clone(),
            });
            event
        })
        .collect();
    store::insert_all(&events)
}

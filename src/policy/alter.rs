//! `alter_policy`: changes some columns of a policy and leaves all others as they are.

use rules::error::Error;
use rules::policy::document::{self, Given, Key};
use serde_json::Value;

use super::change;
use super::consequences::Before;
use super::import::{checked, json_argument};
use crate::pg::ereport::Failure;
use crate::pg::function::{Arguments, Returns, sql_function, value};
use crate::pg::owner;

sql_function!(
    /// `alter_policy(name text, changes jsonb) → text`: `changed` or `unchanged`. Runs with settings (see its declaration)
    /// under which values print the same everywhere.
    writeguard_alter_policy, pg_finfo_writeguard_alter_policy, alter_policy
);

const EXAMPLE: &str = r#"SELECT writeguard.alter_policy('orders-guard', '{"max_rows": 200}');"#;

/// As a document has it: what is NULL is left out.
const STORED: &str = "SELECT pg_catalog.jsonb_strip_nulls(pg_catalog.to_jsonb(p))::pg_catalog.text \
     FROM writeguard.policy AS p WHERE p.name OPERATOR(pg_catalog.=) $1";

fn alter_policy(arguments: &Arguments) -> Returns {
    let name = arguments.text(0, "name")?;
    let changes = match json_argument(arguments, 1, "changes", EXAMPLE)? {
        Value::Object(changes) => changes,
        _ => return Err(Error::invalid("changes must be an object of columns and their values", EXAMPLE).into()),
    };
    change::lock_one(&name)?;
    let stored = owner::connect(|client| owner::rows(client, STORED, &[name.as_str().into()]))?;
    let stored = stored.first().and_then(|json| serde_json::from_str::<Given>(json).ok()).ok_or_else(|| {
        Error::invalid(format!("policy \"{name}\" does not exist"), "SELECT name FROM writeguard.policy ORDER BY name;")
    })?;
    let (name, json) = checked(altered(stored, &name, changes)?, 1)?;
    let before = Before::now()?;
    let outcome = change::store_one(name, json)?;
    before.tell_change_of(&[&outcome.name])?;
    value(outcome.action)
}

/// The policy with the changes made; a column that is set to null goes back to its default.
fn altered(mut policy: Given, name: &str, changes: Given) -> Result<Given, Failure> {
    if changes.get("name").is_some_and(|new| *new != name) {
        let hint =
            format!("SELECT * FROM writeguard.export_policies(); (and a policy of another name, then drop \"{name}\")");
        return Err(Error::invalid("the name of a policy stays as it is", hint).into());
    }
    for (key, value) in changes {
        if value.is_null() && Key::of(&key).is_some() {
            policy.remove(&key);
        } else {
            policy.insert(key, value);
        }
    }
    let mut read = document::read(Value::Object(policy))?;
    read.pop().ok_or_else(|| Error::invalid("changes must not take the name away", EXAMPLE).into())
}

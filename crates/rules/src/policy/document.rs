//! A document of policies, as `import_policies` takes it and people keep it in git: an array of objects whose keys are
//! the columns of `writeguard.policy`. One object alone is a document of one policy.
//!
//! Pure and strict: what is misspelt or of another type is refused with the policy and the key, never ignored, for a
//! limit that nobody reads does not limit.

use std::collections::HashSet;

use serde_json::{Map, Value};

use super::bounds::MOST_POLICIES;
use super::model::{DEFAULT_RATE_INTERVAL, Document};
use crate::error::Error;
use crate::words::shortened;

/// One policy of a document: the keys that were given, each of the right type.
pub type Given = Map<String, Value>;

/// What a key's value has to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Text,
    Texts,
    /// A bigint.
    Rows,
    /// An integer.
    Count,
    Number,
    Flag,
    Network,
    Interval,
}

/// A key: its column, what its value has to be, whether that may be null, and an example.
#[derive(Debug)]
pub struct Key {
    pub name: &'static str,
    pub kind: Kind,
    nullable: bool,
    example: &'static str,
}

const fn key(name: &'static str, kind: Kind, nullable: bool, example: &'static str) -> Key {
    Key { name, kind, nullable, example }
}

/// All keys, in the order of the table's columns.
pub const KEYS: [Key; 24] = [
    key("name", Kind::Text, false, r#""orders-guard""#),
    key("tables", Kind::Texts, false, r#"["public.orders"]"#),
    key("roles", Kind::Texts, false, r#"["public"]"#),
    key("application", Kind::Text, true, r#""psql%""#),
    key("client", Kind::Network, true, r#""10.0.0.0/8""#),
    key("schedule", Kind::Text, true, r#""Mon-Fri 18:00-08:00 Europe/Berlin""#),
    key("operations", Kind::Texts, false, r#"["update", "delete", "truncate"]"#),
    key("max_rows", Kind::Rows, true, "100"),
    key("max_rows_per_transaction", Kind::Rows, true, "1000"),
    key("rate_rows", Kind::Rows, true, "10000"),
    key("rate_interval", Kind::Interval, false, r#""1 hour""#),
    key("max_fraction", Kind::Number, true, "0.1"),
    key("require_where", Kind::Flag, true, "true"),
    key("require_transaction", Kind::Flag, true, "true"),
    key("mode", Kind::Text, false, r#""enforce""#),
    key("override", Kind::Text, false, r#""token""#),
    key("approvers", Kind::Text, true, r#""dba""#),
    key("min_approvals", Kind::Count, false, "1"),
    key("undo", Kind::Interval, true, r#""7 days""#),
    key("comment", Kind::Text, true, r#""why there is this policy""#),
    key("samples", Kind::Flag, false, "false"),
    key("always", Kind::Flag, false, "true"),
    key("columns", Kind::Texts, true, r#"["is_deleted"]"#),
    key("same_rows", Kind::Flag, false, "false"),
];

impl Key {
    /// The key of that name.
    pub fn of(name: &str) -> Option<&'static Key> {
        KEYS.iter().find(|key| key.name == name)
    }

    /// The key as it would be right.
    pub fn example(&self) -> String {
        format!("\"{}\": {}", self.name, self.example)
    }

    fn expected(&self) -> String {
        let kind = match self.kind {
            Kind::Text | Kind::Network | Kind::Interval => "a string",
            Kind::Texts => "an array of strings",
            Kind::Rows | Kind::Count => "a whole number",
            Kind::Number => "a number",
            Kind::Flag => "true or false",
        };
        if self.nullable { format!("{kind} or null") } else { kind.to_owned() }
    }

    fn takes(&self, value: &Value) -> bool {
        match self.kind {
            _ if value.is_null() => self.nullable,
            Kind::Text | Kind::Network | Kind::Interval => value.is_string(),
            // That no element may be null is said of arrays that come from SQL, too.
            Kind::Texts => value
                .as_array()
                .is_some_and(|elements| elements.iter().all(|element| element.is_string() || element.is_null())),
            Kind::Rows => value.is_i64(),
            Kind::Count => value.as_i64().is_some_and(|count| i32::try_from(count).is_ok()),
            Kind::Number => value.is_number(),
            Kind::Flag => value.is_boolean(),
        }
    }
}

/// A value as an error message shows it.
fn shown(value: &Value) -> String {
    const LONGEST: usize = 60;
    match value {
        Value::Array(_) => "an array".into(),
        Value::Object(_) => "an object".into(),
        other => {
            let text = other.to_string();
            if text.chars().count() <= LONGEST { text } else { text.chars().take(LONGEST).collect::<String>() + "…" }
        }
    }
}

const EXAMPLE: &str = r#"[{"name": "orders-guard", "tables": ["public.orders"], "max_rows": 100}]"#;

/// Bytes that messages show of a name; no policy's is longer.
const LONGEST_SHOWN: usize = 255;

/// How messages call a policy: by its name, where it has one.
pub fn title(given: &Given, place: usize) -> String {
    match given.get("name") {
        Some(Value::String(name)) => format!("policy \"{}\"", shortened(name, LONGEST_SHOWN)),
        _ => format!("policy number {place}"),
    }
}

/// Reads a document.
///
/// # Errors
/// WG007 with the policy and the key: not an object, no name, a name twice, an unknown key, a value of another type.
pub fn read(document: Value) -> Result<Vec<Given>, Error> {
    let elements = match document {
        Value::Array(elements) => elements,
        policy @ Value::Object(_) => vec![policy],
        other => {
            let message = format!("the document must be an array of policies, but is {}", shown(&other));
            return Err(Error::invalid(message, EXAMPLE));
        }
    };
    if elements.len() > MOST_POLICIES {
        return Err(Error::Invalid {
            message: "the document has too many policies".into(),
            detail: Some(format!("It has {}, and {MOST_POLICIES} are the most that is taken.", elements.len())),
            hint: EXAMPLE.into(),
        });
    }
    let mut names = HashSet::new();
    let mut policies = Vec::with_capacity(elements.len());
    for (index, element) in elements.into_iter().enumerate() {
        let place = index + 1;
        let Value::Object(given) = element else {
            let message = format!("policy number {place} must be an object, but is {}", shown(&element));
            return Err(Error::invalid(message, EXAMPLE));
        };
        check_keys(&given, &title(&given, place))?;
        let Some(Value::String(name)) = given.get("name") else {
            return Err(Error::invalid(format!("policy number {place} has no key \"name\""), EXAMPLE));
        };
        if !names.insert(name.clone()) {
            return Err(Error::Invalid {
                message: format!("policy \"{}\" is in the document twice", shortened(name, LONGEST_SHOWN)),
                detail: Some(format!("The second one is policy number {place}.")),
                hint: "Leave one of them out, or give it another name.".into(),
            });
        }
        policies.push(given);
    }
    Ok(policies)
}

fn check_keys(given: &Given, title: &str) -> Result<(), Error> {
    for (name, value) in given {
        let Some(key) = Key::of(name) else {
            let nearest = nearest(name);
            let name: String = name.chars().take(LONGEST_KEY).collect();
            return Err(Error::Invalid {
                message: format!("{title} has the unknown key \"{name}\""),
                detail: Some(format!("The nearest known key is \"{}\".", nearest.name)),
                hint: nearest.example(),
            });
        };
        if !key.takes(value) {
            let (expected, shown) = (key.expected(), shown(value));
            return Err(Error::invalid(
                format!("{title}, key \"{name}\": must be {expected}, but is {shown}"),
                key.example(),
            ));
        }
    }
    Ok(())
}

/// No known key is nearly as long.
const LONGEST_KEY: usize = 60;

/// The known key that takes the fewest changed letters.
fn nearest(name: &str) -> &'static Key {
    let name: String = name.chars().take(LONGEST_KEY).collect::<String>().to_lowercase();
    let mut nearest = &KEYS[0];
    let mut fewest = usize::MAX;
    for key in &KEYS {
        let letters = strsim::osa_distance(&name, key.name);
        if letters < fewest {
            (nearest, fewest) = (key, letters);
        }
    }
    nearest
}

/// The policy with the defaults of what was not given.
///
/// # Errors
/// WG007; never, once [`read`] has passed it.
pub fn with_defaults(mut given: Given) -> Result<Document, Error> {
    given.entry("rate_interval").or_insert_with(|| DEFAULT_RATE_INTERVAL.into());
    serde_json::from_value(Value::Object(given))
        .map_err(|error| Error::invalid(format!("malformed policy: {error}"), EXAMPLE))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    #[test]
    fn the_keys_are_the_columns() {
        let document = with_defaults(json!({"name": "p"}).as_object().unwrap().clone()).unwrap();
        let columns = serde_json::to_value(document).unwrap();
        let columns: HashSet<&String> = columns.as_object().unwrap().keys().collect();
        assert_eq!(columns.len(), KEYS.len());
        assert!(KEYS.iter().all(|key| columns.contains(&key.name.to_owned())));
    }

    #[test]
    fn examples_are_right() {
        for key in &KEYS {
            let mut policy: Value = serde_json::from_str(&format!("{{{}}}", key.example())).unwrap();
            policy["name"] = "p".into();
            policy["operations"] = json!(["update"]);
            let policies = read(policy).unwrap();
            with_defaults(policies[0].clone()).unwrap();
        }
        read(serde_json::from_str(EXAMPLE).unwrap()).unwrap();
    }

    #[test]
    fn one_policy_is_a_document() {
        let one = json!({"name": "p", "max_rows": 5});
        assert_eq!(read(one.clone()).unwrap(), read(json!([one])).unwrap());
        assert_eq!(read(json!([])).unwrap(), Vec::<Given>::new());
    }

    #[test]
    fn mistakes_name_the_policy_and_the_key() {
        for (document, words) in [
            (json!(null), ["array of policies", "null"]),
            (json!(5), ["array of policies", "5"]),
            (json!([[]]), ["number 1", "an array"]),
            (json!([{"name": "p"}, "q"]), ["number 2", "\"q\""]),
            (json!([{}]), ["number 1", "\"name\""]),
            (json!([{"max_rows": 5}]), ["number 1", "\"name\""]),
            (json!([{"name": 5}]), ["number 1", "a string, but is 5"]),
            (json!([{"name": null}]), ["number 1", "a string, but is null"]),
            (json!([{"name": "p"}, {"name": "p"}]), ["\"p\"", "twice"]),
            (json!([{"name": "p", "max_row": 5}]), ["\"p\"", "\"max_row\""]),
            (json!([{"name": "p", "max_rows": "5"}]), ["\"p\"", "\"max_rows\": must be a whole number or null"]),
            (json!([{"name": "p", "max_rows": 5.5}]), ["\"p\"", "5.5"]),
            (json!([{"name": "p", "max_rows": 1e30}]), ["\"p\"", "\"max_rows\""]),
            (json!([{"name": "p", "min_approvals": 3_000_000_000_i64}]), ["\"p\"", "\"min_approvals\""]),
            (json!([{"name": "p", "tables": "public.t"}]), ["\"p\"", "an array of strings, but is \"public.t\""]),
            (json!([{"name": "p", "tables": [5]}]), ["\"p\"", "an array of strings, but is an array"]),
            (json!([{"name": "p", "roles": null}]), ["\"p\"", "\"roles\": must be an array of strings, but is null"]),
            (json!([{"name": "p", "require_where": "yes"}]), ["\"p\"", "true or false"]),
            (json!([{"name": "p", "undo": 7}]), ["\"p\"", "\"undo\": must be a string or null"]),
            (json!([{"name": "p", "max_fraction": true}]), ["\"p\"", "a number or null, but is true"]),
        ] {
            let error = read(document.clone()).unwrap_err();
            assert_eq!(error.sqlstate(), "WG007", "{document}");
            assert!(words.iter().all(|word| error.to_string().contains(word)), "{document}: {error}");
            assert!(error.hint().is_some(), "{document}");
        }
    }

    #[test]
    fn the_nearest_key_is_told() {
        for (typed, meant) in [
            ("max_row", "max_rows"),
            ("maxRows", "max_rows"),
            ("MAX_ROWS", "max_rows"),
            ("table", "tables"),
            ("max_rows_per_transcation", "max_rows_per_transaction"),
            ("require-where", "require_where"),
            ("ovveride", "override"),
            ("rate_intervall", "rate_interval"),
        ] {
            let error = read(json!([{"name": "p", typed: 5}])).unwrap_err();
            assert_eq!(error.detail().unwrap(), format!("The nearest known key is \"{meant}\"."), "{typed}");
            assert!(error.hint().unwrap().starts_with(&format!("\"{meant}\": ")), "{typed}");
        }
    }

    proptest! {
        #[test]
        fn reading_never_panics(name in ".{0,8}", key in ".{0,80}", value in ".{0,80}") {
            let _ = read(json!([{"name": name, key: value}]));
        }

        #[test]
        fn what_was_read_has_all_columns(rows in any::<i64>(), tables in proptest::collection::vec(".{0,8}", 0..3)) {
            let policies = read(json!([{"name": "p", "max_rows": rows, "tables": tables.clone()}])).unwrap();
            let document = with_defaults(policies[0].clone()).unwrap();
            prop_assert_eq!(document.max_rows, Some(rows));
            prop_assert_eq!(document.tables.into_iter().flatten().collect::<Vec<_>>(), tables);
        }
    }
}

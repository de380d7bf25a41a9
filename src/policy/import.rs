//! `import_policies`: a whole document into the policy table, or nothing of it.
//!
//! Each policy is checked as `set_policy` checks it, then compared and written in one statement each, so that ten
//! thousand take seconds and every session reads its policies once more, not ten thousand times.

use core::ffi::c_char;
use core::ptr;
use std::collections::HashMap;

use pgrx::{direct_function_call, pg_sys};
use rules::error::Error;
use rules::policy::document::{self, Given, KEYS, Key, Kind};
use serde_json::Value;

use super::api;
use super::change::{LOCK, compare, record, write};
use super::consequences::Before;
use crate::pg::encoding::{self, from_server};
use crate::pg::ereport::Failure;
use crate::pg::function::{Arguments, Returns, jsonb, sql_function, text};
use crate::pg::{ffi, owner};

sql_function!(
    /// `import_policies(document jsonb, prune boolean, dry_run boolean)`: a row for each policy: name, action,
    /// difference. Runs with settings (see its declaration) under which values print the same everywhere.
    writeguard_import_policies, pg_finfo_writeguard_import_policies, import_policies
);

fn import_policies(arguments: &Arguments) -> Returns {
    let flag = |index, name: &str| {
        arguments
            .get::<bool>(index)
            .ok_or_else(|| Error::invalid(format!("{name} must not be NULL"), format!("{name} => true")))
    };
    let (prune, dry_run) = (flag(1, "prune")?, flag(2, "dry_run")?);
    let mut policies: HashMap<String, String> = HashMap::new();
    for (index, given) in document::read(json_argument(arguments, 0, "document", EXAMPLE)?)?.into_iter().enumerate() {
        pgrx::check_for_interrupts!();
        let (name, json) = checked(given, index + 1)?;
        policies.insert(name, json);
    }
    let before = if dry_run { None } else { Some(Before::now()?) };
    let outcomes = owner::connect(|client| {
        if !dry_run {
            owner::rows(client, LOCK, &[])?;
        }
        let outcomes = compare(client, &policies, prune)?;
        if !dry_run {
            write(client, &policies, &outcomes)?;
        }
        Ok(outcomes)
    })?;
    if let Some(before) = before {
        record(&outcomes)?;
        let changed = outcomes.iter().filter(|outcome| outcome.action != "unchanged");
        before.tell_change_of(&changed.map(|outcome| outcome.name.as_str()).collect::<Vec<_>>())?;
    }
    arguments.give_rows(outcomes.into_iter().map(|outcome| {
        [
            text(&outcome.name),
            text(&outcome.action),
            outcome.difference.and_then(|difference| jsonb(&difference.to_string())),
        ]
    }))
}

const EXAMPLE: &str = "SELECT * FROM writeguard.import_policies(writeguard.export_policies(), dry_run => true);";

/// The argument of type jsonb at `index`, which is called `name`.
///
/// # Errors
/// WG007 for NULL, and for what is JSON to PostgreSQL alone.
pub fn json_argument(arguments: &Arguments, index: usize, name: &str, hint: &str) -> Result<Value, Error> {
    let document = arguments
        .get::<pg_sys::Datum>(index)
        .ok_or_else(|| Error::invalid(format!("{name} must not be NULL"), hint))?;
    // SAFETY: the argument is declared as jsonb.
    let text = unsafe { direct_function_call::<&core::ffi::CStr>(pg_sys::jsonb_out, &[Some(document)]) };
    // What jsonb holds and this reader does not: numbers beyond any float, very deep nesting.
    serde_json::from_str(&text.map(|text| encoding::from_server(text.to_bytes())).unwrap_or_default())
        .map_err(|error| Error::invalid(format!("the {name} cannot be read: {error}"), hint))
}

/// A policy's name, and the policy as JSON of all its columns, in the form in which it is stored.
///
/// # Errors
/// WG007 for a wrong value, with the policy and the key; what reading a network or an interval raises besides.
pub fn checked(mut given: Given, place: usize) -> Result<(String, String), Failure> {
    let title = document::title(&given, place);
    for key in &KEYS {
        if let (Kind::Network | Kind::Interval, Some(Value::String(text))) = (key.kind, given.get(key.name)) {
            let printed = printed(text, key, &title)?;
            given.insert(key.name.to_owned(), printed.into());
        }
    }
    let mut document = document::with_defaults(given.clone())?;
    let policy = api::settle(&mut document).map_err(|error| blame(&given, &title, error))?;
    let json = serde_json::to_string(&document).map_err(|error| {
        Error::invalid(format!("{title} is malformed: {error}"), "SELECT writeguard.export_policies();")
    })?;
    Ok((policy.name, json))
}

/// A network or an interval as PostgreSQL prints it. An ERROR that is caught here is raised again, as ours where it is
/// about the value, so nothing has to be cleaned up.
#[expect(ffi_unwind_calls, reason = "inside protect")]
fn printed(text: &str, key: &Key, title: &str) -> Result<String, Failure> {
    let (type_oid, word) = match key.kind {
        Kind::Network => (pg_sys::CIDROID, "a network"),
        _ => (pg_sys::INTERVALOID, "an interval"),
    };
    let value = encoding::to_palloc(text).cast_mut();
    let mut printed: *mut c_char = ptr::null_mut();
    // SAFETY: nothing but raw calls inside, with places for what they give.
    let result = unsafe {
        ffi::protect(|| {
            let (mut function, mut parameter, mut varlena) = (pg_sys::InvalidOid, pg_sys::InvalidOid, false);
            ffi::getTypeInputInfo(type_oid, &mut function, &mut parameter);
            let value = ffi::OidInputFunctionCall(function, value, parameter, -1);
            ffi::getTypeOutputInfo(type_oid, &mut function, &mut varlena);
            printed = ffi::OidOutputFunctionCall(function, value);
        })
    };
    if let Err(error) = result {
        return Err(match error.about_a_value().map(|message| from_server(message.to_bytes())) {
            Some(reason) => {
                let name = key.name;
                let message = format!("{title}, key \"{name}\": \"{text}\" is not {word}");
                Error::Invalid { message, detail: Some(format!("PostgreSQL says: {reason}.")), hint: key.example() }
                    .into()
            }
            None => error.into(),
        });
    }
    // SAFETY: what the output function gave.
    Ok(unsafe { encoding::from_c(printed) }.unwrap_or_default())
}

/// The same error with the policy it is in and, where one key alone gives an error, that key's error and name.
fn blame(given: &Given, title: &str, error: Error) -> Error {
    let alone = |key: &Key| {
        let mut one = Given::new();
        one.insert("name".into(), "p".into());
        one.insert(key.name.into(), given.get(key.name)?.clone());
        api::settle(&mut document::with_defaults(one).ok()?).err()
    };
    let found = KEYS.iter().find_map(|key| Some((key, alone(key)?)));
    match found.map_or((None, error), |(key, error)| (Some(key), error)) {
        (Some(key), Error::Invalid { message, detail, hint }) => Error::Invalid {
            message: format!("{title}, key \"{}\": {message}", key.name),
            detail,
            // Other hints are arguments of set_policy, which no document has.
            hint: if (hint.starts_with("SELECT ") || hint.starts_with("ALTER ")) && key.name != "name" {
                hint
            } else {
                key.example()
            },
        },
        (None, Error::Invalid { message, detail, hint }) => {
            Error::Invalid { message: format!("{title}: {message}"), detail, hint }
        }
        (_, other) => other,
    }
}

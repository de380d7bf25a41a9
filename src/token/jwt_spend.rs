//! Spends a token from outside: once, in the running transaction.

use std::collections::BTreeMap;

use pgrx::pg_sys;
use rules::error::Error;
use rules::token::claims::{self, Accepted, Expected, Refusal, is_name, shown};
use rules::token::grant::{Grant, Source};
use rules::token::jwt;
use rules::words::RelationName;
use serde_json::json;

use super::key;
use crate::pg::{encoding, owner};
use crate::session::actor::{Actor, role_name};
use crate::session::settings;

/// Waits for another transaction that spends the same token; gives nothing when that committed.
const SPEND: &str = "INSERT INTO writeguard.used_jti (key, jti, expires_at) \
     VALUES ($1, $2, pg_catalog.to_timestamp($3::pg_catalog.float8)) ON CONFLICT DO NOTHING RETURNING jti";

/// The tables of those names with all their partitions and children, each as an array of schema and name.
const FAMILIES: &str = "WITH RECURSIVE family (oid) AS ( \
       SELECT c.oid FROM pg_catalog.jsonb_to_recordset($1::pg_catalog.jsonb) AS t (schema text, name text) \
         JOIN pg_catalog.pg_namespace AS n ON n.nspname OPERATOR(pg_catalog.=) t.schema \
         JOIN pg_catalog.pg_class AS c \
           ON c.relnamespace OPERATOR(pg_catalog.=) n.oid AND c.relname OPERATOR(pg_catalog.=) t.name \
       UNION SELECT i.inhrelid FROM family AS f JOIN pg_catalog.pg_inherits AS i \
         ON i.inhparent OPERATOR(pg_catalog.=) f.oid) \
     SELECT pg_catalog.json_build_array(n.nspname, c.relname)::pg_catalog.text FROM family AS f \
       JOIN pg_catalog.pg_class AS c ON c.oid OPERATOR(pg_catalog.=) f.oid \
       JOIN pg_catalog.pg_namespace AS n ON n.oid OPERATOR(pg_catalog.=) c.relnamespace";

/// `<system identifier>/<database name>`: what the claim `aud` has to say.
fn audience() -> String {
    // SAFETY: reads shared memory, a static and the catalog; the name is a palloc'ed C string, or NULL for a database that
    // is not there, which is not the one we are in.
    unsafe {
        let name = encoding::from_c(pg_sys::get_database_name(pg_sys::MyDatabaseId));
        format!("{}/{}", pg_sys::GetSystemIdentifier(), name.unwrap_or_default())
    }
}

/// Seconds since 1970 by the server's clock, not by the transaction's.
fn now() -> f64 {
    const EPOCH: i64 =
        (pg_sys::POSTGRES_EPOCH_JDATE as i64 - pg_sys::UNIX_EPOCH_JDATE as i64) * pg_sys::SECS_PER_DAY as i64;
    // SAFETY: reads the clock.
    let microseconds = unsafe { pg_sys::GetCurrentTimestamp() };
    microseconds as f64 / 1e6 + EPOCH as f64
}

/// Accepts and spends a JWT for the statement with that hash.
///
/// # Errors
/// WG006 with the reason, in which nothing of the token stands but its key's name, its `jti`, `aud` and `sub`. WG008 when
/// the extension's tables cannot say.
pub fn spend(token: &str, statement_sha256: &str, relation: &RelationName) -> Result<Grant, Error> {
    let refused = |refusal: Refusal| Error::TokenRefused {
        request: None,
        reason: refusal.reason,
        detail: refusal.detail,
        hint: refusal.hint,
        relation: Some(relation.clone()),
    };
    let name = jwt::key_name(token).map_err(refused)?;
    let key = key::trusted(&name)?.ok_or_else(|| {
        let detail = format!("Its kid is {}.", if name.is_ascii() { shown(&name) } else { "something else".into() });
        refused(Refusal::new("no trusted key has the name of its kid", detail))
    })?;
    let claims = jwt::verify(token, &key).map_err(|refusal| refused(about(&name, None, refusal)))?;
    let expected = Expected {
        audience: &audience(),
        role: &role_name(Actor::current().role()),
        statement_sha256,
        now: now(),
        longest: settings::jwt_max_lifetime().unsigned_abs(),
    };
    let accepted = claims::judge(&claims, &expected);
    let accepted = accepted.map_err(|refusal| refused(about(&name, claims.jti(), refusal)))?;
    // Where not every letter can be stored, an ERROR about the encoding would be no answer.
    if !accepted.jti.is_ascii() && !key::stores_all_letters() {
        let refusal = Refusal::new("its jti has letters that this database cannot store", None);
        return Err(refused(about(&name, None, refusal)));
    }
    if !insert(&name, &accepted)? {
        let refusal = Refusal::new("it is used", "A token opens one write only.".to_owned());
        return Err(refused(about(&name, Some(&accepted.jti), refusal)));
    }
    let rows = accepted.tables.as_deref().map(families).transpose()?;
    let source = Source::Outside { key: name, jti: accepted.jti };
    let max_rows = Some(accepted.max_rows);
    Ok(Grant { source, rows, max_rows, fingerprints: BTreeMap::new(), relations: None, fires_late: false })
}

/// A refusal that says which token it is about.
fn about(key: &str, jti: Option<&str>, refusal: Refusal) -> Refusal {
    let token = match jti.filter(|jti| is_name(jti)) {
        Some(jti) => format!("It is token \"{jti}\" of trusted key \"{key}\"."),
        None => format!("It names trusted key \"{key}\"."),
    };
    let detail = Some(refusal.detail.map_or_else(|| token.clone(), |detail| format!("{detail} {token}")));
    Refusal { detail, ..refusal }
}

/// Whether the token was unused.
fn insert(key: &str, accepted: &Accepted) -> Result<bool, Error> {
    let arguments = [key.into(), accepted.jti.as_str().into(), accepted.expires.into()];
    owner::connect(|client| Ok(!owner::rows(client, SPEND, &arguments)?.is_empty()))
}

/// The tables that a token opens, by qualified name: those it names, with their partitions and children.
fn families(tables: &[RelationName]) -> Result<BTreeMap<String, u64>, Error> {
    let named: Vec<_> = tables.iter().map(|name| json!({"schema": name.schema, "name": name.name})).collect();
    let named = json!(named).to_string();
    let found = owner::connect(|client| owner::rows(client, FAMILIES, &[owner::json(&named)]))?;
    let names = found.iter().filter_map(|json| serde_json::from_str::<(String, String)>(json).ok());
    Ok(names.map(|(schema, name)| (RelationName::new(schema, name).to_sql(), u64::MAX)).collect())
}

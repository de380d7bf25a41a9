//! Looks a token up and spends it.

use std::collections::BTreeMap;

use pgrx::pg_sys;
use serde::Deserialize;

use super::statement::sha256;
use crate::error::Error;
use crate::owner;
use crate::session::{self, Actor};
use crate::words::{RelationName, quote_identifier};

/// What an accepted token opens, for the one statement it is bound to.
#[derive(Debug, Clone)]
pub struct Grant {
    /// The request that was approved.
    pub request: i64,
    /// Reviewed rows by qualified table name; a table that is not here may not be touched past a limit.
    pub rows: BTreeMap<String, u64>,
    /// The approver's own maximum over all these tables; it then takes the place of the reviewed numbers.
    pub max_rows: Option<u64>,
}

impl Grant {
    /// The first table with more rows than reviewed, and how many were; with the approver's own maximum, all tables
    /// together.
    pub fn exceeded(&self, rows: &[(String, u64)]) -> Option<(String, u64)> {
        if let Some((name, _)) = rows.iter().find(|(name, rows)| *rows > 0 && !self.rows.contains_key(name)) {
            return Some((name.clone(), 0));
        }
        if let Some(max_rows) = self.max_rows {
            let total: u64 = rows.iter().map(|(_, rows)| rows).sum();
            let all = || rows.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>().join(", ");
            return (total > max_rows).then(|| (all(), max_rows));
        }
        rows.iter().find_map(|(name, rows)| {
            let reviewed = self.rows.get(name).copied().unwrap_or(0);
            (*rows > reviewed).then(|| (name.clone(), reviewed))
        })
    }
}

/// A request as far as its token is concerned.
#[derive(Deserialize)]
struct Approved {
    id: i64,
    state: String,
    database: String,
    login: String,
    actor: String,
    acting_as: String,
    statement_sha256: String,
    relations: BTreeMap<String, u64>,
    max_rows: Option<u64>,
    expired: bool,
    expires_at: String,
}

const LOOK_UP: &str = "SELECT pg_catalog.to_jsonb(r)::pg_catalog.text FROM ( \
     SELECT id, state, database, login, actor, acting_as, statement_sha256, relations, max_rows, \
       expires_at OPERATOR(pg_catalog.<=) pg_catalog.clock_timestamp() AS expired, \
       expires_at::pg_catalog.text AS expires_at \
     FROM writeguard.request WHERE token_sha256 OPERATOR(pg_catalog.=) $1 FOR UPDATE) AS r";

const SPEND: &str = "UPDATE writeguard.request SET state = 'spent', spent_at = pg_catalog.clock_timestamp() \
     WHERE id OPERATOR(pg_catalog.=) $1::pg_catalog.int8";

/// Who a request and its token belong to. Compared by OID, so that a rename makes nobody another person, and nobody
/// inherits from a role of the same name; shown by name.
pub struct Bound {
    /// System identifier and OID of the database: a copy is another one.
    pub database: String,
    pub login: String,
    /// OIDs of login, session_user and the role that is SET.
    pub actor: String,
    /// The role that is SET, else session_user.
    pub acting_as: String,
}

impl Bound {
    /// This session's.
    pub fn now() -> Self {
        let actor = Actor::current();
        let oids = [actor.login, actor.session, actor.set].map(|role| u32::from(role).to_string());
        // SAFETY: reads shared memory and a static.
        let (system, database) = unsafe { (pg_sys::GetSystemIdentifier(), pg_sys::MyDatabaseId) };
        Self {
            database: format!("{system}/{}", u32::from(database)),
            login: session::role_name(actor.login),
            actor: oids.join("/"),
            acting_as: session::role_name(actor.role()),
        }
    }

    /// Whether `actor` of another one is the same person, whatever roles were SET.
    pub fn is_same_login(&self, actor: &str) -> bool {
        actor.split('/').next() == self.actor.split('/').next()
    }
}

/// Accepts and spends `token` for the statement with that hash, in the running transaction: rolled back, it is unused
/// again. Waits for another session that is spending the same token.
///
/// # Errors
/// WG006 with the reason.
pub fn spend(token: &str, statement_sha256: &str, relation: &RelationName) -> Result<Grant, Error> {
    let refused_for = |request: Option<i64>, reason: &str, detail: Option<String>, hint: &str| Error::TokenRefused {
        request,
        reason: reason.to_owned(),
        detail,
        hint: hint.to_owned(),
        relation: Some(relation.clone()),
    };
    let again = "SELECT writeguard.request('…', reason => 'why this is right');";
    let mine = "SELECT id, state, statement, expires_at FROM writeguard.my_requests;";
    let now = Bound::now();
    owner::connect(|client| {
        let found = owner::rows(client, LOOK_UP, &[sha256(token.as_bytes()).as_str().into()])?;
        let Some(found) = found.first() else {
            return Err(refused_for(None, "no approval in this database has it", None, mine));
        };
        let approved: Approved = serde_json::from_str(found)
            .map_err(|error| refused_for(None, "its request cannot be read", Some(format!("{error}.")), again))?;
        let refused = |reason: &str, detail, hint: &str| refused_for(Some(approved.id), reason, detail, hint);
        let detail = |text: String| Some(format!("It is the token of request {}{text}.", approved.id));
        if approved.database != now.database {
            let text = ", which was made in another database, of which this one is a copy".to_owned();
            return Err(refused("it belongs to another database", detail(text), again));
        }
        if !now.is_same_login(&approved.actor) {
            let text = format!(", which \"{}\" made; this session's login is \"{}\"", approved.login, now.login);
            return Err(refused("it belongs to another login", detail(text), mine));
        }
        if approved.actor != now.actor {
            let text = format!(", made as \"{}\"; this session acts as \"{}\"", approved.acting_as, now.acting_as);
            let hint = if approved.actor.ends_with("/0") {
                "RESET ROLE;".to_owned()
            } else {
                format!("SET ROLE {};", quote_identifier(&approved.acting_as))
            };
            return Err(refused("it belongs to another role", detail(text), &hint));
        }
        match approved.state.as_str() {
            "approved" => {}
            "spent" => {
                return Err(refused("it is spent", detail(", and opens one write only".into()), again));
            }
            other => {
                return Err(refused(&format!("its request is {other}"), detail(String::new()), again));
            }
        }
        if approved.expired {
            let text = format!(", and was good until {}", approved.expires_at);
            return Err(refused("it is expired", detail(text), again));
        }
        if approved.statement_sha256 != statement_sha256 {
            let text = ", approved for another statement or other parameters".to_owned();
            return Err(refused("it belongs to another statement", detail(text), mine));
        }
        owner::rows(client, SPEND, &[approved.id.into()])?;
        Ok(Grant { request: approved.id, rows: approved.relations, max_rows: approved.max_rows })
    })
}

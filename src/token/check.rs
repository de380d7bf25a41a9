//! Looks a token up and spends it.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::statement::sha256;
use crate::error::Error;
use crate::owner;
use crate::session::{self, Actor};
use crate::words::RelationName;

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
    login: String,
    session_role: String,
    set_role: Option<String>,
    statement_sha256: String,
    relations: BTreeMap<String, u64>,
    max_rows: Option<u64>,
    expired: bool,
    expires_at: String,
}

const LOOK_UP: &str = "SELECT pg_catalog.to_jsonb(r)::pg_catalog.text FROM ( \
     SELECT id, state, login, session_role, set_role, statement_sha256, relations, max_rows, \
       expires_at OPERATOR(pg_catalog.<=) pg_catalog.clock_timestamp() AS expired, \
       expires_at::pg_catalog.text AS expires_at \
     FROM writeguard.request WHERE token_sha256 OPERATOR(pg_catalog.=) $1 FOR UPDATE) AS r";

const SPEND: &str = "UPDATE writeguard.request SET state = 'spent', spent_at = pg_catalog.clock_timestamp() \
     WHERE id OPERATOR(pg_catalog.=) $1::pg_catalog.int8";

/// The names a token is bound to: login, session_user, and the role that is SET.
pub fn bound_role(actor: Actor) -> (String, String, Option<String>) {
    let set = (actor.set != pgrx::pg_sys::InvalidOid).then(|| session::role_name(actor.set));
    (session::role_name(actor.login), session::role_name(actor.session), set)
}

/// Accepts and spends `token` for the statement with that hash, in the running transaction: rolled back, it is unused
/// again. Waits for another session that is spending the same token.
///
/// # Errors
/// WG006 with the reason.
pub fn spend(token: &str, statement_sha256: &str, relation: &RelationName) -> Result<Grant, Error> {
    let refused = |reason: &str, detail: Option<String>, hint: &str| Error::TokenRefused {
        reason: reason.to_owned(),
        detail,
        hint: hint.to_owned(),
        relation: Some(relation.clone()),
    };
    let again = "SELECT writeguard.request('…', reason => 'why this is right');";
    let mine = "SELECT id, state, statement, expires_at FROM writeguard.my_requests;";
    let actor = bound_role(Actor::current());
    owner::connect(|client| {
        let found = owner::rows(client, LOOK_UP, &[sha256(token.as_bytes()).as_str().into()])?;
        let Some(found) = found.first() else {
            return Err(refused("no approval in this database has it", None, mine));
        };
        let approved: Approved = serde_json::from_str(found)
            .map_err(|error| refused("its request cannot be read", Some(format!("{error}.")), again))?;
        let detail = |text: String| Some(format!("It is the token of request {}{text}.", approved.id));
        if approved.login != actor.0 {
            let text = format!(", which \"{}\" made; this session's login is \"{}\"", approved.login, actor.0);
            return Err(refused("it belongs to another login", detail(text), mine));
        }
        if (&approved.session_role, &approved.set_role) != (&actor.1, &actor.2) {
            let text = format!(
                ", made as {}; this session acts as {}",
                acting(&approved.session_role, &approved.set_role),
                acting(&actor.1, &actor.2)
            );
            let hint = match &approved.set_role {
                Some(role) => format!("SET ROLE {};", crate::words::quote_identifier(role)),
                None => "RESET ROLE;".into(),
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

fn acting(session: &str, set: &Option<String>) -> String {
    match set {
        Some(role) => format!("\"{role}\" (session user \"{session}\")"),
        None => format!("\"{session}\""),
    }
}

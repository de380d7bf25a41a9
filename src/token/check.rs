//! Looks a token up and spends it.

use std::collections::BTreeMap;

use pgrx::pg_sys;
use rules::error::Error;
use rules::token::fingerprint::Fingerprint;
use rules::token::grant::{Grant, Source};
use rules::token::statement::sha256;
use rules::words::{RelationName, literal, quote_identifier};
use serde::Deserialize;

use super::definitions::Definitions;
use super::jwt_spend;
use crate::pg::owner;
use crate::session::actor::{self, Actor};
use crate::session::meaning::{self, Settings};

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
    /// Under which its text was reviewed; none where it was made before these were kept.
    settings: Option<Settings>,
    /// The extension in this database keeps them.
    keeps_settings: bool,
    /// None where it was made before rows were told apart.
    fingerprints: Option<BTreeMap<String, Fingerprint>>,
    /// The same of definitions.
    definitions: Option<Definitions>,
}

const LOOK_UP: &str = "SELECT pg_catalog.to_jsonb(r)::pg_catalog.text FROM ( \
     SELECT id, state, database, login, actor, acting_as, statement_sha256, relations, max_rows, \
       expires_at OPERATOR(pg_catalog.<=) pg_catalog.clock_timestamp() AS expired, \
       expires_at::pg_catalog.text AS expires_at, \
       pg_catalog.to_jsonb(q) OPERATOR(pg_catalog.->) 'settings' AS settings, \
       pg_catalog.to_jsonb(q) OPERATOR(pg_catalog.?) 'settings' AS keeps_settings, \
       pg_catalog.to_jsonb(q) OPERATOR(pg_catalog.->) 'fingerprints' AS fingerprints, \
       pg_catalog.to_jsonb(q) OPERATOR(pg_catalog.->) 'definitions' AS definitions \
     FROM writeguard.request AS q WHERE token_sha256 OPERATOR(pg_catalog.=) $1 FOR UPDATE) AS r";

/// One's own only: nobody locks, or learns of, what others have requested.
const LOOK_UP_OWN: &str = "SELECT pg_catalog.to_jsonb(r)::pg_catalog.text FROM ( \
     SELECT id, state, database, login, actor, acting_as, statement_sha256, relations, max_rows, \
       COALESCE(expires_at OPERATOR(pg_catalog.<=) pg_catalog.clock_timestamp(), false) AS expired, \
       COALESCE(expires_at::pg_catalog.text, '') AS expires_at, statement, parameters, search_path, \
       pg_catalog.to_jsonb(q) OPERATOR(pg_catalog.->) 'settings' AS settings, \
       pg_catalog.to_jsonb(q) OPERATOR(pg_catalog.?) 'settings' AS keeps_settings, \
       pg_catalog.to_jsonb(q) OPERATOR(pg_catalog.->) 'fingerprints' AS fingerprints, \
       pg_catalog.to_jsonb(q) OPERATOR(pg_catalog.->) 'definitions' AS definitions \
     FROM writeguard.request AS q WHERE id OPERATOR(pg_catalog.=) $1::pg_catalog.int8 \
       AND pg_catalog.split_part(actor, '/', 1) OPERATOR(pg_catalog.=) $2 FOR UPDATE) AS r";

const SPEND: &str = "UPDATE writeguard.request SET state = 'spent', spent_at = pg_catalog.clock_timestamp() \
     WHERE id OPERATOR(pg_catalog.=) $1::pg_catalog.int8";

impl Approved {
    fn grant(self) -> Grant {
        Grant {
            source: Source::Request(self.id),
            rows: Some(self.relations),
            max_rows: self.max_rows,
            fingerprints: self.fingerprints.unwrap_or_default(),
            // TRUNCATE is counted and not run, so that nothing was met.
            relations: self.definitions.as_ref().map(Definitions::relations).filter(|met| !met.is_empty()),
            fires_late: self.definitions.is_none_or(|definitions| definitions.fires_late),
        }
    }
}

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
            login: actor::shown_role(actor.login),
            actor: oids.join("/"),
            acting_as: actor::shown_role(actor.role()),
        }
    }

    /// Whether `actor` of another one is the same person, whatever roles were SET.
    pub fn is_same_login(&self, actor: &str) -> bool {
        actor.split('/').next() == self.actor.split('/').next()
    }
}

/// How somebody refers to a request.
enum By<'a> {
    /// By its token, for a write of this table.
    Token(&'a RelationName),
    /// By its number, to have it executed.
    Number(i64),
}

impl By<'_> {
    fn refused(&self, request: Option<i64>, reason: &str, detail: Option<String>, hint: &str) -> Error {
        let (reason, hint) = (reason.to_owned(), hint.to_owned());
        match self {
            By::Token(relation) => {
                Error::TokenRefused { request, reason, detail, hint, relation: Some((*relation).clone()) }
            }
            By::Number(request) => Error::ExecutionRefused { request: *request, reason, detail, hint, relation: None },
        }
    }
}

const AGAIN: &str = "SELECT writeguard.request('…', reason => 'why this is right');";
const MINE: &str = "SELECT id, state, statement, expires_at FROM writeguard.my_requests;";

/// The request that was looked up, if it is approved for who acts now.
fn approved(found: &str, by: &By<'_>, settings: &Settings) -> Result<Approved, Error> {
    let now = Bound::now();
    let approved: Approved = serde_json::from_str(found)
        .map_err(|error| by.refused(None, "its request cannot be read", Some(format!("{error}.")), AGAIN))?;
    let refused = |reason: &str, detail, hint: &str| Err(by.refused(Some(approved.id), reason, detail, hint));
    let detail = |text: String| match by {
        By::Token(_) => Some(format!("It is the token of request {}{text}.", approved.id)),
        By::Number(_) => (!text.is_empty()).then(|| format!("It is a request{text}.")),
    };
    if approved.database != now.database {
        let text = ", which was made in another database, of which this one is a copy".to_owned();
        return refused("it belongs to another database", detail(text), AGAIN);
    }
    if !now.is_same_login(&approved.actor) {
        let text = format!(", which \"{}\" made; this session's login is \"{}\"", approved.login, now.login);
        return refused("it belongs to another login", detail(text), MINE);
    }
    if approved.actor != now.actor {
        let text = format!(", made as \"{}\"; this session acts as \"{}\"", approved.acting_as, now.acting_as);
        let hint = if approved.actor.ends_with("/0") {
            "RESET ROLE;".to_owned()
        } else {
            format!("SET ROLE {};", quote_identifier(&approved.acting_as))
        };
        return refused("it belongs to another role", detail(text), &hint);
    }
    match (approved.state.as_str(), by) {
        ("approved", _) => {}
        ("spent", _) => {
            return refused("it is spent", detail(", and opens one write only".into()), AGAIN);
        }
        ("pending", By::Number(id)) => {
            let hint = format!("Let a second person type: SELECT writeguard.approve({id});");
            return refused("it is pending", detail(", and not approved yet".into()), &hint);
        }
        (other, By::Number(_)) => return refused(&format!("it is {other}"), None, AGAIN),
        (other, By::Token(_)) => {
            return refused(&format!("its request is {other}"), detail(String::new()), AGAIN);
        }
    }
    if approved.expired {
        let text = format!(", and was good until {}", approved.expires_at);
        return refused("it is expired", detail(text), AGAIN);
    }
    if let Some(name) = approved.definitions.as_ref().map_or(Ok(None), Definitions::altered)? {
        let text = format!(", and {name} is another one now, or gone");
        return refused("what it depends on was altered since it was reviewed", detail(text), AGAIN);
    }
    match (&approved.settings, by) {
        (None, _) if approved.keeps_settings => {
            let text = ", made before the settings were kept under which a text is reviewed".to_owned();
            refused("nobody knows any more what its text meant", detail(text), AGAIN)
        }
        (Some(reviewed), By::Token(_)) => match meaning::differs(reviewed, settings) {
            Some((name, was, is)) => {
                let text =
                    format!(", reviewed with {name} = {}; this session has {name} = {}", literal(&was), literal(&is));
                let hint = format!("SELECT pg_catalog.set_config('{name}', {}, false);", literal(&was));
                refused("its text was reviewed under other settings", detail(text), &hint)
            }
            None => Ok(approved),
        },
        _ => Ok(approved),
    }
}

/// Accepts and spends `token` for the statement with that hash, in the running transaction: rolled back, it is unused
/// again. Waits for another session that is spending the same token.
///
/// # Errors
/// WG006 with the reason.
pub fn spend(token: &str, statement_sha256: &str, relation: &RelationName) -> Result<Grant, Error> {
    if actor::is_jwt(token) {
        return jwt_spend::spend(token, statement_sha256, relation);
    }
    let by = By::Token(relation);
    let settings = meaning::of_command();
    owner::connect(|client| {
        let found = owner::rows(client, LOOK_UP, &[sha256(token.as_bytes()).as_str().into()])?;
        let Some(found) = found.first() else {
            return Err(by.refused(None, "no approval in this database has it", None, MINE));
        };
        let approved = approved(found, &by, &settings)?;
        if approved.statement_sha256 != statement_sha256 {
            let detail = format!(
                "It is the token of request {}, approved for another statement or other parameters.",
                approved.id
            );
            return Err(by.refused(Some(approved.id), "it belongs to another statement", Some(detail), MINE));
        }
        owner::rows(client, SPEND, &[approved.id.into()])?;
        Ok(approved.grant())
    })
}

/// What was reviewed, to be run.
#[derive(Deserialize)]
pub struct Reviewed {
    pub statement: String,
    pub parameters: Vec<Option<String>>,
    /// In which the names of the statement were looked up.
    search_path: String,
    settings: Option<Settings>,
}

impl Reviewed {
    /// The settings that give its text the meaning which was reviewed, by name.
    pub fn settings(&self) -> Settings {
        let mut settings = Settings::from([("search_path".to_owned(), self.search_path.clone())]);
        settings.extend(self.settings.clone().unwrap_or_default());
        settings
    }
}

/// Accepts and spends an approved request of one's own, as [`spend`] does its token.
///
/// # Errors
/// WG006 with the reason.
pub fn spend_own(id: i64) -> Result<(Grant, Reviewed), Error> {
    let by = By::Number(id);
    let login = u32::from(Actor::current().login).to_string();
    owner::connect(|client| {
        let found = owner::rows(client, LOOK_UP_OWN, &[id.into(), login.as_str().into()])?;
        let Some(found) = found.first() else {
            return Err(by.refused(Some(id), "no request of this login has that number", None, MINE));
        };
        let approved = approved(found, &by, &Settings::new())?;
        let reviewed: Reviewed = serde_json::from_str(found)
            .map_err(|error| by.refused(Some(id), "it cannot be read", Some(format!("{error}.")), AGAIN))?;
        owner::rows(client, SPEND, &[id.into()])?;
        Ok((approved.grant(), reviewed))
    })
}

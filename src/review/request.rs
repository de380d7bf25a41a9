//! Requests and decisions about them.

use std::collections::BTreeMap;
use std::ffi::CString;

use pgrx::datum::Interval;
use pgrx::pg_sys;
use serde::{Deserialize, Serialize};

use super::{rehearse, run};
use crate::error::Error;
use crate::event::queue;
use crate::event::record::{Event, Kind};
use crate::event::store;
use crate::function::{Arguments, Returns, sql_function, value};
use crate::guard::tally::Wanted;
use crate::owner;
use crate::raise::Failure;
use crate::session::{self, Actor, role_name};
use crate::settings;
use crate::token::check::Bound;
use crate::token::statement::{normalize, sha256, statement_hash};
use crate::words::ascii_json;

sql_function!(
    /// `request(statement text, reason text, parameters text[]) → bigint`.
    writeguard_request, pg_finfo_writeguard_request, request
);
sql_function!(
    /// `request(event bigint, reason text) → bigint`.
    writeguard_request_event, pg_finfo_writeguard_request_event, request_event
);
sql_function!(
    /// `approve(request bigint, comment text, valid_for interval, max_rows bigint) → text`.
    writeguard_approve, pg_finfo_writeguard_approve, approve
);
sql_function!(
    /// `reject(request bigint, comment text)`.
    writeguard_reject, pg_finfo_writeguard_reject, reject
);
sql_function!(
    /// `statement_hash(statement text, parameters text[]) → text`.
    writeguard_statement_hash, pg_finfo_writeguard_statement_hash, hash
);
sql_function!(
    /// `login() → text`.
    writeguard_login, pg_finfo_writeguard_login, login
);
sql_function!(
    /// `queue_counters() → bigint[]`.
    writeguard_queue_counters, pg_finfo_writeguard_queue_counters, queue_counters
);

fn login(_arguments: &Arguments) -> Returns {
    value(role_name(Actor::current().login))
}

fn queue_counters(_arguments: &Arguments) -> Returns {
    value(queue::counters().map(|count| i64::try_from(count).unwrap_or(i64::MAX)).to_vec())
}

fn hash(arguments: &Arguments) -> Returns {
    let parameters: Vec<Option<String>> = arguments.get(1).unwrap_or_default();
    value(statement_hash(&arguments.text(0, "statement")?, &parameters))
}

fn request(arguments: &Arguments) -> Returns {
    let parameters: Vec<Option<String>> = arguments.get(2).unwrap_or_default();
    value(store_request(&arguments.text(0, "statement")?, arguments.get(1), &parameters)?)
}

#[derive(Deserialize)]
struct Refused {
    kind: String,
    login: String,
    statement: Option<String>,
    whole: bool,
}

const REFUSED: &str = "SELECT pg_catalog.to_jsonb(r)::pg_catalog.text FROM ( \
     SELECT kind, login, statement, \
       pg_catalog.octet_length(statement) OPERATOR(pg_catalog.<=) $2::pg_catalog.int4 AS whole \
     FROM writeguard.event WHERE id OPERATOR(pg_catalog.=) $1::pg_catalog.int8) AS r";

fn request_event(arguments: &Arguments) -> Returns {
    let mine = "SELECT id, statement FROM writeguard.my_events WHERE kind = 'blocked' ORDER BY id DESC;";
    let event: i64 = arguments.get(0).ok_or_else(|| Error::invalid("event must not be NULL", mine))?;
    let most = i32::try_from(queue::statement_bytes()).unwrap_or(i32::MAX);
    let found = owner::connect(|client| owner::rows(client, REFUSED, &[event.into(), most.into()]))?;
    let refused = found.first().and_then(|json| serde_json::from_str::<Refused>(json).ok());
    // Somebody else's event and none at all look alike: who may not read events learns nothing here.
    let refused = refused
        .filter(|refused| refused.login == role_name(Actor::current().login))
        .ok_or_else(|| Error::invalid(format!("event {event} is not a refusal of yours"), mine))?;
    match refused.statement {
        Some(statement) if refused.kind == "blocked" && refused.whole => {
            value(store_request(&statement, arguments.get(1), &[])?)
        }
        Some(_) if refused.kind == "blocked" => Err(Error::invalid(
            format!("the statement of event {event} was too long to be kept whole"),
            "SELECT writeguard.request('…', reason => 'why this is right');",
        )
        .into()),
        _ => Err(Error::invalid(format!("event {event} is not a refusal of yours"), mine).into()),
    }
}

#[derive(Serialize)]
struct New<'a> {
    database: &'a str,
    login: &'a str,
    actor: &'a str,
    acting_as: &'a str,
    reason: &'a str,
    statement: &'a str,
    parameters: &'a [Option<String>],
    statement_sha256: &'a str,
    rows: u64,
    relations: &'a BTreeMap<String, u64>,
    search_path: &'a str,
}

const INSERT: &str = "INSERT INTO writeguard.request \
     (database, login, actor, acting_as, reason, statement, parameters, statement_sha256, rows, relations, \
      search_path) \
     SELECT database, login, actor, acting_as, reason, statement, parameters, statement_sha256, rows, relations, \
      search_path \
     FROM pg_catalog.jsonb_populate_record(NULL::writeguard.request, $1::pg_catalog.jsonb) \
     RETURNING id::pg_catalog.text";

/// Rows of each table and operation that a request shows before and after.
const SAMPLE: usize = 5;

fn store_request(statement: &str, reason: Option<String>, parameters: &[Option<String>]) -> Result<i64, Failure> {
    let again = "SELECT writeguard.request($$UPDATE orders SET … WHERE …$$, reason => 'why this is right');";
    let reason = reason.filter(|reason| !reason.trim().is_empty());
    let reason = reason.ok_or_else(|| Error::invalid("a request needs a reason", "reason => 'why this is right'"))?;
    let text = CString::new(statement).map_err(|_| Error::invalid("malformed statement", again))?;
    // The part that a client which sends this text would run: what follows the semicolon is not of it.
    let statement = normalize(run::check(&text)?.unwrap_or(statement));
    let rehearsed =
        rehearse::rehearse(&text, parameters, Wanted { everything: false, sample: SAMPLE, most: u64::MAX })?;
    let (relations, parameters) = (rehearsed.rows, rehearsed.parameters);
    if relations.is_empty() && !rehearsed.refused_without_rows {
        return Err(Error::Invalid {
            message: "the statement needs no approval".into(),
            detail: Some("Rehearsed, it changed no row of a table that a policy covers.".into()),
            hint: statement.to_owned(),
        }
        .into());
    }
    let bound = Bound::now();
    let new = New {
        database: &bound.database,
        login: &bound.login,
        actor: &bound.actor,
        acting_as: &bound.acting_as,
        reason: &reason,
        statement,
        parameters: &parameters,
        statement_sha256: &statement_hash(statement, &parameters),
        rows: relations.values().sum(),
        relations: &relations,
        search_path: &session::search_path(),
    };
    let json = ascii_json(&serde_json::to_string(&new).unwrap_or_default());
    let id = owner::connect(|client| owner::rows(client, INSERT, &[json.as_str().into()]))?;
    let id: i64 = id.first().and_then(|id| id.parse().ok()).unwrap_or_default();
    let mut event = Event::new(Kind::Requested);
    event.rows = Some(new.rows);
    event.statement = Some(statement.to_owned());
    event.approval = Some(id);
    event.reason = Some(reason.clone());
    store::insert(&event)?;
    Ok(id)
}

#[derive(Deserialize)]
struct Pending {
    state: String,
    login: String,
    actor: String,
    statement: String,
    rows: u64,
}

const LOCK: &str = "SELECT pg_catalog.to_jsonb(r)::pg_catalog.text FROM ( \
     SELECT state, login, actor, statement, rows FROM writeguard.request \
     WHERE id OPERATOR(pg_catalog.=) $1::pg_catalog.int8 FOR UPDATE) AS r";

/// The request, locked, if this login may decide about it.
fn lock(id: i64) -> Result<Pending, Error> {
    let pending = "SELECT id, requested_by, statement FROM writeguard.pending;";
    let found = owner::connect(|client| owner::rows(client, LOCK, &[id.into()]))?;
    let request: Pending = found
        .first()
        .and_then(|json| serde_json::from_str(json).ok())
        .ok_or_else(|| Error::invalid(format!("request {id} does not exist"), pending))?;
    let now = Bound::now();
    // By name as well: in a restored copy the OIDs are those of the original.
    if now.is_same_login(&request.actor) || request.login == now.login {
        return Err(Error::ApprovalRefused {
            message: "nobody decides about their own request".into(),
            detail: Some(format!(
                "Request {id} was made by login \"{}\", which is also this session's.",
                request.login
            )),
            hint: format!("Let a second person type: SELECT writeguard.approve({id});"),
        });
    }
    if request.state != "pending" {
        return Err(Error::ApprovalRefused {
            message: format!("request {id} is already {}", request.state),
            detail: Some("A decision cannot be changed.".into()),
            hint: pending.into(),
        });
    }
    Ok(request)
}

fn number(arguments: &Arguments) -> Result<i64, Error> {
    arguments
        .get(0)
        .ok_or_else(|| Error::invalid("request must not be NULL", "SELECT id, statement FROM writeguard.pending;"))
}

/// 256 bits from the operating system, in hexadecimal.
fn fresh_token() -> Result<String, Error> {
    let mut bytes = [0u8; 32];
    // SAFETY: fills the buffer that it is given.
    if !unsafe { pg_sys::pg_strong_random(bytes.as_mut_ptr().cast(), bytes.len()) } {
        return Err(Error::Undecided {
            reason: "the operating system gives no random numbers".into(),
            hint: "SELECT pg_catalog.gen_random_uuid();".into(),
            relation: None,
        });
    }
    Ok(base16ct::lower::encode_string(&bytes))
}

const APPROVE: &str = "UPDATE writeguard.request SET state = 'approved', decided_by = $2, \
     decided_at = pg_catalog.clock_timestamp(), comment = $3, max_rows = $4::pg_catalog.int8, token_sha256 = $5, \
     expires_at = pg_catalog.clock_timestamp() OPERATOR(pg_catalog.+) \
       COALESCE($6::pg_catalog.interval, pg_catalog.make_interval(secs => $7::pg_catalog.int4)) \
     WHERE id OPERATOR(pg_catalog.=) $1::pg_catalog.int8 \
       AND COALESCE($6::pg_catalog.interval OPERATOR(pg_catalog.>) '0'::pg_catalog.interval, true) \
     RETURNING id::pg_catalog.text";

fn approve(arguments: &Arguments) -> Returns {
    let id = number(arguments)?;
    let comment: Option<String> = arguments.get(1);
    let valid_for: Option<Interval> = arguments.get(2);
    let max_rows: Option<i64> = arguments.get(3);
    if max_rows.is_some_and(|rows| rows < 0) {
        return Err(Error::invalid("max_rows must not be negative", "max_rows => 1000").into());
    }
    let request = lock(id)?;
    let token = fresh_token()?;
    let approver = role_name(Actor::current().login);
    let updated = owner::connect(|client| {
        let arguments = [
            id.into(),
            approver.as_str().into(),
            comment.as_deref().into(),
            max_rows.into(),
            sha256(token.as_bytes()).into(),
            valid_for.into(),
            settings::approval_lifetime().into(),
        ];
        owner::rows(client, APPROVE, &arguments)
    })?;
    if updated.is_empty() {
        return Err(Error::invalid("valid_for must be greater than zero", "valid_for => '15 minutes'").into());
    }
    record(Kind::Approved, id, &request, max_rows, comment)?;
    value(token)
}

const REJECT: &str = "UPDATE writeguard.request SET state = 'rejected', decided_by = $2, \
     decided_at = pg_catalog.clock_timestamp(), comment = $3 \
     WHERE id OPERATOR(pg_catalog.=) $1::pg_catalog.int8 RETURNING id::pg_catalog.text";

fn reject(arguments: &Arguments) -> Returns {
    let id = number(arguments)?;
    let comment: Option<String> = arguments.get(1);
    let request = lock(id)?;
    let approver = role_name(Actor::current().login);
    owner::connect(|client| {
        owner::rows(client, REJECT, &[id.into(), approver.as_str().into(), comment.as_deref().into()])
    })?;
    record(Kind::Rejected, id, &request, None, comment)?;
    Ok(None)
}

fn record(kind: Kind, id: i64, request: &Pending, max_rows: Option<i64>, comment: Option<String>) -> Result<(), Error> {
    let mut event = Event::new(kind);
    event.statement = Some(request.statement.clone());
    event.rows = Some(request.rows);
    event.row_limit = max_rows.and_then(|rows| u64::try_from(rows).ok());
    event.approval = Some(id);
    event.reason = comment;
    store::insert(&event)?;
    Ok(())
}

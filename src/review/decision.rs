//! What other people decide about a request: approve, reject, revoke.
//!
//! Each decision holds the request's row until its transaction ends, so decisions and uses of one request come one after
//! the other. A decision is final: what was approved can only be revoked, everything else not even that.

use pgrx::{PgLogLevel, pg_sys};
use rules::error::Error;
use rules::token::statement::sha256;
use rules::words::{Override, count, duration};
use serde::Deserialize;

use super::approval::{self, Ask};
use crate::event::record::{Event, Kind};
use crate::event::store;
use crate::pg::ereport::{Failure, tell};
use crate::pg::function::{Arguments, Returns, sql_function, value};
use crate::pg::owner;
use crate::policy::interval::Span;
use crate::session::actor::Actor;
use crate::session::excerpt::Excerpt;
use crate::session::{own_statement, settings};
use crate::token::check::Bound;

sql_function!(
    /// `approve(request bigint, comment text, valid_for interval, max_rows bigint) → text`.
    writeguard_approve, pg_finfo_writeguard_approve, approve, by own_statement::call
);
sql_function!(
    /// `reject(request bigint, comment text)`.
    writeguard_reject, pg_finfo_writeguard_reject, reject, by own_statement::call
);
sql_function!(
    /// `revoke(request bigint, comment text)`.
    writeguard_revoke, pg_finfo_writeguard_revoke, revoke, by own_statement::call
);

/// A request as far as a decision about it is concerned.
#[derive(Deserialize)]
struct Request {
    id: i64,
    state: String,
    database: String,
    login: String,
    actor: String,
    statement: String,
    rows: u64,
}

/// One that nobody decided in time is expired, whatever the worker has noted.
const LOCK: &str = "SELECT pg_catalog.to_jsonb(r)::pg_catalog.text FROM ( \
     SELECT id, CASE WHEN state IN ('pending', 'approved') \
         AND expires_at OPERATOR(pg_catalog.<=) pg_catalog.clock_timestamp() THEN 'expired' ELSE state END AS state, \
       database, login, actor, statement, rows \
     FROM writeguard.request WHERE id OPERATOR(pg_catalog.=) $1::pg_catalog.int8 FOR UPDATE) AS r";

const PENDING: &str = "SELECT id, requested_by, statement FROM writeguard.pending;";

/// The request that the first argument names, locked.
fn lock(arguments: &Arguments) -> Result<Request, Error> {
    let id: i64 = arguments.get(0).ok_or_else(|| Error::invalid("request must not be NULL", PENDING))?;
    let found = owner::connect(|client| owner::rows(client, LOCK, &[id.into()]))?;
    found
        .first()
        .and_then(|json| serde_json::from_str(json).ok())
        .ok_or_else(|| Error::invalid(format!("request {id} does not exist"), PENDING))
}

impl Request {
    /// A decision about it is somebody else's, and still to be taken.
    fn check_open(&self, now: &Bound) -> Result<(), Error> {
        let id = self.id;
        // By name as well: in a restored copy the OIDs are those of the original.
        if now.is_same_login(&self.actor) || self.login == now.login {
            return Err(Error::ApprovalRefused {
                message: "nobody decides about their own request".into(),
                detail: Some(format!(
                    "Request {id} was made by login \"{}\", which is also this session's.",
                    self.login
                )),
                hint: format!("Let a second person type: SELECT writeguard.approve({id});"),
            });
        }
        if self.state != "pending" {
            let hint = if self.state == "approved" {
                format!("SELECT writeguard.revoke({id}); (where the approval shall not hold any more)")
            } else {
                PENDING.into()
            };
            return Err(self.is_over("A decision cannot be changed.", hint));
        }
        Ok(())
    }

    fn is_over(&self, detail: &str, hint: String) -> Error {
        Error::ApprovalRefused {
            message: format!("request {} is already {}", self.id, self.state),
            detail: Some(detail.into()),
            hint,
        }
    }
}

/// 256 bits from the operating system, in hexadecimal.
pub fn fresh_token() -> Result<String, Error> {
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

/// How long the token may be good, in seconds.
///
/// # Errors
/// WG007 for nothing at all, and beyond the setting.
fn lifetime(arguments: &Arguments) -> Result<f64, Error> {
    // SAFETY: the argument is declared as an interval.
    let given = unsafe { Span::of(arguments.get(2).unwrap_or(pg_sys::Datum::null()), arguments.is_null(2)) };
    let Some(given) = given else { return Ok(f64::from(settings::approval_lifetime())) };
    let most = i64::from(settings::approval_max_lifetime()) * 1_000_000;
    if given.microseconds <= 0 {
        return Err(Error::invalid("valid_for must be greater than zero", "valid_for => '15 minutes'"));
    }
    if given.microseconds > most {
        return Err(Error::Invalid {
            message: format!("valid_for must not be longer than {}", duration(most.unsigned_abs())),
            detail: Some("That is what writeguard.approval_max_lifetime says.".into()),
            hint: format!("valid_for => '{} seconds'", settings::approval_max_lifetime()),
        });
    }
    Ok(given.microseconds as f64 / 1e6)
}

const ALREADY: &str = "SELECT approver FROM writeguard.approval \
     WHERE request OPERATOR(pg_catalog.=) $1::pg_catalog.int8 \
       AND (approver_oid OPERATOR(pg_catalog.=) $2 OR approver OPERATOR(pg_catalog.=) $3)";

const ADD: &str = "INSERT INTO writeguard.approval (request, approver, approver_oid, valid_for, max_rows, comment) \
     VALUES ($1::pg_catalog.int8, $2, $3, pg_catalog.make_interval(secs => $4::pg_catalog.float8), $5::pg_catalog.int8, $6)";

/// Also a sign to a decision with an older snapshot, which would not see the approval: it fails to serialize.
const NOTE: &str = "UPDATE writeguard.request SET decided_by = $2, decided_at = pg_catalog.clock_timestamp(), \
     comment = $3 WHERE id OPERATOR(pg_catalog.=) $1::pg_catalog.int8";

/// The smallest maximum holds; more than was reviewed only if all approvers say so.
const APPROVE: &str = "UPDATE writeguard.request AS r SET state = 'approved', token_sha256 = $2, max_rows = a.max_rows, \
     expires_at = pg_catalog.clock_timestamp() OPERATOR(pg_catalog.+) a.valid_for \
     FROM (SELECT pg_catalog.min(g.valid_for) AS valid_for, \
             CASE WHEN pg_catalog.count(g.max_rows) OPERATOR(pg_catalog.=) pg_catalog.count(*) \
                    OR pg_catalog.min(g.max_rows) OPERATOR(pg_catalog.<=) $3::pg_catalog.int8 \
                  THEN pg_catalog.min(g.max_rows) END AS max_rows \
           FROM writeguard.approval AS g WHERE g.request OPERATOR(pg_catalog.=) $1::pg_catalog.int8) AS a \
     WHERE r.id OPERATOR(pg_catalog.=) $1::pg_catalog.int8";

/// What became of an approval.
enum Approved {
    /// The last one that was needed.
    Whole { token: String },
    /// More are needed: how many, and what the policies say.
    Part(String, String),
}

fn approve(arguments: &Arguments) -> Returns {
    let comment: Option<String> = arguments.get(1);
    let lifetime = lifetime(arguments)?;
    let max_rows: Option<i64> = arguments.get(3);
    if max_rows.is_some_and(|rows| rows < 0) {
        return Err(Error::invalid("max_rows must not be negative", "max_rows => 1000").into());
    }
    let request = lock(arguments)?;
    let now = Bound::now();
    request.check_open(&now)?;
    if request.database != now.database {
        return Err(Error::ApprovalRefused {
            message: format!("request {} belongs to another database", request.id),
            detail: Some("It was made in a database of which this one is a copy.".into()),
            hint: "SELECT writeguard.request('…', reason => 'why this is right');".into(),
        }
        .into());
    }
    let (id, login) = (request.id, Actor::current().login);
    let approved = owner::connect(|client| {
        let asks = approval::asks(client, id, login)?;
        check_approver(id, &now.login, &asks)?;
        let already = owner::rows(client, ALREADY, &[id.into(), login.into(), now.login.as_str().into()])?;
        let missing = approval::still_missing(&asks);
        if already.is_empty() {
            let arguments = [
                id.into(),
                now.login.as_str().into(),
                login.into(),
                lifetime.into(),
                max_rows.into(),
                comment.as_deref().into(),
            ];
            owner::rows(client, ADD, &arguments)?;
            owner::rows(client, NOTE, &[id.into(), now.login.as_str().into(), comment.as_deref().into()])?;
        } else if let Some((_, sentences)) = missing {
            return Err(Error::ApprovalRefused {
                message: format!("login \"{}\" has approved request {id} already", now.login),
                detail: Some(sentences),
                hint: format!("Let another person type: SELECT writeguard.approve({id});"),
            });
        }
        // Who approved already gives the token where a policy or a membership changed, so that nothing is missing now.
        if let Some((missing, sentences)) = approval::still_missing(&approval::asks(client, id, login)?) {
            return Ok(Approved::Part(missing, sentences));
        }
        let token = fresh_token()?;
        let rows = i64::try_from(request.rows).unwrap_or(i64::MAX);
        owner::rows(client, APPROVE, &[id.into(), sha256(token.as_bytes()).as_str().into(), rows.into()])?;
        Ok(Approved::Whole { token })
    })?;
    match approved {
        Approved::Whole { token } => {
            record(Kind::Approved, &request, max_rows, comment)?;
            value(token)
        }
        Approved::Part(missing, sentences) => {
            let needs = format!("request {id} needs {missing}");
            let reason = comment.map_or_else(|| needs.clone(), |comment| format!("{comment} ({needs})"));
            record(Kind::Approved, &request, max_rows, Some(reason))?;
            tell(PgLogLevel::NOTICE, &needs, Some(&sentences), None)?;
            Ok(None)
        }
    }
}

fn check_approver(id: i64, login: &str, asks: &[Ask]) -> Result<(), Error> {
    if let Some(ask) = asks.iter().find(|ask| ask.override_ == Override::Never) {
        return Err(Error::ApprovalRefused {
            message: format!("no approval can lift policy \"{}\"", ask.policy),
            detail: Some("Its override is never; it was not when the request was made.".into()),
            hint: format!("SELECT writeguard.reject({id}, 'no approval lifts it');"),
        });
    }
    if asks.is_empty() || asks.iter().any(|ask| ask.mine) {
        return Ok(());
    }
    Err(approval::not_an_approver(id, login, asks))
}

const END: &str = "UPDATE writeguard.request SET state = $2, decided_by = $3, \
     decided_at = pg_catalog.clock_timestamp(), comment = $4 WHERE id OPERATOR(pg_catalog.=) $1::pg_catalog.int8";

fn end(request: &Request, state: &str, now: &Bound, comment: Option<&str>) -> Result<(), Error> {
    let arguments = [request.id.into(), state.into(), now.login.as_str().into(), comment.into()];
    owner::connect(|client| owner::rows(client, END, &arguments))?;
    Ok(())
}

fn reject(arguments: &Arguments) -> Returns {
    let comment: Option<String> = arguments.get(1);
    let request = lock(arguments)?;
    let now = Bound::now();
    request.check_open(&now)?;
    end(&request, "rejected", &now, comment.as_deref())?;
    record(Kind::Rejected, &request, None, comment)?;
    Ok(None)
}

/// For everybody who may call it, also for who made the request: ending one's own lets nothing through.
fn revoke(arguments: &Arguments) -> Returns {
    let comment: Option<String> = arguments.get(1);
    let request = lock(arguments)?;
    if !matches!(request.state.as_str(), "pending" | "approved") {
        let (detail, hint) = match request.state.as_str() {
            "spent" => (
                format!("Its write of up to {} was committed.", count(request.rows)),
                format!("SELECT * FROM writeguard.event WHERE approval = {} ORDER BY id;", request.id),
            ),
            _ => ("There is nothing left to revoke.".to_owned(), PENDING.to_owned()),
        };
        return Err(request.is_over(&detail, hint).into());
    }
    end(&request, "revoked", &Bound::now(), comment.as_deref())?;
    record(Kind::Revoked, &request, None, comment)?;
    Ok(None)
}

fn record(kind: Kind, request: &Request, max_rows: Option<i64>, comment: Option<String>) -> Result<(), Failure> {
    let mut event = Event::new(kind);
    event.tell_statement(&Excerpt::of(&request.statement));
    event.rows = Some(request.rows);
    event.row_limit = max_rows.and_then(|rows| u64::try_from(rows).ok());
    event.approval = Some(request.id);
    event.reason = comment;
    store::insert(&event)?;
    Ok(())
}

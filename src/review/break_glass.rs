//! `break_glass`: a token at once and without a second person, for who was granted that, and never without a record.
//!
//! The request is a row of the caller's transaction; its event is not. It is on disk before the token is handed out, and
//! stays whatever becomes of the transaction.

use pgrx::PgLogLevel;
use rules::error::Error;
use rules::token::statement::sha256;
use rules::words::{duration, shortened};

use super::decision::fresh_token;
use super::request::rehearse_and_store;
use crate::event::queue::{self, Record};
use crate::event::record::{Event, Kind};
use crate::pg::ereport::{log_line, tell};
use crate::pg::function::{Arguments, Returns, sql_function, value};
use crate::pg::owner;
use crate::session::actor::{Actor, shown_role};
use crate::session::{own_statement, rehearsing, settings, statement};

sql_function!(
    /// `break_glass(statement text, reason text, parameters text[]) → text`.
    writeguard_break_glass, pg_finfo_writeguard_break_glass, break_glass, by own_statement::call
);

/// Bytes of a reason that the client is shown again.
const MOST_SHOWN: usize = 8 * 1024;

const APPROVE: &str = "UPDATE writeguard.request SET state = 'approved', break_glass = true, decided_by = $2, \
     decided_at = pg_catalog.clock_timestamp(), token_sha256 = $3, \
     expires_at = pg_catalog.clock_timestamp() OPERATOR(pg_catalog.+) pg_catalog.make_interval(secs => $4::pg_catalog.int4) \
     WHERE id OPERATOR(pg_catalog.=) $1::pg_catalog.int8 RETURNING id::pg_catalog.text";

fn break_glass(arguments: &Arguments) -> Returns {
    if rehearsing::is_on() || statement::is_executing() {
        // What is rehearsed is taken back, but this event would stay.
        return Err(Error::ApprovalRefused {
            message: "the glass is not broken by what is reviewed".into(),
            detail: None,
            hint: "SELECT writeguard.break_glass('…', reason => 'why nobody else can be asked');".into(),
        }
        .into());
    }
    let parameters: Vec<Option<String>> = arguments.get(2).unwrap_or_default();
    let stored = rehearse_and_store(&arguments.text(0, "statement")?, arguments.get(1), &parameters)?;
    let token = fresh_token()?;
    let login = shown_role(Actor::current().login);
    let lifetime = settings::break_glass_lifetime();
    owner::connect(|client| {
        let hash = sha256(token.as_bytes());
        let arguments = [stored.id.into(), login.as_str().into(), hash.as_str().into(), lifetime.into()];
        owner::rows(client, APPROVE, &arguments)
    })?;
    let mut event = Event::new(Kind::BreakGlass);
    event.rows = Some(stored.rows);
    event.tell_statement(&stored.excerpt);
    event.approval = Some(stored.id);
    event.reason = Some(stored.reason.clone());
    let record = queue::record_or_withdraw(&event)?;
    if record != Record::Stored {
        let no_token = "no token was given, because the event that it must leave could not be stored in time";
        log_line(&format!("pg_writeguard: {no_token}, request {}", stored.id), None);
        if record == Record::Late {
            // Who finds the glass broken learns that it was for nothing.
            event = Event { kind: Kind::TokenRefused, reason: Some(no_token.into()), ..event };
            queue::record(&event);
        }
        return Err(Error::Unrecorded.into());
    }
    let valid = duration(u64::from(lifetime.unsigned_abs()) * 1_000_000);
    let message = format!("glass broken by login \"{login}\": a token without a second person, valid for {valid}");
    let detail = format!("Request {}: {}", stored.id, shortened(&stored.reason, MOST_SHOWN));
    tell(PgLogLevel::WARNING, &message, Some(&detail), None)?;
    value(token)
}

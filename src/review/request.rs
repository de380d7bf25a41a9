//! Requests: a statement that somebody wants approved is rehearsed and stored with what that found.

use std::collections::BTreeMap;

use rules::error::Error;
use rules::lexer::bounds;
use rules::token::fingerprint::Fingerprint;
use rules::token::statement::{StatementHash, normalize};
use rules::words::{Override, cut_from, literal, shortened};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::preview::tell_what_is_missing;
use super::{rehearse, run};
use crate::event::record::{Event, Kind};
use crate::event::statement::{hinted, lacks_values};
use crate::event::{memory, queue, rate_limit, store};
use crate::guard::rehearsal::account::{Line, Wanted};
use crate::guard::rehearsal::policy_verdicts::Concern;
use crate::pg::ereport::Failure;
use crate::pg::function::{Arguments, Returns, sql_function, value};
use crate::pg::{encoding, owner};
use crate::policy::schema_compat;
use crate::session::actor::{self, Actor, shown_role};
use crate::session::excerpt::{Excerpt, MOST_BYTES};
use crate::session::meaning::{self, Settings};
use crate::session::{own_statement, settings};
use crate::token::check::Bound;
use crate::token::definitions::Definitions;

sql_function!(
    /// `request(statement text, reason text, parameters text[]) → bigint`.
    writeguard_request, pg_finfo_writeguard_request, request, by own_statement::call
);
sql_function!(
    /// `request(event bigint, reason text) → bigint`.
    writeguard_request_event, pg_finfo_writeguard_request_event, request_event, by own_statement::call
);
sql_function!(
    /// `statement_hash(statement text, parameters text[]) → text`.
    writeguard_statement_hash, pg_finfo_writeguard_statement_hash, hash, any_length
);
sql_function!(
    /// `login() → text`.
    writeguard_login, pg_finfo_writeguard_login, login
);
sql_function!(
    /// `_queue_counters() → bigint[]`.
    writeguard_queue_counters, pg_finfo_writeguard_queue_counters, queue_counters
);

fn login(_arguments: &Arguments) -> Returns {
    value(shown_role(Actor::current().login))
}

fn queue_counters(_arguments: &Arguments) -> Returns {
    let now = queue::counters();
    let counters =
        [now.waiting, now.stored, now.late, now.in_log_only, rate_limit::left_out(), now.set_aside, now.unsent];
    value(counters.into_iter().map(|count| i64::try_from(count).unwrap_or(i64::MAX)).collect::<Vec<_>>())
}

fn hash(arguments: &Arguments) -> Returns {
    let text = arguments.bytes(0).ok_or_else(|| Error::invalid("statement must not be NULL", "statement => '…'"))?;
    let mut hash = StatementHash::default();
    encoding::in_utf8(&text[bounds(text)], |part| hash.text(part));
    for parameter in arguments.elements(1) {
        let Some(text) = parameter else {
            hash.null();
            continue;
        };
        hash.value();
        encoding::in_utf8(text, |part| hash.text(part));
    }
    value(hash.finish())
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
    whole: Option<bool>,
}

const REFUSED: &str = "SELECT pg_catalog.to_jsonb(r)::pg_catalog.text FROM ( \
     SELECT kind, login, statement, \
       pg_catalog.octet_length(statement) OPERATOR(pg_catalog.<=) $2::pg_catalog.int4 AS whole \
     FROM writeguard.event WHERE id OPERATOR(pg_catalog.=) $1::pg_catalog.int8) AS r";

fn request_event(arguments: &Arguments) -> Returns {
    let mine = "SELECT id, statement FROM writeguard.my_events WHERE kind = 'blocked' ORDER BY id DESC;";
    let event: i64 = arguments.get(0).ok_or_else(|| Error::invalid("event must not be NULL", mine))?;
    let most = i32::try_from(memory::statement_bytes()).unwrap_or(i32::MAX);
    let found = owner::connect(|client| owner::rows(client, REFUSED, &[event.into(), most.into()]))?;
    let refused = found.first().and_then(|json| serde_json::from_str::<Refused>(json).ok());
    // Somebody else's event and none at all look alike: who may not read events learns nothing here.
    let refused = refused
        .filter(|refused| refused.login == shown_role(Actor::current().login))
        .ok_or_else(|| Error::invalid(format!("event {event} is not a refusal of yours"), mine))?;
    if refused.kind != "blocked" {
        return Err(Error::invalid(format!("event {event} is not a refusal of yours"), mine).into());
    }
    let lacks = match refused.statement {
        None => "was not kept",
        Some(text) if refused.whole != Some(true) || cut_from(&text).is_some() => "was too long to be kept whole",
        Some(statement) if lacks_values(&statement) => "was kept without its values",
        Some(statement) if !encoding::is_exact(&statement) => "was kept with escapes for what is no letter",
        Some(statement) => return value(store_request(&statement, arguments.get(1), &[])?),
    };
    let again = "SELECT writeguard.request('…', reason => 'why this is right');";
    Err(Error::invalid(format!("the statement of event {event} {lacks}"), again).into())
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
    policies: &'a [String],
    search_path: &'a str,
    samples: Option<&'a RawValue>,
    settings: Settings,
    fingerprints: &'a BTreeMap<String, Fingerprint>,
    definitions: Definitions,
}

/// Without the settings and the rows where the extension is of 0.2.0 still.
fn insert() -> String {
    let later = if schema_compat::has_column_of(c"request", c"settings") {
        ", settings, fingerprints, definitions"
    } else {
        ""
    };
    let columns = "database, login, actor, acting_as, reason, statement, parameters, statement_sha256, rows, relations, \
                   policies, search_path, samples";
    format!(
        "INSERT INTO writeguard.request ({columns}{later}, expires_at) \
         SELECT {columns}{later}, \
           pg_catalog.clock_timestamp() OPERATOR(pg_catalog.+) pg_catalog.make_interval(secs => $2::pg_catalog.int4) \
         FROM pg_catalog.jsonb_populate_record(NULL::writeguard.request, $1::pg_catalog.jsonb) \
         RETURNING id::pg_catalog.text"
    )
}

/// Rows of each table and operation that a request shows before and after.
const SAMPLE: usize = 5;

/// The names of the policies that an approval is about: those that would refuse the statement and that a token lifts,
/// else those that the flag lifts; where none would refuse it now, all that a token lifts and that cover what it changes.
///
/// # Errors
/// WG007 where no approval helps, or none is needed.
fn to_be_lifted(concerns: &[Concern], statement: &str) -> Result<Vec<String>, Error> {
    // A policy of mode observe or warn refuses nothing, whatever its limits are.
    let concerns: Vec<&Concern> = concerns.iter().filter(|concern| concern.policy.policy.mode.refuses()).collect();
    let refusing = |override_: Override| {
        concerns.iter().find(move |concern| concern.refuses && concern.policy.policy.override_ == override_)
    };
    if let Some(Concern { policy, relation, operation, .. }) = refusing(Override::Never) {
        let name = &policy.policy.name;
        return Err(Error::Invalid {
            message: format!("no approval can lift policy \"{name}\""),
            detail: Some(format!("It refuses this {operation} of table \"{relation}\", and its override is never.")),
            hint: format!(
                "SELECT * FROM writeguard.effective({}, CURRENT_USER, '{operation}');",
                literal(&relation.to_sql())
            ),
        });
    }
    let names = |asked: &dyn Fn(&Concern) -> bool| -> Vec<String> {
        let mut names: Vec<String> = concerns
            .iter()
            .filter(|concern| asked(concern))
            .map(|concern| concern.policy.policy.name.clone())
            .collect();
        names.sort();
        names
    };
    let by_token = |concern: &Concern| concern.policy.policy.override_ == Override::Token;
    let lifted = [
        names(&|concern| concern.refuses && by_token(concern)),
        // The flag would do, but nobody has to go alone.
        names(&|concern| concern.refuses),
        names(&by_token),
    ];
    lifted.into_iter().find(|names| !names.is_empty()).ok_or_else(|| Error::Invalid {
        message: "the statement needs no approval".into(),
        detail: Some("No policy that an approval lifts covers what it changes.".into()),
        hint: hinted(&Excerpt::of(statement)),
    })
}

/// The rows to show, as an array with an object for each table and operation; none where there are none.
fn samples(lines: &[Line]) -> Option<Box<RawValue>> {
    let rows = |rows: &[String]| format!("[{}]", rows.join(","));
    let lines: Vec<String> = lines
        .iter()
        .filter(|line| !line.before.is_empty() || line.left_out > 0)
        .map(|line| {
            format!(
                r#"{{"relation":{},"operation":"{}","before":{},"after":{}{}}}"#,
                serde_json::Value::from(line.name.to_sql()),
                line.operation,
                rows(&line.before),
                rows(&line.after),
                if line.left_out > 0 { format!(r#","left_out":{}"#, line.left_out) } else { String::new() }
            )
        })
        .collect();
    if lines.is_empty() { None } else { RawValue::from_string(format!("[{}]", lines.join(","))).ok() }
}

fn hash_of(statement: &str, parameters: &[Option<String>]) -> String {
    let mut hash = StatementHash::default();
    encoding::in_utf8(&encoding::to_server(statement), |part| hash.text(part));
    for parameter in parameters {
        match parameter {
            None => hash.null(),
            Some(text) => {
                hash.value();
                encoding::in_utf8(&encoding::to_server(text), |part| hash.text(part));
            }
        }
    }
    hash.finish()
}

/// A request that was rehearsed and stored.
pub struct Stored {
    pub id: i64,
    /// Of the reviewed statement.
    pub excerpt: Excerpt,
    /// As far as an event tells it.
    pub reason: String,
    pub rows: u64,
}

fn store_request(statement: &str, reason: Option<String>, parameters: &[Option<String>]) -> Result<i64, Failure> {
    let stored = rehearse_and_store(statement, reason, parameters)?;
    let mut event = Event::new(Kind::Requested);
    event.rows = Some(stored.rows);
    event.tell_statement(&stored.excerpt);
    event.approval = Some(stored.id);
    event.reason = Some(stored.reason);
    store::insert(&event)?;
    Ok(stored.id)
}

/// Rehearses a statement and stores the request for it, which is pending.
///
/// # Errors
/// WG007 without a reason, and for a statement that is none, not of one kind or needs no approval; the statement's own
/// errors.
pub fn rehearse_and_store(
    statement: &str,
    reason: Option<String>,
    parameters: &[Option<String>],
) -> Result<Stored, Failure> {
    let again = "SELECT writeguard.request($$UPDATE orders SET … WHERE …$$, reason => 'why this is right');";
    let reason = reason.filter(|reason| !reason.trim().is_empty());
    let reason = reason.ok_or_else(|| Error::invalid("a request needs a reason", "reason => 'why this is right'"))?;
    let text = run::c_text(statement, again)?;
    // The part that a client which sends this text would run: what follows the semicolon is not of it.
    let statement = run::check(&text)?;
    let statement = normalize(&statement);
    let rehearsed = rehearse::rehearse(
        &text,
        parameters,
        Wanted { everything: false, sample: SAMPLE, respects_policies: true, most: u64::MAX, fingerprints: true },
    )?;
    let (relations, parameters) = (rehearsed.rows, rehearsed.parameters);
    if relations.is_empty() && !rehearsed.refused_without_rows {
        return Err(Error::Invalid {
            message: "the statement needs no approval".into(),
            detail: Some("Rehearsed, it changed no row of a table that a policy covers.".into()),
            hint: hinted(&Excerpt::of(statement)),
        }
        .into());
    }
    tell_what_is_missing(&rehearsed.account)?;
    let policies = to_be_lifted(&rehearsed.concerns, statement)?;
    let same_rows = |concern: &Concern| {
        let policy = &concern.policy.policy;
        policy.same_rows && policies.contains(&policy.name)
    };
    let fingerprints = if rehearsed.concerns.iter().any(same_rows) { rehearsed.fingerprints } else { BTreeMap::new() };
    let samples = samples(&rehearsed.account.lines);
    let bound = Bound::now();
    let new = New {
        database: &bound.database,
        login: &bound.login,
        actor: &bound.actor,
        acting_as: &bound.acting_as,
        reason: &reason,
        statement,
        parameters: &parameters,
        statement_sha256: &hash_of(statement, &parameters),
        rows: relations.values().sum(),
        relations: &relations,
        policies: &policies,
        search_path: &actor::search_path(),
        samples: samples.as_deref(),
        settings: meaning::now(),
        fingerprints: &fingerprints,
        definitions: Definitions::of(&rehearsed.met)?,
    };
    let json = serde_json::to_string(&new).unwrap_or_default();
    let lifetime = settings::request_lifetime();
    let id = owner::connect(|client| owner::rows(client, &insert(), &[owner::json(&json), lifetime.into()]))?;
    let id: i64 = id.first().and_then(|id| id.parse().ok()).unwrap_or_default();
    let reason = shortened(&reason, MOST_BYTES).into_owned();
    Ok(Stored { id, excerpt: Excerpt::of(statement), rows: new.rows, reason })
}

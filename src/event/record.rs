//! One event: the columns of `writeguard.event`, which are also the keys of its JSON in the server log. That one
//! names the database as well.

use core::ptr;
use std::borrow::Cow;

use pgrx::pg_sys;
use rules::words::shortened;
use serde::{Deserialize, Serialize};

use super::memory;
use crate::pg::encoding;
use crate::pg::log_line::Line;
use crate::session::actor::{self, Actor};
use crate::session::excerpt::MOST_BYTES;
use crate::session::settings;

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    Blocked,
    Warned,
    Observed,
    Overridden,
    ExpectationFailed,
    Requested,
    Approved,
    Rejected,
    Revoked,
    TokenRefused,
    BreakGlass,
    PolicyChanged,
    Uncovered,
    Disabled,
    Undone,
}

impl Kind {
    /// All of them, each at the place of its number.
    pub const ALL: [Kind; 15] = [
        Kind::Blocked,
        Kind::Warned,
        Kind::Observed,
        Kind::Overridden,
        Kind::ExpectationFailed,
        Kind::Requested,
        Kind::Approved,
        Kind::Rejected,
        Kind::Revoked,
        Kind::TokenRefused,
        Kind::BreakGlass,
        Kind::PolicyChanged,
        Kind::Uncovered,
        Kind::Disabled,
        Kind::Undone,
    ];

    /// The kind as the table has it.
    pub fn word(self) -> String {
        serde_json::to_value(self).ok().and_then(|word| word.as_str().map(str::to_owned)).unwrap_or_default()
    }

    /// The kind that the table calls so.
    pub fn of_word(word: &str) -> Option<Self> {
        serde_json::from_value(word.into()).ok()
    }

    /// The first words of the log line.
    fn headline(self) -> &'static str {
        match self {
            Kind::Blocked => "write refused",
            Kind::Warned => "write past a limit, with a warning",
            Kind::Observed => "write past a limit, observed",
            Kind::Overridden => "write past a limit on purpose",
            Kind::ExpectationFailed => "write refused, because another number of rows was expected",
            Kind::Requested => "approval requested",
            Kind::Approved => "request approved",
            Kind::Rejected => "request rejected",
            Kind::Revoked => "request revoked",
            Kind::TokenRefused => "approval token refused",
            Kind::BreakGlass => "GLASS BROKEN, a token without a second person",
            Kind::PolicyChanged => "policy changed",
            Kind::Uncovered => "DDL on a covered table that no policy limits",
            Kind::Undone => "change undone",
            Kind::Disabled => "covered write while writeguard.enabled is off",
        }
    }
}

/// An event on its way to the table.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Event {
    pub occurred_at: String,
    pub kind: Kind,
    pub policy: Option<String>,
    pub mode: Option<String>,
    pub login: String,
    pub role: String,
    pub application: Option<String>,
    pub client: Option<String>,
    pub pid: i32,
    pub xid: Option<String>,
    pub operation: Option<String>,
    pub relation: Option<String>,
    pub scope: Option<String>,
    pub row_limit: Option<u64>,
    pub rows: Option<u64>,
    pub rows_estimated: Option<u64>,
    pub statement: Option<String>,
    pub query_id: Option<i64>,
    pub approval: Option<i64>,
    pub reason: Option<String>,
    /// For the server log, which is that of all databases; no column.
    #[serde(default)]
    pub database: Option<String>,
}

/// A point in time as text that reads the same whatever the session's time zone and date style are.
pub fn in_utc(time: pg_sys::TimestampTz) -> String {
    let mut parts = pg_sys::pg_tm::default();
    let mut microseconds = 0;
    // SAFETY: without a time zone to fill in the parts are those of UTC.
    unsafe {
        pg_sys::timestamp2tm(time, ptr::null_mut(), &mut parts, &mut microseconds, ptr::null_mut(), ptr::null_mut());
    }
    let pg_sys::pg_tm { tm_year, tm_mon, tm_mday, tm_hour, tm_min, tm_sec, .. } = parts;
    format!("{tm_year:04}-{tm_mon:02}-{tm_mday:02} {tm_hour:02}:{tm_min:02}:{tm_sec:02}.{microseconds:06}+00")
}

/// The number of the running transaction, where it has one already.
pub fn top_xid() -> Option<String> {
    // SAFETY: reads the transaction state.
    let xid = unsafe { pg_sys::GetTopFullTransactionIdIfAny().value };
    (xid != 0).then(|| xid.to_string())
}

impl Event {
    /// An event of this session, now; what it is about is for the caller to fill in.
    pub fn new(kind: Kind) -> Self {
        let actor = Actor::current();
        // SAFETY: these read the clock and statics.
        let (now, pid, query_id) =
            unsafe { (pg_sys::GetCurrentTimestamp(), pg_sys::MyProcPid, pg_sys::pgstat_get_my_query_id()) };
        Self {
            occurred_at: in_utc(now),
            kind,
            policy: None,
            mode: None,
            login: actor::role_name(actor.login),
            role: actor::role_name(actor.role()),
            application: actor::application(),
            client: actor::client(),
            pid,
            xid: top_xid(),
            operation: None,
            relation: None,
            scope: None,
            row_limit: None,
            rows: None,
            rows_estimated: None,
            statement: None,
            // PostgreSQL 18 has it signed, the others unsigned.
            query_id: Some(i64::from_ne_bytes(query_id.to_ne_bytes())).filter(|id| *id != 0),
            approval: None,
            reason: None,
            database: actor::database(),
        }
    }

    /// The event happens now, though its parts were put together before.
    pub fn happens_now(&mut self) {
        // SAFETY: reads the clock.
        self.occurred_at = in_utc(unsafe { pg_sys::GetCurrentTimestamp() });
        self.xid = top_xid().or_else(|| self.xid.take());
    }

    /// The event as JSON, in letters that this database can show and store. The strings inside are text, so it cannot fail.
    pub fn json(&self) -> String {
        let json = serde_json::to_string(self).unwrap_or_default();
        match encoding::shown_json(&json) {
            Cow::Borrowed(_) => json,
            Cow::Owned(shown) => shown,
        }
    }

    /// The event as JSON for the table.
    pub fn stored_json(&self) -> String {
        self.shortened(MOST_BYTES).json()
    }

    /// The event as JSON that the queue has room for beside others: the longer its texts are, the less of them is left.
    pub fn queued_json(&self) -> String {
        let most = settings::event_queue_bytes() / 2;
        let mut bytes = memory::statement_bytes();
        loop {
            let json = self.shortened(bytes).json();
            if json.len() <= most || bytes == 0 {
                return json;
            }
            bytes /= 2;
        }
    }

    /// Writes the event to the server log.
    pub fn log(&self) {
        self.line().write();
    }

    /// The event's line in the server log: one to read, and the whole event as JSON in its DETAIL.
    pub fn line(&self) -> Line {
        let event = self.shortened(MOST_BYTES);
        let mut line = format!("pg_writeguard: {}", event.kind.headline());
        if let Some(policy) = &event.policy {
            line.push_str(&format!(", policy \"{policy}\""));
        }
        if let (Some(operation), Some(relation)) = (&event.operation, &event.relation) {
            line.push_str(&format!(", {operation} of \"{relation}\""));
        }
        if let (Kind::ExpectationFailed, Some(expected)) = (event.kind, event.row_limit) {
            line.push_str(&format!(", expected {expected}"));
        } else if let (Some(limit), Some(scope)) = (event.row_limit, &event.scope) {
            line.push_str(&format!(", limit {limit} per {scope}"));
        }
        if let Some(rows) = event.rows {
            line.push_str(&format!(", rows {rows}"));
        }
        line.push_str(&format!(", login \"{}\"", event.login));
        if let Some(reason) = &event.reason {
            line.push_str(&format!(": {}", shortened(reason, MOST_IN_LINE)));
        }
        Line::new(&line, Some(&event.json()))
    }

    /// The same event without its statement.
    pub fn without_statement(&self) -> Self {
        Self { statement: None, ..self.clone() }
    }

    /// The same event with a statement and a reason of at most so many bytes each, and names that are not endless either.
    pub fn shortened(&self, bytes: usize) -> Self {
        let cut = |text: &Option<String>, bytes| text.as_ref().map(|text| shortened(text, bytes).into_owned());
        Self {
            statement: cut(&self.statement, bytes),
            reason: cut(&self.reason, bytes),
            policy: cut(&self.policy, MOST_OF_NAME),
            relation: cut(&self.relation, MOST_OF_NAME),
            ..self.clone()
        }
    }
}

/// Bytes of a policy's or a relation's name in an event.
const MOST_OF_NAME: usize = 1024;
/// Bytes of a reason in the line that is read; its DETAIL has more.
const MOST_IN_LINE: usize = 8 * 1024;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_has_its_place_and_its_word() {
        for (place, kind) in Kind::ALL.into_iter().enumerate() {
            assert_eq!(kind as usize, place);
            assert_eq!(Kind::of_word(&kind.word()), Some(kind));
        }
        assert_eq!(Kind::BreakGlass.word(), "break_glass");
        assert_eq!(Kind::of_word("Blocked"), None);
    }
}

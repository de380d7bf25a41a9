//! What this library refuses and what it calls a caller's mistake: one enum, each variant with its SQLSTATE, its
//! numbers in DETAIL, and in HINT the next command to type.
//!
//! Pure: the frames in `pg` raise these.

use thiserror::Error as ThisError;

use crate::words::{Deed, Operation, RelationName, count, literal};

/// What is to be said where the library's shared memory is missing.
pub const NO_SHARED_MEMORY: &str = "pg_writeguard has no shared memory";
/// Why that is.
pub const WHY_NO_SHARED_MEMORY: &str =
    "A library that is loaded after it has set shmem_startup_hook and does not call the one before.";
/// What helps.
pub const LOAD_IT_LAST: &str =
    "Put pg_writeguard behind all others in shared_preload_libraries, and restart the server.";

/// How somebody gets past a limit on purpose, as far as the policy and the session allow.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WayOut {
    /// `override = 'never'`: not at all.
    Never,
    /// `override = 'flag'` and the flag is not set.
    SetFlag,
    /// `override = 'token'` and no token is at hand.
    Request {
        /// Whether the refusal's event, once it is stored, says all that there is to request.
        by_event: bool,
        statement: String,
        /// How many parameters the client bound to it; their values are nobody else's business.
        parameters: usize,
    },
    /// A token is set, but not the flag that goes with it.
    FlagForToken,
}

impl WayOut {
    /// The next command to type for a write of `relation` that was refused with that event.
    fn hint(&self, operation: Operation, relation: &RelationName, event: Option<i64>) -> String {
        match self {
            WayOut::Never => format!(
                "No override lifts this policy; see SELECT * FROM writeguard.effective({}, \
                 CURRENT_USER, '{}');",
                literal(&relation.to_sql()),
                operation.word()
            ),
            WayOut::SetFlag => "SET writeguard.override = on;".to_owned(),
            WayOut::FlagForToken => "A token is set, but not the flag: SET writeguard.override = on;".to_owned(),
            // A request rehearses what it is for, and DDL is not rehearsed.
            WayOut::Request { .. } if operation == Operation::Drop => format!(
                "Where the rows may go: SELECT writeguard.request({}, reason => 'why this is right'); DDL on rows \
                 that stay is for a superuser: SET writeguard.enabled = off;",
                literal(&format!("TRUNCATE {}", relation.to_sql()))
            ),
            WayOut::Request { by_event, statement, parameters } => {
                request_call(event.filter(|_| *by_event), statement, *parameters)
            }
        }
    }
}

/// The call that asks for the approval of a statement with so many parameters; by its refusal's event where that says
/// all.
pub fn request_call(event: Option<i64>, statement: &str, parameters: usize) -> String {
    if let (Some(event), 0) = (event, parameters) {
        return format!("SELECT writeguard.request(event => {event}, reason => 'why this is right');");
    }
    let values: Vec<String> = (1..=parameters).map(|n| format!("'value of ${n}'")).collect();
    let parameters = match values.as_slice() {
        [] => String::new(),
        values => format!(", parameters => ARRAY[{}]", values.join(", ")),
    };
    format!("SELECT writeguard.request({}, reason => 'why this is right'{parameters});", literal(statement))
}

/// An error of this library.
#[derive(Debug, Clone, PartialEq, ThisError)]
pub enum Error {
    /// Any other of these that is an event, whose number ends the message: many clients show nothing else.
    #[error("{error} (event {event})")]
    Recorded { event: i64, error: Box<Error> },
    /// WG001, or WG005 for TRUNCATE and DDL: past a limit of a policy.
    #[error("{deed} of table \"{relation}\" exceeds the limit of {} per {per}", count(*.limit))]
    Limit {
        deed: Deed,
        relation: RelationName,
        policy: String,
        /// What the limit is counted over.
        per: String,
        limit: u64,
        /// A further sentence on where the limit comes from, or when there is room again.
        note: Option<String>,
        /// The planner's estimate; it decides nothing.
        estimate: Option<u64>,
        way_out: WayOut,
    },
    /// WG003: more than one row outside a transaction block.
    #[error("{deed} of more than one row of table \"{relation}\" outside a transaction block")]
    NeedsBlock { deed: Deed, relation: RelationName, policy: String },
    /// WG004: another number of rows than the client said beforehand.
    #[error("{operation} changed {}, but {expected} {} expected", count(*.rows), if *.expected == 1 { "was" } else { "were" })]
    Expectation { operation: &'static str, relation: Option<RelationName>, expected: u64, rows: u64 },
    /// WG002: a whole table would be scanned where a policy wants a condition.
    #[error("{operation} of table \"{relation}\" has nothing to narrow it")]
    Unnarrowed {
        operation: Operation,
        relation: RelationName,
        policy: String,
        /// The planner's estimate of the table's rows.
        estimate: Option<u64>,
        way_out: WayOut,
    },
    /// WG006: a token that does not open this write.
    #[error("approval token refused: {reason}")]
    TokenRefused {
        /// The request it was approved with, where that is known.
        request: Option<i64>,
        reason: String,
        detail: Option<String>,
        hint: String,
        relation: Option<RelationName>,
    },
    /// WG006: a request that cannot be executed, or not now.
    #[error("execution of request {request} refused: {reason}")]
    ExecutionRefused {
        request: i64,
        reason: String,
        detail: Option<String>,
        hint: String,
        relation: Option<RelationName>,
    },
    /// WG006: a decision about a request that this person may not take, or not any more.
    #[error("{message}")]
    ApprovalRefused { message: String, detail: Option<String>, hint: String },
    /// WG006: a function of an approval that something else than the client's own statement calls. `reason` ends a
    /// sentence.
    #[error("writeguard.{function} acts only as the client's own statement")]
    NotOwnStatement { function: String, reason: String, hint: String },
    /// WG007: a caller's mistake in a policy, request or token.
    #[error("{message}")]
    Invalid { message: String, detail: Option<String>, hint: String },
    /// WG007 for what is no public key. It may be a secret, so nothing repeats it.
    #[error("{message}")]
    UnfitKey { message: String, detail: Option<String>, hint: String },
    /// WG009: rows are not as the change left them.
    #[error("{} of change {change} {} changed again since", count(*.rows), if *.rows == 1 { "was" } else { "were" })]
    ChangedSince {
        change: i64,
        rows: u64,
        /// The first of them: table and key.
        first: Option<(RelationName, String)>,
    },
    /// WG009: rows that could be put back and were not.
    #[error("{} of change {change} could not be written back", count(*.rows))]
    NotWritten {
        change: i64,
        rows: u64,
        relation: RelationName,
        /// The first of them.
        key: Option<String>,
        /// What does not allow it, a sentence; none: it was written, or was to be, and is another now.
        why: Option<String>,
    },
    /// 42501: this person may not see what it is about.
    #[error("{message}")]
    NotAllowed { message: String, detail: String, hint: String },
    /// WG008: the guard cannot decide, so it refuses.
    #[error("cannot decide about this write: {reason}")]
    Undecided { reason: String, hint: String, relation: Option<RelationName> },
    /// 57014: a rehearsal has seen enough. Whoever rehearses takes it for that; only code that catches a cancel sees it.
    #[error("the rehearsal ends after {}", count(*.rows))]
    Stopped { rows: u64 },
    /// WG008: what must not happen without a record, and has none.
    #[error("the glass was not broken: its event could not be stored within \"writeguard.event_timeout\"")]
    Unrecorded,
    /// 55000: the library is not preloaded.
    #[error("pg_writeguard must be loaded via \"shared_preload_libraries\"")]
    NotPreloaded { hint: String },
    /// 55000: it is, and its shared memory was not set up.
    #[error("{}", NO_SHARED_MEMORY)]
    Unattached,
}

/// What a policy with mode warn let pass.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LetPass {
    pub deed: Deed,
    pub relation: RelationName,
    pub policy: String,
    pub over: Over,
}

/// Which of a policy's limits a write went past.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Over {
    /// So many rows, and what they are counted over.
    Limit { limit: u64, per: String },
    /// More than one row outside a transaction block.
    Block,
    /// No condition.
    Where,
}

impl LetPass {
    /// The SQLSTATE of the error that it would have been.
    pub fn sqlstate(&self) -> &'static str {
        match (&self.over, self.deed.operation) {
            (Over::Limit { .. }, Operation::Truncate | Operation::Drop) => "WG005",
            (Over::Limit { .. }, _) => "WG001",
            (Over::Block, _) => "WG003",
            (Over::Where, _) => "WG002",
        }
    }

    /// The warning, with the number of rows where it is known.
    pub fn message(&self, rows: Option<u64>) -> String {
        let Self { deed, relation, .. } = self;
        let rows = rows.map_or_else(|| "rows that cannot be counted".to_owned(), count);
        match &self.over {
            Over::Limit { limit, per } => {
                format!("{deed} of table \"{relation}\" exceeds the limit of {} per {per}: {rows}", count(*limit))
            }
            Over::Block => {
                format!("{deed} of more than one row of table \"{relation}\" outside a transaction block: {rows}")
            }
            Over::Where => format!("{deed} of table \"{relation}\" has nothing to narrow it: {rows}"),
        }
    }

    /// Why it was let pass.
    pub fn detail(&self) -> String {
        format!("Policy \"{}\" has mode warn; with mode enforce it would have refused this.", self.policy)
    }

    /// The next command to type.
    pub fn hint(in_block: bool) -> &'static str {
        if in_block {
            "ROLLBACK; (unless this is what was meant)"
        } else {
            "SELECT id, policy, rows, row_limit FROM writeguard.my_events WHERE kind = 'warned' ORDER BY id DESC;"
        }
    }
}

impl Error {
    /// A caller's mistake: what is wrong, and what would be right.
    pub fn invalid(message: impl Into<String>, hint: impl Into<String>) -> Self {
        Error::Invalid { message: message.into(), detail: None, hint: hint.into() }
    }

    /// The same as the event that it is, where that was stored in time and one by one.
    #[must_use]
    pub fn recorded(self, event: Option<i64>) -> Self {
        match event {
            Some(event) => Error::Recorded { event, error: Box::new(self) },
            None => self,
        }
    }

    /// The five characters of the SQLSTATE.
    pub fn sqlstate(&self) -> &'static str {
        match self {
            Error::Recorded { error, .. } => error.sqlstate(),
            Error::Limit { deed, .. } if matches!(deed.operation, Operation::Truncate | Operation::Drop) => "WG005",
            Error::Limit { .. } => "WG001",
            Error::NeedsBlock { .. } => "WG003",
            Error::Expectation { .. } => "WG004",
            Error::Unnarrowed { .. } => "WG002",
            Error::TokenRefused { .. }
            | Error::ExecutionRefused { .. }
            | Error::ApprovalRefused { .. }
            | Error::NotOwnStatement { .. } => "WG006",
            Error::Invalid { .. } | Error::UnfitKey { .. } => "WG007",
            Error::Undecided { .. } | Error::Unrecorded => "WG008",
            Error::ChangedSince { .. } | Error::NotWritten { .. } => "WG009",
            Error::NotAllowed { .. } => "42501",
            Error::NotPreloaded { .. } | Error::Unattached => "55000",
            Error::Stopped { .. } => "57014",
        }
    }

    /// The numbers, as a sentence.
    pub fn detail(&self) -> Option<String> {
        match self {
            Error::Recorded { error, .. } => error.detail(),
            Error::Limit { policy, per, limit, note, estimate, deed, .. } => {
                let estimate = match (deed.operation, estimate) {
                    (Operation::Truncate | Operation::Drop, Some(rows)) => {
                        format!(" (the table has about {})", count(*rows))
                    }
                    (_, Some(rows)) => format!(" (the planner expected about {})", count(*rows)),
                    (_, None) => String::new(),
                };
                Some(format!(
                    "Policy \"{policy}\" allows {} per {per}, and this is number {}{estimate}; nothing was changed.{}",
                    count(*limit),
                    limit.saturating_add(1),
                    note.as_ref().map(|note| format!(" {note}")).unwrap_or_default()
                ))
            }
            Error::NeedsBlock { policy, .. } => Some(format!(
                "Policy \"{policy}\" allows 1 row outside a transaction block, and this is number 2; nothing was changed."
            )),
            Error::Expectation { operation, relation, expected, rows } => {
                let table = relation.as_ref().map(|relation| format!(" of table \"{relation}\"")).unwrap_or_default();
                Some(format!(
                    "writeguard.expect_rows asked for {}, and this {operation}{table} would have changed {rows}; nothing \
                     was changed.",
                    count(*expected)
                ))
            }
            Error::Unnarrowed { policy, estimate, .. } => {
                let estimate =
                    estimate.map_or_else(String::new, |rows| format!(" (the planner expected about {})", count(rows)));
                Some(format!(
                    "Policy \"{policy}\" asks for a condition on the table's columns, and without one the whole table \
                     would be scanned{estimate}; nothing was changed."
                ))
            }
            Error::TokenRefused { detail, .. }
            | Error::ExecutionRefused { detail, .. }
            | Error::ApprovalRefused { detail, .. }
            | Error::Invalid { detail, .. }
            | Error::UnfitKey { detail, .. } => detail.clone(),
            Error::NotOwnStatement { reason, .. } => Some(format!("Here {reason}; nothing was done.")),
            Error::Unrecorded => Some("There is no token, and no request.".into()),
            Error::ChangedSince { rows, first, .. } => {
                let first = first.as_ref().map_or_else(String::new, |(relation, key)| {
                    format!(" The first is {key} of table \"{relation}\".")
                });
                Some(format!(
                    "{} not as the change left {}, so nothing was undone.{first}",
                    if *rows == 1 { "1 row is".to_owned() } else { format!("{rows} rows are") },
                    if *rows == 1 { "it" } else { "them" },
                ))
            }
            Error::NotWritten { rows, relation, key, why, .. } => {
                let first = key.as_ref().map_or_else(String::new, |key| format!(" The first is {key}."));
                Some(match (why, key) {
                    (Some(why), Some(key)) => {
                        format!("The first is {key} of table \"{relation}\": {why} Nothing was undone.")
                    }
                    (Some(why), None) => format!("Table \"{relation}\": {why} Nothing was undone."),
                    (None, _) => format!(
                        "A trigger or a rule of table \"{relation}\" suppressed or changed {}, or another session \
                         inserted a row with the same key meanwhile; nothing was undone.{first}",
                        count(*rows)
                    ),
                })
            }
            Error::NotAllowed { detail, .. } => Some(detail.clone()),
            Error::Unattached => Some(WHY_NO_SHARED_MEMORY.to_owned()),
            Error::Undecided { .. } | Error::NotPreloaded { .. } | Error::Stopped { .. } => None,
        }
    }

    /// The next command to type.
    pub fn hint(&self) -> Option<String> {
        self.hint_with(None)
    }

    fn hint_with(&self, event: Option<i64>) -> Option<String> {
        Some(match self {
            Error::Recorded { event, error } => return error.hint_with(Some(*event)),
            Error::Stopped { .. } => return None,
            Error::Limit { relation, deed, way_out, .. } => way_out.hint(deed.operation, relation, event),
            Error::Unnarrowed { relation, operation, way_out, .. } => {
                format!("Add a WHERE that names the rows. {}", way_out.hint(*operation, relation, event))
            }
            Error::NeedsBlock { .. } => {
                "BEGIN; (then the statement again, and COMMIT when its number of rows is right)".to_owned()
            }
            Error::Expectation { rows, .. } => match i32::try_from(*rows) {
                Ok(rows) => format!("If {rows} is right: SET writeguard.expect_rows = {rows};"),
                Err(_) => "If that is right: RESET writeguard.expect_rows;".to_owned(),
            },
            Error::ChangedSince { change, .. } | Error::NotWritten { change, .. } => format!(
                "SELECT * FROM writeguard.undo_conflicts({change}); or, to leave these rows as they are and undo the \
                 rest: SELECT * FROM writeguard.undo({change}, on_conflict => 'skip');"
            ),
            Error::NotAllowed { hint, .. }
            | Error::TokenRefused { hint, .. }
            | Error::ExecutionRefused { hint, .. }
            | Error::ApprovalRefused { hint, .. }
            | Error::NotOwnStatement { hint, .. }
            | Error::Invalid { hint, .. }
            | Error::UnfitKey { hint, .. }
            | Error::Undecided { hint, .. }
            | Error::NotPreloaded { hint } => hint.clone(),
            Error::Unattached => LOAD_IT_LAST.to_owned(),
            Error::Unrecorded => "SELECT * FROM writeguard.check_setup();".to_owned(),
        })
    }

    /// Whether the statement may hold a secret that has no business in the server log.
    pub fn hides_statement(&self) -> bool {
        match self {
            Error::Recorded { error, .. } => error.hides_statement(),
            Error::UnfitKey { .. } => true,
            Error::NotOwnStatement { function, .. } => function.ends_with("trust_key"),
            _ => false,
        }
    }

    /// The request that the error is about.
    pub fn request(&self) -> Option<i64> {
        match self {
            Error::Recorded { error, .. } => error.request(),
            Error::TokenRefused { request, .. } => *request,
            Error::ExecutionRefused { request, .. } => Some(*request),
            _ => None,
        }
    }

    /// Schema and name of the table that the error is about.
    pub fn table(&self) -> Option<(&str, &str)> {
        match self {
            Error::Recorded { error, .. } => error.table(),
            Error::Limit { relation, .. }
            | Error::NeedsBlock { relation, .. }
            | Error::NotWritten { relation, .. }
            | Error::Unnarrowed { relation, .. } => Some((&relation.schema, &relation.name)),
            Error::ChangedSince { first, .. } => {
                first.as_ref().map(|(relation, _)| (relation.schema.as_str(), relation.name.as_str()))
            }
            Error::Expectation { relation, .. }
            | Error::TokenRefused { relation, .. }
            | Error::ExecutionRefused { relation, .. }
            | Error::Undecided { relation, .. } => {
                relation.as_ref().map(|name| (name.schema.as_str(), name.name.as_str()))
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_tells_numbers_and_the_next_command() {
        let error = Error::Limit {
            deed: Operation::Update.into(),
            relation: RelationName::new("public", "orders"),
            policy: "p".into(),
            per: "statement".into(),
            limit: 1,
            note: None,
            estimate: None,
            way_out: WayOut::Request { by_event: true, statement: "UPDATE orders".into(), parameters: 0 },
        };
        assert_eq!(error.to_string(), "update of table \"public.orders\" exceeds the limit of 1 row per statement");
        assert!(error.hint().unwrap().contains("request('UPDATE orders'"), "no event, and none is named");
        assert_eq!(error.clone().recorded(None), error);
        let error = error.recorded(Some(7));
        assert_eq!(
            error.to_string(),
            "update of table \"public.orders\" exceeds the limit of 1 row per statement (event 7)"
        );
        assert_eq!(error.sqlstate(), "WG001");
        assert_eq!(error.table(), Some(("public", "orders")));
        assert!(error.hint().unwrap().contains("event => 7"));
        assert!(error.detail().unwrap().contains("allows 1 row per statement, and this is number 2;"));
    }

    #[test]
    fn a_warning_gives_both_numbers() {
        let warning = |operation: Operation, over| LetPass {
            deed: operation.into(),
            relation: RelationName::new("public", "t"),
            policy: "p".into(),
            over,
        };
        let limit = Over::Limit { limit: 10, per: "1 h".into() };
        let of_limit = warning(Operation::Truncate, limit);
        assert_eq!(
            of_limit.message(Some(12)),
            "truncate of table \"public.t\" exceeds the limit of 10 rows per 1 h: 12 rows"
        );
        assert_eq!(of_limit.sqlstate(), "WG005");
        let block = warning(Operation::Delete, Over::Block);
        assert_eq!(
            block.message(Some(2)),
            "delete of more than one row of table \"public.t\" outside a transaction block: 2 rows"
        );
        assert_eq!((block.sqlstate(), warning(Operation::Update, Over::Where).sqlstate()), ("WG003", "WG002"));
    }

    #[test]
    fn an_expectation_gives_both_numbers() {
        let error = |expected, rows| {
            let relation = Some(RelationName::new("public", "orders"));
            Error::Expectation { operation: "update", relation, expected, rows }
        };
        assert_eq!(error(3, 5).to_string(), "update changed 5 rows, but 3 were expected");
        assert_eq!(error(1, 0).to_string(), "update changed 0 rows, but 1 was expected");
        assert_eq!(error(0, 1).to_string(), "update changed 1 row, but 0 were expected");
        assert_eq!(error(3, 5).sqlstate(), "WG004");
        assert_eq!(error(3, 5).table(), Some(("public", "orders")));
        assert_eq!(error(3, 5).hint().unwrap(), "If 5 is right: SET writeguard.expect_rows = 5;");
        assert_eq!(error(3, 1 << 40).hint().unwrap(), "If that is right: RESET writeguard.expect_rows;");
        let detail = "writeguard.expect_rows asked for 1 row, and this update of table \"public.orders\" would have \
                      changed 5; nothing was changed.";
        assert_eq!(error(1, 5).detail().unwrap(), detail);
    }

    #[test]
    fn a_missing_condition_is_asked_for_first() {
        let error = Error::Unnarrowed {
            operation: Operation::Delete,
            relation: RelationName::new("public", "orders"),
            policy: "p".into(),
            estimate: Some(1000),
            way_out: WayOut::SetFlag,
        };
        assert_eq!(error.to_string(), "delete of table \"public.orders\" has nothing to narrow it");
        assert_eq!(error.sqlstate(), "WG002");
        assert_eq!(error.table(), Some(("public", "orders")));
        assert!(
            error.detail().unwrap().contains("scanned (the planner expected about 1000 rows); nothing was changed.")
        );
        assert_eq!(error.hint().unwrap(), "Add a WHERE that names the rows. SET writeguard.override = on;");
    }

    #[test]
    fn a_request_needs_the_parameters_that_the_event_does_not_hold() {
        let way_out = WayOut::Request { by_event: true, statement: "DELETE FROM t WHERE a = $1".into(), parameters: 1 };
        let error = Error::Limit {
            deed: Operation::Delete.into(),
            relation: RelationName::new("public", "t"),
            policy: "p".into(),
            per: "statement".into(),
            limit: 1,
            note: None,
            estimate: None,
            way_out,
        };
        let hint = error.hint().unwrap();
        assert!(hint.contains("request('DELETE FROM t WHERE a = $1',"), "{hint}");
        assert!(hint.contains("parameters => ARRAY['value of $1']"), "{hint}");
    }
}

//! A policy as a document: the columns of `writeguard.policy`, which are also the keys of its JSON.

use serde::{Deserialize, Serialize};

use super::limit::{Limit, Limits};
use super::pattern::Pattern;
use super::schedule::Schedule;
use crate::error::Error;
use crate::words::{Mode, Operation, Override, duration};

/// One row of `writeguard.policy`, as a caller gives it: nothing is checked yet.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Document {
    pub name: Option<String>,
    #[serde(default = "all_tables")]
    pub tables: Vec<Option<String>>,
    #[serde(default = "everybody")]
    pub roles: Vec<Option<String>>,
    pub application: Option<String>,
    pub client: Option<String>,
    pub schedule: Option<String>,
    #[serde(default = "rows_vanish")]
    pub operations: Vec<Option<String>>,
    pub max_rows: Option<i64>,
    pub max_rows_per_transaction: Option<i64>,
    pub rate_rows: Option<i64>,
    pub rate_interval: Option<String>,
    /// The same in microseconds; whoever makes the document asks PostgreSQL.
    #[serde(skip)]
    pub rate_microseconds: Option<i64>,
    pub max_fraction: Option<f64>,
    pub require_where: Option<bool>,
    pub require_transaction: Option<bool>,
    #[serde(default = "enforce")]
    pub mode: Option<String>,
    #[serde(rename = "override", default = "token")]
    pub override_: Option<String>,
    pub approvers: Option<String>,
    #[serde(default = "one")]
    pub min_approvals: Option<i32>,
    pub undo: Option<String>,
    /// The same in microseconds; whoever makes the document asks PostgreSQL.
    #[serde(skip)]
    pub undo_microseconds: Option<i64>,
    pub comment: Option<String>,
    #[serde(default = "yes")]
    pub samples: bool,
    #[serde(default)]
    pub always: bool,
    pub columns: Option<Vec<Option<String>>>,
    #[serde(default = "yes")]
    pub same_rows: bool,
}

fn yes() -> bool {
    true
}
fn all_tables() -> Vec<Option<String>> {
    vec![Some("*.*".into())]
}
fn everybody() -> Vec<Option<String>> {
    vec![Some("public".into())]
}
fn rows_vanish() -> Vec<Option<String>> {
    ["update", "delete", "truncate"].map(|word| Some(word.into())).into()
}
fn enforce() -> Option<String> {
    Some("enforce".into())
}
fn token() -> Option<String> {
    Some("token".into())
}
fn one() -> Option<i32> {
    Some(1)
}

/// A policy that the guard can work with.
#[derive(Debug, Clone, PartialEq)]
pub struct Policy {
    pub name: String,
    pub tables: Vec<Pattern>,
    /// Role names as the catalog has them; `public` is everybody.
    pub roles: Vec<String>,
    /// A LIKE pattern that the application's name has to match.
    pub application: Option<String>,
    /// The network that the client's address has to be in, as PostgreSQL prints it.
    pub client: Option<String>,
    pub schedule: Option<Schedule>,
    /// Bits of [`Operation::bit`].
    pub operations: u8,
    pub max_rows: Option<u64>,
    pub max_rows_per_transaction: Option<u64>,
    pub rate: Option<RowRate>,
    /// Between 0 and 1.
    pub max_fraction: Option<f64>,
    pub require_transaction: Option<bool>,
    pub require_where: Option<bool>,
    pub mode: Mode,
    pub override_: Override,
    /// The role whose members may approve; none: whoever may call `approve`.
    pub approvers: Option<String>,
    /// Distinct people who must approve; at least 1.
    pub min_approvals: u32,
    pub comment: Option<String>,
    /// How long rows are kept as they were before an overridden write; none: not at all.
    pub undo: Option<Keep>,
    /// Whether a request shows some rows of its tables, before and after.
    pub samples: bool,
    /// A cap: no other policy sets its limits aside.
    pub always: bool,
    /// Of updates only those count that assign one of these columns, as the catalog has their names, each once and in order;
    /// none: all count.
    pub columns: Option<Vec<String>>,
    /// Whether an approval is bound to which rows were reviewed, beyond their number.
    pub same_rows: bool,
}

/// How long something is kept.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Keep {
    pub microseconds: i64,
    /// As PostgreSQL prints the interval.
    pub text: String,
}

/// The interval that `rate_interval` has when nobody says otherwise, as PostgreSQL prints it.
pub const DEFAULT_RATE_INTERVAL: &str = "01:00:00";

/// Ten years in microseconds.
const LONGEST_INTERVAL: u64 = 10 * 366 * 24 * 3_600 * 1_000_000;

/// So many rows in an interval.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RowRate {
    pub rows: u64,
    /// In microseconds.
    pub interval: u64,
}

/// Longest name of a policy in bytes; it has to fit into an index and into a notification.
const LONGEST_NAME: usize = 255;

impl Policy {
    /// Whether any number of rows is too large for it.
    pub fn is_limited(&self) -> bool {
        self.max_rows.is_some()
            || self.max_rows_per_transaction.is_some()
            || self.rate.is_some()
            || self.max_fraction.is_some()
            || self.wants_transaction()
    }

    /// Whether more than one row has to be in a transaction block.
    pub fn wants_transaction(&self) -> bool {
        self.require_transaction == Some(true)
    }

    /// Whether a whole table needs a condition.
    pub fn wants_where(&self) -> bool {
        self.require_where == Some(true)
    }

    /// Whether a limit that it states asks for anything: that no WHERE is needed does not.
    pub fn asks(&self, limit: Limit) -> bool {
        match limit {
            Limit::Where => self.wants_where(),
            Limit::Transaction => self.wants_transaction(),
            _ => true,
        }
    }

    /// The limits that it states.
    pub fn states(&self) -> Limits {
        let stated = |limit: &Limit| match limit {
            Limit::Rows => self.max_rows.is_some(),
            Limit::RowsPerTransaction => self.max_rows_per_transaction.is_some(),
            Limit::Rate => self.rate.is_some(),
            Limit::Fraction => self.max_fraction.is_some(),
            Limit::Where => self.require_where.is_some(),
            Limit::Transaction => self.require_transaction.is_some(),
        };
        Limit::ALL.into_iter().filter(stated).collect()
    }

    /// The same policy with only these of its limits.
    pub fn only(&self, limits: Limits) -> Self {
        let kept = |limit| limits.contains(limit);
        Self {
            max_rows: self.max_rows.filter(|_| kept(Limit::Rows)),
            max_rows_per_transaction: self.max_rows_per_transaction.filter(|_| kept(Limit::RowsPerTransaction)),
            rate: self.rate.filter(|_| kept(Limit::Rate)),
            max_fraction: self.max_fraction.filter(|_| kept(Limit::Fraction)),
            require_where: self.require_where.filter(|_| kept(Limit::Where)),
            require_transaction: self.require_transaction.filter(|_| kept(Limit::Transaction)),
            ..self.clone()
        }
    }

    /// What it says of a limit that it states, as people read it.
    pub fn shown(&self, limit: Limit) -> String {
        let number = |rows: Option<u64>| rows.map_or_else(String::new, |rows| rows.to_string());
        match limit {
            Limit::Rows => number(self.max_rows),
            Limit::RowsPerTransaction => number(self.max_rows_per_transaction),
            Limit::Rate => {
                self.rate.map_or_else(String::new, |rate| format!("{} per {}", rate.rows, duration(rate.interval)))
            }
            Limit::Fraction => self.max_fraction.map_or_else(String::new, |part| part.to_string()),
            Limit::Where => self.wants_where().to_string(),
            Limit::Transaction => self.wants_transaction().to_string(),
        }
    }

    /// How strict it is about a limit that it states: the smaller the stricter.
    pub fn strictness(&self, limit: Limit) -> f64 {
        let number = |rows: Option<u64>| rows.map_or(f64::INFINITY, |rows| rows as f64);
        let wanted = |wanted: bool| if wanted { 0.0 } else { 1.0 };
        match limit {
            Limit::Rows => number(self.max_rows),
            Limit::RowsPerTransaction => number(self.max_rows_per_transaction),
            Limit::Rate => self.rate.map_or(f64::INFINITY, |rate| rate.rows as f64 / rate.interval as f64),
            Limit::Fraction => self.max_fraction.unwrap_or(f64::INFINITY),
            Limit::Where => wanted(self.wants_where()),
            Limit::Transaction => wanted(self.wants_transaction()),
        }
    }

    /// Whether it depends on more than table, role and operation.
    pub fn is_conditional(&self) -> bool {
        self.application.is_some() || self.client.is_some() || self.schedule.is_some()
    }
}

impl Policy {
    /// A policy that exempts says that and nothing else: whoever reads it relies on what stands there.
    fn check_exempt(&self) -> Result<(), Error> {
        if self.mode != Mode::Exempt {
            return Ok(());
        }
        if let Some(limit) = self.states().iter().next() {
            return Err(Error::Invalid {
                message: format!("a policy of mode exempt has no limits, but {} is given", limit.column()),
                detail: Some("It sets aside the limits of less specific policies, and has none itself.".into()),
                hint: format!("mode => 'enforce' (or leave {} out)", limit.column()),
            });
        }
        if self.always {
            return Err(Error::Invalid {
                message: "a policy of mode exempt has no limits that hold always".into(),
                detail: Some(
                    "It sets aside the limits of less specific policies, but for those that hold always.".into(),
                ),
                hint: "leave always out".into(),
            });
        }
        if self.application.is_some() {
            return Err(Error::Invalid {
                message: "a policy of mode exempt cannot depend on the application".into(),
                detail: Some("Clients choose that name, so such a policy sets nothing aside.".into()),
                hint: "roles => '{batch}' (or client => '10.0.0.0/8')".into(),
            });
        }
        Ok(())
    }
}

impl Document {
    /// Checks everything that can be checked without a catalog.
    ///
    /// # Errors
    /// WG007 for a value that is wrong by itself.
    pub fn check(&self) -> Result<Policy, Error> {
        let name = self.name.as_deref().unwrap_or_default();
        if name.trim().is_empty() {
            return Err(Error::invalid(
                "policy name must not be empty",
                "SELECT writeguard.set_policy('orders-guard', …);",
            ));
        }
        if name.len() > LONGEST_NAME {
            return Err(Error::invalid(
                format!("policy name is longer than {LONGEST_NAME} bytes"),
                "SELECT writeguard.set_policy('orders-guard', …);",
            ));
        }
        let tables = elements("tables", &self.tables, "{public.orders}")?
            .iter()
            .map(|element| Pattern::parse(element))
            .collect::<Result<Vec<_>, _>>()?;
        let roles = elements("roles", &self.roles, "{public}")?;
        let operations = elements("operations", &self.operations, "{update,delete,truncate}")?
            .iter()
            .map(|word| match Operation::parse(word) {
                Some(operation) => Ok(operation.bit()),
                None => Err(Error::invalid(
                    format!("unknown operation \"{word}\""),
                    "operations => '{update,delete,truncate,drop}'",
                )),
            })
            .try_fold(0, |bits, bit| bit.map(|bit| bits | bit))?;
        let word = self.mode.as_deref().unwrap_or_default();
        let mode = Mode::parse(word).ok_or_else(|| {
            Error::invalid(format!("unknown mode \"{word}\""), "mode => 'enforce' (or 'warn', 'observe', 'exempt')")
        })?;
        let override_ = match self.override_.as_deref().unwrap_or_default() {
            "never" => Override::Never,
            "flag" => Override::Flag,
            "token" => Override::Token,
            other => {
                return Err(Error::invalid(
                    format!("unknown override \"{other}\""),
                    "override => 'token' (or 'flag', or 'never')",
                ));
            }
        };
        let policy = Policy {
            name: name.to_owned(),
            tables,
            roles,
            application: self.application.as_deref().map(like_pattern).transpose()?,
            client: self.client.clone(),
            schedule: self.schedule.as_deref().map(Schedule::parse).transpose()?,
            operations,
            max_rows: limit("max_rows", self.max_rows)?,
            max_rows_per_transaction: limit("max_rows_per_transaction", self.max_rows_per_transaction)?,
            rate: self.rate()?,
            max_fraction: self.fraction()?,
            require_transaction: self.require_transaction,
            require_where: self.require_where,
            mode,
            override_,
            approvers: self.approvers(override_)?,
            min_approvals: self.min_approvals(override_)?,
            comment: self.comment.clone(),
            undo: self.undo()?,
            samples: self.samples,
            always: self.always,
            columns: self.columns(operations)?,
            same_rows: self.same_rows,
        };
        policy.check_exempt()?;
        Ok(policy)
    }

    fn columns(&self, operations: u8) -> Result<Option<Vec<String>>, Error> {
        let Some(columns) = &self.columns else { return Ok(None) };
        let mut columns = elements("columns", columns, "{is_deleted}")?;
        if operations != Operation::Update.bit() {
            return Err(Error::Invalid {
                message: "columns are of updates only, but the operations have others".into(),
                detail: Some("A DELETE, a TRUNCATE or a DROP takes whole rows.".into()),
                hint: "operations => '{update}' (or leave columns out)".into(),
            });
        }
        columns.sort_unstable();
        columns.dedup();
        Ok(Some(columns))
    }

    fn rate(&self) -> Result<Option<RowRate>, Error> {
        let interval = self.rate_microseconds.and_then(|interval| u64::try_from(interval).ok());
        let Some(interval) = interval.filter(|interval| (1..=LONGEST_INTERVAL).contains(interval)) else {
            return Err(Error::invalid(
                "rate_interval must be longer than nothing and at most 10 years",
                "rate_interval => '1 hour'",
            ));
        };
        Ok(limit("rate_rows", self.rate_rows)?.map(|rows| RowRate { rows, interval }))
    }

    fn fraction(&self) -> Result<Option<f64>, Error> {
        match self.max_fraction {
            Some(fraction) if !(0.0..=1.0).contains(&fraction) => Err(Error::invalid(
                format!("max_fraction must be between 0 and 1, but is {fraction}"),
                "max_fraction => 0.1 (a tenth of each table's rows, never below 10 rows)",
            )),
            fraction => Ok(fraction),
        }
    }

    fn approvers(&self, override_: Override) -> Result<Option<String>, Error> {
        match self.approvers.as_deref() {
            Some(role) if role.trim().is_empty() => {
                Err(Error::invalid("approvers must not be empty", "approvers => 'dba' (a role; NULL: all of them)"))
            }
            Some(_) if override_ != Override::Token => Err(without_token("approvers", override_)),
            role => Ok(role.map(str::to_owned)),
        }
    }

    fn min_approvals(&self, override_: Override) -> Result<u32, Error> {
        match self.min_approvals.and_then(|people| u32::try_from(people).ok()) {
            Some(1) => Ok(1),
            Some(people) if people > 1 && override_ == Override::Token => Ok(people),
            Some(people) if people > 1 => Err(without_token("min_approvals", override_)),
            _ => Err(Error::invalid("min_approvals must be at least 1", "min_approvals => 2")),
        }
    }

    fn undo(&self) -> Result<Option<Keep>, Error> {
        let Some(text) = self.undo.clone() else { return Ok(None) };
        let microseconds = self.undo_microseconds.unwrap_or(0);
        if microseconds <= 0 {
            return Err(Error::invalid("undo must be longer than nothing", "undo => '7 days'"));
        }
        Ok(Some(Keep { microseconds, text }))
    }
}

/// Nobody is asked where no token is: a DBA who set that would rely on something that is not there.
fn without_token(column: &str, override_: Override) -> Error {
    Error::Invalid {
        message: format!("{column} needs the override token, but the override is {}", override_.word()),
        detail: Some("Only a policy that a token lifts has approvals.".into()),
        hint: format!("override => 'token' (or leave {column} out)"),
    }
}

/// A LIKE pattern that is complete.
fn like_pattern(pattern: &str) -> Result<String, Error> {
    let escapes = pattern.bytes().rev().take_while(|letter| *letter == b'\\').count();
    if escapes % 2 == 1 {
        return Err(Error::invalid(
            format!("application pattern \"{pattern}\" ends with its escape character"),
            "application => 'psql%' (a LIKE pattern on application_name)",
        ));
    }
    Ok(pattern.to_owned())
}

/// The elements of an array column, none of them NULL or empty, and at least one.
fn elements(column: &str, values: &[Option<String>], example: &str) -> Result<Vec<String>, Error> {
    let hint = || format!("{column} => '{example}'");
    if values.is_empty() {
        return Err(Error::invalid(format!("{column} must not be an empty array"), hint()));
    }
    values
        .iter()
        .map(|value| match value.as_deref() {
            Some(value) if !value.trim().is_empty() => Ok(value.to_owned()),
            _ => Err(Error::invalid(format!("{column} must not contain an empty or NULL element"), hint())),
        })
        .collect()
}

fn limit(column: &str, value: Option<i64>) -> Result<Option<u64>, Error> {
    value
        .map(|rows| {
            u64::try_from(rows).map_err(|_| {
                Error::invalid(
                    format!("{column} must not be negative, but is {rows}"),
                    format!("{column} => 100 (0 means not one row, NULL means no limit)"),
                )
            })
        })
        .transpose()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn document(json: &str) -> Document {
        Document { rate_microseconds: Some(3_600_000_000), ..serde_json::from_str(json).unwrap() }
    }

    #[test]
    fn defaults_are_those_of_the_contract() {
        let policy = document(r#"{"name": "p"}"#).check().unwrap();
        assert_eq!(policy.tables, [Pattern::parse("*.*").unwrap()]);
        assert_eq!(policy.roles, ["public"]);
        let all = Operation::Update.bit() | Operation::Delete.bit() | Operation::Truncate.bit();
        assert_eq!(policy.operations, all);
        assert_eq!((policy.max_rows, policy.max_rows_per_transaction), (None, None));
        assert_eq!((policy.require_where, policy.require_transaction), (None, None));
        assert_eq!((policy.always, &policy.columns, policy.same_rows), (false, &None, true));
        assert_eq!((policy.mode, policy.override_), (Mode::Enforce, Override::Token));
        assert_eq!((policy.approvers, policy.min_approvals), (None, 1));
    }

    #[test]
    fn mistakes_are_named() {
        for (json, sqlstate, word) in [
            (r#"{"name": " "}"#, "WG007", "name"),
            (r#"{"name": "p", "max_rows": -1}"#, "WG007", "-1"),
            (r#"{"name": "p", "mode": "strict"}"#, "WG007", "strict"),
            (r#"{"name": "p", "mode": null}"#, "WG007", "mode"),
            (r#"{"name": "p", "override": "perhaps"}"#, "WG007", "perhaps"),
            (r#"{"name": "p", "operations": ["insert"]}"#, "WG007", "insert"),
            (r#"{"name": "p", "operations": []}"#, "WG007", "operations"),
            (r#"{"name": "p", "tables": [null]}"#, "WG007", "tables"),
            (r#"{"name": "p", "roles": [""]}"#, "WG007", "roles"),
            (r#"{"name": "p", "undo": "0"}"#, "WG007", "undo"),
            (r#"{"name": "p", "min_approvals": 0}"#, "WG007", "min_approvals"),
            (r#"{"name": "p", "min_approvals": null}"#, "WG007", "min_approvals"),
            (r#"{"name": "p", "min_approvals": -3}"#, "WG007", "min_approvals"),
            (r#"{"name": "p", "min_approvals": 2, "override": "flag"}"#, "WG007", "override is flag"),
            (r#"{"name": "p", "approvers": "dba", "override": "never"}"#, "WG007", "override is never"),
            (r#"{"name": "p", "approvers": " "}"#, "WG007", "approvers"),
            (r#"{"name": "p", "mode": "exempt", "max_rows": 5}"#, "WG007", "max_rows"),
            (r#"{"name": "p", "mode": "exempt", "require_where": false}"#, "WG007", "require_where"),
            (r#"{"name": "p", "mode": "exempt", "always": true}"#, "WG007", "always"),
            (r#"{"name": "p", "mode": "exempt", "application": "psql"}"#, "WG007", "application"),
            (r#"{"name": "p", "columns": ["a"]}"#, "WG007", "operations"),
            (r#"{"name": "p", "columns": [], "operations": ["update"]}"#, "WG007", "columns"),
            (r#"{"name": "p", "columns": [null], "operations": ["update"]}"#, "WG007", "columns"),
        ] {
            let error = document(json).check().unwrap_err();
            assert_eq!(error.sqlstate(), sqlstate, "{json}");
            assert!(error.to_string().contains(word), "{json}: {error}");
        }
    }

    #[test]
    fn unknown_keys_are_refused() {
        assert!(serde_json::from_str::<Document>(r#"{"name": "p", "max_row": 5}"#).is_err());
    }
}

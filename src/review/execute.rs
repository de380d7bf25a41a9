//! `execute`: runs the reviewed statement of one's own approved request, and keeps what it did only where that is what
//! was reviewed.
//!
//! The run is a statement of its own for the guard, with the reviewed text and under the grant of its request, which
//! needs no flag, lifts nothing but this run, and ends with it. The names in the text are looked up in the search_path of
//! the rehearsal. Spending the request, the run and its events are part of the caller's transaction.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::CString;

use pgrx::{PgLogLevel, pg_sys};
use rules::error::Error;
use rules::token::grant::Grant;
use rules::words::{Serial, count};

use super::run::{Rows, Run, all_given, values};
use crate::event::rate_limit;
use crate::event::record::{Event, Kind};
use crate::guard::limits::charge;
use crate::guard::verdict::{decide, overrides, reviewed_objects, reviewed_rows};
use crate::pg::encoding::to_c;
use crate::pg::ereport::{Failure, tell};
use crate::pg::ffi;
use crate::pg::function::{Arguments, Returns, sql_function};
use crate::session::actor::Review;
use crate::session::excerpt::Excerpt;
use crate::session::{own_statement, rehearsing, settings, statement};
use crate::token::check::{self, Reviewed};

sql_function!(
    /// `execute(request bigint) → setof jsonb`.
    writeguard_execute, pg_finfo_writeguard_execute, execute, by own_statement::call
);

const MINE: &str = "SELECT id, state, statement, expires_at FROM writeguard.my_requests;";

fn execute(arguments: &Arguments) -> Returns {
    let id: i64 = arguments.get(0).ok_or_else(|| Error::invalid("request must not be NULL", MINE))?;
    let (store, desc) = arguments.rows_of_one_column();
    may_run(id)?;
    let (grant, reviewed) = check::spend_own(id).or_else(|error| refuse(error, statement_now()))?;
    let rows = run(&grant, &reviewed, Rows { store, desc })?;
    let total = rows.iter().map(|(_, rows)| rows).sum();
    let each: Vec<String> = rows.iter().map(|(name, rows)| format!("{} in \"{name}\"", count(*rows))).collect();
    let detail = (!each.is_empty()).then(|| format!("{}.", each.join(", ")));
    tell(PgLogLevel::NOTICE, &format!("executed request {id}: {} changed", count(total)), detail.as_deref(), None)?;
    Ok(None)
}

/// The client's statement, which is no reviewed one.
fn statement_now() -> Excerpt {
    statement::current();
    statement::excerpt()
}

/// Whether a request may be executed here at all.
///
/// # Errors
/// WG006 inside of another reviewed statement, and where somebody else's function is run with the rights of its owner
/// only; WG008 while the guard does not count.
fn may_run(id: i64) -> Result<(), Failure> {
    let refused = |reason: &str| Error::ExecutionRefused {
        request: id,
        reason: reason.to_owned(),
        detail: None,
        hint: format!("SELECT * FROM writeguard.execute({id});"),
        relation: None,
    };
    if rehearsing::is_on() {
        // It is taken back, and nothing of it is an event.
        return Err(refused("it cannot be a part of what is reviewed").into());
    }
    if statement::is_executing() {
        return refuse(refused("it cannot be a part of what is executed"), statement_now());
    }
    // SAFETY: reads a static.
    if unsafe { pg_sys::InSecurityRestrictedOperation() } {
        return refuse(refused("it cannot be a part of maintenance or of a view's rows"), statement_now());
    }
    if !settings::enabled() {
        return Err(Error::Undecided {
            reason: "rows are not counted while the guard is switched off".into(),
            hint: "SET writeguard.enabled = on;".into(),
            relation: None,
        }
        .into());
    }
    Ok(())
}

/// The guard sees a run for as long as this lives.
struct Running(Serial, #[expect(dead_code, reason = "ends with it")] Review);

impl Running {
    fn begin(grant: &Grant, reviewed: &Reviewed) -> Self {
        let serial = statement::begin_execution(reviewed.statement.clone(), reviewed.parameters.len());
        // SAFETY: reads a static.
        let level = unsafe { ffi::GetCurrentTransactionNestLevel() };
        overrides::begin_execution(grant.clone(), serial, level);
        Self(serial, Review::begin())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        overrides::end_execution(self.0);
        statement::end_execution();
    }
}

/// Runs the reviewed statement; gives the rows that it changed by qualified table name.
///
/// # Errors
/// WG006 where it changed other numbers of rows than reviewed; the statement's own errors, untouched.
fn run(grant: &Grant, reviewed: &Reviewed, rows: Rows) -> Result<Vec<(String, u64)>, Failure> {
    // What the transaction has deferred so far is none of the reviewed statement's, and must not fill up its numbers.
    // SAFETY: a plain old frame over raw calls; its error aborts the (sub)transaction.
    unsafe { ffi::protect(|| Run::fire_deferred())? };
    let running = Running::begin(grant, reviewed);
    let text = to_c(&reviewed.statement);
    let settings: Vec<(CString, CString)> =
        reviewed.settings().iter().map(|(name, value)| (to_c(name), to_c(value))).collect();
    let values = values(&reviewed.parameters);
    let wanted = {
        // SAFETY: `Run::execute` is a plain old frame over raw calls; its error aborts the (sub)transaction.
        unsafe {
            let mut run = Run::new(&text, &values, &mut [], pg_sys::CurrentMemoryContext);
            ffi::protect(|| run.execute(&settings, rows)).map_err(|error| error.in_query(&text))?;
            run.wanted
        }
    };
    all_given(wanted, values.len())?;
    // Nothing is deferred any more, as in the rehearsal: what the statement sets off has happened.
    let changed = charge::rows_by_table(running.0);
    let others = reviewed_rows::others(grant, &[running.0]);
    let unknown = grant.relations.as_ref().and_then(|reviewed| reviewed_objects::not_reviewed(running.0, reviewed));
    let again = decide::request_again();
    drop(running);
    let request = grant.source.request().unwrap_or_default();
    if let Some(difference) = difference(grant, &changed) {
        return refuse(difference.error(request, again), Excerpt::of(&reviewed.statement));
    }
    if let Some(relation) = unknown {
        let error = Error::ExecutionRefused {
            request,
            reason: reviewed_objects::NOT_REVIEWED.into(),
            detail: Some(reviewed_objects::told(&relation, request)),
            hint: again,
            relation: Some(relation),
        };
        return refuse(error, Excerpt::of(&reviewed.statement));
    }
    if let Some(others) = others {
        let error = Error::ExecutionRefused {
            request,
            reason: "it would change other rows than were reviewed".into(),
            detail: Some(others.told(request)),
            hint: again,
            relation: others.relation,
        };
        return refuse(error, Excerpt::of(&reviewed.statement));
    }
    Ok(changed)
}

/// Records the refusal of an execution, and gives it.
fn refuse<T>(error: Error, excerpt: Excerpt) -> Result<T, Failure> {
    let mut event = Event::new(Kind::TokenRefused);
    event.tell_statement(&excerpt);
    Err(rate_limit::record_refusal(event, error))
}

/// What makes a run another one than the reviewed one.
#[derive(Debug, PartialEq, Eq)]
struct Difference {
    /// A table's qualified name, rows as reviewed, rows as changed.
    tables: Vec<(String, u64, u64)>,
    /// The approver's own maximum, and rows in all.
    total: Option<(u64, u64)>,
}

impl Difference {
    fn error(&self, request: i64, hint: String) -> Error {
        let mut parts: Vec<String> = self
            .tables
            .iter()
            .map(|(name, reviewed, now)| {
                let reviewed = if *reviewed == 0 { "no row".to_owned() } else { count(*reviewed) };
                format!("{reviewed} in \"{name}\", and would now change {now}")
            })
            .collect();
        if let Some((max_rows, total)) = self.total {
            parts.push(format!("at most {} in all, and would now change {total}", count(max_rows)));
        }
        Error::ExecutionRefused {
            request,
            reason: "it would change another number of rows than was reviewed".into(),
            detail: Some(format!("Request {request} was approved for {}; nothing was changed.", parts.join(", for "))),
            hint,
            relation: None,
        }
    }
}

/// How the rows that a run changed differ from what was approved: each table's number must be the reviewed one; where
/// the approver gave a maximum, the tables must be reviewed ones and their rows together within it.
fn difference(grant: &Grant, changed: &[(String, u64)]) -> Option<Difference> {
    let changed: BTreeMap<&str, u64> = changed.iter().map(|(name, rows)| (name.as_str(), *rows)).collect();
    let names: BTreeSet<&str> =
        grant.rows.iter().flatten().map(|(name, _)| name.as_str()).chain(changed.keys().copied()).collect();
    let tables: Vec<_> = names
        .into_iter()
        .map(|name| (name, grant.reviewed(name).unwrap_or(0), changed.get(name).copied().unwrap_or(0)))
        .filter(|(name, reviewed, now)| match grant.max_rows {
            Some(_) => *now > 0 && grant.reviewed(name).is_none(),
            None => reviewed != now,
        })
        .map(|(name, reviewed, now)| (name.to_owned(), reviewed, now))
        .collect();
    let total: u64 = changed.values().sum();
    let total = grant.max_rows.filter(|max_rows| total > *max_rows).map(|max_rows| (max_rows, total));
    (!tables.is_empty() || total.is_some()).then_some(Difference { tables, total })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(rows: &[(&str, u64)]) -> Vec<(String, u64)> {
        rows.iter().map(|(name, rows)| ((*name).to_owned(), *rows)).collect()
    }

    fn grant(reviewed: &[(&str, u64)], max_rows: Option<u64>) -> Grant {
        Grant {
            source: rules::token::grant::Source::Request(7),
            rows: Some(rows(reviewed).into_iter().collect()),
            max_rows,
            fingerprints: BTreeMap::new(),
            relations: None,
            fires_late: false,
        }
    }

    #[test]
    fn the_reviewed_numbers_are_no_difference() {
        for max_rows in [None, Some(5), Some(9)] {
            let grant = grant(&[("a", 2), ("b", 3)], max_rows);
            assert_eq!(difference(&grant, &rows(&[("b", 3), ("a", 2)])), None);
        }
        assert_eq!(difference(&grant(&[], None), &[]), None);
    }

    #[test]
    fn more_and_fewer_and_other_tables_are() {
        let grant = grant(&[("a", 2), ("b", 3)], None);
        let tables = |changed: &[(&str, u64)]| difference(&grant, &rows(changed)).unwrap().tables;
        assert_eq!(tables(&[("a", 3), ("b", 3)]), [("a".to_owned(), 2, 3)]);
        assert_eq!(tables(&[("a", 2)]), [("b".to_owned(), 3, 0)]);
        assert_eq!(tables(&[("a", 2), ("b", 3), ("c", 1)]), [("c".to_owned(), 0, 1)]);
        assert_eq!(tables(&[]).len(), 2);
    }

    #[test]
    fn the_approvers_maximum_is_for_all_reviewed_tables_together() {
        let grant = grant(&[("a", 2), ("b", 3)], Some(4));
        assert_eq!(difference(&grant, &rows(&[("a", 4)])), None);
        assert_eq!(difference(&grant, &[]), None);
        assert_eq!(difference(&grant, &rows(&[("a", 2), ("b", 3)])).unwrap().total, Some((4, 5)));
        assert_eq!(difference(&grant, &rows(&[("c", 1)])).unwrap().tables, [("c".to_owned(), 0, 1)]);
    }

    #[test]
    fn both_numbers_are_told() {
        let error = difference(&grant(&[("a", 2)], None), &rows(&[("a", 1)])).unwrap().error(7, String::new());
        let detail = "Request 7 was approved for 2 rows in \"a\", and would now change 1; nothing was changed.";
        assert_eq!(error.detail().unwrap(), detail);
        assert_eq!(error.sqlstate(), "WG006");
        let error = difference(&grant(&[("a", 2)], Some(1)), &rows(&[("a", 2)])).unwrap().error(7, String::new());
        let detail = "Request 7 was approved for at most 1 row in all, and would now change 2; nothing was changed.";
        assert_eq!(error.detail().unwrap(), detail);
    }
}

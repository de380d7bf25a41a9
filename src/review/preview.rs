//! `preview`: what a statement would change, told to whoever asks.

use pgrx::{IntoDatum, PgLogLevel, pg_sys};
use rules::error::Error;
use rules::policy::model::Policy;
use rules::words::{Mode, count, counted};
use rustc_hash::FxHashMap;

use super::{rehearse, run};
use crate::guard::rehearsal::account::{Account, Line, Wanted};
use crate::guard::rehearsal::policy_verdicts::Concern;
use crate::pg::ereport::{Failure, tell};
use crate::pg::function::{Arguments, Returns, jsonb, sql_function, text};
use crate::policy::table::Revision;
use crate::session::settings;

sql_function!(
    /// `preview(statement text, sample integer) → setof …`: a row for each table and operation.
    writeguard_preview, pg_finfo_writeguard_preview, preview
);

/// Most rows of each table and operation that a preview shows.
const MOST_SHOWN: i32 = 1_000;

fn preview(arguments: &Arguments) -> Returns {
    let sample: i32 = arguments.get(1).unwrap_or_default();
    if !(0..=MOST_SHOWN).contains(&sample) {
        return Err(Error::invalid(format!("sample must be from 0 to {MOST_SHOWN}"), "sample => 5").into());
    }
    let again = "SELECT * FROM writeguard.preview($$UPDATE orders SET … WHERE …$$);";
    let statement = run::c_text(&arguments.text(0, "statement")?, again)?;
    run::check(&statement)?;
    let wanted = Wanted {
        everything: true,
        respects_policies: false,
        sample: usize::try_from(sample).unwrap_or(0),
        most: settings::preview_max_rows(),
        fingerprints: false,
    };
    let rehearsed = rehearse::rehearse(&statement, &[], wanted)?;
    tell_what_is_missing(&rehearsed.account)?;
    let stopped = rehearsed.account.stopped;
    let refusing = refusing(&rehearsed.concerns);
    arguments.give_rows(rehearsed.account.lines.into_iter().map(|line| {
        let said = verdict(&line, &refusing);
        [
            text(&line.name.to_sql()),
            text(line.operation),
            i64::try_from(line.rows).unwrap_or(i64::MAX).into_datum(),
            stopped.into_datum(),
            said.limit.and_then(|rows| i64::try_from(rows).ok()).into_datum(),
            text(said.verdict),
            said.policy.and_then(text),
            array(&line.before, line.left_out),
            array(&line.after, line.left_out),
        ]
    }))
}

/// What the policies say of one table and operation.
struct Said<'a> {
    verdict: &'static str,
    policy: Option<&'a str>,
    limit: Option<u64>,
}

/// The concerns of policies that would refuse, with their places, by the policies' revisions.
fn refusing(concerns: &[Concern]) -> FxHashMap<Revision, (usize, &Concern)> {
    let refusing = concerns.iter().enumerate().filter(|(_, concern)| concern.refuses);
    refusing.map(|(place, concern)| (concern.policy.revision, (place, concern))).collect()
}

/// The policy that would refuse, with the limit that is passed; where none would, the one with the smallest limit. Tables
/// that share a budget share its verdict.
fn verdict<'a>(line: &'a Line, refusing: &FxHashMap<Revision, (usize, &'a Concern)>) -> Said<'a> {
    let strictness = |concern: &Concern| match concern.policy.policy.mode {
        Mode::Enforce => 0,
        Mode::Warn => 1,
        Mode::Observe | Mode::Exempt => 2,
    };
    let passed = line.policies.iter().filter_map(|policy| refusing.get(&policy.revision));
    let passed = passed.min_by_key(|(place, concern)| (strictness(concern), concern.limit.unwrap_or(0), *place));
    if let Some((_, concern)) = passed {
        let verdict = match concern.policy.policy.mode {
            Mode::Enforce => "refuse",
            Mode::Warn => "warn",
            Mode::Observe | Mode::Exempt => "observe",
        };
        return Said { verdict, policy: Some(&concern.policy.policy.name), limit: concern.limit };
    }
    let limit = |policy: &Policy| {
        policy.max_rows.or(policy.max_rows_per_transaction).or_else(|| policy.rate.map(|rate| rate.rows))
    };
    let nearest = line.policies.iter().min_by_key(|policy| limit(&policy.policy).unwrap_or(u64::MAX));
    Said {
        verdict: "pass",
        policy: nearest.map(|policy| policy.policy.name.as_str()),
        limit: nearest.and_then(|policy| limit(&policy.policy)),
    }
}

/// An array of rows, with a word about those that were left out; NULL where there is none.
fn array(rows: &[String], left_out: u64) -> Option<pg_sys::Datum> {
    let note = (left_out > 0).then(|| format!("\"{}\"", words_of(left_out)));
    if rows.iter().all(|row| row == "null") && (note.is_none() || !rows.is_empty()) {
        return None;
    }
    let mut array = String::from("[");
    for (place, row) in rows.iter().chain(&note).enumerate() {
        array.push_str(if place > 0 { "," } else { "" });
        array.push_str(row);
    }
    array.push(']');
    jsonb(&array)
}

fn words_of(left_out: u64) -> String {
    format!("{} left out", count(left_out))
}

/// Tells the client what there was no room for.
///
/// # Errors
/// What interrupts the session meanwhile.
pub fn tell_what_is_missing(account: &Account) -> Result<(), Failure> {
    let left_out: u64 = account.lines.iter().map(|line| line.left_out).sum();
    let mut parts = Vec::new();
    if left_out > 0 {
        parts.push(words_of(left_out));
    }
    if account.cut > 0 {
        parts.push(format!("{} shown by size", counted(account.cut, "value")));
    }
    if !parts.is_empty() {
        let most = settings::preview_max_bytes();
        let message = format!("not all rows are shown in full: {}", parts.join(", "));
        let detail = format!("Rows take {most} bytes in all at most (writeguard.preview_max_bytes).");
        tell(PgLogLevel::NOTICE, &message, Some(&detail), None)?;
    }
    Ok(())
}

//! `preview`: what a statement would change, told to whoever asks.

use std::ffi::CString;

use pgrx::{IntoDatum, direct_function_call, pg_sys};

use super::{rehearse, run};
use crate::error::Error;
use crate::ffi;
use crate::function::{Arguments, Returns, sql_function};
use crate::guard::tally::Wanted;
use crate::settings;

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
    let text = arguments.text(0, "statement")?;
    let again = "SELECT * FROM writeguard.preview($$UPDATE orders SET … WHERE …$$);";
    let text = CString::new(text).map_err(|_| Error::invalid("malformed statement", again))?;
    run::check(&text)?;
    let wanted =
        Wanted { everything: true, sample: usize::try_from(sample).unwrap_or(0), most: settings::preview_max_rows() };
    let rehearsed = rehearse::rehearse(&text, &[], wanted)?;
    let stopped = rehearsed.account.stopped;
    arguments.give_rows(rehearsed.account.lines.into_iter().map(|line| {
        [
            line.name.to_sql().into_datum(),
            line.operation.into_datum(),
            i64::try_from(line.rows).unwrap_or(i64::MAX).into_datum(),
            stopped.into_datum(),
            None,
            None,
            None,
            jsonb(&line.before),
            jsonb(&line.after),
        ]
    }))
}

/// An array of rows; NULL where there is none.
fn jsonb(rows: &[String]) -> Option<pg_sys::Datum> {
    if rows.iter().all(|row| row == "null") {
        return None;
    }
    let text = ffi::encode(&format!("[{}]", rows.join(",")));
    // SAFETY: jsonb_in takes a C string.
    unsafe { direct_function_call::<pg_sys::Datum>(pg_sys::jsonb_in, &[Some(pg_sys::Datum::from(text))]) }
}

//! Compares each row that was written with what it was to be: only this says what was restored.

use pgrx::pg_sys;

use super::as_caller::{Connection, check_interrupts};
use super::plan::{CHANGE, PUT_BACK, REMOVE, ROWS, Standing};
use super::settle::{key, number_of};
use super::table_definition::Column;
use super::text::{self, Fixed};
use crate::pg::ereport::Failure;

/// Rows that are not as they were to be.
#[derive(Default)]
pub struct Wrong {
    pub rows: u64,
    /// The key of the first one.
    pub first: Option<String>,
}

/// Looks at all rows that were set aside, and tells the numbers of those that are not as they were to be.
///
/// # Errors
/// What reading raises.
pub fn verify(table: &Standing, mut tell: impl FnMut(i64)) -> Result<Wrong, Failure> {
    let mut wrong = Wrong::default();
    if table.rows.count() == 0 {
        return Ok(wrong);
    }
    let settings = Fixed::settings(&table.shape.columns)?;
    let memory = text::per_row_memory();
    let connection = Connection::open()?;
    connection.show(ROWS, &table.rows);
    let [put_back, changed, removed] = table.planned;
    let mut queries = Vec::new();
    if put_back + changed > 0 {
        queries.push(different(table));
    }
    if removed > 0 {
        queries.push(still_there(table));
    }
    for sql in queries {
        let mut cursor = connection.query(&sql)?;
        // SAFETY: a context of ours; what is told is copied.
        let here = unsafe { pg_sys::MemoryContextSwitchTo(memory) };
        while let Some(row) = cursor.values()? {
            check_interrupts()?;
            if !means_the_same(table, &row)? {
                wrong.rows += 1;
                tell(number_of(&row));
                if wrong.first.is_none() {
                    wrong.first = Some(key(table, &row)?);
                }
            }
            cursor.advance();
        }
        // SAFETY: as above.
        unsafe { pg_sys::MemoryContextSwitchTo(here) };
        cursor.close()?;
    }
    connection.close()?;
    // SAFETY: as above.
    unsafe { pg_sys::MemoryContextDelete(memory) };
    settings.release()?;
    Ok(wrong)
}

fn columns(table: &Standing, row: &str, places: &[usize], name: impl Fn(&Column, usize) -> String) -> String {
    let values: Vec<String> =
        places.iter().map(|place| format!("{row}.{}", name(&table.shape.columns[*place], *place))).collect();
    values.join(", ")
}

/// The set-aside rows whose columns do not hold the same bytes now, with the columns as they are, and last whether the row
/// is there at all.
fn different(table: &Standing) -> String {
    let own = |column: &Column, _: usize| column.sql();
    let kept = |_: &Column, place: usize| format!("c{place}");
    let same = |places: &[usize]| {
        format!(
            "ROW({})::pg_catalog.record OPERATOR(pg_catalog.*=) ROW({})::pg_catalog.record",
            columns(table, "i", places, kept),
            columns(table, "t", places, own)
        )
    };
    let is = table
        .shape
        .same_key(|_, column| format!("t.{}", column.sql()), |place, column| table.key_to_be("i", place, column));
    let there = table.shape.key_columns().next().map(Column::sql).unwrap_or_default();
    let mut now = columns(table, "t", &table.written(), own);
    if !now.is_empty() {
        now.push_str(", ");
    }
    format!(
        "SELECT i.*, {now}t.{there} IS NOT NULL FROM {ROWS} AS i LEFT JOIN {} AS t ON {is} \
         WHERE i.op OPERATOR(pg_catalog.<>) {REMOVE} AND (t.{there} IS NULL \
           OR NOT CASE WHEN i.op OPERATOR(pg_catalog.=) {CHANGE} THEN {} ELSE {} END)",
        table.shape.sql(),
        same(&table.changed),
        same(&table.inserted),
    )
}

/// The rows that were to be removed and are still there, where it is not another one that has got their key.
fn still_there(table: &Standing) -> String {
    let same =
        table.shape.same_key(|place, _| format!("i.k{place}"), |place, column| table.key_to_be("j", place, column));
    format!(
        "SELECT i.* FROM {ROWS} AS i JOIN {} AS t ON {} WHERE i.op OPERATOR(pg_catalog.=) {REMOVE} \
         AND NOT EXISTS (SELECT FROM {ROWS} AS j WHERE j.op OPERATOR(pg_catalog.<>) {REMOVE} AND {same})",
        table.shape.sql(),
        table.shape.has_key("t", "i"),
    )
}

/// Whether the columns print the same, though their bytes differ.
fn means_the_same(table: &Standing, row: &[Option<pg_sys::Datum>]) -> Result<bool, Failure> {
    let written = table.written();
    let values = 3 + table.shape.key.len();
    let operation = row.get(2).copied().flatten().map_or(0, |operation| operation.value() as i32);
    let places = match operation {
        CHANGE => &table.changed,
        PUT_BACK => &table.inserted,
        _ => return Ok(false),
    };
    let is_there = row.last().copied().flatten().is_some_and(|there| there.value() != 0);
    if !is_there {
        return Ok(false);
    }
    for (at, place) in written.iter().enumerate().filter(|(_, place)| places.contains(place)) {
        let value = |index: usize| row.get(index).copied().flatten();
        let column = &table.shape.columns[*place];
        let same = match (value(values + at), value(values + written.len() + at)) {
            (None, None) => true,
            (Some(one), Some(other)) => text::print(column, one)? == text::print(column, other)?,
            _ => false,
        };
        if !same {
            return Ok(false);
        }
    }
    Ok(true)
}

//! Writes what can be written. Where a constraint does not allow something, what is left is found by halves, each tried in a
//! subtransaction of its own, so that it costs by the rows that cannot come back, not by all.
//!
//! A row may need another one to be written before it, which is in the other half. So those that were not allowed are
//! tried again, until that helps none of them.

use pgrx::pg_sys;

use super::as_caller::{Fate, check_deferred, check_interrupts, in_subtransaction};
use super::plan::Standing;
use super::rows::Rows;
use super::text;
use super::write::{Part, write};
use crate::pg::encoding::from_server;
use crate::pg::ereport::Failure;

/// A row that a constraint does not allow.
#[derive(Debug, Clone)]
pub struct Refused {
    /// The table's place.
    pub table: usize,
    /// Its own among the table's.
    number: i64,
    pub key: String,
    /// The constraint's words, a sentence.
    pub why: String,
}

/// Some of the rows that were set aside, by table.
struct Selection {
    tables: Vec<Rows>,
    /// How many.
    rows: u64,
}

impl Selection {
    fn none(tables: &[Standing]) -> Self {
        Self { tables: tables.iter().map(|table| table.to_write().like()).collect(), rows: 0 }
    }

    fn parts<'a>(&'a self, tables: &'a [Standing]) -> Vec<Part<'a>> {
        tables.iter().zip(&self.tables).map(|(table, rows)| Part { table, rows }).collect()
    }

    fn end(self) {
        self.tables.into_iter().for_each(Rows::end);
    }
}

/// Writes the rows that were set aside, as far as constraints allow. Gives the first one of each table that they do not.
///
/// # Errors
/// Whatever else triggers and privileges have to say.
pub fn settle(tables: &mut [Standing]) -> Result<Vec<Refused>, Failure> {
    let waits = waits(tables)?;
    let whole: Vec<Part<'_>> = tables.iter().map(|table| Part { table, rows: table.to_write() }).collect();
    let Some(why) = attempt(&whole, waits)? else { return Ok(Vec::new()) };
    let count = tables.iter().flat_map(|table| table.planned).sum();
    let mut all = Selection::none(tables);
    for (table, rows) in tables.iter_mut().zip(&mut all.tables) {
        copy(table.to_write_mut(), rows)?;
    }
    all.rows = count;
    if count == 1 {
        let only = refused(tables, &mut all, why)?;
        all.end();
        return Ok(only.into_iter().collect());
    }
    let mut rest = Vec::from(halves(tables, all)?);
    let mut before = count;
    loop {
        let mut left = Selection::none(tables);
        let mut first: Vec<Refused> = Vec::new();
        // The later half is tried first: last change first, as in `write`.
        while let Some(mut part) = rest.pop() {
            match attempt(&part.parts(tables), waits)? {
                None => part.end(),
                Some(why) if part.rows <= 1 => {
                    let one = refused(tables, &mut part, why)?;
                    for (from, to) in part.tables.iter_mut().zip(&mut left.tables) {
                        copy(from, to)?;
                    }
                    left.rows += 1;
                    part.end();
                    if let Some(one) = one {
                        match first.iter_mut().find(|known| known.table == one.table) {
                            Some(known) if known.number < one.number => {}
                            Some(known) => *known = one,
                            None => first.push(one),
                        }
                    }
                }
                Some(_) => rest.extend(halves(tables, part)?),
            }
        }
        if left.rows == 0 || left.rows == before {
            left.end();
            return Ok(first);
        }
        before = left.rows;
        rest.push(left);
    }
}

/// Whether something would have its say only when the transaction ends, and what waits already has nothing to say.
fn waits(tables: &[Standing]) -> Result<bool, Failure> {
    if !tables.iter().any(|table| table.shape.deferrable) {
        return Ok(false);
    }
    match in_subtransaction(Fate::TakenBack, check_deferred) {
        Ok(()) => Ok(true),
        // SAFETY: just caught, and nobody else's.
        Err(Failure::Ready(raised)) if unsafe { (*raised).about_a_constraint() }.is_some() => Ok(false),
        Err(failure) => Err(failure),
    }
}

/// Writes rows, or none of them where a constraint does not allow it: what it said.
fn attempt(parts: &[Part<'_>], waits: bool) -> Result<Option<String>, Failure> {
    check_interrupts()?;
    let outcome = in_subtransaction(Fate::Kept, || {
        write(parts)?;
        if waits { in_subtransaction(Fate::TakenBack, check_deferred) } else { Ok(()) }
    });
    match outcome {
        Ok(()) => Ok(None),
        Err(Failure::Ready(raised)) => {
            // SAFETY: just caught, and nobody else's.
            let why = unsafe { (*raised).about_a_constraint() };
            why.map(Some).ok_or(Failure::Ready(raised))
        }
        Err(failure) => Err(failure),
    }
}

/// The first and the second half of some rows.
fn halves(tables: &[Standing], mut from: Selection) -> Result<[Selection; 2], Failure> {
    let (mut one, mut other) = (Selection::none(tables), Selection::none(tables));
    for (place, rows) in from.tables.iter_mut().enumerate() {
        rows.rewind();
        let mut last = None;
        let mut first_half = true;
        while let Some(row) = rows.next() {
            check_interrupts()?;
            if last != Some(number_of(&row)) {
                last = Some(number_of(&row));
                first_half = one.rows < from.rows / 2;
                if first_half { one.rows += 1 } else { other.rows += 1 }
            }
            let half = if first_half { &mut one } else { &mut other };
            half.tables[place].put(&row);
        }
    }
    from.end();
    Ok([one, other])
}

fn copy(from: &mut Rows, to: &mut Rows) -> Result<(), Failure> {
    from.rewind();
    while let Some(row) = from.next() {
        check_interrupts()?;
        to.put(&row);
    }
    Ok(())
}

/// What is told of the only row.
fn refused(tables: &[Standing], one: &mut Selection, why: String) -> Result<Option<Refused>, Failure> {
    for (place, rows) in one.tables.iter_mut().enumerate() {
        rows.rewind();
        if let Some(row) = rows.next() {
            return Ok(Some(Refused { table: place, number: number_of(&row), key: key(&tables[place], &row)?, why }));
        }
    }
    Ok(None)
}

/// The number of a set-aside row among its table's.
pub fn number_of(row: &[Option<pg_sys::Datum>]) -> i64 {
    row.first().copied().flatten().map_or(0, |number| number.value() as i64)
}

/// The key of a set-aside row, for a message.
///
/// # Errors
/// What printing raises.
pub fn key(table: &Standing, row: &[Option<pg_sys::Datum>]) -> Result<String, Failure> {
    let mut names = Vec::new();
    let mut values = Vec::new();
    for (column, value) in table.shape.key_columns().zip(row.iter().skip(3)) {
        names.push(column.name.clone());
        let printed = value.map(|value| text::print(column, value)).transpose()?;
        values.push(printed.map_or_else(|| "null".to_owned(), |printed| from_server(&printed)));
    }
    Ok(format!("({})=({})", names.join(", "), values.join(", ")))
}

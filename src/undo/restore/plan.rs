//! What of one table's part of a change is to be written, as it is set aside.

use super::rows::Rows;
use super::table_definition::{Column, Shape};

/// What is to be done with a row, as the set-aside rows have it.
pub const PUT_BACK: i32 = 1;
pub const CHANGE: i32 = 2;
pub const REMOVE: i32 = 3;

/// The name under which SQL reads the set-aside rows.
pub const ROWS: &str = "writeguard_rows";

/// What came of it.
pub struct Standing {
    pub shape: Shape,
    /// What is to be written: `n`, `last`, `op`, the key (`k1`, …) and columns by their places (`c0`, …).
    pub rows: Rows,
    /// The same step by step, each image taken back for itself, the last one of a row first; where the order matters.
    pub steps: Option<Rows>,
    /// Places of the columns that updates set, and of those that inserts give.
    pub changed: Vec<usize>,
    pub inserted: Vec<usize>,
    /// Rows to be put back, changed and removed.
    pub planned: [u64; 3],
    /// Rows that are as they were already, because the change did not alter them.
    pub settled: u64,
    pub conflicts: u64,
    /// The key of the first one, for a message.
    pub first: Option<String>,
}

impl Standing {
    /// What statements write: [`Standing::rows`], or the steps. Those of one row follow each other.
    pub fn to_write(&self) -> &Rows {
        self.steps.as_ref().unwrap_or(&self.rows)
    }

    /// The same to be read.
    pub fn to_write_mut(&mut self) -> &mut Rows {
        self.steps.as_mut().unwrap_or(&mut self.rows)
    }

    /// Frees what holds them.
    pub fn end(self) {
        self.rows.end();
        self.steps.into_iter().for_each(Rows::end);
    }

    /// Places of all columns that some row is written with, as the set-aside rows have them.
    pub fn written(&self) -> Vec<usize> {
        let mut places: Vec<usize> = self.changed.iter().chain(&self.inserted).copied().collect();
        places.sort_unstable();
        places.dedup();
        places
    }

    /// SQL for a column of the primary key in the set-aside row `row`, as it is to be; `place` counts from 1.
    pub fn key_to_be(&self, row: &str, place: usize, column: &Column) -> String {
        let written = self.changed.iter().find(|at| self.shape.columns[**at].number == column.number);
        match written {
            Some(at) => {
                let changes = format!("{row}.op OPERATOR(pg_catalog.=) {CHANGE}");
                format!("CASE WHEN {changes} THEN {row}.c{at} ELSE {row}.k{place} END")
            }
            None => format!("{row}.k{place}"),
        }
    }

    /// The numbers of the columns that updates set.
    pub fn changed_numbers(&self) -> Vec<i16> {
        self.changed.iter().filter_map(|place| self.shape.columns.get(*place)).map(|column| column.number).collect()
    }
}

//! The counters in a file, so that they are there after a restart, and after a crash as they were a minute before.
//!
//! Written by the launcher every minute in which something was counted, and by the postmaster when it is the last process;
//! read when shared memory is set up.

use std::time::{Duration, Instant};

use pgrx::pg_sys;
use rules::stat::histogram::{BUCKETS, without_empty_end};
use rules::words::Operation;
use serde::{Deserialize, Serialize};

use super::memory::{self, Key, Numbers};
use crate::pg::backend_local::BackendLocal;
use crate::pg::contained::contained;
use crate::pg::durable_file::{self, DurableFile};
use crate::pg::ereport::log_line;

static FILE: DurableFile = DurableFile::new(c"pg_stat/pg_writeguard.stat", c"pg_stat/pg_writeguard.stat.tmp");

/// How often the launcher writes it.
const PAUSE: Duration = Duration::from_secs(55);

/// One line of the file.
#[derive(Serialize, Deserialize)]
struct Line {
    database: u32,
    role: u32,
    operation: Operation,
    schema: String,
    table: String,
    statements: Vec<u64>,
    rows_of_more: u64,
    largest: u64,
    refused: u64,
    overridden: u64,
}

impl Line {
    fn of(numbers: &Numbers) -> Option<Self> {
        let (schema, table) = numbers.key.relation();
        Some(Self {
            database: u32::from(numbers.key.database),
            role: u32::from(numbers.key.role),
            operation: numbers.operation()?,
            schema,
            table,
            statements: without_empty_end(&numbers.statements).to_vec(),
            rows_of_more: numbers.rows_of_more,
            largest: numbers.largest,
            refused: numbers.refused,
            overridden: numbers.overridden,
        })
    }

    fn numbers(&self) -> Numbers {
        let mut statements = [0; BUCKETS];
        statements.iter_mut().zip(&self.statements).for_each(|(to, from)| *to = *from);
        let (database, role) = (pg_sys::Oid::from_u32(self.database), pg_sys::Oid::from_u32(self.role));
        Numbers {
            key: Key::new(database, role, self.operation, &self.schema, &self.table),
            statements,
            rows_of_more: self.rows_of_more,
            largest: self.largest,
            refused: self.refused,
            overridden: self.overridden,
        }
    }
}

impl Numbers {
    /// The operation that they are of.
    pub fn operation(&self) -> Option<Operation> {
        Operation::ALL.into_iter().find(|operation| *operation as u32 == self.key.operation)
    }
}

/// Called when shared memory was set up afresh: puts back what was stored, and arranges for the next shutdown.
///
/// # Safety
/// In the postmaster (or the single-user backend), from a plain old frame.
pub unsafe fn startup() {
    // SAFETY: the caller's promise.
    unsafe { durable_file::between_restarts("reading the stored statistics", restore, shutdown) };
}

fn restore() {
    let Some(bytes) = FILE.read() else { return };
    let (mut unreadable, mut without_room) = (0, 0);
    for line in bytes.split(|letter| *letter == b'\n').filter(|line| !line.is_empty()) {
        match serde_json::from_slice::<Line>(line) {
            Ok(line) => without_room += u64::from(!memory::put_back(&line.numbers())),
            Err(_) => unreadable += 1,
        }
    }
    if unreadable > 0 {
        log_line(&format!("pg_writeguard: {unreadable} lines of \"{}\" cannot be read", FILE.name()), None);
    }
    if without_room > 0 {
        log_line(
            &format!("pg_writeguard: no room for {without_room} stored statistics; raise writeguard.stat_entries"),
            None,
        );
    }
}

unsafe extern "C-unwind" fn shutdown(code: i32, _argument: pg_sys::Datum) {
    // After a crash the memory cannot be trusted.
    if code == 0 {
        contained("storing the statistics", || _ = write(&memory::numbers_without_lock()));
    }
}

/// Writes the file. False, and a line in the server log, when that fails.
fn write(numbers: &[Numbers]) -> bool {
    if numbers.is_empty() && !FILE.exists() {
        return true;
    }
    let lines: Vec<String> =
        numbers.iter().filter_map(Line::of).filter_map(|line| serde_json::to_string(&line).ok()).collect();
    FILE.write(lines.join("\n").as_bytes())
}

struct Written {
    at: Option<Instant>,
    /// Sums of all counters, to tell whether anything was counted since.
    sums: (usize, u64, u64, u64),
}

static WRITTEN: BackendLocal<Written> = BackendLocal::new(Written { at: None, sums: (0, 0, 0, 0) });

/// Writes the file when it is time; for the launcher. `exists`: whether there is still such a database.
pub fn write_every_minute(exists: impl Fn(pg_sys::Oid) -> bool) {
    if WRITTEN.borrow().at.is_some_and(|at| at.elapsed() < PAUSE) {
        return;
    }
    WRITTEN.borrow().at = Some(Instant::now());
    let mut numbers = memory::numbers(|_| true);
    let mut databases: Vec<pg_sys::Oid> = numbers.iter().map(|numbers| numbers.key.database).collect();
    databases.sort_unstable_by_key(|database| u32::from(*database));
    databases.dedup();
    for gone in databases.into_iter().filter(|database| !exists(*database)) {
        memory::forget(|key| key.database == gone);
        numbers.retain(|numbers| numbers.key.database != gone);
    }
    let sums = numbers.iter().fold((numbers.len(), 0u64, 0u64, 0u64), |(count, statements, rows, others), one| {
        let total = one.statements.iter().fold(statements, |sum, statements| sum.wrapping_add(*statements));
        let others = others.wrapping_add(one.refused).wrapping_add(one.overridden).wrapping_add(one.largest);
        (count, total, rows.wrapping_add(one.rows_of_more), others)
    });
    let is_written = WRITTEN.borrow().sums == sums;
    if is_written || write(&numbers) {
        WRITTEN.borrow().sums = sums;
        // SAFETY: reads the clock.
        memory::note_stored(unsafe { pg_sys::GetCurrentTimestamp() });
    }
}

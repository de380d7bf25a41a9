//! What waits in the queue when the server is shut down, kept in a file until it is started again.
//!
//! Written by the postmaster when it is the last process, read and removed when shared memory is set up. Not promised: what
//! waits when the server crashes is in the server log only; and an event whose worker was killed between its commit and the
//! note of it is stored once more.

use std::fs;
use std::io;
use std::path::Path;

use pgrx::pg_sys;
use serde::{Deserialize, Serialize};

use super::memory::{Locked, Phase};
use super::queue;
use crate::raise::{guarded, log_line};

/// Beside PostgreSQL's own statistics; relative to the data directory, where the postmaster works.
const FILE: &str = "pg_stat/pg_writeguard.events";
const UNFINISHED: &str = "pg_stat/pg_writeguard.events.tmp";

/// An event that waits while the server is down.
struct Kept {
    database: pg_sys::Oid,
    json: Vec<u8>,
}

/// All events that are not stored. Only for the postmaster, when it is the last process.
fn leftover() -> Vec<Kept> {
    // A process that was killed may still hold the lock.
    let Some(queue) = Locked::try_lock() else { return Vec::new() };
    let waiting = queue.entries().iter().filter(|entry| matches!(entry.phase, Phase::Queued | Phase::Taken));
    waiting
        .filter(|entry| entry.length > 0)
        .map(|entry| {
            let mut json = Vec::with_capacity(entry.length as usize);
            queue.read(entry, &mut json);
            Kept { database: entry.database, json }
        })
        .collect()
}

/// Puts an event back that waited while the server was down; false when there is no room for it.
fn put_back(kept: &Kept) -> bool {
    let Some(queue) = Locked::lock() else { return false };
    queue.add(kept.database, &kept.json).is_some()
}

/// One line of the file.
#[derive(Serialize, Deserialize)]
struct Line {
    database: u32,
    event: String,
}

/// Called when shared memory was set up afresh: puts back what was kept, and arranges for the next shutdown.
///
/// # Safety
/// In the postmaster (or the single-user backend), from a plain old frame.
pub unsafe fn startup() {
    let _nothing_to_raise = guarded(|| {
        restore();
        Ok(())
    });
    // SAFETY: the callback lives as long as the process.
    unsafe { pg_sys::on_shmem_exit(Some(shutdown), pg_sys::Datum::from(0)) };
}

fn restore() {
    let Ok(text) = fs::read_to_string(FILE) else { return };
    let mut lost = 0;
    for line in text.lines() {
        let kept = serde_json::from_str::<Line>(line)
            .ok()
            .map(|line| Kept { database: pg_sys::Oid::from_u32(line.database), json: line.event.into_bytes() });
        if !kept.is_some_and(|kept| put_back(&kept)) {
            queue::count_unqueued();
            lost += 1;
            log_line(
                "pg_writeguard: no room for an event that waited for the restart; it is in this log only",
                Some(line),
            );
        }
    }
    if let Err(error) = fs::remove_file(FILE) {
        log_line(
            &format!("pg_writeguard: could not remove \"{FILE}\": {error}; {lost} events were not put back"),
            None,
        );
    }
}

unsafe extern "C-unwind" fn shutdown(code: i32, _argument: pg_sys::Datum) {
    // After a crash the queue cannot be trusted.
    if code == 0 {
        let _nothing_to_raise = guarded(|| {
            if let Err(error) = save() {
                log_line(&format!("pg_writeguard: could not write \"{FILE}\": {error}"), None);
            }
            Ok(())
        });
    }
}

fn save() -> io::Result<()> {
    let lines: Vec<String> = leftover()
        .into_iter()
        .filter_map(|kept| {
            let line = Line { database: u32::from(kept.database), event: String::from_utf8(kept.json).ok()? };
            serde_json::to_string(&line).ok()
        })
        .collect();
    if lines.is_empty() {
        return Ok(());
    }
    fs::write(UNFINISHED, lines.join("\n"))?;
    fs::File::open(UNFINISHED)?.sync_all()?;
    fs::rename(UNFINISHED, FILE)?;
    fs::File::open(Path::new(FILE).parent().unwrap_or(Path::new(".")))?.sync_all()
}

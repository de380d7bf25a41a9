//! What waits in the queue when the server is shut down, kept in a file until it is started again.
//!
//! Written by the postmaster when it is the last process, read and removed when shared memory is set up. After a crash
//! there is no such file, and the events that waited are in the server log only.

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
    /// See `serve::storing`; 0 where no transaction had it.
    storing: u64,
    event_id: i64,
    json: Vec<u8>,
}

/// All events that are not stored. Only for the postmaster, when it is the last process.
fn leftover() -> Vec<Kept> {
    let Some(queue) = Locked::lock() else { return Vec::new() };
    let waiting = queue.entries().iter().filter(|entry| matches!(entry.phase, Phase::Queued | Phase::Taken));
    waiting
        .filter(|entry| entry.length > 0)
        .map(|entry| {
            let mut json = Vec::with_capacity(entry.length as usize);
            queue.read(entry, &mut json);
            Kept { database: entry.database, storing: entry.storing, event_id: entry.event_id, json }
        })
        .collect()
}

/// Puts an event back that waited while the server was down; false when there is no room for it.
fn put_back(kept: &Kept) -> bool {
    let Some(queue) = Locked::lock() else { return false };
    let Some(place) = queue.add(kept.database, &kept.json) else { return false };
    let entry = &mut queue.entries()[place];
    if kept.storing != 0 {
        entry.phase = Phase::Taken;
        entry.storing = kept.storing;
        entry.event_id = kept.event_id;
    }
    true
}

/// One line of the file.
#[derive(Serialize, Deserialize)]
struct Line {
    database: u32,
    storing: u64,
    event_id: i64,
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
        let kept = serde_json::from_str::<Line>(line).ok().map(|line| Kept {
            database: pg_sys::Oid::from_u32(line.database),
            storing: line.storing,
            event_id: line.event_id,
            json: line.event.into_bytes(),
        });
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
            let line = Line {
                database: u32::from(kept.database),
                storing: kept.storing,
                event_id: kept.event_id,
                event: String::from_utf8(kept.json).ok()?,
            };
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

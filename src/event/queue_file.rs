//! What waits in the queue when the server is shut down, kept in a file until it is started again.
//!
//! Written by the postmaster when it is the last process, read when shared memory is set up, and removed by the launcher: a
//! start that fails before it takes nothing away. Not promised: what waits when the server crashes is in the server log
//! only.

use pgrx::pg_sys;
use serde::{Deserialize, Serialize};

use super::memory::{Locked, Phase};
use super::{queue, rate_limit};
use crate::pg::contained::contained;
use crate::pg::durable_file::{self, DurableFile};
use crate::pg::ereport::log_line;
use crate::pg::{encoding, stray};

static FILE: DurableFile = DurableFile::new(c"pg_stat/pg_writeguard.events", c"pg_stat/pg_writeguard.events.tmp");

/// An event that waits while the server is down.
struct Kept {
    database: pg_sys::Oid,
    json: Vec<u8>,
    /// The transaction that was storing it, and under which id; 0 when none was.
    storing: u64,
    event_id: i64,
}

/// All events that are not stored. Only for the postmaster, when it is the last process.
fn leftover() -> Vec<Kept> {
    // A process that was killed may still hold the lock.
    let Some(queue) = Locked::try_lock() else { return Vec::new() };
    let places = queue.entries().iter().enumerate();
    let waiting = places.filter(|(_, entry)| matches!(entry.phase, Phase::Queued | Phase::Taken));
    waiting
        .filter(|(_, entry)| entry.length > 0)
        .map(|(place, entry)| {
            let mut json = Vec::with_capacity(entry.length as usize);
            queue.read(place, &mut json);
            let storing = if entry.phase == Phase::Taken { entry.storing } else { 0 };
            Kept { database: entry.database, json, storing, event_id: entry.event_id }
        })
        .collect()
}

/// Puts an event back that waited while the server was down; false when there is no room for it.
fn put_back(kept: &Kept) -> bool {
    let Some(mut queue) = Locked::lock() else { return false };
    let Some(place) = queue.add(kept.database, &kept.json) else { return false };
    if kept.storing != 0 {
        // The next worker looks whether that transaction committed after all.
        let entry = &mut queue.entries_mut()[place];
        (entry.phase, entry.storing, entry.event_id) = (Phase::Taken, kept.storing, kept.event_id);
    }
    true
}

/// One line of the file.
#[derive(Serialize, Deserialize)]
struct Line {
    database: u32,
    event: String,
    #[serde(default)]
    storing: u64,
    #[serde(default)]
    event_id: i64,
}

/// Called when shared memory was set up afresh: puts back what was kept, and arranges for the next shutdown.
///
/// # Safety
/// In the postmaster (or the single-user backend), from a plain old frame.
pub unsafe fn startup() {
    // SAFETY: the caller's promise.
    unsafe { durable_file::between_restarts("reading the events that waited for the restart", restore, shutdown) };
}

fn restore() {
    let Some(bytes) = FILE.read() else { return };
    for line in bytes.split(|letter| *letter == b'\n').filter(|line| !line.is_empty()) {
        let kept = serde_json::from_slice::<Line>(line).ok().map(|line| Kept {
            database: pg_sys::Oid::from_u32(line.database),
            json: encoding::to_server(&line.event),
            storing: line.storing,
            event_id: line.event_id,
        });
        let line = stray::from_unknown(line);
        let lost = match kept {
            Some(kept) if put_back(&kept) => continue,
            Some(_) => "no room for an event that waited for the restart",
            None => "a line of the events that waited for the restart cannot be read",
        };
        queue::count_unqueued();
        log_line(&format!("pg_writeguard: {lost}; it is in this log only"), Some(&line));
    }
}

/// The server is up, and what was kept is in the queue.
pub fn accepted() {
    FILE.remove();
}

unsafe extern "C-unwind" fn shutdown(code: i32, _argument: pg_sys::Datum) {
    // After a crash the queue cannot be trusted.
    if code == 0 {
        contained("storing the events that wait for a restart", save);
    }
}

fn save() {
    rate_limit::flush_all();
    let lines: Vec<String> = leftover()
        .into_iter()
        .filter_map(|kept| {
            let line = Line {
                database: u32::from(kept.database),
                event: stray::from_unknown(&kept.json),
                storing: kept.storing,
                event_id: kept.event_id,
            };
            serde_json::to_string(&line).ok()
        })
        .collect();
    if !lines.is_empty() {
        FILE.write(lines.join("\n").as_bytes());
    }
}

//! How many events of one policy that only looks on are stored one by one in a minute. Of the others the largest is kept in
//! shared memory, with their number; when the minute is over, that one is stored and says how many there were.
//!
//! The launcher looks for minutes that are over; so does a session with the next event of that policy, and the postmaster
//! when it is shut down. Not promised: what a crash finds here is lost, a minute's worth at most.

use core::sync::atomic::{AtomicU64, Ordering};
use std::hash::{DefaultHasher, Hash, Hasher};

use pgrx::pg_sys;

use super::memory::{self, Locked};
use super::queue;
use super::record::Event;
use super::totals;
use crate::pg::shmem::{Plain, Region};
use crate::settings;

/// Policies that are told apart at the same time; of any more, every event is stored.
const PLACES: usize = 128;
/// Room for the largest event; its statement is cut to fit.
const EVENT_BYTES: usize = 2_000;
const STATEMENT_BYTES: usize = 600;

/// One policy in one database.
#[repr(C)]
#[derive(Clone, Copy)]
struct Place {
    database: pg_sys::Oid,
    /// Of its name and mode; 0: the place is free.
    policy: u64,
    /// Minutes since PostgreSQL's epoch.
    minute: i64,
    /// Events of that minute that were stored one by one.
    stored: u64,
    /// Those that were not.
    left_out: u64,
    /// Rows of the largest of these.
    largest: u64,
    /// Of its JSON.
    length: u32,
    json: [u8; EVENT_BYTES],
}

// SAFETY: numbers and bytes.
unsafe impl Plain for Place {}

/// Without a lock: events that were not stored one by one, since the server started.
static TABLE: Region<AtomicU64, [Place; PLACES]> = Region::new(c"pg_writeguard_observed");

/// Asks for the shared memory; in the postmaster, before it is laid out.
pub unsafe fn request() {
    // SAFETY: a plain old frame, called from shmem_request_hook.
    unsafe { TABLE.request(0) };
}

/// Finds or initializes the shared memory.
pub unsafe fn startup() {
    // SAFETY: a plain old frame, called from shmem_startup_hook.
    unsafe { TABLE.startup(0) };
}

/// Runs `body` with the places under the lock. Nothing in it allocates, sleeps or raises.
fn with<T>(body: impl FnOnce(&mut [Place; PLACES]) -> T) -> Option<T> {
    TABLE.lock().map(|mut places| body(&mut places))
}

/// Events that were not stored one by one, in all databases since the server started.
pub fn left_out() -> u64 {
    TABLE.open().map_or(0, |left_out| left_out.load(Ordering::Relaxed))
}

const MICROSECONDS_PER_MINUTE: i64 = 60_000_000;

fn this_minute() -> i64 {
    // SAFETY: reads the clock.
    unsafe { pg_sys::GetCurrentTimestamp() }.div_euclid(MICROSECONDS_PER_MINUTE)
}

/// Records an event of a policy that only looks on. Waits for nobody.
pub fn record(event: &Event) {
    let (Some(left_out), Some(policy)) = (TABLE.open(), key(event)) else {
        queue::record(event);
        return;
    };
    // SAFETY: a static of this process.
    let (database, minute) = (unsafe { pg_sys::MyDatabaseId }, this_minute());
    let most = settings::observed_per_minute();
    let small = event.shortened(STATEMENT_BYTES).json();
    let small = if small.len() <= EVENT_BYTES { small } else { event.without_statement().json() };
    let (mut over, mut store) = (None, true);
    with(|places| {
        let Some(place) = place_of(places, database, policy, minute) else { return };
        if place.minute != minute {
            over = (place.left_out > 0).then_some(*place);
            *place = Place { minute, stored: 0, left_out: 0, largest: 0, length: 0, ..*place };
        }
        store = place.stored < most || small.len() > EVENT_BYTES;
        if store {
            place.stored += 1;
            return;
        }
        place.left_out += 1;
        let rows = event.rows.unwrap_or(0);
        if place.length == 0 || rows > place.largest {
            place.largest = rows;
            place.length = small.len() as u32;
            place.json[..small.len()].copy_from_slice(small.as_bytes());
        }
    });
    if let Some(over) = over.as_ref().and_then(summary) {
        queue::record_counted(&over);
    }
    if store {
        queue::record(event);
    } else {
        totals::count_event(event);
        left_out.fetch_add(1, Ordering::Relaxed);
    }
}

fn key(event: &Event) -> Option<u64> {
    let mut hasher = DefaultHasher::new();
    (event.policy.as_ref()?, event.mode.as_ref()?).hash(&mut hasher);
    Some(hasher.finish().max(1))
}

/// The place of a policy; a new one where there is room, which those of an earlier minute make that left nothing out.
fn place_of(places: &mut [Place; PLACES], database: pg_sys::Oid, policy: u64, minute: i64) -> Option<&mut Place> {
    let is = |place: &Place| (place.database, place.policy) == (database, policy);
    let is_free = |place: &Place| place.policy == 0 || place.minute < minute && place.left_out == 0;
    let at = places.iter().position(is).or_else(|| {
        let free = places.iter().position(is_free)?;
        let blank =
            Place { database, policy, minute, stored: 0, left_out: 0, largest: 0, length: 0, json: places[free].json };
        places[free] = blank;
        Some(free)
    })?;
    places.get_mut(at)
}

/// The largest of the events that a minute left out, with their number.
fn summary(place: &Place) -> Option<Event> {
    let mut event: Event = serde_json::from_slice(place.json.get(..place.length as usize)?).ok()?;
    let others = place.left_out - 1;
    event.reason = Some(format!(
        "The largest of {} events of this policy in one minute that were not stored one by one{}",
        place.left_out,
        if others == 0 { " (the only one)." } else { "." }
    ));
    Some(event)
}

/// Queues what is due: of the minutes that are over, or of all.
fn flush(is_due: impl Fn(&Place) -> bool) {
    for at in 0..PLACES {
        let found = with(|places| places.get(at).filter(|place| place.left_out > 0 && is_due(place)).copied());
        let Some(found) = found.flatten() else { continue };
        let Some(event) = summary(&found) else { continue };
        let queued = {
            let json = event.queued_json();
            Locked::lock().and_then(|queue| queue.add(found.database, json.as_bytes())).is_some()
        };
        if !queued {
            // The next look finds it again.
            continue;
        }
        event.log();
        with(|places| {
            let place = &mut places[at];
            if (place.database, place.policy, place.minute) == (found.database, found.policy, found.minute) {
                place.left_out = place.left_out.saturating_sub(found.left_out);
                if place.left_out == 0 {
                    (place.largest, place.length) = (0, 0);
                }
            }
        });
    }
}

/// Queues what minutes that are over left out; for the launcher.
pub fn flush_minutes_that_are_over() {
    let now = this_minute();
    flush(|place| place.minute < now);
}

/// Queues all that was left out; for the postmaster when it is the last process.
pub fn flush_all() {
    // A process that was killed may still hold a lock.
    let is_free = TABLE.try_lock().is_some();
    if is_free && memory::is_there() && Locked::try_lock().is_some() {
        flush(|_| true);
    }
}

//! How many events are stored one by one in a minute, so that no loop fills the disk: those of one policy of mode observe
//! or warn, and the refusals of one policy and login. Of the others the largest is kept in shared memory, with their
//! number. When the minute is over, that one is stored and says how many there were. Nobody waits for it, and only it has
//! a line in the server log.
//!
//! The launcher looks for minutes that are over; so does a session with the next such event, and the postmaster when it is
//! shut down. What is stored in a minute is bounded by the places there are: those that find none share one for each
//! database. Not promised: what a crash finds here is lost, a minute's worth at most.

use core::sync::atomic::{AtomicU64, Ordering};
use std::hash::{DefaultHasher, Hash, Hasher};

use pgrx::pg_sys;
use rules::error::Error;
use rules::words::{beginning, counted};

use super::memory::Locked;
use super::record::Event;
use super::{counters, queue};
use crate::pg::ereport::{Failure, log_line};
use crate::pg::shmem::{Plain, Region};
use crate::pg::{ffi, preload};
use crate::session::settings;

/// Policies, and policies with logins, that have a limit of their own at the same time.
const OWN_PLACES: usize = 256;
/// Places for the others, one for each database and class.
const SHARED_PLACES: usize = 32;
const PLACES: usize = OWN_PLACES + SHARED_PLACES;
/// Room for the largest event; its statement is cut to fit.
const EVENT_BYTES: usize = 2_000;
const STATEMENT_BYTES: usize = 600;
/// Of a policy's name, where the whole event does not fit otherwise.
const NAME_BYTES: usize = 100;

/// What has a limit of its own.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum Class {
    /// Events of policies of mode observe and warn, by policy.
    LookedOn = 0,
    /// Refusals, by policy and login.
    Refused,
    /// Covered writes while the guard is off, by login.
    SwitchedOff,
}

impl Class {
    /// Events that are stored one by one in a minute.
    fn most(self) -> u64 {
        match self {
            Class::LookedOn => settings::observed_per_minute(),
            Class::Refused | Class::SwitchedOff => settings::blocked_per_minute(),
        }
    }

    /// What shares a limit with this event; never 0.
    fn key(self, event: &Event) -> u64 {
        let mut hasher = DefaultHasher::new();
        (self, &event.policy, &event.mode).hash(&mut hasher);
        if self != Class::LookedOn {
            event.login.hash(&mut hasher);
        }
        hasher.finish().max(1)
    }
}

/// Rows of an event, and what was estimated, by which the largest is found.
type Size = (u64, u64);

fn size(event: &Event) -> Size {
    (event.rows.unwrap_or(0), event.rows_estimated.unwrap_or(0))
}

/// One minute of what shares a limit in one database.
#[repr(C)]
#[derive(Clone, Copy)]
struct Place {
    database: pg_sys::Oid,
    class: Class,
    /// See [`Class::key`]; 0: the place is free, or shared.
    key: u64,
    /// Minutes since PostgreSQL's epoch.
    minute: i64,
    /// Events of that minute that were stored one by one.
    stored: u64,
    /// Those that were not.
    left_out: u64,
    /// The largest of these.
    largest: Size,
    /// Of its JSON.
    length: u32,
    json: [u8; EVENT_BYTES],
}

// SAFETY: numbers and bytes, of which none but ours are written; zeros are a free place.
unsafe impl Plain for Place {}

/// Without a lock: events that were not stored one by one, since the server started.
static TABLE: Region<AtomicU64, [Place; PLACES]> = Region::new(c"pg_writeguard_throttle");

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

/// Records an event of a class that has a limit. Waits for nobody.
pub fn record(class: Class, event: &Event) {
    if admits(class, event) {
        queue::record(event);
    }
}

/// Logs and queues a refusal, whose event must survive the rollback, and waits for it; gives its id when it is stored in
/// time. One of very many is only counted.
pub fn record_and_wait(event: &Event) -> Result<Option<i64>, ffi::PgError> {
    if !admits(Class::Refused, event) {
        return Ok(None);
    }
    event.log();
    counters::count_event(event);
    // SAFETY: a static. Without a postmaster nobody would ever store it.
    if !unsafe { pg_sys::IsUnderPostmaster } {
        return Ok(None);
    }
    match queue::enqueue(event)? {
        Some(ticket) => Ok(queue::wait(ticket)?.filter(|id| *id > 0)),
        None => {
            log_line("pg_writeguard: the event queue is full; the event before this line is in this log only", None);
            Ok(None)
        }
    }
}

/// Records a refusal that is no limit's, with what it says, as [`record_and_wait`] does, and gives what to raise.
pub fn record_refusal(mut event: Event, error: Error) -> Failure {
    event.approval = error.request();
    event.reason = Some(match error.detail() {
        Some(detail) => format!("{error}. {detail}"),
        None => error.to_string(),
    });
    match record_and_wait(&event) {
        Ok(id) => error.recorded(id).into(),
        Err(interrupt) => interrupt.into(),
    }
}

/// What becomes of an event.
enum Verdict {
    Store,
    /// It is a number, and perhaps the largest.
    LeaveOut {
        place: usize,
        is_largest: bool,
    },
    NoPlace,
}

/// Whether the caller is to record this event. Otherwise it was counted here, for the event of that minute.
pub fn admits(class: Class, event: &Event) -> bool {
    let Some(left_out) = TABLE.open() else { return true };
    // SAFETY: a static of this process.
    let (database, minute) = (unsafe { pg_sys::MyDatabaseId }, this_minute());
    let (key, most, size) = (class.key(event), class.most(), size(event));
    let mut over = None;
    let verdict = with(|places| {
        let Some(at) = place_of(places, database, class, key, minute) else { return Verdict::NoPlace };
        let place = &mut places[at];
        if place.minute != minute {
            over = (place.left_out > 0).then_some(*place);
            *place = Place { minute, stored: 0, left_out: 0, largest: (0, 0), length: 0, ..*place };
        }
        if place.stored < most {
            place.stored += 1;
            return Verdict::Store;
        }
        place.left_out += 1;
        Verdict::LeaveOut { place: at, is_largest: place.length == 0 || size > place.largest }
    });
    if let Some(over) = &over {
        match summary(over) {
            Some(summary) => queue::record_counted(&summary),
            None => tell_number(over),
        }
    }
    match verdict.unwrap_or(Verdict::Store) {
        Verdict::Store => return true,
        Verdict::LeaveOut { place, is_largest } => {
            if is_largest {
                // Put together without the lock; another one may be the largest by then.
                let json = fitting(event);
                with(|places| places[place].keep((database, class, minute), size, &json));
            }
            left_out.fetch_add(1, Ordering::Relaxed);
        }
        Verdict::NoPlace => {
            event.log();
            queue::count_unqueued();
        }
    }
    counters::count_event(event);
    false
}

impl Place {
    /// Keeps an event of that database, class and minute, where it is the largest.
    fn keep(&mut self, of: (pg_sys::Oid, Class, i64), size: Size, json: &str) {
        let is_larger = self.length == 0 || size > self.largest;
        let room = self.json.get_mut(..json.len());
        if let Some(room) = room
            && is_larger
            && (self.database, self.class, self.minute) == of
        {
            room.copy_from_slice(json.as_bytes());
            (self.largest, self.length) = (size, json.len() as u32);
        }
    }
}

/// An event's JSON with as much of it as there is room for.
fn fitting(event: &Event) -> String {
    let json = event.shortened(STATEMENT_BYTES).json();
    if json.len() <= EVENT_BYTES {
        return json;
    }
    let json = event.without_statement().json();
    if json.len() <= EVENT_BYTES {
        return json;
    }
    let mut event = event.without_statement();
    (event.reason, event.application, event.relation) = (None, None, None);
    if let Some(policy) = &mut event.policy {
        policy.truncate(beginning(policy, NAME_BYTES).len());
    }
    event.json()
}

/// The place of what shares a limit. A new one where there is room, which those of an earlier minute make that left nothing
/// out; else the one that all of its class and database share who found none.
fn place_of(places: &mut [Place], database: pg_sys::Oid, class: Class, key: u64, minute: i64) -> Option<usize> {
    let (own, shared) = places.split_at_mut(OWN_PLACES.min(places.len()));
    let is_free = |place: &Place| place.database == pg_sys::InvalidOid || place.minute != minute && place.left_out == 0;
    let find = |places: &mut [Place], key: u64| {
        let is = |place: &Place| (place.database, place.class, place.key) == (database, class, key);
        places.iter().position(is).or_else(|| {
            let free = places.iter().position(is_free)?;
            let json = places[free].json;
            places[free] =
                Place { database, class, key, minute, stored: 0, left_out: 0, largest: (0, 0), length: 0, json };
            Some(free)
        })
    };
    find(own, key).or_else(|| find(shared, 0).map(|at| OWN_PLACES + at))
}

/// The largest of the events that a minute left out, with their number.
fn summary(place: &Place) -> Option<Event> {
    let mut event: Event = serde_json::from_slice(place.json.get(..place.length as usize)?).ok()?;
    let what = match (place.class, place.key) {
        (Class::LookedOn, 1..) => "events of this policy",
        (Class::LookedOn, 0) => "events of several policies",
        (Class::Refused, 1..) => "refusals of this policy and login",
        (Class::Refused, 0) => "refusals of several policies and logins",
        (Class::SwitchedOff, 1..) => "writes of this login while the guard was off",
        (Class::SwitchedOff, 0) => "writes of several logins while the guard was off",
    };
    let only = if place.left_out == 1 { " (the only one)." } else { "." };
    let told = format!("The largest of {} {what} in one minute that were not stored one by one{only}", place.left_out);
    event.reason = Some(event.reason.map_or(told.clone(), |reason| format!("{told} {reason}")));
    Some(event)
}

/// Tells the log of a minute of which there is a number alone: whoever was about to keep its largest event did not come to it.
fn tell_number(place: &Place) {
    let (events, database) = (counted(place.left_out, "event"), u32::from(place.database));
    log_line(&format!("pg_writeguard: {events} of one minute in database {database} counted only"), None);
}

/// Queues what is due: of the minutes that are over, or of all. `last`: nobody looks again for what found no room.
fn flush(is_due: impl Fn(&Place) -> bool, last: bool) {
    for at in 0..PLACES {
        let found = with(|places| places.get(at).filter(|place| place.left_out > 0 && is_due(place)).copied());
        let Some(found) = found.flatten() else { continue };
        match summary(&found) {
            Some(event) => {
                let json = event.queued_json();
                let queued = Locked::lock().and_then(|mut queue| queue.add(found.database, json.as_bytes())).is_some();
                if !queued && !last {
                    // The next look finds it again.
                    continue;
                }
                event.log();
                if !queued {
                    queue::count_unqueued();
                }
            }
            None => tell_number(&found),
        }
        with(|places| {
            let place = &mut places[at];
            let of = |place: &Place| (place.database, place.class, place.key, place.minute);
            if of(place) == of(&found) {
                place.left_out = place.left_out.saturating_sub(found.left_out);
                if place.left_out == 0 {
                    (place.largest, place.length) = ((0, 0), 0);
                }
            }
        });
    }
}

/// Queues what minutes that are over left out; for the launcher.
pub fn flush_minutes_that_are_over() {
    let now = this_minute();
    flush(|place| place.minute != now, false);
}

/// Queues all that was left out; for the postmaster when it is the last process.
pub fn flush_all() {
    // A process that was killed may still hold a lock.
    let is_free = TABLE.try_lock().is_some();
    if is_free && preload::is_attached() && Locked::try_lock().is_some() {
        flush(|_| true, true);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn places() -> Vec<Place> {
        let free = Place {
            database: pg_sys::InvalidOid,
            class: Class::LookedOn,
            key: 0,
            minute: 0,
            stored: 0,
            left_out: 0,
            largest: (0, 0),
            length: 0,
            json: [0; EVENT_BYTES],
        };
        vec![free; PLACES]
    }

    #[test]
    fn what_finds_no_place_of_its_own_shares_one_by_database_and_class() {
        let mut places = places();
        let database = pg_sys::Oid::from(1);
        for key in 1..=OWN_PLACES as u64 {
            assert_eq!(place_of(&mut places, database, Class::Refused, key, 7), Some(key as usize - 1));
        }
        let mut shared = |database: u32, class, key| place_of(&mut places, database.into(), class, key, 7);
        assert_eq!(shared(1, Class::Refused, 3), Some(2));
        assert_eq!(shared(1, Class::Refused, 1_000), Some(OWN_PLACES));
        assert_eq!(shared(1, Class::Refused, 1_001), Some(OWN_PLACES));
        assert_eq!(shared(1, Class::LookedOn, 1_000), Some(OWN_PLACES + 1));
        for other in 2..SHARED_PLACES as u32 {
            assert_eq!(shared(other, Class::Refused, 1), Some(OWN_PLACES + other as usize));
        }
        assert_eq!(shared(1_000, Class::Refused, 1), None);
    }

    #[test]
    fn a_minute_that_left_something_out_keeps_its_place_until_it_is_told_of() {
        let mut places = places();
        let database = pg_sys::Oid::from(1);
        assert_eq!(place_of(&mut places, database, Class::Refused, 5, 7), Some(0));
        places[0].left_out = 1;
        assert_eq!(place_of(&mut places, database, Class::Refused, 6, 8), Some(1));
        places[0].left_out = 0;
        assert_eq!(place_of(&mut places, database, Class::Refused, 9, 8), Some(0));
    }

    #[test]
    fn the_largest_is_kept() {
        let of = (pg_sys::Oid::from(1), Class::Refused, 7);
        let mut place = Place { database: of.0, class: of.1, key: 3, minute: of.2, ..places()[0] };
        for (size, json) in [((4, 10), "a"), ((4, 90), "bb"), ((4, 90), "c"), ((3, 99), "d")] {
            place.keep(of, size, json);
        }
        assert_eq!((place.largest, &place.json[..place.length as usize]), ((4, 90), &b"bb"[..]));
        // Of a minute that is over by now.
        place.keep((of.0, of.1, 6), (9, 9), "e");
        assert_eq!(place.largest, (4, 90));
    }
}

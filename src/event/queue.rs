//! A session's side of the queue: put an event in, and wait until it is on disk.

use core::sync::atomic::Ordering;

use pgrx::pg_sys;

use super::counters;
use super::memory::{self, Entry, Locked, Phase, set_latch};
use super::record::Event;
use crate::pg::ffi;
use crate::session::settings;

/// A session's claim to learn what became of its event.
#[derive(Debug, Clone, Copy)]
pub struct Ticket {
    entry: usize,
    number: u64,
}

/// Puts an event (or nothing, to have the database's outbox served) into the queue; none when there is no room.
pub fn push(json: &[u8], wait: bool) -> Option<Ticket> {
    // SAFETY: statics of this process.
    let (database, latch, pid) = unsafe { (pg_sys::MyDatabaseId, pg_sys::MyLatch, pg_sys::MyProcPid) };
    let (ticket, wake) = {
        let mut queue = Locked::lock()?;
        let place = queue.add(database, json)?;
        let entry = &mut queue.entries_mut()[place];
        let number = entry.number;
        if wait {
            entry.waiter = latch;
            entry.waiter_pid = pid;
        }
        let header = queue.header();
        let worker = header.serving.iter().find(|serving| serving.pid != 0 && serving.database == database);
        (Ticket { entry: place, number }, worker.map_or(header.launcher, |worker| worker.latch))
    };
    set_latch(wake);
    Some(ticket)
}

/// The id of a stored event; none while it is not on disk. Ends the claim when it is.
pub fn stored(ticket: Ticket) -> Option<i64> {
    let mut queue = Locked::lock()?;
    let entry = queue.entries().get(ticket.entry)?;
    if entry.number != ticket.number || entry.phase != Phase::Stored {
        return None;
    }
    let id = entry.event_id;
    queue.free(ticket.entry);
    Some(id)
}

/// Nobody waits for this event any more; the worker stores it when it can.
pub fn abandon(ticket: Ticket) {
    let Some(mut queue) = Locked::lock() else { return };
    if let Some(entry) = queue.entries_mut().get_mut(ticket.entry)
        && entry.number == ticket.number
    {
        entry.waiter = core::ptr::null_mut();
        if entry.phase == Phase::Stored {
            queue.free(ticket.entry);
        }
    }
    drop(queue);
    if let Some(counters) = memory::counters_of() {
        counters.late.fetch_add(1, Ordering::Relaxed);
    }
}

/// Takes an event back; false where it is stored already, or about to be.
fn withdraw(ticket: Ticket) -> bool {
    let Some(mut queue) = Locked::lock() else { return false };
    let Some(entry) = queue.entries_mut().get_mut(ticket.entry).filter(|entry| entry.number == ticket.number) else {
        return false;
    };
    match entry.phase {
        Phase::Queued => queue.free(ticket.entry),
        // The worker has it, but has not begun: an entry without bytes is no event.
        Phase::Taken if entry.storing == 0 => entry.length = 0,
        _ => return false,
    }
    true
}

/// Counts an event for which there was no room.
pub fn count_unqueued() {
    if let Some(header) = memory::counters_of() {
        header.unqueued.fetch_add(1, Ordering::Relaxed);
    }
}

/// Takes back one that was counted: there was room after all.
fn uncount_unqueued() {
    if let Some(header) = memory::counters_of() {
        header.unqueued.fetch_sub(1, Ordering::Relaxed);
    }
}

/// What the queue counts: what waits now, and since the server started what was stored, was late for its error, is in the log
/// only, was not taken by the table; and how often notifications were not sent and no worker slot was free.
#[derive(Default)]
pub struct Counters {
    pub waiting: u64,
    pub stored: u64,
    pub late: u64,
    pub in_log_only: u64,
    pub set_aside: u64,
    pub unsent: u64,
    pub starved: u64,
}

/// What was counted, in all databases.
pub fn counters() -> Counters {
    let Some(queue) = Locked::lock() else {
        return Counters::default();
    };
    let waits = |entry: &&Entry| matches!(entry.phase, Phase::Queued | Phase::Taken) && entry.length > 0;
    let waiting = queue.entries().iter().filter(waits).count() as u64;
    drop(queue);
    let Some(header) = memory::counters_of() else { return Counters::default() };
    let [stored, late, in_log_only, set_aside, unsent, starved] =
        [&header.stored, &header.late, &header.unqueued, &header.set_aside, &header.unsent_attempts, &header.starved]
            .map(|counter| counter.load(Ordering::Relaxed));
    Counters { waiting, stored, late, in_log_only, set_aside, unsent, starved }
}

/// When the event that has waited longest for the worker happened; none where none waits.
pub fn waiting_since() -> Option<String> {
    let oldest = |queue: &Locked| {
        let waits = |entry: &&Entry| matches!(entry.phase, Phase::Queued | Phase::Taken) && entry.length > 0;
        queue
            .entries()
            .iter()
            .enumerate()
            .filter(|(_, entry)| waits(entry))
            .min_by_key(|(_, entry)| entry.number)
            .map(|(place, entry)| (place, entry.length as usize))
    };
    let (_, length) = oldest(&Locked::lock()?)?;
    // Allocated without the lock; another event may be the oldest by then.
    let mut json = Vec::with_capacity(length);
    {
        let queue = Locked::lock()?;
        let (place, length) = oldest(&queue)?;
        if length > json.capacity() {
            return None;
        }
        queue.read(place, &mut json);
    }
    serde_json::from_slice::<Event>(&json).ok().map(|event| event.occurred_at)
}

/// Waits until the event is on disk, at most [`settings::event_timeout`]; gives its id.
///
/// # Errors
/// Whatever an interrupt raises meanwhile; the event stays queued.
pub fn wait(ticket: Ticket) -> Result<Option<i64>, ffi::PgError> {
    let mut left = settings::event_timeout();
    let started = std::time::Instant::now();
    loop {
        if let Some(id) = stored(ticket) {
            return Ok(Some(id));
        }
        if left <= 0 {
            abandon(ticket);
            return Ok(None);
        }
        // SAFETY: nothing but raw calls inside.
        if let Err(error) = unsafe { ffi::protect(|| ffi::sleep_on_latch(left)) } {
            abandon(ticket);
            return Err(error);
        }
        left = settings::event_timeout() - i64::try_from(started.elapsed().as_millis()).unwrap_or(i64::MAX);
    }
}

/// Logs and queues an event that nobody waits for.
pub fn record(event: &Event) {
    counters::count_event(event);
    record_counted(event);
}

/// The same with one that stands for others, which were counted when they happened.
pub fn record_counted(event: &Event) {
    event.log();
    // SAFETY: a static. Without a postmaster nobody would ever store it.
    if unsafe { pg_sys::IsUnderPostmaster } {
        let json = event.queued_json();
        if push(json.as_bytes(), false).is_none() {
            count_unqueued();
        }
    }
}

/// What became of an event that had to be stored at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Record {
    Stored,
    /// Not in time, and never.
    Withdrawn,
    /// Not in time, but the worker was storing it just then.
    Late,
}

/// Logs and queues an event of something that must not happen without it, and waits for it.
///
/// # Errors
/// Whatever an interrupt raises meanwhile; the event is then withdrawn if that is possible.
pub fn record_or_withdraw(event: &Event) -> Result<Record, ffi::PgError> {
    event.log();
    // SAFETY: a static. Without a postmaster nobody would ever store it.
    if !unsafe { pg_sys::IsUnderPostmaster } {
        return Ok(Record::Withdrawn);
    }
    let Some(ticket) = enqueue(event)? else { return Ok(Record::Withdrawn) };
    let waited = wait(ticket);
    if let Ok(Some(id)) = waited {
        if id > 0 {
            counters::count_event(event);
        }
        return Ok(if id > 0 { Record::Stored } else { Record::Withdrawn });
    }
    let withdrawn = withdraw(ticket);
    if !withdrawn {
        counters::count_event(event);
    }
    waited?;
    Ok(if withdrawn { Record::Withdrawn } else { Record::Late })
}

/// Queues an event; where there is no room, waits for some as long as a refused write may wait at all. An event that is
/// not queued is counted.
pub fn enqueue(event: &Event) -> Result<Option<Ticket>, ffi::PgError> {
    const PAUSE: i64 = 10;
    let json = event.queued_json();
    let mut ticket = push(json.as_bytes(), true);
    let mut left = settings::event_timeout();
    if ticket.is_none() {
        // Beforehand, because the wait may end with this process.
        count_unqueued();
        while ticket.is_none() && left > 0 {
            // SAFETY: nothing but a raw call inside.
            unsafe { ffi::protect(|| ffi::sleep_on_latch(PAUSE)) }?;
            left -= PAUSE;
            ticket = push(json.as_bytes(), true);
        }
        if ticket.is_some() {
            uncount_unqueued();
        }
    }
    Ok(ticket)
}

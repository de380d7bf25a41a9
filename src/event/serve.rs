//! The background processes' side of the queue: who serves which database, and what is taken, stored, and settled
//! after a predecessor's death.

use core::sync::atomic::Ordering;

use pgrx::pg_sys;

use super::memory::{self, Kept, Locked, MOST_WORKERS, Phase, Serving, Visit, set_latch};
use crate::session::settings;

/// Makes this process the one that is woken for databases without a worker.
pub fn become_launcher() {
    if let Some(mut queue) = Locked::lock() {
        // SAFETY: a static of this process.
        queue.header_mut().launcher = unsafe { pg_sys::MyLatch };
    }
}

/// Makes this process the worker that is kept ready, and tells the launcher.
pub fn become_kept() {
    // SAFETY: statics of this process.
    let (pid, latch) = unsafe { (pg_sys::MyProcPid, pg_sys::MyLatch) };
    let launcher = Locked::lock().map(|mut queue| {
        queue.header_mut().kept = Kept { pid, latch, database: pg_sys::InvalidOid };
        queue.header().launcher
    });
    set_latch(launcher.unwrap_or(core::ptr::null_mut()));
}

/// Gives the kept worker a database. False when it has one already, which it is reminded to leave, or is not there.
pub fn send_kept(database: pg_sys::Oid) -> bool {
    let Some((sent, latch)) = Locked::lock().map(|mut queue| {
        let kept = &mut queue.header_mut().kept;
        let sent = kept.pid != 0 && kept.database == pg_sys::InvalidOid;
        if sent {
            kept.database = database;
        }
        (sent, if kept.pid == 0 { core::ptr::null_mut() } else { kept.latch })
    }) else {
        return false;
    };
    set_latch(latch);
    sent
}

/// The database that this process was given, where it is the kept worker.
pub fn kept_for() -> Option<pg_sys::Oid> {
    // SAFETY: a static of this process.
    let pid = unsafe { pg_sys::MyProcPid };
    let kept = Locked::lock().map(|queue| queue.header().kept)?;
    Some(kept.database).filter(|database| kept.pid == pid && *database != pg_sys::InvalidOid)
}

/// Whether there is a kept worker, be it on its way back just now.
pub fn has_kept() -> bool {
    Locked::lock().is_some_and(|queue| !queue.header().kept.latch.is_null())
}

/// Whether another database has entries and nobody who stores them.
pub fn others_wait() -> bool {
    let Some(queue) = Locked::lock() else { return false };
    let serving = queue.header().serving;
    let served = |database| serving.iter().any(|place| place.pid != 0 && place.database == database);
    queue.entries().iter().any(|entry| entry.phase == Phase::Queued && !served(entry.database))
}

/// No slot is free for a worker.
pub fn count_starved() {
    if let Some(header) = super::memory::counters_of() {
        header.starved.fetch_add(1, Ordering::Relaxed);
    }
}

/// Databases that have entries and no living worker. `alive`: whether a process has that id.
pub fn unserved(alive: impl Fn(i32) -> bool, found: &mut Vec<pg_sys::Oid>) {
    found.clear();
    found.reserve(MOST_WORKERS);
    let nobody = Serving { database: pg_sys::InvalidOid, pid: 0, latch: core::ptr::null_mut(), is_done: false };
    let mut serving = [nobody; MOST_WORKERS];
    if let Some(queue) = Locked::lock() {
        serving.copy_from_slice(&queue.header().serving);
    }
    // Asking about processes takes other locks, so it happens between the two looks.
    for place in &mut serving {
        if place.pid != 0 && !alive(place.pid) {
            place.pid = 0;
        }
    }
    let Some(queue) = Locked::lock() else { return };
    for entry in queue.entries().iter().filter(|entry| matches!(entry.phase, Phase::Queued | Phase::Taken)) {
        let served = serving.iter().any(|place| place.pid != 0 && place.database == entry.database);
        if !served && !found.contains(&entry.database) && found.len() < MOST_WORKERS {
            found.push(entry.database);
        }
    }
}

/// Makes this process the worker of its database. False when another living one has it, or there is no place.
pub fn serve(alive: impl Fn(i32) -> bool) -> bool {
    // SAFETY: statics of this process.
    let (database, pid, latch) = unsafe { (pg_sys::MyDatabaseId, pg_sys::MyProcPid, pg_sys::MyLatch) };
    let mut holders = [0i32; MOST_WORKERS];
    if let Some(queue) = Locked::lock() {
        for (holder, serving) in holders.iter_mut().zip(&queue.header().serving) {
            *holder = serving.pid;
        }
    }
    let dead = holders.map(|pid| pid == 0 || !alive(pid));
    let Some(mut queue) = Locked::lock() else {
        return false;
    };
    for (place, (serving, dead)) in queue.header_mut().serving.iter_mut().zip(dead).enumerate() {
        if dead && serving.pid == holders[place] {
            serving.pid = 0;
        }
    }
    if queue.header().serving.iter().any(|serving| serving.pid != 0 && serving.database == database) {
        return false;
    }
    // Best the place that it had before; worst one that still has to say that another database is done.
    let rank = |place: &Serving| if place.database == database { 0 } else { 1 + u8::from(place.is_done) };
    let free = queue.header_mut().serving.iter_mut().filter(|serving| serving.pid == 0);
    match free.min_by_key(|place| rank(place)) {
        Some(place) => {
            *place = Serving { database, pid, latch, is_done: false };
            true
        }
        None => false,
    }
}

/// This process serves no more. False when something came in meanwhile, so that it has to continue.
pub fn retire() -> bool {
    // SAFETY: statics of this process.
    let (database, pid) = unsafe { (pg_sys::MyDatabaseId, pg_sys::MyProcPid) };
    let Some(mut queue) = Locked::lock() else {
        return true;
    };
    if queue.entries().iter().any(|entry| entry.phase == Phase::Queued && entry.database == database) {
        return false;
    }
    if let Some(place) = queue.header_mut().serving.iter_mut().find(|serving| serving.pid == pid) {
        (place.pid, place.is_done) = (0, true);
    }
    true
}

/// Whether the worker that was sent to a database has done its work and left. Says so once.
pub fn take_done(database: pg_sys::Oid) -> bool {
    let Some(mut queue) = Locked::lock() else { return false };
    let mut done = false;
    for place in queue.header_mut().serving.iter_mut().filter(|place| place.database == database) {
        done |= core::mem::take(&mut place.is_done);
    }
    done
}

/// This process ends, and serves no more.
pub fn leave() {
    // SAFETY: a static of this process.
    let pid = unsafe { pg_sys::MyProcPid };
    let Some(mut queue) = Locked::lock() else { return };
    let header = queue.header_mut();
    header.serving.iter_mut().filter(|serving| serving.pid == pid).for_each(|serving| serving.pid = 0);
    if header.kept.pid == pid {
        header.kept.pid = 0;
    }
}

/// One entry taken from the queue; its bytes are a part of the buffer it was taken into.
pub struct Taken {
    entry: usize,
    /// Which use of the entry it was.
    number: u64,
    pub bytes: core::ops::Range<usize>,
}

/// Takes what is queued for this process's database, as far as `buffer` has room. Allocates nothing under the lock.
pub fn take(buffer: &mut Vec<u8>, taken: &mut Vec<Taken>) {
    buffer.clear();
    taken.clear();
    // SAFETY: a static of this process.
    let database = unsafe { pg_sys::MyDatabaseId };
    let Some(mut queue) = Locked::lock() else { return };
    for place in 0..queue.entries().len() {
        let entry = &queue.entries()[place];
        if entry.phase != Phase::Queued || entry.database != database {
            continue;
        }
        let from = buffer.len();
        if buffer.capacity() - from < entry.length as usize || taken.len() == taken.capacity() {
            break;
        }
        let number = entry.number;
        queue.read(place, buffer);
        queue.entries_mut()[place].phase = Phase::Taken;
        taken.push(Taken { entry: place, number, bytes: from..buffer.len() });
    }
}

/// Most bytes and entries that [`take`] can give at once.
pub fn capacity() -> (usize, usize) {
    (settings::event_queue_bytes().max(64 * 1024), 512)
}

/// Notes that a transaction is about to store the entry, which from then on cannot be withdrawn. False when it was.
pub fn claim(taken: &Taken, transaction: u64) -> bool {
    let Some(mut queue) = Locked::lock() else { return false };
    let entry = &mut queue.entries_mut()[taken.entry];
    if entry.length > 0 {
        entry.storing = transaction;
    }
    entry.length > 0
}

/// Notes, before the commit, which transaction stores the entry and under which id.
pub fn storing(taken: &Taken, transaction: u64, event_id: i64) {
    if let Some(mut queue) = Locked::lock() {
        let entry = &mut queue.entries_mut()[taken.entry];
        entry.storing = transaction;
        entry.event_id = event_id;
    }
}

/// What becomes of an entry that was taken.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The transaction that stored it committed.
    Stored,
    /// The table does not take it.
    SetAside,
    /// There is no table any more.
    NoTable,
}

/// These are settled: the sessions that wait for them are woken.
pub fn done(taken: &[Taken], outcome: Outcome) {
    for one in taken {
        let latch = Locked::lock().map(|mut queue| finish(&mut queue, one.entry, outcome));
        set_latch(latch.unwrap_or(core::ptr::null_mut()));
    }
}

/// The transaction that was to store these was rolled back; until the next one begins they can be withdrawn.
pub fn not_stored(taken: &[Taken]) {
    for one in taken {
        if let Some(mut queue) = Locked::lock() {
            let entry = &mut queue.entries_mut()[one.entry];
            (entry.storing, entry.event_id) = (0, 0);
        }
    }
}

/// Those of these that are not over wait for the next worker.
pub fn put_back(taken: &[Taken]) {
    for one in taken {
        if let Some(mut queue) = Locked::lock()
            && let Some(entry) = queue.entries_mut().get_mut(one.entry)
            && (entry.phase, entry.number) == (Phase::Taken, one.number)
        {
            (entry.phase, entry.storing, entry.event_id) = (Phase::Queued, 0, 0);
        }
    }
}

/// Frees an entry, or leaves it for the session that waits; gives that session's latch.
fn finish(queue: &mut Locked, place: usize, outcome: Outcome) -> *mut pg_sys::Latch {
    let entry = &mut queue.entries_mut()[place];
    if entry.length > 0
        && let Some(header) = memory::counters_of()
    {
        if outcome == Outcome::Stored {
            header.stored.fetch_add(1, Ordering::Relaxed);
        } else {
            entry.event_id = 0;
            header.unqueued.fetch_add(1, Ordering::Relaxed);
        }
        if outcome == Outcome::SetAside {
            header.set_aside.fetch_add(1, Ordering::Relaxed);
        }
        if outcome != Outcome::Stored && !entry.waiter.is_null() {
            header.late.fetch_add(1, Ordering::Relaxed);
        }
    }
    let waiter = entry.waiter;
    if waiter.is_null() {
        queue.free(place);
    } else {
        entry.phase = Phase::Stored;
    }
    waiter
}

/// Settles what a predecessor had taken when it was killed. `committed`: whether a transaction committed, by its full id.
pub fn recover(committed: impl Fn(u64) -> bool) {
    // SAFETY: a static of this process.
    let database = unsafe { pg_sys::MyDatabaseId };
    let mut place = 0;
    loop {
        let storing = {
            let Some(queue) = Locked::lock() else { return };
            let entries = queue.entries();
            let left = entries.iter().enumerate().skip(place);
            let mut taken = left.filter(|(_, entry)| entry.phase == Phase::Taken && entry.database == database);
            let Some((found, entry)) = taken.next() else {
                return;
            };
            place = found;
            entry.storing
        };
        // The commit log has locks of its own.
        let is_stored = storing != 0 && committed(storing);
        let latch = Locked::lock().map(|mut queue| {
            if is_stored {
                return finish(&mut queue, place, Outcome::Stored);
            }
            let entry = &mut queue.entries_mut()[place];
            entry.phase = Phase::Queued;
            entry.storing = 0;
            core::ptr::null_mut()
        });
        set_latch(latch.unwrap_or(core::ptr::null_mut()));
        place += 1;
    }
}

/// Frees what was stored for sessions that were terminated while they waited.
pub fn sweep(alive: impl Fn(i32) -> bool) {
    let mut place = 0;
    loop {
        let (pid, number) = {
            let Some(queue) = Locked::lock() else { return };
            let mut left = queue.entries().iter().enumerate().skip(place);
            let Some((found, entry)) = left.find(|(_, entry)| entry.phase == Phase::Stored) else {
                return;
            };
            place = found;
            (entry.waiter_pid, entry.number)
        };
        if !alive(pid)
            && let Some(mut queue) = Locked::lock()
            && queue.entries().get(place).is_some_and(|entry| entry.number == number)
        {
            queue.free(place);
        }
        place += 1;
    }
}

/// Drops everything that waits for a database, because it does not exist any more. Gives how many events that were.
pub fn forget(database: pg_sys::Oid) -> usize {
    let Some(mut queue) = Locked::lock() else {
        return 0;
    };
    let mut events = 0;
    for place in 0..queue.entries().len() {
        let entry = &queue.entries()[place];
        if entry.phase != Phase::Free && entry.database == database {
            events += usize::from(entry.length > 0);
            queue.free(place);
        }
    }
    let unsent = queue.header_mut().unsent.iter_mut();
    unsent.filter(|unsent| unsent.database == database).for_each(|unsent| unsent.database = pg_sys::InvalidOid);
    events
}

/// A pruner is sent to that database.
pub fn visit_begins(database: pg_sys::Oid) {
    if let Some(mut queue) = Locked::lock() {
        let header = queue.header_mut();
        (header.visited, header.visit) = (database, Visit::Underway);
    }
}

/// The pruner tells how far it got, and wakes the launcher.
pub fn visited(database: pg_sys::Oid, visit: Visit) {
    let launcher = Locked::lock().map(|mut queue| {
        if queue.header().visited == database {
            queue.header_mut().visit = visit;
        }
        queue.header().launcher
    });
    set_latch(launcher.unwrap_or(core::ptr::null_mut()));
}

/// How far the pruner got that was sent to that database.
pub fn visit_of(database: pg_sys::Oid) -> Visit {
    let visit = |queue: Locked| (queue.header().visited == database).then_some(queue.header().visit);
    Locked::lock().and_then(visit).unwrap_or(Visit::Underway)
}

//! Events in shared memory, on their way from the sessions to the background worker.
//!
//! A fixed piece of shared memory: entries, and blocks that hold the events' JSON in chains. One LWLock guards all of it and is held
//! for a copy of bytes at most: nothing under it allocates, sleeps or raises.
//!
//! An entry is `Queued` by a session, `Taken` by the worker of its database, and freed when the worker's transaction has
//! committed. Before the commit the worker notes its transaction in the entry; so if it is killed at any point, its
//! successor can tell what is stored from what is not.

use core::sync::atomic::{AtomicU64, Ordering};

use pgrx::pg_sys;

use crate::ffi::{self, Backend};
use crate::settings;

const BLOCK_BYTES: usize = 1024 - size_of::<u32>();
/// Databases that can be served at the same time.
const MOST_WORKERS: usize = 64;
const NONE: u32 = u32::MAX;

#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
enum Phase {
    Free = 0,
    Queued,
    Taken,
    /// Stored, and kept until the session that waits for it has seen it.
    Stored,
}

#[repr(C)]
struct Entry {
    phase: Phase,
    database: pg_sys::Oid,
    /// Which use of the entry this is; a ticket of an earlier use does not match.
    number: u64,
    first_block: u32,
    length: u32,
    /// The latch of the session that waits; NULL when nobody does.
    waiter: *mut pg_sys::Latch,
    /// That session's process.
    waiter_pid: i32,
    /// Full transaction id of the worker that is storing it; 0 before that.
    storing: u64,
    event_id: i64,
    attempts: u32,
}

#[repr(C)]
struct Block {
    next: u32,
    bytes: [u8; BLOCK_BYTES],
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Serving {
    database: pg_sys::Oid,
    pid: i32,
    latch: *mut pg_sys::Latch,
}

#[repr(C)]
struct Header {
    last_number: u64,
    entries: u32,
    blocks: u32,
    free_block: u32,
    launcher: *mut pg_sys::Latch,
    serving: [Serving; MOST_WORKERS],
    /// Refusals that went out before their event was on disk.
    late: AtomicU64,
    /// Events that found no room, and are in the server log only.
    unqueued: AtomicU64,
    stored: AtomicU64,
}

/// The queue's parts in shared memory.
struct Queue {
    lock: *mut pg_sys::LWLock,
    header: *mut Header,
    entries: *mut Entry,
    blocks: *mut Block,
}

/// Set in every process that attaches to shared memory, and in the postmaster again after a crash.
static QUEUE: Backend<Option<Queue>> = Backend::new(None);

fn queue() -> Option<&'static Queue> {
    // SAFETY: single-threaded; replaced only while shared memory is set up.
    unsafe { (*QUEUE.get()).as_ref() }
}

fn block_count() -> usize {
    (settings::event_queue_bytes() / size_of::<Block>()).max(16)
}

fn entry_count() -> usize {
    block_count() + MOST_WORKERS
}

fn size() -> usize {
    size_of::<Header>() + entry_count() * size_of::<Entry>() + block_count() * size_of::<Block>()
}

const TRANCHE: &core::ffi::CStr = c"pg_writeguard";

/// Asks for the shared memory; in the postmaster, before it is laid out.
pub unsafe fn request() {
    // SAFETY: called from shmem_request_hook.
    unsafe {
        pg_sys::RequestAddinShmemSpace(size());
        pg_sys::RequestNamedLWLockTranche(TRANCHE.as_ptr(), 1);
    }
}

/// Finds or initializes the shared memory; in every process that attaches to it, and after a crash again. True where
/// it was initialized.
pub unsafe fn startup() -> bool {
    // SAFETY: called from shmem_startup_hook; the memory is as large as asked for and maximally aligned.
    unsafe {
        let mut found = false;
        let base = pg_sys::ShmemInitStruct(TRANCHE.as_ptr(), size(), &mut found).cast::<u8>();
        let header = base.cast::<Header>();
        let entries = base.add(size_of::<Header>()).cast::<Entry>();
        let blocks = base.add(size_of::<Header>() + entry_count() * size_of::<Entry>()).cast::<Block>();
        if !found {
            base.write_bytes(0, size());
            (*header).entries = entry_count() as u32;
            (*header).blocks = block_count() as u32;
            for index in 0..block_count() {
                (*blocks.add(index)).next = if index + 1 == block_count() { NONE } else { index as u32 + 1 };
            }
        }
        let lock = &raw mut (*pg_sys::GetNamedLWLockTranche(TRANCHE.as_ptr())).lock;
        *QUEUE.get() = Some(Queue { lock, header, entries, blocks });
        !found
    }
}

/// Whether the library was preloaded, so that there is a queue.
pub fn is_there() -> bool {
    queue().is_some()
}

/// The queue under its lock.
struct Locked(&'static Queue);

impl Locked {
    fn lock() -> Option<Self> {
        let queue = queue()?;
        // SAFETY: the lock lives in shared memory. Held for a few copies only.
        unsafe { pg_sys::LWLockAcquire(queue.lock, pg_sys::LWLockMode::LW_EXCLUSIVE) };
        Some(Self(queue))
    }

    #[allow(clippy::mut_from_ref)]
    fn header(&self) -> &mut Header {
        // SAFETY: under the lock nobody else touches it.
        unsafe { &mut *self.0.header }
    }

    #[allow(clippy::mut_from_ref)]
    fn entries(&self) -> &mut [Entry] {
        // SAFETY: under the lock nobody else touches them; there are as many as the header says.
        unsafe { core::slice::from_raw_parts_mut(self.0.entries, self.header().entries as usize) }
    }

    #[allow(clippy::mut_from_ref)]
    fn blocks(&self) -> &mut [Block] {
        // SAFETY: as for the entries.
        unsafe { core::slice::from_raw_parts_mut(self.0.blocks, self.header().blocks as usize) }
    }

    /// Puts `bytes` into a chain of blocks; none when there are too few.
    fn write(&self, bytes: &[u8]) -> Option<u32> {
        let needed = bytes.len().div_ceil(BLOCK_BYTES);
        let (header, blocks) = (self.header(), self.blocks());
        let mut last = header.free_block;
        for _ in 1..needed {
            last = blocks.get(last as usize)?.next;
        }
        if needed == 0 {
            return Some(NONE);
        }
        let rest = blocks.get(last as usize)?.next;
        let first = header.free_block;
        let mut at = first;
        for chunk in bytes.chunks(BLOCK_BYTES) {
            let block = blocks.get_mut(at as usize)?;
            block.bytes[..chunk.len()].copy_from_slice(chunk);
            at = block.next;
        }
        blocks[last as usize].next = NONE;
        header.free_block = rest;
        Some(first)
    }

    /// Copies an entry's bytes to the end of `to`, which has room for them.
    fn read(&self, entry: &Entry, to: &mut Vec<u8>) {
        let mut left = entry.length as usize;
        let mut at = entry.first_block;
        while left > 0
            && let Some(block) = self.blocks().get(at as usize)
        {
            let chunk = left.min(BLOCK_BYTES);
            to.extend_from_slice(&block.bytes[..chunk]);
            left -= chunk;
            at = block.next;
        }
    }

    /// Puts bytes into a fresh entry; none when there is no room.
    fn add(&self, database: pg_sys::Oid, bytes: &[u8]) -> Option<usize> {
        let place = self.entries().iter().position(|entry| entry.phase == Phase::Free)?;
        let first_block = self.write(bytes)?;
        let header = self.header();
        header.last_number += 1;
        self.entries()[place] = Entry {
            phase: Phase::Queued,
            database,
            number: header.last_number,
            first_block,
            length: bytes.len() as u32,
            waiter: core::ptr::null_mut(),
            waiter_pid: 0,
            storing: 0,
            event_id: 0,
            attempts: 0,
        };
        Some(place)
    }

    fn free(&self, entry: &mut Entry) {
        let (header, blocks) = (self.header(), self.blocks());
        let mut at = entry.first_block;
        while let Some(block) = blocks.get_mut(at as usize) {
            let next = block.next;
            block.next = header.free_block;
            header.free_block = at;
            at = next;
        }
        entry.first_block = NONE;
        entry.phase = Phase::Free;
        entry.waiter = core::ptr::null_mut();
    }
}

impl Drop for Locked {
    fn drop(&mut self) {
        // SAFETY: we hold it. An ERROR cannot have come between: nothing under the lock raises.
        unsafe { pg_sys::LWLockRelease(self.0.lock) }
    }
}

fn set_latch(latch: *mut pg_sys::Latch) {
    if !latch.is_null() {
        // SAFETY: a latch of a PGPROC, which lives as long as shared memory does; a wrong owner wakes up once more than needed.
        unsafe { pg_sys::SetLatch(latch) }
    }
}

/// A session's claim to learn what became of its event.
#[derive(Debug, Clone, Copy)]
pub struct Ticket {
    entry: usize,
    number: u64,
}

/// Largest statement text that goes through the queue, in bytes.
pub fn statement_bytes() -> usize {
    (settings::event_queue_bytes() / 8).min(64 * 1024)
}

/// Puts an event (or nothing, to have the database's outbox served) into the queue; none when there is no room.
pub fn push(json: &[u8], wait: bool) -> Option<Ticket> {
    // SAFETY: statics of this process.
    let (database, latch, pid) = unsafe { (pg_sys::MyDatabaseId, pg_sys::MyLatch, pg_sys::MyProcPid) };
    let (ticket, wake) = {
        let queue = Locked::lock()?;
        let place = queue.add(database, json)?;
        let entry = &mut queue.entries()[place];
        if wait {
            entry.waiter = latch;
            entry.waiter_pid = pid;
        }
        let header = queue.header();
        let worker = header.serving.iter().find(|serving| serving.pid != 0 && serving.database == database);
        (Ticket { entry: place, number: entry.number }, worker.map_or(header.launcher, |worker| worker.latch))
    };
    set_latch(wake);
    Some(ticket)
}

/// The id of a stored event; none while it is not on disk. Ends the claim when it is.
pub fn stored(ticket: Ticket) -> Option<i64> {
    let queue = Locked::lock()?;
    let entry = queue.entries().get_mut(ticket.entry)?;
    if entry.number != ticket.number || entry.phase != Phase::Stored {
        return None;
    }
    let id = entry.event_id;
    queue.free(entry);
    Some(id)
}

/// Nobody waits for this event any more; the worker stores it when it can.
pub fn abandon(ticket: Ticket) {
    let Some(queue) = Locked::lock() else { return };
    if let Some(entry) = queue.entries().get_mut(ticket.entry)
        && entry.number == ticket.number
    {
        entry.waiter = core::ptr::null_mut();
        if entry.phase == Phase::Stored {
            queue.free(entry);
        }
    }
    queue.header().late.fetch_add(1, Ordering::Relaxed);
}

/// Counts an event for which there was no room.
pub fn count_unqueued() {
    if let Some(queue) = queue() {
        // SAFETY: an atomic in shared memory.
        unsafe { (*queue.header).unqueued.fetch_add(1, Ordering::Relaxed) };
    }
}

/// Waiting for the worker, stored since the server started, late, and found no room.
pub fn counters() -> [u64; 4] {
    let Some(queue) = Locked::lock() else {
        return [0; 4];
    };
    let waiting = queue.entries().iter().filter(|entry| matches!(entry.phase, Phase::Queued | Phase::Taken)).count();
    let header = queue.header();
    [
        waiting as u64,
        header.stored.load(Ordering::Relaxed),
        header.late.load(Ordering::Relaxed),
        header.unqueued.load(Ordering::Relaxed),
    ]
}

// What follows is for the worker.

/// Makes this process the one that is woken for databases without a worker.
pub fn become_launcher() {
    if let Some(queue) = Locked::lock() {
        // SAFETY: a static of this process.
        queue.header().launcher = unsafe { pg_sys::MyLatch };
    }
}

/// Databases that have entries and no living worker. `alive` tells of a process id.
pub fn unserved(alive: impl Fn(i32) -> bool, found: &mut Vec<pg_sys::Oid>) {
    found.clear();
    found.reserve(MOST_WORKERS);
    let mut serving = [Serving { database: pg_sys::InvalidOid, pid: 0, latch: core::ptr::null_mut() }; MOST_WORKERS];
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
    let Some(queue) = Locked::lock() else {
        return false;
    };
    for (place, (serving, dead)) in queue.header().serving.iter_mut().zip(dead).enumerate() {
        if dead && serving.pid == holders[place] {
            serving.pid = 0;
        }
    }
    if queue.header().serving.iter().any(|serving| serving.pid != 0 && serving.database == database) {
        return false;
    }
    match queue.header().serving.iter_mut().find(|serving| serving.pid == 0) {
        Some(place) => {
            *place = Serving { database, pid, latch };
            true
        }
        None => false,
    }
}

/// This process serves no more. False when something came in meanwhile and it has to go on.
pub fn retire() -> bool {
    // SAFETY: statics of this process.
    let (database, pid) = unsafe { (pg_sys::MyDatabaseId, pg_sys::MyProcPid) };
    let Some(queue) = Locked::lock() else {
        return true;
    };
    if queue.entries().iter().any(|entry| entry.phase == Phase::Queued && entry.database == database) {
        return false;
    }
    if let Some(place) = queue.header().serving.iter_mut().find(|serving| serving.pid == pid) {
        place.pid = 0;
    }
    true
}

/// One entry taken from the queue; its bytes are a part of the buffer it was taken into.
pub struct Taken {
    entry: usize,
    pub bytes: core::ops::Range<usize>,
    /// How often it was taken, this time included.
    pub attempts: u32,
}

/// Takes what is queued for this process's database, as far as `buffer` has room. Allocates nothing under the lock.
pub fn take(buffer: &mut Vec<u8>, taken: &mut Vec<Taken>) {
    buffer.clear();
    taken.clear();
    // SAFETY: a static of this process.
    let database = unsafe { pg_sys::MyDatabaseId };
    let Some(queue) = Locked::lock() else { return };
    for (place, entry) in queue.entries().iter_mut().enumerate() {
        if entry.phase != Phase::Queued || entry.database != database {
            continue;
        }
        let from = buffer.len();
        if buffer.capacity() - from < entry.length as usize || taken.len() == taken.capacity() {
            break;
        }
        queue.read(entry, buffer);
        entry.phase = Phase::Taken;
        entry.attempts += 1;
        taken.push(Taken { entry: place, bytes: from..buffer.len(), attempts: entry.attempts });
    }
}

/// Most bytes and entries that [`take`] can give at once.
pub fn capacity() -> (usize, usize) {
    (settings::event_queue_bytes().max(64 * 1024), 512)
}

/// Notes, before the commit, which transaction stores the entry and under which id.
pub fn storing(taken: &Taken, transaction: u64, event_id: i64) {
    if let Some(queue) = Locked::lock() {
        let entry = &mut queue.entries()[taken.entry];
        entry.storing = transaction;
        entry.event_id = event_id;
    }
}

/// The transaction that stored these committed: their sessions may go on.
pub fn done(taken: &[Taken]) {
    for one in taken {
        let latch = Locked::lock().map(|queue| finish(&queue, one.entry));
        set_latch(latch.unwrap_or(core::ptr::null_mut()));
    }
}

/// Frees a stored entry, or leaves it for the session that waits; gives that session's latch.
fn finish(queue: &Locked, place: usize) -> *mut pg_sys::Latch {
    queue.header().stored.fetch_add(1, Ordering::Relaxed);
    let entry = &mut queue.entries()[place];
    let waiter = entry.waiter;
    if waiter.is_null() {
        queue.free(entry);
    } else {
        entry.phase = Phase::Stored;
    }
    waiter
}

/// Settles what a predecessor had taken when it was killed. `committed` tells of a full transaction id.
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
        let latch = Locked::lock().map(|queue| {
            if is_stored {
                return finish(&queue, place);
            }
            let entry = &mut queue.entries()[place];
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
            && let Some(queue) = Locked::lock()
            && let Some(entry) = queue.entries().get_mut(place)
            && entry.number == number
        {
            queue.free(entry);
        }
        place += 1;
    }
}

/// Drops everything that waits for a database, because it does not exist any more. Gives how many events that were.
pub fn forget(database: pg_sys::Oid) -> usize {
    let Some(queue) = Locked::lock() else {
        return 0;
    };
    let mut events = 0;
    for entry in queue.entries().iter_mut() {
        if entry.phase != Phase::Free && entry.database == database {
            events += usize::from(entry.length > 0);
            queue.free(entry);
        }
    }
    events
}

/// An event that waits while the server is down.
pub struct Kept {
    pub database: pg_sys::Oid,
    /// See [`storing`]; 0 where no transaction had it.
    pub storing: u64,
    pub event_id: i64,
    pub json: Vec<u8>,
}

/// All events that are not stored. Only for the postmaster, when it is the last process.
pub fn leftover() -> Vec<Kept> {
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
pub fn put_back(kept: &Kept) -> bool {
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

/// Waits until the event is on disk, at most [`settings::event_timeout`]; gives its id.
///
/// # Errors
/// Whatever an interrupt raises meanwhile; the event stays queued.
pub fn wait(ticket: Ticket) -> Result<Option<i64>, ffi::Foreign> {
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

//! The shared memory that events wait in.
//!
//! A fixed piece of shared memory: entries, and blocks that hold the events' JSON in chains. One LWLock guards all of
//! it and is held for a copy of bytes at most: nothing under it allocates, sleeps or raises
//! (but in the postmaster when it is the only process, see `queue_file`).
//!
//! An entry is `Queued` by a session, `Taken` by the worker of its database, and freed when the worker's transaction
//! has committed. Before the commit the worker notes its transaction in the entry; so if it is killed at any point,
//! its successor can tell what is stored from what is not.

use core::sync::atomic::AtomicU64;

use pgrx::pg_sys;

use crate::pg::preload;
use crate::pg::shmem::{self, Plain, Region};
use crate::session::settings;

const BLOCK_BYTES: usize = 1024 - size_of::<u32>();
/// Databases that can be served at the same time.
pub const MOST_WORKERS: usize = 64;
const NONE: u32 = u32::MAX;

#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Phase {
    Free = 0,
    Queued,
    Taken,
    /// Stored, and kept until the session that waits for it has seen it.
    Stored,
}

#[repr(C)]
pub struct Entry {
    pub phase: Phase,
    pub database: pg_sys::Oid,
    /// Which use of the entry this is; a ticket of an earlier use does not match.
    pub number: u64,
    pub first_block: u32,
    pub length: u32,
    /// The latch of the session that waits; NULL when nobody does.
    pub waiter: *mut pg_sys::Latch,
    /// That session's process.
    pub waiter_pid: i32,
    /// Full transaction id of the worker that is storing it; 0 before that.
    pub storing: u64,
    pub event_id: i64,
}

#[repr(C)]
struct Block {
    next: u32,
    bytes: [u8; BLOCK_BYTES],
}

#[repr(C)]
#[derive(Clone, Copy)]
pub struct Serving {
    pub database: pg_sys::Oid,
    /// 0: nobody serves it now.
    pub pid: i32,
    pub latch: *mut pg_sys::Latch,
    /// The last one that served it left because there was nothing more to do.
    pub is_done: bool,
}

/// The worker that is registered with the postmaster from the start, so that it has a slot whoever takes all others. It waits
/// without a database until it is given one.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Kept {
    /// 0: it is not there, or on its way out.
    pub pid: i32,
    pub latch: *mut pg_sys::Latch,
    /// The database it was given; InvalidOid while it waits for one.
    pub database: pg_sys::Oid,
}

/// A database whose notifications could not be sent, and when that is tried again.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Unsent {
    /// InvalidOid: the place is free.
    pub database: pg_sys::Oid,
    pub since: pg_sys::TimestampTz,
    pub attempts: u32,
    pub next: pg_sys::TimestampTz,
}

/// How far the pruner got with the database that it was sent to last; there is one at a time.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Visit {
    Underway = 0,
    Done,
    /// Its time was over, and there is more to do.
    More,
    /// The extension is not installed there.
    NotInstalled,
}

#[repr(C)]
pub struct Header {
    pub last_number: u64,
    pub entries: u32,
    pub blocks: u32,
    pub free_block: u32,
    pub launcher: *mut pg_sys::Latch,
    pub serving: [Serving; MOST_WORKERS],
    pub kept: Kept,
    pub unsent: [Unsent; MOST_WORKERS],
    pub visited: pg_sys::Oid,
    pub visit: Visit,
}

/// What is counted without the lock.
#[repr(C)]
pub struct Counters {
    /// Refusals that went out before their event was on disk.
    pub late: AtomicU64,
    /// Events that found no room, and are in the server log only.
    pub unqueued: AtomicU64,
    pub stored: AtomicU64,
    /// Events that the table does not take; they are in the server log only, and among [`Counters::unqueued`] as well.
    pub set_aside: AtomicU64,
    /// Times that notifications could not be sent.
    pub unsent_attempts: AtomicU64,
    /// Times that no slot was free for a worker, and the kept one was all there was.
    pub starved: AtomicU64,
}

// SAFETY: numbers, bytes, and pointers to latches in shared memory; zero is the first word of each enumeration.
unsafe impl Plain for Header {}
// SAFETY: as above.
unsafe impl Plain for Counters {}
// SAFETY: as above.
unsafe impl Plain for Entry {}

/// The counters and the header, and after them the entries and then the blocks.
static QUEUE: Region<Counters, Header> = Region::new(c"pg_writeguard");

/// The counters; none where the library was not preloaded.
pub fn counters_of() -> Option<&'static Counters> {
    QUEUE.open()
}

fn block_count() -> usize {
    (settings::event_queue_bytes() / size_of::<Block>()).max(16)
}

fn entry_count() -> usize {
    block_count() + MOST_WORKERS
}

fn bytes_of_places() -> usize {
    entry_count() * size_of::<Entry>() + block_count() * size_of::<Block>()
}

/// Asks for the shared memory; in the postmaster, before it is laid out.
pub unsafe fn request() {
    // SAFETY: a plain old frame, called from shmem_request_hook.
    unsafe { QUEUE.request(bytes_of_places()) };
}

/// Finds or initializes the shared memory; in every process that attaches to it, and after a crash again. True where
/// it was initialized.
pub unsafe fn startup() -> bool {
    // SAFETY: a plain old frame, called from shmem_startup_hook.
    let is_new = unsafe { QUEUE.startup(bytes_of_places()) };
    if QUEUE.open().is_some() {
        preload::note_attached();
    }
    if is_new && let Some(mut queue) = Locked::lock() {
        queue.header_mut().entries = entry_count() as u32;
        queue.header_mut().blocks = block_count() as u32;
        let (_, blocks) = queue.parts();
        let last = blocks.len() - 1;
        for (index, block) in blocks.iter_mut().enumerate() {
            block.next = if index == last { NONE } else { index as u32 + 1 };
        }
    }
    is_new
}

/// Largest statement text that goes through the queue, in bytes.
pub fn statement_bytes() -> usize {
    (settings::event_queue_bytes() / 8).min(64 * 1024)
}

/// The queue under its lock.
pub struct Locked {
    header: shmem::Locked<Counters, Header>,
    entries: *mut Entry,
}

impl Locked {
    pub fn lock() -> Option<Self> {
        let entries = QUEUE.following()?;
        Some(Self { header: QUEUE.lock()?, entries })
    }

    /// The same, unless somebody holds the lock now.
    pub fn try_lock() -> Option<Self> {
        let entries = QUEUE.following()?;
        Some(Self { header: QUEUE.try_lock()?, entries })
    }

    pub fn header(&self) -> &Header {
        &self.header
    }

    pub fn header_mut(&mut self) -> &mut Header {
        &mut self.header
    }

    pub fn entries(&self) -> &[Entry] {
        // SAFETY: under the lock nobody else touches them; there are as many as the header says.
        unsafe { core::slice::from_raw_parts(self.entries, self.header.entries as usize) }
    }

    pub fn entries_mut(&mut self) -> &mut [Entry] {
        // SAFETY: as above.
        unsafe { core::slice::from_raw_parts_mut(self.entries, self.header.entries as usize) }
    }

    fn first_block(&self) -> *mut Block {
        // SAFETY: the blocks follow the entries.
        unsafe { self.entries.add(self.header.entries as usize).cast() }
    }

    fn blocks(&self) -> &[Block] {
        // SAFETY: as for the entries.
        unsafe { core::slice::from_raw_parts(self.first_block(), self.header.blocks as usize) }
    }

    fn parts(&mut self) -> (&mut Header, &mut [Block]) {
        let (first, count) = (self.first_block(), self.header.blocks as usize);
        // SAFETY: as for the entries; the header is apart from them.
        (&mut self.header, unsafe { core::slice::from_raw_parts_mut(first, count) })
    }

    /// Puts `bytes` into a chain of blocks; none when there are too few.
    fn write(&mut self, bytes: &[u8]) -> Option<u32> {
        let needed = bytes.len().div_ceil(BLOCK_BYTES);
        let (header, blocks) = self.parts();
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
    pub fn read(&self, entry: usize, to: &mut Vec<u8>) {
        let entry = &self.entries()[entry];
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
    pub fn add(&mut self, database: pg_sys::Oid, bytes: &[u8]) -> Option<usize> {
        let place = self.entries().iter().position(|entry| entry.phase == Phase::Free)?;
        let first_block = self.write(bytes)?;
        self.header.last_number += 1;
        let number = self.header.last_number;
        self.entries_mut()[place] = Entry {
            phase: Phase::Queued,
            database,
            number,
            first_block,
            length: bytes.len() as u32,
            waiter: core::ptr::null_mut(),
            waiter_pid: 0,
            storing: 0,
            event_id: 0,
        };
        Some(place)
    }

    /// Whether a database has entries that are not stored.
    pub fn has(&self, database: pg_sys::Oid) -> bool {
        let waits = |entry: &Entry| matches!(entry.phase, Phase::Queued | Phase::Taken);
        self.entries().iter().any(|entry| waits(entry) && entry.database == database)
    }

    /// Whether a worker says that it serves a database.
    pub fn serves(&self, database: pg_sys::Oid) -> bool {
        self.header().serving.iter().any(|serving| serving.pid != 0 && serving.database == database)
    }

    /// Gives an entry's blocks back, and the entry.
    pub fn free(&mut self, entry: usize) {
        let entry = &mut self.entries_mut()[entry];
        entry.phase = Phase::Free;
        entry.waiter = core::ptr::null_mut();
        let mut at = core::mem::replace(&mut entry.first_block, NONE);
        let (header, blocks) = self.parts();
        while let Some(block) = blocks.get_mut(at as usize) {
            let next = block.next;
            block.next = header.free_block;
            header.free_block = at;
            at = next;
        }
    }
}

/// Wakes a process, if there is one to wake.
pub fn set_latch(latch: *mut pg_sys::Latch) {
    if !latch.is_null() {
        // SAFETY: a latch of a PGPROC, which lives as long as shared memory does; a wrong owner wakes up once more
        // than needed.
        unsafe { pg_sys::SetLatch(latch) }
    }
}

//! The shared memory that events wait in.
//!
//! A fixed piece of shared memory: entries, and blocks that hold the events' JSON in chains. One LWLock guards all of
//! it and is held for a copy of bytes at most: nothing under it allocates, sleeps or raises
//! (but in the postmaster when it is the only process, see `keep`).
//!
//! An entry is `Queued` by a session, `Taken` by the worker of its database, and freed when the worker's transaction
//! has committed. Before the commit the worker notes its transaction in the entry; so if it is killed at any point,
//! its successor can tell what is stored from what is not.

use core::sync::atomic::AtomicU64;

use pgrx::pg_sys;

use crate::ffi;
use crate::pg::backend_local::BackendLocal;
use crate::settings;

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
    /// Refusals that went out before their event was on disk.
    pub late: AtomicU64,
    /// Events that found no room, and are in the server log only.
    pub unqueued: AtomicU64,
    pub stored: AtomicU64,
    /// Events that the table does not take; they are in the server log only, and among [`Header::unqueued`] as well.
    pub set_aside: AtomicU64,
    /// Times that notifications could not be sent.
    pub unsent_attempts: AtomicU64,
    /// Times that no slot was free for a worker, and the kept one was all there was.
    pub starved: AtomicU64,
}

/// The queue's parts in shared memory.
struct Queue {
    lock: *mut pg_sys::LWLock,
    header: *mut Header,
    entries: *mut Entry,
    blocks: *mut Block,
}

/// Set in every process that attaches to shared memory, and in the postmaster again after a crash.
static QUEUE: BackendLocal<Option<Queue>> = BackendLocal::new(None);

/// The counters, which need no lock.
pub fn counters_of() -> Option<&'static Header> {
    // SAFETY: shared memory; only its atomics are read without the lock.
    queue().map(|queue| unsafe { &*queue.header })
}

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
    // SAFETY: a plain old frame, called from shmem_request_hook.
    unsafe {
        ffi::RequestAddinShmemSpace(size());
        ffi::RequestNamedLWLockTranche(TRANCHE.as_ptr(), 1);
    }
}

/// Finds or initializes the shared memory; in every process that attaches to it, and after a crash again. True where
/// it was initialized.
pub unsafe fn startup() -> bool {
    // SAFETY: a plain old frame, called from shmem_startup_hook; the memory is as large as asked for and maximally aligned.
    unsafe {
        let mut found = false;
        let base = ffi::ShmemInitStruct(TRANCHE.as_ptr(), size(), &mut found).cast::<u8>();
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
        let lock = &raw mut (*ffi::GetNamedLWLockTranche(TRANCHE.as_ptr())).lock;
        *QUEUE.get() = Some(Queue { lock, header, entries, blocks });
        !found
    }
}

/// Whether the library was preloaded, so that there is a queue.
pub fn is_there() -> bool {
    queue().is_some()
}

/// The queue under its lock.
pub struct Locked(&'static Queue);

impl Locked {
    pub fn lock() -> Option<Self> {
        let queue = queue()?;
        // SAFETY: the lock lives in shared memory. Held for a few copies only.
        unsafe { pg_sys::LWLockAcquire(queue.lock, pg_sys::LWLockMode::LW_EXCLUSIVE) };
        Some(Self(queue))
    }

    /// The same, unless somebody holds the lock now.
    pub fn try_lock() -> Option<Self> {
        let queue = queue()?;
        // SAFETY: as above; this one never waits.
        unsafe { pg_sys::LWLockConditionalAcquire(queue.lock, pg_sys::LWLockMode::LW_EXCLUSIVE) }.then_some(Self(queue))
    }

    #[allow(clippy::mut_from_ref)]
    pub fn header(&self) -> &mut Header {
        // SAFETY: under the lock nobody else touches it.
        unsafe { &mut *self.0.header }
    }

    #[allow(clippy::mut_from_ref)]
    pub fn entries(&self) -> &mut [Entry] {
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
    pub fn read(&self, entry: &Entry, to: &mut Vec<u8>) {
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
    pub fn add(&self, database: pg_sys::Oid, bytes: &[u8]) -> Option<usize> {
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

    pub fn free(&self, entry: &mut Entry) {
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

/// Wakes a process, if there is one to wake.
pub fn set_latch(latch: *mut pg_sys::Latch) {
    if !latch.is_null() {
        // SAFETY: a latch of a PGPROC, which lives as long as shared memory does; a wrong owner wakes up once more
        // than needed.
        unsafe { pg_sys::SetLatch(latch) }
    }
}

//! The buckets of all rates in shared memory, one for each policy, login and database.
//!
//! A fixed table. A bucket's only number is changed by compare and exchange, so a covered write takes no lock once its
//! session knows the bucket's place. While a transaction uses a bucket it is pinned; who needs room takes a bucket that
//! nobody pins and that is full by now, because a full one is as good as none. The lock is for giving buckets to new
//! owners; nothing under it allocates, sleeps or raises.

use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use pgrx::pg_sys;

use crate::ffi;
use crate::pg::backend_local::BackendLocal;
use crate::settings;

/// Whose bucket it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct Owner {
    /// Of the policy's name and rate.
    pub policy: u64,
    pub database: pg_sys::Oid,
    pub login: pg_sys::Oid,
}

#[repr(C)]
struct Bucket {
    owner: Owner,
    /// Which use of the place this is; 0: none yet.
    number: AtomicU64,
    /// Transactions that use it, or [`CHANGING`].
    users: AtomicU32,
    /// When it is full again, by [`now`].
    full_at: AtomicU64,
}

/// In place of users: the bucket is given to a new owner.
const CHANGING: u32 = 1 << 31;

#[repr(C)]
struct Header {
    buckets: u32,
    last_number: u64,
    /// Writes that found no room.
    refused: AtomicU64,
}

struct Table {
    lock: *mut pg_sys::LWLock,
    header: *mut Header,
    buckets: *mut Bucket,
}

static TABLE: BackendLocal<Option<Table>> = BackendLocal::new(None);

const TRANCHE: &core::ffi::CStr = c"pg_writeguard_rates";

fn size() -> usize {
    size_of::<Header>() + settings::rate_slots() * size_of::<Bucket>()
}

/// Asks for the shared memory; in the postmaster, before it is laid out.
pub unsafe fn request() {
    // SAFETY: called from shmem_request_hook.
    unsafe {
        pg_sys::RequestAddinShmemSpace(size());
        pg_sys::RequestNamedLWLockTranche(TRANCHE.as_ptr(), 1);
    }
}

/// Finds or initializes the shared memory: all buckets are full.
pub unsafe fn startup() {
    // SAFETY: called from shmem_startup_hook; the memory is as large as asked for and maximally aligned.
    unsafe {
        let mut found = false;
        let base = pg_sys::ShmemInitStruct(TRANCHE.as_ptr(), size(), &mut found).cast::<u8>();
        if !found {
            base.write_bytes(0, size());
            (*base.cast::<Header>()).buckets = settings::rate_slots() as u32;
        }
        let lock = &raw mut (*pg_sys::GetNamedLWLockTranche(TRANCHE.as_ptr())).lock;
        let buckets = base.add(size_of::<Header>()).cast();
        *TABLE.get() = Some(Table { lock, header: base.cast(), buckets });
    }
}

fn table() -> Option<&'static Table> {
    // SAFETY: single-threaded; replaced only while shared memory is set up.
    unsafe { (*TABLE.get()).as_ref() }
}

/// Nanoseconds of a clock that only goes forward; the same in all processes.
pub fn now() -> u64 {
    ffi::monotonic_nanoseconds()
}

/// The place of a bucket, as a session remembers it from one transaction to the next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Known {
    place: usize,
    number: u64,
}

/// A bucket that cannot be given to another owner until it is let go.
#[derive(Debug, PartialEq, Eq)]
pub struct Pinned(Known);

impl Table {
    fn bucket(&self, place: usize) -> Option<&'static Bucket> {
        // SAFETY: shared memory that lives as long as the process; there are as many buckets as the header says. The
        // owner is read and written under the lock only.
        unsafe { (place < (*self.header).buckets as usize).then(|| &*self.buckets.add(place)) }
    }
}

/// Pins a bucket that this session knows; none when it is another's by now.
pub fn pin(known: Known) -> Option<Pinned> {
    let bucket = table()?.bucket(known.place)?;
    let before = bucket.users.fetch_add(1, Ordering::AcqRel);
    if before & CHANGING == 0 && bucket.number.load(Ordering::Acquire) == known.number {
        return Some(Pinned(known));
    }
    bucket.users.fetch_sub(1, Ordering::AcqRel);
    None
}

/// Finds the owner's bucket, or makes one, and pins it; none when there is no room.
pub fn find(owner: Owner) -> Option<Pinned> {
    let table = table()?;
    let now = now();
    // SAFETY: the lock lives in shared memory; nothing below raises.
    unsafe {
        pg_sys::LWLockAcquire(table.lock, pg_sys::LWLockMode::LW_EXCLUSIVE);
        let found = search(table, owner, now);
        if found.is_none() {
            (*table.header).refused.fetch_add(1, Ordering::Relaxed);
        }
        pg_sys::LWLockRelease(table.lock);
        found
    }
}

/// # Safety
/// Under the lock.
unsafe fn search(table: &Table, owner: Owner, now: u64) -> Option<Pinned> {
    // SAFETY: the caller's promise.
    unsafe {
        let count = (*table.header).buckets as usize;
        let mut spare = None;
        for place in 0..count {
            let bucket = &mut *table.buckets.add(place);
            let number = bucket.number.load(Ordering::Acquire);
            if number != 0 && bucket.owner == owner {
                bucket.users.fetch_add(1, Ordering::AcqRel);
                return Some(Pinned(Known { place, number }));
            }
            let is_full = number == 0 || bucket.full_at.load(Ordering::Acquire) <= now;
            if spare.is_none() && is_full && bucket.users.load(Ordering::Acquire) == 0 {
                spare = Some(place);
            }
            if number == 0 {
                // Places are used in order, so nothing follows.
                break;
            }
        }
        let place = spare?;
        let bucket = &mut *table.buckets.add(place);
        bucket.users.compare_exchange(0, CHANGING, Ordering::AcqRel, Ordering::Acquire).ok()?;
        (*table.header).last_number += 1;
        let number = (*table.header).last_number;
        bucket.number.store(number, Ordering::Release);
        bucket.owner = owner;
        bucket.full_at.store(now, Ordering::Release);
        // Others may have tried to pin it meanwhile, and take themselves off again.
        bucket.users.fetch_sub(CHANGING - 1, Ordering::AcqRel);
        Some(Pinned(Known { place, number }))
    }
}

impl Pinned {
    /// Its place, to be remembered.
    pub fn known(&self) -> Known {
        self.0
    }

    /// Changes when the bucket is full, from what it is now: `change` is tried until nobody else came between.
    ///
    /// # Errors
    /// Those of `change`; the bucket stays as it was.
    pub fn change<E>(&self, change: impl Fn(u64) -> Result<u64, E>) -> Result<(), E> {
        let Some(bucket) = table().and_then(|table| table.bucket(self.0.place)) else { return Ok(()) };
        let mut full_at = bucket.full_at.load(Ordering::Acquire);
        loop {
            let then = change(full_at)?;
            match bucket.full_at.compare_exchange_weak(full_at, then, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return Ok(()),
                Err(other) => full_at = other,
            }
        }
    }

    /// When the bucket is full.
    pub fn full_at(&self) -> u64 {
        table().and_then(|table| table.bucket(self.0.place)).map_or(0, |bucket| bucket.full_at.load(Ordering::Acquire))
    }

    /// Lets the bucket go.
    pub fn unpin(self) {
        if let Some(bucket) = table().and_then(|table| table.bucket(self.0.place)) {
            bucket.users.fetch_sub(1, Ordering::AcqRel);
        }
    }
}

/// The buckets of this database that are not full: whose they are, and when they are full.
pub fn of_this_database() -> Vec<(Owner, u64)> {
    let Some(table) = table() else { return Vec::new() };
    // SAFETY: a static of this process; owners are read under the lock, which is held for no more than that.
    unsafe {
        let (database, now) = (pg_sys::MyDatabaseId, now());
        let mut found = Vec::with_capacity((*table.header).buckets as usize);
        pg_sys::LWLockAcquire(table.lock, pg_sys::LWLockMode::LW_SHARED);
        found.extend((0..(*table.header).buckets as usize).filter_map(|place| {
            let bucket = table.bucket(place)?;
            let full_at = bucket.full_at.load(Ordering::Acquire);
            let is_ours = bucket.number.load(Ordering::Acquire) != 0 && bucket.owner.database == database;
            (is_ours && full_at > now).then_some((bucket.owner, full_at))
        }));
        pg_sys::LWLockRelease(table.lock);
        found
    }
}

/// Buckets that there is room for, buckets in use that are not full, and writes that found no room.
pub fn counters() -> [u64; 3] {
    let Some(table) = table() else { return [0; 3] };
    let now = now();
    // SAFETY: shared memory; atomics only.
    unsafe {
        let count = (*table.header).buckets as usize;
        let used = (0..count)
            .filter_map(|place| table.bucket(place))
            .filter(|bucket| bucket.number.load(Ordering::Acquire) != 0 && bucket.full_at.load(Ordering::Acquire) > now)
            .count();
        [count as u64, used as u64, (*table.header).refused.load(Ordering::Relaxed)]
    }
}

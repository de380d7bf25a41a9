//! The buckets of all rates in shared memory, one for each policy, login and database.
//!
//! A fixed table. A bucket's only number is changed by compare and exchange, so a covered write takes no lock once its
//! session knows the bucket's place. While a transaction uses a bucket it is pinned; who needs room takes a bucket that
//! nobody pins and that is full by now, because a full one is as good as none. The lock is for giving buckets to new
//! owners; nothing under it allocates, sleeps or raises.

use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use pgrx::pg_sys;
use rules::limits::gcra::Bucket as Found;

use crate::pg::ffi;
use crate::pg::shmem::{Plain, Region};
use crate::session::settings;

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
    /// Read and written under the lock only.
    owner: UnsafeCell<Owner>,
    /// Which use of the place this is; 0: none yet.
    number: AtomicU64,
    /// Transactions that use it, or [`CHANGING`].
    users: AtomicU32,
    /// When it is full again, by [`now`].
    full_at: AtomicU64,
    /// When rows were last taken, or a little later.
    taken_at: AtomicU64,
    /// All that was ever put back, in nanoseconds, or a little more.
    put_back: AtomicU64,
}

impl Bucket {
    /// As it is; the others are at least as new as when it is full.
    fn found(&self) -> Found {
        let full_at = self.full_at.load(Ordering::Acquire);
        Found {
            full_at,
            taken_at: self.taken_at.load(Ordering::Acquire),
            put_back: self.put_back.load(Ordering::Acquire),
            now: now(),
        }
    }
}

/// In place of users: the bucket is given to a new owner.
const CHANGING: u32 = 1 << 31;

#[repr(C)]
struct Header {
    buckets: AtomicU64,
    last_number: AtomicU64,
    /// Writes that found no room.
    refused: AtomicU64,
}

// SAFETY: numbers.
unsafe impl Plain for Header {}
// SAFETY: numbers too.
unsafe impl Plain for Bucket {}
// SAFETY: atomics, and an owner that is read and written under the lock only.
unsafe impl Sync for Bucket {}

/// The header, and after it the buckets.
static TABLE: Region<Header, ()> = Region::new(c"pg_writeguard_rates");

fn bytes_of_buckets() -> usize {
    settings::rate_slots() * size_of::<Bucket>()
}

/// Asks for the shared memory; in the postmaster, before it is laid out.
pub unsafe fn request() {
    // SAFETY: a plain old frame, called from shmem_request_hook.
    unsafe { TABLE.request(bytes_of_buckets()) };
}

/// Finds or initializes the shared memory: all buckets are full.
pub unsafe fn startup() {
    // SAFETY: a plain old frame, called from shmem_startup_hook.
    let is_new = unsafe { TABLE.startup(bytes_of_buckets()) };
    if is_new && let Some(header) = TABLE.open() {
        header.buckets.store(settings::rate_slots() as u64, Ordering::Relaxed);
    }
}

/// The table as a process sees it.
#[derive(Clone, Copy)]
struct Table {
    header: &'static Header,
    buckets: &'static [Bucket],
}

#[inline]
fn table() -> Option<Table> {
    let (header, buckets) = (TABLE.open()?, TABLE.following()?);
    // SAFETY: as many as the header says were asked for; what changes in them does so behind atomics and a cell.
    let buckets = unsafe { core::slice::from_raw_parts(buckets, header.buckets.load(Ordering::Relaxed) as usize) };
    Some(Table { header, buckets })
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

fn bucket(place: usize) -> Option<&'static Bucket> {
    table()?.buckets.get(place)
}

/// Pins a bucket that this session knows; none when it is another's by now.
pub fn pin(known: Known) -> Option<Pinned> {
    let bucket = bucket(known.place)?;
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
    let _locked = TABLE.lock()?;
    // SAFETY: under the lock.
    let found = unsafe { search(table, owner, now) };
    if found.is_none() {
        table.header.refused.fetch_add(1, Ordering::Relaxed);
    }
    found
}

/// # Safety
/// Under the lock.
unsafe fn search(table: Table, owner: Owner, now: u64) -> Option<Pinned> {
    // SAFETY: the caller's promise.
    unsafe {
        let mut spare = None;
        for (place, bucket) in table.buckets.iter().enumerate() {
            let number = bucket.number.load(Ordering::Acquire);
            if number != 0 && *bucket.owner.get() == owner {
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
        let bucket = table.buckets.get(place)?;
        bucket.users.compare_exchange(0, CHANGING, Ordering::AcqRel, Ordering::Acquire).ok()?;
        let number = table.header.last_number.fetch_add(1, Ordering::Relaxed) + 1;
        bucket.number.store(number, Ordering::Release);
        *bucket.owner.get() = owner;
        bucket.full_at.store(now, Ordering::Release);
        bucket.taken_at.store(now, Ordering::Release);
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

    /// Changes when the bucket is full, from how it is found: `change` is tried until nobody else came between.
    ///
    /// # Errors
    /// Those of `change`; the bucket stays as it was.
    pub fn change<T: Default, E>(&self, change: impl Fn(Found) -> Result<(u64, T), E>) -> Result<T, E> {
        let Some(bucket) = self.bucket() else { return Ok(T::default()) };
        loop {
            let found = bucket.found();
            let (then, result) = change(found)?;
            // Before the change itself: who sees that knows of these.
            match then.checked_sub(found.full_at) {
                Some(0) => {}
                Some(_) => drop(bucket.taken_at.fetch_max(found.now, Ordering::AcqRel)),
                None => drop(bucket.put_back.fetch_add(found.full_at - then, Ordering::AcqRel)),
            }
            let (ours, theirs) = (Ordering::AcqRel, Ordering::Acquire);
            if bucket.full_at.compare_exchange_weak(found.full_at, then, ours, theirs).is_ok() {
                return Ok(result);
            }
        }
    }

    /// The bucket as it is.
    pub fn found(&self) -> Found {
        self.bucket().map_or(Found { full_at: 0, taken_at: 0, put_back: 0, now: now() }, Bucket::found)
    }

    fn bucket(&self) -> Option<&'static Bucket> {
        bucket(self.0.place)
    }

    /// Lets the bucket go.
    pub fn unpin(self) {
        if let Some(bucket) = self.bucket() {
            bucket.users.fetch_sub(1, Ordering::AcqRel);
        }
    }
}

/// The buckets of this database that are not full: whose they are, and when they are full.
pub fn of_this_database() -> Vec<(Owner, u64)> {
    let Some(table) = table() else { return Vec::new() };
    // SAFETY: a static of this process.
    let (database, now) = (unsafe { pg_sys::MyDatabaseId }, now());
    let mut found = Vec::with_capacity(table.buckets.len());
    let _locked = TABLE.lock_shared();
    found.extend(table.buckets.iter().filter_map(|bucket| {
        // SAFETY: under the lock, which is held for no more than that.
        let owner = unsafe { *bucket.owner.get() };
        let full_at = bucket.full_at.load(Ordering::Acquire);
        let is_ours = bucket.number.load(Ordering::Acquire) != 0 && owner.database == database;
        (is_ours && full_at > now).then_some((owner, full_at))
    }));
    found
}

/// Buckets that there is room for, buckets in use that are not full, and writes that found no room.
pub fn counters() -> [u64; 3] {
    let Some(table) = table() else { return [0; 3] };
    let now = now();
    let is_used =
        |bucket: &&Bucket| bucket.number.load(Ordering::Acquire) != 0 && bucket.full_at.load(Ordering::Acquire) > now;
    let used = table.buckets.iter().filter(is_used).count();
    [table.buckets.len() as u64, used as u64, table.header.refused.load(Ordering::Relaxed)]
}

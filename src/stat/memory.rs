//! The counters of all databases in shared memory: a table of a fixed number of entries, one for each database, table, role
//! and operation.
//!
//! Who knows its entry counts with atomics and takes no lock; that the entry is still its own it tells by the entry's
//! number. The lock is for finding an entry and for giving it to a new owner; nothing under it allocates, sleeps or
//! raises. A key may be in a few places only; where these are all taken, the one that was counted least since the last
//! time is given away, which is counted. A statement that is counted in that very moment may end up with the new owner.

use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::hash::{Hash, Hasher};

use pgrx::pg_sys;
use rules::stat::histogram::BUCKETS;
use rules::words::Operation;
use rustc_hash::FxHasher;

use crate::pg::encoding;
use crate::pg::shmem::{Plain, Region};
use crate::session::settings;

/// Bytes of a name in the database's encoding.
const NAME_BYTES: usize = pg_sys::NAMEDATALEN as usize;
/// Places that a key may be in.
const WAYS: usize = 16;

/// What is counted apart from everything else.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Key {
    pub database: pg_sys::Oid,
    /// The role that is SET, else session_user.
    pub role: pg_sys::Oid,
    pub operation: u32,
    schema: [u8; NAME_BYTES],
    table: [u8; NAME_BYTES],
}

impl Key {
    /// Of a table, which is a whole tree of partitions.
    pub fn new(database: pg_sys::Oid, role: pg_sys::Oid, operation: Operation, schema: &str, table: &str) -> Self {
        Self { database, role, operation: operation as u32, schema: bytes(schema), table: bytes(table) }
    }

    /// Schema and name of the table.
    pub fn relation(&self) -> (String, String) {
        (text(&self.schema), text(&self.table))
    }

    fn hash(&self) -> usize {
        let mut hasher = FxHasher::default();
        (u32::from(self.database), u32::from(self.role), self.operation).hash(&mut hasher);
        (self.schema, self.table).hash(&mut hasher);
        hasher.finish() as usize
    }
}

fn bytes(name: &str) -> [u8; NAME_BYTES] {
    let mut bytes = [0; NAME_BYTES];
    for (to, from) in bytes.iter_mut().zip(encoding::to_server(name)) {
        *to = from;
    }
    bytes
}

fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    encoding::from_server(&bytes[..end])
}

/// Counters of one key.
#[repr(C)]
pub struct Entry {
    /// Which use of the place this is; 0: it is free.
    pub number: AtomicU64,
    /// By rows, see `histogram`.
    pub statements: [AtomicU64; BUCKETS],
    /// Rows of the statements that changed more than one.
    pub rows_of_more: AtomicU64,
    /// Rows of the largest of these.
    pub largest: AtomicU64,
    pub refused: AtomicU64,
    pub overridden: AtomicU64,
    /// Statements when somebody last looked for a place to take.
    seen: AtomicU64,
    /// Read and written under the lock only.
    key: UnsafeCell<Key>,
}

// SAFETY: numbers and bytes; all but the key are atomics.
unsafe impl Sync for Entry {}
// SAFETY: as above.
unsafe impl Plain for Entry {}

impl Entry {
    /// An entry that is nobody's.
    pub const fn blank() -> Self {
        Self {
            number: AtomicU64::new(0),
            statements: [const { AtomicU64::new(0) }; BUCKETS],
            rows_of_more: AtomicU64::new(0),
            largest: AtomicU64::new(0),
            refused: AtomicU64::new(0),
            overridden: AtomicU64::new(0),
            seen: AtomicU64::new(0),
            key: UnsafeCell::new(Key {
                database: pg_sys::InvalidOid,
                role: pg_sys::InvalidOid,
                operation: 0,
                schema: [0; NAME_BYTES],
                table: [0; NAME_BYTES],
            }),
        }
    }

    /// # Safety
    /// Under the lock.
    unsafe fn key(&self) -> Key {
        // SAFETY: nobody else writes it meanwhile.
        unsafe { *self.key.get() }
    }

    fn total(&self) -> u64 {
        self.statements.iter().map(|statements| statements.load(Ordering::Relaxed)).fold(0, u64::wrapping_add)
    }

    fn clear(&self) {
        self.statements.iter().for_each(|statements| statements.store(0, Ordering::Relaxed));
        for counter in [&self.rows_of_more, &self.largest, &self.refused, &self.overridden, &self.seen] {
            counter.store(0, Ordering::Relaxed);
        }
    }
}

#[repr(C)]
struct Header {
    entries: AtomicU64,
    last_number: AtomicU64,
    evicted: AtomicU64,
    /// When the counters were last written to disk; 0: not since the server started.
    stored_at: AtomicI64,
}

// SAFETY: numbers.
unsafe impl Plain for Header {}

/// The header, and after it the entries.
static TABLE: Region<Header, ()> = Region::new(c"pg_writeguard_stat");

fn bytes_of_entries() -> usize {
    settings::stat_entries() * size_of::<Entry>()
}

/// Asks for the shared memory; in the postmaster, before it is laid out.
pub unsafe fn request() {
    // SAFETY: a plain old frame, called from shmem_request_hook.
    unsafe { TABLE.request(bytes_of_entries()) };
}

/// Finds or initializes the shared memory. True where it was initialized.
pub unsafe fn startup() -> bool {
    // SAFETY: a plain old frame, called from shmem_startup_hook.
    let is_new = unsafe { TABLE.startup(bytes_of_entries()) };
    if is_new && let Some(header) = TABLE.open() {
        header.entries.store(settings::stat_entries() as u64, Ordering::Relaxed);
    }
    is_new
}

/// The table as a process sees it.
#[derive(Clone, Copy)]
struct Table {
    header: &'static Header,
    entries: &'static [Entry],
}

fn table() -> Option<Table> {
    let (header, entries) = (TABLE.open()?, TABLE.following()?);
    // SAFETY: as many as the header says were asked for; what changes in them does so behind atomics and a cell.
    let entries = unsafe { core::slice::from_raw_parts(entries, header.entries.load(Ordering::Relaxed) as usize) };
    Some(Table { header, entries })
}

impl Table {
    fn header(&self) -> &'static Header {
        self.header
    }

    fn count(&self) -> usize {
        self.entries.len()
    }

    fn entry(&self, place: usize) -> &'static Entry {
        &self.entries[place % self.count()]
    }

    /// The entry of a key. Under the lock.
    fn search(&self, key: &Key) -> Option<&'static Entry> {
        let first = key.hash();
        (0..WAYS.min(self.count()))
            .map(|way| self.entry(first.wrapping_add(way)))
            // SAFETY: under the lock.
            .find(|entry| entry.number.load(Ordering::Acquire) != 0 && unsafe { *entry.key.get() == *key })
    }

    /// Gives a place to a key: one that is free, or the one that was counted least since this was last asked. Under the
    /// lock, exclusively.
    fn take(&self, key: &Key) -> Option<&'static Entry> {
        let first = key.hash();
        let ways = || (0..WAYS.min(self.count())).map(|way| first.wrapping_add(way));
        let is_free = |place: &usize| self.entry(*place).number.load(Ordering::Acquire) == 0;
        let place = match ways().find(is_free) {
            Some(place) => place,
            None => {
                let since = |place: &usize| {
                    let entry = self.entry(*place);
                    entry.total().wrapping_sub(entry.seen.load(Ordering::Relaxed))
                };
                let least = ways().min_by_key(since)?;
                ways()
                    .map(|place| self.entry(place))
                    .for_each(|entry| entry.seen.store(entry.total(), Ordering::Relaxed));
                self.header().evicted.fetch_add(1, Ordering::Relaxed);
                least
            }
        };
        let entry = self.entry(place);
        // Whoever knew it does not know it any more before it changes.
        entry.number.store(0, Ordering::Release);
        entry.clear();
        // SAFETY: under the lock nobody else touches keys.
        unsafe { *entry.key.get() = *key };
        entry.number.store(self.header().last_number.fetch_add(1, Ordering::Relaxed) + 1, Ordering::Release);
        Some(entry)
    }
}

/// The entry of a key, which is made where there is none; none where the table has no entries at all.
pub fn find(key: &Key) -> Option<&'static Entry> {
    let table = table().filter(|table| table.count() > 0)?;
    let known = {
        let _locked = TABLE.lock_shared()?;
        table.search(key)
    };
    known.or_else(|| {
        let _locked = TABLE.lock()?;
        table.search(key).or_else(|| table.take(key))
    })
}

/// One key's numbers at some moment.
#[derive(Clone)]
pub struct Numbers {
    pub key: Key,
    pub statements: [u64; BUCKETS],
    pub rows_of_more: u64,
    pub largest: u64,
    pub refused: u64,
    pub overridden: u64,
}

impl Numbers {
    /// Rows of all statements.
    pub fn rows(&self) -> u64 {
        self.rows_of_more.saturating_add(self.statements[0])
    }

    /// Rows of the largest statement; 0 where none changed any.
    pub fn largest(&self) -> u64 {
        self.largest.max(u64::from(self.statements[0] > 0))
    }
}

/// # Safety
/// Under the lock, or in a process that is alone.
unsafe fn read(entry: &Entry) -> Option<Numbers> {
    if entry.number.load(Ordering::Acquire) == 0 {
        return None;
    }
    let get = |counter: &AtomicU64| {
        // What was counted while the place went to another owner can be one less than nothing.
        let value = counter.load(Ordering::Relaxed);
        if value > i64::MAX as u64 { 0 } else { value }
    };
    let mut statements = [0; BUCKETS];
    statements.iter_mut().zip(&entry.statements).for_each(|(to, from)| *to = get(from));
    Some(Numbers {
        // SAFETY: the caller's promise.
        key: unsafe { entry.key() },
        statements,
        rows_of_more: get(&entry.rows_of_more),
        largest: get(&entry.largest),
        refused: get(&entry.refused),
        overridden: get(&entry.overridden),
    })
}

/// The numbers of all keys that are wanted.
pub fn numbers(wanted: impl Fn(&Key) -> bool) -> Vec<Numbers> {
    let Some(table) = table() else { return Vec::new() };
    (0..table.count())
        .filter_map(|place| {
            let _locked = TABLE.lock_shared()?;
            // SAFETY: under the lock.
            unsafe { read(table.entry(place)) }
        })
        .filter(|numbers| wanted(&numbers.key))
        .collect()
}

/// The numbers of all keys; only for a process that is alone.
pub fn numbers_without_lock() -> Vec<Numbers> {
    let Some(table) = table() else { return Vec::new() };
    // SAFETY: nobody else is there.
    table.entries.iter().filter_map(|entry| unsafe { read(entry) }).collect()
}

/// Puts numbers back that were stored. False when there is no room for them.
pub fn put_back(numbers: &Numbers) -> bool {
    let Some(table) = table().filter(|table| table.count() > 0) else { return false };
    let evicted = table.header().evicted.load(Ordering::Relaxed);
    let Some(entry) = find(&numbers.key) else { return false };
    for (to, from) in entry.statements.iter().zip(numbers.statements) {
        to.store(from, Ordering::Relaxed);
    }
    entry.rows_of_more.store(numbers.rows_of_more, Ordering::Relaxed);
    entry.largest.store(numbers.largest, Ordering::Relaxed);
    entry.refused.store(numbers.refused, Ordering::Relaxed);
    entry.overridden.store(numbers.overridden, Ordering::Relaxed);
    table.header().evicted.load(Ordering::Relaxed) == evicted
}

/// Forgets the numbers of some keys. Gives how many keys that were.
pub fn forget(unwanted: impl Fn(&Key) -> bool) -> u64 {
    let Some(table) = table() else { return 0 };
    let forget = |entry: &Entry| {
        let _locked = TABLE.lock();
        // SAFETY: under the lock.
        let known = entry.number.load(Ordering::Acquire) != 0 && unwanted(&unsafe { entry.key() });
        if known {
            entry.number.store(0, Ordering::Release);
            entry.clear();
        }
        u64::from(known)
    };
    table.entries.iter().map(forget).sum()
}

/// The counters were written to disk.
pub fn note_stored(at: pg_sys::TimestampTz) {
    if let Some(table) = table() {
        table.header().stored_at.store(at, Ordering::Relaxed);
    }
}

/// What there is room for and what became of it, in all databases.
pub struct Slots {
    pub entries: u64,
    pub used: u64,
    /// Keys that lost their numbers to another one since the server started.
    pub evicted: u64,
    /// When the counters were last written to disk.
    pub stored_at: Option<pg_sys::TimestampTz>,
}

/// Entries, those in use, and those that were given away.
pub fn slots() -> Slots {
    let Some(table) = table() else { return Slots { entries: 0, used: 0, evicted: 0, stored_at: None } };
    let used = (0..table.count()).filter(|place| table.entry(*place).number.load(Ordering::Relaxed) != 0).count();
    let stored_at = table.header().stored_at.load(Ordering::Relaxed);
    Slots {
        entries: table.count() as u64,
        used: used as u64,
        evicted: table.header().evicted.load(Ordering::Relaxed),
        stored_at: (stored_at != 0).then_some(stored_at),
    }
}

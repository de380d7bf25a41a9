//! How many events there were since the server started: in shared memory, by database, policy and kind.
//!
//! For monitoring, which reads it often: counting them in the table takes the longer the more there are. A fixed table;
//! a database and policy may be in a few places only, and where these are taken the one that was quiet for longest gives
//! way and begins again at zero. One lock guards it, for a handful of compares; nothing under it allocates, sleeps or
//! raises.

use std::hash::{Hash, Hasher};

use pgrx::pg_sys;
use rustc_hash::FxHasher;

use super::record::{Event, Kind};
use crate::pg::shmem::{Plain, Region};
use crate::pg::{encoding, stray};

/// Databases and policies that are counted at the same time.
const PLACES: usize = 1_024;
/// Places that one of them may be in.
const WAYS: usize = 16;
/// Bytes of a policy's name that are shown.
const NAME_BYTES: usize = 128;

/// Events of one policy in one database.
#[repr(C)]
#[derive(Clone, Copy)]
struct Place {
    /// InvalidOid: it is free.
    database: pg_sys::Oid,
    /// Of the policy's whole name; 0: all events of the database.
    policy: u64,
    name: [u8; NAME_BYTES],
    events: [u64; Kind::ALL.len()],
    /// When it was counted last, by [`Table::turn`].
    turn: u64,
}

#[repr(C)]
struct Table {
    turn: u64,
    places: [Place; PLACES],
}

// SAFETY: numbers and bytes.
unsafe impl Plain for Table {}

static TABLE: Region<(), Table> = Region::new(c"pg_writeguard_events");

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

fn hash_of(name: &str) -> u64 {
    let mut hasher = FxHasher::default();
    name.hash(&mut hasher);
    hasher.finish().max(1)
}

/// The first bytes of a name, as whole letters.
fn shown(name: &str) -> [u8; NAME_BYTES] {
    let mut bytes = [0; NAME_BYTES];
    let end = (0..=name.len().min(NAME_BYTES)).rev().find(|end| name.is_char_boundary(*end)).unwrap_or(0);
    bytes[..end].copy_from_slice(&name.as_bytes()[..end]);
    bytes
}

impl Table {
    fn count(&mut self, database: pg_sys::Oid, policy: u64, name: [u8; NAME_BYTES], kind: Kind) {
        self.turn += 1;
        let mut hasher = FxHasher::default();
        (u32::from(database), policy).hash(&mut hasher);
        let first = (hasher.finish() as usize % (PLACES / WAYS)) * WAYS;
        let places = &mut self.places[first..first + WAYS];
        let is = |place: &Place| (place.database, place.policy) == (database, policy);
        let at = places.iter().position(is).or_else(|| (0..WAYS).min_by_key(|at| places[*at].turn)).unwrap_or(0);
        let place = &mut places[at];
        if !is(place) {
            *place = Place { database, policy, name, events: [0; Kind::ALL.len()], turn: 0 };
        }
        place.turn = self.turn;
        place.events[kind as usize] += 1;
    }
}

/// Counts an event of this database: one that was recorded, or that is committed.
pub fn count(kind: Kind, policy: Option<&str>) {
    // SAFETY: a static of this process.
    let database = unsafe { pg_sys::MyDatabaseId };
    let policy = policy.map(|name| (hash_of(name), shown(&encoding::shown(name))));
    let Some(mut table) = TABLE.lock() else { return };
    table.count(database, 0, [0; NAME_BYTES], kind);
    if let Some((policy, name)) = policy {
        table.count(database, policy, name, kind);
    }
}

/// Counts an event that is recorded now.
pub fn count_event(event: &Event) {
    count(event.kind, event.policy.as_deref());
}

/// Events of one kind.
pub struct Counted {
    pub kind: Kind,
    /// None: all of the database, whether a policy's or nobody's.
    pub policy: Option<String>,
    pub events: u64,
}

/// What was counted in this database: each kind as a whole, also where there were none, and by the policies that had some.
pub fn of_this_database() -> Vec<Counted> {
    // SAFETY: a static of this process.
    let database = unsafe { pg_sys::MyDatabaseId };
    let mut found: Vec<Place> = Vec::with_capacity(PLACES);
    {
        let Some(table) = TABLE.lock_shared() else { return Vec::new() };
        found.extend(table.places.iter().filter(|place| place.database == database));
    }
    let all = found.iter().find(|place| place.policy == 0).map_or([0; Kind::ALL.len()], |place| place.events);
    let all = Kind::ALL.map(|kind| Counted { kind, policy: None, events: all[kind as usize] });
    let policies = found.iter().filter(|place| place.policy != 0).flat_map(|place| {
        let end = place.name.iter().position(|byte| *byte == 0).unwrap_or(NAME_BYTES);
        let name = stray::from_unknown(&place.name[..end]);
        let some = Kind::ALL.into_iter().filter(|kind| place.events[*kind as usize] > 0);
        some.map(move |kind| Counted { kind, policy: Some(name.clone()), events: place.events[kind as usize] })
    });
    all.into_iter().chain(policies).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> Box<Table> {
        let free = Place {
            database: pg_sys::InvalidOid,
            policy: 0,
            name: [0; NAME_BYTES],
            events: [0; Kind::ALL.len()],
            turn: 0,
        };
        Box::new(Table { turn: 0, places: [free; PLACES] })
    }

    #[test]
    fn events_are_counted_by_database_policy_and_kind() {
        let mut table = table();
        let (one, other) = (pg_sys::Oid::from(1), pg_sys::Oid::from(2));
        for (database, policy, kind) in
            [(one, 0, Kind::Blocked), (one, 0, Kind::Blocked), (one, 7, Kind::Blocked), (other, 0, Kind::Disabled)]
        {
            table.count(database, policy, [0; NAME_BYTES], kind);
        }
        let events = |database, policy, kind: Kind| {
            let mut places = table.places.iter().filter(|place| (place.database, place.policy) == (database, policy));
            let found = places.next().map(|place| place.events[kind as usize]);
            assert!(places.next().is_none());
            found
        };
        assert_eq!(events(one, 0, Kind::Blocked), Some(2));
        assert_eq!(events(one, 7, Kind::Blocked), Some(1));
        assert_eq!(events(other, 0, Kind::Blocked), Some(0));
        assert_eq!(events(other, 0, Kind::Disabled), Some(1));
        assert_eq!(events(other, 7, Kind::Disabled), None);
    }

    #[test]
    fn where_there_is_no_room_the_quietest_gives_way() {
        let mut table = table();
        let database = pg_sys::Oid::from(1);
        for policy in 1..=10 * PLACES as u64 {
            table.count(database, 0, [0; NAME_BYTES], Kind::Warned);
            table.count(database, policy, [0; NAME_BYTES], Kind::Warned);
        }
        let all = table.places.iter().find(|place| place.database == database && place.policy == 0);
        assert_eq!(all.map(|place| place.events[Kind::Warned as usize]), Some(10 * PLACES as u64));
        let last = table.places.iter().find(|place| place.policy == 10 * PLACES as u64);
        assert_eq!(last.map(|place| place.events[Kind::Warned as usize]), Some(1));
    }

    #[test]
    fn a_long_name_is_cut_between_letters() {
        let name = format!("{}ü", "x".repeat(NAME_BYTES - 1));
        assert_eq!(&shown(&name)[..NAME_BYTES - 1], &name.as_bytes()[..NAME_BYTES - 1]);
        assert_eq!(shown(&name)[NAME_BYTES - 1], 0);
        assert_ne!(hash_of(&name), hash_of(&name[..NAME_BYTES - 1]));
    }
}

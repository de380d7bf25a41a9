//! The invalidations that PostgreSQL sends when names, roles or the policy table change, and what is stale then.
//!
//! Invalidations come at any moment, with the commit of whoever made a change and never for one that was rolled back; so all
//! that they read and write is here, apart from what is kept, and none of it raises or allocates.

use pgrx::pg_sys;
use rustc_hash::FxBuildHasher;
use rustc_hash::FxHashSet;

use super::table::{self, Place};
use super::target::{self, Change};
use crate::pg::backend_local::{BackendCell, BackendLocal};
use crate::pg::contained::contained;
use crate::pg::encoding;

/// The hash in invalidations of the extension's schema, by its name; none: not registered for invalidations yet.
static SCHEMA_HASH: BackendCell<Option<u32>> = BackendCell::new(None);
/// See [`changes`].
pub static CHANGES: BackendCell<u64> = BackendCell::new(1);
/// See [`generation`].
static GENERATION: BackendCell<u64> = BackendCell::new(1);
/// The policies are those in the table.
pub static VALID: BackendCell<bool> = BackendCell::new(false);
/// The table is where it was, and the extension is installed or not as it was.
pub static FOUND: BackendCell<bool> = BackendCell::new(false);
/// Where the policies were found.
pub static PLACE: BackendCell<Place> = BackendCell::new(Place::NotInstalled);
/// The hashes in invalidations of the roles that policies name, and of acting roles, by their names. Never borrowed across
/// anything that may take invalidations in.
pub static ROLE_HASHES: BackendLocal<FxHashSet<u32>> = BackendLocal::new(FxHashSet::with_hasher(FxBuildHasher));
/// Changes of roles that may matter to memberships.
pub static ROLE_CHANGES: BackendCell<u64> = BackendCell::new(0);

fn count_one(number: &BackendCell<u64>) {
    number.set(number.get().wrapping_add(1));
}

/// All answers are stale.
pub fn drop_answers() {
    count_one(&GENERATION);
    count_one(&CHANGES);
}

/// Some are, or all.
fn note(change: Change) {
    match change {
        Change::Nothing => {}
        Change::Some => count_one(&CHANGES),
        Change::All => drop_answers(),
    }
}

/// Takes in that something changed. It comes at any moment and from anywhere, so nothing may come out; where that fails,
/// everything may have changed.
fn take_in(body: impl FnOnce()) {
    if !contained("taking a change of the catalogs in", body) {
        VALID.set(false);
        FOUND.set(false);
        count_one(&ROLE_CHANGES);
        drop_answers();
    }
}

unsafe extern "C-unwind" fn relation_changed(_argument: pg_sys::Datum, relation: pg_sys::Oid) {
    take_in(|| {
        // Where the table is not there, any may have become it.
        let place = PLACE.get();
        if relation == pg_sys::InvalidOid || place == Place::Table(relation) || place == Place::Missing {
            VALID.set(false);
            drop_answers();
        } else {
            note(target::relation_changed(relation));
        }
    });
}

/// A role came, went, or got another name.
unsafe extern "C-unwind" fn role_changed(_argument: pg_sys::Datum, _cache: i32, hash: u32) {
    take_in(|| {
        if hash == ALL || ROLE_HASHES.borrow().contains(&hash) {
            count_one(&ROLE_CHANGES);
            count_one(&CHANGES);
        }
    });
}

/// A role joined another one, or left it.
unsafe extern "C-unwind" fn member_changed(_argument: pg_sys::Datum, _cache: i32, _hash: u32) {
    count_one(&ROLE_CHANGES);
    count_one(&CHANGES);
}

/// A schema was made, renamed or dropped: by its OID, for the names of what is in it.
unsafe extern "C-unwind" fn schema_changed(_argument: pg_sys::Datum, _cache: i32, hash: u32) {
    take_in(|| note(if hash == ALL { Change::All } else { target::schema_changed(hash) }));
}

/// The same by its name: the extension may have come or gone.
unsafe extern "C-unwind" fn schema_name_changed(_argument: pg_sys::Datum, _cache: i32, hash: u32) {
    if hash == ALL || SCHEMA_HASH.get() == Some(hash) {
        FOUND.set(false);
        drop_answers();
    }
}

/// In place of a hash: all that a cache holds may have changed.
const ALL: u32 = 0;

/// A number that changes when any answer of this file may have. Invalidations must have been accepted.
#[inline]
pub fn changes() -> u64 {
    CHANGES.get()
}

/// A number that changes when all answers are stale at once; else [`target::take_changed`] tells which are.
#[inline]
pub fn generation() -> u64 {
    GENERATION.get()
}

/// The hash in invalidations of a role; none for what is no role's name.
pub fn role_hash(name: &str) -> Option<u32> {
    let name = encoding::name_to_c(name)?;
    Some(target::hash_of(pg_sys::SysCacheIdentifier::AUTHNAME, pg_sys::Datum::from(name.as_ptr())))
}

type Callback = unsafe extern "C-unwind" fn(pg_sys::Datum, i32, u32);

/// Registers for invalidations, once per backend that writes. The slots for them are few in core.
pub fn register() {
    if SCHEMA_HASH.get().is_some() {
        return;
    }
    let schema =
        target::hash_of(pg_sys::SysCacheIdentifier::NAMESPACENAME, pg_sys::Datum::from(table::SCHEMA.as_ptr()));
    SCHEMA_HASH.set(Some(schema));
    // Sets up the cache of names, which may take invalidations in; from then on taking a hash does not.
    role_hash("public");
    target::make_room();
    let nothing = pg_sys::Datum::from(0);
    // SAFETY: the callbacks live as long as the process; they neither raise nor allocate.
    unsafe {
        pg_sys::CacheRegisterRelcacheCallback(Some(relation_changed), nothing);
        for (cache, callback) in [
            (pg_sys::SysCacheIdentifier::AUTHNAME, role_changed as Callback),
            (pg_sys::SysCacheIdentifier::AUTHMEMROLEMEM, member_changed),
            (pg_sys::SysCacheIdentifier::NAMESPACEOID, schema_changed),
            (pg_sys::SysCacheIdentifier::NAMESPACENAME, schema_name_changed),
        ] {
            pg_sys::CacheRegisterSyscacheCallback(cache as i32, Some(callback), nothing);
        }
    }
}

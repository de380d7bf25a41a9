//! Primary keys: without one nobody can tell which row is to be put back.

use pgrx::pg_sys;

use super::size::root_of_tree;
use crate::pg::ffi;

/// The columns of a relation's primary key, as numbers; nothing where it has none.
#[expect(ffi_unwind_calls, reason = "pgrx makes a panic of an ERROR")]
pub fn primary_key(relation: pg_sys::Oid) -> Vec<pg_sys::AttrNumber> {
    let mut columns = Vec::new();
    let mut constraint = pg_sys::InvalidOid;
    // SAFETY: catalog look-ups; NULL where there is none. Members are offset, because system columns have numbers too.
    unsafe {
        let set = pg_sys::ffi::pg_guard_ffi_boundary(|| ffi::get_primary_key_attnos(relation, true, &mut constraint));
        let mut member = pg_sys::bms_next_member(set, -1);
        while member >= 0 {
            columns.extend(pg_sys::AttrNumber::try_from(member + pg_sys::FirstLowInvalidHeapAttributeNumber));
            member = pg_sys::bms_next_member(set, member);
        }
        pg_sys::bms_free(set);
    }
    columns
}

/// Why rows of a relation can never be put back; none: they can.
pub fn never_undone(relation: pg_sys::Oid) -> Option<&'static str> {
    // SAFETY: a syscache look-up.
    if unsafe { pg_sys::get_rel_relkind(relation) } as u8 == pg_sys::RELKIND_FOREIGN_TABLE {
        return Some("is a foreign table");
    }
    if primary_key(root_of_tree(relation)).is_empty() {
        return Some("has no primary key");
    }
    is_other_storage(relation).then_some("is not stored as a heap")
}

/// Whether rows are stored by another access method than heap, so that their versions cannot be read.
fn is_other_storage(relation: pg_sys::Oid) -> bool {
    // SAFETY: a syscache look-up; the tuple is released.
    unsafe {
        let tuple = pg_sys::SearchSysCache1(pg_sys::SysCacheIdentifier::RELOID as i32, relation.into());
        if tuple.is_null() {
            return false;
        }
        let class = &*pg_sys::GETSTRUCT(tuple).cast::<pg_sys::FormData_pg_class>();
        let other = class.relkind as u8 == pg_sys::RELKIND_RELATION && class.relam != pg_sys::HEAP_TABLE_AM_OID;
        pg_sys::ReleaseSysCache(tuple);
        other
    }
}

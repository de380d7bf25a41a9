//! What the system catalogs say of relations and roles, by name and by inheritance.

use core::ptr;

use pgrx::pg_sys;

use super::table::SCHEMA;
use crate::ffi;
use crate::words::RelationName;

/// The name of a relation; none when it is gone.
pub fn relation_name(relation: pg_sys::Oid) -> Option<RelationName> {
    // SAFETY: syscache look-ups that give NULL for what is not there.
    unsafe {
        let name = ffi::text(pg_sys::get_rel_name(relation))?;
        let schema = ffi::text(pg_sys::get_namespace_name(pg_sys::get_rel_namespace(relation)))?;
        Some(RelationName::new(schema, name))
    }
}

/// Why a relation can never be covered; none: it can.
pub fn never_covered(relation: pg_sys::Oid) -> Option<&'static str> {
    if u32::from(relation) < pg_sys::FirstNormalObjectId {
        return Some("is a system catalog");
    }
    // SAFETY: syscache look-ups.
    unsafe {
        match pg_sys::get_rel_relkind(relation) as u8 {
            pg_sys::RELKIND_RELATION | pg_sys::RELKIND_PARTITIONED_TABLE | pg_sys::RELKIND_FOREIGN_TABLE => {}
            pg_sys::RELKIND_VIEW => return Some("is a view"),
            pg_sys::RELKIND_MATVIEW => return Some("is a materialized view"),
            _ => return Some("is not a table"),
        }
        if pg_sys::get_rel_persistence(relation) as u8 == pg_sys::RELPERSISTENCE_TEMP {
            return Some("is a temporary table");
        }
        if pg_sys::get_rel_namespace(relation) == pg_sys::get_namespace_oid(SCHEMA.as_ptr(), true) {
            return Some("belongs to pg_writeguard itself");
        }
    }
    None
}

/// `pg_inherits` and its index by child; the bindings lack its header. The OIDs and columns are part of the catalog's
/// layout and the same in all supported versions.
const INHERITS: u32 = 2611;
const INHERITS_BY_CHILD: u32 = 2680;
const CHILD_COLUMN: pg_sys::AttrNumber = 1;

#[repr(C)]
struct Inherits {
    child: pg_sys::Oid,
    parent: pg_sys::Oid,
}

/// The relations that this one is a partition or a child of.
pub fn parents(child: pg_sys::Oid) -> Vec<pg_sys::Oid> {
    let mut found = Vec::new();
    // SAFETY: an index scan of a system catalog, as core does it; released before we return.
    unsafe {
        let catalog = pg_sys::table_open(pg_sys::Oid::from_u32(INHERITS), pg_sys::AccessShareLock as pg_sys::LOCKMODE);
        let mut key = pg_sys::ScanKeyData::default();
        pg_sys::ScanKeyInit(
            &mut key,
            CHILD_COLUMN,
            pg_sys::BTEqualStrategyNumber as pg_sys::StrategyNumber,
            pg_sys::RegProcedure::from(pg_sys::F_OIDEQ),
            pg_sys::Datum::from(child),
        );
        let scan = pg_sys::systable_beginscan(
            catalog,
            pg_sys::Oid::from_u32(INHERITS_BY_CHILD),
            true,
            ptr::null_mut(),
            1,
            &mut key,
        );
        loop {
            let tuple = pg_sys::systable_getnext(scan);
            if tuple.is_null() {
                break;
            }
            found.push((*pg_sys::GETSTRUCT(tuple).cast::<Inherits>()).parent);
        }
        pg_sys::systable_endscan(scan);
        pg_sys::table_close(catalog, pg_sys::AccessShareLock as pg_sys::LOCKMODE);
    }
    found
}

/// The OID of the role of that name.
pub fn role_oid(name: &str) -> Option<pg_sys::Oid> {
    let name = std::ffi::CString::new(name).ok()?;
    // SAFETY: with `missing_ok` an unknown role gives InvalidOid.
    let role = unsafe { pg_sys::get_role_oid(name.as_ptr(), true) };
    (role != pg_sys::InvalidOid).then_some(role)
}

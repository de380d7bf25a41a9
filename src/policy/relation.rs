//! What the system catalogs say of relations and roles, by name and by inheritance.

use core::ptr;

use pgrx::pg_sys;
use rules::words::RelationName;
use rustc_hash::FxHashSet;

use super::table::SCHEMA;
use crate::pg::{encoding, ffi};

/// The name of a relation; none when it is gone.
pub fn relation_name(relation: pg_sys::Oid) -> Option<RelationName> {
    // SAFETY: syscache look-ups that give NULL for what is not there.
    unsafe {
        let name = encoding::from_c(pg_sys::get_rel_name(relation))?;
        let schema = encoding::from_c(pg_sys::get_namespace_name(pg_sys::get_rel_namespace(relation)))?;
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

/// The relation of that name, if there is one.
pub fn relation_of(name: &RelationName) -> Option<pg_sys::Oid> {
    let schema = encoding::name_to_c(&name.schema)?;
    let table = encoding::name_to_c(&name.name)?;
    // SAFETY: syscache look-ups that give InvalidOid for what is not there.
    let relation = unsafe {
        match pg_sys::get_namespace_oid(schema.as_ptr(), true) {
            pg_sys::InvalidOid => return None,
            schema => pg_sys::get_relname_relid(table.as_ptr(), schema),
        }
    };
    (relation != pg_sys::InvalidOid).then_some(relation)
}

/// The names of all tables that a policy can cover.
pub fn coverable_tables() -> Vec<RelationName> {
    let tables = scan(pg_sys::RelationRelationId, 0, &[], |row| {
        // SAFETY: a row of pg_class.
        let class = unsafe { &*row.cast::<pg_sys::FormData_pg_class>() };
        let table = [pg_sys::RELKIND_RELATION, pg_sys::RELKIND_PARTITIONED_TABLE, pg_sys::RELKIND_FOREIGN_TABLE];
        table.contains(&(class.relkind as u8)).then_some(class.oid)
    });
    let coverable = tables.into_iter().flatten().filter(|table| never_covered(*table).is_none());
    coverable.filter_map(relation_name).collect()
}

/// `pg_inherits` and its indexes; the bindings lack its header. The OIDs and columns are part of the catalog's layout and
/// the same in all supported versions.
pub const INHERITS: pg_sys::Oid = pg_sys::Oid::from_u32(2611);
const INHERITS_BY_CHILD: u32 = 2680;
const CHILD_COLUMN: pg_sys::AttrNumber = 1;

#[repr(C)]
struct Inherits {
    child: pg_sys::Oid,
    parent: pg_sys::Oid,
}

/// The relations that this one is a partition or a child of.
pub fn parents(child: pg_sys::Oid) -> Vec<pg_sys::Oid> {
    // SAFETY: every row of pg_inherits begins with these columns.
    rows(INHERITS, INHERITS_BY_CHILD, CHILD_COLUMN, child, |row| unsafe { (*row.cast::<Inherits>()).parent })
}

/// All relations that this one is a partition or a child of, directly or not, each once. PostgreSQL's own walk up
/// (get_partition_ancestors) knows of partitions only, and a table may be a child of several others.
pub fn ancestors(relation: pg_sys::Oid) -> Vec<pg_sys::Oid> {
    let mut found = parents(relation);
    let mut next = 0;
    while let Some(child) = found.get(next) {
        for parent in parents(*child) {
            if !found.contains(&parent) {
                found.push(parent);
            }
        }
        next += 1;
    }
    found
}

/// A relation and all that is below it, each once.
#[expect(ffi_unwind_calls, reason = "inside pgrx's guard")]
pub fn with_descendants(relation: pg_sys::Oid) -> Vec<pg_sys::Oid> {
    let nothing = pg_sys::NoLock as pg_sys::LOCKMODE;
    // SAFETY: core's own walk, which gives a list of OIDs in our memory context and locks nothing when it is told so.
    unsafe {
        let list = pg_sys::ffi::pg_guard_ffi_boundary(|| ffi::find_all_inheritors(relation, nothing, ptr::null_mut()));
        let length = if list.is_null() { 0 } else { usize::try_from((*list).length).unwrap_or(0) };
        (0..length).map(|index| (*(*list).elements.add(index)).oid_value).collect()
    }
}

/// All relations of a schema.
pub fn in_schema(schema: pg_sys::Oid) -> Vec<pg_sys::Oid> {
    let column = pg_sys::Anum_pg_class_relnamespace as pg_sys::AttrNumber;
    // No index has the schema first.
    // SAFETY: a row of pg_class.
    rows(pg_sys::RelationRelationId, 0, column, schema, |row| unsafe { (*row.cast::<pg_sys::FormData_pg_class>()).oid })
}

/// `pg_depend` and its index by what is depended on.
const DEPEND: pg_sys::Oid = pg_sys::Oid::from_u32(2608);
const DEPEND_BY_REFERENCE: u32 = 2674;
const REFERENCED_CLASS_COLUMN: pg_sys::AttrNumber = 4;
const REFERENCED_COLUMN: pg_sys::AttrNumber = 5;

/// How a row of `pg_depend` begins.
#[repr(C)]
struct Depend {
    class: pg_sys::Oid,
    object: pg_sys::Oid,
    sub_id: i32,
}

/// What depends on an object: catalog, OID and column.
fn dependents(class: pg_sys::Oid, object: pg_sys::Oid) -> Vec<(pg_sys::Oid, pg_sys::Oid, i32)> {
    let keys = [(REFERENCED_CLASS_COLUMN, class), (REFERENCED_COLUMN, object)];
    // SAFETY: a row of pg_depend.
    scan(DEPEND, DEPEND_BY_REFERENCE, &keys, |row| unsafe {
        let depend = &*row.cast::<Depend>();
        (depend.class, depend.object, depend.sub_id)
    })
}

/// What depends on a schema: everything that is in it.
pub fn dependents_of_schema(schema: pg_sys::Oid) -> Vec<pg_sys::Oid> {
    dependents(pg_sys::NamespaceRelationId, schema).into_iter().map(|(_, object, _)| object).collect()
}

/// The tables with a column that holds values of a relation's row type, also inside of arrays, domains, ranges and other
/// row types.
pub fn tables_with_values_of(relation: pg_sys::Oid) -> Vec<pg_sys::Oid> {
    // SAFETY: a syscache look-up that gives InvalidOid for what has no row type.
    let row_type = |relation| unsafe { pg_sys::get_rel_type_id(relation) };
    let mut types = vec![row_type(relation)];
    let mut tables = Vec::new();
    // There may be very many of both.
    let (mut known_types, mut known_tables) =
        (FxHashSet::from_iter(types.iter().map(|of| u32::from(*of))), FxHashSet::default());
    let mut next = 0;
    while let Some(of) = types.get(next).copied() {
        next += 1;
        if of == pg_sys::InvalidOid {
            continue;
        }
        for (class, object, sub_id) in dependents(pg_sys::TypeRelationId, of) {
            let further = match class {
                pg_sys::TypeRelationId => object,
                pg_sys::RelationRelationId if sub_id != 0 => {
                    if object != relation && known_tables.insert(u32::from(object)) {
                        tables.push(object);
                    }
                    row_type(object)
                }
                _ => continue,
            };
            if known_types.insert(u32::from(further)) {
                types.push(further);
            }
        }
    }
    tables
}

/// What the rows of a system catalog say whose `column` is `key`; index 0: none is used.
fn rows(
    catalog: pg_sys::Oid,
    index: u32,
    column: pg_sys::AttrNumber,
    key: pg_sys::Oid,
    read: impl Fn(*mut core::ffi::c_char) -> pg_sys::Oid,
) -> Vec<pg_sys::Oid> {
    scan(catalog, index, &[(column, key)], read)
}

fn scan<T>(
    catalog: pg_sys::Oid,
    index: u32,
    columns: &[(pg_sys::AttrNumber, pg_sys::Oid)],
    read: impl Fn(*mut core::ffi::c_char) -> T,
) -> Vec<T> {
    let mut found = Vec::new();
    let mut keys = vec![pg_sys::ScanKeyData::default(); columns.len()];
    // SAFETY: a scan of a system catalog, as core does it; released before we return.
    unsafe {
        let catalog = pg_sys::table_open(catalog, pg_sys::AccessShareLock as pg_sys::LOCKMODE);
        for (key, (column, value)) in keys.iter_mut().zip(columns) {
            pg_sys::ScanKeyInit(
                key,
                *column,
                pg_sys::BTEqualStrategyNumber as pg_sys::StrategyNumber,
                pg_sys::RegProcedure::from(pg_sys::F_OIDEQ),
                pg_sys::Datum::from(*value),
            );
        }
        let by_index = index != 0;
        let index = pg_sys::Oid::from_u32(index);
        let count = keys.len() as core::ffi::c_int;
        let scan = pg_sys::systable_beginscan(catalog, index, by_index, ptr::null_mut(), count, keys.as_mut_ptr());
        loop {
            let tuple = pg_sys::systable_getnext(scan);
            if tuple.is_null() {
                break;
            }
            found.push(read(pg_sys::GETSTRUCT(tuple)));
        }
        pg_sys::systable_endscan(scan);
        pg_sys::table_close(catalog, pg_sys::AccessShareLock as pg_sys::LOCKMODE);
    }
    found
}

/// The role whose name takes the fewest changed letters; none where all are quite different.
pub fn nearest_role(name: &str) -> Option<String> {
    // No role has a longer name, and comparing letters takes as many steps as both names have together at each other.
    if name.len() >= pg_sys::NAMEDATALEN as usize {
        return None;
    }
    // SAFETY: a row of pg_authid.
    let roles = scan(pg_sys::AuthIdRelationId, 0, &[], |row| unsafe {
        encoding::from_name(&(*row.cast::<pg_sys::FormData_pg_authid>()).rolname)
    });
    nearest(name, roles.iter().map(String::as_str).filter(|role| !role.starts_with("pg_")))
}

/// The one of some names that takes the fewest changed letters; none where all are quite different.
pub fn nearest<'a>(name: &str, names: impl Iterator<Item = &'a str>) -> Option<String> {
    if name.len() >= pg_sys::NAMEDATALEN as usize {
        return None;
    }
    let letters = |known: &str| strsim::osa_distance(&name.to_lowercase(), &known.to_lowercase());
    let most = name.chars().count().div_ceil(3);
    let near = names.map(|known| (letters(known), known)).filter(|(letters, _)| *letters <= most);
    near.min().map(|(_, known)| known.to_owned())
}

/// Whether a relation has a column of that name.
pub fn has_column(relation: pg_sys::Oid, name: &str) -> bool {
    let Some(name) = encoding::name_to_c(name) else { return false };
    // SAFETY: a syscache look-up that gives 0 for what is not there. System columns have numbers below.
    unsafe { pg_sys::get_attnum(relation, name.as_ptr()) > 0 }
}

/// The names of a relation's columns.
pub fn column_names(relation: pg_sys::Oid) -> Vec<String> {
    let name = |number| {
        // SAFETY: a syscache look-up that gives NULL for what is not there.
        let name = unsafe { pg_sys::get_attname(relation, number, true) };
        // SAFETY: NULL or a C string.
        unsafe { encoding::from_c(name) }
    };
    // Dropped ones have a name as well.
    (1..=i16::MAX).map_while(name).filter(|name| !name.starts_with("........pg.dropped")).collect()
}

/// Whether a role is `of` or a member of it; being superuser makes nobody a member.
pub fn is_member(role: pg_sys::Oid, of: pg_sys::Oid) -> bool {
    // SAFETY: syscache look-ups; a role that is gone is a member of nothing.
    unsafe { pg_sys::is_member_of_role_nosuper(role, of) }
}

/// The OID of the role of that name.
pub fn role_oid(name: &str) -> Option<pg_sys::Oid> {
    let name = encoding::name_to_c(name)?;
    // SAFETY: with `missing_ok` an unknown role gives InvalidOid.
    let role = unsafe { pg_sys::get_role_oid(name.as_ptr(), true) };
    (role != pg_sys::InvalidOid).then_some(role)
}

//! How the rows of a relation are kept: by the primary key, and for a partition at the top of its tree.
//!
//! Known for as long as nothing that it was made from changes: the relation and its ancestors, their columns, key and
//! names, the types of the columns. PostgreSQL's cache invalidations cover all that, also what the transaction
//! itself does, and each of them drops everything here. Besides, a row is only ever read by the descriptor that its
//! relation has at that moment, and what was made from another one is not used for it.

use core::ptr;
use std::collections::BTreeMap;
use std::rc::Rc;

use pgrx::pg_sys;
use rules::error::Error;
use rules::words::RelationName;
use rustc_hash::{FxBuildHasher, FxHashMap, FxHashSet};
use serde::Deserialize;

use super::row_format::{self, Column, Image, Member, Printer, Values, is_same};
use crate::pg::backend_local::{BackendCell, BackendLocal};
use crate::pg::contained::contained;
use crate::pg::ereport::Failure;
use crate::pg::{encoding, owner};
use crate::policy::relation::ancestors;

/// Numbers of columns by the names that images have.
pub type Columns = BTreeMap<String, i16>;

/// What a column holds. Kept values mean the same as long as this is the same.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Form {
    #[serde(rename = "type")]
    type_oid: u32,
    typmod: i32,
    /// For a type that row types are part of: what these are made of.
    pub parts: Option<Parts>,
}

/// What row types are made of.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Parts {
    /// Changes when one of their columns is added, dropped or gets another type.
    pub digest: String,
    /// The types' relations.
    relations: Vec<u32>,
}

/// SQL for the [`Parts`] of a column, NULL where there are none; `a` is its row of `pg_attribute`, `t` that of its type.
pub const PARTS: &str = "CASE WHEN t.typtype IN ('b', 'e') AND t.typcategory <> 'A' THEN NULL ELSE ( \
       WITH RECURSIVE made (type) AS ( \
         SELECT a.atttypid \
         UNION \
         SELECT x.type FROM made AS m JOIN pg_catalog.pg_type AS p ON p.oid OPERATOR(pg_catalog.=) m.type \
           CROSS JOIN LATERAL ( \
             SELECT p.typelem \
             UNION ALL SELECT p.typbasetype \
             UNION ALL SELECT r.rngsubtype FROM pg_catalog.pg_range AS r \
               WHERE r.rngtypid OPERATOR(pg_catalog.=) p.oid OR r.rngmultitypid OPERATOR(pg_catalog.=) p.oid \
             UNION ALL SELECT f.atttypid FROM pg_catalog.pg_attribute AS f \
               WHERE f.attrelid OPERATOR(pg_catalog.=) p.typrelid AND f.attnum OPERATOR(pg_catalog.>) 0 \
                 AND NOT f.attisdropped) AS x (type) \
         WHERE x.type OPERATOR(pg_catalog.<>) 0) \
       SELECT CASE WHEN pg_catalog.count(*) OPERATOR(pg_catalog.>) 0 THEN pg_catalog.jsonb_build_object( \
           'digest', pg_catalog.hashtextextended(pg_catalog.string_agg( \
              pg_catalog.concat_ws(' ', f.attrelid, f.attnum, f.atttypid, f.atttypmod), ',' \
              ORDER BY f.attrelid, f.attnum), 0)::pg_catalog.text, \
           'relations', pg_catalog.jsonb_agg(DISTINCT f.attrelid::pg_catalog.int8)) END \
       FROM made AS m JOIN pg_catalog.pg_type AS p ON p.oid OPERATOR(pg_catalog.=) m.type \
       JOIN pg_catalog.pg_attribute AS f ON f.attrelid OPERATOR(pg_catalog.=) p.typrelid \
         AND f.attnum OPERATOR(pg_catalog.>) 0 AND NOT f.attisdropped) END";

/// The table at the top, where rows are put back, as the catalog has it.
#[derive(Debug, PartialEq, Eq)]
pub struct Root {
    pub relation: pg_sys::Oid,
    pub name: RelationName,
    pub columns: Rc<Columns>,
    /// By the columns' numbers.
    pub forms: BTreeMap<i16, Form>,
    /// The numbers of the primary key's columns; none: it has none to know rows by.
    pub key: Vec<i16>,
}

/// A relation whose rows are kept.
pub struct Table {
    pub relation: pg_sys::Oid,
    /// The file that its rows are in. It gets another one when it is rewritten or truncated, and then this is made anew.
    pub file: pg_sys::Oid,
    pub root: Rc<Root>,
    /// What the relation's was; only ever compared.
    descriptor: pg_sys::TupleDesc,
    printer: Printer,
    /// Numbers of the printed columns in the root, and whether they belong to its key.
    numbers: Vec<i16>,
    is_key: Vec<bool>,
}

/// What the catalog says of the table at the top.
#[derive(Deserialize)]
struct Found {
    oid: u32,
    schema: String,
    name: String,
    columns: Option<Vec<FoundColumn>>,
    key: Option<Vec<i16>>,
}

#[derive(Deserialize)]
struct FoundColumn {
    name: String,
    number: i16,
    #[serde(flatten)]
    form: Form,
}

const ROOT: &str = "SELECT pg_catalog.json_build_object('oid', c.oid::pg_catalog.int8, 'schema', n.nspname, 'name', c.relname, \
       'columns', (SELECT pg_catalog.json_agg(pg_catalog.json_build_object('name', a.attname, 'number', a.attnum, \
                     'type', a.atttypid::pg_catalog.int8, 'typmod', a.atttypmod, 'parts', {parts})) \
                   FROM pg_catalog.pg_attribute AS a \
                   JOIN pg_catalog.pg_type AS t ON t.oid OPERATOR(pg_catalog.=) a.atttypid \
                   WHERE a.attrelid OPERATOR(pg_catalog.=) c.oid AND a.attnum OPERATOR(pg_catalog.>) 0 \
                     AND NOT a.attisdropped), \
       'key', (SELECT pg_catalog.to_json((i.indkey::pg_catalog.int2[])[:i.indnkeyatts OPERATOR(pg_catalog.-) 1]) \
               FROM pg_catalog.pg_index AS i \
               WHERE i.indrelid OPERATOR(pg_catalog.=) c.oid AND i.indisprimary AND i.indisvalid))::pg_catalog.text \
     FROM pg_catalog.pg_class AS c JOIN pg_catalog.pg_namespace AS n ON n.oid OPERATOR(pg_catalog.=) c.relnamespace \
     WHERE c.oid OPERATOR(pg_catalog.=) COALESCE( \
       pg_catalog.pg_partition_root($1::pg_catalog.int8::pg_catalog.oid)::pg_catalog.oid, $1::pg_catalog.int8::pg_catalog.oid)";

/// What is known in this transaction.
struct Known {
    tables: FxHashMap<u32, Rc<Table>>,
    roots: FxHashMap<u32, Rc<Root>>,
}

static KNOWN: BackendLocal<Known> = BackendLocal::new(Known {
    tables: FxHashMap::with_hasher(FxBuildHasher),
    roots: FxHashMap::with_hasher(FxBuildHasher),
});

// What invalidations read and change, apart from the rest: they come at any moment, whoever has that.

/// What is known was made from something that has changed.
static STALE: BackendCell<bool> = BackendCell::new(false);
/// What it was made from: OIDs of relations, and the hashes in invalidations of types and functions. Never borrowed across
/// anything that may take invalidations in.
static MADE_FROM: BackendLocal<MadeFrom> = BackendLocal::new(MadeFrom {
    relations: FxHashSet::with_hasher(FxBuildHasher),
    types: FxHashSet::with_hasher(FxBuildHasher),
    functions: FxHashSet::with_hasher(FxBuildHasher),
});
/// Whether callbacks for types and functions are registered in this backend.
static REGISTERED: BackendCell<bool> = BackendCell::new(false);

struct MadeFrom {
    relations: FxHashSet<u32>,
    types: FxHashSet<u32>,
    functions: FxHashSet<u32>,
}

unsafe extern "C-unwind" fn relation_changed(_argument: pg_sys::Datum, relation: pg_sys::Oid) {
    take_in(|| relation == pg_sys::InvalidOid || MADE_FROM.borrow().relations.contains(&u32::from(relation)));
}

/// How PostgreSQL says that everything in a catalog may have changed.
const ALL: u32 = 0;

/// Takes in a change, if it `concerns` us: it comes at any moment, and nothing may come out.
fn take_in(concerns: impl FnOnce() -> bool) {
    let mut is_stale = true;
    contained("taking a change of the catalogs in", || is_stale = concerns());
    if is_stale {
        STALE.set(true);
    }
}

unsafe extern "C-unwind" fn type_changed(_argument: pg_sys::Datum, _cache: i32, hash: u32) {
    take_in(|| hash == ALL || MADE_FROM.borrow().types.contains(&hash));
}

unsafe extern "C-unwind" fn function_changed(_argument: pg_sys::Datum, _cache: i32, hash: u32) {
    take_in(|| hash == ALL || MADE_FROM.borrow().functions.contains(&hash));
}

/// Registers for invalidations, once per backend that keeps rows.
fn register() {
    if REGISTERED.replace(true) {
        return;
    }
    let (types, functions) = (pg_sys::SysCacheIdentifier::TYPEOID, pg_sys::SysCacheIdentifier::PROCOID);
    let nothing = pg_sys::Datum::from(0);
    // SAFETY: the callbacks live as long as the process and never raise.
    unsafe {
        pg_sys::CacheRegisterRelcacheCallback(Some(relation_changed), nothing);
        pg_sys::CacheRegisterSyscacheCallback(types as i32, Some(type_changed), nothing);
        pg_sys::CacheRegisterSyscacheCallback(functions as i32, Some(function_changed), nothing);
    }
}

/// Forgets everything. Statements that have kept rows hold on to what they were kept by.
fn forget() {
    STALE.set(false);
    let mut known = KNOWN.borrow();
    known.tables.clear();
    known.roots.clear();
    let mut made_from = MADE_FROM.borrow();
    made_from.relations.clear();
    made_from.types.clear();
    made_from.functions.clear();
}

/// The transaction is over: what is known of tables is looked up again in the next one.
pub fn end_transaction() {
    if !is_clean() {
        forget();
    }
}

/// Whether its end has nothing to forget here.
#[inline(always)]
pub fn is_clean() -> bool {
    KNOWN.borrow().tables.is_empty()
}

/// How the relation's rows are kept, as it is now.
///
/// # Safety
/// The relation is open and locked.
///
/// # Errors
/// WG008 where the catalog cannot be read, and what looking types up may raise.
pub unsafe fn of(relation: pg_sys::Relation) -> Result<Rc<Table>, Failure> {
    // SAFETY: the caller's promise.
    let (oid, descriptor) = unsafe { ((*relation).rd_id, (*relation).rd_att) };
    if !STALE.get()
        && let Some(table) = KNOWN.borrow().tables.get(&u32::from(oid))
        && ptr::eq(table.descriptor, descriptor)
    {
        // SAFETY: as above.
        debug_assert!(unsafe { table.printer.fits(descriptor) });
        return Ok(Rc::clone(table));
    }
    // SAFETY: as above.
    unsafe { find(relation) }
}

#[cold]
unsafe fn find(relation: pg_sys::Relation) -> Result<Rc<Table>, Failure> {
    register();
    if STALE.get() {
        forget();
    }
    // SAFETY: the caller's promise.
    unsafe {
        // Told of before it is looked at. A change meanwhile makes the answer stale, which serves for this row all the
        // same: nobody else can change a relation that is locked.
        let oid = (*relation).rd_id;
        MADE_FROM.borrow().relations.insert(oid.into());
        let above = ancestors(oid);
        MADE_FROM.borrow().relations.extend(above.into_iter().map(u32::from));
        let root = find_root(oid)?;
        let table = Rc::new(Table::new(relation, root)?);
        let (types, functions): (Vec<u32>, Vec<u32>) = table.printer.made_from().unzip();
        let mut made_from = MADE_FROM.borrow();
        made_from.types.extend(types);
        made_from.functions.extend(functions);
        let parts = table.root.forms.values().filter_map(|form| form.parts.as_ref());
        made_from.relations.extend(parts.flat_map(|parts| parts.relations.iter().copied()));
        KNOWN.borrow().tables.insert(oid.into(), Rc::clone(&table));
        Ok(table)
    }
}

fn find_root(relation: pg_sys::Oid) -> Result<Rc<Root>, Failure> {
    let sql = ROOT.replace("{parts}", PARTS);
    let found = owner::connect(|client| owner::rows(client, &sql, &[i64::from(u32::from(relation)).into()]))?;
    let found = found.first().and_then(|json| serde_json::from_str::<Found>(json).ok());
    let unreadable = || Error::Undecided {
        reason: format!("the columns of relation {relation} cannot be read, so its rows cannot be kept for undo"),
        hint: "SELECT * FROM writeguard.check_setup();".into(),
        relation: None,
    };
    let Found { oid, schema, name, columns, key } = found.ok_or_else(unreadable)?;
    if let Some(root) = KNOWN.borrow().roots.get(&oid) {
        return Ok(Rc::clone(root));
    }
    let columns = columns.unwrap_or_default();
    let root = Rc::new(Root {
        relation: pg_sys::Oid::from_u32(oid),
        name: RelationName::new(schema, name),
        columns: Rc::new(columns.iter().map(|column| (column.name.clone(), column.number)).collect()),
        forms: columns.into_iter().map(|column| (column.number, column.form)).collect(),
        key: key.unwrap_or_default(),
    });
    KNOWN.borrow().roots.insert(oid, Rc::clone(&root));
    Ok(root)
}

impl Table {
    unsafe fn new(relation: pg_sys::Relation, root: Rc<Root>) -> Result<Self, Failure> {
        // SAFETY: the relation is open.
        unsafe {
            let descriptor = (*relation).rd_att;
            let printer = Printer::of(descriptor)?;
            // A partition's columns have the names that they have at the top, though perhaps other numbers.
            let numbers: Vec<i16> = printer
                .columns
                .iter()
                .map(|column| {
                    root.columns.get(&encoding::from_server(column.name.to_bytes())).copied().unwrap_or(NO_COLUMN)
                })
                .collect();
            let is_key = numbers.iter().map(|number| root.key.contains(number)).collect();
            let file = (*(*relation).rd_rel).relfilenode;
            Ok(Self { relation: (*relation).rd_id, file, root, descriptor, printer, numbers, is_key })
        }
    }

    /// The names that images have of this table's columns, where they are not those that the columns have now: `named`
    /// tells the name of a column by its number in the root.
    pub fn members(&self, named: impl Fn(i16) -> Option<String>) -> Option<Box<[Member]>> {
        let name = |(column, number): (&Column, &i16)| {
            let now = encoding::from_server(column.name.to_bytes());
            let name = named(*number).unwrap_or_else(|| now.clone());
            (name == now, name)
        };
        let names: Vec<(bool, String)> = self.printer.columns.iter().zip(&self.numbers).map(name).collect();
        let members = || names.iter().map(|(_, name)| row_format::member(&encoding::to_server(name))).collect();
        (!names.iter().all(|(same, _)| *same)).then(members)
    }

    /// All columns of a row.
    ///
    /// # Safety
    /// A row of this table, which is open and was just asked for by [`of`].
    ///
    /// # Errors
    /// What the types' output functions raise.
    pub unsafe fn whole(
        &self,
        members: Option<&[Member]>,
        (relation, row): (pg_sys::Relation, pg_sys::HeapTuple),
        context: pg_sys::MemoryContext,
    ) -> Result<Image, Failure> {
        // SAFETY: the caller's promise.
        unsafe {
            debug_assert!(self.printer.fits((*relation).rd_att));
            let row = Values::of((*relation).rd_att, row);
            self.printer.image(&row, &vec![true; self.printer.columns.len()], members, context)
        }
    }

    /// The primary key and the columns that an update changed, as they were and as they became. `to` is where the row is
    /// now, which may be another partition.
    ///
    /// # Safety
    /// As for [`Table::whole`], for both rows.
    ///
    /// # Errors
    /// What the types' output functions raise.
    pub unsafe fn changed(
        &self,
        members: Option<&[Member]>,
        (relation, old): (pg_sys::Relation, pg_sys::HeapTuple),
        (to, members_there): (&Table, Option<&[Member]>),
        (new_relation, new): (pg_sys::Relation, pg_sys::HeapTuple),
        context: pg_sys::MemoryContext,
    ) -> Result<(Image, Image), Failure> {
        // SAFETY: the caller's promise.
        unsafe {
            debug_assert!(self.printer.fits((*relation).rd_att) && to.printer.fits((*new_relation).rd_att));
            let was = Values::of((*relation).rd_att, old);
            let is = Values::of((*new_relation).rd_att, new);
            let mut wanted = vec![false; self.printer.columns.len()];
            let mut wanted_there = vec![false; to.printer.columns.len()];
            for (place, column) in self.printer.columns.iter().enumerate() {
                if column.is_generated {
                    continue;
                }
                let there = if ptr::eq(self, to) { Some(place) } else { to.place(self.numbers[place]) };
                let now = there.and_then(|there| to.printer.columns.get(there));
                let same = now.is_some() && is_same(column, was.get(column), now.and_then(|now| is.get(now)))?;
                if !same || self.is_key[place] {
                    wanted[place] = true;
                    there.into_iter().for_each(|there| wanted_there[there] = true);
                }
            }
            let was = self.printer.image(&was, &wanted, members, context)?;
            let is = to.printer.image(&is, &wanted_there, members_there, context)?;
            Ok((was, is))
        }
    }

    /// Where the column of a number in the root is among the printed ones.
    fn place(&self, number: i16) -> Option<usize> {
        self.numbers.iter().position(|known| *known == number)
    }
}

/// No column has this number.
const NO_COLUMN: i16 = 0;

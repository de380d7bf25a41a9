//! Stores what was kept, in the commit of the statements that changed it.

use core::ffi::CStr;
use std::collections::BTreeMap;
use std::rc::Rc;

use pgrx::spi::SpiClient;
use pgrx::{FromDatum, IntoDatum, pg_sys};
use rules::error::Error;
use rules::policy::model::Keep;
use rules::words::Serial;
use rustc_hash::FxHashMap;
use serde::{Serialize, Serializer};

use super::kept_table::Columns;
use super::row_capture::{self, Kept};
use super::statement_tables::{Tables, Tree};
use crate::event::record::{Event, Kind, top_xid};
use crate::event::store;
use crate::pg::function::{Arguments, Returns, sql_function};
use crate::pg::{encoding, owner};
use crate::policy::schema_compat;
use crate::session::actor::{Actor, shown_role};
use crate::session::settings;

sql_function!(
    /// `discard(change bigint)`.
    writeguard_discard, pg_finfo_writeguard_discard, discard
);

/// What the statement's override says of it.
pub struct Overridden {
    pub statement: Serial,
    pub approval: Option<i64>,
}

#[derive(Serialize)]
struct New<'a> {
    xid: Option<String>,
    login: String,
    role: String,
    statement: &'a str,
    approval: Option<i64>,
    undoes: Option<i64>,
    keep: &'a str,
}

const STATEMENT: &str = "INSERT INTO writeguard.change_statement \
     (changed_at, xid, login, role, statement, approval, undoes, kept_until) \
     SELECT pg_catalog.clock_timestamp(), n.xid, n.login, n.role, n.statement, n.approval, n.undoes, \
       pg_catalog.clock_timestamp() OPERATOR(pg_catalog.+) n.keep \
     FROM pg_catalog.jsonb_to_record($1::pg_catalog.jsonb) AS n (xid pg_catalog.xid8, login pg_catalog.text, \
       role pg_catalog.text, statement pg_catalog.text, approval pg_catalog.int8, \
       undoes pg_catalog.int8, keep pg_catalog.interval) \
     RETURNING id::pg_catalog.text";

#[derive(Serialize)]
struct Table {
    change: i64,
    relation: u32,
    name: String,
    operation: String,
    rows: u64,
    bytes: u64,
    /// Numbers of its columns by their names.
    #[serde(serialize_with = "shared")]
    columns: Option<Rc<Columns>>,
    /// Numbers of its primary key's columns.
    key: Option<Vec<i16>>,
    /// What row types are made of that its columns have, by the columns' names.
    forms: Option<BTreeMap<String, String>>,
    hindrance: Option<String>,
}

fn shared<S: Serializer>(columns: &Option<Rc<Columns>>, serializer: S) -> Result<S::Ok, S::Error> {
    columns.as_deref().serialize(serializer)
}

const TABLES: &str = "INSERT INTO writeguard.change_relation \
       (change, relation, name, operation, rows, bytes, columns, key, forms, hindrance) \
     SELECT n.change, n.relation, n.name, n.operation, n.rows, n.bytes, n.columns, n.key, n.forms, n.hindrance \
     FROM pg_catalog.jsonb_populate_recordset(NULL::writeguard.change_relation, $1::pg_catalog.jsonb) AS n";

/// The same where the extension is still of 0.2.0.
const TABLES_OF_0_2: &str = "INSERT INTO writeguard.change_relation \
       (change, relation, name, operation, rows, bytes, columns) \
     SELECT n.change, n.relation, n.name, n.operation, n.rows, n.bytes, n.columns \
     FROM pg_catalog.jsonb_populate_recordset(NULL::writeguard.change_relation, $1::pg_catalog.jsonb) AS n";

const IMAGES: &str = "INSERT INTO writeguard.image \
       (change, number, relation, operation, before, after, was_at, left_at) \
     SELECT k.change, k.number, k.relation, k.operation, k.before::pg_catalog.jsonb, k.after::pg_catalog.jsonb, \
       k.was_at, k.left_at FROM kept AS k";

/// The same where the extension is still of 0.2.0.
const IMAGES_OF_0_2: &str = "INSERT INTO writeguard.image (change, number, relation, operation, before, after) \
     SELECT k.change, k.number, k.relation, k.operation, k.before::pg_catalog.jsonb, k.after::pg_catalog.jsonb FROM kept AS k";

/// Columns of the rows that are on their way into the table.
const ROWS: [(&CStr, pg_sys::Oid); 8] = [
    (c"change", pg_sys::INT8OID),
    (c"number", pg_sys::INT8OID),
    (c"relation", pg_sys::OIDOID),
    (c"operation", pg_sys::TEXTOID),
    (c"before", pg_sys::TEXTOID),
    (c"after", pg_sys::TEXTOID),
    (c"was_at", pg_sys::INT8OID),
    (c"left_at", pg_sys::INT8OID),
];

/// The rows of the statements that were overridden, or of all where the session keeps them anyway, become a change each.
/// Gives the changes' numbers by statement.
///
/// # Errors
/// WG008 where a policy wants rows kept that were not, or the extension's tables are missing.
pub fn before_commit(overridden: &[Overridden]) -> Result<Vec<(Serial, i64)>, Error> {
    for one in overridden {
        row_capture::check(one.statement)?;
    }
    if !row_capture::any() {
        return Ok(Vec::new());
    }
    if !schema_compat::has_table(c"image") {
        return Err(Error::Undecided {
            reason: "the extension in this database is older than the library and keeps no rows for undo".into(),
            hint: "ALTER EXTENSION pg_writeguard UPDATE;".into(),
            relation: None,
        });
    }
    owner::connect(|client| {
        let mut changes: FxHashMap<Serial, Change> = FxHashMap::default();
        for Kept { serial, undoes, text, keep, tables } in row_capture::take_statements() {
            let lifted = overridden.iter().find(|one| one.statement == serial);
            if lifted.is_some() || undoes.is_some() || settings::capture_undo() {
                let id = new_change(client, &text, &keep, undoes, lifted.and_then(|one| one.approval))?;
                changes.insert(serial, Change { id, tables });
            }
        }
        if !changes.is_empty() {
            store_rows(client, &changes)?;
        }
        Ok(changes.into_iter().map(|(serial, change)| (serial, change.id)).collect())
    })
}

/// A statement that becomes a change.
struct Change {
    id: i64,
    tables: Tables,
}

fn new_change(
    client: &mut SpiClient<'_>,
    statement: &str,
    keep: &Keep,
    undoes: Option<i64>,
    approval: Option<i64>,
) -> Result<i64, Error> {
    let actor = Actor::current();
    let new = New {
        xid: top_xid(),
        login: shown_role(actor.login),
        role: shown_role(actor.role()),
        statement: &encoding::shown(statement),
        approval,
        undoes,
        keep: &keep.text,
    };
    let json = serde_json::to_string(&new).unwrap_or_default();
    let id = owner::rows(client, STATEMENT, &[owner::json(&json)])?;
    Ok(id.first().and_then(|id| id.parse().ok()).unwrap_or_default())
}

/// Copies the rows of these statements into their table, without holding them in memory.
fn store_rows(client: &mut SpiClient<'_>, changes: &FxHashMap<Serial, Change>) -> Result<(), Error> {
    let mut tables: FxHashMap<(i64, u32, String), Table> = FxHashMap::default();
    // SAFETY: a tuplestore of this transaction, which SPI reads under a name while it is connected; slots hold rows of
    // the types that `row_capture` has put there.
    unsafe {
        let (store, descriptor) = row_capture::new_store(&ROWS);
        row_capture::for_each_row(|serial, slot| {
            let Some(change) = changes.get(&serial) else { return };
            pg_sys::slot_getsomeattrs_int(slot, 7);
            let value = |index: usize| *(*slot).tts_values.add(index);
            let is_null = |index: usize| *(*slot).tts_isnull.add(index);
            let relation = u32::from_datum(value(1), is_null(1)).unwrap_or_default();
            let operation = if is_null(2) { String::new() } else { encoding::from_text(value(2)) };
            let bytes = [3, 4]
                .into_iter()
                .filter(|index| !is_null(*index))
                .map(|index| u64::try_from(pg_sys::toast_raw_datum_size(value(index))).unwrap_or(0));
            let bytes: u64 = bytes.sum();
            let table = tables
                .entry((change.id, relation, operation.clone()))
                .or_insert_with(|| Table::new(change, relation, operation));
            table.rows += 1;
            table.bytes += bytes;
            let mut values = [
                change.id.into_datum().unwrap_or(pg_sys::Datum::null()),
                value(0),
                value(1),
                value(2),
                value(3),
                value(4),
                value(5),
                value(6),
            ];
            let mut nulls = [false, is_null(0), is_null(1), is_null(2), is_null(3), is_null(4), is_null(5), is_null(6)];
            pg_sys::tuplestore_putvalues(store, descriptor, values.as_mut_ptr(), nulls.as_mut_ptr());
        });
        let mut named: pg_sys::EphemeralNamedRelationData = core::mem::zeroed();
        named.md.name = c"kept".as_ptr().cast_mut();
        named.md.tupdesc = descriptor;
        named.md.enrtype = pg_sys::EphemeralNameRelationType::ENR_NAMED_TUPLESTORE;
        named.md.enrtuples = tables.values().map(|table| table.rows as f64).sum();
        named.reldata = store.cast();
        pg_sys::SPI_register_relation(&mut named);
        let images = if schema_compat::has_column_of(c"image", c"was_at") { IMAGES } else { IMAGES_OF_0_2 };
        let stored = owner::rows(client, images, &[]);
        pg_sys::SPI_unregister_relation(named.md.name);
        pg_sys::tuplestore_end(store);
        stored?;
    }
    let mut tables: Vec<Table> = tables.into_values().collect();
    tables.sort_by(|one, other| {
        (one.change, &one.name, &one.operation).cmp(&(other.change, &other.name, &other.operation))
    });
    let sql = if schema_compat::has_column_of(c"change_relation", c"hindrance") {
        TABLES
    } else if let Some(table) = tables.iter().find(|table| table.hindrance.is_some()) {
        return Err(Error::Undecided {
            reason: format!(
                "{} {} between two of its rows, which the extension in this database is too old to keep",
                table.name,
                table.hindrance.as_deref().unwrap_or_default()
            ),
            hint: "ALTER EXTENSION pg_writeguard UPDATE;".into(),
            relation: None,
        });
    } else {
        TABLES_OF_0_2
    };
    for tables in tables.chunks(TABLES_AT_A_TIME) {
        let json = serde_json::to_string(tables).unwrap_or_default();
        owner::rows(client, sql, &[owner::json(&json)])?;
    }
    Ok(())
}

/// So many tables of changes are stored with one statement.
const TABLES_AT_A_TIME: usize = 1_000;

impl Table {
    /// Without rows yet.
    fn new(change: &Change, relation: u32, operation: String) -> Self {
        let tree = change.tables.tree(pg_sys::Oid::from_u32(relation));
        Table {
            change: change.id,
            relation,
            name: tree.map_or_else(|| relation.to_string(), |tree| tree.first.name.to_sql()),
            operation,
            rows: 0,
            bytes: 0,
            columns: tree.map(|tree| Rc::clone(&tree.columns)),
            key: tree.map(|tree| tree.root.key.clone()),
            forms: tree.map(Tree::digests).filter(|forms| !forms.is_empty()),
            hindrance: tree.and_then(|tree| tree.hindrance.clone()),
        }
    }
}

const DISCARD: &str = "WITH images AS (DELETE FROM writeguard.image WHERE change OPERATOR(pg_catalog.=) $1::pg_catalog.int8), \
     tables AS (DELETE FROM writeguard.change_relation WHERE change OPERATOR(pg_catalog.=) $1::pg_catalog.int8) \
     DELETE FROM writeguard.change_statement WHERE id OPERATOR(pg_catalog.=) $1::pg_catalog.int8 RETURNING id::pg_catalog.text";

fn discard(arguments: &Arguments) -> Returns {
    let list = "SELECT id, changed_at, statement FROM writeguard.change;";
    let id: i64 = arguments.get(0).ok_or_else(|| Error::invalid("change must not be NULL", list))?;
    if owner::connect(|client| owner::rows(client, DISCARD, &[id.into()]))?.is_empty() {
        return Err(Error::invalid(format!("change {id} does not exist"), list).into());
    }
    let mut event = Event::new(Kind::PolicyChanged);
    event.reason = Some(format!("change {id} was discarded"));
    store::insert(&event)?;
    Ok(None)
}

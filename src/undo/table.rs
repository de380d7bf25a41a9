//! How rows of a table are kept: by the primary key, and for a partition at the top of its tree.

use core::ffi::CStr;

use pgrx::pg_sys;
use serde::Deserialize;

use super::print::{Image, Printer, is_same};
use crate::ffi;
use crate::owner;
use crate::raise::Failure;
use crate::words::RelationName;

/// A table whose rows are kept in one statement.
pub struct Table {
    pub relation: pg_sys::Oid,
    /// Where its rows are put back.
    pub root: pg_sys::Oid,
    /// The root's.
    pub name: RelationName,
    /// Numbers of the root's columns by their names.
    pub columns: serde_json::Value,
    key: Vec<String>,
    printer: Printer,
}

/// What the catalog says of the table at the top.
#[derive(Deserialize)]
struct Root {
    oid: u32,
    schema: String,
    name: String,
    columns: serde_json::Value,
    key: Option<Vec<String>>,
}

const ROOT: &str = "SELECT pg_catalog.json_build_object('oid', c.oid::pg_catalog.int8, 'schema', n.nspname, 'name', c.relname, \
       'columns', (SELECT pg_catalog.json_object_agg(a.attname, a.attnum) FROM pg_catalog.pg_attribute AS a \
                   WHERE a.attrelid OPERATOR(pg_catalog.=) c.oid AND a.attnum OPERATOR(pg_catalog.>) 0 \
                     AND NOT a.attisdropped), \
       'key', (SELECT pg_catalog.json_agg(a.attname) FROM pg_catalog.pg_index AS i \
               JOIN pg_catalog.pg_attribute AS a ON a.attrelid OPERATOR(pg_catalog.=) i.indrelid \
                 AND a.attnum OPERATOR(pg_catalog.=) ANY (i.indkey) \
               WHERE i.indrelid OPERATOR(pg_catalog.=) c.oid AND i.indisprimary AND i.indisvalid))::pg_catalog.text \
     FROM pg_catalog.pg_class AS c JOIN pg_catalog.pg_namespace AS n ON n.oid OPERATOR(pg_catalog.=) c.relnamespace \
     WHERE c.oid OPERATOR(pg_catalog.=) COALESCE( \
       pg_catalog.pg_partition_root($1::pg_catalog.int8::pg_catalog.oid)::pg_catalog.oid, $1::pg_catalog.int8::pg_catalog.oid)";

impl Table {
    /// Of an open relation; none where it has no primary key to know its rows by.
    ///
    /// # Safety
    /// The relation is open and locked, in a transaction that outlives this.
    ///
    /// # Errors
    /// WG008 where the catalog cannot be read, and what looking types up may raise.
    pub unsafe fn of(relation: pg_sys::Relation) -> Result<Option<Self>, Failure> {
        // SAFETY: the caller's promise.
        unsafe {
            let oid = (*relation).rd_id;
            let found = owner::connect(|client| owner::rows(client, ROOT, &[i64::from(u32::from(oid)).into()]))?;
            let root = found.first().and_then(|json| serde_json::from_str::<Root>(json).ok());
            let Some(Root { oid: root, schema, name, columns, key: Some(key) }) = root else { return Ok(None) };
            let printer = Printer::of((*relation).rd_att, pg_sys::TopTransactionContext)?;
            let (root, name) = (pg_sys::Oid::from_u32(root), RelationName::new(schema, name));
            Ok(Some(Self { relation: oid, root, name, columns, key, printer }))
        }
    }

    fn is_key(&self, column: &CStr) -> bool {
        let column = ffi::decode(column);
        self.key.contains(&column)
    }

    /// All columns of a row.
    ///
    /// # Safety
    /// A row of this table, which is open.
    ///
    /// # Errors
    /// What the types' output functions raise.
    pub unsafe fn whole(
        &self,
        (relation, row): (pg_sys::Relation, pg_sys::HeapTuple),
        context: pg_sys::MemoryContext,
    ) -> Result<Image, Failure> {
        // SAFETY: the caller's promise.
        unsafe { self.printer.image(&self.printer.values((*relation).rd_att, row), |_| true, context) }
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
        (relation, old): (pg_sys::Relation, pg_sys::HeapTuple),
        to: &Table,
        (new_relation, new): (pg_sys::Relation, pg_sys::HeapTuple),
        context: pg_sys::MemoryContext,
    ) -> Result<(Image, Image), Failure> {
        // SAFETY: the caller's promise.
        unsafe {
            let was = self.printer.values((*relation).rd_att, old);
            let is = to.printer.values((*new_relation).rd_att, new);
            let mut names: Vec<&CStr> = Vec::new();
            for column in self.printer.columns.iter().filter(|column| !column.is_generated) {
                let now = to.printer.column(&column.name);
                let same = now.is_some() && is_same(column, was.get(column), now.and_then(|now| is.get(now)))?;
                if !same || self.is_key(&column.name) {
                    names.push(&column.name);
                }
            }
            let was = self.printer.image(&was, |column| names.contains(&&*column.name), context)?;
            let is = to.printer.image(&is, |column| names.contains(&&*column.name), context)?;
            Ok((was, is))
        }
    }
}

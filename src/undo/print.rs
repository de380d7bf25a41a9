//! Rows as text: a JSON object of the columns' names with what their types' output functions print, or null.
//!
//! Text and not JSON's own numbers and arrays, because every type reads back what it printed. Printed under settings that
//! are always the same, whatever the session has.

use core::ffi::{CStr, c_int};
use core::ptr;

use pgrx::pg_sys;
use serde::Deserialize;

use crate::error::Error;
use crate::ffi;
use crate::owner;
use crate::raise::Failure;
use crate::words::{RelationName, ascii_json};

const SETTINGS: [(&CStr, &CStr); 8] = [
    (c"search_path", c"pg_catalog, pg_temp"),
    (c"DateStyle", c"ISO, YMD"),
    (c"IntervalStyle", c"postgres"),
    (c"TimeZone", c"UTC"),
    (c"extra_float_digits", c"3"),
    (c"bytea_output", c"hex"),
    (c"lc_monetary", c"C"),
    (c"xmloption", c"content"),
];

/// The settings that values are printed and read under, while this is alive; after an error the rollback ends them.
pub struct Fixed(c_int);

impl Fixed {
    /// From now on.
    pub fn settings() -> Self {
        // SAFETY: core's own way to change settings for a while.
        unsafe {
            let level = pg_sys::NewGUCNestLevel();
            for (name, value) in SETTINGS {
                pg_sys::set_config_option(
                    name.as_ptr(),
                    value.as_ptr(),
                    pg_sys::GucContext::PGC_USERSET,
                    pg_sys::GucSource::PGC_S_SESSION,
                    pg_sys::GucAction::GUC_ACTION_SAVE,
                    true,
                    0,
                    false,
                );
            }
            Self(level)
        }
    }

    /// Until now.
    pub fn release(self) {
        // SAFETY: the level that was begun above.
        unsafe { pg_sys::AtEOXact_GUC(true, self.0) };
    }
}

/// A column that is not dropped.
struct Column {
    /// Its place in the descriptor, from 0.
    index: usize,
    name: String,
    /// The name as a JSON string.
    quoted: String,
    output: pg_sys::Oid,
    key: bool,
    /// Computed from other columns.
    generated: bool,
    by_value: bool,
    length: i16,
}

/// How rows of a table are printed, and where they are put back: for a partition at the top of its tree.
pub struct Printer {
    pub relation: pg_sys::Oid,
    pub root: pg_sys::Oid,
    pub name: RelationName,
    columns: Vec<Column>,
    /// What is printed depends on settings.
    depends: bool,
}

/// What the catalog says of the table at the top.
#[derive(Deserialize)]
struct Root {
    oid: u32,
    schema: String,
    name: String,
    key: Option<Vec<String>>,
}

const ROOT: &str = "SELECT pg_catalog.json_build_object('oid', c.oid::pg_catalog.int8, 'schema', n.nspname, 'name', c.relname, \
       'key', (SELECT pg_catalog.json_agg(a.attname) FROM pg_catalog.pg_index AS i \
               JOIN pg_catalog.pg_attribute AS a ON a.attrelid OPERATOR(pg_catalog.=) i.indrelid \
                 AND a.attnum OPERATOR(pg_catalog.=) ANY (i.indkey) \
               WHERE i.indrelid OPERATOR(pg_catalog.=) c.oid AND i.indisprimary AND i.indisvalid))::pg_catalog.text \
     FROM pg_catalog.pg_class AS c JOIN pg_catalog.pg_namespace AS n ON n.oid OPERATOR(pg_catalog.=) c.relnamespace \
     WHERE c.oid OPERATOR(pg_catalog.=) COALESCE( \
       pg_catalog.pg_partition_root($1::pg_catalog.int8::pg_catalog.oid)::pg_catalog.oid, $1::pg_catalog.int8::pg_catalog.oid)";

impl Printer {
    /// Of an open relation; none where it has no primary key to know its rows by.
    ///
    /// # Safety
    /// The relation is open and locked.
    ///
    /// # Errors
    /// WG008 where the catalog cannot be read.
    pub unsafe fn of(relation: pg_sys::Relation) -> Result<Option<Self>, Error> {
        // SAFETY: the caller's promise.
        unsafe {
            let oid = (*relation).rd_id;
            let found = owner::connect(|client| owner::rows(client, ROOT, &[i64::from(u32::from(oid)).into()]))?;
            let root = found.first().and_then(|json| serde_json::from_str::<Root>(json).ok());
            let Some(Root { oid: root, schema, name, key: Some(key) }) = root else { return Ok(None) };
            let descriptor = (*relation).rd_att;
            let mut depends = false;
            let mut columns = Vec::new();
            for index in 0..usize::try_from((*descriptor).natts).unwrap_or(0) {
                let attribute = &*ffi::attribute(descriptor, index);
                if attribute.attisdropped {
                    continue;
                }
                let (mut output, mut is_varlena) = (pg_sys::InvalidOid, false);
                pg_sys::getTypeOutputInfo(attribute.atttypid, &mut output, &mut is_varlena);
                depends |= !prints_the_same_always(attribute.atttypid);
                let name = ffi::text(attribute.attname.data.as_ptr()).unwrap_or_default();
                columns.push(Column {
                    index,
                    quoted: serde_json::Value::from(name.as_str()).to_string(),
                    output,
                    key: key.contains(&name),
                    generated: attribute.attgenerated != 0,
                    by_value: attribute.attbyval,
                    length: attribute.attlen,
                    name,
                });
            }
            let root = pg_sys::Oid::from_u32(root);
            Ok(Some(Self { relation: oid, root, name: RelationName::new(schema, name), columns, depends }))
        }
    }

    /// All columns of a row.
    ///
    /// # Safety
    /// A row of this relation, which is open; memory of the current context is freed soon.
    ///
    /// # Errors
    /// What the types' output functions raise.
    pub unsafe fn whole(&self, relation: pg_sys::Relation, row: pg_sys::HeapTuple) -> Result<String, Failure> {
        // SAFETY: the caller's promise.
        unsafe {
            let values = Values::of(relation, row);
            self.under_fixed_settings(|| self.object(&values, |_| true))
        }
    }

    /// The primary key and the columns that an update changed, as they were and as they became. `to` is where the row is
    /// now, which may be another partition.
    ///
    /// # Safety
    /// As for [`Printer::whole`], for both rows.
    ///
    /// # Errors
    /// What the types' output functions raise.
    pub unsafe fn changed(
        &self,
        (relation, old): (pg_sys::Relation, pg_sys::HeapTuple),
        to: &Printer,
        (new_relation, new): (pg_sys::Relation, pg_sys::HeapTuple),
    ) -> Result<(String, String), Failure> {
        // SAFETY: the caller's promise.
        unsafe {
            let (old, new) = (Values::of(relation, old), Values::of(new_relation, new));
            let mut names: Vec<&str> = Vec::new();
            for column in self.columns.iter().filter(|column| !column.generated) {
                let counterpart = to.columns.iter().find(|other| other.name == column.name);
                let is = counterpart.and_then(|other| new.get(other));
                let same = match (old.get(column), is) {
                    (None, None) => counterpart.is_some(),
                    (Some(was), Some(is)) => {
                        let (by_value, length) = (column.by_value, i32::from(column.length));
                        let mut same = false;
                        ffi::protect(|| same = ffi::datum_image_eq(was, is, by_value, length))?;
                        same
                    }
                    _ => false,
                };
                if column.key || !same {
                    names.push(&column.name);
                }
            }
            let chosen = |column: &Column| names.contains(&column.name.as_str());
            self.under_fixed_settings(|| Ok((self.object(&old, chosen)?, to.object(&new, chosen)?)))
        }
    }

    fn under_fixed_settings<T>(&self, print: impl FnOnce() -> Result<T, Failure>) -> Result<T, Failure> {
        if !self.depends {
            return print();
        }
        let fixed = Fixed::settings();
        let printed = print();
        fixed.release();
        printed
    }

    unsafe fn object(&self, values: &Values, chosen: impl Fn(&Column) -> bool) -> Result<String, Failure> {
        let mut object = String::from("{");
        for column in self.columns.iter().filter(|column| chosen(column)) {
            if object.len() > 1 {
                object.push(',');
            }
            object.push_str(&column.quoted);
            object.push(':');
            match values.get(column) {
                None => object.push_str("null"),
                Some(value) => {
                    let mut printed = ptr::null_mut();
                    let output = column.output;
                    // SAFETY: a value of the column's type; nothing but the raw call inside.
                    unsafe {
                        ffi::protect(|| printed = ffi::OidOutputFunctionCall(output, value))?;
                        let text = ffi::text(printed).unwrap_or_default();
                        object.push_str(&serde_json::Value::from(text).to_string());
                    }
                }
            }
        }
        object.push('}');
        Ok(ascii_json(&object))
    }
}

/// A row's values.
struct Values {
    values: Vec<pg_sys::Datum>,
    nulls: Vec<bool>,
}

impl Values {
    unsafe fn of(relation: pg_sys::Relation, row: pg_sys::HeapTuple) -> Self {
        // SAFETY: the caller's row is one of the relation, which is open.
        unsafe {
            let descriptor = (*relation).rd_att;
            let count = usize::try_from((*descriptor).natts).unwrap_or(0);
            let (mut values, mut nulls) = (vec![pg_sys::Datum::from(0); count], vec![true; count]);
            pg_sys::heap_deform_tuple(row, descriptor, values.as_mut_ptr(), nulls.as_mut_ptr());
            Self { values, nulls }
        }
    }

    fn get(&self, column: &Column) -> Option<pg_sys::Datum> {
        (!*self.nulls.get(column.index)?).then(|| self.values[column.index])
    }
}

/// Whether a type's text depends on no setting.
fn prints_the_same_always(type_oid: pg_sys::Oid) -> bool {
    matches!(
        type_oid,
        pg_sys::BOOLOID
            | pg_sys::INT2OID
            | pg_sys::INT4OID
            | pg_sys::INT8OID
            | pg_sys::OIDOID
            | pg_sys::NUMERICOID
            | pg_sys::TEXTOID
            | pg_sys::VARCHAROID
            | pg_sys::BPCHAROID
            | pg_sys::NAMEOID
            | pg_sys::UUIDOID
            | pg_sys::JSONOID
            | pg_sys::JSONBOID
    )
}

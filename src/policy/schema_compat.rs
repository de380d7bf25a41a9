//! The policy table as this database has it. A newer library serves the tables of an older version of the extension
//! until `ALTER EXTENSION … UPDATE`: columns that are not there yet have their defaults, and what cannot be stored there
//! is refused, never dropped.

use core::ffi::CStr;

use pgrx::pg_sys;
use rules::error::Error;
use rules::policy::document::KEYS;
use rules::policy::model::{Document, Policy};
use rules::words::Mode;

use super::table::{self, LATER, Place, SCHEMA};

/// Assigns, in an ON CONFLICT DO UPDATE, every column that the table has.
pub fn assignments() -> String {
    let columns = KEYS.iter().map(|key| key.name).filter(|name| *name != "name" && has_column(name));
    // One of the names is a keyword.
    columns.map(|name| format!("\"{name}\" = EXCLUDED.\"{name}\"")).collect::<Vec<_>>().join(", ")
}

/// Where nothing is said of what is required, the tables of older versions have false.
pub fn fill(document: &mut Document) {
    if !has_column("always") {
        document.require_where.get_or_insert(false);
        document.require_transaction.get_or_insert(false);
    }
}

/// Whether the tables of this database can hold what a policy says.
///
/// # Errors
/// WG007 for what needs a newer version of the extension.
pub fn check(policy: &Policy) -> Result<(), Error> {
    let said = [
        (!policy.samples, "samples", "samples"),
        (policy.always, "always", "always"),
        (policy.columns.is_some(), "columns", "columns"),
        (!policy.same_rows, "same_rows", "same_rows"),
        (policy.mode == Mode::Exempt, "always", "mode exempt"),
    ];
    if let Some((_, _, word)) = said.into_iter().find(|(is_said, column, _)| *is_said && !has_column(column)) {
        return Err(older(word));
    }
    if policy.undo.is_some() && !has_table(c"image") {
        return Err(older("undo"));
    }
    Ok(())
}

fn older(column: &str) -> Error {
    Error::Invalid {
        message: format!("the extension in this database is too old for {column}"),
        detail: Some("The library that the server runs is newer, and serves the tables that are there.".into()),
        hint: "ALTER EXTENSION pg_writeguard UPDATE;".into(),
    }
}

fn has_column(name: &str) -> bool {
    if !LATER.contains(&name) {
        return true;
    }
    let (Place::Table(table), Ok(name)) = (table::find(), std::ffi::CString::new(name)) else { return false };
    // SAFETY: a syscache look-up that gives 0 for what is not there.
    unsafe { pg_sys::get_attnum(table, name.as_ptr()) != 0 }
}

/// Whether the extension in this database has that table.
pub fn has_table(name: &CStr) -> bool {
    // SAFETY: syscache look-ups that give InvalidOid for what is not there.
    unsafe {
        let schema = pg_sys::get_namespace_oid(SCHEMA.as_ptr(), true);
        schema != pg_sys::InvalidOid && pg_sys::get_relname_relid(name.as_ptr(), schema) != pg_sys::InvalidOid
    }
}

/// Whether such a table has that column.
pub fn has_column_of(table: &CStr, column: &CStr) -> bool {
    // SAFETY: syscache look-ups that give nothing for what is not there.
    unsafe {
        let schema = pg_sys::get_namespace_oid(SCHEMA.as_ptr(), true);
        pg_sys::get_attnum(pg_sys::get_relname_relid(table.as_ptr(), schema), column.as_ptr()) != 0
    }
}

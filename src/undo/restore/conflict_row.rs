//! A row that was changed again since, as errors and `undo_conflicts` show it.

use core::ptr;

use pgrx::pg_sys;
use rules::net_change::{Net, Values};

use super::compare::Comparison;
use super::table_definition::Column;
use crate::pg::ereport::Failure;
use crate::pg::{encoding, ffi};

/// A conflict as JSON; none: there is, or was, no row.
pub struct Told {
    pub key: Option<String>,
    pub was: Option<String>,
    pub wrote: Option<String>,
    pub is_now: Option<String>,
}

/// A conflict as it is shown: of a changed row the columns that the change altered, of others all.
///
/// # Errors
/// What reading and printing values raises.
pub fn told(of: &Comparison<'_>, net: &Net, found: Option<&[(usize, Option<pg_sys::Datum>)]>) -> Result<Told, Failure> {
    let everything: Vec<usize> = (0..of.shape.columns.len()).collect();
    let key: Vec<usize> = of.shape.key.iter().map(|key| of.place(key)).collect();
    let places = match net {
        Net::Change { .. } => of.changed(net).into_iter().map(|(place, ..)| place).collect(),
        _ => everything,
    };
    let (was, wrote) = match net {
        Net::PutBack { row } => (Some(row), None),
        Net::Change { was, left } => (Some(was), Some(left)),
        Net::Remove { left } => (None, Some(left)),
        Net::Nothing => (None, None),
    };
    let kept = |values: Option<&Values>, places: &[usize]| -> Result<Option<String>, Failure> {
        let Some(values) = values else { return Ok(None) };
        let mut row = Vec::with_capacity(places.len());
        for place in places {
            let Some(value) = of.naming.name(*place).and_then(|name| values.get(name)) else { continue };
            row.push((of.column(*place)?, of.read(*place, value.as_deref())?));
        }
        json(&row).map(Some)
    };
    let is_now = match found {
        Some(found) => {
            let mut row = Vec::with_capacity(places.len());
            for (place, value) in found.iter().filter(|(place, _)| places.contains(place)) {
                row.push((of.column(*place)?, *value));
            }
            Some(json(&row)?)
        }
        None => None,
    };
    Ok(Told { key: kept(net.keyed_by(), &key)?, was: kept(was, &places)?, wrote: kept(wrote, &places)?, is_now })
}

/// Columns with their values as a JSON object, as `row_to_json` has it.
#[expect(ffi_unwind_calls, reason = "inside protect")]
fn json(row: &[(&Column, Option<pg_sys::Datum>)]) -> Result<String, Failure> {
    let mut printed = ptr::null_mut();
    // SAFETY: a row of as many columns as the descriptor has, of their types; nothing but raw calls in the closure.
    unsafe {
        let descriptor = pg_sys::CreateTemplateTupleDesc(row.len() as i32);
        for (number, (column, _)) in (1..).zip(row) {
            let (type_oid, typmod) = (column.type_oid(), column.typmod);
            pg_sys::TupleDescInitEntry(descriptor, number, encoding::to_palloc(&column.name), type_oid, typmod, 0);
        }
        ffi::finish_descriptor(descriptor);
        pg_sys::BlessTupleDesc(descriptor);
        let mut nulls: Vec<bool> = row.iter().map(|(_, value)| value.is_none()).collect();
        let mut values: Vec<pg_sys::Datum> =
            row.iter().map(|(_, value)| value.unwrap_or(pg_sys::Datum::from(0))).collect();
        let tuple = pg_sys::heap_form_tuple(descriptor, values.as_mut_ptr(), nulls.as_mut_ptr());
        ffi::protect(|| {
            let datum = ffi::heap_copy_tuple_as_datum(tuple, descriptor);
            let function = pg_sys::Oid::from_u32(pg_sys::F_ROW_TO_JSON_RECORD);
            let json = ffi::OidFunctionCall1Coll(function, pg_sys::InvalidOid, datum);
            printed = ffi::text_to_cstring(json.cast_mut_ptr());
        })?;
        Ok(encoding::from_c(printed).unwrap_or_default())
    }
}

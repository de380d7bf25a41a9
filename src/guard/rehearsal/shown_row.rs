//! A row as a rehearsal shows it: only the columns that whoever asks may read, wide values cut, and no more bytes in all than
//! the setting says.

use core::ffi::CStr;
use core::ptr;
use std::collections::BTreeMap;

use pgrx::pg_sys;
use serde_json::value::RawValue;

use crate::pg::ereport::Failure;
use crate::pg::{encoding, ffi};
use crate::policy::readable::Reader;
use crate::undo::capture::row_format::{attribute, is_stored};

/// A value of more bytes is not shown.
const LONGEST_VALUE: usize = 8 * 1024;

/// What is left of the room when a row is shown goes to so many rows at least: before that its widest values are cut.
const SHARES: usize = 8;
/// Nothing is gained by cutting a value of fewer bytes.
const NARROW: usize = 64;

/// A row, shown.
pub enum Shown {
    /// Who asked may read none of its columns.
    Nothing,
    /// It has more bytes than are left for rows.
    NoRoom,
    Row {
        json: String,
        /// Values that were cut because there is little room.
        cut: u64,
    },
}

/// Which of the values, given by place and size, are cut so that the others have at most so many bytes in all; none where
/// that cannot be had.
fn too_wide(mut sizes: Vec<(usize, usize)>, most: usize) -> Option<Vec<(usize, usize)>> {
    let mut all: usize = sizes.iter().map(|(_, size)| size).sum();
    sizes.sort_by_key(|(_, size)| core::cmp::Reverse(*size));
    let mut cut = Vec::new();
    for (place, size) in sizes {
        if all <= most {
            break;
        }
        if size <= NARROW {
            return None;
        }
        all -= size;
        cut.push((place, size));
    }
    Some(cut)
}

/// A row as a JSON object of those columns that `reader` may read by way of the relation `named`, of at most `room` bytes.
///
/// # Safety
/// An open relation, and a copy of a row of it. Printing may run other people's code, as the reader.
///
/// # Errors
/// What printing may raise.
#[expect(ffi_unwind_calls, reason = "inside protect")]
pub unsafe fn json(
    reader: pg_sys::Oid,
    named: pg_sys::Oid,
    relation: pg_sys::Relation,
    tuple: pg_sys::HeapTuple,
    context: pg_sys::MemoryContext,
    room: usize,
) -> Result<Shown, Failure> {
    // SAFETY: an open relation and a copy of one of its rows. Printing may run other people's code, as the reader.
    unsafe {
        let descriptor = (*relation).rd_att;
        let count = usize::try_from((*descriptor).natts).unwrap_or(0);
        let attributes = |index: usize| &*attribute(descriptor, index);
        let Some(readable) = readable_columns(reader, named, relation) else { return Ok(Shown::Nothing) };
        let mut values = vec![pg_sys::Datum::from(0); count];
        let mut nulls = vec![true; count];
        pg_sys::heap_deform_tuple(tuple, descriptor, values.as_mut_ptr(), nulls.as_mut_ptr());
        let mut hidden: Vec<String> = Vec::new();
        let mut cut: Vec<(String, usize)> = Vec::new();
        let mut sizes: Vec<(usize, usize)> = Vec::new();
        for index in 0..count {
            let column = attributes(index);
            if column.attisdropped {
                continue;
            }
            let name = || encoding::from_name(&column.attname);
            if !readable[index] || !is_stored(column) {
                nulls[index] = true;
                hidden.push(name());
            } else if !nulls[index] && column.attlen == -1 {
                let size = pg_sys::toast_raw_datum_size(values[index]);
                if size > LONGEST_VALUE {
                    nulls[index] = true;
                    cut.push((name(), size));
                } else {
                    sizes.push((index, size));
                }
            }
        }
        let Some(wide) = too_wide(sizes, room / SHARES) else { return Ok(Shown::NoRoom) };
        for (index, size) in &wide {
            nulls[*index] = true;
            cut.push((encoding::from_name(&attributes(*index).attname), *size));
        }
        let row = pg_sys::heap_form_tuple(descriptor, values.as_mut_ptr(), nulls.as_mut_ptr());
        let (mut user, mut security) = (pg_sys::InvalidOid, 0);
        pg_sys::GetUserIdAndSecContext(&mut user, &mut security);
        let mut printed = ptr::null_mut();
        let before = pg_sys::CurrentMemoryContext;
        pg_sys::CurrentMemoryContext = context;
        let restricted = security | pg_sys::SECURITY_LOCAL_USERID_CHANGE as i32;
        pg_sys::SetUserIdAndSecContext(reader, restricted);
        let outcome = ffi::protect(|| {
            let datum = ffi::heap_copy_tuple_as_datum(row, descriptor);
            let function = pg_sys::Oid::from_u32(pg_sys::F_ROW_TO_JSON_RECORD);
            let json = ffi::OidFunctionCall1Coll(function, pg_sys::InvalidOid, datum);
            printed = ffi::text_to_cstring(json.cast_mut_ptr());
        });
        pg_sys::SetUserIdAndSecContext(user, security);
        pg_sys::CurrentMemoryContext = before;
        outcome?;
        if CStr::from_ptr(printed).count_bytes() > room {
            return Ok(Shown::NoRoom);
        }
        let printed = encoding::from_c(printed).unwrap_or_default();
        if hidden.is_empty() && cut.is_empty() {
            return Ok(Shown::Row { json: printed, cut: 0 });
        }
        let Ok(mut columns) = serde_json::from_str::<BTreeMap<String, Box<RawValue>>>(&printed) else {
            return Ok(Shown::Nothing);
        };
        hidden.iter().for_each(|name| drop(columns.remove(name)));
        for (name, size) in cut {
            if let Ok(note) = serde_json::value::to_raw_value(&format!("({size} bytes)")) {
                columns.insert(name, note);
            }
        }
        let json = serde_json::to_string(&columns).unwrap_or_default();
        Ok(if json.len() <= room { Shown::Row { json, cut: wide.len() as u64 } } else { Shown::NoRoom })
    }
}

/// Which columns somebody could read by SELECT from the relation that the command names, or from the row's own, by their
/// places; none: not one of them.
fn readable_columns(reader: pg_sys::Oid, named: pg_sys::Oid, relation: pg_sys::Relation) -> Option<Vec<bool>> {
    // SAFETY: the relation is open.
    unsafe {
        let reader = Reader::new(reader, [named, (*relation).rd_id])?;
        let count = usize::try_from((*(*relation).rd_att).natts).unwrap_or(0);
        let may_see = |index: usize| {
            let column = &*attribute((*relation).rd_att, index);
            !column.attisdropped && reader.may_see(CStr::from_ptr(column.attname.data.as_ptr()))
        };
        let columns: Vec<bool> = (0..count).map(may_see).collect();
        columns.contains(&true).then_some(columns)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_widest_values_are_cut_first() {
        let sizes = vec![(0, 100), (1, 5_000), (2, 300), (3, 10)];
        assert_eq!(too_wide(sizes.clone(), 5_410), Some(vec![]));
        assert_eq!(too_wide(sizes.clone(), 5_409), Some(vec![(1, 5_000)]));
        assert_eq!(too_wide(sizes.clone(), 10), Some(vec![(1, 5_000), (2, 300), (0, 100)]));
        assert_eq!(too_wide(sizes, 9), None);
        assert_eq!(too_wide(Vec::new(), 0), Some(vec![]));
    }
}

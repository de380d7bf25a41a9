//! Values as kept images have them, and back: text as the types print it under settings that are always the same.

use core::ffi::{CStr, c_int};
use core::ptr;
use std::ffi::CString;

use pgrx::pg_sys;

use super::table_definition::Column;
use crate::pg::ereport::Failure;
use crate::pg::ffi;
use crate::undo::capture::format_settings::{self, Modes};

/// The settings that values are printed and read under, while this is alive; after an error the rollback ends them.
pub struct Fixed(c_int);

impl Fixed {
    /// From now on, for values of these columns.
    ///
    /// # Errors
    /// What looking up types may raise.
    pub fn settings(columns: &[Column]) -> Result<Self, Failure> {
        let mut level = 0;
        // SAFETY: in a transaction; nothing but raw calls inside.
        unsafe {
            let modes = columns.iter().fold(Modes::default(), |modes, column| modes | Modes::of(column.type_oid()));
            ffi::protect(|| level = modes.fix())?;
        }
        Ok(Self(level))
    }

    /// Until now.
    ///
    /// # Errors
    /// None of ours.
    pub fn release(self) -> Result<(), Failure> {
        // SAFETY: the level that was begun above; nothing but raw calls inside.
        unsafe { Ok(ffi::protect(|| format_settings::release(self.0))?) }
    }
}

/// Memory for what one row needs, to be reset before the next.
pub fn per_row_memory() -> pg_sys::MemoryContext {
    // SAFETY: a child of the current context.
    unsafe {
        pg_sys::AllocSetContextCreateExtended(
            pg_sys::CurrentMemoryContext,
            c"pg_writeguard row".as_ptr(),
            pg_sys::ALLOCSET_DEFAULT_MINSIZE as usize,
            pg_sys::ALLOCSET_DEFAULT_INITSIZE as usize,
            pg_sys::ALLOCSET_DEFAULT_MAXSIZE as usize,
        )
    }
}

/// A column's value as text.
///
/// # Errors
/// What the type's output function raises.
#[expect(ffi_unwind_calls, reason = "inside protect")]
pub fn print(column: &Column, value: pg_sys::Datum) -> Result<Vec<u8>, Failure> {
    let mut printed = ptr::null_mut();
    // SAFETY: a value of the column's type; nothing but raw calls inside.
    unsafe {
        let type_oid = column.type_oid();
        ffi::protect(|| {
            let (mut output, mut is_varlena) = (pg_sys::InvalidOid, false);
            ffi::getTypeOutputInfo(type_oid, &mut output, &mut is_varlena);
            printed = ffi::OidOutputFunctionCall(output, value);
        })?;
        Ok(CStr::from_ptr(printed).to_bytes().to_vec())
    }
}

/// A column's value from text; run as whoever puts it back, because a domain's checks are other people's code.
///
/// # Errors
/// What the type's input function raises.
#[expect(ffi_unwind_calls, reason = "inside protect")]
pub fn read(column: &Column, text: Option<&[u8]>) -> Result<Option<pg_sys::Datum>, Failure> {
    if text.is_none() && !column.domain {
        return Ok(None);
    }
    let text = text.map(|text| CString::new(text).unwrap_or_default());
    let pointer = text.as_ref().map_or(ptr::null_mut(), |text| text.as_ptr().cast_mut());
    let mut value = pg_sys::Datum::from(0);
    // SAFETY: a C string or NULL; nothing but raw calls inside.
    unsafe {
        let (type_oid, typmod) = (column.type_oid(), column.typmod);
        ffi::protect(|| {
            let (mut input, mut parameter) = (pg_sys::InvalidOid, pg_sys::InvalidOid);
            ffi::getTypeInputInfo(type_oid, &mut input, &mut parameter);
            value = ffi::OidInputFunctionCall(input, pointer, parameter, typmod);
        })?;
    }
    Ok(text.is_some().then_some(value))
}

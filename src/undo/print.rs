//! A row's columns as an image, and back: a JSON object with each column's name and the text that its type prints, or
//! null.
//!
//! Printing and reading run functions of types, which anybody may have made: as whoever the current user is, and under
//! the settings in `modes`. The bytes stay in the server's encoding from end to end.

use core::ffi::{CStr, c_char, c_int};
use core::ptr;

use pgrx::pg_sys;

use super::modes::{self, Modes};
use crate::error::Error;
use crate::ffi::{self, Foreign};
use crate::raise::Failure;

/// One column that is printed.
pub struct Column {
    /// Its place in the row's descriptor, from 0.
    pub index: usize,
    /// As the catalog has it, in the server's encoding.
    pub name: Box<CStr>,
    /// Computed from the others whenever the row is written.
    pub is_generated: bool,
    by_value: bool,
    length: i16,
    /// `"name":`
    key: pg_sys::StringInfo,
    output: Box<pg_sys::FmgrInfo>,
}

/// Prints rows of one descriptor.
pub struct Printer {
    /// Those that are there and are stored.
    pub columns: Vec<Column>,
    modes: Modes,
    width: usize,
}

/// A row's values, in the order of its descriptor.
pub struct Values {
    pub values: Vec<pg_sys::Datum>,
    pub nulls: Vec<bool>,
}

impl Values {
    /// The value at a column's place; none for NULL.
    pub fn get(&self, column: &Column) -> Option<pg_sys::Datum> {
        let is_null = self.nulls.get(column.index).copied().unwrap_or(true);
        self.values.get(column.index).copied().filter(|_| !is_null)
    }
}

/// The longest image that is stored, in bytes: there is a limit to the jsonb that it becomes.
const LONGEST: usize = 200 * 1024 * 1024;

impl Printer {
    /// For rows of this descriptor, which has to stay as it is for as long as the printer is used. What is looked up is
    /// kept in `context`.
    ///
    /// # Safety
    /// In a transaction; `context` outlives the printer.
    ///
    /// # Errors
    /// What looking up types may raise.
    pub unsafe fn of(descriptor: pg_sys::TupleDesc, context: pg_sys::MemoryContext) -> Result<Self, Foreign> {
        // SAFETY: the caller's promise; a descriptor has as many attributes as it says.
        unsafe {
            let width = usize::try_from((*descriptor).natts).unwrap_or(0);
            let mut modes = Modes::default();
            let mut columns = Vec::with_capacity(width);
            for index in 0..width {
                let attribute = &*attribute(descriptor, index);
                if !is_stored(attribute) {
                    continue;
                }
                modes = modes | Modes::of(attribute.atttypid);
                let mut output = Box::new(pg_sys::FmgrInfo::default());
                let mut key = ptr::null_mut();
                let into = &raw mut *output;
                ffi::protect(|| {
                    let before = pg_sys::CurrentMemoryContext;
                    pg_sys::CurrentMemoryContext = context;
                    let (mut function, mut is_varlena) = (pg_sys::InvalidOid, false);
                    ffi::getTypeOutputInfo(attribute.atttypid, &mut function, &mut is_varlena);
                    ffi::fmgr_info_cxt(function, into, context);
                    key = ffi::makeStringInfo();
                    ffi::escape_json(key, attribute.attname.data.as_ptr());
                    ffi::appendStringInfoChar(key, b':' as c_char);
                    pg_sys::CurrentMemoryContext = before;
                })?;
                columns.push(Column {
                    index,
                    name: CStr::from_ptr(attribute.attname.data.as_ptr()).into(),
                    is_generated: attribute.attgenerated != 0,
                    by_value: attribute.attbyval,
                    length: attribute.attlen,
                    key,
                    output,
                });
            }
            Ok(Self { columns, modes, width })
        }
    }

    /// The column of that name.
    pub fn column(&self, name: &CStr) -> Option<&Column> {
        self.columns.iter().find(|column| *column.name == *name)
    }

    /// The values of a row of the printer's descriptor; they point into it.
    ///
    /// # Safety
    /// Both are as the printer was made for.
    pub unsafe fn values(&self, descriptor: pg_sys::TupleDesc, row: pg_sys::HeapTuple) -> Values {
        let mut values = Values { values: vec![pg_sys::Datum::from(0); self.width], nulls: vec![true; self.width] };
        // SAFETY: the caller's promise.
        unsafe { pg_sys::heap_deform_tuple(row, descriptor, values.values.as_mut_ptr(), values.nulls.as_mut_ptr()) };
        values
    }

    /// The image of those columns of a row that are wanted, as JSON text in `context`.
    ///
    /// # Safety
    /// The values are of the printer's descriptor.
    ///
    /// # Errors
    /// What printing may raise; WG008 for an image that is too long to be stored.
    pub unsafe fn image(
        &self,
        row: &Values,
        wanted: impl Fn(&Column) -> bool,
        context: pg_sys::MemoryContext,
    ) -> Result<Image, Failure> {
        let parts: Vec<Part> = self
            .columns
            .iter()
            .filter(|column| wanted(column))
            .map(|column| Part {
                key: column.key,
                output: (&raw const *column.output).cast_mut(),
                value: row.get(column).unwrap_or(pg_sys::Datum::from(0)),
                is_null: row.get(column).is_none(),
            })
            .collect();
        let mut text = ptr::null_mut();
        // SAFETY: nothing but raw calls inside, and `parts` outlives them.
        unsafe {
            ffi::protect(|| {
                let before = pg_sys::CurrentMemoryContext;
                pg_sys::CurrentMemoryContext = context;
                let level = self.modes.fix();
                text = print(&parts);
                modes::release(level);
                pg_sys::CurrentMemoryContext = before;
            })?;
            let image = Image { text: (*text).data, length: usize::try_from((*text).len).unwrap_or(usize::MAX) };
            if image.length > LONGEST {
                return Err(Error::Undecided {
                    reason: format!("a row is too long to be kept for undo ({} bytes as text)", image.length),
                    hint: "SELECT writeguard.set_policy(…, undo => NULL);".into(),
                    relation: None,
                }
                .into());
            }
            Ok(image)
        }
    }
}

/// An image as JSON text in the server's encoding.
#[derive(Debug, Clone, Copy)]
pub struct Image {
    /// Ends with a NUL.
    pub text: *const c_char,
    /// In bytes, without it.
    pub length: usize,
}

/// One member of an object that is printed; plain data.
struct Part {
    key: pg_sys::StringInfo,
    output: *mut pg_sys::FmgrInfo,
    value: pg_sys::Datum,
    is_null: bool,
}

/// # Safety
/// A plain old frame, inside [`ffi::protect`].
unsafe fn print(parts: &[Part]) -> pg_sys::StringInfo {
    // SAFETY: the caller's promise.
    unsafe {
        let text = ffi::makeStringInfo();
        let mut separator = b'{';
        for part in parts {
            ffi::appendStringInfoChar(text, separator as c_char);
            ffi::appendBinaryStringInfo(text, (*part.key).data.cast(), (*part.key).len);
            if part.is_null {
                ffi::appendBinaryStringInfo(text, c"null".as_ptr().cast(), 4);
            } else {
                let value = ffi::OutputFunctionCall(part.output, part.value);
                ffi::escape_json(text, value);
                ffi::pfree(value.cast());
            }
            separator = b',';
        }
        if parts.is_empty() {
            ffi::appendStringInfoChar(text, separator as c_char);
        }
        ffi::appendStringInfoChar(text, b'}' as c_char);
        text
    }
}

/// Whether two values of a column are the same bytes, wherever they are stored.
///
/// # Safety
/// Both are values of the column's type.
///
/// # Errors
/// What reading a value that is stored out of line may raise.
pub unsafe fn is_same(
    column: &Column,
    one: Option<pg_sys::Datum>,
    other: Option<pg_sys::Datum>,
) -> Result<bool, Foreign> {
    let (one, other) = match (one, other) {
        (Some(one), Some(other)) => (one, other),
        (one, other) => return Ok(one.is_none() && other.is_none()),
    };
    // SAFETY: the caller's promise; nothing but raw calls inside.
    unsafe {
        if column.by_value {
            return Ok(one == other);
        }
        if column.length == -1 && is_same_stored(one, other) {
            return Ok(true);
        }
        let mut same = false;
        ffi::protect(|| same = ffi::datum_image_eq(one, other, column.by_value, c_int::from(column.length)))?;
        Ok(same)
    }
}

/// Whether two values of variable length are stored as the same bytes; where they are stored out of line, in the same
/// place. That is how an update leaves what it does not touch.
unsafe fn is_same_stored(one: pg_sys::Datum, other: pg_sys::Datum) -> bool {
    // SAFETY: both are values of variable length.
    unsafe {
        let bytes = |value: pg_sys::Datum| {
            let start: *mut pg_sys::varlena = value.cast_mut_ptr();
            core::slice::from_raw_parts(start.cast::<u8>(), pgrx::varsize_any(start))
        };
        bytes(one) == bytes(other)
    }
}

/// `ATTRIBUTE_GENERATED_VIRTUAL` of core's `pg_attribute.h`, from version 18 on.
const VIRTUAL: u8 = b'v';

/// Whether a row holds a value of its own for the column: one that was not dropped, nor is computed when it is read.
pub fn is_stored(attribute: &pg_sys::FormData_pg_attribute) -> bool {
    !attribute.attisdropped && attribute.attgenerated as u8 != VIRTUAL
}

/// The attribute at a place of a descriptor, from 0.
///
/// # Safety
/// The index is below the descriptor's `natts`.
pub unsafe fn attribute(descriptor: pg_sys::TupleDesc, index: usize) -> *mut pg_sys::FormData_pg_attribute {
    #[cfg(not(feature = "pg18"))]
    // SAFETY: the caller's promise.
    unsafe {
        (*descriptor).attrs.as_mut_ptr().add(index)
    }
    // Version 18's are behind the compact ones; core reaches them by an inline function, which is not there to be called.
    #[cfg(feature = "pg18")]
    // SAFETY: the caller's promise; there are as many of either kind.
    unsafe {
        let count = usize::try_from((*descriptor).natts).unwrap_or(0);
        let attributes: *mut pg_sys::FormData_pg_attribute = (*descriptor).compact_attrs.as_mut_ptr().add(count).cast();
        attributes.add(index)
    }
}

//! A row's columns as an image, and back: a JSON object with each column's name and the text that its type prints, or
//! null.
//!
//! Printing and reading run functions of types, which anybody may have made: as whoever the current user is, and under
//! the settings in `format_settings`. The bytes stay in the server's encoding from end to end.

use core::ffi::{CStr, c_char, c_int};
use core::ptr;

use pgrx::pg_sys;
use rules::error::Error;

use super::format_settings::{self, Modes};
use crate::pg::ereport::Failure;
use crate::pg::ffi::{self, PgError};

/// One column that is printed.
pub struct Column {
    /// Its place in the row's descriptor, from 0.
    pub index: usize,
    /// As the catalog has it, in the server's encoding.
    pub name: Box<CStr>,
    /// Computed from the others whenever the row is written.
    pub is_generated: bool,
    type_oid: pg_sys::Oid,
    by_value: bool,
    length: i16,
    /// What comes before the value in an image.
    member: Member,
    output: Box<pg_sys::FmgrInfo>,
}

/// A column's name in an image, as `"name":`.
pub type Member = Box<[u8]>;

/// The name in an image of what the catalog calls `name`, which is in the server's encoding.
pub fn member(name: &[u8]) -> Member {
    // As `escape_json` does it; no server encoding has these bytes inside of other letters.
    let mut member = Vec::with_capacity(name.len() + 3);
    member.push(b'"');
    for byte in name {
        match byte {
            b'"' | b'\\' => member.extend([b'\\', *byte]),
            ..b' ' => member.extend(format!("\\u{byte:04x}").bytes()),
            _ => member.push(*byte),
        }
    }
    member.extend(*b"\":");
    member.into()
}

/// Prints rows of one descriptor.
pub struct Printer {
    /// Those that are there and are stored.
    pub columns: Vec<Column>,
    modes: Modes,
    width: usize,
    /// What the types' functions keep for themselves.
    memory: pg_sys::MemoryContext,
}

/// A row's values, in the order of its descriptor.
pub struct Values {
    values: Vec<pg_sys::Datum>,
    nulls: Vec<bool>,
}

impl Values {
    /// The values of a row; they point into it.
    ///
    /// # Safety
    /// A row of that descriptor.
    pub unsafe fn of(descriptor: pg_sys::TupleDesc, row: pg_sys::HeapTuple) -> Self {
        // SAFETY: the caller's promise; there is room for as many values as the descriptor has attributes.
        unsafe {
            let width = usize::try_from((*descriptor).natts).unwrap_or(0);
            let mut values = Values { values: vec![pg_sys::Datum::from(0); width], nulls: vec![true; width] };
            pg_sys::heap_deform_tuple(row, descriptor, values.values.as_mut_ptr(), values.nulls.as_mut_ptr());
            values
        }
    }

    /// The value at a column's place; none for NULL.
    pub fn get(&self, column: &Column) -> Option<pg_sys::Datum> {
        let is_null = self.nulls.get(column.index).copied().unwrap_or(true);
        self.values.get(column.index).copied().filter(|_| !is_null)
    }
}

/// The longest image that is stored, in bytes: there is a limit to the jsonb that it becomes.
const LONGEST: usize = 200 * 1024 * 1024;

impl Printer {
    /// For rows of this descriptor, or of another one that [`Printer::fits`].
    ///
    /// # Safety
    /// In a transaction, which the printer does not outlive.
    ///
    /// # Errors
    /// What looking up types may raise.
    #[expect(ffi_unwind_calls, reason = "inside protect")]
    pub unsafe fn of(descriptor: pg_sys::TupleDesc) -> Result<Self, PgError> {
        // SAFETY: the caller's promise; a descriptor has as many attributes as it says.
        unsafe {
            let memory = pg_sys::AllocSetContextCreateExtended(
                pg_sys::TopTransactionContext,
                c"pg_writeguard printer".as_ptr(),
                pg_sys::ALLOCSET_SMALL_MINSIZE as usize,
                pg_sys::ALLOCSET_SMALL_INITSIZE as usize,
                pg_sys::ALLOCSET_SMALL_MAXSIZE as usize,
            );
            let width = usize::try_from((*descriptor).natts).unwrap_or(0);
            let mut printer = Self { columns: Vec::with_capacity(width), modes: Modes::default(), width, memory };
            for index in 0..width {
                let attribute = &*attribute(descriptor, index);
                if !is_stored(attribute) {
                    continue;
                }
                printer.modes = printer.modes | Modes::of(attribute.atttypid);
                let mut output = Box::new(pg_sys::FmgrInfo::default());
                let into = &raw mut *output;
                ffi::protect(|| {
                    let (mut function, mut is_varlena) = (pg_sys::InvalidOid, false);
                    ffi::getTypeOutputInfo(attribute.atttypid, &mut function, &mut is_varlena);
                    ffi::fmgr_info_cxt(function, into, memory);
                })?;
                let name = CStr::from_ptr(attribute.attname.data.as_ptr());
                printer.columns.push(Column {
                    index,
                    name: name.into(),
                    is_generated: attribute.attgenerated != 0,
                    type_oid: attribute.atttypid,
                    by_value: attribute.attbyval,
                    length: attribute.attlen,
                    member: member(name.to_bytes()),
                    output,
                });
            }
            Ok(printer)
        }
    }

    /// Whether rows of a descriptor are such as the printer was made for.
    ///
    /// # Safety
    /// A valid descriptor.
    pub unsafe fn fits(&self, descriptor: pg_sys::TupleDesc) -> bool {
        // SAFETY: the caller's promise.
        unsafe {
            let mut columns = self.columns.iter();
            usize::try_from((*descriptor).natts) == Ok(self.width)
                && (0..self.width).all(|index| {
                    let attribute = &*attribute(descriptor, index);
                    !is_stored(attribute)
                        || columns.next().is_some_and(|column| {
                            column.index == index
                                && column.type_oid == attribute.atttypid
                                && column.by_value == attribute.attbyval
                                && column.length == attribute.attlen
                                && *column.name == *CStr::from_ptr(attribute.attname.data.as_ptr())
                        })
                })
                && columns.next().is_none()
        }
    }

    /// Hash values of the catalog entries that the printer was made from, as invalidations name them: those of the types
    /// and those of their output functions.
    pub fn made_from(&self) -> impl Iterator<Item = (u32, u32)> {
        let hash = |cache: pg_sys::SysCacheIdentifier::Type, oid: pg_sys::Oid| {
            let none = pg_sys::Datum::from(0);
            // SAFETY: both catalogs have their OID as the only key; nothing is looked up.
            unsafe { pg_sys::GetSysCacheHashValue(cache as c_int, oid.into(), none, none, none) }
        };
        self.columns.iter().map(move |column| {
            let of_type = hash(pg_sys::SysCacheIdentifier::TYPEOID, column.type_oid);
            (of_type, hash(pg_sys::SysCacheIdentifier::PROCOID, column.output.fn_oid))
        })
    }

    /// The image of those columns of a row that are wanted, as JSON text in `context`. `members` has the columns' names
    /// where they are not the catalog's.
    ///
    /// # Safety
    /// The values are of a descriptor that the printer fits.
    ///
    /// # Errors
    /// What printing may raise; WG008 for an image that is too long to be stored.
    pub unsafe fn image(
        &self,
        row: &Values,
        wanted: &[bool],
        members: Option<&[Member]>,
        context: pg_sys::MemoryContext,
    ) -> Result<Image, Failure> {
        let parts: Vec<Part> = self
            .columns
            .iter()
            .enumerate()
            .filter(|(place, _)| wanted.get(*place).copied().unwrap_or(false))
            .map(|(place, column)| {
                let member = members.and_then(|members| members.get(place)).unwrap_or(&column.member);
                Part {
                    member: member.as_ptr(),
                    length: member.len() as c_int,
                    output: (&raw const *column.output).cast_mut(),
                    value: row.get(column).unwrap_or(pg_sys::Datum::from(0)),
                    is_null: row.get(column).is_none(),
                }
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
                format_settings::release(level);
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

impl Drop for Printer {
    fn drop(&mut self) {
        // SAFETY: the transaction's, which is not over, and nothing but the printer uses it.
        unsafe { pg_sys::MemoryContextDelete(self.memory) };
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
    member: *const u8,
    length: c_int,
    output: *mut pg_sys::FmgrInfo,
    value: pg_sys::Datum,
    is_null: bool,
}

/// # Safety
/// A plain old frame, inside [`ffi::protect`].
#[expect(ffi_unwind_calls, reason = "plain old frame")]
unsafe fn print(parts: &[Part]) -> pg_sys::StringInfo {
    // SAFETY: the caller's promise.
    unsafe {
        let text = ffi::makeStringInfo();
        let mut separator = b'{';
        for part in parts {
            ffi::appendStringInfoChar(text, separator as c_char);
            ffi::appendBinaryStringInfo(text, part.member.cast(), part.length);
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
#[expect(ffi_unwind_calls, reason = "inside protect")]
pub unsafe fn is_same(
    column: &Column,
    one: Option<pg_sys::Datum>,
    other: Option<pg_sys::Datum>,
) -> Result<bool, PgError> {
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
    #[cfg(not(since_pg18))]
    // SAFETY: the caller's promise.
    unsafe {
        (*descriptor).attrs.as_mut_ptr().add(index)
    }
    // Version 18's are behind the compact ones; core reaches them by an inline function, which is not there to be called.
    #[cfg(since_pg18)]
    // SAFETY: the caller's promise; there are as many of either kind.
    unsafe {
        let count = usize::try_from((*descriptor).natts).unwrap_or(0);
        let attributes: *mut pg_sys::FormData_pg_attribute = (*descriptor).compact_attrs.as_mut_ptr().add(count).cast();
        attributes.add(index)
    }
}

#[cfg(test)]
mod tests {
    use crate::undo::capture::row_format::member;

    #[test]
    fn a_name_is_a_json_string() {
        for name in ["a", "with \"quotes\"", r"back\slash", "tab\tand\nline", "\u{1}\u{1f}", "été", "{},:"] {
            let object = [b"{", &*member(name.as_bytes()), b"1}"].concat();
            let object: serde_json::Value = serde_json::from_slice(&object).unwrap();
            assert_eq!(object.as_object().unwrap().keys().collect::<Vec<_>>(), [name]);
        }
    }
}

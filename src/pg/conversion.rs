//! PostgreSQL's own procedures from one encoding to another, called without raising anything.
//!
//! A procedure is looked up once in a backend's life, where a transaction allows that, and works anywhere from then on.
//! Only those of `pg_catalog` are asked for: through the search_path anybody could put in their own.

use core::ffi::{CStr, c_int};
use core::ptr;

use pgrx::pg_sys;

use super::backend_local::BackendLocal;
use super::ffi;

ffi::core_functions! { unsafe extern "C-unwind" {
    fn FindDefaultConversion(schema: pg_sys::Oid, from: i32, to: i32) -> pg_sys::Oid;
    fn fmgr_info_cxt(function: pg_sys::Oid, info: *mut pg_sys::FmgrInfo, context: pg_sys::MemoryContext);
    fn FunctionCall6Coll(
        function: *mut pg_sys::FmgrInfo,
        collation: pg_sys::Oid,
        from: pg_sys::Datum,
        to: pg_sys::Datum,
        source: pg_sys::Datum,
        converted: pg_sys::Datum,
        length: pg_sys::Datum,
        no_error: pg_sys::Datum,
    ) -> pg_sys::Datum;
} }

/// Bytes that are converted at a time, so that memory does not grow with the text.
const CHUNK: usize = 1_024;
/// What core allows them to grow to, and a NUL.
const ROOM: usize = CHUNK * 4 + 1;

/// A procedure that was found.
#[derive(Debug, Clone, Copy)]
pub struct Conversion {
    from: c_int,
    to: c_int,
    function: *mut pg_sys::FmgrInfo,
}

/// What is known of a pair of encodings.
#[derive(Clone, Copy)]
struct Known {
    from: c_int,
    to: c_int,
    /// NULL: there is no such procedure.
    function: *mut pg_sys::FmgrInfo,
}

/// More than there are encodings: those of the database, and from UTF-8 to each that the client has asked for.
static KNOWN: BackendLocal<[Option<Known>; 96]> = BackendLocal::new([None; 96]);

impl Conversion {
    /// The procedure from one encoding to another; none where there is none, or where it was not looked up yet and cannot be
    /// now.
    pub fn between(from: c_int, to: c_int) -> Option<Self> {
        let is = |known: &Known| (known.from, known.to) == (from, to);
        let known = KNOWN.borrow().iter().map_while(|known| *known).find(is);
        let known = match known {
            Some(known) => known,
            None => look_up(from, to)?,
        };
        (!known.function.is_null()).then_some(Self { from, to, function: known.function })
    }

    /// Converts what can be converted of the beginning of `source`, NUL bytes not; gives how much that was, and what it became.
    #[expect(ffi_unwind_calls, reason = "inside protect")]
    fn begin<'a>(&self, source: &[u8], room: &'a mut [u8; ROOM]) -> (usize, &'a [u8]) {
        let source = &source[..source.len().min(CHUNK)];
        let mut done = 0;
        room[0] = 0;
        // SAFETY: the buffer is as large as core asks for; the procedure was told to raise nothing, and a conversion that does
        // so all the same converts nothing.
        let outcome = unsafe {
            let source_datum = pg_sys::Datum::from(source.as_ptr());
            let room_datum = pg_sys::Datum::from(room.as_mut_ptr());
            let Self { from, to, function } = *self;
            let length = source.len() as i32;
            let done = &mut done;
            ffi::protect(move || {
                *done = FunctionCall6Coll(
                    function,
                    pg_sys::InvalidOid,
                    pg_sys::Datum::from(from),
                    pg_sys::Datum::from(to),
                    source_datum,
                    room_datum,
                    pg_sys::Datum::from(length),
                    pg_sys::Datum::from(true),
                )
                .value() as i32;
            })
        };
        let done = usize::try_from(done).unwrap_or(0).min(source.len());
        match (outcome, CStr::from_bytes_until_nul(room)) {
            (Ok(()), Ok(converted)) => (done, converted.to_bytes()),
            _ => (0, &[]),
        }
    }

    /// Goes through `source`: `put` gets each piece that can be converted with what it becomes, and each character that
    /// cannot, with nothing. In time that grows with the text only.
    pub fn each(&self, source: &[u8], mut put: impl FnMut(&[u8], Option<&[u8]>)) {
        let mut room = [0; ROOM];
        let mut rest = source;
        while !rest.is_empty() {
            let (done, converted) = self.begin(rest, &mut room);
            let done = if done > 0 {
                put(&rest[..done], Some(converted));
                done
            } else {
                let length = self.first_character(rest);
                put(&rest[..length], None);
                length
            };
            rest = &rest[done..];
        }
    }

    /// The same, one character at a time.
    pub fn each_character(&self, source: &[u8], mut put: impl FnMut(&[u8], Option<&[u8]>)) {
        let mut room = [0; ROOM];
        let mut rest = source;
        while !rest.is_empty() {
            let length = self.first_character(rest);
            let (done, converted) = self.begin(&rest[..length], &mut room);
            put(&rest[..length], (done == length).then_some(converted));
            rest = &rest[length..];
        }
    }

    /// How long the character is that `bytes`, of which there are some, begin with; a byte that begins none is one by itself.
    fn first_character(&self, bytes: &[u8]) -> usize {
        let length = c_int::try_from(bytes.len().min(CHUNK)).unwrap_or(c_int::MAX);
        // SAFETY: looks at so many bytes at most; a table of core's.
        let length = unsafe { pg_sys::pg_encoding_verifymbchar(self.from, bytes.as_ptr().cast(), length) };
        usize::try_from(length).unwrap_or(1).clamp(1, bytes.len())
    }

    /// Whether the piece can be converted as a whole, and what it becomes is `expected`.
    pub fn gives(&self, source: &[u8], expected: &[u8]) -> bool {
        let mut room = [0; ROOM];
        let (done, converted) = self.begin(source, &mut room);
        done == source.len() && converted == expected
    }
}

/// Looks a procedure up; none where that is not possible now.
#[expect(ffi_unwind_calls, reason = "inside protect")]
fn look_up(from: c_int, to: c_int) -> Option<Known> {
    // SAFETY: statics of this process. What goes wrong inside is forgotten: with interrupts held off it is no cancel, and the
    // transaction's end gives back what it held.
    unsafe {
        if !pg_sys::IsTransactionState() || pg_sys::CritSectionCount > 0 {
            return None;
        }
        let flags = (pg_sys::MCXT_ALLOC_NO_OOM | pg_sys::MCXT_ALLOC_ZERO) as c_int;
        let size = size_of::<pg_sys::FmgrInfo>();
        let place = pg_sys::MemoryContextAllocExtended(pg_sys::TopMemoryContext, size, flags);
        if place.is_null() {
            return None;
        }
        let mut function: *mut pg_sys::FmgrInfo = place.cast();
        let mut procedure = pg_sys::InvalidOid;
        let held = (pg_sys::InterruptHoldoffCount, pg_sys::QueryCancelHoldoffCount);
        pg_sys::InterruptHoldoffCount += 1;
        let outcome = {
            let procedure = &mut procedure;
            ffi::protect(move || {
                *procedure = FindDefaultConversion(pg_sys::Oid::from_u32(pg_sys::PG_CATALOG_NAMESPACE), from, to);
                if *procedure != pg_sys::InvalidOid {
                    fmgr_info_cxt(*procedure, function, pg_sys::TopMemoryContext);
                }
            })
        };
        (pg_sys::InterruptHoldoffCount, pg_sys::QueryCancelHoldoffCount) = held;
        if outcome.is_err() || procedure == pg_sys::InvalidOid {
            pg_sys::pfree(function.cast());
            function = ptr::null_mut();
        }
        outcome.ok()?;
        let known = Known { from, to, function };
        if let Some(free) = KNOWN.borrow().iter_mut().find(|known| known.is_none()) {
            *free = Some(known);
        }
        Some(known)
    }
}

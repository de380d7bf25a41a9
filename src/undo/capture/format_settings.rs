//! The settings under which values are printed and read, whatever the session has; as pg_dump and postgres_fdw do it.
//!
//! Setting them costs more than printing a row does. So each type says on which of them its text depends, and only those
//! are set that the session has otherwise.

use core::ffi::{CStr, c_char, c_int};
use core::ops::BitOr;

use pgrx::pg_sys;

use crate::pg::ffi;

/// What the text of some types depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Modes(u8);

impl BitOr for Modes {
    type Output = Modes;

    fn bitor(self, other: Modes) -> Modes {
        Modes(self.0 | other.0)
    }
}

impl Modes {
    const NONE: Modes = Modes(0);
    const DATES: Modes = Modes(1);
    const ZONE: Modes = Modes(2);
    const INTERVALS: Modes = Modes(4);
    const FLOATS: Modes = Modes(8);
    const BYTES: Modes = Modes(16);
    const MONEY: Modes = Modes(32);
    /// Elements that are NULL.
    const ARRAYS: Modes = Modes(64);
    /// Names are printed and looked up; nothing is known about the type.
    const NAMES: Modes = Modes(128);
    /// Everything.
    const ALL: Modes = Modes(u8::MAX);

    /// Those of a type. An unknown one may depend on everything.
    ///
    /// # Safety
    /// In a transaction: looks at catalogs.
    pub unsafe fn of(type_oid: pg_sys::Oid) -> Modes {
        match type_oid {
            pg_sys::BOOLOID
            | pg_sys::CHAROID
            | pg_sys::NAMEOID
            | pg_sys::INT2OID
            | pg_sys::INT4OID
            | pg_sys::INT8OID
            | pg_sys::NUMERICOID
            | pg_sys::TEXTOID
            | pg_sys::VARCHAROID
            | pg_sys::BPCHAROID
            | pg_sys::UUIDOID
            | pg_sys::JSONOID
            | pg_sys::JSONBOID
            | pg_sys::INETOID
            | pg_sys::CIDROID
            | pg_sys::BITOID
            | pg_sys::VARBITOID
            | pg_sys::OIDOID
            | pg_sys::TIMEOID
            | pg_sys::TSVECTOROID => Modes::NONE,
            pg_sys::DATEOID | pg_sys::TIMESTAMPOID | pg_sys::TIMETZOID => Modes::DATES,
            pg_sys::TIMESTAMPTZOID => Modes::DATES | Modes::ZONE,
            pg_sys::INTERVALOID => Modes::INTERVALS,
            pg_sys::FLOAT4OID | pg_sys::FLOAT8OID | pg_sys::POINTOID => Modes::FLOATS,
            pg_sys::BYTEAOID => Modes::BYTES,
            pg_sys::MONEYOID => Modes::MONEY,
            // SAFETY: the caller's promise.
            other => unsafe { Self::of_made(other) },
        }
    }

    /// Those of a type that is made of another one.
    unsafe fn of_made(type_oid: pg_sys::Oid) -> Modes {
        // SAFETY: catalog look-ups; types are not made of themselves.
        unsafe {
            let element = pg_sys::get_element_type(type_oid);
            if element != pg_sys::InvalidOid {
                return Self::of(element) | Modes::ARRAYS;
            }
            match pg_sys::get_typtype(type_oid) as u8 {
                pg_sys::TYPTYPE_ENUM => Modes::NONE,
                pg_sys::TYPTYPE_DOMAIN => Self::of(pg_sys::getBaseType(type_oid)),
                pg_sys::TYPTYPE_RANGE => Self::of(pg_sys::get_range_subtype(type_oid)),
                pg_sys::TYPTYPE_MULTIRANGE => Self::of(pg_sys::get_multirange_range(type_oid)),
                _ => Modes::ALL,
            }
        }
    }

    fn has(self, mode: Modes) -> bool {
        self.0 & mode.0 != 0
    }

    /// Sets what the session has otherwise. What it gives goes to [`release`]; an ERROR in between is one that aborts the
    /// (sub)transaction, which takes the settings back too.
    ///
    /// # Safety
    /// A plain old frame: inside [`ffi::protect`], in a transaction.
    pub unsafe fn fix(self) -> c_int {
        let mut level = NOTHING_SET;
        // SAFETY: the caller's promise; reads statics of the server that the settings are kept in.
        unsafe {
            if self.has(Modes::DATES) && pg_sys::DateStyle != pg_sys::USE_ISO_DATES as c_int {
                set(&mut level, c"datestyle", c"ISO, YMD");
            }
            if self.has(Modes::ZONE) && !is(pg_sys::pg_get_timezone_name(pg_sys::session_timezone), UTC) {
                set(&mut level, c"timezone", UTC);
            }
            if self.has(Modes::INTERVALS) && pg_sys::IntervalStyle != pg_sys::INTSTYLE_POSTGRES as c_int {
                set(&mut level, c"intervalstyle", c"postgres");
            }
            // From 1 on, floats are printed so that the same ones are read.
            if self.has(Modes::FLOATS) && pg_sys::extra_float_digits < 1 {
                set(&mut level, c"extra_float_digits", c"3");
            }
            if self.has(Modes::BYTES) && ffi::bytea_output != BYTEA_OUTPUT_HEX {
                set(&mut level, c"bytea_output", c"hex");
            }
            if self.has(Modes::MONEY) && !is(ffi::locale_monetary, c"C") {
                set(&mut level, c"lc_monetary", c"C");
            }
            if self.has(Modes::ARRAYS) && !pg_sys::Array_nulls {
                set(&mut level, c"array_nulls", c"on");
            }
            if self.has(Modes::NAMES) {
                set(&mut level, c"search_path", c"pg_catalog, pg_temp");
                set(&mut level, c"quote_all_identifiers", c"off");
                set(&mut level, c"xmloption", c"content");
            }
        }
        level
    }
}

/// Takes back what [`Modes::fix`] set.
///
/// # Safety
/// As for [`Modes::fix`]; `level` is what it gave.
#[expect(ffi_unwind_calls, reason = "plain old frame")]
pub unsafe fn release(level: c_int) {
    if level != NOTHING_SET {
        // SAFETY: the caller's promise.
        unsafe { ffi::AtEOXact_GUC(true, level) };
    }
}

const NOTHING_SET: c_int = 0;

/// How a time zone without any offset is called.
const UTC: &CStr = c"UTC";

/// `BYTEA_OUTPUT_HEX` of core's `bytea.h`.
const BYTEA_OUTPUT_HEX: c_int = 1;

unsafe fn is(text: *const c_char, wanted: &CStr) -> bool {
    // SAFETY: NULL or a C string.
    unsafe { !text.is_null() && CStr::from_ptr(text) == wanted }
}

#[expect(ffi_unwind_calls, reason = "plain old frame")]
unsafe fn set(level: &mut c_int, name: &CStr, value: &CStr) {
    // SAFETY: as for `fix`. Values that every server takes, for settings that everybody may set.
    unsafe {
        if *level == NOTHING_SET {
            *level = ffi::NewGUCNestLevel();
        }
        ffi::set_config_option(
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
}

//! Intervals between SQL and documents.

use core::ffi::CStr;
use std::ffi::CString;

use pgrx::datum::Interval;
use pgrx::{FromDatum, IntoDatum, direct_function_call, pg_sys};

use crate::pg::{encoding, fault};

/// An interval as a document has it, and how long it is.
pub struct Span {
    /// As PostgreSQL prints it by default, whatever the session's IntervalStyle is.
    pub text: String,
    /// Months count 30 days.
    pub microseconds: i64,
}

/// The session's IntervalStyle, while another one is in force; it is back when this is dropped, after an error too.
struct Style(i32);

impl Style {
    fn postgres() -> Self {
        // SAFETY: the setting's variable, which only printing and reading intervals look at.
        unsafe {
            let style = pg_sys::IntervalStyle;
            pg_sys::IntervalStyle = pg_sys::INTSTYLE_POSTGRES as i32;
            Self(style)
        }
    }
}

impl Drop for Style {
    fn drop(&mut self) {
        // SAFETY: as above.
        unsafe { pg_sys::IntervalStyle = self.0 };
    }
}

const MICROSECONDS_PER_DAY: i64 = 24 * 3_600 * 1_000_000;

impl Span {
    /// Of an interval; none for NULL.
    ///
    /// # Safety
    /// `datum` is an interval, unless it is NULL.
    pub unsafe fn of(datum: pg_sys::Datum, is_null: bool) -> Option<Self> {
        // SAFETY: the caller's promise.
        unsafe {
            let interval = Interval::from_datum(datum, is_null)?;
            let days = i64::from(interval.months()) * 30 + i64::from(interval.days());
            let microseconds = days.saturating_mul(MICROSECONDS_PER_DAY).saturating_add(interval.micros());
            let text = {
                let _style = Style::postgres();
                fault::inject("printing an interval");
                direct_function_call::<&CStr>(pg_sys::interval_out, &[Some(datum)])
            };
            Some(Self { text: encoding::from_server(text?.to_bytes()), microseconds })
        }
    }

    /// Of a text that PostgreSQL printed. Anything else raises PostgreSQL's own error.
    pub fn read(text: &str) -> Option<Self> {
        let text = CString::new(text).ok()?;
        let arguments = [text.as_c_str().into_datum(), pg_sys::InvalidOid.into_datum(), (-1i32).into_datum()];
        // SAFETY: the input function of the type, with the arguments that input functions take.
        unsafe {
            let interval = direct_function_call::<pg_sys::Datum>(pg_sys::interval_in, &arguments)?;
            Self::of(interval, false)
        }
    }
}

//! A line of the server log that is ready: writing it copies bytes, and whatever fails about that fails here.
//!
//! So it can be written where nothing may fail any more, after a commit record or while a transaction is aborted.

use core::ffi::{c_char, c_int};
use core::ptr;

use pgrx::pg_sys;

use super::{encoding, ffi};

/// A line and its DETAIL in the server's encoding, each with its final NUL, in memory that is no transaction's.
pub struct Line {
    message: Vec<u8>,
    detail: Option<Vec<u8>>,
}

impl Line {
    /// Converts both texts, which the caller has cut.
    pub fn new(message: &str, detail: Option<&str>) -> Self {
        Self { message: c_string(message), detail: detail.map(c_string) }
    }

    /// Writes it to the server log and to nobody else. Statement and context are left out, because the statement may hold
    /// a token and the record says in its own words what was run. False where the log could not be written.
    #[expect(ffi_unwind_calls, reason = "inside attempt")]
    pub fn write(&self) -> bool {
        let message: *const c_char = self.message.as_ptr().cast();
        let detail: *const c_char = self.detail.as_ref().map_or(ptr::null(), |detail| detail.as_ptr().cast());
        // SAFETY: nothing but raw calls inside; elog.c copies the strings, which end with a NUL.
        unsafe {
            ffi::attempt(|| {
                if ffi::errstart(pg_sys::LOG_SERVER_ONLY as c_int, ptr::null()) {
                    ffi::errhidestmt(true);
                    ffi::errhidecontext(true);
                    ffi::errmsg_internal(c"%s".as_ptr(), message);
                    if !detail.is_null() {
                        ffi::errdetail_internal(c"%s".as_ptr(), detail);
                    }
                    ffi::errfinish(c"pg_writeguard".as_ptr(), 0, ptr::null());
                }
            })
        }
    }
}

/// A text in the server's encoding, with a NUL behind it.
fn c_string(text: &str) -> Vec<u8> {
    let mut bytes = encoding::to_server(&encoding::shown(text));
    bytes.truncate(bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len()));
    bytes.push(0);
    bytes
}

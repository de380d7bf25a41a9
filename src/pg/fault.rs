//! Faults that tests ask for, in builds with debug assertions only: elsewhere there is nothing of it.
//!
//! `SET fault.at = 'what'` has whatever is [contained](super::contained::contained) under that name, and each other place that
//! asks here by its name, panic before it begins; `'what!'` has it raise an ERROR of PostgreSQL's. The setting is of
//! nobody, so nothing has to be defined for it.

/// Fails, where a test asks for it.
#[cfg(not(debug_assertions))]
#[inline(always)]
pub fn inject(_what: &str) {}

/// Fails, where a test asks for it.
#[cfg(debug_assertions)]
pub fn inject(what: &str) {
    use core::ffi::CStr;

    use pgrx::pg_sys;

    // SAFETY: a setting's text, read at once; the size is one that no allocation may have.
    unsafe {
        let at = pg_sys::GetConfigOption(c"fault.at".as_ptr(), true, false);
        if at.is_null() {
            return;
        }
        let at = CStr::from_ptr(at).to_bytes();
        assert!(at != what.as_bytes(), "a fault that was asked for");
        if at.strip_suffix(b"!") == Some(what.as_bytes()) {
            pg_sys::palloc(usize::MAX);
        }
    }
}

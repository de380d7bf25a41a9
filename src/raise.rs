//! From Rust's errors to PostgreSQL's: what a plain old frame raises, and lines for the server log.

use core::ffi::{c_char, c_int};
use core::ptr;

use pgrx::{PgLogLevel, pg_sys};

use crate::error::{Error, LetPass};
use crate::ffi::{self, Foreign};
use crate::session;

/// Something that a plain old frame is to raise: an error of ours, or a foreign one that was caught on the way.
///
/// Plain data in palloc'ed memory: the frame that raises it has nothing to destroy.
#[repr(C)]
pub struct Raise {
    foreign: *mut pg_sys::ErrorData,
    sqlstate: c_int,
    message: *const c_char,
    detail: *const c_char,
    hint: *const c_char,
    schema: *const c_char,
    table: *const c_char,
    /// The server log leaves out the statement, which holds a secret.
    hide_statement: bool,
}

/// A message for whoever reads it: it must not fail for the ellipsis in a hint of ours.
fn encode(text: &str) -> *const c_char {
    if ffi::shows_all_letters() { ffi::encode(text) } else { ffi::encode(&text.replace('…', "...")) }
}

fn palloc_opt(text: Option<&str>) -> *const c_char {
    text.map_or(ptr::null(), encode)
}

impl Raise {
    /// An error of ours, ready to be raised.
    pub fn error(error: &Error) -> *mut Raise {
        let (schema, table) = error.table().unzip();
        let raise = Raise {
            foreign: ptr::null_mut(),
            sqlstate: pack_sqlstate(error.sqlstate()),
            message: encode(&error.to_string()),
            detail: palloc_opt(error.detail().as_deref()),
            hint: palloc_opt(error.hint().as_deref()),
            schema: palloc_opt(schema),
            table: palloc_opt(table),
            hide_statement: error.hides_statement() || session::query_shows_token(),
        };
        Self::alloc(raise)
    }

    /// Somebody else's error, caught by [`protect`], to be raised again as it was.
    pub fn foreign(error: Foreign) -> *mut Raise {
        Self::alloc(Raise {
            foreign: error.into_data(),
            sqlstate: 0,
            message: ptr::null(),
            detail: ptr::null(),
            hint: ptr::null(),
            schema: ptr::null(),
            table: ptr::null(),
            hide_statement: false,
        })
    }

    /// Adds a sentence to the DETAIL of an error of ours.
    pub fn explain(&mut self, sentence: &str) {
        if self.foreign.is_null() {
            // SAFETY: NULL or what `encode` made.
            let detail = unsafe { ffi::text(self.detail) };
            let detail = detail.map_or_else(|| sentence.to_owned(), |detail| format!("{detail} {sentence}"));
            self.detail = encode(&detail);
        }
    }

    fn alloc(raise: Raise) -> *mut Raise {
        // SAFETY: palloc gives maximally aligned memory of the size asked for.
        unsafe {
            let copy = pg_sys::palloc(size_of::<Raise>()).cast::<Raise>();
            copy.write(raise);
            copy
        }
    }
}

/// Why a function of ours does not return normally.
pub enum Failure {
    /// An error of ours.
    Ours(Error),
    /// An error of somebody else, untouched.
    Foreign(Foreign),
    /// Either, as a deeper guard left it.
    Ready(*mut Raise),
}

impl Failure {
    /// The same with a sentence more in the DETAIL, where it is an error of ours.
    pub fn explained(self, sentence: &str) -> Self {
        let raise = self.into_raise();
        if !sentence.is_empty() {
            // SAFETY: just made, and nobody else's yet.
            unsafe { (*raise).explain(sentence) };
        }
        Failure::Ready(raise)
    }

    /// Makes it ready for the frame that raises it.
    pub fn into_raise(self) -> *mut Raise {
        match self {
            Failure::Ours(error) => Raise::error(&error),
            Failure::Foreign(error) => Raise::foreign(error),
            Failure::Ready(raise) => raise,
        }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Failure::Ours(error)
    }
}

impl From<Foreign> for Failure {
    fn from(error: Foreign) -> Self {
        Failure::Foreign(error)
    }
}

/// What `MAKE_SQLSTATE` of core does.
fn pack_sqlstate(code: &str) -> c_int {
    code.bytes()
        .take(5)
        .enumerate()
        .fold(0, |packed, (place, byte)| packed | (c_int::from((byte.wrapping_sub(b'0')) & 0x3f) << (6 * place)))
}

/// Raises `raise` when there is one.
///
/// # Safety
/// Only from a plain old frame: an ERROR jumps over the caller.
#[inline(always)]
pub unsafe fn raise(raise: *mut Raise) {
    if !raise.is_null() {
        // SAFETY: the caller's promise; `raise` was made by `Raise::alloc`.
        unsafe { raise_now(raise) }
    }
}

#[cold]
unsafe fn raise_now(raise: *mut Raise) {
    // SAFETY: plain old frame; every pointer is NULL or a C string in palloc'ed memory, and elog.c copies them.
    unsafe {
        let raise = &*raise;
        if !raise.foreign.is_null() {
            ffi::ReThrowError(raise.foreign);
        }
        if ffi::errstart(PgLogLevel::ERROR as c_int, ptr::null()) {
            ffi::errcode(raise.sqlstate);
            ffi::errhidestmt(raise.hide_statement);
            ffi::errhidecontext(raise.hide_statement);
            ffi::errmsg_internal(c"%s".as_ptr(), raise.message);
            if !raise.detail.is_null() {
                ffi::errdetail_internal(c"%s".as_ptr(), raise.detail);
            }
            if !raise.hint.is_null() {
                ffi::errhint(c"%s".as_ptr(), raise.hint);
            }
            if !raise.schema.is_null() {
                ffi::err_generic_string(pg_sys::PG_DIAG_SCHEMA_NAME as c_int, raise.schema);
            }
            if !raise.table.is_null() {
                ffi::err_generic_string(pg_sys::PG_DIAG_TABLE_NAME as c_int, raise.table);
            }
            ffi::errfinish(c"pg_writeguard".as_ptr(), 0, ptr::null());
        }
    }
}

/// Tells the client something that is no error.
///
/// # Errors
/// What interrupts the session meanwhile.
pub fn notice(message: &str, detail: Option<&str>) -> Result<(), Foreign> {
    let message = ffi::encode(message);
    let detail = palloc_opt(detail);
    // SAFETY: nothing but raw calls inside; the strings live in palloc'ed memory and elog.c copies them.
    unsafe {
        ffi::protect(|| {
            if ffi::errstart(PgLogLevel::NOTICE as c_int, ptr::null()) {
                ffi::errmsg_internal(c"%s".as_ptr(), message);
                if !detail.is_null() {
                    ffi::errdetail_internal(c"%s".as_ptr(), detail);
                }
                ffi::errfinish(c"pg_writeguard".as_ptr(), 0, ptr::null());
            }
        })
    }
}

/// Writes one line to the server log and to nobody else; statement and context are left out of it, because
/// the statement may hold a token and the record says in its own words what was run.
pub fn log_line(message: &str, detail: Option<&str>) {
    let message = ffi::encode(message);
    let detail = palloc_opt(detail);
    // SAFETY: LOG_SERVER_ONLY raises nothing itself, and with interrupts held off a cancel does not come out of it
    // either. The strings live in palloc'ed memory and elog.c copies them.
    unsafe {
        pg_sys::InterruptHoldoffCount += 1;
        if ffi::errstart(pg_sys::LOG_SERVER_ONLY as c_int, ptr::null()) {
            ffi::errhidestmt(true);
            ffi::errhidecontext(true);
            ffi::errmsg_internal(c"%s".as_ptr(), message);
            if !detail.is_null() {
                ffi::errdetail_internal(c"%s".as_ptr(), detail);
            }
            ffi::errfinish(c"pg_writeguard".as_ptr(), 0, ptr::null());
        }
        pg_sys::InterruptHoldoffCount -= 1;
    }
}

/// Tells the client something: a NOTICE, or a WARNING, which the server log has as well.
pub fn tell(level: PgLogLevel, message: &str, detail: Option<&str>, hint: Option<&str>) {
    let message = ffi::encode(message);
    let (detail, hint) = (palloc_opt(detail), palloc_opt(hint));
    // SAFETY: below ERROR nothing is raised, and with interrupts held off a cancel does not come out of it either.
    unsafe {
        pg_sys::InterruptHoldoffCount += 1;
        if ffi::errstart(level as c_int, ptr::null()) {
            ffi::errhidestmt(true);
            ffi::errhidecontext(true);
            ffi::errmsg_internal(c"%s".as_ptr(), message);
            if !detail.is_null() {
                ffi::errdetail_internal(c"%s".as_ptr(), detail);
            }
            if !hint.is_null() {
                ffi::errhint(c"%s".as_ptr(), hint);
            }
            ffi::errfinish(c"pg_writeguard".as_ptr(), 0, ptr::null());
        }
        pg_sys::InterruptHoldoffCount -= 1;
    }
}

/// Tells the client of something that was let pass. Statement and context are left out of the log's line, as by
/// [`log_line`].
pub fn warn(passed: &LetPass, rows: Option<u64>, in_block: bool) {
    let message = ffi::encode(&passed.message(rows));
    let detail = ffi::encode(&passed.detail());
    let hint = ffi::encode(LetPass::hint(in_block));
    let (schema, table) = (ffi::encode(&passed.relation.schema), ffi::encode(&passed.relation.name));
    // SAFETY: a WARNING raises nothing itself, and with interrupts held off a cancel does not come out of it either. The
    // strings live in palloc'ed memory and elog.c copies them.
    unsafe {
        pg_sys::InterruptHoldoffCount += 1;
        if ffi::errstart(PgLogLevel::WARNING as c_int, ptr::null()) {
            ffi::errhidestmt(true);
            ffi::errhidecontext(true);
            ffi::errcode(pack_sqlstate(passed.sqlstate()));
            ffi::errmsg_internal(c"%s".as_ptr(), message);
            ffi::errdetail_internal(c"%s".as_ptr(), detail);
            ffi::errhint(c"%s".as_ptr(), hint);
            ffi::err_generic_string(pg_sys::PG_DIAG_SCHEMA_NAME as c_int, schema);
            ffi::err_generic_string(pg_sys::PG_DIAG_TABLE_NAME as c_int, table);
            ffi::errfinish(c"pg_writeguard".as_ptr(), 0, ptr::null());
        }
        pg_sys::InterruptHoldoffCount -= 1;
    }
}

/// Runs Rust proper inside a pgrx guard, which has returned before the caller's frame goes on. Null: nothing is to be
/// raised.
pub fn guarded<F: FnOnce() -> Result<(), Failure>>(body: F) -> *mut Raise {
    // SAFETY: called from a plain old frame; a panic inside becomes an ERROR at this guard and nowhere else.
    unsafe {
        pgrx::pgrx_extern_c_guard(|| match body() {
            Ok(()) => ptr::null_mut(),
            Err(failure) => failure.into_raise(),
        })
    }
}

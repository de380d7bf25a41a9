//! From Rust's errors to PostgreSQL's: what a plain old frame raises, and lines for the server log.

use core::ffi::{CStr, c_char, c_int};
use core::ptr;
use std::any::Any;
use std::panic;
use std::sync::OnceLock;

use pgrx::pg_sys::panic::{CaughtError, ErrorReportWithLevel};
use pgrx::{PgLogLevel, pg_sys};
use rules::error::{Error, LetPass};
use rules::words::shortened;

use super::backend_local::BackendLocal;
use super::ffi::{self, PgError};
use super::log_line::Line;
use super::stray::OutOfMemory;
use super::{client, encoding, reserve};

/// The fields of an error, notice or log line: plain data in palloc'ed memory, so that the frame which reports it has
/// nothing to destroy. NULL and 0: the field is absent.
#[repr(C)]
struct Report {
    sqlstate: c_int,
    message: *const c_char,
    detail: *const c_char,
    hint: *const c_char,
    schema: *const c_char,
    table: *const c_char,
    /// The server log leaves out the statement and its context.
    hides_statement: bool,
}

impl Report {
    const NOTHING: Self = Self {
        sqlstate: 0,
        message: c"".as_ptr(),
        detail: ptr::null(),
        hint: ptr::null(),
        schema: ptr::null(),
        table: ptr::null(),
        hides_statement: false,
    };

    /// Bytes of all its texts.
    ///
    /// # Safety
    /// None of it is gone yet.
    unsafe fn bytes(&self) -> usize {
        let texts = [self.message, self.detail, self.hint, self.schema, self.table];
        // SAFETY: every pointer is NULL or a C string.
        texts.iter().filter(|text| !text.is_null()).map(|text| unsafe { CStr::from_ptr(*text) }.count_bytes()).sum()
    }

    /// Reports it. Below ERROR this returns, unless the session is interrupted meanwhile: while a client reads nothing a
    /// termination ends the session here, and once it has read, what it cancelled is an ERROR.
    ///
    /// # Safety
    /// Only from a plain old frame or inside [`ffi::protect`].
    #[expect(ffi_unwind_calls, reason = "plain old frame")]
    unsafe fn tell(&self, level: c_int) {
        // SAFETY: every pointer is NULL or a C string, and elog.c copies them.
        unsafe {
            if !ffi::errstart(level, ptr::null()) {
                return;
            }
            if self.sqlstate != 0 {
                ffi::errcode(self.sqlstate);
            }
            ffi::errhidestmt(self.hides_statement);
            ffi::errhidecontext(self.hides_statement);
            ffi::errmsg_internal(c"%s".as_ptr(), self.message);
            if !self.detail.is_null() {
                ffi::errdetail_internal(c"%s".as_ptr(), self.detail);
            }
            if !self.hint.is_null() {
                ffi::errhint(c"%s".as_ptr(), self.hint);
            }
            if !self.schema.is_null() {
                ffi::err_generic_string(pg_sys::PG_DIAG_SCHEMA_NAME as c_int, self.schema);
            }
            if !self.table.is_null() {
                ffi::err_generic_string(pg_sys::PG_DIAG_TABLE_NAME as c_int, self.table);
            }
            ffi::errfinish(c"pg_writeguard".as_ptr(), 0, ptr::null());
        }
    }
}

static SECRET: OnceLock<fn() -> bool> = OnceLock::new();

/// From now on the server log leaves out the client's query where `is_secret` says so; once, in the postmaster.
pub fn keep_secret(is_secret: fn() -> bool) {
    SECRET.get_or_init(|| is_secret);
}

fn query_is_secret() -> bool {
    SECRET.get().is_some_and(|is_secret| is_secret())
}

/// Something that a plain old frame is to raise: an error of ours, or a foreign one that was caught on the way.
#[repr(C)]
pub struct PendingError {
    foreign: *mut pg_sys::ErrorData,
    report: Report,
}

/// Bytes of a message, a detail or a hint: what a caller gave is not repeated whole where it is longer.
const MOST_SAID: usize = 64 * 1024;

/// A message for whoever reads it, in letters that can be shown to the client and in the server log.
fn encode(text: &str) -> *const c_char {
    encoding::to_palloc(&encoding::shown_to_client(&shortened(text, MOST_SAID)))
}

fn palloc_opt(text: Option<&str>) -> *const c_char {
    text.map_or(ptr::null(), encode)
}

impl PendingError {
    /// An error of ours, ready to be raised.
    pub fn error(error: &Error) -> *mut PendingError {
        let (schema, table) = error.table().unzip();
        let report = Report {
            sqlstate: pack_sqlstate(error.sqlstate()),
            message: encode(&error.to_string()),
            detail: palloc_opt(error.detail().as_deref()),
            hint: palloc_opt(error.hint().as_deref()),
            schema: palloc_opt(schema),
            table: palloc_opt(table),
            hides_statement: error.hides_statement() || query_is_secret(),
        };
        Self::alloc(PendingError { foreign: ptr::null_mut(), report })
    }

    /// An error about no table.
    fn plain(sqlstate: c_int, message: &str, detail: Option<&str>, hint: Option<&str>) -> *mut PendingError {
        let report = Report {
            sqlstate,
            message: encode(message),
            detail: palloc_opt(detail),
            hint: palloc_opt(hint),
            hides_statement: query_is_secret(),
            ..Report::NOTHING
        };
        Self::alloc(PendingError { foreign: ptr::null_mut(), report })
    }

    /// Out of memory, where there is none left for the error's own texts; allocates nothing.
    fn out_of_memory() -> *mut PendingError {
        const REPORT: Report = Report {
            sqlstate: pack_sqlstate("53200"),
            message: c"out of memory".as_ptr(),
            hides_statement: true,
            ..Report::NOTHING
        };
        const ERROR: PendingError = PendingError { foreign: ptr::null_mut(), report: REPORT };
        static PLACE: BackendLocal<PendingError> = BackendLocal::new(ERROR);
        // SAFETY: whoever had it has raised it; what was added to it is gone with its memory.
        unsafe { *PLACE.get() = ERROR };
        PLACE.get()
    }

    /// Somebody else's error, caught by [`protect`](ffi::protect), to be raised again as it was.
    pub fn foreign(error: PgError) -> *mut PendingError {
        Self::alloc(PendingError { foreign: error.into_data(), report: Report::NOTHING })
    }

    /// The same in another memory context: what is about to be rolled back takes along what was allocated meanwhile.
    ///
    /// # Safety
    /// `raise` is NULL or nobody else's, and none of it is gone yet.
    #[expect(ffi_unwind_calls, reason = "inside protect")]
    pub unsafe fn moved_to(context: pg_sys::MemoryContext, raise: *mut PendingError) -> *mut PendingError {
        // SAFETY: the caller's promise; texts are NULL or C strings. What is thrown again is copied on its way out.
        unsafe {
            let Some(PendingError { foreign, report }) = raise.as_ref() else { return raise };
            let here = pg_sys::MemoryContextSwitchTo(context);
            let moved = if foreign.is_null() {
                let copy = |text: *const c_char| -> *const c_char {
                    if text.is_null() { text } else { pg_sys::pstrdup(text) }
                };
                let report = Report {
                    message: copy(report.message),
                    detail: copy(report.detail),
                    hint: copy(report.hint),
                    schema: copy(report.schema),
                    table: copy(report.table),
                    ..*report
                };
                Self::alloc(PendingError { foreign: ptr::null_mut(), report })
            } else {
                let again = ffi::protect(|| ffi::ReThrowError(*foreign));
                again.map_or_else(Self::foreign, |()| Self::out_of_memory())
            };
            pg_sys::MemoryContextSwitchTo(here);
            moved
        }
    }

    /// Adds a sentence to the DETAIL of an error of ours.
    pub fn explain(&mut self, sentence: &str) {
        if self.foreign.is_null() {
            // SAFETY: NULL or what `encode` made.
            let detail = unsafe { encoding::from_c(self.report.detail) };
            let detail = detail.map_or_else(|| sentence.to_owned(), |detail| format!("{detail} {sentence}"));
            self.report.detail = encode(&detail);
        }
    }

    /// What a constraint said, where it is one that does not allow a row: classes 23 and 44.
    pub fn about_a_constraint(&self) -> Option<String> {
        // SAFETY: NULL or a copy that is ours, whose texts are NULL or C strings in the server's encoding.
        let error = unsafe { self.foreign.as_ref()? };
        const CLASS: c_int = 0xfff;
        let of = |class: &str| pack_sqlstate(class) == error.sqlerrcode & CLASS;
        if !of("23") && !of("44") {
            return None;
        }
        let text = |text: *const c_char| {
            // SAFETY: as above.
            (!text.is_null()).then(|| encoding::from_server(unsafe { CStr::from_ptr(text) }.to_bytes()))
        };
        let message = text(error.message)?;
        Some(text(error.detail).map_or_else(|| format!("{message}."), |detail| format!("{message}. {detail}")))
    }

    /// Whether it is that of a missing privilege or of a transaction that only reads.
    pub fn forbids_to_write(&self) -> bool {
        // SAFETY: NULL or a copy that is ours.
        let foreign = unsafe { self.foreign.as_ref() };
        let code = foreign.map_or(self.report.sqlstate, |error| error.sqlerrcode);
        [pack_sqlstate("42501"), pack_sqlstate("25006")].contains(&code)
    }

    fn alloc(raise: PendingError) -> *mut PendingError {
        // SAFETY: palloc gives maximally aligned memory of the size asked for.
        unsafe {
            let copy = pg_sys::palloc(size_of::<PendingError>()).cast::<PendingError>();
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
    Foreign(PgError),
    /// Either, as a deeper guard left it.
    Ready(*mut PendingError),
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
    pub fn into_raise(self) -> *mut PendingError {
        match self {
            Failure::Ours(error) => PendingError::error(&error),
            Failure::Foreign(error) => PendingError::foreign(error),
            Failure::Ready(raise) => raise,
        }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Failure::Ours(error)
    }
}

impl From<PgError> for Failure {
    fn from(error: PgError) -> Self {
        Failure::Foreign(error)
    }
}

/// What `MAKE_SQLSTATE` of core does.
const fn pack_sqlstate(code: &str) -> c_int {
    let (code, mut packed, mut place) = (code.as_bytes(), 0, 0);
    while place < code.len() && place < 5 {
        packed |= ((code[place].wrapping_sub(b'0') & 0x3f) as c_int) << (6 * place);
        place += 1;
    }
    packed
}

/// Raises `raise` when there is one.
///
/// # Safety
/// Only from a plain old frame: an ERROR jumps over the caller.
#[inline(always)]
pub unsafe fn raise(raise: *mut PendingError) {
    if !raise.is_null() {
        // SAFETY: the caller's promise; `raise` was made by `PendingError::alloc`.
        unsafe { raise_now(raise) }
    }
}

#[cold]
#[expect(ffi_unwind_calls, reason = "plain old frame")]
unsafe fn raise_now(raise: *mut PendingError) {
    // SAFETY: the caller's promise.
    unsafe {
        if !(*raise).foreign.is_null() {
            ffi::ReThrowError((*raise).foreign);
        }
        client::wait_for_room((*raise).report.bytes());
        (*raise).report.tell(PgLogLevel::ERROR as c_int);
    }
}

/// Sends the client a NOTICE, or a WARNING, which the server log has as well.
///
/// Interrupts are served meanwhile, as while core sends anything: a client that does not read keeps its session waiting
/// here, and that must end when the session is terminated or the server shut down. So never under a lock that an error
/// does not release, and never once a transaction has committed or is being rolled back.
///
/// # Errors
/// What interrupts the session meanwhile; the caller raises it, so that the transaction aborts.
pub fn tell(level: PgLogLevel, message: &str, detail: Option<&str>, hint: Option<&str>) -> Result<(), PgError> {
    let report = Report {
        message: encode(message),
        detail: palloc_opt(detail),
        hint: palloc_opt(hint),
        hides_statement: true,
        ..Report::NOTHING
    };
    // SAFETY: nothing but the plain old frame inside.
    unsafe { ffi::protect(|| report.tell(level as c_int)) }
}

/// Sends the WARNING of a policy with mode warn. Statement and context are left out of the log's line, as by
/// [`log_line`].
///
/// # Errors
/// As for [`tell`].
pub fn warn(passed: &LetPass, rows: Option<u64>, in_block: bool) -> Result<(), PgError> {
    let report = Report {
        sqlstate: pack_sqlstate(passed.sqlstate()),
        message: encode(&passed.message(rows)),
        detail: encode(&passed.detail()),
        hint: encode(LetPass::hint(in_block)),
        schema: encode(&passed.relation.schema),
        table: encode(&passed.relation.name),
        hides_statement: true,
    };
    // SAFETY: nothing but the plain old frame inside.
    unsafe { ffi::protect(|| report.tell(PgLogLevel::WARNING as c_int)) }
}

/// Writes one line to the server log and to nobody else. Called at any moment, also when a transaction has committed; see
/// [`Line`].
pub fn log_line(message: &str, detail: Option<&str>) {
    Line::new(message, detail).write();
}

/// Ends the session, where there is no memory to go on with and no way back; returns where PostgreSQL cannot be asked to.
#[cold]
pub fn die_without_memory() {
    const REPORT: Report = Report {
        sqlstate: pack_sqlstate("53200"),
        message: c"out of memory".as_ptr(),
        detail: c"pg_writeguard had none to go on with.".as_ptr(),
        hides_statement: true,
        ..Report::NOTHING
    };
    // SAFETY: a FATAL error does not come back, and jumps nowhere: the process exits from inside.
    unsafe {
        if pg_sys::CritSectionCount == 0 {
            REPORT.tell(PgLogLevel::FATAL as c_int);
        }
    }
}

/// Runs Rust proper, and gives what is to be raised; NULL: nothing.
///
/// It raises nothing itself, whatever `body` does: a panic, and an ERROR that pgrx made a panic of, end here and are given
/// back like any failure. So it may be called from frames with destructors as well, and only [`raise`] at the plain old
/// frame on the outside ever jumps.
pub fn guarded<F: FnOnce() -> Result<(), Failure>>(body: F) -> *mut PendingError {
    unwound(|| match body() {
        Ok(()) if reserve::is_low() => PendingError::out_of_memory(),
        Ok(()) => ptr::null_mut(),
        Err(failure) => failure.into_raise(),
    })
}

/// The same for a body that returns the `PendingError` itself.
#[inline]
pub fn unwound(body: impl FnOnce() -> *mut PendingError) -> *mut PendingError {
    ffi::catch(body).unwrap_or_else(told)
}

/// Without memory, what was caught may be impossible to report.
#[cold]
#[inline(never)]
fn told(thrown: Box<dyn Any + Send>) -> *mut PendingError {
    ffi::catch(|| caught(thrown)).unwrap_or_else(|_| PendingError::out_of_memory())
}

/// What a body threw.
fn caught(thrown: Box<dyn Any + Send>) -> *mut PendingError {
    if thrown.is::<OutOfMemory>() {
        return PendingError::out_of_memory();
    }
    let thrown = match thrown.downcast::<Thrown>() {
        Ok(foreign) => return PendingError::foreign(foreign.0),
        Err(thrown) => thrown,
    };
    let report = match thrown.downcast::<CaughtError>() {
        Ok(caught) => match *caught {
            CaughtError::PostgresError(report)
            | CaughtError::ErrorReport(report)
            | CaughtError::RustPanic { ereport: report, .. } => report,
        },
        Err(thrown) => match thrown.downcast::<ErrorReportWithLevel>() {
            Ok(report) => *report,
            Err(panic) => return fault(&*panic),
        },
    };
    PendingError::plain(report.sql_error_code() as c_int, report.message(), report.detail(), report.hint())
}

/// A foreign error that unwinds to the nearest [`guarded`].
struct Thrown(PgError);

// SAFETY: a backend is one thread; the error goes from one frame of it to another.
unsafe impl Send for Thrown {}

/// Unwinds with somebody else's error to the nearest [`guarded`], as a panic does. The error must be in memory that outlives
/// the frames in between.
pub fn throw(error: PgError) -> ! {
    panic::resume_unwind(Box::new(Thrown(error)))
}

/// A panic of our own.
fn fault(panic: &(dyn Any + Send)) -> *mut PendingError {
    let message = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
    let place = PLACE.borrow().take();
    let place = place.map_or_else(|| "an unknown place".to_owned(), |(file, line)| format!("{file}:{line}"));
    let detail = format!("This is a fault of pg_writeguard, at {place}.");
    PendingError::plain(pack_sqlstate("XX000"), message.unwrap_or("unexpected panic"), Some(&detail), None)
}

/// Where the last panic began.
static PLACE: BackendLocal<Option<(String, u32)>> = BackendLocal::new(None);

/// Has panics and errors of this library carry no backtrace, whatever RUST_BACKTRACE says: pgrx would put it into the DETAIL of
/// every error that passes one of its guards, and that is read by people who have nothing to do with us. Called when the
/// library is loaded, after pgrx has set its own hook.
pub fn keep_backtraces_out() {
    panic::set_hook(Box::new(|panic| {
        let place = panic.location().map(|place| (place.file().to_owned(), place.line()));
        *PLACE.borrow() = place;
    }));
}

//! What the background processes have in common: how they are started, connected and set up.

use core::ffi::{CStr, c_char, c_int};
use std::panic::AssertUnwindSafe;

use pgrx::bgworkers::{BackgroundWorker, SignalWakeFlags};
use pgrx::pg_sys::panic::CaughtError;
use pgrx::prelude::*;
use pgrx::{PgLogLevel, ereport};

use super::backend_local::BackendCell;
use super::ffi;

const LIBRARY: &CStr = c"pg_writeguard";

/// Sets the signal handlers: core's own `die` on SIGTERM, and a flag on SIGHUP.
pub fn handle_signals() {
    // SAFETY: before signals are unblocked, which attach_signal_handlers does.
    unsafe {
        #[cfg(not(since_pg18))]
        pg_sys::pqsignal(pg_sys::SIGTERM as c_int, Some(ffi::die));
        #[cfg(since_pg18)]
        pg_sys::pqsignal_be(pg_sys::SIGTERM as c_int, Some(ffi::die));
    }
    BackgroundWorker::attach_signal_handlers(SignalWakeFlags::SIGHUP);
}

/// Whether there is such a database.
pub fn exists(database: pg_sys::Oid) -> bool {
    BackgroundWorker::transaction(|| {
        // SAFETY: a look-up in a shared catalog.
        unsafe {
            pg_sys::SearchSysCacheExists(
                pg_sys::SysCacheIdentifier::DATABASEOID as c_int,
                database.into(),
                pg_sys::Datum::from(0),
                pg_sys::Datum::from(0),
                pg_sys::Datum::from(0),
            )
        }
    })
}

/// Asks the postmaster for a worker of that name and main function. False when it has no place for one.
pub fn start(database: pg_sys::Oid, name: &CStr, function: &CStr) -> bool {
    let mut worker = pg_sys::BackgroundWorker::default();
    let put = |field: &mut [c_char], text: &CStr| {
        for (to, from) in field.iter_mut().zip(text.to_bytes_with_nul()) {
            *to = *from as c_char;
        }
    };
    put(&mut worker.bgw_name, name);
    put(&mut worker.bgw_type, name);
    put(&mut worker.bgw_function_name, function);
    // The field is an array up to 17 and longer in 18; the name fits both.
    put(&mut worker.bgw_library_name, LIBRARY);
    worker.bgw_flags = (pg_sys::BGWORKER_SHMEM_ACCESS | pg_sys::BGWORKER_BACKEND_DATABASE_CONNECTION) as c_int;
    worker.bgw_start_time = pg_sys::BgWorkerStartTime::BgWorkerStart_RecoveryFinished;
    worker.bgw_restart_time = pg_sys::BGW_NEVER_RESTART;
    worker.bgw_main_arg = pg_sys::Datum::from(database);
    // SAFETY: the handle is not kept; the postmaster tells us by SIGUSR1 when the worker starts or ends.
    unsafe {
        worker.bgw_notify_pid = pg_sys::MyProcPid;
        pg_sys::RegisterDynamicBackgroundWorker(&mut worker, core::ptr::null_mut())
    }
}

/// Why a transaction of a background process did not commit.
pub struct Failed {
    class: (u8, u8),
    code: PgSqlErrorCode,
    /// The file of PostgreSQL's source that raised it.
    file: String,
    pub message: String,
}

impl Failed {
    fn of(error: &CaughtError) -> Self {
        let (CaughtError::PostgresError(report)
        | CaughtError::ErrorReport(report)
        | CaughtError::RustPanic { ereport: report, .. }) = error;
        let code = report.sql_error_code();
        // Characters of six bits each, as MAKE_SQLSTATE packs them.
        let letter = |place: i32| (((code as i32 >> (6 * place)) & 0x3f) as u8).wrapping_add(b'0');
        Self {
            class: (letter(0), letter(1)),
            code,
            file: report.file().to_owned(),
            message: report.message().to_owned(),
        }
    }

    /// Whether the error is about the moment and not about what was to be done: a connection, a conflict with others,
    /// resources, somebody's lock, an operator, the system.
    pub fn is_about_the_moment(&self) -> bool {
        // Some errors of the system, such as a file that is too large, have the code of an internal error.
        const OF_STORAGE: [&str; 5] = ["md.c", "fd.c", "smgr.c", "slru.c", "xlog.c"];
        let file = self.file.rsplit('/').next().unwrap_or_default();
        let is_system = self.code == PgSqlErrorCode::ERRCODE_INTERNAL_ERROR && OF_STORAGE.contains(&file);
        is_system || [b"08", b"40", b"53", b"55", b"57", b"58"].iter().any(|class| (class[0], class[1]) == self.class)
    }

    /// Whether a number is taken already, or there are no more of them.
    pub fn is_about_numbers(&self) -> bool {
        matches!(
            self.code,
            PgSqlErrorCode::ERRCODE_UNIQUE_VIOLATION | PgSqlErrorCode::ERRCODE_SEQUENCE_GENERATOR_LIMIT_EXCEEDED
        )
    }
}

/// Runs one transaction. An error of whatever kind, that of the commit included, rolls it back and is given to the caller:
/// the process continues.
///
/// # Errors
/// What `body` or the commit raises.
pub fn attempt<T>(body: impl FnOnce() -> T) -> Result<T, Failed> {
    // SAFETY: the order of calls is that of a backend's main loop around a command.
    unsafe {
        let stacks = (pg_sys::PG_exception_stack, pg_sys::error_context_stack);
        let attempted = PgTryBuilder::new(AssertUnwindSafe(|| {
            pg_sys::SetCurrentStatementStartTimestamp();
            pg_sys::StartTransactionCommand();
            pg_sys::PushActiveSnapshot(pg_sys::GetTransactionSnapshot());
            let result = body();
            pg_sys::PopActiveSnapshot();
            pg_sys::CommitTransactionCommand();
            Ok(result)
        }))
        .catch_others(|error| Err(Failed::of(&error)))
        .execute();
        if attempted.is_err() {
            // As `ffi::catch` says.
            (pg_sys::PG_exception_stack, pg_sys::error_context_stack) = stacks;
            pg_sys::AbortCurrentTransaction();
        }
        attempted
    }
}

/// Runs a part of a transaction; an error rolls back this part alone and is given to the caller.
///
/// # Errors
/// What `body` raises.
pub fn in_subtransaction<T>(body: impl FnOnce() -> T) -> Result<T, Failed> {
    // SAFETY: the order of calls is that of core's own procedural languages around a block that catches errors.
    unsafe {
        let (context, owner) = (pg_sys::CurrentMemoryContext, pg_sys::CurrentResourceOwner);
        let stacks = (pg_sys::PG_exception_stack, pg_sys::error_context_stack);
        pg_sys::BeginInternalSubTransaction(core::ptr::null());
        let attempted =
            PgTryBuilder::new(AssertUnwindSafe(|| Ok(body()))).catch_others(|error| Err(Failed::of(&error))).execute();
        if attempted.is_ok() {
            pg_sys::ReleaseCurrentSubTransaction();
        } else {
            (pg_sys::PG_exception_stack, pg_sys::error_context_stack) = stacks;
            pg_sys::RollbackAndReleaseCurrentSubTransaction();
        }
        pg_sys::CurrentMemoryContext = context;
        pg_sys::CurrentResourceOwner = owner;
        attempted
    }
}

/// A table or sequence of the extension; InvalidOid where it is not there.
pub fn own_table(name: &CStr) -> pg_sys::Oid {
    // SAFETY: syscache look-ups that give InvalidOid for what is not there.
    unsafe { pg_sys::get_relname_relid(name.as_ptr(), pg_sys::get_namespace_oid(c"writeguard".as_ptr(), true)) }
}

/// Locks tables of the extension until the transaction ends, without ever waiting for one lock while it holds another: whoever
/// drops the extension takes these locks as well, in any order, and must not be the victim of a deadlock. False when the first
/// of them is not there.
pub fn lock_own_tables<const COUNT: usize>(tables: [(&CStr, pg_sys::LOCKMODE); COUNT]) -> bool {
    let find = || tables.map(|(name, _)| own_table(name));
    loop {
        let found = find();
        if found[0] == pg_sys::InvalidOid {
            return false;
        }
        let there: Vec<(pg_sys::Oid, pg_sys::LOCKMODE)> = found
            .into_iter()
            .zip(tables.map(|(_, mode)| mode))
            .filter(|(table, _)| *table != pg_sys::InvalidOid)
            .collect();
        // SAFETY: lock calls in a transaction; its end releases what is held.
        unsafe {
            let missed = there.iter().position(|(table, mode)| !pg_sys::ConditionalLockRelationOid(*table, *mode));
            // A lock makes renames and drops visible that were committed before.
            if missed.is_none() && find() == found {
                return true;
            }
            for (table, mode) in &there[..missed.unwrap_or(there.len())] {
                pg_sys::UnlockRelationOid(*table, *mode);
            }
            if let Some((table, mode)) = missed.map(|at| there[at]) {
                pg_sys::LockRelationOid(table, mode);
                pg_sys::UnlockRelationOid(table, mode);
            }
        }
    }
}

/// The result of one of our own statements; a failure is an ERROR, which ends its transaction.
pub fn must<T>(result: Result<T, pgrx::spi::Error>) -> T {
    result.unwrap_or_else(|error| {
        ereport!(PgLogLevel::ERROR, PgSqlErrorCode::ERRCODE_INTERNAL_ERROR, format!("own statement failed: {error}"));
        unreachable!("an ERROR does not return")
    })
}

/// The first thing that a worker does: connects to the database that [`start`] gave it as its argument.
pub fn connect(argument: pg_sys::Datum) -> pg_sys::Oid {
    handle_signals();
    stay_out();
    let database = pg_sys::Oid::from_u32(argument.value() as u32);
    // SAFETY: in a background process that is not connected yet.
    unsafe {
        pg_sys::BackgroundWorkerInitializeConnectionByOid(
            database,
            pg_sys::InvalidOid,
            pg_sys::BGWORKER_BYPASS_ALLOWCONN,
        );
    }
    ignore_database_settings();
    database
}

/// What ALTER DATABASE … SET says is for clients; our own statements run as the superuser with these.
fn ignore_database_settings() {
    let settings = [
        (c"role", c"none"),
        (c"search_path", c"pg_catalog, pg_temp"),
        (c"default_transaction_read_only", c"off"),
        (c"default_transaction_isolation", c"read committed"),
        (c"session_replication_role", c"origin"),
        (c"lock_timeout", c"0"),
        (c"row_security", c"on"),
        (c"synchronous_commit", c"on"),
        #[cfg(since_pg17)]
        (c"transaction_timeout", c"0"),
    ];
    for (name, value) in settings {
        // SAFETY: core's own settings with values that need no catalog.
        unsafe {
            pg_sys::SetConfigOption(
                name.as_ptr(),
                value.as_ptr(),
                pg_sys::GucContext::PGC_SUSET,
                pg_sys::GucSource::PGC_S_OVERRIDE,
            );
        }
    }
}

/// The answer of [`stays_out`], once it is known; it never changes.
static STAYS_OUT: BackendCell<Option<bool>> = BackendCell::new(None);

/// Whether the guard stays out of this process for good: it is no client's.
#[inline(always)]
pub fn stays_out() -> bool {
    STAYS_OUT.get().unwrap_or_else(|| {
        // SAFETY: these read statics of this process.
        let stays_out =
            unsafe { pg_sys::IsBinaryUpgrade || pg_sys::ParallelWorkerNumber >= 0 || ffi::IsLogicalWorker() };
        STAYS_OUT.set(Some(stays_out));
        stays_out
    })
}

/// This process is one of the library's own, which write its tables only: to look for policies it would have to wait for
/// their table while it holds locks that others wait for.
pub fn stay_out() {
    STAYS_OUT.set(Some(true));
}

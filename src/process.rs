//! What the background processes have in common: how they are started, connected and set up.

use core::ffi::{CStr, c_char, c_int};

use pgrx::bgworkers::{BackgroundWorker, SignalWakeFlags};
use pgrx::prelude::*;
use pgrx::{PgLogLevel, ereport};

use crate::ffi;
use crate::guard::hooks;

const LIBRARY: &CStr = c"pg_writeguard";

/// Dies by core's own handler, and reads the configuration again when told to.
pub fn handle_signals() {
    // SAFETY: before signals are unblocked, which attach_signal_handlers does.
    unsafe {
        #[cfg(not(feature = "pg18"))]
        pg_sys::pqsignal(pg_sys::SIGTERM as c_int, Some(ffi::die));
        #[cfg(feature = "pg18")]
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

/// Asks the postmaster for a worker of that name and main function. When it has no place for one, the next look tries
/// again.
pub fn start(database: pg_sys::Oid, name: &CStr, function: &CStr) {
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
        if !pg_sys::RegisterDynamicBackgroundWorker(&mut worker, core::ptr::null_mut()) {
            ereport!(
                PgLogLevel::LOG,
                PgSqlErrorCode::ERRCODE_CONFIGURATION_LIMIT_EXCEEDED,
                "pg_writeguard: no background worker slot is free for storing events; raise max_worker_processes"
            );
        }
    }
}

/// The first thing that a worker does: connects to the database that [`start`] gave it as its argument.
pub fn connect(argument: pg_sys::Datum) -> pg_sys::Oid {
    handle_signals();
    hooks::stay_out();
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
        #[cfg(any(feature = "pg17", feature = "pg18"))]
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

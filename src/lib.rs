//! pg_writeguard: refuses UPDATE, DELETE and TRUNCATE past the row limits set per table or role.
//!
//! `guard` counts and decides, `policy` says what is covered, `token` whether an override is in order, `event` keeps
//! the record, `stat` what statements change, `review` is the people's side, `undo` puts rows back, `worker` stores what
//! must survive a rollback, `monitor` is what monitoring reads.

// Hooks and callbacks are called by PostgreSQL only; their safety sections are at the modules.
#![allow(clippy::missing_safety_doc)]
#![deny(ffi_unwind_calls)]

use pgrx::pg_sys;

mod error;
mod event;
mod guard;
mod lexer;
mod monitor;
mod pg;
mod policy;
mod review;
mod session;
mod stat;
mod token;
mod undo;
mod words;
mod worker;

::pgrx::pg_module_magic!();

// One after another: what is left open comes in another order with every build, and a release is the same bytes each time.
::pgrx::extension_sql_file!("../sql/preload.sql", name = "preload", bootstrap);
::pgrx::extension_sql_file!("../sql/tables.sql", name = "tables", requires = ["preload"]);
::pgrx::extension_sql_file!("../sql/functions.sql", name = "functions", requires = ["tables"]);
::pgrx::extension_sql_file!("../sql/review.sql", name = "review", requires = ["functions"]);
::pgrx::extension_sql_file!("../sql/execute.sql", name = "execute", requires = ["review"]);
::pgrx::extension_sql_file!("../sql/keys.sql", name = "keys", requires = ["execute"]);
::pgrx::extension_sql_file!("../sql/documents.sql", name = "documents", requires = ["keys"]);
::pgrx::extension_sql_file!("../sql/stat.sql", name = "stat", requires = ["documents"]);
::pgrx::extension_sql_file!("../sql/monitoring.sql", name = "monitoring", requires = ["stat"]);
::pgrx::extension_sql_file!("../sql/setup.sql", name = "setup", requires = ["monitoring"]);
::pgrx::extension_sql_file!("../sql/undo.sql", name = "undo", requires = ["setup"]);
::pgrx::extension_sql_file!("../sql/undo_functions.sql", name = "undo_functions", requires = ["undo"]);
::pgrx::extension_sql_file!("../sql/preview.sql", name = "preview", requires = ["undo_functions"]);
::pgrx::extension_sql_file!("../sql/grants.sql", name = "grants", finalize);

/// Loading happens in three stages: here settings and hooks are registered, in the postmaster and before any backend
/// exists; then shared memory is asked for and laid out by the hooks; then backends and the launcher start. In a
/// server that does not preload the library this does nothing, and every SQL function says so.
#[allow(non_snake_case)]
#[pgrx::pg_guard]
pub extern "C-unwind" fn _PG_init() {
    pg::ereport::keep_backtraces_out();
    // SAFETY: statics of this process; PostgreSQL calls this once, where the library is loaded.
    unsafe {
        if !pg_sys::process_shared_preload_libraries_in_progress {
            return;
        }
        pg::preload::note();
        session::settings::register(session::actor::arming(), session::expectation::hooks());
        guard::hooks::install();
    }
    worker::store_worker::register();
}

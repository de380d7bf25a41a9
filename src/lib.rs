//! pg_writeguard: refuses UPDATE, DELETE and TRUNCATE past the row limits set per table or role.
//!
//! `guard` counts and decides, `policy` says what is covered, `token` whether an override is in order, `event` keeps
//! the record, `stat` what statements change, `review` is the people's side, `undo` puts rows back, `worker` stores what
//! must survive a rollback, `monitor` is what monitoring reads, `setup` what `check_setup` asks. `session` is what a session
//! has and runs, `pg` how all of it reaches the server. What is decided without asking PostgreSQL anything is in the crate
//! `rules` (crates/rules).
//!
//! ARCHITECTURE.md follows a statement, an event, an approval and a kept row through these rooms, and says what may run when.
//! CONTRIBUTING.md says how to build, test and change the library.

// Hooks and callbacks are called by PostgreSQL only; their safety sections are at the modules.
#![allow(clippy::missing_safety_doc)]
#![deny(ffi_unwind_calls)]

use pgrx::pg_sys;

mod event;
mod guard;
mod monitor;
mod pg;
mod policy;
mod review;
mod session;
mod setup;
mod stat;
mod token;
mod undo;
mod worker;

::pgrx::pg_module_magic!();

/// Loading happens in three stages: here settings and hooks are registered, in the postmaster and before any backend
/// exists; then shared memory is asked for and laid out by the hooks; then backends and the launcher start. In a
/// server that does not preload the library this does nothing, and every SQL function says so.
#[allow(non_snake_case)]
#[pgrx::pg_guard]
pub extern "C-unwind" fn _PG_init() {
    pg::ereport::keep_backtraces_out();
    pg::reserve::ends_by(pg::ereport::die_without_memory);
    pg::ereport::keep_secret(session::actor::query_shows_token);
    // SAFETY: statics of this process; PostgreSQL calls this once, where the library is loaded.
    unsafe {
        if !pg_sys::process_shared_preload_libraries_in_progress {
            return;
        }
        pg::preload::note();
        session::settings::register(
            session::actor::arming(),
            session::expectation::hooks(),
            Some(session::pooled::assign),
        );
        guard::hooks::install();
    }
    worker::store_worker::register();
}

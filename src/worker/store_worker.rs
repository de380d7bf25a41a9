//! The background processes: a launcher that is connected to no database, and for each database with something to
//! store a worker that stores it, notifies, lingers for a moment and leaves. Now and then it sends a pruner (see `pruner`).
//!
//! One more worker has a slot from the server's start and waits without a database: where parallel queries have taken all
//! others, it stores for one database after another.
//!
//! So nobody stands in the way of DROP DATABASE or of CREATE DATABASE from that template, and a worker that is killed
//! is replaced while its events still wait in the queue. Both die by core's own handler, which the postmaster takes
//! for a reason to restart them; neither runs on a standby.

use core::ffi::c_int;
use std::collections::HashMap;
use std::time::{Duration, Instant};

use pgrx::bgworkers::{BackgroundWorker, BackgroundWorkerBuilder};
use pgrx::prelude::*;
use rules::error::{LOAD_IT_LAST, NO_SHARED_MEMORY, WHY_NO_SHARED_MEMORY};
use rules::words::counted;

use super::pruner::Sender;
use super::{batch, prune};
use crate::event::serve::{self, Taken};
use crate::event::{outbox, queue_file, rate_limit};
use crate::pg::contained::contained;
use crate::pg::ereport::{log_line, tell};
use crate::pg::process::{connect, exists, handle_signals, start};
use crate::pg::{ffi, preload};
use crate::stat;

/// How long a worker without work stays connected. DROP DATABASE waits five seconds for others to leave.
const LINGER: Duration = Duration::from_millis(500);
/// How long a database waits for the next worker after one that did not get far.
const BACK_OFF: Duration = Duration::from_secs(1);
/// How often the launcher looks without being woken.
const LOOK: Duration = Duration::from_secs(5);
/// How often it looks for a slot, or for the kept worker, where a database waits for one.
const SLOT_LOOK: Duration = Duration::from_millis(50);

/// Registers the launcher and the worker that is kept ready; in the postmaster only.
pub fn register() {
    let process = |name: &str, kind: &str, function: &str, restart: Duration| {
        BackgroundWorkerBuilder::new(name)
            .set_type(kind)
            .set_library("pg_writeguard")
            .set_function(function)
            .enable_spi_access()
            .set_restart_time(Some(restart))
            .load();
    };
    process("pg_writeguard launcher", "pg_writeguard launcher", "writeguard_launcher_main", Duration::from_secs(1));
    // It ends with its database, and waits for the next one at once.
    process("pg_writeguard worker kept ready", "pg_writeguard worker", "writeguard_kept_main", Duration::ZERO);
}

fn serve_sighup() {
    if BackgroundWorker::sighup_received() {
        // SAFETY: in a background process, between transactions.
        unsafe { pg_sys::ProcessConfigFile(pg_sys::GucContext::PGC_SIGHUP) };
    }
}

fn alive(pid: i32) -> bool {
    // SAFETY: looks the process up in shared memory.
    unsafe { !pg_sys::BackendPidGetProc(pid).is_null() }
}

/// Waits for the latch, at most that long. A SIGTERM ends the process here, by core's `die`, and so does the end of the
/// postmaster: nobody may hold its shared memory after it.
fn wait(duration: Duration) {
    let milliseconds = core::ffi::c_long::try_from(duration.as_millis()).unwrap_or(core::ffi::c_long::MAX);
    // SAFETY: nothing but the raw call inside.
    if unsafe { ffi::protect(|| ffi::sleep_on_latch(milliseconds)) }.is_err() {
        // A cancel reached a process that has nothing to cancel; the next process continues where this one ends.
        // SAFETY: the normal end of a process that wants to be restarted.
        unsafe { pg_sys::proc_exit(1) };
    }
    serve_sighup();
}

/// The launcher's main function.
#[pg_guard]
#[unsafe(no_mangle)]
pub extern "C-unwind" fn writeguard_launcher_main(_argument: pg_sys::Datum) {
    handle_signals();
    // SAFETY: without a database only shared catalogs can be read.
    unsafe { pg_sys::BackgroundWorkerInitializeConnection(core::ptr::null(), core::ptr::null(), 0) };
    if !preload::is_attached() {
        let _told = tell(PgLogLevel::WARNING, NO_SHARED_MEMORY, Some(WHY_NO_SHARED_MEMORY), Some(LOAD_IT_LAST));
        return;
    }
    serve::become_launcher();
    queue_file::accepted();
    let mut pruners = Sender::new();
    let mut workers = Workers::default();
    let mut unserved = Vec::new();
    loop {
        serve::sweep(alive);
        rate_limit::flush_minutes_that_are_over();
        stat::store::write_every_minute(exists);
        let again = outbox::try_again();
        serve::unserved(alive, &mut unserved);
        let mut pause = LOOK.min(pruners.send()).min(again.unwrap_or(LOOK));
        for database in &unserved {
            pruners.know(*database);
            pause = pause.min(workers.send(*database));
        }
        workers.started.retain(|_, since| since.elapsed() < Duration::from_secs(60));
        wait(pause);
    }
}

/// The launcher's bookkeeping of the workers that it started.
#[derive(Default)]
struct Workers {
    /// When one was sent to a database last.
    started: HashMap<u32, Instant>,
    /// When the log said last that no slot was free.
    told: Option<Instant>,
}

impl Workers {
    /// Sends one to a database that has something to store. Gives how soon to look again.
    fn send(&mut self, database: pg_sys::Oid) -> Duration {
        if serve::take_done(database) {
            self.started.remove(&u32::from(database));
        }
        let before = self.started.get(&u32::from(database)).map(Instant::elapsed);
        if let Some(before) = before.filter(|before| *before < BACK_OFF) {
            // On its way, or failed at once.
            return BACK_OFF - before;
        }
        if before.is_some() && !exists(database) {
            let events = serve::forget(database);
            log_line(
                &format!(
                    "pg_writeguard: {} of dropped database {} in this log only",
                    counted(events as u64, "event"),
                    u32::from(database)
                ),
                None,
            );
            return LOOK;
        }
        if !start(database, c"pg_writeguard worker", c"writeguard_worker_main") {
            let sent = serve::send_kept(database);
            self.starved(sent);
            if !sent {
                return SLOT_LOOK;
            }
        }
        self.started.insert(u32::from(database), Instant::now());
        BACK_OFF
    }

    /// No slot is free for a worker; says so in the log once a minute. `kept`: the worker that is kept ready was sent.
    fn starved(&mut self, kept: bool) {
        if kept {
            serve::count_starved();
        }
        if self.told.is_none_or(|told| told.elapsed() >= Duration::from_secs(60)) {
            self.told = Some(Instant::now());
            let who = if kept { "; the one that is kept ready stores events alone" } else { "" };
            log_line(
                &format!(
                    "pg_writeguard: no background worker slot is free for storing events{who}; raise max_worker_processes"
                ),
                None,
            );
        }
    }
}

/// A worker's main function; its argument is the database.
#[pg_guard]
#[unsafe(no_mangle)]
pub extern "C-unwind" fn writeguard_worker_main(database: pg_sys::Datum) {
    connect(database);
    // SAFETY: the callback lives as long as the process.
    unsafe { pg_sys::before_shmem_exit(Some(leave), pg_sys::Datum::from(0)) };
    work(|| false);
}

/// The main function of the worker that is kept ready: it has a slot from the server's start, whoever takes all others.
/// Connected once it cannot change its database, so it ends with its work; as an end that asks for a restart, which keeps
/// the slot.
#[pg_guard]
#[unsafe(no_mangle)]
pub extern "C-unwind" fn writeguard_kept_main(_argument: pg_sys::Datum) {
    handle_signals();
    if !preload::is_attached() {
        // The launcher says why.
        return;
    }
    // SAFETY: the callback lives as long as the process.
    unsafe { pg_sys::before_shmem_exit(Some(leave), pg_sys::Datum::from(0)) };
    serve::become_kept();
    let database = loop {
        if let Some(database) = serve::kept_for() {
            break database;
        }
        wait(Duration::from_secs(60 * 60));
    };
    connect(pg_sys::Datum::from(database));
    work(serve::others_wait);
    // SAFETY: the normal end of a process that wants to be restarted.
    unsafe { pg_sys::proc_exit(1) };
}

/// Stores what is queued for the database that this process is connected to, and notifies, until there was nothing to do for
/// a moment; or until `is_needed` elsewhere.
fn work(is_needed: impl Fn() -> bool) {
    if !serve::serve(alive) {
        return;
    }
    recover();
    let (bytes, entries) = serve::capacity();
    let mut buffer = Vec::with_capacity(bytes);
    let mut taken = Vec::with_capacity(entries);
    let mut sender = outbox::Sender::new();
    let mut idle_since = Instant::now();
    loop {
        serve::take(&mut buffer, &mut taken);
        if !taken.is_empty() {
            if taken.iter().any(|one: &Taken| one.bytes.is_empty()) {
                sender.look_for_more();
            }
            if let Err(failed) = batch::store(&buffer, &taken, sender.stored()) {
                log_line(&format!("pg_writeguard: events wait that cannot be stored now: {}", failed.message), None);
                // The next worker tries again; nobody is in the way of others until then.
                return;
            }
            idle_since = Instant::now();
            if !sender.is_late() {
                continue;
            }
        }
        if sender.serve() {
            idle_since = Instant::now();
        } else if taken.is_empty() && idle_since.elapsed() < LINGER && !is_needed() {
            wait(LINGER.saturating_sub(idle_since.elapsed()));
        } else if taken.is_empty() {
            prune::expire();
            if serve::retire() {
                return;
            }
        }
    }
}

/// However the worker ends, its pid is taken out of shared memory, because another process may get it.
unsafe extern "C-unwind" fn leave(_code: c_int, _argument: pg_sys::Datum) {
    contained("a worker's end", serve::leave);
}

/// Settles what a killed predecessor left behind.
fn recover() {
    BackgroundWorker::transaction(|| {
        serve::recover(|transaction| {
            // SAFETY: reads the commit log; the transaction is from this server's present life.
            unsafe { pg_sys::TransactionIdDidCommit(pg_sys::TransactionId::from_inner(transaction as u32)) }
        });
    });
}

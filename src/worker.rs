//! The background processes: a launcher that is connected to no database, and for each database with something to
//! store a worker that stores it, notifies, lingers for a moment and leaves. Now and then it sends a pruner (see `pruner`).
//!
//! So nobody stands in the way of DROP DATABASE or of CREATE DATABASE from that template, and a worker that is killed
//! is replaced while its events still wait in the queue. Both die by core's own handler, which the postmaster takes
//! for a reason to restart them; neither runs on a standby.

use core::ffi::{CStr, c_int};
use std::collections::HashMap;
use std::time::{Duration, Instant};

use pgrx::bgworkers::{BackgroundWorker, BackgroundWorkerBuilder};
use pgrx::pg_sys::panic::CaughtError;
use pgrx::prelude::*;
use pgrx::spi::SpiClient;
use pgrx::{PgLogLevel, ereport};

use crate::event::record::Kind;
use crate::event::serve::{self, Taken};
use crate::event::{keep, prune, queue, store, throttle, totals};
use crate::process::{connect, exists, handle_signals, start};
use crate::pruner::Sender;
use crate::{ffi, stat};

/// How long a worker without work stays connected. DROP DATABASE waits five seconds for others to leave.
const LINGER: Duration = Duration::from_millis(500);
/// How long a database waits for the next worker after one that did not get far.
const BACK_OFF: Duration = Duration::from_secs(1);
/// How often the launcher looks without being woken.
const LOOK: Duration = Duration::from_secs(5);

/// Registers the launcher; in the postmaster only.
pub fn register() {
    BackgroundWorkerBuilder::new("pg_writeguard launcher")
        .set_type("pg_writeguard launcher")
        .set_library("pg_writeguard")
        .set_function("writeguard_launcher_main")
        .enable_spi_access()
        .set_restart_time(Some(Duration::from_secs(1)))
        .load();
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
        // Somebody cancelled a process that has nothing to cancel; the next one goes on where this one ends.
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
    serve::become_launcher();
    keep::accepted();
    let mut sender = Sender::new();
    let mut started: HashMap<u32, Instant> = HashMap::new();
    let mut unserved = Vec::new();
    loop {
        serve::sweep(alive);
        throttle::flush_minutes_that_are_over();
        stat::store::write_every_minute(exists);
        serve::unserved(alive, &mut unserved);
        let mut pause = LOOK.min(sender.send());
        for database in &unserved {
            sender.know(*database);
            let before = started.get(&u32::from(*database)).map(Instant::elapsed);
            match before {
                // Started a moment ago: on its way, or failed at once.
                Some(before) if before < BACK_OFF => pause = pause.min(BACK_OFF - before),
                _ => {
                    if before.is_some() && !exists(*database) {
                        let events = serve::forget(*database);
                        ereport!(
                            PgLogLevel::LOG,
                            PgSqlErrorCode::ERRCODE_SUCCESSFUL_COMPLETION,
                            format!(
                                "pg_writeguard: {events} events of dropped database {} are in this log only",
                                u32::from(*database)
                            )
                        );
                        continue;
                    }
                    started.insert(u32::from(*database), Instant::now());
                    start(*database, c"pg_writeguard worker", c"writeguard_worker_main");
                    pause = pause.min(BACK_OFF);
                }
            }
        }
        started.retain(|_, since| since.elapsed() < Duration::from_secs(60));
        wait(pause);
    }
}

/// A worker's main function; its argument is the database.
#[pg_guard]
#[unsafe(no_mangle)]
pub extern "C-unwind" fn writeguard_worker_main(database: pg_sys::Datum) {
    connect(database);
    if !serve::serve(alive) {
        return;
    }
    // SAFETY: the callback lives as long as the process.
    unsafe { pg_sys::before_shmem_exit(Some(leave), pg_sys::Datum::from(0)) };
    recover();
    let (bytes, entries) = serve::capacity();
    let mut buffer = Vec::with_capacity(bytes);
    let mut taken = Vec::with_capacity(entries);
    let mut idle_since = Instant::now();
    loop {
        serve::take(&mut buffer, &mut taken);
        if !taken.is_empty() {
            store_batch(&buffer, &taken);
            serve::done(&taken);
            idle_since = Instant::now();
        } else if idle_since.elapsed() < LINGER {
            wait(LINGER.saturating_sub(idle_since.elapsed()));
        } else {
            prune::expire();
            if serve::retire() {
                return;
            }
        }
    }
}

/// However the worker ends, nobody shall take another process with its number for it.
#[pg_guard]
unsafe extern "C-unwind" fn leave(_code: c_int, _argument: pg_sys::Datum) {
    serve::leave();
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

/// Stores a batch in one transaction: the events' common commit is what makes many refusals cheap.
fn store_batch(buffer: &[u8], taken: &[Taken]) {
    let sent = BackgroundWorker::transaction(|| {
        if !lock_tables() {
            // Dropped with its tables meanwhile; the server log has the events.
            taken.iter().filter(|one| !one.bytes.is_empty()).for_each(|_| queue::count_unqueued());
            return Vec::new();
        }
        Spi::connect_mut(|client| {
            for one in taken {
                let json = core::str::from_utf8(&buffer[one.bytes.clone()]).unwrap_or_default();
                // SAFETY: in a transaction, which gets its id if it has none yet.
                if json.is_empty() || !serve::claim(one, unsafe { pg_sys::GetTopFullTransactionId().value }) {
                    continue;
                }
                let stored = insert(client, json).or_else(|| {
                    // Somebody may have set the numbers ahead, or back.
                    must(client.update(REPAIR_NUMBERS, None, &[]).map(|_| ()));
                    insert(client, json)
                });
                let Some(id) = stored else {
                    ereport!(
                        PgLogLevel::WARNING,
                        PgSqlErrorCode::ERRCODE_DATA_EXCEPTION,
                        "pg_writeguard: an event cannot be stored and is in this log only",
                        json
                    );
                    queue::count_unqueued();
                    continue;
                };
                // SAFETY: the insert has given the transaction its id.
                let transaction = unsafe { pg_sys::GetTopFullTransactionIdIfAny().value };
                serve::storing(one, transaction, id);
                must(client.update(NOTIFY, None, &[id.into()]).map(|_| ()));
            }
            serve_outbox(client)
        })
    });
    for (kind, policy) in sent {
        totals::count(kind, policy.as_deref());
    }
}

/// Sends the notifications of events that were committed by others; gives the kinds and policies of these.
fn serve_outbox(client: &mut SpiClient<'_>) -> Vec<(Kind, Option<String>)> {
    let mut sent = Vec::new();
    must(client.update(SERVE_OUTBOX, None, &[]).and_then(|rows| {
        for row in rows {
            let kind = row.get::<String>(2)?.and_then(|word| Kind::of_word(&word));
            sent.extend(kind.zip(Some(row.get(3)?)));
        }
        Ok(())
    }));
    sent
}

/// Locks what a batch writes to, without ever waiting for one lock while it holds another: whoever drops the extension
/// takes these locks as well, in any order, and must not be the victim of a deadlock. For any other lock the batch does
/// not wait until a deadlock would be found: it fails, and the next worker tries again. False when there is no table of
/// events any more.
fn lock_tables() -> bool {
    const TABLES: [&CStr; 3] = [c"event", c"event_id_seq", c"outbox"];
    let mode = pg_sys::RowExclusiveLock as pg_sys::LOCKMODE;
    let find = || {
        // SAFETY: syscache look-ups.
        unsafe {
            let schema = pg_sys::get_namespace_oid(c"writeguard".as_ptr(), true);
            TABLES.map(|name| pg_sys::get_relname_relid(name.as_ptr(), schema))
        }
    };
    // SAFETY: plain settings of this process.
    unsafe { pg_sys::LockTimeout = 0 };
    loop {
        let tables = find();
        if tables[0] == pg_sys::InvalidOid {
            return false;
        }
        let there: Vec<pg_sys::Oid> = tables.into_iter().filter(|table| *table != pg_sys::InvalidOid).collect();
        // SAFETY: lock calls in a transaction; its end releases what is held.
        unsafe {
            let missed = there.iter().position(|table| !pg_sys::ConditionalLockRelationOid(*table, mode));
            let held = &there[..missed.unwrap_or(there.len())];
            // A lock makes renames and drops visible that were committed before.
            if missed.is_none() && find() == tables {
                pg_sys::LockTimeout = (pg_sys::DeadlockTimeout / 2).max(1);
                return true;
            }
            held.iter().for_each(|table| pg_sys::UnlockRelationOid(*table, mode));
            if let Some(missed) = missed {
                pg_sys::LockRelationOid(there[missed], mode);
                pg_sys::UnlockRelationOid(there[missed], mode);
            }
        }
    }
}

/// Inserts one event; none when the event itself is what cannot be stored. Anything else that goes wrong ends the
/// worker.
fn insert(client: &mut SpiClient<'_>, json: &str) -> Option<i64> {
    // SAFETY: the order of calls is that of core's own procedural languages around a block that catches errors.
    unsafe {
        let (context, owner) = (pg_sys::CurrentMemoryContext, pg_sys::CurrentResourceOwner);
        pg_sys::BeginInternalSubTransaction(core::ptr::null());
        let client = std::panic::AssertUnwindSafe(client);
        let inserted = PgTryBuilder::new(move || {
            let client = client;
            let rows = client.0.update(store::INSERT, None, &[json.into()]);
            rows.and_then(|rows| rows.first().get_one::<String>()).ok().flatten()
        })
        .catch_others(|error| if is_about_data(&error) { None } else { error.rethrow() })
        .execute();
        if inserted.is_some() {
            pg_sys::ReleaseCurrentSubTransaction();
        } else {
            pg_sys::RollbackAndReleaseCurrentSubTransaction();
        }
        pg_sys::CurrentMemoryContext = context;
        pg_sys::CurrentResourceOwner = owner;
        inserted.and_then(|id| id.parse().ok())
    }
}

/// Classes 22, 23 and 54: a value that does not fit, now or ever.
fn is_about_data(error: &CaughtError) -> bool {
    let (CaughtError::PostgresError(report)
    | CaughtError::ErrorReport(report)
    | CaughtError::RustPanic { ereport: report, .. }) = error;
    // Two characters of six bits each, as MAKE_SQLSTATE packs them.
    let class = |first: u8, second: u8| i32::from(first - b'0') | (i32::from(second - b'0') << 6);
    [class(b'2', b'2'), class(b'2', b'3'), class(b'5', b'4')].contains(&(report.sql_error_code() as i32 & 0xfff))
}

/// A statement of our own that fails ends the worker; its successor tries again.
fn must(result: Result<(), pgrx::spi::Error>) {
    if let Err(error) = result {
        ereport!(PgLogLevel::ERROR, PgSqlErrorCode::ERRCODE_INTERNAL_ERROR, format!("own statement failed: {error}"));
    }
}

/// Lets the events' numbers go on after the last one.
const REPAIR_NUMBERS: &str = "SELECT pg_catalog.setval('writeguard.event_id_seq', \
     (SELECT COALESCE(pg_catalog.max(e.id), 0) FROM writeguard.event AS e) OPERATOR(pg_catalog.+) 1, false)";

const NOTIFY: &str = "SELECT pg_catalog.pg_notify('writeguard', \
     pg_catalog.jsonb_build_object('id', e.id, 'kind', e.kind, 'policy', pg_catalog.left(e.policy, 500))::pg_catalog.text) \
     FROM writeguard.event AS e WHERE e.id OPERATOR(pg_catalog.=) $1";

/// Sends the notifications of events that were written in transactions of their own.
const SERVE_OUTBOX: &str = "WITH sent AS (DELETE FROM writeguard.outbox RETURNING event) \
     SELECT pg_catalog.pg_notify('writeguard', \
     pg_catalog.jsonb_build_object('id', e.id, 'kind', e.kind, 'policy', pg_catalog.left(e.policy, 500))::pg_catalog.text), \
     e.kind, e.policy \
     FROM sent JOIN writeguard.event AS e ON e.id OPERATOR(pg_catalog.=) sent.event ORDER BY e.id";

//! Stores what was taken from the queue, for the worker.
//!
//! All of it in one transaction: the common commit is what makes many refusals cheap. Where that fails, for whatever
//! reason, the batch is halved until the one event is found that the table does not take; that one is set aside, and the
//! others are stored. Errors that say nothing about an event (a lock, the disk, a table with other columns) leave all of them
//! in the queue.

use core::cell::Cell;

use pgrx::ereport;
use pgrx::pg_sys::BuiltinOid;
use pgrx::prelude::*;

use crate::event::serve::{self, Outcome, Taken};
use crate::event::{outbox, store};
use crate::pg::ereport::log_line;
use crate::pg::process::{self, Failed, attempt, must};
use crate::pg::{encoding, owner, stray};

/// Stores a batch. The events whose notification could not be left in the outbox are added to `unsent`.
///
/// # Errors
/// What keeps everything from being stored now; what is not stored is back in the queue.
pub fn store(buffer: &[u8], taken: &[Taken], unsent: &mut Vec<i64>) -> Result<(), Failed> {
    let stored = store_part(buffer, taken, unsent);
    if stored.is_err() {
        serve::put_back(taken);
    }
    stored
}

fn store_part(buffer: &[u8], taken: &[Taken], unsent: &mut Vec<i64>) -> Result<(), Failed> {
    let Err(failed) = store_together(buffer, taken, unsent) else { return Ok(()) };
    let failed = match failed {
        Refused::Now(failed) => return Err(failed),
        Refused::Events(failed) => failed,
    };
    if failed.is_about_numbers() {
        // Somebody may have set them ahead, or back.
        let repaired =
            attempt(|| Spi::connect_mut(|client| must(client.update(store::REPAIR_NUMBERS, None, &[])).len()));
        if repaired.is_ok() && store_together(buffer, taken, unsent).is_ok() {
            return Ok(());
        }
    }
    if let [one] = taken {
        set_aside(buffer, one, &failed);
        return Ok(());
    }
    let (first, second) = taken.split_at(taken.len() / 2);
    store_part(buffer, first, unsent)?;
    store_part(buffer, second, unsent)
}

/// Why a transaction stored nothing.
enum Refused {
    /// For a reason that has nothing to do with its events.
    Now(Failed),
    /// Perhaps for one of them.
    Events(Failed),
}

fn store_together(buffer: &[u8], taken: &[Taken], unsent: &mut Vec<i64>) -> Result<(), Refused> {
    let known = Cell::new(false);
    let attempted = attempt(|| {
        if !lock_tables() {
            return None;
        }
        // SAFETY: in a transaction, which gets its id if it has none yet.
        let transaction = unsafe { pg_sys::GetTopFullTransactionId().value };
        Some(owner::marked(|| {
            Spi::connect_mut(|client| {
                let insert = must(client.prepare_mut(store::INSERT, &[BuiltinOid::TEXTOID.into()]));
                known.set(true);
                let mut ids = Vec::with_capacity(taken.len());
                for one in taken {
                    let json = core::str::from_utf8(&buffer[one.bytes.clone()]).unwrap_or_default();
                    if json.is_empty() || !serve::claim(one, transaction) {
                        continue;
                    }
                    let id = client
                        .update(&insert, None, &[encoding::json_argument(json)])
                        .map(|rows| rows.first().get_one::<String>());
                    let Some(id) = must(id).ok().flatten().and_then(|id| id.parse().ok()) else {
                        ereport!(
                            ERROR,
                            PgSqlErrorCode::ERRCODE_TRIGGERED_ACTION_EXCEPTION,
                            "table writeguard.event did not take it"
                        );
                    };
                    serve::storing(one, transaction, id);
                    ids.push(id);
                }
                let left = ids.is_empty() || outbox::leave(client, &ids);
                if left { Vec::new() } else { ids }
            })
        }))
    });
    match attempted {
        Ok(Some(ids)) => {
            serve::done(taken, Outcome::Stored);
            unsent.extend(ids);
            Ok(())
        }
        Ok(None) => {
            serve::done(taken, Outcome::NoTable);
            Ok(())
        }
        Err(failed) => {
            serve::not_stored(taken);
            if failed.is_about_the_moment() || !known.get() {
                Err(Refused::Now(failed))
            } else {
                Err(Refused::Events(failed))
            }
        }
    }
}

/// The table does not take this event: it is written to the server log, and the session that waits for it is woken.
fn set_aside(buffer: &[u8], one: &Taken, failed: &Failed) {
    let message = format!("pg_writeguard: an event cannot be stored and is in this log only: {}", failed.message);
    log_line(&message, Some(&stray::from_unknown(&buffer[one.bytes.clone()])));
    serve::done(core::slice::from_ref(one), Outcome::SetAside);
}

/// Locks what a batch writes to. For any other lock the batch does not wait until a deadlock would be found: it fails, and the
/// next worker tries again. False when there is no table of events any more.
fn lock_tables() -> bool {
    let mode = pg_sys::RowExclusiveLock as pg_sys::LOCKMODE;
    // The worker that is kept ready may be all that other databases have.
    let patience = if serve::kept_for().is_some() { 300 } else { 0 };
    // SAFETY: plain settings of this process.
    unsafe { pg_sys::LockTimeout = patience };
    let locked = process::lock_own_tables([(c"event", mode), (c"event_id_seq", mode)]);
    // SAFETY: as above.
    unsafe { pg_sys::LockTimeout = (pg_sys::DeadlockTimeout / 2).max(1) };
    locked
}

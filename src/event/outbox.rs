//! The notifications, sent by the worker when the events are on disk: in transactions of their own, so that nothing that is
//! wrong with notifying keeps an event from being stored.
//!
//! What is to be sent is in `writeguard.outbox`: numbers of events. One that is positive was left by the transaction that wrote
//! the event itself, and is not counted in the totals yet; counted, it becomes negative, as are those of the worker. Where
//! sending fails (PostgreSQL's queue of notifications is full, say) it is tried again after longer and longer pauses, while
//! events are stored as before.

use core::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use pgrx::pg_sys::TimestampTz;
use pgrx::prelude::*;
use pgrx::spi::SpiClient;

use super::counters;
use super::memory::{self, Locked, MOST_WORKERS, Unsent};
use super::record::Kind;
use crate::pg::encoding;
use crate::pg::ereport::log_line;
use crate::pg::process::{self, Failed, attempt, in_subtransaction, must};

/// Notifications of one transaction.
const BATCH: usize = 1_000;
/// While events keep coming, they are notified no later than this.
const PATIENCE: Duration = Duration::from_millis(100);
/// The longest wait for a lock, in milliseconds; meanwhile events are not stored either.
const LOCK_TIMEOUT: i32 = 100;
/// Most seconds between two attempts where sending fails.
const LONGEST_PAUSE: u32 = 60;

const LEAVE: &str = "INSERT INTO writeguard.outbox (event) SELECT pg_catalog.unnest($1)";

/// Marks what transactions left as counted.
const SETTLE: &str = "WITH settled AS (UPDATE writeguard.outbox SET event = OPERATOR(pg_catalog.-) event \
       WHERE event OPERATOR(pg_catalog.>) 0 RETURNING event) \
     SELECT e.kind, e.policy FROM settled \
     JOIN writeguard.event AS e ON e.id OPERATOR(pg_catalog.=) (OPERATOR(pg_catalog.-) settled.event)";

/// Sends what is counted; a row for each number that is gone from the outbox, be its event still there or not.
const SEND: &str = "WITH sent AS (DELETE FROM writeguard.outbox WHERE ctid OPERATOR(pg_catalog.=) ANY (ARRAY( \
       SELECT o.ctid FROM writeguard.outbox AS o WHERE o.event OPERATOR(pg_catalog.<) 0 LIMIT $1)) RETURNING event) \
     SELECT CASE WHEN e.id IS NOT NULL THEN pg_catalog.pg_notify('writeguard', \
       pg_catalog.jsonb_build_object('id', e.id, 'kind', e.kind, 'policy', pg_catalog.left(e.policy, 500))::pg_catalog.text) END \
     FROM sent LEFT JOIN writeguard.event AS e ON e.id OPERATOR(pg_catalog.=) (OPERATOR(pg_catalog.-) sent.event) \
     ORDER BY e.id";

/// Sends those of some events.
const SEND_THESE: &str = "SELECT pg_catalog.pg_notify('writeguard', \
       pg_catalog.jsonb_build_object('id', e.id, 'kind', e.kind, 'policy', pg_catalog.left(e.policy, 500))::pg_catalog.text) \
     FROM writeguard.event AS e WHERE e.id OPERATOR(pg_catalog.=) ANY ($1) ORDER BY e.id";

/// PostgreSQL gives the room in its queue back when somebody writes to it, which a full one keeps everybody from: asked how
/// full it is, it does so too.
const MAKE_ROOM: &str = "SELECT pg_catalog.pg_notification_queue_usage()";

const IS_EMPTY: &str = "SELECT NOT EXISTS (SELECT FROM writeguard.outbox)";

/// Leaves the notifications of events that are being stored, as a part of the same transaction. False where that is not
/// possible; the events are stored all the same.
pub fn leave(client: &mut SpiClient<'_>, ids: &[i64]) -> bool {
    if !lock() {
        return false;
    }
    let counted: Vec<i64> = ids.iter().map(|id| -id).collect();
    in_subtransaction(|| must(client.update(LEAVE, None, &[counted.into()])).len()).is_ok()
}

/// Locks the outbox for this transaction, unless somebody else has it or it is not there.
fn lock() -> bool {
    let table = process::own_table(c"outbox");
    // SAFETY: a lock that is not waited for; the transaction's end releases it.
    table != pg_sys::InvalidOid
        && unsafe { pg_sys::ConditionalLockRelationOid(table, pg_sys::RowExclusiveLock as pg_sys::LOCKMODE) }
}

/// Locks the outbox and the events that it names. False where there is none.
fn lock_with_events() -> bool {
    let (reads, writes) = (pg_sys::AccessShareLock as pg_sys::LOCKMODE, pg_sys::RowExclusiveLock as pg_sys::LOCKMODE);
    process::lock_own_tables([(c"outbox", writes), (c"event", reads)])
}

/// What a worker has to send.
pub struct Sender {
    /// Transactions may have left something.
    settle: bool,
    send: bool,
    /// Events that are stored, but could not be left in the outbox.
    these: Vec<i64>,
    served: Instant,
}

impl Sender {
    /// Begins with what a predecessor left behind.
    pub fn new() -> Self {
        Self { settle: true, send: true, these: Vec::new(), served: Instant::now() }
    }

    /// A transaction has left something in the outbox.
    pub fn look_for_more(&mut self) {
        self.settle = true;
    }

    /// Events were stored; of those that could not be left in the outbox there will be more in the list.
    pub fn stored(&mut self) -> &mut Vec<i64> {
        self.send = true;
        &mut self.these
    }

    /// Whether there is something to do that cannot wait until nothing comes in any more.
    pub fn is_late(&self) -> bool {
        (self.settle || self.send) && self.served.elapsed() >= PATIENCE
    }

    /// Counts and sends. False when there was nothing to do, or it is not the time for it.
    pub fn serve(&mut self) -> bool {
        self.served = Instant::now();
        let mut served = false;
        if core::mem::take(&mut self.settle) {
            match attempt(settle) {
                Ok(counted) => {
                    counted.iter().for_each(|(kind, policy)| counters::count(*kind, policy.as_deref()));
                    self.send |= !counted.is_empty();
                }
                Err(failed) => failed_to_send(&failed),
            }
            served = true;
        }
        if self.send && may_try() {
            let these = core::mem::take(&mut self.these);
            match attempt(|| send(&these)) {
                Ok(sent) => {
                    self.send = sent == BATCH;
                    succeeded();
                }
                Err(failed) => {
                    self.send = false;
                    failed_to_send(&failed);
                }
            }
            served = true;
        }
        served
    }
}

fn settle() -> Vec<(Kind, Option<String>)> {
    be_brief();
    if !lock_with_events() {
        return Vec::new();
    }
    Spi::connect_mut(|client| {
        let rows = must(client.update(SETTLE, None, &[]));
        let counted = rows.filter_map(|row| {
            let kind = must(row.get::<String>(1)).and_then(|word| Kind::of_word(&word))?;
            Some((kind, must(row.get::<encoding::Text>(2)).map(|policy| policy.0)))
        });
        counted.collect()
    })
}

fn send(these: &[i64]) -> usize {
    be_brief();
    let there = lock_with_events();
    let failed_before = unsent().is_some();
    Spi::connect_mut(|client| {
        if failed_before {
            must(client.update(MAKE_ROOM, None, &[]));
        }
        if !these.is_empty() {
            must(client.update(SEND_THESE, None, &[these.to_vec().into()]));
        }
        if there { must(client.update(SEND, None, &[(BATCH as i64).into()])).len() } else { 0 }
    })
}

/// This transaction waits neither long for a lock nor for the disk: after a crash what it sent is sent again.
fn be_brief() {
    // SAFETY: settings of this process; that of the commit lasts for the transaction.
    unsafe {
        pg_sys::LockTimeout = LOCK_TIMEOUT;
        pg_sys::set_config_option(
            c"synchronous_commit".as_ptr(),
            c"off".as_ptr(),
            pg_sys::GucContext::PGC_USERSET,
            pg_sys::GucSource::PGC_S_SESSION,
            pg_sys::GucAction::GUC_ACTION_LOCAL,
            true,
            0,
            false,
        );
    }
}

/// Whether the outbox of this database has something to send; for the pruner, because after a restart nobody else looks.
pub fn is_empty() -> bool {
    let looked = attempt(|| {
        if !lock() {
            return true;
        }
        Spi::connect(|client| must(client.select(IS_EMPTY, None, &[]).and_then(|rows| rows.first().get_one::<bool>())))
            .unwrap_or(true)
    });
    looked.unwrap_or(true)
}

fn now() -> TimestampTz {
    // SAFETY: reads the clock.
    unsafe { pg_sys::GetCurrentTimestamp() }
}

fn database() -> pg_sys::Oid {
    // SAFETY: a static of this process.
    unsafe { pg_sys::MyDatabaseId }
}

/// What is known of this database's failures to send.
fn unsent() -> Option<Unsent> {
    let queue = Locked::lock()?;
    queue.header().unsent.iter().copied().find(|unsent| unsent.database == database())
}

/// Since when notifications of this database could not be sent.
pub fn unsent_since() -> Option<TimestampTz> {
    unsent().map(|unsent| unsent.since)
}

fn may_try() -> bool {
    unsent().is_none_or(|unsent| unsent.next <= now())
}

fn succeeded() {
    let Some(mut queue) = Locked::lock() else { return };
    let own = queue.header_mut().unsent.iter_mut().filter(|unsent| unsent.database == database());
    own.for_each(|unsent| unsent.database = pg_sys::InvalidOid);
}

/// Notes that sending failed, and when it is tried again; the log has it the first time, and then once a minute.
fn failed_to_send(failed: &Failed) {
    let (now, database) = (now(), database());
    if let Some(counters) = memory::counters_of() {
        counters.unsent_attempts.fetch_add(1, Ordering::Relaxed);
    }
    let attempts = Locked::lock().map_or(1, |mut queue| {
        let places = &mut queue.header_mut().unsent;
        let known = places.iter().position(|unsent| unsent.database == database);
        let Some(at) = known.or_else(|| places.iter().position(|unsent| unsent.database == pg_sys::InvalidOid)) else {
            return 1;
        };
        let attempts = if known.is_some() { places[at].attempts.saturating_add(1) } else { 1 };
        let since = if known.is_some() { places[at].since } else { now };
        let next = now + i64::from(pause(attempts)) * 1_000_000;
        places[at] = Unsent { database, since, attempts, next };
        attempts
    });
    if attempts == 1 || pause(attempts) == LONGEST_PAUSE {
        log_line(
            &format!(
                "pg_writeguard: events are stored, but their notifications cannot be sent now: {}",
                failed.message
            ),
            None,
        );
    }
}

/// Seconds from an attempt that failed to the next one.
fn pause(attempts: u32) -> u32 {
    1_u32.checked_shl(attempts.saturating_sub(1)).unwrap_or(LONGEST_PAUSE).min(LONGEST_PAUSE)
}

/// Has workers sent to databases for which it is time to try again; for the launcher. Gives how long until the next one.
pub fn try_again() -> Option<Duration> {
    let now = now();
    let mut queue = Locked::lock()?;
    let mut wait: Option<i64> = None;
    for place in 0..MOST_WORKERS {
        let unsent = queue.header().unsent[place];
        if unsent.database == pg_sys::InvalidOid {
            continue;
        }
        if unsent.next > now {
            let left = unsent.next - now;
            wait = Some(wait.map_or(left, |wait| wait.min(left)));
        } else if !queue.has(unsent.database) && !queue.serves(unsent.database) {
            // An entry without bytes is no event, and has a worker sent.
            queue.add(unsent.database, &[]);
        }
    }
    wait.map(|microseconds| Duration::from_micros(microseconds.unsigned_abs()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attempts_become_rare_and_never_end() {
        assert_eq!([1, 2, 3, 6, 7, 8, 40, u32::MAX].map(pause), [1, 2, 4, 32, 60, 60, 60, 60]);
    }
}

//! Retention: deletes what is over and older than the settings say.
//!
//! In short transactions of a bounded number of rows, under locks that are taken at once or not at all: nobody ever waits
//! for more than one batch, and a lock that somebody holds ends the visit.

use core::ffi::CStr;
use std::time::{Duration, Instant};

use pgrx::bgworkers::BackgroundWorker;
use pgrx::{PgSqlErrorCode, Spi, ereport, pg_sys};

use crate::event::memory::Visit;
use crate::event::{outbox, queue};
use crate::pg::ereport::log_line;
use crate::session::settings;

/// Rows of one transaction.
const BATCH: i32 = 1_000;
/// How long one visit works, so that DROP DATABASE and CREATE DATABASE from that template need not wait longer.
const LONGEST_VISIT: Duration = Duration::from_millis(500);

/// One thing to be tidied up: $1 is the number of rows of a batch.
struct Chore {
    /// What the log says that was deleted; nothing where it is not worth a line.
    what: Option<&'static str>,
    /// All tables that it writes.
    tables: &'static [&'static CStr],
    /// Whether $2 is the retention in seconds, and nothing is done without one.
    retained: bool,
    sql: &'static str,
}

/// Notes what expired: it stays so, whatever becomes of the clock.
const EXPIRE: Chore = Chore {
    what: None,
    tables: &[c"request"],
    retained: false,
    sql: "UPDATE writeguard.request SET state = 'expired' WHERE id OPERATOR(pg_catalog.=) ANY (ARRAY( \
          SELECT r.id FROM writeguard.request AS r WHERE r.state IN ('pending', 'approved') \
            AND r.expires_at OPERATOR(pg_catalog.<=) pg_catalog.clock_timestamp() \
          ORDER BY r.id LIMIT $1 FOR UPDATE SKIP LOCKED))",
};

/// In this order. A chore whose tables are not there is left out.
const CHORES: [Chore; 6] = [
    EXPIRE,
    Chore {
        what: Some("kept rows"),
        tables: &[c"change_statement", c"image"],
        retained: false,
        sql: "DELETE FROM writeguard.image WHERE (change, number) IN ( \
              SELECT i.change, i.number FROM writeguard.change_statement AS s \
                JOIN writeguard.image AS i ON i.change OPERATOR(pg_catalog.=) s.id \
              WHERE s.kept_until OPERATOR(pg_catalog.<) pg_catalog.clock_timestamp() LIMIT $1)",
    },
    Chore {
        what: None,
        tables: &[c"change_statement", c"change_relation", c"image"],
        retained: false,
        sql: "WITH over AS MATERIALIZED ( \
                SELECT s.id FROM writeguard.change_statement AS s \
                WHERE s.kept_until OPERATOR(pg_catalog.<) pg_catalog.clock_timestamp() AND NOT EXISTS ( \
                  SELECT FROM writeguard.image AS i WHERE i.change OPERATOR(pg_catalog.=) s.id) LIMIT $1), \
              relations AS (DELETE FROM writeguard.change_relation WHERE change OPERATOR(pg_catalog.=) ANY (ARRAY( \
                SELECT id FROM over))) \
              DELETE FROM writeguard.change_statement WHERE id OPERATOR(pg_catalog.=) ANY (ARRAY(SELECT id FROM over))",
    },
    Chore {
        what: Some("requests"),
        tables: &[c"request", c"approval"],
        retained: true,
        sql: "DELETE FROM writeguard.request WHERE id OPERATOR(pg_catalog.=) ANY (ARRAY( \
              SELECT r.id FROM writeguard.request AS r WHERE r.state NOT IN ('pending', 'approved') \
                AND CASE r.state WHEN 'spent' THEN r.spent_at WHEN 'expired' THEN r.expires_at ELSE r.decided_at END \
                  OPERATOR(pg_catalog.<) (pg_catalog.clock_timestamp() \
                    OPERATOR(pg_catalog.-) pg_catalog.make_interval(secs => $2)) \
              ORDER BY r.id LIMIT $1 FOR UPDATE SKIP LOCKED))",
    },
    Chore {
        what: Some("events"),
        tables: &[c"event"],
        retained: true,
        sql: "DELETE FROM writeguard.event WHERE id OPERATOR(pg_catalog.=) ANY (ARRAY( \
              SELECT e.id FROM writeguard.event AS e WHERE e.occurred_at OPERATOR(pg_catalog.<) \
                (pg_catalog.clock_timestamp() OPERATOR(pg_catalog.-) pg_catalog.make_interval(secs => $2)) \
              ORDER BY e.occurred_at LIMIT $1))",
    },
    // A day more than they are good, so that a clock that is set back revives none.
    Chore {
        what: None,
        tables: &[c"used_jti"],
        retained: false,
        sql: "DELETE FROM writeguard.used_jti WHERE (key, jti) IN ( \
              SELECT u.key, u.jti FROM writeguard.used_jti AS u WHERE u.expires_at OPERATOR(pg_catalog.<) \
                (pg_catalog.clock_timestamp() OPERATOR(pg_catalog.-) '1 day'::pg_catalog.interval) \
              ORDER BY u.expires_at LIMIT $1)",
    },
];

/// What became of one batch.
enum Batch {
    Rows(u64),
    /// Somebody holds a lock, or the tables are not there.
    NotNow,
    NotThere,
}

/// Notes which requests have expired, in the database that this process is connected to. For the worker, before it leaves:
/// it may have stored that a token was refused for that.
pub fn expire() {
    run(&EXPIRE, 0);
}

/// Tidies up the database that this process is connected to.
pub fn visit() -> Visit {
    let begun = Instant::now();
    let retention = settings::event_retention();
    let mut deleted = Vec::new();
    let mut visit = Visit::Done;
    'chores: for chore in CHORES.iter().filter(|chore| !chore.retained || retention.is_some()) {
        let mut rows = 0;
        loop {
            if begun.elapsed() >= LONGEST_VISIT {
                visit = Visit::More;
            }
            let batch = if visit == Visit::More { Batch::NotNow } else { run(chore, retention.unwrap_or(0)) };
            match batch {
                Batch::Rows(done) => {
                    rows += done;
                    if done < u64::from(BATCH.unsigned_abs()) {
                        break;
                    }
                }
                Batch::NotNow => break,
                Batch::NotThere => {
                    visit = if is_installed() { visit } else { Visit::NotInstalled };
                    break;
                }
            }
        }
        if let (Some(what), 1..) = (chore.what, rows) {
            deleted.push(format!("{rows} {what}"));
        }
        if visit != Visit::Done {
            break 'chores;
        }
    }
    if visit != Visit::NotInstalled && !outbox::is_empty() {
        queue::push(&[], false);
    }
    if !deleted.is_empty() {
        let what = deleted.join(" and ");
        log_line(&format!("pg_writeguard: deleted {what} whose time was over"), None);
    }
    visit
}

fn schema() -> pg_sys::Oid {
    // SAFETY: a syscache look-up that gives InvalidOid for what is not there.
    unsafe { pg_sys::get_namespace_oid(c"writeguard".as_ptr(), true) }
}

fn is_installed() -> bool {
    BackgroundWorker::transaction(|| {
        // SAFETY: as above.
        unsafe { pg_sys::get_extension_oid(c"pg_writeguard".as_ptr(), true) != pg_sys::InvalidOid }
    })
}

/// One batch in one transaction.
fn run(chore: &Chore, retention: i32) -> Batch {
    BackgroundWorker::transaction(|| {
        let mode = pg_sys::RowExclusiveLock as pg_sys::LOCKMODE;
        // SAFETY: look-ups, and locks that are not waited for; the transaction's end releases them. A lock makes drops
        // visible that were committed before.
        unsafe {
            let find = |name: &&CStr| pg_sys::get_relname_relid(name.as_ptr(), schema());
            for table in chore.tables {
                let relation = find(table);
                if relation == pg_sys::InvalidOid {
                    return Batch::NotThere;
                }
                if !pg_sys::ConditionalLockRelationOid(relation, mode) || find(table) != relation {
                    return Batch::NotNow;
                }
            }
            // Indexes and the like are locked by whoever holds the table's lock only; just in case.
            pg_sys::LockTimeout = (pg_sys::DeadlockTimeout / 2).max(1);
        }
        let done = Spi::connect_mut(|client| {
            let arguments = [BATCH.into(), retention.into()];
            let arguments = if chore.retained { &arguments[..] } else { &arguments[..1] };
            client.update(chore.sql, None, arguments).map(|table| table.len())
        });
        match done {
            Ok(rows) => Batch::Rows(rows as u64),
            Err(error) => {
                ereport!(ERROR, PgSqlErrorCode::ERRCODE_INTERNAL_ERROR, format!("own statement failed: {error}"));
            }
        }
    })
}

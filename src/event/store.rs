//! Events that belong to a transaction: written inside it, so that they exist exactly when it commits.
//!
//! Their notification is left in `writeguard.outbox` and sent by the worker: a transaction that has notified could not
//! be prepared any more.

use pgrx::pg_sys;
use rules::error::Error;

use super::queue;
use super::record::Event;
use crate::pg::backend_local::BackendCell;
use crate::pg::contained::contained;
use crate::pg::owner;

/// Inserts one event given as JSON, and gives its id.
pub const INSERT: &str = "INSERT INTO writeguard.event \
     (occurred_at, kind, policy, mode, login, role, application, client, pid, xid, operation, relation, scope, \
      row_limit, rows, rows_estimated, statement, query_id, approval, reason) \
     SELECT occurred_at, kind, policy, mode, login, role, application, client, pid, xid, operation, relation, scope, \
      row_limit, rows, rows_estimated, statement, query_id, approval, reason \
     FROM pg_catalog.jsonb_populate_record(NULL::writeguard.event, $1::pg_catalog.jsonb) \
     RETURNING id::pg_catalog.text";

/// The end of [`INSERT`] where a number that is taken already is no error.
const UNLESS_TAKEN: &str = "ON CONFLICT (id) DO NOTHING RETURNING id::pg_catalog.text";

/// Sets the sequence of events' numbers behind the last one. A restore brings events first and sets the numbers last, and anybody
/// who owns them may set them back.
pub const REPAIR_NUMBERS: &str = "SELECT pg_catalog.setval('writeguard.event_id_seq', \
     (SELECT COALESCE(pg_catalog.max(e.id), 0) FROM writeguard.event AS e) OPERATOR(pg_catalog.+) 1, false)::pg_catalog.text";

/// The same where the next number is taken already.
const REPAIR_WHERE_BEHIND: &str = "SELECT pg_catalog.setval('writeguard.event_id_seq', \
     last.id OPERATOR(pg_catalog.+) 1, false)::pg_catalog.text \
     FROM writeguard.event_id_seq AS s, (SELECT pg_catalog.max(e.id) AS id FROM writeguard.event AS e) AS last \
     WHERE s.last_value OPERATOR(pg_catalog.<) last.id \
        OR s.last_value OPERATOR(pg_catalog.=) last.id AND NOT s.is_called";

const OUTBOX: &str = "INSERT INTO writeguard.outbox (event) VALUES ($1::pg_catalog.int8)";

/// Whether this transaction left something in the outbox.
static WROTE: BackendCell<bool> = BackendCell::new(false);

/// Writes an event into the running transaction and into the server log; gives its id.
///
/// # Errors
/// WG008 when the extension's tables are missing.
pub fn insert(event: &Event) -> Result<i64, Error> {
    event.log();
    let id = owner::connect(|client| {
        let insert = INSERT.replace("RETURNING id::pg_catalog.text", UNLESS_TAKEN);
        let json = event.stored_json();
        let mut ids = owner::rows(client, &insert, &[owner::json(&json)])?;
        if ids.is_empty() {
            owner::rows(client, REPAIR_NUMBERS, &[])?;
            ids = owner::rows(client, INSERT, &[owner::json(&json)])?;
        }
        let id = ids.first().cloned().unwrap_or_default();
        owner::rows(client, OUTBOX, &[id.as_str().into()])?;
        Ok(id)
    })?;
    WROTE.set(true);
    Ok(id.parse().unwrap_or_default())
}

/// Inserts events given as a JSON array, in its order.
const INSERT_ALL: &str = "WITH stored AS (INSERT INTO writeguard.event \
     (occurred_at, kind, policy, mode, login, role, application, client, pid, xid, operation, relation, scope, \
      row_limit, rows, rows_estimated, statement, query_id, approval, reason) \
     SELECT occurred_at, kind, policy, mode, login, role, application, client, pid, xid, operation, relation, scope, \
      row_limit, rows, rows_estimated, statement, query_id, approval, reason \
     FROM pg_catalog.jsonb_populate_recordset(NULL::writeguard.event, $1::pg_catalog.jsonb) \
     RETURNING id) \
     INSERT INTO writeguard.outbox (event) SELECT stored.id FROM stored";

/// Writes events into the running transaction and into the server log; all with one statement.
///
/// # Errors
/// WG008 when the extension's tables are missing.
pub fn insert_all(events: &[Event]) -> Result<(), Error> {
    if events.is_empty() {
        return Ok(());
    }
    events.iter().for_each(Event::log);
    let json: Vec<String> = events.iter().map(Event::stored_json).collect();
    owner::connect(|client| {
        owner::rows(client, REPAIR_WHERE_BEHIND, &[])?;
        owner::rows(client, INSERT_ALL, &[owner::json(&format!("[{}]", json.join(",")))])
    })?;
    WROTE.set(true);
    Ok(())
}

/// Runs what inserts events at the end of a transaction, when no portal is active any more: our SQL has to bring its
/// snapshot along. What the transaction wrote it may record, also when it was made read-only since.
///
/// # Errors
/// Those of `body`; the transaction's abort then cleans up.
pub fn at_the_end<T>(body: impl FnOnce() -> Result<T, Error>) -> Result<T, Error> {
    /// Whether the transaction was read-only, while it may write.
    struct MayWrite(bool);

    impl Drop for MayWrite {
        fn drop(&mut self) {
            // SAFETY: the transaction's own setting.
            unsafe { pg_sys::XactReadOnly = self.0 };
        }
    }

    // SAFETY: pushed and popped in pairs, unless the transaction aborts.
    unsafe {
        pg_sys::PushActiveSnapshot(pg_sys::GetTransactionSnapshot());
        let may_write = MayWrite(pg_sys::XactReadOnly);
        pg_sys::XactReadOnly = false;
        let result = body()?;
        drop(may_write);
        pg_sys::PopActiveSnapshot();
        Ok(result)
    }
}

/// The transaction is over: if it committed events, the worker is to send their notifications.
pub fn end_transaction(committed: bool) {
    if WROTE.replace(false) && committed {
        wake_worker();
    }
}

#[cold]
#[inline(never)]
fn wake_worker() {
    contained("waking the worker", || _ = queue::push(&[], false));
}

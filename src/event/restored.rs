//! A restore and the numbers of events.
//!
//! It makes the extension, and then brings the tables' rows in an order of its own, or several at a time. The policies that
//! it brings are an event already, of the new database, and that may be stored before the COPY of the events comes, which
//! bring their numbers along. So whoever writes events past us has the table for itself until the end of the transaction,
//! and what the policies left at the end of it makes room: it gets the next numbers afterwards.

use pgrx::pg_sys;

use super::store;
use crate::pg::function::{Arguments, Returns, sql_function};
use crate::pg::{ffi, owner, process};

sql_function!(
    /// Trigger on the event table, before and after each INSERT: events of new policies make room for those that have
    /// numbers.
    writeguard_event_restored, pg_finfo_writeguard_event_restored, event_restored
);

/// Puts the youngest events aside, as far as they are of policies that were written past us; negative numbers nobody has.
const PUT_ASIDE: &str = "WITH aside AS (DELETE FROM writeguard.event AS e \
       WHERE e.kind OPERATOR(pg_catalog.=) 'policy_changed' AND e.relation OPERATOR(pg_catalog.=) 'writeguard.policy' \
         AND e.operation OPERATOR(pg_catalog.=) 'insert' AND e.id OPERATOR(pg_catalog.>) ( \
           SELECT COALESCE(pg_catalog.max(o.id), 0) FROM writeguard.event AS o \
           WHERE (o.kind OPERATOR(pg_catalog.=) 'policy_changed' AND o.relation OPERATOR(pg_catalog.=) 'writeguard.policy' \
                  AND o.operation OPERATOR(pg_catalog.=) 'insert') IS NOT TRUE) \
       RETURNING *) \
     INSERT INTO writeguard.event \
     (id, occurred_at, kind, policy, mode, login, role, application, client, pid, xid, operation, relation, scope, \
      row_limit, rows, rows_estimated, statement, query_id, approval, reason) OVERRIDING SYSTEM VALUE \
     SELECT OPERATOR(pg_catalog.-) id, occurred_at, kind, policy, mode, login, role, application, client, pid, xid, \
      operation, relation, scope, row_limit, rows, rows_estimated, statement, query_id, approval, reason FROM aside";

const IS_ASIDE: &str =
    "SELECT 'aside' WHERE EXISTS (SELECT FROM writeguard.event AS e WHERE e.id OPERATOR(pg_catalog.<) 0)";
const PUT_BACK: &str = "UPDATE writeguard.event SET id = DEFAULT WHERE id OPERATOR(pg_catalog.<) 0";

#[expect(ffi_unwind_calls, reason = "inside protect")]
fn event_restored(arguments: &Arguments) -> Returns {
    // A trigger's result is a pointer, not an SQL NULL.
    let done = Ok(Some(pg_sys::Datum::from(0)));
    let Some(trigger) = arguments.trigger() else { return done };
    // SAFETY: the trigger's own table is open.
    let (table, is_before) = unsafe {
        let timing = (*trigger).tg_event & pg_sys::TRIGGER_EVENT_TIMINGMASK;
        ((*(*trigger).tg_relation).rd_id, timing == pg_sys::TRIGGER_EVENT_BEFORE)
    };
    if owner::is_own_write() || table != process::own_table(c"event") {
        return done;
    }
    if is_before {
        // SAFETY: a lock that the end of the transaction releases.
        unsafe { ffi::protect(|| ffi::LockRelationOid(table, pg_sys::ShareRowExclusiveLock as pg_sys::LOCKMODE)) }?;
        owner::connect(|client| owner::rows(client, PUT_ASIDE, &[]))?;
    } else {
        owner::connect(|client| {
            if !owner::rows(client, IS_ASIDE, &[])?.is_empty() {
                owner::rows(client, store::REPAIR_NUMBERS, &[])?;
                owner::rows(client, PUT_BACK, &[])?;
            }
            Ok(())
        })?;
    }
    done
}

//! The extension's own tables, when their rows vanish by DDL: DROP EXTENSION, DROP SCHEMA … CASCADE, DROP OWNED, TRUNCATE.
//! Nobody is kept from it who may do it, but who it was and what went is an event; where the table of events went as
//! well, a line in the server log.

use pgrx::pg_sys;
use rules::error::Error;
use rules::words::Operation;

use super::live_rows;
use crate::event::at_commit::record_at_commit;
use crate::event::record::{Event, Kind};
use crate::pg::ereport::Failure;
use crate::pg::{encoding, ffi};
use crate::session::statement;

/// Those whose rows people miss, and what these are.
const TABLES: [(&str, &str); 4] =
    [("policy", "policies"), ("event", "events"), ("image", "kept rows"), ("request", "requests")];

/// Rows of one of these tables, which a command is about to make vanish.
pub struct Gone {
    /// Its place among [`TABLES`].
    table: usize,
    rows: u64,
    operation: Operation,
}

/// Which of these tables it is, if any.
fn own(relation: pg_sys::Oid) -> Option<usize> {
    // SAFETY: syscache look-ups that give InvalidOid or NULL for what is not there.
    unsafe {
        let schema = pg_sys::get_namespace_oid(c"writeguard".as_ptr(), true);
        if schema == pg_sys::InvalidOid
            || pg_sys::get_rel_namespace(relation) != schema
            || pg_sys::get_extension_oid(c"pg_writeguard".as_ptr(), true) == pg_sys::InvalidOid
        {
            return None;
        }
        let name = encoding::from_c(pg_sys::get_rel_name(relation))?;
        TABLES.iter().position(|(table, _)| *table == name)
    }
}

/// A table is about to be dropped; the command has locked it.
pub fn dropped(relation: pg_sys::Oid) -> Result<Option<Gone>, Failure> {
    let Some(table) = own(relation) else { return Ok(None) };
    // SAFETY: locked by the command.
    let rows = unsafe { live_rows::count(relation) }?;
    Ok(Some(Gone { table, rows, operation: Operation::Drop }))
}

/// A table is about to be truncated; its lock is taken here, for those who may truncate it at all.
#[expect(ffi_unwind_calls, reason = "inside protect")]
pub fn truncated(relation: pg_sys::Oid) -> Result<Option<Gone>, Failure> {
    let Some(table) = own(relation) else { return Ok(None) };
    // SAFETY: a catalog look-up, and the lock that the command takes next.
    unsafe {
        let privilege = pg_sys::ACL_TRUNCATE as pg_sys::AclMode;
        if pg_sys::pg_class_aclcheck(relation, pg_sys::GetUserId(), privilege) != pg_sys::AclResult::ACLCHECK_OK {
            return Ok(None);
        }
        ffi::protect(|| ffi::LockRelationOid(relation, pg_sys::AccessExclusiveLock as pg_sys::LOCKMODE))?;
        Ok(Some(Gone { table, rows: live_rows::count(relation)?, operation: Operation::Truncate }))
    }
}

/// The command is done: what went is told when it commits.
///
/// # Errors
/// WG008 where the transaction is being prepared and the event cannot be written.
pub fn record(gone: &[Gone]) -> Result<(), Error> {
    let Some(first) = gone.first() else { return Ok(()) };
    let serial = statement::current();
    let rows = |table| gone.iter().filter(|gone| gone.table == table).map(|gone| gone.rows).sum::<u64>();
    let told = |table: &usize| first.operation == Operation::Drop || gone.iter().any(|gone| gone.table == *table);
    let numbers: Vec<String> =
        (0..TABLES.len()).filter(told).map(|table| format!("{} {}", TABLES[table].1, rows(table))).collect();
    let mut event = Event::new(Kind::PolicyChanged);
    event.operation = Some(first.operation.word().into());
    event.relation = Some(format!("writeguard.{}", TABLES[first.table].0));
    event.rows = Some(gone.iter().map(|gone| gone.rows).sum());
    event.reason = Some(format!("The extension's own tables lost rows: {}.", numbers.join(", ")));
    record_at_commit(event, serial, &statement::excerpt())
}

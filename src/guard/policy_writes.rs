//! Writes to the policy table past our functions: by its owner, a superuser, or the COPY of a restore.
//!
//! A trigger sees each row. What our own functions write they record themselves; any other change is an event when it
//! commits, and of many by one statement the rest is a number.

use core::ffi::c_char;
use core::ptr;

use pgrx::pg_sys;
use serde_json::{Map, Value};

use crate::event::at_commit::record_at_commit;
use crate::event::record::{Event, Kind};
use crate::pg::ffi::{self, PgError};
use crate::pg::function::{Arguments, Returns, sql_function};
use crate::pg::{encoding, owner};
use crate::policy::table::{self, Place};
use crate::session::statement;
use rules::error::Error;
use rules::words::shortened;

sql_function!(
    /// Trigger on each row of the policy table: an event for a change that none of our functions made.
    writeguard_policy_written, pg_finfo_writeguard_policy_written, policy_written
);

/// Bytes that an event has of a policy: a transaction keeps many of them until it commits.
const MOST_TOLD: usize = 16 * 1024;

fn policy_written(arguments: &Arguments) -> Returns {
    // A trigger's result is a pointer, not an SQL NULL.
    let done = Ok(Some(pg_sys::Datum::from(0)));
    let Some(trigger) = arguments.trigger() else { return done };
    // SAFETY: a row trigger's call has the table, which is open, and the rows that its event says.
    unsafe {
        let table = (*trigger).tg_relation;
        let by_row = (*trigger).tg_event & pg_sys::TRIGGER_EVENT_ROW != 0;
        if !by_row || table::find() != Place::Table((*table).rd_id) {
            return done;
        }
        if ffi::IsLogicalWorker() {
            // What is applied fires no triggers for statements, but sessions have to read policies again.
            pg_sys::CacheInvalidateRelcacheByRelid((*table).rd_id);
        }
        if owner::is_own_write() {
            return done;
        }
        let (row, changed) = ((*trigger).tg_trigtuple, (*trigger).tg_newtuple);
        let (operation, before, after) = match (*trigger).tg_event & pg_sys::TRIGGER_EVENT_OPMASK {
            pg_sys::TRIGGER_EVENT_INSERT => ("insert", None, Some(columns(table, row)?)),
            pg_sys::TRIGGER_EVENT_DELETE => ("delete", Some(columns(table, row)?), None),
            _ => ("update", Some(columns(table, row)?), Some(columns(table, changed)?)),
        };
        if before != after {
            record(operation, before.as_ref(), after.as_ref())?;
        }
    }
    done
}

/// A row's columns, as JSON has them.
#[expect(ffi_unwind_calls, reason = "inside protect")]
unsafe fn columns(table: pg_sys::Relation, row: pg_sys::HeapTuple) -> Result<Map<String, Value>, PgError> {
    let mut printed: *mut c_char = ptr::null_mut();
    // SAFETY: the caller's promise: a row of the table; nothing but raw calls inside.
    let text = unsafe {
        ffi::protect(|| {
            let row = ffi::heap_copy_tuple_as_datum(row, (*table).rd_att);
            let function = pg_sys::Oid::from_u32(pg_sys::F_ROW_TO_JSON_RECORD);
            let json = ffi::OidFunctionCall1Coll(function, pg_sys::InvalidOid, row);
            printed = ffi::text_to_cstring(json.cast_mut_ptr());
        })?;
        encoding::from_c(printed).unwrap_or_default()
    };
    Ok(serde_json::from_str(&text).unwrap_or_default())
}

/// A change as its event has it: the columns that differ now, and all of a policy that is new or gone.
fn told(before: Option<&Map<String, Value>>, after: Option<&Map<String, Value>>) -> Value {
    let (Some(before), Some(after)) = (before, after) else {
        return before.or(after).cloned().map(Value::Object).unwrap_or_default();
    };
    let others = after.iter().filter_map(|(key, to)| {
        let from = before.get(key).unwrap_or(&Value::Null);
        (from != to).then(|| (key.clone(), serde_json::json!({ "from": from, "to": to })))
    });
    Value::Object(others.collect())
}

fn record(
    operation: &str,
    before: Option<&Map<String, Value>>,
    after: Option<&Map<String, Value>>,
) -> Result<(), Error> {
    let name = before.or(after).and_then(|columns| columns.get("name")).and_then(Value::as_str);
    let mut event = Event::new(Kind::PolicyChanged);
    event.policy = name.map(|name| shortened(name, MOST_TOLD).into_owned());
    event.operation = Some(operation.into());
    event.relation = Some("writeguard.policy".into());
    let action = match operation {
        "insert" => "created",
        "delete" => "dropped",
        _ => "changed",
    };
    let told = told(before, after).to_string();
    event.reason = Some(format!("{action} past the extension's functions: {}", shortened(&told, MOST_TOLD)));
    let serial = statement::current();
    record_at_commit(event, serial, &statement::excerpt())
}

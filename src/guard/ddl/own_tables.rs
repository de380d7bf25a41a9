//! The extension's own tables, when their rows vanish by DDL: DROP EXTENSION, DROP SCHEMA … CASCADE, DROP OWNED, TRUNCATE;
//! and when they are altered, or their triggers are, which record what else is written to them. Nobody is kept from it who
//! may do it, but who it was and what went is an event; where the table of events went as well, a line in the server log.

use core::ffi::c_char;
use core::ptr;

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

/// The name of a relation in the extension's schema.
fn name_of(relation: pg_sys::Oid) -> Option<String> {
    // SAFETY: syscache look-ups that give InvalidOid or NULL for what is not there.
    unsafe {
        let schema = pg_sys::get_namespace_oid(c"writeguard".as_ptr(), true);
        if schema == pg_sys::InvalidOid
            || pg_sys::get_rel_namespace(relation) != schema
            || pg_sys::get_extension_oid(c"pg_writeguard".as_ptr(), true) == pg_sys::InvalidOid
        {
            return None;
        }
        encoding::from_c(pg_sys::get_rel_name(relation))
    }
}

/// Which of these tables it is, if any.
fn own(relation: pg_sys::Oid) -> Option<usize> {
    let name = name_of(relation)?;
    TABLES.iter().position(|(table, _)| *table == name)
}

/// A table of the extension's, or a view, which a command is about to alter: itself, or its triggers, rules or row security.
pub struct Altered {
    name: String,
}

/// Whether such a command may be one of these.
pub fn may_alter(tag: pg_sys::NodeTag) -> bool {
    matches!(
        tag,
        pg_sys::NodeTag::T_AlterTableStmt
            | pg_sys::NodeTag::T_RenameStmt
            | pg_sys::NodeTag::T_AlterObjectSchemaStmt
            | pg_sys::NodeTag::T_CreateTrigStmt
            | pg_sys::NodeTag::T_RuleStmt
            | pg_sys::NodeTag::T_CreatePolicyStmt
            | pg_sys::NodeTag::T_DropStmt
    )
}

/// What the command that is about to run alters of ours. The scripts of an extension are left alone.
///
/// # Safety
/// The node is a utility command.
pub unsafe fn altered(node: *mut pg_sys::Node) -> Option<Altered> {
    // SAFETY: the tag says what the node is; a static of this process.
    unsafe {
        if pg_sys::creating_extension {
            return None;
        }
        let relation = match (*node).type_ {
            pg_sys::NodeTag::T_AlterTableStmt => in_words((*node.cast::<pg_sys::AlterTableStmt>()).relation),
            pg_sys::NodeTag::T_RenameStmt => in_words((*node.cast::<pg_sys::RenameStmt>()).relation),
            pg_sys::NodeTag::T_AlterObjectSchemaStmt => {
                in_words((*node.cast::<pg_sys::AlterObjectSchemaStmt>()).relation)
            }
            pg_sys::NodeTag::T_CreateTrigStmt => in_words((*node.cast::<pg_sys::CreateTrigStmt>()).relation),
            pg_sys::NodeTag::T_RuleStmt => in_words((*node.cast::<pg_sys::RuleStmt>()).relation),
            pg_sys::NodeTag::T_CreatePolicyStmt => in_words((*node.cast::<pg_sys::CreatePolicyStmt>()).table),
            pg_sys::NodeTag::T_DropStmt => return dropped_from(node.cast()),
            _ => pg_sys::InvalidOid,
        };
        if relation == pg_sys::InvalidOid { None } else { name_of(relation).map(|name| Altered { name }) }
    }
}

/// The relation that such words mean, if there is one.
unsafe fn in_words(words: *mut pg_sys::RangeVar) -> pg_sys::Oid {
    // SAFETY: NULL or a node of the command; look-ups that give InvalidOid for what is not there.
    unsafe { if words.is_null() { pg_sys::InvalidOid } else { named((*words).schemaname, (*words).relname) } }
}

unsafe fn named(schema: *const c_char, name: *const c_char) -> pg_sys::Oid {
    // SAFETY: C strings, where not NULL; look-ups that give InvalidOid for what is not there.
    unsafe {
        if schema.is_null() {
            return pg_sys::RelnameGetRelid(name);
        }
        let schema = pg_sys::get_namespace_oid(schema, true);
        if schema == pg_sys::InvalidOid { schema } else { pg_sys::get_relname_relid(name, schema) }
    }
}

/// The table of ours that one of the triggers, rules or row security policies belongs to which a DROP names.
unsafe fn dropped_from(command: *mut pg_sys::DropStmt) -> Option<Altered> {
    // SAFETY: such a command has a list of names, each a list of strings: those of the table, and the object's own.
    unsafe {
        let of_a_table = matches!(
            (*command).removeType,
            pg_sys::ObjectType::OBJECT_TRIGGER | pg_sys::ObjectType::OBJECT_RULE | pg_sys::ObjectType::OBJECT_POLICY
        );
        let count = |list: *mut pg_sys::List| list.as_ref().map_or(0, |list| usize::try_from(list.length).unwrap_or(0));
        let cell = |list: *mut pg_sys::List, index: usize| (*(*list).elements.add(index)).ptr_value;
        let objects = if of_a_table { count((*command).objects) } else { 0 };
        (0..objects).find_map(|index| {
            let names: *mut pg_sys::List = cell((*command).objects, index).cast();
            let name = |from_the_end: usize| -> *const c_char {
                let string: *mut pg_sys::String = cell(names, count(names) - from_the_end).cast();
                (*string).sval
            };
            let relation = match count(names) {
                2 => named(ptr::null(), name(2)),
                3.. => named(name(3), name(2)),
                _ => pg_sys::InvalidOid,
            };
            if relation == pg_sys::InvalidOid { None } else { name_of(relation).map(|name| Altered { name }) }
        })
    }
}

/// The command that altered it is done: that is an event when it commits.
///
/// # Errors
/// WG008 where the transaction is being prepared and the event cannot be written.
pub fn record_altered(altered: Altered) -> Result<(), Error> {
    let serial = statement::current();
    let mut event = Event::new(Kind::PolicyChanged);
    event.operation = Some("alter".into());
    event.relation = Some(format!("writeguard.{}", altered.name));
    event.reason = Some("A relation of the extension was altered; SELECT * FROM writeguard.check_setup() says what is wrong with it now.".into());
    record_at_commit(event, serial, &statement::excerpt())
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

/// The command is done: what went is recorded when it commits.
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

//! Utility commands that make rows vanish, rewrite them, or take them out of a policy's names.
//!
//! PostgreSQL announces every table that a command touches, cascades and partitions included, through
//! `object_access_hook`: TRUNCATE, the drop of a table or a column and the new heap of a rewrite just before they happen,
//! so that the rows are counted and refused there. A rename, a move to another schema and the end of a link to a parent
//! are announced with the old names still visible; what covers the tables then is noted, and when the command is done
//! those policies that do not name them any more are charged with all their rows.

use std::rc::Rc;

use pgrx::pg_sys;

use super::book::{self, Binding};
use super::{live, statement};
use crate::error::Error;
use crate::event::at_commit::record_at_commit;
use crate::event::record::{Event, Kind};
use crate::ffi::{self, Backend, Foreign};
use crate::policy::catalog::{self, Link};
use crate::policy::relation::{
    INHERITS, in_schema, never_covered, relation_name, tables_with_values_of, with_descendants,
};
use crate::policy::resolve::{self, Target};
use crate::policy::table::Loaded;
use crate::raise::{Failure, Raise};
use crate::session::{self, Actor};
use crate::words::Operation;

/// What is remembered of the utility commands that are running.
enum Note {
    /// A command begins; what follows is its own.
    Command(Command),
    /// A table whose rows this command charged already.
    Counted(pg_sys::Oid),
    /// A table that may be leaving the policies that cover it.
    MayLeave(pg_sys::Oid, Rc<Binding>),
    /// A table whose policies cannot be told, under the names it had, and why.
    Unknown(pg_sys::Oid, Box<(Target, Error)>),
}

/// What has to be known of a command while it runs.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Command {
    /// Nothing.
    Other,
    /// It may take tables out of a policy's names.
    Moves,
    /// An ALTER TABLE that changes types of columns, and may do the former as well.
    ChangesTypes,
    /// DETACH PARTITION … CONCURRENTLY: decided before it begins, because it commits on its way.
    DetachesConcurrently,
}

/// Notes with the level of the subtransaction they were made in: a rollback takes them along.
static NOTES: Backend<Vec<(i32, Note)>> = Backend::new(Vec::new());

fn notes() -> &'static mut Vec<(i32, Note)> {
    // SAFETY: single-threaded; no reference outlives its statement.
    unsafe { &mut *NOTES.get() }
}

fn note(note: Note) {
    // SAFETY: reads a static.
    let level = unsafe { ffi::GetCurrentTransactionNestLevel() };
    notes().push((level, note));
}

/// The utility command that is running.
fn command() -> Command {
    let of_command = |(_, note): &(i32, Note)| match note {
        Note::Command(command) => Some(*command),
        _ => None,
    };
    notes().iter().rev().find_map(of_command).unwrap_or(Command::Other)
}

fn notes_of_command() -> impl Iterator<Item = &'static Note> {
    notes().iter().rev().map(|(_, note)| note).take_while(|note| !matches!(note, Note::Command(_)))
}

/// Whether a utility command may do something to tables itself. Not so those that only run other statements, which pass
/// here on their own.
#[inline(always)]
pub fn concerns(tag: pg_sys::NodeTag) -> bool {
    !matches!(
        tag,
        pg_sys::NodeTag::T_TransactionStmt
            | pg_sys::NodeTag::T_ExecuteStmt
            | pg_sys::NodeTag::T_PrepareStmt
            | pg_sys::NodeTag::T_DeallocateStmt
            | pg_sys::NodeTag::T_DeclareCursorStmt
            | pg_sys::NodeTag::T_FetchStmt
            | pg_sys::NodeTag::T_ClosePortalStmt
            | pg_sys::NodeTag::T_VariableSetStmt
            | pg_sys::NodeTag::T_VariableShowStmt
            | pg_sys::NodeTag::T_ExplainStmt
            | pg_sys::NodeTag::T_CopyStmt
            | pg_sys::NodeTag::T_CallStmt
            | pg_sys::NodeTag::T_DoStmt
    )
}

/// A utility command begins. Gives what [`end`] wants back, and what to raise.
///
/// # Safety
/// Called from a plain old frame, with the command that is about to run.
#[inline]
pub unsafe fn begin(node: *mut pg_sys::Node) -> (usize, *mut Raise) {
    let begun = notes().len();
    // SAFETY: the caller's promise.
    let command = unsafe { kind(node) };
    note(Note::Command(command));
    if command == Command::DetachesConcurrently {
        // SAFETY: statics of this process, and the caller's promise.
        unsafe {
            // Core refuses it there, in its own words.
            if !pg_sys::IsTransactionBlock() && !pg_sys::XactReadOnly {
                return (begun, book::deciding(|| before_detach(node.cast())));
            }
        }
    }
    (begun, core::ptr::null_mut())
}

unsafe fn kind(node: *mut pg_sys::Node) -> Command {
    // SAFETY: the tag says what the node is.
    unsafe {
        match (*node).type_ {
            pg_sys::NodeTag::T_RenameStmt | pg_sys::NodeTag::T_AlterObjectSchemaStmt => Command::Moves,
            pg_sys::NodeTag::T_AlterTableStmt => {
                let mut kind = Command::Moves;
                for index in 0..alterations(node.cast()) {
                    let alteration = alteration(node.cast(), index);
                    if (*alteration).subtype == pg_sys::AlterTableType::AT_AlterColumnType {
                        kind = Command::ChangesTypes;
                    }
                    // Cannot be combined with anything else.
                    if (*alteration).subtype == pg_sys::AlterTableType::AT_DetachPartition
                        && (*(*alteration).def.cast::<pg_sys::PartitionCmd>()).concurrent
                    {
                        return Command::DetachesConcurrently;
                    }
                }
                kind
            }
            _ => Command::Other,
        }
    }
}

unsafe fn alterations(statement: *mut pg_sys::AlterTableStmt) -> usize {
    // SAFETY: NULL is the empty list.
    unsafe { (*statement).cmds.as_ref().map_or(0, |list| usize::try_from(list.length).unwrap_or(0)) }
}

unsafe fn alteration(statement: *mut pg_sys::AlterTableStmt, index: usize) -> *mut pg_sys::AlterTableCmd {
    // SAFETY: the caller counted them.
    unsafe { (*(*(*statement).cmds).elements.add(index)).ptr_value.cast() }
}

/// The command that began there is done. Gives what to raise.
#[inline]
pub fn end(begun: usize) -> *mut Raise {
    let own = notes().get(begun..).unwrap_or_default();
    if own.iter().any(|(_, note)| matches!(note, Note::MayLeave(..) | Note::Unknown(..))) {
        return book::deciding(|| decide_leaving(begun));
    }
    notes().truncate(begun);
    core::ptr::null_mut()
}

/// A (sub)transaction of this level was rolled back, perhaps by an error in a command.
pub fn roll_back(level: i32) {
    notes().retain(|(of, _)| *of < level);
}

/// Whether anything here has to do with this kind of access.
#[inline(always)]
pub fn is_of_interest(access: pg_sys::ObjectAccessType::Type) -> bool {
    access != pg_sys::ObjectAccessType::OAT_FUNCTION_EXECUTE && access != pg_sys::ObjectAccessType::OAT_NAMESPACE_SEARCH
}

/// Something happens to an object. Gives what to raise. When a session ends, its temporary objects go whatever hangs on
/// them; an error would only leave them behind.
///
/// # Safety
/// Called from a plain old frame, inside a transaction, with the arguments of `object_access_hook`.
#[inline]
pub unsafe fn accessed(
    access: pg_sys::ObjectAccessType::Type,
    class: pg_sys::Oid,
    object: pg_sys::Oid,
    sub_id: i32,
    argument: ffi::Opaque,
) -> *mut Raise {
    // SAFETY: a static; the kind of access says what the argument is.
    unsafe {
        if pg_sys::proc_exit_inprogress {
            if access == pg_sys::ObjectAccessType::OAT_DROP && class == pg_sys::RelationRelationId {
                let _nobody_to_tell = book::deciding(|| vanish_with_session(object));
            }
            return core::ptr::null_mut();
        }
        match access {
            pg_sys::ObjectAccessType::OAT_TRUNCATE => book::deciding(|| truncate(object)),
            pg_sys::ObjectAccessType::OAT_DROP if class == pg_sys::RelationRelationId && sub_id == 0 => {
                let internal = (*argument.cast::<pg_sys::ObjectAccessDrop>()).dropflags
                    & pg_sys::PERFORM_DELETION_INTERNAL as i32
                    != 0;
                // The heap that a rewrite leaves behind is nobody's table.
                book::deciding(|| if internal && rewritten(object).is_some() { Ok(()) } else { vanish(object, "") })
            }
            pg_sys::ObjectAccessType::OAT_DROP if class == pg_sys::RelationRelationId => {
                book::deciding(|| column_vanishes(object))
            }
            pg_sys::ObjectAccessType::OAT_POST_CREATE
                if class == pg_sys::RelationRelationId
                    && (*argument.cast::<pg_sys::ObjectAccessPostCreate>()).is_internal
                    && command() == Command::ChangesTypes =>
            {
                book::deciding(|| rewrite(object))
            }
            pg_sys::ObjectAccessType::OAT_POST_ALTER if class == INHERITS => {
                let leaves = matches!(command(), Command::Moves | Command::ChangesTypes);
                book::deciding(|| {
                    // A table without columns changes nothing else of its own when it gets a parent.
                    pg_sys::CacheInvalidateRelcacheByRelid(object);
                    if leaves { may_leave(&[object]) } else { Ok(()) }
                })
            }
            pg_sys::ObjectAccessType::OAT_POST_ALTER
                if !(*argument.cast::<pg_sys::ObjectAccessPostAlter>()).is_internal
                    && matches!(command(), Command::Moves | Command::ChangesTypes) =>
            {
                match class {
                    pg_sys::RelationRelationId if sub_id == 0 => book::deciding(|| may_leave(&[object])),
                    pg_sys::NamespaceRelationId => book::deciding(|| may_leave(&in_schema(object))),
                    _ => core::ptr::null_mut(),
                }
            }
            _ => core::ptr::null_mut(),
        }
    }
}

/// A table is about to be truncated. One that was named is announced just before its lock is taken, so the lock is taken
/// here, for those who may truncate it at all.
unsafe fn truncate(relation: pg_sys::Oid) -> Result<(), Failure> {
    // SAFETY: catalog look-ups and locks as the command itself takes them.
    unsafe {
        if notes_of_command().any(|note| matches!(note, Note::Counted(table) if *table == relation)) {
            return Ok(());
        }
        let Some(binding) = book::binding(relation, Actor::current())? else {
            return Ok(());
        };
        if binding.charges(Operation::Truncate).is_empty() {
            return Ok(());
        }
        let allowed = pg_sys::pg_class_aclcheck(relation, pg_sys::GetUserId(), pg_sys::ACL_TRUNCATE as pg_sys::AclMode);
        if allowed != pg_sys::AclResult::ACLCHECK_OK {
            // Core refuses it in a moment, with its own words.
            return Ok(());
        }
        ffi::protect(|| ffi::LockRelationOid(relation, pg_sys::AccessExclusiveLock as pg_sys::LOCKMODE))?;
        note(Note::Counted(relation));
        live::charge(&binding, Operation::Truncate, relation)
    }
}

/// The rows of a table are about to vanish or to be rewritten; the command has locked it.
unsafe fn vanish(relation: pg_sys::Oid, why: &str) -> Result<(), Failure> {
    let counted = |note: &Note| matches!(note, Note::Counted(table) if *table == relation);
    if never_covered(relation).is_some() || notes_of_command().any(counted) {
        return Ok(());
    }
    let Some(binding) = book::binding(relation, Actor::current())? else {
        return Ok(());
    };
    note(Note::Counted(relation));
    if binding.charges(Operation::Drop).is_empty() {
        uncovered(&binding, binding.policies().next().map(|policy| policy.policy.name.as_str()), why);
        return Ok(());
    }
    // SAFETY: locked by the command.
    unsafe { explain(live::charge(&binding, Operation::Drop, relation), why) }
}

/// A session ends, and a column goes with a temporary type of its own.
fn vanish_with_session(relation: pg_sys::Oid) -> Result<(), Failure> {
    if never_covered(relation).is_none()
        && let Some(binding) = book::binding(relation, Actor::current())?
    {
        let policy = binding.policies().next().map(|policy| policy.policy.name.as_str());
        uncovered(&binding, policy, "It went with the temporary objects of a session that ended.");
    }
    Ok(())
}

/// A command that changes types of columns made a new heap; if it is to take a table's place, that table's rows are
/// about to be rewritten into it.
unsafe fn rewrite(heap: pg_sys::Oid) -> Result<(), Failure> {
    // SAFETY: the caller's promise.
    unsafe { rewritten(heap).map_or(Ok(()), |old| vanish(old, "The new type of a column rewrites every row.")) }
}

/// The relation that a heap was made to take the place of.
unsafe fn rewritten(heap: pg_sys::Oid) -> Option<pg_sys::Oid> {
    // SAFETY: in the relation cache, though perhaps not yet visible in the catalog.
    unsafe {
        let relation = pg_sys::RelationIdGetRelation(heap);
        if relation.is_null() {
            return None;
        }
        let old = (*(*relation).rd_rel).relrewrite;
        pg_sys::RelationClose(relation);
        (old != pg_sys::InvalidOid).then_some(old)
    }
}

/// A column of a relation is about to vanish, and with it a part of every value of the relation's row type.
unsafe fn column_vanishes(relation: pg_sys::Oid) -> Result<(), Failure> {
    let why = "Without a column every row is another.";
    // SAFETY: locked by the command; the others are locked here.
    unsafe {
        vanish(relation, why)?;
        for table in tables_with_values_of(relation) {
            with_lock(table, || vanish(table, why))?;
        }
    }
    Ok(())
}

/// Runs `body` under a lock that keeps the relation where it is.
unsafe fn with_lock(relation: pg_sys::Oid, body: impl FnOnce() -> Result<(), Failure>) -> Result<(), Failure> {
    let lock = pg_sys::AccessShareLock as pg_sys::LOCKMODE;
    // SAFETY: nothing but the raw call inside; after an error the transaction's end releases the lock.
    unsafe {
        ffi::protect(|| ffi::LockRelationOid(relation, lock))?;
        body()?;
        pg_sys::UnlockRelationOid(relation, lock);
    }
    Ok(())
}

/// The names of tables, or a link to a parent, are about to change, and with them those of all that is below.
fn may_leave(tables: &[pg_sys::Oid]) -> Result<(), Failure> {
    for table in tables {
        for relation in with_descendants(*table) {
            if never_covered(relation).is_some() {
                continue;
            }
            match book::binding(relation, Actor::current()) {
                Ok(Some(binding)) => note(Note::MayLeave(relation, binding)),
                Ok(None) => {}
                Err(Failure::Ours(error @ Error::Undecided { .. })) => {
                    if let Some(target) = catalog::coverable(relation, None) {
                        note(Note::Unknown(relation, Box::new((target, error))));
                    }
                }
                Err(failure) => return Err(failure),
            }
        }
    }
    Ok(())
}

fn decide_leaving(begun: usize) -> Result<(), Failure> {
    // What the command did becomes visible, as it would for the next one.
    // SAFETY: between commands; what it raises unwinds to the guard around us.
    unsafe { pg_sys::CommandCounterIncrement() };
    let own = notes().split_off(begun.min(notes().len()));
    // What vanished, or was rewritten, was charged with all its rows already.
    let counted = own.iter().filter_map(|(_, note)| if let Note::Counted(table) = note { Some(*table) } else { None });
    let mut decided: Vec<pg_sys::Oid> = counted.collect();
    for (_, note) in own {
        match note {
            Note::MayLeave(relation, before) if !decided.contains(&relation) && relation_name(relation).is_some() => {
                decided.push(relation);
                leave(relation, &before, catalog::coverable(relation, None).as_ref())?;
            }
            // Under its old names nothing can have left; and into the extension's schema it goes to be mended.
            Note::Unknown(relation, before)
                if catalog::coverable(relation, None).is_some_and(|after| after != before.0) =>
            {
                return Err(before.1.into());
            }
            _ => {}
        }
    }
    Ok(())
}

/// Charges the rows of a table to those of the policies that covered it which do not name it any more. `after`: the
/// names it then has, none where no policy can cover it.
fn leave(relation: pg_sys::Oid, before: &Binding, after: Option<&Target>) -> Result<(), Failure> {
    let why = "Out of the policy's names, its rows would not be limited any more.";
    let left = |policy: &Loaded| after.is_none_or(|after| !resolve::names(&policy.policy, after));
    let leaving = before.only(Operation::Drop, left);
    if leaving.charges(Operation::Drop).is_empty() {
        if let Some(policy) = before.policies().find(|policy| left(policy)) {
            uncovered(before, Some(&policy.policy.name), why);
        }
        return Ok(());
    }
    // SAFETY: in the command's transaction.
    unsafe {
        if pg_sys::get_rel_relkind(relation) as u8 != pg_sys::RELKIND_RELATION {
            // The rows are in other tables.
            return Ok(());
        }
        with_lock(relation, || explain(live::charge(&leaving, Operation::Drop, relation), why))
    }
}

/// Before a partition is detached concurrently, for those who may do that.
unsafe fn before_detach(command: *mut pg_sys::AlterTableStmt) -> Result<(), Failure> {
    // SAFETY: look-ups that give InvalidOid for what is not there, and the command's own nodes.
    unsafe {
        let partition = (*(*alteration(command, 0)).def.cast::<pg_sys::PartitionCmd>()).name;
        let (parent, child) = (visible_relation((*command).relation)?, visible_relation(partition)?);
        if parent == pg_sys::InvalidOid || child == pg_sys::InvalidOid || !owns(parent) {
            return Ok(());
        }
        let link = Link { child, parent };
        for relation in with_descendants(child) {
            if let Some(before) = book::binding(relation, Actor::current())? {
                leave(relation, &before, catalog::coverable(relation, Some(link)).as_ref())?;
            }
        }
    }
    Ok(())
}

unsafe fn visible_relation(name: *mut pg_sys::RangeVar) -> Result<pg_sys::Oid, Foreign> {
    let missing_ok = pg_sys::RVROption::RVR_MISSING_OK;
    let no_lock = pg_sys::NoLock as pg_sys::LOCKMODE;
    let mut found = pg_sys::InvalidOid;
    // SAFETY: the caller's promise; what this raises the command would raise as well.
    unsafe {
        ffi::protect(|| {
            found = ffi::RangeVarGetRelidExtended(name, no_lock, missing_ok, None, core::ptr::null_mut());
        })?;
    }
    Ok(found)
}

#[cfg(feature = "pg15")]
unsafe fn owns(relation: pg_sys::Oid) -> bool {
    // SAFETY: the relation is there.
    unsafe { pg_sys::pg_class_ownercheck(relation, pg_sys::GetUserId()) }
}

#[cfg(not(feature = "pg15"))]
unsafe fn owns(relation: pg_sys::Oid) -> bool {
    // SAFETY: the relation is there.
    unsafe { pg_sys::object_ownercheck(pg_sys::RelationRelationId, relation, pg_sys::GetUserId()) }
}

/// Notes DDL on a covered table that none of its policies limits; an event with the commit.
fn uncovered(binding: &Binding, policy: Option<&str>, why: &str) {
    // Opens the statement, so that its text is at hand.
    statement::current();
    let mut event = Event::new(Kind::Uncovered);
    event.policy = policy.map(str::to_owned);
    event.operation = Some(Operation::Drop.word().into());
    event.relation = Some(binding.name.clone());
    event.reason = Some(why.to_owned()).filter(|why| !why.is_empty());
    record_at_commit(event, &session::without_token(statement::text()));
}

/// Adds to a refusal why these rows count.
fn explain(result: Result<(), Failure>, why: &str) -> Result<(), Failure> {
    result.map_err(|failure| {
        let raise = failure.into_raise();
        if !why.is_empty() {
            // SAFETY: just made, and nobody else's yet.
            unsafe { (*raise).explain(why) };
        }
        Failure::Ready(raise)
    })
}

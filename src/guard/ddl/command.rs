//! Utility commands that make rows vanish, rewrite them, or take them out of a policy's names.
//!
//! PostgreSQL announces every table that a command touches, cascades and partitions included, through
//! `object_access_hook`: TRUNCATE, the drop of a table or a column and the new heap of a rewrite just before they happen,
//! so that the rows are counted and refused there. A rename, a move to another schema and the end of a link to a parent
//! are announced with the old names still visible; what covers the tables then is noted, and when the command is done
//! those policies that do not name them any more are charged with all their rows.

use pgrx::pg_sys;
use rules::words::{Deed, Operation};

use super::leaving_coverage::{self, Leaving};
use super::live_rows;
use super::own_tables::{self, Altered, Gone};
use crate::guard::limits::bindings;
use crate::guard::verdict::decide;
use crate::pg::backend_local::{BackendLocal, Borrowed};
use crate::pg::ereport::{Failure, PendingError};
use crate::pg::ffi;
use crate::policy::relation::{INHERITS, in_schema, never_covered, tables_with_values_of};
use crate::session::actor::Actor;

/// What is remembered of the utility commands that are running.
enum Note {
    /// A command begins; what follows is its own.
    Command(Command),
    /// A table whose rows this command charged already.
    Counted(pg_sys::Oid),
    /// A table that may be leaving the policies that cover it.
    MayLeave(Leaving),
    /// One of the extension's own tables whose rows vanish.
    Own(Gone),
    /// One of the extension's own tables that the command alters.
    Altered(Altered),
}

/// What has to be known of a command while it runs.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Command {
    /// Nothing.
    Other,
    /// It may take tables out of a policy's names, in this way.
    Moves(Deed),
    /// An ALTER TABLE that changes types or expressions of columns, and may do the former as well.
    ChangesTypes { change: Deed, moves: Deed },
    /// DETACH PARTITION … CONCURRENTLY: decided before it begins, because it commits on its way.
    DetachesConcurrently,
}

/// Notes with the level of the subtransaction they were made in: a rollback takes them along.
static NOTES: BackendLocal<Vec<(i32, Note)>> = BackendLocal::new(Vec::new());

#[track_caller]
fn notes() -> Borrowed<Vec<(i32, Note)>> {
    NOTES.borrow()
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

/// Whether the command that is running has charged the rows of that table already.
fn is_counted(relation: pg_sys::Oid) -> bool {
    let notes = notes();
    let mut own = notes.iter().rev().map(|(_, note)| note).take_while(|note| !matches!(note, Note::Command(_)));
    own.any(|note| matches!(note, Note::Counted(table) if *table == relation))
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
#[inline(never)]
pub unsafe fn begin(node: *mut pg_sys::Node) -> (usize, *mut PendingError) {
    let begun = notes().len();
    // SAFETY: the caller's promise.
    let command = unsafe { kind(node) };
    note(Note::Command(command));
    // SAFETY: the caller's promise.
    if unsafe { own_tables::may_alter((*node).type_) } {
        let refusal = bindings::deciding(|| {
            // SAFETY: the caller's promise.
            if let Some(altered) = unsafe { own_tables::altered(node) } {
                note(Note::Altered(altered));
            }
            Ok(())
        });
        if !refusal.is_null() {
            return (begun, refusal);
        }
    }
    if command == Command::DetachesConcurrently {
        // SAFETY: statics of this process, and the caller's promise.
        unsafe {
            // Core refuses it there, in its own words.
            if !ffi::IsTransactionBlock() && !pg_sys::XactReadOnly {
                return (begun, bindings::deciding(|| before_detach(node.cast())));
            }
        }
    }
    (begun, core::ptr::null_mut())
}

/// What an alteration does that may give every row other values, by a new heap: a new type, or another expression of a
/// generated column, which there is from PostgreSQL 17 on.
fn rewrites(subtype: pg_sys::AlterTableType::Type) -> Option<Deed> {
    #[cfg(since_pg17)]
    if subtype == pg_sys::AlterTableType::AT_SetExpression {
        return Some(Deed::ddl("set expression"));
    }
    (subtype == pg_sys::AlterTableType::AT_AlterColumnType).then_some(Deed::ddl("alter column type"))
}

/// How an alteration may take the table out of a policy's names.
fn unlinks(subtype: pg_sys::AlterTableType::Type) -> Option<Deed> {
    match subtype {
        pg_sys::AlterTableType::AT_DetachPartition => Some(DETACH),
        pg_sys::AlterTableType::AT_DropInherit => Some(Deed::ddl("no inherit")),
        _ => None,
    }
}

const DETACH: Deed = Deed::ddl("detach");

unsafe fn kind(node: *mut pg_sys::Node) -> Command {
    // SAFETY: the tag says what the node is.
    unsafe {
        match (*node).type_ {
            pg_sys::NodeTag::T_RenameStmt
                if (*node.cast::<pg_sys::RenameStmt>()).renameType == pg_sys::ObjectType::OBJECT_SCHEMA =>
            {
                Command::Moves(Deed::ddl("schema rename"))
            }
            pg_sys::NodeTag::T_RenameStmt => Command::Moves(Deed::ddl("rename")),
            pg_sys::NodeTag::T_AlterObjectSchemaStmt => Command::Moves(Deed::ddl("set schema")),
            pg_sys::NodeTag::T_AlterTableStmt => {
                let (mut change, mut moves) = (None, None);
                for index in 0..alterations(node.cast()) {
                    let alteration = alteration(node.cast(), index);
                    change = change.or(rewrites((*alteration).subtype));
                    moves = moves.or(unlinks((*alteration).subtype));
                    // Cannot be combined with anything else.
                    if (*alteration).subtype == pg_sys::AlterTableType::AT_DetachPartition
                        && (*(*alteration).def.cast::<pg_sys::PartitionCmd>()).concurrent
                    {
                        return Command::DetachesConcurrently;
                    }
                }
                let moves = moves.unwrap_or(Deed::ddl("alter"));
                change.map_or(Command::Moves(moves), |change| Command::ChangesTypes { change, moves })
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
pub fn end(begun: usize) -> *mut PendingError {
    let decides = |(_, note): &(i32, Note)| matches!(note, Note::MayLeave(_) | Note::Own(_) | Note::Altered(_));
    let is_due = notes().get(begun..).unwrap_or_default().iter().any(decides);
    if is_due {
        return bindings::deciding(|| decide_leaving(begun));
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
#[inline(never)]
pub unsafe fn accessed(
    access: pg_sys::ObjectAccessType::Type,
    class: pg_sys::Oid,
    object: pg_sys::Oid,
    sub_id: i32,
    argument: ffi::Opaque,
) -> *mut PendingError {
    // SAFETY: a static; the kind of access says what the argument is.
    unsafe {
        if pg_sys::proc_exit_inprogress {
            if access == pg_sys::ObjectAccessType::OAT_DROP && class == pg_sys::RelationRelationId {
                let _nobody_to_tell = bindings::deciding(|| vanish_with_session(object));
            }
            return core::ptr::null_mut();
        }
        match access {
            pg_sys::ObjectAccessType::OAT_TRUNCATE => bindings::deciding(|| truncate(object)),
            pg_sys::ObjectAccessType::OAT_DROP if class == pg_sys::RelationRelationId && sub_id == 0 => {
                let internal = (*argument.cast::<pg_sys::ObjectAccessDrop>()).dropflags
                    & pg_sys::PERFORM_DELETION_INTERNAL as i32
                    != 0;
                // The heap that a rewrite leaves behind is nobody's table.
                bindings::deciding(|| {
                    if internal && rewritten(object).is_some() {
                        Ok(())
                    } else {
                        vanish(object, Operation::Drop.into(), "")
                    }
                })
            }
            pg_sys::ObjectAccessType::OAT_DROP if class == pg_sys::RelationRelationId => {
                bindings::deciding(|| column_vanishes(object))
            }
            pg_sys::ObjectAccessType::OAT_POST_CREATE
                if class == pg_sys::RelationRelationId
                    && (*argument.cast::<pg_sys::ObjectAccessPostCreate>()).is_internal
                    && let Command::ChangesTypes { change, .. } = command() =>
            {
                bindings::deciding(|| rewrite(object, change))
            }
            pg_sys::ObjectAccessType::OAT_POST_ALTER if class == INHERITS => {
                let leaves = matches!(command(), Command::Moves(_) | Command::ChangesTypes { .. });
                bindings::deciding(|| {
                    // A table without columns changes nothing else of its own when it gets a parent.
                    pg_sys::CacheInvalidateRelcacheByRelid(object);
                    if leaves { may_leave(&[object]) } else { Ok(()) }
                })
            }
            pg_sys::ObjectAccessType::OAT_POST_ALTER
                if !(*argument.cast::<pg_sys::ObjectAccessPostAlter>()).is_internal
                    && matches!(command(), Command::Moves(_) | Command::ChangesTypes { .. }) =>
            {
                match class {
                    pg_sys::RelationRelationId if sub_id == 0 => bindings::deciding(|| may_leave(&[object])),
                    pg_sys::NamespaceRelationId => bindings::deciding(|| may_leave(&in_schema(object))),
                    _ => core::ptr::null_mut(),
                }
            }
            _ => core::ptr::null_mut(),
        }
    }
}

/// A table is about to be truncated. One that was named is announced just before its lock is taken, so the lock is taken
/// here, for those who may truncate it at all.
#[expect(ffi_unwind_calls, reason = "inside protect")]
unsafe fn truncate(relation: pg_sys::Oid) -> Result<(), Failure> {
    // SAFETY: catalog look-ups and locks as the command itself takes them.
    unsafe {
        if is_counted(relation) {
            return Ok(());
        }
        if let Some(gone) = own_tables::truncated(relation)? {
            note(Note::Own(gone));
            return Ok(());
        }
        let Some(binding) = bindings::binding_to_count(relation, Actor::current())? else {
            return Ok(());
        };
        if !bindings::is_counted(&binding, &[Operation::Truncate]) {
            return Ok(());
        }
        let allowed = pg_sys::pg_class_aclcheck(relation, pg_sys::GetUserId(), pg_sys::ACL_TRUNCATE as pg_sys::AclMode);
        if allowed != pg_sys::AclResult::ACLCHECK_OK {
            // Core refuses it in a moment, with its own words.
            return Ok(());
        }
        ffi::protect(|| ffi::LockRelationOid(relation, pg_sys::AccessExclusiveLock as pg_sys::LOCKMODE))?;
        note(Note::Counted(relation));
        live_rows::charge(&binding, Operation::Truncate, relation)
    }
}

/// The rows of a table are about to vanish or to be rewritten; the command has locked it.
unsafe fn vanish(relation: pg_sys::Oid, deed: Deed, why: &str) -> Result<(), Failure> {
    if why.is_empty()
        && let Some(gone) = own_tables::dropped(relation)?
    {
        note(Note::Own(gone));
        return Ok(());
    }
    if never_covered(relation).is_some() || is_counted(relation) {
        return Ok(());
    }
    let Some(binding) = bindings::binding(relation, Actor::current())? else {
        return Ok(());
    };
    note(Note::Counted(relation));
    if binding.charges(Operation::Drop).is_empty() {
        decide::record_uncovered(
            &binding.name,
            binding.policies().next().map(|policy| policy.policy.name.as_str()),
            why,
        )?;
        return Ok(());
    }
    // SAFETY: locked by the command.
    decide::called(deed, || unsafe { live_rows::charge(&binding, Operation::Drop, relation) })
        .map_err(|failure| failure.explained(why))
}

/// A session ends, and a column goes with a temporary type of its own.
fn vanish_with_session(relation: pg_sys::Oid) -> Result<(), Failure> {
    if never_covered(relation).is_none()
        && let Some(binding) = bindings::binding(relation, Actor::current())?
    {
        let policy = binding.policies().next().map(|policy| policy.policy.name.as_str());
        let why = "It went with the temporary objects of a session that ended.";
        decide::record_uncovered(&binding.name, policy, why)?;
    }
    Ok(())
}

/// A command that changes types or expressions of columns made a new heap; if it is to take a table's place, that table's rows are
/// about to be rewritten into it.
unsafe fn rewrite(heap: pg_sys::Oid, change: Deed) -> Result<(), Failure> {
    // SAFETY: the caller's promise.
    unsafe {
        let why = "The new type or expression of a column rewrites every row.";
        rewritten(heap).map_or(Ok(()), |old| vanish(old, change, why))
    }
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
    let deed = Deed::ddl("drop column");
    // SAFETY: locked by the command; the others are locked here.
    unsafe {
        vanish(relation, deed, why)?;
        for table in tables_with_values_of(relation) {
            live_rows::with_lock(table, || vanish(table, deed, why))?;
        }
    }
    Ok(())
}

/// The names of tables, or a link to a parent, are about to change.
fn may_leave(tables: &[pg_sys::Oid]) -> Result<(), Failure> {
    leaving_coverage::candidates(tables, |leaving| note(Note::MayLeave(leaving)))
}

/// The command that began there is done, and names may have changed.
fn decide_leaving(begun: usize) -> Result<(), Failure> {
    let own = {
        let mut notes = notes();
        let begun = begun.min(notes.len());
        notes.split_off(begun)
    };
    let (mut counted, mut leaving, mut gone, mut altered) = (Vec::new(), Vec::new(), Vec::new(), None);
    let mut deed = Operation::Drop.into();
    for (_, note) in own {
        match note {
            // What vanished, or was rewritten, was charged with all its rows already.
            Note::Counted(table) => counted.push(table),
            Note::MayLeave(candidate) => leaving.push(candidate),
            Note::Own(own) => gone.push(own),
            Note::Altered(own) => altered = Some(own),
            Note::Command(Command::Moves(moves) | Command::ChangesTypes { moves, .. }) => deed = moves,
            Note::Command(_) => {}
        }
    }
    own_tables::record(&gone)?;
    altered.map_or(Ok(()), own_tables::record_altered)?;
    decide::called(deed, || leaving_coverage::decide(leaving, counted))
}

/// Before a partition is detached concurrently.
unsafe fn before_detach(command: *mut pg_sys::AlterTableStmt) -> Result<(), Failure> {
    // SAFETY: the caller's promise: the command's own nodes.
    unsafe {
        let partition = (*(*alteration(command, 0)).def.cast::<pg_sys::PartitionCmd>()).name;
        decide::called(DETACH, || leaving_coverage::before_detach((*command).relation, partition))
    }
}

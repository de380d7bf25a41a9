//! The hooks: plain old frames and nothing else.
//!
//! Each does a few compares, lets a guarded function look at what there is to see, which has returned before the next
//! hook is called, and calls the next hook in the open, so that other people's errors pass through here as if we were
//! not there.

use core::ffi::{c_char, c_int, c_void};
use core::ptr;
use std::sync::OnceLock;

use pgrx::pg_sys;

use super::commit;
use super::ddl::command;
use super::executor::{count, modify_node, plan_writes};
use super::limits::{charge, observe, rate_memory};
use super::rehearsal::account;
use super::verdict::{decide, expect, overrides, reviewed_objects, reviewed_rows};
use crate::event::{counters, memory, queue, queue_file, rate_limit};
use crate::pg::contained::contained;
use crate::pg::ereport::{PendingError, guarded, raise, unwound};
use crate::pg::{ffi, process};
use crate::policy::catalog;
use crate::session::actor::{self, Actor};
use crate::session::portal::{self, Frame};
use crate::session::{expectation, meaning, own_statement, settings, statement, transaction_block};
use crate::stat;
use crate::undo::user_triggers;

type Start = unsafe extern "C-unwind" fn(*mut pg_sys::QueryDesc, c_int);
#[cfg(not(since_pg18))]
type Run = unsafe extern "C-unwind" fn(*mut pg_sys::QueryDesc, pg_sys::ScanDirection::Type, u64, bool);
#[cfg(since_pg18)]
type Run = unsafe extern "C-unwind" fn(*mut pg_sys::QueryDesc, pg_sys::ScanDirection::Type, u64);
type Finish = unsafe extern "C-unwind" fn(*mut pg_sys::QueryDesc);
type Utility = unsafe extern "C-unwind" fn(
    *mut pg_sys::PlannedStmt,
    *const c_char,
    bool,
    pg_sys::ProcessUtilityContext::Type,
    pg_sys::ParamListInfo,
    *mut pg_sys::QueryEnvironment,
    *mut pg_sys::DestReceiver,
    *mut pg_sys::QueryCompletion,
);

/// What each hook calls: the hook that was there before, or core's own function.
struct Next {
    start: Start,
    run: Run,
    finish: Finish,
    utility: Utility,
    access: pg_sys::object_access_hook_type,
    shmem_request: pg_sys::shmem_request_hook_type,
    shmem_startup: pg_sys::shmem_startup_hook_type,
}

static NEXT: OnceLock<Next> = OnceLock::new();

/// Installs the hooks and the transaction callbacks.
///
/// # Safety
/// Once, in `_PG_init` in the postmaster (or the single-user backend), before any backend exists.
pub unsafe fn install() {
    // SAFETY: the caller's promise.
    unsafe {
        NEXT.get_or_init(|| Next {
            start: pg_sys::ExecutorStart_hook.unwrap_or(ffi::standard_ExecutorStart),
            run: pg_sys::ExecutorRun_hook.unwrap_or(ffi::standard_ExecutorRun),
            finish: pg_sys::ExecutorFinish_hook.unwrap_or(ffi::standard_ExecutorFinish),
            utility: pg_sys::ProcessUtility_hook.unwrap_or(ffi::standard_ProcessUtility),
            access: pg_sys::object_access_hook,
            shmem_request: pg_sys::shmem_request_hook,
            shmem_startup: pg_sys::shmem_startup_hook,
        });
        pg_sys::ExecutorStart_hook = Some(executor_start);
        pg_sys::ExecutorRun_hook = Some(executor_run);
        pg_sys::ExecutorFinish_hook = Some(executor_finish);
        pg_sys::ProcessUtility_hook = Some(process_utility);
        pg_sys::object_access_hook = Some(object_access);
        pg_sys::shmem_request_hook = Some(shmem_request);
        pg_sys::shmem_startup_hook = Some(shmem_startup);
        pg_sys::RegisterXactCallback(Some(commit::transaction_ends), ptr::null_mut());
        pg_sys::RegisterSubXactCallback(Some(commit::subtransaction_ends), ptr::null_mut());
    }
}

/// Set before the first hook can run.
#[inline(always)]
fn next() -> &'static Next {
    // SAFETY: `install` sets it before it installs a hook.
    unsafe { NEXT.get().unwrap_unchecked() }
}

/// Whether the guard stays out: because of what the process is, or because the session has a replication origin set up, so
/// that it applies what was written elsewhere, as core's own workers do.
#[inline(always)]
fn stays_out() -> bool {
    let is_applied = || {
        // SAFETY: reads a static of this process.
        #[cfg(not(since_pg19))]
        return unsafe { u32::from(pg_sys::replorigin_session_origin) != pg_sys::InvalidRepOriginId };
        // SAFETY: as above.
        #[cfg(since_pg19)]
        return unsafe { u32::from(pg_sys::replorigin_xact_state.origin) != pg_sys::InvalidReplOriginId };
    };
    process::stays_out() || is_applied()
}

/// Whether a plan may update or delete at all; a SELECT or a plain INSERT does not.
#[inline(always)]
unsafe fn may_change_rows(operation: pg_sys::CmdType::Type, statement: *const pg_sys::PlannedStmt) -> bool {
    // SAFETY: the statement that the executor was started with.
    unsafe {
        match operation {
            _ if (*statement).hasModifyingCTE => true,
            pg_sys::CmdType::CMD_SELECT => false,
            pg_sys::CmdType::CMD_INSERT => {
                let plan = (*statement).planTree;
                (*plan).type_ != pg_sys::NodeTag::T_ModifyTable
                    || (*plan.cast::<pg_sys::ModifyTable>()).onConflictAction
                        == pg_sys::OnConflictAction::ONCONFLICT_UPDATE
                    || account::counts_everything()
            }
            _ => true,
        }
    }
}

/// A query begins that is reviewed, or may present a token, which is for a text with the meaning that it has now.
#[cold]
#[inline(never)]
unsafe fn look_closely(query_desc: *const pg_sys::QueryDesc) -> *mut PendingError {
    guarded(|| {
        if actor::may_have_token() && portal::is_next_outermost() {
            meaning::note_start();
        }
        if reviewed_rows::is_wanted() {
            // SAFETY: the query that the executor is to start.
            unsafe { reviewed_objects::query((*query_desc).plannedstmt) };
        }
        Ok(())
    })
}

/// A function is about to be called while queries are looked at.
#[cold]
#[inline(never)]
fn look_at_function(function: pg_sys::Oid) -> *mut PendingError {
    guarded(|| {
        if reviewed_rows::is_wanted() {
            reviewed_objects::function(function);
        }
        Ok(())
    })
}

#[cold]
#[inline(never)]
fn noted_meaning() -> *mut PendingError {
    guarded(|| {
        meaning::note_start();
        Ok(())
    })
}

#[expect(ffi_unwind_calls, reason = "plain old frame")]
unsafe extern "C-unwind" fn executor_start(query_desc: *mut pg_sys::QueryDesc, eflags: c_int) {
    // SAFETY: plain old frame; the query is what the executor is to start.
    unsafe {
        if expectation::is_armed() {
            expect::starting(query_desc, eflags);
        }
        if actor::looks_closely() {
            raise(look_closely(query_desc));
        }
        (next().start)(query_desc, eflags);
        let writes = may_change_rows((*query_desc).operation, (*query_desc).plannedstmt);
        if writes && user_triggers::are_left_out() {
            user_triggers::disable(query_desc);
        }
        if writes && eflags & pg_sys::EXEC_FLAG_EXPLAIN_ONLY as c_int == 0 && !stays_out() {
            ffi::AcceptInvalidationMessages();
            let actor = Actor::current();
            let mut is_begun = false;
            raise(unwound(|| {
                is_begun = plan_writes::begin_plainly(query_desc, actor);
                ptr::null_mut()
            }));
            if !is_begun {
                raise(plan_writes::begin(query_desc, actor));
            }
        }
    }
}

#[cfg(not(since_pg18))]
#[expect(ffi_unwind_calls, reason = "plain old frame")]
unsafe extern "C-unwind" fn executor_run(
    query_desc: *mut pg_sys::QueryDesc,
    direction: pg_sys::ScanDirection::Type,
    count: u64,
    execute_once: bool,
) {
    // SAFETY: plain old frame.
    unsafe {
        let frame = portal::enter();
        (next().run)(query_desc, direction, count, execute_once);
        after_run(query_desc, frame, count);
    }
}

#[cfg(since_pg18)]
#[expect(ffi_unwind_calls, reason = "plain old frame")]
unsafe extern "C-unwind" fn executor_run(
    query_desc: *mut pg_sys::QueryDesc,
    direction: pg_sys::ScanDirection::Type,
    count: u64,
) {
    // SAFETY: plain old frame.
    unsafe {
        let frame = portal::enter();
        (next().run)(query_desc, direction, count);
        after_run(query_desc, frame, count);
    }
}

#[expect(ffi_unwind_calls, reason = "plain old frame")]
unsafe extern "C-unwind" fn executor_finish(query_desc: *mut pg_sys::QueryDesc) {
    // SAFETY: plain old frame. WITH branches may run here, to their end, and count themselves.
    unsafe {
        let frame = portal::enter();
        (next().finish)(query_desc);
        if frame == Frame::Outermost {
            leave((*query_desc).plannedstmt, false);
        }
    }
}

/// The outermost frame returns; `returns` and `ran_out` as for [`portal::is_over`].
#[inline(always)]
unsafe fn leave(returns: *const pg_sys::PlannedStmt, ran_out: bool) {
    // SAFETY: plain old frame.
    unsafe {
        if observe::any() || overrides::awaits_rows() {
            raise(look_back(returns, ran_out));
        }
    }
    portal::leave();
}

#[cold]
#[inline(never)]
unsafe fn look_back(returns: *const pg_sys::PlannedStmt, ran_out: bool) -> *mut PendingError {
    // SAFETY: called from the outermost frame.
    let is_over = unsafe { portal::is_over(returns, ran_out) };
    if overrides::awaits_rows() && is_over {
        let refusal = guarded(|| decide::check_rows(Some(statement::current())));
        if !refusal.is_null() {
            return refusal;
        }
    }
    if observe::any() { observe::left(charge::ledger(), is_over) } else { ptr::null_mut() }
}

#[inline(always)]
unsafe fn after_run(query_desc: *mut pg_sys::QueryDesc, frame: Frame, count: u64) {
    // SAFETY: plain old frame.
    unsafe {
        if modify_node::any() {
            raise(count::after_run(query_desc));
        }
        if expect::is_pending() {
            raise(expect::after_run(query_desc));
        }
        if frame == Frame::Outermost {
            leave(ptr::null(), count == 0 || (*(*query_desc).estate).es_processed < count);
        }
    }
}

#[allow(clippy::too_many_arguments)]
#[expect(ffi_unwind_calls, reason = "plain old frame")]
unsafe extern "C-unwind" fn process_utility(
    pstmt: *mut pg_sys::PlannedStmt,
    query_string: *const c_char,
    read_only_tree: bool,
    context: pg_sys::ProcessUtilityContext::Type,
    params: pg_sys::ParamListInfo,
    query_env: *mut pg_sys::QueryEnvironment,
    dest: *mut pg_sys::DestReceiver,
    qc: *mut pg_sys::QueryCompletion,
) {
    // SAFETY: plain old frame. What is read of the statement is read before it runs: it may end the transaction.
    unsafe {
        let tag = (*(*pstmt).utilityStmt).type_;
        let is_transaction = tag == pg_sys::NodeTag::T_TransactionStmt;
        let transaction = (*pstmt).utilityStmt.cast::<pg_sys::TransactionStmt>();
        let kind = if is_transaction { (*transaction).kind } else { pg_sys::TransactionStmtKind::TRANS_STMT_SAVEPOINT };
        let frame = if is_transaction {
            transaction_block::before(transaction);
            statement::between_commands();
            Frame::Inner
        } else {
            portal::enter()
        };
        if actor::may_have_token() && frame == Frame::Outermost {
            raise(noted_meaning());
        }
        let defines = command::concerns(tag) && !stays_out();
        let mut expected = settings::NO_EXPECTATION;
        if expectation::is_armed() && frame == Frame::Outermost {
            expected = expect::utility_starting((*pstmt).utilityStmt);
        }
        let mut begun = 0;
        if defines {
            let (noted, refusal) = command::begin((*pstmt).utilityStmt);
            begun = noted;
            raise(refusal);
        }
        (next().utility)(pstmt, query_string, read_only_tree, context, params, query_env, dest, qc);
        if defines {
            raise(command::end(begun));
        } else if is_transaction {
            transaction_block::after(kind);
        } else if tag == pg_sys::NodeTag::T_PrepareStmt && frame == Frame::Outermost {
            own_statement::prepared((*(*pstmt).utilityStmt.cast::<pg_sys::PrepareStmt>()).name);
        }
        if expected >= 0 {
            raise(expect::after_execute((*pstmt).utilityStmt.cast(), qc, expected));
        }
        if frame == Frame::Outermost {
            leave(pstmt, false);
        }
        if kind == pg_sys::TransactionStmtKind::TRANS_STMT_COMMIT_PREPARED && catalog::may_be_installed() {
            // Its events may have left notifications to send.
            contained("waking the worker", || _ = queue::push(&[], false));
        }
    }
}

#[expect(ffi_unwind_calls, reason = "plain old frame")]
unsafe extern "C-unwind" fn object_access(
    access: pg_sys::ObjectAccessType::Type,
    class: pg_sys::Oid,
    object: pg_sys::Oid,
    sub_id: c_int,
    argument: *mut c_void,
) {
    // SAFETY: plain old frame.
    unsafe {
        if command::is_of_interest(access) {
            accessed(access, class, object, sub_id, argument);
        } else if actor::looks_closely() && access == pg_sys::ObjectAccessType::OAT_FUNCTION_EXECUTE {
            raise(look_at_function(object));
        }
        if let Some(next) = next().access {
            next(access, class, object, sub_id, argument);
        }
    }
}

/// Apart, because nearly always what is accessed is of no interest.
#[inline(never)]
unsafe fn accessed(
    access: pg_sys::ObjectAccessType::Type,
    class: pg_sys::Oid,
    object: pg_sys::Oid,
    sub_id: c_int,
    argument: *mut c_void,
) {
    // SAFETY: plain old frame.
    unsafe {
        if !stays_out() {
            raise(command::accessed(access, class, object, sub_id, argument));
        }
    }
}

#[expect(ffi_unwind_calls, reason = "plain old frame")]
unsafe extern "C-unwind" fn shmem_request() {
    // SAFETY: plain old frame, called by the postmaster.
    unsafe {
        if let Some(next) = next().shmem_request {
            next();
        }
        memory::request();
        rate_memory::request();
        rate_limit::request();
        counters::request();
        stat::memory::request();
    }
}

#[expect(ffi_unwind_calls, reason = "plain old frame")]
unsafe extern "C-unwind" fn shmem_startup() {
    // SAFETY: plain old frame, called where shared memory is attached.
    unsafe {
        if let Some(next) = next().shmem_startup {
            next();
        }
        rate_memory::startup();
        rate_limit::startup();
        counters::startup();
        if stat::memory::startup() && !pg_sys::IsUnderPostmaster {
            stat::store::startup();
        }
        if memory::startup() && !pg_sys::IsUnderPostmaster {
            queue_file::startup();
        }
    }
}

//! Whether the client opened a transaction block. PostgreSQL's own answer does not tell BEGIN from the implicit block of
//! a pipeline or of a string with several commands.

use pgrx::pg_sys;

use crate::pg::backend_local::{BackendLocal, Borrowed};
use crate::pg::ffi;

#[derive(Clone, Copy)]
struct State {
    explicit: bool,
    /// COMMIT AND CHAIN was asked for: once the transaction commits, the next one is in a block again.
    commit_chains: bool,
    /// ROLLBACK AND CHAIN was, likewise.
    rollback_chains: bool,
}

static STATE: BackendLocal<State> =
    BackendLocal::new(State { explicit: false, commit_chains: false, rollback_chains: false });

#[track_caller]
fn state() -> Borrowed<State> {
    STATE.borrow()
}

/// Whether the client opened the running transaction with BEGIN.
#[inline]
pub fn is_explicit() -> bool {
    state().explicit
}

/// What a command that controls transactions is about to do.
///
/// # Safety
/// Called from a plain old frame with the command that is about to run.
#[inline(never)]
pub unsafe fn before(command: *const pg_sys::TransactionStmt) {
    // SAFETY: the caller's promise; reads the transaction state.
    let (kind, chains, aborted) = unsafe {
        let kind = (*command).kind;
        (kind, (*command).chain, ffi::IsAbortedTransactionBlockState())
    };
    let mut state = state();
    match kind {
        pg_sys::TransactionStmtKind::TRANS_STMT_COMMIT | pg_sys::TransactionStmtKind::TRANS_STMT_ROLLBACK if chains => {
            if aborted {
                // That transaction is over already; only the chain is left to follow.
                state.explicit = true;
            } else {
                state.commit_chains = kind == pg_sys::TransactionStmtKind::TRANS_STMT_COMMIT;
                state.rollback_chains = !state.commit_chains;
            }
        }
        _ => {}
    }
}

/// The command did it.
///
/// # Safety
/// As for [`before`]; only the kind is read, which was read before the command ran.
pub fn after(kind: pg_sys::TransactionStmtKind::Type) {
    if kind == pg_sys::TransactionStmtKind::TRANS_STMT_BEGIN || kind == pg_sys::TransactionStmtKind::TRANS_STMT_START {
        state().explicit = true;
    }
}

/// The transaction is over.
#[inline]
pub fn end_transaction(committed: bool) {
    let mut state = state();
    state.explicit = if committed { state.commit_chains } else { state.rollback_chains };
    state.commit_chains = false;
    state.rollback_chains = false;
}

//! The guard: it follows a statement, counts each row that the statement changes before the next one is fetched,
//! and past a limit refuses it, unless an override is in order.
//!
//! `hooks` has frames only; `commit` is what happens at COMMIT and ABORT. `executor` finds out what a plan writes
//! and sees each row as it is changed, `limits` charges rows to budgets, `verdict` decides about rows past one of
//! them. `where_clause` looks for a condition where a policy requires one. `ddl` is about commands that make rows
//! vanish without changing them, `policy_writes` records what is written to the policy table past our functions,
//! `rehearsal` notes what a rehearsed statement does.
//!
//! What comes in are the calls of PostgreSQL's hooks and callbacks. What goes out are errors to be raised, and
//! events. What is promised: a row change that the command tag would count is counted once, and at most one row
//! past a limit is touched. Not promised: anything about rows that are not changed.

pub mod commit;
pub mod ddl;
pub mod executor;
pub mod hooks;
pub mod limits;
pub mod policy_writes;
pub mod rehearsal;
pub mod verdict;
pub mod where_clause;

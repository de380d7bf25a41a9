//! The guard: a statement comes in through `hooks`, each row it changes is counted before the next one is fetched, and past a
//! limit it is refused unless an override is in order.
//!
//! `hooks` holds frames only, `commit` what happens at COMMIT and ABORT. `executor` is what a plan writes and
//! each row as it is changed; `limits` the budgets that these are charged to; `verdict` what happens past one of them;
//! `where_clause` asks for a condition where a policy does; `ddl` sees to commands that make rows vanish without changing
//! them; `policy_writes` sees to what is written to the policy table past our functions; `rehearsal` notes what a rehearsed
//! statement does.
//!
//! What is promised: a row change that the command tag would count is counted once, and at most one row past a limit is
//! touched. Not promised: anything about rows that are not changed.

pub mod commit;
pub mod ddl;
pub mod executor;
pub mod hooks;
pub mod limits;
pub mod policy_writes;
pub mod rehearsal;
pub mod verdict;
pub mod where_clause;

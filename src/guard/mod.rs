//! The guard: a statement comes in through `hooks`, each row it changes is counted before the next one is fetched, and
//! past a limit it is refused unless an override is in order.
//!
//! `hooks` holds frames only. `write` reads a plan: what it writes, to which tables. `watch` follows the nodes that
//! do; `count` is what runs per row; `statement` knows which command of the client is running; `book` finds the
//! budgets that a relation is charged to (its `binding`) and charges them, `budget` keeps the numbers (pure). `further` has the limits that not every policy
//! has: `rate` takes from buckets in shared memory (`rate_memory`, by the rule in `gcra`), `block` knows transaction
//! blocks. `past` takes rows past a limit to the decision, `decide` says what happens there, `lift` what was let through on purpose, `observe` what a policy that
//! only looks on let pass, `concern` which policies a rehearsal has met. `whole` asks for a condition
//! where a policy does: `narrow` finds the tables that a plan scans whole, `path` what stands over a scan, `expression`
//! reads conditions, `condition` weighs them (pure). `ddl` looks at commands that make rows vanish without changing them
//! one by one, `leave` at tables that leave a policy's names, `live` counts their rows; `expect` holds one command to the
//! number of rows that the client said; `pooled` leaves nothing of that behind in a session that clients share. `capture` shows changed rows to who wants to see them: `image` finds a row's
//! versions, `tally` is a rehearsal's account of them.
//!
//! What is promised: a row change that the command tag would count is counted once, and at most one row past a limit is
//! touched. Not promised: anything about rows that are not changed.

pub mod binding;
pub mod block;
pub mod book;
pub mod budget;
pub mod capture;
pub mod concern;
pub mod condition;
pub mod count;
pub mod ddl;
pub mod decide;
pub mod expect;
pub mod expression;
pub mod further;
pub mod gcra;
pub mod hooks;
pub mod image;
pub mod leave;
pub mod lift;
pub mod live;
pub mod narrow;
pub mod observe;
pub mod own_tables;
pub mod past;
pub mod path;
pub mod pooled;
pub mod rate;
pub mod rate_memory;
pub mod statement;
pub mod tally;
pub mod watch;
pub mod whole;
pub mod write;

//! The guard: a statement comes in through `hooks`, each row it changes is counted before the next one is fetched, and past a
//! limit it is refused unless an override is in order.
//!
//! `hooks` holds frames only. `statement` knows which command of the client is running; `book` knows which meters a relation is charged to; `watch` follows one executor run
//! and its ModifyTable nodes; `count` is what runs per row; `budget` keeps the numbers (pure); `decide` says what
//! happens past a limit; `ddl` is the same for TRUNCATE. What is promised: a row change that the command tag would count is
//! counted once, and at most one row past a limit is touched. Not promised: anything about rows that are not changed.

pub mod book;
pub mod budget;
pub mod count;
pub mod ddl;
pub mod decide;
pub mod hooks;
pub mod statement;
pub mod watch;

//! The people's side: a request with its rehearsal, and the second person's decision about it.
//!
//! `run` runs the text of a statement; `rehearse` does so and takes it back, counting what it changed; `request` stores
//! what was found and hands out tokens; `execute` runs what was approved. Tokens leave this process once, as `approve`'s result; only their hashes are
//! stored.

pub mod execute;
pub mod preview;
pub mod rehearse;
pub mod request;
pub mod run;

//! The people's side: a request with its rehearsal, and what other people decide about it.
//!
//! `run` runs the text of a statement; `rehearse` does so and takes it back, counting what it changed, which `preview`
//! tells; `request` stores what was found, with the names of the policies that a token has to lift; `approval` knows
//! what these policies ask for now and what they have been given; `decision` is approve, reject and revoke, and hands out
//! tokens; `execute` runs what was approved; `break_glass` asks nobody. Tokens leave this process once, as the result of
//! `approve` or `break_glass`; only their hashes are stored.

pub mod approval;
pub mod break_glass;
pub mod decision;
pub mod execute;
pub mod preview;
pub mod rehearse;
pub mod request;
pub mod run;

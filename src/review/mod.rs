//! The people's side: a request with its rehearsal, and what other people decide about it.
//!
//! `run` runs the text of a statement. `rehearse` does so, counts what it changed and rolls it back; `preview` shows that, and
//! `request` stores it, with the names of the policies that a token has to lift. `approval` knows what these policies ask for
//! now and which approvals they have. `decision` is approve, reject and revoke, and hands out tokens. `execute` runs what was
//! approved. `break_glass` gives a token without a second person. `samples` and `shown` are what the views
//! show of a request.
//!
//! What comes in are calls of SQL functions. What goes out are rows of `writeguard.request` and `writeguard.approval`, events, and
//! a token: once, as the result of `approve` or `break_glass`, for only its hash is stored. Not promised: that a rehearsal leaves
//! nothing behind. Sequence numbers, and what functions did outside the database, stay.

pub mod approval;
pub mod break_glass;
pub mod decision;
pub mod execute;
pub mod preview;
pub mod rehearse;
pub mod request;
pub mod run;
pub mod samples;
pub mod shown;

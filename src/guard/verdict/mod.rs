//! What happens past a limit: pass, record, warn or refuse.
//!
//! `violation` takes rows that are past a limit to the decision, `decide` makes it and records it, `overrides` are the limits
//! that were lifted on purpose, and what bounds that. `expect` holds one command to the number of rows that the client said.
//!
//! Nothing is counted here.

pub mod decide;
pub mod expect;
pub mod overrides;
pub mod violation;

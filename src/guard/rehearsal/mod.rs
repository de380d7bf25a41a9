//! What is noted of a statement that is rehearsed: `account` has the rows that it changes, some of them
//! shown (`shown_row`), `policy_verdicts` what the policies
//! would have said of them here and now.
//!
//! The rehearsal itself, its subtransaction and its texts are `review`'s.

pub mod account;
pub mod policy_verdicts;
pub mod shown_row;

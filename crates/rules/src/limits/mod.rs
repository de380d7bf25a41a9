//! Rows against limits: `ledger` has the numbers by statement and transaction, `gcra` the rule of a rate.

pub mod gcra;
pub mod ledger;

#[path = "../../../src/guard/limits/ledger.rs"]
pub mod budget;
#[path = "../../../src/guard/where_clause/condition.rs"]
pub mod condition;
#[path = "../../../src/guard/limits/gcra.rs"]
pub mod gcra;

#[path = "../../../src/guard/budget.rs"]
pub mod budget;
#[path = "../../../src/guard/condition.rs"]
pub mod condition;
#[path = "../../../src/guard/gcra.rs"]
pub mod gcra;

#[path = "../../../src/stat/histogram.rs"]
pub mod histogram;
#[path = "../../../src/stat/suggest.rs"]
pub mod suggest;

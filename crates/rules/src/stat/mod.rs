//! What was seen of statements: `histogram` by the rows that they changed, `suggest` the limits that these suggest.

pub mod histogram;
pub mod suggest;

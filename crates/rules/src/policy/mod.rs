//! What a policy is and which of several apply: `model` is a policy as a document, `pattern` the names that it covers,
//! `schedule` the times at which it is in force, `days` the days that those start on, `limit` the limits that it may state,
//! `resolve` the rule that decides which of several apply, `document` many policies in one document, `bounds` how much of
//! all that a caller may give, `steady` how to read what may change meanwhile.

pub mod bounds;
pub mod days;
pub mod document;
pub mod limit;
pub mod model;
pub mod pattern;
pub mod resolve;
pub mod schedule;
pub mod steady;

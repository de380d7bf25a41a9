//! The rules of the guard: all that it decides without asking PostgreSQL anything, so that it can be read, tested and run under
//! an interpreter without a server.
//!
//! `policy` says which policies a document has, what they cover and which of them apply; `limits` counts rows against them;
//! `condition` weighs the conditions of a scan; `token` says what a token opens and whether it is good; `stat` makes limits
//! of what was seen; `net_change` says what one row's kept images come to. `error` has every refusal with its SQLSTATE,
//! DETAIL and HINT, `words` the words that SQL, errors and events share, `lexer` cuts SQL into pieces.
//!
//! What goes in are numbers and texts, what comes out are decisions. Nothing here knows of relations, backends or memory that
//! is shared.

#![forbid(unsafe_code)]
#![allow(missing_docs, reason = "the fields of a decision are said by their names, what is not by a comment")]

pub mod condition;
pub mod disguise;
pub mod error;
pub mod lexer;
pub mod limits;
pub mod net_change;
pub mod policy;
pub mod stat;
pub mod token;
pub mod words;

//! The parts of the extension that decide without asking PostgreSQL anything: each is the file of the extension itself,
//! under the path that it has there.

#![forbid(unsafe_code)]
// What only the extension calls.
#![allow(dead_code)]

#[path = "../../../src/error.rs"]
mod error;
mod guard;
#[path = "../../../src/lexer.rs"]
mod lexer;
mod policy;
mod stat;
mod token;
mod undo;
#[path = "../../../src/words.rs"]
mod words;

//! PostgreSQL's side of the house: what everything else reaches the server by. The only place where raw pointers, frames and
//! processes of the server are what a file is about.
//!
//! `ffi` has core's functions declared raw and the two ways across the border of errors; `ereport` raises ours, and whatever
//! is told to a client or the server log; `log_line` is a line of that which is ready; `function` is the frame of each SQL function; `contained` is for callbacks that may
//! neither fail nor panic. `backend_local` holds the statics of a backend, `shmem` is the one way to fixed tables in shared
//! memory, and `durable_file` keeps over a restart what these held. `encoding` is the one border between PostgreSQL's bytes and Rust's text, with `conversion` and `stray` behind
//! it. `owner` runs SQL of ours as the extension's owner, `process` is what a background process needs, `client` what
//! PostgreSQL knows of the other side, `row_version` finds the versions of a row that was just changed, `preload` says
//! whether the library was preloaded.

pub mod backend_local;
pub mod client;
pub mod contained;
pub mod conversion;
pub mod durable_file;
pub mod encoding;
pub mod ereport;
pub mod ffi;
pub mod function;
pub mod log_line;
pub mod owner;
pub mod preload;
pub mod process;
pub mod row_version;
pub mod shmem;
pub mod stray;

//! The border to PostgreSQL: how the library calls the server, raises through it, and keeps memory and text in it.
//!
//! * Errors: `ffi` declares core's functions raw and catches ERRORs whole, `ereport` raises ours and sends notices, `log_line`
//!   is a prepared line of the server log, `function` the frame of each SQL function. `contained` is for callbacks in which
//!   nothing may be raised, `fault` makes one fail for a test, and `client` waits for room in the client's connection
//!   before an error is sent.
//! * Memory: `backend_local` has the statics of a backend, `shmem` the areas of shared memory, and `durable_file` is a file that
//!   keeps over a restart what these held. `reserve` is what Rust allocates when there is no memory left.
//! * Text: `encoding` converts between PostgreSQL's bytes and Rust's strings, by means of `conversion` and `stray`.
//! * The server: `owner` runs SQL of ours as the extension's owner, `process` starts and sets up background processes,
//!   `row_version` finds the versions of a row that was just changed, `preload` says whether the library was preloaded.
//!
//! What comes in are the server's calls, bytes and ERRORs. What goes out are Rust values, and errors to be raised by a plain
//! old frame. Nothing here reads policies or counts rows.

pub mod backend_local;
pub mod client;
pub mod contained;
pub mod conversion;
pub mod durable_file;
pub mod encoding;
pub mod ereport;
pub mod fault;
pub mod ffi;
pub mod function;
pub mod log_line;
pub mod owner;
pub mod preload;
pub mod process;
pub mod reserve;
pub mod row_version;
pub mod shmem;
pub mod stray;

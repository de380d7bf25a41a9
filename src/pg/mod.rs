//! PostgreSQL's side of the house: what everything else reaches the server by.

pub mod backend_local;
pub mod client;
pub mod contained;
pub mod conversion;
pub mod encoding;
pub mod preload;
pub mod shmem;
pub mod stray;

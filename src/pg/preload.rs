//! Whether the server preloaded this library. Its shared memory may be missing all the same: a library that is loaded
//! after it, and does not call the hook that was there before, keeps it from being set up. (One that keeps the request
//! from core keeps the server from starting, see `shmem`.)

use super::backend_local::BackendCell;

static PRELOADED: BackendCell<bool> = BackendCell::new(false);

/// It did; called once, in the postmaster.
pub fn note() {
    PRELOADED.set(true);
}

/// Whether it did.
pub fn was() -> bool {
    PRELOADED.get()
}

/// What is to be said where the shared memory is missing.
pub const MISSING: &str = "pg_writeguard has no shared memory";
/// Why that is.
pub const WHY: &str = "A library that is loaded after it has set shmem_startup_hook and does not call the one before.";
/// What helps.
pub const WAY_OUT: &str = "Put pg_writeguard behind all others in shared_preload_libraries, and restart the server.";

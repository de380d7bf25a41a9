//! Whether the server preloaded this library. Its shared memory may be missing all the same: a library that is loaded
//! after it, and does not call the hook that was there before, keeps it from being set up. (One that keeps the request
//! from core keeps the server from starting, see `shmem`.)

use super::backend_local::BackendCell;

static PRELOADED: BackendCell<bool> = BackendCell::new(false);

/// The library is preloaded; called once, in the postmaster.
pub fn note() {
    PRELOADED.set(true);
}

/// Whether the library was preloaded.
pub fn was() -> bool {
    PRELOADED.get()
}

static ATTACHED: BackendCell<bool> = BackendCell::new(false);

/// This process is attached to the library's shared memory.
pub fn note_attached() {
    ATTACHED.set(true);
}

/// Whether it is attached: the library was preloaded, and no other one kept its shared memory from being set up.
pub fn is_attached() -> bool {
    ATTACHED.get()
}

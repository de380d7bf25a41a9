//! Whether the library has something to forget when the transaction ends. Most transactions only read, and cost one compare
//! there.

use crate::pg::backend_local::BackendCell;

static TOUCHED: BackendCell<bool> = BackendCell::new(false);

/// There is something to forget when this transaction ends.
#[inline(always)]
pub fn touch() {
    TOUCHED.set(true);
}

/// Whether there is.
pub fn is_touched() -> bool {
    TOUCHED.get()
}

/// Whether there is, and from now on there is not.
#[inline(always)]
pub fn take_touched() -> bool {
    TOUCHED.replace(false)
}

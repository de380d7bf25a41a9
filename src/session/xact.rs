//! Whether something of the library's is to be told of the transaction's end: most transactions only read, and cost nothing
//! there.

use crate::pg::backend_local::BackendCell;

static TOUCHED: BackendCell<bool> = BackendCell::new(false);

/// Something is to be told of it.
#[inline(always)]
pub fn touch() {
    TOUCHED.set(true);
}

/// Whether anything is; asks once.
#[inline(always)]
pub fn take_touched() -> bool {
    TOUCHED.replace(false)
}

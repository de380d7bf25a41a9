//! A run of rows that is not charged yet: rows that one node changes one after the other, within every limit. As long as
//! nobody wants to know the numbers, a row costs an increment and not a visit to each of its meters.
//!
//! It is read and written for each row, also in plain old frames, so it is not borrowed: nobody makes a reference of it that
//! lives across a call.

use core::ffi::c_void;
use core::ptr;
use std::rc::Rc;

use pgrx::pg_sys;
use rules::words::{Operation, Place};

use super::binding::Binding;
use crate::pg::backend_local::BackendLocal;

/// The run that is open.
pub struct Run {
    /// Whose rows they are; NULL: nobody's. Compared, and known to the owner alone.
    pub owner: *mut c_void,
    /// The owner's child, where nothing but counting is to be done between two of its rows; else NULL.
    pub child: *mut pg_sys::PlanState,
    /// The owner's binding that they are charged to.
    pub index: usize,
    /// The same as the owner's node has it, where there is a child.
    pub result: i32,
    /// Rows that may still join.
    pub left: u64,
    pub rows: u64,
    pub operation: Operation,
    pub place: Place,
    pub binding: Option<Rc<Binding>>,
}

static RUN: BackendLocal<Run> = BackendLocal::new(Run {
    owner: ptr::null_mut(),
    child: ptr::null_mut(),
    index: 0,
    result: 0,
    left: 0,
    rows: 0,
    operation: Operation::Update,
    place: Place { statement: 0, level: 0 },
    binding: None,
});

/// The run, in place.
#[inline(always)]
pub const fn run() -> *mut Run {
    RUN.get()
}

/// Opens another run. The one before is charged already.
pub fn open(new: Run) {
    // SAFETY: as above; what the old one held is put down without coming back here.
    unsafe { *run() = new };
}

/// Has a row join, where the run is open for it.
#[inline]
pub fn join(owner: *mut c_void, index: usize, operation: Operation) -> bool {
    // SAFETY: as above.
    unsafe {
        let run = run();
        if (*run).owner != owner || (*run).left == 0 || (*run).index != index || (*run).operation != operation {
            return false;
        }
        (*run).left -= 1;
        (*run).rows += 1;
    }
    true
}

/// Closes the run; gives the number of its rows.
#[inline]
pub fn close() -> u64 {
    // SAFETY: as above.
    unsafe {
        let run = run();
        (*run).owner = ptr::null_mut();
        (*run).child = ptr::null_mut();
        (*run).left = 0;
        (*run).rows
    }
}

/// Takes the rows of a run that was closed.
pub fn take() -> (u64, Operation, Place, Option<Rc<Binding>>) {
    // SAFETY: as above.
    unsafe {
        let run = run();
        let rows = core::mem::take(&mut (*run).rows);
        (rows, (*run).operation, (*run).place, (*run).binding.take())
    }
}

/// Whose the run is; NULL: nobody's.
pub fn owner() -> *mut c_void {
    // SAFETY: as above.
    unsafe { (*run()).owner }
}

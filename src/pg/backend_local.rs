//! Statics of a backend.
//!
//! A backend is one thread, so a plain static serves where `thread_local!` would cost a call on each access in a shared
//! library. Two kinds:
//!
//! * [`BackendCell`], for a value that is copied in and out. Nothing can alias, so frames that an ERROR may jump over and
//!   callbacks that come at any moment read and write it as they like.
//! * [`BackendLocal`], for everything else: [`borrow`](BackendLocal::borrow) hands it out to one at a time. In builds
//!   with debug assertions a second borrow panics and says who holds the first; otherwise a borrow costs nothing, and
//!   the tests that run with assertions are what says that there is no second one.
//!
//! While a borrow lives nothing may be called that may borrow the same static, that runs other people's code (SPI, output
//! functions, the executor), that sends the client something, or that an ERROR may jump out of: inside
//! [`protect`](crate::pg::ffi::protect), or where pgrx turns the ERROR into a panic, it does not.

use core::cell::{Cell, UnsafeCell};
use core::ops::{Deref, DerefMut};
#[cfg(debug_assertions)]
use core::panic::Location;

/// A value of this backend that is lent out to one at a time.
pub struct BackendLocal<T: 'static> {
    value: UnsafeCell<T>,
    /// Where the static is, to be named in a complaint.
    #[cfg(debug_assertions)]
    defined: &'static Location<'static>,
    /// Who has it now.
    #[cfg(debug_assertions)]
    lent: Cell<Option<&'static Location<'static>>>,
}

// SAFETY: backends and background workers are single-threaded; nothing in this library starts a thread.
unsafe impl<T> Sync for BackendLocal<T> {}

impl<T> BackendLocal<T> {
    /// A static's initial value.
    #[track_caller]
    pub const fn new(value: T) -> Self {
        Self {
            value: UnsafeCell::new(value),
            #[cfg(debug_assertions)]
            defined: Location::caller(),
            #[cfg(debug_assertions)]
            lent: Cell::new(None),
        }
    }

    /// The place itself, for plain old frames. Whoever makes a reference of it answers for that there is no other one.
    #[inline(always)]
    pub const fn get(&self) -> *mut T {
        self.value.get()
    }

    /// The value, for as long as the answer lives and for nobody else.
    #[inline(always)]
    #[track_caller]
    pub fn borrow(&'static self) -> Borrowed<T> {
        #[cfg(debug_assertions)]
        {
            if let Some(holder) = self.lent.get() {
                panic!("the static at {} is borrowed while {holder} has it", self.defined);
            }
            self.lent.set(Some(Location::caller()));
        }
        Borrowed(self)
    }
}

/// A static's value, until this is dropped.
pub struct Borrowed<T: 'static>(&'static BackendLocal<T>);

impl<T> Deref for Borrowed<T> {
    type Target = T;

    #[inline(always)]
    fn deref(&self) -> &T {
        // SAFETY: there is one borrow at a time (see the file), and this is it.
        unsafe { &*self.0.value.get() }
    }
}

impl<T> DerefMut for Borrowed<T> {
    #[inline(always)]
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: as above.
        unsafe { &mut *self.0.value.get() }
    }
}

#[cfg(debug_assertions)]
impl<T> Drop for Borrowed<T> {
    fn drop(&mut self) {
        self.0.lent.set(None);
    }
}

/// A value of this backend that is copied in and out.
pub struct BackendCell<T>(Cell<T>);

// SAFETY: as for `BackendLocal`.
unsafe impl<T> Sync for BackendCell<T> {}

impl<T: Copy> BackendCell<T> {
    /// A static's initial value.
    pub const fn new(value: T) -> Self {
        Self(Cell::new(value))
    }

    /// The value.
    #[inline(always)]
    pub fn get(&self) -> T {
        self.0.get()
    }

    /// Another value.
    #[inline(always)]
    pub fn set(&self, value: T) {
        self.0.set(value);
    }

    /// Another value for the one that it was.
    #[inline(always)]
    pub fn replace(&self, value: T) -> T {
        self.0.replace(value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_borrow_after_the_other() {
        static NUMBERS: BackendLocal<Vec<i32>> = BackendLocal::new(Vec::new());
        NUMBERS.borrow().push(1);
        let mut numbers = NUMBERS.borrow();
        numbers.push(2);
        drop(numbers);
        assert_eq!(*NUMBERS.borrow(), [1, 2]);
    }

    #[test]
    #[cfg(debug_assertions)]
    fn never_two_at_once() {
        static NUMBERS: BackendLocal<Vec<i32>> = BackendLocal::new(Vec::new());
        let first = NUMBERS.borrow();
        let second = std::panic::catch_unwind(|| NUMBERS.borrow().push(1));
        let said = second.unwrap_err().downcast::<String>().unwrap();
        assert!(said.contains(file!()), "{said}");
        drop(first);
        // What a panic takes along is free again.
        let panicked = std::panic::catch_unwind(|| {
            let _numbers = NUMBERS.borrow();
            panic!("in between");
        });
        assert!(panicked.is_err());
        NUMBERS.borrow().push(2);
        assert_eq!(*NUMBERS.borrow(), [2]);
    }

    #[test]
    fn a_cell_is_read_and_written() {
        static NUMBER: BackendCell<i32> = BackendCell::new(1);
        assert_eq!(NUMBER.replace(2), 1);
        NUMBER.set(3);
        assert_eq!(NUMBER.get(), 3);
    }
}

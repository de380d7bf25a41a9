//! The one way to fixed tables in shared memory.
//!
//! A region is asked for in `shmem_request_hook`, and found or made in `shmem_startup_hook` by every process that attaches
//! to shared memory; all bytes are zero at first. It has three parts: what is `Open`, atomics that everybody reads and
//! changes without a lock; what is `Guarded`, which is reached through its LWLock alone; and what follows these two, as
//! much as was asked for, whose owner says how it is read.
//!
//! These are fixed tables, and not ShmemInitHash or dshash: where a table is full the quietest entry has to give way, which
//! dynahash cannot find under the lock of one partition, and dshash grows by memory that can be refused where nothing may
//! fail and that the postmaster cannot read when it is the last process.
//!
//! Under a lock nothing allocates, sleeps, or calls anything that may raise: it is held for a copy of bytes at most. If a
//! panic passes all the same, the lock is released on the way.

use core::ffi::{CStr, c_int};
use core::marker::PhantomData;
use core::ops::{Deref, DerefMut};
use core::ptr;

use pgrx::pg_sys;

use super::backend_local::BackendCell;
use super::ffi;

/// What can lie in shared memory as it is.
///
/// # Safety
/// All zeroes are a value of it, it has nothing to drop, and it holds no pointer into a process's own memory.
pub unsafe trait Plain {}

// SAFETY: nothing at all.
unsafe impl Plain for () {}
// SAFETY: as plain as what is in it.
unsafe impl<T: Plain, const COUNT: usize> Plain for [T; COUNT] {}
// SAFETY: a number.
unsafe impl Plain for core::sync::atomic::AtomicU64 {}

#[repr(C)]
struct Layout<Open, Guarded> {
    open: Open,
    guarded: Guarded,
}

/// Where a process has a region; NULL before it is attached.
#[derive(Clone, Copy)]
struct Place {
    base: *mut u8,
    lock: *mut pg_sys::LWLock,
}

/// A piece of shared memory under a name, which is also that of its lock.
pub struct Region<Open: 'static, Guarded: 'static> {
    name: &'static CStr,
    requested: BackendCell<bool>,
    /// Set where shared memory is attached, and in the postmaster again after a crash.
    place: BackendCell<Place>,
    parts: PhantomData<Layout<Open, Guarded>>,
}

// SAFETY: backends are single-threaded; see `backend_local`.
unsafe impl<Open, Guarded> Sync for Region<Open, Guarded> {}

impl<Open: Plain + Sync, Guarded: Plain> Region<Open, Guarded> {
    /// A region that was not asked for yet.
    pub const fn new(name: &'static CStr) -> Self {
        Self {
            name,
            requested: BackendCell::new(false),
            place: BackendCell::new(Place { base: ptr::null_mut(), lock: ptr::null_mut() }),
            parts: PhantomData,
        }
    }

    const fn bytes(following: usize) -> usize {
        size_of::<Layout<Open, Guarded>>() + following
    }

    /// Asks for the region, with so many bytes after its two parts.
    ///
    /// # Safety
    /// From a plain old frame in `shmem_request_hook`.
    #[expect(ffi_unwind_calls, reason = "plain old frame")]
    pub unsafe fn request(&self, following: usize) {
        // SAFETY: the caller's promise.
        unsafe {
            ffi::RequestAddinShmemSpace(Self::bytes(following));
            ffi::RequestNamedLWLockTranche(self.name.as_ptr(), 1);
        }
        self.requested.set(true);
    }

    /// Finds the region, or makes it: true where it was made. Ends the server's start where it was never asked for.
    ///
    /// # Safety
    /// From a plain old frame in `shmem_startup_hook`; `following` is what was asked for.
    #[expect(ffi_unwind_calls, reason = "plain old frame")]
    pub unsafe fn startup(&self, following: usize) -> bool {
        // SAFETY: the caller's promise; the memory is as large as asked for and maximally aligned.
        unsafe {
            if !self.requested.get() {
                never_asked();
            }
            let bytes = Self::bytes(following);
            let mut found = false;
            let base = ffi::ShmemInitStruct(self.name.as_ptr(), bytes, &mut found).cast::<u8>();
            if !found {
                base.write_bytes(0, bytes);
            }
            let lock = &raw mut (*ffi::GetNamedLWLockTranche(self.name.as_ptr())).lock;
            self.place.set(Place { base, lock });
            !found
        }
    }

    fn layout(&self) -> Option<*mut Layout<Open, Guarded>> {
        let base = self.place.get().base;
        (!base.is_null()).then_some(base.cast())
    }

    /// What needs no lock; none where the library was not preloaded.
    #[inline]
    pub fn open(&self) -> Option<&'static Open> {
        // SAFETY: shared memory lives as long as the process; what is open is changed through shared references only.
        self.layout().map(|layout| unsafe { &(*layout).open })
    }

    /// Where what follows the two parts begins.
    #[inline]
    pub fn following<T: Plain>(&self) -> Option<*mut T> {
        // SAFETY: one past the parts is inside the region, or its end.
        self.layout().map(|layout| unsafe { layout.add(1).cast() })
    }

    /// The region with its lock, exclusively.
    pub fn lock(&'static self) -> Option<Locked<Open, Guarded>> {
        let layout = self.layout()?;
        let lock = self.place.get().lock;
        // SAFETY: the lock lives in shared memory.
        unsafe { pg_sys::LWLockAcquire(lock, pg_sys::LWLockMode::LW_EXCLUSIVE) };
        Some(Locked(Held(lock), layout))
    }

    /// The same, unless somebody holds the lock now.
    pub fn try_lock(&'static self) -> Option<Locked<Open, Guarded>> {
        let layout = self.layout()?;
        let lock = self.place.get().lock;
        // SAFETY: as above; this one never waits.
        let is_free = unsafe { pg_sys::LWLockConditionalAcquire(lock, pg_sys::LWLockMode::LW_EXCLUSIVE) };
        is_free.then(|| Locked(Held(lock), layout))
    }

    /// The region with its lock, to be read.
    pub fn lock_shared(&'static self) -> Option<Shared<Open, Guarded>> {
        let layout = self.layout()?;
        let lock = self.place.get().lock;
        // SAFETY: the lock lives in shared memory.
        unsafe { pg_sys::LWLockAcquire(lock, pg_sys::LWLockMode::LW_SHARED) };
        Some(Shared(Held(lock), layout))
    }
}

/// A lock that is held until this is dropped.
struct Held(*mut pg_sys::LWLock);

impl Drop for Held {
    fn drop(&mut self) {
        // SAFETY: we hold it. An ERROR on the way here has forgotten that interrupts are held off, which the release
        // counts down.
        unsafe {
            pg_sys::InterruptHoldoffCount = pg_sys::InterruptHoldoffCount.max(1);
            pg_sys::LWLockRelease(self.0);
        }
    }
}

/// What is guarded, with its lock.
pub struct Locked<Open: 'static, Guarded: 'static>(
    #[expect(dead_code, reason = "held")] Held,
    *mut Layout<Open, Guarded>,
);

impl<Open, Guarded> Deref for Locked<Open, Guarded> {
    type Target = Guarded;

    fn deref(&self) -> &Guarded {
        // SAFETY: under the exclusive lock nobody else has it, in no process.
        unsafe { &(*self.1).guarded }
    }
}

impl<Open, Guarded> DerefMut for Locked<Open, Guarded> {
    fn deref_mut(&mut self) -> &mut Guarded {
        // SAFETY: as above.
        unsafe { &mut (*self.1).guarded }
    }
}

/// What is guarded, to be read.
pub struct Shared<Open: 'static, Guarded: 'static>(
    #[expect(dead_code, reason = "held")] Held,
    *mut Layout<Open, Guarded>,
);

impl<Open, Guarded> Deref for Shared<Open, Guarded> {
    type Target = Guarded;

    fn deref(&self) -> &Guarded {
        // SAFETY: under the shared lock nobody changes it.
        unsafe { &(*self.1).guarded }
    }
}

/// The server cannot start: our request went to nobody.
#[cold]
#[expect(ffi_unwind_calls, reason = "plain old frame")]
unsafe fn never_asked() {
    // SAFETY: plain old frame; elog.c copies the texts, and FATAL does not come back.
    unsafe {
        if ffi::errstart(pg_sys::FATAL as c_int, ptr::null()) {
            ffi::errcode(OBJECT_NOT_IN_PREREQUISITE_STATE);
            ffi::errmsg_internal(c"pg_writeguard could not ask for its shared memory".as_ptr());
            ffi::errdetail_internal(
                c"A library that is loaded after it has set shmem_request_hook and does not call the one before."
                    .as_ptr(),
            );
            ffi::errhint(c"Put pg_writeguard behind it in shared_preload_libraries.".as_ptr());
            ffi::errfinish(c"pg_writeguard".as_ptr(), 0, ptr::null());
        }
    }
}

/// 55000, as `MAKE_SQLSTATE` packs it.
const OBJECT_NOT_IN_PREREQUISITE_STATE: c_int = 5 | 5 << 6;

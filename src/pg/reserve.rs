//! What Rust allocates when there is no memory left.
//!
//! Where an allocation fails, Rust ends the process, which takes the whole server along; PostgreSQL raises an ERROR, and only
//! the statement is lost. So each process has a little memory in reserve, which is handed out while the system gives none.
//! Whoever can fail asks [`is_low`] and does: [`guarded`](super::ereport::guarded) when it is done, and whatever takes a text
//! in. Those who cannot, because a transaction has committed or is being rolled back, continue with the reserve.
//!
//! What is too large for it is for callers that ask whether there is room (`try_reserve`). Where one does not ask, Rust still
//! ends the process, but by our [`abort`](__wrap_abort): as a FATAL error of PostgreSQL's, which is the end of the session and
//! of nothing else.

use core::cell::{Cell, UnsafeCell};
use core::mem::MaybeUninit;
use core::ptr;
use std::alloc::{GlobalAlloc, Layout, System};

/// All of it. Not touched before it is needed, so it costs addresses only.
const SIZE: usize = 512 * 1024;
/// Pieces have the sizes 16, 32, 64 and so on; those that are given back wait in a list of their size.
const SMALLEST: usize = 16;
const SIZES: usize = 14;

#[repr(C, align(4096))]
struct Room(UnsafeCell<[MaybeUninit<u8>; SIZE]>);

struct Reserve {
    room: Room,
    /// Bytes from the beginning that were handed out once.
    used: Cell<usize>,
    /// The first piece of each size that was given back, which begins with the address of the next one.
    free: [Cell<*mut u8>; SIZES],
    /// Something was handed out since the last look.
    is_low: Cell<bool>,
    /// What runs now must not fail.
    must_go_on: Cell<bool>,
    /// There was nothing for whoever asked last, neither of the system's nor here.
    is_out: Cell<bool>,
    /// Ends the session.
    end: Cell<Option<fn()>>,
}

// SAFETY: backends and background workers are single-threaded; nothing in this library starts a thread.
unsafe impl Sync for Reserve {}

static RESERVE: Reserve = Reserve {
    room: Room(UnsafeCell::new([MaybeUninit::uninit(); SIZE])),
    used: Cell::new(0),
    free: [const { Cell::new(ptr::null_mut()) }; SIZES],
    is_low: Cell::new(false),
    must_go_on: Cell::new(false),
    is_out: Cell::new(false),
    end: Cell::new(None),
};

impl Reserve {
    fn has(&self, piece: *const u8) -> bool {
        (piece as usize).wrapping_sub(self.room.0.get() as usize) < SIZE
    }

    /// The place of its size, and the size itself; none where it is too large.
    fn size_of(layout: Layout) -> Option<(usize, usize)> {
        let size = layout.size().max(layout.align()).max(SMALLEST).checked_next_power_of_two()?;
        let place = (size / SMALLEST).trailing_zeros() as usize;
        (place < SIZES && layout.align() <= SMALLEST).then_some((place, size))
    }

    #[cold]
    fn hand_out(&self, layout: Layout) -> *mut u8 {
        self.is_out.set(true);
        let Some((place, size)) = Self::size_of(layout) else { return ptr::null_mut() };
        self.is_low.set(true);
        let waiting = self.free[place].get();
        if !waiting.is_null() {
            // SAFETY: a piece that nobody has, with the next one's address in it.
            self.free[place].set(unsafe { waiting.cast::<*mut u8>().read() });
            self.is_out.set(false);
            return waiting;
        }
        let used = self.used.get();
        if size > SIZE - used {
            return ptr::null_mut();
        }
        self.used.set(used + size);
        self.is_out.set(false);
        // SAFETY: inside the room, by the line before.
        unsafe { self.room.0.get().cast::<u8>().add(used) }
    }

    #[cold]
    fn take_back(&self, piece: *mut u8, layout: Layout) {
        let Some((place, _)) = Self::size_of(layout) else { return };
        // SAFETY: at least as large as an address, aligned to it, and nobody's any more.
        unsafe { piece.cast::<*mut u8>().write(self.free[place].get()) };
        self.free[place].set(piece);
    }
}

/// The allocator of this library.
struct Allocator;

#[global_allocator]
static ALLOCATOR: Allocator = Allocator;

// SAFETY: what the system gives is given back to it, and what the reserve gives to that; pieces do not overlap, and are as
// large and as aligned as asked for.
unsafe impl GlobalAlloc for Allocator {
    #[inline]
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promise.
        let piece = unsafe { System.alloc(layout) };
        if piece.is_null() { RESERVE.hand_out(layout) } else { piece }
    }

    #[inline]
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promise; a piece of the reserve is as large as the layout says.
        unsafe {
            let mut piece = System.alloc_zeroed(layout);
            if piece.is_null() {
                piece = RESERVE.hand_out(layout);
                if !piece.is_null() {
                    piece.write_bytes(0, layout.size());
                }
            }
            piece
        }
    }

    #[inline]
    unsafe fn dealloc(&self, piece: *mut u8, layout: Layout) {
        if RESERVE.has(piece) {
            RESERVE.take_back(piece, layout);
        } else {
            // SAFETY: the caller's promise.
            unsafe { System.dealloc(piece, layout) };
        }
    }

    #[inline]
    unsafe fn realloc(&self, piece: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: the caller's promise; both pieces are as large as what is copied.
        unsafe {
            if !RESERVE.has(piece) {
                let larger = System.realloc(piece, layout, size);
                if !larger.is_null() {
                    return larger;
                }
            }
            let larger = self.alloc(Layout::from_size_align_unchecked(size, layout.align()));
            if !larger.is_null() {
                larger.copy_from_nonoverlapping(piece, layout.size().min(size));
                self.dealloc(piece, layout);
            }
            larger
        }
    }
}

unsafe extern "C" {
    /// The C library's own.
    fn __real_abort() -> !;
}

/// What the linker puts in the place of `abort` in this library (see build.rs): Rust calls it where an allocation has failed,
/// and where something is so wrong that no frame can be trusted any more. In the first case nothing is: whoever asked for
/// memory has changed nothing yet. No frame of ours is gone back to; the session ends as it does for any FATAL error.
#[unsafe(no_mangle)]
extern "C" fn __wrap_abort() -> ! {
    if RESERVE.is_out.get() {
        // Once: what ends the session may come here too.
        RESERVE.is_out.set(false);
        if let Some(end) = RESERVE.end.get() {
            end();
        }
    }
    // SAFETY: ends the process.
    unsafe { __real_abort() }
}

/// Says what ends the session, which lies above.
pub fn ends_by(end: fn()) {
    RESERVE.end.set(Some(end));
}

/// What runs from now on, until this is called again with what it gives, must not fail: it continues with the reserve.
#[inline]
pub fn go_on(must: bool) -> bool {
    RESERVE.must_go_on.replace(must)
}

/// Whether the reserve had to help out, there is no memory to be had still, and what runs now may fail for it.
#[inline]
pub fn is_low() -> bool {
    RESERVE.is_low.get() && is_low_still()
}

#[cold]
fn is_low_still() -> bool {
    const SOME: Layout = Layout::new::<[u8; 16 * 1024]>();
    if RESERVE.must_go_on.get() {
        return false;
    }
    // SAFETY: a size that is not 0; given back at once.
    unsafe {
        // Not to be taken for a request that nobody needs.
        let piece = core::hint::black_box(System.alloc(SOME));
        if !piece.is_null() {
            System.dealloc(piece, SOME);
            RESERVE.is_low.set(false);
        }
        piece.is_null()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout(size: usize) -> Layout {
        Layout::from_size_align(size, 8).unwrap()
    }

    #[test]
    fn pieces_are_apart_and_are_used_again() {
        let reserve = &RESERVE;
        let mut pieces: Vec<(*mut u8, usize)> =
            [1, 16, 17, 100, 4_000, 65_000].into_iter().map(|size| (reserve.hand_out(layout(size)), size)).collect();
        for (place, (piece, size)) in pieces.iter().enumerate() {
            assert!(reserve.has(*piece) && reserve.has(piece.wrapping_add(size - 1)));
            for (other, _) in &pieces[place + 1..] {
                assert!((*other as usize) >= (*piece as usize) + size);
            }
        }
        let used = reserve.used.get();
        for _ in 0..1_000 {
            for (piece, size) in &mut pieces {
                reserve.take_back(*piece, layout(*size));
                *piece = reserve.hand_out(layout(*size));
            }
        }
        assert_eq!(reserve.used.get(), used);
        assert!(reserve.hand_out(layout(SIZE)).is_null());
        assert!(reserve.hand_out(Layout::from_size_align(16, 4_096).unwrap()).is_null());
        assert!(!reserve.has(ptr::from_ref(&used).cast()));
        assert!(!is_low(), "there is memory");
        let mut many = 0;
        while !reserve.hand_out(layout(1_000)).is_null() {
            many += 1;
        }
        assert!(many > 200 && many * 1_024 <= SIZE);
    }
}

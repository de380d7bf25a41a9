//! The text of a client's statement: where it is in the string that the client sent, and a copy of its beginning.
//!
//! A string may have very many commands, and a gigabyte. So its length is counted once, each part of it is cut into pieces
//! once, and what is copied is bounded.

use core::ffi::{CStr, c_char};
use core::ptr;
use std::borrow::Cow;

use pgrx::pg_sys;
use rules::lexer::bounds;
#[cfg(since_pg18)]
use rules::lexer::start_of;

use super::excerpt::MOST_BYTES;
use crate::pg::backend_local::BackendLocal;
use crate::pg::encoding;
use crate::pg::ffi::{self, Opaque};

/// A statement's part of the client's string: where it is, for as long as the string is there, and its beginning, copied, because what
/// it was copied from may go before the statement does.
pub struct Text {
    /// The client's string, where the statement has no portal that has it.
    source: *const c_char,
    /// The part of the string.
    from: usize,
    to: usize,
    /// Used again and again.
    kept: Vec<u8>,
}

/// What is known of the string that the client's message has, whose commands come one after the other: without this,
/// each of them would look at all that stands before it and behind it.
struct ClientString {
    /// NULL: nothing is known. Forgotten when the message's memory goes.
    source: *const c_char,
    length: usize,
    /// Up to where it was cut into pieces: the end of a command.
    scanned: usize,
    callback: pg_sys::MemoryContextCallback,
    /// The callback waits for the memory to go.
    registered: bool,
}

static CLIENT_STRING: BackendLocal<ClientString> = BackendLocal::new(ClientString {
    source: ptr::null(),
    length: 0,
    scanned: 0,
    callback: pg_sys::MemoryContextCallback { func: None, arg: ptr::null_mut(), next: ptr::null_mut() },
    registered: false,
});

/// A buffer that grew past this many bytes is given back with its transaction.
const KEPT_BUFFER: usize = 4 * 1024;

impl Text {
    /// No text.
    pub const fn new() -> Self {
        Self { source: ptr::null(), from: 0, to: 0, kept: Vec::new() }
    }

    /// Notes the part of a string that is a statement, and copies its beginning. Says whether something comes after it and its
    /// semicolon.
    ///
    /// # Safety
    /// `source` is NULL or a C string, of which the location is a part.
    pub unsafe fn keep(&mut self, source: *const c_char, location: i32, length: i32) -> bool {
        self.kept.clear();
        (self.source, self.from, self.to) = (source, 0, 0);
        if source.is_null() {
            return false;
        }
        // SAFETY: the caller's promise: a C string, of which the location is a part.
        let bytes = unsafe {
            core::slice::from_raw_parts(source.cast::<u8>(), length_of(source, location == 0 && length == 0))
        };
        let first = usize::try_from(location).unwrap_or(0).min(bytes.len());
        let to = match usize::try_from(length) {
            Ok(length) if length > 0 => first.saturating_add(length).min(bytes.len()),
            _ => bytes.len(),
        };
        // SAFETY: as above.
        let from = unsafe { start(source, bytes, first, to) };
        let part = bounds(&bytes[from..to]);
        (self.from, self.to) = (from + part.start, from + part.end);
        self.kept.extend_from_slice(encoding::beginning(&bytes[self.from..self.to], MOST_BYTES));
        to.saturating_add(1) < bytes.len()
    }

    /// All of the text, in the server's encoding, where it is still to be had: a copy of a short one, and a long one where
    /// it is, until the message is over. `portal` is the statement's, or NULL.
    ///
    /// # Safety
    /// The portal is alive.
    pub unsafe fn whole(&self, portal: pg_sys::Portal) -> Option<Cow<'static, [u8]>> {
        if self.kept.len() == self.to - self.from {
            return Some(Cow::Owned(self.kept.clone()));
        }
        // SAFETY: the portal is alive, and its text with it, unless the portal is NULL; the client's string is, as long
        // as it is known.
        unsafe {
            let source = if !portal.is_null() {
                (*portal).sourceText
            } else if self.source == (*CLIENT_STRING.get()).source {
                self.source
            } else {
                return None;
            };
            Some(Cow::Borrowed(core::slice::from_raw_parts(source.cast::<u8>().add(self.from), self.to - self.from)))
        }
    }

    /// A copy of what is kept, and how many bytes there are in all.
    pub fn beginning(&self) -> (Vec<u8>, usize) {
        (self.kept.clone(), self.to - self.from)
    }

    /// Its transaction is over and nothing needs it any more: a large buffer is given back.
    pub fn give_back(&mut self) {
        if self.kept.capacity() > KEPT_BUFFER {
            *self = Self::new();
        }
    }
}

/// The length of a C string. That of the client's message is asked for by each command in it, and is counted once. Of a
/// short one that is a single command, which `is_alone` says, nothing need be known later.
unsafe fn length_of(source: *const c_char, is_alone: bool) -> usize {
    // SAFETY: the caller's promise. The callback is a static, and the message's memory goes with the next message at the
    // latest; what was registered twice would make a ring.
    unsafe {
        let string = CLIENT_STRING.get();
        if (*string).source == source {
            return (*string).length;
        }
        let length = CStr::from_ptr(source).count_bytes();
        if is_alone && length <= MOST_BYTES {
            return length;
        }
        let is_messages =
            source == pg_sys::debug_query_string && pg_sys::MyBackendType == pg_sys::BackendType::B_BACKEND;
        if is_messages && !pg_sys::MessageContext.is_null() {
            ((*string).source, (*string).length, (*string).scanned) = (source, length, 0);
            if !core::mem::replace(&mut (*string).registered, true) {
                (*string).callback.func = Some(message_gone);
                ffi::MemoryContextRegisterResetCallback(pg_sys::MessageContext, &raw mut (*string).callback);
            }
        }
        length
    }
}

/// Reset callback on the memory of the client's message.
unsafe extern "C-unwind" fn message_gone(_argument: Opaque) {
    // SAFETY: a static of this process.
    unsafe {
        let string = CLIENT_STRING.get();
        ((*string).source, (*string).registered) = (ptr::null(), false);
    }
}

/// Where the text of a statement begins that has its first word at `first` and its end at `to`. Up to 17 PostgreSQL's
/// parser says that itself.
#[cfg(not(since_pg18))]
unsafe fn start(_source: *const c_char, _bytes: &[u8], first: usize, _to: usize) -> usize {
    first
}

/// The same: each part of the client's string is cut into pieces once, however many commands it has.
#[cfg(since_pg18)]
unsafe fn start(source: *const c_char, bytes: &[u8], first: usize, to: usize) -> usize {
    // SAFETY: statics of this process.
    unsafe {
        let string = CLIENT_STRING.get();
        let is_known = (*string).source == source;
        let done = if is_known && (*string).scanned <= first { (*string).scanned } else { 0 };
        let from = done + start_of(&bytes[done..], first - done, ffi::backslash_escapes());
        if is_known {
            (*string).scanned = to;
        }
        from
    }
}

//! A small file that is there after a restart: beside PostgreSQL's own statistics, written whole or not at all.
//!
//! Read where shared memory is set up afresh, and written by the postmaster when it is the last process; after a crash what
//! shared memory held cannot be trusted, and the file stays as it was. What fails is said in the server log and nowhere else.

use core::ffi::CStr;
use std::path::Path;
use std::{fs, io};

use pgrx::pg_sys;

use super::contained::contained;
use super::ereport::log_line;
use super::ffi;

/// A file by its name, relative to the data directory, where every process of the server works.
pub struct DurableFile {
    name: &'static CStr,
    /// Where it is written before it takes that name.
    unfinished: &'static CStr,
}

impl DurableFile {
    /// A file; `unfinished` is in the same directory.
    pub const fn new(name: &'static CStr, unfinished: &'static CStr) -> Self {
        Self { name, unfinished }
    }

    fn path(name: &CStr) -> &Path {
        Path::new(name.to_str().unwrap_or_default())
    }

    fn log(&self, what: &str, error: &io::Error) {
        log_line(&format!("pg_writeguard: could not {what} \"{}\": {error}", Self::path(self.name).display()), None);
    }

    /// Its name, for messages.
    pub fn name(&self) -> &'static str {
        self.name.to_str().unwrap_or_default()
    }

    /// What is in it; none where there is no such file, or it cannot be read.
    pub fn read(&self) -> Option<Vec<u8>> {
        match fs::read(Self::path(self.name)) {
            Ok(bytes) => Some(bytes),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => {
                self.log("read", &error);
                None
            }
        }
    }

    /// Whether there is such a file.
    pub fn exists(&self) -> bool {
        Self::path(self.name).exists()
    }

    /// Writes it. False when that fails.
    #[expect(ffi_unwind_calls, reason = "inside protect")]
    pub fn write(&self, bytes: &[u8]) -> bool {
        if let Err(error) = fs::write(Self::path(self.unfinished), bytes) {
            self.log("write", &error);
            return false;
        }
        let mut renamed = false;
        // SAFETY: nothing but the raw call inside, which writes what fails to the server log. With `fsync` off it leaves the
        // writing to the kernel, as PostgreSQL does with its own files.
        let raised = unsafe {
            ffi::protect(|| {
                renamed = ffi::durable_rename(self.unfinished.as_ptr(), self.name.as_ptr(), pg_sys::LOG as i32) == 0;
            })
        };
        raised.is_ok() && renamed
    }

    /// Removes it, where it is there.
    pub fn remove(&self) {
        if let Err(error) = fs::remove_file(Self::path(self.name))
            && error.kind() != io::ErrorKind::NotFound
        {
            self.log("remove", &error);
        }
    }
}

/// Shared memory was set up afresh: `restore` puts back what was stored, and `shutdown` is called when the server stops in
/// order; it looks by itself whether its argument, the exit code, is 0.
///
/// # Safety
/// In the postmaster (or the single-user backend), from a plain old frame.
#[expect(ffi_unwind_calls, reason = "plain old frame")]
pub unsafe fn between_restarts(
    reading: &str,
    restore: fn(),
    shutdown: unsafe extern "C-unwind" fn(i32, pg_sys::Datum),
) {
    contained(reading, restore);
    // SAFETY: a plain old frame; the callback lives as long as the process.
    unsafe { ffi::on_shmem_exit(Some(shutdown), pg_sys::Datum::from(0)) };
}

//! Whether the server preloaded this library. Its shared memory may be missing all the same: a library that is loaded
//! after it, and does not call the hook that was there before, keeps it from being set up. (One that keeps the request
//! from core keeps the server from starting, see `shmem`.)

use pgrx::pg_sys;

use super::backend_local::BackendCell;
use super::encoding;

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

/// The line of postgresql.conf that preloads the library beside what is preloaded already; that is for superusers to know.
pub fn line() -> String {
    // SAFETY: a look into the catalog, and at a setting that every server has.
    let listed = unsafe {
        if pg_sys::superuser() {
            encoding::from_c(pg_sys::GetConfigOption(c"shared_preload_libraries".as_ptr(), false, false))
        } else {
            None
        }
    };
    line_beside(&listed.unwrap_or_default())
}

fn line_beside(listed: &str) -> String {
    let listed = listed.trim_matches([' ', ',']);
    let comma = if listed.is_empty() { "" } else { ", " };
    format!("shared_preload_libraries = '{}{comma}pg_writeguard'", listed.replace('\'', "''"))
}

#[cfg(test)]
mod tests {
    use super::line_beside;

    #[test]
    fn the_line_keeps_what_is_preloaded_already() {
        for (listed, line) in [
            ("", "'pg_writeguard'"),
            (" ", "'pg_writeguard'"),
            ("pg_stat_statements", "'pg_stat_statements, pg_writeguard'"),
            ("auto_explain, \"$libdir/auto_explain\"", "'auto_explain, \"$libdir/auto_explain\", pg_writeguard'"),
            ("\"it's\",", "'\"it''s\", pg_writeguard'"),
        ] {
            assert_eq!(line_beside(listed), format!("shared_preload_libraries = {line}"));
        }
    }
}

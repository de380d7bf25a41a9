//! Where nothing may be raised any more.
//!
//! After the commit record is written an ERROR is a PANIC of the whole server; during an abort it begins the abort again;
//! and in the callbacks of caches and memory contexts nobody expects one. What we do there cannot fail as far as we know.
//! If it does all the same, that ends here, in a line of the server log.

use core::any::Any;

use pgrx::pg_sys;
use pgrx::pg_sys::panic::{CaughtError, ErrorReportWithLevel};

use super::ereport::log_line;
use super::{fault, ffi, reserve};

/// Runs `body`. Neither a panic nor an ERROR comes out of it, and PostgreSQL continues as if there had been none. False
/// where there was one: then the caller sees to what `body` has left undone.
#[inline]
pub fn contained(what: &str, body: impl FnOnce()) -> bool {
    // SAFETY: statics of this process, which an ERROR sets to zero.
    let held_off =
        unsafe { (pg_sys::InterruptHoldoffCount, pg_sys::QueryCancelHoldoffCount, pg_sys::CritSectionCount) };
    let went_on = reserve::go_on(true);
    let outcome = ffi::catch(|| {
        fault::inject(what);
        body();
    });
    let is_done = outcome.is_ok();
    if let Err(thrown) = outcome {
        // SAFETY: as above.
        unsafe {
            (pg_sys::InterruptHoldoffCount, pg_sys::QueryCancelHoldoffCount, pg_sys::CritSectionCount) = held_off;
        }
        tell(what, thrown);
    }
    reserve::go_on(went_on);
    is_done
}

#[cold]
#[inline(never)]
fn tell(what: &str, thrown: Box<dyn Any + Send>) {
    // Without a line, if that fails as well.
    let _told = ffi::catch(|| {
        log_line(&format!("pg_writeguard: {what} failed: {}", message(&*thrown)), None);
        drop(thrown);
    });
}

fn message(thrown: &(dyn Any + Send)) -> &str {
    if let Some(
        CaughtError::PostgresError(report)
        | CaughtError::ErrorReport(report)
        | CaughtError::RustPanic { ereport: report, .. },
    ) = thrown.downcast_ref()
    {
        return report.message();
    }
    if let Some(report) = thrown.downcast_ref::<ErrorReportWithLevel>() {
        return report.message();
    }
    thrown
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| thrown.downcast_ref::<&str>().copied())
        .unwrap_or("no reason is known")
}

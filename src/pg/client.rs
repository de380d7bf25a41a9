//! The client's connection, as far as it decides whether an error can go out.
//!
//! Core sends an ERROR with interrupts held: where the connection is full, because the client reads nothing, neither
//! pg_terminate_backend nor a shutdown ends the session then. So an error of ours waits for room before it is raised,
//! where a termination still gets through.

use core::ffi::{c_int, c_long, c_void};
use core::mem::{size_of, size_of_val};

use pgrx::pg_sys;

use super::ffi;

/// What core may have collected without sending it.
const COLLECTED: usize = 8 * 1024;
/// How long to sleep before the next look.
const PAUSE: c_long = 20;

/// Waits until the client's connection has room for an error of so many bytes, or the session is terminated. Where core
/// would hold an interrupt off, it returns at once.
///
/// # Safety
/// Only from a plain old frame: a termination ends the process here.
#[expect(ffi_unwind_calls, reason = "plain old frame")]
pub unsafe fn wait_for_room(bytes: usize) {
    // SAFETY: statics of this process, and the caller's promise. A cancel waits: the ERROR that it is would find no room
    // either.
    unsafe {
        if pg_sys::whereToSendOutput != pg_sys::CommandDest::DestRemote || pg_sys::MyProcPort.is_null() {
            return;
        }
        // The first field of core's Port, which is otherwise not for us.
        let socket = *pg_sys::MyProcPort.cast::<c_int>();
        while pg_sys::InterruptHoldoffCount == 0 && pg_sys::CritSectionCount == 0 && !has_room(socket, bytes) {
            if pg_sys::ProcDiePending != 0 {
                // As core has it when it dies while it waits for a client: to tell why would be to wait again.
                pg_sys::whereToSendOutput = pg_sys::CommandDest::DestNone;
                ffi::ProcessInterrupts();
                return;
            }
            let events = pg_sys::WL_LATCH_SET | pg_sys::WL_TIMEOUT | pg_sys::WL_EXIT_ON_PM_DEATH;
            let reason = pg_sys::WaitEventClient::WAIT_EVENT_CLIENT_WRITE;
            ffi::WaitLatch(pg_sys::MyLatch, events as c_int, PAUSE, reason);
            ffi::ResetLatch(pg_sys::MyLatch);
        }
    }
}

#[cfg(target_os = "linux")]
fn has_room(socket: c_int, bytes: usize) -> bool {
    const SOL_SOCKET: c_int = 1;
    const SO_MEMINFO: c_int = 55;
    // Places in what SO_MEMINFO gives: what waits for the client in a local socket, how much may, and what waits in TCP.
    const WMEM_ALLOC: usize = 2;
    const SNDBUF: usize = 3;
    const WMEM_QUEUED: usize = 5;
    unsafe extern "C" {
        fn getsockopt(socket: c_int, level: c_int, option: c_int, value: *mut c_void, length: *mut u32) -> c_int;
    }
    let mut numbers = [0_u32; 9];
    let mut length = size_of_val(&numbers) as u32;
    // SAFETY: fills in no more than it is told there is room for.
    let known = unsafe { getsockopt(socket, SOL_SOCKET, SO_MEMINFO, numbers.as_mut_ptr().cast(), &mut length) } == 0
        && length as usize > WMEM_QUEUED * size_of::<u32>();
    let [waits, limit] = [numbers[WMEM_ALLOC].max(numbers[WMEM_QUEUED]), numbers[SNDBUF]].map(|bytes| bytes as usize);
    // The kernel counts what it spends. However large the error is, half of the room is all that can be asked for.
    let needed = bytes.saturating_add(COLLECTED).saturating_mul(2).min(limit / 2);
    !known || waits <= limit - needed
}

/// Elsewhere nothing is known of it, and core does as it does.
#[cfg(not(target_os = "linux"))]
fn has_room(_socket: c_int, _bytes: usize) -> bool {
    true
}

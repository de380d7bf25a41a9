//! `writeguard.expect_rows`: how many rows the client's next UPDATE, DELETE or MERGE must change.
//!
//! As for `override` and `token` (see `actor`), the setting's own value cannot say what is in force, because a
//! rollback brings old values back. So each assignment by SET carries a number. A write uses up all numbers so far,
//! whatever becomes of it; a value that was SET inside a transaction block lapses with the block's end, so that a pool
//! in transaction mode hands it to nobody; in a session that clients share (`writeguard.pooled`) with any transaction's
//! end. `guard::verdict::expect` knows which write it is that has to meet it.

use core::ffi::{c_char, c_int, c_void};

use pgrx::pg_sys;

use super::settings::{self, NO_EXPECTATION};
use super::{actor, xact};
use crate::pg::backend_local::{BackendCell, BackendLocal};

/// The assignments of the setting, as far as they can still matter.
struct Assignments {
    last_number: u64,
    /// Number of the assignment that PostgreSQL has now; 0 when it was no SET.
    number: u64,
    value: i32,
    /// Assignments up to this number are used up or were taken back.
    dead: u64,
    /// The last number before this transaction.
    before_transaction: u64,
    /// What was assigned within the last transaction block: after the first number, up to the second.
    lapsed: (u64, u64),
}

impl Assignments {
    const NONE: Self =
        Self { last_number: 0, number: 0, value: NO_EXPECTATION, dead: 0, before_transaction: 0, lapsed: (0, 0) };

    fn in_force(&self) -> i32 {
        let lapsed = self.number > self.lapsed.0 && self.number <= self.lapsed.1;
        if self.number > self.dead && !lapsed { self.value } else { NO_EXPECTATION }
    }

    /// The number of a new assignment.
    fn next_number(&mut self) -> u64 {
        if self.in_force() == NO_EXPECTATION {
            // It lapsed, and must not come back when the new one is over.
            self.dead = self.dead.max(self.number);
        }
        self.last_number += 1;
        self.last_number
    }

    fn assign(&mut self, value: i32, number: u64) {
        if value < 0 || number == 0 {
            // What was in force before the switch-off does not come back with a rollback.
            self.dead = self.last_number;
        }
        self.value = value;
        self.number = number;
    }

    fn use_up(&mut self) -> i32 {
        let expected = self.in_force();
        self.dead = self.last_number;
        expected
    }

    /// Called before PostgreSQL gives back what a SET LOCAL had replaced.
    fn end_transaction(&mut self, block_committed: bool, pooled: bool) {
        if pooled {
            self.dead = self.last_number;
        } else if block_committed && self.last_number > self.before_transaction {
            self.lapsed = (self.before_transaction, self.last_number);
        }
        self.before_transaction = self.last_number;
    }
}

static ASSIGNMENTS: BackendLocal<Assignments> = BackendLocal::new(Assignments::NONE);
/// What is in force, for one compare on every statement.
static IN_FORCE: BackendCell<i32> = BackendCell::new(NO_EXPECTATION);

/// Changes the assignments, and what is in force with them.
fn change<T>(body: impl FnOnce(&mut Assignments) -> T) -> T {
    let mut assignments = ASSIGNMENTS.borrow();
    let result = body(&mut assignments);
    IN_FORCE.set(assignments.in_force());
    result
}

/// The number of rows that is expected of the client's next write; [`NO_EXPECTATION`] where none is.
#[inline(always)]
pub fn in_force() -> i32 {
    IN_FORCE.get()
}

/// Whether a number of rows is expected.
#[inline(always)]
pub fn is_armed() -> bool {
    in_force() >= 0
}

/// The expectation, which is used up by this, whatever becomes of the transaction.
pub fn use_up() -> i32 {
    change(Assignments::use_up)
}

/// The transaction is over. `block_committed`: it was an explicit transaction block, and committed or was prepared.
pub fn end_transaction(block_committed: bool) {
    change(|assignments| assignments.end_transaction(block_committed, settings::pooled()));
}

/// The hooks of the setting.
pub fn hooks() -> settings::Expecting {
    settings::Expecting { check: Some(check), assign: Some(assign), show: Some(show) }
}

/// Check hook of `writeguard.expect_rows`.
unsafe extern "C-unwind" fn check(_new: *mut c_int, extra: *mut *mut c_void, source: pg_sys::GucSource::Type) -> bool {
    // SAFETY: called by PostgreSQL with valid places.
    unsafe { actor::keep_number(extra, source, || change(Assignments::next_number)) }
}

/// Assign hook of `writeguard.expect_rows`.
unsafe extern "C-unwind" fn assign(new: c_int, extra: *mut c_void) {
    // SAFETY: `extra` is what the check hook made.
    let number = unsafe { actor::number_of(extra) };
    change(|assignments| assignments.assign(new, number));
    if number != 0 {
        // It may end with the transaction.
        xact::touch();
    }
}

/// Digits and sign of an `i32`, and the final NUL.
const MOST_LETTERS: usize = 12;
static SHOWN: BackendLocal<[u8; MOST_LETTERS]> = BackendLocal::new([0; MOST_LETTERS]);

/// Show hook of `writeguard.expect_rows`: what is in force, not what was once assigned.
unsafe extern "C-unwind" fn show() -> *const c_char {
    // SAFETY: a static of this thread; the caller copies the text.
    let shown = unsafe { &mut *SHOWN.get() };
    write_number(in_force(), shown);
    shown.as_ptr().cast()
}

/// Writes a number with a NUL behind it; without an allocation, because nothing here may fail.
fn write_number(number: i32, into: &mut [u8; MOST_LETTERS]) {
    let mut digits = [0u8; MOST_LETTERS];
    let mut left = number.unsigned_abs();
    let mut count = 0;
    loop {
        digits[count] = b'0' + (left % 10) as u8;
        left /= 10;
        count += 1;
        if left == 0 {
            break;
        }
    }
    *into = [0; MOST_LETTERS];
    let sign = usize::from(number < 0);
    if number < 0 {
        into[0] = b'-';
    }
    for (place, digit) in digits[..count].iter().rev().enumerate() {
        into[place + sign] = *digit;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn set(assignments: &mut Assignments, value: i32) -> u64 {
        let number = assignments.next_number();
        assignments.assign(value, number);
        number
    }

    #[test]
    fn nothing_is_expected_before_a_set() {
        let mut assignments = Assignments::NONE;
        assert_eq!(assignments.in_force(), NO_EXPECTATION);
        // From PGOPTIONS, say.
        assignments.assign(3, 0);
        assert_eq!(assignments.in_force(), NO_EXPECTATION);
    }

    #[test]
    fn what_is_used_up_does_not_come_back() {
        let mut assignments = Assignments::NONE;
        let first = set(&mut assignments, 3);
        assignments.end_transaction(false, false);
        set(&mut assignments, 5);
        assert_eq!(assignments.use_up(), 5);
        assert_eq!(assignments.in_force(), NO_EXPECTATION);
        assignments.assign(3, first);
        assert_eq!(assignments.in_force(), NO_EXPECTATION);
        set(&mut assignments, 7);
        assert_eq!(assignments.in_force(), 7);
    }

    #[test]
    fn what_was_replaced_for_a_while_comes_back() {
        let mut assignments = Assignments::NONE;
        let first = set(&mut assignments, 3);
        set(&mut assignments, 5);
        assignments.assign(3, first);
        assert_eq!(assignments.in_force(), 3);
    }

    #[test]
    fn a_switch_off_is_final() {
        let mut assignments = Assignments::NONE;
        let first = set(&mut assignments, 3);
        set(&mut assignments, NO_EXPECTATION);
        assignments.assign(3, first);
        assert_eq!(assignments.in_force(), NO_EXPECTATION);
    }

    #[test]
    fn a_block_takes_along_what_was_set_in_it() {
        let mut assignments = Assignments::NONE;
        let outside = set(&mut assignments, 1);
        assignments.end_transaction(false, false);
        assert_eq!(assignments.in_force(), 1);
        // SET LOCAL in a block: the value from outside is back after it.
        set(&mut assignments, 2);
        assignments.end_transaction(true, false);
        assignments.assign(1, outside);
        assert_eq!(assignments.in_force(), 1);
        // SET in a block.
        let inside = set(&mut assignments, 3);
        assignments.end_transaction(true, false);
        assert_eq!(assignments.in_force(), NO_EXPECTATION);
        // Another block does not bring it back, nor does one without any assignment.
        assignments.end_transaction(true, false);
        assert_eq!(assignments.in_force(), NO_EXPECTATION);
        set(&mut assignments, 4);
        assignments.end_transaction(true, false);
        assignments.assign(3, inside);
        assert_eq!(assignments.in_force(), NO_EXPECTATION);
    }

    #[test]
    fn in_a_session_of_many_every_transaction_takes_along_what_was_set_in_it() {
        for block_committed in [false, true] {
            let mut assignments = Assignments::NONE;
            let first = set(&mut assignments, 1);
            assignments.end_transaction(block_committed, true);
            assert_eq!(assignments.in_force(), NO_EXPECTATION);
            set(&mut assignments, 2);
            assert_eq!(assignments.in_force(), 2);
            assignments.end_transaction(block_committed, true);
            // A rollback, or the end of a SET LOCAL.
            assignments.assign(1, first);
            assert_eq!(assignments.in_force(), NO_EXPECTATION);
        }
    }

    proptest! {
        #[test]
        fn numbers_are_written_as_rust_writes_them(number: i32) {
            let mut text = [1; MOST_LETTERS];
            write_number(number, &mut text);
            let text = core::ffi::CStr::from_bytes_until_nul(&text).unwrap();
            prop_assert_eq!(text.to_str().unwrap(), number.to_string());
        }
    }
}

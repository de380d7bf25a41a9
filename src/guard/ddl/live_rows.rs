//! Charging the live rows of a table: committed ones and the transaction's own, counted by scanning no further than one
//! past the smallest budget that is not lifted.

use pgrx::pg_sys;
use rules::error::Error;
use rules::words::{Operation, Place, RelationName};

use crate::guard::executor::capture;
use crate::guard::limits::binding::Binding;
use crate::guard::limits::{charge, observe};
use crate::guard::verdict::{overrides, violation};
use crate::guard::where_clause::scan_filters::Estimate;
use crate::pg::ereport::Failure;
use crate::pg::ffi;
use crate::policy::size;
use crate::session::{actor, rehearsing, settings, statement};
use crate::stat::counters;

/// Charges the rows of a table to the budgets of an operation, and the table alone: partitions and children have rows of
/// their own.
///
/// # Safety
/// In a transaction; the table is locked.
///
/// # Errors
/// WG005 or WG006 past a limit. WG008 for a foreign table, unless it is only dropped: that leaves its rows where they
/// are.
pub unsafe fn charge(binding: &Binding, operation: Operation, relation: pg_sys::Oid) -> Result<(), Failure> {
    // SAFETY: the caller's promise.
    unsafe {
        let table = pg_sys::try_relation_open(relation, pg_sys::NoLock as pg_sys::LOCKMODE);
        if table.is_null() {
            return Ok(());
        }
        actor::use_armed();
        let place = Place { statement: statement::current(), level: ffi::GetCurrentTransactionNestLevel() };
        let result = charge_rows(binding, operation, table, place);
        pg_sys::relation_close(table, pg_sys::NoLock as pg_sys::LOCKMODE);
        result
    }
}

/// The live rows of a table.
///
/// # Safety
/// In a transaction; the table is locked.
///
/// # Errors
/// What scanning it may raise.
pub unsafe fn count(relation: pg_sys::Oid) -> Result<u64, Failure> {
    // SAFETY: the caller's promise.
    unsafe {
        let table = pg_sys::try_relation_open(relation, pg_sys::NoLock as pg_sys::LOCKMODE);
        if table.is_null() {
            return Ok(0);
        }
        let mut scan = Scan::begin(table)?;
        let rows = scan.count(u64::MAX);
        scan.end();
        pg_sys::relation_close(table, pg_sys::NoLock as pg_sys::LOCKMODE);
        Ok(rows?)
    }
}

/// Runs `body` under a lock that keeps the relation where it is.
///
/// # Safety
/// In a transaction.
///
/// # Errors
/// What waiting for the lock may raise, and those of `body`.
#[expect(ffi_unwind_calls, reason = "inside protect")]
pub unsafe fn with_lock(relation: pg_sys::Oid, body: impl FnOnce() -> Result<(), Failure>) -> Result<(), Failure> {
    let lock = pg_sys::AccessShareLock as pg_sys::LOCKMODE;
    // SAFETY: nothing but the raw call inside; after an error the transaction's end releases the lock.
    unsafe {
        ffi::protect(|| ffi::LockRelationOid(relation, lock))?;
        body()?;
        pg_sys::UnlockRelationOid(relation, lock);
    }
    Ok(())
}

unsafe fn charge_rows(
    binding: &Binding,
    operation: Operation,
    table: pg_sys::Relation,
    place: Place,
) -> Result<(), Failure> {
    // SAFETY: the table is open and locked.
    unsafe {
        let mut scan = match (*(*table).rd_rel).relkind as u8 {
            pg_sys::RELKIND_PARTITIONED_TABLE => return Ok(()),
            pg_sys::RELKIND_FOREIGN_TABLE if operation == Operation::Drop => return Ok(()),
            pg_sys::RELKIND_FOREIGN_TABLE if !binding.refuses(operation) => {
                violation::note_uncounted(
                    binding,
                    operation,
                    "those of a foreign table cannot be counted before TRUNCATE",
                )?;
                return Ok(());
            }
            pg_sys::RELKIND_FOREIGN_TABLE => {
                return Err(Failure::Ours(Error::Undecided {
                    reason: "the rows of a foreign table cannot be counted before TRUNCATE".into(),
                    hint: format!("DELETE FROM {};", binding.name),
                    relation: Some(RelationName::clone(&binding.relation)),
                }));
            }
            _ => Scan::begin(table)?,
        };
        let estimate = Estimate::of(f64::from((*(*table).rd_rel).reltuples));
        let (mut result, mut ended) = (Ok(()), false);
        let mut counted = 0;
        let keeps = operation == Operation::Truncate && capture::keeps_truncated(binding);
        let captures = keeps || operation == Operation::Truncate && rehearsing::is_on();
        if !captures && operation == Operation::Truncate {
            capture::missed(binding, operation, place.statement);
        }
        while let Some(most) = if keeps { Some(1) } else { worth_counting(binding, operation, place, counted) } {
            let shows = match captures && !keeps {
                true => match capture::shows_truncated(binding, (*table).rd_id) {
                    Ok(shows) => shows,
                    Err(failure) => {
                        result = Err(failure);
                        break;
                    }
                },
                false => keeps,
            };
            let most = if shows { 1 } else { most };
            let rows = match scan.count(most) {
                Ok(0) => {
                    ended = true;
                    break;
                }
                Ok(rows) => rows,
                Err(error) => {
                    result = Err(Failure::Foreign(error));
                    break;
                }
            };
            counted += rows;
            let raise = violation::charge(binding, operation, rows, place, estimate);
            if !raise.is_null() {
                result = Err(Failure::Ready(raise));
                break;
            }
            if captures && let Err(failure) = capture_rows(binding, table, &scan, rows, shows) {
                result = Err(failure);
                break;
            }
            if !settings::enabled() {
                // That there was one is all that is recorded.
                break;
            }
        }
        scan.end();
        if counted == 0 && !ended && !rehearsing::is_on() && settings::enabled() {
            // No policy limits it: about how many rows there are is good enough.
            counters::count(binding.stat, operation, size::rows((*table).rd_id), place.statement);
        }
        if !ended && counted >= MOST_OBSERVED {
            for charge in binding.charges(operation) {
                observe::explain(place.statement, charge.meter, "At least; no more rows than these were counted.");
            }
        }
        result
    }
}

/// Shows rows that were counted to who wants to see them; one of them as it is.
unsafe fn capture_rows(
    binding: &Binding,
    table: pg_sys::Relation,
    scan: &Scan,
    rows: u64,
    shows: bool,
) -> Result<(), Failure> {
    // SAFETY: the table is open; the scan's slot holds the last row that was counted.
    unsafe {
        let context = pg_sys::AllocSetContextCreateExtended(
            pg_sys::CurrentMemoryContext,
            c"pg_writeguard row".as_ptr(),
            pg_sys::ALLOCSET_SMALL_MINSIZE as usize,
            pg_sys::ALLOCSET_SMALL_INITSIZE as usize,
            pg_sys::ALLOCSET_SMALL_MAXSIZE as usize,
        );
        let mut row = core::ptr::null_mut();
        if shows {
            let mut copied = false;
            let before = pg_sys::MemoryContextSwitchTo(context);
            row = pg_sys::ExecFetchSlotHeapTuple(scan.slot, true, &mut copied);
            pg_sys::MemoryContextSwitchTo(before);
        }
        let captured = capture::truncated(binding, table, row, rows, context);
        pg_sys::MemoryContextDelete(context);
        captured
    }
}

/// Rows of one table that are counted for a policy of mode observe or warn whose limit they are past already: a scan to
/// the end of a large table would hold its lock for long.
const MOST_OBSERVED: u64 = 1_000_000;

/// Rows that are counted at a time where the number itself matters: under a token, and when a TRUNCATE is rehearsed.
const CHUNK: u64 = 10_000;

/// How many more rows could change the verdict: one past the smallest budget that has a limit and is not lifted; under a
/// token all of them, because the reviewed number must hold; past the limit of a policy of mode observe or warn, as many as it
/// takes to report their number. None: no more. `counted` were counted already.
fn worth_counting(binding: &Binding, operation: Operation, place: Place, counted: u64) -> Option<u64> {
    if !settings::enabled() {
        return Some(1);
    }
    if overrides::is_granted(place.statement) || rehearsing::is_on() {
        return Some(CHUNK);
    }
    binding
        .charges(operation)
        .iter()
        .filter(|charge| charge.policy.policy.is_limited() && !overrides::is_lifted(charge.meter, place.statement))
        .filter_map(|charge| {
            if charge::is_noted(charge, place.statement) {
                return MOST_OBSERVED.checked_sub(counted).filter(|left| *left > 0).map(|left| left.min(CHUNK));
            }
            Some(charge::left(charge, place.statement).saturating_add(1))
        })
        .min()
}

/// A scan over the live rows of a table: committed ones and the transaction's own.
struct Scan {
    scan: pg_sys::TableScanDesc,
    slot: *mut pg_sys::TupleTableSlot,
    snapshot: pg_sys::Snapshot,
    next: NextSlot,
    /// A scan that is asked for more after its end begins again.
    ended: bool,
}

type NextSlot = unsafe extern "C-unwind" fn(
    pg_sys::TableScanDesc,
    pg_sys::ScanDirection::Type,
    *mut pg_sys::TupleTableSlot,
) -> bool;

impl Scan {
    /// # Safety
    /// The table is open, locked and has storage.
    #[expect(ffi_unwind_calls, reason = "inside protect")]
    unsafe fn begin(table: pg_sys::Relation) -> Result<Self, Failure> {
        let mut begun = Err(Failure::Ours(Error::Undecided {
            reason: "its storage cannot be scanned".into(),
            hint: "As superuser, when it must be done all the same: SET writeguard.enabled = off;".into(),
            relation: None,
        }));
        // SAFETY: the caller's promise; an ERROR of the access method is caught whole, and the transaction's abort
        // cleans up.
        unsafe {
            let methods = &*(*table).rd_tableam;
            let (Some(begin), Some(next)) = (methods.scan_begin, methods.scan_getnextslot) else {
                return begun;
            };
            let snapshot = pg_sys::RegisterSnapshot(pg_sys::GetLatestSnapshot());
            let slot = pg_sys::table_slot_create(table, core::ptr::null_mut());
            let flags = pg_sys::ScanOptions::SO_TYPE_SEQSCAN
                | pg_sys::ScanOptions::SO_ALLOW_STRAT
                | pg_sys::ScanOptions::SO_ALLOW_SYNC
                | pg_sys::ScanOptions::SO_ALLOW_PAGEMODE;
            let mut scan = core::ptr::null_mut();
            ffi::protect(|| {
                scan = begin(table, snapshot, 0, core::ptr::null_mut(), core::ptr::null_mut(), flags);
            })?;
            begun = Ok(Self { scan, slot, snapshot, next, ended: false });
        }
        begun
    }

    /// Counts further rows, at most `most`.
    #[expect(ffi_unwind_calls, reason = "inside protect")]
    fn count(&mut self, most: u64) -> Result<u64, ffi::PgError> {
        let mut rows = 0;
        let mut ended = self.ended;
        let (scan, slot, next) = (self.scan, self.slot, self.next);
        // SAFETY: the scan is open; nothing but raw calls inside.
        unsafe {
            ffi::protect(|| {
                while rows < most && !ended {
                    if next(scan, pg_sys::ScanDirection::ForwardScanDirection, slot) {
                        rows += 1;
                    } else {
                        ended = true;
                    }
                    if pg_sys::InterruptPending != 0 {
                        ffi::ProcessInterrupts();
                    }
                }
            })?;
        }
        self.ended = ended;
        Ok(rows)
    }

    #[expect(ffi_unwind_calls, reason = "pgrx makes a panic of an ERROR")]
    fn end(self) {
        // SAFETY: opened by `begin`, closed once.
        unsafe {
            pg_sys::ExecDropSingleTupleTableSlot(self.slot);
            if let Some(end) = (*(*(*self.scan).rs_rd).rd_tableam).scan_end {
                let scan = self.scan;
                pg_sys::ffi::pg_guard_ffi_boundary(|| end(scan));
            }
            pg_sys::UnregisterSnapshot(self.snapshot);
        }
    }
}

//! Statements of ours that run as whoever calls and may set off anybody's code, so that errors come out as they are.

use core::ffi::c_long;
use core::ptr;
use std::ffi::CString;

use pgrx::pg_sys;

use super::rows::Rows;
use crate::pg::ereport::{Failure, PendingError, guarded};
use crate::pg::{encoding, ffi};
use crate::undo::capture::row_format::attribute;

/// Runs raw calls, and stays in the memory context that was current before.
unsafe fn raw(body: impl FnOnce()) -> Result<(), Failure> {
    // SAFETY: the caller's promise is that of `protect`.
    unsafe {
        let here = pg_sys::CurrentMemoryContext;
        ffi::protect(body)?;
        pg_sys::CurrentMemoryContext = here;
    }
    Ok(())
}

/// An SPI connection. After an error it ends with the (sub)transaction's rollback.
pub struct Connection(());

/// A statement that was planned within a connection.
#[derive(Clone, Copy)]
pub struct Plan(pg_sys::SPIPlanPtr);

impl Connection {
    /// # Errors
    /// Core's own.
    #[expect(ffi_unwind_calls, reason = "inside protect")]
    pub fn open() -> Result<Self, Failure> {
        // SAFETY: nothing but the raw call inside.
        unsafe { raw(|| _ = ffi::SPI_connect())? };
        Ok(Self(()))
    }

    /// Lets the connection's statements read rows under a name.
    pub fn show(&self, name: &str, rows: &Rows) {
        let name = CString::new(name).unwrap_or_default();
        // SAFETY: the connection is open; whoever holds it ends it before the rows.
        unsafe { rows.register(&name) };
    }

    /// # Errors
    /// Core's own, such as that of a missing privilege when it is run.
    #[expect(ffi_unwind_calls, reason = "inside protect")]
    pub fn plan(&self, sql: &str) -> Result<Plan, Failure> {
        let sql = encoding::to_palloc(sql);
        let mut plan = ptr::null_mut();
        // SAFETY: nothing but the raw call inside.
        unsafe { raw(|| plan = ffi::SPI_prepare(sql, 0, ptr::null_mut()))? };
        Ok(Plan(plan))
    }

    /// Runs a statement, and gives how many rows it wrote. What AFTER triggers and foreign keys have to do is left to
    /// [`together`].
    ///
    /// # Errors
    /// Whatever the statement sets off.
    #[expect(ffi_unwind_calls, reason = "inside protect")]
    pub fn run(&self, plan: Plan) -> Result<u64, Failure> {
        // SAFETY: nothing but the raw call inside; SPI_processed is this process's own.
        unsafe {
            let none = ptr::null_mut();
            raw(|| {
                _ = ffi::SPI_execute_snapshot(plan.0, none, ptr::null(), none.cast(), none.cast(), false, false, 0)
            })?;
            Ok(pg_sys::SPI_processed)
        }
    }

    /// The rows of a query, in pieces.
    ///
    /// # Errors
    /// As for [`Connection::run`].
    #[expect(ffi_unwind_calls, reason = "inside protect")]
    pub fn query(&self, sql: &str) -> Result<Cursor, Failure> {
        let plan = self.plan(sql)?.0;
        let mut portal = ptr::null_mut();
        // SAFETY: nothing but the raw call inside.
        unsafe { raw(|| portal = ffi::SPI_cursor_open(ptr::null(), plan, ptr::null_mut(), ptr::null(), false))? };
        Ok(Cursor { portal, table: ptr::null_mut(), at: 0 })
    }

    /// # Errors
    /// Core's own.
    #[expect(ffi_unwind_calls, reason = "inside protect")]
    pub fn close(self) -> Result<(), Failure> {
        // SAFETY: nothing but the raw call inside.
        unsafe { raw(|| _ = ffi::SPI_finish()) }
    }
}

/// Rows that are fetched at a time.
const BATCH: c_long = 1_000;

/// A query's rows on their way.
pub struct Cursor {
    portal: pg_sys::Portal,
    table: *mut pg_sys::SPITupleTable,
    at: usize,
}

impl Cursor {
    /// The current row, without advancing; none: there are no more. It is good until the next one is asked for.
    ///
    /// # Errors
    /// As for [`Connection::run`].
    #[expect(ffi_unwind_calls, reason = "inside protect")]
    pub fn peek(&mut self) -> Result<Option<pg_sys::HeapTuple>, Failure> {
        // SAFETY: the portal is open; the table is SPI's last result, and ours.
        unsafe {
            let has = |table: *mut pg_sys::SPITupleTable| {
                if table.is_null() { 0 } else { usize::try_from((*table).numvals).unwrap_or(0) }
            };
            if self.table.is_null() || self.at > 0 && self.at >= has(self.table) {
                if !self.table.is_null() {
                    pg_sys::SPI_freetuptable(self.table);
                    self.table = ptr::null_mut();
                }
                let portal = self.portal;
                raw(|| ffi::SPI_cursor_fetch(portal, true, BATCH))?;
                self.table = pg_sys::SPI_tuptable;
                self.at = 0;
            }
            Ok((self.at < has(self.table)).then(|| *(*self.table).vals.add(self.at)))
        }
    }

    /// The types of its columns.
    pub fn types(&self) -> Vec<pg_sys::Oid> {
        // SAFETY: an open portal has a descriptor, with as many attributes as it says.
        unsafe {
            let descriptor = (*self.portal).tupDesc;
            let count = usize::try_from((*descriptor).natts).unwrap_or(0);
            (0..count).map(|index| (*attribute(descriptor, index)).atttypid).collect()
        }
    }

    /// Goes on to the next row.
    pub fn advance(&mut self) {
        self.at += 1;
    }

    /// The values of the row at hand.
    ///
    /// # Errors
    /// As for [`Cursor::peek`].
    pub fn values(&mut self) -> Result<Option<Vec<Option<pg_sys::Datum>>>, Failure> {
        let Some(tuple) = self.peek()? else { return Ok(None) };
        // SAFETY: the tuple is one of the table's.
        unsafe {
            let descriptor = (*self.table).tupdesc;
            let count = usize::try_from((*descriptor).natts).unwrap_or(0);
            let mut values = vec![pg_sys::Datum::from(0); count];
            let mut nulls = vec![true; count];
            pg_sys::heap_deform_tuple(tuple, descriptor, values.as_mut_ptr(), nulls.as_mut_ptr());
            Ok(Some(values.into_iter().zip(nulls).map(|(value, null)| (!null).then_some(value)).collect()))
        }
    }

    /// # Errors
    /// Core's own.
    #[expect(ffi_unwind_calls, reason = "inside protect")]
    pub fn close(self) -> Result<(), Failure> {
        // SAFETY: nothing but the raw call inside.
        unsafe {
            let portal = self.portal;
            if !self.table.is_null() {
                pg_sys::SPI_freetuptable(self.table);
            }
            raw(|| ffi::SPI_cursor_close(portal))
        }
    }
}

/// Runs what writes rows as one statement in the eyes of AFTER triggers and foreign keys: they have their turn when all
/// rows are written, whichever order they were written in.
///
/// # Errors
/// Those of `body`, and whatever those triggers raise.
#[expect(ffi_unwind_calls, reason = "inside protect")]
pub fn together<T>(body: impl FnOnce() -> Result<T, Failure>) -> Result<T, Failure> {
    // SAFETY: nothing but raw calls inside; after an error the rollback ends the level of triggers.
    unsafe {
        raw(|| ffi::AfterTriggerBeginQuery())?;
        let result = body()?;
        raw(|| {
            let state = ffi::CreateExecutorState();
            ffi::AfterTriggerEndQuery(state);
            ffi::ExecCloseResultRelations(state);
            ffi::ExecResetTupleTable((*state).es_tupleTable, false);
            ffi::FreeExecutorState(state);
        })?;
        Ok(result)
    }
}

/// Lets a cancel or a timeout through.
///
/// # Errors
/// That.
#[expect(ffi_unwind_calls, reason = "inside protect")]
pub fn check_interrupts() -> Result<(), Failure> {
    // SAFETY: nothing but raw calls inside.
    unsafe {
        if pg_sys::InterruptPending == 0 {
            return Ok(());
        }
        raw(|| ffi::ProcessInterrupts())
    }
}

/// What becomes of what a subtransaction did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    Kept,
    TakenBack,
}

/// Runs `body` in a subtransaction. What it did is taken back where `fate` says so, and where it fails.
///
/// # Errors
/// Those of `body`, as [`Failure::Ready`] in the current memory context.
#[expect(ffi_unwind_calls, reason = "inside protect")]
pub fn in_subtransaction<T>(fate: Fate, body: impl FnOnce() -> Result<T, Failure>) -> Result<T, Failure> {
    let mut result = None;
    let mut raised: *mut PendingError = ptr::null_mut();
    // SAFETY: what was begun ends here, whichever way it went; errors are moved to memory that outlives it.
    unsafe {
        let (context, owner) = (pg_sys::CurrentMemoryContext, pg_sys::CurrentResourceOwner);
        ffi::protect(|| ffi::BeginInternalSubTransaction(ptr::null()))?;
        pg_sys::CurrentMemoryContext = context;
        let outcome = ffi::protect(|| {
            raised = guarded(|| {
                result = Some(body()?);
                Ok(())
            });
            raised = PendingError::moved_to(context, raised);
        });
        let ended = match &result {
            Some(_) if fate == Fate::Kept && raised.is_null() && outcome.is_ok() => {
                ffi::protect(|| ffi::ReleaseCurrentSubTransaction())
            }
            _ => ffi::protect(|| ffi::RollbackAndReleaseCurrentSubTransaction()),
        };
        pg_sys::CurrentMemoryContext = context;
        pg_sys::CurrentResourceOwner = owner;
        ended?;
        outcome?;
    }
    match result {
        Some(result) if raised.is_null() => Ok(result),
        _ => Err(Failure::Ready(raised)),
    }
}

/// Makes deferred constraints have their say at once.
///
/// # Errors
/// What they raise.
#[expect(ffi_unwind_calls, reason = "inside protect")]
pub fn check_deferred() -> Result<(), Failure> {
    // SAFETY: nothing but raw calls inside.
    unsafe {
        raw(|| {
            ffi::SPI_connect();
            ffi::SPI_execute(c"SET CONSTRAINTS ALL IMMEDIATE".as_ptr(), false, 0);
            ffi::SPI_finish();
        })
    }
}

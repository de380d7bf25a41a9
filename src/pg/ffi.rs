//! Core functions declared raw, and the two ways across the border between Rust and PostgreSQL's errors.
//!
//! pgrx wraps every `pg_sys` function so that an ERROR becomes a Rust panic, which has a handful of its fields: an error that
//! is made of them again lacks unknown SQLSTATEs, CONTEXT, constraint and table names and cursor positions. (A guard of pgrx's
//! own throws on the ERROR itself, which PostgreSQL holds meanwhile; but what is done until then must raise nothing.) Nothing
//! that belongs to somebody else may therefore be called through it. Two rules:
//!
//! * A *plain old frame* (no local with a destructor, no panic) may call the raw functions below; an ERROR
//!   jumps over it. All hooks and all SQL functions of this library have such a frame on the outside.
//! * Rust proper runs inside [`guarded`](crate::pg::ereport::guarded), which returns before the frame continues. What it wants
//!   raised it returns as a `PendingError`, and the frame raises it; it raises nothing by itself. Inside it the functions of
//!   `pg_sys` may be called, whose ERRORs become panics, but not those below.

use core::ffi::{CStr, c_char, c_int, c_long, c_void};
use core::ptr;
use std::panic::{AssertUnwindSafe, catch_unwind};

use cee_scape::call_with_sigsetjmp;
use pgrx::pg_sys;
use pgrx::pg_sys::panic::CaughtError;

use super::backend_local::BackendLocal;

// What core reads and does not change; it says so from these versions on.
#[cfg(not(since_pg19))]
type Values = *mut pg_sys::Datum;
#[cfg(since_pg19)]
type Values = *const pg_sys::Datum;
#[cfg(not(since_pg17))]
type Columns<T> = *mut T;
#[cfg(since_pg17)]
type Columns<T> = *const T;
#[cfg(not(since_pg16))]
type Bytes = *const c_char;
#[cfg(since_pg16)]
type Bytes = *const c_void;

/// Declares functions of core, and compares each with what pgrx read in the headers of the server that is built for: one
/// whose arguments or result are others there does not compile.
macro_rules! core_functions {
    (unsafe extern $abi:literal { $($(#[$attribute:meta])* $visibility:vis fn $name:ident($($argument:ident: $type:ty),* $(,)?) $(-> $result:ty)?;)* }) => {
        unsafe extern $abi {
            $($(#[$attribute])* $visibility fn $name($($argument: $type),*) $(-> $result)?;)*
        }
        $($(#[$attribute])* const _: unsafe fn($($type),*) $(-> $result)? = pg_sys::$name;)*
    };
}
pub(super) use core_functions;

// None of these raises an ERROR, so they may be called from anywhere.
core_functions! { unsafe extern "C" {
    // These read a static and return.
    pub fn GetAuthenticatedUserId() -> pg_sys::Oid;
    pub fn GetSessionUserId() -> pg_sys::Oid;
    pub fn GetCurrentRoleId() -> pg_sys::Oid;
    pub fn GetCurrentTransactionNestLevel() -> c_int;
    pub fn GetCurrentStatementStartTimestamp() -> pg_sys::TimestampTz;
    pub fn IsLogicalWorker() -> bool;

    /// Looks at no argument.
    pub fn pg_trigger_depth(fcinfo: pg_sys::FunctionCallInfo) -> pg_sys::Datum;

    // These read the transaction's state and return.
    pub fn IsTransactionBlock() -> bool;
    pub fn IsAbortedTransactionBlockState() -> bool;

    /// An unknown name gives NULL.
    pub fn GetPortalByName(name: *const c_char) -> pg_sys::Portal;
    /// Without `throw_error` an unknown name gives NULL.
    pub fn FetchPreparedStatement(name: *const c_char, throw_error: bool) -> *mut pg_sys::PreparedStatement;

    /// Links the callback into the context; allocates nothing.
    pub fn MemoryContextRegisterResetCallback(
        context: pg_sys::MemoryContext,
        callback: *mut pg_sys::MemoryContextCallback,
    );
} }

// Each of these may raise: it is called from a plain old frame, or inside `protect`. The lint `ffi_unwind_calls` finds each
// call, and an `expect` says which of the two it is.
core_functions! { unsafe extern "C-unwind" {
    /// Raises for a function that is gone.
    pub fn get_func_rettype(function: pg_sys::Oid) -> pg_sys::Oid;
    pub fn standard_ExecutorStart(query_desc: *mut pg_sys::QueryDesc, eflags: c_int);
    #[cfg(not(since_pg18))]
    pub fn standard_ExecutorRun(
        query_desc: *mut pg_sys::QueryDesc,
        direction: pg_sys::ScanDirection::Type,
        count: u64,
        execute_once: bool,
    );
    #[cfg(since_pg18)]
    pub fn standard_ExecutorRun(query_desc: *mut pg_sys::QueryDesc, direction: pg_sys::ScanDirection::Type, count: u64);
    pub fn standard_ExecutorFinish(query_desc: *mut pg_sys::QueryDesc);
    pub fn standard_ProcessUtility(
        pstmt: *mut pg_sys::PlannedStmt,
        query_string: *const c_char,
        read_only_tree: bool,
        context: pg_sys::ProcessUtilityContext::Type,
        params: pg_sys::ParamListInfo,
        query_env: *mut pg_sys::QueryEnvironment,
        dest: *mut pg_sys::DestReceiver,
        qc: *mut pg_sys::QueryCompletion,
    );
    /// Signal handler of core's own workers: exits with 1, so that the postmaster restarts the worker.
    #[cfg(not(since_pg19))]
    pub fn die(signo: c_int);
    #[cfg(since_pg19)]
    pub fn die(signo: c_int, sender: *const pg_sys::pg_signal_info);

    // For the hooks in which shared memory is laid out: an ERROR there ends the server's start.
    pub fn RequestAddinShmemSpace(size: usize);
    pub fn RequestNamedLWLockTranche(name: *const c_char, locks: c_int);
    pub fn ShmemInitStruct(name: *const c_char, size: usize, found: *mut bool) -> *mut c_void;
    pub fn GetNamedLWLockTranche(name: *const c_char) -> *mut pg_sys::LWLockPadded;
    pub fn find_all_inheritors(
        parent: pg_sys::Oid,
        lock: pg_sys::LOCKMODE,
        parents: *mut *mut pg_sys::List,
    ) -> *mut pg_sys::List;
    pub fn durable_rename(from: *const c_char, to: *const c_char, level: c_int) -> c_int;
    pub fn on_shmem_exit(callback: pg_sys::pg_on_exit_callback, argument: pg_sys::Datum);

    // With `missing_ok` a relation that is none of the node's gives NULL.
    pub fn ExecLookupResultRelByOid(
        node: *mut pg_sys::ModifyTableState,
        relation: pg_sys::Oid,
        missing_ok: bool,
        update_cache: bool,
    ) -> *mut pg_sys::ResultRelInfo;
    pub fn slot_getsomeattrs_int(slot: *mut pg_sys::TupleTableSlot, column: c_int);

    pub fn AcceptInvalidationMessages();
    pub fn try_table_open(relation: pg_sys::Oid, lock: pg_sys::LOCKMODE) -> pg_sys::Relation;
    pub fn LockRelationOid(relation: pg_sys::Oid, lock: pg_sys::LOCKMODE);
    pub fn ProcessInterrupts();
    pub fn RangeVarGetRelidExtended(
        relation: *const pg_sys::RangeVar,
        lock: pg_sys::LOCKMODE,
        flags: u32,
        callback: pg_sys::RangeVarGetRelidCallback,
        callback_arg: *mut c_void,
    ) -> pg_sys::Oid;

    pub fn errhidestmt(hide: bool) -> c_int;
    pub fn errhidecontext(hide: bool) -> c_int;
    pub fn err_generic_string(field: c_int, string: *const c_char) -> c_int;
    fn CopyErrorData() -> *mut pg_sys::ErrorData;
    fn FlushErrorState();

    pub fn WaitLatch(latch: *mut pg_sys::Latch, events: c_int, timeout: c_long, wait_event_info: u32) -> c_int;
    pub fn ResetLatch(latch: *mut pg_sys::Latch);

    pub fn BeginInternalSubTransaction(name: *const c_char);
    pub fn ReleaseCurrentSubTransaction();
    pub fn RollbackAndReleaseCurrentSubTransaction();
    pub fn SPI_connect() -> c_int;
    pub fn SPI_finish() -> c_int;
    pub fn SPI_execute_plan(
        plan: pg_sys::SPIPlanPtr,
        values: Values,
        nulls: *const c_char,
        read_only: bool,
        tcount: c_long,
    ) -> c_int;
    pub fn SPI_prepare(src: *const c_char, nargs: c_int, argtypes: *mut pg_sys::Oid) -> pg_sys::SPIPlanPtr;
    pub fn SPI_execute(src: *const c_char, read_only: bool, tcount: c_long) -> c_int;
    pub fn SPI_execute_with_args(
        src: *const c_char,
        nargs: c_int,
        argtypes: *mut pg_sys::Oid,
        values: Values,
        nulls: *const c_char,
        read_only: bool,
        tcount: c_long,
    ) -> c_int;
    pub fn NewGUCNestLevel() -> c_int;
    pub fn AtEOXact_GUC(is_commit: bool, nest_level: c_int);
    pub fn AllocSetContextCreateInternal(
        parent: pg_sys::MemoryContext,
        name: *const c_char,
        min_context_size: usize,
        init_block_size: usize,
        max_block_size: usize,
    ) -> pg_sys::MemoryContext;
    pub fn MemoryContextReset(context: pg_sys::MemoryContext);
    pub fn BlessTupleDesc(desc: pg_sys::TupleDesc) -> pg_sys::TupleDesc;
    pub fn heap_copy_tuple_as_datum(tuple: pg_sys::HeapTuple, desc: pg_sys::TupleDesc) -> pg_sys::Datum;
    pub fn OidFunctionCall1Coll(
        function: pg_sys::Oid,
        collation: pg_sys::Oid,
        argument: pg_sys::Datum,
    ) -> pg_sys::Datum;
    pub fn text_to_cstring(text: *const pg_sys::text) -> *mut c_char;
    pub fn tuplestore_putvalues(
        store: *mut pg_sys::Tuplestorestate,
        desc: pg_sys::TupleDesc,
        values: Columns<pg_sys::Datum>,
        nulls: Columns<bool>,
    );
    pub fn SPI_execute_snapshot(
        plan: pg_sys::SPIPlanPtr,
        values: Values,
        nulls: *const c_char,
        snapshot: pg_sys::Snapshot,
        crosscheck: pg_sys::Snapshot,
        read_only: bool,
        fire_triggers: bool,
        tcount: c_long,
    ) -> c_int;
    pub fn SPI_cursor_open(
        name: *const c_char,
        plan: pg_sys::SPIPlanPtr,
        values: Values,
        nulls: *const c_char,
        read_only: bool,
    ) -> pg_sys::Portal;
    pub fn SPI_cursor_fetch(portal: pg_sys::Portal, forward: bool, count: c_long);
    pub fn SPI_cursor_close(portal: pg_sys::Portal);
    pub fn AfterTriggerBeginQuery();
    pub fn AfterTriggerEndQuery(state: *mut pg_sys::EState);
    pub fn CreateExecutorState() -> *mut pg_sys::EState;
    pub fn FreeExecutorState(state: *mut pg_sys::EState);
    pub fn ExecCloseResultRelations(state: *mut pg_sys::EState);
    pub fn ExecResetTupleTable(table: *mut pg_sys::List, free: bool);
    pub fn raw_parser(str_: *const c_char, mode: pg_sys::RawParseMode::Type) -> *mut pg_sys::List;
    pub fn parse_analyze_varparams(
        raw: *mut pg_sys::RawStmt,
        source: *const c_char,
        types: *mut *mut pg_sys::Oid,
        count: *mut c_int,
        query_env: *mut pg_sys::QueryEnvironment,
    ) -> *mut pg_sys::Query;
    pub fn getTypeInputInfo(type_oid: pg_sys::Oid, input: *mut pg_sys::Oid, parameter: *mut pg_sys::Oid);
    pub fn set_config_option(
        name: *const c_char,
        value: *const c_char,
        context: pg_sys::GucContext::Type,
        source: pg_sys::GucSource::Type,
        action: pg_sys::GucAction::Type,
        change: bool,
        elevel: c_int,
        is_reload: bool,
    ) -> c_int;
    pub fn getTypeOutputInfo(type_oid: pg_sys::Oid, output: *mut pg_sys::Oid, is_varlena: *mut bool);
    pub fn OidInputFunctionCall(
        function: pg_sys::Oid,
        text: *mut c_char,
        parameter: pg_sys::Oid,
        typmod: i32,
    ) -> pg_sys::Datum;
    pub fn palloc(size: usize) -> *mut c_void;
    pub fn OidFunctionCall2Coll(
        function: pg_sys::Oid,
        collation: pg_sys::Oid,
        first: pg_sys::Datum,
        second: pg_sys::Datum,
    ) -> pg_sys::Datum;
    pub fn OidOutputFunctionCall(function: pg_sys::Oid, value: pg_sys::Datum) -> *mut c_char;
    pub fn heap_fetch(
        relation: pg_sys::Relation,
        snapshot: pg_sys::Snapshot,
        tuple: pg_sys::HeapTuple,
        buffer: *mut pg_sys::Buffer,
        keep_buffer: bool,
    ) -> bool;
    pub fn get_primary_key_attnos(
        relation: pg_sys::Oid,
        deferrable_too: bool,
        constraint: *mut pg_sys::Oid,
    ) -> *mut pg_sys::Bitmapset;
    pub fn datum_image_eq(one: pg_sys::Datum, other: pg_sys::Datum, by_value: bool, length: c_int) -> bool;
    pub fn heap_copytuple(tuple: pg_sys::HeapTuple) -> pg_sys::HeapTuple;
    pub fn ReleaseBuffer(buffer: pg_sys::Buffer);
    pub fn pg_detoast_datum(datum: *mut pg_sys::varlena) -> *mut pg_sys::varlena;
    pub fn fmgr_info_cxt(function: pg_sys::Oid, info: *mut pg_sys::FmgrInfo, context: pg_sys::MemoryContext);
    pub fn OutputFunctionCall(function: *mut pg_sys::FmgrInfo, value: pg_sys::Datum) -> *mut c_char;
    pub fn makeStringInfo() -> pg_sys::StringInfo;
    pub fn appendStringInfoChar(text: pg_sys::StringInfo, letter: c_char);
    pub fn appendBinaryStringInfo(text: pg_sys::StringInfo, data: Bytes, length: c_int);
    pub fn escape_json(text: pg_sys::StringInfo, value: *const c_char);
    pub fn pfree(pointer: *mut c_void);
    pub fn MakeTransitionCaptureState(
        triggers: *mut pg_sys::TriggerDesc,
        relation: pg_sys::Oid,
        command: pg_sys::CmdType::Type,
    ) -> *mut pg_sys::TransitionCaptureState;
} }

// What core's ereport() is made of: pgrx has none of these, or says on some servers that it does not return.
unsafe extern "C-unwind" {
    pub fn errstart(elevel: c_int, domain: *const c_char) -> bool;
    pub fn errfinish(filename: *const c_char, lineno: c_int, funcname: *const c_char);
    pub fn errcode(sqlerrcode: c_int) -> c_int;
    pub fn ReThrowError(edata: *mut pg_sys::ErrorData);
    pub fn errmsg_internal(fmt: *const c_char, ...) -> c_int;
    pub fn errdetail_internal(fmt: *const c_char, ...) -> c_int;
    pub fn errhint(fmt: *const c_char, ...) -> c_int;
}

/// Sets a setting until the level of nesting ends that [`NewGUCNestLevel`] began.
///
/// # Safety
/// Only from a plain old frame or inside [`protect`].
#[expect(ffi_unwind_calls, reason = "plain old frame")]
pub unsafe fn set_for_level(name: &CStr, value: *const c_char) {
    // SAFETY: as core sets what a function's SET clause says.
    unsafe {
        set_config_option(
            name.as_ptr(),
            value,
            pg_sys::GucContext::PGC_USERSET,
            pg_sys::GucSource::PGC_S_SESSION,
            pg_sys::GucAction::GUC_ACTION_SAVE,
            true,
            0,
            false,
        );
    }
}

/// Values print, until the level of nesting ends that this begins, in the one way that every session reads alike
/// whatever its settings are, as postgres_fdw and pg_dump have them. Gives the level.
///
/// # Safety
/// As for [`set_for_level`].
#[expect(ffi_unwind_calls, reason = "plain old frame")]
pub unsafe fn print_plainly() -> c_int {
    // SAFETY: as above.
    unsafe {
        let level = NewGUCNestLevel();
        set_for_level(c"datestyle", c"ISO".as_ptr());
        set_for_level(c"intervalstyle", c"postgres".as_ptr());
        set_for_level(c"extra_float_digits", c"3".as_ptr());
        level
    }
}

// Settings' variables.
unsafe extern "C" {
    pub static bytea_output: c_int;
    pub static locale_monetary: *const c_char;
}

#[cfg(not(since_pg19))]
pub type NodeInstrumentation = pg_sys::Instrumentation;
#[cfg(since_pg19)]
pub type NodeInstrumentation = pg_sys::NodeInstrumentation;

/// Somebody else's ERROR, whole.
pub struct PgError(*mut pg_sys::ErrorData);

impl PgError {
    /// What `ReThrowError` takes.
    pub fn into_data(self) -> *mut pg_sys::ErrorData {
        self.0
    }

    /// The same error where `query` was not what the client sent: its cursor position becomes one in an internal query.
    pub fn in_query(self, query: &CStr) -> Self {
        // SAFETY: a copy that is ours; a position in an inner query keeps the query that it is for.
        unsafe {
            let error = &mut *self.0;
            if error.cursorpos > 0 && error.internalquery.is_null() {
                (error.internalpos, error.cursorpos) = (error.cursorpos, 0);
                error.internalquery = pg_sys::pstrdup(query.as_ptr());
            }
        }
        self
    }

    /// The message in the server's encoding, where the error is about a value alone (class 22, data exception).
    pub fn about_a_value(&self) -> Option<&CStr> {
        // Two characters of six bits each, as MAKE_SQLSTATE packs them.
        const DATA_EXCEPTION: c_int = 2 | 2 << 6;
        // SAFETY: a copy that is ours, and ends with it; an error has a message.
        unsafe {
            let error = &*self.0;
            (error.sqlerrcode & 0xfff == DATA_EXCEPTION).then(|| CStr::from_ptr(error.message))
        }
    }
}

/// Runs `body`, which may raise any ERROR, and catches the ERROR with all its fields.
///
/// The caller passes the error on (see `raise`); an ERROR that is caught and forgotten leaves locks, pins and
/// the transaction behind, unless a subtransaction around `body` is rolled back.
///
/// # Safety
/// `body` is a plain old frame: raw functions only, no destructors, no panic.
#[expect(ffi_unwind_calls, reason = "catches what is raised")]
pub unsafe fn protect<F: FnOnce()>(body: F) -> Result<(), PgError> {
    // SAFETY: what PG_TRY does: a jump buffer on the exception stack for as long as `body` runs.
    unsafe {
        let context = pg_sys::CurrentMemoryContext;
        let exception_stack = pg_sys::PG_exception_stack;
        let error_context_stack = pg_sys::error_context_stack;
        let jumped = call_with_sigsetjmp(false, |buffer| {
            pg_sys::PG_exception_stack = ptr::from_ref(buffer).cast_mut().cast();
            body();
            0
        });
        pg_sys::PG_exception_stack = exception_stack;
        pg_sys::error_context_stack = error_context_stack;
        if jumped == 0 {
            return Ok(());
        }
        pg_sys::CurrentMemoryContext = context;
        let mut error = ptr::null_mut();
        // There may be no memory left for the copy.
        call_with_sigsetjmp(false, |buffer| {
            pg_sys::PG_exception_stack = ptr::from_ref(buffer).cast_mut().cast();
            error = CopyErrorData();
            0
        });
        pg_sys::PG_exception_stack = exception_stack;
        FlushErrorState();
        Err(PgError(if error.is_null() { out_of_memory() } else { error }))
    }
}

/// Whether a backslash escapes in every string constant. From version 19 on it does in none but `E'...'`.
pub fn backslash_escapes() -> bool {
    #[cfg(not(since_pg19))]
    // SAFETY: reads a setting's variable.
    unsafe {
        !pg_sys::standard_conforming_strings
    }
    #[cfg(since_pg19)]
    false
}

/// The place in a plan's range table of the table that it changes, the first of them; 0 where there is none.
///
/// # Safety
/// A planned statement.
pub unsafe fn first_result_relation(statement: *const pg_sys::PlannedStmt) -> pg_sys::Index {
    // SAFETY: the caller's promise; the list is NULL or has a cell.
    unsafe {
        #[cfg(not(since_pg19))]
        let first = (*statement).resultRelations.as_ref().map_or(0, |list| (*list.elements).int_value);
        #[cfg(since_pg19)]
        let first = pg_sys::bms_next_member((*statement).resultRelationRelids, -1);
        pg_sys::Index::try_from(first).unwrap_or(0)
    }
}

/// Counts of a plan's node that nobody asked to be counted: of its rows alone.
///
/// # Safety
/// As for `palloc`.
pub unsafe fn row_instrumentation() -> *mut NodeInstrumentation {
    let rows = pg_sys::InstrumentOption::INSTRUMENT_ROWS as c_int;
    // SAFETY: an allocation in the current memory context.
    unsafe {
        #[cfg(not(since_pg19))]
        return pg_sys::InstrAlloc(1, rows, false);
        #[cfg(since_pg19)]
        return pg_sys::InstrAllocNode(rows, false);
    }
}

/// Says that all columns of a descriptor made by hand are there. Before version 19 there was nothing to say.
///
/// # Safety
/// Every column was initialized.
pub unsafe fn finish_descriptor(descriptor: pg_sys::TupleDesc) {
    #[cfg(not(since_pg19))]
    let _ = descriptor;
    #[cfg(since_pg19)]
    // SAFETY: the caller's promise.
    unsafe {
        pg_sys::TupleDescFinalize(descriptor);
    }
}

/// Runs Rust proper and catches a panic, an ERROR that pgrx made one of included.
///
/// pgrx takes its jump buffer off the exception stack only when it has copied the error. Where there is no memory for the copy
/// that is a second panic, out of a frame whose buffer is still on the stack: the next ERROR would jump into it. So the
/// stack is put back here, as it is for this frame.
///
/// The ERROR itself pgrx leaves on PostgreSQL's own stack of errors, for a guard of its own that throws it on. There is none
/// here: what is said of it is in the panic, and the stack is emptied.
#[inline]
#[expect(ffi_unwind_calls, reason = "raises nothing: it resets counts and a memory context")]
pub fn catch<T>(body: impl FnOnce() -> T) -> std::thread::Result<T> {
    // SAFETY: statics of this process; what they were when this frame began is good for as long as it is there.
    unsafe {
        let (exception_stack, error_context_stack) = (pg_sys::PG_exception_stack, pg_sys::error_context_stack);
        let outcome = catch_unwind(AssertUnwindSafe(body));
        if outcome.is_err() {
            pg_sys::PG_exception_stack = exception_stack;
            pg_sys::error_context_stack = error_context_stack;
        }
        if let Err(thrown) = &outcome
            && let Some(CaughtError::PostgresError(_)) = thrown.downcast_ref()
        {
            FlushErrorState();
        }
        outcome
    }
}

/// What stands for an error that there was no memory for.
fn out_of_memory() -> *mut pg_sys::ErrorData {
    static ERROR: BackendLocal<core::mem::MaybeUninit<pg_sys::ErrorData>> =
        BackendLocal::new(core::mem::MaybeUninit::zeroed());
    // 53200, as `MAKE_SQLSTATE` packs it.
    const OUT_OF_MEMORY: c_int = 5 | 3 << 6 | 2 << 12;
    let error = ERROR.get().cast::<pg_sys::ErrorData>();
    // SAFETY: zeroes are a value of it, and what raises it copies it.
    unsafe {
        *error = core::mem::zeroed();
        (*error).elevel = pgrx::PgLogLevel::ERROR as c_int;
        (*error).output_to_client = true;
        (*error).sqlerrcode = OUT_OF_MEMORY;
        (*error).message = c"out of memory".as_ptr().cast_mut();
    }
    error
}

/// Runs `body` and drops an ERROR that it raises: false then, and nothing is left of it. Interrupts are held off, and
/// nobody adds context to what it reports. For a few raw calls that hold nothing when they fail, where an ERROR must not
/// come out: after a commit it would be a PANIC.
///
/// # Safety
/// As for [`protect`].
#[expect(ffi_unwind_calls, reason = "catches what is raised")]
pub unsafe fn attempt<F: FnOnce()>(body: F) -> bool {
    // SAFETY: what PG_TRY does; an ERROR resets the counts of what holds interrupts off, which are those of the frames
    // around us, so they are put back.
    unsafe {
        let context = pg_sys::CurrentMemoryContext;
        let exception_stack = pg_sys::PG_exception_stack;
        let error_context_stack = pg_sys::error_context_stack;
        let held = (pg_sys::InterruptHoldoffCount, pg_sys::QueryCancelHoldoffCount, pg_sys::CritSectionCount);
        pg_sys::InterruptHoldoffCount += 1;
        pg_sys::error_context_stack = ptr::null_mut();
        let jumped = call_with_sigsetjmp(false, |buffer| {
            pg_sys::PG_exception_stack = ptr::from_ref(buffer).cast_mut().cast();
            body();
            0
        });
        pg_sys::PG_exception_stack = exception_stack;
        pg_sys::error_context_stack = error_context_stack;
        pg_sys::CurrentMemoryContext = context;
        (pg_sys::InterruptHoldoffCount, pg_sys::QueryCancelHoldoffCount, pg_sys::CritSectionCount) = held;
        if jumped != 0 {
            FlushErrorState();
        }
        jumped == 0
    }
}

/// Sleeps on the process latch for at most `milliseconds`, then serves interrupts.
///
/// # Safety
/// Only from a plain old frame or inside [`protect`]: a cancel raises an ERROR.
#[expect(ffi_unwind_calls, reason = "plain old frame")]
pub unsafe fn sleep_on_latch(milliseconds: c_long) {
    // SAFETY: the caller's promise; MyLatch is this process's own.
    unsafe {
        let events = pg_sys::WL_LATCH_SET | pg_sys::WL_TIMEOUT | pg_sys::WL_EXIT_ON_PM_DEATH;
        WaitLatch(pg_sys::MyLatch, events as c_int, milliseconds, pg_sys::PG_WAIT_EXTENSION);
        ResetLatch(pg_sys::MyLatch);
        if pg_sys::InterruptPending != 0 {
            ProcessInterrupts();
        }
    }
}

/// The cells of a list of pointers.
///
/// # Safety
/// `list` is NULL or a valid list, whose cells hold pointers to `T`.
pub unsafe fn pointers<T>(list: *mut pg_sys::List) -> impl Iterator<Item = *mut T> + Clone {
    // SAFETY: the caller's promise.
    unsafe {
        let length = if list.is_null() { 0 } else { usize::try_from((*list).length).unwrap_or(0) };
        (0..length).map(move |index| (*(*list).elements.add(index)).ptr_value.cast())
    }
}

/// Nanoseconds of the system's clock that only goes forward; the same in all processes of a machine.
pub fn monotonic_nanoseconds() -> u64 {
    #[repr(C)]
    struct Timespec {
        seconds: i64,
        nanoseconds: i64,
    }
    const CLOCK_MONOTONIC: c_int = 1;
    unsafe extern "C" {
        fn clock_gettime(clock: c_int, time: *mut Timespec) -> c_int;
    }
    let mut time = Timespec { seconds: 0, nanoseconds: 0 };
    // SAFETY: fills in the struct that it is given; that clock always exists.
    unsafe { clock_gettime(CLOCK_MONOTONIC, &mut time) };
    (time.seconds as u64).wrapping_mul(1_000_000_000).wrapping_add(time.nanoseconds as u64)
}

/// The argument of a callback.
pub type Opaque = *mut c_void;

//! One run of a statement's text: what can be run, the values of its parameters, and the run itself.
//!
//! What a rehearsal and an execution have in common, so that both understand a text in the same way.

use core::ffi::{CStr, c_char};
use core::ptr;
use std::ffi::CString;

use pgrx::pg_sys;
use rules::error::Error;
use rules::lexer::{highest_parameter, start_of, takes_long_to_scan};
use rules::words::counted;

use crate::pg::ereport::Failure;
use crate::pg::function::MOST_BYTES;
use crate::pg::{encoding, ffi};

/// A statement's text as PostgreSQL takes it.
///
/// # Errors
/// WG007 for one that no text of PostgreSQL's is.
pub fn c_text(statement: &str, again: &str) -> Result<CString, Error> {
    if statement.contains('\0') {
        return Err(Error::invalid("malformed statement", again));
    }
    if takes_long_to_scan(statement.as_bytes()) {
        return Err(Error::invalid(
            "the statement has too many comments in one another or without a blank between",
            again,
        ));
    }
    Ok(encoding::to_c(statement))
}

/// Checks that `text` is one statement that can be rehearsed, and gives the part of it that is the statement.
///
/// # Errors
/// WG007 when it is none or several or of another kind; syntax errors as PostgreSQL tells them.
#[expect(ffi_unwind_calls, reason = "inside protect")]
pub fn check(text: &CString) -> Result<String, Failure> {
    let mut list: *mut pg_sys::List = ptr::null_mut();
    // SAFETY: the raw parser looks nothing up; nothing but the raw call inside.
    unsafe {
        ffi::protect(|| list = ffi::raw_parser(text.as_ptr(), pg_sys::RawParseMode::RAW_PARSE_DEFAULT))
            .map_err(|error| error.in_query(text))?;
        let count = if list.is_null() { 0 } else { (*list).length };
        let hint = "SELECT writeguard.request($$UPDATE orders SET … WHERE …$$, reason => 'why this is right');";
        if count != 1 {
            return Err(Error::invalid(format!("a request is for one statement, not for {count}"), hint).into());
        }
        let raw = (*(*list).elements).ptr_value.cast::<pg_sys::RawStmt>();
        match (*(*raw).stmt).type_ {
            pg_sys::NodeTag::T_UpdateStmt
            | pg_sys::NodeTag::T_DeleteStmt
            | pg_sys::NodeTag::T_InsertStmt
            | pg_sys::NodeTag::T_MergeStmt
            | pg_sys::NodeTag::T_SelectStmt
            | pg_sys::NodeTag::T_TruncateStmt => {
                let first = usize::try_from((*raw).stmt_location).unwrap_or(0);
                let length = usize::try_from((*raw).stmt_len).unwrap_or(0);
                let from = start_of(text.to_bytes(), first, ffi::backslash_escapes());
                let whole = text.to_bytes();
                let to = if length > 0 { first + length } else { whole.len() };
                Ok(encoding::from_server(whole.get(from..to).unwrap_or(whole)))
            }
            _ => {
                let message = "only UPDATE, DELETE, MERGE, INSERT, SELECT and TRUNCATE can be reviewed";
                Err(Error::invalid(message, hint).into())
            }
        }
    }
}

/// The texts of parameters, as PostgreSQL takes them.
pub fn values(parameters: &[Option<String>]) -> Vec<Option<CString>> {
    parameters.iter().map(|value| value.as_deref().map(encoding::to_c)).collect()
}

/// Whether a statement that takes `wanted` parameters was given so many.
///
/// # Errors
/// WG007 when it was not.
pub fn all_given(wanted: usize, given: usize) -> Result<(), Error> {
    if wanted == given {
        return Ok(());
    }
    Err(Error::invalid(
        format!(
            "the statement takes {}, but {given} {} given",
            counted(wanted as u64, "parameter"),
            if given == 1 { "is" } else { "are" }
        ),
        "parameters => '{7, NULL}' (one for each $1, $2, …)",
    ))
}

/// Whether a text has a parameter that was not given: PostgreSQL would have room for as many as the highest number says.
///
/// # Errors
/// As for [`all_given`].
pub fn none_beyond(text: &CStr, given: usize) -> Result<(), Error> {
    let highest = highest_parameter(&String::from_utf8_lossy(text.to_bytes()), ffi::backslash_escapes());
    let highest = usize::try_from(highest).unwrap_or(usize::MAX);
    if highest > given { all_given(highest, given) } else { Ok(()) }
}

/// Whether each parameter is used: one that is not has no type.
///
/// # Errors
/// WG007 with the first that is not.
pub fn each_used(unused: Option<usize>) -> Result<(), Error> {
    let Some(number) = unused else { return Ok(()) };
    Err(Error::invalid(
        format!("the statement does not use parameter ${number}"),
        "parameters => '{7, NULL}' (one for each $1, $2, …)",
    ))
}

/// Whether the parameters are short enough to be stored as they print: `1e100000` is short only as it is written.
///
/// # Errors
/// WG007 when they are not.
pub fn not_too_long(bytes: usize) -> Result<(), Error> {
    if bytes <= MOST_BYTES {
        return Ok(());
    }
    Err(Error::Invalid {
        message: "the parameters are too long".into(),
        detail: Some(format!("As their types print them they have more than {MOST_BYTES} bytes.")),
        hint: "parameters => '{7, NULL}' (one for each $1, $2, …)".into(),
    })
}

/// One run, as plain data.
pub struct Run<'a> {
    text: &'a CString,
    values: &'a [Option<CString>],
    /// The parameters as their types' output functions print them: as many as values; NULL for NULL.
    printed: &'a mut [*mut c_char],
    /// Where what is printed outlives the run.
    context: pg_sys::MemoryContext,
    /// A subtransaction was begun that is to be taken back.
    pub begun: bool,
    /// Parameters that the statement takes; with another number of values it was not run.
    pub wanted: usize,
    /// The first parameter that it does not use, from 1; with one it was not run either.
    pub unused: Option<usize>,
    /// Bytes of what was printed; past [`MOST_BYTES`] the rest was not.
    pub bytes: usize,
}

impl<'a> Run<'a> {
    /// A run of `text` with the `values` of its parameters, which are `printed` into `context`.
    pub fn new(
        text: &'a CString,
        values: &'a [Option<CString>],
        printed: &'a mut [*mut c_char],
        context: pg_sys::MemoryContext,
    ) -> Self {
        Self { text, values, printed, context, begun: false, wanted: values.len(), unused: None, bytes: 0 }
    }

    /// Begins what will be taken back. What the transaction has deferred so far happens here and is not the statement's; what
    /// the statement would defer happens with it.
    ///
    /// # Safety
    /// Inside [`ffi::protect`], in a transaction. Allocates in PostgreSQL's memory only.
    #[expect(ffi_unwind_calls, reason = "plain old frame")]
    pub unsafe fn begin(&mut self) {
        // SAFETY: the order of calls is that of core's own procedural languages.
        unsafe {
            ffi::BeginInternalSubTransaction(ptr::null());
            self.begun = true;
            ffi::SPI_connect();
            ffi::SPI_execute(NOTHING_DEFERRED.as_ptr(), false, 0);
        }
    }

    /// Has all happen that the transaction has deferred.
    ///
    /// # Safety
    /// As for [`Run::begin`].
    #[expect(ffi_unwind_calls, reason = "plain old frame")]
    pub unsafe fn fire_deferred() {
        // SAFETY: as above.
        unsafe {
            ffi::SPI_connect();
            ffi::SPI_execute(NOTHING_DEFERRED.as_ptr(), false, 0);
            ffi::SPI_finish();
        }
    }

    /// Runs the statement, with the types of its parameters as the statement itself makes them; the result is in SPI's
    /// hands. Without as many values as it takes it is not run.
    ///
    /// # Safety
    /// Inside [`ffi::protect`], connected to SPI. Allocates in PostgreSQL's memory only.
    #[expect(ffi_unwind_calls, reason = "plain old frame")]
    unsafe fn perform(&mut self, purpose: Purpose) {
        // SAFETY: the order of calls is that of core's own procedural languages.
        unsafe {
            let mut types: *mut pg_sys::Oid = ptr::null_mut();
            let mut count = 0;
            let raw = ffi::raw_parser(self.text.as_ptr(), pg_sys::RawParseMode::RAW_PARSE_DEFAULT);
            let raw: *mut pg_sys::RawStmt = (*(*raw).elements).ptr_value.cast();
            if (*(*raw).stmt).type_ != pg_sys::NodeTag::T_TruncateStmt {
                ffi::parse_analyze_varparams(raw, self.text.as_ptr(), &mut types, &mut count, ptr::null_mut());
            } else if purpose == Purpose::Rehearsal {
                // Its rows are counted before anything happens; triggers have no part in that. Taken back with the
                // rest.
                ffi::set_config_option(
                    c"session_replication_role".as_ptr(),
                    c"replica".as_ptr(),
                    pg_sys::GucContext::PGC_SUSET,
                    pg_sys::GucSource::PGC_S_SESSION,
                    pg_sys::GucAction::GUC_ACTION_LOCAL,
                    true,
                    0,
                    false,
                );
            }
            self.wanted = usize::try_from(count).unwrap_or(0);
            if self.wanted != self.values.len() {
                return;
            }
            self.unused =
                (0..self.wanted).find(|index| *types.add(*index) == pg_sys::InvalidOid).map(|index| index + 1);
            if self.unused.is_some() {
                return;
            }
            let datums = ffi::palloc(size_of::<pg_sys::Datum>() * (self.wanted + 1)).cast::<pg_sys::Datum>();
            let nulls = ffi::palloc(self.wanted + 1).cast::<c_char>();
            for index in 0..self.wanted {
                let (mut input, mut parameter) = (pg_sys::InvalidOid, pg_sys::InvalidOid);
                ffi::getTypeInputInfo(*types.add(index), &mut input, &mut parameter);
                let Some(Some(text)) = self.values.get(index) else {
                    *nulls.add(index) = b'n' as c_char;
                    *datums.add(index) = pg_sys::Datum::from(0);
                    continue;
                };
                *nulls.add(index) = b' ' as c_char;
                *datums.add(index) = ffi::OidInputFunctionCall(input, text.as_ptr().cast_mut(), parameter, -1);
            }
            if purpose == Purpose::Rehearsal {
                self.print(types, datums, nulls);
            }
            let plan = ffi::SPI_prepare(self.text.as_ptr(), count, types);
            ffi::SPI_execute_plan(plan, datums, nulls, false, 0);
        }
    }

    /// Prints the parameters that are not NULL.
    ///
    /// # Safety
    /// As for [`Run::perform`]; as many of each as the statement takes parameters.
    #[expect(ffi_unwind_calls, reason = "plain old frame")]
    unsafe fn print(&mut self, types: *const pg_sys::Oid, datums: *const pg_sys::Datum, nulls: *const c_char) {
        // SAFETY: the caller's promise.
        unsafe {
            let plainly = ffi::print_plainly();
            for index in 0..self.wanted {
                if *nulls.add(index) == b'n' as c_char || self.bytes > MOST_BYTES {
                    continue;
                }
                let (mut output, mut is_varlena) = (pg_sys::InvalidOid, false);
                ffi::getTypeOutputInfo(*types.add(index), &mut output, &mut is_varlena);
                let inside = pg_sys::CurrentMemoryContext;
                pg_sys::CurrentMemoryContext = self.context;
                let printed = ffi::OidOutputFunctionCall(output, *datums.add(index));
                pg_sys::CurrentMemoryContext = inside;
                self.bytes += CStr::from_ptr(printed).count_bytes();
                if let Some(place) = self.printed.get_mut(index) {
                    *place = printed;
                }
            }
            ffi::AtEOXact_GUC(true, plainly);
        }
    }

    /// Runs the statement to be taken back.
    ///
    /// # Safety
    /// As for [`Run::begin`], after it.
    #[expect(ffi_unwind_calls, reason = "plain old frame")]
    pub unsafe fn run(&mut self) {
        // SAFETY: the caller's promise.
        unsafe {
            self.perform(Purpose::Rehearsal);
            ffi::SPI_finish();
        }
    }

    /// Runs the statement to stay, under `settings` by name, and puts the rows that it gives into
    /// `rows` as jsonb.
    ///
    /// # Safety
    /// Inside [`ffi::protect`], in a transaction. Allocates in PostgreSQL's memory only.
    #[expect(ffi_unwind_calls, reason = "plain old frame")]
    pub unsafe fn execute(&mut self, settings: &[(CString, CString)], rows: Rows) {
        // SAFETY: as above; what SPI gives lives until SPI_finish.
        unsafe {
            ffi::SPI_connect();
            let level = ffi::NewGUCNestLevel();
            for (name, value) in settings {
                ffi::set_for_level(name, value.as_ptr());
            }
            self.perform(Purpose::Execution);
            if self.wanted == self.values.len() && self.unused.is_none() && !pg_sys::SPI_tuptable.is_null() {
                rows.put(pg_sys::SPI_tuptable);
            }
            ffi::AtEOXact_GUC(true, level);
            ffi::SPI_finish();
        }
    }
}

const NOTHING_DEFERRED: &CStr = c"SET CONSTRAINTS ALL IMMEDIATE";

/// What a statement is run for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Purpose {
    Rehearsal,
    Execution,
}

/// Where rows of one jsonb column go.
#[derive(Clone, Copy)]
pub struct Rows {
    pub store: *mut pg_sys::Tuplestorestate,
    pub desc: pg_sys::TupleDesc,
}

impl Rows {
    /// # Safety
    /// Inside [`ffi::protect`]; the table is SPI's.
    #[expect(ffi_unwind_calls, reason = "plain old frame")]
    unsafe fn put(self, table: *mut pg_sys::SPITupleTable) {
        // SAFETY: the caller's promise; the store copies what it is given.
        unsafe {
            let outside = pg_sys::CurrentMemoryContext;
            let row = ffi::AllocSetContextCreateInternal(
                outside,
                c"row of an executed request".as_ptr(),
                0,
                8 * 1024,
                8 * 1024 * 1024,
            );
            let desc = ffi::BlessTupleDesc((*table).tupdesc);
            for index in 0..usize::try_from((*table).numvals).unwrap_or(0) {
                pg_sys::CurrentMemoryContext = row;
                let tuple = ffi::heap_copy_tuple_as_datum(*(*table).vals.add(index), desc);
                let json = ffi::OidFunctionCall1Coll(ROW_TO_JSON, pg_sys::InvalidOid, tuple);
                let json = ffi::text_to_cstring(json.cast_mut_ptr());
                let mut value = ffi::OidInputFunctionCall(JSONB_IN, json, pg_sys::InvalidOid, -1);
                let mut is_null = false;
                ffi::tuplestore_putvalues(self.store, self.desc, &mut value, &mut is_null);
                pg_sys::CurrentMemoryContext = outside;
                ffi::MemoryContextReset(row);
            }
        }
    }
}

/// `pg_catalog.row_to_json(record)`.
const ROW_TO_JSON: pg_sys::Oid = pg_sys::Oid::from_u32(3155);
/// `pg_catalog.jsonb_in(cstring)`.
const JSONB_IN: pg_sys::Oid = pg_sys::Oid::from_u32(3806);

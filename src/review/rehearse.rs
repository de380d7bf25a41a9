//! Runs a statement inside a subtransaction, counts the covered rows it changed, and takes all of it back.
//!
//! The statement runs as its caller and with the caller's rights; nothing is refused by a limit while it runs. Its own
//! errors come out as they are. What cannot be taken back is what a rolled-back statement never gives back: sequence
//! numbers, and what functions did outside the database.

use core::ffi::c_char;
use core::ptr;
use std::collections::BTreeMap;
use std::ffi::CString;

use pgrx::pg_sys;

use crate::error::Error;
use crate::ffi;
use crate::guard::tally::{self, Account, Wanted};
use crate::guard::{book, lift, statement};
use crate::raise::Failure;

/// Checks that `text` is one statement that can be rehearsed, and gives the part of it that is the statement.
///
/// # Errors
/// WG007 when it is none or several or of another kind; syntax errors as PostgreSQL tells them.
pub fn check(text: &CString) -> Result<Option<&str>, Failure> {
    let mut list: *mut pg_sys::List = ptr::null_mut();
    // SAFETY: the raw parser looks nothing up; nothing but the raw call inside.
    unsafe {
        ffi::protect(|| list = ffi::raw_parser(text.as_ptr(), pg_sys::RawParseMode::RAW_PARSE_DEFAULT))?;
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
                let from = usize::try_from((*raw).stmt_location).unwrap_or(0);
                let length = usize::try_from((*raw).stmt_len).unwrap_or(0);
                let whole = text.to_str().unwrap_or_default();
                let to = if length > 0 { from + length } else { whole.len() };
                Ok(whole.get(from..to))
            }
            _ => {
                let message = "only UPDATE, DELETE, MERGE, INSERT, SELECT and TRUNCATE can be reviewed";
                Err(Error::invalid(message, hint).into())
            }
        }
    }
}

/// What a rehearsal found.
pub struct Rehearsed {
    /// Covered rows that the statement would change, by qualified table name.
    pub rows: BTreeMap<String, u64>,
    /// The same by table and operation, with a few rows before and after.
    pub account: Account,
    /// A policy refuses it whatever number of rows it changes.
    pub refused_without_rows: bool,
    /// The parameters as their types' output functions print them, which is how a token check sees those of a client.
    pub parameters: Vec<Option<String>>,
}

/// Runs the statement and takes it back. One that has seen as many rows as `wanted` gives ends there.
///
/// # Errors
/// Those of the statement itself, untouched; WG007 when the number of parameters is not what it takes.
pub fn rehearse(text: &CString, parameters: &[Option<String>], wanted: Wanted) -> Result<Rehearsed, Failure> {
    let values: Vec<Option<CString>> =
        parameters.iter().map(|value| value.as_deref().map(|value| CString::new(value).unwrap_or_default())).collect();
    let mut printed: Vec<*mut c_char> = vec![ptr::null_mut(); values.len()];
    let serial = statement::current();
    let mut before = Vec::new();
    let account;
    tally::open(wanted);
    // SAFETY: `Run::run` is a plain old frame over raw calls, and what it began is taken back here, whichever way it
    // went.
    let (outcome, takes, rows) = unsafe {
        let (context, owner) = (pg_sys::CurrentMemoryContext, pg_sys::CurrentResourceOwner);
        let mut run = Run { text, values: &values, printed: &mut printed, context, begun: false, wanted: values.len() };
        let mut outcome = ffi::protect(|| run.begin());
        if outcome.is_ok() {
            lift::begin_rehearsal();
            before = book::rows_by_table(serial);
            // The statement's own error must outlive what is taken back.
            let inside = pg_sys::CurrentMemoryContext;
            pg_sys::CurrentMemoryContext = context;
            outcome = ffi::protect(|| {
                pg_sys::CurrentMemoryContext = inside;
                run.run();
            });
        }
        let rows = book::rows_by_table(serial);
        account = tally::close();
        if run.begun {
            ffi::RollbackAndReleaseCurrentSubTransaction();
        }
        pg_sys::CurrentMemoryContext = context;
        pg_sys::CurrentResourceOwner = owner;
        (outcome, run.wanted, rows)
    };
    if !account.stopped {
        outcome?;
    }
    if takes != values.len() {
        return Err(Error::invalid(
            format!("the statement takes {takes} parameters, but {} are given", values.len()),
            "parameters => '{7, NULL}' (one for each $1, $2, …)",
        )
        .into());
    }
    let rows = rows
        .into_iter()
        .map(|(name, rows)| {
            let earlier = before.iter().find(|(known, _)| *known == name).map_or(0, |(_, rows)| *rows);
            (name, rows.saturating_sub(earlier))
        })
        .filter(|(_, rows)| *rows > 0)
        .collect();
    // SAFETY: NULL or C strings in our own memory context.
    let parameters = printed.into_iter().map(|text| unsafe { ffi::text(text) }).collect();
    Ok(Rehearsed { rows, account, refused_without_rows: lift::is_refused_without_rows(), parameters })
}

/// One run, as plain data.
struct Run<'a> {
    text: &'a CString,
    values: &'a [Option<CString>],
    /// As many as values; NULL for NULL.
    printed: &'a mut [*mut c_char],
    /// Where what is printed outlives the run.
    context: pg_sys::MemoryContext,
    begun: bool,
    wanted: usize,
}

impl Run<'_> {
    /// Begins what will be taken back. What the transaction has deferred so far happens here and is not the statement's; what
    /// the statement would defer happens with it.
    ///
    /// # Safety
    /// Inside [`ffi::protect`], in a transaction. Allocates in PostgreSQL's memory only.
    unsafe fn begin(&mut self) {
        // SAFETY: the order of calls is that of core's own procedural languages.
        unsafe {
            ffi::BeginInternalSubTransaction(ptr::null());
            self.begun = true;
            ffi::SPI_connect();
            ffi::SPI_execute(c"SET CONSTRAINTS ALL IMMEDIATE".as_ptr(), false, 0);
        }
    }

    /// # Safety
    /// As for [`Run::begin`], after it.
    unsafe fn run(&mut self) {
        // SAFETY: as above.
        unsafe {
            let mut types: *mut pg_sys::Oid = ptr::null_mut();
            let mut count = 0;
            let raw = ffi::raw_parser(self.text.as_ptr(), pg_sys::RawParseMode::RAW_PARSE_DEFAULT);
            let raw: *mut pg_sys::RawStmt = (*(*raw).elements).ptr_value.cast();
            if (*(*raw).stmt).type_ == pg_sys::NodeTag::T_TruncateStmt {
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
            } else {
                ffi::parse_analyze_varparams(raw, self.text.as_ptr(), &mut types, &mut count, ptr::null_mut());
            }
            self.wanted = usize::try_from(count).unwrap_or(0);
            if self.wanted != self.values.len() {
                return;
            }
            let datums = ffi::palloc(size_of::<pg_sys::Datum>() * (self.wanted + 1)).cast::<pg_sys::Datum>();
            let nulls = ffi::palloc(self.wanted + 1).cast::<c_char>();
            for index in 0..self.wanted {
                let (mut input, mut parameter) = (pg_sys::InvalidOid, pg_sys::InvalidOid);
                let (mut output, mut is_varlena) = (pg_sys::InvalidOid, false);
                let type_oid = *types.add(index);
                ffi::getTypeInputInfo(type_oid, &mut input, &mut parameter);
                ffi::getTypeOutputInfo(type_oid, &mut output, &mut is_varlena);
                let Some(Some(text)) = self.values.get(index) else {
                    *nulls.add(index) = b'n' as c_char;
                    *datums.add(index) = pg_sys::Datum::from(0);
                    continue;
                };
                let datum = ffi::OidInputFunctionCall(input, text.as_ptr().cast_mut(), parameter, -1);
                *nulls.add(index) = b' ' as c_char;
                *datums.add(index) = datum;
                let inside = pg_sys::CurrentMemoryContext;
                pg_sys::CurrentMemoryContext = self.context;
                let printed = ffi::OidOutputFunctionCall(output, datum);
                pg_sys::CurrentMemoryContext = inside;
                if let Some(place) = self.printed.get_mut(index) {
                    *place = printed;
                }
            }
            let plan = ffi::SPI_prepare(self.text.as_ptr(), count, types);
            ffi::SPI_execute_plan(plan, datums, nulls, false, 0);
            ffi::SPI_finish();
        }
    }
}

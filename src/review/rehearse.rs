//! Runs a statement inside a subtransaction, counts the covered rows it changed, and takes all of it back.
//!
//! The statement runs as its caller and with the caller's rights; nothing is refused by a limit while it runs. Its own errors come out as they
//! are. What cannot be taken back is what a rolled-back statement never gives back: sequence numbers, and what functions did outside the
//! database.

use core::ptr;
use std::ffi::CString;

use pgrx::pg_sys;

use crate::error::Error;
use crate::ffi::{self, Foreign};
use crate::guard::{book, decide, statement};
use crate::raise::Failure;

/// Checks that `text` is one statement that can be rehearsed.
///
/// # Errors
/// WG007 when it is none or several or of another kind; syntax errors as PostgreSQL tells them.
pub fn check(text: &CString) -> Result<(), Failure> {
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
            | pg_sys::NodeTag::T_TruncateStmt => Ok(()),
            _ => {
                let message = "only UPDATE, DELETE, MERGE, INSERT, SELECT and TRUNCATE can be reviewed";
                Err(Error::invalid(message, hint).into())
            }
        }
    }
}

/// Covered rows that the statement would change, by qualified table name.
///
/// # Errors
/// Those of the statement itself, untouched; WG007 when the number of parameters is not what it takes.
pub fn rehearse(text: &CString, parameters: &[Option<String>]) -> Result<Vec<(String, u64)>, Failure> {
    let values: Vec<Option<CString>> =
        parameters.iter().map(|value| value.as_deref().map(|value| CString::new(value).unwrap_or_default())).collect();
    let serial = statement::current();
    let before = book::rows_by_table(serial);
    let mut run = Run::new(text, &values);
    decide::rehearse(true);
    // SAFETY: `Run::run` is a plain old frame over raw calls, and `take_back` ends what it began, whichever way it went.
    let outcome = unsafe {
        let (context, owner) = (pg_sys::CurrentMemoryContext, pg_sys::CurrentResourceOwner);
        let outcome = ffi::protect(|| run.run());
        let rows = book::rows_by_table(serial);
        if run.begun {
            ffi::RollbackAndReleaseCurrentSubTransaction();
        }
        pg_sys::CurrentMemoryContext = context;
        pg_sys::CurrentResourceOwner = owner;
        outcome.map(|()| rows)
    };
    decide::rehearse(false);
    let rows = outcome.map_err(|error: Foreign| Failure::Foreign(error))?;
    if run.wanted != values.len() {
        return Err(Error::invalid(
            format!("the statement takes {} parameters, but {} are given", run.wanted, values.len()),
            "parameters => '{7, NULL}' (one for each $1, $2, …)",
        )
        .into());
    }
    Ok(rows
        .into_iter()
        .map(|(name, rows)| {
            let earlier = before.iter().find(|(known, _)| *known == name).map_or(0, |(_, rows)| *rows);
            (name, rows.saturating_sub(earlier))
        })
        .filter(|(_, rows)| *rows > 0)
        .collect())
}

/// One run, as plain data.
struct Run<'a> {
    text: &'a CString,
    values: &'a [Option<CString>],
    begun: bool,
    wanted: usize,
}

impl<'a> Run<'a> {
    fn new(text: &'a CString, values: &'a [Option<CString>]) -> Self {
        Self { text, values, begun: false, wanted: values.len() }
    }

    /// # Safety
    /// Inside [`ffi::protect`], in a transaction. Allocates in PostgreSQL's memory only.
    unsafe fn run(&mut self) {
        // SAFETY: the order of calls is that of core's own procedural languages.
        unsafe {
            ffi::BeginInternalSubTransaction(ptr::null());
            self.begun = true;
            ffi::SPI_connect();
            let mut types: *mut pg_sys::Oid = ptr::null_mut();
            let mut count = 0;
            if !self.values.is_empty() {
                let raw = ffi::raw_parser(self.text.as_ptr(), pg_sys::RawParseMode::RAW_PARSE_DEFAULT);
                let raw = (*(*raw).elements).ptr_value.cast();
                ffi::parse_analyze_varparams(raw, self.text.as_ptr(), &mut types, &mut count, ptr::null_mut());
            }
            self.wanted = usize::try_from(count).unwrap_or(0);
            if self.wanted != self.values.len() {
                return;
            }
            let size = size_of::<pg_sys::Datum>();
            let datums = ffi::palloc(size * (self.wanted + 1)).cast::<pg_sys::Datum>();
            let nulls = ffi::palloc(self.wanted + 1).cast::<core::ffi::c_char>();
            for index in 0..self.wanted {
                let (mut input, mut parameter) = (pg_sys::InvalidOid, pg_sys::InvalidOid);
                let type_oid = *types.add(index);
                ffi::getTypeInputInfo(type_oid, &mut input, &mut parameter);
                let text = match self.values.get(index) {
                    Some(Some(text)) => text.as_ptr().cast_mut(),
                    _ => ptr::null_mut(),
                };
                *nulls.add(index) = if text.is_null() { b'n' as _ } else { b' ' as _ };
                *datums.add(index) = if text.is_null() {
                    pg_sys::Datum::from(0)
                } else {
                    ffi::OidInputFunctionCall(input, text, parameter, -1)
                };
            }
            let plan = ffi::SPI_prepare(self.text.as_ptr(), count, types);
            ffi::SPI_execute_plan(plan, datums, nulls, false, 0);
            // What waits for the commit belongs to the statement too.
            ffi::SPI_execute(c"SET CONSTRAINTS ALL IMMEDIATE".as_ptr(), false, 0);
            ffi::SPI_finish();
        }
    }
}

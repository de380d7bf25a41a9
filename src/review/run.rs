//! One run of a statement's text: what can be run, the values of its parameters, and the run itself.
//!
//! What a rehearsal and an execution have in common, so that both understand a text in the same way.

use core::ffi::c_char;
use core::ptr;
use std::ffi::CString;

use pgrx::pg_sys;

use crate::error::Error;
use crate::ffi;
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

/// The texts of parameters, as PostgreSQL takes them.
pub fn values(parameters: &[Option<String>]) -> Vec<Option<CString>> {
    parameters.iter().map(|value| value.as_deref().map(|value| CString::new(value).unwrap_or_default())).collect()
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
        format!("the statement takes {wanted} parameters, but {given} are given"),
        "parameters => '{7, NULL}' (one for each $1, $2, …)",
    ))
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
}

impl<'a> Run<'a> {
    /// A run of `text` with the `values` of its parameters, which are `printed` into `context`.
    pub fn new(
        text: &'a CString,
        values: &'a [Option<CString>],
        printed: &'a mut [*mut c_char],
        context: pg_sys::MemoryContext,
    ) -> Self {
        Self { text, values, printed, context, begun: false, wanted: values.len() }
    }

    /// Begins what will be taken back. What the transaction has deferred so far happens here and is not the statement's; what
    /// the statement would defer happens with it.
    ///
    /// # Safety
    /// Inside [`ffi::protect`], in a transaction. Allocates in PostgreSQL's memory only.
    pub unsafe fn begin(&mut self) {
        // SAFETY: the order of calls is that of core's own procedural languages.
        unsafe {
            ffi::BeginInternalSubTransaction(ptr::null());
            self.begun = true;
            ffi::SPI_connect();
            ffi::SPI_execute(c"SET CONSTRAINTS ALL IMMEDIATE".as_ptr(), false, 0);
        }
    }

    /// Runs the statement, with the types of its parameters as the statement itself makes them.
    ///
    /// # Safety
    /// As for [`Run::begin`], after it.
    pub unsafe fn run(&mut self) {
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

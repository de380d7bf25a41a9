//! How SQL calls us: each SQL function is a plain old frame around Rust proper, so that errors keep their SQLSTATE and
//! all their fields. The functions themselves are declared in `sql/`, where people read them.

use pgrx::{FromDatum, IntoDatum, direct_function_call_as_datum, pg_sys};
use rules::error::Error;

use super::ereport::Failure;
use super::{encoding, preload};

/// The arguments of a call.
pub struct Arguments(pg_sys::FunctionCallInfo);

impl Arguments {
    /// # Safety
    /// `fcinfo` is what PostgreSQL called the function with.
    pub unsafe fn new(fcinfo: pg_sys::FunctionCallInfo) -> Self {
        Self(fcinfo)
    }

    /// The argument at `index`; none for NULL, and for one that the declaration of an older version does not have.
    pub fn get<T: FromSql>(&self, index: usize) -> Option<T> {
        if self.is_null(index) {
            return None;
        }
        // SAFETY: the SQL declaration gives the argument the type that the caller asks for.
        unsafe { Some(T::from_sql((*self.0).args.as_slice((*self.0).nargs as usize)[index].value)) }
    }

    /// Whether the argument at `index` is NULL or not declared.
    pub fn is_null(&self, index: usize) -> bool {
        // SAFETY: the call has that argument.
        !self.has(index) || unsafe { pgrx::fcinfo::pg_arg_is_null(self.0, index) }
    }

    /// The bytes of a text argument in the server's encoding; none for NULL. A long text is not copied where it is stored
    /// plainly.
    pub fn bytes(&self, index: usize) -> Option<&[u8]> {
        let datum: pg_sys::Datum = self.get(index)?;
        // SAFETY: the SQL declaration gives the argument the type text; what it points to lives as long as the call.
        Some(unsafe { text_bytes(datum) })
    }

    /// The elements of an argument that is an array of texts, likewise.
    pub fn elements(&self, index: usize) -> Vec<Option<&[u8]>> {
        let Some(datum) = self.get::<pg_sys::Datum>(index) else { return Vec::new() };
        // SAFETY: the SQL declaration gives the argument the type text[], whose elements have these properties.
        unsafe {
            let array = pg_sys::pg_detoast_datum(datum.cast_mut_ptr()).cast::<pg_sys::ArrayType>();
            let (mut datums, mut nulls, mut count) = (core::ptr::null_mut(), core::ptr::null_mut(), 0);
            let align = pg_sys::TYPALIGN_INT as core::ffi::c_char;
            pg_sys::deconstruct_array(array, pg_sys::TEXTOID, -1, false, align, &mut datums, &mut nulls, &mut count);
            let count = usize::try_from(count).unwrap_or(0);
            (0..count).map(|at| (!*nulls.add(at)).then(|| text_bytes(*datums.add(at)))).collect()
        }
    }

    /// Whether no argument has more bytes than [`MOST_BYTES`].
    ///
    /// # Errors
    /// WG007 for the first one that has.
    pub fn check_lengths(&self) -> Result<(), Error> {
        // SAFETY: PostgreSQL says with how many arguments it calls, and of what types they are.
        unsafe {
            for index in 0..(*self.0).nargs {
                let place = usize::try_from(index).unwrap_or(0);
                if self.is_null(place) {
                    continue;
                }
                let type_oid = pg_sys::get_fn_expr_argtype((*self.0).flinfo, index.into());
                if type_oid == pg_sys::InvalidOid || pg_sys::get_typlen(type_oid) != -1 {
                    continue;
                }
                let bytes = self.get::<pg_sys::Datum>(place).map_or(0, |datum| pg_sys::toast_raw_datum_size(datum));
                if bytes > MOST_BYTES {
                    return Err(Error::Invalid {
                        message: format!("argument {} is too long", place + 1),
                        detail: Some(format!("It has {bytes} bytes, and {MOST_BYTES} are the most that is taken.")),
                        hint: "SELECT writeguard.statement_hash('…'); (which takes a text of any length)".into(),
                    });
                }
            }
        }
        Ok(())
    }

    /// How many arguments the function is declared with.
    pub fn declared(&self) -> usize {
        // SAFETY: PostgreSQL says with how many arguments it calls, which is how many are declared.
        usize::try_from(unsafe { (*self.0).nargs }).unwrap_or(0)
    }

    fn has(&self, index: usize) -> bool {
        index < self.declared()
    }

    /// A text argument that must not be NULL.
    ///
    /// # Errors
    /// WG007 with the argument's name.
    pub fn text(&self, index: usize, name: &str) -> Result<String, Error> {
        self.get(index).ok_or_else(|| Error::invalid(format!("{name} must not be NULL"), format!("{name} => '…'")))
    }

    /// Gives rows as the result of a function that returns a set.
    ///
    /// # Errors
    /// None of ours; core's own where the caller cannot take a set.
    pub fn give_rows<const COLUMNS: usize>(
        &self,
        rows: impl IntoIterator<Item = [Option<pg_sys::Datum>; COLUMNS]>,
    ) -> Returns {
        // SAFETY: the SQL declaration says that the function returns rows of that many columns; the tuplestore copies
        // the values.
        unsafe {
            pg_sys::InitMaterializedSRF(self.0, 0);
            let result = (*self.0).resultinfo.cast::<pg_sys::ReturnSetInfo>();
            for row in rows {
                let mut nulls = row.map(|value| value.is_none());
                let mut values = row.map(|value| value.unwrap_or(pg_sys::Datum::from(0)));
                pg_sys::tuplestore_putvalues(
                    (*result).setResult,
                    (*result).setDesc,
                    values.as_mut_ptr(),
                    nulls.as_mut_ptr(),
                );
            }
        }
        Ok(None)
    }

    /// Where the rows go of a function that returns a set of one column.
    ///
    /// # Errors
    /// None of ours; core's own where the caller cannot take a set.
    pub fn rows_of_one_column(&self) -> (*mut pg_sys::Tuplestorestate, pg_sys::TupleDesc) {
        // The column alone is no row type, so the caller says what it expects.
        const USE_EXPECTED_DESC: u32 = 1;
        // SAFETY: the SQL declaration says that the function returns such a set.
        unsafe {
            pg_sys::InitMaterializedSRF(self.0, USE_EXPECTED_DESC);
            let result = (*self.0).resultinfo.cast::<pg_sys::ReturnSetInfo>();
            ((*result).setResult, (*result).setDesc)
        }
    }

    /// PostgreSQL's look-up of the function that is called.
    pub fn look_up(&self) -> *const pg_sys::FmgrInfo {
        // SAFETY: PostgreSQL calls with one.
        unsafe { (*self.0).flinfo }
    }

    /// The function that is called.
    pub fn function(&self) -> pg_sys::Oid {
        // SAFETY: PostgreSQL calls with its look-up of the function.
        unsafe { (*(*self.0).flinfo).fn_oid }
    }

    /// The trigger that is being run, when this is a trigger function's call.
    pub fn trigger(&self) -> Option<*mut pg_sys::TriggerData> {
        // SAFETY: the call's context is NULL or a node.
        unsafe {
            let context = (*self.0).context;
            (!context.is_null() && (*context).type_ == pg_sys::NodeTag::T_TriggerData).then_some(context.cast())
        }
    }
}

/// The bytes of a text, without a copy where it is stored plainly.
unsafe fn text_bytes<'a>(text: pg_sys::Datum) -> &'a [u8] {
    // SAFETY: the caller's promise: a text, toasted or not.
    unsafe {
        let plain = pg_sys::pg_detoast_datum_packed(text.cast_mut_ptr());
        core::slice::from_raw_parts(pgrx::vardata_any(plain).cast(), pgrx::varsize_any_exhdr(plain))
    }
}

/// The most that an argument may have: all of them are read, kept in several forms at a time and stored.
pub const MOST_BYTES: usize = 16 * 1024 * 1024;

/// A value that SQL gives us.
pub trait FromSql: Sized {
    /// # Safety
    /// `value` is of the type, and not NULL.
    unsafe fn from_sql(value: pg_sys::Datum) -> Self;
}

macro_rules! plain_values {
    ($($type:ty),*) => {
        $(impl FromSql for $type {
            unsafe fn from_sql(value: pg_sys::Datum) -> Self {
                // SAFETY: the caller's promise.
                unsafe { <$type>::from_datum(value, false) }.unwrap_or_default()
            }
        }

        impl IntoSql for $type {
            fn into_sql(self) -> Option<pg_sys::Datum> {
                self.into_datum()
            }
        })*
    };
}
plain_values!(bool, i32, i64, f64, pg_sys::Oid);

impl FromSql for pg_sys::Datum {
    unsafe fn from_sql(value: pg_sys::Datum) -> Self {
        value
    }
}

impl FromSql for String {
    unsafe fn from_sql(value: pg_sys::Datum) -> Self {
        // SAFETY: the caller's promise.
        unsafe { encoding::from_text(value) }
    }
}

impl FromSql for Vec<Option<String>> {
    unsafe fn from_sql(value: pg_sys::Datum) -> Self {
        // SAFETY: the caller's promise.
        unsafe { encoding::from_text_array(value) }
    }
}

impl FromSql for Vec<String> {
    unsafe fn from_sql(value: pg_sys::Datum) -> Self {
        // SAFETY: the caller's promise.
        unsafe { encoding::from_text_array(value) }.into_iter().flatten().collect()
    }
}

/// A value that we give SQL; none is NULL.
pub trait IntoSql {
    fn into_sql(self) -> Option<pg_sys::Datum>;
}

impl IntoSql for String {
    fn into_sql(self) -> Option<pg_sys::Datum> {
        text(&self)
    }
}

impl IntoSql for Vec<i64> {
    fn into_sql(self) -> Option<pg_sys::Datum> {
        self.into_datum()
    }
}

/// What a function gives; none is NULL.
pub type Returns = Result<Option<pg_sys::Datum>, Failure>;

/// A value as a function's result.
pub fn value(value: impl IntoSql) -> Returns {
    Ok(value.into_sql())
}

/// A number as SQL has it.
pub fn bigint(number: u64) -> Option<pg_sys::Datum> {
    i64::try_from(number).unwrap_or(i64::MAX).into_datum()
}

/// Text as SQL has it, in the database's encoding.
pub fn text(text: &str) -> Option<pg_sys::Datum> {
    Some(encoding::to_text(text))
}

/// JSON as SQL has it in a column of type json.
pub fn json(json: &serde_json::Value) -> Option<pg_sys::Datum> {
    Some(encoding::json_to_text(&json.to_string()))
}

/// JSON as SQL has it in a column of type jsonb.
pub fn jsonb(json: &str) -> Option<pg_sys::Datum> {
    let json = encoding::json_to_palloc(json);
    // SAFETY: core's own input function with a C string.
    unsafe { direct_function_call_as_datum(pg_sys::jsonb_in, &[Some(pg_sys::Datum::from(json))]) }
}

/// Runs a function's body where the library was preloaded.
///
/// # Errors
/// 55000 without the preload, otherwise those of the body.
pub fn call(arguments: &Arguments, body: fn(&Arguments) -> Returns) -> Returns {
    if !preload::is_attached() {
        if preload::was() {
            return Err(Failure::Ours(Error::Unattached));
        }
        return Err(Failure::Ours(Error::NotPreloaded {
            hint: format!("Have this line in postgresql.conf and restart the server: {}", preload::line()),
        }));
    }
    arguments.check_lengths()?;
    body(arguments)
}

/// The same for a function whose body has to do with texts of any length.
///
/// # Errors
/// As for [`call`].
pub fn call_any_length(arguments: &Arguments, body: fn(&Arguments) -> Returns) -> Returns {
    if !preload::is_attached() {
        return call(arguments, body);
    }
    body(arguments)
}

/// Runs a function's body, also where the library was not preloaded.
///
/// # Errors
/// Those of the body.
pub fn call_not_preloaded_too(arguments: &Arguments, body: fn(&Arguments) -> Returns) -> Returns {
    body(arguments)
}

/// Declares a C function for SQL: its symbol, the symbol of its calling convention, its body, and whether it works without
/// the preload too, takes texts of any length, or is called in a way of its own.
macro_rules! sql_function {
    ($(#[$doc:meta])* $symbol:ident, $convention:ident, $body:path) => {
        $crate::pg::function::sql_function!(@declare $crate::pg::function::call, $(#[$doc])* $symbol, $convention, $body);
    };
    ($(#[$doc:meta])* $symbol:ident, $convention:ident, $body:path, not_preloaded_too) => {
        $crate::pg::function::sql_function!(
            @declare $crate::pg::function::call_not_preloaded_too, $(#[$doc])* $symbol, $convention, $body
        );
    };
    ($(#[$doc:meta])* $symbol:ident, $convention:ident, $body:path, by $call:path) => {
        $crate::pg::function::sql_function!(@declare $call, $(#[$doc])* $symbol, $convention, $body);
    };
    ($(#[$doc:meta])* $symbol:ident, $convention:ident, $body:path, any_length) => {
        $crate::pg::function::sql_function!(
            @declare $crate::pg::function::call_any_length, $(#[$doc])* $symbol, $convention, $body
        );
    };
    (@declare $call:path, $(#[$doc:meta])* $symbol:ident, $convention:ident, $body:path) => {
        #[doc(hidden)]
        #[unsafe(no_mangle)]
        pub extern "C" fn $convention() -> &'static pgrx::pg_sys::Pg_finfo_record {
            static VERSION_1: pgrx::pg_sys::Pg_finfo_record = pgrx::pg_sys::Pg_finfo_record { api_version: 1 };
            &VERSION_1
        }

        $(#[$doc])*
        #[unsafe(no_mangle)]
        pub unsafe extern "C-unwind" fn $symbol(fcinfo: pgrx::pg_sys::FunctionCallInfo) -> pgrx::pg_sys::Datum {
            // SAFETY: plain old frame; the guarded part has returned before anything is raised.
            unsafe {
                let mut result = None;
                $crate::pg::ereport::raise($crate::pg::ereport::guarded(|| {
                    result = $call(&$crate::pg::function::Arguments::new(fcinfo), $body)?;
                    Ok(())
                }));
                (*fcinfo).isnull = result.is_none();
                result.unwrap_or(pgrx::pg_sys::Datum::from(0))
            }
        }
    };
}
pub(crate) use sql_function;

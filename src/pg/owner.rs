//! Our own SQL: it runs as the owner of the extension's tables, whoever acts, with a search_path of its own.
//!
//! Only for statements on tables of the extension, never for anything a user wrote. While it runs, a mark of this backend, which
//! no SQL can set, tells the triggers on these tables that the write is ours, and recorded where it belongs.

use core::ffi::c_char;

use pgrx::spi::SpiClient;
use pgrx::{IntoDatum, Spi, pg_sys};
use rules::error::Error;

use super::backend_local::BackendCell;
use super::ereport::throw;
use super::{encoding, ffi};

/// The depth of triggers at which SQL of ours runs now: what somebody else's trigger writes meanwhile is one deeper.
static MARKED: BackendCell<Option<i32>> = BackendCell::new(None);

/// How many triggers are running.
fn depth() -> i32 {
    // SAFETY: core's function reads a static.
    unsafe { pgrx::direct_function_call(pg_sys::pg_trigger_depth, &[]) }.unwrap_or(0)
}

/// Runs what writes tables of the extension as itself. An error that ends it takes the mark away too.
pub fn marked<T>(body: impl FnOnce() -> T) -> T {
    struct Until(Option<i32>);

    impl Drop for Until {
        fn drop(&mut self) {
            MARKED.set(self.0);
        }
    }

    let _until = Until(MARKED.replace(Some(depth())));
    body()
}

/// Whether the trigger that is running was set off by such a write.
pub fn is_own_write() -> bool {
    MARKED.get() == Some(depth() - 1)
}

fn missing(what: &str) -> Error {
    Error::Undecided {
        reason: format!("{what} is not there"),
        hint: "CREATE EXTENSION pg_writeguard;".into(),
        relation: None,
    }
}

/// The owner of the extension's tables: that of `writeguard.event`.
fn owner() -> Result<pg_sys::Oid, Error> {
    // SAFETY: syscache look-ups; the tuple is released before we return.
    unsafe {
        // Another session may have dropped the extension meanwhile.
        pg_sys::AcceptInvalidationMessages();
        let schema = pg_sys::get_namespace_oid(c"writeguard".as_ptr(), true);
        if schema == pg_sys::InvalidOid {
            return Err(missing("the schema writeguard"));
        }
        let table = pg_sys::get_relname_relid(c"event".as_ptr(), schema);
        let tuple = pg_sys::SearchSysCache1(pg_sys::SysCacheIdentifier::RELOID as i32, table.into());
        if tuple.is_null() {
            return Err(missing("the table writeguard.event"));
        }
        let owner = (*pg_sys::GETSTRUCT(tuple).cast::<pg_sys::FormData_pg_class>()).relowner;
        pg_sys::ReleaseSysCache(tuple);
        Ok(owner)
    }
}

/// Runs `body` with an SPI connection as the owner. An ERROR inside aborts the (sub)transaction, which also
/// restores user and settings.
///
/// # Errors
/// WG008 when the extension's tables are missing; otherwise what `body` gives.
pub fn connect<T>(body: impl FnOnce(&mut SpiClient<'_>) -> Result<T, Error>) -> Result<T, Error> {
    let owner = owner()?;
    // SAFETY: core's own refusal, in its own words, on a standby.
    unsafe { pg_sys::PreventCommandDuringRecovery(c"functions of pg_writeguard that write".as_ptr()) };
    // SAFETY: core's own way to switch the user for a while.
    unsafe {
        let mut user = pg_sys::InvalidOid;
        let mut context = 0;
        pg_sys::GetUserIdAndSecContext(&mut user, &mut context);
        pg_sys::SetUserIdAndSecContext(owner, context | pg_sys::SECURITY_LOCAL_USERID_CHANGE as i32);
        let level = pg_sys::NewGUCNestLevel();
        pg_sys::set_config_option(
            c"search_path".as_ptr(),
            c"pg_catalog, pg_temp".as_ptr(),
            pg_sys::GucContext::PGC_USERSET,
            pg_sys::GucSource::PGC_S_SESSION,
            pg_sys::GucAction::GUC_ACTION_SAVE,
            true,
            0,
            false,
        );
        let result = marked(|| Spi::connect_mut(body));
        pg_sys::AtEOXact_GUC(false, level);
        pg_sys::SetUserIdAndSecContext(user, context);
        result
    }
}

/// A parameter of our own SQL.
#[derive(Debug, Clone)]
pub enum Argument<'a> {
    Text(Option<&'a str>),
    Texts(Option<&'a [String]>),
    /// JSON as text; the statement says what it is.
    Json(&'a str),
    Bool(bool),
    Int4(i32),
    Int8(Option<i64>),
    Float8(f64),
    Oid(pg_sys::Oid),
}

/// JSON as a parameter of type text.
pub fn json(json: &str) -> Argument<'_> {
    Argument::Json(json)
}

macro_rules! arguments {
    ($($type:ty: $value:ident => $argument:expr;)*) => {
        $(impl<'a> From<$type> for Argument<'a> {
            fn from($value: $type) -> Self {
                $argument
            }
        })*
    };
}

arguments! {
    &'a str: text => Argument::Text(Some(text));
    Option<&'a str>: text => Argument::Text(text);
    Option<&'a [String]>: texts => Argument::Texts(texts);
    bool: value => Argument::Bool(value);
    i32: value => Argument::Int4(value);
    i64: value => Argument::Int8(Some(value));
    Option<i64>: value => Argument::Int8(value);
    f64: value => Argument::Float8(value);
    pg_sys::Oid: value => Argument::Oid(value);
}

impl Argument<'_> {
    /// Its type, and its value unless it is NULL.
    fn value(&self) -> (pg_sys::Oid, Option<pg_sys::Datum>) {
        match self {
            Argument::Text(text) => (pg_sys::TEXTOID, text.map(encoding::to_text)),
            Argument::Texts(texts) => (pg_sys::TEXTARRAYOID, texts.map(encoding::to_text_array)),
            Argument::Json(json) => (pg_sys::TEXTOID, Some(encoding::json_to_text(json))),
            Argument::Bool(value) => (pg_sys::BOOLOID, value.into_datum()),
            Argument::Int4(value) => (pg_sys::INT4OID, value.into_datum()),
            Argument::Int8(value) => (pg_sys::INT8OID, value.into_datum()),
            Argument::Float8(value) => (pg_sys::FLOAT8OID, value.into_datum()),
            Argument::Oid(value) => (pg_sys::OIDOID, value.into_datum()),
        }
    }
}

/// Runs one of our own statements and gives its rows, the text in the first column of each. An ERROR inside, which may be
/// somebody else's (of a trigger on a table of ours, say), unwinds to the guard around us and is raised there with all its fields.
///
/// # Errors
/// WG008 when SPI itself fails.
#[expect(ffi_unwind_calls, reason = "inside protect")]
pub fn rows(_connected: &mut SpiClient<'_>, sql: &str, arguments: &[Argument<'_>]) -> Result<Vec<String>, Error> {
    let (mut types, values): (Vec<pg_sys::Oid>, Vec<_>) = arguments.iter().map(Argument::value).unzip();
    let nulls: Vec<c_char> = values.iter().map(|value| if value.is_some() { b' ' } else { b'n' } as c_char).collect();
    let mut values: Vec<pg_sys::Datum> =
        values.into_iter().map(|value| value.unwrap_or(pg_sys::Datum::null())).collect();
    let count = i32::try_from(types.len()).unwrap_or(i32::MAX);
    let sql = encoding::to_c(sql);
    let mut code = 0;
    // SAFETY: connected to SPI; nothing but raw calls inside. The error is copied to memory that outlives SPI's.
    unsafe {
        let (types, values, nulls, sql) = (types.as_mut_ptr(), values.as_mut_ptr(), nulls.as_ptr(), sql.as_ptr());
        let inside = pg_sys::CurrentMemoryContext;
        pg_sys::CurrentMemoryContext = pg_sys::CurTransactionContext;
        let code = &mut code;
        let outcome = ffi::protect(move || {
            pg_sys::CurrentMemoryContext = inside;
            *code = ffi::SPI_execute_with_args(sql, count, types, values, nulls, false, 0);
        });
        pg_sys::CurrentMemoryContext = inside;
        if let Err(error) = outcome {
            throw(error);
        }
    }
    if code < 0 {
        return Err(Error::Undecided {
            reason: format!("own statement failed with SPI's code {code}"),
            hint: "SELECT * FROM pg_catalog.pg_extension WHERE extname = 'pg_writeguard';".into(),
            relation: None,
        });
    }
    let mut found = Vec::new();
    // SAFETY: the result of the statement, NULL where it gives no rows; freed when it is read.
    unsafe {
        let table = pg_sys::SPI_tuptable;
        if !table.is_null() {
            for index in 0..usize::try_from((*table).numvals).unwrap_or(0) {
                let mut is_null = false;
                let value = pg_sys::SPI_getbinval(*(*table).vals.add(index), (*table).tupdesc, 1, &mut is_null);
                if !is_null {
                    found.push(encoding::from_text(value));
                }
            }
            pg_sys::SPI_freetuptable(table);
        }
    }
    Ok(found)
}

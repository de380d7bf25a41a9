//! Our own SQL: it runs as the owner of the extension's tables, whoever acts, with a search_path of its own.
//!
//! Only for statements on tables of the extension, never for anything a user wrote.

use pgrx::datum::DatumWithOid;
use pgrx::spi::SpiClient;
use pgrx::{Spi, pg_sys};

use crate::error::Error;

fn missing(what: &str) -> Error {
    Error::Undecided {
        reason: format!("{what} is not there"),
        hint: "CREATE EXTENSION pg_writeguard;".into(),
        relation: None,
    }
}

/// The owner of the extension's tables.
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

/// Runs `body` with an SPI connection as the owner. An ERROR inside goes on to abort the (sub)transaction, which also
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
        let result = Spi::connect_mut(body);
        pg_sys::AtEOXact_GUC(false, level);
        pg_sys::SetUserIdAndSecContext(user, context);
        result
    }
}

/// Runs one of our own statements and gives its rows as JSON, one text each in the first column.
///
/// # Errors
/// WG008 when SPI itself fails.
pub fn rows(client: &mut SpiClient<'_>, sql: &str, arguments: &[DatumWithOid<'_>]) -> Result<Vec<String>, Error> {
    let failed = |error: pgrx::spi::Error| Error::Undecided {
        reason: format!("own statement failed: {error}"),
        hint: "SELECT * FROM pg_catalog.pg_extension WHERE extname = 'pg_writeguard';".into(),
        relation: None,
    };
    let table = client.update(sql, None, arguments).map_err(failed)?;
    let mut found = Vec::with_capacity(table.len());
    for row in table {
        if let Some(text) = row.get::<String>(1).map_err(failed)? {
            found.push(text);
        }
    }
    Ok(found)
}

//! What gives a statement's text its meaning besides its letters: the settings by which literals and names are read.
//!
//! A text is reviewed under those of the requester's session. They are stored with the request; `execute` sets them for its
//! run, and a token opens nothing where the session has others.

use std::collections::BTreeMap;
use std::ffi::CString;

use pgrx::pg_sys;

use crate::pg::backend_local::BackendLocal;
use crate::pg::{encoding, ffi};

/// In which order they are told. Left out is what only says how values are printed to the client, and what turns meaning
/// into an error: nothing is changed by that.
const SETTINGS: [&str; 12] = [
    "search_path",
    "standard_conforming_strings",
    "DateStyle",
    "IntervalStyle",
    "TimeZone",
    "timezone_abbreviations",
    "array_nulls",
    "transform_null_equals",
    "xmloption",
    "default_text_search_config",
    "lc_monetary",
    "lc_numeric",
];

/// Values by the settings' names.
pub type Settings = BTreeMap<String, String>;

/// This session's.
pub fn now() -> Settings {
    SETTINGS
        .iter()
        .filter_map(|name| {
            let wanted = CString::new(*name).ok()?;
            // SAFETY: gives a copy of the value, or NULL where there is no such setting.
            let value = unsafe {
                encoding::from_c(pg_sys::GetConfigOptionByName(wanted.as_ptr(), core::ptr::null_mut(), true))
            };
            Some(((*name).to_owned(), value?))
        })
        .collect()
}

static STARTED: BackendLocal<Option<(pg_sys::TimestampTz, Settings)>> = BackendLocal::new(None);

/// The client's command begins: a function that it calls may have settings of its own while it writes.
pub fn note_start() {
    // SAFETY: reads a static.
    let time = unsafe { ffi::GetCurrentStatementStartTimestamp() };
    let settings = now();
    *STARTED.borrow() = Some((time, settings));
}

/// Those that the client's command began with, where that was noted.
pub fn of_command() -> Settings {
    // SAFETY: reads a static.
    let time = unsafe { ffi::GetCurrentStatementStartTimestamp() };
    let noted = STARTED.borrow().as_ref().filter(|(noted, _)| *noted == time).map(|(_, settings)| settings.clone());
    noted.unwrap_or_else(now)
}

/// The first setting that is another one than `reviewed`: its name, the reviewed value and this one.
pub fn differs(reviewed: &Settings, now: &Settings) -> Option<(String, String, String)> {
    SETTINGS.into_iter().find_map(|name| {
        let (was, is) = (reviewed.get(name)?, now.get(name)?);
        (was != is).then(|| (name.to_owned(), was.clone(), is.clone()))
    })
}

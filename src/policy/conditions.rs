//! Which policies are in force for this session now: application, client and schedule.

use core::ffi::CStr;
use core::ptr;
use std::ffi::CString;

use pgrx::{IntoDatum, direct_function_call, pg_sys};
use rules::error::Error;
use rules::policy::days::Day;
use rules::policy::model::Policy;
use rules::policy::schedule::{Schedule, WallClock};

use crate::session::actor;

/// What the answer depends on, as far as it changes in a session's life.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Now {
    /// Of the statement's start; windows begin and end with a minute.
    minute: i64,
    application: CString,
}

const MICROSECONDS_PER_MINUTE: i64 = 60_000_000;

impl Now {
    /// What the answer depends on now. The time is that of the statement's start.
    pub fn current() -> Self {
        Self { minute: this_minute(), application: application().to_owned() }
    }

    /// Whether this is still so. Raises nothing and looks nothing up.
    #[inline]
    pub fn is_current(&self) -> bool {
        self.minute == this_minute() && self.application.as_c_str() == application()
    }
}

fn this_minute() -> i64 {
    // SAFETY: reads a static.
    unsafe { crate::pg::ffi::GetCurrentStatementStartTimestamp() }.div_euclid(MICROSECONDS_PER_MINUTE)
}

fn application<'a>() -> &'a CStr {
    // SAFETY: the setting's variable is a C string or NULL; the caller does not keep it.
    unsafe { if pg_sys::application_name.is_null() { c"" } else { CStr::from_ptr(pg_sys::application_name) } }
}

/// A condition that a policy may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Condition {
    Application,
    Client,
    Schedule,
}

impl Condition {
    /// The column that states it.
    pub fn column(self) -> &'static str {
        match self {
            Self::Application => "application",
            Self::Client => "client",
            Self::Schedule => "schedule",
        }
    }
}

/// Whether a policy is in force for this session, at the running statement's start.
pub fn hold(policy: &Policy) -> bool {
    failing(policy).is_none()
}

/// The first condition that keeps a policy from being in force for this session, at the running statement's start.
pub fn failing(policy: &Policy) -> Option<Condition> {
    let application = |pattern: &String| is_like(&actor::application().unwrap_or_default(), pattern);
    // SAFETY: reads a static.
    let now = unsafe { crate::pg::ffi::GetCurrentStatementStartTimestamp() };
    if !policy.application.as_ref().is_none_or(application) {
        return Some(Condition::Application);
    }
    if !policy.client.as_ref().is_none_or(|network| is_client_in(network)) {
        return Some(Condition::Client);
    }
    let is_open = policy.schedule.as_ref().is_none_or(|schedule| is_open(schedule, now));
    (!is_open).then_some(Condition::Schedule)
}

/// Whether a schedule has an open window at that time.
pub fn is_open(schedule: &Schedule, at: pg_sys::TimestampTz) -> bool {
    schedule.covers(|zone| wall_clock(zone, at))
}

/// LIKE letter by letter: names of applications are ASCII.
fn is_like(text: &str, pattern: &str) -> bool {
    // SAFETY: core's own function; text and bytea look the same. Patterns were checked when they were set.
    let like = unsafe { direct_function_call::<bool>(pg_sys::bytealike, &[text.into_datum(), pattern.into_datum()]) };
    like.unwrap_or(false)
}

/// A session without an address, on the local socket, is in no network.
fn is_client_in(network: &str) -> bool {
    // SAFETY: core's own functions; NULL where there is no address.
    unsafe {
        let Some(address) = direct_function_call::<pg_sys::Datum>(pg_sys::inet_client_addr, &[]) else {
            return false;
        };
        let network = CString::new(network).unwrap_or_default();
        let network = direct_function_call::<pg_sys::Datum>(pg_sys::cidr_in, &[network.as_c_str().into_datum()]);
        direct_function_call::<bool>(pg_sys::network_subeq, &[Some(address), network]).unwrap_or(false)
    }
}

/// A time zone of PostgreSQL's; it lives as long as the process.
fn zone(name: &str) -> Option<*mut pg_sys::pg_tz> {
    let name = CString::new(name).ok()?;
    // SAFETY: gives NULL for what is no zone.
    let zone = unsafe { pg_sys::pg_tzset(name.as_ptr()) };
    (!zone.is_null()).then_some(zone)
}

fn wall_clock(name: &str, at: pg_sys::TimestampTz) -> Option<WallClock> {
    let zone = zone(name)?;
    let mut parts = pg_sys::pg_tm::default();
    let (mut microseconds, mut offset) = (0, 0);
    // SAFETY: places for all that is given back, but the zone's abbreviation, which is not wanted.
    unsafe {
        let failed = pg_sys::timestamp2tm(at, &mut offset, &mut parts, &mut microseconds, ptr::null_mut(), zone) != 0;
        if failed {
            return None;
        }
        let day = Day(pg_sys::date2j(parts.tm_year, parts.tm_mon, parts.tm_mday));
        Some(WallClock { day, minute: u16::try_from(parts.tm_hour * 60 + parts.tm_min).ok()? })
    }
}

/// Asks PostgreSQL whether it knows the time zones of a schedule.
///
/// # Errors
/// WG007 for one that is not in its database.
pub fn check_zones(schedule: &Schedule) -> Result<(), Error> {
    match schedule.zones().find(|name| zone(name).is_none()) {
        Some(name) => Err(Error::invalid(
            format!("time zone \"{name}\" is not known"),
            "SELECT name FROM pg_catalog.pg_timezone_names ORDER BY name;",
        )),
        None => Ok(()),
    }
}

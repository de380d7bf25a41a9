//! The settings `writeguard.*`: their texts, their contexts, and typed access to them.

use core::ffi::{CStr, c_char};
use std::ffi::CString;

use pgrx::guc::{GucContext, GucFlags, GucRegistry, GucSetting, PostgresGucEnum};
use pgrx::pg_sys;

use crate::pg::encoding;

static ENABLED: GucSetting<bool> = GucSetting::<bool>::new(true);
static OVERRIDE: GucSetting<bool> = GucSetting::<bool>::new(false);
static TOKEN: GucSetting<Option<CString>> = GucSetting::<Option<CString>>::new(Some(c""));
/// `writeguard.expect_rows` where nothing is expected.
pub const NO_EXPECTATION: i32 = -1;
static EXPECT_ROWS: GucSetting<i32> = GucSetting::<i32>::new(NO_EXPECTATION);
static EVENT_TIMEOUT: GucSetting<i32> = GucSetting::<i32>::new(1_000);
static APPROVAL_LIFETIME: GucSetting<i32> = GucSetting::<i32>::new(15 * 60);
static APPROVAL_MAX_LIFETIME: GucSetting<i32> = GucSetting::<i32>::new(24 * 60 * 60);
static REQUEST_LIFETIME: GucSetting<i32> = GucSetting::<i32>::new(24 * 60 * 60);
static LOG_STATEMENT: GucSetting<LogStatement> = GucSetting::<LogStatement>::new(LogStatement::Full);
static EVENT_RETENTION: GucSetting<i32> = GucSetting::<i32>::new(90 * 24 * 60 * 60);
static JWT_MAX_LIFETIME: GucSetting<i32> = GucSetting::<i32>::new(60 * 60);
static BREAK_GLASS_LIFETIME: GucSetting<i32> = GucSetting::<i32>::new(5 * 60);
static RATE_SLOTS: GucSetting<i32> = GucSetting::<i32>::new(4_096);
static POOLED: GucSetting<bool> = GucSetting::<bool>::new(false);
static CAPTURE_UNDO: GucSetting<bool> = GucSetting::<bool>::new(false);
static PREVIEW_MAX_ROWS: GucSetting<i32> = GucSetting::<i32>::new(100_000);
static PREVIEW_MAX_BYTES: GucSetting<i32> = GucSetting::<i32>::new(16 * 1024 * 1024);
static OBSERVED_PER_MINUTE: GucSetting<i32> = GucSetting::<i32>::new(60);
static BLOCKED_PER_MINUTE: GucSetting<i32> = GucSetting::<i32>::new(600);
static STAT_ENTRIES: GucSetting<i32> = GucSetting::<i32>::new(2_048);
static EVENT_QUEUE_SIZE: GucSetting<i32> = GucSetting::<i32>::new(1_024);

const NOTHING_MORE: &CStr = c"";

/// How much of a statement's text events have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PostgresGucEnum)]
pub enum LogStatement {
    /// Its text.
    #[name = c"full"]
    Full,
    /// Its text without constants and comments.
    #[name = c"normalized"]
    Normalized,
    /// Nothing.
    #[name = c"none"]
    None,
}

/// What jsonb can hold as one array is twice that.
const MOST_PREVIEW_BYTES: i32 = 128 * 1024 * 1024;

/// A year, in seconds.
const LONGEST_LIFETIME: i32 = 366 * 24 * 60 * 60;

/// Whether the guard acts at all.
pub fn enabled() -> bool {
    ENABLED.get()
}

/// No token is longer; of a longer value only the beginning is looked at, which opens nothing.
pub const LONGEST_TOKEN: usize = 64 * 1024;

/// The token as it was last assigned; `actor` knows whether it counts.
pub fn token() -> Option<String> {
    // SAFETY: the setting's variable is NULL or a C string, which lives until the next assignment.
    unsafe {
        let value: *const c_char = *TOKEN.as_ptr();
        if value.is_null() {
            return None;
        }
        let length = (0..=LONGEST_TOKEN).find(|at| *value.add(*at) == 0).unwrap_or(LONGEST_TOKEN + 1);
        let bytes = core::slice::from_raw_parts(value.cast::<u8>(), length);
        (length > 0).then(|| encoding::from_server(bytes))
    }
}

/// How long a refused write waits for its event, in milliseconds.
pub fn event_timeout() -> i64 {
    i64::from(EVENT_TIMEOUT.get())
}

/// Default lifetime of a token, in seconds; never longer than [`approval_max_lifetime`].
pub fn approval_lifetime() -> i32 {
    APPROVAL_LIFETIME.get().min(approval_max_lifetime())
}

/// Longest lifetime that an approver may give a token, in seconds.
pub fn approval_max_lifetime() -> i32 {
    APPROVAL_MAX_LIFETIME.get()
}

/// How long a request waits for its decision, in seconds.
pub fn request_lifetime() -> i32 {
    REQUEST_LIFETIME.get()
}

/// How long events and finished requests are kept, in seconds; none: for ever.
pub fn event_retention() -> Option<i32> {
    Some(EVENT_RETENTION.get()).filter(|seconds| *seconds > 0)
}

/// How much of a statement's text events have.
pub fn log_statement() -> LogStatement {
    LOG_STATEMENT.get()
}

/// Whether clients share this session, so that nothing may stay armed in it beyond a transaction.
#[inline]
pub fn pooled() -> bool {
    // SAFETY: a static of this process. Not by get(), which looks at the thread first: each commit asks.
    unsafe { *POOLED.as_ptr() }
}

/// Whether rows are kept also of writes that need no override.
pub fn capture_undo() -> bool {
    CAPTURE_UNDO.get()
}

/// Rows after which a preview ends.
pub fn preview_max_rows() -> u64 {
    u64::try_from(PREVIEW_MAX_ROWS.get()).unwrap_or(0)
}

/// Bytes that the rows which a rehearsal shows may take in all.
pub fn preview_max_bytes() -> usize {
    usize::try_from(PREVIEW_MAX_BYTES.get()).unwrap_or(0)
}

/// Longest lifetime of a token from outside, in seconds.
pub fn jwt_max_lifetime() -> i32 {
    JWT_MAX_LIFETIME.get()
}

/// Lifetime of a token that nobody else approved, in seconds.
pub fn break_glass_lifetime() -> i32 {
    BREAK_GLASS_LIFETIME.get()
}

/// Bytes of shared memory for events that wait for the worker.
pub fn event_queue_bytes() -> usize {
    usize::try_from(EVENT_QUEUE_SIZE.get()).unwrap_or(0) * 1024
}

/// Events of one policy of mode observe or warn that are stored one by one in a minute.
pub fn observed_per_minute() -> u64 {
    u64::try_from(OBSERVED_PER_MINUTE.get()).unwrap_or(0)
}

/// Refusals of one policy and login that are stored one by one in a minute.
pub fn blocked_per_minute() -> u64 {
    u64::try_from(BLOCKED_PER_MINUTE.get()).unwrap_or(0)
}

/// Statistics that the shared memory has room for, one for each table, role and operation.
pub fn stat_entries() -> usize {
    usize::try_from(STAT_ENTRIES.get()).unwrap_or(0)
}

/// Rates that the shared memory has room for, one for each policy and login.
pub fn rate_slots() -> usize {
    usize::try_from(RATE_SLOTS.get()).unwrap_or(0)
}

/// The hooks of the settings that arm a session, or disarm it.
pub struct Arming {
    pub check_override: pg_sys::GucBoolCheckHook,
    pub assign_override: pg_sys::GucBoolAssignHook,
    pub show_override: pg_sys::GucShowHook,
    pub check_token: pg_sys::GucStringCheckHook,
    pub assign_token: pg_sys::GucStringAssignHook,
    pub show_token: pg_sys::GucShowHook,
}

/// The hooks of `writeguard.expect_rows`.
pub struct Expecting {
    pub check: pg_sys::GucIntCheckHook,
    pub assign: pg_sys::GucIntAssignHook,
    pub show: pg_sys::GucShowHook,
}

/// Defines the settings. Runs once, in `_PG_init`.
pub fn register(arming: Arming, expecting: Expecting, assign_pooled: pg_sys::GucBoolAssignHook) {
    GucRegistry::define_bool_guc(
        c"writeguard.enabled",
        c"Enables the refusal of writes past the limits of policies.",
        c"A covered write that runs while it is off is recorded in the server log.",
        &ENABLED,
        GucContext::Suset,
        GucFlags::default(),
    );
    GucRegistry::define_int_guc(
        c"writeguard.event_timeout",
        c"Sets how long a refused write waits for its event to be on disk.",
        c"When it is over, the error goes out all the same; the event is in the server log and is stored later.",
        &EVENT_TIMEOUT,
        0,
        600_000,
        GucContext::Sighup,
        GucFlags::UNIT_MS,
    );
    GucRegistry::define_int_guc(
        c"writeguard.approval_lifetime",
        c"Sets the default lifetime of an approval token.",
        NOTHING_MORE,
        &APPROVAL_LIFETIME,
        1,
        7 * 24 * 60 * 60,
        GucContext::Sighup,
        GucFlags::UNIT_S,
    );
    GucRegistry::define_bool_guc(
        c"writeguard.capture_undo",
        c"Keeps rows as they were before every covered write of the session, where a policy has undo.",
        c"Otherwise before overridden writes only.",
        &CAPTURE_UNDO,
        GucContext::Userset,
        GucFlags::default(),
    );
    GucRegistry::define_int_guc(
        c"writeguard.preview_max_rows",
        c"Sets the number of changed rows after which a preview ends.",
        c"It then says that there are at least so many.",
        &PREVIEW_MAX_ROWS,
        1,
        i32::MAX,
        GucContext::Suset,
        GucFlags::default(),
    );
    GucRegistry::define_int_guc(
        c"writeguard.preview_max_bytes",
        c"Sets how many bytes the rows take in all that a preview or a request shows.",
        c"Of what goes beyond, wide values are shown by their size, and rows are left out; both are told.",
        &PREVIEW_MAX_BYTES,
        0,
        MOST_PREVIEW_BYTES,
        GucContext::Suset,
        GucFlags::UNIT_BYTE,
    );
    GucRegistry::define_int_guc(
        c"writeguard.approval_max_lifetime",
        c"Sets the longest lifetime that an approver may give a token.",
        NOTHING_MORE,
        &APPROVAL_MAX_LIFETIME,
        1,
        LONGEST_LIFETIME,
        GucContext::Sighup,
        GucFlags::UNIT_S,
    );
    GucRegistry::define_int_guc(
        c"writeguard.request_lifetime",
        c"Sets how long a request waits for its decision.",
        c"After that nobody can approve it any more.",
        &REQUEST_LIFETIME,
        1,
        LONGEST_LIFETIME,
        GucContext::Sighup,
        GucFlags::UNIT_S,
    );
    GucRegistry::define_enum_guc(
        c"writeguard.log_statement",
        c"Sets what events tell of a statement, in their table and in the server log.",
        c"Normalized is its text without constants and comments.",
        &LOG_STATEMENT,
        GucContext::Sighup,
        GucFlags::default(),
    );
    GucRegistry::define_int_guc(
        c"writeguard.event_retention",
        c"Sets how long events are kept, and requests that are over.",
        c"0 keeps them for ever.",
        &EVENT_RETENTION,
        0,
        i32::MAX,
        GucContext::Sighup,
        GucFlags::UNIT_S,
    );
    GucRegistry::define_int_guc(
        c"writeguard.jwt_max_lifetime",
        c"Sets the longest lifetime of an approval token that a trusted key has signed.",
        c"Counted from the earliest of its iat, its nbf and now, to its exp.",
        &JWT_MAX_LIFETIME,
        1,
        7 * 24 * 60 * 60,
        GucContext::Sighup,
        GucFlags::UNIT_S,
    );
    GucRegistry::define_int_guc(
        c"writeguard.break_glass_lifetime",
        c"Sets the lifetime of a token that break_glass gives without a second person.",
        NOTHING_MORE,
        &BREAK_GLASS_LIFETIME,
        1,
        24 * 60 * 60,
        GucContext::Sighup,
        GucFlags::UNIT_S,
    );
    GucRegistry::define_int_guc(
        c"writeguard.event_queue_size",
        c"Sets the size of the shared memory in which events wait for the worker.",
        NOTHING_MORE,
        &EVENT_QUEUE_SIZE,
        64,
        1_048_576,
        GucContext::Postmaster,
        GucFlags::UNIT_KB,
    );
    GucRegistry::define_int_guc(
        c"writeguard.observed_per_minute",
        c"Sets how many events of each policy with mode observe or warn are stored one by one in a minute.",
        c"Of the others the largest is stored when the minute is over, and tells how many there were.",
        &OBSERVED_PER_MINUTE,
        0,
        1_000_000,
        GucContext::Sighup,
        GucFlags::default(),
    );
    GucRegistry::define_int_guc(
        c"writeguard.blocked_per_minute",
        c"Sets how many refusals of each policy and login are stored one by one, and waited for, in a minute.",
        c"Of the others the largest is stored when the minute is over, and tells how many there were.",
        &BLOCKED_PER_MINUTE,
        0,
        1_000_000,
        GucContext::Sighup,
        GucFlags::default(),
    );
    GucRegistry::define_int_guc(
        c"writeguard.stat_entries",
        c"Sets the number of statistics that the shared memory has room for; 0 is none at all.",
        c"There is one for each database, table, role and operation, of 512 bytes.",
        &STAT_ENTRIES,
        0,
        1_048_576,
        GucContext::Postmaster,
        GucFlags::default(),
    );
    GucRegistry::define_int_guc(
        c"writeguard.rate_slots",
        c"Sets the number of rates that the shared memory has room for.",
        c"There is one for each policy with a rate and each login that writes under it; those that are full again make room.",
        &RATE_SLOTS,
        1,
        1_048_576,
        GucContext::Postmaster,
        GucFlags::default(),
    );
    let armed = GucFlags::from_bits_retain((pg_sys::GUC_DISALLOW_IN_FILE | pg_sys::GUC_NOT_IN_SAMPLE) as i32);
    let secret = armed | GucFlags::from_bits_retain(pg_sys::GUC_NO_SHOW_ALL as i32);
    // SAFETY: the hooks neither raise nor read catalogs, and keep nothing of what they are handed.
    unsafe {
        GucRegistry::define_bool_guc_with_hooks(
            c"writeguard.override",
            c"Says that the next write goes past a limit on purpose.",
            c"Lasts for the transaction that uses it. A policy may ask for an approval token besides.",
            &OVERRIDE,
            GucContext::Userset,
            armed,
            arming.check_override,
            arming.assign_override,
            arming.show_override,
        );
        GucRegistry::define_string_guc_with_hooks(
            c"writeguard.token",
            c"Presents the approval token of a second person.",
            c"Lasts for the transaction that uses it, and is never shown.",
            &TOKEN,
            GucContext::Userset,
            secret,
            arming.check_token,
            arming.assign_token,
            arming.show_token,
        );
        GucRegistry::define_bool_guc_with_hooks(
            c"writeguard.pooled",
            c"Says that clients share the session, as behind a pool in transaction mode.",
            c"Override, token and expect_rows then end with the transaction in which they are set, used or not.",
            &POOLED,
            GucContext::Suset,
            GucFlags::default(),
            None,
            assign_pooled,
            None,
        );
        GucRegistry::define_int_guc_with_hooks(
            c"writeguard.expect_rows",
            c"Sets how many rows the next UPDATE, DELETE or MERGE of the client must change; -1 is any number.",
            c"With another number it fails and changes nothing. Lasts for that one command, whether it is met or not.",
            &EXPECT_ROWS,
            NO_EXPECTATION,
            i32::MAX,
            GucContext::Userset,
            armed,
            expecting.check,
            expecting.assign,
            expecting.show,
        );
        pg_sys::MarkGUCPrefixReserved(c"writeguard".as_ptr());
    }
}

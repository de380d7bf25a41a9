//! Who acts in this session, and what the session has armed.
//!
//! The acting role is the login with session_user and the role it has SET. SECURITY DEFINER functions and foreign-key
//! actions run as somebody else and change none of the three.
//!
//! `writeguard.override` and `writeguard.token` are armed by SET, SET LOCAL, set_config and a function's SET clause
//! only, and only until the transaction that uses them ends. The settings' own values cannot say that (a rollback or
//! the end of a SET LOCAL brings old values back), so each assignment by SET carries a number, and the numbers up to
//! `dead` count no more. In a session that clients share (`writeguard.pooled`) every transaction's end disarms.

use core::ffi::{c_char, c_void};

use pgrx::datum::Inet;
use pgrx::pg_sys;

use super::{settings, xact};
use crate::pg::backend_local::{BackendCell, BackendLocal, Borrowed};
use crate::pg::{encoding, ffi};

/// The acting role by OID; compared on every covered write.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Actor {
    pub login: pg_sys::Oid,
    pub session: pg_sys::Oid,
    /// The role that is SET; invalid where none is.
    pub set: pg_sys::Oid,
}

impl Actor {
    /// The acting role now.
    #[inline]
    pub fn current() -> Self {
        // SAFETY: these three read a static each and cannot raise.
        unsafe {
            Self {
                login: ffi::GetAuthenticatedUserId(),
                session: ffi::GetSessionUserId(),
                set: ffi::GetCurrentRoleId(),
            }
        }
    }

    /// Login, session_user and SET role without repetition.
    pub fn roles(self) -> Vec<pg_sys::Oid> {
        let mut roles = vec![self.login];
        for role in [self.session, self.set] {
            if role != pg_sys::InvalidOid && !roles.contains(&role) {
                roles.push(role);
            }
        }
        roles
    }

    /// The role for events and tokens: the one that is SET, else session_user.
    pub fn role(self) -> pg_sys::Oid {
        if self.set == pg_sys::InvalidOid { self.session } else { self.set }
    }
}

/// The name of a role; its OID in digits when it was dropped meanwhile.
pub fn role_name(role: pg_sys::Oid) -> String {
    // SAFETY: with `noerr` the function returns NULL for an unknown role.
    unsafe { encoding::from_c(pg_sys::GetUserNameFromId(role, true)) }.unwrap_or_else(|| u32::from(role).to_string())
}

/// The name of a role as people read it, and as it can be stored: in letters that this database has, for roles are made
/// in others too.
pub fn shown_role(role: pg_sys::Oid) -> String {
    encoding::shown(&role_name(role)).into_owned()
}

/// `application_name` of this session.
pub fn application() -> Option<String> {
    // SAFETY: the setting's variable is a C string or NULL.
    unsafe { encoding::from_c(pg_sys::application_name) }.filter(|name| !name.is_empty())
}

/// The client's address; none for a local socket and for background processes.
pub fn client() -> Option<String> {
    // SAFETY: reads this backend's port; NULL where there is none.
    unsafe { pgrx::direct_function_call::<Inet>(pg_sys::inet_client_addr, &[]) }.map(|address| address.0)
}

/// The name of the database.
pub fn database() -> Option<String> {
    // SAFETY: a syscache look-up that gives NULL where there is none.
    unsafe { encoding::from_c(pg_sys::get_database_name(pg_sys::MyDatabaseId)) }
}

/// `search_path` as it is set.
pub fn search_path() -> String {
    // SAFETY: the setting's variable is a C string or NULL.
    unsafe { encoding::from_c(pg_sys::namespace_search_path) }.unwrap_or_default()
}

/// One of the two settings, as it was last assigned.
struct Armed {
    /// Number of the assignment in force; 0 when it was no SET.
    number: u64,
    /// Whether its value says anything: `on`, or a token.
    says: bool,
    /// Assignments up to this number are spent or were taken back.
    dead: u64,
}

impl Armed {
    const NOTHING: Self = Self { number: 0, says: false, dead: 0 };

    fn holds(&self) -> bool {
        self.says && self.number > self.dead
    }

    fn assign(&mut self, says: bool, number: u64, last_number: u64) {
        if !says || number == 0 {
            // What was armed before the switch-off does not come back with a rollback.
            self.dead = last_number;
        }
        self.number = number;
        self.says = says;
    }
}

struct State {
    last_number: u64,
    flag: Armed,
    token: Armed,
    used: bool,
}

static STATE: BackendLocal<State> =
    BackendLocal::new(State { last_number: 0, flag: Armed::NOTHING, token: Armed::NOTHING, used: false });

#[track_caller]
fn state() -> Borrowed<State> {
    STATE.borrow()
}

/// Why queries are to be looked at more closely: bits, so that it is one compare for every statement.
static CLOSELY: BackendCell<u8> = BackendCell::new(0);
/// A token may be armed.
const TOKEN: u8 = 1;
/// A statement is reviewed, or runs as it was.
const REVIEW: u8 = 2;

fn look_for_token(is_armed: bool) {
    CLOSELY.set(CLOSELY.get() & !TOKEN | if is_armed { TOKEN } else { 0 });
}

/// Whether a write of this command may present a token.
#[inline(always)]
pub fn may_have_token() -> bool {
    CLOSELY.get() & TOKEN != 0
}

/// Whether what a query meets may be of interest: it is reviewed, or may turn out to be what was.
#[inline(always)]
pub fn looks_closely() -> bool {
    CLOSELY.get() != 0
}

/// A statement is reviewed, or run as it was, for as long as this lives.
pub struct Review(u8);

impl Review {
    /// From now on.
    pub fn begin() -> Self {
        let outer = CLOSELY.get() & REVIEW;
        CLOSELY.set(CLOSELY.get() | REVIEW);
        Self(outer)
    }
}

impl Drop for Review {
    fn drop(&mut self) {
        CLOSELY.set(CLOSELY.get() & !REVIEW | self.0);
    }
}

/// Whether `writeguard.override` is armed.
pub fn flag() -> bool {
    state().flag.holds()
}

/// The armed token.
pub fn token() -> Option<String> {
    if state().token.holds() { settings::token() } else { None }
}

/// A text without the token that was last assigned, armed or not. `is_cut`: it is the beginning of a longer one, so that
/// its end may be the beginning of the token.
pub fn without_token(text: &str, is_cut: bool) -> String {
    let token = settings::token();
    let Some(token) = token.as_deref().map(str::trim).filter(|token| looks_like_a_token(token)) else {
        return text.to_owned();
    };
    let mut text = text.replace(token, HIDDEN);
    if is_cut {
        // Letters of a token are ASCII.
        let begun = (1..token.len()).rev().find(|length| text.ends_with(&token[..*length])).unwrap_or(0);
        text.truncate(text.len() - begun);
    }
    text
}

/// Whether a value has the form of a token: 256 bits in hexadecimal, or a JWT. Anything else opens nothing and hides
/// nothing.
fn looks_like_a_token(value: &str) -> bool {
    let is_stored = value.len() == 64 && value.bytes().all(|letter| matches!(letter, b'0'..=b'9' | b'a'..=b'f'));
    is_stored || is_jwt(value)
}

/// Whether a value has the form of a JWT: base64url with two dots or more, and a JSON object in front. No part of a
/// statement that does anything looks like that, so that hiding it hides nothing else; the least of ours is longer.
pub fn is_jwt(value: &str) -> bool {
    const SHORTEST: usize = 100;
    // Of a longer value only the beginning is known, which may have the first dot only.
    let dots = if value.len() > settings::LONGEST_TOKEN { 1 } else { 2 };
    value.len() >= SHORTEST
        && (value.starts_with("ey") || value.starts_with("ew"))
        && value.bytes().filter(|letter| *letter == b'.').count() >= dots
        && value.bytes().all(|letter| letter.is_ascii_alphanumeric() || matches!(letter, b'.' | b'_' | b'-'))
}

/// Whether the client's query shows the token that was last assigned. The query is only looked at, however long it is.
pub fn query_shows_token() -> bool {
    let token = settings::token().filter(|token| looks_like_a_token(token.trim()));
    // A token has no NUL inside.
    let Some(token) = token.and_then(|token| std::ffi::CString::new(token.trim()).ok()) else { return false };
    // SAFETY: NULL or the text of the query that the client sent; strstr reads both up to their NULs.
    unsafe {
        let query = pg_sys::debug_query_string;
        !query.is_null() && !strstr(query, token.as_ptr()).is_null()
    }
}

unsafe extern "C" {
    fn strstr(text: *const c_char, part: *const c_char) -> *const c_char;
}

/// What stands for a token wherever it could be read.
const HIDDEN: &str = "********";

/// A covered write begins in this transaction, whether it finds a row or not: what is armed by its end ends with it.
#[inline]
pub fn use_armed() {
    state().used = true;
    xact::touch();
}

/// Whether something is armed that no covered write of this transaction has used.
pub fn is_armed_unused() -> bool {
    let state = state();
    !state.used && (state.flag.holds() || state.token.holds())
}

/// The transaction is over.
pub fn end_transaction() {
    if state().used || settings::pooled() {
        state().used = false;
        disarm();
    }
}

/// Nothing is armed that was so far.
pub fn disarm() {
    let mut state = state();
    state.flag.dead = state.last_number;
    state.token.dead = state.last_number;
    look_for_token(false);
}

unsafe extern "C" {
    #[cfg(not(since_pg16))]
    fn malloc(size: usize) -> *mut c_void;
}

/// Gives an assignment by SET the `next` number; `extra` travels with the value wherever PostgreSQL keeps it. Only for
/// check hooks, whose answer this is.
///
/// # Safety
/// `extra` is the place that a check hook is handed.
pub unsafe fn keep_number(
    extra: *mut *mut c_void,
    source: pg_sys::GucSource::Type,
    next: impl FnOnce() -> u64,
) -> bool {
    if source != pg_sys::GucSource::PGC_S_SESSION {
        return true;
    }
    // SAFETY: PostgreSQL frees `extra` the way it is allocated here, and passes a valid place for it.
    unsafe {
        #[cfg(not(since_pg16))]
        let place = malloc(size_of::<u64>()).cast::<u64>();
        #[cfg(since_pg16)]
        let place = pg_sys::guc_malloc(pg_sys::LOG as i32, size_of::<u64>()).cast::<u64>();
        if place.is_null() {
            return false;
        }
        place.write(next());
        *extra = place.cast();
    }
    true
}

/// The number that [`keep_number`] kept; 0 for a value that no SET assigned.
///
/// # Safety
/// `extra` is what an assign hook is handed for a setting whose check hook keeps numbers.
pub unsafe fn number_of(extra: *mut c_void) -> u64 {
    // SAFETY: `extra` is NULL or what `keep_number` allocated.
    if extra.is_null() { 0 } else { unsafe { *extra.cast::<u64>() } }
}

/// Numbers an assignment of one of the two settings.
unsafe fn number(extra: *mut *mut c_void, source: pg_sys::GucSource::Type) -> bool {
    let next = || {
        let mut state = state();
        state.last_number += 1;
        state.last_number
    };
    // SAFETY: the check hooks' place.
    unsafe { keep_number(extra, source, next) }
}

/// The hooks of the two settings.
pub fn arming() -> settings::Arming {
    settings::Arming {
        check_override: Some(check_override),
        assign_override: Some(assign_override),
        show_override: Some(show_override),
        check_token: Some(check_token),
        assign_token: Some(assign_token),
        show_token: Some(show_token),
    }
}

/// Check hook of `writeguard.override`.
unsafe extern "C-unwind" fn check_override(
    _new: *mut bool,
    extra: *mut *mut c_void,
    source: pg_sys::GucSource::Type,
) -> bool {
    // SAFETY: called by PostgreSQL with valid places.
    unsafe { number(extra, source) }
}

/// Assign hook of `writeguard.override`.
unsafe extern "C-unwind" fn assign_override(new: bool, extra: *mut c_void) {
    // SAFETY: `extra` is what the check hook made.
    let number = unsafe { number_of(extra) };
    let state = &mut *state();
    state.flag.assign(new, number, state.last_number);
    xact::touch();
}

/// Show hook of `writeguard.override`: what is armed, not what was once assigned.
unsafe extern "C-unwind" fn show_override() -> *const c_char {
    if flag() { c"on".as_ptr() } else { c"off".as_ptr() }
}

/// Check hook of `writeguard.token`. It accepts everything: an error message would quote the token.
unsafe extern "C-unwind" fn check_token(
    _new: *mut *mut c_char,
    extra: *mut *mut c_void,
    source: pg_sys::GucSource::Type,
) -> bool {
    // SAFETY: called by PostgreSQL with valid places.
    unsafe { number(extra, source) }
}

/// Assign hook of `writeguard.token`.
unsafe extern "C-unwind" fn assign_token(new: *const c_char, extra: *mut c_void) {
    // SAFETY: `new` is NULL or a C string, `extra` what the check hook made.
    let (says, number) = unsafe { (!new.is_null() && *new != 0, number_of(extra)) };
    let state = &mut *state();
    state.token.assign(says, number, state.last_number);
    look_for_token(state.token.holds());
    xact::touch();
}

/// Show hook of `writeguard.token`: whether one is armed, never which.
unsafe extern "C-unwind" fn show_token() -> *const c_char {
    if state().token.holds() { c"********".as_ptr() } else { c"".as_ptr() }
}

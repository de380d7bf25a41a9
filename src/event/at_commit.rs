//! Events of what happens only with a commit: kept until then, and forgotten with the subtransaction that they are of.
//!
//! They are queued when the commit is done. After the commit record nothing may fail any more, because an ERROR there is a
//! PANIC; so all that can is done before it: each event is made ready, as bytes for the queue and a line for the log, when
//! the transaction is about to commit, and after that bytes are copied. A transaction that is prepared takes them along,
//! like the events that `store` writes.

use std::rc::Rc;

use pgrx::pg_sys;
use rules::error::Error;
use rules::words::Serial;

use super::record::{Event, Kind, top_xid};
use super::statement::told;
use super::{counters, queue, store};
use crate::pg::backend_local::{BackendCell, BackendLocal, Borrowed};
use crate::pg::log_line::Line;
use crate::pg::{ffi, process};
use crate::session::excerpt::Excerpt;

struct Pending {
    level: i32,
    /// None: it is past the number of events that are recorded one by one, and is only counted.
    event: Option<Event>,
    /// Further objects that have no event of their own, and whether another statement has done something to some of them.
    further: u64,
    others: bool,
    /// Apart from the event: one command may be the statement of thousands of events.
    statement: Rc<Statement>,
}

struct Statement {
    serial: Serial,
    told: Option<String>,
}

/// An event of which nothing is left to do but to copy it.
struct Ready {
    kind: Kind,
    policy: Option<String>,
    line: Line,
    json: String,
}

/// How far the transaction is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    Open,
    /// What is pending was made ready. What goes with the transaction, its temporary tables, may still have events.
    Commits,
    /// What is pending was written.
    Prepares,
}

static STAGE: BackendCell<Stage> = BackendCell::new(Stage::Open);
static PENDING: BackendLocal<Vec<Pending>> = BackendLocal::new(Vec::new());
static READY: BackendLocal<Vec<Ready>> = BackendLocal::new(Vec::new());

#[track_caller]
fn pending() -> Borrowed<Vec<Pending>> {
    PENDING.borrow()
}

/// Events that one command may have; further objects are a number in the last of them.
const MOST_PER_COMMAND: usize = 100;
/// Events that a transaction may have, likewise.
const MOST_PER_TRANSACTION: usize = 1_000;
/// Bytes that the statements of its events have in all, and what each further one has then.
const MOST_OF_STATEMENTS: usize = 4 * 1024 * 1024;
const STATEMENT_AFTER_THAT: usize = 512;

/// Records an event when, and if, what is being done now commits. `excerpt` is of the client's statement with that serial.
///
/// # Errors
/// WG008 where the transaction is being prepared and the event cannot be written.
pub fn record_at_commit(event: Event, serial: Serial, excerpt: &Excerpt) -> Result<(), Error> {
    // SAFETY: reads a static.
    let level = unsafe { ffi::GetCurrentTransactionNestLevel() };
    put(event, serial, excerpt, level);
    match STAGE.get() {
        Stage::Open => Ok(()),
        Stage::Commits => {
            make_ready();
            Ok(())
        }
        Stage::Prepares => write(),
    }
}

fn put(event: Event, serial: Serial, excerpt: &Excerpt, level: i32) {
    let pending = &mut *pending();
    let same = pending.iter().rev().take_while(|pending| pending.statement.serial == serial).count();
    if same >= MOST_PER_COMMAND || pending.len() >= MOST_PER_TRANSACTION {
        let Some(last) = pending.last_mut() else { return };
        let others = last.statement.serial != serial;
        if last.level == level {
            last.further += 1;
            last.others |= others;
        } else {
            let statement = Rc::clone(&last.statement);
            pending.push(Pending { level, event: None, further: 1, others, statement });
        }
        return;
    }
    let statement = match pending.last() {
        Some(last) if last.statement.serial == serial => Rc::clone(&last.statement),
        _ => {
            let bytes: usize =
                pending.iter().map(|pending| pending.statement.told.as_ref().map_or(0, String::len)).sum();
            let most = if bytes < MOST_OF_STATEMENTS { usize::MAX } else { STATEMENT_AFTER_THAT };
            Rc::new(Statement { serial, told: told(&excerpt.at_most(most)) })
        }
    };
    pending.push(Pending { level, event: Some(event), further: 0, others: false, statement });
}

/// Whether there is anything to record.
#[inline(always)]
pub fn any() -> bool {
    !pending().is_empty()
}

/// What is to be recorded, with all that is known by now.
fn take() -> impl Iterator<Item = Event> {
    let xid = top_xid();
    core::mem::take(&mut *pending()).into_iter().filter_map(
        move |Pending { event, further, others, statement, .. }| {
            let mut event = event?;
            event.xid.clone_from(&xid);
            event.statement.clone_from(&statement.told);
            if further > 0 {
                let whose = if others { "in the same transaction" } else { "by the same statement" };
                let what = if event.kind == Kind::PolicyChanged { "changes" } else { "tables" };
                let more = format!("And {further} further {what} {whose}.");
                event.reason = Some(event.reason.map_or(more.clone(), |reason| format!("{reason} {more}")));
            }
            Some(event)
        },
    )
}

/// The transaction is about to commit or to be prepared; what is recorded from now on has no later chance.
#[inline(always)]
pub fn closes(prepares: bool) {
    STAGE.set(if prepares { Stage::Prepares } else { Stage::Commits });
}

/// Makes ready what is pending. A transaction that has no number by now has none in its events.
pub fn make_ready() {
    let made: Vec<Ready> = take()
        .map(|event| Ready { kind: event.kind, line: event.line(), json: event.queued_json(), policy: event.policy })
        .collect();
    READY.borrow().extend(made);
}

/// Whether anything is ready.
#[inline(always)]
pub fn any_ready() -> bool {
    !READY.borrow().is_empty()
}

/// The commit is done: nobody waits for these events, and nothing here fails.
pub fn committed() {
    let ready = core::mem::take(&mut *READY.borrow());
    for Ready { kind, policy, line, json } in ready {
        line.write();
        counters::count(kind, policy.as_deref());
        // SAFETY: a static. Without a postmaster nobody would ever store it.
        if unsafe { pg_sys::IsUnderPostmaster } && queue::push(json.as_bytes(), false).is_none() {
            queue::count_unqueued();
        }
    }
}

/// The transaction is about to be prepared: these events are a part of it.
///
/// # Errors
/// WG008 when the extension's tables are missing.
pub fn write() -> Result<(), Error> {
    if process::own_table(c"event") == pgrx::pg_sys::InvalidOid {
        // The transaction drops the extension; the server log is all there is.
        take().for_each(|event| event.log());
        return Ok(());
    }
    store::at_the_end(|| take().try_for_each(|event| store::insert(&event).map(|_| ())))
}

/// A subtransaction of this level was rolled back.
pub fn roll_back(level: i32) {
    pending().retain(|pending| pending.level < level);
}

/// A subtransaction of this level was released.
pub fn release(level: i32) {
    for pending in pending().iter_mut().filter(|pending| pending.level >= level) {
        pending.level = level - 1;
    }
    // What only counts is counted by the event before it, once both are of one level.
    pending().dedup_by(|next, before| {
        let counts = next.event.is_none() && next.level == before.level;
        if counts {
            before.further += next.further;
            before.others |= next.others;
        }
        counts
    });
}

/// The transaction is over.
#[inline(always)]
pub fn end_transaction() {
    STAGE.set(Stage::Open);
    if any() || any_ready() {
        forget();
    }
}

#[cold]
#[inline(never)]
fn forget() {
    pending().clear();
    READY.borrow().clear();
}

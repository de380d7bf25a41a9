//! What this transaction took out of the buckets of rates, and what goes back.
//!
//! Rows are taken one by one as they are written, all sessions of a login from the same bucket. What is rolled back, was
//! refused or turns out to be lifted goes back; what commits is spent.

use core::convert::Infallible;

use rules::limits::gcra::{Rate, Room, Share};
use rules::limits::ledger::{Ledger, MeterId};
use rules::words::Serial;

use super::rate_memory::{self, Known, Owner, Pinned};
use crate::pg::backend_local::{BackendLocal, Borrowed};
use crate::pg::function::{Arguments, Returns, sql_function, value};

sql_function!(
    /// `_rate_counters() → bigint[]`: the numbers of the view `rate_slots`.
    writeguard_rate_counters, pg_finfo_writeguard_rate_counters, rate_counters
);

fn rate_counters(_arguments: &Arguments) -> Returns {
    value(rate_memory::counters().map(|number| i64::try_from(number).unwrap_or(i64::MAX)).to_vec())
}

/// A policy's rate, as far as this session uses it.
pub struct Bucket {
    owner: Owner,
    rate: Rate,
    /// Counts what was taken in this transaction.
    meter: MeterId,
    /// Where the bucket was last.
    known: Option<Known>,
    held: Option<Held>,
}

/// What is taken in the running transaction.
struct Held {
    pinned: Pinned,
    rows: u64,
    share: Share,
}

/// Place of a bucket in this session.
pub type BucketId = usize;

/// No room in the table of buckets.
pub struct NoRoom;

static BUCKETS: BackendLocal<Vec<Bucket>> = BackendLocal::new(Vec::new());

#[track_caller]
fn buckets() -> Borrowed<Vec<Bucket>> {
    BUCKETS.borrow()
}

/// The session's place for a bucket. `meter` counts for it alone.
pub fn add(owner: Owner, rate: Rate, meter: MeterId) -> BucketId {
    let mut buckets = buckets();
    buckets.push(Bucket { owner, rate, meter, known: None, held: None });
    buckets.len() - 1
}

/// Forgets all buckets. Only between transactions.
pub fn clear() {
    buckets().clear();
}

/// Makes sure that the running transaction holds the bucket.
fn hold(bucket: &mut Bucket) -> Result<&mut Held, NoRoom> {
    if bucket.held.is_none() {
        let pinned =
            bucket.known.and_then(rate_memory::pin).or_else(|| rate_memory::find(bucket.owner)).ok_or(NoRoom)?;
        bucket.known = Some(pinned.known());
        bucket.held = Some(Held { pinned, rows: 0, share: Share::default() });
    }
    bucket.held.as_mut().ok_or(NoRoom)
}

/// Takes rows. Ok(false): there are not so many.
///
/// # Errors
/// When there is no room for the bucket itself.
#[inline]
pub fn take(id: BucketId, rows: u64) -> Result<bool, NoRoom> {
    let mut buckets = buckets();
    let Some(bucket) = buckets.get_mut(id) else { return Ok(true) };
    let rate = bucket.rate;
    let held = hold(bucket)?;
    let share = held.share;
    let Ok(share) = held.pinned.change(|found| rate.take_for(share, found, rows)) else { return Ok(false) };
    held.share = share;
    held.rows += rows;
    Ok(true)
}

/// Takes rows as far as there are any, for a policy of mode observe or warn. Gives how many.
///
/// # Errors
/// When there is no room for the bucket itself.
pub fn take_what_there_is(id: BucketId, rows: u64) -> Result<u64, NoRoom> {
    let mut buckets = buckets();
    let Some(bucket) = buckets.get_mut(id) else { return Ok(rows) };
    let rate = bucket.rate;
    let held = hold(bucket)?;
    let share = held.share;
    let Ok((share, taken)) = held.pinned.change(|found| {
        let (full_at, share, taken) = rate.take_up_to(share, found, rows);
        Ok::<_, Infallible>((full_at, (share, taken)))
    });
    held.share = share;
    held.rows += taken;
    Ok(taken)
}

/// The meter that counts what [`take`] took; the caller charges it.
pub fn meter(id: BucketId) -> MeterId {
    buckets().get(id).map_or(MeterId::MAX, |bucket| bucket.meter)
}

/// Rows that can be taken now; as many as one likes where the bucket is not known yet.
pub fn left(id: BucketId) -> u64 {
    let mut buckets = buckets();
    let Some(bucket) = buckets.get_mut(id) else { return u64::MAX };
    let rate = bucket.rate;
    hold(bucket).map_or(0, |held| {
        let found = held.pinned.found();
        rate.left(found.full_at, found.now)
    })
}

/// When there is room again for a statement that has taken `taken` rows and was refused `more`: its own go back.
pub fn room(id: BucketId, taken: u64, more: u64) -> Option<Room> {
    let mut buckets = buckets();
    let bucket = buckets.get_mut(id)?;
    let rate = bucket.rate;
    let held = bucket.held.as_ref()?;
    let found = held.pinned.found();
    let (back, _) = rate.put_back(held.share, found, taken);
    Some(rate.room(back, found.now, taken.saturating_add(more)))
}

/// Puts rows back that the running transaction took.
fn give_back(held: &mut Held, rate: Rate, rows: u64) {
    let share = held.share;
    let Ok(share) = held.pinned.change(|found| Ok::<_, Infallible>(rate.put_back(share, found, rows)));
    held.share = share;
}

/// After rows were taken off its meter: what is not counted there any more goes back.
fn settle(bucket: &mut Bucket, ledger: &Ledger) {
    let counted = ledger.in_transaction(bucket.meter);
    let rate = bucket.rate;
    if let Some(held) = &mut bucket.held
        && held.rows > counted
    {
        give_back(held, rate, held.rows - counted);
        held.rows = counted;
    }
}

/// A subtransaction was rolled back, and the ledger knows.
pub fn rolled_back(ledger: &Ledger) {
    for bucket in buckets().iter_mut().filter(|bucket| bucket.held.is_some()) {
        settle(bucket, ledger);
    }
}

/// The policy was lifted for a statement, which spends nothing of its rate.
pub fn lifted(id: BucketId, statement: Serial, ledger: &mut Ledger) {
    if let Some(bucket) = buckets().get_mut(id) {
        ledger.forgive(bucket.meter, statement);
        settle(bucket, ledger);
    }
}

/// The transaction is over; what it did not keep goes back. Before the ledger forgets.
pub fn end_transaction(kept: bool) {
    for bucket in buckets().iter_mut() {
        let rate = bucket.rate;
        if let Some(mut held) = bucket.held.take() {
            if !kept && held.rows > 0 {
                let rows = held.rows;
                give_back(&mut held, rate, rows);
            }
            held.pinned.unpin();
        }
    }
}

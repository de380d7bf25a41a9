//! The limits that not every policy has: a fraction of the table, a rate, and a transaction block for more than one row.

use core::cell::Cell;
use std::rc::Rc;

use pgrx::pg_sys;
use rules::error::Error;
use rules::limits::gcra::Rate;
use rules::limits::ledger::{Ledger, MeterId, Past};
use rules::policy::limit::Limits;
use rules::policy::model::Policy;
use rules::words::{Place, Serial};
use rustc_hash::{FxBuildHasher, FxHashMap};

use super::observe::Counted;
use super::rate::{self, BucketId};
use super::rate_memory::Owner;
use crate::pg::ereport::Failure;
use crate::pg::ffi;
use crate::policy::size;
use crate::policy::table::{Loaded, Revision};
use crate::session::{settings, transaction_block};

/// A policy's further limits, as far as the tables of one tree are concerned.
pub struct More {
    /// Of the table, or of the tree of partitions it belongs to.
    fraction: Option<Fraction>,
    rate: Option<Taken>,
    /// Where more than one row has to be in a transaction block: counts the rows of a statement.
    block: Option<MeterId>,
}

/// A rate of which rows are taken.
#[derive(Clone, Copy)]
struct Taken {
    bucket: BucketId,
    /// Counts the rows of a statement that were asked for, where they are not taken or may be more than there are.
    asked: MeterId,
}

/// A fraction of a table's rows.
struct Fraction {
    meter: MeterId,
    root: pg_sys::Oid,
    part: f64,
    /// The statement that it was worked out for: its limit, and about how many rows the table holds.
    known: Cell<(Serial, u64, u64)>,
}

/// Those that this session has met.
pub struct Further {
    /// By policy and root of the tree.
    known: FxHashMap<(Revision, u32, Limits), Rc<More>>,
    /// Each policy's one for all tables.
    rates: FxHashMap<Revision, Taken>,
    blocks: FxHashMap<Revision, MeterId>,
    /// Of a policy for a tree: the operations have it in common.
    fractions: FxHashMap<(Revision, u32), MeterId>,
}

impl Further {
    /// None yet.
    pub const fn new() -> Self {
        Self {
            known: FxHashMap::with_hasher(FxBuildHasher),
            rates: FxHashMap::with_hasher(FxBuildHasher),
            blocks: FxHashMap::with_hasher(FxBuildHasher),
            fractions: FxHashMap::with_hasher(FxBuildHasher),
        }
    }

    /// A policy's further limits for the tables of one tree; none where it has none.
    pub fn of(&mut self, ledger: &mut Ledger, policy: &Loaded, root: pg_sys::Oid) -> Option<Rc<More>> {
        let Policy { rate, max_fraction, .. } = policy.policy;
        let wants_block = policy.policy.wants_transaction();
        if rate.is_none() && max_fraction.is_none() && !wants_block {
            return None;
        }
        let key = (policy.revision, u32::from(root), policy.policy.states());
        if let Some(known) = self.known.get(&key) {
            return Some(Rc::clone(known));
        }
        let rate = rate.map(|rate| {
            *self.rates.entry(policy.revision).or_insert_with(|| {
                // SAFETY: these read statics.
                let (database, login) = unsafe { (pg_sys::MyDatabaseId, ffi::GetAuthenticatedUserId()) };
                let owner = Owner { policy: policy.rate_key(), database, login };
                let meter = ledger.add(None, None);
                let bucket = rate::add(owner, Rate::new(rate.rows, rate.interval.saturating_mul(1_000)), meter);
                Taken { bucket, asked: ledger.add(None, None) }
            })
        });
        let of_tree = (policy.revision, u32::from(root));
        let fraction = max_fraction.map(|part| {
            let meter = *self.fractions.entry(of_tree).or_insert_with(|| ledger.add(None, None));
            Fraction { meter, root, part, known: Cell::new((0, 0, 0)) }
        });
        let new_block = || ledger.add(None, None);
        let block = wants_block.then(|| *self.blocks.entry(policy.revision).or_insert_with(new_block));
        let more = Rc::new(More { fraction, rate, block });
        self.known.insert(key, Rc::clone(&more));
        Some(more)
    }

    /// The bucket of a policy's rate.
    pub fn rate(&self, policy: Revision) -> Option<BucketId> {
        self.rates.get(&policy).map(|taken| taken.bucket)
    }

    /// Forgets them all. Only between transactions.
    pub fn clear(&mut self) {
        self.known.clear();
        self.rates.clear();
        self.blocks.clear();
        self.fractions.clear();
        rate::clear();
    }
}

/// Rows of a table that a fraction always allows.
const FEWEST_ROWS: u64 = 10;

impl Fraction {
    /// Works out the limit for a statement when it comes to it first.
    fn prepare(&self, statement: Serial) {
        if self.known.get().0 != statement {
            let held = size::rows(self.root);
            let limit = ((held as f64 * self.part) as u64).max(FEWEST_ROWS);
            self.known.set((statement, limit, held));
        }
    }

    /// The limit for a statement that it was worked out for, and about how many rows the table held then.
    fn of_statement(&self, statement: Serial) -> (u64, u64) {
        let (known, limit, held) = self.known.get();
        debug_assert_eq!(known, statement, "a fraction that was not prepared");
        (limit, held)
    }
}

/// What a policy's further limits are looked at for.
pub struct Charged<'a> {
    pub policy: &'a Loaded,
    pub rows: u64,
    pub place: Place,
}

impl More {
    /// Works out for a statement what the limits below are. Before the ledger is borrowed for them: a table's size is
    /// looked up.
    pub fn prepare(&self, statement: Serial) {
        if let Some(fraction) = &self.fraction {
            fraction.prepare(statement);
        }
    }

    /// Counts rows for a transaction block, where there is none, and says whether they want one.
    fn charge_block(
        &self,
        ledger: &mut Ledger,
        rows: u64,
        place: Place,
        suspended: impl Fn(Serial) -> bool + Copy,
    ) -> Option<MeterId> {
        let block = self.block.filter(|_| !transaction_block::is_explicit())?;
        ledger.charge(block, rows, place, suspended);
        (ledger.in_statement(block, place.statement) > 1).then_some(block)
    }

    /// Charges rows to these limits, and says which of them that went past. `suspended` tells whether another statement
    /// may continue later.
    ///
    /// # Errors
    /// WG008 when there is no room for a rate.
    pub fn charge(
        &self,
        ledger: &mut Ledger,
        charged: &Charged<'_>,
        suspended: impl Fn(Serial) -> bool + Copy,
    ) -> Result<Option<Past>, Failure> {
        let Charged { policy, rows, place } = *charged;
        if self.charge_block(ledger, rows, place, suspended).is_some() {
            return Ok(Some(Past::Block));
        }
        if let Some(fraction) = &self.fraction {
            let (limit, held) = fraction.of_statement(place.statement);
            ledger.charge(fraction.meter, rows, place, suspended);
            if ledger.in_statement(fraction.meter, place.statement) > limit {
                return Ok(Some(Past::Fraction(limit, held)));
            }
        }
        if let Some(Taken { bucket, .. }) = self.rate {
            let taken = rate::take(bucket, rows).map_err(|_| Error::Undecided {
                reason: format!("there is no room for the rate of policy \"{}\"", policy.policy.name),
                hint: format!(
                    "ALTER SYSTEM SET writeguard.rate_slots = {}; (then restart)",
                    settings::rate_slots() * 2
                ),
                relation: None,
            })?;
            let meter = rate::meter(bucket);
            if !taken {
                let before = ledger.in_statement(meter, place.statement);
                return Ok(Some(Past::Rate(rate::room(bucket, before, rows))));
            }
            ledger.charge(meter, rows, place, suspended);
        }
        Ok(None)
    }

    /// The limit at which these would refuse rows of a rehearsal, which were charged to the policy's own meter already. Nothing
    /// is taken of a rate.
    pub fn would_refuse(
        &self,
        ledger: &mut Ledger,
        charged: &Charged<'_>,
        suspended: impl Fn(Serial) -> bool + Copy,
    ) -> Option<u64> {
        let Charged { rows, place, policy } = *charged;
        if let Some(fraction) = &self.fraction {
            ledger.charge(fraction.meter, rows, place, suspended);
            let limit = fraction.of_statement(place.statement).0;
            if ledger.in_statement(fraction.meter, place.statement) > limit {
                return Some(limit);
            }
        }
        if self.charge_block(ledger, rows, place, suspended).is_some() {
            return Some(1);
        }
        let Taken { bucket, asked } = self.rate?;
        ledger.charge(asked, rows, place, suspended);
        let spent = rate::left(bucket) < ledger.in_statement(asked, place.statement);
        policy.policy.rate.filter(|_| spent).map(|rate| rate.rows)
    }

    /// Charges rows to these limits for a policy of mode observe or warn: to all of them, passed or not. Gives the first
    /// that went past, and how its rows are counted. What a rate has no more of is not taken.
    pub fn observe(
        &self,
        ledger: &mut Ledger,
        charged: &Charged<'_>,
        suspended: impl Fn(Serial) -> bool + Copy,
    ) -> Option<(Past, Counted)> {
        let Charged { policy, rows, place } = *charged;
        let block = self.charge_block(ledger, rows, place, suspended);
        let mut past = block.map(|block| (Past::Block, Counted::In(block)));
        if let Some(fraction) = &self.fraction {
            let (limit, held) = fraction.of_statement(place.statement);
            ledger.charge(fraction.meter, rows, place, suspended);
            if ledger.in_statement(fraction.meter, place.statement) > limit {
                past = past.or(Some((Past::Fraction(limit, held), Counted::In(fraction.meter))));
            }
        }
        if let Some(Taken { bucket, asked }) = self.rate {
            ledger.charge(asked, rows, place, suspended);
            // Without room for the rate nothing can be said about it; that is counted where the room is.
            let taken = rate::take_what_there_is(bucket, rows).unwrap_or(rows);
            ledger.charge(rate::meter(bucket), taken, place, suspended);
            if taken < rows {
                let limit = policy.policy.rate.map_or(0, |rate| rate.rows);
                let before = ledger.in_statement(asked, place.statement).saturating_sub(rows - taken);
                past = past.or(Some((Past::Rate(None), Counted::Beyond { asked, limit, before })));
            }
        }
        past
    }

    /// How many more rows these limits take in a statement, where the policy's own meter takes `left`; a missing block
    /// counts only where no number does.
    pub fn left(&self, ledger: &Ledger, left: u64, statement: Serial) -> u64 {
        let mut left = left;
        if let Some(fraction) = &self.fraction {
            let (limit, _) = fraction.of_statement(statement);
            left = left.min(limit.saturating_sub(ledger.in_statement(fraction.meter, statement)));
        }
        if let Some(Taken { bucket, .. }) = self.rate {
            left = left.min(rate::left(bucket));
        }
        if let Some(block) = self.block.filter(|_| left == u64::MAX && !transaction_block::is_explicit()) {
            left = 1u64.saturating_sub(ledger.in_statement(block, statement));
        }
        left
    }
}

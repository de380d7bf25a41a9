//! The numbers: how many rows each policy's budget was charged in this statement and in this transaction.
//!
//! Pure. A *meter* counts one thing, a policy's budget or the rows of one relation. Meters outlive transactions, so
//! that a covered write allocates nothing once they are there; a transaction or statement that is over is recognised
//! by its serial number, not by resetting every meter. Rows charged inside a subtransaction are kept apart in frames,
//! so that its rollback can give them back.

use rustc_hash::{FxBuildHasher, FxHashMap};

use super::gcra::Room;
use crate::words::{Place, Serial};

/// Place of a meter in the ledger.
pub type MeterId = usize;

/// The limits of a budget to which a relation's rows do not count, because others set them aside there. They count as rows
/// of the statement all the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Beside {
    pub statement: bool,
    pub transaction: bool,
}

impl Beside {
    /// They count to all limits.
    pub const NONE: Self = Self { statement: false, transaction: false };

    /// What so many rows add.
    #[inline]
    fn rows(self, rows: u64) -> Rows {
        Rows {
            all: rows,
            to_statement: if self.statement { 0 } else { rows },
            to_transaction: if self.transaction { 0 } else { rows },
        }
    }
}

/// Rows: all of them, and those that count to a limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Rows {
    all: u64,
    to_statement: u64,
    to_transaction: u64,
}

impl Rows {
    fn add(&mut self, more: Self) {
        self.all += more.all;
        self.to_statement += more.to_statement;
        self.to_transaction += more.to_transaction;
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Frame {
    level: i32,
    statement: Serial,
    rows: Rows,
}

/// A statement's rows: all, and those that count to the limit per statement.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct OfStatement {
    all: u64,
    counted: u64,
}

impl OfStatement {
    fn take_back(&mut self, rows: Rows) {
        self.all = self.all.saturating_sub(rows.all);
        self.counted = self.counted.saturating_sub(rows.to_statement);
    }
}

/// Stands for all statements that are over.
const FINISHED: Serial = 0;

#[derive(Debug, Clone)]
struct Meter {
    transaction: Serial,
    statement: Serial,
    in_statement: OfStatement,
    /// Those that count to the limit per transaction.
    in_transaction: u64,
    per_statement: u64,
    per_transaction: u64,
    /// The statement of this transaction whose way past the limits is known and let pass; 0: none.
    noted: Serial,
    /// Open subtransactions that charged something, the innermost last.
    frames: Vec<Frame>,
}

/// Which limit a charge went past.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Past {
    Statement,
    Transaction,
    /// The rate, and when it has room again; none where nobody waits for it.
    Rate(Option<Room>),
    /// A fraction of a table: so many rows, of so many that it holds about.
    Fraction(u64, u64),
    /// More than one row outside a transaction block.
    Block,
    /// No number: a whole table would be scanned where the policy wants a condition.
    Unnarrowed,
}

/// All meters of this backend.
#[derive(Debug)]
pub struct Ledger {
    transaction: Serial,
    meters: Vec<Meter>,
    /// What suspended statements had charged. One transaction may have tens of thousands of them.
    suspended: FxHashMap<(Serial, MeterId), OfStatement>,
    /// Meters that have frames: the others need not be looked at when a subtransaction ends.
    framed: Vec<MeterId>,
}

impl Default for Ledger {
    fn default() -> Self {
        Self::new()
    }
}

impl Ledger {
    /// No meters yet.
    pub const fn new() -> Self {
        let suspended = FxHashMap::with_hasher(FxBuildHasher);
        Self { transaction: 1, meters: Vec::new(), suspended, framed: Vec::new() }
    }

    /// Adds a meter with its limits in rows; none is no limit.
    pub fn add(&mut self, per_statement: Option<u64>, per_transaction: Option<u64>) -> MeterId {
        self.meters.push(Meter {
            transaction: 0,
            statement: 0,
            in_statement: OfStatement::default(),
            in_transaction: 0,
            per_statement: per_statement.unwrap_or(u64::MAX),
            per_transaction: per_transaction.unwrap_or(u64::MAX),
            noted: 0,
            frames: Vec::new(),
        });
        self.meters.len() - 1
    }

    /// Forgets all meters. Only between transactions: whoever holds a [`MeterId`] must be gone.
    pub fn clear(&mut self) {
        self.meters.clear();
        self.suspended.clear();
        self.framed.clear();
    }

    /// The transaction is over, one way or the other: all counts start again.
    pub fn end_transaction(&mut self) {
        self.transaction += 1;
        self.suspended.clear();
        for id in self.framed.drain(..) {
            if let Some(meter) = self.meters.get_mut(id) {
                meter.frames.clear();
            }
        }
    }

    /// Charges `rows` and says which limit that went past, if any. `suspended` tells whether another statement may go
    /// on later.
    #[inline]
    pub fn charge(&mut self, id: MeterId, rows: u64, place: Place, suspended: impl Fn(Serial) -> bool) -> Option<Past> {
        self.charge_beside(id, rows, Beside::NONE, place, suspended)
    }

    /// The same for rows of a relation for which some of the meter's limits are set aside.
    #[inline]
    pub fn charge_beside(
        &mut self,
        id: MeterId,
        rows: u64,
        beside: Beside,
        place: Place,
        suspended: impl Fn(Serial) -> bool,
    ) -> Option<Past> {
        let mut meter = self.meters.get_mut(id)?;
        if meter.transaction != self.transaction && self.suspended.is_empty() {
            // The first rows in a transaction.
            meter.transaction = self.transaction;
            meter.statement = place.statement;
            meter.in_statement = OfStatement::default();
            meter.in_transaction = 0;
            meter.noted = 0;
        } else if meter.transaction != self.transaction || meter.statement != place.statement {
            self.enter(id, place.statement, &suspended);
            meter = self.meters.get_mut(id)?;
        }
        let rows = beside.rows(rows);
        meter.in_statement.all += rows.all;
        meter.in_statement.counted += rows.to_statement;
        meter.in_transaction += rows.to_transaction;
        if place.level > 1 {
            if meter.frames.is_empty() {
                self.framed.push(id);
            }
            meter.remember(rows, place, &suspended);
        }
        if meter.in_statement.counted > meter.per_statement && !beside.statement {
            meter.unless_noted(Past::Statement)
        } else if meter.in_transaction > meter.per_transaction && !beside.transaction {
            meter.unless_noted(Past::Transaction)
        } else {
            None
        }
    }

    /// That a statement went past a limit is known, and it continues: its further rows give no verdict.
    pub fn note(&mut self, id: MeterId, statement: Serial, suspended: impl Fn(Serial) -> bool) {
        let transaction = self.transaction;
        let Some(meter) = self.meters.get(id) else { return };
        if meter.transaction != transaction || meter.statement != statement {
            self.enter(id, statement, &suspended);
        }
        self.meters[id].noted = statement;
    }

    /// Whether [`Ledger::note`] was called for that statement in this transaction.
    pub fn is_noted(&self, id: MeterId, statement: Serial) -> bool {
        self.meters.get(id).is_some_and(|meter| meter.transaction == self.transaction && meter.noted == statement)
    }

    /// Makes the meter count for another statement or transaction.
    #[cold]
    fn enter(&mut self, id: MeterId, statement: Serial, suspended: &impl Fn(Serial) -> bool) {
        let meter = &mut self.meters[id];
        if meter.transaction != self.transaction {
            meter.transaction = self.transaction;
            meter.in_transaction = 0;
            meter.noted = 0;
        } else if meter.in_statement.all > 0 && suspended(meter.statement) {
            self.suspended.insert((meter.statement, id), meter.in_statement);
        }
        meter.in_statement = self.suspended.remove(&(statement, id)).unwrap_or_default();
        meter.statement = statement;
    }

    /// Rows charged by `statement` so far.
    pub fn in_statement(&self, id: MeterId, statement: Serial) -> u64 {
        self.of_statement(id, statement).all
    }

    /// Those of them that count to the limit per statement.
    pub fn counted_in_statement(&self, id: MeterId, statement: Serial) -> u64 {
        self.of_statement(id, statement).counted
    }

    fn of_statement(&self, id: MeterId, statement: Serial) -> OfStatement {
        self.meters.get(id).map_or_else(OfStatement::default, |meter| {
            if meter.transaction == self.transaction && meter.statement == statement {
                return meter.in_statement;
            }
            self.suspended.get(&(statement, id)).copied().unwrap_or_default()
        })
    }

    /// Forgets what a statement was charged in this transaction. Of meters that are charged with nothing beside.
    pub fn forgive(&mut self, id: MeterId, statement: Serial) {
        let rows = self.in_statement(id, statement);
        self.suspended.remove(&(statement, id));
        if let Some(meter) = self.meters.get_mut(id).filter(|meter| meter.transaction == self.transaction) {
            meter.in_transaction = meter.in_transaction.saturating_sub(rows);
            if meter.statement == statement {
                meter.in_statement = OfStatement::default();
            }
            let frames = meter.frames.iter_mut().filter(|frame| frame.statement == statement);
            frames.for_each(|frame| frame.rows = Rows::default());
        }
    }

    /// Rows charged in this transaction so far that count to the limit per transaction.
    pub fn in_transaction(&self, id: MeterId) -> u64 {
        self.meters
            .get(id)
            .filter(|meter| meter.transaction == self.transaction)
            .map_or(0, |meter| meter.in_transaction)
    }

    /// How many more rows the meter takes in this statement before a limit is passed to which they count.
    pub fn left(&self, id: MeterId, beside: Beside, statement: Serial) -> u64 {
        self.meters.get(id).map_or(u64::MAX, |meter| {
            if meter.transaction == self.transaction && meter.noted == statement {
                return u64::MAX;
            }
            let of_statement = meter.per_statement.saturating_sub(self.counted_in_statement(id, statement));
            let of_transaction = meter.per_transaction.saturating_sub(self.in_transaction(id));
            let unless = |beside: bool, left: u64| if beside { u64::MAX } else { left };
            unless(beside.statement, of_statement).min(unless(beside.transaction, of_transaction))
        })
    }

    /// A subtransaction of this level was rolled back: what it and all inside it charged is given back.
    pub fn roll_back(&mut self, level: i32) {
        let mut suspended = core::mem::take(&mut self.suspended);
        self.unframe(|id, meter| {
            while let Some(frame) = meter.frames.pop_if(|frame| frame.level >= level) {
                meter.in_transaction = meter.in_transaction.saturating_sub(frame.rows.to_transaction);
                if frame.statement == meter.statement {
                    meter.in_statement.take_back(frame.rows);
                } else if let Some(rows) = suspended.get_mut(&(frame.statement, id)) {
                    rows.take_back(frame.rows);
                }
            }
        });
        self.suspended = suspended;
    }

    /// A subtransaction of this level was released: what it charged now belongs to the one around it. `suspended`
    /// tells whether another statement may continue later.
    pub fn release(&mut self, level: i32, suspended: impl Fn(Serial) -> bool) {
        self.unframe(|_, meter| {
            let inner = meter.frames.iter().position(|frame| frame.level >= level).unwrap_or(meter.frames.len());
            for frame in meter.frames.split_off(inner) {
                if level > 2 {
                    meter.remember_frame(Frame { level: level - 1, ..frame }, &suspended);
                }
            }
        });
    }

    /// Changes the frames of all meters that have some, and forgets those that have none any more.
    fn unframe(&mut self, mut change: impl FnMut(MeterId, &mut Meter)) {
        let meters = &mut self.meters;
        self.framed.retain(|id| {
            meters.get_mut(*id).is_some_and(|meter| {
                change(*id, meter);
                !meter.frames.is_empty()
            })
        });
    }
}

impl Meter {
    #[cold]
    fn unless_noted(&self, past: Past) -> Option<Past> {
        (self.noted != self.statement).then_some(past)
    }

    #[inline]
    fn remember(&mut self, rows: Rows, place: Place, suspended: &impl Fn(Serial) -> bool) {
        if let Some(frame) = self.frames.last_mut()
            && frame.level == place.level
            && frame.statement == place.statement
        {
            frame.rows.add(rows);
            return;
        }
        self.remember_frame(Frame { level: place.level, statement: place.statement, rows }, suspended);
    }

    /// Adds to the frame of that level and statement. Statements that are over share a frame, because
    /// their own counts are of no use: so there are never more frames than open subtransactions and living portals.
    #[cold]
    fn remember_frame(&mut self, new: Frame, suspended: &impl Fn(Serial) -> bool) {
        let of_level = self.frames.iter_mut().rev().take_while(|frame| frame.level == new.level);
        for frame in of_level {
            if frame.statement == new.statement {
                frame.rows.add(new.rows);
                return;
            }
            if !suspended(frame.statement) {
                frame.statement = FINISHED;
            }
        }
        let mut finished = Rows::default();
        self.frames.retain(|frame| {
            let is_finished = frame.level == new.level && frame.statement == FINISHED;
            if is_finished {
                finished.add(frame.rows);
            }
            !is_finished
        });
        if finished != Rows::default() {
            self.frames.push(Frame { level: new.level, statement: FINISHED, rows: finished });
        }
        self.frames.push(new);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const NEVER: fn(Serial) -> bool = |_| false;

    fn place(statement: Serial, level: i32) -> Place {
        Place { statement, level }
    }

    #[test]
    fn the_limit_passes_and_one_more_does_not() {
        let mut ledger = Ledger::new();
        let meter = ledger.add(Some(2), Some(3));
        assert_eq!(ledger.charge(meter, 2, place(1, 1), NEVER), None);
        assert_eq!(ledger.charge(meter, 1, place(1, 1), NEVER), Some(Past::Statement));
        ledger.end_transaction();
        assert_eq!(ledger.charge(meter, 2, place(2, 1), NEVER), None);
        assert_eq!(ledger.charge(meter, 1, place(3, 1), NEVER), None);
        assert_eq!(ledger.charge(meter, 1, place(4, 1), NEVER), Some(Past::Transaction));
    }

    #[test]
    fn zero_means_not_one_row() {
        let mut ledger = Ledger::new();
        let meter = ledger.add(Some(0), None);
        assert_eq!(ledger.charge(meter, 1, place(1, 1), NEVER), Some(Past::Statement));
    }

    #[test]
    fn a_savepoint_gives_rows_back() {
        let mut ledger = Ledger::new();
        let meter = ledger.add(Some(5), Some(8));
        ledger.charge(meter, 3, place(1, 1), NEVER);
        ledger.charge(meter, 2, place(1, 2), NEVER);
        ledger.roll_back(2);
        assert_eq!((ledger.in_statement(meter, 1), ledger.in_transaction(meter)), (3, 3));
        ledger.charge(meter, 2, place(1, 3), NEVER);
        ledger.release(3, NEVER);
        ledger.roll_back(2);
        assert_eq!((ledger.in_statement(meter, 1), ledger.in_transaction(meter)), (3, 3));
        ledger.charge(meter, 2, place(1, 2), NEVER);
        ledger.release(2, NEVER);
        ledger.roll_back(2);
        assert_eq!((ledger.in_statement(meter, 1), ledger.in_transaction(meter)), (5, 5));
    }

    #[test]
    fn rolling_back_earlier_statements_leaves_this_one_alone() {
        let mut ledger = Ledger::new();
        let meter = ledger.add(Some(9), Some(9));
        ledger.charge(meter, 4, place(1, 2), NEVER);
        ledger.charge(meter, 3, place(2, 2), NEVER);
        ledger.roll_back(2);
        assert_eq!((ledger.in_statement(meter, 2), ledger.in_transaction(meter)), (0, 0));
    }

    #[test]
    fn what_is_known_is_told_once_per_statement_and_transaction() {
        let mut ledger = Ledger::new();
        let meter = ledger.add(Some(1), Some(2));
        assert_eq!(ledger.charge(meter, 2, place(1, 1), NEVER), Some(Past::Statement));
        ledger.note(meter, 1, NEVER);
        assert_eq!(ledger.left(meter, Beside::NONE, 1), u64::MAX);
        assert_eq!(ledger.charge(meter, 5, place(1, 1), NEVER), None);
        assert_eq!(ledger.charge(meter, 1, place(2, 1), NEVER), Some(Past::Transaction));
        ledger.end_transaction();
        // A procedure that commits continues the same statement.
        assert!(!ledger.is_noted(meter, 1));
        assert_eq!(ledger.charge(meter, 2, place(1, 1), NEVER), Some(Past::Statement));
        // Before the first row.
        ledger.note(meter, 3, NEVER);
        assert_eq!(ledger.charge(meter, 9, place(3, 1), NEVER), None);
    }

    #[test]
    fn interleaved_statements_keep_their_own_counts() {
        let mut ledger = Ledger::new();
        let meter = ledger.add(Some(3), None);
        let alive = |statement| statement == 1;
        assert_eq!(ledger.charge(meter, 2, place(1, 1), alive), None);
        assert_eq!(ledger.charge(meter, 3, place(2, 1), alive), None);
        assert_eq!(ledger.in_statement(meter, 1), 2);
        assert_eq!(ledger.charge(meter, 1, place(1, 1), alive), None);
        assert_eq!(ledger.charge(meter, 1, place(1, 1), alive), Some(Past::Statement));
    }

    #[test]
    fn a_savepoint_gives_rows_back_to_a_suspended_statement() {
        let mut ledger = Ledger::new();
        let meter = ledger.add(Some(4), None);
        let alive = |statement| statement == 1;
        ledger.charge(meter, 2, place(1, 1), alive);
        ledger.charge(meter, 2, place(1, 2), alive);
        ledger.charge(meter, 1, place(2, 2), alive);
        ledger.roll_back(2);
        assert_eq!(ledger.charge(meter, 2, place(1, 1), alive), None);
        assert_eq!(ledger.charge(meter, 1, place(1, 1), alive), Some(Past::Statement));
    }

    #[test]
    fn rows_beside_a_limit_are_rows_of_the_statement_and_no_more() {
        let mut ledger = Ledger::new();
        let meter = ledger.add(Some(3), Some(5));
        let beside_statement = Beside { statement: true, transaction: false };
        assert_eq!(ledger.charge_beside(meter, 4, beside_statement, place(1, 1), NEVER), None);
        assert_eq!((ledger.in_statement(meter, 1), ledger.counted_in_statement(meter, 1)), (4, 0));
        assert_eq!((ledger.left(meter, Beside::NONE, 1), ledger.left(meter, beside_statement, 1)), (1, 1));
        assert_eq!(ledger.charge(meter, 1, place(1, 1), NEVER), None);
        assert_eq!(ledger.charge_beside(meter, 1, beside_statement, place(1, 1), NEVER), Some(Past::Transaction));

        ledger.end_transaction();
        let beside_transaction = Beside { statement: false, transaction: true };
        assert_eq!(ledger.charge_beside(meter, 3, beside_transaction, place(2, 1), NEVER), None);
        assert_eq!(ledger.charge_beside(meter, 3, beside_transaction, place(3, 1), NEVER), None);
        assert_eq!((ledger.in_transaction(meter), ledger.left(meter, beside_transaction, 3)), (0, 0));
        // Past the limit by what counts to it, further rows beside it are past nothing.
        assert_eq!(ledger.charge(meter, 1, place(3, 1), NEVER), Some(Past::Statement));
        let beside_both = Beside { statement: true, transaction: true };
        assert_eq!(ledger.charge_beside(meter, 9, beside_both, place(3, 1), NEVER), None);
        assert_eq!(ledger.left(meter, beside_both, 3), u64::MAX);
    }

    #[test]
    fn frames_do_not_grow_with_statements() {
        let mut ledger = Ledger::new();
        let meter = ledger.add(None, None);
        for statement in 1..1000 {
            ledger.charge(meter, 1, place(statement, 2), NEVER);
        }
        assert!(ledger.meters[meter].frames.len() <= 2);
        ledger.roll_back(2);
        assert_eq!(ledger.in_transaction(meter), 0);
    }

    /// What a client could do to a meter, for the model test.
    #[derive(Debug, Clone)]
    enum Step {
        Charge(u8, bool, bool),
        Statement,
        Savepoint,
        Release,
        RollBack,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => (1u8..5, any::<bool>(), any::<bool>()).prop_map(|(rows, one, other)| Step::Charge(rows, one, other)),
            1 => Just(Step::Statement),
            2 => Just(Step::Savepoint),
            1 => Just(Step::Release),
            1 => Just(Step::RollBack),
        ]
    }

    proptest! {
        /// The meter agrees with a list of all charges from which rollbacks cut the tail.
        #[test]
        fn counts_are_those_of_the_surviving_charges(steps in proptest::collection::vec(step(), 0..60)) {
            let mut ledger = Ledger::new();
            let meter = ledger.add(None, None);
            let mut statement = 1;
            let mut charges: Vec<(Serial, Rows)> = Vec::new();
            let mut savepoints: Vec<usize> = Vec::new();
            for step in steps {
                match step {
                    Step::Charge(rows, one, other) => {
                        let level = savepoints.len() as i32 + 1;
                        let beside = Beside { statement: one, transaction: other };
                        ledger.charge_beside(meter, rows.into(), beside, place(statement, level), NEVER);
                        charges.push((statement, beside.rows(rows.into())));
                    }
                    Step::Statement => statement += 1,
                    Step::Savepoint => savepoints.push(charges.len()),
                    Step::Release => {
                        if savepoints.pop().is_some() {
                            ledger.release(savepoints.len() as i32 + 2, NEVER);
                        }
                    }
                    Step::RollBack => {
                        if let Some(at) = savepoints.pop() {
                            charges.truncate(at);
                            ledger.roll_back(savepoints.len() as i32 + 2);
                        }
                    }
                }
                let in_transaction: u64 = charges.iter().map(|(_, rows)| rows.to_transaction).sum();
                let of_this = || charges.iter().filter(|(of, _)| *of == statement).map(|(_, rows)| rows);
                prop_assert_eq!(ledger.in_transaction(meter), in_transaction);
                prop_assert_eq!(ledger.in_statement(meter, statement), of_this().map(|rows| rows.all).sum::<u64>());
                let counted: u64 = of_this().map(|rows| rows.to_statement).sum();
                prop_assert_eq!(ledger.counted_in_statement(meter, statement), counted);
            }
        }
    }
}

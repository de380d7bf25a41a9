//! A rate as a bucket that is refilled evenly: the generic cell rate algorithm.
//!
//! Pure. What a bucket holds is all in the time at which it is full again; nanoseconds of a clock that only goes forward. A
//! full bucket holds as many rows as the rate allows per interval.
//!
//! What is put back is what the bucket lacks of it: rows that a transaction took made it full later, and while it would
//! have been full without them nothing more came in. So each transaction knows by how much later the bucket is full
//! because of it, its [`Share`]. What others took in between is in the bucket's number too, though not when they did: the
//! last time that anybody took is the latest that it can have been. Where others put something back in between, that was as
//! if it had never been taken, and the share is only what it is for sure: what was taken less all the time since.

use crate::words::wait as wait_in_words;

/// How many rows per interval, and what one row costs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate {
    rows: u64,
    /// Nanoseconds in which one row is refilled; rounded up, so that never more than the rate comes back.
    cost: u64,
}

/// When there is room again in a bucket that had too little for a statement and has back what it took.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Room {
    /// The row at which the statement was stopped; how many more it would have taken nobody knows.
    pub reached: u64,
    /// Nanoseconds until one row can be taken; none: never.
    pub for_one: Option<u64>,
    /// The same for as many as it had reached.
    pub for_reached: Option<u64>,
}

impl Room {
    /// In a sentence.
    pub fn told(self) -> String {
        let after =
            |wait: u64| if wait == 0 { "now".to_owned() } else { format!("in {}", wait_in_words(wait / 1_000)) };
        let Some(one) = self.for_one.map(after) else { return "There is never room for a row.".into() };
        let reached = self.reached;
        match self.for_reached.map(after) {
            _ if reached <= 1 => format!("There is room for 1 row {one}."),
            Some(all) => format!(
                "There is room for 1 row {one}, and for the {reached} at which the statement was stopped {all}."
            ),
            None => format!(
                "There is room for 1 row {one}, and never for the {reached} at which the statement was stopped."
            ),
        }
    }
}

/// A bucket as it is found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bucket {
    pub full_at: u64,
    /// When anybody took rows last.
    pub taken_at: u64,
    /// Nanoseconds of all that was ever put back.
    pub put_back: u64,
    pub now: u64,
}

/// What a transaction took of a bucket, as far as that lacks it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Share {
    /// How much earlier the bucket would be full without what the transaction took.
    late: u64,
    /// The same whatever others put back.
    at_least: u64,
    /// The bucket after the transaction changed it last, but for when that was taken from.
    full_at: u64,
    put_back: u64,
    now: u64,
}

/// What is left of `late` when a bucket that is full at `full_at` is taken from at that time: where it would have been full
/// without that, nothing more came in.
fn left_of(late: u64, full_at: u64, time: u64) -> u64 {
    late.min(full_at.saturating_sub(time))
}

impl Share {
    /// As things are now.
    fn seen(self, bucket: Bucket) -> Self {
        let Bucket { full_at, taken_at, put_back, now } = bucket;
        let at_least = self.at_least.saturating_sub(now.saturating_sub(self.now));
        let late = match self.put_back == put_back {
            true if self.full_at == full_at => self.late,
            true => left_of(self.late, self.full_at, taken_at),
            false => at_least,
        };
        Self { late: left_of(late, full_at, now), at_least, full_at, put_back, now }
    }

    /// After the transaction has taken that much of the bucket, which is full then at `full_at`.
    fn with(self, taken: u64, full_at: u64) -> Self {
        let add = |late: u64| late.saturating_add(taken);
        Self { late: add(self.late), at_least: add(self.at_least), full_at, ..self }
    }

    /// After the transaction has put that much back.
    fn without(self, credit: u64, full_at: u64) -> Self {
        let (late, at_least) = (self.late.saturating_sub(credit), self.at_least.saturating_sub(credit));
        Self { late, at_least, full_at, put_back: self.put_back.wrapping_add(credit), ..self }
    }
}

impl Rate {
    /// `rows` per `interval` nanoseconds.
    pub fn new(rows: u64, interval: u64) -> Self {
        Self { rows, cost: interval.div_ceil(rows.max(1)).max(1) }
    }

    fn capacity(self) -> u64 {
        self.rows.saturating_mul(self.cost)
    }

    /// Takes rows out of a bucket that is full at `full_at`. Gives when it is full then.
    ///
    /// # Errors
    /// Nanoseconds until there are enough rows; none when there can never be so many at once.
    pub fn take(self, full_at: u64, now: u64, rows: u64) -> Result<u64, Option<u64>> {
        if rows > self.rows {
            return Err(None);
        }
        let then = full_at.max(now).saturating_add(rows.saturating_mul(self.cost));
        let missing = (then - now).saturating_sub(self.capacity());
        if missing == 0 { Ok(then) } else { Err(Some(missing)) }
    }

    /// Takes rows for a transaction. Gives when the bucket is full then, and the transaction's share.
    ///
    /// # Errors
    /// As for [`Rate::take`].
    pub fn take_for(self, share: Share, bucket: Bucket, rows: u64) -> Result<(u64, Share), Option<u64>> {
        let full_at = self.take(bucket.full_at, bucket.now, rows)?;
        Ok((full_at, share.seen(bucket).with(rows.saturating_mul(self.cost), full_at)))
    }

    /// Takes as many of `rows` as there are for a transaction. Gives when the bucket is full then, the transaction's
    /// share, and how many were taken.
    pub fn take_up_to(self, share: Share, bucket: Bucket, rows: u64) -> (u64, Share, u64) {
        let taken = rows.min(self.left(bucket.full_at, bucket.now));
        let cost = taken.saturating_mul(self.cost);
        let full_at = bucket.full_at.max(bucket.now).saturating_add(cost);
        (full_at, share.seen(bucket).with(cost, full_at), taken)
    }

    /// Puts the last rows back that a transaction took. Gives when the bucket is full then, and the transaction's share.
    pub fn put_back(self, share: Share, bucket: Bucket, rows: u64) -> (u64, Share) {
        let share = share.seen(bucket);
        // What came in since came in for the first rows.
        let credit = share.late.min(rows.saturating_mul(self.cost));
        let full_at = bucket.full_at.saturating_sub(credit);
        (full_at, share.without(credit, full_at))
    }

    /// Rows that are in the bucket.
    pub fn left(self, full_at: u64, now: u64) -> u64 {
        self.capacity().saturating_sub(full_at.saturating_sub(now)) / self.cost
    }

    /// Nanoseconds until a bucket that is full at `full_at` holds so many rows; none when it never does.
    pub fn wait_for(self, full_at: u64, now: u64, rows: u64) -> Option<u64> {
        self.take(full_at, now, rows).err().unwrap_or(Some(0))
    }

    /// When a bucket that is full at `full_at` has room for a statement that was stopped at row `reached`.
    pub fn room(self, full_at: u64, now: u64, reached: u64) -> Room {
        let wait = |rows| self.wait_for(full_at, now, rows);
        Room { reached, for_one: wait(1), for_reached: wait(reached) }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SECOND: u64 = 1_000_000_000;

    #[test]
    fn room_is_told_for_one_row_and_for_what_was_reached() {
        // One row in 18 seconds.
        let rate = Rate::new(200, 3_600 * SECOND);
        let all_taken = rate.take(0, 0, 200).unwrap();
        assert_eq!(rate.room(all_taken, 0, 1).told(), "There is room for 1 row in 18 s.");
        assert_eq!(
            rate.room(all_taken, 0, 50).told(),
            "There is room for 1 row in 18 s, and for the 50 at which the statement was stopped in 15 min."
        );
        assert_eq!(
            rate.room(0, 0, 201).told(),
            "There is room for 1 row now, and never for the 201 at which the statement was stopped."
        );
        assert_eq!(Rate::new(0, SECOND).room(0, 0, 1).told(), "There is never room for a row.");
    }

    #[test]
    fn a_full_bucket_holds_the_rows_of_an_interval_and_not_one_more() {
        for (rows, interval) in [(1, SECOND), (3, SECOND), (7, 3_600 * SECOND), (1_000_003, SECOND), (5, 2)] {
            let rate = Rate::new(rows, interval);
            let full_at = rate.take(0, 50, rows).unwrap();
            assert_eq!(rate.left(full_at, 50), 0);
            assert!(rate.take(full_at, 50, 1).is_err());
            assert_eq!(rate.take(0, 50, rows + 1), Err(None));
        }
        assert_eq!(Rate::new(0, SECOND).take(0, 0, 1), Err(None));
    }

    #[test]
    fn rows_come_back_one_by_one() {
        let rate = Rate::new(60, 3_600 * SECOND);
        let full_at = rate.take(0, 0, 60).unwrap();
        assert_eq!(rate.take(full_at, 0, 1), Err(Some(60 * SECOND)));
        assert_eq!(rate.take(full_at, 59 * SECOND, 1), Err(Some(SECOND)));
        assert_eq!(rate.left(full_at, 60 * SECOND), 1);
        assert!(rate.take(full_at, 60 * SECOND, 1).is_ok());
        assert_eq!(rate.wait_for(full_at, 0, 10), Some(600 * SECOND));
        assert_eq!(rate.left(full_at, 7_200 * SECOND), 60);
    }

    fn bucket(full_at: u64, taken_at: u64, now: u64) -> Bucket {
        Bucket { full_at, taken_at, put_back: 0, now }
    }

    #[test]
    fn what_there_is_can_be_taken_whatever_was_asked_for() {
        let rate = Rate::new(10, SECOND);
        let (full_at, share, taken) = rate.take_up_to(Share::default(), bucket(0, 0, 5), 7);
        assert_eq!((taken, rate.left(full_at, 5)), (7, 3));
        let (full_at, share, taken) = rate.take_up_to(share, bucket(full_at, 5, 5), u64::MAX);
        assert_eq!((taken, rate.left(full_at, 5)), (3, 0));
        let (again, share, taken) = rate.take_up_to(share, bucket(full_at, 5, 5), 1);
        assert_eq!((again, taken), (full_at, 0));
        let (back, _) = rate.put_back(share, bucket(again, 5, 5), 10);
        assert_eq!(rate.left(back, 5), 10);
    }

    #[test]
    fn what_is_put_back_can_be_taken_again_but_no_more() {
        let rate = Rate::new(10, 1_000);
        let (full_at, share) = rate.take_for(Share::default(), bucket(0, 0, 0), 10).unwrap();
        // After 250 of 1,000 nanoseconds two rows and a half were refilled.
        let (back, _) = rate.put_back(share, bucket(full_at, 0, 250), 10);
        assert_eq!(rate.left(back, 250), 10);
        let again = rate.take(back, 250, 10).unwrap();
        assert_eq!(rate.left(again, 250), 0);
    }

    #[test]
    fn one_row_long_before_many_costs_nothing_when_all_are_put_back() {
        let rate = Rate::new(100, 10 * SECOND);
        let (full_at, share) = rate.take_for(Share::default(), bucket(0, 0, 0), 1).unwrap();
        let (full_at, share) = rate.take_for(share, bucket(full_at, 0, 8 * SECOND), 80).unwrap();
        let (back, _) = rate.put_back(share, bucket(full_at, 8 * SECOND, 8 * SECOND), 81);
        assert_eq!(rate.left(back, 8 * SECOND), 100);
    }

    #[test]
    fn what_others_took_stays_taken() {
        let rate = Rate::new(100, 10 * SECOND);
        let (full_at, share) = rate.take_for(Share::default(), bucket(0, 0, 0), 50).unwrap();
        let others = rate.take(full_at, SECOND / 10, 40).unwrap();
        let (back, _) = rate.put_back(share, bucket(others, SECOND / 10, 4 * SECOND), 50);
        assert_eq!(rate.left(back, 4 * SECOND), 99);
        // The bucket was full again when others took all of it.
        let (full_at, share) = rate.take_for(Share::default(), bucket(0, 0, 0), 100).unwrap();
        let others = rate.take(full_at, 10 * SECOND, 100).unwrap();
        let (back, _) = rate.put_back(share, bucket(others, 10 * SECOND, 10 * SECOND), 100);
        assert_eq!(rate.left(back, 10 * SECOND), 0);
    }

    /// What a session does next: waits, takes rows, and perhaps ends its transaction.
    type Step = (u64, usize, u64, Option<bool>);

    /// A bucket that several sessions take from. All takes are remembered, with who took and whether it stays.
    struct Simulation {
        rate: Rate,
        now: u64,
        full_at: u64,
        taken_at: u64,
        put_back: u64,
        shares: [(Share, u64); 3],
        takes: Vec<(u64, usize, u64)>,
    }

    impl Simulation {
        fn found(&self) -> Bucket {
            Bucket { full_at: self.full_at, taken_at: self.taken_at, put_back: self.put_back, now: self.now }
        }

        fn step(&mut self, (pause, session, rows, ends): Step) {
            self.now += pause;
            let found = self.found();
            let (share, held) = self.shares[session];
            if let Ok((full_at, share)) = self.rate.take_for(share, found, rows) {
                (self.full_at, self.taken_at) = (full_at, self.now);
                self.shares[session] = (share, held + rows);
                self.takes.push((self.now, session, rows));
            }
            let Some(commits) = ends else { return };
            let (share, held) = core::mem::take(&mut self.shares[session]);
            if !commits {
                let found = self.found();
                let full_at = self.rate.put_back(share, found, held).0;
                self.put_back += self.full_at - full_at;
                self.full_at = full_at;
                self.takes.retain(|(_, of, _)| *of != session);
            }
            // What committed is nobody's any more.
            self.takes.iter_mut().filter(|(_, of, _)| *of == session).for_each(|(_, of, _)| *of = usize::MAX);
        }

        /// When the bucket would be full if what was taken back had never been taken.
        fn truth(&self) -> u64 {
            self.takes.iter().fold(0, |full_at, (at, _, rows)| full_at.max(*at) + rows * self.rate.cost)
        }
    }

    fn steps(sessions: usize) -> impl Strategy<Value = Vec<Step>> {
        let ends = prop_oneof![2 => Just(None), 1 => Just(Some(true)), 2 => Just(Some(false))];
        prop::collection::vec((0u64..2_000, 0..sessions, 1u64..40, ends), 1..60)
    }

    fn simulation(rows: u64, interval: u64) -> Simulation {
        let shares = [(Share::default(), 0); 3];
        Simulation {
            rate: Rate::new(rows, interval),
            now: 0,
            full_at: 0,
            taken_at: 0,
            put_back: 0,
            shares,
            takes: Vec::new(),
        }
    }

    proptest! {
        #[test]
        fn of_one_transaction_all_comes_back(
            rows in 1u64..200,
            interval in 1u64..100_000,
            steps in steps(1),
        ) {
            let mut simulation = simulation(rows, interval);
            for step in steps {
                simulation.step(step);
                prop_assert_eq!(simulation.full_at.max(simulation.now), simulation.truth().max(simulation.now));
            }
        }

        #[test]
        fn never_too_much_comes_back(
            rows in 1u64..200,
            interval in 1u64..100_000,
            steps in steps(3),
        ) {
            let mut simulation = simulation(rows, interval);
            for step in steps {
                simulation.step(step);
                prop_assert!(simulation.full_at.max(simulation.now) >= simulation.truth().max(simulation.now));
            }
        }

        #[test]
        fn never_more_than_a_burst_and_what_was_refilled(
            rows in 1u64..200,
            interval in 1u64..100_000,
            steps in prop::collection::vec((0u64..2_000, 1u64..40, any::<bool>()), 1..60),
        ) {
            let rate = Rate::new(rows, interval);
            let (mut now, mut full_at, mut taken) = (0, 0, 0);
            for (pause, wanted, undone) in steps {
                now += pause;
                if let Ok((then, share)) = rate.take_for(Share::default(), bucket(full_at, now, now), wanted) {
                    full_at = then;
                    if undone {
                        full_at = rate.put_back(share, bucket(full_at, now, now), wanted).0;
                    } else {
                        taken += wanted;
                    }
                }
                prop_assert!(taken <= rows + now / rate.cost);
            }
        }
    }
}

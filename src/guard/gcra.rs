//! A rate as a bucket that is refilled evenly: the generic cell rate algorithm.
//!
//! Pure. All that is stored of a bucket is the time at which it is full again; nanoseconds of a clock that only goes
//! forward. A full bucket holds as many rows as the rate allows per interval.

/// How many rows per interval, and what one row costs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate {
    rows: u64,
    /// Nanoseconds in which one row is refilled; rounded up, so that never more than the rate comes back.
    cost: u64,
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

    /// Takes as many of `rows` as there are. Gives when the bucket is full then, and how many were taken.
    pub fn take_up_to(self, full_at: u64, now: u64, rows: u64) -> (u64, u64) {
        let taken = rows.min(self.left(full_at, now));
        (full_at.max(now).saturating_add(taken.saturating_mul(self.cost)), taken)
    }

    /// Puts rows back that were taken at `taken_at`. What was refilled of them since is in the bucket already; where it
    /// was refilled for others' rows, too little comes back rather than too much.
    pub fn put_back(self, full_at: u64, now: u64, rows: u64, taken_at: u64) -> u64 {
        let credit = rows.saturating_mul(self.cost).saturating_sub(now.saturating_sub(taken_at));
        full_at.saturating_sub(credit)
    }

    /// Rows that are in the bucket.
    pub fn left(self, full_at: u64, now: u64) -> u64 {
        self.capacity().saturating_sub(full_at.saturating_sub(now)) / self.cost
    }

    /// Nanoseconds until a bucket that is full at `full_at` holds so many rows; none when it never does.
    pub fn wait_for(self, full_at: u64, now: u64, rows: u64) -> Option<u64> {
        self.take(full_at, now, rows).err().unwrap_or(Some(0))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SECOND: u64 = 1_000_000_000;

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

    #[test]
    fn what_there_is_can_be_taken_whatever_was_asked_for() {
        let rate = Rate::new(10, SECOND);
        let (full_at, taken) = rate.take_up_to(0, 5, 7);
        assert_eq!((taken, rate.left(full_at, 5)), (7, 3));
        let (full_at, taken) = rate.take_up_to(full_at, 5, u64::MAX);
        assert_eq!((taken, rate.left(full_at, 5)), (3, 0));
        assert_eq!(rate.take_up_to(full_at, 5, 1), (full_at, 0));
    }

    #[test]
    fn what_is_put_back_can_be_taken_again_but_no_more() {
        let rate = Rate::new(10, 1_000);
        let full_at = rate.take(0, 0, 10).unwrap();
        // After 250 of 1,000 nanoseconds two rows and a half were refilled.
        let back = rate.put_back(full_at, 250, 10, 0);
        assert_eq!(rate.left(back, 250), 10);
        let again = rate.take(back, 250, 10).unwrap();
        assert_eq!(rate.left(again, 250), 0);
    }

    proptest! {
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
                if let Ok(then) = rate.take(full_at, now, wanted) {
                    full_at = then;
                    if undone {
                        full_at = rate.put_back(full_at, now, wanted, now);
                    } else {
                        taken += wanted;
                    }
                }
                prop_assert!(taken <= rows + now / rate.cost);
            }
        }
    }
}

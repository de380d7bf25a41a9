//! From what was seen to a limit: high enough for all but one in a thousand of the statements, times some headroom.
//!
//! Pure. On little data it says so instead of guessing.

use std::hash::{Hash, Hasher};

use rustc_hash::FxHasher;

use super::histogram::{BUCKETS, bucket_of};

/// Fewer statements say nothing about what is usual.
pub const FEWEST_STATEMENTS: u64 = 100;
/// One in so many statements may be an exception.
const USUAL: u64 = 1_000;
/// No limit is proposed below this.
const SMALLEST_LIMIT: u64 = 10;

/// A limit that fits what was seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Suggestion {
    /// Rows per statement.
    pub max_rows: u64,
    /// Statements that it would have refused; where the buckets do not show it, at most so many.
    pub refused: u64,
}

/// A limit for statements with that histogram, of which the largest changed `largest` rows; none where too little was
/// seen. `headroom` is at least one.
pub fn suggest(statements: &[u64; BUCKETS], largest: u64, headroom: f64) -> Option<Suggestion> {
    let total: u64 = statements.iter().sum();
    if total < FEWEST_STATEMENTS {
        return None;
    }
    let exceptions = total / USUAL;
    let mut above = total;
    let usual = statements.iter().position(|in_bucket| {
        above -= in_bucket;
        above <= exceptions
    })?;
    let most = upper_end(usual).min(largest.max(1));
    let max_rows = round_up((most as f64 * headroom).min(i64::MAX as f64) as u64).max(SMALLEST_LIMIT);
    let is_above = |bucket: &usize| upper_end(*bucket).min(largest) > max_rows;
    let refused = (0..BUCKETS).filter(is_above).filter_map(|bucket| statements.get(bucket)).sum();
    Some(Suggestion { max_rows, refused })
}

/// The most rows of a statement in a bucket.
fn upper_end(bucket: usize) -> u64 {
    if bucket + 1 >= BUCKETS { u64::MAX } else { (1 << (bucket + 1)) - 1 }
}

/// The next number with no more than two digits before its zeros.
fn round_up(rows: u64) -> u64 {
    let unit = 10u64.pow(rows.max(1).ilog10().saturating_sub(1));
    rows.div_ceil(unit).saturating_mul(unit)
}

/// Most bytes of a policy's name.
const LONGEST_NAME: usize = 255;

/// A name for a policy, the same whenever it is suggested again.
pub fn policy_name(relation: &str, operation: &str, role: &str) -> String {
    let name = format!("{relation} {operation} {role}");
    if name.len() <= LONGEST_NAME {
        return name;
    }
    let mut hasher = FxHasher::default();
    name.hash(&mut hasher);
    let end = format!(" {:016x}", hasher.finish());
    let room = (0..=LONGEST_NAME - end.len()).rev().find(|at| name.is_char_boundary(*at)).unwrap_or(0);
    name[..room].to_owned() + &end
}

/// Letters for more and more statements, the first one for none.
const BLOCKS: [char; 9] = [' ', '▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
const ASCII: [char; 9] = [' ', '.', ':', '-', '=', '+', '*', '#', '@'];

/// The histogram as one line: a letter for each bucket, from one row upwards, on a logarithmic scale; a bar stands where
/// the limit is.
pub fn chart(statements: &[u64], limit: Option<u64>, ascii: bool) -> String {
    let letters = if ascii { ASCII } else { BLOCKS };
    let most = statements.iter().copied().max().unwrap_or(0);
    let height = |in_bucket: u64| {
        if in_bucket == 0 {
            return 0;
        }
        let share = (in_bucket as f64 + 1.0).ln() / (most as f64 + 1.0).ln();
        ((share * 8.0).round() as usize).clamp(1, 8)
    };
    let limit = limit.map(bucket_of);
    let mut line = String::new();
    for (bucket, in_bucket) in statements.iter().enumerate() {
        line.push(letters[height(*in_bucket)]);
        if limit == Some(bucket) {
            line.push('|');
        }
    }
    if let Some(limit) = limit.filter(|limit| *limit >= statements.len()) {
        line.extend(std::iter::repeat_n(' ', limit + 1 - statements.len()));
        line.push('|');
    }
    line
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn histogram(rows: &[(u64, u64)]) -> ([u64; BUCKETS], u64) {
        let mut statements = [0; BUCKETS];
        let mut largest = 0;
        for (rows, count) in rows {
            statements[bucket_of(*rows)] += count;
            largest = largest.max(*rows);
        }
        (statements, largest)
    }

    #[test]
    fn a_bucket_ends_where_the_next_one_begins() {
        for bucket in 0..BUCKETS - 1 {
            assert_eq!(bucket_of(upper_end(bucket)), bucket);
            assert_eq!(bucket_of(upper_end(bucket) + 1), bucket + 1);
        }
    }

    #[test]
    fn little_data_gives_no_limit() {
        let (statements, largest) = histogram(&[(1, 50), (1_000_000, 49)]);
        assert_eq!(suggest(&statements, largest, 2.0), None);
        assert_eq!(suggest(&[0; BUCKETS], 0, 2.0), None);
    }

    #[test]
    fn what_is_usual_passes_and_the_exception_does_not() {
        let (statements, largest) = histogram(&[(1, 9_000), (100, 1_000), (1_000_000, 3)]);
        // Between 64 and 127 rows, times two, rounded up.
        assert_eq!(suggest(&statements, largest, 2.0), Some(Suggestion { max_rows: 260, refused: 3 }));
        // Of so few statements none is an exception.
        let (statements, largest) = histogram(&[(1, 99), (640, 1)]);
        assert_eq!(suggest(&statements, largest, 2.0), Some(Suggestion { max_rows: 1300, refused: 0 }));
        let (statements, largest) = histogram(&[(1, 5_000)]);
        assert_eq!(suggest(&statements, largest, 2.0), Some(Suggestion { max_rows: 10, refused: 0 }));
    }

    #[test]
    fn numbers_are_rounded_up_to_two_digits() {
        for (rows, rounded) in
            [(1, 1), (9, 9), (10, 10), (99, 99), (101, 110), (254, 260), (1_000, 1_000), (1_001, 1_100)]
        {
            assert_eq!(round_up(rows), rounded);
        }
    }

    #[test]
    fn names_of_policies_fit_and_stay_apart() {
        assert_eq!(policy_name("public.t", "update", "app"), "public.t update app");
        let (long, other) = ("é".repeat(200), "é".repeat(201));
        assert!(policy_name(&long, "update", "app").len() <= LONGEST_NAME);
        assert_ne!(policy_name(&long, "update", "app"), policy_name(&other, "update", "app"));
    }

    #[test]
    fn a_chart_shows_all_buckets_and_the_limit() {
        assert_eq!(chart(&[1000, 100, 0, 1], Some(3), false), "█▅| ▁");
        assert_eq!(chart(&[1000, 100, 0, 1], Some(3), true), "@+| .");
        assert_eq!(chart(&[10], Some(10), true), "@   |");
        assert_eq!(chart(&[], None, true), "");
    }

    proptest! {
        #[test]
        fn never_refuses_more_than_one_in_a_thousand(
            rows in prop::collection::vec((1u64..10_000_000, 1u64..5_000), 1..20),
            headroom in 1.0f64..10.0,
        ) {
            let (statements, largest) = histogram(&rows);
            let total: u64 = statements.iter().sum();
            if let Some(suggestion) = suggest(&statements, largest, headroom) {
                prop_assert!(suggestion.refused <= total / USUAL);
                prop_assert!(suggestion.max_rows >= SMALLEST_LIMIT);
                let really: u64 = rows.iter().filter(|(rows, _)| *rows > suggestion.max_rows).map(|(_, count)| count).sum();
                prop_assert!(really <= suggestion.refused);
            } else {
                prop_assert!(total < FEWEST_STATEMENTS);
            }
        }
    }
}

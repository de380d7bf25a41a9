//! Statements by the rows that they changed, in buckets that double: 1 row, 2 to 3, 4 to 7 and so on.
//!
//! Pure.

/// Buckets; the last one has no end.
pub const BUCKETS: usize = 40;

/// The bucket of a statement with that many rows, which are at least one.
#[inline]
pub fn bucket_of(rows: u64) -> usize {
    (rows.max(1).ilog2() as usize).min(BUCKETS - 1)
}

/// The buckets as far as there is anything in them.
pub fn without_empty_end(buckets: &[u64]) -> &[u64] {
    let end = buckets.iter().rposition(|statements| *statements > 0).map_or(0, |last| last + 1);
    &buckets[..end]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_double_and_none_is_left_out() {
        for (rows, bucket) in [(0, 0), (1, 0), (2, 1), (3, 1), (4, 2), (7, 2), (8, 3), (1023, 9), (1024, 10)] {
            assert_eq!(bucket_of(rows), bucket, "{rows}");
        }
        assert_eq!(bucket_of(u64::MAX), BUCKETS - 1);
    }

    #[test]
    fn what_is_empty_at_the_end_is_cut_off() {
        assert_eq!(without_empty_end(&[0, 3, 0, 1, 0, 0]), [0, 3, 0, 1]);
        assert!(without_empty_end(&[0, 0]).is_empty());
    }
}

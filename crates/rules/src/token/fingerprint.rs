//! Which rows a statement changed, in a few bytes whatever their number: the fingerprint by which an approval is bound to the
//! rows that were reviewed.
//!
//! Pure. It is an invertible Bloom lookup table: each row is a number that nobody can choose ([`RowHasher`]), and is added to
//! one cell of each third of the table. So the order of the rows does not matter and a part can be taken away again. Two
//! fingerprints are equal where the rows are; their difference is that of the rows, and as long as that is small its cells
//! give the rows away one by one, so that it can be told how many are missing and how many are others.

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// Cells of each third.
const THIRD: usize = 32;
const THIRDS: usize = 3;

/// One row of a table as a number: 96 bits that only who knows the secret can compute, and 32 that follow from these.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RowHash(u128);

const CHECK_BITS: u32 = 32;

impl RowHash {
    /// The number of a row with these bits; the lowest 32 of them do not count.
    fn new(bits: u128) -> Self {
        let high = bits >> CHECK_BITS << CHECK_BITS;
        Self(high | Self::check(high))
    }

    fn check(high: u128) -> u128 {
        let mixed = (high ^ (high >> 67)).wrapping_mul(0x9e37_79b9_7f4a_7c15_f39c_c060_5ced_c835);
        mixed >> (u128::BITS - CHECK_BITS)
    }

    fn is_whole(self) -> bool {
        Self::new(self.0) == self
    }

    /// The row's cell in each third.
    fn places(self) -> [usize; THIRDS] {
        let mut bits = self.0 >> CHECK_BITS;
        core::array::from_fn(|third| {
            let place = third * THIRD + usize::try_from(bits % THIRD as u128).unwrap_or(0);
            bits /= THIRD as u128;
            place
        })
    }
}

/// Makes numbers of rows. Who could compute them could look for other rows with the same sums.
#[derive(Clone)]
pub struct RowHasher(Sha256);

impl RowHasher {
    /// Of rows under this secret.
    pub fn new(secret: &[u8]) -> Self {
        let mut hash = Sha256::new();
        hash.update(b"pg_writeguard rows");
        hash.update(secret);
        Self(hash)
    }

    /// The number of a row on which that was done, known by the values of its key in a fixed order.
    pub fn row<'a>(&self, operation: &str, key: impl Iterator<Item = &'a [u8]>) -> RowHash {
        let mut hash = self.0.clone();
        hash.update(operation);
        for value in key {
            // Each with its length, so that no two keys have the same bytes.
            hash.update((value.len() as u64).to_le_bytes());
            hash.update(value);
        }
        let digest = hash.finalize();
        let mut bits = [0; 16];
        bits.copy_from_slice(&digest[..16]);
        RowHash::new(u128::from_le_bytes(bits))
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Cell {
    rows: i64,
    /// Of their numbers.
    sum: u128,
}

impl Cell {
    fn add(&mut self, rows: i64, sum: u128) {
        self.rows = self.rows.wrapping_add(rows);
        self.sum = self.sum.wrapping_add(sum);
    }

    fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// The row that is missing (1) or another one (-1), where the difference has only that one here.
    fn only_row(&self, place: usize) -> Option<(i64, RowHash)> {
        let sum = match self.rows {
            1 => self.sum,
            -1 => self.sum.wrapping_neg(),
            _ => return None,
        };
        let row = RowHash(sum);
        (row.is_whole() && row.places().contains(&place)).then_some((self.rows, row))
    }
}

/// The rows that were changed of one table. A row that was changed twice is in it twice.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "Stored", into = "Stored")]
pub struct Fingerprint {
    cells: Box<[Cell; THIRD * THIRDS]>,
}

/// Its cells that are not empty: place, rows, and the sum in hexadecimal.
type Stored = Vec<(usize, i64, String)>;

impl From<Fingerprint> for Stored {
    fn from(fingerprint: Fingerprint) -> Self {
        let cells = fingerprint.cells.iter().enumerate().filter(|(_, cell)| !cell.is_empty());
        cells.map(|(place, cell)| (place, cell.rows, format!("{:x}", cell.sum))).collect()
    }
}

impl From<Stored> for Fingerprint {
    fn from(stored: Stored) -> Self {
        let mut fingerprint = Self::default();
        for (place, rows, sum) in stored {
            if let (Some(cell), Ok(sum)) = (fingerprint.cells.get_mut(place), u128::from_str_radix(&sum, 16)) {
                cell.add(rows, sum);
            }
        }
        fingerprint
    }
}

impl Default for Fingerprint {
    fn default() -> Self {
        Self { cells: Box::new([Cell::default(); THIRD * THIRDS]) }
    }
}

/// How rows differ from those that were reviewed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Difference {
    pub missing: u64,
    pub added: u64,
    /// There are more of both, and their number is not known.
    pub at_least: bool,
}

impl Fingerprint {
    /// Adds a row.
    pub fn add(&mut self, row: RowHash) {
        self.put(1, row);
    }

    fn put(&mut self, rows: i64, row: RowHash) {
        let sum = if rows < 0 { row.0.wrapping_neg() } else { row.0 };
        for place in row.places() {
            self.cells[place].add(rows, sum);
        }
    }

    /// Adds the rows of another one.
    pub fn merge(&mut self, other: &Self) {
        for (cell, other) in self.cells.iter_mut().zip(other.cells.iter()) {
            cell.add(other.rows, other.sum);
        }
    }

    /// The number of rows in it.
    pub fn rows(&self) -> u64 {
        let first = self.cells.iter().take(THIRD).map(|cell| cell.rows).fold(0, i64::wrapping_add);
        u64::try_from(first).unwrap_or(0)
    }

    /// How the rows of `now` differ from these; none: they do not.
    pub fn difference(&self, now: &Self) -> Option<Difference> {
        let mut left = self.clone();
        for (cell, now) in left.cells.iter_mut().zip(now.cells.iter()) {
            cell.add(now.rows.wrapping_neg(), now.sum.wrapping_neg());
        }
        let (mut missing, mut added) = (0, 0);
        // Each round takes a row out, of which there are not more than cells; where more seem to come, nothing is sure.
        for _ in 0..left.cells.len() {
            let found = left.cells.iter().enumerate().find_map(|(place, cell)| cell.only_row(place));
            let Some((rows, row)) = found else { break };
            left.put(-rows, row);
            *(if rows > 0 { &mut missing } else { &mut added }) += 1;
        }
        let at_least = left.cells.iter().any(|cell| !cell.is_empty());
        if at_least {
            // What was taken out of a difference that is too large may be anything; the numbers are sure.
            let (was, is) = (self.rows(), now.rows());
            (missing, added) = (was.saturating_sub(is), is.saturating_sub(was));
        }
        (at_least || missing > 0 || added > 0).then_some(Difference { missing, added, at_least })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn of(rows: &[u32]) -> Fingerprint {
        let hasher = RowHasher::new(b"secret");
        let mut all = Fingerprint::default();
        for row in rows {
            all.add(hasher.row("update", [&row.to_le_bytes()[..]].into_iter()));
        }
        all
    }

    fn sure(missing: u64, added: u64) -> Option<Difference> {
        Some(Difference { missing, added, at_least: false })
    }

    #[test]
    fn the_same_rows_are_no_difference_in_any_order() {
        assert_eq!(of(&[1, 2, 3]), of(&[3, 1, 2]));
        assert_eq!(of(&[1, 2, 3]).difference(&of(&[2, 3, 1])), None);
        assert_eq!(of(&[]).difference(&of(&[])), None);
        assert_eq!(of(&[1, 2, 3]).rows(), 3);
    }

    #[test]
    fn missing_and_other_rows_are_counted() {
        assert_eq!(of(&[1, 2, 3]).difference(&of(&[1, 2])), sure(1, 0));
        assert_eq!(of(&[1, 2, 3]).difference(&of(&[1, 2, 4])), sure(1, 1));
        assert_eq!(of(&[]).difference(&of(&[7])), sure(0, 1));
        assert_eq!(of(&[1]).difference(&of(&[1, 1])), sure(0, 1));
    }

    #[test]
    fn a_large_difference_is_one_all_the_same() {
        let (was, is): (Vec<u32>, Vec<u32>) = ((0..10_000).collect(), (5_000..15_001).collect());
        let difference = of(&was).difference(&of(&is)).unwrap();
        assert_eq!(difference, Difference { missing: 0, added: 1, at_least: true });
        // The same row twice more is no single row anywhere.
        assert!(of(&[1]).difference(&of(&[1, 1, 1])).unwrap().at_least);
    }

    #[test]
    fn operation_key_and_secret_make_another_row() {
        let hasher = RowHasher::new(b"secret");
        let row = |operation: &str, key: &[&[u8]]| hasher.row(operation, key.iter().copied());
        let one = row("update", &[b"ab", b"c"]);
        assert_ne!(one, row("delete", &[b"ab", b"c"]));
        assert_ne!(one, row("update", &[b"a", b"bc"]));
        assert_ne!(one, row("update", &[b"abc"]));
        assert_ne!(one, RowHasher::new(b"other").row("update", [&b"ab"[..], b"c"].into_iter()));
    }

    proptest! {
        #[test]
        fn a_fingerprint_is_read_as_it_was_written(rows: Vec<u32>) {
            let all = of(&rows);
            let json = serde_json::to_string(&all).unwrap();
            prop_assert_eq!(serde_json::from_str::<Fingerprint>(&json).unwrap(), all);
        }

        #[test]
        fn parts_add_up(one: Vec<u32>, other: Vec<u32>) {
            let mut parts = of(&one);
            parts.merge(&of(&other));
            prop_assert_eq!(parts, of(&[one, other].concat()));
        }

        #[test]
        fn up_to_fifty_different_rows_are_counted_exactly(
            same in prop::collection::hash_set(0..1_000_000u32, 0..500),
            missing in prop::collection::hash_set(1_000_000..2_000_000u32, 0..25),
            added in prop::collection::hash_set(2_000_000..3_000_000u32, 0..25),
        ) {
            let was: Vec<u32> = same.iter().chain(&missing).copied().collect();
            let is: Vec<u32> = added.iter().chain(&same).copied().collect();
            let difference = of(&was).difference(&of(&is));
            if missing.is_empty() && added.is_empty() {
                prop_assert_eq!(difference, None);
            } else {
                let found = difference.unwrap();
                // Once in many tries two rows share all cells.
                prop_assert!(found.at_least || found == sure(missing.len() as u64, added.len() as u64).unwrap());
            }
        }
    }
}

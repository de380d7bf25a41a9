//! What one row's images within a change come to: a row may be changed more than once by one statement, and is put back
//! once.
//!
//! Pure. Values are text as their types print it, in the database's encoding; names are bytes for the same reason.

use std::collections::BTreeMap;

/// Column names with their values; none is NULL.
pub type Values = BTreeMap<Vec<u8>, Option<Vec<u8>>>;

/// What was done to a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Done {
    Update,
    /// By DELETE or TRUNCATE.
    Delete,
    /// By an undo that put a deleted row back; nothing else's inserts are kept.
    Insert,
}

impl Done {
    /// The operation of that word.
    pub fn parse(word: &[u8]) -> Option<Self> {
        match word {
            b"update" => Some(Done::Update),
            b"delete" | b"truncate" => Some(Done::Delete),
            b"insert" => Some(Done::Insert),
            _ => None,
        }
    }
}

/// One image of a row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    pub done: Done,
    /// Of an update the primary key and the changed columns, of a delete all columns; nothing of an insert.
    pub before: Values,
    /// Of an update the same columns, of an insert all; nothing of a delete.
    pub after: Values,
}

/// What takes a row's images back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Net {
    /// The row is gone and comes back as it was.
    PutBack { row: Values },
    /// The row is there: its columns in `left` become what they are in `was`, if they are still as they were left.
    Change { was: Values, left: Values },
    /// The row was not there, and goes if it is still as it was left.
    Remove { left: Values },
    /// The row came and went.
    Nothing,
}

impl Net {
    /// What the images of one row, in their order, come to.
    pub fn of(images: impl IntoIterator<Item = Image>) -> Net {
        let mut images = images.into_iter();
        let Some(first) = images.next() else { return Net::Nothing };
        let existed = first.done != Done::Insert;
        let mut exists = first.done != Done::Delete;
        let (mut was, mut left) = (first.before, first.after);
        for Image { done, before, after } in images {
            if existed {
                before.into_iter().for_each(|(column, value)| {
                    was.entry(column).or_insert(value);
                });
            }
            exists = done != Done::Delete;
            match done {
                Done::Delete => left.clear(),
                Done::Update | Done::Insert => left.extend(after),
            }
        }
        match (existed, exists) {
            (true, true) => Net::Change { was, left },
            (true, false) => Net::PutBack { row: was },
            (false, true) => Net::Remove { left },
            (false, false) => Net::Nothing,
        }
    }

    /// The values that hold the row's key: as the change left it, or as it was where it left none.
    pub fn keyed_by(&self) -> Option<&Values> {
        match self {
            Net::PutBack { row } => Some(row),
            Net::Change { left, .. } | Net::Remove { left } => Some(left),
            Net::Nothing => None,
        }
    }

    /// The columns that this writes, with the values that they had and were left with; none of a row that is put back or
    /// removed as a whole.
    pub fn changed(&self) -> impl Iterator<Item = (&Vec<u8>, &Option<Vec<u8>>, &Option<Vec<u8>>)> {
        let both = match self {
            Net::Change { was, left } => Some((was, left)),
            _ => None,
        };
        both.into_iter().flat_map(|(was, left)| {
            was.iter().filter_map(|(column, value)| {
                let now = left.get(column)?;
                (now != value).then_some((column, value, now))
            })
        })
    }
}

/// For each image that continues a row which an earlier one left, the first image of that row. `links` are pairs of an
/// image's number and that of the one before it, in the order of the first.
pub fn roots(links: &[(i64, i64)]) -> Vec<(i64, i64)> {
    let mut roots: Vec<(i64, i64)> = Vec::with_capacity(links.len());
    for (number, previous) in links {
        let known = roots.binary_search_by_key(previous, |(number, _)| *number);
        let root = known.map_or(*previous, |place| roots[place].1);
        roots.push((*number, root));
    }
    roots
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn values(pairs: &[(&str, &str)]) -> Values {
        pairs.iter().map(|(name, value)| (name.as_bytes().to_vec(), Some(value.as_bytes().to_vec()))).collect()
    }

    fn update(before: &[(&str, &str)], after: &[(&str, &str)]) -> Image {
        Image { done: Done::Update, before: values(before), after: values(after) }
    }

    fn delete(before: &[(&str, &str)]) -> Image {
        Image { done: Done::Delete, before: values(before), after: Values::new() }
    }

    fn insert(after: &[(&str, &str)]) -> Image {
        Image { done: Done::Insert, before: Values::new(), after: values(after) }
    }

    #[test]
    fn the_first_value_was_and_the_last_is_left() {
        let net = Net::of([
            update(&[("id", "1"), ("a", "x")], &[("id", "1"), ("a", "y")]),
            update(&[("id", "1"), ("a", "y"), ("b", "1")], &[("id", "1"), ("a", "z"), ("b", "2")]),
        ]);
        let was = values(&[("id", "1"), ("a", "x"), ("b", "1")]);
        let left = values(&[("id", "1"), ("a", "z"), ("b", "2")]);
        assert_eq!(net, Net::Change { was, left });
        let changed: Vec<_> = net.changed().map(|(column, ..)| column.as_slice()).collect();
        assert_eq!(changed, [b"a", b"b"]);
    }

    #[test]
    fn an_updated_and_deleted_row_comes_back_as_it_was_first() {
        let net = Net::of([
            update(&[("id", "1"), ("a", "x")], &[("id", "2"), ("a", "y")]),
            delete(&[("id", "2"), ("a", "y"), ("b", "3")]),
        ]);
        assert_eq!(net, Net::PutBack { row: values(&[("id", "1"), ("a", "x"), ("b", "3")]) });
    }

    #[test]
    fn rows_that_an_undo_put_back_are_removed() {
        assert_eq!(Net::of([insert(&[("id", "1")])]), Net::Remove { left: values(&[("id", "1")]) });
        assert_eq!(Net::of([insert(&[("id", "1")]), delete(&[("id", "1")])]), Net::Nothing);
        let net = Net::of([
            insert(&[("id", "1"), ("a", "x")]),
            update(&[("id", "1"), ("a", "x")], &[("id", "1"), ("a", "y")]),
        ]);
        assert_eq!(net, Net::Remove { left: values(&[("id", "1"), ("a", "y")]) });
        let net = Net::of([delete(&[("id", "1"), ("a", "x")]), insert(&[("id", "1"), ("a", "y")])]);
        let change = Net::Change { was: values(&[("id", "1"), ("a", "x")]), left: values(&[("id", "1"), ("a", "y")]) };
        assert_eq!(net, change);
    }

    #[test]
    fn chains_end_at_their_first_image() {
        assert_eq!(roots(&[(2, 1), (5, 2), (6, 4), (9, 5)]), [(2, 1), (5, 1), (6, 4), (9, 1)]);
        assert_eq!(roots(&[]), []);
    }

    proptest! {
        /// A row that goes through any updates, and perhaps a delete, comes back to where it began.
        #[test]
        fn taking_back_is_exact(
            first in prop::collection::vec(0u8..3, 4),
            steps in prop::collection::vec(prop::collection::vec(prop::option::of(0u8..3), 4), 1..6),
            deleted in any::<bool>(),
        ) {
            let name = |column: usize| vec![b'a' + u8::try_from(column).unwrap()];
            let all = |row: &[u8]| -> Values {
                row.iter().enumerate().map(|(column, value)| (name(column), Some(vec![*value]))).collect()
            };
            let mut row = first.clone();
            let mut images = Vec::new();
            for step in &steps {
                let (mut before, mut after) = (Values::new(), Values::new());
                for (column, value) in step.iter().enumerate() {
                    // The first column is the key and in every image.
                    let value = value.unwrap_or(row[column]);
                    if column == 0 || value != row[column] {
                        before.insert(name(column), Some(vec![row[column]]));
                        after.insert(name(column), Some(vec![value]));
                    }
                    row[column] = value;
                }
                images.push(Image { done: Done::Update, before, after });
            }
            if deleted {
                images.push(Image { done: Done::Delete, before: all(&row), after: Values::new() });
            }
            match Net::of(images) {
                Net::PutBack { row: back } => {
                    prop_assert!(deleted);
                    prop_assert_eq!(back, all(&first));
                }
                Net::Change { was, left } => {
                    prop_assert!(!deleted);
                    let mut back = all(&row);
                    for (column, value) in &left {
                        prop_assert_eq!(&back[column], value);
                    }
                    back.extend(was);
                    prop_assert_eq!(back, all(&first));
                }
                other => prop_assert!(false, "{:?}", other),
            }
        }
    }
}

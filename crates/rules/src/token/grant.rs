//! What an accepted token opens: bounds on the rows of one statement.

use std::collections::{BTreeMap, BTreeSet};

use super::fingerprint::{Difference, Fingerprint};

/// Who gave it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// The request that was approved, in this database.
    Request(i64),
    /// Somebody outside, who signed it.
    Outside { key: String, jti: String },
}

impl Source {
    /// The request, where there is one.
    pub fn request(&self) -> Option<i64> {
        match self {
            Source::Request(id) => Some(*id),
            Source::Outside { .. } => None,
        }
    }

    /// What an event says of a token that belongs to no request.
    pub fn reason(&self) -> Option<String> {
        match self {
            Source::Request(_) => None,
            Source::Outside { key, jti } => Some(format!("token \"{jti}\", signed with trusted key \"{key}\"")),
        }
    }
}

/// What an accepted token opens, for the one statement it is bound to.
#[derive(Debug, Clone)]
pub struct Grant {
    pub source: Source,
    /// Reviewed rows by qualified table name; a table that is not here may not be touched past a limit. None: any table.
    pub rows: Option<BTreeMap<String, u64>>,
    /// The approver's own maximum over all these tables; it then takes the place of the reviewed numbers.
    pub max_rows: Option<u64>,
    /// Which rows were reviewed, by qualified table name; a table that is not here is bound by its number of rows alone.
    pub fingerprints: BTreeMap<String, Fingerprint>,
    /// OIDs of the relations that the reviewed run met; none where they are not known.
    pub relations: Option<BTreeSet<u32>>,
    /// One of them has a trigger that can be deferred: rows may be missing until the transaction ends.
    pub fires_late: bool,
}

/// How the rows that were changed of a table are others than those that were reviewed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Others {
    Rows(Difference),
    /// Not all of them were seen one by one.
    Unseen,
}

/// Where a statement goes past what a token opens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Excess {
    /// A table that was not reviewed.
    Table(String),
    /// More than so many rows of a table, or of these tables together.
    Rows { tables: String, allowed: u64 },
}

impl Grant {
    /// The rows that were reviewed of a table; none where it was not.
    pub fn reviewed(&self, table: &str) -> Option<u64> {
        self.rows.as_ref().map_or(Some(u64::MAX), |rows| rows.get(table).copied())
    }

    /// Whether a number of rows is not all that a statement is compared by.
    pub fn binds_more_than_numbers(&self) -> bool {
        self.binds_rows() || self.relations.is_some()
    }

    /// Whether it is bound to rows, and not to their number alone. An approver's own maximum is for whichever rows they are.
    pub fn binds_rows(&self) -> bool {
        self.max_rows.is_none() && !self.fingerprints.is_empty()
    }

    /// The first table of which other rows were changed than reviewed. `changed` gives the fingerprint of those of a table,
    /// none where not all were seen.
    pub fn others<'a>(&self, changed: impl Fn(&str) -> Option<&'a Fingerprint>) -> Option<(&str, Others)> {
        let fingerprints = self.binds_rows().then_some(&self.fingerprints)?;
        fingerprints.iter().find_map(|(name, reviewed)| {
            let others = match changed(name) {
                None => Others::Unseen,
                Some(now) => Others::Rows(reviewed.difference(now)?),
            };
            Some((name.as_str(), others))
        })
    }

    /// The first table with more rows than reviewed; with the approver's own maximum, all tables together.
    pub fn exceeded(&self, rows: &[(String, u64)]) -> Option<Excess> {
        if let Some((name, _)) = rows.iter().find(|(name, rows)| *rows > 0 && self.reviewed(name).is_none()) {
            return Some(Excess::Table(name.clone()));
        }
        if let Some(max_rows) = self.max_rows {
            let total: u64 = rows.iter().map(|(_, rows)| rows).sum();
            let all = || rows.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>().join(", ");
            return (total > max_rows).then(|| Excess::Rows { tables: all(), allowed: max_rows });
        }
        rows.iter().find_map(|(name, rows)| {
            let reviewed = self.reviewed(name).unwrap_or(0);
            (*rows > reviewed).then(|| Excess::Rows { tables: name.clone(), allowed: reviewed })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(rows: &[(&str, u64)]) -> Vec<(String, u64)> {
        rows.iter().map(|(name, rows)| ((*name).to_owned(), *rows)).collect()
    }

    fn grant(tables: Option<&[(&str, u64)]>, max_rows: Option<u64>) -> Grant {
        let tables = tables.map(|tables| rows(tables).into_iter().collect());
        Grant {
            source: Source::Request(1),
            rows: tables,
            max_rows,
            fingerprints: BTreeMap::new(),
            relations: None,
            fires_late: false,
        }
    }

    fn more(tables: &str, allowed: u64) -> Excess {
        Excess::Rows { tables: tables.into(), allowed }
    }

    #[test]
    fn each_table_is_bounded_by_what_was_reviewed() {
        let grant = grant(Some(&[("a", 2), ("b", 3)]), None);
        assert_eq!(grant.exceeded(&rows(&[("a", 2), ("b", 3)])), None);
        assert_eq!(grant.exceeded(&rows(&[("a", 2), ("b", 4)])), Some(more("b", 3)));
        assert_eq!(grant.exceeded(&rows(&[("c", 1)])), Some(Excess::Table("c".into())));
        assert_eq!(grant.exceeded(&rows(&[("c", 0)])), None);
    }

    #[test]
    fn a_maximum_is_of_all_tables_together() {
        let named = grant(Some(&[("a", 2), ("b", 2)]), Some(10));
        assert_eq!(named.exceeded(&rows(&[("a", 5), ("b", 5)])), None);
        assert_eq!(named.exceeded(&rows(&[("a", 5), ("b", 6)])), Some(more("a, b", 10)));
        assert_eq!(named.exceeded(&rows(&[("a", 5), ("c", 1)])), Some(Excess::Table("c".into())));
        let any = grant(None, Some(10));
        assert_eq!(any.exceeded(&rows(&[("a", 5), ("c", 5)])), None);
        assert_eq!(any.exceeded(&rows(&[("a", 5), ("c", 6)])), Some(more("a, c", 10)));
    }
}

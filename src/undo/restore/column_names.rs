//! Which columns of a table the names in kept images mean.

use std::collections::{BTreeMap, BTreeSet};

use rules::error::Error;
use rules::net_change::Values;
use serde::Deserialize;

use super::table_definition::{Shape, quote};
use crate::pg::encoding::{from_server, to_server};

/// What a change says of the columns that it has images of.
#[derive(Debug, Default, Deserialize)]
pub struct Known {
    /// Their numbers by their names in images; without them a name means the column that has it now.
    columns: Option<BTreeMap<String, i16>>,
    /// The numbers of the primary key's columns.
    key: Option<Vec<i16>>,
    /// By name, what the row types in it were made of.
    forms: Option<BTreeMap<String, String>>,
}

/// Columns by the names that they had when the images were made.
pub struct Naming {
    /// Place of the column among the shape's; none: it was dropped since.
    known: BTreeMap<Vec<u8>, Option<usize>>,
    /// The names of the shape's columns; none: the column was added since.
    names: Vec<Option<Vec<u8>>>,
    change: i64,
    table: String,
    /// Names of dropped columns that images have values of.
    lost: BTreeSet<String>,
    /// Names of columns with row types that are made of something else by now.
    remade: BTreeSet<Vec<u8>>,
    /// The rows were kept by another key.
    other_key: bool,
}

impl Naming {
    /// Of a table as it is now, with what a change says of it.
    pub fn new(change: i64, shape: &Shape, was: &Known) -> Self {
        let place = |number: i16| shape.columns.iter().position(|column| column.number == number);
        let known: BTreeMap<Vec<u8>, Option<usize>> = match &was.columns {
            Some(numbers) => numbers.iter().map(|(name, number)| (to_server(name), place(*number))).collect(),
            None => shape.columns.iter().map(|column| (to_server(&column.name), place(column.number))).collect(),
        };
        let mut names = vec![None; shape.columns.len()];
        for (name, place) in &known {
            if let Some(place) = place {
                names[*place] = Some(name.clone());
            }
        }
        let is_made_of = |place: &usize, digest: &String| {
            let parts = shape.columns.get(*place).and_then(|column| column.parts.as_ref());
            parts.is_some_and(|parts| parts.digest == *digest)
        };
        let remade = was.forms.iter().flatten().map(|(name, digest)| (to_server(name), digest));
        let remade = remade.filter(|(name, digest)| {
            known.get(name).copied().flatten().is_some_and(|place| !is_made_of(&place, digest))
        });
        let remade = remade.map(|(name, _)| name).collect();
        let mut key: Vec<i16> = shape.key.iter().map(|key| key.number).collect();
        key.sort_unstable();
        let other_key = was.key.clone().is_some_and(|mut was| {
            was.sort_unstable();
            was != key
        });
        Self { known, names, change, table: shape.name().to_sql(), lost: BTreeSet::new(), remade, other_key }
    }

    /// The name in images of the column at that place; none: it was added since.
    pub fn name(&self, place: usize) -> Option<&[u8]> {
        self.names.get(place)?.as_deref()
    }

    /// The place of the column that a name in an image means; none: it was dropped since.
    pub fn place(&self, name: &[u8]) -> Option<usize> {
        self.known.get(name).copied().flatten()
    }

    /// The names in images of the primary key's columns.
    ///
    /// # Errors
    /// WG007 where the table has no primary key, or another one than at the change.
    pub fn key<'a>(&'a self, shape: &Shape) -> Result<Vec<&'a [u8]>, Error> {
        if self.other_key {
            return Err(self.other_key());
        }
        let names: Option<Vec<&[u8]>> = shape
            .key
            .iter()
            .map(|key| self.name(shape.columns.iter().position(|column| column.number == key.number)?))
            .collect();
        names.filter(|names| !names.is_empty()).ok_or_else(|| self.other_key())
    }

    /// The table's primary key is not the one that rows were kept by.
    pub fn other_key(&self) -> Error {
        Error::Invalid {
            message: format!(
                "the primary key of table \"{}\" is not what it was at change {}",
                self.table, self.change
            ),
            detail: Some("Rows are found again by their primary key.".into()),
            hint: format!("ALTER TABLE {} ADD PRIMARY KEY (…); as it was", self.table),
        }
    }

    /// Looks at the names in an image: dropped columns are noted.
    ///
    /// # Errors
    /// WG007 for a name that no column has, and for a column whose values meant something else then.
    pub fn check(&mut self, values: &Values) -> Result<(), Error> {
        for name in values.keys() {
            if self.remade.contains(name) {
                return Err(Error::Invalid {
                    message: format!(
                        "the type of column {} of table \"{}\" is not what it was at change {}",
                        quote(&from_server(name)),
                        self.table,
                        self.change
                    ),
                    detail: Some("A row type in it has got or lost a column, or one of another type.".into()),
                    hint: format!("SELECT before FROM writeguard.image WHERE change = {};", self.change),
                });
            }
            match self.known.get(name) {
                Some(Some(_)) => {}
                Some(None) => {
                    self.lost.insert(from_server(name));
                }
                None => {
                    let name = quote(&from_server(name));
                    return Err(Error::Invalid {
                        message: format!("table \"{}\" has no column {name} any more", self.table),
                        detail: Some("Rows are kept by their columns' names.".into()),
                        hint: format!(
                            "ALTER TABLE {} RENAME COLUMN … TO {name}; and then again: SELECT * FROM \
                             writeguard.undo({});",
                            self.table, self.change
                        ),
                    });
                }
            }
        }
        Ok(())
    }

    /// What of the kept rows has no place any more, as a sentence.
    pub fn notice(&self) -> Option<String> {
        let lost: Vec<String> = self.lost.iter().map(|name| quote(name)).collect();
        let columns = if lost.len() == 1 { "column" } else { "columns" };
        (!lost.is_empty()).then(|| {
            format!(
                "{columns} {} of table \"{}\" dropped since change {}: left out",
                lost.join(", "),
                self.table,
                self.change
            )
        })
    }
}

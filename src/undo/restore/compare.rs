//! The values of one table in kept images, by the columns that the table has now.

use pgrx::pg_sys;
use rules::error::Error;
use rules::net_change::{Net, Values};

use super::as_caller::check_interrupts;
use super::column_names::Naming;
use super::table_definition::{Column, KeyColumn, Shape};
use super::text;
use crate::pg::encoding::from_server;
use crate::pg::ereport::Failure;

/// A column of a changed row: its place, the value before and the value after.
pub type Changed<'n> = (usize, &'n Option<Vec<u8>>, &'n Option<Vec<u8>>);

/// Columns of a row as it is now, by their places.
pub type Found = Vec<(usize, Option<pg_sys::Datum>)>;

/// One table and what the names in a change's images of it mean.
pub struct Comparison<'a> {
    pub change: i64,
    pub shape: &'a Shape,
    pub naming: Naming,
    /// What one row needs.
    pub memory: pg_sys::MemoryContext,
}

impl Comparison<'_> {
    /// The place of a column of the primary key.
    pub fn place(&self, key: &KeyColumn) -> usize {
        self.shape.columns.iter().position(|column| column.number == key.number).unwrap_or(usize::MAX)
    }

    /// The column at a place.
    ///
    /// # Errors
    /// WG008 where there is none.
    pub fn column(&self, place: usize) -> Result<&Column, Error> {
        self.shape.columns.get(place).ok_or_else(|| self.shape.changes(self.change))
    }

    /// The changed columns of a row that are still there and are written: place, value before, value after.
    pub fn changed<'n>(&self, net: &'n Net) -> Vec<Changed<'n>> {
        net.changed()
            .filter_map(|(name, was, left)| Some((self.naming.place(name)?, was, left)))
            .filter(|(place, ..)| !self.shape.columns[*place].generated)
            .collect()
    }

    /// A value of a column from an image.
    ///
    /// # Errors
    /// WG007 where the column's type has changed and does not take it; otherwise what reading it raises.
    pub fn read(&self, place: usize, value: Option<&[u8]>) -> Result<Option<pg_sys::Datum>, Failure> {
        let column = self.column(place)?;
        text::read(column, value).map_err(|failure| match &failure {
            Failure::Foreign(error) => match error.about_a_value().map(|message| from_server(message.to_bytes())) {
                Some(message) => Failure::Ours(Error::Invalid {
                    message: format!(
                        "column {} of table \"{}\" does not take a value that it had before change {}",
                        column.sql(),
                        self.shape.name(),
                        self.change
                    ),
                    detail: Some(format!("Its type has changed since: {message}.")),
                    hint: format!(
                        "ALTER TABLE {} ALTER COLUMN {} TYPE …; (to one that takes it)",
                        self.shape.target(),
                        column.sql()
                    ),
                }),
                None => failure,
            },
            _ => failure,
        })
    }

    /// The values of the primary key in an image.
    ///
    /// # Errors
    /// WG007 where they are not in it.
    pub fn key(&self, values: &Values) -> Result<Vec<Option<pg_sys::Datum>>, Failure> {
        let mut key = Vec::with_capacity(self.shape.key.len());
        for part in &self.shape.key {
            let place = self.place(part);
            let value = self.naming.name(place).and_then(|name| values.get(name));
            let Some(Some(value)) = value else { return Err(self.naming.other_key().into()) };
            key.push(self.read(place, Some(value))?);
        }
        Ok(key)
    }

    /// The key of a row for a message.
    pub fn tell_key(&self, net: &Net) -> Option<String> {
        let values = net.keyed_by()?;
        let names = self.naming.key(self.shape).ok()?;
        let value = |name: &&[u8]| values.get(*name).cloned().flatten().map(|value| from_server(&value));
        let values: Option<Vec<String>> = names.iter().map(value).collect();
        let columns: Vec<String> = self.shape.key_columns().map(|column| column.name.clone()).collect();
        Some(format!("({})=({})", columns.join(", "), values?.join(", ")))
    }

    /// Whether a column has the value that the change left. By its text, which needs no operator; where the column prints
    /// otherwise than it did, the old text may still mean the same.
    ///
    /// # Errors
    /// What printing raises, and as for [`Comparison::read`].
    pub fn is_still(&self, place: usize, now: Option<pg_sys::Datum>, left: Option<&[u8]>) -> Result<bool, Failure> {
        let (Some(now), Some(left)) = (now, left) else { return Ok(now.is_none() && left.is_none()) };
        let column = self.column(place)?;
        let now = text::print(column, now)?;
        if now == left {
            return Ok(true);
        }
        let left = self.read(place, Some(left))?;
        Ok(left.map(|left| text::print(column, left)).transpose()?.is_some_and(|left| left == now))
    }

    /// What is allocated from here on goes with [`Comparison::leave_row`].
    ///
    /// # Errors
    /// A cancel or a timeout.
    pub fn enter_row(&self) -> Result<pg_sys::MemoryContext, Failure> {
        check_interrupts()?;
        // SAFETY: a context of ours.
        unsafe { Ok(pg_sys::MemoryContextSwitchTo(self.memory)) }
    }

    /// Back to the memory context that was current before.
    pub fn leave_row(&self, to: pg_sys::MemoryContext) {
        // SAFETY: as above; set-aside rows are copies.
        unsafe {
            pg_sys::MemoryContextSwitchTo(to);
            pg_sys::MemoryContextReset(self.memory);
        }
    }
}

//! One table's part of a change, held against the rows as they are now: which of them can be taken back, with what, and
//! which were changed again since.

use pgrx::{IntoDatum, pg_sys};
use rules::net_change::{Done, Image, Net};
use rustc_hash::FxHashSet;

use super::as_caller::{Connection, Cursor};
use super::compare::{Comparison, Found};
use super::conflict_row::{self, Told};
use super::images::Images;
use super::plan::{CHANGE, PUT_BACK, REMOVE, ROWS, Standing};
use super::rows::{Rows, Typed};
use super::table_definition::Column;
use super::text::{self, Fixed};
use crate::pg::ereport::{Failure, tell};
use crate::undo::change_record::{Change, Table};

/// What to do besides comparing.
pub enum Purpose<'a> {
    /// Lock the rows, and set aside what is to be written.
    Write,
    /// Tell of each conflict, and of the rows of these numbers, which cannot be written.
    Tell(&'a mut dyn FnMut(Told), &'a FxHashSet<i64>),
}

/// What the first pass over the images finds.
#[derive(Default)]
struct Survey {
    changed: Vec<usize>,
    inserted: Vec<usize>,
    puts_back: bool,
    alters: bool,
    removes: bool,
    moves: bool,
}

/// Compares. The table is locked against changes of its columns, and the current user may read all of it.
///
/// # Errors
/// WG007 where the table is not what it was; WG008 for images that cannot be read; otherwise what reading and locking rows
/// raises.
pub fn compare(change: i64, table: Table, purpose: Purpose<'_>) -> Result<Standing, Failure> {
    let Table { shape, naming, rows } = table;
    let settings = Fixed::settings(&shape.columns)?;
    let mut images = Images::read(change, &shape, &naming.key(&shape)?)?;
    if images.count() != rows {
        // The worker has begun to delete them.
        return Err(Change::missing(change).into());
    }
    let memory = text::per_row_memory();
    let mut comparison = Comparison { change, shape: &shape, naming, memory };
    let (mut keys, survey) = comparison.keys(&mut images)?;
    if let Some(notice) = comparison.naming.notice() {
        tell(pgrx::PgLogLevel::NOTICE, &notice, None, None)?;
    }
    let mut rows = comparison.rows(&survey);
    let writes = matches!(purpose, Purpose::Write);
    images.each = writes && comparison.goes_by_steps(&survey);
    let mut steps = images.each.then(|| rows.like());
    let mut result = Counts::default();
    comparison.match_rows(&mut images, &mut keys, &survey, purpose, (&mut rows, steps.as_mut()), &mut result)?;
    images.end();
    keys.end();
    // SAFETY: ours; nothing in it is used any more.
    unsafe { pg_sys::MemoryContextDelete(memory) };
    settings.release()?;
    let Counts { planned, settled, conflicts, first } = result;
    Ok(Standing {
        shape,
        rows,
        steps,
        changed: survey.changed,
        inserted: survey.inserted,
        planned,
        settled,
        conflicts,
        first,
    })
}

#[derive(Default)]
struct Counts {
    planned: [u64; 3],
    settled: u64,
    conflicts: u64,
    first: Option<String>,
}

/// What is to be done with a row.
enum Write {
    /// These values, one for each column that any row is written with.
    Row(Vec<Option<pg_sys::Datum>>),
    /// It is as it was.
    Nothing,
    /// It is not as the change left it.
    Conflict,
}

/// What a row's images ask for.
fn operation(net: &Net) -> Option<i32> {
    match net {
        Net::PutBack { .. } => Some(PUT_BACK),
        Net::Change { .. } => Some(CHANGE),
        Net::Remove { .. } => Some(REMOVE),
        Net::Nothing => None,
    }
}

impl Comparison<'_> {
    fn key_types<'n>(&self, names: &'n [String]) -> Vec<Typed<'n>> {
        self.shape.key_columns().zip(names).map(|(column, name)| typed(name, column)).collect()
    }

    fn key_names(&self) -> Vec<String> {
        (1..=self.shape.key.len()).map(|place| format!("k{place}")).collect()
    }

    /// Looks at all images once: the keys of their rows, and what is to be written at all.
    fn keys(&mut self, images: &mut Images) -> Result<(Rows, Survey), Failure> {
        let names = self.key_names();
        let mut columns = vec![
            Typed::plain("n", pg_sys::INT8OID),
            Typed::plain("op", pg_sys::INT4OID),
            Typed::plain("moves", pg_sys::BOOLOID),
        ];
        columns.extend(self.key_types(&names));
        let mut keys = Rows::new(&columns);
        let mut survey = Survey::default();
        let mut n: i64 = 0;
        while let Some(folded) = images.next()? {
            let net = folded.net;
            let (Some(operation), Some(values)) = (operation(&net), net.keyed_by()) else { continue };
            n += 1;
            let here = self.enter_row()?;
            self.naming.check(values)?;
            let mut moves = operation == REMOVE;
            match &net {
                Net::PutBack { row } => {
                    survey.puts_back = true;
                    for place in row.keys().filter_map(|name| self.naming.place(name)) {
                        if !self.shape.columns[place].generated {
                            include(&mut survey.inserted, place);
                        }
                    }
                }
                Net::Change { .. } => {
                    survey.alters = true;
                    for (place, ..) in self.changed(&net) {
                        include(&mut survey.changed, place);
                        moves |= self.shape.is_key(self.shape.columns[place].number);
                    }
                }
                Net::Remove { .. } => survey.removes = true,
                Net::Nothing => {}
            }
            survey.moves |= moves;
            let mut row = vec![n.into_datum(), operation.into_datum(), moves.into_datum()];
            row.extend(self.key(values)?);
            keys.put(&row);
            self.leave_row(here);
        }
        images.rewind();
        Ok((keys, survey))
    }

    /// Rows of what is to be written.
    fn rows(&self, survey: &Survey) -> Rows {
        let names = self.key_names();
        let mut columns = vec![
            Typed::plain("n", pg_sys::INT8OID),
            Typed::plain("last", pg_sys::INT8OID),
            Typed::plain("op", pg_sys::INT4OID),
        ];
        columns.extend(self.key_types(&names));
        let places = written(survey);
        let names: Vec<String> = places.iter().map(|place| format!("c{place}")).collect();
        columns.extend(places.iter().zip(&names).map(|(place, name)| typed(name, &self.shape.columns[*place])));
        Rows::new(&columns)
    }

    /// The rows that the images are of, in the same order, as far as they are there: `n`, and the columns at `places`.
    fn find(
        &self,
        connection: &Connection,
        put_back: bool,
        places: &[usize],
        survey: &Survey,
        lock: bool,
    ) -> Result<Cursor, Failure> {
        let columns: String = places.iter().map(|place| format!(", t.{}", self.shape.columns[*place].sql())).collect();
        let mut sql = format!(
            "SELECT i.n{columns} FROM {ROWS} AS i JOIN {} AS t ON {} WHERE i.op OPERATOR(pg_catalog.{}) {PUT_BACK}",
            self.shape.sql(),
            self.shape.has_key("t", "i"),
            if put_back { "=" } else { "<>" },
        );
        if put_back && survey.moves {
            // The row that has the key now may be one that gives it back.
            let same = self.shape.same_key(|place, _| format!("j.k{place}"), |place, _| format!("i.k{place}"));
            sql.push_str(&format!(" AND NOT EXISTS (SELECT FROM {ROWS} AS j WHERE j.moves AND {same})"));
        }
        sql.push_str(" ORDER BY i.n");
        if lock {
            sql.push_str(" FOR UPDATE OF t");
        }
        let cursor = connection.query(&sql)?;
        // Values are printed as what the shape says that they are. What reads images may run other people's code (checks
        // of domains), and from a table that this changed meanwhile come others.
        let types = places.iter().map(|place| self.shape.columns[*place].type_oid());
        if !types.eq(cursor.types().into_iter().skip(1)) {
            return Err(self.shape.changes(self.change).into());
        }
        Ok(cursor)
    }

    fn match_rows(
        &self,
        images: &mut Images,
        keys: &mut Rows,
        survey: &Survey,
        mut purpose: Purpose<'_>,
        (rows, mut steps): (&mut Rows, Option<&mut Rows>),
        counts: &mut Counts,
    ) -> Result<(), Failure> {
        let everything: Vec<usize> = (0..self.shape.columns.len()).collect();
        let tells = matches!(purpose, Purpose::Tell(..));
        let places = if survey.removes || tells { everything.clone() } else { survey.changed.clone() };
        let of_put_back = if tells { everything } else { Vec::new() };
        let connection = Connection::open()?;
        connection.show(ROWS, keys);
        let mut there = match survey.alters || survey.removes {
            true => Some(self.find(&connection, false, &places, survey, !tells)?),
            false => None,
        };
        let mut taken = match survey.puts_back {
            true => Some(self.find(&connection, true, &of_put_back, survey, false)?),
            false => None,
        };
        let mut n: i64 = 0;
        keys.rewind();
        while let Some(folded) = images.next()? {
            let net = folded.net;
            let Some(operation) = operation(&net) else { continue };
            n += 1;
            let here = self.enter_row()?;
            let (cursor, shown) = match operation {
                PUT_BACK => (&mut taken, &of_put_back),
                _ => (&mut there, &places),
            };
            let found = match cursor {
                Some(cursor) => self.row_of(cursor, n, shown)?,
                None => None,
            };
            let key = keys.next().unwrap_or_default();
            let row = self.row_to_write(&net, found.as_ref(), survey)?;
            let row = match (row, &purpose) {
                (Write::Row(_), Purpose::Tell(_, refused)) if refused.contains(&n) => Write::Conflict,
                (row, _) => row,
            };
            match row {
                Write::Row(written) if !tells => {
                    counts.planned[operation as usize - 1] += 1;
                    if let Some(steps) = &mut steps {
                        self.steps(n, (&net, &folded.images), found.as_ref(), survey, steps)?;
                    }
                    let mut row = vec![n.into_datum(), folded.last.into_datum(), operation.into_datum()];
                    row.extend(key.into_iter().skip(3));
                    row.extend(written);
                    rows.put(&row);
                }
                Write::Row(_) => {}
                Write::Nothing => counts.settled += 1,
                Write::Conflict => {
                    counts.conflicts += 1;
                    if counts.first.is_none() {
                        counts.first = self.tell_key(&net);
                    }
                    if let Purpose::Tell(tell, _) = &mut purpose {
                        tell(conflict_row::told(self, &net, found.as_deref())?);
                    }
                }
            }
            self.leave_row(here);
        }
        for cursor in [there, taken].into_iter().flatten() {
            cursor.close()?;
        }
        connection.close()
    }

    /// Whether rows go back step by step. Not where two of them may have the same key meanwhile: a step would not know its row.
    fn goes_by_steps(&self, survey: &Survey) -> bool {
        let changed: Vec<i16> = survey.changed.iter().map(|place| self.shape.columns[*place].number).collect();
        let keys_meet = self.shape.deferrable_key && changed.iter().any(|number| self.shape.is_key(*number));
        self.shape.may_collide(&changed) && !keys_meet
    }

    /// Sets aside what takes back each image of a row for itself, the last one first.
    fn steps(
        &self,
        n: i64,
        (net, images): (&Net, &[(i64, Image)]),
        found: Option<&Found>,
        survey: &Survey,
        steps: &mut Rows,
    ) -> Result<(), Failure> {
        let columns = written(survey);
        let now = |place: &usize| {
            let found = found.and_then(|found| found.iter().find(|(of, _)| of == place));
            found.and_then(|(_, value)| *value)
        };
        let first = match net {
            Net::PutBack { row } => Some(row),
            Net::Change { was, .. } => Some(was),
            _ => None,
        };
        // What the row is before each step.
        let mut is: Vec<Option<pg_sys::Datum>> = columns.iter().map(now).collect();
        for (number, image) in images.iter().rev() {
            let (operation, key) = match image.done {
                Done::Update => (CHANGE, &image.after),
                Done::Delete => (PUT_BACK, &image.before),
                Done::Insert => (REMOVE, &image.after),
            };
            let mut changes = operation != CHANGE;
            for (place, value) in columns.iter().zip(&mut is) {
                let name = self.naming.name(*place);
                let Some(mut was) = name.and_then(|name| image.before.get(name)) else { continue };
                if operation == PUT_BACK && !survey.changed.contains(place) {
                    // No later step sets it, so it is at once what it was first.
                    was = name.and_then(|name| first?.get(name)).unwrap_or(was);
                }
                if operation == CHANGE && (image.after.get(name.unwrap_or_default()) == Some(was)) {
                    continue;
                }
                *value = self.read(*place, was.as_deref())?;
                changes |= survey.changed.contains(place);
            }
            if changes {
                let mut row = vec![n.into_datum(), number.into_datum(), operation.into_datum()];
                row.extend(self.key(key)?);
                row.extend(is.iter().copied());
                steps.put(&row);
            }
        }
        Ok(())
    }

    /// The row that belongs to the images of number `n`, if the cursor has it.
    fn row_of(&self, cursor: &mut Cursor, n: i64, places: &[usize]) -> Result<Option<Found>, Failure> {
        let Some(values) = cursor.values()? else { return Ok(None) };
        let of = values.first().copied().flatten().map_or(0, |datum| datum.value() as i64);
        if of != n {
            return Ok(None);
        }
        cursor.advance();
        Ok(Some(places.iter().copied().zip(values.into_iter().skip(1)).collect()))
    }

    /// What is to be written of a row.
    fn row_to_write(&self, net: &Net, found: Option<&Found>, survey: &Survey) -> Result<Write, Failure> {
        let now = |place: usize| {
            let found = found.and_then(|found| found.iter().find(|(of, _)| *of == place));
            found.and_then(|(_, value)| *value)
        };
        let columns = written(survey);
        match (net, found) {
            (Net::PutBack { row }, None) => {
                let mut values = Vec::with_capacity(columns.len());
                for place in columns {
                    let value = self.naming.name(place).and_then(|name| row.get(name));
                    values.push(match value {
                        Some(value) if survey.inserted.contains(&place) => self.read(place, value.as_deref())?,
                        _ => None,
                    });
                }
                Ok(Write::Row(values))
            }
            (Net::Change { .. }, Some(_)) => {
                let changed = self.changed(net);
                for (place, _, left) in &changed {
                    if !self.is_still(*place, now(*place), left.as_deref())? {
                        return Ok(Write::Conflict);
                    }
                }
                if changed.is_empty() {
                    return Ok(Write::Nothing);
                }
                let mut values = Vec::with_capacity(columns.len());
                for place in columns {
                    values.push(match changed.iter().find(|(of, ..)| *of == place) {
                        Some((_, was, _)) => self.read(place, was.as_deref())?,
                        None if survey.changed.contains(&place) => now(place),
                        None => None,
                    });
                }
                Ok(Write::Row(values))
            }
            (Net::Remove { left }, Some(_)) => {
                for (name, left) in left {
                    let Some(place) = self.naming.place(name) else { continue };
                    if !self.shape.columns[place].generated && !self.is_still(place, now(place), left.as_deref())? {
                        return Ok(Write::Conflict);
                    }
                }
                Ok(Write::Row(vec![None; columns.len()]))
            }
            _ => Ok(Write::Conflict),
        }
    }
}

fn typed<'n>(name: &'n str, column: &Column) -> Typed<'n> {
    Typed { name, type_oid: column.type_oid(), typmod: column.typmod, collation: column.collation() }
}

/// Places of all columns that some row is written with.
fn written(survey: &Survey) -> Vec<usize> {
    let mut places = survey.changed.clone();
    survey.inserted.iter().for_each(|place| include(&mut places, *place));
    places.sort_unstable();
    places
}

fn include(places: &mut Vec<usize>, place: usize) {
    if !places.contains(&place) {
        places.push(place);
    }
}

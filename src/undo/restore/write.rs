//! Writes what was found to be taken back: one statement per table and operation, as the caller and with the caller's
//! rights; row by row, last change first, where the order matters.

use super::as_caller::{Connection, Cursor, Plan, check_interrupts, together};
use super::plan::{CHANGE, PUT_BACK, REMOVE, ROWS, Standing};
use super::table_definition::{Column, Shape};
use crate::pg::ereport::Failure;

/// The name of all set-aside rows, where [`ROWS`] is one of them at a time.
const ALL_ROWS: &str = "writeguard_all_rows";

/// The same for those that are to be removed.
const REMAINING: &str = "writeguard_remaining_rows";

/// The statements for one table.
struct Statements<'a> {
    shape: &'a Shape,
    changed: &'a [usize],
    inserted: &'a [usize],
}

impl Statements<'_> {
    fn column(&self, place: &usize) -> String {
        self.shape.columns.get(*place).map(Column::sql).unwrap_or_default()
    }

    fn of(&self, operation: i32) -> String {
        let (table, key) = (self.shape.sql(), self.shape.has_key("t", "i"));
        let only = format!("i.op OPERATOR(pg_catalog.=) {operation}");
        match operation {
            REMOVE => format!("DELETE FROM {table} AS t USING {ROWS} AS i WHERE {only} AND {key}"),
            CHANGE => {
                let set: Vec<String> =
                    self.changed.iter().map(|place| format!("{} = i.c{place}", self.column(place))).collect();
                format!("UPDATE {table} AS t SET {} FROM {ROWS} AS i WHERE {only} AND {key}", set.join(", "))
            }
            _ => {
                let columns: Vec<String> = self.inserted.iter().map(|place| self.column(place)).collect();
                let values: Vec<String> = self.inserted.iter().map(|place| format!("i.c{place}")).collect();
                format!(
                    "INSERT INTO {} ({}) OVERRIDING SYSTEM VALUE SELECT {} FROM {ROWS} AS i WHERE {only} ORDER BY i.n{}",
                    self.shape.target(),
                    columns.join(", "),
                    values.join(", "),
                    self.shape.unless_there()
                )
            }
        }
    }
}

/// The order of operations where rows do not depend on each other: what is put back may need the place of what goes.
const ORDER: [i32; 3] = [REMOVE, CHANGE, PUT_BACK];

/// Writes all tables' rows. Gives for each how many it wrote.
///
/// Foreign keys look at what was written when all of it is. Their actions would come too late then where one row has got
/// the key that another one gives back: whoever refers to the one would follow the other. Such tables are written first,
/// and what refers to them follows at once, as it did when they were changed.
///
/// # Errors
/// Whatever triggers, constraints and privileges have to say.
pub fn write(tables: &[Standing]) -> Result<Vec<u64>, Failure> {
    let mut written = vec![0; tables.len()];
    let mut first = Vec::new();
    for (place, table) in tables.iter().enumerate() {
        if passes_keys_on(table)? {
            first.push(place);
        }
    }
    let is_first: Vec<bool> = (0..tables.len()).map(|place| first.contains(&place)).collect();
    while !first.is_empty() {
        let waits = |place: &usize| {
            first.iter().any(|other| other != place && tables[*place].shape.refers_to(&tables[*other].shape))
        };
        let next = first.iter().position(|place| !waits(place)).unwrap_or(0);
        let place = first.remove(next);
        written[place] = together(|| write_table(&tables[place]))?;
    }
    together(|| {
        for (place, table) in tables.iter().enumerate().filter(|(place, _)| !is_first[*place]) {
            written[place] = write_table(table)?;
        }
        Ok(())
    })?;
    Ok(written)
}

/// Whether a row gets a key that another one has now, and foreign keys have actions on that.
fn passes_keys_on(table: &Standing) -> Result<bool, Failure> {
    let shape = &table.shape;
    let (changed, keys): (Vec<i16>, Vec<i16>) =
        (table.changed_numbers(), shape.key.iter().map(|key| key.number).collect());
    let others: Vec<i16> = changed.iter().copied().filter(|number| !keys.contains(number)).collect();
    if shape.is_acted_on(&others) {
        return Ok(true);
    }
    let [_, changes, removes] = table.planned;
    let moves = changes > 0 && keys.iter().any(|key| changed.contains(key));
    if !shape.has_dependents() || !moves && removes == 0 {
        return Ok(false);
    }
    let after = |row: &'static str| {
        move |place: usize, column: &Column| {
            let written = shape.columns.iter().position(|one| one.number == column.number).unwrap_or(usize::MAX);
            match changed_at(table, written) {
                true => format!("CASE {row}.op WHEN {CHANGE} THEN {row}.c{written} ELSE {row}.k{place} END"),
                false => format!("{row}.k{place}"),
            }
        }
    };
    let now = |row: &'static str| move |place: usize, _: &Column| format!("{row}.k{place}");
    let sql = format!(
        "SELECT 1 FROM {ROWS} AS i JOIN {ROWS} AS j ON {} WHERE i.op OPERATOR(pg_catalog.<>) {PUT_BACK} \
         AND j.op OPERATOR(pg_catalog.<>) {REMOVE} AND (i.op OPERATOR(pg_catalog.=) {REMOVE} OR NOT ({})) LIMIT 1",
        shape.same_key(now("i"), after("j")),
        shape.same_key(now("i"), after("i")),
    );
    let connection = Connection::open()?;
    connection.show(ROWS, &table.rows);
    let mut cursor = connection.query(&sql)?;
    let found = cursor.peek()?.is_some();
    cursor.close()?;
    connection.close()?;
    Ok(found)
}

fn changed_at(table: &Standing, place: usize) -> bool {
    table.changed.contains(&place)
}

fn write_table(table: &Standing) -> Result<u64, Failure> {
    if table.planned.iter().all(|rows| *rows == 0) {
        return Ok(0);
    }
    let statements = Statements { shape: &table.shape, changed: &table.changed, inserted: &table.inserted };
    let connection = Connection::open()?;
    let mut written = [0; 3];
    if table.shape.may_collide(&table.changed_numbers()) {
        row_by_row(&connection, table, &statements, &mut written)?;
    } else {
        connection.show(ROWS, &table.rows);
        for operation in ORDER {
            let place = operation as usize - 1;
            if table.planned[place] > 0 {
                written[place] = connection.run(connection.plan(&statements.of(operation))?)?;
            }
        }
    }
    let [put_back, changed, mut removed] = written;
    let planned = table.planned[REMOVE as usize - 1];
    if removed < planned {
        // A foreign key's action may have removed some before.
        removed = planned.saturating_sub(remaining(&connection, table)?);
    }
    connection.close()?;
    Ok(put_back + changed + removed)
}

/// How many of the rows that are to be removed are still there.
fn remaining(connection: &Connection, table: &Standing) -> Result<u64, Failure> {
    connection.show(REMAINING, &table.rows);
    let sql = format!(
        "SELECT pg_catalog.count(*) FROM {REMAINING} AS i JOIN {} AS t ON {} WHERE i.op OPERATOR(pg_catalog.=) {REMOVE}",
        table.shape.sql(),
        table.shape.has_key("t", "i")
    );
    let mut cursor = connection.query(&sql)?;
    let count = cursor.values()?.and_then(|row| row.first().copied().flatten()).map_or(0, |count| count.value() as u64);
    cursor.close()?;
    Ok(count)
}

/// Two rows may have swapped what must be unique. They went there one by one without ever colliding, so they can go back
/// the same way: last change first.
fn row_by_row(
    connection: &Connection,
    table: &Standing,
    statements: &Statements<'_>,
    written: &mut [u64; 3],
) -> Result<(), Failure> {
    let mut one = table.rows.like();
    connection.show(ROWS, &one);
    connection.show(ALL_ROWS, &table.rows);
    let mut plans: [Option<Plan>; 3] = [None; 3];
    let mut cursor = connection.query(&format!("SELECT * FROM {ALL_ROWS} AS i ORDER BY i.last DESC"))?;
    while let (Some(tuple), Some(operation)) = (cursor.peek()?, operation_of(&mut cursor)?) {
        check_interrupts()?;
        one.clear();
        // SAFETY: a row of a query over rows like these.
        unsafe { one.put_tuple(tuple) };
        let place = usize::try_from(operation - 1).unwrap_or(0).min(2);
        let plan = match plans[place] {
            Some(plan) => plan,
            None => *plans[place].insert(connection.plan(&statements.of(operation))?),
        };
        written[place] += connection.run(plan)?;
        cursor.advance();
    }
    cursor.close()?;
    one.end();
    Ok(())
}

fn operation_of(cursor: &mut Cursor) -> Result<Option<i32>, Failure> {
    let row = cursor.values()?;
    Ok(row.and_then(|row| row.get(2).copied().flatten()).map(|datum| datum.value() as i32))
}

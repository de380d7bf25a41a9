//! Writes what was found to be taken back: one statement per table and operation, as the caller and with the caller's
//! rights; row by row, last change first, where the order matters.

use super::session::{Connection, Cursor, Plan, check_interrupts, together};
use super::shape::{Column, Shape};
use super::standing::{CHANGE, PUT_BACK, REMOVE, ROWS, Standing};
use crate::raise::Failure;

/// The name of all set-aside rows, where [`ROWS`] is one of them at a time.
const ALL_ROWS: &str = "writeguard_all_rows";

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
/// # Errors
/// Whatever triggers, constraints and privileges have to say.
pub fn write(tables: &[Standing]) -> Result<Vec<u64>, Failure> {
    together(|| tables.iter().map(write_table).collect())
}

fn write_table(table: &Standing) -> Result<u64, Failure> {
    if table.planned.iter().all(|rows| *rows == 0) {
        return Ok(0);
    }
    let statements = Statements { shape: &table.shape, changed: &table.changed, inserted: &table.inserted };
    let numbers: Vec<i16> = table.changed.iter().map(|place| table.shape.columns[*place].number).collect();
    if table.shape.may_collide(&numbers) {
        return row_by_row(table, &statements);
    }
    let connection = Connection::open()?;
    connection.show(ROWS, &table.rows);
    let mut written = 0;
    for operation in ORDER {
        if table.planned[operation as usize - 1] > 0 {
            written += connection.run(connection.plan(&statements.of(operation))?)?;
        }
    }
    connection.close()?;
    Ok(written)
}

/// Two rows may have swapped what must be unique. They went there one by one without ever colliding, so they can go back
/// the same way.
fn row_by_row(table: &Standing, statements: &Statements<'_>) -> Result<u64, Failure> {
    let connection = Connection::open()?;
    let mut one = table.rows.like();
    connection.show(ROWS, &one);
    connection.show(ALL_ROWS, &table.rows);
    let mut plans: [Option<Plan>; 3] = [None; 3];
    let mut cursor = connection.query(&format!("SELECT * FROM {ALL_ROWS} AS i ORDER BY i.last DESC"))?;
    let mut written = 0;
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
        written += connection.run(plan)?;
        cursor.advance();
    }
    cursor.close()?;
    connection.close()?;
    one.end();
    Ok(written)
}

fn operation_of(cursor: &mut Cursor) -> Result<Option<i32>, Failure> {
    let row = cursor.values()?;
    Ok(row.and_then(|row| row.get(2).copied().flatten()).map(|datum| datum.value() as i32))
}

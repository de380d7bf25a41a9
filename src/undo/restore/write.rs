//! Writes what was found to be taken back: one statement per table and operation, as the caller and with the caller's
//! rights; row by row, last change first, where the order matters.

use super::as_caller::{Connection, Cursor, Plan, check_interrupts, together};
use super::plan::{CHANGE, PUT_BACK, REMOVE, ROWS, Standing};
use super::rows::Rows;
use super::table_definition::{Column, Shape};
use crate::pg::ereport::Failure;

/// The name of all set-aside rows, where [`ROWS`] is one of them at a time.
const ALL_ROWS: &str = "writeguard_all_rows";

/// Rows of one table that are to be written: all that were set aside, or some.
#[derive(Clone, Copy)]
pub struct Part<'a> {
    pub table: &'a Standing,
    pub rows: &'a Rows,
}

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

/// Writes rows of all tables. Whether they came out as they were to be is for `verify` to say.
///
/// Foreign keys look at what was written when all of it is. Their actions would come too late then where one row has got
/// the key that another one gives back: whoever refers to the one would follow the other. Such tables are written first,
/// and what refers to them follows at once, as it did when they were changed.
///
/// # Errors
/// Whatever triggers, constraints and privileges have to say.
pub fn write(parts: &[Part<'_>]) -> Result<(), Failure> {
    let mut first = Vec::new();
    for (place, part) in parts.iter().enumerate() {
        if passes_keys_on(part)? {
            first.push(place);
        }
    }
    let is_first: Vec<bool> = (0..parts.len()).map(|place| first.contains(&place)).collect();
    let shape = |place: usize| &parts[place].table.shape;
    while !first.is_empty() {
        let waits = |place: &usize| first.iter().any(|other| other != place && shape(*place).refers_to(shape(*other)));
        let next = first.iter().position(|place| !waits(place)).unwrap_or(0);
        let place = first.remove(next);
        together(|| write_table(&parts[place]))?;
    }
    together(|| {
        parts.iter().enumerate().filter(|(place, _)| !is_first[*place]).try_for_each(|(_, part)| write_table(part))
    })
}

/// Whether a row gets a key that another one has now, and foreign keys have actions on that.
fn passes_keys_on(Part { table, rows }: &Part<'_>) -> Result<bool, Failure> {
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
    let after = |row: &'static str| move |place: usize, column: &Column| table.key_to_be(row, place, column);
    let now = |row: &'static str| move |place: usize, _: &Column| format!("{row}.k{place}");
    let sql = format!(
        "SELECT 1 FROM {ROWS} AS i JOIN {ROWS} AS j ON {} WHERE i.op OPERATOR(pg_catalog.<>) {PUT_BACK} \
         AND j.op OPERATOR(pg_catalog.<>) {REMOVE} AND (i.op OPERATOR(pg_catalog.=) {REMOVE} OR NOT ({})) LIMIT 1",
        shape.same_key(now("i"), after("j")),
        shape.same_key(now("i"), after("i")),
    );
    let connection = Connection::open()?;
    connection.show(ROWS, rows);
    let mut cursor = connection.query(&sql)?;
    let found = cursor.peek()?.is_some();
    cursor.close()?;
    connection.close()?;
    Ok(found)
}

fn write_table(part: &Part<'_>) -> Result<(), Failure> {
    let Part { table, rows } = part;
    if rows.count() == 0 {
        return Ok(());
    }
    let statements = Statements { shape: &table.shape, changed: &table.changed, inserted: &table.inserted };
    let connection = Connection::open()?;
    if table.steps.is_some() {
        row_by_row(&connection, rows, &statements)?;
    } else {
        connection.show(ROWS, rows);
        for operation in ORDER {
            if table.planned[operation as usize - 1] > 0 {
                connection.run(connection.plan(&statements.of(operation))?)?;
            }
        }
    }
    connection.close()
}

/// Two rows may have swapped what must be unique, perhaps by way of a third value. They went there step by step without
/// ever colliding, so they can go back the same way: last step first.
fn row_by_row(connection: &Connection, rows: &Rows, statements: &Statements<'_>) -> Result<(), Failure> {
    let mut one = rows.like();
    connection.show(ROWS, &one);
    connection.show(ALL_ROWS, rows);
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
        connection.run(plan)?;
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

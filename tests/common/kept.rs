//! What the tests of undo share: tables whose rows are kept when a statement changes them, and what undoing gives.

use postgres::Client;

use crate::common::{Database, Refusal, Server, expect_refusal};

pub struct Bed {
    pub db: Database,
    pub admin: Client,
    /// A second session, which sees only what was committed.
    pub reader: Client,
}

impl Bed {
    pub fn new(setup: &str) -> Bed {
        let db = Server::shared().database();
        let mut bed = Bed { admin: db.admin(), reader: db.admin(), db };
        bed.run(setup);
        bed.run("SELECT writeguard.set_policy('kept', undo => '1 day')");
        bed
    }

    #[track_caller]
    pub fn run(&mut self, sql: &str) {
        if let Err(error) = self.admin.batch_execute(sql) {
            panic!("{sql}: {:?}", Refusal::of(&error));
        }
    }

    /// Runs a statement whose rows are kept, or several as one, and gives the number of the change.
    #[track_caller]
    pub fn change(&mut self, sql: &str) -> i64 {
        let last = "SELECT COALESCE(max(id), 0) FROM writeguard.change_statement";
        let id = |bed: &mut Bed| bed.reader.query_one(last, &[]).expect("a number").get::<_, i64>(0);
        let before = id(self);
        let sql = if sql.contains(';') { format!("DO $change$ BEGIN {sql}; END $change$") } else { sql.to_owned() };
        self.run("SET writeguard.capture_undo = on");
        self.run(&sql);
        self.run("SET writeguard.capture_undo = off");
        let change = id(self);
        assert_ne!(change, before, "{sql}: nothing was kept");
        change
    }

    /// The rows of a query in the second session, as text.
    #[track_caller]
    pub fn rows(&mut self, sql: &str) -> Vec<String> {
        rows(&mut self.reader, sql)
    }

    #[track_caller]
    pub fn table(&mut self, table: &str) -> Vec<String> {
        self.rows(&format!("SELECT t::text FROM {table} AS t ORDER BY t::text"))
    }

    /// `undo` and its result: table, restored, conflicts.
    #[track_caller]
    pub fn undo(&mut self, arguments: &str) -> Vec<(String, i64, i64)> {
        undo(&mut self.admin, arguments)
    }

    #[track_caller]
    pub fn refused(&mut self, sql: &str) -> Refusal {
        expect_refusal(self.admin.batch_execute(sql))
    }
}

#[track_caller]
pub fn rows(client: &mut Client, sql: &str) -> Vec<String> {
    match client.query(sql, &[]) {
        Ok(rows) => rows.iter().map(|row| row.get::<_, Option<String>>(0).unwrap_or("NULL".into())).collect(),
        Err(error) => panic!("{sql}: {:?}", error),
    }
}

#[track_caller]
pub fn undo(client: &mut Client, arguments: &str) -> Vec<(String, i64, i64)> {
    let sql = format!("SELECT relation, restored, conflicts FROM writeguard.undo({arguments})");
    match client.query(&sql, &[]) {
        Ok(rows) => rows.iter().map(|row| (row.get(0), row.get(1), row.get(2))).collect(),
        Err(error) => panic!("{sql}: {:?}", Refusal::of(&error)),
    }
}

pub fn one(relation: &str, restored: i64, conflicts: i64) -> Vec<(String, i64, i64)> {
    vec![(relation.to_owned(), restored, conflicts)]
}

pub const ORDERS: &str = "CREATE TABLE orders (id int PRIMARY KEY, state text, price numeric, note text);
    INSERT INTO orders SELECT i, 'open', i * 1.10, 'n' || i FROM generate_series(1, 6) AS i";

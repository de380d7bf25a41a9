//! What the tests of exactness share: a database with some tables in it, a session that
//! writes and another one that looks, and the question at which limit a write passes.

use std::thread;

use postgres::Client;

pub use crate::common::session::{number, pass, refuse};
use crate::common::{Database, Refusal, Server, expect_refusal};

/// Six rows, all with the value 0.
pub const SIX: &str = "
    CREATE TABLE t (id int PRIMARY KEY, v int NOT NULL DEFAULT 0);
    INSERT INTO t SELECT i, 0 FROM generate_series(1, 6) AS i;";

/// A database of its own, dropped at the end of the test.
pub struct Bed {
    db: Option<Database>,
    /// The session whose writes are limited; a superuser, who is covered too.
    pub writer: Client,
    /// A second session, which sees only what was committed.
    pub reader: Client,
}

impl Bed {
    /// Runs `setup` before there is any policy.
    #[track_caller]
    pub fn new(setup: &str) -> Bed {
        Bed::on(Server::shared(), setup)
    }

    /// The same on a server of its own.
    #[track_caller]
    pub fn on(server: &Server, setup: &str) -> Bed {
        let db = server.database();
        let mut writer = db.admin();
        let reader = db.admin();
        if let Err(error) = writer.batch_execute(setup) {
            panic!("the setup failed: {:?}", Refusal::of(&error));
        }
        Bed { db: Some(db), writer, reader }
    }

    pub fn db(&self) -> &Database {
        self.db.as_ref().expect("the database is there")
    }

    /// The database is left when the bed goes.
    // For tests/neighbours.rs, which is of one server only.
    #[allow(dead_code)]
    pub fn stays(&mut self) {
        self.db = None;
    }

    /// Sets the policy `p` from the second session, with further arguments of set_policy.
    #[track_caller]
    pub fn policy(&mut self, arguments: &str) {
        let sql = format!("SELECT writeguard.set_policy('p', {arguments})");
        if let Err(error) = self.reader.batch_execute(&sql) {
            panic!("{sql}: {:?}", Refusal::of(&error));
        }
    }

    /// Lets a statement change that many rows of all these tables together.
    #[track_caller]
    pub fn limit(&mut self, tables: &str, rows: u64) {
        self.policy(&format!("tables => '{tables}', max_rows => {rows}"));
    }

    /// The names and contents of all tables in schema public, as the second session sees them.
    #[track_caller]
    pub fn contents(&mut self) -> Vec<(String, String)> {
        contents(&mut self.reader)
    }

    /// One number from the second session.
    #[track_caller]
    pub fn number(&mut self, sql: &str) -> i64 {
        number(&mut self.reader, sql)
    }

    /// The statement fails with WG001, names a table, and leaves everything as it was.
    /// An open transaction block is rolled back.
    #[track_caller]
    pub fn refused(&mut self, sql: &str) -> Refusal {
        let before = self.contents();
        let refusal = expect_refusal(self.writer.batch_execute(sql));
        let _ = self.writer.batch_execute("ROLLBACK");
        assert_eq!(refusal.sqlstate, "WG001", "{sql}: {refusal:?}");
        assert_ne!((refusal.schema.as_str(), refusal.table.as_str()), ("", ""), "{sql}: no table in {refusal:?}");
        assert_eq!(self.contents(), before, "{sql}: refused, but not undone");
        refusal
    }

    /// The same for a statement that goes through the extended protocol.
    #[track_caller]
    pub fn refused_extended(&mut self, sql: &str) -> Refusal {
        let before = self.contents();
        let refusal = expect_refusal(self.writer.execute(sql, &[]));
        assert_eq!(refusal.sqlstate, "WG001", "{sql}: {refusal:?}");
        assert_eq!(self.contents(), before, "{sql}: refused, but not undone");
        refusal
    }

    #[track_caller]
    pub fn passes(&mut self, sql: &str) {
        if let Err(error) = self.writer.batch_execute(sql) {
            panic!("{sql}: {:?}", Refusal::of(&error));
        }
    }

    /// Refused where the limit on `tables` is one row less, and passes where it is `rows`.
    /// Once in each protocol, where a statement can go through both.
    #[track_caller]
    pub fn exactly(&mut self, tables: &str, sql: &str, rows: u64) -> Refusal {
        assert!(rows > 0, "a limit cannot be less than 0");
        self.limit(tables, rows - 1);
        let refusal = self.refused(sql);
        if is_single(sql) {
            let again = self.refused_extended(sql);
            assert_eq!((&again.schema, &again.table), (&refusal.schema, &refusal.table), "{sql}");
        }
        self.limit(tables, rows);
        let before = self.contents();
        self.passes(sql);
        assert_ne!(self.contents(), before, "{sql}: passed, but changed nothing");
        refusal
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        if let Some(db) = self.db.take() {
            // A second panic would hide the first one.
            if !thread::panicking() {
                db.drop();
            }
        }
    }
}

/// Whether this is one command that the extended protocol takes as well.
fn is_single(sql: &str) -> bool {
    !sql.contains(';')
}

/// After `setup`, the statement needs a limit of exactly `rows` on all tables of schema public.
#[track_caller]
pub fn assert_limit(setup: &str, sql: &str, rows: u64) -> Refusal {
    assert_limit_on("{public.*}", setup, sql, rows)
}

/// The same for a policy on these tables.
#[track_caller]
pub fn assert_limit_on(tables: &str, setup: &str, sql: &str, rows: u64) -> Refusal {
    Bed::new(setup).exactly(tables, sql, rows)
}

/// After `setup`, the statement passes although not one row of any table may be changed.
#[track_caller]
pub fn assert_free(setup: &str, sql: &str) {
    assert_free_on("{*.*}", setup, sql);
}

/// The same where not one row of these tables may be changed.
#[track_caller]
pub fn assert_free_on(tables: &str, setup: &str, sql: &str) {
    let mut bed = Bed::new(setup);
    bed.limit(tables, 0);
    bed.passes(sql);
}

#[track_caller]
pub fn contents(client: &mut Client) -> Vec<(String, String)> {
    let tables = client
        .query(
            "SELECT relname::text, format('%I.%I', 'public', relname) FROM pg_class
             WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'm') ORDER BY 1",
            &[],
        )
        .expect("cannot list the tables");
    let mut contents = Vec::new();
    for table in tables {
        let sql = format!(
            "SELECT coalesce(md5(string_agg(x::text, '|' ORDER BY x::text)), 'empty')
             FROM ONLY {} AS x",
            table.get::<_, &str>(1)
        );
        let row = client.query_one(&sql, &[]).expect("cannot read a table");
        contents.push((table.get(0), row.get(0)));
    }
    contents
}

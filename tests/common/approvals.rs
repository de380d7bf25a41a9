//! What the tests of two people share: a database whose policy asks for an approval, a requester and an approver.

use std::sync::{Arc, Mutex};

use postgres::error::DbError;
use postgres::{Client, NoTls};

pub use crate::common::session::{arm, number, pass, refused, text};
use crate::common::{Database, Refusal, Server, wait_until};

/// Changes all rows of `t`, which are more than the policy allows.
pub const WRITE: &str = "UPDATE t SET a = 9";

/// A database with a table `t` of five rows that the policy `p` limits to three, a requester and an approver.
pub struct Stage {
    pub db: Database,
    pub admin: Client,
    pub requester: String,
    pub approver: String,
}

impl Stage {
    /// On the server that all tests share, with `setup` run by a superuser after all else.
    pub fn new(setup: &str) -> Stage {
        Stage::on(Server::shared(), setup)
    }

    pub fn on(server: &Server, setup: &str) -> Stage {
        let db = server.database();
        let mut admin = db.admin();
        let (requester, approver) = (db.role("requester"), db.role("approver"));
        pass(
            &mut admin,
            &format!(
                "CREATE TABLE t (id int PRIMARY KEY, a int NOT NULL DEFAULT 0);
                 INSERT INTO t SELECT generate_series(1, 5);
                 GRANT ALL ON t TO PUBLIC;
                 GRANT EXECUTE ON FUNCTION writeguard.approve, writeguard.reject TO {approver};
                 GRANT SELECT ON writeguard.pending TO {approver};
                 SELECT writeguard.set_policy('p', tables => '{{public.t}}', max_rows => 3)"
            ),
        );
        pass(&mut admin, setup);
        Stage { db, admin, requester, approver }
    }

    pub fn requester(&self) -> Client {
        self.db.connect(&self.requester)
    }

    pub fn approver(&self) -> Client {
        self.db.connect(&self.approver)
    }

    /// A requester's session, and what the server tells it besides results.
    pub fn listening(&self) -> (Client, Told) {
        let told = Told::default();
        let told_to = told.clone();
        let mut config = self.db.config(&self.requester);
        config.notice_callback(move |notice| told_to.0.lock().unwrap().push(notice));
        (config.connect(NoTls).unwrap(), told)
    }

    /// A number that a superuser sees.
    #[track_caller]
    pub fn number(&mut self, sql: &str) -> i64 {
        number(&mut self.admin, sql)
    }

    /// How many rows of `t` have the value that [`WRITE`] gives them.
    #[track_caller]
    pub fn changed(&mut self) -> i64 {
        self.number("SELECT count(*) FROM t WHERE a = 9")
    }

    /// Runs what no limit stops.
    #[track_caller]
    pub fn unguarded(&mut self, sql: &str) {
        pass(&mut self.admin, &format!("SET writeguard.enabled = off; {sql}; RESET writeguard.enabled"));
    }

    /// Rows and approval of the `overridden` events.
    pub fn overridden(&mut self) -> Vec<(i64, Option<i64>)> {
        let sql = "SELECT rows, approval FROM writeguard.event WHERE kind = 'overridden' ORDER BY id";
        let rows = self.admin.query(sql, &[]).unwrap();
        rows.iter().map(|row| (row.get(0), row.get(1))).collect()
    }

    /// The reasons of all events of a kind.
    pub fn reasons(&mut self, kind: &str) -> Vec<String> {
        let sql = "SELECT coalesce(reason, '') FROM writeguard.event WHERE kind = $1 ORDER BY id";
        self.admin.query(sql, &[&kind]).unwrap().iter().map(|row| row.get(0)).collect()
    }

    pub fn state(&mut self, request: i64) -> String {
        let sql = "SELECT state FROM writeguard.request WHERE id = $1";
        self.admin.query_one(sql, &[&request]).unwrap().get(0)
    }

    /// A new request of the requester's, and the token that the approver got for it.
    #[track_caller]
    pub fn approved(&self, statement: &str) -> (i64, String) {
        let id = request(&mut self.requester(), statement, &[]);
        (id, approve(&mut self.approver(), id))
    }
}

/// What a server told besides results.
#[derive(Clone, Default)]
pub struct Told(Arc<Mutex<Vec<DbError>>>);

impl Told {
    /// Severities and messages since this was asked last.
    pub fn take(&self) -> Vec<(String, String)> {
        let told = std::mem::take(&mut *self.0.lock().unwrap());
        told.iter().map(|notice| (notice.severity().to_owned(), notice.message().to_owned())).collect()
    }
}

#[track_caller]
pub fn request(client: &mut Client, statement: &str, parameters: &[Option<&str>]) -> i64 {
    client
        .query_one("SELECT writeguard.request($1::text, 'tests', $2::text[])", &[&statement, &parameters])
        .unwrap_or_else(|error| panic!("no request: {:?}", Refusal::of(&error)))
        .get(0)
}

#[track_caller]
pub fn approve(client: &mut Client, request: i64) -> String {
    text(client, &format!("SELECT writeguard.approve({request})"))
}

/// Waits until a session with this process id waits for a lock.
#[track_caller]
pub fn wait_for_lock_of(admin: &mut Client, pid: i64) {
    let waits = format!("SELECT count(*) FROM pg_stat_activity WHERE pid = {pid} AND wait_event_type = 'Lock'");
    wait_until(20, || number(admin, &waits) == 1);
}

#[track_caller]
pub fn pid(client: &mut Client) -> i64 {
    number(client, "SELECT pg_backend_pid()")
}

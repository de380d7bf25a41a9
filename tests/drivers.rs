//! The drivers that people have: JDBC, psycopg 3 and node-postgres. Each runs a small program of tests/drivers/ and
//! sees the limits, exactly, and all fields of the refusal, with and without PgBouncer in between; the data is looked at
//! from here after each step.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::OnceLock;

use crate::common::Server;
use crate::common::approvals::*;
use crate::common::pool::{Pool, pool_keeps_prepared_statements};
use serde_json::Value;

/// JDBC knows no sockets of the file system.
fn server() -> &'static Server {
    static SERVER: OnceLock<Server> = OnceLock::new();
    SERVER.get_or_init(|| Server::start(&["listen_addresses = '127.0.0.1'"]))
}

/// A driver's program, which waits after each of its steps.
struct Driver {
    stage: Stage,
    _pool: Option<Pool>,
    process: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    started: bool,
}

impl Driver {
    /// The program's arguments are completed with host, port, user, database and a token. `pool_mode`: through
    /// PgBouncer in that mode.
    fn start(mut command: Command, pool_mode: Option<&str>) -> Driver {
        let stage = Stage::on(
            if pool_mode.is_some() { Server::shared() } else { server() },
            "CREATE TABLE u (id int PRIMARY KEY, a int NOT NULL DEFAULT 0);
             INSERT INTO u SELECT generate_series(1, 5);
             GRANT ALL ON u TO PUBLIC;
             SELECT writeguard.set_policy('q', tables => '{public.u}', max_rows_per_transaction => 3)",
        );
        let write = "UPDATE t SET a = 9 WHERE id <= $1";
        let id = request(&mut stage.requester(), write, &[Some("5")]);
        let token = approve(&mut stage.approver(), id);
        let pool = pool_mode.map(|mode| Pool::start_for_drivers(&stage, mode));
        let port = pool.as_ref().map_or_else(|| server().port(), |pool| pool.port);
        command.args(["127.0.0.1", &port.to_string(), &stage.requester, &stage.db.name, &token]);
        for name in ["PGOPTIONS", "PGSERVICE", "PGAPPNAME", "PGPASSWORD", "JAVA_TOOL_OPTIONS"] {
            command.env_remove(name);
        }
        let spawned = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
        let mut process = spawned.unwrap_or_else(|error| panic!("{command:?}: {error}; run `make prepare`"));
        let (input, output) = (process.stdin.take().unwrap(), BufReader::new(process.stdout.take().unwrap()));
        Driver { stage, _pool: pool, process, input, output, started: false }
    }

    /// Runs the next step, which has to be this one, on rows that nobody has changed; gives what the program saw.
    #[track_caller]
    fn step(&mut self, name: &str) -> Value {
        if self.started {
            self.input.write_all(b"\n").unwrap();
        }
        self.started = true;
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        assert!(!line.is_empty(), "the program ended before its step {name:?}");
        let seen: Value = serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line}"));
        assert_eq!(seen["step"], name, "{line}");
        seen
    }

    /// How many rows of a table are changed, as another connection sees it, which afterwards are not any more.
    #[track_caller]
    fn changed(&mut self, table: &str) -> i64 {
        let changed = self.stage.number(&format!("SELECT count(*) FROM {table} WHERE a = 9"));
        if changed > 0 {
            self.stage.unguarded(&format!("UPDATE {table} SET a = 0"));
        }
        changed
    }

    /// A step that tells these rows, after which `changed` of them are to be seen by others.
    #[track_caller]
    fn passes(&mut self, name: &str, rows: impl Into<Value>, table: &str, changed: i64) {
        let seen = self.step(name);
        assert_eq!(seen["rows"], rows.into(), "{seen}");
        assert_eq!(self.changed(table), changed, "{seen}");
    }

    /// A step that is refused with all that belongs to a refusal and changes nothing.
    #[track_caller]
    fn refused(&mut self, name: &str, table: &str) {
        let seen = self.step(name);
        let (policy, scope) = if table == "t" { ("p", "statement") } else { ("q", "transaction") };
        let text = |field: &str| seen[field].as_str().unwrap_or_else(|| panic!("no {field}: {seen}")).to_owned();
        assert_eq!(text("sqlstate"), "WG001", "{seen}");
        assert!(
            text("message").contains(&format!("table \"public.{table}\" exceeds the limit of 3 rows per {scope}")),
            "{seen}"
        );
        assert!(text("detail").starts_with(&format!("Policy \"{policy}\" allows 3 rows per {scope}")), "{seen}");
        assert!(text("detail").contains("number 4"), "{seen}");
        // The next command to type.
        assert!(text("hint").contains("writeguard.request("), "{seen}");
        assert_eq!((&text("schema")[..], &text("table")[..]), ("public", table), "{seen}");
        assert_eq!(self.changed(table), 0, "{seen}");
    }

    /// A step in a transaction that was refused before.
    #[track_caller]
    fn aborted(&mut self, name: &str) {
        let seen = self.step(name);
        assert_eq!(seen["sqlstate"], "25P02", "{seen}");
        assert_eq!(self.changed("t"), 0);
    }

    /// The program has no more steps and was content with what it saw.
    #[track_caller]
    fn end(mut self) {
        self.input.write_all(b"\n").unwrap();
        let mut rest = String::new();
        self.output.read_line(&mut rest).unwrap();
        assert_eq!(rest, "");
        assert!(self.process.wait().unwrap().success());
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn program(name: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/drivers").join(name)
}

fn jdbc(pool_mode: Option<&str>) {
    let mut command = Command::new("java");
    command.args(["-XX:TieredStopAtLevel=1", "-cp", "/usr/share/java/postgresql.jar"]).arg(program("Jdbc.java"));
    let mut driver = Driver::start(command, pool_mode);
    driver.passes("exactly", 3, "t", 3);
    driver.refused("past", "t");
    driver.passes("prepared", 3, "t", 3);
    driver.refused("prepared past", "t");
    driver.passes("transaction", 3, "t", 0);
    driver.passes("transaction committed", 3, "t", 3);
    driver.refused("transaction past", "t");
    driver.aborted("transaction aborted");
    driver.passes("fetch", 3, "t", 3);
    driver.refused("fetch past", "t");
    driver.passes("write while fetching", 5, "t", 5);
    driver.passes("batch", vec![1, 1, 1], "u", 3);
    driver.refused("batch past", "u");
    driver.passes("token", 5, "t", 5);
    driver.refused("token spent", "t");
    driver.end();
}

fn psycopg(pool_mode: Option<&str>) {
    // Debian's Python, which has Debian's psycopg.
    let mut command = Command::new("/usr/bin/python3");
    command.arg(program("pipelines.py"));
    let mut driver = Driver::start(command, pool_mode);
    driver.passes("exactly", 3, "t", 3);
    driver.refused("past", "t");
    driver.passes("prepared", 3, "t", 3);
    driver.refused("prepared past", "t");
    driver.passes("pipeline", vec![3, 2], "t", 3);
    driver.refused("pipeline past", "t");
    driver.passes("pipeline budget", vec![2, 1], "u", 3);
    driver.refused("pipeline budget past", "u");
    driver.passes("pipeline budget synced", vec![2, 2], "u", 4);
    driver.refused("many past", "u");
    driver.passes("transaction", 3, "t", 0);
    driver.refused("transaction past", "t");
    driver.aborted("transaction aborted");
    driver.passes("token", 5, "t", 5);
    driver.refused("token spent", "t");
    driver.end();
}

fn node_postgres(pool_mode: Option<&str>) {
    let mut command = Command::new("node");
    // Debian's package, or what `make prepare` unpacks where Debian's cannot be installed.
    command.arg(program("node-postgres.js"));
    command.env("NODE_PATH", "/usr/share/nodejs:/usr/local/share/pg_writeguard/nodejs");
    let mut driver = Driver::start(command, pool_mode);
    driver.passes("exactly", 3, "t", 3);
    driver.refused("past", "t");
    driver.passes("prepared", 3, "t", 3);
    driver.refused("prepared past", "t");
    let queue: Vec<Value> = vec![3.into(), "WG001".into(), 1.into()];
    driver.passes("queue", queue, "t", 3);
    driver.passes("transaction", 3, "t", 0);
    driver.refused("transaction past", "t");
    driver.aborted("transaction aborted");
    driver.passes("cursor", vec![2, 1], "t", 3);
    driver.refused("cursor past", "t");
    driver.passes("token", 5, "t", 5);
    driver.refused("token spent", "t");
    driver.end();
}

/// The modes of PgBouncer in which a driver that prepares statements works at all: 1.20 and older lose them between
/// transactions.
fn pool_modes() -> &'static [&'static str] {
    if pool_keeps_prepared_statements() { &["session", "transaction"] } else { &["session"] }
}

#[test]
fn jdbc_sees_it_all() {
    jdbc(None);
}

#[test]
fn psycopg_sees_it_all() {
    psycopg(None);
}

#[test]
fn node_postgres_sees_it_all() {
    node_postgres(None);
}

#[test]
fn jdbc_sees_it_all_through_a_pool() {
    pool_modes().iter().for_each(|mode| jdbc(Some(mode)));
}

#[test]
fn psycopg_sees_it_all_through_a_pool() {
    pool_modes().iter().for_each(|mode| psycopg(Some(mode)));
}

#[test]
fn node_postgres_sees_it_all_through_a_pool() {
    pool_modes().iter().for_each(|mode| node_postgres(Some(mode)));
}

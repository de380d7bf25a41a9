//! A session that gets no memory any more loses its statement, or itself at the worst, and nobody else notices: the server stays up, other sessions
//! go on, and whatever the guard could not allocate for, no covered write gets past a limit.
//!
//! Each statement is tried again and again, with one allocation more before there is nothing: at first for what Rust asks
//! for, where the default is to end the process and the whole server with it, then for PostgreSQL too.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use crate::common::{Database, Refusal, Server, c, run, server_command};
use postgres::{Client, SimpleQueryMessage};

const SETUP: &str = "
    CREATE TABLE t (id int PRIMARY KEY, v int NOT NULL DEFAULT 0, note text);
    INSERT INTO t SELECT i, 0, repeat('x', 100) FROM generate_series(1, 10) AS i;
    CREATE TABLE free (LIKE t INCLUDING ALL);
    INSERT INTO free TABLE t;
    CREATE TABLE watched (LIKE t INCLUDING ALL);
    INSERT INTO watched TABLE t;
    CREATE TABLE parted (LIKE t INCLUDING ALL) PARTITION BY RANGE (id);
    CREATE TABLE parted_1 PARTITION OF parted FOR VALUES FROM (1) TO (6);
    CREATE TABLE parted_2 PARTITION OF parted FOR VALUES FROM (6) TO (20);
    INSERT INTO parted TABLE t;
    CREATE FUNCTION tries() RETURNS int LANGUAGE plpgsql AS $$
    BEGIN
        FOR i IN 1..3 LOOP
            BEGIN
                UPDATE t SET v = v + 1 WHERE id = i;
                RAISE EXCEPTION 'back';
            EXCEPTION WHEN raise_exception THEN
                UPDATE t SET v = v + 1 WHERE id = i;
            END;
        END LOOP;
        RETURN 1;
    END $$;
    SELECT writeguard.set_policy('p', tables => '{public.t, public.parted}', operations => '{update,delete,truncate,drop}',
        max_rows => 3, max_rows_per_transaction => 5, rate_rows => 100000, override => 'flag', undo => '1 day');
    SELECT writeguard.set_policy('w', tables => '{public.watched}', max_rows => 3, mode => 'observe');
    SELECT writeguard.set_policy('d', tables => '{public.free}', operations => '{delete}', max_rows => 3);";

/// What a session does when memory runs out. Each is within its limits, or refused, or overridden.
const STATEMENTS: [&str; 17] = [
    "UPDATE t SET v = v + 1 WHERE id <= 3",
    "UPDATE t SET v = v + 1",
    "DELETE FROM t",
    "TRUNCATE t",
    "DROP TABLE t",
    "UPDATE parted SET v = v + 1 WHERE id BETWEEN 4 AND 8",
    "UPDATE watched SET v = v + 1",
    "UPDATE free SET v = v + 1",
    "SELECT tries()",
    "BEGIN; UPDATE t SET v = v + 1 WHERE id = 1; SAVEPOINT s; UPDATE t SET v = v + 1 WHERE id <= 3; ROLLBACK TO s;
     SAVEPOINT s; UPDATE t SET v = v + 1 WHERE id = 2; RELEASE s; UPDATE t SET v = v + 1 WHERE id = 3; COMMIT",
    "BEGIN; SET LOCAL writeguard.override = on; UPDATE t SET v = v + 1; COMMIT",
    "BEGIN; SET LOCAL writeguard.override = on; SAVEPOINT s; DELETE FROM t; ROLLBACK TO s; UPDATE t SET v = v; ROLLBACK",
    "BEGIN; ALTER TABLE free RENAME TO freed; ALTER TABLE freed RENAME TO free; COMMIT",
    "BEGIN; SET LOCAL writeguard.expect_rows = 2; UPDATE t SET v = v + 1 WHERE id <= 3; COMMIT",
    "SELECT count(*) FROM writeguard.preview('UPDATE t SET v = v + 1', 3)",
    "SELECT writeguard.request('UPDATE t SET v = v + 1', 'because')",
    "SELECT writeguard.set_policy('q', tables => '{public.t}', max_rows => 7); SELECT writeguard.drop_policy('q')",
];

/// These also as the first thing that a session does.
const COLD: [&str; 3] = [STATEMENTS[0], STATEMENTS[4], STATEMENTS[10]];

struct Stage {
    server: Server,
    db: Database,
    admin: Client,
    started: String,
    /// Up to where the log was looked at.
    seen: u64,
}

impl Stage {
    fn new() -> Stage {
        let server = Server::start(&["writeguard.event_timeout = '10s'", "writeguard.blocked_per_minute = 100000"]);
        let library = c::library("no_memory", &server.socket_dir());
        server.stop("fast");
        let bin = std::env::var("PGWG_BIN").expect("PGWG_BIN is set");
        let mut start = server_command(Path::new(&bin).join("pg_ctl"));
        start.env("LD_PRELOAD", &library).args(["start", "-s", "-w", "-D"]).arg(server.data_dir());
        assert!(start.arg("-l").arg(server.socket_dir().join("log")).status().expect("pg_ctl").success());
        let db = server.database();
        let mut admin = db.admin();
        let functions = format!(
            "CREATE FUNCTION give_no_memory(bool, int, int) RETURNS void LANGUAGE c AS '{0}';
             CREATE FUNCTION give_memory() RETURNS bigint LANGUAGE c AS '{0}';",
            library.display()
        );
        pass(&mut admin, &functions);
        pass(&mut admin, SETUP);
        let started = started(&mut admin);
        Stage { server, db, admin, started, seen: 0 }
    }

    /// The same server as before, and nothing in its log that must not be there.
    #[track_caller]
    fn is_well(&mut self, what: &str) {
        let bad = self.bad_lines();
        assert!(!self.admin.is_closed(), "{what}: another session was lost\n{bad}");
        assert_eq!(started(&mut self.admin), self.started, "{what}: the server was started again");
        assert!(bad.is_empty(), "{what}: {bad}");
    }

    /// What was logged since the last look and must not be there.
    fn bad_lines(&mut self) -> String {
        let mut file = File::open(self.server.socket_dir().join("log")).expect("the log");
        file.seek(SeekFrom::Start(self.seen)).expect("seek");
        let mut log = Vec::new();
        self.seen += file.read_to_end(&mut log).expect("the log") as u64;
        let log = String::from_utf8_lossy(&log);
        let bad = ["PANIC", "terminated by signal", "panicked", "while in", "memory allocation of"];
        log.lines().filter(|line| bad.iter().any(|bad| line.contains(bad))).collect::<Vec<_>>().join("\n")
    }
}

#[track_caller]
fn pass(client: &mut Client, sql: &str) {
    client.batch_execute(sql).unwrap_or_else(|error| panic!("{sql}: {:?}", Refusal::of(&error)));
}

fn started(client: &mut Client) -> String {
    client.query_one("SELECT pg_postmaster_start_time()::text", &[]).expect("the server lives").get(0)
}

fn number(client: &mut Client, sql: &str) -> i64 {
    client.query_one(sql, &[]).unwrap_or_else(|error| panic!("{sql}: {error:?}")).get(0)
}

/// How often there was none; nothing where the session could not even be asked.
fn give_memory(client: &mut Client) -> Option<i64> {
    for _ in 0..50 {
        if let Ok(messages) = client.simple_query("SELECT give_memory()") {
            return messages.iter().find_map(|message| match message {
                SimpleQueryMessage::Row(row) => row.get(0)?.parse().ok(),
                _ => None,
            });
        }
    }
    None
}

/// Tries a statement with ever more memory, until it has all that it wants. `warm`: the session has done the same before.
fn starve(stage: &mut Stage, sql: &str, only_ours: bool, warm: bool) -> (usize, usize) {
    let (mut tries, mut failed) = (0, 0);
    let mut client = stage.db.admin();
    let mut after = 0;
    loop {
        if !warm || client.is_closed() {
            client = stage.db.admin();
        }
        if warm {
            let _ = client.batch_execute(sql);
            let _ = client.batch_execute("ROLLBACK");
        }
        pass(&mut stage.admin, "UPDATE free SET v = 0");
        let what = format!("{sql}, after {after}, {}", if only_ours { "ours" } else { "all" });
        // Where PostgreSQL has none either, it is soon back: an error can be told only with memory, and of errors about
        // errors PostgreSQL itself takes five before it panics.
        let most = if only_ours { 1_000_000 } else { 1 + after % 3 };
        pass(&mut client, &format!("SELECT give_no_memory({only_ours}, {after}, {most})"));
        let result = client.batch_execute(sql);
        tries += 1;
        failed += usize::from(result.is_err());
        if let Err(error) = &result
            && only_ours
        {
            let refusal = Refusal::of(error);
            // Of a setting's value PostgreSQL itself says no more.
            let ordinary =
                ["53200", "22023"].contains(&refusal.sqlstate.as_str()) || refusal.sqlstate.starts_with("WG");
            assert!(ordinary, "{what}: {refusal:?}");
        }
        if is_over(&client, &result) {
            // PostgreSQL may end a session that has no memory for an error.
            assert!(!only_ours, "{what}: {result:?}");
            stage.is_well(&what);
            after += 1;
            continue;
        }
        let _ = client.batch_execute("ROLLBACK");
        let Some(refused) = give_memory(&mut client) else {
            assert!(!only_ours, "{what}");
            stage.is_well(&what);
            after += 1;
            continue;
        };
        stage.is_well(&what);
        // It is a session like any other again, and its limits hold.
        let refusal = client.batch_execute("UPDATE t SET v = -1").expect_err("no limit any more");
        assert_eq!(Refusal::of(&refusal).sqlstate, "WG001", "{what}");
        pass(&mut client, "BEGIN; UPDATE t SET v = v WHERE id <= 3; ROLLBACK");
        if refused == 0 {
            return (tries, failed);
        }
        after += 1 + after / 3;
    }
}

/// Whether that was the end of the session.
fn is_over(client: &Client, result: &Result<(), postgres::Error>) -> bool {
    let is_fatal = |error: &postgres::Error| error.as_db_error().is_some_and(|error| error.severity() == "FATAL");
    client.is_closed() || result.as_ref().is_err_and(is_fatal)
}

/// The system's limit of a process's memory: so many bytes more than it has now; none: no limit.
fn limit_memory(pid: i32, more: Option<u64>) {
    let limit = match more {
        None => "unlimited".to_owned(),
        Some(more) => {
            let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("its status");
            let line = status.lines().find_map(|line| line.strip_prefix("VmSize:")).expect("its size");
            let size: u64 = line.trim().trim_end_matches(" kB").parse().expect("a number");
            (size * 1024 + more).to_string()
        }
    };
    run(server_command("prlimit").args(["--pid", &pid.to_string(), &format!("--as={limit}:")]));
}

/// The text of a statement is converted from the client's encoding to the database's, and by us to UTF-8.
#[test]
fn long_texts_that_are_converted() {
    const LETTERS: usize = 1_500_000;
    const MB: u64 = 1024 * 1024;
    let server = Server::start(&["log_min_error_statement = panic", "writeguard.event_timeout = '10s'"]);
    for (encoding, letter) in [("LATIN1", "ü"), ("EUC_JP", "日"), ("UTF8", "ü")] {
        let name = format!("in_{}", encoding.to_lowercase());
        let create = format!("CREATE DATABASE {name} ENCODING '{encoding}' LOCALE 'C' TEMPLATE template0");
        pass(&mut server.postgres(), &create);
        let db = server.existing(&name);
        let mut admin = db.admin();
        pass(&mut admin, "CREATE EXTENSION pg_writeguard");
        pass(&mut admin, SETUP);
        let begun = started(&mut admin);
        let text = letter.repeat(LETTERS);
        let (mut recorded, mut without_memory) = (0, 0);
        for sql in [
            format!("UPDATE t SET v = -1 /*{text}*/"),
            format!("UPDATE t SET note = '{text}'"),
            format!("UPDATE watched SET v = v + 1 /*{text}*/"),
            format!("BEGIN; SET LOCAL writeguard.override = on; UPDATE t SET note = '{text}' WHERE id > 0; ROLLBACK"),
            format!("SELECT writeguard.statement_hash('{text}')"),
            format!("SELECT writeguard.request('UPDATE t SET v = v /*{text}*/', '{letter}')"),
            format!("SELECT count(*) FROM writeguard.preview('UPDATE t SET note = ''{text}''')"),
            format!(
                "SELECT count(*) FROM writeguard.import_policies('[{{\"name\": \"i\", \"comment\": \"{text}\"}}]')"
            ),
        ] {
            for megabytes in [0, 4, 12, 25, 50, 200] {
                let what = format!("{encoding}, {} with {megabytes} MB", &sql[..20]);
                let mut client = db.admin();
                let pid: i32 = client.query_one("SELECT pg_backend_pid()", &[]).expect("its process").get(0);
                // What its first statement loads.
                let _ = client.batch_execute("UPDATE t SET v = -1");
                let events = "SELECT count(*) FROM writeguard.event WHERE kind = 'blocked'";
                let before = number(&mut admin, events);
                limit_memory(pid, Some(megabytes * MB));
                let result = client.batch_execute(&sql);
                let is_over = is_over(&client, &result);
                if !is_over {
                    limit_memory(pid, None);
                }
                // A session that ends may have no memory for a last word either.
                let is_mute = is_over && result.as_ref().is_err_and(|error| error.as_db_error().is_none());
                match result.as_ref().map_err(|error| if is_mute { None } else { Some(Refusal::of(error)) }) {
                    Ok(()) => assert!(!sql.starts_with("UPDATE t"), "{what}"),
                    Err(None) => without_memory += 1,
                    Err(Some(refusal)) if refusal.sqlstate == "WG001" => {
                        recorded += 1;
                        assert_eq!(number(&mut admin, events), before + 1, "{what}");
                    }
                    // More than a comment may have.
                    Err(Some(refusal)) if refusal.sqlstate == "WG007" => {
                        assert!(sql.contains("import_policies"), "{what}")
                    }
                    Err(Some(refusal)) => {
                        without_memory += 1;
                        assert!(["53200", "54000"].contains(&refusal.sqlstate.as_str()), "{what}: {refusal:?}");
                    }
                }
                assert!(!server.log().contains("terminated by signal"), "{what}");
                assert_eq!(started(&mut admin), begun, "{what}: the server was started again");
                if !is_over {
                    let _ = client.batch_execute("ROLLBACK");
                    let refused = client.batch_execute("UPDATE t SET v = -1").expect_err("no limit any more");
                    assert_eq!(Refusal::of(&refused).sqlstate, "WG001", "{what}");
                }
            }
        }
        println!("{encoding}: {recorded} recorded, {without_memory} without memory");
        assert!(recorded > 0 && without_memory > 0);
    }
    let log = server.log();
    for bad in ["PANIC", "terminated by signal", "while in"] {
        assert!(!log.contains(bad), "{bad}");
    }
}

#[test]
fn what_rust_asks_for() {
    let mut stage = Stage::new();
    for sql in STATEMENTS {
        for warm in [true, false] {
            // What a session loads before its first write is the same for each of them.
            if !warm && !COLD.contains(&sql) {
                continue;
            }
            let (tries, failed) = starve(&mut stage, sql, true, warm);
            println!("{tries} times, {failed} failed: {sql}");
        }
    }
    assert_eq!(number(&mut stage.admin, "SELECT count(*) FROM t WHERE v = -1"), 0);
}

#[test]
fn what_anybody_asks_for() {
    let mut stage = Stage::new();
    for sql in STATEMENTS.into_iter().step_by(3) {
        let (tries, failed) = starve(&mut stage, sql, false, true);
        println!("{tries} times, {failed} failed: {sql}");
    }
    assert_eq!(number(&mut stage.admin, "SELECT count(*) FROM t WHERE v = -1"), 0);
}

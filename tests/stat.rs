//! Statistics of what statements change: exact, in a table of a fixed size, back after restarts and crashes.

use std::fs;
use std::thread;

use crate::common::limits::{number, pass, refuse};
use crate::common::{Database, Server, expect_refusal, wait_until};
use postgres::Client;

/// A database in which a policy without limits covers everything, with a table of a thousand rows.
struct Stage {
    db: Database,
    admin: Client,
    writer: Client,
    role: String,
}

impl Stage {
    fn new() -> Stage {
        Stage::on(Server::shared())
    }

    fn on(server: &Server) -> Stage {
        let db = server.database();
        let role = db.role("writer");
        let mut admin = db.admin();
        pass(
            &mut admin,
            &format!(
                "GRANT CREATE ON SCHEMA public TO {role}; SET ROLE {role};
                 CREATE TABLE t (id int PRIMARY KEY, v int NOT NULL DEFAULT 0);
                 INSERT INTO t SELECT generate_series(1, 1000); RESET ROLE;
                 SELECT writeguard.set_policy('learn', mode => 'observe')"
            ),
        );
        let writer = db.connect(&role);
        Stage { db, admin, writer, role }
    }

    #[track_caller]
    fn pass(&mut self, sql: &str) {
        pass(&mut self.writer, sql);
    }

    /// All rows, the role as `me` where it is the writer.
    fn stat(&mut self) -> Vec<String> {
        stat(&mut self.admin, &self.role)
    }
}

fn stat(admin: &mut Client, role: &str) -> Vec<String> {
    let sql = "SELECT concat_ws(' ', relation, CASE role WHEN $1 THEN 'me' ELSE role END, operation, statements, rows,
                 largest, refused, overridden, histogram)
               FROM writeguard.stat ORDER BY relation, operation, role";
    admin.query(sql, &[&role]).expect("the view").iter().map(|row| row.get(0)).collect()
}

#[test]
fn statements_are_counted_by_their_rows() {
    let mut stage = Stage::new();
    assert!(stage.stat().is_empty());
    for n in 1..=10 {
        stage.pass(&format!("UPDATE t SET v = 1 WHERE id = {n}"));
    }
    stage.pass("UPDATE t SET v = 1 WHERE id <= 2");
    stage.pass("UPDATE t SET v = 1 WHERE id <= 3");
    stage.pass("UPDATE t SET v = 1 WHERE id <= 4");
    stage.pass("UPDATE t SET v = 1");
    // No row is no statement.
    stage.pass("UPDATE t SET v = 1 WHERE id = 0");
    stage.writer.execute("DELETE FROM t WHERE id > $1", &[&990]).unwrap();
    assert_eq!(
        stage.stat(),
        ["public.t me delete 1 10 10 0 0 {0,0,0,1}", "public.t me update 14 1019 1000 0 0 {10,2,1,0,0,0,0,0,0,1}",]
    );
    // It is the same for all sessions, and a table without a policy is not in it.
    let mut other = stage.db.connect(&stage.role);
    pass(&mut other, "UPDATE t SET v = 2 WHERE id <= 2");
    assert_eq!(stage.stat()[1], "public.t me update 15 1021 1000 0 0 {10,3,1,0,0,0,0,0,0,1}");
    stage.pass("BEGIN; UPDATE t SET v = 2 WHERE id = 1; UPDATE t SET v = 2 WHERE id <= 100; ROLLBACK");
    assert_eq!(stage.stat()[1], "public.t me update 17 1122 1000 0 0 {11,3,1,0,0,0,1,0,0,1}", "attempts count");
    pass(&mut stage.admin, "SELECT writeguard.drop_policy('learn')");
    stage.pass("UPDATE t SET v = 2 WHERE id <= 2");
    assert_eq!(stage.stat()[1], "public.t me update 17 1122 1000 0 0 {11,3,1,0,0,0,1,0,0,1}");
    pass(&mut stage.admin, "SELECT writeguard.stat_reset()");
    assert!(stage.stat().is_empty());
    pass(&mut stage.admin, "SELECT writeguard.set_policy('learn', mode => 'observe')");
    stage.pass("UPDATE t SET v = 2 WHERE id <= 2");
    assert_eq!(stage.stat(), ["public.t me update 1 2 2 0 0 {0,1}"]);
}

#[test]
fn a_statement_is_one_with_all_that_it_sets_off() {
    let mut stage = Stage::new();
    stage.pass(
        "CREATE TABLE child (id int REFERENCES t ON DELETE CASCADE);
         INSERT INTO child SELECT 1 + n / 10 FROM generate_series(0, 49) AS n;
         CREATE TABLE parted (id int, v int) PARTITION BY RANGE (id);
         CREATE TABLE low PARTITION OF parted FOR VALUES FROM (0) TO (100);
         CREATE TABLE high PARTITION OF parted FOR VALUES FROM (100) TO (200);
         INSERT INTO parted SELECT n, 0 FROM generate_series(0, 199) AS n;
         CREATE PROCEDURE chunks() LANGUAGE plpgsql AS
         $$BEGIN FOR n IN 0..3 LOOP UPDATE t SET v = 9 WHERE id / 100 = n + 1; COMMIT; END LOOP; END$$",
    );
    // A loop in a function is one statement, each commit of a procedure ends one.
    stage.pass("DO $$BEGIN FOR n IN 1..64 LOOP UPDATE t SET v = 1 WHERE id = n; END LOOP; END$$");
    stage.pass("CALL chunks()");
    // Partitions are one table.
    stage.pass("UPDATE parted SET v = 1 WHERE id BETWEEN 50 AND 149");
    stage.pass("UPDATE low SET v = 1");
    stage.pass("DELETE FROM t WHERE id <= 5");
    stage.pass("MERGE INTO t USING generate_series(6, 9) AS g ON t.id = g WHEN MATCHED AND g > 7 THEN DELETE WHEN MATCHED THEN UPDATE SET v = 3");
    stage.pass("INSERT INTO t SELECT generate_series(1, 20) ON CONFLICT (id) DO UPDATE SET v = 4");
    assert_eq!(
        stage.stat(),
        [
            "public.child me delete 1 50 50 0 0 {0,0,0,0,0,1}",
            "public.parted me update 2 200 100 0 0 {0,0,0,0,0,0,2}",
            "public.t me delete 2 7 5 0 0 {0,1,1}",
            "public.t me update 7 479 100 0 0 {0,1,0,1,0,0,5}",
        ]
    );
}

#[test]
fn refusals_and_overrides_are_counted() {
    let mut stage = Stage::new();
    pass(
        &mut stage.admin,
        "SELECT writeguard.set_policy('p', tables => '{t}', max_rows => 10, override => 'flag', require_where => true)",
    );
    refuse(&mut stage.writer, "UPDATE t SET v = 1 WHERE id <= 50");
    assert_eq!(expect_refusal(stage.writer.batch_execute("UPDATE t SET v = 1")).sqlstate, "WG002");
    // Once for a statement, however often it tries.
    stage.pass(
        "DO $$BEGIN FOR n IN 1..3 LOOP BEGIN UPDATE t SET v = 1 WHERE id <= 50;
         EXCEPTION WHEN SQLSTATE 'WG001' THEN NULL; END; END LOOP; END$$",
    );
    stage.pass("SET writeguard.override = on; UPDATE t SET v = 1 WHERE id <= 50; UPDATE t SET v = 1 WHERE id <= 5");
    assert_eq!(
        stage.stat()[0].split(' ').skip(2).take(1).chain(stage.stat()[0].split(' ').skip(5)).collect::<Vec<_>>()[..4],
        ["update", "50", "3", "1"]
    );
    // A rehearsal is nothing that happened.
    let before = stage.stat();
    pass(&mut stage.writer, "SELECT writeguard.request('UPDATE t SET v = 1 WHERE id <= 70', 'reason')");
    assert_eq!(stage.stat(), before);
    // With a token.
    pass(&mut stage.admin, "SELECT writeguard.set_policy('p', tables => '{t}', max_rows => 10)");
    let id: i64 = stage
        .writer
        .query_one("SELECT writeguard.request('DELETE FROM t WHERE id <= 70', 'reason')", &[])
        .unwrap()
        .get(0);
    let token: String = stage.admin.query_one("SELECT writeguard.approve($1)", &[&id]).unwrap().get(0);
    stage.pass(&format!("SET writeguard.override = on; SET writeguard.token = '{token}'"));
    stage.pass("DELETE FROM t WHERE id <= 70");
    assert_eq!(stage.stat()[0], "public.t me delete 1 70 70 0 1 {0,0,0,0,0,0,1}");
}

#[test]
fn rows_that_vanish_at_once_are_counted() {
    let mut stage = Stage::new();
    stage.pass("ANALYZE t; TRUNCATE t");
    // Nothing limits it, so nothing is scanned: about as many as there are.
    assert_eq!(stage.stat(), ["public.t me truncate 1 1000 1000 0 0 {0,0,0,0,0,0,0,0,0,1}"]);
    pass(
        &mut stage.admin,
        "SELECT writeguard.set_policy('learn', operations => '{truncate,drop}', max_rows => 1, mode => 'observe')",
    );
    stage.pass("INSERT INTO t SELECT generate_series(1, 77); DROP TABLE t");
    assert_eq!(stage.stat()[0], "public.t me drop 1 77 77 0 0 {0,0,0,0,0,0,1}");
}

#[test]
fn roles_are_told_apart_as_events_do() {
    let mut stage = Stage::new();
    let acting = stage.db.role("acting");
    pass(&mut stage.admin, &format!("GRANT {acting} TO {}; GRANT ALL ON t TO {acting}", stage.role));
    stage.pass("UPDATE t SET v = 1 WHERE id = 1");
    stage.pass(&format!("SET ROLE {acting}; UPDATE t SET v = 1 WHERE id <= 2; RESET ROLE"));
    pass(&mut stage.admin, "UPDATE t SET v = 1 WHERE id <= 4");
    let mut rows = stage.stat();
    rows.sort();
    let mut expected = vec![
        format!("public.t {acting} update 1 2 2 0 0 {{0,1}}"),
        "public.t me update 1 1 1 0 0 {1}".into(),
        "public.t postgres update 1 4 4 0 0 {0,0,1}".into(),
    ];
    expected.sort();
    assert_eq!(rows, expected);
}

#[test]
fn many_sessions_count_everything() {
    let stage = Stage::new();
    let threads: Vec<_> = (0..8)
        .map(|n: i32| {
            let mut client = stage.db.connect(&stage.role);
            thread::spawn(move || {
                for round in 0..100 {
                    client.execute("UPDATE t SET v = v + 1 WHERE id = $1", &[&(n * 100 + 1)]).unwrap();
                    if round % 10 == 0 {
                        client
                            .execute("UPDATE t SET v = v + 1 WHERE id BETWEEN $1 AND $1 + 4", &[&(n * 100 + 1)])
                            .unwrap();
                    }
                }
            })
        })
        .collect();
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    let mut stage = stage;
    assert_eq!(stage.stat(), ["public.t me update 880 1200 5 0 0 {800,0,80}"]);
}

#[test]
fn it_is_there_after_a_restart_and_after_a_crash() {
    let server = Server::start(&[]);
    let mut stage = Stage::on(&server);
    stage.pass("UPDATE t SET v = 1 WHERE id = 1; UPDATE t SET v = 1 WHERE id <= 9; DELETE FROM t WHERE id > 998");
    let before = stage.stat();
    assert_eq!(before.len(), 2);
    let Stage { db, admin, writer, role } = stage;
    drop((admin, writer));
    server.restart();
    let mut admin = db.admin();
    assert_eq!(stat(&mut admin, &role), before);
    // What is counted after that comes on top.
    pass(&mut db.connect(&role), "UPDATE t SET v = 1 WHERE id = 1");
    let after = stat(&mut admin, &role);
    assert_eq!(after[1], "public.t me update 3 11 9 0 0 {2,0,0,1}");
    let other = server.database();
    pass(
        &mut other.admin(),
        "CREATE TABLE t AS SELECT 1 AS a; SELECT writeguard.set_policy('p', mode => 'observe'); UPDATE t SET a = 2",
    );
    assert_eq!(number(&mut admin, "SELECT used FROM writeguard.stat_slots"), 3);
    other.drop();
    // A minute later those of a database that is gone are forgotten, and the others are safe from crashes too.
    let stored = "SELECT count(*) FROM writeguard.stat_slots WHERE stored_at > $1::timestamptz";
    let now: String = admin.query_one("SELECT clock_timestamp()::text", &[]).unwrap().get(0);
    let stored = stored.replace("$1", &format!("'{now}'"));
    wait_until(90, || number(&mut admin, "SELECT used FROM writeguard.stat_slots") == 2);
    wait_until(90, || number(&mut admin, &stored) == 1);
    drop(admin);
    server.stop("immediate");
    server.start_again();
    let mut admin = db.admin();
    assert_eq!(stat(&mut admin, &role), after);
    // A file that is damaged does no harm.
    drop(admin);
    server.stop("fast");
    let file = server.data_dir().join("pg_stat/pg_writeguard.stat");
    let text = fs::read_to_string(&file).unwrap();
    fs::write(&file, format!("{{\"database\": 1\n\u{fffd}\n{text}")).unwrap();
    server.start_again();
    let mut admin = db.admin();
    assert_eq!(stat(&mut admin, &role), after);
    assert!(server.log().contains("2 lines of \"pg_stat/pg_writeguard.stat\" cannot be read"));
}

#[test]
fn a_table_that_is_full_makes_room_and_says_so() {
    let server = Server::start(&["writeguard.stat_entries = 16"]);
    let mut stage = Stage::on(&server);
    for n in 0..20 {
        stage.pass(&format!("CREATE TABLE many_{n} (id int); INSERT INTO many_{n} VALUES (1)"));
    }
    for _ in 0..30 {
        stage.pass("UPDATE t SET v = 1 WHERE id = 1");
    }
    for n in 0..20 {
        stage.pass(&format!("UPDATE many_{n} SET id = 2"));
        // What is used stays.
        stage.pass("UPDATE t SET v = 1 WHERE id = 1; UPDATE t SET v = 1 WHERE id = 1");
    }
    let slots = "SELECT concat_ws(' ', slots, used, evicted) FROM writeguard.stat_slots";
    let row: String = stage.admin.query_one(slots, &[]).unwrap().get(0);
    assert_eq!(row, "16 16 5");
    let rows = stage.stat();
    assert!(rows.contains(&"public.t me update 70 70 1 0 0 {70}".to_owned()), "{rows:#?}");
    // A session whose place was given away begins again.
    stage.pass("UPDATE many_0 SET id = 2; UPDATE many_0 SET id = 2");
    let again = stage.stat().into_iter().find(|row| row.starts_with("public.many_0 ")).expect("a row");
    assert!(again.ends_with("2 2 1 0 0 {2}") || again.ends_with("3 3 1 0 0 {3}"), "{again}");
    let problem = "SELECT problem || fix FROM writeguard.check_setup() WHERE subject = 'writeguard.stat_entries'";
    let problem: String = stage.admin.query_one(problem, &[]).unwrap().get(0);
    assert!(problem.contains("= 32"), "{problem}");
}

#[test]
fn it_can_be_switched_off() {
    let server = Server::start(&["writeguard.stat_entries = 0"]);
    let mut stage = Stage::on(&server);
    stage.pass("UPDATE t SET v = 1 WHERE id = 1; UPDATE t SET v = 1");
    assert!(stage.stat().is_empty());
    assert_eq!(number(&mut stage.admin, "SELECT slots + used + evicted FROM writeguard.stat_slots"), 0);
    pass(&mut stage.admin, "SELECT writeguard.stat_reset(); SELECT * FROM writeguard.suggest_policies()");
}

#[test]
fn only_the_owner_resets_and_only_who_monitors_reads() {
    let mut stage = Stage::new();
    let monitor = stage.db.role("monitor");
    pass(&mut stage.admin, &format!("GRANT pg_monitor TO {monitor}"));
    for sql in [
        "SELECT * FROM writeguard.stat",
        "SELECT * FROM writeguard.stat_slots",
        "SELECT writeguard.stat_reset()",
        "SELECT writeguard._stat_numbers()",
        "SELECT * FROM writeguard.suggest_policies()",
    ] {
        assert_eq!(expect_refusal(stage.writer.batch_execute(sql)).sqlstate, "42501", "{sql}");
    }
    let mut monitor = stage.db.connect(&monitor);
    pass(&mut monitor, "SELECT * FROM writeguard.stat; SELECT * FROM writeguard.stat_slots");
    assert_eq!(expect_refusal(monitor.batch_execute("SELECT writeguard.stat_reset()")).sqlstate, "42501");
    // Another database's are not in it.
    stage.pass("UPDATE t SET v = 1 WHERE id = 1");
    let mut other = Stage::new();
    assert!(other.stat().is_empty());
    pass(&mut other.admin, "SELECT writeguard.stat_reset()");
    assert_eq!(stage.stat().len(), 1);
}

/// What is suggested for one table and operation.
fn suggested(
    admin: &mut Client,
    relation: &str,
    operation: &str,
    headroom: &str,
) -> (Option<i64>, Option<i64>, String, String, Option<serde_json::Value>) {
    let sql = format!(
        "SELECT max_rows, refused, chart, note, document FROM writeguard.suggest_policies({headroom}) WHERE relation = $1 AND operation = $2"
    );
    let row = admin.query_one(&sql, &[&relation, &operation]).expect("a suggestion");
    (row.get(0), row.get(1), row.get(2), row.get(3), row.get(4))
}

#[test]
fn limits_are_suggested_from_what_was_seen() {
    let mut stage = Stage::new();
    stage.pass("UPDATE t SET v = 1 WHERE id <= 90");
    for n in 0..9 {
        stage.pass(&format!("UPDATE t SET v = 1 WHERE id = {n} + 1"));
    }
    let (limit, refused, chart, note, document) = suggested(&mut stage.admin, "public.t", "update", "");
    assert_eq!((limit, refused, document), (None, None, None));
    assert_eq!((chart.as_str(), note.as_str()), ("█     ▂", "too little seen: 10 of 100 statements"));
    for n in 0..1990 {
        stage.writer.execute("UPDATE t SET v = 1 WHERE id = $1", &[&(n % 1000 + 1)]).unwrap();
    }
    // One of two thousand may be an exception.
    let (limit, refused, chart, note, document) = suggested(&mut stage.admin, "public.t", "update", "");
    assert_eq!((limit, refused), (Some(10), Some(1)));
    assert_eq!(chart, "█   |  ▁");
    assert_eq!(note, "at most 1 of 2000 would have been refused, the largest of 90 rows");
    assert_eq!(
        document.unwrap(),
        serde_json::json!({
            "name": format!("public.t update {}", stage.role), "tables": ["public.t"], "roles": [stage.role],
            "operations": ["update"], "max_rows": 10,
            "comment": "suggested after 2000 statements, the largest of 90 rows"
        })
    );
    stage.pass("UPDATE t SET v = 1 WHERE id <= 80; UPDATE t SET v = 1 WHERE id <= 70");
    let (limit, refused, _, note, _) = suggested(&mut stage.admin, "public.t", "update", "1.5");
    assert_eq!((limit, refused, note.as_str()), (Some(140), Some(0), "all of them would have passed"));
    let mistakes = ["0.5", "'NaN'", "'Infinity'", "NULL", "-1"];
    for headroom in mistakes {
        let sql = format!("SELECT * FROM writeguard.suggest_policies({headroom})");
        assert_eq!(expect_refusal(stage.admin.batch_execute(&sql)).sqlstate, "WG007", "{headroom}");
    }
}

#[test]
fn suggestions_are_imported_as_they_are() {
    let mut stage = Stage::new();
    stage.pass("CREATE TABLE \"T b\" (\"Ü\" int); INSERT INTO \"T b\" SELECT generate_series(1, 300); CREATE TABLE gone (id int)");
    pass(&mut stage.admin, "INSERT INTO gone VALUES (1)");
    for n in 0..150 {
        stage.pass(&format!("UPDATE \"T b\" SET \"Ü\" = 0 WHERE \"Ü\" = {n} + 1; DELETE FROM t WHERE id BETWEEN {n} * 5 + 1 AND {n} * 5 + 5"));
        pass(&mut stage.admin, "UPDATE gone SET id = id + 1");
    }
    stage.pass("DROP TABLE gone");
    let import = "SELECT name, action FROM writeguard.import_policies(
        (SELECT jsonb_agg(document) FROM writeguard.suggest_policies(3) WHERE document IS NOT NULL))";
    let rows: Vec<(String, String)> =
        stage.admin.query(import, &[]).unwrap().iter().map(|row| (row.get(0), row.get(1))).collect();
    let role = stage.role.clone();
    assert_eq!(
        rows,
        [
            (format!("public.\"T b\" update {role}"), "created".into()),
            (format!("public.t delete {role}"), "created".into())
        ]
    );
    // As long as nothing else is seen they stay what they are.
    let again: Vec<String> = stage.admin.query(import, &[]).unwrap().iter().map(|row| row.get(1)).collect();
    assert_eq!(again, ["unchanged", "unchanged"]);
    // Of the eight rows that the bucket of five ends at, times three.
    stage.pass("DELETE FROM t WHERE id BETWEEN 801 AND 815");
    refuse(&mut stage.writer, "DELETE FROM t WHERE id BETWEEN 816 AND 831");
    // Another operation is not limited by it.
    stage.pass("UPDATE t SET v = 2");
    assert_eq!(number(&mut stage.admin, "SELECT refused FROM writeguard.stat WHERE operation = 'delete'"), 1);
}

#[test]
fn names_in_another_encoding_are_told() {
    let server = Server::shared();
    let mut admin = server.postgres();
    pass(&mut admin, "CREATE DATABASE stat_latin ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0");
    let sql = "CREATE EXTENSION pg_writeguard; SELECT writeguard.set_policy('learn', mode => 'observe');
        CREATE TABLE \"Größe\" (v int); INSERT INTO \"Größe\" VALUES (1); CREATE TABLE t AS TABLE \"Größe\";
        SELECT format('UPDATE %I SET v = v + 1; UPDATE t SET v = v + 1', 'Größe') FROM generate_series(1, 120) \\gexec
        \\t on
        SELECT relation, statements FROM writeguard.stat;
        SELECT document ->> 'name', chart FROM writeguard.suggest_policies();";
    let output = server.psql("stat_latin", "postgres", sql);
    assert!(output.contains("public.\"Größe\" |        120"), "{output}");
    assert!(output.contains("public.\"Größe\" update postgres | @   |"), "{output}");
    // The letters of charts are not to be had there.
    assert!(output.contains("public.t update postgres         | @   |"), "{output}");
    pass(&mut admin, "DROP DATABASE stat_latin WITH (FORCE)");
}

//! Whoever makes the extension's own rows vanish leaves a trace: in the server log, and in the table of events where that is
//! still there.

use crate::common::limits::{number, pass};
use crate::common::{Database, Server, expect_refusal, wait_until};
use postgres::Client;
use serde_json::Value;

/// A database with two policies, three refusals on record and two kept rows.
fn filled(server: &Server) -> (Database, Client) {
    let db = server.database();
    let mut admin = db.admin();
    pass(
        &mut admin,
        "CREATE TABLE t (id int PRIMARY KEY, note text); INSERT INTO t SELECT n FROM generate_series(1, 10) AS n;
         SELECT writeguard.set_policy('p', tables => '{public.t}', max_rows => 1, override => 'flag', undo => '1 day');
         SELECT writeguard.set_policy('q', tables => '{public.t}', max_rows => 9)",
    );
    pass(&mut admin, "BEGIN; SET LOCAL writeguard.override = on; UPDATE t SET note = 'x' WHERE id <= 2; COMMIT");
    for _ in 0..3 {
        expect_refusal(admin.batch_execute("UPDATE t SET note = 'y' WHERE id <= 2"));
    }
    let quiet = "SELECT count(*) FROM writeguard.outbox";
    wait_until(30, || number(&mut admin, quiet) == 0);
    (db, admin)
}

/// The JSON of the log's lines that say what went in a database.
fn told(server: &Server, db: &str) -> Vec<Value> {
    let log = server.log();
    let json = log.lines().filter_map(|line| line.split_once("DETAIL:  ").map(|(_, json)| json));
    let of = json.filter_map(|json| serde_json::from_str::<Value>(json).ok());
    of.filter(|json| {
        json["database"] == db && json["reason"].as_str().is_some_and(|reason| reason.contains(" lost rows: "))
    })
    .collect()
}

#[test]
fn whoever_drops_the_extension_is_in_the_log_with_what_went() {
    let server = Server::start(&[]);
    for (sql, prepared) in [
        ("DROP EXTENSION pg_writeguard", false),
        ("DROP EXTENSION pg_writeguard CASCADE", true),
        ("DROP SCHEMA writeguard CASCADE", false),
        ("DROP OWNED BY dropper CASCADE", false),
        ("DO 'BEGIN EXECUTE ''DROP EXTENSION pg_writeguard''; END'", false),
    ] {
        let (db, mut admin) = filled(&server);
        let events = number(&mut admin, "SELECT count(*) FROM writeguard.event");
        if sql.contains("OWNED") {
            pass(
                &mut admin,
                "CREATE ROLE dropper SUPERUSER; SET allow_system_table_mods = on;
                 UPDATE pg_extension SET extowner = 'dropper'::regrole WHERE extname = 'pg_writeguard';
                 UPDATE pg_shdepend SET refobjid = 'dropper'::regrole WHERE classid = 'pg_extension'::regclass;
                 INSERT INTO pg_shdepend
                     SELECT d.oid, 'pg_extension'::regclass, e.oid, 0, 'pg_authid'::regclass, 'dropper'::regrole, 'o'
                     FROM pg_extension AS e CROSS JOIN pg_database AS d
                     WHERE e.extname = 'pg_writeguard' AND d.datname = current_database()",
            );
        }
        // What is taken back leaves none.
        pass(&mut admin, &format!("BEGIN; {sql}; ROLLBACK"));
        pass(&mut admin, &format!("BEGIN; SAVEPOINT s; {sql}; ROLLBACK TO s; COMMIT"));
        assert_eq!(told(&server, &db.name), Vec::<Value>::new(), "{sql}");
        if prepared {
            pass(&mut admin, &format!("BEGIN; {sql}; PREPARE TRANSACTION 'gone'"));
            pass(&mut admin, "COMMIT PREPARED 'gone'");
        } else {
            pass(&mut admin, sql);
        }
        let told = told(&server, &db.name);
        assert_eq!(told.len(), 1, "{sql}: {told:?}");
        let expected =
            format!("The extension's own tables lost rows: policies 2, events {events}, kept rows 2, requests 0.");
        assert_eq!(told[0]["reason"], expected.as_str(), "{sql}");
        assert_eq!((&told[0]["login"], &told[0]["operation"]), (&"postgres".into(), &"drop".into()));
        assert!(told[0]["statement"].as_str().is_some_and(|statement| statement.contains("DROP")), "{told:?}");
        assert_eq!(number(&mut admin, "SELECT count(*) FROM pg_extension WHERE extname = 'pg_writeguard'"), 0);
        // Nothing hangs on it.
        pass(&mut admin, "UPDATE t SET note = 'free'");
    }
}

#[test]
fn a_truncate_of_the_extension_s_tables_is_told_and_an_event() {
    let server = Server::start(&[]);
    for (tables, reason) in [
        ("writeguard.event", "events "),
        ("writeguard.policy", ": policies 2."),
        ("writeguard.image", ": kept rows 2."),
        ("writeguard.policy, writeguard.image", ": policies 2, kept rows 2."),
    ] {
        let (db, mut admin) = filled(&server);
        let role = db.role("anna");
        expect_refusal(db.connect(&role).batch_execute(&format!("TRUNCATE {tables}")));
        pass(&mut admin, &format!("BEGIN; TRUNCATE {tables}; ROLLBACK"));
        assert_eq!(told(&server, &db.name), Vec::<Value>::new(), "{tables}");
        pass(&mut admin, &format!("TRUNCATE {tables}"));
        let told = told(&server, &db.name);
        assert_eq!(told.len(), 1, "{tables}: {told:?}");
        assert!(told[0]["reason"].as_str().is_some_and(|told| told.contains(reason)), "{told:?}");
        let stored = "SELECT count(*) FROM writeguard.event WHERE kind = 'policy_changed' AND operation = 'truncate'";
        wait_until(30, || number(&mut admin, stored) == 1);
    }
}

/// Tables of others in a schema of that name are nobody's business.
#[test]
fn a_schema_of_somebody_else_is_left_alone() {
    let server = Server::start(&[]);
    let db = server.plain_database();
    let mut admin = db.admin();
    pass(&mut admin, "CREATE SCHEMA writeguard; CREATE TABLE writeguard.policy (n int); TRUNCATE writeguard.policy");
    pass(&mut admin, "DROP SCHEMA writeguard CASCADE");
    assert_eq!(told(&server, &db.name), Vec::<Value>::new());
}

#[test]
fn each_line_of_an_event_names_its_database() {
    let server = Server::start(&[]);
    let (one, _) = filled(&server);
    let (other, _) = filled(&server);
    let log = server.log();
    let json = log.lines().filter_map(|line| line.split_once("DETAIL:  ").map(|(_, json)| json));
    let events: Vec<Value> = json.filter_map(|json| serde_json::from_str::<Value>(json).ok()).collect();
    assert!(events.len() >= 10);
    for db in [&one, &other] {
        assert!(events.iter().filter(|event| event["database"] == db.name.as_str()).count() >= 5);
    }
    assert!(events.iter().all(|event| event["database"].is_string()), "{events:?}");
}

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

/// The events of a database that say what was done to the policy table past the functions, oldest first: login, policy,
/// operation, and what the reason has behind its first words.
fn written(client: &mut Client) -> Vec<(String, String, String, String)> {
    let sql = "SELECT login, policy, operation, reason FROM writeguard.event
               WHERE kind = 'policy_changed' AND relation = 'writeguard.policy' AND operation <> 'alter' ORDER BY id";
    let rows = client.query(sql, &[]).unwrap();
    rows.iter().map(|row| (row.get(0), row.get(1), row.get(2), row.get(3))).collect()
}

/// One event for each policy that a statement changed, and none for what it left as it was.
#[test]
fn a_write_past_the_functions_is_told_and_an_event_with_who_and_what() {
    let server = Server::start(&[]);
    let (db, mut admin) = filled(&server);
    let role = db.role("grantee");
    pass(&mut admin, &format!("GRANT ALL ON SCHEMA writeguard TO {role}; GRANT ALL ON writeguard.policy TO {role}"));
    // owner_only keeps a grantee out.
    expect_refusal(db.connect(&role).batch_execute("DELETE FROM writeguard.policy"));
    let before = number(&mut admin, "SELECT count(*) FROM writeguard.event");
    let mut told = 0;
    for (sql, expected) in [
        ("INSERT INTO writeguard.policy (name, max_rows) VALUES ('new', 7)", vec![("new", "insert", "\"max_rows\":7")]),
        (
            "UPDATE writeguard.policy SET max_rows = max_rows * 10 WHERE name <> 'q'",
            vec![
                ("p", "update", "{\"max_rows\":{\"from\":1,\"to\":10}}"),
                ("new", "update", "{\"max_rows\":{\"from\":7,\"to\":70}}"),
            ],
        ),
        ("UPDATE writeguard.policy SET max_rows = max_rows", vec![]),
        ("BEGIN; DELETE FROM writeguard.policy; ROLLBACK", vec![]),
        ("BEGIN; SAVEPOINT s; DELETE FROM writeguard.policy; ROLLBACK TO s; COMMIT", vec![]),
        (
            "INSERT INTO writeguard.policy (name) VALUES ('new') ON CONFLICT (name) DO UPDATE SET name = 'other'",
            vec![("new", "update", "{\"name\":{\"from\":\"new\",\"to\":\"other\"}}")],
        ),
        (
            "MERGE INTO writeguard.policy AS p USING (VALUES ('other'), ('third')) AS n (name) ON p.name = n.name
             WHEN MATCHED THEN DELETE WHEN NOT MATCHED THEN INSERT (name) VALUES (n.name)",
            vec![("other", "delete", "\"max_rows\":70"), ("third", "insert", "\"mode\":\"enforce\"")],
        ),
        (
            "SET session_replication_role = replica; DELETE FROM writeguard.policy WHERE name = 'third'",
            vec![("third", "delete", "\"name\":\"third\"")],
        ),
        ("DO $$ BEGIN DELETE FROM writeguard.policy WHERE name = 'q'; END $$", vec![("q", "delete", "\"max_rows\":9")]),
    ] {
        pass(&mut db.admin(), sql);
        told += expected.len();
        wait_until(30, || written(&mut admin).len() >= told);
        let written = written(&mut admin);
        let new = &written[told - expected.len()..];
        assert_eq!(new.len(), expected.len(), "{sql}: {written:?}");
        for ((login, policy, operation, reason), (name, word, part)) in new.iter().zip(expected) {
            assert_eq!((login.as_str(), policy.as_str(), operation.as_str()), ("postgres", name, word), "{sql}");
            assert!(reason.contains(" past the extension's functions: ") && reason.contains(part), "{sql}: {reason}");
        }
    }
    let mut copy = db.admin();
    let mut writer = copy.copy_in("COPY writeguard.policy (name, max_rows) FROM STDIN").unwrap();
    std::io::Write::write_all(&mut writer, b"copied\t5\n").unwrap();
    writer.finish().unwrap();
    wait_until(30, || written(&mut admin).len() == told + 1);
    let last = written(&mut admin).pop().unwrap();
    assert_eq!((last.1.as_str(), last.2.as_str()), ("copied", "insert"));
    let statement = "SELECT count(*) FROM writeguard.event WHERE policy = 'copied' AND statement LIKE 'COPY %'";
    assert_eq!(number(&mut admin, statement), 1);
    assert_eq!(number(&mut admin, "SELECT count(*) FROM writeguard.event"), before + told as i64 + 1);
    let log = server.log();
    let lines = log.lines().filter(|line| line.contains("pg_writeguard: policy changed, policy "));
    assert_eq!(lines.filter(|line| line.contains(" past the extension's functions: ")).count(), told + 1, "{log}");
}

/// What the functions do is one event as before, also where a trigger of somebody else's writes policies meanwhile.
#[test]
fn what_the_functions_write_is_not_told_twice_and_what_a_trigger_writes_meanwhile_is() {
    let server = Server::start(&[]);
    let (_db, mut admin) = filled(&server);
    let all = "SELECT count(*) FROM writeguard.event WHERE kind = 'policy_changed'";
    let before = number(&mut admin, all);
    pass(
        &mut admin,
        "SELECT writeguard.set_policy('mine', max_rows => 1);
         SELECT writeguard.set_policy('mine', max_rows => 2);
         SELECT * FROM writeguard.import_policies('[{\"name\": \"doc\"}, {\"name\": \"mine\", \"max_rows\": 3}]');
         SELECT writeguard.drop_policy('doc')",
    );
    expect_refusal(admin.batch_execute("SELECT writeguard.set_policy('mine', max_rows => -1)"));
    assert_eq!(number(&mut admin, all), before + 5);
    assert!(written(&mut admin).is_empty());
    // The mark of a call that failed inside its own statement is gone.
    pass(&mut admin, "ALTER TABLE writeguard.policy ADD CONSTRAINT no CHECK (name <> 'no')");
    expect_refusal(admin.batch_execute("SELECT writeguard.set_policy('no', max_rows => 1)"));
    pass(&mut admin, "DELETE FROM writeguard.policy WHERE name = 'mine'");
    wait_until(30, || written(&mut admin).iter().any(|event| event.1 == "mine"));
    pass(
        &mut admin,
        "CREATE FUNCTION widen() RETURNS trigger LANGUAGE plpgsql AS
             'BEGIN UPDATE writeguard.policy SET max_rows = 99 WHERE name = ''q''; RETURN NULL; END';
         CREATE TRIGGER widen AFTER INSERT ON writeguard.policy FOR EACH STATEMENT EXECUTE FUNCTION widen();
         SELECT writeguard.set_policy('last', max_rows => 1)",
    );
    wait_until(30, || written(&mut admin).iter().any(|event| event.1 == "q"));
    assert!(!written(&mut admin).iter().any(|event| event.1 == "last"));
}

/// Ten thousand at once are a hundred events, the last of which says how many more there are.
#[test]
fn a_bulk_of_policies_is_a_bounded_number_of_events_with_the_number_of_all() {
    let server = Server::start(&[]);
    let (_db, mut admin) = filled(&server);
    pass(
        &mut admin,
        "INSERT INTO writeguard.policy (name, tables) SELECT 'n' || n, '{s.none}' FROM generate_series(1, 10000) AS n",
    );
    wait_until(60, || written(&mut admin).len() == 100);
    let last = written(&mut admin).pop().unwrap();
    assert!(last.3.ends_with("And 9900 further changes by the same statement."), "{last:?}");
}

/// Who takes the triggers away, which see these writes, is seen doing that.
#[test]
fn an_alteration_of_the_extension_s_tables_is_told_and_an_event() {
    let server = Server::start(&[]);
    let (db, mut admin) = filled(&server);
    let stored = "SELECT count(*) FROM writeguard.event WHERE kind = 'policy_changed' AND operation = 'alter'";
    let mut expected = 0;
    for (sql, events) in [
        ("ALTER TABLE writeguard.policy DISABLE TRIGGER policy_written", 1),
        ("BEGIN; ALTER TABLE writeguard.policy DISABLE TRIGGER ALL; ROLLBACK", 0),
        ("SET search_path = writeguard; ALTER TABLE policy ENABLE ALWAYS TRIGGER policy_written; RESET search_path", 1),
        ("DO $$ BEGIN DROP TRIGGER policy_written ON writeguard.policy; END $$", 1),
        ("DROP TRIGGER IF EXISTS policy_written ON writeguard.policy", 1),
        ("ALTER TRIGGER owner_only ON writeguard.event RENAME TO owner_too", 1),
        ("CREATE RULE none AS ON INSERT TO writeguard.policy DO INSTEAD NOTHING", 1),
        ("DROP RULE none ON writeguard.policy", 1),
        ("CREATE TRIGGER none BEFORE INSERT ON writeguard.image EXECUTE FUNCTION writeguard._owner_only()", 1),
        ("ALTER TABLE t ADD c int; ALTER TABLE IF EXISTS none ADD c int; ALTER TABLE IF EXISTS none.none ADD c int", 0),
        ("CREATE TABLE none (id int); DROP TABLE none; DROP TABLE IF EXISTS none.none", 0),
    ] {
        pass(&mut admin, sql);
        expected += events;
        wait_until(30, || number(&mut admin, stored) >= expected);
        assert_eq!(number(&mut admin, stored), expected, "{sql}");
    }
    let role = db.role("anna");
    expect_refusal(db.connect(&role).batch_execute("ALTER TABLE writeguard.policy DISABLE TRIGGER policy_changed"));
    assert_eq!(number(&mut admin, stored), expected);
    let said = "SELECT count(*) FROM writeguard.event WHERE operation = 'alter' AND relation = 'writeguard.policy'
                AND statement LIKE '%DISABLE TRIGGER policy_written%' AND login = 'postgres'";
    assert_eq!(number(&mut admin, said), 1);
}

/// A policy that logical replication brings is in force in sessions that knew the ones before it.
#[test]
fn a_policy_that_replication_brings_is_in_force_and_an_event() {
    let publisher = Server::start(&["wal_level = logical"]);
    let (source, mut admin) = filled(&publisher);
    let subscriber = Server::start(&[]);
    let (_copy, mut target) = filled(&subscriber);
    pass(&mut target, "DELETE FROM writeguard.policy; UPDATE t SET note = 'free'");
    pass(&mut admin, "CREATE PUBLICATION policies FOR TABLE writeguard.policy");
    let address = publisher.address(&source.name);
    pass(
        &mut target,
        &format!("CREATE SUBSCRIPTION policies CONNECTION '{address}' PUBLICATION policies WITH (copy_data = false)"),
    );
    let ready = "SELECT count(*) FROM pg_subscription_rel WHERE srsubstate = 'r'";
    wait_until(60, || number(&mut target, ready) == 1);
    pass(&mut admin, "SELECT writeguard.set_policy('far', tables => '{public.t}', max_rows => 2)");
    wait_until(60, || number(&mut target, "SELECT count(*) FROM writeguard.policy WHERE name = 'far'") == 1);
    expect_refusal(target.batch_execute("UPDATE t SET note = 'limited'"));
    wait_until(30, || written(&mut target).iter().any(|event| event.1 == "far"));
    pass(&mut target, "DROP SUBSCRIPTION policies");
}

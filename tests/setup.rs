//! `check_setup()`: what a DBA should know, each with a next command that mends it.

use std::fs::{self, OpenOptions};
use std::io::Write;

use crate::common::session::pass;
use crate::common::{Database, Refusal, Server, expect_refusal, wait_until};
use postgres::Client;

#[derive(Debug, Clone, PartialEq)]
struct Row {
    severity: String,
    subject: String,
    problem: String,
    fix: String,
}

#[track_caller]
fn check(client: &mut Client) -> Vec<Row> {
    let rows = client
        .query("SELECT severity, subject, problem, fix FROM writeguard.check_setup()", &[])
        .unwrap_or_else(|error| panic!("{:?}", Refusal::of(&error)));
    rows.iter()
        .map(|row| Row { severity: row.get(0), subject: row.get(1), problem: row.get(2), fix: row.get(3) })
        .collect()
}

/// The one row about a subject.
#[track_caller]
fn about(client: &mut Client, subject: &str) -> Row {
    let rows = check(client);
    let mut found = rows.iter().filter(|row| row.subject == subject);
    let (Some(row), None) = (found.next(), found.next()) else {
        panic!("not one row about {subject}: {rows:#?}");
    };
    row.clone()
}

/// There is one row about a subject with that severity and word, and after its fix there is none.
#[track_caller]
fn mended(client: &mut Client, subject: &str, severity: &str, word: &str) {
    let row = about(client, subject);
    assert!(row.severity == severity && row.problem.contains(word), "{row:?}");
    // One at a time, as psql sends them: ALTER SYSTEM takes no other command beside it.
    for command in row.fix.split_inclusive("; ") {
        pass(client, command);
    }
    let reread = |client: &mut Client| check(client).into_iter().filter(|left| *left == row).count() == 0;
    wait_until(20, || reread(client));
}

/// A server of its own, because roles and settings belong to all databases, and a database with a policy.
fn server(lines: &[&str]) -> (Server, Database, Client) {
    let server = Server::start(lines);
    let db = server.database();
    let mut admin = db.admin();
    pass(
        &mut admin,
        "CREATE TABLE t (id int PRIMARY KEY, a int); INSERT INTO t SELECT n, 0 FROM generate_series(1, 5) AS n;
         SELECT writeguard.set_policy('p', tables => '{t,public.*}', max_rows => 3)",
    );
    (server, db, admin)
}

/// Waits until the launcher runs, which is a moment after the server accepts connections.
fn wait_for_launcher(client: &mut Client) {
    wait_until(20, || {
        let sql = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'pg_writeguard launcher'";
        client.query_one(sql, &[]).unwrap().get::<_, i64>(0) == 1
    });
}

fn append(server: &Server, line: &str) {
    let mut conf = OpenOptions::new().append(true).open(server.data_dir().join("postgresql.conf")).unwrap();
    writeln!(conf, "{line}").unwrap();
}

#[test]
fn a_healthy_installation_has_nothing_to_tell() {
    let (_server, _db, mut admin) = server(&[]);
    wait_for_launcher(&mut admin);
    assert_eq!(check(&mut admin), []);
    expect_refusal(admin.batch_execute("UPDATE t SET a = 1"));
    assert_eq!(check(&mut admin), []);
    pass(&mut admin, "SELECT writeguard.drop_policy('p')");
    let rows = check(&mut admin);
    assert_eq!((rows.len(), rows[0].severity.as_str()), (1, "note"), "{rows:#?}");
}

#[test]
fn without_the_preload_it_says_so_and_which_line_to_add() {
    let (server, db, admin) = server(&[]);
    drop(admin);
    for libraries in ["", "'auto_explain, \"$libdir/auto_explain\"'"] {
        append(&server, &format!("shared_preload_libraries = {}", if libraries.is_empty() { "''" } else { libraries }));
        server.restart();
        let mut admin = db.admin();
        let row = about(&mut admin, "shared_preload_libraries");
        assert_eq!(row.severity, "problem", "{row:?}");
        assert!(check(&mut admin).iter().all(|other| *other == row), "more than the one thing that is wrong");
        // Nothing is refused indeed.
        pass(&mut admin, "UPDATE t SET a = a + 1");
        let (command, then) = row.fix.split_once(" -- ").unwrap();
        assert!(then.contains("restart"), "{row:?}");
        // Another library that waits for the restart does not help, and is kept.
        pass(&mut admin, "ALTER SYSTEM SET shared_preload_libraries = pg_prewarm");
        let row = about(&mut admin, "shared_preload_libraries");
        assert!(!row.problem.contains("pending") && row.fix.contains("'pg_prewarm', 'pg_writeguard'"), "{row:?}");
        for reloaded in [false, true] {
            pass(&mut admin, command);
            if reloaded {
                pass(&mut admin, "SELECT pg_reload_conf()");
                wait_until(20, || {
                    let pending = "SELECT pending_restart FROM pg_settings WHERE name = 'shared_preload_libraries'";
                    admin.query_one(pending, &[]).unwrap().get(0)
                });
            }
            let row = about(&mut admin, "shared_preload_libraries");
            assert!(row.severity == "problem" && row.problem.ends_with("(pending restart)"), "{row:?}");
            assert_eq!(row.fix, "-- restart the server");
        }
        drop(admin);
        server.restart();
        let mut admin = db.admin();
        wait_for_launcher(&mut admin);
        assert_eq!(check(&mut admin), []);
        assert_eq!(expect_refusal(admin.batch_execute("UPDATE t SET a = 1")).sqlstate, "WG001");
        pass(&mut admin, "ALTER SYSTEM RESET shared_preload_libraries");
    }
}

#[test]
fn what_the_next_restart_takes_away_is_told() {
    let (server, _db, mut admin) = server(&[]);
    wait_for_launcher(&mut admin);
    pass(&mut admin, "ALTER SYSTEM SET shared_preload_libraries = auto_explain");
    let row = about(&mut admin, "shared_preload_libraries");
    assert!(row.severity == "warning" && row.problem.ends_with("(pending restart)"), "{row:?}");
    assert_eq!(expect_refusal(admin.batch_execute("UPDATE t SET a = 1")).sqlstate, "WG001");
    let (command, _) = row.fix.split_once(" -- ").unwrap();
    assert!(command.contains("'auto_explain', 'pg_writeguard'"), "{row:?}");
    pass(&mut admin, command);
    assert_eq!(check(&mut admin), []);
    // By its path, it is the same library.
    pass(&mut admin, "ALTER SYSTEM SET shared_preload_libraries = '$libdir/pg_writeguard'");
    assert_eq!(check(&mut admin), []);
    pass(&mut admin, "ALTER SYSTEM RESET shared_preload_libraries");
    assert_eq!(check(&mut admin), []);
    drop(admin);
    server.stop("fast");
}

#[test]
fn the_line_to_add_keeps_what_is_there() {
    for listed in ["auto_explain", "auto_explain, \"$libdir/auto_explain\""] {
        let server = Server::start(&[&format!("shared_preload_libraries = '{listed}'")]);
        let db = server.plain_database();
        let refusal = expect_refusal(db.admin().batch_execute("CREATE EXTENSION pg_writeguard"));
        let (told, line) = refusal.hint.split_once(": ").expect("a line");
        assert!(told.contains("restart the server"), "{refusal:?}");
        assert_eq!(line, format!("shared_preload_libraries = '{listed}, pg_writeguard'"));
        append(&server, line);
        server.restart();
        let mut admin = db.admin();
        pass(&mut admin, "CREATE EXTENSION pg_writeguard");
        let now = admin.query_one("SHOW shared_preload_libraries", &[]).unwrap();
        assert_eq!(now.get::<_, &str>(0), format!("{listed}, pg_writeguard"));
        // What is preloaded is for superusers to know.
        append(&server, &format!("shared_preload_libraries = '{listed}'"));
        drop(admin);
        server.restart();
        let role = db.role("plain");
        pass(&mut db.admin(), &format!("GRANT SELECT ON writeguard.my_events TO {role}"));
        let refusal = expect_refusal(
            db.connect(&role).batch_execute("SELECT writeguard.request('UPDATE t SET a = 1'::text, 'x')"),
        );
        assert!(refusal.hint.ends_with("shared_preload_libraries = 'pg_writeguard'"), "{refusal:?}");
    }
}

#[test]
fn events_that_nobody_stores_are_told() {
    let (server, db, mut admin) = server(&[
        "max_worker_processes = 0",
        "writeguard.event_timeout = '1ms'",
        "writeguard.event_queue_size = '64kB'",
    ]);
    let row = about(&mut admin, "launcher");
    assert_eq!(row.severity, "problem");
    assert!(row.fix.contains("max_worker_processes = 8"), "{row:?}");
    let row = about(&mut admin, "writeguard.event_queue_size");
    assert!(row.severity == "warning" && row.fix.contains("200kB"), "{row:?}");
    for _ in 0..100 {
        expect_refusal(admin.batch_execute("UPDATE t SET a = 1"));
    }
    let of_queue = |client: &mut Client, severity: &str| {
        let rows = check(client);
        rows.into_iter().find(|row| row.subject == "event queue" && row.severity == severity)
    };
    let row = of_queue(&mut admin, "warning").expect("events found no room");
    assert!(row.problem.contains("in the server log only") && row.fix.contains("'128kB'"), "{row:?}");
    assert!(of_queue(&mut admin, "note").is_some_and(|row| row.problem.contains("before their event")));
    // Only what has waited for a while is a problem.
    assert_eq!(of_queue(&mut admin, "problem"), None);
    wait_until(30, || of_queue(&mut admin, "problem").is_some());
    pass(&mut admin, "ALTER SYSTEM SET max_worker_processes = 8");
    drop(admin);
    server.restart();
    let mut admin = db.admin();
    wait_for_launcher(&mut admin);
    wait_until(20, || check(&mut admin).iter().all(|row| row.severity != "problem"));
}

#[test]
fn policies_that_cover_nobody_or_nothing_are_told() {
    let db = Server::shared().database();
    let mut admin = db.admin();
    let role = db.role("gone");
    pass(
        &mut admin,
        &format!(
            "CREATE TABLE a (id int); CREATE TABLE b (id int); CREATE SCHEMA s; CREATE TABLE \"B b\" (id int);
             CREATE TABLE parted (id int) PARTITION BY LIST (id);
             SELECT writeguard.set_policy('dropped', tables => '{{a}}');
             SELECT writeguard.set_policy('now a view', tables => '{{b}}');
             SELECT writeguard.set_policy('pattern', tables => '{{s.*,public.*}}');
             SELECT writeguard.set_policy('catalogs', tables => '{{pg_catalog.*}}');
             SELECT writeguard.set_policy('role', roles => '{{public,{role}}}');
             SELECT writeguard.set_policy('fine', tables => ARRAY['\"B b\"', 'parted', '*.part*'], roles => '{{public,postgres}}');
             DROP TABLE a, b; CREATE VIEW b AS SELECT 1; DROP ROLE {role}"
        ),
    );
    let rows = check(&mut admin);
    let policies: Vec<&str> =
        rows.iter().map(|row| row.subject.as_str()).filter(|subject| subject.starts_with("policy ")).collect();
    assert_eq!(
        policies,
        ["policy \"now a view\"", "policy dropped", "policy role", "policy catalogs", "policy pattern"],
        "{rows:#?}"
    );
    mended(&mut admin, "policy dropped", "problem", "public.a does not exist");
    mended(&mut admin, "policy \"now a view\"", "problem", "public.b is a view");
    mended(&mut admin, "policy role", "problem", &role);
    mended(&mut admin, "policy catalogs", "warning", "pg_catalog.*");
    mended(&mut admin, "policy pattern", "warning", "no table matches s.*");
}

#[test]
fn policies_that_cannot_be_read_are_told() {
    let db = Server::shared().database();
    let mut admin = db.admin();
    pass(
        &mut admin,
        "CREATE TABLE t (id int); SELECT writeguard.set_policy('fine', tables => '{t}');
         SELECT writeguard.set_policy('p', tables => '{t}'); UPDATE writeguard.policy SET tables = '{\"a b\"}' WHERE name = 'p'",
    );
    mended(&mut admin, "policy p", "problem", "cannot be read");
    pass(&mut admin, "BEGIN; UPDATE writeguard.policy SET approvers = 'nobody_at_all'");
    let approvers = |row: &Row| row.problem.contains("nobody_at_all") && row.fix == "CREATE ROLE nobody_at_all;";
    assert!(check(&mut admin).iter().any(approvers));
    pass(&mut admin, "ROLLBACK");
    for (column, word) in [("comment", "comment"), ("roles", "roles")] {
        pass(&mut admin, &format!("BEGIN; ALTER TABLE writeguard.policy RENAME {column} TO other"));
        let row = about(&mut admin, "policies");
        assert!(row.severity == "problem" && row.problem.contains(word), "{row:?}");
        pass(&mut admin, "ROLLBACK");
    }
    pass(&mut admin, "ALTER TABLE writeguard.policy DISABLE TRIGGER owner_only");
    mended(&mut admin, "trigger owner_only on writeguard.policy", "problem", "fire");
    pass(&mut admin, "ALTER TABLE writeguard.event ENABLE TRIGGER owner_only");
    mended(&mut admin, "trigger owner_only on writeguard.event", "problem", "fire");
}

#[test]
fn another_version_is_told() {
    let db = Server::shared().database();
    let mut admin = db.admin();
    pass(&mut admin, "UPDATE pg_extension SET extversion = '0.0.0' WHERE extname = 'pg_writeguard'");
    let row = about(&mut admin, "extension");
    assert!(row.severity == "warning" && row.problem.contains("0.0.0"), "{row:?}");
    let library = env!("CARGO_PKG_VERSION");
    assert_eq!(row.fix, format!("ALTER EXTENSION pg_writeguard UPDATE TO '{library}';"));
}

#[test]
fn a_guard_that_is_switched_off_is_told() {
    let (_server, db, mut admin) = server(&[]);
    wait_for_launcher(&mut admin);
    let role = db.role("free");
    let subject = "writeguard.enabled";
    for (who, word) in [
        (format!("ROLE {role}"), format!("role {role}")),
        (format!("ROLE {role} IN DATABASE {}", db.name), format!("role {role} in database {}", db.name)),
        (format!("DATABASE {}", db.name), format!("database {}", db.name)),
        ("ROLE ALL".into(), "all roles".into()),
        ("ROLE postgres".into(), "role postgres".into()),
    ] {
        pass(&mut admin, &format!("ALTER {who} SET writeguard.enabled = off"));
        // Also for a session that began with it.
        assert_eq!(about(&mut db.admin(), subject).severity, "problem");
        mended(&mut admin, subject, "problem", &word);
    }
    pass(&mut admin, &format!("ALTER ROLE {role} SET writeguard.enabled = on"));
    assert_eq!(check(&mut admin), []);

    pass(&mut admin, "ALTER SYSTEM SET writeguard.enabled = off");
    pass(&mut admin, "SELECT pg_reload_conf()");
    wait_until(20, || check(&mut admin).iter().any(|row| row.subject == subject));
    mended(&mut admin, subject, "problem", "whole server");

    pass(&mut admin, "SET writeguard.enabled = off");
    mended(&mut admin, subject, "note", "this session");
    let row = about(&mut db.connect_with("postgres", "-c writeguard.enabled=off"), subject);
    assert_eq!(row.severity, "note");
}

#[test]
fn roles_that_could_switch_it_off_are_told() {
    let (_server, db, mut admin) = server(&[]);
    wait_for_launcher(&mut admin);
    pass(&mut admin, "CREATE ROLE \"Second\" SUPERUSER; CREATE ROLE r LOGIN");
    mended(&mut admin, "role \"Second\"", "note", "superuser");
    pass(&mut admin, "GRANT postgres TO r");
    mended(&mut admin, "role r", "warning", "SET ROLE postgres");
    pass(&mut admin, "GRANT pg_execute_server_program TO r");
    mended(&mut admin, "role r", "warning", "become superuser");
    pass(&mut admin, "GRANT SET ON PARAMETER writeguard.enabled TO r");
    mended(&mut admin, "role r", "warning", "SET ON PARAMETER writeguard.enabled");
    pass(&mut admin, "GRANT SET ON PARAMETER writeguard.pooled TO r");
    mended(&mut admin, "role r", "warning", "SET ON PARAMETER writeguard.pooled");
    pass(&mut admin, "GRANT SET ON PARAMETER writeguard.enabled TO PUBLIC");
    mended(&mut admin, "everybody", "problem", "SET ON PARAMETER writeguard.enabled");
    pass(&mut admin, "GRANT EXECUTE ON FUNCTION pg_replication_origin_session_setup TO r");
    mended(&mut admin, "role r", "warning", "replication origin");
    pass(&mut admin, "GRANT EXECUTE ON FUNCTION pg_replication_origin_session_setup TO PUBLIC");
    mended(&mut admin, "everybody", "problem", "replication origin");
    pass(&mut admin, "GRANT EXECUTE ON FUNCTION writeguard.set_policy TO r");
    mended(&mut admin, "role r", "note", "writeguard.set_policy(");
    pass(&mut admin, "GRANT EXECUTE ON FUNCTION writeguard.drop_policy TO PUBLIC");
    mended(&mut admin, "everybody", "problem", "change the policies");
    pass(&mut admin, "GRANT EXECUTE ON FUNCTION writeguard.approve TO PUBLIC");
    mended(&mut admin, "everybody", "warning", "decide about requests");
    pass(&mut admin, "GRANT EXECUTE ON FUNCTION writeguard.break_glass TO r");
    mended(&mut admin, "role r", "note", "write past limits alone");
    pass(&mut admin, "GRANT EXECUTE ON FUNCTION writeguard.break_glass TO PUBLIC");
    mended(&mut admin, "everybody", "problem", "write past limits alone");
    // Approvers are meant to be.
    pass(&mut admin, "GRANT EXECUTE ON FUNCTION writeguard.approve TO r");
    assert_eq!(check(&mut admin), []);
    pass(&mut admin, "ALTER TABLE writeguard.event OWNER TO r; ALTER FUNCTION writeguard.login() OWNER TO r");
    mended(&mut admin, "role r", "warning", "2 of the extension's objects");
    pass(&mut admin, "UPDATE pg_extension SET extowner = 'r'::regrole WHERE extname = 'pg_writeguard'");
    assert!(about(&mut admin, "role r").problem.contains("drop it"));
    pass(&mut admin, "UPDATE pg_extension SET extowner = 10 WHERE extname = 'pg_writeguard'");
    let old: bool = admin.query_one("SELECT current_setting('server_version_num')::int < 160000", &[]).unwrap().get(0);
    pass(&mut admin, "ALTER ROLE r CREATEROLE");
    if old {
        mended(&mut admin, "role r", "warning", "CREATEROLE");
    }
    drop(db);
}

#[test]
fn settings_that_cost_events_or_counts_are_told() {
    let (_server, _db, mut admin) = server(&["track_counts = off", "log_min_messages = panic"]);
    mended(&mut admin, "track_counts", "warning", "partition");
    mended(&mut admin, "log_min_messages", "warning", "server log");
}

#[test]
fn a_standby_is_healthy_without_a_worker() {
    let (server, db, admin) = server(&["hot_standby = on"]);
    drop(admin);
    server.stop("fast");
    fs::write(server.data_dir().join("standby.signal"), "").unwrap();
    server.start_again();
    assert_eq!(check(&mut db.admin()), []);
    let mut admin = db.admin();
    let document: serde_json::Value = admin.query_one("SELECT writeguard.export_policies()", &[]).unwrap().get(0);
    assert_eq!(document[0]["name"], "p");
}

#[test]
fn only_the_owner_may_until_it_is_granted() {
    let db = Server::shared().database();
    let role = db.role("looker");
    let mut looker = db.connect(&role);
    for function in ["check_setup()", "_setup_facts()"] {
        let refusal = expect_refusal(looker.batch_execute(&format!("SELECT writeguard.{function}")));
        assert_eq!(refusal.sqlstate, "42501", "{function}: {refusal:?}");
    }
    pass(&mut db.admin(), &format!("GRANT EXECUTE ON FUNCTION writeguard.check_setup TO {role}"));
    assert_eq!(about(&mut looker, "policies").severity, "note");
}

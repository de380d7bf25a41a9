//! Events: what is on record of a refusal and of everything else that was not simply
//! allowed; and that it stays on record when the worker, the table, the queue, the
//! session or the server is in trouble.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::common::session::text;
use crate::common::{Database, Refusal, Server, expect_refusal, wait_until};
use postgres::fallible_iterator::FallibleIterator;
use postgres::{Client, Config, NoTls};
use serde_json::{Value, json};

const UPDATE_ALL: &str = "UPDATE t SET note = 'x'";

/// A database with table `t` of ten rows, three of which may be changed at once.
fn guarded(server: &Server) -> Database {
    let db = server.database();
    make_table(&db);
    db.admin()
        .batch_execute(
            "SELECT writeguard.set_policy('p', tables => '{public.t}', max_rows => 3);
             SELECT writeguard.set_policy('flagged', tables => '{public.flagged}', max_rows => 3, override => 'flag');",
        )
        .unwrap();
    db
}

fn make_table(db: &Database) {
    db.admin()
        .batch_execute(
            "CREATE TABLE t (id int PRIMARY KEY, note text);
             INSERT INTO t SELECT n FROM generate_series(1, 10) AS n;
             CREATE TABLE flagged AS TABLE t;
             ANALYZE t, flagged;
             GRANT ALL ON t, flagged TO PUBLIC",
        )
        .unwrap();
}

/// A server whose refused writes wait for their event as long as it takes.
fn patient() -> &'static Server {
    static PATIENT: OnceLock<Server> = OnceLock::new();
    PATIENT.get_or_init(|| Server::start(&["writeguard.event_timeout = '5min'"]))
}

/// Sends a statement that has to go past a limit.
#[track_caller]
fn refuse(client: &mut Client, sql: &str) -> Refusal {
    let refusal = expect_refusal(client.batch_execute(sql));
    assert_eq!(refusal.sqlstate, "WG001", "{refusal:?}");
    refusal
}

/// The events of one kind in the order of their ids.
fn events(client: &mut Client, kind: &str) -> Vec<Value> {
    let sql = "SELECT to_jsonb(e) FROM writeguard.event AS e WHERE kind = $1 ORDER BY id";
    let rows = client.query(sql, &[&kind]).unwrap();
    rows.iter().map(|row| row.get(0)).collect()
}

#[track_caller]
fn only_event(client: &mut Client, kind: &str) -> Value {
    let events = events(client, kind);
    assert_eq!(events.len(), 1, "{kind}: {events:?}");
    events.into_iter().next().unwrap()
}

/// How many refusals are on record.
fn blocked(client: &mut Client) -> usize {
    events(client, "blocked").len()
}

/// Checks the fields that are named.
#[track_caller]
fn assert_fields(event: &Value, expected: Value) {
    for (field, value) in expected.as_object().unwrap() {
        assert_eq!(&event[field], value, "field {field} of {event}");
    }
}

fn number(client: &mut Client, sql: &str) -> i64 {
    client.query_one(sql, &[]).unwrap().get(0)
}

fn pid_of(client: &mut Client) -> i32 {
    client.query_one("SELECT pg_backend_pid()", &[]).unwrap().get(0)
}

/// Another session that keeps everybody from the event table, until it is dropped.
fn lock_events(db: &Database) -> Client {
    let mut locker = db.admin();
    // What was queued earlier is not to wait for the lock.
    wait_until(10, || processes(&mut locker, Some(&db.name)).is_empty());
    locker.batch_execute("BEGIN; LOCK TABLE writeguard.event IN ACCESS EXCLUSIVE MODE").unwrap();
    locker
}

/// The background processes that are connected to this database, or to none.
fn processes(client: &mut Client, database: Option<&str>) -> Vec<i32> {
    let sql = "SELECT pid FROM pg_stat_activity \
               WHERE backend_type LIKE 'pg_writeguard%' AND datname IS NOT DISTINCT FROM $1";
    let rows = client.query(sql, &[&database]).unwrap();
    rows.iter().map(|row| row.get(0)).collect()
}

/// Waits until the worker of a database hangs on a lock; gives its process.
fn stuck_worker(client: &mut Client, database: &str) -> i32 {
    let sql = "SELECT pid FROM pg_stat_activity \
               WHERE backend_type LIKE 'pg_writeguard%' AND datname = $1 AND wait_event_type = 'Lock'";
    let mut pid = None;
    wait_until(20, || {
        pid = client.query_opt(sql, &[&database]).unwrap().map(|row| row.get(0));
        pid.is_some()
    });
    pid.unwrap()
}

fn terminate(client: &mut Client, pid: i32) {
    client.execute("SELECT pg_terminate_backend($1)", &[&pid]).unwrap();
}

fn kill(pid: i32) {
    let status = Command::new("sh").args(["-c", r#"kill -KILL "$1""#, "sh", &pid.to_string()]).status().unwrap();
    assert!(status.success());
}

/// What the queue has counted since the server started.
#[derive(Debug, PartialEq, Eq)]
struct Counters {
    waiting: i64,
    stored: i64,
    late: i64,
    in_log_only: i64,
}

fn counters(client: &mut Client) -> Counters {
    let row = client.query_one("SELECT * FROM writeguard.event_queue", &[]).unwrap();
    Counters {
        waiting: row.get("waiting"),
        stored: row.get("stored"),
        late: row.get("late"),
        in_log_only: row.get("in_log_only"),
    }
}

/// Sends a statement from a thread, because it is going to wait.
fn in_background(mut client: Client, sql: &str) -> JoinHandle<Result<(), postgres::Error>> {
    let sql = sql.to_owned();
    thread::spawn(move || client.batch_execute(&sql))
}

/// The lines and the JSON that a database's sessions wrote about events to the server log.
fn logged(server: &Server, database: &str) -> Vec<(String, Value)> {
    let log = server.log();
    let line_mark = format!("@{database} LOG:  pg_writeguard: ");
    let json_mark = format!("@{database} DETAIL:  {{");
    let lines: Vec<&str> = log.lines().collect();
    lines
        .windows(2)
        .filter(|pair| pair[0].contains(&line_mark) && pair[1].contains(&json_mark))
        .map(|pair| {
            let json = &pair[1][pair[1].find('{').unwrap()..];
            (pair[0].to_owned(), serde_json::from_str(json).unwrap())
        })
        .collect()
}

/// Requests a statement as anna and has bert approve it; gives request and token.
fn approved_token(db: &Database, anna: &str, bert: &str, statement: &str) -> (i64, String) {
    db.admin()
        .batch_execute(&format!("GRANT EXECUTE ON FUNCTION writeguard.approve, writeguard.reject TO {bert}"))
        .unwrap();
    let request = request(db, anna, statement);
    let token = db.connect(bert).query_one("SELECT writeguard.approve($1)", &[&request]).unwrap().get(0);
    (request, token)
}

fn request(db: &Database, anna: &str, statement: &str) -> i64 {
    db.connect(anna)
        .query_one("SELECT writeguard.request($1::text, reason => 'ticket 7')", &[&statement])
        .unwrap()
        .get(0)
}

// Durable.

#[test]
fn event_is_there_at_the_moment_the_error_arrives() {
    let db = guarded(Server::shared());
    let (mut anna, mut other) = (db.connect(&db.role("anna")), db.admin());
    for round in 1..=20 {
        refuse(&mut anna, UPDATE_ALL);
        assert_eq!(blocked(&mut other), round);
    }
}

#[test]
fn event_is_there_before_the_refused_transaction_is_rolled_back_and_stays_after_it() {
    let db = guarded(Server::shared());
    let (mut anna, mut other) = (db.connect(&db.role("anna")), db.admin());
    anna.batch_execute("BEGIN; UPDATE t SET note = 'mine' WHERE id = 1").unwrap();
    refuse(&mut anna, UPDATE_ALL);
    assert_eq!(blocked(&mut other), 1);
    anna.batch_execute("ROLLBACK").unwrap();
    assert_eq!(blocked(&mut other), 1);
    assert_eq!(number(&mut other, "SELECT count(*) FROM t WHERE note IS NOT NULL"), 0);
}

#[test]
fn event_stays_when_only_a_savepoint_is_rolled_back() {
    let db = guarded(Server::shared());
    let mut anna = db.connect(&db.role("anna"));
    anna.batch_execute("BEGIN; UPDATE t SET note = 'mine' WHERE id = 1; SAVEPOINT s").unwrap();
    refuse(&mut anna, UPDATE_ALL);
    anna.batch_execute("ROLLBACK TO s; COMMIT").unwrap();
    let mut admin = db.admin();
    assert_eq!(blocked(&mut admin), 1);
    assert_eq!(number(&mut admin, "SELECT count(*) FROM t WHERE note = 'mine'"), 1);
}

#[test]
fn event_is_there_although_an_exception_block_hides_the_refusal_from_the_client() {
    let db = guarded(Server::shared());
    db.connect(&db.role("anna"))
        .batch_execute("DO $$ BEGIN UPDATE t SET note = 'x'; EXCEPTION WHEN OTHERS THEN NULL; END $$")
        .unwrap();
    only_event(&mut db.admin(), "blocked");
}

#[test]
fn hint_names_the_event() {
    let db = guarded(Server::shared());
    let refusal = refuse(&mut db.connect(&db.role("anna")), UPDATE_ALL);
    let id = &only_event(&mut db.admin(), "blocked")["id"];
    assert!(refusal.hint.contains(&format!("writeguard.request(event => {id}, ")), "{refusal:?}");
}

#[test]
fn every_refusal_is_one_event() {
    let db = guarded(Server::shared());
    let mut anna = db.connect(&db.role("anna"));
    for table in ["t", "t", "flagged"] {
        refuse(&mut anna, &format!("UPDATE {table} SET note = 'x'"));
    }
    let mut admin = db.admin();
    let relations: Vec<Value> = events(&mut admin, "blocked").iter().map(|event| event["relation"].clone()).collect();
    assert_eq!(relations, ["public.t", "public.t", "public.flagged"]);
}

#[test]
fn one_statement_that_is_refused_twice_is_one_event_per_policy() {
    let db = guarded(Server::shared());
    db.connect(&db.role("anna"))
        .batch_execute(
            "DO $$ BEGIN
               FOR round IN 1..3 LOOP
                 BEGIN UPDATE t SET note = 'x'; EXCEPTION WHEN OTHERS THEN NULL; END;
                 BEGIN UPDATE flagged SET note = 'x'; EXCEPTION WHEN OTHERS THEN NULL; END;
               END LOOP;
             END $$",
        )
        .unwrap();
    let policies: Vec<Value> = events(&mut db.admin(), "blocked").iter().map(|event| event["policy"].clone()).collect();
    assert_eq!(policies, ["p", "flagged"]);
}

#[test]
fn write_within_the_limit_is_no_event() {
    let db = guarded(Server::shared());
    db.connect(&db.role("anna")).batch_execute("UPDATE t SET note = 'x' WHERE id <= 3").unwrap();
    assert_eq!(blocked(&mut db.admin()), 0);
}

#[test]
fn refusals_of_sixteen_sessions_at_once_are_all_recorded() {
    const SESSIONS: usize = 16;
    const REFUSALS: usize = 25;
    let db = guarded(Server::shared());
    let role = db.role("anna");
    thread::scope(|scope| {
        for session in 0..SESSIONS {
            let mut client = db.connect(&role);
            scope.spawn(move || {
                for refusal in 0..REFUSALS {
                    refuse(&mut client, &format!("UPDATE t SET note = '{session} {refusal}'"));
                }
            });
        }
    });
    let distinct = "SELECT count(DISTINCT statement) FROM writeguard.event WHERE kind = 'blocked'";
    let mut admin = db.admin();
    assert_eq!(blocked(&mut admin), SESSIONS * REFUSALS);
    assert_eq!(number(&mut admin, distinct), i64::try_from(SESSIONS * REFUSALS).unwrap());
}

// The fields of an event.

#[test]
fn blocked_event_has_all_its_fields() {
    let db = guarded(Server::shared());
    let (anna, app) = (db.role("anna"), db.role("app"));
    db.admin().batch_execute(&format!("GRANT {app} TO {anna}")).unwrap();
    let mut client = db.config(&anna).application_name("invoices").connect(NoTls).unwrap();
    client.batch_execute(&format!("SET ROLE {app}; BEGIN")).unwrap();
    let pid = pid_of(&mut client);
    let xid = text(&mut client, "SELECT pg_current_xact_id()::text");
    refuse(&mut client, UPDATE_ALL);

    let event = only_event(&mut db.admin(), "blocked");
    assert_fields(
        &event,
        json!({
            "kind": "blocked",
            "policy": "p",
            "mode": "enforce",
            "login": anna,
            "role": app,
            "application": "invoices",
            "client": null,
            "pid": pid,
            "xid": xid,
            "operation": "update",
            "relation": "public.t",
            "scope": "statement",
            "row_limit": 3,
            "rows": 4,
            "rows_estimated": 10,
            "statement": UPDATE_ALL,
            "approval": null,
        }),
    );
}

#[test]
fn role_of_an_event_is_the_login_where_none_is_set() {
    let db = guarded(Server::shared());
    let anna = db.role("anna");
    refuse(&mut db.connect(&anna), UPDATE_ALL);
    assert_fields(&only_event(&mut db.admin(), "blocked"), json!({ "login": anna, "role": anna }));
}

#[test]
fn login_of_an_event_survives_set_session_authorization() {
    let db = guarded(Server::shared());
    let anna = db.role("anna");
    let mut admin = db.admin();
    admin.batch_execute(&format!("SET SESSION AUTHORIZATION {anna}")).unwrap();
    refuse(&mut admin, UPDATE_ALL);
    assert_fields(&only_event(&mut db.admin(), "blocked"), json!({ "login": "postgres", "role": anna }));
}

#[test]
fn security_definer_changes_neither_login_nor_role() {
    let db = guarded(Server::shared());
    let anna = db.role("anna");
    db.admin()
        .batch_execute(
            "CREATE FUNCTION f() RETURNS void LANGUAGE sql SECURITY DEFINER AS $$ UPDATE t SET note = 'x' $$",
        )
        .unwrap();
    refuse(&mut db.connect(&anna), "SELECT f()");
    assert_fields(
        &only_event(&mut db.admin(), "blocked"),
        json!({ "login": anna, "role": anna, "statement": "SELECT f()", "relation": "public.t" }),
    );
}

#[test]
fn event_over_tcp_has_the_address_of_the_client() {
    let server = Server::start(&["listen_addresses = '127.0.0.1'"]);
    let db = guarded(&server);
    let anna = db.role("anna");
    let mut client =
        Config::new().host("127.0.0.1").port(server.port()).user(&anna).dbname(&db.name).connect(NoTls).unwrap();
    refuse(&mut client, UPDATE_ALL);
    let mut admin = db.admin();
    only_event(&mut admin, "blocked");
    assert_eq!(text(&mut admin, "SELECT host(client) FROM writeguard.event WHERE kind = 'blocked'"), "127.0.0.1");
}

#[test]
fn event_says_when_it_happened_whatever_the_time_zone_and_date_style() {
    let db = guarded(Server::shared());
    let mut anna = db.connect(&db.role("anna"));
    let mut admin = db.admin();
    for setting in
        ["SET TimeZone = 'Asia/Kolkata'", "SET TimeZone = 'America/St_Johns'", "SET DateStyle = 'German, DMY'"]
    {
        anna.batch_execute(setting).unwrap();
        refuse(&mut anna, UPDATE_ALL);
        let recent = "SELECT clock_timestamp() - occurred_at BETWEEN '0' AND '1 minute' \
                      FROM writeguard.event ORDER BY id DESC LIMIT 1";
        let recent: bool = admin.query_one(recent, &[]).unwrap().get(0);
        assert!(recent, "{setting}");
    }
}

#[test]
fn limit_per_transaction_has_that_scope() {
    let db = guarded(Server::shared());
    db.admin()
        .batch_execute("SELECT writeguard.set_policy('p', tables => '{public.t}', max_rows_per_transaction => 5)")
        .unwrap();
    let mut anna = db.connect(&db.role("anna"));
    anna.batch_execute("BEGIN; UPDATE t SET note = 'x' WHERE id <= 3").unwrap();
    refuse(&mut anna, "UPDATE t SET note = 'x' WHERE id > 7");
    assert_fields(
        &only_event(&mut db.admin(), "blocked"),
        json!({ "scope": "transaction", "row_limit": 5, "rows": 6 }),
    );
}

#[test]
fn delete_and_truncate_are_named_as_such() {
    let db = guarded(Server::shared());
    let mut anna = db.connect(&db.role("anna"));
    refuse(&mut anna, "DELETE FROM t");
    assert_eq!(expect_refusal(anna.batch_execute("TRUNCATE t")).sqlstate, "WG005");
    let events = events(&mut db.admin(), "blocked");
    assert_eq!(events.len(), 2);
    for (event, operation) in events.iter().zip(["delete", "truncate"]) {
        assert_fields(event, json!({ "operation": operation, "relation": "public.t", "row_limit": 3, "rows": 4 }));
    }
}

#[test]
fn relation_is_quoted_where_it_must_be() {
    let db = guarded(Server::shared());
    let mut admin = db.admin();
    admin
        .batch_execute(
            r#"CREATE SCHEMA "Odd";
               CREATE TABLE "Odd"."T "" t" AS TABLE t;
               SELECT writeguard.set_policy('odd', tables => '{"\"Odd\".*"}', max_rows => 0);"#,
        )
        .unwrap();
    refuse(&mut admin, r#"DELETE FROM "Odd"."T "" t""#);
    assert_fields(
        &only_event(&mut db.admin(), "blocked"),
        json!({ "relation": r#""Odd"."T "" t""#, "row_limit": 0, "rows": 1 }),
    );
}

#[test]
fn statement_is_the_one_command_of_a_longer_string() {
    let db = guarded(Server::shared());
    refuse(&mut db.connect(&db.role("anna")), "SELECT 1; UPDATE t SET note = 'ä;b';\nSELECT 2");
    assert_fields(&only_event(&mut db.admin(), "blocked"), json!({ "statement": "UPDATE t SET note = 'ä;b'" }));
}

#[test]
fn values_of_parameters_are_recorded_nowhere() {
    let server = Server::shared();
    let db = guarded(server);
    let secret = "a value that nobody may see";
    let result = db.connect(&db.role("anna")).execute("UPDATE t SET note = $1", &[&secret]);
    assert_eq!(expect_refusal(result).sqlstate, "WG001");
    let event = only_event(&mut db.admin(), "blocked");
    assert_eq!(event["statement"], "UPDATE t SET note = $1");
    assert!(!event.to_string().contains(secret));
    assert!(!server.log().contains(secret));
}

#[test]
fn statement_in_a_latin1_database_is_recorded_as_it_was_sent() {
    let server = Server::shared();
    let name = "latin1_events";
    server
        .postgres()
        .batch_execute(&format!("CREATE DATABASE {name} TEMPLATE template0 ENCODING 'LATIN1' LOCALE 'C'"))
        .unwrap();
    let connect = || {
        Config::new()
            .host_path(server.socket_dir())
            .port(server.port())
            .user("postgres")
            .dbname(name)
            .connect(NoTls)
            .unwrap()
    };
    let (mut client, mut admin) = (connect(), connect());
    admin
        .batch_execute(
            "CREATE EXTENSION pg_writeguard;
             CREATE TABLE t AS SELECT n AS id, ''::text AS note FROM generate_series(1, 10) AS n;
             SELECT writeguard.set_policy('p', tables => '{public.t}', max_rows => 3)",
        )
        .unwrap();
    let statement = "UPDATE t SET note = 'Bücher für André'";
    refuse(&mut client, statement);
    assert_eq!(only_event(&mut admin, "blocked")["statement"], statement);
}

// Kinds.

#[test]
fn overridden_by_flag() {
    let db = guarded(Server::shared());
    let anna = db.role("anna");
    db.connect(&anna).batch_execute("SET writeguard.override = on; UPDATE flagged SET note = 'x'").unwrap();
    assert_fields(
        &only_event(&mut db.admin(), "overridden"),
        json!({
            "policy": "flagged",
            "login": anna,
            "role": anna,
            "operation": "update",
            "relation": "public.flagged",
            "scope": "statement",
            "row_limit": 3,
            "rows": 10,
            "statement": "UPDATE flagged SET note = 'x'",
            "approval": null,
        }),
    );
}

#[test]
fn overridden_by_token_names_the_request() {
    let db = guarded(Server::shared());
    let (anna, bert) = (db.role("anna"), db.role("bert"));
    let (request, token) = approved_token(&db, &anna, &bert, UPDATE_ALL);
    let mut client = db.connect(&anna);
    client.batch_execute(&format!("SET writeguard.override = on; SET writeguard.token = '{token}'")).unwrap();
    client.batch_execute(UPDATE_ALL).unwrap();
    assert_fields(
        &only_event(&mut db.admin(), "overridden"),
        json!({ "approval": request, "rows": 10, "login": anna, "policy": "p" }),
    );
}

#[test]
fn overridden_is_there_exactly_when_the_write_is() {
    let db = guarded(Server::shared());
    let (mut anna, mut other) = (db.connect(&db.role("anna")), db.admin());
    let overridden = "BEGIN; SET LOCAL writeguard.override = on; SAVEPOINT s; UPDATE flagged SET note = 'x'";
    for ending in ["ROLLBACK", "ROLLBACK TO s; COMMIT"] {
        anna.batch_execute(overridden).unwrap();
        anna.batch_execute(ending).unwrap();
        assert!(events(&mut other, "overridden").is_empty(), "{ending}");
    }
    anna.batch_execute(overridden).unwrap();
    assert!(events(&mut other, "overridden").is_empty());
    anna.batch_execute("COMMIT").unwrap();
    only_event(&mut other, "overridden");
}

#[test]
fn overridden_in_a_prepared_transaction_comes_with_its_commit() {
    let db = guarded(Server::shared());
    let mut anna = db.connect(&db.role("anna"));
    let gid = format!("overridden in {}", db.name);
    anna.batch_execute(&format!(
        "BEGIN; SET LOCAL writeguard.override = on; UPDATE flagged SET note = 'x'; PREPARE TRANSACTION '{gid}'"
    ))
    .unwrap();
    let mut other = db.admin();
    assert!(events(&mut other, "overridden").is_empty());
    anna.batch_execute(&format!("COMMIT PREPARED '{gid}'")).unwrap();
    assert_fields(&only_event(&mut other, "overridden"), json!({ "rows": 10 }));
}

#[test]
fn requested_approved_and_rejected() {
    let db = guarded(Server::shared());
    let (anna, bert) = (db.role("anna"), db.role("bert"));
    let (approved, _) = approved_token(&db, &anna, &bert, UPDATE_ALL);
    let rejected = request(&db, &anna, "DELETE FROM t");
    db.connect(&bert).execute("SELECT writeguard.reject($1, 'not now')", &[&rejected]).unwrap();

    let mut admin = db.admin();
    let requested = events(&mut admin, "requested");
    assert_eq!(requested.len(), 2);
    for (event, (request, statement)) in requested.iter().zip([(approved, UPDATE_ALL), (rejected, "DELETE FROM t")]) {
        assert_fields(
            event,
            json!({ "login": anna, "approval": request, "statement": statement, "rows": 10, "reason": "ticket 7" }),
        );
    }
    assert_fields(
        &only_event(&mut admin, "approved"),
        json!({ "login": bert, "approval": approved, "statement": UPDATE_ALL }),
    );
    assert_fields(
        &only_event(&mut admin, "rejected"),
        json!({ "login": bert, "approval": rejected, "reason": "not now" }),
    );
}

#[test]
fn rehearsal_of_a_request_is_not_recorded_as_a_refusal() {
    let db = guarded(Server::shared());
    request(&db, &db.role("anna"), UPDATE_ALL);
    assert_eq!(blocked(&mut db.admin()), 0);
}

#[test]
fn refused_token_is_recorded_with_the_reason_and_without_the_token() {
    let server = Server::shared();
    let db = guarded(server);
    let anna = db.role("anna");
    let mut client = db.connect(&anna);
    let token = "tokens-are-not-for-the-record";
    client.batch_execute(&format!("SET writeguard.token = '{token}'")).unwrap();
    let refusal = expect_refusal(client.batch_execute("SET writeguard.override = on; UPDATE t SET note = 'x'"));
    assert_eq!(refusal.sqlstate, "WG006");

    let event = only_event(&mut db.admin(), "token_refused");
    assert_fields(&event, json!({ "login": anna, "policy": "p", "relation": "public.t", "statement": UPDATE_ALL }));
    assert_ne!(event["reason"].as_str().unwrap_or_default(), "");
    assert!(!event.to_string().contains(token));
    assert!(!format!("{refusal:?}").contains(token));
    assert!(!server.log().contains(token));
}

#[test]
fn token_in_the_same_string_as_the_write_is_not_recorded() {
    let server = Server::shared();
    let db = guarded(server);
    let token = "tokens-in-a-string";
    let refusal = expect_refusal(
        db.connect(&db.role("anna"))
            .batch_execute(&format!("SET writeguard.override = on; SET writeguard.token = '{token}'; {UPDATE_ALL}")),
    );
    assert_eq!(refusal.sqlstate, "WG006");
    let event = only_event(&mut db.admin(), "token_refused");
    assert_eq!(event["statement"], UPDATE_ALL);
    for (line, json) in logged(server, &db.name) {
        assert!(!line.contains(token) && !json.to_string().contains(token));
    }
}

#[test]
fn policy_changes_are_recorded_and_what_changes_nothing_is_not() {
    let db = Server::shared().database();
    make_table(&db);
    let mut admin = db.admin();
    for statement in [
        "SELECT writeguard.set_policy('p', tables => '{public.t}', max_rows => 3)",
        "SELECT writeguard.set_policy('p', tables => '{public.t}', max_rows => 3)",
        "SELECT writeguard.set_policy('p', tables => '{public.t}', max_rows => 4)",
        "BEGIN; SELECT writeguard.set_policy('q', tables => '{public.t}', max_rows => 3); ROLLBACK",
        "SELECT writeguard.drop_policy('p')",
    ] {
        admin.batch_execute(statement).unwrap();
    }
    let events = events(&mut admin, "policy_changed");
    assert_eq!(events.len(), 3, "{events:?}");
    for event in &events {
        assert_fields(event, json!({ "policy": "p", "login": "postgres" }));
    }
}

#[test]
fn covered_write_while_the_guard_is_off_is_recorded_once_per_statement() {
    let db = guarded(Server::shared());
    let mut admin = db.admin();
    admin
        .batch_execute("CREATE TABLE uncovered AS TABLE t; SET writeguard.enabled = off; SET statement_timeout = '20s'")
        .unwrap();
    admin.batch_execute("UPDATE uncovered SET note = 'x'").unwrap();
    admin.batch_execute(UPDATE_ALL).unwrap();
    admin.batch_execute("TRUNCATE flagged").unwrap();
    let mut other = db.admin();
    wait_until(10, || events(&mut other, "disabled").len() >= 2);
    let events = events(&mut other, "disabled");
    assert_eq!(events.len(), 2, "{events:?}");
    assert_fields(
        &events[0],
        json!({ "login": "postgres", "operation": "update", "relation": "public.t", "statement": UPDATE_ALL }),
    );
    assert_fields(&events[1], json!({ "operation": "truncate", "relation": "public.flagged" }));
}

#[test]
fn covered_write_while_the_guard_is_off_is_recorded_although_it_is_rolled_back() {
    let db = guarded(Server::shared());
    let mut admin = db.admin();
    admin.batch_execute("BEGIN; SET LOCAL writeguard.enabled = off; UPDATE t SET note = 'x'; ROLLBACK").unwrap();
    let mut other = db.admin();
    wait_until(10, || !events(&mut other, "disabled").is_empty());
    only_event(&mut other, "disabled");
}

// Who reads what.

#[test]
fn only_pg_monitor_and_the_owner_read_events() {
    let db = guarded(Server::shared());
    let (anna, monitor) = (db.role("anna"), db.role("monitor"));
    let mut admin = db.admin();
    admin.batch_execute(&format!("GRANT pg_monitor TO {monitor}")).unwrap();
    refuse(&mut db.connect(&anna), UPDATE_ALL);
    let refusal = expect_refusal(db.connect(&anna).batch_execute("TABLE writeguard.event"));
    assert_eq!(refusal.sqlstate, "42501");
    assert_eq!(blocked(&mut db.connect(&monitor)), 1);
    assert_eq!(blocked(&mut admin), 1);
}

#[test]
fn nobody_but_the_owner_writes_the_tables_of_the_extension() {
    let db = guarded(Server::shared());
    let monitor = db.role("monitor");
    db.admin().batch_execute(&format!("GRANT pg_monitor TO {monitor}")).unwrap();
    let mut monitor = db.connect(&monitor);
    for table in ["event", "outbox", "policy", "request"] {
        for statement in [
            format!("DELETE FROM writeguard.{table}"),
            format!("TRUNCATE writeguard.{table}"),
            format!("INSERT INTO writeguard.{table} DEFAULT VALUES"),
        ] {
            let refusal = expect_refusal(monitor.batch_execute(&statement));
            assert_eq!(refusal.sqlstate, "42501", "{statement}");
        }
    }
}

#[test]
fn my_events_are_those_of_the_login() {
    let db = guarded(Server::shared());
    let (anna, bert) = (db.role("anna"), db.role("bert"));
    db.admin().batch_execute(&format!("GRANT {bert} TO {anna}")).unwrap();
    let mut anna_client = db.connect(&anna);
    let mut bert_client = db.connect(&bert);
    refuse(&mut bert_client, "UPDATE t SET note = 'by bert'");
    anna_client.batch_execute(&format!("SET ROLE {bert}")).unwrap();
    refuse(&mut anna_client, "UPDATE t SET note = 'by anna'");

    let statements = |client: &mut Client| -> Vec<String> {
        let rows = client.query("SELECT statement FROM writeguard.my_events ORDER BY id", &[]).unwrap();
        rows.iter().map(|row| row.get(0)).collect()
    };
    // The role that anna has SET is bert; her login is not.
    assert_eq!(statements(&mut anna_client), ["UPDATE t SET note = 'by anna'"]);
    assert_eq!(statements(&mut bert_client), ["UPDATE t SET note = 'by bert'"]);
}

#[test]
fn event_queue_is_for_pg_monitor() {
    let db = guarded(Server::shared());
    let (anna, monitor) = (db.role("anna"), db.role("monitor"));
    db.admin().batch_execute(&format!("GRANT pg_monitor TO {monitor}")).unwrap();
    counters(&mut db.connect(&monitor));
    let refusal = expect_refusal(db.connect(&anna).batch_execute("TABLE writeguard.event_queue"));
    assert_eq!(refusal.sqlstate, "42501");
}

// The server log.

#[test]
fn every_event_is_one_line_in_the_server_log_with_the_event_as_json() {
    let server = Server::shared();
    let db = guarded(server);
    let (anna, bert) = (db.role("anna"), db.role("bert"));
    let (_, token) = approved_token(&db, &anna, &bert, UPDATE_ALL);
    let mut client = db.connect(&anna);
    refuse(&mut client, "UPDATE t\n\tSET note = '\"quoted\"\\'");
    client.batch_execute(&format!("SET writeguard.override = on; SET writeguard.token = '{token}'")).unwrap();
    client.batch_execute(UPDATE_ALL).unwrap();
    client.batch_execute("SET writeguard.override = on; SET writeguard.token = 'wrong'").unwrap();
    expect_refusal(client.batch_execute(UPDATE_ALL));
    let mut admin = db.admin();
    admin.batch_execute("SET writeguard.enabled = off; UPDATE flagged SET note = 'x'").unwrap();
    wait_until(10, || !events(&mut admin, "disabled").is_empty());

    let strip = |mut event: Value| {
        let fields = event.as_object_mut().unwrap();
        // Written in another format there.
        fields.remove("occurred_at").unwrap();
        fields.remove("id");
        // The log is that of all databases.
        assert!(fields.remove("database").is_none_or(|name| name == db.name.as_str()));
        event
    };
    let stored: Vec<Value> = admin
        .query("SELECT to_jsonb(e) FROM writeguard.event AS e ORDER BY occurred_at", &[])
        .unwrap()
        .iter()
        .map(|row| strip(row.get(0)))
        .collect();
    let mut logged = logged(server, &db.name);
    logged.sort_by_key(|(_, json)| json["occurred_at"].as_str().unwrap().to_owned());
    let in_log: Vec<Value> = logged.iter().map(|(_, json)| strip(json.clone())).collect();
    assert_eq!(in_log, stored);
    for kind in ["policy_changed", "requested", "approved", "blocked", "overridden", "token_refused", "disabled"] {
        assert!(stored.iter().any(|event| event["kind"] == kind), "{kind}");
    }
    let (line, _) = logged.iter().find(|(_, json)| json["kind"] == "blocked").unwrap();
    for word in ["public.t", &anna, "\"p\""] {
        assert!(line.contains(word), "{word} in {line}");
    }
}

// NOTIFY writeguard.

fn listen(db: &Database) -> Client {
    let mut listener = db.admin();
    listener.batch_execute("LISTEN writeguard").unwrap();
    listener
}

/// The next notification's payload, if one comes in time.
fn heard(listener: &mut Client, seconds: u64) -> Option<Value> {
    let notification = listener.notifications().timeout_iter(Duration::from_secs(seconds)).next().unwrap()?;
    assert_eq!(notification.channel(), "writeguard");
    Some(serde_json::from_str(notification.payload()).unwrap())
}

#[track_caller]
fn expect_notification(listener: &mut Client, db: &Database, kind: &str, policy: Value) {
    let payload = heard(listener, 10).unwrap_or_else(|| panic!("no notification of {kind}"));
    let event = only_event(&mut db.admin(), kind);
    assert_eq!(payload, json!({ "id": event["id"], "kind": kind, "policy": policy }));
}

#[test]
fn refusal_is_notified() {
    let db = guarded(Server::shared());
    let mut listener = listen(&db);
    drain(&mut listener);
    refuse(&mut db.connect(&db.role("anna")), UPDATE_ALL);
    expect_notification(&mut listener, &db, "blocked", json!("p"));
}

/// Lets notifications of the preparation pass.
fn drain(listener: &mut Client) {
    while heard(listener, 1).is_some() {}
}

#[test]
fn policy_change_is_notified() {
    let db = Server::shared().database();
    make_table(&db);
    let mut listener = listen(&db);
    db.admin().batch_execute("SELECT writeguard.set_policy('p', tables => '{public.t}', max_rows => 3)").unwrap();
    expect_notification(&mut listener, &db, "policy_changed", json!("p"));
}

#[test]
fn override_is_notified() {
    let db = guarded(Server::shared());
    let mut listener = listen(&db);
    drain(&mut listener);
    db.connect(&db.role("anna")).batch_execute("SET writeguard.override = on; UPDATE flagged SET note = 'x'").unwrap();
    expect_notification(&mut listener, &db, "overridden", json!("flagged"));
}

#[test]
fn request_is_notified() {
    let db = guarded(Server::shared());
    let mut listener = listen(&db);
    drain(&mut listener);
    request(&db, &db.role("anna"), UPDATE_ALL);
    expect_notification(&mut listener, &db, "requested", json!(null));
}

#[test]
fn rolled_back_policy_change_is_not_notified() {
    let db = guarded(Server::shared());
    let mut listener = listen(&db);
    drain(&mut listener);
    let mut admin = db.admin();
    admin.batch_execute("BEGIN; SELECT writeguard.drop_policy('p'); ROLLBACK").unwrap();
    refuse(&mut admin, UPDATE_ALL);
    expect_notification(&mut listener, &db, "blocked", json!("p"));
}

#[test]
fn policy_change_in_a_prepared_transaction_is_notified_with_its_commit() {
    let db = Server::shared().database();
    make_table(&db);
    let mut listener = listen(&db);
    let mut admin = db.admin();
    let gid = format!("policy in {}", db.name);
    admin
        .batch_execute(&format!(
            "BEGIN; SELECT writeguard.set_policy('p', tables => '{{public.t}}', max_rows => 3);
             PREPARE TRANSACTION '{gid}'"
        ))
        .unwrap();
    assert_eq!(heard(&mut listener, 1), None);
    admin.batch_execute(&format!("COMMIT PREPARED '{gid}'")).unwrap();
    expect_notification(&mut listener, &db, "policy_changed", json!("p"));
}

#[test]
fn commit_prepared_by_a_new_session_is_notified() {
    let db = guarded(Server::shared());
    let mut listener = listen(&db);
    drain(&mut listener);
    let gid = format!("override in {}", db.name);
    db.connect(&db.role("anna"))
        .batch_execute(&format!(
            "BEGIN; SET LOCAL writeguard.override = on; UPDATE flagged SET note = 'x';
             PREPARE TRANSACTION '{gid}'"
        ))
        .unwrap();
    db.admin().batch_execute(&format!("COMMIT PREPARED '{gid}'")).unwrap();
    expect_notification(&mut listener, &db, "overridden", json!("flagged"));
}

// Trouble: the event table is locked.

#[test]
fn locked_event_table_delays_the_error_by_the_timeout_and_the_event_until_it_is_free() {
    let server = Server::start(&["writeguard.event_timeout = '700ms'"]);
    let db = guarded(&server);
    let mut anna = db.connect(&db.role("anna"));
    let mut admin = db.admin();
    let late_before = counters(&mut admin).late;
    let locker = lock_events(&db);

    let began = Instant::now();
    let refusal = refuse(&mut anna, UPDATE_ALL);
    let took = began.elapsed();
    assert!(took >= Duration::from_millis(690), "{took:?}");
    assert!(took < Duration::from_secs(5), "{took:?}");
    // No id is known yet, so the next command has the statement.
    assert!(refusal.hint.contains("writeguard.request($$UPDATE t SET note = 'x'$$"), "{refusal:?}");
    let (waiting, late) = (counters(&mut admin).waiting, counters(&mut admin).late);
    assert_eq!((waiting, late), (1, late_before + 1));
    assert!(
        logged(&server, &db.name).iter().any(|(_, json)| json["kind"] == "blocked" && json["statement"] == UPDATE_ALL)
    );

    drop(locker);
    wait_until(20, || blocked(&mut admin) == 1);
    wait_until(20, || counters(&mut admin).waiting == 0);
    assert_eq!(counters(&mut admin).late, late_before + 1);
}

#[test]
fn session_that_holds_the_lock_itself_is_refused_all_the_same() {
    let db = guarded(Server::shared());
    let mut locker = lock_events(&db);
    refuse(&mut locker, UPDATE_ALL);
    locker.batch_execute("ROLLBACK").unwrap();
    wait_until(20, || blocked(&mut locker) == 1);
}

#[test]
fn session_that_dropped_the_extension_and_rolls_back_keeps_its_event() {
    let db = guarded(Server::shared());
    let (mut anna, mut admin) = (db.connect(&db.role("anna")), db.admin());
    // Whoever does not know the policies yet waits for the end of the DROP.
    anna.batch_execute("UPDATE t SET note = 'x' WHERE id = 1").unwrap();
    admin.batch_execute("BEGIN; DROP EXTENSION pg_writeguard").unwrap();
    refuse(&mut anna, UPDATE_ALL);
    admin.batch_execute("ROLLBACK").unwrap();
    wait_until(20, || blocked(&mut admin) == 1);
}

#[test]
fn timeout_of_zero_waits_for_nothing_and_still_stores_the_event() {
    let server = Server::start(&["writeguard.event_timeout = 0"]);
    let db = guarded(&server);
    let mut anna = db.connect(&db.role("anna"));
    let locker = lock_events(&db);
    let began = Instant::now();
    for _ in 0..5 {
        refuse(&mut anna, UPDATE_ALL);
    }
    assert!(began.elapsed() < Duration::from_secs(1));
    drop(locker);
    let mut admin = db.admin();
    wait_until(20, || blocked(&mut admin) == 5);
    refuse(&mut anna, UPDATE_ALL);
    wait_until(20, || blocked(&mut admin) == 6);
}

#[test]
fn timeout_is_the_administrators_to_set() {
    let server = Server::start(&[]);
    let db = guarded(&server);
    let mut admin = db.admin();
    let refusal = expect_refusal(admin.batch_execute("SET writeguard.event_timeout = 0"));
    assert_eq!(refusal.sqlstate, "55P02");
    assert_eq!(text(&mut admin, "SHOW writeguard.event_timeout"), "1s");

    let mut anna = db.connect(&db.role("anna"));
    admin.batch_execute("ALTER SYSTEM SET writeguard.event_timeout = '100ms'").unwrap();
    admin.batch_execute("SELECT pg_reload_conf()").unwrap();
    wait_until(10, || text(&mut anna, "SHOW writeguard.event_timeout") == "100ms");
    let _locker = lock_events(&db);
    let began = Instant::now();
    refuse(&mut anna, UPDATE_ALL);
    assert!(began.elapsed() < Duration::from_millis(900));
}

// Trouble: the queue is full.

#[test]
fn full_queue_hangs_nothing_and_loses_nothing() {
    const REFUSALS: usize = 40;
    let server = Server::start(&["writeguard.event_queue_size = '64kB'", "writeguard.event_timeout = '50ms'"]);
    let db = guarded(&server);
    let mut anna = db.connect(&db.role("anna"));
    let mut admin = db.admin();
    let locker = lock_events(&db);

    let statement = |number: usize| format!("UPDATE t SET note = '{number} {}'", "ä".repeat(10_000));
    let began = Instant::now();
    for number in 0..REFUSALS {
        refuse(&mut anna, &statement(number));
    }
    assert!(began.elapsed() < Duration::from_secs(20));
    let full = counters(&mut admin);
    assert!(full.in_log_only > 0, "{full:?}");
    assert!(full.waiting > 0, "{full:?}");

    // Other databases have no room either, and do not hang either.
    let elsewhere = guarded(&server);
    refuse(&mut elsewhere.admin(), UPDATE_ALL);

    let in_log: Vec<Value> =
        logged(&server, &db.name).into_iter().map(|(_, json)| json).filter(|json| json["kind"] == "blocked").collect();
    assert_eq!(in_log.len(), REFUSALS);
    for (number, json) in in_log.iter().enumerate() {
        assert_eq!(json["statement"], statement(number));
    }

    let in_log_only = usize::try_from(full.in_log_only).unwrap();
    drop(locker);
    wait_until(20, || blocked(&mut admin) == REFUSALS - in_log_only);
    wait_until(20, || counters(&mut admin).waiting == 0);
    assert_eq!(blocked(&mut admin), REFUSALS - in_log_only);

    // There is room again.
    refuse(&mut anna, UPDATE_ALL);
    assert_eq!(blocked(&mut admin), REFUSALS - in_log_only + 1);
}

#[test]
fn long_statement_is_cut_in_the_table_at_a_whole_letter() {
    let server = Server::shared();
    let db = guarded(server);
    let statement = format!("UPDATE t SET note = '{}'", "€".repeat(100_000));
    refuse(&mut db.connect(&db.role("anna")), &statement);
    let event = only_event(&mut db.admin(), "blocked");
    let stored = event["statement"].as_str().unwrap();
    assert!(stored.len() < statement.len());
    assert!(stored.starts_with("UPDATE t SET note = '€€€"));
    assert!(stored.ends_with(&format!("€ ... ({} bytes in all)", statement.len())));
    assert!(logged(server, &db.name).iter().any(|(_, json)| json["statement"] == stored));
}

// Trouble: the background processes are terminated.

#[test]
fn worker_that_is_terminated_after_its_work_is_replaced() {
    let db = guarded(Server::shared());
    let (mut anna, mut admin) = (db.connect(&db.role("anna")), db.admin());
    for round in 1..=3 {
        refuse(&mut anna, UPDATE_ALL);
        wait_until(10, || blocked(&mut admin) == round);
        for pid in processes(&mut admin, Some(&db.name)) {
            terminate(&mut admin, pid);
        }
    }
}

#[test]
fn worker_that_is_terminated_while_it_stores_leaves_the_event_to_the_next_one() {
    let db = guarded(Server::shared());
    let mut admin = db.admin();
    let locker = lock_events(&db);
    refuse(&mut db.connect(&db.role("anna")), UPDATE_ALL);
    let first = stuck_worker(&mut admin, &db.name);
    terminate(&mut admin, first);
    let mut second = first;
    wait_until(20, || {
        second = stuck_worker(&mut admin, &db.name);
        second != first
    });
    drop(locker);
    wait_until(20, || blocked(&mut admin) == 1);
    // And it is not stored a second time.
    refuse(&mut admin, UPDATE_ALL);
    wait_until(20, || blocked(&mut admin) == 2);
    wait_until(20, || processes(&mut admin, Some(&db.name)).is_empty());
    assert_eq!(blocked(&mut admin), 2);
}

#[test]
fn launcher_that_is_terminated_comes_back() {
    let server = Server::start(&[]);
    let db = guarded(&server);
    let mut admin = db.admin();
    wait_until(10, || !processes(&mut admin, None).is_empty());
    let first = processes(&mut admin, None);
    terminate(&mut admin, first[0]);
    wait_until(20, || {
        let now = processes(&mut admin, None);
        !now.is_empty() && now != first
    });
    refuse(&mut db.connect(&db.role("anna")), UPDATE_ALL);
    only_event(&mut admin, "blocked");
}

#[test]
fn refusal_while_the_launcher_is_away_is_stored_when_it_is_back() {
    let server = Server::start(&["writeguard.event_timeout = '50ms'"]);
    let db = guarded(&server);
    let (mut anna, mut admin) = (db.connect(&db.role("anna")), db.admin());
    wait_until(20, || processes(&mut admin, Some(&db.name)).is_empty());
    let launcher = processes(&mut admin, None);
    terminate(&mut admin, launcher[0]);
    for _ in 0..5 {
        refuse(&mut anna, UPDATE_ALL);
    }
    wait_until(20, || blocked(&mut admin) == 5);
}

#[test]
fn launcher_and_worker_terminated_together_lose_nothing() {
    let server = Server::start(&["writeguard.event_timeout = '50ms'"]);
    let db = guarded(&server);
    let (mut anna, mut admin) = (db.connect(&db.role("anna")), db.admin());
    let locker = lock_events(&db);
    refuse(&mut anna, UPDATE_ALL);
    let worker = stuck_worker(&mut admin, &db.name);
    let launcher = processes(&mut admin, None);
    terminate(&mut admin, launcher[0]);
    terminate(&mut admin, worker);
    refuse(&mut anna, UPDATE_ALL);
    drop(locker);
    wait_until(20, || blocked(&mut admin) == 2);
}

#[test]
fn worker_leaves_soon_after_its_work_and_the_launcher_is_in_no_database() {
    let server = Server::start(&[]);
    let db = guarded(&server);
    let mut admin = db.admin();
    refuse(&mut db.connect(&db.role("anna")), UPDATE_ALL);
    wait_until(3, || processes(&mut admin, Some(&db.name)).is_empty());
    assert_eq!(processes(&mut admin, None).len(), 1);
    let connected = "SELECT count(*) FROM pg_stat_activity \
                     WHERE backend_type LIKE 'pg_writeguard%' AND datname IS NOT NULL";
    assert_eq!(number(&mut admin, connected), 0);
}

// Trouble: the session goes away while it waits.

/// A refused write that waits for its event; gives its session's process.
fn waiting_refusal(db: &Database) -> (i32, JoinHandle<Result<(), postgres::Error>>) {
    let mut anna = db.connect(&db.role("anna"));
    let pid = pid_of(&mut anna);
    let waiting = in_background(anna, UPDATE_ALL);
    let mut admin = db.admin();
    stuck_worker(&mut admin, &db.name);
    let waits = "SELECT FROM pg_stat_activity WHERE pid = $1 AND wait_event_type = 'Extension'";
    wait_until(10, || admin.query_opt(waits, &[&pid]).unwrap().is_some());
    (pid, waiting)
}

/// After the lock is gone: one event, and no row was changed.
fn settles(db: &Database, locker: Client) {
    drop(locker);
    let mut admin = db.admin();
    wait_until(20, || blocked(&mut admin) == 1);
    assert_eq!(number(&mut admin, "SELECT count(*) FROM t WHERE note IS NOT NULL"), 0);
}

#[test]
fn cancel_ends_the_wait_and_the_event_is_stored_later() {
    let db = guarded(patient());
    let locker = lock_events(&db);
    let (pid, waiting) = waiting_refusal(&db);
    db.admin().execute("SELECT pg_cancel_backend($1)", &[&pid]).unwrap();
    let refusal = expect_refusal(waiting.join().unwrap());
    assert_eq!(refusal.sqlstate, "57014");
    assert_eq!(refusal.message, "canceling statement due to user request");
    settles(&db, locker);
}

#[test]
fn statement_timeout_ends_the_wait_and_the_event_is_stored_later() {
    let db = guarded(patient());
    let locker = lock_events(&db);
    let mut anna = db.connect_with(&db.role("anna"), "-c statement_timeout=1s");
    let refusal = expect_refusal(anna.batch_execute(UPDATE_ALL));
    assert_eq!(refusal.sqlstate, "57014");
    assert_eq!(refusal.message, "canceling statement due to statement timeout");
    settles(&db, locker);
}

#[test]
fn terminated_session_stops_waiting_and_the_event_is_stored_later() {
    let db = guarded(patient());
    let locker = lock_events(&db);
    let (pid, waiting) = waiting_refusal(&db);
    terminate(&mut db.admin(), pid);
    waiting.join().unwrap().unwrap_err();
    let mut admin = db.admin();
    let there = "SELECT FROM pg_stat_activity WHERE pid = $1";
    wait_until(10, || admin.query_opt(there, &[&pid]).unwrap().is_none());
    settles(&db, locker);
}

#[test]
fn entries_of_terminated_sessions_do_not_fill_the_queue() {
    const SESSIONS: usize = 10;
    let server = Server::start(&["writeguard.event_queue_size = '64kB'", "writeguard.event_timeout = '2s'"]);
    let db = guarded(&server);
    let mut admin = db.admin();
    admin.batch_execute("SELECT writeguard.set_policy('p', tables => '{public.t}', max_rows => 0)").unwrap();
    // Each round would fill more than half of the queue.
    for round in 1..=3 {
        let locker = lock_events(&db);
        let (mut pids, mut waiting) = (Vec::new(), Vec::new());
        for id in 1..=SESSIONS {
            let mut client = db.admin();
            pids.push(pid_of(&mut client));
            let statement = format!("UPDATE t SET note = '{}' WHERE id = {id}", "x".repeat(4_000));
            waiting.push(in_background(client, &statement));
        }
        let queued = i64::try_from(SESSIONS).unwrap();
        wait_until(2, || counters(&mut admin).waiting == queued);
        for pid in pids {
            terminate(&mut admin, pid);
        }
        for refused in waiting {
            refused.join().unwrap().unwrap_err();
        }
        drop(locker);
        wait_until(20, || blocked(&mut admin) == round * SESSIONS);
        wait_until(20, || counters(&mut admin).waiting == 0);
    }
    assert_eq!(counters(&mut admin).in_log_only, 0);
}

#[test]
fn server_stops_while_a_refused_write_waits() {
    let server = Server::start(&["writeguard.event_timeout = '5min'"]);
    let db = guarded(&server);
    let locker = lock_events(&db);
    let (_, waiting) = waiting_refusal(&db);
    let began = Instant::now();
    server.stop("fast");
    assert!(began.elapsed() < Duration::from_secs(20));
    assert!(waiting.join().unwrap().is_err());
    drop(locker);
    // A restart loses no event silently: what was not stored is in the log.
    assert!(
        logged(&server, &db.name).iter().any(|(_, json)| json["kind"] == "blocked" && json["statement"] == UPDATE_ALL)
    );
    server.start_again();
    refuse(&mut db.connect(&db.role("anna")), UPDATE_ALL);
    assert!(blocked(&mut db.admin()) >= 1);
}

// Trouble: the server crashes.

/// Waits until the server is back after a crash.
fn after_crash(server: &Server, db: &Database) -> Client {
    wait_until(30, || server.log().contains("all server processes terminated; reinitializing"));
    let mut client = None;
    wait_until(60, || {
        client = db.config("postgres").connect(NoTls).ok();
        client.is_some()
    });
    client.unwrap()
}

#[test]
fn event_survives_a_crash_right_after_the_error() {
    let server = Server::start(&[]);
    let db = guarded(&server);
    let mut anna = db.connect(&db.role("anna"));
    let pid = pid_of(&mut anna);
    refuse(&mut anna, UPDATE_ALL);
    kill(pid);

    let mut admin = after_crash(&server, &db);
    only_event(&mut admin, "blocked");
    // Shared memory is new, the launcher is back.
    refuse(&mut admin, UPDATE_ALL);
    wait_until(20, || blocked(&mut admin) == 2);
}

#[test]
fn crash_with_events_in_the_queue_leaves_them_in_the_log_and_the_server_working() {
    let server = Server::start(&["writeguard.event_timeout = '50ms'"]);
    let db = guarded(&server);
    let mut admin = db.admin();
    let locker = lock_events(&db);
    refuse(&mut db.connect(&db.role("anna")), UPDATE_ALL);
    let worker = stuck_worker(&mut admin, &db.name);
    kill(worker);
    drop(locker);

    let mut admin = after_crash(&server, &db);
    assert!(
        logged(&server, &db.name).iter().any(|(_, json)| json["kind"] == "blocked" && json["statement"] == UPDATE_ALL)
    );
    let before = blocked(&mut admin);
    refuse(&mut admin, "UPDATE t SET note = 'afterwards'");
    wait_until(20, || blocked(&mut admin) == before + 1);
}

// Databases come and go.

#[test]
fn drop_database_right_after_refusals() {
    let server = Server::shared();
    for _ in 0..3 {
        let db = guarded(server);
        let mut anna = db.connect(&db.role("anna"));
        for _ in 0..5 {
            refuse(&mut anna, UPDATE_ALL);
        }
        drop(anna);
        server.postgres().batch_execute(&format!("DROP DATABASE {}", db.name)).unwrap();
    }
}

#[test]
fn drop_database_while_nobody_waited_for_its_events() {
    let server = Server::start(&["writeguard.event_timeout = 0"]);
    for _ in 0..5 {
        let db = guarded(&server);
        refuse(&mut db.admin(), UPDATE_ALL);
        server.postgres().batch_execute(&format!("DROP DATABASE {}", db.name)).unwrap();
    }
    let db = guarded(&server);
    let mut admin = db.admin();
    wait_until(20, || counters(&mut admin).waiting == 0);
    refuse(&mut admin, UPDATE_ALL);
    wait_until(20, || blocked(&mut admin) == 1);
}

#[test]
fn create_database_from_a_template_right_after_refusals() {
    let server = Server::shared();
    let db = guarded(server);
    let mut anna = db.connect(&db.role("anna"));
    for _ in 0..5 {
        refuse(&mut anna, UPDATE_ALL);
    }
    drop(anna);
    let copy = format!("{}_copy", db.name);
    server.postgres().batch_execute(&format!("CREATE DATABASE {copy} TEMPLATE {}", db.name)).unwrap();

    let mut in_copy = db.config("postgres").dbname(&copy).connect(NoTls).unwrap();
    assert_eq!(blocked(&mut in_copy), 5);
    refuse(&mut in_copy, UPDATE_ALL);
    assert_eq!(blocked(&mut in_copy), 6);
    assert_eq!(blocked(&mut db.admin()), 5);
}

#[test]
fn two_databases_at_once_get_their_own_events() {
    let server = Server::shared();
    let dbs = [guarded(server), guarded(server)];
    thread::scope(|scope| {
        for db in &dbs {
            scope.spawn(|| {
                let mut client = db.admin();
                for _ in 0..20 {
                    refuse(&mut client, &format!("UPDATE t SET note = '{}'", db.name));
                }
            });
        }
    });
    for db in &dbs {
        let events = events(&mut db.admin(), "blocked");
        assert_eq!(events.len(), 20);
        for event in events {
            assert_eq!(event["statement"], format!("UPDATE t SET note = '{}'", db.name));
        }
    }
}

#[test]
fn locked_event_table_of_one_database_does_not_hold_up_another() {
    let server = Server::shared();
    let (one, other) = (guarded(server), guarded(server));
    let locker = lock_events(&one);
    let waiting = in_background(one.admin(), UPDATE_ALL);
    stuck_worker(&mut other.admin(), &one.name);
    let mut client = other.admin();
    refuse(&mut client, UPDATE_ALL);
    only_event(&mut client, "blocked");
    drop(locker);
    assert_eq!(expect_refusal(waiting.join().unwrap()).sqlstate, "WG001");
}

#[test]
fn database_without_the_extension_is_left_alone() {
    let server = Server::start(&["log_min_messages = debug1"]);
    let started = || server.log().matches(r#"starting background worker process "pg_writeguard worker""#).count();
    let plain = server.plain_database();
    make_table(&plain);
    let mut client = plain.admin();
    client
        .batch_execute(
            "UPDATE t SET note = 'x';
             DELETE FROM t;
             TRUNCATE t;
             BEGIN; INSERT INTO t VALUES (1); PREPARE TRANSACTION 'in a plain database';",
        )
        .unwrap();
    client.batch_execute("COMMIT PREPARED 'in a plain database'").unwrap();
    client.batch_execute("SET writeguard.enabled = off; UPDATE t SET note = 'x'").unwrap();
    assert_eq!(started(), 0);
    assert!(logged(&server, &plain.name).is_empty());

    // A worker for another database comes later than one for this would have.
    let db = guarded(&server);
    refuse(&mut db.admin(), UPDATE_ALL);
    assert!(started() > 0);
    assert!(processes(&mut client, Some(&plain.name)).is_empty());
}

#[test]
fn extension_dropped_while_events_are_queued_hangs_nothing() {
    let server = Server::start(&["writeguard.event_timeout = '50ms'"]);
    let db = guarded(&server);
    let mut anna = db.connect(&db.role("anna"));
    let mut locker = lock_events(&db);
    for _ in 0..3 {
        refuse(&mut anna, UPDATE_ALL);
    }
    stuck_worker(&mut db.admin(), &db.name);
    locker.batch_execute("SET lock_timeout = '10s'; DROP EXTENSION pg_writeguard; COMMIT").unwrap();
    drop(locker);

    // Without policies nothing is refused any more.
    anna.batch_execute(UPDATE_ALL).unwrap();
    drop(anna);
    let other = guarded(&server);
    let mut admin = other.admin();
    wait_until(20, || counters(&mut admin).waiting == 0);
    wait_until(20, || processes(&mut admin, Some(&db.name)).is_empty());

    let mut again = db.admin();
    again
        .batch_execute(
            "CREATE EXTENSION pg_writeguard;
             SELECT writeguard.set_policy('p', tables => '{public.t}', max_rows => 3)",
        )
        .unwrap();
    refuse(&mut again, UPDATE_ALL);
    wait_until(20, || blocked(&mut again) == 1);
    drop(again);
    server.postgres().batch_execute(&format!("DROP DATABASE {}", db.name)).unwrap();
}

// A standby.

/// A program of the private server, run as the user that the server runs as.
fn program(server: &Server, name: &str) -> Command {
    let bin = PathBuf::from(std::env::var_os("PGWG_BIN").expect("PGWG_BIN"));
    let owner = fs::metadata(server.data_dir()).unwrap();
    let mut command = Command::new(bin.join(name));
    for (variable, _) in std::env::vars_os() {
        if variable.to_str().is_some_and(|name| name.starts_with("PG")) {
            command.env_remove(variable);
        }
    }
    command.uid(owner.uid()).gid(owner.gid()).env("LC_ALL", "C").current_dir("/").stdin(Stdio::null());
    command
}

/// A server that follows another one; its directory is inside the other's.
struct Standby<'a> {
    primary: &'a Server,
    data: PathBuf,
}

impl<'a> Standby<'a> {
    const PORT: u16 = 5433;

    fn start(primary: &'a Server) -> Self {
        let data = primary.socket_dir().join("standby");
        let output = program(primary, "pg_basebackup")
            .args(["-U", "postgres", "-p", &primary.port().to_string()])
            .args(["-R", "-X", "stream", "-c", "fast", "--no-sync", "-h"])
            .arg(primary.socket_dir())
            .arg("-D")
            .arg(&data)
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        let standby = Standby { primary, data };
        let started = standby
            .pg_ctl("start")
            .args(["-o", &format!("-p {}", Self::PORT), "-l"])
            .arg(primary.socket_dir().join("standby.log"))
            .status()
            .unwrap();
        assert!(started.success());
        standby
    }

    fn pg_ctl(&self, action: &str) -> Command {
        let mut command = program(self.primary, "pg_ctl");
        command.args([action, "-s", "-w", "-D"]).arg(&self.data).stdout(Stdio::null()).stderr(Stdio::null());
        command
    }

    fn connect(&self, db: &Database) -> Client {
        Config::new()
            .host_path(self.primary.socket_dir())
            .port(Self::PORT)
            .user("postgres")
            .dbname(&db.name)
            .connect(NoTls)
            .unwrap()
    }
}

impl Drop for Standby<'_> {
    fn drop(&mut self) {
        let _ = self.pg_ctl("stop").args(["-m", "immediate"]).status();
    }
}

#[test]
fn standby_reads_and_runs_no_background_process_until_it_is_promoted() {
    let server = Server::start(&[]);
    let db = guarded(&server);
    refuse(&mut db.connect(&db.role("anna")), UPDATE_ALL);
    let standby = Standby::start(&server);
    let mut client = standby.connect(&db);
    assert_eq!(number(&mut client, "SELECT count(*) FROM t"), 10);
    assert_eq!(blocked(&mut client), 1);
    let applies = "SELECT count(*) FROM writeguard.effective('public.t', 'postgres', 'update') WHERE applies";
    assert_eq!(number(&mut client, applies), 1);
    let refusal = expect_refusal(client.batch_execute(UPDATE_ALL));
    assert_eq!(refusal.sqlstate, "25006");
    let running = "SELECT count(*) FROM pg_stat_activity WHERE backend_type LIKE 'pg_writeguard%'";
    assert_eq!(number(&mut client, running), 0);

    assert!(standby.pg_ctl("promote").status().unwrap().success());
    wait_until(20, || number(&mut client, running) > 0);
    refuse(&mut client, UPDATE_ALL);
    wait_until(20, || blocked(&mut client) == 2);
}

#[test]
fn who_drops_the_extension_is_no_victim_of_a_deadlock_with_the_worker() {
    let server = Server::start(&["deadlock_timeout = '200ms'"]);
    let db = server.database();
    let mut admin = db.admin();
    for round in 0..40 {
        // The commit wakes the worker, which is to send the notification.
        admin.batch_execute("SELECT writeguard.set_policy('p', max_rows => 5)").expect("a policy");
        std::thread::sleep(std::time::Duration::from_millis(round % 10));
        if let Err(error) = admin.batch_execute("DROP EXTENSION pg_writeguard") {
            panic!("round {round}: {:?}", Refusal::of(&error));
        }
        admin.batch_execute("CREATE EXTENSION pg_writeguard").expect("the extension again");
    }
}

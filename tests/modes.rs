//! Policies that only look on: `observe` and `warn` count to the end, tell the true numbers, and refuse nothing.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::common::limits::{number, pass};
use crate::common::{Database, Refusal, Server, expect_refusal, wait_until};
use postgres::{Client, Config, NoTls, SimpleQueryMessage};

/// A warning as a client got it.
#[derive(Debug, Clone)]
struct Warning {
    sqlstate: String,
    message: String,
    detail: String,
    hint: String,
    table: String,
}

/// A database with a table of a thousand rows, a session that writes, and one that sets policies and looks.
struct Stage {
    db: Database,
    admin: Client,
    writer: Client,
    warnings: Arc<Mutex<Vec<Warning>>>,
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
                 INSERT INTO t SELECT generate_series(1, 1000); RESET ROLE"
            ),
        );
        let warnings = Arc::new(Mutex::new(Vec::new()));
        let writer = connect(server, &db, &role, &warnings);
        Stage { db, admin, writer, warnings, role }
    }

    #[track_caller]
    fn policy(&mut self, arguments: &str) {
        self.named("p", arguments);
    }

    #[track_caller]
    fn named(&mut self, name: &str, arguments: &str) {
        pass(&mut self.admin, &format!("SELECT writeguard.set_policy('{name}', tables => '{{t}}', {arguments})"));
    }

    #[track_caller]
    fn pass(&mut self, sql: &str) {
        pass(&mut self.writer, sql);
    }

    /// Kind, policy, mode, operation, scope, limit and rows of what is stored, once there are that many.
    #[track_caller]
    fn events(&mut self, expected: usize) -> Vec<String> {
        let admin = &mut self.admin;
        let sql = "SELECT concat_ws(' ', kind, policy, mode, operation, relation, scope, coalesce(row_limit::text, '-'),
                        coalesce(rows::text, '-'))
                   FROM writeguard.event WHERE kind IN ('observed', 'warned', 'blocked', 'overridden', 'token_refused') ORDER BY id";
        let read = |admin: &mut Client| -> Vec<String> {
            admin.query(sql, &[]).expect("events").iter().map(|row| row.get(0)).collect()
        };
        let mut events = Vec::new();
        wait_until(10, || {
            events = read(admin);
            events.len() >= expected && nothing_waits(admin)
        });
        assert_eq!(events.len(), expected, "{events:#?}");
        events
    }

    /// The last of them.
    #[track_caller]
    fn last_event(&mut self, expected: usize) -> String {
        self.events(expected).pop().expect("an event")
    }

    fn warnings(&self) -> Vec<Warning> {
        std::mem::take(&mut self.warnings.lock().unwrap())
    }
}

fn nothing_waits(admin: &mut Client) -> bool {
    number(admin, "SELECT waiting FROM writeguard.event_queue") == 0
}

fn connect(server: &Server, db: &Database, role: &str, warnings: &Arc<Mutex<Vec<Warning>>>) -> Client {
    let warnings = Arc::clone(warnings);
    let mut config = Config::new();
    config.host_path(server.socket_dir()).port(server.port()).user(role).dbname(&db.name);
    config.notice_callback(move |notice| {
        let text = |field: Option<&str>| field.unwrap_or_default().to_owned();
        if notice.severity() == "WARNING" {
            warnings.lock().unwrap().push(Warning {
                sqlstate: notice.code().code().into(),
                message: notice.message().into(),
                detail: text(notice.detail()),
                hint: text(notice.hint()),
                table: text(notice.table()),
            });
        }
    });
    config.connect(NoTls).expect("a connection")
}

#[test]
fn an_observed_statement_runs_to_its_end_and_its_true_number_is_recorded() {
    let mut stage = Stage::new();
    stage.policy("max_rows => 10, mode => 'observe'");
    stage.pass("UPDATE t SET v = 1 WHERE id <= 10");
    stage.pass("UPDATE t SET v = 1");
    assert_eq!(number(&mut stage.admin, "SELECT count(*) FROM t WHERE v = 1"), 1000);
    assert_eq!(stage.events(1), ["observed p observe update public.t statement 10 1000"]);
    stage.writer.execute("DELETE FROM t WHERE id > $1", &[&900]).unwrap();
    assert_eq!(stage.last_event(2), "observed p observe delete public.t statement 10 100");
    assert!(stage.warnings().is_empty());
    let row = stage
        .admin
        .query_one("SELECT login, role, statement, xid IS NOT NULL, pid FROM writeguard.event WHERE rows = 100", &[])
        .unwrap();
    assert_eq!((row.get::<_, &str>(0), row.get::<_, &str>(1)), (stage.role.as_str(), stage.role.as_str()));
    assert_eq!(row.get::<_, &str>(2), "DELETE FROM t WHERE id > $1");
    assert!(row.get::<_, bool>(3));
}

#[test]
fn a_warning_has_both_numbers_and_comes_with_the_statement() {
    let mut stage = Stage::new();
    stage.policy("max_rows => 10, mode => 'warn'");
    stage.pass("UPDATE t SET v = 1 WHERE id <= 10");
    assert!(stage.warnings().is_empty());
    stage.pass("UPDATE t SET v = 1 WHERE id <= 11");
    let warnings = stage.warnings();
    let [warning] = warnings.as_slice() else { panic!("{warnings:?}") };
    assert_eq!(warning.message, "update of table \"public.t\" exceeds the limit of 10 rows per statement: 11 rows");
    assert_eq!((warning.sqlstate.as_str(), warning.table.as_str()), ("WG001", "t"));
    assert!(warning.detail.contains("\"p\" has mode warn"), "{warning:?}");
    assert!(warning.hint.contains("writeguard.my_events"), "{warning:?}");
    assert_eq!(stage.events(1), ["warned p warn update public.t statement 10 11"]);
    pass(
        &mut stage.writer,
        "SELECT id, policy, rows, row_limit FROM writeguard.my_events WHERE kind = 'warned' ORDER BY id DESC;",
    );
    // In a block it can still be taken back: it comes, and is recorded, before the end of the block.
    stage.pass("BEGIN; UPDATE t SET v = 2");
    let warnings = stage.warnings();
    assert!(warnings.len() == 1 && warnings[0].hint.starts_with("ROLLBACK;"), "{warnings:?}");
    assert_eq!(stage.last_event(2), "warned p warn update public.t statement 10 1000");
    stage.pass("ROLLBACK");
    // The extended protocol, in a block too, where the portal outlives its command.
    stage.pass("BEGIN");
    stage.writer.execute("UPDATE t SET v = $1", &[&3]).unwrap();
    assert_eq!(stage.last_event(3), "warned p warn update public.t statement 10 1000");
    assert_eq!(stage.warnings().len(), 1);
    stage.writer.query("UPDATE t SET v = $1 WHERE id <= 12 RETURNING id", &[&3]).unwrap();
    assert_eq!(stage.last_event(4), "warned p warn update public.t statement 10 12");
    stage.pass("ROLLBACK");
    stage.events(4);
    // Who does not want to see warnings still has them on record.
    stage.warnings();
    stage.pass("SET client_min_messages = error; UPDATE t SET v = 4");
    stage.events(5);
    assert!(stage.warnings().is_empty());
}

#[test]
fn a_statement_is_recorded_once_with_all_that_it_sets_off() {
    let mut stage = Stage::new();
    stage.policy("max_rows => 10, mode => 'warn'");
    stage.pass(
        "CREATE TABLE child (id int REFERENCES t ON DELETE CASCADE);
         CREATE RULE again AS ON INSERT TO child DO ALSO UPDATE t SET v = v + 1 WHERE id <= 20;
         CREATE FUNCTION many() RETURNS void LANGUAGE plpgsql AS
         $$BEGIN FOR n IN 1..50 LOOP UPDATE t SET v = v + 1 WHERE id = n; END LOOP; END$$",
    );
    for (sql, rows) in [
        ("DO $$BEGIN UPDATE t SET v = 1; UPDATE t SET v = 2; END$$", 2000),
        ("SELECT many()", 50),
        ("WITH a AS (UPDATE t SET v = 1 WHERE id <= 5 RETURNING id) UPDATE t SET v = 2 WHERE id BETWEEN 6 AND 15", 15),
        ("INSERT INTO child SELECT 1 FROM generate_series(1, 3)", 20),
        ("EXPLAIN ANALYZE UPDATE t SET v = 1 WHERE id <= 30", 30),
        ("MERGE INTO t USING generate_series(1, 44) AS g ON t.id = g WHEN MATCHED THEN UPDATE SET v = 1", 44),
        ("PREPARE q AS UPDATE t SET v = 1 WHERE id <= 33; EXECUTE q", 33),
    ] {
        pass(&mut stage.admin, "TRUNCATE writeguard.event");
        stage.warnings();
        for block in [false, true] {
            stage.pass(if block { "BEGIN; SELECT" } else { "SELECT" });
            for command in sql
                .split("; ")
                .filter(|_| !sql.starts_with("DO"))
                .chain([sql].into_iter().filter(|_| sql.starts_with("DO")))
            {
                stage.pass(command);
            }
            let expected = usize::from(block) + 1;
            assert!(
                stage.last_event(expected).ends_with(&format!("statement 10 {rows}")),
                "{sql}: {:?}",
                stage.events(expected)
            );
            stage.pass(if block { "ROLLBACK" } else { "SELECT" });
            stage.pass("DEALLOCATE ALL");
        }
        let warnings = stage.warnings();
        assert_eq!(warnings.len(), 2, "{sql}: {warnings:?}");
        assert!(warnings.iter().all(|warning| warning.message.ends_with(&format!(": {rows} rows"))), "{warnings:?}");
    }
}

#[test]
fn rows_of_deferred_triggers_belong_to_the_statement_where_nobody_opened_a_block() {
    let mut stage = Stage::new();
    stage.policy("max_rows => 10, mode => 'warn'");
    stage.pass(
        "CREATE TABLE log (id int);
         CREATE FUNCTION later() RETURNS trigger LANGUAGE plpgsql AS
         $$BEGIN UPDATE t SET v = v + 1 WHERE id BETWEEN 101 AND 103; RETURN NULL; END$$;
         CREATE CONSTRAINT TRIGGER later AFTER INSERT ON log DEFERRABLE INITIALLY DEFERRED
         FOR EACH ROW EXECUTE FUNCTION later()",
    );
    stage.pass("WITH i AS (INSERT INTO log VALUES (1)) UPDATE t SET v = 1 WHERE id <= 12");
    assert_eq!(stage.events(1), ["warned p warn update public.t statement 10 15"]);
    assert_eq!(stage.warnings().len(), 1);
    // Past the limit by what is deferred alone.
    stage.pass("INSERT INTO log SELECT generate_series(1, 4)");
    assert_eq!(stage.last_event(2), "warned p warn update public.t statement 10 12");
}

#[test]
fn each_limit_is_observed_over_what_it_counts() {
    let mut stage = Stage::new();
    let delete = |from: i32, to: i32| format!("DELETE FROM t WHERE id BETWEEN {from} AND {to}");
    stage.policy("max_rows_per_transaction => 10, mode => 'observe'");
    stage.pass(&format!("BEGIN; {}; {}", delete(1, 8), delete(9, 13)));
    assert_eq!(stage.last_event(1), "observed p observe delete public.t transaction 10 13");
    stage.pass(&delete(14, 15));
    assert_eq!(stage.last_event(2), "observed p observe delete public.t transaction 10 15");
    stage.pass("COMMIT");
    stage.pass(&delete(16, 20));

    stage.policy("max_fraction => 0.1, mode => 'observe'");
    stage.pass("ANALYZE t");
    stage.pass(&delete(21, 40));
    stage.pass("UPDATE t SET v = 7");
    let event = stage.last_event(3);
    assert!(event.starts_with("observed p observe update public.t fraction ") && event.ends_with(" 960"), "{event}");

    stage.policy("require_where => true, mode => 'observe'");
    stage.pass("UPDATE t SET v = 8 WHERE true");
    assert_eq!(stage.last_event(4), "observed p observe update public.t where - 960");
    stage.pass("UPDATE t SET v = 8 WHERE id > 0");

    stage.policy("require_transaction => true, mode => 'warn'");
    stage.warnings();
    stage.pass("UPDATE t SET v = 9 WHERE id <= 22");
    stage.pass(&delete(41, 44));
    assert_eq!(stage.last_event(5), "warned p warn delete public.t block 1 4");
    let warnings = stage.warnings();
    assert_eq!(warnings.len(), 1, "{warnings:?}");
    assert_eq!(
        warnings[0].message,
        "delete of more than one row of table \"public.t\" outside a transaction block: 4 rows"
    );
    stage.pass("BEGIN; UPDATE t SET v = 9; COMMIT");

    stage.policy("operations => '{truncate,drop}', max_rows => 10, mode => 'warn'");
    stage.pass("TRUNCATE t");
    assert_eq!(stage.last_event(6), "warned p warn truncate public.t statement 10 956");
    assert_eq!(stage.warnings()[0].sqlstate, "WG005");
    stage.pass("INSERT INTO t SELECT generate_series(1, 30)");
    stage.pass("BEGIN; ALTER TABLE t RENAME TO u");
    assert_eq!(stage.last_event(7), "warned p warn drop public.t statement 10 30");
    stage.pass("ROLLBACK; DROP TABLE t");
    assert_eq!(stage.last_event(8), "warned p warn drop public.t statement 10 30");
    assert_eq!(stage.warnings().len(), 2);
}

#[test]
fn an_observed_rate_is_used_up_and_then_goes_over() {
    let mut stage = Stage::new();
    let delete = |from: i32, to: i32| format!("DELETE FROM t WHERE id BETWEEN {from} AND {to}");
    stage.policy("rate_rows => 10, rate_interval => '1 day', mode => 'warn'");
    stage.pass(&delete(1, 6));
    stage.pass(&delete(7, 20));
    assert_eq!(stage.last_event(1), "warned p warn delete public.t rate 10 20");
    assert_eq!(
        stage.warnings()[0].message,
        "delete of table \"public.t\" exceeds the limit of 10 rows per 1 d: 20 rows"
    );
    // Empty, not in debt.
    stage.pass(&delete(21, 21));
    assert_eq!(stage.last_event(2), "warned p warn delete public.t rate 10 11");
    // What is rolled back goes back, as far as it was taken.
    stage.policy("rate_rows => 12, rate_interval => '1 day', mode => 'observe'");
    stage.pass(&format!("BEGIN; {}; ROLLBACK", delete(31, 60)));
    assert_eq!(stage.last_event(3), "observed p observe delete public.t rate 12 30");
    stage.pass(&delete(31, 42));
    // The bucket is the same when the policy gets serious.
    stage.policy("rate_rows => 12, rate_interval => '1 day'");
    assert_eq!(expect_refusal(stage.writer.batch_execute(&delete(43, 43))).sqlstate, "WG001");
}

#[test]
fn an_attempt_is_recorded_whatever_becomes_of_it() {
    let mut stage = Stage::new();
    stage.policy("max_rows => 10, mode => 'warn'");
    // An error of its own, an exception block, a savepoint, a rollback, a cancelled commit.
    expect_refusal(stage.writer.batch_execute("UPDATE t SET v = 1 / (500 - id)"));
    let event = stage.last_event(1);
    assert!(event.ends_with("statement 10 499"), "{event}");
    stage.pass("DO $$BEGIN BEGIN UPDATE t SET v = 1; RAISE 'x'; EXCEPTION WHEN raise_exception THEN NULL; END; END$$");
    assert_eq!(stage.last_event(2), "warned p warn update public.t statement 10 1000");
    stage.pass(
        "DO $$BEGIN BEGIN UPDATE t SET v = 1 WHERE id <= 60; RAISE 'x'; EXCEPTION WHEN raise_exception THEN NULL; END;
         UPDATE t SET v = 1 WHERE id <= 40; END$$",
    );
    assert_eq!(stage.last_event(3), "warned p warn update public.t statement 10 60");
    stage.warnings();
    stage.pass("BEGIN; SAVEPOINT s");
    expect_refusal(
        stage.writer.batch_execute(
            "DO $$BEGIN FOR n IN 1..299 LOOP UPDATE t SET v = 1 WHERE id = n; END LOOP; RAISE 'x'; END$$",
        ),
    );
    let event = stage.last_event(4);
    assert!(event.ends_with("statement 10 299"), "{event}");
    // The error said more than a warning could.
    assert!(stage.warnings().is_empty());
    stage.pass("ROLLBACK TO s; UPDATE t SET v = 5 WHERE id <= 11");
    stage.pass("ROLLBACK");
    assert_eq!(stage.last_event(5), "warned p warn update public.t statement 10 11");
    // A session that is terminated in the middle.
    let pid = number(&mut stage.writer, "SELECT pg_backend_pid()");
    let (server, role) = (Server::shared(), stage.role.clone());
    let mut victim = connect(server, &stage.db, &role, &stage.warnings);
    let victims = number(&mut victim, "SELECT pg_backend_pid()");
    assert_ne!(pid, victims);
    let thread = std::thread::spawn(move || {
        victim.batch_execute("DO $$BEGIN UPDATE t SET v = 1 WHERE id <= 70; PERFORM pg_sleep(60); END$$").unwrap_err();
    });
    let asleep = format!("SELECT count(*) FROM pg_stat_activity WHERE pid = {victims} AND wait_event = 'PgSleep'");
    let admin = &mut stage.admin;
    wait_until(10, || number(admin, &asleep) == 1);
    pass(admin, &format!("SELECT pg_terminate_backend({victims})"));
    thread.join().unwrap();
    assert_eq!(stage.last_event(6), "warned p warn update public.t statement 10 70");
    // A commit that fails, a prepared transaction, a procedure that commits.
    stage.pass("CREATE TABLE once (id int UNIQUE DEFERRABLE INITIALLY DEFERRED)");
    expect_refusal(
        stage.writer.batch_execute("WITH a AS (INSERT INTO once VALUES (1), (1)) UPDATE t SET v = 1 WHERE id <= 13"),
    );
    assert_eq!(stage.last_event(7), "warned p warn update public.t statement 10 13");
    stage.pass("BEGIN; UPDATE t SET v = 1 WHERE id <= 14; PREPARE TRANSACTION 'modes'");
    assert_eq!(stage.last_event(8), "warned p warn update public.t statement 10 14");
    stage.pass("ROLLBACK PREPARED 'modes'");
    stage.pass(
        "CREATE PROCEDURE two() LANGUAGE plpgsql AS $$BEGIN
           UPDATE t SET v = 1 WHERE id <= 15; COMMIT; UPDATE t SET v = 1 WHERE id <= 5; COMMIT;
           UPDATE t SET v = 1 WHERE id <= 16; END$$",
    );
    stage.pass("CALL two()");
    let events = stage.events(10);
    assert!(events[8].ends_with("statement 10 15") && events[9].ends_with("statement 10 16"), "{events:?}");
}

#[test]
fn beside_a_policy_that_refuses_it_still_records() {
    let mut stage = Stage::new();
    stage.named("looks", "max_rows => 10, mode => 'observe'");
    stage.named("refuses", "max_rows => 100");
    stage.named("larger", "max_rows => 500, mode => 'warn'");
    let refusal = expect_refusal(stage.writer.batch_execute("UPDATE t SET v = 1"));
    assert_eq!(refusal.sqlstate, "WG001");
    assert!(refusal.detail.contains("\"refuses\" allows 100"), "{refusal:?}");
    let mut events = stage.events(2);
    events.sort();
    assert_eq!(
        events,
        [
            "blocked refuses enforce update public.t statement 100 101",
            "observed looks observe update public.t statement 10 101",
        ]
    );
    assert!(stage.warnings().is_empty());
    // The same row is past both limits.
    stage.named("looks", "max_rows => 100, mode => 'observe'");
    expect_refusal(stage.writer.batch_execute("UPDATE t SET v = 1"));
    assert!(stage.events(4).contains(&"observed looks observe update public.t statement 100 101".to_owned()));
    // Swallowed: the statement goes on, and is over later.
    stage.pass(
        "DO $$BEGIN BEGIN UPDATE t SET v = 1; EXCEPTION WHEN SQLSTATE 'WG001' THEN NULL; END;
         UPDATE t SET v = 1 WHERE id <= 20; END$$",
    );
    let events = stage.events(6);
    assert!(
        events[4].starts_with("blocked") && events[5] == "observed looks observe update public.t statement 100 101",
        "{events:?}"
    );
}

#[test]
fn it_needs_no_override_and_uses_none() {
    let mut stage = Stage::new();
    stage.named("looks", "max_rows => 10, mode => 'observe', override => 'never'");
    stage.named("refuses", "max_rows => 100");
    stage.pass("SET writeguard.override = on; UPDATE t SET v = 1 WHERE id <= 50");
    assert_eq!(stage.events(1), ["observed looks observe update public.t statement 10 50"]);
    // A token lifts what refuses, and is not spent on what does not.
    let request = "SELECT writeguard.request('UPDATE t SET v = 2 WHERE id <= 200', 'reason')";
    let id: i64 = stage.writer.query_one(request, &[]).unwrap().get(0);
    // The rehearsal is nothing that happened.
    stage.events(1);
    let token: String = stage.admin.query_one("SELECT writeguard.approve($1)", &[&id]).unwrap().get(0);
    stage.pass(&format!("BEGIN; SET LOCAL writeguard.override = on; SET LOCAL writeguard.token = '{token}'"));
    stage.pass("UPDATE t SET v = 1 WHERE id <= 50");
    stage.pass("UPDATE t SET v = 2 WHERE id <= 200");
    stage.pass("COMMIT");
    let mut events = stage.events(4);
    events.sort();
    assert_eq!(
        events,
        [
            "observed looks observe update public.t statement 10 200",
            "observed looks observe update public.t statement 10 50",
            "observed looks observe update public.t statement 10 50",
            "overridden refuses enforce update public.t statement 100 200",
        ]
    );
    assert_eq!(number(&mut stage.admin, "SELECT count(*) FROM t WHERE v = 2"), 200);
}

#[test]
fn a_cursor_is_not_over_before_its_last_row() {
    let mut stage = Stage::new();
    stage.policy("max_rows => 10, mode => 'observe'");
    stage.pass(
        "CREATE FUNCTION change(n int) RETURNS int LANGUAGE plpgsql AS
         $$BEGIN UPDATE t SET v = v + 1 WHERE id = n; RETURN n; END$$",
    );
    let mut transaction = stage.writer.transaction().unwrap();
    let portal = transaction.bind("SELECT change(n) FROM generate_series(1, 30) AS n", &[]).unwrap();
    for _ in 0..2 {
        assert_eq!(transaction.query_portal(&portal, 12).unwrap().len(), 12);
    }
    transaction.batch_execute("UPDATE t SET v = 1 WHERE id <= 40").unwrap();
    assert_eq!(transaction.query_portal(&portal, 12).unwrap().len(), 6);
    transaction.commit().unwrap();
    let events = stage.events(2);
    assert!(events[0].ends_with("statement 10 40") && events[1].ends_with("statement 10 30"), "{events:?}");
    // Each FETCH is a statement of its own.
    stage.pass("BEGIN; DECLARE c CURSOR FOR SELECT change(n) FROM generate_series(1, 30) AS n");
    stage.pass("FETCH 12 FROM c");
    assert!(stage.last_event(3).ends_with("statement 10 12"));
    stage.pass("ROLLBACK");
}

#[test]
fn statements_of_one_string_are_told_apart() {
    let mut stage = Stage::new();
    stage.policy("max_rows => 10, mode => 'warn'");
    let messages = stage
        .writer
        .simple_query(
            "UPDATE t SET v = 1 WHERE id <= 11; UPDATE t SET v = 1 WHERE id <= 5; UPDATE t SET v = 1 WHERE id <= 12",
        )
        .unwrap();
    assert_eq!(messages.iter().filter(|one| matches!(one, SimpleQueryMessage::CommandComplete(_))).count(), 3);
    let events = stage.events(2);
    assert!(events[0].ends_with(" 11") && events[1].ends_with(" 12"), "{events:?}");
    let statements: Vec<String> = stage
        .admin
        .query("SELECT statement FROM writeguard.event WHERE kind = 'warned' ORDER BY id", &[])
        .unwrap()
        .iter()
        .map(|row| row.get(0))
        .collect();
    assert_eq!(statements, ["UPDATE t SET v = 1 WHERE id <= 11", "UPDATE t SET v = 1 WHERE id <= 12"]);
    assert_eq!(stage.warnings().len(), 2);
}

#[test]
fn each_policy_and_each_role_has_its_own_record() {
    let mut stage = Stage::new();
    stage.named("one", "max_rows => 10, mode => 'observe'");
    stage.named("two", "max_rows => 20, mode => 'warn', application => '%'");
    let role = stage.db.role("acting");
    pass(&mut stage.admin, &format!("GRANT {role} TO {}; GRANT ALL ON t TO {role}", stage.role));
    stage.pass(&format!("SET ROLE {role}; UPDATE t SET v = 1 WHERE id <= 30"));
    let mut events = stage.events(2);
    events.sort();
    assert_eq!(
        events,
        ["observed one observe update public.t statement 10 30", "warned two warn update public.t statement 20 30"]
    );
    let roles = format!("SELECT count(*) FROM writeguard.event WHERE login = '{}' AND role = '{role}'", stage.role);
    assert_eq!(number(&mut stage.admin, &roles), 2);
}

#[test]
fn effective_shows_the_mode_and_a_closer_policy_that_looks_on_sets_aside_none_that_refuses() {
    let mut stage = Stage::new();
    pass(&mut stage.admin, "SELECT writeguard.set_policy('wide', tables => '{public.*}', max_rows => 5)");
    stage.named("near", "max_rows => 10, mode => 'observe'");
    let rows: Vec<(String, bool, Option<String>, String)> = stage
        .admin
        .query(
            "SELECT policy, applies, why_not, mode FROM writeguard.effective('t', 'postgres', 'update') ORDER BY 1",
            &[],
        )
        .unwrap()
        .iter()
        .map(|row| (row.get(0), row.get(1), row.get(2), row.get(3)))
        .collect();
    assert_eq!(rows, [("near".into(), true, None, "observe".into()), ("wide".into(), true, None, "enforce".into())]);
    expect_refusal(stage.writer.batch_execute("UPDATE t SET v = 1"));
    // One that refuses sets aside any; and among themselves those that look on are as others.
    pass(
        &mut stage.admin,
        "SELECT writeguard.set_policy('wide', tables => '{public.*}', max_rows => 5, mode => 'warn')",
    );
    stage.pass("UPDATE t SET v = 1");
    let applying = "SELECT string_agg(policy, ' ') FROM writeguard.effective('t', 'postgres', 'update') WHERE applies";
    assert_eq!(stage.admin.query_one(applying, &[]).unwrap().get::<_, &str>(0), "near");
}

#[test]
fn a_flood_is_stored_as_so_many_and_the_largest() {
    let server = Server::start(&["writeguard.observed_per_minute = 5"]);
    let mut stage = Stage::on(&server);
    stage.policy("max_rows => 10, mode => 'observe'");
    // Within one minute of the server's clock.
    let seconds = number(&mut stage.admin, "SELECT extract(second FROM clock_timestamp())::int");
    if seconds > 40 {
        std::thread::sleep(Duration::from_secs(u64::try_from(61 - seconds).unwrap()));
    }
    for n in 0..30 {
        stage.pass(&format!("UPDATE t SET v = 1 WHERE id <= {}", if n == 20 { 777 } else { 11 + n }));
    }
    assert!(stage.events(5).iter().all(|event| event.starts_with("observed p observe update public.t statement 10 1")));
    assert_eq!(number(&mut stage.admin, "SELECT summed_up FROM writeguard.event_queue"), 25);
    // The log is not flooded either.
    assert_eq!(server.log().matches("write past a limit, observed").count(), 5);
    // A restart keeps it.
    let Stage { db, admin, writer, warnings, role } = stage;
    drop((admin, writer));
    server.restart();
    let mut stage = Stage { admin: db.admin(), writer: connect(&server, &db, &role, &warnings), db, warnings, role };
    assert_eq!(stage.last_event(6), "observed p observe update public.t statement 10 777");
    let reason: String = stage
        .admin
        .query_one("SELECT reason FROM writeguard.event WHERE rows = 777 AND statement LIKE '%777'", &[])
        .unwrap()
        .get(0);
    assert!(reason.contains("largest of 25 events"), "{reason}");
    // At the end of the minute, though nothing follows.
    for n in 0..8 {
        stage.pass(&format!("UPDATE t SET v = 1 WHERE id <= {}", 50 + n));
    }
    let admin = &mut stage.admin;
    wait_until(90, || {
        number(admin, "SELECT count(*) FROM writeguard.event WHERE reason LIKE 'The largest%' AND rows = 57") == 1
    });
    // Not one by one at all.
    pass(admin, "ALTER SYSTEM SET writeguard.observed_per_minute = 0");
    pass(admin, "SELECT pg_reload_conf()");
    wait_until(10, || {
        number(
            admin,
            "SELECT count(*) FROM pg_settings WHERE name = 'writeguard.observed_per_minute' AND setting = '0'",
        ) == 1
    });
}

#[test]
fn what_cannot_be_counted_is_let_pass_and_said() {
    let mut stage = Stage::new();
    let socket = Server::shared().socket_dir();
    pass(
        &mut stage.admin,
        &format!(
            "CREATE EXTENSION postgres_fdw;
             CREATE SERVER loop FOREIGN DATA WRAPPER postgres_fdw
               OPTIONS (host '{}', port '{}', dbname '{}');
             CREATE USER MAPPING FOR PUBLIC SERVER loop OPTIONS (user 'postgres', password_required 'false');
             CREATE TABLE behind AS SELECT n FROM generate_series(1, 50) AS n;
             CREATE FOREIGN TABLE far (n int) SERVER loop OPTIONS (table_name 'behind');
             GRANT ALL ON far TO {};
             SELECT writeguard.set_policy('far', tables => '{{far}}', max_rows => 10, mode => 'observe')",
            socket.display(),
            Server::shared().port(),
            stage.db.name,
            stage.role
        ),
    );
    pass(&mut stage.admin, "UPDATE far SET n = n + 1");
    assert_eq!(stage.last_event(1), "observed far observe update public.far statement 10 50");
    pass(&mut stage.admin, "TRUNCATE far");
    assert_eq!(stage.last_event(2), "observed far observe truncate public.far statement 10 -");
    assert_eq!(number(&mut stage.admin, "SELECT count(*) FROM behind"), 0);
    let reason: String =
        stage.admin.query_one("SELECT reason FROM writeguard.event WHERE operation = 'truncate'", &[]).unwrap().get(0);
    assert!(reason.contains("foreign table"), "{reason}");
}

#[test]
fn nobody_switches_it_on_for_others() {
    let mut stage = Stage::new();
    let refusal = expect_refusal(
        stage.writer.batch_execute("SELECT writeguard.set_policy('p', tables => '{t}', mode => 'observe')"),
    );
    assert_eq!(refusal.sqlstate, "42501");
    let refusal = expect_refusal(stage.writer.batch_execute("SET writeguard.observed_per_minute = 0"));
    assert_eq!(refusal.sqlstate, "55P02", "{refusal:?}");
    let _ = Refusal::of;
}

#[test]
fn letters_of_another_encoding_do_no_harm_in_an_aborted_transaction() {
    let server = Server::shared();
    let mut admin = server.postgres();
    pass(&mut admin, "CREATE DATABASE modes_latin ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0");
    let sql = "CREATE EXTENSION pg_writeguard;
        CREATE TABLE t (v text); INSERT INTO t SELECT 'a' FROM generate_series(1, 20);
        SELECT writeguard.set_policy('p', tables => '{t}', max_rows => 10, mode => 'warn');
        DO $$BEGIN UPDATE t SET v = 'Bücher für André'; RAISE 'died'; END$$;
        BEGIN; SAVEPOINT s; DO $$BEGIN UPDATE t SET v = 'été'; RAISE 'died'; END$$; ROLLBACK TO s; COMMIT;
        UPDATE t SET v = 'Bücher';";
    let output = server.psql("modes_latin", "postgres", sql);
    assert!(output.matches("died").count() == 2 && output.contains("WARNING"), "{output}");
    wait_until(10, || {
        server.psql("modes_latin", "postgres", "\\t on\nSELECT waiting FROM writeguard.event_queue;").trim() == "0"
    });
    let stored = server.psql(
        "modes_latin",
        "postgres",
        "\\t on\nSELECT rows, statement FROM writeguard.event WHERE kind = 'warned' ORDER BY id;",
    );
    assert!(
        stored.contains("Bücher für André") && stored.contains("été") && stored.matches("20").count() == 3,
        "{stored}"
    );
    pass(&mut admin, "DROP DATABASE modes_latin WITH (FORCE)");
}

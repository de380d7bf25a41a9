//! Errors of other people that pass through us: whoever raised them, and whatever the server's environment is, they come out
//! as they were raised.

use crate::common::session::pass;
use crate::common::{Refusal, Server, expect_refusal, server_command, wait_until};
use postgres::Client;

/// A server in whose environment RUST_BACKTRACE is set.
fn server_with_backtraces(value: &str) -> Server {
    let server = Server::start(&[]);
    server.stop("fast");
    let mut start = server_command(std::path::Path::new(&std::env::var("PGWG_BIN").unwrap()).join("pg_ctl"));
    start.env("RUST_BACKTRACE", value).env("RUST_LIB_BACKTRACE", value);
    start.args(["start", "-s", "-w", "-D"]).arg(server.data_dir()).arg("-l").arg(server.socket_dir().join("log"));
    assert!(start.status().unwrap().success());
    server
}

#[track_caller]
fn refused(client: &mut Client, sql: &str) -> Refusal {
    expect_refusal(client.batch_execute(sql))
}

const SETUP: &str = "
    CREATE TABLE t (id int PRIMARY KEY, v int);
    INSERT INTO t SELECT n, n FROM generate_series(1, 10) AS n;
    SELECT writeguard.set_policy('p', tables => '{public.t}', max_rows => 3, override => 'flag', undo => '1 day');
    CREATE FUNCTION loud() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        RAISE EXCEPTION 'loud' USING ERRCODE = 'SW001', DETAIL = 'the detail', HINT = 'the hint',
            CONSTRAINT = 'a constraint', TABLE = 'a table', SCHEMA = 'a schema';
    END $$;";

/// What `loud` raises.
#[track_caller]
fn is_loud(refusal: &Refusal) {
    let expected = ["SW001", "loud", "the detail", "the hint", "a constraint", "a table", "a schema"];
    let Refusal { sqlstate, message, detail, hint, constraint, table, schema, context, .. } = refusal;
    assert_eq!([sqlstate, message, detail, hint, constraint, table, schema], expected);
    assert!(context.starts_with("PL/pgSQL function ") && context.contains("loud() line 2 at RAISE"), "{context}");
}

/// Ways to have our own SQL write an event in the caller's transaction.
const WRITES: [&str; 3] = [
    "SET writeguard.override = on; UPDATE t SET v = 0",
    "SELECT writeguard.set_policy('q', tables => '{public.t}', max_rows => 5)",
    "SELECT writeguard.request('DELETE FROM t', reason => 'why')",
];

#[test]
fn a_trigger_on_our_table_says_what_it_says() {
    let mut admin = Server::shared().database().admin();
    pass(&mut admin, SETUP);
    pass(&mut admin, "SELECT writeguard.set_policy('p', tables => '{public.t}', max_rows => 3, override => 'token')");
    pass(&mut admin, "CREATE TRIGGER loud BEFORE INSERT ON writeguard.event FOR EACH ROW EXECUTE FUNCTION loud()");
    for sql in &WRITES[1..] {
        for _ in 0..50 {
            is_loud(&refused(&mut admin, sql));
        }
        if sql.contains("request") {
            // It acts for nobody but the client.
            continue;
        }
        // Also where somebody catches it, in a subtransaction that is rolled back, again and again.
        let caught = format!(
            "DO $d$ DECLARE detail text; state text; BEGIN
                 FOR n IN 1..50 LOOP
                     BEGIN PERFORM {}; RAISE 'passed';
                     EXCEPTION WHEN SQLSTATE 'SW001' THEN
                         GET STACKED DIAGNOSTICS detail = PG_EXCEPTION_DETAIL;
                         IF detail <> 'the detail' THEN RAISE '%', detail; END IF;
                     END;
                 END LOOP;
             END $d$",
            sql.trim_start_matches("SELECT ")
        );
        pass(&mut admin, &caught);
    }
}

#[test]
fn a_constraint_and_a_lock_on_our_table_keep_their_sqlstate() {
    let database = Server::shared().database();
    let mut admin = database.admin();
    pass(&mut admin, SETUP);
    pass(&mut admin, "ALTER TABLE writeguard.event ADD CONSTRAINT nobody CHECK (login = 'nobody') NOT VALID");
    for sql in [WRITES[0], WRITES[1]] {
        let refusal = refused(&mut admin, sql);
        assert_eq!((refusal.sqlstate.as_str(), refusal.constraint.as_str()), ("23514", "nobody"), "{sql}: {refusal:?}");
        assert!(refusal.detail.starts_with("Failing row contains"), "{refusal:?}");
        assert_eq!((refusal.schema.as_str(), refusal.table.as_str()), ("writeguard", "event"), "{refusal:?}");
    }
    pass(&mut admin, "ALTER TABLE writeguard.event DROP CONSTRAINT nobody");
    let mut other = database.admin();
    pass(&mut other, "BEGIN; LOCK TABLE writeguard.event");
    for sql in [WRITES[0], WRITES[1]] {
        assert_eq!(refused(&mut admin, &format!("SET lock_timeout = '200ms'; {sql}")).sqlstate, "55P03", "{sql}");
    }
    pass(&mut other, "ROLLBACK");
    pass(&mut admin, WRITES[0]);
}

/// No error, of anybody's, has a backtrace in any of its parts, and neither has the log.
#[track_caller]
fn is_clean(refusal: &Refusal) {
    let all = format!("{refusal:?}");
    for word in ["backtrace", "rustc", ".rs:", "pgrx", "std::", "core::"] {
        assert!(!all.contains(word), "{refusal:?}");
    }
}

fn no_backtraces(value: &str) {
    let server = server_with_backtraces(value);
    let database = server.database();
    let mut admin = database.admin();
    pass(&mut admin, SETUP);
    pass(
        &mut admin,
        "CREATE TABLE u (v int); INSERT INTO u VALUES (1);
         CREATE TRIGGER loud BEFORE DELETE ON t FOR EACH ROW EXECUTE FUNCTION loud();
         CREATE TRIGGER loud BEFORE UPDATE ON u FOR EACH ROW EXECUTE FUNCTION loud()",
    );
    for sql in ["DELETE FROM t WHERE id = 1", "UPDATE u SET v = 2"] {
        let refusal = refused(&mut admin, sql);
        is_loud(&refusal);
        is_clean(&refusal);
    }
    let expected = [
        ("UPDATE t SET v = 0", "WG001"),
        ("SELECT writeguard.set_policy('x', max_rows => -1)", "WG007"),
        ("SELECT writeguard.request('nonsense', reason => 'why')", "42601"),
        ("SELECT writeguard.undo(4711)", "WG007"),
        ("SELECT 1/0", "22012"),
        ("UPDATE t SET v = 1/0 WHERE id = 1", "22012"),
        ("INSERT INTO t VALUES (1, 1)", "23505"),
        ("SELECT * FROM writeguard.preview('UPDATE t SET v = 1/0')", "22012"),
        ("SELECT writeguard.in_schedule('Mon 00:00-24:00 UTC; nonsense', now())", "WG007"),
    ];
    for (sql, sqlstate) in expected {
        let refusal = refused(&mut admin, sql);
        assert_eq!(refusal.sqlstate, sqlstate, "{sql}: {refusal:?}");
        is_clean(&refusal);
    }
    // What passes a guard of pgrx's.
    let mut other = database.admin();
    pass(&mut other, "BEGIN; LOCK TABLE writeguard.policy, writeguard.event");
    for sql in [WRITES[0], WRITES[1], "TABLE t"] {
        let result = admin.batch_execute(&format!("SET lock_timeout = '200ms'; {sql}"));
        if let Err(error) = result {
            let refusal = Refusal::of(&error);
            assert_eq!(refusal.sqlstate, "55P03", "{refusal:?}");
            is_clean(&refusal);
        }
    }
    pass(&mut other, "ROLLBACK");
    pass(&mut admin, "CREATE TRIGGER loud BEFORE INSERT ON writeguard.event FOR EACH ROW EXECUTE FUNCTION loud()");
    let refusal = refused(&mut admin, WRITES[1]);
    is_loud(&refusal);
    // The worker meets it too, and the log has what it says.
    is_clean(&refused(&mut admin, "UPDATE t SET v = 0"));
    wait_until(10, || server.log().contains("loud"));
    let log = server.log();
    for word in ["stack backtrace", "rustc/", "pgrx_pg_sys::"] {
        assert!(!log.contains(word), "{}", &log[log.find(word).unwrap_or(0).saturating_sub(500)..]);
    }
}

#[test]
fn no_error_has_a_backtrace_with_1() {
    no_backtraces("1");
}

#[test]
fn no_error_has_a_backtrace_with_full() {
    no_backtraces("full");
}

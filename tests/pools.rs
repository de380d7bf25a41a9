//! Behind PgBouncer, in each of its modes: what one client has armed, expected or used up is no other client's.
//! Where a pool makes that impossible (a session-level SET behind a pool whose clients share sessions), what happens instead.

use std::os::unix::net::UnixStream;

use crate::common::approvals::*;
use crate::common::pool::*;
use crate::common::raw::Raw;
use crate::common::wait_until;
use postgres::Client;

/// A limit of three rows that the flag lifts.
const FLAG: &str = "SELECT writeguard.set_policy('p', tables => '{public.t}', max_rows => 3, override => 'flag')";

/// A limit of three rows for all statements of a transaction.
const BUDGET: &str = "SELECT writeguard.set_policy('p', tables => '{public.t}', max_rows_per_transaction => 3)";

/// Changes as many rows as the policies of this file allow.
const THREE: &str = "UPDATE t SET a = 1 WHERE id <= 3";

/// A token of the requester's for [`WRITE`].
#[track_caller]
fn token(stage: &Stage) -> String {
    stage.approved(WRITE).1
}

/// Waits until no session of the requester's is in a transaction, as after a client that is gone.
#[track_caller]
fn wait_for_no_transaction(stage: &mut Stage) {
    let sql = format!(
        "SELECT count(*) FROM pg_stat_activity WHERE usename = '{}' AND datname = current_database() AND state <> 'idle'",
        stage.requester
    );
    wait_until(20, || stage.number(&sql) == 0);
}

/// Two clients of the requester's that share one connection to the server.
fn two_clients(pool: &Pool, stage: &Stage) -> (Client, Client) {
    let (mut one, mut other) = (pool.connect(stage), pool.connect(stage));
    assert_eq!(backend(&mut one), backend(&mut other));
    (one, other)
}

// ---- Every mode ----

#[test]
fn limits_are_exact_in_every_mode_and_the_error_is_whole() {
    let mut stage = Stage::new("");
    for mode in ["session", "transaction", "statement"] {
        let pool = Pool::start(&stage, mode, &[]);
        let mut client = pool.connect(&stage);
        pass(&mut client, THREE);
        assert_eq!(stage.number("SELECT count(*) FROM t WHERE a = 1"), 3, "{mode}");
        let refusal = refused(&mut client, "UPDATE t SET a = 9 WHERE id <= 4", "WG001");
        let mut direct = refused(&mut stage.requester(), "UPDATE t SET a = 9 WHERE id <= 4", "WG001");
        // The hint names the event of the refusal.
        let number = |hint: &str| hint.chars().filter(char::is_ascii_digit).collect::<String>();
        assert!(!number(&refusal.hint).is_empty(), "{mode}: {refusal:?}");
        assert_eq!(refusal.event().map(|event| event.to_string()), Some(number(&refusal.hint)), "{mode}: {refusal:?}");
        assert!(direct.event().is_some(), "{mode}: {direct:?}");
        direct.message = format!("{} (event {})", direct.said(), number(&refusal.hint));
        direct.hint = direct.hint.replace(&number(&direct.hint), &number(&refusal.hint));
        assert_eq!(refusal, direct, "{mode}");
        assert_eq!((&refusal.schema[..], &refusal.table[..]), ("public", "t"), "{mode}");
        assert!(!refusal.detail.is_empty(), "{mode}: {refusal:?}");
        assert_eq!(stage.changed(), 0, "{mode}");
        drop((client, pool));
        stage.unguarded("UPDATE t SET a = 0");
    }
}

#[test]
fn what_a_session_sets_never_reaches_another_database_user() {
    let mut stage = Stage::new(FLAG);
    for mode in ["session", "transaction", "statement"] {
        let pool = Pool::start(&stage, mode, &[]);
        let mut one = pool.connect(&stage);
        pass(&mut one, "SET writeguard.override = on");
        pass(&mut one, "SET writeguard.expect_rows = 1");
        let mut other = pool.connect_other_user(&stage);
        assert_ne!(backend(&mut one), backend(&mut other), "{mode}");
        assert_eq!(shown(&mut other, "SHOW writeguard.expect_rows"), "-1", "{mode}");
        refused(&mut other, WRITE, "WG001");
        pass(&mut other, "UPDATE t SET a = 1 WHERE id <= 2");
        assert_eq!(stage.changed(), 0, "{mode}");
    }
}

#[test]
fn a_client_that_goes_in_the_middle_of_a_transaction_leaves_nothing_behind() {
    let mut stage = Stage::new(BUDGET);
    for mode in ["session", "transaction"] {
        let pool = Pool::start(&stage, mode, &[]);
        let mut one = pool.connect(&stage);
        pass(&mut one, "BEGIN; SET LOCAL writeguard.override = on; SET writeguard.expect_rows = 3");
        pass(&mut one, THREE);
        pass(&mut one, "SET LOCAL writeguard.expect_rows = 5");
        drop(one);
        wait_for_no_transaction(&mut stage);
        assert_eq!(stage.number("SELECT sum(a) FROM t"), 0, "{mode}");
        let mut other = pool.connect(&stage);
        assert_eq!(shown(&mut other, "SHOW writeguard.expect_rows"), "-1", "{mode}");
        assert_eq!(shown(&mut other, "SHOW writeguard.override"), "off", "{mode}");
        // The whole budget is there, and no more than that.
        pass(&mut other, &format!("BEGIN; {THREE}"));
        refused(&mut other, "UPDATE t SET a = 1 WHERE id = 1", "WG001");
        pass(&mut other, "ROLLBACK");
        assert_eq!(stage.number("SELECT sum(a) FROM t"), 0, "{mode}");
    }
}

// ---- Session mode ----

#[test]
fn a_session_that_is_given_back_is_disarmed() {
    let mut stage = Stage::new("");
    let pool = Pool::start(&stage, "session", &[]);
    let token = token(&stage);
    let mut one = pool.connect(&stage);
    arm(&mut one, &token);
    pass(&mut one, "SET writeguard.expect_rows = 5");
    let of_one = backend(&mut one);
    drop(one);
    // The same session, and the very statement that the token opens.
    let mut other = pool.connect(&stage);
    assert_eq!(backend(&mut other), of_one);
    assert_eq!(shown(&mut other, "SHOW writeguard.override"), "off");
    assert_eq!(shown(&mut other, "SHOW writeguard.expect_rows"), "-1");
    refused(&mut other, WRITE, "WG001");
    pass(&mut other, THREE);
    // Nobody has used it up.
    arm(&mut other, &token);
    pass(&mut other, WRITE);
    assert_eq!(stage.changed(), 5);
    assert_eq!(stage.overridden().len(), 1);
}

#[test]
fn a_session_keeps_its_flag_for_one_transaction_behind_a_pool_as_without() {
    let mut stage = Stage::new(FLAG);
    let pool = Pool::start(&stage, "session", &[]);
    let mut one = pool.connect(&stage);
    pass(&mut one, "SET writeguard.override = on");
    pass(&mut one, WRITE);
    refused(&mut one, WRITE, "WG001");
    assert_eq!(stage.changed(), 5);
}

/// What the documentation warns of: a pool that was told not to clean up.
#[test]
fn a_session_pool_without_a_reset_query_arms_the_next_client() {
    let mut stage = Stage::new(FLAG);
    let pool = Pool::start(&stage, "session", &["server_reset_query ="]);
    let mut one = pool.connect(&stage);
    pass(&mut one, "SET writeguard.override = on");
    let of_one = backend(&mut one);
    drop(one);
    let mut other = pool.connect(&stage);
    assert_eq!(backend(&mut other), of_one);
    pass(&mut other, WRITE);
    refused(&mut other, WRITE, "WG001");
    assert_eq!(stage.changed(), 5);
}

// ---- Transaction mode ----

#[test]
fn set_local_arms_its_own_transaction_and_nobody_elses() {
    for (arguments, with_token) in [("override => 'flag'", false), ("override => 'token'", true)] {
        let mut stage = Stage::new(&format!(
            "SELECT writeguard.set_policy('p', tables => '{{public.t}}', max_rows => 3, {arguments})"
        ));
        let pool = Pool::start(&stage, "transaction", &[]);
        let (mut one, mut other) = two_clients(&pool, &stage);
        let set =
            if with_token { format!("; SET LOCAL writeguard.token = '{}'", token(&stage)) } else { String::new() };
        for end in ["ROLLBACK", "COMMIT"] {
            pass(&mut one, &format!("BEGIN; SET LOCAL writeguard.override = on{set}"));
            pass(&mut one, end);
            refused(&mut other, WRITE, "WG001");
        }
        for (end, changed) in [("ROLLBACK", 0), ("COMMIT", 5)] {
            pass(&mut one, &format!("BEGIN; SET LOCAL writeguard.override = on{set}"));
            pass(&mut one, WRITE);
            pass(&mut one, end);
            assert_eq!(stage.changed(), changed);
            refused(&mut other, WRITE, "WG001");
        }
    }
}

#[test]
fn a_set_that_a_transaction_uses_is_over_with_it() {
    let mut stage = Stage::new(FLAG);
    let pool = Pool::start(&stage, "transaction", &[]);
    let (mut one, mut other) = two_clients(&pool, &stage);
    for (write, end) in [("UPDATE t SET a = 1 WHERE id = 1", "COMMIT"), (WRITE, "COMMIT"), (WRITE, "ROLLBACK")] {
        pass(&mut one, &format!("BEGIN; SET writeguard.override = on; {write}"));
        pass(&mut one, end);
        refused(&mut other, WRITE, "WG001");
    }
    assert_eq!(stage.changed(), 5);
}

/// What the documentation warns of: it opens one transaction, whoever's that is.
#[test]
fn a_set_outside_of_a_transaction_arms_the_next_write_of_the_same_user() {
    let mut stage = Stage::new(FLAG);
    let pool = Pool::start(&stage, "transaction", &[]);
    let (mut one, mut other) = two_clients(&pool, &stage);
    pass(&mut one, "SET writeguard.override = on");
    pass(&mut other, WRITE);
    refused(&mut other, WRITE, "WG001");
    refused(&mut one, WRITE, "WG001");
    assert_eq!(stage.changed(), 5);
    // It is to be seen whose write it was.
    assert_eq!(stage.overridden().len(), 1);
}

#[test]
fn a_token_that_is_set_in_a_pool_opens_nobody_elses_write() {
    for mode in ["transaction", "statement"] {
        let mut stage = Stage::new("");
        let pool = Pool::start(&stage, mode, &[]);
        let (mut one, mut other) = two_clients(&pool, &stage);
        let token = token(&stage);
        pass(&mut one, &format!("SET writeguard.override = on; SET writeguard.token = '{token}'"));
        refused(&mut other, "UPDATE t SET a = 8", "WG006");
        assert_eq!(stage.number("SELECT sum(a) FROM t"), 0, "{mode}");
        // And what was refused has disarmed it.
        refused(&mut one, WRITE, "WG001");
        assert_eq!(stage.changed(), 0, "{mode}");
    }
}

#[test]
fn a_request_is_executed_through_a_pool() {
    for mode in ["transaction", "statement"] {
        let mut stage = Stage::new("");
        let pool = Pool::start(&stage, mode, &[]);
        let (id, _) = stage.approved(WRITE);
        let (mut one, mut other) = two_clients(&pool, &stage);
        pass(&mut one, &format!("SELECT * FROM writeguard.execute({id})"));
        refused(&mut other, WRITE, "WG001");
        assert_eq!(stage.changed(), 5, "{mode}");
    }
}

#[test]
fn an_expectation_holds_for_its_own_transaction_only() {
    let mut stage = Stage::new("");
    let pool = Pool::start(&stage, "transaction", &[]);
    let (mut one, mut other) = two_clients(&pool, &stage);
    for end in ["COMMIT", "ROLLBACK"] {
        pass(&mut one, "BEGIN; SET LOCAL writeguard.expect_rows = 1");
        pass(&mut one, end);
        assert_eq!(shown(&mut other, "SHOW writeguard.expect_rows"), "-1", "{end}");
        pass(&mut other, THREE);
    }
    pass(&mut one, "BEGIN; SET LOCAL writeguard.expect_rows = 1");
    refused(&mut one, THREE, "WG004");
    pass(&mut one, "ROLLBACK");
    pass(&mut other, THREE);
    // Outside of a transaction it meets the next write, whoever's that is: that can refuse too much, once.
    pass(&mut one, "SET writeguard.expect_rows = 1");
    refused(&mut other, THREE, "WG004");
    pass(&mut other, THREE);
    assert_eq!(stage.changed(), 0);
}

#[test]
fn a_budget_of_a_transaction_is_its_own() {
    let mut stage = Stage::new(BUDGET);
    let pool = Pool::start(&stage, "transaction", &[]);
    let (mut one, mut other) = two_clients(&pool, &stage);
    for _ in 0..2 {
        for client in [&mut one, &mut other] {
            pass(client, "BEGIN; UPDATE t SET a = a + 1 WHERE id <= 2");
            pass(client, "UPDATE t SET a = a + 1 WHERE id = 3");
            pass(client, "COMMIT");
        }
    }
    assert_eq!(stage.number("SELECT sum(a) FROM t"), 12);
    pass(&mut one, &format!("BEGIN; {THREE}"));
    refused(&mut one, "UPDATE t SET a = 1 WHERE id = 4", "WG001");
    pass(&mut one, "COMMIT");
    assert_eq!(stage.number("SELECT sum(a) FROM t"), 12);
    pass(&mut other, THREE);
}

#[test]
fn prepared_statements_through_a_pool() {
    let mut stage = Stage::new("");
    let settings: &[&str] = if pool_keeps_prepared_statements() { &["max_prepared_statements = 10"] } else { &[] };
    let pool = Pool::start(&stage, "transaction", settings);
    let connect = || {
        let socket = UnixStream::connect(pool.directory().join(format!(".s.PGSQL.{POOL_PORT}"))).unwrap();
        Raw::over(socket, &stage.requester, &stage.db.name)
    };
    let (mut one, mut other) = (connect(), connect());
    let statement = "UPDATE t SET a = 9 WHERE id <= $1";
    let id = request(&mut stage.requester(), statement, &[Some("5")]);
    let token = approve(&mut stage.approver(), id);
    // The unnamed statement goes with its pipeline, behind any PgBouncer.
    let unnamed =
        |raw: &mut Raw, rows: &str| raw.parse("", statement).bind("", "", &[rows]).execute("", 0).sync().trace();
    assert_eq!(unnamed(&mut one, "3"), "1 2 UPDATE:3 ZI");
    assert_eq!(unnamed(&mut other, "4"), "1 2 WG001 ZI");
    if pool_keeps_prepared_statements() {
        // Clients share the statement on the server, and neither its parameters nor what it was allowed.
        for raw in [&mut one, &mut other] {
            assert_eq!(raw.parse("S_1", statement).sync().trace(), "1 ZI");
        }
        let arm = format!("BEGIN; SET LOCAL writeguard.override = on; SET LOCAL writeguard.token = '{token}'");
        assert_eq!(one.query(&arm), "BEGIN SET SET ZT");
        assert_eq!(one.bind("", "S_1", &["5"]).execute("", 0).sync().trace(), "2 UPDATE:5 ZT");
        assert_eq!(one.query("COMMIT"), "COMMIT ZI");
        assert_eq!(other.bind("", "S_1", &["5"]).execute("", 0).sync().trace(), "2 WG001 ZI");
        assert_eq!(other.bind("", "S_1", &["3"]).execute("", 0).sync().trace(), "2 UPDATE:3 ZI");
        assert_eq!(stage.overridden(), [(5, Some(id))]);
    }
    assert!(stage.number("SELECT count(*) FROM t WHERE a = 9") >= 3);
}

// ---- Sessions that are shared, and said to be ----

/// The requester's sessions are `writeguard.pooled`.
fn pooled(stage: &mut Stage) {
    let sql = format!("ALTER ROLE {} SET writeguard.pooled = on", stage.requester);
    pass(&mut stage.admin, &sql);
}

#[test]
fn in_a_pooled_session_a_set_outside_of_a_transaction_reaches_nobody() {
    for (arguments, with_token) in [("override => 'flag'", false), ("override => 'token'", true)] {
        let mut stage = Stage::new(&format!(
            "SELECT writeguard.set_policy('p', tables => '{{public.t}}', max_rows => 3, {arguments})"
        ));
        pooled(&mut stage);
        let pool = Pool::start(&stage, "transaction", &[]);
        let (mut one, mut other) = two_clients(&pool, &stage);
        let token = if with_token { token(&stage) } else { String::new() };
        let flag = |how: &str| format!("{how} writeguard.override = on");
        let value = |how: &str| format!("{how} writeguard.token = '{token}'");
        let config = "SELECT set_config('writeguard.override', 'on', false)";
        let block = format!(
            "DO $$BEGIN PERFORM set_config('writeguard.token', '{token}', false); SET writeguard.override = on; COMMIT; END$$"
        );
        for arms in [
            vec![flag("SET"), value("SET")],
            vec![value("SET SESSION"), flag("SET SESSION")],
            vec![format!("{}; {}", value("SET"), flag("SET"))],
            vec![format!("{}; {config}", value("SET"))],
            vec![block],
            // A transaction block that makes no use of it.
            vec!["BEGIN".into(), flag("SET"), value("SET"), "SELECT 1".into(), "COMMIT".into()],
            vec!["BEGIN".into(), "SAVEPOINT s".into(), flag("SET"), value("SET"), "RELEASE s".into(), "COMMIT".into()],
            vec!["BEGIN".into(), flag("SET"), value("SET"), "ROLLBACK".into()],
        ] {
            for sql in &arms {
                pass(&mut one, sql);
            }
            assert_eq!(shown(&mut one, "SHOW writeguard.override"), "off", "{arms:?}");
            refused(&mut other, WRITE, "WG001");
            refused(&mut one, WRITE, "WG001");
        }
        assert_eq!(stage.changed(), 0);
        // What a transaction arms for itself holds as ever.
        pass(&mut one, &format!("BEGIN; {}; {}", flag("SET LOCAL"), value("SET LOCAL")));
        pass(&mut one, WRITE);
        pass(&mut one, "COMMIT");
        refused(&mut other, WRITE, "WG001");
        assert_eq!(stage.changed(), 5);
        assert_eq!(stage.overridden().len(), 1);
    }
}

#[test]
fn in_a_pooled_session_nobody_meets_what_another_client_expects() {
    let mut stage = Stage::new("");
    pooled(&mut stage);
    for mode in ["transaction", "statement"] {
        let pool = Pool::start(&stage, mode, &[]);
        let (mut one, mut other) = two_clients(&pool, &stage);
        pass(&mut one, "SET writeguard.expect_rows = 1");
        assert_eq!(shown(&mut other, "SHOW writeguard.expect_rows"), "-1", "{mode}");
        pass(&mut other, THREE);
        refused(&mut one, &format!("SET writeguard.expect_rows = 1; {THREE}"), "WG004");
        pass(&mut other, THREE);
        // A string of its own, as without.
        pass(&mut one, &format!("SET writeguard.expect_rows = 3; {THREE}"));
        pass(&mut other, "UPDATE t SET a = 1 WHERE id = 1");
    }
}

#[test]
fn a_pooled_session_is_told_what_became_of_its_set() {
    let mut stage = Stage::new(FLAG);
    pooled(&mut stage);
    let (mut client, told) = stage.listening();
    let warned = |setting: &str| {
        let message = format!("{setting} was set outside of a transaction block and is over with that command");
        vec![("WARNING".to_owned(), message)]
    };
    pass(&mut client, "SET writeguard.override = on");
    assert_eq!(told.take(), warned("writeguard.override"));
    pass(&mut client, "SET writeguard.token = 'something'");
    assert_eq!(told.take(), warned("writeguard.token"));
    pass(&mut client, "SET writeguard.expect_rows = 0");
    assert_eq!(told.take(), warned("writeguard.expect_rows"));
    pass(&mut client, "SELECT set_config('writeguard.override', 'on', false)");
    assert_eq!(told.take(), warned("writeguard.override"));
    // What was used is not over: only what was not is told.
    pass(&mut stage.admin, &format!("CREATE FUNCTION f() RETURNS void LANGUAGE plpgsql AS $$BEGIN {WRITE}; END$$"));
    pass(&mut client, "SET writeguard.override = on; SET writeguard.expect_rows = 5; SELECT f()");
    assert_eq!(told.take(), warned("writeguard.expect_rows"));
    // PostgreSQL says that there is no transaction, too.
    pass(&mut client, "SET writeguard.override = on; COMMIT");
    assert_eq!(told.take().split_off(1), warned("writeguard.override"));
    // Once.
    pass(&mut client, "SELECT 1");
    // A write in the same string has used it, and a block ends what it began.
    pass(&mut client, &format!("SET writeguard.override = on; {WRITE}"));
    pass(&mut client, &format!("BEGIN; SET LOCAL writeguard.override = on; {WRITE}"));
    pass(&mut client, "COMMIT");
    pass(&mut client, "BEGIN; SET writeguard.override = on");
    pass(&mut client, "COMMIT");
    pass(&mut client, "SET writeguard.override = off; RESET writeguard.token; SET writeguard.expect_rows = -1");
    assert_eq!(told.take(), []);
    refused(&mut client, WRITE, "WG001");
}

#[test]
fn a_role_cannot_say_that_its_sessions_are_its_own() {
    let mut stage = Stage::new(FLAG);
    pooled(&mut stage);
    let mut client = stage.requester();
    let requester = stage.requester.clone();
    refused(&mut client, "SET writeguard.pooled = off", "42501");
    refused(&mut client, "SELECT set_config('writeguard.pooled', 'off', true)", "42501");
    refused(&mut client, &format!("ALTER ROLE {requester} SET writeguard.pooled = off"), "42501");
    for sql in ["RESET writeguard.pooled", "RESET ALL", "DISCARD ALL"] {
        let _whether_it_passes = client.batch_execute(sql);
        pass(&mut client, "SET writeguard.override = on");
        refused(&mut client, WRITE, "WG001");
    }
    let mut with_options = stage.db.config(&requester);
    assert!(with_options.options("-c writeguard.pooled=off").connect(postgres::NoTls).is_err());
    assert_eq!(stage.changed(), 0);
}

#[test]
fn a_session_that_was_armed_before_it_was_called_pooled_is_disarmed() {
    let mut stage = Stage::new(FLAG);
    for sql in [
        format!("SET writeguard.override = on; SET writeguard.pooled = on; {WRITE}"),
        format!("BEGIN; SET writeguard.override = on; SET LOCAL writeguard.pooled = on; {WRITE}; COMMIT"),
    ] {
        refused(&mut stage.admin, &sql, "WG001");
        pass(&mut stage.admin, "ROLLBACK; RESET writeguard.pooled");
    }
    pass(&mut stage.admin, "SET writeguard.override = on; SET writeguard.expect_rows = 2");
    pass(&mut stage.admin, "SET writeguard.pooled = on");
    assert_eq!(shown(&mut stage.admin, "SHOW writeguard.override"), "off");
    assert_eq!(shown(&mut stage.admin, "SHOW writeguard.expect_rows"), "-1");
    pass(&mut stage.admin, THREE);
    refused(&mut stage.admin, WRITE, "WG001");
}

// ---- Statement mode ----

#[test]
fn in_statement_mode_one_string_arms_itself() {
    let mut stage = Stage::new(FLAG);
    let pool = Pool::start(&stage, "statement", &[]);
    let (mut one, mut other) = two_clients(&pool, &stage);
    // By itself it arms nothing, and a transaction block is what this mode does not have.
    pass(&mut one, "SET LOCAL writeguard.override = on");
    refused(&mut other, WRITE, "WG001");
    refused(&mut one, WRITE, "WG001");
    pass(&mut one, &format!("SET LOCAL writeguard.override = on; {WRITE}"));
    assert_eq!(stage.changed(), 5);
    refused(&mut other, WRITE, "WG001");
    refused(&mut one, WRITE, "WG001");
    pass(&mut one, &format!("SET LOCAL writeguard.expect_rows = 3; {THREE}"));
    assert_eq!(shown(&mut other, "SHOW writeguard.expect_rows"), "-1");
    assert_eq!(stage.overridden().len(), 1);
}

#[test]
fn in_statement_mode_a_block_is_refused_by_the_pool_and_leaves_nothing_behind() {
    let mut stage = Stage::new(FLAG);
    let pool = Pool::start(&stage, "statement", &[]);
    let mut one = pool.connect(&stage);
    assert!(one.batch_execute(&format!("BEGIN; SET writeguard.override = on; {WRITE}")).is_err());
    wait_for_no_transaction(&mut stage);
    refused(&mut pool.connect(&stage), WRITE, "WG001");
    assert_eq!(stage.changed(), 0);
}

#[test]
fn in_statement_mode_each_statement_has_a_budget_of_its_own() {
    let mut stage = Stage::new(BUDGET);
    let pool = Pool::start(&stage, "statement", &[]);
    let (mut one, mut other) = two_clients(&pool, &stage);
    for client in [&mut one, &mut other] {
        pass(client, THREE);
        refused(client, "UPDATE t SET a = 1 WHERE id <= 4", "WG001");
        // One string is one transaction.
        refused(client, &format!("{THREE}; UPDATE t SET a = 1 WHERE id = 4"), "WG001");
    }
    assert_eq!(stage.number("SELECT sum(a) FROM t"), 3);
}

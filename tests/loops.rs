//! `writeguard.blocked_per_minute`: a loop of refusals is so many events, and one that tells of the others; the numbers that
//! are counted are exact all the same.

use std::thread;
use std::time::{Duration, Instant};

use crate::common::limits::{number, pass};
use crate::common::{Database, Refusal, Server, expect_refusal, wait_until};
use postgres::Client;

/// A database with table `t` of ten rows: of three per statement, and of seven per transaction.
fn guarded(server: &Server) -> (Database, Client) {
    let db = server.database();
    let mut admin = db.admin();
    pass(
        &mut admin,
        "CREATE TABLE t (id int PRIMARY KEY, note text); INSERT INTO t SELECT n FROM generate_series(1, 10) AS n;
         GRANT ALL ON t TO PUBLIC;
         SELECT writeguard.set_policy('p', tables => '{public.t}', max_rows => 3, max_rows_per_transaction => 7)",
    );
    (db, admin)
}

/// What follows happens within one minute of the server's clock, if it takes no longer than some seconds.
fn early_in_a_minute(admin: &mut Client) {
    let seconds = number(admin, "SELECT extract(second FROM clock_timestamp())::int");
    if seconds > 35 {
        thread::sleep(Duration::from_secs(u64::try_from(61 - seconds).unwrap()));
    }
}

#[track_caller]
fn refuse(client: &mut Client, sql: &str) -> Refusal {
    let refusal = expect_refusal(client.batch_execute(sql));
    let _ended = client.batch_execute("ROLLBACK");
    refusal
}

fn blocked(admin: &mut Client, login: &str) -> i64 {
    number(admin, &format!("SELECT count(*) FROM writeguard.event WHERE kind = 'blocked' AND login = '{login}'"))
}

fn total(admin: &mut Client, kind: &str) -> i64 {
    let sql = "SELECT events FROM writeguard.event_totals WHERE policy IS NULL AND kind = ";
    number(admin, &format!("{sql} '{kind}'"))
}

/// The last event's rows and reason.
fn last(admin: &mut Client) -> (i64, String) {
    let row = admin
        .query_one("SELECT rows, coalesce(reason, '') FROM writeguard.event ORDER BY id DESC LIMIT 1", &[])
        .expect("an event");
    (row.get(0), row.get(1))
}

const LARGEST: &str = "BEGIN; UPDATE t SET note = 'a' WHERE id <= 3; UPDATE t SET note = 'a' WHERE id BETWEEN 4 AND 6;
                       UPDATE t SET note = 'largest' WHERE id >= 7";

#[test]
fn a_loop_is_so_many_events_and_one_more() {
    let server = Server::start(&["writeguard.blocked_per_minute = 5", "writeguard.event_timeout = '30s'"]);
    let (db, mut admin) = guarded(&server);
    let (anna, bert) = (db.role("anna"), db.role("bert"));
    let mut client = db.connect(&anna);
    early_in_a_minute(&mut admin);
    for place in 0..50 {
        let begun = Instant::now();
        let sql = if place == 25 { LARGEST.to_owned() } else { format!("UPDATE t SET note = '{place}'") };
        let refusal = refuse(&mut client, &sql);
        assert_eq!(refusal.sqlstate, "WG001", "{refusal:?}");
        // Who is told of an event finds it; who is not is told what to send all the same.
        assert_eq!(refusal.hint.contains("event => "), place < 5, "{place}: {refusal:?}");
        if place == 49 {
            assert!(refusal.hint.contains("UPDATE t SET note = '49'"), "{refusal:?}");
            pass(&mut client, &refusal.hint);
        }
        assert!(begun.elapsed() < Duration::from_secs(5));
    }
    assert_eq!(blocked(&mut admin, &anna), 5);
    // Another login has a limit of its own.
    let refusal = refuse(&mut db.connect(&bert), "UPDATE t SET note = 'b'");
    assert!(refusal.hint.contains("event => "), "{refusal:?}");
    // Every one is counted.
    assert_eq!(total(&mut admin, "blocked"), 51);
    let of_policy = "SELECT events FROM writeguard.event_totals WHERE policy = 'p' AND kind = 'blocked'";
    assert_eq!(number(&mut admin, of_policy), 51);
    assert_eq!(number(&mut admin, "SELECT sum(refused) FROM writeguard.stat"), 51);
    assert_eq!(number(&mut admin, "SELECT summed_up FROM writeguard.event_queue"), 45);
    assert_eq!(number(&mut admin, "SELECT late + in_log_only FROM writeguard.event_queue"), 0);
    assert_eq!(server.log().matches("write refused").count(), 6);
    assert_eq!(number(&mut admin, "SELECT count(*) FROM t WHERE note IS NOT NULL"), 0);
    // A restart keeps it.
    drop((admin, client));
    server.restart();
    let mut admin = db.admin();
    wait_until(30, || blocked(&mut admin, &anna) == 6);
    let row = admin
        .query_one("SELECT rows, scope, statement, reason FROM writeguard.event WHERE kind = 'blocked' ORDER BY id DESC LIMIT 1", &[])
        .unwrap();
    assert_eq!((row.get::<_, i64>(0), row.get::<_, &str>(1)), (8, "transaction"));
    assert!(row.get::<_, &str>(2).contains("largest"));
    assert!(row.get::<_, &str>(3).contains("largest of 45 refusals"), "{}", row.get::<_, &str>(3));
    let log = server.log();
    assert_eq!(log.matches("write refused").count(), 7);
    assert_eq!(log.matches("largest of 45 refusals").count(), 2, "the line and its JSON");
}

/// At the minute's end, though nothing follows.
#[test]
fn the_minute_is_told_of_when_it_is_over() {
    let server = Server::start(&["writeguard.blocked_per_minute = 0"]);
    let (_db, mut admin) = guarded(&server);
    early_in_a_minute(&mut admin);
    for place in 0..30 {
        refuse(&mut admin, &format!("UPDATE t SET note = '{place}'"));
    }
    assert_eq!(blocked(&mut admin, "postgres"), 0);
    wait_until(75, || blocked(&mut admin, "postgres") == 1);
    let (rows, reason) = last(&mut admin);
    assert!(rows == 4 && reason.contains("largest of 30 refusals"), "{rows} {reason}");
    pass(&mut admin, "ALTER SYSTEM SET writeguard.blocked_per_minute = 3; ");
    pass(&mut admin, "SELECT pg_reload_conf()");
    wait_until(10, || number(&mut admin, "SELECT current_setting('writeguard.blocked_per_minute')::int8") == 3);
    early_in_a_minute(&mut admin);
    for _ in 0..5 {
        refuse(&mut admin, "UPDATE t SET note = 'again'");
    }
    assert_eq!(blocked(&mut admin, "postgres"), 4);
    let refusal = expect_refusal(admin.batch_execute("SET writeguard.blocked_per_minute = 1"));
    assert_eq!(refusal.sqlstate, "55P02");
}

/// Refusals of other kinds are in the same number, and so are writes while the guard is off in one of their own.
#[test]
fn tokens_expectations_and_a_guard_that_is_off_fill_no_disk_either() {
    let server = Server::start(&["writeguard.blocked_per_minute = 4"]);
    let (db, mut admin) = guarded(&server);
    let mut client = db.admin();
    early_in_a_minute(&mut admin);
    for place in 0..10 {
        refuse(&mut client, "SET writeguard.expect_rows = 2; UPDATE t SET note = 'x' WHERE id = 1");
        let forged = format!("BEGIN; SET LOCAL writeguard.override = on; SET LOCAL writeguard.token = 'wg_{place}';");
        let refusal = refuse(&mut client, &format!("{forged} UPDATE t SET note = 'y'"));
        assert_eq!(refusal.sqlstate, "WG006");
        pass(
            &mut client,
            "SET writeguard.enabled = off; UPDATE t SET note = NULL WHERE id = 1; SET writeguard.enabled = on",
        );
    }
    let stored = |admin: &mut Client, kind: &str| {
        number(admin, &format!("SELECT count(*) FROM writeguard.event WHERE kind = '{kind}'"))
    };
    wait_until(30, || stored(&mut admin, "disabled") == 4);
    assert_eq!((stored(&mut admin, "expectation_failed"), stored(&mut admin, "token_refused")), (4, 4));
    for kind in ["expectation_failed", "token_refused", "disabled"] {
        assert_eq!(total(&mut admin, kind), 10, "{kind}");
    }
    drop((admin, client));
    server.restart();
    let mut admin = db.admin();
    for kind in ["expectation_failed", "token_refused", "disabled"] {
        wait_until(30, || stored(&mut admin, kind) == 5);
    }
    let reason = "SELECT reason FROM writeguard.event WHERE kind = 'token_refused' ORDER BY id DESC LIMIT 1";
    let reason: String = admin.query_one(reason, &[]).unwrap().get(0);
    assert!(reason.starts_with("The largest of 6 refusals") && reason.len() > 90, "{reason}");
}

/// Texts of whatever length take no more room than there is.
#[test]
fn long_texts_are_told_of_as_well() {
    let server = Server::start(&["writeguard.blocked_per_minute = 0"]);
    let (db, mut admin) = guarded(&server);
    let long = "p\u{1}".repeat(127);
    pass(&mut admin, &format!("SELECT writeguard.set_policy('{long}', tables => '{{public.t}}', max_rows => 2)"));
    let mut client = db.config("postgres").application_name(&"a".repeat(63)).connect(postgres::NoTls).unwrap();
    for _ in 0..5 {
        refuse(&mut client, &format!("UPDATE t SET note = '{}'", "\u{1}".repeat(200_000)));
    }
    drop((admin, client));
    server.restart();
    let mut admin = db.admin();
    wait_until(30, || blocked(&mut admin, "postgres") >= 1);
    let reasons = "SELECT count(*) FROM writeguard.event WHERE reason LIKE 'The largest of 5 refusals%'";
    assert_eq!(number(&mut admin, reasons), 1);
    assert_eq!(number(&mut admin, "SELECT in_log_only FROM writeguard.event_queue"), 0);
}

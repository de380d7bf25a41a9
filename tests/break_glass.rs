//! `writeguard.break_glass`: a token without a second person, and never without a record.

use std::process::Command;
use std::time::Duration;

use crate::common::approvals::*;
use crate::common::{Refusal, Server, expect_refusal, wait_until};
use postgres::Client;
use postgres::fallible_iterator::FallibleIterator;

const BREAK: &str = "SELECT writeguard.break_glass('UPDATE t SET a = 9', 'the shop is down')";

/// Requesters may break the glass.
fn trusting(setup: &str) -> Stage {
    trusting_on(Server::shared(), setup)
}

fn trusting_on(server: &Server, setup: &str) -> Stage {
    let mut stage = Stage::on(server, setup);
    let requester = stage.requester.clone();
    pass(&mut stage.admin, &format!("GRANT EXECUTE ON FUNCTION writeguard.break_glass TO {requester}"));
    stage
}

fn events(stage: &mut Stage) -> i64 {
    stage.number("SELECT count(*) FROM writeguard.event WHERE kind = 'break_glass'")
}

fn requests(stage: &mut Stage) -> i64 {
    stage.number("SELECT count(*) FROM writeguard.request")
}

/// The queue of this server is empty.
fn settled(client: &mut Client) {
    wait_until(30, || number(client, "SELECT waiting FROM writeguard.event_queue") == 0);
}

// ---- What it gives ----

#[test]
fn its_token_opens_that_write_once() {
    let mut stage = trusting("");
    let mut client = stage.requester();
    let token = text(&mut client, BREAK);
    assert_eq!(token.len(), 64);
    arm(&mut client, &token);
    refused(&mut client, "UPDATE t SET a = 8", "WG006");
    arm(&mut client, &token);
    pass(&mut client, WRITE);
    assert_eq!(stage.changed(), 5);
    let id = stage.number("SELECT id FROM writeguard.request");
    assert_eq!(stage.overridden(), [(5, Some(id))]);
    assert_eq!(stage.state(id), "spent");
    arm(&mut client, &token);
    refused(&mut client, WRITE, "WG006");
}

#[test]
fn nobody_else_has_a_use_for_it() {
    let mut stage = trusting("");
    let token = text(&mut stage.requester(), BREAK);
    for mut client in [stage.approver(), stage.db.admin()] {
        arm(&mut client, &token);
        refused(&mut client, WRITE, "WG006");
    }
    assert_eq!(stage.changed(), 0);
}

#[test]
fn its_event_says_who_did_what_and_why() {
    let mut stage = trusting("");
    let mut client = stage.requester();
    text(&mut client, BREAK);
    let event = "SELECT login || '|' || role || '|' || statement || '|' || rows || '|' || reason || '|' || approval
                 FROM writeguard.event WHERE kind = 'break_glass'";
    let id = stage.number("SELECT id FROM writeguard.request");
    let requester = stage.requester.clone();
    assert_eq!(
        text(&mut stage.admin, event),
        format!("{requester}|{requester}|UPDATE t SET a = 9|5|the shop is down|{id}")
    );
    let row =
        "SELECT concat_ws('|', state, break_glass, decided_by, date_trunc('minute', expires_at - decided_at + '1 s'))
               FROM writeguard.request";
    assert_eq!(text(&mut stage.admin, row), format!("approved|t|{requester}|00:05:00"));
}

#[test]
fn it_is_loud() {
    let mut stage = trusting("");
    pass(&mut stage.admin, "LISTEN writeguard");
    let (mut client, told) = stage.listening();
    let token = text(&mut client, BREAK);
    let told = told.take();
    assert_eq!(told.len(), 1, "{told:?}");
    let requester = stage.requester.clone();
    let message = format!("glass broken by login \"{requester}\": a token without a second person, valid for 5 min");
    assert_eq!(told[0], ("WARNING".to_owned(), message.clone()));
    let log = Server::shared().log();
    let of = |line: &&str| line.contains(&requester);
    let lines: Vec<&str> = log.lines().filter(of).collect();
    assert!(lines.iter().any(|line| line.contains("LOG:  pg_writeguard: GLASS BROKEN")), "{lines:?}");
    assert!(lines.iter().any(|line| line.contains("WARNING:") && line.contains(&message)), "{lines:?}");
    assert!(!log.contains(&token));
    let mut notified = Vec::new();
    wait_until(20, || {
        let mut notifications = stage.admin.notifications();
        while let Some(notification) = notifications.timeout_iter(Duration::from_millis(50)).next().unwrap() {
            notified.push(notification.payload().to_owned());
        }
        notified.iter().any(|payload| payload.contains("\"break_glass\""))
    });
    assert!(!notified.join("").contains(&token));
}

#[test]
fn it_takes_parameters_and_can_be_executed() {
    let mut stage = trusting("");
    let mut client = stage.requester();
    pass(&mut client, "SELECT writeguard.break_glass('UPDATE t SET a = $1 WHERE id < $2', 'why', '{9, 100}')");
    pass(&mut client, "SELECT writeguard.execute(id) FROM writeguard.my_requests");
    assert_eq!(stage.changed(), 5);
}

#[test]
fn never_is_never_lifted() {
    let mut stage =
        trusting("SELECT writeguard.set_policy('p', tables => '{public.t}', max_rows => 3, override => 'never')");
    let mut client = stage.requester();
    let refusal = refused(&mut client, BREAK, "WG007");
    assert_eq!(refusal.message, "no approval can lift policy \"p\"");
    assert_eq!((events(&mut stage), requests(&mut stage)), (0, 0));
    // One that came after the glass was broken is not lifted either.
    pass(&mut stage.db.admin(), "SELECT writeguard.set_policy('p', tables => '{public.t}', max_rows => 3)");
    let token = text(&mut client, BREAK);
    pass(
        &mut stage.db.admin(),
        "SELECT writeguard.set_policy('hard', tables => '{public.t}', max_rows => 3, override => 'never')",
    );
    arm(&mut client, &token);
    refused(&mut client, WRITE, "WG001");
    assert_eq!(stage.changed(), 0);
}

#[test]
fn it_asks_nobody_however_many_a_policy_wants() {
    let mut stage = trusting(
        "CREATE ROLE nobody_is_in_it; SELECT writeguard.set_policy('p', tables => '{public.t}', max_rows => 3, min_approvals => 3,
             approvers => 'nobody_is_in_it')",
    );
    let mut client = stage.requester();
    let token = text(&mut client, BREAK);
    arm(&mut client, &token);
    pass(&mut client, WRITE);
    assert_eq!(stage.changed(), 5);
    pass(&mut stage.admin, "SELECT writeguard.drop_policy('p'); DROP ROLE nobody_is_in_it");
}

// ---- Who gets it ----

#[test]
fn only_who_was_granted_it() {
    let mut stage = Stage::new("");
    for mut client in [stage.requester(), stage.approver()] {
        refused(&mut client, BREAK, "42501");
    }
    assert_eq!((events(&mut stage), requests(&mut stage)), (0, 0));
    pass(&mut stage.db.admin(), BREAK);
    assert_eq!((events(&mut stage), requests(&mut stage)), (1, 1));
}

#[test]
fn a_role_that_is_set_is_told_apart_from_who_is_behind_it() {
    let mut stage = Stage::new("");
    let (role, requester) = (stage.db.role("oncall"), stage.requester.clone());
    pass(
        &mut stage.admin,
        &format!(
            "GRANT EXECUTE ON FUNCTION writeguard.break_glass TO {role}; ALTER ROLE {requester} NOINHERIT; GRANT {role} TO {requester}"
        ),
    );
    let mut client = stage.requester();
    refused(&mut client, BREAK, "42501");
    pass(&mut client, &format!("SET ROLE {role}"));
    let token = text(&mut client, BREAK);
    let who = "SELECT login || '/' || role FROM writeguard.event WHERE kind = 'break_glass'";
    assert_eq!(text(&mut stage.admin, who), format!("{requester}/{role}"));
    pass(&mut client, "RESET ROLE");
    arm(&mut client, &token);
    refused(&mut client, WRITE, "WG006");
    pass(&mut client, &format!("SET ROLE {role}"));
    arm(&mut client, &token);
    pass(&mut client, WRITE);
    assert_eq!(stage.changed(), 5);
}

#[test]
fn it_needs_a_reason_and_a_statement_that_needs_it() {
    let mut stage = trusting("");
    let mut client = stage.requester();
    for (arguments, sqlstate) in [
        ("'UPDATE t SET a = 9', NULL", "WG007"),
        ("'UPDATE t SET a = 9', ' '", "WG007"),
        ("NULL, 'why'", "WG007"),
        ("'UPDATE t SET a = 9; DELETE FROM t', 'why'", "WG007"),
        ("'DROP TABLE t', 'why'", "WG007"),
        ("'UPDATE t SET a = $1', 'why'", "WG007"),
        ("'SELECT 1', 'why'", "WG007"),
        ("'UPDATE t SET b = 9', 'why'", "42703"),
        ("'UPDTE t', 'why'", "42601"),
    ] {
        refused(&mut client, &format!("SELECT writeguard.break_glass({arguments})"), sqlstate);
    }
    assert_eq!((events(&mut stage), requests(&mut stage)), (0, 0));
}

#[test]
fn it_is_no_part_of_what_is_reviewed() {
    let mut stage = trusting("");
    let inner = BREAK.replace('\'', "''");
    refused(&mut stage.requester(), &format!("SELECT writeguard.request('{inner}', 'why')"), "WG006");
    assert_eq!((events(&mut stage), requests(&mut stage)), (0, 0));
}

// ---- Transactions ----

#[test]
fn its_event_outlives_the_transaction_and_its_token_does_not() {
    let mut stage = trusting("");
    let mut client = stage.requester();
    pass(&mut client, "BEGIN");
    let token = text(&mut client, BREAK);
    assert_eq!(events(&mut stage), 1);
    pass(&mut client, "ROLLBACK");
    assert_eq!((events(&mut stage), requests(&mut stage)), (1, 0));
    arm(&mut client, &token);
    refused(&mut client, WRITE, "WG006");
    pass(&mut client, "RESET writeguard.override; RESET writeguard.token");
    pass(&mut client, &format!("BEGIN; SAVEPOINT s; {BREAK}; ROLLBACK TO s; COMMIT"));
    assert_eq!((events(&mut stage), requests(&mut stage)), (2, 0));
}

#[test]
fn one_transaction_breaks_it_and_uses_it() {
    let mut stage = trusting("");
    let mut client = stage.requester();
    for (end, changed) in [("ROLLBACK", 0), ("COMMIT", 5)] {
        pass(&mut client, "BEGIN");
        let token = text(&mut client, BREAK);
        pass(
            &mut client,
            &format!("SET LOCAL writeguard.override = on; SET LOCAL writeguard.token = '{token}'; {WRITE}"),
        );
        pass(&mut client, end);
        assert_eq!(stage.changed(), changed, "{end}");
    }
    assert_eq!((events(&mut stage), stage.overridden().len()), (2, 1));
}

#[test]
fn a_prepared_transaction_takes_it_along() {
    let mut stage = trusting("");
    let mut client = stage.requester();
    let name = stage.db.name.clone();
    pass(&mut client, "BEGIN");
    let token = text(&mut client, BREAK);
    pass(&mut client, &format!("SET LOCAL writeguard.override = on; SET LOCAL writeguard.token = '{token}'; {WRITE}"));
    pass(&mut client, &format!("PREPARE TRANSACTION '{name}'"));
    assert_eq!((events(&mut stage), stage.changed()), (1, 0));
    pass(&mut client, &format!("COMMIT PREPARED '{name}'"));
    assert_eq!((stage.changed(), stage.overridden().len()), (5, 1));
}

// ---- Not without a record ----

/// Nothing was given: no token, no request, and no event, not even later.
#[track_caller]
fn nothing_given(stage: &mut Stage, refusal: &Refusal, sqlstate: &str) {
    assert_eq!(refusal.sqlstate, sqlstate, "{refusal:?}");
    // Events are stored in their order.
    refused(&mut stage.requester(), WRITE, "WG001");
    wait_until(30, || stage.number("SELECT count(*) FROM writeguard.event WHERE kind = 'blocked'") == 1);
    settled(&mut stage.admin);
    assert_eq!((events(stage), requests(stage)), (0, 0));
}

#[test]
fn without_a_place_for_its_event_there_is_no_token() {
    let server = Server::start(&["writeguard.event_timeout = '300ms'"]);
    let mut stage = trusting_on(&server, "");
    let mut client = stage.requester();
    let mut locker = stage.db.admin();
    settled(&mut locker);
    pass(&mut locker, "BEGIN; LOCK TABLE writeguard.event IN ACCESS EXCLUSIVE MODE");
    let refusal = expect_refusal(client.batch_execute(BREAK));
    assert_eq!(refusal.hint, "SELECT * FROM writeguard.check_setup();");
    pass(&mut client, "BEGIN; SAVEPOINT s");
    refused(&mut client, BREAK, "WG008");
    pass(&mut client, "ROLLBACK TO s; COMMIT");
    pass(&mut locker, "ROLLBACK");
    nothing_given(&mut stage, &refusal, "WG008");
    let log = server.log();
    assert!(log.contains("no token was given"), "the log does not say that it was for nothing");
    // And then it works.
    let token = text(&mut client, BREAK);
    arm(&mut client, &token);
    pass(&mut client, WRITE);
    assert_eq!((events(&mut stage), stage.changed()), (1, 5));
}

#[test]
fn without_the_process_that_stores_its_event_there_is_no_token() {
    let server = Server::start(&["writeguard.event_timeout = '300ms'"]);
    let mut stage = trusting_on(&server, "");
    let mut client = stage.requester();
    settled(&mut stage.admin);
    let of = "SELECT count(*) FROM pg_stat_activity WHERE backend_type LIKE 'pg_writeguard%' AND datname IS NOT NULL";
    let launcher = stage.number("SELECT pid FROM pg_stat_activity WHERE backend_type = 'pg_writeguard launcher'");
    // What it asked for just before it stopped would store the event as well.
    wait_until(30, || {
        signal(launcher, "STOP");
        std::thread::sleep(std::time::Duration::from_millis(200));
        let nobody = stage.number(of) == 0;
        signal(launcher, if nobody { "STOP" } else { "CONT" });
        nobody
    });
    let refusal = expect_refusal(client.batch_execute(BREAK));
    signal(launcher, "CONT");
    nothing_given(&mut stage, &refusal, "WG008");
}

#[test]
fn without_time_there_is_no_token() {
    let server = Server::start(&["writeguard.event_timeout = 0"]);
    let mut stage = trusting_on(&server, "");
    let mut locker = stage.db.admin();
    settled(&mut locker);
    pass(&mut locker, "BEGIN; LOCK TABLE writeguard.event IN ACCESS EXCLUSIVE MODE");
    let refusal = expect_refusal(stage.requester().batch_execute(BREAK));
    pass(&mut locker, "ROLLBACK");
    nothing_given(&mut stage, &refusal, "WG008");
}

#[test]
fn a_cancel_while_it_waits_for_its_event_gives_nothing() {
    let server = Server::start(&["writeguard.event_timeout = '10min'"]);
    let mut stage = trusting_on(&server, "");
    let mut client = stage.requester();
    let mut locker = stage.db.admin();
    settled(&mut locker);
    pass(&mut locker, "BEGIN; LOCK TABLE writeguard.event IN ACCESS EXCLUSIVE MODE");
    pass(&mut client, "SET statement_timeout = '500ms'");
    let refusal = expect_refusal(client.batch_execute(BREAK));
    pass(&mut locker, "ROLLBACK");
    nothing_given(&mut stage, &refusal, "57014");
}

fn signal(pid: i64, name: &str) {
    let status = Command::new("sh").args(["-c", r#"kill -"$1" "$2""#, "sh", name, &pid.to_string()]).status().unwrap();
    assert!(status.success());
}

// ---- Its own lifetime ----

#[test]
fn its_lifetime_is_its_own_and_bounded() {
    let server = Server::start(&["writeguard.break_glass_lifetime = '1s'"]);
    let mut stage = trusting_on(&server, "");
    let mut client = stage.requester();
    let token = text(&mut client, BREAK);
    wait_until(20, || {
        stage.number("SELECT count(*) FROM writeguard.request WHERE expires_at <= clock_timestamp()") == 1
    });
    arm(&mut client, &token);
    let refusal = refused(&mut client, WRITE, "WG006");
    assert!(refusal.message.contains("expired"), "{refusal:?}");
    refused(&mut stage.admin, "ALTER SYSTEM SET writeguard.break_glass_lifetime = '25h'", "22023");
    refused(&mut client, "SET writeguard.break_glass_lifetime = '1h'", "55P02");
}

//! Going past a limit on purpose: `writeguard.override`, `writeguard.token`, and the approval by a second person.

use std::thread;
use std::time::Duration;

use crate::common::session::{pass, text};
use crate::common::{Database, Refusal, Server, expect_refusal, wait_until};
use postgres::Client;

/// Changes all rows of `t`, which are more than the policy allows.
const WRITE: &str = "UPDATE t SET a = 9";
const ARM_FLAG: &str = "SET writeguard.override = on";

/// A database with a table `t` of five rows that the policy `p` limits to three, a requester and an approver.
struct Stage {
    db: Database,
    admin: Client,
    requester: String,
    approver: String,
}

impl Stage {
    fn new(policy_override: &str) -> Stage {
        let db = Server::shared().database();
        let mut admin = db.admin();
        let (requester, approver) = (db.role("requester"), db.role("approver"));
        admin
            .batch_execute(&format!(
                "CREATE TABLE t (id int PRIMARY KEY, a int NOT NULL DEFAULT 0);
                 INSERT INTO t SELECT generate_series(1, 5);
                 GRANT ALL ON t TO PUBLIC;
                 GRANT EXECUTE ON FUNCTION writeguard.approve, writeguard.reject TO {approver};
                 GRANT SELECT ON writeguard.pending TO {approver};
                 SELECT writeguard.set_policy('p', tables => '{{public.t}}', max_rows => 3,
                                              override => '{policy_override}')"
            ))
            .unwrap();
        Stage { db, admin, requester, approver }
    }

    fn requester(&self) -> Client {
        self.db.connect(&self.requester)
    }

    fn approver(&self) -> Client {
        self.db.connect(&self.approver)
    }

    /// How many rows of `t` have the value that [`WRITE`] gives them.
    #[track_caller]
    fn changed(&mut self) -> i64 {
        number(&mut self.admin, "SELECT count(*) FROM t WHERE a = 9")
    }

    /// Takes back what a write that passed has changed.
    fn undo(&mut self) {
        self.admin.batch_execute("SET writeguard.enabled = off; UPDATE t SET a = 0; RESET writeguard.enabled").unwrap();
    }

    fn events(&mut self, kind: &str) -> i64 {
        let sql = "SELECT count(*) FROM writeguard.event WHERE kind = $1";
        self.admin.query_one(sql, &[&kind]).unwrap().get(0)
    }

    /// Rows and approval of the `overridden` events.
    fn overridden(&mut self) -> Vec<(i64, Option<i64>)> {
        let sql = "SELECT rows, approval FROM writeguard.event WHERE kind = 'overridden' ORDER BY id";
        let rows = self.admin.query(sql, &[]).unwrap();
        rows.iter().map(|row| (row.get(0), row.get(1))).collect()
    }

    fn state(&mut self, request: i64) -> String {
        let sql = "SELECT state FROM writeguard.request WHERE id = $1";
        self.admin.query_one(sql, &[&request]).unwrap().get(0)
    }

    /// A new request of the requester's, and the token that the approver got for it.
    #[track_caller]
    fn approved(&self, statement: &str) -> (i64, String) {
        let id = request(&mut self.requester(), statement);
        (id, approve(&mut self.approver(), id))
    }

    /// A requester's session with an approved token for `statement` and the flag, both set.
    #[track_caller]
    fn armed(&self, statement: &str) -> (i64, Client) {
        let (id, token) = self.approved(statement);
        let mut client = self.requester();
        arm(&mut client, &token);
        (id, client)
    }
}

#[track_caller]
fn number(client: &mut Client, sql: &str) -> i64 {
    client.query_one(sql, &[]).unwrap().get(0)
}

fn try_request(client: &mut Client, statement: &str) -> Result<i64, postgres::Error> {
    client.query_one("SELECT writeguard.request($1::text, 'tests')", &[&statement]).map(|row| row.get(0))
}

#[track_caller]
fn request(client: &mut Client, statement: &str) -> i64 {
    try_request(client, statement).unwrap_or_else(|error| panic!("no request: {:?}", Refusal::of(&error)))
}

#[track_caller]
fn request_with(client: &mut Client, statement: &str, parameters: &[Option<&str>]) -> i64 {
    client
        .query_one("SELECT writeguard.request($1::text, 'tests', $2::text[])", &[&statement, &parameters])
        .unwrap_or_else(|error| panic!("no request: {:?}", Refusal::of(&error)))
        .get(0)
}

fn try_approve(client: &mut Client, request: i64) -> Result<String, postgres::Error> {
    client.query_one("SELECT writeguard.approve($1)", &[&request]).map(|row| row.get(0))
}

#[track_caller]
fn approve(client: &mut Client, request: i64) -> String {
    try_approve(client, request).unwrap_or_else(|error| panic!("no approval: {:?}", Refusal::of(&error)))
}

fn reject(client: &mut Client, request: i64) -> Result<(), postgres::Error> {
    client.query("SELECT writeguard.reject($1, 'no')", &[&request]).map(drop)
}

fn arm(client: &mut Client, token: &str) {
    client.batch_execute(&format!("{ARM_FLAG}; SET writeguard.token = '{token}'")).unwrap();
}

/// The write is refused, with this SQLSTATE; gives the error.
#[track_caller]
fn refused(client: &mut Client, sql: &str, sqlstate: &str) -> Refusal {
    let refusal = expect_refusal(client.batch_execute(sql));
    assert_eq!(refusal.sqlstate, sqlstate, "{refusal:?}");
    refusal
}

/// Waits until a session with this process id waits for a lock.
#[track_caller]
fn wait_for_lock_of(admin: &mut Client, pid: i32) {
    wait_until(20, || {
        admin
            .query_one("SELECT count(*) FROM pg_stat_activity WHERE pid = $1 AND wait_event_type = 'Lock'", &[&pid])
            .unwrap()
            .get::<_, i64>(0)
            == 1
    });
}

fn pid(client: &mut Client) -> i32 {
    client.query_one("SELECT pg_backend_pid()", &[]).unwrap().get(0)
}

// ---- The flag: what arms, and for how long ----

#[test]
fn without_the_flag_the_limit_holds_and_the_hint_says_how_to_set_it() {
    let mut stage = Stage::new("flag");
    let refusal = refused(&mut stage.requester(), WRITE, "WG001");
    assert!(refusal.hint.contains("SET writeguard.override = on"), "{refusal:?}");
    assert_eq!(stage.changed(), 0);
}

#[test]
fn flag_lifts_one_autocommit_write() {
    let mut stage = Stage::new("flag");
    let mut client = stage.requester();
    pass(&mut client, ARM_FLAG);
    pass(&mut client, WRITE);
    assert_eq!(stage.changed(), 5);
    refused(&mut client, WRITE, "WG001");
}

#[test]
fn flag_ends_with_a_write_that_stayed_below_the_limit() {
    let stage = Stage::new("flag");
    let mut client = stage.requester();
    pass(&mut client, ARM_FLAG);
    pass(&mut client, "UPDATE t SET a = 1 WHERE id = 1");
    refused(&mut client, WRITE, "WG001");
}

#[test]
fn flag_waits_for_the_transaction_that_writes() {
    let stage = Stage::new("flag");
    let mut client = stage.requester();
    pass(&mut client, ARM_FLAG);
    pass(&mut client, "SELECT count(*) FROM t");
    pass(&mut client, "BEGIN; SELECT 1; COMMIT");
    pass(&mut client, WRITE);
}

#[test]
fn flag_set_in_a_block_lifts_all_writes_until_commit() {
    let stage = Stage::new("flag");
    let mut client = stage.requester();
    pass(&mut client, "BEGIN");
    pass(&mut client, ARM_FLAG);
    pass(&mut client, WRITE);
    pass(&mut client, "UPDATE t SET a = 8");
    pass(&mut client, "COMMIT");
    refused(&mut client, WRITE, "WG001");
}

#[test]
fn flag_set_before_a_block_ends_with_its_commit() {
    let stage = Stage::new("flag");
    let mut client = stage.requester();
    pass(&mut client, ARM_FLAG);
    pass(&mut client, "BEGIN");
    pass(&mut client, WRITE);
    pass(&mut client, "COMMIT");
    refused(&mut client, WRITE, "WG001");
}

#[test]
fn flag_ends_with_a_rollback() {
    let mut stage = Stage::new("flag");
    let mut client = stage.requester();
    pass(&mut client, ARM_FLAG);
    pass(&mut client, "BEGIN");
    pass(&mut client, WRITE);
    pass(&mut client, "ROLLBACK");
    refused(&mut client, WRITE, "WG001");
    assert_eq!(stage.changed(), 0);
    assert_eq!(stage.overridden(), []);
}

#[test]
fn flag_ends_with_a_write_that_failed() {
    let stage = Stage::new("flag");
    let mut client = stage.requester();
    pass(&mut client, ARM_FLAG);
    refused(&mut client, "UPDATE t SET a = 1 / (5 - id)", "22012");
    refused(&mut client, WRITE, "WG001");
}

/// The write that was meant may have found nothing, or failed with its first row: what comes next was not meant.
#[test]
fn flag_ends_with_a_write_that_changed_nothing() {
    for (write, outcome) in [
        ("UPDATE t SET a = 1 WHERE id = -1", None),
        ("DELETE FROM t WHERE id = -1", None),
        ("UPDATE t SET a = 1 / (1 - id) WHERE id = 1", Some("22012")),
        ("WITH w AS (UPDATE t SET a = 1 WHERE id = -1 RETURNING id) SELECT count(*) FROM w", None),
        ("MERGE INTO t USING (SELECT 1) AS s ON t.id = -1 WHEN MATCHED THEN UPDATE SET a = 1", None),
        ("INSERT INTO t SELECT 1, 1 WHERE false ON CONFLICT (id) DO UPDATE SET a = 1", None),
    ] {
        let stage = Stage::new("flag");
        let mut client = stage.requester();
        pass(&mut client, ARM_FLAG);
        // Neither of these is a covered write.
        pass(&mut client, "EXPLAIN UPDATE t SET a = 1; SELECT count(*) FROM t; CREATE TEMP TABLE u AS TABLE t");
        pass(&mut client, "UPDATE u SET a = 1");
        assert_eq!(shown(&mut client), "on", "{write}");
        match outcome {
            None => pass(&mut client, write),
            Some(sqlstate) => drop(refused(&mut client, write, sqlstate)),
        }
        assert_eq!(shown(&mut client), "off", "{write}");
        refused(&mut client, WRITE, "WG001");
    }
}

/// The flag as SHOW tells it.
fn shown(client: &mut Client) -> String {
    client.query_one("SHOW writeguard.override", &[]).unwrap().get(0)
}

#[test]
fn flag_set_locally_ends_with_its_transaction() {
    let stage = Stage::new("flag");
    let mut client = stage.requester();
    pass(&mut client, "BEGIN; SET LOCAL writeguard.override = on");
    pass(&mut client, WRITE);
    pass(&mut client, "COMMIT");
    refused(&mut client, WRITE, "WG001");
    pass(&mut client, "BEGIN; SET LOCAL writeguard.override = on; COMMIT");
    refused(&mut client, WRITE, "WG001");
}

#[test]
fn flag_can_be_set_by_set_config() {
    let stage = Stage::new("flag");
    let mut client = stage.requester();
    pass(&mut client, "SELECT set_config('writeguard.override', 'on', false)");
    pass(&mut client, WRITE);
    refused(&mut client, WRITE, "WG001");
    pass(&mut client, "BEGIN");
    pass(&mut client, "SELECT set_config('writeguard.override', 'on', true)");
    pass(&mut client, WRITE);
    pass(&mut client, "COMMIT");
    refused(&mut client, WRITE, "WG001");
}

#[test]
fn flag_in_one_string_of_commands_ends_with_the_string() {
    let stage = Stage::new("flag");
    let mut client = stage.requester();
    pass(&mut client, &format!("{ARM_FLAG}; {WRITE}"));
    refused(&mut client, WRITE, "WG001");
}

const CREATE_ARMED_FUNCTION: &str = "CREATE FUNCTION all_of_it() RETURNS void LANGUAGE plpgsql
    SET writeguard.override = on AS 'BEGIN UPDATE t SET a = 9; END'";

#[test]
fn flag_of_a_function_lifts_while_it_runs() {
    let mut stage = Stage::new("flag");
    stage.admin.batch_execute(CREATE_ARMED_FUNCTION).unwrap();
    let mut client = stage.requester();
    pass(&mut client, "SELECT all_of_it()");
    assert_eq!(stage.changed(), 5);
    refused(&mut client, WRITE, "WG001");
}

#[test]
fn flag_of_a_function_lifts_nothing_later_in_the_transaction() {
    let mut stage = Stage::new("flag");
    stage.admin.batch_execute(CREATE_ARMED_FUNCTION).unwrap();
    let mut client = stage.requester();
    pass(&mut client, "BEGIN");
    pass(&mut client, "SELECT all_of_it()");
    refused(&mut client, WRITE, "WG001");
}

#[test]
fn flag_of_a_function_lifts_nothing_later_in_the_statement() {
    let mut stage = Stage::new("flag");
    stage.admin.batch_execute(CREATE_ARMED_FUNCTION).unwrap();
    refused(&mut stage.requester(), "DO 'BEGIN PERFORM all_of_it(); UPDATE t SET a = 8; END'", "WG001");
}

#[test]
fn flag_that_was_on_before_does_not_outlive_a_function_that_switches_it_off() {
    let mut stage = Stage::new("flag");
    stage
        .admin
        .batch_execute(
            "CREATE FUNCTION none_of_it() RETURNS void LANGUAGE plpgsql
             SET writeguard.override = off AS 'BEGIN UPDATE t SET a = 9; END'",
        )
        .unwrap();
    let mut client = stage.requester();
    pass(&mut client, ARM_FLAG);
    refused(&mut client, "SELECT none_of_it()", "WG001");
}

#[test]
fn flag_switched_off_within_the_statement_lifts_no_further_row() {
    let mut stage = Stage::new("flag");
    refused(
        &mut stage.requester(),
        "DO $$ BEGIN
             SET LOCAL writeguard.override = on;
             UPDATE t SET a = 8;
             SET LOCAL writeguard.override = off;
             UPDATE t SET a = 9;
         END $$",
        "WG001",
    );
    assert_eq!(stage.changed(), 0);
}

#[test]
fn flag_ends_with_a_commit_inside_a_procedure() {
    let mut stage = Stage::new("flag");
    stage
        .admin
        .batch_execute(
            "CREATE PROCEDURE twice() LANGUAGE plpgsql
             AS 'BEGIN UPDATE t SET a = 8; COMMIT; UPDATE t SET a = 9; END'",
        )
        .unwrap();
    let mut client = stage.requester();
    pass(&mut client, ARM_FLAG);
    refused(&mut client, "CALL twice()", "WG001");
    assert_eq!(stage.overridden(), [(5, None)]);
    assert_eq!(number(&mut stage.admin, "SELECT count(*) FROM t WHERE a = 8"), 5);
}

#[test]
fn flag_from_pgoptions_does_not_arm() {
    let stage = Stage::new("flag");
    let mut client = stage.db.connect_with(&stage.requester, "-c writeguard.override=on");
    assert_eq!(text(&mut client, "SHOW writeguard.override"), "off");
    refused(&mut client, WRITE, "WG001");
}

#[test]
fn flag_from_alter_role_does_not_arm() {
    let mut stage = Stage::new("flag");
    let role = stage.requester.clone();
    for scope in ["", &format!("IN DATABASE {}", stage.db.name)] {
        stage.admin.batch_execute(&format!("ALTER ROLE {role} {scope} SET writeguard.override = on")).unwrap();
        refused(&mut stage.requester(), WRITE, "WG001");
    }
}

#[test]
fn flag_from_alter_database_does_not_arm() {
    let mut stage = Stage::new("flag");
    let name = stage.db.name.clone();
    stage.admin.batch_execute(&format!("ALTER DATABASE {name} SET writeguard.override = on")).unwrap();
    refused(&mut stage.requester(), WRITE, "WG001");
}

#[test]
fn flag_cannot_be_put_into_the_configuration() {
    let mut stage = Stage::new("flag");
    for setting in ["override = on", "token = 'abc'"] {
        expect_refusal(stage.admin.batch_execute(&format!("ALTER SYSTEM SET writeguard.{setting}")));
    }
}

#[test]
fn resetting_does_not_arm_what_the_session_started_with() {
    let stage = Stage::new("flag");
    for reset in [
        "RESET writeguard.override",
        "RESET ALL",
        "DISCARD ALL",
        "SET writeguard.override TO DEFAULT",
        "SELECT set_config('writeguard.override', NULL, false)",
        "SET SESSION AUTHORIZATION DEFAULT",
        "RESET ROLE",
    ] {
        let mut client = stage.db.connect_with(&stage.requester, "-c writeguard.override=on");
        pass(&mut client, reset);
        refused(&mut client, WRITE, "WG001");
    }
}

#[test]
fn resetting_ends_what_was_armed() {
    let stage = Stage::new("flag");
    for reset in ["RESET writeguard.override", "RESET ALL", "DISCARD ALL", "SET writeguard.override = off"] {
        let mut client = stage.requester();
        pass(&mut client, ARM_FLAG);
        pass(&mut client, reset);
        refused(&mut client, WRITE, "WG001");
    }
}

#[test]
fn rollback_of_the_transaction_that_set_the_flag_takes_it_back() {
    let stage = Stage::new("flag");
    let mut client = stage.requester();
    pass(&mut client, "BEGIN; SET writeguard.override = on; ROLLBACK");
    refused(&mut client, WRITE, "WG001");
}

#[test]
fn rollback_to_a_savepoint_takes_back_a_flag_set_after_it() {
    let stage = Stage::new("flag");
    let mut client = stage.requester();
    pass(&mut client, "BEGIN; SAVEPOINT s");
    pass(&mut client, ARM_FLAG);
    pass(&mut client, "ROLLBACK TO s");
    refused(&mut client, WRITE, "WG001");
}

#[test]
fn rollback_to_a_savepoint_does_not_bring_back_a_flag_that_was_switched_off() {
    let stage = Stage::new("flag");
    for off in ["SET writeguard.override = off", "SET LOCAL writeguard.override = off", "RESET writeguard.override"] {
        let mut client = stage.requester();
        pass(&mut client, "BEGIN");
        pass(&mut client, ARM_FLAG);
        pass(&mut client, "SAVEPOINT s");
        pass(&mut client, off);
        pass(&mut client, "ROLLBACK TO s");
        refused(&mut client, WRITE, "WG001");
    }
}

#[test]
fn the_end_of_a_local_off_does_not_bring_back_the_flag() {
    let stage = Stage::new("flag");
    let mut client = stage.requester();
    pass(&mut client, ARM_FLAG);
    pass(&mut client, "BEGIN; SET LOCAL writeguard.override = off; COMMIT");
    refused(&mut client, WRITE, "WG001");
}

#[test]
fn rollback_to_a_savepoint_does_not_bring_back_a_spent_flag() {
    let stage = Stage::new("flag");
    let mut client = stage.requester();
    pass(&mut client, ARM_FLAG);
    pass(&mut client, WRITE);
    pass(&mut client, "BEGIN; SAVEPOINT s; SET LOCAL writeguard.override = off; ROLLBACK TO s");
    refused(&mut client, WRITE, "WG001");
}

#[test]
fn a_spent_flag_is_shown_as_off() {
    let stage = Stage::new("flag");
    let mut client = stage.requester();
    pass(&mut client, ARM_FLAG);
    assert_eq!(text(&mut client, "SHOW writeguard.override"), "on");
    pass(&mut client, WRITE);
    assert_eq!(text(&mut client, "SHOW writeguard.override"), "off");
    assert_eq!(text(&mut client, "SELECT current_setting('writeguard.override')"), "off");
}

#[test]
fn flag_lifts_truncate() {
    let mut stage = Stage::new("flag");
    let mut client = stage.requester();
    refused(&mut client, "TRUNCATE t", "WG005");
    pass(&mut client, ARM_FLAG);
    pass(&mut client, "TRUNCATE t");
    assert_eq!(number(&mut stage.admin, "SELECT count(*) FROM t"), 0);
    let event = stage
        .admin
        .query_one("SELECT operation, relation FROM writeguard.event WHERE kind = 'overridden'", &[])
        .unwrap();
    assert_eq!((event.get::<_, &str>(0), event.get::<_, &str>(1)), ("truncate", "public.t"));
}

#[test]
fn flag_lifts_the_limit_per_transaction() {
    let mut stage = Stage::new("flag");
    stage
        .admin
        .batch_execute(
            "SELECT writeguard.set_policy('p', tables => '{public.t}', max_rows_per_transaction => 3,
                                          override => 'flag')",
        )
        .unwrap();
    let mut client = stage.requester();
    pass(&mut client, "BEGIN; UPDATE t SET a = 1 WHERE id <= 3");
    pass(&mut client, ARM_FLAG);
    pass(&mut client, "UPDATE t SET a = 9 WHERE id = 4; COMMIT");
    assert_eq!(stage.changed(), 1);
    let scope = text(&mut stage.admin, "SELECT scope FROM writeguard.event WHERE kind = 'overridden'");
    assert_eq!(scope, "transaction");
}

#[test]
fn flag_is_no_event_where_no_limit_is_passed() {
    let mut stage = Stage::new("flag");
    let mut client = stage.requester();
    pass(&mut client, ARM_FLAG);
    pass(&mut client, "UPDATE t SET a = 9 WHERE id <= 3");
    assert_eq!(stage.overridden(), []);
}

#[test]
fn override_never_is_lifted_by_nothing() {
    let mut stage = Stage::new("token");
    let (id, mut client) = stage.armed(WRITE);
    stage
        .admin
        .batch_execute("SELECT writeguard.set_policy('p', tables => '{public.t}', max_rows => 3, override => 'never')")
        .unwrap();
    let refusal = refused(&mut client, WRITE, "WG001");
    assert!(!refusal.hint.is_empty(), "{refusal:?}");
    assert!(!refusal.hint.contains("SET writeguard.override"), "{refusal:?}");
    assert_eq!(stage.changed(), 0);
    assert_eq!(stage.state(id), "approved");
}

#[test]
fn flag_lifts_no_second_policy_that_has_override_never() {
    let mut stage = Stage::new("flag");
    stage
        .admin
        .batch_execute(
            "SELECT writeguard.set_policy('hard', tables => '{public.t}', max_rows => 4, override => 'never')",
        )
        .unwrap();
    let mut client = stage.requester();
    pass(&mut client, ARM_FLAG);
    let refusal = refused(&mut client, WRITE, "WG001");
    assert!(refusal.detail.contains("\"hard\""), "{refusal:?}");
    pass(&mut client, ARM_FLAG);
    pass(&mut client, "UPDATE t SET a = 9 WHERE id <= 4");
    assert_eq!(stage.changed(), 4);
}

#[test]
fn overridden_event_has_the_real_number_of_rows() {
    let mut stage = Stage::new("flag");
    let mut client = stage.requester();
    pass(&mut client, ARM_FLAG);
    pass(&mut client, WRITE);
    assert_eq!(stage.overridden(), [(5, None)]);
}

#[test]
fn overridden_event_says_who_did_what() {
    let mut stage = Stage::new("flag");
    let mut client = stage.requester();
    pass(&mut client, ARM_FLAG);
    pass(&mut client, &format!("  {WRITE} ; "));
    let event = stage
        .admin
        .query_one(
            "SELECT policy, login, role, operation, relation, scope, row_limit, statement, xid IS NOT NULL
             FROM writeguard.event WHERE kind = 'overridden'",
            &[],
        )
        .unwrap();
    let column = |index: usize| event.get::<_, String>(index);
    assert_eq!(column(0), "p");
    assert_eq!(column(1), stage.requester);
    assert_eq!(column(2), stage.requester);
    assert_eq!(column(3), "update");
    assert_eq!(column(4), "public.t");
    assert_eq!(column(5), "statement");
    assert_eq!(event.get::<_, i64>(6), 3);
    assert_eq!(column(7), WRITE);
    assert!(event.get::<_, bool>(8));
}

#[test]
fn overridden_event_does_not_exist_before_the_commit() {
    let mut stage = Stage::new("flag");
    let mut client = stage.requester();
    pass(&mut client, "BEGIN");
    pass(&mut client, ARM_FLAG);
    pass(&mut client, WRITE);
    assert_eq!(stage.overridden(), []);
    pass(&mut client, "COMMIT");
    assert_eq!(stage.overridden(), [(5, None)]);
}

#[test]
fn overridden_event_goes_with_a_savepoint() {
    let mut stage = Stage::new("flag");
    let mut client = stage.requester();
    pass(&mut client, "BEGIN");
    pass(&mut client, ARM_FLAG);
    pass(&mut client, "SAVEPOINT s");
    pass(&mut client, WRITE);
    pass(&mut client, "ROLLBACK TO s");
    pass(&mut client, "UPDATE t SET a = 9 WHERE id <= 2; COMMIT");
    assert_eq!(stage.changed(), 2);
    assert_eq!(stage.overridden(), []);
}

#[test]
fn overridden_event_stays_with_a_released_savepoint() {
    let mut stage = Stage::new("flag");
    let mut client = stage.requester();
    pass(&mut client, "BEGIN");
    pass(&mut client, ARM_FLAG);
    pass(&mut client, "SAVEPOINT s");
    pass(&mut client, WRITE);
    pass(&mut client, "RELEASE s; COMMIT");
    assert_eq!(stage.overridden(), [(5, None)]);
}

#[test]
fn each_overridden_statement_is_an_event() {
    let mut stage = Stage::new("flag");
    let mut client = stage.requester();
    pass(&mut client, "BEGIN");
    pass(&mut client, ARM_FLAG);
    pass(&mut client, WRITE);
    pass(&mut client, "DELETE FROM t WHERE id <= 4; COMMIT");
    assert_eq!(stage.overridden(), [(5, None), (4, None)]);
}

#[test]
fn overridden_rows_leave_out_what_an_exception_block_took_back() {
    let mut stage = Stage::new("flag");
    let mut client = stage.requester();
    pass(
        &mut client,
        "BEGIN; SET LOCAL writeguard.override = on;
         DO $$ BEGIN
             UPDATE t SET a = 8;
             BEGIN UPDATE t SET a = 7; RAISE 'back'; EXCEPTION WHEN raise_exception THEN NULL; END;
         END $$;
         COMMIT",
    );
    assert_eq!(stage.overridden(), [(5, None)]);
}

#[test]
fn a_lift_inside_a_rolled_back_exception_block_does_not_outlive_it() {
    let mut stage = Stage::new("flag");
    let mut client = stage.requester();
    refused(
        &mut client,
        "DO $$ BEGIN
             BEGIN
                 SET LOCAL writeguard.override = on;
                 UPDATE t SET a = 9;
                 RAISE 'back';
             EXCEPTION WHEN raise_exception THEN NULL; END;
             UPDATE t SET a = 9;
         END $$",
        "WG001",
    );
    assert_eq!(stage.changed(), 0);
}

// ---- The token: two people ----

#[test]
fn token_of_another_login_opens_the_write_once() {
    let mut stage = Stage::new("token");
    let (id, mut client) = stage.armed(WRITE);
    pass(&mut client, WRITE);
    assert_eq!(stage.changed(), 5);
    assert_eq!(stage.state(id), "spent");
    assert_eq!(stage.overridden(), [(5, Some(id))]);
}

#[test]
fn token_is_spent_by_its_use() {
    let stage = Stage::new("token");
    let (_, token) = stage.approved(WRITE);
    let mut client = stage.requester();
    arm(&mut client, &token);
    pass(&mut client, WRITE);
    arm(&mut client, &token);
    let refusal = refused(&mut client, WRITE, "WG006");
    assert!(refusal.message.contains("spent"), "{refusal:?}");
}

#[test]
fn token_opens_no_second_write_of_the_same_transaction() {
    let stage = Stage::new("token");
    let (_, mut client) = stage.armed(WRITE);
    pass(&mut client, "BEGIN");
    pass(&mut client, WRITE);
    refused(&mut client, WRITE, "WG006");
}

#[test]
fn token_lasts_for_the_transaction_that_uses_it() {
    let stage = Stage::new("token");
    let (_, mut client) = stage.armed(WRITE);
    pass(&mut client, "UPDATE t SET a = 1 WHERE id = 1");
    // Neither flag nor token is armed any more.
    pass(&mut client, ARM_FLAG);
    let refusal = refused(&mut client, WRITE, "WG001");
    assert!(refusal.hint.contains("writeguard.request"), "{refusal:?}");
}

#[test]
fn token_is_not_spent_by_a_write_below_the_limit() {
    let mut stage = Stage::new("token");
    let (id, mut client) = stage.armed(WRITE);
    pass(&mut client, "UPDATE t SET a = 1 WHERE id = 1");
    assert_eq!(stage.state(id), "approved");
}

#[test]
fn flag_without_token_is_refused_with_the_limits_own_code() {
    let mut stage = Stage::new("token");
    let mut client = stage.requester();
    pass(&mut client, ARM_FLAG);
    let refusal = refused(&mut client, WRITE, "WG001");
    assert!(refusal.hint.contains("writeguard.request("), "{refusal:?}");
    assert_eq!(stage.changed(), 0);
}

#[test]
fn token_without_flag_is_refused_with_the_limits_own_code() {
    let mut stage = Stage::new("token");
    let (id, token) = stage.approved(WRITE);
    let mut client = stage.requester();
    pass(&mut client, &format!("SET writeguard.token = '{token}'"));
    let refusal = refused(&mut client, WRITE, "WG001");
    assert!(refusal.hint.contains("SET writeguard.override = on"), "{refusal:?}");
    assert_eq!(stage.state(id), "approved");
}

#[test]
fn the_hint_of_a_refusal_makes_the_request_as_it_stands() {
    let mut stage = Stage::new("token");
    let mut client = stage.requester();
    for statement in [WRITE, "UPDATE t SET a = 9 WHERE 'it''s' <> ''"] {
        let refusal = refused(&mut client, statement, "WG001");
        let id = number(&mut client, refusal.hint.trim_end_matches(';'));
        let stored = stage.admin.query_one("SELECT statement FROM writeguard.request WHERE id = $1", &[&id]).unwrap();
        assert_eq!(stored.get::<_, &str>(0), statement);
    }
}

#[test]
fn the_hint_for_a_statement_with_parameters_names_them() {
    let stage = Stage::new("token");
    let mut client = stage.requester();
    let refusal = expect_refusal(client.execute(PARAMETERIZED, &[&9, &5]));
    assert_eq!(refusal.sqlstate, "WG001", "{refusal:?}");
    // A request by event is for statements without parameters.
    assert!(!refusal.hint.contains("event =>"), "{refusal:?}");
    assert!(refusal.hint.contains("parameters =>"), "{refusal:?}");
}

#[test]
fn token_from_outside_the_session_does_not_arm() {
    let mut stage = Stage::new("token");
    let (_, token) = stage.approved(WRITE);
    let role = stage.requester.clone();
    let mut client = stage.db.connect_with(&role, &format!("-c writeguard.token={token}"));
    pass(&mut client, ARM_FLAG);
    refused(&mut client, WRITE, "WG001");
    for owner in [format!("ROLE {role}"), format!("DATABASE {}", stage.db.name)] {
        stage.admin.batch_execute(&format!("ALTER {owner} SET writeguard.token = '{token}'")).unwrap();
        let mut client = stage.requester();
        pass(&mut client, ARM_FLAG);
        refused(&mut client, WRITE, "WG001");
        pass(&mut client, "RESET writeguard.token");
        pass(&mut client, ARM_FLAG);
        refused(&mut client, WRITE, "WG001");
        stage.admin.batch_execute(&format!("ALTER {owner} RESET writeguard.token")).unwrap();
    }
}

#[test]
fn token_is_never_shown() {
    let stage = Stage::new("token");
    let (_, token) = stage.approved(WRITE);
    let options = format!("-c writeguard.token={token}");
    for mut client in [
        stage.requester(),
        stage.db.admin(),
        stage.db.connect_with(&stage.requester, &options),
        stage.db.connect_with("postgres", &options),
    ] {
        for arming in ["SELECT 1".to_owned(), format!("SET writeguard.token = '{token}'")] {
            pass(&mut client, &arming);
            for sql in [
                "SHOW writeguard.token",
                "SELECT current_setting('writeguard.token')",
                "SELECT coalesce(string_agg(s::text, ''), '') FROM pg_settings AS s",
                "SELECT coalesce(string_agg(s::text, ''), '') FROM pg_show_all_settings() AS s",
            ] {
                let shown = text(&mut client, sql);
                assert!(!shown.contains(&token), "{sql} shows the token: {shown}");
            }
            let all = client.simple_query("SHOW ALL").unwrap();
            assert!(!format!("{all:?}").contains(&token), "SHOW ALL");
        }
        let copied = client.query_one("SELECT set_config('writeguard.token', $1, false)", &[&token]).unwrap();
        assert!(!copied.get::<_, &str>(0).contains(&token), "set_config");
    }
}

// ---- Nobody approves their own request ----

#[test]
fn requester_cannot_approve_even_when_granted() {
    let mut stage = Stage::new("token");
    let role = stage.requester.clone();
    stage
        .admin
        .batch_execute(&format!("GRANT EXECUTE ON FUNCTION writeguard.approve, writeguard.reject TO {role}"))
        .unwrap();
    let mut client = stage.requester();
    let id = request(&mut client, WRITE);
    let refusal = expect_refusal(try_approve(&mut client, id));
    assert_eq!(refusal.sqlstate, "WG006");
    assert!(refusal.detail.contains(&role), "{refusal:?}");
    assert_eq!(stage.state(id), "pending");
}

#[test]
fn superuser_cannot_approve_their_own_request() {
    let mut stage = Stage::new("token");
    let id = request(&mut stage.admin, WRITE);
    let refusal = expect_refusal(try_approve(&mut stage.db.admin(), id));
    assert_eq!(refusal.sqlstate, "WG006", "{refusal:?}");
}

#[test]
fn set_role_makes_nobody_another_person() {
    let mut stage = Stage::new("token");
    let (role, approver) = (stage.requester.clone(), stage.approver.clone());
    stage.admin.batch_execute(&format!("GRANT {approver} TO {role}")).unwrap();
    let mut client = stage.requester();
    let id = request(&mut client, WRITE);
    pass(&mut client, &format!("SET ROLE {approver}"));
    let refusal = expect_refusal(try_approve(&mut client, id));
    assert_eq!(refusal.sqlstate, "WG006", "{refusal:?}");
}

#[test]
fn a_request_made_after_set_role_belongs_to_the_login() {
    let mut stage = Stage::new("token");
    let (role, approver) = (stage.requester.clone(), stage.approver.clone());
    stage.admin.batch_execute(&format!("GRANT {role} TO {approver}")).unwrap();
    let mut client = stage.approver();
    pass(&mut client, &format!("SET ROLE {role}"));
    let id = request(&mut client, WRITE);
    pass(&mut client, "RESET ROLE");
    let refusal = expect_refusal(try_approve(&mut client, id));
    assert_eq!(refusal.sqlstate, "WG006", "{refusal:?}");
}

#[test]
fn set_session_authorization_makes_nobody_another_person() {
    let mut stage = Stage::new("token");
    let (role, approver) = (stage.requester.clone(), stage.approver.clone());
    let mut client = stage.db.admin();
    pass(&mut client, &format!("SET SESSION AUTHORIZATION {role}"));
    let id = request(&mut client, WRITE);
    pass(&mut client, &format!("SET SESSION AUTHORIZATION {approver}"));
    let refusal = expect_refusal(try_approve(&mut client, id));
    assert_eq!(refusal.sqlstate, "WG006", "{refusal:?}");
    pass(&mut client, "RESET SESSION AUTHORIZATION");
    let refusal = expect_refusal(try_approve(&mut client, id));
    assert_eq!(refusal.sqlstate, "WG006", "{refusal:?}");
    let login = text(&mut stage.admin, "SELECT login FROM writeguard.request");
    assert_eq!(login, "postgres");
}

#[test]
fn a_security_definer_function_makes_nobody_another_person() {
    let mut stage = Stage::new("token");
    stage
        .admin
        .batch_execute(
            "CREATE FUNCTION approve_as_owner(id bigint) RETURNS text LANGUAGE sql SECURITY DEFINER
             AS 'SELECT writeguard.approve(id)'",
        )
        .unwrap();
    let mut client = stage.requester();
    let id = request(&mut client, WRITE);
    let refused = client.query_one("SELECT approve_as_owner($1)", &[&id]);
    assert_eq!(expect_refusal(refused).sqlstate, "WG006");
}

#[test]
fn renaming_the_requester_makes_nobody_another_person() {
    let mut stage = Stage::new("token");
    let role = stage.requester.clone();
    let id = request(&mut stage.requester(), WRITE);
    stage
        .admin
        .batch_execute(&format!(
            "ALTER ROLE {role} RENAME TO {role}_married;
             GRANT EXECUTE ON FUNCTION writeguard.approve TO {role}_married"
        ))
        .unwrap();
    let mut client = stage.db.connect(&format!("{role}_married"));
    let refusal = expect_refusal(try_approve(&mut client, id));
    assert_eq!(refusal.sqlstate, "WG006", "{refusal:?}");
}

#[test]
fn approving_is_for_those_with_the_right_to_execute_it() {
    let stage = Stage::new("token");
    let stranger = stage.db.role("stranger");
    let id = request(&mut stage.requester(), WRITE);
    let mut client = stage.db.connect(&stranger);
    let refusal = expect_refusal(try_approve(&mut client, id));
    assert_eq!(refusal.sqlstate, "42501");
    let refusal = expect_refusal(reject(&mut client, id));
    assert_eq!(refusal.sqlstate, "42501");
}

#[test]
fn pending_lists_what_waits_for_a_decision() {
    let stage = Stage::new("token");
    let id = request(&mut stage.requester(), WRITE);
    let mut approver = stage.approver();
    let row = approver
        .query_one("SELECT id, requested_by, role, reason, statement, rows FROM writeguard.pending", &[])
        .unwrap();
    assert_eq!(row.get::<_, i64>(0), id);
    assert_eq!(row.get::<_, String>(1), stage.requester);
    assert_eq!(row.get::<_, String>(2), stage.requester);
    assert_eq!(row.get::<_, &str>(3), "tests");
    assert_eq!(row.get::<_, &str>(4), WRITE);
    assert_eq!(row.get::<_, i64>(5), 5);
    approve(&mut approver, id);
    assert_eq!(number(&mut approver, "SELECT count(*) FROM writeguard.pending"), 0);
}

#[test]
fn my_requests_shows_ones_own_and_no_token() {
    let mut stage = Stage::new("token");
    let (id, token) = stage.approved(WRITE);
    request(&mut stage.admin, WRITE);
    let mut client = stage.requester();
    let rows = client.query("SELECT id, state, r::text FROM writeguard.my_requests AS r", &[]).unwrap();
    assert_eq!(rows.len(), 1);
    assert_eq!(rows[0].get::<_, i64>(0), id);
    assert_eq!(rows[0].get::<_, &str>(1), "approved");
    let hash = text(&mut stage.admin, "SELECT token_sha256 FROM writeguard.request WHERE token_sha256 IS NOT NULL");
    let shown = rows[0].get::<_, String>(2);
    assert!(!shown.contains(&token) && !shown.contains(&hash), "{shown}");
    let refusal = expect_refusal(client.batch_execute("TABLE writeguard.request"));
    assert_eq!(refusal.sqlstate, "42501");
}

#[test]
fn request_and_decision_are_events() {
    let mut stage = Stage::new("token");
    let (id, _) = stage.approved(WRITE);
    let other = request(&mut stage.requester(), "DELETE FROM t");
    reject(&mut stage.approver(), other).unwrap();
    let rows = stage
        .admin
        .query(
            "SELECT kind, login, approval, rows, statement FROM writeguard.event
             WHERE kind IN ('requested', 'approved', 'rejected') ORDER BY id",
            &[],
        )
        .unwrap();
    let found: Vec<(String, String, i64, i64, String)> =
        rows.iter().map(|row| (row.get(0), row.get(1), row.get(2), row.get(3), row.get(4))).collect();
    let event = |kind: &str, login: &String, id: i64, statement: &str| {
        (kind.to_owned(), login.clone(), id, 5, statement.to_owned())
    };
    assert_eq!(
        found,
        [
            event("requested", &stage.requester, id, WRITE),
            event("approved", &stage.approver, id, WRITE),
            event("requested", &stage.requester, other, "DELETE FROM t"),
            event("rejected", &stage.approver, other, "DELETE FROM t"),
        ]
    );
}

// ---- What a token is bound to ----

#[test]
fn token_of_somebody_elses_request_is_refused() {
    let mut stage = Stage::new("token");
    let other = stage.db.role("other");
    let (id, token) = stage.approved(WRITE);
    let mut client = stage.db.connect(&other);
    arm(&mut client, &token);
    let refusal = refused(&mut client, WRITE, "WG006");
    assert!(refusal.message.contains("another login"), "{refusal:?}");
    assert_eq!(stage.state(id), "approved");
    assert_eq!(stage.changed(), 0);
}

#[test]
fn set_session_authorization_does_not_make_the_token_ones_own() {
    let stage = Stage::new("token");
    let (_, token) = stage.approved(WRITE);
    let mut client = stage.db.admin();
    pass(&mut client, &format!("SET SESSION AUTHORIZATION {}", stage.requester));
    arm(&mut client, &token);
    refused(&mut client, WRITE, "WG006");
}

#[test]
fn token_requested_as_the_login_is_refused_after_set_role() {
    let mut stage = Stage::new("token");
    let group = stage.db.role("team");
    let role = stage.requester.clone();
    stage.admin.batch_execute(&format!("GRANT {group} TO {role}")).unwrap();
    let (_, token) = stage.approved(WRITE);
    let mut client = stage.requester();
    pass(&mut client, &format!("SET ROLE {group}"));
    arm(&mut client, &token);
    let refusal = refused(&mut client, WRITE, "WG006");
    assert!(refusal.message.contains("another role"), "{refusal:?}");
    assert!(refusal.hint.contains("RESET ROLE"), "{refusal:?}");
    pass(&mut client, "RESET ROLE");
    arm(&mut client, &token);
    pass(&mut client, WRITE);
}

#[test]
fn token_requested_after_set_role_needs_that_role() {
    let mut stage = Stage::new("token");
    let group = stage.db.role("team");
    let role = stage.requester.clone();
    stage.admin.batch_execute(&format!("GRANT {group} TO {role}")).unwrap();
    let mut client = stage.requester();
    pass(&mut client, &format!("SET ROLE {group}"));
    let id = request(&mut client, WRITE);
    let token = approve(&mut stage.approver(), id);
    pass(&mut client, "RESET ROLE");
    arm(&mut client, &token);
    let refusal = refused(&mut client, WRITE, "WG006");
    assert_eq!(refusal.hint, format!("SET ROLE {group};"));
    pass(&mut client, &refusal.hint);
    arm(&mut client, &token);
    pass(&mut client, WRITE);
    assert_eq!(stage.state(id), "spent");
}

#[test]
fn token_opens_no_other_statement() {
    let mut stage = Stage::new("token");
    let (id, token) = stage.approved(WRITE);
    let mut client = stage.requester();
    for other in [
        "UPDATE t SET a = 8",
        "UPDATE t SET a = 9 WHERE true",
        "update t set a = 9",
        "UPDATE  t SET a = 9",
        "DELETE FROM t",
        "DO 'BEGIN UPDATE t SET a = 9; END'",
        "WITH x AS (UPDATE t SET a = 9) SELECT",
    ] {
        arm(&mut client, &token);
        let refusal = refused(&mut client, other, "WG006");
        assert!(refusal.message.contains("another statement"), "{refusal:?}");
    }
    assert_eq!(stage.state(id), "approved");
    assert_eq!(stage.changed(), 0);
}

#[test]
fn a_function_of_the_reviewed_text_inside_another_statement_is_another_statement() {
    let mut stage = Stage::new("token");
    stage.admin.batch_execute("CREATE FUNCTION f() RETURNS void LANGUAGE sql AS 'UPDATE t SET a = 9'").unwrap();
    let (_, mut client) = stage.armed(WRITE);
    refused(&mut client, "SELECT f()", "WG006");
}

#[test]
fn blanks_and_the_final_semicolon_do_not_matter() {
    let mut stage = Stage::new("token");
    for (requested, sent) in [
        (WRITE.to_owned(), format!("\n\t {WRITE}  ;\n")),
        (format!(" {WRITE};\n"), WRITE.to_owned()),
        (format!("{WRITE} ; "), format!("{WRITE};")),
    ] {
        let (_, mut client) = stage.armed(&requested);
        pass(&mut client, &sent);
        assert_eq!(stage.changed(), 5);
        stage.undo();
    }
}

#[test]
fn a_comment_after_the_semicolon_is_matched_by_itself() {
    let stage = Stage::new("token");
    let statement = format!("{WRITE}; -- all of them");
    let (_, mut client) = stage.armed(&statement);
    pass(&mut client, &statement);
}

#[test]
fn a_statement_of_many_lines_is_matched() {
    let mut stage = Stage::new("token");
    let statement = "UPDATE t -- all\n   SET a = 9 /* ; */\n WHERE 'a;b' <> ';';\n";
    let (_, mut client) = stage.armed(statement);
    pass(&mut client, statement);
    assert_eq!(stage.changed(), 5);
}

#[test]
fn a_statement_is_matched_alone_in_a_string_of_several() {
    let mut stage = Stage::new("token");
    let (id, token) = stage.approved(WRITE);
    let mut client = stage.requester();
    pass(&mut client, &format!("BEGIN; {ARM_FLAG}; SET writeguard.token = '{token}';\n {WRITE} ;\n SELECT 1; COMMIT;"));
    assert_eq!(stage.changed(), 5);
    assert_eq!(stage.overridden(), [(5, Some(id))]);
}

#[test]
fn statement_is_matched_in_the_extended_protocol_too() {
    let mut stage = Stage::new("token");
    let (_, mut client) = stage.armed(WRITE);
    assert_eq!(client.execute(WRITE, &[]).unwrap(), 5);
    assert_eq!(stage.changed(), 5);
}

const PARAMETERIZED: &str = "UPDATE t SET a = $1 WHERE id <= $2";

#[test]
fn bound_parameters_belong_to_the_statement() {
    let mut stage = Stage::new("token");
    let mut client = stage.requester();
    let id = request_with(&mut client, PARAMETERIZED, &[Some("9"), Some("4")]);
    let token = approve(&mut stage.approver(), id);
    let prepared = client.prepare(PARAMETERIZED).unwrap();
    for other in [[9, 5], [8, 4]] {
        arm(&mut client, &token);
        let refusal = expect_refusal(client.execute(&prepared, &[&other[0], &other[1]]));
        assert_eq!(refusal.sqlstate, "WG006", "{refusal:?}");
    }
    arm(&mut client, &token);
    assert_eq!(client.execute(&prepared, &[&9, &4]).unwrap(), 4);
    assert_eq!(stage.changed(), 4);
    assert_eq!(stage.overridden(), [(4, Some(id))]);
}

#[test]
fn a_null_parameter_is_not_an_empty_one() {
    let mut stage = Stage::new("token");
    stage.admin.batch_execute("ALTER TABLE t ADD note text DEFAULT 'x'").unwrap();
    let statement = "UPDATE t SET note = $1";
    let mut client = stage.requester();
    let id = request_with(&mut client, statement, &[None]);
    let token = approve(&mut stage.approver(), id);
    arm(&mut client, &token);
    let refusal = expect_refusal(client.execute(statement, &[&""]));
    assert_eq!(refusal.sqlstate, "WG006", "{refusal:?}");
    arm(&mut client, &token);
    assert_eq!(client.execute(statement, &[&None::<&str>]).unwrap(), 5);
}

#[test]
fn parameters_are_compared_as_their_types_print_them() {
    let mut stage = Stage::new("token");
    stage
        .admin
        .batch_execute("ALTER TABLE t ADD b bool, ADD f float8, ADD w text, ADD list text[], ADD big bigint")
        .unwrap();
    let statement = "UPDATE t SET b = $1, f = $2, w = $3, list = $4, big = $5";
    let mut client = stage.requester();
    let values = [
        Some("t"),
        Some("1.5"),
        Some("Grüße, 'it''s' {\"x\"}\n"),
        Some("{a,\"b c\",NULL}"),
        Some("-9223372036854775808"),
    ];
    let id = request_with(&mut client, statement, &values);
    let token = approve(&mut stage.approver(), id);
    arm(&mut client, &token);
    let list = vec![Some("a"), Some("b c"), None];
    let rows = client
        .execute(statement, &[&true, &1.5f64, &"Grüße, 'it''s' {\"x\"}\n", &list, &i64::MIN])
        .unwrap_or_else(|error| panic!("{:?}", Refusal::of(&error)));
    assert_eq!(rows, 5);
}

#[test]
fn a_request_needs_as_many_parameters_as_the_statement_takes() {
    let stage = Stage::new("token");
    let mut client = stage.requester();
    for parameters in [&[][..], &[Some("9")], &[Some("9"), Some("5"), Some("1")]] {
        let refusal = expect_refusal(
            client
                .query_one("SELECT writeguard.request($1::text, 'tests', $2::text[])", &[&PARAMETERIZED, &parameters]),
        );
        assert_eq!(refusal.sqlstate, "WG007", "{refusal:?}");
        assert!(refusal.message.contains('2'), "{refusal:?}");
    }
}

#[test]
fn a_parameter_of_the_wrong_type_fails_as_that_type_says() {
    let stage = Stage::new("token");
    let refusal = expect_refusal(
        stage.requester().query_one("SELECT writeguard.request($1::text, 'tests', '{nine,5}')", &[&PARAMETERIZED]),
    );
    assert_eq!(refusal.sqlstate, "22P02", "{refusal:?}");
}

#[test]
fn sql_level_prepare_is_known_by_its_execute() {
    let mut stage = Stage::new("token");
    let mut client = stage.requester();
    pass(&mut client, "PREPARE p(int) AS UPDATE t SET a = $1");
    refused(&mut client, "EXECUTE p(9) ;", "WG001");
    let blocked = text(&mut client, "SELECT statement FROM writeguard.my_events WHERE kind = 'blocked'");
    assert_eq!(blocked, "EXECUTE p(9)");

    let id = request(&mut client, "UPDATE t SET a = 9");
    let token = approve(&mut stage.approver(), id);
    arm(&mut client, &token);
    refused(&mut client, "EXECUTE p(9)", "WG006");

    // Bound to what is sent, as statement_hash() tells it to an outside signer.
    stage
        .admin
        .batch_execute("UPDATE writeguard.request SET statement_sha256 = writeguard.statement_hash('EXECUTE p(9)')")
        .unwrap();
    arm(&mut client, &token);
    refused(&mut client, "EXECUTE p(8)", "WG006");
    arm(&mut client, &token);
    pass(&mut client, "EXECUTE p(9)");
    assert_eq!(stage.changed(), 5);
}

#[test]
fn token_expires() {
    let mut stage = Stage::new("token");
    let mut client = stage.requester();
    let id = request(&mut client, WRITE);
    let token: String =
        stage.approver().query_one("SELECT writeguard.approve($1, valid_for => '1 second')", &[&id]).unwrap().get(0);
    thread::sleep(Duration::from_millis(1_100));
    arm(&mut client, &token);
    let refusal = refused(&mut client, WRITE, "WG006");
    assert!(refusal.message.contains("expired"), "{refusal:?}");
    assert_eq!(stage.changed(), 0);
    let state = text(&mut client, "SELECT state FROM writeguard.my_requests");
    assert_eq!(state, "expired");
}

#[test]
fn token_that_expires_during_its_transaction_was_used_in_time() {
    let stage = Stage::new("token");
    let mut client = stage.requester();
    let id = request(&mut client, WRITE);
    let token: String =
        stage.approver().query_one("SELECT writeguard.approve($1, valid_for => '2 seconds')", &[&id]).unwrap().get(0);
    pass(&mut client, "BEGIN");
    arm(&mut client, &token);
    pass(&mut client, WRITE);
    thread::sleep(Duration::from_millis(2_100));
    pass(&mut client, "COMMIT");
}

#[test]
fn token_lives_as_long_as_the_setting_says() {
    let mut stage = Stage::new("token");
    stage.approved(WRITE);
    let seconds = text(
        &mut stage.admin,
        "SELECT round(extract(epoch FROM expires_at - decided_at))::text FROM writeguard.request",
    );
    assert_eq!(seconds, "900");
}

#[test]
fn lifetime_and_maximum_of_an_approval_must_make_sense() {
    let mut stage = Stage::new("token");
    let id = request(&mut stage.requester(), WRITE);
    let mut approver = stage.approver();
    for argument in ["valid_for => '0'", "valid_for => '-1 hour'", "max_rows => -1"] {
        let refusal = refused(&mut approver, &format!("SELECT writeguard.approve({id}, {argument})"), "WG007");
        assert!(!refusal.hint.is_empty(), "{refusal:?}");
    }
    assert_eq!(stage.state(id), "pending");
}

#[test]
fn more_rows_than_reviewed_are_refused() {
    let mut stage = Stage::new("token");
    let (id, mut client) = stage.armed(WRITE);
    stage.admin.batch_execute("INSERT INTO t VALUES (6)").unwrap();
    let refusal = refused(&mut client, WRITE, "WG006");
    assert!(refusal.detail.contains("5 rows"), "{refusal:?}");
    assert_eq!((refusal.schema.as_str(), refusal.table.as_str()), ("public", "t"));
    assert_eq!(stage.changed(), 0);
    assert_eq!(stage.state(id), "approved");
    assert_eq!(stage.events("token_refused"), 1);
    assert_eq!(stage.overridden(), []);
}

#[test]
fn fewer_rows_than_reviewed_pass_where_no_key_tells_them_apart() {
    let mut stage = Stage::new("token");
    let (_, mut client) = stage.armed(WRITE);
    stage.admin.batch_execute("DELETE FROM t WHERE id = 5").unwrap();
    refused(&mut client, WRITE, "WG006");
    assert_eq!((stage.changed(), stage.overridden()), (0, vec![]));
    let mut stage = Stage::new("token");
    stage.admin.batch_execute("ALTER TABLE t DROP CONSTRAINT t_pkey").unwrap();
    let (id, mut client) = stage.armed(WRITE);
    stage.admin.batch_execute("DELETE FROM t WHERE id = 5").unwrap();
    pass(&mut client, WRITE);
    assert_eq!(stage.overridden(), [(4, Some(id))]);
}

#[test]
fn rows_of_a_table_that_was_not_reviewed_are_refused() {
    let mut stage = Stage::new("token");
    stage
        .admin
        .batch_execute(
            "CREATE TABLE log (n int);
             INSERT INTO log VALUES (0);
             GRANT ALL ON log TO PUBLIC;
             CREATE TABLE switch ();
             GRANT SELECT ON switch TO PUBLIC;
             CREATE FUNCTION count_up() RETURNS trigger LANGUAGE plpgsql
             AS 'BEGIN IF EXISTS (SELECT FROM switch) THEN UPDATE log SET n = n + 1; END IF; RETURN NULL; END';
             CREATE TRIGGER count_up AFTER UPDATE ON t FOR EACH STATEMENT EXECUTE FUNCTION count_up();
             SELECT writeguard.set_policy('log', tables => '{public.log}', max_rows => 100)",
        )
        .unwrap();
    let (_, mut client) = stage.armed(WRITE);
    stage.admin.batch_execute("INSERT INTO switch DEFAULT VALUES").unwrap();
    let refusal = refused(&mut client, WRITE, "WG006");
    assert!(format!("{refusal:?}").contains("public.log"), "{refusal:?}");
    assert_eq!(stage.changed(), 0);
}

#[test]
fn reviewed_rows_hold_for_each_table() {
    let mut stage = Stage::new("token");
    stage
        .admin
        .batch_execute(
            "CREATE TABLE u AS SELECT * FROM t;
             GRANT ALL ON u TO PUBLIC;
             SELECT writeguard.set_policy('p', tables => '{public.t,public.u}', max_rows => 3)",
        )
        .unwrap();
    let both = "WITH x AS (UPDATE u SET a = 9) UPDATE t SET a = 9 WHERE id <= 3";
    let id = request(&mut stage.requester(), both);
    let row =
        stage.admin.query_one("SELECT rows, relations::text FROM writeguard.request WHERE id = $1", &[&id]).unwrap();
    assert_eq!(row.get::<_, i64>(0), 8);
    assert_eq!(row.get::<_, &str>(1), r#"{"public.t": 3, "public.u": 5}"#);
    let token = approve(&mut stage.approver(), id);
    // One row more here, one row less there: the total stays.
    stage.admin.batch_execute("INSERT INTO u VALUES (6); DELETE FROM t WHERE id = 1").unwrap();
    let mut client = stage.requester();
    arm(&mut client, &token);
    refused(&mut client, both, "WG006");
    stage.admin.batch_execute("DELETE FROM u WHERE id = 6; INSERT INTO t VALUES (1)").unwrap();
    arm(&mut client, &token);
    pass(&mut client, both);
}

#[test]
fn approver_may_allow_fewer_rows_than_reviewed() {
    let mut stage = Stage::new("token");
    let mut client = stage.requester();
    let id = request(&mut client, WRITE);
    let token: String =
        stage.approver().query_one("SELECT writeguard.approve($1, max_rows => 4)", &[&id]).unwrap().get(0);
    arm(&mut client, &token);
    refused(&mut client, WRITE, "WG006");
    assert_eq!(stage.changed(), 0);
    stage.admin.batch_execute("DELETE FROM t WHERE id = 5").unwrap();
    arm(&mut client, &token);
    pass(&mut client, WRITE);
    assert_eq!(stage.overridden(), [(4, Some(id))]);
}

#[test]
fn approver_may_allow_more_rows_than_reviewed() {
    let mut stage = Stage::new("token");
    let mut client = stage.requester();
    let id = request(&mut client, WRITE);
    let token: String =
        stage.approver().query_one("SELECT writeguard.approve($1, max_rows => 7)", &[&id]).unwrap().get(0);
    stage.admin.batch_execute("INSERT INTO t VALUES (6), (7), (8)").unwrap();
    arm(&mut client, &token);
    refused(&mut client, WRITE, "WG006");
    stage.admin.batch_execute("DELETE FROM t WHERE id = 8").unwrap();
    arm(&mut client, &token);
    pass(&mut client, WRITE);
    assert_eq!(stage.overridden(), [(7, Some(id))]);
}

#[test]
fn token_opens_a_truncate_of_the_reviewed_rows() {
    let mut stage = Stage::new("token");
    let (id, mut client) = stage.armed("TRUNCATE t");
    assert_eq!(number(&mut stage.admin, "SELECT count(*) FROM t"), 5);
    pass(&mut client, "TRUNCATE t");
    assert_eq!(number(&mut stage.admin, "SELECT count(*) FROM t"), 0);
    assert_eq!(stage.overridden(), [(5, Some(id))]);
}

#[test]
fn token_does_not_open_a_truncate_of_more_rows() {
    let mut stage = Stage::new("token");
    let (_, mut client) = stage.armed("TRUNCATE t");
    stage.admin.batch_execute("INSERT INTO t VALUES (6)").unwrap();
    refused(&mut client, "TRUNCATE t", "WG006");
    assert_eq!(number(&mut stage.admin, "SELECT count(*) FROM t"), 6);
}

#[test]
fn one_token_lifts_all_policies_that_the_statement_passes() {
    let mut stage = Stage::new("token");
    stage.admin.batch_execute("SELECT writeguard.set_policy('q', tables => '{public.t}', max_rows => 4)").unwrap();
    let (id, mut client) = stage.armed(WRITE);
    pass(&mut client, WRITE);
    let policies = text(
        &mut stage.admin,
        "SELECT string_agg(policy, ',' ORDER BY policy) FROM writeguard.event WHERE kind = 'overridden'",
    );
    assert_eq!(policies, "p,q");
    assert_eq!(stage.overridden(), [(5, Some(id)), (5, Some(id))]);
}

#[test]
fn unknown_token_is_refused() {
    let mut stage = Stage::new("token");
    let mut client = stage.requester();
    for token in ["abc", "0", "********", "'' OR true --", &"f".repeat(10_000)] {
        pass(&mut client, ARM_FLAG);
        client.execute("SELECT set_config('writeguard.token', $1, false)", &[&token]).unwrap();
        let refusal = refused(&mut client, WRITE, "WG006");
        assert!(token == "0" || !format!("{refusal:?}").contains(token), "{refusal:?}");
    }
    assert_eq!(stage.changed(), 0);
    assert_eq!(stage.events("token_refused"), 5);
}

#[test]
fn the_stored_hash_is_no_token() {
    let mut stage = Stage::new("token");
    let (_, token) = stage.approved(WRITE);
    let hash = text(&mut stage.admin, "SELECT token_sha256 FROM writeguard.request");
    assert_ne!(hash, token);
    let mut client = stage.requester();
    arm(&mut client, &hash);
    refused(&mut client, WRITE, "WG006");
}

#[test]
fn token_of_another_database_is_refused() {
    let stage = Stage::new("token");
    let elsewhere = Stage::new("token");
    let (_, token) = stage.approved(WRITE);
    let mut client = elsewhere.db.connect(&stage.requester);
    arm(&mut client, &token);
    refused(&mut client, WRITE, "WG006");
}

#[test]
fn token_does_not_open_a_copy_of_its_database() {
    let stage = Stage::new("token");
    let (_, token) = stage.approved(WRITE);
    let Stage { db, admin, requester, .. } = stage;
    drop(admin);
    let copy = format!("{}_copy", db.name);
    let mut postgres = Server::shared().postgres();
    // Whoever was just connected to it may take a moment to leave.
    wait_until(20, || postgres.batch_execute(&format!("CREATE DATABASE {copy} TEMPLATE {}", db.name)).is_ok());
    let mut client = db.config(&requester).dbname(&copy).connect(postgres::NoTls).unwrap();
    arm(&mut client, &token);
    refused(&mut client, WRITE, "WG006");
}

// ---- Decisions ----

#[test]
fn a_decision_cannot_be_changed() {
    let mut stage = Stage::new("token");
    let approved = request(&mut stage.requester(), WRITE);
    let rejected = request(&mut stage.requester(), WRITE);
    let mut approver = stage.approver();
    approve(&mut approver, approved);
    reject(&mut approver, rejected).unwrap();
    for (id, state) in [(approved, "approved"), (rejected, "rejected")] {
        let refusal = expect_refusal(try_approve(&mut approver, id));
        assert_eq!(refusal.sqlstate, "WG006", "{refusal:?}");
        assert!(refusal.message.contains(state), "{refusal:?}");
        let refusal = expect_refusal(reject(&mut approver, id));
        assert_eq!(refusal.sqlstate, "WG006", "{refusal:?}");
        assert_eq!(stage.state(id), state);
    }
}

#[test]
fn a_spent_request_cannot_be_approved_again() {
    let mut stage = Stage::new("token");
    let (id, mut client) = stage.armed(WRITE);
    pass(&mut client, WRITE);
    let refusal = expect_refusal(try_approve(&mut stage.approver(), id));
    assert_eq!(refusal.sqlstate, "WG006", "{refusal:?}");
    assert_eq!(stage.state(id), "spent");
}

#[test]
fn an_unknown_request_cannot_be_decided() {
    let stage = Stage::new("token");
    let mut approver = stage.approver();
    for refusal in [expect_refusal(try_approve(&mut approver, 424_242)), expect_refusal(reject(&mut approver, 424_242))]
    {
        assert_eq!(refusal.sqlstate, "WG007", "{refusal:?}");
        assert!(refusal.message.contains("424242"), "{refusal:?}");
    }
    for sql in ["SELECT writeguard.approve(NULL)", "SELECT writeguard.reject(NULL)"] {
        refused(&mut approver, sql, "WG007");
    }
}

#[test]
fn an_approval_that_is_rolled_back_never_was() {
    let mut stage = Stage::new("token");
    let id = request(&mut stage.requester(), WRITE);
    let mut approver = stage.approver();
    pass(&mut approver, "BEGIN");
    let token = approve(&mut approver, id);
    pass(&mut approver, "ROLLBACK");
    assert_eq!(stage.state(id), "pending");
    let mut client = stage.requester();
    arm(&mut client, &token);
    refused(&mut client, WRITE, "WG006");
}

#[test]
fn two_people_deciding_at_once_do_not_both_get_a_token() {
    let mut stage = Stage::new("token");
    let second = stage.db.role("second_approver");
    stage.admin.batch_execute(&format!("GRANT EXECUTE ON FUNCTION writeguard.approve TO {second}")).unwrap();
    let id = request(&mut stage.requester(), WRITE);
    let mut approver = stage.approver();
    pass(&mut approver, "BEGIN");
    approve(&mut approver, id);
    let mut other = stage.db.connect(&second);
    let other_pid = pid(&mut other);
    let waiting = thread::spawn(move || try_approve(&mut other, id));
    wait_for_lock_of(&mut stage.admin, other_pid);
    pass(&mut approver, "COMMIT");
    let refusal = expect_refusal(waiting.join().unwrap());
    assert_eq!(refusal.sqlstate, "WG006", "{refusal:?}");
}

// ---- One use: rollbacks, savepoints, two sessions, prepared transactions ----

#[test]
fn a_rolled_back_use_leaves_the_token_unused() {
    let mut stage = Stage::new("token");
    let (id, token) = stage.approved(WRITE);
    let mut client = stage.requester();
    pass(&mut client, "BEGIN");
    arm(&mut client, &token);
    pass(&mut client, WRITE);
    pass(&mut client, "ROLLBACK");
    assert_eq!(stage.state(id), "approved");
    assert_eq!(stage.overridden(), []);
    arm(&mut client, &token);
    pass(&mut client, WRITE);
    assert_eq!(stage.overridden(), [(5, Some(id))]);
}

#[test]
fn a_use_that_failed_leaves_the_token_unused() {
    let mut stage = Stage::new("token");
    let (id, mut client) = stage.armed(WRITE);
    stage.admin.batch_execute("ALTER TABLE t ADD CONSTRAINT small CHECK (id < 5 OR a < 9) NOT VALID").unwrap();
    let refusal = refused(&mut client, WRITE, "23514");
    assert_eq!(refusal.constraint, "small");
    assert_eq!(stage.state(id), "approved");
}

#[test]
fn a_use_rolled_back_to_a_savepoint_leaves_the_token_unused() {
    let mut stage = Stage::new("token");
    let (id, token) = stage.approved(WRITE);
    let mut client = stage.requester();
    pass(&mut client, "BEGIN");
    arm(&mut client, &token);
    pass(&mut client, "SAVEPOINT s");
    pass(&mut client, WRITE);
    pass(&mut client, "ROLLBACK TO s");
    pass(&mut client, WRITE);
    pass(&mut client, "COMMIT");
    assert_eq!(stage.changed(), 5);
    assert_eq!(stage.overridden(), [(5, Some(id))]);
}

#[test]
fn a_use_rolled_back_to_a_savepoint_and_not_repeated_is_none() {
    let mut stage = Stage::new("token");
    let (id, token) = stage.approved(WRITE);
    let mut client = stage.requester();
    pass(&mut client, "BEGIN");
    arm(&mut client, &token);
    pass(&mut client, "SAVEPOINT s");
    pass(&mut client, WRITE);
    pass(&mut client, "ROLLBACK TO s; COMMIT");
    assert_eq!(stage.state(id), "approved");
    assert_eq!(stage.overridden(), []);
    arm(&mut client, &token);
    pass(&mut client, WRITE);
}

/// `f` changes all rows inside an exception block that fails, runs `between`, and changes all rows again.
fn create_function_with_exception_block(stage: &mut Stage, between: &str) {
    stage
        .admin
        .batch_execute(&format!(
            "CREATE FUNCTION f() RETURNS void LANGUAGE plpgsql AS $$
             BEGIN
                 BEGIN
                     UPDATE t SET a = 8;
                     RAISE 'back';
                 EXCEPTION WHEN raise_exception THEN NULL; END;
                 {between}
                 UPDATE t SET a = 9;
             END $$"
        ))
        .unwrap();
}

#[test]
fn a_use_rolled_back_by_an_exception_block_is_repeated_after_it() {
    let mut stage = Stage::new("token");
    create_function_with_exception_block(&mut stage, "");
    let (id, mut client) = stage.armed("SELECT f()");
    pass(&mut client, "SELECT f()");
    assert_eq!(stage.changed(), 5);
    assert_eq!(stage.state(id), "spent");
    assert_eq!(stage.overridden(), [(5, Some(id))]);
}

#[test]
fn a_use_rolled_back_by_an_exception_block_leaves_nothing_lifted() {
    let mut stage = Stage::new("token");
    create_function_with_exception_block(&mut stage, "SET LOCAL writeguard.override = off;");
    let (id, mut client) = stage.armed("SELECT f()");
    refused(&mut client, "SELECT f()", "WG001");
    assert_eq!(stage.changed(), 0);
    assert_eq!(stage.state(id), "approved");
    assert_eq!(stage.overridden(), []);
}

#[test]
fn a_token_taken_back_by_an_exception_block_leaves_nothing_lifted() {
    let mut stage = Stage::new("token");
    create_function_with_exception_block(&mut stage, "SET LOCAL writeguard.token = '';");
    let (id, mut client) = stage.armed("SELECT f()");
    refused(&mut client, "SELECT f()", "WG001");
    assert_eq!(stage.state(id), "approved");
}

#[test]
fn an_exception_block_that_swallows_the_refusal_gets_no_row_through() {
    let mut stage = Stage::new("token");
    pass(&mut stage.requester(), "DO $$ BEGIN UPDATE t SET a = 9; EXCEPTION WHEN OTHERS THEN NULL; END $$");
    assert_eq!(stage.changed(), 0);
    assert_eq!(stage.events("blocked"), 1);
}

/// A table of two halves, and a statement that changes the half that the session chose.
const HALF: &str = "UPDATE half SET a = 9 WHERE side = current_setting('tests.side')";

/// Two armed sessions with the same token for [`HALF`], which do not touch each other's rows.
fn two_sessions_with_one_token(stage: &mut Stage) -> (i64, Client, Client) {
    stage
        .admin
        .batch_execute(
            "CREATE TABLE half AS SELECT side, 0 AS a FROM unnest('{left,right}'::text[]) AS side,
                                                          generate_series(1, 5);
             GRANT ALL ON half TO PUBLIC;
             SELECT writeguard.set_policy('half', tables => '{public.half}', max_rows => 3)",
        )
        .unwrap();
    let mut left = stage.requester();
    let mut right = stage.requester();
    pass(&mut left, "SET tests.side = 'left'");
    pass(&mut right, "SET tests.side = 'right'");
    let id = request(&mut left, HALF);
    let token = approve(&mut stage.approver(), id);
    arm(&mut left, &token);
    arm(&mut right, &token);
    (id, left, right)
}

#[test]
fn the_second_session_waits_and_finds_the_token_spent() {
    let mut stage = Stage::new("token");
    let (id, mut left, mut right) = two_sessions_with_one_token(&mut stage);
    let right_pid = pid(&mut right);
    pass(&mut left, "BEGIN");
    pass(&mut left, HALF);
    let waiting = thread::spawn(move || right.batch_execute(HALF));
    wait_for_lock_of(&mut stage.admin, right_pid);
    pass(&mut left, "COMMIT");
    let refusal = expect_refusal(waiting.join().unwrap());
    assert_eq!(refusal.sqlstate, "WG006", "{refusal:?}");
    assert_eq!(text(&mut stage.admin, "SELECT string_agg(DISTINCT side, ',') FROM half WHERE a = 9"), "left");
    assert_eq!(stage.overridden(), [(5, Some(id))]);
}

#[test]
fn the_second_session_passes_when_the_first_rolls_back() {
    let mut stage = Stage::new("token");
    let (id, mut left, mut right) = two_sessions_with_one_token(&mut stage);
    let right_pid = pid(&mut right);
    pass(&mut left, "BEGIN");
    pass(&mut left, HALF);
    let waiting = thread::spawn(move || right.batch_execute(HALF));
    wait_for_lock_of(&mut stage.admin, right_pid);
    pass(&mut left, "ROLLBACK");
    waiting.join().unwrap().unwrap_or_else(|error| panic!("{:?}", Refusal::of(&error)));
    assert_eq!(text(&mut stage.admin, "SELECT string_agg(DISTINCT side, ',') FROM half WHERE a = 9"), "right");
    assert_eq!(stage.overridden(), [(5, Some(id))]);
}

#[test]
fn an_older_snapshot_does_not_make_a_spent_token_good_again() {
    let mut stage = Stage::new("token");
    for level in ["REPEATABLE READ", "SERIALIZABLE"] {
        stage
            .admin
            .batch_execute("DROP TABLE IF EXISTS half; SELECT writeguard.set_policy('half', roles => '{postgres}')")
            .unwrap();
        let (_, mut left, mut right) = two_sessions_with_one_token(&mut stage);
        pass(&mut right, &format!("BEGIN ISOLATION LEVEL {level}"));
        number(&mut right, "SELECT count(*) FROM half");
        pass(&mut left, HALF);
        let refusal = expect_refusal(right.batch_execute(HALF));
        assert!(["WG006", "40001"].contains(&refusal.sqlstate.as_str()), "{refusal:?}");
    }
}

#[test]
fn token_works_at_every_isolation_level() {
    let mut stage = Stage::new("token");
    for level in ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"] {
        let (_, mut client) = stage.armed(WRITE);
        pass(&mut client, &format!("BEGIN ISOLATION LEVEL {level}"));
        pass(&mut client, WRITE);
        pass(&mut client, "COMMIT");
        assert_eq!(stage.changed(), 5);
        stage.undo();
    }
}

#[test]
fn a_prepared_transaction_takes_its_token_along() {
    let mut stage = Stage::new("token");
    let (id, token) = stage.approved(WRITE);
    let gid = stage.db.name.clone();
    let mut client = stage.requester();
    pass(&mut client, "BEGIN");
    arm(&mut client, &token);
    pass(&mut client, WRITE);
    pass(&mut client, &format!("PREPARE TRANSACTION '{gid}'"));
    assert_eq!(stage.overridden(), []);
    // Not spent yet, but not free either.
    arm(&mut client, &token);
    pass(&mut client, "SET lock_timeout = '200ms'");
    refused(&mut client, WRITE, "55P03");
    pass(&mut client, "RESET lock_timeout");
    pass(&mut client, &format!("COMMIT PREPARED '{gid}'"));
    assert_eq!(stage.changed(), 5);
    assert_eq!(stage.state(id), "spent");
    assert_eq!(stage.overridden(), [(5, Some(id))]);
    arm(&mut client, &token);
    refused(&mut client, WRITE, "WG006");
}

#[test]
fn a_prepared_transaction_that_is_rolled_back_gives_its_token_back() {
    let mut stage = Stage::new("token");
    let (id, token) = stage.approved(WRITE);
    let gid = stage.db.name.clone();
    let mut client = stage.requester();
    pass(&mut client, "BEGIN");
    arm(&mut client, &token);
    pass(&mut client, WRITE);
    pass(&mut client, &format!("PREPARE TRANSACTION '{gid}'"));
    pass(&mut client, &format!("ROLLBACK PREPARED '{gid}'"));
    assert_eq!(stage.changed(), 0);
    assert_eq!(stage.state(id), "approved");
    assert_eq!(stage.overridden(), []);
    arm(&mut client, &token);
    pass(&mut client, WRITE);
    assert_eq!(stage.overridden(), [(5, Some(id))]);
}

#[test]
fn preparing_a_transaction_ends_what_was_armed() {
    let mut stage = Stage::new("flag");
    stage.admin.batch_execute("INSERT INTO t SELECT generate_series(6, 10)").unwrap();
    let gid = stage.db.name.clone();
    let mut client = stage.requester();
    pass(&mut client, ARM_FLAG);
    pass(&mut client, "BEGIN; UPDATE t SET a = 9 WHERE id <= 4");
    pass(&mut client, &format!("PREPARE TRANSACTION '{gid}'"));
    refused(&mut client, "UPDATE t SET a = 9 WHERE id > 5", "WG001");
    pass(&mut client, &format!("ROLLBACK PREPARED '{gid}'"));
}

#[test]
fn a_refused_token_is_an_event_that_survives_the_rollback() {
    let mut stage = Stage::new("token");
    let mut client = stage.requester();
    pass(&mut client, "BEGIN");
    arm(&mut client, "no-such-token");
    refused(&mut client, WRITE, "WG006");
    let row = stage
        .admin
        .query_one("SELECT login, relation, statement, reason FROM writeguard.event WHERE kind = 'token_refused'", &[])
        .unwrap();
    assert_eq!(row.get::<_, String>(0), stage.requester);
    assert_eq!(row.get::<_, &str>(1), "public.t");
    assert_eq!(row.get::<_, &str>(2), WRITE);
    assert!(!row.get::<_, &str>(3).contains("no-such-token"));
    pass(&mut client, "ROLLBACK");
    assert_eq!(stage.events("token_refused"), 1);
}

// ---- Requests and their rehearsal ----

#[test]
fn rehearsal_changes_nothing_and_counts_exactly() {
    let mut stage = Stage::new("token");
    let id = request(&mut stage.requester(), WRITE);
    assert_eq!(stage.changed(), 0);
    let row = stage
        .admin
        .query_one(
            "SELECT rows, relations::text, statement_sha256 = writeguard.statement_hash(statement),
                    token_sha256 IS NULL
             FROM writeguard.request WHERE id = $1",
            &[&id],
        )
        .unwrap();
    assert_eq!(row.get::<_, i64>(0), 5);
    assert_eq!(row.get::<_, &str>(1), r#"{"public.t": 5}"#);
    assert!(row.get::<_, bool>(2));
    assert!(row.get::<_, bool>(3));
    assert_eq!(stage.events("blocked"), 0);
}

#[test]
fn rehearsal_counts_cascades_and_triggers() {
    let mut stage = Stage::new("token");
    stage
        .admin
        .batch_execute(
            "CREATE TABLE child (id int REFERENCES t ON DELETE CASCADE);
             INSERT INTO child SELECT id FROM t, generate_series(1, 2);
             SELECT writeguard.set_policy('p', tables => '{public.t,public.child}', max_rows => 3)",
        )
        .unwrap();
    request(&mut stage.requester(), "DELETE FROM t WHERE id <= 4");
    let relations = text(&mut stage.admin, "SELECT relations::text FROM writeguard.request");
    assert_eq!(relations, r#"{"public.t": 4, "public.child": 8}"#);
    assert_eq!(number(&mut stage.admin, "SELECT count(*) FROM child"), 10);
}

#[test]
fn rehearsal_leaves_no_lock() {
    let mut stage = Stage::new("token");
    let mut client = stage.requester();
    let client_pid = pid(&mut client);
    for statement in [WRITE, "DELETE FROM t"] {
        pass(&mut client, "BEGIN");
        request(&mut client, statement);
        // Still inside the requester's transaction: others can write and read the rows at once.
        pass(
            &mut stage.admin,
            "BEGIN; SET LOCAL lock_timeout = '2s'; SET LOCAL writeguard.enabled = off;
             UPDATE t SET a = 1; LOCK TABLE t IN ACCESS EXCLUSIVE MODE; ROLLBACK",
        );
        pass(&mut client, "COMMIT");
        let locks = stage.admin.query_one("SELECT count(*) FROM pg_locks WHERE pid = $1", &[&client_pid]).unwrap();
        assert_eq!(locks.get::<_, i64>(0), 0, "{statement}");
    }
}

#[test]
fn rehearsal_of_a_truncate_counts_and_leaves_no_lock() {
    let mut stage = Stage::new("token");
    stage
        .admin
        .batch_execute(
            "CREATE SEQUENCE runs;
             CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER
             AS $$ BEGIN PERFORM nextval('runs'); RETURN NULL; END $$;
             CREATE TRIGGER note BEFORE TRUNCATE ON t FOR EACH STATEMENT EXECUTE FUNCTION note()",
        )
        .unwrap();
    let mut client = stage.requester();
    pass(&mut client, "BEGIN");
    let id = request(&mut client, "TRUNCATE t");
    pass(&mut stage.admin, "BEGIN; SET LOCAL lock_timeout = '2s'; LOCK TABLE t IN ACCESS EXCLUSIVE MODE; ROLLBACK");
    pass(&mut client, "COMMIT");
    let rows = stage.admin.query_one("SELECT rows FROM writeguard.request WHERE id = $1", &[&id]).unwrap();
    assert_eq!(rows.get::<_, i64>(0), 5);
    // Counted, not run: what a trigger does outside of transactions was not done.
    assert!(!stage.admin.query_one("SELECT is_called FROM runs", &[]).unwrap().get::<_, bool>(0));
}

#[test]
fn rehearsal_lifts_nothing_afterwards() {
    let mut stage = Stage::new("token");
    let mut client = stage.requester();
    pass(&mut client, "BEGIN");
    request(&mut client, WRITE);
    refused(&mut client, WRITE, "WG001");
    pass(&mut client, "ROLLBACK");
    refused(
        &mut client,
        &format!("DO $$ BEGIN PERFORM writeguard.request('{WRITE}', 'tests'); {WRITE}; END $$"),
        "WG006",
    );
    assert_eq!(stage.changed(), 0);
}

#[test]
fn a_failed_rehearsal_lifts_nothing_afterwards() {
    let mut stage = Stage::new("token");
    let mut client = stage.requester();
    pass(&mut client, "SET statement_timeout = '300ms'");
    for (statement, sqlstate) in [
        ("UPDATE t SET a = 1 / (5 - id)", "22012"),
        ("UPDATE t SET a = 1 WHERE pg_sleep(5) IS NOT NULL", "57014"),
        ("UPDATE nowhere SET a = 1", "42P01"),
    ] {
        pass(&mut client, "BEGIN; SAVEPOINT s");
        let refusal = expect_refusal(try_request(&mut client, statement));
        assert_eq!(refusal.sqlstate, sqlstate, "{refusal:?}");
        pass(&mut client, "ROLLBACK TO s");
        refused(&mut client, WRITE, "WG001");
        pass(&mut client, "ROLLBACK");
        refused(&mut client, WRITE, "WG001");
    }
    assert_eq!(stage.changed(), 0);
    assert_eq!(number(&mut stage.admin, "SELECT count(*) FROM writeguard.request"), 0);
}

#[test]
fn rehearsed_rows_are_charged_to_no_budget() {
    let mut stage = Stage::new("token");
    stage
        .admin
        .batch_execute(
            "SELECT writeguard.set_policy('p', tables => '{public.t}', max_rows => 3,
                                          max_rows_per_transaction => 3)",
        )
        .unwrap();
    let mut client = stage.requester();
    pass(&mut client, "BEGIN");
    request(&mut client, WRITE);
    pass(&mut client, "UPDATE t SET a = 9 WHERE id <= 3; COMMIT");
    assert_eq!(stage.changed(), 3);
}

#[test]
fn errors_of_the_rehearsed_statement_come_out_untouched() {
    let mut stage = Stage::new("token");
    stage
        .admin
        .batch_execute(
            "ALTER TABLE t ADD CONSTRAINT small CHECK (a < 100);
             CREATE TABLE child (id int CONSTRAINT child_t REFERENCES t DEFERRABLE INITIALLY DEFERRED);
             INSERT INTO child VALUES (1);
             CREATE TABLE hidden (id int);
             CREATE FUNCTION grumble() RETURNS int LANGUAGE plpgsql AS $$
             BEGIN
                 RAISE 'grumble' USING ERRCODE = 'ZZ123', DETAIL = 'more', HINT = 'less',
                       SCHEMA = 's', TABLE = 'x', CONSTRAINT = 'c';
             END $$",
        )
        .unwrap();
    let mut client = stage.requester();
    let mut error = |statement: &str| expect_refusal(try_request(&mut client, statement));

    let check = error("UPDATE t SET a = 100");
    assert_eq!(check.sqlstate, "23514");
    assert_eq!(check.constraint, "small");
    assert_eq!((check.schema.as_str(), check.table.as_str()), ("public", "t"));

    let unique = error("UPDATE t SET id = 1");
    assert_eq!((unique.sqlstate.as_str(), unique.constraint.as_str()), ("23505", "t_pkey"));

    let foreign = error("DELETE FROM t");
    assert_eq!((foreign.sqlstate.as_str(), foreign.constraint.as_str()), ("23503", "child_t"));

    assert_eq!(error("DELETE FROM hidden").sqlstate, "42501");

    let raised = error("UPDATE t SET a = grumble()");
    assert_eq!(raised.sqlstate, "ZZ123");
    assert_eq!(raised.message, "grumble");
    assert_eq!(raised.detail, "more");
    assert_eq!(raised.hint, "less");
    assert_eq!((raised.schema.as_str(), raised.table.as_str()), ("s", "x"));
    assert_eq!(raised.constraint, "c");
    assert!(raised.context.contains("grumble()"), "{raised:?}");
}

#[test]
fn a_syntax_error_in_the_requested_statement_is_one() {
    let stage = Stage::new("token");
    let refusal = expect_refusal(try_request(&mut stage.requester(), "UPDATE t SETT a = 9"));
    assert_eq!(refusal.sqlstate, "42601", "{refusal:?}");
    assert!(refusal.message.contains("SETT") || refusal.message.contains("\"a\""), "{refusal:?}");
}

#[test]
fn rehearsal_runs_with_the_requesters_rights() {
    let mut stage = Stage::new("token");
    stage
        .admin
        .batch_execute(
            "REVOKE ALL ON t FROM PUBLIC;
             CREATE FUNCTION whoami() RETURNS int LANGUAGE plpgsql
             AS $$ BEGIN RAISE EXCEPTION '%', current_user; END $$",
        )
        .unwrap();
    let mut client = stage.requester();
    let refusal = expect_refusal(try_request(&mut client, WRITE));
    assert_eq!(refusal.sqlstate, "42501");
    let refusal = expect_refusal(try_request(&mut client, "SELECT whoami()"));
    assert_eq!(refusal.message, stage.requester);
}

#[test]
fn rehearsal_resolves_names_as_the_requester_does() {
    let mut stage = Stage::new("token");
    stage
        .admin
        .batch_execute(
            "CREATE SCHEMA other; GRANT USAGE ON SCHEMA other TO PUBLIC;
             CREATE TABLE other.t AS SELECT id, 0 AS a FROM generate_series(1, 4) AS id;
             GRANT ALL ON other.t TO PUBLIC;
             SELECT writeguard.set_policy('other', tables => '{other.t}', max_rows => 1)",
        )
        .unwrap();
    let mut client = stage.requester();
    pass(&mut client, "SET search_path = other, public");
    request(&mut client, WRITE);
    let relations = text(&mut stage.admin, "SELECT relations::text FROM writeguard.request");
    assert_eq!(relations, r#"{"other.t": 4}"#);
}

#[test]
fn request_for_what_needs_no_approval_is_refused() {
    let mut stage = Stage::new("token");
    stage
        .admin
        .batch_execute("CREATE TABLE free (id int); INSERT INTO free VALUES (1); GRANT ALL ON free TO PUBLIC")
        .unwrap();
    let mut client = stage.requester();
    for statement in [
        "UPDATE t SET a = 9 WHERE false",
        "UPDATE free SET id = 2",
        "INSERT INTO t VALUES (6)",
        "SELECT 1",
        "TRUNCATE free",
    ] {
        let refusal = expect_refusal(try_request(&mut client, statement));
        assert_eq!(refusal.sqlstate, "WG007", "{statement}: {refusal:?}");
        assert!(!refusal.hint.is_empty(), "{refusal:?}");
    }
    assert_eq!(number(&mut stage.admin, "SELECT count(*) FROM t"), 5);
}

#[test]
fn request_is_for_one_statement() {
    let stage = Stage::new("token");
    let mut client = stage.requester();
    for statement in ["UPDATE t SET a = 1; UPDATE t SET a = 2", "SELECT 1; DELETE FROM t", "", " ; ", "-- nothing"] {
        let refusal = expect_refusal(try_request(&mut client, statement));
        assert_eq!(refusal.sqlstate, "WG007", "{statement}: {refusal:?}");
        assert!(refusal.hint.contains("writeguard.request"), "{refusal:?}");
    }
}

#[test]
fn request_is_for_writes_only() {
    let mut stage = Stage::new("token");
    let mut client = stage.requester();
    for statement in [
        "DROP TABLE t",
        "ALTER TABLE t DROP COLUMN a",
        "CREATE TABLE n (i int)",
        "DO 'BEGIN UPDATE t SET a = 9; END'",
        "CALL something()",
        "BEGIN",
        "COMMIT",
        "SET writeguard.override = on",
        "EXPLAIN ANALYZE UPDATE t SET a = 9",
        "COPY t TO STDOUT",
        "VACUUM t",
    ] {
        let refusal = expect_refusal(try_request(&mut client, statement));
        assert_eq!(refusal.sqlstate, "WG007", "{statement}: {refusal:?}");
    }
    assert_eq!(stage.changed(), 0);
    assert_eq!(number(&mut stage.admin, "SELECT count(*) FROM writeguard.request"), 0);
}

#[test]
fn every_kind_of_write_can_be_requested() {
    let mut stage = Stage::new("token");
    stage.admin.batch_execute("CREATE FUNCTION f() RETURNS void LANGUAGE sql AS 'UPDATE t SET a = 9'").unwrap();
    let mut client = stage.requester();
    for statement in [
        "UPDATE t SET a = 9 RETURNING id",
        "DELETE FROM t",
        "MERGE INTO t USING (VALUES (1)) AS v ON true WHEN MATCHED THEN UPDATE SET a = 9",
        "INSERT INTO t SELECT generate_series(1, 5) ON CONFLICT (id) DO UPDATE SET a = 9",
        "WITH x AS (UPDATE t SET a = 9 RETURNING *) SELECT count(*) FROM x",
        "SELECT f()",
    ] {
        let id = request(&mut client, statement);
        let token = approve(&mut stage.approver(), id);
        pass(&mut client, "BEGIN");
        arm(&mut client, &token);
        pass(&mut client, statement);
        pass(&mut client, "ROLLBACK");
    }
}

#[test]
fn request_needs_a_reason() {
    let stage = Stage::new("token");
    let mut client = stage.requester();
    for reason in ["NULL", "''", "'  '"] {
        let sql = format!("SELECT writeguard.request('{WRITE}'::text, reason => {reason})");
        refused(&mut client, &sql, "WG007");
    }
    refused(&mut client, "SELECT writeguard.request(NULL::text, reason => 'tests')", "WG007");
}

/// The number of the requester's one refused write.
fn blocked_event(client: &mut Client) -> i64 {
    wait_until(20, || number(client, "SELECT count(*) FROM writeguard.my_events WHERE kind = 'blocked'") == 1);
    number(client, "SELECT id FROM writeguard.my_events WHERE kind = 'blocked'")
}

#[test]
fn request_by_event_takes_the_refused_statement() {
    let mut stage = Stage::new("token");
    let mut client = stage.requester();
    refused(&mut client, &format!("SELECT 1; {WRITE} ;"), "WG001");
    let event = blocked_event(&mut client);
    let id: i64 =
        client.query_one("SELECT writeguard.request(event => $1, reason => 'tests')", &[&event]).unwrap().get(0);
    let token = approve(&mut stage.approver(), id);
    arm(&mut client, &token);
    pass(&mut client, WRITE);
    assert_eq!(stage.overridden(), [(5, Some(id))]);
}

#[test]
fn request_by_event_is_for_ones_own_refusals() {
    let mut stage = Stage::new("token");
    let mut client = stage.requester();
    refused(&mut client, WRITE, "WG001");
    let event = blocked_event(&mut client);
    let mut others = [stage.approver(), stage.db.admin()];
    for other in &mut others {
        let refusal =
            refused(other, &format!("SELECT writeguard.request(event => {event}, reason => 'tests')"), "WG007");
        assert!(refusal.message.contains(&event.to_string()) && !refusal.message.contains("UPDATE"), "{refusal:?}");
    }
    let missing = refused(&mut client, "SELECT writeguard.request(event => 424242, reason => 'tests')", "WG007");
    assert!(missing.message.contains("424242"), "{missing:?}");
    refused(&mut client, "SELECT writeguard.request(event => NULL, reason => 'tests')", "WG007");
    // An event of another kind is no refusal.
    request(&mut client, WRITE);
    let requested = number(&mut stage.admin, "SELECT id FROM writeguard.event WHERE kind = 'requested'");
    refused(&mut client, &format!("SELECT writeguard.request(event => {requested}, reason => 'tests')"), "WG007");
}

// ---- What is written down ----

#[test]
fn token_is_in_no_table_and_in_no_log_line_of_the_extension() {
    let mut stage = Stage::new("token");
    let (_, token) = stage.approved(WRITE);
    let mut client = stage.requester();
    arm(&mut client, &token);
    refused(&mut client, "DELETE FROM t", "WG006");
    refused(&mut client, &format!("{ARM_FLAG}; SET writeguard.token = '{token}'; DELETE FROM t"), "WG006");
    arm(&mut client, &token);
    pass(&mut client, WRITE);
    arm(&mut client, &token);
    refused(&mut client, WRITE, "WG006");
    for table in ["event", "request", "policy", "outbox"] {
        let rows = stage
            .admin
            .query_one(
                &format!("SELECT count(*) FROM writeguard.{table} AS r WHERE r::text LIKE $1"),
                &[&format!("%{token}%")],
            )
            .unwrap();
        assert_eq!(rows.get::<_, i64>(0), 0, "{table}");
    }
    assert_only_statement_lines_have(&token);
}

#[track_caller]
fn assert_only_statement_lines_have(token: &str) {
    let log = Server::shared().log();
    for line in log.lines().filter(|line| line.contains(token)) {
        assert!(line.contains("STATEMENT:  ") || line.contains("LOG:  statement: "), "the token is in the log: {line}");
    }
}

#[test]
fn token_inside_the_statement_itself_is_in_no_event() {
    let mut stage = Stage::new("token");
    let (_, token) = stage.approved(WRITE);
    refused(
        &mut stage.requester(),
        &format!(
            "DO $$ BEGIN
                 PERFORM set_config('writeguard.override', 'on', true);
                 PERFORM set_config('writeguard.token', '{token}', true);
                 UPDATE t SET a = 9;
             END $$"
        ),
        "WG006",
    );
    let rows = stage
        .admin
        .query_one("SELECT count(*) FROM writeguard.event AS e WHERE e::text LIKE $1", &[&format!("%{token}%")])
        .unwrap();
    assert_eq!(rows.get::<_, i64>(0), 0);
}

#[test]
fn only_the_hash_of_the_token_is_stored() {
    let mut stage = Stage::new("token");
    let (_, token) = stage.approved(WRITE);
    let matches: bool = stage
        .admin
        .query_one(
            "SELECT token_sha256 = encode(sha256(convert_to($1, 'UTF8')), 'hex') FROM writeguard.request",
            &[&token],
        )
        .unwrap()
        .get(0);
    assert!(matches);
}

#[test]
fn tokens_are_not_alike() {
    let stage = Stage::new("token");
    let tokens: Vec<String> = (0..3).map(|_| stage.approved(WRITE).1).collect();
    for (index, token) in tokens.iter().enumerate() {
        assert!(token.len() >= 32, "{token}");
        assert!(!tokens[index + 1..].contains(token));
    }
}

#[test]
fn statement_hash_is_what_sha256sum_says() {
    let stage = Stage::new("token");
    let mut client = stage.requester();
    // printf 'UPDATE t SET a = 9' | sha256sum
    let known = "32e768c7f304375eb5fc72a4498da14e7c5825b214be1663ba1c33248c14db1d";
    for sql in [
        "SELECT writeguard.statement_hash('UPDATE t SET a = 9')",
        "SELECT writeguard.statement_hash(E'\\n UPDATE t SET a = 9 ; \\n')",
        "SELECT writeguard.statement_hash('UPDATE t SET a = 9;', '{}')",
    ] {
        assert_eq!(text(&mut client, sql), known, "{sql}");
    }
    // printf "UPDATE t SET name = 'Müller' WHERE id = 1" | sha256sum
    assert_eq!(
        text(&mut client, "SELECT writeguard.statement_hash('UPDATE t SET name = ''Müller'' WHERE id = 1')"),
        "b1fc8ff183d59c3233dd66a70912624ff5438e33e675e7a7e16d4a9e8d5d2fbf"
    );
}

#[test]
fn statement_hash_tells_parameters_apart() {
    let stage = Stage::new("token");
    let mut client = stage.requester();
    let mut hashes: Vec<String> = ["{}", "{NULL}", "{\"\"}", "{n}", "{a,b}", "{ab}", "{b,a}"]
        .iter()
        .map(|parameters| text(&mut client, &format!("SELECT writeguard.statement_hash('s', '{parameters}')")))
        .collect();
    hashes.sort();
    hashes.dedup();
    assert_eq!(hashes.len(), 7);
    refused(&mut client, "SELECT writeguard.statement_hash(NULL)", "WG007");
}

#[test]
fn login_is_who_authenticated() {
    let stage = Stage::new("token");
    let mut client = stage.db.admin();
    pass(&mut client, &format!("SET SESSION AUTHORIZATION {}", stage.requester));
    assert_eq!(text(&mut client, "SELECT writeguard.login()"), "postgres");
}

//! What is written elsewhere and applied here is never limited and never counted: a session says so by setting up a
//! replication origin, as pglogical's workers do, and takes it back by resetting it.

use crate::common::session::pass;
use crate::common::{Database, Server, expect_refusal};
use postgres::Client;

const SET_UP: &str = "SELECT pg_replication_origin_session_setup(current_database())";
const RESET: &str = "SELECT pg_replication_origin_session_reset()";

/// Everything that a policy may refuse, on tables that a policy lets three rows of be changed: six in each.
const WRITES: [&str; 11] = [
    "UPDATE t SET v = v + 1",
    "WITH w AS (UPDATE t SET v = v + 1 RETURNING id) SELECT count(*) FROM w",
    "DELETE FROM t",
    "TRUNCATE t, u",
    "INSERT INTO t SELECT i, 0 FROM generate_series(1, 6) AS i ON CONFLICT (id) DO UPDATE SET v = 1",
    "MERGE INTO t USING (SELECT generate_series(1, 6) AS id) AS s ON s.id = t.id WHEN MATCHED THEN DELETE",
    "DROP TABLE t",
    "ALTER TABLE t DROP COLUMN v",
    "ALTER TABLE t ALTER v TYPE text USING ''",
    "ALTER TABLE t RENAME TO elsewhere",
    "DO $$ BEGIN FOR i IN 1..6 LOOP UPDATE t SET v = v + 1 WHERE id = i; END LOOP; END $$",
];

/// Two tables that nobody but an apply may do all of this to, and a third that is only looked on.
fn guarded() -> (Database, Client) {
    let db = Server::shared().database();
    let mut client = db.admin();
    pass(
        &mut client,
        "SELECT pg_replication_origin_create(current_database());
         CREATE TABLE t AS SELECT i AS id, 0 AS v FROM generate_series(1, 6) AS i; ALTER TABLE t ADD PRIMARY KEY (id);
         CREATE TABLE u AS TABLE t; CREATE TABLE looked_on AS TABLE t;
         ALTER TABLE u ADD PRIMARY KEY (id);
         SELECT writeguard.set_policy('p', tables => '{public.t, public.u}', max_rows => 3, undo => '1 day',
             operations => '{update,delete,truncate,drop}');
         SELECT writeguard.set_policy('q', tables => '{public.looked_on}', max_rows => 0, mode => 'warn',
             require_where => true)",
    );
    (db, client)
}

#[track_caller]
fn is_refused(client: &mut Client, sql: &str) {
    let sqlstate = expect_refusal(client.batch_execute(sql)).sqlstate;
    assert!(matches!(sqlstate.as_str(), "WG001" | "WG005"), "{sql}: {sqlstate}");
}

fn number(client: &mut Client, sql: &str) -> i64 {
    client.query_one(sql, &[]).unwrap().get(0)
}

/// What the library has recorded: of writes in its events, its statistics and its kept rows.
fn records(client: &mut Client) -> i64 {
    number(
        client,
        "SELECT (SELECT count(*) FROM writeguard.event WHERE kind <> 'policy_changed')
              + (SELECT count(*) FROM writeguard.change)
              + (SELECT coalesce(sum(statements), 0) FROM writeguard.stat)::bigint",
    )
}

#[test]
fn what_is_applied_is_neither_limited_nor_counted() {
    let (_db, mut client) = guarded();
    pass(&mut client, "UPDATE t SET v = 0 WHERE id = 1");
    let before = records(&mut client);
    for write in WRITES {
        pass(&mut client, &format!("BEGIN; {SET_UP}; {write}; UPDATE looked_on SET v = 1; {RESET}; COMMIT"));
        // As it was, by the same way.
        pass(
            &mut client,
            &format!(
                "{SET_UP}; DROP TABLE IF EXISTS t, elsewhere; CREATE TABLE t (id int PRIMARY KEY, v int); TRUNCATE u;
                 INSERT INTO t SELECT i, 0 FROM generate_series(1, 6) AS i; INSERT INTO u TABLE t; {RESET}"
            ),
        );
        assert_eq!(number(&mut client, "SELECT count(*) FROM t WHERE v = 0"), 6, "{write}");
        assert_eq!(records(&mut client), before, "{write}");
    }
}

#[test]
fn without_an_origin_the_same_is_refused() {
    let (_db, mut client) = guarded();
    pass(&mut client, &format!("{SET_UP}; UPDATE t SET v = v + 1; {RESET}"));
    for write in WRITES {
        is_refused(&mut client, write);
    }
    assert_eq!(number(&mut client, "SELECT count(*) FROM t WHERE v = 1"), 6);
}

#[test]
fn an_origin_may_come_and_go_in_the_middle_of_anything() {
    let (_db, mut client) = guarded();
    let all = client.prepare("UPDATE t SET v = v + 1").unwrap();
    for _ in 0..3 {
        assert_eq!(expect_refusal(client.execute(&all, &[])).sqlstate, "WG001");
        pass(&mut client, SET_UP);
        assert_eq!(client.execute(&all, &[]).unwrap(), 6);
        pass(&mut client, RESET);
    }
    // The rows of one statement and transaction, counted before and after.
    pass(&mut client, "SELECT writeguard.set_policy('p', tables => '{public.t}', max_rows_per_transaction => 3)");
    pass(&mut client, &format!("BEGIN; UPDATE t SET v = 0 WHERE id <= 2; {SET_UP}; UPDATE t SET v = 0; {RESET}"));
    pass(&mut client, "UPDATE t SET v = 0 WHERE id = 3; SAVEPOINT s");
    is_refused(&mut client, "UPDATE t SET v = 0 WHERE id = 4");
    pass(&mut client, "ROLLBACK TO s");
    // What a rollback takes back is not the session's origin.
    pass(&mut client, &format!("{SET_UP}; ROLLBACK"));
    pass(&mut client, &format!("UPDATE t SET v = 0; {RESET}"));
    is_refused(&mut client, "UPDATE t SET v = 0");
}

/// What somebody is granted who is no superuser is told by check_setup.
#[test]
fn who_may_say_so_is_told() {
    let (db, mut client) = guarded();
    let applier = db.role("applier");
    let told = |client: &mut Client| {
        number(
            client,
            &format!(
                "SELECT count(*) FROM writeguard.check_setup() WHERE subject = 'role {applier}' AND severity = 'warning'
                 AND problem LIKE '%replication origin%'"
            ),
        )
    };
    assert_eq!(told(&mut client), 0);
    pass(
        &mut client,
        &format!(
            "GRANT ALL ON t TO {applier};
             GRANT EXECUTE ON FUNCTION pg_replication_origin_session_setup, pg_replication_origin_session_reset TO {applier}"
        ),
    );
    assert_eq!(told(&mut client), 1);
    let mut session = db.connect(&applier);
    is_refused(&mut session, "UPDATE t SET v = v + 1");
    pass(&mut session, &format!("{SET_UP}; UPDATE t SET v = v + 1; {RESET}"));
    let fix = "SELECT fix FROM writeguard.check_setup() WHERE problem LIKE '%replication origin%'";
    let fix: String = client.query_one(fix, &[]).unwrap().get(0);
    pass(&mut client, &fix);
    assert_eq!(told(&mut client), 0);
    assert_eq!(expect_refusal(session.batch_execute(SET_UP)).sqlstate, "42501");
}

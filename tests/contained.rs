//! Something goes wrong where nothing may be raised: at a commit, in an abort, in the callbacks of subtransactions, memory
//! contexts and caches. The server stays up, other sessions go on, and a transaction whose rows may be miscounted does
//! not commit; the next one is as ever.
//!
//! Only a library with debug assertions fails where it is asked to, so these run as a part of `scripts/test-assert`.

use crate::common::{Database, Refusal, Server, wait_until};
use postgres::Client;

/// What stands in the way of these tests on any other library.
macro_rules! on_a_checked_library {
    ($($name:ident => $body:expr;)*) => {
        $(#[test]
        #[ignore = "needs a library with debug assertions: scripts/test-assert tests -- contained"]
        fn $name() {
            $body
        })*
    };
}

on_a_checked_library! {
    a_subtransaction_that_is_rolled_back => faults("rolling a subtransaction's counts back", &ROLLED_BACK, true);
    a_subtransaction_that_is_kept => faults("keeping a subtransaction's counts", &KEPT, true);
    a_query_that_goes => faults("letting a query go", &WRITES, true);
    a_transaction_that_ends => faults("forgetting a transaction", &WRITES, false);
    a_transaction_that_is_rolled_back => faults("forgetting what a command had noted", &FAILS, false);
    a_statement_that_died => faults("recording what a statement that died went past", &FAILS, false);
    a_commit_that_is_told => faults("recording what a commit did", &COMMITS, false);
    a_worker_that_is_to_be_woken => faults("waking the worker", &COMMITS, false);
    a_change_of_the_catalogs => faults("taking a change of the catalogs in", &CHANGES, false);
    an_interval_that_is_printed => fails_to_print_an_interval();
}

const SETUP: &str = "
    CREATE TABLE t (id int PRIMARY KEY, v int NOT NULL DEFAULT 0);
    INSERT INTO t SELECT i, 0 FROM generate_series(1, 10) AS i;
    CREATE TABLE r (LIKE t INCLUDING ALL);
    INSERT INTO r TABLE t;
    CREATE TABLE watched (LIKE t INCLUDING ALL);
    INSERT INTO watched TABLE t;
    CREATE TABLE free (LIKE t INCLUDING ALL);
    INSERT INTO free TABLE t;
    CREATE FUNCTION tries() RETURNS int LANGUAGE plpgsql AS $$
    BEGIN
        UPDATE t SET v = v + 1 WHERE id = 9;
        RAISE EXCEPTION 'back';
    EXCEPTION WHEN raise_exception THEN RETURN 1;
    END $$;
    CREATE FUNCTION keeps() RETURNS int LANGUAGE plpgsql AS $$
    BEGIN
        UPDATE t SET v = v + 1 WHERE id = 9;
        RETURN 1;
    EXCEPTION WHEN raise_exception THEN RETURN 1;
    END $$;
    SELECT writeguard.set_policy('p', tables => '{public.t}', max_rows => 3, max_rows_per_transaction => 7,
        rate_rows => 100000, override => 'flag', undo => '1 day');
    SELECT writeguard.set_policy('r', tables => '{public.r}', max_rows => 3, operations => '{update}');
    SELECT writeguard.set_policy('w', tables => '{public.watched}', max_rows => 3, mode => 'observe');";

const ROLLED_BACK: [&str; 4] = [
    "SELECT tries()",
    "BEGIN; UPDATE t SET v = v + 1 WHERE id <= 3; SAVEPOINT s; UPDATE t SET v = v + 1 WHERE id <= 2; ROLLBACK TO s; COMMIT",
    "BEGIN; SET LOCAL writeguard.override = on; SAVEPOINT s; UPDATE t SET v = v + 1; ROLLBACK TO s; COMMIT",
    "BEGIN; UPDATE t SET v = 1 WHERE id = 1; SAVEPOINT s; ALTER TABLE r RENAME TO r2; ROLLBACK TO s; COMMIT",
];
const KEPT: [&str; 4] = [
    "SELECT keeps()",
    "BEGIN; SAVEPOINT s; UPDATE t SET v = v + 1 WHERE id <= 3; RELEASE s; COMMIT",
    "BEGIN; SET LOCAL writeguard.override = on; SAVEPOINT s; UPDATE t SET v = v + 1; RELEASE s; COMMIT",
    "BEGIN; SAVEPOINT a; SAVEPOINT b; UPDATE t SET v = 1 WHERE id = 1; RELEASE b; ROLLBACK TO a; UPDATE t SET v = v WHERE id < 3; COMMIT",
];
const WRITES: [&str; 4] = [
    "UPDATE t SET v = v + 1 WHERE id <= 3",
    "BEGIN; UPDATE t SET v = v + 1 WHERE id <= 3; DELETE FROM t WHERE id = 1; COMMIT",
    "BEGIN; SET LOCAL writeguard.override = on; UPDATE t SET v = v + 1; COMMIT",
    "UPDATE t SET v = v + keeps() WHERE id <= 2",
];
const FAILS: [&str; 3] = [
    "UPDATE t SET v = v + 1",
    "UPDATE watched SET v = 1 / (id - 10)",
    "BEGIN; ALTER TABLE r RENAME TO r2; UPDATE t SET v = v + 1; COMMIT",
];
const COMMITS: [&str; 3] = [
    "BEGIN; ALTER TABLE r RENAME TO r2; ALTER TABLE r2 RENAME TO r; COMMIT",
    "SELECT writeguard.set_policy('q', tables => '{public.r}', max_rows => 5); SELECT writeguard.drop_policy('q')",
    "BEGIN; SET LOCAL writeguard.override = on; UPDATE t SET v = v + 1; COMMIT",
];
const CHANGES: [&str; 4] = [
    "UPDATE t SET v = v + 1 WHERE id <= 3",
    "CREATE TABLE made (id int); DROP TABLE made",
    "ALTER TABLE t ADD extra int; UPDATE t SET v = v WHERE id = 1; ALTER TABLE t DROP extra",
    "CREATE ROLE fault_role; DROP ROLE fault_role; CREATE SCHEMA made; ALTER SCHEMA made RENAME TO again; DROP SCHEMA again",
];

fn pass(client: &mut Client, sql: &str) {
    client.batch_execute(sql).unwrap_or_else(|error| panic!("{sql}: {:?}", Refusal::of(&error)));
}

fn text(client: &mut Client, sql: &str) -> String {
    client.query_one(sql, &[]).unwrap_or_else(|error| panic!("{sql}: {error:?}")).get(0)
}

fn contents(db: &Database) -> String {
    text(&mut db.admin(), "SELECT string_agg(id || ':' || v, ',' ORDER BY id) FROM t")
}

/// Each statement with that fault, as a panic and as an ERROR. `loses`: a transaction that wrote something covered and came
/// upon the fault does not commit.
fn faults(what: &str, statements: &[&str], loses: bool) {
    let server = Server::start(&["writeguard.event_timeout = '5s'"]);
    let db = server.database();
    let mut admin = db.admin();
    pass(&mut admin, SETUP);
    let started = "SELECT pg_postmaster_start_time()::text";
    let begun = text(&mut admin, started);
    let mut failed = 0;
    for kind in ["", "!"] {
        for sql in statements {
            for warm in [true, false] {
                let mut client = db.admin();
                if warm {
                    let _ = client.batch_execute(sql);
                    let _ = client.batch_execute("ROLLBACK");
                }
                let told = format!("{what} failed");
                let lines = server.log().matches(&told).count();
                let before = contents(&db);
                client
                    .execute("SELECT set_config('fault.at', $1, false)", &[&format!("{what}{kind}")])
                    .expect("set_config");
                let result = client.batch_execute(sql);
                let _ = client.batch_execute("ROLLBACK");
                pass(&mut client, "RESET fault.at");
                let came_upon_it = server.log().matches(&told).count() > lines;
                failed += usize::from(came_upon_it);
                if let Err(error) = &result {
                    let refusal = Refusal::of(error);
                    assert!(refusal.sqlstate.starts_with("WG") || refusal.sqlstate == "22012", "{sql}: {refusal:?}");
                }
                if loses && came_upon_it {
                    let refusal = Refusal::of(&result.expect_err(sql));
                    assert_eq!(refusal.sqlstate, "WG008", "{sql}: {refusal:?}");
                    assert!(refusal.message.contains("lost count"), "{refusal:?}");
                    assert_eq!(contents(&db), before, "{sql}");
                }
                assert_eq!(text(&mut admin, started), begun, "{what}: {sql}: the server was started again");
                // Both sessions' limits are what they were.
                for client in [&mut client, &mut admin] {
                    let refused = client.batch_execute("UPDATE t SET v = -1").expect_err("no limit any more");
                    assert_eq!(Refusal::of(&refused).sqlstate, "WG001", "{sql}");
                    pass(client, "BEGIN; UPDATE t SET v = v WHERE id <= 3; SELECT tries(); ROLLBACK");
                    pass(client, "BEGIN; SAVEPOINT s; UPDATE t SET v = v WHERE id <= 3; RELEASE s; COMMIT");
                    pass(client, "UPDATE free SET v = v + 1");
                }
            }
        }
    }
    assert!(failed >= 2, "{what} failed {failed} times only");
    for bad in ["PANIC", "terminated by signal", "while in"] {
        assert!(!server.log().contains(bad), "{what}: {bad}");
    }
    wait_until(30, || text(&mut admin, "SELECT waiting::text FROM writeguard.event_queue") == "0");
}

/// The session's IntervalStyle is another one while we print an interval, also where that fails.
fn fails_to_print_an_interval() {
    let server = Server::start(&[]);
    let db = server.database();
    let mut client = db.admin();
    pass(&mut client, SETUP);
    pass(&mut client, "SET intervalstyle = 'iso_8601'");
    for kind in ["", "!"] {
        for sql in [
            "SELECT writeguard.set_policy('p', tables => '{public.t}', max_rows => 3, undo => '1 day')",
            "SELECT writeguard.set_policy('p', tables => '{public.t}', max_rows => 3, rate_rows => 9, rate_interval => '2 h')",
        ] {
            pass(&mut client, &format!("SET fault.at = 'printing an interval{kind}'"));
            assert!(client.batch_execute(sql).is_err(), "{sql}");
            pass(&mut client, "RESET fault.at");
            assert_eq!(text(&mut client, "SELECT (interval '1 day 2 hours')::text"), "P1DT2H", "{sql}");
            assert_eq!(text(&mut client, "SHOW intervalstyle"), "iso_8601", "{sql}");
            pass(&mut client, sql);
        }
    }
}

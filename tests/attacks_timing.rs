//! Limits hold at whatever moment a write is timed out, cancelled or terminated, and whatever others change meanwhile:
//! data and tokens are as before or as committed, events are on record once, and the next statement counts from zero.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crate::common::session::{arm, number, pass};
use crate::common::{Database, Refusal, Server, expect_refusal, wait_until};
use postgres::Client;

const ALL: &str = "UPDATE t SET v = v + 1";
const FIVE: &str = "UPDATE t SET v = v WHERE id <= 5";
const SIX: &str = "UPDATE t SET v = v WHERE id <= 6";
/// Changes rows in the order of their ids, and waits at the third one for whoever holds the lock of [`Gate`].
const GATED: &str = "UPDATE t SET v = v + 1 WHERE gate(id)";

/// A server whose refused writes wait for their event as long as it takes.
fn server() -> &'static Server {
    static SERVER: OnceLock<Server> = OnceLock::new();
    SERVER.get_or_init(|| Server::start(&["writeguard.event_timeout = '5min'"]))
}

/// A database with the table `t` of ten rows, of which a statement may change five, and its owner.
struct Stage {
    db: Database,
    admin: Client,
    owner: String,
    approver: String,
}

impl Stage {
    fn new() -> Stage {
        Stage::on(server())
    }

    fn on(server: &Server) -> Stage {
        let db = server.database();
        let (owner, approver) = (db.role("owner"), db.role("approver"));
        let mut admin = db.admin();
        pass(
            &mut admin,
            &format!(
                "GRANT CREATE ON SCHEMA public TO {owner};
                 GRANT EXECUTE ON FUNCTION writeguard.approve TO {approver};
                 SET ROLE {owner};
                 CREATE TABLE t (id int PRIMARY KEY, v int NOT NULL DEFAULT 0);
                 INSERT INTO t SELECT i, 0 FROM generate_series(1, 10) AS i;
                 GRANT ALL ON t TO PUBLIC;
                 CREATE FUNCTION gate(id int) RETURNS boolean LANGUAGE plpgsql AS $$
                 BEGIN
                   IF id = 3 THEN PERFORM pg_advisory_xact_lock_shared(7); END IF;
                   RETURN true;
                 END $$;
                 CREATE FUNCTION touch(x int) RETURNS int LANGUAGE sql
                 AS 'UPDATE t SET v = v + 1 WHERE id = x RETURNING id';
                 RESET ROLE;
                 SELECT writeguard.set_policy('p', tables => '{{public.t}}', max_rows => 5)"
            ),
        );
        Stage { db, admin, owner, approver }
    }

    fn client(&self) -> Client {
        self.db.connect(&self.owner)
    }

    #[track_caller]
    fn limit(&mut self, rows: i64) {
        self.policy(&format!("tables => '{{public.t}}', max_rows => {rows}"));
    }

    #[track_caller]
    fn policy(&mut self, arguments: &str) {
        pass(&mut self.admin, &format!("SELECT writeguard.set_policy('p', {arguments})"));
    }

    #[track_caller]
    fn number(&mut self, sql: &str) -> i64 {
        number(&mut self.admin, sql)
    }

    #[track_caller]
    fn sum(&mut self) -> i64 {
        self.number("SELECT sum(v) FROM t")
    }

    #[track_caller]
    fn events(&mut self, kind: &str) -> i64 {
        self.number(&format!("SELECT count(*) FROM writeguard.event WHERE kind = '{kind}'"))
    }

    /// The refusals that the sessions of this database told the server log.
    fn refusals(&self, server: &Server) -> i64 {
        let mark = format!("@{} LOG:  pg_writeguard: write refused", self.db.name);
        i64::try_from(server.log().matches(&mark).count()).unwrap()
    }

    /// Waits until all events are stored, and checks that each refusal is on record once.
    #[track_caller]
    fn assert_on_record(&mut self, server: &Server) -> i64 {
        self.settle();
        let blocked = self.events("blocked");
        assert_eq!(blocked, self.refusals(server));
        blocked
    }

    /// Waits until no worker is connected: nothing is left to store.
    #[track_caller]
    fn settle(&mut self) {
        let busy = "SELECT count(*) FROM pg_stat_activity
                    WHERE backend_type = 'pg_writeguard worker' AND datname = current_database()";
        wait_until(30, || self.number(busy) == 0 && self.number("SELECT waiting FROM writeguard.event_queue") == 0);
    }

    /// A session that holds a lock until it is dropped.
    #[track_caller]
    fn hold(&self, sql: &str) -> Client {
        let mut holder = self.db.admin();
        pass(&mut holder, &format!("BEGIN; {sql}"));
        holder
    }

    /// The same for the events, once nothing is left to store.
    #[track_caller]
    fn hold_events(&mut self) -> Client {
        self.settle();
        self.hold("LOCK TABLE writeguard.event IN ACCESS EXCLUSIVE MODE")
    }

    #[track_caller]
    fn waits(&mut self, pid: i32, event: &str) {
        let sql = format!("SELECT count(*) FROM pg_stat_activity WHERE pid = {pid} AND {event}");
        wait_until(30, || self.number(&sql) == 1);
    }

    #[track_caller]
    fn gone(&mut self, pid: i32) {
        let sql = format!("SELECT count(*) FROM pg_stat_activity WHERE pid = {pid}");
        wait_until(30, || self.number(&sql) == 0);
    }

    /// A request of the owner's, and its token.
    #[track_caller]
    fn approved(&mut self, statement: &str) -> (i64, String) {
        let sql = "SELECT writeguard.request($1::text, reason => 'ticket 7')";
        let request: i64 = match self.client().query_one(sql, &[&statement]) {
            Ok(row) => row.get(0),
            Err(error) => panic!("no request: {:?}", Refusal::of(&error)),
        };
        let mut approver = self.db.connect(&self.approver);
        (request, approver.query_one("SELECT writeguard.approve($1)", &[&request]).unwrap().get(0))
    }

    #[track_caller]
    fn state(&mut self, request: i64) -> String {
        let sql = "SELECT state FROM writeguard.request WHERE id = $1";
        self.admin.query_one(sql, &[&request]).unwrap().get(0)
    }

    /// What a committed write changed is taken back.
    #[track_caller]
    fn undo(&mut self) {
        pass(&mut self.admin, "SET writeguard.enabled = off; UPDATE t SET v = 0; RESET writeguard.enabled");
    }
}

#[track_caller]
fn fail(client: &mut Client, sql: &str, sqlstate: &str) -> Refusal {
    let refusal = match client.batch_execute(sql) {
        Ok(()) => panic!("expected {sqlstate}, but it passed: {sql}"),
        Err(error) => Refusal::of(&error),
    };
    assert_eq!(refusal.sqlstate, sqlstate, "{sql}: {refusal:?}");
    refusal
}

fn pid_of(client: &mut Client) -> i32 {
    client.query_one("SELECT pg_backend_pid()", &[]).unwrap().get(0)
}

/// The session counts from zero: five rows pass and six do not.
#[track_caller]
fn assert_fresh(client: &mut Client) {
    pass(client, "ROLLBACK; RESET statement_timeout; RESET lock_timeout");
    // Taken back, so that the rows stay in their order.
    pass(client, &format!("BEGIN; {FIVE}; ROLLBACK"));
    fail(client, SIX, "WG001");
    pass(client, &format!("BEGIN; {FIVE}; ROLLBACK"));
}

/// Sends a statement from a thread, because it is going to wait; gives the session back with what came of it.
fn in_background(mut client: Client, sql: &str) -> JoinHandle<(Client, Result<(), postgres::Error>)> {
    let sql = sql.to_owned();
    thread::spawn(move || {
        let result = client.batch_execute(&sql);
        (client, result)
    })
}

// Stopped at a chosen moment.

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stop {
    StatementTimeout,
    LockTimeout,
    Cancel,
    Terminate,
}

const LOCK: &str = "wait_event_type = 'Lock'";
const EVENT: &str = "wait_event_type = 'Extension'";

/// Stops a statement when it waits for that; gives its session, unless that was terminated.
#[track_caller]
fn stop(stage: &mut Stage, mut client: Client, stop: Stop, sql: &str, event: &str) -> Option<Client> {
    let pid = pid_of(&mut client);
    match stop {
        Stop::StatementTimeout => pass(&mut client, "SET statement_timeout = '400ms'"),
        Stop::LockTimeout => pass(&mut client, "SET lock_timeout = '400ms'"),
        _ => {}
    }
    let waiting = in_background(client, sql);
    match stop {
        Stop::Cancel => {
            stage.waits(pid, event);
            pass(&mut stage.admin, &format!("SELECT pg_cancel_backend({pid})"));
        }
        Stop::Terminate => {
            stage.waits(pid, event);
            pass(&mut stage.admin, &format!("SELECT pg_terminate_backend({pid})"));
        }
        _ => {}
    }
    let (mut client, result) = waiting.join().unwrap();
    if let Stop::StatementTimeout | Stop::LockTimeout = stop {
        // It is not meant for what follows, for which it may be too short on a busy machine. In a block that is to be
        // rolled back, that is up to the test.
        if let Err(error) = client.batch_execute("RESET statement_timeout; RESET lock_timeout") {
            assert_eq!(Refusal::of(&error).sqlstate, "25P02", "{sql}");
        }
    }
    match stop {
        Stop::Terminate => {
            result.unwrap_err();
            stage.gone(pid);
            None
        }
        Stop::LockTimeout => {
            let refusal = expect_refusal(result);
            assert_eq!(refusal.sqlstate, "55P03", "{sql}: {refusal:?}");
            Some(client)
        }
        _ => {
            let refusal = expect_refusal(result);
            assert_eq!(refusal.sqlstate, "57014", "{sql}: {refusal:?}");
            assert_eq!((refusal.detail.as_str(), refusal.hint.as_str()), ("", ""), "{sql}: {refusal:?}");
            Some(client)
        }
    }
}

const STOPS: [Stop; 3] = [Stop::StatementTimeout, Stop::Cancel, Stop::Terminate];
const STOPS_AT_A_LOCK: [Stop; 4] = [Stop::StatementTimeout, Stop::LockTimeout, Stop::Cancel, Stop::Terminate];

#[test]
fn stopped_before_its_limit_a_write_leaves_no_count() {
    let mut stage = Stage::new();
    for how in STOPS_AT_A_LOCK {
        for sql in
            [GATED, "SELECT touch(i) FROM generate_series(1, 10) AS i WHERE gate(i)", "DELETE FROM t WHERE gate(id)"]
        {
            let gate = stage.hold("SELECT pg_advisory_xact_lock(7)");
            let client = stage.client();
            let client = stop(&mut stage, client, how, sql, LOCK);
            drop(gate);
            if let Some(mut client) = client {
                assert_fresh(&mut client);
                fail(&mut client, sql, "WG001");
            }
            assert_eq!(stage.sum(), 0);
        }
    }
    stage.assert_on_record(server());
}

#[test]
fn stopped_in_a_savepoint_a_write_gives_its_rows_back() {
    let mut stage = Stage::new();
    stage.policy("tables => '{public.t}', max_rows => 5, max_rows_per_transaction => 6");
    for how in [Stop::StatementTimeout, Stop::LockTimeout, Stop::Cancel] {
        let gate = stage.hold("SELECT pg_advisory_xact_lock(7)");
        let mut client = stage.client();
        pass(&mut client, "BEGIN; UPDATE t SET v = 1 WHERE id = 10; SAVEPOINT a");
        let mut client = stop(&mut stage, client, how, GATED, LOCK).unwrap();
        drop(gate);
        pass(&mut client, "ROLLBACK TO a; SET LOCAL statement_timeout = 0; SET LOCAL lock_timeout = 0; SAVEPOINT a");
        pass(&mut client, FIVE);
        pass(&mut client, "SAVEPOINT b");
        fail(&mut client, "UPDATE t SET v = 1 WHERE id = 10", "WG001");
        pass(&mut client, "ROLLBACK");
        assert_eq!(stage.sum(), 0);
    }
}

#[test]
fn stopped_while_it_waits_for_its_event_a_write_is_refused_on_record_once() {
    let mut stage = Stage::new();
    stage.policy("tables => '{public.t}', max_rows => 5, max_rows_per_transaction => 6");
    let mut recorded = 0;
    for how in STOPS {
        for in_savepoint in [false, true] {
            let events = stage.hold_events();
            let mut client = stage.client();
            if in_savepoint {
                pass(&mut client, "BEGIN; UPDATE t SET v = 1 WHERE id = 10; SAVEPOINT a");
            }
            let client = stop(&mut stage, client, how, ALL, EVENT);
            drop(events);
            if let Some(mut client) = client {
                if in_savepoint {
                    pass(&mut client, "ROLLBACK TO a; SET LOCAL statement_timeout = 0");
                    pass(&mut client, FIVE);
                    fail(&mut client, "UPDATE t SET v = 1 WHERE id = 10", "WG001");
                }
                assert_fresh(&mut client);
            }
            assert_eq!(stage.sum(), 0);
            let known = stage.assert_on_record(server());
            assert!(known > recorded, "{how:?}");
            recorded = known;
        }
    }
}

/// A block that catches the end of the wait, and tries again.
#[test]
fn stopped_by_a_lock_timeout_policies_are_read_before_the_next_row_all_the_same() {
    let mut stage = Stage::new();
    let mut client = stage.client();
    pass(&mut client, "SET lock_timeout = '100ms'");
    let policies = stage.hold("LOCK TABLE writeguard.policy IN ACCESS EXCLUSIVE MODE");
    let again = "DO $$ BEGIN
                   FOR i IN 1..3 LOOP
                     BEGIN UPDATE t SET v = 1; RAISE 'written'; EXCEPTION WHEN lock_not_available THEN NULL; END;
                   END LOOP;
                 END $$";
    pass(&mut client, again);
    fail(&mut client, ALL, "55P03");
    drop(policies);
    fail(&mut client, again, "WG001");
    assert_fresh(&mut client);
    assert_eq!(stage.sum(), 0);
}

#[test]
fn stopped_while_policies_are_read_a_write_leaves_no_count_and_no_gap() {
    let mut stage = Stage::new();
    let mut limit = 5;
    for how in STOPS_AT_A_LOCK {
        for known in [false, true] {
            for sql in [ALL, "TRUNCATE t", "INSERT INTO t VALUES (1, 1) ON CONFLICT (id) DO UPDATE SET v = 1"] {
                let mut client = stage.client();
                if known {
                    pass(&mut client, FIVE);
                }
                limit = 11 - limit;
                let mut policies = stage.hold("LOCK TABLE writeguard.policy IN ACCESS EXCLUSIVE MODE");
                let change =
                    format!("SELECT writeguard.set_policy('p', tables => '{{public.t}}', max_rows => {limit})");
                pass(&mut policies, &change);
                if known {
                    // What this session knows is out of date as soon as the policies are committed.
                    pass(&mut policies, "COMMIT; BEGIN; LOCK TABLE writeguard.policy IN ACCESS EXCLUSIVE MODE");
                }
                let client = stop(&mut stage, client, how, sql, LOCK);
                pass(&mut policies, "COMMIT");
                if let Some(mut client) = client {
                    pass(&mut client, &format!("UPDATE t SET v = v WHERE id <= {limit}"));
                    fail(&mut client, &format!("UPDATE t SET v = v WHERE id <= {}", limit + 1), "WG001");
                    fail(&mut client, "TRUNCATE t", "WG005");
                }
                assert_eq!((stage.sum(), stage.number("SELECT count(*) FROM t")), (0, 10), "{how:?} {sql}");
            }
        }
    }
}

#[test]
fn stopped_while_its_token_is_spent_a_write_keeps_it_unspent() {
    let mut stage = Stage::new();
    let (request, token) = stage.approved(ALL);
    for how in STOPS_AT_A_LOCK {
        for lock in [
            format!("SELECT FROM writeguard.request WHERE id = {request} FOR UPDATE"),
            "LOCK TABLE writeguard.request IN ACCESS EXCLUSIVE MODE".to_owned(),
        ] {
            let holder = stage.hold(&lock);
            let mut client = stage.client();
            arm(&mut client, &token);
            let client = stop(&mut stage, client, how, ALL, LOCK);
            drop(holder);
            assert_eq!((stage.sum(), stage.state(request)), (0, "approved".into()), "{how:?}");
            if let Some(mut client) = client {
                // The transaction that used flag and token is over.
                fail(&mut client, ALL, "WG001");
                assert_fresh(&mut client);
            }
        }
    }
    stage.assert_on_record(server());
    assert_eq!((stage.events("overridden"), stage.events("token_refused")), (0, 0));

    // Caught by a block, the end of the wait lifts nothing; and the token is good in the same transaction.
    let holder = stage.hold(&format!("SELECT FROM writeguard.request WHERE id = {request} FOR UPDATE"));
    let mut client = stage.client();
    pass(&mut client, "SET lock_timeout = '100ms'; BEGIN");
    arm(&mut client, &token);
    pass(&mut client, "SAVEPOINT a");
    fail(&mut client, ALL, "55P03");
    pass(&mut client, "ROLLBACK TO a");
    fail(&mut client, ALL, "55P03");
    pass(&mut client, "ROLLBACK TO a");
    drop(holder);
    stage.settle();
    pass(&mut client, ALL);
    pass(&mut client, "COMMIT");
    assert_eq!((stage.sum(), stage.state(request), stage.events("overridden")), (10, "spent".into(), 1));
    fail(&mut client, ALL, "WG001");
}

#[test]
fn stopped_at_its_commit_an_overridden_write_is_undone_with_its_token() {
    let mut stage = Stage::new();
    let (request, token) = stage.approved(ALL);
    for how in [Stop::LockTimeout, Stop::Cancel, Stop::Terminate] {
        for in_block in [false, true] {
            let holder = stage.hold_events();
            let mut client = stage.client();
            arm(&mut client, &token);
            let sql = if in_block {
                pass(&mut client, "BEGIN; SET LOCAL default_transaction_read_only = off");
                pass(&mut client, ALL);
                pass(&mut client, "SET TRANSACTION READ ONLY");
                "COMMIT"
            } else {
                ALL
            };
            let client = stop(&mut stage, client, how, sql, LOCK);
            drop(holder);
            stage.settle();
            assert_eq!((stage.sum(), stage.state(request)), (0, "approved".into()), "{how:?} {in_block}");
            assert_eq!(stage.events("overridden"), 0, "{how:?} {in_block}");
            if let Some(mut client) = client {
                fail(&mut client, ALL, "WG001");
                assert_fresh(&mut client);
            }
        }
    }
    let mut client = stage.client();
    arm(&mut client, &token);
    pass(&mut client, ALL);
    assert_eq!((stage.sum(), stage.state(request), stage.events("overridden")), (10, "spent".into(), 1));
}

#[test]
fn stopped_while_a_truncate_waits_for_its_lock_nothing_is_counted() {
    let mut stage = Stage::new();
    for how in STOPS_AT_A_LOCK {
        let holder = stage.hold("LOCK TABLE t IN ACCESS SHARE MODE");
        let client = stage.client();
        let client = stop(&mut stage, client, how, "TRUNCATE t", LOCK);
        drop(holder);
        if let Some(mut client) = client {
            assert_fresh(&mut client);
            fail(&mut client, "TRUNCATE t", "WG005");
            pass(&mut client, "BEGIN; DELETE FROM t WHERE id > 5; ROLLBACK");
        }
        assert_eq!(stage.number("SELECT count(*) FROM t"), 10);
    }
}

#[test]
fn stopped_in_a_rehearsal_nothing_is_lifted_or_requested() {
    let mut stage = Stage::new();
    for how in STOPS_AT_A_LOCK {
        let gate = stage.hold("SELECT pg_advisory_xact_lock(7)");
        let client = stage.client();
        let request = format!("SELECT writeguard.request('{GATED}', reason => 'ticket 7')");
        let client = stop(&mut stage, client, how, &request, LOCK);
        drop(gate);
        if let Some(mut client) = client {
            fail(&mut client, ALL, "WG001");
            assert_fresh(&mut client);
        }
        assert_eq!((stage.sum(), stage.number("SELECT count(*) FROM writeguard.request")), (0, 0));
    }

    // In a block that goes on, too.
    let gate = stage.hold("SELECT pg_advisory_xact_lock(7)");
    let mut client = stage.client();
    pass(&mut client, "SET lock_timeout = '100ms'");
    for (rows, passes) in [(6, false), (5, true)] {
        pass(&mut client, "BEGIN; SAVEPOINT s");
        fail(&mut client, &format!("SELECT writeguard.request('{GATED}', reason => 'ticket 7')"), "55P03");
        pass(&mut client, "ROLLBACK TO s");
        let write = format!("UPDATE t SET v = 1 WHERE id <= {rows}");
        if passes {
            pass(&mut client, &format!("{write}; COMMIT"));
        } else {
            fail(&mut client, &write, "WG001");
            pass(&mut client, "ROLLBACK");
        }
    }
    drop(gate);
    assert_eq!(stage.sum(), 5);
}

#[test]
fn stopped_while_it_waits_for_room_in_the_queue_a_refusal_is_counted_as_in_the_log_only() {
    let server = Server::start(&["writeguard.event_queue_size = '64kB'", "writeguard.event_timeout = '5min'"]);
    let mut stage = Stage::on(&server);
    stage.limit(0);
    let mut counted = 0;
    for how in STOPS {
        let mut before = stage.events("blocked");
        let holder = stage.hold_events();
        // Nine of the 64 blocks for each long one and three for the last: five are left.
        let write = |row: i64, length| format!("UPDATE t SET v = 1 WHERE id = {row} /* {} */", "x".repeat(length));
        let mut waiting = Vec::new();
        for queued in 1..=7 {
            let mut client = stage.client();
            let pid = pid_of(&mut client);
            let sql = write(queued, if queued == 7 { 2_000 } else { 30_000 });
            waiting.push((pid, in_background(client, &sql)));
            stage.waits(pid, EVENT);
            before += 1;
            wait_until(20, || stage.number("SELECT waiting FROM writeguard.event_queue") == queued);
        }
        let client = stage.client();
        let client = stop(&mut stage, client, how, &write(8, 30_000), EVENT);
        counted += 1;
        drop(holder);
        for (_, refused) in waiting {
            let (_, result) = refused.join().unwrap();
            assert_eq!(expect_refusal(result).sqlstate, "WG001");
        }
        stage.settle();
        assert_eq!(stage.sum(), 0);
        let in_log_only = stage.number("SELECT in_log_only FROM writeguard.event_queue");
        assert_eq!(stage.events("blocked"), before, "{how:?}");
        assert_eq!(stage.refusals(&server), before + counted, "{how:?}");
        assert_eq!(in_log_only, counted, "{how:?}");
        if let Some(mut client) = client {
            fail(&mut client, &write(8, 10), "WG001");
        }
    }
}

// Stopped at any moment.

/// Cancels a session's statements at moments that have nothing to do with them, until it is dropped.
struct Canceller {
    stopped: &'static AtomicBool,
    thread: Option<JoinHandle<()>>,
}

impl Canceller {
    fn of(db: &Database, pid: i32, longest: u64) -> Canceller {
        let stopped: &'static AtomicBool = Box::leak(Box::new(AtomicBool::new(false)));
        let mut client = db.admin();
        let thread = thread::spawn(move || {
            let mut step = 1;
            while !stopped.load(Ordering::Relaxed) {
                step = (step * 75 + 74) % 65_537;
                thread::sleep(Duration::from_micros(step * longest * 1000 / 65_537));
                client.execute("SELECT pg_cancel_backend($1)", &[&pid]).unwrap();
            }
        });
        Canceller { stopped, thread: Some(thread) }
    }
}

impl Drop for Canceller {
    fn drop(&mut self) {
        self.stopped.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

const ROWS: i64 = 6_000;

/// The table `t` has some thousand rows, and a statement may change half of them.
fn large() -> Stage {
    let mut stage = Stage::new();
    pass(&mut stage.admin, &format!("INSERT INTO t SELECT i, 0 FROM generate_series(11, {ROWS}) AS i; ANALYZE t"));
    stage.limit(ROWS / 2);
    stage
}

const WAYS: [&str; 4] = [
    ALL,
    "DELETE FROM t",
    "TRUNCATE t",
    "WITH a AS (UPDATE t SET v = 1 WHERE id % 3 = 0 RETURNING 1), b AS (DELETE FROM t WHERE id % 3 = 1)
     SELECT count(*) FROM a",
];

#[track_caller]
fn refused_or_stopped(result: Result<(), postgres::Error>, what: &str) -> bool {
    let refusal = expect_refusal(result);
    assert!(["WG001", "WG005", "57014"].contains(&refusal.sqlstate.as_str()), "{what}: {refusal:?}");
    refusal.sqlstate == "57014"
}

#[test]
fn a_refused_write_under_any_statement_timeout_changes_nothing() {
    let mut stage = large();
    let mut client = stage.client();
    for sql in WAYS {
        for milliseconds in 1..=40 {
            pass(&mut client, &format!("SET statement_timeout = {milliseconds}"));
            refused_or_stopped(client.batch_execute(sql), sql);
            assert_eq!((stage.sum(), stage.number("SELECT count(*) FROM t")), (0, ROWS), "{sql} {milliseconds}");
        }
        pass(&mut client, "SET statement_timeout = 0");
        assert!(!refused_or_stopped(client.batch_execute(sql), sql));
        pass(&mut client, &format!("BEGIN; UPDATE t SET v = 1 WHERE id <= {}; ROLLBACK", ROWS / 2));
        pass(&mut stage.admin, "VACUUM t");
    }
    assert!(stage.assert_on_record(server()) >= 4);
}

#[test]
fn a_refused_write_that_is_cancelled_at_any_moment_changes_nothing() {
    let mut stage = large();
    let mut client = stage.client();
    let pid = pid_of(&mut client);
    let canceller = Canceller::of(&stage.db, pid, 25);
    for sql in WAYS {
        for _ in 0..40 {
            refused_or_stopped(client.batch_execute(sql), sql);
            assert_eq!((stage.sum(), stage.number("SELECT count(*) FROM t")), (0, ROWS), "{sql}");
        }
    }
    drop(canceller);
    for sql in WAYS {
        // The last cancel may still be on its way.
        if refused_or_stopped(client.batch_execute(sql), sql) {
            refused_or_stopped(client.batch_execute(sql), sql);
        }
    }
    pass(&mut client, &format!("BEGIN; UPDATE t SET v = 1 WHERE id <= {}; ROLLBACK", ROWS / 2));
    assert!(stage.assert_on_record(server()) >= 4);
}

#[test]
fn a_write_within_its_limit_that_is_stopped_at_any_moment_is_whole_or_not_at_all() {
    let mut stage = large();
    let rows = ROWS / 2;
    let write = format!("UPDATE t SET v = v + 1 WHERE id <= {rows}");
    let mut client = stage.client();
    let pid = pid_of(&mut client);
    let mut expected = 0;
    for round in 0..120 {
        if round < 40 {
            // The timeout before this one may end even that.
            while client.batch_execute(&format!("SET statement_timeout = {}", round + 1)).is_err() {}
        } else if round == 40 {
            while client.batch_execute("SET statement_timeout = 0").is_err() {}
        }
        let canceller = (round >= 40).then(|| Canceller::of(&stage.db, pid, 25));
        match client.batch_execute(&write) {
            Ok(()) => expected += rows,
            Err(error) => assert_eq!(Refusal::of(&error).sqlstate, "57014"),
        }
        drop(canceller);
        assert_eq!(stage.sum(), expected);
    }
    while client.batch_execute(&write).is_err() {}
    assert_eq!(stage.sum(), expected + rows);
    assert_eq!(stage.assert_on_record(server()), 0);
}

#[test]
fn a_token_is_spent_exactly_when_the_write_that_was_stopped_at_any_moment_is_committed() {
    let mut stage = large();
    let mut client = stage.client();
    let pid = pid_of(&mut client);
    let (mut request, mut token) = stage.approved(ALL);
    let (mut written, mut expected) = (0, 0);
    for round in 0..60 {
        let canceller = (round % 2 == 0).then(|| Canceller::of(&stage.db, pid, 60));
        let armed = [
            format!("SET statement_timeout = {}", if round % 2 == 0 { 0 } else { round }),
            "SET writeguard.override = on".to_owned(),
            format!("SET writeguard.token = '{token}'"),
        ];
        let mut result = Ok(());
        for sql in armed.iter().map(String::as_str).chain([ALL]) {
            result = result.and_then(|()| client.batch_execute(sql));
        }
        drop(canceller);
        match result {
            Ok(()) => {
                written += 1;
                expected += ROWS;
                assert_eq!(stage.state(request), "spent");
                (request, token) = stage.approved(ALL);
            }
            Err(error) => {
                assert_eq!(Refusal::of(&error).sqlstate, "57014");
                assert_eq!(stage.state(request), "approved");
            }
        }
        assert_eq!((stage.sum(), stage.events("overridden")), (expected, written), "round {round}");
    }
    drop(client);
    let mut client = stage.client();
    arm(&mut client, &token);
    pass(&mut client, ALL);
    assert_eq!((stage.sum(), stage.state(request)), (expected + ROWS, "spent".into()));
    assert_eq!(stage.assert_on_record(server()), 0);
}

#[test]
fn a_rehearsal_that_is_stopped_at_any_moment_lifts_and_changes_nothing() {
    let mut stage = large();
    let mut client = stage.client();
    let pid = pid_of(&mut client);
    let mut requests = 0;
    for sql in [ALL, "TRUNCATE t"] {
        for _ in 0..25 {
            let canceller = Canceller::of(&stage.db, pid, 60);
            match client.batch_execute(&format!("SELECT writeguard.request('{sql}', reason => 'ticket 7')")) {
                Ok(()) => requests += 1,
                Err(error) => assert_eq!(Refusal::of(&error).sqlstate, "57014"),
            }
            refused_or_stopped(client.batch_execute(sql), sql);
            drop(canceller);
            assert_eq!((stage.sum(), stage.number("SELECT count(*) FROM t")), (0, ROWS));
            assert_eq!(stage.number("SELECT count(*) FROM writeguard.request"), requests);
        }
    }
    assert_eq!(stage.number("SELECT coalesce(sum(rows), 0) FROM writeguard.request"), requests * ROWS);
}

// Stopped by time alone, or by the client.

#[test]
fn idle_timeouts_after_a_refusal_end_the_session_and_nothing_else() {
    let mut stage = Stage::new();
    let mut survivor = stage.client();
    pass(&mut survivor, FIVE);
    let cursor = "DECLARE c CURSOR FOR SELECT touch(i) FROM generate_series(1, 9) AS i; FETCH 2 FROM c";
    for (setting, sql, is_refused) in [
        (
            "idle_in_transaction_session_timeout",
            "BEGIN; UPDATE t SET v = 1 WHERE id <= 3; SAVEPOINT a".to_owned(),
            false,
        ),
        ("idle_in_transaction_session_timeout", format!("BEGIN; UPDATE t SET v = 1 WHERE id = 1; {ALL}"), true),
        ("idle_in_transaction_session_timeout", format!("BEGIN; {cursor}"), false),
        ("idle_in_transaction_session_timeout", format!("BEGIN; {cursor}; FETCH 6 FROM c"), true),
        ("idle_session_timeout", ALL.to_owned(), true),
    ] {
        let mut client = stage.db.connect_with(&stage.owner, &format!("-c {setting}=300ms"));
        let pid = pid_of(&mut client);
        if is_refused {
            fail(&mut client, &sql, "WG001");
        } else {
            pass(&mut client, &sql);
        }
        stage.gone(pid);
        assert_eq!(stage.sum(), 0, "{sql}");
    }
    assert_fresh(&mut survivor);
    assert_eq!(stage.assert_on_record(server()), 4);
}

/// Sends one command over a connection of its own and reads no answer.
fn send_only(server: &Server, stage: &Stage, sql: &str) -> UnixStream {
    let message = |kind: &[u8], body: &[u8]| {
        let length = u32::try_from(body.len() + 4).unwrap();
        [kind, &length.to_be_bytes(), body].concat()
    };
    let mut startup = 196_608_u32.to_be_bytes().to_vec();
    for word in ["user", &stage.owner, "database", &stage.db.name, ""] {
        startup.extend_from_slice(word.as_bytes());
        startup.push(0);
    }
    let mut stream = UnixStream::connect(server.socket_dir().join(format!(".s.PGSQL.{}", server.port()))).unwrap();
    stream.write_all(&message(b"", &startup)).unwrap();
    stream.write_all(&message(b"Q", &[sql.as_bytes(), &[0]].concat())).unwrap();
    stream
}

#[test]
fn a_client_that_is_found_gone_in_a_write_or_while_its_refusal_waits_leaves_one_event() {
    let server = Server::start(&["writeguard.event_timeout = '5min'", "client_connection_check_interval = '50ms'"]);
    let mut stage = Stage::on(&server);
    let waiting = |stage: &mut Stage, event: &str| {
        let sql = format!("SELECT pid FROM pg_stat_activity WHERE usename = '{}' AND {event}", stage.owner);
        let mut pid = None;
        wait_until(30, || {
            pid = stage.admin.query_opt(&sql, &[]).unwrap().map(|row| row.get::<_, i32>(0));
            pid.is_some()
        });
        pid.unwrap()
    };
    for recorded in 1..=2 {
        let events = stage.hold_events();
        let client = send_only(&server, &stage, ALL);
        let pid = waiting(&mut stage, EVENT);
        drop(client);
        stage.gone(pid);
        drop(events);
        assert_eq!(stage.assert_on_record(&server), recorded);

        let gate = stage.hold("SELECT pg_advisory_xact_lock(7)");
        let client = send_only(&server, &stage, GATED);
        let pid = waiting(&mut stage, LOCK);
        drop(client);
        stage.gone(pid);
        drop(gate);
        assert_eq!((stage.sum(), stage.assert_on_record(&server)), (0, recorded));
    }
    assert_fresh(&mut stage.client());
}

#[test]
fn a_worker_or_launcher_whose_query_is_cancelled_loses_and_doubles_no_event() {
    let server = Server::start(&["writeguard.event_timeout = '60s'"]);
    let mut stage = Stage::on(&server);
    let cancel = "SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE backend_type LIKE 'pg_writeguard%'";
    let mut client = stage.client();
    // At rest, with nothing to do, and while it waits for the table.
    pass(&mut stage.admin, cancel);
    fail(&mut client, ALL, "WG001");
    pass(&mut stage.admin, cancel);
    fail(&mut client, ALL, "WG001");
    for _ in 0..2 {
        let events = stage.hold_events();
        let waiting = in_background(stage.client(), ALL);
        let stuck = "SELECT count(*) FROM pg_stat_activity
                     WHERE backend_type = 'pg_writeguard worker' AND datname = current_database()
                       AND wait_event_type = 'Lock'";
        wait_until(30, || stage.number(stuck) == 1);
        pass(&mut stage.admin, cancel);
        drop(events);
        assert_eq!(expect_refusal(waiting.join().unwrap().1).sqlstate, "WG001");
    }
    fail(&mut client, ALL, "WG001");
    assert_eq!((stage.assert_on_record(&server), stage.sum()), (5, 0));
    assert_eq!(stage.number("SELECT late + in_log_only FROM writeguard.event_queue"), 0);
}

// Policies that change while a write runs.

/// Runs a statement of the owner's up to the gate, lets `change` happen in another session, and lets it go on.
#[track_caller]
fn meanwhile(stage: &mut Stage, sql: &str, change: &str) -> (Client, Result<(), postgres::Error>) {
    let gate = stage.hold("SELECT pg_advisory_xact_lock(7)");
    let mut client = stage.client();
    let pid = pid_of(&mut client);
    let waiting = in_background(client, sql);
    stage.waits(pid, LOCK);
    pass(&mut stage.db.admin(), change);
    drop(gate);
    waiting.join().unwrap()
}

fn set(rows: i64) -> String {
    format!("SELECT writeguard.set_policy('p', tables => '{{public.t}}', max_rows => {rows})")
}

const SIX_GATED: &str = "UPDATE t SET v = v + 1 WHERE id <= 6 AND gate(id)";
const FIVE_GATED: &str = "UPDATE t SET v = v + 1 WHERE id <= 5 AND gate(id)";

/// As with privileges, what the executor has begun goes on under the rules it began with.
#[test]
fn a_policy_changed_in_the_middle_of_one_update_decides_about_the_next() {
    let mut stage = Stage::new();
    for change in [set(2), set(0)] {
        let (mut client, result) = meanwhile(&mut stage, FIVE_GATED, &change);
        result.unwrap_or_else(|error| panic!("{:?}", Refusal::of(&error)));
        assert_eq!(stage.sum(), 5);
        fail(&mut client, "UPDATE t SET v = 0 WHERE id <= 3", "WG001");
        stage.undo();
        stage.limit(5);
    }
    for change in [set(9), "SELECT writeguard.drop_policy('p')".to_owned()] {
        let (mut client, result) = meanwhile(&mut stage, SIX_GATED, &change);
        assert_eq!(expect_refusal(result).sqlstate, "WG001");
        assert_eq!(stage.sum(), 0);
        pass(&mut client, SIX_GATED);
        assert_eq!(stage.sum(), 6);
        stage.undo();
        stage.limit(5);
    }
    stage.assert_on_record(server());
}

/// A function that changes six rows in two statements, with the gate in between.
const HALVES: &str = "DO $$ BEGIN
    UPDATE t SET v = v + 1 WHERE id <= 3;
    PERFORM gate(3);
    UPDATE t SET v = v + 1 WHERE id BETWEEN 4 AND 6;
  END $$";

#[test]
fn a_policy_changed_in_the_middle_of_a_block_counts_from_there() {
    let mut stage = Stage::new();
    fail(&mut stage.client(), HALVES, "WG001");
    for (change, passes) in [
        (set(5), false),
        (set(3), true),
        (set(2), false),
        ("SELECT writeguard.drop_policy('p')".to_owned(), true),
        (format!("BEGIN; {}; ROLLBACK", set(100)), false),
        (format!("BEGIN; SAVEPOINT a; {}; ROLLBACK TO a; COMMIT", set(100)), false),
        ("SELECT writeguard.set_policy('q', tables => '{public.t}', max_rows => 2)".to_owned(), false),
        (
            "SELECT writeguard.set_policy('p', tables => '{public.t}', roles => '{postgres}', max_rows => 5)"
                .to_owned(),
            true,
        ),
        (
            "SELECT writeguard.set_policy('p', tables => '{public.t}', operations => '{delete}', max_rows => 5)"
                .to_owned(),
            true,
        ),
    ] {
        let (mut client, result) = meanwhile(&mut stage, HALVES, &change);
        if passes {
            result.unwrap_or_else(|error| panic!("{change}: {:?}", Refusal::of(&error)));
            assert_eq!(stage.sum(), 6, "{change}");
            stage.undo();
        } else {
            assert_eq!(expect_refusal(result).sqlstate, "WG001", "{change}");
            assert_eq!(stage.sum(), 0, "{change}");
        }
        let _ = stage.admin.batch_execute("SELECT writeguard.drop_policy('q')");
        stage.limit(5);
        stage.limit(4);
        pass(&mut client, "UPDATE t SET v = v WHERE id <= 4");
        fail(&mut client, FIVE, "WG001");
        stage.limit(5);
    }
}

#[test]
fn a_policy_changed_between_the_fetches_of_a_portal_counts_from_there() {
    let mut stage = Stage::new();
    let mut client = stage.client();
    let sql = "SELECT touch(i) FROM generate_series(1, 10) AS i";
    for (change, more) in [
        (set(2), 2),
        (format!("BEGIN; {}; ROLLBACK", set(2)), 1),
        (set(5), 1),
        (set(0), 0),
        (format!("{}; {}", set(100), set(3)), 3),
        ("SELECT writeguard.drop_policy('p')".to_owned(), 6),
    ] {
        stage.limit(5);
        let mut transaction = client.transaction().unwrap();
        let portal = transaction.bind(sql, &[]).unwrap();
        assert_eq!(transaction.query_portal(&portal, 4).unwrap().len(), 4);
        pass(&mut stage.admin, &change);
        for _ in 0..more {
            match transaction.query_portal(&portal, 1) {
                Ok(rows) => assert_eq!(rows.len(), 1, "{change}"),
                Err(error) => panic!("{change}: {:?}", Refusal::of(&error)),
            }
        }
        if more < 6 {
            let refusal = expect_refusal(transaction.query_portal(&portal, 1));
            assert_eq!(refusal.sqlstate, "WG001", "{change}");
        }
        transaction.rollback().unwrap();
        assert_eq!(stage.sum(), 0);
    }
    stage.limit(5);
    assert_fresh(&mut client);
}

#[test]
fn a_policy_changed_by_the_write_itself_lifts_nothing_of_what_runs() {
    let mut stage = Stage::new();
    pass(
        &mut stage.admin,
        "CREATE FUNCTION change(id int, sql text) RETURNS boolean LANGUAGE plpgsql AS
         $$ BEGIN IF id = 3 THEN EXECUTE sql; END IF; RETURN true; END $$",
    );
    let mut superuser = stage.db.admin();
    for change in
        [set(100), "SELECT writeguard.drop_policy('p')".to_owned(), "DELETE FROM writeguard.policy".to_owned()]
    {
        let sql = format!("UPDATE t SET v = 1 WHERE change(id, $$ {change} $$)");
        fail(&mut superuser, &sql, "WG001");
        assert_eq!(stage.sum(), 0);
        // The change went with the write.
        fail(&mut superuser, ALL, "WG001");
    }
    stage.assert_on_record(server());
}

#[test]
fn a_policy_taken_away_while_its_refusal_waits_is_still_the_one_on_record() {
    let mut stage = Stage::new();
    let events = stage.hold_events();
    let mut client = stage.client();
    let pid = pid_of(&mut client);
    let waiting = in_background(client, ALL);
    stage.waits(pid, EVENT);
    pass(&mut stage.db.admin(), "DELETE FROM writeguard.policy");
    drop(events);
    let (mut client, result) = waiting.join().unwrap();
    let refusal = expect_refusal(result);
    assert_eq!(refusal.sqlstate, "WG001");
    assert!(refusal.hint.contains("request(event => "), "{refusal:?}");
    assert_eq!((stage.sum(), stage.assert_on_record(server())), (0, 1));
    pass(&mut client, ALL);
    assert_eq!(stage.sum(), 10);
}

#[test]
fn a_policy_changed_all_the_time_is_either_the_one_or_the_other() {
    let mut stage = Stage::new();
    let stopped: &'static AtomicBool = Box::leak(Box::new(AtomicBool::new(false)));
    let mut changer = stage.db.admin();
    let changing = thread::spawn(move || {
        while !stopped.load(Ordering::Relaxed) {
            for rows in [2, 5, 3] {
                pass(&mut changer, &set(rows));
            }
        }
    });
    let mut client = stage.client();
    let (mut passed, mut refused) = (0, 0);
    for _ in 0..300 {
        fail(&mut client, SIX, "WG001");
        pass(&mut client, "UPDATE t SET v = v WHERE id <= 2");
        match client.batch_execute("UPDATE t SET v = v WHERE id <= 4") {
            Ok(()) => passed += 1,
            Err(error) => {
                assert_eq!(Refusal::of(&error).sqlstate, "WG001");
                refused += 1;
            }
        }
    }
    stopped.store(true, Ordering::Relaxed);
    changing.join().unwrap();
    assert!(passed > 0 && refused > 0, "{passed} passed and {refused} were refused");
    assert_eq!(stage.assert_on_record(server()), 300 + refused);
}

// Roles, tables, databases and the extension that change while a session lives.

#[test]
fn a_login_that_is_dropped_while_its_session_lives_is_limited_and_on_record_by_number() {
    let mut stage = Stage::new();
    let ghost = stage.db.role("ghost");
    let oid = stage.number(&format!("SELECT '{ghost}'::regrole::oid::bigint"));
    let mut client = stage.db.connect(&ghost);
    let mut fresh = stage.db.connect(&ghost);
    pass(&mut client, FIVE);
    pass(&mut client, "BEGIN; UPDATE t SET v = v WHERE id <= 2");
    pass(&mut stage.admin, &format!("DROP ROLE {ghost}"));
    pass(&mut client, FIVE);
    fail(&mut client, SIX, "WG001");
    pass(&mut client, "ROLLBACK");
    for client in [&mut client, &mut fresh] {
        fail(client, SIX, "WG001");
        pass(client, FIVE);
        fail(client, "TRUNCATE t", "WG005");
    }
    stage.settle();
    let own =
        format!("SELECT count(*) FROM writeguard.event WHERE kind = 'blocked' AND login = '{oid}' AND role = '{oid}'");
    assert_eq!(stage.number(&own), 5);
    // Who has no name can ask for nothing that somebody else could not tell apart.
    let request = client.query_one("SELECT writeguard.request($1::text, reason => 'ticket 7')", &[&ALL]);
    if let Ok(row) = request {
        let token: String = stage
            .db
            .connect(&stage.approver)
            .query_one("SELECT writeguard.approve($1)", &[&row.get::<_, i64>(0)])
            .unwrap()
            .get(0);
        let mut other = stage.client();
        arm(&mut other, &token);
        fail(&mut other, ALL, "WG006");
    }
    assert_eq!(stage.sum(), 0);
}

#[test]
fn a_role_that_is_set_and_then_dropped_or_renamed_is_limited_as_long_as_it_has_the_name() {
    let mut stage = Stage::new();
    let (app, owner) = (stage.db.role("app"), stage.owner.clone());
    pass(&mut stage.admin, &format!("GRANT {app} TO {owner}"));
    stage.policy(&format!("tables => '{{public.t}}', roles => '{{{app}}}', max_rows => 5"));
    let mut client = stage.client();
    pass(&mut client, &format!("SET ROLE {app}"));
    fail(&mut client, SIX, "WG001");
    pass(&mut stage.admin, &format!("ALTER ROLE {app} RENAME TO {app}_new"));
    pass(&mut client, SIX);
    pass(&mut stage.admin, &format!("ALTER ROLE {app}_new RENAME TO {app}"));
    fail(&mut client, SIX, "WG001");
    pass(&mut client, "BEGIN");
    pass(&mut client, FIVE);
    pass(&mut stage.admin, &format!("DROP ROLE {app}"));
    pass(&mut client, FIVE);
    pass(&mut client, SIX);
    pass(&mut client, "ROLLBACK");
    stage.policy("tables => '{public.t}', max_rows => 5");
    fail(&mut client, SIX, "WG001");
    pass(&mut client, FIVE);
}

#[test]
fn a_membership_revoked_in_the_middle_of_a_transaction_ends_with_its_commit() {
    let mut stage = Stage::new();
    let (group, owner) = (stage.db.role("group"), stage.owner.clone());
    stage.policy(&format!("tables => '{{public.t}}', roles => '{{{group}}}', max_rows_per_transaction => 5"));
    let mut client = stage.client();
    pass(&mut client, "BEGIN");
    pass(&mut client, SIX);
    pass(&mut stage.admin, &format!("BEGIN; GRANT {group} TO {owner}"));
    pass(&mut client, SIX);
    pass(&mut stage.admin, "COMMIT");
    pass(&mut client, FIVE);
    pass(&mut client, "SAVEPOINT a");
    fail(&mut client, "UPDATE t SET v = v WHERE id = 1", "WG001");
    pass(&mut client, "ROLLBACK TO a");
    pass(&mut stage.admin, &format!("BEGIN; REVOKE {group} FROM {owner}"));
    fail(&mut client, "UPDATE t SET v = v WHERE id = 1", "WG001");
    pass(&mut client, "ROLLBACK TO a");
    pass(&mut stage.admin, "COMMIT");
    pass(&mut client, SIX);
    pass(&mut client, "COMMIT");
}

#[test]
fn a_table_dropped_and_made_again_by_another_session_counts_from_zero() {
    let mut stage = Stage::new();
    let mut client = stage.client();
    let statement = client.prepare("UPDATE t SET v = v + 1 WHERE id <= $1").unwrap();
    let mut other = stage.client();
    for _ in 0..3 {
        client.execute(&statement, &[&5]).unwrap();
        assert_eq!(expect_refusal(client.execute(&statement, &[&6])).sqlstate, "WG001");
        pass(&mut client, "BEGIN; SELECT 1");
        pass(&mut other, "BEGIN; DROP TABLE t");
        pass(&mut other, "CREATE TABLE t (id int PRIMARY KEY, v int NOT NULL DEFAULT 0)");
        pass(&mut other, "INSERT INTO t SELECT i, 0 FROM generate_series(1, 10) AS i");
        let mut waiting = stage.client();
        let pid = pid_of(&mut waiting);
        let waiting = in_background(waiting, ALL);
        stage.waits(pid, LOCK);
        pass(&mut other, "COMMIT");
        // The one that waited may have looked the old table up already.
        let refusal = expect_refusal(waiting.join().unwrap().1);
        assert!(["WG001", "XX000", "42P01"].contains(&refusal.sqlstate.as_str()), "{refusal:?}");
        assert_eq!(stage.sum(), 0);
        pass(&mut client, FIVE);
        fail(&mut client, SIX, "WG001");
        pass(&mut client, "ROLLBACK");
        pass(&mut other, "BEGIN; DROP TABLE t");
        pass(&mut other, "ROLLBACK");
    }
    assert_fresh(&mut client);
}

#[test]
fn a_database_renamed_while_its_events_wait_gets_them_all() {
    let server = Server::start(&["writeguard.event_timeout = '0'"]);
    let mut stage = Stage::on(&server);
    let before = stage.events("blocked");
    let mut client = stage.client();
    let name = stage.db.name.clone();
    for _ in 0..5 {
        fail(&mut client, ALL, "WG001");
    }
    drop(client);
    drop(std::mem::replace(&mut stage.admin, server.postgres()));
    // Somebody still connected, such as the worker, is waited for up to five seconds.
    pass(&mut stage.admin, &format!("ALTER DATABASE {name} RENAME TO {name}_new"));
    pass(&mut stage.admin, &format!("ALTER DATABASE {name}_new RENAME TO {name}"));
    stage.admin = stage.db.admin();
    stage.settle();
    assert_eq!((stage.events("blocked"), stage.refusals(&server)), (before + 5, 5));
    assert_eq!(stage.number("SELECT in_log_only FROM writeguard.event_queue"), 0);
}

#[test]
fn an_extension_dropped_by_another_session_in_the_middle_of_a_transaction_ends_its_limits() {
    let mut stage = Stage::new();
    pass(&mut stage.admin, "CREATE TABLE u AS TABLE t; GRANT ALL ON u TO PUBLIC");
    let policy = "SELECT writeguard.set_policy('u', tables => '{public.u}', max_rows_per_transaction => 5)";
    pass(&mut stage.admin, policy);
    let (mut client, mut overriding) = (stage.client(), stage.client());
    pass(&mut client, "BEGIN; UPDATE u SET v = v WHERE id <= 5");
    let token = stage.approved(GATED).1;
    arm(&mut overriding, &token);
    let gate = stage.hold("SELECT pg_advisory_xact_lock(7)");
    let pid = pid_of(&mut overriding);
    let waiting = in_background(overriding, GATED);
    stage.waits(pid, LOCK);
    stage.settle();
    pass(&mut stage.db.admin(), "DROP EXTENSION pg_writeguard");
    drop(gate);
    // It began under the policy, and its token is gone with the extension.
    let (mut overriding, result) = waiting.join().unwrap();
    let refusal = expect_refusal(result);
    assert_eq!(refusal.sqlstate, "WG008", "{refusal:?}");
    assert_eq!(stage.sum(), 0);
    pass(&mut overriding, ALL);
    pass(&mut client, "UPDATE u SET v = 1; COMMIT");
    assert_eq!((stage.sum(), stage.number("SELECT sum(v) FROM u")), (10, 10));

    pass(&mut stage.admin, "CREATE EXTENSION pg_writeguard");
    pass(&mut stage.admin, policy);
    stage.limit(5);
    assert_fresh(&mut client);
    assert_fresh(&mut overriding);
    fail(&mut client, "UPDATE u SET v = v", "WG001");
}

#[test]
fn an_override_whose_extension_is_dropped_before_the_commit_is_undone() {
    for overrode_before in [false, true] {
        let mut stage = Stage::new();
        stage.policy("tables => '{public.t}', max_rows => 5, override => 'flag'");
        let mut client = stage.client();
        if overrode_before {
            pass(&mut client, &format!("SET writeguard.override = on; {ALL}"));
            stage.undo();
        }
        pass(&mut client, "BEGIN; SET LOCAL writeguard.override = on");
        pass(&mut client, ALL);
        stage.settle();
        pass(&mut stage.db.admin(), "DROP EXTENSION pg_writeguard");
        let refusal = fail(&mut client, "COMMIT", "WG008");
        assert!(refusal.hint.contains("CREATE EXTENSION"), "{refusal:?}");
        assert_eq!(stage.sum(), 0);
        pass(&mut client, ALL);
        assert_eq!(stage.sum(), 10);
    }
}

#[test]
fn an_extension_dropped_while_its_worker_stores_events_is_no_deadlock() {
    let server = Server::start(&["deadlock_timeout = '10ms'"]);
    let stage = Stage::on(&server);
    let mut client = stage.db.admin();
    for round in 0..40 {
        pass(&mut client, "SELECT writeguard.set_policy('n' || n, max_rows => 5) FROM generate_series(1, 30) AS n");
        if let Err(error) = client.batch_execute("DROP EXTENSION pg_writeguard") {
            panic!("round {round}: {:?}", Refusal::of(&error));
        }
        pass(&mut client, "CREATE EXTENSION pg_writeguard");
    }
}

#[test]
fn a_first_write_that_waits_for_the_dropping_of_the_extension_is_one_without_it() {
    let mut stage = Stage::new();
    pass(&mut stage.admin, "CREATE TABLE plain AS SELECT 1 AS n; GRANT ALL ON plain TO PUBLIC");
    for sql in [ALL, "UPDATE plain SET n = 2", "TRUNCATE plain"] {
        stage.settle();
        let mut dropping = stage.db.admin();
        pass(&mut dropping, "BEGIN; DROP EXTENSION pg_writeguard");
        let mut client = stage.client();
        let pid = pid_of(&mut client);
        let waiting = in_background(client, sql);
        stage.waits(pid, LOCK);
        pass(&mut dropping, "COMMIT");
        let (_, result) = waiting.join().unwrap();
        result.unwrap_or_else(|error| panic!("{sql}: {:?}", Refusal::of(&error)));
        pass(&mut stage.admin, "CREATE EXTENSION pg_writeguard");
        stage.limit(5);
    }
}

//! Limits and events hold at the edges: long texts and clients that leave, errors while policies are read, writes
//! outside the client's own command, numbers and times that fit nowhere, and other people's changes in between.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::OnceLock;
use std::time::Duration;

use crate::common::session::number;
use crate::common::{Database, Refusal, Server, expect_refusal, wait_until};
use postgres::Client;

/// More rows than the policy allows.
const UPDATE_ALL: &str = "UPDATE t SET v = 1";
/// One row more than the policy allows, and just as many as it allows.
const SIX: &str = "UPDATE t SET v = 1 WHERE id <= 6";
const FIVE: &str = "UPDATE t SET v = 0 WHERE id <= 5";

/// A server whose refused writes wait rather long for their event, so that on a busy machine, too, an event that can
/// be stored is stored in time.
fn server() -> &'static Server {
    static SERVER: OnceLock<Server> = OnceLock::new();
    SERVER.get_or_init(|| Server::start(&["writeguard.event_timeout = '20s'"]))
}

/// A database with the tables `t` and `u` of 1,000 rows each, owned by an ordinary role; the policy `p` allows five
/// rows of `t`, and nothing covers `u`.
struct Stage {
    db: Database,
    admin: Client,
    owner: String,
}

impl Stage {
    fn new() -> Stage {
        Stage::on(server())
    }

    fn on(server: &Server) -> Stage {
        let db = server.database();
        let owner = db.role("owner");
        let mut admin = db.admin();
        pass(
            &mut admin,
            &format!(
                "GRANT CREATE ON SCHEMA public TO {owner};
                 GRANT CREATE ON DATABASE {} TO {owner};
                 SET ROLE {owner};
                 CREATE TABLE t (id int PRIMARY KEY, v int NOT NULL DEFAULT 0, k int);
                 INSERT INTO t SELECT i, 0, CASE WHEN i <= 10 THEN 1 END FROM generate_series(1, 1000) AS i;
                 CREATE TABLE u (id int PRIMARY KEY, v int NOT NULL DEFAULT 0);
                 INSERT INTO u SELECT i, 0 FROM generate_series(1, 1000) AS i;
                 ANALYZE t, u;
                 RESET ROLE;
                 SELECT writeguard.set_policy('p', tables => '{{public.t}}', max_rows => 5)",
                db.name
            ),
        );
        Stage { db, admin, owner }
    }

    fn client(&self) -> Client {
        self.db.connect(&self.owner)
    }

    /// Runs a setup as the owner of the tables.
    #[track_caller]
    fn create(&mut self, sql: &str) {
        pass(&mut self.client(), sql);
    }

    #[track_caller]
    fn policy(&mut self, arguments: &str) {
        pass(&mut self.admin, &format!("SELECT writeguard.set_policy({arguments})"));
    }

    #[track_caller]
    fn number(&mut self, sql: &str) -> i64 {
        number(&mut self.admin, sql)
    }

    /// No row of `t` has another value than at the start.
    #[track_caller]
    fn assert_unchanged(&mut self) {
        assert_eq!(self.number("SELECT count(*) FROM t WHERE v <> 0"), 0);
        assert!(self.number("SELECT count(*) FROM t") >= 1000);
    }

    #[track_caller]
    fn events(&mut self, kind: &str) -> i64 {
        self.number(&format!("SELECT count(*) FROM writeguard.event WHERE kind = '{kind}'"))
    }

    /// The token with which another person approves a statement of the owner's.
    #[track_caller]
    fn approved(&mut self, statement: &str) -> String {
        let approver = self.db.role("approver");
        pass(
            &mut self.admin,
            &format!("GRANT EXECUTE ON FUNCTION writeguard.approve, writeguard.reject TO {approver}"),
        );
        let request: i64 = self
            .client()
            .query_one("SELECT writeguard.request($1::text, reason => 'ticket 7')", &[&statement])
            .unwrap_or_else(|error| panic!("no request: {:?}", Refusal::of(&error)))
            .get(0);
        self.db.connect(&approver).query_one("SELECT writeguard.approve($1)", &[&request]).unwrap().get(0)
    }
}

#[track_caller]
fn pass(client: &mut Client, sql: &str) {
    if let Err(error) = client.batch_execute(sql) {
        panic!("{}: {:?}", shortened(sql), Refusal::of(&error));
    }
}

/// The statement fails with this SQLSTATE; an open transaction block stays as it is.
#[track_caller]
fn fail(client: &mut Client, sql: &str, sqlstate: &str) -> Refusal {
    let refusal = match client.batch_execute(sql) {
        Ok(()) => panic!("expected {sqlstate}, but it passed: {}", shortened(sql)),
        Err(error) => Refusal::of(&error),
    };
    assert_eq!(refusal.sqlstate, sqlstate, "{}: {refusal:?}", shortened(sql));
    refusal
}

#[track_caller]
fn refuse(client: &mut Client, sql: &str) -> Refusal {
    fail(client, sql, "WG001")
}

fn shortened(sql: &str) -> String {
    sql.chars().take(300).collect()
}

fn pid_of(client: &mut Client) -> i32 {
    client.query_one("SELECT pg_backend_pid()", &[]).unwrap().get(0)
}

/// A comment of so many thousand bytes.
fn comment(thousands: usize) -> String {
    format!("/* {} */", "x".repeat(thousands * 1000))
}

// Texts that are gone before their statement is.

/// Notices when one process of a server ends by a signal: the server then ends all the others, too.
struct Witness<'a> {
    server: &'a Server,
    client: Client,
    started: String,
}

const STARTED: &str = "SELECT pg_postmaster_start_time()::text";

impl<'a> Witness<'a> {
    fn new(server: &'a Server) -> Self {
        let mut client = server.postgres();
        let started = client.query_one(STARTED, &[]).unwrap().get(0);
        Witness { server, client, started }
    }

    /// Waits until a session is over.
    fn sees_end_of(&mut self, pid: i32) {
        wait_until(20, || {
            let running = self.client.query_opt("SELECT FROM pg_stat_activity WHERE pid = $1", &[&pid]);
            running.expect("the server ended all sessions").is_none()
        });
    }

    #[track_caller]
    fn assert_no_crash(mut self) {
        // A process that crashed is noticed a moment after its connection is gone.
        std::thread::sleep(Duration::from_millis(200));
        let started = self.client.query_one(STARTED, &[]).expect("the server ended all sessions");
        assert_eq!(started.get::<_, String>(0), self.started);
        let log = self.server.log();
        for word in ["terminated by signal", "PANIC", "all server processes terminated"] {
            assert!(!log.contains(word), "{word} in the server log");
        }
    }
}

#[test]
fn refused_statement_of_300_kb_that_is_rolled_back_by_the_next_message() {
    let server = Server::start(&[]);
    let mut stage = Stage::on(&server);
    let witness = Witness::new(&server);
    let mut client = stage.client();
    for thousands in [300, 150, 400, 1000, 300] {
        refuse(&mut client, &format!("BEGIN; {UPDATE_ALL} {}", comment(thousands)));
        pass(&mut client, "ROLLBACK");
        pass(&mut client, "BEGIN");
        refuse(&mut client, &format!("{UPDATE_ALL} {}", comment(thousands)));
        pass(&mut client, "ROLLBACK");
        let refusal = expect_refusal(client.execute(&format!("{UPDATE_ALL} {}", comment(thousands)), &[]));
        assert_eq!(refusal.sqlstate, "WG001", "{refusal:?}");
        pass(&mut client, FIVE);
    }
    stage.assert_unchanged();
    witness.assert_no_crash();
}

#[test]
fn failed_statement_of_400_kb_whose_client_leaves() {
    let server = Server::start(&[]);
    let mut stage = Stage::on(&server);
    let mut witness = Witness::new(&server);
    let divide = format!("UPDATE t SET v = 1 / (id - 3) WHERE id < 4 {}", comment(400));
    let refused = format!("{UPDATE_ALL} {}", comment(400));
    for (sql, sqlstate) in [(&divide, "22012"), (&refused, "WG001")] {
        for _ in 0..3 {
            let mut client = stage.client();
            let pid = pid_of(&mut client);
            fail(&mut client, &format!("BEGIN; {sql}"), sqlstate);
            drop(client);
            witness.sees_end_of(pid);

            let mut client = stage.client();
            let pid = pid_of(&mut client);
            pass(&mut client, "BEGIN; UPDATE t SET v = 0 WHERE id = 1; SAVEPOINT a");
            fail(&mut client, sql, sqlstate);
            pass(&mut client, "ROLLBACK TO a");
            drop(client);
            witness.sees_end_of(pid);
        }
    }
    stage.assert_unchanged();
    witness.assert_no_crash();
}

// Policies that could not be read.

#[test]
fn policies_are_read_again_after_an_error_while_they_were_read() {
    let mut stage = Stage::new();
    let mut b = stage.client();
    pass(&mut b, FIVE);
    pass(&mut b, "SET lock_timeout = '100ms'");
    for round in 0..3 {
        let limit = if round % 2 == 0 { 2 } else { 3 };
        stage.policy(&format!("'p', tables => '{{public.t}}', max_rows => {limit}"));
        pass(&mut stage.admin, "BEGIN; LOCK TABLE writeguard.policy IN ACCESS EXCLUSIVE MODE");
        for _ in 0..2 {
            let refusal = fail(&mut b, FIVE, "55P03");
            assert_eq!((refusal.detail.as_str(), refusal.hint.as_str()), ("", ""), "{refusal:?}");
            assert!(refusal.message.contains("lock timeout"), "{refusal:?}");
        }
        pass(&mut stage.admin, "ROLLBACK");
        let refusal = refuse(&mut b, "UPDATE t SET v = 9 WHERE id <= 5");
        assert!(refusal.message.contains(&format!("limit of {limit} rows")), "{refusal:?}");
        pass(&mut b, &format!("UPDATE t SET v = 0 WHERE id <= {limit}"));
    }
    stage.assert_unchanged();
}

// Writes outside the client's own command.

/// Changes all rows of `t`, five at a time and each time through a cursor of its own.
const SWEEP: &str = "FOR i IN 0..199 LOOP
        FOR r IN UPDATE t SET v = 77 WHERE id > i * 5 AND id <= i * 5 + 5 RETURNING id LOOP END LOOP;
      END LOOP;";

#[test]
fn deferred_trigger_that_writes_through_cursors_is_one_statement() {
    let mut stage = Stage::new();
    stage.create(&format!(
        "CREATE TABLE other (id int);
         CREATE FUNCTION sweep() RETURNS trigger LANGUAGE plpgsql AS $$
         DECLARE r record;
         BEGIN {SWEEP} RETURN NULL; END $$;
         CREATE CONSTRAINT TRIGGER sweep AFTER INSERT ON other DEFERRABLE INITIALLY DEFERRED
           FOR EACH ROW EXECUTE FUNCTION sweep()"
    ));
    let mut client = stage.client();
    refuse(&mut client, "INSERT INTO other VALUES (1)");
    stage.assert_unchanged();
    let refusal = expect_refusal(client.execute("INSERT INTO other VALUES (1)", &[]));
    assert_eq!(refusal.sqlstate, "WG001", "{refusal:?}");
    stage.assert_unchanged();
    refuse(&mut client, "BEGIN; INSERT INTO other VALUES (1); COMMIT");
    stage.assert_unchanged();
    pass(&mut client, "BEGIN");
    pass(&mut client, "INSERT INTO other VALUES (1)");
    refuse(&mut client, "COMMIT");
    stage.assert_unchanged();
    assert_eq!(stage.number("SELECT count(*) FROM other"), 0);
    assert_eq!(stage.events("blocked"), 4);

    stage.policy("'p', tables => '{public.t}', max_rows => 1000");
    pass(&mut client, "INSERT INTO other VALUES (1)");
    assert_eq!(stage.number("SELECT count(*) FROM t WHERE v = 77"), 1000);
}

/// A connection without a driver, for messages that the driver does not send.
struct Raw {
    stream: UnixStream,
}

/// What the server sent until it was ready again: the fields of an error by their letter, and the transaction's state.
#[derive(Debug)]
struct Answer {
    error: Vec<(u8, String)>,
    state: u8,
}

impl Answer {
    fn field(&self, letter: u8) -> &str {
        self.error.iter().find(|(of, _)| *of == letter).map_or("", |(_, value)| value)
    }
}

impl Raw {
    fn connect(server: &Server, user: &str, database: &str) -> Raw {
        let socket = server.socket_dir().join(format!(".s.PGSQL.{}", server.port()));
        let stream = UnixStream::connect(socket).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let mut raw = Raw { stream };
        let mut body = 196_608_u32.to_be_bytes().to_vec();
        for word in ["user", user, "database", database, ""] {
            body.extend_from_slice(word.as_bytes());
            body.push(0);
        }
        raw.write(None, &body);
        let answer = raw.answer();
        assert!(answer.error.is_empty(), "{answer:?}");
        raw
    }

    fn write(&mut self, letter: Option<u8>, body: &[u8]) {
        let length = u32::try_from(body.len() + 4).unwrap();
        let mut message: Vec<u8> = letter.into_iter().collect();
        message.extend_from_slice(&length.to_be_bytes());
        message.extend_from_slice(body);
        self.stream.write_all(&message).unwrap();
    }

    fn answer(&mut self) -> Answer {
        let mut error = Vec::new();
        loop {
            let mut head = [0; 5];
            self.stream.read_exact(&mut head).unwrap();
            let length = u32::from_be_bytes([head[1], head[2], head[3], head[4]]);
            let mut body = vec![0; usize::try_from(length).unwrap() - 4];
            self.stream.read_exact(&mut body).unwrap();
            match head[0] {
                b'E' => {
                    let fields = body.split(|byte| *byte == 0).filter(|field| !field.is_empty());
                    error.extend(fields.map(|field| (field[0], String::from_utf8_lossy(&field[1..]).into_owned())));
                }
                b'Z' => return Answer { error, state: body[0] },
                _ => {}
            }
        }
    }

    fn query(&mut self, sql: &str) -> Answer {
        let mut body = sql.as_bytes().to_vec();
        body.push(0);
        self.write(Some(b'Q'), &body);
        self.answer()
    }

    /// Calls a function without arguments by its OID.
    fn call(&mut self, function: u32) -> Answer {
        let mut body = function.to_be_bytes().to_vec();
        // No format codes, no arguments, and the result as text.
        body.extend_from_slice(&[0; 6]);
        self.write(Some(b'F'), &body);
        self.answer()
    }
}

#[test]
fn fast_path_call_is_one_statement() {
    let mut stage = Stage::new();
    stage.create(&format!(
        "CREATE FUNCTION sweep() RETURNS int LANGUAGE plpgsql AS $$
         DECLARE r record;
         BEGIN {SWEEP} RETURN 1; END $$;
         CREATE FUNCTION five() RETURNS int LANGUAGE sql AS '{FIVE} RETURNING 1'"
    ));
    let oid = |stage: &mut Stage, name: &str| {
        u32::try_from(stage.number(&format!("SELECT '{name}'::regproc::oid::bigint"))).unwrap()
    };
    let (sweep, five) = (oid(&mut stage, "sweep"), oid(&mut stage, "five"));
    let mut raw = Raw::connect(server(), &stage.owner, &stage.db.name);
    for _ in 0..2 {
        let answer = raw.call(five);
        assert!(answer.error.is_empty(), "{answer:?}");
        let answer = raw.call(sweep);
        assert_eq!((answer.field(b'C'), answer.field(b't')), ("WG001", "t"), "{answer:?}");
        assert_eq!(answer.state, b'I', "{answer:?}");
        stage.assert_unchanged();

        assert_eq!(raw.query("BEGIN").state, b'T');
        let answer = raw.call(sweep);
        assert_eq!((answer.field(b'C'), answer.state), ("WG001", b'E'), "{answer:?}");
        assert_eq!(raw.query("ROLLBACK").state, b'I');
        stage.assert_unchanged();
    }
    assert_eq!(stage.events("blocked"), 4);

    stage.policy("'p', tables => '{public.t}', max_rows => 1000");
    let answer = raw.call(sweep);
    assert!(answer.error.is_empty(), "{answer:?}");
    assert_eq!(stage.number("SELECT count(*) FROM t WHERE v = 77"), 1000);
}

#[test]
fn held_cursors_that_a_commit_runs_are_one_statement() {
    let mut stage = Stage::new();
    stage.create("CREATE FUNCTION g(x int) RETURNS int LANGUAGE sql AS 'UPDATE t SET v = 7 WHERE id = x RETURNING id'");
    let declare = |name: &str, from: i32| {
        let to = from + 4;
        format!("DECLARE {name} CURSOR WITH HOLD FOR SELECT g(x) FROM generate_series({from}, {to}) AS x")
    };
    let declared = [declare("a", 1), declare("b", 6), declare("c", 11)];
    let mut client = stage.client();
    for separate in [true, false] {
        let commit = if separate {
            pass(&mut client, "BEGIN");
            for cursor in &declared {
                pass(&mut client, cursor);
            }
            "COMMIT".to_owned()
        } else {
            format!("BEGIN; {}; COMMIT", declared.join("; "))
        };
        refuse(&mut client, &commit);
        stage.assert_unchanged();
        // PostgreSQL keeps those that were run to their end before the commit failed.
        pass(&mut client, "CLOSE ALL");
    }
    assert_eq!(stage.events("blocked"), 2);

    let whole = format!("BEGIN; {}; COMMIT", declared.join("; "));
    stage.policy("'p', tables => '{public.t}', max_rows => 14");
    refuse(&mut client, &whole);
    pass(&mut client, "CLOSE ALL");
    stage.assert_unchanged();
    stage.policy("'p', tables => '{public.t}', max_rows => 15");
    pass(&mut client, &whole);
    assert_eq!(stage.number("SELECT count(*) FROM t WHERE v = 7"), 15);
}

/// Functions that a planner may run: `imm` changes three rows when it is folded to a constant.
const FOLDED: &str = "
    CREATE FUNCTION three() RETURNS void LANGUAGE plpgsql VOLATILE AS $$
    BEGIN UPDATE t SET v = 2 WHERE id BETWEEN 11 AND 13; END $$;
    CREATE FUNCTION imm() RETURNS int LANGUAGE plpgsql IMMUTABLE AS $$
    BEGIN PERFORM three(); RETURN 1; END $$;";
const WITH_FOLDED: &str = "UPDATE t SET v = 1 WHERE id <= 3 AND imm() = 1";

#[test]
fn rows_that_were_changed_while_the_statement_was_planned_are_its_own() {
    let mut stage = Stage::new();
    stage.create(FOLDED);
    let mut client = stage.client();
    for _ in 0..2 {
        refuse(&mut client, WITH_FOLDED);
        stage.assert_unchanged();
        refuse(&mut client, &format!("BEGIN; {WITH_FOLDED}"));
        pass(&mut client, "ROLLBACK");
        stage.assert_unchanged();
    }
    stage.policy("'p', tables => '{public.t}', max_rows => 6");
    pass(&mut client, WITH_FOLDED);
    assert_eq!(stage.number("SELECT count(*) FROM t WHERE v <> 0"), 6);
}

#[test]
fn rows_that_were_changed_while_the_statement_was_bound_are_its_own() {
    let mut stage = Stage::new();
    stage.create(FOLDED);
    let mut client = stage.client();
    for _ in 0..2 {
        let refusal = expect_refusal(client.execute(WITH_FOLDED, &[]));
        assert_eq!(refusal.sqlstate, "WG001", "{refusal:?}");
        stage.assert_unchanged();
    }
}

// Events whose numbers, times or settings are in the way.

/// A write of `t` is refused, and its event is on record when the error arrives.
#[track_caller]
fn refuse_on_record(client: &mut Client, reader: &mut Client, sql: &str) {
    let count = "SELECT count(*) FROM writeguard.event WHERE kind = 'blocked'";
    let before = number(reader, count);
    let refusal = refuse(client, sql);
    assert_eq!(number(reader, count), before + 1, "not on record: {sql}");
    let last = number(reader, "SELECT max(id) FROM writeguard.event WHERE kind = 'blocked'");
    assert!(refusal.hint.contains(&format!("request(event => {last},")), "{sql}: {refusal:?}");
    let recent = "SELECT (abs(extract(epoch FROM clock_timestamp() - occurred_at)) < 60)::int \
                  FROM writeguard.event WHERE kind = 'blocked' ORDER BY id DESC LIMIT 1";
    assert_eq!(number(reader, recent), 1, "not now: {sql}");
}

#[test]
fn event_of_an_estimate_that_no_bigint_holds() {
    let mut stage = Stage::new();
    let mut client = stage.client();
    pass(&mut client, "SET jit = off");
    for (index, rows) in ["1e7", "1e16", "1e20", "1e30"].iter().enumerate() {
        pass(
            &mut client,
            &format!("CREATE FUNCTION many{index}() RETURNS SETOF int LANGUAGE sql ROWS {rows} VOLATILE AS 'SELECT 1'"),
        );
        let sql = format!("UPDATE t SET v = 1 FROM many{index}() AS a");
        refuse_on_record(&mut client, &mut stage.admin, &sql);
    }
    // The planner's number is given where it fits, and is no other number where it does not.
    let estimates = "SELECT count(*) FROM writeguard.event
                     WHERE kind = 'blocked' AND (rows_estimated IS NULL OR rows_estimated >= 1e9)";
    assert_eq!(stage.number(estimates), 4);
    stage.assert_unchanged();
}

/// A join of three series of a hundred million rows each: no bigint holds the planner's number, and the statement ends
/// only because it is stopped.
#[test]
fn event_of_a_join_without_an_end() {
    let mut stage = Stage::new();
    let mut client = stage.client();
    pass(&mut client, "SET jit = off; SET statement_timeout = '60s'");
    let series = "(SELECT generate_series(1, 100000000))";
    let sql = format!("UPDATE t SET v = 1 FROM {series} AS a, {series} AS b, {series} AS c");
    refuse_on_record(&mut client, &mut stage.admin, &sql);
    // Nothing, or the largest number, but no number that the planner did not mean.
    let estimate = "SELECT coalesce(rows_estimated, 9e18) FROM writeguard.event WHERE kind = 'blocked'";
    assert!(stage.number(estimate) >= 1_000_000_000_000_000_000);
    stage.assert_unchanged();
}

#[test]
fn event_of_a_session_in_a_time_zone_far_away() {
    let mut stage = Stage::new();
    let mut client = stage.client();
    for zone in ["FOO+23", "FOO-23", "FOO-100", "FOO+167", "<a b>-5:30"] {
        pass(&mut client, &format!("SET timezone = '{zone}'"));
        refuse_on_record(&mut client, &mut stage.admin, UPDATE_ALL);
    }
    stage.assert_unchanged();
}

#[test]
fn token_is_refused_at_the_row_that_was_not_reviewed_under_a_limit_per_transaction() {
    let mut stage = Stage::new();
    let statement = "UPDATE t SET v = 1 WHERE k = 1";
    stage.policy("'p', tables => '{public.t}', max_rows_per_transaction => 5");
    let token = stage.approved(statement);
    let mut client = stage.client();
    pass(&mut client, "INSERT INTO t VALUES (1001, 0, 1)");
    pass(&mut client, &format!("SET writeguard.override = on; SET writeguard.token = '{token}'"));
    fail(&mut client, statement, "WG006");
    stage.assert_unchanged();
    wait_until(20, || stage.events("token_refused") == 1);

    // Its use was rolled back with the write, so it opens the write that was reviewed.
    pass(&mut client, "DELETE FROM t WHERE id = 1001");
    pass(&mut client, &format!("SET writeguard.override = on; SET writeguard.token = '{token}'"));
    pass(&mut client, statement);
    assert_eq!(stage.number("SELECT count(*) FROM t WHERE v = 1"), 10);
    assert_eq!(stage.events("token_refused"), 1);
}

#[test]
fn cancel_that_meets_a_refusal_loses_no_event() {
    let mut stage = Stage::new();
    let mut client = stage.client();
    let refusals = |stage: &Stage| {
        let mark = format!("@{} LOG:  pg_writeguard: write refused", stage.db.name);
        i64::try_from(server().log().matches(&mark).count()).unwrap()
    };
    for _ in 0..10 {
        for row in [5, 6] {
            let sql = format!(
                "UPDATE t SET v = CASE WHEN id = {row} THEN pg_cancel_backend(pg_backend_pid())::int ELSE 2 END"
            );
            let refusal = expect_refusal(client.batch_execute(&sql));
            assert!(["WG001", "57014"].contains(&refusal.sqlstate.as_str()), "{refusal:?}");
            stage.assert_unchanged();
            wait_until(20, || stage.events("blocked") == refusals(&stage));
        }
    }
    refuse(&mut client, UPDATE_ALL);
    wait_until(20, || stage.events("blocked") == refusals(&stage));
    assert!(stage.events("blocked") > 0);
}

#[test]
fn policy_that_cannot_be_worked_with_refuses_until_it_is_dropped_or_the_guard_is_off() {
    let mut stage = Stage::new();
    let mut client = stage.client();
    pass(&mut client, FIVE);
    pass(&mut client, "UPDATE u SET v = 0");
    pass(&mut stage.admin, "UPDATE writeguard.policy SET schedule = 'sometimes' WHERE name = 'p'");
    let mut superuser = stage.db.admin();
    let writes = [
        "UPDATE t SET v = 1 WHERE id = 1",
        "DELETE FROM t WHERE id = 1",
        "UPDATE u SET v = 1 WHERE id = 1",
        "DELETE FROM u WHERE id = 1",
        "TRUNCATE u",
        "INSERT INTO u VALUES (1, 1) ON CONFLICT (id) DO UPDATE SET v = 1",
    ];
    for sql in writes {
        for client in [&mut client, &mut superuser] {
            let refusal = fail(client, sql, "WG008");
            assert!(refusal.hint.contains("writeguard.drop_policy('p')"), "{sql}: {refusal:?}");
        }
    }
    assert_eq!(stage.number("SELECT (SELECT count(*) FROM t) + (SELECT count(*) FROM u)"), 2000);

    pass(&mut superuser, "SET writeguard.enabled = off");
    for sql in writes {
        pass(&mut superuser, &format!("BEGIN; {sql}; ROLLBACK"));
    }
    pass(&mut superuser, "UPDATE t SET v = 0; RESET writeguard.enabled");

    let hint = fail(&mut superuser, "UPDATE u SET v = 1", "WG008").hint;
    pass(&mut superuser, &hint);
    pass(&mut client, "UPDATE u SET v = 1");
    pass(&mut superuser, "UPDATE t SET v = 0");
    pass(&mut client, "TRUNCATE u");
}

/// Changes the database's settings while no worker is connected to it, so that the next one gets them.
fn alter_database(stage: &mut Stage, setting: &str) {
    let busy = format!(
        "SELECT (SELECT count(*) FROM writeguard.outbox)
              + (SELECT count(*) FROM pg_stat_activity
                 WHERE backend_type LIKE 'pg_writeguard%' AND datname = '{}')",
        stage.db.name
    );
    wait_until(20, || stage.number(&busy) == 0);
    server().postgres().batch_execute(&format!("ALTER DATABASE {} SET {setting}", stage.db.name)).unwrap();
}

#[test]
fn event_in_a_database_that_is_read_only_by_default() {
    let mut stage = Stage::new();
    alter_database(&mut stage, "default_transaction_read_only = on");
    let mut client = stage.client();
    fail(&mut client, FIVE, "25006");
    for _ in 0..2 {
        pass(&mut client, "BEGIN READ WRITE");
        refuse_on_record(&mut client, &mut stage.admin, UPDATE_ALL);
        pass(&mut client, "ROLLBACK");
    }
    stage.assert_unchanged();
}

#[test]
fn event_in_a_database_that_sets_a_role() {
    let mut stage = Stage::new();
    let app = stage.db.role("app");
    pass(&mut stage.admin, &format!("GRANT {app} TO {}; GRANT ALL ON t TO {app}", stage.owner));
    alter_database(&mut stage, &format!("role = '{app}'"));
    let mut client = stage.client();
    for _ in 0..2 {
        refuse_on_record(&mut client, &mut stage.admin, UPDATE_ALL);
    }
    let role = "SELECT string_agg(DISTINCT role, ',') FROM writeguard.event WHERE kind = 'blocked'";
    assert_eq!(stage.admin.query_one(role, &[]).unwrap().get::<_, String>(0), app);
    stage.assert_unchanged();
}

#[test]
fn override_in_a_transaction_that_is_made_read_only_afterwards() {
    let mut stage = Stage::new();
    stage.policy("'flagged', tables => '{public.u}', max_rows => 5, override => 'flag'");
    let mut client = stage.client();
    let commands = [
        "BEGIN",
        "SET LOCAL writeguard.override = on",
        "UPDATE u SET v = v + 1",
        "SET TRANSACTION READ ONLY",
        "COMMIT",
    ];
    pass(&mut client, &commands.join("; "));
    assert_eq!(stage.number("SELECT sum(v) FROM u"), 1000);
    assert_eq!(stage.events("overridden"), 1);
    for command in commands {
        pass(&mut client, command);
    }
    assert_eq!(stage.number("SELECT sum(v) FROM u"), 2000);
    assert_eq!(stage.events("overridden"), 2);
    let rows = "SELECT sum(rows) FROM writeguard.event WHERE kind = 'overridden' AND policy = 'flagged'";
    assert_eq!(stage.number(rows), 2000);

    // The next transaction of the session is as any other.
    pass(&mut client, "UPDATE u SET v = 0 WHERE id = 1");
    refuse(&mut client, "UPDATE u SET v = 0");
}

// What somebody else does meanwhile.

#[test]
fn lock_timeout_of_a_truncate_in_a_do_block_is_as_without_the_guard() {
    let mut stage = Stage::new();
    let truncate = "DO $$BEGIN TRUNCATE u; END$$";
    let mut client = stage.client();
    pass(&mut client, "SET lock_timeout = '100ms'");
    let mut holder = stage.client();
    for mode in ["ACCESS EXCLUSIVE", "ACCESS SHARE"] {
        pass(&mut holder, &format!("BEGIN; LOCK TABLE u IN {mode} MODE"));
        let plain = fail(&mut client, truncate, "55P03");
        for limit in ["max_rows => 5", "max_rows => 5000", "max_rows_per_transaction => 5"] {
            stage.policy(&format!("'truncated', tables => '{{public.u}}', {limit}"));
            let refusal = fail(&mut client, truncate, "55P03");
            assert!(refusal.context.contains("PL/pgSQL function inline_code_block line 1"), "{refusal:?}");
            assert_eq!((refusal.detail.as_str(), refusal.hint.as_str()), ("", ""), "{refusal:?}");
            assert_eq!(refusal, plain, "{limit}, {mode}");
        }
        pass(&mut stage.admin, "SELECT writeguard.drop_policy('truncated')");
        pass(&mut holder, "ROLLBACK");
    }
    stage.policy("'truncated', tables => '{public.u}', max_rows => 999");
    fail(&mut client, truncate, "WG005");
    assert_eq!(stage.number("SELECT count(*) FROM u"), 1000);
}

/// Tables `c1` to `c300` of one row each, covered by a policy of their own.
fn create_others(stage: &mut Stage) {
    stage.create(
        "DO $$ BEGIN FOR i IN 1..300 LOOP
           EXECUTE format('CREATE TABLE c%s AS SELECT 0 AS v', i);
         END LOOP; END $$",
    );
    stage.policy("'others', tables => '{public.c*}', max_rows => 100");
}

fn write_others(client: &mut Client) {
    for table in 1..=300 {
        pass(client, &format!("UPDATE c{table} SET v = v + 1"));
    }
}

#[test]
fn token_is_counted_exactly_after_300_other_tables() {
    let mut stage = Stage::new();
    create_others(&mut stage);
    let statement = "UPDATE t SET v = v + 1 WHERE k = 1";
    for in_transaction in [false, true] {
        for rows in [10, 11] {
            pass(&mut stage.admin, "SET writeguard.enabled = off; UPDATE t SET v = 0; RESET writeguard.enabled");
            let token = stage.approved(statement);
            if rows == 11 {
                pass(&mut stage.admin, "INSERT INTO t VALUES (1001, 0, 1)");
            }
            let mut client = stage.client();
            if in_transaction {
                pass(&mut client, "BEGIN");
            }
            write_others(&mut client);
            pass(&mut client, &format!("SET writeguard.override = on; SET writeguard.token = '{token}'"));
            if rows == 10 {
                pass(&mut client, statement);
                if in_transaction {
                    pass(&mut client, "COMMIT");
                }
                assert_eq!(stage.number("SELECT sum(v) FROM t"), 10, "in a transaction: {in_transaction}");
            } else {
                fail(&mut client, statement, "WG006");
                if in_transaction {
                    pass(&mut client, "ROLLBACK");
                }
                assert_eq!(stage.number("SELECT sum(v) FROM t"), 0, "in a transaction: {in_transaction}");
                pass(&mut stage.admin, "DELETE FROM t WHERE id = 1001");
            }
        }
    }
    assert_eq!(stage.events("overridden"), 2);
    assert_eq!(stage.events("token_refused"), 2);
}

/// Commands that make sessions forget what they know, and change no policy; `$n` is another number each time.
const DISTURBANCES: [&str; 11] = [
    "ANALYZE t",
    "ANALYZE measure_1",
    "ANALYZE measure",
    "CREATE SCHEMA made_$n",
    "ALTER ROLE $owner PASSWORD 'secret $n'",
    "ALTER ROLE $owner SET work_mem = '5MB'",
    "CREATE ROLE $owner_$n IN ROLE $owner",
    "ALTER TABLE t SET (fillfactor = 90)",
    "ALTER TABLE measure_1 SET (fillfactor = 90)",
    "VACUUM t",
    "CREATE INDEX ON t (v)",
];

/// A partitioned table with one partition.
const MEASURE: &str = "
    CREATE TABLE measure (id int, v int NOT NULL DEFAULT 0) PARTITION BY RANGE (id);
    CREATE TABLE measure_1 PARTITION OF measure FOR VALUES FROM (1) TO (1001);
    INSERT INTO measure SELECT i, 0 FROM generate_series(1, 1000) AS i;";

/// The disturbances with names in them.
fn disturbances(stage: &Stage) -> impl Iterator<Item = String> + use<> {
    let owner = stage.owner.clone();
    DISTURBANCES
        .iter()
        .cycle()
        .enumerate()
        .map(move |(n, sql)| sql.replace("$owner", &owner).replace("$n", &n.to_string()))
}

#[test]
fn limit_per_statement_holds_after_changes_by_another_session() {
    let mut stage = Stage::new();
    stage.create(MEASURE);
    stage.policy("'m', tables => '{public.measure}', max_rows => 5");
    let mut client = stage.client();
    let mut disturbances = disturbances(&stage);
    for table in ["t", "measure", "measure_1"] {
        let write = |rows: i32| format!("UPDATE {table} SET v = 0 WHERE id <= {rows}");
        for disturbance in disturbances.by_ref().take(DISTURBANCES.len()) {
            pass(&mut client, &write(5));
            pass(&mut stage.admin, &disturbance);
            refuse(&mut client, &write(6));
            pass(&mut client, &write(5));
        }
    }
}

#[test]
fn limit_per_transaction_holds_after_changes_by_another_session() {
    let mut stage = Stage::new();
    stage.create(MEASURE);
    stage.policy("'p', tables => '{public.t}', max_rows_per_transaction => 5");
    stage.policy("'m', tables => '{public.measure}', max_rows_per_transaction => 5");
    let mut client = stage.client();
    let mut disturbances = disturbances(&stage);
    for table in ["t", "measure", "measure_1"] {
        let write = |rows: i32| format!("UPDATE {table} SET v = 0 WHERE id <= {rows}");
        for disturbance in disturbances.by_ref().take(DISTURBANCES.len()) {
            // Not those that have to wait for the transaction's own lock.
            if ["VACUUM", "CREATE INDEX", "ANALYZE", "ALTER TABLE"].iter().any(|word| disturbance.starts_with(word)) {
                continue;
            }
            pass(&mut client, "BEGIN");
            pass(&mut client, &write(3));
            pass(&mut stage.admin, &disturbance);
            pass(&mut client, &write(2));
            refuse(&mut client, &write(1));
            pass(&mut client, "ROLLBACK");
        }
        // ANALYZE waits for nobody who writes.
        for analyzed in ["t", "measure_1", "measure"] {
            pass(&mut client, "BEGIN");
            pass(&mut client, &write(3));
            pass(&mut stage.admin, &format!("ANALYZE {analyzed}"));
            pass(&mut client, &write(2));
            refuse(&mut client, &write(1));
            pass(&mut client, "ROLLBACK");
        }
    }
}

#[test]
fn limit_per_statement_holds_after_changes_inside_the_statement() {
    let mut stage = Stage::new();
    stage.create(MEASURE);
    let mut client = stage.client();
    let mut disturbances = disturbances(&stage);
    for disturbance in disturbances.by_ref().take(DISTURBANCES.len()) {
        // Neither can run in a function, nor an owner of tables make roles.
        if disturbance.starts_with("VACUUM") || disturbance.starts_with("CREATE ROLE") {
            continue;
        }
        let halves = |rows: i32| {
            format!(
                "DO $do$ BEGIN
                   UPDATE t SET v = 0 WHERE id <= 3;
                   {disturbance};
                   UPDATE t SET v = 0 WHERE id <= {rows};
                 END $do$"
            )
        };
        refuse(&mut client, &halves(3));
        pass(&mut client, &halves(2));
    }
}

#[test]
fn table_that_gets_a_covered_parent_is_covered_at_once() {
    let mut stage = Stage::new();
    stage.create(
        "CREATE TABLE measure (id int, v int NOT NULL DEFAULT 0) PARTITION BY RANGE (id);
         CREATE TABLE base (id int, v int NOT NULL DEFAULT 0);
         CREATE TABLE part (LIKE measure);
         CREATE TABLE child (LIKE base);
         CREATE TABLE branch (LIKE measure) PARTITION BY RANGE (id);
         CREATE TABLE leaf PARTITION OF branch FOR VALUES FROM (2001) TO (3001);
         CREATE TABLE middle (LIKE base);
         CREATE TABLE grandchild () INHERITS (middle);
         INSERT INTO part SELECT i, 0 FROM generate_series(1, 100) AS i;
         INSERT INTO leaf SELECT i + 2000, 0 FROM generate_series(1, 100) AS i;
         INSERT INTO child TABLE part;
         INSERT INTO grandchild TABLE part",
    );
    stage.policy("'m', tables => '{public.measure, public.base}', max_rows => 5");
    let mut client = stage.client();
    for (table, attach, detach) in [
        (
            "part",
            "ALTER TABLE measure ATTACH PARTITION part FOR VALUES FROM (1) TO (1001)",
            "ALTER TABLE measure DETACH PARTITION part",
        ),
        (
            "leaf",
            "ALTER TABLE measure ATTACH PARTITION branch FOR VALUES FROM (2001) TO (3001)",
            "ALTER TABLE measure DETACH PARTITION branch",
        ),
        ("child", "ALTER TABLE child INHERIT base", "ALTER TABLE child NO INHERIT base"),
        ("grandchild", "ALTER TABLE middle INHERIT base", "ALTER TABLE middle NO INHERIT base"),
    ] {
        let write = |rows: i32| format!("UPDATE {table} SET v = 0 WHERE id % 1000 <= {rows}");
        for _ in 0..2 {
            pass(&mut client, &write(100));
            pass(&mut stage.admin, attach);
            refuse(&mut client, &write(6));
            pass(&mut client, &write(5));
            pass(&mut stage.admin, detach);
        }
        pass(&mut client, &write(100));
    }
}

#[test]
fn limit_among_two_thousand_policies_of_other_tables() {
    let mut stage = Stage::new();
    let mut client = stage.client();
    pass(&mut client, FIVE);
    pass(
        &mut client,
        "DO $$ BEGIN FOR i IN 1..2000 LOOP
           EXECUTE format('CREATE TABLE x%s (id int, v int)', i);
         END LOOP; END $$;
         INSERT INTO x1999 SELECT i, 0 FROM generate_series(1, 10) AS i",
    );
    pass(
        &mut stage.admin,
        "INSERT INTO writeguard.policy (name, tables, max_rows)
         SELECT 'x' || i, ARRAY['public.x' || i], 3 FROM generate_series(1, 2000) AS i",
    );
    for client in [&mut client, &mut stage.client()] {
        refuse(client, SIX);
        pass(client, FIVE);
        pass(client, "UPDATE u SET v = 1");
        refuse(client, "UPDATE x1999 SET v = 1 WHERE id <= 4");
        pass(client, "UPDATE x1999 SET v = 1 WHERE id <= 3");
    }
    stage.assert_unchanged();
}

/// A policy that comes while another session finds out what covers a table: that session's answer must not outlive it.
#[test]
fn policy_set_while_a_first_write_is_looked_up_holds_for_the_next() {
    let mut stage = Stage::new();
    let mut other = stage.db.admin();
    pass(&mut other, "CREATE TABLE late AS SELECT n AS id, 0 AS v FROM generate_series(1, 9) AS n");
    pass(&mut other, "BEGIN; LOCK TABLE pg_inherits IN ACCESS EXCLUSIVE MODE");
    let mut writer = stage.db.admin();
    let pid = writer.query_one("SELECT pg_backend_pid()", &[]).unwrap().get::<_, i32>(0);
    let thread = std::thread::spawn(move || {
        let first = writer.batch_execute("UPDATE late SET v = 1");
        (writer, first)
    });
    let waits = "SELECT count(*) FROM pg_locks WHERE pid = $1 AND NOT granted";
    wait_until(10, || stage.admin.query_one(waits, &[&pid]).unwrap().get::<_, i64>(0) == 1);
    pass(&mut other, "SELECT writeguard.set_policy('late', tables => '{public.late}', max_rows => 0); COMMIT");
    let (mut writer, _first) = thread.join().unwrap();
    refuse(&mut writer, "UPDATE late SET v = 2");
}

#[test]
fn loops_of_a_held_cursor_that_a_commit_runs_are_one_statement() {
    let mut stage = Stage::new();
    stage.create(
        "CREATE FUNCTION one(i int) RETURNS int LANGUAGE plpgsql
         AS 'BEGIN UPDATE t SET v = v + 1 WHERE id = i; RETURN i; END';
         CREATE FUNCTION five(k int) RETURNS int LANGUAGE plpgsql AS $$
         DECLARE r record; BEGIN
             FOR r IN SELECT one(i) FROM generate_series(k * 5 + 1, k * 5 + 5) AS i LOOP END LOOP;
             RETURN k;
         END $$",
    );
    let mut client = stage.client();
    refuse(&mut client, "SELECT five(k) FROM generate_series(0, 3) AS k");
    pass(&mut client, "BEGIN; DECLARE c CURSOR WITH HOLD FOR SELECT five(k) FROM generate_series(0, 3) AS k");
    refuse(&mut client, "COMMIT");
    stage.assert_unchanged();
}

#[test]
fn request_does_not_count_what_the_transaction_deferred_before() {
    let mut stage = Stage::new();
    pass(
        &mut stage.admin,
        "CREATE TABLE log (n int); INSERT INTO log SELECT generate_series(1, 9);
         CREATE TABLE source (n int); INSERT INTO source SELECT generate_series(1, 3);
         CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql
         AS 'BEGIN UPDATE log SET n = n WHERE n = NEW.n; RETURN NULL; END';
         CREATE CONSTRAINT TRIGGER note AFTER UPDATE ON source DEFERRABLE INITIALLY DEFERRED
         FOR EACH ROW EXECUTE FUNCTION note();
         SELECT writeguard.set_policy('log', tables => '{public.log}', max_rows => 5);
         BEGIN; UPDATE source SET n = n;
         SELECT writeguard.request('UPDATE t SET v = 7 WHERE id <= 6', 'why'); COMMIT",
    );
    let relations = "SELECT relations::text FROM writeguard.request";
    assert_eq!(stage.admin.query_one(relations, &[]).unwrap().get::<_, String>(0), r#"{"public.t": 6}"#);
}

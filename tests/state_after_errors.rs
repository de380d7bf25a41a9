//! After a refusal, wherever it came from, a session is as it was: the next statement counts from zero, the
//! transaction's budget is what is left of it, and however often it happens no process grows.

use std::sync::OnceLock;

use crate::common::session::{number, pass};
use crate::common::{Database, Refusal, Server, expect_refusal, wait_until};
use postgres::Client;

/// A server whose refused writes do not wait for their events, which would take most of the time.
fn server() -> &'static Server {
    static SERVER: OnceLock<Server> = OnceLock::new();
    SERVER.get_or_init(|| Server::start(&["writeguard.event_timeout = 0"]))
}

/// Tables, and functions that change them in several ways; `t` and what refers to it are covered by one policy, with
/// three rows per statement and eight per transaction.
const SETUP: &str = "
    CREATE TABLE t (id int PRIMARY KEY, v int NOT NULL DEFAULT 0);
    INSERT INTO t SELECT i, 0 FROM generate_series(1, 6) AS i;
    CREATE TABLE child (id int PRIMARY KEY, t int REFERENCES t ON UPDATE CASCADE ON DELETE CASCADE);
    INSERT INTO child SELECT i, 1 FROM generate_series(1, 6) AS i;
    CREATE TABLE source (id int);
    INSERT INTO source SELECT i FROM generate_series(1, 6) AS i;
    CREATE VIEW w AS SELECT * FROM t;
    CREATE FUNCTION touch(x int) RETURNS int LANGUAGE sql AS 'UPDATE t SET v = v + 1 WHERE id = x RETURNING id';
    CREATE FUNCTION deeper(n int) RETURNS int LANGUAGE plpgsql AS $$
    BEGIN
      PERFORM touch(n);
      BEGIN IF n < 6 THEN PERFORM deeper(n + 1); END IF; END;
      RETURN n;
    END $$;
    CREATE FUNCTION caught(n int) RETURNS int LANGUAGE plpgsql AS $$
    BEGIN
      BEGIN
        BEGIN UPDATE t SET v = 7; EXCEPTION WHEN division_by_zero THEN RAISE 'no'; END;
      EXCEPTION WHEN SQLSTATE 'WG001' THEN RAISE EXCEPTION USING ERRCODE = 'WG001', MESSAGE = 'again';
      END;
      RETURN n;
    END $$;
    CREATE FUNCTION follow() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM touch(NEW.id); RETURN NEW; END';
    CREATE TRIGGER follow BEFORE INSERT ON source FOR EACH ROW EXECUTE FUNCTION follow();
    CREATE TABLE later (id int);
    CREATE CONSTRAINT TRIGGER follow AFTER INSERT ON later DEFERRABLE INITIALLY IMMEDIATE
      FOR EACH ROW EXECUTE FUNCTION follow();
    CREATE PROCEDURE steps() LANGUAGE plpgsql AS
    'BEGIN UPDATE t SET v = v WHERE id <= 3; COMMIT; UPDATE t SET v = 7; END';";

const POLICY: &str = "SELECT writeguard.set_policy('p', tables => '{public.t,public.child}', max_rows => 3,
                                                  max_rows_per_transaction => 8)";

/// Each would change more than three rows.
const WAYS: [&str; 20] = [
    "UPDATE t SET v = 7",
    "DELETE FROM child",
    "UPDATE w SET v = 7",
    "UPDATE t SET id = 100 WHERE id = 1",
    "DELETE FROM t WHERE id = 1",
    "WITH a AS (UPDATE t SET v = 7 WHERE id <= 2 RETURNING 1), b AS (DELETE FROM child RETURNING 1) SELECT 1",
    "MERGE INTO t USING source AS s ON t.id = s.id WHEN MATCHED THEN UPDATE SET v = 7",
    "INSERT INTO t SELECT i, 1 FROM generate_series(1, 6) AS i ON CONFLICT (id) DO UPDATE SET v = 7",
    "SELECT touch(id) FROM source",
    "SELECT deeper(1)",
    "SELECT caught(1)",
    "DO $$ BEGIN PERFORM deeper(1); END $$",
    "DO $$ BEGIN EXECUTE 'UPDATE t SET v = 7'; EXCEPTION WHEN division_by_zero THEN NULL; END $$",
    "INSERT INTO source SELECT i FROM generate_series(1, 6) AS i",
    "INSERT INTO later SELECT i FROM generate_series(1, 6) AS i",
    "EXPLAIN ANALYZE UPDATE t SET v = 7",
    "CREATE TABLE made AS SELECT touch(id) FROM source",
    "COPY (UPDATE t SET v = 7 RETURNING id) TO '/dev/null'",
    "DECLARE c CURSOR FOR SELECT touch(id) FROM source; FETCH 3 FROM c; FETCH ALL FROM c; MOVE BACKWARD ALL FROM c; \
     UPDATE t SET v = 7",
    "PREPARE s AS UPDATE t SET v = 7; EXECUTE s",
];

struct Stage {
    db: Database,
    admin: Client,
}

impl Stage {
    fn on(server: &Server) -> Stage {
        let db = server.database();
        let mut admin = db.admin();
        pass(&mut admin, SETUP);
        pass(&mut admin, POLICY);
        Stage { db, admin }
    }

    fn new() -> Stage {
        Stage::on(server())
    }

    #[track_caller]
    fn number(&mut self, sql: &str) -> i64 {
        number(&mut self.admin, sql)
    }

    #[track_caller]
    fn assert_unchanged(&mut self) {
        let sql = "(SELECT sum(v) + count(*) FROM t) + (SELECT count(*) FROM child) + (SELECT count(*) FROM source)
                   + (SELECT count(*) FROM later)";
        assert_eq!(self.number(sql), 18);
    }
}

#[track_caller]
fn refuse(client: &mut Client, sql: &str) -> Refusal {
    let refusal = match client.batch_execute(sql) {
        Ok(()) => panic!("it passed: {sql}"),
        Err(error) => Refusal::of(&error),
    };
    assert!(["WG001", "WG005"].contains(&refusal.sqlstate.as_str()), "{sql}: {refusal:?}");
    refusal
}

const TWO: &str = "UPDATE t SET v = v WHERE id <= 2";
const THREE: &str = "UPDATE t SET v = v WHERE id <= 3";

/// So many rows, and no more, are left of the transaction's budget. The transaction is over afterwards.
#[track_caller]
fn assert_left(client: &mut Client, rows: usize, what: &str) {
    for row in 0..rows {
        if let Err(error) = client.batch_execute("UPDATE t SET v = v WHERE id = 1") {
            panic!("only {row} of {rows} were left after {what}: {:?}", Refusal::of(&error));
        }
    }
    let refusal = expect_refusal(client.batch_execute("UPDATE t SET v = v WHERE id = 1"));
    assert_eq!(refusal.sqlstate, "WG001", "{what}: {refusal:?}");
    assert!(refusal.said().ends_with("per transaction"), "{what}: {refusal:?}");
    pass(client, "ROLLBACK");
}

#[test]
fn after_a_refusal_of_any_kind_the_next_statement_counts_from_zero() {
    let mut stage = Stage::new();
    let mut client = stage.db.admin();
    for sql in WAYS {
        for _ in 0..2 {
            refuse(&mut client, sql);
            pass(&mut client, "ROLLBACK; DEALLOCATE ALL");
            pass(&mut client, THREE);
            refuse(&mut client, "UPDATE t SET v = 7 WHERE id <= 4");
            pass(&mut client, &format!("{THREE}; {THREE}; {TWO}"));
        }
    }
    stage.assert_unchanged();
    // Each would have passed with a limit of its own size.
    pass(&mut stage.admin, "SELECT writeguard.set_policy('p', tables => '{public.t,public.child}', max_rows => 100)");
    for sql in WAYS {
        pass(&mut client, "BEGIN");
        pass(&mut client, sql);
        pass(&mut client, "ROLLBACK; DEALLOCATE ALL");
    }
}

#[test]
fn after_a_refusal_in_a_savepoint_the_transaction_has_what_it_had_left() {
    let mut stage = Stage::new();
    let mut client = stage.db.admin();
    for sql in WAYS {
        pass(&mut client, &format!("BEGIN; {TWO}; SAVEPOINT a; SAVEPOINT b; {TWO}; RELEASE b"));
        for _ in 0..3 {
            pass(&mut client, "SAVEPOINT c");
            refuse(&mut client, sql);
            pass(&mut client, "ROLLBACK TO c; DEALLOCATE ALL");
        }
        pass(&mut client, TWO);
        pass(&mut client, "ROLLBACK TO a");
        assert_left(&mut client, 6, sql);
    }
    stage.assert_unchanged();
}

#[test]
fn after_a_refusal_that_a_block_caught_the_statement_and_the_transaction_have_what_they_had_left() {
    let mut stage = Stage::new();
    let mut client = stage.db.admin();
    for sql in WAYS.iter().filter(|sql| !sql.contains("FETCH") && !sql.contains("PREPARE")) {
        let block = |rows: i32| {
            format!(
                "DO $do$ BEGIN
                   UPDATE t SET v = v WHERE id = 1;
                   FOR i IN 1..3 LOOP
                     BEGIN
                       BEGIN EXECUTE $x$ {sql} $x$; EXCEPTION WHEN division_by_zero THEN NULL; END;
                       RAISE 'it passed';
                     EXCEPTION WHEN SQLSTATE 'WG001' THEN NULL;
                     END;
                   END LOOP;
                   UPDATE t SET v = v WHERE id <= {rows};
                 END $do$"
            )
        };
        refuse(&mut client, &block(3));
        pass(&mut client, &format!("BEGIN; {}", block(2)));
        assert_left(&mut client, 5, sql);
    }
    stage.assert_unchanged();
}

#[test]
fn after_a_refusal_behind_a_commit_of_a_procedure_the_next_statement_counts_from_zero() {
    let mut stage = Stage::new();
    let mut client = stage.db.admin();
    for sql in [
        "CALL steps()",
        "DO $$ BEGIN CALL steps(); END $$",
        "DO $$ BEGIN UPDATE t SET v = v WHERE id <= 3; COMMIT; UPDATE t SET v = v WHERE id <= 3; ROLLBACK;
           UPDATE t SET v = v WHERE id <= 3; COMMIT; PERFORM deeper(1); END $$",
        "DO $$ BEGIN FOR i IN 1..5 LOOP
             BEGIN UPDATE t SET v = 7; EXCEPTION WHEN SQLSTATE 'WG001' THEN NULL; END;
             UPDATE t SET v = v WHERE id <= 3;
             COMMIT;
           END LOOP; UPDATE t SET v = 7; END $$",
    ] {
        for _ in 0..2 {
            refuse(&mut client, sql);
            pass(&mut client, THREE);
            refuse(&mut client, "UPDATE t SET v = 7 WHERE id <= 4");
            pass(&mut client, &format!("BEGIN; {TWO}"));
            assert_left(&mut client, 6, sql);
        }
    }
    stage.assert_unchanged();
}

#[test]
fn after_a_refusal_in_a_portal_the_next_portal_counts_from_zero() {
    let mut stage = Stage::new();
    let mut client = stage.db.admin();
    for sql in ["SELECT touch(id) FROM source", "UPDATE t SET v = v RETURNING id", "SELECT deeper(id) FROM source"] {
        for _ in 0..3 {
            let mut transaction = client.transaction().unwrap();
            let portal = transaction.bind(sql, &[]).unwrap();
            let mut results = (0..6).map(|_| transaction.query_portal(&portal, 1));
            let refusal = results.find_map(Result::err).map(|error| Refusal::of(&error));
            drop(results);
            assert_eq!(refusal.unwrap().sqlstate, "WG001", "{sql}");
            transaction.rollback().unwrap();
            pass(&mut client, &format!("BEGIN; {THREE}"));
            assert_left(&mut client, 5, sql);
        }
    }
    stage.assert_unchanged();
}

// However often.

/// Memory of this session in bytes: what its contexts hold, and what the process has of its own.
#[derive(Clone, Copy, Debug)]
struct Memory {
    contexts: i64,
    process: i64,
}

/// What an allocator may add without anything being kept: a block more of a context that doubles them, and pages
/// that it has not given back.
const SLACK: i64 = 1024 * 1024;

impl Memory {
    #[track_caller]
    fn of(client: &mut Client) -> Memory {
        let contexts = number(client, "SELECT sum(total_bytes) FROM pg_backend_memory_contexts");
        let process =
            number(client, r"1024 * substring(pg_read_file('/proc/self/status') FROM 'RssAnon:\s+(\d+) kB')::bigint");
        Memory { contexts, process }
    }

    #[track_caller]
    fn assert_flat(self, client: &mut Client) {
        let now = Memory::of(client);
        assert!(now.contexts - self.contexts < SLACK / 3, "{self:?}, then {now:?}");
        assert!(now.process - self.process < SLACK, "{self:?}, then {now:?}");
    }
}

/// The private memory of the background processes, in bytes: of the launcher, and of a database's worker.
#[track_caller]
fn background(admin: &mut Client) -> (i64, i64) {
    let mut of = |kind: &str| {
        let sql = format!(
            r"coalesce((SELECT 1024 * substring(pg_read_file('/proc/' || pid || '/status')
                                                FROM 'RssAnon:\s+(\d+) kB')::bigint
               FROM pg_stat_activity WHERE backend_type = 'pg_writeguard {kind}'
                 AND (datname = current_database() OR datname IS NULL) LIMIT 1), 0)"
        );
        number(admin, &sql)
    };
    (of("launcher"), of("worker"))
}

/// Does something so often to warm up, and then so often again without growing. What is kept grows in each of the
/// rounds; an allocator that lays its pages out in another way does so once.
#[track_caller]
fn flat(client: &mut Client, warm: usize, times: usize, mut action: impl FnMut(&mut Client)) {
    let mut memory = vec![Memory::of(client)];
    for _ in 0..warm {
        action(client);
    }
    for _ in 0..3 {
        let before = Memory::of(client);
        for _ in 0..times {
            action(client);
        }
        let now = Memory::of(client);
        memory.extend([before, now]);
        assert!(now.contexts - before.contexts < SLACK / 3, "{memory:?}");
        if now.process - before.process < SLACK {
            return;
        }
    }
    panic!("{memory:?}");
}

#[test]
fn ten_thousand_refused_statements_grow_neither_session_nor_worker() {
    let server = Server::start(&["writeguard.event_timeout = '5min'", "writeguard.blocked_per_minute = 1000000"]);
    let mut stage = Stage::on(&server);
    let mut client = stage.db.admin();
    let mut count = 0;
    let mut refused = |client: &mut Client| {
        count += 1;
        assert_eq!(expect_refusal(client.batch_execute("UPDATE t SET v = 7")).sqlstate, "WG001");
    };
    for _ in 0..3_000 {
        refused(&mut client);
    }
    let (launcher, worker) = background(&mut stage.admin);
    flat(&mut client, 0, 7_000, &mut refused);
    let (launcher_then, worker_then) = background(&mut stage.admin);
    assert!(launcher > 0 && launcher_then - launcher < SLACK, "the launcher: {launcher}, then {launcher_then}");
    assert!(worker > 0 && worker_then - worker < SLACK, "the worker: {worker}, then {worker_then}");
    let blocked = "SELECT count(*) FROM writeguard.event WHERE kind = 'blocked'";
    assert_eq!(stage.number(blocked), count);
    assert_eq!(stage.number("SELECT late + in_log_only FROM writeguard.event_queue"), 0);
    wait_until(20, || stage.number("SELECT waiting FROM writeguard.event_queue") == 0);
    stage.assert_unchanged();
}

#[test]
fn ten_thousand_refusals_caught_in_one_transaction_do_not_grow_the_session() {
    let stage = Stage::new();
    let mut client = stage.db.admin();
    let block = "DO $$ BEGIN
        FOR i IN 1..1000 LOOP
          BEGIN PERFORM deeper(1); EXCEPTION WHEN SQLSTATE 'WG001' THEN NULL; END;
          BEGIN UPDATE t SET v = 7; EXCEPTION WHEN SQLSTATE 'WG001' THEN NULL; END;
        END LOOP;
      END $$";
    pass(&mut client, "BEGIN");
    flat(&mut client, 2, 5, |client| pass(client, block));
    pass(&mut client, TWO);
    assert_left(&mut client, 6, "10,000 refusals");
}

#[test]
fn ten_thousand_passing_writes_do_not_grow_the_session() {
    let stage = Stage::new();
    let mut client = stage.db.admin();
    let statement = client.prepare("UPDATE t SET v = v WHERE id <= $1").unwrap();
    flat(&mut client, 1_000, 5_000, |client| assert_eq!(client.execute(&statement, &[&3]).unwrap(), 3));
    flat(&mut client, 1_000, 5_000, |client| pass(client, "UPDATE t SET v = v WHERE id <= 3"));
}

#[test]
fn two_thousand_savepoints_with_refusals_do_not_grow_the_session() {
    let stage = Stage::new();
    let mut client = stage.db.admin();
    let savepoint = |client: &mut Client| {
        pass(client, "SAVEPOINT a");
        refuse(client, "UPDATE t SET v = 7");
        pass(client, "ROLLBACK TO a; RELEASE a");
    };
    pass(&mut client, &format!("BEGIN; {TWO}"));
    flat(&mut client, 500, 2_000, savepoint);
    assert_left(&mut client, 6, "2,000 savepoints");
}

#[test]
fn two_thousand_open_savepoints_leave_nothing_behind() {
    let stage = Stage::new();
    let mut client = stage.db.admin();
    flat(&mut client, 4, 4, |client| {
        pass(client, "BEGIN; UPDATE t SET v = v WHERE id = 1");
        for depth in 0..2_000 {
            pass(client, &format!("SAVEPOINT s{depth}"));
            if depth % 400 == 0 {
                pass(client, "UPDATE t SET v = v WHERE id = 1");
            }
        }
        refuse(client, "UPDATE t SET v = 7");
        pass(client, "ROLLBACK TO s1999; RELEASE s1000; ROLLBACK TO s401");
        assert_left(client, 5, "2,000 open savepoints");
    });
}

#[test]
fn two_thousand_refused_truncates_do_not_grow_the_session() {
    let mut stage = Stage::new();
    let mut client = stage.db.admin();
    flat(&mut client, 500, 2_000, |client| {
        assert_eq!(refuse(client, "TRUNCATE t, child").sqlstate, "WG005");
    });
    stage.assert_unchanged();
}

#[test]
fn a_thousand_policy_changes_do_not_grow_the_session_or_others() {
    let stage = Stage::new();
    let (mut client, mut other) = (stage.db.admin(), stage.db.admin());
    let mut round = 0;
    let mut change = |client: &mut Client, other: &mut Client| {
        round += 1;
        let rows = 1 + round % 3;
        pass(client, &format!("SELECT writeguard.set_policy('p', tables => '{{public.t}}', max_rows => {rows})"));
        pass(client, &format!("UPDATE t SET v = v WHERE id <= {rows}"));
        pass(other, &format!("UPDATE t SET v = v WHERE id <= {rows}"));
        if round % 10 == 0 {
            refuse(client, &format!("UPDATE t SET v = v WHERE id <= {}", rows + 1));
            refuse(other, &format!("UPDATE t SET v = v WHERE id <= {}", rows + 1));
        }
    };
    for _ in 0..300 {
        change(&mut client, &mut other);
    }
    let _ = (Memory::of(&mut client), Memory::of(&mut other));
    let before = (Memory::of(&mut client), Memory::of(&mut other));
    for _ in 0..1_000 {
        change(&mut client, &mut other);
    }
    before.0.assert_flat(&mut client);
    before.1.assert_flat(&mut other);
}

#[test]
fn a_thousand_portals_left_half_fetched_do_not_grow_the_session() {
    let stage = Stage::new();
    let mut client = stage.db.admin();
    flat(&mut client, 1, 3, |client| {
        for _ in 0..10 {
            let mut transaction = client.transaction().unwrap();
            for _ in 0..50 {
                let mut inner = transaction.transaction().unwrap();
                let portal = inner.bind("SELECT touch(id) FROM source", &[]).unwrap();
                assert_eq!(inner.query_portal(&portal, 2).unwrap().len(), 2);
                assert_eq!(inner.query_portal(&portal, 1).unwrap().len(), 1);
                inner.rollback().unwrap();
            }
            transaction.rollback().unwrap();
        }
    });
}

#[test]
fn covered_tables_that_come_and_go_do_not_grow_the_session() {
    let mut stage = Stage::new();
    pass(&mut stage.admin, "SELECT writeguard.set_policy('all', tables => '{public.come*}', max_rows => 3)");
    let mut client = stage.db.admin();
    let comes = |client: &mut Client| {
        let sql = "CREATE TABLE comes (n int); INSERT INTO comes VALUES (1); UPDATE comes SET n = 2; DROP TABLE comes";
        pass(client, sql);
    };
    for _ in 0..300 {
        comes(&mut client);
    }
    let before = Memory::of(&mut client);
    for _ in 0..1_200 {
        comes(&mut client);
    }
    // The contexts are PostgreSQL's: its caches remember tables that are gone.
    let now = Memory::of(&mut client);
    let ours = (now.process - now.contexts) - (before.process - before.contexts);
    assert!(ours < SLACK, "{before:?}, then {now:?}");
}

//! Limits hold however a write is cut into pieces: loops, cursors, savepoints, exception blocks that swallow refusals,
//! procedures, pipelines, and functions that are called from wherever PostgreSQL evaluates something.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::Duration;

use crate::common::limits::{Bed, number, pass, refuse};
use crate::common::{Server, asserting, expect_refusal};

/// Twelve rows with the value 0 in `t` and in `u`, with functions that change one and three of `t`'s rows.
const TWELVE: &str = "
    CREATE TABLE t (id int PRIMARY KEY, v int NOT NULL DEFAULT 0);
    INSERT INTO t SELECT i, 0 FROM generate_series(1, 12) AS i;
    CREATE TABLE u AS TABLE t;
    CREATE FUNCTION touch(i int) RETURNS int LANGUAGE plpgsql
    AS 'BEGIN UPDATE public.t SET v = v + 1 WHERE id = i; RETURN i; END';
    CREATE FUNCTION three(k int) RETURNS int LANGUAGE plpgsql
    AS 'BEGIN UPDATE t SET v = v + 1 WHERE id > k * 3 AND id <= k * 3 + 3; RETURN k; END';
    CREATE FUNCTION quiet(i int) RETURNS int LANGUAGE plpgsql IMMUTABLE
    AS 'BEGIN RETURN public.touch(i); END';";

/// A bed whose writer is an ordinary role that owns all tables.
fn owned(setup: &str) -> Bed {
    let mut bed = Bed::new("");
    let owner = bed.db().role("owner");
    let name = bed.db().name.clone();
    pass(
        &mut bed.reader,
        &format!("GRANT CREATE ON SCHEMA public TO {owner}; GRANT CREATE ON DATABASE {name} TO {owner}"),
    );
    bed.writer = bed.db().connect(&owner);
    bed.passes(setup);
    bed
}

fn twelve() -> Bed {
    owned(TWELVE)
}

/// A second session of the owner of the tables.
fn another(bed: &mut Bed) -> postgres::Client {
    let owner: String = bed.writer.query_one("SELECT current_user::text", &[]).unwrap().get(0);
    bed.db().connect(&owner)
}

/// How many rows of `t` have been changed, as the second session sees it.
fn sum(bed: &mut Bed) -> i64 {
    bed.number("SELECT sum(v) FROM t")
}

fn blocked(bed: &mut Bed) -> i64 {
    bed.number("SELECT count(*) FROM writeguard.event WHERE kind = 'blocked'")
}

/// Each needs a limit of exactly so many rows of `t`.
#[track_caller]
fn each_exactly(bed: &mut Bed, ways: &[(&str, u64)]) {
    for (sql, rows) in ways {
        bed.exactly("{public.t}", sql, *rows);
    }
}

/// The same for what PostgreSQL evaluates as often as it sees fit, but not less often than that.
#[track_caller]
fn exactly_as_often(bed: &mut Bed, sql: &str, least: i64) {
    bed.limit("{public.t}", 1000);
    let before = sum(bed);
    bed.passes(sql);
    let rows = sum(bed) - before;
    assert!(rows >= least, "{sql}: only {rows} rows");
    bed.exactly("{public.t}", sql, u64::try_from(rows).unwrap());
}

/// Rows of `t` as they were at the start.
fn restore(bed: &mut Bed) {
    pass(
        &mut bed.reader,
        "SET writeguard.enabled = off; DELETE FROM t; INSERT INTO t SELECT i, 0 FROM generate_series(1, 12) AS i;
         RESET writeguard.enabled",
    );
}

// Loops, recursion, dynamic commands

#[test]
fn commands_inside_commands_are_one_statement() {
    each_exactly(
        &mut twelve(),
        &[
            (
                "DO $$ BEGIN EXECUTE 'UPDATE t SET v = v + 1 WHERE id <= 4;
                     UPDATE t SET v = v + 1 WHERE id > 8'; END $$",
                8,
            ),
            (
                "DO $a$ BEGIN FOR i IN 1..4 LOOP
                     EXECUTE format('DO $b$ BEGIN EXECUTE $c$SELECT three(%s)$c$; END $b$', i - 1);
                 END LOOP; END $a$",
                12,
            ),
            ("DO $$ DECLARE i int := 1; BEGIN WHILE i <= 7 LOOP PERFORM touch(i); i := i + 1; END LOOP; END $$", 7),
            (
                "DO $$ DECLARE i int; BEGIN FOREACH i IN ARRAY '{1,2,3,5}'::int[] LOOP
                     UPDATE t SET v = i WHERE id = i; END LOOP; END $$",
                4,
            ),
        ],
    );
}

#[test]
fn recursion_is_one_statement() {
    let mut bed = twelve();
    bed.passes(
        "CREATE FUNCTION down(i int) RETURNS void LANGUAGE plpgsql AS $$
         BEGIN UPDATE t SET v = v + 1 WHERE id = i; IF i > 1 THEN PERFORM down(i - 1); END IF; END $$;
         CREATE FUNCTION even(i int) RETURNS void LANGUAGE plpgsql AS 'BEGIN END';
         CREATE FUNCTION odd(i int) RETURNS void LANGUAGE sql
         AS 'UPDATE t SET v = v + 1 WHERE id = i; SELECT even(i - 1)';
         CREATE OR REPLACE FUNCTION even(i int) RETURNS void LANGUAGE plpgsql AS $$
         BEGIN IF i > 0 THEN UPDATE t SET v = v + 1 WHERE id = i; PERFORM odd(i - 1); END IF; END $$",
    );
    each_exactly(&mut bed, &[("SELECT down(9)", 9), ("SELECT odd(7)", 7), ("SELECT even(12)", 12)]);
}

/// Each change of a row in one table changes the next row of the other.
#[test]
fn triggers_that_call_each_other_are_one_statement() {
    let mut bed = twelve();
    bed.passes(
        "CREATE FUNCTION pass_on() RETURNS trigger LANGUAGE plpgsql AS $$
         BEGIN EXECUTE format('UPDATE %I SET v = v + 1 WHERE id = $1', TG_ARGV[0]) USING NEW.id + 1; RETURN NEW; END $$;
         CREATE TRIGGER there BEFORE UPDATE ON t FOR EACH ROW EXECUTE FUNCTION pass_on('u');
         CREATE TRIGGER back AFTER UPDATE ON u FOR EACH ROW EXECUTE FUNCTION pass_on('t')",
    );
    bed.exactly("{public.t, public.u}", "UPDATE t SET v = v + 1 WHERE id = 2", 11);
    bed.exactly("{public.u}", "UPDATE t SET v = v + 1 WHERE id = 2", 5);
    bed.exactly("{public.t}", "UPDATE t SET v = v + 1 WHERE id IN (1, 2)", 12);
}

#[test]
fn a_string_of_small_commands_counts_for_the_transaction() {
    let mut bed = twelve();
    let ones: Vec<String> = (1..=7).map(|id| format!("UPDATE t SET v = v + 1 WHERE id = {id}")).collect();
    let string = ones.join("; ");
    bed.policy("tables => '{public.t}', max_rows => 1, max_rows_per_transaction => 6");
    bed.refused(&string);
    bed.refused(&format!("BEGIN; {string}; COMMIT"));
    bed.refused(&string.replace("; ", "; SELECT 1; "));
    bed.refused("PREPARE p AS SELECT three(1); EXECUTE p; EXECUTE p; EXECUTE p");
    bed.policy("tables => '{public.t}', max_rows => 1, max_rows_per_transaction => 7");
    bed.passes(&string);
    bed.passes(&format!("BEGIN; {string}; COMMIT"));
    assert_eq!(sum(&mut bed), 14);
}

// Cursors

#[test]
fn moving_and_closing_cursors_in_a_function_is_one_statement() {
    each_exactly(
        &mut twelve(),
        &[
            (
                "DO $$ DECLARE c refcursor; BEGIN
                     OPEN c NO SCROLL FOR SELECT touch(i) FROM generate_series(1, 9) AS i;
                     MOVE FORWARD 4 FROM c; MOVE FORWARD ALL FROM c; CLOSE c;
                 END $$",
                9,
            ),
            (
                "DO $$ DECLARE c refcursor; n int; BEGIN
                     FOR k IN 0..2 LOOP
                         OPEN c FOR EXECUTE 'SELECT touch(i) FROM generate_series($1, 12) AS i' USING k * 4 + 1;
                         FETCH c INTO n; FETCH c INTO n; CLOSE c;
                     END LOOP;
                 END $$",
                6,
            ),
            (
                "DO $$ DECLARE c CURSOR FOR SELECT id FROM t ORDER BY id FOR UPDATE; n int; BEGIN
                     OPEN c;
                     FOR k IN 1..5 LOOP
                         MOVE FORWARD 1 FROM c; FETCH c INTO n; UPDATE t SET v = v + 1 WHERE CURRENT OF c;
                     END LOOP;
                     CLOSE c;
                 END $$",
                5,
            ),
            (
                "DO $$ DECLARE r record; BEGIN FOR r IN SELECT three(i)
                     FROM generate_series(0, 3) AS i LOOP EXIT; END LOOP; END $$",
                3,
            ),
            (
                "DO $$ DECLARE r record; BEGIN FOR r IN UPDATE t SET v = v + 1 RETURNING id LOOP EXIT;
                     END LOOP; END $$",
                12,
            ),
        ],
    );
}

/// The function that opens the cursor is over when the client reads from it.
#[test]
fn a_cursor_that_a_function_opened_counts_for_each_fetch_and_for_the_transaction() {
    let mut bed = twelve();
    bed.passes(
        "CREATE FUNCTION opened() RETURNS refcursor LANGUAGE plpgsql AS $$
         DECLARE c refcursor := 'c'; BEGIN OPEN c FOR SELECT touch(i) FROM generate_series(1, 12) AS i;
              RETURN c; END $$",
    );
    let open = "BEGIN; SELECT opened();";
    bed.limit("{public.t}", 3);
    bed.refused(&format!("{open} FETCH 4 FROM c; COMMIT"));
    bed.refused(&format!("{open} FETCH 3 FROM c; MOVE 4 FROM c; COMMIT"));
    bed.passes(&format!("{open} FETCH 3 FROM c; MOVE 3 FROM c; FETCH 3 FROM c; CLOSE c; COMMIT"));
    bed.policy("tables => '{public.t}', max_rows => 3, max_rows_per_transaction => 8");
    bed.refused(&format!("{open} FETCH 3 FROM c; MOVE 3 FROM c; FETCH 3 FROM c; COMMIT"));
    bed.passes(&format!("{open} FETCH 3 FROM c; MOVE 3 FROM c; FETCH 2 FROM c; COMMIT"));
    assert_eq!(sum(&mut bed), 17);
}

/// One that updates gives its rows at the first FETCH, and changes them all then.
#[test]
fn a_cursor_over_an_update_is_run_whole_by_its_first_fetch() {
    let mut bed = twelve();
    bed.passes(
        "CREATE FUNCTION opened() RETURNS refcursor LANGUAGE plpgsql AS $$
         DECLARE c refcursor := 'c'; BEGIN OPEN c FOR EXECUTE 'UPDATE t SET v = v + 1 RETURNING id'; RETURN c; END $$",
    );
    bed.exactly("{public.t}", "BEGIN; SELECT opened(); FETCH 1 FROM c; COMMIT", 12);
}

#[test]
fn where_current_of_row_by_row_counts_for_the_transaction() {
    let mut bed = twelve();
    let step = "FETCH c; UPDATE t SET v = v + 1 WHERE CURRENT OF c;";
    let open = "BEGIN; DECLARE c CURSOR FOR SELECT * FROM t ORDER BY id FOR UPDATE;";
    bed.policy("tables => '{public.t}', max_rows => 1, max_rows_per_transaction => 4");
    bed.refused(&format!("{open} {} COMMIT", step.repeat(5)));
    bed.refused(&format!("{open} {} SAVEPOINT a; {} RELEASE a; {step} COMMIT", step.repeat(2), step.repeat(2)));
    bed.passes(&format!("{open} {} SAVEPOINT a; {} ROLLBACK TO a; {} COMMIT", step.repeat(2), step, step.repeat(2)));
    assert_eq!(sum(&mut bed), 4);
}

/// A commit runs the loop's query to its end, in the transaction that it ends.
#[test]
fn a_commit_inside_a_loop_over_a_query_that_writes_counts_all_of_it() {
    let mut bed = twelve();
    let procedure = "DO $$ DECLARE r record; BEGIN
             FOR r IN SELECT touch(i) AS i FROM generate_series(1, 12) AS i LOOP
                 IF r.i = 1 THEN COMMIT; END IF;
             END LOOP;
         END $$";
    bed.exactly("{public.t}", procedure, 12);
    bed.policy("tables => '{public.t}', max_rows_per_transaction => 11");
    bed.refused(procedure);
    bed.policy("tables => '{public.t}', max_rows_per_transaction => 12");
    bed.passes(procedure);
}

// Refusals that are swallowed

const SWALLOW: &str = "
    CREATE PROCEDURE swallow(one int, last int) LANGUAGE plpgsql AS $$
    BEGIN
        FOR i IN one..last LOOP
            BEGIN
                UPDATE t SET v = v + 1 WHERE id = i;
            EXCEPTION WHEN SQLSTATE 'WG001' THEN NULL;
            END;
        END LOOP;
    END $$;";

#[test]
fn swallowing_every_refusal_gets_no_row_past_the_statements_limit() {
    let mut bed = twelve();
    bed.passes(SWALLOW);
    for (limit, sql) in [
        (0, "CALL swallow(1, 12)"),
        (5, "CALL swallow(1, 12)"),
        (
            5,
            "DO $$ BEGIN CALL swallow(1, 6); CALL swallow(7, 12);
                 PERFORM touch(i) FROM generate_series(1, 0) AS i; END $$",
        ),
        (
            5,
            "DO $$ BEGIN
                 FOR i IN 1..30 LOOP
                     BEGIN PERFORM three(i % 4); EXCEPTION WHEN OTHERS THEN NULL; END;
                     BEGIN PERFORM touch(i); EXCEPTION WHEN OTHERS THEN NULL; END;
                 END LOOP;
             END $$",
        ),
    ] {
        restore(&mut bed);
        bed.limit("{public.t}", limit);
        let before = blocked(&mut bed);
        bed.passes(sql);
        assert_eq!(sum(&mut bed), i64::try_from(limit).unwrap(), "{sql}");
        assert_eq!(blocked(&mut bed), before + 1, "{sql}");
    }
    restore(&mut bed);
    bed.limit("{public.t}", 12);
    bed.passes("CALL swallow(1, 12)");
    assert_eq!(sum(&mut bed), 12);
}

#[test]
fn swallowing_every_refusal_gets_no_row_past_the_transactions_limit() {
    let mut bed = twelve();
    bed.passes(SWALLOW);
    bed.policy("tables => '{public.t}', max_rows => 4, max_rows_per_transaction => 7");
    bed.passes("BEGIN; CALL swallow(1, 12); CALL swallow(5, 12); CALL swallow(9, 12); COMMIT");
    assert_eq!(sum(&mut bed), 7);
    bed.passes(
        "BEGIN; CALL swallow(1, 12); SAVEPOINT a; CALL swallow(1, 12); ROLLBACK TO a; CALL swallow(1, 12); COMMIT",
    );
    assert_eq!(sum(&mut bed), 14);
}

/// The inner block swallows, the outer one takes everything back, and the count starts where it was.
#[test]
fn what_an_outer_block_takes_back_may_be_changed_again_and_no_more() {
    let mut bed = twelve();
    bed.passes(SWALLOW);
    bed.limit("{public.t}", 5);
    bed.passes(
        "DO $$ BEGIN
             PERFORM touch(1);
             FOR k IN 1..4 LOOP
                 BEGIN CALL swallow(2, 12); RAISE 'back'; EXCEPTION WHEN raise_exception THEN NULL; END;
             END LOOP;
             CALL swallow(2, 12);
         END $$",
    );
    assert_eq!(sum(&mut bed), 5);
}

/// Each row's trigger swallows what it was refused, and the row itself goes on as far as it may.
#[test]
fn triggers_that_swallow_refusals_get_no_row_past_the_limit() {
    let mut bed = twelve();
    bed.passes(
        "CREATE FUNCTION follow() RETURNS trigger LANGUAGE plpgsql AS $$
         BEGIN
             BEGIN PERFORM touch(NEW.id); EXCEPTION WHEN OTHERS THEN NULL; END;
             RETURN NEW;
         END $$;
         CREATE TRIGGER follow BEFORE UPDATE ON u FOR EACH ROW EXECUTE FUNCTION follow()",
    );
    bed.limit("{public.t}", 5);
    bed.passes("UPDATE u SET v = 1");
    assert_eq!((sum(&mut bed), bed.number("SELECT sum(v) FROM u")), (5, 12));
    bed.limit("{public.t, public.u}", 13);
    bed.refused("UPDATE u SET v = 2");
    bed.limit("{public.t, public.u}", 24);
    bed.passes("UPDATE u SET v = 2");
    assert_eq!((sum(&mut bed), bed.number("SELECT sum(v) FROM u")), (17, 24));
}

#[test]
fn deferred_triggers_that_swallow_refusals_get_no_row_past_the_limit() {
    // PostgreSQL's own assertion does not expect an exception block that catches something in a deferred trigger at
    // COMMIT (RollbackAndReleaseCurrentSubTransaction, with or without the library): it ends the server.
    if asserting() {
        return;
    }
    let mut bed = twelve();
    bed.passes(
        "CREATE FUNCTION late() RETURNS trigger LANGUAGE plpgsql AS $$
         DECLARE r record;
         BEGIN
             BEGIN RAISE 'no'; EXCEPTION WHEN raise_exception THEN NULL; END;
             BEGIN
                 FOR r IN UPDATE t SET v = v + 1 WHERE id = NEW.id RETURNING id LOOP NULL; END LOOP;
             EXCEPTION WHEN OTHERS THEN NULL;
             END;
             RETURN NULL;
         END $$;
         CREATE CONSTRAINT TRIGGER late AFTER UPDATE ON u DEFERRABLE INITIALLY DEFERRED
             FOR EACH ROW EXECUTE FUNCTION late()",
    );
    bed.limit("{public.t}", 5);
    let expected = [
        ("UPDATE u SET v = 1", 5),
        ("BEGIN; UPDATE u SET v = 1; COMMIT", 10),
        ("BEGIN; UPDATE u SET v = 1; SET CONSTRAINTS ALL IMMEDIATE; COMMIT", 15),
        ("DO $$ BEGIN UPDATE u SET v = 1; COMMIT; UPDATE u SET v = 1; SET CONSTRAINTS ALL IMMEDIATE; END $$", 25),
    ];
    for (sql, total) in expected {
        bed.passes(sql);
        assert_eq!(sum(&mut bed), total, "{sql}");
    }
    pass(&mut bed.writer, "BEGIN");
    pass(&mut bed.writer, "UPDATE u SET v = 1");
    pass(&mut bed.writer, "COMMIT");
    assert_eq!(sum(&mut bed), 30);
}

/// The client itself swallows.
#[test]
fn savepoint_after_savepoint_gets_no_row_past_the_transactions_limit() {
    let mut bed = twelve();
    bed.policy("tables => '{public.t}', max_rows_per_transaction => 5");
    bed.passes("BEGIN");
    let mut refused = 0;
    for id in 1..=12 {
        bed.passes("SAVEPOINT a");
        match bed.writer.batch_execute(&format!("UPDATE t SET v = v + 1 WHERE id = {id}")) {
            Ok(()) if id % 3 == 0 => bed.passes("ROLLBACK TO a"),
            Ok(()) => bed.passes(if id % 2 == 0 { "RELEASE a" } else { "SAVEPOINT b" }),
            Err(_) => {
                refused += 1;
                bed.passes("ROLLBACK TO a");
            }
        }
    }
    bed.passes("COMMIT");
    assert_eq!((sum(&mut bed), refused), (5, 5));
}

#[test]
fn savepoints_in_turn_count_what_stays() {
    let mut bed = twelve();
    let rounds = |last: &str| {
        let mut sql = "BEGIN;".to_owned();
        for round in 0..20 {
            let end = if round % 2 == 0 { "ROLLBACK TO a" } else { "RELEASE a" };
            sql += &format!("SAVEPOINT a; SELECT three({}); {end};", round % 4);
            sql += &format!("SAVEPOINT b; SAVEPOINT c; SELECT touch(1); RELEASE c; {end};").replace(" a;", " b;");
        }
        format!("{sql} {last} COMMIT")
    };
    bed.policy("tables => '{public.t}', max_rows_per_transaction => 40");
    bed.refused(&rounds("SELECT touch(2);"));
    bed.passes(&rounds(""));
    assert_eq!(sum(&mut bed), 40);
}

// Procedures

#[test]
fn a_commit_in_an_inner_procedure_starts_the_count_of_the_outer_one_again() {
    let mut bed = twelve();
    bed.passes(
        "CREATE PROCEDURE inner_one(k int) LANGUAGE plpgsql AS 'BEGIN PERFORM three(k); COMMIT; PERFORM touch(1); END';
         CREATE PROCEDURE outer_one(n int) LANGUAGE plpgsql AS $$
         BEGIN
             FOR k IN 0..3 LOOP
                 CALL inner_one(k);
                 FOR i IN 1..n LOOP PERFORM touch(12); END LOOP;
                 IF k % 2 = 1 THEN ROLLBACK; END IF;
             END LOOP;
         END $$",
    );
    // After a commit that is not followed by a rollback: 1 + n rows of the round, and 3 of the next.
    for (rows, n) in [(4, 0), (5, 1), (7, 3)] {
        for arguments in ["max_rows", "max_rows_per_transaction"] {
            restore(&mut bed);
            bed.policy(&format!("tables => '{{public.t}}', {arguments} => {}", rows - 1));
            refuse(&mut bed.writer, &format!("CALL outer_one({n})"));
            assert_eq!(sum(&mut bed), 3);
            restore(&mut bed);
            bed.policy(&format!("tables => '{{public.t}}', {arguments} => {rows}"));
            bed.passes(&format!("CALL outer_one({n})"));
            assert_eq!(sum(&mut bed), 12 + 2 * (n + 1));
        }
    }
}

#[test]
fn procedures_called_in_a_loop_without_a_commit_are_one_statement() {
    let mut bed = twelve();
    bed.passes(
        "CREATE PROCEDURE three_of(k int) LANGUAGE plpgsql AS 'BEGIN PERFORM three(k); END';
         CREATE PROCEDURE back(k int) LANGUAGE plpgsql AS 'BEGIN PERFORM three(k); ROLLBACK; END'",
    );
    bed.exactly("{public.t}", "DO $$ BEGIN FOR k IN 0..3 LOOP CALL three_of(k); END LOOP; END $$", 12);
    bed.exactly(
        "{public.t}",
        "DO $$ BEGIN FOR k IN 0..3 LOOP CALL back(k); END LOOP; CALL three_of(1); CALL three_of(2); END $$",
        6,
    );
}

/// Swallowing cannot reach over a commit: each part has the limit for itself.
#[test]
fn each_part_between_commits_has_the_limit_and_no_more() {
    let mut bed = twelve();
    bed.passes(SWALLOW);
    bed.policy("tables => '{public.t}', max_rows => 3, max_rows_per_transaction => 2");
    bed.passes("DO $$ BEGIN FOR k IN 1..4 LOOP CALL swallow(1, 12); COMMIT; END LOOP; END $$");
    assert_eq!(sum(&mut bed), 8);
}

// Sessions

#[test]
fn each_of_several_sessions_has_the_limit_and_no_more() {
    let mut bed = twelve();
    bed.passes(SWALLOW);
    bed.limit("{public.t}", 2);
    let sessions: Vec<_> = (0..4).map(|_| another(&mut bed)).collect();
    let threads: Vec<_> = sessions
        .into_iter()
        .enumerate()
        .map(|(place, mut session)| {
            let first = place * 3 + 1;
            thread::spawn(move || {
                pass(&mut session, &format!("CALL swallow({first}, {})", first + 2));
                refuse(&mut session, &format!("SELECT three({place})"));
            })
        })
        .collect();
    for thread in threads {
        thread.join().expect("a session");
    }
    assert_eq!(sum(&mut bed), 8);
    assert_eq!(bed.number("SELECT max(v) FROM t"), 1);
}

// Messages of the protocol

/// A connection without a driver, for messages that the driver does not send together.
struct Pipeline {
    stream: UnixStream,
    outgoing: Vec<u8>,
}

impl Pipeline {
    fn connect(bed: &mut Bed) -> Pipeline {
        let server = Server::shared();
        let owner: String = bed.writer.query_one("SELECT current_user::text", &[]).unwrap().get(0);
        let stream = UnixStream::connect(server.socket_dir().join(format!(".s.PGSQL.{}", server.port()))).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let mut pipeline = Pipeline { stream, outgoing: Vec::new() };
        let mut body = 196_608_u32.to_be_bytes().to_vec();
        for word in ["user", &owner, "database", &bed.db().name, ""] {
            body.extend_from_slice(word.as_bytes());
            body.push(0);
        }
        pipeline.message(None, &body);
        assert_eq!(pipeline.ready(), None);
        pipeline
    }

    fn message(&mut self, letter: Option<u8>, body: &[u8]) {
        self.outgoing.extend(letter);
        self.outgoing.extend_from_slice(&u32::try_from(body.len() + 4).unwrap().to_be_bytes());
        self.outgoing.extend_from_slice(body);
    }

    fn parse(&mut self, name: &str, sql: &str) {
        let body = [name.as_bytes(), b"\0", sql.as_bytes(), b"\0\0\0"].concat();
        self.message(Some(b'P'), &body);
    }

    /// With at most one parameter, as text.
    fn bind(&mut self, portal: &str, name: &str, parameter: Option<&str>) {
        let mut body = [portal.as_bytes(), b"\0", name.as_bytes(), b"\0\0\0"].concat();
        body.extend_from_slice(&u16::from(parameter.is_some()).to_be_bytes());
        if let Some(value) = parameter {
            body.extend_from_slice(&u32::try_from(value.len()).unwrap().to_be_bytes());
            body.extend_from_slice(value.as_bytes());
        }
        body.extend_from_slice(&[0, 0]);
        self.message(Some(b'B'), &body);
    }

    fn execute(&mut self, portal: &str, rows: u32) {
        let body = [portal.as_bytes(), b"\0", &rows.to_be_bytes()].concat();
        self.message(Some(b'E'), &body);
    }

    /// Ends the pipeline and gives the SQLSTATE of its error, if there was one.
    fn sync(&mut self) -> Option<String> {
        self.message(Some(b'S'), &[]);
        self.ready()
    }

    fn ready(&mut self) -> Option<String> {
        self.stream.write_all(&self.outgoing).unwrap();
        self.outgoing.clear();
        let mut sqlstate = None;
        loop {
            let mut head = [0; 5];
            self.stream.read_exact(&mut head).unwrap();
            let length = u32::from_be_bytes([head[1], head[2], head[3], head[4]]);
            let mut body = vec![0; usize::try_from(length).unwrap() - 4];
            self.stream.read_exact(&mut body).unwrap();
            match head[0] {
                b'E' => {
                    let code = body.split(|byte| *byte == 0).find(|field| field.first() == Some(&b'C'));
                    sqlstate = code.map(|code| String::from_utf8_lossy(&code[1..]).into_owned());
                }
                b'Z' => return sqlstate,
                _ => {}
            }
        }
    }
}

fn refusal() -> Option<String> {
    Some("WG001".to_owned())
}

#[test]
fn a_pipeline_is_one_transaction_of_many_statements() {
    let mut bed = twelve();
    let mut pipeline = Pipeline::connect(&mut bed);
    pipeline.parse("one", "UPDATE t SET v = v + 1 WHERE id = $1::int");
    assert_eq!(pipeline.sync(), None);
    let mut send = |rows: u32| {
        for id in 1..=rows {
            pipeline.bind("", "one", Some(&id.to_string()));
            pipeline.execute("", 0);
        }
        pipeline.sync()
    };
    bed.policy("tables => '{public.t}', max_rows => 1, max_rows_per_transaction => 6");
    assert_eq!(send(7), refusal());
    assert_eq!(sum(&mut bed), 0);
    assert_eq!(send(6), None);
    assert_eq!(send(6), None);
    assert_eq!(sum(&mut bed), 12);
}

#[test]
fn portals_read_in_turn_within_a_pipeline_have_counts_of_their_own() {
    let mut bed = twelve();
    let mut pipeline = Pipeline::connect(&mut bed);
    pipeline.parse("all", "SELECT touch(i) FROM generate_series(1, 12) AS i");
    let send = |pipeline: &mut Pipeline, fetches: &[u32]| {
        for portal in ["a", "b"] {
            pipeline.bind(portal, "all", None);
        }
        for rows in fetches {
            for portal in ["a", "b"] {
                pipeline.execute(portal, *rows);
            }
        }
        pipeline.sync()
    };
    bed.policy("tables => '{public.t}', max_rows => 5");
    assert_eq!(send(&mut pipeline, &[2, 2, 2]), refusal());
    assert_eq!(sum(&mut bed), 0);
    assert_eq!(send(&mut pipeline, &[2, 2, 1]), None);
    assert_eq!(sum(&mut bed), 10);
    bed.policy("tables => '{public.t}', max_rows => 5, max_rows_per_transaction => 9");
    assert_eq!(send(&mut pipeline, &[2, 2, 1]), refusal());
    assert_eq!(sum(&mut bed), 10);
}

/// A function that changes three rows when a planner folds it to a constant.
const FOLDED: &str = "
    CREATE FUNCTION folded() RETURNS int LANGUAGE plpgsql IMMUTABLE AS 'BEGIN RETURN three(3); END';";

#[test]
fn rows_changed_while_a_statement_was_bound_stay_its_own_when_another_is_bound_after_it() {
    let mut bed = twelve();
    bed.passes(FOLDED);
    let mut pipeline = Pipeline::connect(&mut bed);
    for (limit, expected) in [(5, refusal()), (6, None)] {
        bed.limit("{public.t}", limit);
        // Planned once, when it is bound first.
        let (first, second) = (format!("first_{limit}"), format!("second_{limit}"));
        pipeline.parse(&first, "UPDATE t SET v = v + 1 WHERE id <= 3 AND folded() = 3");
        pipeline.parse(&second, "UPDATE t SET v = v + 1 WHERE id = 5 AND folded() = 3");
        assert_eq!(pipeline.sync(), None);
        pipeline.bind("a", &first, None);
        pipeline.bind("b", &second, None);
        pipeline.execute("a", 0);
        pipeline.execute("b", 0);
        assert_eq!(pipeline.sync(), expected, "limit {limit}");
    }
    assert_eq!(sum(&mut bed), 10);
}

// What runs while a statement is planned, bound or started

/// Immutable functions that change twelve rows while they are folded, three at a time, each time through a cursor of
/// their own; `resumed` after an exception block.
const LOOPED: &str = "
    CREATE FUNCTION looped() RETURNS int LANGUAGE plpgsql IMMUTABLE AS $$
    DECLARE r record;
    BEGIN
        FOR k IN 0..3 LOOP FOR r IN SELECT three(k) LOOP END LOOP; END LOOP;
        RETURN 1;
    END $$;
    CREATE FUNCTION sweep() RETURNS int LANGUAGE plpgsql AS $$
    DECLARE r record;
    BEGIN
        BEGIN RAISE 'no'; EXCEPTION WHEN raise_exception THEN NULL; END;
        FOR k IN 0..3 LOOP
            FOR r IN UPDATE t SET v = v + 1 WHERE id > k * 3 AND id <= k * 3 + 3 RETURNING id LOOP END LOOP;
        END LOOP;
        RETURN 1;
    END $$;
    CREATE FUNCTION resumed() RETURNS int LANGUAGE plpgsql IMMUTABLE AS 'BEGIN RETURN sweep(); END';";

#[test]
fn cursors_of_a_function_that_the_planner_runs_are_one_statement() {
    let mut bed = twelve();
    bed.passes(LOOPED);
    for sql in [
        "SELECT looped()",
        "SELECT resumed()",
        "EXPLAIN SELECT looped()",
        "EXPLAIN SELECT resumed()",
        "UPDATE u SET v = 1 WHERE looped() = 1",
        "DEALLOCATE ALL; PREPARE p AS SELECT resumed(); EXECUTE p",
    ] {
        exactly_as_often(&mut bed, sql, 12);
    }
}

/// A stable function is run by the planner that wants an estimate, and again when the executor prunes partitions.
#[test]
fn cursors_of_a_function_that_prunes_partitions_are_one_statement() {
    let mut bed = twelve();
    bed.passes(LOOPED);
    bed.passes(
        "CREATE TABLE parted (id int) PARTITION BY RANGE (id);
         CREATE TABLE parted_1 PARTITION OF parted FOR VALUES FROM (1) TO (10);
         CREATE TABLE parted_2 PARTITION OF parted FOR VALUES FROM (10) TO (20);
         CREATE FUNCTION pruning() RETURNS int LANGUAGE plpgsql STABLE AS 'BEGIN RETURN sweep(); END'",
    );
    exactly_as_often(&mut bed, "SELECT * FROM parted WHERE id = pruning()", 24);
}

/// Three rows are changed while the statement is planned, and three more when it is started.
#[test]
fn a_refusal_while_partitions_are_pruned_tells_of_the_clients_statement() {
    let mut bed = twelve();
    bed.passes(
        "CREATE TABLE parted (id int) PARTITION BY RANGE (id);
         CREATE TABLE parted_1 PARTITION OF parted FOR VALUES FROM (1) TO (10);
         CREATE TABLE parted_2 PARTITION OF parted FOR VALUES FROM (10) TO (20);
         CREATE FUNCTION pruning() RETURNS int LANGUAGE plpgsql STABLE AS 'BEGIN RETURN three(1); END'",
    );
    let sql = "SELECT * FROM parted WHERE id = pruning()";
    exactly_as_often(&mut bed, sql, 6);
    let told = "SELECT string_agg(DISTINCT statement, '|') FROM writeguard.event WHERE kind = 'blocked'";
    assert_eq!(bed.reader.query_one(told, &[]).unwrap().get::<_, String>(0), sql);
}

/// The type's input function runs the domain's check when the client binds a value.
#[test]
fn a_check_that_runs_while_a_value_is_bound_is_part_of_the_statement() {
    for check in ["looped() = 1", "sweep() = 1"] {
        let mut bed = twelve();
        bed.passes(LOOPED);
        bed.passes(&format!("CREATE DOMAIN checked AS text CHECK ({check} OR VALUE IS NULL)"));
        let mut pipeline = Pipeline::connect(&mut bed);
        let mut send = |limit: u64| {
            bed.limit("{public.t}", limit);
            pipeline.parse("", "SELECT length($1::checked)");
            pipeline.bind("", "", Some("x"));
            pipeline.execute("", 0);
            (pipeline.sync(), sum(&mut bed))
        };
        assert_eq!(send(11), (refusal(), 0), "{check}");
        assert_eq!(send(100).0, None, "{check}");
        assert!(sum(&mut bed) >= 12, "{check}");
    }
}

#[test]
fn explain_counts_what_a_folded_function_really_changes() {
    let mut bed = twelve();
    bed.passes(FOLDED);
    each_exactly(
        &mut bed,
        &[
            ("EXPLAIN SELECT folded()", 3),
            ("EXPLAIN UPDATE t SET v = 7 WHERE folded() = 3", 3),
            ("EXPLAIN ANALYZE UPDATE t SET v = v + 1 WHERE folded() = 3 AND id <= 2", 5),
            ("EXPLAIN ANALYZE SELECT touch(id) FROM t WHERE id <= 4", 4),
        ],
    );
}

// What a commit runs

/// COMMIT is a command of its own, sent alone or not.
#[test]
fn deferred_triggers_of_a_commit_in_a_string_are_not_charged_to_the_command_before_it() {
    let mut bed = twelve();
    bed.passes(
        "CREATE FUNCTION follow() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM touch(NEW.id); RETURN NULL; END';
         CREATE CONSTRAINT TRIGGER follow AFTER UPDATE ON u DEFERRABLE INITIALLY DEFERRED
             FOR EACH ROW EXECUTE FUNCTION follow()",
    );
    bed.limit("{public.t, public.u}", 3);
    for command in ["BEGIN", "UPDATE u SET v = v + 1 WHERE id <= 3", "COMMIT"] {
        bed.passes(command);
    }
    assert_eq!(sum(&mut bed), 3);
    bed.refused("UPDATE u SET v = v + 1 WHERE id <= 3");
    bed.passes("BEGIN; UPDATE u SET v = v + 1 WHERE id <= 3; COMMIT");
    assert_eq!(sum(&mut bed), 6);
}

#[test]
fn deferred_triggers_hold_the_limit_before_a_transaction_is_prepared() {
    let mut bed = twelve();
    let name = bed.db().name.clone();
    bed.passes(
        "CREATE FUNCTION follow() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM touch(NEW.id); RETURN NULL; END';
         CREATE CONSTRAINT TRIGGER follow AFTER UPDATE ON u DEFERRABLE INITIALLY DEFERRED
             FOR EACH ROW EXECUTE FUNCTION follow()",
    );
    let sql = format!("BEGIN; UPDATE u SET v = 1 WHERE id <= 8; PREPARE TRANSACTION '{name}'");
    bed.limit("{public.t}", 7);
    bed.refused(&sql);
    assert_eq!(bed.number(&format!("SELECT count(*) FROM pg_prepared_xacts WHERE gid = '{name}'")), 0);
    bed.limit("{public.t}", 8);
    bed.passes(&sql);
    bed.passes(&format!("COMMIT PREPARED '{name}'"));
    assert_eq!(sum(&mut bed), 8);
}

// Functions in FROM, in lists and under LIMIT

#[test]
fn set_returning_functions_that_write_count_what_they_really_do() {
    let mut bed = twelve();
    bed.passes(
        "CREATE FUNCTION returned() RETURNS SETOF int LANGUAGE plpgsql
         AS 'BEGIN RETURN QUERY UPDATE t SET v = v + 1 RETURNING id; END';
         CREATE FUNCTION of_three(k int) RETURNS SETOF int LANGUAGE plpgsql
         AS 'BEGIN RETURN QUERY UPDATE t SET v = v + 1 WHERE id > k * 3 AND id <= k * 3 + 3 RETURNING id; END';
         CREATE FUNCTION lazily() RETURNS SETOF int LANGUAGE sql
         AS 'SELECT touch(i) FROM generate_series(1, 12) AS i';
         CREATE FUNCTION nexts() RETURNS SETOF int LANGUAGE plpgsql
         AS 'BEGIN FOR i IN 1..12 LOOP RETURN NEXT touch(i); END LOOP; END'",
    );
    each_exactly(
        &mut bed,
        &[
            ("SELECT * FROM returned() LIMIT 1", 12),
            ("SELECT returned() LIMIT 1", 12),
            ("SELECT x FROM generate_series(0, 1) AS k, LATERAL of_three(k) AS x", 6),
            ("SELECT (SELECT max(x) FROM of_three(k) AS x) FROM generate_series(0, 2) AS k", 9),
            ("SELECT x FROM generate_series(0, 3) AS k CROSS JOIN LATERAL (SELECT of_three(k) AS x LIMIT 1) AS y", 12),
            ("SELECT lazily() LIMIT 4", 4),
            ("SELECT * FROM lazily() LIMIT 4", 12),
            ("SELECT nexts() LIMIT 2", 12),
            ("SELECT * FROM ROWS FROM (returned(), generate_series(1, 2))", 12),
            ("SELECT touch(i) FROM generate_series(1, 12) AS i LIMIT 5", 5),
            ("SELECT touch(i) FROM generate_series(1, 12) AS i OFFSET 3 LIMIT 5", 8),
            ("SELECT EXISTS (SELECT FROM generate_series(1, 12) AS i WHERE touch(i) = 4)", 4),
            ("SELECT 4 IN (SELECT touch(i) FROM generate_series(1, 12) AS i)", 12),
            ("VALUES (touch(1)), (touch(2)), (three(1))", 5),
            ("SELECT max(touch(i)) FILTER (WHERE i > 6) FROM generate_series(1, 12) AS i", 6),
            ("WITH RECURSIVE r (i) AS (SELECT 1 UNION ALL SELECT touch(i) + 1 FROM r WHERE i < 7) SELECT i FROM r", 6),
            (
                "WITH r AS MATERIALIZED (SELECT touch(i) AS i FROM generate_series(1, 12) AS i) SELECT i
                     FROM r LIMIT 2",
                2,
            ),
            ("TABLE t ORDER BY touch(id) LIMIT 1", 12),
            ("SELECT count(*) FROM t GROUP BY touch(id % 4)", 3 * 3),
            ("SELECT 1 FROM t HAVING sum(touch(id)) > 0", 12),
            ("SELECT id FROM u WHERE three(id - 1) < 2 AND id <= 3", 9),
            ("SELECT CASE WHEN i % 2 = 0 THEN touch(i) END FROM generate_series(1, 12) AS i", 6),
        ],
    );
}

/// PL/pgSQL wants two rows at most to see that there is more than one; a WITH branch runs to its end all the same.
#[test]
fn returning_into_one_variable_counts_the_rows_that_were_changed() {
    let mut bed = twelve();
    let caught = |sql: &str| {
        format!(
            "DO $$ DECLARE n int; BEGIN {sql}; EXCEPTION WHEN too_many_rows THEN RAISE EXCEPTION 'rolled back'; END $$"
        )
    };
    bed.limit("{public.t}", 12);
    for sql in ["UPDATE t SET v = 9 RETURNING id INTO n", "UPDATE t SET v = 9 RETURNING id INTO STRICT n"] {
        let refusal = expect_refusal(bed.writer.batch_execute(&caught(sql)));
        assert_eq!(refusal.sqlstate, "P0001", "{refusal:?}");
        assert_eq!(sum(&mut bed), 0);
    }
    each_exactly(
        &mut bed,
        &[
            ("DO $$ DECLARE n int; BEGIN EXECUTE 'UPDATE t SET v = v + 1 RETURNING id' INTO n; END $$", 12),
            (
                "DO $$ DECLARE n int; BEGIN WITH x AS (UPDATE t SET v = v + 1 RETURNING id) SELECT id INTO n
                 FROM x; END $$",
                12,
            ),
            (
                "DO $$ DECLARE n int; BEGIN
                     WITH x AS (UPDATE t SET v = v + 1 WHERE id > 1) UPDATE t SET v = v + 1
                          WHERE id = 1 RETURNING id INTO n;
                 END $$",
                12,
            ),
            ("DO $$ DECLARE n int; BEGIN SELECT touch(i) INTO n FROM generate_series(1, 12) AS i; END $$", 1),
        ],
    );
}

// Wherever PostgreSQL evaluates an expression

#[test]
fn functions_in_definitions_count_when_they_are_evaluated() {
    let mut bed = twelve();
    bed.passes(
        "CREATE TABLE generated (id int, g int GENERATED ALWAYS AS (quiet(id)) STORED);
         CREATE TABLE defaulted (id int, d int DEFAULT touch(3));
         CREATE TABLE checked (id int CHECK (touch(id) > 0));
         CREATE TABLE indexed (id int); CREATE INDEX ON indexed (quiet(id));
         CREATE TABLE filtered (id int); CREATE INDEX ON filtered (id) WHERE quiet(id) > 0;
         CREATE TABLE routed (id int) PARTITION BY RANGE (quiet(id));
         CREATE TABLE routed_1 PARTITION OF routed FOR VALUES FROM (1) TO (100);
         CREATE DOMAIN checked_int AS int CHECK (touch(VALUE) > 0);
         CREATE TABLE of_domain (id checked_int);
         CREATE TABLE watched (id int);
         CREATE FUNCTION nothing() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END';
         CREATE TRIGGER watched BEFORE INSERT ON watched FOR EACH ROW WHEN (touch(NEW.id) > 0)
             EXECUTE FUNCTION nothing();
         CREATE VIEW viewed AS SELECT touch(i) AS i FROM generate_series(1, 6) AS i;
         CREATE FUNCTION step(state int, i int) RETURNS int LANGUAGE sql AS 'SELECT state + touch(i)';
         CREATE AGGREGATE stepped (int) (SFUNC = step, STYPE = int, INITCOND = 0);
         CREATE TYPE pair AS (id int);
         CREATE FUNCTION to_int(pair) RETURNS int LANGUAGE sql AS 'SELECT touch($1.id)';
         CREATE CAST (pair AS int) WITH FUNCTION to_int(pair);
         CREATE FUNCTION two(int, int) RETURNS int LANGUAGE sql AS 'SELECT touch($1) + touch($2)';
         CREATE OPERATOR |#| (LEFTARG = int, RIGHTARG = int, FUNCTION = two);
         CREATE FUNCTION argument(i int DEFAULT touch(4)) RETURNS int LANGUAGE sql AS 'SELECT i'",
    );
    each_exactly(
        &mut bed,
        &[
            ("INSERT INTO generated SELECT generate_series(1, 5)", 5),
            ("UPDATE generated SET id = id", 5),
            ("INSERT INTO defaulted SELECT generate_series(1, 4)", 4),
            ("INSERT INTO checked SELECT generate_series(1, 6)", 6),
            ("INSERT INTO indexed SELECT generate_series(1, 7)", 7),
            ("INSERT INTO filtered SELECT generate_series(1, 8)", 8),
            ("INSERT INTO of_domain SELECT generate_series(1, 3)", 3),
            ("INSERT INTO watched SELECT generate_series(1, 9)", 9),
            ("TABLE viewed", 6),
            ("CREATE TABLE made AS TABLE viewed", 6),
            ("SELECT stepped(i) FROM generate_series(1, 5) AS i", 5),
            ("SELECT stepped(i) OVER (ORDER BY i) FROM generate_series(1, 5) AS i", 5),
            ("SELECT ROW(i)::pair::int FROM generate_series(1, 4) AS i", 4),
            ("SELECT i |#| (i + 6) FROM generate_series(1, 4) AS i", 8),
            ("SELECT argument() FROM generate_series(1, 4)", 4),
            ("ALTER TABLE u ADD COLUMN added int DEFAULT touch(5)", 12),
            ("ALTER TABLE u ADD CONSTRAINT touched CHECK (touch(id) > 0)", 12),
            ("CREATE INDEX ON generated (quiet(id))", 5),
            ("ALTER TABLE u ALTER COLUMN v TYPE bigint USING touch(1)", 12),
        ],
    );
    exactly_as_often(&mut bed, "INSERT INTO routed SELECT generate_series(1, 4)", 4);
}

#[test]
fn functions_in_writes_count_beside_the_rows_of_the_write() {
    let mut bed = twelve();
    bed.passes("ALTER TABLE u ADD PRIMARY KEY (id)");
    each_exactly(
        &mut bed,
        &[
            ("UPDATE u SET v = touch(id)", 12),
            ("UPDATE u SET v = 1 WHERE id <= 5 RETURNING touch(id)", 5),
            ("WITH x AS (UPDATE u SET v = 1 RETURNING touch(id)) SELECT 1", 12),
            (
                "INSERT INTO u SELECT i FROM generate_series(5, 20) AS i
                     ON CONFLICT (id) DO UPDATE SET v = touch(u.id)",
                8,
            ),
            (
                "INSERT INTO u SELECT i FROM generate_series(1, 6) AS i
                 ON CONFLICT (id) DO UPDATE SET v = 1 WHERE touch(u.id) % 2 = 0",
                6,
            ),
            (
                "MERGE INTO u USING t ON t.id = u.id WHEN MATCHED AND touch(u.id) > 10 THEN UPDATE SET v = 5
                 WHEN MATCHED THEN DO NOTHING",
                12,
            ),
            ("DELETE FROM u WHERE touch(id) > 6 AND id <= 12", 12),
        ],
    );
    bed.exactly("{public.t, public.u}", "UPDATE u SET v = touch(id) WHERE id <= 4", 8);
}

#[test]
fn row_security_that_writes_counts() {
    let mut bed = twelve();
    bed.passes(
        "ALTER TABLE u ENABLE ROW LEVEL SECURITY; ALTER TABLE u FORCE ROW LEVEL SECURITY;
         CREATE POLICY touched ON u USING (touch(id) <= 6) WITH CHECK (touch(id) > 0)",
    );
    each_exactly(&mut bed, &[("TABLE u", 12), ("UPDATE u SET v = 1", 18), ("INSERT INTO u VALUES (11), (12)", 2)]);
    assert_eq!(bed.number("SELECT sum(v) FROM u"), 6);
}

#[test]
fn maintenance_commands_count_what_their_functions_change() {
    let mut bed = twelve();
    bed.passes(
        "CREATE FUNCTION public.full_touch(i int) RETURNS int LANGUAGE plpgsql IMMUTABLE
         AS 'BEGIN RETURN public.plain_touch(i); END';
         CREATE FUNCTION public.plain_touch(i int) RETURNS int LANGUAGE plpgsql
         AS 'BEGIN UPDATE public.t SET v = v + 1 WHERE id = i; RETURN i; END';
         CREATE MATERIALIZED VIEW kept AS SELECT public.plain_touch(i) AS i FROM generate_series(1, 5) AS i;
         CREATE TABLE small AS SELECT i FROM generate_series(1, 4) AS i;
         CREATE INDEX small_index ON small (public.full_touch(i))",
    );
    restore(&mut bed);
    each_exactly(
        &mut bed,
        &[
            ("REFRESH MATERIALIZED VIEW kept", 5),
            ("REINDEX INDEX small_index", 4),
            ("ANALYZE small", 4),
            ("CREATE INDEX CONCURRENTLY ON small (public.full_touch(i + 4))", 4),
        ],
    );
    bed.passes("CREATE STATISTICS counted ON (public.full_touch(i)), i FROM small");
    exactly_as_often(&mut bed, "ANALYZE small", 8);
    exactly_as_often(&mut bed, "CLUSTER small USING small_index", 4);
}

#[test]
fn copying_counts_what_it_sets_off() {
    let mut bed = twelve();
    bed.passes(
        "CREATE TABLE target (id int, d int DEFAULT touch(1));
         CREATE FUNCTION follow() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM touch(NEW.id); RETURN NEW; END';
         CREATE TRIGGER follow BEFORE INSERT ON target FOR EACH ROW EXECUTE FUNCTION follow()",
    );
    for (limit, passes) in [(7, false), (8, true)] {
        bed.limit("{public.t}", limit);
        let before = bed.contents();
        let mut copy = bed.writer.copy_in("COPY target (id) FROM STDIN").unwrap();
        copy.write_all(b"1\n2\n3\n4\n").unwrap();
        let result = copy.finish();
        assert_eq!(result.is_ok(), passes, "limit {limit}: {result:?}");
        assert_eq!(bed.contents() != before, passes, "limit {limit}");
    }
    for (sql, rows) in [
        ("COPY (SELECT touch(i) FROM generate_series(1, 9) AS i) TO STDOUT", 9),
        ("COPY (WITH x AS (UPDATE u SET v = touch(id) RETURNING id) SELECT id FROM x LIMIT 1) TO STDOUT", 12),
        ("COPY (INSERT INTO target (id) VALUES (5), (6) RETURNING touch(7)) TO STDOUT", 6),
    ] {
        let before = bed.contents();
        let mut copied = String::new();
        let known = blocked(&mut bed);
        bed.limit("{public.t}", rows - 1);
        let mut refused = bed.writer.copy_out(sql).unwrap();
        // What is refused at the very end comes after the last row, where the driver does not look.
        let _ = refused.read_to_string(&mut copied);
        drop(refused);
        assert_eq!(bed.contents(), before, "{sql}");
        assert_eq!(blocked(&mut bed), known + 1, "{sql}");
        bed.limit("{public.t}", rows);
        bed.writer.copy_out(sql).unwrap().read_to_string(&mut copied).unwrap();
        assert_ne!(bed.contents(), before, "{sql}");
    }
}

/// The worker of a parallel plan may not write, nor may the leader while there is one: PostgreSQL's own refusal.
#[test]
fn a_function_that_claims_to_be_parallel_safe_writes_nothing_in_parallel() {
    let mut bed = twelve();
    bed.passes(
        "ALTER FUNCTION touch(int) PARALLEL SAFE;
         SET parallel_setup_cost = 0; SET parallel_tuple_cost = 0; SET min_parallel_table_scan_size = 0;
         ALTER TABLE u SET (parallel_workers = 2)",
    );
    let sql = "SELECT count(touch(id)) FROM u";
    let plan: Vec<String> =
        bed.writer.query(&format!("EXPLAIN {sql}"), &[]).unwrap().iter().map(|row| row.get(0)).collect();
    assert!(plan.join("\n").contains("Gather"), "{plan:?}");
    bed.limit("{public.t}", 100);
    let refusal = expect_refusal(bed.writer.batch_execute(sql));
    assert_eq!(refusal.sqlstate, "25000", "{refusal:?}");
    assert_eq!(sum(&mut bed), 0);
    bed.passes("SET max_parallel_workers_per_gather = 0");
    bed.exactly("{public.t}", sql, 12);
}

/// What was refused or taken back in one session's transaction is of no use and no harm to the next.
#[test]
fn after_swallowed_refusals_the_next_transaction_counts_from_zero() {
    let mut bed = twelve();
    bed.passes(SWALLOW);
    bed.policy("tables => '{public.t}', max_rows => 4, max_rows_per_transaction => 5");
    for round in 1..=3 {
        bed.passes("CALL swallow(1, 12)");
        bed.passes("BEGIN; CALL swallow(1, 3); CALL swallow(1, 12); ROLLBACK");
        refuse(&mut bed.writer, "SELECT touch(i) FROM generate_series(1, 5) AS i");
        bed.passes("SELECT touch(i) FROM generate_series(1, 4) AS i");
        assert_eq!(sum(&mut bed), round * 8);
    }
    let mut other = another(&mut bed);
    assert_eq!(number(&mut other, "SELECT sum(v) FROM t"), 24);
}

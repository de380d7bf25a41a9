//! `writeguard.expect_rows`: the client's next UPDATE, DELETE or MERGE changes exactly that many rows or none; then,
//! met or not, nothing is expected any more.

use crate::common::limits::{self, Bed, SIX, pass};
use crate::common::raw::Raw;
use crate::common::{Refusal, Server, expect_refusal, wait_until};
use postgres::{Client, NoTls};
use serde_json::{Value, json};

const THREE: &str = "UPDATE t SET v = v + 1 WHERE id <= 3";
const ALL: &str = "UPDATE t SET v = v + 1";
/// As many rows as asked for, by a function.
const TOUCH: &str = "
    CREATE FUNCTION touch(rows int) RETURNS int LANGUAGE plpgsql AS $$
    BEGIN UPDATE t SET v = v + 1 WHERE id <= rows; RETURN rows; END $$;";

fn shown(client: &mut Client) -> String {
    let shown: String = client.query_one("SHOW writeguard.expect_rows", &[]).unwrap().get(0);
    let setting: String =
        client.query_one("SELECT setting FROM pg_settings WHERE name = 'writeguard.expect_rows'", &[]).unwrap().get(0);
    assert_eq!(shown, setting);
    shown
}

#[track_caller]
fn assert_shown(client: &mut Client, value: i32) {
    assert_eq!(shown(client), value.to_string());
}

#[track_caller]
fn arm(client: &mut Client, rows: i32) {
    pass(client, &format!("SET writeguard.expect_rows = {rows}"));
    assert_shown(client, rows);
}

/// The statement fails with WG004 and both numbers; nothing is left of it, nor of the expectation. An open transaction
/// block is rolled back.
#[track_caller]
fn fails(bed: &mut Bed, sql: &str, expected: i64, rows: i64) -> Refusal {
    let before = bed.contents();
    let refusal = expect_refusal(bed.writer.batch_execute(sql));
    let _ = bed.writer.batch_execute("ROLLBACK");
    assert_eq!(refusal.sqlstate, "WG004", "{sql}: {refusal:?}");
    let changed = if rows == 1 { "1 row".to_owned() } else { format!("{rows} rows") };
    let were = if expected == 1 { "was" } else { "were" };
    let numbers = format!("changed {changed}, but {expected} {were} expected");
    assert!(refusal.said().ends_with(&numbers), "{sql}: {refusal:?}");
    assert!(refusal.detail.contains(&format!("would have changed {rows}; nothing was changed.")), "{refusal:?}");
    assert_eq!(bed.contents(), before, "{sql}: refused, but not undone");
    assert_shown(&mut bed.writer, -1);
    refusal
}

/// The statement passes, changes something, and the expectation is over.
#[track_caller]
fn is_met(bed: &mut Bed, sql: &str) {
    let before = bed.contents();
    pass(&mut bed.writer, sql);
    assert_ne!(bed.contents(), before, "{sql}: passed, but changed nothing");
    assert_shown(&mut bed.writer, -1);
}

/// The statement needs an expectation of exactly `rows`.
#[track_caller]
fn assert_exactly(bed: &mut Bed, sql: &str, rows: i32) {
    for wrong in [rows - 1, rows + 1] {
        arm(&mut bed.writer, wrong);
        fails(bed, sql, i64::from(wrong), i64::from(rows));
    }
    arm(&mut bed.writer, rows);
    is_met(bed, sql);
}

/// The statement passes whatever is expected, and leaves the expectation to the next one.
#[track_caller]
fn is_not_concerned(bed: &mut Bed, sql: &str) {
    arm(&mut bed.writer, 4);
    pass(&mut bed.writer, sql);
    assert_shown(&mut bed.writer, 4);
    fails(bed, THREE, 4, 3);
}

#[track_caller]
fn sqlstate(client: &mut Client, sql: &str) -> String {
    expect_refusal(client.batch_execute(sql)).sqlstate
}

// Which commands.

#[test]
fn the_next_write_changes_so_many_rows_or_none() {
    let mut bed = Bed::new(SIX);
    assert_shown(&mut bed.writer, -1);
    assert_exactly(&mut bed, THREE, 3);
    // It was for one command.
    bed.passes(ALL);
    assert_exactly(&mut bed, "DELETE FROM t WHERE id > 4", 2);
    assert_exactly(&mut bed, "WITH few AS (SELECT 1 AS id) UPDATE t SET v = 9 FROM few WHERE few.id = t.id", 1);
    assert_exactly(&mut bed, "UPDATE t SET v = v + 1 WHERE id <= 2 RETURNING id", 2);
    assert_exactly(
        &mut bed,
        "MERGE INTO t USING generate_series(3, 8) AS g ON g = t.id
         WHEN MATCHED THEN UPDATE SET v = -1 WHEN NOT MATCHED THEN INSERT VALUES (g, -2)",
        6,
    );
}

#[test]
fn zero_is_a_number_too() {
    let mut bed = Bed::new(SIX);
    arm(&mut bed.writer, 0);
    fails(&mut bed, ALL, 0, 6);
    arm(&mut bed.writer, 0);
    bed.passes("DELETE FROM t WHERE id > 100");
    assert_shown(&mut bed.writer, -1);
    arm(&mut bed.writer, 1);
    fails(&mut bed, "DELETE FROM t WHERE id > 100", 1, 0);
    arm(&mut bed.writer, i32::MAX);
    fails(&mut bed, ALL, i64::from(i32::MAX), 6);
    for wrong in ["-2", "2147483648", "many", "'3 rows'"] {
        let sql = format!("SET writeguard.expect_rows = {wrong}");
        assert_eq!(sqlstate(&mut bed.writer, &sql), "22023", "{sql}");
    }
    assert_eq!(sqlstate(&mut bed.writer, "ALTER SYSTEM SET writeguard.expect_rows = 3"), "55P02");
}

#[test]
fn the_error_names_the_table_and_the_next_command() {
    let mut bed = Bed::new(SIX);
    arm(&mut bed.writer, 3);
    let refusal = fails(&mut bed, ALL, 3, 6);
    assert_eq!(refusal.said(), "update changed 6 rows, but 3 were expected");
    assert_eq!(
        refusal.detail,
        "writeguard.expect_rows asked for 3 rows, and this update of table \"public.t\" would have changed 6; nothing \
         was changed."
    );
    assert_eq!((refusal.schema.as_str(), refusal.table.as_str()), ("public", "t"));
    let hint = refusal.hint.strip_prefix("If 6 is right: ").unwrap();
    pass(&mut bed.writer, hint);
    is_met(&mut bed, ALL);
}

#[test]
fn the_table_is_the_one_that_the_command_names() {
    let mut bed = Bed::new(&format!(
        "{SIX}
         CREATE TABLE parts (id int, v int) PARTITION BY LIST (id);
         CREATE TABLE part_1 PARTITION OF parts FOR VALUES IN (1);
         CREATE TABLE part_2 PARTITION OF parts FOR VALUES IN (2);
         INSERT INTO parts VALUES (1, 0), (2, 0);
         CREATE VIEW few AS SELECT * FROM t WHERE id <= 3;
         CREATE TEMP TABLE passing AS TABLE t;"
    ));
    for (sql, table, rows) in [
        ("UPDATE parts SET v = 1", "parts", 2),
        ("UPDATE parts SET id = 3 - id", "parts", 2),
        ("DELETE FROM part_2", "part_2", 1),
        ("UPDATE few SET v = 1", "t", 3),
        ("DELETE FROM passing", "passing", 6),
    ] {
        arm(&mut bed.writer, 7);
        assert_eq!(fails(&mut bed, sql, 7, rows).table, table, "{sql}");
        pass(&mut bed.writer, &format!("PREPARE p AS {sql}"));
        arm(&mut bed.writer, 7);
        assert_eq!(fails(&mut bed, "EXECUTE p", 7, rows).table, table, "{sql}");
        pass(&mut bed.writer, "DEALLOCATE p");
    }
}

#[test]
fn a_prepared_statement_is_the_clients_command() {
    let mut bed = Bed::new(&format!("{SIX} {TOUCH}"));
    pass(&mut bed.writer, "PREPARE p(int) AS UPDATE t SET v = v + 1 WHERE id <= $1");
    pass(&mut bed.writer, "PREPARE q AS DELETE FROM t WHERE id = 6 RETURNING id, v");
    pass(&mut bed.writer, "PREPARE s AS SELECT touch(2)");
    is_not_concerned(&mut bed, "EXECUTE s");
    assert_exactly(&mut bed, "EXECUTE p(3)", 3);
    // What a parameter does is not the command.
    assert_exactly(&mut bed, "EXECUTE p(touch(2) + 1)", 3);
    // A generic plan.
    pass(&mut bed.writer, "SET plan_cache_mode = force_generic_plan");
    assert_exactly(&mut bed, "EXECUTE p(4)", 4);
    assert_exactly(&mut bed, "EXECUTE q", 1);
    assert_eq!(sqlstate(&mut bed.writer, "EXECUTE nothing"), "26000");
}

#[test]
fn a_nested_execute_is_not_the_clients() {
    let mut bed = Bed::new(&format!(
        "{SIX}
         CREATE FUNCTION inner_execute(rows int) RETURNS int LANGUAGE plpgsql AS $$
         BEGIN
             EXECUTE format('EXECUTE p(%s)', rows);
             BEGIN
                 EXECUTE 'EXECUTE p(1 / 0)';
             EXCEPTION WHEN division_by_zero THEN
             END;
             RETURN rows;
         END $$;"
    ));
    pass(&mut bed.writer, "PREPARE p(int) AS UPDATE t SET v = v + 1 WHERE id <= $1");
    is_not_concerned(&mut bed, "SELECT inner_execute(2)");
    is_not_concerned(&mut bed, "DO $$ BEGIN EXECUTE 'EXECUTE p(2)'; END $$");
    assert_exactly(&mut bed, "EXECUTE p(inner_execute(2) + 3)", 5);
    assert_exactly(&mut bed, "UPDATE t SET v = v + inner_execute(0) + 1 WHERE id = 2", 1);
}

#[test]
fn the_extended_protocol_is_held_to_it() {
    let mut bed = Bed::new(SIX);
    let update = bed.writer.prepare("UPDATE t SET v = v + 1 WHERE id <= $1").unwrap();
    for rows in [2, 4] {
        arm(&mut bed.writer, 3);
        let refusal = expect_refusal(bed.writer.execute(&update, &[&rows]));
        assert_eq!(refusal.said(), format!("update changed {rows} rows, but 3 were expected"));
        assert_shown(&mut bed.writer, -1);
    }
    assert_eq!(bed.number("SELECT sum(v) FROM t"), 0);
    arm(&mut bed.writer, 3);
    assert_eq!(bed.writer.execute(&update, &[&3]).unwrap(), 3);
    assert_eq!(bed.writer.execute(&update, &[&4]).unwrap(), 4);
}

#[test]
fn a_portal_that_is_fetched_in_parts_is_decided_before_its_first_row() {
    let mut bed = Bed::new(SIX);
    let mut raw = Raw::to(&bed);
    let sql = "UPDATE t SET v = v + 1 RETURNING id";
    assert_eq!(raw.query("SET writeguard.expect_rows = 2"), "SET ZI");
    raw.open("c", sql).execute("c", 2).execute("c", 2).execute("c", 2);
    let answer = raw.sync();
    assert_eq!((answer.trace(), answer.table), ("1 2 WG004 ZI".into(), "t".into()));
    assert_eq!(bed.number("SELECT sum(v) FROM t"), 0);

    // The number is that of the command, not that of a fetch. In between it may be SET again.
    assert_eq!(raw.query("SET writeguard.expect_rows = 6; BEGIN"), "SET BEGIN ZT");
    raw.open("c", sql).execute("c", 2).run("SET LOCAL writeguard.expect_rows = 1").execute("c", 3).execute("c", 2);
    assert_eq!(raw.sync().trace(), "1 2 D s 1 2 SET D s D UPDATE:1 ZT");
    assert_eq!(raw.query("DELETE FROM t WHERE id < 3; COMMIT"), "WG004 ZE");
    assert_eq!(raw.query("ROLLBACK"), "ROLLBACK ZI");
}

#[test]
fn in_a_pipeline_the_next_write_is_held_to_it() {
    let mut bed = Bed::new(SIX);
    let mut raw = Raw::to(&bed);
    raw.run("SET writeguard.expect_rows = 3").run("SELECT 1").run(THREE).run(ALL);
    assert_eq!(raw.sync().trace(), "1 2 SET 1 2 D SELECT:1 1 2 UPDATE:3 1 2 UPDATE:6 ZI");
    assert_eq!(bed.number("SELECT sum(v) FROM t"), 9);
    // The first write of the pipeline goes with the second.
    raw.run(THREE).run("SET writeguard.expect_rows = 3").run(ALL).run(THREE);
    assert_eq!(raw.sync().trace(), "1 2 UPDATE:3 1 2 SET 1 2 WG004 ZI");
    assert_eq!(bed.number("SELECT sum(v) FROM t"), 9);
    // A portal that was bound before the SET.
    raw.open("u", ALL).run("SET writeguard.expect_rows = 5").execute("u", 0);
    assert_eq!(raw.sync().trace(), "1 2 1 2 SET WG004 ZI");
    raw.run("SELECT 1").run(ALL);
    assert_eq!(raw.sync().trace(), "1 2 D SELECT:1 1 2 UPDATE:6 ZI");
}

#[test]
fn in_a_string_of_commands_the_next_write_is_held_to_it() {
    let mut bed = Bed::new(SIX);
    is_met(&mut bed, &format!("SET writeguard.expect_rows = 3; SELECT 1; {THREE}; {ALL}"));
    fails(&mut bed, &format!("{ALL}; SET writeguard.expect_rows = 2; {THREE}; {ALL}"), 2, 3);
    fails(&mut bed, &format!("SELECT set_config('writeguard.expect_rows', '4', true); {THREE}"), 4, 3);
}

#[test]
fn explain_analyze_changes_rows_and_is_held_to_it() {
    let mut bed = Bed::new(&format!("{SIX} {TOUCH}"));
    pass(&mut bed.writer, "PREPARE p(int) AS UPDATE t SET v = v + 1 WHERE id <= $1");
    assert_exactly(&mut bed, &format!("EXPLAIN (ANALYZE, TIMING off) {THREE}"), 3);
    assert_exactly(&mut bed, "EXPLAIN (ANALYZE, FORMAT json) EXECUTE p(touch(2) + 2)", 4);
    for sql in [
        format!("EXPLAIN {THREE}"),
        "EXPLAIN EXECUTE p(3)".into(),
        format!("EXPLAIN (ANALYZE off) {THREE}"),
        "EXPLAIN ANALYZE SELECT touch(5)".into(),
        "EXPLAIN ANALYZE INSERT INTO t VALUES (7, 0)".into(),
    ] {
        is_not_concerned(&mut bed, &sql);
    }
}

#[test]
fn an_update_inside_of_copy_is_held_to_it() {
    let mut bed = Bed::new(SIX);
    let sql = format!("COPY ({THREE} RETURNING id) TO '/dev/null'");
    assert_exactly(&mut bed, &sql, 3);
}

#[test]
fn a_rule_changes_what_the_tag_shows() {
    let mut bed = Bed::new(&format!(
        "{SIX}
         CREATE TABLE log (id int);
         CREATE TABLE noted AS TABLE t;
         CREATE RULE note AS ON UPDATE TO noted DO ALSO UPDATE t SET v = v + 1;
         CREATE RULE tell AS ON DELETE TO noted DO ALSO INSERT INTO log VALUES (OLD.id);
         CREATE VIEW other AS TABLE t;
         CREATE RULE instead AS ON UPDATE TO other DO INSTEAD UPDATE noted SET v = NEW.v WHERE id = OLD.id;
         CREATE RULE recorded AS ON DELETE TO other DO INSTEAD INSERT INTO log VALUES (OLD.id);"
    ));
    // The tag is the original's.
    assert_exactly(&mut bed, "UPDATE noted SET v = 7 WHERE id <= 2", 2);
    assert_exactly(&mut bed, "DELETE FROM noted WHERE id = 5", 1);
    // The one that stands in for it sets the tag.
    assert_exactly(&mut bed, "UPDATE other SET v = 8 WHERE id <= 2", 2);
    // A command of another kind sets none: the tag shows 0.
    arm(&mut bed.writer, 2);
    fails(&mut bed, "DELETE FROM other WHERE id <= 2", 2, 0);
    arm(&mut bed.writer, 0);
    is_met(&mut bed, "DELETE FROM other WHERE id <= 2");
    pass(&mut bed.writer, "PREPARE p AS DELETE FROM other WHERE id <= 2");
    arm(&mut bed.writer, 2);
    fails(&mut bed, "EXECUTE p", 2, 0);
}

#[test]
fn what_is_set_while_a_command_runs_is_for_the_next() {
    let mut bed = Bed::new(&format!(
        "{SIX}
         CREATE TABLE noted AS TABLE t;
         CREATE FUNCTION arm() RETURNS trigger LANGUAGE plpgsql AS $$
         BEGIN PERFORM set_config('writeguard.expect_rows', '6', false); RETURN NEW; END $$;
         CREATE RULE note AS ON UPDATE TO noted DO ALSO UPDATE t SET v = v + 1 WHERE id = OLD.id;
         CREATE TRIGGER arm BEFORE UPDATE ON t FOR EACH ROW EXECUTE FUNCTION arm();"
    ));
    let sql = "UPDATE noted SET v = 7 WHERE id <= 2";
    arm(&mut bed.writer, 1);
    fails(&mut bed, sql, 1, 2);
    arm(&mut bed.writer, 2);
    pass(&mut bed.writer, sql);
    assert_shown(&mut bed.writer, 6);
    fails(&mut bed, "UPDATE noted SET v = 7 WHERE id <= 5", 6, 5);
}

#[test]
fn what_the_tag_does_not_show_is_not_counted() {
    let mut bed = Bed::new(&format!(
        "{SIX}
         CREATE TABLE child (id int REFERENCES t ON DELETE CASCADE);
         INSERT INTO child SELECT i FROM generate_series(1, 6) AS i, generate_series(1, 10);
         CREATE FUNCTION keep() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NULL; END $$;
         CREATE TRIGGER keep BEFORE UPDATE ON t FOR EACH ROW WHEN (OLD.id = 3) EXECUTE FUNCTION keep();"
    ));
    // A cascade, a WITH branch, a row that a trigger suppresses; under a policy that counts them too.
    for policy in [false, true] {
        if policy {
            bed.limit("{public.*}", 100);
        }
        assert_exactly(&mut bed, "DELETE FROM t WHERE id > 6 - 1", 1);
        assert_exactly(
            &mut bed,
            "WITH c AS (DELETE FROM child WHERE id = 2 RETURNING id) UPDATE t SET v = v + 1 WHERE id = 1",
            1,
        );
        assert_exactly(&mut bed, THREE, 2);
        pass(&mut bed.writer, "INSERT INTO t VALUES (6); INSERT INTO child VALUES (2), (2), (6), (6)");
    }
}

#[test]
fn other_commands_neither_meet_it_nor_use_it_up() {
    let mut bed = Bed::new(&format!(
        "{SIX} {TOUCH} CREATE TABLE copied (id int); CREATE PROCEDURE p() LANGUAGE sql AS 'UPDATE t SET v = 1 WHERE id = 1'"
    ));
    for sql in [
        "SELECT 1",
        "TABLE t",
        "SELECT touch(5)",
        "DO 'BEGIN UPDATE t SET v = 1 WHERE id < 6; END'",
        "CALL p()",
        "WITH u AS (UPDATE t SET v = 2 WHERE id < 6 RETURNING id) SELECT count(*) FROM u",
        "INSERT INTO t VALUES (7, 0)",
        "INSERT INTO t VALUES (7, 0), (1, 0) ON CONFLICT (id) DO UPDATE SET v = 5",
        "COPY copied FROM '/dev/null'",
        "TRUNCATE copied",
        "CREATE TABLE made AS SELECT touch(5)",
        "SET work_mem = '1MB'; RESET work_mem",
        "BEGIN; SAVEPOINT s; ROLLBACK TO s; COMMIT",
        "BEGIN; ROLLBACK",
        "PREPARE x AS UPDATE t SET v = 3",
        "EXPLAIN UPDATE t SET v = 3",
    ] {
        is_not_concerned(&mut bed, sql);
    }
    // What never became a command of that kind.
    for sql in [
        "UPDAET t SET v = 1",
        "UPDATE nothing SET v = 1",
        "UPDATE t SET nothing = 1",
        "UPDATE t SET v = 1 / 0",
        "SELECT 1 / 0",
    ] {
        arm(&mut bed.writer, 4);
        expect_refusal(bed.writer.batch_execute(sql));
        assert_shown(&mut bed.writer, 4);
    }
    fails(&mut bed, THREE, 4, 3);
}

#[test]
fn deferred_triggers_at_the_commit_are_not_the_clients_command() {
    let mut bed = Bed::new(&format!(
        "{SIX}
         CREATE TABLE audited (id int);
         CREATE FUNCTION count_up() RETURNS trigger LANGUAGE plpgsql AS $$
         BEGIN UPDATE t SET v = v + 1; RETURN NULL; END $$;
         CREATE CONSTRAINT TRIGGER later AFTER INSERT OR UPDATE ON audited DEFERRABLE INITIALLY DEFERRED
             FOR EACH ROW EXECUTE FUNCTION count_up();"
    ));
    is_not_concerned(&mut bed, "INSERT INTO audited VALUES (1)");
    is_not_concerned(&mut bed, "BEGIN; INSERT INTO audited VALUES (2); SET CONSTRAINTS ALL IMMEDIATE; COMMIT");
    assert_exactly(&mut bed, "UPDATE audited SET id = id + 1", 2);
}

// When it is over.

#[test]
fn a_write_that_fails_for_another_reason_uses_it_up() {
    let mut bed = Bed::new(&format!(
        "{SIX} ALTER TABLE t ADD CHECK (v < 100); GRANT SELECT ON t TO PUBLIC;
         SELECT writeguard.set_policy('p', tables => '{{public.t}}', max_rows => 4);"
    ));
    pass(&mut bed.writer, "PREPARE p AS UPDATE t SET v = 100");
    for (sql, code) in [
        ("UPDATE t SET v = 100 WHERE id = 1", "23514"),
        ("UPDATE t SET v = 1 / (id - 1) WHERE id = 1", "22012"),
        ("EXECUTE p", "23514"),
        ("EXPLAIN ANALYZE UPDATE t SET v = 100", "23514"),
        (ALL, "WG001"),
        ("DO 'BEGIN END'; UPDATE t SET v = 100", "23514"),
    ] {
        arm(&mut bed.writer, 1);
        assert_eq!(sqlstate(&mut bed.writer, sql), code, "{sql}");
        assert_shown(&mut bed.writer, -1);
        bed.passes("UPDATE t SET v = v + 1 WHERE id < 3");
    }
    let role = bed.db().role("reader");
    let mut reader = bed.db().connect(&role);
    arm(&mut reader, 1);
    assert_eq!(sqlstate(&mut reader, THREE), "42501");
    assert_shown(&mut reader, -1);
    // Met, but refused at the commit.
    pass(
        &mut bed.writer,
        "CREATE TABLE a (id int PRIMARY KEY); INSERT INTO a VALUES (1);
         CREATE TABLE b (id int REFERENCES a DEFERRABLE INITIALLY DEFERRED); INSERT INTO b VALUES (1)",
    );
    arm(&mut bed.writer, 1);
    assert_eq!(sqlstate(&mut bed.writer, "DELETE FROM a"), "23503");
    assert_shown(&mut bed.writer, -1);
}

#[test]
fn no_rollback_brings_back_what_was_used_up() {
    let mut bed = Bed::new(SIX);
    // SET outside of the block.
    arm(&mut bed.writer, 3);
    pass(&mut bed.writer, &format!("BEGIN; SAVEPOINT s; {THREE}; ROLLBACK TO s"));
    assert_shown(&mut bed.writer, -1);
    pass(&mut bed.writer, &format!("{ALL}; ROLLBACK"));
    assert_shown(&mut bed.writer, -1);
    // SET LOCAL before the savepoint.
    pass(&mut bed.writer, &format!("BEGIN; SET LOCAL writeguard.expect_rows = 3; SAVEPOINT s; {THREE}; ROLLBACK TO s"));
    assert_shown(&mut bed.writer, -1);
    pass(&mut bed.writer, &format!("{ALL}; COMMIT"));
    assert_shown(&mut bed.writer, -1);
    // The one that was replaced for a while, too.
    arm(&mut bed.writer, 5);
    pass(&mut bed.writer, &format!("BEGIN; SET LOCAL writeguard.expect_rows = 3; {THREE}; COMMIT"));
    assert_shown(&mut bed.writer, -1);
    // The failed write itself, and the transaction around it.
    pass(&mut bed.writer, "BEGIN; SET LOCAL writeguard.expect_rows = 5; SAVEPOINT s");
    assert_eq!(sqlstate(&mut bed.writer, THREE), "WG004");
    pass(&mut bed.writer, "ROLLBACK TO s");
    assert_shown(&mut bed.writer, -1);
    pass(&mut bed.writer, &format!("{ALL}; COMMIT"));
}

#[test]
fn what_was_not_used_up_ends_with_its_scope() {
    let mut bed = Bed::new(SIX);
    // SET LOCAL ends with its transaction, and with a savepoint that is rolled back.
    for end in ["COMMIT", "ROLLBACK"] {
        pass(&mut bed.writer, "BEGIN; SET LOCAL writeguard.expect_rows = 3");
        assert_shown(&mut bed.writer, 3);
        pass(&mut bed.writer, "SAVEPOINT s; SET LOCAL writeguard.expect_rows = 4");
        assert_shown(&mut bed.writer, 4);
        pass(&mut bed.writer, "ROLLBACK TO s");
        assert_shown(&mut bed.writer, 3);
        pass(&mut bed.writer, end);
        assert_shown(&mut bed.writer, -1);
        bed.passes(ALL);
    }
    // A SET before the block is there again, as nothing has used it up.
    arm(&mut bed.writer, 4);
    for end in ["COMMIT", "ROLLBACK"] {
        pass(&mut bed.writer, "BEGIN; SET LOCAL writeguard.expect_rows = 3");
        pass(&mut bed.writer, end);
        assert_shown(&mut bed.writer, 4);
    }
    pass(&mut bed.writer, "BEGIN; SET writeguard.expect_rows = 3; ROLLBACK");
    assert_shown(&mut bed.writer, 4);
    fails(&mut bed, THREE, 4, 3);
    // A function's SET clause ends with the function.
    pass(
        &mut bed.writer,
        "CREATE FUNCTION shown() RETURNS text LANGUAGE sql SET writeguard.expect_rows = 5
         AS $$ SELECT current_setting('writeguard.expect_rows') $$",
    );
    assert_eq!(bed.writer.query_one("SELECT shown()", &[]).unwrap().get::<_, String>(0), "5");
    assert_shown(&mut bed.writer, -1);
}

#[test]
fn through_a_pool_it_reaches_no_other_client() {
    let mut bed = Bed::new(SIX);
    // A pool hands a connection on after each transaction: what was SET inside a block is over with the block.
    for end in ["COMMIT", "ROLLBACK", "COMMIT AND CHAIN; COMMIT", "PREPARE TRANSACTION 'expectation'"] {
        for inside in [
            "SET writeguard.expect_rows = 3",
            "SELECT set_config('writeguard.expect_rows', '3', false)",
            "SAVEPOINT s; SET writeguard.expect_rows = 3; RELEASE s",
            "SET writeguard.expect_rows = 3; SET LOCAL writeguard.expect_rows = 4",
            "DO $$ BEGIN
                 PERFORM set_config('writeguard.expect_rows', '3', false);
                 BEGIN PERFORM 1 / 0; EXCEPTION WHEN division_by_zero THEN END;
             END $$",
        ] {
            pass(&mut bed.writer, &format!("BEGIN; {inside}"));
            assert_ne!(shown(&mut bed.writer), "-1", "{inside}");
            pass(&mut bed.writer, end);
            assert_eq!(shown(&mut bed.writer), "-1", "{inside}; {end}");
            if end.starts_with("PREPARE") {
                pass(&mut bed.writer, "ROLLBACK PREPARED 'expectation'");
            }
            // Nor does a later transaction bring it back.
            pass(&mut bed.writer, "BEGIN; SELECT 1; COMMIT");
            pass(&mut bed.writer, "BEGIN; SET LOCAL writeguard.expect_rows = 2; COMMIT");
            assert_eq!(shown(&mut bed.writer), "-1", "{inside}; {end}");
            bed.passes(ALL);
        }
    }
    // In session mode it resets the session.
    for reset in ["RESET ALL", "DISCARD ALL", "RESET writeguard.expect_rows", "SET writeguard.expect_rows = DEFAULT"] {
        arm(&mut bed.writer, 3);
        pass(&mut bed.writer, reset);
        assert_shown(&mut bed.writer, -1);
        bed.passes(ALL);
    }
}

#[test]
fn a_set_outside_of_a_block_lasts_until_the_next_write() {
    let mut bed = Bed::new(SIX);
    for sql in [
        "SET writeguard.expect_rows = 4",
        "SELECT set_config('writeguard.expect_rows', '4', false)",
        // No block of the client's.
        "SET writeguard.expect_rows = 4; SELECT 1",
        "DO $$ BEGIN PERFORM set_config('writeguard.expect_rows', '4', false); COMMIT; END $$",
        "DO $$ BEGIN
             BEGIN PERFORM set_config('writeguard.expect_rows', '4', false); EXCEPTION WHEN others THEN END;
         END $$",
    ] {
        pass(&mut bed.writer, sql);
        assert_shown(&mut bed.writer, 4);
        pass(&mut bed.writer, "BEGIN; SELECT 1; COMMIT");
        pass(&mut bed.writer, "BEGIN; SELECT 1; ROLLBACK");
        assert_shown(&mut bed.writer, 4);
        fails(&mut bed, THREE, 4, 3);
        bed.passes(ALL);
    }
    arm(&mut bed.writer, 4);
    pass(&mut bed.writer, "BEGIN");
    fails(&mut bed, THREE, 4, 3);
}

#[test]
fn only_a_set_arms() {
    let mut bed = Bed::new(SIX);
    let role = bed.db().role("forgetful");
    let name = &bed.db().name.clone();
    pass(
        &mut bed.writer,
        &format!(
            "GRANT ALL ON t TO {role}; ALTER ROLE {role} SET writeguard.expect_rows = 2;
             ALTER DATABASE {name} SET writeguard.expect_rows = 2"
        ),
    );
    let clients = [
        bed.db().connect(&role),
        bed.db().connect("postgres"),
        bed.db().connect_with(&role, "-c writeguard.expect_rows=2"),
    ];
    for mut client in clients {
        for reset in ["SELECT 1", "RESET ALL", "DISCARD ALL"] {
            pass(&mut client, reset);
            assert_shown(&mut client, -1);
            pass(&mut client, THREE);
        }
        arm(&mut client, 3);
        pass(&mut client, THREE);
    }
    // Setting it for a role arms nobody.
    arm(&mut bed.writer, 4);
    pass(&mut bed.writer, &format!("ALTER ROLE {role} SET writeguard.expect_rows = 7"));
    fails(&mut bed, THREE, 4, 3);
}

// Beside policies, and without.

#[test]
fn it_needs_no_policy_and_no_extension() {
    let server = Server::shared();
    let db = server.plain_database();
    let mut client = db.admin();
    pass(&mut client, SIX);
    arm(&mut client, 3);
    let statement = format!("{ALL} WHERE 'nowhere' <> 'installed'");
    let refusal = expect_refusal(client.batch_execute(&statement));
    assert_eq!(refusal.said(), "update changed 6 rows, but 3 were expected");
    assert_shown(&mut client, -1);
    arm(&mut client, 3);
    pass(&mut client, THREE);
    assert_eq!(limits::number(&mut client, "SELECT sum(v) FROM t"), 3);
    wait_until(20, || server.log().lines().any(|line| line.contains("nowhere") && line.contains("expectation_failed")));
}

#[test]
fn it_holds_beside_a_policy() {
    let mut bed = Bed::new(&format!(
        "{SIX} SELECT writeguard.set_policy('p', tables => '{{public.t}}', max_rows => 4, override => 'flag');"
    ));
    assert_exactly(&mut bed, THREE, 3);
    // An override lifts the limit, not the expectation.
    pass(&mut bed.writer, "SET writeguard.override = on");
    arm(&mut bed.writer, 5);
    fails(&mut bed, ALL, 5, 6);
    pass(&mut bed.writer, "SET writeguard.override = on");
    arm(&mut bed.writer, 6);
    is_met(&mut bed, ALL);
    // Nor does the switch of the guard.
    pass(&mut bed.writer, "SET writeguard.enabled = off");
    arm(&mut bed.writer, 5);
    fails(&mut bed, ALL, 5, 6);
}

#[test]
fn a_rehearsal_is_not_the_clients_command() {
    let mut bed =
        Bed::new(&format!("{SIX} SELECT writeguard.set_policy('p', tables => '{{public.t}}', max_rows => 4);"));
    is_not_concerned(&mut bed, "SELECT writeguard.request('UPDATE t SET v = 1', 'a test')");
}

#[test]
fn a_failed_expectation_is_an_event() {
    let mut bed = Bed::new(&format!("{SIX} ALTER TABLE t RENAME TO \"T\";"));
    let mut config = bed.db().config("postgres");
    let mut client = config.application_name("the app").connect(NoTls).unwrap();
    arm(&mut client, 3);
    assert_eq!(sqlstate(&mut client, "SELECT 1; UPDATE \"T\" SET v = 1; SELECT 2"), "WG004");
    let events = "SELECT to_jsonb(e) FROM writeguard.event AS e WHERE kind = 'expectation_failed'";
    wait_until(20, || bed.reader.query(events, &[]).unwrap().len() == 1);
    let event: Value = bed.reader.query_one(events, &[]).unwrap().get(0);
    for (field, value) in [
        ("operation", json!("update")),
        ("relation", json!("public.\"T\"")),
        ("scope", json!("expectation")),
        ("row_limit", json!(3)),
        ("rows", json!(6)),
        ("statement", json!("UPDATE \"T\" SET v = 1")),
        ("application", json!("the app")),
        ("login", json!("postgres")),
        ("policy", Value::Null),
    ] {
        assert_eq!(event[field], value, "field {field} of {event}");
    }
    // What is met is no event, and what is refused under a savepoint is one all the same.
    pass(
        &mut client,
        "SET writeguard.expect_rows = 6; MERGE INTO \"T\" USING \"T\" AS s ON s.id = \"T\".id WHEN MATCHED THEN DELETE",
    );
    pass(&mut client, "BEGIN; SAVEPOINT s; SET LOCAL writeguard.expect_rows = 1");
    assert_eq!(sqlstate(&mut client, "DELETE FROM \"T\""), "WG004");
    pass(&mut client, "ROLLBACK TO s; COMMIT");
    let all =
        "SELECT count(*) FROM writeguard.event WHERE kind = 'expectation_failed' AND operation = 'delete' AND rows = 0";
    wait_until(20, || bed.number(all) == 1);
    assert_eq!(bed.number("SELECT count(*) FROM writeguard.event"), 2);
    let mine = client.query_one("SELECT count(*) FROM writeguard.my_events", &[]).unwrap();
    assert_eq!(mine.get::<_, i64>(0), 2);
}

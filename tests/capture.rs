//! Rows are kept as they were, for writes past a limit on purpose.

use crate::common::limits::{self, Bed, SIX};
use crate::common::{Refusal, Server, expect_refusal, wait_until};
use serde_json::{Value, json};

/// All kept rows, in order: operation, before, after.
#[track_caller]
fn images(bed: &mut Bed) -> Vec<(String, Value, Option<Value>)> {
    let rows = bed.reader.query("SELECT operation, before, after FROM writeguard.image ORDER BY change, number", &[]);
    rows.expect("images").iter().map(|row| (row.get(0), row.get(1), row.get(2))).collect()
}

/// A bed whose table's writes past two rows take the flag, and are kept for a day.
fn bed(setup: &str) -> Bed {
    let mut bed = Bed::new(setup);
    bed.policy("tables => '{public.*}', max_rows => 2, override => 'flag', undo => '1 day'");
    bed
}

const FLAG: &str = "SET writeguard.override = on";

#[track_caller]
fn overrides(bed: &mut Bed, sql: &str) {
    bed.passes(FLAG);
    bed.passes(sql);
}

fn update(id: i32, was: i32, is: i32) -> (String, Value, Option<Value>) {
    let row = |v: i32| json!({"id": id.to_string(), "v": v.to_string()});
    ("update".into(), row(was), Some(row(is)))
}

fn delete(id: i32, v: i32) -> (String, Value, Option<Value>) {
    ("delete".into(), json!({"id": id.to_string(), "v": v.to_string()}), None)
}

#[test]
fn an_overridden_update_keeps_all_its_rows() {
    let mut bed = bed(SIX);
    overrides(&mut bed, "UPDATE t SET v = id * 10 WHERE id < 4");
    assert_eq!(images(&mut bed), [update(1, 0, 10), update(2, 0, 20), update(3, 0, 30)]);
    let row = bed
        .reader
        .query_one(
            "SELECT relation, operation, rows, statement, login = current_user, undone_at IS NULL,
                    kept_until - changed_at BETWEEN '23:59' AND '24:01', bytes > 0
             FROM writeguard.change",
            &[],
        )
        .expect("a change");
    let change: (&str, &str, i64, &str) = (row.get(0), row.get(1), row.get(2), row.get(3));
    assert_eq!(change, ("public.t", "update", 3, "UPDATE t SET v = id * 10 WHERE id < 4"));
    assert!((4..8).all(|column| row.get::<_, bool>(column)));
    let same = "SELECT count(*) FROM writeguard.event JOIN writeguard.change AS c ON reason = 'change ' || c.id
                WHERE kind = 'overridden'";
    assert_eq!(bed.number(same), 1);
}

#[test]
fn an_overridden_delete_keeps_whole_rows() {
    let mut bed = bed(SIX);
    overrides(&mut bed, "DELETE FROM t WHERE id > 3");
    assert_eq!(images(&mut bed), [delete(4, 0), delete(5, 0), delete(6, 0)]);
}

#[test]
fn truncate_keeps_all_rows_of_all_tables() {
    let mut bed = bed(&format!("{SIX} CREATE TABLE c (id int PRIMARY KEY REFERENCES t); INSERT INTO c VALUES (1);"));
    overrides(&mut bed, "TRUNCATE t CASCADE");
    assert_eq!(bed.number("SELECT count(*) FROM writeguard.image WHERE operation = 'truncate'"), 7);
    let rows = bed.reader.query("SELECT relation, rows FROM writeguard.change ORDER BY relation", &[]).expect("rows");
    let rows: Vec<(String, i64)> = rows.iter().map(|row| (row.get(0), row.get(1))).collect();
    assert_eq!(rows, [("public.c".to_owned(), 1), ("public.t".to_owned(), 6)]);
}

#[test]
fn what_needed_no_override_is_not_kept() {
    let mut bed = bed(SIX);
    overrides(&mut bed, "UPDATE t SET v = 1 WHERE id < 3");
    bed.refused("UPDATE t SET v = 1");
    bed.passes("BEGIN");
    overrides(&mut bed, "UPDATE t SET v = 2");
    bed.passes("ROLLBACK");
    assert_eq!(images(&mut bed), []);
    assert_eq!(bed.number("SELECT count(*) FROM writeguard.change_statement"), 0);
}

#[test]
fn a_session_may_keep_everything() {
    let mut bed = bed(SIX);
    bed.passes("SET writeguard.capture_undo = on; UPDATE t SET v = 1 WHERE id = 1");
    assert_eq!(images(&mut bed), [update(1, 0, 1)]);
    bed.passes("RESET writeguard.capture_undo; UPDATE t SET v = 2 WHERE id = 1");
    assert_eq!(images(&mut bed).len(), 1);
}

#[test]
fn rows_of_what_is_rolled_back_inside_are_not_kept() {
    let mut bed = bed(&format!(
        "{SIX}
         CREATE FUNCTION f() RETURNS void LANGUAGE plpgsql AS $$
         BEGIN
             UPDATE t SET v = 1 WHERE id < 4;
             BEGIN
                 DELETE FROM t;
                 RAISE EXCEPTION 'no';
             EXCEPTION WHEN raise_exception THEN
                 UPDATE t SET v = 2 WHERE id = 6;
             END;
         END $$;"
    ));
    overrides(&mut bed, "SELECT f()");
    assert_eq!(images(&mut bed), [update(1, 0, 1), update(2, 0, 1), update(3, 0, 1), update(6, 0, 2)]);
    bed.passes("BEGIN");
    overrides(&mut bed, "UPDATE t SET v = 8");
    bed.passes("SAVEPOINT s");
    bed.passes("DELETE FROM t");
    bed.passes("ROLLBACK TO s; COMMIT");
    assert_eq!(bed.number("SELECT count(*) FROM writeguard.change"), 2);
    assert_eq!(bed.number("SELECT count(*) FROM writeguard.image WHERE operation = 'delete'"), 0);
}

#[test]
fn each_statement_is_a_change_of_its_own() {
    let mut bed = bed(SIX);
    bed.passes("BEGIN");
    overrides(&mut bed, "UPDATE t SET v = 1");
    bed.passes("UPDATE t SET v = 2 WHERE id = 1");
    bed.passes("UPDATE t SET v = 3");
    bed.passes("COMMIT");
    let rows = bed.reader.query("SELECT rows FROM writeguard.change ORDER BY id", &[]).expect("changes");
    assert_eq!(rows.iter().map(|row| row.get::<_, i64>(0)).collect::<Vec<_>>(), [6, 6]);
    let third =
        bed.number("SELECT count(*) FROM writeguard.image WHERE before ->> 'id' = '1' AND before ->> 'v' = '2'");
    assert_eq!(third, 1);
}

#[test]
fn cascades_merges_and_conflicts_are_kept() {
    let mut bed = bed(&format!(
        "{SIX} CREATE TABLE c (id int PRIMARY KEY, t int REFERENCES t ON DELETE CASCADE ON UPDATE CASCADE);
         INSERT INTO c SELECT i, i FROM generate_series(1, 6) AS i;"
    ));
    overrides(&mut bed, "DELETE FROM t WHERE id < 3");
    let mut kept = images(&mut bed);
    kept.sort_by_key(|image| image.1.to_string());
    assert_eq!(kept.len(), 4);
    assert_eq!(kept[0], ("delete".into(), json!({"id": "1", "t": "1"}), None));
    bed.passes("SELECT count(*) FROM t");
    overrides(
        &mut bed,
        "MERGE INTO t USING generate_series(3, 8) AS i ON id = i WHEN MATCHED AND i = 3 THEN DELETE
         WHEN MATCHED THEN UPDATE SET v = 7 WHEN NOT MATCHED THEN INSERT VALUES (i, 9)",
    );
    assert_eq!(bed.number("SELECT count(*) FROM writeguard.image WHERE change = 2"), 1 + 1 + 3);
    overrides(
        &mut bed,
        "INSERT INTO t VALUES (4, 1), (5, 1), (6, 1), (9, 1) ON CONFLICT (id) DO UPDATE SET v = EXCLUDED.v + 100",
    );
    assert_eq!(&images(&mut bed)[9..], [update(4, 7, 101), update(5, 7, 101), update(6, 7, 101)]);
}

const PARTS: &str = "
    CREATE TABLE p (k int, v text, PRIMARY KEY (k)) PARTITION BY RANGE (k);
    CREATE TABLE p1 PARTITION OF p FOR VALUES FROM (0) TO (10);
    CREATE TABLE p2 (v text, dropped int, k int NOT NULL);
    ALTER TABLE p2 DROP COLUMN dropped;
    ALTER TABLE p ATTACH PARTITION p2 FOR VALUES FROM (10) TO (20);
    INSERT INTO p VALUES (1, 'one'), (2, 'two'), (11, 'eleven'), (12, 'twelve');";

#[test]
fn partitions_are_kept_by_the_table_at_their_top() {
    let mut bed = bed(PARTS);
    overrides(&mut bed, "UPDATE p SET k = CASE WHEN k < 10 THEN k + 14 ELSE k END, v = v || '!'");
    let row = |k: i32, v: &str| json!({"k": k.to_string(), "v": v});
    let mut kept = images(&mut bed);
    kept.sort_by_key(|image| image.1["v"].to_string());
    assert_eq!(
        kept,
        [
            ("update".into(), row(11, "eleven"), Some(row(11, "eleven!"))),
            ("update".into(), row(1, "one"), Some(row(15, "one!"))),
            ("update".into(), row(12, "twelve"), Some(row(12, "twelve!"))),
            ("update".into(), row(2, "two"), Some(row(16, "two!"))),
        ]
    );
    let change = bed.reader.query_one("SELECT relation, rows FROM writeguard.change", &[]).expect("one line");
    assert_eq!((change.get::<_, &str>(0), change.get::<_, i64>(1)), ("public.p", 4));
}

#[test]
fn a_row_that_another_session_changed_first_is_kept_as_it_was_then() {
    let mut bed = bed(SIX);
    bed.reader.batch_execute("BEGIN; UPDATE t SET v = 41 WHERE id = 1").expect("an update");
    let fresh = bed.db().admin();
    let mut writer = std::mem::replace(&mut bed.writer, fresh);
    let pid: i32 = writer.query_one("SELECT pg_backend_pid()", &[]).expect("a pid").get(0);
    let waiting = std::thread::spawn(move || {
        writer.batch_execute(FLAG).expect("the flag");
        writer.batch_execute("UPDATE t SET v = v + 1").expect("an update");
        writer.batch_execute(FLAG).expect("the flag");
        writer.batch_execute("DELETE FROM t").expect("a delete");
    });
    let mut watcher = bed.db().admin();
    wait_until(20, || {
        limits::number(&mut watcher, &format!("SELECT count(*) FROM pg_locks WHERE pid = {pid} AND NOT granted")) > 0
    });
    bed.reader.batch_execute("COMMIT").expect("a commit");
    waiting.join().expect("a write");
    let kept = images(&mut bed);
    assert_eq!(kept.iter().filter(|image| **image == update(1, 41, 42)).count(), 1);
    assert_eq!(kept.iter().filter(|image| **image == delete(1, 42)).count(), 1);
}

#[test]
fn values_are_kept_as_text_that_means_the_same_in_every_session() {
    let mut bed = bed(
        "CREATE TYPE pair AS (a int, b text);
         CREATE DOMAIN short AS varchar(5);
         CREATE TABLE t (id int PRIMARY KEY, d date, f float8, b bytea, n numeric, j jsonb, j2 jsonb, a text[], c pair,
                         s short, ts timestamptz, i interval, g int GENERATED ALWAYS AS (id * 2) STORED, big text, m money);
         INSERT INTO t (id, d, f, b, n, j, j2, a, c, s, ts, i, big, m)
         SELECT n, '2026-02-03', 0.1::float8 + 0.2::float8, '\\x00ff', 'NaN', 'null', NULL, '{a,NULL,\"b,c\"}', ROW(1, 'x y')::pair, 'abc',
                              'infinity', '1 mon 2 days', repeat('x', 100000), 12.34
         FROM generate_series(1, 3) AS n;",
    );
    bed.passes(
        "SET DateStyle = 'German'; SET extra_float_digits = -10; SET bytea_output = 'escape';
         SET IntervalStyle = 'sql_standard'; SET TimeZone = 'Asia/Tokyo'",
    );
    overrides(&mut bed, "DELETE FROM t");
    let kept = images(&mut bed);
    assert_eq!(kept.len(), 3);
    let mut before = kept[0].1.clone();
    assert_eq!(before["big"].as_str().map(str::len), Some(100_000));
    before.as_object_mut().expect("an object").remove("big");
    before.as_object_mut().expect("an object").remove("m");
    assert_eq!(
        before,
        json!({"id": "1", "d": "2026-02-03", "f": "0.30000000000000004", "b": "\\x00ff", "n": "NaN", "j": "null", "j2": null,
               "a": "{a,NULL,\"b,c\"}", "c": "(1,\"x y\")", "s": "abc", "ts": "infinity", "i": "1 mon 2 days", "g": "2"})
    );
    // And the session's settings are as they were.
    let style: String = bed.writer.query_one("SHOW DateStyle", &[]).expect("a setting").get(0);
    assert_eq!(style, "German, DMY");
}

#[test]
fn an_update_keeps_the_key_and_what_it_changed() {
    let mut bed = bed("CREATE TABLE t (id int PRIMARY KEY, a text, b text, c text);
         INSERT INTO t SELECT n, repeat('a', 10000), 'b', NULL FROM generate_series(1, 3) AS n;");
    overrides(&mut bed, "UPDATE t SET b = 'x', a = a, c = NULL");
    assert_eq!(
        images(&mut bed)[0],
        ("update".into(), json!({"id": "1", "b": "b"}), Some(json!({"id": "1", "b": "x"})))
    );
    overrides(&mut bed, "UPDATE t SET id = id + 10");
    assert_eq!(images(&mut bed)[3], ("update".into(), json!({"id": "1"}), Some(json!({"id": "11"}))));
}

#[test]
fn triggers_have_had_their_say() {
    let mut bed = bed(&format!(
        "{SIX}
         CREATE FUNCTION adjust() RETURNS trigger LANGUAGE plpgsql AS
           $$ BEGIN IF OLD.id = 2 THEN RETURN NULL; END IF; NEW.v := NEW.v + 1000; RETURN NEW; END $$;
         CREATE TRIGGER adjust BEFORE UPDATE ON t FOR EACH ROW EXECUTE FUNCTION adjust();"
    ));
    overrides(&mut bed, "UPDATE t SET v = id WHERE id < 5");
    assert_eq!(images(&mut bed), [update(1, 0, 1001), update(3, 0, 1003), update(4, 0, 1004)]);
}

#[test]
fn a_flag_that_comes_in_the_middle_of_a_statement_comes_too_late() {
    let mut bed = bed(&format!(
        "{SIX}
         CREATE FUNCTION armed() RETURNS boolean LANGUAGE sql SET writeguard.override = on
           AS 'WITH u AS (SELECT 1) SELECT true';
         CREATE FUNCTION f() RETURNS void LANGUAGE plpgsql AS $$
         BEGIN
             UPDATE t SET v = 1 WHERE id < 3;
             SET LOCAL writeguard.override = on;
             UPDATE t SET v = 2 WHERE id > 4;
         END $$;"
    ));
    let refusal = expect_refusal(bed.writer.batch_execute("SELECT f()"));
    assert_eq!(refusal.sqlstate, "WG008", "{refusal:?}");
    assert!(refusal.hint.starts_with("SET writeguard.override = on;"), "{refusal:?}");
    assert_eq!(bed.number("SELECT count(*) FROM t WHERE v <> 0"), 0);
    overrides(&mut bed, "SELECT f()");
    assert_eq!(images(&mut bed).len(), 4);
}

#[test]
fn a_table_without_a_primary_key_cannot_be_overridden_where_undo_is_asked_for() {
    let mut bed = bed("CREATE TABLE t (id int, v int); INSERT INTO t SELECT n, 0 FROM generate_series(1, 3) AS n;");
    bed.passes(FLAG);
    let refusal = expect_refusal(bed.writer.batch_execute("UPDATE t SET v = 1"));
    assert_eq!(
        (refusal.sqlstate.as_str(), refusal.hint.as_str()),
        ("WG008", "ALTER TABLE public.t ADD PRIMARY KEY (…);")
    );
    bed.passes("ALTER TABLE t ADD PRIMARY KEY (id)");
    overrides(&mut bed, "UPDATE t SET v = 1");
    assert_eq!(images(&mut bed).len(), 3);
}

#[test]
fn a_policy_that_names_such_a_table_is_refused() {
    let mut bed =
        Bed::new(&format!("{PARTS} CREATE TABLE bare (v int); CREATE TABLE pb (v int) PARTITION BY LIST (v);"));
    for (table, fine) in [("p", true), ("p1", true), ("bare", false), ("pb", false), ("*.*", true)] {
        let sql =
            format!("SELECT writeguard.set_policy('u', tables => '{{{table}}}', max_rows => 1, undo => '1 hour')");
        match bed.writer.batch_execute(&sql) {
            Ok(()) => assert!(fine, "{table}"),
            Err(error) => {
                let refusal = Refusal::of(&error);
                assert!(!fine && refusal.sqlstate == "WG007" && refusal.message.contains("primary key"), "{refusal:?}");
            }
        }
    }
    for undo in ["0", "-1 day"] {
        let sql = format!("SELECT writeguard.set_policy('u', undo => '{undo}')");
        assert_eq!(expect_refusal(bed.writer.batch_execute(&sql)).sqlstate, "WG007");
    }
}

#[test]
fn a_prepared_transaction_takes_its_rows_along() {
    let mut bed = bed(SIX);
    bed.passes("BEGIN");
    overrides(&mut bed, "UPDATE t SET v = 1");
    bed.passes("PREPARE TRANSACTION 'kept'");
    assert_eq!(images(&mut bed), []);
    bed.passes("COMMIT PREPARED 'kept'");
    assert_eq!(images(&mut bed).len(), 6);
}

#[test]
fn many_rows_do_not_have_to_fit_into_memory() {
    let mut bed = bed(
        "CREATE TABLE t (id int PRIMARY KEY, v int, w text); INSERT INTO t SELECT n, 0, repeat('w', 50) FROM generate_series(1, 50000) AS n;",
    );
    bed.passes("SET work_mem = '64kB'");
    overrides(&mut bed, "UPDATE t SET v = id");
    assert_eq!(bed.number("SELECT count(*) FROM writeguard.image"), 50000);
    let right =
        "SELECT count(*) FROM t JOIN writeguard.image ON (after ->> 'id')::int = id AND (after ->> 'v')::int = v
                   AND before ->> 'v' = '0'";
    assert_eq!(bed.number(right), 50000);
    assert_eq!(bed.number("SELECT count(DISTINCT number) FROM writeguard.image"), 50000);
    // Nor do those of an undo, nor of a statement that was not overridden in the end; and no file of theirs is left open.
    bed.passes("SELECT * FROM writeguard.undo(1)");
    bed.passes("BEGIN; RESET writeguard.override; UPDATE t SET v = 2 WHERE id <= 2; COMMIT");
    let log = Server::shared().log();
    assert!(
        !log.contains("temporary file leak"),
        "{}",
        log.lines().filter(|line| line.contains("leak")).collect::<String>()
    );
}

#[test]
fn a_change_can_be_discarded_and_only_by_who_owns_it() {
    let mut bed = bed(SIX);
    overrides(&mut bed, "DELETE FROM t");
    let role = bed.db().role("clerk");
    let mut clerk = bed.db().connect(&role);
    for sql in [
        "SELECT writeguard.discard(1)",
        "TABLE writeguard.change",
        "TABLE writeguard.image",
        "DELETE FROM writeguard.image",
    ] {
        assert_eq!(expect_refusal(clerk.batch_execute(sql)).sqlstate, "42501", "{sql}");
    }
    bed.passes("SELECT writeguard.discard(1)");
    assert_eq!(images(&mut bed), []);
    assert_eq!(bed.number("SELECT count(*) FROM writeguard.change"), 0);
    assert_eq!(expect_refusal(bed.writer.batch_execute("SELECT writeguard.discard(1)")).sqlstate, "WG007");
}

#[test]
fn a_rehearsal_keeps_nothing() {
    let mut bed = bed(SIX);
    bed.passes(FLAG);
    bed.passes("SELECT * FROM writeguard.preview('DELETE FROM t')");
    bed.passes("SELECT count(*) FROM t");
    assert_eq!(images(&mut bed), []);
}

// ---- And put back ----

#[track_caller]
fn undo(bed: &mut Bed, arguments: &str) -> Vec<(String, i64, i64)> {
    let rows = bed.writer.query(&format!("SELECT * FROM writeguard.undo({arguments})"), &[]);
    match rows {
        Ok(rows) => rows.iter().map(|row| (row.get(0), row.get(1), row.get(2))).collect(),
        Err(error) => panic!("{:?}", Refusal::of(&error)),
    }
}

/// What the statement did is put back by one undo, brought again by the next one, and put back again by the third.
#[track_caller]
fn there_and_back(setup: &str, sql: &str) {
    let mut bed = bed(setup);
    let before = bed.contents();
    overrides(&mut bed, sql);
    let after = bed.contents();
    assert_ne!(before, after, "{sql}");
    undo(&mut bed, "1");
    assert_eq!(bed.contents(), before, "{sql}: not put back");
    undo(&mut bed, "2");
    assert_eq!(bed.contents(), after, "{sql}: the undo was not undone");
    undo(&mut bed, "3");
    assert_eq!(bed.contents(), before, "{sql}: not put back again");
    let undoes = "SELECT count(*) FROM writeguard.change_statement WHERE (id, undoes) IN ((2, 1), (3, 2), (4, 3))";
    assert_eq!(bed.number(undoes), 3);
}

#[test]
fn updates_and_deletes_come_back() {
    there_and_back(SIX, "UPDATE t SET v = id * 10");
    there_and_back(SIX, "DELETE FROM t WHERE id > 2");
    there_and_back(SIX, "UPDATE t SET id = id + 100, v = 1");
    there_and_back(SIX, "WITH d AS (DELETE FROM t WHERE id < 4 RETURNING id) UPDATE t SET v = 9 WHERE id > 4");
    there_and_back(
        SIX,
        "MERGE INTO t USING generate_series(1, 6) AS i ON id = i WHEN MATCHED AND i < 4 THEN DELETE
         WHEN MATCHED THEN UPDATE SET v = 7",
    );
    there_and_back(
        SIX,
        "INSERT INTO t SELECT i, 1 FROM generate_series(1, 6) AS i ON CONFLICT (id) DO UPDATE SET v = EXCLUDED.v + 100",
    );
}

#[test]
fn truncated_tables_come_back() {
    there_and_back(
        &format!("{SIX} CREATE TABLE c (id int PRIMARY KEY REFERENCES t); INSERT INTO c VALUES (1), (2);"),
        "TRUNCATE t CASCADE",
    );
}

#[test]
fn parents_come_back_with_their_children() {
    let setup = format!(
        "{SIX} CREATE TABLE c (id int PRIMARY KEY, t int REFERENCES t ON DELETE CASCADE);
         INSERT INTO c SELECT i, i % 6 + 1 FROM generate_series(1, 12) AS i;"
    );
    there_and_back(&setup, "DELETE FROM t WHERE id < 4");
}

#[test]
fn rows_move_back_to_their_partitions() {
    there_and_back(PARTS, "UPDATE p SET k = CASE WHEN k < 10 THEN k + 14 ELSE k END, v = v || '!'");
    there_and_back(PARTS, "DELETE FROM p WHERE k < 12");
}

#[test]
fn an_undo_that_is_rolled_back_was_none() {
    let mut bed = bed(SIX);
    overrides(&mut bed, "UPDATE t SET v = 5");
    bed.passes("BEGIN");
    undo(&mut bed, "1");
    bed.passes("ROLLBACK");
    assert_eq!(bed.number("SELECT count(*) FROM t WHERE v = 5"), 6);
    assert_eq!(bed.number("SELECT count(*) FROM writeguard.change_statement"), 1);
    assert_eq!(undo(&mut bed, "1, dry_run => true"), [("public.t".into(), 6, 0)]);
    assert_eq!(bed.number("SELECT count(*) FROM t WHERE v = 5"), 6);
    undo(&mut bed, "1");
    assert_eq!(bed.number("SELECT count(*) FROM t WHERE v = 5"), 0);
    assert_eq!(bed.number("SELECT count(*) FROM writeguard.event WHERE kind = 'undone'"), 1);
}

#[test]
fn what_was_changed_again_since_is_told_and_left_alone() {
    let mut bed = bed(SIX);
    overrides(&mut bed, "UPDATE t SET v = 5");
    bed.reader.batch_execute("UPDATE t SET v = 6 WHERE id = 2; DELETE FROM t WHERE id = 3").expect("later writes");
    let refusal = expect_refusal(bed.writer.batch_execute("SELECT * FROM writeguard.undo(1)"));
    assert_eq!(refusal.sqlstate, "WG009", "{refusal:?}");
    assert_eq!(bed.number("SELECT count(*) FROM t WHERE v = 5"), 4);
    let rows =
        bed.writer.query("SELECT key, was, wrote, is_now FROM writeguard.undo_conflicts(1) ORDER BY key::text", &[]);
    let rows = rows.expect("conflicts");
    assert_eq!(rows.len(), 2);
    assert_eq!(undo(&mut bed, "1, on_conflict => 'skip'"), [("public.t".into(), 4, 2)]);
    assert_eq!(bed.number("SELECT sum(v) FROM t"), 6);
}

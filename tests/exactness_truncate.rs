//! TRUNCATE: live rows are counted exactly and refused with WG005.

use crate::common::limits::{Bed, SIX, assert_free, pass};
use crate::common::{Refusal, expect_refusal};

/// The statement fails with WG005 and leaves everything as it was.
#[track_caller]
fn refused(bed: &mut Bed, sql: &str) -> Refusal {
    let before = bed.contents();
    let refusal = expect_refusal(bed.writer.batch_execute(sql));
    let _ = bed.writer.batch_execute("ROLLBACK");
    assert_eq!(refusal.sqlstate, "WG005", "{sql}: {refusal:?}");
    assert_eq!(bed.contents(), before, "{sql}: refused, but not undone");
    refusal
}

/// Refused where the limit on `tables` is one row less, and passes where it is `rows`.
#[track_caller]
fn assert_truncate(tables: &str, setup: &str, sql: &str, rows: u64) -> Refusal {
    let mut bed = Bed::new(setup);
    bed.limit(tables, rows - 1);
    let refusal = refused(&mut bed, sql);
    bed.limit(tables, rows);
    bed.passes(sql);
    refusal
}

const PARTITIONED: &str = "
    CREATE TABLE t (id int, v int) PARTITION BY RANGE (id);
    CREATE TABLE t1 PARTITION OF t FOR VALUES FROM (1) TO (4);
    CREATE TABLE t2 PARTITION OF t FOR VALUES FROM (4) TO (100);
    INSERT INTO t SELECT i, 0 FROM generate_series(1, 6) AS i;";

const REFERENCED: &str = "
    CREATE TABLE t (id int PRIMARY KEY);
    CREATE TABLE u (id int PRIMARY KEY, t int REFERENCES t);
    CREATE TABLE w (u int REFERENCES u);
    INSERT INTO t SELECT generate_series(1, 6);
    INSERT INTO u SELECT i, i FROM generate_series(1, 5) AS i;
    INSERT INTO w SELECT i FROM generate_series(1, 4) AS i;";

#[test]
fn one_table() {
    let refusal = assert_truncate("{public.t}", SIX, "TRUNCATE t", 6);
    assert_eq!((refusal.schema.as_str(), refusal.table.as_str()), ("public", "t"));
    assert_truncate("{public.t}", SIX, "TRUNCATE TABLE ONLY t RESTART IDENTITY", 6);
}

#[test]
fn several_tables_share_one_budget() {
    let setup = format!("{SIX} CREATE TABLE u AS TABLE t; CREATE TABLE w AS TABLE t;");
    assert_truncate("{public.*}", &setup, "TRUNCATE t, u, w", 18);
    assert_truncate("{public.t, public.w}", &setup, "TRUNCATE t, u, w", 12);
    assert_truncate("{public.w}", &setup, "TRUNCATE t, u, w", 6);
}

#[test]
fn a_table_named_twice_counts_once() {
    assert_truncate("{public.t}", SIX, "TRUNCATE t, t", 6);
    assert_truncate("{public.t}", PARTITIONED, "TRUNCATE t, t1", 6);
    assert_truncate("{public.t}", PARTITIONED, "TRUNCATE t1, t", 6);
}

#[test]
fn cascade() {
    assert_truncate("{public.*}", REFERENCED, "TRUNCATE t CASCADE", 15);
    let refusal = assert_truncate("{public.w}", REFERENCED, "TRUNCATE t CASCADE", 4);
    assert_eq!(refusal.table, "w");
    assert_truncate("{public.*}", REFERENCED, "TRUNCATE t, u, w", 15);
}

#[test]
fn partitions() {
    assert_truncate("{public.t}", PARTITIONED, "TRUNCATE t", 6);
    assert_truncate("{public.t1}", PARTITIONED, "TRUNCATE t", 3);
    assert_truncate("{public.t}", PARTITIONED, "TRUNCATE t2", 3);
    assert_truncate("{public.*}", PARTITIONED, "TRUNCATE t1, t2", 6);
}

#[test]
fn inheritance_children() {
    let setup = "CREATE TABLE t (id int); CREATE TABLE child () INHERITS (t);
        INSERT INTO t SELECT generate_series(1, 2); INSERT INTO child SELECT generate_series(1, 4);";
    assert_truncate("{public.t}", setup, "TRUNCATE t", 6);
    assert_truncate("{public.t}", setup, "TRUNCATE ONLY t", 2);
    assert_truncate("{public.t}", setup, "TRUNCATE child", 4);
    assert_truncate("{public.child}", setup, "TRUNCATE t", 4);
}

#[test]
fn a_table_that_was_never_analysed_and_one_that_was() {
    let many = "CREATE TABLE t (id int); INSERT INTO t SELECT generate_series(1, 5000);";
    assert_truncate("{public.t}", many, "TRUNCATE t", 5000);
    assert_truncate("{public.t}", &format!("{many} ANALYZE t;"), "TRUNCATE t", 5000);
    // The statistics say 5000, and there are ten.
    assert_truncate("{public.t}", &format!("{many} ANALYZE t; DELETE FROM t WHERE id > 10;"), "TRUNCATE t", 10);
}

#[test]
fn dead_rows_do_not_count() {
    assert_truncate(
        "{public.t}",
        &format!("{SIX} UPDATE t SET v = 1; UPDATE t SET v = 2; DELETE FROM t WHERE id > 4;"),
        "TRUNCATE t",
        4,
    );
    assert_free(&format!("{SIX} DELETE FROM t;"), "TRUNCATE t");
}

/// Rows that another session rolled back.
#[test]
fn rolled_back_rows_do_not_count() {
    assert_truncate(
        "{public.t}",
        &format!("BEGIN; {SIX} COMMIT; BEGIN; INSERT INTO t SELECT generate_series(10, 100); ROLLBACK;"),
        "TRUNCATE t",
        6,
    );
}

#[test]
fn own_uncommitted_rows_count() {
    assert_truncate("{public.t}", SIX, "BEGIN; INSERT INTO t VALUES (7), (8); TRUNCATE t; COMMIT", 8);
    assert_truncate("{public.t}", SIX, "DO $$ BEGIN INSERT INTO t VALUES (7), (8); TRUNCATE t; END $$", 8);
}

#[test]
fn own_deleted_rows_do_not_count_again_in_a_later_statement() {
    assert_truncate("{public.t}", SIX, "BEGIN; DELETE FROM t WHERE id <= 2; TRUNCATE t; COMMIT", 4);
}

/// In one statement they are charged as deleted, and the rest as truncated.
#[test]
fn truncate_shares_the_budget_of_its_statement() {
    assert_truncate("{public.t}", SIX, "DO $$ BEGIN DELETE FROM t WHERE id <= 2; TRUNCATE t; END $$", 6);
}

/// What others committed after the transaction took its snapshot vanishes all the same.
#[test]
fn rows_that_the_snapshot_does_not_see_count() {
    let mut bed = Bed::new(SIX);
    bed.limit("{public.t}", 7);
    pass(&mut bed.writer, "BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1 FROM pg_class LIMIT 1");
    pass(&mut bed.reader, "INSERT INTO t VALUES (7), (8)");
    refused(&mut bed, "TRUNCATE t");
    bed.limit("{public.t}", 8);
    bed.passes("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1; TRUNCATE t; COMMIT");
}

#[test]
fn an_empty_table_is_free() {
    assert_free("CREATE TABLE t (id int)", "TRUNCATE t");
}

#[test]
fn a_partitioned_table_without_partitions_is_free() {
    assert_free("CREATE TABLE t (id int) PARTITION BY RANGE (id)", "TRUNCATE t");
}

#[test]
fn without_the_operation_in_the_policy_truncate_is_free() {
    let mut bed = Bed::new(SIX);
    bed.policy("tables => '{public.t}', operations => '{update,delete}', max_rows => 0");
    bed.passes("TRUNCATE t");
}

#[test]
fn only_the_operation_truncate() {
    let mut bed = Bed::new(SIX);
    bed.policy("tables => '{public.t}', operations => '{truncate}', max_rows => 0");
    bed.passes("UPDATE t SET v = 1");
    refused(&mut bed, "TRUNCATE t");
}

#[test]
fn inside_functions_and_triggers() {
    assert_truncate(
        "{public.t}",
        &format!(
            "{SIX} CREATE FUNCTION f() RETURNS void LANGUAGE sql AS 'TRUNCATE t';
             CREATE FUNCTION g() RETURNS void LANGUAGE plpgsql AS $$ BEGIN PERFORM f(); END $$;"
        ),
        "SELECT g()",
        6,
    );
    assert_truncate(
        "{public.*}",
        &format!(
            "{SIX} CREATE TABLE u AS TABLE t;
             CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS $$
             BEGIN TRUNCATE u; RETURN NULL; END $$;
             CREATE TRIGGER f BEFORE TRUNCATE ON t EXECUTE FUNCTION f();"
        ),
        "TRUNCATE t",
        12,
    );
}

#[test]
fn refused_in_an_exception_block_the_rest_goes_on() {
    let mut bed = Bed::new(SIX);
    bed.limit("{public.t}", 3);
    bed.passes(
        "DO $$ BEGIN
             BEGIN
                 TRUNCATE t;
                 RAISE 'not refused';
             EXCEPTION WHEN SQLSTATE 'WG005' THEN
                 UPDATE t SET v = 7 WHERE id <= 3;
             END;
         END $$",
    );
    assert_eq!(bed.number("SELECT count(*) FROM t WHERE v = 7"), 3);
    assert_eq!(bed.number("SELECT count(*) FROM t"), 6);
}

#[test]
fn limit_of_the_transaction() {
    let mut bed = Bed::new(SIX);
    bed.policy("tables => '{public.t}', max_rows_per_transaction => 8");
    refused(&mut bed, "BEGIN; UPDATE t SET v = 1 WHERE id <= 3; TRUNCATE t; COMMIT");
    bed.passes("BEGIN; UPDATE t SET v = 1 WHERE id <= 2; TRUNCATE t; COMMIT");
}

#[test]
fn a_truncate_that_a_savepoint_took_back_gives_its_rows_back() {
    let mut bed = Bed::new(SIX);
    bed.policy("tables => '{public.t}', max_rows_per_transaction => 6");
    bed.passes("BEGIN; SAVEPOINT a; TRUNCATE t; ROLLBACK TO a; TRUNCATE t; COMMIT");
}

/// A table that somebody may not truncate is core's to refuse.
#[test]
fn without_the_privilege_the_error_is_of_the_server() {
    let mut bed = Bed::new(SIX);
    let role = bed.db().role("stranger");
    bed.limit("{public.t}", 0);
    let mut stranger = bed.db().connect(&role);
    let refusal = expect_refusal(stranger.batch_execute("TRUNCATE t"));
    assert_eq!(refusal.sqlstate, "42501", "{refusal:?}");
}

#[test]
fn foreign_key_without_cascade_stays_the_error_of_the_server() {
    let mut bed = Bed::new(REFERENCED);
    bed.limit("{public.*}", 100);
    let refusal = expect_refusal(bed.writer.batch_execute("TRUNCATE t"));
    assert_eq!(refusal.sqlstate, "0A000", "{refusal:?}");
}

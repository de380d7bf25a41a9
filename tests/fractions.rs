//! Fractions of a table, as its size says now, never below ten rows.

use crate::common::expect_refusal;
use crate::common::limits::{Bed, pass};

/// A table of 1,000 rows whose statistics are those of the empty table it once was.
const GROWN: &str = "
    CREATE TABLE t (id int PRIMARY KEY, v int NOT NULL DEFAULT 0);
    ANALYZE t;
    INSERT INTO t SELECT i, 0 FROM generate_series(1, 1000) AS i;";

fn first(rows: u64) -> String {
    format!("UPDATE t SET v = v + 1 WHERE id <= {rows}")
}

/// The limit that a refusal tells of.
#[track_caller]
fn limit_of(bed: &mut Bed, sql: &str) -> u64 {
    let refusal = bed.refused(sql);
    let words = refusal.message.split_once("the limit of ").expect("a limit").1;
    words.split(' ').next().and_then(|number| number.parse().ok()).expect("a number")
}

#[test]
fn a_tenth_of_the_rows_and_not_one_more() {
    let mut bed = Bed::new(&format!("{GROWN} ANALYZE t;"));
    bed.policy("tables => '{public.t}', max_fraction => 0.1");
    let refusal = bed.refused(&first(101));
    bed.passes(&first(100));
    assert_eq!(refusal.said(), "update of table \"public.t\" exceeds the limit of 100 rows per statement");
    assert!(refusal.detail.contains("0.1 of the about 1000 rows that the table holds"), "{refusal:?}");
    let row = bed
        .reader
        .query_one("SELECT scope, row_limit, rows FROM writeguard.event WHERE kind = 'blocked'", &[])
        .expect("an event");
    let event: (&str, i64, i64) = (row.get(0), row.get(1), row.get(2));
    assert_eq!(event, ("fraction", 100, 101));
}

#[test]
fn the_size_of_now_counts_and_not_that_of_the_last_analyze() {
    let mut bed =
        Bed::new(&format!("{GROWN} ANALYZE t; INSERT INTO t SELECT i, 0 FROM generate_series(1001, 10000) AS i;"));
    bed.policy("tables => '{public.t}', max_fraction => 0.1");
    let limit = limit_of(&mut bed, "UPDATE t SET v = 1");
    assert!((900..=1100).contains(&limit), "{limit}");
}

#[test]
fn a_table_that_was_never_analyzed_has_a_sensible_size() {
    let mut bed =
        Bed::new("CREATE TABLE t (id int, v int); INSERT INTO t SELECT i, 0 FROM generate_series(1, 20000) AS i;");
    bed.policy("tables => '{public.t}', max_fraction => 0.1");
    let limit = limit_of(&mut bed, "UPDATE t SET v = 1");
    assert!((1000..=4000).contains(&limit), "{limit}");
}

#[test]
fn small_and_empty_tables_have_ten_rows() {
    for rows in [0, 1, 10] {
        let mut bed = Bed::new(&format!(
            "CREATE TABLE t (id int PRIMARY KEY, v int); INSERT INTO t SELECT i, 0 FROM generate_series(1, {rows}) AS i; ANALYZE t;"
        ));
        bed.policy("tables => '{public.t}', max_fraction => 0");
        bed.passes("UPDATE t SET v = 1; TRUNCATE t");
    }
    let mut bed = Bed::new(
        "CREATE TABLE t (id int PRIMARY KEY, v int); INSERT INTO t SELECT i, 0 FROM generate_series(1, 11) AS i; ANALYZE t;",
    );
    bed.policy("tables => '{public.t}', max_fraction => 0");
    assert_eq!(limit_of(&mut bed, "UPDATE t SET v = 1"), 10);
    bed.passes("UPDATE t SET v = 1 WHERE id > 1");
}

#[test]
fn partitions_are_measured_by_their_tree() {
    let mut bed = Bed::new(
        "CREATE TABLE t (id int, v int) PARTITION BY RANGE (id);
         CREATE TABLE small PARTITION OF t FOR VALUES FROM (1) TO (101);
         CREATE TABLE large PARTITION OF t FOR VALUES FROM (101) TO (1001);
         INSERT INTO t SELECT i, 0 FROM generate_series(1, 1000) AS i; ANALYZE t, small, large;",
    );
    bed.policy("tables => '{public.t}', max_fraction => 0.1");
    assert_eq!(limit_of(&mut bed, "UPDATE t SET v = 1 WHERE id <= 101"), 100);
    // The smaller partition alone would allow ten. What was refused made the tree a little larger.
    bed.passes("UPDATE small SET v = 2");
    let limit = limit_of(&mut bed, "UPDATE t SET v = 1 WHERE id BETWEEN 50 AND 300");
    assert!((100..=130).contains(&limit), "{limit}");
}

#[test]
fn each_table_of_a_policy_has_its_own_fraction() {
    let mut bed = Bed::new(&format!("{GROWN} CREATE TABLE u AS TABLE t; ANALYZE t, u;"));
    bed.policy("tables => '{public.*}', max_fraction => 0.1");
    // What is refused, or replaced, stays in the table's size for a while.
    bed.refused("WITH u AS (UPDATE u SET v = 1 WHERE id <= 101) UPDATE t SET v = 1 WHERE id <= 100");
    bed.refused("WITH u AS (UPDATE u SET v = 1 WHERE id <= 100) UPDATE t SET v = 1 WHERE id <= 150");
    bed.passes("WITH u AS (UPDATE u SET v = 1 WHERE id <= 100) UPDATE t SET v = 1 WHERE id <= 100");
}

#[test]
fn statements_count_from_zero_and_rolled_back_parts_do_not_count() {
    let mut bed = Bed::new(&format!("{GROWN} ANALYZE t;"));
    bed.policy("tables => '{public.t}', max_fraction => 0.1");
    bed.passes(&format!("BEGIN; {}; {}; COMMIT", first(100), first(100)));
    let block = "DO $$ BEGIN
        BEGIN UPDATE t SET v = 9 WHERE id <= 100; RAISE 'no'; EXCEPTION WHEN raise_exception THEN END;
        UPDATE t SET v = 9 WHERE id <= N; END $$";
    bed.passes(&block.replace("<= N", "<= 100"));
    bed.refused(&block.replace("<= N", "<= 250"));
}

#[test]
fn truncate_counts_all_its_rows() {
    let mut bed = Bed::new(&format!("{GROWN} ANALYZE t;"));
    bed.policy("tables => '{public.t}', max_fraction => 0.5");
    let refusal = expect_refusal(bed.writer.batch_execute("TRUNCATE t"));
    assert_eq!(refusal.sqlstate, "WG005", "{refusal:?}");
    bed.policy("tables => '{public.t}', max_fraction => 1");
    bed.passes("TRUNCATE t");
}

#[test]
fn both_limits_of_a_policy_hold() {
    let mut bed = Bed::new(&format!("{GROWN} ANALYZE t;"));
    bed.policy("tables => '{public.t}', max_fraction => 0.1, max_rows => 50");
    assert_eq!(limit_of(&mut bed, "UPDATE t SET v = 1"), 50);
    bed.policy("tables => '{public.t}', max_fraction => 0.1, max_rows => 500");
    let limit = limit_of(&mut bed, "UPDATE t SET v = 1");
    assert!((100..=110).contains(&limit), "{limit}");
}

#[test]
fn what_is_no_fraction_is_refused() {
    let mut bed = Bed::new(GROWN);
    for fraction in ["-0.1", "1.01", "'NaN'", "'infinity'"] {
        let sql = format!("SELECT writeguard.set_policy('p', max_fraction => {fraction})");
        assert_eq!(expect_refusal(bed.reader.batch_execute(&sql)).sqlstate, "WG007", "{fraction}");
    }
    bed.policy("tables => '{public.t}', max_fraction => 0.25");
    pass(
        &mut bed.reader,
        "DO $$ BEGIN ASSERT (SELECT value FROM writeguard.effective('t', current_user, 'update')) = '0.25'; END $$",
    );
}

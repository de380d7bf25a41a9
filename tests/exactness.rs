//! Row changes are counted exactly: for each way to write, a limit of one row less refuses
//! and leaves everything as it was, and the limit itself passes. Here: the plain
//! statements. The others have files of their own.

use std::io::Read;

use crate::common::expect_refusal;
use crate::common::limits::{Bed, SIX, assert_free, assert_free_on, assert_limit, assert_limit_on};

/// Two tables of 60 rows.
const SIXTIES: &str = "
    CREATE TABLE a (id int PRIMARY KEY, v int NOT NULL DEFAULT 0);
    CREATE TABLE b (id int PRIMARY KEY, v int NOT NULL DEFAULT 0);
    INSERT INTO a SELECT i, 0 FROM generate_series(1, 60) AS i;
    INSERT INTO b SELECT i, 0 FROM generate_series(1, 60) AS i;";

/// A target with rows 1 to 6 and a source with rows 4 to 9.
const MERGED: &str = "
    CREATE TABLE t (id int PRIMARY KEY, v int NOT NULL DEFAULT 0);
    CREATE TABLE s (id int PRIMARY KEY, v int NOT NULL DEFAULT 0);
    INSERT INTO t SELECT i, 0 FROM generate_series(1, 6) AS i;
    INSERT INTO s SELECT i, i FROM generate_series(4, 9) AS i;";

// UPDATE and DELETE

#[test]
fn update() {
    let refusal = assert_limit(SIX, "UPDATE t SET v = 1", 6);
    assert_eq!((refusal.schema.as_str(), refusal.table.as_str()), ("public", "t"));
    assert!(refusal.detail.contains('5'), "{refusal:?}");
    assert!(refusal.detail.contains('6'), "{refusal:?}");
}

#[test]
fn update_of_some_rows() {
    assert_limit(SIX, "UPDATE t SET v = 1 WHERE id > 2", 4);
}

#[test]
fn update_of_a_single_row() {
    assert_limit(SIX, "UPDATE t SET v = 1 WHERE id = 2", 1);
}

/// A row that gets the value it had is a row change, as it is for the command tag.
#[test]
fn update_to_the_same_values_counts() {
    let mut bed = Bed::new(SIX);
    bed.limit("{public.t}", 5);
    bed.refused("UPDATE t SET v = v");
    bed.limit("{public.t}", 6);
    bed.passes("UPDATE t SET v = v");
}

#[test]
fn delete() {
    let refusal = assert_limit(SIX, "DELETE FROM t", 6);
    assert_eq!((refusal.schema.as_str(), refusal.table.as_str()), ("public", "t"));
}

#[test]
fn delete_of_some_rows() {
    assert_limit(SIX, "DELETE FROM t WHERE id IN (1, 2, 3)", 3);
}

#[test]
fn update_returning() {
    assert_limit(SIX, "UPDATE t SET v = 1 RETURNING id, v", 6);
}

#[test]
fn delete_returning() {
    assert_limit(SIX, "DELETE FROM t RETURNING *", 6);
}

#[test]
fn update_by_index_scan() {
    assert_limit(&format!("{SIX} SET enable_seqscan = off;"), "UPDATE t SET v = 1 WHERE id BETWEEN 2 AND 5", 4);
}

#[test]
fn delete_by_ctid() {
    assert_limit(SIX, "DELETE FROM t WHERE ctid = ANY (ARRAY(SELECT ctid FROM t WHERE id > 1))", 5);
}

#[test]
fn update_of_a_large_table_counts_past_one_page() {
    assert_limit(
        "CREATE TABLE t (id int PRIMARY KEY, v int);
         INSERT INTO t SELECT i, 0 FROM generate_series(1, 20000) AS i;",
        "UPDATE t SET v = 1",
        20_000,
    );
}

/// Each row of t matches ten of s; it is changed once.
#[test]
fn update_from_with_rows_matched_several_times() {
    assert_limit(
        &format!("{SIX} CREATE TABLE s AS SELECT i % 6 + 1 AS id FROM generate_series(1, 60) AS i;"),
        "UPDATE t SET v = t.v + 1 FROM s WHERE s.id = t.id",
        6,
    );
}

#[test]
fn delete_using_with_rows_matched_several_times() {
    assert_limit(
        &format!("{SIX} CREATE TABLE s AS SELECT i % 6 + 1 AS id FROM generate_series(1, 60) AS i;"),
        "DELETE FROM t USING s WHERE s.id = t.id",
        6,
    );
}

#[test]
fn update_with_subqueries() {
    assert_limit(
        SIX,
        "UPDATE t SET (id, v) = (SELECT t.id + 100, count(*) FROM t AS u) \
         WHERE v = (SELECT min(v) FROM t)",
        6,
    );
}

#[test]
fn only_the_operations_of_the_policy_count() {
    let mut bed = Bed::new(SIX);
    bed.policy("tables => '{public.t}', operations => '{delete}', max_rows => 0");
    bed.passes("UPDATE t SET v = 1");
    bed.passes("MERGE INTO t USING (SELECT 1 AS id) AS s ON s.id = t.id WHEN MATCHED THEN UPDATE SET v = 2");
    bed.refused("DELETE FROM t WHERE id = 1");
    bed.refused("MERGE INTO t USING (SELECT 1 AS id) AS s ON s.id = t.id WHEN MATCHED THEN DELETE");
    bed.policy("tables => '{public.t}', operations => '{update}', max_rows => 0");
    bed.passes("DELETE FROM t WHERE id = 1");
    bed.refused("UPDATE t SET v = 2 WHERE id = 2");
    bed.refused("INSERT INTO t VALUES (2) ON CONFLICT (id) DO UPDATE SET v = 3");
}

/// A sequence remembers what a rollback takes back, so it tells how many rows were touched.
#[test]
fn at_most_one_row_past_the_limit_is_touched() {
    let setup = "
        CREATE TABLE t (id int PRIMARY KEY, v int NOT NULL DEFAULT 0);
        INSERT INTO t SELECT i, 0 FROM generate_series(1, 1000) AS i;
        CREATE SEQUENCE touched MINVALUE 0;
        CREATE FUNCTION touch() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            PERFORM nextval('touched');
            RETURN coalesce(NEW, OLD);
        END $$;
        CREATE TRIGGER touch BEFORE UPDATE OR DELETE ON t FOR EACH ROW EXECUTE FUNCTION touch();";
    let mut bed = Bed::new(setup);
    bed.limit("{public.t}", 3);
    for sql in [
        "UPDATE t SET v = 1",
        "DELETE FROM t",
        "WITH u AS (UPDATE t SET v = 1 RETURNING id) SELECT count(*) FROM u",
        "WITH d AS (DELETE FROM t) SELECT 1",
        "MERGE INTO t USING t AS s ON s.id = t.id WHEN MATCHED THEN UPDATE SET v = 1",
        "MERGE INTO t USING t AS s ON s.id = t.id WHEN MATCHED THEN DELETE",
        "INSERT INTO t SELECT * FROM t ON CONFLICT (id) DO UPDATE SET v = 1",
    ] {
        bed.passes("SELECT setval('touched', 0, false)");
        bed.refused(sql);
        let touched = bed.number("SELECT nextval('touched')");
        assert!(touched <= 4, "{sql}: {touched} rows were touched");
    }
}

// WITH

#[test]
fn cte_update() {
    assert_limit(SIX, "WITH u AS (UPDATE t SET v = 1 RETURNING id) SELECT count(*) FROM u", 6);
}

#[test]
fn cte_delete() {
    assert_limit(SIX, "WITH d AS (DELETE FROM t RETURNING id) SELECT * FROM d", 6);
}

#[test]
fn cte_that_the_main_query_does_not_read() {
    assert_limit(SIX, "WITH u AS (UPDATE t SET v = 1) SELECT 1", 6);
    assert_limit(SIX, "WITH d AS (DELETE FROM t RETURNING id) SELECT 1", 6);
}

/// PostgreSQL runs such a branch to its end, however little of it is read.
#[test]
fn cte_that_the_main_query_reads_in_part() {
    assert_limit(SIX, "WITH u AS (UPDATE t SET v = 1 RETURNING id) SELECT id FROM u LIMIT 1", 6);
}

#[test]
fn cte_read_twice_counts_once() {
    assert_limit(SIX, "WITH u AS (UPDATE t SET v = 1 RETURNING id) SELECT * FROM u AS x, u AS y", 6);
}

#[test]
fn two_ctes_share_the_budget_of_one_policy() {
    let sql = "WITH x AS (UPDATE a SET v = 1), y AS (UPDATE b SET v = 1) SELECT 1";
    let mut bed = Bed::new(SIXTIES);
    bed.limit("{public.a, public.b}", 100);
    bed.refused(sql);
    bed.exactly("{public.a, public.b}", sql, 120);
}

#[test]
fn two_ctes_that_are_read_in_turn() {
    assert_limit(
        SIXTIES,
        "WITH x AS (UPDATE a SET v = 1 RETURNING id), y AS (DELETE FROM b RETURNING id) \
         SELECT count(*) FROM x FULL JOIN y USING (id)",
        120,
    );
}

#[test]
fn cte_and_main_statement_are_both_counted() {
    assert_limit(SIXTIES, "WITH x AS (UPDATE a SET v = 1 RETURNING id) DELETE FROM b USING x WHERE x.id = b.id", 120);
    assert_limit_on(
        "{public.a}",
        SIXTIES,
        "WITH x AS (UPDATE a SET v = 1 RETURNING id) DELETE FROM b USING x WHERE x.id = b.id",
        60,
    );
    assert_limit_on(
        "{public.b}",
        SIXTIES,
        "WITH x AS (UPDATE a SET v = 1 RETURNING id) DELETE FROM b USING x WHERE x.id = b.id",
        60,
    );
}

#[test]
fn two_ctes_on_one_table() {
    assert_limit(
        SIX,
        "WITH x AS (UPDATE t SET v = 1 WHERE id <= 3 RETURNING id), \
         y AS (DELETE FROM t WHERE id > 3 RETURNING id) SELECT * FROM x UNION ALL SELECT * FROM y",
        6,
    );
}

/// Each branch feeds the next.
#[test]
fn chained_ctes() {
    assert_limit(
        &format!("{SIXTIES} CREATE TABLE c AS TABLE a;"),
        "WITH x AS (DELETE FROM a RETURNING id), \
         y AS (UPDATE b SET v = 1 FROM x WHERE x.id = b.id RETURNING b.id), \
         z AS (DELETE FROM c USING y WHERE y.id = c.id RETURNING c.id) \
         SELECT count(*) FROM z",
        180,
    );
}

/// A WITH inside a branch.
#[test]
fn nested_ctes() {
    assert_limit(
        SIXTIES,
        "WITH y AS (WITH x AS (SELECT id FROM a WHERE id > 20) \
         UPDATE b SET v = 1 FROM x WHERE x.id = b.id RETURNING b.id) SELECT count(*) FROM y",
        40,
    );
}

#[test]
fn cte_insert_is_free_beside_one_that_counts() {
    assert_limit(SIXTIES, "WITH x AS (DELETE FROM a RETURNING id) INSERT INTO b SELECT id + 100 FROM x", 60);
    assert_free_on(
        "{public.b}",
        SIXTIES,
        "WITH x AS (DELETE FROM a RETURNING id) INSERT INTO b SELECT id + 100 FROM x",
    );
}

#[test]
fn cte_under_create_table_as() {
    assert_limit(SIX, "CREATE TABLE copied AS WITH d AS (DELETE FROM t RETURNING id) SELECT * FROM d", 6);
}

#[test]
fn cte_under_merge_source() {
    assert_limit(
        MERGED,
        "WITH d AS (SELECT id FROM s WHERE id < 6) MERGE INTO t USING d ON d.id = t.id \
         WHEN MATCHED THEN UPDATE SET v = 1",
        2,
    );
}

#[test]
fn cte_update_of_rows_that_no_longer_exist_in_the_same_statement() {
    // Both branches see the same snapshot: the second to come finds the row changed and leaves it.
    let mut bed = Bed::new(SIX);
    bed.limit("{public.t}", 6);
    bed.passes(
        "WITH d AS (DELETE FROM t RETURNING id), u AS (UPDATE t SET v = 1 RETURNING id) \
         SELECT * FROM d UNION ALL SELECT * FROM u",
    );
}

#[test]
fn copy_of_returning_to_stdout() {
    for (sql, rows) in [
        ("COPY (UPDATE t SET v = 1 RETURNING id) TO STDOUT", 6),
        ("COPY (DELETE FROM t WHERE id > 3 RETURNING *) TO STDOUT", 3),
        ("COPY (WITH u AS (UPDATE t SET v = 1 WHERE id > 1 RETURNING id) SELECT * FROM u) TO STDOUT", 5),
        ("COPY (INSERT INTO t VALUES (1), (2), (100) ON CONFLICT (id) DO UPDATE SET v = 1 RETURNING id) TO STDOUT", 2),
    ] {
        let mut bed = Bed::new(SIX);
        let before = bed.contents();
        bed.limit("{public.t}", rows - 1);
        let mut copied = String::new();
        let mut refused = bed.writer.copy_out(sql).unwrap();
        assert!(refused.read_to_string(&mut copied).is_err(), "{sql} passed a limit of one row less with {copied}");
        drop(refused);
        assert_eq!(bed.contents(), before, "{sql}");

        bed.limit("{public.t}", rows);
        let mut copied = String::new();
        bed.writer.copy_out(sql).unwrap().read_to_string(&mut copied).unwrap();
        assert!(copied.lines().count() as u64 >= rows, "{sql}");
        assert_ne!(bed.contents(), before, "{sql}");
    }
}

// Not limited

#[test]
fn insert_is_free() {
    assert_free(SIX, "INSERT INTO t SELECT i, 0 FROM generate_series(7, 1000) AS i");
    assert_free(SIX, "INSERT INTO t VALUES (7, 0) RETURNING id");
}

#[test]
fn copy_in_is_free() {
    use std::io::Write;
    let mut bed = Bed::new(SIX);
    bed.limit("{*.*}", 0);
    let mut copy = bed.writer.copy_in("COPY t FROM STDIN").unwrap();
    copy.write_all(b"7\t0\n8\t0\n").unwrap();
    assert_eq!(copy.finish().unwrap(), 2);
}

#[test]
fn reading_and_locking_rows_is_free() {
    assert_free(SIX, "SELECT * FROM t FOR UPDATE");
}

#[test]
fn refreshing_a_materialized_view_is_free() {
    for concurrently in ["", "CONCURRENTLY"] {
        assert_free(
            &format!(
                "{SIX} CREATE MATERIALIZED VIEW m AS TABLE t; CREATE UNIQUE INDEX ON m (id);
                 UPDATE t SET v = 1; DELETE FROM t WHERE id = 1;"
            ),
            &format!("REFRESH MATERIALIZED VIEW {concurrently} m"),
        );
    }
}

// EXPLAIN

#[test]
fn explain_is_never_refused() {
    for sql in [
        "UPDATE t SET v = 1",
        "DELETE FROM t",
        "WITH u AS (UPDATE t SET v = 1) SELECT 1",
        "MERGE INTO t USING s ON s.id = t.id WHEN MATCHED THEN DELETE",
        "INSERT INTO t TABLE s ON CONFLICT (id) DO UPDATE SET v = 1",
    ] {
        let mut bed = Bed::new(MERGED);
        bed.limit("{*.*}", 0);
        let before = bed.contents();
        bed.passes(&format!("EXPLAIN {sql}"));
        bed.passes(&format!("EXPLAIN (VERBOSE, COSTS OFF) {sql}"));
        assert_eq!(bed.contents(), before);
        bed.refused(&format!("EXPLAIN ANALYZE {sql}"));
    }
}

#[test]
fn explain_analyze_counts_what_it_runs() {
    assert_limit(SIX, "EXPLAIN ANALYZE UPDATE t SET v = 1", 6);
    assert_limit(SIX, "EXPLAIN (ANALYZE, TIMING OFF) DELETE FROM t WHERE id > 2", 4);
    assert_limit(SIX, "EXPLAIN ANALYZE WITH u AS (UPDATE t SET v = 1 RETURNING id) SELECT * FROM u", 6);
    assert_limit(MERGED, "EXPLAIN ANALYZE INSERT INTO t TABLE s ON CONFLICT (id) DO UPDATE SET v = EXCLUDED.v", 3);
}

/// What EXPLAIN ANALYZE tells of a counted write is what it would tell without a policy.
#[test]
fn explain_analyze_shows_the_same_numbers() {
    let mut bed = Bed::new(MERGED);
    let sql = "EXPLAIN (ANALYZE, COSTS OFF, TIMING OFF, SUMMARY OFF, BUFFERS OFF) \
               WITH u AS (UPDATE s SET v = 0 WHERE id > 4 RETURNING id) \
               INSERT INTO t SELECT id, 1 FROM u ON CONFLICT (id) DO UPDATE SET v = EXCLUDED.v";
    let shown = |bed: &mut Bed| -> Vec<String> {
        let mut transaction = bed.writer.transaction().unwrap();
        transaction.query(sql, &[]).unwrap().iter().map(|row| row.get(0)).collect()
    };
    let without = shown(&mut bed);
    bed.limit("{public.*}", 100);
    assert_eq!(shown(&mut bed), without);
}

/// The command tag stays what it was, for the main statement and whatever it has in WITH.
#[test]
fn command_tags_stay_what_they_are() {
    let mut bed = Bed::new(MERGED);
    bed.limit("{public.*}", 100);
    for (sql, rows) in [
        ("UPDATE t SET v = 1 WHERE id > 2", 4),
        ("WITH u AS (UPDATE t SET v = 2) UPDATE s SET v = 1 WHERE id = 4", 1),
        ("WITH u AS (UPDATE t SET v = 3 RETURNING id) SELECT * FROM u WHERE id > 4", 2),
        ("WITH u AS (UPDATE t SET v = 4 RETURNING id) INSERT INTO s SELECT id + 50 FROM u WHERE id > 3", 3),
        ("INSERT INTO t SELECT i, 5 FROM generate_series(5, 8) AS i ON CONFLICT (id) DO UPDATE SET v = 5", 4),
        (
            "MERGE INTO t USING generate_series(7, 9) AS s ON s = t.id WHEN MATCHED THEN DELETE WHEN NOT MATCHED THEN INSERT VALUES (s, 1)",
            3,
        ),
        ("DELETE FROM t WHERE id < 3", 2),
    ] {
        assert_eq!(bed.writer.execute(sql, &[]).unwrap(), rows, "{sql}");
    }
}

// Limits

#[test]
fn limit_zero_means_not_one_row() {
    let mut bed = Bed::new(SIX);
    bed.limit("{public.t}", 0);
    bed.refused("UPDATE t SET v = 1 WHERE id = 1");
    bed.refused("DELETE FROM t WHERE id = 1");
}

#[test]
fn a_write_of_no_rows_always_passes() {
    assert_free(SIX, "UPDATE t SET v = 1 WHERE id > 100");
    assert_free(SIX, "DELETE FROM t WHERE false");
    assert_free(SIX, "WITH d AS (DELETE FROM t WHERE id > 100) SELECT 1");
    assert_free(MERGED, "MERGE INTO t USING s ON s.id = t.id AND s.id > 100 WHEN MATCHED THEN DELETE");
}

#[test]
fn limit_null_is_no_limit() {
    let mut bed = Bed::new(SIX);
    bed.policy("tables => '{public.t}', max_rows => NULL");
    bed.passes("UPDATE t SET v = 1");
    bed.passes("DELETE FROM t");
}

#[test]
fn of_several_policies_the_strictest_decides() {
    let mut bed = Bed::new(SIX);
    bed.limit("{public.t}", 5);
    bed.passes("SELECT writeguard.set_policy('other', tables => '{public.t}', max_rows => 3)");
    let refusal = bed.refused("UPDATE t SET v = 1 WHERE id <= 4");
    assert!(refusal.detail.contains("other"), "{refusal:?}");
    bed.passes("UPDATE t SET v = 1 WHERE id <= 3");
    bed.passes("SELECT writeguard.drop_policy('other')");
    bed.passes("UPDATE t SET v = 1 WHERE id <= 5");
    bed.refused("UPDATE t SET v = 1");
}

#[test]
fn a_table_that_no_policy_names_is_free() {
    let mut bed = Bed::new(SIXTIES);
    bed.limit("{public.a}", 0);
    bed.passes("UPDATE b SET v = 1");
    bed.refused("UPDATE a SET v = 1");
}

/// Other people's errors come as they would without a policy.
#[test]
fn an_error_of_the_write_itself_stays_what_it_is() {
    let mut bed = Bed::new(SIX);
    bed.limit("{public.t}", 3);
    let refusal = expect_refusal(bed.writer.batch_execute("UPDATE t SET id = 1 WHERE id = 2"));
    assert_eq!(refusal.sqlstate, "23505");
    assert_eq!(refusal.constraint, "t_pkey");
    let refusal = expect_refusal(bed.writer.batch_execute("UPDATE t SET v = 1 / 0"));
    assert_eq!(refusal.sqlstate, "22012");
    bed.exactly("{public.t}", "UPDATE t SET v = 1 WHERE id > 2", 4);
}

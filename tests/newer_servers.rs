//! What PostgreSQL 17 and 18 brought: kinds of writes that earlier servers do not have.
#![cfg(any(feature = "pg17", feature = "pg18"))]

use crate::common::expect_refusal;
use crate::common::kept;
use crate::common::limits::*;

/// `t` of six rows, and `s` with two of their keys and a new one.
const SOURCE: &str = "
    CREATE TABLE t (id int PRIMARY KEY, v int NOT NULL DEFAULT 0);
    INSERT INTO t SELECT i, 0 FROM generate_series(1, 6) AS i;
    CREATE TABLE s (id int PRIMARY KEY); INSERT INTO s VALUES (1), (2), (9)";

#[test]
fn rows_that_no_source_matches_are_counted() {
    for (actions, rows) in [
        ("WHEN NOT MATCHED BY SOURCE THEN DELETE", 4),
        ("WHEN NOT MATCHED BY SOURCE AND t.id > 4 THEN UPDATE SET v = 1", 2),
        ("WHEN MATCHED THEN UPDATE SET v = 1 WHEN NOT MATCHED BY SOURCE THEN DELETE", 6),
        (
            "WHEN MATCHED THEN DELETE WHEN NOT MATCHED BY SOURCE AND t.id = 3 THEN DO NOTHING
             WHEN NOT MATCHED BY SOURCE THEN UPDATE SET v = 2 WHEN NOT MATCHED THEN INSERT VALUES (s.id, 7)",
            5,
        ),
    ] {
        assert_limit_on("{public.t}", SOURCE, &format!("MERGE INTO t USING s ON t.id = s.id {actions}"), rows);
        let returning = format!("MERGE INTO t USING s ON t.id = s.id {actions} RETURNING merge_action(), t.id");
        assert_limit_on("{public.t}", SOURCE, &returning, rows);
        let branch = format!("WITH m AS ({returning}) SELECT count(*) FROM m");
        assert_limit_on("{public.t}", SOURCE, &branch, rows);
    }
}

#[test]
fn they_are_counted_on_partitions_too() {
    let setup = "
        CREATE TABLE t (id int PRIMARY KEY, v int NOT NULL DEFAULT 0) PARTITION BY RANGE (id);
        CREATE TABLE t_low PARTITION OF t FOR VALUES FROM (1) TO (4);
        CREATE TABLE t_high PARTITION OF t FOR VALUES FROM (4) TO (100);
        INSERT INTO t SELECT i, 0 FROM generate_series(1, 6) AS i;
        CREATE TABLE s (id int PRIMARY KEY); INSERT INTO s VALUES (1), (5)";
    let merge = "MERGE INTO t USING s ON t.id = s.id WHEN MATCHED THEN DELETE
                 WHEN NOT MATCHED BY SOURCE THEN UPDATE SET id = t.id + 10";
    assert_limit_on(
        "{public.t}",
        setup,
        "MERGE INTO t USING s ON t.id = s.id WHEN NOT MATCHED BY SOURCE THEN DELETE",
        4,
    );
    // 2, 3 and 4 move up; 1, 5 and 6 go.
    assert_limit_on("{public.t}", &setup.replace("(1), (5)", "(1), (5), (6)"), merge, 6);
}

/// The condition of the join narrows what is matched, and nothing else.
#[test]
fn require_where_wants_a_condition_for_rows_that_no_source_matches() {
    let mut bed = Bed::new(SOURCE);
    bed.policy("tables => '{public.t}', require_where => true");
    let merge = |actions: &str| format!("BEGIN; MERGE INTO t USING s ON t.id = s.id {actions}; ROLLBACK");
    for actions in [
        "WHEN NOT MATCHED BY SOURCE THEN DELETE",
        "WHEN MATCHED THEN UPDATE SET v = 1 WHEN NOT MATCHED BY SOURCE THEN UPDATE SET v = 2",
        "WHEN NOT MATCHED BY SOURCE AND now() > '2020-01-01' THEN DELETE",
    ] {
        let refusal = expect_refusal(bed.writer.batch_execute(&merge(actions)));
        assert_eq!(refusal.sqlstate, "WG002", "{actions}: {refusal:?}");
        bed.writer.batch_execute("ROLLBACK").unwrap();
    }
    for actions in [
        "WHEN MATCHED THEN DELETE",
        "WHEN MATCHED THEN DELETE WHEN NOT MATCHED BY TARGET THEN INSERT VALUES (s.id, 1)",
        "WHEN NOT MATCHED BY SOURCE AND t.v > 0 THEN DELETE",
        "WHEN MATCHED THEN UPDATE SET v = 1 WHEN NOT MATCHED BY SOURCE AND t.v > 0 THEN UPDATE SET v = 2",
    ] {
        bed.passes(&merge(actions));
    }
}

#[test]
fn what_a_merge_did_to_unmatched_rows_is_undone() {
    let mut bed = kept::Bed::new(SOURCE);
    let before = bed.table("t");
    let change = bed.change(
        "MERGE INTO t USING s ON t.id = s.id WHEN MATCHED THEN UPDATE SET v = 8 WHEN NOT MATCHED BY SOURCE AND t.id < 5 THEN DELETE
         WHEN NOT MATCHED BY SOURCE THEN UPDATE SET v = 9 RETURNING merge_action()",
    );
    assert_eq!(bed.table("t").len(), 4);
    assert_eq!(bed.undo(&change.to_string()), kept::one("public.t", 6, 0));
    assert_eq!(bed.table("t"), before);
}

#[cfg(feature = "pg18")]
mod with_18 {
    use super::*;

    #[test]
    fn returning_old_and_new_rows_is_counted() {
        let merge = "MERGE INTO t USING s ON t.id = s.id WHEN MATCHED THEN UPDATE SET v = 5 RETURNING old.v, new.v";
        assert_limit_on("{public.t}", SOURCE, merge, 2);
        assert_limit_on("{public.t}", SOURCE, "UPDATE t SET v = v + 1 RETURNING old.v, new.v", 6);
        assert_limit_on("{public.t}", SOURCE, "WITH d AS (DELETE FROM t RETURNING old.*) SELECT count(*) FROM d", 6);
        let upsert = "INSERT INTO t SELECT i, 1 FROM generate_series(4, 8) AS i
                      ON CONFLICT (id) DO UPDATE SET v = excluded.v RETURNING old.v, new.v";
        assert_limit_on("{public.t}", SOURCE, upsert, 3);
    }

    const VIRTUAL: &str = "
        CREATE TABLE t (id int PRIMARY KEY, v int NOT NULL DEFAULT 0, twice int GENERATED ALWAYS AS (v * 2) VIRTUAL);
        INSERT INTO t SELECT i, i FROM generate_series(1, 6) AS i";

    #[test]
    fn virtual_columns_are_left_out_and_never_put_back() {
        let mut bed = kept::Bed::new(VIRTUAL);
        let before = bed.table("t");
        let shown =
            bed.rows("SELECT before::text FROM writeguard.preview('UPDATE t SET v = v + 1 WHERE id = 3', sample => 5)");
        assert_eq!(shown.len(), 1, "{shown:?}");
        assert!(shown[0].contains("\"v\": 3") && !shown[0].contains("twice"), "{shown:?}");
        let change = bed.change("UPDATE t SET v = v + 10");
        assert_eq!(bed.undo(&change.to_string()), kept::one("public.t", 6, 0));
        assert_eq!(bed.table("t"), before);
        let change = bed.change("DELETE FROM t WHERE id > 1");
        assert_eq!(bed.undo(&change.to_string()), kept::one("public.t", 5, 0));
        assert_eq!(bed.table("t"), before);
    }

    #[test]
    fn tables_with_keys_over_time_are_counted() {
        let setup = "CREATE EXTENSION btree_gist;
            CREATE TABLE t (id int, at int4range, v int DEFAULT 0, PRIMARY KEY (id, at WITHOUT OVERLAPS));
            INSERT INTO t SELECT i, int4range(i, i + 1), 0 FROM generate_series(1, 6) AS i";
        assert_limit_on("{public.t}", setup, "UPDATE t SET v = 1", 6);
        assert_limit_on("{public.t}", setup, "DELETE FROM t WHERE id > 2", 4);
    }
}

//! Row changes are counted exactly by statements that insert as well: MERGE and INSERT …
//! ON CONFLICT DO UPDATE. What they insert does not count.

use crate::common::limits::{SIX, assert_free, assert_free_on, assert_limit, assert_limit_on};

/// A target with rows 1 to 6 and a source with rows 4 to 9.
const MERGED: &str = "
    CREATE TABLE t (id int PRIMARY KEY, v int NOT NULL DEFAULT 0);
    CREATE TABLE s (id int PRIMARY KEY, v int NOT NULL DEFAULT 0);
    INSERT INTO t SELECT i, 0 FROM generate_series(1, 6) AS i;
    INSERT INTO s SELECT i, i FROM generate_series(4, 9) AS i;";

/// BEFORE UPDATE and DELETE, the rows with an even id are left as they are.
const SUPPRESSES_EVEN: &str = "
    CREATE FUNCTION odd_only() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        IF OLD.id % 2 = 0 THEN RETURN NULL; END IF;
        IF TG_OP = 'DELETE' THEN RETURN OLD; END IF;
        RETURN NEW;
    END $$;
    CREATE TRIGGER odd_only BEFORE UPDATE OR DELETE ON t FOR EACH ROW EXECUTE FUNCTION odd_only();";

// MERGE

#[test]
fn merge_update() {
    assert_limit(MERGED, "MERGE INTO t USING s ON s.id = t.id WHEN MATCHED THEN UPDATE SET v = s.v", 3);
}

#[test]
fn merge_delete() {
    assert_limit(MERGED, "MERGE INTO t USING s ON s.id = t.id WHEN MATCHED THEN DELETE", 3);
}

/// Of six rows of the source one updates, two delete and three insert.
#[test]
fn merge_of_all_kinds_counts_no_inserts() {
    assert_limit(
        MERGED,
        "MERGE INTO t USING s ON s.id = t.id \
         WHEN MATCHED AND t.id = 5 THEN UPDATE SET v = s.v \
         WHEN MATCHED THEN DELETE \
         WHEN NOT MATCHED THEN INSERT VALUES (s.id, s.v)",
        3,
    );
}

#[test]
fn merge_do_nothing_does_not_count() {
    assert_limit(
        MERGED,
        "MERGE INTO t USING s ON s.id = t.id \
         WHEN MATCHED AND t.id = 4 THEN DO NOTHING \
         WHEN MATCHED THEN UPDATE SET v = s.v \
         WHEN NOT MATCHED THEN DO NOTHING",
        2,
    );
    assert_free(MERGED, "MERGE INTO t USING s ON s.id = t.id WHEN MATCHED THEN DO NOTHING");
}

#[test]
fn merge_that_only_inserts_is_free() {
    assert_free(MERGED, "MERGE INTO t USING s ON s.id = t.id WHEN NOT MATCHED THEN INSERT VALUES (s.id, s.v)");
}

/// No action's condition holds for some rows.
#[test]
fn merge_with_conditions_that_fail() {
    assert_limit(MERGED, "MERGE INTO t USING s ON s.id = t.id WHEN MATCHED AND t.id > 4 THEN UPDATE SET v = s.v", 2);
}

#[test]
fn merge_with_a_trigger_that_suppresses() {
    for (action, rows) in [("UPDATE SET v = s.v", 1), ("DELETE", 1)] {
        assert_limit(
            &format!("{MERGED} {SUPPRESSES_EVEN}"),
            &format!("MERGE INTO t USING s ON s.id = t.id WHEN MATCHED THEN {action}"),
            rows,
        );
    }
}

/// The last row of the source counts too, whatever stands before and after it.
#[test]
fn merge_in_any_order_of_actions() {
    for order in ["ASC", "DESC"] {
        assert_limit(
            MERGED,
            &format!(
                "MERGE INTO t USING (SELECT * FROM s ORDER BY id {order}) AS s ON s.id = t.id \
                 WHEN MATCHED AND t.id % 2 = 0 THEN DELETE \
                 WHEN MATCHED THEN UPDATE SET v = s.v \
                 WHEN NOT MATCHED THEN INSERT VALUES (s.id, s.v)"
            ),
            3,
        );
    }
}

#[test]
fn merge_on_a_partitioned_table() {
    assert_limit(
        "CREATE TABLE t (id int, v int) PARTITION BY RANGE (id);
         CREATE TABLE t1 PARTITION OF t FOR VALUES FROM (1) TO (4);
         CREATE TABLE t2 PARTITION OF t FOR VALUES FROM (4) TO (100);
         INSERT INTO t SELECT i, 0 FROM generate_series(1, 6) AS i;",
        "MERGE INTO t USING generate_series(2, 9) AS s ON s = t.id \
         WHEN MATCHED AND t.id = 3 THEN DELETE \
         WHEN MATCHED THEN UPDATE SET v = 1 \
         WHEN NOT MATCHED THEN INSERT VALUES (s, 0)",
        5,
    );
}

/// A row that a MERGE moves is one update, of the partition it leaves.
#[test]
fn merge_that_moves_rows() {
    let setup = "
        CREATE TABLE t (id int, v int) PARTITION BY RANGE (id);
        CREATE TABLE t1 PARTITION OF t FOR VALUES FROM (1) TO (4);
        CREATE TABLE t2 PARTITION OF t FOR VALUES FROM (4) TO (100);
        INSERT INTO t SELECT i, 0 FROM generate_series(1, 6) AS i;";
    let sql = "MERGE INTO t USING generate_series(1, 3) AS s ON s = t.id \
               WHEN MATCHED THEN UPDATE SET id = t.id + 50";
    assert_limit_on("{public.t}", setup, sql, 3);
    assert_limit_on("{public.t1}", setup, sql, 3);
    assert_free_on("{public.t2}", setup, sql);
}

// INSERT … ON CONFLICT

/// Of six rows three are there already.
#[test]
fn on_conflict_do_update_counts_no_inserts() {
    assert_limit(MERGED, "INSERT INTO t SELECT id, v FROM s ON CONFLICT (id) DO UPDATE SET v = EXCLUDED.v", 3);
}

#[test]
fn on_conflict_in_any_order() {
    for order in ["ASC", "DESC", "ASC OFFSET 2", "DESC OFFSET 3"] {
        let rows = if order == "ASC OFFSET 2" { 1 } else { 3 };
        assert_limit(
            MERGED,
            &format!(
                "INSERT INTO t SELECT id, v FROM s ORDER BY id {order} \
                 ON CONFLICT (id) DO UPDATE SET v = EXCLUDED.v RETURNING id"
            ),
            rows,
        );
    }
}

#[test]
fn on_conflict_on_constraint() {
    assert_limit(MERGED, "INSERT INTO t TABLE s ON CONFLICT ON CONSTRAINT t_pkey DO UPDATE SET v = EXCLUDED.v", 3);
}

#[test]
fn on_conflict_values() {
    assert_limit(SIX, "INSERT INTO t VALUES (1, 1), (7, 1), (2, 1), (8, 1) ON CONFLICT (id) DO UPDATE SET v = 1", 2);
}

#[test]
fn on_conflict_do_nothing_is_free() {
    assert_free(MERGED, "INSERT INTO t SELECT * FROM s ON CONFLICT DO NOTHING");
}

#[test]
fn on_conflict_without_a_conflict_is_free() {
    assert_free(MERGED, "INSERT INTO t SELECT id + 100, v FROM s ON CONFLICT (id) DO UPDATE SET v = EXCLUDED.v");
}

#[test]
fn on_conflict_with_a_condition_that_fails_for_some() {
    assert_limit(
        MERGED,
        "INSERT INTO t SELECT id, v FROM s ON CONFLICT (id) DO UPDATE SET v = EXCLUDED.v \
         WHERE t.id <> 5",
        2,
    );
    assert_free(
        MERGED,
        "INSERT INTO t SELECT id, v FROM s ON CONFLICT (id) DO UPDATE SET v = EXCLUDED.v \
         WHERE t.v > 100",
    );
}

/// A row with a failed condition before and after one that counts.
#[test]
fn on_conflict_with_conditions_and_inserts_in_turn() {
    assert_limit(
        SIX,
        "INSERT INTO t VALUES (2, 1), (1, 1), (10, 1), (4, 1), (3, 1), (11, 1), (6, 1) \
         ON CONFLICT (id) DO UPDATE SET v = EXCLUDED.v WHERE t.id % 2 = 1",
        2,
    );
}

#[test]
fn on_conflict_with_a_trigger_that_suppresses() {
    assert_limit(
        &format!("{MERGED} {SUPPRESSES_EVEN}"),
        "INSERT INTO t SELECT id, v FROM s ON CONFLICT (id) DO UPDATE SET v = EXCLUDED.v",
        1,
    );
}

#[test]
fn on_conflict_in_a_cte() {
    assert_limit(
        MERGED,
        "WITH u AS (INSERT INTO t SELECT id, v FROM s ON CONFLICT (id) DO UPDATE \
         SET v = EXCLUDED.v RETURNING id) SELECT count(*) FROM u",
        3,
    );
    assert_limit(
        MERGED,
        "WITH u AS (INSERT INTO t SELECT id, v FROM s ON CONFLICT (id) DO UPDATE \
         SET v = EXCLUDED.v) DELETE FROM s WHERE id = 4",
        4,
    );
}

/// Six rows over two partitions; those of the second have another order of columns.
const PARTITIONED: &str = "
    CREATE TABLE t (id int PRIMARY KEY, v int, note text) PARTITION BY RANGE (id);
    CREATE TABLE t1 PARTITION OF t FOR VALUES FROM (1) TO (4);
    CREATE TABLE t2 (gone int, note text, v int, id int NOT NULL PRIMARY KEY);
    ALTER TABLE t2 DROP COLUMN gone;
    ALTER TABLE t ATTACH PARTITION t2 FOR VALUES FROM (4) TO (100);
    INSERT INTO t SELECT i, 0, 'x' FROM generate_series(1, 6) AS i;";

#[test]
fn on_conflict_on_a_partitioned_table() {
    let sql = "INSERT INTO t SELECT i, i, 'y' FROM generate_series(2, 9) AS i \
               ON CONFLICT (id) DO UPDATE SET v = EXCLUDED.v, note = EXCLUDED.note";
    assert_limit_on("{public.t}", PARTITIONED, sql, 5);
    assert_limit_on("{public.*}", PARTITIONED, sql, 5);
}

#[test]
fn on_conflict_on_a_partitioned_table_with_a_policy_on_one_leaf() {
    let sql = "INSERT INTO t SELECT i, i, 'y' FROM generate_series(2, 9) AS i \
               ON CONFLICT (id) DO UPDATE SET v = EXCLUDED.v, note = EXCLUDED.note";
    let refusal = assert_limit_on("{public.t1}", PARTITIONED, sql, 2);
    assert_eq!(refusal.table, "t1");
    let refusal = assert_limit_on("{public.t2}", PARTITIONED, sql, 3);
    assert_eq!(refusal.table, "t2");
}

#[test]
fn on_conflict_on_partitions_in_turn() {
    let sql = "INSERT INTO t VALUES (1, 1, 'y'), (4, 1, 'y'), (50, 1, 'y'), (2, 1, 'y'), \
               (5, 1, 'y'), (51, 1, 'y'), (3, 1, 'y') \
               ON CONFLICT (id) DO UPDATE SET v = EXCLUDED.v WHERE t.id <> 2 RETURNING *";
    assert_limit_on("{public.t}", PARTITIONED, sql, 4);
    assert_limit_on("{public.t1}", PARTITIONED, sql, 2);
    assert_limit_on("{public.t2}", PARTITIONED, sql, 2);
}

#[test]
fn on_conflict_on_partitions_below_partitions() {
    let setup = "
        CREATE TABLE t (id int PRIMARY KEY, v int) PARTITION BY RANGE (id);
        CREATE TABLE low PARTITION OF t FOR VALUES FROM (1) TO (10) PARTITION BY RANGE (id);
        CREATE TABLE lowest PARTITION OF low FOR VALUES FROM (1) TO (4);
        CREATE TABLE lower (v int, id int NOT NULL PRIMARY KEY);
        ALTER TABLE low ATTACH PARTITION lower FOR VALUES FROM (4) TO (10);
        CREATE TABLE high PARTITION OF t FOR VALUES FROM (10) TO (100);
        INSERT INTO t SELECT i, 0 FROM generate_series(1, 12) AS i;";
    let sql = "INSERT INTO t SELECT i, 1 FROM generate_series(1, 20) AS i \
               ON CONFLICT (id) DO UPDATE SET v = EXCLUDED.v";
    for (tables, rows) in
        [("{public.t}", 12), ("{public.low}", 9), ("{public.lowest}", 3), ("{public.lower}", 6), ("{public.high}", 3)]
    {
        assert_limit_on(tables, setup, sql, rows);
    }
}

#[test]
fn on_conflict_on_a_partition_with_a_trigger_that_suppresses() {
    assert_limit_on(
        "{public.t2}",
        &format!("{PARTITIONED} {SUPPRESSES_EVEN}"),
        "INSERT INTO t SELECT i, i, 'y' FROM generate_series(1, 9) AS i \
         ON CONFLICT (id) DO UPDATE SET v = EXCLUDED.v",
        1,
    );
}

#[test]
fn on_conflict_straight_into_a_partition() {
    let sql = "INSERT INTO t2 (id, v) SELECT i, i FROM generate_series(5, 9) AS i \
               ON CONFLICT (id) DO UPDATE SET v = EXCLUDED.v";
    assert_limit_on("{public.t}", PARTITIONED, sql, 2);
    assert_limit_on("{public.t2}", PARTITIONED, sql, 2);
}

#[test]
fn on_conflict_on_two_tables_in_one_statement() {
    let setup = format!("{MERGED} CREATE TABLE u (id int PRIMARY KEY, v int); INSERT INTO u VALUES (4), (9);");
    let sql = "WITH x AS (INSERT INTO t TABLE s ON CONFLICT (id) DO UPDATE SET v = EXCLUDED.v \
               RETURNING id, v) \
               INSERT INTO u SELECT * FROM x ON CONFLICT (id) DO UPDATE SET v = EXCLUDED.v";
    assert_limit_on("{public.t}", &setup, sql, 3);
    assert_limit_on("{public.u}", &setup, sql, 2);
    assert_limit(&setup, sql, 5);
}

#[test]
fn on_conflict_on_partitions_fed_by_an_update() {
    let setup = format!("{PARTITIONED} CREATE TABLE s AS SELECT i AS id, 0 AS v FROM generate_series(2, 9) AS i;");
    let sql = "WITH x AS (UPDATE s SET v = 1 RETURNING id, v) \
               INSERT INTO t SELECT id, v, 'y' FROM x ON CONFLICT (id) DO UPDATE SET v = EXCLUDED.v";
    assert_limit_on("{public.t}", &setup, sql, 5);
    assert_limit_on("{public.s}", &setup, sql, 8);
    assert_limit_on("{public.t1}", &setup, sql, 2);
    assert_limit(&setup, sql, 13);
}

/// The rows that one INSERT returns go straight into the next, so both are at work at a time.
#[test]
fn on_conflict_on_two_partitioned_tables_in_one_statement() {
    let setup = format!(
        "{PARTITIONED}
         CREATE TABLE u (id int PRIMARY KEY, v int) PARTITION BY RANGE (id);
         CREATE TABLE u1 PARTITION OF u FOR VALUES FROM (1) TO (100);
         INSERT INTO u SELECT i, 0 FROM generate_series(1, 6) AS i;"
    );
    let sql = "WITH x AS (INSERT INTO t SELECT i, i, 'y' FROM generate_series(2, 9) AS i \
               ON CONFLICT (id) DO UPDATE SET v = EXCLUDED.v RETURNING id, v) \
               INSERT INTO u SELECT * FROM x ON CONFLICT (id) DO UPDATE SET v = EXCLUDED.v";
    assert_limit_on("{public.u}", &setup, sql, 5);
    assert_limit_on("{public.t1}", &setup, sql, 2);
    assert_limit_on("{public.t2}", &setup, sql, 3);
    assert_limit_on("{public.t}", &setup, sql, 5);
    assert_limit(&setup, sql, 10);
}

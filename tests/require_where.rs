//! `require_where`: an UPDATE or DELETE that scans a whole table with nothing to narrow it is refused before its first
//! row, whatever way it is written and whatever way it is run.

use crate::common::limits::{Bed, SIX, pass};
use crate::common::{Refusal, Server, expect_refusal, wait_until};
use postgres::Client;

/// `t` with six rows, `s` and `u` to join it with, and `log`, which tells whether any row was touched.
const TABLES: &str = "
    CREATE TABLE t (id int PRIMARY KEY, v int NOT NULL DEFAULT 0, n int, flag boolean NOT NULL DEFAULT true, x text);
    INSERT INTO t SELECT i, 0, i, true, 'x' FROM generate_series(1, 6) AS i;
    CREATE INDEX ON t (v);
    CREATE INDEX ON t (n) WHERE flag;
    CREATE TABLE s (id int PRIMARY KEY, v int NOT NULL);
    INSERT INTO s SELECT i, i FROM generate_series(1, 3) AS i;
    CREATE TABLE u (id int, v int);
    INSERT INTO u SELECT i, i FROM generate_series(1, 3) AS i;
    ANALYZE t, s, u;
    CREATE VIEW plain AS SELECT * FROM t;
    CREATE VIEW true_view AS SELECT * FROM plain WHERE 1 = 1;
    CREATE VIEW barrier WITH (security_barrier) AS SELECT * FROM t;
    CREATE VIEW narrow_view AS SELECT * FROM t WHERE v < 100;";

fn bed() -> Bed {
    let mut bed = Bed::new(TABLES);
    bed.policy("tables => '{public.t}', require_where => true");
    bed
}

/// Refused with WG002 for that table, and nothing is changed. The session goes on without a transaction block.
#[track_caller]
fn refused_for(bed: &mut Bed, sql: &str, table: &str) -> Refusal {
    let before = bed.contents();
    let refusal = expect_refusal(bed.writer.batch_execute(sql));
    let _ = bed.writer.batch_execute("ROLLBACK");
    assert_eq!(refusal.sqlstate, "WG002", "{sql}: {refusal:?}");
    assert_eq!((refusal.schema.as_str(), refusal.table.as_str()), ("public", table), "{sql}: {refusal:?}");
    assert_eq!(bed.contents(), before, "{sql}: refused, but not undone");
    refusal
}

#[track_caller]
fn refused(bed: &mut Bed, sql: &str) -> Refusal {
    refused_for(bed, sql, "t")
}

/// Passes, and is taken back.
#[track_caller]
fn narrow(bed: &mut Bed, sql: &str) {
    pass(&mut bed.writer, &format!("BEGIN; {sql}; ROLLBACK"));
}

/// Settings under which the planner chooses differently.
const PLANNERS: [&str; 6] = [
    "",
    "SET enable_seqscan = off; SET enable_bitmapscan = off",
    "SET enable_seqscan = off; SET enable_indexscan = off; SET enable_indexonlyscan = off",
    "SET enable_hashjoin = off; SET enable_mergejoin = off",
    "SET enable_hashjoin = off; SET enable_nestloop = off",
    "SET enable_nestloop = off; SET enable_mergejoin = off; SET enable_material = off",
];

/// What has nothing to narrow it, as an UPDATE's end.
const WHOLE: [&str; 43] = [
    "",
    "WHERE true",
    "WHERE 1 = 1",
    "WHERE 1 = 1 OR id = 3",
    "WHERE now() > '2000-01-01'",
    "WHERE clock_timestamp() > '2000-01-01'",
    "WHERE random() < 2",
    "WHERE current_setting('server_version_num')::int > 0",
    "WHERE id = id",
    "WHERE id >= id",
    "WHERE id = id AND v <= v",
    "WHERE (id = id) IS TRUE",
    "WHERE NOT (id <> id OR false) AND id = id OR id = id",
    "WHERE id = id OR v = 3",
    "WHERE id IS NOT NULL",
    "WHERE id IS NOT NULL AND now() > '2000-01-01'",
    "WHERE id IS NOT DISTINCT FROM id",
    "WHERE ctid IS NOT NULL",
    "WHERE tableoid = 't'::regclass",
    "WHERE coalesce(NULL, id) = id",
    "WHERE EXISTS (SELECT 1 FROM s)",
    "WHERE EXISTS (SELECT 1 FROM s WHERE s.v = 2)",
    "WHERE NOT EXISTS (SELECT 1 FROM s WHERE s.v = 99)",
    "WHERE (SELECT count(*) FROM s) = 3",
    "WHERE (SELECT true)",
    "WHERE 1 IN (SELECT v FROM s)",
    "WHERE EXISTS (SELECT 1 FROM s WHERE t.id = t.id)",
    "FROM s",
    "FROM s WHERE s.id = 1",
    "FROM s WHERE s.v > 0 AND now() > '2000-01-01'",
    "FROM s JOIN u ON u.id = s.id WHERE s.id = 2",
    "FROM s LEFT JOIN u ON u.id = s.id WHERE u.v = 2",
    "FROM (SELECT 1 LIMIT 1) AS one",
    "FROM (SELECT * FROM s ORDER BY id LIMIT 1) AS one WHERE one.v = 1",
    "FROM generate_series(1, 1) AS g",
    "FROM (VALUES (1), (2)) AS v (id) WHERE v.id = 1",
    "FROM s WHERE true OR s.id = t.id",
    "FROM s WHERE s.id = 1 AND t.id = t.id",
    "FROM s, u WHERE s.id = u.id",
    "FROM s WHERE s.id IN (SELECT id FROM u WHERE v = 2)",
    "FROM s LEFT JOIN u ON u.id = s.id WHERE u.id IS NULL OR s.id = 1",
    "WHERE id = CASE WHEN true THEN id ELSE 0 END",
    "FROM (SELECT DISTINCT v FROM s) AS d WHERE d.v = 1",
];

/// What is narrowed.
const NARROW: [&str; 48] = [
    "WHERE id = 3",
    "WHERE id > 0",
    "WHERE id <> 3",
    "WHERE v = 0",
    "WHERE n IS NOT NULL",
    "WHERE n = n",
    "WHERE n IS NULL",
    "WHERE id IS NULL",
    "WHERE flag",
    "WHERE flag AND n = 2",
    "WHERE NOT flag",
    "WHERE flag IS NOT FALSE",
    "WHERE id = 3 OR v = 7",
    "WHERE id = id AND v = 0",
    "WHERE id = v",
    "WHERE id + v > 2",
    "WHERE x LIKE 'x%'",
    "WHERE id = ANY ('{1,2}')",
    "WHERE id IN (1, 2, 3)",
    "WHERE (id, v) IN ((1, 0), (2, 0))",
    "WHERE id BETWEEN 2 AND 4",
    "WHERE (id, v) > (2, 0)",
    "WHERE CASE WHEN id = 2 THEN true ELSE false END",
    "WHERE t IS NOT NULL",
    "WHERE t.* = ROW(1, 0, 1, true, 'x'::text)",
    "WHERE ctid = '(0,1)'",
    "WHERE ctid < '(0,3)'",
    "WHERE xmin::text <> '0'",
    "WHERE false",
    "WHERE id = 3 AND random() < 2",
    "WHERE id IN (SELECT id FROM s)",
    "WHERE id NOT IN (SELECT id FROM s)",
    "WHERE id IN (SELECT id FROM t ORDER BY id LIMIT 2)",
    "WHERE id = (SELECT max(id) FROM s)",
    "WHERE EXISTS (SELECT 1 FROM s WHERE s.id = t.id)",
    "WHERE NOT EXISTS (SELECT 1 FROM s WHERE s.id = t.id)",
    "WHERE EXISTS (SELECT 1 FROM s WHERE s.id < t.id) OR v = 5",
    "WHERE (SELECT count(*) FROM s WHERE s.id = t.id) = 1",
    "WHERE id IN (SELECT i.id FROM t AS i TABLESAMPLE BERNOULLI (50))",
    "FROM s WHERE s.id = t.id",
    "FROM s WHERE s.v > t.id",
    "FROM s, u WHERE s.v + u.v = t.id",
    "FROM s LEFT JOIN t AS o ON o.id = s.id WHERE s.id = t.id AND o.v IS NOT NULL",
    "FROM (SELECT id, sum(v) AS sum FROM s GROUP BY id) AS g WHERE g.id = t.id",
    "FROM unnest(ARRAY[1, 2]) AS n (id) WHERE n.id = t.id",
    "WHERE ctid = ANY (ARRAY(SELECT ctid FROM t LIMIT 2))",
    "FROM s LEFT JOIN u ON u.id = s.id WHERE s.id = t.id",
    "FROM t AS self WHERE self.id = t.id AND self.v = 0",
];

/// The same for DELETE, which has USING.
fn deleting(end: &str) -> String {
    format!("DELETE FROM t {}", end.replacen("FROM", "USING", usize::from(end.starts_with("FROM"))))
}

#[test]
fn what_has_nothing_to_narrow_it_is_refused() {
    let mut bed = bed();
    for planner in PLANNERS {
        pass(&mut bed.writer, "RESET ALL");
        pass(&mut bed.writer, planner);
        for end in WHOLE {
            refused(&mut bed, &format!("UPDATE t SET v = 1 {end}"));
            refused(&mut bed, &deleting(end));
        }
    }
}

#[test]
fn what_is_narrowed_passes() {
    let mut bed = bed();
    for planner in PLANNERS {
        pass(&mut bed.writer, "RESET ALL");
        pass(&mut bed.writer, planner);
        for end in NARROW {
            narrow(&mut bed, &format!("UPDATE t SET v = 1 {end}"));
            narrow(&mut bed, &deleting(end));
        }
    }
}

#[test]
fn a_full_scan_of_an_index_is_a_whole_scan() {
    let mut bed = bed();
    pass(&mut bed.writer, "SET enable_seqscan = off; SET enable_bitmapscan = off");
    refused(&mut bed, "UPDATE t SET v = 1");
    refused(&mut bed, "UPDATE t SET v = 1 WHERE id IS NOT NULL");
    // Three rows are enough to decide that nothing is to be read in order.
    refused(&mut bed, "UPDATE t SET v = 1 FROM (SELECT id FROM s ORDER BY id) AS o");
    narrow(&mut bed, "UPDATE t SET v = 1 WHERE flag AND n > 0");
}

#[test]
fn an_empty_table_is_no_exception() {
    let mut bed = Bed::new("CREATE TABLE t (id int PRIMARY KEY, v int)");
    bed.policy("tables => '{public.t}', require_where => true");
    refused(&mut bed, "UPDATE t SET v = 1");
    refused(&mut bed, "DELETE FROM t");
    narrow(&mut bed, "DELETE FROM t WHERE id = 1");
}

#[test]
fn the_refusal_comes_before_the_first_row() {
    let mut bed = Bed::new(&format!("{TABLES} CREATE SEQUENCE touched;"));
    bed.passes(
        "CREATE FUNCTION touch() RETURNS trigger LANGUAGE plpgsql AS
             $$ BEGIN PERFORM nextval('touched'); RETURN coalesce(NEW, OLD); END $$;
         CREATE TRIGGER touch BEFORE UPDATE OR DELETE ON t FOR EACH ROW EXECUTE FUNCTION touch();
         CREATE TRIGGER each BEFORE UPDATE OR DELETE ON t FOR EACH STATEMENT EXECUTE FUNCTION touch()",
    );
    bed.policy("tables => '{public.t}', require_where => true");
    refused(&mut bed, "UPDATE t SET v = 1");
    refused(&mut bed, "DELETE FROM t");
    assert_eq!(bed.number("SELECT CASE WHEN is_called THEN last_value ELSE 0 END FROM touched"), 0);
}

#[test]
fn what_the_refusal_says() {
    let mut bed = bed();
    let refusal = refused(&mut bed, "UPDATE t SET v = 1");
    assert_eq!(refusal.said(), "update of table \"public.t\" has nothing to narrow it");
    assert_eq!(
        refusal.detail,
        "Policy \"p\" asks for a condition on the table's columns, and without one the whole table would be scanned \
         (the planner expected about 6 rows); nothing was changed."
    );
    let event = bed.number("SELECT max(id) FROM writeguard.event WHERE kind = 'blocked'");
    assert_eq!(
        refusal.hint,
        format!(
            "Add a WHERE that names the rows. SELECT writeguard.request(event => {event}, reason => 'why this is right');"
        )
    );
    assert_eq!(refused(&mut bed, "DELETE FROM t").said(), "delete of table \"public.t\" has nothing to narrow it");
    bed.policy("tables => '{public.t}', require_where => true, override => 'flag'");
    let hint = refused(&mut bed, "DELETE FROM t").hint;
    assert_eq!(hint, "Add a WHERE that names the rows. SET writeguard.override = on;");
    bed.policy("tables => '{public.t}', require_where => true, override => 'never'");
    assert!(refused(&mut bed, "DELETE FROM t").hint.contains("No override lifts this policy"));
}

// Around the statement

#[test]
fn views_ctes_and_functions_around_it_do_not_help() {
    let mut bed = bed();
    for sql in [
        "UPDATE plain SET v = 1",
        "UPDATE true_view SET v = 1",
        "UPDATE barrier SET v = 1",
        "DELETE FROM true_view WHERE true",
        "WITH c AS (UPDATE t SET v = 1 RETURNING id) SELECT count(*) FROM c",
        "WITH c AS (UPDATE t SET v = 1) SELECT 1",
        "WITH c AS (UPDATE t SET v = 1 RETURNING id) SELECT id FROM c LIMIT 1",
        "WITH c AS (DELETE FROM t RETURNING *) INSERT INTO u SELECT id, v FROM c WHERE id = 1",
        "WITH c AS (SELECT true AS yes) UPDATE t SET v = 1 WHERE (SELECT yes FROM c)",
        "WITH c AS MATERIALIZED (SELECT * FROM s) UPDATE t SET v = 1 FROM c WHERE c.id = 1",
        "WITH c AS (UPDATE t SET v = 1 WHERE id = 1 RETURNING id) DELETE FROM t USING c",
        "DO $$ BEGIN UPDATE t SET v = 1; END $$",
        "DO $$ BEGIN EXECUTE 'DELETE FROM t'; END $$",
        "EXPLAIN (ANALYZE, COSTS OFF, TIMING OFF) UPDATE t SET v = 1",
        "UPDATE t SET v = 1 RETURNING id",
        "BEGIN; UPDATE t SET v = 1 WHERE id = 1; UPDATE t SET v = 1",
        "UPDATE t SET v = 1 WHERE id = 1; DELETE FROM t",
    ] {
        refused(&mut bed, sql);
    }
    for sql in [
        "UPDATE narrow_view SET v = 1",
        "UPDATE barrier SET v = 1 WHERE id = 1",
        "WITH c AS (SELECT * FROM s) UPDATE t SET v = 1 FROM c WHERE c.id = t.id",
        "WITH c AS (UPDATE t SET v = 1 WHERE id = 1 RETURNING id) SELECT * FROM c",
        "EXPLAIN UPDATE t SET v = 1",
        "EXPLAIN (ANALYZE) UPDATE t SET v = 1 WHERE id = 1",
        "SELECT * FROM t FOR UPDATE",
        "INSERT INTO t SELECT id, 0 FROM t ON CONFLICT (id) DO UPDATE SET v = 1",
        "TRUNCATE t",
        "UPDATE u SET v = 1",
        "DELETE FROM u",
    ] {
        narrow(&mut bed, sql);
    }
}

#[test]
fn what_a_function_does_inside() {
    let mut bed = bed();
    bed.passes(
        "CREATE FUNCTION wipe() RETURNS void LANGUAGE sql AS 'DELETE FROM t';
         CREATE FUNCTION set_all(new int) RETURNS void LANGUAGE plpgsql AS $$ BEGIN UPDATE t SET v = new; END $$;
         CREATE FUNCTION set_one(which int, new int) RETURNS void LANGUAGE plpgsql AS
             $$ BEGIN UPDATE t SET v = new WHERE id = which; END $$;
         CREATE FUNCTION set_some(which int) RETURNS void LANGUAGE plpgsql AS
             $$ BEGIN UPDATE t SET v = 1 WHERE which IS NULL OR id = which; END $$;",
    );
    refused(&mut bed, "SELECT wipe()");
    refused(&mut bed, "SELECT set_all(1)");
    for mode in ["auto", "force_generic_plan", "force_custom_plan"] {
        pass(&mut bed.writer, &format!("SET plan_cache_mode = {mode}"));
        narrow(&mut bed, "SELECT set_one(n, 1) FROM generate_series(1, 8) AS n");
        narrow(&mut bed, "SELECT set_some(n) FROM generate_series(1, 8) AS n");
        refused(&mut bed, "SELECT set_some(NULL)");
    }
    // An exception block takes the refusal, and nothing of the write is left.
    bed.passes("DO $$ BEGIN DELETE FROM t; EXCEPTION WHEN SQLSTATE 'WG002' THEN NULL; END $$");
    assert_eq!(bed.number("SELECT count(*) FROM t"), 6);
}

#[test]
fn cursors_name_their_row() {
    let mut bed = bed();
    narrow(
        &mut bed,
        "DECLARE c CURSOR FOR SELECT * FROM t; FETCH 2 FROM c; UPDATE t SET v = 1 WHERE CURRENT OF c;
         DELETE FROM t WHERE CURRENT OF c",
    );
}

#[test]
fn foreign_keys_do_their_work() {
    let mut bed = Bed::new(&format!(
        "{SIX} CREATE TABLE child (id int, t int REFERENCES t ON DELETE CASCADE ON UPDATE CASCADE);"
    ));
    bed.passes("INSERT INTO child SELECT id, id FROM t");
    bed.policy("tables => '{*.*}', require_where => true");
    bed.passes("DELETE FROM t WHERE id = 1");
    bed.passes("UPDATE t SET id = 10 WHERE id = 2");
    assert_eq!(bed.number("SELECT count(*) FROM child WHERE t <> 10"), 4);
}

// Prepared statements

#[test]
fn a_statement_that_was_prepared_before_the_policy() {
    let mut bed = Bed::new(TABLES);
    bed.passes("PREPARE p AS UPDATE t SET v = v + 1; EXECUTE p; PREPARE q (int) AS DELETE FROM t WHERE id = $1");
    bed.policy("tables => '{public.t}', require_where => true");
    for _ in 0..7 {
        refused(&mut bed, "EXECUTE p");
        narrow(&mut bed, "EXECUTE q (1)");
    }
}

#[test]
fn parameters_are_known_when_the_plan_is_run() {
    let mut bed = bed();
    bed.passes(
        "PREPARE bare (bool) AS UPDATE t SET v = 1 WHERE $1;
         PREPARE same (int) AS UPDATE t SET v = 1 WHERE $1 = $1;
         PREPARE one (int) AS UPDATE t SET v = 1 WHERE id = $1;
         PREPARE maybe (int) AS UPDATE t SET v = 1 WHERE $1 IS NULL OR id = $1;
         PREPARE fallback (int) AS UPDATE t SET v = 1 WHERE id = coalesce($1, id);
         PREPARE unless (bool) AS UPDATE t SET v = 1 WHERE $1 OR id = 3;
         PREPARE when_not (bool) AS UPDATE t SET v = 1 WHERE NOT $1 OR id = 3;
         PREPARE is_set (bool) AS UPDATE t SET v = 1 WHERE $1 IS NOT TRUE OR id = 3;
         PREPARE all_or (text) AS UPDATE t SET v = 1 WHERE $1 = 'all' OR x = $1;
         PREPARE named (int) AS UPDATE t SET v = 1 WHERE n = $1",
    );
    for mode in ["force_generic_plan", "force_custom_plan"] {
        pass(&mut bed.writer, &format!("SET plan_cache_mode = {mode}"));
        for whole in [
            "bare (true)",
            "same (1)",
            "all_or ('all')",
            "maybe (NULL)",
            "fallback (NULL)",
            "unless (true)",
            "when_not (false)",
            "is_set (NULL)",
            "is_set (false)",
        ] {
            refused(&mut bed, &format!("EXECUTE {whole}"));
        }
        for some in [
            "bare (false)",
            "bare (NULL)",
            "all_or ('x')",
            "one (1)",
            "one (NULL)",
            "maybe (1)",
            "fallback (1)",
            "unless (false)",
            "unless (NULL)",
            "when_not (true)",
            "is_set (true)",
            "named (NULL)",
        ] {
            narrow(&mut bed, &format!("EXECUTE {some}"));
        }
    }
}

#[test]
fn a_prepared_statement_of_the_protocol() {
    let mut bed = bed();
    let statement = bed.writer.prepare("UPDATE t SET v = $1").unwrap();
    let one = bed.writer.prepare("UPDATE t SET v = $1 WHERE id = $2").unwrap();
    for n in 0..7 {
        let refusal = expect_refusal(bed.writer.execute(&statement, &[&n]));
        assert_eq!(refusal.sqlstate, "WG002");
        assert!(refusal.hint.contains("parameters => ARRAY['value of $1']"), "{refusal:?}");
        assert_eq!(bed.writer.execute(&one, &[&n, &1]).unwrap(), 1);
    }
    assert_eq!(bed.number("SELECT sum(v) FROM t"), 6);
    assert_eq!(bed.number("SELECT count(*) FROM writeguard.event WHERE kind = 'blocked' AND scope = 'where'"), 7);
}

// Several tables in one

/// Rows 1 to 3 and 4 to 6 in two partitions, the second with another order of columns.
const PARTITIONED: &str = "
    CREATE TABLE t (id int NOT NULL, v int) PARTITION BY RANGE (id);
    CREATE TABLE t1 PARTITION OF t FOR VALUES FROM (1) TO (4);
    CREATE TABLE t2 (gone int, v int, id int NOT NULL);
    ALTER TABLE t2 DROP COLUMN gone;
    ALTER TABLE t ATTACH PARTITION t2 FOR VALUES FROM (4) TO (100);
    INSERT INTO t SELECT i, 0 FROM generate_series(1, 6) AS i;
    CREATE TABLE s (id int, v int);
    INSERT INTO s VALUES (1, 1), (5, 5);
    CREATE TABLE lists (k int, v int) PARTITION BY LIST (k);
    CREATE TABLE lists1 PARTITION OF lists FOR VALUES IN (1);
    CREATE TABLE lists2 PARTITION OF lists FOR VALUES IN (2);
    INSERT INTO lists VALUES (1, 0), (2, 0);";

#[test]
fn partitions() {
    let mut bed = Bed::new(PARTITIONED);
    bed.policy("tables => '{public.t, public.lists}', require_where => true");
    for planner in PLANNERS {
        pass(&mut bed.writer, "RESET ALL");
        pass(&mut bed.writer, planner);
        for sql in [
            "UPDATE t SET v = 1",
            "DELETE FROM t WHERE id = id",
            "UPDATE t SET id = id + 50",
            "UPDATE t SET v = 1 FROM s",
            "UPDATE t SET v = 1 FROM s WHERE s.id = 1",
            "UPDATE t SET v = 1 WHERE EXISTS (SELECT 1 FROM s)",
            "UPDATE t1 SET v = 1",
            "WITH c AS (DELETE FROM t RETURNING id) SELECT count(*) FROM c",
        ] {
            refused_for(&mut bed, sql, "t1");
        }
        refused_for(&mut bed, "UPDATE t2 SET v = 1 WHERE id IS NOT NULL", "t2");
        for sql in [
            "UPDATE t SET v = 1 WHERE id = 2",
            "UPDATE t SET v = 1 WHERE id < 4",
            "UPDATE t SET v = 1 WHERE v = 0",
            "UPDATE t SET v = 1 FROM s WHERE s.id = t.id",
            "DELETE FROM t WHERE id IN (SELECT id FROM s)",
            "DELETE FROM t USING s WHERE s.id > t.id",
            "UPDATE t SET v = 1 WHERE id = (SELECT max(id) FROM s)",
            "UPDATE lists SET v = 1 WHERE k = 1",
            "DELETE FROM lists WHERE k IN (1, 2)",
            "UPDATE t SET v = 1 WHERE false",
        ] {
            narrow(&mut bed, sql);
        }
    }
    // Pruned when it is run.
    bed.passes("SET plan_cache_mode = force_generic_plan; PREPARE p (int) AS UPDATE lists SET v = 1 WHERE k = $1");
    narrow(&mut bed, "EXECUTE p (1); EXECUTE p (3)");
    pass(&mut bed.writer, "SET enable_partitionwise_join = on");
    narrow(&mut bed, "UPDATE t SET v = 1 FROM t AS o WHERE o.id = t.id");
    refused_for(&mut bed, "UPDATE t SET v = 1 FROM t AS o WHERE o.id = 5", "t1");
}

#[test]
fn a_policy_on_one_partition_wants_a_condition_there() {
    let mut bed = Bed::new(PARTITIONED);
    bed.policy("tables => '{public.t2}', require_where => true");
    refused_for(&mut bed, "UPDATE t SET v = 1", "t2");
    refused_for(&mut bed, "UPDATE t2 SET v = 1", "t2");
    narrow(&mut bed, "UPDATE t1 SET v = 1");
    // The other partition is all that is left.
    narrow(&mut bed, "UPDATE t SET v = 1 WHERE id < 4");
}

#[test]
fn children() {
    let mut bed = Bed::new(
        "CREATE TABLE t (id int NOT NULL, v int);
         CREATE TABLE child (extra text) INHERITS (t);
         INSERT INTO t VALUES (1, 0);
         INSERT INTO child VALUES (2, 0, 'x');
         CREATE TABLE s (id int);
         INSERT INTO s VALUES (2);",
    );
    bed.policy("tables => '{public.child}', require_where => true");
    refused_for(&mut bed, "UPDATE t SET v = 1", "child");
    refused_for(&mut bed, "UPDATE t SET v = 1 FROM s WHERE s.id = 2", "child");
    narrow(&mut bed, "UPDATE ONLY t SET v = 1");
    narrow(&mut bed, "UPDATE t SET v = 1 WHERE id = 2");
    narrow(&mut bed, "UPDATE t SET v = 1 FROM s WHERE s.id = t.id");
    bed.policy("tables => '{public.t}', require_where => true");
    refused_for(&mut bed, "DELETE FROM t", "t");
    refused_for(&mut bed, "DELETE FROM ONLY t", "t");
    refused_for(&mut bed, "DELETE FROM child", "child");
}

#[test]
fn outer_joins_keep_every_row() {
    let mut bed = bed();
    bed.passes(
        "CREATE VIEW joined AS SELECT t.id AS tid, s.v AS sv FROM t LEFT JOIN s ON s.id = t.id;
         CREATE FUNCTION to_t() RETURNS trigger LANGUAGE plpgsql AS
             $$ BEGIN UPDATE t SET v = 1 WHERE id = OLD.tid; RETURN NEW; END $$;
         CREATE TRIGGER to_t INSTEAD OF UPDATE ON joined FOR EACH ROW EXECUTE FUNCTION to_t()",
    );
    // Row by row, each of them by its key.
    narrow(&mut bed, "UPDATE joined SET sv = 1");
    narrow(&mut bed, "UPDATE t SET v = 1 FROM s RIGHT JOIN u ON u.id = s.id WHERE u.id = t.id");
    refused(&mut bed, "UPDATE t SET v = 1 FROM s FULL JOIN u ON u.id = s.id");
}

// MERGE

#[test]
fn merges() {
    let mut bed = bed();
    for planner in PLANNERS {
        pass(&mut bed.writer, "RESET ALL");
        pass(&mut bed.writer, planner);
        for sql in [
            "MERGE INTO t USING (SELECT 1) AS one ON true WHEN MATCHED THEN UPDATE SET v = 1",
            "MERGE INTO t USING s ON s.id = 1 WHEN MATCHED THEN DELETE",
            "MERGE INTO t USING s ON s.id = 1 WHEN MATCHED AND s.v = 1 THEN DELETE",
            "MERGE INTO t USING (SELECT 1) AS one ON t.id = t.id WHEN MATCHED THEN UPDATE SET v = 1
                 WHEN NOT MATCHED THEN INSERT VALUES (9)",
            "MERGE INTO t USING s ON s.id = 1 WHEN MATCHED AND t.id = 1 THEN UPDATE SET v = 1 WHEN MATCHED THEN DELETE",
        ] {
            refused(&mut bed, sql);
        }
        for sql in [
            "MERGE INTO t USING s ON s.id = t.id WHEN MATCHED THEN UPDATE SET v = 1",
            "MERGE INTO t USING s ON s.id = t.id WHEN MATCHED THEN DELETE WHEN NOT MATCHED THEN INSERT VALUES (s.id)",
            "MERGE INTO t USING (SELECT 1) AS one ON t.id = 3 WHEN MATCHED THEN DELETE",
            "MERGE INTO t USING (SELECT 1) AS one ON t.id = 3 WHEN MATCHED THEN DELETE WHEN NOT MATCHED THEN DO NOTHING",
            "MERGE INTO t USING (SELECT 1) AS one ON true WHEN MATCHED AND t.id = 3 THEN DELETE",
            "MERGE INTO t USING s ON true WHEN MATCHED THEN DO NOTHING",
            "MERGE INTO t USING s ON false WHEN NOT MATCHED THEN INSERT VALUES (s.id + 100)",
        ] {
            narrow(&mut bed, sql);
        }
    }
    // Only what a policy is for.
    bed.policy("tables => '{public.t}', operations => '{delete}', require_where => true");
    narrow(&mut bed, "MERGE INTO t USING (SELECT 1) AS one ON true WHEN MATCHED THEN UPDATE SET v = 1");
    narrow(&mut bed, "UPDATE t SET v = 1");
    refused(&mut bed, "MERGE INTO t USING (SELECT 1) AS one ON true WHEN MATCHED THEN DELETE");
}

#[test]
fn merges_into_partitions() {
    let mut bed = Bed::new(PARTITIONED);
    bed.policy("tables => '{public.t}', require_where => true");
    refused_for(&mut bed, "MERGE INTO t USING s ON s.id = 1 WHEN MATCHED THEN UPDATE SET v = 1", "t1");
    narrow(&mut bed, "MERGE INTO t USING s ON s.id = t.id WHEN MATCHED THEN UPDATE SET v = 1");
    narrow(&mut bed, "MERGE INTO t USING s ON s.id = 1 WHEN MATCHED AND t.id = 5 THEN DELETE");
}

// Foreign tables

/// A bed with a foreign table `t`, a partitioned table `p` with a foreign partition, and `s` on both sides.
fn foreign() -> Bed {
    let mut bed = Bed::new(&format!(
        "CREATE SCHEMA far; {SIX} ALTER TABLE t SET SCHEMA far; CREATE TABLE far.s AS TABLE far.t; CREATE TABLE far.p AS TABLE far.t"
    ));
    let (server, name) = (Server::shared(), bed.db().name.clone());
    bed.passes(&format!(
        "CREATE EXTENSION postgres_fdw;
         CREATE SERVER far FOREIGN DATA WRAPPER postgres_fdw OPTIONS (host '{}', port '{}', dbname '{name}');
         CREATE USER MAPPING FOR PUBLIC SERVER far OPTIONS (user 'postgres');
         CREATE FOREIGN TABLE t (id int, v int) SERVER far OPTIONS (schema_name 'far');
         CREATE FOREIGN TABLE s (id int, v int) SERVER far OPTIONS (schema_name 'far');
         CREATE TABLE near AS TABLE far.s;
         CREATE TABLE p (id int, v int) PARTITION BY RANGE (id);
         CREATE FOREIGN TABLE p1 PARTITION OF p FOR VALUES FROM (1) TO (100) SERVER far OPTIONS (schema_name 'far', table_name 'p')",
        server.socket_dir().display(),
        server.port(),
    ));
    bed.policy("tables => '{public.t, public.p}', require_where => true");
    bed
}

#[track_caller]
fn assert_direct(client: &mut Client, sql: &str, direct: bool) {
    let plan: Vec<String> =
        client.query(&format!("EXPLAIN (COSTS OFF) {sql}"), &[]).unwrap().iter().map(|row| row.get(0)).collect();
    let plan = plan.join("\n");
    assert_eq!(plan.contains("Foreign Update") || plan.contains("Foreign Delete"), direct, "{plan}");
}

#[test]
fn foreign_tables() {
    let mut bed = foreign();
    let before = bed.number("SELECT sum(v) + count(*) FROM far.t");
    for (sql, table, direct) in [
        ("UPDATE t SET v = 1", "t", true),
        ("DELETE FROM t WHERE true", "t", true),
        ("UPDATE t SET v = 1 WHERE now() > '2000-01-01'", "t", false),
        ("UPDATE t SET v = random()", "t", false),
        ("UPDATE t SET v = 1 FROM near WHERE near.id = 2", "t", false),
        ("UPDATE p SET v = 1", "p1", true),
        ("DELETE FROM p RETURNING id", "p1", true),
    ] {
        assert_direct(&mut bed.reader, sql, direct);
        refused_for(&mut bed, sql, table);
    }
    assert_eq!(bed.number("SELECT sum(v) + count(*) FROM far.t"), before);
    for (sql, direct) in [
        ("UPDATE t SET v = 1 WHERE id = 3", true),
        ("DELETE FROM t WHERE id > 3 AND now() > '2000-01-01'", false),
        ("UPDATE t SET v = random() WHERE id = 3", false),
        ("UPDATE t SET v = 1 WHERE id = random()", false),
        ("UPDATE t SET v = 1 FROM near WHERE near.id = t.id", false),
        ("UPDATE t SET v = random() FROM s WHERE s.id = t.id AND s.v = 0", false),
        ("UPDATE p SET v = 1 WHERE id = 3", true),
    ] {
        assert_direct(&mut bed.reader, sql, direct);
        narrow(&mut bed, sql);
    }
}

/// The plan does not show by what the foreign server joins when it changes the rows by itself.
#[test]
fn a_join_that_the_foreign_server_modifies_by_is_not_seen() {
    let mut bed = foreign();
    let far = "SET enable_nestloop = off; SET enable_hashjoin = off; SET enable_mergejoin = off";
    pass(&mut bed.writer, far);
    pass(&mut bed.reader, far);
    // Where it does not change the rows by itself, a local plan of the join is kept.
    narrow(&mut bed, "UPDATE t SET v = random() FROM s WHERE s.id = t.id");
    refused(&mut bed, "UPDATE t SET v = random() FROM s");
    for sql in ["UPDATE t SET v = 1 FROM s WHERE s.id = t.id", "UPDATE t SET v = 1 FROM s"] {
        assert_direct(&mut bed.reader, sql, true);
        refused(&mut bed, sql);
    }
}

// Ways past it

#[test]
fn the_flag_lifts_it_for_one_transaction() {
    let mut bed = bed();
    bed.policy("tables => '{public.t}', require_where => true, override => 'flag'");
    bed.passes("SET writeguard.override = on; UPDATE t SET v = 1");
    assert_eq!(bed.number("SELECT count(*) FROM t WHERE v = 1"), 6);
    refused(&mut bed, "UPDATE t SET v = 2");
    let event = bed
        .reader
        .query_one(
            "SELECT kind, policy, operation, relation, scope, row_limit IS NULL, rows, rows_estimated, statement
             FROM writeguard.event WHERE kind = 'overridden'",
            &[],
        )
        .unwrap();
    let text = |index: usize| event.get::<_, String>(index);
    assert_eq!(
        [text(1), text(2), text(3), text(4), text(8)],
        ["p", "update", "public.t", "where", "UPDATE t SET v = 1"].map(str::to_owned)
    );
    assert!(event.get::<_, bool>(5));
    assert_eq!((event.get::<_, i64>(6), event.get::<_, i64>(7)), (6, 6));
    // Rolled back, there was no override.
    bed.passes("BEGIN; SET writeguard.override = on; UPDATE t SET v = 3; ROLLBACK");
    assert_eq!(bed.number("SELECT count(*) FROM writeguard.event WHERE kind = 'overridden'"), 1);
    bed.policy("tables => '{public.t}', require_where => true, override => 'never'");
    refused(&mut bed, "SET writeguard.override = on; UPDATE t SET v = 2");
}

#[test]
fn the_refusal_is_on_record() {
    let mut bed = bed();
    refused(&mut bed, "UPDATE u SET v = 1 WHERE id = 1; DELETE FROM t WHERE true; SELECT 1");
    let event = bed
        .reader
        .query_one(
            "SELECT policy, operation, relation, scope, statement, row_limit IS NULL AND rows IS NULL, rows_estimated
             FROM writeguard.event WHERE kind = 'blocked'",
            &[],
        )
        .unwrap();
    let text = |index: usize| event.get::<_, String>(index);
    assert_eq!(
        [text(0), text(1), text(2), text(3), text(4)],
        ["p", "delete", "public.t", "where", "DELETE FROM t WHERE true"].map(str::to_owned)
    );
    assert!(event.get::<_, bool>(5));
    assert_eq!(event.get::<_, i64>(6), 6);
    // One event for all that a statement tries.
    bed.passes(
        "DO $$ BEGIN FOR i IN 1..3 LOOP
             BEGIN DELETE FROM t; EXCEPTION WHEN SQLSTATE 'WG002' THEN NULL; END;
         END LOOP; END $$",
    );
    assert_eq!(bed.number("SELECT count(*) FROM writeguard.event WHERE kind = 'blocked'"), 2);
}

#[test]
fn a_token_lifts_it_for_the_reviewed_statement() {
    let mut bed = bed();
    let (anna, bert) = (bed.db().role("anna"), bed.db().role("bert"));
    bed.passes(&format!(
        "GRANT ALL ON t TO {anna}; GRANT EXECUTE ON FUNCTION writeguard.approve(bigint, text, interval, bigint) TO {bert}"
    ));
    let (mut anna, mut bert) = (bed.db().connect(&anna), bed.db().connect(&bert));
    let sql = "UPDATE t SET v = 7";
    let refusal = expect_refusal(anna.batch_execute(sql));
    assert_eq!(refusal.sqlstate, "WG002");
    // The hint is the next command to type.
    let (_, hint) = refusal.hint.split_once("rows. ").expect("a command in the hint");
    let request: i64 = anna.query_one(hint.trim_end_matches(';'), &[]).unwrap().get(0);
    assert_eq!(bed.number(&format!("SELECT rows FROM writeguard.request WHERE id = {request}")), 6);
    let token: String = bert.query_one("SELECT writeguard.approve($1)", &[&request]).unwrap().get(0);
    pass(&mut anna, &format!("SET writeguard.token = '{token}'"));
    let refusal = expect_refusal(anna.batch_execute(sql));
    assert_eq!((refusal.sqlstate.as_str(), refusal.hint.contains("but not the flag")), ("WG002", true), "{refusal:?}");
    pass(&mut anna, &format!("SET writeguard.token = '{token}'; SET writeguard.override = on"));
    let refusal = expect_refusal(anna.batch_execute("UPDATE t SET v = 8"));
    assert_eq!(refusal.sqlstate, "WG006", "{refusal:?}");
    pass(&mut anna, &format!("SET writeguard.token = '{token}'; SET writeguard.override = on"));
    pass(&mut anna, sql);
    assert_eq!(bed.number("SELECT count(*) FROM t WHERE v = 7"), 6);
    let spent = format!("SELECT count(*) FROM writeguard.request WHERE id = {request} AND state = 'spent'");
    assert_eq!(bed.number(&spent), 1);
    let sql = format!("SELECT rows FROM writeguard.event WHERE kind = 'overridden' AND approval = {request}");
    assert_eq!(bed.number(&sql), 6);
}

#[test]
fn a_token_for_fewer_rows_holds_to_its_number() {
    let mut bed = bed();
    let bert = bed.db().role("bert");
    bed.passes(&format!("GRANT EXECUTE ON FUNCTION writeguard.approve(bigint, text, interval, bigint) TO {bert}"));
    let mut bert = bed.db().connect(&bert);
    let row = bed.writer.query_one("SELECT writeguard.request('DELETE FROM t', 'all of them')", &[]).unwrap();
    let token: String = bert.query_one("SELECT writeguard.approve($1)", &[&row.get::<_, i64>(0)]).unwrap().get(0);
    bed.passes("INSERT INTO t VALUES (7)");
    bed.passes(&format!("SET writeguard.token = '{token}'; SET writeguard.override = on"));
    let refusal = expect_refusal(bed.writer.batch_execute("DELETE FROM t"));
    assert_eq!(refusal.sqlstate, "WG006", "{refusal:?}");
    assert_eq!(bed.number("SELECT count(*) FROM t"), 7);
}

#[test]
fn an_empty_table_may_be_approved_too() {
    let mut bed = Bed::new("CREATE TABLE t (id int PRIMARY KEY, v int)");
    bed.policy("tables => '{public.t}', require_where => true");
    let bert = bed.db().role("bert");
    bed.passes(&format!("GRANT EXECUTE ON FUNCTION writeguard.approve(bigint, text, interval, bigint) TO {bert}"));
    let mut bert = bed.db().connect(&bert);
    for rows in [0, 1] {
        let row = bed.writer.query_one("SELECT writeguard.request('DELETE FROM t', 'all of them')", &[]).unwrap();
        let token: String = bert.query_one("SELECT writeguard.approve($1)", &[&row.get::<_, i64>(0)]).unwrap().get(0);
        // What came since was not reviewed.
        bed.passes(&format!("INSERT INTO t SELECT n FROM generate_series(1, {rows}) AS n"));
        bed.passes(&format!("SET writeguard.token = '{token}'; SET writeguard.override = on"));
        match rows {
            0 => bed.passes("DELETE FROM t"),
            _ => assert_eq!(expect_refusal(bed.writer.batch_execute("DELETE FROM t")).sqlstate, "WG006"),
        }
    }
    assert_eq!(bed.number("SELECT count(*) FROM writeguard.event WHERE kind = 'overridden' AND rows = 0"), 1);
    // What needs no approval gets none.
    let refusal =
        expect_refusal(bed.writer.batch_execute("SELECT writeguard.request('DELETE FROM t WHERE id = 7', 'none')"));
    assert_eq!(refusal.sqlstate, "WG007");
}

#[test]
fn rows_are_counted_all_the_same() {
    let mut bed = bed();
    bed.policy("tables => '{public.t}', require_where => true, max_rows => 2, override => 'flag'");
    bed.refused("UPDATE t SET v = 1 WHERE id < 4");
    bed.passes("UPDATE t SET v = 1 WHERE id < 3");
    refused(&mut bed, "UPDATE t SET v = 1");
    bed.passes("SET writeguard.override = on; UPDATE t SET v = 1");
    assert_eq!(bed.number("SELECT count(*) FROM writeguard.event WHERE kind = 'overridden'"), 1);
    // Another policy's limit is not lifted with it.
    pass(
        &mut bed.reader,
        "SELECT writeguard.set_policy('q', tables => '{public.t}', max_rows => 5, override => 'never')",
    );
    bed.refused("SET writeguard.override = on; UPDATE t SET v = 1");
}

#[test]
fn while_the_guard_is_off_it_is_an_event() {
    let mut bed = bed();
    bed.passes("SET writeguard.enabled = off; UPDATE t SET v = 1; RESET writeguard.enabled");
    assert_eq!(bed.number("SELECT count(*) FROM t WHERE v = 1"), 6);
    wait_until(10, || bed.number("SELECT count(*) FROM writeguard.event WHERE kind = 'disabled'") == 1);
    assert_eq!(bed.number("SELECT count(*) FROM writeguard.event WHERE kind = 'blocked'"), 0);
}

// The policy

#[test]
fn the_column_is_stored_and_shown() {
    let mut bed = bed();
    let shown = "SELECT count(*) FROM writeguard.effective('t', operation => 'update')
        WHERE \"limit\" = 'require_where' AND value = 'true' AND applies";
    assert_eq!(bed.number(&format!("({shown})")), 1);
    for (arguments, action) in [
        ("tables => '{public.t}', require_where => true", "unchanged"),
        ("tables => '{public.t}'", "changed"),
        ("tables => '{public.t}', require_where => true", "changed"),
    ] {
        let row = bed.reader.query_one(&format!("SELECT writeguard.set_policy('p', {arguments})"), &[]).unwrap();
        assert_eq!(row.get::<_, &str>(0), action);
    }
    bed.policy("tables => '{public.t}', require_where => false");
    assert_eq!(bed.number(&format!("({shown})")), 0);
    bed.passes("UPDATE t SET v = 1");
}

#[test]
fn roles_and_operations_of_the_policy_hold() {
    let mut bed = bed();
    let role = bed.db().role("app");
    bed.passes(&format!("GRANT ALL ON t TO {role}"));
    bed.policy(&format!(
        "tables => '{{public.t}}', roles => '{{{role}}}', operations => '{{delete}}', require_where => true"
    ));
    bed.passes("BEGIN; DELETE FROM t; ROLLBACK");
    let mut app = bed.db().connect(&role);
    assert_eq!(expect_refusal(app.batch_execute("DELETE FROM t")).sqlstate, "WG002");
    pass(&mut app, "UPDATE t SET v = 1");
}

/// A refusal before the first row, between writes within the limit: what was prepared to count it is used again.
#[test]
fn refused_and_within_in_turn() {
    let mut bed = Bed::new(TABLES);
    bed.policy("tables => '{public.t}', require_where => true, max_rows => 3");
    for _ in 0..5 {
        bed.passes("UPDATE t SET v = v + 1 WHERE id <= 3");
        refused_for(&mut bed, "UPDATE t SET v = v + 1", "t");
        refused_for(&mut bed, "WITH w AS (UPDATE t SET v = v + 1 RETURNING id) SELECT 1", "t");
        bed.passes("WITH w AS (UPDATE t SET v = v + 1 WHERE id <= 2 RETURNING id) SELECT count(*) FROM w");
    }
    assert_eq!(bed.number("SELECT sum(v) FROM t"), 25);
}

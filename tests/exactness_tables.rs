//! Row changes are counted exactly, whatever stands between the statement and the rows:
//! partitions, children, views, rules, foreign tables; and what is never covered.

use crate::common::limits::{self, Bed, SIX, assert_free, assert_free_on, assert_limit, assert_limit_on};
use crate::common::{Server, expect_refusal, wait_until};

/// Rows 1 to 3 and 4 to 6 in two partitions, the second with another order of columns.
const PARTITIONED: &str = "
    CREATE TABLE t (id int NOT NULL, v int) PARTITION BY RANGE (id);
    CREATE TABLE t1 PARTITION OF t FOR VALUES FROM (1) TO (4);
    CREATE TABLE t2 (gone int, v int, id int NOT NULL);
    ALTER TABLE t2 DROP COLUMN gone;
    ALTER TABLE t ATTACH PARTITION t2 FOR VALUES FROM (4) TO (100);
    INSERT INTO t SELECT i, 0 FROM generate_series(1, 6) AS i;";

/// Rows 1 and 2 in the parent, 3 and 4 in a child, 5 and 6 in its child.
const INHERITED: &str = "
    CREATE TABLE t (id int, v int);
    CREATE TABLE child (extra text) INHERITS (t);
    CREATE TABLE grandchild () INHERITS (child);
    INSERT INTO t VALUES (1, 0), (2, 0);
    INSERT INTO child VALUES (3, 0, 'x'), (4, 0, 'x');
    INSERT INTO grandchild VALUES (5, 0, 'x'), (6, 0, 'x');";

// Partitions

#[test]
fn update_of_partitions_with_a_policy_on_the_root() {
    assert_limit_on("{public.t}", PARTITIONED, "UPDATE t SET v = 1", 6);
    assert_limit_on("{public.t}", PARTITIONED, "UPDATE t SET v = 1 WHERE id > 4", 2);
    assert_limit_on("{public.t}", PARTITIONED, "UPDATE t2 SET v = 1", 3);
}

#[test]
fn update_of_partitions_with_a_policy_on_a_leaf() {
    for leaf in ["t1", "t2"] {
        let refusal = assert_limit_on(&format!("{{public.{leaf}}}"), PARTITIONED, "UPDATE t SET v = 1", 3);
        assert_eq!(refusal.table, leaf);
    }
    assert_free_on("{public.t1}", PARTITIONED, "UPDATE t2 SET v = 1");
}

#[test]
fn delete_from_partitions() {
    assert_limit_on("{public.t}", PARTITIONED, "DELETE FROM t", 6);
    assert_limit_on("{public.t1}", PARTITIONED, "DELETE FROM t", 3);
    assert_limit_on("{public.t2}", PARTITIONED, "DELETE FROM t WHERE id < 6", 2);
}

#[test]
fn partitions_in_a_cte() {
    assert_limit_on(
        "{public.t2}",
        PARTITIONED,
        "WITH u AS (UPDATE t SET v = 1 RETURNING id) SELECT count(*) FROM u",
        3,
    );
}

#[test]
fn a_moved_row_is_one_update_of_the_partition_that_it_leaves() {
    let sql = "UPDATE t SET id = id + 50 WHERE id <= 3";
    assert_limit_on("{public.t}", PARTITIONED, sql, 3);
    assert_limit_on("{public.*}", PARTITIONED, sql, 3);
    assert_limit_on("{public.t1}", PARTITIONED, sql, 3);
    assert_free_on("{public.t2}", PARTITIONED, sql);
}

/// Some rows move and some stay.
#[test]
fn rows_that_move_and_rows_that_stay() {
    let sql = "UPDATE t SET id = CASE WHEN id % 2 = 1 THEN id + 50 ELSE id END, v = 1";
    assert_limit_on("{public.t}", PARTITIONED, sql, 6);
    assert_limit_on("{public.t1}", PARTITIONED, sql, 3);
    assert_limit_on("{public.t2}", PARTITIONED, sql, 3);
    let sql = "WITH u AS (UPDATE t SET id = CASE WHEN id % 2 = 1 THEN id + 50 ELSE id END, v = 1 \
               RETURNING id) SELECT * FROM u";
    assert_limit_on("{public.t1}", PARTITIONED, sql, 3);
    assert_limit_on("{public.t}", PARTITIONED, sql, 6);
}

/// A policy for UPDATE alone and one for DELETE alone: the move is no delete.
#[test]
fn a_moved_row_is_no_delete() {
    let mut bed = Bed::new(PARTITIONED);
    bed.policy("tables => '{public.t}', operations => '{delete}', max_rows => 0");
    bed.passes("UPDATE t SET id = id + 50 WHERE id <= 3");
}

/// The trigger that deletes for the move keeps the row where it is.
#[test]
fn a_move_that_a_trigger_suppresses_does_not_count() {
    let setup = format!(
        "{PARTITIONED}
         CREATE FUNCTION stay() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';
         CREATE TRIGGER stay BEFORE DELETE ON t1 FOR EACH ROW WHEN (OLD.id <> 2)
             EXECUTE FUNCTION stay();"
    );
    assert_limit_on("{public.t}", &setup, "UPDATE t SET id = id + 50 WHERE id <= 3", 1);
}

#[test]
fn a_partition_attached_later_is_covered() {
    let mut bed = Bed::new(PARTITIONED);
    bed.limit("{public.t}", 3);
    bed.passes("CREATE TABLE t3 PARTITION OF t FOR VALUES FROM (100) TO (200)");
    bed.passes("INSERT INTO t SELECT i, 0 FROM generate_series(100, 103) AS i");
    bed.refused("UPDATE t3 SET v = 1");
    bed.refused("UPDATE t SET v = 1 WHERE id >= 100");
    bed.passes("UPDATE t SET v = 1 WHERE id > 100");
}

#[test]
fn no_partition_is_left_to_write_to() {
    assert_free(PARTITIONED, "UPDATE t SET v = 1 WHERE id < 0");
    assert_free(PARTITIONED, "DELETE FROM t WHERE id > 1000");
    assert_free(PARTITIONED, "DELETE FROM ONLY t");
}

#[test]
fn many_partitions_share_one_budget() {
    assert_limit_on(
        "{public.t}",
        "CREATE TABLE t (id int, v int) PARTITION BY HASH (id);
         DO $$ BEGIN FOR i IN 0..19 LOOP
             EXECUTE format('CREATE TABLE t%s PARTITION OF t FOR VALUES WITH (MODULUS 20, REMAINDER %s)', i, i);
         END LOOP; END $$;
         INSERT INTO t SELECT i, 0 FROM generate_series(1, 200) AS i;",
        "UPDATE t SET v = 1",
        200,
    );
}

// Inheritance

#[test]
fn update_of_inheritance_children_with_a_policy_on_the_parent() {
    assert_limit_on("{public.t}", INHERITED, "UPDATE t SET v = 1", 6);
    assert_limit_on("{public.t}", INHERITED, "UPDATE ONLY t SET v = 1", 2);
    assert_limit_on("{public.t}", INHERITED, "UPDATE child SET v = 1", 4);
    assert_limit_on("{public.t}", INHERITED, "DELETE FROM grandchild", 2);
}

#[test]
fn update_of_inheritance_children_with_a_policy_on_a_child() {
    assert_limit_on("{public.child}", INHERITED, "UPDATE t SET v = 1", 4);
    assert_limit_on("{public.grandchild}", INHERITED, "DELETE FROM t", 2);
    assert_free_on("{public.child}", INHERITED, "UPDATE ONLY t SET v = 1");
}

// Views

#[test]
fn updatable_view() {
    let setup = format!("{SIX} CREATE VIEW w AS SELECT id, v AS value FROM t WHERE id > 1;");
    assert_limit(&setup, "UPDATE w SET value = 1", 5);
    let refusal = assert_limit_on("{public.t}", &setup, "DELETE FROM w WHERE id < 4", 2);
    assert_eq!(refusal.table, "t");
    assert_limit(
        &setup,
        "INSERT INTO w VALUES (2, 1), (3, 1), (10, 1) ON CONFLICT (id) DO UPDATE SET value = EXCLUDED.value",
        2,
    );
}

#[test]
fn view_on_a_view() {
    let setup = format!(
        "{SIX} CREATE VIEW w AS SELECT id, v FROM t WHERE id > 1;
         CREATE VIEW x WITH (security_barrier) AS SELECT v AS b, id AS a FROM w WHERE id < 6
             WITH CHECK OPTION;"
    );
    assert_limit(&setup, "UPDATE x SET b = 1", 4);
    assert_limit(&setup, "WITH d AS (DELETE FROM x RETURNING a) SELECT * FROM d", 4);
}

#[test]
fn view_on_a_partitioned_table() {
    let setup = format!("{PARTITIONED} CREATE VIEW w AS SELECT v, id FROM t;");
    assert_limit_on("{public.t2}", &setup, "UPDATE w SET v = 1", 3);
    assert_limit_on("{public.t}", &setup, "UPDATE w SET id = id + 50", 6);
}

/// The trigger's writes count, the view's own rows do not.
#[test]
fn view_with_instead_of_trigger() {
    let setup = format!(
        "{SIX} CREATE VIEW w AS SELECT DISTINCT id, v FROM t;
         CREATE FUNCTION below() RETURNS trigger LANGUAGE plpgsql AS $$
         BEGIN
             UPDATE t SET v = 1 WHERE id = OLD.id AND id > 2;
             RETURN OLD;
         END $$;
         CREATE TRIGGER below INSTEAD OF UPDATE ON w FOR EACH ROW EXECUTE FUNCTION below();
         CREATE FUNCTION nothing() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN OLD; END';
         CREATE TRIGGER nothing INSTEAD OF DELETE ON w FOR EACH ROW EXECUTE FUNCTION nothing();"
    );
    assert_limit(&setup, "UPDATE w SET v = 5", 4);
    assert_free(&setup, "DELETE FROM w");
}

/// A pattern that matches a view covers nothing; the table behind it is what counts.
#[test]
fn a_view_itself_is_not_covered() {
    let setup = format!("{SIX} CREATE VIEW w AS TABLE t;");
    assert_free_on("{public.w*}", &setup, "UPDATE w SET v = 1");
    assert_free_on("{public.w*}", &setup, "DELETE FROM w");
}

// Rules

#[test]
fn rule_do_also() {
    let setup = format!(
        "{SIX} CREATE TABLE log AS TABLE t;
         CREATE RULE also AS ON UPDATE TO t DO ALSO UPDATE log SET v = NEW.v WHERE log.id = OLD.id;"
    );
    assert_limit(&setup, "UPDATE t SET v = 1 WHERE id > 2", 8);
    assert_limit_on("{public.log}", &setup, "UPDATE t SET v = 1 WHERE id > 2", 4);
    assert_limit_on("{public.t}", &setup, "UPDATE t SET v = 1 WHERE id > 2", 4);
}

#[test]
fn rule_do_also_with_an_insert() {
    let setup = format!(
        "{SIX} CREATE TABLE log (id int);
         CREATE RULE also AS ON DELETE TO t DO ALSO INSERT INTO log VALUES (OLD.id);"
    );
    assert_limit(&setup, "DELETE FROM t WHERE id > 2", 4);
}

#[test]
fn rule_do_instead() {
    let setup = format!(
        "{SIX} CREATE TABLE other AS TABLE t;
         CREATE RULE instead AS ON DELETE TO t DO INSTEAD UPDATE other SET v = -1 WHERE id = OLD.id;"
    );
    assert_limit(&setup, "DELETE FROM t WHERE id > 2", 4);
    assert_limit_on("{public.other}", &setup, "DELETE FROM t WHERE id > 2", 4);
    assert_free_on("{public.t}", &setup, "DELETE FROM t WHERE id > 2");
}

#[test]
fn rule_do_instead_on_a_view() {
    let setup = format!(
        "{SIX} CREATE VIEW w AS SELECT DISTINCT id, v FROM t;
         CREATE RULE instead AS ON UPDATE TO w DO INSTEAD UPDATE t SET v = NEW.v WHERE id = OLD.id
             RETURNING id, v;"
    );
    assert_limit(&setup, "UPDATE w SET v = 1 WHERE id > 2", 4);
    assert_limit(&setup, "UPDATE w SET v = 1 WHERE id > 2 RETURNING id", 4);
}

#[test]
fn rule_do_instead_nothing() {
    let setup = format!("{SIX} CREATE RULE nothing AS ON DELETE TO t DO INSTEAD NOTHING;");
    assert_free(&setup, "DELETE FROM t");
}

/// Rows 4 to 6 go to the rule's action, the others are deleted.
#[test]
fn conditional_rule() {
    let setup = format!(
        "{SIX} CREATE RULE soft AS ON DELETE TO t WHERE OLD.id > 3
             DO INSTEAD UPDATE t SET v = -1 WHERE id = OLD.id;"
    );
    assert_limit(&setup, "DELETE FROM t", 6);
}

#[test]
fn rule_with_several_actions() {
    let setup = format!(
        "{SIX} CREATE TABLE a AS TABLE t; CREATE TABLE b AS TABLE t;
         CREATE RULE several AS ON INSERT TO t DO ALSO
             (UPDATE a SET v = NEW.id; DELETE FROM b WHERE id <= 2);"
    );
    assert_limit(&setup, "INSERT INTO t VALUES (100, 1)", 8);
}

// Never covered

#[test]
fn temporary_tables_are_never_covered() {
    let mut bed = Bed::new(SIX);
    bed.limit("{*.*}", 0);
    bed.passes(
        "CREATE TEMP TABLE x AS TABLE t; UPDATE x SET v = 1; DELETE FROM x WHERE id > 3; TRUNCATE x;
         CREATE TEMP TABLE y (id int PRIMARY KEY, v int) ON COMMIT DELETE ROWS;
         INSERT INTO y VALUES (1, 1); INSERT INTO y VALUES (1, 1) ON CONFLICT (id) DO UPDATE SET v = 2;
         MERGE INTO y USING t ON t.id = y.id WHEN MATCHED THEN DELETE",
    );
}

/// The row's way leads through a temporary table.
#[test]
fn rows_of_a_covered_table_count_beside_a_temporary_one() {
    assert_limit(
        &format!("{SIX} CREATE TEMP TABLE x AS TABLE t;"),
        "WITH d AS (DELETE FROM x RETURNING id) UPDATE t SET v = 1 FROM d WHERE d.id = t.id AND t.id > 2",
        4,
    );
}

#[test]
fn catalogs_are_never_covered() {
    let mut bed = Bed::new(&format!("{SIX} COMMENT ON TABLE t IS 'six';"));
    bed.limit("{*.*}", 0);
    bed.passes("UPDATE pg_description SET description = 'seven' WHERE objoid = 't'::regclass");
    bed.passes("DELETE FROM pg_description WHERE objoid = 't'::regclass");
    bed.passes("ALTER TABLE t RENAME COLUMN v TO w");
    bed.passes("ANALYZE t");
    bed.refused("UPDATE t SET w = 1");
}

#[test]
fn the_tables_of_the_extension_are_never_covered() {
    let mut bed = Bed::new(SIX);
    bed.limit("{*.*}", 0);
    bed.limit("{*.*, writeguard.*}", 0);
    bed.refused("UPDATE t SET v = 1");
    bed.passes("UPDATE writeguard.event SET reason = 'read'");
    bed.passes("DELETE FROM writeguard.event");
    bed.passes("SELECT writeguard.drop_policy('p')");
    bed.passes("UPDATE t SET v = 1");
}

// Always covered

#[test]
fn owners_and_others_are_covered() {
    let mut bed = Bed::new(SIX);
    let owner = bed.db().role("owner");
    let other = bed.db().role("other");
    bed.passes(&format!("ALTER TABLE t OWNER TO {owner}; GRANT ALL ON t TO {other}"));
    bed.limit("{public.t}", 5);
    for role in [owner, other] {
        let mut client = bed.db().connect(&role);
        limits::refuse(&mut client, "UPDATE t SET v = 1");
        limits::refuse(&mut client, "DELETE FROM t");
        limits::pass(&mut client, "UPDATE t SET v = 1 WHERE id > 1");
    }
}

#[test]
fn row_security_narrows_what_counts() {
    let mut bed = Bed::new(&format!(
        "{SIX} ALTER TABLE t ENABLE ROW LEVEL SECURITY;
         CREATE POLICY few ON t USING (id <= 4);"
    ));
    let role = bed.db().role("few");
    bed.passes(&format!("GRANT ALL ON t TO {role}"));
    let mut client = bed.db().connect(&role);
    bed.limit("{public.t}", 3);
    limits::refuse(&mut client, "UPDATE t SET v = 1");
    bed.limit("{public.t}", 4);
    limits::pass(&mut client, "UPDATE t SET v = 1");
}

// Foreign tables. The server is this one, through its socket; only the local names have policies.

fn foreign(setup: &str) -> Bed {
    let bed = Bed::new(&format!("CREATE SCHEMA far; {SIX}"));
    let server = Server::shared();
    let mut admin = bed.db().admin();
    limits::pass(
        &mut admin,
        &format!(
            "CREATE TABLE far.t AS TABLE public.t;
             DROP TABLE public.t;
             CREATE EXTENSION postgres_fdw;
             CREATE SERVER far FOREIGN DATA WRAPPER postgres_fdw
                 OPTIONS (host '{}', port '{}', dbname '{}');
             CREATE USER MAPPING FOR PUBLIC SERVER far OPTIONS (user 'postgres');
             {setup}",
            server.socket_dir().display(),
            server.port(),
            bed.db().name
        ),
    );
    bed
}

const NEAR: &str = "CREATE FOREIGN TABLE t (id int, v int) SERVER far OPTIONS (schema_name 'far');";

/// What the foreign table's rows are on their own server.
fn far(bed: &mut Bed) -> String {
    bed.reader
        .query_one("SELECT coalesce(string_agg(x::text, ' ' ORDER BY x::text), '') FROM far.t AS x", &[])
        .unwrap()
        .get(0)
}

#[track_caller]
fn assert_far_limit(bed: &mut Bed, tables: &str, sql: &str, rows: u64) {
    let before = far(bed);
    bed.limit(tables, rows - 1);
    bed.refused(sql);
    assert_eq!(far(bed), before, "{sql}: refused, but not undone");
    bed.limit(tables, rows);
    bed.passes(sql);
    assert_ne!(far(bed), before, "{sql}: passed, but changed nothing");
}

/// Whether the foreign server does it all in one command.
#[track_caller]
fn assert_direct(bed: &mut Bed, sql: &str, direct: bool) {
    let plan: Vec<String> =
        bed.reader.query(&format!("EXPLAIN (COSTS OFF) {sql}"), &[]).unwrap().iter().map(|row| row.get(0)).collect();
    let plan = plan.join("\n");
    assert_eq!(plan.contains("Foreign Update") || plan.contains("Foreign Delete"), direct, "{plan}");
}

#[test]
fn foreign_table_with_direct_modify() {
    for sql in [
        "UPDATE t SET v = v + 1",
        "DELETE FROM t",
        "UPDATE t SET v = v + 1 RETURNING id, v",
        "DELETE FROM t RETURNING id",
    ] {
        let mut bed = foreign(NEAR);
        assert_direct(&mut bed, sql, true);
        assert_far_limit(&mut bed, "{public.t}", sql, 6);
    }
}

#[test]
fn foreign_table_without_direct_modify() {
    for sql in [
        "UPDATE t SET v = v + 1 + (random() * 0)::int",
        "DELETE FROM t WHERE random() >= 0",
        "UPDATE t SET v = v + 1 + (random() * 0)::int RETURNING id",
    ] {
        let mut bed = foreign(NEAR);
        assert_direct(&mut bed, sql, false);
        assert_far_limit(&mut bed, "{public.t}", sql, 6);
    }
}

#[test]
fn foreign_table_in_a_cte() {
    for sql in [
        "WITH u AS (UPDATE t SET v = v + 1) SELECT 1",
        "WITH u AS (UPDATE t SET v = v + 1 RETURNING id) SELECT count(*) FROM u",
        "WITH d AS (DELETE FROM t RETURNING id) SELECT id FROM d LIMIT 1",
        "WITH d AS (DELETE FROM t WHERE random() >= 0 RETURNING id) SELECT count(*) FROM d",
    ] {
        let mut bed = foreign(NEAR);
        assert_far_limit(&mut bed, "{public.t}", sql, 6);
    }
}

#[test]
fn foreign_table_that_no_policy_names_is_free() {
    let mut bed = foreign(&format!("{NEAR} CREATE TABLE near AS TABLE far.t;"));
    bed.limit("{public.near}", 0);
    bed.passes("UPDATE t SET v = v + 1");
    bed.passes("DELETE FROM t");
}

/// The foreign server's own guard speaks through the wrapper. Without direct modify each row
/// is a statement there, so that only the transaction's limit can hold.
#[test]
fn the_limit_of_the_foreign_server_holds_too() {
    let mut bed = foreign(NEAR);
    let before = far(&mut bed);
    bed.limit("{far.t}", 5);
    limits::refuse(&mut bed.writer, "UPDATE t SET v = v + 1");
    assert_eq!(far(&mut bed), before);
    bed.policy("tables => '{far.t}', max_rows_per_transaction => 5");
    limits::refuse(&mut bed.writer, "DELETE FROM t WHERE random() >= 0");
    assert_eq!(far(&mut bed), before);
    bed.limit("{far.t}", 6);
    bed.passes("UPDATE t SET v = v + 1");
    assert_ne!(far(&mut bed), before);
}

const FOREIGN_PARTITIONS: &str = "
    CREATE TABLE far.a AS TABLE far.t;
    CREATE TABLE far.b AS SELECT id + 10 AS id, v FROM far.t;
    CREATE TABLE p (id int, v int) PARTITION BY RANGE (id);
    CREATE FOREIGN TABLE a PARTITION OF p FOR VALUES FROM (1) TO (10)
        SERVER far OPTIONS (schema_name 'far');
    CREATE FOREIGN TABLE b PARTITION OF p FOR VALUES FROM (10) TO (20)
        SERVER far OPTIONS (schema_name 'far');
    CREATE TABLE c PARTITION OF p FOR VALUES FROM (20) TO (30);
    INSERT INTO c SELECT i, 0 FROM generate_series(20, 23) AS i;";

#[test]
fn foreign_partitions_share_the_budget_of_their_root() {
    let mut bed = foreign(FOREIGN_PARTITIONS);
    bed.limit("{public.p}", 15);
    bed.refused("UPDATE p SET v = v + 1");
    assert_eq!(bed.number("SELECT sum(v) FROM far.a"), 0);
    assert_eq!(bed.number("SELECT sum(v) FROM far.b"), 0);
    bed.limit("{public.p}", 16);
    bed.passes("UPDATE p SET v = v + 1");
    assert_eq!(bed.number("SELECT sum(v) FROM p"), 16);
}

/// Each partition's rows are charged to itself, although the foreign server counts them.
#[test]
fn foreign_partitions_with_a_policy_on_one_of_them() {
    for table in ["a", "b", "c"] {
        for sql in ["UPDATE p SET v = v + 1", "DELETE FROM p"] {
            assert_foreign_partition(table, sql);
        }
    }
}

#[test]
fn foreign_partitions_with_a_policy_on_one_of_them_and_returning() {
    for table in ["a", "b", "c"] {
        assert_foreign_partition(table, "UPDATE p SET v = v + 1 RETURNING id");
        assert_foreign_partition(table, "WITH u AS (UPDATE p SET v = v + 1 RETURNING id) SELECT count(*) FROM u");
    }
}

#[test]
fn foreign_partitions_in_a_cte_that_returns_nothing() {
    for table in ["a", "b", "c", "p"] {
        assert_foreign_partition(table, "WITH u AS (UPDATE p SET v = v + 1) SELECT 1");
    }
}

#[track_caller]
fn assert_foreign_partition(table: &str, sql: &str) {
    let rows = match table {
        "p" => 16,
        "c" => 4,
        _ => 6,
    };
    let mut bed = foreign(FOREIGN_PARTITIONS);
    let tables = format!("{{public.{table}}}");
    bed.limit(&tables, rows - 1);
    let refusal = expect_refusal(bed.writer.batch_execute(sql));
    assert_eq!(refusal.sqlstate, "WG001", "{table}, {sql}: {refusal:?}");
    if table != "p" {
        assert_eq!(refusal.table, table, "{sql}");
    }
    assert_eq!(bed.number("SELECT sum(v) FROM p"), 0, "{table}, {sql}");
    assert_eq!(bed.number("SELECT count(*) FROM p"), 16, "{table}, {sql}");
    bed.limit(&tables, rows);
    bed.passes(sql);
}

/// Partitions that are pruned when the executor starts have no scan to count; they do not run either.
#[test]
fn foreign_partitions_that_a_prepared_write_prunes() {
    let mut bed = foreign(FOREIGN_PARTITIONS);
    bed.limit("{public.p}", 0);
    bed.passes("SET plan_cache_mode = force_generic_plan");
    bed.passes("PREPARE q (int) AS UPDATE p SET v = v + 1 WHERE id = $1");
    bed.passes("EXECUTE q(999)");
    let ids: Vec<i32> = bed
        .reader
        .query("SELECT min(id) FROM p GROUP BY tableoid", &[])
        .unwrap()
        .iter()
        .map(|row| row.get(0))
        .collect();
    assert_eq!(ids.len(), 3);
    for id in &ids {
        bed.refused(&format!("EXECUTE q({id})"));
    }
    bed.limit("{public.p}", 1);
    for id in &ids {
        bed.passes(&format!("EXECUTE q({id})"));
    }
    assert_eq!(bed.number("SELECT sum(v) FROM p"), 3);
}

/// A parent with two rows of its own, a local child with two and a foreign one with six.
const FOREIGN_CHILD: &str = "
    CREATE TABLE far.a AS TABLE far.t;
    CREATE TABLE far.twin AS TABLE far.t;
    CREATE TABLE p (id int, v int);
    CREATE TABLE c () INHERITS (p);
    CREATE FOREIGN TABLE a () INHERITS (p) SERVER far OPTIONS (schema_name 'far');
    CREATE FOREIGN TABLE twin (id int, v int) SERVER far OPTIONS (schema_name 'far');
    CREATE TABLE s AS SELECT i AS id, i AS v FROM generate_series(1, 40) AS i;
    CREATE VIEW w AS SELECT id, v FROM p WHERE v < 1000;
    INSERT INTO c VALUES (20, 0), (21, 0);
    INSERT INTO p VALUES (30, 0), (31, 0);";

/// Ways to change all ten rows; the foreign ones by one command of their own, one by one, or by a join there.
const TEN: [&str; 16] = [
    "UPDATE p SET v = v + 1",
    "UPDATE p SET v = 7",
    "UPDATE p SET v = v + 1, id = id RETURNING id, v, tableoid",
    "UPDATE p SET v = v + 1 WHERE id > 0 AND v < 100",
    "UPDATE p SET v = v + 1 + (random() * 0)::int",
    "UPDATE p SET v = s.v FROM s WHERE s.id = p.id",
    "UPDATE p SET v = (SELECT max(v) FROM s WHERE s.id = p.id)",
    "UPDATE p SET v = 1 WHERE id IN (SELECT id FROM s ORDER BY v LIMIT 40)",
    "UPDATE w SET v = v + 1",
    "WITH u AS (UPDATE p SET v = v + 1 RETURNING id) SELECT count(*) FROM u",
    "WITH u AS (UPDATE p SET v = v + 1) SELECT 1",
    "EXPLAIN ANALYZE UPDATE p SET v = v + 1",
    "DELETE FROM p",
    "DELETE FROM p RETURNING id",
    "DELETE FROM p USING s WHERE s.id = p.id",
    "WITH d AS (DELETE FROM p RETURNING id) SELECT id FROM d LIMIT 1",
];

#[test]
fn foreign_children_share_the_budget_of_their_parent() {
    let mut bed = foreign(FOREIGN_CHILD);
    for settings in ["RESET ALL", "SET enable_hashjoin = off; SET enable_mergejoin = off", "SET enable_nestloop = off"]
    {
        bed.passes(settings);
        for sql in TEN {
            for (tables, rows) in [("p", 10), ("a", 6), ("c", 2)] {
                bed.limit(&format!("{{public.{tables}}}"), rows - 1);
                let refusal = bed.refused(sql);
                assert!(tables == "p" || refusal.table == tables, "{sql}: {refusal:?}");
                assert_eq!(bed.number("SELECT sum(v) * 1000 + count(*) FROM far.a"), 6, "{sql}");
                bed.limit(&format!("{{public.{tables}}}"), rows);
                bed.passes(&format!("BEGIN; {sql}; ROLLBACK"));
            }
        }
    }
    bed.limit("{public.p}", 1);
    bed.refused("UPDATE ONLY p SET v = 1");
    bed.limit("{public.a, public.c}", 0);
    bed.passes("UPDATE ONLY p SET v = 1");
}

/// What a policy that only looks on records is the true number.
#[test]
fn foreign_children_and_partitions_under_a_policy_that_looks_on() {
    for setup in [FOREIGN_CHILD, FOREIGN_PARTITIONS] {
        let mut bed = foreign(setup);
        bed.policy("tables => '{public.p}', max_rows => 1, mode => 'observe'");
        let all = bed.number("SELECT count(*) FROM p");
        for sql in ["UPDATE p SET v = v + 1", "UPDATE p SET v = v + 1 RETURNING id", "DELETE FROM p"] {
            bed.passes(sql);
            let told = "SELECT max(rows) FROM writeguard.event WHERE kind = 'observed'";
            wait_until(20, || bed.number("SELECT count(*) FROM writeguard.event WHERE kind = 'observed'") > 0);
            assert_eq!(bed.number(told), all, "{sql}");
            bed.passes("DELETE FROM writeguard.event");
        }
    }
}

/// A partition that is partitioned itself, and one that is joined with its like on the foreign server.
#[test]
fn foreign_partitions_below_partitions_and_in_joins() {
    let setup = "
        CREATE TABLE far.a AS TABLE far.t;
        CREATE TABLE far.twin AS TABLE far.t;
        CREATE TABLE p (id int, v int) PARTITION BY RANGE (id);
        CREATE TABLE low PARTITION OF p FOR VALUES FROM (1) TO (20) PARTITION BY RANGE (id);
        CREATE FOREIGN TABLE a PARTITION OF low FOR VALUES FROM (1) TO (10) SERVER far OPTIONS (schema_name 'far');
        CREATE TABLE c PARTITION OF low FOR VALUES FROM (10) TO (20);
        CREATE TABLE high PARTITION OF p FOR VALUES FROM (20) TO (30);
        CREATE FOREIGN TABLE twin (id int, v int) SERVER far OPTIONS (schema_name 'far');
        CREATE TABLE s AS SELECT i AS id, i AS v FROM generate_series(1, 40) AS i;
        CREATE VIEW w AS SELECT id, v FROM p WHERE v < 1000;
        INSERT INTO c VALUES (10, 0), (11, 0);
        INSERT INTO high VALUES (20, 0), (21, 0);";
    let mut bed = foreign(setup);
    for sql in TEN {
        for (tables, rows) in [("p", 10), ("low", 8), ("a", 6), ("high", 2)] {
            bed.limit(&format!("{{public.{tables}}}"), rows - 1);
            bed.refused(sql);
            bed.limit(&format!("{{public.{tables}}}"), rows);
            bed.passes(&format!("BEGIN; {sql}; ROLLBACK"));
        }
    }
    for sql in [
        "UPDATE p SET v = x.v + 1 FROM twin AS x WHERE x.id = p.id",
        "DELETE FROM p USING twin AS x WHERE x.id = p.id",
        "UPDATE a SET v = x.v + 1 FROM twin AS x WHERE x.id = a.id",
        "UPDATE low SET v = x.v + 1 FROM twin AS x WHERE x.id = low.id RETURNING low.id",
    ] {
        bed.limit("{public.p}", 5);
        bed.refused(sql);
        bed.limit("{public.p}", 6);
        bed.passes(&format!("BEGIN; {sql}; ROLLBACK"));
    }
}

/// Its rows cannot be locked and counted from here.
#[test]
fn truncate_of_a_covered_foreign_table_is_refused_as_undecided() {
    let mut bed = foreign(NEAR);
    bed.limit("{public.t}", 100);
    let before = far(&mut bed);
    let refusal = expect_refusal(bed.writer.batch_execute("TRUNCATE t"));
    assert_eq!(refusal.sqlstate, "WG008", "{refusal:?}");
    assert!(refusal.hint.contains("DELETE FROM public.t"), "{refusal:?}");
    assert_eq!(far(&mut bed), before);
}

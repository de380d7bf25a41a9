//! Row changes are counted exactly: WITH branches that meet on the rows of one partitioned table, where one of them moves
//! rows that another one was given as well. PostgreSQL lets each row be changed once in a command; the branch that comes
//! second leaves it alone, and is not charged for it.

use crate::common::limits::Bed;

/// Three rows in one partition, and another partition to move them to.
const SPLIT: &str = "
    CREATE TABLE s (id int, b int, v int) PARTITION BY RANGE (b);
    CREATE TABLE s_low PARTITION OF s FOR VALUES FROM (MINVALUE) TO (10);
    CREATE TABLE s_high PARTITION OF s FOR VALUES FROM (10) TO (MAXVALUE);
    INSERT INTO s SELECT i, i, 0 FROM generate_series(1, 3) AS i;";

/// Ways to join, which decide in which order the branches run.
const PLANS: [&str; 4] = [
    "RESET ALL",
    "SET enable_hashjoin = off; SET enable_mergejoin = off",
    "SET enable_hashjoin = off; SET enable_nestloop = off",
    "SET enable_nestloop = off; SET enable_mergejoin = off",
];

/// Whatever the plan, as many rows count as PostgreSQL's own counters say that the tables have lost versions.
#[track_caller]
fn assert_counted(bed: &mut Bed, sql: &str) {
    const COUNTED: &str =
        "SELECT sum(pg_stat_get_xact_tuples_updated(oid) + pg_stat_get_xact_tuples_deleted(oid))::bigint
                           FROM pg_class WHERE relname LIKE 's\\_%'";
    for plan in PLANS {
        bed.policy("tables => '{public.no*}', max_rows => 0");
        bed.passes(&format!("{plan}; BEGIN"));
        // They still have what the session did before.
        let before: i64 = bed.writer.query_one(COUNTED, &[]).expect("the counters").get(0);
        bed.passes(sql);
        let rows = bed.writer.query_one(COUNTED, &[]).expect("the counters").get::<_, i64>(0) - before;
        bed.passes("ROLLBACK");
        assert!(rows > 0, "{plan}: {sql} changes nothing");
        bed.limit("{public.s}", rows.unsigned_abs() - 1);
        bed.refused(sql);
        bed.limit("{public.s}", rows.unsigned_abs());
        bed.passes(&format!("BEGIN; {sql}; ROLLBACK"));
    }
}

#[test]
fn rows_that_another_branch_moves_are_charged_to_that_one() {
    let mut bed = Bed::new(SPLIT);
    for second in [
        "w1 AS (UPDATE s AS x SET v = 1 FROM w0 WHERE x.id = w0.id RETURNING x.id)",
        "w1 AS (DELETE FROM s AS x USING w0 WHERE x.id = w0.id RETURNING x.id)",
        "w1 AS (UPDATE s AS x SET b = 19 - x.b FROM w0 WHERE x.id = w0.id RETURNING x.id)",
        "w1 AS (UPDATE s_low AS x SET v = 1 FROM w0 WHERE x.id = w0.id RETURNING x.id)",
        "w1 AS (UPDATE s AS x SET v = 1 WHERE NOT EXISTS (SELECT FROM w0 WHERE w0.id = x.id + 1) RETURNING x.id)",
    ] {
        let first = "w0 AS (UPDATE s SET b = 19 - b RETURNING id)";
        assert_counted(&mut bed, &format!("WITH {first}, {second} SELECT count(*) FROM w1"));
        let first = "w0 AS (UPDATE s SET b = 19 - b WHERE id <> 2 RETURNING id)";
        assert_counted(&mut bed, &format!("WITH {first}, {second} SELECT count(*) FROM w1"));
    }
}

#[test]
fn rows_that_three_branches_are_given() {
    let mut bed = Bed::new(SPLIT);
    let first = "w0 AS (UPDATE s SET b = 19 - b RETURNING id)";
    let second = "w1 AS (UPDATE s AS x SET v = 1 FROM w0 WHERE x.id <= w0.id RETURNING x.id)";
    let third =
        "w2 AS (UPDATE s AS x SET b = x.b + 20 FROM w1 RIGHT JOIN w0 USING (id) WHERE x.id = w0.id RETURNING x.id)";
    assert_counted(&mut bed, &format!("WITH {first}, {second}, {third} SELECT count(*) FROM w2"));
    assert_counted(&mut bed, &format!("WITH {first}, {second}, {third} UPDATE s SET v = 2 FROM w2 WHERE w2.id = s.id"));
}

#[test]
fn the_statement_itself_and_a_branch() {
    let mut bed = Bed::new(SPLIT);
    let first = "w0 AS (UPDATE s SET b = 19 - b RETURNING id)";
    assert_counted(&mut bed, &format!("WITH {first} UPDATE s AS x SET v = 1 FROM w0 WHERE x.id = w0.id"));
    assert_counted(&mut bed, &format!("WITH {first} UPDATE s AS x SET b = 19 - x.b FROM w0 WHERE x.id = w0.id + 1"));
    assert_counted(&mut bed, &format!("WITH {first} DELETE FROM s AS x USING w0 WHERE x.id = w0.id"));
}

#[test]
fn through_a_view_on_the_same_table() {
    let setup = format!("{SPLIT} CREATE VIEW w AS SELECT * FROM s WHERE v = 0;");
    let first = "w0 AS (UPDATE w SET b = 19 - b RETURNING id)";
    assert_counted(
        &mut Bed::new(&setup),
        &format!("WITH {first}, w1 AS (UPDATE w AS x SET v = 1 FROM w0 WHERE x.id = w0.id RETURNING x.id) TABLE w1"),
    );
}

/// A partition's trigger lets nothing in: what is moved there is gone, and is charged to who moved it.
#[test]
fn rows_that_a_branch_moves_nowhere() {
    let setup = format!(
        "{SPLIT} CREATE FUNCTION nothing() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';
         CREATE TRIGGER nothing BEFORE INSERT ON s_high FOR EACH ROW EXECUTE FUNCTION nothing();"
    );
    let mut bed = Bed::new(&setup);
    for second in [
        "w1 AS (UPDATE s AS x SET v = 1 FROM w0 WHERE x.id = w0.id RETURNING x.id)",
        "w1 AS (UPDATE s AS x SET b = 19 - x.b FROM w0 WHERE x.id = w0.id RETURNING x.id)",
    ] {
        // It returns nothing of what goes nowhere, so the join is with what stays.
        let first = "w0 AS (UPDATE s SET b = CASE WHEN id = 2 THEN 12 ELSE b END RETURNING id + 1 AS id)";
        assert_counted(&mut bed, &format!("WITH {first}, {second} SELECT count(*) FROM w1"));
    }
    assert_counted(&mut bed, "UPDATE s SET b = 19 - b");
}

/// A BEFORE trigger moves its own row, or another one of the same partition, and keeps the command from changing it.
#[test]
fn rows_that_a_before_trigger_moves_itself() {
    for moved in ["id = OLD.id", "id = OLD.id - 1"] {
        let setup = format!(
            "{SPLIT} CREATE FUNCTION moves() RETURNS trigger LANGUAGE plpgsql AS $$
             BEGIN
                 IF pg_trigger_depth() > 1 THEN RETURN NEW; END IF;
                 UPDATE s SET b = b + 10 WHERE {moved};
                 RETURN NULL;
             END $$;
             CREATE TRIGGER moves BEFORE UPDATE ON s_low FOR EACH ROW EXECUTE FUNCTION moves();"
        );
        let mut bed = Bed::new(&setup);
        assert_counted(&mut bed, "UPDATE s SET v = 1");
        assert_counted(&mut bed, "UPDATE s SET b = 19 - b");
        assert_counted(
            &mut bed,
            "WITH w0 AS (UPDATE s SET v = 1 WHERE id = 3 RETURNING id) UPDATE s SET v = 2 WHERE id < 3",
        );
    }
}

/// The row is locked by the transaction around a savepoint, so that more than one transaction stands on its version.
#[test]
fn rows_moved_nowhere_that_were_locked_before() {
    let setup = format!(
        "{SPLIT} CREATE FUNCTION nothing() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';
         CREATE TRIGGER nothing BEFORE INSERT ON s_high FOR EACH ROW EXECUTE FUNCTION nothing();"
    );
    let mut bed = Bed::new(&setup);
    let sql = "BEGIN; SELECT FROM s FOR KEY SHARE; SAVEPOINT a; UPDATE s SET b = 19 - b; COMMIT";
    bed.limit("{public.s}", 2);
    bed.refused(sql);
    bed.limit("{public.s}", 3);
    bed.passes(sql);
    assert_eq!(bed.number("SELECT count(*) FROM s"), 0);
}

#[test]
fn a_merge_beside_a_branch_that_moves_its_rows() {
    let mut bed = Bed::new(SPLIT);
    let first = "w0 AS (UPDATE s SET b = 19 - b WHERE id < 3 RETURNING id)";
    for action in ["UPDATE SET v = 1", "UPDATE SET b = 19 - x.b", "DELETE"] {
        for condition in ["", " AND (SELECT count(*) FROM w0) > 0", " AND x.id > (SELECT min(id) FROM w0)"] {
            let merge = format!("MERGE INTO s AS x USING w0 ON x.id = w0.id + 2 WHEN MATCHED{condition} THEN {action}");
            assert_counted(&mut bed, &format!("WITH {first} {merge}"));
        }
    }
}

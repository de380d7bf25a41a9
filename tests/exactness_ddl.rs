//! The operation `drop`: DDL that makes rows vanish, rewrites them or takes them out of a policy's names is refused with
//! WG005 past the limit, exactly; without the operation it leaves an event.

use crate::common::limits::{Bed, SIX, contents, pass};
use crate::common::{Refusal, Server, expect_refusal, wait_until};
use postgres::Client;

const PARTITIONED: &str = "
    CREATE TABLE t (id int, v int) PARTITION BY RANGE (id);
    CREATE TABLE t1 PARTITION OF t FOR VALUES FROM (1) TO (4);
    CREATE TABLE t2 PARTITION OF t FOR VALUES FROM (4) TO (100) PARTITION BY RANGE (id);
    CREATE TABLE t21 PARTITION OF t2 FOR VALUES FROM (4) TO (50);
    INSERT INTO t SELECT i, 0 FROM generate_series(1, 6) AS i;";

const INHERITED: &str = "
    CREATE TABLE t (id int, v int);
    CREATE TABLE t1 (w int) INHERITS (t);
    INSERT INTO t VALUES (1, 0), (2, 0);
    INSERT INTO t1 SELECT i, 0, 0 FROM generate_series(3, 6) AS i;";

const SCHEMA: &str = "
    CREATE SCHEMA s;
    CREATE TABLE s.t (id int);
    CREATE TABLE s.u (id int);
    INSERT INTO s.t SELECT generate_series(1, 4);
    INSERT INTO s.u SELECT generate_series(1, 2);";

/// Every relation and column outside the system's schemas, with its place in the inheritance tree.
fn definitions(client: &mut Client) -> Vec<String> {
    client
        .query(
            "SELECT concat_ws(' ', c.oid, n.nspname, c.relname, c.relfilenode, a.attname, a.atttypid, a.attisdropped,
                              (SELECT string_agg(i::text, ',') FROM pg_inherits i WHERE i.inhrelid = c.oid))
             FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace JOIN pg_attribute a ON a.attrelid = c.oid
             WHERE n.nspname !~ '^(pg_|information_schema|writeguard)' AND c.relkind IN ('r', 'p') ORDER BY c.oid, a.attnum",
            &[],
        )
        .expect("cannot read the catalog")
        .iter()
        .map(|row| row.get(0))
        .collect()
}

/// Lets a statement drop, or whatever counts as that, so many rows of these tables, and delete or update any number.
fn limit(bed: &mut Bed, tables: &str, rows: u64) {
    bed.policy(&format!("tables => '{tables}', operations => '{{drop}}', max_rows => {rows}"));
}

/// The statement fails with WG005 and leaves everything as it was.
#[track_caller]
fn refused(bed: &mut Bed, sql: &str) -> Refusal {
    let before = (definitions(&mut bed.reader), contents(&mut bed.reader));
    let refusal = expect_refusal(bed.writer.batch_execute(sql));
    let _ = bed.writer.batch_execute("ROLLBACK");
    assert_eq!(refusal.sqlstate, "WG005", "{sql}: {refusal:?}");
    let after = (definitions(&mut bed.reader), contents(&mut bed.reader));
    assert_eq!(after, before, "{sql}: refused, but not undone");
    refusal
}

/// Refused where the limit on `tables` is one row less, and passes where it is `rows`.
#[track_caller]
fn assert_drop(tables: &str, setup: &str, sql: &str, rows: u64) -> Refusal {
    let mut bed = Bed::new(setup);
    limit(&mut bed, tables, rows - 1);
    let refusal = refused(&mut bed, sql);
    limit(&mut bed, tables, rows);
    let before = definitions(&mut bed.reader);
    bed.passes(sql);
    assert_ne!(definitions(&mut bed.reader), before, "{sql}: passed, but changed nothing");
    refusal
}

/// Passes although not one row of these tables may be dropped.
#[track_caller]
fn assert_free(tables: &str, setup: &str, sql: &str) {
    let mut bed = Bed::new(setup);
    limit(&mut bed, tables, 0);
    bed.passes(sql);
}

#[test]
fn a_dropped_table_counts_its_live_rows() {
    let refusal = assert_drop("{public.t}", SIX, "DROP TABLE t", 6);
    assert_eq!((refusal.schema.as_str(), refusal.table.as_str()), ("public", "t"));
    assert_eq!(refusal.said(), "drop of table \"public.t\" exceeds the limit of 5 rows per statement");
    assert!(refusal.detail.contains("allows 5 rows per statement, and this is number 6"), "{refusal:?}");
    assert!(refusal.hint.contains("writeguard.request('TRUNCATE public.t'"), "{refusal:?}");
    assert_drop("{public.*}", &format!("{SIX} CREATE TABLE u AS TABLE t;"), "DROP TABLE t, u", 12);
    assert_drop("{public.t}", SIX, "DELETE FROM t WHERE id > 4; DROP TABLE t", 4);
    assert_free("{public.t}", &format!("{SIX} DELETE FROM t;"), "DROP TABLE t");
}

#[test]
fn rows_of_the_own_transaction_count_and_deleted_ones_do_not() {
    let mut bed = Bed::new(SIX);
    limit(&mut bed, "{public.t}", 6);
    refused(&mut bed, "BEGIN; INSERT INTO t VALUES (7, 0); DROP TABLE t");
    bed.passes("BEGIN; INSERT INTO t VALUES (7, 0); DELETE FROM t WHERE id < 3; DROP TABLE t; COMMIT");
}

#[test]
fn cascades_and_partitions_share_one_budget() {
    assert_drop("{public.t}", PARTITIONED, "DROP TABLE t", 6);
    assert_drop("{public.t}", PARTITIONED, "DROP TABLE t2", 3);
    assert_drop("{public.t}", PARTITIONED, "DROP TABLE t21", 3);
    assert_drop("{public.t}", INHERITED, "DROP TABLE t CASCADE", 6);
    assert_drop("{public.t}", INHERITED, "DROP TABLE t1", 4);
}

#[test]
fn a_schema_and_all_that_a_role_owns() {
    assert_drop("{s.*}", SCHEMA, "DROP SCHEMA s CASCADE", 6);
    assert_drop("{s.t}", SCHEMA, "DROP SCHEMA s CASCADE", 4);
    let mut bed = Bed::new(SCHEMA);
    let role = bed.db().role("owner");
    bed.passes(&format!("ALTER TABLE s.t OWNER TO {role}"));
    limit(&mut bed, "{s.*}", 3);
    refused(&mut bed, &format!("DROP OWNED BY {role}"));
    limit(&mut bed, "{s.*}", 4);
    bed.passes(&format!("DROP OWNED BY {role}"));
    assert_eq!(bed.number("SELECT count(*) FROM pg_class WHERE oid = to_regclass('s.t')"), 0);
}

#[test]
fn a_dropped_column_changes_every_row() {
    let refusal = assert_drop("{public.t}", SIX, "ALTER TABLE t DROP COLUMN v", 6);
    assert!(refusal.detail.contains("Without a column every row is another."), "{refusal:?}");
    assert_drop("{public.t}", PARTITIONED, "ALTER TABLE t DROP COLUMN v", 6);
    assert_drop("{public.t}", INHERITED, "ALTER TABLE t DROP COLUMN v", 6);
    let two = format!("{SIX} ALTER TABLE t ADD COLUMN w int;");
    assert_drop("{public.t}", &two, "ALTER TABLE t DROP COLUMN v, DROP COLUMN w", 6);
    let by_type = "CREATE TYPE mood AS ENUM ('sad'); CREATE TABLE t (id int, m mood);
        INSERT INTO t SELECT i, 'sad' FROM generate_series(1, 6) AS i;";
    assert_drop("{public.t}", by_type, "DROP TYPE mood CASCADE", 6);
}

#[test]
fn a_new_expression_that_rewrites_the_rows() {
    let setup = "CREATE TABLE t (id int, v int GENERATED ALWAYS AS (id) STORED);
        INSERT INTO t SELECT generate_series(1, 6);";
    let alter = "ALTER TABLE t ALTER COLUMN v SET EXPRESSION AS (id + 1)";
    let mut bed = Bed::new(setup);
    if bed.number("SELECT current_setting('server_version_num')::int") >= 170_000 {
        assert_drop("{public.t}", setup, alter, 6);
    } else {
        // There is no such command yet.
        assert_eq!(expect_refusal(bed.writer.batch_execute(alter)).sqlstate, "42601");
    }
}

#[test]
fn a_new_type_that_rewrites_the_rows() {
    let refusal = assert_drop("{public.t}", SIX, "ALTER TABLE t ALTER COLUMN v TYPE text USING 'gone'", 6);
    assert!(refusal.detail.contains("rewrites every row"), "{refusal:?}");
    assert_drop("{public.t}", SIX, "ALTER TABLE t ALTER COLUMN v TYPE bigint", 6);
    assert_drop("{public.t}", PARTITIONED, "ALTER TABLE t ALTER COLUMN v TYPE text USING 'gone'", 6);
    assert_drop("{public.t}", INHERITED, "ALTER TABLE t ALTER COLUMN v TYPE text USING 'gone'", 6);
}

#[test]
fn ddl_that_leaves_every_row_as_it_is_is_free() {
    let text = "CREATE TABLE t (id int, v varchar(5)); INSERT INTO t SELECT i, 'x' FROM generate_series(1, 6) AS i;";
    for sql in [
        "ALTER TABLE t ALTER COLUMN v TYPE varchar(50)",
        "ALTER TABLE t ALTER COLUMN v TYPE text USING v",
        "ALTER TABLE t ADD COLUMN w float8 DEFAULT random()",
        "ALTER TABLE t SET UNLOGGED",
        "ALTER TABLE t RENAME COLUMN v TO w",
        "ALTER TABLE t ALTER COLUMN v SET DEFAULT 'y', ALTER COLUMN v SET STATISTICS 5",
        "CREATE INDEX i ON t (v); CLUSTER t USING i; DROP INDEX i",
        "ALTER TABLE t ADD CONSTRAINT c CHECK (id > 0); ALTER TABLE t DROP CONSTRAINT c",
        "VACUUM FULL t",
        "CREATE VIEW x AS TABLE t; ALTER VIEW x RENAME TO y; DROP VIEW y",
        "CREATE MATERIALIZED VIEW m AS TABLE t; REFRESH MATERIALIZED VIEW m; DROP MATERIALIZED VIEW m",
        "CREATE TEMP TABLE x AS TABLE t; ALTER TABLE x RENAME TO y; ALTER TABLE y DROP COLUMN v; DROP TABLE y",
        "CREATE TEMP TABLE t AS TABLE public.t; DROP TABLE t",
        "CREATE TABLE empty (); DROP TABLE empty",
    ] {
        assert_free("{*.*}", text, sql);
    }
}

#[test]
fn a_table_that_is_renamed_out_of_the_names() {
    let refusal = assert_drop("{public.t}", SIX, "ALTER TABLE t RENAME TO u", 6);
    assert_eq!((refusal.schema.as_str(), refusal.table.as_str()), ("public", "t"));
    assert!(refusal.detail.contains("Out of the policy's names"), "{refusal:?}");
    assert_drop("{public.t*}", SIX, "ALTER TABLE t RENAME TO u", 6);
    assert_free("{public.t, public.u*}", SIX, "ALTER TABLE t RENAME TO u");
    assert_free("{public.*}", SIX, "ALTER TABLE t RENAME TO u");
    assert_drop("{public.t}", PARTITIONED, "ALTER TABLE t RENAME TO u", 6);
    assert_free("{public.t}", PARTITIONED, "ALTER TABLE t1 RENAME TO u");
    let swap = format!("{SIX} CREATE TABLE fresh (id int);");
    assert_drop("{public.t}", &swap, "BEGIN; ALTER TABLE t RENAME TO old; ALTER TABLE fresh RENAME TO t; COMMIT", 6);
}

#[test]
fn a_table_that_moves_to_another_schema() {
    let setup = format!("{SIX} CREATE SCHEMA other;");
    assert_drop("{public.*}", &setup, "ALTER TABLE t SET SCHEMA other", 6);
    assert_drop("{public.t}", &setup, "ALTER TABLE t SET SCHEMA other", 6);
    assert_free("{*.t}", &setup, "ALTER TABLE t SET SCHEMA other");
    assert_drop("{*.*}", &setup, "ALTER TABLE t SET SCHEMA writeguard", 6);
    assert_drop("{s.*}", SCHEMA, "ALTER SCHEMA s RENAME TO s2", 6);
    assert_drop("{s.u}", SCHEMA, "ALTER SCHEMA s RENAME TO s2", 2);
    assert_free("{s*.*}", SCHEMA, "ALTER SCHEMA s RENAME TO s2");
    let below = format!("{SCHEMA} CREATE TABLE public.below () INHERITS (s.t); INSERT INTO below VALUES (5);");
    assert_drop("{s.t}", &below, "ALTER SCHEMA s RENAME TO s2", 5);
}

#[test]
fn a_partition_that_is_detached_and_a_child_that_is_disinherited() {
    let refusal = assert_drop("{public.t}", PARTITIONED, "ALTER TABLE t DETACH PARTITION t1", 3);
    assert_eq!(refusal.table, "t1");
    assert_drop("{public.t}", PARTITIONED, "ALTER TABLE t DETACH PARTITION t2", 3);
    assert_free("{public.t*}", PARTITIONED, "ALTER TABLE t DETACH PARTITION t2");
    assert_drop("{public.t}", INHERITED, "ALTER TABLE t1 NO INHERIT t", 4);
    assert_free("{public.t, public.t1}", INHERITED, "ALTER TABLE t1 NO INHERIT t");
}

#[test]
fn a_partition_detached_concurrently_is_refused_before_anything_is_committed() {
    let refusal = assert_drop("{public.t}", PARTITIONED, "ALTER TABLE t DETACH PARTITION t1 CONCURRENTLY", 3);
    assert_eq!(refusal.table, "t1");
    assert_drop("{public.t}", PARTITIONED, "ALTER TABLE t DETACH PARTITION t2 CONCURRENTLY", 3);
    assert_free("{public.t*}", PARTITIONED, "ALTER TABLE t DETACH PARTITION t2 CONCURRENTLY");
}

#[test]
fn functions_blocks_and_statements_share_the_budget() {
    let setup = format!("{SIX} CREATE TABLE u AS TABLE t;");
    assert_drop("{public.*}", &setup, "DO $$ BEGIN DROP TABLE t; DROP TABLE u; END $$", 12);
    let mut bed = Bed::new(&setup);
    bed.policy("tables => '{public.*}', operations => '{delete,drop}', max_rows => 11");
    let refusal = expect_refusal(bed.writer.batch_execute("DO $$ BEGIN DELETE FROM t; DROP TABLE u; END $$"));
    assert_eq!((refusal.sqlstate.as_str(), refusal.table.as_str()), ("WG005", "u"));
    bed.policy("tables => '{public.*}', operations => '{delete,drop}', max_rows => 12");
    bed.passes("DO $$ BEGIN DELETE FROM t; DROP TABLE u; END $$");
}

#[test]
fn an_exception_block_inside_the_command_hides_nothing() {
    let setup = "CREATE TABLE t (id int, v int); CREATE TABLE t1 () INHERITS (t);
        INSERT INTO t1 SELECT i, 0 FROM generate_series(1, 6) AS i;
        CREATE FUNCTION f(int) RETURNS bigint LANGUAGE plpgsql AS $$
        BEGIN
            BEGIN PERFORM 1 / 0; EXCEPTION WHEN division_by_zero THEN END;
            RETURN $1;
        END $$;";
    let mut bed = Bed::new(setup);
    limit(&mut bed, "{public.t}", 5);
    // The default's block is rolled back after the link was noted.
    refused(&mut bed, "ALTER TABLE t1 NO INHERIT t, ADD COLUMN w bigint DEFAULT f(1)");
    limit(&mut bed, "{public.t}", 6);
    bed.passes("ALTER TABLE t1 NO INHERIT t, ADD COLUMN w bigint DEFAULT f(1)");
}

#[test]
fn the_flag_lifts_where_the_policy_says_so() {
    let mut bed = Bed::new(SIX);
    bed.policy("tables => '{public.t}', operations => '{drop}', max_rows => 0, override => 'flag'");
    let refusal = refused(&mut bed, "DROP TABLE t");
    assert_eq!(refusal.hint, "SET writeguard.override = on;");
    bed.passes("SET writeguard.override = on; DROP TABLE t");
    let mut admin = bed.db().admin();
    let row = admin
        .query_one("SELECT relation, rows FROM writeguard.event WHERE kind = 'overridden' AND operation = 'drop'", &[])
        .expect("the event");
    assert_eq!((row.get::<_, &str>(0), row.get::<_, i64>(1)), ("public.t", 1));
}

#[test]
fn what_is_refused_is_an_event() {
    let mut bed = Bed::new(SIX);
    limit(&mut bed, "{public.t}", 5);
    refused(&mut bed, "DROP TABLE t");
    let row = bed
        .reader
        .query_one("SELECT operation, relation, row_limit, rows FROM writeguard.event WHERE kind = 'blocked'", &[])
        .expect("one event");
    let event: (&str, &str, i64, i64) = (row.get(0), row.get(1), row.get(2), row.get(3));
    assert_eq!(event, ("drop", "public.t", 5, 6));
}

fn uncovered(client: &mut Client) -> Vec<(String, String, String)> {
    client
        .query(
            "SELECT policy, relation, statement FROM writeguard.event WHERE kind = 'uncovered' AND operation = 'drop'
             ORDER BY id",
            &[],
        )
        .expect("the events")
        .iter()
        .map(|row| (row.get(0), row.get(1), row.get(2)))
        .collect()
}

#[test]
fn without_the_operation_it_is_an_event_once_it_commits() {
    for (setup, sql, relation) in [
        (SIX, "DROP TABLE t", "public.t"),
        (SIX, "ALTER TABLE t DROP COLUMN v", "public.t"),
        (SIX, "ALTER TABLE t ALTER COLUMN v TYPE text USING 'gone'", "public.t"),
        (SIX, "ALTER TABLE t RENAME TO u", "public.t"),
        (PARTITIONED, "ALTER TABLE t DETACH PARTITION t1", "public.t1"),
        (PARTITIONED, "ALTER TABLE t DETACH PARTITION t1 CONCURRENTLY", "public.t1"),
    ] {
        let mut bed = Bed::new(setup);
        bed.limit("{public.t}", 0);
        if !sql.contains("CONCURRENTLY") {
            bed.passes(&format!("BEGIN; {sql}; ROLLBACK"));
            bed.passes(&format!("BEGIN; SAVEPOINT s; {sql}; ROLLBACK TO s; COMMIT"));
        }
        bed.passes(sql);
        wait_until(20, || !uncovered(&mut bed.reader).is_empty());
        // Whatever was queued before is stored before this.
        expect_refusal(bed.writer.batch_execute("CREATE TABLE t (); TRUNCATE t; SELECT 1 / 0"));
        assert_eq!(uncovered(&mut bed.reader), [("p".into(), relation.into(), sql.into())], "{sql}");
    }
}

/// The policy on all tables still names the table, but one that names it more closely now allows more.
#[test]
fn a_table_that_comes_under_a_looser_policy_is_an_event() {
    let tables = "
        CREATE TABLE t (id int, v int);
        INSERT INTO t SELECT i, 0 FROM generate_series(1, 6) AS i;
        CREATE TABLE fresh (id int, v int);
        CREATE TABLE child () INHERITS (t);
        CREATE TABLE loose (id int, v int);
        CREATE TABLE loose_parts (id int, v int) PARTITION BY RANGE (id);
        CREATE SCHEMA loose_schema;";
    for (sql, relations) in [
        ("ALTER TABLE fresh INHERIT loose", vec!["public.fresh"]),
        ("ALTER TABLE loose_parts ATTACH PARTITION fresh FOR VALUES FROM (1) TO (9)", vec!["public.fresh"]),
        ("ALTER TABLE t INHERIT loose", vec!["public.t", "public.child"]),
        ("DROP TABLE loose; ALTER TABLE fresh RENAME TO loose", vec!["public.fresh"]),
        ("ALTER TABLE fresh SET SCHEMA loose_schema", vec!["public.fresh"]),
        ("DO $$ BEGIN ALTER TABLE fresh INHERIT loose; END $$", vec!["public.fresh"]),
    ] {
        let mut bed = Bed::new(tables);
        bed.limit("{*.*}", 5);
        pass(
            &mut bed.reader,
            "SELECT writeguard.set_policy('loose', tables => '{public.loose, public.loose_parts, loose_schema.*}',
                                          max_rows => 1000)",
        );
        bed.passes(&format!("BEGIN; {sql}; ROLLBACK"));
        bed.passes(sql);
        wait_until(20, || {
            let told = uncovered(&mut bed.reader);
            relations.iter().all(|wanted| told.iter().any(|(_, relation, _)| relation == wanted))
        });
        let told: Vec<String> = uncovered(&mut bed.reader)
            .into_iter()
            .filter(|(policy, relation, _)| policy == "p" && relation != "public.loose")
            .map(|(_, relation, _)| relation)
            .collect();
        assert_eq!(told, relations, "{sql}");
    }
}

/// Stricter, or as strict as before, or under a policy that sets nothing aside.
#[test]
fn a_table_that_comes_under_no_looser_policy_is_no_event() {
    let mut bed =
        Bed::new("CREATE TABLE t (id int, v int); CREATE TABLE u (id int, v int); CREATE TABLE w (id int, v int)");
    bed.limit("{*.*}", 5);
    pass(&mut bed.reader, "SELECT writeguard.set_policy('strict', tables => '{public.u}', max_rows => 1)");
    pass(&mut bed.reader, "SELECT writeguard.set_policy('as_strict', tables => '{public.w}', max_rows => 5)");
    bed.passes("ALTER TABLE t INHERIT u; ALTER TABLE t NO INHERIT u; ALTER TABLE t INHERIT w");
    bed.passes("CREATE TABLE child () INHERITS (w); ALTER TABLE t RENAME TO x");
    expect_refusal(bed.writer.batch_execute("INSERT INTO u SELECT i FROM generate_series(1, 9) AS i; DELETE FROM u"));
    let told = uncovered(&mut bed.reader);
    // It was under the stricter policy before it left that.
    assert_eq!(told.len(), 1, "{told:?}");
    assert_eq!((told[0].0.as_str(), told[0].1.as_str()), ("strict", "public.t"));
}

#[test]
fn what_the_policy_goes_on_naming_is_no_event() {
    let mut bed = Bed::new(SIX);
    bed.limit("{public.*}", 5);
    bed.passes("ALTER TABLE t RENAME TO u; ALTER TABLE u ADD COLUMN w int; ALTER TABLE u SET (fillfactor = 50)");
    let refusal = expect_refusal(bed.writer.batch_execute("DELETE FROM u"));
    assert_eq!(refusal.sqlstate, "WG001");
    assert_eq!(bed.number("SELECT count(*) FROM writeguard.event WHERE kind = 'blocked'"), 1);
    assert_eq!(uncovered(&mut bed.reader), []);
}

#[test]
fn other_peoples_refusals_stay_theirs() {
    let mut bed = Bed::new(&format!("{PARTITIONED} CREATE TABLE alone (id int);"));
    let stranger = bed.db().role("stranger");
    limit(&mut bed, "{public.*}", 0);
    let mut client = bed.db().connect(&stranger);
    for (sql, sqlstate) in [
        ("DROP TABLE t", "42501"),
        ("ALTER TABLE t DETACH PARTITION t1 CONCURRENTLY", "42501"),
        ("ALTER TABLE t RENAME TO u", "42501"),
        ("DROP TABLE nowhere", "42P01"),
    ] {
        assert_eq!(expect_refusal(client.batch_execute(sql)).sqlstate, sqlstate, "{sql}");
    }
    for (sql, sqlstate) in [
        ("ALTER TABLE t DETACH PARTITION alone CONCURRENTLY", "42P01"),
        ("ALTER TABLE t DETACH PARTITION nowhere CONCURRENTLY", "42P01"),
        ("ALTER TABLE nowhere DETACH PARTITION t1 CONCURRENTLY", "42P01"),
    ] {
        assert_eq!(expect_refusal(bed.writer.batch_execute(sql)).sqlstate, sqlstate, "{sql}");
    }
}

#[test]
fn the_extension_goes_with_all_that_its_owner_has() {
    let db = Server::shared().plain_database();
    let boss = db.role("boss");
    pass(&mut db.admin(), &format!("ALTER ROLE {boss} SUPERUSER"));
    let mut client = db.connect(&boss);
    pass(&mut client, "CREATE EXTENSION pg_writeguard; CREATE TABLE public.t AS SELECT generate_series(1, 6) AS id");
    pass(&mut client, "SELECT writeguard.set_policy('p', operations => '{drop}', max_rows => 6)");
    pass(&mut db.connect(&boss), &format!("DROP OWNED BY {boss}"));
    let row = db.admin().query_one("SELECT to_regclass('public.t') IS NULL", &[]).expect("an answer");
    assert!(row.get::<_, bool>(0));
}

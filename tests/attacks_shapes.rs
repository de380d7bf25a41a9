//! Limits hold whatever shape a write has: rules on views on partitions, tables that change their name, parent or
//! partitions within the transaction, rows that vanish on their way, and writes that other writes set off.

use crate::common::limits::{Bed, number, pass, refuse};
use crate::common::{Server, expect_refusal};

/// Twelve rows with the value 0.
const TWELVE: &str = "
    CREATE TABLE t (id int PRIMARY KEY, v int NOT NULL DEFAULT 0);
    INSERT INTO t SELECT i, 0 FROM generate_series(1, 12) AS i;";

/// Rows 1 to 6 and 7 to 12 in two partitions; a third one is empty.
const PARTED: &str = "
    CREATE TABLE t (id int NOT NULL, v int NOT NULL DEFAULT 0) PARTITION BY RANGE (id);
    CREATE TABLE t_1 PARTITION OF t FOR VALUES FROM (1) TO (7);
    CREATE TABLE t_2 PARTITION OF t FOR VALUES FROM (7) TO (13);
    CREATE TABLE t_3 PARTITION OF t FOR VALUES FROM (100) TO (200);
    INSERT INTO t SELECT i, 0 FROM generate_series(1, 12) AS i;";

/// A bed whose writer is an ordinary role that owns all tables.
fn owned(setup: &str) -> Bed {
    let mut bed = Bed::new("");
    let owner = bed.db().role("owner");
    let name = bed.db().name.clone();
    pass(
        &mut bed.reader,
        &format!("GRANT CREATE ON SCHEMA public TO {owner}; GRANT CREATE ON DATABASE {name} TO {owner}"),
    );
    bed.writer = bed.db().connect(&owner);
    bed.passes(setup);
    bed
}

/// Each needs a limit of exactly so many rows of these tables.
#[track_caller]
fn each_exactly(bed: &mut Bed, tables: &str, ways: &[(&str, u64)]) {
    for (sql, rows) in ways {
        bed.exactly(tables, sql, *rows);
    }
}

/// Refused and taken back where the limit is one row less; with the limit itself the second session sees another
/// number. For tables outside schema public, and for commands that cannot be repeated.
#[track_caller]
fn exactly_seen(bed: &mut Bed, tables: &str, sql: &str, rows: u64, seen: &str) {
    let before = bed.number(seen);
    bed.limit(tables, rows - 1);
    refuse(&mut bed.writer, sql);
    bed.passes("ROLLBACK");
    assert_eq!(bed.number(seen), before, "{sql}: refused, but not undone");
    bed.limit(tables, rows);
    bed.passes(sql);
    assert_ne!(bed.number(seen), before, "{sql}: passed, but changed nothing");
}

// Rules and views

#[test]
fn rules_on_views_on_partitions_count_what_they_lead_to() {
    let mut bed = owned(&format!(
        "{PARTED}
         CREATE TABLE log AS SELECT * FROM t;
         CREATE VIEW inner_view AS SELECT id AS i, v AS w FROM t WHERE id > 2;
         CREATE VIEW outer_view WITH (security_barrier) AS SELECT w, i FROM inner_view WHERE i <= 10;
         CREATE VIEW grouped AS SELECT max(v) AS v, id % 3 AS k FROM t GROUP BY id % 3;
         CREATE RULE spread AS ON UPDATE TO grouped DO INSTEAD UPDATE outer_view SET w = NEW.v WHERE i % 3 = OLD.k;
         CREATE RULE noted AS ON UPDATE TO log DO ALSO UPDATE inner_view SET w = w + 1 WHERE i = OLD.id;
         CREATE RULE refilled AS ON INSERT TO grouped DO INSTEAD
             (UPDATE outer_view SET w = w + 1 WHERE i % 3 = NEW.k; UPDATE t SET v = v + 1 WHERE id % 3 = NEW.k)"
    ));
    each_exactly(
        &mut bed,
        "{public.t}",
        &[
            ("UPDATE grouped SET v = v + 1", 8),
            ("UPDATE log SET v = 2 WHERE id < 12", 9),
            ("INSERT INTO grouped (k) VALUES (0)", 7),
            ("WITH x AS (UPDATE outer_view SET w = w + 1 RETURNING i) SELECT count(*) FROM x", 8),
            ("UPDATE outer_view SET w = w + 1 WHERE i IN (SELECT k + 2 FROM grouped)", 2),
        ],
    );
    each_exactly(&mut bed, "{public.t, public.log}", &[("UPDATE log SET v = v + 1", 22)]);
    each_exactly(&mut bed, "{public.t_2}", &[("UPDATE grouped SET v = v + 1", 4), ("UPDATE log SET v = 5", 6)]);
}

#[test]
fn instead_of_triggers_on_views_of_views_count_what_they_write() {
    let mut bed = owned(&format!(
        "{PARTED}
         CREATE VIEW low AS SELECT DISTINCT id, v FROM t;
         CREATE VIEW high AS SELECT id, v FROM low WHERE id <= 9;
         CREATE FUNCTION below() RETURNS trigger LANGUAGE plpgsql AS $$
         BEGIN
             IF TG_OP = 'UPDATE' THEN UPDATE t SET v = v + 1 WHERE id IN (OLD.id, OLD.id + 3);
             ELSE MERGE INTO t USING (SELECT OLD.id) AS s (id) ON s.id = t.id WHEN MATCHED THEN DELETE; END IF;
             RETURN OLD;
         END $$;
         CREATE TRIGGER below INSTEAD OF UPDATE OR DELETE ON low FOR EACH ROW EXECUTE FUNCTION below()"
    ));
    each_exactly(
        &mut bed,
        "{public.t}",
        &[
            ("UPDATE high SET v = 1", 18),
            ("UPDATE high SET v = 1 FROM generate_series(1, 3) AS s WHERE s = id", 6),
            ("WITH d AS (DELETE FROM high WHERE id > 6 RETURNING id) UPDATE high SET v = 1 WHERE id <= 2", 7),
        ],
    );
}

/// The condition of the rule sends each row one way or the other, and both ways count.
#[test]
fn conditional_rules_over_foreign_keys_and_triggers_count_both_ways() {
    let mut bed = owned(&format!(
        "{TWELVE}
         CREATE TABLE child (id int REFERENCES t ON DELETE CASCADE, w int DEFAULT 0);
         INSERT INTO child SELECT i % 12 + 1 FROM generate_series(0, 35) AS i;
         CREATE RULE kept AS ON DELETE TO t WHERE OLD.id % 4 = 0 DO INSTEAD
             UPDATE child SET w = w + 1 WHERE id = OLD.id;
         CREATE RULE told AS ON DELETE TO t DO ALSO UPDATE t SET v = v + 1 WHERE id = OLD.id - 100"
    ));
    // Nine of twelve rows go with three children each; the children of the other three are updated.
    bed.exactly("{public.t, public.child}", "DELETE FROM t", 9 + 27 + 9);
    assert_eq!(bed.number("SELECT count(*) FROM t"), 3);
}

// Event triggers

#[test]
fn event_triggers_count_for_the_command_that_sets_them_off() {
    let mut bed = owned(&format!("{TWELVE} CREATE TABLE rewritten (id int); GRANT ALL ON t TO PUBLIC"));
    pass(
        &mut bed.reader,
        "CREATE FUNCTION public.on_event() RETURNS event_trigger LANGUAGE plpgsql
         AS 'BEGIN UPDATE public.t SET v = v + 1 WHERE id <= 4; END';
         CREATE EVENT TRIGGER at_start ON ddl_command_start WHEN TAG IN ('CREATE VIEW', 'DROP VIEW')
             EXECUTE FUNCTION public.on_event();
         CREATE EVENT TRIGGER at_end ON ddl_command_end WHEN TAG IN ('CREATE VIEW', 'ALTER TABLE', 'CREATE TABLE AS')
             EXECUTE FUNCTION public.on_event();
         CREATE EVENT TRIGGER at_drop ON sql_drop WHEN TAG IN ('DROP VIEW') EXECUTE FUNCTION public.on_event();
         CREATE EVENT TRIGGER at_rewrite ON table_rewrite EXECUTE FUNCTION public.on_event()",
    );
    each_exactly(
        &mut bed,
        "{public.t}",
        &[
            ("CREATE VIEW w AS SELECT 1", 8),
            ("DROP VIEW w", 8),
            ("ALTER TABLE rewritten ALTER COLUMN id TYPE bigint", 8),
            ("CREATE TABLE made AS WITH x AS (UPDATE t SET v = v + 1 RETURNING id) SELECT id FROM x", 16),
        ],
    );
}

// Partitions and children that come and go

#[test]
fn partitions_attached_and_detached_within_a_transaction_count_while_they_are_attached() {
    let mut bed = owned(&format!(
        "{PARTED} CREATE TABLE loose (id int NOT NULL, v int NOT NULL DEFAULT 0);
         INSERT INTO loose SELECT i, 0 FROM generate_series(200, 209) AS i"
    ));
    let attach = "ALTER TABLE t ATTACH PARTITION loose FOR VALUES FROM (200) TO (300);";
    let detach = "ALTER TABLE t DETACH PARTITION loose;";
    let update = "UPDATE loose SET v = v + 1 WHERE id < 204;";
    let through = "UPDATE t SET v = v + 1 WHERE id BETWEEN 200 AND 203;";
    for body in [
        format!("{update} {attach} {update} {through}"),
        format!("{attach} {update} {through} {detach} {update}"),
        format!("{update} {attach} {through} {detach} {update} {attach} {update} {detach}"),
    ] {
        let whole = format!("BEGIN; {body} ROLLBACK");
        let function = format!("DO $$ BEGIN {body} RAISE 'enough'; END $$");
        bed.policy("tables => '{public.t}', max_rows_per_transaction => 7");
        bed.refused(&whole);
        bed.refused(&function);
        bed.policy("tables => '{public.t}', max_rows_per_transaction => 8");
        bed.passes(&whole);
        assert_eq!(expect_refusal(bed.writer.batch_execute(&function)).sqlstate, "P0001");
    }
}

#[test]
fn partitions_made_and_refilled_within_a_transaction_count() {
    let mut bed = owned(PARTED);
    bed.policy("tables => '{public.t}', max_rows_per_transaction => 5");
    for sql in [
        "BEGIN; CREATE TABLE n PARTITION OF t FOR VALUES FROM (300) TO (400);
         INSERT INTO t SELECT i FROM generate_series(300, 309) AS i; UPDATE n SET v = 1 WHERE id < 303;
         DELETE FROM t WHERE id > 306; ROLLBACK",
        "BEGIN; CREATE TABLE n (LIKE t) PARTITION BY RANGE (id);
         CREATE TABLE m PARTITION OF n FOR VALUES FROM (300) TO (400);
         INSERT INTO n SELECT i, 0 FROM generate_series(300, 309) AS i; UPDATE m SET v = 1;
         ALTER TABLE t ATTACH PARTITION n FOR VALUES FROM (300) TO (400); UPDATE m SET v = 1 WHERE id < 306; ROLLBACK",
        "BEGIN; UPDATE t_1 SET v = 1 WHERE id < 4; ALTER TABLE t DETACH PARTITION t_1; UPDATE t_1 SET v = 1;
         ALTER TABLE t ATTACH PARTITION t_1 FOR VALUES FROM (1) TO (7); UPDATE t_1 SET v = 1 WHERE id < 4; ROLLBACK",
    ] {
        bed.refused(sql);
    }
    bed.policy("tables => '{public.t}', max_rows_per_transaction => 6");
    bed.passes("BEGIN; UPDATE t_1 SET v = 1; ALTER TABLE t DETACH PARTITION t_1; UPDATE t_1 SET v = 2; COMMIT");
    assert_eq!(bed.number("SELECT sum(v) FROM t_1"), 12);
}

#[test]
fn a_child_that_gets_a_covered_parent_within_the_transaction_counts_from_then_on() {
    let mut bed = owned(
        "CREATE TABLE base (id int, v int); CREATE TABLE child (id int, v int, extra int);
         CREATE TABLE grandchild () INHERITS (child);
         INSERT INTO base SELECT i, 0 FROM generate_series(1, 2) AS i;
         INSERT INTO child SELECT i, 0 FROM generate_series(3, 5) AS i;
         INSERT INTO grandchild SELECT i, 0 FROM generate_series(6, 9) AS i",
    );
    let inherit = "ALTER TABLE child INHERIT base";
    for (sql, rows) in [
        ("UPDATE child SET v = v + 1", 7),
        ("UPDATE ONLY child SET v = v + 1", 3),
        ("UPDATE grandchild SET v = v + 1", 4),
        ("UPDATE base SET v = v + 1", 9),
        ("DELETE FROM base WHERE id > 4", 5),
        ("WITH x AS (UPDATE child SET v = v + 1 RETURNING id) SELECT count(*) FROM x", 7),
    ] {
        for whole in [
            format!("BEGIN; UPDATE child SET v = v + 1; {inherit}; {sql}; ALTER TABLE child NO INHERIT base; ROLLBACK"),
            format!("DO $$ BEGIN UPDATE child SET v = v + 1; {inherit}; EXECUTE '{sql}'; ROLLBACK; END $$"),
        ] {
            bed.limit("{public.base}", rows - 1);
            bed.refused(&whole);
            bed.limit("{public.base}", rows);
            bed.passes(&whole);
        }
    }
    bed.limit("{public.base}", 6);
    bed.passes(&format!("BEGIN; {inherit}; SAVEPOINT a; ALTER TABLE child NO INHERIT base; ROLLBACK TO a"));
    refuse(&mut bed.writer, "UPDATE child SET v = v + 1");
}

/// Nothing of such a child but its parent changes when it is given one.
#[test]
fn a_child_without_columns_that_gets_a_covered_parent_is_covered_at_once() {
    let mut bed = owned(
        "CREATE TABLE base (); CREATE TABLE child (); CREATE TABLE other ();
         INSERT INTO child SELECT FROM generate_series(1, 9);
         INSERT INTO other SELECT FROM generate_series(1, 9)",
    );
    bed.limit("{public.base}", 2);
    let mut second = bed.db().admin();
    for client in [&mut bed.writer, &mut second] {
        pass(client, "DELETE FROM child WHERE ctid = '(0,1)'; DELETE FROM other WHERE ctid = '(0,1)'");
    }
    bed.passes("ALTER TABLE child INHERIT base");
    let mut third = bed.db().admin();
    refuse(&mut third, "DELETE FROM child");
    refuse(&mut second, "DELETE FROM child");
    bed.refused("DELETE FROM child");
    bed.refused("BEGIN; ALTER TABLE other INHERIT base; DELETE FROM other");
    assert_eq!(bed.number("SELECT count(*) FROM child"), 8);
    bed.limit("{public.base}", 8);
    bed.passes("DELETE FROM child");
}

#[test]
fn a_diamond_of_inheritance_counts_each_row_once() {
    let mut bed = owned(
        "CREATE TABLE top (id int, v int); CREATE TABLE l () INHERITS (top); CREATE TABLE r () INHERITS (top);
         CREATE TABLE bottom () INHERITS (l, r);
         INSERT INTO bottom SELECT i, 0 FROM generate_series(1, 5) AS i; INSERT INTO l VALUES (6, 0), (7, 0);
         INSERT INTO r VALUES (8, 0)",
    );
    for table in ["top", "public.*", "public.l, public.r, public.top, public.bottom"] {
        each_exactly(
            &mut bed,
            &format!("{{{}{table}}}", if table.contains('.') { "" } else { "public." }),
            &[("UPDATE top SET v = v + 1", 8), ("UPDATE bottom SET v = v + 1", 5)],
        );
    }
    each_exactly(&mut bed, "{public.l}", &[("UPDATE top SET v = v + 1", 7), ("UPDATE r SET v = v + 1", 5)]);
    each_exactly(&mut bed, "{public.r}", &[("UPDATE top SET v = v + 1", 6), ("UPDATE ONLY r SET v = v + 1", 1)]);
}

// Names

#[test]
fn a_table_swapped_in_within_the_statement_is_guarded_at_once() {
    let mut bed = owned(&format!("{TWELVE} CREATE TABLE fresh AS TABLE t; UPDATE t SET v = 1; UPDATE fresh SET v = 1"));
    let swap = "ALTER TABLE t RENAME TO old; ALTER TABLE fresh RENAME TO t;";
    for (sql, rows) in [
        (format!("BEGIN; {swap} UPDATE t SET v = 2 WHERE id <= 7; ROLLBACK"), 7),
        (format!("DO $$ BEGIN UPDATE fresh SET v = 2; {swap} UPDATE t SET v = 2 WHERE id <= 7; ROLLBACK; END $$"), 7),
        (
            format!(
                "DO $$ BEGIN UPDATE t SET v = 2 WHERE id <= 4; {swap} UPDATE t SET v = 2 WHERE id <= 3;
                     ROLLBACK; END $$"
            ),
            7,
        ),
        (
            "DO $$ BEGIN UPDATE t SET v = 2 WHERE id <= 3; CREATE SCHEMA s; ALTER TABLE t SET SCHEMA s;
             CREATE TABLE t AS TABLE s.t; UPDATE t SET v = 2 WHERE id <= 4; ROLLBACK; END $$"
                .to_owned(),
            7,
        ),
    ] {
        bed.limit("{public.t}", rows - 1);
        bed.refused(&sql);
        bed.limit("{public.t}", rows);
        bed.passes(&sql);
    }
}

#[test]
fn a_temporary_table_of_the_same_name_covers_and_uncovers_nothing() {
    let mut bed = owned(TWELVE);
    bed.limit("{public.t}", 3);
    bed.passes("PREPARE p AS UPDATE t SET v = v + 1");
    bed.refused("EXECUTE p");
    bed.passes("CREATE TEMP TABLE t AS SELECT * FROM public.t; UPDATE t SET v = 9; EXECUTE p");
    bed.refused("UPDATE public.t SET v = 9");
    bed.passes("UPDATE public.t SET v = 9 WHERE id <= 3; WITH x AS (DELETE FROM t RETURNING id) SELECT 1 FROM x");
    bed.passes("DROP TABLE pg_temp.t");
    bed.refused("UPDATE t SET v = 9");
    bed.refused("EXECUTE p");
    assert_eq!(bed.number("SELECT sum(v) FROM t"), 27);
}

#[test]
fn odd_names_are_covered_as_they_are_written() {
    let long = "n".repeat(63);
    let wide = "ü".repeat(31);
    let mut bed = owned("");
    for (schema, table) in [
        ("public", long.as_str()),
        ("public", wide.as_str()),
        ("Odd Schema", "Odd.Table"),
        ("a\"b", "c\"\"d"),
        ("*", "*"),
        (" ", "  "),
        ("{x,y}", "\\z"),
        ("select", "table"),
        ("pg", "WriteGuard"),
        (long.as_str(), wide.as_str()),
    ] {
        let quote = |name: &str| format!("\"{}\"", name.replace('"', "\"\""));
        let name = format!("{}.{}", quote(schema), quote(table));
        bed.passes(&format!(
            "CREATE SCHEMA IF NOT EXISTS {}; CREATE TABLE {name} (v int);
                 INSERT INTO {name} SELECT generate_series(1, 7)",
            quote(schema)
        ));
        let element = name.replace('\\', "\\\\").replace('"', "\\\"").replace('\'', "''");
        let seen = format!("SELECT sum(v) FROM {name}");
        exactly_seen(&mut bed, &format!("{{\"{element}\"}}"), &format!("UPDATE {name} SET v = v + 1"), 7, &seen);
        exactly_seen(
            &mut bed,
            &format!("{{\"{}.*\"}}", quote(schema).replace('\\', "\\\\").replace('"', "\\\"")),
            &format!("DELETE FROM {name} WHERE v > 3"),
            5,
            &seen,
        );
    }
}

#[test]
fn copies_of_a_table_are_not_the_table() {
    let mut bed = owned(&format!("{TWELVE} CREATE TABLE copied (LIKE t INCLUDING ALL); INSERT INTO copied TABLE t"));
    bed.limit("{public.t}", 3);
    bed.passes("UPDATE copied SET v = 1; DELETE FROM copied");
    bed.passes("CREATE UNLOGGED TABLE plain AS TABLE t");
    each_exactly(&mut bed, "{public.plain}", &[("UPDATE plain SET v = v + 1", 12)]);
    bed.passes("ALTER TABLE plain SET LOGGED; ALTER TABLE t SET UNLOGGED");
    each_exactly(&mut bed, "{public.plain}", &[("UPDATE plain SET v = v + 1", 12)]);
    each_exactly(&mut bed, "{public.t}", &[("UPDATE t SET v = v + 1", 12), ("DELETE FROM t", 12)]);
}

// Rows

/// The row is deleted from its partition, and a trigger keeps it from arriving in the other one.
const VANISHING: &str = "
    CREATE FUNCTION vanish() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';
    CREATE TRIGGER vanish BEFORE INSERT ON t_3 FOR EACH ROW WHEN (NEW.id % 2 = 0) EXECUTE FUNCTION vanish();";

#[test]
fn rows_that_vanish_while_they_are_moved_count() {
    for sql in [
        "UPDATE t SET id = id + 100",
        "UPDATE t SET id = id + 100 RETURNING id",
        "WITH x AS (UPDATE t SET id = id + 100) SELECT 1",
        "DO $$ BEGIN UPDATE t SET id = 100 WHERE id <= 6; UPDATE t SET id = id + 100 WHERE id > 6; END $$",
    ] {
        let mut bed = owned(&format!("{PARTED} {VANISHING}"));
        bed.exactly("{public.t}", sql, 12);
        assert!(bed.number("SELECT count(*) FROM t") < 12, "{sql}");
    }
}

#[test]
fn rows_that_vanish_while_a_merge_moves_them_count() {
    for sql in [
        "MERGE INTO t USING (SELECT 100 AS d) AS s ON true WHEN MATCHED THEN UPDATE SET id = id + d",
        "MERGE INTO t USING (SELECT 100 AS d) AS s ON true WHEN MATCHED AND id % 2 = 1 THEN UPDATE SET v = 1
         WHEN MATCHED THEN UPDATE SET id = id + d",
    ] {
        let mut bed = owned(&format!("{PARTED} {VANISHING}"));
        bed.exactly("{public.t}", sql, 12);
        assert!(bed.number("SELECT count(*) FROM t") < 12, "{sql}");
    }
}

#[test]
fn rows_moved_over_several_levels_count_once_where_they_leave() {
    let mut bed = owned(
        "CREATE TABLE t (a int, b int) PARTITION BY LIST (a);
         CREATE TABLE t_1 PARTITION OF t FOR VALUES IN (1) PARTITION BY RANGE (b);
         CREATE TABLE t_2 PARTITION OF t FOR VALUES IN (2) PARTITION BY RANGE (b);
         CREATE TABLE t_1_a PARTITION OF t_1 FOR VALUES FROM (0) TO (10);
         CREATE TABLE t_1_b PARTITION OF t_1 DEFAULT;
         CREATE TABLE t_2_a PARTITION OF t_2 DEFAULT;
         INSERT INTO t SELECT 1, i FROM generate_series(1, 5) AS i;
         CREATE FUNCTION follow() RETURNS trigger LANGUAGE plpgsql
         AS 'BEGIN UPDATE t SET b = b WHERE b = -1; RETURN coalesce(NEW, OLD); END';
         CREATE TRIGGER follow BEFORE INSERT OR UPDATE OR DELETE ON t_1_b FOR EACH ROW EXECUTE FUNCTION follow()",
    );
    each_exactly(&mut bed, "{public.t_1_a}", &[("UPDATE t SET b = b + 10", 5)]);
    each_exactly(&mut bed, "{public.t_1_b}", &[("UPDATE t_1 SET b = b - 10 WHERE b > 12", 3)]);
    each_exactly(&mut bed, "{public.t_1}", &[("UPDATE t SET a = 2", 5)]);
    each_exactly(&mut bed, "{public.t_2}", &[("UPDATE t SET a = 3 - a, b = -b", 5)]);
    bed.limit("{public.t_2}", 0);
    bed.passes("UPDATE t SET a = 2");
}

#[test]
fn a_moved_row_that_others_refer_to_counts_with_them() {
    let mut bed = owned(
        "CREATE TABLE t (id int PRIMARY KEY) PARTITION BY RANGE (id);
         CREATE TABLE t_1 PARTITION OF t FOR VALUES FROM (1) TO (100);
         CREATE TABLE t_2 PARTITION OF t FOR VALUES FROM (100) TO (200);
         CREATE TABLE child (id int REFERENCES t ON UPDATE CASCADE ON DELETE CASCADE) PARTITION BY RANGE (id);
         CREATE TABLE child_1 PARTITION OF child FOR VALUES FROM (1) TO (100);
         CREATE TABLE child_2 PARTITION OF child FOR VALUES FROM (100) TO (200);
         INSERT INTO t SELECT generate_series(1, 4); INSERT INTO child SELECT i % 4 + 1
         FROM generate_series(1, 12) AS i",
    );
    each_exactly(&mut bed, "{public.*}", &[("UPDATE t SET id = id + 100", 16)]);
    each_exactly(&mut bed, "{public.child_2}", &[("UPDATE t SET id = id - 100 WHERE id > 101", 9)]);
    each_exactly(&mut bed, "{public.child}", &[("DELETE FROM t", 12)]);
}

#[test]
fn rows_moved_into_a_foreign_partition_count_where_they_leave() {
    let mut bed = owned(
        "CREATE SCHEMA far; CREATE TABLE far.away (id int NOT NULL, v int);
         CREATE TABLE t (id int NOT NULL, v int) PARTITION BY RANGE (id);
         CREATE TABLE t_1 PARTITION OF t FOR VALUES FROM (1) TO (100);
         INSERT INTO t SELECT i, 0 FROM generate_series(1, 6) AS i",
    );
    let owner: String = bed.writer.query_one("SELECT current_user::text", &[]).unwrap().get(0);
    let server = Server::shared();
    let setup = format!(
        "CREATE EXTENSION postgres_fdw;
         CREATE SERVER far FOREIGN DATA WRAPPER postgres_fdw OPTIONS (host '{}', port '{}', dbname '{}');
         CREATE USER MAPPING FOR PUBLIC SERVER far OPTIONS (user '{owner}', password_required 'false');
         GRANT USAGE ON FOREIGN SERVER far TO {owner}",
        server.socket_dir().display(),
        server.port(),
        bed.db().name
    );
    pass(&mut bed.reader, &setup);
    bed.passes(
        "CREATE FOREIGN TABLE t_far PARTITION OF t FOR VALUES FROM (100) TO (200)
         SERVER far OPTIONS (schema_name 'far', table_name 'away')",
    );
    exactly_seen(
        &mut bed,
        "{public.t}",
        "UPDATE t SET id = id + 100 WHERE id < 100",
        6,
        "SELECT count(*) FROM far.away",
    );
    assert_eq!(bed.number("SELECT count(*) FROM ONLY t_1"), 0);
}

#[test]
fn narrowing_by_place_lock_or_sample_counts_what_is_left() {
    let mut bed = owned(TWELVE);
    each_exactly(
        &mut bed,
        "{public.t}",
        &[
            ("UPDATE t SET v = v + 1 WHERE ctid IN (SELECT ctid FROM t ORDER BY id LIMIT 5)", 5),
            ("UPDATE t SET v = v + 1 WHERE ctid = ANY (ARRAY(SELECT ctid FROM t ORDER BY id OFFSET 4))", 8),
            (
                "WITH s AS (SELECT id FROM t ORDER BY id FOR UPDATE SKIP LOCKED LIMIT 7)
                 UPDATE t SET v = v + 1 FROM s WHERE s.id = t.id",
                7,
            ),
            (
                "WITH s AS (SELECT ctid FROM t TABLESAMPLE SYSTEM (100)) UPDATE t SET v = v + 1
                     WHERE ctid IN (TABLE s)",
                12,
            ),
            ("UPDATE t SET v = v + 1 WHERE xmin::text <> '0' AND tableoid = 't'::regclass AND cmin IS NOT NULL", 12),
            ("UPDATE t SET v = t.v + 1 FROM t AS a, t AS b WHERE a.id <= t.id AND b.v = t.v AND t.id > 3", 9),
            ("UPDATE t SET v = v + 1 WHERE (id, v) IN (SELECT max(id), max(v) OVER () FROM t GROUP BY id % 2, v)", 1),
            (
                "WITH RECURSIVE r (i) AS (VALUES (1) UNION SELECT i * 2 FROM r WHERE i < 8)
                     DELETE FROM t USING r WHERE id = i",
                4,
            ),
        ],
    );
    let mut holder = bed.db().admin();
    bed.limit("{public.t}", 100);
    pass(&mut holder, "BEGIN; SELECT FROM t WHERE id IN (3, 5) FOR UPDATE");
    bed.exactly(
        "{public.t}",
        "WITH s AS (SELECT id FROM t FOR UPDATE SKIP LOCKED) UPDATE t SET v = v + 1 FROM s WHERE s.id = t.id",
        6,
    );
    pass(&mut holder, "ROLLBACK");
}

#[test]
fn huge_rows_and_rows_without_columns_count_as_rows() {
    let mut bed = owned(
        "CREATE TABLE t (id int, big text, many int[]);
         ALTER TABLE t ALTER COLUMN big SET STORAGE EXTERNAL;
         INSERT INTO t SELECT i, repeat('x', 300000), array_agg(s) FROM generate_series(1, 5) AS i,
             generate_series(1, 20000) AS s GROUP BY i;
         CREATE TABLE none (); INSERT INTO none SELECT FROM generate_series(1, 9);
         CREATE TABLE wide (id int GENERATED ALWAYS AS IDENTITY, g int GENERATED ALWAYS AS (1) STORED, gone int);
         ALTER TABLE wide DROP COLUMN gone; INSERT INTO wide SELECT FROM generate_series(1, 6)",
    );
    each_exactly(
        &mut bed,
        "{public.*}",
        &[
            ("UPDATE t SET big = big || 'y', many[3] = 7", 5),
            ("UPDATE t SET id = id + 1", 5),
            ("UPDATE wide SET id = DEFAULT", 6),
            ("DELETE FROM none WHERE ctid <> '(0,3)'", 8),
            ("DELETE FROM wide", 6),
            ("DELETE FROM t", 5),
        ],
    );
}

// What writes set off

#[test]
fn triggers_that_write_to_their_own_table_count_all_of_it() {
    let mut bed = owned(&format!(
        "{TWELVE}
         CREATE FUNCTION neighbour() RETURNS trigger LANGUAGE plpgsql AS $$
         BEGIN
             IF pg_trigger_depth() > 1 THEN RETURN NEW; END IF;
             UPDATE t SET v = v + 1 WHERE id = NEW.id + 6;
             RETURN CASE WHEN NEW.id % 2 = 0 THEN NEW END;
         END $$;
         CREATE TRIGGER neighbour BEFORE UPDATE ON t FOR EACH ROW EXECUTE FUNCTION neighbour()"
    ));
    // Rows 1 to 6 change their neighbours, and three of them go on themselves.
    each_exactly(
        &mut bed,
        "{public.t}",
        &[
            ("UPDATE t SET v = v + 1 WHERE id <= 6", 9),
            ("UPDATE t SET v = v + 1 WHERE id IN (1, 3, 5)", 3),
            ("WITH x AS (UPDATE t SET v = v + 1 WHERE id <= 4 RETURNING id) SELECT count(*) FROM x", 6),
            ("MERGE INTO t USING generate_series(1, 4) AS s ON s = t.id WHEN MATCHED THEN UPDATE SET v = v + 1", 6),
            ("INSERT INTO t SELECT generate_series(1, 4) ON CONFLICT (id) DO UPDATE SET v = t.v + 1", 6),
        ],
    );
}

#[test]
fn transition_tables_written_back_to_the_table_count() {
    let mut bed = owned(&format!(
        "{TWELVE}
         CREATE FUNCTION again() RETURNS trigger LANGUAGE plpgsql AS $$
         BEGIN
             IF pg_trigger_depth() < 3 THEN
                 UPDATE t SET v = t.v + 1 FROM new_rows AS n WHERE n.id = t.id;
             END IF;
             RETURN NULL;
         END $$;
         CREATE TRIGGER again AFTER UPDATE ON t REFERENCING NEW TABLE AS new_rows FOR EACH STATEMENT
             EXECUTE FUNCTION again();
         CREATE FUNCTION back() RETURNS trigger LANGUAGE plpgsql AS $$
         BEGIN INSERT INTO t SELECT id, v FROM old_rows ON CONFLICT DO NOTHING; DELETE FROM t WHERE id = 12;
         RETURN NULL; END $$;
         CREATE TRIGGER back AFTER DELETE ON t REFERENCING OLD TABLE AS old_rows FOR EACH STATEMENT
             WHEN (pg_trigger_depth() = 0) EXECUTE FUNCTION back()"
    ));
    each_exactly(
        &mut bed,
        "{public.t}",
        &[
            ("UPDATE t SET v = v + 1 WHERE id <= 5", 15),
            ("INSERT INTO t SELECT generate_series(9, 20) ON CONFLICT (id) DO UPDATE SET v = t.v + 1", 12),
            ("DELETE FROM t WHERE id <= 4", 5),
        ],
    );
}

/// The trigger changes the row that the INSERT is about to meet.
#[test]
fn triggers_of_an_upsert_count_beside_its_own_updates() {
    let mut bed = owned(&format!(
        "{TWELVE}
         CREATE TABLE u AS TABLE t;
         CREATE FUNCTION before_insert() RETURNS trigger LANGUAGE plpgsql AS $$
         BEGIN
             UPDATE t SET v = v + 1 WHERE id = NEW.id + 6; DELETE FROM u WHERE id = NEW.id;
             RETURN CASE WHEN NEW.id <> 5 THEN NEW END;
         END $$;
         CREATE TRIGGER before_insert BEFORE INSERT ON t FOR EACH ROW EXECUTE FUNCTION before_insert()"
    ));
    // Rows 1 to 6 except the fifth are updated, and 7 to 12 before them.
    let sql = "INSERT INTO t SELECT generate_series(1, 6) ON CONFLICT (id) DO UPDATE SET v = 9";
    each_exactly(&mut bed, "{public.t}", &[(sql, 11)]);
    bed.limit("{public.t}", 100);
    bed.passes("INSERT INTO u SELECT id FROM t WHERE id <= 6");
    each_exactly(&mut bed, "{public.t, public.u}", &[(sql, 11 + 12 - 6)]);
}

#[test]
fn merges_with_triggers_cascades_and_moves_count_all_of_it() {
    let mut bed = owned(
        "CREATE TABLE t (id int PRIMARY KEY, v int) PARTITION BY RANGE (id);
         CREATE TABLE t_1 PARTITION OF t FOR VALUES FROM (1) TO (7);
         CREATE TABLE t_2 PARTITION OF t FOR VALUES FROM (7) TO (100);
         CREATE TABLE child (id int REFERENCES t ON DELETE CASCADE ON UPDATE CASCADE);
         INSERT INTO t SELECT i, i FROM generate_series(1, 12) AS i; INSERT INTO child SELECT id FROM t;
         CREATE TABLE note (id int, n int); INSERT INTO note SELECT id, 0 FROM t;
         CREATE FUNCTION noted() RETURNS trigger LANGUAGE plpgsql
         AS 'BEGIN UPDATE note SET n = n + 1 WHERE id = coalesce(NEW.v, OLD.v); RETURN NULL; END';
         CREATE TRIGGER noted AFTER INSERT OR UPDATE OR DELETE ON t FOR EACH ROW EXECUTE FUNCTION noted()",
    );
    // 1 to 3 are deleted, 4 to 6 updated where they are, 7 to 9 left, and 13 to 15 inserted.
    let merge = "MERGE INTO t USING generate_series(1, 15) AS s ON s = t.id
                 WHEN MATCHED AND s <= 3 THEN DELETE
                 WHEN MATCHED AND s <= 6 THEN UPDATE SET v = t.v
                 WHEN MATCHED AND s <= 9 THEN DO NOTHING
                 WHEN MATCHED AND s <= 12 THEN UPDATE SET v = t.v
                 WHEN NOT MATCHED THEN INSERT VALUES (s, -s)";
    // Three deleted with a child each, six updated, and nine notes.
    each_exactly(&mut bed, "{public.*}", &[(merge, 3 + 3 + 6 + 9)]);
    // Rows 4 to 6 move, their children follow; core fires an update's triggers for a move as a delete and an insert.
    let moving =
        "MERGE INTO t USING generate_series(4, 6) AS s ON s = t.id WHEN MATCHED THEN UPDATE SET id = t.id + 40";
    each_exactly(&mut bed, "{public.t, public.child}", &[(moving, 6)]);
}

#[test]
fn foreign_keys_that_set_values_count_across_tables() {
    let mut bed = owned(
        "CREATE TABLE parent (id int PRIMARY KEY, k int UNIQUE);
         INSERT INTO parent SELECT i, i FROM generate_series(0, 6) AS i;
         CREATE TABLE nulled (id int REFERENCES parent ON DELETE SET NULL,
             k int REFERENCES parent (k) ON UPDATE SET NULL);
         CREATE TABLE defaulted (id int DEFAULT 0 REFERENCES parent ON DELETE SET DEFAULT, own int UNIQUE);
         CREATE TABLE far (own int DEFAULT 1 REFERENCES defaulted (own) ON UPDATE SET DEFAULT);
         INSERT INTO nulled SELECT i, i FROM generate_series(1, 6) AS i;
         INSERT INTO nulled SELECT i, i FROM generate_series(1, 6) AS i;
         INSERT INTO defaulted SELECT i, i FROM generate_series(1, 6) AS i;
         INSERT INTO far SELECT i FROM generate_series(2, 6) AS i",
    );
    each_exactly(
        &mut bed,
        "{public.nulled, public.defaulted, public.far}",
        &[
            ("UPDATE parent SET k = k + 100 WHERE k > 0", 12),
            ("UPDATE defaulted SET own = own + 10 WHERE own > 1", 10),
            ("DELETE FROM parent WHERE id > 3", 9),
        ],
    );
    each_exactly(&mut bed, "{public.*}", &[("DELETE FROM parent WHERE id IN (1, 2, 3)", 12)]);
}

#[test]
fn rows_that_refer_to_each_other_count_once() {
    let mut bed = owned(
        "CREATE TABLE ring (id int PRIMARY KEY, next int REFERENCES ring ON DELETE CASCADE
             DEFERRABLE INITIALLY DEFERRED);
         INSERT INTO ring SELECT i, i % 9 + 1 FROM generate_series(1, 9) AS i;
         CREATE TABLE husband (id int PRIMARY KEY, wife int);
         CREATE TABLE wife (id int PRIMARY KEY, husband int REFERENCES husband ON DELETE CASCADE);
         ALTER TABLE husband ADD FOREIGN KEY (wife) REFERENCES wife ON DELETE CASCADE DEFERRABLE INITIALLY DEFERRED;
         INSERT INTO husband SELECT i FROM generate_series(1, 4) AS i;
         INSERT INTO wife SELECT i, i FROM husband AS h (i);
         UPDATE husband SET wife = id;
         CREATE TABLE tree (id int PRIMARY KEY, up int REFERENCES tree ON DELETE SET NULL ON UPDATE CASCADE);
         INSERT INTO tree SELECT i, nullif(i / 3, 0) FROM generate_series(1, 12) AS i",
    );
    each_exactly(
        &mut bed,
        "{public.*}",
        &[
            ("DELETE FROM ring WHERE id = 5", 9),
            ("DELETE FROM husband WHERE id > 1", 6),
            ("DELETE FROM wife", 2),
            // Their children are 3 to 5, 9 to 11 and none: five of them point at one that goes and stay.
            ("DELETE FROM tree WHERE id IN (1, 3)", 2 + 3 + 3 - 1),
            ("UPDATE tree SET id = id + 100 WHERE id = 2", 1 + 3),
        ],
    );
}

/// The referring rows may be mended before the commit checks them; the action itself runs at once.
#[test]
fn deferred_foreign_keys_hold_the_transactions_limit() {
    let mut bed = owned(
        "CREATE TABLE parent (id int PRIMARY KEY);
         CREATE TABLE child (id int, p int REFERENCES parent ON UPDATE CASCADE DEFERRABLE INITIALLY DEFERRED);
         CREATE TABLE checked (p int REFERENCES parent DEFERRABLE INITIALLY DEFERRED);
         INSERT INTO parent SELECT generate_series(1, 4); INSERT INTO child SELECT i, i FROM generate_series(1, 4) AS i;
         INSERT INTO checked SELECT generate_series(1, 4)",
    );
    let sql =
        "BEGIN; UPDATE parent SET id = id + 10 WHERE id <= 2; SAVEPOINT a; UPDATE parent SET id = id + 10 WHERE id = 3;
               RELEASE a; UPDATE checked SET p = p + 10 WHERE p <= 3; COMMIT";
    bed.policy("tables => '{public.*}', max_rows_per_transaction => 8");
    bed.refused(sql);
    bed.policy("tables => '{public.*}', max_rows_per_transaction => 9");
    bed.passes(sql);
}

#[test]
fn row_security_and_leaky_views_count_only_what_changes() {
    let mut bed = owned(&format!(
        "{TWELVE}
         ALTER TABLE t ENABLE ROW LEVEL SECURITY; ALTER TABLE t FORCE ROW LEVEL SECURITY;
         CREATE POLICY seen ON t FOR SELECT USING (id <= 10);
         CREATE POLICY changed ON t FOR UPDATE USING (id > 3) WITH CHECK (v < 100);
         CREATE POLICY gone ON t FOR DELETE USING (id % 2 = 0);
         CREATE VIEW even WITH (security_barrier) AS SELECT * FROM t WHERE id % 2 = 0;
         CREATE FUNCTION leak(i int) RETURNS boolean LANGUAGE plpgsql COST 0.0001
         AS 'BEGIN RETURN true; END'"
    ));
    each_exactly(
        &mut bed,
        "{public.t}",
        &[
            ("UPDATE t SET v = v + 1", 7),
            ("UPDATE even SET v = v + 1 WHERE leak(id)", 4),
            ("DELETE FROM even WHERE leak(id) AND id > 6", 2),
            ("DELETE FROM t", 4),
        ],
    );
    let refusal = expect_refusal(bed.writer.batch_execute("UPDATE t SET v = 100"));
    assert_eq!(refusal.sqlstate, "42501", "{refusal:?}");
}

/// The domain's check changes the table whose column is of the domain.
#[test]
fn a_domain_that_writes_counts_for_whoever_casts_to_it() {
    let mut bed = owned(&format!(
        "{TWELVE}
         CREATE FUNCTION noted(i int) RETURNS boolean LANGUAGE plpgsql
         AS 'BEGIN UPDATE t SET v = v + 1 WHERE id = i; RETURN true; END';
         CREATE DOMAIN noted_int AS int CHECK (noted(VALUE));
         CREATE TABLE d (id noted_int, w int DEFAULT 0); CREATE TYPE pair AS (a noted_int, b noted_int)"
    ));
    each_exactly(
        &mut bed,
        "{public.t}",
        &[
            ("INSERT INTO d SELECT generate_series(1, 8)", 8),
            ("UPDATE d SET id = 13 - id", 8),
            ("SELECT i::noted_int FROM generate_series(1, 3) AS i", 3),
            ("SELECT array_agg(i)::noted_int[] FROM generate_series(1, 5) AS i", 5),
            ("SELECT ROW(i, i + 1)::pair FROM generate_series(1, 3) AS i", 6),
            ("SELECT jsonb_populate_record(NULL::pair, '{\"a\": 1, \"b\": 2}')", 2),
        ],
    );
}

// Two-phase commit

#[test]
fn limits_hold_before_a_transaction_is_prepared() {
    let mut bed = owned(TWELVE);
    let name = bed.db().name.clone();
    let prepare = |body: &str| format!("BEGIN; {body}; PREPARE TRANSACTION '{name}'");
    bed.policy("tables => '{public.t}', max_rows => 4, max_rows_per_transaction => 6");
    for body in [
        "UPDATE t SET v = 1 WHERE id <= 5",
        "UPDATE t SET v = 1 WHERE id <= 4; UPDATE t SET v = 1 WHERE id > 9",
        "SAVEPOINT a; UPDATE t SET v = 1 WHERE id <= 4; RELEASE a; SAVEPOINT b; UPDATE t SET v = 1 WHERE id > 9",
        "SAVEPOINT a; SAVEPOINT b; UPDATE t SET v = 1 WHERE id <= 4; RELEASE a; UPDATE t SET v = 2 WHERE id <= 3",
    ] {
        bed.refused(&prepare(body));
        assert_eq!(bed.number(&format!("SELECT count(*) FROM pg_prepared_xacts WHERE gid = '{name}'")), 0);
    }
    bed.passes(&prepare(
        "SAVEPOINT a; UPDATE t SET v = 1 WHERE id <= 4; ROLLBACK TO a; UPDATE t SET v = 1 WHERE id <= 4; RELEASE a;
         UPDATE t SET v = 1 WHERE id IN (5, 6)",
    ));
    // The session goes on with a transaction of its own, and with the one that was prepared.
    bed.refused("BEGIN; UPDATE t SET v = 1 WHERE id > 8; UPDATE t SET v = 1 WHERE id > 9");
    bed.passes("BEGIN; UPDATE t SET v = 1 WHERE id > 8; UPDATE t SET v = 1 WHERE id > 10; COMMIT");
    assert_eq!(bed.number("SELECT sum(v) FROM t"), 4);
    bed.passes(&format!("COMMIT PREPARED '{name}'"));
    bed.passes("UPDATE t SET v = 1 WHERE id <= 4");
    assert_eq!(bed.number("SELECT sum(v) FROM t"), 10);
    bed.passes(&prepare("UPDATE t SET v = 2 WHERE id <= 4"));
    bed.passes(&format!("ROLLBACK PREPARED '{name}'"));
    assert_eq!(bed.number("SELECT sum(v) FROM t"), 10);
}

// Plans that are older than the policy

#[test]
fn generic_plans_follow_the_policy_as_it_comes_and_goes() {
    let mut bed = owned(&format!(
        "{PARTED} SET plan_cache_mode = force_generic_plan;
         CREATE VIEW w AS SELECT * FROM t;
         CREATE FUNCTION f(n int) RETURNS void LANGUAGE plpgsql AS 'BEGIN UPDATE w SET v = v + 1 WHERE id <= n; END';
         CREATE FUNCTION g(n int) RETURNS void LANGUAGE sql AS 'UPDATE t SET v = v + 1 WHERE id <= n';
         PREPARE m (int) AS MERGE INTO t USING generate_series(1, 12) AS s ON s = t.id AND s <= $1
             WHEN MATCHED THEN UPDATE SET v = t.v + 1;
         PREPARE x (int) AS WITH u AS (UPDATE w SET v = v + 1 WHERE id <= $1 RETURNING id) SELECT count(*) FROM u;
         PREPARE y (int) AS SELECT f($1), g(0)"
    ));
    let ways = ["SELECT f(@)", "SELECT g(@)", "EXECUTE m(@)", "EXECUTE x(@)", "EXECUTE y(@)"];
    for round in 0..3 {
        for sql in ways {
            bed.passes(&sql.replace('@', "12"));
        }
        bed.limit(if round == 1 { "{public.t_1}" } else { "{public.*}" }, 4);
        for sql in ways {
            bed.refused(&sql.replace('@', "5"));
            bed.passes(&sql.replace('@', "4"));
        }
        if round == 2 {
            bed.passes(
                "ALTER TABLE t DETACH PARTITION t_1; ALTER TABLE t ATTACH PARTITION t_1 FOR VALUES FROM (1) TO (7)",
            );
            for sql in ways {
                bed.refused(&sql.replace('@', "5"));
            }
        }
        pass(&mut bed.reader, "SELECT writeguard.drop_policy('p')");
    }
}

/// A policy that another session sets while a transaction is open counts from its commit on, for partitions too.
#[test]
fn a_policy_set_between_two_statements_of_a_transaction_counts_the_later_one() {
    let mut bed = owned(PARTED);
    bed.passes("BEGIN; UPDATE t SET v = v + 1");
    bed.limit("{public.t}", 5);
    refuse(&mut bed.writer, "UPDATE t SET v = v + 1 WHERE id BETWEEN 4 AND 9");
    bed.passes("ROLLBACK; BEGIN; UPDATE t SET v = v + 1 WHERE id BETWEEN 4 AND 8");
    pass(&mut bed.reader, "SELECT writeguard.drop_policy('p')");
    bed.passes("UPDATE t_1 SET v = v + 1; UPDATE t SET v = v + 1; COMMIT");
    let mut second = bed.db().admin();
    assert_eq!(number(&mut second, "SELECT sum(v) FROM t"), 5 + 6 + 12);
}

//! Rows are kept while their table changes under the statement that writes them: every image is of the row that it is
//! of, in the columns that it had, and undo puts values back where they were or says that it cannot.

use crate::common::kept::{self, Bed, one};
use crate::common::{Server, expect_refusal};

const NOTES: &str = "CREATE TABLE t (id int PRIMARY KEY, note text, other text);
    INSERT INTO t SELECT i, 'n' || i, 'o' || i FROM generate_series(1, 3) AS i";

/// What was kept of the last change: operation, before and after of each row.
#[track_caller]
fn images(bed: &mut Bed) -> Vec<String> {
    bed.rows(
        "SELECT concat_ws(' ', operation, before, after) FROM writeguard.image
         WHERE change = (SELECT max(id) FROM writeguard.change_statement) ORDER BY number",
    )
}

#[track_caller]
fn assert_alive() {
    let log = Server::shared().log();
    for sign in ["terminated by signal", "XX000", "TRAP:", "panicked"] {
        assert!(!log.contains(sign), "{}", log.lines().filter(|line| line.contains(sign)).collect::<String>());
    }
}

/// Nothing is undone, and nothing is changed by trying; what was kept can be read.
#[track_caller]
fn refuses(bed: &mut Bed, change: i64, sqlstate: &str, says: &str) {
    let before = bed.table("t");
    for how in ["'error'", "'skip'", "'error', dry_run => true"] {
        let refusal = bed.refused(&format!("SELECT * FROM writeguard.undo({change}, {how})"));
        assert_eq!(refusal.sqlstate, sqlstate, "{refusal:?}");
        assert!(refusal.message.contains(says), "{refusal:?}");
    }
    assert_eq!(bed.table("t"), before);
}

#[test]
fn a_column_gets_another_type_between_two_rows() {
    for (of, value, alter, write, was, left) in [
        ("text", "'x'", "int USING 42", "c + 1", "42", "43"),
        ("bigint", "7000000000", "text", "c || '!'", "7000000000", "7000000000!"),
        ("text", "repeat('x', 10000)", "bool USING true", "NOT c", "t", "f"),
        ("int", "1", "text", "repeat('y', 100000)", "1", ""),
        ("int[]", "'{1,2}'", "jsonb USING '{}'", "'[1]'", "{}", "[1]"),
        ("date", "'2024-02-29'", "float8 USING 0.5", "c + 1", "0.5", "1.5"),
        ("uuid", "'00000000-0000-0000-0000-000000000001'", "name", "'z'", "00000000-0000-0000-0000-000000000001", "z"),
        ("numeric(6,2)", "1.25", "numeric(6,0)", "c + 1", "1", "2"),
        ("char(3)", "'a'", "\"char\"", "'b'", "a", "b"),
        ("interval", "'1 day'", "point USING '(1,2)'", "'(3,4)'", "(1,2)", "(3,4)"),
    ] {
        let mut bed = Bed::new(&format!(
            "CREATE TABLE t (id int PRIMARY KEY, c {of}, d text DEFAULT 'd'); INSERT INTO t VALUES (1, {value}), (2, {value})"
        ));
        let change = bed.change(&format!(
            "UPDATE t SET d = 'e' WHERE id = 1; ALTER TABLE t ALTER c TYPE {alter}; UPDATE t SET c = {write} WHERE id = 1;
             DELETE FROM t WHERE id = 2"
        ));
        let kept = images(&mut bed);
        assert_eq!(kept[0], r#"update {"d": "d", "id": "1"} {"d": "e", "id": "1"}"#);
        if !left.is_empty() {
            assert_eq!(kept[1], format!(r#"update {{"c": "{was}", "id": "1"}} {{"c": "{left}", "id": "1"}}"#));
        }
        assert_eq!(kept[2], format!(r#"delete {{"c": "{was}", "d": "d", "id": "2"}}"#));
        refuses(&mut bed, change, "WG008", "got another type for column \"c\" between two of the rows");
        assert_alive();
    }
}

#[test]
fn many_columns_are_added_between_two_rows() {
    let mut bed = Bed::new(NOTES);
    let before = bed.table("t");
    let change = bed.change(
        "UPDATE t SET note = 'x' WHERE id = 1;
         EXECUTE (SELECT 'ALTER TABLE t ' || string_agg('ADD a' || i || ' int', ', ') FROM generate_series(1, 1500) AS i);
         UPDATE t SET note = 'y', a1500 = 7 WHERE id = 1; DELETE FROM t WHERE id = 2;
         EXECUTE (SELECT 'ALTER TABLE t ' || string_agg('DROP a' || i, ', ') FROM generate_series(1, 1500) AS i);
         UPDATE t SET note = 'z' WHERE id = 1",
    );
    let kept = images(&mut bed);
    assert_eq!(kept[1], r#"update {"id": "1", "note": "x", "a1500": null} {"id": "1", "note": "y", "a1500": "7"}"#);
    assert_eq!(kept[2].matches("null").count(), 1500);
    assert_eq!(kept[3], r#"update {"id": "1", "note": "y"} {"id": "1", "note": "z"}"#);
    assert_eq!(bed.undo(&format!("{change}")), one("public.t", 2, 0));
    assert_eq!(bed.table("t"), before);
    assert_alive();
}

/// Columns that change their names, in one statement.
const RENAMES: [(&str, &str); 4] = [
    ("ALTER TABLE t RENAME note TO text", "ALTER TABLE t RENAME text TO note"),
    (
        "ALTER TABLE t RENAME note TO x; ALTER TABLE t RENAME other TO note; ALTER TABLE t RENAME x TO other",
        "ALTER TABLE t RENAME note TO x; ALTER TABLE t RENAME other TO note; ALTER TABLE t RENAME x TO other",
    ),
    (
        "ALTER TABLE t RENAME note TO gone; ALTER TABLE t ADD note text DEFAULT 'new'",
        "ALTER TABLE t DROP note; ALTER TABLE t RENAME gone TO note",
    ),
    (
        "ALTER TABLE t RENAME id TO x; ALTER TABLE t RENAME other TO id",
        "ALTER TABLE t RENAME id TO other; ALTER TABLE t RENAME x TO id",
    ),
];

#[test]
fn columns_change_their_names_between_two_rows() {
    for (there, back) in RENAMES {
        let mut bed = Bed::new(NOTES);
        let before = bed.table("t");
        let write = |row| {
            format!(
                "EXECUTE (SELECT format('UPDATE t SET %I = %I || ''!'' WHERE %I = {row}', c.attname, c.attname, k.attname)
                          FROM pg_attribute AS c, pg_attribute AS k
                          WHERE c.attrelid = 't'::regclass AND k.attrelid = c.attrelid AND c.attnum = 2 AND k.attnum = 1)"
            )
        };
        let (one_row, two, three) = (write(1), write(2), write(3));
        let change = bed.change(&format!("{one_row}; {there}; {one_row}; {two}; {back}; {two}; {three}"));
        assert_eq!(
            images(&mut bed),
            [(1, "n1", "n1!"), (1, "n1!", "n1!!"), (2, "n2", "n2!"), (2, "n2!", "n2!!"), (3, "n3", "n3!")].map(
                |(id, was, left)| format!(
                    r#"update {{"id": "{id}", "note": "{was}"}} {{"id": "{id}", "note": "{left}"}}"#
                )
            ),
            "{there}"
        );
        assert_eq!(bed.undo(&format!("{change}")), one("public.t", 3, 0), "{there}");
        assert_eq!(bed.table("t"), before, "{there}");
        // Each of several statements in one transaction is a change of its own, under the names of its time.
        let count = "SELECT count(*)::text FROM writeguard.change_statement";
        let changes = bed.rows(count);
        bed.run(&format!(
            "SET writeguard.capture_undo = on; BEGIN; UPDATE t SET note = 'x' WHERE id = 1; {there}; DO $$ BEGIN {one_row}; {two}; END $$;
             {back}; UPDATE t SET note = 'y' WHERE id = 1; COMMIT; RESET writeguard.capture_undo"
        ));
        assert_eq!(bed.rows(count)[0], (changes[0].parse::<i64>().unwrap() + 3).to_string());
        let last: i64 = bed.rows("SELECT max(id)::text FROM writeguard.change_statement")[0].parse().unwrap();
        for (change, rows) in [(last, 1), (last - 1, 2), (last - 2, 1)] {
            assert_eq!(bed.undo(&format!("{change}")), one("public.t", rows, 0), "{there}");
        }
        assert_eq!(bed.table("t"), before, "{there}");
    }
    assert_alive();
}

#[test]
fn a_column_is_replaced_by_another_of_its_name_between_two_rows() {
    let mut bed = Bed::new(NOTES);
    let change = bed.change(
        "UPDATE t SET note = 'x', other = 'x' WHERE id = 1; ALTER TABLE t DROP note; ALTER TABLE t ADD note text DEFAULT 'new';
         UPDATE t SET note = 'y' WHERE id IN (1, 2); ALTER TABLE t ADD \"note (5)\" text; UPDATE t SET \"note (5)\" = 'z' WHERE id = 2",
    );
    assert_eq!(
        images(&mut bed)[1..],
        [
            r#"update {"id": "1", "note (4)": "new"} {"id": "1", "note (4)": "y"}"#,
            r#"update {"id": "2", "note (4)": "new"} {"id": "2", "note (4)": "y"}"#,
            r#"update {"id": "2", "note (5)": null} {"id": "2", "note (5)": "z"}"#,
        ]
    );
    assert_eq!(bed.undo(&format!("{change}")), one("public.t", 2, 0));
    assert_eq!(bed.table("t"), ["(1,o1,new,)", "(2,o2,new,)", "(3,o3,new,)"]);
    assert_alive();
}

#[test]
fn rows_that_one_key_does_not_tell_apart_are_not_put_back() {
    for ddl in [
        "ALTER TABLE t DROP CONSTRAINT t_pkey; ALTER TABLE t ADD PRIMARY KEY (note)",
        "ALTER TABLE t DROP CONSTRAINT t_pkey; ALTER TABLE t ADD PRIMARY KEY (note, id)",
    ] {
        let mut bed = Bed::new(NOTES);
        let change =
            bed.change(&format!("UPDATE t SET note = 'x' WHERE id = 1; {ddl}; UPDATE t SET other = 'y' WHERE id = 1"));
        refuses(&mut bed, change, "WG008", "got another primary key");
        // The same after the change.
        let mut bed = Bed::new(NOTES);
        let change = bed.change("UPDATE t SET note = note || 'x', other = 'y'");
        bed.run(ddl);
        refuses(&mut bed, change, "WG007", "is not what it was");
    }
    // Without a key nothing is kept, and it is looked for no more often than the table changes.
    let mut bed = Bed::new(NOTES);
    let before = bed.table("t");
    let change = bed.change(
        "UPDATE t SET note = 'x' WHERE id = 1; ALTER TABLE t DROP CONSTRAINT t_pkey; UPDATE t SET other = 'y' WHERE id = 2;
         ALTER TABLE t ADD PRIMARY KEY (id); UPDATE t SET note = 'z' WHERE id = 1",
    );
    assert_eq!(images(&mut bed).len(), 2);
    assert_eq!(bed.undo(&format!("{change}")), one("public.t", 1, 0));
    assert_eq!(bed.table("t")[0], before[0]);
    // The override of such a statement is refused before anything is written.
    bed.run("SELECT writeguard.set_policy('kept', undo => '1 day', max_rows => 1, override => 'flag')");
    let sql = "SET writeguard.override = on; DO $$ BEGIN ALTER TABLE t DROP CONSTRAINT t_pkey; UPDATE t SET note = 'w'; END $$";
    let refusal = bed.refused(sql);
    assert_eq!(refusal.sqlstate, "WG008", "{refusal:?}");
    assert_alive();
}

#[test]
fn partitions_come_and_go_between_two_rows() {
    let setup = "CREATE TABLE t (id int, r int, v text, PRIMARY KEY (id, r)) PARTITION BY LIST (r);
         CREATE TABLE t1 PARTITION OF t FOR VALUES IN (1);
         CREATE TABLE t2 (v text, gone int, r int NOT NULL, id int NOT NULL, PRIMARY KEY (id, r)); ALTER TABLE t2 DROP gone;
         INSERT INTO t SELECT i, 1, 'v' || i FROM generate_series(1, 3) AS i;
         INSERT INTO t2 (id, r, v) SELECT i, 2, 'w' || i FROM generate_series(1, 3) AS i";
    let (attach, detach) = ("ALTER TABLE t ATTACH PARTITION t2 FOR VALUES IN (2)", "ALTER TABLE t DETACH PARTITION t2");
    // The same partition on its own and as a part of the whole.
    for statement in [
        format!("UPDATE t2 SET v = 'x' WHERE id = 1; {attach}; UPDATE t SET v = 'y' WHERE r = 2"),
        format!("{attach}; UPDATE t SET v = 'y' WHERE r = 2; {detach}; DELETE FROM t2 WHERE id = 1"),
        format!("{attach}; UPDATE t SET r = 2, id = id + 10 WHERE id = 1 AND r = 1; {detach}; UPDATE t2 SET v = 'z'"),
        format!(
            "UPDATE t2 SET v = 'x' WHERE id = 1; {attach}; UPDATE t SET r = 1, id = id + 10 WHERE r = 2 AND id = 1"
        ),
        format!("DELETE FROM t2 WHERE id = 1; {attach}; TRUNCATE t"),
    ] {
        let mut bed = Bed::new(setup);
        let change = bed.change(&statement);
        refuses(&mut bed, change, "WG008", "was attached or detached between two of the rows");
    }
    // Others do not mind.
    for statement in [
        format!("UPDATE t2 SET v = 'x'; {attach}; UPDATE t SET v = 'y' WHERE r = 1"),
        format!("UPDATE t SET v = 'x'; {attach}; UPDATE t SET v = 'y'; UPDATE t SET r = 3 - r, id = id + 10; DELETE FROM t"),
        "ALTER TABLE t ADD more int; UPDATE t SET v = 'x'; ALTER TABLE t RENAME v TO w; UPDATE t1 SET w = 'y'; ALTER TABLE t RENAME w TO v; \
         ALTER TABLE t DROP more".to_owned(),
    ] {
        let mut bed = Bed::new(setup);
        let before = [bed.table("t1"), bed.table("t2")];
        let change = bed.change(&statement);
        let undone = bed.undo(&format!("{change}"));
        assert!(undone.iter().all(|(_, rows, conflicts)| *rows > 0 && *conflicts == 0), "{statement}: {undone:?}");
        assert_eq!([bed.table("t1"), bed.table("t2")], before, "{statement}");
    }
    // Inheritance makes no tree.
    let mut bed = Bed::new(NOTES);
    bed.run("CREATE TABLE c (id int PRIMARY KEY, note text, other text); INSERT INTO c VALUES (7, 'n7', 'o7')");
    let before = [bed.table("ONLY t"), bed.table("c")];
    let change = bed.change(
        "UPDATE c SET note = 'x'; ALTER TABLE c INHERIT t; UPDATE t SET note = note || '!'; ALTER TABLE t RENAME note TO n;
         UPDATE t SET n = n || '?'; ALTER TABLE c NO INHERIT t; DELETE FROM c",
    );
    assert_eq!(bed.undo(&format!("{change}")), [("public.c".into(), 1, 0), ("public.t".into(), 3, 0)]);
    assert_eq!([bed.table("ONLY t"), bed.table("c")], before);
    assert_alive();
}

#[test]
fn a_table_is_renamed_replaced_and_emptied_between_two_rows() {
    let mut bed = Bed::new(NOTES);
    let before = bed.table("t");
    let change = bed.change(
        "UPDATE t SET note = 'x' WHERE id = 1; CREATE SCHEMA s; ALTER TABLE t SET SCHEMA s; ALTER TABLE s.t RENAME TO u;
         UPDATE s.u SET note = 'y' WHERE id = 1; ALTER TABLE s.u RENAME TO t; ALTER TABLE s.t SET SCHEMA public; TRUNCATE t",
    );
    assert_eq!(bed.rows(&format!("SELECT DISTINCT relation FROM writeguard.change WHERE id = {change}")), ["public.t"]);
    assert_eq!(bed.undo(&format!("{change}")), one("public.t", 3, 0));
    assert_eq!(bed.table("t"), before);
    // Another table of its name is another table.
    let change = bed.change(
        "UPDATE t SET note = 'x'; DROP TABLE t; CREATE TABLE t (note int, id int PRIMARY KEY); INSERT INTO t VALUES (5, 1);
         UPDATE t SET note = 6",
    );
    refuses(&mut bed, change, "WG007", "was dropped");
    let mut bed = Bed::new(NOTES);
    let change = bed.change(
        "UPDATE t SET note = 'x'; ALTER TABLE t RENAME TO u; CREATE TABLE t (note int, id int PRIMARY KEY);
         INSERT INTO t VALUES (5, 1); UPDATE t SET note = 6",
    );
    assert_eq!(bed.undo(&format!("{change}")), [("public.u".into(), 3, 0), ("public.t".into(), 1, 0)]);
    assert_eq!((bed.table("u"), bed.table("t")), (before, vec!["(5,1)".into()]));
    assert_alive();
}

#[test]
fn types_change_between_two_rows_and_since() {
    let setup = "CREATE TYPE pair AS (a int, b text); CREATE TYPE mood AS ENUM ('sad', 'glad'); CREATE DOMAIN small AS int CHECK (VALUE < 100);
         CREATE DOMAIN pairs AS pair[];
         CREATE TABLE t (id int PRIMARY KEY, p pair, q pairs, m mood, s small);
         INSERT INTO t SELECT i, (i, 'b')::pair, ARRAY[(i, 'c')::pair], 'sad', i FROM generate_series(1, 3) AS i";
    let write = "UPDATE t SET p.a = 7 WHERE id = 1; UPDATE t SET q[1].a = 8 WHERE id = 2; DELETE FROM t WHERE id = 3";
    let remade = "ALTER TYPE pair DROP ATTRIBUTE b; ALTER TYPE pair ADD ATTRIBUTE c text";
    for (between, write_more, since, refusal) in [
        (remade, write, "", ("WG008", "got another type for column \"p\"")),
        ("", "", remade, ("WG007", "the type of column \"p\" of table \"public.t\" is not what it was")),
        ("ALTER TYPE pair ADD ATTRIBUTE c int", write, "", ("WG008", "got another type")),
    ] {
        let mut bed = Bed::new(setup);
        let rows = "UPDATE t SET p.a = 5, q[1].a = 6, m = 'glad'";
        let change =
            bed.change(&[rows, between, write_more].map(|step| if step.is_empty() { "NULL" } else { step }).join("; "));
        bed.run(since);
        refuses(&mut bed, change, refusal.0, refusal.1);
        assert_alive();
    }
    // Names that change, and types that only get more values.
    for between in [
        "ALTER TYPE pair RENAME ATTRIBUTE a TO z; ALTER TYPE pair RENAME ATTRIBUTE z TO a",
        "ALTER TYPE mood ADD VALUE 'mad'",
        "ALTER TYPE pair RENAME TO couple; ALTER DOMAIN small ADD CHECK (VALUE < 1000)",
    ] {
        let mut bed = Bed::new(setup);
        let before = bed.table("t");
        let change = bed.change(&format!("UPDATE t SET p.a = 5, m = 'glad', s = 99; {between}; {write}"));
        assert_eq!(bed.undo(&format!("{change}")), one("public.t", 3, 0), "{between}");
        assert_eq!(bed.table("t"), before);
    }
    // A type of the same name is another one.
    let mut bed = Bed::new(setup);
    let change = bed.change(
        "UPDATE t SET m = 'glad', s = 50 WHERE id = 1; DROP TYPE mood CASCADE; CREATE TYPE mood AS ENUM ('glad', 'sad', 'mad');
         ALTER TABLE t ADD m mood DEFAULT 'mad'; UPDATE t SET m = 'glad' WHERE id = 1",
    );
    assert_eq!(images(&mut bed)[1], r#"update {"id": "1", "m (6)": "mad"} {"id": "1", "m (6)": "glad"}"#);
    assert_eq!(bed.undo(&format!("{change}")), one("public.t", 1, 0));
    assert_eq!(bed.rows("SELECT concat_ws(' ', s, m) FROM t WHERE id = 1"), ["1 mad"]);
    assert_alive();
}

#[test]
fn a_trigger_renames_columns_under_the_statement() {
    // PostgreSQL refuses most changes of a table that is being written, but not this one.
    let mut bed = Bed::new(&format!(
        "{NOTES}; CREATE FUNCTION swap() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
            ALTER TABLE t RENAME note TO x; ALTER TABLE t RENAME other TO note; ALTER TABLE t RENAME x TO other;
            RETURN COALESCE(NEW, OLD); END $$;
         CREATE TRIGGER swap BEFORE UPDATE OR DELETE ON t FOR EACH ROW EXECUTE FUNCTION swap()"
    ));
    let before = bed.table("t");
    let change = bed.change("UPDATE t SET note = note || '!'");
    assert_eq!(bed.table("t"), ["(1,n1!,o1)", "(2,n2!,o2)", "(3,n3!,o3)"]);
    let kept = images(&mut bed);
    assert_eq!(kept.len(), 3);
    let names: std::collections::BTreeSet<&str> =
        kept.iter().map(|image| if image.contains("note") { "note" } else { "other" }).collect();
    assert_eq!(names.len(), 1, "{kept:?}");
    bed.run("ALTER TABLE t DISABLE TRIGGER swap");
    assert_eq!(bed.undo(&format!("{change}")), one("public.t", 3, 0));
    assert_eq!(bed.table("t"), before);
    assert_alive();
}

#[test]
fn code_that_runs_while_rows_are_put_back_changes_the_table() {
    for ddl in [
        "ALTER TABLE t ALTER other TYPE int USING 5",
        "ALTER TABLE t RENAME note TO x; ALTER TABLE t RENAME other TO note; ALTER TABLE t RENAME x TO other",
        "ALTER TABLE t DROP other",
        "ALTER TABLE t RENAME TO u",
    ] {
        let mut bed = Bed::new(&format!(
            "CREATE FUNCTION ok(v int) RETURNS bool LANGUAGE plpgsql AS $$ BEGIN
                IF current_setting('evil.go', true) = 'yes' AND to_regclass('done') IS NULL THEN
                    CREATE TABLE done (); {ddl};
                END IF;
                RETURN true; END $$;
             CREATE DOMAIN checked AS int CHECK (ok(VALUE)); {NOTES}; ALTER TABLE t ADD c checked DEFAULT 1"
        ));
        let change = bed.change("UPDATE t SET note = 'x', other = repeat('o', 100), c = 2; DELETE FROM t WHERE id = 3");
        let before = bed.table("t");
        bed.run("SET evil.go = yes");
        for sql in [
            format!("SELECT * FROM writeguard.undo({change})"),
            format!("SELECT * FROM writeguard.undo_conflicts({change})"),
        ] {
            // What fails first depends on the change; nothing is written, and no value is taken for another.
            let result = bed.admin.batch_execute(&sql);
            if sql.contains("conflicts") && result.is_ok() {
                bed.run("DROP TABLE done");
                continue;
            }
            let refusal = expect_refusal(result);
            assert_ne!(refusal.sqlstate, "XX000", "{ddl}: {refusal:?}");
        }
        assert_alive();
        if !ddl.contains("TO u") && bed.rows("SELECT to_regclass('done')::text") == ["NULL"] {
            assert_eq!(bed.table("t"), before, "{ddl}");
        }
    }
}

#[test]
fn what_is_known_of_a_table_is_known_once() {
    let mut bed = Bed::new(NOTES);
    let contexts = "SELECT count(*)::text FROM pg_backend_memory_contexts WHERE name = 'pg_writeguard printer'";
    bed.run("SET writeguard.capture_undo = on");
    // One statement whose table changes again and again.
    bed.run(
        "BEGIN; DO $$ BEGIN FOR i IN 1..500 LOOP
            UPDATE t SET note = 'x' || i WHERE id = 1;
            EXECUTE format('ALTER TABLE t SET (fillfactor = %s)', 50 + i % 50);
         END LOOP; END $$",
    );
    assert_eq!(kept::rows(&mut bed.admin, contexts), ["1"]);
    bed.run("COMMIT");
    // Many statements on one table.
    bed.run("BEGIN");
    for number in 0..300 {
        bed.run(&format!("UPDATE t SET note = 'y{number}' WHERE id = 2"));
    }
    assert_eq!(kept::rows(&mut bed.admin, contexts), ["1"]);
    bed.run("COMMIT");
    assert_eq!(kept::rows(&mut bed.admin, contexts), ["0"]);
    assert_eq!(bed.rows("SELECT count(*)::text FROM writeguard.change_statement"), ["301"]);
    assert_alive();
}

#[test]
fn serializable_transactions_do_not_meet_in_the_kept_rows() {
    let mut bed = Bed::new(
        "CREATE TABLE u1 (id int PRIMARY KEY, v int); INSERT INTO u1 SELECT i, i FROM generate_series(1, 3) AS i;
         CREATE TABLE u2 (LIKE u1 INCLUDING ALL); INSERT INTO u2 TABLE u1",
    );
    for (round, mode) in ["capture_undo", "override", "capture_undo"].into_iter().enumerate() {
        if mode == "override" {
            bed.run("SELECT writeguard.set_policy('kept', undo => '1 day', max_rows => 0, override => 'flag')");
        }
        // The one reads what the other writes, so it comes first in any order, though it commits last. Were anything of
        // ours read by the other and written by the one, neither could be first.
        let [mut one, mut other] = [(); 2].map(|()| {
            let mut session = bed.db.admin();
            session
                .batch_execute(&format!("SET writeguard.{mode} = on; SET writeguard.override = on"))
                .expect("settings");
            session.batch_execute("BEGIN ISOLATION LEVEL SERIALIZABLE").expect("begins");
            session
        });
        one.batch_execute("SELECT sum(v) FROM u1").expect("reads");
        let write = |table| format!("UPDATE {table} SET v = v + 1; DELETE FROM {table} WHERE id = {round} + 1");
        one.batch_execute(&write("u2")).expect("writes");
        other.batch_execute(&write("u1")).expect("writes");
        other.batch_execute("COMMIT").unwrap_or_else(|error| panic!("{mode}: {error:?}"));
        one.batch_execute("COMMIT").unwrap_or_else(|error| panic!("{mode}: {error:?}"));
    }
    assert_eq!(bed.rows("SELECT count(*)::text FROM writeguard.change"), ["12"]);
    // Nothing but the code ties their tables together.
    bed.run("SELECT writeguard.discard(id) FROM writeguard.change_statement");
    assert_eq!(bed.rows("SELECT count(*)::text FROM writeguard.change_relation"), ["0"]);
}

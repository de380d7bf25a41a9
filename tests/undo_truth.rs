//! What undo says is so: a row that cannot come back is a conflict that is told with its key, and not counted as restored.

use crate::common::kept::{Bed, one};

/// Tries an undo of which some rows cannot be written, in every mode. `restored` and `conflicts` are of the table `t`, `keys`
/// those of the conflicts.
#[track_caller]
fn conflicts(bed: &mut Bed, change: i64, restored: i64, keys: &[&str], says: &str) {
    let before = bed.table("t");
    let conflicts = i64::try_from(keys.len()).expect("a few");
    let refusal = bed.refused(&format!("SELECT writeguard.undo({change})"));
    assert_eq!(refusal.sqlstate, "WG009", "{refusal:?}");
    assert!(refusal.detail.contains(keys[0]) && refusal.detail.contains(says), "{refusal:?}");
    assert!(!format!("{refusal:?}").contains("writeguard_rows"), "{refusal:?}");
    assert_eq!(bed.table("t"), before);
    let told = bed.rows(&format!("SELECT key::text FROM writeguard.undo_conflicts({change}) ORDER BY 1"));
    let keys: Vec<String> = keys
        .iter()
        .map(|key| format!("{{\"id\": {}}}", key.trim_start_matches("(id)=(").trim_end_matches(')')))
        .collect();
    assert_eq!(told, keys);
    assert_eq!(bed.undo(&format!("{change}, dry_run => true")), one("public.t", restored, conflicts));
    assert_eq!(bed.table("t"), before);
    assert_eq!(bed.undo(&format!("{change}, 'skip'")), one("public.t", restored, conflicts));
}

#[test]
fn a_unique_value_that_another_row_holds_by_now_is_a_conflict() {
    // As a column, an expression, a part of the table, and an exclusion.
    for unique in [
        "UNIQUE (u)",
        "UNIQUE (u) DEFERRABLE INITIALLY DEFERRED",
        "EXCLUDE USING btree (u WITH =)",
        "EXCLUDE USING btree ((u + 1) WITH =) WHERE (u > 0)",
    ] {
        let setup = format!(
            "CREATE TABLE t (id int PRIMARY KEY, u int, v int, {unique});
             INSERT INTO t SELECT i, i * 10, 0 FROM generate_series(1, 40) AS i"
        );
        for (write, taken, restored, keys) in [
            ("DELETE FROM t WHERE id <= 30", "INSERT INTO t VALUES (99, 70, 0)", 29, &["(id)=(7)"][..]),
            ("DELETE FROM t WHERE id = 7", "INSERT INTO t VALUES (99, 70, 0)", 0, &["(id)=(7)"]),
            ("UPDATE t SET u = -u", "INSERT INTO t VALUES (99, 70, 0), (98, 80, 0)", 38, &["(id)=(7)", "(id)=(8)"]),
            ("UPDATE t SET u = u + 1000, v = 1 WHERE id < 20", "INSERT INTO t VALUES (99, 190, 0)", 18, &["(id)=(19)"]),
        ] {
            let mut bed = Bed::new(&setup);
            let before = bed.table("t");
            let change = bed.change(write);
            bed.run(taken);
            conflicts(&mut bed, change, restored, keys, "violates");
            let (now, kept) = (bed.table("t"), |row: &&String| !row.starts_with("(99") && !row.starts_with("(98"));
            let came_back = now.iter().filter(kept).filter(|row| before.contains(row)).count();
            assert_eq!(came_back, before.len() - keys.len(), "{unique}: {write}: {now:?}");
        }
    }
}

#[test]
fn what_a_constraint_does_not_allow_any_more_is_a_conflict() {
    let setup = "CREATE TABLE up (id int PRIMARY KEY); INSERT INTO up SELECT generate_series(1, 30);
         CREATE TABLE t (id int PRIMARY KEY, up int CONSTRAINT up REFERENCES up, v int);
         INSERT INTO t SELECT i, i, i FROM generate_series(1, 30) AS i";
    for (write, then, restored, keys, says) in [
        (
            "DELETE FROM t",
            "DELETE FROM up WHERE id IN (3, 4)",
            28,
            &["(id)=(3)", "(id)=(4)"][..],
            "is not present in table",
        ),
        ("UPDATE t SET up = 1", "DELETE FROM up WHERE id = 30", 29, &["(id)=(30)"], "is not present in table"),
        (
            "UPDATE t SET v = 100",
            "ALTER TABLE t ADD CHECK (v > 2)",
            28,
            &["(id)=(1)", "(id)=(2)"],
            "violates check constraint",
        ),
        (
            "DELETE FROM t WHERE v < 5",
            "ALTER TABLE t ADD CHECK (v <> 4)",
            3,
            &["(id)=(4)"],
            "violates check constraint",
        ),
        (
            "DELETE FROM t WHERE id = 5",
            "ALTER TABLE t ADD w int NOT NULL DEFAULT 1; ALTER TABLE t ALTER w DROP DEFAULT",
            0,
            &["(id)=(5)"],
            "violates not-null",
        ),
        (
            "DELETE FROM t WHERE id > 20",
            "ALTER TABLE t ALTER CONSTRAINT up DEFERRABLE INITIALLY DEFERRED; DELETE FROM up WHERE id = 25",
            9,
            &["(id)=(25)"],
            "is not present in table",
        ),
    ] {
        let mut bed = Bed::new(setup);
        let change = bed.change(write);
        bed.run(then);
        conflicts(&mut bed, change, restored, keys, says);
    }
}

#[test]
fn a_row_whose_partition_is_gone_is_a_conflict() {
    let mut bed = Bed::new(
        "CREATE TABLE t (id int PRIMARY KEY, v int) PARTITION BY RANGE (id);
         CREATE TABLE t1 PARTITION OF t FOR VALUES FROM (1) TO (10); CREATE TABLE t2 PARTITION OF t FOR VALUES FROM (10) TO (20);
         INSERT INTO t SELECT i, i FROM generate_series(8, 11) AS i",
    );
    let change = bed.change("DELETE FROM t WHERE id <> 11");
    bed.run("ALTER TABLE t DETACH PARTITION t2");
    conflicts(&mut bed, change, 2, &["(id)=(10)"], "no partition of relation");
}

#[test]
fn rows_that_need_each_other_come_back_beside_one_that_cannot() {
    // A tree that refers to itself, deleted from the leaves on and from the root on.
    for cascade in ["", "ON DELETE CASCADE"] {
        let mut bed = Bed::new(&format!(
            "CREATE TABLE t (id int PRIMARY KEY, up int REFERENCES t {cascade}, u int UNIQUE);
             INSERT INTO t SELECT i, NULLIF(i / 2, 0), i FROM generate_series(1, 60) AS i"
        ));
        let before = bed.table("t");
        let change = bed.change("DELETE FROM t");
        bed.run("INSERT INTO t VALUES (100, NULL, 60)");
        conflicts(&mut bed, change, 59, &["(id)=(60)"], "already exists");
        bed.run("DELETE FROM t WHERE id = 100; INSERT INTO t VALUES (60, 30, 60)");
        assert_eq!(bed.table("t"), before);
    }
}

#[test]
fn undo_conflicts_needs_no_right_to_write() {
    let mut bed = Bed::new("CREATE TABLE t (id int PRIMARY KEY, v int); INSERT INTO t VALUES (1, 1), (2, 2)");
    let change = bed.change("UPDATE t SET v = 0");
    bed.run("UPDATE t SET v = 5 WHERE id = 2");
    let role = bed.db.role("reader");
    bed.run(&format!("GRANT SELECT ON t TO {role}; GRANT EXECUTE ON FUNCTION writeguard.undo_conflicts TO {role}"));
    let mut reader = bed.db.connect(&role);
    let sql = format!("SELECT is_now::text FROM writeguard.undo_conflicts({change})");
    assert_eq!(crate::common::kept::rows(&mut reader, &sql), [r#"{"v": 5}"#]);
    reader.batch_execute("SET default_transaction_read_only = on").expect("a setting");
    assert_eq!(crate::common::kept::rows(&mut reader, &sql), [r#"{"v": 5}"#]);
    assert_eq!(bed.table("t"), ["(1,0)", "(2,5)"]);
}

#[test]
fn what_triggers_make_of_a_row_is_told() {
    let mut bed = Bed::new(
        "CREATE TABLE t (id int PRIMARY KEY, v int, w int DEFAULT 0); INSERT INTO t SELECT i, i FROM generate_series(1, 4) AS i;
         CREATE FUNCTION meddle() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
             IF NEW.id = 2 THEN NEW.v = 77; END IF; IF NEW.id = 3 THEN RETURN NULL; END IF; RETURN NEW; END $$",
    );
    let change = bed.change("UPDATE t SET v = 0");
    bed.run("CREATE TRIGGER meddle BEFORE UPDATE ON t FOR EACH ROW EXECUTE FUNCTION meddle()");
    let refusal = bed.refused(&format!("SELECT writeguard.undo({change}, triggers => 'fire')"));
    assert_eq!(refusal.sqlstate, "WG009", "{refusal:?}");
    assert!(refusal.detail.contains("2 rows") && refusal.detail.contains("(id)=(2)"), "{refusal:?}");
    assert_eq!(bed.undo(&format!("{change}, 'skip', triggers => 'fire'")), one("public.t", 2, 2));
    assert_eq!(bed.table("t"), ["(1,1,0)", "(2,77,0)", "(3,0,0)", "(4,4,0)"]);
}

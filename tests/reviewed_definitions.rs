//! An approval is for what the statement met when it was reviewed: a table, view or function that was altered since, or
//! another one that its name means now, is something else than what was approved.

use crate::common::approvals::{Stage, arm, pass, refused};

/// Reads a view and calls functions of all kinds; a trigger has a share in what is written.
const WRITE: &str = "UPDATE t SET a = doubled(v.n) + inlined(v.n) FROM v WHERE v.id = t.id";

const SETUP: &str = "
    CREATE TABLE source (id int PRIMARY KEY, n int DEFAULT 1);
    INSERT INTO source SELECT generate_series(1, 5), 4;
    CREATE VIEW v AS SELECT id, n FROM source;
    CREATE FUNCTION doubled(n int) RETURNS int LANGUAGE plpgsql AS 'BEGIN RETURN 2 * helped(n); END';
    CREATE FUNCTION helped(n int) RETURNS int LANGUAGE plpgsql AS 'BEGIN RETURN n; END';
    CREATE FUNCTION inlined(n int) RETURNS int LANGUAGE sql IMMUTABLE AS 'SELECT 1';
    CREATE FUNCTION touched() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END';
    CREATE TRIGGER touched BEFORE UPDATE ON t FOR EACH ROW EXECUTE FUNCTION touched();
    GRANT ALL ON source, v TO PUBLIC;
    GRANT CREATE ON SCHEMA public TO PUBLIC";

/// Refused by token and by execute; the approval stays.
#[track_caller]
fn assert_bound(alteration: &str, name: &str) {
    let mut stage = Stage::new(SETUP);
    let (id, token) = stage.approved(WRITE);
    pass(&mut stage.admin, alteration);
    let mut client = stage.requester();
    for by_token in [true, false] {
        let refusal = if by_token {
            arm(&mut client, &token);
            refused(&mut client, WRITE, "WG006")
        } else {
            refused(&mut client, &format!("SELECT writeguard.execute({id})"), "WG006")
        };
        assert!(refusal.message.contains("altered since it was reviewed"), "{alteration}: {refusal:?}");
        assert!(refusal.detail.contains(&format!("{name} is another one now")), "{alteration}: {refusal:?}");
        assert_eq!((stage.changed(), stage.state(id).as_str()), (0, "approved"), "{alteration}");
    }
}

#[test]
fn tables_are_what_was_reviewed() {
    for alteration in [
        "ALTER TABLE t RENAME a TO b; ALTER TABLE t ADD a int",
        "ALTER TABLE t ALTER a TYPE bigint",
        "ALTER TABLE t ALTER a SET DEFAULT 7",
        "ALTER TABLE t ADD c int GENERATED ALWAYS AS (a + 1) STORED",
        "CREATE TRIGGER more BEFORE UPDATE ON t FOR EACH ROW EXECUTE FUNCTION touched()",
        "ALTER TABLE t DISABLE TRIGGER touched",
        "CREATE RULE also AS ON UPDATE TO t DO ALSO NOTIFY something",
        "CREATE POLICY few ON t USING (id < 3)",
        "CREATE TABLE k (id int REFERENCES t ON UPDATE CASCADE)",
        "DROP TABLE t; CREATE TABLE t (id int PRIMARY KEY, a int DEFAULT 0); INSERT INTO t SELECT generate_series(1, 5); \
         GRANT ALL ON t TO PUBLIC",
    ] {
        assert_bound(alteration, "public.t");
    }
}

#[test]
fn views_and_what_they_read_are_what_was_reviewed() {
    assert_bound("CREATE OR REPLACE VIEW v AS SELECT id, n + 1 AS n FROM source", "public.v");
    assert_bound("ALTER TABLE source ALTER n SET DEFAULT 2", "public.source");
}

#[test]
fn functions_are_what_was_reviewed() {
    for (alteration, name) in [
        (
            "CREATE OR REPLACE FUNCTION doubled(n int) RETURNS int LANGUAGE plpgsql AS 'BEGIN RETURN 9; END'",
            "public.doubled",
        ),
        (
            "CREATE OR REPLACE FUNCTION helped(n int) RETURNS int LANGUAGE plpgsql AS 'BEGIN RETURN 9; END'",
            "public.helped",
        ),
        (
            "CREATE OR REPLACE FUNCTION inlined(n int) RETURNS int LANGUAGE sql IMMUTABLE AS 'SELECT 9'",
            "public.inlined",
        ),
        (
            "CREATE OR REPLACE FUNCTION touched() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN NEW.a = 9; RETURN NEW; END'",
            "public.touched",
        ),
        ("ALTER FUNCTION doubled(int) SET work_mem = '1MB'", "public.doubled"),
        ("ALTER FUNCTION doubled(int) SECURITY DEFINER", "public.doubled"),
    ] {
        assert_bound(alteration, name);
    }
}

#[test]
fn what_changes_no_meaning_is_no_hindrance() {
    let mut stage = Stage::new(SETUP);
    let (id, token) = stage.approved(WRITE);
    pass(
        &mut stage.admin,
        "CREATE INDEX ON t (a); ANALYZE t; GRANT SELECT ON source TO CURRENT_USER; COMMENT ON TABLE t IS 'a table';
         ALTER TABLE t SET (fillfactor = 50); CLUSTER t USING t_pkey; REINDEX TABLE t; CREATE VIEW w AS SELECT * FROM t",
    );
    let mut client = stage.requester();
    arm(&mut client, &token);
    pass(&mut client, WRITE);
    assert_eq!((stage.changed(), stage.state(id).as_str()), (5, "spent"));
}

/// Another table takes the place of one that was met, for this requester alone.
#[track_caller]
fn assert_not_shadowed(shadow: impl Fn(&Stage) -> String) {
    for by_token in [true, false] {
        let mut stage = Stage::new(SETUP);
        stage.admin.batch_execute(&format!("CREATE SCHEMA {0} AUTHORIZATION {0}", stage.requester)).unwrap();
        let (id, token) = stage.approved(WRITE);
        let mut client = stage.requester();
        pass(&mut client, &shadow(&stage));
        let refusal = if by_token {
            arm(&mut client, &token);
            refused(&mut client, WRITE, "WG006")
        } else {
            refused(&mut client, &format!("SELECT writeguard.execute({id})"), "WG006")
        };
        assert!(refusal.message.contains("a table that was not reviewed"), "{refusal:?}");
        assert!(refusal.detail.contains(".v\" was not met"), "{refusal:?}");
        assert_eq!((stage.number("SELECT sum(a) FROM t"), stage.state(id).as_str()), (0, "approved"));
    }
}

#[test]
fn no_other_table_stands_for_one_that_was_reviewed() {
    assert_not_shadowed(|_| "CREATE TEMP TABLE v AS SELECT id, 100 AS n FROM source".into());
    assert_not_shadowed(|_| "CREATE TEMP VIEW v AS SELECT id, 100 AS n FROM source".into());
    assert_not_shadowed(|stage| format!("CREATE TABLE {}.v AS SELECT id, 100 AS n FROM source", stage.requester));
}

#[test]
fn new_partitions_of_a_reviewed_table_are_no_other_tables() {
    let setup = "CREATE TABLE part (id int PRIMARY KEY, a int) PARTITION BY RANGE (id);
                 CREATE TABLE part_1 PARTITION OF part FOR VALUES FROM (0) TO (10);
                 INSERT INTO part SELECT generate_series(1, 5), 0; GRANT ALL ON part TO PUBLIC;
                 SELECT writeguard.set_policy('part', tables => '{public.part}', max_rows => 3)";
    let mut stage = Stage::new(setup);
    let write = "UPDATE part SET a = 9";
    let (id, token) = stage.approved(write);
    pass(&mut stage.admin, "CREATE TABLE part_2 PARTITION OF part FOR VALUES FROM (10) TO (20)");
    let mut client = stage.requester();
    arm(&mut client, &token);
    pass(&mut client, write);
    assert_eq!(stage.state(id), "spent");
}

#[test]
fn a_function_that_was_not_called_by_the_review_but_by_the_write_changes_no_other_rows() {
    // Which way a function goes can depend on the session; what it writes is bound by rows and tables.
    let mut stage = Stage::new(
        "CREATE TABLE other (id int PRIMARY KEY, a int); INSERT INTO other VALUES (1, 0); GRANT ALL ON other TO PUBLIC;
         CREATE FUNCTION either() RETURNS int LANGUAGE plpgsql AS $$
             BEGIN
                 IF current_setting('my.way', true) = 'other' THEN UPDATE other SET a = 1; END IF;
                 RETURN 9;
             END $$",
    );
    let write = "UPDATE t SET a = either()";
    let (id, token) = stage.approved(write);
    let mut client = stage.requester();
    pass(&mut client, "SET my.way = 'other'");
    arm(&mut client, &token);
    let refusal = refused(&mut client, write, "WG006");
    assert!(refusal.detail.contains("\"public.other\" was not met"), "{refusal:?}");
    assert_eq!((stage.changed(), stage.state(id).as_str()), (0, "approved"));
    assert_eq!(stage.number("SELECT a FROM other"), 0);
}

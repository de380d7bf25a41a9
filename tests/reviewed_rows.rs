//! An approval is for the rows that were reviewed: as many others are other rows, whichever way they come in.

use crate::common::approvals::{Stage, approve, arm, number, pass, refused, request, text};

/// The rows that it changes depend on what is there.
const WRITE: &str = "UPDATE t SET a = 9 WHERE a = 0";

const OTHER_ROWS: &str = "the write changes other rows than were reviewed";

/// One of the reviewed rows is changed by somebody else, and one comes in: the number stays.
const ANOTHER_ROW: &str = "UPDATE t SET a = 1 WHERE id = 5; INSERT INTO t VALUES (6, 0)";

/// What a token opened is refused after all, and can be used again.
#[track_caller]
fn assert_refused_unspent(stage: &mut Stage, write: &str, detail: &str) {
    let (id, token) = stage.approved(write);
    stage.unguarded(ANOTHER_ROW);
    let mut client = stage.requester();
    arm(&mut client, &token);
    let refusal = refused(&mut client, write, "WG006");
    assert!(refusal.message.contains(OTHER_ROWS), "{refusal:?}");
    assert_eq!(refusal.detail, detail.replace("{id}", &id.to_string()));
    assert_eq!((stage.changed(), stage.state(id).as_str()), (0, "approved"));
    stage.unguarded("UPDATE t SET a = 0 WHERE id = 5; DELETE FROM t WHERE id = 6");
    arm(&mut client, &token);
    pass(&mut client, write);
    assert_eq!((stage.changed(), stage.state(id).as_str()), (5, "spent"));
}

#[test]
fn a_token_opens_nothing_for_as_many_other_rows() {
    assert_refused_unspent(
        &mut Stage::new(""),
        WRITE,
        "Request {id} was approved for certain rows of \"public.t\": 1 of them is missing, and 1 other row would change; \
         nothing was changed.",
    );
}

#[test]
fn execute_changes_no_other_rows() {
    let mut stage = Stage::new("");
    let (id, _) = stage.approved(WRITE);
    stage.unguarded(ANOTHER_ROW);
    let mut client = stage.requester();
    let refusal = refused(&mut client, &format!("SELECT writeguard.execute({id})"), "WG006");
    assert!(refusal.message.contains("it would change other rows than were reviewed"), "{refusal:?}");
    assert!(refusal.detail.contains("1 of them is missing, and 1 other row would change"), "{refusal:?}");
    assert_eq!((stage.changed(), stage.state(id).as_str()), (0, "approved"));
    stage.unguarded("UPDATE t SET a = 0 WHERE id = 5; DELETE FROM t WHERE id = 6");
    pass(&mut client, &format!("SELECT writeguard.execute({id})"));
    assert_eq!(stage.changed(), 5);
}

#[test]
fn fewer_rows_are_other_rows() {
    let mut stage = Stage::new("");
    let (id, token) = stage.approved(WRITE);
    stage.unguarded("DELETE FROM t WHERE id = 5");
    let mut client = stage.requester();
    arm(&mut client, &token);
    let refusal = refused(&mut client, WRITE, "WG006");
    assert!(refusal.detail.ends_with(": 1 of them is missing; nothing was changed."), "{refusal:?}");
    assert_eq!((stage.changed(), stage.state(id).as_str()), (0, "approved"));
    // In a block it is told at once as well: nothing here can be deferred.
    pass(&mut client, "BEGIN");
    arm(&mut client, &token);
    refused(&mut client, WRITE, "WG006");
    pass(&mut client, "ROLLBACK");
    let kinds = "SELECT count(*) FROM writeguard.event WHERE kind = 'token_refused' AND statement LIKE 'UPDATE t SET%'";
    assert_eq!(stage.number(kinds), 2);
    assert!(stage.overridden().is_empty());
}

#[test]
fn the_same_key_twice_is_another_write() {
    // The key stays and the row's other columns are others: what was reviewed is which rows, not what they hold.
    let mut stage = Stage::new("");
    let (_, token) = stage.approved(WRITE);
    stage.unguarded("UPDATE t SET a = 0 WHERE id = 1");
    let mut client = stage.requester();
    arm(&mut client, &token);
    pass(&mut client, WRITE);
    assert_eq!(stage.changed(), 5);
    // A delete of the rows whose update was reviewed is another statement, and another operation on them.
    let swap = "WITH gone AS (DELETE FROM t WHERE b = 'x' RETURNING id) UPDATE t SET a = 8 WHERE b = 'y'";
    let mut stage = Stage::new("ALTER TABLE t ADD b text");
    stage.unguarded("UPDATE t SET b = CASE WHEN id < 3 THEN 'x' ELSE 'y' END");
    let (_, token) = stage.approved(swap);
    stage.unguarded("UPDATE t SET b = CASE WHEN id IN (2, 3) THEN 'x' ELSE 'y' END");
    let mut client = stage.requester();
    arm(&mut client, &token);
    let refusal = refused(&mut client, swap, "WG006");
    assert!(refusal.message.contains(OTHER_ROWS), "{refusal:?}");
    assert_eq!(stage.number("SELECT count(*) FROM t WHERE a = 8"), 0);
    assert_eq!(stage.number("SELECT count(*) FROM t"), 5);
}

/// Writes of all kinds, whose rows are the reviewed ones: they pass, by token and by execute.
#[test]
fn the_reviewed_rows_pass_whatever_the_write() {
    let setup = "
        CREATE TABLE part (k int, r text, b int, PRIMARY KEY (r, k)) PARTITION BY LIST (k);
        CREATE TABLE part_1 (b int, r text NOT NULL, k int NOT NULL);
        ALTER TABLE part ATTACH PARTITION part_1 FOR VALUES IN (1);
        CREATE TABLE part_2 PARTITION OF part FOR VALUES IN (2);
        INSERT INTO part SELECT 1, 'row ' || n, n FROM generate_series(1, 6) AS n;
        CREATE TABLE parent (id uuid PRIMARY KEY);
        CREATE TABLE child (name name PRIMARY KEY, at numeric, parent uuid REFERENCES parent ON DELETE CASCADE);
        INSERT INTO parent SELECT ('00000000-0000-0000-0000-00000000000' || n)::uuid FROM generate_series(1, 5) AS n;
        INSERT INTO child SELECT 'c' || n, n, id FROM parent, generate_series(1, 2) AS n WHERE false;
        INSERT INTO child SELECT 'c' || id, 1.50, id FROM parent;
        CREATE TABLE wide (k text PRIMARY KEY, a int);
        ALTER TABLE wide ALTER k SET STORAGE MAIN;
        INSERT INTO wide SELECT repeat('k', 2000) || n FROM generate_series(1, 5) AS n;
        GRANT ALL ON part, part_1, part_2, parent, child, wide TO PUBLIC;
        SELECT writeguard.set_policy('all', tables => '{public.*}', max_rows => 3);
        CREATE FUNCTION in_a_block() RETURNS int LANGUAGE plpgsql AS $$
            BEGIN
                BEGIN
                    UPDATE t SET a = 7;
                    RAISE SQLSTATE 'P0001';
                EXCEPTION WHEN SQLSTATE 'P0001' THEN
                    BEGIN UPDATE t SET a = 6; EXCEPTION WHEN OTHERS THEN RAISE; END;
                END;
                RETURN 1;
            END $$";
    for write in [
        "UPDATE part SET b = 0",
        "UPDATE part SET k = 2",
        "DELETE FROM parent",
        "DELETE FROM child WHERE at = 1.5",
        "UPDATE wide SET a = 1",
        "MERGE INTO t USING generate_series(2, 9) AS s (id) ON t.id = s.id \
         WHEN MATCHED AND s.id = 2 THEN DELETE WHEN MATCHED THEN UPDATE SET a = 4 \
         WHEN NOT MATCHED THEN INSERT VALUES (s.id, 0)",
        "INSERT INTO t SELECT generate_series(1, 9), 3 ON CONFLICT (id) DO UPDATE SET a = 3",
        "WITH u AS (UPDATE t SET a = 1 WHERE id < 3 RETURNING id) DELETE FROM t WHERE id IN (SELECT id + 2 FROM u)",
        "UPDATE t SET id = id + 100",
        "SELECT in_a_block()",
        "TRUNCATE child",
    ] {
        for by_token in [true, false] {
            let mut stage = Stage::new(setup);
            let (id, token) = stage.approved(write);
            let mut client = stage.requester();
            if by_token {
                arm(&mut client, &token);
                pass(&mut client, write);
            } else {
                pass(&mut client, &format!("SELECT * FROM writeguard.execute({id})"));
            }
            assert_eq!(stage.state(id), "spent", "{write}");
        }
    }
}

/// The same writes after one row was exchanged for another one.
#[test]
fn other_rows_are_refused_whatever_the_write() {
    let setup = "
        CREATE TABLE part (k int, r text, b int, PRIMARY KEY (r, k)) PARTITION BY LIST (k);
        CREATE TABLE part_1 (b int, r text NOT NULL, k int NOT NULL);
        ALTER TABLE part ATTACH PARTITION part_1 FOR VALUES IN (1);
        CREATE TABLE part_2 PARTITION OF part FOR VALUES IN (2);
        INSERT INTO part SELECT 1, 'row ' || n, n FROM generate_series(1, 5) AS n;
        CREATE TABLE parent (id int PRIMARY KEY);
        CREATE TABLE child (id int PRIMARY KEY, parent int REFERENCES parent ON DELETE CASCADE);
        INSERT INTO parent VALUES (1);
        INSERT INTO child SELECT n, 1 FROM generate_series(1, 5) AS n;
        GRANT ALL ON part, part_1, part_2, parent, child TO PUBLIC;
        SELECT writeguard.set_policy('all', tables => '{public.*}', max_rows => 3)";
    for (write, exchange) in [
        ("UPDATE part SET b = 0", "UPDATE part SET r = 'other' WHERE b = 3"),
        ("UPDATE part SET k = 2", "DELETE FROM part WHERE b = 3; INSERT INTO part VALUES (1, 'other', 3)"),
        ("DELETE FROM parent", "UPDATE child SET id = 9 WHERE id = 2"),
        (
            "MERGE INTO t USING generate_series(2, 9) AS s (id) ON t.id = s.id WHEN MATCHED THEN UPDATE SET a = 4",
            "UPDATE t SET id = 6 WHERE id = 2",
        ),
        (
            "INSERT INTO t SELECT generate_series(1, 9), 3 ON CONFLICT (id) DO UPDATE SET a = 3",
            "UPDATE t SET id = 6 WHERE id = 2",
        ),
    ] {
        for by_token in [true, false] {
            let mut stage = Stage::new(setup);
            let (id, token) = stage.approved(write);
            stage.unguarded(exchange);
            let mut client = stage.requester();
            let refusal = if by_token {
                arm(&mut client, &token);
                refused(&mut client, write, "WG006")
            } else {
                refused(&mut client, &format!("SELECT * FROM writeguard.execute({id})"), "WG006")
            };
            assert!(refusal.message.contains("other rows than were reviewed"), "{write}: {refusal:?}");
            assert!(refusal.detail.contains(": 1 of them is missing, and 1 other row would"), "{write}: {refusal:?}");
            assert_eq!(stage.state(id), "approved", "{write}");
        }
    }
}

#[test]
fn without_a_primary_key_the_number_binds_and_the_reviewer_is_told() {
    let setup = "CREATE TABLE heap (a int); INSERT INTO heap SELECT generate_series(1, 5); GRANT ALL ON heap TO PUBLIC;
                 SELECT writeguard.set_policy('h', tables => '{public.heap}', max_rows => 3)";
    let mut stage = Stage::new(setup);
    let write = "UPDATE heap SET a = a WHERE a > 0";
    let id = request(&mut stage.requester(), write, &[]);
    let notes = text(&mut stage.approver(), "SELECT notes FROM writeguard.pending");
    assert_eq!(notes, "bound to the number of rows alone, not to which rows they are: public.heap");
    let token = approve(&mut stage.approver(), id);
    stage.unguarded("UPDATE heap SET a = 100 WHERE a = 1");
    let mut client = stage.requester();
    arm(&mut client, &token);
    pass(&mut client, write);
    assert_eq!(stage.state(id), "spent");
    let id = request(&mut stage.requester(), "UPDATE t SET a = 9", &[]);
    let notes = format!("SELECT coalesce(notes, 'none') FROM writeguard.pending WHERE id = {id}");
    assert_eq!(text(&mut stage.approver(), &notes), "none");
}

#[test]
fn an_approvers_own_maximum_is_for_whichever_rows() {
    let mut stage = Stage::new("");
    let id = request(&mut stage.requester(), WRITE, &[]);
    let token = text(&mut stage.approver(), &format!("SELECT writeguard.approve({id}, max_rows => 5)"));
    stage.unguarded(ANOTHER_ROW);
    let mut client = stage.requester();
    arm(&mut client, &token);
    pass(&mut client, WRITE);
    assert_eq!(stage.changed(), 5);
}

#[test]
fn what_a_savepoint_takes_back_is_none_of_the_rows() {
    let mut stage = Stage::new("");
    let (id, token) = stage.approved(WRITE);
    let mut client = stage.requester();
    arm(&mut client, &token);
    pass(&mut client, "BEGIN; SAVEPOINT s");
    pass(&mut client, WRITE);
    pass(&mut client, "ROLLBACK TO s");
    pass(&mut client, WRITE);
    pass(&mut client, "COMMIT");
    assert_eq!((stage.changed(), stage.state(id).as_str()), (5, "spent"));
}

#[test]
fn what_the_statement_defers_belongs_to_its_rows() {
    let setup = "CREATE TABLE late (id int PRIMARY KEY, a int); INSERT INTO late VALUES (1, 0), (2, 0);
         GRANT ALL ON late TO PUBLIC;
         CREATE FUNCTION later() RETURNS trigger LANGUAGE plpgsql AS $$
             BEGIN UPDATE late SET a = a + 1 WHERE id = (SELECT min(id) FROM late); RETURN NULL; END $$;
         CREATE CONSTRAINT TRIGGER later AFTER UPDATE ON t DEFERRABLE INITIALLY DEFERRED
             FOR EACH ROW EXECUTE FUNCTION later();
         SELECT writeguard.set_policy('late', tables => '{public.late}', max_rows => 5)";
    for in_block in [false, true] {
        let mut stage = Stage::new(setup);
        let mut client = stage.requester();
        let mut run = |stage: &mut Stage, passes: bool| {
            let (id, token) = stage.approved(WRITE);
            if !passes {
                stage.unguarded("UPDATE late SET id = 0 WHERE id = 2");
            }
            arm(&mut client, &token);
            if in_block {
                pass(&mut client, "BEGIN");
                pass(&mut client, WRITE);
            }
            let last = if in_block { "COMMIT" } else { WRITE };
            if passes {
                pass(&mut client, last);
            } else {
                let refusal = refused(&mut client, last, "WG006");
                assert!(refusal.message.contains(OTHER_ROWS), "{refusal:?}");
            }
            assert_eq!(stage.state(id), if passes { "spent" } else { "approved" });
        };
        run(&mut stage, false);
        assert_eq!(stage.number("SELECT sum(a) FROM t"), 0);
        stage.unguarded("UPDATE late SET id = 2 WHERE id = 0");
        run(&mut stage, true);
        assert_eq!(stage.number("SELECT a FROM late WHERE id = 1"), 5);
    }
}

#[test]
fn armed_in_the_middle_of_the_statement_nobody_knows_the_rows_before() {
    let mut stage = Stage::new(
        "CREATE FUNCTION armed(token text) RETURNS int LANGUAGE plpgsql AS $$
             BEGIN
                 PERFORM set_config('writeguard.override', 'on', false), set_config('writeguard.token', token, false);
                 RETURN 9;
             END $$;
         CREATE TABLE token (t text); GRANT ALL ON token TO PUBLIC",
    );
    let write = "UPDATE t SET a = CASE WHEN id = 2 THEN armed((SELECT t FROM token)) ELSE 9 END";
    stage.admin.batch_execute("INSERT INTO token VALUES ('00000000-0000-0000-0000-000000000000')").unwrap();
    let (id, token) = stage.approved(write);
    stage.admin.execute("UPDATE token SET t = $1", &[&token]).unwrap();
    let refusal = refused(&mut stage.requester(), write, "WG006");
    assert!(refusal.detail.contains("is not known from the first one on"), "{refusal:?}");
    assert_eq!((stage.changed(), stage.state(id).as_str()), (0, "approved"));
}

#[test]
fn a_hundred_thousand_rows_are_as_few_bytes_as_a_hundred() {
    let mut stage = Stage::new("INSERT INTO t SELECT generate_series(6, 100000)");
    let (id, token) = stage.approved(WRITE);
    let size = format!("SELECT pg_column_size(fingerprints) FROM writeguard.request WHERE id = {id}");
    assert!(number(&mut stage.admin, &size) < 10_000);
    stage.unguarded("UPDATE t SET a = 1 WHERE id <= 60; INSERT INTO t SELECT generate_series(100001, 100060)");
    let mut client = stage.requester();
    arm(&mut client, &token);
    let refusal = refused(&mut client, WRITE, "WG006");
    assert!(refusal.detail.contains(": many of them are missing, and as many others"), "{refusal:?}");
    stage.unguarded("UPDATE t SET a = 0 WHERE id <= 60; DELETE FROM t WHERE id > 99997");
    let refusal = refused(&mut client, &format!("SELECT writeguard.execute({id})"), "WG006");
    assert!(refusal.message.contains("another number of rows"), "{refusal:?}");
    stage.unguarded("INSERT INTO t SELECT generate_series(99998, 100000)");
    arm(&mut client, &token);
    pass(&mut client, WRITE);
    assert_eq!(stage.changed(), 100_000);
}

#[test]
fn a_policy_can_do_without_the_same_rows() {
    let mut stage = Stage::new(
        "SELECT writeguard.set_policy('p', tables => '{public.t}', max_rows => 3, same_rows => false);
         CREATE TABLE s (id int PRIMARY KEY, a int); INSERT INTO s SELECT generate_series(1, 5), 0;
         GRANT ALL ON s TO PUBLIC;
         SELECT writeguard.set_policy('strict', tables => '{public.s}', max_rows => 3)",
    );
    let (id, token) = stage.approved(WRITE);
    stage.unguarded(ANOTHER_ROW);
    let mut client = stage.requester();
    arm(&mut client, &token);
    pass(&mut client, WRITE);
    assert_eq!((stage.changed(), stage.state(id).as_str()), (5, "spent"));
    // One that asks for them is enough.
    stage.unguarded("UPDATE t SET a = 0");
    let both = "WITH s AS (UPDATE s SET a = 9 RETURNING id) UPDATE t SET a = 9 WHERE a = 0";
    let (_, token) = stage.approved(both);
    stage.unguarded("UPDATE t SET id = 77 WHERE id = 1");
    arm(&mut client, &token);
    let refusal = refused(&mut client, both, "WG006");
    assert!(refusal.message.contains(OTHER_ROWS), "{refusal:?}");
    assert_eq!(stage.changed(), 0);
}

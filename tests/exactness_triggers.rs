//! Row changes are counted exactly, with all that a statement sets off: triggers and foreign
//! keys.

use crate::common::expect_refusal;
use crate::common::limits::{Bed, SIX, assert_free, assert_free_on, assert_limit, assert_limit_on, pass, refuse};

/// Two tables of six rows; a row trigger on the first can be put before the second.
const TWO: &str = "
    CREATE TABLE t (id int PRIMARY KEY, v int NOT NULL DEFAULT 0);
    CREATE TABLE u (id int PRIMARY KEY, v int NOT NULL DEFAULT 0);
    INSERT INTO t SELECT i, 0 FROM generate_series(1, 6) AS i;
    INSERT INTO u SELECT i, 0 FROM generate_series(1, 6) AS i;
    CREATE FUNCTION follow() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        UPDATE u SET v = u.v + 1 WHERE u.id = coalesce(NEW.id, OLD.id);
        RETURN coalesce(NEW, OLD);
    END $$;";

// Triggers

#[test]
fn rows_that_a_trigger_suppresses_do_not_count() {
    let setup = format!(
        "{SIX} CREATE FUNCTION odd_only() RETURNS trigger LANGUAGE plpgsql AS $$
         BEGIN
             IF OLD.id % 2 = 0 THEN RETURN NULL; END IF;
             RETURN CASE TG_OP WHEN 'DELETE' THEN OLD ELSE NEW END;
         END $$;
         CREATE TRIGGER odd_only BEFORE UPDATE OR DELETE ON t FOR EACH ROW
             EXECUTE FUNCTION odd_only();"
    );
    assert_limit(&setup, "UPDATE t SET v = 1", 3);
    assert_limit(&setup, "DELETE FROM t", 3);
    assert_limit(&setup, "WITH u AS (UPDATE t SET v = 1 RETURNING id) SELECT count(*) FROM u", 3);
    assert_free(&setup, "DELETE FROM t WHERE id IN (2, 4)");
}

#[test]
fn before_row_trigger_that_writes_elsewhere() {
    let setup = format!(
        "{TWO} CREATE TRIGGER follow BEFORE UPDATE OR DELETE ON t FOR EACH ROW
             EXECUTE FUNCTION follow();"
    );
    assert_limit(&setup, "UPDATE t SET v = 1", 12);
    assert_limit(&setup, "DELETE FROM t WHERE id > 2", 8);
    assert_limit_on("{public.u}", &setup, "UPDATE t SET v = 1", 6);
    assert_limit_on("{public.t}", &setup, "UPDATE t SET v = 1", 6);
}

#[test]
fn after_row_trigger_that_writes_elsewhere() {
    let setup = format!(
        "{TWO} CREATE TRIGGER follow AFTER INSERT OR UPDATE OR DELETE ON t FOR EACH ROW
             EXECUTE FUNCTION follow();"
    );
    assert_limit(&setup, "UPDATE t SET v = 1", 12);
    let refusal = assert_limit_on("{public.u}", &setup, "DELETE FROM t WHERE id > 2", 4);
    assert_eq!(refusal.table, "u");
    assert_limit_on("{public.u}", &setup, "WITH d AS (DELETE FROM t RETURNING id) SELECT count(*) FROM d", 6);
}

/// An INSERT is not limited; what its triggers update is.
#[test]
fn trigger_of_an_insert() {
    let setup = format!(
        "{TWO} DELETE FROM t;
         CREATE TRIGGER follow AFTER INSERT ON t FOR EACH ROW EXECUTE FUNCTION follow();"
    );
    assert_limit(&setup, "INSERT INTO t SELECT id FROM u WHERE id > 2", 4);
}

#[test]
fn trigger_of_a_copy() {
    use std::io::Write;
    let mut bed = Bed::new(&format!(
        "{TWO} DELETE FROM t;
         CREATE TRIGGER follow AFTER INSERT ON t FOR EACH ROW EXECUTE FUNCTION follow();"
    ));
    let before = bed.contents();
    for (limit, passes) in [(3, false), (4, true)] {
        bed.limit("{public.*}", limit);
        let mut copy = bed.writer.copy_in("COPY t (id) FROM STDIN").unwrap();
        copy.write_all(b"1\n2\n3\n4\n").unwrap();
        assert_eq!(copy.finish().is_ok(), passes, "limit {limit}");
        assert_eq!(bed.contents() != before, passes, "limit {limit}");
    }
}

#[test]
fn statement_triggers() {
    for when in ["BEFORE", "AFTER"] {
        let setup = format!(
            "{TWO} CREATE FUNCTION all_of_u() RETURNS trigger LANGUAGE plpgsql AS $$
             BEGIN UPDATE u SET v = v + 1; RETURN NULL; END $$;
             CREATE TRIGGER all_of_u {when} UPDATE OR DELETE ON t FOR EACH STATEMENT
                 EXECUTE FUNCTION all_of_u();"
        );
        assert_limit(&setup, "UPDATE t SET v = 1", 12);
        assert_limit(&setup, "DELETE FROM t WHERE id > 100", 6);
    }
}

#[test]
fn transition_tables() {
    let setup = format!(
        "{TWO} CREATE FUNCTION gone() RETURNS trigger LANGUAGE plpgsql AS $$
         BEGIN DELETE FROM u WHERE id IN (SELECT id FROM old_rows); RETURN NULL; END $$;
         CREATE TRIGGER gone AFTER DELETE ON t REFERENCING OLD TABLE AS old_rows
             FOR EACH STATEMENT EXECUTE FUNCTION gone();"
    );
    assert_limit(&setup, "DELETE FROM t WHERE id > 2", 8);
}

/// t changes u, u changes w, w changes x.
#[test]
fn triggers_over_several_levels() {
    let setup = format!(
        "{TWO} CREATE TABLE w AS TABLE u; CREATE TABLE x AS TABLE u;
         CREATE FUNCTION follow_w() RETURNS trigger LANGUAGE plpgsql AS $$
         BEGIN UPDATE w SET v = 1 WHERE id = NEW.id; RETURN NULL; END $$;
         CREATE FUNCTION follow_x() RETURNS trigger LANGUAGE plpgsql AS $$
         BEGIN DELETE FROM x WHERE id = NEW.id; RETURN NULL; END $$;
         CREATE TRIGGER a AFTER UPDATE ON t FOR EACH ROW EXECUTE FUNCTION follow();
         CREATE TRIGGER b AFTER UPDATE ON u FOR EACH ROW EXECUTE FUNCTION follow_w();
         CREATE TRIGGER c AFTER UPDATE ON w FOR EACH ROW EXECUTE FUNCTION follow_x();"
    );
    assert_limit(&setup, "UPDATE t SET v = 1 WHERE id <= 5", 20);
    assert_limit_on("{public.x}", &setup, "UPDATE t SET v = 1 WHERE id <= 5", 5);
}

/// Each update of a row sets off another one of the same table.
#[test]
fn trigger_that_writes_to_its_own_table() {
    let setup = format!(
        "{SIX} CREATE FUNCTION next() RETURNS trigger LANGUAGE plpgsql AS $$
         BEGIN UPDATE t SET v = NEW.v WHERE id = NEW.id + 1; RETURN NULL; END $$;
         CREATE TRIGGER next AFTER UPDATE ON t FOR EACH ROW EXECUTE FUNCTION next();"
    );
    assert_limit(&setup, "UPDATE t SET v = 1 WHERE id = 2", 5);
}

#[test]
fn trigger_on_a_view_and_its_table() {
    let setup = format!(
        "{TWO} CREATE VIEW w AS SELECT DISTINCT * FROM t;
         CREATE FUNCTION instead() RETURNS trigger LANGUAGE plpgsql AS $$
         BEGIN DELETE FROM t WHERE id = OLD.id; RETURN OLD; END $$;
         CREATE TRIGGER instead INSTEAD OF DELETE ON w FOR EACH ROW EXECUTE FUNCTION instead();
         CREATE TRIGGER follow AFTER DELETE ON t FOR EACH ROW EXECUTE FUNCTION follow();"
    );
    assert_limit(&setup, "DELETE FROM w WHERE id > 3", 6);
}

// Foreign keys

/// Three levels: two parents, four children, eight grandchildren of each kind of action.
fn family(action: &str) -> String {
    format!(
        "CREATE TABLE parent (id int PRIMARY KEY);
         CREATE TABLE child (id int PRIMARY KEY, parent int REFERENCES parent {action});
         CREATE TABLE grandchild (id int PRIMARY KEY, child int REFERENCES child {action});
         INSERT INTO parent SELECT generate_series(1, 2);
         INSERT INTO child SELECT i, (i + 1) / 2 FROM generate_series(1, 4) AS i;
         INSERT INTO grandchild SELECT i, (i + 1) / 2 FROM generate_series(1, 8) AS i;"
    )
}

#[test]
fn on_delete_cascade_over_several_levels() {
    let setup = family("ON DELETE CASCADE");
    assert_limit(&setup, "DELETE FROM parent", 14);
    assert_limit(&setup, "DELETE FROM parent WHERE id = 1", 7);
    let refusal = assert_limit_on("{public.grandchild}", &setup, "DELETE FROM parent", 8);
    assert_eq!(refusal.table, "grandchild");
    assert_limit_on("{public.child}", &setup, "DELETE FROM parent", 4);
    assert_limit(&setup, "WITH d AS (DELETE FROM parent RETURNING id) SELECT count(*) FROM d", 14);
}

#[test]
fn on_delete_set_null_and_set_default() {
    for action in ["SET NULL", "SET DEFAULT"] {
        let setup = family(&format!("ON DELETE {action}"));
        assert_limit(&setup, "DELETE FROM parent", 6);
        assert_limit_on("{public.child}", &setup, "DELETE FROM parent", 4);
    }
}

#[test]
fn on_update_cascade_over_several_levels() {
    let setup = "
        CREATE TABLE parent (id int PRIMARY KEY);
        CREATE TABLE child (id int PRIMARY KEY REFERENCES parent ON UPDATE CASCADE);
        CREATE TABLE grandchild (id int PRIMARY KEY REFERENCES child ON UPDATE CASCADE);
        INSERT INTO parent SELECT generate_series(1, 6);
        INSERT INTO child SELECT generate_series(1, 5);
        INSERT INTO grandchild SELECT generate_series(1, 4);";
    assert_limit(setup, "UPDATE parent SET id = id + 100", 15);
    assert_limit_on("{public.grandchild}", setup, "UPDATE parent SET id = id + 100", 4);
}

#[test]
fn on_delete_restrict_stays_the_error_of_the_server() {
    let mut bed = Bed::new(&family(""));
    bed.limit("{public.*}", 10);
    let refusal = expect_refusal(bed.writer.batch_execute("DELETE FROM parent"));
    assert_eq!(refusal.sqlstate, "23503", "{refusal:?}");
    assert_eq!(refusal.table, "child");
}

/// A tree in one table, seven rows under the one that goes.
#[test]
fn cascade_within_one_table() {
    assert_limit(
        "CREATE TABLE tree (id int PRIMARY KEY, up int REFERENCES tree ON DELETE CASCADE);
         INSERT INTO tree SELECT i, nullif(i / 2, 0) FROM generate_series(1, 15) AS i;",
        "DELETE FROM tree WHERE id = 2",
        7,
    );
}

#[test]
fn cascade_into_partitions() {
    let setup = "
        CREATE TABLE parent (id int PRIMARY KEY);
        CREATE TABLE child (parent int REFERENCES parent ON DELETE CASCADE) PARTITION BY RANGE (parent);
        CREATE TABLE child1 PARTITION OF child FOR VALUES FROM (1) TO (4);
        CREATE TABLE child2 PARTITION OF child FOR VALUES FROM (4) TO (100);
        INSERT INTO parent SELECT generate_series(1, 6);
        INSERT INTO child SELECT generate_series(1, 6);";
    assert_limit(setup, "DELETE FROM parent", 12);
    assert_limit_on("{public.child2}", setup, "DELETE FROM parent", 3);
}

#[test]
fn cascade_from_partitions() {
    let setup = "
        CREATE TABLE parent (id int PRIMARY KEY) PARTITION BY RANGE (id);
        CREATE TABLE parent1 PARTITION OF parent FOR VALUES FROM (1) TO (4);
        CREATE TABLE parent2 PARTITION OF parent FOR VALUES FROM (4) TO (200);
        CREATE TABLE child (parent int REFERENCES parent ON DELETE CASCADE ON UPDATE CASCADE);
        INSERT INTO parent SELECT generate_series(1, 6);
        INSERT INTO child SELECT generate_series(1, 6);";
    assert_limit(setup, "DELETE FROM parent WHERE id > 1", 10);
    assert_limit_on("{public.child}", setup, "DELETE FROM parent", 6);
    // The rows move to the other partition, and the children follow.
    assert_limit(setup, "UPDATE parent SET id = id + 100 WHERE id <= 3", 6);
}

/// 60 parents and 60 cascaded rows do not pass a limit of 100.
#[test]
fn parents_and_cascades_share_one_budget() {
    let mut bed = Bed::new(
        "CREATE TABLE a (id int PRIMARY KEY);
         CREATE TABLE b (id int REFERENCES a ON DELETE CASCADE);
         INSERT INTO a SELECT generate_series(1, 60); INSERT INTO b TABLE a;",
    );
    bed.limit("{public.a, public.b}", 100);
    bed.refused("DELETE FROM a");
    bed.exactly("{public.a, public.b}", "DELETE FROM a", 120);
}

/// The action runs as the table's owner, but the one who acts is the one who deletes.
#[test]
fn cascades_are_charged_to_the_acting_role() {
    let mut bed = Bed::new(&family("ON DELETE CASCADE"));
    let owner = bed.db().role("owner");
    let clerk = bed.db().role("clerk");
    bed.passes(&format!(
        "ALTER TABLE parent OWNER TO {owner}; ALTER TABLE child OWNER TO {owner};
         ALTER TABLE grandchild OWNER TO {owner}; GRANT SELECT, DELETE ON parent TO {clerk}"
    ));
    let mut client = bed.db().connect(&clerk);
    bed.policy(&format!("tables => '{{public.child}}', roles => '{{{owner}}}', max_rows => 0"));
    pass(&mut client, "DELETE FROM parent WHERE id = 1");
    bed.policy(&format!("tables => '{{public.child}}', roles => '{{{clerk}}}', max_rows => 1"));
    refuse(&mut client, "DELETE FROM parent");
    let mut client = bed.db().connect(&owner);
    pass(&mut client, "DELETE FROM parent");
}

// Deferred triggers

fn deferred() -> String {
    format!(
        "{TWO} CREATE CONSTRAINT TRIGGER follow AFTER UPDATE OR DELETE ON t
             DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION follow();"
    )
}

#[test]
fn deferred_trigger_in_autocommit() {
    assert_limit(&deferred(), "UPDATE t SET v = 1", 12);
    assert_limit_on("{public.u}", &deferred(), "DELETE FROM t WHERE id > 2", 4);
    assert_limit(&deferred(), "WITH d AS (DELETE FROM t RETURNING id) SELECT count(*) FROM d", 12);
}

#[test]
fn deferred_trigger_at_commit() {
    assert_limit_on(
        "{public.u}",
        &deferred(),
        "BEGIN; UPDATE t SET v = 1 WHERE id <= 3; UPDATE t SET v = 1 WHERE id > 3; COMMIT",
        6,
    );
}

/// The failed COMMIT left nothing behind, and the session goes on.
#[test]
fn after_a_refused_commit_the_session_counts_from_zero() {
    let mut bed = Bed::new(&deferred());
    bed.limit("{public.u}", 3);
    for _ in 0..5 {
        bed.refused("BEGIN; UPDATE t SET v = 1 WHERE id <= 4; COMMIT");
        bed.passes("UPDATE t SET v = 1 WHERE id <= 3");
    }
}

#[test]
fn deferred_trigger_at_set_constraints() {
    let mut bed = Bed::new(&deferred());
    bed.limit("{public.u}", 5);
    pass(&mut bed.writer, "BEGIN; UPDATE t SET v = 1");
    bed.refused("SET CONSTRAINTS ALL IMMEDIATE");
    bed.limit("{public.u}", 6);
    bed.passes("BEGIN; UPDATE t SET v = 1; SET CONSTRAINTS ALL IMMEDIATE; COMMIT");
}

#[test]
fn deferred_trigger_counts_for_the_transaction() {
    let mut bed = Bed::new(&deferred());
    bed.policy("tables => '{public.*}', max_rows_per_transaction => 11");
    bed.refused("BEGIN; UPDATE t SET v = 1 WHERE id <= 3; UPDATE t SET v = 1 WHERE id > 3; COMMIT");
    bed.policy("tables => '{public.*}', max_rows_per_transaction => 12");
    bed.passes("BEGIN; UPDATE t SET v = 1 WHERE id <= 3; UPDATE t SET v = 1 WHERE id > 3; COMMIT");
}

/// A deferrable foreign key's action runs at once, the check is deferred.
#[test]
fn deferrable_foreign_key() {
    assert_limit(&family("ON DELETE CASCADE DEFERRABLE INITIALLY DEFERRED"), "DELETE FROM parent", 14);
}

// Not everything a trigger does is covered

#[test]
fn trigger_that_only_inserts_is_free() {
    assert_free_on(
        "{public.u}",
        &format!(
            "{TWO} CREATE FUNCTION log() RETURNS trigger LANGUAGE plpgsql AS $$
             BEGIN INSERT INTO u VALUES (NEW.id + 100); RETURN NULL; END $$;
             CREATE TRIGGER log AFTER UPDATE ON t FOR EACH ROW EXECUTE FUNCTION log();"
        ),
        "UPDATE t SET v = 1",
    );
}

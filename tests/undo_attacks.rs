//! Undo between sessions, and in the hands of those who may not, or who mean harm.

use std::thread;

use crate::common::kept::{Bed, ORDERS, one, rows, undo};
use crate::common::{Refusal, expect_refusal, wait_until};
use postgres::Client;

fn grant_undo(bed: &mut Bed, role: &str) {
    bed.run(&format!(
        "GRANT EXECUTE ON FUNCTION writeguard.undo, writeguard.undo_conflicts TO {role};
         CREATE SCHEMA IF NOT EXISTS own; GRANT ALL ON SCHEMA own TO {role}"
    ));
}

#[track_caller]
fn refused(client: &mut Client, sql: &str) -> Refusal {
    expect_refusal(client.batch_execute(sql))
}

#[test]
fn nobody_undoes_before_it_is_granted() {
    let mut bed = Bed::new(ORDERS);
    let change = bed.change("DELETE FROM orders");
    let role = bed.db.role("anna");
    bed.run(&format!("GRANT ALL ON orders TO {role}; GRANT pg_monitor, pg_read_all_data, pg_write_all_data TO {role}"));
    let mut anna = bed.db.connect(&role);
    for sql in [
        format!("SELECT * FROM writeguard.undo({change})"),
        format!("SELECT * FROM writeguard.undo_conflicts({change})"),
    ] {
        assert_eq!(refused(&mut anna, &sql).sqlstate, "42501", "{sql}");
    }
    grant_undo(&mut bed, &role);
    assert_eq!(undo(&mut anna, &format!("{change}")), one("public.orders", 6, 0));
    let by = bed.rows("SELECT undone_by FROM writeguard.change_statement WHERE undone_at IS NOT NULL");
    assert_eq!(by, std::slice::from_ref(&role));
    assert_eq!(bed.rows("SELECT login FROM writeguard.event WHERE kind = 'undone'"), [role]);
}

#[test]
fn kept_rows_are_for_those_who_may_read_the_table() {
    let mut bed = Bed::new(&format!(
        "{ORDERS}; CREATE TABLE other (id int PRIMARY KEY, v text); INSERT INTO other VALUES (1, 'secret')"
    ));
    let role = bed.db.role("anna");
    grant_undo(&mut bed, &role);
    let mut anna = bed.db.connect(&role);
    let deleted = bed.change("DELETE FROM orders WHERE id = 1");
    let updated = bed.change("UPDATE orders SET price = 0 WHERE id = 2");
    let both = bed.change("UPDATE orders SET price = 1 WHERE id = 3; UPDATE other SET v = 'x'");
    bed.run("UPDATE orders SET price = 5 WHERE id = 2");
    bed.run(&format!("GRANT INSERT, UPDATE, DELETE, SELECT (id, state, price) ON orders TO {role}"));
    for change in [deleted, updated, both] {
        for sql in ["undo", "undo_conflicts"] {
            let refusal = refused(&mut anna, &format!("SELECT * FROM writeguard.{sql}({change})"));
            assert_eq!(refusal.sqlstate, "42501", "{refusal:?}");
            assert!(!format!("{refusal:?}").contains("n2"), "{refusal:?}");
        }
    }
    // Column by column is as good as all at once.
    bed.run(&format!("GRANT SELECT (note) ON orders TO {role}"));
    let refusal = refused(&mut anna, &format!("SELECT * FROM writeguard.undo({updated})"));
    assert_eq!(refusal.sqlstate, "WG009", "{refusal:?}");
    assert_eq!(
        rows(&mut anna, &format!("SELECT is_now::text FROM writeguard.undo_conflicts({updated})")),
        [r#"{"price": 5}"#]
    );
    assert_eq!(undo(&mut anna, &format!("{deleted}")), one("public.orders", 1, 0));
    // The other table's row is none of hers, and without it nothing is undone.
    let refusal = refused(&mut anna, &format!("SELECT * FROM writeguard.undo({both})"));
    assert_eq!(refusal.sqlstate, "42501", "{refusal:?}");
    assert_eq!(bed.rows("SELECT price::text FROM orders WHERE id = 3"), ["1"]);
}

#[test]
fn writing_back_needs_what_ordinary_sql_needs() {
    let mut bed = Bed::new(ORDERS);
    let role = bed.db.role("anna");
    grant_undo(&mut bed, &role);
    let mut anna = bed.db.connect(&role);
    let deleted = bed.change("DELETE FROM orders WHERE id = 1");
    let updated = bed.change("UPDATE orders SET price = 0 WHERE id = 2");
    bed.run(&format!("GRANT SELECT ON orders TO {role}"));
    for dry_run in ["false", "true"] {
        for change in [deleted, updated] {
            let refusal = refused(&mut anna, &format!("SELECT * FROM writeguard.undo({change}, dry_run => {dry_run})"));
            assert_eq!(refusal.sqlstate, "42501", "{refusal:?}");
        }
    }
    bed.run(&format!("GRANT UPDATE (state) ON orders TO {role}"));
    assert_eq!(refused(&mut anna, &format!("SELECT * FROM writeguard.undo({updated})")).sqlstate, "42501");
    bed.run(&format!("GRANT UPDATE (price) ON orders TO {role}"));
    assert_eq!(undo(&mut anna, &format!("{updated}")), one("public.orders", 1, 0));
    bed.run(&format!("GRANT INSERT (id, state, price) ON orders TO {role}"));
    assert_eq!(refused(&mut anna, &format!("SELECT * FROM writeguard.undo({deleted})")).sqlstate, "42501");
    bed.run(&format!("GRANT INSERT ON orders TO {role}"));
    assert_eq!(undo(&mut anna, &format!("{deleted}")), one("public.orders", 1, 0));
}

#[test]
fn row_security_keeps_kept_rows_from_those_it_applies_to() {
    let mut bed = Bed::new(ORDERS);
    let role = bed.db.role("anna");
    grant_undo(&mut bed, &role);
    let mut anna = bed.db.connect(&role);
    let change = bed.change("DELETE FROM orders");
    bed.run(&format!(
        "GRANT ALL ON orders TO {role}; ALTER TABLE orders ENABLE ROW LEVEL SECURITY;
         CREATE POLICY few ON orders USING (id < 3)"
    ));
    for function in ["undo", "undo_conflicts"] {
        for before in ["", "SET row_security = off;"] {
            let refusal = refused(&mut anna, &format!("{before} SELECT * FROM writeguard.{function}({change})"));
            assert_eq!(refusal.sqlstate, "42501", "{refusal:?}");
        }
    }
    assert_eq!(bed.undo(&format!("{change}")), one("public.orders", 6, 0));
}

#[test]
fn a_wrapper_lends_its_owners_rights_and_nothing_more() {
    let mut bed = Bed::new(ORDERS);
    let (owner, role) = (bed.db.role("keeper"), bed.db.role("anna"));
    grant_undo(&mut bed, &owner);
    let change = bed.change("DELETE FROM orders");
    bed.run(&format!(
        "CREATE FUNCTION own.back(change bigint) RETURNS SETOF record LANGUAGE sql SECURITY DEFINER
           AS 'SELECT relation, restored, conflicts FROM writeguard.undo($1)';
         ALTER FUNCTION own.back OWNER TO {owner}; GRANT USAGE ON SCHEMA own TO {role}"
    ));
    let mut anna = bed.db.connect(&role);
    let call = format!("SELECT * FROM own.back({change}) AS (relation text, restored bigint, conflicts bigint)");
    assert_eq!(refused(&mut anna, &call).sqlstate, "42501");
    bed.run(&format!("GRANT SELECT, INSERT ON orders TO {owner}"));
    anna.batch_execute(&call).expect("the wrapper's owner may");
    assert_eq!(bed.table("orders").len(), 6);
    // Who did it is who connected.
    assert_eq!(bed.rows("SELECT undone_by FROM writeguard.change_statement WHERE undone_at IS NOT NULL"), [role]);
}

/// Functions, operators and types that would tell who runs them.
fn traps(schema: &str, role: &str) -> String {
    format!(
        "CREATE TABLE {schema}.caught (by text); GRANT ALL ON {schema}.caught TO public; GRANT USAGE ON SCHEMA {schema} TO public;
         CREATE FUNCTION {schema}.trap() RETURNS boolean LANGUAGE plpgsql AS $$ BEGIN
             INSERT INTO {schema}.caught VALUES (current_user); RETURN true; END $$;
         CREATE FUNCTION {schema}.same(int, int) RETURNS boolean LANGUAGE sql AS 'SELECT {schema}.trap()';
         CREATE FUNCTION {schema}.same(text, text) RETURNS boolean LANGUAGE sql AS 'SELECT {schema}.trap()';
         CREATE FUNCTION {schema}.same(bigint, bigint) RETURNS boolean LANGUAGE sql AS 'SELECT {schema}.trap()';
         CREATE OPERATOR {schema}.= (LEFTARG = int, RIGHTARG = int, FUNCTION = {schema}.same);
         CREATE OPERATOR {schema}.= (LEFTARG = text, RIGHTARG = text, FUNCTION = {schema}.same);
         CREATE OPERATOR {schema}.= (LEFTARG = bigint, RIGHTARG = bigint, FUNCTION = {schema}.same);
         CREATE OPERATOR {schema}.<> (LEFTARG = int, RIGHTARG = int, FUNCTION = {schema}.same);
         CREATE FUNCTION {schema}.lower(text) RETURNS text LANGUAGE sql AS 'SELECT {schema}.trap()::text';
         CREATE FUNCTION {schema}.jsonb_build_object(VARIADIC \"any\") RETURNS jsonb LANGUAGE internal AS 'jsonb_build_object';
         CREATE FUNCTION {schema}.clock_timestamp() RETURNS timestamptz LANGUAGE sql AS 'SELECT {schema}.trap()::text::timestamptz';
         CREATE DOMAIN {schema}.checked AS text CHECK ({schema}.trap());
         CREATE TABLE {schema}.writeguard_rows (n bigint, op int, k1 int);
         ALTER ROLE {role} SET search_path = {schema}, pg_catalog, public, writeguard"
    )
}

#[test]
fn names_in_the_callers_schemas_are_not_ours() {
    let mut bed = Bed::new(ORDERS);
    let role = bed.db.role("anna");
    grant_undo(&mut bed, &role);
    bed.run(&format!("GRANT ALL ON orders TO {role}"));
    bed.run(&traps("own", &role));
    let mut anna = bed.db.connect(&role);
    anna.batch_execute("CREATE TEMP TABLE writeguard_rows (n bigint); CREATE TEMP TABLE image (x int)")
        .expect("a table");
    let before = bed.table("orders");
    let change = bed.change("UPDATE orders SET price = 0, note = 'x'; DELETE FROM orders WHERE id = 2");
    bed.run("UPDATE orders SET note = 'y' WHERE id = 1");
    assert_eq!(
        rows(&mut anna, &format!("SELECT key::text FROM writeguard.undo_conflicts({change})")),
        [r#"{"id": 1}"#]
    );
    bed.run("UPDATE orders SET note = 'x' WHERE id = 1");
    assert_eq!(undo(&mut anna, &format!("{change}")), one("public.orders", 6, 0));
    assert_eq!(bed.table("orders"), before);
    assert_eq!(bed.rows("SELECT by FROM own.caught"), [] as [&str; 0]);
}

#[test]
fn a_types_own_code_runs_as_the_caller() {
    let mut bed = Bed::new("");
    let role = bed.db.role("anna");
    grant_undo(&mut bed, &role);
    bed.run(&traps("own", &role));
    bed.run(&format!(
        "CREATE TABLE t (id int PRIMARY KEY, v own.checked); INSERT INTO t VALUES (1, 'a'), (2, 'b'); GRANT ALL ON t TO {role};
         TRUNCATE own.caught"
    ));
    let change = bed.change("UPDATE t SET v = 'x'; DELETE FROM t WHERE id = 2");
    bed.run("TRUNCATE own.caught");
    let mut anna = bed.db.connect(&role);
    assert_eq!(undo(&mut anna, &format!("{change}")), one("public.t", 2, 0));
    assert_eq!(bed.rows("SELECT DISTINCT by FROM own.caught"), [role]);
}

#[test]
fn what_cannot_be_meant_is_refused() {
    let mut bed = Bed::new(ORDERS);
    let change = bed.change("DELETE FROM orders");
    for arguments in [
        "0".to_owned(),
        "-1".into(),
        "9223372036854775807".into(),
        "NULL".into(),
        format!("{change}, NULL"),
        format!("{change}, 'ignore'"),
        format!("{change}, ''"),
        format!("{change}, '{}'", "x".repeat(100_000)),
        format!("{change}, dry_run => NULL"),
    ] {
        let refusal = bed.refused(&format!("SELECT * FROM writeguard.undo({arguments})"));
        assert_eq!(refusal.sqlstate, "WG007", "{refusal:?}");
        assert_ne!(refusal.hint, "", "{refusal:?}");
    }
    for argument in ["0", "NULL"] {
        assert_eq!(bed.refused(&format!("SELECT writeguard.undo_conflicts({argument})")).sqlstate, "WG007");
    }
    let refusal = bed.refused(&format!("BEGIN READ ONLY; SELECT writeguard.undo({change})"));
    assert_eq!(refusal.sqlstate, "25006", "{refusal:?}");
    bed.run("ROLLBACK");
    assert_eq!(bed.table("orders"), [] as [&str; 0]);
}

#[test]
fn what_is_rolled_back_was_not_undone() {
    let mut bed = Bed::new(ORDERS);
    let change = bed.change("DELETE FROM orders");
    bed.run(&format!("BEGIN; SELECT writeguard.undo({change}); ROLLBACK"));
    bed.run(&format!("BEGIN; SAVEPOINT a; SELECT writeguard.undo({change}); ROLLBACK TO a; COMMIT"));
    bed.run(&format!(
        "DO $$ BEGIN PERFORM writeguard.undo({change}); RAISE division_by_zero; EXCEPTION WHEN division_by_zero THEN END $$"
    ));
    for _ in 0..2 {
        assert_eq!(bed.undo(&format!("{change}, dry_run => true")), one("public.orders", 6, 0));
    }
    let undone = "SELECT count(*)::text FROM writeguard.change_statement WHERE undone_at IS NOT NULL";
    assert_eq!(bed.rows(undone), ["0"]);
    assert_eq!(bed.rows("SELECT kind FROM writeguard.event WHERE kind = 'undone'"), [] as [&str; 0]);
    assert_eq!(bed.table("orders"), [] as [&str; 0]);
    bed.run(&format!("BEGIN; SELECT writeguard.undo({change}); PREPARE TRANSACTION 'p'"));
    assert_eq!(bed.table("orders"), [] as [&str; 0]);
    bed.run("COMMIT PREPARED 'p'");
    assert_eq!(bed.table("orders").len(), 6);
    assert_eq!(bed.rows(undone), ["1"]);
}

/// Runs `sql` in a session that has to wait, does `meanwhile`, and gives what came of it.
fn while_waiting(
    bed: &mut Bed,
    sql: &str,
    meanwhile: impl FnOnce(&mut Bed),
) -> Result<Vec<(String, i64, i64)>, Refusal> {
    let mut client = bed.db.admin();
    let pid: i32 = client.query_one("SELECT pg_backend_pid()", &[]).expect("a pid").get(0);
    let sql = sql.to_owned();
    let waiting = thread::spawn(move || match client.query(&sql, &[]) {
        Ok(rows) => Ok(rows.iter().map(|row| (row.get(0), row.get(1), row.get(2))).collect()),
        Err(error) => Err(Refusal::of(&error)),
    });
    let waits = format!("SELECT count(*)::text FROM pg_stat_activity WHERE pid = {pid} AND wait_event_type = 'Lock'");
    wait_until(30, || bed.rows(&waits) == ["1"]);
    meanwhile(bed);
    waiting.join().expect("a thread")
}

#[test]
fn a_row_that_another_session_is_changing_is_not_overwritten() {
    for (theirs, conflicts) in [
        ("UPDATE orders SET price = 99 WHERE id = 3", 1),
        ("UPDATE orders SET note = 'theirs' WHERE id = 3", 0),
        ("DELETE FROM orders WHERE id = 3", 1),
        ("UPDATE orders SET id = 33 WHERE id = 3", 1),
    ] {
        let mut bed = Bed::new(ORDERS);
        let change = bed.change("UPDATE orders SET price = 0");
        bed.run(&format!("BEGIN; {theirs}"));
        let sql = format!("SELECT * FROM writeguard.undo({change})");
        let outcome = while_waiting(&mut bed, &sql, |bed| bed.run("COMMIT"));
        let after = bed.rows("SELECT concat_ws(' ', id, price, note) FROM orders WHERE id IN (3, 33)");
        if conflicts == 0 {
            assert_eq!(outcome, Ok(one("public.orders", 6, 0)), "{theirs}");
            assert_eq!(after, ["3 3.30 theirs"]);
        } else {
            assert_eq!(outcome.expect_err(theirs).sqlstate, "WG009");
            let sql = format!("SELECT * FROM writeguard.undo({change}, 'skip')");
            assert_eq!(bed.undo(&format!("{change}, 'skip'")), one("public.orders", 5, 1), "{sql}");
            assert_eq!(bed.rows("SELECT concat_ws(' ', id, price, note) FROM orders WHERE id IN (3, 33)"), after);
        }
    }
}

#[test]
fn a_row_that_another_session_is_inserting_is_not_overwritten() {
    for (mode, ends) in [("error", "COMMIT"), ("skip", "COMMIT"), ("error", "ROLLBACK")] {
        let mut bed = Bed::new(ORDERS);
        let change = bed.change("DELETE FROM orders WHERE id > 4");
        bed.run("BEGIN; INSERT INTO orders VALUES (5, 'theirs')");
        let sql = format!("SELECT * FROM writeguard.undo({change}, '{mode}')");
        let outcome = while_waiting(&mut bed, &sql, |bed| bed.run(ends));
        let fifth = bed.rows("SELECT state FROM orders WHERE id = 5");
        match (mode, ends) {
            (_, "ROLLBACK") => {
                assert_eq!(outcome, Ok(one("public.orders", 2, 0)));
                assert_eq!(fifth, ["open"]);
            }
            ("skip", _) => {
                assert_eq!(outcome, Ok(one("public.orders", 1, 1)));
                assert_eq!(fifth, ["theirs"]);
            }
            _ => {
                assert_eq!(outcome.expect_err(mode).sqlstate, "WG009");
                assert_eq!(bed.table("orders").len(), 5);
                assert_eq!(fifth, ["theirs"]);
            }
        }
    }
}

#[test]
fn two_sessions_do_not_undo_the_same_change() {
    for ends in ["COMMIT", "ROLLBACK"] {
        let mut bed = Bed::new(ORDERS);
        let change = bed.change("UPDATE orders SET price = price + 1");
        let before = bed.rows("SELECT sum(price)::text FROM orders");
        bed.run(&format!("BEGIN; SELECT writeguard.undo({change})"));
        let sql = format!("SELECT * FROM writeguard.undo({change})");
        let outcome = while_waiting(&mut bed, &sql, |bed| bed.run(ends));
        match ends {
            "COMMIT" => assert_eq!(outcome.expect_err(ends).sqlstate, "WG007"),
            _ => assert_eq!(outcome, Ok(one("public.orders", 6, 0))),
        }
        assert_ne!(bed.rows("SELECT sum(price)::text FROM orders"), before);
        assert_eq!(bed.rows("SELECT sum(price)::text FROM orders"), ["23.10"]);
        assert_eq!(bed.rows("SELECT count(*)::text FROM writeguard.event WHERE kind = 'undone'"), ["1"]);
    }
}

#[test]
fn a_snapshot_that_is_too_old_is_told_so() {
    let mut bed = Bed::new(ORDERS);
    let change = bed.change("UPDATE orders SET price = 0");
    let mut other = bed.db.admin();
    other.batch_execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM orders").expect("a snapshot");
    bed.run("UPDATE orders SET price = 1 WHERE id = 1");
    assert_eq!(refused(&mut other, &format!("SELECT writeguard.undo({change})")).sqlstate, "40001");
    assert_eq!(bed.rows("SELECT price::text FROM orders WHERE id = 1"), ["1"]);
}

#[test]
fn a_dry_run_that_waits_can_be_stopped_inside_a_function() {
    let mut bed = Bed::new(ORDERS);
    let change = bed.change("UPDATE orders SET price = 0");
    let mut other = bed.db.admin();
    for lock in
        ["SELECT FROM orders FOR UPDATE", "SELECT FROM writeguard.change_statement FOR UPDATE", "LOCK TABLE orders"]
    {
        other.batch_execute(&format!("BEGIN; {lock}")).expect("a lock");
        bed.run(&format!(
            "BEGIN; SET LOCAL lock_timeout = '100ms'; CREATE TEMP TABLE stopped (yes boolean) ON COMMIT PRESERVE ROWS;
             DO $$ BEGIN PERFORM writeguard.undo({change}, dry_run => true);
             EXCEPTION WHEN lock_not_available THEN INSERT INTO stopped VALUES (true); END $$; COMMIT"
        ));
        assert_eq!(rows(&mut bed.admin, "SELECT 'stopped' FROM stopped"), ["stopped"], "{lock}");
        bed.run("DROP TABLE stopped");
        other.batch_execute("ROLLBACK").expect("the end");
    }
    assert_eq!(bed.undo(&format!("{change}, dry_run => true")), one("public.orders", 6, 0));
}

#[test]
fn limits_have_no_say_about_rows_that_come_back_nor_about_what_triggers_write() {
    let mut bed = Bed::new(&format!(
        "{ORDERS}; CREATE TABLE other (id int PRIMARY KEY, v int); INSERT INTO other SELECT i, 0 FROM generate_series(1, 9) AS i"
    ));
    let before = bed.table("orders");
    let change = bed.change("UPDATE orders SET price = 0; DELETE FROM orders WHERE id = 6");
    let policies = "SELECT writeguard.set_policy('all', max_rows => 0, max_fraction => 0, require_where => true,
        require_transaction => true, rate_rows => 0, override => 'never')";
    bed.run(policies);
    assert_eq!(bed.refused("UPDATE orders SET note = '' WHERE id = 1").sqlstate, "WG001");
    // What triggers write is not limited either, where they are to fire: rows of another table, and others of the same.
    bed.run(
        "CREATE FUNCTION spread() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN UPDATE other SET v = v + 1; RETURN NULL; END $$;
         CREATE TRIGGER spread AFTER UPDATE ON orders FOR EACH STATEMENT EXECUTE FUNCTION spread()",
    );
    for (triggers, rows) in [("off", "0"), ("fire", "9")] {
        bed.run(&format!("BEGIN; SELECT writeguard.undo({change}, triggers => '{triggers}')"));
        let sum = "SELECT sum(v)::text FROM other";
        assert_eq!(bed.admin.query_one(sum, &[]).unwrap().get::<_, String>(0), rows, "{triggers}");
        bed.run("ROLLBACK");
        assert_eq!(
            bed.refused("UPDATE orders SET note = '' WHERE id = 1").sqlstate,
            "WG001",
            "the lift went with the undo"
        );
    }
    bed.run(
        "CREATE OR REPLACE FUNCTION spread() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
             IF pg_trigger_depth() = 1 THEN UPDATE orders SET note = 'more'; END IF; RETURN NULL; END $$",
    );
    bed.run(&format!("BEGIN; SELECT writeguard.undo({change}, 'skip', triggers => 'fire'); ROLLBACK"));
    bed.run("DROP TRIGGER spread ON orders");
    assert_eq!(bed.undo(&format!("{change}")), one("public.orders", 6, 0));
    assert_eq!(bed.table("orders"), before);
    assert_eq!(
        bed.refused("UPDATE orders SET note = '' WHERE id = 1").sqlstate,
        "WG001",
        "the lift went with the undo"
    );
    assert_eq!(
        bed.rows("SELECT DISTINCT kind FROM writeguard.event WHERE kind NOT IN ('blocked', 'policy_changed')"),
        ["undone"]
    );
}

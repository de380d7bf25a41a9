//! Row changes are counted exactly over a session's life: prepared statements and portals,
//! several statements in one string, transactions and savepoints, changes of policies, other
//! sessions at the same time.

use std::thread;

use crate::common::limits::{Bed, SIX, contents, number, pass, refuse};
use crate::common::{Refusal, expect_refusal, wait_until};

/// A function that updates one row and gives its number back.
const TOUCH: &str = "
    CREATE FUNCTION touch(i int) RETURNS int LANGUAGE sql
    AS 'UPDATE t SET v = v + 1 WHERE id = i RETURNING id';";

// PREPARE and EXECUTE

#[test]
fn sql_prepared_statement() {
    let mut bed = Bed::new(&format!("{SIX} PREPARE p AS UPDATE t SET v = v + 1 WHERE id <= $1;"));
    bed.limit("{public.t}", 3);
    bed.refused("EXECUTE p(4)");
    bed.passes("EXECUTE p(3)");
    bed.refused("EXECUTE p(6)");
    bed.exactly("{public.t}", "EXECUTE p(5)", 5);
}

/// The number of rows differs from one execution of the same plan to the next.
#[test]
fn sql_prepared_statement_with_a_generic_plan() {
    for mode in ["force_generic_plan", "force_custom_plan", "auto"] {
        let mut bed = Bed::new(&format!(
            "{SIX} SET plan_cache_mode = {mode};
             PREPARE p AS UPDATE t SET v = v + 1 WHERE id <= $1;
             PREPARE q AS WITH d AS (UPDATE t SET v = -1 WHERE id <= $1 RETURNING id) SELECT * FROM d;"
        ));
        bed.limit("{public.t}", 3);
        for _ in 0..8 {
            bed.passes("EXECUTE p(3)");
            bed.refused("EXECUTE p(4)");
            bed.passes("EXECUTE q(2)");
            bed.refused("EXECUTE q(6)");
        }
    }
}

/// Prepared and planned before there was a policy, in the session that goes on with it.
#[test]
fn prepared_before_the_policy() {
    let mut bed = Bed::new(&format!(
        "{SIX} SET plan_cache_mode = force_generic_plan;
         PREPARE p AS UPDATE t SET v = v + 1;
         PREPARE q AS WITH d AS (UPDATE t SET v = -1 RETURNING id) SELECT * FROM d;
         EXECUTE p; EXECUTE q; EXECUTE p;"
    ));
    bed.limit("{public.t}", 5);
    bed.refused("EXECUTE p");
    bed.refused("EXECUTE q");
    bed.limit("{public.t}", 6);
    bed.passes("EXECUTE p");
    bed.passes("EXECUTE q");
    bed.limit("{public.t}", 4);
    bed.refused("EXECUTE p");
    bed.refused("EXECUTE q");
    bed.passes("DEALLOCATE ALL");
}

#[test]
fn create_table_as_execute() {
    let mut bed = Bed::new(&format!("{SIX} PREPARE p AS WITH d AS (DELETE FROM t RETURNING id) SELECT * FROM d;"));
    bed.exactly("{public.t}", "CREATE TABLE x AS EXECUTE p", 6);
}

#[test]
fn explain_analyze_execute() {
    let mut bed = Bed::new(&format!("{SIX} PREPARE p AS UPDATE t SET v = v + 1;"));
    bed.limit("{public.t}", 0);
    bed.passes("EXPLAIN EXECUTE p");
    bed.exactly("{public.t}", "EXPLAIN ANALYZE EXECUTE p", 6);
}

/// A function's plans are kept from before the policy.
#[test]
fn function_planned_before_the_policy() {
    let mut bed = Bed::new(&format!(
        "{SIX} CREATE FUNCTION f() RETURNS void LANGUAGE plpgsql AS $$
         BEGIN UPDATE t SET v = v + 1; END $$;
         SELECT f(); SELECT f();"
    ));
    bed.exactly("{public.t}", "SELECT f()", 6);
}

// Extended protocol

#[test]
fn protocol_prepared_statement() {
    let mut bed = Bed::new(SIX);
    let statement = bed.writer.prepare("UPDATE t SET v = v + 1 WHERE id <= $1").unwrap();
    assert_eq!(bed.writer.execute(&statement, &[&6]).unwrap(), 6);
    bed.limit("{public.t}", 3);
    for _ in 0..8 {
        let before = bed.contents();
        let refusal = expect_refusal(bed.writer.execute(&statement, &[&4]));
        assert_eq!(refusal.sqlstate, "WG001");
        assert_eq!(bed.contents(), before);
        assert_eq!(bed.writer.execute(&statement, &[&3]).unwrap(), 3);
    }
}

/// However few rows the client fetches at a time, PostgreSQL runs such a statement to its end.
#[test]
fn portal_of_an_update_returning() {
    let mut bed = Bed::new(SIX);
    for (sql, rows) in [
        ("UPDATE t SET v = v + 1 RETURNING id", 6),
        ("WITH u AS (UPDATE t SET v = v + 1 WHERE id > 1 RETURNING id) SELECT id FROM u", 5),
        ("DELETE FROM t WHERE id > 2 RETURNING id", 4),
    ] {
        bed.limit("{public.t}", rows - 1);
        let before = bed.contents();
        let mut transaction = bed.writer.transaction().unwrap();
        let portal = transaction.bind(sql, &[]).unwrap();
        let refusal = expect_refusal(transaction.query_portal(&portal, 2));
        assert_eq!(refusal.sqlstate, "WG001", "{sql}");
        transaction.rollback().unwrap();
        assert_eq!(bed.contents(), before, "{sql}");

        bed.limit("{public.t}", rows);
        let mut transaction = bed.writer.transaction().unwrap();
        let portal = transaction.bind(sql, &[]).unwrap();
        let mut fetched = 0;
        loop {
            let some = transaction.query_portal(&portal, 2).unwrap().len() as u64;
            fetched += some;
            if some < 2 {
                break;
            }
        }
        assert_eq!(fetched, rows, "{sql}");
        transaction.commit().unwrap();
        assert_ne!(bed.contents(), before, "{sql}");
    }
}

/// A portal that is fetched from in parts is one statement.
#[test]
fn suspended_portal_of_a_function_that_writes() {
    let mut bed = Bed::new(&format!("{SIX} {TOUCH}"));
    let sql = "SELECT touch(i) FROM generate_series(1, 6) AS i";
    bed.limit("{public.t}", 5);
    let before = bed.contents();
    let mut transaction = bed.writer.transaction().unwrap();
    let portal = transaction.bind(sql, &[]).unwrap();
    assert_eq!(transaction.query_portal(&portal, 2).unwrap().len(), 2);
    assert_eq!(transaction.query_portal(&portal, 2).unwrap().len(), 2);
    let refusal = expect_refusal(transaction.query_portal(&portal, 2));
    assert_eq!(refusal.sqlstate, "WG001");
    transaction.rollback().unwrap();
    assert_eq!(bed.contents(), before);

    bed.limit("{public.t}", 6);
    let mut transaction = bed.writer.transaction().unwrap();
    let portal = transaction.bind(sql, &[]).unwrap();
    for _ in 0..3 {
        assert_eq!(transaction.query_portal(&portal, 2).unwrap().len(), 2);
    }
    transaction.commit().unwrap();
    assert_eq!(bed.number("SELECT sum(v) FROM t"), 6);
}

/// Other statements between two fetches have counts of their own.
#[test]
fn suspended_portals_and_other_statements_in_turn() {
    let mut bed = Bed::new(&format!("{SIX} {TOUCH}"));
    bed.limit("{public.t}", 4);
    let sql = "SELECT touch(i) FROM generate_series(1, 6) AS i";
    let mut transaction = bed.writer.transaction().unwrap();
    let first = transaction.bind(sql, &[]).unwrap();
    let second = transaction.bind(sql, &[]).unwrap();
    assert_eq!(transaction.query_portal(&first, 2).unwrap().len(), 2);
    assert_eq!(transaction.query_portal(&second, 3).unwrap().len(), 3);
    transaction.batch_execute("UPDATE t SET v = v + 1 WHERE id <= 4").unwrap();
    assert_eq!(transaction.query_portal(&first, 2).unwrap().len(), 2);
    assert_eq!(transaction.query_portal(&second, 1).unwrap().len(), 1);
    transaction.batch_execute("UPDATE t SET v = v + 1 WHERE id <= 4; SAVEPOINT a").unwrap();
    let refusal = expect_refusal(transaction.query_portal(&first, 1));
    assert_eq!(refusal.sqlstate, "WG001");
    transaction.batch_execute("ROLLBACK TO a").unwrap();
    let refusal = expect_refusal(transaction.query_portal(&second, 1));
    assert_eq!(refusal.sqlstate, "WG001");
    transaction.rollback().unwrap();
}

/// What a portal did since the savepoint is given back, also when other statements ran meanwhile.
#[test]
fn suspended_portal_and_a_savepoint() {
    let mut bed = Bed::new(&format!("{SIX} {TOUCH}"));
    bed.limit("{public.t}", 4);
    let sql = "SELECT touch(i) FROM generate_series(1, 6) AS i";
    for between in ["SELECT 1", "UPDATE t SET v = v + 1 WHERE id = 1"] {
        let mut transaction = bed.writer.transaction().unwrap();
        let portal = transaction.bind(sql, &[]).unwrap();
        assert_eq!(transaction.query_portal(&portal, 2).unwrap().len(), 2);
        transaction.batch_execute("SAVEPOINT a").unwrap();
        assert_eq!(transaction.query_portal(&portal, 2).unwrap().len(), 2);
        transaction.batch_execute(between).unwrap();
        transaction.batch_execute("ROLLBACK TO a").unwrap();
        match transaction.query_portal(&portal, 2) {
            Ok(rows) => assert_eq!(rows.len(), 2),
            Err(error) => panic!("with {between} between: {:?}", Refusal::of(&error)),
        }
        transaction.rollback().unwrap();
    }
}

// Several statements in one string

#[test]
fn statements_of_one_string_are_several() {
    let mut bed = Bed::new(SIX);
    bed.limit("{public.t}", 3);
    bed.passes(
        "UPDATE t SET v = 1 WHERE id <= 3; UPDATE t SET v = 1 WHERE id > 3;
         DELETE FROM t WHERE id <= 3; DELETE FROM t WHERE id = 4",
    );
    assert_eq!(bed.number("SELECT count(*) FROM t"), 2);
}

/// A refused one takes the others of its implicit transaction with it.
#[test]
fn one_refused_statement_of_a_string_undoes_all() {
    let mut bed = Bed::new(SIX);
    bed.limit("{public.t}", 3);
    bed.refused("UPDATE t SET v = 1 WHERE id <= 3; UPDATE t SET v = 1");
    bed.refused("UPDATE t SET v = 1; UPDATE t SET v = 1 WHERE id <= 3");
    bed.passes("UPDATE t SET v = 1 WHERE id <= 3");
}

#[test]
fn commits_inside_a_string_stay() {
    let mut bed = Bed::new(SIX);
    bed.limit("{public.t}", 3);
    refuse(&mut bed.writer, "BEGIN; UPDATE t SET v = 1 WHERE id <= 3; COMMIT; UPDATE t SET v = 2");
    assert_eq!(bed.number("SELECT sum(v) FROM t"), 3);
}

// Transactions

#[test]
fn limit_of_the_transaction() {
    let mut bed = Bed::new(SIX);
    let sql = "BEGIN; UPDATE t SET v = v + 1 WHERE id <= 3; DELETE FROM t WHERE id > 4; COMMIT";
    bed.policy("tables => '{public.t}', max_rows_per_transaction => 4");
    bed.refused(sql);
    bed.refused("UPDATE t SET v = 1");
    bed.policy("tables => '{public.t}', max_rows_per_transaction => 5");
    bed.passes(sql);
    bed.passes(sql);
}

#[test]
fn limit_of_the_transaction_zero_and_beside_that_of_the_statement() {
    let mut bed = Bed::new(SIX);
    bed.policy("tables => '{public.t}', max_rows_per_transaction => 0");
    bed.refused("UPDATE t SET v = 1 WHERE id = 1");
    bed.passes("UPDATE t SET v = 1 WHERE id = 100");
    bed.policy("tables => '{public.t}', max_rows => 2, max_rows_per_transaction => 3");
    bed.refused("UPDATE t SET v = 1 WHERE id <= 3");
    bed.refused("BEGIN; UPDATE t SET v = 1 WHERE id <= 2; UPDATE t SET v = 1 WHERE id <= 2; COMMIT");
    bed.passes("BEGIN; UPDATE t SET v = 1 WHERE id <= 2; UPDATE t SET v = 1 WHERE id <= 1; COMMIT");
}

/// An implicit transaction of several statements is one too.
#[test]
fn limit_of_the_transaction_in_one_string() {
    let mut bed = Bed::new(SIX);
    bed.policy("tables => '{public.t}', max_rows_per_transaction => 5");
    bed.refused("UPDATE t SET v = 1 WHERE id <= 3; UPDATE t SET v = 1 WHERE id > 3");
    bed.passes("UPDATE t SET v = 1 WHERE id <= 3");
    bed.passes("UPDATE t SET v = 1 WHERE id > 3");
}

#[test]
fn a_rolled_back_transaction_counts_for_nothing_later() {
    let mut bed = Bed::new(SIX);
    bed.policy("tables => '{public.t}', max_rows => 4, max_rows_per_transaction => 4");
    for _ in 0..3 {
        bed.passes("BEGIN; UPDATE t SET v = 1 WHERE id <= 4; ROLLBACK");
    }
    bed.passes("UPDATE t SET v = 1 WHERE id <= 4");
}

#[test]
fn commit_and_chain_ends_the_count() {
    let mut bed = Bed::new(SIX);
    bed.policy("tables => '{public.t}', max_rows_per_transaction => 3");
    bed.passes(
        "BEGIN; UPDATE t SET v = 1 WHERE id <= 3; COMMIT AND CHAIN;
         UPDATE t SET v = 2 WHERE id > 3; ROLLBACK AND CHAIN;
         UPDATE t SET v = 1 WHERE id > 3; COMMIT",
    );
    assert_eq!(bed.number("SELECT sum(v) FROM t"), 6);
}

#[test]
fn prepare_transaction_ends_the_count() {
    let mut bed = Bed::new(SIX);
    let name = bed.db().name.clone();
    bed.policy("tables => '{public.t}', max_rows_per_transaction => 3");
    bed.passes(&format!("BEGIN; UPDATE t SET v = 1 WHERE id <= 3; PREPARE TRANSACTION '{name}'"));
    bed.passes("UPDATE t SET v = 1 WHERE id > 3");
    bed.passes(&format!("COMMIT PREPARED '{name}'"));
    assert_eq!(bed.number("SELECT sum(v) FROM t"), 6);
}

// Savepoints

#[test]
fn rollback_to_savepoint_gives_rows_back() {
    let mut bed = Bed::new(SIX);
    bed.policy("tables => '{public.t}', max_rows_per_transaction => 5");
    bed.passes(
        "BEGIN; UPDATE t SET v = 1 WHERE id <= 2;
         SAVEPOINT a; UPDATE t SET v = 1 WHERE id <= 3; ROLLBACK TO a;
         UPDATE t SET v = 1 WHERE id <= 3; ROLLBACK TO a;
         UPDATE t SET v = 2 WHERE id <= 3; COMMIT",
    );
    bed.refused(
        "BEGIN; UPDATE t SET v = 1 WHERE id <= 2;
         SAVEPOINT a; UPDATE t SET v = 1 WHERE id <= 3; ROLLBACK TO a;
         UPDATE t SET v = 2 WHERE id <= 4; COMMIT",
    );
}

#[test]
fn released_savepoints_keep_their_rows() {
    let mut bed = Bed::new(SIX);
    bed.policy("tables => '{public.t}', max_rows_per_transaction => 5");
    bed.refused(
        "BEGIN; SAVEPOINT a; UPDATE t SET v = 1 WHERE id <= 3; RELEASE a;
         UPDATE t SET v = 1 WHERE id <= 3; COMMIT",
    );
    bed.passes(
        "BEGIN; SAVEPOINT a; UPDATE t SET v = 1 WHERE id <= 3; RELEASE a;
         UPDATE t SET v = 1 WHERE id <= 2; COMMIT",
    );
}

/// What was released into a savepoint that is rolled back is given back with it.
#[test]
fn nested_savepoints() {
    let mut bed = Bed::new(SIX);
    bed.policy("tables => '{public.t}', max_rows_per_transaction => 6");
    bed.passes(
        "BEGIN; UPDATE t SET v = 1 WHERE id = 1;
         SAVEPOINT a; UPDATE t SET v = 1 WHERE id <= 2;
         SAVEPOINT b; UPDATE t SET v = 1 WHERE id <= 3; RELEASE b;
         ROLLBACK TO a;
         UPDATE t SET v = 2 WHERE id <= 5; COMMIT",
    );
    bed.refused(
        "BEGIN; UPDATE t SET v = 1 WHERE id = 1;
         SAVEPOINT a; UPDATE t SET v = 1 WHERE id <= 2;
         SAVEPOINT b; UPDATE t SET v = 1 WHERE id <= 3; ROLLBACK TO b;
         UPDATE t SET v = 2 WHERE id <= 4; COMMIT",
    );
}

#[test]
fn a_refusal_after_a_savepoint_takes_only_that_back() {
    let mut bed = Bed::new(SIX);
    bed.policy("tables => '{public.t}', max_rows => 4, max_rows_per_transaction => 5");
    pass(&mut bed.writer, "BEGIN; UPDATE t SET v = 1 WHERE id <= 2; SAVEPOINT a");
    refuse(&mut bed.writer, "UPDATE t SET v = 1");
    pass(&mut bed.writer, "ROLLBACK TO a");
    refuse(&mut bed.writer, "UPDATE t SET v = 2 WHERE id <= 4");
    pass(&mut bed.writer, "ROLLBACK TO a");
    pass(&mut bed.writer, "UPDATE t SET v = 2 WHERE id <= 3");
    pass(&mut bed.writer, "COMMIT");
    assert_eq!(bed.number("SELECT sum(v) FROM t"), 6);
}

#[test]
fn exception_blocks_give_rows_back_to_the_transaction() {
    let mut bed = Bed::new(SIX);
    bed.policy("tables => '{public.t}', max_rows_per_transaction => 6");
    let block = "DO $$ BEGIN UPDATE t SET v = 1; RAISE 'no'; EXCEPTION WHEN raise_exception THEN NULL; END $$;";
    bed.passes(&format!("BEGIN; {block} {block} UPDATE t SET v = 1; COMMIT"));
    bed.refused(&format!("BEGIN; {block} UPDATE t SET v = 1 WHERE id = 1; {block} UPDATE t SET v = 1; COMMIT"));
}

#[test]
fn deep_subtransactions() {
    let mut bed = Bed::new(SIX);
    bed.policy("tables => '{public.t}', max_rows_per_transaction => 6");
    let mut sql = "BEGIN;".to_owned();
    for level in 0..80 {
        sql += &format!("SAVEPOINT s{level}; UPDATE t SET v = v + 1 WHERE id = {level} % 5 + 20;");
    }
    sql += "UPDATE t SET v = 1 WHERE id <= 3; ROLLBACK TO s3; UPDATE t SET v = 2; COMMIT";
    bed.passes(&sql);
    bed.refused(&sql.replace("v = 2;", "v = 2; UPDATE t SET v = 3 WHERE id = 1;"));
}

// After a refusal

#[test]
fn after_each_of_200_refusals_the_next_statement_counts_from_zero() {
    let mut bed = Bed::new(SIX);
    bed.limit("{public.t}", 3);
    let before = bed.contents();
    for _ in 0..200 {
        refuse(&mut bed.writer, "UPDATE t SET v = v + 1");
        assert_eq!(bed.writer.execute("UPDATE t SET v = v WHERE id <= 3", &[]).unwrap(), 3);
    }
    assert_eq!(bed.contents(), before);
}

/// The refusal comes from within triggers, functions, a WITH and a portal, and nothing of them stays.
#[test]
fn refusals_from_within_leave_no_count_behind() {
    let mut bed = Bed::new(&format!(
        "{SIX} {TOUCH} CREATE TABLE u AS TABLE t;
         CREATE FUNCTION follow() RETURNS trigger LANGUAGE plpgsql AS $$
         BEGIN UPDATE t SET v = v + 1 WHERE id = NEW.id; RETURN NEW; END $$;
         CREATE TRIGGER follow AFTER UPDATE ON u FOR EACH ROW EXECUTE FUNCTION follow();"
    ));
    bed.limit("{public.t}", 3);
    for sql in [
        "UPDATE u SET v = 1",
        "SELECT touch(i) FROM generate_series(1, 6) AS i",
        "DO $$ BEGIN FOR i IN 1..6 LOOP PERFORM touch(i); END LOOP; END $$",
        "WITH x AS (UPDATE t SET v = 1 RETURNING id) SELECT 1",
        "BEGIN; UPDATE t SET v = 1 WHERE id <= 3; UPDATE t SET v = 1; COMMIT",
        "BEGIN; DECLARE c CURSOR FOR SELECT touch(i) FROM generate_series(1, 6) AS i; FETCH ALL FROM c",
        "EXPLAIN ANALYZE UPDATE t SET v = 1",
        "CREATE TABLE x AS SELECT touch(i) FROM generate_series(1, 6) AS i",
    ] {
        for _ in 0..3 {
            bed.refused(sql);
            bed.passes("UPDATE t SET v = v WHERE id <= 3");
            bed.passes("UPDATE u SET v = v WHERE id <= 3");
        }
    }
}

/// Errors of others on the way do not leave counts behind either.
#[test]
fn other_errors_leave_no_count_behind() {
    let mut bed = Bed::new(&format!("{SIX} {TOUCH}"));
    bed.limit("{public.t}", 3);
    for sql in [
        "UPDATE t SET v = 1 / (id - 3) WHERE id <= 3",
        "SELECT touch(i), 1 / (3 - i) FROM generate_series(1, 3) AS i",
        "DO $$ BEGIN PERFORM touch(1); PERFORM touch(2); RAISE 'no'; END $$",
        "UPDATE t SET v = 1 WHERE id <= 3; SELECT 1 / 0",
        "BEGIN; UPDATE t SET v = 1 WHERE id <= 3; SELECT 1 / 0",
    ] {
        for _ in 0..3 {
            let refusal = expect_refusal(bed.writer.batch_execute(sql));
            assert!(["22012", "P0001"].contains(&refusal.sqlstate.as_str()), "{sql}: {refusal:?}");
            bed.passes("ROLLBACK");
            bed.passes("UPDATE t SET v = v WHERE id <= 3");
        }
    }
}

// Changes of policies

#[test]
fn a_policy_set_inside_a_transaction_counts_from_there() {
    let mut bed = Bed::new(SIX);
    bed.passes("BEGIN; UPDATE t SET v = 1");
    bed.passes("SELECT writeguard.set_policy('p', tables => '{public.t}', max_rows_per_transaction => 3)");
    bed.passes("UPDATE t SET v = 2 WHERE id <= 3; SAVEPOINT a");
    refuse(&mut bed.writer, "UPDATE t SET v = 2 WHERE id = 4");
    bed.passes("ROLLBACK TO a; COMMIT");
    assert_eq!(bed.number("SELECT sum(v) FROM t"), 9);
    bed.refused("UPDATE t SET v = 2 WHERE id <= 4");
}

#[test]
fn a_policy_changed_inside_a_transaction_counts_from_there() {
    let mut bed = Bed::new(SIX);
    bed.policy("tables => '{public.t}', max_rows_per_transaction => 4");
    bed.passes("BEGIN; UPDATE t SET v = 1 WHERE id <= 4");
    bed.passes("SELECT writeguard.set_policy('p', tables => '{public.t}', max_rows_per_transaction => 3)");
    bed.passes("UPDATE t SET v = 2 WHERE id <= 3; SAVEPOINT a");
    refuse(&mut bed.writer, "UPDATE t SET v = 2 WHERE id = 4");
    bed.passes("ROLLBACK TO a; COMMIT");
}

/// The transaction is in another session than the change.
#[test]
fn a_policy_that_another_session_sets_counts_from_there() {
    let mut bed = Bed::new(SIX);
    bed.passes("BEGIN; UPDATE t SET v = 1");
    bed.policy("tables => '{public.t}', max_rows => 4, max_rows_per_transaction => 5");
    bed.passes("UPDATE t SET v = 2 WHERE id <= 3; SAVEPOINT a");
    refuse(&mut bed.writer, "UPDATE t SET v = 3 WHERE id <= 3");
    bed.passes("ROLLBACK TO a; UPDATE t SET v = 3 WHERE id <= 2; COMMIT");
    bed.refused("UPDATE t SET v = 2 WHERE id <= 5");
}

/// A change of one policy leaves the counts of the others alone.
#[test]
fn a_policy_set_inside_a_transaction_leaves_others_counting() {
    let mut bed = Bed::new(&format!("{SIX} CREATE TABLE u AS TABLE t;"));
    bed.policy("tables => '{public.t}', max_rows_per_transaction => 4");
    bed.passes("BEGIN; UPDATE t SET v = 1 WHERE id <= 3");
    bed.passes("SELECT writeguard.set_policy('q', tables => '{public.u}', max_rows => 1)");
    bed.passes("UPDATE t SET v = 1 WHERE id = 4; SAVEPOINT a");
    refuse(&mut bed.writer, "UPDATE t SET v = 1 WHERE id = 5");
    bed.passes("ROLLBACK TO a");
    refuse(&mut bed.writer, "UPDATE u SET v = 1");
    bed.passes("ROLLBACK");
}

#[test]
fn a_policy_change_is_seen_by_others_with_its_commit() {
    let mut bed = Bed::new(SIX);
    let mut other = bed.db().admin();
    pass(&mut other, "PREPARE q AS UPDATE t SET v = v + 1; EXECUTE q");
    bed.passes("BEGIN; SELECT writeguard.set_policy('p', tables => '{public.t}', max_rows => 5)");
    pass(&mut other, "UPDATE t SET v = v + 1");
    pass(&mut other, "EXECUTE q");
    refuse(&mut bed.writer, "UPDATE t SET v = v + 1");
    bed.passes("ROLLBACK");
    pass(&mut other, "EXECUTE q");
    bed.passes("UPDATE t SET v = v + 1");

    bed.passes("BEGIN; SELECT writeguard.set_policy('p', tables => '{public.t}', max_rows => 5)");
    pass(&mut other, "EXECUTE q");
    bed.passes("COMMIT");
    refuse(&mut other, "EXECUTE q");
    refuse(&mut other, "UPDATE t SET v = v + 1");
    bed.passes("SELECT writeguard.set_policy('p', tables => '{public.t}', max_rows => 6)");
    pass(&mut other, "EXECUTE q");
    bed.passes("SELECT writeguard.set_policy('p', tables => '{public.t}', max_rows => 2)");
    refuse(&mut other, "EXECUTE q");
    bed.passes("SELECT writeguard.drop_policy('p')");
    pass(&mut other, "EXECUTE q");
}

#[test]
fn a_rolled_back_policy_change_changes_nothing() {
    let mut bed = Bed::new(SIX);
    bed.limit("{public.t}", 3);
    bed.refused("UPDATE t SET v = 1");
    for change in [
        "SELECT writeguard.set_policy('p', tables => '{public.t}', max_rows => 100)",
        "SELECT writeguard.set_policy('p', tables => '{public.t}', max_rows => 0)",
        "SELECT writeguard.drop_policy('p')",
    ] {
        bed.passes(&format!("BEGIN; {change}; ROLLBACK"));
        bed.refused("UPDATE t SET v = 1 WHERE id <= 4");
        bed.passes("UPDATE t SET v = 1 WHERE id <= 3");
        bed.passes(&format!("BEGIN; SAVEPOINT a; {change}; ROLLBACK TO a"));
        refuse(&mut bed.writer, "UPDATE t SET v = 1 WHERE id <= 4");
        bed.passes("ROLLBACK TO a; UPDATE t SET v = 1 WHERE id <= 3; COMMIT");
    }
}

/// A change that is taken back leaves the transaction's count where it was.
#[test]
fn a_policy_change_taken_back_goes_on_counting() {
    let mut bed = Bed::new(SIX);
    bed.policy("tables => '{public.t}', max_rows_per_transaction => 4");
    bed.passes(
        "BEGIN; UPDATE t SET v = 1 WHERE id <= 3; SAVEPOINT a;
         SELECT writeguard.set_policy('p', tables => '{public.t}', max_rows_per_transaction => 1);
         UPDATE t SET v = 1 WHERE id = 1; ROLLBACK TO a; UPDATE t SET v = 1 WHERE id = 1",
    );
    refuse(&mut bed.writer, "UPDATE t SET v = 1 WHERE id = 1");
    bed.passes("ROLLBACK");
}

/// The sessions have written to both tables before, under the names that they had then.
#[test]
fn a_table_swapped_in_under_the_name_is_guarded_at_once() {
    let mut bed = Bed::new(&format!("{SIX} CREATE TABLE fresh AS TABLE t;"));
    bed.limit("{public.t}", 5);
    let mut other = bed.db().admin();
    pass(&mut other, "PREPARE q AS UPDATE t SET v = v + 1; UPDATE fresh SET v = v + 1");
    refuse(&mut other, "EXECUTE q");
    bed.passes("UPDATE fresh SET v = v + 1");
    bed.refused("UPDATE t SET v = 1");
    bed.passes("BEGIN; ALTER TABLE t RENAME TO old; ALTER TABLE fresh RENAME TO t; COMMIT");
    bed.refused("UPDATE t SET v = 1");
    refuse(&mut other, "EXECUTE q");
    refuse(&mut other, "DELETE FROM t");
    bed.passes("UPDATE old SET v = 1");
    pass(&mut other, "UPDATE old SET v = 1");
}

// Other sessions

/// Runs `sql` in a session of its own while the writer holds its locks; then the writer commits.
fn meanwhile(bed: &mut Bed, held: &str, sql: &'static str) -> Result<(), postgres::Error> {
    pass(&mut bed.writer, held);
    let mut other = bed.db().admin();
    let pid = number(&mut other, "SELECT pg_backend_pid()");
    let waiting = thread::spawn(move || other.batch_execute(sql));
    let reader = &mut bed.reader;
    wait_until(20, || {
        number(reader, &format!("SELECT count(*) FROM pg_stat_activity WHERE pid = {pid} AND wait_event_type = 'Lock'"))
            == 1
    });
    pass(&mut bed.writer, "COMMIT");
    waiting.join().expect("the other session")
}

/// Rows that another session changed first, so that they no longer qualify, are not changes.
#[test]
fn rows_that_no_longer_qualify_do_not_count() {
    for (sql, rows) in [
        ("UPDATE t SET v = 2 WHERE v = 0", 4),
        ("DELETE FROM t WHERE v = 0", 4),
        ("WITH u AS (UPDATE t SET v = 2 WHERE v = 0 RETURNING id) SELECT * FROM u", 4),
        (
            "MERGE INTO t USING generate_series(1, 6) AS s ON s = t.id \
             WHEN MATCHED AND t.v = 0 THEN UPDATE SET v = 2",
            4,
        ),
        (
            "INSERT INTO t SELECT i FROM generate_series(1, 6) AS i \
             ON CONFLICT (id) DO UPDATE SET v = 2 WHERE t.v = 0",
            4,
        ),
    ] {
        for (limit, passes) in [(rows - 1, false), (rows, true)] {
            let mut bed = Bed::new(SIX);
            bed.limit("{public.t}", limit);
            let result = meanwhile(&mut bed, "BEGIN; UPDATE t SET v = 1 WHERE id IN (1, 6)", sql);
            match result {
                Ok(()) => assert!(passes, "{sql} passed a limit of {limit}"),
                Err(error) => {
                    assert!(!passes, "{sql}: {:?}", Refusal::of(&error));
                    assert_eq!(Refusal::of(&error).sqlstate, "WG001", "{sql}");
                }
            }
        }
    }
}

/// Rows that another session deleted first.
#[test]
fn rows_that_are_gone_do_not_count() {
    for sql in ["UPDATE t SET v = 2", "DELETE FROM t"] {
        for (limit, passes) in [(3, false), (4, true)] {
            let mut bed = Bed::new(SIX);
            bed.limit("{public.t}", limit);
            let result = meanwhile(&mut bed, "BEGIN; DELETE FROM t WHERE id IN (2, 6)", sql);
            assert_eq!(result.is_ok(), passes, "{sql}, limit {limit}");
        }
    }
}

/// Rows that another session changed first and that still qualify count once.
#[test]
fn rows_that_still_qualify_count_once() {
    for (limit, passes) in [(5, false), (6, true)] {
        let mut bed = Bed::new(SIX);
        bed.limit("{public.t}", limit);
        let result = meanwhile(&mut bed, "BEGIN; UPDATE t SET v = 1 WHERE id IN (1, 4)", "UPDATE t SET v = v + 1");
        assert_eq!(result.is_ok(), passes, "limit {limit}");
    }
}

/// What one session writes is charged to no other.
#[test]
fn sessions_have_budgets_of_their_own() {
    let mut bed = Bed::new(SIX);
    bed.policy("tables => '{public.t}', max_rows_per_transaction => 3");
    let mut other = bed.db().admin();
    bed.passes("BEGIN; UPDATE t SET v = 1 WHERE id <= 3");
    pass(&mut other, "BEGIN; UPDATE t SET v = 1 WHERE id > 3; COMMIT");
    bed.passes("COMMIT");
    assert_eq!(bed.number("SELECT sum(v) FROM t"), 6);
}

/// While one session is past the limit the other sees nothing of it, before and after.
#[test]
fn nothing_of_a_refused_statement_is_ever_seen() {
    let mut bed = Bed::new(
        "CREATE TABLE t (id int PRIMARY KEY, v int NOT NULL DEFAULT 0);
         INSERT INTO t SELECT i, 0 FROM generate_series(1, 2000) AS i;",
    );
    bed.limit("{public.t}", 1999);
    let before = bed.contents();
    let mut other = bed.db().admin();
    let writing = thread::spawn(move || {
        for _ in 0..20 {
            refuse(&mut other, "UPDATE t SET v = v + 1");
        }
    });
    while !writing.is_finished() {
        assert_eq!(contents(&mut bed.reader), before);
    }
    writing.join().expect("the other session");
    assert_eq!(bed.contents(), before);
}

/// Other sessions that change policies, memberships, schemas and tables without a pause, so that hardly a look-up is made
/// without something coming in meanwhile: each answer is right all the same, and none is waited for.
#[test]
fn beside_sessions_that_do_nothing_but_change_what_answers_depend_on() {
    use std::sync::atomic::{AtomicBool, Ordering};
    let mut bed = Bed::new(SIX);
    let (group, member) = (bed.db().role("group"), bed.db().role("member"));
    bed.limit("{public.*}", 3);
    let over = AtomicBool::new(false);
    let storms = [
        "SELECT writeguard.set_policy('noise', tables => '{other.*}', max_rows => $n)".to_owned(),
        format!("GRANT {group} TO {member}; REVOKE {group} FROM {member}"),
        "CREATE SCHEMA storm$n; CREATE TABLE storm$n.t (id int); DROP SCHEMA storm$n CASCADE".to_owned(),
        "ALTER TABLE noisy RENAME TO noise; ALTER TABLE noise RENAME TO noisy".to_owned(),
    ];
    bed.passes("CREATE TABLE noisy (id int)");
    thread::scope(|scope| {
        for storm in &storms {
            let (mut client, over) = (bed.db().admin(), &over);
            scope.spawn(move || {
                for n in 0.. {
                    if over.load(Ordering::Relaxed) {
                        return;
                    }
                    pass(&mut client, &storm.replace("$n", &n.to_string()));
                }
            });
        }
        let mut writer = bed.db().admin();
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            for n in 0..60 {
                pass(&mut writer, &format!("CREATE TABLE x{n} AS TABLE t"));
                pass(&mut writer, &format!("UPDATE x{n} SET v = 1 WHERE id <= 3"));
                refuse(&mut writer, &format!("UPDATE x{n} SET v = 2"));
                refuse(&mut writer, &format!("DELETE FROM x{n}"));
                pass(&mut writer, "UPDATE t SET v = v + 1 WHERE id <= 3");
                refuse(&mut writer, "UPDATE t SET v = 9");
            }
        }));
        over.store(true, Ordering::Relaxed);
        if let Err(panic) = outcome {
            std::panic::resume_unwind(panic);
        }
    });
    assert_eq!(bed.number("SELECT sum(v) FROM t"), 180);
}

//! Policies that want writes of more than one row inside a transaction block.

use crate::common::limits::{Bed, SIX, pass};
use crate::common::{Refusal, expect_refusal};

/// The statement fails with WG003 and leaves everything as it was.
#[track_caller]
fn refused(bed: &mut Bed, sql: &str) -> Refusal {
    let before = bed.contents();
    let refusal = expect_refusal(bed.writer.batch_execute(sql));
    let _ = bed.writer.batch_execute("ROLLBACK");
    assert_eq!(refusal.sqlstate, "WG003", "{sql}: {refusal:?}");
    assert_eq!(bed.contents(), before, "{sql}: refused, but not undone");
    refusal
}

fn bed() -> Bed {
    let mut bed = Bed::new(SIX);
    bed.policy("tables => '{public.t}', require_transaction => true");
    bed
}

#[test]
fn the_second_row_of_an_autocommit_write_is_refused() {
    let mut bed = bed();
    bed.passes("UPDATE t SET v = 1 WHERE id = 1");
    let refusal = refused(&mut bed, "UPDATE t SET v = 2 WHERE id <= 2");
    assert_eq!(refusal.said(), "update of more than one row of table \"public.t\" outside a transaction block");
    assert!(refusal.hint.starts_with("BEGIN;"), "{refusal:?}");
    assert_eq!((refusal.schema.as_str(), refusal.table.as_str()), ("public", "t"));
    refused(&mut bed, "DELETE FROM t");
    bed.passes("UPDATE t SET v = 2 WHERE id = 7");
    bed.passes("BEGIN; UPDATE t SET v = 3; DELETE FROM t WHERE id > 4; COMMIT");
    assert_eq!(bed.number("SELECT sum(v) FROM t"), 12);
    let row = bed
        .reader
        .query_one(
            "SELECT scope, row_limit, rows FROM writeguard.event WHERE kind = 'blocked' ORDER BY id LIMIT 1",
            &[],
        )
        .expect("an event");
    let event: (&str, i64, i64) = (row.get(0), row.get(1), row.get(2));
    assert_eq!(event, ("block", 1, 2));
}

#[test]
fn functions_and_blocks_of_code_are_no_transaction_block() {
    let mut bed = bed();
    refused(&mut bed, "DO $$ BEGIN UPDATE t SET v = 1; END $$");
    refused(&mut bed, "DO $$ BEGIN UPDATE t SET v = 1 WHERE id = 1; UPDATE t SET v = 1 WHERE id = 2; END $$");
    refused(&mut bed, "DO $$ BEGIN BEGIN UPDATE t SET v = 1; EXCEPTION WHEN division_by_zero THEN END; END $$");
    bed.passes("CREATE FUNCTION f() RETURNS void LANGUAGE sql AS 'UPDATE t SET v = 1'");
    refused(&mut bed, "SELECT f()");
    bed.passes("BEGIN; SELECT f(); DO $$ BEGIN UPDATE t SET v = 2; END $$; COMMIT");
}

#[test]
fn an_implicit_block_is_none() {
    let mut bed = bed();
    refused(&mut bed, "SELECT 1; UPDATE t SET v = 1");
    refused(&mut bed, "UPDATE t SET v = 1 WHERE id = 1; UPDATE t SET v = 1");
    // Each of them changes one row.
    bed.passes("UPDATE t SET v = 1 WHERE id = 1; UPDATE t SET v = 1 WHERE id = 2");
    bed.passes("SELECT 1; BEGIN; UPDATE t SET v = 2; COMMIT");
    refused(&mut bed, "BEGIN; COMMIT; UPDATE t SET v = 3");
}

#[test]
fn drivers_that_open_transactions_themselves_pass() {
    let mut bed = bed();
    let mut transaction = bed.writer.transaction().expect("BEGIN");
    assert_eq!(transaction.execute("UPDATE t SET v = $1", &[&1]).expect("an update"), 6);
    let mut nested = transaction.transaction().expect("SAVEPOINT");
    assert_eq!(nested.execute("UPDATE t SET v = $1", &[&2]).expect("an update"), 6);
    nested.commit().expect("RELEASE");
    transaction.commit().expect("COMMIT");
    let refusal = expect_refusal(bed.writer.execute("UPDATE t SET v = $1", &[&3]));
    assert_eq!(refusal.sqlstate, "WG003");
    assert_eq!(bed.number("SELECT sum(v) FROM t"), 12);
}

#[test]
fn a_block_ends_with_its_transaction_however_that_ends() {
    let mut bed = bed();
    for block in
        ["BEGIN; COMMIT", "BEGIN; ROLLBACK", "START TRANSACTION; END", "BEGIN; SAVEPOINT s; ROLLBACK TO s; COMMIT"]
    {
        bed.passes(block);
        refused(&mut bed, "UPDATE t SET v = 1");
    }
    assert_eq!(expect_refusal(bed.writer.batch_execute("BEGIN; SELECT 1 / 0")).sqlstate, "22012");
    bed.passes("ROLLBACK");
    refused(&mut bed, "UPDATE t SET v = 1");
    let name = bed.db().name.clone();
    bed.passes(&format!("BEGIN; UPDATE t SET v = 1; PREPARE TRANSACTION '{name}'"));
    bed.passes(&format!("COMMIT PREPARED '{name}'"));
    refused(&mut bed, "UPDATE t SET v = 2");
    // After an error the savepoint brings the block back.
    assert_eq!(expect_refusal(bed.writer.batch_execute("BEGIN; SAVEPOINT s; SELECT 1 / 0")).sqlstate, "22012");
    bed.passes("ROLLBACK TO s; UPDATE t SET v = 4; COMMIT");
    assert_eq!(bed.number("SELECT sum(v) FROM t"), 24);
}

#[test]
fn a_chain_goes_on_in_a_block_and_a_broken_one_does_not() {
    let mut bed = bed();
    bed.passes("BEGIN; COMMIT AND CHAIN");
    bed.passes("UPDATE t SET v = 1");
    bed.passes("ROLLBACK AND CHAIN");
    bed.passes("UPDATE t SET v = 2; COMMIT");
    assert_eq!(bed.number("SELECT sum(v) FROM t"), 12);
    refused(&mut bed, "UPDATE t SET v = 3");
    assert_eq!(expect_refusal(bed.writer.batch_execute("BEGIN; SELECT 1 / 0")).sqlstate, "22012");
    bed.passes("ROLLBACK AND CHAIN");
    bed.passes("UPDATE t SET v = 3");
    bed.passes("COMMIT");
    refused(&mut bed, "UPDATE t SET v = 4");
    // The commit fails, so there is nothing to chain to.
    bed.passes("CREATE TABLE u (id int UNIQUE DEFERRABLE INITIALLY DEFERRED)");
    bed.passes("BEGIN");
    bed.passes("INSERT INTO u VALUES (1), (1)");
    assert_eq!(expect_refusal(bed.writer.batch_execute("COMMIT AND CHAIN")).sqlstate, "23505");
    refused(&mut bed, "UPDATE t SET v = 5");
    assert_eq!(bed.number("SELECT sum(v) FROM t"), 18);
}

#[test]
fn truncate_wants_a_block_where_nothing_else_is_missing() {
    let mut bed = bed();
    refused(&mut bed, "TRUNCATE t");
    bed.policy("tables => '{public.t}', require_transaction => true, max_rows => 6");
    refused(&mut bed, "TRUNCATE t");
    bed.policy("tables => '{public.t}', require_transaction => true, max_rows => 5");
    assert_eq!(expect_refusal(bed.writer.batch_execute("TRUNCATE t")).sqlstate, "WG005");
    bed.policy("tables => '{public.t}', require_transaction => true");
    bed.passes("BEGIN; TRUNCATE t; COMMIT; INSERT INTO t VALUES (1, 1); TRUNCATE t");
}

#[test]
fn a_limit_that_is_passed_as_well_comes_first() {
    let mut bed = bed();
    bed.policy("tables => '{public.t}', require_transaction => true, max_rows => 1");
    bed.refused("UPDATE t SET v = 1");
    bed.policy("tables => '{public.t}', require_transaction => true, max_rows => 2");
    refused(&mut bed, "UPDATE t SET v = 1");
}

#[test]
fn the_flag_lifts_it_where_the_policy_says_so() {
    let mut bed = bed();
    bed.policy("tables => '{public.t}', require_transaction => true, override => 'flag'");
    refused(&mut bed, "UPDATE t SET v = 1");
    bed.passes("SET writeguard.override = on; UPDATE t SET v = 1");
    assert_eq!(bed.number("SELECT sum(v) FROM t"), 6);
    pass(
        &mut bed.reader,
        "DO $$ BEGIN ASSERT (SELECT scope FROM writeguard.event WHERE kind = 'overridden') = 'block'; END $$",
    );
}

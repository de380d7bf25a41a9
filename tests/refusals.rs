//! What a refused person reads: the event's number ends the message, and every number and name in it is true.

use crate::common::approvals::{Stage, WRITE, arm, number, pass, refused, text};
use crate::common::limits::{Bed, SIX};
use crate::common::{Refusal, Server, expect_refusal};

const NEWEST: &str = "SELECT id, kind FROM writeguard.event ORDER BY id DESC LIMIT 1";

/// The message ends with the number of the newest event, which is of that kind.
#[track_caller]
fn assert_newest(stage: &mut Stage, refusal: &Refusal, kind: &str) {
    let row = stage.admin.query_one(NEWEST, &[]).unwrap();
    assert_eq!((refusal.event(), row.get::<_, String>(1).as_str()), (Some(row.get(0)), kind), "{refusal:?}");
}

#[test]
fn every_refusal_ends_with_its_event() {
    let mut stage = Stage::new("");
    let mut client = stage.requester();
    for (arguments, write, sqlstate) in [
        ("max_rows => 3", WRITE, "WG001"),
        ("max_rows_per_transaction => 3", WRITE, "WG001"),
        ("rate_rows => 3", WRITE, "WG001"),
        ("require_where => true", WRITE, "WG002"),
        ("require_transaction => true", WRITE, "WG003"),
        ("max_rows => 3", "TRUNCATE t", "WG005"),
    ] {
        pass(&mut stage.admin, &format!("SELECT writeguard.set_policy('p', tables => '{{public.t}}', {arguments})"));
        let refusal = refused(&mut client, write, sqlstate);
        assert_newest(&mut stage, &refusal, "blocked");
    }
    let refusal = refused(&mut client, "SET writeguard.expect_rows = 1; UPDATE t SET a = 9 WHERE id <= 2", "WG004");
    assert_newest(&mut stage, &refusal, "expectation_failed");
    pass(&mut stage.admin, "SELECT writeguard.set_policy('p', tables => '{public.t}', max_rows => 3)");
    let (id, token) = stage.approved(WRITE);
    arm(&mut client, "00000000-0000-0000-0000-000000000000");
    let refusal = refused(&mut client, WRITE, "WG006");
    assert_newest(&mut stage, &refusal, "token_refused");
    arm(&mut client, &token);
    let refusal = refused(&mut client, "UPDATE t SET a = 8", "WG006");
    assert_newest(&mut stage, &refusal, "token_refused");
    stage.unguarded("DELETE FROM t WHERE id > 4");
    let refusal = refused(&mut client, &format!("SELECT writeguard.execute({id})"), "WG006");
    assert_newest(&mut stage, &refusal, "token_refused");
    assert_eq!(stage.changed(), 0);
}

#[test]
fn what_was_refused_twice_in_a_statement_is_the_same_event() {
    let mut stage = Stage::new(
        "CREATE FUNCTION twice() RETURNS text[] LANGUAGE plpgsql AS $$
         DECLARE told text[]; BEGIN
             FOR i IN 1..2 LOOP
                 BEGIN UPDATE t SET a = 9; EXCEPTION WHEN SQLSTATE 'WG001' THEN told := told || sqlerrm; END;
             END LOOP;
             RETURN told;
         END $$",
    );
    let told = text(&mut stage.requester(), "SELECT array_to_string(twice(), '|')");
    let (first, second) = told.split_once('|').unwrap();
    assert_eq!(first, second);
    let id = stage.number("SELECT id FROM writeguard.event WHERE kind = 'blocked'");
    assert!(first.ends_with(&format!("(event {id})")), "{told}");
}

#[test]
fn what_has_no_event_of_its_own_names_none() {
    let server = Server::start(&["writeguard.event_timeout = '200ms'", "writeguard.blocked_per_minute = 1"]);
    let mut stage = Stage::on(&server, "");
    let mut client = stage.requester();
    let mut locks = stage.db.admin();
    pass(&mut locks, "BEGIN; LOCK TABLE writeguard.event");
    let late = refused(&mut client, WRITE, "WG001");
    pass(&mut locks, "ROLLBACK");
    let summed_up = refused(&mut client, WRITE, "WG001");
    for refusal in [late, summed_up] {
        assert_eq!(refusal.message, "update of table \"public.t\" exceeds the limit of 3 rows per statement");
        assert!(refusal.hint.contains("writeguard.request('UPDATE t SET a = 9'"), "{refusal:?}");
    }
    assert_eq!(stage.changed(), 0);
}

/// The message, under a policy on `tables` that lets nothing be dropped.
#[track_caller]
fn said(setup: &str, tables: &str, ddl: &str) -> String {
    let mut bed = Bed::new(setup);
    bed.policy(&format!("tables => '{tables}', operations => '{{drop}}', max_rows => 0"));
    let refusal = expect_refusal(bed.writer.batch_execute(ddl));
    assert_eq!(refusal.sqlstate, "WG005", "{ddl}: {refusal:?}");
    let end = " exceeds the limit of 0 rows per statement";
    let said = refusal.said().strip_suffix(end).unwrap_or_else(|| panic!("{ddl}: {refusal:?}")).to_owned();
    bed.policy(&format!("tables => '{tables}', operations => '{{drop}}', max_rows => 0, mode => 'warn'"));
    bed.passes(ddl);
    said
}

#[test]
fn ddl_is_called_what_it_is() {
    let partitioned = "CREATE TABLE t (id int) PARTITION BY LIST (id);
                       CREATE TABLE t1 PARTITION OF t FOR VALUES IN (1); INSERT INTO t VALUES (1)";
    let inherited = "CREATE TABLE t (id int); CREATE TABLE t1 () INHERITS (t); INSERT INTO t1 VALUES (1)";
    let in_schema = "CREATE SCHEMA s; CREATE TABLE s.t AS SELECT 1 AS id";
    for (setup, tables, ddl, called) in [
        (SIX, "{public.t}", "DROP TABLE t", "drop of table \"public.t\""),
        (SIX, "{public.t}", "ALTER TABLE t DROP COLUMN v", "drop column of table \"public.t\""),
        (SIX, "{public.t}", "ALTER TABLE t ALTER v TYPE text", "alter column type of table \"public.t\""),
        (SIX, "{public.t}", "ALTER TABLE t RENAME TO u", "rename of table \"public.t\""),
        (SIX, "{public.*}", "CREATE SCHEMA s; ALTER TABLE t SET SCHEMA s", "set schema of table \"public.t\""),
        (in_schema, "{s.*}", "ALTER SCHEMA s RENAME TO r", "schema rename of table \"s.t\""),
        (in_schema, "{s.*}", "DROP SCHEMA s CASCADE", "drop of table \"s.t\""),
        (partitioned, "{public.t}", "ALTER TABLE t DETACH PARTITION t1", "detach of table \"public.t1\""),
        (inherited, "{public.t}", "ALTER TABLE t1 NO INHERIT t", "no inherit of table \"public.t1\""),
    ] {
        assert_eq!(said(setup, tables, ddl), called, "{ddl}");
    }
    let mut bed = Bed::new(partitioned);
    bed.policy("tables => '{public.t}', operations => '{drop}', max_rows => 0");
    let refusal = expect_refusal(bed.writer.execute("ALTER TABLE t DETACH PARTITION t1 CONCURRENTLY", &[]));
    assert!(refusal.message.starts_with("detach of table \"public.t1\""), "{refusal:?}");
    // What was said of one command is not said of the next.
    let refusal = expect_refusal(bed.writer.batch_execute("DROP TABLE t1"));
    assert!(refusal.message.starts_with("drop of table \"public.t1\""), "{refusal:?}");
}

#[test]
fn a_rate_says_when_there_is_room_for_one_row_and_for_what_was_reached() {
    let mut stage = Stage::new(
        "INSERT INTO t SELECT generate_series(6, 300);
         SELECT writeguard.set_policy('p', tables => '{public.t}', rate_rows => 200)",
    );
    let mut client = stage.requester();
    let note = |refusal: &Refusal| refusal.detail.rsplit_once("There is ").unwrap().1.to_owned();
    pass(&mut client, "UPDATE t SET a = 1 WHERE id <= 150");
    let refusal = refused(&mut client, "UPDATE t SET a = 1 WHERE id <= 100", "WG001");
    assert_eq!(note(&refusal), "room for 1 row now, and for the 51 at which the statement was stopped in 18 s.");
    pass(&mut client, "UPDATE t SET a = 1 WHERE id <= 50");
    // It wants fifty rows and is stopped at the first, so nothing is said of fifty.
    let refusal = refused(&mut client, "UPDATE t SET a = 1 WHERE id <= 50", "WG001");
    assert_eq!(note(&refusal), "room for 1 row in 18 s.");
    pass(&mut stage.admin, "SELECT writeguard.set_policy('p', tables => '{public.t}', rate_rows => 0)");
    let refusal = refused(&mut client, "UPDATE t SET a = 1 WHERE id = 1", "WG001");
    assert!(refusal.detail.ends_with("There is never room for a row."), "{refusal:?}");
    assert_eq!(number(&mut client, "SELECT count(*) FROM t WHERE a = 1"), 150);
}

#[test]
fn one_of_a_thing_is_in_the_singular() {
    let stage = Stage::new("");
    let mut client = stage.requester();
    for (call, said) in [
        ("'UPDATE t SET a = $1', 'tests'", "the statement takes 1 parameter, but 0 are given"),
        ("'UPDATE t SET a = 1', 'tests', '{1}'", "the statement takes 0 parameters, but 1 is given"),
        ("'UPDATE t SET a = $1 WHERE id = $2', 'tests', '{1}'", "the statement takes 2 parameters, but 1 is given"),
    ] {
        let refusal = refused(&mut client, &format!("SELECT writeguard.request({call})"), "WG007");
        assert_eq!(refusal.message, said);
    }
}

#[test]
fn a_table_that_was_not_reviewed_is_no_number_of_rows() {
    let mut stage = Stage::new(
        "CREATE TABLE u AS TABLE t; CREATE TABLE switch (); GRANT ALL ON u, switch TO PUBLIC;
         CREATE FUNCTION more() RETURNS trigger LANGUAGE plpgsql AS
             $$BEGIN IF EXISTS (SELECT FROM switch) THEN UPDATE u SET a = 9; END IF; RETURN NULL; END$$;
         CREATE TRIGGER more AFTER UPDATE ON t EXECUTE FUNCTION more();
         SELECT writeguard.set_policy('p', tables => '{public.*}', max_rows => 3)",
    );
    let (id, token) = stage.approved(WRITE);
    pass(&mut stage.admin, "INSERT INTO switch DEFAULT VALUES");
    let mut client = stage.requester();
    arm(&mut client, &token);
    let refusal = refused(&mut client, WRITE, "WG006");
    assert!(refusal.message.contains("the write changes a table that was not reviewed"), "{refusal:?}");
    assert!(refusal.detail.starts_with("No row of \"public.u\" was among those that request"), "{refusal:?}");
    pass(&mut client, "RESET writeguard.token; RESET writeguard.override");
    let refusal = refused(&mut client, &format!("SELECT writeguard.execute({id})"), "WG006");
    assert!(!format!("{refusal:?}").contains("0 rows"), "{refusal:?}");
    assert_eq!(stage.changed(), 0);
}

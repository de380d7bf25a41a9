//! `writeguard.execute`: the requester runs exactly what was reviewed.

use std::thread;

use crate::common::approvals::*;
use crate::common::{Refusal, Server, expect_refusal, wait_until};
use postgres::Client;

fn call(id: i64) -> String {
    format!("SELECT * FROM writeguard.execute({id})")
}

/// What an execution returns, one JSON text for each row.
#[track_caller]
fn execute(client: &mut Client, id: i64) -> Vec<String> {
    match client.query("SELECT \"row\"::text FROM writeguard.execute($1)", &[&id]) {
        Ok(rows) => rows.iter().map(|row| row.get(0)).collect(),
        Err(error) => panic!("request {id} is not executed: {:?}", Refusal::of(&error)),
    }
}

#[track_caller]
fn not_executed(client: &mut Client, id: i64, sqlstate: &str) -> Refusal {
    refused(client, &call(id), sqlstate)
}

// ---- What it does ----

#[test]
fn it_runs_the_reviewed_statement_once_without_flag_or_token() {
    let mut stage = Stage::new("");
    let (id, _) = stage.approved(" UPDATE t SET a = 9 ; ");
    let (mut client, told) = stage.listening();
    assert_eq!(execute(&mut client, id), Vec::<String>::new());
    assert_eq!(told.take(), [("NOTICE".to_owned(), format!("executed request {id}: 5 rows changed"))]);
    assert_eq!(stage.changed(), 5);
    assert_eq!(stage.state(id), "spent");
    let event =
        "SELECT policy || '|' || login || '|' || operation || '|' || relation || '|' || scope || '|' || row_limit
                 || '|' || rows || '|' || statement || '|' || approval FROM writeguard.event WHERE kind = 'overridden'";
    let expected = format!("p|{}|update|public.t|statement|3|5|UPDATE t SET a = 9|{id}", stage.requester);
    assert_eq!(text(&mut stage.admin, event), expected);
    let refusal = not_executed(&mut client, id, "WG006");
    assert!(refusal.message.contains("spent"), "{refusal:?}");
    // Nothing stays armed.
    refused(&mut client, WRITE, "WG001");
}

#[test]
fn what_returning_gives_comes_back_as_jsonb() {
    let stage = Stage::new("CREATE TABLE kept (LIKE t)");
    let mut client = stage.requester();
    let (id, _) =
        stage.approved("UPDATE t SET a = id + 1 RETURNING id, a AS \"new A\", NULL AS nothing, 'x' || id AS s");
    let rows = execute(&mut client, id);
    assert_eq!(rows.len(), 5);
    assert_eq!(rows[1], r#"{"s": "x2", "id": 2, "new A": 3, "nothing": null}"#);
    let (id, _) = stage.approved(
        "WITH gone AS (DELETE FROM t WHERE id < 5 RETURNING *) SELECT count(*), array_agg(id ORDER BY id) AS ids FROM gone",
    );
    assert_eq!(execute(&mut client, id), [r#"{"ids": [1, 2, 3, 4], "count": 4}"#]);
}

#[test]
fn it_can_stand_wherever_a_set_can() {
    for sql in [
        "SELECT writeguard.execute($id)",
        "SELECT \"row\" ->> 'id' FROM writeguard.execute($id) LIMIT 1",
        "PREPARE e AS SELECT * FROM writeguard.execute($id); EXECUTE e",
    ] {
        let mut stage = Stage::new("");
        let requester = stage.requester.clone();
        pass(&mut stage.admin, &format!("GRANT pg_write_server_files TO {requester}"));
        let (id, _) = stage.approved("UPDATE t SET a = 9 RETURNING id");
        pass(&mut stage.requester(), &sql.replace("$id", &id.to_string()));
        assert_eq!(stage.changed(), 5, "{sql}");
        assert_eq!(stage.overridden(), [(5, Some(id))], "{sql}");
    }
}

#[test]
fn every_kind_of_statement_that_can_be_reviewed() {
    let setup = "CREATE FUNCTION f() RETURNS int LANGUAGE sql AS 'UPDATE t SET a = 9; SELECT 7';
                 CREATE TABLE log (n int); GRANT ALL ON log TO PUBLIC;
                 CREATE FUNCTION logs() RETURNS trigger LANGUAGE plpgsql AS
                     'BEGIN INSERT INTO log VALUES (1); RETURN NULL; END';
                 CREATE TRIGGER logs AFTER TRUNCATE ON t EXECUTE FUNCTION logs()";
    for (statement, left) in [
        ("UPDATE t SET a = 9", "5 5 0"),
        ("DELETE FROM t WHERE id <> 3", "1 0 0"),
        ("TRUNCATE t", "0 0 1"),
        ("INSERT INTO t SELECT generate_series(2, 6) ON CONFLICT (id) DO UPDATE SET a = 9", "6 4 0"),
        (
            "MERGE INTO t USING generate_series(1, 5) AS s (n) ON id = n
             WHEN MATCHED AND n = 1 THEN DELETE WHEN MATCHED THEN UPDATE SET a = 9",
            "4 4 0",
        ),
        ("SELECT f()", "5 5 0"),
        ("WITH d AS (DELETE FROM t WHERE id < 3), u AS (UPDATE t SET a = 9 WHERE id >= 3) SELECT 1", "3 3 0"),
    ] {
        let mut stage = Stage::new(setup);
        let (id, _) = stage.approved(statement);
        execute(&mut stage.requester(), id);
        let sql = "SELECT count(*) || ' ' || count(*) FILTER (WHERE a = 9) || ' ' || (SELECT count(*) FROM log) FROM t";
        assert_eq!(text(&mut stage.admin, sql), left, "{statement}");
        assert_eq!(stage.state(id), "spent", "{statement}");
    }
}

#[test]
fn parameters_are_the_reviewed_ones_and_mean_the_same_in_every_session() {
    let mut stage = Stage::new(
        "ALTER TABLE t ADD d date, ADD n numeric, ADD i interval;
         SET writeguard.enabled = off; UPDATE t SET d = '2026-02-01'; RESET writeguard.enabled",
    );
    let mut client = stage.requester();
    pass(&mut client, "SET datestyle = 'SQL, DMY'; SET intervalstyle = 'sql_standard'");
    let statement = "UPDATE t SET a = $1, n = $3, i = $4 WHERE d = $2";
    let id = request(&mut client, statement, &[Some("9"), Some("01/02/2026"), None, Some("-1 2:03:04")]);
    approve(&mut stage.approver(), id);
    let stored = text(&mut stage.admin, "SELECT parameters::text FROM writeguard.request");
    assert_eq!(stored, "{9,2026-02-01,NULL,\"-1 days -02:03:04\"}");
    let mut client = stage.requester();
    pass(&mut client, "SET datestyle = 'SQL, MDY'");
    execute(&mut client, id);
    assert_eq!(stage.changed(), 5);
    let written = text(&mut stage.admin, "SELECT DISTINCT i || ' ' || (n IS NULL) FROM t");
    assert_eq!(written, "-1 days -02:03:04 true");
}

#[test]
fn tables_are_those_that_were_reviewed_whatever_the_search_path_is() {
    let mut stage = Stage::new(
        "CREATE SCHEMA one; CREATE SCHEMA two; GRANT ALL ON SCHEMA one, two TO PUBLIC;
         CREATE TABLE one.u AS SELECT id, a FROM t; CREATE TABLE two.u AS TABLE one.u;
         GRANT ALL ON one.u, two.u TO PUBLIC;
         SELECT writeguard.set_policy('u', tables => '{one.u,two.u}', max_rows => 3)",
    );
    let mut client = stage.requester();
    pass(&mut client, "SET search_path = one");
    let id = request(&mut client, "UPDATE u SET a = 9", &[]);
    approve(&mut stage.approver(), id);
    let mut client = stage.requester();
    pass(&mut client, "SET search_path = two");
    execute(&mut client, id);
    assert_eq!(text(&mut client, "SHOW search_path"), "two");
    assert_eq!(stage.number("SELECT sum(a) FROM one.u"), 45);
    assert_eq!(stage.number("SELECT sum(a) FROM two.u"), 0);
}

#[test]
fn a_temporary_table_of_the_same_name_is_not_what_was_reviewed() {
    let mut stage = Stage::new("");
    let (id, _) = stage.approved(WRITE);
    let mut client = stage.requester();
    pass(&mut client, "CREATE TEMP TABLE t AS TABLE public.t");
    let refusal = not_executed(&mut client, id, "WG006");
    let detail = "was approved for 5 rows in \"public.t\", and would now change 0; nothing was changed.";
    assert!(refusal.detail.contains(detail), "{refusal:?}");
    assert_eq!(number(&mut client, "SELECT sum(a) FROM t"), 0);
    assert_eq!(stage.state(id), "approved");
}

// ---- Exactly the reviewed rows ----

#[test]
fn another_number_of_rows_is_refused_with_both_numbers_and_the_approval_stays() {
    let mut stage = Stage::new("");
    let (id, _) = stage.approved("UPDATE t SET a = 9 WHERE id <= 100");
    let mut client = stage.requester();
    stage.unguarded("INSERT INTO t SELECT generate_series(6, 20)");
    let refusal = not_executed(&mut client, id, "WG006");
    assert!(refusal.detail.contains(" 5 rows "), "{refusal:?}");
    assert!(refusal.detail.contains("number 6;"), "{refusal:?}");
    assert_eq!(refusal.table, "t");
    assert_eq!(
        refusal.hint,
        "SELECT writeguard.request('UPDATE t SET a = 9 WHERE id <= 100', reason => 'why this is right');"
    );
    assert_eq!((stage.changed(), stage.state(id).as_str()), (0, "approved"));

    stage.unguarded("DELETE FROM t WHERE id > 4");
    let refusal = not_executed(&mut client, id, "WG006");
    assert_eq!(
        refusal.said(),
        format!("execution of request {id} refused: it would change another number of rows than was reviewed")
    );
    let detail =
        format!("Request {id} was approved for 5 rows in \"public.t\", and would now change 4; nothing was changed.");
    assert_eq!(refusal.detail, detail);
    assert_eq!((stage.changed(), stage.state(id).as_str()), (0, "approved"));
    assert_eq!(stage.reasons("token_refused").len(), 2);
    assert_eq!(stage.overridden(), []);

    // As many rows again, but another one among them.
    pass(&mut stage.admin, "INSERT INTO t VALUES (50)");
    assert!(not_executed(&mut client, id, "WG006").message.contains("other rows"));
    stage.unguarded("UPDATE t SET id = 5 WHERE id = 50");
    execute(&mut client, id);
    assert_eq!((stage.changed(), stage.state(id).as_str()), (5, "spent"));
}

#[test]
fn numbers_hold_for_each_table() {
    let mut stage = Stage::new(
        "CREATE TABLE u AS TABLE t; GRANT ALL ON u TO PUBLIC;
         SELECT writeguard.set_policy('u', tables => '{public.u}', max_rows => 100)",
    );
    let statement = "WITH u AS (UPDATE u SET a = 8) UPDATE t SET a = 9";
    let mut client = stage.requester();
    let (id, _) = stage.approved(statement);
    // One more here, one less there.
    stage.unguarded("DELETE FROM t WHERE id = 1; INSERT INTO u VALUES (6)");
    let refusal = not_executed(&mut client, id, "WG006");
    assert!(refusal.detail.contains("\"public.u\""), "{refusal:?}");
    assert_eq!(stage.number("SELECT sum(a) FROM (TABLE t UNION ALL TABLE u) AS x"), 0);
}

#[test]
fn a_table_that_was_not_reviewed_is_not_touched() {
    let mut stage = Stage::new(
        "CREATE TABLE u AS TABLE t; GRANT ALL ON u TO PUBLIC; CREATE TABLE switch (u boolean); GRANT ALL ON switch TO PUBLIC;
         CREATE FUNCTION f() RETURNS void LANGUAGE plpgsql AS $$ BEGIN
             UPDATE t SET a = 9;
             IF EXISTS (SELECT FROM switch) THEN
                 BEGIN UPDATE u SET a = 9 WHERE id = 1; EXCEPTION WHEN SQLSTATE 'WG006' THEN NULL; END;
                 DELETE FROM u WHERE id <= 2;
             END IF;
         END $$;
         SELECT writeguard.set_policy('u', tables => '{public.u}', max_rows => 100)",
    );
    for max_rows in ["NULL", "1000"] {
        let mut client = stage.requester();
        let id = request(&mut client, "SELECT f()", &[]);
        pass(&mut stage.approver(), &format!("SELECT writeguard.approve({id}, max_rows => {max_rows})"));
        pass(&mut stage.admin, "INSERT INTO switch VALUES (true)");
        let refusal = not_executed(&mut client, id, "WG006");
        assert!(refusal.detail.contains("\"public.u\""), "{refusal:?}");
        assert_eq!((stage.changed(), stage.number("SELECT count(*) FROM u")), (0, 5));
        pass(&mut stage.admin, "DELETE FROM switch");
        execute(&mut client, id);
        stage.unguarded("UPDATE t SET a = 0");
    }
}

#[test]
fn the_approvers_maximum_takes_the_place_of_the_numbers() {
    let mut stage = Stage::new("");
    let approve_up_to = |stage: &mut Stage, max_rows: i32| {
        let id = request(&mut stage.requester(), WRITE, &[]);
        pass(&mut stage.approver(), &format!("SELECT writeguard.approve({id}, max_rows => {max_rows})"));
        id
    };
    let mut client = stage.requester();
    let (six, four) = (approve_up_to(&mut stage, 6), approve_up_to(&mut stage, 4));
    let refusal = not_executed(&mut client, four, "WG006");
    assert!(refusal.detail.contains(" 4 rows "), "{refusal:?}");
    assert!(refusal.detail.contains("number 5;"), "{refusal:?}");
    pass(&mut stage.admin, "DELETE FROM t WHERE id = 1");
    execute(&mut client, four);
    stage.unguarded("UPDATE t SET a = 0; INSERT INTO t VALUES (6), (7), (8)");
    not_executed(&mut client, six, "WG006");
    pass(&mut stage.admin, "DELETE FROM t WHERE id = 8");
    execute(&mut client, six);
    assert_eq!(stage.changed(), 6);
}

#[test]
fn the_tables_of_a_maximum_are_told_in_one_order() {
    let tables = ["zeta", "alpha", "mu", "beta", "omega", "gamma", "psi", "delta"];
    let create = tables.map(|table| format!("CREATE TABLE {table} AS SELECT 1 AS a; GRANT ALL ON {table} TO PUBLIC;"));
    let mut stage = Stage::new(&create.concat());
    pass(&mut stage.admin, "SELECT writeguard.set_policy('all', tables => '{public.*}', max_rows => 0)");
    let branches = tables.map(|table| format!("w_{table} AS (UPDATE {table} SET a = 9)"));
    let mut client = stage.requester();
    let id = request(&mut client, &format!("WITH {} SELECT 1", branches.join(", ")), &[]);
    pass(&mut stage.approver(), &format!("SELECT writeguard.approve({id}, max_rows => 6)"));
    let refusal = not_executed(&mut client, id, "WG006");
    let told: Vec<&str> = refusal.detail.split('"').nth(1).expect("names").split(", ").collect();
    assert_eq!(told.len(), 7, "{refusal:?}");
    assert!(told.is_sorted(), "{refusal:?}");
}

#[test]
fn rows_are_counted_although_no_policy_covers_the_table_any_more() {
    let mut stage = Stage::new("");
    let mut client = stage.requester();
    let (id, _) = stage.approved("UPDATE t SET a = 9 WHERE id < 100");
    let (truncate, _) = stage.approved("TRUNCATE t");
    pass(&mut stage.admin, "SELECT writeguard.drop_policy('p'); DELETE FROM t WHERE id = 1");
    for id in [id, truncate] {
        let refusal = not_executed(&mut client, id, "WG006");
        assert!(refusal.detail.contains("would now change 4;"), "{refusal:?}");
    }
    pass(&mut stage.admin, "INSERT INTO t VALUES (1)");
    execute(&mut client, id);
    execute(&mut client, truncate);
    assert_eq!(stage.number("SELECT count(*) FROM t"), 0);
    // Nothing was in the way.
    assert_eq!(stage.overridden(), []);
}

#[test]
fn rows_of_partitions_are_counted_by_partition() {
    let mut stage = Stage::new(
        "CREATE TABLE m (id int, a int) PARTITION BY RANGE (id);
         CREATE TABLE m1 PARTITION OF m FOR VALUES FROM (1) TO (4);
         CREATE TABLE m2 PARTITION OF m FOR VALUES FROM (4) TO (100);
         INSERT INTO m TABLE t; GRANT ALL ON m TO PUBLIC;
         SELECT writeguard.set_policy('m', tables => '{public.m}', max_rows => 3)",
    );
    let mut client = stage.requester();
    let (id, _) = stage.approved("UPDATE m SET a = 9");
    stage.unguarded("UPDATE m SET id = 90 WHERE id = 3");
    not_executed(&mut client, id, "WG006");
    stage.unguarded("UPDATE m SET id = 3 WHERE id = 90");
    execute(&mut client, id);
    assert_eq!(stage.number("SELECT count(*) FROM m WHERE a = 9"), 5);
}

#[test]
fn rows_that_deferred_triggers_change_are_a_part_of_it() {
    let mut stage = Stage::new(
        "CREATE TABLE u AS TABLE t; GRANT ALL ON u TO PUBLIC;
         CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS
             'BEGIN UPDATE u SET a = a + 1 WHERE id = new.id; RETURN NULL; END';
         CREATE CONSTRAINT TRIGGER f AFTER UPDATE ON t DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION f();
         SELECT writeguard.set_policy('u', tables => '{public.u}', max_rows => 3)",
    );
    for (wrap, max_rows) in [("$", "NULL"), ("BEGIN; $; COMMIT", "NULL"), ("$", "20")] {
        let id = request(&mut stage.requester(), WRITE, &[]);
        pass(&mut stage.approver(), &format!("SELECT writeguard.approve({id}, max_rows => {max_rows})"));
        pass(&mut stage.requester(), &wrap.replace('$', &call(id)));
        assert_eq!((stage.changed(), stage.number("SELECT min(a) FROM u")), (5, 1));
        stage.unguarded("UPDATE t SET a = 0; SET CONSTRAINTS ALL IMMEDIATE; UPDATE u SET a = 0");
    }
}

/// Rows that something deferred earlier changes do not fill up the numbers of a statement that finds none any more.
#[test]
fn what_was_deferred_before_is_no_part_of_it() {
    for (max_rows, rows) in [("NULL", 5), ("20", 5), ("NULL", 2)] {
        let mut stage = Stage::new(&format!(
            "CREATE TABLE q (id int); GRANT ALL ON q TO PUBLIC;
             CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS
                 'BEGIN UPDATE t SET a = 7 WHERE id <= {rows}; RETURN NULL; END';
             CREATE CONSTRAINT TRIGGER f AFTER INSERT ON q DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION f()"
        ));
        let mut client = stage.requester();
        let statement = format!("UPDATE t SET a = 9 WHERE a = 0 AND id <= {}", if rows == 5 { 5 } else { 4 });
        let id = request(&mut client, &statement, &[]);
        pass(&mut stage.approver(), &format!("SELECT writeguard.approve({id}, max_rows => {max_rows})"));
        stage.unguarded("UPDATE t SET a = 1");
        pass(&mut client, "BEGIN; INSERT INTO q VALUES (1)");
        let refusal = expect_refusal(client.batch_execute(&call(id)));
        let expected = if rows == 5 { "WG001" } else { "WG006" };
        assert_eq!(refusal.sqlstate, expected, "{max_rows} {rows}: {refusal:?}");
        pass(&mut client, "ROLLBACK");
        assert_eq!((stage.number("SELECT sum(a) FROM t"), stage.state(id).as_str()), (5, "approved"));
        assert_eq!(stage.overridden(), []);
    }
}

// ---- Transactions ----

#[test]
fn a_rollback_makes_it_unused() {
    let mut stage = Stage::new("");
    let (id, _) = stage.approved(WRITE);
    let mut client = stage.requester();
    let run = call(id);
    pass(&mut client, &format!("BEGIN; {run}"));
    pass(&mut client, "ROLLBACK");
    pass(&mut client, &format!("BEGIN; SAVEPOINT s; {run}; ROLLBACK TO s; COMMIT"));
    let swallowed = format!("BEGIN; SAVEPOINT s; {run}; ROLLBACK TO s; UPDATE t SET a = 9 WHERE id <= 3; COMMIT");
    pass(&mut client, &swallowed);
    assert_eq!((stage.changed(), stage.state(id).as_str()), (3, "approved"));
    assert_eq!(stage.overridden(), []);
    pass(&mut client, &format!("BEGIN; SAVEPOINT s; {run}; RELEASE s; COMMIT"));
    assert_eq!((stage.changed(), stage.state(id).as_str()), (5, "spent"));
    assert_eq!(stage.overridden(), [(5, Some(id))]);
}

#[test]
fn it_ends_when_it_returns() {
    for more in [
        "BEGIN; $; UPDATE t SET a = 9",
        "SELECT writeguard.execute(@), more()",
        "SELECT more() FROM (SELECT count(*) FROM writeguard.execute(@) OFFSET 0) AS e",
        "WITH e AS MATERIALIZED (SELECT count(*) AS n FROM writeguard.execute(@)) UPDATE t SET a = 9 FROM e WHERE n >= 0",
        "UPDATE t SET a = 9 + (SELECT count(*) FROM writeguard.execute(@))",
        "BEGIN; SET LOCAL writeguard.override = on; $; UPDATE t SET a = 9",
        "SELECT count(*) FROM generate_series(1, 2) AS n, LATERAL (SELECT writeguard.execute(@ + n - n)) AS e",
    ] {
        let mut stage = Stage::new(
            "CREATE FUNCTION more() RETURNS void LANGUAGE sql AS 'UPDATE t SET a = 9';
             CREATE TABLE u AS TABLE t; GRANT ALL ON u TO PUBLIC;
             SELECT writeguard.set_policy('u', tables => '{public.u}', max_rows => 3)",
        );
        let (id, _) = stage.approved("UPDATE u SET a = 9");
        let sql = more.replace('$', &call(id)).replace('@', &id.to_string());
        let expected = if more.starts_with("BEGIN") { "WG001" } else { "WG006" };
        let mut client = stage.requester();
        refused(&mut client, &sql, expected);
        pass(&mut client, "ROLLBACK");
        let sum = stage.number("SELECT sum(a) FROM (TABLE t UNION ALL TABLE u) AS x");
        assert_eq!((sum, stage.state(id).as_str()), (0, "approved"), "{sql}");
    }
}

#[test]
fn two_of_them_in_one_statement_are_told_apart() {
    let mut stage = Stage::new(
        "CREATE TABLE u AS TABLE t; GRANT ALL ON u TO PUBLIC;
         SELECT writeguard.set_policy('p', tables => '{public.t,public.u}', max_rows => 3)",
    );
    let (one, _) = stage.approved("UPDATE t SET a = a + 4 WHERE id > 1");
    let (two, _) = stage.approved("UPDATE t SET a = a + 5");
    let mut client = stage.requester();
    pass(&mut client, &format!("SELECT writeguard.execute({one}), writeguard.execute({two})"));
    assert_eq!(stage.changed(), 4);
    assert_eq!(stage.overridden(), [(4, Some(one)), (5, Some(two))]);
    // No other statement has one run.
    stage.unguarded("UPDATE t SET a = 0");
    let (three, _) = stage.approved("UPDATE u SET a = 1");
    let both = format!("UPDATE t SET a = (SELECT count(*) FROM writeguard.execute({three})) WHERE id <= $");
    refused(&mut client, &both.replace('$', "3"), "WG006");
    assert_eq!((stage.number("SELECT sum(a) FROM u"), stage.state(three).as_str()), (0, "approved"));
    assert_eq!(stage.number("SELECT sum(a) FROM t"), 0);
}

#[test]
fn its_rows_count_for_the_transactions_budget() {
    let mut stage = Stage::new(
        "SELECT writeguard.set_policy('p', tables => '{public.t}', max_rows => 3, max_rows_per_transaction => 6)",
    );
    let (id, _) = stage.approved(WRITE);
    let mut client = stage.requester();
    pass(&mut client, &format!("BEGIN; {}; UPDATE t SET a = 8 WHERE id = 1", call(id)));
    let refusal = refused(&mut client, "UPDATE t SET a = 8 WHERE id = 2", "WG001");
    assert!(refusal.message.contains("6 rows per transaction"), "{refusal:?}");
    pass(&mut client, "ROLLBACK");
    assert_eq!(stage.changed(), 0);
}

#[test]
fn a_prepared_transaction_takes_it_along() {
    let mut stage = Stage::new("");
    let (id, _) = stage.approved(WRITE);
    let mut client = stage.requester();
    for (end, state, changed) in [("ROLLBACK", "approved", 0), ("COMMIT", "spent", 5)] {
        let name = stage.db.name.clone();
        pass(&mut client, &format!("BEGIN; {}; PREPARE TRANSACTION '{name}'", call(id)));
        pass(&mut client, &format!("{end} PREPARED '{name}'"));
        assert_eq!((stage.state(id).as_str(), stage.changed()), (state, changed));
    }
    assert_eq!(stage.overridden(), [(5, Some(id))]);
}

#[test]
fn two_sessions_do_not_both_execute_it() {
    for (end, by_token) in [("COMMIT", false), ("ROLLBACK", false), ("COMMIT", true), ("ROLLBACK", true)] {
        let mut stage = Stage::new("");
        let (id, token) = stage.approved(WRITE);
        let (mut first, mut second) = (stage.requester(), stage.requester());
        let pid = pid(&mut second);
        pass(&mut first, &format!("BEGIN; {}", call(id)));
        let waits = thread::spawn(move || {
            if by_token {
                arm(&mut second, &token);
            }
            let sql = if by_token { WRITE.to_owned() } else { call(id) };
            second.batch_execute(&sql).map_err(|error| Refusal::of(&error))
        });
        wait_for_lock_of(&mut stage.admin, pid);
        pass(&mut first, end);
        match waits.join().unwrap() {
            Ok(()) => assert_eq!(end, "ROLLBACK"),
            Err(refusal) => {
                assert_eq!((end, refusal.sqlstate.as_str()), ("COMMIT", "WG006"), "{refusal:?}");
                assert!(refusal.message.contains("spent"), "{refusal:?}");
            }
        }
        assert_eq!((stage.changed(), stage.overridden()), (5, vec![(5, Some(id))]));
    }
}

// ---- What it lifts ----

#[test]
fn it_lifts_all_that_a_token_or_the_flag_would_lift() {
    for arguments in [
        "max_rows => 3, override => 'flag'",
        "max_rows => 0",
        "require_where => true",
        "require_where => true, override => 'flag'",
        "require_transaction => true",
        "max_fraction => 0",
        "rate_rows => 1, rate_interval => '1 day'",
        "max_rows_per_transaction => 1",
    ] {
        let mut stage = Stage::new(&format!(
            "INSERT INTO t SELECT generate_series(6, 30); SELECT writeguard.set_policy('p', tables => '{{public.t}}', {arguments})"
        ));
        let (id, _) = stage.approved(WRITE);
        let mut client = stage.requester();
        expect_refusal(client.batch_execute(WRITE));
        execute(&mut client, id);
        assert_eq!(stage.changed(), 30, "{arguments}");
        assert_eq!(stage.overridden().len(), 1, "{arguments}");
        assert_eq!(stage.overridden()[0].1, Some(id), "{arguments}");
        if arguments.contains("rate") {
            // It spent nothing of the rate.
            pass(&mut client, "UPDATE t SET a = 1 WHERE id = 1");
        }
    }
}

#[test]
fn never_is_never_lifted() {
    let mut stage = Stage::new("");
    let (id, _) = stage.approved(WRITE);
    pass(
        &mut stage.admin,
        "SELECT writeguard.set_policy('hard', tables => '{public.t}', max_rows => 4, override => 'never')",
    );
    let refusal = not_executed(&mut stage.requester(), id, "WG001");
    assert!(refusal.detail.contains("\"hard\""), "{refusal:?}");
    assert_eq!((stage.changed(), stage.state(id).as_str()), (0, "approved"));
}

// ---- Whose rights, whose errors ----

#[test]
fn errors_of_the_statement_are_its_own() {
    let mut stage = Stage::new(
        "CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
             IF EXISTS (SELECT FROM bad) THEN
                 RAISE 'no' USING ERRCODE = 'AB123', DETAIL = 'why', HINT = 'how', CONSTRAINT = 'c', TABLE = 'x';
             END IF;
             RETURN new;
         END $$;
         CREATE TABLE bad (); GRANT ALL ON bad TO PUBLIC;
         CREATE TRIGGER f BEFORE UPDATE ON t FOR EACH ROW EXECUTE FUNCTION f()",
    );
    let (id, _) = stage.approved(WRITE);
    pass(&mut stage.admin, "INSERT INTO bad DEFAULT VALUES");
    let mut client = stage.requester();
    let refusal = not_executed(&mut client, id, "AB123");
    let fields = [&refusal.message, &refusal.detail, &refusal.hint, &refusal.constraint, &refusal.table];
    assert_eq!(fields, ["no", "why", "how", "c", "x"]);
    assert!(refusal.context.contains("PL/pgSQL function f()"), "{refusal:?}");
    assert_eq!(stage.state(id), "approved");
    // The session goes on as if nothing had been.
    refused(&mut client, WRITE, "AB123");
    pass(&mut stage.admin, "DELETE FROM bad");
    stage.unguarded("REVOKE UPDATE ON t FROM PUBLIC");
    let refusal = not_executed(&mut client, id, "42501");
    assert_eq!(refusal.position, None, "{refusal:?}");
    pass(&mut stage.admin, "GRANT UPDATE ON t TO PUBLIC");
    refused(&mut client, WRITE, "WG001");
    execute(&mut client, id);
    assert_eq!(stage.changed(), 5);
}

#[test]
fn what_stops_it_halfway_leaves_nothing_of_it() {
    let mut stage = Stage::new(
        "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS
             'BEGIN
                  IF new.id = 5 AND current_setting(''my.slow'', true) = ''on'' THEN PERFORM pg_sleep(60); END IF;
                  RETURN new;
              END';
         CREATE TRIGGER slow BEFORE UPDATE ON t FOR EACH ROW EXECUTE FUNCTION slow()",
    );
    let (id, _) = stage.approved(WRITE);
    let mut client = stage.requester();
    pass(&mut client, "SET my.slow = on; SET statement_timeout = '300ms'");
    not_executed(&mut client, id, "57014");
    pass(&mut client, "BEGIN; SAVEPOINT s");
    not_executed(&mut client, id, "57014");
    pass(&mut client, "ROLLBACK TO s; SET LOCAL statement_timeout = 0");
    refused(&mut client, "UPDATE t SET a = 9 WHERE id < 5", "WG001");
    pass(&mut client, "ROLLBACK; RESET statement_timeout");
    let pid = pid(&mut client);
    // Whether the message or the end of the connection comes first is chance.
    let run = thread::spawn(move || client.batch_execute(&call(id)).is_err());
    let sleeps = format!("SELECT count(*) FROM pg_stat_activity WHERE pid = {pid} AND wait_event = 'PgSleep'");
    wait_until(20, || stage.number(&sleeps) == 1);
    pass(&mut stage.admin, &format!("SELECT pg_terminate_backend({pid}, 20000)"));
    assert!(run.join().unwrap());
    assert_eq!((stage.changed(), stage.state(id).as_str()), (0, "approved"));
    execute(&mut stage.requester(), id);
    assert_eq!((stage.changed(), stage.overridden()), (5, vec![(5, Some(id))]));
}

#[test]
fn no_procedure_has_it_run() {
    let mut stage = Stage::new(
        "CREATE PROCEDURE p(id bigint) LANGUAGE plpgsql AS $$ BEGIN
             PERFORM writeguard.execute(id);
             COMMIT;
             UPDATE t SET a = 8;
         END $$",
    );
    let (id, _) = stage.approved(WRITE);
    refused(&mut stage.requester(), &format!("CALL p({id})"), "WG006");
    assert_eq!((stage.changed(), stage.state(id).as_str(), stage.overridden().len()), (0, "approved", 0));
}

#[test]
fn it_runs_with_the_rights_of_who_calls_it() {
    let mut stage = Stage::new("");
    let (id, _) = stage.approved(WRITE);
    pass(&mut stage.admin, "REVOKE ALL ON t FROM PUBLIC");
    let mut client = stage.requester();
    not_executed(&mut client, id, "42501");
    assert_eq!(stage.state(id), "approved");
    let requester = stage.requester.clone();
    pass(&mut stage.admin, &format!("GRANT ALL ON t TO {requester}"));
    pass(&mut client, "BEGIN READ ONLY");
    not_executed(&mut client, id, "25006");
    pass(&mut client, "ROLLBACK");
    execute(&mut client, id);
    assert_eq!(stage.changed(), 5);
}

// ---- Whose request, and in which state ----

#[test]
fn only_the_requester_executes_it_and_others_learn_nothing_of_it() {
    let mut stage = Stage::new("");
    let (id, _) = stage.approved(WRITE);
    let stranger = stage.db.role("stranger");
    for mut client in [stage.db.connect(&stranger), stage.approver(), stage.db.admin()] {
        let refusal = not_executed(&mut client, id, "WG006");
        let unknown = not_executed(&mut client, 4711, "WG006");
        let same = unknown.said().replace("4711", &id.to_string());
        assert_eq!((refusal.said(), &refusal.detail, &refusal.hint), (same.as_str(), &unknown.detail, &unknown.hint));
        assert!(!format!("{refusal:?}").contains(&stage.requester), "{refusal:?}");
    }
    // Nor do they stand in its way.
    let mut stranger = stage.db.connect(&stranger);
    pass(&mut stranger, "BEGIN; SAVEPOINT s");
    not_executed(&mut stranger, id, "WG006");
    execute(&mut stage.requester(), id);
    assert_eq!(stage.changed(), 5);
}

#[test]
fn another_role_of_the_same_person_is_not_who_asked() {
    let mut stage = Stage::new("");
    let role = stage.db.role("role");
    let requester = stage.requester.clone();
    pass(&mut stage.admin, &format!("GRANT {role} TO {requester}"));
    let (plain, _) = stage.approved(WRITE);
    let mut client = stage.requester();
    pass(&mut client, &format!("SET ROLE {role}"));
    let refusal = not_executed(&mut client, plain, "WG006");
    assert_eq!(refusal.hint, "RESET ROLE;");
    let id = request(&mut client, WRITE, &[]);
    approve(&mut stage.approver(), id);
    pass(&mut client, "RESET ROLE");
    let refusal = not_executed(&mut client, id, "WG006");
    assert_eq!(refusal.hint, format!("SET ROLE {role};"));
    pass(&mut client, &refusal.hint);
    execute(&mut client, id);
    // A superuser who acts as the requester is not the requester.
    let mut admin = stage.db.admin();
    pass(&mut admin, &format!("SET SESSION AUTHORIZATION {requester}"));
    not_executed(&mut admin, plain, "WG006");
    // Nor does a function with its owner's rights change who acts.
    pass(
        &mut stage.admin,
        "CREATE FUNCTION run(id bigint) RETURNS bigint LANGUAGE sql SECURITY DEFINER
         AS 'SELECT count(*) FROM writeguard.execute(id)'",
    );
    refused(&mut stage.approver(), &format!("SELECT run({plain})"), "WG006");
}

#[test]
fn only_what_is_approved_and_not_expired() {
    let mut stage = Stage::new("");
    let mut client = stage.requester();
    let id = request(&mut client, WRITE, &[]);
    let refusal = not_executed(&mut client, id, "WG006");
    assert!(refusal.message.contains("pending"), "{refusal:?}");
    assert_eq!(refusal.hint, format!("Let a second person type: SELECT writeguard.approve({id});"));
    pass(&mut stage.approver(), &format!("SELECT writeguard.reject({id}, 'no')"));
    let refusal = not_executed(&mut client, id, "WG006");
    assert!(refusal.message.contains("rejected"), "{refusal:?}");
    let (id, _) = stage.approved(WRITE);
    pass(
        &mut stage.admin,
        &format!("UPDATE writeguard.request SET expires_at = now() - interval '1 s' WHERE id = {id}"),
    );
    let refusal = not_executed(&mut client, id, "WG006");
    assert!(refusal.message.contains("expired"), "{refusal:?}");
    pass(&mut stage.admin, &format!("UPDATE writeguard.request SET state = 'revoked' WHERE id = {id}"));
    let refusal = not_executed(&mut client, id, "WG006");
    assert!(refusal.message.contains("revoked"), "{refusal:?}");
    let (id, token) = stage.approved(WRITE);
    arm(&mut client, &token);
    pass(&mut client, WRITE);
    let refusal = not_executed(&mut client, id, "WG006");
    assert!(refusal.message.contains("spent"), "{refusal:?}");
    refused(&mut client, "SELECT * FROM writeguard.execute(NULL)", "WG007");
    assert_eq!(stage.reasons("token_refused").len(), 5);
}

#[test]
fn a_copy_of_the_database_has_no_approvals() {
    let stage = Stage::new("");
    let (id, _) = stage.approved(WRITE);
    let (name, copy) = (stage.db.name.clone(), format!("{}_copy", stage.db.name));
    let requester = stage.requester.clone();
    let Stage { admin, .. } = stage;
    drop(admin);
    let server = Server::shared();
    let mut postgres = server.postgres();
    pass(
        &mut postgres,
        &format!("SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = '{name}'"),
    );
    wait_until(20, || postgres.batch_execute(&format!("CREATE DATABASE {copy} TEMPLATE {name}")).is_ok());
    let printed = server.psql(&copy, &requester, &call(id));
    assert!(printed.contains("it belongs to another database"), "{printed}");
    pass(&mut postgres, &format!("DROP DATABASE {copy} WITH (FORCE)"));
}

// ---- Where it may not stand ----

#[test]
fn it_is_no_part_of_what_is_reviewed() {
    let mut stage = Stage::new(
        "CREATE TABLE todo (id bigint); GRANT ALL ON todo TO PUBLIC;
         CREATE FUNCTION f() RETURNS void LANGUAGE plpgsql AS $$ BEGIN
             UPDATE t SET a = a + 1;
             PERFORM writeguard.execute(id) FROM todo;
         END $$",
    );
    let mut client = stage.requester();
    let (inner, _) = stage.approved(WRITE);
    let asked = format!("SELECT writeguard.request('SELECT writeguard.execute({inner})', 'tests')");
    refused(&mut client, &asked, "WG006");
    let (outer, _) = stage.approved("SELECT f()");
    pass(&mut stage.admin, &format!("INSERT INTO todo VALUES ({inner})"));
    let refusal = not_executed(&mut client, outer, "WG006");
    assert!(refusal.message.contains("only as the client's own statement"), "{refusal:?}");
    assert_eq!(stage.number("SELECT sum(a) FROM t"), 0);
    assert_eq!((stage.state(inner).as_str(), stage.state(outer).as_str()), ("approved", "approved"));
}

#[test]
fn nobody_has_it_run_by_maintenance() {
    let mut stage = Stage::new("GRANT ALL ON SCHEMA public TO PUBLIC");
    let mut admin = stage.db.admin();
    let id = request(&mut admin, WRITE, &[]);
    approve(&mut stage.approver(), id);
    pass(
        &mut stage.requester(),
        &format!("CREATE MATERIALIZED VIEW m AS SELECT * FROM writeguard.execute({id}) WITH NO DATA"),
    );
    let refusal = refused(&mut admin, "REFRESH MATERIALIZED VIEW m", "WG006");
    assert!(refusal.detail.contains("maintenance"), "{refusal:?}");
    assert_eq!((stage.changed(), stage.state(id).as_str()), (0, "approved"));
}

#[test]
fn it_does_not_run_while_nothing_is_counted() {
    let mut stage = Stage::new("");
    let mut admin = stage.db.admin();
    let id = request(&mut admin, WRITE, &[]);
    approve(&mut stage.approver(), id);
    pass(&mut admin, "SET writeguard.enabled = off");
    let refusal = not_executed(&mut admin, id, "WG008");
    pass(&mut admin, &refusal.hint);
    execute(&mut admin, id);
    assert_eq!(stage.changed(), 5);
}

#[test]
fn ten_thousand_rows_come_back() {
    let mut stage = Stage::new("INSERT INTO t SELECT generate_series(6, 10000)");
    let (id, _) = stage.approved("DELETE FROM t RETURNING *");
    let rows = execute(&mut stage.requester(), id);
    assert_eq!((rows.len(), stage.number("SELECT count(*) FROM t")), (10_000, 0));
}

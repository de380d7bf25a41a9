//! `set_policy()` and `drop_policy()`: what is accepted, what is stored, who may call them, and what a dump keeps.

use std::process::Command;

use crate::common::session::pass;
use crate::common::{Database, Refusal, Server, expect_refusal, wait_until};
use postgres::Client;

/// A database with the table `public.t` of five rows.
fn database() -> (Database, Client) {
    let db = Server::shared().database();
    let mut admin = db.admin();
    pass(
        &mut admin,
        "CREATE TABLE t (id int, a int NOT NULL DEFAULT 0);
         INSERT INTO t SELECT generate_series(1, 5);
         GRANT ALL ON t TO PUBLIC",
    );
    (db, admin)
}

#[track_caller]
fn number(client: &mut Client, sql: &str) -> i64 {
    client.query_one(sql, &[]).unwrap().get(0)
}

/// Calls `set_policy('p', …)`; gives what it returns.
fn set(client: &mut Client, arguments: &str) -> Result<String, postgres::Error> {
    client.query_one(&format!("SELECT writeguard.set_policy('p', {arguments})"), &[]).map(|row| row.get(0))
}

/// `set_policy` refuses these arguments as a caller's mistake: the message names `value`, the hint says what would be
/// right, and nothing is stored.
#[track_caller]
fn mistake(client: &mut Client, arguments: &str, value: &str) -> Refusal {
    let refusal = expect_refusal(set(client, arguments));
    assert_eq!(refusal.sqlstate, "WG007", "{arguments}: {refusal:?}");
    assert!(refusal.message.contains(value), "{arguments}: {refusal:?} does not name {value}");
    assert!(!refusal.hint.is_empty(), "{arguments}: {refusal:?}");
    assert_nothing_stored(client);
    refusal
}

#[track_caller]
fn assert_nothing_stored(client: &mut Client) {
    assert_eq!(number(client, "SELECT count(*) FROM writeguard.policy"), 0);
    assert_eq!(number(client, "SELECT count(*) FROM writeguard.event WHERE kind = 'policy_changed'"), 0);
}

#[track_caller]
fn stored_tables(client: &mut Client) -> Vec<String> {
    client.query_one("SELECT tables FROM writeguard.policy WHERE name = 'p'", &[]).unwrap().get(0)
}

/// How many rows one update of `t` may change: as many as it has, or the limit.
#[track_caller]
fn limit_of_t(client: &mut Client) -> usize {
    for rows in 1..=5 {
        let sql = format!("UPDATE t SET a = a + 1 WHERE id <= {rows}");
        if let Err(error) = client.batch_execute(&sql) {
            let refusal = Refusal::of(&error);
            assert_eq!(refusal.sqlstate, "WG001", "{refusal:?}");
            return rows - 1;
        }
    }
    5
}

// ---- Mistakes ----

#[test]
fn an_unknown_role_is_refused() {
    let (_db, mut admin) = database();
    mistake(&mut admin, "roles => '{nobody_of_that_name}'", "nobody_of_that_name");
    mistake(&mut admin, "roles => '{postgres,nobody_of_that_name}'", "nobody_of_that_name");
}

#[test]
fn role_names_are_taken_as_the_catalog_has_them() {
    let (_db, mut admin) = database();
    mistake(&mut admin, "roles => '{Postgres}'", "Postgres");
    mistake(&mut admin, "roles => '{PUBLIC}'", "PUBLIC");
}

#[test]
fn an_unknown_qualified_table_is_refused() {
    let (_db, mut admin) = database();
    mistake(&mut admin, "tables => '{public.nowhere}'", "public.nowhere");
    mistake(&mut admin, "tables => '{no_schema.t}'", "no_schema.t");
    mistake(&mut admin, "tables => '{public.t,public.nowhere}'", "public.nowhere");
    mistake(&mut admin, "tables => '{\"public.\\\"T\\\"\"}'", "T");
}

#[test]
fn an_unknown_unqualified_table_is_refused_with_the_qualified_form_as_hint() {
    let (_db, mut admin) = database();
    let refusal = mistake(&mut admin, "tables => '{nowhere}'", "nowhere");
    assert!(refusal.hint.contains("public.nowhere"), "{refusal:?}");
    pass(&mut admin, "SET search_path = pg_catalog");
    let refusal = mistake(&mut admin, "tables => '{t}'", "\"t\"");
    assert!(refusal.hint.contains("public.t"), "{refusal:?}");
}

#[test]
fn a_view_is_refused_and_the_message_sends_to_its_tables() {
    let (_db, mut admin) = database();
    pass(&mut admin, "CREATE VIEW v AS SELECT * FROM t; CREATE MATERIALIZED VIEW m AS SELECT * FROM t");
    let refusal = mistake(&mut admin, "tables => '{public.v}'", "public.v");
    assert!(refusal.message.contains("view"), "{refusal:?}");
    mistake(&mut admin, "tables => '{v}'", "v");
    let refusal = mistake(&mut admin, "tables => '{public.m}'", "public.m");
    assert!(refusal.message.contains("materialized view"), "{refusal:?}");
}

#[test]
fn what_is_no_table_is_refused() {
    let (_db, mut admin) = database();
    pass(&mut admin, "CREATE SEQUENCE s; CREATE INDEX i ON t (id); CREATE TYPE pair AS (a int, b int)");
    for name in ["public.s", "public.i", "public.pair"] {
        mistake(&mut admin, &format!("tables => '{{{name}}}'"), name);
    }
}

#[test]
fn a_temporary_table_is_refused() {
    let (_db, mut admin) = database();
    pass(&mut admin, "CREATE TEMP TABLE scratch (id int)");
    let refusal = mistake(&mut admin, "tables => '{scratch}'", "scratch");
    assert!(refusal.message.contains("temporary"), "{refusal:?}");
}

#[test]
fn a_temporary_table_in_front_of_a_table_is_not_taken_for_it() {
    let (_db, mut admin) = database();
    pass(&mut admin, "CREATE TEMP TABLE t (id int)");
    let refusal = mistake(&mut admin, "tables => '{t}'", ".t");
    assert!(refusal.message.contains("temporary"), "{refusal:?}");
}

#[test]
fn a_system_catalog_is_refused() {
    let (_db, mut admin) = database();
    let refusal = mistake(&mut admin, "tables => '{pg_catalog.pg_class}'", "pg_catalog.pg_class");
    assert!(refusal.message.contains("system catalog"), "{refusal:?}");
    mistake(&mut admin, "tables => '{pg_class}'", "pg_class");
    mistake(&mut admin, "tables => '{information_schema.sql_features}'", "information_schema.sql_features");
}

#[test]
fn a_table_of_the_extension_is_refused() {
    let (_db, mut admin) = database();
    for name in ["policy", "event", "request"] {
        let name = format!("writeguard.{name}");
        mistake(&mut admin, &format!("tables => '{{{name}}}'"), &name);
    }
}

#[test]
fn what_is_no_name_and_no_pattern_is_refused() {
    let (_db, mut admin) = database();
    for element in [
        "a.b.c",
        "a.",
        ".b",
        "a b",
        "public.t; DROP TABLE t",
        "1a.b",
        "\"a.b",
        "a..b",
        "a-b.c",
        "\"\".a",
        "public.*?",
        "public.%",
        "public.t(",
        "'t'",
    ] {
        let refusal =
            expect_refusal(admin.query("SELECT writeguard.set_policy('p', tables => ARRAY[$1])", &[&element]));
        assert_eq!(refusal.sqlstate, "WG007", "{element}: {refusal:?}");
        assert!(refusal.message.contains(element), "{refusal:?}");
        assert!(refusal.hint.contains("tables =>"), "{refusal:?}");
    }
    assert_nothing_stored(&mut admin);
}

#[test]
fn a_wildcard_without_a_schema_is_refused_with_the_qualified_form_as_hint() {
    let (_db, mut admin) = database();
    let refusal = mistake(&mut admin, "tables => '{orders_*}'", "orders_*");
    assert!(refusal.hint.contains("*.orders_*"), "{refusal:?}");
    mistake(&mut admin, "tables => '{*}'", "*");
}

#[test]
fn negative_limits_are_refused() {
    let (_db, mut admin) = database();
    mistake(&mut admin, "max_rows => -1", "-1");
    mistake(&mut admin, "max_rows_per_transaction => -42", "-42");
    let refusal = mistake(&mut admin, "max_rows_per_transaction => -9223372036854775808", "-9223372036854775808");
    assert!(refusal.message.contains("max_rows_per_transaction"), "{refusal:?}");
}

#[test]
fn zero_and_the_greatest_number_are_limits() {
    let (_db, mut admin) = database();
    set(&mut admin, "tables => '{t}', max_rows => 0, max_rows_per_transaction => 9223372036854775807").unwrap();
    assert_eq!(limit_of_t(&mut admin), 0);
    set(&mut admin, "tables => '{t}', max_rows => 9223372036854775807").unwrap();
    assert_eq!(limit_of_t(&mut admin), 5);
}

#[test]
fn an_unknown_mode_is_refused() {
    let (_db, mut admin) = database();
    mistake(&mut admin, "mode => 'strict'", "strict");
    mistake(&mut admin, "mode => 'ENFORCE'", "ENFORCE");
    mistake(&mut admin, "mode => ''", "mode");
    mistake(&mut admin, "mode => NULL", "mode");
}

#[test]
fn an_unknown_override_is_refused() {
    let (_db, mut admin) = database();
    mistake(&mut admin, "override => 'always'", "always");
    mistake(&mut admin, "override => 'Token'", "Token");
    mistake(&mut admin, "override => NULL", "override");
}

#[test]
fn an_unknown_operation_is_refused() {
    let (_db, mut admin) = database();
    mistake(&mut admin, "operations => '{insert}'", "insert");
    mistake(&mut admin, "operations => '{update,select}'", "select");
    mistake(&mut admin, "operations => '{UPDATE}'", "UPDATE");
}

#[test]
fn an_empty_name_is_refused() {
    let (_db, mut admin) = database();
    for name in ["''", "'  '", "NULL"] {
        let refusal =
            expect_refusal(admin.batch_execute(&format!("SELECT writeguard.set_policy({name}, max_rows => 1)")));
        assert_eq!(refusal.sqlstate, "WG007", "{refusal:?}");
        assert!(refusal.message.contains("name"), "{refusal:?}");
        assert!(!refusal.hint.is_empty(), "{refusal:?}");
    }
    assert_nothing_stored(&mut admin);
}

#[test]
fn empty_arrays_are_refused() {
    let (_db, mut admin) = database();
    for column in ["tables", "roles", "operations"] {
        mistake(&mut admin, &format!("{column} => '{{}}'"), column);
        mistake(&mut admin, &format!("{column} => NULL"), column);
    }
}

#[test]
fn null_and_empty_elements_are_refused() {
    let (_db, mut admin) = database();
    for (column, good) in [("tables", "t"), ("roles", "postgres"), ("operations", "update")] {
        for value in ["{NULL}", &format!("{{{good},NULL}}"), "{\"\"}", "{\" \"}"] {
            let refusal = expect_refusal(set(&mut admin, &format!("{column} => '{value}'")));
            assert_eq!(refusal.sqlstate, "WG007", "{column} {value}: {refusal:?}");
            assert!(!refusal.hint.is_empty(), "{refusal:?}");
        }
        mistake(&mut admin, &format!("{column} => '{{{good},NULL}}'"), column);
    }
    assert_nothing_stored(&mut admin);
}

#[test]
fn a_mistake_leaves_the_policy_that_was_there() {
    let (_db, mut admin) = database();
    set(&mut admin, "tables => '{t}', max_rows => 2").unwrap();
    expect_refusal(set(&mut admin, "tables => '{t}', max_rows => -1"));
    expect_refusal(set(&mut admin, "tables => '{t}', max_rows => 4, mode => 'alarm'"));
    assert_eq!(limit_of_t(&mut admin), 2);
}

// ---- What comes later ----

#[test]
fn columns_that_come_later_may_be_given_with_their_defaults() {
    let (_db, mut admin) = database();
    set(
        &mut admin,
        "tables => '{t}', application => NULL, client => NULL, schedule => NULL, rate_rows => NULL,
         rate_interval => '60 minutes', max_fraction => NULL, require_where => NULL,
         require_transaction => NULL, mode => 'enforce', approvers => NULL, min_approvals => 1, undo => NULL,
         always => false, columns => NULL, same_rows => true",
    )
    .unwrap();
}

// ---- What is stored ----

#[test]
fn defaults_are_those_of_the_contract() {
    let (_db, mut admin) = database();
    pass(&mut admin, "SELECT writeguard.set_policy('p')");
    let stored: String = admin.query_one("SELECT to_jsonb(p)::text FROM writeguard.policy AS p", &[]).unwrap().get(0);
    let expected = r#"{"name": "p", "mode": "enforce", "undo": null, "roles": ["public"], "client": null,
        "tables": ["*.*"], "comment": null, "max_rows": null, "override": "token", "schedule": null,
        "approvers": null, "rate_rows": null, "operations": ["update", "delete", "truncate"],
        "application": null, "max_fraction": null, "min_approvals": 1, "rate_interval": "01:00:00",
        "require_where": null, "require_transaction": null, "max_rows_per_transaction": null, "samples": true,
        "always": false, "columns": null, "same_rows": true}"#;
    let same: bool = admin.query_one(&format!("SELECT '{stored}'::jsonb = '{expected}'::jsonb"), &[]).unwrap().get(0);
    assert!(same, "{stored}");
}

#[test]
fn every_value_given_is_stored() {
    let (db, mut admin) = database();
    let role = db.role("user");
    set(
        &mut admin,
        &format!(
            "tables => '{{public.t,public.x*}}', roles => '{{postgres,{role}}}', operations => '{{delete}}',
             max_rows => 7, max_rows_per_transaction => 70, override => 'never', comment => 'it''s ours'"
        ),
    )
    .unwrap();
    let row = admin
        .query_one(
            "SELECT tables, roles, operations, max_rows, max_rows_per_transaction, override, comment
             FROM writeguard.policy",
            &[],
        )
        .unwrap();
    assert_eq!(row.get::<_, Vec<String>>(0), ["public.t", "public.x*"]);
    assert_eq!(row.get::<_, Vec<String>>(1), ["postgres".to_owned(), role]);
    assert_eq!(row.get::<_, Vec<String>>(2), ["delete"]);
    assert_eq!(row.get::<_, i64>(3), 7);
    assert_eq!(row.get::<_, i64>(4), 70);
    assert_eq!(row.get::<_, &str>(5), "never");
    assert_eq!(row.get::<_, &str>(6), "it's ours");
}

#[test]
fn an_unqualified_name_is_resolved_through_the_search_path() {
    let (_db, mut admin) = database();
    pass(&mut admin, "CREATE SCHEMA app; CREATE TABLE app.t (id int); SET search_path = app, public");
    set(&mut admin, "tables => '{t}'").unwrap();
    assert_eq!(stored_tables(&mut admin), ["app.t"]);
    pass(&mut admin, "SET search_path = public, app");
    set(&mut admin, "tables => '{t}'").unwrap();
    assert_eq!(stored_tables(&mut admin), ["public.t"]);
    // Resolved when it was set: a later search_path changes nothing.
    pass(&mut admin, "SET search_path = app");
    assert_eq!(stored_tables(&mut admin), ["public.t"]);
}

#[test]
fn names_are_folded_and_quoted_as_sql_does() {
    let (_db, mut admin) = database();
    pass(
        &mut admin,
        r#"CREATE TABLE "T" (id int); CREATE TABLE "a.b" (id int); CREATE TABLE "q""q" (id int);
           CREATE SCHEMA "Mixed"; CREATE TABLE "Mixed"."Case" (id int); CREATE TABLE "Äpfel" (id int);
           CREATE TABLE "a*" (id int)"#,
    );
    for (written, stored) in [
        ("PUBLIC.T", "public.t"),
        ("T", "public.t"),
        (r#""T""#, r#"public."T""#),
        (r#"public."T""#, r#"public."T""#),
        (r#""public"."t""#, "public.t"),
        (r#""a.b""#, r#"public."a.b""#),
        (r#""q""q""#, r#"public."q""q""#),
        (r#""Mixed"."Case""#, r#""Mixed"."Case""#),
        (r#"public."Äpfel""#, r#"public."Äpfel""#),
        (r#"public."a*""#, r#"public."a*""#),
        ("Public.O*", "public.o*"),
        (r#""Mixed".*"#, r#""Mixed".*"#),
        ("*.*_Archive", "*.*_archive"),
    ] {
        admin
            .execute("SELECT writeguard.set_policy('p', tables => ARRAY[$1])", &[&written])
            .unwrap_or_else(|error| panic!("{written}: {:?}", Refusal::of(&error)));
        assert_eq!(stored_tables(&mut admin), [stored], "{written}");
    }
}

#[test]
fn what_is_stored_can_be_set_again() {
    let (_db, mut admin) = database();
    pass(&mut admin, r#"CREATE TABLE "T x*" (id int)"#);
    for written in ["t", "public.o*", r#""T x*""#, "*.*"] {
        admin.execute("SELECT writeguard.set_policy('p', tables => ARRAY[$1])", &[&written]).unwrap();
        let again = admin
            .query_one("SELECT writeguard.set_policy('p', tables => (SELECT tables FROM writeguard.policy))", &[])
            .unwrap();
        assert_eq!(again.get::<_, &str>(0), "unchanged", "{written}");
    }
}

#[test]
fn partitioned_tables_and_partitions_can_be_named() {
    let (_db, mut admin) = database();
    pass(
        &mut admin,
        "CREATE TABLE parted (id int) PARTITION BY LIST (id);
         CREATE TABLE parted_1 PARTITION OF parted FOR VALUES IN (1)",
    );
    set(&mut admin, "tables => '{parted,parted_1}'").unwrap();
    assert_eq!(stored_tables(&mut admin), ["public.parted", "public.parted_1"]);
}

#[test]
fn a_pattern_that_matches_nothing_yet_is_accepted() {
    let (_db, mut admin) = database();
    set(&mut admin, "tables => '{later.*,*.orders}'").unwrap();
    assert_eq!(stored_tables(&mut admin), ["later.*", "*.orders"]);
}

#[test]
fn policy_names_may_be_any_text() {
    let (_db, mut admin) = database();
    let name = "Größe \"of\" it's; DROP TABLE t -- $$";
    admin.execute("SELECT writeguard.set_policy($1, tables => '{t}', max_rows => 2)", &[&name]).unwrap();
    let refusal = expect_refusal(admin.batch_execute("UPDATE t SET a = 1"));
    assert!(refusal.detail.contains(name), "{refusal:?}");
    admin.execute("SELECT writeguard.drop_policy($1)", &[&name]).unwrap();
    assert_eq!(limit_of_t(&mut admin), 5);
}

// ---- Replace, keep, drop ----

#[test]
fn set_policy_tells_created_changed_and_unchanged() {
    let (_db, mut admin) = database();
    assert_eq!(set(&mut admin, "tables => '{t}', max_rows => 3").unwrap(), "created");
    assert_eq!(limit_of_t(&mut admin), 3);
    assert_eq!(set(&mut admin, "tables => '{t}', max_rows => 3").unwrap(), "unchanged");
    assert_eq!(set(&mut admin, "tables => '{PUBLIC.T}', max_rows => 3").unwrap(), "unchanged");
    assert_eq!(set(&mut admin, "tables => '{t}', max_rows => 4").unwrap(), "changed");
    assert_eq!(limit_of_t(&mut admin), 4);
    assert_eq!(number(&mut admin, "SELECT count(*) FROM writeguard.policy"), 1);
}

#[test]
fn replacing_sets_what_is_left_out_to_its_default() {
    let (_db, mut admin) = database();
    set(
        &mut admin,
        "tables => '{t}', max_rows => 3, max_rows_per_transaction => 9, override => 'flag', comment => 'c'",
    )
    .unwrap();
    set(&mut admin, "tables => '{t}', max_rows => 3").unwrap();
    let row =
        admin.query_one("SELECT max_rows_per_transaction, override, comment FROM writeguard.policy", &[]).unwrap();
    assert_eq!(row.get::<_, Option<i64>>(0), None);
    assert_eq!(row.get::<_, &str>(1), "token");
    assert_eq!(row.get::<_, Option<&str>>(2), None);
}

#[test]
fn drop_policy_ends_the_limit() {
    let (_db, mut admin) = database();
    set(&mut admin, "tables => '{t}', max_rows => 3").unwrap();
    assert_eq!(limit_of_t(&mut admin), 3);
    pass(&mut admin, "SELECT writeguard.drop_policy('p')");
    assert_eq!(limit_of_t(&mut admin), 5);
    assert_eq!(number(&mut admin, "SELECT count(*) FROM writeguard.policy"), 0);
}

#[test]
fn dropping_what_is_not_there_is_a_mistake() {
    let (_db, mut admin) = database();
    for (name, word) in [("'no-such'", "no-such"), ("NULL", "name")] {
        let refusal = expect_refusal(admin.batch_execute(&format!("SELECT writeguard.drop_policy({name})")));
        assert_eq!(refusal.sqlstate, "WG007", "{refusal:?}");
        assert!(refusal.message.contains(word), "{refusal:?}");
        assert!(!refusal.hint.is_empty(), "{refusal:?}");
    }
    assert_nothing_stored(&mut admin);
}

#[test]
fn each_change_is_an_event_and_no_change_is_none() {
    let (_db, mut admin) = database();
    set(&mut admin, "tables => '{t}', max_rows => 3").unwrap();
    set(&mut admin, "tables => '{t}', max_rows => 3").unwrap();
    set(&mut admin, "tables => '{t}', max_rows => 4").unwrap();
    pass(&mut admin, "SELECT writeguard.drop_policy('p')");
    let rows = admin
        .query("SELECT policy, login, reason FROM writeguard.event WHERE kind = 'policy_changed' ORDER BY id", &[])
        .unwrap();
    let actions: Vec<&str> = rows
        .iter()
        .map(|row| {
            assert_eq!(row.get::<_, &str>(0), "p");
            assert_eq!(row.get::<_, &str>(1), "postgres");
            let reason: &str = row.get(2);
            reason.split(':').next().unwrap_or_default()
        })
        .collect();
    assert_eq!(actions, ["created", "changed", "dropped"]);
    assert_eq!(rows[1].get::<_, &str>(2), "changed: {\"max_rows\":{\"from\":3,\"to\":4}}");
}

#[test]
fn a_change_that_is_rolled_back_changes_nothing() {
    let (db, mut admin) = database();
    let mut user = db.connect(&db.role("user"));
    pass(&mut admin, "BEGIN");
    set(&mut admin, "tables => '{t}', max_rows => 2").unwrap();
    limit_in_transaction(&mut admin);
    pass(&mut admin, "ROLLBACK");
    for client in [&mut admin, &mut user] {
        assert_eq!(limit_of_t(client), 5);
    }
    assert_nothing_stored(&mut admin);

    set(&mut admin, "tables => '{t}', max_rows => 3").unwrap();
    pass(&mut admin, "BEGIN");
    set(&mut admin, "tables => '{t}', max_rows => 1").unwrap();
    limit_in_transaction(&mut admin);
    pass(&mut admin, "ROLLBACK; BEGIN; SELECT writeguard.drop_policy('p')");
    limit_in_transaction(&mut admin);
    pass(&mut admin, "ROLLBACK");
    for client in [&mut admin, &mut user] {
        assert_eq!(limit_of_t(client), 3);
    }
}

/// A covered write inside a transaction, so that the session reads the policies there.
fn limit_in_transaction(client: &mut Client) {
    pass(client, "SAVEPOINT s");
    let _ = client.batch_execute("UPDATE t SET a = 1");
    pass(client, "ROLLBACK TO s");
}

#[test]
fn a_change_that_is_rolled_back_to_a_savepoint_changes_nothing() {
    let (_db, mut admin) = database();
    set(&mut admin, "tables => '{t}', max_rows => 3").unwrap();
    pass(&mut admin, "BEGIN; SAVEPOINT outside");
    set(&mut admin, "tables => '{t}', max_rows => 1").unwrap();
    limit_in_transaction(&mut admin);
    pass(&mut admin, "ROLLBACK TO outside; UPDATE t SET a = 1 WHERE id <= 3");
    let refusal = expect_refusal(admin.batch_execute("UPDATE t SET a = 1"));
    assert!(refusal.message.contains("limit of 3 rows"), "{refusal:?}");
}

#[test]
fn two_sessions_setting_the_same_policy_leave_the_later_one() {
    let (db, mut admin) = database();
    set(&mut admin, "tables => '{t}', max_rows => 1").unwrap();
    pass(&mut admin, "BEGIN");
    set(&mut admin, "tables => '{t}', max_rows => 2").unwrap();
    let mut other = db.admin();
    let waiting = std::thread::spawn(move || set(&mut other, "tables => '{t}', max_rows => 3"));
    std::thread::sleep(std::time::Duration::from_millis(300));
    pass(&mut admin, "COMMIT");
    assert_eq!(waiting.join().unwrap().unwrap(), "changed");
    assert_eq!(limit_of_t(&mut admin), 3);
}

// ---- Who may ----

#[test]
fn an_ordinary_role_may_not_set_or_drop_policies() {
    let (db, mut admin) = database();
    let mut user = db.connect(&db.role("user"));
    let refusal = expect_refusal(set(&mut user, "max_rows => 1"));
    assert_eq!(refusal.sqlstate, "42501", "{refusal:?}");
    set(&mut admin, "tables => '{t}', max_rows => 1").unwrap();
    let refusal = expect_refusal(user.batch_execute("SELECT writeguard.drop_policy('p')"));
    assert_eq!(refusal.sqlstate, "42501", "{refusal:?}");
    assert_eq!(limit_of_t(&mut user), 1);
}

#[test]
fn the_owner_of_a_table_may_not_set_policies_for_it() {
    let (db, mut admin) = database();
    let role = db.role("owner");
    pass(&mut admin, &format!("ALTER TABLE t OWNER TO {role}"));
    let refusal = expect_refusal(set(&mut db.connect(&role), "tables => '{t}'"));
    assert_eq!(refusal.sqlstate, "42501", "{refusal:?}");
}

#[test]
fn a_grantee_may_set_and_drop_policies_and_is_named_in_the_event() {
    let (db, mut admin) = database();
    let role = db.role("dba");
    pass(&mut admin, &format!("GRANT EXECUTE ON FUNCTION writeguard.set_policy, writeguard.drop_policy TO {role}"));
    let mut grantee = db.connect(&role);
    assert_eq!(set(&mut grantee, "tables => '{t}', max_rows => 3").unwrap(), "created");
    assert_eq!(limit_of_t(&mut admin), 3);
    pass(&mut grantee, "SELECT writeguard.drop_policy('p')");
    assert_eq!(limit_of_t(&mut admin), 5);
    assert_eq!(
        number(
            &mut admin,
            &format!("SELECT count(*) FROM writeguard.event WHERE kind = 'policy_changed' AND login = '{role}'")
        ),
        2
    );
}

#[test]
fn an_ordinary_role_cannot_write_the_policy_table() {
    let (db, mut admin) = database();
    set(&mut admin, "tables => '{t}', max_rows => 1").unwrap();
    let role = db.role("user");
    pass(&mut admin, &format!("GRANT EXECUTE ON FUNCTION writeguard.set_policy, writeguard.drop_policy TO {role}"));
    let mut user = db.connect(&role);
    for sql in [
        "INSERT INTO writeguard.policy (name) VALUES ('q')",
        "UPDATE writeguard.policy SET max_rows = 100",
        "DELETE FROM writeguard.policy",
        "TRUNCATE writeguard.policy",
        "ALTER TABLE writeguard.policy DISABLE TRIGGER ALL",
        "DROP TABLE writeguard.policy",
        "COPY writeguard.policy (name) FROM STDIN",
        "TABLE writeguard.policy",
    ] {
        let refusal = expect_refusal(user.batch_execute(sql));
        assert_eq!(refusal.sqlstate, "42501", "{sql}: {refusal:?}");
    }
    assert_eq!(limit_of_t(&mut user), 1);
}

#[test]
fn what_a_superuser_writes_into_the_policy_table_takes_effect() {
    let (db, mut admin) = database();
    let mut user = db.connect(&db.role("user"));
    set(&mut admin, "tables => '{t}', max_rows => 1").unwrap();
    assert_eq!(limit_of_t(&mut user), 1);
    pass(&mut admin, "UPDATE writeguard.policy SET max_rows = 3");
    assert_eq!(limit_of_t(&mut user), 3);
    pass(&mut admin, "TRUNCATE writeguard.policy");
    assert_eq!(limit_of_t(&mut user), 5);
}

#[test]
fn a_policy_that_cannot_be_read_refuses_and_names_the_way_out() {
    let (db, mut admin) = database();
    let mut user = db.connect(&db.role("user"));
    pass(&mut admin, "INSERT INTO writeguard.policy (name, tables) VALUES ('broken one', '{a.b.c}')");
    let refusal = expect_refusal(user.batch_execute("UPDATE t SET a = 1 WHERE id = 1"));
    assert_eq!(refusal.sqlstate, "WG008", "{refusal:?}");
    assert!(refusal.message.contains("broken one"), "{refusal:?}");
    // The hint is the next command to type.
    pass(&mut admin, &refusal.hint);
    assert_eq!(limit_of_t(&mut user), 5);
}

#[test]
fn set_policy_is_not_misled_by_the_callers_search_path() {
    let (db, mut admin) = database();
    let role = db.role("dba");
    pass(
        &mut admin,
        &format!(
            "GRANT EXECUTE ON FUNCTION writeguard.set_policy TO {role};
             CREATE SCHEMA evil AUTHORIZATION {role}"
        ),
    );
    let mut grantee = db.connect(&role);
    pass(
        &mut grantee,
        "CREATE FUNCTION evil.not_equal(bigint, bigint) RETURNS boolean LANGUAGE plpgsql
         AS $$ BEGIN RAISE 'ran as %', current_user; END $$;
         CREATE OPERATOR evil.<> (FUNCTION = evil.not_equal, LEFTARG = bigint, RIGHTARG = bigint);
         CREATE FUNCTION evil.clock_timestamp() RETURNS timestamptz LANGUAGE plpgsql
         AS $$ BEGIN RAISE 'ran as %', current_user; END $$;
         SET search_path = evil, pg_catalog, public",
    );
    set(&mut grantee, "tables => '{public.t}', max_rows => 3").unwrap();
    set(&mut grantee, "tables => '{public.t}', max_rows => 4").unwrap();
    assert_eq!(limit_of_t(&mut admin), 4);
}

// ---- Without the preload ----

#[test]
fn without_the_preload_the_extension_cannot_be_created() {
    let server = Server::start(&["shared_preload_libraries = ''"]);
    let mut admin = server.plain_database().admin();
    let refusal = expect_refusal(admin.batch_execute("CREATE EXTENSION pg_writeguard"));
    assert_eq!(refusal.sqlstate, "55000", "{refusal:?}");
    assert!(refusal.hint.contains("shared_preload_libraries = 'pg_writeguard'"), "{refusal:?}");
    assert!(refusal.hint.contains("postgresql.conf"), "{refusal:?}");
    assert_eq!(number(&mut admin, "SELECT count(*) FROM pg_extension WHERE extname = 'pg_writeguard'"), 0);
}

#[test]
fn without_the_preload_an_extension_made_before_says_so() {
    let server = Server::start(&[]);
    let db = server.database();
    pass(&mut db.admin(), "CREATE TABLE t (id int); SELECT writeguard.set_policy('p', tables => '{t}', max_rows => 0)");
    pass(&mut db.admin(), "ALTER SYSTEM SET shared_preload_libraries = plpgsql");
    server.restart();
    let mut admin = db.admin();
    for sql in [
        "SELECT writeguard.set_policy('q')",
        "SELECT writeguard.drop_policy('p')",
        "SELECT * FROM writeguard.effective('t', 'postgres', 'update')",
        "SELECT writeguard.request('UPDATE t SET id = 1'::text, 'tests')",
        "SELECT writeguard.approve(1)",
        "DELETE FROM writeguard.policy",
    ] {
        let refusal = expect_refusal(admin.batch_execute(sql));
        assert_eq!(refusal.sqlstate, "55000", "{sql}: {refusal:?}");
        assert!(refusal.hint.contains("shared_preload_libraries"), "{refusal:?}");
    }
    // The rest of the server works.
    pass(&mut admin, "INSERT INTO t VALUES (1); UPDATE t SET id = 2");
    pass(&mut admin, "ALTER SYSTEM RESET shared_preload_libraries");
    server.restart();
    let refusal = expect_refusal(db.admin().batch_execute("UPDATE t SET id = 2"));
    assert_eq!(refusal.sqlstate, "WG001", "{refusal:?}");
}

// ---- Dump and restore ----

/// What pg_dump prints for the database.
fn dump(db: &Database, options: &[&str]) -> String {
    let server = Server::shared();
    let program = std::env::var_os("PGWG_BIN").expect("PGWG_BIN is set");
    let mut command = Command::new(std::path::Path::new(&program).join("pg_dump"));
    for (name, _) in std::env::vars_os() {
        if name.to_str().is_some_and(|name| name.starts_with("PG")) {
            command.env_remove(name);
        }
    }
    let output = command
        .args(["-U", "postgres", "-d", &db.name, "-p"])
        .arg(server.port().to_string())
        .arg("-h")
        .arg(server.socket_dir())
        .args(options)
        .env("LC_ALL", "C")
        .output()
        .expect("cannot run pg_dump");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("a dump in UTF-8")
}

/// Restores a dump into a new database.
fn restore(dump: &str) -> Database {
    let server = Server::shared();
    let db = server.plain_database();
    let printed = server.psql(&db.name, "postgres", &format!("\\set ON_ERROR_STOP on\n{dump}"));
    assert!(!printed.contains("ERROR"), "{printed}");
    db
}

#[test]
fn dump_and_restore_keep_policies() {
    let (db, mut admin) = database();
    let role = db.role("user");
    pass(
        &mut admin,
        &format!(
            "SELECT writeguard.set_policy('p', tables => '{{t}}', max_rows => 3, override => 'flag',
                                          comment => E'two\\nlines\\tand \\\\ more');
             SELECT writeguard.set_policy('q', tables => ARRAY['public.\"*\"*', '*.x'], roles => '{{{role}}}',
                                          operations => '{{delete}}', max_rows_per_transaction => 4)"
        ),
    );
    let restored = restore(&dump(&db, &[]));
    let policies = "SELECT string_agg(p::text, E'\\n' ORDER BY name) FROM writeguard.policy AS p";
    let text = |client: &mut Client| -> String { client.query_one(policies, &[]).unwrap().get(0) };
    let mut again = restored.admin();
    assert_eq!(text(&mut again), text(&mut admin));
    assert_eq!(limit_of_t(&mut again), 3);
}

#[test]
fn restored_databases_go_on_counting_events_and_requests() {
    let (db, mut admin) = database();
    let user = db.role("user");
    set(&mut admin, "tables => '{t}', max_rows => 3").unwrap();
    expect_refusal(admin.batch_execute("UPDATE t SET a = 1"));
    pass(&mut admin, "SELECT writeguard.request('UPDATE t SET a = 1'::text, 'tests')");
    let last = number(&mut admin, "SELECT max(id) FROM writeguard.event");
    let restored = restore(&dump(&db, &[]));
    let mut again = restored.connect(&user);
    expect_refusal(again.batch_execute("UPDATE t SET a = 1"));
    pass(&mut again, "SELECT writeguard.request('UPDATE t SET a = 1'::text, 'tests')");
    let mut admin = restored.admin();
    wait_until(20, || {
        number(&mut admin, &format!("SELECT count(*) FROM writeguard.event WHERE id > {last} AND kind = 'blocked'"))
            == 1
    });
    assert_eq!(number(&mut admin, "SELECT count(*) FROM writeguard.request"), 2);
}

#[test]
fn a_dump_restores_rows_of_covered_tables() {
    let (db, mut admin) = database();
    pass(
        &mut admin,
        "CREATE TABLE parted (id int, a int) PARTITION BY HASH (id);
         CREATE TABLE parted_0 PARTITION OF parted FOR VALUES WITH (MODULUS 2, REMAINDER 0);
         CREATE TABLE parted_1 PARTITION OF parted FOR VALUES WITH (MODULUS 2, REMAINDER 1);
         INSERT INTO parted SELECT n, n FROM generate_series(1, 100) AS n;
         SELECT writeguard.set_policy('p', max_rows => 0, override => 'never')",
    );
    for options in [&[][..], &["--inserts", "--load-via-partition-root"]] {
        let restored = restore(&dump(&db, options));
        let mut again = restored.admin();
        assert_eq!(number(&mut again, "SELECT count(*) FROM parted"), 100);
        assert_eq!(limit_of_t(&mut again), 0);
    }
}

#[test]
fn a_dump_without_data_restores_no_policy() {
    let (db, mut admin) = database();
    set(&mut admin, "tables => '{t}', max_rows => 3").unwrap();
    let restored = restore(&dump(&db, &["--schema-only"]));
    assert_eq!(number(&mut restored.admin(), "SELECT count(*) FROM writeguard.policy"), 0);
}

#[test]
fn a_token_does_not_open_a_restored_database() {
    let (db, mut admin) = database();
    let (user, approver) = (db.role("user"), db.role("approver"));
    set(&mut admin, "tables => '{t}', max_rows => 3").unwrap();
    pass(&mut admin, &format!("GRANT EXECUTE ON FUNCTION writeguard.approve TO {approver}"));
    let id = number(&mut db.connect(&user), "SELECT writeguard.request('UPDATE t SET a = 9'::text, 'tests')");
    let token: String = db.connect(&approver).query_one("SELECT writeguard.approve($1)", &[&id]).unwrap().get(0);
    let restored = restore(&dump(&db, &[]));
    let mut client = restored.connect(&user);
    pass(&mut client, &format!("SET writeguard.override = on; SET writeguard.token = '{token}'"));
    let refusal = expect_refusal(client.batch_execute("UPDATE t SET a = 9"));
    assert_eq!(refusal.sqlstate, "WG006", "{refusal:?}");
}

#[test]
fn dropping_the_extension_ends_all_limits() {
    let (db, mut admin) = database();
    let mut user = db.connect(&db.role("user"));
    set(&mut admin, "tables => '{t}', max_rows => 3").unwrap();
    assert_eq!(limit_of_t(&mut user), 3);
    pass(&mut admin, "DROP EXTENSION pg_writeguard");
    assert_eq!(limit_of_t(&mut user), 5);
}

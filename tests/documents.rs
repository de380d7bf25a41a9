//! `export_policies()` and `import_policies()`: one document for a fleet, all of it or nothing.

use std::thread;

use crate::common::session::pass;
use crate::common::{Database, Refusal, Server, expect_refusal, wait_until};
use postgres::Client;
use postgres::fallible_iterator::FallibleIterator;
use serde_json::{Value, json};

fn database() -> (Database, Client) {
    let db = Server::shared().database();
    let mut admin = db.admin();
    pass(
        &mut admin,
        "CREATE TABLE t (id int, a int NOT NULL DEFAULT 0);
         CREATE TABLE \"T 2\" (LIKE t);
         INSERT INTO t SELECT generate_series(1, 5);
         GRANT ALL ON t TO PUBLIC",
    );
    (db, admin)
}

#[track_caller]
fn number(client: &mut Client, sql: &str) -> i64 {
    client.query_one(sql, &[]).unwrap().get(0)
}

/// A row of `import_policies`.
type Outcome = (String, String, Option<Value>);

fn try_import(client: &mut Client, document: &Value, more: &str) -> Result<Vec<Outcome>, postgres::Error> {
    let sql = format!("SELECT name, action, difference FROM writeguard.import_policies($1{more})");
    let rows = client.query(&sql, &[document])?;
    Ok(rows.iter().map(|row| (row.get(0), row.get(1), row.get(2))).collect())
}

#[track_caller]
fn import(client: &mut Client, document: &Value, more: &str) -> Vec<Outcome> {
    try_import(client, document, more).unwrap_or_else(|error| panic!("{document}: {:?}", Refusal::of(&error)))
}

#[track_caller]
fn export(client: &mut Client) -> Value {
    client.query_one("SELECT writeguard.export_policies()", &[]).unwrap().get(0)
}

fn actions(outcomes: &[Outcome]) -> Vec<(&str, &str)> {
    outcomes.iter().map(|(name, action, _)| (name.as_str(), action.as_str())).collect()
}

fn changes(client: &mut Client) -> i64 {
    number(client, "SELECT count(*) FROM writeguard.event WHERE kind = 'policy_changed'")
}

/// The whole policy table.
fn stored(client: &mut Client) -> Value {
    client.query_one("SELECT jsonb_agg(p ORDER BY name) FROM writeguard.policy AS p", &[]).unwrap().get(0)
}

const UPDATE: &str = "UPDATE t SET a = a + 1";

#[track_caller]
fn refused(client: &mut Client) {
    assert_eq!(expect_refusal(client.batch_execute(UPDATE)).sqlstate, "WG001");
}

// ---- There and back ----

#[test]
fn what_was_exported_is_imported_unchanged() {
    let (_db, mut admin) = database();
    assert_eq!(export(&mut admin), json!([]));
    pass(
        &mut admin,
        r#"SELECT writeguard.set_policy('plain');
           SELECT writeguard.set_policy('Ümlaut "q"', tables => ARRAY['t', 'public."T 2"', '*.x*'], roles => '{postgres,public}',
             application => 'psql%', client => '10.0.0.0/8', schedule => 'sat,Sun 00:00-24:00 Europe/Berlin',
             operations => '{delete,drop}', max_rows => 0, max_rows_per_transaction => 9223372036854775807,
             override => 'never', comment => E'two\nlines')"#,
    );
    let before = changes(&mut admin);
    let document = export(&mut admin);
    let names: Vec<&str> = document.as_array().unwrap().iter().map(|policy| policy["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["plain", "Ümlaut \"q\""]);
    // What is NULL is left out, everything else is said.
    assert_eq!(
        document[0],
        json!({"name": "plain", "tables": ["*.*"], "roles": ["public"],
               "operations": ["update", "delete", "truncate"], "rate_interval": "01:00:00", "mode": "enforce",
               "override": "token", "min_approvals": 1, "samples": true, "always": false, "same_rows": true})
    );
    let outcomes = import(&mut admin, &document, ", prune => true");
    assert_eq!(actions(&outcomes), [("plain", "unchanged"), ("Ümlaut \"q\"", "unchanged")]);
    assert!(outcomes.iter().all(|(_, _, difference)| difference.is_none()));
    assert_eq!(changes(&mut admin), before);

    // Into another database, all of it.
    let all = stored(&mut admin);
    pass(&mut admin, "SELECT writeguard.drop_policy(name) FROM writeguard.policy");
    assert_eq!(actions(&import(&mut admin, &document, "")), [("plain", "created"), ("Ümlaut \"q\"", "created")]);
    assert_eq!(stored(&mut admin), all);
}

#[test]
fn a_document_means_the_same_under_all_settings() {
    let (_db, mut admin) = database();
    pass(&mut admin, "SELECT writeguard.set_policy('p', tables => '{t}', max_rows => 1)");
    let document = export(&mut admin);
    pass(&mut admin, "SET intervalstyle = 'iso_8601'; SET extra_float_digits = 0; SET search_path = pg_catalog");
    assert_eq!(export(&mut admin), document);
    assert_eq!(actions(&import(&mut admin, &document, "")), [("p", "unchanged")]);
}

#[test]
fn set_policy_and_import_store_the_same() {
    let (_db, mut admin) = database();
    pass(&mut admin, "SELECT writeguard.set_policy('p')");
    let by_call = stored(&mut admin);
    pass(&mut admin, "SELECT writeguard.drop_policy('p')");
    import(&mut admin, &json!([{"name": "p"}]), "");
    assert_eq!(stored(&mut admin), by_call);

    pass(
        &mut admin,
        "SELECT writeguard.set_policy('p', tables => '{PUBLIC.T,t}', client => '10/8', schedule => 'mon 09:00-10:00  UTC',
           rate_interval => '60 minutes')",
    );
    let document = json!({"name": "p", "tables": ["PUBLIC.T", "t"], "client": "10/8", "rate_interval": "60 minutes",
                          "schedule": "mon 09:00-10:00  UTC", "max_rows": null});
    assert_eq!(actions(&import(&mut admin, &document, "")), [("p", "unchanged")]);
}

#[test]
fn names_without_a_schema_are_found_through_the_callers_search_path() {
    let (_db, mut admin) = database();
    pass(&mut admin, "CREATE SCHEMA s; CREATE TABLE s.t (id int); SET search_path = s");
    import(&mut admin, &json!([{"name": "p", "tables": ["t"]}]), "");
    assert_eq!(export(&mut admin)[0]["tables"], json!(["s.t"]));
}

// ---- What it does ----

#[test]
fn an_import_creates_changes_and_with_prune_drops() {
    let (db, mut admin) = database();
    let mut user = db.connect(&db.role("user"));
    pass(
        &mut admin,
        "SELECT writeguard.set_policy('b', tables => '{t}', max_rows => 100);
         SELECT writeguard.set_policy('c', tables => '{t}', max_rows => 2, comment => 'old')",
    );
    pass(&mut user, "PREPARE p AS UPDATE t SET a = a + 1 WHERE id <= 2; EXECUTE p");
    let before = changes(&mut admin);
    let document = json!([
        {"name": "b", "tables": ["public.t", "public.\"T 2\""], "max_rows": 4},
        {"name": "a", "tables": ["public.t"], "max_rows": 3, "require_where": null},
    ]);

    let outcomes = import(&mut admin, &document, "");
    assert_eq!(
        outcomes,
        [
            (
                "a".to_owned(),
                "created".to_owned(),
                Some(json!({"tables": {"to": ["public.t"]}, "max_rows": {"to": 3}}))
            ),
            (
                "b".to_owned(),
                "changed".to_owned(),
                Some(json!({"tables": {"from": ["public.t"], "to": ["public.t", "public.\"T 2\""]},
                            "max_rows": {"from": 100, "to": 4}}))
            ),
        ]
    );
    assert_eq!(changes(&mut admin), before + 2);

    let outcomes = import(&mut admin, &document, ", prune => true");
    assert_eq!(actions(&outcomes), [("a", "unchanged"), ("b", "unchanged"), ("c", "dropped")]);
    assert_eq!(
        outcomes[2].2,
        Some(json!({"tables": {"from": ["public.t"]}, "max_rows": {"from": 2}, "comment": {"from": "old"}}))
    );
    assert_eq!(changes(&mut admin), before + 3);

    // Each is in force at once, for statements that were prepared before it too.
    pass(&mut user, "EXECUTE p");
    refused(&mut user);
    import(&mut admin, &json!({"name": "a", "tables": ["public.t"], "max_rows": 1}), "");
    assert_eq!(expect_refusal(user.batch_execute("EXECUTE p")).sqlstate, "WG001");
    let outcomes = import(&mut admin, &json!([]), ", prune => true");
    assert_eq!(actions(&outcomes), [("a", "dropped"), ("b", "dropped")]);
    pass(&mut user, UPDATE);
}

#[test]
fn what_is_left_out_is_set_to_its_default() {
    let (_db, mut admin) = database();
    pass(
        &mut admin,
        "SELECT writeguard.set_policy('p', tables => '{t}', max_rows => 3, override => 'flag', comment => 'c')",
    );
    let outcomes = import(&mut admin, &json!([{"name": "p", "tables": ["t"], "max_rows": 3}]), "");
    assert_eq!(
        outcomes[0].2,
        Some(json!({"override": {"from": "flag", "to": "token"}, "comment": {"from": "c", "to": null}}))
    );
}

#[test]
fn each_change_is_an_event_like_any_other() {
    let (db, mut admin) = database();
    let mut listener = db.admin();
    pass(&mut listener, "LISTEN writeguard");
    pass(&mut admin, "SELECT writeguard.set_policy('old')");
    import(&mut admin, &json!([{"name": "new", "max_rows": 7}]), ", prune => true");
    let rows = admin
        .query("SELECT policy, login, reason FROM writeguard.event WHERE kind = 'policy_changed' ORDER BY id", &[])
        .unwrap();
    let events: Vec<(&str, &str)> = rows.iter().map(|row| (row.get(0), row.get(1))).collect();
    assert_eq!(events, [("old", "postgres"), ("new", "postgres"), ("old", "postgres")]);
    let reason: &str = rows[1].get(2);
    assert!(reason.starts_with("created: {") && reason.contains("\"max_rows\":{\"to\":7}"), "{reason}");
    assert_eq!(rows[2].get::<_, &str>(2), "dropped");
    let mut told = 0;
    wait_until(20, || {
        pass(&mut listener, "SELECT 1");
        while let Ok(Some(_)) = listener.notifications().iter().next() {
            told += 1;
        }
        told >= 3
    });
    let log = Server::shared().log();
    assert!(log.lines().filter(|line| line.contains("policy changed") && line.contains(&db.name)).count() >= 3);
}

#[test]
fn a_dry_run_tells_the_same_and_changes_nothing() {
    let (db, mut admin) = database();
    pass(
        &mut admin,
        "SELECT writeguard.set_policy('b', tables => '{t}', max_rows => 2);
         SELECT writeguard.set_policy('c', tables => '{t}', max_rows => 100)",
    );
    let (before, events) = (stored(&mut admin), changes(&mut admin));
    let document = json!([{"name": "a", "max_rows": 1}, {"name": "b", "tables": ["t"], "max_rows": 100}]);
    pass(&mut admin, "BEGIN READ ONLY");
    let dry = import(&mut admin, &document, ", prune => true, dry_run => true");
    // Nobody waits for it, although its transaction is still open.
    let mut other = db.admin();
    pass(&mut other, "SET lock_timeout = '10s'; SELECT writeguard.set_policy('d'); SELECT writeguard.drop_policy('d')");
    pass(&mut admin, "COMMIT");
    assert_eq!(actions(&dry), [("a", "created"), ("b", "changed"), ("c", "dropped")]);
    assert_eq!(stored(&mut other), before);
    assert_eq!(changes(&mut other), events + 2);
    refused(&mut db.connect(&db.role("user")));
    assert_eq!(import(&mut admin, &document, ", prune => true"), dry);
    assert_ne!(stored(&mut other), before);
    // A dry run finds the same mistakes.
    let refusal =
        expect_refusal(try_import(&mut admin, &json!([{"name": "x", "tables": ["nowhere.t"]}]), ", dry_run => true"));
    assert_eq!(refusal.sqlstate, "WG007");
}

#[test]
fn it_is_all_or_nothing() {
    let (db, mut admin) = database();
    let mut reader = db.admin();
    pass(&mut admin, "SELECT writeguard.set_policy('p', tables => '{t}', max_rows => 2)");
    let (before, events) = (stored(&mut admin), changes(&mut admin));
    for wrong in [json!({"name": "z", "max_rows": -1}), json!({"name": "z", "roles": ["nobody_at_all"]})] {
        let document = json!([{"name": "a", "max_rows": 1}, {"name": "p", "max_rows": 100}, wrong]);
        let refusal = expect_refusal(try_import(&mut admin, &document, ", prune => true"));
        assert_eq!(refusal.sqlstate, "WG007", "{refusal:?}");
        assert_eq!((stored(&mut reader), changes(&mut reader)), (before.clone(), events));
    }
    pass(&mut admin, "BEGIN");
    import(&mut admin, &json!([{"name": "a"}]), ", prune => true");
    pass(&mut admin, "ROLLBACK");
    assert_eq!((stored(&mut reader), changes(&mut reader)), (before, events));
    refused(&mut admin);
}

#[test]
fn an_import_compares_with_what_others_are_about_to_commit() {
    let (db, mut admin) = database();
    pass(&mut admin, "BEGIN; SELECT writeguard.set_policy('p', max_rows => 1)");
    let mut other = db.admin();
    let pid = number(&mut other, "SELECT pg_backend_pid()::bigint");
    let importing =
        thread::spawn(move || import(&mut other, &json!([{"name": "p", "max_rows": 2}]), ", prune => true"));
    let mut watcher = db.admin();
    let waits = format!("SELECT count(*) FROM pg_locks WHERE pid = {pid} AND NOT granted");
    wait_until(20, || number(&mut watcher, &waits) == 1);
    pass(&mut admin, "COMMIT");
    let outcomes = importing.join().unwrap();
    assert_eq!(outcomes[0].1, "changed");
    assert_eq!(outcomes[0].2, Some(json!({"max_rows": {"from": 1, "to": 2}})));
}

#[test]
fn ten_thousand_policies_come_and_go() {
    let (db, mut admin) = database();
    let document: Value = (0..10_000)
        .map(|n| {
            json!({"name": format!("p{n:05}"), "tables": [format!("s{n}.t*")], "max_rows": n,
                   "schedule": "Mon-Fri 18:00-08:00 Europe/Berlin"})
        })
        .collect();
    let count = |outcomes: &[Outcome], action: &str| outcomes.iter().filter(|outcome| outcome.1 == action).count();
    assert_eq!(count(&import(&mut admin, &document, ""), "created"), 10_000);
    assert_eq!(changes(&mut admin), 10_000);
    let exported = export(&mut admin);
    assert_eq!(exported.as_array().unwrap().len(), 10_000);
    assert_eq!(count(&import(&mut admin, &exported, ", prune => true"), "unchanged"), 10_000);
    pass(&mut db.connect(&db.role("user")), UPDATE);
    let rest = Value::from(exported.as_array().unwrap()[..10].to_vec());
    assert_eq!(count(&import(&mut admin, &rest, ", prune => true"), "dropped"), 9_990);
    assert_eq!(number(&mut admin, "SELECT count(*) FROM writeguard.policy"), 10);
    assert_eq!(changes(&mut admin), 19_990);
}

// ---- Mistakes ----

#[test]
fn mistakes_name_the_policy_and_the_key() {
    let (_db, mut admin) = database();
    pass(&mut admin, "CREATE VIEW v AS SELECT 1");
    for (policy, key, word) in [
        (json!({"max_row": 5}), "max_row", "max_rows"),
        (json!({"max_rows": "many"}), "max_rows", "whole number"),
        (json!({"max_rows": -1}), "max_rows", "negative"),
        (json!({"max_rows_per_transaction": -1}), "max_rows_per_transaction", "negative"),
        (json!({"tables": ["a b"]}), "tables", "a b"),
        (json!({"tables": []}), "tables", "empty"),
        (json!({"tables": [null]}), "tables", "NULL"),
        (json!({"tables": ["nowhere"]}), "tables", "search_path"),
        (json!({"tables": ["public.t", "public.nowhere"]}), "tables", "nowhere"),
        (json!({"tables": ["public.v"]}), "tables", "view"),
        (json!({"roles": ["nobody_at_all"]}), "roles", "nobody_at_all"),
        (json!({"roles": [""]}), "roles", "empty"),
        (json!({"operations": ["insert"]}), "operations", "insert"),
        (json!({"schedule": "sometimes"}), "schedule", "sometimes"),
        (json!({"schedule": "Mon 10:00-11:00 Nowhere/At_all"}), "schedule", "Nowhere/At_all"),
        (json!({"application": "a\\"}), "application", "escape"),
        (json!({"client": "10.0.0.1/8"}), "client", "10.0.0.1/8"),
        (json!({"client": "here"}), "client", "here"),
        (json!({"rate_interval": "some time"}), "rate_interval", "some time"),
        (json!({"rate_interval": "999999999999 years"}), "rate_interval", "999999999999"),
        (json!({"undo": "a while"}), "undo", "a while"),
        (json!({"mode": "strict"}), "mode", "strict"),
        (json!({"override": "perhaps"}), "override", "perhaps"),
        (json!({"override": null}), "override", "null"),
    ] {
        let mut policy = policy;
        policy["name"] = "guilty".into();
        let document = json!([{"name": "innocent", "tables": ["public.t"]}, policy]);
        let refusal = expect_refusal(try_import(&mut admin, &document, ""));
        assert_eq!(refusal.sqlstate, "WG007", "{document}: {refusal:?}");
        let (policy, key) = ("policy \"guilty\"", format!("key \"{key}\""));
        assert!(refusal.message.contains(policy) && refusal.message.contains(&key), "{document}: {refusal:?}");
        assert!(format!("{} {}", refusal.message, refusal.detail).contains(word), "{document}: {refusal:?}");
        assert!(!refusal.hint.is_empty() && !refusal.hint.contains("=>"), "{document}: {refusal:?}");
    }
    let refusal = expect_refusal(try_import(&mut admin, &json!([{"name": "p"}, {"name": "p"}]), ""));
    assert_eq!((refusal.sqlstate.as_str(), refusal.message.contains("\"p\"")), ("WG007", true), "{refusal:?}");
    for document in
        [json!("p"), json!(null), json!([5]), json!([{}]), json!([{"name": " "}]), json!([{"name": "n".repeat(300)}])]
    {
        let refusal = expect_refusal(try_import(&mut admin, &document, ""));
        assert_eq!(refusal.sqlstate, "WG007", "{document}: {refusal:?}");
    }
    assert_eq!((number(&mut admin, "SELECT count(*) FROM writeguard.policy"), changes(&mut admin)), (0, 0));
}

#[test]
fn what_no_json_number_or_depth_can_be_is_a_mistake_too() {
    let (_db, mut admin) = database();
    for document in [
        "jsonb_build_array(jsonb_build_object('name', 'p', 'max_rows', 1e400::numeric))",
        "jsonb_build_array(jsonb_build_object('name', 'p', 'max_rows', 9223372036854775808))",
        "(repeat('[', 1000) || repeat(']', 1000))::jsonb",
        "NULL",
        "'[]', prune => NULL",
        "'[]', dry_run => NULL",
    ] {
        let refusal =
            expect_refusal(admin.batch_execute(&format!("SELECT * FROM writeguard.import_policies({document})")));
        assert_eq!(refusal.sqlstate, "WG007", "{document}: {refusal:?}");
        assert!(!refusal.hint.is_empty(), "{document}: {refusal:?}");
    }
}

#[test]
fn it_can_be_caught_like_any_error() {
    let (_db, mut admin) = database();
    pass(
        &mut admin,
        r#"DO $$ BEGIN
             PERFORM writeguard.import_policies('[{"name": "p", "client": "nowhere"}]');
             RAISE 'not refused';
           EXCEPTION WHEN SQLSTATE 'WG007' THEN
             PERFORM writeguard.import_policies('[{"name": "q", "client": "10.0.0.0/8"}]');
           END $$"#,
    );
    assert_eq!(export(&mut admin)[0]["name"], "q");
}

// ---- Who ----

#[test]
fn only_the_owner_may_until_it_is_granted() {
    let (db, mut admin) = database();
    let role = db.role("keeper");
    let mut keeper = db.connect(&role);
    for call in ["export_policies()", "import_policies('[]')"] {
        let refusal = expect_refusal(keeper.batch_execute(&format!("SELECT writeguard.{call}")));
        assert_eq!(refusal.sqlstate, "42501", "{call}: {refusal:?}");
    }
    pass(
        &mut admin,
        &format!("GRANT EXECUTE ON FUNCTION writeguard.export_policies, writeguard.import_policies TO {role}"),
    );
    import(&mut keeper, &json!([{"name": "p", "max_rows": 3}]), "");
    assert_eq!(export(&mut keeper)[0]["max_rows"], 3);
    let login: String =
        admin.query_one("SELECT login FROM writeguard.event WHERE kind = 'policy_changed'", &[]).unwrap().get(0);
    assert_eq!(login, role);
}

// ---- Some columns of one policy ----

fn try_alter(client: &mut Client, name: &str, changes: &Value) -> Result<String, postgres::Error> {
    client.query_one("SELECT writeguard.alter_policy($1, $2)", &[&name, changes]).map(|row| row.get(0))
}

#[test]
fn alter_policy_changes_the_named_columns_and_no_other() {
    let (_db, mut admin) = database();
    pass(&mut admin, "ALTER TABLE t ADD PRIMARY KEY (id)");
    pass(
        &mut admin,
        "SELECT writeguard.set_policy('p', tables => '{public.t}', roles => '{postgres}', max_rows => 5, rate_rows => 7,
             rate_interval => '90 minutes', approvers => 'postgres', min_approvals => 2, undo => '3 days',
             client => '10.0.0.0/8', schedule => 'Mon 00:00-24:00 UTC', comment => 'as it is', samples => false);
         SELECT writeguard.set_policy('q', max_rows => 1)",
    );
    let before = stored(&mut admin);
    let events = changes(&mut admin);
    let altered = |client: &mut Client, changes: Value| try_alter(client, "p", &changes).unwrap();
    assert_eq!(altered(&mut admin, json!({"max_rows": 6, "mode": "warn"})), "changed");
    let mut expected = before.clone();
    (expected[0]["max_rows"], expected[0]["mode"]) = (json!(6), json!("warn"));
    assert_eq!(stored(&mut admin), expected);
    assert_eq!(changes(&mut admin), events + 1);
    // The same once more, and nothing at all.
    assert_eq!(altered(&mut admin, json!({"max_rows": 6, "mode": "warn"})), "unchanged");
    assert_eq!(altered(&mut admin, json!({})), "unchanged");
    assert_eq!(altered(&mut admin, json!({"name": "p"})), "unchanged");
    assert_eq!((stored(&mut admin), changes(&mut admin)), (expected, events + 1));
    // Back to the defaults, one by one and all of them.
    assert_eq!(altered(&mut admin, json!({"mode": null, "max_rows": 5})), "changed");
    assert_eq!(stored(&mut admin), before);
    let columns = "SELECT jsonb_object_agg(attname, NULL) FROM pg_attribute
                   WHERE attrelid = 'writeguard.policy'::regclass AND attnum > 0 AND attname <> 'name'";
    let all: Value = admin.query_one(columns, &[]).unwrap().get(0);
    assert_eq!(altered(&mut admin, all), "changed");
    let now = stored(&mut admin);
    pass(&mut admin, "SELECT writeguard.set_policy('p')");
    assert_eq!(stored(&mut admin), now);
    // An interval, a network and an unqualified name as set_policy takes them.
    assert_eq!(altered(&mut admin, json!({"tables": ["t"], "undo": "1 day", "client": "10.1.0.0/16"})), "changed");
    let now = &stored(&mut admin)[0];
    assert_eq!((&now["tables"], &now["undo"]), (&json!(["public.t"]), &json!("1 day")));
}

#[test]
fn alter_policy_says_what_is_wrong_and_changes_nothing() {
    let (db, mut admin) = database();
    pass(&mut admin, "SELECT writeguard.set_policy('p', tables => '{public.t}', max_rows => 5)");
    let before = (stored(&mut admin), changes(&mut admin));
    for (name, wrong, words) in [
        ("nobody", json!({"max_rows": 1}), ["policy \"nobody\" does not exist", "SELECT name"]),
        ("p", json!({"max_row": 1}), ["unknown key \"max_row\"", "max_rows"]),
        ("p", json!({"max_row": null}), ["unknown key \"max_row\"", "max_rows"]),
        ("p", json!({"max_rows": "many"}), ["key \"max_rows\"", "max_rows"]),
        ("p", json!({"max_rows": -1}), ["key \"max_rows\"", "max_rows"]),
        ("p", json!({"mode": "enfoce"}), ["key \"mode\"", "mode"]),
        ("p", json!({"tables": ["public.not_there"]}), ["public.not_there", ""]),
        ("p", json!({"name": "q"}), ["the name of a policy stays", ""]),
        ("p", json!([{"max_rows": 1}]), ["must be an object", "alter_policy"]),
        ("p", json!(7), ["must be an object", "alter_policy"]),
    ] {
        let refusal = Refusal::of(&try_alter(&mut admin, name, &wrong).expect_err("wrong"));
        assert_eq!(refusal.sqlstate, "WG007", "{wrong}: {refusal:?}");
        assert!(refusal.message.contains(words[0]) && refusal.hint.contains(words[1]), "{wrong}: {refusal:?}");
    }
    assert_eq!((stored(&mut admin), changes(&mut admin)), before);
    // Nor is it for everybody.
    let role = db.role("nobody_special");
    let refusal = Refusal::of(&try_alter(&mut db.connect(&role), "p", &json!({"max_rows": 9})).expect_err("no grant"));
    assert_eq!(refusal.sqlstate, "42501");
}

#[test]
fn alter_policy_is_in_force_at_once_and_one_after_the_other() {
    let (db, mut admin) = database();
    pass(&mut admin, "SELECT writeguard.set_policy('p', tables => '{public.t}', max_rows => 5)");
    let mut client = db.admin();
    pass(&mut client, "UPDATE t SET a = 1");
    try_alter(&mut admin, "p", &json!({"max_rows": 4})).unwrap();
    assert_eq!(expect_refusal(client.batch_execute("UPDATE t SET a = 2")).sqlstate, "WG001");
    // Two at a time lose nothing of each other.
    pass(&mut admin, "BEGIN");
    try_alter(&mut admin, "p", &json!({"max_rows": 3})).unwrap();
    let other = thread::spawn(move || try_alter(&mut client, "p", &json!({"comment": "both"})).unwrap());
    thread::sleep(std::time::Duration::from_millis(300));
    pass(&mut admin, "COMMIT");
    assert_eq!(other.join().unwrap(), "changed");
    let now = &stored(&mut admin)[0];
    assert_eq!((&now["max_rows"], &now["comment"]), (&json!(3), &json!("both")));
}

#[test]
fn set_policy_says_what_went_back_to_its_default() {
    let (db, mut admin) = database();
    pass(
        &mut admin,
        "SELECT writeguard.set_policy('p', tables => '{public.t}', max_rows => 5, max_rows_per_transaction => 100,
             comment => 'mind this')",
    );
    let told = std::sync::Arc::new(std::sync::Mutex::new(Vec::new()));
    let into = told.clone();
    let mut config = db.config("postgres");
    config.notice_callback(move |notice| into.lock().unwrap().push(notice));
    let mut client = config.connect(postgres::NoTls).unwrap();
    // To change one thing.
    pass(&mut client, "SELECT writeguard.set_policy('p', tables => '{public.t}', max_rows => 6)");
    let notices: Vec<_> = told.lock().unwrap().drain(..).collect();
    let [notice] = &notices[..] else { panic!("{notices:?}") };
    assert_eq!(notice.severity(), "NOTICE");
    for words in ["policy \"p\" was replaced", "max_rows_per_transaction (was 100)", "comment (was \"mind this\")"] {
        assert!(notice.message().contains(words), "{notice:?}");
    }
    assert!(!notice.message().contains("max_rows (was"), "{notice:?}");
    // What it says to type.
    let hint = notice.hint().unwrap();
    pass(&mut client, &hint[hint.find("SELECT").unwrap()..]);
    let now = &stored(&mut admin)[0];
    assert_eq!(
        (&now["max_rows"], &now["max_rows_per_transaction"], &now["comment"]),
        (&json!(6), &json!(100), &json!("mind this"))
    );
    // Nothing to say of that.
    pass(
        &mut client,
        "SELECT writeguard.set_policy('new', max_rows => 6); SELECT writeguard.set_policy('new', max_rows => 7)",
    );
    assert!(told.lock().unwrap().iter().all(|notice| !notice.message().contains("was replaced")));
    // And from and to are on record.
    let reason =
        "SELECT reason FROM writeguard.event WHERE kind = 'policy_changed' AND policy = 'new' ORDER BY id DESC LIMIT 1";
    let reason: String = admin.query_one(reason, &[]).unwrap().get(0);
    assert_eq!(reason, r#"changed: {"max_rows":{"from":6,"to":7}}"#);
}

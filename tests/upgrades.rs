//! From each release to this one: the upgrade script gives what a new installation has, and until it is run, the
//! library serves the tables and functions of the first release.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::thread;

use crate::common::session::{pass, text};
use crate::common::{Database, Refusal, Server, expect_refusal, run, wait_until};
use postgres::Client;

const FIRST: &str = "0.1.0";
/// The release before this one.
const LAST: &str = "0.2.0";
const UPDATE: &str = "ALTER EXTENSION pg_writeguard UPDATE";

/// A database with the extension as the first release made it.
fn first_release(server: &Server) -> Database {
    release(server, FIRST)
}

/// A database with the extension as that release made it.
fn release(server: &Server, version: &str) -> Database {
    let db = server.plain_database();
    pass(&mut db.admin(), &format!("CREATE EXTENSION pg_writeguard VERSION '{version}'"));
    db
}

/// The same with the table `t` of ten rows, three of which may be changed at once.
fn guarded(server: &Server) -> Database {
    let db = first_release(server);
    pass(
        &mut db.admin(),
        "CREATE TABLE t (id int PRIMARY KEY, note text); INSERT INTO t SELECT n FROM generate_series(1, 10) AS n;
         GRANT ALL ON t TO PUBLIC; SELECT writeguard.set_policy('p', tables => '{public.t}', max_rows => 3)",
    );
    db
}

#[track_caller]
fn refuse(client: &mut Client, sqlstate: &str, sql: &str) -> Refusal {
    let refusal = expect_refusal(client.batch_execute(sql));
    assert_eq!(refusal.sqlstate, sqlstate, "{sql}: {refusal:?}");
    refusal
}

#[track_caller]
fn number(client: &mut Client, sql: &str) -> i64 {
    client.query_one(sql, &[]).unwrap_or_else(|error| panic!("{sql}: {error:?}")).get(0)
}

const CHANGED: &str = "SELECT count(*) FROM t WHERE note IS NOT NULL";

/// How many events of a kind there are, once there are so many.
#[track_caller]
fn events(client: &mut Client, kind: &str, expected: i64) {
    let sql = format!("SELECT count(*) FROM writeguard.event WHERE kind = '{kind}'");
    wait_until(30, || number(client, &sql) == expected);
}

// The catalog.

/// What the system catalogs say of the extension and its schema, a line for each fact; without OIDs, and without what
/// depends on the order of grants.
const CATALOG: &str = r#"
WITH schema AS (SELECT oid FROM pg_namespace WHERE nspname = 'writeguard'),
     extension AS (SELECT * FROM pg_extension WHERE extname = 'pg_writeguard'),
     relation AS (SELECT c.* FROM pg_class AS c JOIN schema AS s ON s.oid = c.relnamespace),
     member AS (
         SELECT 'pg_class'::regclass AS classid, oid AS objid FROM relation
         UNION ALL SELECT 'pg_proc'::regclass, p.oid FROM pg_proc AS p JOIN schema AS s ON s.oid = p.pronamespace
         UNION ALL SELECT 'pg_type'::regclass, t.oid FROM pg_type AS t JOIN schema AS s ON s.oid = t.typnamespace
         UNION ALL SELECT 'pg_constraint'::regclass, k.oid FROM pg_constraint AS k JOIN schema AS s ON s.oid = k.connamespace
         UNION ALL SELECT 'pg_trigger'::regclass, t.oid FROM pg_trigger AS t JOIN relation AS c ON c.oid = t.tgrelid
         UNION ALL SELECT 'pg_rewrite'::regclass, r.oid FROM pg_rewrite AS r JOIN relation AS c ON c.oid = r.ev_class
         UNION ALL SELECT 'pg_attrdef'::regclass, d.oid FROM pg_attrdef AS d JOIN relation AS c ON c.oid = d.adrelid
         UNION ALL SELECT 'pg_namespace'::regclass, oid FROM schema
         UNION ALL SELECT 'pg_extension'::regclass, oid FROM extension),
     fact (kind, name, says) AS (
SELECT 'extension', extname::text,
       jsonb_build_array(extowner::regrole, extversion, extrelocatable, extnamespace::regnamespace,
                         (SELECT array_agg(o::regclass::text ORDER BY n) FROM unnest(extconfig) WITH ORDINALITY AS u (o, n)),
                         extcondition)
FROM extension
UNION ALL
SELECT 'schema', nspname::text,
       jsonb_build_array(nspowner::regrole, ARRAY(SELECT a::text FROM unnest(nspacl) AS a ORDER BY 1))
FROM pg_namespace WHERE oid = (SELECT oid FROM schema)
UNION ALL
SELECT 'function', p.oid::regprocedure::text,
       to_jsonb(p) - '{oid,pronamespace,proowner,proacl,proargdefaults,prosqlbody,prorettype,proargtypes,proallargtypes}'::text[]
       || jsonb_build_object('is', pg_get_functiondef(p.oid), 'owner', p.proowner::regrole,
                             'acl', ARRAY(SELECT a::text FROM unnest(p.proacl) AS a ORDER BY 1), 'null', p.proacl IS NULL)
FROM pg_proc AS p WHERE pronamespace = (SELECT oid FROM schema)
UNION ALL
SELECT 'relation', relname::text,
       jsonb_build_array(relkind, relpersistence, relowner::regrole, reloptions, relrowsecurity, relforcerowsecurity,
                         relreplident, relispartition, relhasindex, relhasrules, relhastriggers, relchecks, reltoastrelid <> 0,
                         (SELECT amname FROM pg_am WHERE pg_am.oid = relam), reltablespace, relnatts,
                         ARRAY(SELECT a::text FROM unnest(relacl) AS a ORDER BY 1), relacl IS NULL,
                         CASE relkind WHEN 'v' THEN pg_get_viewdef(oid) WHEN 'i' THEN pg_get_indexdef(oid) END)
FROM relation
UNION ALL
SELECT 'column', format('%s.%s', c.relname, a.attnum),
       jsonb_build_array(a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull, a.attidentity, a.attgenerated,
                         a.attisdropped, a.attstorage, a.attcompression, a.attcollation::regcollation,
                         -- Some builds of the server stamp each column.
                         ARRAY(SELECT o FROM unnest(a.attoptions) AS o WHERE o NOT LIKE 'pg\_attver=%'),
                         a.attislocal, ARRAY(SELECT i::text FROM unnest(a.attacl) AS i ORDER BY 1),
                         pg_get_expr(d.adbin, d.adrelid))
FROM pg_attribute AS a JOIN relation AS c ON c.oid = a.attrelid
     LEFT JOIN pg_attrdef AS d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
WHERE a.attnum > 0
UNION ALL
SELECT 'constraint', format('%s on %s', k.conname, k.conrelid::regclass),
       jsonb_build_array(k.contype, pg_get_constraintdef(k.oid), k.convalidated, k.condeferrable, k.condeferred, k.connoinherit)
FROM pg_constraint AS k WHERE k.connamespace = (SELECT oid FROM schema)
UNION ALL
SELECT 'trigger', format('%s on %s', CASE WHEN t.tgisinternal THEN t.tgfoid::regproc::text ELSE t.tgname END, c.relname),
       jsonb_build_array(t.tgtype, t.tgenabled, t.tgisinternal,
                         CASE WHEN NOT t.tgisinternal THEN pg_get_triggerdef(t.oid) END)
FROM pg_trigger AS t JOIN relation AS c ON c.oid = t.tgrelid
UNION ALL
SELECT 'rule', format('%s on %s', r.rulename, c.relname), jsonb_build_array(r.ev_type, r.ev_enabled, r.is_instead)
FROM pg_rewrite AS r JOIN relation AS c ON c.oid = r.ev_class
UNION ALL
SELECT 'row security', format('%s on %s', y.polname, c.relname), to_jsonb(y) - '{oid,polrelid}'::text[]
FROM pg_policy AS y JOIN relation AS c ON c.oid = y.polrelid
UNION ALL
SELECT 'sequence', c.relname::text, to_jsonb(s) - '{seqrelid}'::text[]
FROM pg_sequence AS s JOIN relation AS c ON c.oid = s.seqrelid
UNION ALL
SELECT 'initial privileges', pg_describe_object(i.classoid, i.objoid, i.objsubid),
       jsonb_build_array(i.privtype, ARRAY(SELECT a::text FROM unnest(i.initprivs) AS a ORDER BY 1))
FROM pg_init_privs AS i JOIN member AS m ON m.classid = i.classoid AND m.objid = i.objoid
UNION ALL
SELECT 'comment', pg_describe_object(d.classoid, d.objoid, d.objsubid), to_jsonb(d.description)
FROM pg_description AS d JOIN member AS m ON m.classid = d.classoid AND m.objid = d.objoid
UNION ALL
SELECT 'dependency', pg_describe_object(d.classid, d.objid, d.objsubid),
       jsonb_build_array(d.deptype, pg_describe_object(d.refclassid, d.refobjid, d.refobjsubid))
FROM pg_depend AS d JOIN member AS m USING (classid, objid)
UNION ALL
SELECT 'role', pg_describe_object(d.classid, d.objid, d.objsubid),
       jsonb_build_array(d.deptype, pg_describe_object(d.refclassid, d.refobjid, 0))
FROM pg_shdepend AS d JOIN member AS m USING (classid, objid)
WHERE d.dbid = (SELECT oid FROM pg_database WHERE datname = current_database()))
SELECT regexp_replace(format('%s %s: %s', kind, name, says), '(pg_toast_|_constraint_|RI_ConstraintTrigger_._)\d+', '\1', 'g')
FROM fact"#;

fn catalog(client: &mut Client) -> BTreeSet<String> {
    let facts: BTreeSet<String> = client.query(CATALOG, &[]).unwrap().iter().map(|row| row.get(0)).collect();
    // Less than that, and the query has lost sight of the extension.
    assert!(facts.len() > 400, "{} facts", facts.len());
    facts
}

#[track_caller]
fn assert_same(upgraded: &BTreeSet<String>, fresh: &BTreeSet<String>) {
    let only = |one: &BTreeSet<String>, other: &BTreeSet<String>| {
        one.difference(other).map(|fact| format!("\n  {fact}")).collect::<String>()
    };
    let (lost, left) = (only(fresh, upgraded), only(upgraded, fresh));
    assert!(
        lost.is_empty() && left.is_empty(),
        "only in a new installation (what sql/upgrade/{LAST}--{}.sql lacks):{lost}\nonly after the upgrade:{left}",
        env!("CARGO_PKG_VERSION")
    );
}

#[test]
fn upgraded_extension_is_as_a_new_one() {
    let server = Server::shared();
    let fresh = catalog(&mut server.database().admin());
    for (version, news) in [(FIRST, 100), (LAST, 1)] {
        let mut admin = release(server, version).admin();
        let before = catalog(&mut admin);
        let told = (before.difference(&fresh).count(), fresh.difference(&before).count());
        assert!(told.0 >= news / 20 && told.1 >= news, "{version}: {told:?}");
        pass(&mut admin, UPDATE);
        assert_same(&catalog(&mut admin), &fresh);
    }
}

/// Functions, views and tables of the extension's schema, as `ALTER EXTENSION ... DROP` and `CREATE` name them.
const MADE: &str = "SELECT i.type || ' ' || i.identity
    FROM pg_depend AS d JOIN pg_extension AS e ON e.oid = d.refobjid AND d.refclassid = 'pg_extension'::regclass
         CROSS JOIN LATERAL pg_identify_object(d.classid, d.objid, 0) AS i
    WHERE e.extname = 'pg_writeguard' AND d.deptype = 'e' AND i.type IN ('function', 'view', 'table')";

fn made(client: &mut Client) -> BTreeSet<String> {
    client.query(MADE, &[]).unwrap().iter().map(|row| row.get(0)).collect()
}

/// Whoever may create in the schema could otherwise have what is theirs run as a part of the extension (CVE-2022-2625).
#[test]
fn upgrade_takes_over_nothing_that_is_somebody_elses() {
    let server = Server::shared();
    let db = release(server, LAST);
    let mut admin = db.admin();
    let stranger = db.role("stranger");
    pass(&mut admin, &format!("GRANT CREATE ON SCHEMA writeguard TO {stranger}"));
    let mut refused = |before: &str, sqlstates: &[&str]| {
        pass(&mut admin, &format!("BEGIN; {before}"));
        let refusal = expect_refusal(admin.batch_execute(UPDATE));
        assert!(sqlstates.contains(&refusal.sqlstate.as_str()), "{before}: {refusal:?}");
        pass(&mut admin, "ROLLBACK");
    };
    let (old, new) = (made(&mut db.admin()), made(&mut server.database().admin()));
    // What the script makes anew, and is no member any more.
    let replaced: Vec<_> = old.iter().filter(|object| object.starts_with("function ")).collect();
    assert!(replaced.len() > 30, "{replaced:?}");
    for object in replaced {
        refused(&format!("ALTER EXTENSION pg_writeguard DROP {object}"), &["55000"]);
    }
    // What the script brings, and is there already.
    let brought: Vec<_> = new.difference(&old).collect();
    assert!(!brought.is_empty());
    for object in brought {
        let body = match object.split_once(' ').expect("a type").0 {
            "function" if object.ends_with("_policy_written()") || object.ends_with("_event_restored()") => {
                "RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'"
            }
            "function"
                if ["._shown", "._samples(", ".alter_policy", ".set_policy("]
                    .iter()
                    .any(|name| object.contains(name)) =>
            {
                "RETURNS text LANGUAGE sql AS 'SELECT NULL::text'"
            }
            "function" if object.contains(".undo(") => {
                "RETURNS TABLE (relation text, restored bigint, conflicts bigint) LANGUAGE sql
                  AS 'SELECT NULL::text, 0::bigint, 0::bigint'"
            }
            "function" => "RETURNS integer LANGUAGE sql AS 'SELECT 1'",
            "view" => "AS SELECT 1 AS one",
            _ => "(one integer)",
        };
        let theirs = format!("SET LOCAL ROLE {stranger}; CREATE {object} {body}; RESET ROLE");
        refused(&theirs, &["55000", "42723", "42P07"]);
    }
    pass(&mut admin, &format!("REVOKE CREATE ON SCHEMA writeguard FROM {stranger}; {UPDATE}"));
    assert_same(&catalog(&mut admin), &catalog(&mut server.database().admin()));
}

#[test]
fn upgraded_extension_is_as_a_new_one_where_default_privileges_give_all_away() {
    let server = Server::shared();
    let catalogs = [None, Some(FIRST), Some(LAST)].map(|first| {
        let db = server.plain_database();
        let mut admin = db.admin();
        let role = db.role("everything");
        for objects in ["TABLES", "SEQUENCES", "FUNCTIONS"] {
            pass(&mut admin, &format!("ALTER DEFAULT PRIVILEGES GRANT ALL ON {objects} TO {role}, PUBLIC"));
        }
        match first {
            None => pass(&mut admin, "CREATE EXTENSION pg_writeguard"),
            Some(first) => pass(&mut admin, &format!("CREATE EXTENSION pg_writeguard VERSION '{first}'; {UPDATE}")),
        }
        let all = catalog(&mut admin);
        assert_eq!(all.iter().filter(|fact| fact.contains(&role)).collect::<Vec<_>>(), Vec::<&String>::new());
        refuse(&mut db.connect(&role), "42501", "SELECT nextval('writeguard.change_statement_id_seq')");
        refuse(&mut db.connect(&role), "42501", "SELECT nextval('writeguard.event_id_seq')");
        all
    });
    assert_same(&catalogs[1], &catalogs[0]);
    assert_same(&catalogs[2], &catalogs[0]);
}

#[test]
fn upgrade_keeps_what_a_dba_granted_and_a_dump_has_it() {
    let server = Server::shared();
    let db = first_release(server);
    let mut admin = db.admin();
    let (setter, granter, watcher) = (db.role("setter"), db.role("Granter"), db.role("watcher"));
    pass(
        &mut admin,
        &format!(
            "GRANT EXECUTE ON FUNCTION writeguard.set_policy TO {setter};
             GRANT EXECUTE ON FUNCTION writeguard.set_policy TO \"{granter}\" WITH GRANT OPTION;
             GRANT EXECUTE ON FUNCTION writeguard.check_setup, writeguard.queue_counters TO {watcher};
             GRANT SELECT ON writeguard.event, writeguard.event_queue TO {watcher}; {UPDATE}"
        ),
    );
    for role in [&setter, &granter] {
        pass(&mut db.connect(role), "SELECT writeguard.set_policy('p', max_rows => 3, samples => false)");
    }
    pass(&mut db.connect(&granter), &format!("GRANT EXECUTE ON FUNCTION writeguard.set_policy TO {watcher}"));
    pass(
        &mut db.connect(&watcher),
        "TABLE writeguard.event; TABLE writeguard.event_queue; SELECT writeguard.check_setup()",
    );
    refuse(&mut db.connect(&watcher), "42501", "TABLE writeguard.stat");

    let file = server.socket_dir().join(format!("grants-of-{}", db.name));
    run(server.client_program("pg_dump").args(["-Fc", "-d", &db.name, "-f"]).arg(&file));
    let copy = server.plain_database();
    run(server.client_program("pg_restore").args(["--exit-on-error", "-d", &copy.name]).arg(&file));
    let with_grants = catalog(&mut admin);
    assert!(with_grants.iter().any(|fact| fact.contains(&setter)));
    assert_same(&catalog(&mut copy.admin()), &with_grants);
}

// The newer library on the first release's SQL.

#[test]
fn first_release_is_served_as_it_promised() {
    let server = Server::start(&[]);
    let db = guarded(&server);
    let mut admin = db.admin();
    let (login, person) = (db.role("login"), db.role("person"));
    pass(&mut admin, &format!("GRANT EXECUTE ON FUNCTION writeguard.approve TO {person}"));
    let mut client = db.connect(&login);

    pass(&mut client, "BEGIN; UPDATE t SET note = 'x' WHERE id <= 3; ROLLBACK");
    let refusal = refuse(&mut client, "WG001", "UPDATE t SET note = 'x' WHERE id <= 4");
    assert!(refusal.hint.contains("SELECT writeguard.request("), "{refusal:?}");
    refuse(&mut client, "WG005", "TRUNCATE t");
    events(&mut admin, "blocked", 2);
    assert_eq!(number(&mut client, "SELECT count(*) FROM writeguard.my_events WHERE kind = 'blocked'"), 2);

    // A second person.
    let id = number(&mut client, "SELECT writeguard.request('UPDATE t SET note = id::text', 'a test')");
    assert_eq!(number(&mut admin, "SELECT count(*) FROM writeguard.pending"), 1);
    let token = text(&mut db.connect(&person), &format!("SELECT writeguard.approve({id})"));
    pass(&mut client, &format!("BEGIN; SET LOCAL writeguard.override = on; SET LOCAL writeguard.token = '{token}'"));
    pass(&mut client, "UPDATE t SET note = id::text");
    pass(&mut client, "ROLLBACK");
    pass(&mut client, &format!("SELECT writeguard.execute({id})"));
    assert_eq!(number(&mut admin, CHANGED), 10);
    assert_eq!(text(&mut client, "SELECT state FROM writeguard.my_requests"), "spent");
    events(&mut admin, "overridden", 1);

    // Policies are changed, exported and imported.
    let set = |arguments: &str| {
        text(&mut db.admin(), &format!("SELECT writeguard.set_policy('p', '{{public.t}}', {arguments})"))
    };
    assert_eq!(set("max_rows => 3"), "unchanged");
    assert_eq!(set("max_rows => 3, require_where => true"), "changed");
    refuse(&mut client, "WG002", "UPDATE t SET note = NULL");
    let document = text(&mut admin, "SELECT writeguard.export_policies()::text");
    assert!(!document.contains("samples"), "{document}");
    let import = format!("SELECT action FROM writeguard.import_policies('{document}')");
    assert_eq!(text(&mut admin, &import), "unchanged");
    pass(&mut admin, "SELECT writeguard.drop_policy('p')");
    assert_eq!(text(&mut admin, &import), "created");
    assert_eq!(text(&mut admin, &import.replace("\"max_rows\": 3", "\"max_rows\": 2")), "changed");
    refuse(&mut client, "WG001", "UPDATE t SET note = 'x' WHERE id <= 3");
    let shown = format!("SELECT max_rows FROM writeguard.effective('t', '{login}', 'update') WHERE applies");
    assert_eq!(number(&mut client, &shown), 2);

    // By the flag, by nobody, and when it only looks on.
    assert_eq!(set("max_rows => 3, override => 'flag'"), "changed");
    pass(&mut client, "BEGIN; SET LOCAL writeguard.override = on; UPDATE t SET note = NULL WHERE id > 5; COMMIT");
    events(&mut admin, "overridden", 2);
    assert_eq!(set("max_rows => 3, mode => 'observe'"), "changed");
    pass(&mut client, "UPDATE t SET note = 'y'");
    events(&mut admin, "observed", 1);

    // What is over goes.
    pass(&mut admin, "ALTER SYSTEM SET writeguard.event_retention = '1s'");
    pass(&mut admin, "SELECT pg_reload_conf()");
    for table in ["request", "approval", "event"] {
        wait_until(60, || number(&mut admin, &format!("SELECT count(*) FROM writeguard.{table}")) == 0);
    }

    let log = server.log();
    assert!(!log.contains("own statement failed") && !log.contains("42703") && !log.contains("42P01"), "{log}");
}

#[test]
fn what_the_first_release_has_no_place_for_is_refused_with_the_command_that_makes_it() {
    let server = Server::shared();
    let db = guarded(server);
    let mut admin = db.admin();
    for sql in [
        "SELECT writeguard.set_policy('p', '{public.t}', max_rows => 3, undo => '1 day')",
        r#"SELECT writeguard.import_policies('[{"name": "q", "samples": false}]')"#,
        r#"SELECT writeguard.import_policies('[{"name": "q", "undo": "1 day"}]')"#,
    ] {
        let refusal = refuse(&mut admin, "WG007", sql);
        assert_eq!(refusal.hint, "ALTER EXTENSION pg_writeguard UPDATE;", "{refusal:?}");
    }
    assert_eq!(number(&mut admin, "SELECT count(*) FROM writeguard.policy"), 1);

    // A policy that says so all the same is not written past without what it wants kept.
    pass(&mut admin, "UPDATE writeguard.policy SET undo = '1 day', override = 'flag'");
    refuse(&mut admin, "WG001", "UPDATE t SET note = 'x'");
    pass(&mut admin, "SET writeguard.override = on");
    let refusal = refuse(&mut admin, "WG008", "UPDATE t SET note = 'x'");
    assert_eq!(refusal.hint, "ALTER EXTENSION pg_writeguard UPDATE;", "{refusal:?}");
    assert_eq!(number(&mut db.admin(), CHANGED), 0);
    pass(&mut admin, &refusal.hint);
    pass(&mut admin, "SET writeguard.override = on");
    pass(&mut admin, "UPDATE t SET note = 'x'");
    assert_eq!(number(&mut db.admin(), CHANGED), 10);
    pass(&mut admin, "SELECT writeguard.undo(id) FROM writeguard.change");
    assert_eq!(number(&mut db.admin(), CHANGED), 0);
}

#[test]
fn check_setup_of_the_first_release_names_the_command() {
    let mut admin = first_release(Server::shared()).admin();
    let extension = "SELECT problem, fix FROM writeguard.check_setup() WHERE subject = 'extension'";
    let row = admin.query_one(extension, &[]).unwrap();
    let (problem, fix): (String, String) = (row.get(0), row.get(1));
    let version = env!("CARGO_PKG_VERSION");
    assert!(problem.contains(FIRST) && problem.contains(version), "{problem}");
    assert_eq!(fix, format!("ALTER EXTENSION pg_writeguard UPDATE TO '{version}';"));
    pass(&mut admin, &fix);
    assert_eq!(admin.query(extension, &[]).unwrap().len(), 0);
}

#[test]
fn upgrade_keeps_policies_events_and_requests_and_sessions_that_are_open() {
    let server = Server::shared();
    let db = guarded(server);
    let mut admin = db.admin();
    let (login, person) = (db.role("login"), db.role("person"));
    pass(&mut admin, &format!("GRANT EXECUTE ON FUNCTION writeguard.approve TO {person}"));
    let mut client = db.connect(&login);
    let prepared = client.prepare("UPDATE t SET note = 'x' WHERE id <= $1").unwrap();
    let refused = |client: &mut Client| Refusal::of(&client.execute(&prepared, &[&4]).unwrap_err()).sqlstate;
    assert_eq!(refused(&mut client), "WG001");
    events(&mut admin, "blocked", 1);
    let id = number(&mut client, "SELECT writeguard.request('DELETE FROM t', 'a test')");
    let token = text(&mut db.connect(&person), &format!("SELECT writeguard.approve({id})"));
    let stored = |client: &mut Client| {
        text(
            client,
            "SELECT jsonb_build_array(
                 (SELECT jsonb_agg(jsonb_strip_nulls(to_jsonb(p) - '{samples,always,same_rows,require_where,require_transaction}'::text[]))
                  FROM writeguard.policy AS p),
                 (SELECT jsonb_agg(e ORDER BY e.id) FROM writeguard.event AS e),
                 (SELECT jsonb_agg(to_jsonb(r) - '{settings,fingerprints,definitions}'::text[]) FROM writeguard.request AS r),
                 (SELECT jsonb_agg(a) FROM writeguard.approval AS a))::text",
        )
    };
    let before = stored(&mut admin);

    // An upgrade that is taken back, one that a transaction holds, and one that stays.
    pass(&mut admin, &format!("BEGIN; {UPDATE}; ROLLBACK"));
    assert_eq!(refused(&mut client), "WG001");
    pass(&mut admin, &format!("BEGIN; {UPDATE}"));
    assert_eq!(refused(&mut client), "WG001");
    pass(&mut admin, "COMMIT");
    assert_eq!(refused(&mut client), "WG001");
    assert_eq!(client.execute(&prepared, &[&3]).unwrap(), 3);
    events(&mut admin, "blocked", 4);

    pass(
        &mut admin,
        "DELETE FROM writeguard.event WHERE id > (SELECT max(id) FROM writeguard.event WHERE kind = 'approved')",
    );
    assert_eq!(stored(&mut admin), before);
    assert_eq!(text(&mut admin, "SELECT samples::text FROM writeguard.policy"), "true");
    let unchanged = "SELECT writeguard.set_policy('p', tables => '{public.t}', max_rows => 3)";
    assert_eq!(text(&mut admin, unchanged), "unchanged");

    // The token that was given before.
    pass(&mut client, &format!("SET writeguard.override = on; SET writeguard.token = '{token}'"));
    pass(&mut client, "DELETE FROM t");
    assert_eq!(number(&mut admin, "SELECT count(*) FROM t"), 0);
}

/// What the upgrade tells, and what it leaves in the table.
#[test]
fn upgrade_says_what_applies_that_did_not_and_keeps_what_policies_say() {
    let server = Server::shared();
    for version in [FIRST, LAST] {
        let db = release(server, version);
        let mut admin = db.admin();
        let role = db.role("writer");
        pass(
            &mut admin,
            &format!(
                "CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t SELECT n FROM generate_series(1, 20) AS n;
                 CREATE TABLE u (id int PRIMARY KEY); CREATE TABLE w (id int); GRANT ALL ON t, u, w TO PUBLIC;
                 SELECT writeguard.set_policy('cap', max_rows => 10, require_where => true);
                 SELECT writeguard.set_policy('t only', tables => '{{public.t,public.u}}', max_rows_per_transaction => 100);
                 SELECT writeguard.set_policy('same', tables => '{{public.w}}', max_rows => 5, require_where => true);
                 SELECT writeguard.set_policy('watch', tables => '{{public.t}}', roles => '{{{role}}}', mode => 'observe')"
            ),
        );
        let told = std::sync::Arc::new(std::sync::Mutex::new(Vec::new()));
        let told_to = std::sync::Arc::clone(&told);
        let mut config = db.config("postgres");
        config.notice_callback(move |notice| told_to.lock().unwrap().push(notice));
        pass(&mut config.connect(postgres::NoTls).unwrap(), UPDATE);
        let told = told.lock().unwrap();
        let mut warnings: Vec<&str> =
            told.iter().filter(|one| one.severity() == "WARNING").map(|one| one.message()).collect();
        warnings.sort_unstable();
        assert_eq!(
            warnings,
            [
                "policy \"cap\" now applies to table \"public.t\" and 1 more beside policy \"t only\": max_rows",
                "policy \"t only\" now applies to table \"public.t\" beside policy \"watch\": max_rows_per_transaction",
            ],
            "{version}"
        );
        for warning in told.iter().filter(|one| one.severity() == "WARNING") {
            pass(&mut admin, warning.hint().expect("a hint"));
        }
        // That no WHERE was required is still said where one would be now, and nowhere that no transaction was.
        let stored = "SELECT string_agg(concat_ws(' ', name, coalesce(require_where::text, '-'), coalesce(require_transaction::text, '-')),
                                        ', ' ORDER BY name) FROM writeguard.policy";
        assert_eq!(text(&mut admin, stored), "cap true -, same true -, t only false -, watch false -");
        refuse(&mut db.connect(&role), "WG001", "DELETE FROM t");
        let applies = "SELECT string_agg(concat_ws(' ', \"limit\", value, policy), ', ') FROM writeguard.effective('u', NULL, 'update')
            WHERE applies";
        let expected = "max_rows 10 cap, max_rows_per_transaction 100 t only, require_where false t only";
        assert_eq!(text(&mut admin, applies), expected);
        pass(&mut admin, "UPDATE t SET id = id WHERE id <= 10");
        refuse(&mut admin, "WG001", "DELETE FROM t");
    }
}

#[test]
fn upgrade_under_fire_lets_nothing_through_and_loses_no_event() {
    let server = Server::start(&[]);
    let db = guarded(&server);
    let (login, person) = (db.role("login"), db.role("person"));
    pass(
        &mut db.admin(),
        &format!(
            "CREATE TABLE v AS TABLE t; GRANT ALL ON v TO PUBLIC; SELECT writeguard.set_policy('v', '{{public.v}}', max_rows => 3);
             GRANT EXECUTE ON FUNCTION writeguard.approve TO {person}"
        ),
    );
    let (over, refused, rounds) = (AtomicBool::new(false), AtomicI64::new(0), AtomicI64::new(0));
    let write = |client: &mut Client| {
        refuse(client, "WG001", "UPDATE t SET note = 'x' WHERE id <= 4");
        refused.fetch_add(1, Ordering::SeqCst);
        pass(client, "UPDATE t SET note = 'x' WHERE id <= 3");
    };
    let fire = |shot: &dyn Fn()| {
        while !over.load(Ordering::SeqCst) {
            shot();
            rounds.fetch_add(1, Ordering::SeqCst);
        }
    };
    let fired = |number: i64| {
        let until = rounds.load(Ordering::SeqCst) + number;
        wait_until(60, || rounds.load(Ordering::SeqCst) >= until || over.load(Ordering::SeqCst));
    };
    thread::scope(|scope| {
        let threads = [
            scope.spawn(|| {
                let client = std::cell::RefCell::new(db.connect(&login));
                fire(&|| write(&mut client.borrow_mut()));
            }),
            scope.spawn(|| fire(&|| write(&mut db.connect(&login)))),
            scope.spawn(|| {
                fire(&|| {
                    let sql = "SELECT writeguard.set_policy('p', tables => '{public.t}', max_rows => 3, comment => clock_timestamp()::text)";
                    if let Err(error) = db.admin().batch_execute(sql) {
                        // A function that is replaced between its look-up and its call is gone, whatever it is.
                        let refusal = Refusal::of(&error);
                        assert!(refusal.sqlstate == "42883" || refusal.message.contains("cache lookup failed"), "{refusal:?}");
                    }
                });
            }),
            scope.spawn(|| {
                fire(&|| {
                    let id = number(&mut db.connect(&login), "SELECT writeguard.request('DELETE FROM v', 'a test')");
                    text(&mut db.connect(&person), &format!("SELECT writeguard.approve({id})"));
                });
            }),
            // Views take their locks before those of their tables.
            scope.spawn(|| {
                let client = std::cell::RefCell::new(db.admin());
                fire(&|| {
                    for view in ["pending", "my_requests", "my_events", "event_queue"] {
                        pass(&mut client.borrow_mut(), &format!("TABLE writeguard.{view}"));
                    }
                });
            }),
        ];
        let mut admin = db.admin();
        for _ in 0..5 {
            fired(5);
            pass(&mut admin, &format!("BEGIN; {UPDATE}; SELECT pg_sleep(0.05); ROLLBACK"));
        }
        fired(5);
        pass(&mut admin, UPDATE);
        fired(20);
        over.store(true, Ordering::SeqCst);
        threads.into_iter().for_each(|thread| {
            if let Err(panic) = thread.join() {
                std::panic::resume_unwind(panic)
            }
        });
    });
    let mut admin = db.admin();
    events(&mut admin, "blocked", refused.load(Ordering::SeqCst));
    assert_eq!(number(&mut admin, CHANGED), 3);
    assert!(!server.log().contains("deadlock detected"));
    assert_same(&catalog(&mut admin), &{
        let fresh = server.database();
        pass(&mut fresh.admin(), &format!("GRANT EXECUTE ON FUNCTION writeguard.approve TO {person}"));
        catalog(&mut fresh.admin())
    });
}

#[test]
fn upgrade_needs_no_preload() {
    let server = Server::start(&[]);
    let db = guarded(&server);
    let fresh = catalog(&mut server.database().admin());
    pass(&mut db.admin(), "ALTER SYSTEM SET shared_preload_libraries = 'plpgsql'");
    server.restart();
    pass(&mut db.admin(), &format!("UPDATE t SET note = 'x'; {UPDATE}"));
    assert_same(&catalog(&mut db.admin()), &fresh);
    pass(&mut db.admin(), "ALTER SYSTEM RESET shared_preload_libraries");
    server.restart();
    refuse(&mut db.admin(), "WG001", "UPDATE t SET note = 'y'");
}

//! Databases that move: dumps, base backups, standbys, pg_upgrade and logical replication take policies, events, requests
//! and trusted keys along, and the limits hold where they arrive.

use crate::common::session::{pass, text};
use crate::common::{Database, Refusal, Server, expect_refusal, run, server_command, wait_until};
use postgres::Client;

/// A key of nobody's.
const KEY: &str = "-----BEGIN PUBLIC KEY-----
MCowBQYDK2VwAyEA11qYAYKxCrfVS/7TyWQHOg7hcvPapiMlrwIaaPcHURo=
-----END PUBLIC KEY-----";

const REQUESTED: &str = "UPDATE t SET note = 'requested'";

/// All that is to arrive: whole tables of the extension, as JSON.
const STORED: &str = "SELECT jsonb_build_object(
    'policy', (SELECT jsonb_agg(to_jsonb(p) - '{samples,always,columns,same_rows}'::text[] ORDER BY p.name) FROM writeguard.policy AS p),
    'event', (SELECT jsonb_agg(e ORDER BY e.id) FROM writeguard.event AS e
              WHERE e.relation IS DISTINCT FROM 'writeguard.policy'),
    'request', (SELECT jsonb_agg(to_jsonb(r) - '{settings,fingerprints,definitions}'::text[] ORDER BY r.id) FROM writeguard.request AS r),
    'approval', (SELECT jsonb_agg(a ORDER BY a.request) FROM writeguard.approval AS a),
    'trusted_key', (SELECT jsonb_agg(k) FROM writeguard.trusted_key AS k),
    'used_jti', (SELECT jsonb_agg(j) FROM writeguard.used_jti AS j))::text";

const KINDS: &str = "SELECT string_agg(DISTINCT kind, ' ' ORDER BY kind) FROM writeguard.event";
const BLOCKED: &str = "SELECT count(*) FROM writeguard.event WHERE kind = 'blocked'";

/// A database in which something has happened.
struct Lived {
    db: Database,
    login: String,
    person: String,
    /// An approval of [`REQUESTED`] that is good still.
    token: String,
    /// What the tables hold.
    stored: String,
}

/// A table `t` of ten rows, three of which may be changed at once; a write that was refused, one that was overridden, a
/// request that waits, one that was approved, a trusted key and a token that it signed.
fn lived_in(db: Database) -> Lived {
    let mut admin = db.admin();
    let (login, person) = (db.role("login"), db.role("person"));
    pass(
        &mut admin,
        &format!(
            "CREATE TABLE t (id int PRIMARY KEY, note text); INSERT INTO t SELECT n FROM generate_series(1, 10) AS n;
             CREATE TABLE u AS TABLE t; GRANT ALL ON t, u TO PUBLIC;
             SELECT writeguard.set_policy('p', tables => '{{public.t}}', max_rows => 3, comment => 'it''s here');
             SELECT writeguard.set_policy('q', tables => '{{public.u}}', max_rows_per_transaction => 5, override => 'flag');
             SELECT writeguard.trust_key('deploy', '{KEY}');
             INSERT INTO writeguard.used_jti (key, jti, expires_at) VALUES ('deploy', 'job-1', 'infinity');
             GRANT EXECUTE ON FUNCTION writeguard.approve TO {person}"
        ),
    );
    let mut client = db.connect(&login);
    refuse(&mut client, "WG001", "UPDATE t SET note = 'x'");
    wait_until(30, || number(&mut admin, BLOCKED) == 1);
    pass(&mut client, "BEGIN; SET LOCAL writeguard.override = on; UPDATE u SET note = 'x'; COMMIT");
    pass(&mut client, "SELECT writeguard.request('DELETE FROM t', 'it waits')");
    let id = number(&mut client, &format!("SELECT writeguard.request($${REQUESTED}$$, 'it is approved')"));
    let token = text(&mut db.connect(&person), &format!("SELECT writeguard.approve({id})"));
    assert_eq!(text(&mut admin, KINDS), "approved blocked overridden policy_changed requested");
    let stored = text(&mut admin, STORED);
    let nothing = "SELECT count(*) FROM jsonb_each($1::text::jsonb) WHERE value = 'null'";
    assert_eq!(admin.query_one(nothing, &[&stored]).unwrap().get::<_, i64>(0), 0, "{stored}");
    Lived { db, login, person, token, stored }
}

impl Lived {
    /// With a write to `u` that can be undone.
    fn keeping_rows(self) -> Lived {
        let mut admin = self.db.admin();
        pass(&mut admin, "ALTER TABLE u ADD PRIMARY KEY (id)");
        let policy =
            "SELECT writeguard.set_policy('q', '{public.u}', max_rows => 1, override => 'flag', undo => '1 day')";
        pass(&mut admin, policy);
        pass(&mut admin, "BEGIN; SET LOCAL writeguard.override = on; UPDATE u SET note = 'kept'; COMMIT");
        assert_eq!(number(&mut admin, "SELECT count(*) FROM writeguard.image"), 10);
        Lived { stored: text(&mut admin, STORED), ..self }
    }

    /// That write can be undone here.
    #[track_caller]
    fn undoes(&self, db: &Database) {
        let mut admin = db.admin();
        pass(&mut admin, "SELECT writeguard.undo(id) FROM writeguard.change");
        assert_eq!(number(&mut admin, "SELECT count(*) FROM u WHERE note = 'kept'"), 0);
    }

    /// Everything is there, and the limits hold; what happens now is recorded after what was there.
    #[track_caller]
    fn arrived(&self, db: &Database) {
        let mut admin = db.admin();
        assert_eq!(text(&mut admin, STORED), self.stored);
        self.holds(db);
    }

    #[track_caller]
    fn holds(&self, db: &Database) {
        let mut admin = db.admin();
        let mut client = db.connect(&self.login);
        let (before, last) = (number(&mut admin, BLOCKED), number(&mut admin, "SELECT max(id) FROM writeguard.event"));
        pass(&mut client, "BEGIN; UPDATE t SET note = 'x' WHERE id <= 3; ROLLBACK");
        refuse(&mut client, "WG001", "UPDATE t SET note = 'x' WHERE id <= 4");
        wait_until(30, || number(&mut admin, BLOCKED) == before + 1);
        assert!(number(&mut admin, "SELECT max(id) FROM writeguard.event") > last);
        assert_eq!(number(&mut admin, "SELECT count(*) FROM t WHERE note IS NOT NULL"), 0);
        let id = number(&mut client, "SELECT writeguard.request('DELETE FROM t', 'once more')");
        assert_eq!(number(&mut admin, &format!("SELECT count(*) FROM writeguard.request WHERE id >= {id}")), 1);
    }

    /// The policies that a restore wrote are events of the database that it made, numbered after those that it brought.
    #[track_caller]
    fn was_restored(&self, db: &Database) {
        let (mut source, mut admin) = (self.db.admin(), db.admin());
        let last = number(&mut source, "SELECT max(id) FROM writeguard.event");
        let of_policies = "SELECT count(*) FROM writeguard.event
                           WHERE relation = 'writeguard.policy' AND operation = 'insert' AND policy IN ('p', 'q')";
        wait_until(30, || number(&mut admin, of_policies) == 2);
        assert_eq!(number(&mut admin, &format!("{of_policies} AND id > {last}")), 2);
        assert_eq!(number(&mut admin, "SELECT count(*) FROM writeguard.event WHERE id < 1"), 0);
    }

    /// The token is good, as in the same database.
    #[track_caller]
    fn takes_token(&self, db: &Database) {
        let mut client = db.connect(&self.login);
        pass(&mut client, &format!("SET writeguard.override = on; SET writeguard.token = '{}'", self.token));
        pass(&mut client, REQUESTED);
        assert_eq!(number(&mut db.admin(), "SELECT count(*) FROM t WHERE note = 'requested'"), 10);
    }

    /// Neither the token nor the request that waits is good, as in a database that is only a copy.
    #[track_caller]
    fn takes_no_token(&self, db: &Database) {
        let mut client = db.connect(&self.login);
        pass(&mut client, &format!("SET writeguard.override = on; SET writeguard.token = '{}'", self.token));
        refuse(&mut client, "WG006", REQUESTED);
        let waiting = "SELECT writeguard.approve(min(id)) FROM writeguard.request WHERE state = 'pending'";
        let mut person = db.admin();
        pass(&mut person, &format!("GRANT SELECT ON writeguard.request TO {}", self.person));
        let refusal = refuse(&mut db.connect(&self.person), "WG006", waiting);
        assert!(refusal.message.contains("belongs to another database"), "{refusal:?}");
    }
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

/// Dumps a database with these options into a new one.
fn dumped(server: &Server, db: &Database, options: &[&str]) -> Database {
    let file = server.socket_dir().join(format!("dump-of-{}", db.name));
    run(server.client_program("pg_dump").args(options).args(["-Fc", "-d", &db.name, "-f"]).arg(&file));
    let copy = server.plain_database();
    run(server.client_program("pg_restore").args(["--exit-on-error", "-d", &copy.name]).arg(&file));
    copy
}

// Dumps.

#[test]
fn dump_has_all_but_kept_rows() {
    let server = Server::shared();
    let lived = lived_in(server.database()).keeping_rows();

    let copy = dumped(server, &lived.db, &[]);
    lived.was_restored(&copy);
    lived.arrived(&copy);
    let mut client = copy.admin();
    for table in ["change_statement", "change_relation", "image", "outbox"] {
        // What was recorded since is on its way.
        wait_until(30, || number(&mut client, &format!("SELECT count(*) FROM writeguard.{table}")) == 0);
    }
    assert_eq!(number(&mut client, "SELECT count(*) FROM u WHERE note = 'kept'"), 10);
    lived.takes_no_token(&copy);
}

/// Whatever order a restore brings the tables in, and with whatever statements; with several jobs it is any.
#[test]
fn restore_in_another_order_brings_the_events_with_their_numbers() {
    let server = Server::shared();
    let lived = lived_in(server.database());
    for options in [&["-Fc"][..], &["-Fc", "--inserts"], &["-Fc", "--rows-per-insert=2"]] {
        let file = server.socket_dir().join(format!("dump-of-{}", lived.db.name));
        run(server.client_program("pg_dump").args(options).args(["-d", &lived.db.name, "-f"]).arg(&file));
        let listed = server.client_program("pg_restore").arg("-l").arg(&file).output().unwrap();
        let list = String::from_utf8(listed.stdout).unwrap();
        let is_of_policies = |line: &&str| line.contains(" TABLE DATA writeguard policy ");
        let is_of_events = |line: &&str| line.contains(" TABLE DATA writeguard event ");
        assert_eq!((list.lines().filter(is_of_policies).count(), list.lines().filter(is_of_events).count()), (1, 1));
        let copy = server.plain_database();
        let mut admin = copy.admin();
        let only = |name: &str, keep: &dyn Fn(&&str) -> bool| {
            let part = server.socket_dir().join(format!("{name}-of-{}", lived.db.name));
            std::fs::write(&part, list.lines().filter(keep).collect::<Vec<_>>().join("\n")).unwrap();
            run(server
                .client_program("pg_restore")
                .args(["--exit-on-error", "-d", &copy.name, "-L"])
                .arg(&part)
                .arg(&file));
        };
        run(server.client_program("pg_restore").args(["--section=pre-data", "-d", &copy.name]).arg(&file));
        only("policies", &is_of_policies);
        wait_until(30, || number(&mut admin, "SELECT count(*) FROM writeguard.event") == 2);
        only("others", &|line| (line.contains(" DATA ") || line.contains("SEQUENCE SET")) && !is_of_policies(line));
        run(server.client_program("pg_restore").args(["--section=post-data", "-d", &copy.name]).arg(&file));
        lived.was_restored(&copy);
        lived.arrived(&copy);
    }
}

#[test]
fn restore_in_one_transaction_arrives() {
    let server = Server::shared();
    let lived = lived_in(server.database());
    for options in [["--single-transaction"], ["--disable-triggers"]] {
        let file = server.socket_dir().join(format!("jobs-of-{}", lived.db.name));
        run(server.client_program("pg_dump").args(["-Fc", "-d", &lived.db.name, "-f"]).arg(&file));
        let copy = server.plain_database();
        run(server.client_program("pg_restore").args(["--exit-on-error", "-d", &copy.name]).args(options).arg(&file));
        lived.was_restored(&copy);
        lived.arrived(&copy);
    }
}

/// What a write records in its own transaction finds its number too, right after a restore that set the numbers last.
#[test]
fn first_event_after_a_restore_is_one_that_belongs_to_a_write() {
    let server = Server::shared();
    let lived = lived_in(server.database());
    for sql in [
        "BEGIN; SET LOCAL writeguard.override = on; UPDATE u SET note = 'x'; COMMIT",
        "SELECT writeguard.set_policy('r', tables => '{public.u}', max_rows => 1)",
        "SELECT writeguard.import_policies('[{\"name\": \"r\"}, {\"name\": \"s\"}]')",
    ] {
        let copy = dumped(server, &lived.db, &[]);
        lived.was_restored(&copy);
        let mut admin = copy.admin();
        let (count, max) = ("SELECT count(*) FROM writeguard.event", "SELECT max(id) FROM writeguard.event");
        pass(&mut admin, "SELECT setval('writeguard.event_id_seq', 1, false)");
        let (before, last) = (number(&mut admin, count), number(&mut admin, max));
        pass(&mut admin, sql);
        assert!(number(&mut admin, count) > before && number(&mut admin, max) > last, "{sql}");
    }
}

/// pg_dump leaves the rows of extensions' tables out of such a dump, as all others.
#[test]
fn dump_of_the_schema_alone_has_the_extension_and_its_grants_and_policies_come_as_a_document() {
    let server = Server::shared();
    let lived = lived_in(server.database());
    let document = text(&mut lived.db.admin(), "SELECT writeguard.export_policies()::text");
    let copy = dumped(server, &lived.db, &["--schema-only"]);
    let mut client = copy.admin();
    assert!(!text(&mut client, STORED).contains('['));
    let note = "SELECT count(*) FROM writeguard.check_setup() WHERE problem LIKE 'there is no policy%'";
    assert_eq!(number(&mut client, note), 1);
    pass(&mut client, "INSERT INTO t SELECT n FROM generate_series(1, 10) AS n");
    client.query("SELECT writeguard.import_policies($1::text::jsonb)", &[&document]).unwrap();
    assert_eq!(text(&mut client, "SELECT writeguard.export_policies()::text"), document);
    let granted = format!(
        "SELECT has_function_privilege('{}', 'writeguard.approve(bigint,text,interval,bigint)', 'EXECUTE')::text",
        lived.person
    );
    assert_eq!(text(&mut client, &granted), "true");
    lived.holds(&copy);
}

#[test]
fn dump_of_the_first_release_arrives_in_this_one() {
    let server = Server::shared();
    let db = server.plain_database();
    pass(&mut db.admin(), "CREATE EXTENSION pg_writeguard VERSION '0.1.0'");
    let lived = lived_in(db);
    let copy = dumped(server, &lived.db, &[]);
    let version = "SELECT extversion FROM pg_extension WHERE extname = 'pg_writeguard'";
    assert_eq!(text(&mut copy.admin(), version), env!("CARGO_PKG_VERSION"));
    assert_eq!(text(&mut lived.db.admin(), version), "0.1.0");
    assert_eq!(number(&mut copy.admin(), "SELECT count(*) FROM writeguard.policy WHERE samples"), 2);
    lived.arrived(&copy);
}

#[test]
fn dump_of_the_whole_server_arrives_in_another() {
    let server = Server::start(&[]);
    let lived = lived_in(server.database());
    let file = server.socket_dir().join("dump-of-all");
    run(server.client_program("pg_dumpall").arg("-f").arg(&file));
    let other = Server::start_another_cluster();
    let copied = other.socket_dir().join("dump-of-all");
    run(server_command("cp").arg(&file).arg(&copied));
    // The superuser is there already, which is the only line that may fail.
    let (said, _) = other.psql_with("postgres", "postgres", &["-f", copied.to_str().unwrap()]);
    let failed: Vec<&str> = said.lines().filter(|line| line.contains("ERROR")).collect();
    assert!(
        failed.len() <= 1 && failed.iter().all(|line| line.contains("role \"postgres\" already exists")),
        "{failed:?}"
    );
    let copy = other.existing(&lived.db.name);
    lived.was_restored(&copy);
    lived.arrived(&copy);
    lived.takes_no_token(&copy);
}

// Copies of a server.

#[test]
fn base_backup_arrives_as_the_same_database() {
    let server = Server::start(&[]);
    let lived = lived_in(server.database()).keeping_rows();
    let restored = server.restored(&["-X", "stream"]);
    server.stop("immediate");
    let db = restored.existing(&lived.db.name);
    lived.arrived(&db);
    lived.undoes(&db);
    lived.takes_token(&db);
    refuse(&mut db.connect(&lived.login), "WG001", "DELETE FROM t");
}

#[test]
fn standby_has_everything_and_goes_on_with_it_once_it_is_promoted() {
    let server = Server::start(&[]);
    let lived = lived_in(server.database());
    let standby = server.restored(&["-X", "stream", "-R"]);
    let db = standby.existing(&lived.db.name);
    // What happens on the primary now comes through replication.
    refuse(&mut lived.db.connect(&lived.login), "WG001", "DELETE FROM t");
    pass(
        &mut lived.db.admin(),
        "SELECT writeguard.set_policy('later', tables => '{public.u}', max_rows => 0, override => 'never')",
    );
    let mut admin = db.admin();
    wait_until(30, || number(&mut admin, "SELECT count(*) FROM writeguard.policy") == 3);
    wait_until(30, || number(&mut admin, BLOCKED) == 2);
    refuse(&mut db.connect(&lived.login), "25006", "UPDATE u SET note = 'x'");
    let stored = text(&mut lived.db.admin(), STORED);
    wait_until(30, || text(&mut admin, STORED) == stored);

    server.stop("immediate");
    assert_eq!(text(&mut admin, "SELECT pg_promote()::text"), "true");
    let lived = Lived { stored, ..lived };
    lived.arrived(&db);
    refuse(&mut db.connect(&lived.login), "WG001", "UPDATE u SET note = 'x'");
    lived.takes_token(&db);
}

#[test]
fn upgraded_server_has_everything_and_the_version_that_it_had() {
    let older = Server::start_older();
    let first = older.plain_database();
    pass(&mut first.admin(), "CREATE EXTENSION pg_writeguard VERSION '0.1.0'");
    let (first, current) = (lived_in(first), lived_in(older.database()).keeping_rows());
    let newer = older.upgraded();
    let server_version = "SELECT current_setting('server_version_num')::int8 / 10000";
    let version = "SELECT extversion FROM pg_extension WHERE extname = 'pg_writeguard'";
    let mut said = newer.postgres();
    if std::env::var_os("PGWG_OLDER_BIN").is_some() {
        assert!(number(&mut said, server_version) > 15);
    }
    for (lived, has) in [(&first, "0.1.0"), (&current, env!("CARGO_PKG_VERSION"))] {
        let db = newer.existing(&lived.db.name);
        assert_eq!(text(&mut db.admin(), version), has);
        lived.arrived(&db);
        lived.takes_no_token(&db);
    }
    current.undoes(&newer.existing(&current.db.name));
    let db = newer.existing(&first.db.name);
    pass(&mut db.admin(), "ALTER EXTENSION pg_writeguard UPDATE");
    first.holds(&db);
    pass(&mut db.admin(), "TABLE writeguard.change");
}

// Logical replication.

#[test]
fn publisher_is_limited_and_what_a_subscriber_applies_is_not() {
    let publisher = Server::start(&["wal_level = logical"]);
    let source = lived_in(publisher.database());
    let subscriber = Server::start(&[]);
    let copy = subscriber.database();
    let mut target = copy.admin();
    pass(
        &mut target,
        "CREATE TABLE t (id int PRIMARY KEY, note text);
         SELECT writeguard.set_policy('p', tables => '{public.t}', max_rows => 1, require_where => true, override => 'never')",
    );
    let mut admin = source.db.admin();
    pass(&mut admin, "CREATE PUBLICATION moves FOR TABLE t");
    let address = publisher.address(&source.db.name);
    pass(&mut target, &format!("CREATE SUBSCRIPTION moves CONNECTION '{address}' PUBLICATION moves"));
    wait_until(60, || number(&mut target, "SELECT count(*) FROM t") == 10);

    let mut client = source.db.connect(&source.login);
    refuse(&mut client, "WG001", "UPDATE t SET note = 'refused'");
    source.takes_token(&source.db);
    let requested = "SELECT count(*) FROM t WHERE note = 'requested'";
    wait_until(60, || number(&mut target, requested) == 10);
    pass(&mut admin, "SET writeguard.enabled = off; DELETE FROM t WHERE id > 5; RESET writeguard.enabled");
    wait_until(60, || number(&mut target, requested) == 5);
    refuse(&mut target, "WG001", "UPDATE t SET note = 'here' WHERE id <= 2");
    refuse(&mut target, "WG002", "DELETE FROM t");
    pass(&mut admin, "SET writeguard.enabled = off; TRUNCATE t; RESET writeguard.enabled");
    wait_until(60, || number(&mut target, "SELECT count(*) FROM t") == 0);
    let of_the_apply = "SELECT count(*) FROM writeguard.event WHERE kind NOT IN ('policy_changed', 'blocked')";
    assert_eq!(number(&mut target, of_the_apply), 0);
    wait_until(30, || number(&mut target, BLOCKED) == 2);
    pass(&mut target, "DROP SUBSCRIPTION moves");
}

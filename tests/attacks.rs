//! What an ordinary role cannot do, though it owns the tables and the database: switch the guard off, change what
//! belongs to the extension, put its own objects in the place of ours, be somebody else, or approve its own requests.

use std::fs;
use std::sync::OnceLock;

use crate::common::session::{arm, pass, text};
use crate::common::{Database, Refusal, Server, expect_refusal, wait_until};
use postgres::{Client, NoTls};

/// One row more than the policy allows, and just as many as it allows.
const SIX: &str = "UPDATE t SET v = 1 WHERE id <= 6";
const FIVE: &str = "UPDATE t SET v = 0 WHERE id <= 5";

/// Refused writes wait rather long for their event, so that on a busy machine, too, an event that can be stored is
/// stored in time.
const PATIENT: &str = "writeguard.event_timeout = '20s'";

fn server() -> &'static Server {
    static SERVER: OnceLock<Server> = OnceLock::new();
    SERVER.get_or_init(|| Server::start(&[PATIENT]))
}

/// A database of the attacker's, with the attacker's tables `t` and `u` of 1,000 rows each; the policy `p` allows five
/// rows of `t`, and nothing covers `u`.
struct Stage {
    db: Database,
    admin: Client,
    attacker: String,
}

impl Stage {
    fn new() -> Stage {
        Stage::on(server())
    }

    fn on(server: &Server) -> Stage {
        let db = server.database();
        let attacker = db.role("attacker");
        let mut admin = db.admin();
        pass(
            &mut admin,
            &format!(
                "ALTER DATABASE {} OWNER TO {attacker};
                 GRANT CREATE ON SCHEMA public TO PUBLIC;
                 SET ROLE {attacker};
                 CREATE TABLE t (id int PRIMARY KEY, v int NOT NULL DEFAULT 0);
                 INSERT INTO t SELECT i, 0 FROM generate_series(1, 1000) AS i;
                 CREATE TABLE u (LIKE t INCLUDING ALL);
                 INSERT INTO u TABLE t;
                 RESET ROLE;
                 SELECT writeguard.set_policy('p', tables => '{{public.t}}', max_rows => 5)",
                db.name
            ),
        );
        Stage { db, admin, attacker }
    }

    fn client(&self) -> Client {
        self.db.connect(&self.attacker)
    }

    /// SQL with `$attacker` and `$database` in it.
    fn fill(&self, sql: &str) -> String {
        sql.replace("$attacker", &self.attacker).replace("$database", &self.db.name)
    }

    #[track_caller]
    fn number(&mut self, sql: &str) -> i64 {
        number(&mut self.admin, sql)
    }

    #[track_caller]
    fn text(&mut self, sql: &str) -> String {
        text(&mut self.admin, sql)
    }

    #[track_caller]
    fn events(&mut self, kind: &str) -> i64 {
        self.number(&format!("SELECT count(*) FROM writeguard.event WHERE kind = '{kind}'"))
    }

    /// No row of `t` has another value than at the start.
    #[track_caller]
    fn assert_unchanged(&mut self) {
        assert_eq!(self.number("SELECT count(*) FROM t WHERE v = 0"), 1000);
    }

    /// In this session six rows are refused, on record when the error arrives, and five pass.
    #[track_caller]
    fn assert_guards(&mut self, client: &mut Client) {
        let mine = format!(
            "SELECT count(*) FROM writeguard.event WHERE kind = 'blocked' AND login = '{}' AND rows = 6
               AND row_limit = 5 AND relation = 'public.t'",
            self.attacker
        );
        let before = self.number(&mine);
        refuse(client, SIX);
        self.assert_unchanged();
        assert_eq!(self.number(&mine), before + 1, "refused, but not on record");
        pass(client, FIVE);
    }

    #[track_caller]
    fn assert_guarded(&mut self) {
        let mut client = self.client();
        self.assert_guards(&mut client);
    }

    /// Everything that the extension consists of, with owners, rights and contents.
    #[track_caller]
    fn ours(&mut self) -> String {
        self.text(
            "SELECT string_agg(x, E'\n' ORDER BY x) FROM (
               SELECT 'schema ' || n::text FROM pg_namespace AS n WHERE nspname = 'writeguard'
               UNION ALL SELECT 'extension ' || e::text FROM pg_extension AS e WHERE extname = 'pg_writeguard'
               UNION ALL SELECT 'class ' || c::text FROM pg_class AS c
                 WHERE relnamespace = 'writeguard'::regnamespace
               UNION ALL SELECT 'column ' || a::text FROM pg_attribute AS a
                 WHERE attrelid IN (SELECT oid FROM pg_class WHERE relnamespace = 'writeguard'::regnamespace)
               UNION ALL SELECT 'function ' || p::text FROM pg_proc AS p
                 WHERE pronamespace = 'writeguard'::regnamespace
               UNION ALL SELECT 'type ' || t::text FROM pg_type AS t WHERE typnamespace = 'writeguard'::regnamespace
               UNION ALL SELECT 'operator ' || o::text FROM pg_operator AS o
                 WHERE oprnamespace = 'writeguard'::regnamespace
               UNION ALL SELECT 'trigger ' || t::text FROM pg_trigger AS t
                 WHERE tgrelid IN (SELECT oid FROM pg_class WHERE relnamespace = 'writeguard'::regnamespace)
               UNION ALL SELECT 'rule ' || r::text FROM pg_rewrite AS r
                 WHERE ev_class IN (SELECT oid FROM pg_class WHERE relnamespace = 'writeguard'::regnamespace)
               UNION ALL SELECT 'row policy ' || p::text FROM pg_policy AS p
                 WHERE polrelid IN (SELECT oid FROM pg_class WHERE relnamespace = 'writeguard'::regnamespace)
               UNION ALL SELECT 'inherits ' || i::text FROM pg_inherits AS i
                 WHERE inhparent IN (SELECT oid FROM pg_class WHERE relnamespace = 'writeguard'::regnamespace)
               UNION ALL SELECT 'member ' || d::text FROM pg_depend AS d
                 WHERE deptype = 'e' AND refobjid = (SELECT oid FROM pg_extension WHERE extname = 'pg_writeguard')
               UNION ALL SELECT 'comment ' || d::text FROM pg_description AS d
                 WHERE objoid IN (SELECT oid FROM pg_extension WHERE extname = 'pg_writeguard')
               UNION ALL SELECT 'policy ' || p::text FROM writeguard.policy AS p
               UNION ALL SELECT 'request ' || r::text FROM writeguard.request AS r
               UNION ALL SELECT 'event ' || e::text FROM writeguard.event AS e
             ) AS x (x)",
        )
    }

    /// As the attacker, none of these gets anywhere: each fails with one of these SQLSTATEs, changes nothing of ours,
    /// and leaves the guard as it was.
    #[track_caller]
    fn assert_futile(&mut self, sqlstates: &[&str], attacks: &[&str]) {
        self.assert_guarded();
        let before = self.ours();
        let mut client = self.client();
        for attack in attacks {
            let attack = self.fill(attack);
            let refusal = match client.batch_execute(&attack) {
                Ok(()) => panic!("it passed: {attack}"),
                Err(error) => Refusal::of(&error),
            };
            assert!(sqlstates.contains(&refusal.sqlstate.as_str()), "{attack}: {refusal:?}");
            pass(&mut client, "ROLLBACK");
        }
        self.assert_same(&before);
        self.assert_guards(&mut client);
        self.assert_guarded();
    }

    /// What the extension consists of is what it was.
    #[track_caller]
    fn assert_same(&mut self, before: &str) {
        let after = self.ours();
        let missing: Vec<&str> = before.lines().filter(|line| !after.lines().any(|other| other == *line)).collect();
        let more: Vec<&str> = after.lines().filter(|line| !before.lines().any(|other| other == *line)).collect();
        assert!(missing.is_empty() && more.is_empty(), "gone: {missing:#?}\nnew: {more:#?}");
    }

    /// A role with the right to approve.
    fn approver(&mut self) -> String {
        let approver = self.db.role("approver");
        pass(
            &mut self.admin,
            &format!("GRANT EXECUTE ON FUNCTION writeguard.approve, writeguard.reject TO {approver}"),
        );
        approver
    }

    /// Waits until no worker is connected, so that the next one finds the database's settings of then.
    fn wait_for_the_worker_to_leave(&mut self) {
        let busy = self.fill(
            "SELECT count(*) FROM pg_stat_activity
             WHERE backend_type LIKE 'pg_writeguard%' AND datname = '$database'",
        );
        wait_until(20, || self.number(&busy) == 0);
    }
}

/// The statement fails with this SQLSTATE; an open transaction block stays as it is.
#[track_caller]
fn fail(client: &mut Client, sql: &str, sqlstate: &str) -> Refusal {
    let refusal = match client.batch_execute(sql) {
        Ok(()) => panic!("expected {sqlstate}, but it passed: {sql}"),
        Err(error) => Refusal::of(&error),
    };
    assert_eq!(refusal.sqlstate, sqlstate, "{sql}: {refusal:?}");
    refusal
}

#[track_caller]
fn refuse(client: &mut Client, sql: &str) -> Refusal {
    fail(client, sql, "WG001")
}

#[track_caller]
fn number(client: &mut Client, sql: &str) -> i64 {
    match client.query_one(&format!("SELECT ({sql})::pg_catalog.int8"), &[]) {
        Ok(row) => row.get(0),
        Err(error) => panic!("{sql}: {error:?}"),
    }
}

/// A connection with these options fails; gives the SQLSTATE.
#[track_caller]
fn rejected(stage: &Stage, options: &str) -> String {
    match stage.db.config(&stage.attacker).options(options).connect(NoTls) {
        Ok(_) => panic!("connected with {options}"),
        Err(error) => Refusal::of(&error).sqlstate,
    }
}

#[track_caller]
fn request(client: &mut Client, statement: &str) -> i64 {
    client
        .query_one("SELECT writeguard.request($1::pg_catalog.text, reason => 'ticket 7')", &[&statement])
        .unwrap_or_else(|error| panic!("no request: {:?}", Refusal::of(&error)))
        .get(0)
}

fn approve(client: &mut Client, request: i64) -> Result<String, postgres::Error> {
    client.query_one("SELECT writeguard.approve($1)", &[&request]).map(|row| row.get(0))
}

fn major(client: &mut Client) -> i64 {
    number(client, "current_setting('server_version_num')::int / 10000")
}

// Settings.

#[test]
fn enabled_is_out_of_reach_of_set() {
    Stage::new().assert_futile(
        &["42501"],
        &[
            "SET writeguard.enabled = off",
            "SET SESSION writeguard.enabled TO false",
            "BEGIN; SET LOCAL writeguard.enabled = off",
            "SELECT set_config('writeguard.enabled', 'off', false)",
            "SELECT set_config('WriteGuard.Enabled', 'off', true)",
            "UPDATE pg_settings SET setting = 'off' WHERE name = 'writeguard.enabled'",
            "DO $$ BEGIN PERFORM set_config('writeguard.enabled', 'off', true); UPDATE t SET v = 1; END $$",
            "RESET writeguard.enabled",
            "ALTER SYSTEM SET writeguard.enabled = off",
            "GRANT SET ON PARAMETER writeguard.enabled TO $attacker",
        ],
    );
}

#[test]
fn enabled_is_out_of_reach_of_the_settings_of_roles_and_databases() {
    Stage::new().assert_futile(
        &["42501"],
        &[
            "ALTER ROLE $attacker SET writeguard.enabled = off",
            "ALTER ROLE $attacker IN DATABASE $database SET writeguard.enabled = off",
            "ALTER ROLE ALL IN DATABASE $database SET writeguard.enabled = off",
            "ALTER DATABASE $database SET writeguard.enabled = off",
            "ALTER DATABASE $database SET writeguard.enabled FROM CURRENT",
        ],
    );
}

#[test]
fn enabled_is_out_of_reach_of_the_set_clause_of_a_function() {
    Stage::new().assert_futile(
        &["42501"],
        &[
            "CREATE FUNCTION f() RETURNS void LANGUAGE sql SET writeguard.enabled = off AS 'UPDATE t SET v = 1'",
            "CREATE FUNCTION f() RETURNS void LANGUAGE sql SET writeguard.enabled FROM CURRENT AS 'UPDATE t SET v = 1'",
            "CREATE PROCEDURE f() LANGUAGE sql SET writeguard.enabled = off AS 'UPDATE t SET v = 1'",
            "CREATE FUNCTION f() RETURNS void LANGUAGE sql AS 'UPDATE t SET v = 1';
             ALTER FUNCTION f() SET writeguard.enabled = off",
        ],
    );
}

#[test]
fn enabled_is_out_of_reach_of_the_options_of_a_connection() {
    let mut stage = Stage::new();
    for options in [
        "-c writeguard.enabled=off",
        "--writeguard.enabled=off",
        "-c writeguard.enabled=off -c writeguard.enabled=on",
        "-c session_replication_role=replica",
        "-c session_authorization=postgres",
        "-c role=postgres",
        "-c session_preload_libraries=pg_writeguard",
    ] {
        rejected(&stage, options);
    }
    assert_eq!(rejected(&stage, "-c writeguard.enabled=off"), "42501");
    stage.assert_guarded();
}

#[test]
fn the_settings_of_the_server_are_out_of_reach() {
    Stage::new().assert_futile(
        &["42501", "55P02"],
        &[
            "SET writeguard.event_timeout = 0",
            "SET writeguard.approval_lifetime = '7d'",
            "SET writeguard.event_queue_size = '64kB'",
            "ALTER DATABASE $database SET writeguard.event_timeout = 0",
            "ALTER ROLE $attacker SET writeguard.approval_lifetime = '7d'",
            "SELECT pg_reload_conf()",
        ],
    );
}

#[test]
fn names_that_look_like_settings_of_ours_are_none() {
    Stage::new().assert_futile(
        &["42602", "42501", "42704"],
        &[
            "SET writeguard.disable = on",
            "SET writeguard.enable = off",
            "SELECT set_config('writeguard.enabled.x', 'off', false)",
            "SET writeguard.\"enabled \" = off",
            "ALTER ROLE $attacker SET writeguard.disable = on",
            "ALTER DATABASE $database SET writeguard.disable = on",
            "CREATE FUNCTION f() RETURNS void LANGUAGE sql SET writeguard.disable = on AS 'UPDATE t SET v = 1'",
        ],
    );
}

#[test]
fn settings_of_another_prefix_say_nothing() {
    let mut stage = Stage::new();
    let mut client = stage.client();
    pass(
        &mut client,
        "SET pg_writeguard.enabled = off; SET write_guard.enabled = off; SET writeguards.override = on;
         SET pg_writeguard.override = on",
    );
    stage.assert_guards(&mut client);
}

#[test]
fn resetting_and_discarding_everything_leaves_the_guard_on() {
    let mut stage = Stage::new();
    let mut client = stage.client();
    for sql in ["RESET ALL", "DISCARD ALL", "DISCARD PLANS", "DISCARD SEQUENCES", "SET SESSION AUTHORIZATION DEFAULT"] {
        pass(&mut client, sql);
        stage.assert_guards(&mut client);
    }
    refuse(&mut client, &format!("BEGIN; UPDATE t SET v = 0 WHERE id <= 3; RESET ALL; {SIX}"));
    pass(&mut client, "ROLLBACK");
    refuse(
        &mut client,
        "DO $$ BEGIN
           UPDATE t SET v = 1 WHERE id <= 3;
           RESET ALL;
           UPDATE t SET v = 1 WHERE id IN (4, 5, 6);
         END $$",
    );
    stage.assert_unchanged();
}

/// While the library is not loaded, `writeguard.enabled` is a name like any other.
#[test]
fn placeholders_from_before_the_library_was_loaded_switch_nothing_off() {
    let server = Server::start(&["shared_preload_libraries = ''"]);
    let db = server.plain_database();
    let attacker = db.role("attacker");
    pass(&mut db.admin(), &format!("ALTER DATABASE {} OWNER TO {attacker}", db.name));
    let mut client = db.connect(&attacker);
    pass(&mut client, "SET writeguard.enabled = off; SET writeguard.override = on");
    for sql in [
        "ALTER ROLE $attacker SET writeguard.enabled = off",
        "ALTER DATABASE $database SET writeguard.enabled = off",
        "CREATE FUNCTION off() RETURNS void LANGUAGE sql SET writeguard.enabled = off AS 'SELECT'",
        "ALTER DATABASE $database SET writeguard.override = on",
    ] {
        fail(&mut client, &sql.replace("$attacker", &attacker).replace("$database", &db.name), "42501");
    }
    drop(client);
    let conf = server.data_dir().join("postgresql.conf");
    let lines = fs::read_to_string(&conf).unwrap();
    fs::write(&conf, format!("{lines}\nshared_preload_libraries = 'pg_writeguard'\n{PATIENT}\n")).unwrap();
    server.restart();

    let mut admin = db.admin();
    pass(
        &mut admin,
        &format!(
            "CREATE EXTENSION pg_writeguard;
             SET ROLE {attacker};
             CREATE TABLE t AS SELECT i AS id, 0 AS v FROM generate_series(1, 1000) AS i;
             RESET ROLE;
             SELECT writeguard.set_policy('p', tables => '{{public.t}}', max_rows => 5)"
        ),
    );
    let mut stage = Stage { db, admin, attacker };
    stage.assert_guarded();
}

#[test]
fn settings_that_change_how_statements_run_are_out_of_reach_or_change_no_limit() {
    let mut stage = Stage::new();
    let mut client = stage.client();
    for setting in [
        "session_replication_role = replica",
        "allow_system_table_mods = on",
        "track_activities = off",
        "compute_query_id = off",
        "log_statement = 'none'",
        "log_min_messages = panic",
        "log_min_error_statement = panic",
        "session_preload_libraries = 'x'",
        "shared_preload_libraries = ''",
        "zero_damaged_pages = on",
        "ignore_system_indexes = on",
        "dynamic_library_path = '/tmp'",
        "max_stack_depth = '100kB'",
    ] {
        let refusal = expect_refusal(client.batch_execute(&format!("SET {setting}")));
        assert!(["42501", "55P02"].contains(&refusal.sqlstate.as_str()), "{setting}: {refusal:?}");
    }
    if cfg!(since_pg19) {
        let refusal = expect_refusal(client.batch_execute("SET standard_conforming_strings = off"));
        assert_eq!(refusal.sqlstate, "0A000", "{refusal:?}");
    }
    let parallel = if major(&mut client) < 16 { "force_parallel_mode" } else { "debug_parallel_query" };
    let settings = [
        "row_security = off",
        "search_path = ''",
        #[cfg(not(since_pg19))]
        "standard_conforming_strings = off; SET escape_string_warning = off",
        "backslash_quote = on",
        "array_nulls = off",
        "transform_null_equals = on",
        "quote_all_identifiers = on",
        "client_encoding = 'LATIN1'",
        "plan_cache_mode = force_generic_plan",
        "plan_cache_mode = force_custom_plan",
        "jit = on; SET jit_above_cost = 0",
        &format!("{parallel} = on"),
        &format!("{parallel} = regress"),
        "max_parallel_workers_per_gather = 0",
        "parallel_setup_cost = 0; SET parallel_tuple_cost = 0; SET min_parallel_table_scan_size = 0",
        "enable_seqscan = off; SET enable_indexscan = off; SET enable_bitmapscan = off",
        "datestyle = 'German, DMY'; SET intervalstyle = sql_standard",
        "timezone = 'FOO-100'",
        "extra_float_digits = -15; SET bytea_output = escape",
        "xmlbinary = hex; SET xmloption = document",
        "statement_timeout = '60s'; SET lock_timeout = '60s'",
        "idle_in_transaction_session_timeout = '60s'",
        "default_transaction_isolation = serializable; SET default_transaction_deferrable = on",
        "default_transaction_isolation = 'repeatable read'",
        "debug_print_plan = on; SET debug_print_rewritten = on; SET debug_print_parse = on",
        "client_min_messages = error",
        "default_tablespace = pg_default; SET temp_tablespaces = ''",
        "work_mem = '64kB'; SET cursor_tuple_fraction = 0.0001",
        "constraint_exclusion = on; SET check_function_bodies = off",
        "synchronous_commit = off",
        "application_name = 'pg_writeguard worker'",
    ];
    for setting in settings {
        pass(&mut client, &format!("SET {setting}"));
        refuse(&mut client, "UPDATE public.t SET v = 1 WHERE id <= 6");
        let refusal = expect_refusal(client.execute("UPDATE public.t SET v = 1 WHERE id <= $1", &[&6]));
        assert_eq!(refusal.sqlstate, "WG001", "{setting}: {refusal:?}");
        pass(&mut client, "UPDATE public.t SET v = 0 WHERE id <= 5");
    }
    stage.assert_unchanged();
    assert_eq!(stage.events("blocked"), 2 * i64::try_from(settings.len()).unwrap());
    // With all of them at once, approvals work as well.
    let approver = stage.approver();
    let id = request(&mut client, "UPDATE public.t SET v = 1 WHERE id <= 6");
    let mut approving = stage.db.connect(&approver);
    for setting in settings {
        pass(&mut approving, &format!("SET {setting}"));
    }
    let token = approve(&mut approving, id).unwrap();
    arm(&mut client, &token);
    pass(&mut client, "UPDATE public.t SET v = 1 WHERE id <= 6");
    assert_eq!((stage.number("SELECT sum(v) FROM t"), stage.events("overridden")), (6, 1));
}

#[test]
fn a_timeout_while_the_event_is_awaited_lets_nothing_through_and_loses_no_event() {
    let server = Server::start(&["writeguard.event_timeout = '600s'"]);
    let mut stage = Stage::on(&server);
    let mut client = stage.client();
    pass(&mut stage.admin, "BEGIN; LOCK TABLE writeguard.event IN ACCESS EXCLUSIVE MODE");
    pass(&mut client, "SET statement_timeout = '2s'");
    fail(&mut client, SIX, "57014");
    pass(&mut stage.admin, "COMMIT");
    stage.assert_unchanged();
    wait_until(20, || stage.events("blocked") == 1);
}

/// The owner of a database may set what he likes for it; the worker that stores events connects to it, too.
#[test]
fn no_setting_of_the_database_keeps_an_event_from_being_stored() {
    let mut stage = Stage::new();
    let mut owner = stage.client();
    let mut settings = vec![
        "search_path = 'evil, public'",
        "default_transaction_read_only = on",
        "default_transaction_isolation = serializable",
        "default_transaction_deferrable = on",
        "statement_timeout = '1ms'",
        "lock_timeout = '1ms'",
        "idle_in_transaction_session_timeout = '1ms'",
        "idle_session_timeout = '1ms'",
        "row_security = off",
        #[cfg(not(since_pg19))]
        "standard_conforming_strings = off",
        "array_nulls = off",
        "transform_null_equals = on",
        "client_encoding = 'SQL_ASCII'",
        "datestyle = 'German, DMY'",
        "intervalstyle = 'sql_standard'",
        "timezone = 'FOO-100'",
        "xmloption = document",
        "bytea_output = escape",
        "jit_above_cost = 0",
        "plan_cache_mode = force_generic_plan",
        "enable_seqscan = off",
        "temp_tablespaces = ''",
        "default_tablespace = 'pg_default'",
        "local_preload_libraries = 'not_there'",
        "client_min_messages = error",
        "check_function_bodies = off",
        "synchronous_commit = off",
        "work_mem = '64kB'",
        "temp_buffers = 100",
    ];
    let version = major(&mut owner);
    settings.push(if version < 16 { "force_parallel_mode = regress" } else { "debug_parallel_query = regress" });
    if version >= 17 {
        settings.push("transaction_timeout = '1ms'");
    }
    let mut client = stage.client();
    stage.assert_guards(&mut client);
    if cfg!(since_pg19) {
        let sql = stage.fill("ALTER DATABASE $database SET standard_conforming_strings = off");
        let refusal = expect_refusal(owner.batch_execute(&sql));
        assert_eq!(refusal.sqlstate, "0A000", "{refusal:?}");
    }
    for setting in settings {
        let sql = stage.fill(&format!("ALTER DATABASE $database SET {setting}"));
        pass(&mut owner, &sql);
    }
    stage.wait_for_the_worker_to_leave();
    // These two were connected before.
    stage.assert_guards(&mut client);
    stage.wait_for_the_worker_to_leave();
    stage.assert_guards(&mut owner);
}

#[test]
fn a_database_that_takes_no_connections_stores_events() {
    let mut stage = Stage::new();
    let mut client = stage.client();
    stage.wait_for_the_worker_to_leave();
    let sql = stage.fill(
        "ALTER DATABASE $database CONNECTION LIMIT 0;
         REVOKE ALL ON DATABASE $database FROM PUBLIC;
         REVOKE ALL ON DATABASE $database FROM $attacker",
    );
    pass(&mut client, &sql);
    stage.assert_guards(&mut client);
    stage.wait_for_the_worker_to_leave();
    // PostgreSQL does not let a session say so of its own database.
    let sql = stage.fill("ALTER DATABASE $database ALLOW_CONNECTIONS false");
    pass(&mut server().postgres(), &sql);
    stage.assert_guards(&mut client);
}

#[test]
fn the_library_can_neither_be_loaded_again_nor_be_called_by_other_names() {
    let mut stage = Stage::new();
    stage.assert_futile(
        &["42501", "58P01"],
        &[
            "LOAD 'pg_writeguard'",
            "LOAD '$libdir/pg_writeguard'",
            "LOAD '$libdir/plugins/pg_writeguard'",
            "CREATE FUNCTION f(text) RETURNS void LANGUAGE c AS 'pg_writeguard', 'writeguard_drop_policy'",
            "CREATE FUNCTION f(text) RETURNS text LANGUAGE c AS '$libdir/pg_writeguard', 'writeguard_set_policy'",
            "CREATE FUNCTION f(internal) RETURNS internal LANGUAGE internal AS 'int4in'",
            "SET session_preload_libraries = 'pg_writeguard'",
            "ALTER ROLE $attacker SET session_preload_libraries = 'not_there'",
        ],
    );
    rejected(&stage, "-c local_preload_libraries=pg_writeguard");
    stage.assert_guarded();
}

#[test]
fn a_grantee_of_the_switch_uses_it_on_record() {
    let mut stage = Stage::new();
    let mut client = stage.client();
    let role = stage.attacker.clone();
    pass(&mut stage.admin, &format!("GRANT SET ON PARAMETER writeguard.enabled TO {role}"));
    pass(&mut client, &format!("SET writeguard.enabled = off; {SIX}"));
    let disabled = format!("SELECT count(*) FROM writeguard.event WHERE kind = 'disabled' AND login = '{role}'");
    wait_until(20, || stage.number(&disabled) == 1);
    pass(&mut client, "UPDATE t SET v = 0; SET writeguard.enabled = on");
    stage.assert_guards(&mut client);
    pass(&mut stage.admin, &format!("REVOKE SET ON PARAMETER writeguard.enabled FROM {role}"));
    fail(&mut client, "SET writeguard.enabled = off", "42501");
    stage.assert_guarded();
}

// What belongs to the extension.

#[test]
fn the_tables_take_no_writes_and_give_no_rows() {
    let mut attacks = Vec::new();
    for table in ["policy", "event", "request", "outbox"] {
        for attack in [
            "TABLE writeguard.$",
            "SELECT count(*) FROM writeguard.$",
            "SELECT ctid FROM writeguard.$ FOR UPDATE",
            "INSERT INTO writeguard.$ DEFAULT VALUES",
            "INSERT INTO writeguard.$ DEFAULT VALUES ON CONFLICT DO NOTHING",
            "UPDATE writeguard.$ SET ctid = ctid",
            "DELETE FROM writeguard.$",
            "DELETE FROM writeguard.$ WHERE false",
            "TRUNCATE writeguard.$",
            "COPY writeguard.$ TO STDOUT",
            "COPY writeguard.$ FROM STDIN",
            "COPY (TABLE writeguard.$) TO STDOUT",
            "BEGIN; LOCK TABLE writeguard.$",
            "BEGIN; LOCK TABLE writeguard.$ IN ROW EXCLUSIVE MODE",
            "CREATE TABLE mine AS TABLE writeguard.$",
            "CREATE MATERIALIZED VIEW mine AS TABLE writeguard.$",
            "CREATE VIEW mine AS TABLE writeguard.$; TABLE mine",
            "CREATE FUNCTION f() RETURNS bigint LANGUAGE sql AS 'SELECT count(*) FROM writeguard.$'; SELECT f()",
        ] {
            attacks.push(attack.replace('$', table));
        }
    }
    attacks.extend(
        [
            "UPDATE writeguard.policy SET max_rows = NULL",
            "MERGE INTO writeguard.policy AS p USING (VALUES (1)) AS s ON true WHEN MATCHED THEN DELETE",
            "WITH gone AS (DELETE FROM writeguard.policy RETURNING name) SELECT * FROM gone",
            "UPDATE writeguard.request SET state = 'approved', token_sha256 = encode(sha256('x'), 'hex')",
            "SELECT nextval('writeguard.event_id_seq')",
            "SELECT setval('writeguard.event_id_seq', 9223372036854775807)",
            "ALTER SEQUENCE writeguard.event_id_seq RESTART 9223372036854775807",
            "TABLE writeguard.pending",
            "TABLE writeguard.event_queue",
            "DELETE FROM writeguard.my_events",
            "UPDATE writeguard.my_requests SET state = 'approved'",
            "INSERT INTO writeguard.my_requests (state) VALUES ('approved')",
            "BEGIN; LOCK TABLE writeguard.my_events IN SHARE MODE",
            "BEGIN; LOCK TABLE writeguard.my_events IN ACCESS EXCLUSIVE MODE",
            "SELECT id FROM writeguard.my_requests FOR UPDATE",
        ]
        .map(str::to_owned),
    );
    let attacks: Vec<&str> = attacks.iter().map(String::as_str).collect();
    // A system column is nothing to update, whoever asks, and a view with a CASE in it nothing to insert into.
    Stage::new().assert_futile(&["42501", "0A000", "55000"], &attacks);
}

#[test]
fn the_tables_take_no_change_of_their_definition() {
    let mut attacks = Vec::new();
    for table in ["policy", "event", "request", "outbox"] {
        for attack in [
            "ALTER TABLE writeguard.$ OWNER TO $attacker",
            "ALTER TABLE writeguard.$ DISABLE TRIGGER ALL",
            "ALTER TABLE writeguard.$ RENAME TO other",
            "ALTER TABLE writeguard.$ SET SCHEMA public",
            "ALTER TABLE writeguard.$ ADD COLUMN more int",
            "ALTER TABLE writeguard.$ SET UNLOGGED",
            "ALTER TABLE writeguard.$ SET (fillfactor = 10)",
            "ALTER TABLE writeguard.$ ENABLE ROW LEVEL SECURITY",
            "ALTER TABLE writeguard.$ FORCE ROW LEVEL SECURITY",
            "ALTER TABLE writeguard.$ ADD CHECK (false) NOT VALID",
            "ALTER TABLE writeguard.$ INHERIT public.t",
            "ALTER TABLE public.t INHERIT writeguard.$",
            "CREATE TABLE mine () INHERITS (writeguard.$)",
            "CREATE TABLE mine (LIKE writeguard.$)",
            "CREATE POLICY mine ON writeguard.$ USING (false)",
            "CREATE RULE mine AS ON INSERT TO writeguard.$ DO INSTEAD NOTHING",
            "CREATE RULE mine AS ON UPDATE TO writeguard.$ DO ALSO DELETE FROM public.t",
            "CREATE INDEX mine ON writeguard.$ ((1 / 0))",
            "CREATE STATISTICS mine ON ctid, tableoid FROM writeguard.$",
            "CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';
             CREATE TRIGGER mine BEFORE INSERT OR DELETE ON writeguard.$ FOR EACH ROW EXECUTE FUNCTION f()",
            "CREATE PUBLICATION mine FOR TABLE writeguard.$",
            "COMMENT ON TABLE writeguard.$ IS 'mine'",
            "REINDEX TABLE writeguard.$",
            "DROP TABLE writeguard.$",
            "DROP TABLE writeguard.$ CASCADE",
            "GRANT ALL ON writeguard.$ TO $attacker",
            "REVOKE ALL ON writeguard.$ FROM postgres",
        ] {
            attacks.push(attack.replace("writeguard.$", &format!("writeguard.{table}")));
        }
    }
    attacks.extend(
        [
            "CREATE TABLE mine (r bigint REFERENCES writeguard.request)",
            "CREATE TABLE mine (p text REFERENCES writeguard.policy ON DELETE RESTRICT)",
            "ALTER TABLE writeguard.policy DISABLE TRIGGER policy_changed",
            "DROP TRIGGER policy_changed ON writeguard.policy",
            "ALTER TRIGGER policy_changed ON writeguard.policy RENAME TO x",
            "DROP INDEX writeguard.event_login",
            "ALTER INDEX writeguard.event_login RENAME TO x",
            "CREATE OR REPLACE VIEW writeguard.my_events AS SELECT 1",
            "DROP VIEW writeguard.my_events",
            "CREATE CONSTRAINT TRIGGER mine AFTER INSERT ON public.t FOR EACH ROW
             EXECUTE FUNCTION writeguard._policy_changed()",
            "CREATE TRIGGER mine AFTER INSERT ON public.t EXECUTE FUNCTION writeguard._policy_changed()",
        ]
        .map(str::to_owned),
    );
    let attacks: Vec<&str> = attacks.iter().map(String::as_str).collect();
    // System columns make no statistics.
    Stage::new().assert_futile(&["42501", "0A000"], &attacks);
}

#[test]
fn the_functions_are_neither_replaced_nor_given_away() {
    Stage::new().assert_futile(
        &["42501"],
        &[
            "CREATE OR REPLACE FUNCTION writeguard.login() RETURNS text LANGUAGE sql AS 'SELECT ''postgres'''",
            "CREATE OR REPLACE FUNCTION writeguard._policy_changed() RETURNS trigger LANGUAGE plpgsql
             AS 'BEGIN RETURN NULL; END'",
            "ALTER FUNCTION writeguard.login() OWNER TO $attacker",
            "ALTER FUNCTION writeguard.drop_policy(text) SECURITY DEFINER",
            "ALTER FUNCTION writeguard.request(text, text, text[]) SET writeguard.override = on",
            "ALTER FUNCTION writeguard.login() RENAME TO x",
            "ALTER FUNCTION writeguard.login() SET SCHEMA public",
            "DROP FUNCTION writeguard._policy_changed() CASCADE",
            "GRANT EXECUTE ON FUNCTION writeguard.approve TO $attacker",
            "GRANT EXECUTE ON FUNCTION writeguard.set_policy, writeguard.drop_policy TO PUBLIC",
            "SELECT writeguard.set_policy('p', max_rows => 1000)",
            "SELECT writeguard.drop_policy('p')",
            "SELECT writeguard.approve(1)",
            "SELECT writeguard.reject(1)",
            "SELECT writeguard._queue_counters()",
            "SELECT writeguard._policy_changed()",
            "CREATE VIEW mine AS SELECT writeguard.set_policy('p', max_rows => 1000); TABLE mine",
            "CREATE FUNCTION f() RETURNS void LANGUAGE sql SECURITY DEFINER AS 'SELECT writeguard.drop_policy(''p'')';
             SELECT f()",
            "CREATE OPERATOR ! (FUNCTION = writeguard.drop_policy, RIGHTARG = text)",
        ],
    );
}

#[test]
fn the_schema_takes_nothing_in_and_does_not_move() {
    Stage::new().assert_futile(
        &["42501"],
        &[
            "CREATE TABLE writeguard.mine (id int)",
            "CREATE VIEW writeguard.mine AS SELECT 1",
            "CREATE SEQUENCE writeguard.mine",
            "CREATE FUNCTION writeguard.mine() RETURNS int LANGUAGE sql AS 'SELECT 1'",
            "CREATE FUNCTION writeguard.cardinality(text[]) RETURNS int LANGUAGE sql AS 'SELECT 1'",
            "CREATE DOMAIN writeguard.text AS pg_catalog.text",
            "CREATE TYPE writeguard.mine AS (a int)",
            "CREATE OPERATOR writeguard.= (FUNCTION = texteq, LEFTARG = text, RIGHTARG = text)",
            "CREATE COLLATION writeguard.mine FROM \"C\"",
            "ALTER TABLE t SET SCHEMA writeguard",
            "CREATE FUNCTION f() RETURNS int LANGUAGE sql AS 'SELECT 1'; ALTER FUNCTION f() SET SCHEMA writeguard",
            "CREATE TYPE mine AS (a int); ALTER TYPE mine SET SCHEMA writeguard",
            "ALTER SCHEMA writeguard RENAME TO other",
            "ALTER SCHEMA writeguard OWNER TO $attacker",
            "DROP SCHEMA writeguard",
            "DROP SCHEMA writeguard CASCADE",
            "GRANT SELECT ON writeguard.pending TO $attacker",
            "ALTER DEFAULT PRIVILEGES FOR ROLE postgres GRANT ALL ON TABLES TO $attacker",
            "COMMENT ON SCHEMA writeguard IS 'mine'",
        ],
    );
}

#[test]
fn the_extension_stays_as_it_is() {
    Stage::new().assert_futile(
        &["42501"],
        &[
            "DROP EXTENSION pg_writeguard",
            "DROP EXTENSION pg_writeguard CASCADE",
            "ALTER EXTENSION pg_writeguard UPDATE",
            "ALTER EXTENSION pg_writeguard SET SCHEMA public",
            "ALTER EXTENSION pg_writeguard ADD TABLE public.t",
            "ALTER EXTENSION pg_writeguard DROP TABLE writeguard.policy",
            "ALTER EXTENSION pg_writeguard DROP FUNCTION writeguard._policy_changed()",
            "COMMENT ON EXTENSION pg_writeguard IS 'mine'",
            "DROP OWNED BY postgres",
            "DROP OWNED BY postgres CASCADE",
            "REASSIGN OWNED BY postgres TO $attacker",
            "CREATE EVENT TRIGGER mine ON ddl_command_start EXECUTE FUNCTION writeguard._policy_changed()",
            "UPDATE pg_extension SET extname = 'x' WHERE extname = 'pg_writeguard'",
            "DELETE FROM pg_trigger WHERE tgname = 'policy_changed'",
            "UPDATE pg_class SET relname = 'x' WHERE relname = 'policy'",
        ],
    );
}

#[test]
fn what_is_granted_to_everybody_cannot_be_passed_on() {
    let mut stage = Stage::new();
    let before = stage.ours();
    let mut client = stage.client();
    // PostgreSQL only warns about these.
    for sql in [
        "GRANT ALL ON FUNCTION writeguard.request(text, text, text[]) TO $attacker WITH GRANT OPTION",
        "GRANT ALL ON SCHEMA writeguard TO $attacker",
        "GRANT CREATE ON SCHEMA writeguard TO $attacker",
        "REVOKE ALL ON SCHEMA writeguard FROM postgres",
        "GRANT ALL ON writeguard.my_events TO $attacker",
        "REVOKE ALL ON SCHEMA writeguard FROM PUBLIC CASCADE",
        "REVOKE ALL ON FUNCTION writeguard.login() FROM PUBLIC CASCADE",
        "DROP OWNED BY $attacker RESTRICT",
    ] {
        let sql = stage.fill(sql);
        if sql.starts_with("DROP OWNED") {
            pass(&mut client, &format!("BEGIN; {sql}; ROLLBACK"));
        } else {
            pass(&mut client, &sql);
        }
    }
    stage.assert_same(&before);
    stage.assert_guarded();
}

/// The owner of a database may vacuum all tables in it, which gives rows another place.
#[test]
fn policies_that_are_rewritten_by_vacuum_full_still_know_the_rows_of_open_transactions() {
    let mut stage = Stage::new();
    for rows in [7, 6, 5] {
        let limit = format!("max_rows_per_transaction => {rows}");
        pass(&mut stage.admin, &format!("SELECT writeguard.set_policy('p', tables => '{{public.t}}', {limit})"));
    }
    let mut client = stage.client();
    pass(&mut client, &format!("BEGIN; {FIVE}; SAVEPOINT a"));
    refuse(&mut client, "UPDATE t SET v = 1 WHERE id = 6");
    pass(&mut client, "ROLLBACK TO a");
    pass(&mut stage.client(), "VACUUM FULL writeguard.policy");
    refuse(&mut client, "UPDATE t SET v = 1 WHERE id = 6");
    pass(&mut client, "ROLLBACK");
    stage.assert_unchanged();
}

#[test]
fn an_ordinary_owner_of_a_database_cannot_create_the_extension() {
    let stage = Stage::new();
    let db = server().plain_database();
    pass(&mut stage.db.admin(), &format!("ALTER DATABASE {} OWNER TO {}", db.name, stage.attacker));
    let mut client = db.connect(&stage.attacker);
    fail(&mut client, "CREATE EXTENSION pg_writeguard", "42501");
    pass(&mut client, "CREATE SCHEMA mine");
    fail(&mut client, "CREATE EXTENSION pg_writeguard SCHEMA mine", "0A000");
    assert_eq!(number(&mut db.admin(), "SELECT count(*) FROM pg_extension WHERE extname = 'pg_writeguard'"), 0);
}

#[test]
fn a_trusted_extension_in_our_schema_takes_nothing_over() {
    let mut stage = Stage::new();
    let available = "SELECT count(*) FROM pg_available_extensions WHERE name IN ('citext', 'intarray')";
    if stage.number(available) < 2 {
        return;
    }
    let mut client = stage.client();
    // Both have operators and functions of the names that ours use.
    for extension in ["citext", "intarray"] {
        let _ = client.batch_execute(&format!("CREATE EXTENSION {extension} SCHEMA writeguard"));
    }
    stage.assert_guarded();
    pass(&mut stage.admin, "SELECT writeguard.set_policy('q', tables => '{public.u}', max_rows => 7)");
    refuse(&mut client, "UPDATE u SET v = 1 WHERE id <= 8");
    pass(&mut client, "UPDATE u SET v = 1 WHERE id <= 7");
    let id = request(&mut client, SIX);
    let approver = stage.approver();
    assert!(approve(&mut stage.db.connect(&approver), id).is_ok());
    let _ = client.batch_execute("DROP EXTENSION IF EXISTS citext, intarray CASCADE");
    stage.assert_guarded();
}

/// A database whose owner made the schema before a superuser creates the extension in it.
fn schema_beforehand(contents: &str) -> (Database, String, Result<(), postgres::Error>) {
    let db = server().plain_database();
    let attacker = db.role("attacker");
    let mut admin = db.admin();
    pass(&mut admin, &format!("ALTER DATABASE {} OWNER TO {attacker}", db.name));
    pass(
        &mut db.connect(&attacker),
        &format!(
            "CREATE SCHEMA writeguard; {contents};
             CREATE TABLE t AS SELECT i AS id, 0 AS v FROM generate_series(1, 1000) AS i"
        ),
    );
    let created = admin.batch_execute("CREATE EXTENSION pg_writeguard");
    (db, attacker, created)
}

#[test]
fn a_schema_that_somebody_else_made_beforehand_is_not_the_extensions() {
    let (db, attacker, created) = schema_beforehand("SELECT 1");
    if created.is_err() {
        return;
    }
    let mut admin = db.admin();
    pass(&mut admin, "SELECT writeguard.set_policy('p', tables => '{public.t}', max_rows => 5)");
    let mut client = db.connect(&attacker);
    refuse(&mut client, SIX);
    for sql in ["ALTER SCHEMA writeguard RENAME TO other", "DROP SCHEMA writeguard CASCADE"] {
        let _ = client.batch_execute(&format!("BEGIN; {sql}"));
        let written = client.batch_execute(SIX);
        let _ = client.batch_execute("COMMIT");
        assert!(written.is_err(), "passed after {sql}");
        assert_eq!(number(&mut admin, "SELECT sum(v) FROM t"), 0, "passed after {sql}");
    }
}

#[test]
fn functions_made_in_the_schema_beforehand_are_not_run_by_the_superuser() {
    let (db, attacker, created) = schema_beforehand(
        "CREATE TABLE public.seen (who text);
         GRANT INSERT ON public.seen TO PUBLIC;
         CREATE FUNCTION writeguard.cardinality(text[]) RETURNS int LANGUAGE sql
         AS 'INSERT INTO public.seen VALUES (current_user); SELECT 1';
         CREATE FUNCTION writeguard.within(text[], text[]) RETURNS boolean LANGUAGE sql
         AS 'INSERT INTO public.seen VALUES (current_user); SELECT true';
         CREATE OPERATOR writeguard.<@ (FUNCTION = writeguard.within, LEFTARG = text[], RIGHTARG = text[])",
    );
    if created.is_err() {
        return;
    }
    let mut admin = db.admin();
    pass(&mut admin, "SELECT writeguard.set_policy('p', tables => '{public.t}', max_rows => 5)");
    let ran = "SELECT coalesce(string_agg(DISTINCT who, ', '), 'nobody') FROM public.seen";
    assert_eq!(text(&mut admin, ran), "nobody", "ran what {attacker} wrote");
}

#[test]
fn writing_all_data_is_not_writing_policies() {
    let mut stage = Stage::new();
    let role = stage.attacker.clone();
    pass(&mut stage.admin, &format!("GRANT pg_write_all_data, pg_read_all_data TO {role}"));
    let before = stage.text("SELECT string_agg(p::text, ' ') FROM writeguard.policy AS p");
    let mut client = stage.client();
    for sql in [
        "UPDATE writeguard.policy SET max_rows = 1000",
        "INSERT INTO writeguard.policy (name, tables, roles) VALUES ('mine', '{public.t}', ARRAY[current_user::text])",
        "DELETE FROM writeguard.policy",
    ] {
        let _ = client.batch_execute(sql);
        let after = stage.text("SELECT coalesce(string_agg(p::text, ' '), '') FROM writeguard.policy AS p");
        assert_eq!(after, before, "{sql}");
    }
    stage.assert_guarded();
}

#[test]
fn writing_all_data_is_not_forging_approvals() {
    let mut stage = Stage::new();
    let role = stage.attacker.clone();
    pass(&mut stage.admin, &format!("GRANT pg_write_all_data, pg_read_all_data TO {role}"));
    let mut client = stage.client();
    let id = request(&mut client, SIX);
    let _ = client.batch_execute(&format!(
        "UPDATE writeguard.request SET state = 'approved', expires_at = now() + interval '1 hour',
           token_sha256 = encode(sha256('mine'), 'hex') WHERE id = {id}"
    ));
    arm(&mut client, "mine");
    let written = client.batch_execute(SIX);
    stage.assert_unchanged();
    assert!(written.is_err());
}

#[test]
fn writing_all_data_is_not_erasing_events() {
    let mut stage = Stage::new();
    let role = stage.attacker.clone();
    pass(&mut stage.admin, &format!("GRANT pg_write_all_data TO {role}"));
    stage.assert_guarded();
    let _ = stage.client().batch_execute("DELETE FROM writeguard.event");
    assert_eq!(stage.events("blocked"), 1);
    stage.assert_guarded();
}

#[test]
fn writing_all_data_is_not_using_up_the_numbers_of_events() {
    let mut stage = Stage::new();
    let role = stage.attacker.clone();
    pass(&mut stage.admin, &format!("GRANT pg_write_all_data TO {role}"));
    let _ = stage.client().batch_execute("SELECT setval('writeguard.event_id_seq', 9223372036854775807)");
    stage.assert_guarded();
}

/// Everything that the superuser makes from now on is for a role of his; the extension's tables are not.
#[test]
fn default_privileges_open_nothing_of_ours() {
    let db = server().plain_database();
    let attacker = db.role("attacker");
    let mut admin = db.admin();
    pass(
        &mut admin,
        &format!(
            "ALTER DEFAULT PRIVILEGES GRANT ALL ON TABLES TO {attacker};
             ALTER DEFAULT PRIVILEGES GRANT ALL ON SEQUENCES TO {attacker};
             ALTER DEFAULT PRIVILEGES GRANT ALL ON FUNCTIONS TO {attacker};
             CREATE EXTENSION pg_writeguard;
             CREATE TABLE t AS SELECT i AS id, 0 AS v FROM generate_series(1, 1000) AS i;
             SELECT writeguard.set_policy('p', tables => '{{public.t}}', max_rows => 5)"
        ),
    );
    let mut client = db.connect(&attacker);
    for sql in [
        "UPDATE writeguard.policy SET max_rows = NULL",
        "DELETE FROM writeguard.policy",
        "TRUNCATE writeguard.event",
        "SELECT setval('writeguard.event_id_seq', 9223372036854775807)",
        "SELECT writeguard.set_policy('p', max_rows => 1000)",
        "SELECT writeguard.drop_policy('p')",
        "SELECT writeguard.approve(1)",
    ] {
        let refusal = expect_refusal(client.batch_execute(sql));
        assert_eq!(refusal.sqlstate, "42501", "{sql}: {refusal:?}");
    }
    refuse(&mut client, SIX);
    assert_eq!(number(&mut admin, "SELECT sum(v) FROM t"), 0);
}

#[test]
fn the_background_processes_are_not_the_attackers_to_end() {
    let mut stage = Stage::new();
    let role = stage.attacker.clone();
    let launcher = stage.number("SELECT pid FROM pg_stat_activity WHERE backend_type = 'pg_writeguard launcher'");
    for grant in ["SELECT 1", "GRANT pg_signal_backend TO $attacker"] {
        let grant = grant.replace("$attacker", &role);
        pass(&mut stage.admin, &grant);
        let mut client = stage.client();
        for function in ["pg_terminate_backend", "pg_cancel_backend"] {
            fail(&mut client, &format!("SELECT {function}({launcher})"), "42501");
        }
        refuse(&mut client, SIX);
    }
    stage.assert_guarded();
}

// What somebody else did and asked for.

/// Somebody else's refused write and request, with words in them that nobody else is to read.
fn with_secrets(stage: &mut Stage) {
    let other = stage.db.role("other");
    pass(&mut stage.admin, &format!("GRANT ALL ON t TO {other}"));
    let mut client = stage.db.connect(&other);
    for n in 1..=3 {
        refuse(&mut client, &format!("UPDATE t SET v = 1 /* salary {n} */"));
    }
    request(&mut client, "UPDATE t SET v = 1 /* salary request */");
}

/// What the attacker's own function is shown of a view's column when it stands in the condition of a query.
fn shown(stage: &mut Stage, view: &str, column: &str) -> Vec<String> {
    let mut client = stage.client();
    pass(
        &mut client,
        "CREATE TEMP TABLE seen (what text);
         CREATE FUNCTION peek(what text) RETURNS boolean LANGUAGE plpgsql COST 0.0000001
         AS 'BEGIN INSERT INTO seen VALUES (what); RETURN true; END'",
    );
    for settings in ["", "SET enable_indexscan = off; SET enable_bitmapscan = off; "] {
        pass(&mut client, &format!("{settings}SELECT count(*) FROM writeguard.{view} WHERE peek({column})"));
    }
    let rows = client.query("SELECT DISTINCT what FROM seen WHERE what LIKE '%salary%'", &[]).unwrap();
    rows.iter().map(|row| row.get(0)).collect()
}

#[test]
fn my_events_shows_nobody_elses_to_a_function_in_the_condition() {
    let mut stage = Stage::new();
    with_secrets(&mut stage);
    assert_eq!(shown(&mut stage, "my_events", "statement"), Vec::<String>::new());
}

#[test]
fn my_requests_shows_nobody_elses_to_a_function_in_the_condition() {
    let mut stage = Stage::new();
    with_secrets(&mut stage);
    assert_eq!(shown(&mut stage, "my_requests", "statement"), Vec::<String>::new());
}

#[test]
fn statistics_show_nothing_of_our_tables() {
    let mut stage = Stage::new();
    with_secrets(&mut stage);
    pass(&mut stage.admin, "ANALYZE writeguard.event, writeguard.request, writeguard.policy");
    let seen = "SELECT count(*) FROM pg_stats WHERE schemaname = 'writeguard'";
    assert!(stage.number(seen) > 0);
    assert_eq!(number(&mut stage.client(), seen), 0);
    fail(&mut stage.client(), "TABLE pg_statistic", "42501");
}

#[test]
fn functions_that_run_queries_show_nothing_of_our_tables() {
    let mut stage = Stage::new();
    with_secrets(&mut stage);
    let mut client = stage.client();
    fail(&mut client, "SELECT ts_stat('SELECT to_tsvector(statement) FROM writeguard.event')::text", "42501");
    if !Server::shared().is_built_with("libxml") {
        // Such a server shows no table as XML to anybody.
        fail(&mut client, "SELECT table_to_xml('pg_class', true, false, '')::text", "0A000");
        return;
    }
    for sql in [
        "SELECT query_to_xml('TABLE writeguard.event', true, false, '')::text",
        "SELECT table_to_xml('writeguard.request', true, false, '')::text",
        "SELECT query_to_xml('SELECT * FROM writeguard.pending', true, false, '')::text",
    ] {
        fail(&mut client, sql, "42501");
    }
    let whole = text(&mut client, "SELECT schema_to_xml('writeguard', true, false, '')::text");
    assert!(!whole.contains("salary"), "{whole}");
}

// Names.

/// Objects with the names that our SQL uses, each of which tells when it is used: first in the search_path, and in
/// pg_temp.
const TRAPS: &str = "
    CREATE TABLE public.caught (what text, who text DEFAULT current_user);
    GRANT ALL ON public.caught TO PUBLIC;
    CREATE SCHEMA evil;
    GRANT ALL ON SCHEMA evil TO PUBLIC;
    CREATE FUNCTION evil.trap(what text) RETURNS boolean LANGUAGE plpgsql
    AS 'BEGIN INSERT INTO public.caught (what) VALUES (what); RETURN true; END';
    CREATE FUNCTION evil.clock_timestamp() RETURNS timestamptz LANGUAGE sql
    AS $$ SELECT evil.trap('clock_timestamp'); SELECT pg_catalog.clock_timestamp() $$;
    CREATE FUNCTION evil.now() RETURNS timestamptz LANGUAGE sql
    AS $$ SELECT evil.trap('now'); SELECT pg_catalog.now() $$;
    CREATE FUNCTION evil.make_interval(secs int) RETURNS interval LANGUAGE sql
    AS $$ SELECT evil.trap('make_interval'); SELECT '7 days'::interval $$;
    CREATE FUNCTION evil.to_jsonb(record) RETURNS jsonb LANGUAGE plpgsql
    AS $$ BEGIN PERFORM evil.trap('to_jsonb'); RETURN '{}'; END $$;
    CREATE FUNCTION evil.jsonb_populate_record(anyelement, jsonb) RETURNS anyelement LANGUAGE plpgsql
    AS $$ BEGIN PERFORM evil.trap('jsonb_populate_record'); RETURN $1; END $$;
    CREATE FUNCTION evil.octet_length(text) RETURNS int LANGUAGE sql
    AS $$ SELECT evil.trap('octet_length'); SELECT 0 $$;
    CREATE FUNCTION evil.json_to_recordset(json) RETURNS SETOF record LANGUAGE plpgsql
    AS $$ BEGIN PERFORM evil.trap('json_to_recordset'); END $$;
    CREATE FUNCTION evil.cardinality(text[]) RETURNS int LANGUAGE sql
    AS $$ SELECT evil.trap('cardinality'); SELECT 0 $$;
    CREATE FUNCTION evil.btrim(text) RETURNS text LANGUAGE sql AS $$ SELECT evil.trap('btrim'); SELECT '' $$;
    CREATE FUNCTION evil.equal(text, text) RETURNS boolean LANGUAGE sql AS $$ SELECT evil.trap('=(text)') $$;
    CREATE FUNCTION evil.equal(bigint, bigint) RETURNS boolean LANGUAGE sql AS $$ SELECT evil.trap('=(bigint)') $$;
    CREATE FUNCTION evil.equal(bigint, int) RETURNS boolean LANGUAGE sql AS $$ SELECT evil.trap('=(bigint, int)') $$;
    CREATE FUNCTION evil.later(timestamptz, timestamptz) RETURNS boolean LANGUAGE sql
    AS $$ SELECT evil.trap('<='); SELECT false $$;
    CREATE FUNCTION evil.within(text[], text[]) RETURNS boolean LANGUAGE sql AS $$ SELECT evil.trap('<@') $$;
    CREATE FUNCTION evil.plus(timestamptz, interval) RETURNS timestamptz LANGUAGE sql
    AS $$ SELECT evil.trap('+'); SELECT 'infinity'::timestamptz $$;
    CREATE OPERATOR evil.= (FUNCTION = evil.equal, LEFTARG = text, RIGHTARG = text);
    CREATE OPERATOR evil.<> (FUNCTION = evil.equal, LEFTARG = text, RIGHTARG = text);
    CREATE OPERATOR evil.= (FUNCTION = evil.equal, LEFTARG = bigint, RIGHTARG = bigint);
    CREATE OPERATOR evil.>= (FUNCTION = evil.equal, LEFTARG = bigint, RIGHTARG = int);
    CREATE OPERATOR evil.<= (FUNCTION = evil.later, LEFTARG = timestamptz, RIGHTARG = timestamptz);
    CREATE OPERATOR evil.<@ (FUNCTION = evil.within, LEFTARG = text[], RIGHTARG = text[]);
    CREATE OPERATOR evil.+ (FUNCTION = evil.plus, LEFTARG = timestamptz, RIGHTARG = interval);
    CREATE DOMAIN evil.text AS pg_catalog.text CHECK (length(VALUE) < 3);
    CREATE DOMAIN evil.jsonb AS pg_catalog.jsonb CHECK (VALUE IS NULL);
    CREATE DOMAIN evil.int8 AS pg_catalog.int8 CHECK (VALUE < 0);
    CREATE DOMAIN evil.json AS pg_catalog.json CHECK (VALUE IS NULL);
    CREATE TABLE evil.event (id bigint);
    CREATE TABLE evil.policy (name text, max_rows bigint);
    CREATE TABLE evil.request (id bigint, state text, token_sha256 text);
    CREATE FUNCTION evil.login() RETURNS pg_catalog.text LANGUAGE sql AS $$ SELECT 'postgres'::pg_catalog.text $$;";

/// The same names where each session has its own.
const OWN_TRAPS: &str = "
    CREATE TEMP TABLE event (id bigint);
    CREATE TEMP TABLE policy (name pg_catalog.text, tables pg_catalog.text[], max_rows bigint);
    CREATE TEMP TABLE request (id bigint, state pg_catalog.text, token_sha256 pg_catalog.text);
    CREATE TEMP TABLE outbox (event bigint);
    CREATE TEMP TABLE pg_class (oid oid, relname name);
    CREATE TEMP TABLE pg_namespace (oid oid, nspname name);
    CREATE DOMAIN pg_temp.text AS pg_catalog.text CHECK (pg_catalog.length(VALUE) < 3);
    CREATE DOMAIN pg_temp.jsonb AS pg_catalog.jsonb CHECK (VALUE IS NULL);
    CREATE DOMAIN pg_temp.int8 AS pg_catalog.int8 CHECK (VALUE < 0);
    CREATE DOMAIN pg_temp.bool AS pg_catalog.bool CHECK (VALUE IS NULL);
    SET search_path = pg_temp, evil, pg_catalog, public;";

#[test]
fn nothing_that_has_the_names_of_our_sql_is_taken_for_it() {
    let mut stage = Stage::new();
    let mut client = stage.client();
    pass(&mut client, TRAPS);
    pass(&mut client, OWN_TRAPS);
    assert_eq!(number(&mut client, "SELECT count(*) FROM policy"), 0, "the traps are not in front");

    // A refusal and its event, a request by text and by event, the approval, the write.
    let write = "UPDATE public.t SET v = 1 WHERE id OPERATOR(pg_catalog.<=) 6";
    refuse(&mut client, write);
    assert_eq!(stage.events("blocked"), 1);
    let event = stage.number("SELECT max(id) FROM writeguard.event WHERE kind = 'blocked'");
    let by_event = number(&mut client, &format!("SELECT writeguard.request({event}, 'ticket 8')"));
    let by_text = request(&mut client, write);
    let approver = stage.approver();
    let mut approving = stage.db.connect(&approver);
    pass(&mut approving, OWN_TRAPS);
    pass(&mut approving, &format!("SELECT writeguard.reject({by_event}, 'no')"));
    let token = approve(&mut approving, by_text).unwrap_or_else(|error| panic!("{:?}", Refusal::of(&error)));
    arm(&mut client, "no token at all");
    fail(&mut client, write, "WG006");
    arm(&mut client, &token);
    pass(&mut client, write);
    assert_eq!(stage.number("SELECT sum(v) FROM t"), 6);
    arm(&mut client, &token);
    fail(&mut client, "UPDATE public.t SET v = 2 WHERE id OPERATOR(pg_catalog.<=) 6", "WG006");
    refuse(&mut client, "UPDATE public.t SET v = 2");

    // Whatever else everybody may call.
    let effective = format!(
        "SELECT value::bigint FROM writeguard.effective('public.t', '{}', 'update') LIMIT 1 OFFSET 0",
        stage.attacker
    );
    assert_eq!(number(&mut client, &effective), 5);
    assert_eq!(text(&mut client, "SELECT writeguard.login()"), stage.attacker);
    assert_eq!(number(&mut client, "SELECT pg_catalog.count(*) FROM writeguard.my_requests"), 2);
    assert_eq!(number(&mut client, "SELECT pg_catalog.length(writeguard.statement_hash('x'))"), 64);
    assert_eq!(stage.text("SELECT coalesce(string_agg(what || ' as ' || who, ', '), '') FROM public.caught"), "");
    let within = "SELECT count(*) FROM writeguard.request WHERE expires_at < now() + interval '1 hour'";
    assert_eq!(stage.number(within), 1);
}

#[test]
fn policies_are_set_among_the_traps_of_others() {
    let mut stage = Stage::new();
    pass(&mut stage.client(), TRAPS);
    let mut admin = stage.db.admin();
    pass(&mut admin, OWN_TRAPS);
    pass(&mut admin, "SELECT writeguard.set_policy('q', tables => '{public.u}', max_rows => 7, mode => 'enforce')");
    pass(&mut admin, "SELECT writeguard.set_policy('q', tables => '{public.u}', max_rows => 6, mode => 'enforce')");
    pass(&mut admin, "SELECT writeguard.set_policy('r', tables => '{public.u}', max_rows => 1)");
    pass(&mut admin, "SELECT writeguard.drop_policy('r')");
    let mut client = stage.client();
    refuse(&mut client, "UPDATE u SET v = 1 WHERE id <= 7");
    pass(&mut client, "UPDATE u SET v = 1 WHERE id <= 6");
    assert_eq!(stage.text("SELECT coalesce(string_agg(what || ' as ' || who, ', '), '') FROM public.caught"), "");
    stage.assert_guarded();
}

#[test]
fn schemas_and_tables_of_nearly_our_names_are_not_ours() {
    let mut stage = Stage::new();
    let mut client = stage.client();
    pass(
        &mut client,
        "CREATE SCHEMA \"Writeguard\";
         CREATE SCHEMA write_guard;
         CREATE SCHEMA \"writeguard \";
         CREATE TABLE \"Writeguard\".policy (name text);
         CREATE TABLE public.policy (name text, tables text[], max_rows bigint);
         CREATE TABLE public.event (id bigint);
         CREATE TABLE public.\"writeguard.policy\" (name text);
         CREATE TABLE \"Writeguard\".covered AS TABLE t;
         CREATE TABLE \"writeguard \".covered AS TABLE t;
         CREATE TABLE write_guard.covered AS TABLE t;
         CREATE TABLE public.writeguard AS TABLE t",
    );
    stage.assert_guarded();
    // They are tables like any others.
    pass(&mut stage.admin, "SELECT writeguard.set_policy('all', max_rows => 5)");
    for table in ["\"Writeguard\".covered", "\"writeguard \".covered", "write_guard.covered", "public.writeguard"] {
        refuse(&mut client, &format!("UPDATE {table} SET v = 1 WHERE id <= 6"));
        pass(&mut client, &format!("UPDATE {table} SET v = 1 WHERE id <= 5"));
    }
    fail(&mut client, "ALTER SCHEMA write_guard RENAME TO writeguard", "42P06");
    fail(&mut client, "CREATE SCHEMA pg_mine", "42939");
    fail(&mut client, "ALTER SCHEMA \"Writeguard\" RENAME TO pg_mine", "42939");
}

#[test]
fn arguments_of_types_of_ones_own_are_taken_as_text() {
    let mut stage = Stage::new();
    let mut client = stage.client();
    pass(
        &mut client,
        "CREATE TABLE noted (what text);
         CREATE FUNCTION note(what text) RETURNS boolean LANGUAGE plpgsql
         AS 'BEGIN INSERT INTO noted VALUES (current_user); RETURN true; END';
         CREATE DOMAIN loud AS text CHECK (note(VALUE));
         CREATE DOMAIN loud_id AS int CHECK (note(VALUE::text));
         CREATE TYPE wrapped AS (x text);
         CREATE FUNCTION unwrap(wrapped) RETURNS text LANGUAGE sql AS 'SELECT ($1).x';
         CREATE CAST (wrapped AS text) WITH FUNCTION unwrap(wrapped) AS IMPLICIT;
         CREATE FUNCTION request(text, text, text DEFAULT 'more') RETURNS bigint LANGUAGE sql AS 'SELECT 1::bigint'",
    );
    pass(
        &mut client,
        &format!(
            "SELECT writeguard.request('{SIX}'::loud, 'why'::loud);
             SELECT writeguard.statement_hash(ROW('x')::wrapped);
             SELECT * FROM writeguard.effective('t', current_user::loud::name, 'update'::loud)"
        ),
    );
    // A parameter of such a type is checked as its requester, and again as the one who writes.
    let sql = "UPDATE t SET v = 1 WHERE id <= $1::loud_id";
    let id: i64 =
        client.query_one("SELECT writeguard.request($1::text, 'why', parameters => '{6}')", &[&sql]).unwrap().get(0);
    let approver = stage.approver();
    let token = approve(&mut stage.db.connect(&approver), id).unwrap();
    arm(&mut client, &token);
    stage.assert_unchanged();
    let who = format!("SELECT count(*) FROM noted WHERE what <> '{}'", stage.attacker);
    assert_eq!((stage.number(&who), stage.number("SELECT count(*) FROM writeguard.request")), (0, 2));
    assert!(stage.number("SELECT count(*) FROM noted") > 0);
    pass(&mut client, "RESET writeguard.override; RESET writeguard.token");
    stage.assert_guards(&mut client);
}

#[test]
fn odd_arguments_are_refused_and_nothing_worse() {
    let mut stage = Stage::new();
    let started = stage.text("SELECT pg_postmaster_start_time()::text");
    let mut client = stage.client();
    for sql in [
        "SELECT writeguard.request(NULL::text, NULL)",
        "SELECT writeguard.request(NULL::bigint, NULL)",
        "SELECT writeguard.request('', '')",
        "SELECT writeguard.request(';', 'x')",
        "SELECT writeguard.request(repeat('(', 100000), 'x')",
        "SELECT writeguard.request('SELECT ' || repeat('(', 100000) || '1' || repeat(')', 100000), 'x')",
        "SELECT writeguard.request('UPDATE t SET v = 1', 'x', NULL)",
        "SELECT writeguard.request('UPDATE t SET v = $1', 'x', '{{1,2},{3,4}}')",
        "SELECT writeguard.request('UPDATE t SET v = $65535', 'x', '{1}')",
        "SELECT writeguard.request('UPDATE t SET v = $2147483647', 'x', '{1}')",
        "SELECT writeguard.request('UPDATE t SET v = $0', 'x', '{1}')",
        "SELECT writeguard.request(-9223372036854775808, 'x')",
        "SELECT writeguard.request('UPDATE \"' || repeat('x', 1000000) || '\" SET v = 1', 'x')",
        "SELECT writeguard.request(E'UPDATE t SET v = 1 /* \\u00e9 */; é', 'x')",
        "SELECT * FROM writeguard.effective(NULL, NULL, NULL)",
        "SELECT * FROM writeguard.effective(0, '', '')",
        "SELECT writeguard._explain(4294967295, current_user, 'update')",
        "SELECT writeguard._explain('pg_class'::regclass, current_user, 'truncate')",
        "SELECT writeguard._explain('writeguard.event'::regclass, 'public', 'delete')",
        "SELECT writeguard._explain(NULL, NULL, NULL)",
        "SELECT writeguard.statement_hash(NULL)",
        "SELECT writeguard.statement_hash(repeat('x', 10000000), array_fill('y'::text, ARRAY[100, 100]))",
        "SELECT writeguard.statement_hash('x', NULL)",
    ] {
        if let Err(error) = client.batch_execute(sql) {
            let refusal = Refusal::of(&error);
            assert!(!refusal.sqlstate.starts_with("XX"), "{sql}: {refusal:?}");
        }
    }
    stage.assert_guards(&mut client);
    assert_eq!(stage.text("SELECT pg_postmaster_start_time()::text"), started);
}

// Identity.

#[test]
fn a_role_that_is_set_loosens_nothing_that_binds_the_login() {
    let mut stage = Stage::new();
    let wide = stage.db.role("wide");
    let role = stage.attacker.clone();
    pass(
        &mut stage.admin,
        &format!(
            "GRANT {wide} TO {role};
             GRANT ALL ON t TO {wide};
             SELECT writeguard.set_policy('p', tables => '{{public.t}}', roles => '{{{role}}}', max_rows => 5);
             SELECT writeguard.set_policy('wide', tables => '{{public.t}}', roles => '{{{wide}}}', max_rows => 1000)"
        ),
    );
    pass(&mut stage.db.connect(&wide), &format!("{SIX}; UPDATE t SET v = 0 WHERE id <= 6"));
    let mut client = stage.client();
    for sql in [
        "SET ROLE $wide; $six",
        "BEGIN; SET LOCAL ROLE $wide; $six",
        "SELECT set_config('role', '$wide', false); $six",
        "DO $$ BEGIN SET LOCAL ROLE $wide; $six; END $$",
        "DO $$ BEGIN PERFORM set_config('role', '$wide', true); $six; END $$",
        "BEGIN; UPDATE t SET v = 1 WHERE id <= 5; SET LOCAL ROLE $wide; $six",
        "CREATE FUNCTION f() RETURNS void LANGUAGE sql SET role = '$wide' AS '$six'; SELECT f()",
        "CREATE PROCEDURE f() LANGUAGE sql SET role = '$wide' AS '$six'; CALL f()",
        "UPDATE t SET v = 1 WHERE id <= 6 AND set_config('role', '$wide', true) IS NOT NULL",
        "CREATE FUNCTION f() RETURNS void LANGUAGE sql SECURITY DEFINER AS '$six';
         ALTER FUNCTION f() OWNER TO $wide; SELECT f()",
        "GRANT ALL ON t TO $wide; ALTER TABLE t OWNER TO $wide; $six",
    ] {
        let sql = sql.replace("$wide", &wide).replace("$six", SIX);
        refuse(&mut client, &sql);
        pass(&mut client, "ROLLBACK; RESET ROLE");
        stage.assert_unchanged();
    }
    let mut by_option = stage.db.connect_with(&role, &format!("-c role={wide}"));
    assert_eq!(text(&mut by_option, "SELECT current_user::text"), wide);
    refuse(&mut by_option, SIX);
    pass(&mut client, &format!("ALTER ROLE {role} SET role = '{wide}'"));
    let mut by_role = stage.client();
    assert_eq!(text(&mut by_role, "SELECT current_user::text"), wide);
    refuse(&mut by_role, SIX);
    stage.assert_unchanged();
}

#[test]
fn an_ordinary_role_cannot_become_another_leave_its_group_or_change_its_name() {
    let mut stage = Stage::new();
    let (group, other) = (stage.db.role("grp"), stage.db.role("other"));
    let role = stage.attacker.clone();
    pass(
        &mut stage.admin,
        &format!(
            "GRANT {group} TO {role};
             GRANT ALL ON t TO {other};
             SELECT writeguard.set_policy('p', tables => '{{public.t}}', roles => '{{{group}}}', max_rows => 5)"
        ),
    );
    pass(&mut stage.db.connect(&other), &format!("{SIX}; UPDATE t SET v = 0 WHERE id <= 6"));
    let attacks: Vec<String> = [
        "SET SESSION AUTHORIZATION $other",
        "SET ROLE $other",
        "SELECT set_config('session_authorization', '$other', false)",
        "CREATE FUNCTION f() RETURNS void LANGUAGE sql AS ''; ALTER FUNCTION f() OWNER TO $other",
        "CREATE FUNCTION f() RETURNS void LANGUAGE plpgsql SECURITY DEFINER AS 'BEGIN SET ROLE $group; END';
         SELECT f()",
        "REVOKE $group FROM $attacker",
        "GRANT $group TO $other",
        "GRANT $other TO $attacker",
        "GRANT $attacker TO $attacker WITH ADMIN OPTION",
        "ALTER GROUP $group DROP USER $attacker",
        "ALTER ROLE $attacker RENAME TO somebody",
        "ALTER ROLE $group RENAME TO some_group",
        "ALTER ROLE $attacker NOINHERIT",
        "ALTER ROLE $attacker SUPERUSER",
        "ALTER ROLE $attacker CREATEROLE",
        "DROP ROLE $group",
        "DROP OWNED BY $group CASCADE; REASSIGN OWNED BY $other TO $attacker",
        "CREATE ROLE somebody",
        "UPDATE pg_authid SET rolsuper = true",
        "DELETE FROM pg_auth_members",
    ]
    .iter()
    .map(|sql| sql.replace("$group", &group).replace("$other", &other))
    .collect();
    let attacks: Vec<&str> = attacks.iter().map(String::as_str).collect();
    // Nobody may be a member of himself; and a SECURITY DEFINER function may not set a role.
    stage.assert_futile(&["42501", "0LP01", "0A000"], &attacks);
}

#[test]
fn a_role_granted_or_revoked_inside_the_transaction_gives_back_no_row() {
    let mut stage = Stage::new();
    let wide = stage.db.role("wide");
    let role = stage.attacker.clone();
    pass(
        &mut stage.admin,
        &format!(
            "GRANT {wide} TO {role} WITH ADMIN OPTION;
             REVOKE {wide} FROM {role};
             SELECT writeguard.set_policy('p', tables => '{{public.t}}', max_rows_per_transaction => 5);
             SELECT writeguard.set_policy('own', tables => '{{public.t}}', roles => '{{{role}}}',
                                          max_rows_per_transaction => 5)"
        ),
    );
    let mut client = stage.client();
    pass(&mut client, "BEGIN; UPDATE t SET v = 1 WHERE id <= 3");
    for sql in
        [format!("GRANT {wide} TO {role}"), format!("REVOKE {wide} FROM {role}"), format!("GRANT {wide} TO {role}")]
    {
        pass(&mut stage.admin, &sql);
        pass(&mut client, "SAVEPOINT a; UPDATE t SET v = 1 WHERE id IN (4, 5); ROLLBACK TO a");
        refuse(&mut client, "UPDATE t SET v = 1 WHERE id IN (4, 5, 6)");
        pass(&mut client, "ROLLBACK TO a");
    }
    pass(&mut client, "ROLLBACK");
    stage.assert_unchanged();
}

#[test]
fn the_admin_of_a_wider_group_who_joins_it_stays_bound_by_the_policy_on_the_own_name() {
    let mut stage = Stage::new();
    let wide = stage.db.role("wide");
    let role = stage.attacker.clone();
    pass(
        &mut stage.admin,
        &format!(
            "GRANT {wide} TO {role} WITH ADMIN OPTION;
             GRANT ALL ON t TO {wide};
             SELECT writeguard.set_policy('own', tables => '{{public.t}}', roles => '{{{role}}}', max_rows => 5);
             SELECT writeguard.set_policy('wide', tables => '{{public.t}}', roles => '{{{wide}}}', max_rows => 1000);
             SELECT writeguard.drop_policy('p')"
        ),
    );
    let mut client = stage.client();
    refuse(&mut client, SIX);
    refuse(&mut client, &format!("SET ROLE {wide}; {SIX}"));
    refuse(
        &mut client,
        &format!("RESET ROLE; DO $$ BEGIN UPDATE t SET v = 1 WHERE id <= 5; SET LOCAL ROLE {wide}; {SIX}; END $$"),
    );
    stage.assert_unchanged();
}

/// In PostgreSQL 15 CREATEROLE is membership in every role that is no superuser, and so it is every role's policy.
#[test]
fn creating_roles_leads_past_no_policy_for_everybody() {
    let mut stage = Stage::new();
    let (wide, role) = (stage.db.role("wide"), stage.attacker.clone());
    pass(&mut stage.admin, &format!("ALTER ROLE {role} CREATEROLE; GRANT ALL ON t TO PUBLIC"));
    let mut client = stage.client();
    let puppet = format!("puppet_{role}");
    pass(
        &mut client,
        &format!(
            "CREATE ROLE {puppet} LOGIN; CREATE ROLE {puppet}_group ROLE {role}, {puppet}; SET ROLE {puppet}_group"
        ),
    );
    refuse(&mut client, SIX);
    let mut as_puppet = stage.db.connect(&puppet);
    refuse(&mut as_puppet, SIX);
    pass(&mut client, "RESET ROLE");
    for sql in [
        "GRANT pg_write_all_data TO postgres",
        "ALTER ROLE postgres NOSUPERUSER",
        "ALTER ROLE postgres RENAME TO x",
        "GRANT postgres TO $attacker",
        "ALTER ROLE $attacker SUPERUSER",
        "ALTER ROLE $attacker SET writeguard.enabled = off",
        "ALTER ROLE ALL SET writeguard.enabled = off",
    ] {
        let sql = stage.fill(sql);
        let _ = client.batch_execute(&sql);
        refuse(&mut stage.client(), SIX);
    }
    pass(
        &mut stage.admin,
        &format!(
            "SELECT writeguard.set_policy('wide', tables => '{{public.t}}', roles => '{{{wide}}}', max_rows => 1000)"
        ),
    );
    if major(&mut client) >= 16 {
        fail(&mut client, &format!("GRANT {wide} TO {role}"), "42501");
    }
    refuse(&mut client, SIX);
    stage.assert_unchanged();
}

#[test]
fn rows_that_go_through_a_foreign_key_of_a_table_nobody_covers_are_counted() {
    let mut stage = Stage::new();
    let other = stage.db.role("other");
    let role = stage.attacker.clone();
    pass(
        &mut stage.client(),
        "CREATE TABLE parent (id int PRIMARY KEY);
         INSERT INTO parent SELECT id FROM t;
         ALTER TABLE t ADD COLUMN parent int DEFAULT 1;
         ALTER TABLE t ADD FOREIGN KEY (id) REFERENCES parent ON DELETE CASCADE ON UPDATE CASCADE",
    );
    // The foreign key's actions run as the owner of the table, who has a policy of his own.
    pass(
        &mut stage.admin,
        &format!(
            "ALTER TABLE t OWNER TO {other};
             GRANT ALL ON t TO {role};
             SELECT writeguard.set_policy('wide', tables => '{{public.t}}', roles => '{{{other}}}', max_rows => 1000)"
        ),
    );
    let mut client = stage.client();
    for sql in [
        "DELETE FROM parent WHERE id <= 6",
        "UPDATE parent SET id = id + 10000 WHERE id <= 6",
        "WITH gone AS (DELETE FROM parent WHERE id <= 6 RETURNING id) SELECT * FROM gone",
    ] {
        refuse(&mut client, sql);
        stage.assert_unchanged();
    }
    fail(&mut client, "TRUNCATE parent CASCADE", "WG005");
    stage.assert_unchanged();
    pass(&mut client, "DELETE FROM parent WHERE id <= 5");
    assert_eq!(stage.number("SELECT count(*) FROM t"), 995);
}

#[test]
fn a_replication_connection_is_limited_like_any_other() {
    let mut stage = Stage::new();
    let role = stage.attacker.clone();
    pass(&mut stage.admin, &format!("ALTER ROLE {role} REPLICATION"));
    let connection = format!("dbname={} replication=database", stage.db.name);
    let said = server().psql(&connection, &role, &format!("{SIX};\nSELECT count(*) FROM t WHERE v = 0;\n{FIVE};\n"));
    assert!(said.contains("limit of 5 rows") && said.contains("1000"), "{said}");
    assert_eq!(stage.events("blocked"), 1);
    stage.assert_unchanged();
    pass(&mut stage.admin, &format!("ALTER ROLE {role} NOREPLICATION"));
}

// Approvals.

#[test]
fn a_new_role_of_the_requesters_name_neither_approves_nor_uses_what_the_old_one_asked_for() {
    let mut stage = Stage::new();
    let (requester, approver) = (stage.db.role("requester"), stage.approver());
    pass(&mut stage.admin, "GRANT ALL ON t TO PUBLIC");
    let mut client = stage.db.connect(&requester);
    let (first, second) = (request(&mut client, SIX), request(&mut client, SIX));
    let token = approve(&mut stage.db.connect(&approver), first).unwrap();
    drop(client);
    pass(
        &mut stage.admin,
        &format!(
            "DROP ROLE {requester};
             CREATE ROLE {requester} LOGIN;
             GRANT EXECUTE ON FUNCTION writeguard.approve TO {requester}"
        ),
    );
    let mut client = stage.db.connect(&requester);
    arm(&mut client, &token);
    fail(&mut client, SIX, "WG006");
    stage.assert_unchanged();
    let refusal = expect_refusal(approve(&mut client, second));
    assert_eq!(refusal.sqlstate, "WG006", "{refusal:?}");
    assert_eq!(stage.number("SELECT count(*) FROM writeguard.request WHERE state = 'pending'"), 1);
}

#[test]
fn a_second_name_for_the_same_login_approves_nothing() {
    let mut stage = Stage::new();
    let (role, other, approver) = (stage.attacker.clone(), stage.db.role("other"), stage.approver());
    pass(
        &mut stage.admin,
        &format!(
            "GRANT {approver}, {other} TO {role}; GRANT EXECUTE ON FUNCTION writeguard.approve TO {role}, {other}"
        ),
    );
    let mut client = stage.client();
    let id = request(&mut client, SIX);
    let attempt = format!("SELECT writeguard.approve({id})");
    for sql in [
        "$attempt",
        "SET ROLE $approver; $attempt",
        "SET LOCAL ROLE $other; $attempt",
        "DO $$ BEGIN PERFORM set_config('role', '$approver', true); EXECUTE '$attempt'; END $$",
        "CREATE FUNCTION f() RETURNS text LANGUAGE sql SECURITY DEFINER AS '$attempt';
         ALTER FUNCTION f() OWNER TO $other; SELECT f()",
        "CREATE FUNCTION f() RETURNS text LANGUAGE sql SET role = '$approver' AS '$attempt'; SELECT f()",
        "CREATE VIEW x AS SELECT writeguard.approve($id); ALTER VIEW x OWNER TO $other;
         GRANT ALL ON x TO $attacker; TABLE x",
    ] {
        let sql = stage.fill(sql).replace("$attempt", &attempt).replace("$approver", &approver);
        let sql = sql.replace("$other", &other).replace("$id", &id.to_string());
        fail(&mut client, &sql, "WG006");
        pass(&mut client, "ROLLBACK; RESET ROLE");
    }
    let mut other_session = stage.db.connect_with(&role, &format!("-c role={approver}"));
    fail(&mut other_session, &attempt, "WG006");
    assert_eq!(stage.text("SELECT string_agg(state, ', ') FROM writeguard.request"), "pending");
    stage.assert_guarded();
}

#[test]
fn an_approval_inside_a_rehearsal_approves_nothing() {
    let mut stage = Stage::new();
    let approver = stage.approver();
    let mut client = stage.client();
    let id = request(&mut client, SIX);
    pass(&mut stage.admin, "GRANT ALL ON t TO PUBLIC");
    let mut approving = stage.db.connect(&approver);
    // The approver's own request, which needs an approval and gives one.
    let statement = format!("UPDATE t SET v = length(writeguard.approve({id})) WHERE id = 1 RETURNING v");
    fail(&mut approving, &format!("SELECT writeguard.request($${statement}$$, 'why')"), "WG006");
    let states = "SELECT string_agg(DISTINCT state, ', ') FROM writeguard.request";
    assert_eq!(stage.text(states), "pending");
    assert_eq!(stage.events("approved"), 0);
}

#[test]
fn a_table_that_is_renamed_to_and_fro_under_a_token_is_the_table_that_was_reviewed() {
    let mut stage = Stage::new();
    pass(&mut stage.admin, "SELECT writeguard.set_policy('all', tables => '{public.*}', max_rows => 5)");
    let approver = stage.approver();
    let mut client = stage.client();
    let ten = |from: i32| format!("UPDATE t SET v = 1 WHERE id BETWEEN {from} AND {};", from + 9);
    let to_and_fro = "ALTER TABLE t RENAME TO x; UPDATE x SET v = v WHERE false; ALTER TABLE x RENAME TO t;";
    // It goes another way than it did when it was reviewed; its text stays.
    let when = |way: &str, body: &str| format!("IF current_setting('my.way', true) = '{way}' THEN {body} END IF;");
    let body = [
        when("to and fro", to_and_fro),
        ten(1),
        when("more", &ten(11)),
        when("more, after a rename", &format!("{to_and_fro} {}", ten(11))),
        when("to and fro", to_and_fro),
    ];
    let body = body.concat();
    pass(&mut client, &format!("CREATE FUNCTION f() RETURNS void LANGUAGE plpgsql AS $$ BEGIN {body} END $$"));
    for (way, passes) in [("as reviewed", true), ("more", false), ("more, after a rename", false), ("to and fro", true)]
    {
        let id = request(&mut client, "SELECT f()");
        let token = approve(&mut stage.db.connect(&approver), id).unwrap();
        pass(&mut client, &format!("SET my.way = '{way}'"));
        arm(&mut client, &token);
        let written = client.batch_execute("SELECT f()");
        let changed = stage.number("SELECT sum(v) FROM t");
        assert_eq!((written.is_ok(), changed), (passes, if passes { 10 } else { 0 }), "{way}: {written:?}");
        pass(&mut stage.admin, "SET writeguard.enabled = off; UPDATE t SET v = 0; RESET writeguard.enabled");
        pass(&mut client, "RESET my.way");
    }
}

#[test]
fn a_table_put_in_the_place_of_the_reviewed_one_gets_no_rows_of_its_own_under_the_token() {
    let mut stage = Stage::new();
    pass(&mut stage.admin, "SELECT writeguard.set_policy('all', tables => '{public.*}', max_rows => 5)");
    let approver = stage.approver();
    let mut client = stage.client();
    let function =
        |body: &str| format!("CREATE OR REPLACE FUNCTION f() RETURNS void LANGUAGE plpgsql AS $$ BEGIN {body} END $$");
    let ten = "EXECUTE 'UPDATE t SET v = 1 WHERE id <= 10';";
    let swap = "ALTER TABLE t RENAME TO x; ALTER TABLE u RENAME TO t;";
    pass(&mut client, &function(ten));
    let id = request(&mut client, "SELECT f()");
    let token = approve(&mut stage.db.connect(&approver), id).unwrap();
    pass(&mut client, &function(&format!("{ten} {swap} {ten}")));
    arm(&mut client, &token);
    let written = client.batch_execute("SELECT f()");
    assert!(written.is_err(), "twice as many rows as were reviewed");
    stage.assert_unchanged();
}

/// A function that does in one statement what a rehearsal must not leave behind.
const BUSY: &str = "
    CREATE SEQUENCE n;
    CREATE FUNCTION busy() RETURNS int LANGUAGE plpgsql AS $$
    DECLARE c refcursor := 'left_open'; r record;
    BEGIN
      PERFORM set_config('writeguard.override', 'on', false);
      PERFORM set_config('writeguard.token', 'x', false);
      BEGIN
        UPDATE t SET v = 1;
        RAISE division_by_zero;
      EXCEPTION WHEN division_by_zero THEN
        UPDATE t SET v = 2;
      END;
      OPEN c FOR SELECT id FROM t;
      FETCH c INTO r;
      CREATE TEMP TABLE kept AS SELECT 1;
      EXECUTE 'PREPARE later_' || nextval('n') || ' AS UPDATE t SET v = 3';
      RETURN 1;
    END $$;";

#[test]
fn a_rehearsal_leaves_nothing_lifted_armed_or_open() {
    let mut stage = Stage::new();
    let mut client = stage.client();
    pass(&mut client, BUSY);
    let requests = "SELECT writeguard.request('SELECT busy()', 'why')";
    for sql in [
        requests.to_owned(),
        format!("BEGIN; {requests}; COMMIT"),
        format!("BEGIN; SAVEPOINT a; {requests}; RELEASE a; COMMIT"),
    ] {
        pass(&mut client, &sql);
        assert_eq!(text(&mut client, "SELECT current_setting('writeguard.override')"), "off", "{sql}");
        assert_eq!(text(&mut client, "SELECT current_setting('writeguard.token')"), "", "{sql}");
        assert_eq!(number(&mut client, "SELECT count(*) FROM pg_cursors WHERE name = 'left_open'"), 0, "{sql}");
        pass(&mut client, "DEALLOCATE ALL");
        stage.assert_unchanged();
        stage.assert_guards(&mut client);
    }
    // In the same transaction and the same statement, too.
    refuse(&mut client, &format!("BEGIN; {requests}; {SIX}"));
    pass(&mut client, "ROLLBACK; DEALLOCATE ALL");
    fail(&mut client, &format!("DO $$ BEGIN PERFORM ({requests}); {SIX}; END $$"), "WG006");
    fail(&mut client, "UPDATE t SET v = writeguard.request('SELECT busy()', 'why')::int WHERE id <= 6", "WG006");
    stage.assert_unchanged();
}

#[test]
fn a_rehearsal_of_a_rehearsal_changes_nothing() {
    let mut stage = Stage::new();
    let mut client = stage.client();
    let inner = "SELECT writeguard.request('UPDATE t SET v = 1', 'inner')";
    let outer = format!("SELECT writeguard.request($${inner}$$, 'outer')");
    fail(&mut client, &outer, "WG006");
    assert_eq!(stage.number("SELECT count(*) FROM writeguard.request"), 0);
    assert_eq!(stage.events("requested"), 0);
    stage.assert_unchanged();
    stage.assert_guards(&mut client);
}

/// A server of its own, which must not end all sessions because one of them crashed.
#[test]
fn a_failed_rehearsal_with_a_long_message_is_an_error_like_any_other() {
    let server = Server::start(&[PATIENT]);
    let mut stage = Stage::on(&server);
    let started = stage.text("SELECT pg_postmaster_start_time()::text");
    let mut client = stage.client();
    for thousands in [1, 9, 100, 200, 1000, 9000] {
        let long = format!("repeat('x', {thousands} * 1000)");
        let sql =
            format!("SELECT writeguard.request($$UPDATE t SET v = ($$ || quote_literal({long}) || $$)::int$$, 'why')");
        let refusal = fail(&mut client, &sql, "22P02");
        let plain = fail(&mut client, &format!("DO $$ BEGIN PERFORM {long}::int; END $$"), "22P02");
        assert!(refusal.message == plain.message, "another message of {} bytes", refusal.message.len());
    }
    stage.assert_guards(&mut client);
    assert_eq!(stage.text("SELECT pg_postmaster_start_time()::text"), started);
}

#[test]
fn rehearsals_that_rehearse_themselves_end_in_an_error() {
    let server = Server::start(&[PATIENT]);
    let mut stage = Stage::on(&server);
    let started = stage.text("SELECT pg_postmaster_start_time()::text");
    let mut client = stage.client();
    pass(
        &mut client,
        "CREATE FUNCTION again() RETURNS bigint LANGUAGE plpgsql AS $$
         BEGIN
           UPDATE t SET v = 1 WHERE id = 1;
           RETURN writeguard.request('SELECT again()', 'again');
         END $$",
    );
    let refusal = expect_refusal(client.batch_execute("SELECT again()"));
    assert_eq!(refusal.sqlstate, "WG006", "{refusal:?}");
    stage.assert_guards(&mut client);
    assert_eq!(stage.text("SELECT pg_postmaster_start_time()::text"), started);
}

#[test]
fn a_rehearsed_truncate_leaves_triggers_as_they_were() {
    let mut stage = Stage::new();
    let mut client = stage.client();
    pass(
        &mut client,
        "CREATE TABLE fired (role text);
         CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS $$
         BEGIN
           INSERT INTO fired VALUES (current_setting('session_replication_role'));
           RETURN NULL;
         END $$;
         CREATE TRIGGER note AFTER UPDATE OR TRUNCATE ON t EXECUTE FUNCTION note();
         ALTER TABLE t ENABLE ALWAYS TRIGGER note",
    );
    for sql in [
        "SELECT writeguard.request('TRUNCATE t', 'why')",
        "BEGIN; SELECT writeguard.request('TRUNCATE t', 'why'); COMMIT",
    ] {
        pass(&mut client, sql);
        assert_eq!(text(&mut client, "SHOW session_replication_role"), "origin", "{sql}");
    }
    fail(&mut client, "SELECT writeguard.request('TRUNCATE t, not_there', 'why')", "42P01");
    assert_eq!(text(&mut client, "SHOW session_replication_role"), "origin");
    fail(&mut client, "SELECT writeguard.request('TRUNCATE pg_class', 'why')", "42501");
    assert_eq!(text(&mut client, "SHOW session_replication_role"), "origin");
    pass(&mut client, FIVE);
    assert_eq!(stage.text("SELECT string_agg(role, ', ') FROM fired"), "origin");
    stage.assert_guarded();
}

//! Staying out of the way: other people's errors arrive as they would without the
//! library, a refusal has all the fields of an error, and nobody needs a right that
//! they did not need before.

use std::sync::OnceLock;
use std::thread;

use crate::common::{Database, Refusal, Server, expect_refusal, wait_until};
use postgres::error::ErrorPosition;
use postgres::{Client, NoTls, SimpleQueryMessage};

/// A table that is covered, what refers to it, and functions and triggers that fail.
const SETUP: &str = r#"
    CREATE DOMAIN positive AS int CHECK (VALUE > 0);
    CREATE TABLE t (
        id int CONSTRAINT t_key PRIMARY KEY,
        v int NOT NULL CONSTRAINT t_v_limit CHECK (v < 1000),
        p positive DEFAULT 1,
        CONSTRAINT t_v_unique UNIQUE (v)
    );
    INSERT INTO t SELECT n, n * 10 FROM generate_series(1, 10) AS n;
    CREATE TABLE child (
        id int PRIMARY KEY,
        t int CONSTRAINT child_t REFERENCES t (id)
    );
    INSERT INTO child VALUES (1, 1);
    CREATE TABLE later (
        id int PRIMARY KEY,
        t int CONSTRAINT later_t REFERENCES t (id) DEFERRABLE INITIALLY DEFERRED,
        u int CONSTRAINT later_u UNIQUE DEFERRABLE INITIALLY DEFERRED
    );
    INSERT INTO later VALUES (1, 1, 1), (2, 2, 2);

    CREATE FUNCTION complain() RETURNS void LANGUAGE plpgsql AS $$
    BEGIN
        RAISE EXCEPTION USING
            ERRCODE = 'SW001', MESSAGE = 'the warehouse is closed', DETAIL = 'It opens at % on %s.',
            HINT = 'Come back later.', SCHEMA = 'some schema', TABLE = 'some table', COLUMN = 'some column',
            CONSTRAINT = 'some constraint', DATATYPE = 'some type';
    END $$;
    CREATE FUNCTION write_and_complain() RETURNS void LANGUAGE plpgsql AS $$
    BEGIN
        UPDATE t SET v = v + 1 WHERE id = 10;
        PERFORM complain();
    END $$;
    CREATE FUNCTION divide(a int, b int) RETURNS int LANGUAGE plpgsql AS $$ BEGIN RETURN a / b; END $$;
    CREATE FUNCTION break_unique() RETURNS void LANGUAGE sql AS $$ UPDATE t SET v = 10 WHERE id = 2 $$;
    CREATE FUNCTION wrong_column() RETURNS void LANGUAGE plpgsql AS $$
    BEGIN
        UPDATE t SET no_such_column = 1;
    END $$;

    CREATE TABLE triggered (id int PRIMARY KEY, v int);
    INSERT INTO triggered SELECT n, n FROM generate_series(1, 5) AS n;
    CREATE FUNCTION object() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        IF new.v = 100 THEN PERFORM complain(); END IF;
        IF new.v = 200 THEN UPDATE t SET v = 10 WHERE id = 2; END IF;
        RETURN new;
    END $$;
    CREATE TRIGGER before BEFORE UPDATE ON triggered FOR EACH ROW WHEN (new.v < 150) EXECUTE FUNCTION object();
    CREATE TRIGGER after AFTER UPDATE ON triggered FOR EACH ROW WHEN (new.v > 150) EXECUTE FUNCTION object();
"#;

/// The servers that must not differ, by what they have of the extension.
struct Servers {
    without: Server,
    hooks_first: Server,
    hooks_last: Server,
}

fn servers() -> &'static Servers {
    static SERVERS: OnceLock<Servers> = OnceLock::new();
    SERVERS.get_or_init(|| {
        let busy = |libraries: &str| {
            Server::start(&[
                &format!("shared_preload_libraries = '{libraries}'"),
                "pg_stat_statements.track = all",
                "auto_explain.log_min_duration = 0",
                "auto_explain.log_analyze = on",
                "auto_explain.log_triggers = on",
                "auto_explain.log_nested_statements = on",
            ])
        };
        Servers {
            without: Server::start(&["shared_preload_libraries = ''"]),
            hooks_first: busy("pg_writeguard,pg_stat_statements,auto_explain"),
            hooks_last: busy("pg_stat_statements,auto_explain,pg_writeguard"),
        }
    })
}

const COVER: &str = "CREATE EXTENSION pg_writeguard;
     SELECT writeguard.set_policy('all', max_rows => 1000, max_rows_per_transaction => 100000);";

/// The same database wherever results must be the same; the first is without the library.
fn databases() -> Vec<(&'static str, Database)> {
    let servers = servers();
    let covered = |server: &Server| {
        let db = server.plain_database();
        db.admin().batch_execute(COVER).unwrap();
        db
    };
    let databases = vec![
        ("without the library", servers.without.plain_database()),
        ("without the extension", Server::shared().plain_database()),
        ("covered", covered(Server::shared())),
        ("covered, our hooks first", covered(&servers.hooks_first)),
        ("covered, our hooks last", covered(&servers.hooks_last)),
    ];
    for (_, db) in &databases {
        db.admin().batch_execute(SETUP).unwrap();
    }
    databases
}

/// All that a client can see of what came back.
#[derive(Debug, PartialEq, Eq)]
enum Outcome {
    Rows(Vec<String>),
    Error(Box<Fields>),
}

#[derive(Debug, PartialEq, Eq)]
struct Fields {
    severity: String,
    sqlstate: String,
    message: String,
    detail: Option<String>,
    hint: Option<String>,
    position: Option<String>,
    context: Option<String>,
    schema: Option<String>,
    table: Option<String>,
    column: Option<String>,
    datatype: Option<String>,
    constraint: Option<String>,
    /// Where in the server's source it was raised.
    raised_in: (Option<String>, Option<u32>, Option<String>),
}

impl Fields {
    fn of(error: &postgres::Error) -> Fields {
        let Some(error) = error.as_db_error() else {
            panic!("not an error of the server: {error:?}");
        };
        let text = |field: Option<&str>| field.map(str::to_owned);
        Fields {
            severity: error.severity().to_owned(),
            sqlstate: error.code().code().to_owned(),
            message: error.message().to_owned(),
            detail: text(error.detail()),
            hint: text(error.hint()),
            position: error.position().map(|position| match position {
                ErrorPosition::Original(at) => at.to_string(),
                ErrorPosition::Internal { position, query } => format!("{position} in {query}"),
            }),
            context: text(error.where_()),
            schema: text(error.schema()),
            table: text(error.table()),
            column: text(error.column()),
            datatype: text(error.datatype()),
            constraint: text(error.constraint()),
            raised_in: (text(error.file()), error.line(), text(error.routine())),
        }
    }

    /// Numbers that differ from run to run, such as process ids, as `#`.
    fn without_numbers(mut self) -> Fields {
        let mask = |text: &str| {
            let mut masked = String::new();
            for letter in text.chars() {
                match letter {
                    '0'..='9' if masked.ends_with('#') => {}
                    '0'..='9' => masked.push('#'),
                    _ => masked.push(letter),
                }
            }
            masked
        };
        self.detail = self.detail.as_deref().map(mask);
        self.context = self.context.as_deref().map(mask);
        self
    }
}

fn outcome(result: Result<Vec<SimpleQueryMessage>, postgres::Error>) -> Outcome {
    match result {
        Ok(messages) => Outcome::Rows(messages.iter().map(message).collect()),
        Err(error) => Outcome::Error(Box::new(Fields::of(&error))),
    }
}

fn message(message: &SimpleQueryMessage) -> String {
    match message {
        SimpleQueryMessage::Row(row) => {
            let values: Vec<&str> = (0..row.len()).map(|at| row.get(at).unwrap_or("∅")).collect();
            values.join(" | ")
        }
        SimpleQueryMessage::CommandComplete(rows) => format!("{rows} rows"),
        _ => String::new(),
    }
}

/// Sends statements one by one to each of the servers; all must answer as the one without the library does, which must
/// be with this SQLSTATE for the last of them.
#[track_caller]
fn same_everywhere(statements: &[&str], sqlstate: &str) {
    let mut expected: Option<Vec<Outcome>> = None;
    for (name, db) in databases() {
        let mut client = db.admin();
        let outcomes: Vec<Outcome> =
            statements.iter().map(|statement| outcome(client.simple_query(statement))).collect();
        match &expected {
            None => {
                let Some(Outcome::Error(fields)) = outcomes.last() else {
                    panic!("passed: {statements:?}");
                };
                assert_eq!(fields.sqlstate, sqlstate, "{fields:?}");
                expected = Some(outcomes);
            }
            Some(expected) => assert_eq!(&outcomes, expected, "{name}"),
        }
    }
}

/// The same for one statement in the extended protocol, with a parameter.
#[track_caller]
fn same_with_parameter(statement: &str, parameter: i32, sqlstate: &str) {
    let mut expected = None;
    for (name, db) in databases() {
        let error = db.admin().execute(statement, &[&parameter]).unwrap_err();
        let fields = Fields::of(&error);
        assert_eq!(fields.sqlstate, sqlstate, "{fields:?}");
        match &expected {
            None => expected = Some(fields),
            Some(expected) => assert_eq!(&fields, expected, "{name}"),
        }
    }
}

/// The same for what happens between two sessions.
#[track_caller]
fn same_between_two(sqlstate: &str, play: impl Fn(&Database) -> postgres::Error) {
    let mut expected = None;
    for (name, db) in databases() {
        let fields = Fields::of(&play(&db)).without_numbers();
        assert_eq!(fields.sqlstate, sqlstate, "{fields:?}");
        match &expected {
            None => expected = Some(fields),
            Some(expected) => assert_eq!(&fields, expected, "{name}"),
        }
    }
}

// RAISE with all fields.

#[test]
fn raise_in_a_function() {
    same_everywhere(&["SELECT complain()"], "SW001");
}

#[test]
fn raise_in_a_function_after_a_covered_write() {
    same_everywhere(&["SELECT write_and_complain()"], "SW001");
}

#[test]
fn raise_in_a_do_block_with_a_covered_write() {
    let block = "DO $$ BEGIN UPDATE t SET v = v + 1 WHERE id = 3; PERFORM complain(); END $$";
    same_everywhere(&[block], "SW001");
}

#[test]
fn raise_in_the_condition_of_a_covered_write() {
    same_everywhere(&["UPDATE t SET v = v + 1 WHERE complain() IS NOT NULL"], "SW001");
}

#[test]
fn raise_in_a_before_trigger() {
    same_everywhere(&["UPDATE triggered SET v = 100 WHERE id = 3"], "SW001");
}

#[test]
fn error_in_a_write_of_an_after_trigger() {
    same_everywhere(&["UPDATE triggered SET v = 200 WHERE id = 3"], "23505");
}

#[test]
fn raise_in_a_procedure_that_commits() {
    same_everywhere(
        &["DO $$ BEGIN
             UPDATE t SET v = v + 1 WHERE id = 3;
             COMMIT;
             UPDATE t SET v = v + 1 WHERE id = 4;
             PERFORM complain();
           END $$"],
        "SW001",
    );
}

#[test]
fn error_codes_that_look_like_ours() {
    same_everywhere(&["DO $$ BEGIN RAISE 'not ours' USING ERRCODE = 'WG001', HINT = 'really'; END $$"], "WG001");
}

// Constraints.

#[test]
fn unique_violation() {
    same_everywhere(&["UPDATE t SET v = 10 WHERE id = 2"], "23505");
}

#[test]
fn unique_violation_in_an_sql_function() {
    same_everywhere(&["SELECT break_unique()"], "23505");
}

#[test]
fn check_violation_in_a_cte() {
    same_everywhere(&["WITH w AS (UPDATE t SET v = v + 995 WHERE id = 1 RETURNING v) SELECT * FROM w"], "23514");
}

#[test]
fn foreign_key_violation() {
    same_everywhere(&["DELETE FROM t WHERE id = 1"], "23503");
}

#[test]
fn foreign_key_violation_on_the_referring_side() {
    same_everywhere(&["UPDATE child SET t = 77"], "23503");
}

#[test]
fn not_null_violation() {
    same_everywhere(&["UPDATE t SET v = NULL WHERE id = 1"], "23502");
}

#[test]
fn domain_violation_names_the_data_type() {
    same_everywhere(&["UPDATE t SET p = 1 - id"], "23514");
}

#[test]
fn violation_in_merge() {
    same_everywhere(
        &["MERGE INTO t USING (VALUES (1), (2)) AS s (id) ON t.id = s.id WHEN MATCHED THEN UPDATE SET v = 30"],
        "23505",
    );
}

#[test]
fn violation_in_on_conflict_do_update() {
    same_everywhere(&["INSERT INTO t VALUES (1, 1) ON CONFLICT (id) DO UPDATE SET v = 2000"], "23514");
}

#[test]
fn truncate_of_a_table_that_others_refer_to() {
    same_everywhere(&["TRUNCATE t"], "0A000");
}

#[test]
fn deferred_constraints_fail_at_commit() {
    same_everywhere(&["BEGIN", "UPDATE later SET u = 1", "UPDATE t SET v = v + 1 WHERE id = 9", "COMMIT"], "23505");
    same_everywhere(&["BEGIN", "UPDATE later SET t = 99", "COMMIT"], "23503");
    same_everywhere(&["UPDATE later SET t = 99"], "23503");
}

// Arithmetic, syntax, names.

#[test]
fn division_by_zero_in_a_covered_update() {
    same_everywhere(&["UPDATE t SET v = v / (id - 5)"], "22012");
    same_everywhere(&["UPDATE t SET v = divide(v, id - 5)"], "22012");
    same_everywhere(&["DELETE FROM t WHERE 1 / (id - 5) > 7"], "22012");
}

#[test]
fn division_by_zero_with_a_parameter() {
    same_with_parameter("UPDATE t SET v = v / (id - $1)", 5, "22012");
}

#[test]
fn syntax_error_keeps_its_position() {
    same_everywhere(&["UPDATE t SET v = WHERE id = 1"], "42601");
    same_everywhere(&["SELECT 'ä'; UPDATE t SETT v = 1"], "42601");
    same_everywhere(&["UPDATE t SET v = 1 WHERE id = 1 OR"], "42601");
}

#[test]
fn unknown_names_keep_their_position() {
    same_everywhere(&["UPDATE t SET v = 1 WHERE ident = 1"], "42703");
    same_everywhere(&["UPDATE t SET v = f(1)"], "42883");
    same_everywhere(&["UPDATE no_such_table SET v = 1"], "42P01");
    same_with_parameter("UPDATE t SET v = $1 WHERE ident = 1", 1, "42703");
}

#[test]
fn error_inside_a_function_keeps_its_internal_position() {
    same_everywhere(&["SELECT wrong_column()"], "42703");
}

#[test]
fn wrong_input_keeps_its_position() {
    same_everywhere(&["UPDATE t SET v = 'seven' WHERE id = 1"], "22P02");
}

// Caught and raised again.

#[test]
fn stacked_diagnostics_are_the_same() {
    let block = "DO $$
        DECLARE a text; b text; c text; d text; e text; f text; g text; h text; i text; j text;
        BEGIN
            PERFORM write_and_complain();
        EXCEPTION WHEN OTHERS THEN
            GET STACKED DIAGNOSTICS a = RETURNED_SQLSTATE, b = MESSAGE_TEXT, c = PG_EXCEPTION_DETAIL,
                d = PG_EXCEPTION_HINT, e = PG_EXCEPTION_CONTEXT, f = SCHEMA_NAME, g = TABLE_NAME,
                h = COLUMN_NAME, i = CONSTRAINT_NAME, j = PG_DATATYPE_NAME;
            RAISE EXCEPTION '% / % / % / % / % / % / % / % / % / %', a, b, c, d, e, f, g, h, i, j;
        END $$";
    same_everywhere(&[block], "P0001");
}

#[test]
fn error_that_is_raised_again_is_the_same() {
    let again = |body: &str| {
        format!("DO $$ BEGIN {body}; EXCEPTION WHEN OTHERS THEN UPDATE t SET v = v + 1 WHERE id = 10; RAISE; END $$")
    };
    same_everywhere(&[&again("PERFORM write_and_complain()")], "SW001");
    same_everywhere(&[&again("UPDATE t SET v = 10 WHERE id = 2")], "23505");
}

#[test]
fn savepoint_after_an_error_works_the_same() {
    same_everywhere(
        &[
            "BEGIN",
            "SAVEPOINT s",
            "UPDATE t SET v = v / (id - 5)",
            "SELECT 1",
            "ROLLBACK TO s",
            "UPDATE t SET v = v + 1 WHERE id < 4 RETURNING id, v",
            "UPDATE t SET v = 40 WHERE id = 2",
        ],
        "23505",
    );
}

// Interrupted, locked, in conflict.

#[test]
fn statement_timeout_during_a_covered_update() {
    same_everywhere(
        &["SET statement_timeout = '100ms'", "UPDATE t SET v = v + 1 WHERE pg_sleep(10) IS NOT NULL"],
        "57014",
    );
}

#[test]
fn cancel_during_a_covered_update() {
    same_between_two("57014", |db| {
        let mut client = db.admin();
        let cancel = client.cancel_token();
        let running =
            thread::spawn(move || client.batch_execute("UPDATE t SET v = v + 1 WHERE pg_sleep(60) IS NOT NULL"));
        let mut other = db.admin();
        let sleeps = "SELECT FROM pg_stat_activity WHERE datname = current_database() AND wait_event = 'PgSleep'";
        wait_until(20, || other.query_opt(sleeps, &[]).unwrap().is_some());
        cancel.cancel_query(NoTls).unwrap();
        running.join().unwrap().unwrap_err()
    });
}

#[test]
fn lock_timeout_during_a_covered_update() {
    same_between_two("55P03", |db| {
        let (mut holder, mut client) = (db.admin(), db.admin());
        holder.batch_execute("BEGIN; UPDATE t SET v = v + 1 WHERE id = 5").unwrap();
        client.batch_execute("SET lock_timeout = '100ms'").unwrap();
        client.batch_execute("UPDATE t SET v = v + 2 WHERE id IN (4, 5)").unwrap_err()
    });
}

#[test]
fn serialization_failure_in_a_covered_update() {
    same_between_two("40001", |db| {
        let (mut one, mut other) = (db.admin(), db.admin());
        one.batch_execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM t").unwrap();
        other.batch_execute("UPDATE t SET v = v + 1 WHERE id = 5").unwrap();
        one.batch_execute("UPDATE t SET v = v + 2 WHERE id = 5").unwrap_err()
    });
}

#[test]
fn deadlock_in_covered_updates() {
    same_between_two("40P01", |db| {
        let (mut one, mut other) = (db.admin(), db.admin());
        // Only the second looks for deadlocks soon, so it is the one that fails.
        one.batch_execute("SET deadlock_timeout = '60s'; BEGIN; UPDATE t SET v = v + 1 WHERE id = 1").unwrap();
        other.batch_execute("SET deadlock_timeout = '50ms'; BEGIN; UPDATE t SET v = v + 1 WHERE id = 2").unwrap();
        let waiting = thread::spawn(move || {
            let result = one.batch_execute("UPDATE t SET v = v + 2 WHERE id = 2");
            (one, result)
        });
        let mut third = db.admin();
        let waits = "SELECT FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'";
        wait_until(20, || third.query_opt(waits, &[]).unwrap().is_some());
        let error = other.batch_execute("UPDATE t SET v = v + 2 WHERE id = 1").unwrap_err();
        waiting.join().unwrap().1.unwrap();
        error
    });
}

// What psql shows.

#[test]
fn transcript_with_notices_and_tags_is_the_same() {
    let script = r"
        \set VERBOSITY verbose
        DO $$ BEGIN RAISE WARNING 'before' USING ERRCODE = 'SW002', DETAIL = 'd', HINT = 'h'; END $$;
        UPDATE t SET v = v + 1 RETURNING id, v;
        UPDATE triggered SET v = 100;
        SELECT write_and_complain();
        UPDATE t SET v = v / (id - 5);
        UPDATE t SET v = 11 WHERE id = 2;
        BEGIN; DECLARE c CURSOR FOR SELECT * FROM t ORDER BY id FOR UPDATE; FETCH 2 FROM c;
        UPDATE t SET v = v + 1 WHERE CURRENT OF c; COMMIT;
        TRUNCATE child, later; DELETE FROM t WHERE id > 2; SELECT * FROM t ORDER BY id;
        PREPARE p (int) AS UPDATE t SET v = $1 WHERE id = 1; EXECUTE p(2000); EXECUTE p(7);
        \gdesc
        SELECT * FROM no_such_table;
    ";
    let servers = servers();
    let mut expected = None;
    for (name, db) in databases() {
        let server = match name {
            "without the library" => &servers.without,
            "covered, our hooks first" => &servers.hooks_first,
            "covered, our hooks last" => &servers.hooks_last,
            _ => Server::shared(),
        };
        let transcript = server.psql(&db.name, "postgres", script);
        assert!(transcript.contains("SW001") && transcript.contains("23514"));
        match &expected {
            None => expected = Some(transcript),
            Some(expected) => assert_eq!(&transcript, expected, "{name}"),
        }
    }
}

// Our own refusal.

/// A database with a table of ten rows of which three may be changed at once.
fn guarded(server: &Server) -> Database {
    let db = server.database();
    db.admin()
        .batch_execute(
            "CREATE TABLE t AS SELECT n AS id, ''::text AS note FROM generate_series(1, 10) AS n;
             ANALYZE t;
             GRANT SELECT, UPDATE, DELETE, TRUNCATE ON t TO PUBLIC;
             SELECT writeguard.set_policy('three', tables => '{public.t}', max_rows => 3)",
        )
        .unwrap();
    db
}

#[track_caller]
fn assert_is_refusal(refusal: &Refusal) {
    assert_eq!(refusal.sqlstate, "WG001", "{refusal:?}");
    assert_eq!((&*refusal.schema, &*refusal.table), ("public", "t"));
    for words in ["\"three\"", "3 rows", "number 4", "about 10 rows"] {
        assert!(refusal.detail.contains(words), "{words} in {refusal:?}");
    }
    assert!(refusal.message.contains("public.t"), "{refusal:?}");
    assert!(refusal.hint.starts_with("SELECT writeguard.request("), "{refusal:?}");
}

#[test]
fn refusal_has_all_its_fields() {
    let db = guarded(Server::shared());
    let refusal = expect_refusal(db.admin().batch_execute("UPDATE t SET note = 'x'"));
    assert_is_refusal(&refusal);
    assert_eq!(refusal.context, "");
    assert_eq!(refusal.position, None);
}

#[test]
fn refusal_has_all_its_fields_beside_other_libraries() {
    for server in [&servers().hooks_first, &servers().hooks_last] {
        let db = guarded(server);
        let refusal = expect_refusal(db.admin().batch_execute("UPDATE t SET note = 'x'"));
        assert_is_refusal(&refusal);
        let mut admin = db.admin();
        admin.batch_execute("UPDATE t SET note = 'x' WHERE id <= 3").unwrap();
        let rows = admin.query("SELECT FROM t WHERE note = 'x'", &[]).unwrap();
        assert_eq!(rows.len(), 3);
    }
}

#[test]
fn refusal_in_a_function_has_the_context_of_the_function() {
    let db = guarded(Server::shared());
    let mut admin = db.admin();
    admin
        .batch_execute("CREATE FUNCTION f() RETURNS void LANGUAGE plpgsql AS $$ BEGIN UPDATE t SET note = 'x'; END $$")
        .unwrap();
    let refusal = expect_refusal(admin.batch_execute("SELECT f()"));
    assert_is_refusal(&refusal);
    assert_eq!(
        refusal.context,
        "SQL statement \"UPDATE t SET note = 'x'\"\nPL/pgSQL function f() line 1 at SQL statement"
    );
}

#[test]
fn refusal_can_be_caught_with_all_its_fields() {
    let db = guarded(Server::shared());
    let mut admin = db.admin();
    let refusal = expect_refusal(admin.batch_execute(
        "DO $$
         DECLARE state text; message text; detail text; hint text; a text; b text;
         BEGIN
             UPDATE t SET note = 'x';
         EXCEPTION WHEN SQLSTATE 'WG001' THEN
             GET STACKED DIAGNOSTICS state = RETURNED_SQLSTATE, message = MESSAGE_TEXT,
                 detail = PG_EXCEPTION_DETAIL, hint = PG_EXCEPTION_HINT, a = SCHEMA_NAME, b = TABLE_NAME;
             RAISE USING ERRCODE = state, MESSAGE = message, DETAIL = detail, HINT = hint, SCHEMA = a, TABLE = b;
         END $$",
    ));
    assert_is_refusal(&refusal);
}

#[test]
fn refusal_leaves_the_session_usable() {
    let db = guarded(Server::shared());
    let mut client = db.admin();
    let prepared = client.prepare("UPDATE t SET note = $1").unwrap();
    for _ in 0..10 {
        assert_is_refusal(&expect_refusal(client.execute(&prepared, &[&"x"])));
        assert_is_refusal(&expect_refusal(client.batch_execute("UPDATE t SET note = 'x'")));
        assert_eq!(client.execute("UPDATE t SET note = 'y' WHERE id <= 3", &[]).unwrap(), 3);
        let mut transaction = client.transaction().unwrap();
        transaction.execute("UPDATE t SET note = 'z' WHERE id > 8", &[]).unwrap();
        let mut savepoint = transaction.transaction().unwrap();
        assert_is_refusal(&expect_refusal(savepoint.batch_execute("UPDATE t SET note = 'x'")));
        savepoint.rollback().unwrap();
        transaction.commit().unwrap();
    }
    let notes: String =
        client.query_one("SELECT string_agg(DISTINCT note, ',' ORDER BY note) FROM t", &[]).unwrap().get(0);
    assert_eq!(notes, ",y,z");
}

#[test]
fn ten_thousand_refusals_do_not_make_the_session_grow() {
    let db = guarded(Server::shared());
    let mut client = db.admin();
    // Memory of the backend's own, in kB, after one half and after the other.
    let grown: i32 = {
        client
            .batch_execute(
                "CREATE FUNCTION own_memory() RETURNS int LANGUAGE sql VOLATILE AS $$
                     SELECT substring(pg_read_file('/proc/self/status') FROM 'RssAnon:\\s+(\\d+) kB')::int
                 $$;
                 CREATE FUNCTION insist() RETURNS int LANGUAGE plpgsql AS $$
                 DECLARE
                     refused int := 0;
                     halfway int;
                 BEGIN
                     FOR round IN 1..10000 LOOP
                         BEGIN
                             UPDATE t SET note = 'x';
                         EXCEPTION WHEN SQLSTATE 'WG001' THEN
                             refused := refused + 1;
                         END;
                         IF round = 5000 THEN halfway := own_memory(); END IF;
                     END LOOP;
                     ASSERT refused = 10000;
                     RETURN own_memory() - halfway;
                 END $$",
            )
            .unwrap();
        client.query_one("SELECT insist()", &[]).unwrap().get(0)
    };
    assert!(grown < 1024, "{grown} kB");
}

// People without rights.

#[test]
fn role_without_any_right_connects_and_selects() {
    let db = guarded(Server::shared());
    let nobody = db.role("nobody");
    db.admin().batch_execute("REVOKE ALL ON SCHEMA public, writeguard FROM PUBLIC").unwrap();
    let one: i32 = db.connect(&nobody).query_one("SELECT 1", &[]).unwrap().get(0);
    assert_eq!(one, 1);
}

#[test]
fn role_without_any_right_on_the_extension_writes_its_own_tables() {
    let db = guarded(Server::shared());
    let nobody = db.role("nobody");
    db.admin()
        .batch_execute(&format!(
            "REVOKE ALL ON SCHEMA public, writeguard FROM PUBLIC;
             REVOKE ALL ON ALL FUNCTIONS IN SCHEMA writeguard FROM PUBLIC;
             REVOKE ALL ON ALL TABLES IN SCHEMA writeguard FROM PUBLIC;
             CREATE SCHEMA AUTHORIZATION {nobody}"
        ))
        .unwrap();
    let mut client = db.connect(&nobody);
    client
        .batch_execute(
            "CREATE TABLE free AS SELECT n AS id FROM generate_series(1, 10) AS n;
             CREATE TABLE covered AS TABLE free;
             UPDATE free SET id = id + 1;
             DELETE FROM free;
             TRUNCATE free",
        )
        .unwrap();
    db.admin()
        .batch_execute(&format!("SELECT writeguard.set_policy('own', tables => '{{{nobody}.covered}}', max_rows => 3)"))
        .unwrap();
    client.batch_execute("UPDATE covered SET id = id + 1 WHERE id <= 3").unwrap();
    let refusal = expect_refusal(client.batch_execute("DELETE FROM covered"));
    assert_eq!(refusal.sqlstate, "WG001");
    let blocked =
        db.admin().query("SELECT FROM writeguard.event WHERE kind = 'blocked' AND login = $1", &[&nobody]).unwrap();
    assert_eq!(blocked.len(), 1);
}

#[test]
fn role_without_privilege_on_the_table_is_refused_by_postgresql_itself() {
    let db = guarded(Server::shared());
    let nobody = db.role("nobody");
    let mut admin = db.admin();
    admin
        .batch_execute(
            "REVOKE ALL ON t FROM PUBLIC;
             SELECT writeguard.set_policy('three', tables => '{public.t}', max_rows => 0, override => 'never')",
        )
        .unwrap();
    let mut client: Client = db.connect(&nobody);
    for statement in [
        "UPDATE t SET note = 'x'",
        "DELETE FROM t",
        "TRUNCATE t",
        "WITH w AS (DELETE FROM t RETURNING 1) SELECT count(*) FROM w",
    ] {
        let refusal = expect_refusal(client.batch_execute(statement));
        assert_eq!(refusal.sqlstate, "42501", "{statement}");
        assert_eq!(refusal.message, "permission denied for table t");
        assert_eq!((&*refusal.detail, &*refusal.hint), ("", ""));
    }
    let events = admin.query("SELECT FROM writeguard.event WHERE login = $1", &[&nobody]).unwrap();
    assert_eq!(events.len(), 0);
}

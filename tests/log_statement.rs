//! `writeguard.log_statement`: what is told of a statement, in events and in the server log.

use std::sync::OnceLock;

use crate::common::{Database, Server, expect_refusal, wait_until};
use postgres::Client;

/// A server that tells this of statements.
fn telling(value: &'static str) -> &'static Server {
    static NORMALIZED: OnceLock<Server> = OnceLock::new();
    static NONE: OnceLock<Server> = OnceLock::new();
    let server = if value == "none" { &NONE } else { &NORMALIZED };
    server.get_or_init(|| {
        Server::start(&[
            "shared_preload_libraries = 'pg_stat_statements,pg_writeguard'",
            &format!("writeguard.log_statement = '{value}'"),
            // What PostgreSQL itself writes of a failed statement is not ours to leave out.
            "log_min_error_statement = panic",
        ])
    })
}

/// A database with tables that have six rows, and limits of two rows that a token, the flag and nothing lifts.
fn guarded(server: &Server) -> Database {
    let db = server.database();
    db.admin()
        .batch_execute(
            "CREATE TABLE t (id int PRIMARY KEY, name text);
             INSERT INTO t SELECT i, 'name ' || i FROM generate_series(1, 6) AS i;
             CREATE TABLE flagged AS TABLE t;
             CREATE TABLE watched AS TABLE t;
             CREATE TABLE bare AS TABLE t;
             GRANT ALL ON t, flagged, watched TO PUBLIC;
             SELECT writeguard.set_policy('p', tables => '{public.t}', max_rows => 2, override => 'token');
             SELECT writeguard.set_policy('f', tables => '{public.flagged}', max_rows => 2, override => 'flag');
             SELECT writeguard.set_policy('w', tables => '{public.watched}', max_rows => 2, mode => 'observe');
             SELECT writeguard.set_policy('b', tables => '{public.bare}', max_rows => 2)",
        )
        .unwrap();
    db
}

/// The statement of the last event of a kind.
fn told(db: &Database, kind: &str) -> Option<String> {
    let sql = "SELECT statement FROM writeguard.event WHERE kind = $1 ORDER BY id DESC LIMIT 1";
    let mut reader = db.admin();
    wait_until(20, || !reader.query(sql, &[&kind]).unwrap().is_empty());
    reader.query_one(sql, &[&kind]).unwrap().get(0)
}

fn requester(db: &Database) -> Client {
    db.connect(&db.role("requester"))
}

/// Sets off an event of each kind that has a statement, each with the value that is to be found or not.
fn everything_happens(db: &Database, secret: &str) {
    let mut client = requester(db);
    let write = format!("UPDATE t SET name = '{secret}' /* {secret} */ WHERE id < 10");
    expect_refusal(client.batch_execute(&write));
    let request: i64 = client.query_one("SELECT writeguard.request($1, 'why')", &[&write]).unwrap().get(0);
    let mut admin = db.admin();
    let token: String = admin.query_one("SELECT writeguard.approve($1)", &[&request]).unwrap().get(0);
    let refused = format!("UPDATE t SET name = '{secret} again' WHERE id < 10");
    client.batch_execute(&format!("SET writeguard.override = on; SET writeguard.token = '{token}'")).unwrap();
    assert_eq!(expect_refusal(client.batch_execute(&refused)).sqlstate, "WG006");
    client.batch_execute("SET writeguard.override = on").unwrap();
    client.batch_execute(&format!("UPDATE flagged SET name = '{secret}'")).unwrap();
    client.batch_execute(&format!("UPDATE watched SET name = '{secret}'")).unwrap();
    client.batch_execute("SET writeguard.expect_rows = 1").unwrap();
    expect_refusal(client.batch_execute(&format!("UPDATE watched SET name = '{secret}' WHERE id < 3")));
    admin.query("SELECT writeguard.revoke($1, 'no')", &[&request]).unwrap();
    let again: i64 = client.query_one("SELECT writeguard.request($1, 'why')", &[&write]).unwrap().get(0);
    admin.query("SELECT writeguard.reject($1, 'no')", &[&again]).unwrap();
    admin.query("SELECT writeguard.break_glass($1, 'fire')", &[&write]).unwrap();
    admin.batch_execute("SET writeguard.enabled = off").unwrap();
    admin.batch_execute(&format!("UPDATE bare SET name = '{secret}'")).unwrap();
    admin.batch_execute("RESET writeguard.enabled").unwrap();
    admin.batch_execute(&format!("ALTER TABLE bare ADD COLUMN more text DEFAULT '{secret}', DROP COLUMN id")).unwrap();
}

const KINDS: [&str; 12] = [
    "blocked",
    "requested",
    "approved",
    "token_refused",
    "overridden",
    "observed",
    "expectation_failed",
    "revoked",
    "rejected",
    "break_glass",
    "disabled",
    "uncovered",
];

#[test]
fn everything_is_told_unless_it_is_said_otherwise() {
    let db = guarded(Server::shared());
    everything_happens(&db, "plain-value");
    for kind in KINDS {
        let told = told(&db, kind).unwrap_or_else(|| panic!("{kind} has no statement"));
        assert!(told.contains("plain-value"), "{kind}: {told}");
    }
    db.drop();
}

#[test]
fn values_are_left_out_of_every_event() {
    let server = telling("normalized");
    let db = guarded(server);
    everything_happens(&db, "hidden-value");
    for kind in KINDS {
        let told = told(&db, kind).unwrap_or_else(|| panic!("{kind} has no statement"));
        assert!(told.contains("$1") && !told.contains("hidden-value"), "{kind}: {told}");
    }
    assert_eq!(told(&db, "blocked").as_deref(), Some("UPDATE t SET name = $1   WHERE id < $2"));
    let sql = "SELECT count(*) FROM writeguard.event AS e WHERE to_jsonb(e)::text LIKE '%hidden-value%'";
    assert_eq!(db.admin().query_one(sql, &[]).unwrap().get::<_, i64>(0), 0);
    assert!(!server.log().contains("hidden-value"), "{}", server.log());
    db.drop();
}

#[test]
fn no_statement_is_told_at_all() {
    let server = telling("none");
    let db = guarded(server);
    everything_happens(&db, "unsaid-value");
    for kind in KINDS {
        assert_eq!(told(&db, kind), None, "{kind}");
    }
    assert!(!server.log().contains("unsaid-value"), "{}", server.log());
    db.drop();
}

/// An event that does not have the statement is no request; the hint does not say that it is.
#[test]
fn a_request_needs_the_statement() {
    for (value, lacks) in [("normalized", "was kept without its values"), ("none", "was not kept")] {
        let db = guarded(telling(value));
        let mut client = requester(&db);
        let refusal = expect_refusal(client.batch_execute("UPDATE t SET name = 'x'"));
        assert_eq!(refusal.hint, "SELECT writeguard.request('…', reason => 'why this is right');");
        let event: i64 = client.query_one("SELECT max(id) FROM writeguard.my_events", &[]).unwrap().get(0);
        let refusal =
            expect_refusal(client.query("SELECT writeguard.request(event => $1, reason => 'why')", &[&event]));
        assert_eq!(refusal.sqlstate, "WG007");
        assert_eq!(refusal.message, format!("the statement of event {event} {lacks}"));
        assert_eq!(refusal.hint, "SELECT writeguard.request('…', reason => 'why this is right');");
        db.drop();
    }
}

/// A statement that has no values is all there.
#[test]
fn a_statement_without_values_can_be_requested_by_its_event() {
    let db = guarded(telling("normalized"));
    let mut client = requester(&db);
    expect_refusal(client.batch_execute("DELETE FROM t"));
    let event: i64 = client.query_one("SELECT max(id) FROM writeguard.my_events", &[]).unwrap().get(0);
    client.query_one("SELECT writeguard.request(event => $1, reason => 'why')", &[&event]).unwrap();
    let text: String = db.admin().query_one("SELECT statement FROM writeguard.pending", &[]).unwrap().get(0);
    assert_eq!(text, "DELETE FROM t");
    db.drop();
}

#[test]
fn a_reload_is_enough() {
    let server = Server::start(&[]);
    let db = guarded(&server);
    let mut client = db.admin();
    for (value, expected) in [
        ("normalized", Some("DELETE FROM t WHERE id < $1")),
        ("none", None),
        ("full", Some("DELETE FROM t WHERE id < 10")),
    ] {
        client.batch_execute(&format!("ALTER SYSTEM SET writeguard.log_statement = '{value}'")).unwrap();
        client.batch_execute("SELECT pg_reload_conf()").unwrap();
        wait_until(20, || client.query_one("SHOW writeguard.log_statement", &[]).unwrap().get::<_, String>(0) == value);
        expect_refusal(client.batch_execute("DELETE FROM t WHERE id < 10"));
        assert_eq!(told(&db, "blocked").as_deref(), expected);
    }
    let role = db.role("limited");
    let refusal = expect_refusal(db.connect(&role).batch_execute("SET writeguard.log_statement = 'none'"));
    assert_eq!(refusal.sqlstate, "55P02");
    db.drop();
}

/// Constants are what PostgreSQL's scanner says, as pg_stat_statements shows it.
#[test]
fn constants_are_those_of_postgresql() {
    let db = guarded(telling("normalized"));
    let mut client = db.admin();
    client.batch_execute("CREATE EXTENSION pg_stat_statements").unwrap();
    for (number, condition) in [
        "name <> 'a''b'",
        "name <> E'a\\'b' AND id < 1.5e3",
        "name <> $$a'b$$ OR name <> $x$ $$ ' $x$",
        "name <> U&'\\0041'",
        "name <> N'a' AND id < .5e+3 AND id < 100.",
        "B'01' <> X'1f' AND id<7 AND 8>id",
        "name <> 'a'\n   'b' AND name <> E'c'\n '\\'d'",
        "name <> 'é' AND name <> '日本''語' AND id <> 10",
        "(array[id, 2])[1:2] <> '{3}' AND name LIKE 'x%' IS NOT NULL",
        "id > 0 AND name <> '/* no comment */ -- none'",
        "id > 0 AND \"name\" <> 'x' AND U&\"\\006eame\" <> 'y'",
        "id + 1 - 1 > 0 AND name <> 'a' || 'b'",
        "id::numeric > 0.0 AND interval '1 day' < '2 days'",
    ]
    .into_iter()
    .enumerate()
    {
        client.batch_execute(&format!("UPDATE watched SET id = id WHERE {condition}")).unwrap();
        let sql = "SELECT e.statement, s.query FROM writeguard.event AS e JOIN pg_stat_statements AS s
                   ON s.queryid = e.query_id WHERE e.kind = 'observed' ORDER BY e.id";
        let mut pairs = Vec::new();
        wait_until(20, || {
            pairs = client.query(sql, &[]).unwrap();
            pairs.len() > number
        });
        let pair: (String, String) = (pairs[number].get(0), pairs[number].get(1));
        assert_eq!(pair.0, pair.1);
    }
    db.drop();
}

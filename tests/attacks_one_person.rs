//! Nobody has another person decide without that person's own statement: whatever calls the functions of an approval from
//! inside of something else is refused, and the request is as it was. Judged from a second connection.

use crate::common::Refusal;
use crate::common::approvals::*;
use postgres::Client;

/// A request that the requester wants to see approved, and who may approve is to run into it.
struct Trap {
    stage: Stage,
    id: i64,
}

impl Trap {
    fn new() -> Trap {
        let mut stage = Stage::new("");
        let (requester, approver) = (stage.requester.clone(), stage.approver.clone());
        pass(
            &mut stage.admin,
            &format!(
                "GRANT EXECUTE ON FUNCTION writeguard.approve, writeguard.reject, writeguard.revoke,
                     writeguard.break_glass TO {requester}, {approver};
                 GRANT ALL ON SCHEMA public TO {requester};
                 GRANT pg_write_server_files, pg_execute_server_program TO {approver}"
            ),
        );
        let id = request(&mut stage.requester(), WRITE, &[]);
        Trap { stage, id }
    }

    /// What the attacker prepares, `$id` for the request, `$call` for its approval.
    #[track_caller]
    fn fill(&self, sql: &str) -> String {
        sql.replace("$call", "writeguard.approve($id)").replace("$id", &self.id.to_string())
    }

    #[track_caller]
    fn lay(&self, sql: &str) {
        pass(&mut self.stage.requester(), &self.fill(sql));
    }

    #[track_caller]
    fn assert_pending(&mut self, what: &str) {
        assert_eq!(self.stage.state(self.id), "pending", "{what}");
        assert_eq!(self.stage.number("SELECT count(*) FROM writeguard.approval"), 0, "{what}");
    }

    /// Somebody does what they would do anyway.
    #[track_caller]
    fn springs(&mut self, mut victim: Client, sql: &str, refused: bool) {
        let sql = self.fill(sql);
        match victim.batch_execute(&sql) {
            Ok(()) => assert!(!refused, "{sql} passes"),
            Err(error) => {
                let refusal = Refusal::of(&error);
                assert_eq!(refusal.sqlstate, "WG006", "{sql}: {refusal:?}");
                assert!(refusal.message.contains("only as the client's own statement"), "{refusal:?}");
                assert!(refusal.hint.starts_with("SELECT "), "{refusal:?}");
            }
        }
        drop(victim);
        self.assert_pending(&sql);
    }
}

/// A function of the attacker's, in each language that anybody may write in.
const FUNCTION: &str = "CREATE FUNCTION f() RETURNS text LANGUAGE plpgsql AS 'BEGIN RETURN $call; END';
     CREATE FUNCTION g() RETURNS text LANGUAGE sql AS 'SELECT $call';
     CREATE FUNCTION h() RETURNS SETOF text LANGUAGE sql AS 'SELECT $call';
     CREATE FUNCTION b() RETURNS text LANGUAGE sql BEGIN ATOMIC SELECT $call; END;
     CREATE FUNCTION d(x text DEFAULT $call) RETURNS text LANGUAGE sql AS 'SELECT x';
     GRANT ALL ON FUNCTION f, g, h, b, d TO PUBLIC;";

#[test]
fn called_by_something_that_the_approver_uses_nothing_is_approved() {
    let traps: &[(&str, &str)] = &[
        (FUNCTION, "SELECT f()"),
        (FUNCTION, "SELECT g()"),
        (FUNCTION, "SELECT * FROM h()"),
        (FUNCTION, "SELECT b()"),
        (FUNCTION, "SELECT d()"),
        (FUNCTION, "SELECT count(*) FROM generate_series(1, 3) WHERE g() IS NOT NULL"),
        (FUNCTION, "PREPARE p AS SELECT g(); EXECUTE p"),
        (FUNCTION, "PREPARE p(text) AS SELECT $1; EXECUTE p(f())"),
        // The place in the dissolved function's text is one where the victim's own text has a call as well.
        (FUNCTION, "SELECT writeguard.approve(0), g()"),
        (
            "CREATE FUNCTION s() RETURNS text LANGUAGE sql SECURITY DEFINER AS 'SELECT $call'; GRANT ALL ON FUNCTION s TO PUBLIC",
            "SELECT s()",
        ),
        (
            "CREATE FUNCTION s() RETURNS text LANGUAGE sql SET search_path FROM CURRENT AS 'SELECT $call'; GRANT ALL ON FUNCTION s TO PUBLIC",
            "SELECT s()",
        ),
        (
            "CREATE FUNCTION s() RETURNS text LANGUAGE sql AS 'SELECT $call'; GRANT ALL ON FUNCTION s TO PUBLIC;
             ALTER FUNCTION s() SET work_mem = '8MB'",
            "SELECT s()",
        ),
        (
            "CREATE FUNCTION c() RETURNS text LANGUAGE plpgsql AS $$ DECLARE c CURSOR FOR SELECT $call; r text;
             BEGIN OPEN c; FETCH c INTO r; RETURN r; END $$",
            "SELECT c()",
        ),
        (
            "CREATE FUNCTION c() RETURNS text LANGUAGE plpgsql AS $$ DECLARE c CURSOR FOR SELECT $call; r text;
             BEGIN OPEN c; FETCH c INTO r; RETURN r; END $$",
            "PREPARE p(text) AS SELECT $1; EXECUTE p(c())",
        ),
        (
            "CREATE FUNCTION e() RETURNS text LANGUAGE plpgsql AS $$
             BEGIN EXECUTE 'PREPARE q AS SELECT $call'; EXECUTE 'EXECUTE q'; RETURN 'x'; END $$",
            "PREPARE p(text) AS SELECT $1; EXECUTE p(e())",
        ),
        // What a function prepared and the client executes.
        (
            "CREATE FUNCTION e() RETURNS text LANGUAGE plpgsql AS $$
             BEGIN EXECUTE 'DEALLOCATE p'; EXECUTE 'PREPARE p AS SELECT $call'; RETURN 'x'; END $$",
            "PREPARE p AS SELECT 1; SELECT e(); EXECUTE p",
        ),
        ("CREATE PROCEDURE p() LANGUAGE plpgsql AS 'BEGIN COMMIT; PERFORM $call; COMMIT; END'", "CALL p()"),
        ("CREATE PROCEDURE p(x text) LANGUAGE sql AS 'SELECT 1'", "CALL p($call)"),
        ("CREATE PROCEDURE p(x text DEFAULT $call) LANGUAGE sql AS 'SELECT 1'", "CALL p()"),
        ("CREATE VIEW v AS SELECT $call AS x; GRANT ALL ON v TO PUBLIC", "TABLE v"),
        ("CREATE VIEW v WITH (security_barrier) AS SELECT $call AS x; GRANT ALL ON v TO PUBLIC", "SELECT x FROM v"),
        ("CREATE VIEW v WITH (security_invoker) AS SELECT $call AS x; GRANT ALL ON v TO PUBLIC", "TABLE v"),
        ("CREATE TABLE u (x int, y text DEFAULT $call); GRANT ALL ON u TO PUBLIC", "INSERT INTO u VALUES (1)"),
        ("CREATE TABLE u (x int, y text DEFAULT $call); GRANT ALL ON u TO PUBLIC", "COPY u (x) FROM PROGRAM 'echo 1'"),
        (
            "CREATE TABLE u (x int); GRANT ALL ON u TO PUBLIC; CREATE RULE r AS ON INSERT TO u DO ALSO SELECT $call",
            "INSERT INTO u VALUES (1)",
        ),
        (
            "CREATE TABLE u (x int); GRANT ALL ON u TO PUBLIC; CREATE RULE r AS ON UPDATE TO u DO INSTEAD SELECT $call",
            "UPDATE u SET x = 1",
        ),
        (
            "CREATE TABLE u (x int); GRANT ALL ON u TO PUBLIC; INSERT INTO u VALUES (1);
             ALTER TABLE u ENABLE ROW LEVEL SECURITY; CREATE POLICY p ON u USING ($call IS NOT NULL)",
            "TABLE u",
        ),
        ("CREATE TABLE u (x int CHECK ($call IS NOT NULL)); GRANT ALL ON u TO PUBLIC", "INSERT INTO u VALUES (1)"),
        ("CREATE DOMAIN n AS int CHECK ($call IS NOT NULL)", "SELECT 1::n"),
        (
            "CREATE TABLE u (x int); GRANT ALL ON u TO PUBLIC;
             CREATE FUNCTION t() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM $call; RETURN NEW; END';
             CREATE TRIGGER t BEFORE INSERT ON u FOR EACH ROW EXECUTE FUNCTION t()",
            "INSERT INTO u VALUES (1)",
        ),
        (
            "CREATE TABLE u (x int); GRANT ALL ON u TO PUBLIC;
             CREATE FUNCTION t() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END';
             CREATE TRIGGER t BEFORE INSERT ON u FOR EACH ROW WHEN ($call IS NOT NULL) EXECUTE FUNCTION t()",
            "INSERT INTO u VALUES (1)",
        ),
        (
            "CREATE TABLE u (x int); GRANT ALL ON u TO PUBLIC;
             CREATE FUNCTION t() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM $call; RETURN NEW; END';
             CREATE CONSTRAINT TRIGGER t AFTER INSERT ON u DEFERRABLE INITIALLY DEFERRED FOR EACH ROW
             EXECUTE FUNCTION t()",
            "BEGIN; INSERT INTO u VALUES (1); COMMIT",
        ),
        (
            "CREATE TABLE u (x int); GRANT ALL ON u TO PUBLIC;
             CREATE FUNCTION o(int, int) RETURNS boolean LANGUAGE sql AS 'SELECT $call IS NOT NULL';
             CREATE OPERATOR <+> (LEFTARG = int, RIGHTARG = int, FUNCTION = o)",
            "SELECT 1 <+> 2",
        ),
        (
            "CREATE FUNCTION a(text, int) RETURNS text LANGUAGE sql AS 'SELECT $call';
             CREATE AGGREGATE ag(int) (SFUNC = a, STYPE = text)",
            "SELECT ag(x) FROM generate_series(1, 3) AS x",
        ),
        (
            "CREATE TYPE ty AS (x int);
             CREATE FUNCTION k(ty) RETURNS text LANGUAGE sql AS 'SELECT $call';
             CREATE CAST (ty AS text) WITH FUNCTION k(ty)",
            "SELECT ROW(1)::ty::text",
        ),
        (
            "CREATE FUNCTION i() RETURNS int LANGUAGE sql IMMUTABLE AS 'SELECT length($call)'; GRANT ALL ON FUNCTION i TO PUBLIC",
            "EXPLAIN SELECT i()",
        ),
        // Of the client's own, but no SELECT.
        ("", "DO $$ BEGIN PERFORM $call; END $$"),
        ("", "COPY (SELECT $call) TO '/dev/null'"),
        ("", "CREATE TEMP TABLE x AS SELECT $call"),
        ("", "SELECT $call INTO TEMP x"),
        ("", "EXPLAIN ANALYZE SELECT $call"),
        ("", "BEGIN; DECLARE c CURSOR FOR SELECT $call; FETCH c; COMMIT"),
        ("", "BEGIN; DECLARE c CURSOR WITH HOLD FOR SELECT $call; COMMIT"),
        ("", "CREATE TEMP TABLE x (x text); INSERT INTO x VALUES ($call)"),
        ("", "CREATE TEMP TABLE x (x text); INSERT INTO x SELECT $call"),
        ("", "WITH w AS (INSERT INTO t VALUES (99) RETURNING 1) SELECT $call FROM w"),
        ("", "PREPARE p AS SELECT $call; EXPLAIN ANALYZE EXECUTE p"),
        ("", "PREPARE p AS SELECT $call; CREATE TEMP TABLE x AS EXECUTE p"),
    ];
    for (prepared, sql) in traps {
        let mut trap = Trap::new();
        trap.lay(prepared);
        let victim = trap.stage.approver();
        trap.springs(victim, sql, !sql.starts_with("EXPLAIN SELECT"));
    }
}

#[test]
fn maintenance_approves_nothing() {
    let mut trap = Trap::new();
    trap.lay(
        "CREATE TABLE u (x int); INSERT INTO u SELECT generate_series(1, 9);
         CREATE FUNCTION f(x int) RETURNS int LANGUAGE plpgsql IMMUTABLE AS 'BEGIN RETURN x; END';
         CREATE INDEX ON u (f(x));
         CREATE OR REPLACE FUNCTION f(x int) RETURNS int LANGUAGE plpgsql IMMUTABLE AS
         'BEGIN PERFORM $call; RETURN x; END';
         CREATE MATERIALIZED VIEW m AS SELECT $call AS x WITH NO DATA",
    );
    for sql in
        ["ANALYZE u", "VACUUM (ANALYZE) u", "REINDEX TABLE u", "REFRESH MATERIALIZED VIEW m", "CLUSTER u USING u_f_idx"]
    {
        let victim = trap.stage.db.admin();
        trap.springs(victim, sql, true);
    }
}

#[test]
fn event_triggers_and_transactions_in_two_phases_approve_nothing() {
    let mut trap = Trap::new();
    let sql = trap.fill(
        "CREATE FUNCTION public.ev() RETURNS event_trigger LANGUAGE plpgsql AS 'BEGIN PERFORM $call; END';
         CREATE EVENT TRIGGER ev ON ddl_command_end EXECUTE FUNCTION public.ev()",
    );
    pass(&mut trap.stage.admin, &sql);
    let victim = trap.stage.approver();
    trap.springs(victim, "CREATE TEMP TABLE x ()", true);
    pass(&mut trap.stage.admin, "DROP EVENT TRIGGER ev");
    trap.lay(
        "CREATE TABLE u (x int); GRANT ALL ON u TO PUBLIC;
         CREATE FUNCTION t() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM $call; RETURN NEW; END';
         CREATE CONSTRAINT TRIGGER t AFTER INSERT ON u DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION t()",
    );
    let victim = trap.stage.approver();
    trap.springs(victim, "BEGIN; INSERT INTO u VALUES (1); PREPARE TRANSACTION 'two'", true);
    let victim = trap.stage.approver();
    trap.springs(victim, "BEGIN; INSERT INTO u VALUES (1); SET CONSTRAINTS ALL IMMEDIATE; COMMIT", true);
}

#[test]
fn a_statement_that_a_function_prepared_is_not_the_drivers_own() {
    let mut trap = Trap::new();
    trap.lay(
        "CREATE FUNCTION f() RETURNS void LANGUAGE plpgsql AS $$ BEGIN
           FOR n IN 0..9 LOOP EXECUTE format('PREPARE %I AS SELECT $call', 's' || n); END LOOP; END $$",
    );
    let mut victim = trap.stage.approver();
    pass(&mut victim, "SELECT f()");
    // The driver calls its statements s0, s1 and so on.
    let _ = victim.query("SELECT 1", &[]);
    let _ = victim.query("SELECT 2", &[]);
    drop(victim);
    trap.assert_pending("a driver's name");
}

#[test]
fn no_setting_changes_that_and_the_other_functions_are_alike() {
    let mut trap = Trap::new();
    let superuser = trap.stage.db.admin();
    trap.springs(
        superuser,
        "SET writeguard.enabled = off; SET writeguard.override = on; DO $$ BEGIN PERFORM $call; END $$",
        true,
    );
    for call in [
        "writeguard.reject($id)",
        "writeguard.revoke($id)",
        "writeguard.request('DELETE FROM t', 'why')",
        "writeguard.request(1::bigint, 'why')",
        "writeguard.execute($id)",
        "writeguard.break_glass('DELETE FROM t', 'why')",
        "writeguard.trust_key('k', 'x')",
        "writeguard.distrust_key('k')",
    ] {
        let superuser = trap.stage.db.admin();
        trap.springs(superuser, &format!("DO $$ BEGIN PERFORM {call}; END $$"), true);
        let superuser = trap.stage.db.admin();
        trap.springs(superuser, &format!("CREATE TEMP VIEW v AS SELECT count(*) FROM {call}; TABLE v"), true);
    }
    assert_eq!(trap.stage.number("SELECT count(*) FROM writeguard.request"), 1);
}

#[test]
fn a_clients_own_statement_approves() {
    for sql in [
        "SELECT writeguard.approve($id)",
        "select WRITEGUARD . \"approve\" ( request => $id ) as token",
        "SELECT * FROM writeguard.approve($id)",
        "select * from writeguard.approve($id) as result",
        "SELECT writeguard.approve($id, comment => 'seen', valid_for => '10 min'), now()",
        "SELECT writeguard.approve(max(id)) FROM writeguard.pending",
        "SELECT writeguard.approve((SELECT id FROM writeguard.pending LIMIT 1))",
        "SET search_path = writeguard; SELECT approve($id)",
        "BEGIN; SELECT writeguard.approve($id); COMMIT",
        "SELECT 1; SELECT writeguard.approve($id); SELECT 2",
        "PREPARE p AS SELECT writeguard.approve($id); EXECUTE p",
        "PREPARE p(bigint) AS SELECT writeguard.approve($1); EXECUTE p($id)",
    ] {
        let mut trap = Trap::new();
        let sql = trap.fill(sql);
        pass(&mut trap.stage.approver(), &sql);
        assert_eq!(trap.stage.state(trap.id), "approved", "{sql}");
    }
    let mut trap = Trap::new();
    let mut approver = trap.stage.approver();
    let statement = approver.prepare("SELECT writeguard.approve($1)").unwrap();
    approver.query_one(&statement, &[&trap.id]).unwrap();
    assert_eq!(trap.stage.state(trap.id), "approved");
    let mut trap = Trap::new();
    let other = trap.stage.db.role("other");
    let approver = trap.stage.approver.clone();
    pass(&mut trap.stage.admin, &format!("GRANT {approver} TO {other}"));
    pass(&mut trap.stage.db.connect(&other), &trap.fill(&format!("SET ROLE {approver}; SELECT $call")));
    assert_eq!(trap.stage.state(trap.id), "approved");
}

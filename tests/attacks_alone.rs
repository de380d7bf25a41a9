//! One person tries to approve alone: whatever a requester can make somebody else's session run must not approve, reject,
//! revoke, request, execute, break the glass or trust a key in that person's name.
//!
//! What counts is what another connection finds afterwards: the request is as it was, and there is no approval.

use crate::common::{Database, Server, expect_refusal, wait_until};
use postgres::Client;

/// A request that waits, by somebody who may make objects, and the approver, a superuser, in a session of his own.
struct Stage {
    db: Database,
    admin: Client,
    approver: Client,
    requester: String,
    id: i64,
}

impl Stage {
    fn new() -> Stage {
        let db = Server::shared().database();
        let requester = db.role("requester");
        let mut admin = db.admin();
        admin
            .batch_execute(&format!(
                "CREATE TABLE public.t (id int PRIMARY KEY, v int NOT NULL DEFAULT 0);
                 INSERT INTO public.t SELECT n FROM generate_series(1, 20) AS n;
                 GRANT ALL ON public.t TO {requester};
                 GRANT CREATE ON SCHEMA public TO {requester};
                 GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA writeguard TO {requester};
                 SELECT writeguard.set_policy('p', tables => '{{public.t}}', max_rows => 5)"
            ))
            .expect("the setup");
        let mut client = db.connect(&requester);
        let id = client
            .query_one("SELECT writeguard.request('UPDATE public.t SET v = 1', 'mine')", &[])
            .expect("a request")
            .get(0);
        let approver = db.admin();
        Stage { db, admin, approver, requester, id }
    }

    /// What the requester prepares: a function `evil()` that approves, and whatever `more` makes of it.
    fn prepare(&self, more: &str) {
        let mut client = self.db.connect(&self.requester);
        let evil = format!(
            "CREATE FUNCTION public.evil() RETURNS int LANGUAGE plpgsql AS $$ BEGIN
                 PERFORM writeguard.approve({id}); RETURN 1;
             EXCEPTION WHEN OTHERS THEN RETURN 0; END $$;
             CREATE FUNCTION public.evil_simply() RETURNS text LANGUAGE plpgsql AS $$ DECLARE a text; BEGIN
                 a := writeguard.approve({id}); RETURN a;
             EXCEPTION WHEN OTHERS THEN RETURN NULL; END $$;
             CREATE FUNCTION public.evil_sure(int) RETURNS int LANGUAGE plpgsql IMMUTABLE AS $$ BEGIN
                 RETURN public.evil(); END $$;
             CREATE FUNCTION public.evil_inline() RETURNS text LANGUAGE sql AS 'SELECT writeguard.approve({id})';
             CREATE FUNCTION public.evil_body() RETURNS text LANGUAGE sql BEGIN ATOMIC SELECT writeguard.approve({id}); END;
             CREATE FUNCTION public.evil_rows() RETURNS SETOF text LANGUAGE sql AS 'SELECT writeguard.approve({id})';
             CREATE FUNCTION public.evil_trigger() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
                 PERFORM public.evil(); RETURN new; END $$;
             CREATE TABLE public.bait (id int, v int DEFAULT 0);
             INSERT INTO public.bait SELECT n, 0 FROM generate_series(1, 100) AS n;",
            id = self.id
        );
        client.batch_execute(&evil).expect(&evil);
        let more = more.replace("$id", &self.id.to_string());
        client.batch_execute(&more).expect(&more);
    }

    fn assert_undecided(&mut self, what: &str) {
        let sql =
            "SELECT state || ' ' || (SELECT count(*) FROM writeguard.approval) FROM writeguard.request WHERE id = $1";
        let state: String = self.admin.query_one(sql, &[&self.id]).expect(sql).get(0);
        assert_eq!(state, "pending 0", "{what}");
        let events = "SELECT count(*) FROM writeguard.event WHERE kind IN ('approved', 'rejected', 'revoked')";
        let events: i64 = self.admin.query_one(events, &[]).expect(events).get(0);
        assert_eq!(events, 0, "{what}");
    }
}

/// What the requester makes, and what the approver then does without a thought of approving.
const WAYS: [(&str, &str); 34] = [
    ("", "SELECT public.evil()"),
    ("", "SELECT public.evil_simply()"),
    ("", "SELECT public.evil_sure(1)"),
    ("", "SELECT public.evil_inline()"),
    ("", "SELECT public.evil_body()"),
    ("", "SELECT * FROM public.evil_rows()"),
    ("", "DO $$ BEGIN PERFORM public.evil_inline(); EXCEPTION WHEN OTHERS THEN END $$"),
    ("CREATE INDEX ON public.bait (public.evil_sure(id))", "ANALYZE public.bait"),
    ("CREATE STATISTICS public.s ON (public.evil_sure(id)), v FROM public.bait", "ANALYZE public.bait"),
    ("CREATE INDEX i ON public.bait (public.evil_sure(id))", "REINDEX TABLE public.bait"),
    (
        "CREATE TRIGGER evil BEFORE INSERT ON public.bait FOR EACH ROW EXECUTE FUNCTION public.evil_trigger()",
        "INSERT INTO public.bait VALUES (1)",
    ),
    (
        "CREATE CONSTRAINT TRIGGER evil AFTER INSERT ON public.bait DEFERRABLE INITIALLY DEFERRED FOR EACH ROW
         EXECUTE FUNCTION public.evil_trigger()",
        "BEGIN; INSERT INTO public.bait VALUES (1); COMMIT",
    ),
    (
        "CREATE FUNCTION public.evil_when() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN new; END';
         CREATE TRIGGER evil BEFORE INSERT ON public.bait FOR EACH ROW WHEN (public.evil() = 2)
         EXECUTE FUNCTION public.evil_when()",
        "INSERT INTO public.bait VALUES (1)",
    ),
    ("CREATE VIEW public.v AS SELECT writeguard.approve($id) AS a", "SELECT * FROM public.v"),
    ("CREATE VIEW public.v WITH (security_barrier) AS SELECT writeguard.approve($id) AS a", "SELECT * FROM public.v"),
    ("CREATE VIEW public.v AS SELECT public.evil() AS a", "SELECT * FROM public.v"),
    ("ALTER TABLE public.bait ALTER v SET DEFAULT public.evil()", "INSERT INTO public.bait (id) VALUES (1)"),
    (
        "ALTER TABLE public.bait ADD w text; ALTER TABLE public.bait ALTER w SET DEFAULT writeguard.approve($id)",
        "INSERT INTO public.bait (id) VALUES (1)",
    ),
    ("ALTER TABLE public.bait ADD CHECK (public.evil_sure(id) < 9) NOT VALID", "INSERT INTO public.bait VALUES (1)"),
    ("CREATE DOMAIN public.d AS int CHECK (public.evil_sure(VALUE) < 9)", "SELECT 1::public.d"),
    (
        "ALTER TABLE public.bait ADD g int GENERATED ALWAYS AS (public.evil_sure(id)) STORED",
        "INSERT INTO public.bait VALUES (1)",
    ),
    (
        "CREATE RULE evil AS ON INSERT TO public.bait DO ALSO SELECT writeguard.approve($id)",
        "INSERT INTO public.bait VALUES (1)",
    ),
    (
        "CREATE RULE evil AS ON UPDATE TO public.bait DO INSTEAD SELECT writeguard.approve($id)",
        "UPDATE public.bait SET v = 1",
    ),
    ("CREATE OPERATOR public.@@@ (FUNCTION = public.evil_sure, RIGHTARG = int)", "SELECT OPERATOR(public.@@@) 1"),
    (
        "CREATE FUNCTION public.step(int, int) RETURNS int LANGUAGE sql AS 'SELECT public.evil()';
         CREATE AGGREGATE public.total(int) (SFUNC = public.step, STYPE = int)",
        "SELECT public.total(id) FROM public.bait",
    ),
    (
        "CREATE FUNCTION public.cursor() RETURNS refcursor LANGUAGE plpgsql AS
             $$ DECLARE c refcursor := 'c'; BEGIN OPEN c FOR SELECT writeguard.approve($id); RETURN c; END $$",
        "BEGIN; SELECT public.cursor(); FETCH ALL FROM c; COMMIT",
    ),
    (
        "CREATE FUNCTION public.looped() RETURNS int LANGUAGE plpgsql AS
             $$ DECLARE r record; BEGIN FOR r IN SELECT writeguard.approve($id) LOOP END LOOP; RETURN 1; END $$",
        "PREPARE p (int) AS SELECT $1; EXECUTE p (public.looped())",
    ),
    (
        "CREATE FUNCTION public.prepared() RETURNS int LANGUAGE plpgsql AS
             $$ BEGIN EXECUTE 'PREPARE x AS SELECT writeguard.approve($id)'; EXECUTE 'EXECUTE x'; RETURN 1; END $$",
        "SELECT public.prepared()",
    ),
    (
        "CREATE PROCEDURE public.proc() LANGUAGE plpgsql AS $$ BEGIN COMMIT; PERFORM writeguard.approve($id); COMMIT; END $$",
        "CALL public.proc()",
    ),
    (
        "CREATE PROCEDURE public.proc() LANGUAGE sql BEGIN ATOMIC SELECT writeguard.approve($id); END",
        "CALL public.proc()",
    ),
    ("CREATE MATERIALIZED VIEW public.m AS SELECT public.evil() WITH NO DATA", "REFRESH MATERIALIZED VIEW public.m"),
    (
        "ALTER TABLE public.bait ENABLE ROW LEVEL SECURITY; ALTER TABLE public.bait FORCE ROW LEVEL SECURITY;
         CREATE POLICY evil ON public.bait USING (public.evil() = 1)",
        "COPY public.bait TO '/dev/null'",
    ),
    (
        "CREATE TYPE public.pair AS (a int); CREATE FUNCTION public.to_int(public.pair) RETURNS int LANGUAGE sql AS
             'SELECT public.evil()'; CREATE CAST (public.pair AS int) WITH FUNCTION public.to_int(public.pair)",
        "SELECT ROW(1)::public.pair::int",
    ),
    (
        "CREATE FUNCTION public.parallel(int) RETURNS int LANGUAGE plpgsql PARALLEL SAFE AS
             $$ BEGIN RETURN public.evil(); END $$",
        "SET parallel_setup_cost = 0; SET parallel_tuple_cost = 0; SET min_parallel_table_scan_size = 0;
         SELECT sum(public.parallel(id)) FROM public.bait",
    ),
];

#[test]
fn nothing_that_somebody_else_has_prepared_approves() {
    for (prepared, done) in WAYS {
        let mut stage = Stage::new();
        stage.prepare(prepared);
        let _ = stage.approver.batch_execute(done);
        let _ = stage.approver.batch_execute("ROLLBACK");
        stage.assert_undecided(&format!("{prepared}\n{done}"));
    }
}

/// The body of a function that the planner puts into the client's own plan stands at a place where the client's text has a
/// call as well.
#[test]
fn a_body_at_the_place_of_an_own_call_is_not_taken_for_it() {
    let mut stage = Stage::new();
    stage.prepare("");
    let mut other = stage.db.connect(&stage.requester);
    let others: i64 = other
        .query_one("SELECT writeguard.request('UPDATE public.t SET v = 2', 'another')", &[])
        .expect("a request")
        .get(0);
    for done in [
        format!("SELECT writeguard.approve({others}), public.evil_inline()"),
        format!("SELECT writeguard.approve({others}), * FROM public.evil_rows()"),
        format!(
            "SELECT writeguard.approve({others}) FROM (SELECT public.evil_inline() AS a OFFSET 0) AS x WHERE a <> ''"
        ),
        "SELECT 'writeguard.approve(1)', public.evil_inline()".to_owned(),
        "SELECT /* writeguard.approve(1) */ public.evil_inline()".to_owned(),
    ] {
        let _ = stage.approver.batch_execute(&done);
        stage.assert_undecided(&done);
    }
    // Nor the call of another statement in the same string.
    let string = format!("SELECT writeguard.approve({others}); SELECT public.evil_inline()");
    let refusal = expect_refusal(stage.approver.batch_execute(&string));
    assert_eq!(refusal.sqlstate, "WG006", "{refusal:?}");
    stage.assert_undecided(&string);
}

#[test]
fn autovacuum_approves_nothing() {
    let server = Server::start(&["autovacuum = on", "autovacuum_naptime = 1s", "autovacuum_analyze_threshold = 1"]);
    let db = server.database();
    let requester = db.role("requester");
    let mut admin = db.admin();
    admin
        .batch_execute(&format!(
            "CREATE TABLE public.t (id int PRIMARY KEY, v int NOT NULL DEFAULT 0);
             INSERT INTO public.t SELECT n FROM generate_series(1, 20) AS n;
             GRANT ALL ON public.t TO {requester}; GRANT CREATE ON SCHEMA public TO {requester};
             GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA writeguard TO {requester};
             SELECT writeguard.set_policy('p', tables => '{{public.t}}', max_rows => 5)"
        ))
        .expect("the setup");
    let mut client = db.connect(&requester);
    let id: i64 = client
        .query_one("SELECT writeguard.request('UPDATE public.t SET v = 1', 'mine')", &[])
        .expect("a request")
        .get(0);
    client
        .batch_execute(&format!(
            "CREATE SEQUENCE public.runs;
             CREATE FUNCTION public.evil(int) RETURNS text LANGUAGE plpgsql IMMUTABLE AS $$ BEGIN
                 PERFORM nextval('public.runs');
                 RETURN writeguard.approve({id});
             EXCEPTION WHEN OTHERS THEN RETURN sqlstate; END $$;
             CREATE TABLE public.bait (id int);
             CREATE INDEX ON public.bait (public.evil(id));
             INSERT INTO public.bait SELECT generate_series(1, 500)"
        ))
        .expect("the bait");
    let runs = "SELECT last_value FROM public.runs";
    let before: i64 = admin.query_one(runs, &[]).expect(runs).get(0);
    wait_until(60, || admin.query_one(runs, &[]).expect(runs).get::<_, i64>(0) > before);
    wait_until(30, || {
        let analyzed = "SELECT count(*) FROM pg_stats WHERE tablename LIKE 'bait%'";
        admin.query_one(analyzed, &[]).expect(analyzed).get::<_, i64>(0) > 0
    });
    let state = "SELECT state || (SELECT count(*) FROM writeguard.approval) FROM writeguard.request";
    assert_eq!(admin.query_one(state, &[]).expect(state).get::<_, String>(0), "pending0");
}

/// Each function, called from where a client does not call it.
#[test]
fn none_of_the_functions_acts_below_the_clients_statement() {
    let mut stage = Stage::new();
    let calls = [
        "approve($id)",
        "reject($id)",
        "revoke($id)",
        "request('UPDATE public.t SET v = 3', 'why')",
        "request(event => 1, reason => 'why')",
        "execute($id)",
        "break_glass('UPDATE public.t SET v = 1', 'why')",
        "trust_key('k', E'-----BEGIN PUBLIC KEY-----\\nMCowBQYDK2VwAyEAGb9ECWmEzf6FQbrBZ9w7lshQhqowtrbLDFw4rXAxZuE=\\n-----END PUBLIC KEY-----')",
    ];
    for call in calls {
        let call = format!("writeguard.{}", call.replace("$id", &stage.id.to_string()));
        for around in [
            "DO $do$ BEGIN PERFORM $call; END $do$",
            "CREATE TABLE public.made AS SELECT ($call)::text AS a",
            "COPY (SELECT $call) TO '/dev/null'",
            "EXPLAIN ANALYZE SELECT $call",
            "BEGIN; DECLARE c CURSOR FOR SELECT $call; FETCH ALL FROM c; COMMIT",
            "BEGIN; DECLARE c CURSOR WITH HOLD FOR SELECT $call; COMMIT",
            "PREPARE x AS SELECT $call; EXPLAIN ANALYZE EXECUTE x",
            "INSERT INTO public.t (id, v) SELECT 100, length((SELECT ($call)::text LIMIT 1))",
            "UPDATE public.t SET v = length((SELECT ($call)::text LIMIT 1)) WHERE id = 1",
            "WITH w AS (UPDATE public.t SET v = 1 WHERE id = 1 RETURNING (SELECT ($call)::text LIMIT 1)) SELECT * FROM w",
        ] {
            let sql = around.replace("$call", &call);
            let refusal = expect_refusal(stage.approver.batch_execute(&sql));
            assert_eq!(refusal.sqlstate, "WG006", "{sql}: {refusal:?}");
            assert!(refusal.hint.contains("writeguard."), "{refusal:?}");
            let _ = stage.approver.batch_execute("ROLLBACK; DEALLOCATE ALL");
        }
    }
    stage.assert_undecided("all of them");
    let left = "SELECT (SELECT count(*) FROM writeguard.request) + (SELECT count(*) FROM writeguard.trusted_key)";
    assert_eq!(stage.admin.query_one(left, &[]).expect(left).get::<_, i64>(0), 1);
}

#[test]
fn a_function_that_the_approver_owns_approves_for_nobody() {
    let mut stage = Stage::new();
    let id = stage.id;
    stage
        .approver
        .batch_execute(
            "CREATE FUNCTION public.approves(bigint) RETURNS text LANGUAGE sql SECURITY DEFINER AS 'SELECT writeguard.approve($1)';
             CREATE FUNCTION public.approve_simply(bigint) RETURNS text LANGUAGE sql AS 'SELECT writeguard.approve($1)'",
        )
        .expect("functions");
    let mut requester = stage.db.connect(&stage.requester);
    for function in ["approves", "approve_simply"] {
        let refusal = expect_refusal(requester.batch_execute(&format!("SELECT public.{function}({id})")));
        assert_eq!(refusal.sqlstate, "WG006");
        let refusal = expect_refusal(stage.approver.batch_execute(&format!("SELECT public.{function}({id})")));
        assert_eq!(refusal.sqlstate, "WG006");
    }
    stage.assert_undecided("a wrapper");
}

#[test]
fn a_client_decides_in_whatever_way_it_sends_a_query() {
    let ways: [&str; 12] = [
        "SELECT writeguard.approve($id)",
        "select WRITEGUARD.Approve ( $id , comment => 'well' )",
        "SELECT * FROM writeguard.approve($id)",
        "SELECT \"writeguard\".\"approve\"(request => $id)",
        "SET search_path = writeguard, public; SELECT approve($id)",
        "SELECT 1; SELECT writeguard.approve($id) AS token; SELECT 2",
        "-- a comment\n/* another */ SELECT writeguard.approve($id)",
        "PREPARE p AS SELECT writeguard.approve($id); EXECUTE p",
        "PREPARE p (bigint) AS SELECT writeguard.approve($1); EXECUTE p ($id)",
        "BEGIN; SAVEPOINT s; SELECT writeguard.approve($id); RELEASE s; COMMIT",
        "SELECT writeguard.approve(id) FROM writeguard.pending WHERE id = $id",
        "WITH mine AS (SELECT max(id) AS id FROM writeguard.pending) SELECT writeguard.approve(id) FROM mine",
    ];
    for way in ways {
        let mut stage = Stage::new();
        let sql = way.replace("$id", &stage.id.to_string());
        stage.approver.batch_execute(&sql).expect(&sql);
        let state: String =
            stage.admin.query_one("SELECT state FROM writeguard.request", &[]).expect("the request").get(0);
        assert_eq!(state, "approved", "{sql}");
    }
    for way in ["SELECT writeguard.approve($1)", "SELECT * FROM writeguard.approve($1) AS result"] {
        let mut stage = Stage::new();
        for _ in 0..2 {
            // Prepared by the protocol, and run more than once.
            let prepared = stage.approver.prepare(way).expect(way);
            let _ = stage.approver.query(&prepared, &[&0_i64]).expect_err("no such request");
            let _ = stage.approver.query(&prepared, &[&stage.id]);
        }
        let state: String =
            stage.admin.query_one("SELECT state FROM writeguard.request", &[]).expect("the request").get(0);
        assert_eq!(state, "approved", "{way}");
    }
}

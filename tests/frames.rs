//! Other people's code that fails in the middle of our own work: a cast, a domain's check, a trigger, a constraint. Its error
//! comes out as it is, and the session goes on as if nothing had been tried, however often.

use crate::common::kept::{self, Bed};
use crate::common::{Refusal, expect_refusal};
use postgres::Client;

/// A table with a type whose cast to json fails when it is told to, a domain whose check does, and a trigger that does.
const SETUP: &str = "
    CREATE TABLE fails (what text);
    CREATE FUNCTION fail(whom text) RETURNS boolean LANGUAGE plpgsql AS $$
    BEGIN
      IF EXISTS (SELECT FROM public.fails WHERE what = whom) THEN
        RAISE EXCEPTION 'the % fails', whom USING ERRCODE = 'TW001', DETAIL = 'told to', CONSTRAINT = 'mine';
      END IF;
      RETURN true;
    END $$;
    CREATE TYPE shown AS ENUM ('a', 'b');
    CREATE FUNCTION to_json(shown) RETURNS json LANGUAGE plpgsql AS
      $$ BEGIN PERFORM public.fail('cast'); RETURN pg_catalog.to_json($1::text); END $$;
    CREATE CAST (shown AS json) WITH FUNCTION to_json(shown);
    CREATE DOMAIN checked AS int CHECK (public.fail('check'));
    CREATE TABLE t (id int PRIMARY KEY, s shown NOT NULL DEFAULT 'a', c checked, v int NOT NULL DEFAULT 0);
    CREATE FUNCTION noted() RETURNS trigger LANGUAGE plpgsql AS
      'BEGIN PERFORM public.fail(TG_ARGV[0]); RETURN NEW; END';
    CREATE TRIGGER noted BEFORE UPDATE ON t FOR EACH ROW EXECUTE FUNCTION noted('trigger');
    CREATE CONSTRAINT TRIGGER later AFTER UPDATE ON t DEFERRABLE INITIALLY DEFERRED
      FOR EACH ROW EXECUTE FUNCTION noted('deferred trigger');
    CREATE TABLE always (v int CHECK (public.fail('constraint')));
    INSERT INTO t SELECT i FROM generate_series(1, 20) AS i;
    UPDATE t SET c = 7;
    CREATE FUNCTION tell(text) RETURNS void LANGUAGE sql AS
      'DELETE FROM public.fails; INSERT INTO public.fails VALUES ($1)';";

struct Stage {
    bed: Bed,
    change: i64,
}

impl Stage {
    fn new() -> Stage {
        let mut bed = Bed::new(SETUP);
        bed.run("SELECT writeguard.set_policy('few', tables => '{public.t}', max_rows => 3, override => 'flag', undo => '1 day')");
        let change = bed.change("UPDATE t SET v = 1, c = 8 WHERE id <= 3");
        Stage { bed, change }
    }

    /// What we do that runs other people's code, and who of them fails.
    fn ways(&self) -> Vec<(&'static str, String)> {
        let change = self.change;
        vec![
            ("cast", "SELECT * FROM writeguard.preview('UPDATE public.t SET v = 2 WHERE id = 1')".into()),
            ("trigger", "SELECT * FROM writeguard.preview('UPDATE public.t SET v = 2 WHERE id = 1')".into()),
            ("deferred trigger", "SELECT * FROM writeguard.preview('UPDATE public.t SET v = 2 WHERE id = 1')".into()),
            ("check", "SELECT * FROM writeguard.preview('UPDATE public.t SET c = 2 WHERE id = 1')".into()),
            ("check", format!("SELECT * FROM writeguard.undo({change})")),
            ("check", format!("SELECT * FROM writeguard.undo({change}, dry_run => true)")),
            (
                "deferred trigger",
                format!("BEGIN; UPDATE t SET v = v WHERE id = 9; SELECT writeguard.undo({change}, dry_run => true)"),
            ),
            ("trigger", "SET LOCAL writeguard.override = on; UPDATE t SET v = 3".into()),
        ]
    }

    fn tell(&mut self, who: &str) {
        self.bed.reader.execute("SELECT tell($1)", &[&who]).expect("tells");
    }
}

#[track_caller]
fn number(client: &mut Client, sql: &str) -> i64 {
    client.query_one(sql, &[]).unwrap_or_else(|error| panic!("{sql}: {error:?}")).get(0)
}

fn fails(client: &mut Client, sql: &str) -> Refusal {
    let refusal = expect_refusal(client.batch_execute(sql));
    client.batch_execute("ROLLBACK").expect("rolls back");
    refusal
}

#[test]
fn their_error_comes_out_as_it_is_and_the_session_goes_on() {
    let mut stage = Stage::new();
    stage.bed.run("SET intervalstyle = 'iso_8601'; SET datestyle = 'German'; SET search_path = public, pg_catalog");
    let before = stage.bed.table("t");
    for (who, sql) in stage.ways() {
        stage.tell(who);
        let error = stage.bed.refused(&sql);
        assert_eq!(error.message, format!("the {who} fails"), "{sql}");
        let fields = (error.sqlstate.as_str(), error.detail.as_str(), error.constraint.as_str());
        assert_eq!(fields, ("TW001", "told to", "mine"), "{sql}");
        assert!(error.context.contains("fail(text)"), "{sql}: {error:?}");
        stage.bed.run("ROLLBACK");
        stage.tell("nobody");
        // Counted and refused as ever, rehearsed as ever, and nothing is left of what was set for our own work.
        let refusal = stage.bed.refused("UPDATE t SET v = 5");
        assert_eq!(refusal.sqlstate, "WG001", "{sql}");
        let admin = &mut stage.bed.admin;
        assert_eq!(number(admin, "SELECT rows FROM writeguard.preview('UPDATE t SET v = 5')"), 20, "{sql}");
        for (setting, value) in
            [("intervalstyle", "iso_8601"), ("datestyle", "German, DMY"), ("search_path", "public, pg_catalog")]
        {
            let shown: String = admin.query_one(&format!("SHOW {setting}"), &[]).expect("shows").get(0);
            assert_eq!(shown, value, "{sql}");
        }
        stage.bed.run("UPDATE t SET v = v WHERE id = 1");
        assert_eq!(stage.bed.table("t"), before, "{sql}");
    }
    assert_eq!(stage.bed.undo(&stage.change.to_string()), kept::one("public.t", 3, 0));
}

#[test]
fn the_same_inside_an_exception_block() {
    let mut stage = Stage::new();
    let change = stage.change;
    let ways = [
        ("cast", "SELECT count(*) FROM writeguard.preview('UPDATE public.t SET v = 2 WHERE id = 1')".to_owned()),
        ("check", format!("SELECT count(*) FROM writeguard.undo({change})")),
        ("check", format!("SELECT count(*) FROM writeguard.undo({change}, dry_run => true)")),
    ];
    for (who, sql) in ways {
        stage.tell(who);
        stage.bed.run(&format!(
            "DO $do$ DECLARE n int := 0; BEGIN
               FOR i IN 1..20 LOOP
                 BEGIN EXECUTE $sql${sql}$sql$; EXCEPTION WHEN SQLSTATE 'TW001' THEN n := n + 1; END;
               END LOOP;
               ASSERT n = 20;
               DELETE FROM public.fails;
               UPDATE public.t SET v = v WHERE id <= 3;
               BEGIN
                 UPDATE public.t SET v = 9 WHERE id <= 4;
                 RAISE 'it passed';
               EXCEPTION WHEN SQLSTATE 'WG001' THEN NULL; END;
             END $do$"
        ));
    }
    assert_eq!(stage.bed.undo(&change.to_string()), kept::one("public.t", 3, 0));
}

/// Of the session's memory: PostgreSQL's, and the process's own.
fn memory(client: &mut Client) -> (i64, i64) {
    (
        number(client, "SELECT sum(total_bytes)::bigint FROM pg_backend_memory_contexts"),
        number(
            client,
            r"SELECT 1024 * substring(pg_read_file('/proc/self/status') FROM 'RssAnon:\s+(\d+) kB')::bigint",
        ),
    )
}

#[test]
fn a_thousand_times_leave_the_session_as_large_as_it_was() {
    let times: usize = std::env::var("PGWG_TIMES").ok().and_then(|times| times.parse().ok()).unwrap_or(1_000);
    let mut stage = Stage::new();
    let ways = stage.ways();
    let each = times / ways.len();
    let mut memories = Vec::new();
    // The first round is for what is made once.
    for _ in 0..3 {
        for (who, sql) in &ways {
            stage.tell(who);
            for _ in 0..each {
                fails(&mut stage.bed.admin, sql);
            }
        }
        memories.push(memory(&mut stage.bed.admin));
    }
    let (contexts, process) = (memories[2].0 - memories[1].0, memories[2].1 - memories[1].1);
    assert!(contexts < 100_000 && process < 300_000, "{memories:?}");
}

//! The operation `drop` under attack: whichever way DDL takes rows away is counted once, recorded once and undone
//! whole, and DDL that takes none away is left alone.

use crate::common::limits::{Bed, SIX, contents, number, pass};
use crate::common::{Refusal, Server, expect_refusal, wait_until};
use postgres::Client;

const FLUSH: &str = "CREATE SCHEMA flush; CREATE TABLE flush.here AS SELECT 1 AS id;";

const TREE: &str = "
    CREATE TABLE t (id int, v int) PARTITION BY RANGE (id);
    CREATE TABLE t1 PARTITION OF t FOR VALUES FROM (1) TO (7);
    INSERT INTO t SELECT i, 0 FROM generate_series(1, 6) AS i;";

const CHILD: &str = "
    CREATE TABLE t (id int, v int);
    CREATE TABLE t1 (w int) INHERITS (t);
    INSERT INTO t1 SELECT i, 0, 0 FROM generate_series(1, 6) AS i;";

/// A bed with a table apart, whose refusals tell that all earlier events are stored.
#[track_caller]
fn bed(setup: &str) -> Bed {
    let mut bed = Bed::new(&format!("{FLUSH} {setup}"));
    pass(
        &mut bed.reader,
        "SELECT writeguard.set_policy('flush', tables => '{flush.here}', operations => '{delete}', max_rows => 0)",
    );
    bed
}

/// Lets a statement drop, or whatever counts as that, so many rows of these tables.
#[track_caller]
fn limit(bed: &mut Bed, tables: &str, rows: u64) {
    bed.policy(&format!("tables => '{tables}', operations => '{{drop}}', max_rows => {rows}"));
}

/// Every relation and column outside the system's schemas, with its place in the inheritance tree.
fn definitions(client: &mut Client) -> Vec<String> {
    client
        .query(
            "SELECT concat_ws(' ', c.oid, n.nspname, c.relname, c.relfilenode, a.attname, a.atttypid, a.attisdropped,
                              (SELECT string_agg(i::text, ',') FROM pg_inherits i WHERE i.inhrelid = c.oid))
             FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace JOIN pg_attribute a ON a.attrelid = c.oid
             WHERE n.nspname !~ '^(pg_|information_schema|writeguard)' AND c.relkind IN ('r', 'p', 'c')
             ORDER BY c.oid, a.attnum",
            &[],
        )
        .expect("cannot read the catalog")
        .iter()
        .map(|row| row.get(0))
        .collect()
}

/// Fails with that SQLSTATE and leaves everything as it was.
#[track_caller]
fn fails(bed: &mut Bed, sql: &str, sqlstate: &str) -> Refusal {
    let before = (definitions(&mut bed.reader), contents(&mut bed.reader));
    let refusal = expect_refusal(bed.writer.batch_execute(sql));
    let _ = bed.writer.batch_execute("ROLLBACK");
    assert_eq!(refusal.sqlstate, sqlstate, "{sql}: {refusal:?}");
    let after = (definitions(&mut bed.reader), contents(&mut bed.reader));
    assert_eq!(after, before, "{sql}: refused, but not undone");
    refusal
}

#[track_caller]
fn refused(bed: &mut Bed, sql: &str) -> Refusal {
    fails(bed, sql, "WG005")
}

/// Refused where the limit on `tables` is one row less, and passes where it is `rows`.
#[track_caller]
fn assert_drop(bed: &mut Bed, tables: &str, sql: &str, rows: u64) -> Refusal {
    limit(bed, tables, rows - 1);
    let refusal = refused(bed, sql);
    limit(bed, tables, rows);
    let before = definitions(&mut bed.reader);
    bed.passes(sql);
    assert_ne!(definitions(&mut bed.reader), before, "{sql}: passed, but changed nothing");
    refusal
}

/// Relation and statement of every stored event of a kind, after all that was queued is stored.
#[track_caller]
fn events(bed: &mut Bed, kind: &str) -> Vec<(String, String)> {
    let stored = "SELECT count(*) FROM writeguard.event WHERE kind = 'blocked' AND policy = 'flush'";
    let before = number(&mut bed.reader, stored);
    expect_refusal(bed.reader.batch_execute("DELETE FROM flush.here"));
    wait_until(20, || number(&mut bed.reader, stored) > before);
    bed.reader
        .query(
            "SELECT relation, statement FROM writeguard.event
             WHERE kind = $1 AND policy IS DISTINCT FROM 'flush' ORDER BY id",
            &[&kind],
        )
        .expect("the events")
        .iter()
        .map(|row| (row.get(0), row.get(1)))
        .collect()
}

/// The relations of the events of DDL that no policy limits.
#[track_caller]
fn uncovered(bed: &mut Bed) -> Vec<String> {
    events(bed, "uncovered").into_iter().map(|(relation, _)| relation).collect()
}

fn is_there(bed: &mut Bed, relation: &str) -> bool {
    number(&mut bed.reader, &format!("SELECT (to_regclass('{relation}') IS NOT NULL)::int")) == 1
}

#[test]
fn whatever_a_dropped_object_takes_along_counts() {
    let mut bed = bed("
        CREATE TYPE addr AS (street text, zip text);
        CREATE TABLE typed OF addr;
        INSERT INTO typed SELECT 's', 'z' FROM generate_series(1, 6);
        CREATE FUNCTION g(int) RETURNS int IMMUTABLE LANGUAGE sql AS 'SELECT $1';
        CREATE TABLE generated (id int, x int GENERATED ALWAYS AS (g(id)) STORED);
        INSERT INTO generated SELECT generate_series(1, 6);
        CREATE FUNCTION h(int) RETURNS int IMMUTABLE LANGUAGE sql AS 'SELECT $1';
        CREATE TABLE keyed (id int) PARTITION BY RANGE (h(id));
        CREATE TABLE keyed1 PARTITION OF keyed FOR VALUES FROM (1) TO (10);
        INSERT INTO keyed SELECT generate_series(1, 6);
        CREATE ACCESS METHOD heap2 TYPE TABLE HANDLER heap_tableam_handler;
        CREATE TABLE by_method (id int) USING heap2;
        INSERT INTO by_method SELECT generate_series(1, 6);
        CREATE VIEW w AS SELECT 1 AS a;
        CREATE TABLE of_view (id int, c w);
        INSERT INTO of_view SELECT i, ROW(1)::w FROM generate_series(1, 6) AS i;
        CREATE COLLATION co FROM \"C\";
        CREATE TABLE collated (id int, c text COLLATE co);
        INSERT INTO collated SELECT generate_series(1, 6);
        CREATE EXTENSION hstore;
        CREATE TABLE extended (id int, h hstore);
        INSERT INTO extended SELECT generate_series(1, 6);
        CREATE DOMAIN d AS int;
        CREATE TABLE domained (id int, c d);
        INSERT INTO domained SELECT generate_series(1, 6);
        CREATE UNLOGGED TABLE unlogged (id int);
        INSERT INTO unlogged SELECT generate_series(1, 6);
        CREATE EXTENSION file_fdw;
        CREATE SERVER s FOREIGN DATA WRAPPER file_fdw;
        CREATE FOREIGN TABLE elsewhere (a text) SERVER s OPTIONS (filename '/dev/null');");
    limit(&mut bed, "{public.*}", 5);
    bed.passes("DROP EXTENSION file_fdw CASCADE");
    let ways = [
        ("ALTER TYPE addr ALTER ATTRIBUTE street TYPE varchar(3) CASCADE", "typed"),
        ("ALTER TYPE addr DROP ATTRIBUTE street CASCADE", "typed"),
        ("DROP TYPE addr CASCADE", "typed"),
        ("DROP FUNCTION g CASCADE", "generated"),
        ("DROP FUNCTION h CASCADE", "keyed1"),
        ("DROP ACCESS METHOD heap2 CASCADE", "by_method"),
        ("DROP VIEW w CASCADE", "of_view"),
        ("DROP COLLATION co CASCADE", "collated"),
        ("DROP EXTENSION hstore CASCADE", "extended"),
        ("DROP DOMAIN d CASCADE", "domained"),
        ("DROP TABLE unlogged", "unlogged"),
    ];
    for (sql, table) in ways {
        assert_eq!(refused(&mut bed, sql).table, table, "{sql}");
    }
    limit(&mut bed, "{public.*}", 6);
    for (sql, _) in ways {
        bed.passes(sql);
    }
}

#[test]
fn a_rename_counts_whichever_command_says_it() {
    let mut bed = bed(&format!(
        "{SIX} CREATE FUNCTION f() RETURNS void LANGUAGE plpgsql AS 'BEGIN EXECUTE ''ALTER TABLE t RENAME TO u''; END';"
    ));
    limit(&mut bed, "{public.t}", 5);
    for sql in [
        "ALTER INDEX t RENAME TO u",
        "ALTER TABLE t RENAME TO \"T\"",
        "ALTER TABLE IF EXISTS ONLY t RENAME TO u",
        "SELECT f()",
        "DO 'BEGIN PERFORM f(); END'",
        "BEGIN; DECLARE c CURSOR FOR TABLE t; FETCH 1 FROM c; ALTER TABLE t RENAME TO u",
        "SET session_replication_role = replica; ALTER TABLE t RENAME TO u",
    ] {
        refused(&mut bed, sql);
    }
    bed.passes("RESET session_replication_role");
    assert_eq!(expect_refusal(bed.writer.execute("ALTER TABLE t RENAME TO u", &[])).sqlstate, "WG005");
    limit(&mut bed, "{public.t}", 6);
    bed.passes("SELECT f()");
    assert!(is_there(&mut bed, "public.u"));
}

#[test]
fn tables_that_move_with_their_extension_count() {
    let mut bed = bed("CREATE SCHEMA a; CREATE SCHEMA b; CREATE EXTENSION hstore SCHEMA a; CREATE TABLE a.m (id int);
        INSERT INTO a.m SELECT generate_series(1, 6); ALTER EXTENSION hstore ADD TABLE a.m;");
    assert_eq!(assert_drop(&mut bed, "{a.*}", "ALTER EXTENSION hstore SET SCHEMA b", 6).table, "m");
    assert_drop(&mut bed, "{b.m}", "DROP EXTENSION hstore", 6);
}

#[test]
fn a_child_counts_with_the_last_parent_that_is_named() {
    let setup = "CREATE TABLE p1 (id int); CREATE TABLE p2 (id int); CREATE TABLE c () INHERITS (p1, p2);
        INSERT INTO c SELECT generate_series(1, 6);";
    let mut bed = bed(setup);
    limit(&mut bed, "{public.p1, public.p2}", 0);
    bed.passes("BEGIN; ALTER TABLE c NO INHERIT p1; ROLLBACK");
    refused(&mut bed, "BEGIN; ALTER TABLE c NO INHERIT p1; ALTER TABLE c NO INHERIT p2");
    assert_drop(&mut bed, "{public.p1, public.p2}", "ALTER TABLE c NO INHERIT p1, NO INHERIT p2", 6);
}

#[test]
fn a_partition_that_came_in_the_same_transaction_counts_when_it_goes() {
    let setup = format!(
        "{TREE} CREATE TABLE x (id int, v int); INSERT INTO x SELECT i, 0 FROM generate_series(11, 13) AS i;
        CREATE TABLE rest PARTITION OF t DEFAULT; INSERT INTO t VALUES (1000, 0), (1001, 0);"
    );
    let mut bed = bed(&setup);
    limit(&mut bed, "{public.t}", 1);
    refused(&mut bed, "ALTER TABLE t DETACH PARTITION rest");
    refused(&mut bed, "DROP TABLE rest");
    let there_and_back = "BEGIN; ALTER TABLE t ATTACH PARTITION x FOR VALUES FROM (11) TO (14);
        ALTER TABLE t DETACH PARTITION x;";
    limit(&mut bed, "{public.t}", 2);
    refused(&mut bed, there_and_back);
    bed.passes("DROP TABLE rest");
    limit(&mut bed, "{public.t}", 3);
    bed.passes(&format!("{there_and_back} COMMIT"));
}

#[test]
fn a_partition_that_waits_to_be_detached_is_covered_until_it_is() {
    let mut bed = bed(TREE);
    bed.policy("tables => '{public.t}', operations => '{drop,delete}', max_rows => 6");
    let mut holder = bed.db().admin();
    pass(&mut holder, "BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM t");
    let pid = number(&mut bed.writer, "SELECT pg_backend_pid()");
    let pending = "SELECT count(*) FROM pg_inherits WHERE inhdetachpending";
    let mut client = std::mem::replace(&mut bed.writer, holder);
    let detach = std::thread::spawn(move || {
        let result = client.batch_execute("ALTER TABLE t DETACH PARTITION t1 CONCURRENTLY");
        (client, result)
    });
    wait_until(20, || bed.number(pending) == 1);
    pass(&mut bed.reader, &format!("SELECT pg_cancel_backend({pid})"));
    let (client, result) = detach.join().expect("the session");
    assert_eq!(expect_refusal(result).sqlstate, "57014");
    drop(std::mem::replace(&mut bed.writer, client));
    assert_eq!(bed.number(pending), 1);

    bed.policy("tables => '{public.t}', operations => '{drop,delete}', max_rows => 5");
    refused(&mut bed, "ALTER TABLE t DETACH PARTITION t1 FINALIZE");
    refused(&mut bed, "DROP TABLE t1");
    fails(&mut bed, "DELETE FROM t1", "WG001");
    bed.policy("tables => '{public.t}', operations => '{drop,delete}', max_rows => 6");
    bed.passes("ALTER TABLE t DETACH PARTITION t1 FINALIZE");
    assert_eq!(bed.number("SELECT count(*) FROM pg_inherits WHERE inhrelid = 't1'::regclass"), 0);
}

#[test]
fn what_an_exception_block_took_back_is_not_charged_and_one_event() {
    let mut bed = bed(&format!("{SIX} CREATE TABLE u AS SELECT generate_series(1, 5) AS id;"));
    limit(&mut bed, "{public.*}", 5);
    bed.passes(
        "DO $$ BEGIN
            FOR i IN 1..3 LOOP
                BEGIN DROP TABLE t; EXCEPTION WHEN SQLSTATE 'WG005' THEN END;
                BEGIN DROP TABLE u; RAISE 'back'; EXCEPTION WHEN raise_exception THEN END;
            END LOOP;
            DROP TABLE u;
        END $$",
    );
    assert!(is_there(&mut bed, "public.t") && !is_there(&mut bed, "public.u"));
    assert_eq!(events(&mut bed, "blocked").len(), 1);
}

#[test]
fn a_rolled_back_savepoint_gives_the_transactions_budget_back_and_leaves_no_event() {
    let mut bed = bed(&format!("{SIX} CREATE TABLE u AS TABLE t; CREATE TABLE w AS TABLE t;"));
    bed.policy("tables => '{public.*}', operations => '{drop}', max_rows_per_transaction => 11");
    refused(&mut bed, "BEGIN; DROP TABLE t; DROP TABLE u");
    refused(&mut bed, "BEGIN; SAVEPOINT a; DROP TABLE t; RELEASE a; DROP TABLE u");
    bed.passes("BEGIN; SAVEPOINT a; DROP TABLE t; ROLLBACK TO a; DROP TABLE u; COMMIT");
    assert!(is_there(&mut bed, "public.t") && !is_there(&mut bed, "public.u"));

    bed.policy("tables => '{public.*}', max_rows => 0");
    bed.passes(
        "BEGIN; SAVEPOINT a; SAVEPOINT b; DROP TABLE t; RELEASE b; ROLLBACK TO a;
         SAVEPOINT c; ALTER TABLE w DROP COLUMN v; RELEASE c; COMMIT",
    );
    expect_refusal(bed.writer.batch_execute("DROP TABLE t; SELECT 1 / 0"));
    bed.passes("DO $$ BEGIN BEGIN DROP TABLE t; RAISE 'back'; EXCEPTION WHEN raise_exception THEN END; END $$");
    assert_eq!(uncovered(&mut bed), ["public.w"]);
}

#[test]
fn each_commit_of_a_procedure_has_its_events_and_its_budget() {
    let setup = format!(
        "{SIX} CREATE TABLE u AS TABLE t; CREATE TABLE w AS TABLE t; CREATE TABLE x AS TABLE t;
        CREATE PROCEDURE inner_one() LANGUAGE plpgsql AS 'BEGIN ALTER TABLE u RENAME TO gone; ROLLBACK;
            ALTER TABLE w DROP COLUMN v; END';
        CREATE PROCEDURE outer_one() LANGUAGE plpgsql AS 'BEGIN DROP TABLE t; COMMIT; CALL inner_one(); COMMIT;
            DROP TABLE x; PERFORM 1 / 0; END';"
    );
    let mut bed = bed(&setup);
    bed.policy("tables => '{public.t, public.u, public.w, public.x}', max_rows => 0");
    assert_eq!(expect_refusal(bed.writer.batch_execute("CALL outer_one()")).sqlstate, "22012");
    assert_eq!(uncovered(&mut bed), ["public.t", "public.w"]);
    assert!(is_there(&mut bed, "public.u") && is_there(&mut bed, "public.x") && !is_there(&mut bed, "public.t"));

    bed.passes("CREATE TABLE t AS SELECT 1 FROM generate_series(1, 6)");
    limit(&mut bed, "{public.*}", 11);
    let both = "DO $$ BEGIN DROP TABLE t; COMMIT; DROP TABLE u; END $$";
    refused(&mut bed, &both.replace("COMMIT;", ""));
    bed.passes(both);
}

#[test]
fn a_prepared_transaction_is_counted_and_recorded_once() {
    let mut bed = bed(SIX);
    let name = format!("gid_{}", bed.db().name);
    limit(&mut bed, "{public.t}", 5);
    refused(&mut bed, &format!("BEGIN; DROP TABLE t; PREPARE TRANSACTION '{name}'"));
    bed.policy("tables => '{public.t}', max_rows => 0");
    bed.passes(&format!("BEGIN; DROP TABLE t; PREPARE TRANSACTION '{name}'"));
    bed.passes(&format!("COMMIT PREPARED '{name}'"));
    assert_eq!(uncovered(&mut bed), ["public.t"]);
    assert!(!is_there(&mut bed, "public.t"));
}

#[test]
fn a_prepared_transaction_that_is_rolled_back_leaves_no_event() {
    let mut bed = bed(SIX);
    let name = format!("gid_{}", bed.db().name);
    bed.policy("tables => '{public.t}', max_rows => 0");
    bed.passes(&format!("BEGIN; ALTER TABLE t RENAME TO u; PREPARE TRANSACTION '{name}'"));
    bed.passes(&format!("ROLLBACK PREPARED '{name}'"));
    assert!(is_there(&mut bed, "public.t"));
    assert_eq!(uncovered(&mut bed), [""; 0]);
}

#[test]
fn a_commit_that_fails_to_serialize_leaves_no_event() {
    let mut bed = bed(&format!("{SIX} CREATE TABLE a AS SELECT 1 AS id, 0 AS v UNION SELECT 2, 0;"));
    bed.policy("tables => '{public.t}', max_rows => 0");
    let mut other = bed.db().admin();
    let read = "BEGIN ISOLATION LEVEL SERIALIZABLE; SELECT sum(v) FROM a";
    bed.passes(read);
    pass(&mut other, read);
    bed.passes("ALTER TABLE t RENAME TO u; UPDATE a SET v = 1 WHERE id = 1");
    pass(&mut other, "UPDATE a SET v = 1 WHERE id = 2; COMMIT");
    assert_eq!(expect_refusal(bed.writer.batch_execute("COMMIT")).sqlstate, "40001");
    assert!(is_there(&mut bed, "public.t"));
    assert_eq!(uncovered(&mut bed), [""; 0]);
}

#[test]
fn a_cancelled_count_leaves_everything_as_it_was() {
    let mut bed = bed("CREATE TABLE t AS SELECT generate_series(1, 200000) AS id;");
    limit(&mut bed, "{public.t}", 1_000_000);
    bed.passes("SET statement_timeout = 2");
    fails(&mut bed, "DROP TABLE t", "57014");
    fails(&mut bed, "ALTER TABLE t RENAME TO u", "57014");
    bed.passes("SET statement_timeout = 0; ALTER TABLE t RENAME TO u");
    assert_eq!(bed.number("SELECT count(*) FROM u"), 200_000);
}

#[test]
fn a_lock_that_the_count_does_not_get_in_time_is_the_commands_own_error() {
    let mut bed = bed(CHILD);
    limit(&mut bed, "{public.t}", 6);
    let mut holder = bed.db().admin();
    pass(&mut holder, "BEGIN; SELECT 1 FROM flush.here; LOCK TABLE t1 IN ACCESS EXCLUSIVE MODE");
    let refusal = expect_refusal(bed.writer.batch_execute("SET lock_timeout = '50ms'; ALTER TABLE t RENAME TO u"));
    assert_eq!((refusal.sqlstate.as_str(), refusal.hint.as_str()), ("55P03", ""));
    assert!(is_there(&mut bed, "public.t"));
    pass(&mut holder, "ROLLBACK");
    bed.passes("ALTER TABLE t RENAME TO u");
}

#[test]
fn only_policies_that_apply_to_who_does_it_count() {
    let mut bed = bed(SIX);
    let anna = bed.db().role("anna");
    bed.passes(&format!("GRANT ALL ON SCHEMA public TO {anna}; ALTER TABLE t OWNER TO {anna}"));
    bed.policy(&format!("roles => '{{{anna}}}', operations => '{{drop}}', max_rows => 5"));
    refused(&mut bed, &format!("SET ROLE {anna}; DROP TABLE t"));
    refused(&mut bed, &format!("SET ROLE {anna}; ALTER TABLE t DROP COLUMN v"));
    // One that says nothing of drop sets no policy of drop aside, however closely it fits.
    pass(
        &mut bed.reader,
        &format!("SELECT writeguard.set_policy('q', tables => '{{public.t}}', roles => '{{{anna}}}')"),
    );
    refused(&mut bed, &format!("SET ROLE {anna}; DROP TABLE t"));
    bed.passes("RESET ROLE; DROP TABLE t");
    assert_eq!(uncovered(&mut bed), [""; 0]);
}

#[test]
fn ddl_while_the_guard_is_off_is_one_event() {
    let mut bed = bed(&format!("{SIX} CREATE TABLE u AS TABLE t;"));
    limit(&mut bed, "{public.*}", 0);
    refused(&mut bed, "DROP TABLE t, u");
    bed.passes("SET writeguard.enabled = off; DROP TABLE t, u");
    assert_eq!(events(&mut bed, "disabled").len(), 1);
    assert_eq!(uncovered(&mut bed), [""; 0]);
}

#[test]
fn other_peoples_event_triggers_keep_their_errors() {
    let setup = format!(
        "{SIX} CREATE FUNCTION no() RETURNS event_trigger LANGUAGE plpgsql AS $$ BEGIN
        RAISE 'not today' USING ERRCODE = 'XX123', DETAIL = 'd', HINT = 'h', TABLE = 'x', CONSTRAINT = 'c'; END $$;
        CREATE EVENT TRIGGER no ON sql_drop EXECUTE FUNCTION no();"
    );
    let mut bed = bed(&setup);
    bed.policy("tables => '{public.t}', max_rows => 0");
    let refusal = fails(&mut bed, "DROP TABLE t", "XX123");
    let Refusal { message, detail, hint, table, constraint, .. } = &refusal;
    assert_eq!([message, detail, hint, table, constraint], ["not today", "d", "h", "x", "c"]);
    limit(&mut bed, "{public.t}", 6);
    fails(&mut bed, "ALTER TABLE t DROP COLUMN v", "XX123");
    limit(&mut bed, "{public.t}", 5);
    refused(&mut bed, "ALTER TABLE t DROP COLUMN v");
    assert_eq!(uncovered(&mut bed), [""; 0]);
}

#[test]
fn an_event_trigger_that_renames_a_table_back_leaves_nothing_to_charge() {
    let setup = format!(
        "{SIX} CREATE FUNCTION back() RETURNS event_trigger LANGUAGE plpgsql AS $$ BEGIN
        IF to_regclass('public.u') IS NOT NULL THEN ALTER TABLE u RENAME TO t; END IF; END $$;"
    );
    let mut bed = bed(&setup);
    limit(&mut bed, "{public.t}", 0);
    refused(&mut bed, "ALTER TABLE t RENAME TO u");
    bed.passes("CREATE EVENT TRIGGER back ON ddl_command_end WHEN TAG IN ('ALTER TABLE') EXECUTE FUNCTION back()");
    bed.passes("ALTER TABLE t RENAME TO u");
    assert!(is_there(&mut bed, "public.t"));
}

#[test]
fn ddl_that_moves_everything_but_no_row_is_free() {
    let setup = format!(
        "{SIX} SET allow_in_place_tablespaces = on;
        CREATE TABLE p (id int) PARTITION BY LIST (id); CREATE TABLE p1 PARTITION OF p FOR VALUES IN (1);
        INSERT INTO p VALUES (1); CREATE VIEW w AS TABLE t; CREATE TABLE s (id serial); INSERT INTO s DEFAULT VALUES;
        CREATE TYPE mood AS ENUM ('sad'); CREATE TABLE f (id int, m mood); INSERT INTO f VALUES (1, 'sad');"
    );
    let mut bed = bed(&setup);
    let (anna, bert) = (bed.db().role("anna"), bed.db().role("bert"));
    let space = format!("space_{}", bed.db().name);
    bed.passes(&format!("ALTER TABLE t OWNER TO {anna}"));
    bed.passes(&format!("CREATE TABLESPACE {space} LOCATION ''"));
    bed.policy("tables => '{*.*}', operations => '{drop}', max_rows => 0");
    refused(&mut bed, "DROP TABLE t CASCADE");
    for sql in [
        &format!("ALTER TABLE ALL IN TABLESPACE pg_default SET TABLESPACE {space}"),
        &format!("REASSIGN OWNED BY {anna} TO {bert}"),
        "CREATE OR REPLACE VIEW w AS SELECT id, v, 1 AS one FROM t",
        "ALTER TYPE mood RENAME VALUE 'sad' TO 'glad'; ALTER TYPE mood RENAME TO temper",
        "DROP SEQUENCE s_id_seq CASCADE",
        "CREATE TEMP TABLE x (id int) ON COMMIT DROP",
        "CREATE TEMP TABLE y AS TABLE t; DISCARD TEMP",
        "ALTER TABLE p ALTER COLUMN id SET NOT NULL, ADD COLUMN n int DEFAULT 1",
        "CREATE TABLE q (LIKE p); ALTER TABLE p ATTACH PARTITION q FOR VALUES IN (2); ALTER TABLE p DETACH PARTITION q",
        "ALTER TABLE f ALTER COLUMN id TYPE int USING id, ALTER COLUMN id SET DEFAULT 7",
    ] {
        bed.passes(sql);
    }
    if bed.number("SELECT current_setting('server_version_num')::int") < 160_000 {
        // Since 16 a table is not made a view any more.
        bed.passes(
            "CREATE TABLE z AS TABLE t WITH NO DATA; CREATE RULE \"_RETURN\" AS ON SELECT TO z DO INSTEAD TABLE t",
        );
    }
    assert_eq!(uncovered(&mut bed), [""; 0]);
}

#[test]
fn a_rehearsal_leaves_no_event_of_its_ddl() {
    let mut bed = bed(&format!(
        "{SIX} CREATE FUNCTION f() RETURNS void LANGUAGE plpgsql AS
         'BEGIN DELETE FROM t; ALTER TABLE t DROP COLUMN v; END';"
    ));
    bed.policy("tables => '{public.t}', max_rows => 5");
    bed.passes("SELECT writeguard.request('SELECT f()', 'why not')");
    assert_eq!(uncovered(&mut bed), [""; 0]);
    bed.policy("tables => '{public.t}', max_rows => 6");
    bed.passes("SELECT f()");
    assert_eq!(uncovered(&mut bed), ["public.t"]);
}

#[test]
fn a_database_without_the_extension_is_left_alone() {
    let db = Server::shared().plain_database();
    let mut client = db.admin();
    pass(&mut client, &format!("CREATE SCHEMA s; {SIX} {}", TREE.replace("t1", "r1").replace(" t ", " r ")));
    pass(&mut client, "ALTER TABLE t RENAME TO u; ALTER TABLE u SET SCHEMA s; ALTER TABLE s.u DROP COLUMN v");
    pass(&mut client, "ALTER TABLE r DETACH PARTITION r1 CONCURRENTLY; ");
    pass(&mut client, "ALTER SCHEMA s RENAME TO s2; DROP SCHEMA s2 CASCADE; DROP TABLE r, r1");
    assert_eq!(number(&mut client, "SELECT count(*) FROM pg_class WHERE relname IN ('t', 'u', 'r', 'r1')"), 0);
}

#[test]
fn of_a_thousand_dropped_tables_a_hundred_have_events_and_the_last_tells_of_the_others() {
    let server = Server::start(&["max_locks_per_transaction = 256"]);
    let db = server.database();
    let mut client = db.admin();
    pass(
        &mut client,
        "SELECT writeguard.set_policy('p', tables => '{s.*}'); CREATE SCHEMA s;
         DO $$ BEGIN FOR i IN 1..1100 LOOP EXECUTE format('CREATE TABLE s.t%s ()', i); END LOOP; END $$",
    );
    pass(&mut client, "DROP SCHEMA s CASCADE");
    let stored = "SELECT count(*) FROM writeguard.event WHERE kind = 'uncovered'";
    wait_until(30, || number(&mut client, stored) >= 100);
    assert_eq!(number(&mut client, stored), 100);
    let last = "SELECT reason FROM writeguard.event WHERE kind = 'uncovered' ORDER BY id DESC LIMIT 1";
    let reason: String = client.query_one(last, &[]).expect("the last event").get(0);
    assert_eq!(reason, "And 1000 further tables by the same statement.");
}

#[test]
fn a_child_that_loses_a_column_and_its_parent_is_counted_once() {
    let mut bed = bed(CHILD);
    assert_drop(&mut bed, "{public.t}", "ALTER TABLE t1 DROP COLUMN w, NO INHERIT t", 6);
}

#[test]
fn a_child_that_loses_a_column_and_its_parent_is_one_event() {
    let mut bed = bed(CHILD);
    bed.policy("tables => '{public.t}', max_rows => 0");
    bed.passes("ALTER TABLE t1 DROP COLUMN w, NO INHERIT t");
    assert_eq!(uncovered(&mut bed), ["public.t1"]);
}

#[test]
fn a_dropped_attribute_counts_where_a_column_is_made_of_it() {
    let setup = "CREATE TYPE addr AS (street text, zip text);
        CREATE TABLE t (id int, a addr); INSERT INTO t SELECT i, ROW('s', 'z')::addr FROM generate_series(1, 6) AS i;
        CREATE TABLE shape (x int, y int);
        CREATE TABLE u (id int, s shape[]);
        INSERT INTO u SELECT i, ARRAY[ROW(1, 2)::shape] FROM generate_series(1, 6) AS i;";
    for sql in ["ALTER TYPE addr DROP ATTRIBUTE street", "ALTER TABLE shape DROP COLUMN x"] {
        let mut bed = bed(setup);
        limit(&mut bed, "{public.t, public.u}", 5);
        refused(&mut bed, sql);
    }
}

#[test]
fn a_dropped_attribute_is_an_event_where_a_column_is_made_of_it() {
    let mut bed = bed("CREATE TYPE addr AS (street text, zip text);
        CREATE TABLE t (id int, a addr); INSERT INTO t SELECT i, ROW('s', 'z')::addr FROM generate_series(1, 6) AS i;");
    bed.policy("tables => '{public.t}', max_rows => 0");
    bed.passes("ALTER TYPE addr DROP ATTRIBUTE street");
    assert_eq!(uncovered(&mut bed), ["public.t"]);
}

#[test]
fn a_column_that_goes_with_a_temporary_type_counts() {
    let mut bed = bed(SIX);
    limit(&mut bed, "{public.t}", 5);
    bed.passes("CREATE DOMAIN pg_temp.d AS int; ALTER TABLE t ALTER COLUMN v TYPE pg_temp.d");
    refused(&mut bed, "DROP DOMAIN pg_temp.d CASCADE");
    refused(&mut bed, "DISCARD TEMP");
}

#[test]
fn a_column_that_goes_with_a_temporary_table_at_the_commit_counts() {
    let mut bed = bed("CREATE TABLE t (id int); INSERT INTO t SELECT generate_series(1, 6);");
    limit(&mut bed, "{public.t}", 5);
    let setup =
        "BEGIN; CREATE TEMP TABLE x (a int) ON COMMIT DROP; ALTER TABLE t ADD COLUMN c x; UPDATE t SET c = ROW(1);";
    refused(&mut bed, &format!("{setup} DROP TABLE x CASCADE; COMMIT"));
    refused(&mut bed, &format!("{setup} COMMIT"));
}

#[test]
fn a_column_that_goes_with_the_session_is_an_event_at_least() {
    let mut bed = bed(SIX);
    bed.policy("tables => '{public.t}', max_rows => 0");
    let mut client = bed.db().admin();
    pass(&mut client, "CREATE DOMAIN pg_temp.d AS int; ALTER TABLE t ALTER COLUMN v TYPE pg_temp.d");
    drop(client);
    let column = "SELECT count(*) FROM pg_attribute WHERE attrelid = 't'::regclass AND attname = 'v'";
    wait_until(20, || bed.number(column) == 0);
    assert_eq!(uncovered(&mut bed), ["public.t"]);
}

#[test]
fn a_table_renamed_to_a_name_with_a_policy_of_its_own_is_under_that_policy() {
    let mut bed = bed(&format!("{SIX} CREATE TABLE scratch ();"));
    let all = "operations => '{update,delete,truncate,drop}'";
    bed.policy(&format!("tables => '{{public.*}}', {all}, max_rows => 5"));
    pass(
        &mut bed.reader,
        &format!(
            "SELECT writeguard.set_policy('own', tables => '{{public.scratch}}', {all}, max_rows => 6);
             DROP TABLE scratch"
        ),
    );
    refused(&mut bed, "DROP TABLE t");
    bed.passes("ALTER TABLE t RENAME TO scratch; INSERT INTO scratch VALUES (7, 0)");
    refused(&mut bed, "DROP TABLE scratch");
    bed.passes("DELETE FROM scratch WHERE id = 7; DROP TABLE scratch");
}

#[test]
fn harmless_ddl_is_not_for_a_broken_policy_to_refuse() {
    let mut bed = bed(SIX);
    limit(&mut bed, "{public.t}", 0);
    pass(
        &mut bed.reader,
        "SET session_replication_role = replica; UPDATE writeguard.policy SET tables = '{bad..x}' WHERE name = 'p'",
    );
    fails(&mut bed, "DROP TABLE t", "WG008");
    fails(&mut bed, "ALTER TABLE t RENAME TO u", "WG008");
    bed.passes("ALTER TABLE t ADD COLUMN w int");
    bed.passes("ALTER TABLE t SET (fillfactor = 50)");
    bed.passes("ALTER TABLE t OWNER TO CURRENT_USER");
}

#[test]
fn the_extensions_schema_under_another_name_switches_nothing_off() {
    let mut bed = bed(SIX);
    limit(&mut bed, "{public.t}", 5);
    refused(&mut bed, "DROP TABLE t");
    // Refused as a whole, or still guarded afterwards.
    expect_refusal(
        bed.writer.batch_execute("BEGIN; ALTER SCHEMA writeguard RENAME TO elsewhere; DROP TABLE t; COMMIT"),
    );
    let _ = bed.writer.batch_execute("ROLLBACK");
    assert!(is_there(&mut bed, "public.t"));
}

/// How many rows of `t` a new session reads for a command that it takes back.
#[track_caller]
fn rows_read(bed: &Bed, sql: &str) -> i64 {
    let mut client = bed.db().admin();
    pass(&mut client, &format!("BEGIN; {sql}"));
    number(&mut client, "SELECT seq_tup_read FROM pg_stat_xact_user_tables WHERE relname IN ('t', 'u')")
}

#[test]
fn no_row_is_read_past_the_one_that_could_change_the_verdict() {
    let mut bed = bed("CREATE TABLE t AS SELECT generate_series(1, 5000) AS id;");
    bed.policy("tables => '{public.t}', operations => '{drop,truncate}', max_rows => 5, override => 'flag'");
    let lifted = "SET LOCAL writeguard.override = on; ALTER TABLE t RENAME TO u";
    assert_eq!(rows_read(&bed, lifted), 6, "{lifted}");
    bed.policy("tables => '{public.t}', operations => '{drop,truncate}', max_rows => 5000");
    assert_eq!(rows_read(&bed, "ALTER TABLE t RENAME TO u"), 5000);
}

#[test]
fn a_guard_that_is_off_reads_no_table_to_its_end() {
    let mut bed = bed("CREATE TABLE t AS SELECT generate_series(1, 5000) AS id;");
    bed.policy("tables => '{public.t}', operations => '{drop,truncate}', max_rows => 0");
    for sql in ["ALTER TABLE t RENAME TO u", "TRUNCATE t"] {
        let rows = rows_read(&bed, &format!("SET LOCAL writeguard.enabled = off; {sql}"));
        assert!(rows <= 1, "{sql}: {rows} rows were read");
    }
}

#[test]
fn without_a_limit_no_row_is_read() {
    let mut bed = bed("CREATE TABLE t AS SELECT generate_series(1, 5000) AS id;");
    bed.policy("tables => '{public.t}', operations => '{drop,truncate}'");
    for sql in ["ALTER TABLE t RENAME TO u", "TRUNCATE t"] {
        assert_eq!(rows_read(&bed, sql), 0, "{sql}");
    }
}

#[test]
fn a_schemas_rename_keeps_no_lock_per_table() {
    let setup = "CREATE SCHEMA s;
        DO $$ BEGIN FOR i IN 1..100 LOOP EXECUTE format('CREATE TABLE s.t%s (id int)', i); END LOOP; END $$;";
    let mut bed = bed(setup);
    limit(&mut bed, "{s.*}", 100);
    bed.passes("BEGIN; ALTER SCHEMA s RENAME TO s2");
    let sql = "SELECT count(*) FROM pg_locks l JOIN pg_class c ON c.oid = l.relation WHERE c.relname ~ '^t[0-9]+$'
        AND l.pid = pg_backend_pid()";
    let locks = number(&mut bed.writer, sql);
    bed.passes("COMMIT");
    assert!(locks < 10, "{locks} locks");
}

#[test]
fn what_cannot_be_detached_concurrently_fails_for_its_own_reason() {
    let mut bed = bed(TREE);
    limit(&mut bed, "{public.t}", 5);
    refused(&mut bed, "ALTER TABLE t DETACH PARTITION t1 CONCURRENTLY");
    fails(&mut bed, "BEGIN READ ONLY; DROP TABLE t", "25006");
    fails(&mut bed, "BEGIN READ ONLY; ALTER TABLE t DETACH PARTITION t1 CONCURRENTLY", "25006");
    fails(&mut bed, "BEGIN; ALTER TABLE t DETACH PARTITION t1 CONCURRENTLY", "25001");
    assert_eq!(events(&mut bed, "blocked").len(), 1);
}

#[test]
fn the_way_out_that_the_hint_names_is_one() {
    let mut bed = bed(TREE);
    limit(&mut bed, "{public.t}", 5);
    let sql = "ALTER TABLE t DETACH PARTITION t1 CONCURRENTLY";
    let hint = refused(&mut bed, sql).hint;
    let command = hint.rsplit("superuser: ").next().expect("a command");
    bed.passes(command);
    bed.passes(sql);
}

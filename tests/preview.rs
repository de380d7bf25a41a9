//! What a statement would change, told without changing it.

use crate::common::limits::{self, Bed, SIX};
use crate::common::{Refusal, expect_refusal, wait_until};
use postgres::Client;
use serde_json::{Value, json};

#[derive(Debug, PartialEq)]
struct Line {
    relation: String,
    operation: String,
    rows: i64,
    at_least: bool,
    row_limit: Option<i64>,
    verdict: String,
    policy: Option<String>,
    before: Option<Value>,
    after: Option<Value>,
}

#[track_caller]
fn try_preview(client: &mut Client, statement: &str, sample: i32) -> Result<Vec<Line>, postgres::Error> {
    let rows = client.query("SELECT * FROM writeguard.preview($1, $2)", &[&statement, &sample])?;
    Ok(rows
        .iter()
        .map(|row| Line {
            relation: row.get("relation"),
            operation: row.get("operation"),
            rows: row.get("rows"),
            at_least: row.get("at_least"),
            row_limit: row.get("row_limit"),
            verdict: row.get("verdict"),
            policy: row.get("policy"),
            before: row.get("before"),
            after: row.get("after"),
        })
        .collect())
}

#[track_caller]
fn preview_by(client: &mut Client, statement: &str) -> Vec<Line> {
    match try_preview(client, statement, 5) {
        Ok(lines) => lines,
        Err(error) => panic!("{statement}: {:?}", Refusal::of(&error)),
    }
}

/// What the writer is told; nothing is changed by it.
#[track_caller]
fn preview(bed: &mut Bed, statement: &str) -> Vec<Line> {
    let before = bed.contents();
    let lines = preview_by(&mut bed.writer, statement);
    assert_eq!(bed.contents(), before, "{statement}: the preview changed something");
    lines
}

/// Relation, operation and rows of each line.
#[track_caller]
fn counts(bed: &mut Bed, statement: &str) -> Vec<(String, String, i64)> {
    preview(bed, statement).into_iter().map(|line| (line.relation, line.operation, line.rows)).collect()
}

fn count(relation: &str, operation: &str, rows: i64) -> (String, String, i64) {
    (relation.to_owned(), operation.to_owned(), rows)
}

/// The only line, and its rows before and after.
#[track_caller]
fn images(bed: &mut Bed, statement: &str) -> (Value, Value) {
    let mut lines = preview(bed, statement);
    assert_eq!(lines.len(), 1, "{lines:?}");
    let line = lines.remove(0);
    (line.before.unwrap_or(Value::Null), line.after.unwrap_or(Value::Null))
}

#[test]
fn an_update_shows_its_rows_before_and_after() {
    let mut bed = Bed::new(SIX);
    let lines = preview(&mut bed, "UPDATE t SET v = id * 10 WHERE id < 3");
    assert_eq!(
        lines,
        [Line {
            relation: "public.t".into(),
            operation: "update".into(),
            rows: 2,
            at_least: false,
            row_limit: None,
            verdict: "pass".into(),
            policy: None,
            before: Some(json!([{"id": 1, "v": 0}, {"id": 2, "v": 0}])),
            after: Some(json!([{"id": 1, "v": 10}, {"id": 2, "v": 20}])),
        }]
    );
}

#[test]
fn a_delete_shows_what_would_be_gone() {
    let mut bed = Bed::new(SIX);
    assert_eq!(images(&mut bed, "DELETE FROM t WHERE id = 4"), (json!([{"id": 4, "v": 0}]), Value::Null));
}

#[test]
fn an_insert_shows_what_would_come() {
    let mut bed = Bed::new(SIX);
    assert_eq!(images(&mut bed, "INSERT INTO t VALUES (7, 1)"), (Value::Null, json!([{"id": 7, "v": 1}])));
    assert_eq!(
        images(&mut bed, "INSERT INTO t SELECT id + 10, v FROM t WHERE id = 1"),
        (Value::Null, json!([{"id": 11, "v": 0}]))
    );
}

#[test]
fn as_many_rows_are_shown_as_asked_for() {
    let mut bed = Bed::new(SIX);
    for (sample, shown) in [(0, 0), (1, 1), (4, 4), (6, 6), (100, 6)] {
        let lines = try_preview(&mut bed.writer, "DELETE FROM t", sample).expect("a preview");
        assert_eq!(lines[0].rows, 6);
        let array = lines[0].before.as_ref().and_then(Value::as_array).map_or(0, Vec::len);
        assert_eq!(array, shown, "sample {sample}");
    }
}

#[test]
fn a_sample_out_of_range_is_the_callers_mistake() {
    let mut bed = Bed::new(SIX);
    for sample in [-1, 1001] {
        let refusal = expect_refusal(try_preview(&mut bed.writer, "DELETE FROM t", sample));
        assert_eq!(refusal.sqlstate, "WG007", "{refusal:?}");
        assert_eq!(refusal.hint, "sample => 5");
    }
}

#[test]
fn cascades_and_triggers_are_in_it() {
    let mut bed = Bed::new(
        "CREATE TABLE parent (id int PRIMARY KEY);
         CREATE TABLE child (id int PRIMARY KEY, parent int REFERENCES parent ON DELETE CASCADE);
         CREATE TABLE seen (n int);
         INSERT INTO seen VALUES (0);
         INSERT INTO parent SELECT generate_series(1, 3);
         INSERT INTO child SELECT i, i % 3 + 1 FROM generate_series(1, 9) AS i;
         CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS
           $$ BEGIN UPDATE seen SET n = n + 1; INSERT INTO seen VALUES (1); RETURN NULL; END $$;
         CREATE TRIGGER note AFTER DELETE ON child FOR EACH STATEMENT EXECUTE FUNCTION note();",
    );
    let told = counts(&mut bed, "DELETE FROM parent WHERE id < 3");
    assert_eq!(
        told,
        [
            count("public.parent", "delete", 2),
            count("public.child", "delete", 6),
            count("public.seen", "update", 1),
            count("public.seen", "insert", 1),
        ]
    );
}

#[test]
fn a_merge_is_told_by_its_actions() {
    let mut bed = Bed::new(SIX);
    let told = preview(
        &mut bed,
        "MERGE INTO t USING generate_series(2, 8) AS i ON id = i
         WHEN MATCHED AND i = 2 THEN DELETE
         WHEN MATCHED THEN UPDATE SET v = 5
         WHEN NOT MATCHED THEN INSERT VALUES (i, 9)",
    );
    let of = |operation: &str| told.iter().find(|line| line.operation == operation).expect(operation);
    assert_eq!((of("delete").rows, of("update").rows, of("insert").rows), (1, 4, 2));
    assert_eq!(of("delete").before, Some(json!([{"id": 2, "v": 0}])));
    let after = of("update").after.as_ref().and_then(Value::as_array).expect("rows");
    assert!(after.iter().all(|row| row["v"] == 5), "{after:?}");
    let inserted = of("insert").after.as_ref().and_then(Value::as_array).expect("rows");
    assert!(inserted.iter().all(|row| row["v"] == 9), "{inserted:?}");
}

#[test]
fn a_conflict_is_an_update_of_the_row_that_was_there() {
    let mut bed = Bed::new(SIX);
    let told = preview(
        &mut bed,
        "INSERT INTO t VALUES (6, 60), (7, 70) ON CONFLICT (id) DO UPDATE SET id = EXCLUDED.id + 100, v = EXCLUDED.v",
    );
    let of = |operation: &str| told.iter().find(|line| line.operation == operation).expect(operation);
    assert_eq!(of("update").before, Some(json!([{"id": 6, "v": 0}])));
    assert_eq!(of("update").after, Some(json!([{"id": 106, "v": 60}])));
    assert_eq!(of("insert").after, Some(json!([{"id": 7, "v": 70}])));
    let skipped = counts(&mut bed, "INSERT INTO t VALUES (6, 60) ON CONFLICT DO NOTHING");
    assert_eq!(skipped, []);
    let unchanged = counts(&mut bed, "INSERT INTO t VALUES (6, 60) ON CONFLICT (id) DO UPDATE SET v = 1 WHERE t.v > 0");
    assert_eq!(unchanged, []);
}

/// Two partitions whose columns have different places.
const PARTS: &str = "
    CREATE TABLE p (k int, v text, PRIMARY KEY (k)) PARTITION BY RANGE (k);
    CREATE TABLE p1 PARTITION OF p FOR VALUES FROM (0) TO (10);
    CREATE TABLE p2 (v text, dropped int, k int NOT NULL);
    ALTER TABLE p2 DROP COLUMN dropped;
    ALTER TABLE p ATTACH PARTITION p2 FOR VALUES FROM (10) TO (20);
    INSERT INTO p VALUES (1, 'one'), (2, 'two'), (11, 'eleven'), (12, 'twelve');";

#[test]
fn partitions_are_told_apart() {
    let mut bed = Bed::new(PARTS);
    let told = counts(&mut bed, "UPDATE p SET v = 'x'");
    assert_eq!(told, [count("public.p1", "update", 2), count("public.p2", "update", 2)]);
    let told = counts(
        &mut bed,
        "INSERT INTO p VALUES (1, 'x'), (12, 'y'), (13, 'z') ON CONFLICT (k) DO UPDATE SET v = EXCLUDED.v",
    );
    assert_eq!(
        told,
        [count("public.p1", "update", 1), count("public.p2", "update", 1), count("public.p", "insert", 1)]
    );
}

#[test]
fn a_row_that_moves_is_shown_where_it_was_and_where_it_goes() {
    let mut bed = Bed::new(PARTS);
    for (from, to, value) in [(1, 15, "one"), (11, 5, "eleven")] {
        let told = images(&mut bed, &format!("UPDATE p SET k = {to} WHERE k = {from}"));
        assert_eq!(told, (json!([{"k": from, "v": value}]), json!([{"k": to, "v": value}])));
    }
    let told = images(&mut bed, "UPDATE p SET k = k + 2 WHERE k IN (1, 2)");
    assert_eq!(
        told,
        (json!([{"k": 1, "v": "one"}, {"k": 2, "v": "two"}]), json!([{"k": 3, "v": "one"}, {"k": 4, "v": "two"}]))
    );
    let told = images(
        &mut bed,
        "MERGE INTO p USING (VALUES (1), (2)) AS s (i) ON k = i WHEN MATCHED THEN UPDATE SET k = i + 12",
    );
    assert_eq!(
        told,
        (json!([{"k": 1, "v": "one"}, {"k": 2, "v": "two"}]), json!([{"k": 13, "v": "one"}, {"k": 14, "v": "two"}]))
    );
}

#[test]
fn triggers_before_the_row_have_had_their_say() {
    let mut bed = Bed::new(&format!(
        "{SIX}
         CREATE FUNCTION adjust() RETURNS trigger LANGUAGE plpgsql AS
           $$ BEGIN IF OLD.id = 2 THEN RETURN NULL; END IF; NEW.v := NEW.v + 1000; RETURN NEW; END $$;
         CREATE TRIGGER adjust BEFORE UPDATE ON t FOR EACH ROW EXECUTE FUNCTION adjust();"
    ));
    let told = images(&mut bed, "UPDATE t SET v = id WHERE id < 4");
    assert_eq!(
        told,
        (json!([{"id": 1, "v": 0}, {"id": 3, "v": 0}]), json!([{"id": 1, "v": 1001}, {"id": 3, "v": 1003}]))
    );
}

#[test]
fn what_an_exception_block_takes_back_is_not_in_it() {
    let mut bed = Bed::new(&format!(
        "{SIX}
         CREATE FUNCTION f() RETURNS int LANGUAGE plpgsql AS $$
         BEGIN
             UPDATE t SET v = 1 WHERE id = 1;
             BEGIN
                 DELETE FROM t WHERE id > 1;
                 RAISE EXCEPTION 'no';
             EXCEPTION WHEN raise_exception THEN
                 UPDATE t SET v = 2 WHERE id = 2;
             END;
             RETURN 1;
         END $$;"
    ));
    assert_eq!(
        images(&mut bed, "SELECT f()"),
        (json!([{"id": 1, "v": 0}, {"id": 2, "v": 0}]), json!([{"id": 1, "v": 1}, {"id": 2, "v": 2}]))
    );
}

#[test]
fn branches_of_a_with_are_in_it() {
    let mut bed = Bed::new(&format!("{SIX} CREATE TABLE u AS SELECT * FROM t;"));
    let told = counts(&mut bed, "WITH d AS (DELETE FROM u WHERE id < 3 RETURNING id) SELECT count(*) FROM d");
    assert_eq!(told, [count("public.u", "delete", 2)]);
}

#[test]
fn truncate_is_counted_and_not_run() {
    let mut bed = Bed::new(&format!(
        "{SIX} CREATE TABLE c (id int REFERENCES t); INSERT INTO c VALUES (1), (2);
         CREATE FUNCTION never() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'it ran'; END $$;
         CREATE TRIGGER never BEFORE TRUNCATE ON t EXECUTE FUNCTION never();"
    ));
    let told = counts(&mut bed, "TRUNCATE t CASCADE");
    assert_eq!(told, [count("public.t", "truncate", 6), count("public.c", "truncate", 2)]);
    let (before, after) = (&preview(&mut bed, "TRUNCATE c")[0].before.clone(), Value::Null);
    assert_eq!((before.as_ref(), &after), (Some(&json!([{"id": 1}, {"id": 2}])), &Value::Null));
}

#[test]
fn it_stops_and_says_at_least() {
    let mut bed = Bed::new(&format!("{SIX} CREATE TABLE u AS SELECT * FROM t;"));
    bed.passes("SET writeguard.preview_max_rows = 4");
    for statement in [
        "UPDATE t SET v = 1",
        "DELETE FROM t",
        "TRUNCATE t",
        "INSERT INTO t SELECT generate_series(10, 20)",
        "WITH d AS (DELETE FROM t RETURNING *) SELECT * FROM d",
    ] {
        let told = preview(&mut bed, statement);
        assert_eq!((told.len(), told[0].rows, told[0].at_least), (1, 4, true), "{statement}");
    }
    let told = preview(&mut bed, "TRUNCATE t, u");
    assert_eq!(told.iter().map(|line| line.rows).sum::<i64>(), 4);
    let told = preview(&mut bed, "UPDATE t SET v = 1 WHERE id < 5");
    assert_eq!((told[0].rows, told[0].at_least), (4, false));
}

#[test]
fn code_that_catches_everything_cannot_go_on_past_the_end() {
    let mut bed = Bed::new(&format!(
        "{SIX}
         CREATE FUNCTION f() RETURNS void LANGUAGE plpgsql AS $$
         BEGIN
             FOR i IN 1 .. 6 LOOP
                 BEGIN
                     UPDATE t SET v = 1 WHERE id = i;
                 EXCEPTION WHEN query_canceled OR others THEN NULL;
                 END;
             END LOOP;
         END $$;
         SET writeguard.preview_max_rows = 3;"
    ));
    let told = preview(&mut bed, "SELECT f()");
    assert_eq!((told[0].rows, told[0].at_least), (3, true));
}

/// The most memory that the session's process has ever had, in kB.
fn peak(client: &mut Client) -> u64 {
    let pid: i32 = client.query_one("SELECT pg_backend_pid()", &[]).expect("its process").get(0);
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("its status");
    let line = status.lines().find(|line| line.starts_with("VmHWM")).expect("its peak");
    line.split_whitespace().nth(1).and_then(|kb| kb.parse().ok()).expect("a number")
}

/// A table of 1,000 rows with values of 7 kB in 40 columns.
fn wide_bed() -> Bed {
    let columns: Vec<String> = (1..=40).map(|n| format!("c{n} text")).collect();
    let values = vec!["repeat(md5(i::text), 220)"; 40].join(", ");
    Bed::new(&format!(
        "CREATE TABLE w (id int PRIMARY KEY, {});
         INSERT INTO w SELECT i, {values} FROM generate_series(1, 1000) AS i;",
        columns.join(", ")
    ))
}

#[test]
fn wide_rows_are_shown_as_far_as_there_is_room() {
    let mut bed = wide_bed();
    bed.limit("{w}", 5);
    assert_eq!(bed.writer.query_one("SHOW writeguard.preview_max_bytes", &[]).unwrap().get::<_, &str>(0), "16MB");
    let told = std::sync::Arc::new(std::sync::Mutex::new(Vec::new()));
    let told_to = std::sync::Arc::clone(&told);
    let mut client = bed
        .db()
        .config("postgres")
        .notice_callback(move |notice| told_to.lock().unwrap().push(notice.message().to_owned()))
        .connect(postgres::NoTls)
        .unwrap();
    preview_by(&mut client, "UPDATE w SET id = -id WHERE id <= 3");
    assert_eq!(told.lock().unwrap().len(), 0);
    let before = peak(&mut client);
    for (most, least) in [(16 * 1024 * 1024, 8 * 1024 * 1024), (100 * 1024, 30 * 1024)] {
        client.batch_execute(&format!("SET writeguard.preview_max_bytes = {most}")).unwrap();
        let sql = "SELECT rows, octet_length(before::text) + octet_length(after::text) AS bytes,
                          jsonb_array_length(before) AS before, before->-1 #>> '{}' AS last
                   FROM writeguard.preview('UPDATE w SET id = -id', 1000)";
        let row = client.query_one(sql, &[]).unwrap();
        let (bytes, shown): (i32, i32) = (row.get("bytes"), row.get("before"));
        assert_eq!(row.get::<_, i64>("rows"), 1000);
        // Blanks of jsonb's own come on top.
        assert!((least..most + most / 4).contains(&bytes), "{bytes} of {most}");
        let last: String = row.get("last");
        let said = std::mem::take(&mut *told.lock().unwrap());
        assert_eq!(said.len(), 1, "{said:?}");
        assert!(said[0].contains("values shown by size"), "{said:?}");
        if shown <= 1000 {
            assert_eq!(last, format!("{} rows left out", 1001 - shown));
            assert!(said[0].contains(&last), "{said:?}");
        }
    }
    let grown = peak(&mut client) - before;
    assert!(grown < 200_000, "{grown} kB");
    client.batch_execute("SET writeguard.preview_max_bytes = 0").unwrap();
    let row = client
        .query_one("SELECT before::text, after::text FROM writeguard.preview('DELETE FROM w WHERE id <= 3')", &[])
        .unwrap();
    assert_eq!(row.get::<_, &str>(0), r#"["3 rows left out"]"#);
}

#[test]
fn a_request_stores_as_much_as_there_is_room_for() {
    let mut bed = wide_bed();
    bed.limit("{w}", 2);
    bed.passes("SET writeguard.preview_max_bytes = '300kB'");
    bed.passes("SELECT writeguard.request('UPDATE w SET id = -id', 'because')");
    let sql = "SELECT samples->0->>'left_out', octet_length(samples::text) FROM writeguard.request";
    let row = bed.reader.query_one(sql, &[]).unwrap();
    assert!(row.get::<_, i32>(1) < 400_000);
    bed.passes("SET writeguard.preview_max_bytes = 500");
    bed.passes("SELECT writeguard.request('DELETE FROM w', 'because')");
    let row = bed.reader.query_one(&format!("{sql} ORDER BY id DESC LIMIT 1"), &[]).unwrap();
    assert_eq!(row.get::<_, Option<&str>>(0), Some("5"));
}

#[test]
fn limited_roles_cannot_raise_the_end() {
    let bed = Bed::new(SIX);
    let role = bed.db().role("reader");
    let mut client = bed.db().connect(&role);
    for end in ["preview_max_rows", "preview_max_bytes"] {
        let refusal = expect_refusal(client.batch_execute(&format!("SET writeguard.{end} = 100000000")));
        assert_eq!(refusal.sqlstate, "42501");
    }
}

#[test]
fn no_limit_refuses_it_and_no_event_is_left() {
    let mut bed = Bed::new(SIX);
    bed.policy(
        "tables => '{public.t}', max_rows => 1, max_rows_per_transaction => 1, rate_rows => 1, require_where => true,
         require_transaction => true, override => 'never'",
    );
    let events = bed.number("SELECT count(*) FROM writeguard.event WHERE kind <> 'policy_changed'");
    for statement in ["UPDATE t SET v = 1", "DELETE FROM t", "TRUNCATE t"] {
        let told = preview(&mut bed, statement);
        assert_eq!((told[0].rows, told[0].verdict.as_str(), told[0].policy.as_deref()), (6, "refuse", Some("p")));
    }
    assert_eq!(bed.number("SELECT count(*) FROM writeguard.event WHERE kind <> 'policy_changed'"), events);
    // Nor was anything spent.
    bed.passes("BEGIN; UPDATE t SET v = 1 WHERE id = 1; COMMIT");
}

#[test]
fn the_verdict_names_limit_and_policy() {
    let mut bed = Bed::new(SIX);
    bed.policy("tables => '{public.t}', max_rows => 5");
    bed.passes("SELECT writeguard.set_policy('wide', tables => '{public.t}', max_rows => 100)");
    let verdict = |bed: &mut Bed, statement: &str| {
        let line = preview(bed, statement).remove(0);
        (line.verdict, line.policy, line.row_limit)
    };
    assert_eq!(verdict(&mut bed, "UPDATE t SET v = 1"), ("refuse".into(), Some("p".into()), Some(5)));
    assert_eq!(verdict(&mut bed, "UPDATE t SET v = 1 WHERE id < 6"), ("pass".into(), Some("p".into()), Some(5)));
    bed.passes("SELECT writeguard.drop_policy('p')");
    assert_eq!(verdict(&mut bed, "UPDATE t SET v = 1"), ("pass".into(), Some("wide".into()), Some(100)));
}

#[test]
fn the_strictest_mode_speaks() {
    let mut bed = Bed::new(SIX);
    let verdict = |bed: &mut Bed| {
        let line = preview(bed, "DELETE FROM t").remove(0);
        (line.verdict, line.policy.unwrap_or_default(), line.row_limit)
    };
    bed.policy("tables => '{public.t}', max_rows => 1, mode => 'observe'");
    assert_eq!(verdict(&mut bed), ("observe".into(), "p".into(), Some(1)));
    bed.passes("SELECT writeguard.set_policy('q', tables => '{public.t}', max_rows => 2, mode => 'warn')");
    assert_eq!(verdict(&mut bed), ("warn".into(), "q".into(), Some(2)));
    bed.passes("SELECT writeguard.set_policy('r', tables => '{public.t}', max_rows => 3)");
    assert_eq!(verdict(&mut bed), ("refuse".into(), "r".into(), Some(3)));
    // Nobody was told by that.
    assert_eq!(bed.number("SELECT count(*) FROM writeguard.event WHERE kind IN ('observed', 'warned')"), 0);
}

#[test]
fn tables_that_share_a_budget_share_its_verdict() {
    let mut bed = Bed::new(&format!("{SIX} CREATE TABLE u AS SELECT * FROM t;"));
    bed.policy("tables => '{public.*}', max_rows => 7");
    let told = preview(&mut bed, "WITH d AS (DELETE FROM u RETURNING id) UPDATE t SET v = 1 FROM d WHERE d.id = t.id");
    assert_eq!(told.len(), 2);
    assert!(told.iter().all(|line| line.verdict == "refuse" && line.row_limit == Some(7)), "{told:?}");
}

#[test]
fn errors_of_the_statement_come_out_untouched() {
    let mut bed = Bed::new(&format!("{SIX} ALTER TABLE t ADD CONSTRAINT small CHECK (v < 10);"));
    let direct = expect_refusal(bed.writer.batch_execute("UPDATE t SET v = 10"));
    let told = expect_refusal(try_preview(&mut bed.writer, "UPDATE t SET v = 10", 5));
    assert_eq!((told.sqlstate, told.message, told.detail), (direct.sqlstate, direct.message, direct.detail));
    assert_eq!(told.table, "t");
}

#[test]
fn only_one_statement_that_writes_rows_can_be_previewed() {
    let mut bed = Bed::new(SIX);
    for statement in
        ["", ";", "UPDATE t SET v = 1; DELETE FROM t", "DROP TABLE t", "COPY t TO STDOUT", "DO 'BEGIN END'"]
    {
        let refusal = expect_refusal(try_preview(&mut bed.writer, statement, 5));
        assert_eq!(refusal.sqlstate, "WG007", "{statement}: {refusal:?}");
    }
    for arguments in ["NULL", "'DELETE FROM t WHERE id = $1'"] {
        let refusal = expect_refusal(bed.writer.batch_execute(&format!("SELECT writeguard.preview({arguments})")));
        assert_eq!(refusal.sqlstate, "WG007", "{arguments}: {refusal:?}");
    }
}

#[test]
fn no_lock_is_held_after_it() {
    let mut bed = Bed::new(SIX);
    bed.passes("BEGIN");
    let pid: i32 = bed.writer.query_one("SELECT pg_backend_pid()", &[]).expect("a pid").get(0);
    preview(&mut bed, "DELETE FROM t");
    let locks = bed.number(&format!(
        "SELECT count(*) FROM pg_locks WHERE pid = {pid} AND relation = 't'::regclass AND mode <> 'AccessShareLock'"
    ));
    assert_eq!(locks, 0);
    // Another session changes the very rows, and does not wait for this transaction.
    bed.reader.batch_execute("SET lock_timeout = '5s'; UPDATE t SET v = 3; TRUNCATE t").expect("no lock in the way");
    bed.passes("COMMIT");
}

#[test]
fn nothing_of_it_stays_armed_or_charged() {
    let mut bed = Bed::new(SIX);
    bed.policy("tables => '{public.t}', max_rows_per_transaction => 6");
    bed.passes("BEGIN");
    preview(&mut bed, "DELETE FROM t");
    bed.passes("UPDATE t SET v = 1");
    bed.refused("UPDATE t SET v = 2 WHERE id = 1");
}

#[test]
fn rows_are_shown_as_far_as_the_caller_may_read_them() {
    let mut bed = Bed::new(
        "CREATE TABLE s (id int PRIMARY KEY, secret text, plain text);
         INSERT INTO s VALUES (1, 'hidden', 'seen');
         CREATE TABLE c (id int PRIMARY KEY, s int REFERENCES s ON DELETE CASCADE, secret text);
         INSERT INTO c VALUES (1, 1, 'hidden');",
    );
    let role = bed.db().role("clerk");
    bed.passes(&format!("GRANT UPDATE, DELETE, SELECT (id, plain) ON s TO {role}"));
    let mut clerk = bed.db().connect(&role);
    let told = preview_by(&mut clerk, "UPDATE s SET secret = 'other' WHERE id = 1");
    assert_eq!(told[0].before, Some(json!([{"id": 1, "plain": "seen"}])));
    assert_eq!(told[0].after, Some(json!([{"id": 1, "plain": "seen"}])));
    let told = preview_by(&mut clerk, "DELETE FROM s WHERE id = 1");
    assert_eq!((told[1].relation.as_str(), told[1].rows, &told[1].before), ("public.c", 1, &None));
    bed.passes(&format!("REVOKE SELECT (id, plain) ON s FROM {role}"));
    let told = preview_by(&mut clerk, "DELETE FROM s");
    assert_eq!((told[0].rows, &told[0].before), (1, &None));
    // And no more than the statement itself may.
    let refusal = expect_refusal(try_preview(&mut clerk, "TRUNCATE s", 5));
    assert_eq!(refusal.sqlstate, "42501");
}

#[test]
fn rows_under_row_security_are_counted_and_not_shown() {
    let mut bed = Bed::new(
        "CREATE TABLE s (id int PRIMARY KEY, owner text, v int DEFAULT 0);
         CREATE TABLE c (id int PRIMARY KEY, s int REFERENCES s ON DELETE CASCADE);
         ALTER TABLE s ENABLE ROW LEVEL SECURITY;
         CREATE POLICY own ON s USING (owner = current_user);",
    );
    let role = bed.db().role("tenant");
    bed.passes(&format!(
        "GRANT SELECT, UPDATE ON s TO {role}; INSERT INTO s VALUES (1, '{role}'), (2, '{role}'), (3, 'somebody')"
    ));
    let mut tenant = bed.db().connect(&role);
    let told = preview_by(&mut tenant, "UPDATE s SET v = 1");
    assert_eq!((told[0].rows, &told[0].before, &told[0].after), (2, &None, &None));
}

#[test]
fn long_values_are_told_by_their_size() {
    let mut bed =
        Bed::new("CREATE TABLE s (id int PRIMARY KEY, body text); INSERT INTO s VALUES (1, repeat('x', 100000));");
    let (before, _) = images(&mut bed, "DELETE FROM s");
    assert_eq!(before, json!([{"id": 1, "body": "(100004 bytes)"}]));
}

#[test]
fn numbers_keep_all_their_digits() {
    let mut bed = Bed::new(
        "CREATE TABLE s (id int PRIMARY KEY, n numeric, hidden int);
         INSERT INTO s VALUES (1, 12345678901234567890.12345678901234567890, 0);",
    );
    let role = bed.db().role("clerk");
    bed.passes(&format!("GRANT DELETE, SELECT (id, n) ON s TO {role}"));
    let mut clerk = bed.db().connect(&role);
    let text: String = clerk
        .query_one("SELECT before #>> '{0,n}' FROM writeguard.preview('DELETE FROM s')", &[])
        .expect("a preview")
        .get(0);
    assert_eq!(text, "12345678901234567890.12345678901234567890");
}

#[test]
fn a_preview_inside_a_previewed_statement_has_its_own_account() {
    let mut bed = Bed::new(&format!(
        "{SIX}
         CREATE FUNCTION f() RETURNS bigint LANGUAGE plpgsql AS $$
         BEGIN
             UPDATE t SET v = 1 WHERE id = 1;
             RETURN (SELECT sum(rows) FROM writeguard.preview('DELETE FROM t'));
         END $$;"
    ));
    assert_eq!(counts(&mut bed, "SELECT f()"), [count("public.t", "update", 1)]);
}

#[test]
fn it_works_before_there_is_a_policy_and_for_temporary_tables() {
    let mut bed = Bed::new("CREATE TEMP TABLE mine AS SELECT generate_series(1, 3) AS n;");
    let told = preview(&mut bed, "DELETE FROM mine WHERE n > 1");
    assert_eq!((told[0].rows, told[0].verdict.as_str(), told[0].row_limit), (2, "pass", None));
    assert_eq!(told[0].before, Some(json!([{"n": 2}, {"n": 3}])));
}

#[test]
fn a_row_that_another_session_changed_first_is_shown_as_it_was_then() {
    let mut bed = Bed::new(SIX);
    bed.reader.batch_execute("BEGIN; UPDATE t SET v = 41 WHERE id = 1").expect("an update");
    let fresh = bed.db().admin();
    let mut writer = std::mem::replace(&mut bed.writer, fresh);
    let pid: i32 = writer.query_one("SELECT pg_backend_pid()", &[]).expect("a pid").get(0);
    let waiting = std::thread::spawn(move || preview_by(&mut writer, "UPDATE t SET v = v + 1 WHERE id = 1"));
    let mut watcher = bed.db().admin();
    wait_until(20, || {
        limits::number(&mut watcher, &format!("SELECT count(*) FROM pg_locks WHERE pid = {pid} AND NOT granted")) > 0
    });
    bed.reader.batch_execute("COMMIT").expect("a commit");
    let told = waiting.join().expect("a preview");
    assert_eq!(told[0].before, Some(json!([{"id": 1, "v": 41}])));
    assert_eq!(told[0].after, Some(json!([{"id": 1, "v": 42}])));
}

// ---- The same rows with a request ----

const REQUEST: &str = "SELECT writeguard.request('UPDATE t SET v = 7 WHERE id > 3', 'why this is right')";

#[test]
fn a_request_shows_rows_before_and_after_to_who_decides() {
    let mut bed = Bed::new(SIX);
    bed.limit("{public.t}", 2);
    bed.passes(REQUEST);
    let samples: Value = bed.reader.query_one("SELECT samples FROM writeguard.pending", &[]).expect("a request").get(0);
    let row = |id: i32, v: i32| json!({"id": id, "v": v});
    assert_eq!(
        samples,
        json!([{
            "relation": "public.t",
            "operation": "update",
            "before": [row(4, 0), row(5, 0), row(6, 0)],
            "after": [row(4, 7), row(5, 7), row(6, 7)],
        }])
    );
}

#[test]
fn a_request_shows_five_rows_of_each_table_and_operation() {
    let mut bed = Bed::new("CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t SELECT generate_series(1, 1000);");
    bed.limit("{public.t}", 2);
    bed.passes("SELECT writeguard.request('DELETE FROM t', 'why this is right')");
    assert_eq!(bed.number("SELECT jsonb_array_length(samples #> '{0,before}') FROM writeguard.pending"), 5);
    assert_eq!(bed.number("SELECT rows FROM writeguard.pending"), 1000);
}

#[test]
fn a_policy_keeps_its_tables_rows_out_of_requests() {
    let mut bed = Bed::new(&format!(
        "{SIX} CREATE TABLE c (id int PRIMARY KEY REFERENCES t ON DELETE CASCADE); INSERT INTO c VALUES (4), (5);"
    ));
    bed.limit("{public.*}", 2);
    // Set aside for its limits, in force or not: what it says of samples holds.
    bed.passes(
        "SELECT writeguard.set_policy('private', tables => '{public.t}', samples => false, max_rows => 100,
             roles => '{pg_monitor}', schedule => 'Mon 00:00-00:01 UTC')",
    );
    bed.passes("SELECT writeguard.request('DELETE FROM t WHERE id > 3', 'why this is right')");
    let samples: Value = bed.reader.query_one("SELECT samples FROM writeguard.pending", &[]).expect("a request").get(0);
    assert_eq!(
        samples,
        json!([{"relation": "public.c", "operation": "delete", "before": [{"id": 4}, {"id": 5}], "after": [null, null]}])
    );
    bed.passes("SELECT writeguard.request('TRUNCATE t CASCADE', 'why this is right')");
    let of_truncate = "SELECT count(*) FROM writeguard.pending, jsonb_array_elements(samples) AS s
         WHERE s ->> 'relation' = 'public.t'";
    assert_eq!(bed.number(of_truncate), 0);
    // The caller may look, and sees what they could read.
    let told = preview(&mut bed, "DELETE FROM t WHERE id = 1");
    assert_eq!(told[0].before, Some(json!([{"id": 1, "v": 0}])));
}

#[test]
fn a_request_shows_no_more_than_the_requester_may_read() {
    let mut bed = Bed::new(
        "CREATE TABLE s (id int PRIMARY KEY, secret text); INSERT INTO s VALUES (1, 'hidden'), (2, 'hidden');",
    );
    bed.limit("{public.s}", 1);
    let role = bed.db().role("clerk");
    bed.passes(&format!("GRANT DELETE, SELECT (id) ON s TO {role}"));
    let mut clerk = bed.db().connect(&role);
    limits::pass(&mut clerk, "SELECT writeguard.request('DELETE FROM s', 'why this is right')");
    let samples: Value = bed.reader.query_one("SELECT samples FROM writeguard.pending", &[]).expect("a request").get(0);
    assert_eq!(samples[0]["before"], json!([{"id": 1}, {"id": 2}]));
}

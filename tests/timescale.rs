//! TimescaleDB's hypertables: their rows are in chunks, which they write through a plan node of their own.
//!
//! On PostgreSQL 17, for which Debian has it.
#![cfg(feature = "pg17")]

use std::sync::OnceLock;

use crate::common::limits::*;
use crate::common::{Server, expect_refusal};

/// The servers, with TimescaleDB loaded before and after.
fn servers() -> [&'static Server; 2] {
    static SERVERS: OnceLock<[Server; 2]> = OnceLock::new();
    let start = |libraries: &str| {
        Server::start(&[
            &format!("shared_preload_libraries = '{libraries}'"),
            "max_worker_processes = 32",
            "timescaledb.telemetry_level = off",
        ])
    };
    let [before, after] =
        SERVERS.get_or_init(|| [start("timescaledb,pg_writeguard"), start("pg_writeguard,timescaledb")]);
    [before, after]
}

/// Thirty rows in three chunks, ten in each, and a function that changes one.
const METRICS: &str = "CREATE EXTENSION timescaledb;
    CREATE TABLE metrics (at int NOT NULL, device int NOT NULL, v int NOT NULL, PRIMARY KEY (at, device));
    SELECT create_hypertable('metrics', 'at', chunk_time_interval => 10);
    INSERT INTO metrics SELECT i, i % 3, 0 FROM generate_series(0, 29) AS i;
    CREATE TABLE plain AS TABLE metrics;
    CREATE FUNCTION touch(i int) RETURNS int LANGUAGE plpgsql
    AS 'BEGIN UPDATE metrics SET v = v + 1 WHERE at = i; RETURN i; END'";

fn on_each(mut test: impl FnMut(&mut Bed)) {
    for server in servers() {
        test(&mut Bed::on(server, METRICS));
    }
}

/// What the hypertable holds; [`Bed::contents`] looks at each table alone.
fn held(bed: &mut Bed) -> (i64, i64) {
    (bed.number("SELECT count(*) FROM metrics"), bed.number("SELECT coalesce(sum(v), 0) FROM metrics"))
}

/// Refused with one row less, and passes with `rows`.
#[track_caller]
fn exactly(bed: &mut Bed, sql: &str, rows: u64) {
    bed.limit("{public.metrics}", rows - 1);
    let before = held(bed);
    let result = bed.writer.batch_execute(sql);
    assert!(result.is_err(), "{sql}: passed with a limit of {}", rows - 1);
    let refusal = expect_refusal(result);
    assert_eq!(refusal.sqlstate, "WG001", "{sql}: {refusal:?}");
    assert_eq!(held(bed), before, "{sql}");
    bed.limit("{public.metrics}", rows);
    bed.passes(sql);
    assert_ne!(held(bed), before, "{sql}");
}

#[test]
fn rows_of_chunks_are_counted_exactly() {
    on_each(|bed| {
        assert_eq!(bed.number("SELECT count(*) FROM show_chunks('metrics')"), 3);
        bed.passes("PREPARE p AS UPDATE metrics SET v = v + 1 WHERE at >= 20");
        for (sql, rows) in [
            ("UPDATE metrics SET v = v + 1", 30),
            ("UPDATE metrics SET v = v + 1 WHERE at BETWEEN 5 AND 14", 10),
            ("UPDATE metrics SET v = metrics.v + 1 FROM plain WHERE plain.at = metrics.at AND plain.at < 12", 12),
            ("WITH u AS (UPDATE metrics SET v = v + 1 WHERE at < 15 RETURNING at) SELECT count(*) FROM u", 15),
            (
                "WITH u AS (DELETE FROM metrics WHERE at > 27), v AS (UPDATE metrics SET v = v + 1 WHERE at < 3) UPDATE metrics SET v = v + 1 WHERE at = 9",
                6,
            ),
            ("SELECT touch(i) FROM generate_series(5, 24) AS i", 20),
            ("DO $$ BEGIN FOR i IN 0..27 LOOP UPDATE metrics SET v = v + 1 WHERE at = i; END LOOP; END $$", 28),
            ("EXECUTE p", 8),
            ("DELETE FROM metrics WHERE at BETWEEN 8 AND 11", 4),
            ("DELETE FROM metrics", 24),
        ] {
            exactly(bed, sql, rows);
        }
    });
}

#[test]
fn conflicting_rows_that_are_updated_are_counted_and_new_ones_are_not() {
    on_each(|bed| {
        let upsert = "INSERT INTO metrics SELECT i, i % 3, 1 FROM generate_series(16, 40) AS i
                      ON CONFLICT (at, device) DO UPDATE SET v = metrics.v + 1";
        exactly(bed, upsert, 14);
        exactly(bed, &format!("WITH u AS ({upsert} WHERE metrics.at <> 20 RETURNING v) SELECT count(*) FROM u"), 24);
        exactly(bed, &format!("{upsert} RETURNING at"), 25);
        bed.limit("{public.metrics}", 0);
        bed.passes("INSERT INTO metrics SELECT i, 0, 1 FROM generate_series(100, 140) AS i");
        bed.passes("INSERT INTO metrics SELECT i, 0, 1 FROM generate_series(130, 150) AS i ON CONFLICT DO NOTHING");
    });
}

/// The tag of a statement stays its own, whatever it has in WITH.
#[test]
fn command_tags_stay_what_they_are() {
    on_each(|bed| {
        bed.limit("{public.metrics}", 30);
        for (sql, rows) in [
            ("WITH u AS (UPDATE metrics SET v = 3 WHERE at < 12 RETURNING at) SELECT * FROM u WHERE at > 9", 2),
            ("WITH u AS (DELETE FROM metrics WHERE at > 20) UPDATE metrics SET v = 4 WHERE at < 5", 5),
            (
                "WITH u AS (UPDATE metrics SET v = 3 WHERE at < 12 RETURNING *) INSERT INTO metrics SELECT at + 100, device, v FROM u",
                12,
            ),
        ] {
            assert_eq!(bed.writer.execute(sql, &[]).unwrap(), rows, "{sql}");
        }
    });
}

#[test]
fn a_merge_is_counted() {
    on_each(|bed| {
        exactly(
            bed,
            "MERGE INTO metrics AS m USING (SELECT at, device FROM plain WHERE at < 17) AS s ON m.at = s.at AND m.device = s.device
             WHEN MATCHED AND s.at < 3 THEN DELETE WHEN MATCHED THEN UPDATE SET v = m.v + 1",
            17,
        );
    });
}

#[test]
fn chunks_belong_to_their_hypertable() {
    on_each(|bed| {
        let sql = "SELECT c::text FROM show_chunks('metrics') AS c LIMIT 1";
        let chunk: String = bed.reader.query_one(sql, &[]).unwrap().get(0);
        exactly(bed, &format!("UPDATE {chunk} SET v = v + 1"), 10);
        bed.limit("{public.metrics}", 9);
        assert_eq!(expect_refusal(bed.writer.batch_execute(&format!("TRUNCATE {chunk}"))).sqlstate, "WG005");
        bed.limit("{public.metrics}", 29);
        assert_eq!(expect_refusal(bed.writer.batch_execute("TRUNCATE metrics")).sqlstate, "WG005");
        assert_eq!(held(bed).0, 30);
        bed.policy("tables => '{public.metrics}', operations => '{drop}', max_rows => 9");
        let drop = "SELECT drop_chunks('metrics', older_than => 10)";
        assert_eq!(expect_refusal(bed.writer.batch_execute(drop)).sqlstate, "WG005");
        assert_eq!(held(bed).0, 30);
        bed.policy("tables => '{public.metrics}', operations => '{drop}', max_rows => 10");
        bed.passes(drop);
        assert_eq!(held(bed).0, 20);
    });
}

/// What is kept for undo are rows of chunks. Of an upsert they cannot be, so it is not lifted.
#[test]
fn changed_rows_of_chunks_are_put_back() {
    on_each(|bed| {
        bed.policy("tables => '{public.metrics}', max_rows => 3, override => 'flag', undo => '1 day'");
        let contents = "SELECT string_agg(metrics::text, ';' ORDER BY at)::text FROM metrics";
        let before: String = bed.reader.query_one(contents, &[]).unwrap().get(0);
        for sql in ["UPDATE metrics SET v = v + 1 WHERE at < 15", "DELETE FROM metrics WHERE at BETWEEN 8 AND 21"] {
            bed.passes(&format!("BEGIN; SET LOCAL writeguard.override = on; {sql}; COMMIT"));
            assert_ne!(bed.reader.query_one(contents, &[]).unwrap().get::<_, String>(0), before, "{sql}");
            bed.passes("SELECT * FROM writeguard.undo((SELECT max(id) FROM writeguard.change))");
            assert_eq!(bed.reader.query_one(contents, &[]).unwrap().get::<_, String>(0), before, "{sql}");
        }
        let upsert = "INSERT INTO metrics SELECT i, i % 3, 1 FROM generate_series(16, 25) AS i
                      ON CONFLICT (at, device) DO UPDATE SET v = metrics.v + 1";
        let lifted = format!("BEGIN; SET LOCAL writeguard.override = on; {upsert}; COMMIT");
        assert_eq!(expect_refusal(bed.writer.batch_execute(&lifted)).sqlstate, "WG008");
        bed.passes("ROLLBACK");
        assert_eq!(bed.reader.query_one(contents, &[]).unwrap().get::<_, String>(0), before);
    });
}

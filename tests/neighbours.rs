//! Beside extensions that production servers have, loaded before this library and after it: limits hold to the row, and
//! what the others count, write to the log and run is what it would be without.
//!
//! On PostgreSQL 15, for which Debian has all of them; TimescaleDB is in `timescale.rs`.
#![cfg(feature = "pg15")]

use std::sync::OnceLock;

use crate::common::limits::*;
use crate::common::{Server, expect_refusal, wait_until};

const OTHERS: &str = "pg_stat_statements,auto_explain,pgaudit,set_user,pg_cron,plpgsql_check";

/// The servers, with the others loaded before and after.
fn servers() -> [&'static Server; 2] {
    static SERVERS: OnceLock<[Server; 2]> = OnceLock::new();
    let start = |libraries: &str| {
        let server = Server::start(&[
            &format!("shared_preload_libraries = '{libraries}'"),
            "max_worker_processes = 32",
            "pg_stat_statements.track = all",
            "auto_explain.log_min_duration = 0",
            "auto_explain.log_analyze = on",
            "auto_explain.log_timing = off",
            "auto_explain.log_nested_statements = on",
            "auto_explain.log_triggers = on",
            "pgaudit.log = 'write,ddl'",
            "cron.use_background_workers = on",
        ]);
        let mut postgres = server.postgres();
        pass(&mut postgres, "CREATE EXTENSION pg_cron");
        server
    };
    let [before, after] =
        SERVERS.get_or_init(|| [start(&format!("{OTHERS},pg_writeguard")), start(&format!("pg_writeguard,{OTHERS}"))]);
    [before, after]
}

const EXTENSIONS: &str = "CREATE EXTENSION pg_stat_statements; CREATE EXTENSION pgaudit; CREATE EXTENSION set_user;
    CREATE EXTENSION plpgsql_check; CREATE EXTENSION hypopg;";

/// A database on each server, with all extensions and [`SIX`].
fn on_each(mut test: impl FnMut(&'static Server, &mut Bed)) {
    for server in servers() {
        test(server, &mut Bed::on(server, &format!("{EXTENSIONS} {SIX}")));
    }
}

fn blocked(bed: &mut Bed) -> i64 {
    bed.number("SELECT count(*) FROM writeguard.event WHERE kind = 'blocked'")
}

#[test]
fn limits_hold_to_the_row() {
    on_each(|_, bed| {
        bed.passes(
            "CREATE TABLE child (id int REFERENCES t ON DELETE CASCADE, n int);
             INSERT INTO child SELECT id, n FROM t, generate_series(1, 2) AS n;
             CREATE FUNCTION touch(i int) RETURNS int LANGUAGE plpgsql
             AS 'BEGIN UPDATE t SET v = v + 1 WHERE id = i; RETURN i; END'",
        );
        for (sql, rows) in [
            ("UPDATE t SET v = v + 1", 6),
            ("WITH u AS (UPDATE t SET v = 5 WHERE id < 3) UPDATE t SET v = 6 WHERE id > 3", 5),
            ("MERGE INTO t USING generate_series(1, 5) AS s ON s = t.id WHEN MATCHED THEN UPDATE SET v = t.v + s", 5),
            ("INSERT INTO t SELECT i, 1 FROM generate_series(4, 9) AS i ON CONFLICT (id) DO UPDATE SET v = 9", 3),
            ("SELECT touch(i) FROM generate_series(1, 6) AS i", 6),
            ("DELETE FROM t WHERE id < 3", 6),
        ] {
            bed.exactly("{public.*}", sql, rows);
        }
        bed.limit("{public.*}", 2);
        let refusal = expect_refusal(bed.writer.batch_execute("TRUNCATE t CASCADE"));
        assert_eq!(refusal.sqlstate, "WG005");
        let refusals = blocked(bed);
        assert!(refusals > 7, "{refusals}");
    });
}

#[test]
fn statements_are_counted_and_explained_as_without_a_limit() {
    on_each(|server, bed| {
        bed.passes("CREATE TABLE free AS TABLE t; CREATE INDEX ON free (id)");
        bed.limit("{public.t}", 4);
        bed.passes("SELECT pg_stat_statements_reset()");
        for table in ["t", "free"] {
            bed.passes(&format!("UPDATE {table} SET v = v + 1 WHERE id <= 4"));
            bed.passes(&format!(
                "WITH u AS (UPDATE {table} SET v = 2 WHERE id = 1 RETURNING id) DELETE FROM {table} WHERE id = 6"
            ));
        }
        bed.refused("UPDATE t SET v = 7");
        let counted = |bed: &mut Bed, table: &str| -> Vec<(i64, i64)> {
            let sql = "SELECT calls, rows FROM pg_stat_statements WHERE query ~ ('(UPDATE|FROM) ' || $1 || ' ')
                       AND query !~ 'pg_stat_statements' ORDER BY query";
            bed.reader.query(sql, &[&table]).unwrap().iter().map(|row| (row.get(0), row.get(1))).collect()
        };
        // The refused one ended in an error, and is not among them.
        assert_eq!(counted(bed, "t"), [(1, 4), (1, 1)]);
        assert_eq!(counted(bed, "free"), counted(bed, "t"));

        let log = server.log();
        let explained =
            |table: &str, rows: &str| log.contains(&format!("Update on {table}  (cost=")) && log.contains(rows);
        assert!(explained("t", "(actual rows=4 loops=1)") && explained("free", "(actual rows=4 loops=1)"), "{log}");
        assert!(!log.contains("ERROR:  XX"), "{log}");
    });
}

#[test]
fn pgaudit_tells_of_what_passes_and_of_what_is_refused() {
    on_each(|server, bed| {
        bed.limit("{public.t}", 2);
        bed.passes("UPDATE t SET v = 71 WHERE id <= 2");
        bed.refused("UPDATE t SET v = 72 WHERE id <= 3");
        let log = server.log();
        for value in [71, 72] {
            let line = format!("WRITE,UPDATE,,,UPDATE t SET v = {value} ");
            assert!(
                log.lines().any(|line_of| line_of.contains("AUDIT: SESSION") && line_of.contains(&line)),
                "{value}"
            );
        }
    });
}

/// People are compared by login, whatever set_user makes of them.
#[test]
fn set_user_changes_nobodys_limit() {
    on_each(|_, bed| {
        let (dba, other) = (bed.db().role("dba"), bed.db().role("other"));
        pass(
            &mut bed.reader,
            &format!(
                "GRANT EXECUTE ON FUNCTION set_user(text), set_user(text, text), set_user_u(text) TO {dba};
                 GRANT ALL ON t TO {other}; GRANT {other} TO {dba};
                 SELECT writeguard.set_policy('dba', tables => '{{public.t}}', roles => '{{{dba}}}', max_rows => 2)"
            ),
        );
        bed.writer = bed.db().connect(&dba);
        bed.passes(&format!("SELECT set_user('{other}')"));
        assert_eq!(text(bed, "SELECT current_user::text"), other);
        bed.refused("UPDATE t SET v = 1 WHERE id <= 3");
        bed.passes("UPDATE t SET v = 1 WHERE id <= 2");
        let last = "SELECT count(*) FROM writeguard.event WHERE kind = 'blocked' AND login = $1";
        wait_until(10, || bed.reader.query_one(last, &[&dba]).unwrap().get::<_, i64>(0) == 1);
    });
}

fn text(bed: &mut Bed, sql: &str) -> String {
    bed.writer.query_one(sql, &[]).unwrap().get(0)
}

/// Jobs run in background workers, without a client.
#[test]
fn jobs_of_pg_cron_are_limited() {
    let mut jobs = Vec::new();
    on_each_that_stays(|server, bed| {
        bed.limit("{public.t}", 3);
        let name = bed.db().name.clone();
        let mut postgres = server.postgres();
        for (job, sql) in
            [("passes", "UPDATE t SET v = 81 WHERE id <= 3"), ("refused", "UPDATE t SET v = 82 WHERE id > 2")]
        {
            let schedule = "SELECT cron.schedule_in_database($1, '* * * * *', $2, $3)";
            postgres.execute(schedule, &[&format!("{name}-{job}"), &sql, &name]).unwrap();
        }
        jobs.push((server, name));
    });
    // They run at the full minute.
    for (server, name) in jobs {
        let mut postgres = server.postgres();
        let mut run = |job: &str| -> Option<(String, String)> {
            let sql = "SELECT d.status, coalesce(d.return_message, '') FROM cron.job_run_details AS d JOIN cron.job AS j USING (jobid)
                       WHERE j.jobname = $1 AND d.status IN ('succeeded', 'failed')";
            let rows = postgres.query(sql, &[&format!("{name}-{job}")]).unwrap();
            rows.first().map(|row| (row.get(0), row.get(1)))
        };
        wait_until(130, || run("passes").is_some() && run("refused").is_some());
        assert_eq!(run("passes").unwrap().0, "succeeded");
        let (status, message) = run("refused").unwrap();
        assert_eq!(status, "failed");
        assert!(message.contains("exceeds the limit of 3 rows"), "{message}");
        for job in ["passes", "refused"] {
            pass(&mut postgres, &format!("SELECT cron.unschedule('{name}-{job}')"));
        }
        let (printed, fine) = server.psql_with(
            &name,
            "postgres",
            &[
                "-At",
                "-c",
                "SELECT (SELECT count(*) FROM t WHERE v = 81), (SELECT count(*) FROM t WHERE v = 82),
                    (SELECT count(*) > 0 FROM writeguard.event WHERE kind = 'blocked' AND rows = 4)",
            ],
        );
        assert!(fine && printed.trim() == "3|0|t", "{printed}");
    }
}

/// As [`on_each`], with databases that are still there afterwards.
fn on_each_that_stays(mut test: impl FnMut(&'static Server, &mut Bed)) {
    for server in servers() {
        let mut bed = Bed::on(server, &format!("{EXTENSIONS} {SIX}"));
        test(server, &mut bed);
        bed.stays();
    }
}

#[test]
fn hypothetical_indexes_do_not_reach_a_write() {
    on_each(|_, bed| {
        bed.passes("CREATE TABLE large AS SELECT i AS id, 0 AS v FROM generate_series(1, 10000) AS i; ANALYZE large");
        bed.limit("{public.large}", 3);
        // auto_explain does not know hypothetical indexes by name.
        bed.passes(
            "SET auto_explain.log_min_duration = -1; SELECT * FROM hypopg_create_index('CREATE INDEX ON large (id)')",
        );
        let plan = "EXPLAIN UPDATE large SET v = 1 WHERE id = 5";
        let plan: Vec<String> = bed.writer.query(plan, &[]).unwrap().iter().map(|row| row.get(0)).collect();
        assert!(plan.join("\n").contains("Index Scan using \"<"), "{plan:?}");
        bed.passes("UPDATE large SET v = 1 WHERE id <= 3");
        bed.refused("UPDATE large SET v = 1 WHERE id <= 4");
    });
}

/// Its moves of rows are deletes and inserts of whoever runs them, and partitions that it makes are covered with their
/// table.
#[test]
fn pg_partman_works_within_the_limits() {
    for server in servers() {
        let mut bed = Bed::on(
            server,
            "CREATE SCHEMA partman; CREATE EXTENSION pg_partman SCHEMA partman;
             CREATE TABLE visit (id int NOT NULL, v int) PARTITION BY RANGE (id);
             SELECT partman.create_parent('public.visit', 'id', 'native', '10');
             INSERT INTO visit SELECT i, 0 FROM generate_series(1, 45) AS i;
             INSERT INTO visit SELECT i, 0 FROM generate_series(1001, 1006) AS i",
        );
        let misplaced = "SELECT count(*) FROM visit_default";
        assert_eq!(bed.number(misplaced), 6);
        bed.limit("{public.visit}", 5);
        bed.refused("UPDATE visit SET v = 1 WHERE id BETWEEN 8 AND 13");
        bed.passes("UPDATE visit SET v = 1 WHERE id BETWEEN 9 AND 13");
        bed.refused("DELETE FROM visit_p10 WHERE id >= 10");
        // Six rows leave the default partition.
        bed.refused("SELECT partman.partition_data_id('public.visit', p_batch_count => 10)");
        assert_eq!(bed.number(misplaced), 6);
        bed.limit("{public.visit}", 6);
        bed.passes("SELECT partman.partition_data_id('public.visit', p_batch_count => 10)");
        assert_eq!(bed.number(misplaced), 0);
        bed.passes("SELECT partman.run_maintenance('public.visit')");
        assert_eq!(bed.number("SELECT count(*) FROM visit"), 51);
        bed.refused("UPDATE visit SET v = 2 WHERE id BETWEEN 1000 AND 1010 OR id = 1");
    }
}

/// It runs through functions without running them.
#[test]
fn plpgsql_check_changes_no_row_and_counts_none() {
    on_each(|_, bed| {
        bed.limit("{public.t}", 3);
        bed.passes(
            "CREATE FUNCTION all_rows() RETURNS void LANGUAGE plpgsql
             AS 'DECLARE i int; BEGIN UPDATE t SET v = 3; FOR i IN 1..6 LOOP DELETE FROM t WHERE id = i; END LOOP; END';
             CREATE FUNCTION wrong() RETURNS void LANGUAGE plpgsql AS 'BEGIN UPDATE t SET nowhere = 3; END'",
        );
        let told: Vec<String> = bed
            .writer
            .query("SELECT * FROM plpgsql_check_function('all_rows()') UNION ALL SELECT * FROM plpgsql_check_function('wrong()')", &[])
            .unwrap()
            .iter()
            .map(|row| row.get(0))
            .collect();
        assert!(told.iter().any(|line| line.contains("column \"nowhere\"")), "{told:?}");
        assert_eq!(blocked(bed), 0);
        bed.passes("SET plpgsql_check.mode = every_start");
        bed.refused("SELECT all_rows()");
        bed.limit("{public.t}", 12);
        bed.passes("SELECT all_rows()");
        assert_eq!(bed.number("SELECT count(*) FROM t"), 0);
    });
}

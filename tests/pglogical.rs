//! A subscriber of pglogical, loaded before this library and after it: what it applies is never limited and never counted,
//! whether it writes rows by itself or has SQL run, and whoever writes there by hand is limited as everywhere.
//!
//! On PostgreSQL 15, for which Debian has it. What tells an apply from other sessions is in `replication_origin.rs`.
#![cfg(feature = "pg15")]

use postgres::Client;

use crate::common::limits::{number, pass};
use crate::common::{Server, expect_refusal, wait_until};

const TABLES: &str = "CREATE EXTENSION pglogical;
    CREATE TABLE t (id int PRIMARY KEY, v int);
    CREATE TABLE u (id int PRIMARY KEY, v int)";

const ROWS: &str = "INSERT INTO t SELECT i, 0 FROM generate_series(1, 6) AS i; INSERT INTO u TABLE t";

/// What a table holds in either database, `gone` without it.
fn contents(client: &mut Client, table: &str) -> String {
    let sql = format!(
        "SELECT CASE WHEN to_regclass('{table}') IS NULL THEN 'gone' ELSE query_to_xml('SELECT * FROM {table} ORDER BY id',
             true, false, '')::text END"
    );
    client.query_one(&sql, &[]).unwrap().get(0)
}

/// What the library has recorded in a database, policies apart.
fn records(client: &mut Client) -> i64 {
    number(
        client,
        "SELECT (SELECT count(*) FROM writeguard.event WHERE kind <> 'policy_changed')
              + (SELECT count(*) FROM writeguard.change)
              + (SELECT coalesce(sum(statements), 0) FROM writeguard.stat)::bigint",
    )
}

struct Subscription {
    server: Server,
    provider: Client,
    subscriber: Client,
}

impl Subscription {
    /// Of one database of a server to another one, where two rows may be changed.
    fn start(libraries: &str, settings: &[&str]) -> Subscription {
        let libraries = format!("shared_preload_libraries = '{libraries}'");
        let mut lines = vec![
            libraries.as_str(),
            "wal_level = logical",
            "max_worker_processes = 32",
            "track_commit_timestamp = on",
            "pglogical.conflict_resolution = 'error'",
        ];
        lines.extend(settings);
        let server = Server::start(&lines);
        trust_its_plugin(&server);
        let (provider_is, subscriber_is) = (server.database(), server.database());
        let (mut provider, mut subscriber) = (provider_is.admin(), subscriber_is.admin());
        pass(&mut provider, TABLES);
        pass(&mut subscriber, TABLES);
        pass(&mut provider, ROWS);
        let from = server.address(&provider_is.name);
        pass(
            &mut provider,
            &format!(
                "SELECT pglogical.create_node('provider', '{from}');
                 SELECT pglogical.replication_set_add_all_tables('default', '{{public}}')"
            ),
        );
        pass(
            &mut subscriber,
            &format!(
                "SELECT writeguard.set_policy('p', tables => '{{public.*}}', max_rows => 2, undo => '1 day',
                     operations => '{{update,delete,truncate,drop}}', max_rows_per_transaction => 2,
                     rate_rows => 2, rate_interval => '1 hour');
                 SELECT pglogical.create_node('subscriber', '{}');
                 SELECT pglogical.create_subscription('subscription', '{from}', synchronize_data := true)",
                server.address(&subscriber_is.name)
            ),
        );
        let mut subscription = Subscription { server, provider, subscriber };
        subscription.is_applied("the rows that were there");
        subscription
    }

    /// Both databases hold the same, or soon do.
    #[track_caller]
    fn is_applied(&mut self, what: &str) {
        // Shown where that never comes about.
        println!("{what}");
        for table in ["t", "u"] {
            let there = contents(&mut self.provider, table);
            wait_until(30, || contents(&mut self.subscriber, table) == there);
        }
    }

    /// The SQLSTATE that a write gets which somebody tries at the subscriber.
    #[track_caller]
    fn refused(&mut self, write: &str) -> String {
        expect_refusal(self.subscriber.batch_execute(write)).sqlstate
    }
}

/// Newer minor versions want to be told which libraries may decode the log; older ones do not know the setting.
fn trust_its_plugin(server: &Server) {
    let mut postgres = server.postgres();
    if number(&mut postgres, "SELECT count(*) FROM pg_settings WHERE name = 'output_plugin_libraries'") > 0 {
        pass(&mut postgres, "ALTER SYSTEM SET output_plugin_libraries = pgoutput, pglogical_output");
        pass(&mut postgres, "SELECT pg_reload_conf()");
    }
}

fn what_is_applied_passes_and_what_is_written_there_does_not(libraries: &str, settings: &[&str]) {
    let mut all = Subscription::start(libraries, settings);
    for write in [
        "UPDATE t SET v = v + 1",
        "BEGIN; UPDATE t SET v = v + 1 WHERE id <= 3; UPDATE t SET v = v + 1 WHERE id > 3; DELETE FROM u; COMMIT",
        "DELETE FROM t",
        "INSERT INTO t SELECT i, 9 FROM generate_series(1, 6) AS i; INSERT INTO u TABLE t",
        "INSERT INTO t SELECT i, 0 FROM generate_series(1, 6) AS i ON CONFLICT (id) DO UPDATE SET v = t.v + 1",
        "TRUNCATE t, u",
        "INSERT INTO t SELECT i, 9 FROM generate_series(1, 6) AS i; INSERT INTO u TABLE t",
        "SELECT pglogical.replicate_ddl_command('ALTER TABLE public.t ADD w int NOT NULL DEFAULT 1')",
        "SELECT pglogical.replicate_ddl_command('ALTER TABLE public.t ALTER v TYPE bigint')",
        "SELECT pglogical.replicate_ddl_command('ALTER TABLE public.t DROP COLUMN w')",
        "SELECT pglogical.replicate_ddl_command('DROP TABLE public.u CASCADE')",
        "UPDATE t SET v = v + 1",
    ] {
        pass(&mut all.provider, write);
        all.is_applied(write);
        assert_eq!(records(&mut all.subscriber), 0, "{write}");
    }

    assert_eq!(all.refused("UPDATE t SET v = 0"), "WG001");
    assert_eq!(all.refused("TRUNCATE t"), "WG005");
    // Of the rate nothing is used up either: two rows are what it has.
    pass(&mut all.subscriber, "UPDATE t SET v = 0 WHERE id <= 2");
    assert_eq!(all.refused("UPDATE t SET v = 0 WHERE id = 3"), "WG001");
    let events = "SELECT count(*) FROM writeguard.event WHERE kind = 'blocked'";
    wait_until(10, || number(&mut all.subscriber, events) == 3);
    // The stream goes on beside that.
    pass(&mut all.provider, "DELETE FROM t WHERE id > 1");
    wait_until(30, || number(&mut all.subscriber, "SELECT count(*) FROM t") == 1);
    let status = "SELECT count(*) FROM pglogical.show_subscription_status() WHERE status = 'replicating'";
    assert_eq!(number(&mut all.subscriber, status), 1);
    let errors: Vec<String> =
        all.server.log().lines().filter(|line| line.contains("ERROR:")).map(str::to_owned).collect();
    assert_eq!(errors.len(), 3, "{errors:?}");
}

#[test]
fn rows_that_are_written_without_statements() {
    what_is_applied_passes_and_what_is_written_there_does_not("pglogical,pg_writeguard", &[]);
}

#[test]
fn rows_that_are_written_by_statements() {
    what_is_applied_passes_and_what_is_written_there_does_not(
        "pg_writeguard,pglogical",
        &["pglogical.use_spi = on", "pglogical.batch_inserts = off"],
    );
}

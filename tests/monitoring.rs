//! Monitoring: what Prometheus' own exporter makes of monitoring/queries.yaml, with nothing but pg_monitor, and the alert
//! rules on it.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::common::limits::{number, pass};
use crate::common::{Database, Server, expect_refusal, free_port, wait_until};
use postgres::Client;

const KINDS: [&str; 15] = [
    "blocked",
    "warned",
    "observed",
    "overridden",
    "expectation_failed",
    "requested",
    "approved",
    "rejected",
    "revoked",
    "token_refused",
    "break_glass",
    "undone",
    "policy_changed",
    "uncovered",
    "disabled",
];

#[track_caller]
fn refuse(client: &mut Client, sql: &str, code: &str) {
    let refusal = expect_refusal(client.batch_execute(sql));
    assert_eq!(refusal.sqlstate, code, "{sql}: {refusal:?}");
}

fn file(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("monitoring").join(name)
}

/// Prometheus' exporter, asking one server.
struct Exporter {
    process: Child,
    port: u16,
}

impl Drop for Exporter {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

type Metrics = BTreeMap<String, f64>;

/// What keeps an exporter that looks at the sizes of tables by itself from waiting for one that is locked.
fn without_sizes() -> Option<&'static str> {
    let help =
        Command::new("prometheus-postgres-exporter").arg("--help").output().expect("scripts/prepare installs it");
    let help = String::from_utf8_lossy(&[help.stdout, help.stderr].concat()).into_owned();
    help.contains("--collector.stat_user_tables").then_some("--no-collector.stat_user_tables")
}

impl Exporter {
    /// Asks these databases as this role.
    fn start(server: &Server, role: &str, databases: &[&Database], arguments: &[&str]) -> Exporter {
        let source = |db: &&Database| {
            format!("host=127.0.0.1 port={} user={role} dbname={} sslmode=disable", server.port(), db.name)
        };
        let port = free_port();
        let process = Command::new("prometheus-postgres-exporter")
            .env("DATA_SOURCE_NAME", databases.iter().map(source).collect::<Vec<_>>().join(","))
            .arg(format!("--extend.query-path={}", file("queries.yaml").display()))
            .args(["--disable-settings-metrics", &format!("--web.listen-address=127.0.0.1:{port}")])
            .args(without_sizes())
            .args(arguments)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("cannot run prometheus-postgres-exporter: scripts/prepare installs it");
        let exporter = Exporter { process, port };
        wait_until(60, || exporter.try_scrape().is_some());
        exporter
    }

    fn try_scrape(&self) -> Option<Metrics> {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).ok()?;
        stream.set_read_timeout(Some(Duration::from_secs(60))).ok()?;
        stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).ok()?;
        let (head, body) = answer.split_once("\r\n\r\n")?;
        assert!(head.starts_with("HTTP/1.0 200"), "{head}\n{body}");
        let lines = body.lines().filter(|line| !line.starts_with('#'));
        Some(
            lines
                .filter_map(|line| line.rsplit_once(' '))
                .map(|(name, value)| (name.to_owned(), value.parse().expect(value)))
                .collect(),
        )
    }

    #[track_caller]
    fn scrape(&self) -> Metrics {
        self.try_scrape().expect("the exporter answers")
    }

    /// Waits until a metric has that value.
    #[track_caller]
    fn wait_for(&self, metric: &str, value: f64) {
        let end = Instant::now() + Duration::from_secs(60);
        loop {
            let now = find(&self.scrape(), metric);
            if now == Some(value) {
                return;
            }
            assert!(Instant::now() < end, "{metric} is {now:?}, not {value}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

/// The value of a metric, given as `name{label="value",…}` with some of its labels.
fn find(metrics: &Metrics, metric: &str) -> Option<f64> {
    let (name, labels) = metric.split_once('{').unwrap_or((metric, "}"));
    let labels: Vec<&str> = labels.trim_end_matches('}').split(',').filter(|label| !label.is_empty()).collect();
    let is = |found: &str| {
        let (found_name, found_labels) = found.split_once('{').unwrap_or((found, ""));
        found_name == name && labels.iter().all(|label| found_labels.contains(label))
    };
    let mut found = metrics.iter().filter(|(name, _)| is(name));
    let value = found.next().map(|(_, value)| *value);
    assert!(found.next().is_none(), "{metric} is not one metric");
    value
}

/// A server on loopback, a table `t` of a hundred rows in a database, an ordinary role that owns it, and a role that has
/// pg_monitor.
struct Stage {
    server: Server,
    db: Database,
    admin: Client,
    owner: String,
    monitor: String,
}

impl Stage {
    fn new(lines: &[&str]) -> Stage {
        let server = Server::start(&[&["listen_addresses = '127.0.0.1'"], lines].concat());
        let (db, admin, owner) = Stage::database(&server);
        let monitor = db.role("monitor");
        server.postgres().batch_execute(&format!("GRANT pg_monitor TO {monitor}")).expect("pg_monitor");
        Stage { server, db, admin, owner, monitor }
    }

    fn database(server: &Server) -> (Database, Client, String) {
        let db = server.database();
        let owner = db.role("owner");
        let mut admin = db.admin();
        let setup = format!(
            "GRANT CREATE ON SCHEMA public TO {owner}; SET ROLE {owner};
             CREATE TABLE t (id int PRIMARY KEY, v int NOT NULL DEFAULT 0);
             INSERT INTO t SELECT generate_series(1, 100); RESET ROLE"
        );
        pass(&mut admin, &setup);
        (db, admin, owner)
    }

    fn exporter(&self) -> Exporter {
        Exporter::start(&self.server, &self.monitor, &[&self.db], &[])
    }

    fn policy(&mut self, name: &str, arguments: &str) {
        pass(
            &mut self.admin,
            &format!("SELECT writeguard.set_policy('{name}', tables => '{{public.t}}', {arguments})"),
        );
    }
}

#[test]
fn the_exporter_shows_what_happened() {
    let mut stage = Stage::new(&["writeguard.observed_per_minute = 1"]);
    let exporter = stage.exporter();

    // Every kind is there before its first event: a counter that begins at one has no increase.
    let metrics = exporter.scrape();
    for kind in KINDS {
        let metric = format!("pg_writeguard_events_total{{kind=\"{kind}\"}}");
        assert_eq!(find(&metrics, &metric), Some(0.0), "{kind} in {metrics:#?}");
    }
    assert_eq!(find(&metrics, "pg_writeguard_launcher_up"), Some(1.0));
    assert_eq!(find(&metrics, "pg_writeguard_enabled"), Some(1.0));
    assert_eq!(find(&metrics, "pg_exporter_last_scrape_error"), Some(0.0));
    let errors: Vec<_> = metrics.iter().filter(|(name, _)| name.contains("user_queries_load_error")).collect();
    assert!(errors.len() == 1 && *errors[0].1 == 0.0, "{errors:?}");

    let mut owner = stage.db.connect(&stage.owner);
    stage.policy("limit", "max_rows => 10, override => 'flag'");
    refuse(&mut owner, "UPDATE t SET v = 1", "WG001");
    refuse(&mut owner, "BEGIN; DELETE FROM t", "WG001");
    pass(&mut owner, "ROLLBACK");
    refuse(&mut owner, "TRUNCATE t", "WG005");
    pass(&mut owner, "BEGIN; SET LOCAL writeguard.override = on; UPDATE t SET v = 2; COMMIT");
    pass(&mut owner, "BEGIN; SET LOCAL writeguard.override = on; UPDATE t SET v = 3; ROLLBACK");
    stage.policy("limit", "max_rows => 10");
    refuse(&mut owner, "SET writeguard.override = on; SET writeguard.token = 'none'; UPDATE t SET v = 4", "WG006");
    pass(&mut owner, "RESET writeguard.override; RESET writeguard.token");
    pass(&mut stage.admin, "SET writeguard.enabled = off; UPDATE t SET v = 5; RESET writeguard.enabled");
    stage.policy("limit", "max_rows => 10, mode => 'warn'");
    // One is stored, the others are told as a number; all of them happened.
    for _ in 0..3 {
        pass(&mut owner, "UPDATE t SET v = 6");
    }
    stage.policy("limit", "max_rows => 10, mode => 'observe'");
    pass(&mut owner, "UPDATE t SET v = 7");
    pass(&mut stage.admin, "SELECT writeguard.drop_policy('limit')");
    refuse(&mut owner, "SET writeguard.expect_rows = 1; UPDATE t SET v = 8", "WG004");

    let expected = [
        ("blocked", 3.0),
        ("overridden", 1.0),
        ("token_refused", 1.0),
        ("disabled", 1.0),
        ("warned", 3.0),
        ("observed", 1.0),
        ("expectation_failed", 1.0),
        ("policy_changed", 5.0),
        ("break_glass", 0.0),
    ];
    for (kind, events) in expected {
        exporter.wait_for(&format!("pg_writeguard_events_total{{kind=\"{kind}\"}}"), events);
    }
    let metrics = exporter.scrape();
    for (kind, events) in [("blocked", 3.0), ("overridden", 1.0), ("warned", 3.0), ("observed", 1.0)] {
        let metric = format!("pg_writeguard_policy_events_total{{kind=\"{kind}\",policy=\"limit\"}}");
        assert_eq!(find(&metrics, &metric), Some(events), "{kind}");
    }
    let none = "pg_writeguard_policy_events_total{kind=\"break_glass\"}";
    assert_eq!(find(&metrics, none), None);
    assert_eq!(find(&metrics, "pg_writeguard_event_queue_summed_up_total"), Some(2.0));

    // The counts are those of the table, where that has each event on its own.
    let stored = stage.admin.query("SELECT kind, count(*) FROM writeguard.event GROUP BY kind", &[]).expect("events");
    for row in stored.iter().filter(|row| row.get::<_, &str>(0) != "warned") {
        let metric = format!("pg_writeguard_events_total{{kind=\"{}\"}}", row.get::<_, &str>(0));
        assert_eq!(find(&metrics, &metric), Some(row.get::<_, i64>(1) as f64), "{metric}");
    }
}

#[test]
fn the_exporter_shows_that_events_wait_and_that_they_were_late() {
    let mut stage = Stage::new(&["writeguard.event_timeout = 100ms"]);
    stage.policy("limit", "max_rows => 10");
    let exporter = stage.exporter();
    exporter.wait_for("pg_writeguard_event_queue_waiting", 0.0);
    let mut owner = stage.db.connect(&stage.owner);
    // Nobody can read the table of events now; monitoring does not need to.
    pass(&mut stage.admin, "BEGIN; LOCK TABLE writeguard.event IN ACCESS EXCLUSIVE MODE");
    refuse(&mut owner, "UPDATE t SET v = 1", "WG001");
    let metrics = exporter.scrape();
    assert_eq!(find(&metrics, "pg_writeguard_event_queue_waiting"), Some(1.0));
    assert_eq!(find(&metrics, "pg_writeguard_event_queue_late_total"), Some(1.0));
    assert_eq!(find(&metrics, "pg_writeguard_events_total{kind=\"blocked\"}"), Some(1.0));
    pass(&mut stage.admin, "COMMIT");
    exporter.wait_for("pg_writeguard_event_queue_waiting", 0.0);
    assert_eq!(find(&exporter.scrape(), "pg_writeguard_event_queue_late_total"), Some(1.0));
    assert_eq!(find(&exporter.scrape(), "pg_writeguard_event_queue_in_log_only_total"), Some(0.0));
}

#[test]
fn the_exporter_shows_a_queue_without_room() {
    let mut stage = Stage::new(&["writeguard.event_timeout = 20ms", "writeguard.event_queue_size = 64kB"]);
    stage.policy("limit", "max_rows => 10");
    let exporter = stage.exporter();
    let mut owner = stage.db.connect(&stage.owner);
    pass(&mut stage.admin, "BEGIN; LOCK TABLE writeguard.event IN ACCESS EXCLUSIVE MODE");
    wait_until(60, || {
        for _ in 0..20 {
            refuse(&mut owner, "UPDATE t SET v = 1", "WG001");
        }
        find(&exporter.scrape(), "pg_writeguard_event_queue_in_log_only_total").is_some_and(|events| events > 0.0)
    });
    pass(&mut stage.admin, "COMMIT");
    exporter.wait_for("pg_writeguard_event_queue_waiting", 0.0);
    let metrics = exporter.scrape();
    let stored = number(&mut stage.admin, "SELECT count(*) FROM writeguard.event WHERE kind = 'blocked'");
    let in_log = find(&metrics, "pg_writeguard_event_queue_in_log_only_total").expect("a number");
    assert_eq!(find(&metrics, "pg_writeguard_events_total{kind=\"blocked\"}"), Some(stored as f64 + in_log));
}

#[test]
fn the_exporter_shows_whether_the_guard_is_on_and_its_launcher_runs() {
    let mut stage = Stage::new(&[]);
    let exporter = stage.exporter();
    pass(&mut stage.admin, "ALTER SYSTEM SET writeguard.enabled = off");
    pass(&mut stage.admin, "SELECT pg_reload_conf()");
    exporter.wait_for("pg_writeguard_enabled", 0.0);
    pass(&mut stage.admin, "ALTER SYSTEM RESET writeguard.enabled");
    pass(&mut stage.admin, "SELECT pg_reload_conf()");
    exporter.wait_for("pg_writeguard_enabled", 1.0);

    // It is started again within a second, so more than one look may be needed.
    wait_until(60, || {
        let kill = "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE backend_type = 'pg_writeguard launcher'";
        pass(&mut stage.admin, kill);
        find(&exporter.scrape(), "pg_writeguard_launcher_up") == Some(0.0)
    });
    exporter.wait_for("pg_writeguard_launcher_up", 1.0);
}

#[test]
fn the_exporter_shows_rates_that_are_half_spent() {
    let mut stage = Stage::new(&["writeguard.rate_slots = 64"]);
    stage.policy("rate", "rate_rows => 20, rate_interval => '100 days'");
    let exporter = stage.exporter();
    let mut owner = stage.db.connect(&stage.owner);
    let budget = format!("policy=\"rate\",login=\"{}\"", stage.owner);
    let (rows, left) = (
        format!("pg_writeguard_rate_budget_rows{{{budget}}}"),
        format!("pg_writeguard_rate_budget_rows_left{{{budget}}}"),
    );

    let metrics = exporter.scrape();
    assert_eq!(find(&metrics, "pg_writeguard_rate_slots_slots"), Some(64.0));
    assert_eq!(find(&metrics, "pg_writeguard_rate_slots_used"), Some(0.0));
    pass(&mut owner, "UPDATE t SET v = 1 WHERE id <= 9");
    let metrics = exporter.scrape();
    assert_eq!(find(&metrics, "pg_writeguard_rate_slots_used"), Some(1.0));
    assert_eq!(find(&metrics, &left), None, "not half spent yet");
    pass(&mut owner, "UPDATE t SET v = 1 WHERE id <= 9");
    let metrics = exporter.scrape();
    assert_eq!((find(&metrics, &rows), find(&metrics, &left)), (Some(20.0), Some(2.0)));

    // Days rather than rows: all of them come back evenly.
    let sql = "SELECT policy, login, rate_rows, rows_left, full_at BETWEEN now() + '89 days' AND now() + '91 days'
               FROM writeguard.rate_budgets";
    let row = stage.db.connect(&stage.monitor).query_one(sql, &[]).expect("one budget");
    assert_eq!((row.get(0), row.get(1)), ("rate", stage.owner.as_str()));
    assert_eq!((row.get(2), row.get(3), row.get(4)), (20_i64, 2_i64, true));

    // A changed rate is another budget, a dropped policy has none.
    stage.policy("rate", "rate_rows => 30, rate_interval => '100 days'");
    assert_eq!(number(&mut stage.admin, "SELECT count(*) FROM writeguard.rate_budgets"), 0);
    pass(&mut owner, "UPDATE t SET v = 1 WHERE id <= 1");
    assert_eq!(number(&mut stage.admin, "SELECT rows_left FROM writeguard.rate_budgets"), 29);
    pass(&mut stage.admin, "SELECT writeguard.drop_policy('rate')");
    assert_eq!(number(&mut stage.admin, "SELECT count(*) FROM writeguard.rate_budgets"), 0);
}

#[test]
fn two_databases_of_a_server_are_told_apart() {
    let mut stage = Stage::new(&[]);
    stage.policy("limit", "max_rows => 10");
    let (second, mut second_admin, second_owner) = Stage::database(&stage.server);
    pass(&mut second_admin, "SELECT writeguard.set_policy('limit', tables => '{public.t}', max_rows => 10)");
    refuse(&mut stage.db.connect(&stage.owner), "UPDATE t SET v = 1", "WG001");
    refuse(&mut second.connect(&second_owner), "UPDATE t SET v = 1", "WG001");
    refuse(&mut second.connect(&second_owner), "UPDATE t SET v = 1", "WG001");

    let included = format!("--include-databases={},{}", stage.db.name, second.name);
    let exporter =
        Exporter::start(&stage.server, &stage.monitor, &[&stage.db], &["--auto-discover-databases", &included]);
    let metrics = exporter.scrape();
    for (db, events) in [(&stage.db, 1.0), (&second, 2.0)] {
        for metric in ["pg_writeguard_events_total", "pg_writeguard_policy_events_total"] {
            let metric = format!("{metric}{{datname=\"{}\",kind=\"blocked\"}}", db.name);
            assert_eq!(find(&metrics, &metric), Some(events));
        }
    }
}

#[test]
fn the_numbers_are_for_pg_monitor_and_nobody_else() {
    let stage = Stage::new(&[]);
    let mut owner = stage.db.connect(&stage.owner);
    let objects = ["event_totals", "rate_budgets", "_event_numbers()", "_rate_numbers()"];
    for object in objects {
        let refusal = expect_refusal(owner.batch_execute(&format!("SELECT * FROM writeguard.{object}")));
        assert_eq!(refusal.sqlstate, "42501", "{object}");
        pass(&mut stage.db.connect(&stage.monitor), &format!("SELECT * FROM writeguard.{object}"));
    }
    // And pg_monitor is no way to the policies themselves.
    refuse(&mut stage.db.connect(&stage.monitor), "SELECT * FROM writeguard.policy", "42501");
}

#[test]
fn totals_begin_again_with_the_server_and_with_a_crash() {
    let mut stage = Stage::new(&[]);
    let blocked = "SELECT events FROM writeguard.event_totals WHERE kind = 'blocked' AND policy IS NULL";
    for mode in ["fast", "immediate"] {
        stage.policy("limit", "max_rows => 10");
        refuse(&mut stage.db.connect(&stage.owner), "UPDATE t SET v = 1", "WG001");
        assert_eq!(number(&mut stage.admin, blocked), 1);
        stage.server.stop(mode);
        stage.server.start_again();
        stage.admin = stage.db.admin();
        assert_eq!(number(&mut stage.admin, blocked), 0);
    }
}

/// The words of a text that are names of our metrics.
fn metric_names(text: &str) -> BTreeSet<String> {
    let words = text.split(|letter: char| !letter.is_ascii_alphanumeric() && letter != '_');
    words.filter(|word| word.starts_with("pg_writeguard_")).map(str::to_owned).collect()
}

#[test]
fn the_alert_rules_are_about_metrics_that_there_are() {
    let mut stage = Stage::new(&[]);
    stage.policy("rate", "max_rows => 18, rate_rows => 20, rate_interval => '100 days'");
    let mut owner = stage.db.connect(&stage.owner);
    pass(&mut owner, "UPDATE t SET v = 1 WHERE id <= 18");
    refuse(&mut owner, "UPDATE t SET v = 1", "WG001");
    let metrics: Vec<String> = stage.exporter().scrape().into_keys().collect();
    let there = metric_names(&metrics.join(" "));
    let rules = std::fs::read_to_string(file("alerts.yml")).expect("alerts.yml");
    let rules: String = rules.lines().filter(|line| !line.trim_start().starts_with("description:")).collect();
    let asked = metric_names(&rules);
    assert!(asked.len() > 8, "{asked:?}");
    let missing: Vec<_> = asked.difference(&there).collect();
    assert!(missing.is_empty(), "no such metrics: {missing:?}");
}

#[test]
fn the_alert_rules_say_what_their_tests_say() {
    for arguments in [["check", "rules", "alerts.yml"], ["test", "rules", "alerts.test.yml"]] {
        let output = Command::new("promtool")
            .args(arguments)
            .current_dir(file(""))
            .output()
            .expect("cannot run promtool: scripts/prepare installs it");
        let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && said.contains("SUCCESS"), "{said}");
    }
}

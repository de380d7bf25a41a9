//! A table of a million events: what reads it uses its indexes, and retention gets it small again without being in
//! anybody's way.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::common::limits::{number, pass};
use crate::common::{Database, Server, expect_refusal};
use postgres::Client;

const EVENTS: i64 = 1_000_000;
/// Seconds between two of them: together they are of 115 days.
const PACE: i64 = 10;

/// A database with a million events of 100 logins, 200 policies and 500 tables; the newest is of now.
fn fill(db: &Database) -> Client {
    let mut admin = db.admin();
    let sql = format!(
        "INSERT INTO writeguard.event (occurred_at, kind, policy, login, role, relation, row_limit, rows, statement)
         SELECT now() - make_interval(secs => (({EVENTS} - n) * {PACE})::float8),
                CASE WHEN n % 10 = 0 THEN 'blocked' ELSE 'observed' END,
                'policy ' || n % 200, 'login_' || n % 100, 'app', 'public.table_' || n % 500, 10, 11,
                'UPDATE table_' || n % 500 || ' SET is_deleted = true'
         FROM generate_series(1, {EVENTS}) AS n"
    );
    pass(&mut admin, &sql);
    pass(&mut admin, "VACUUM ANALYZE writeguard.event");
    admin
}

/// A server on which the test that needs the table as it was made has it.
fn filled() -> (&'static Server, &'static Database) {
    static FILLED: OnceLock<(Server, Database)> = OnceLock::new();
    let (server, db) = FILLED.get_or_init(|| {
        let server = Server::start(&["writeguard.event_retention = 0"]);
        let db = server.database();
        fill(&db);
        (server, db)
    });
    (server, db)
}

/// The plan of a query and how many rows it looked at for those that it gave.
fn plan(client: &mut Client, sql: &str) -> (String, i64) {
    let rows = client.query(&format!("EXPLAIN (ANALYZE, COSTS OFF, TIMING OFF) {sql}"), &[]).expect(sql);
    let plan = rows.iter().map(|row| row.get::<_, String>(0)).collect::<Vec<_>>().join("\n");
    let removed = plan.lines().filter_map(|line| line.trim().strip_prefix("Rows Removed by Filter: "));
    let removed = removed.map(|rows| rows.parse::<i64>().expect(rows)).sum();
    (plan, removed)
}

#[test]
fn what_people_ask_for_is_found_by_an_index() {
    let (_, db) = filled();
    let mut admin = db.admin();
    let asked = [
        ("policy = 'policy 77' ORDER BY id DESC LIMIT 20", "event_policy"),
        ("policy = 'policy 77' AND kind = 'blocked' ORDER BY id DESC LIMIT 20", "event_policy"),
        ("login = 'login_33' ORDER BY id DESC LIMIT 20", "event_login"),
        ("relation = 'public.table_205' ORDER BY id DESC LIMIT 20", "event_relation"),
        ("occurred_at > now() - interval '1 hour'", "event_occurred_at"),
        (
            "occurred_at BETWEEN now() - interval '50 days' AND now() - interval '49 days' AND kind = 'blocked'",
            "event_occurred_at",
        ),
        ("id > 999900 ORDER BY id", "event_pkey"),
        ("approval = 7", "event_approval"),
    ];
    for (condition, index) in asked {
        let (plan, removed) = plan(&mut admin, &format!("SELECT * FROM writeguard.event WHERE {condition}"));
        assert!(plan.contains(&format!(" {index} ")) && !plan.contains("Seq Scan"), "{condition}\n{plan}");
        assert!(removed <= 10_000, "{condition}\n{plan}");
    }
}

#[test]
fn what_somebody_sees_of_their_own_is_found_by_an_index() {
    let (server, db) = filled();
    pass(&mut server.postgres(), "CREATE ROLE login_33 LOGIN");
    let own = "SELECT * FROM writeguard.my_events ORDER BY id DESC LIMIT 20";
    let (plan, removed) = plan(&mut db.connect("login_33"), own);
    assert!(plan.contains(" event_login ") && !plan.contains("Seq Scan") && removed == 0, "{plan}");
    let seen = db.connect("login_33").query(own, &[]).expect(own);
    assert!(seen.len() == 20 && seen.iter().all(|row| row.get::<_, &str>("login") == "login_33"));
}

/// Says at its end, also that of a failed test, that something is over.
struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Half of them go while writes are refused all the time, and each refusal finds its event stored.
#[test]
fn retention_takes_half_a_million_away_and_nobody_waits() {
    // Each refusal has an event of its own, however fast the machine refuses.
    let server = Server::start(&["writeguard.event_retention = 0", "writeguard.blocked_per_minute = 100000"]);
    let db = server.database();
    let mut admin = fill(&db);
    pass(
        &mut admin,
        "CREATE TABLE t (id int PRIMARY KEY, v int); INSERT INTO t SELECT n, 0 FROM generate_series(1, 100) AS n;
         SELECT writeguard.set_policy('limit', tables => '{public.t}', max_rows => 10)",
    );
    let kept_days = EVENTS * PACE / 2 / 86_400;
    pass(&mut admin, &format!("ALTER SYSTEM SET writeguard.event_retention = '{kept_days}d'"));
    // A pause between visits is an hour at most; after a start there is one at once.
    server.restart();
    let mut admin = db.admin();

    let over = AtomicBool::new(false);
    let (refusals, longest) = thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let (mut client, mut refusals, mut longest) = (db.admin(), 0_i64, Duration::ZERO);
            while !over.load(Ordering::Relaxed) {
                let begun = Instant::now();
                let refusal = expect_refusal(client.batch_execute("UPDATE t SET v = 1"));
                assert_eq!(refusal.sqlstate, "WG001");
                (refusals, longest) = (refusals + 1, longest.max(begun.elapsed()));
                thread::sleep(Duration::from_millis(20));
            }
            (refusals, longest)
        });
        let done = Over(&over);
        let end = Instant::now() + Duration::from_secs(400);
        let old = format!(
            "SELECT count(*) FROM (SELECT FROM writeguard.event
             WHERE occurred_at < now() - interval '{kept_days} days 1 hour' LIMIT 1) AS old"
        );
        let mut oldest_transaction = 0.0_f64;
        while number(&mut admin, &old) > 0 && Instant::now() < end {
            let age = "SELECT coalesce(max(extract(epoch FROM clock_timestamp() - xact_start)), 0)::float8
                       FROM pg_stat_activity WHERE backend_type = 'pg_writeguard pruner'";
            oldest_transaction = oldest_transaction.max(admin.query_one(age, &[]).expect(age).get(0));
            thread::sleep(Duration::from_millis(50));
        }
        drop(done);
        assert_eq!(number(&mut admin, &old), 0);
        assert!(oldest_transaction < 10.0, "a batch of {oldest_transaction} s");
        writer.join().expect("the writer")
    });

    let stored = "SELECT count(*) FROM writeguard.event WHERE kind = 'blocked' AND policy = 'limit'";
    assert_eq!(number(&mut admin, stored), refusals);
    assert!(refusals > 50, "{refusals}");
    assert_eq!(number(&mut admin, "SELECT late + in_log_only FROM writeguard.event_queue"), 0, "longest {longest:?}");
    // Nothing younger went.
    let kept = kept_days * 86_400 / PACE;
    let left = number(&mut admin, "SELECT count(*) FROM writeguard.event WHERE policy <> 'limit'");
    assert!((kept - 500..=kept + 500).contains(&left), "{left} are left, not {kept}");
}

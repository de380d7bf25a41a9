//! Nothing from outside stops the store of events: notifications that cannot be sent, triggers and constraints on its table
//! that raise, and others that have taken all background workers.

use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use crate::common::c;
use crate::common::limits::{number, pass};
use crate::common::{Database, Refusal, Server, expect_refusal, wait_until};
use postgres::Client;
use postgres::fallible_iterator::FallibleIterator;

/// An error is not held back for longer than this where its event can be stored, or never will be.
const AT_ONCE: Duration = Duration::from_secs(5);

/// A server whose refused writes wait for their event much longer than they may have to.
fn server(lines: &[&str]) -> Server {
    let mut all = vec!["writeguard.event_timeout = '30s'"];
    all.extend(lines);
    Server::start(&all)
}

/// A database with table `t` of ten rows, three of which may be changed at once.
fn guarded(server: &Server) -> Database {
    let db = server.database();
    pass(
        &mut db.admin(),
        "CREATE TABLE t (id int PRIMARY KEY, note text); INSERT INTO t SELECT n FROM generate_series(1, 10) AS n;
         SELECT writeguard.set_policy('p', tables => '{public.t}', max_rows => 3)",
    );
    db
}

/// A write is refused without waiting long; gives the refusal and how long it took.
#[track_caller]
fn refuse_at_once(client: &mut Client, note: &str) -> (Refusal, Duration) {
    let begun = Instant::now();
    let refusal = expect_refusal(client.batch_execute(&format!("UPDATE t SET note = '{note}'")));
    let took = begun.elapsed();
    assert_eq!(refusal.sqlstate, "WG001", "{refusal:?}");
    assert!(took < AT_ONCE, "{took:?}");
    (refusal, took)
}

/// The same, and its event is on record by then.
#[track_caller]
fn refuse_on_record(client: &mut Client, reader: &mut Client, note: &str) -> Duration {
    let (_, took) = refuse_at_once(client, note);
    assert_eq!(stored(reader, note), 1);
    took
}

/// How many events of a refused statement there are.
fn stored(client: &mut Client, note: &str) -> i64 {
    number(client, &format!("SELECT count(*) FROM writeguard.event WHERE statement LIKE '%''{note}''%'"))
}

fn counter(client: &mut Client, name: &str) -> i64 {
    number(client, &format!("SELECT {name} FROM writeguard.event_queue"))
}

/// What `check_setup` says about a subject.
fn told(client: &mut Client, subject: &str) -> Vec<String> {
    let rows = client.query("SELECT problem FROM writeguard.check_setup() WHERE subject = $1", &[&subject]);
    rows.expect("check_setup").iter().map(|row| row.get(0)).collect()
}

/// The payloads that come in within some seconds, up to so many.
fn heard(listener: &mut Client, most: usize, seconds: u64) -> Vec<String> {
    let mut notifications = listener.notifications();
    let mut iterator = notifications.timeout_iter(Duration::from_secs(seconds));
    let mut heard = Vec::new();
    while heard.len() < most
        && let Ok(Some(notification)) = iterator.next()
    {
        heard.push(notification.payload().to_owned());
    }
    heard
}

fn is_of(payload: &str, kind: &str) -> bool {
    payload.contains(&format!(r#""kind": "{kind}""#))
}

// Notifications.

/// Refusals while nothing can be notified, and what becomes of their notifications when `mend` has mended it.
fn unsent(server: &Server, db: &Database, mend: &str) {
    let (mut client, mut admin, mut listener) = (db.admin(), db.admin(), db.admin());
    pass(&mut listener, "LISTEN writeguard");
    // What was altered to bring it about is an event too.
    let totals = "SELECT sum(events)::int8 FROM writeguard.event_totals WHERE policy IS NULL AND kind = ";
    let altered = "SELECT count(*) FROM writeguard.event WHERE operation = 'alter'";
    let before = number(&mut admin, altered);
    let failed = counter(&mut admin, "unsent");
    for place in 0..10 {
        refuse_on_record(&mut client, &mut admin, &format!("unsent {place}"));
    }
    wait_until(30, || counter(&mut admin, "unsent") > failed + 1);
    pass(&mut admin, "SELECT writeguard.set_policy('q', tables => '{public.t}', max_rows => 7)");
    assert_eq!((counter(&mut admin, "late"), counter(&mut admin, "in_log_only")), (0, 0));
    assert_eq!(told(&mut admin, "notifications").len(), 1);
    assert!(server.log().contains("their notifications cannot be sent now"));
    // In the totals they are all the same, those too that were written by their own transaction.
    assert_eq!(number(&mut admin, &format!("{totals} 'blocked'")), 10);
    wait_until(30, || number(&mut admin, &format!("{totals} 'policy_changed'")) == 2 + before);
    assert_eq!(heard(&mut listener, 1, 1), Vec::<String>::new());
    pass(&mut admin, mend);
    let heard = heard(&mut listener, 11 + 2 * before as usize, 90);
    assert_eq!(heard.iter().filter(|payload| is_of(payload, "blocked")).count(), 10, "{heard:?}");
    let of_policy = |payload: &&String| is_of(payload, "policy_changed") && payload.contains("\"q\"");
    assert_eq!(heard.iter().filter(of_policy).count(), 1, "{heard:?}");
    wait_until(10, || told(&mut admin, "notifications").is_empty());
    assert_eq!(number(&mut admin, "SELECT count(*) FROM writeguard.outbox"), 0);
    refuse_on_record(&mut client, &mut admin, "after");
    let expected = 2 + number(&mut admin, altered);
    assert_eq!(number(&mut admin, &format!("{totals} 'policy_changed'")), expected);
}

/// Waits until nobody has anything to store or to send.
fn quiet(admin: &mut Client) {
    let busy = "SELECT count(*) FROM pg_stat_activity WHERE backend_type LIKE 'pg_writeguard%' AND datname IS NOT NULL";
    wait_until(30, || number(admin, busy) == 0 && number(admin, "SELECT count(*) FROM writeguard.outbox") == 0);
}

#[test]
fn a_function_that_is_not_there_to_notify_keeps_no_event() {
    let server = server(&[]);
    let db = guarded(&server);
    quiet(&mut db.admin());
    pass(&mut db.admin(), "ALTER FUNCTION pg_catalog.pg_notify(text, text) RENAME TO x");
    unsent(&server, &db, "ALTER FUNCTION pg_catalog.x(text, text) RENAME TO pg_notify");
}

/// As a full queue of notifications does.
#[test]
fn a_commit_that_does_not_notify_keeps_no_event() {
    let server = server(&[]);
    let db = guarded(&server);
    quiet(&mut db.admin());
    pass(
        &mut db.admin(),
        "CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'not now'; END $$;
         CREATE CONSTRAINT TRIGGER late AFTER DELETE ON writeguard.outbox DEFERRABLE INITIALLY DEFERRED
         FOR EACH ROW EXECUTE FUNCTION fail()",
    );
    wait_until(30, || number(&mut db.admin(), "SELECT count(*) FROM writeguard.event WHERE operation = 'alter'") == 1);
    unsent(&server, &db, "DROP TRIGGER late ON writeguard.outbox");
}

/// PostgreSQL's own queue is full: nobody can notify until a listener that reads nothing is gone.
#[test]
fn a_full_queue_of_notifications_keeps_no_event() {
    let server = server(&[]);
    let is_small = number(&mut server.postgres(), "SELECT current_setting('server_version_num')::int8") >= 170_000;
    if is_small {
        pass(&mut server.postgres(), "ALTER SYSTEM SET max_notify_queue_pages = 64");
        server.restart();
    }
    let db = guarded(&server);
    let (mut client, mut admin, mut listener) = (db.admin(), db.admin(), db.admin());
    quiet(&mut admin);
    pass(&mut listener, "LISTEN writeguard");
    // Its position in the queue stays where it is, and the queue's end with it.
    let mut deaf = db.admin();
    pass(&mut deaf, "LISTEN flood");
    pass(&mut deaf, "BEGIN; SELECT 1");
    if is_small {
        flood(&mut admin);
    } else {
        fall_behind(&server, &mut admin, &mut deaf);
    }
    let notified = admin.batch_execute("NOTIFY flood, 'one more'").expect_err("the queue is not full");
    assert_eq!(Refusal::of(&notified).sqlstate, "54000");
    for place in 0..5 {
        refuse_on_record(&mut client, &mut admin, &format!("full {place}"));
    }
    wait_until(30, || told(&mut admin, "notifications").len() == 1);
    assert!(server.log().contains("their notifications cannot be sent now: too many notifications"));
    assert_eq!((counter(&mut admin, "late"), counter(&mut admin, "in_log_only")), (0, 0));
    assert_eq!(heard(&mut listener, 1, 1), Vec::<String>::new());
    drop(deaf);
    let heard = heard(&mut listener, 5, 90);
    assert!(heard.len() == 5 && heard.iter().all(|payload| is_of(payload, "blocked")), "{heard:?}");
    wait_until(10, || told(&mut admin, "notifications").is_empty());
}

/// Notifies until the queue has no room; from 17 on it can be made that small. One at a time: what an error leaves of many
/// takes room too, and whoever listens is not told to read on.
fn flood(admin: &mut Client) {
    wait_until(60, || admin.batch_execute("SELECT pg_notify('flood', repeat('x', 7900))").is_err());
}

/// Up to 16 the queue takes 8 GB. It is as full as that where a listener is so far behind.
fn fall_behind(server: &Server, admin: &mut Client, deaf: &mut Client) {
    let library = c::library("behind", &server.socket_dir());
    pass(
        admin,
        &format!(
            "CREATE FUNCTION fall_behind(int, bigint) RETURNS bool LANGUAGE c AS '{library}'",
            library = library.display()
        ),
    );
    let pid: i32 = deaf.query_one("SELECT pg_backend_pid()", &[]).expect("its process").get(0);
    let sql = "SELECT fall_behind($1, size) FROM pg_shmem_allocations WHERE name = 'Async Queue Control'";
    assert!(admin.query_one(sql, &[&pid]).expect("fall_behind").get::<_, bool>(0));
}

#[test]
fn an_outbox_that_others_hold_or_is_not_there_keeps_no_event() {
    let server = server(&[]);
    for (hold, release) in [
        ("BEGIN; LOCK TABLE writeguard.outbox IN ACCESS EXCLUSIVE MODE", "COMMIT"),
        ("ALTER TABLE writeguard.outbox RENAME TO x", "ALTER TABLE writeguard.x RENAME TO outbox"),
        ("ALTER TABLE writeguard.outbox RENAME event TO x", "ALTER TABLE writeguard.outbox RENAME x TO event"),
        (
            "ALTER TABLE writeguard.outbox ADD CHECK (event = 0)",
            "ALTER TABLE writeguard.outbox DROP CONSTRAINT outbox_event_check",
        ),
    ] {
        let db = guarded(&server);
        let (mut client, mut admin, mut holder) = (db.admin(), db.admin(), db.admin());
        quiet(&mut admin);
        pass(&mut holder, hold);
        for place in 0..5 {
            refuse_on_record(&mut client, &mut admin, &format!("held {place}"));
        }
        pass(&mut holder, release);
        refuse_on_record(&mut client, &mut admin, "after");
        quiet(&mut admin);
        assert_eq!((counter(&mut admin, "late"), counter(&mut admin, "in_log_only")), (0, 0), "{hold}");
    }
}

/// What was left in the outbox when the server went down is sent when it is up again, without any new event.
#[test]
fn notifications_that_wait_are_sent_after_a_restart() {
    let server = server(&["writeguard.event_retention = '10s'"]);
    let db = guarded(&server);
    quiet(&mut db.admin());
    pass(&mut db.admin(), "ALTER TABLE writeguard.outbox ADD CHECK (event > 0) NOT VALID");
    pass(&mut db.admin(), "SELECT writeguard.set_policy('q', tables => '{public.t}', max_rows => 7)");
    wait_until(30, || counter(&mut db.admin(), "unsent") > 0);
    server.stop("fast");
    server.start_again();
    pass(&mut db.admin(), "ALTER TABLE writeguard.outbox DROP CONSTRAINT outbox_event_check");
    wait_until(60, || number(&mut db.admin(), "SELECT count(*) FROM writeguard.outbox") == 0);
}

// Errors.

/// A trigger on the event table that raises for some statements. That it was made is an event too, and over by then.
fn raise_for(client: &mut Client, pattern: &str, body: &str, when: &str) {
    pass(
        client,
        &format!(
            "CREATE FUNCTION poison() RETURNS trigger LANGUAGE plpgsql AS
             $$ BEGIN IF NEW.statement LIKE '{pattern}' THEN {body} END IF; RETURN NEW; END $$;
             CREATE {when} FOR EACH ROW EXECUTE FUNCTION poison()"
        ),
    );
    wait_until(30, || counter(client, "waiting") == 0);
}

const BEFORE: &str = "TRIGGER poison BEFORE INSERT ON writeguard.event";
const AT_COMMIT: &str = "CONSTRAINT TRIGGER poison AFTER INSERT ON writeguard.event DEFERRABLE INITIALLY DEFERRED";

#[test]
fn an_event_that_the_table_does_not_take_is_set_aside_whatever_the_error() {
    let server = server(&[]);
    for (place, (body, when)) in [
        ("RAISE EXCEPTION 'no';", BEFORE),
        ("RAISE EXCEPTION 'no' USING ERRCODE = 'ZZ001';", BEFORE),
        ("RAISE EXCEPTION 'no' USING ERRCODE = 'XX000';", BEFORE),
        ("RAISE EXCEPTION 'no' USING ERRCODE = '42501';", BEFORE),
        ("PERFORM 1 FROM not_there;", BEFORE),
        ("PERFORM 1 / 0;", BEFORE),
        ("RETURN NULL;", BEFORE),
        ("NEW.login = NULL;", BEFORE),
        ("RAISE EXCEPTION 'no';", AT_COMMIT),
        ("RAISE EXCEPTION 'no' USING ERRCODE = '23505';", AT_COMMIT),
    ]
    .into_iter()
    .enumerate()
    {
        let db = guarded(&server);
        let (mut client, mut admin) = (db.admin(), db.admin());
        raise_for(&mut admin, "%poison%", body, when);
        let (late, set_aside) = (counter(&mut admin, "late"), counter(&mut admin, "set_aside"));
        refuse_on_record(&mut client, &mut admin, "good 1");
        let poison = format!("poison {place}");
        refuse_at_once(&mut client, &poison);
        refuse_on_record(&mut client, &mut admin, "good 2");
        assert_eq!(stored(&mut admin, &poison), 0, "{body}");
        let counted = (counter(&mut admin, "late") - late, counter(&mut admin, "set_aside") - set_aside);
        assert_eq!(counted, (1, 1), "{body}");
        assert_eq!(told(&mut admin, "event table").len(), 1, "{body}");
        assert!(told(&mut admin, "event queue").iter().all(|problem| !problem.contains("room")));
        let log = server.log();
        let mut lines = log.lines().skip_while(|line| !line.contains("cannot be stored and is in this log only"));
        assert!(lines.any(|line| line.contains("DETAIL:") && line.contains(&poison)), "{body}\n{log}");
        assert_eq!(number(&mut admin, "SELECT waiting FROM writeguard.event_queue"), 0);
    }
}

/// Many at once, some of which the table does not take: the others are stored, each once and in their order.
#[test]
fn events_in_the_same_batch_are_stored_all_the_same() {
    const ALL: usize = 60;
    for when in [BEFORE, AT_COMMIT] {
        let server = Server::start(&["writeguard.event_timeout = '10ms'"]);
        let db = guarded(&server);
        let (mut client, mut admin) = (db.admin(), db.admin());
        quiet(&mut admin);
        raise_for(&mut admin, "%poison%", "RAISE EXCEPTION 'no';", when);
        pass(&mut admin, "BEGIN; LOCK TABLE writeguard.event IN ACCESS EXCLUSIVE MODE");
        let is_poison = |place: usize| [0, 17, 18, 40, ALL - 1].contains(&place);
        for place in 0..ALL {
            let kind = if is_poison(place) { "poison" } else { "good" };
            refuse_at_once(&mut client, &format!("{kind} {place}"));
        }
        assert_eq!(counter(&mut client, "waiting"), ALL as i64);
        pass(&mut admin, "COMMIT");
        wait_until(30, || counter(&mut admin, "waiting") == 0);
        let rows =
            admin.query("SELECT statement FROM writeguard.event WHERE kind = 'blocked' ORDER BY id", &[]).unwrap();
        let notes: Vec<String> = rows.iter().map(|row| row.get(0)).collect();
        let expected: Vec<String> = (0..ALL)
            .filter(|place| !is_poison(*place))
            .map(|place| format!("UPDATE t SET note = 'good {place}'"))
            .collect();
        assert_eq!(notes, expected);
        assert_eq!((counter(&mut admin, "set_aside"), counter(&mut admin, "in_log_only")), (6, 6));
    }
}

#[test]
fn a_trigger_that_always_raises_makes_no_refusal_wait() {
    let server = server(&[]);
    let db = guarded(&server);
    let (mut client, mut admin) = (db.admin(), db.admin());
    raise_for(&mut admin, "%", "RAISE EXCEPTION 'never';", BEFORE);
    let before = counter(&mut admin, "set_aside");
    for place in 0..20 {
        refuse_at_once(&mut client, &format!("never {place}"));
    }
    assert_eq!(counter(&mut admin, "set_aside") - before, 20);
    pass(&mut admin, "DROP TRIGGER poison ON writeguard.event");
    refuse_on_record(&mut client, &mut admin, "after");
}

/// An error that is about the moment says nothing about the event: it is stored later.
#[test]
fn errors_of_the_moment_set_nothing_aside() {
    let server = server(&[]);
    let db = guarded(&server);
    let (mut client, mut admin) = (db.admin(), db.admin());
    for code in ["55P03", "40001", "40P01", "53100", "57014", "58030"] {
        pass(&mut admin, "DROP SEQUENCE IF EXISTS times; CREATE SEQUENCE times");
        let body =
            format!("IF nextval('public.times') < 3 THEN RAISE EXCEPTION 'later' USING ERRCODE = '{code}'; END IF;");
        raise_for(&mut admin, &format!("%{code}%"), &body, BEFORE);
        refuse_on_record(&mut client, &mut admin, code);
        pass(&mut admin, "DROP TRIGGER poison ON writeguard.event; DROP FUNCTION poison()");
    }
    assert_eq!((counter(&mut admin, "set_aside"), counter(&mut admin, "late")), (0, 0));
}

#[test]
fn numbers_that_are_taken_are_skipped() {
    let server = server(&[]);
    let db = guarded(&server);
    let (mut client, mut admin) = (db.admin(), db.admin());
    for place in 0..3 {
        refuse_on_record(&mut client, &mut admin, &format!("before {place}"));
    }
    pass(&mut admin, "SELECT setval('writeguard.event_id_seq', 1)");
    refuse_on_record(&mut client, &mut admin, "after");
    assert_eq!(counter(&mut admin, "set_aside"), 0);
}

// Background workers.

/// Takes all slots there are by a parallel query that takes its time, until the client is dropped.
fn parallel_query(db: &Database, slots: i64) -> thread::JoinHandle<()> {
    let mut admin = db.admin();
    pass(
        &mut admin,
        "CREATE TABLE big (n int) WITH (parallel_workers = 8); INSERT INTO big SELECT generate_series(1, 100000);
         ALTER TABLE big SET (parallel_workers = 8)",
    );
    let mut client = db.admin();
    let query = thread::spawn(move || {
        let _ended = client.batch_execute(
            "SET max_parallel_workers_per_gather = 8; SET parallel_setup_cost = 0; SET parallel_tuple_cost = 0;
             SET min_parallel_table_scan_size = 0;
             SELECT count(*) FROM big WHERE n % 1000 <> 0 OR pg_sleep(1) IS NOT NULL",
        );
    });
    let workers = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'parallel worker'";
    wait_until(20, || number(&mut admin, workers) == slots);
    query
}

fn end_queries(admin: &mut Client) {
    pass(
        admin,
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE '%pg_sleep(1)%' AND pid <> pg_backend_pid()",
    );
}

#[test]
fn parallel_queries_that_take_all_workers_keep_no_event() {
    let server = server(&["max_worker_processes = 5", "max_parallel_workers = 8"]);
    let (db, other) = (guarded(&server), guarded(&server));
    let (mut admin, mut admin_of_other) = (db.admin(), other.admin());
    quiet(&mut admin);
    quiet(&mut admin_of_other);
    let query = parallel_query(&db, 2);
    let (mut client, mut client_of_other) = (db.admin(), other.admin());
    let mut took = Vec::new();
    for place in 0..10 {
        took.push(refuse_on_record(&mut client, &mut admin, &format!("all taken {place}")));
        took.push(refuse_on_record(&mut client_of_other, &mut admin_of_other, &format!("all taken {place}")));
    }
    let first = took[0];
    took.sort();
    println!("first {first:?}, median {:?}, longest {:?}", took[took.len() / 2], took[took.len() - 1]);
    // It is connected for a moment only.
    thread::sleep(Duration::from_secs(1));
    drop((admin_of_other, client_of_other));
    pass(&mut admin, &format!("CREATE DATABASE copy TEMPLATE {}; ", other.name));
    pass(&mut admin, &format!("DROP DATABASE {}", other.name));
    assert_eq!(told(&mut admin, "max_worker_processes").len(), 1);
    assert!(server.log().contains("no background worker slot is free"));
    assert!(server.log().matches("no background worker slot is free").count() <= 2);
    end_queries(&mut admin);
    query.join().unwrap();
    refuse_on_record(&mut client, &mut admin, "free again");
    assert_eq!((counter(&mut admin, "late"), counter(&mut admin, "in_log_only")), (0, 0));
}

/// The processes of a server that are waiting for a database, by what `ps` says.
fn kept_workers(server: &Server) -> Vec<i32> {
    let file = std::fs::read_to_string(server.data_dir().join("postmaster.pid")).unwrap();
    let postmaster = file.lines().next().unwrap().trim().to_owned();
    let output = Command::new("ps").args(["--ppid", &postmaster, "-o", "pid=,args="]).output().unwrap();
    let lines = String::from_utf8(output.stdout).unwrap();
    let kept = lines.lines().filter(|line| line.contains("worker kept ready"));
    kept.map(|line| line.split_whitespace().next().unwrap().parse().unwrap()).collect()
}

fn signal(pid: i32, name: &str) {
    let status = Command::new("kill").args([format!("-{name}"), pid.to_string()]).status().unwrap();
    assert!(status.success());
}

#[test]
fn the_worker_that_is_kept_ready_comes_back_and_loses_nothing() {
    let server = server(&["max_worker_processes = 3"]);
    let db = guarded(&server);
    let (mut client, mut admin) = (db.admin(), db.admin());
    // There is no other one: the third slot is that of PostgreSQL's own launcher.
    for place in 0..5 {
        refuse_on_record(&mut client, &mut admin, &format!("alone {place}"));
    }
    quiet(&mut admin);
    wait_until(10, || kept_workers(&server).len() == 1);
    // While it waits for a database.
    let before = kept_workers(&server);
    signal(before[0], "TERM");
    wait_until(10, || kept_workers(&server).len() == 1 && kept_workers(&server) != before);
    refuse_on_record(&mut client, &mut admin, "terminated while idle");
    // While it stores.
    quiet(&mut admin);
    let mut locker = db.admin();
    pass(&mut locker, "BEGIN; LOCK TABLE writeguard.event IN ACCESS EXCLUSIVE MODE");
    let mut waiting = db.admin();
    let refused = thread::spawn(move || expect_refusal(waiting.batch_execute("UPDATE t SET note = 'terminated'")));
    let stuck =
        "SELECT pid FROM pg_stat_activity WHERE backend_type = 'pg_writeguard worker' AND wait_event_type = 'Lock'";
    wait_until(20, || admin.query_opt(stuck, &[]).unwrap().is_some());
    pass(
        &mut admin,
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE backend_type = 'pg_writeguard worker'",
    );
    thread::sleep(Duration::from_millis(500));
    pass(&mut locker, "COMMIT");
    assert_eq!(refused.join().unwrap().sqlstate, "WG001");
    assert_eq!(stored(&mut admin, "terminated"), 1);
    // Stopped it delays, and stores once when it goes on.
    quiet(&mut admin);
    wait_until(10, || kept_workers(&server).len() == 1);
    let kept = kept_workers(&server)[0];
    signal(kept, "STOP");
    let mut waiting = db.admin();
    let refused = thread::spawn(move || expect_refusal(waiting.batch_execute("UPDATE t SET note = 'stopped'")));
    thread::sleep(Duration::from_millis(300));
    assert_eq!(stored(&mut admin, "stopped"), 0);
    signal(kept, "CONT");
    assert_eq!(refused.join().unwrap().sqlstate, "WG001");
    assert_eq!(stored(&mut admin, "stopped"), 1);
    server.restart();
    let (mut client, mut admin) = (db.admin(), db.admin());
    refuse_on_record(&mut client, &mut admin, "restarted");
    assert_eq!(counter(&mut admin, "late"), 0);
}

/// A database whose table is locked does not keep the one worker there is from the others.
#[test]
fn a_locked_table_does_not_hold_the_kept_worker() {
    let server = server(&["max_worker_processes = 3"]);
    let (db, other) = (guarded(&server), guarded(&server));
    let mut locker = db.admin();
    quiet(&mut locker);
    pass(&mut locker, "BEGIN; LOCK TABLE writeguard.event IN ACCESS EXCLUSIVE MODE");
    let mut waiting = db.admin();
    let refused = thread::spawn(move || expect_refusal(waiting.batch_execute("UPDATE t SET note = 'locked'")));
    let (mut client, mut admin) = (other.admin(), other.admin());
    for place in 0..10 {
        refuse_on_record(&mut client, &mut admin, &format!("meanwhile {place}"));
        thread::sleep(Duration::from_millis(100));
    }
    pass(&mut locker, "COMMIT");
    assert_eq!(refused.join().unwrap().sqlstate, "WG001");
    assert_eq!(stored(&mut db.admin(), "locked"), 1);
}

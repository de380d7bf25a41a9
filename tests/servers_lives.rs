//! Limits and their record through a server's life: killed and stopped processes, restarts, full disks, databases and
//! extensions that come and go, tables of another version, standbys and single-user mode.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::common::session::{pass, refuse, text};
use crate::common::{Database, Refusal, Server, expect_refusal, wait_until};
use postgres::{Client, Config, NoTls};
use serde_json::Value;

const UPDATE_ALL: &str = "UPDATE t SET note = 'x'";
const CHANGED: &str = "SELECT count(*) FROM t WHERE note IS NOT NULL";
const BLOCKED: &str = "SELECT count(*) FROM writeguard.event WHERE kind = 'blocked'";

// What the tests share.

/// A database with the table `t` of ten rows, three of which may be changed at once, and `free`, which is not covered.
fn guarded(server: &Server) -> Database {
    let db = server.database();
    prepare(&mut db.admin());
    db
}

fn prepare(admin: &mut Client) {
    admin
        .batch_execute(
            "CREATE TABLE t (id int PRIMARY KEY, note text);
             INSERT INTO t SELECT n FROM generate_series(1, 10) AS n;
             CREATE TABLE free AS TABLE t;
             ANALYZE t, free;
             SELECT writeguard.set_policy('p', tables => '{public.t}', max_rows => 3)",
        )
        .unwrap();
}

#[track_caller]
fn number(client: &mut Client, sql: &str) -> i64 {
    match client.query_one(sql, &[]) {
        Ok(row) => row.get(0),
        Err(error) => panic!("{sql}: {error:?}"),
    }
}

/// The limit holds, is exact, and its event gets stored.
#[track_caller]
fn holds(db: &Database) {
    let mut client = db.admin();
    let before = number(&mut client, BLOCKED);
    pass(&mut client, "BEGIN; UPDATE t SET note = 'x' WHERE id <= 3; ROLLBACK; UPDATE free SET note = 'x'");
    refuse(&mut client, "UPDATE t SET note = 'holds' WHERE id <= 4");
    wait_until(30, || number(&mut client, BLOCKED) == before + 1);
    assert_eq!(number(&mut client, CHANGED), 0);
}

/// How often each refused statement is in the table.
fn stored(client: &mut Client) -> HashMap<String, i64> {
    let sql = "SELECT statement, count(*) FROM writeguard.event WHERE kind = 'blocked' GROUP BY 1";
    client.query(sql, &[]).unwrap().iter().map(|row| (row.get(0), row.get(1))).collect()
}

/// These statements are in the table, each once.
#[track_caller]
fn assert_once(stored: &HashMap<String, i64>, statements: &[String]) {
    for statement in statements {
        assert_eq!(stored.get(statement), Some(&1), "{statement}: {} in the table", stored.len());
    }
}

/// Statements that can be told from each other, each past the limit.
fn statements(number: usize) -> Vec<String> {
    (0..number).map(|number| format!("UPDATE t SET note = '{number}'")).collect()
}

/// What the log says of refusals in this database.
fn logged(server: &Server, database: &str) -> Vec<Value> {
    let log = server.log();
    let (line_mark, json_mark) = (format!("@{database} LOG:  pg_writeguard: "), format!("@{database} DETAIL:  {{"));
    let lines: Vec<&str> = log.lines().collect();
    lines
        .windows(2)
        .filter(|pair| pair[0].contains(&line_mark) && pair[1].contains(&json_mark))
        .filter_map(|pair| serde_json::from_str(&pair[1][pair[1].find('{')?..]).ok())
        .filter(|json: &Value| json["kind"] == "blocked")
        .collect()
}

#[track_caller]
fn assert_logged(server: &Server, database: &str, statements: &[String]) {
    let logged = logged(server, database);
    for statement in statements {
        assert_eq!(logged.iter().filter(|json| json["statement"] == **statement).count(), 1, "{statement}: {logged:?}");
    }
}

fn counter(client: &mut Client, name: &str) -> i64 {
    number(client, &format!("SELECT {name} FROM writeguard.event_queue"))
}

/// The background processes that are connected to this database, or to none.
fn processes(client: &mut Client, database: Option<&str>) -> Vec<i32> {
    let sql = "SELECT pid FROM pg_stat_activity \
               WHERE backend_type LIKE 'pg_writeguard%' AND datname IS NOT DISTINCT FROM $1";
    client.query(sql, &[&database]).unwrap().iter().map(|row| row.get(0)).collect()
}

fn launcher(client: &mut Client) -> i32 {
    let mut found = Vec::new();
    wait_until(20, || {
        found = processes(client, None);
        !found.is_empty()
    });
    found[0]
}

/// A session that keeps the worker from the event table until it is dropped.
fn lock_events(db: &Database) -> Client {
    let mut locker = db.admin();
    wait_until(20, || counter(&mut locker, "waiting") == 0 && processes(&mut locker, Some(&db.name)).is_empty());
    locker.batch_execute("BEGIN; LOCK TABLE writeguard.event IN ACCESS EXCLUSIVE MODE").unwrap();
    locker
}

/// The worker of a database, once it waits for that lock.
fn stuck_worker(db: &Database) -> i32 {
    let mut client = db.admin();
    let sql = "SELECT pid FROM pg_stat_activity \
               WHERE backend_type LIKE 'pg_writeguard%' AND datname = $1 AND wait_event_type = 'Lock'";
    let mut pid = None;
    wait_until(30, || {
        pid = client.query_opt(sql, &[&db.name]).unwrap().map(|row| row.get(0));
        pid.is_some()
    });
    pid.unwrap()
}

/// Puts refused statements into the queue of a server with a short timeout, where they stay as long as the lock does.
fn queue(db: &Database, statements: &[String]) -> Client {
    let locker = lock_events(db);
    let mut client = db.admin();
    for statement in statements {
        refuse(&mut client, statement);
    }
    let all = i64::try_from(statements.len()).unwrap();
    assert_eq!(counter(&mut client, "waiting"), all);
    locker
}

/// A refused write that waits for its event; gives its session's process.
fn waiting_refusal(db: &Database) -> (i32, JoinHandle<Result<(), postgres::Error>>) {
    let mut client = db.admin();
    let pid = client.query_one("SELECT pg_backend_pid()", &[]).unwrap().get(0);
    let waiting = thread::spawn(move || client.batch_execute(UPDATE_ALL));
    stuck_worker(db);
    let waits = "SELECT FROM pg_stat_activity WHERE pid = $1 AND wait_event_type = 'Extension'";
    let mut admin = db.admin();
    wait_until(20, || admin.query_opt(waits, &[&pid]).unwrap().is_some());
    (pid, waiting)
}

#[track_caller]
fn signal(pid: i32, name: &str) {
    let status = Command::new("kill").args([&format!("-{name}"), &pid.to_string()]).status().unwrap();
    assert!(status.success(), "kill -{name} {pid}");
}

/// A program of the private server, run as the user that the server runs as.
fn program(server: &Server, name: &str) -> Command {
    let bin = PathBuf::from(std::env::var_os("PGWG_BIN").expect("PGWG_BIN"));
    as_owner(server, bin.join(name))
}

/// A command that runs as the user that the server runs as.
fn as_owner(server: &Server, program: impl AsRef<OsStr>) -> Command {
    let owner = fs::metadata(server.data_dir()).unwrap();
    let mut command = Command::new(program);
    for (variable, _) in std::env::vars_os() {
        if variable.to_str().is_some_and(|name| name.starts_with("PG") || name == "RUST_BACKTRACE") {
            command.env_remove(variable);
        }
    }
    command.uid(owner.uid()).gid(owner.gid()).env("LC_ALL", "C").current_dir("/").stdin(Stdio::null());
    command
}

/// A client program's command with the server's address.
fn client_program(server: &Server, name: &str, user: &str) -> Command {
    let mut command = program(server, name);
    command.args(["-U", user, "-p", &server.port().to_string(), "-h"]).arg(server.socket_dir());
    command
}

#[track_caller]
fn run(command: &mut Command) -> Output {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    output
}

/// A further line for postgresql.conf, from the next start on.
fn configure(server: &Server, line: &str) {
    let mut file = OpenOptions::new().append(true).open(server.data_dir().join("postgresql.conf")).unwrap();
    writeln!(file, "{line}").unwrap();
}

fn connect(server: &Server, database: &str) -> Client {
    Config::new()
        .host_path(server.socket_dir())
        .port(server.port())
        .user("postgres")
        .dbname(database)
        .connect(NoTls)
        .unwrap()
}

// Crashes.

/// State and parent of a process; none when it is gone.
fn process(pid: i32) -> Option<(char, i32)> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = stat[stat.rfind(')')? + 1..].split_whitespace();
    Some((fields.next()?.chars().next()?, fields.next()?.parse().ok()?))
}

fn is_running(pid: i32) -> bool {
    process(pid).is_some_and(|(state, _)| state != 'Z')
}

/// The children of a postmaster that is going to be killed; those that outlive it go when this is dropped.
struct Children(Vec<(i32, String)>);

impl Children {
    fn of(postmaster: i32) -> Self {
        let pids = fs::read_dir("/proc").unwrap().filter_map(|entry| entry.unwrap().file_name().to_str()?.parse().ok());
        let children = pids.filter(|pid| process(*pid).is_some_and(|(_, parent)| parent == postmaster));
        Children(children.map(|pid| (pid, title(pid))).collect())
    }

    fn left(&self) -> Vec<&(i32, String)> {
        self.0.iter().filter(|(pid, was)| is_running(*pid) && title(*pid) == *was).collect()
    }
}

impl Drop for Children {
    fn drop(&mut self) {
        for (pid, _) in self.left() {
            let _ = Command::new("kill").args(["-KILL", &pid.to_string()]).status();
        }
        for _ in 0..1_000 {
            if self.left().is_empty() {
                break;
            }
            thread::sleep(Duration::from_millis(10));
        }
    }
}

/// What kind of process it is.
fn title(pid: i32) -> String {
    let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let line = String::from_utf8_lossy(&line).into_owned();
    line.split_whitespace().take(3).collect::<Vec<_>>().join(" ")
}

fn kill_postmaster(server: &Server) -> Children {
    let file = fs::read_to_string(server.data_dir().join("postmaster.pid")).unwrap();
    let postmaster: i32 = file.lines().next().unwrap().trim().parse().unwrap();
    let children = Children::of(postmaster);
    assert!(children.0.len() > 3, "{:?}", children.0);
    signal(postmaster, "KILL");
    wait_until(20, || process(postmaster).is_none());
    children
}

#[test]
fn no_idle_process_outlives_the_postmaster() {
    let server = Server::start(&[]);
    let db = guarded(&server);
    let mut client = db.admin();
    launcher(&mut client);
    wait_until(20, || processes(&mut client, Some(&db.name)).is_empty());
    let children = kill_postmaster(&server);
    let began = Instant::now();
    while !children.left().is_empty() && began.elapsed() < Duration::from_secs(10) {
        thread::sleep(Duration::from_millis(50));
    }
    assert!(children.left().is_empty(), "still running: {:?}", children.left());
    server.start_again();
    holds(&db);
}

#[test]
fn no_session_that_waits_for_its_event_outlives_the_postmaster() {
    let server = Server::start(&["writeguard.event_timeout = '5min'"]);
    let db = guarded(&server);
    let locker = lock_events(&db);
    let (pid, waiting) = waiting_refusal(&db);
    let children = kill_postmaster(&server);
    wait_until(20, || !is_running(pid));
    assert!(waiting.join().unwrap().is_err());
    drop((locker, children));
    server.start_again();
    assert_eq!(number(&mut db.admin(), CHANGED), 0);
    assert_logged(&server, &db.name, &[UPDATE_ALL.into()]);
    holds(&db);
}

#[test]
fn killed_postmaster_leaves_stored_events_in_the_table_and_waiting_ones_in_the_log() {
    let server = Server::start(&["writeguard.event_timeout = '100ms'"]);
    let db = guarded(&server);
    let all = statements(8);
    let mut client = db.admin();
    for statement in &all[..5] {
        refuse(&mut client, statement);
    }
    wait_until(30, || number(&mut client, BLOCKED) == 5);
    let locker = queue(&db, &all[5..]);
    stuck_worker(&db);
    drop(kill_postmaster(&server));
    drop((locker, client));
    server.start_again();

    let mut client = db.admin();
    let survivors = stored(&mut client);
    assert_once(&survivors, &all[..5]);
    assert_eq!(survivors.values().filter(|number| **number != 1).count(), 0, "{survivors:?}");
    assert_logged(&server, &db.name, &all);
    let last = number(&mut client, "SELECT max(id) FROM writeguard.event");
    holds(&db);
    assert!(number(&mut client, "SELECT max(id) FROM writeguard.event") > last);
}

/// Ends a process so that the server has to reinitialize, and waits until that is done.
fn crash(server: &Server, db: &Database, pid: i32, name: &str) {
    const MARK: &str = "all server processes terminated; reinitializing";
    let before = server.log().matches(MARK).count();
    signal(pid, name);
    wait_until(60, || server.log().matches(MARK).count() > before);
    wait_until(60, || db.config("postgres").connect(NoTls).is_ok());
}

#[test]
fn server_comes_back_with_its_limits_after_its_worker_crashed() {
    let server = Server::start(&["writeguard.event_timeout = '100ms'"]);
    let db = guarded(&server);
    for (name, statement) in ["KILL", "SEGV", "QUIT"].into_iter().zip(statements(3)) {
        let locker = queue(&db, std::slice::from_ref(&statement));
        crash(&server, &db, stuck_worker(&db), name);
        drop(locker);
        assert_logged(&server, &db.name, &[statement]);
        holds(&db);
    }
}

#[test]
fn server_comes_back_with_its_limits_after_the_launcher_crashed() {
    let server = Server::start(&[]);
    let db = guarded(&server);
    for name in ["KILL", "SEGV", "QUIT"] {
        let pid = launcher(&mut db.admin());
        crash(&server, &db, pid, name);
        holds(&db);
    }
    assert_eq!(number(&mut db.admin(), BLOCKED), 3);
}

#[test]
fn refused_write_whose_session_crashes_while_it_waits_changed_nothing_and_is_in_the_log() {
    let server = Server::start(&["writeguard.event_timeout = '5min'"]);
    let db = guarded(&server);
    for (round, name) in ["KILL", "SEGV", "ABRT"].into_iter().enumerate() {
        let locker = lock_events(&db);
        let (pid, waiting) = waiting_refusal(&db);
        crash(&server, &db, pid, name);
        drop(locker);
        assert!(waiting.join().unwrap().is_err());
        assert_eq!(number(&mut db.admin(), CHANGED), 0);
        let in_log = logged(&server, &db.name).into_iter().filter(|json| json["statement"] == UPDATE_ALL).count();
        assert_eq!(in_log, round + 1);
        holds(&db);
    }
}

#[test]
fn sequence_of_event_ids_stays_unique_and_rising_over_crashes() {
    let server = Server::start(&[]);
    let db = guarded(&server);
    for statement in statements(3) {
        let mut client = db.admin();
        let pid = client.query_one("SELECT pg_backend_pid()", &[]).unwrap().get(0);
        refuse(&mut client, &statement);
        crash(&server, &db, pid, "KILL");
    }
    let mut client = db.admin();
    assert_once(&stored(&mut client), &statements(3));
    let in_order = "SELECT string_agg(statement, ', ' ORDER BY id) FROM writeguard.event WHERE kind = 'blocked'";
    assert_eq!(text(&mut client, in_order), statements(3).join(", "));
}

// Processes that are told to end, or stopped.

/// Sessions that are refused again and again until they are told to stop or lose their server.
struct Fire {
    stop: std::sync::Arc<AtomicBool>,
    refused: std::sync::Arc<AtomicUsize>,
    sessions: Vec<JoinHandle<Vec<String>>>,
}

impl Fire {
    fn open(db: &Database, sessions: usize, round: usize) -> Self {
        let stop = std::sync::Arc::new(AtomicBool::new(false));
        let refused = std::sync::Arc::new(AtomicUsize::new(0));
        let start = |session: usize| {
            let (stop, refused, mut client) = (stop.clone(), refused.clone(), db.admin());
            thread::spawn(move || {
                let mut told = Vec::new();
                while !stop.load(Ordering::Relaxed) {
                    let statement = format!("UPDATE t SET note = '{round} {session} {}'", told.len());
                    match client.batch_execute(&statement) {
                        Ok(()) => panic!("{statement} passed"),
                        Err(error) if error.code().is_some_and(|code| code.code() == "WG001") => told.push(statement),
                        Err(error) if client.is_closed() || error.code().is_none_or(|code| code.code() == "57P01") => {
                            break;
                        }
                        Err(error) => panic!("{statement}: {error:?}"),
                    }
                    refused.fetch_add(1, Ordering::Relaxed);
                    thread::sleep(Duration::from_millis(3));
                }
                told
            })
        };
        Fire { sessions: (0..sessions).map(start).collect(), stop, refused }
    }

    fn wait_for_more(&self, number: usize) {
        let now = self.refused.load(Ordering::Relaxed);
        wait_until(60, || self.refused.load(Ordering::Relaxed) >= now + number);
    }

    /// The statements whose refusal their clients were told of.
    fn cease(self) -> Vec<String> {
        self.stop.store(true, Ordering::Relaxed);
        self.sessions.into_iter().flat_map(|session| session.join().unwrap()).collect()
    }
}

#[test]
fn workers_and_launchers_that_are_terminated_or_cancelled_under_fire_lose_and_double_nothing() {
    let server = Server::start(&["writeguard.event_timeout = '5min'"]);
    let db = guarded(&server);
    let mut admin = db.admin();
    let fire = Fire::open(&db, 4, 0);
    for name in ["TERM", "INT", "TERM", "HUP", "USR1"] {
        fire.wait_for_more(10);
        let mut pids = processes(&mut admin, Some(&db.name));
        pids.extend(processes(&mut admin, None));
        for pid in pids {
            // It may have gone by itself.
            let _ = Command::new("kill").args([&format!("-{name}"), &pid.to_string()]).stderr(Stdio::null()).status();
        }
    }
    fire.wait_for_more(10);
    let told = fire.cease();
    let stored = stored(&mut admin);
    assert_once(&stored, &told);
    assert_eq!(stored.len(), told.len());
    assert_eq!(counter(&mut admin, "late"), 0);
    assert!(!server.log().contains("reinitializing"));
}

#[test]
fn stopped_worker_delays_errors_by_the_timeout_and_stores_once_when_it_goes_on() {
    let server = Server::start(&["writeguard.event_timeout = '300ms'"]);
    let db = guarded(&server);
    let all = statements(4);
    let locker = queue(&db, &all[..1]);
    let worker = stuck_worker(&db);
    signal(worker, "STOP");
    drop(locker);
    let (mut client, mut admin) = (db.admin(), db.admin());
    for statement in &all[1..] {
        let began = Instant::now();
        refuse(&mut client, statement);
        assert!(began.elapsed() >= Duration::from_millis(290), "{:?}", began.elapsed());
    }
    assert_eq!(number(&mut admin, CHANGED), 0);
    assert_eq!((number(&mut admin, BLOCKED), counter(&mut admin, "late"), counter(&mut admin, "waiting")), (0, 4, 4));
    assert_logged(&server, &db.name, &all);
    signal(worker, "CONT");
    wait_until(30, || counter(&mut admin, "waiting") == 0);
    assert_once(&stored(&mut admin), &all);
    wait_until(30, || processes(&mut admin, Some(&db.name)).is_empty());
    assert_eq!(number(&mut admin, BLOCKED), 4);
    holds(&db);
}

#[test]
fn stopped_launcher_delays_errors_by_the_timeout_and_events_until_it_goes_on() {
    let server = Server::start(&["writeguard.event_timeout = '300ms'"]);
    let db = guarded(&server);
    let mut admin = db.admin();
    // For a while, because one that is about to start is in no database yet.
    wait_until(20, || {
        (0..10).all(|_| {
            thread::sleep(Duration::from_millis(50));
            processes(&mut admin, Some(&db.name)).is_empty()
        })
    });
    let pid = launcher(&mut admin);
    signal(pid, "STOP");
    let all = statements(3);
    for statement in &all {
        refuse(&mut admin, statement);
    }
    assert_eq!((number(&mut admin, BLOCKED), counter(&mut admin, "late"), counter(&mut admin, "waiting")), (0, 3, 3));
    assert_logged(&server, &db.name, &all);
    signal(pid, "CONT");
    wait_until(30, || counter(&mut admin, "waiting") == 0);
    assert_once(&stored(&mut admin), &all);
}

#[test]
fn policy_change_whose_notification_waits_is_no_event_that_waits() {
    let server = Server::start(&[]);
    let db = guarded(&server);
    let mut admin = db.admin();
    wait_until(20, || counter(&mut admin, "waiting") == 0 && processes(&mut admin, Some(&db.name)).is_empty());
    let stored = counter(&mut admin, "stored");
    let pid = launcher(&mut admin);
    signal(pid, "STOP");
    pass(&mut admin, "SELECT writeguard.set_policy('p', tables => '{public.t}', max_rows => 4)");
    let waiting = counter(&mut admin, "waiting");
    signal(pid, "CONT");
    wait_until(20, || number(&mut admin, "SELECT count(*) FROM writeguard.outbox") == 0);
    assert_eq!((waiting, counter(&mut admin, "stored") - stored), (0, 0));
}

#[test]
fn full_queue_of_a_stopped_worker_counts_and_logs_what_it_cannot_take() {
    const REFUSALS: usize = 40;
    let server = Server::start(&["writeguard.event_queue_size = '64kB'", "writeguard.event_timeout = '30ms'"]);
    let db = guarded(&server);
    let mut admin = db.admin();
    let locker = queue(&db, &["UPDATE t SET note = 'first'".to_owned()]);
    let worker = stuck_worker(&db);
    signal(worker, "STOP");
    drop(locker);
    let all: Vec<String> =
        (0..REFUSALS).map(|number| format!("UPDATE t SET note = '{number} {}'", "x".repeat(6_000))).collect();
    for statement in &all {
        refuse(&mut admin, statement);
    }
    // Events that nobody waits for are counted like the others.
    let full = counter(&mut admin, "in_log_only");
    let disabled = format!("SET writeguard.enabled = off; BEGIN; DELETE FROM t /* {} */; ROLLBACK", "x".repeat(6_000));
    pass(&mut db.admin(), &disabled);
    assert_eq!(counter(&mut admin, "in_log_only"), full + 1);
    assert!(full > 0 && full < i64::try_from(REFUSALS).unwrap(), "{full}");
    assert_eq!(server.log().matches("the event queue is full").count(), usize::try_from(full).unwrap());
    assert_eq!(logged(&server, &db.name).len(), REFUSALS + 1);
    assert_eq!(number(&mut admin, CHANGED), 0);
    signal(worker, "CONT");
    wait_until(30, || counter(&mut admin, "waiting") == 0);
    let stored = stored(&mut admin);
    assert_eq!(i64::try_from(stored.len()).unwrap() + full, i64::try_from(REFUSALS).unwrap() + 1);
    assert!(stored.values().all(|number| *number == 1));
    holds(&db);
}

// Restarts.

/// Keeps workers from the event table, over restarts too, until [`release_events`].
fn hold_events(db: &Database) {
    let mut locker = lock_events(db);
    locker.batch_execute("PREPARE TRANSACTION 'hold'").unwrap();
}

fn release_events(db: &Database) {
    db.admin().batch_execute("ROLLBACK PREPARED 'hold'").unwrap();
}

/// Three refused statements that wait in the queue of a server with a short timeout.
fn three_wait(db: &Database) -> Vec<String> {
    let all = statements(3);
    hold_events(db);
    let mut client = db.admin();
    for statement in &all {
        refuse(&mut client, statement);
    }
    assert_eq!(counter(&mut client, "waiting"), 3);
    all
}

/// After the lock is gone and the queue is empty each of them is in the table once, and no later restart adds one.
#[track_caller]
fn all_are_stored_once(server: &Server, db: &Database, all: &[String]) {
    release_events(db);
    let mut client = db.admin();
    wait_until(30, || counter(&mut client, "waiting") == 0);
    assert_once(&stored(&mut client), all);
    assert_eq!(stored(&mut client).len(), all.len());
    drop(client);
    server.restart();
    holds(db);
    assert_eq!(number(&mut db.admin(), BLOCKED), i64::try_from(all.len()).unwrap() + 1);
}

#[test]
fn restarts_of_each_mode_keep_events_that_wait_and_double_none() {
    for mode in ["fast", "smart", "immediate"] {
        let server = Server::start(&["writeguard.event_timeout = '100ms'"]);
        let db = guarded(&server);
        let all = three_wait(&db);
        stuck_worker(&db);
        for _ in 0..2 {
            server.stop(mode);
            server.start_again();
            assert_eq!(counter(&mut db.admin(), "waiting"), 3, "{mode}");
        }
        all_are_stored_once(&server, &db, &all);
    }
}

#[test]
fn fast_restarts_under_fire_lose_and_double_nothing() {
    let server = Server::start(&["writeguard.event_timeout = '5min'"]);
    let db = guarded(&server);
    let mut told = Vec::new();
    for round in 0..3 {
        let fire = Fire::open(&db, 4, round);
        fire.wait_for_more(20);
        server.restart();
        told.extend(fire.cease());
    }
    let mut client = db.admin();
    wait_until(30, || counter(&mut client, "waiting") == 0);
    let stored = stored(&mut client);
    assert_once(&stored, &told);
    let in_log: Vec<String> =
        logged(&server, &db.name).iter().map(|json| json["statement"].as_str().unwrap().to_owned()).collect();
    assert_once(&stored, &in_log);
    assert_eq!(stored.len(), in_log.len());
    assert_eq!(number(&mut client, CHANGED), 0);
}

/// Leaves an event in the commit of its worker, which waits for a synchronous standby that is not there; gives that
/// worker.
fn commit_that_waits(server: &Server, db: &Database) -> i32 {
    let mut client = db.admin();
    wait_until(20, || counter(&mut client, "waiting") == 0 && processes(&mut client, Some(&db.name)).is_empty());
    pass(&mut client, "SET synchronous_commit = local");
    let auto = server.data_dir().join("postgresql.auto.conf");
    fs::write(&auto, "synchronous_standby_names = 'nobody'\n").unwrap();
    pass(&mut client, "SELECT pg_reload_conf()");
    wait_until(20, || text(&mut client, "SHOW synchronous_standby_names") == "nobody");
    // The checkpointer makes it known to those that commit.
    pass(&mut client, "CHECKPOINT");
    refuse(&mut client, &statements(1)[0]);
    let sql = "SELECT pid FROM pg_stat_activity WHERE backend_type = 'pg_writeguard worker' AND wait_event = 'SyncRep'";
    let mut pid = None;
    wait_until(20, || {
        pid = client.query_opt(sql, &[]).unwrap().map(|row| row.get(0));
        pid.is_some()
    });
    fs::write(&auto, "").unwrap();
    pid.unwrap()
}

#[test]
fn event_whose_commit_waits_for_a_synchronous_standby_is_stored_once_over_restarts() {
    for mode in ["fast", "immediate"] {
        let server = Server::start(&["writeguard.event_timeout = '100ms'"]);
        let db = guarded(&server);
        commit_that_waits(&server, &db);
        server.stop(mode);
        server.start_again();
        let mut client = db.admin();
        wait_until(30, || counter(&mut client, "waiting") == 0);
        assert_eq!(stored(&mut client)[&statements(1)[0]], 1, "{mode}");
    }
}

#[test]
fn event_whose_worker_is_terminated_while_its_commit_waits_for_a_standby_is_stored_once() {
    let server = Server::start(&["writeguard.event_timeout = '100ms'"]);
    let db = guarded(&server);
    let worker = commit_that_waits(&server, &db);
    let mut client = db.admin();
    pass(&mut client, &format!("SELECT pg_terminate_backend({worker})"));
    pass(&mut client, "SELECT pg_reload_conf()");
    wait_until(30, || counter(&mut client, "waiting") == 0);
    assert_once(&stored(&mut client), &statements(1));
    refuse(&mut client, UPDATE_ALL);
    wait_until(30, || number(&mut client, BLOCKED) == 2);
}

#[test]
fn start_that_fails_takes_nothing_from_what_waits() {
    let server = Server::start(&["writeguard.event_timeout = '100ms'"]);
    let db = guarded(&server);
    let all = three_wait(&db);
    server.stop("fast");
    let hba = server.data_dir().join("pg_hba.conf");
    let good = fs::read_to_string(&hba).unwrap();
    fs::write(&hba, "a mistake\n").unwrap();
    let start = |log: &str| {
        let mut command = program(&server, "pg_ctl");
        command.args(["start", "-s", "-w", "-D"]).arg(server.data_dir()).arg("-l").arg(server.socket_dir().join(log));
        command.stdout(Stdio::null()).stderr(Stdio::null()).status().unwrap().success()
    };
    assert!(!start("failed.log"));
    fs::write(&hba, good).unwrap();
    server.start_again();
    assert_eq!(counter(&mut db.admin(), "waiting"), 3);
    all_are_stored_once(&server, &db, &all);
}

#[test]
fn queue_that_is_smaller_after_a_restart_counts_and_logs_what_it_cannot_take() {
    const REFUSALS: usize = 40;
    let server = Server::start(&["writeguard.event_timeout = 0"]);
    let db = guarded(&server);
    let mut client = db.admin();
    hold_events(&db);
    for number in 0..REFUSALS {
        refuse(&mut client, &format!("UPDATE t SET note = '{number} {}'", "x".repeat(6_000)));
    }
    drop(client);
    configure(&server, "writeguard.event_queue_size = '64kB'");
    server.restart();
    let mut client = db.admin();
    let (waiting, lost) = (counter(&mut client, "waiting"), counter(&mut client, "in_log_only"));
    assert!(waiting > 0 && lost > 0, "{waiting} {lost}");
    assert_eq!(waiting + lost, i64::try_from(REFUSALS).unwrap());
    let told = server.log().matches("no room for an event that waited for the restart").count();
    assert_eq!(i64::try_from(told).unwrap(), lost);
    release_events(&db);
    wait_until(30, || counter(&mut client, "waiting") == 0);
    assert_eq!(number(&mut client, BLOCKED), waiting);
    holds(&db);
}

/// Where what waits is kept while the server is down.
fn kept(server: &Server) -> PathBuf {
    server.data_dir().join("pg_stat/pg_writeguard.events")
}

#[test]
fn kept_file_that_is_damaged_stops_no_start_and_is_told_of() {
    let server = Server::start(&["writeguard.event_timeout = '100ms'"]);
    let db = guarded(&server);
    let all = three_wait(&db);
    for damage in [&b"\n{\"database\": 1"[..], b"\n\xff\xfe\x00"] {
        server.stop("fast");
        let mut file = OpenOptions::new().append(true).open(kept(&server)).unwrap();
        file.write_all(damage).unwrap();
        drop(file);
        let before = server.log().len();
        server.start_again();
        assert!(server.log()[before..].contains("pg_writeguard: "), "{damage:?}: {}", &server.log()[before..]);
        assert_eq!(counter(&mut db.admin(), "waiting"), 3, "{damage:?}");
    }
    all_are_stored_once(&server, &db, &all);
}

#[test]
fn kept_file_that_cannot_be_written_is_told_of_and_the_log_has_the_events() {
    let server = Server::start(&["writeguard.event_timeout = '100ms'"]);
    let db = guarded(&server);
    let all = three_wait(&db);
    let unfinished = server.data_dir().join("pg_stat/pg_writeguard.events.tmp");
    fs::create_dir(&unfinished).unwrap();
    server.stop("fast");
    assert!(server.log().contains("pg_writeguard: could not write"), "{}", server.log());
    fs::remove_dir(&unfinished).unwrap();
    server.start_again();
    assert_logged(&server, &db.name, &all);
    release_events(&db);
    holds(&db);
}

#[test]
fn events_wait_for_a_background_worker_slot_over_restarts() {
    for slots in [0, 1] {
        let server = Server::start(&["writeguard.event_timeout = '100ms'"]);
        let db = guarded(&server);
        configure(&server, &format!("max_worker_processes = {slots}"));
        server.restart();
        let mut client = db.admin();
        let all = statements(3);
        for statement in &all {
            refuse(&mut client, statement);
        }
        assert_eq!((counter(&mut client, "waiting"), counter(&mut client, "late")), (3, 3));
        assert_logged(&server, &db.name, &all);
        wait_until(20, || server.log().contains("max_worker_processes"));
        drop(client);
        configure(&server, "max_worker_processes = 16");
        server.restart();
        let mut client = db.admin();
        wait_until(30, || counter(&mut client, "waiting") == 0);
        assert_once(&stored(&mut client), &all);
        assert_eq!(number(&mut client, CHANGED), 0);
    }
}

#[test]
fn server_without_the_preload_keeps_policies_events_and_what_waits() {
    let server = Server::start(&["writeguard.event_timeout = '100ms'"]);
    let db = guarded(&server);
    refuse(&mut db.admin(), UPDATE_ALL);
    let mut client = db.admin();
    wait_until(30, || number(&mut client, BLOCKED) == 1);
    let all = three_wait(&db);
    drop(client);
    configure(&server, "shared_preload_libraries = ''");
    server.restart();
    let mut client = db.admin();
    assert_eq!(number(&mut client, "SELECT max_rows FROM writeguard.policy"), 3);
    release_events(&db);
    for sql in [
        "SELECT writeguard.set_policy('p', max_rows => 1)",
        "TABLE writeguard.event_queue",
        "TABLE writeguard.my_events",
    ] {
        let refusal = expect_refusal(client.batch_execute(sql));
        assert_eq!(refusal.sqlstate, "55000", "{sql}: {refusal:?}");
        assert!(refusal.hint.contains("shared_preload_libraries = 'pg_writeguard'"), "{refusal:?}");
    }
    assert_eq!(number(&mut client, "SELECT max_rows FROM writeguard.policy"), 3);
    assert_eq!(number(&mut client, BLOCKED), 1);
    run(client_program(&server, "pg_dump", "postgres").args(["-d", &db.name]));
    drop(client);
    configure(&server, "shared_preload_libraries = 'pg_writeguard'");
    server.restart();
    let mut client = db.admin();
    wait_until(30, || number(&mut client, BLOCKED) == 4);
    assert_once(&stored(&mut client), &all);
    holds(&db);
}

// Full disks.

/// Replaces the empty heap of the event table by a disk without room; gives the file and where it waits. Sessions that
/// looked at the table meanwhile have that disk open and must not be used after [`make_room`].
fn fill_disk(server: &Server, db: &Database) -> (PathBuf, PathBuf) {
    let mut admin = db.admin();
    wait_until(20, || counter(&mut admin, "waiting") == 0 && processes(&mut admin, Some(&db.name)).is_empty());
    // Not TRUNCATE, which is an event itself.
    pass(&mut admin, "DELETE FROM writeguard.event");
    pass(&mut admin, "VACUUM writeguard.event");
    let file = server.data_dir().join(text(&mut admin, "SELECT pg_relation_filepath('writeguard.event')"));
    drop(admin);
    assert_eq!(fs::metadata(&file).unwrap().len(), 0);
    let aside = file.with_extension("aside");
    fs::rename(&file, &aside).unwrap();
    symlink("/dev/full", &file).unwrap();
    (file, aside)
}

fn make_room((file, aside): &(PathBuf, PathBuf)) {
    fs::remove_file(file).unwrap();
    fs::rename(aside, file).unwrap();
}

#[test]
fn events_that_find_the_disk_full_are_stored_once_when_there_is_room() {
    let server = Server::start(&["writeguard.event_timeout = '300ms'"]);
    let (db, other) = (guarded(&server), guarded(&server));
    let files = fill_disk(&server, &db);
    let all = statements(4);
    let mut client = db.admin();
    let began = Instant::now();
    for statement in &all {
        refuse(&mut client, statement);
    }
    assert!(began.elapsed() < Duration::from_secs(20));
    wait_until(30, || server.log().contains("No space left on device"));
    assert_eq!(number(&mut client, CHANGED), 0);
    assert_eq!((number(&mut client, BLOCKED), counter(&mut client, "waiting")), (0, 4));
    assert_logged(&server, &db.name, &all);
    // Another database has room.
    holds(&other);
    drop(client);
    make_room(&files);
    let mut client = db.admin();
    wait_until(30, || counter(&mut client, "waiting") == 0);
    assert_once(&stored(&mut client), &all);
    assert_eq!(number(&mut client, BLOCKED), 4);
    holds(&db);
    assert!(!server.log().contains("reinitializing"));
}

#[test]
fn overrides_and_policy_changes_that_find_the_disk_full_do_not_happen() {
    let server = Server::start(&["writeguard.event_timeout = '300ms'"]);
    let db = guarded(&server);
    let mut client = db.admin();
    pass(&mut client, "SELECT writeguard.set_policy('p', tables => '{public.t}', max_rows => 3, override => 'flag')");
    let files = fill_disk(&server, &db);
    let refusal = expect_refusal(client.batch_execute(&format!("SET writeguard.override = on; {UPDATE_ALL}")));
    assert_eq!(refusal.sqlstate, "53100", "{refusal:?}");
    let refusal = expect_refusal(
        client.batch_execute("SELECT writeguard.set_policy('p', tables => '{public.t}', max_rows => 9)"),
    );
    assert_eq!(refusal.sqlstate, "53100", "{refusal:?}");
    pass(&mut client, "RESET writeguard.override");
    assert_eq!(number(&mut client, CHANGED), 0);
    assert_eq!(number(&mut client, "SELECT max_rows FROM writeguard.policy"), 3);
    drop(client);
    make_room(&files);
    holds(&db);
    let mut client = db.admin();
    pass(&mut client, &format!("SET writeguard.override = on; {UPDATE_ALL}"));
    assert_eq!(number(&mut client, CHANGED), 10);
}

#[test]
fn events_that_meet_a_file_size_limit_are_stored_once_when_it_is_lifted() {
    const ALL: usize = 30;
    let server = Server::start(&["writeguard.event_timeout = '100ms'"]);
    let db = guarded(&server);
    let mut client = db.admin();
    // More than a segment of the write-ahead log, which has to fit.
    pass(
        &mut client,
        "INSERT INTO writeguard.event (occurred_at, kind, login, role, statement)
         SELECT now(), 'disabled', 'x', 'x', repeat('x', 1900) FROM generate_series(1, 8800)",
    );
    let size = number(&mut client, "SELECT pg_relation_size('writeguard.event')");
    assert!(size > 16 << 20, "{size}");
    wait_until(20, || processes(&mut client, Some(&db.name)).is_empty());
    let file = fs::read_to_string(server.data_dir().join("postmaster.pid")).unwrap();
    let postmaster = file.lines().next().unwrap().trim().to_owned();
    let limit =
        |size: &str| run(as_owner(&server, "prlimit").args(["--pid", &postmaster, &format!("--fsize={size}:")]));
    limit(&size.to_string());
    let all: Vec<String> =
        (0..ALL).map(|number| format!("UPDATE t SET note = '{number} {}'", "x".repeat(1_500))).collect();
    for statement in &all {
        refuse(&mut client, statement);
    }
    wait_until(30, || server.log().contains("File too large"));
    assert_eq!(number(&mut client, CHANGED), 0);
    assert!(counter(&mut client, "waiting") > 0);
    assert_logged(&server, &db.name, &all);
    limit("unlimited");
    wait_until(30, || counter(&mut client, "waiting") == 0);
    assert_once(&stored(&mut client), &all);
    assert_eq!(number(&mut client, BLOCKED), i64::try_from(ALL).unwrap());
    assert!(!server.log().contains("reinitializing"));
}

// Extensions and databases come and go.

#[test]
fn database_without_the_extension_is_dumped_copied_and_dropped_as_ever() {
    let server = Server::start(&[]);
    let db = server.plain_database();
    db.admin()
        .batch_execute("CREATE TABLE t AS SELECT n AS id, NULL AS note FROM generate_series(1, 10) AS n")
        .unwrap();
    db.admin().batch_execute("UPDATE t SET note = 'x'; DELETE FROM t WHERE id > 5").unwrap();
    run(client_program(&server, "pg_dump", "postgres").args(["-Fc", "--no-sync", "-d", &db.name, "-f", "/dev/null"]));
    let mut admin = server.postgres();
    for strategy in ["wal_log", "file_copy"] {
        let sql = format!("CREATE DATABASE copy_{strategy} TEMPLATE {} STRATEGY {strategy}", db.name);
        pass(&mut admin, &sql);
        assert_eq!(number(&mut connect(&server, &format!("copy_{strategy}")), "SELECT count(*) FROM t"), 5);
        pass(&mut admin, &format!("DROP DATABASE copy_{strategy}"));
    }
    pass(&mut admin, &format!("DROP DATABASE {}", db.name));
    assert_eq!(
        number(&mut admin, "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'pg_writeguard worker'"),
        0
    );
}

/// Stops the sessions that look at it when it is dropped.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn sessions_that_write_while_the_extension_comes_and_goes_see_limits_or_none_and_nothing_else() {
    const SESSIONS: usize = 5;
    const ROUNDS: usize = 12;
    // On a fast machine there are more refusals in a minute than are stored one by one.
    let server = Server::start(&["deadlock_timeout = '200ms'", "writeguard.blocked_per_minute = 1000000"]);
    let db = server.plain_database();
    let mut admin = db.admin();
    for session in 0..SESSIONS {
        pass(
            &mut admin,
            &format!("CREATE TABLE t{session} AS SELECT n AS id, 0 AS v FROM generate_series(1, 10) AS n"),
        );
    }
    let stop = AtomicBool::new(false);
    let guard = |admin: &mut Client| {
        pass(admin, "CREATE EXTENSION pg_writeguard");
        pass(admin, "SELECT writeguard.set_policy('p', tables => '{public.*}', max_rows => 3)");
    };
    thread::scope(|scope| {
        // Sessions end even when this thread fails.
        let stopping = Stop(&stop);
        let write = |session: usize| {
            let (db, stop) = (&db, &stop);
            move || {
                let (mut client, mut passed, mut refused, mut turn) = (db.admin(), 0, 0, 0);
                while !stop.load(Ordering::Relaxed) {
                    turn += 1;
                    let sql = match turn % 3 {
                        0 => format!("TRUNCATE t{session}"),
                        1 => format!("UPDATE t{session} SET v = v + 1"),
                        _ => format!("DELETE FROM t{session}"),
                    };
                    match client.batch_execute(&format!("BEGIN; {sql}")) {
                        Ok(()) => passed += 1,
                        Err(error) => {
                            let refusal = Refusal::of(&error);
                            let known = ["WG001", "WG005", "WG008"].contains(&refusal.sqlstate.as_str());
                            assert!(known && !refusal.hint.is_empty(), "{sql}: {refusal:?}");
                            refused += 1;
                        }
                    }
                    client.batch_execute("ROLLBACK").unwrap();
                    let small = format!("UPDATE t{session} SET v = 0 WHERE id = 1");
                    if let Err(error) = client.batch_execute(&small) {
                        assert_eq!(Refusal::of(&error).sqlstate, "WG008", "{small}: {:?}", Refusal::of(&error));
                    }
                }
                // The last thing that happened was a policy.
                refuse(&mut client, &format!("UPDATE t{session} SET v = v + 1"));
                (passed, refused)
            }
        };
        let sessions: Vec<_> = (0..SESSIONS).map(|session| scope.spawn(write(session))).collect();
        for round in 0..ROUNDS {
            guard(&mut admin);
            // Time for events to be under way, a different one each time.
            thread::sleep(Duration::from_millis(10 * (round as u64 % 5)));
            // A worker that stores something meanwhile may be in a deadlock with it.
            while let Err(error) = admin.batch_execute("DROP EXTENSION pg_writeguard") {
                assert_eq!(Refusal::of(&error).sqlstate, "40P01", "{:?}", Refusal::of(&error));
            }
            thread::sleep(Duration::from_millis(5));
        }
        guard(&mut admin);
        drop(stopping);
        for session in sessions {
            let (passed, refused) = session.join().unwrap();
            assert!(passed > 0 && refused > 0, "{passed} {refused}");
        }
    });
    wait_until(30, || number(&mut admin, BLOCKED) >= SESSIONS as i64 && counter(&mut admin, "waiting") == 0);
    assert!(!server.log().contains("reinitializing"));
    // What the sessions were told, and no more than that.
    let sessions = format!("@{} ERROR:", db.name);
    for line in server.log().lines().filter(|line| line.contains(&sessions)) {
        assert!(
            ["exceeds the limit of", "cannot decide", "deadlock detected"].iter().any(|known| line.contains(known)),
            "{line}"
        );
    }
}

#[test]
fn database_made_again_under_its_name_does_not_get_the_events_of_the_old_one() {
    let server = Server::start(&["writeguard.event_timeout = '100ms'"]);
    let db = guarded(&server);
    // No slot for a worker, so that nobody stores anything meanwhile.
    configure(&server, "max_worker_processes = 1");
    server.restart();
    let mut client = db.admin();
    let all = statements(3);
    for statement in &all {
        refuse(&mut client, statement);
    }
    drop(client);
    let mut admin = server.postgres();
    pass(&mut admin, &format!("DROP DATABASE {}", db.name));
    pass(&mut admin, &format!("CREATE DATABASE {}", db.name));
    pass(&mut db.admin(), "CREATE EXTENSION pg_writeguard");
    prepare(&mut db.admin());
    drop(admin);
    configure(&server, "max_worker_processes = 16");
    server.restart();
    let mut client = db.admin();
    wait_until(30, || counter(&mut client, "waiting") == 0);
    assert_eq!(number(&mut client, BLOCKED), 0);
    assert!(server.log().contains("3 events of dropped database"), "{}", server.log());
    assert_logged(&server, &db.name, &all);
    holds(&db);
}

#[test]
fn database_made_from_a_guarded_template_is_guarded() {
    let server = Server::shared();
    let db = guarded(server);
    refuse(&mut db.admin(), UPDATE_ALL);
    let mut admin = server.postgres();
    pass(&mut admin, &format!("ALTER DATABASE {} IS_TEMPLATE true", db.name));
    for strategy in ["wal_log", "file_copy"] {
        pass(&mut admin, &format!("CREATE DATABASE copy_{strategy} TEMPLATE {} STRATEGY {strategy}", db.name));
        let mut client = connect(server, &format!("copy_{strategy}"));
        refuse(&mut client, "UPDATE t SET note = 'copy'");
        assert_eq!((number(&mut client, BLOCKED), number(&mut client, CHANGED)), (2, 0));
        pass(&mut client, "UPDATE t SET note = 'x' WHERE id <= 3");
        pass(&mut client, "SELECT writeguard.drop_policy('p'); UPDATE t SET note = 'x'");
    }
    holds(&db);
}

#[test]
fn renamed_database_keeps_its_limits_and_gets_the_events_that_wait_for_it() {
    let server = Server::start(&["writeguard.event_timeout = '100ms'"]);
    let db = guarded(&server);
    configure(&server, "max_worker_processes = 1");
    server.restart();
    let all = statements(3);
    let mut client = db.admin();
    for statement in &all {
        refuse(&mut client, statement);
    }
    drop(client);
    pass(&mut server.postgres(), &format!("ALTER DATABASE {} RENAME TO renamed", db.name));
    configure(&server, "max_worker_processes = 16");
    server.restart();
    let mut client = connect(&server, "renamed");
    wait_until(30, || counter(&mut client, "waiting") == 0);
    assert_once(&stored(&mut client), &all);
    refuse(&mut client, UPDATE_ALL);
    pass(&mut client, "UPDATE t SET note = 'x' WHERE id <= 3");
}

// Tables of another version.

/// While `change` is in effect, covered writes are refused with WG008 and a way out, and all else works as ever.
#[track_caller]
fn refuses_while(limit: &str, change: &str, back: &str) {
    let db = guarded(Server::shared());
    let (mut admin, mut client) = (db.admin(), db.admin());
    pass(&mut admin, &format!("SELECT writeguard.set_policy('p', tables => '{{public.t}}', {limit} => 3)"));
    refuse(&mut client, UPDATE_ALL);
    pass(&mut admin, change);
    let mut undecided = Vec::new();
    for sql in [UPDATE_ALL, "DELETE FROM t", "TRUNCATE t"] {
        for session in [&mut client, &mut db.admin()] {
            let refusal = expect_refusal(session.batch_execute(sql));
            assert_eq!(refusal.sqlstate, "WG008", "{change}: {sql}: {refusal:?}");
            assert!(!refusal.message.is_empty() && !refusal.hint.is_empty(), "{change}: {refusal:?}");
            undecided.push(refusal);
        }
    }
    assert!(
        undecided.iter().all(|refusal| refusal.hint.contains("ALTER EXTENSION pg_writeguard UPDATE")),
        "{change}: {:?}",
        undecided[0]
    );
    pass(
        &mut client,
        "SELECT count(*) FROM t; INSERT INTO t VALUES (11);
         CREATE TEMP TABLE mine AS TABLE t; UPDATE mine SET note = 'x';
         EXPLAIN UPDATE t SET note = 'x'; CREATE TABLE IF NOT EXISTS other (id int);",
    );
    pass(
        &mut db.admin(),
        "SET writeguard.enabled = off; UPDATE t SET note = 'x' WHERE id = 11; DELETE FROM t WHERE id = 11",
    );
    assert_eq!(number(&mut admin, CHANGED), 0);
    pass(&mut admin, back);
    pass(&mut client, "UPDATE t SET note = NULL WHERE id <= 3");
    refuse(&mut client, UPDATE_ALL);
}

fn column_missing(column: &str, limit: &str) {
    refuses_while(
        limit,
        &format!("ALTER TABLE writeguard.policy RENAME {column} TO of_another_version"),
        &format!("ALTER TABLE writeguard.policy RENAME of_another_version TO {column}"),
    );
}

#[test]
fn policy_table_without_max_rows_refuses() {
    column_missing("max_rows", "max_rows");
}

#[test]
fn policy_table_without_max_rows_per_transaction_refuses() {
    column_missing("max_rows_per_transaction", "max_rows_per_transaction");
}

#[test]
fn policy_table_without_tables_refuses() {
    column_missing("tables", "max_rows");
}

#[test]
fn policy_table_without_mode_refuses() {
    column_missing("mode", "max_rows");
}

#[test]
fn policy_table_without_a_column_that_this_version_does_not_obey_yet_refuses_or_obeys_the_rest() {
    let server = Server::shared();
    let db = guarded(server);
    for column in ["comment", "schedule", "rate_rows", "undo", "client"] {
        pass(&mut db.admin(), &format!("ALTER TABLE writeguard.policy DROP COLUMN {column}"));
        let refusal = expect_refusal(db.admin().batch_execute(UPDATE_ALL));
        assert!(["WG001", "WG008"].contains(&refusal.sqlstate.as_str()), "{column}: {refusal:?}");
    }
}

#[test]
fn policy_table_that_is_not_there_refuses() {
    refuses_while(
        "max_rows",
        "ALTER TABLE writeguard.policy RENAME TO of_another_version",
        "ALTER TABLE writeguard.of_another_version RENAME TO policy",
    );
}

#[test]
fn schema_of_the_extension_that_is_not_there_refuses() {
    refuses_while(
        "max_rows",
        "ALTER SCHEMA writeguard RENAME TO of_another_version",
        "ALTER SCHEMA of_another_version RENAME TO writeguard",
    );
}

/// A column of a type that this version does not expect: never a crash, and never a write past the limit.
#[track_caller]
fn column_of_another_type(changes: &[&str]) {
    let server = Server::start(&[]);
    for change in changes {
        let db = guarded(&server);
        let mut client = db.admin();
        refuse(&mut client, UPDATE_ALL);
        pass(&mut db.admin(), &format!("ALTER TABLE writeguard.policy {change}"));
        let result = client.batch_execute(UPDATE_ALL);
        assert!(!server.log().contains("was terminated by signal"), "{change}: the server crashed");
        let refusal = expect_refusal(result);
        assert_eq!(refusal.sqlstate, "WG008", "{change}: {refusal:?}");
        assert!(refusal.hint.contains("ALTER EXTENSION pg_writeguard UPDATE"), "{change}: {refusal:?}");
        pass(&mut client, "INSERT INTO t VALUES (11); SELECT count(*) FROM t");
        assert_eq!(number(&mut client, CHANGED), 0);
    }
}

#[test]
fn limit_column_that_is_text_crashes_nothing_and_refuses() {
    column_of_another_type(&["DROP CONSTRAINT policy_max_rows_check, ALTER max_rows TYPE text"]);
}

#[test]
fn text_column_that_is_a_number_crashes_nothing_and_refuses() {
    column_of_another_type(&["ALTER comment TYPE int USING 7"]);
}

#[test]
fn array_column_that_is_text_crashes_nothing_and_refuses() {
    column_of_another_type(&[
        "DROP CONSTRAINT policy_roles_check, ALTER roles DROP DEFAULT, ALTER roles TYPE text USING 'public'",
    ]);
}

#[test]
fn limit_column_that_is_an_integer_keeps_the_limit_or_refuses() {
    let server = Server::shared();
    let db = guarded(server);
    pass(&mut db.admin(), "ALTER TABLE writeguard.policy ALTER max_rows TYPE int");
    let mut client = db.admin();
    let refusal = expect_refusal(client.batch_execute(UPDATE_ALL));
    assert!(["WG001", "WG008"].contains(&refusal.sqlstate.as_str()), "{refusal:?}");
}

#[test]
fn version_that_is_not_known_changes_no_limit() {
    let server = Server::start(&[]);
    let db = guarded(&server);
    pass(&mut db.admin(), "UPDATE pg_extension SET extversion = '0.0.1' WHERE extname = 'pg_writeguard'");
    let refusal = expect_refusal(db.admin().batch_execute(UPDATE_ALL));
    assert!(["WG001", "WG008"].contains(&refusal.sqlstate.as_str()), "{refusal:?}");
    server.restart();
    let refusal = expect_refusal(db.admin().batch_execute(UPDATE_ALL));
    assert!(["WG001", "WG008"].contains(&refusal.sqlstate.as_str()), "{refusal:?}");
}

#[test]
fn events_wait_while_their_table_has_other_columns() {
    let server = Server::start(&["writeguard.event_timeout = '100ms'"]);
    for (change, back) in [
        ("ALTER TABLE writeguard.event RENAME reason TO x", "ALTER TABLE writeguard.event RENAME x TO reason"),
        ("ALTER TABLE writeguard.event RENAME login TO x", "ALTER TABLE writeguard.event RENAME x TO login"),
    ] {
        let db = guarded(&server);
        let mut client = db.admin();
        wait_until(30, || counter(&mut client, "waiting") == 0);
        pass(&mut client, change);
        let all = statements(3);
        for statement in &all {
            refuse(&mut client, statement);
        }
        assert_logged(&server, &db.name, &all);
        assert_eq!(
            (number(&mut client, BLOCKED), counter(&mut client, "waiting")),
            (0, 4),
            "{change}: and the change itself"
        );
        pass(&mut client, back);
        wait_until(30, || counter(&mut client, "waiting") == 0);
        assert_once(&stored(&mut client), &all);
        assert_eq!(number(&mut client, CHANGED), 0);
    }
    assert!(!server.log().contains("reinitializing"));
}

#[test]
fn event_table_that_is_not_there_lifts_no_limit_and_is_counted() {
    let server = Server::start(&["writeguard.event_timeout = '100ms'"]);
    let db = guarded(&server);
    let mut client = db.admin();
    let before = counter(&mut client, "in_log_only");
    wait_until(30, || counter(&mut client, "waiting") == 0);
    pass(&mut client, "ALTER TABLE writeguard.event RENAME TO of_another_version");
    let all = statements(3);
    for statement in &all {
        refuse(&mut client, statement);
    }
    assert_logged(&server, &db.name, &all);
    assert_eq!(number(&mut client, CHANGED), 0);
    // Either they wait for the table, the change itself among them, or the counter says that only the log has them.
    wait_until(30, || counter(&mut client, "in_log_only") + counter(&mut client, "waiting") == before + 4);
    pass(&mut client, "ALTER TABLE writeguard.of_another_version RENAME TO event");
    holds(&db);
}

#[test]
fn override_without_the_tables_it_needs_does_not_pass() {
    let server = Server::start(&["writeguard.event_timeout = '100ms'"]);
    let db = guarded(&server);
    let mut client = db.admin();
    let armed = format!("SET writeguard.override = on; SET writeguard.token = 'x'; {UPDATE_ALL}");
    for (table, policy) in [("request", "token"), ("event", "flag"), ("outbox", "flag")] {
        let sql =
            format!("SELECT writeguard.set_policy('p', tables => '{{t}}', max_rows => 3, override => '{policy}')");
        pass(&mut client, &sql);
        pass(&mut client, &format!("ALTER TABLE writeguard.{table} RENAME TO of_another_version"));
        for statement in armed.split("; ").collect::<Vec<_>>().split_last().unwrap().1 {
            pass(&mut client, statement);
        }
        let refusal = expect_refusal(client.batch_execute(UPDATE_ALL));
        assert!(refusal.sqlstate.starts_with("WG") || refusal.sqlstate == "42P01", "{table}: {refusal:?}");
        assert_eq!(number(&mut client, CHANGED), 0, "{table}");
        pass(&mut client, &format!("ALTER TABLE writeguard.of_another_version RENAME TO {table}"));
    }
    assert!(!server.log().contains("reinitializing"));
}

// A standby, and single-user mode.

/// A server that follows another one; its directory is inside the other's.
struct Standby<'a> {
    primary: &'a Server,
    data: PathBuf,
}

impl<'a> Standby<'a> {
    const PORT: u16 = 5433;

    fn start(primary: &'a Server) -> Self {
        let data = primary.socket_dir().join("standby");
        run(client_program(primary, "pg_basebackup", "postgres")
            .args(["-R", "-X", "stream", "-c", "fast", "--no-sync", "-D"])
            .arg(&data));
        let standby = Standby { primary, data };
        let port = format!("-p {}", Self::PORT);
        let log = primary.socket_dir().join("standby.log");
        let started = standby.pg_ctl("start").args(["-o", &port, "-l"]).arg(log).status().unwrap();
        assert!(started.success());
        standby
    }

    fn pg_ctl(&self, action: &str) -> Command {
        let mut command = program(self.primary, "pg_ctl");
        command.args([action, "-s", "-w", "-D"]).arg(&self.data).stdout(Stdio::null()).stderr(Stdio::null());
        command
    }

    fn connect(&self, db: &Database) -> Client {
        Config::new()
            .host_path(self.primary.socket_dir())
            .port(Self::PORT)
            .user("postgres")
            .dbname(&db.name)
            .connect(NoTls)
            .unwrap()
    }

    fn log(&self) -> String {
        fs::read_to_string(self.primary.socket_dir().join("standby.log")).unwrap_or_default()
    }
}

impl Drop for Standby<'_> {
    fn drop(&mut self) {
        let _ = self.pg_ctl("stop").args(["-m", "immediate"]).status();
    }
}

#[test]
fn standby_fails_writes_as_postgresql_does_and_guards_its_sessions_once_it_is_promoted() {
    let server = Server::start(&[]);
    let db = guarded(&server);
    let mut primary = db.admin();
    refuse(&mut primary, UPDATE_ALL);
    let standby = Standby::start(&server);
    let mut client = standby.connect(&db);
    for sql in [
        UPDATE_ALL,
        "UPDATE free SET note = 'x'",
        "DELETE FROM t WHERE id = 1",
        "TRUNCATE t",
        "SET writeguard.override = on; UPDATE t SET note = 'x'",
        "SET writeguard.enabled = off; UPDATE t SET note = 'x'",
    ] {
        let refusal = expect_refusal(client.batch_execute(sql));
        assert_eq!(refusal.sqlstate, "25006", "{sql}: {refusal:?}");
        pass(&mut client, "RESET writeguard.override; RESET writeguard.enabled");
    }
    for view in ["my_events", "my_requests", "pending", "event_queue"] {
        pass(&mut client, &format!("TABLE writeguard.{view}"));
    }
    // A change on the primary is seen by a session that has the policies already.
    let limit = "SELECT value::bigint FROM writeguard.effective('public.t', 'postgres', 'update')";
    assert_eq!(number(&mut client, limit), 3);
    pass(&mut primary, "SELECT writeguard.set_policy('p', tables => '{public.t}', max_rows => 4)");
    wait_until(30, || number(&mut client, limit) == 4);
    assert_eq!((counter(&mut client, "waiting"), counter(&mut client, "late")), (0, 0));
    assert_eq!(number(&mut client, BLOCKED), 1);
    assert!(processes(&mut client, None).is_empty() && processes(&mut client, Some(&db.name)).is_empty());

    assert!(standby.pg_ctl("promote").status().unwrap().success());
    refuse(&mut client, UPDATE_ALL);
    pass(&mut client, "BEGIN; UPDATE t SET note = 'x' WHERE id <= 4; ROLLBACK");
    wait_until(30, || number(&mut client, BLOCKED) == 2);
    assert_eq!(number(&mut client, "SELECT count(DISTINCT id) - count(*) FROM writeguard.event"), 0);
    assert_eq!(number(&mut primary, BLOCKED), 1);
    assert!(!standby.log().contains("reinitializing"));
}

#[test]
fn functions_that_write_fail_on_a_standby_and_in_a_read_only_transaction_as_postgresql_does() {
    let server = Server::start(&[]);
    let db = guarded(&server);
    let mut primary = db.admin();
    let request = number(&mut primary, "SELECT writeguard.request('UPDATE t SET note = 1'::text, 'tests')");
    let standby = Standby::start(&server);
    let mut failures = Vec::new();
    for mut client in [primary, standby.connect(&db)] {
        for call in [
            "set_policy('q', max_rows => 1)".to_owned(),
            "drop_policy('p')".to_owned(),
            "request('UPDATE t SET note = 1'::text, 'tests')".to_owned(),
            format!("reject({request})"),
        ] {
            let refusal = expect_refusal(client.batch_execute(&format!("BEGIN READ ONLY; SELECT writeguard.{call}")));
            pass(&mut client, "ROLLBACK");
            if refusal.sqlstate != "25006" {
                failures.push(format!("{call}: {} {}", refusal.sqlstate, refusal.message));
            }
        }
        assert_eq!(number(&mut client, "SELECT max_rows FROM writeguard.policy"), 3);
    }
    assert!(failures.is_empty(), "{failures:#?}");
}

#[test]
fn what_waits_when_a_primary_becomes_a_standby_waits_for_its_promotion() {
    let server = Server::start(&["writeguard.event_timeout = '100ms'"]);
    let db = guarded(&server);
    let all = three_wait(&db);
    server.stop("fast");
    let signal_file = server.data_dir().join("standby.signal");
    fs::write(&signal_file, "").unwrap();
    fs::set_permissions(&signal_file, fs::Permissions::from_mode(0o666)).unwrap();
    for _ in 0..2 {
        server.start_again();
        let mut client = db.admin();
        assert!(expect_refusal(client.batch_execute(UPDATE_ALL)).sqlstate == "25006");
        assert_eq!(counter(&mut client, "waiting"), 3);
        drop(client);
        server.stop("fast");
    }
    fs::remove_file(&signal_file).unwrap();
    server.start_again();
    all_are_stored_once(&server, &db, &all);
}

/// What a single-user server prints for these lines, its log included.
fn single_user(server: &Server, database: &str, lines: &str) -> String {
    let mut command = program(server, "postgres");
    command.args(["--single", "-D"]).arg(server.data_dir()).arg(database);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(lines.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{output:?}");
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

#[test]
fn single_user_server_counts_refuses_and_logs() {
    let server = Server::start(&["writeguard.event_timeout = '100ms'"]);
    let db = guarded(&server);
    let all = three_wait(&db);
    server.stop("fast");
    let printed = single_user(
        &server,
        &db.name,
        "UPDATE t SET note = 'y' WHERE id <= 3\nUPDATE t SET note = 'single' WHERE id <= 4\nTRUNCATE t\n\
         UPDATE free SET note = 'y'\n",
    );
    assert_eq!(printed.matches("exceeds the limit of 3 rows per statement").count(), 2, "{printed}");
    assert_eq!(printed.matches("pg_writeguard: write refused, policy \"p\"").count(), 2, "{printed}");
    assert!(printed.contains(r#""statement":"UPDATE t SET note = 'single' WHERE id <= 4"#), "{printed}");
    server.start_again();
    let mut client = db.admin();
    assert_eq!(number(&mut client, "SELECT count(*) FROM t WHERE note = 'y'"), 3);
    assert_eq!(number(&mut client, "SELECT count(*) FROM free WHERE note = 'y'"), 10);
    assert_eq!(number(&mut client, "SELECT count(*) FROM t WHERE note = 'single'"), 0);
    pass(&mut client, "UPDATE t SET note = NULL WHERE id <= 3");
    drop(client);
    all_are_stored_once(&server, &db, &all);
}

// Dumps.

fn dump(server: &Server, db: &Database, user: &str, file: &Path) -> Output {
    client_program(server, "pg_dump", user).args(["-Fc", "-d", &db.name, "-f"]).arg(file).output().unwrap()
}

#[test]
fn dump_is_restored_in_parallel_and_over_a_database_that_is_there() {
    let server = Server::shared();
    let db = guarded(server);
    let mut client = db.admin();
    refuse(&mut client, UPDATE_ALL);
    pass(&mut client, "SELECT writeguard.request('UPDATE t SET note = 1'::text, 'tests')");
    pass(&mut client, "SELECT writeguard.set_policy('all', max_rows => 0, override => 'never')");
    let file = server.socket_dir().join("dump-of-all");
    let output = dump(server, &db, "postgres", &file);
    assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
    let restored = server.plain_database();
    for options in [&["-j", "2"][..], &["--clean", "--if-exists"], &["--clean", "--if-exists", "--single-transaction"]]
    {
        let output = run(client_program(server, "pg_restore", "postgres")
            .args(["--exit-on-error", "-d", &restored.name])
            .args(options)
            .arg(&file));
        assert!(output.stderr.is_empty(), "{output:?}");
        let mut client = restored.admin();
        assert_eq!(number(&mut client, "SELECT count(*) FROM t"), 10);
        assert_eq!(number(&mut client, "SELECT count(*) FROM writeguard.policy"), 2);
        assert_eq!(number(&mut client, BLOCKED), 1);
        assert_eq!(number(&mut client, "SELECT count(*) FROM writeguard.request"), 1);
        refuse(&mut client, "UPDATE free SET note = 'x' WHERE id = 1");
        wait_until(30, || number(&mut client, BLOCKED) == 2);
    }
}

#[test]
fn dump_needs_no_superuser_but_the_right_to_read_all_data() {
    let server = Server::shared();
    let db = guarded(server);
    let role = db.role("dumper");
    pass(&mut db.admin(), &format!("GRANT pg_read_all_data TO {role}"));
    let file = server.socket_dir().join("dump");
    let output = dump(server, &db, &role, &file);
    assert!(output.status.success(), "{output:?}");
    let restored = server.plain_database();
    run(client_program(server, "pg_restore", "postgres").args(["--exit-on-error", "-d", &restored.name]).arg(&file));
    refuse(&mut restored.admin(), UPDATE_ALL);
}

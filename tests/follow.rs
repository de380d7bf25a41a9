//! `examples/follow-events`: each event is a line, whatever becomes of the connection, the server or the script itself.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use crate::common::limits::{number, pass};
use crate::common::{Database, Server, expect_refusal, make_directory, wait_until};
use postgres::Client;
use serde_json::Value;

/// Where a script's lines go.
struct Follower {
    process: Child,
    lines: Arc<Mutex<Vec<Value>>>,
}

impl Drop for Follower {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn script() -> Command {
    // Debian's Python, which has Debian's psycopg.
    let mut command = Command::new("/usr/bin/python3");
    command.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/follow-events"));
    command
}

fn gather(mut output: impl Read + Send + 'static) -> Arc<Mutex<Vec<Value>>> {
    let lines = Arc::new(Mutex::new(Vec::new()));
    let gathered = Arc::clone(&lines);
    thread::spawn(move || {
        let (mut text, mut bytes) = (Vec::new(), [0; 4096]);
        while let Ok(read @ 1..) = output.read(&mut bytes) {
            text.extend_from_slice(&bytes[..read]);
            while let Some(end) = text.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = text.drain(..=end).collect();
                gathered.lock().expect("lines").push(serde_json::from_slice(&line).expect("a line of JSON"));
            }
        }
    });
    lines
}

impl Follower {
    fn ids(&self) -> Vec<i64> {
        let lines = self.lines.lock().expect("lines");
        lines.iter().map(|event| event["id"].as_i64().expect("an id")).collect()
    }

    fn kill(mut self) -> Vec<i64> {
        self.process.kill().expect("kill");
        self.process.wait().expect("wait");
        self.ids()
    }
}

/// A database with a limit of ten rows on `t`, somebody under it, and a role that has pg_monitor.
struct Stage<'a> {
    server: &'a Server,
    db: Database,
    admin: Client,
    owner: String,
    monitor: String,
    directory: PathBuf,
}

impl Drop for Stage<'_> {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

impl<'a> Stage<'a> {
    fn new(server: &'a Server) -> Stage<'a> {
        let db = server.database();
        let (owner, monitor) = (db.role("owner"), db.role("monitor"));
        let mut admin = db.admin();
        pass(
            &mut admin,
            &format!(
                "GRANT pg_monitor TO {monitor};
                 CREATE TABLE public.t (id int PRIMARY KEY, v int NOT NULL DEFAULT 0);
                 INSERT INTO t SELECT generate_series(1, 100);
                 CREATE TABLE public.slow AS SELECT * FROM t;
                 ALTER TABLE t OWNER TO {owner}; ALTER TABLE slow OWNER TO {owner};
                 SELECT writeguard.set_policy('limit', tables => '{{public.*}}', max_rows => 10, override => 'flag')"
            ),
        );
        let directory = make_directory();
        Stage { server, db, admin, owner, monitor, directory }
    }

    fn connection(&self) -> String {
        let (host, port) = (self.server.socket_dir(), self.server.port());
        format!("host={} port={port} user={} dbname={}", host.display(), self.monitor, self.db.name)
    }

    fn state(&self) -> PathBuf {
        self.directory.join("state")
    }

    /// The script, connected.
    fn follow(&self, arguments: &[&str]) -> Follower {
        let mut process = script()
            .arg("--state")
            .arg(self.state())
            .args(arguments)
            .arg(self.connection())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("cannot run follow-events: scripts/prepare installs python3-psycopg");
        let lines = gather(process.stdout.take().expect("its output"));
        let mut errors = process.stderr.take().expect("its errors");
        let (mut said, mut byte) = (String::new(), [0]);
        while !said.contains("connected\n") {
            assert_eq!(errors.read(&mut byte).expect("its errors"), 1, "{said}");
            said.push(char::from(byte[0]));
        }
        thread::spawn(move || std::io::copy(&mut errors, &mut std::io::sink()));
        Follower { process, lines }
    }

    /// Waits until the script would not send that again.
    fn remembered(&self, id: i64) {
        wait_until(20, || {
            let state = std::fs::read_to_string(self.state()).expect("state");
            let state: Value = serde_json::from_str(&state).expect("JSON");
            let seen = state["seen"].as_array().is_some_and(|seen| seen.contains(&id.into()));
            seen || state["after"].as_i64().is_some_and(|after| after >= id)
        });
    }

    fn refused(&self) {
        let refusal = expect_refusal(self.db.connect(&self.owner).batch_execute("UPDATE t SET v = 1"));
        assert_eq!(refusal.sqlstate, "WG001");
    }

    /// The events that there are, in the order of their ids.
    fn stored(&mut self) -> Vec<i64> {
        let rows = self.admin.query("SELECT id FROM writeguard.event ORDER BY id", &[]).expect("events");
        rows.iter().map(|row| row.get(0)).collect()
    }
}

fn sorted(mut ids: Vec<i64>) -> Vec<i64> {
    ids.sort_unstable();
    ids
}

#[test]
fn each_event_is_a_line_as_it_is_in_the_table() {
    let mut stage = Stage::new(Server::shared());
    let follower = stage.follow(&[]);
    stage.refused();
    pass(&mut stage.db.connect(&stage.owner), "BEGIN; SET LOCAL writeguard.override = on; UPDATE t SET v = 2; COMMIT");
    wait_until(20, || follower.ids().len() == 2);
    let rows = "SELECT to_jsonb(e) FROM writeguard.event AS e WHERE kind <> 'policy_changed' ORDER BY id";
    let stored: Vec<Value> = stage.admin.query(rows, &[]).expect(rows).iter().map(|row| row.get(0)).collect();
    assert_eq!(*follower.lines.lock().expect("lines"), stored);
    assert_eq!((&stored[0]["kind"], &stored[1]["kind"]), (&"blocked".into(), &"overridden".into()));
    // Anybody may send a notification; it is nothing but a reason to look.
    pass(&mut stage.admin, r#"NOTIFY writeguard, '{"id": 1, "kind": "break_glass"}'"#);
    stage.refused();
    wait_until(20, || follower.ids().len() == 3);
    assert_eq!(follower.ids()[..], stage.stored()[1..]);
}

#[test]
fn what_happens_while_it_is_away_comes_when_it_is_back() {
    let mut stage = Stage::new(Server::shared());
    let first = stage.follow(&[]);
    stage.refused();
    wait_until(20, || first.ids().len() == 1);
    stage.remembered(first.ids()[0]);
    let mut told = first.kill();
    for _ in 0..5 {
        stage.refused();
    }
    let second = stage.follow(&[]);
    wait_until(20, || second.ids().len() == 5);
    stage.refused();
    wait_until(20, || second.ids().len() == 6);
    told.extend(second.kill());
    assert_eq!(told[..], stage.stored()[1..]);
}

/// A notification that comes together with the answer to a query is not waited for.
#[test]
fn an_event_of_the_first_moment_is_told_at_once() {
    let stage = Stage::new(Server::shared());
    let mut client = stage.db.connect(&stage.owner);
    let _ = client.batch_execute("UPDATE t SET v = 1");
    for round in 0..40 {
        let _ = std::fs::remove_file(stage.state());
        let follower = stage.follow(&[]);
        thread::sleep(Duration::from_micros(75 * round));
        let refusal = expect_refusal(client.batch_execute("UPDATE t SET v = 1"));
        assert_eq!(refusal.sqlstate, "WG001");
        wait_until(20, || follower.ids().len() == 1);
    }
}

#[test]
fn a_restart_of_the_server_loses_nothing() {
    let server = Server::start(&[]);
    let mut stage = Stage::new(&server);
    let follower = stage.follow(&[]);
    for mode in ["fast", "immediate"] {
        stage.refused();
        stage.refused();
        server.stop(mode);
        server.start_again();
        stage.admin = stage.db.admin();
        stage.refused();
        let stored = stage.stored();
        wait_until(60, || follower.ids().len() == stored.len() - 1);
        assert_eq!(follower.ids()[..], stored[1..]);
    }
}

/// An event has its number when it is written and is seen when its transaction commits.
#[test]
fn an_event_that_commits_late_is_not_left_out() {
    let mut stage = Stage::new(Server::shared());
    let follower = stage.follow(&[]);
    let mut slow = stage.db.connect(&stage.owner);
    pass(&mut slow, "BEGIN; SET LOCAL writeguard.override = on; UPDATE slow SET v = 2; PREPARE TRANSACTION 'slow'");
    for _ in 0..3 {
        stage.refused();
    }
    wait_until(20, || follower.ids().len() == 3);
    // Long enough for it to move on, if it wrongly did; and it may be started again in between.
    thread::sleep(std::time::Duration::from_secs(5));
    let mut told = follower.kill();
    let follower = stage.follow(&[]);
    stage.refused();
    wait_until(20, || follower.ids().len() == 1);
    pass(&mut slow, "COMMIT PREPARED 'slow'");
    wait_until(20, || follower.ids().len() == 2);
    told.extend(follower.ids());
    assert!(told[4] < told[0], "{told:?}");
    assert_eq!(sorted(told)[..], stage.stored()[1..]);

    // Nothing is kept in the state of what is over.
    wait_until(30, || {
        let state: Value = serde_json::from_str(&std::fs::read_to_string(stage.state()).expect("state")).expect("JSON");
        state["seen"].as_array().is_some_and(Vec::is_empty)
    });
    let follower_again = stage.follow(&[]);
    stage.refused();
    wait_until(20, || follower.ids().len() == 3);
    wait_until(20, || follower_again.ids().len() == 1);
}

#[test]
fn it_begins_with_what_happens_next() {
    let mut stage = Stage::new(Server::shared());
    stage.refused();
    let follower = stage.follow(&[]);
    stage.refused();
    wait_until(20, || !follower.ids().is_empty());
    assert_eq!(follower.ids()[..], stage.stored()[2..]);
}

#[test]
fn somebody_without_the_rights_is_told() {
    let stage = Stage::new(Server::shared());
    let connection = stage.connection().replace(&stage.monitor, &stage.owner);
    let output = script().arg(connection).output().expect("follow-events");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && said.contains("permission denied") && !said.contains("Traceback"), "{said}");
}

/// Reads one request and answers it; gives its body.
fn serve(stream: &mut TcpStream, status: &str) -> String {
    let (mut text, mut bytes) = (Vec::new(), [0; 4096]);
    loop {
        let read = stream.read(&mut bytes).expect("a request");
        text.extend_from_slice(&bytes[..read]);
        let request = String::from_utf8_lossy(&text).into_owned();
        if let Some((head, body)) = request.split_once("\r\n\r\n") {
            let length = head.lines().find_map(|line| line.strip_prefix("Content-Length: ")).expect("a length");
            if body.len() == length.parse::<usize>().expect("a number") {
                assert!(head.starts_with("POST /hook ") && head.contains("application/x-ndjson"), "{head}");
                write!(stream, "HTTP/1.1 {status}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n").expect("answer");
                return body.to_owned();
            }
        }
        assert!(read > 0, "{request}");
    }
}

#[test]
fn lines_are_posted_until_somebody_takes_them() {
    let mut stage = Stage::new(Server::shared());
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let url = format!("http://127.0.0.1:{}/hook", listener.local_addr().expect("an address").port());
    let follower = stage.follow(&["--post", &url]);
    stage.refused();
    let (mut stream, _) = listener.accept().expect("a connection");
    let refused = serve(&mut stream, "503 Service Unavailable");
    drop(stream);
    let (mut stream, _) = listener.accept().expect("a connection");
    let taken = serve(&mut stream, "204 No Content");
    drop(stream);
    assert_eq!(refused, taken);
    let event: Value = serde_json::from_str(&taken).expect("a line");
    assert_eq!(event["id"].as_i64(), stage.stored().last().copied());
    assert_eq!(number(&mut stage.admin, "SELECT count(*) FROM writeguard.event WHERE kind = 'blocked'"), 1);
    assert!(follower.ids().is_empty());
}

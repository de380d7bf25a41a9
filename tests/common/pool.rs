//! PgBouncer in front of a test server.

use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use postgres::{Client, Config, NoTls};

use crate::common::approvals::Stage;
use crate::common::{Server, make_directory, server_command, wait_until};

/// PgBouncer with one connection to the server for each user, so that clients of a user have to share it.
pub struct Pool {
    process: Child,
    directory: PathBuf,
    pub port: u16,
}

pub const POOL_PORT: u16 = 6432;

fn program() -> &'static str {
    ["/usr/sbin/pgbouncer", "/usr/bin/pgbouncer", "/usr/local/bin/pgbouncer"]
        .into_iter()
        .find(|path| Path::new(path).exists())
        .expect("no pgbouncer: run `make prepare`")
}

/// PgBouncer keeps prepared statements for clients that share a connection since 1.21.
pub fn pool_keeps_prepared_statements() -> bool {
    let output = Command::new(program()).arg("--version").output().expect("cannot run pgbouncer");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let version = text.split_whitespace().nth(1).unwrap_or_default();
    let mut numbers = version.split('.').map(|number| number.parse::<u32>().unwrap_or(0));
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    assert!(version.0 > 0, "pgbouncer does not tell its version: {text}");
    version >= (1, 21)
}

impl Pool {
    /// `mode` is `session`, `transaction` or `statement`; `settings` are further lines for the section `pgbouncer`.
    pub fn start(stage: &Stage, mode: &str, settings: &[&str]) -> Pool {
        Pool::start_on(stage, mode, settings, POOL_PORT)
    }

    /// For drivers, which may have several connections, and not know sockets of the file system.
    pub fn start_for_drivers(stage: &Stage, mode: &str) -> Pool {
        let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let mut settings = vec![
            "listen_addr = 127.0.0.1",
            "default_pool_size = 5",
            // JDBC's, which the pool does not keep apart for its clients.
            "ignore_startup_parameters = extra_float_digits",
        ];
        if pool_keeps_prepared_statements() {
            settings.push("max_prepared_statements = 100");
        }
        Pool::start_on(stage, mode, &settings, free)
    }

    fn start_on(stage: &Stage, mode: &str, settings: &[&str], port: u16) -> Pool {
        let server = Server::shared();
        let directory = make_directory();
        let file = |name: &str| directory.join(name).display().to_string();
        let configuration = format!(
            "[databases]\n* = host={} port={}\n[pgbouncer]\npool_mode = {mode}\ndefault_pool_size = 1\n\
             listen_port = {port}\nunix_socket_dir = {}\nauth_type = trust\nauth_file = {}\nlogfile = {}\npidfile = {}\n{}\n",
            server.socket_dir().display(),
            server.port(),
            directory.display(),
            file("users"),
            file("log"),
            file("pid"),
            settings.join("\n"),
        );
        fs::write(file("ini"), configuration).unwrap();
        fs::write(file("users"), format!("\"{}\" \"\"\n\"{}\" \"\"\n", stage.requester, stage.approver)).unwrap();
        for name in ["ini", "users"] {
            let status = Command::new("chmod").args(["644", &file(name)]).status().unwrap();
            assert!(status.success());
        }
        let mut command = server_command(program());
        let process = command.arg("-q").arg(file("ini")).stderr(Stdio::null()).spawn().unwrap();
        let pool = Pool { process, directory, port };
        wait_until(20, || pool.config(&stage.requester, &stage.db.name).connect(NoTls).is_ok());
        pool
    }

    pub fn directory(&self) -> &Path {
        &self.directory
    }

    pub fn config(&self, user: &str, database: &str) -> Config {
        let mut config = Config::new();
        config.host_path(&self.directory).port(self.port).user(user).dbname(database);
        config
    }

    /// A client of the requester's.
    pub fn connect(&self, stage: &Stage) -> Client {
        self.config(&stage.requester, &stage.db.name).connect(NoTls).unwrap()
    }

    /// A client of the approver's: another database user.
    pub fn connect_other_user(&self, stage: &Stage) -> Client {
        self.config(&stage.approver, &stage.db.name).connect(NoTls).unwrap()
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        // Not through what started it for another user, which would wait two seconds after it. And at once: newer
        // ones would wait for their clients.
        match fs::read_to_string(self.directory.join("pid")) {
            Ok(pid) => drop(Command::new("kill").args(["-KILL", pid.trim()]).status()),
            Err(_) => drop(self.process.kill()),
        }
        let _ = self.process.wait();
        let _ = fs::remove_dir_all(&self.directory);
    }
}

/// The server's process behind a client of the pool.
pub fn backend(client: &mut Client) -> String {
    shown(client, "SELECT pg_backend_pid()")
}

/// The one value that a query gives, without a prepared statement that a pool might lose.
#[track_caller]
pub fn shown(client: &mut Client, sql: &str) -> String {
    match &client.simple_query(sql).unwrap()[..] {
        [.., postgres::SimpleQueryMessage::Row(row), _] => row.get(0).unwrap().to_owned(),
        other => panic!("{other:?}"),
    }
}

//! The harness of the integration tests: private PostgreSQL servers with the
//! extension preloaded, databases and roles in them, and errors as values.
//!
//! `PGWG_BIN` names the directory of the private server's programs, as
//! `scripts/install-private` prints it. Started by root, the servers run as the
//! user in `PGWG_RUNAS` (default: `postgres` or else `nobody`), because PostgreSQL
//! refuses to run as root.
//!
//! A server belongs to the test process: it is stopped and its directory removed
//! however the process ends, by a helper that waits on a pipe for that end.
//!
//! `scripts/test-assert` runs tests on slower servers, and tells them so: `PGWG_POSTGRES` is run in place of the
//! server's own program (valgrind, around it), `PGWG_SETTING` is set in each database with the extension,
//! `PGWG_PATIENCE` multiplies what tests wait for, and in `PGWG_LOGS` the servers' logs stay.

pub mod approvals;
pub mod bytes;
pub mod c;
pub mod kept;
pub mod limits;
pub mod pool;
pub mod raw;
pub mod session;

use std::ffi::{OsStr, c_int};
use std::fs;
use std::io::Write;
use std::net::TcpListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant};

use postgres::error::ErrorPosition;
use postgres::{Client, Config, NoTls};

// SAFETY: both are as the C library declares them and take no pointer but atexit's
// function, which lives as long as the program.
unsafe extern "C" {
    safe fn geteuid() -> u32;
    safe fn atexit(function: extern "C" fn()) -> c_int;
}

/// How much longer than on an ordinary server things may take: at least 1.
pub fn patience() -> u32 {
    static PATIENCE: OnceLock<u32> = OnceLock::new();
    *PATIENCE.get_or_init(|| match std::env::var("PGWG_PATIENCE") {
        Ok(factor) => factor.parse().expect("PGWG_PATIENCE is a number"),
        Err(_) if asserting() => 3,
        Err(_) => 1,
    })
}

/// Whether the server checks its own assertions.
pub fn asserting() -> bool {
    static ASSERTING: OnceLock<bool> = OnceLock::new();
    *ASSERTING
        .get_or_init(|| run(Command::new(bin().join("pg_config")).arg("--configure")).contains("--enable-cassert"))
}

/// What every test server is configured with; a server's own lines come after.
const CONFIGURATION: &str = "
shared_preload_libraries = 'pg_writeguard'
listen_addresses = ''
max_connections = 100
max_worker_processes = 16
max_prepared_transactions = 20
fsync = off
autovacuum = off
log_line_prefix = '%m [%p] %q%u@%d '
";

static SHARED: OnceLock<Server> = OnceLock::new();
static NEXT_NAME: AtomicU32 = AtomicU32::new(1);

extern "C" fn stop_shared() {
    if let Some(server) = SHARED.get() {
        server.remove();
    }
}

/// A running PostgreSQL server with the library preloaded.
pub struct Server {
    /// Where its programs are.
    bin: PathBuf,
    dir: PathBuf,
    port: u16,
    keeper: Mutex<Option<Child>>,
    /// A database with the extension that the others are copies of, on the shared server.
    guarded: Option<OnceLock<()>>,
}

const GUARDED: &str = "guarded";

impl Server {
    /// The server that all tests of this test binary share.
    pub fn shared() -> &'static Server {
        SHARED.get_or_init(|| {
            let mut server = Server::start(&[]);
            server.guarded = Some(OnceLock::new());
            atexit(stop_shared);
            server
        })
    }

    /// A server of its own, with further lines for postgresql.conf. It listens on its
    /// socket only, unless a line sets `listen_addresses`.
    pub fn start(extra_conf: &[&str]) -> Server {
        let dir = make_directory();
        run(server_command("cp").arg("-a").arg(template()).arg(dir.join("data")));
        Server::start_in(bin(), dir, extra_conf)
    }

    /// A server of another cluster: all others are copies of one, with its system identifier.
    pub fn start_another_cluster() -> Server {
        let dir = make_directory();
        initialize(bin(), &dir.join("data"));
        Server::start_in(bin(), dir, &[])
    }

    /// A server of the older PostgreSQL that `PGWG_OLDER_BIN` names, to be upgraded from. `scripts/test-all` names 15 for
    /// the tests on 17; elsewhere the older server is of the same version, which pg_upgrade takes as well.
    pub fn start_older() -> Server {
        let older = std::env::var_os("PGWG_OLDER_BIN").map_or_else(|| bin().to_owned(), PathBuf::from);
        let dir = make_directory();
        initialize(&older, &dir.join("data"));
        Server::start_in(&older, dir, &[])
    }

    /// A new server made of this one, which stays stopped, by pg_upgrade.
    pub fn upgraded(&self) -> Server {
        let dir = make_directory();
        initialize(bin(), &dir.join("data"));
        let mut conf =
            fs::OpenOptions::new().append(true).open(dir.join("data/postgresql.conf")).expect("its configuration");
        conf.write_all(CONFIGURATION.as_bytes()).expect("cannot write postgresql.conf");
        self.drop_stamps();
        self.stop("fast");
        let mut upgrade = server_command(bin().join("pg_upgrade"));
        upgrade.current_dir(&dir).args(["-U", "postgres", "-b"]).arg(&self.bin).arg("-B").arg(bin());
        upgrade.arg("-d").arg(self.data_dir()).arg("-D").arg(dir.join("data")).arg("-s").arg(&dir);
        // It says on its standard output and in its logs what is wrong.
        let output = upgrade.output().expect("cannot run pg_upgrade");
        if !output.status.success() {
            let logs = "grep -h -B3 -A4 -e error: -e ERROR -e FATAL -e PANIC data/pg_upgrade_output.d/*/log/*.log | cut -c1-400 || true";
            let logs = run(server_command("sh").current_dir(&dir).args(["-c", logs]));
            panic!("{}\n{logs}", String::from_utf8_lossy(&output.stdout));
        }
        Server::start_in(bin(), dir, &[])
    }

    /// Some builds of 15 stamp the columns of every table with an option of their own, which no other server knows:
    /// pg_upgrade fails on it, whatever the table.
    fn drop_stamps(&self) {
        let databases = "SELECT datname FROM pg_database WHERE datallowconn";
        for row in self.postgres().query(databases, &[]).expect("its databases") {
            let sql = r"UPDATE pg_attribute SET attoptions = nullif(
                            ARRAY(SELECT o FROM unnest(attoptions) AS o WHERE o NOT LIKE 'pg\_attver=%'), '{}')
                        WHERE attrelid >= 16384 AND attoptions::text LIKE '%pg\_attver=%'";
            self.existing(row.get(0)).admin().batch_execute(sql).expect("cannot drop stamps");
        }
    }

    /// A new server started from a base backup of this one; with `-R` among the options, its standby.
    pub fn restored(&self, options: &[&str]) -> Server {
        let dir = make_directory();
        run(self
            .client_program("pg_basebackup")
            .args(["-c", "fast", "--no-sync"])
            .args(options)
            .arg("-D")
            .arg(dir.join("data")));
        Server::start_in(&self.bin, dir, &[])
    }

    /// This server's connection to a database, as another server's `primary_conninfo` or CREATE SUBSCRIPTION has it.
    pub fn address(&self, database: &str) -> String {
        format!("host={} port={} user=postgres dbname={database}", self.dir.display(), self.port)
    }

    fn start_in(bin: &Path, dir: PathBuf, extra_conf: &[&str]) -> Server {
        let data = dir.join("data");

        let port = if extra_conf.iter().any(|line| line.starts_with("listen_addresses")) { free_port() } else { 5432 };
        let mut conf = fs::read_to_string(data.join("postgresql.conf")).expect("postgresql.conf");
        conf += CONFIGURATION;
        conf += &format!("port = {port}\nunix_socket_directories = '{}'\n", dir.display());
        // Where storing an event takes that long.
        if patience() >= 10 {
            conf += &format!("writeguard.event_timeout = '{}s'\n", patience());
        }
        for line in extra_conf {
            conf += line;
            conf.push('\n');
        }
        fs::write(data.join("postgresql.conf"), conf).expect("cannot write postgresql.conf");

        let keeper = Mutex::new(Some(keeper(bin, &dir)));
        let server = Server { bin: bin.to_owned(), dir, port, keeper, guarded: None };
        server.start_again();
        server
    }

    /// Stops the server (`smart`, `fast` or `immediate`); its data stays.
    pub fn stop(&self, mode: &str) {
        run(self.pg_ctl("stop").args(["-m", mode]));
    }

    /// Starts a stopped server again.
    pub fn start_again(&self) {
        assert!(self.try_start().is_ok(), "the server does not start:\n{}", self.log());
    }

    /// The same where it may fail; what pg_ctl says then.
    pub fn try_start(&self) -> Result<(), String> {
        let output = self.pg_ctl("start").output().expect("cannot run pg_ctl");
        if output.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&output.stderr).into_owned()) }
    }

    /// Stops the server in fast mode and starts it again.
    pub fn restart(&self) {
        self.stop("fast");
        self.start_again();
    }

    /// Whether the server was built with `libxml` or `icu`: Debian's are, that of a wheel is not.
    pub fn is_built_with(&self, library: &str) -> bool {
        let sql = "SELECT setting ~ ('--with-' || $1::text) FROM pg_catalog.pg_config() WHERE name = 'CONFIGURE'";
        self.postgres().query_one(sql, &[&library]).expect("the server's configuration").get(0)
    }

    /// The whole server log so far.
    pub fn log(&self) -> String {
        let bytes = fs::read(self.dir.join("log")).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    pub fn data_dir(&self) -> PathBuf {
        self.dir.join("data")
    }

    pub fn socket_dir(&self) -> PathBuf {
        self.dir.clone()
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// A new database with the extension in it.
    pub fn database(&self) -> Database {
        let database = match &self.guarded {
            Some(guarded) => {
                guarded.get_or_init(|| self.make_guarded());
                self.create_database(&format!("TEMPLATE {GUARDED} STRATEGY file_copy"))
            }
            None => {
                let database = self.plain_database();
                create_extension(&database);
                database
            }
        };
        if let Ok(setting) = std::env::var("PGWG_SETTING") {
            let sql = format!("ALTER DATABASE {} SET {setting}", database.name);
            database.admin().batch_execute(&sql).expect("a setting");
        }
        database
    }

    /// Copying it takes a third of the time of CREATE DATABASE and CREATE EXTENSION. Nobody may connect, neither a
    /// background worker, because nobody may be connected to what is copied.
    fn make_guarded(&self) {
        let mut postgres = self.postgres();
        postgres.batch_execute(&format!("CREATE DATABASE {GUARDED}")).expect("cannot create a database");
        create_extension(&self.existing(GUARDED));
        let close = format!("ALTER DATABASE {GUARDED} ALLOW_CONNECTIONS false");
        postgres.batch_execute(&close).expect("cannot close a database");
    }

    /// A new database without the extension.
    pub fn plain_database(&self) -> Database {
        self.create_database("")
    }

    fn create_database(&self, options: &str) -> Database {
        let name = format!("test_{}", next_name());
        let sql = format!("CREATE DATABASE {name} {options}");
        self.postgres().batch_execute(&sql).unwrap_or_else(|error| panic!("{sql}: {:?}", Refusal::of(&error)));
        Database { name, socket_dir: self.socket_dir(), port: self.port }
    }

    /// A database that is there already, such as one that came with a backup.
    pub fn existing(&self, name: &str) -> Database {
        Database { name: name.to_owned(), socket_dir: self.socket_dir(), port: self.port }
    }

    /// A superuser's connection to the database `postgres`.
    pub fn postgres(&self) -> Client {
        config(&self.dir, self.port, "postgres", "postgres")
            .connect(NoTls)
            .expect("cannot connect to database postgres")
    }

    /// What psql prints, errors included, for a script given on its standard input.
    pub fn psql(&self, db: &str, user: &str, sql: &str) -> String {
        let mut command = Command::new("sh");
        command
            .args(["-c", r#"exec "$@" 2>&1"#, "sh"])
            .arg(bin().join("psql"))
            .args(["-X", "-q", "-d", db, "-U", user, "-p", &self.port.to_string(), "-h"])
            .arg(&self.dir);
        forget_environment(&mut command);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("cannot run psql");
        let mut stdin = child.stdin.take().expect("psql's standard input");
        let sql = sql.to_owned();
        // A thread: psql may wait for us to read what it prints before it reads on.
        // It may also end early (\q), so a failed write is no failure.
        let writer = std::thread::spawn(move || drop(stdin.write_all(sql.as_bytes())));
        let output = child.wait_with_output().expect("psql's output");
        writer.join().expect("writing to psql");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// What psql prints, errors included, and whether it succeeded, when it is called with these arguments.
    pub fn psql_with(&self, db: &str, user: &str, arguments: &[&str]) -> (String, bool) {
        let mut command = Command::new("sh");
        command
            .args(["-c", r#"exec "$@" 2>&1"#, "sh"])
            .arg(bin().join("psql"))
            .args(["-X", "-q", "-d", db, "-U", user, "-p", &self.port.to_string(), "-h"])
            .arg(&self.dir)
            .args(arguments);
        forget_environment(&mut command);
        let output = command.stdin(Stdio::null()).output().expect("cannot run psql");
        (String::from_utf8_lossy(&output.stdout).into_owned(), output.status.success())
    }

    /// A client program of the private server with this server's address, for the superuser; run as the server's user.
    pub fn client_program(&self, name: &str) -> Command {
        let mut command = server_command(self.bin.join(name));
        command.args(["-U", "postgres", "-p", &self.port.to_string(), "-h"]).arg(&self.dir);
        command
    }

    fn pg_ctl(&self, action: &str) -> Command {
        let mut command = server_command(self.bin.join("pg_ctl"));
        command.args([action, "-s", "-w", "-t", &(60 * patience()).to_string(), "-D"]).arg(self.data_dir());
        if action == "start" {
            command.arg("-l").arg(self.dir.join("log"));
            if let Some(program) = std::env::var_os("PGWG_POSTGRES") {
                command.arg("-p").arg(program);
            }
        }
        command
    }

    fn remove(&self) {
        let mut keeper = self.keeper.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Some(mut keeper) = keeper.take() {
            // Closes the pipe that the keeper waits on.
            drop(keeper.stdin.take());
            let _ = keeper.wait();
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.remove();
    }
}

/// A database of a test server. It stays until the server goes, or `drop`.
pub struct Database {
    pub name: String,
    socket_dir: PathBuf,
    port: u16,
}

impl Database {
    /// A superuser's connection.
    pub fn admin(&self) -> Client {
        self.connect("postgres")
    }

    pub fn connect(&self, user: &str) -> Client {
        self.config(user).connect(NoTls).unwrap_or_else(|error| panic!("{user} cannot connect: {error:?}"))
    }

    /// A connection with options as in `PGOPTIONS`, such as `-c work_mem=1MB`.
    pub fn connect_with(&self, user: &str, options: &str) -> Client {
        self.config(user)
            .options(options)
            .connect(NoTls)
            .unwrap_or_else(|error| panic!("{user} cannot connect with {options}: {error:?}"))
    }

    /// For a connection with other settings, such as an application name.
    pub fn config(&self, user: &str) -> Config {
        config(&self.socket_dir, self.port, user, &self.name)
    }

    /// A new role that may log in, with a name that no other test has.
    pub fn role(&self, prefix: &str) -> String {
        let name = format!("{prefix}_{}", next_name());
        self.admin().batch_execute(&format!("CREATE ROLE \"{name}\" LOGIN")).expect("cannot create a role");
        name
    }

    /// Drops the database, with whoever is still connected to it.
    pub fn drop(self) {
        config(&self.socket_dir, self.port, "postgres", "postgres")
            .connect(NoTls)
            .and_then(|mut client| client.batch_execute(&format!("DROP DATABASE {} WITH (FORCE)", self.name)))
            .expect("cannot drop the database");
    }
}

/// The fields of a server's error. What the server did not send is empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    pub sqlstate: String,
    pub message: String,
    pub detail: String,
    pub hint: String,
    pub schema: String,
    pub table: String,
    pub constraint: String,
    /// The CONTEXT lines.
    pub context: String,
    /// The cursor position in the statement sent, counted in characters from 1.
    pub position: Option<u32>,
}

impl Refusal {
    #[track_caller]
    pub fn of(error: &postgres::Error) -> Refusal {
        let Some(error) = error.as_db_error() else {
            panic!("not an error of the server: {error:?}");
        };
        let text = |field: Option<&str>| field.unwrap_or_default().to_owned();
        Refusal {
            sqlstate: error.code().code().to_owned(),
            message: error.message().to_owned(),
            detail: text(error.detail()),
            hint: text(error.hint()),
            schema: text(error.schema()),
            table: text(error.table()),
            constraint: text(error.constraint()),
            context: text(error.where_()),
            position: match error.position() {
                Some(ErrorPosition::Original(position)) => Some(*position),
                _ => None,
            },
        }
    }

    /// The event that ends the message, where one does.
    pub fn event(&self) -> Option<i64> {
        self.message.strip_suffix(')')?.rsplit_once(" (event ")?.1.parse().ok()
    }

    /// The message without its event.
    pub fn said(&self) -> &str {
        self.event().map_or(&self.message, |event| self.message.trim_end_matches(&format!(" (event {event})")))
    }
}

/// The error of a statement that has to fail.
#[track_caller]
pub fn expect_refusal<T: std::fmt::Debug>(result: Result<T, postgres::Error>) -> Refusal {
    match result {
        Ok(value) => panic!("expected to be refused, but it passed with {value:?}"),
        Err(error) => Refusal::of(&error),
    }
}

/// Waits until the condition holds; fails after that many seconds, or more on a slow server.
#[track_caller]
pub fn wait_until(seconds: u64, mut condition: impl FnMut() -> bool) {
    let seconds = seconds * u64::from(patience());
    let end = Instant::now() + Duration::from_secs(seconds);
    while !condition() {
        assert!(Instant::now() < end, "still not so after {seconds} s");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn create_extension(database: &Database) {
    database
        .admin()
        .batch_execute("CREATE EXTENSION pg_writeguard")
        .unwrap_or_else(|error| panic!("CREATE EXTENSION failed: {:?}", Refusal::of(&error)));
}

fn next_name() -> u32 {
    NEXT_NAME.fetch_add(1, Ordering::Relaxed)
}

fn config(socket_dir: &Path, port: u16, user: &str, db: &str) -> Config {
    let mut config = Config::new();
    config.host_path(socket_dir).port(port).user(user).dbname(db);
    config
}

fn bin() -> &'static Path {
    static BIN: OnceLock<PathBuf> = OnceLock::new();
    BIN.get_or_init(|| match std::env::var_os("PGWG_BIN") {
        Some(dir) => PathBuf::from(dir),
        None => panic!("PGWG_BIN is not set: run `make test`, or set it to what scripts/install-private prints"),
    })
}

/// The user whom servers run as, where that is not the test's own.
fn server_user() -> Option<&'static str> {
    static USER: OnceLock<Option<String>> = OnceLock::new();
    USER.get_or_init(|| {
        if geteuid() != 0 {
            return None;
        }
        std::env::var("PGWG_RUNAS").ok().or_else(|| {
            let known = Command::new("id").arg("postgres").output();
            let known = known.is_ok_and(|output| output.status.success());
            Some(if known { "postgres" } else { "nobody" }.to_owned())
        })
    })
    .as_deref()
}

/// A command that runs as the server's user.
pub fn server_command(program: impl AsRef<OsStr>) -> Command {
    let mut command = match server_user() {
        Some(user) => {
            let mut command = Command::new("runuser");
            command.args(["-u", user, "--"]).arg(program);
            command
        }
        None => Command::new(program),
    };
    // The server's user may have no access to where the test runs.
    command.current_dir("/").stdin(Stdio::null());
    forget_environment(&mut command);
    command
}

/// Results must not depend on who runs the tests and where: no PGOPTIONS and the
/// like, messages in English, no backtrace in an error's DETAIL.
fn forget_environment(command: &mut Command) {
    for (name, _) in std::env::vars_os() {
        if name.to_str().is_some_and(|name| name.starts_with("PG")) {
            command.env_remove(name);
        }
    }
    command.env_remove("RUST_BACKTRACE").env_remove("LANGUAGE").env("LC_ALL", "C");
}

/// Runs a command that has to succeed, and gives what it prints.
#[track_caller]
pub fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("cannot run {command:?}: {error}"));
    let text = |bytes| String::from_utf8_lossy(bytes).trim().to_owned();
    assert!(output.status.success(), "{command:?} failed: {}", text(&output.stderr));
    text(&output.stdout)
}

/// A new directory of the server's user, with a name short enough for a socket.
pub fn make_directory() -> PathBuf {
    let temp = std::env::temp_dir();
    let temp = if temp.as_os_str().len() > 60 { Path::new("/tmp") } else { &temp };
    PathBuf::from(run(server_command("mktemp").arg("-d").arg(temp.join(format!("pgwg-{}", "X".repeat(6))))))
}

/// A port of this machine that nobody listens on now.
pub fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("no free port");
    listener.local_addr().expect("the port's address").port()
}

fn initialize(bin: &Path, data: &Path) {
    run(server_command(bin.join("initdb"))
        .args(["-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync", "-D"])
        .arg(data));
}

/// An initialized data directory to copy, made once for each private server.
fn template() -> &'static Path {
    static TEMPLATE: OnceLock<PathBuf> = OnceLock::new();
    TEMPLATE.get_or_init(|| {
        // Another user must not be given files that only this one can read.
        let name = format!("template-{}", server_user().unwrap_or("own"));
        let template = bin().parent().expect("PGWG_BIN has a parent").join(name);
        if !template.exists() {
            let dir = make_directory();
            let data = dir.join("data");
            initialize(bin(), &data);
            // Copied beside its place first, then renamed: whoever sees the template
            // sees all of it. Losing the race against another process does no harm.
            let copy = template.with_extension(std::process::id().to_string());
            run(Command::new("cp").arg("-a").arg(&data).arg(&copy));
            if fs::rename(&copy, &template).is_err() {
                fs::remove_dir_all(&copy).expect("cannot remove a spare template");
            }
            fs::remove_dir_all(&dir).expect("cannot remove a temporary directory");
        }
        template
    })
}

/// A process that waits until its standard input ends, which happens when the
/// server is dropped and also when this process is killed; then it stops the server
/// and removes its directory.
fn keeper(bin: &Path, dir: &Path) -> Child {
    let stop = {
        let mut command = server_command(bin.join("pg_ctl"));
        command.args(["stop", "-s", "-m", "immediate", "-D"]).arg(dir.join("data"));
        command
    };
    Command::new("sh")
        .args([
            "-c",
            r#"read -r _; dir=$1; shift; "$@"
               [ -z "$PGWG_LOGS" ] || cp "$dir/log" "$PGWG_LOGS/${dir##*/}.log"
               rm -rf "$dir""#,
            "sh",
        ])
        .arg(dir)
        .arg(stop.get_program())
        .args(stop.get_args())
        .env("LC_ALL", "C")
        .current_dir("/")
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        // Not in this process's group, which an interrupt from the terminal ends.
        .process_group(0)
        .spawn()
        .expect("cannot run sh")
}

//! Clients that stop reading: whatever the library was telling them, the session ends when it is terminated and when the
//! server is shut down. Core ends so while it sends rows and warnings; not while it sends an error, which ours do.

use std::ffi::c_int;
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use crate::common::raw::{self, Raw};
use crate::common::{Database, Server, wait_until};
use postgres::Client;

/// How long a session may take to end, and the server to stop.
const SOON: Duration = Duration::from_secs(2);

/// How a client is connected.
#[derive(Debug, Clone, Copy)]
enum Way {
    Socket,
    /// With hardly any room on the client's side.
    Tcp,
}

impl Way {
    fn connect(self, server: &Server) -> UnixStream {
        match self {
            Way::Socket => raw::socket_of(server),
            Way::Tcp => {
                let stream = UnixStream::from(connect_narrowly(server.port()));
                stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
                stream
            }
        }
    }
}

/// A connection with hardly any room: the client's side takes a few kB, and its packets are so small that the server's
/// side does not grow. To read from it and to write to it is as with any other socket.
fn connect_narrowly(port: u16) -> OwnedFd {
    #[repr(C)]
    struct Address {
        family: u16,
        port: [u8; 2],
        address: [u8; 4],
        rest: [u8; 8],
    }
    unsafe extern "C" {
        fn socket(domain: c_int, kind: c_int, protocol: c_int) -> c_int;
        fn setsockopt(socket: c_int, level: c_int, option: c_int, value: *const c_int, length: u32) -> c_int;
        fn connect(socket: c_int, address: *const Address, length: u32) -> c_int;
    }
    const AF_INET: c_int = 2;
    const SOCK_STREAM: c_int = 1;
    const SOL_SOCKET: c_int = 1;
    const SO_RCVBUF: c_int = 8;
    const IPPROTO_TCP: c_int = 6;
    const TCP_MAXSEG: c_int = 2;
    let address = Address { family: AF_INET as u16, port: port.to_be_bytes(), address: [127, 0, 0, 1], rest: [0; 8] };
    // SAFETY: options and an address of their right types and sizes; the descriptor is new and nobody else's.
    unsafe {
        let socket = socket(AF_INET, SOCK_STREAM, 0);
        assert!(socket >= 0);
        for (level, option, value) in [(SOL_SOCKET, SO_RCVBUF, 4_096), (IPPROTO_TCP, TCP_MAXSEG, 536)] {
            assert_eq!(setsockopt(socket, level, option, &value, size_of::<c_int>() as u32), 0);
        }
        assert_eq!(connect(socket, &address, size_of::<Address>() as u32), 0);
        OwnedFd::from_raw_fd(socket)
    }
}

/// A client that sends queries and reads nothing of the answers, until its session waits for it.
struct Deaf {
    raw: Raw,
    pid: i32,
}

impl Deaf {
    fn new(server: &Server, way: Way, db: &Database, case: &Case) -> Deaf {
        let mut admin = db.admin();
        let mut raw = Raw::over(way.connect(server), case.user, &db.name);
        let pid = i32::from_be_bytes(raw.key[..4].try_into().unwrap());
        for query in &case.queries {
            raw.simple(query);
        }
        // The server reads no more than it answers, so sending ends no sooner than the session.
        let mut stream = raw.stream.try_clone().unwrap();
        let unsent = std::mem::take(&mut raw.unsent);
        std::thread::spawn(move || std::io::Write::write_all(&mut stream, &unsent));
        let sql = "SELECT count(*) FROM pg_stat_activity WHERE pid = $1 AND wait_event = 'ClientWrite'";
        wait_until(30, || admin.query_one(sql, &[&pid]).unwrap().get::<_, i64>(0) == 1);
        Deaf { raw, pid }
    }

    #[track_caller]
    fn ends_when_terminated(&self, admin: &mut Client) {
        assert!(admin.query_one("SELECT pg_terminate_backend($1)", &[&self.pid]).unwrap().get::<_, bool>(0));
        let started = Instant::now();
        let sql = "SELECT count(*) FROM pg_stat_activity WHERE pid = $1";
        while admin.query_one(sql, &[&self.pid]).unwrap().get::<_, i64>(0) > 0 {
            assert!(started.elapsed() < SOON, "it is still there");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

/// Something that a client is told, over and over, about the table T of its own.
struct Case {
    name: &'static str,
    user: &'static str,
    setup: String,
    queries: Vec<String>,
}

/// Commands in one string.
fn many(sql: &str) -> Vec<String> {
    vec![sql.repeat(2_000)]
}

/// As single messages: after an error the server goes on with the next.
fn many_messages(sql: &str) -> Vec<String> {
    vec![sql.to_owned(); 2_000]
}

fn cases() -> Vec<Case> {
    let case = |name, user, setup: &str, queries| Case { name, user, setup: setup.into(), queries };
    let refuses = "SELECT writeguard.set_policy('T', tables => '{T}', max_rows => 1);";
    let warns = "SELECT writeguard.set_policy('T', tables => '{T}', max_rows => 1, mode => 'warn');";
    let tells = "CREATE TRIGGER tell BEFORE UPDATE ON T FOR EACH ROW EXECUTE FUNCTION tell();";
    let update = "UPDATE T SET v = v WHERE id < 3;";
    vec![
        case("core's own", "postgres", "", vec!["DO $$ BEGIN LOOP RAISE WARNING 'here'; END LOOP; END $$".into()]),
        case("a warning", "postgres", warns, many(update)),
        case("a warning in a block", "postgres", warns, vec![format!("BEGIN; {}", many(update)[0])]),
        case("a warning of each message", "postgres", warns, many_messages(update)),
        case("a refusal", "postgres", refuses, many_messages(update)),
        case("a mistake", "postgres", "", many_messages("SELECT writeguard.set_policy('')")),
        case("what a pooled session is told", "pooled", "", many_messages("SET writeguard.override = on")),
        case(
            "broken glass",
            "postgres",
            refuses,
            many("SELECT writeguard.break_glass('UPDATE T SET v = v WHERE id < 3', 'because');"),
        ),
        case(
            "rows of a preview",
            "postgres",
            refuses,
            vec!["SELECT * FROM writeguard.preview('UPDATE T SET v = v', 1000)".into()],
        ),
        case(
            "what a preview's statement tells",
            "asker",
            &[refuses, tells].concat(),
            vec!["SELECT * FROM writeguard.preview('UPDATE T SET v = v')".into()],
        ),
        case(
            "what a request's statement tells",
            "asker",
            &[refuses, tells].concat(),
            vec!["SELECT writeguard.request('UPDATE T SET v = v', 'because')".into()],
        ),
        case(
            EXECUTION,
            "asker",
            refuses,
            vec!["SELECT * FROM writeguard.execute((SELECT id FROM writeguard.my_requests LIMIT 1))".into()],
        ),
    ]
}

const EXECUTION: &str = "rows of an execution";

/// A database with a table of 2,000 rows of 2,000 letters for each case.
fn set_up(server: &Server) -> (Database, Vec<Case>) {
    let db = server.database();
    let mut admin = db.admin();
    admin
        .batch_execute(
            "CREATE ROLE asker LOGIN; CREATE ROLE pooled LOGIN; ALTER ROLE pooled SET writeguard.pooled = on;
             CREATE FUNCTION tell() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
                 RAISE NOTICE '%', NEW.v; RETURN NEW; END $$;",
        )
        .unwrap();
    let mut cases = cases();
    for (index, case) in cases.iter_mut().enumerate() {
        let table = |sql: &str| {
            sql.replace("'T'", &format!("'t{index}'"))
                .replace(" T ", &format!(" public.t{index} "))
                .replace("{T}", &format!("{{public.t{index}}}"))
        };
        let setup = "CREATE TABLE T AS SELECT i AS id, repeat('x', 2000) AS v FROM generate_series(1, 2000) AS i;
                     ALTER TABLE T ADD PRIMARY KEY (id); GRANT ALL ON T TO asker;";
        admin.batch_execute(&table(&format!("{setup} {}", case.setup))).unwrap();
        case.queries.iter_mut().for_each(|query| *query = table(query));
        if case.name == EXECUTION {
            let ask = table("SELECT writeguard.request('UPDATE T SET v = v RETURNING *', 'because')");
            let id: i64 = db.connect("asker").query_one(&ask, &[]).unwrap().get(0);
            admin.execute("SELECT writeguard.approve($1)", &[&id]).unwrap();
        }
    }
    (db, cases)
}

fn end_all(way: Way) {
    let server = Server::start(&["listen_addresses = 'localhost'"]);
    let (db, cases) = set_up(&server);
    for case in cases {
        let deaf = Deaf::new(&server, way, &db, &case);
        println!("{way:?}: {}", case.name);
        deaf.ends_when_terminated(&mut db.admin());
    }
}

#[test]
fn whatever_they_were_told_their_sessions_end() {
    end_all(Way::Socket);
}

#[test]
fn so_they_do_over_the_network() {
    end_all(Way::Tcp);
}

#[test]
fn the_server_stops_beside_them() {
    let server = Server::start(&["listen_addresses = 'localhost'"]);
    let (db, cases) = set_up(&server);
    let ways =
        cases.iter().enumerate().map(|(index, case)| (if index % 2 == 0 { Way::Socket } else { Way::Tcp }, case));
    let deaf: Vec<Deaf> = ways.map(|(way, case)| Deaf::new(&server, way, &db, case)).collect();
    server.postgres().batch_execute("CHECKPOINT").unwrap();
    let started = Instant::now();
    server.stop("fast");
    assert!(started.elapsed() < SOON, "it took {:?} beside {} of them", started.elapsed(), deaf.len());
}

/// A client that reads late gets all that it was told, an error to the end included.
#[test]
fn a_client_that_reads_late_misses_nothing() {
    let server = Server::start(&["listen_addresses = 'localhost'"]);
    for way in [Way::Socket, Way::Tcp] {
        let db = server.database();
        let mut admin = db.admin();
        admin
            .batch_execute(
                "CREATE TABLE t AS SELECT i AS id FROM generate_series(1, 3) AS i;
                 SELECT writeguard.set_policy('p', max_rows => 1)",
            )
            .unwrap();
        let mut raw = Raw::over(way.connect(&server), "postgres", &db.name);
        for _ in 0..1_000 {
            raw.simple("UPDATE t SET id = id");
        }
        let mut stream = raw.stream.try_clone().unwrap();
        let unsent = std::mem::take(&mut raw.unsent);
        let writer = std::thread::spawn(move || std::io::Write::write_all(&mut stream, &unsent).unwrap());
        let sql = "SELECT count(*) FROM pg_stat_activity WHERE datname = $1 AND wait_event = 'ClientWrite'";
        wait_until(30, || admin.query_one(sql, &[&db.name]).unwrap().get::<_, i64>(0) == 1);
        for _ in 0..1_000 {
            assert_eq!(raw.ready().trace(), "WG001 ZI");
        }
        writer.join().unwrap();
    }
}

/// Cancelled while the client is told of something, the statement ends with that error once the client reads, and the
/// session goes on.
#[test]
fn what_is_cancelled_meanwhile_ends_when_the_client_reads() {
    let server = Server::start(&["listen_addresses = 'localhost'"]);
    let (db, cases) = set_up(&server);
    let mut admin = db.admin();
    let case = cases.iter().find(|case| case.name == "a warning").unwrap();
    let mut deaf = Deaf::new(&server, Way::Socket, &db, case);
    assert!(admin.query_one("SELECT pg_cancel_backend($1)", &[&deaf.pid]).unwrap().get::<_, bool>(0));
    let answer = deaf.raw.ready().trace();
    assert!(answer.ends_with("UPDATE:2 57014 ZI"), "{answer}");
    assert_eq!(deaf.raw.query("SELECT 1"), "T D SELECT:1 ZI");
    assert_eq!(deaf.raw.query(&case.queries[0][..case.queries[0].find(';').unwrap()]), "UPDATE:2 ZI");
}

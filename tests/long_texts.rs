//! Texts of any length in every place where somebody chooses one: they cost at most their own statement, which fails with
//! an ordinary error where it fails, and no event is lost.
//!
//! `PGWG_LONG=1` tries the longest ones in every place, otherwise only where something else happens to them.

use std::fs;
use std::io::{Read, Seek, SeekFrom};
use std::sync::{Mutex, MutexGuard};

use crate::common::{Database, Refusal, Server, expect_refusal, wait_until};
use postgres::Client;
use postgres::types::ToSql;

const SMALL: [usize; 4] = [0, 1, 64 * 1024, 1024 * 1024];
const LONGEST: usize = 200_000_000;

/// A letter that takes six in JSON.
const BAD: &str = "\u{1}";

fn wants_all() -> bool {
    std::env::var_os("PGWG_LONG").is_some()
}

/// One at a time: each has a few times the longest text in memory.
fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// A server that does not write statements to its log by itself, and a database with a table `t` of 1,000 rows, of which
/// the policy `p` allows five.
struct Stage {
    server: Server,
    db: Database,
    admin: Client,
    owner: String,
    started: String,
    /// Up to where the log was looked at.
    seen: u64,
}

impl Stage {
    fn new(policy: &str) -> Stage {
        let server = Server::start(&["log_min_error_statement = panic", "writeguard.event_timeout = '30s'"]);
        let db = server.database();
        let owner = db.role("owner");
        let mut admin = db.admin();
        admin
            .batch_execute(&format!(
                "CREATE SCHEMA k AUTHORIZATION {owner};
                 SET ROLE {owner};
                 CREATE TABLE k.t (id int PRIMARY KEY, v int NOT NULL DEFAULT 0, note text);
                 INSERT INTO k.t SELECT i, 0 FROM generate_series(1, 1000) AS i;
                 CREATE TABLE k.r (id int PRIMARY KEY);
                 RESET ROLE;
                 GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA writeguard TO {owner};
                 SELECT writeguard.set_policy('p', tables => '{{k.t}}', max_rows => 5 {policy});
                 SELECT writeguard.set_policy('r', tables => '{{k.r}}', max_rows => 5, operations => '{{update}}');"
            ))
            .expect("the setup");
        let started = started(&mut admin);
        let mut stage = Stage { server, db, admin, owner, started, seen: 0 };
        stage.new_in_log();
        stage
    }

    fn session(&self) -> Client {
        self.db.connect(&self.owner)
    }

    /// What was added to the log since the last call, as far as it is worth looking at.
    fn new_in_log(&mut self) -> String {
        let path = self.server.data_dir().parent().expect("the server's directory").join("log");
        let mut file = fs::File::open(path).expect("the log");
        file.seek(SeekFrom::Start(self.seen)).expect("seek");
        let mut bytes = Vec::new();
        self.seen += file.read_to_end(&mut bytes).expect("the log") as u64;
        assert!(bytes.len() < 50_000_000, "{} bytes were logged", bytes.len());
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Nothing worse happened than an error of one statement; gives what was logged.
    #[track_caller]
    fn is_well(&mut self, what: &str) -> String {
        assert_eq!(started(&mut self.admin), self.started, "{what}: the server was started again");
        let log = self.new_in_log();
        for bad in ["PANIC", "terminated by signal", "while in", "in this log only", "XX000"] {
            if let Some(at) = log.find(bad) {
                let from = (0..=at.saturating_sub(200)).rev().find(|at| log.is_char_boundary(*at)).unwrap_or(0);
                panic!("{what}: {}", log[from..].chars().take(1_000).collect::<String>());
            }
        }
        log
    }

    fn events(&mut self, kind: &str) -> i64 {
        common_number(&mut self.admin, &format!("SELECT count(*) FROM writeguard.event WHERE kind = '{kind}'"))
    }

    /// One more event of that kind is there than before, with a statement that is not too long and says how long it was.
    #[track_caller]
    fn has_event(&mut self, kind: &str, before: i64, length: usize) {
        wait_until(60, || self.events(kind) == before + 1);
        let sql = "SELECT octet_length(statement), statement ~ '[(][0-9]+ bytes in all[)]$' FROM writeguard.event
                   WHERE kind = $1 ORDER BY id DESC LIMIT 1";
        let row = self.admin.query_one(sql, &[&kind]).expect("the event");
        let (bytes, is_cut): (i32, bool) = (row.get(0), row.get(1));
        assert!(bytes <= 65_536 + 40, "{kind}: {bytes} bytes of {length}");
        assert_eq!(is_cut, length >= 65_536, "{kind}: {length}");
    }
}

#[track_caller]
fn common_number(client: &mut Client, sql: &str) -> i64 {
    client.query_one(sql, &[]).unwrap_or_else(|error| panic!("{sql}: {error:?}")).get(0)
}

fn started(client: &mut Client) -> String {
    client.query_one("SELECT pg_postmaster_start_time()::text", &[]).expect("the server lives").get(0)
}

fn lengths(longest: bool) -> impl Iterator<Item = usize> {
    SMALL.into_iter().chain((longest || wants_all()).then_some(LONGEST))
}

/// The SQLSTATE of a statement; 00000 where it passed.
fn sqlstate<T>(result: Result<T, postgres::Error>) -> String {
    result.err().map_or_else(
        || "00000".to_owned(),
        |error| {
            let refusal = Refusal::of(&error);
            // Core repeats a whole word that it does not know.
            let ours = refusal.sqlstate.starts_with("WG");
            for text in [&refusal.message, &refusal.detail, &refusal.hint] {
                assert!(!ours || text.len() < 200_000, "{}: {} bytes", refusal.sqlstate, text.len());
            }
            refusal.sqlstate
        },
    )
}

#[test]
fn statements_that_are_refused() {
    let _turn = turn();
    let mut stage = Stage::new("");
    for length in lengths(true) {
        let text = BAD.repeat(length);
        let before = stage.events("blocked");
        let mut client = stage.session();
        let refused = sqlstate(client.batch_execute(&format!("UPDATE k.t SET v = 1 /*{text}*/")));
        assert_eq!(refused, "WG001", "{length}");
        stage.has_event("blocked", before, length);
        if length < LONGEST || wants_all() {
            let refused = sqlstate(client.batch_execute(&format!("UPDATE k.t SET note = '{text}'; SELECT 1")));
            assert_eq!(refused, "WG001", "{length}");
            stage.has_event("blocked", before + 1, length);
            let refused = sqlstate(client.execute(&format!("DELETE FROM k.t WHERE $1 <> '{text}'"), &[&text.get(1..)]));
            assert_eq!(refused, if length == 0 { "00000" } else { "WG001" }, "{length}");
        }
        stage.is_well("refused");
    }
}

#[test]
fn statements_that_are_only_looked_at() {
    let _turn = turn();
    for (mode, kind) in [("observe", "observed"), ("warn", "warned")] {
        let mut stage = Stage::new(&format!(", mode => '{mode}'"));
        for length in lengths(mode == "observe") {
            let text = BAD.repeat(length);
            let mut client = stage.session();
            let before = stage.events(kind);
            assert_eq!(
                sqlstate(client.batch_execute(&format!("UPDATE k.t SET v = 1 /*{text}*/"))),
                "00000",
                "{length}"
            );
            stage.has_event(kind, before, length);
            // Told while the transaction, or a part of it, is aborted.
            let failing = format!("UPDATE k.t SET v = 1 / (id - 500) /*{text}*/");
            assert_eq!(sqlstate(client.batch_execute(&failing)), "22012", "{length}");
            stage.has_event(kind, before + 1, length);
            if length < LONGEST || wants_all() {
                client.batch_execute("BEGIN; SAVEPOINT s").expect("BEGIN");
                assert_eq!(sqlstate(client.batch_execute(&failing)), "22012", "{length}");
                client.batch_execute("ROLLBACK TO s; COMMIT").expect("COMMIT");
                stage.has_event(kind, before + 2, length);
                let caught = format!(
                    "DO $do$ BEGIN UPDATE k.t SET v = 2; UPDATE k.t SET v = 1 / (id - 500) /*{text}*/;
                     EXCEPTION WHEN division_by_zero THEN END $do$"
                );
                assert_eq!(sqlstate(client.batch_execute(&caught)), "00000", "{length}");
                stage.has_event(kind, before + 3, length);
            }
            stage.is_well(mode);
        }
    }
}

/// An event that is written when the commit is done, where an error would be a PANIC.
#[test]
fn commands_that_leave_a_policy() {
    let _turn = turn();
    let mut stage = Stage::new("");
    for length in lengths(true) {
        let text = BAD.repeat(length);
        let mut client = stage.session();
        let before = stage.events("uncovered");
        let renamed = client.batch_execute(&format!("ALTER TABLE k.r RENAME TO r3 /*{text}*/"));
        assert_eq!(sqlstate(renamed), "00000", "{length}");
        stage.has_event("uncovered", before, length);
        client.batch_execute("ALTER TABLE k.r3 RENAME TO r").expect("back again");
        if length < LONGEST || wants_all() {
            let prepared = format!("BEGIN; ALTER TABLE k.r RENAME TO r3; PREPARE TRANSACTION 'x' /*{text}*/");
            assert_eq!(sqlstate(client.batch_execute(&prepared)), "00000", "{length}");
            client.batch_execute("COMMIT PREPARED 'x'").expect("back again");
            client.batch_execute("ALTER TABLE k.r3 RENAME TO r").expect("back again");
            client
                .batch_execute(&format!("BEGIN; ALTER TABLE k.r RENAME TO r3 /*{text}*/; ROLLBACK"))
                .expect("rolled back");
            wait_until(20, || stage.events("uncovered") == before + 2);
        }
        let log = stage.is_well("uncovered");
        assert!(log.contains("DDL on a covered table that no policy limits"), "{length}");
    }
}

#[test]
fn a_thousand_of_them_in_one_transaction() {
    let _turn = turn();
    let mut stage = Stage::new("");
    let mut client = stage.session();
    let text = BAD.repeat(16 * 1024);
    let (there, back) = ("ALTER TABLE k.r RENAME TO r3", "ALTER TABLE k.r3 RENAME TO r");
    client.batch_execute("BEGIN").expect("BEGIN");
    for _ in 0..1_100 {
        client.batch_execute(&format!("{there} /*{text}*/; SAVEPOINT s; {back}; RELEASE s")).expect("renamed");
    }
    client.batch_execute("COMMIT").expect("COMMIT");
    let log = stage.is_well("a thousand");
    assert_eq!(log.matches("DDL on a covered table that no policy limits").count(), 1_000);
    assert!(log.contains("And 100 further tables in the same transaction."));
}

#[test]
fn overridden_statements() {
    let _turn = turn();
    let mut stage = Stage::new(", override => 'flag'");
    for length in lengths(false) {
        let text = BAD.repeat(length);
        let mut client = stage.session();
        let before = stage.events("overridden");
        client.batch_execute("SET writeguard.override = on").expect("SET");
        assert_eq!(sqlstate(client.batch_execute(&format!("UPDATE k.t SET v = 1 /*{text}*/"))), "00000", "{length}");
        stage.has_event("overridden", before, length);
        client.batch_execute("SET writeguard.expect_rows = 1").expect("SET");
        let before = stage.events("expectation_failed");
        let refused = sqlstate(client.batch_execute(&format!("UPDATE k.t SET v = 1 WHERE id < 3 /*{text}*/")));
        assert_eq!(refused, "WG004", "{length}");
        stage.has_event("expectation_failed", before, length);
        stage.is_well("overridden");
    }
}

#[test]
fn settings_of_the_session() {
    let _turn = turn();
    let mut stage = Stage::new("");
    for length in lengths(true) {
        for letter in [".", BAD] {
            if length == LONGEST && letter != "." {
                continue;
            }
            // The form of a JWT at least.
            let text = format!("ey{}", letter.repeat(length));
            let mut client = stage.session();
            let set = client.execute("SELECT set_config('writeguard.token', $1, false)", &[&text]);
            assert_eq!(sqlstate(set), "00000", "{length}");
            assert_eq!(sqlstate(client.batch_execute("UPDATE k.t SET v = 1")), "WG001", "{length}");
            // What was armed is over with a covered write.
            client.batch_execute("SET writeguard.override = on").expect("SET");
            let set = client.execute("SELECT set_config('writeguard.token', $1, false)", &[&text]);
            assert_eq!(sqlstate(set), "00000", "{length}");
            assert_eq!(sqlstate(client.batch_execute("UPDATE k.t SET v = 1")), "WG006", "{length}");
            let set = client.execute("SELECT set_config('application_name', $1, false)", &[&text]);
            assert_eq!(sqlstate(set), "00000", "{length}");
            let set = client.execute("SELECT set_config('search_path', $1, false)", &[&text]);
            assert_eq!(sqlstate(set), "00000", "{length}");
            let refused = sqlstate(client.batch_execute("UPDATE k.t SET v = 1"));
            assert!(["WG001", "WG006"].contains(&refused.as_str()), "{length}: {refused}");
            stage.is_well("settings");
        }
    }
}

/// What stands for a text in a call, and the text's place among other arguments.
const CALLS: [&str; 23] = [
    "SELECT writeguard.statement_hash($1)",
    "SELECT writeguard.statement_hash('x', ARRAY[$1])",
    "SELECT writeguard.request($1, 'because')",
    "SELECT writeguard.request('UPDATE k.t SET v = 1', $1)",
    "SELECT writeguard.request('UPDATE k.t SET note = $1 WHERE id < 9', 'because', ARRAY[$1])",
    "SELECT writeguard.break_glass('UPDATE k.t SET v = 1', $1)",
    "SELECT writeguard.break_glass('UPDATE k.t SET note = $1 WHERE id < 9', 'because', ARRAY[$1])",
    "SELECT count(*) FROM writeguard.preview($1)",
    "SELECT writeguard.set_policy($1, max_rows => 7)",
    "SELECT writeguard.set_policy('q', tables => ARRAY['k.t', $1])",
    "SELECT writeguard.set_policy('q', tables => ARRAY[$1 || '*.*'])",
    "SELECT writeguard.set_policy('q', roles => ARRAY[$1])",
    "SELECT writeguard.set_policy('q', application => $1, max_rows => 7)",
    "SELECT writeguard.set_policy('q', schedule => $1)",
    "SELECT writeguard.set_policy('q', operations => ARRAY[$1])",
    "SELECT writeguard.set_policy('q', mode => $1)",
    "SELECT writeguard.set_policy('q', comment => $1, max_rows => 7)",
    "SELECT writeguard.set_policy('q', approvers => $1)",
    "SELECT writeguard.drop_policy($1)",
    "SELECT count(*) FROM writeguard.import_policies(jsonb_build_array(jsonb_build_object('name', 'i', 'comment', $1::text)))",
    "SELECT writeguard.trust_key($1, 'x')",
    "SELECT writeguard.trust_key('x', '-----BEGIN PUBLIC KEY-----' || $1)",
    "SELECT writeguard.in_schedule($1, now())",
];

#[test]
fn arguments_of_functions() {
    let _turn = turn();
    let mut stage = Stage::new("");
    for call in CALLS {
        // Those that do nothing but hash, parse, store, and read a document.
        let distinct = ["statement_hash($1)", "request($1", "preview", "comment => $1, max", "import"];
        for length in lengths(distinct.iter().any(|part| call.contains(part))) {
            for letter in ["x", BAD] {
                if letter == "x" && length != 64 * 1024 && !wants_all() {
                    continue;
                }
                let text = letter.repeat(length);
                let arguments: [&(dyn ToSql + Sync); 1] = [&text];
                let mut client = if call.contains("glass") || call.contains("request") || call.contains("preview") {
                    stage.session()
                } else {
                    stage.db.admin()
                };
                let state = client.batch_execute("BEGIN").and_then(|()| client.query(call, &arguments).map(|_| ()));
                let state = sqlstate(state);
                let _ = client.batch_execute("ROLLBACK");
                let ordinary = ["00000", "WG006", "WG007", "42601", "42P01", "54000", "53200", "57014"];
                assert!(ordinary.contains(&state.as_str()), "{call} with {length} times {letter:?}: {state}");
                stage.is_well(call);
            }
        }
    }
}

/// A statement with a text, and the same text as what two people say about it.
#[test]
fn requests_from_beginning_to_end() {
    let _turn = turn();
    let mut stage = Stage::new("");
    for length in lengths(false) {
        let text = BAD.repeat(length);
        let statement = format!("UPDATE k.t SET v = 1 /*{text}*/");
        let reason = format!("because{text}");
        let mut client = stage.session();
        let ask = "SELECT writeguard.request($1, $2)";
        let id: i64 = client.query_one(ask, &[&statement, &reason]).expect("a request").get(0);
        let token: String =
            stage.admin.query_one("SELECT writeguard.approve($1, $2)", &[&id, &text]).expect("an approval").get(0);
        client.batch_execute(&format!("SET writeguard.token = '{token}'; SET writeguard.override = on")).expect("SET");
        let before = stage.events("overridden");
        assert_eq!(sqlstate(client.batch_execute(&statement)), "00000", "{length}");
        stage.has_event("overridden", before, length);
        let id: i64 = client.query_one(ask, &[&statement, &reason]).expect("a request").get(0);
        stage.admin.query("SELECT writeguard.approve($1, $2)", &[&id, &text]).expect("an approval");
        assert_eq!(sqlstate(client.query("SELECT * FROM writeguard.execute($1)", &[&id])), "00000", "{length}");
        stage.has_event("overridden", before + 1, length);
        let id: i64 = client.query_one(ask, &[&statement, &reason]).expect("a request").get(0);
        assert_eq!(sqlstate(stage.admin.query("SELECT writeguard.reject($1, $2)", &[&id, &text])), "00000", "{length}");
        stage.is_well("requests");
    }
}

/// An approved statement, with a parameter, is known by all of it.
#[test]
fn a_long_statement_is_known_by_its_last_letter() {
    let _turn = turn();
    let stage = &mut Stage::new("");
    let text = "x".repeat(1024 * 1024);
    let statement = format!("UPDATE k.t SET note = $1 WHERE id < 9 /*{text}*/");
    let mut client = stage.session();
    let ask = "SELECT writeguard.request($1, 'because', ARRAY[$2])";
    let id: i64 = client.query_one(ask, &[&statement, &text]).expect("a request").get(0);
    let token: String = stage.admin.query_one("SELECT writeguard.approve($1)", &[&id]).expect("approved").get(0);
    let arm = format!("SET writeguard.token = '{token}'; SET writeguard.override = on");
    let almost = (format!("UPDATE k.t SET note = $1 WHERE id < 9 /*{text}y*/"), format!("{text}y"));
    for (statement, value, wanted) in
        [(&almost.0, &text, "WG006"), (&statement, &almost.1, "WG006"), (&statement, &text, "00000")]
    {
        client.batch_execute(&arm).expect("SET");
        assert_eq!(sqlstate(client.execute(statement, &[value])), wanted);
    }
    stage.is_well("known");
}

/// Short as they are written, and long as they print.
#[test]
fn parameters_that_print_at_length() {
    let _turn = turn();
    let stage = &mut Stage::new("");
    let mut client = stage.session();
    let sql = "SELECT writeguard.request('UPDATE k.t SET v = 1 WHERE $1::numeric[] IS NOT NULL', 'because', ARRAY[$1])";
    for (values, wanted) in [(10, "00000"), (2_000, "WG007")] {
        let value = format!("{{{}}}", vec!["1e10000"; values].join(","));
        assert_eq!(sqlstate(client.query(sql, &[&value])), wanted, "{values}");
        stage.is_well("printed");
    }
}

/// A hint shows what can be pasted, or the number of the event that has it.
#[test]
fn hints_stay_short() {
    let _turn = turn();
    let stage = &mut Stage::new("");
    for (length, by_event) in [(100, false), (10_000, true), (100_000, false)] {
        let mut client = stage.session();
        let statement = format!("UPDATE k.t SET v = 1 /*{}*/", "x".repeat(length));
        let refusal = expect_refusal(client.batch_execute(&statement));
        let hint = &refusal.hint;
        assert!(hint.len() < 8_300, "{}", hint.len());
        if by_event || length == 100 {
            assert!(hint.contains("request(event => "), "{hint}");
        } else {
            assert!(hint.contains("request('…'"), "{hint}");
        }
        let refusal = expect_refusal(client.execute(&format!("{statement} WHERE id > $1"), &[&0]));
        assert_eq!(refusal.hint.contains(&statement), length == 100, "{}", refusal.hint.len());
    }
}

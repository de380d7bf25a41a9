//! Approvals under concurrency and failure: decisions that meet each other or a use, crashes, prepared transactions, many
//! requests at once, and what the retention deletes.

use std::thread::{self, JoinHandle};

use crate::common::session::{arm, pass, refused, text};
use crate::common::{Database, Refusal, Server, expect_refusal, wait_until};
use postgres::Client;

const WRITE: &str = "UPDATE t SET a = 9";

/// A table `t` of five rows that the policy `p` limits to three, a requester, and two people who may decide.
struct Stage {
    db: Database,
    admin: Client,
    requester: String,
    people: [String; 2],
}

impl Stage {
    fn new(arguments: &str) -> Stage {
        Stage::on(Server::shared(), arguments)
    }

    fn on(server: &Server, arguments: &str) -> Stage {
        let db = server.database();
        let mut admin = db.admin();
        let requester = db.role("requester");
        let people = [db.role("anna"), db.role("bert")];
        let comma = if arguments.is_empty() { "" } else { ", " };
        pass(
            &mut admin,
            &format!(
                "CREATE TABLE t (id int PRIMARY KEY, a int NOT NULL DEFAULT 0);
                 INSERT INTO t SELECT generate_series(1, 5); GRANT ALL ON t TO PUBLIC;
                 GRANT EXECUTE ON FUNCTION writeguard.approve, writeguard.reject, writeguard.revoke TO {0}, {1};
                 GRANT SELECT ON writeguard.pending TO {0}, {1};
                 SELECT writeguard.set_policy('p', tables => '{{public.t}}', max_rows => 3{comma}{arguments})",
                people[0], people[1]
            ),
        );
        Stage { db, admin, requester, people }
    }

    fn anna(&self) -> Client {
        self.db.connect(&self.people[0])
    }

    fn bert(&self) -> Client {
        self.db.connect(&self.people[1])
    }

    fn requester(&self) -> Client {
        self.db.connect(&self.requester)
    }

    #[track_caller]
    fn request(&self) -> i64 {
        request(&mut self.requester())
    }

    /// A request with the token that anna got for it.
    #[track_caller]
    fn approved(&self) -> (i64, String) {
        let id = self.request();
        (id, approve(&mut self.anna(), id).unwrap().unwrap())
    }

    fn armed(&self, token: &str) -> Client {
        let mut client = self.requester();
        arm(&mut client, token);
        client
    }

    #[track_caller]
    fn state(&mut self, id: i64) -> String {
        text(&mut self.admin, &format!("SELECT state FROM writeguard.request WHERE id = {id}"))
    }

    #[track_caller]
    fn changed(&mut self) -> i64 {
        number(&mut self.admin, "SELECT count(*) FROM t WHERE a = 9")
    }

    /// Lets a session run a call that has to wait for a lock, and gives it back when it waits.
    #[track_caller]
    fn waiting(
        &mut self,
        mut client: Client,
        call: String,
    ) -> JoinHandle<(Result<Option<String>, postgres::Error>, Client)> {
        let pid: i32 = client.query_one("SELECT pg_backend_pid()", &[]).unwrap().get(0);
        let thread = thread::spawn(move || {
            let result = client.simple_query(&call).map(|messages| {
                messages.iter().find_map(|message| match message {
                    postgres::SimpleQueryMessage::Row(row) => row.get(0).map(str::to_owned),
                    _ => None,
                })
            });
            (result, client)
        });
        wait_until(20, || {
            let sql = "SELECT count(*) FROM pg_stat_activity WHERE pid = $1 AND wait_event_type = 'Lock'";
            self.admin.query_one(sql, &[&pid]).unwrap().get::<_, i64>(0) == 1
        });
        thread
    }
}

#[track_caller]
fn number(client: &mut Client, sql: &str) -> i64 {
    client.query_one(sql, &[]).unwrap_or_else(|error| panic!("{sql}: {:?}", Refusal::of(&error))).get(0)
}

#[track_caller]
fn request(client: &mut Client) -> i64 {
    number(client, &format!("SELECT writeguard.request('{WRITE}'::text, 'tests')"))
}

fn approve(client: &mut Client, id: i64) -> Result<Option<String>, postgres::Error> {
    client.query_one("SELECT writeguard.approve($1)", &[&id]).map(|row| row.get(0))
}

// ---- Decisions that meet ----

#[test]
fn a_revoke_waits_for_the_approval_and_ends_it() {
    let mut stage = Stage::new("");
    let id = stage.request();
    let mut anna = stage.anna();
    pass(&mut anna, "BEGIN");
    let token = approve(&mut anna, id).unwrap().unwrap();
    let bert = stage.bert();
    let waiting = stage.waiting(bert, format!("SELECT writeguard.revoke({id})"));
    pass(&mut anna, "COMMIT");
    waiting.join().unwrap().0.unwrap();
    assert_eq!(stage.state(id), "revoked");
    refused(&mut stage.armed(&token), WRITE, "WG006");
}

#[test]
fn an_approval_waits_for_the_revoke_and_fails() {
    for call in ["revoke", "reject"] {
        let mut stage = Stage::new("");
        let id = stage.request();
        let mut bert = stage.bert();
        pass(&mut bert, &format!("BEGIN; SELECT writeguard.{call}({id})"));
        let anna = stage.anna();
        let waiting = stage.waiting(anna, format!("SELECT writeguard.approve({id})"));
        pass(&mut bert, "COMMIT");
        let refusal = expect_refusal(waiting.join().unwrap().0);
        assert_eq!(refusal.sqlstate, "WG006", "{refusal:?}");
        assert!(refusal.message.contains("already re"), "{refusal:?}");
        assert_eq!(number(&mut stage.admin, "SELECT count(*) FROM writeguard.approval"), 0);
    }
}

#[test]
fn an_approval_passes_when_the_rejection_is_rolled_back() {
    let mut stage = Stage::new("");
    let id = stage.request();
    let mut bert = stage.bert();
    pass(&mut bert, &format!("BEGIN; SELECT writeguard.reject({id})"));
    let anna = stage.anna();
    let waiting = stage.waiting(anna, format!("SELECT writeguard.approve({id})"));
    pass(&mut bert, "ROLLBACK");
    let token = waiting.join().unwrap().0.unwrap().unwrap();
    pass(&mut stage.armed(&token), WRITE);
    assert_eq!((stage.state(id).as_str(), stage.changed()), ("spent", 5));
}

#[test]
fn of_two_people_at_once_the_second_gets_the_token() {
    let mut stage = Stage::new("min_approvals => 2");
    let id = stage.request();
    let (mut anna, bert) = (stage.anna(), stage.bert());
    pass(&mut anna, "BEGIN");
    assert_eq!(approve(&mut anna, id).unwrap(), None);
    let waiting = stage.waiting(bert, format!("SELECT writeguard.approve({id})"));
    pass(&mut anna, "COMMIT");
    let token = waiting.join().unwrap().0.unwrap().unwrap();
    pass(&mut stage.armed(&token), WRITE);
}

#[test]
fn with_an_older_snapshot_the_second_one_tries_again() {
    for level in ["REPEATABLE READ", "SERIALIZABLE"] {
        let mut stage = Stage::new("min_approvals => 2");
        let id = stage.request();
        let (mut anna, mut bert) = (stage.anna(), stage.bert());
        pass(&mut bert, &format!("BEGIN ISOLATION LEVEL {level}; SELECT * FROM writeguard.pending"));
        assert_eq!(approve(&mut anna, id).unwrap(), None);
        let refusal = expect_refusal(approve(&mut bert, id));
        assert_eq!(refusal.sqlstate, "40001", "{refusal:?}");
        pass(&mut bert, &format!("ROLLBACK; BEGIN ISOLATION LEVEL {level}"));
        assert!(approve(&mut bert, id).unwrap().is_some());
        pass(&mut bert, "COMMIT");
        assert_eq!(stage.state(id), "approved");
    }
}

#[test]
fn one_person_in_two_sessions_approves_once() {
    let mut stage = Stage::new("min_approvals => 2");
    let id = stage.request();
    let (mut first, second) = (stage.anna(), stage.anna());
    pass(&mut first, "BEGIN");
    assert_eq!(approve(&mut first, id).unwrap(), None);
    let waiting = stage.waiting(second, format!("SELECT writeguard.approve({id})"));
    pass(&mut first, "COMMIT");
    let refusal = expect_refusal(waiting.join().unwrap().0);
    assert_eq!(refusal.sqlstate, "WG006", "{refusal:?}");
    assert_eq!(number(&mut stage.admin, "SELECT count(*) FROM writeguard.approval"), 1);
}

#[test]
fn many_people_at_once_give_one_token() {
    let mut stage = Stage::new("min_approvals => 5");
    let people: Vec<String> = (0..12).map(|_| stage.db.role("crowd")).collect();
    for person in &people {
        pass(&mut stage.admin, &format!("GRANT EXECUTE ON FUNCTION writeguard.approve TO {person}"));
    }
    let id = stage.request();
    let sessions: Vec<Client> = people.iter().map(|person| stage.db.connect(person)).collect();
    let threads: Vec<_> =
        sessions.into_iter().map(|mut client| thread::spawn(move || approve(&mut client, id))).collect();
    let results: Vec<_> = threads.into_iter().map(|thread| thread.join().unwrap()).collect();
    let tokens = results.iter().flatten().flatten().count();
    let parts = results.iter().flatten().filter(|token| token.is_none()).count();
    let refusals: Vec<Refusal> = results.iter().filter_map(|result| result.as_ref().err()).map(Refusal::of).collect();
    assert_eq!((tokens, parts, refusals.len()), (1, 4, 7), "{refusals:?}");
    assert!(refusals.iter().all(|refusal| refusal.sqlstate == "WG006"), "{refusals:?}");
}

// ---- Decisions and uses that meet ----

#[test]
fn a_revoke_waits_for_the_write_and_finds_the_token_spent() {
    let mut stage = Stage::new("");
    let (id, token) = stage.approved();
    let mut writer = stage.requester();
    pass(&mut writer, "BEGIN");
    arm(&mut writer, &token);
    pass(&mut writer, WRITE);
    let bert = stage.bert();
    let waiting = stage.waiting(bert, format!("SELECT writeguard.revoke({id})"));
    pass(&mut writer, "COMMIT");
    let refusal = expect_refusal(waiting.join().unwrap().0);
    assert_eq!(refusal.sqlstate, "WG006", "{refusal:?}");
    assert!(refusal.message.contains("already spent"), "{refusal:?}");
    assert_eq!(stage.changed(), 5);
}

#[test]
fn a_revoke_wins_where_the_write_is_rolled_back() {
    let mut stage = Stage::new("");
    let (id, token) = stage.approved();
    let mut writer = stage.requester();
    pass(&mut writer, "BEGIN");
    arm(&mut writer, &token);
    pass(&mut writer, WRITE);
    let bert = stage.bert();
    let waiting = stage.waiting(bert, format!("SELECT writeguard.revoke({id})"));
    pass(&mut writer, "ROLLBACK");
    waiting.join().unwrap().0.unwrap();
    refused(&mut stage.armed(&token), WRITE, "WG006");
    assert_eq!((stage.state(id).as_str(), stage.changed()), ("revoked", 0));
}

#[test]
fn a_write_waits_for_the_revoke_and_is_refused() {
    let mut stage = Stage::new("");
    let (id, token) = stage.approved();
    let mut bert = stage.bert();
    pass(&mut bert, &format!("BEGIN; SELECT writeguard.revoke({id})"));
    let writer = stage.armed(&token);
    let waiting = stage.waiting(writer, WRITE.to_owned());
    pass(&mut bert, "COMMIT");
    let refusal = expect_refusal(waiting.join().unwrap().0);
    assert_eq!(refusal.sqlstate, "WG006", "{refusal:?}");
    assert!(refusal.message.contains("revoked"), "{refusal:?}");
    assert_eq!(stage.changed(), 0);
}

#[test]
fn a_policy_that_becomes_stricter_while_the_token_is_set_is_obeyed() {
    let mut stage = Stage::new("");
    let (id, token) = stage.approved();
    let mut writer = stage.requester();
    pass(&mut writer, "BEGIN");
    arm(&mut writer, &token);
    pass(&mut writer, "UPDATE t SET a = 1 WHERE id = 1");
    pass(
        &mut stage.admin,
        "SELECT writeguard.set_policy('p', tables => '{public.t}', max_rows => 3, min_approvals => 2)",
    );
    refused(&mut writer, WRITE, "WG006");
    assert_eq!(stage.state(id), "approved");
}

// ---- Crashes and prepared transactions ----

#[test]
fn approvals_outlive_a_crash() {
    let server = Server::start(&[]);
    let mut stage = Stage::on(&server, "min_approvals => 2");
    let (half, whole, uncommitted) = (stage.request(), stage.request(), stage.request());
    assert_eq!(approve(&mut stage.anna(), half).unwrap(), None);
    approve(&mut stage.anna(), whole).unwrap();
    let token = approve(&mut stage.bert(), whole).unwrap().unwrap();
    let mut anna = stage.anna();
    pass(&mut anna, "BEGIN");
    approve(&mut anna, uncommitted).unwrap();
    let mut writer = stage.requester();
    pass(&mut writer, "BEGIN");
    arm(&mut writer, &token);
    pass(&mut writer, WRITE);
    server.stop("immediate");
    server.start_again();
    stage.admin = stage.db.admin();
    assert_eq!((stage.state(whole).as_str(), stage.changed()), ("approved", 0));
    assert_eq!(approve(&mut stage.anna(), uncommitted).unwrap(), None);
    let second = approve(&mut stage.bert(), half).unwrap().unwrap();
    pass(&mut stage.armed(&token), WRITE);
    assert_eq!((stage.state(whole).as_str(), stage.changed()), ("spent", 5));
    // What was spent stays so.
    server.stop("immediate");
    server.start_again();
    stage.admin = stage.db.admin();
    refused(&mut stage.armed(&token), WRITE, "WG006");
    pass(&mut stage.armed(&second), WRITE);
}

#[test]
fn a_prepared_use_is_decided_when_its_transaction_is() {
    let server = Server::start(&[]);
    for (end, state, changed) in [("COMMIT", "spent", 5), ("ROLLBACK", "revoked", 0)] {
        let mut stage = Stage::on(&server, "");
        let (id, token) = stage.approved();
        let mut writer = stage.requester();
        pass(&mut writer, "BEGIN");
        arm(&mut writer, &token);
        pass(&mut writer, WRITE);
        pass(&mut writer, "PREPARE TRANSACTION 'use'");
        server.stop("immediate");
        server.start_again();
        stage.admin = stage.db.admin();
        let bert = stage.bert();
        let waiting = stage.waiting(bert, format!("SELECT writeguard.revoke({id})"));
        pass(&mut stage.admin, &format!("{end} PREPARED 'use'"));
        let (result, _) = waiting.join().unwrap();
        assert_eq!(result.is_ok(), state == "revoked", "{end}");
        assert_eq!((stage.state(id).as_str(), stage.changed()), (state, changed), "{end}");
        refused(&mut stage.armed(&token), WRITE, "WG006");
    }
}

#[test]
fn a_prepared_revoke_stops_the_write() {
    let mut stage = Stage::new("");
    let (id, token) = stage.approved();
    let name = format!("revoke_{}", stage.people[0]);
    pass(&mut stage.bert(), &format!("BEGIN; SELECT writeguard.revoke({id}); PREPARE TRANSACTION '{name}'"));
    let writer = stage.armed(&token);
    let waiting = stage.waiting(writer, WRITE.to_owned());
    pass(&mut stage.bert(), &format!("COMMIT PREPARED '{name}'"));
    assert_eq!(expect_refusal(waiting.join().unwrap().0).sqlstate, "WG006");
    assert_eq!(stage.changed(), 0);
}

// ---- Many ----

#[test]
fn a_thousand_pending_requests_are_no_obstacle() {
    let mut stage = Stage::new("min_approvals => 2");
    let first = stage.request();
    pass(
        &mut stage.admin,
        "INSERT INTO writeguard.request (database, login, actor, acting_as, reason, statement, statement_sha256, rows,
                                         relations, policies, expires_at, search_path)
         SELECT database, login, actor, acting_as, reason, statement, statement_sha256, rows, relations, policies,
                expires_at, search_path
         FROM writeguard.request CROSS JOIN generate_series(1, 999)",
    );
    let mut anna = stage.anna();
    pass(&mut anna, "SET statement_timeout = '20s'");
    let seen = number(
        &mut anna,
        "SELECT count(*) FROM writeguard.pending WHERE asks LIKE 'p: % of 2' AND approvals_needed = 2",
    );
    assert_eq!(seen, 1_000);
    // One approval for each, by one statement.
    let sql = "SELECT count(*) FROM (SELECT writeguard.approve(id) FROM writeguard.pending) AS a";
    assert_eq!(number(&mut anna, sql), 1_000);
    assert_eq!(number(&mut anna, "SELECT count(*) FROM writeguard.pending WHERE cardinality(approved_by) = 1"), 1_000);
    let mut bert = stage.bert();
    pass(&mut bert, "SET statement_timeout = '20s'");
    let token = approve(&mut bert, first).unwrap().unwrap();
    let id = stage.request();
    assert_eq!(approve(&mut anna, id).unwrap(), None);
    pass(&mut stage.armed(&token), WRITE);
    assert_eq!(number(&mut bert, "SELECT count(*) FROM writeguard.pending"), 1_000);
}

// ---- Retention ----

/// Events of these ages in seconds.
fn old_events(admin: &mut Client, count: i32, age: i32) {
    let sql = "INSERT INTO writeguard.event (occurred_at, kind, login, role, reason)
               SELECT now() - make_interval(secs => $2), 'blocked', 'x', 'x', 'made up' FROM generate_series(1, $1)";
    admin.execute(sql, &[&count, &f64::from(age)]).unwrap();
}

const MADE_UP: &str = "SELECT count(*) FROM writeguard.event WHERE reason = 'made up'";

#[test]
fn what_is_older_than_the_retention_goes_and_nothing_younger() {
    let server = Server::start(&["writeguard.event_retention = '1h'"]);
    let mut stage = Stage::on(&server, "");
    old_events(&mut stage.admin, 3, 3_700);
    old_events(&mut stage.admin, 4, 3_300);
    let ids: Vec<i64> = (0..8).map(|_| stage.request()).collect();
    let mut bert = stage.bert();
    pass(&mut bert, &format!("SELECT writeguard.reject({}); SELECT writeguard.reject({})", ids[0], ids[1]));
    pass(&mut bert, &format!("SELECT writeguard.revoke({})", ids[2]));
    let token = approve(&mut bert, ids[3]).unwrap().unwrap();
    pass(&mut stage.armed(&token), WRITE);
    let good = approve(&mut bert, ids[4]).unwrap().unwrap();
    let late = approve(&mut bert, ids[5]).unwrap().unwrap();
    let old = "now() - interval '2 hours'";
    for sql in [
        format!("UPDATE writeguard.request SET requested_at = {old}"),
        format!("UPDATE writeguard.request SET decided_at = {old} WHERE id IN ({}, {})", ids[0], ids[2]),
        format!("UPDATE writeguard.request SET spent_at = {old} WHERE id = {}", ids[3]),
        // Approved and asked for long ago, but expired just now.
        format!("UPDATE writeguard.request SET decided_at = {old}, expires_at = now() WHERE id = {}", ids[5]),
        format!("UPDATE writeguard.request SET expires_at = {old} WHERE id = {}", ids[6]),
    ] {
        pass(&mut stage.admin, &sql);
    }
    // Kept rows have a time of their own.
    pass(
        &mut stage.admin,
        "INSERT INTO writeguard.change_statement (changed_at, xid, login, role, kept_until)
         VALUES (now(), '1', 'x', 'x', now() - interval '1 second'), (now(), '1', 'x', 'x', now() + interval '1 hour');
         INSERT INTO writeguard.image (change, number, relation, operation, before)
         SELECT c, n, 0, 'delete', '{}' FROM generate_series(1, 2) AS c, generate_series(1, 2500) AS n;
         INSERT INTO writeguard.used_jti (key, jti, expires_at)
         VALUES ('k', 'old', now() - interval '25 hours'), ('k', 'new', now() - interval '23 hours')",
    );
    // A visit a tenth of the retention apart; the first one comes ten seconds after the start at the latest.
    pass(&mut stage.admin, "ALTER SYSTEM SET writeguard.event_retention = '59min'");
    server.restart();
    stage.admin = stage.db.admin();
    wait_until(60, || number(&mut stage.admin, MADE_UP) == 4);
    let left = "SELECT string_agg(state, ', ' ORDER BY id) FROM writeguard.request";
    wait_until(20, || text(&mut stage.admin, left) == "rejected, approved, expired, pending");
    assert_eq!(number(&mut stage.admin, "SELECT count(*) FROM writeguard.approval"), 2);
    wait_until(60, || number(&mut stage.admin, "SELECT count(*) FROM writeguard.change_statement") == 1);
    assert_eq!(number(&mut stage.admin, "SELECT count(*) FROM writeguard.image WHERE change = 1"), 0);
    assert_eq!(number(&mut stage.admin, "SELECT count(*) FROM writeguard.image WHERE change = 2"), 2_500);
    wait_until(60, || number(&mut stage.admin, "SELECT count(*) FROM writeguard.used_jti") == 1);
    assert_eq!(text(&mut stage.admin, "SELECT jti FROM writeguard.used_jti"), "new");
    refused(&mut stage.armed(&late), WRITE, "WG006");
    pass(&mut stage.armed(&good), WRITE);
    assert!(server.log().contains("whose time was over"), "{}", server.log());
}

#[test]
fn many_old_events_go_in_batches_that_hold_nobody_up() {
    let server = Server::start(&["writeguard.event_retention = 0"]);
    let mut stage = Stage::on(&server, "");
    old_events(&mut stage.admin, 4_500, 7_200);
    pass(
        &mut stage.admin,
        "CREATE TABLE batch (rows bigint);
         CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS
         $$ BEGIN INSERT INTO public.batch SELECT count(*) FROM gone HAVING count(*) > 0; RETURN NULL; END $$;
         CREATE TRIGGER note AFTER DELETE ON writeguard.event REFERENCING OLD TABLE AS gone
         FOR EACH STATEMENT EXECUTE FUNCTION note()",
    );
    // Kept for ever so far; from now on no longer than ten seconds, in all sessions, without a restart.
    pass(&mut stage.admin, "ALTER SYSTEM SET writeguard.event_retention = '10s'");
    pass(&mut stage.admin, "SELECT pg_reload_conf()");
    wait_until(60, || number(&mut stage.admin, MADE_UP) == 0);
    let (batches, most, rows): (i64, i64, i64) = {
        let row = stage.admin.query_one("SELECT count(*), max(rows), sum(rows)::bigint FROM batch", &[]).unwrap();
        (row.get(0), row.get(1), row.get(2))
    };
    assert!(batches >= 5 && most == 1_000 && rows >= 4_500, "{batches} batches, {most} at most, {rows} in all");
}

#[test]
fn a_lock_on_the_events_makes_the_pruner_leave_and_come_back() {
    let server = Server::start(&["writeguard.event_retention = '5s'"]);
    let mut stage = Stage::on(&server, "");
    let mut locker = stage.db.admin();
    pass(&mut locker, "BEGIN; LOCK TABLE writeguard.event IN SHARE MODE");
    let mut admin = stage.db.admin();
    thread::spawn(move || old_events(&mut admin, 10, 3_600));
    thread::sleep(std::time::Duration::from_secs(3));
    // It has been there and waits for nothing.
    let waiting = "SELECT count(*) FROM pg_stat_activity
                   WHERE backend_type = 'pg_writeguard pruner' AND wait_event_type = 'Lock'";
    assert_eq!(number(&mut stage.admin, waiting), 0);
    pass(&mut locker, "COMMIT");
    let old = "SELECT count(*) FROM writeguard.event WHERE occurred_at < now() - interval '30 minutes'";
    wait_until(30, || number(&mut stage.admin, old) == 0);
    assert!(!server.log().contains("own statement failed"), "{}", server.log());
}

#[test]
fn the_pruner_stands_in_nobodys_way() {
    let server = Server::start(&["writeguard.event_retention = '1s'"]);
    // Some databases without the extension, which are left alone after one look.
    let plain: Vec<Database> = (0..3).map(|_| server.plain_database()).collect();
    let mut postgres = server.postgres();
    for round in 0..6 {
        let stage = Stage::on(&server, "");
        refused(&mut stage.requester(), WRITE, "WG001");
        let Stage { db, admin, .. } = stage;
        drop(admin);
        let copy = format!("copy_{round}");
        pass(&mut postgres, &format!("CREATE DATABASE {copy} TEMPLATE {}", db.name));
        pass(&mut postgres, &format!("DROP DATABASE {copy}"));
        pass(&mut postgres, &format!("DROP DATABASE {}", db.name));
    }
    drop(plain);
    let log = server.log();
    // A visit that was asked for just before its database was dropped finds nothing there.
    let fatal = |line: &&str| line.contains("FATAL:  database") && !line.ends_with("does not exist");
    assert_eq!(log.lines().filter(fatal).collect::<Vec<_>>(), Vec::<&str>::new(), "{log}");
    assert!(!log.contains("terminated by signal"), "{log}");
}

#[test]
fn dropping_the_extension_never_fails_because_of_the_pruner() {
    let server = Server::start(&["writeguard.event_retention = '1s'"]);
    let db = server.plain_database();
    let mut admin = db.admin();
    for _ in 0..8 {
        pass(&mut admin, "CREATE EXTENSION pg_writeguard");
        old_events(&mut admin, 3_000, 100);
        thread::sleep(std::time::Duration::from_millis(400));
        pass(&mut admin, "DROP EXTENSION pg_writeguard");
    }
    let log = server.log();
    assert!(!log.contains("deadlock") && !log.contains("own statement failed"), "{log}");
}

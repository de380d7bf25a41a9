//! Rates: rows over time, over all sessions of a login; what does not commit goes back.

use std::thread;

use crate::common::limits::{number, pass, refuse};
use crate::common::{Database, Refusal, Server, expect_refusal};
use postgres::Client;

/// A table `t` of 1,000 rows that an ordinary role owns.
struct Stage {
    db: Database,
    admin: Client,
    owner: String,
}

impl Stage {
    fn new() -> Stage {
        Stage::on(Server::shared())
    }

    fn on(server: &Server) -> Stage {
        let db = server.database();
        let owner = db.role("owner");
        let mut admin = db.admin();
        pass(
            &mut admin,
            &format!(
                "GRANT CREATE ON SCHEMA public TO {owner}; SET ROLE {owner};
                 CREATE TABLE t (id int PRIMARY KEY, v int NOT NULL DEFAULT 0);
                 INSERT INTO t SELECT generate_series(1, 1000); RESET ROLE"
            ),
        );
        Stage { db, admin, owner }
    }

    fn client(&self) -> Client {
        self.db.connect(&self.owner)
    }

    #[track_caller]
    fn policy(&mut self, arguments: &str) {
        pass(
            &mut self.admin,
            &format!(
                "SELECT writeguard.set_policy('p', tables => '{{public.t}}', operations => '{{update,delete,truncate,drop}}', {arguments})"
            ),
        );
    }

    /// Rows of `t`, as another session sees them.
    fn rows(&mut self) -> i64 {
        number(&mut self.admin, "SELECT count(*) FROM t")
    }
}

fn delete(from: i64, to: i64) -> String {
    format!("DELETE FROM t WHERE id BETWEEN {from} AND {to}")
}

#[test]
fn an_interval_lets_so_many_rows_pass_and_not_one_more() {
    let mut stage = Stage::new();
    stage.policy("rate_rows => 10");
    let mut client = stage.client();
    pass(&mut client, &delete(1, 6));
    pass(&mut client, &delete(7, 9));
    let refusal = refuse(&mut client, &delete(10, 11));
    assert_eq!(refusal.said(), "delete of table \"public.t\" exceeds the limit of 10 rows per 1 h");
    assert!(
        refusal
            .detail
            .contains("There is room for 1 row now, and for the 2 at which the statement was stopped in 6 min."),
        "{refusal:?}"
    );
    assert_eq!((refusal.schema.as_str(), refusal.table.as_str()), ("public", "t"));
    pass(&mut client, &delete(10, 10));
    refuse(&mut client, &delete(11, 11));
    assert_eq!(stage.rows(), 990);
    let row = stage
        .admin
        .query_one(
            "SELECT scope, row_limit, rows FROM writeguard.event WHERE kind = 'blocked' ORDER BY id LIMIT 1",
            &[],
        )
        .expect("an event");
    let event: (&str, i64, i64) = (row.get(0), row.get(1), row.get(2));
    assert_eq!(event, ("rate", 10, 11));
}

#[test]
fn all_sessions_of_a_login_share_it_and_logins_do_not() {
    let mut stage = Stage::new();
    let other = stage.db.role("other");
    pass(&mut stage.admin, &format!("GRANT ALL ON t TO {other}"));
    stage.policy("rate_rows => 10");
    let (mut one, mut two) = (stage.client(), stage.client());
    pass(&mut one, &delete(1, 6));
    refuse(&mut two, &delete(7, 11));
    pass(&mut two, &delete(7, 10));
    refuse(&mut one, &delete(11, 11));
    let mut third = stage.db.connect(&other);
    pass(&mut third, &delete(11, 20));
    refuse(&mut third, &delete(21, 21));
    assert_eq!(stage.rows(), 980);
}

#[test]
fn what_does_not_commit_goes_back() {
    let mut stage = Stage::new();
    stage.policy("rate_rows => 10");
    let mut client = stage.client();
    for undone in [
        format!("BEGIN; {}; ROLLBACK", delete(1, 10)),
        format!("BEGIN; SAVEPOINT s; {}; ROLLBACK TO s; COMMIT", delete(1, 10)),
        format!(
            "BEGIN; SAVEPOINT s; {}; SAVEPOINT u; {}; RELEASE u; ROLLBACK TO s; COMMIT",
            delete(1, 5),
            delete(6, 10)
        ),
        "DO $$ BEGIN DELETE FROM t WHERE id <= 10; RAISE 'no'; EXCEPTION WHEN raise_exception THEN END $$".to_owned(),
        "DO $$ BEGIN DELETE FROM t; EXCEPTION WHEN SQLSTATE 'WG001' THEN END $$".to_owned(),
    ] {
        pass(&mut client, &undone);
        assert_eq!(stage.rows(), 1000, "{undone}");
    }
    for _ in 0..5 {
        refuse(&mut client, "DELETE FROM t");
        let failed = expect_refusal(client.batch_execute("UPDATE t SET v = 1 / (id - 5) WHERE id <= 5"));
        assert_eq!(failed.sqlstate, "22012");
    }
    pass(&mut client, &delete(1, 10));
    refuse(&mut client, &delete(11, 11));
    assert_eq!(stage.rows(), 990);
}

#[test]
fn a_part_that_is_rolled_back_goes_back_and_the_rest_is_spent() {
    let mut stage = Stage::new();
    stage.policy("rate_rows => 10");
    let mut client = stage.client();
    pass(
        &mut client,
        &format!("BEGIN; {}; SAVEPOINT s; {}; ROLLBACK TO s; {}; COMMIT", delete(1, 4), delete(5, 9), delete(5, 7)),
    );
    refuse(&mut client, &delete(8, 11));
    pass(&mut client, &delete(8, 10));
    refuse(&mut client, &delete(11, 11));
}

/// What was refilled meanwhile was refilled for the first rows only.
#[test]
fn a_long_transaction_that_is_rolled_back_gives_all_rows_back() {
    let mut stage = Stage::new();
    stage.policy("rate_rows => 100, rate_interval => '5 seconds'");
    let mut client = stage.client();
    for (long, all) in [
        ("BEGIN; DELETE FROM t WHERE id = 1; SELECT pg_sleep(3); DELETE FROM t WHERE id BETWEEN 2 AND 81; ROLLBACK", 100),
        (
            "BEGIN; SAVEPOINT s; DELETE FROM t WHERE id = 1; SELECT pg_sleep(3); DELETE FROM t WHERE id BETWEEN 2 AND 81;
             ROLLBACK TO s; DELETE FROM t WHERE id = 1; COMMIT",
            99,
        ),
    ] {
        pass(&mut client, "SELECT pg_sleep(5.1)");
        pass(&mut client, long);
        pass(&mut client, &format!("BEGIN; DELETE FROM t WHERE id IN (SELECT id FROM t LIMIT {all}); ROLLBACK"));
    }
    // Two at the same time: one's rows do not come back for the other's.
    let mut other = stage.client();
    pass(&mut client, "SELECT pg_sleep(5.1)");
    pass(&mut client, "BEGIN; DELETE FROM t WHERE id BETWEEN 101 AND 150");
    pass(&mut other, "DELETE FROM t WHERE id BETWEEN 151 AND 190");
    pass(&mut client, "ROLLBACK; BEGIN; DELETE FROM t WHERE id BETWEEN 201 AND 260; ROLLBACK");
    refuse(&mut client, "DELETE FROM t WHERE id BETWEEN 201 AND 300");
}

#[test]
fn a_session_that_ends_in_the_middle_gives_its_rows_back() {
    let mut stage = Stage::new();
    stage.policy("rate_rows => 10");
    let mut client = stage.client();
    let pid = number(&mut client, "pg_backend_pid()");
    pass(&mut client, &format!("BEGIN; {}", delete(1, 10)));
    refuse(&mut stage.client(), &delete(11, 11));
    pass(&mut stage.admin, &format!("SELECT pg_terminate_backend({pid}, 20000)"));
    pass(&mut stage.client(), &delete(11, 20));
    assert_eq!(stage.rows(), 990);
}

#[test]
fn an_overridden_write_spends_nothing() {
    let mut stage = Stage::new();
    stage.policy("rate_rows => 10, override => 'flag'");
    let mut client = stage.client();
    pass(&mut client, &format!("SET writeguard.override = on; {}", delete(1, 100)));
    assert_eq!(stage.rows(), 900);
    pass(&mut client, &delete(101, 110));
    refuse(&mut client, &delete(111, 111));
    // Lifted by another limit of the same policy.
    stage.policy("max_rows => 2, rate_rows => 20, override => 'flag'");
    pass(&mut client, &format!("SET writeguard.override = on; {}", delete(201, 250)));
    for row in 0..10 {
        pass(&mut client, &delete(300 + 2 * row, 301 + 2 * row));
    }
    refuse(&mut client, &delete(400, 400));
}

#[test]
fn a_rehearsal_spends_nothing() {
    let mut stage = Stage::new();
    stage.policy("rate_rows => 10");
    let mut client = stage.client();
    pass(&mut client, "SELECT writeguard.request('DELETE FROM t WHERE id <= 50', 'why')");
    pass(&mut client, &delete(1, 10));
    refuse(&mut client, &delete(11, 11));
}

#[test]
fn rows_come_back_evenly() {
    let mut stage = Stage::new();
    stage.policy("rate_rows => 10, rate_interval => '2 seconds'");
    let mut client = stage.client();
    pass(&mut client, &delete(1, 10));
    // One row in 200 milliseconds.
    let mut passed = 0;
    for row in 11..=15 {
        pass(&mut client, "SELECT pg_sleep(0.21)");
        pass(&mut client, &delete(row, row));
        passed += 1;
    }
    assert_eq!(passed, 5);
    pass(&mut client, "SELECT pg_sleep(2.1)");
    let refusal = refuse(&mut client, "DELETE FROM t");
    assert!(refusal.detail.contains("room for 1 row now, and never for the"), "{refusal:?}");
}

#[test]
fn eight_sessions_that_hammer_get_exactly_the_rows_of_the_interval() {
    let mut stage = Stage::new();
    stage.policy("rate_rows => 100, rate_interval => '1 day'");
    let writers: Vec<_> = (0..8)
        .map(|writer| {
            let mut client = stage.client();
            thread::spawn(move || {
                let mut passed = 0;
                for row in 0..60 {
                    let sql = format!("DELETE FROM t WHERE id = {}", writer * 100 + row + 1);
                    match client.execute(&sql, &[]) {
                        Ok(rows) => passed += rows,
                        Err(error) => assert_eq!(Refusal::of(&error).sqlstate, "WG001"),
                    }
                }
                passed
            })
        })
        .collect();
    let passed: u64 = writers.into_iter().map(|writer| writer.join().expect("a writer")).sum();
    assert_eq!(passed, 100);
    assert_eq!(stage.rows(), 900);
}

#[test]
fn a_rate_survives_other_changes_of_the_policy_and_a_restart_fills_it_up() {
    let server = Server::start(&[]);
    let mut stage = Stage::on(&server);
    stage.policy("rate_rows => 10");
    pass(&mut stage.client(), &delete(1, 10));
    stage.policy("rate_rows => 10, comment => 'changed'");
    refuse(&mut stage.client(), &delete(11, 11));
    server.restart();
    pass(&mut stage.db.connect(&stage.owner), &delete(11, 20));
    refuse(&mut stage.db.connect(&stage.owner), &delete(21, 21));
}

#[test]
fn truncate_and_drop_are_charged_to_it() {
    let mut stage = Stage::new();
    stage.policy("rate_rows => 999");
    let mut client = stage.client();
    for sql in ["TRUNCATE t", "DROP TABLE t"] {
        let refusal = expect_refusal(client.batch_execute(sql));
        assert_eq!(refusal.sqlstate, "WG005", "{sql}: {refusal:?}");
    }
    pass(&mut client, &delete(1, 1));
    pass(&mut client, "BEGIN; SAVEPOINT s; DELETE FROM t WHERE id <= 900; ROLLBACK TO s; COMMIT");
    stage.policy("rate_rows => 1000");
    pass(&mut client, "TRUNCATE t");
    assert_eq!(stage.rows(), 0);
}

#[test]
fn without_room_for_a_rate_the_write_is_refused_and_counted() {
    let server = Server::start(&["writeguard.rate_slots = 2"]);
    let mut stage = Stage::on(&server);
    let logins: Vec<String> = (0..3).map(|_| stage.db.role("login")).collect();
    for login in &logins {
        pass(&mut stage.admin, &format!("GRANT ALL ON t TO {login}"));
    }
    stage.policy("rate_rows => 10, rate_interval => '5 seconds'");
    pass(&mut stage.db.connect(&logins[0]), &delete(1, 10));
    pass(&mut stage.db.connect(&logins[1]), &delete(11, 20));
    let mut third = stage.db.connect(&logins[2]);
    let refusal = expect_refusal(third.batch_execute(&delete(21, 30)));
    assert_eq!(refusal.sqlstate, "WG008", "{refusal:?}");
    assert!(refusal.hint.contains("writeguard.rate_slots = 4"), "{refusal:?}");
    assert_eq!(number(&mut stage.admin, "SELECT refused FROM writeguard.rate_slots"), 1);
    assert_eq!(number(&mut stage.admin, "SELECT used FROM writeguard.rate_slots"), 2);
    // What is full again makes room.
    pass(&mut stage.admin, "SELECT pg_sleep(5.1)");
    pass(&mut third, &delete(21, 30));
}

#[test]
fn procedures_that_commit_spend_as_they_go() {
    let mut stage = Stage::new();
    stage.policy("rate_rows => 10");
    let mut client = stage.client();
    pass(
        &mut client,
        "CREATE PROCEDURE chunks() LANGUAGE plpgsql AS $$
         BEGIN FOR i IN 0..9 LOOP DELETE FROM t WHERE id BETWEEN i * 3 + 1 AND i * 3 + 3; COMMIT; END LOOP; END $$",
    );
    refuse(&mut client, "CALL chunks()");
    assert_eq!(stage.rows(), 991);
    pass(&mut client, &delete(100, 100));
    refuse(&mut client, &delete(101, 101));
}

#[test]
fn a_prepared_transaction_has_spent_its_rows() {
    let mut stage = Stage::new();
    stage.policy("rate_rows => 10");
    let mut client = stage.client();
    let name = &stage.db.name;
    pass(&mut client, &format!("BEGIN; {}; PREPARE TRANSACTION '{name}'", delete(1, 10)));
    refuse(&mut client, &delete(11, 11));
    pass(&mut client, &format!("COMMIT PREPARED '{name}'"));
    assert_eq!(stage.rows(), 990);
}

#[test]
fn what_is_no_rate_is_refused() {
    let mut stage = Stage::new();
    for arguments in [
        "rate_rows => -1",
        "rate_rows => 5, rate_interval => '0'",
        "rate_rows => 5, rate_interval => '-1 hour'",
        "rate_rows => 5, rate_interval => '11 years'",
    ] {
        let refusal =
            expect_refusal(stage.admin.batch_execute(&format!("SELECT writeguard.set_policy('p', {arguments})")));
        assert_eq!(refusal.sqlstate, "WG007", "{arguments}: {refusal:?}");
    }
    stage.policy("rate_rows => 0");
    refuse(&mut stage.client(), &delete(1, 1));
    stage.policy("rate_rows => 5, rate_interval => '1 day 2 hours'");
    let shown =
        "SELECT \"limit\" = 'rate' AND value = '5 per 1 d 2 h' FROM writeguard.effective('t', current_user, 'update')";
    assert!(stage.admin.query_one(shown, &[]).expect("a row").get::<_, bool>(0));
}

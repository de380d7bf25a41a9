//! Many statements in one string: each costs what it costs alone, however many stand before it and behind it.

use std::fmt::Write;
use std::sync::Mutex;
use std::time::Instant;

use crate::common::{Server, wait_until};
use postgres::Client;

const FEW: usize = 1_000;
const MANY: usize = 20_000;
/// What a machine that does something else besides may add.
const MOST: f64 = 1.5;
const ROUNDS: usize = 5;

/// A session in a database whose table `t` of [`MANY`] rows a policy with these arguments covers.
fn session(server: &Server, policy: &str) -> Client {
    let mut client = server.database().admin();
    client
        .batch_execute(&format!(
            "CREATE TABLE t (id int PRIMARY KEY, v int NOT NULL) WITH (fillfactor = 50);
             INSERT INTO t SELECT i, 0 FROM generate_series(1, {MANY}) AS i;
             SELECT writeguard.set_policy('p', tables => '{{public.t}}', {policy});"
        ))
        .and_then(|()| client.batch_execute("VACUUM ANALYZE t"))
        .expect("the setup");
    client
}

/// A string of so many statements.
fn string(count: usize, before_all: &str, statement: impl Fn(usize) -> String) -> String {
    let mut string = before_all.to_owned();
    for number in 1..=count {
        writeln!(string, "{};", statement(number)).expect("writing to a string");
    }
    string
}

fn seconds(client: &mut Client, string: &str) -> f64 {
    let started = Instant::now();
    client.batch_execute(&format!("{string} ROLLBACK")).expect("the storm");
    let seconds = started.elapsed().as_secs_f64();
    client.batch_execute("VACUUM t").expect("VACUUM");
    seconds
}

/// A statement of many takes about the time that one of few does.
#[track_caller]
fn assert_linear(policy: &str, before_all: &str, statement: impl Fn(usize) -> String) {
    static TURN: Mutex<()> = Mutex::new(());
    let _turn = TURN.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let mut client = session(Server::shared(), policy);
    let before_all = format!("BEGIN; {before_all}");
    let (few, many) = (string(FEW, &before_all, &statement), string(MANY, &before_all, &statement));
    let mut best = f64::INFINITY;
    for _ in 0..ROUNDS {
        // As many statements each time, the few again and again.
        let of_few: f64 = (0..MANY / FEW).map(|_| seconds(&mut client, &few)).sum();
        let of_many = seconds(&mut client, &many);
        best = best.min(of_many / of_few);
        if best <= MOST {
            return;
        }
    }
    panic!("a statement of {MANY} in a string takes {best:.2} times as long as one of {FEW}");
}

fn by_key(number: usize) -> String {
    format!("UPDATE t SET v = v + 1 WHERE id = {number}")
}

#[test]
fn covered_statements_are_linear() {
    assert_linear("max_rows => 5", "", by_key);
}

#[test]
fn a_comment_before_them_changes_nothing() {
    assert_linear("max_rows => 5", "/* all of them */ -- in one string\n", by_key);
}

#[test]
fn comments_between_them_change_nothing() {
    assert_linear("max_rows => 5", "", |number| format!("-- it's number {number}\n{}", by_key(number)));
}

#[test]
fn statements_past_a_limit_that_is_observed_are_linear() {
    let nothing = "max_rows => 0, mode => 'observe'";
    assert_linear(nothing, "", |number| format!("UPDATE t SET v = v + 1 WHERE id = {number} /* past it */"));
}

#[test]
fn overridden_statements_are_linear() {
    let flag = "max_rows => 0, override => 'flag'";
    assert_linear(flag, "SET LOCAL writeguard.override = on;", by_key);
}

#[test]
fn the_text_of_each_is_its_own() {
    let server = Server::shared();
    let mut client = session(server, "max_rows => 0, mode => 'observe'");
    let three = "/* one */ UPDATE t SET v = 1 WHERE id = 1;;\n -- two; 'and'\n UPDATE t SET v = 2 WHERE id = 2;\n\
                 SELECT 1; UPDATE t SET v = 3 WHERE id = 3 /* three */ ; ";
    client.batch_execute(three).expect("three statements");
    let wanted = [
        "/* one */ UPDATE t SET v = 1 WHERE id = 1",
        "-- two; 'and'\n UPDATE t SET v = 2 WHERE id = 2",
        "UPDATE t SET v = 3 WHERE id = 3 /* three */",
    ];
    wait_until(20, || {
        let rows = client.query("SELECT statement FROM writeguard.event WHERE kind = 'observed' ORDER BY id", &[]);
        let texts: Vec<String> = rows.expect("events").iter().map(|row| row.get(0)).collect();
        texts == wanted
    });
}

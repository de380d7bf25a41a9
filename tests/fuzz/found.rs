//! What random cases came upon, each by itself.

use postgres::Client;

use crate::common::{Database, Refusal, Server, expect_refusal};

/// The tables `t` and `u` of ten rows each, and a policy that allows five rows of a statement.
fn bed() -> (Database, Client) {
    let db = Server::shared().database();
    let mut client = db.admin();
    pass(
        &mut client,
        "CREATE TABLE t (id int PRIMARY KEY, v int NOT NULL DEFAULT 0);
         CREATE TABLE u (LIKE t INCLUDING ALL);
         INSERT INTO t SELECT generate_series(1, 10);
         INSERT INTO u SELECT generate_series(1, 10);
         SELECT writeguard.set_policy('p', tables => '{public.*}', max_rows => 5)",
    );
    (db, client)
}

#[track_caller]
fn pass(client: &mut Client, sql: &str) {
    if let Err(error) = client.batch_execute(sql) {
        panic!("{sql}: {:?}", Refusal::of(&error));
    }
}

#[track_caller]
fn refuse(client: &mut Client, sql: &str) {
    let refusal = expect_refusal(client.batch_execute(sql));
    assert_eq!(refusal.sqlstate, "WG001", "{sql}: {refusal:?}");
}

#[track_caller]
fn number(client: &mut Client, sql: &str) -> i64 {
    client.query_one(sql, &[]).unwrap_or_else(|error| panic!("{sql}: {error:?}")).get(0)
}

/// The statement of the last refusal's event.
#[track_caller]
fn recorded(client: &mut Client) -> String {
    let sql = "SELECT statement FROM writeguard.event WHERE kind = 'blocked' ORDER BY id DESC LIMIT 1";
    client.query_one(sql, &[]).expect("an event").get(0)
}

/// Ten rows in one partition, and another one whose trigger takes no row.
const NO_WAY_IN: &str = "
    CREATE TABLE split (id int, r int) PARTITION BY LIST (r);
    CREATE TABLE from_here PARTITION OF split FOR VALUES IN (1);
    CREATE TABLE to_there PARTITION OF split FOR VALUES IN (2);
    INSERT INTO split SELECT i, 1 FROM generate_series(1, 10) AS i;
    CREATE FUNCTION no() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';
    CREATE TRIGGER no BEFORE INSERT ON to_there FOR EACH ROW EXECUTE FUNCTION no();";

#[test]
fn rows_that_vanish_because_a_trigger_keeps_them_out_of_the_partition_they_move_to_count() {
    let (_db, mut client) = bed();
    pass(&mut client, NO_WAY_IN);
    refuse(&mut client, "UPDATE split SET r = 2");
    assert_eq!(number(&mut client, "SELECT count(*) FROM split"), 10);
    pass(&mut client, "UPDATE split SET r = 2 WHERE id <= 5");
    assert_eq!(number(&mut client, "SELECT count(*) FROM split"), 5);
}

#[test]
fn rows_that_a_merge_moves_nowhere_count() {
    let (_db, mut client) = bed();
    pass(&mut client, NO_WAY_IN);
    let merge = "MERGE INTO split AS s USING t ON s.id = t.id WHEN MATCHED THEN UPDATE SET r = 2";
    refuse(&mut client, merge);
    assert_eq!(number(&mut client, "SELECT count(*) FROM split"), 10);
}

#[test]
fn a_command_that_a_rule_extends_is_recorded_without_its_neighbours() {
    let (_db, mut client) = bed();
    pass(&mut client, "CREATE RULE also AS ON UPDATE TO u DO ALSO UPDATE t SET v = 1 WHERE id = NEW.id");
    refuse(&mut client, "SELECT 1; DELETE FROM t; SELECT 2");
    assert_eq!(recorded(&mut client), "DELETE FROM t");
    refuse(&mut client, "SELECT 1; UPDATE u SET v = 9; SELECT 2");
    assert_eq!(recorded(&mut client), "UPDATE u SET v = 9");
}

/// The commands of a string are statements of their own, the COMMIT too.
#[test]
fn deferred_triggers_of_a_commit_are_counted_alike_in_one_string_and_in_several() {
    let (_db, mut client) = bed();
    pass(
        &mut client,
        "CREATE FUNCTION later() RETURNS trigger LANGUAGE plpgsql AS
             'BEGIN UPDATE t SET v = v + 1 WHERE id = OLD.id; RETURN NULL; END';
         CREATE CONSTRAINT TRIGGER later AFTER UPDATE ON u DEFERRABLE INITIALLY DEFERRED
             FOR EACH ROW EXECUTE FUNCTION later()",
    );
    for sql in ["BEGIN", "UPDATE u SET v = 1 WHERE id <= 5", "COMMIT"] {
        pass(&mut client, sql);
    }
    pass(&mut client, "BEGIN; UPDATE u SET v = 2 WHERE id <= 5; COMMIT");
}

#[test]
fn a_setting_that_is_no_token_hides_no_statement() {
    let (_db, mut client) = bed();
    let delete = "DELETE FROM t WHERE v >= 0";
    for token in ["nothing like it", delete, "DELETE", "t", " "] {
        pass(&mut client, &format!("SET writeguard.token = '{token}'"));
        refuse(&mut client, delete);
        assert_eq!(recorded(&mut client), delete, "with the token '{token}'");
    }
}

//! A short walk through every part, one statement of each kind. `scripts/test-assert` takes it where a statement takes
//! fifty times as long and nothing stays hidden: under valgrind, and where no catalog cache lasts.

use crate::common::session::pass;
use crate::common::{Database, Refusal, Server, expect_refusal, wait_until};
use postgres::Client;

/// `t` of six rows, a table whose rows go with theirs, and partitions.
const TABLES: &str = "
    CREATE TABLE t (id int PRIMARY KEY, v int NOT NULL DEFAULT 0, note text DEFAULT 'as it was');
    INSERT INTO t SELECT generate_series(1, 6);
    CREATE TABLE part_of (id int PRIMARY KEY, t int REFERENCES t ON DELETE CASCADE);
    INSERT INTO part_of SELECT i, i FROM generate_series(1, 6) AS i;
    CREATE TABLE p (id int PRIMARY KEY, v int) PARTITION BY RANGE (id);
    CREATE TABLE p_low PARTITION OF p FOR VALUES FROM (0) TO (10);
    CREATE TABLE p_high PARTITION OF p FOR VALUES FROM (10) TO (20);
    INSERT INTO p SELECT generate_series(7, 12), 0";

struct Walk {
    db: Database,
    client: Client,
    reader: Client,
}

impl Walk {
    fn new(policy: &str) -> Walk {
        let db = Server::shared().database();
        let mut walk = Walk { client: db.admin(), reader: db.admin(), db };
        walk.passes(TABLES);
        walk.passes(&format!("SELECT writeguard.set_policy('w', tables => '{{public.*}}', {policy})"));
        walk
    }

    #[track_caller]
    fn passes(&mut self, sql: &str) {
        pass(&mut self.client, sql);
    }

    #[track_caller]
    fn refused(&mut self, sqlstate: &str, sql: &str) -> Refusal {
        refused(&mut self.client, sqlstate, sql)
    }

    /// The values of the first column, from the second session.
    #[track_caller]
    fn rows(&mut self, sql: &str) -> Vec<String> {
        rows(&mut self.reader, sql)
    }

    /// As many events of a kind are stored, once the worker has been there.
    #[track_caller]
    fn events(&mut self, kind: &str, number: usize) {
        let sql = format!("SELECT concat_ws(' ', id, relation, statement) FROM writeguard.event WHERE kind = '{kind}'");
        wait_until(10, || self.rows(&sql).len() >= number);
        assert_eq!(self.rows(&sql).len(), number, "{:?}", self.rows(&sql));
    }
}

#[track_caller]
fn refused(client: &mut Client, sqlstate: &str, sql: &str) -> Refusal {
    let refusal = expect_refusal(client.batch_execute(sql));
    assert_eq!(refusal.sqlstate, sqlstate, "{sql}: {refusal:?}");
    refusal
}

#[track_caller]
fn rows(client: &mut Client, sql: &str) -> Vec<String> {
    match client.query(sql, &[]) {
        Ok(rows) => rows.iter().map(|row| row.get::<_, Option<String>>(0).unwrap_or("NULL".into())).collect(),
        Err(error) => panic!("{sql}: {:?}", Refusal::of(&error)),
    }
}

#[test]
fn limits() {
    let mut walk = Walk::new("max_rows => 4");
    for write in [
        "UPDATE t SET v = 1 WHERE id <= 4",
        "DELETE FROM t WHERE id <= 2",
        "MERGE INTO t USING p ON t.id = p.id - 5 WHEN MATCHED THEN UPDATE SET v = 2",
        "INSERT INTO t VALUES (3), (4), (9) ON CONFLICT (id) DO UPDATE SET v = 3",
        "UPDATE p SET id = id + 6 WHERE id <= 9",
        "WITH a AS (UPDATE t SET v = 4 WHERE id < 5 RETURNING id) UPDATE p SET v = 4 FROM a WHERE p.id = a.id + 8",
        "BEGIN; DECLARE c CURSOR FOR SELECT * FROM t FOR UPDATE; FETCH 2 FROM c; UPDATE t SET v = 5 WHERE CURRENT OF c; COMMIT",
        "PREPARE w(int) AS UPDATE t SET v = $1 WHERE id = $1; EXECUTE w(3); EXECUTE w(4); DEALLOCATE w",
    ] {
        walk.passes(write);
    }
    let refusals = [
        ("WG001", "UPDATE p SET v = 1"),
        ("WG001", "UPDATE p SET id = id - 10"),
        ("WG001", "DELETE FROM t USING p WHERE t.id < 20"),
        ("WG001", "WITH a AS (UPDATE t SET v = 6 WHERE id < 6 RETURNING id) UPDATE p SET v = 4 FROM a"),
        ("WG001", "MERGE INTO p USING generate_series(1, 20) AS i ON i = p.id WHEN MATCHED THEN DELETE"),
        ("WG001", "DO $$ BEGIN FOR i IN 1 .. 20 LOOP UPDATE p SET v = i WHERE id = i; END LOOP; END $$"),
        ("WG001", "EXPLAIN ANALYZE UPDATE p SET v = 1"),
        ("WG005", "TRUNCATE p"),
    ];
    for (sqlstate, write) in refusals {
        walk.refused(sqlstate, write);
    }
    walk.events("blocked", refusals.len());
    walk.passes("SELECT writeguard.set_policy('w', tables => '{public.*}', max_rows => 10)");
    walk.passes("UPDATE p SET v = 1");
}

#[test]
fn a_missing_condition() {
    let mut walk = Walk::new("max_rows => 3, require_where => true");
    for _ in 0..2 {
        walk.passes("UPDATE t SET v = 1 WHERE id = 2");
        walk.refused("WG002", "UPDATE t SET v = 1");
        walk.refused("WG002", "DELETE FROM p WHERE true");
        walk.refused("WG001", "UPDATE t SET v = 1 WHERE id > 1");
    }
    walk.passes("UPDATE t SET v = 1 WHERE id = 2");
    walk.events("blocked", 6);
}

#[test]
fn subtransactions() {
    let mut walk = Walk::new("max_rows => 3, max_rows_per_transaction => 5");
    walk.passes("BEGIN; UPDATE t SET v = 1 WHERE id <= 3; SAVEPOINT a; UPDATE t SET v = 2 WHERE id <= 2");
    walk.refused("WG001", "UPDATE p SET v = 1 WHERE id = 7");
    walk.passes("ROLLBACK TO a; UPDATE t SET v = 2 WHERE id <= 1; RELEASE a; SAVEPOINT b");
    walk.refused("WG001", "UPDATE p SET v = 1");
    walk.passes("ROLLBACK TO b; COMMIT");
    walk.passes(
        "DO $$ DECLARE caught int := 0; BEGIN
            FOR i IN 1 .. 3 LOOP
                BEGIN
                    UPDATE p SET v = i;
                EXCEPTION WHEN SQLSTATE 'WG001' THEN caught := caught + 1;
                END;
            END LOOP;
            BEGIN UPDATE t SET v = 8 WHERE id = 1; PERFORM 1 / 0; EXCEPTION WHEN division_by_zero THEN NULL; END;
            UPDATE t SET v = 9 WHERE id <= 3;
            ASSERT caught = 3;
        END $$",
    );
    assert_eq!(walk.rows("SELECT v::text FROM t ORDER BY id"), ["9", "9", "9", "0", "0", "0"]);
}

#[test]
fn rows_kept_and_put_back() {
    let mut walk = Walk::new("max_rows => 1, override => 'flag', undo => '1 day'");
    let tables = ["t", "part_of", "p"];
    let contents = |walk: &mut Walk| tables.map(|t| walk.rows(&format!("SELECT x::text FROM {t} AS x ORDER BY 1")));
    let before = contents(&mut walk);
    for write in [
        "UPDATE t SET v = id, note = repeat('long ', 1000)",
        "UPDATE t SET id = -id, note = NULL",
        "DELETE FROM t WHERE id <= 5",
        "UPDATE p SET id = (id + 7) % 20 WHERE id < 10",
        "TRUNCATE p",
        "DO $$ BEGIN
            UPDATE t SET v = 1;
            BEGIN UPDATE t SET v = 2; PERFORM 1 / 0; EXCEPTION WHEN division_by_zero THEN NULL; END;
            DELETE FROM t WHERE id = 3;
        END $$",
    ] {
        if write.contains("-id") {
            walk.passes("ALTER TABLE part_of DROP CONSTRAINT part_of_t_fkey");
        }
        walk.passes(&format!("SET writeguard.override = on; {write}"));
        let change = walk.rows("SELECT max(id)::text FROM writeguard.change").remove(0);
        walk.passes(&format!("SELECT * FROM writeguard.undo({change}, dry_run => true)"));
        walk.passes(&format!("SELECT * FROM writeguard.undo({change})"));
        assert_eq!(contents(&mut walk), before, "{write}");
    }
    walk.passes("SET writeguard.override = on; UPDATE t SET v = 1");
    walk.passes("UPDATE t SET v = 2 WHERE id = 2");
    let change = walk.rows("SELECT max(id)::text FROM writeguard.change").remove(0);
    walk.refused("WG009", &format!("SELECT writeguard.undo({change})"));
    walk.passes(&format!("SELECT * FROM writeguard.undo_conflicts({change})"));
    walk.passes(&format!("SELECT * FROM writeguard.undo({change}, 'skip')"));
    assert_eq!(walk.rows("SELECT v::text FROM t ORDER BY id"), ["0", "2", "0", "0", "0", "0"]);
}

#[test]
fn two_people() {
    let mut walk = Walk::new("max_rows => 2");
    let (anna, bert) = (walk.db.role("anna"), walk.db.role("bert"));
    walk.passes(&format!(
        "GRANT ALL ON t, p TO PUBLIC; GRANT SELECT ON writeguard.pending TO {bert};
         GRANT EXECUTE ON FUNCTION writeguard.approve, writeguard.reject TO {anna}, {bert}"
    ));
    let (mut anna, mut bert) = (walk.db.connect(&anna), walk.db.connect(&bert));
    let mut approved = |anna: &mut Client, statement: &str| {
        let request = rows(anna, &format!("SELECT writeguard.request($${statement}$$, 'a walk')::text")).remove(0);
        refused(anna, "WG006", &format!("SELECT writeguard.approve({request})"));
        pass(&mut bert, &format!("SELECT * FROM writeguard.pending WHERE id = {request}"));
        let token = rows(&mut bert, &format!("SELECT writeguard.approve({request})")).remove(0);
        (request, token)
    };
    let (request, _) = approved(&mut anna, "UPDATE t SET v = 7 RETURNING *");
    pass(&mut anna, &format!("SELECT * FROM writeguard.execute({request})"));
    refused(&mut anna, "WG006", &format!("SELECT * FROM writeguard.execute({request})"));
    let (_, token) = approved(&mut anna, "DELETE FROM p");
    let arm = format!("SET writeguard.override = on; SET writeguard.token = '{token}'");
    pass(&mut anna, &arm);
    refused(&mut anna, "WG006", "UPDATE p SET v = 3");
    pass(&mut anna, &arm);
    pass(&mut anna, "DELETE FROM p");
    let (request, _) = approved(&mut anna, "UPDATE t SET v = 8");
    walk.passes("UPDATE t SET note = 'other' WHERE id = 1; DELETE FROM t WHERE id = 2");
    refused(&mut anna, "WG006", &format!("SELECT * FROM writeguard.execute({request})"));
    walk.events("overridden", 2);
    assert_eq!(walk.rows("SELECT v::text FROM t"), ["7"; 5]);
}

#[test]
fn looking_ahead_and_around() {
    let mut walk = Walk::new("max_rows => 2, rate_rows => 20, max_fraction => 0.9");
    walk.passes("SELECT * FROM writeguard.preview('UPDATE t SET v = 1')");
    walk.passes("SELECT * FROM writeguard.preview('DELETE FROM p', 2)");
    walk.passes("SET writeguard.expect_rows = 1; UPDATE t SET v = 1 WHERE id = 1");
    walk.passes("SET writeguard.expect_rows = 1");
    walk.refused("WG004", "UPDATE t SET v = 1 WHERE id <= 2");
    for query in [
        "SELECT * FROM writeguard.effective('t', current_user, 'update')",
        "SELECT * FROM writeguard.check_setup()",
        "SELECT * FROM writeguard.stat",
        "SELECT * FROM writeguard.suggest_policies()",
        "SELECT * FROM writeguard.my_events",
        "SELECT * FROM writeguard.import_policies(writeguard.export_policies(), dry_run => true)",
        "SELECT writeguard.statement_hash('UPDATE t SET v = 1; ')",
    ] {
        walk.passes(query);
    }
    walk.refused("WG007", "SELECT writeguard.set_policy('bad', schedule => 'Sat 25:00')");
    walk.events("expectation_failed", 1);
}

#[test]
fn modes_and_ddl() {
    let mut walk = Walk::new("max_rows => 1, mode => 'warn'");
    walk.passes("UPDATE t SET v = 1; UPDATE p SET v = 1; TRUNCATE p");
    walk.events("warned", 3);
    walk.passes("SELECT writeguard.set_policy('w', tables => '{public.*}', max_rows => 1, mode => 'observe')");
    walk.passes("DELETE FROM t");
    walk.events("observed", 1);
    walk.passes("INSERT INTO t SELECT generate_series(1, 6)");
    walk.passes("SELECT writeguard.set_policy('w', tables => '{public.*}', max_rows => 1)");
    walk.passes("ALTER TABLE t ADD added int DEFAULT 3; CREATE SCHEMA other; ALTER TABLE t SET SCHEMA other");
    walk.events("uncovered", 1);
    walk.passes("UPDATE other.t SET v = 1; ALTER TABLE other.t SET SCHEMA public");
    walk.refused("WG001", "UPDATE t SET v = 1");
    walk.passes("ALTER TABLE p DETACH PARTITION p_low; DROP TABLE p; ALTER TABLE p_low RENAME TO q");
    walk.passes(
        "SELECT writeguard.set_policy('w', tables => '{public.*}', max_rows => 1, operations => '{update,delete,truncate,drop}')",
    );
    walk.refused("WG005", "DROP TABLE t CASCADE");
    walk.refused("WG005", "ALTER TABLE t SET SCHEMA other");
    walk.refused("WG005", "ALTER TABLE t ALTER v TYPE text USING 'x'");
}

/// Two-phase commit, and a session that goes on after it.
#[test]
fn prepared_transactions() {
    let mut walk = Walk::new("max_rows => 2, override => 'flag', undo => '1 day'");
    walk.passes("BEGIN; UPDATE t SET v = 1 WHERE id <= 2; PREPARE TRANSACTION 'walk'");
    walk.passes("UPDATE t SET v = 1 WHERE id > 4");
    walk.passes("COMMIT PREPARED 'walk'");
    walk.passes("BEGIN; SET LOCAL writeguard.override = on; UPDATE t SET v = 2; PREPARE TRANSACTION 'walk'");
    walk.passes("ROLLBACK PREPARED 'walk'");
    walk.refused("WG001", "UPDATE t SET v = 3");
    assert_eq!(walk.rows("SELECT v::text FROM t ORDER BY id"), ["1", "1", "0", "0", "1", "1"]);
}

/// Knowledge of a table must not outlive its shape.
#[test]
fn ddl_between_kept_rows() {
    let mut walk = Walk::new("max_rows => 1, override => 'flag', undo => '1 day'");
    for ddl in [
        "ALTER TABLE t ALTER note DROP DEFAULT, ALTER note TYPE int USING 42",
        "ALTER TABLE t ALTER note TYPE text USING 'forty-two'",
        "ALTER TABLE t ADD more text DEFAULT 'more', ADD yet_more bigint DEFAULT 1",
        "ALTER TABLE t DROP more",
        "ALTER TABLE t RENAME note TO noted",
        "ALTER TABLE t RENAME noted TO note",
    ] {
        walk.passes(&format!(
            "SET writeguard.override = on; DO $$ BEGIN
                UPDATE t SET v = v + 1; {ddl}; UPDATE t SET v = v + 1; DELETE FROM t WHERE id = 1;
                INSERT INTO t (id) VALUES (1);
            END $$"
        ));
        let change = walk.rows("SELECT max(id)::text FROM writeguard.change").remove(0);
        // Whether it can be put back is another test's.
        let _ = walk.client.batch_execute(&format!("SELECT * FROM writeguard.undo({change}, 'skip', dry_run => true)"));
        let count = walk.rows("SELECT count(*)::text FROM t");
        assert_eq!(count, ["6"], "{ddl}");
    }
}

//! Keys and unique values that move come back, however they moved: rows are told apart by their versions, and go back the
//! way they came.

use crate::common::kept::{Bed, one};

/// Five rows, whose values tell which is which.
fn bed(key: &str, unique: &str) -> Bed {
    Bed::new(&format!(
        "CREATE TABLE t (id int, u int, v text, PRIMARY KEY (id) {key}, UNIQUE (u) {unique});
         INSERT INTO t SELECT i, i, 'v' || i FROM generate_series(1, 5) AS i"
    ))
}

#[track_caller]
fn there_and_back(bed: &mut Bed, write: &str, rows: i64) {
    let before = bed.table("t");
    let change = bed.change(write);
    assert_ne!(bed.table("t"), before, "{write}");
    for _ in 0..2 {
        assert_eq!(bed.undo(&format!("{change}, dry_run => true")), one("public.t", rows, 0), "{write}");
    }
    assert_eq!(bed.undo(&format!("{change}")), one("public.t", rows, 0), "{write}");
    assert_eq!(bed.table("t"), before, "{write}");
    // And the undo as well.
    let redo: i64 = bed.rows("SELECT max(id)::text FROM writeguard.change_statement")[0].parse().expect("a number");
    bed.undo(&format!("{redo}"));
    assert_ne!(bed.table("t"), before, "{write}");
    let again: i64 = bed.rows("SELECT max(id)::text FROM writeguard.change_statement")[0].parse().expect("a number");
    bed.undo(&format!("{again}"));
    assert_eq!(bed.table("t"), before, "{write}");
}

#[test]
fn deferrable_keys_shift_rotate_and_swap() {
    for key in ["DEFERRABLE", "DEFERRABLE INITIALLY DEFERRED"] {
        for (write, rows) in [
            ("UPDATE t SET id = id + 1", 5),
            ("UPDATE t SET id = id - 1", 5),
            ("UPDATE t SET id = id % 5 + 1", 5),
            ("UPDATE t SET id = (id + 3) % 5 + 1, v = v || '!'", 5),
            ("UPDATE t SET id = 3 - id WHERE id < 3", 2),
            ("UPDATE t SET id = 6 - id, u = u + 10 WHERE id <> 3", 4),
            ("UPDATE t SET id = id + 1; UPDATE t SET id = id % 5 + 1; UPDATE t SET id = 7 - id", 5),
            ("UPDATE t SET id = 6 - id; DELETE FROM t WHERE id IN (1, 3)", 5),
            ("SET CONSTRAINTS ALL DEFERRED; UPDATE t SET id = 2 WHERE v = 'v1'; UPDATE t SET id = 1 WHERE v = 'v2'", 2),
            (
                "SET CONSTRAINTS ALL DEFERRED; UPDATE t SET id = 2 WHERE v = 'v1'; UPDATE t SET v = v || '!' WHERE id = 2; \
              DELETE FROM t WHERE v = 'v2!'",
                2,
            ),
        ] {
            there_and_back(&mut bed(key, ""), write, rows);
        }
    }
}

#[test]
fn ordinary_keys_and_unique_values_move_by_way_of_others() {
    for (key, unique) in [("", ""), ("", "DEFERRABLE"), ("DEFERRABLE", "")] {
        for (write, rows) in [
            ("UPDATE t SET id = id + 1000; UPDATE t SET id = id - 999", 5),
            ("UPDATE t SET id = id + 1000; UPDATE t SET id = id - 1001", 5),
            ("UPDATE t SET u = u + 1000; UPDATE t SET u = u - 999", 5),
            ("UPDATE t SET u = u + 1000; UPDATE t SET u = (u - 1000) % 5 + 1", 5),
            ("UPDATE t SET id = 0 WHERE id = 1; UPDATE t SET id = 1 WHERE id = 2; UPDATE t SET id = 2 WHERE id = 0", 2),
            ("UPDATE t SET u = 0 WHERE u = 1; UPDATE t SET u = 1 WHERE u = 2; UPDATE t SET u = 2 WHERE u = 0", 2),
            (
                "DELETE FROM t WHERE id = 5; UPDATE t SET id = 5, u = 5 WHERE id = 4; UPDATE t SET id = 4, u = 4 WHERE id = 3",
                3,
            ),
            (
                "UPDATE t SET id = id + 10, u = u + 10; UPDATE t SET id = 26 - id - 10, v = 'x'; DELETE FROM t WHERE id > 3",
                5,
            ),
        ] {
            there_and_back(&mut bed(key, unique), write, rows);
        }
    }
}

#[test]
fn who_refers_to_a_key_that_moves_follows_it_back() {
    let mut bed = Bed::new(
        "CREATE TABLE t (id int PRIMARY KEY, v text); INSERT INTO t SELECT i, 'v' || i FROM generate_series(1, 5) AS i;
         CREATE TABLE c (id int PRIMARY KEY, up int REFERENCES t ON UPDATE CASCADE);
         INSERT INTO c SELECT i, i FROM generate_series(1, 5) AS i",
    );
    let all = |bed: &mut Bed| [bed.table("t"), bed.table("c")];
    let before = all(&mut bed);
    for write in [
        "UPDATE t SET id = id + 1000; UPDATE t SET id = id - 999",
        "UPDATE t SET id = 0 WHERE id = 1; UPDATE t SET id = 1 WHERE id = 2; UPDATE t SET id = 2 WHERE id = 0",
    ] {
        let change = bed.change(write);
        assert_ne!(all(&mut bed), before, "{write}");
        let undone = bed.undo(&format!("{change}"));
        assert!(undone.iter().all(|(.., conflicts)| *conflicts == 0), "{write}: {undone:?}");
        assert_eq!(all(&mut bed), before, "{write}");
    }
}

#[test]
fn a_row_that_cannot_move_back_does_not_keep_others() {
    let mut bed = bed("", "");
    let change = bed.change("UPDATE t SET u = u + 1000; UPDATE t SET u = u - 990");
    bed.run("INSERT INTO t VALUES (9, 3, 'theirs')");
    let refusal = bed.refused(&format!("SELECT writeguard.undo({change})"));
    assert_eq!(refusal.sqlstate, "WG009", "{refusal:?}");
    assert!(refusal.detail.contains("(id)=(3)"), "{refusal:?}");
    assert_eq!(bed.undo(&format!("{change}, 'skip'")), one("public.t", 4, 1));
    assert_eq!(bed.table("t"), ["(1,1,v1)", "(2,2,v2)", "(3,13,v3)", "(4,4,v4)", "(5,5,v5)", "(9,3,theirs)"]);
}

#[test]
fn a_table_that_is_rewritten_or_emptied_between_two_rows() {
    let mut bed = bed("", "");
    let before = bed.table("t");
    let change = bed.change("UPDATE t SET u = -u; ALTER TABLE t ADD s serial; UPDATE t SET v = 'x'");
    let refusal = bed.refused(&format!("SELECT writeguard.undo({change})"));
    assert_eq!(refusal.sqlstate, "WG008", "{refusal:?}");
    assert!(refusal.message.contains("was rewritten between two of the rows"), "{refusal:?}");
    let mut bed = self::bed("", "");
    let change = bed.change(
        "UPDATE t SET u = -u; TRUNCATE t; INSERT INTO t VALUES (7, 7, 'new'), (1, 8, 'new'); UPDATE t SET id = 8 WHERE id = 7; \
         DELETE FROM t",
    );
    // What was new is put back as well: that it was inserted is not kept.
    bed.undo(&format!("{change}, 'skip'"));
    let now = bed.table("t");
    assert!(before[1..].iter().all(|row| now.contains(row)), "{now:?}");
}

/// Numbers that look random and are the same each time.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % bound
    }
}

#[test]
fn whatever_keys_do_in_one_block_is_put_back() {
    let mut numbers = Numbers(7);
    let mut rounds = 0;
    for (key, unique) in [("", ""), ("DEFERRABLE", ""), ("", "DEFERRABLE"), ("DEFERRABLE", "DEFERRABLE")] {
        let mut bed = bed(key, unique);
        let before = bed.table("t");
        bed.run("SET writeguard.capture_undo = on");
        for _ in 0..60 {
            let steps: Vec<String> = (0..2 + numbers.below(5))
                .map(|_| {
                    let column = if numbers.below(2) == 0 { "id" } else { "u" };
                    let (one, other) = (numbers.below(8), numbers.below(8));
                    match numbers.below(8) {
                        0 => format!("UPDATE t SET {column} = {column} + {}", 1 + one),
                        1 => format!("UPDATE t SET {column} = {one} - {column}"),
                        2 => format!("UPDATE t SET {column} = {column} - {one} WHERE {column} > {other}"),
                        3 => format!("DELETE FROM t WHERE {column} = {one}"),
                        4 => format!("UPDATE t SET v = v || '.' WHERE {column} > {one}"),
                        5 => format!("UPDATE t SET id = id + 100, u = u + 100 WHERE id > {one}"),
                        _ => format!("UPDATE t SET {column} = {one} WHERE {column} = {other}"),
                    }
                })
                .collect();
            let block = format!("DO $$ BEGIN SET CONSTRAINTS ALL DEFERRED; {}; END $$", steps.join("; "));
            if bed.admin.batch_execute(&block).is_err() {
                continue;
            }
            let after = bed.table("t");
            if after == before {
                continue;
            }
            rounds += 1;
            let change = bed.rows("SELECT max(id)::text FROM writeguard.change_statement").remove(0);
            // Where the key and another unique value move, and only the key is deferrable, it may be told that it cannot be.
            if !key.is_empty()
                && unique.is_empty()
                && bed.undo(&format!("{change}, dry_run => true")).iter().any(|(.., conflicts)| *conflicts > 0)
            {
                assert_eq!(bed.refused(&format!("SELECT writeguard.undo({change})")).sqlstate, "WG009");
                assert_eq!(bed.table("t"), after);
                bed.run("SET writeguard.capture_undo = off; TRUNCATE t; INSERT INTO t SELECT i, i, 'v' || i FROM generate_series(1, 5) AS i");
                bed.run("SET writeguard.capture_undo = on");
                continue;
            }
            let undone = bed.undo(&change);
            assert!(undone.iter().all(|(.., conflicts)| *conflicts == 0), "{key}/{unique}: {block}: {undone:?}");
            assert_eq!(bed.table("t"), before, "{key}/{unique}: {block}");
        }
    }
    assert!(rounds > 60, "{rounds}");
}

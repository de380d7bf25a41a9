//! What PostgreSQL 17 and later brought: kinds of writes that earlier servers do not have.
#![cfg(since_pg17)]

use crate::common::expect_refusal;
use crate::common::kept;
use crate::common::limits::*;

/// `t` of six rows, and `s` with two of their keys and a new one.
const SOURCE: &str = "
    CREATE TABLE t (id int PRIMARY KEY, v int NOT NULL DEFAULT 0);
    INSERT INTO t SELECT i, 0 FROM generate_series(1, 6) AS i;
    CREATE TABLE s (id int PRIMARY KEY); INSERT INTO s VALUES (1), (2), (9)";

#[test]
fn rows_that_no_source_matches_are_counted() {
    for (actions, rows) in [
        ("WHEN NOT MATCHED BY SOURCE THEN DELETE", 4),
        ("WHEN NOT MATCHED BY SOURCE AND t.id > 4 THEN UPDATE SET v = 1", 2),
        ("WHEN MATCHED THEN UPDATE SET v = 1 WHEN NOT MATCHED BY SOURCE THEN DELETE", 6),
        (
            "WHEN MATCHED THEN DELETE WHEN NOT MATCHED BY SOURCE AND t.id = 3 THEN DO NOTHING
             WHEN NOT MATCHED BY SOURCE THEN UPDATE SET v = 2 WHEN NOT MATCHED THEN INSERT VALUES (s.id, 7)",
            5,
        ),
    ] {
        assert_limit_on("{public.t}", SOURCE, &format!("MERGE INTO t USING s ON t.id = s.id {actions}"), rows);
        let returning = format!("MERGE INTO t USING s ON t.id = s.id {actions} RETURNING merge_action(), t.id");
        assert_limit_on("{public.t}", SOURCE, &returning, rows);
        let branch = format!("WITH m AS ({returning}) SELECT count(*) FROM m");
        assert_limit_on("{public.t}", SOURCE, &branch, rows);
    }
}

#[test]
fn they_are_counted_on_partitions_too() {
    let setup = "
        CREATE TABLE t (id int PRIMARY KEY, v int NOT NULL DEFAULT 0) PARTITION BY RANGE (id);
        CREATE TABLE t_low PARTITION OF t FOR VALUES FROM (1) TO (4);
        CREATE TABLE t_high PARTITION OF t FOR VALUES FROM (4) TO (100);
        INSERT INTO t SELECT i, 0 FROM generate_series(1, 6) AS i;
        CREATE TABLE s (id int PRIMARY KEY); INSERT INTO s VALUES (1), (5)";
    let merge = "MERGE INTO t USING s ON t.id = s.id WHEN MATCHED THEN DELETE
                 WHEN NOT MATCHED BY SOURCE THEN UPDATE SET id = t.id + 10";
    assert_limit_on(
        "{public.t}",
        setup,
        "MERGE INTO t USING s ON t.id = s.id WHEN NOT MATCHED BY SOURCE THEN DELETE",
        4,
    );
    // 2, 3 and 4 move up; 1, 5 and 6 go.
    assert_limit_on("{public.t}", &setup.replace("(1), (5)", "(1), (5), (6)"), merge, 6);
}

/// The condition of the join narrows what is matched, and nothing else.
#[test]
fn require_where_wants_a_condition_for_rows_that_no_source_matches() {
    let mut bed = Bed::new(SOURCE);
    bed.policy("tables => '{public.t}', require_where => true");
    let merge = |actions: &str| format!("BEGIN; MERGE INTO t USING s ON t.id = s.id {actions}; ROLLBACK");
    for actions in [
        "WHEN NOT MATCHED BY SOURCE THEN DELETE",
        "WHEN MATCHED THEN UPDATE SET v = 1 WHEN NOT MATCHED BY SOURCE THEN UPDATE SET v = 2",
        "WHEN NOT MATCHED BY SOURCE AND now() > '2020-01-01' THEN DELETE",
    ] {
        let refusal = expect_refusal(bed.writer.batch_execute(&merge(actions)));
        assert_eq!(refusal.sqlstate, "WG002", "{actions}: {refusal:?}");
        bed.writer.batch_execute("ROLLBACK").unwrap();
    }
    for actions in [
        "WHEN MATCHED THEN DELETE",
        "WHEN MATCHED THEN DELETE WHEN NOT MATCHED BY TARGET THEN INSERT VALUES (s.id, 1)",
        "WHEN NOT MATCHED BY SOURCE AND t.v > 0 THEN DELETE",
        "WHEN MATCHED THEN UPDATE SET v = 1 WHEN NOT MATCHED BY SOURCE AND t.v > 0 THEN UPDATE SET v = 2",
    ] {
        bed.passes(&merge(actions));
    }
}

#[test]
fn what_a_merge_did_to_unmatched_rows_is_undone() {
    let mut bed = kept::Bed::new(SOURCE);
    let before = bed.table("t");
    let change = bed.change(
        "MERGE INTO t USING s ON t.id = s.id WHEN MATCHED THEN UPDATE SET v = 8 WHEN NOT MATCHED BY SOURCE AND t.id < 5 THEN DELETE
         WHEN NOT MATCHED BY SOURCE THEN UPDATE SET v = 9 RETURNING merge_action()",
    );
    assert_eq!(bed.table("t").len(), 4);
    assert_eq!(bed.undo(&change.to_string()), kept::one("public.t", 6, 0));
    assert_eq!(bed.table("t"), before);
}

#[cfg(since_pg18)]
mod with_18 {
    use super::*;

    #[test]
    fn returning_old_and_new_rows_is_counted() {
        let merge = "MERGE INTO t USING s ON t.id = s.id WHEN MATCHED THEN UPDATE SET v = 5 RETURNING old.v, new.v";
        assert_limit_on("{public.t}", SOURCE, merge, 2);
        assert_limit_on("{public.t}", SOURCE, "UPDATE t SET v = v + 1 RETURNING old.v, new.v", 6);
        assert_limit_on("{public.t}", SOURCE, "WITH d AS (DELETE FROM t RETURNING old.*) SELECT count(*) FROM d", 6);
        let upsert = "INSERT INTO t SELECT i, 1 FROM generate_series(4, 8) AS i
                      ON CONFLICT (id) DO UPDATE SET v = excluded.v RETURNING old.v, new.v";
        assert_limit_on("{public.t}", SOURCE, upsert, 3);
    }

    const VIRTUAL: &str = "
        CREATE TABLE t (id int PRIMARY KEY, v int NOT NULL DEFAULT 0, twice int GENERATED ALWAYS AS (v * 2) VIRTUAL);
        INSERT INTO t SELECT i, i FROM generate_series(1, 6) AS i";

    #[test]
    fn virtual_columns_are_left_out_and_never_put_back() {
        let mut bed = kept::Bed::new(VIRTUAL);
        let before = bed.table("t");
        let shown =
            bed.rows("SELECT before::text FROM writeguard.preview('UPDATE t SET v = v + 1 WHERE id = 3', sample => 5)");
        assert_eq!(shown.len(), 1, "{shown:?}");
        assert!(shown[0].contains("\"v\": 3") && !shown[0].contains("twice"), "{shown:?}");
        let change = bed.change("UPDATE t SET v = v + 10");
        assert_eq!(bed.undo(&change.to_string()), kept::one("public.t", 6, 0));
        assert_eq!(bed.table("t"), before);
        let change = bed.change("DELETE FROM t WHERE id > 1");
        assert_eq!(bed.undo(&change.to_string()), kept::one("public.t", 5, 0));
        assert_eq!(bed.table("t"), before);
    }

    #[test]
    fn tables_with_keys_over_time_are_counted() {
        let setup = "CREATE EXTENSION btree_gist;
            CREATE TABLE t (id int, at int4range, v int DEFAULT 0, PRIMARY KEY (id, at WITHOUT OVERLAPS));
            INSERT INTO t SELECT i, int4range(i, i + 1), 0 FROM generate_series(1, 6) AS i";
        assert_limit_on("{public.t}", setup, "UPDATE t SET v = 1", 6);
        assert_limit_on("{public.t}", setup, "DELETE FROM t WHERE id > 2", 4);
    }
}

#[cfg(since_pg19)]
mod with_19 {
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::thread;

    use super::*;

    /// Table, operation and rows of each line of a preview.
    #[track_caller]
    fn previewed(bed: &mut Bed, statement: &str) -> Vec<String> {
        let sql = "SELECT concat_ws(' ', relation, operation, rows) FROM writeguard.preview($1)";
        match bed.writer.query(sql, &[&statement]) {
            Ok(rows) => rows.iter().map(|row| row.get(0)).collect(),
            Err(error) => panic!("{statement}: {:?}", crate::common::Refusal::of(&error)),
        }
    }

    /// The row that was there is returned, or locked besides, and neither changed nor inserted.
    const SELECTED: [(&str, u64); 5] = [
        ("SELECT i, 1 FROM generate_series(1, 6) AS i ON CONFLICT (id) DO SELECT", 0),
        ("SELECT i, 1 FROM generate_series(1, 6) AS i ON CONFLICT (id) DO SELECT FOR UPDATE", 0),
        ("SELECT i, 1 FROM generate_series(4, 7) AS i ON CONFLICT (id) DO SELECT", 1),
        ("VALUES (1, 1), (7, 1), (2, 1), (8, 1), (3, 1) ON CONFLICT (id) DO SELECT FOR NO KEY UPDATE", 2),
        ("SELECT i, 1 FROM generate_series(5, 9) AS i ON CONFLICT (id) DO SELECT FOR SHARE WHERE t.id = 5", 3),
    ];

    const PARTITIONED: &str = "
        CREATE TABLE t (id int PRIMARY KEY, v int NOT NULL DEFAULT 0) PARTITION BY RANGE (id);
        CREATE TABLE t_low PARTITION OF t FOR VALUES FROM (1) TO (3);
        CREATE TABLE t_middle PARTITION OF t FOR VALUES FROM (3) TO (8);
        CREATE TABLE t_high PARTITION OF t FOR VALUES FROM (8) TO (100);
        INSERT INTO t SELECT i, 0 FROM generate_series(1, 6) AS i;";

    #[test]
    fn a_row_that_on_conflict_selects_is_no_write() {
        for setup in [SIX, PARTITIONED] {
            let mut bed = Bed::new(setup);
            bed.limit("{public.t*}", 0);
            for (source, _) in SELECTED {
                for sql in [
                    format!("INSERT INTO t {source} RETURNING id, v"),
                    format!("WITH i AS (INSERT INTO t {source} RETURNING id) SELECT count(*) FROM i"),
                ] {
                    bed.passes(&format!("BEGIN; {sql}; ROLLBACK"));
                    bed.writer.query(&sql, &[]).unwrap();
                    bed.writer
                        .batch_execute(
                            "SET writeguard.enabled = off; DELETE FROM t WHERE id > 6; RESET writeguard.enabled",
                        )
                        .unwrap();
                }
            }
        }
    }

    #[test]
    fn a_preview_counts_what_was_inserted_and_not_what_was_selected() {
        for setup in [SIX, PARTITIONED] {
            let mut bed = Bed::new(setup);
            for (source, inserted) in SELECTED {
                for sql in [
                    format!("INSERT INTO t {source} RETURNING id, v"),
                    format!("WITH i AS (INSERT INTO t {source} RETURNING id) DELETE FROM t USING i WHERE t.id = -i.id"),
                ] {
                    let lines = previewed(&mut bed, &sql);
                    let mut rows = 0;
                    for line in &lines {
                        let (_, number) = line.split_once(" insert ").unwrap_or_else(|| panic!("{sql}: {lines:?}"));
                        rows += number.parse::<u64>().unwrap();
                    }
                    assert_eq!(rows, inserted, "{sql}: {lines:?}");
                }
            }
            // The rows that it shows are those.
            let (source, _) = SELECTED[3];
            let statement = format!("INSERT INTO t {source} RETURNING id");
            let sql = "SELECT string_agg(shown ->> 'id', ' ' ORDER BY shown ->> 'id')
                       FROM writeguard.preview($1, sample => 9), jsonb_array_elements(after) AS shown";
            let shown: String = bed.writer.query_one(sql, &[&statement]).unwrap().get(0);
            assert_eq!(shown, "7 8", "{statement}");
        }
    }

    /// A trigger that selects what is there is not taken for one that inserts, while an undo may change no other rows.
    #[test]
    fn an_undo_goes_on_where_a_trigger_selects_what_is_there() {
        let mut bed = kept::Bed::new(&format!(
            "{SIX} CREATE TABLE seen (id int PRIMARY KEY); INSERT INTO seen SELECT i FROM generate_series(1, 6) AS i;
             CREATE FUNCTION see() RETURNS trigger LANGUAGE plpgsql AS $$
             DECLARE known int; BEGIN
                 INSERT INTO seen VALUES (new.id) ON CONFLICT (id) DO SELECT RETURNING id INTO known;
                 RETURN new;
             END $$;
             CREATE TRIGGER see BEFORE INSERT OR UPDATE ON t FOR EACH ROW EXECUTE FUNCTION see()"
        ));
        let before = bed.table("t");
        let change = bed.change("UPDATE t SET v = 5 WHERE id < 4");
        assert_eq!(bed.undo(&change.to_string()), kept::one("public.t", 3, 0));
        assert_eq!(bed.table("t"), before);
    }

    const BIG: &str =
        "CREATE TABLE t (id int PRIMARY KEY, v int NOT NULL DEFAULT 0, pad text DEFAULT repeat('x', 200));
        INSERT INTO t SELECT i FROM generate_series(1, 20000) AS i";

    const REPACKS: [&str; 4] = [
        "REPACK t",
        "REPACK t USING INDEX t_pkey",
        "REPACK (CONCURRENTLY) t",
        "REPACK (CONCURRENTLY) t USING INDEX t_pkey",
    ];

    #[test]
    fn repack_changes_no_rows_and_is_neither_refused_nor_counted() {
        let mut bed = Bed::new(BIG);
        bed.policy("tables => '{public.t}', operations => '{update,delete,truncate,drop}', max_rows => 0, require_where => true");
        let before = bed.contents();
        for repack in REPACKS {
            bed.passes(repack);
            bed.passes(&repack.replace("REPACK", "REPACK /* with a comment */"));
            assert_eq!(bed.contents(), before, "{repack}");
            // Its table is covered as before.
            bed.refused("UPDATE t SET v = 1 WHERE id = 1");
        }
        assert_eq!(
            bed.number("SELECT count(*) FROM writeguard.event WHERE kind NOT IN ('blocked', 'policy_changed')"),
            0
        );
    }

    #[test]
    fn writes_beside_a_concurrent_repack_are_counted_exactly() {
        let mut bed = Bed::new(BIG);
        bed.limit("{public.t}", 2);
        let done = AtomicBool::new(false);
        let mut writing = bed.db().admin();
        let changed = thread::scope(|scope| {
            let writer = scope.spawn(|| {
                let mut changed = 0;
                while !done.load(Ordering::Relaxed) || changed < 3 {
                    pass(&mut writing, "UPDATE t SET v = v + 1 WHERE id IN (1, 20000)");
                    refuse(&mut writing, "UPDATE t SET v = v + 1 WHERE id IN (2, 3, 4)");
                    changed += 1;
                }
                changed
            });
            for _ in 0..2 {
                bed.writer.batch_execute("REPACK (CONCURRENTLY) t").unwrap();
                bed.writer.batch_execute("REPACK (CONCURRENTLY) t USING INDEX t_pkey").unwrap();
            }
            done.store(true, Ordering::Relaxed);
            writer.join().unwrap()
        });
        assert_eq!(bed.number("SELECT sum(v) FROM t"), 2 * changed);
        assert_eq!(bed.number("SELECT count(*) FROM t WHERE v > 0"), 2);
        assert_eq!(bed.number("SELECT count(*) FROM t"), 20_000);
    }

    #[test]
    fn what_was_kept_before_and_during_a_concurrent_repack_is_undone_after_it() {
        let mut bed = kept::Bed::new(BIG);
        let before = bed.table("t");
        let first = bed.change("UPDATE t SET v = 7 WHERE id % 100 = 0");
        let second = bed.change("DELETE FROM t WHERE id % 1000 = 1");
        let mut repacking = bed.db.admin();
        let third = thread::scope(|scope| {
            let repack = scope.spawn(|| repacking.batch_execute("REPACK (CONCURRENTLY) t USING INDEX t_pkey").unwrap());
            let third = bed.change(
                "MERGE INTO t USING generate_series(11, 30) AS s(id) ON t.id = s.id
                 WHEN MATCHED AND t.id < 20 THEN DELETE WHEN MATCHED THEN UPDATE SET v = 9",
            );
            repack.join().unwrap();
            third
        });
        bed.run("REPACK (CONCURRENTLY) t");
        assert_eq!(bed.undo(&third.to_string()), kept::one("public.t", 20, 0));
        assert_eq!(bed.undo(&second.to_string()), kept::one("public.t", 20, 0));
        assert_eq!(bed.undo(&first.to_string()), kept::one("public.t", 200, 0));
        assert_eq!(bed.table("t"), before);
    }
}

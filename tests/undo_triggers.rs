//! User triggers do not fire while rows are put back: what they had done is in the images already. Constraints are
//! checked, and foreign keys act, as ever.

use crate::common::kept::{Bed, one};

/// A bill that keeps the total of its items, an audit that keeps each write, a numbering, and a guard that raises.
const BILL: &str = "
    CREATE TABLE bill (id int PRIMARY KEY, total int DEFAULT 0, writes int DEFAULT 0);
    CREATE TABLE item (id int PRIMARY KEY, bill int REFERENCES bill ON DELETE CASCADE, price int, number int);
    CREATE SEQUENCE numbers;
    CREATE FUNCTION total() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        UPDATE bill SET total = total + COALESCE(NEW.price, 0) - COALESCE(OLD.price, 0), writes = writes + 1
            WHERE id = COALESCE(NEW.bill, OLD.bill);
        RETURN NULL; END $$;
    CREATE FUNCTION number() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        NEW.number = nextval('numbers'); RETURN NEW; END $$;
    CREATE TRIGGER total AFTER INSERT OR UPDATE OR DELETE ON item FOR EACH ROW EXECUTE FUNCTION total();
    CREATE TRIGGER number BEFORE INSERT ON item FOR EACH ROW EXECUTE FUNCTION number();
    INSERT INTO bill VALUES (1), (2);
    INSERT INTO item VALUES (1, 1, 10), (2, 1, 20), (3, 2, 5)";

#[test]
fn totals_counters_and_numbers_come_back_once() {
    let mut bed = Bed::new(BILL);
    let all = |bed: &mut Bed| [bed.table("bill"), bed.table("item")];
    let before = all(&mut bed);
    for sql in ["UPDATE item SET price = 0", "DELETE FROM item", "DELETE FROM bill WHERE id = 1"] {
        let change = bed.change(sql);
        assert_ne!(all(&mut bed), before, "{sql}");
        let told: i64 = bed.undo(&format!("{change}, dry_run => true")).iter().map(|(_, rows, _)| rows).sum();
        let undone = bed.undo(&format!("{change}"));
        assert_eq!(undone.iter().map(|(_, rows, _)| rows).sum::<i64>(), told, "{sql}: {undone:?}");
        assert!(undone.iter().all(|(.., conflicts)| *conflicts == 0), "{sql}: {undone:?}");
        assert_eq!(all(&mut bed), before, "{sql}");
    }
    // Afterwards they fire again.
    bed.run("UPDATE item SET price = 11 WHERE id = 1");
    assert_eq!(bed.rows("SELECT total::text FROM bill WHERE id = 1"), ["31"]);
}

#[test]
fn a_trigger_that_raises_does_not_stand_in_the_way_but_a_constraint_does() {
    let mut bed = Bed::new(
        "CREATE TABLE up (id int PRIMARY KEY); INSERT INTO up VALUES (1), (2);
         CREATE TABLE t (id int PRIMARY KEY, up int REFERENCES up, v int CHECK (v > 0));
         CREATE TABLE seen (id int);
         INSERT INTO t VALUES (1, 1, 1), (2, 2, 2);",
    );
    let before = bed.table("t");
    let (deleted, updated) = (bed.change("DELETE FROM t WHERE id = 1"), bed.change("UPDATE t SET v = 7, up = NULL"));
    bed.run(
        "CREATE FUNCTION never() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'never'; END $$;
         CREATE TRIGGER a BEFORE INSERT OR UPDATE OR DELETE ON t FOR EACH ROW EXECUTE FUNCTION never();
         CREATE TRIGGER b BEFORE INSERT OR UPDATE OR DELETE ON t FOR EACH STATEMENT EXECUTE FUNCTION never();
         CREATE TRIGGER c AFTER INSERT OR UPDATE ON t FOR EACH ROW WHEN (NEW.v > 0) EXECUTE FUNCTION never();
         ALTER TABLE t ENABLE ALWAYS TRIGGER c;
         CREATE TRIGGER d AFTER UPDATE ON t REFERENCING OLD TABLE AS o NEW TABLE AS n
             FOR EACH STATEMENT EXECUTE FUNCTION never();
         CREATE CONSTRAINT TRIGGER e AFTER INSERT OR UPDATE ON t DEFERRABLE INITIALLY DEFERRED
             FOR EACH ROW EXECUTE FUNCTION never()",
    );
    assert!(bed.refused(&format!("SELECT writeguard.undo({updated}, triggers => 'fire')")).message.contains("never"));
    assert_eq!(bed.refused(&format!("SELECT writeguard.undo({updated}, triggers => 'none')")).sqlstate, "WG007");
    bed.undo(&format!("{updated}"));
    bed.undo(&format!("{deleted}"));
    assert_eq!(bed.table("t"), before);
    assert!(bed.refused("UPDATE t SET v = 3").message.contains("never"));
    bed.run("ALTER TABLE t DISABLE TRIGGER USER");
    let change = bed.change("DELETE FROM t WHERE id = 1");
    bed.run("DELETE FROM up WHERE id = 1");
    let refusal = bed.refused(&format!("SELECT writeguard.undo({change})"));
    assert!(refusal.sqlstate == "WG009" && refusal.detail.contains("t_up_fkey"), "{refusal:?}");
    // An undo that failed leaves nothing behind.
    bed.run("ALTER TABLE t ENABLE TRIGGER USER");
    assert!(bed.refused("UPDATE t SET v = 3").message.contains("never"));
}

#[test]
fn rows_return_to_partitions_whose_triggers_do_not_fire() {
    let mut bed = Bed::new(
        "CREATE TABLE p (id int, k int, v int, PRIMARY KEY (id, k)) PARTITION BY LIST (k);
         CREATE TABLE p1 PARTITION OF p FOR VALUES IN (1);
         CREATE TABLE p2 PARTITION OF p FOR VALUES IN (2) PARTITION BY RANGE (id);
         CREATE TABLE p21 PARTITION OF p2 FOR VALUES FROM (0) TO (100);
         CREATE TABLE log (what text);
         CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
             IF TG_OP <> 'DELETE' AND TG_WHEN = 'BEFORE' THEN NEW.v = NEW.v + 100; END IF;
             INSERT INTO log VALUES (concat_ws(' ', TG_WHEN, TG_OP, TG_LEVEL)); RETURN COALESCE(NEW, OLD); END $$;
         CREATE FUNCTION strict_note() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER SET search_path = public AS $$ BEGIN
             INSERT INTO log VALUES ('definer'); NEW.v = 0; RETURN NEW; END $$;
         INSERT INTO p SELECT i, 1 + i % 2, i FROM generate_series(1, 6) AS i;
         CREATE TRIGGER b BEFORE INSERT OR UPDATE OR DELETE ON p FOR EACH ROW EXECUTE FUNCTION note();
         CREATE TRIGGER a AFTER INSERT OR UPDATE OR DELETE ON p FOR EACH ROW EXECUTE FUNCTION note();
         CREATE TRIGGER z BEFORE INSERT ON p1 FOR EACH ROW EXECUTE FUNCTION strict_note();
         CREATE TRIGGER s AFTER INSERT ON p FOR EACH STATEMENT EXECUTE FUNCTION note()",
    );
    let before = bed.table("p");
    for sql in ["DELETE FROM p", "UPDATE p SET v = 0", "UPDATE p SET k = 3 - k", "TRUNCATE p"] {
        let change = bed.change(sql);
        bed.run("DELETE FROM log");
        assert_eq!(bed.undo(&format!("{change}")), one("public.p", 6, 0), "{sql}");
        assert_eq!(bed.table("p"), before, "{sql}");
        assert_eq!(bed.rows("SELECT what FROM log"), [] as [&str; 0], "{sql}");
    }
    bed.run("INSERT INTO p VALUES (7, 1, 7)");
    assert_eq!(bed.rows("SELECT DISTINCT what FROM log ORDER BY what").len(), 4, "they fire again");
}

#[test]
fn foreign_keys_act_without_the_triggers_of_the_tables_that_they_reach() {
    let mut bed = Bed::new(
        "CREATE TABLE up (id int PRIMARY KEY, v int);
         CREATE TABLE down (id int PRIMARY KEY, up int REFERENCES up ON UPDATE CASCADE, hits int DEFAULT 0);
         CREATE FUNCTION hit() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN NEW.hits = NEW.hits + 1; RETURN NEW; END $$;
         CREATE TRIGGER hit BEFORE UPDATE ON down FOR EACH ROW EXECUTE FUNCTION hit();
         INSERT INTO up VALUES (1, 1), (2, 2); INSERT INTO down VALUES (1, 1), (2, 2)",
    );
    let all = |bed: &mut Bed| [bed.table("up"), bed.table("down")];
    let before = all(&mut bed);
    let change = bed.change("UPDATE up SET id = id + 10");
    assert_eq!(bed.table("down"), ["(1,11,1)", "(2,12,1)"]);
    let undone = bed.undo(&format!("{change}"));
    assert!(undone.iter().all(|(.., conflicts)| *conflicts == 0), "{undone:?}");
    assert_eq!(all(&mut bed), before);
}

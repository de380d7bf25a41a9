//! Undo: rows and columns come back as they were, under the caller's rights, and nothing that changed since is lost.

use crate::common::Server;
use crate::common::kept::{Bed, ORDERS, one};

#[test]
fn changed_columns_come_back_and_only_those() {
    let mut bed = Bed::new(ORDERS);
    let before = bed.table("orders");
    let change = bed.change("UPDATE orders SET state = 'gone', price = 0 WHERE id <= 4");
    bed.run("UPDATE orders SET note = 'later' WHERE id = 1");
    assert_eq!(bed.undo(&format!("{change}")), one("public.orders", 4, 0));
    let mut after = before.clone();
    after[0] = "(1,open,1.10,later)".into();
    assert_eq!(bed.table("orders"), after);
}

#[test]
fn deleted_rows_come_back() {
    let mut bed = Bed::new(ORDERS);
    let before = bed.table("orders");
    let change = bed.change("DELETE FROM orders WHERE id % 2 = 0");
    assert_eq!(bed.table("orders").len(), 3);
    assert_eq!(bed.undo(&format!("{change}, dry_run => true")), one("public.orders", 3, 0));
    assert_eq!(bed.table("orders").len(), 3, "a dry run changes nothing");
    assert_eq!(bed.undo(&format!("{change}")), one("public.orders", 3, 0));
    assert_eq!(bed.table("orders"), before);
    let again = bed.refused(&format!("SELECT writeguard.undo({change})"));
    assert_eq!(again.sqlstate, "WG007", "{again:?}");
    assert!(again.detail.contains("postgres"), "{again:?}");
    let event = bed.rows(
        "SELECT concat_ws('|', kind, rows, relation, reason, approval) FROM writeguard.event WHERE kind = 'undone'",
    );
    assert_eq!(event, [format!("undone|3|public.orders|change {change}")]);
}

#[test]
fn what_changed_again_since_is_a_conflict() {
    let mut bed = Bed::new(ORDERS);
    let change = bed.change("UPDATE orders SET price = 0; DELETE FROM orders WHERE id = 6");
    bed.run("UPDATE orders SET price = 7 WHERE id = 2; DELETE FROM orders WHERE id = 3");
    bed.run("INSERT INTO orders VALUES (6, 'new', 1, 'another')");
    let before = bed.table("orders");
    let refusal = bed.refused(&format!("SELECT * FROM writeguard.undo({change})"));
    assert_eq!(refusal.sqlstate, "WG009", "{refusal:?}");
    assert!(refusal.detail.contains("3 rows") && refusal.detail.contains("(id)=(2)"), "{refusal:?}");
    assert!(refusal.hint.contains(&format!("SELECT * FROM writeguard.undo_conflicts({change});")), "{refusal:?}");
    assert_eq!(refusal.table, "orders");
    assert_eq!(bed.table("orders"), before);
    let conflicts = bed.rows(&format!(
        "SELECT concat_ws(' ', relation, key, was, wrote, COALESCE(is_now::text, '-')) \
         FROM writeguard.undo_conflicts({change}) ORDER BY key"
    ));
    assert_eq!(
        conflicts,
        [
            r#"public.orders {"id": 2} {"price": 2.20} {"price": 0} {"price": 7}"#,
            r#"public.orders {"id": 3} {"price": 3.30} {"price": 0} -"#,
            concat!(
                r#"public.orders {"id": 6} {"id": 6, "note": "n6", "price": 6.60, "state": "open"} "#,
                r#"{"id": 6, "note": "another", "price": 1, "state": "new"}"#
            ),
        ]
    );
    assert_eq!(bed.undo(&format!("{change}, dry_run => true")), one("public.orders", 3, 3));
    assert_eq!(bed.table("orders"), before);
    assert_eq!(bed.undo(&format!("{change}, 'skip'")), one("public.orders", 3, 3));
    assert_eq!(
        bed.table("orders"),
        ["(1,open,1.10,n1)", "(2,open,7,n2)", "(4,open,4.40,n4)", "(5,open,5.50,n5)", "(6,new,1,another)"]
    );
}

const EVERYTHING: &str = r#"
    CREATE TYPE mood AS ENUM ('sad', 'it''s ok', 'glad, "very"');
    CREATE TYPE pair AS (a int, b text);
    CREATE DOMAIN even AS int CHECK (VALUE % 2 = 0);
    CREATE DOMAIN given AS text NOT NULL DEFAULT 'x';
    CREATE TABLE all_types (
        id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        "Quoted ""name""" text, "order" int, flag boolean, small smallint, big bigint, exact numeric(12, 3), any_numeric numeric,
        real4 real, real8 double precision, cash money, fixed char(5), limited varchar(7), bytes bytea,
        at timestamptz, at_local timestamp, day date, hour time, hour_zone timetz, span interval,
        feeling mood, both_of pair, pairs pair[], halves even, stated given, numbers int[], texts text[][],
        doc jsonb, raw_doc json, tree xml, range_of int4range, ranges nummultirange, net cidr, host inet, mac macaddr,
        bits bit(3), some_bits bit varying(5), spot point, box_of box, key uuid, words tsvector, search tsquery,
        class regclass, long text, doubled int GENERATED ALWAYS AS ("order" * 2) STORED
    );
    INSERT INTO all_types ("Quoted ""name""", "order", flag, small, big, exact, any_numeric, real4, real8, cash, fixed, limited,
        bytes, at, at_local, day, hour, hour_zone, span, feeling, both_of, pairs, halves, stated, numbers, texts, doc, raw_doc,
        tree, range_of, ranges, net, host, mac, bits, some_bits, spot, box_of, key, words, search, class, long)
    VALUES
        (E'it''s "quoted" \\ back\n', 1, true, -1, 9223372036854775807, 123456789.125, 'NaN', 0.1, 0.1, '12.34', 'ab', 'abc',
         '\x00ff', 'infinity', '-infinity', '0044-03-15 BC', '23:59:59.999999', '12:00+05:30', '1 mon -2 days 03:04:05.678',
         'it''s ok', '(1,"x, y")', ARRAY['(1,a)', NULL, '(,"")']::pair[], 4, '', '{1,NULL,3}', '{{a,NULL},{"b,c","NULL"}}',
         'null', ' {"b": 1,  "a": [1.50, null]} ', '<a>b</a>', '[1,5)', '{[1,2],(3.5,)}', '10.0.0.0/8', '::1', '08:00:2b:01:02:03',
         '101', '1', '(1.1,-2)', '(1,1),(0,0)', 'a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11', '''the cat'':2 fat:1', 'a & !b',
         'pg_class', repeat('long text ', 100000)),
        (NULL, NULL, NULL, NULL, NULL, NULL, 1.10, 'NaN', '-infinity', NULL, NULL, NULL, NULL, '2026-03-29 02:30:00+02', NULL, NULL,
         NULL, NULL, NULL, NULL, NULL, NULL, NULL, 'given', NULL, NULL, NULL, NULL, NULL, 'empty', NULL, NULL, NULL, NULL, NULL, NULL,
         NULL, NULL, NULL, NULL, NULL, NULL, NULL);
    ALTER TABLE all_types ALTER long SET STORAGE EXTERNAL
"#;

/// How a session with other habits prints and reads values.
const OTHER_HABITS: &str = "SET DateStyle = 'German, DMY'; SET IntervalStyle = iso_8601; SET TimeZone = 'Asia/Kolkata';
    SET extra_float_digits = -3; SET bytea_output = escape; SET xmloption = document; SET search_path = pg_catalog;
    SET array_nulls = off; SET quote_all_identifiers = on";

#[test]
fn values_of_all_types_come_back_as_they_were() {
    // A server without XML has the type, and no value of it.
    let everything = if Server::shared().is_built_with("libxml") {
        EVERYTHING.to_owned()
    } else {
        EVERYTHING.replace("tree xml", "tree text")
    };
    for habits in ["", OTHER_HABITS] {
        let mut bed = Bed::new(&everything);
        bed.run("CREATE TABLE copy AS TABLE all_types");
        let same = "SELECT count(*)::text FROM all_types AS t JOIN copy AS c USING (id) WHERE t::text = c::text";
        let before = bed.table("all_types");
        assert_eq!(bed.rows(same), ["2"]);

        let change = bed.change("DELETE FROM public.all_types");
        bed.run(habits);
        assert_eq!(bed.undo(&format!("{change}")), one("public.all_types", 2, 0));
        assert_eq!(bed.table("all_types"), before);

        bed.run("RESET ALL");
        let set = r#""Quoted ""name""" = COALESCE(t."Quoted ""name""" || 'x', 'y'), "order" = 7, flag = false, small = 3, big = 4,
            exact = 5, any_numeric = 6, real4 = 7, real8 = 8, cash = '9', fixed = 'abcde', limited = 'l', bytes = '\x01',
            at = now(), at_local = now(), day = now(), hour = '1:00', hour_zone = '2:00+01', span = '1 year', feeling = 'sad',
            both_of = '(5,q)', pairs = '{}', halves = 8, stated = 'z', numbers = '{}', texts = '{}', doc = '{}', raw_doc = '{}',
            tree = 'text only', range_of = NULL, ranges = '{}', net = '1.1.1.1', host = '1.1.1.1', mac = NULL, bits = '000',
            some_bits = '', spot = '(0,0)', box_of = '(3,3),(2,2)', key = gen_random_uuid(), words = 'q', search = 'q',
            class = 'pg_type', long = repeat('other ', 10000)"#;
        let change = bed.change(&format!("UPDATE public.all_types AS t SET {set}"));
        bed.run(habits);
        assert_eq!(bed.undo(&format!("{change}")), one("public.all_types", 2, 0));
        assert_eq!(bed.table("all_types"), before, "{habits}");
        assert_eq!(bed.rows(same), ["2"]);
        assert_eq!(bed.rows("SELECT concat(doc = 'null', flag) FROM all_types ORDER BY id"), ["tt", ""]);
    }
}

#[test]
fn generated_and_identity_columns_are_not_asked() {
    let mut bed = Bed::new(
        "CREATE TABLE t (id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, v int, twice int GENERATED ALWAYS AS (v * 2) STORED);
         INSERT INTO t (v) VALUES (1), (2), (3)",
    );
    let change = bed.change("UPDATE t SET v = 10; DELETE FROM t WHERE id = 2");
    assert_eq!(bed.undo(&format!("{change}")), one("public.t", 3, 0));
    assert_eq!(bed.table("t"), ["(1,1,2)", "(2,2,4)", "(3,3,6)"]);
    // What identified a row was given anew: that cannot be set.
    let change = bed.change("UPDATE t SET id = DEFAULT WHERE v = 1");
    let refusal = bed.refused(&format!("SELECT writeguard.undo({change})"));
    assert_eq!(refusal.sqlstate, "428C9", "{refusal:?}");
    assert_eq!(bed.table("t"), ["(2,2,4)", "(3,3,6)", "(4,1,2)"]);
}

#[test]
fn a_row_changed_several_times_comes_back_to_its_beginning() {
    let mut bed = Bed::new(
        "CREATE TABLE t (id int PRIMARY KEY, a int, b int, stamp int DEFAULT 0);
         INSERT INTO t SELECT i, i, i FROM generate_series(1, 5) AS i;
         CREATE FUNCTION stamp() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
             IF NEW.stamp < 3 THEN UPDATE t SET stamp = stamp + 1 WHERE id = NEW.id; END IF;
             RETURN NULL;
         END $$;
         CREATE TRIGGER stamp AFTER UPDATE ON t FOR EACH ROW EXECUTE FUNCTION stamp();",
    );
    let before = bed.table("t");
    let change = bed.change("UPDATE t SET a = 0");
    assert_eq!(bed.rows("SELECT DISTINCT stamp::text FROM t"), ["3"]);
    assert_eq!(bed.undo(&format!("{change}")), one("public.t", 5, 0));
    assert_eq!(bed.table("t"), before);
    bed.run("ALTER TABLE t DISABLE TRIGGER stamp");
    // Updated and deleted, key changed on the way, key passed on.
    let change = bed.change(
        "UPDATE t SET a = 9 WHERE id = 1; UPDATE t SET id = 11 WHERE id = 1; DELETE FROM t WHERE id = 11; \
         UPDATE t SET id = 1 WHERE id = 2; UPDATE t SET id = 2, b = 8 WHERE id = 3; UPDATE t SET b = 7 WHERE id = 2",
    );
    assert_eq!(bed.table("t"), ["(1,2,2,0)", "(2,3,7,0)", "(4,4,4,0)", "(5,5,5,0)"]);
    assert_eq!(bed.undo(&format!("{change}")), one("public.t", 3, 0));
    assert_eq!(bed.table("t"), before);
}

#[test]
fn keys_that_were_moved_along_move_back() {
    let mut bed = Bed::new(
        "CREATE TABLE t (id int PRIMARY KEY, u int UNIQUE, v text); \
         INSERT INTO t SELECT i, i, 'v' || i FROM generate_series(50, 1, -1) AS i;
         CREATE TABLE s (id int PRIMARY KEY, u int UNIQUE DEFERRABLE);
         INSERT INTO s VALUES (1, 1), (2, 2)",
    );
    let before = bed.table("t");
    // Each takes the key that the row before it has just left; in any other order two of them collide.
    let change = bed.change("UPDATE t SET id = id + 1, u = u + 1");
    assert_eq!(bed.undo(&format!("{change}")), one("public.t", 50, 0));
    assert_eq!(bed.table("t"), before);
    let change = bed.change("UPDATE s SET u = 3 - u");
    assert_eq!(bed.undo(&format!("{change}")), one("public.s", 2, 0));
    assert_eq!(bed.table("s"), ["(1,1)", "(2,2)"]);
    let change =
        bed.change("DELETE FROM t WHERE id = 1; UPDATE t SET id = 1 WHERE id = 2; UPDATE t SET u = 1 WHERE id = 1");
    assert_eq!(bed.undo(&format!("{change}")), one("public.t", 2, 0));
    assert_eq!(bed.table("t"), before);
}

#[test]
fn parents_and_children_come_back_together() {
    let mut bed = Bed::new(
        "CREATE TABLE a_child (id int PRIMARY KEY, parent int NOT NULL);
         CREATE TABLE parent (id int PRIMARY KEY, best int);
         CREATE TABLE z_grandchild (id int PRIMARY KEY, child int NOT NULL REFERENCES a_child ON DELETE CASCADE ON UPDATE CASCADE);
         CREATE TABLE self (id int PRIMARY KEY, boss int REFERENCES self);
         INSERT INTO parent VALUES (1, NULL), (2, NULL);
         INSERT INTO a_child SELECT i, 1 + i % 2 FROM generate_series(1, 10) AS i;
         INSERT INTO z_grandchild SELECT i, 1 + i % 10 FROM generate_series(1, 30) AS i;
         UPDATE parent SET best = 1 WHERE id = 2; UPDATE parent SET best = 2 WHERE id = 1;
         INSERT INTO self VALUES (1, NULL), (2, 1), (3, 2), (4, 4);
         ALTER TABLE a_child ADD FOREIGN KEY (parent) REFERENCES parent ON DELETE CASCADE ON UPDATE CASCADE;
         ALTER TABLE parent ADD FOREIGN KEY (best) REFERENCES a_child ON DELETE SET NULL;",
    );
    let tables = ["a_child", "parent", "z_grandchild", "self"];
    let all = |bed: &mut Bed| tables.map(|table| bed.table(table));
    let before = all(&mut bed);
    let change = bed.change("DELETE FROM parent");
    assert_eq!(all(&mut bed)[..3], [vec![], vec![], vec![]] as [Vec<String>; 3]);
    let undone = bed.undo(&format!("{change}"));
    assert_eq!(undone.iter().map(|(_, restored, _)| *restored).sum::<i64>(), 42, "{undone:?}");
    assert_eq!(all(&mut bed), before);
    let change = bed.change("UPDATE parent SET id = id + 100");
    assert_eq!(bed.rows("SELECT DISTINCT parent::text FROM a_child ORDER BY 1"), ["101", "102"]);
    bed.undo(&format!("{change}"));
    assert_eq!(all(&mut bed), before);
    let change = bed.change("DELETE FROM self WHERE id <> 1");
    assert_eq!(bed.undo(&format!("{change}")), one("public.self", 3, 0));
    assert_eq!(all(&mut bed), before);
    // A parent that went since: nothing is undone.
    let change = bed.change("DELETE FROM a_child WHERE id = 10");
    bed.run("DELETE FROM parent WHERE id = 1");
    let refusal = bed.refused(&format!("SELECT writeguard.undo({change})"));
    assert_eq!(refusal.sqlstate, "WG009", "{refusal:?}");
    assert!(refusal.detail.contains("a_child_parent_fkey"), "{refusal:?}");
}

#[test]
fn triggers_that_are_to_fire_do_so_as_for_one_statement() {
    let mut bed = Bed::new(
        "CREATE TABLE t (id int PRIMARY KEY, v int, w int DEFAULT 0); INSERT INTO t SELECT i, i FROM generate_series(1, 4) AS i;
         CREATE TABLE log (what text);
         CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
             INSERT INTO log VALUES (concat_ws(' ', TG_WHEN, TG_OP, TG_LEVEL)); RETURN COALESCE(NEW, OLD);
         END $$;
         CREATE FUNCTION hold() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
             IF NEW.id = 2 THEN RETURN NULL; END IF; NEW.w = NEW.w + 1; RETURN NEW;
         END $$;",
    );
    let change = bed.change("UPDATE t SET v = 0 WHERE id < 3; DELETE FROM t WHERE id = 4");
    bed.run(
        "CREATE TRIGGER n1 BEFORE UPDATE OR INSERT ON t FOR EACH STATEMENT EXECUTE FUNCTION note();
         CREATE TRIGGER n2 AFTER UPDATE OR INSERT ON t FOR EACH STATEMENT EXECUTE FUNCTION note();
         CREATE TRIGGER n3 AFTER UPDATE OR INSERT ON t FOR EACH ROW EXECUTE FUNCTION note();
         CREATE TRIGGER h BEFORE UPDATE OR INSERT ON t FOR EACH ROW EXECUTE FUNCTION hold()",
    );
    let before = bed.table("t");
    let refusal = bed.refused(&format!("SELECT writeguard.undo({change}, triggers => 'fire')"));
    assert_eq!(refusal.sqlstate, "WG009", "{refusal:?}");
    assert!(refusal.detail.contains("2 rows") && refusal.detail.contains("trigger"), "{refusal:?}");
    assert_eq!(bed.table("t"), before);
    assert_eq!(bed.undo(&format!("{change}, 'skip', true, 'fire'")), one("public.t", 1, 2));
    assert_eq!(bed.rows("SELECT what FROM log"), [] as [&str; 0]);
    assert_eq!(bed.undo(&format!("{change}, 'skip', triggers => 'fire'")), one("public.t", 1, 2));
    assert_eq!(bed.table("t"), ["(1,1,1)", "(2,0,0)", "(3,3,0)", "(4,4,1)"]);
    assert_eq!(
        bed.rows("SELECT count(*) || ' ' || what FROM log GROUP BY what ORDER BY what"),
        [
            "1 AFTER INSERT ROW",
            "1 AFTER INSERT STATEMENT",
            "1 AFTER UPDATE ROW",
            "1 AFTER UPDATE STATEMENT",
            "1 BEFORE INSERT STATEMENT",
            "1 BEFORE UPDATE STATEMENT"
        ]
    );
}

#[test]
fn a_table_that_changed_since_is_dealt_with_or_refused() {
    let setup = "CREATE TABLE t (id int PRIMARY KEY, a text, b text); \
                 INSERT INTO t SELECT i, 'a' || i, 'b' || i FROM generate_series(1, 3) AS i";
    let statement = "UPDATE t SET a = 'x', b = 'y' WHERE id = 1; DELETE FROM t WHERE id = 2";
    // What happens to the table; what the undo then says, or the table's rows.
    for (ddl, refused, rows) in [
        ("ALTER TABLE t ADD c int DEFAULT 7", "", &["(1,a1,b1,7)", "(2,a2,b2,7)", "(3,a3,b3,7)"]),
        ("ALTER TABLE t DROP b", "", &["(1,a1)", "(2,a2)", "(3,a3)"]),
        ("ALTER TABLE t RENAME b TO c", "", &["(1,a1,b1)", "(2,a2,b2)", "(3,a3,b3)"]),
        ("ALTER TABLE t RENAME TO moved; CREATE TABLE t (id int PRIMARY KEY, a text, b text)", "", &[""; 3]),
        // Of a column that is another one by the same name nothing is known.
        (
            "ALTER TABLE t DROP b; ALTER TABLE t ADD b text DEFAULT 'new'",
            "",
            &["(1,a1,new)", "(2,a2,new)", "(3,a3,new)"],
        ),
        ("ALTER TABLE t ALTER a TYPE varchar(1)  USING left(a, 1)", "WG007", &[""; 3]),
        (
            "ALTER TABLE t ALTER id TYPE bigint; ALTER TABLE t ALTER a TYPE varchar(5)",
            "",
            &["(1,a1,b1)", "(2,a2,b2)", "(3,a3,b3)"],
        ),
        ("ALTER TABLE t ADD c int; UPDATE t SET c = 1; ALTER TABLE t ALTER c SET NOT NULL", "WG009", &[""; 3]),
        ("ALTER TABLE t DROP CONSTRAINT t_pkey", "WG007", &[""; 3]),
        // What is unique now may not have been then, so rows are told apart by the key that they had.
        ("ALTER TABLE t DROP CONSTRAINT t_pkey; ALTER TABLE t ADD PRIMARY KEY (a)", "WG007", &[""; 3]),
        (
            "ALTER TABLE t DROP CONSTRAINT t_pkey; ALTER TABLE t RENAME id TO key; ALTER TABLE t ADD PRIMARY KEY (key)",
            "",
            &["(1,a1,b1)", "(2,a2,b2)", "(3,a3,b3)"],
        ),
        (
            "ALTER TABLE t ADD c serial; ALTER TABLE t DROP CONSTRAINT t_pkey, ADD PRIMARY KEY (id, c)",
            "WG007",
            &[""; 3],
        ),
        ("DROP TABLE t; CREATE TABLE t (id int PRIMARY KEY, a text, b text)", "WG007", &[""; 3]),
    ] {
        let mut bed = Bed::new(setup);
        let change = bed.change(statement);
        bed.run(ddl);
        if refused.is_empty() {
            let table = if rows[0].is_empty() { "moved" } else { "t" };
            assert_eq!(bed.undo(&format!("{change}")), one(&format!("public.{table}"), 2, 0), "{ddl}");
            let rows = if rows[0].is_empty() { &["(1,a1,b1)", "(2,a2,b2)", "(3,a3,b3)"] } else { rows };
            assert_eq!(bed.table(table), rows, "{ddl}");
        } else {
            let before = bed.table("t");
            let refusal = bed.refused(&format!("SELECT writeguard.undo({change})"));
            assert_eq!(refusal.sqlstate, refused, "{ddl}: {refusal:?}");
            assert!(refused != "WG007" || !refusal.hint.is_empty() && !refusal.detail.is_empty(), "{refusal:?}");
            assert_eq!(bed.table("t"), before, "{ddl}");
        }
    }
    // Without the columns' numbers, names are all there is to go by.
    let mut bed = Bed::new(setup);
    let change = bed.change(statement);
    bed.run("UPDATE writeguard.change_relation SET columns = NULL; ALTER TABLE t RENAME b TO c");
    let refusal = bed.refused(&format!("SELECT writeguard.undo({change})"));
    assert_eq!(refusal.sqlstate, "WG007", "{refusal:?}");
    assert!(refusal.hint.contains("RENAME COLUMN … TO \"b\""), "{refusal:?}");
}

#[test]
fn names_are_found_as_they_are() {
    let mut bed = Bed::new(
        r#"CREATE SCHEMA "My ""Schema"""; CREATE TABLE "My ""Schema"""."Select" ("from" int, "K 2" text COLLATE "C", "user" text,
             PRIMARY KEY ("K 2", "from"));
         INSERT INTO "My ""Schema"""."Select" VALUES (1, 'é', 'a'), (2, 'ü', 'b')"#,
    );
    let before = bed.table(r#""My ""Schema"""."Select""#);
    let change = bed.change(
        r#"UPDATE "My ""Schema"""."Select" SET "user" = 'x'; DELETE FROM "My ""Schema"""."Select" WHERE "from" = 2"#,
    );
    assert_eq!(bed.undo(&format!("{change}")), one(r#""My ""Schema"""."Select""#, 2, 0));
    assert_eq!(bed.table(r#""My ""Schema"""."Select""#), before);
}

#[test]
fn keys_of_many_types_find_their_rows() {
    let nocase = if Server::shared().is_built_with("icu") {
        "CREATE COLLATION nocase (provider = icu, locale = 'und-u-ks-level2', deterministic = false)"
    } else {
        "CREATE COLLATION nocase FROM \"C\""
    };
    for (of, one_key, other_key) in [
        ("text COLLATE \"C\"", "a", "B"),
        ("varchar(10)", "a", "b"),
        ("char(4)", "a", "b"),
        ("numeric", "1.10", "NaN"),
        ("timestamptz", "infinity", "2026-01-01"),
        ("uuid", "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11", "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a12"),
        ("jsonb", "{\"a\": 1}", "null"),
        ("int[]", "{1,2}", "{}"),
        ("mood", "sad", "glad"),
        ("int4range", "[1,2)", "empty"),
        ("inet", "::1", "10.0.0.1"),
        ("bytea", "\\x00", "\\xff"),
        ("words", "one", "two"),
        ("name", "one", "two"),
        ("pair", "(1,a)", "(2,)"),
        ("float8", "-0", "NaN"),
        ("folded", "Aa", "b"),
    ] {
        let mut bed = Bed::new(
            &format!(
                "CREATE TYPE mood AS ENUM ('sad', 'glad'); CREATE DOMAIN words AS varchar; CREATE TYPE pair AS (a int, b text);
                 {nocase};
                 CREATE DOMAIN folded AS text COLLATE nocase;
                 CREATE TABLE t (k {of} PRIMARY KEY, v int); INSERT INTO t VALUES ('{one_key}', 1), ('{other_key}', 1)"
            ),
        );
        let before = bed.table("t");
        let change = bed.change("UPDATE t SET v = 2");
        assert_eq!(bed.undo(&format!("{change}")), one("public.t", 2, 0), "{of}");
        let change = bed.change("DELETE FROM t");
        assert_eq!(bed.undo(&format!("{change}")), one("public.t", 2, 0), "{of}");
        assert_eq!(bed.table("t"), before, "{of}");
    }
}

#[test]
fn children_and_partitions_are_told_apart() {
    let mut bed = Bed::new(
        "CREATE TABLE base (id int PRIMARY KEY, v int); CREATE TABLE child (PRIMARY KEY (id)) INHERITS (base);
         INSERT INTO base VALUES (1, 1); INSERT INTO child VALUES (1, 10), (2, 20);
         CREATE TABLE p (id int, r int, v int, PRIMARY KEY (id, r)) PARTITION BY LIST (r);
         CREATE TABLE p1 PARTITION OF p FOR VALUES IN (1);
         CREATE TABLE p2 (v int, gone int, r int NOT NULL, id int NOT NULL); ALTER TABLE p2 DROP gone;
         ALTER TABLE p ATTACH PARTITION p2 FOR VALUES IN (2);
         INSERT INTO p SELECT i, 1 + i % 2, i FROM generate_series(1, 6) AS i",
    );
    let before = (bed.table("base"), bed.table("p"));
    let change = bed.change("DELETE FROM ONLY base");
    assert_eq!(bed.undo(&format!("{change}")), one("public.base", 1, 0));
    let change = bed.change("UPDATE base SET v = v + 1");
    assert_eq!(bed.undo(&format!("{change}")), [one("public.base", 1, 0), one("public.child", 2, 0)].concat());
    let change = bed.change("UPDATE p SET v = 0; DELETE FROM p WHERE id > 4");
    assert_eq!(bed.undo(&format!("{change}")), one("public.p", 6, 0));
    assert_eq!((bed.table("base"), bed.table("p")), before);
    assert_eq!(bed.rows("SELECT string_agg(v::text, ',' ORDER BY v) FROM p2"), ["1,3,5"]);
}

#[test]
fn a_hundred_thousand_rows_come_back() {
    let mut bed = Bed::new("");
    bed.run(
        "CREATE TABLE t (id int PRIMARY KEY, v int, note text); INSERT INTO t SELECT i, i, 'note ' || i FROM generate_series(1, 100000) AS i;
         CREATE TABLE copy AS TABLE t;
         INSERT INTO writeguard.change_statement (changed_at, xid, login, role, kept_until)
           SELECT now(), '1', 'x', 'x', now() + '1 day' FROM generate_series(1, 3);
         INSERT INTO writeguard.change_relation (change, relation, name, operation, rows, bytes)
           SELECT i, 't'::regclass, 'public.t', 'x', 100000, 0 FROM generate_series(1, 3) AS i;
         INSERT INTO writeguard.image SELECT 1, i, 't'::regclass, 'update', jsonb_build_object('id', i::text, 'v', i::text),
           jsonb_build_object('id', i::text, 'v', '0') FROM generate_series(1, 100000) AS i;
         INSERT INTO writeguard.image SELECT 2, i, 't'::regclass, 'delete', jsonb_build_object('id', i::text, 'v', i::text, 'note', 'note ' || i)
           FROM generate_series(1, 100000) AS i;
         INSERT INTO writeguard.image SELECT 3, i, 't'::regclass, 'update', jsonb_build_object('id', i::text),
           jsonb_build_object('id', (i + 100000)::text) FROM generate_series(1, 100000) AS i;",
    );
    for (change, sql) in [(1, "UPDATE t SET v = 0"), (2, "DELETE FROM t"), (3, "UPDATE t SET id = id + 100000")] {
        bed.run(sql);
        let start = std::time::Instant::now();
        assert_eq!(bed.undo(&format!("{change}")), one("public.t", 100_000, 0));
        eprintln!("{sql}: {:?}", start.elapsed());
        assert_eq!(bed.rows("SELECT count(*)::text FROM (TABLE t EXCEPT TABLE copy) AS x"), ["0"], "{sql}");
        assert_eq!(bed.rows("SELECT count(*)::text FROM t"), ["100000"], "{sql}");
    }
}

/// The latest change's number and the change that it took back.
#[track_caller]
fn latest(bed: &mut Bed) -> (i64, Option<i64>) {
    let sql = "SELECT id, undoes FROM writeguard.change_statement ORDER BY id DESC LIMIT 1";
    let row = bed.reader.query_one(sql, &[]).expect("a change");
    (row.get(0), row.get(1))
}

#[test]
fn an_undo_can_be_undone_and_that_as_well() {
    let mut bed = Bed::new(&format!(
        "{ORDERS}; CREATE TABLE lines (id int PRIMARY KEY, of int REFERENCES orders ON DELETE CASCADE ON UPDATE CASCADE);
         INSERT INTO lines SELECT i, 1 + i % 6 FROM generate_series(1, 12) AS i;
         CREATE TABLE parted (id int, r int, PRIMARY KEY (id, r)) PARTITION BY LIST (r);
         CREATE TABLE parted1 PARTITION OF parted FOR VALUES IN (1); CREATE TABLE parted2 PARTITION OF parted FOR VALUES IN (2);
         INSERT INTO parted SELECT i, 1 + i % 2 FROM generate_series(1, 6) AS i"
    ));
    let tables = ["orders", "lines", "parted"];
    let all = |bed: &mut Bed| tables.map(|table| bed.table(table));
    for statement in [
        "UPDATE orders SET price = price + 1, state = NULL WHERE id < 4",
        "DELETE FROM orders WHERE id < 4",
        "UPDATE orders SET id = id + 10 WHERE id < 4",
        "UPDATE parted SET r = 3 - r; DELETE FROM parted WHERE id = 1",
        "DELETE FROM orders WHERE id = 1; UPDATE orders SET id = 1 WHERE id = 2; UPDATE orders SET note = 'x'",
        "TRUNCATE orders, lines",
    ] {
        let right = all(&mut bed);
        let change = bed.change(statement);
        let wrong = all(&mut bed);
        assert_ne!(right, wrong);
        let (mut last, mut expected) = (change, [&right, &wrong].into_iter().cycle());
        for round in 0..4 {
            bed.undo(&format!("{last}"));
            assert_eq!(&all(&mut bed), expected.next().unwrap(), "{statement}, round {round}");
            let (next, undoes) = latest(&mut bed);
            assert_eq!(undoes, Some(last), "{statement}");
            // What was undone is told of the first change, too.
            let undone = "SELECT (undone_at IS NOT NULL)::text FROM writeguard.change_statement WHERE id = ";
            assert_eq!(bed.rows(&format!("{undone} {change}")), [(round % 2 == 0).to_string()], "{statement}");
            let refusal = bed.refused(&format!("SELECT writeguard.undo({last})"));
            assert_eq!(refusal.sqlstate, "WG007", "{refusal:?}");
            assert!(refusal.hint.contains(&format!("writeguard.undo({next})")), "{refusal:?}");
            last = next;
        }
        // It was taken back twice, so it can be undone again.
        assert_eq!(all(&mut bed), wrong);
        bed.undo(&format!("{change}"));
        assert_eq!(all(&mut bed), right, "{statement}");
    }
}

#[test]
fn rows_that_came_back_go_again_only_as_they_were() {
    let mut bed = Bed::new(
        "CREATE TABLE t (id int PRIMARY KEY, v int, at timestamptz DEFAULT now()); INSERT INTO t SELECT i, i FROM generate_series(1, 4) AS i;
         CREATE TABLE log (what text);
         CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
             INSERT INTO log VALUES (NEW.id); RETURN NEW; END $$;
         CREATE TRIGGER note BEFORE INSERT ON t FOR EACH ROW EXECUTE FUNCTION note()",
    );
    let change = bed.change("DELETE FROM t");
    bed.run("ALTER TABLE t ADD extra int DEFAULT 5");
    assert_eq!(bed.undo(&format!("{change}, triggers => 'fire'")), one("public.t", 4, 0));
    assert_eq!(
        bed.rows("SELECT concat_ws(' ', id, v, extra) FROM t ORDER BY id"),
        ["1 1 5", "2 2 5", "3 3 5", "4 4 5"]
    );
    let (redo, _) = latest(&mut bed);
    bed.run("UPDATE t SET extra = 6 WHERE id = 1; DELETE FROM t WHERE id = 2");
    assert_eq!(bed.refused(&format!("SELECT writeguard.undo({redo})")).sqlstate, "WG009");
    assert_eq!(
        bed.rows(&format!("SELECT concat_ws(' ', key, was, wrote->>'extra', is_now->>'extra') FROM writeguard.undo_conflicts({redo}) ORDER BY key")),
        [r#"{"id": 1} 5 6"#, r#"{"id": 2} 5"#]
    );
    assert_eq!(bed.undo(&format!("{redo}, 'skip'")), one("public.t", 2, 2));
    assert_eq!(bed.rows("SELECT concat_ws(' ', id, extra) FROM t"), ["1 6"]);
    // What a trigger wrote elsewhere is nothing that came back.
    assert_eq!(bed.rows("SELECT count(*)::text FROM log"), ["4"]);
}

#[test]
fn an_overridden_write_is_undone() {
    let mut bed = Bed::new(ORDERS);
    bed.run("SELECT writeguard.set_policy('kept', max_rows => 2, override => 'flag', undo => '1 day')");
    let before = bed.table("orders");
    bed.run("SET writeguard.override = on; UPDATE orders SET price = 0");
    let listed =
        bed.rows("SELECT concat_ws(' ', id, relation, operation, rows, undone_at, approval) FROM writeguard.change");
    assert_eq!(listed, ["1 public.orders update 6"]);
    assert_eq!(bed.undo("1"), one("public.orders", 6, 0));
    assert_eq!(bed.table("orders"), before);
    assert_eq!(
        bed.rows(
            "SELECT concat_ws(' ', id, relation, operation, rows, undoes, undone_by) FROM writeguard.change ORDER BY id"
        ),
        ["1 public.orders update 6 postgres", "2 public.orders update 6 1"]
    );
    // As limited as before.
    assert_eq!(bed.refused("UPDATE orders SET price = 0").sqlstate, "WG001");
    let kinds = bed.rows("SELECT kind FROM writeguard.event WHERE kind IN ('overridden', 'undone') ORDER BY id");
    assert_eq!(kinds, ["overridden", "undone"]);
}

#[test]
fn each_undo_is_a_change_of_its_own_also_within_one_statement() {
    let mut bed = Bed::new(ORDERS);
    let first = bed.change("UPDATE orders SET price = 0 WHERE id = 1");
    let second = bed.change("UPDATE orders SET price = 0 WHERE id = 2");
    let refusal = bed.refused(&format!("SELECT writeguard.undo({first}) FROM generate_series(1, 2)"));
    assert_eq!(refusal.sqlstate, "WG007", "{refusal:?}");
    bed.run(&format!("SELECT writeguard.undo({first}), writeguard.undo({second})"));
    let undone = bed.rows(
        "SELECT concat_ws(' ', id, undoes) FROM writeguard.change_statement WHERE undoes IS NOT NULL ORDER BY id",
    );
    assert_eq!(undone, [format!("3 {first}"), format!("4 {second}")]);
}

#[test]
fn rows_that_are_not_kept_any_more_do_not_come_back_in_part() {
    let mut bed = Bed::new(ORDERS);
    let change = bed.change("UPDATE orders SET price = 0");
    bed.run(&format!(
        "DELETE FROM writeguard.image WHERE change = {change} AND number = (SELECT min(number) FROM writeguard.image)"
    ));
    assert_eq!(bed.refused(&format!("SELECT writeguard.undo({change})")).sqlstate, "WG007");
    let change = bed.change("UPDATE orders SET price = 1");
    bed.run("UPDATE writeguard.change_statement SET kept_until = now()");
    assert_eq!(bed.refused(&format!("SELECT writeguard.undo({change})")).sqlstate, "WG007");
    assert_eq!(bed.refused(&format!("SELECT writeguard.undo_conflicts({change})")).sqlstate, "WG007");
    assert_eq!(bed.rows("SELECT DISTINCT price::text FROM orders"), ["1"]);
}

//! Undo: rows and columns come back as they were, under the caller's rights, and nothing that changed since is lost.

mod common;

use common::{Database, Refusal, Server, expect_refusal};
use postgres::Client;

/// Stands in for the capture: AFTER triggers that keep images.
const CAPTURE: &str = r#"
CREATE FUNCTION public.test_keep() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
DECLARE
    b jsonb := '{}'; a jsonb := '{}'; name text; was text; now text; is_key boolean; root oid := TG_ARGV[0]::oid;
BEGIN
    IF current_setting('test.change', true) IS NULL OR current_setting('test.change', true) = '' THEN
        RETURN NULL;
    END IF;
    FOR name, is_key IN
        SELECT attname, attnum = ANY (SELECT unnest(indkey) FROM pg_index WHERE indrelid = root AND indisprimary)
        FROM pg_attribute WHERE attrelid = root AND attnum > 0 AND NOT attisdropped
    LOOP
        EXECUTE format('SELECT ($1).%I::text', name) INTO was USING OLD;
        IF TG_OP = 'DELETE' THEN
            b := b || jsonb_build_object(name, was);
        ELSE
            EXECUTE format('SELECT ($1).%I::text', name) INTO now USING NEW;
            IF is_key OR was IS DISTINCT FROM now THEN
                b := b || jsonb_build_object(name, was);
                a := a || jsonb_build_object(name, now);
            END IF;
        END IF;
    END LOOP;
    INSERT INTO writeguard.image (change, number, relation, operation, before, after)
        VALUES (current_setting('test.change')::bigint, nextval('public.test_number'), root, lower(TG_OP), b,
                CASE TG_OP WHEN 'UPDATE' THEN a END);
    INSERT INTO writeguard.change_relation (change, relation, name, operation, rows, bytes, columns)
        VALUES (current_setting('test.change')::bigint, root, root::regclass::text, lower(TG_OP), 1, 0,
                (SELECT jsonb_object_agg(attname, attnum) FROM pg_attribute
                 WHERE attrelid = root AND attnum > 0 AND NOT attisdropped))
        ON CONFLICT (change, relation, operation) DO UPDATE SET rows = change_relation.rows + 1;
    RETURN NULL;
END $$;
CREATE SEQUENCE public.test_number;
"#;

struct Bed {
    #[expect(dead_code, reason = "the database lives as long as its sessions")]
    db: Database,
    admin: Client,
    /// A second session, which sees only what was committed.
    reader: Client,
}

impl Bed {
    fn new(setup: &str, tables: &[&str]) -> Bed {
        let db = Server::shared().database();
        let mut bed = Bed { admin: db.admin(), reader: db.admin(), db };
        bed.run(CAPTURE);
        bed.run(setup);
        for table in tables {
            bed.run(&format!(
                "DO $$ BEGIN EXECUTE format('CREATE TRIGGER zz_keep AFTER UPDATE OR DELETE ON {table} FOR EACH ROW \
                 EXECUTE FUNCTION public.test_keep(%L)', '{table}'::regclass::oid); END $$"
            ));
        }
        bed
    }

    #[track_caller]
    fn run(&mut self, sql: &str) {
        if let Err(error) = self.admin.batch_execute(sql) {
            panic!("{sql}: {:?}", Refusal::of(&error));
        }
    }

    /// Runs a statement whose rows are kept, and gives the number of the change.
    #[track_caller]
    fn change(&mut self, sql: &str) -> i64 {
        let id: i64 = self
            .admin
            .query_one(
                "INSERT INTO writeguard.change_statement (changed_at, xid, login, role, statement, kept_until)
                 VALUES (now(), pg_current_xact_id(), 'x', 'x', $1, now() + '1 day') RETURNING id",
                &[&sql],
            )
            .expect("a change")
            .get(0);
        self.run(&format!("SET test.change = {id}; {sql}; RESET test.change"));
        id
    }

    /// The rows of a query in the second session, as text.
    #[track_caller]
    fn rows(&mut self, sql: &str) -> Vec<String> {
        rows(&mut self.reader, sql)
    }

    #[track_caller]
    fn table(&mut self, table: &str) -> Vec<String> {
        self.rows(&format!("SELECT t::text FROM {table} AS t ORDER BY t::text"))
    }

    /// `undo` and its result: table, restored, conflicts.
    #[track_caller]
    fn undo(&mut self, arguments: &str) -> Vec<(String, i64, i64)> {
        undo(&mut self.admin, arguments)
    }

    #[track_caller]
    fn refused(&mut self, sql: &str) -> Refusal {
        expect_refusal(self.admin.batch_execute(sql))
    }
}

#[track_caller]
fn rows(client: &mut Client, sql: &str) -> Vec<String> {
    match client.query(sql, &[]) {
        Ok(rows) => rows.iter().map(|row| row.get::<_, Option<String>>(0).unwrap_or("NULL".into())).collect(),
        Err(error) => panic!("{sql}: {:?}", error),
    }
}

#[track_caller]
fn undo(client: &mut Client, arguments: &str) -> Vec<(String, i64, i64)> {
    let sql = format!("SELECT relation, restored, conflicts FROM writeguard.undo({arguments})");
    match client.query(&sql, &[]) {
        Ok(rows) => rows.iter().map(|row| (row.get(0), row.get(1), row.get(2))).collect(),
        Err(error) => panic!("{sql}: {:?}", Refusal::of(&error)),
    }
}

fn one(relation: &str, restored: i64, conflicts: i64) -> Vec<(String, i64, i64)> {
    vec![(relation.to_owned(), restored, conflicts)]
}

const ORDERS: &str = "CREATE TABLE orders (id int PRIMARY KEY, state text, price numeric, note text);
    INSERT INTO orders SELECT i, 'open', i * 1.10, 'n' || i FROM generate_series(1, 6) AS i";

#[test]
fn changed_columns_come_back_and_only_those() {
    let mut bed = Bed::new(ORDERS, &["orders"]);
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
    let mut bed = Bed::new(ORDERS, &["orders"]);
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
    let event = bed.rows("SELECT concat_ws('|', kind, rows, relation, reason, approval) FROM writeguard.event");
    assert_eq!(event, [format!("undone|3|public.orders|change {change}")]);
}

#[test]
fn what_changed_again_since_is_a_conflict() {
    let mut bed = Bed::new(ORDERS, &["orders"]);
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

//! What the tests of undo share: tables whose rows are kept when a statement changes them, and what undoing gives.

#![allow(dead_code)]

use postgres::Client;

use crate::common::{Database, Refusal, Server, expect_refusal};

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

pub struct Bed {
    pub db: Database,
    pub admin: Client,
    /// A second session, which sees only what was committed.
    pub reader: Client,
}

impl Bed {
    pub fn new(setup: &str, tables: &[&str]) -> Bed {
        let db = Server::shared().database();
        let mut bed = Bed { admin: db.admin(), reader: db.admin(), db };
        bed.run(CAPTURE);
        bed.run(setup);
        for table in tables {
            bed.keep(table);
        }
        bed
    }

    /// Rows of the table are kept from now on.
    #[track_caller]
    pub fn keep(&mut self, table: &str) {
        self.run(&format!(
            "DO $$ BEGIN EXECUTE format('CREATE TRIGGER aa_keep AFTER UPDATE OR DELETE ON {table} FOR EACH ROW \
             EXECUTE FUNCTION public.test_keep(%L)', '{table}'::regclass::oid); END $$"
        ));
    }

    #[track_caller]
    pub fn run(&mut self, sql: &str) {
        if let Err(error) = self.admin.batch_execute(sql) {
            panic!("{sql}: {:?}", Refusal::of(&error));
        }
    }

    /// Runs a statement whose rows are kept, and gives the number of the change.
    #[track_caller]
    pub fn change(&mut self, sql: &str) -> i64 {
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
    pub fn rows(&mut self, sql: &str) -> Vec<String> {
        rows(&mut self.reader, sql)
    }

    #[track_caller]
    pub fn table(&mut self, table: &str) -> Vec<String> {
        self.rows(&format!("SELECT t::text FROM {table} AS t ORDER BY t::text"))
    }

    /// `undo` and its result: table, restored, conflicts.
    #[track_caller]
    pub fn undo(&mut self, arguments: &str) -> Vec<(String, i64, i64)> {
        undo(&mut self.admin, arguments)
    }

    #[track_caller]
    pub fn refused(&mut self, sql: &str) -> Refusal {
        expect_refusal(self.admin.batch_execute(sql))
    }
}

#[track_caller]
pub fn rows(client: &mut Client, sql: &str) -> Vec<String> {
    match client.query(sql, &[]) {
        Ok(rows) => rows.iter().map(|row| row.get::<_, Option<String>>(0).unwrap_or("NULL".into())).collect(),
        Err(error) => panic!("{sql}: {:?}", error),
    }
}

#[track_caller]
pub fn undo(client: &mut Client, arguments: &str) -> Vec<(String, i64, i64)> {
    let sql = format!("SELECT relation, restored, conflicts FROM writeguard.undo({arguments})");
    match client.query(&sql, &[]) {
        Ok(rows) => rows.iter().map(|row| (row.get(0), row.get(1), row.get(2))).collect(),
        Err(error) => panic!("{sql}: {:?}", Refusal::of(&error)),
    }
}

pub fn one(relation: &str, restored: i64, conflicts: i64) -> Vec<(String, i64, i64)> {
    vec![(relation.to_owned(), restored, conflicts)]
}

pub const ORDERS: &str = "CREATE TABLE orders (id int PRIMARY KEY, state text, price numeric, note text);
    INSERT INTO orders SELECT i, 'open', i * 1.10, 'n' || i FROM generate_series(1, 6) AS i";

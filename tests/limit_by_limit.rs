//! Which policies apply is decided limit by limit: on a real server, what a rule that is added leaves of others.

use crate::common::limits::{Bed, SIX, pass};
use crate::common::session::{refused, text};
use crate::common::{Refusal, expect_refusal};

/// `t` and `u` with 20 rows each, and `c` that refers to `t`.
const TABLES: &str = "
    CREATE TABLE t (id int PRIMARY KEY, v int NOT NULL DEFAULT 0, secret text);
    CREATE TABLE u (id int PRIMARY KEY, v int NOT NULL DEFAULT 0);
    INSERT INTO t SELECT i, 0 FROM generate_series(1, 20) AS i;
    INSERT INTO u SELECT i, 0 FROM generate_series(1, 20) AS i;";

impl Bed {
    #[track_caller]
    fn set(&mut self, name: &str, arguments: &str) {
        pass(&mut self.reader, &format!("SELECT writeguard.set_policy('{name}', {arguments})"));
    }

    /// Refused with that SQLSTATE by that policy, and nothing was changed.
    #[track_caller]
    fn refused_by(&mut self, policy: &str, sqlstate: &str, sql: &str) -> Refusal {
        let before = self.contents();
        let refusal = refused(&mut self.writer, sql, sqlstate);
        let _ = self.writer.batch_execute("ROLLBACK");
        let said = format!("{} {}", refusal.message, refusal.detail);
        assert!(said.contains(&format!("\"{policy}\"")), "{sql}: {refusal:?}");
        assert_eq!(self.contents(), before, "{sql}: refused, but not undone");
        refusal
    }

    /// What `effective()` says of an update of a table: the limits that apply, each with its policy, and then those that
    /// do not.
    #[track_caller]
    fn effective(&mut self, table: &str) -> String {
        let sql = format!(
            "SELECT string_agg(concat_ws(' ', \"limit\", value, 'of', policy, why_not), '; ')
             FROM writeguard.effective('{table}', operation => 'update')"
        );
        text(&mut self.writer, &sql)
    }
}

#[test]
fn a_stricter_rule_for_one_table_leaves_the_cap_where_it_is() {
    let mut bed = Bed::new(TABLES);
    bed.set("cap", "max_rows => 5");
    bed.set("strict", "tables => '{public.t}', require_where => true");
    assert_eq!(bed.effective("t"), "max_rows 5 of cap; require_where true of strict");
    bed.refused_by("cap", "WG001", "UPDATE t SET v = 1 WHERE id <= 6");
    bed.refused_by("strict", "WG002", "UPDATE t SET v = 1");
    bed.passes("UPDATE t SET v = 1 WHERE id <= 5");
    bed.refused_by("cap", "WG001", "UPDATE u SET v = 1 WHERE id <= 6");
    // Whoever says that no condition is needed says that and nothing else.
    bed.set("cap", "max_rows => 5, require_where => true");
    bed.set("strict", "tables => '{public.t}', require_where => false");
    bed.refused_by("cap", "WG001", "UPDATE t SET v = 1");
    bed.refused_by("cap", "WG002", "UPDATE u SET v = 1");
}

#[test]
fn what_holds_always_holds_whatever_else_there_is() {
    let mut bed = Bed::new(TABLES);
    bed.set("freeze", "max_rows => 0, always => true, override => 'never'");
    bed.set("t", "tables => '{public.t}', roles => '{postgres}', max_rows => 10");
    bed.set("batch", "tables => '{public.u}', roles => '{postgres}', mode => 'exempt'");
    for table in ["t", "u"] {
        bed.refused_by("freeze", "WG001", &format!("DELETE FROM {table} WHERE id = 1"));
    }
    bed.set("freeze", "max_rows => 0, override => 'never'");
    bed.passes("DELETE FROM t WHERE id <= 10; DELETE FROM u");
}

#[test]
fn an_exempt_policy_sets_aside_what_is_less_specific_and_limits_nothing() {
    let mut bed = Bed::new(TABLES);
    bed.set("cap", "max_rows => 2, require_where => true, require_transaction => true, override => 'never'");
    bed.set("batch", "tables => '{public.t}', mode => 'exempt'");
    bed.passes("UPDATE t SET v = 1; TRUNCATE t");
    bed.refused_by("cap", "WG002", "UPDATE u SET v = 1");
    let shown = bed.effective("t");
    assert!(shown.contains("max_rows 2 of cap set aside by \"batch\"") && shown.ends_with("of batch mode"), "{shown}");
    for (arguments, word) in [
        ("mode => 'exempt', max_rows => 5", "max_rows"),
        ("mode => 'exempt', require_transaction => false", "require_transaction"),
        ("mode => 'exempt', always => true", "always"),
        ("mode => 'exempt', application => 'psql'", "application"),
    ] {
        let sql = format!("SELECT writeguard.set_policy('p', {arguments})");
        let refusal = expect_refusal(bed.reader.batch_execute(&sql));
        assert!(refusal.sqlstate == "WG007" && format!("{refusal:?}").contains(word), "{refusal:?}");
    }
}

#[test]
fn each_limit_has_the_way_out_of_its_own_policy() {
    let mut bed = Bed::new(TABLES);
    bed.set("cap", "max_rows => 10, override => 'never'");
    bed.set("blocks", "tables => '{public.t}', require_transaction => true, override => 'flag'");
    bed.refused_by("blocks", "WG003", "UPDATE t SET v = 1 WHERE id <= 2");
    bed.passes("SET writeguard.override = on; UPDATE t SET v = 1 WHERE id <= 2");
    bed.refused_by("cap", "WG001", "SET writeguard.override = on; UPDATE t SET v = 1 WHERE id <= 11");
    // One that only looks on does not stand before one that refuses.
    bed.set("blocks", "tables => '{public.t}', max_rows => 1, mode => 'observe'");
    bed.refused_by("cap", "WG001", "UPDATE t SET v = 1 WHERE id <= 11");
    bed.passes("RESET writeguard.override; UPDATE t SET v = 1 WHERE id <= 10");
}

/// A budget has the rows of all tables for which its limit applies, and no others.
#[test]
fn rows_of_a_table_that_has_a_limit_of_its_own_count_to_no_other() {
    let mut bed = Bed::new(TABLES);
    bed.set("cap", "max_rows => 5, max_rows_per_transaction => 30");
    bed.set("t", "tables => '{public.t}', max_rows => 15");
    let both = |t: i32, u: i32| {
        format!(
            "WITH a AS (UPDATE t SET v = 1 WHERE id <= {t} RETURNING 1), b AS (UPDATE u SET v = 1 WHERE id <= {u} RETURNING 1)
             SELECT (SELECT count(*) FROM a) + (SELECT count(*) FROM b)"
        )
    };
    bed.passes(&both(15, 5));
    bed.refused_by("cap", "WG001", &both(1, 6));
    bed.refused_by("t", "WG001", &both(16, 1));
    // To the limit per transaction all of them count.
    bed.refused_by("cap", "WG001", &format!("BEGIN; {}; {}; COMMIT", both(15, 5), both(11, 0)));
    bed.passes(&format!("BEGIN; {}; {}; COMMIT", both(15, 5), both(10, 0)));
    // The other way round.
    bed.set("t", "tables => '{public.t}', max_rows_per_transaction => 4");
    bed.refused_by("t", "WG001", "UPDATE t SET v = 1 WHERE id <= 5");
    bed.passes("BEGIN; UPDATE t SET v = 1 WHERE id <= 4; SAVEPOINT s; UPDATE u SET v = 1 WHERE id <= 5; ROLLBACK TO s");
    for _ in 0..6 {
        bed.passes("UPDATE u SET v = 2 WHERE id <= 5");
    }
    bed.refused_by("cap", "WG001", "UPDATE u SET v = 2 WHERE id <= 1");
    bed.refused_by("cap", "WG001", &both(1, 5));
}

#[test]
fn a_transaction_block_and_a_rate_are_counted_where_they_apply() {
    let mut bed = Bed::new(TABLES);
    bed.set("cap", "require_transaction => true, rate_rows => 30, max_rows => 15");
    bed.set("t", "tables => '{public.t}', require_transaction => false, rate_rows => 1000");
    let both = "WITH a AS (UPDATE t SET v = 1 WHERE id <= 10 RETURNING 1) UPDATE u SET v = 1 WHERE id <= ";
    bed.passes(&format!("{both}1"));
    bed.refused_by("cap", "WG003", &format!("{both}2"));
    for _ in 0..3 {
        bed.passes("UPDATE t SET v = 1 WHERE id <= 15");
    }
    bed.passes("BEGIN; UPDATE u SET v = 1 WHERE id <= 14; UPDATE u SET v = 1 WHERE id <= 15; COMMIT");
    bed.refused_by("cap", "WG001", "UPDATE u SET v = 1 WHERE id = 1");
    bed.passes("UPDATE t SET v = 1 WHERE id <= 15");
}

const USERS: &str = "
    CREATE TABLE users (id int PRIMARY KEY, name text, is_deleted boolean NOT NULL DEFAULT false, hash text);
    INSERT INTO users SELECT i, 'u' || i FROM generate_series(1, 9) AS i;";
const COLUMNS: &str = "tables => '{public.*}', operations => '{update}', columns => '{is_deleted,hash}', max_rows => 2";

#[test]
fn a_policy_on_columns_counts_what_assigns_them() {
    let mut bed = Bed::new(USERS);
    bed.set("cap", "max_rows => 8");
    bed.set("columns", COLUMNS);
    assert_eq!(bed.effective("users"), "max_rows 2 of columns; max_rows 8 of cap");
    bed.passes("UPDATE users SET name = 'x' WHERE id <= 8");
    bed.refused_by("cap", "WG001", "UPDATE users SET name = 'x'");
    bed.passes("UPDATE users SET is_deleted = true WHERE id <= 2");
    // More than once, so that what is known of the columns is used.
    for _ in 0..2 {
        bed.refused_by("columns", "WG001", "UPDATE users SET is_deleted = true WHERE id <= 3");
        bed.refused_by("columns", "WG001", "UPDATE users SET name = 'y', hash = NULL WHERE id <= 3");
        bed.refused_by("columns", "WG001", "UPDATE users SET (name, hash) = (SELECT 'y', NULL) WHERE id <= 3");
        bed.passes("UPDATE users SET name = 'y' WHERE id <= 3");
        bed.passes("DELETE FROM users WHERE id > 100");
    }
    // The same value is assigned as well.
    bed.refused_by("columns", "WG001", "UPDATE users SET is_deleted = is_deleted WHERE id <= 3");
    // Prepared before, through a view, in a WITH branch, in a function.
    bed.passes(
        "CREATE VIEW w AS SELECT id, hash AS h, name FROM users;
         CREATE FUNCTION f(n int) RETURNS void LANGUAGE sql AS 'UPDATE users SET hash = NULL WHERE id <= n';
         PREPARE hide(int) AS UPDATE users SET is_deleted = true WHERE id <= $1; EXECUTE hide(2)",
    );
    bed.refused_by("columns", "WG001", "EXECUTE hide(3)");
    bed.refused_by("columns", "WG001", "UPDATE w SET h = 'x' WHERE id <= 3");
    bed.passes("UPDATE w SET name = 'x' WHERE id <= 3");
    bed.refused_by("columns", "WG001", "SELECT f(3)");
    bed.refused_by(
        "columns",
        "WG001",
        "WITH a AS (UPDATE users SET hash = '' WHERE id <= 3 RETURNING 1) SELECT * FROM a",
    );
    // All in one budget.
    bed.passes("CREATE TABLE more (id int PRIMARY KEY, hash text); INSERT INTO more VALUES (1), (2), (3)");
    bed.refused_by(
        "columns",
        "WG001",
        "WITH a AS (UPDATE users SET is_deleted = true WHERE id <= 1 RETURNING 1) UPDATE more SET hash = 'x' WHERE id <= 2",
    );
    bed.passes(
        "WITH a AS (UPDATE users SET name = 'z' WHERE id <= 5 RETURNING 1) UPDATE more SET hash = 'x' WHERE id <= 2",
    );
}

#[test]
fn conflicts_merges_and_foreign_keys_assign_columns() {
    let mut bed = Bed::new(USERS);
    bed.set("columns", COLUMNS);
    let rows = |n: i32| format!("SELECT i, 'x' FROM generate_series(1, {n}) AS i");
    let insert =
        |n: i32, set: &str| format!("INSERT INTO users (id, name) {} ON CONFLICT (id) DO UPDATE SET {set}", rows(n));
    bed.passes(&insert(8, "name = EXCLUDED.name"));
    bed.refused_by("columns", "WG001", &insert(3, "name = EXCLUDED.name, is_deleted = true"));
    bed.passes(&insert(2, "is_deleted = true"));
    let merge = |n: i32, set: &str| {
        format!(
            "MERGE INTO users AS u USING ({}) AS s (id, name) ON u.id = s.id WHEN MATCHED THEN UPDATE SET {set}",
            rows(n)
        )
    };
    bed.passes(&merge(8, "name = s.name"));
    bed.refused_by("columns", "WG001", &merge(3, "hash = s.name"));
    bed.passes(&merge(2, "hash = s.name"));
    // A foreign key's own action.
    bed.passes(
        "CREATE TABLE keys (hash text PRIMARY KEY); INSERT INTO keys VALUES ('k'), ('l');
         CREATE TABLE held (id int PRIMARY KEY, hash text REFERENCES keys ON UPDATE CASCADE ON DELETE SET NULL, n int);
         INSERT INTO held SELECT i, CASE WHEN i <= 3 THEN 'k' ELSE 'l' END FROM generate_series(1, 5) AS i",
    );
    bed.refused_by("columns", "WG001", "DELETE FROM keys WHERE hash = 'k'");
    bed.refused_by("columns", "WG001", "UPDATE keys SET hash = 'm' WHERE hash = 'k'");
    bed.passes("DELETE FROM keys WHERE hash = 'l'");
}

#[test]
fn what_a_trigger_changes_is_not_assigned() {
    let mut bed = Bed::new(USERS);
    bed.passes(
        "CREATE FUNCTION mark() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN NEW.hash = ''x''; RETURN NEW; END';
         CREATE TRIGGER mark BEFORE UPDATE ON users FOR EACH ROW EXECUTE FUNCTION mark()",
    );
    bed.set("columns", COLUMNS);
    bed.passes("UPDATE users SET name = 'x'");
    assert_eq!(bed.number("SELECT count(*) FROM users WHERE hash = 'x'"), 9);
}

#[test]
fn partitions_and_children_have_their_own_column_numbers() {
    let mut bed = Bed::new(
        "CREATE TABLE p (a int, gone int, b int, hash text) PARTITION BY LIST (a);
         ALTER TABLE p DROP COLUMN gone;
         CREATE TABLE p1 (hash text, x int, b int, a int); ALTER TABLE p1 DROP COLUMN x;
         ALTER TABLE p ATTACH PARTITION p1 FOR VALUES IN (1);
         CREATE TABLE p2 PARTITION OF p FOR VALUES IN (2);
         CREATE UNIQUE INDEX ON p (a, b);
         INSERT INTO p SELECT 1 + i % 2, i, NULL FROM generate_series(1, 10) AS i;
         CREATE TABLE parent (b int); CREATE TABLE child (hash text) INHERITS (parent);
         INSERT INTO child SELECT i FROM generate_series(1, 5) AS i",
    );
    bed.set("columns", "tables => '{public.*}', operations => '{update}', columns => '{hash}', max_rows => 2");
    bed.passes("UPDATE p SET b = b + 100; UPDATE p SET b = b - 100 WHERE a = 1; UPDATE parent SET b = 1");
    bed.refused_by("columns", "WG001", "UPDATE p SET hash = 'x' WHERE b < 50");
    bed.refused_by("columns", "WG001", "UPDATE p SET hash = 'x' WHERE a = 2");
    bed.refused_by("columns", "WG001", "UPDATE p1 SET hash = 'x'");
    bed.refused_by("columns", "WG001", "UPDATE child SET hash = 'x'");
    let insert = |set: &str| format!("INSERT INTO p (a, b) SELECT a, b FROM p ON CONFLICT (a, b) DO UPDATE SET {set}");
    bed.passes(&insert("b = EXCLUDED.b"));
    bed.refused_by("columns", "WG001", &insert("hash = 'y'"));
    // Rows that move.
    bed.passes("UPDATE p SET a = 3 - a");
    bed.refused_by("columns", "WG001", "UPDATE p SET a = 3 - a, hash = 'x'");
    // A column that gets another name in between.
    bed.passes("ALTER TABLE child RENAME hash TO plain; UPDATE child SET plain = 'x'");
    bed.passes("ALTER TABLE child RENAME plain TO hash");
    bed.refused_by("columns", "WG001", "UPDATE child SET hash = 'x'");
}

#[test]
fn columns_are_of_updates_and_of_tables_that_have_them() {
    let mut bed = Bed::new(USERS);
    for (arguments, words) in [
        ("columns => '{hash}'", ["operations", "{update}"]),
        ("columns => '{hash}', operations => '{update,delete}'", ["operations", "{update}"]),
        ("columns => '{}', operations => '{update}'", ["columns", "empty"]),
        (
            "columns => '{hsah}', operations => '{update}', tables => '{public.users}'",
            ["hsah", "Did you mean \"hash\"?"],
        ),
        ("columns => '{ctid}', operations => '{update}', tables => '{public.users}'", ["ctid", "public.users"]),
    ] {
        let sql = format!("SELECT writeguard.set_policy('p', {arguments})");
        let refusal = expect_refusal(bed.reader.batch_execute(&sql));
        assert_eq!(refusal.sqlstate, "WG007", "{arguments}: {refusal:?}");
        assert!(
            words.iter().all(|word| format!("{} {} {}", refusal.message, refusal.detail, refusal.hint).contains(word)),
            "{refusal:?}"
        );
    }
    // One of several is enough.
    bed.set(
        "p",
        "columns => '{hash,other,hash}', operations => '{update}', tables => '{public.users}', same_rows => false",
    );
    assert_eq!(text(&mut bed.reader, "SELECT columns::text || same_rows FROM writeguard.policy"), "{hash,other}false");
}

#[test]
fn effective_says_of_each_limit_why_it_does_not_apply() {
    let mut bed = Bed::new(SIX);
    bed.set("cap", "max_rows => 100, max_fraction => 0.5");
    bed.set("t", "tables => '{public.t}', max_rows => 10, max_rows_per_transaction => 20");
    bed.set("psql", "application => 'psql%', max_rows => 1");
    bed.set("net", "client => '10.0.0.0/8', max_rows => 2");
    bed.set("never", "schedule => '2000-01-01 00:00-24:00 UTC', max_rows => 3");
    bed.set("two", "tables => '{public.t}', max_rows => 10, approvers => 'postgres', min_approvals => 2");
    let rows = bed
        .writer
        .query(
            "SELECT concat_ws(' ', policy, \"limit\", value, applies, why_not, CASE WHEN strictest THEN '*' END,
                              mode, override, approvers, min_approvals)
             FROM writeguard.effective('t', operation => 'delete')",
            &[],
        )
        .expect("rows");
    let rows: Vec<String> = rows.iter().map(|row| row.get(0)).collect();
    assert_eq!(
        rows,
        [
            "t max_rows 10 t * enforce token 1",
            "two max_rows 10 t * enforce token postgres 2",
            "cap max_rows 100 f set aside by \"t\" enforce token 1",
            "net max_rows 2 f client enforce token 1",
            "never max_rows 3 f schedule enforce token 1",
            "psql max_rows 1 f application enforce token 1",
            "t max_rows_per_transaction 20 t * enforce token 1",
            "cap max_fraction 0.5 t * enforce token 1",
        ]
    );
    // Each operation, where none is said; and anybody for themselves.
    let role = bed.db().role("anna");
    let mut anna = bed.db().connect(&role);
    let operations = "SELECT string_agg(DISTINCT operation, ' ' ORDER BY operation) FROM writeguard.effective('t')";
    assert_eq!(text(&mut anna, operations), "delete truncate update");
    // Whom the guard sees: not only who has logged in.
    let team = bed.db().role("team");
    pass(&mut bed.reader, &format!("GRANT {team} TO {role}"));
    bed.set("team", &format!("roles => '{{{team}}}', max_rows => 4"));
    let applies = "SELECT coalesce(string_agg(policy, ' '), '') FROM writeguard.effective('t', operation => 'update')
        WHERE applies AND \"limit\" = 'max_rows'";
    assert_eq!(text(&mut anna, applies), "team t two");
}

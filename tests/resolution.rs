//! Which policies apply to a write: by table, by role, by operation, and after every kind of change to either.

use crate::common::session::pass;
use crate::common::{Database, Refusal, Server, expect_refusal};
use postgres::Client;

/// A database with tables to name, and a user who may do everything with them.
struct Stage {
    db: Database,
    admin: Client,
    user: String,
}

impl Stage {
    /// With the table `public.t` of ten rows and no policy.
    fn new() -> Stage {
        let db = Server::shared().database();
        let admin = db.admin();
        let user = db.role("user");
        let mut stage = Stage { db, admin, user };
        stage.table("t");
        stage
    }

    fn user(&self) -> Client {
        self.db.connect(&self.user)
    }

    #[track_caller]
    fn run(&mut self, sql: &str) {
        pass(&mut self.admin, sql);
    }

    /// A table of ten rows that everybody may write.
    fn table(&mut self, name: &str) {
        self.run(&format!(
            "CREATE TABLE {name} (id int, a int NOT NULL DEFAULT 0);
             INSERT INTO {name} SELECT generate_series(1, 10);
             GRANT ALL ON {name} TO PUBLIC"
        ));
    }

    /// A policy with `max_rows` for these tables and everybody.
    #[track_caller]
    fn policy(&mut self, name: &str, tables: &str, max_rows: i64) {
        self.policy_for(name, tables, "public", max_rows);
    }

    #[track_caller]
    fn policy_for(&mut self, name: &str, tables: &str, roles: &str, max_rows: i64) {
        let sql = "SELECT writeguard.set_policy($1, tables => $2, roles => $3, max_rows => $4)";
        let list = |text: &str| text.split(' ').map(str::to_owned).collect::<Vec<_>>();
        self.admin
            .execute(sql, &[&name, &list(tables), &list(roles), &max_rows])
            .unwrap_or_else(|error| panic!("no policy: {:?}", Refusal::of(&error)));
    }

    /// What `effective()` tells of an update of `table` by `role`: `name` where a policy applies,
    /// `name<other` where another sets it aside.
    #[track_caller]
    fn effective(&mut self, table: &str, role: &str) -> Vec<String> {
        self.effective_for(table, role, "update")
    }

    #[track_caller]
    fn effective_for(&mut self, table: &str, role: &str, operation: &str) -> Vec<String> {
        let sql = r#"SELECT policy, applies, substring(why_not from 'set aside by "(.*)"')
                   FROM writeguard.effective($1::text::regclass, $2::text::name, $3) ORDER BY policy"#;
        let rows = self
            .admin
            .query(sql, &[&table, &role, &operation])
            .unwrap_or_else(|error| panic!("{:?}", Refusal::of(&error)));
        rows.iter()
            .map(|row| {
                let policy: String = row.get(0);
                let set_aside_by: Option<String> = row.get(2);
                assert_eq!(row.get::<_, bool>(1), set_aside_by.is_none());
                match set_aside_by {
                    Some(by) => format!("{policy}<{by}"),
                    None => policy,
                }
            })
            .collect()
    }

    /// The user may update `rows` rows of `table` and not one more, in a session of its own.
    #[track_caller]
    fn allows(&self, table: &str, rows: i32) {
        allows(&mut self.user(), table, rows);
    }

    #[track_caller]
    fn allows_all(&self, table: &str) {
        pass(&mut self.user(), &update(table, 10));
    }
}

fn update(table: &str, rows: i32) -> String {
    format!("UPDATE {table} SET a = a + 1 WHERE id <= {rows}")
}

/// The write is refused by a limit; gives the error.
#[track_caller]
fn refused(client: &mut Client, sql: &str) -> Refusal {
    let refusal = expect_refusal(client.batch_execute(sql));
    assert_eq!(refusal.sqlstate, "WG001", "{refusal:?}");
    refusal
}

#[track_caller]
fn allows(client: &mut Client, table: &str, rows: i32) {
    if rows > 0 {
        pass(client, &update(table, rows));
    }
    let refusal = refused(client, &update(table, rows + 1));
    let expected = format!("limit of {rows} row");
    assert!(refusal.message.contains(&expected), "{refusal:?}");
}

// ---- By table ----

#[test]
fn without_a_policy_nothing_is_refused() {
    let mut stage = Stage::new();
    stage.allows_all("t");
    let user = stage.user.clone();
    assert!(stage.effective("t", &user).is_empty());
}

#[test]
fn own_name_sets_aside_a_pattern_with_literal_schema() {
    let mut stage = Stage::new();
    stage.policy("exact", "public.t", 5);
    stage.policy("schema", "public.*", 2);
    let user = stage.user.clone();
    assert_eq!(stage.effective("t", &user), ["exact", "schema<exact"]);
    stage.allows("t", 5);
}

#[test]
fn own_name_sets_aside_any_pattern() {
    let mut stage = Stage::new();
    stage.policy("exact", "public.t", 5);
    stage.policy("all", "*.*", 2);
    let user = stage.user.clone();
    assert_eq!(stage.effective("t", &user), ["all<exact", "exact"]);
    stage.allows("t", 5);
}

#[test]
fn pattern_with_literal_schema_sets_aside_any_other_pattern() {
    let mut stage = Stage::new();
    stage.policy("schema", "public.*", 5);
    stage.policy("name", "*.t", 2);
    stage.policy("half", "publi*.t", 2);
    stage.policy("all", "*.*", 2);
    let user = stage.user.clone();
    assert_eq!(stage.effective("t", &user), ["all<schema", "half<schema", "name<schema", "schema"]);
    stage.allows("t", 5);
}

#[test]
fn patterns_of_the_same_kind_apply_together_and_the_strictest_decides() {
    let mut stage = Stage::new();
    stage.policy("name", "*.t", 5);
    stage.policy("all", "*.*", 2);
    let user = stage.user.clone();
    assert_eq!(stage.effective("t", &user), ["all", "name"]);
    stage.allows("t", 2);
}

#[test]
fn a_longer_pattern_is_not_more_specific() {
    let mut stage = Stage::new();
    stage.table("t_archive");
    stage.policy("archive", "public.*_archive", 5);
    stage.policy("schema", "public.*", 2);
    let user = stage.user.clone();
    assert_eq!(stage.effective("t_archive", &user), ["archive", "schema"]);
    stage.allows("t_archive", 2);
}

#[test]
fn two_policies_for_the_same_name_apply_together() {
    let mut stage = Stage::new();
    stage.policy("one", "public.t", 5);
    stage.policy("two", "public.t", 2);
    let user = stage.user.clone();
    assert_eq!(stage.effective("t", &user), ["one", "two"]);
    stage.allows("t", 2);
}

#[test]
fn the_closest_of_a_policys_elements_counts() {
    let mut stage = Stage::new();
    stage.policy("several", "*.* public.t", 5);
    stage.policy("schema", "public.*", 2);
    let user = stage.user.clone();
    assert_eq!(stage.effective("t", &user), ["schema<several", "several"]);
    stage.allows("t", 5);
}

#[test]
fn a_policy_for_another_table_does_not_apply() {
    let mut stage = Stage::new();
    stage.table("u");
    stage.policy("other", "public.u", 0);
    let user = stage.user.clone();
    assert!(stage.effective("t", &user).is_empty());
    stage.allows_all("t");
}

#[test]
fn names_are_folded_unless_quoted() {
    let mut stage = Stage::new();
    stage.table("\"T\"");
    stage.table("\"a*\"");
    stage.table("ab");
    stage.policy("upper", "public.\"T\"", 5);
    stage.policy("lower", "PUBLIC.T", 2);
    stage.policy("star", "public.\"a*\"", 1);
    let user = stage.user.clone();
    assert_eq!(stage.effective("\"T\"", &user), ["upper"]);
    assert_eq!(stage.effective("t", &user), ["lower"]);
    assert_eq!(stage.effective("\"a*\"", &user), ["star"]);
    assert!(stage.effective("ab", &user).is_empty());
    stage.allows("\"T\"", 5);
    stage.allows("t", 2);
    stage.allows("\"a*\"", 1);
    stage.allows_all("ab");
}

#[test]
fn a_table_made_after_the_policy_is_covered() {
    let mut stage = Stage::new();
    stage.policy("new", "public.new_*", 2);
    let mut client = stage.user();
    pass(&mut client, &update("t", 10));
    stage.table("new_table");
    allows(&mut client, "new_table", 2);
}

#[test]
fn views_lead_to_the_tables_behind_them() {
    let mut stage = Stage::new();
    stage.policy("exact", "public.t", 2);
    stage.run("CREATE VIEW v AS SELECT * FROM t; GRANT ALL ON v TO PUBLIC");
    stage.allows("v", 2);
    let user = stage.user.clone();
    assert!(stage.effective("v", &user).is_empty());
}

#[test]
fn temporary_tables_are_never_covered() {
    let mut stage = Stage::new();
    stage.policy("all", "*.*", 2);
    let mut client = stage.user();
    pass(&mut client, "CREATE TEMP TABLE t AS SELECT id, 0 AS a FROM generate_series(1, 10) AS id");
    pass(&mut client, &update("t", 10));
    allows(&mut client, "public.t", 2);
}

#[test]
fn system_catalogs_are_never_covered() {
    let mut stage = Stage::new();
    stage.policy("all", "*.*", 0);
    assert!(stage.effective("pg_catalog.pg_class", "postgres").is_empty());
    stage.run("BEGIN; UPDATE pg_catalog.pg_description SET description = description; ROLLBACK");
}

#[test]
fn the_extensions_own_tables_are_never_covered() {
    let mut stage = Stage::new();
    stage.policy("all", "*.*", 0);
    assert!(stage.effective("writeguard.event", "postgres").is_empty());
    stage.run("DELETE FROM writeguard.event");
}

// ---- Partitions and inheritance ----

/// Partitions `root` > `mid` > `leaf`; all ten rows are in `leaf`.
fn create_partitions(stage: &mut Stage) {
    stage.run(
        "CREATE TABLE root (id int, a int NOT NULL DEFAULT 0) PARTITION BY RANGE (id);
         CREATE TABLE mid PARTITION OF root FOR VALUES FROM (0) TO (1000) PARTITION BY RANGE (id);
         CREATE TABLE leaf PARTITION OF mid FOR VALUES FROM (0) TO (1000);
         INSERT INTO root SELECT generate_series(1, 10);
         GRANT ALL ON root, mid, leaf TO PUBLIC",
    );
}

#[test]
fn a_policy_on_an_ancestor_covers_the_partition() {
    let mut stage = Stage::new();
    create_partitions(&mut stage);
    stage.policy("root", "public.root", 3);
    let user = stage.user.clone();
    for table in ["root", "mid", "leaf"] {
        assert_eq!(stage.effective(table, &user), ["root"]);
        stage.allows(table, 3);
    }
}

#[test]
fn a_pattern_that_matches_an_ancestor_covers_the_partition() {
    let mut stage = Stage::new();
    create_partitions(&mut stage);
    stage.policy("pattern", "public.roo*", 3);
    stage.allows("leaf", 3);
}

#[test]
fn own_name_then_nearest_ancestor_then_farther_then_patterns() {
    let mut stage = Stage::new();
    create_partitions(&mut stage);
    stage.policy("d_all", "*.*", 1);
    stage.policy("c_schema", "public.*", 2);
    stage.policy("b_root", "public.root", 3);
    let user = stage.user.clone();
    assert_eq!(stage.effective("leaf", &user), ["b_root", "c_schema<b_root", "d_all<b_root"]);
    stage.allows("leaf", 3);
    stage.policy("a_mid", "public.mid", 4);
    assert_eq!(stage.effective("leaf", &user), ["a_mid", "b_root<a_mid", "c_schema<a_mid", "d_all<a_mid"]);
    stage.allows("leaf", 4);
    stage.policy("0_leaf", "public.leaf", 5);
    assert_eq!(
        stage.effective("leaf", &user),
        ["0_leaf", "a_mid<0_leaf", "b_root<0_leaf", "c_schema<0_leaf", "d_all<0_leaf"]
    );
    stage.allows("leaf", 5);
}

#[test]
fn a_policy_on_a_partition_covers_writes_through_the_root() {
    let mut stage = Stage::new();
    create_partitions(&mut stage);
    stage.policy("leaf", "public.leaf", 2);
    stage.allows("root", 2);
}

#[test]
fn a_policy_on_a_partition_covers_no_other_partition() {
    let mut stage = Stage::new();
    create_partitions(&mut stage);
    stage.run(
        "CREATE TABLE other PARTITION OF root FOR VALUES FROM (1000) TO (2000);
         INSERT INTO root SELECT generate_series(1001, 1010)",
    );
    stage.policy("leaf", "public.leaf", 2);
    pass(&mut stage.user(), "UPDATE root SET a = 1 WHERE id > 1000");
}

#[test]
fn partitions_of_one_policy_share_its_budget() {
    let mut stage = Stage::new();
    create_partitions(&mut stage);
    stage.run(
        "CREATE TABLE other PARTITION OF root FOR VALUES FROM (1000) TO (2000);
         INSERT INTO root SELECT generate_series(1001, 1010)",
    );
    stage.policy("root", "public.root", 3);
    let mut client = stage.user();
    let rows = |more: i32| format!("UPDATE root SET a = 1 WHERE id <= 2 OR id BETWEEN 1001 AND {}", 1000 + more);
    pass(&mut client, &rows(1));
    refused(&mut client, &rows(2));
}

#[test]
fn inheritance_children_are_covered_by_their_ancestors() {
    let mut stage = Stage::new();
    stage.run(
        "CREATE TABLE child () INHERITS (t);
         CREATE TABLE grandchild () INHERITS (child);
         INSERT INTO grandchild SELECT generate_series(1, 10);
         GRANT ALL ON child, grandchild TO PUBLIC",
    );
    stage.policy("parent", "public.t", 3);
    let user = stage.user.clone();
    assert_eq!(stage.effective("grandchild", &user), ["parent"]);
    stage.allows("grandchild", 3);
    stage.policy("child", "public.child", 4);
    assert_eq!(stage.effective("grandchild", &user), ["child", "parent<child"]);
    stage.allows("grandchild", 4);
}

#[test]
fn of_several_parents_all_cover_their_child() {
    let mut stage = Stage::new();
    stage.table("u");
    stage.run(
        "CREATE TABLE child () INHERITS (t, u);
         INSERT INTO child SELECT generate_series(1, 10); GRANT ALL ON child TO PUBLIC",
    );
    stage.policy("of_t", "public.t", 5);
    stage.policy("of_u", "public.u", 2);
    let user = stage.user.clone();
    assert_eq!(stage.effective("child", &user), ["of_t", "of_u"]);
    stage.allows("child", 2);
}

#[test]
fn an_attached_partition_is_covered_at_once() {
    let mut stage = Stage::new();
    create_partitions(&mut stage);
    stage.run(
        "CREATE TABLE late (id int, a int NOT NULL DEFAULT 0);
         INSERT INTO late SELECT generate_series(2001, 2010);
         GRANT ALL ON late TO PUBLIC",
    );
    stage.policy("root", "public.root", 3);
    let all = "UPDATE late SET a = 1";
    let mut client = stage.user();
    pass(&mut client, all);
    stage.run("ALTER TABLE root ATTACH PARTITION late FOR VALUES FROM (2000) TO (3000)");
    refused(&mut client, all);
    stage.run("ALTER TABLE root DETACH PARTITION late");
    pass(&mut client, all);
}

#[test]
fn a_partition_is_covered_when_its_parent_is_attached() {
    let mut stage = Stage::new();
    stage.run(
        "CREATE TABLE root (id int, a int NOT NULL DEFAULT 0) PARTITION BY RANGE (id);
         CREATE TABLE mid (id int, a int NOT NULL DEFAULT 0) PARTITION BY RANGE (id);
         CREATE TABLE leaf PARTITION OF mid FOR VALUES FROM (0) TO (1000);
         INSERT INTO mid SELECT generate_series(1, 10);
         GRANT ALL ON root, mid, leaf TO PUBLIC",
    );
    stage.policy("root", "public.root", 3);
    let mut client = stage.user();
    pass(&mut client, &update("leaf", 10));
    stage.run("ALTER TABLE root ATTACH PARTITION mid FOR VALUES FROM (0) TO (1000)");
    allows(&mut client, "leaf", 3);
    stage.run("ALTER TABLE root DETACH PARTITION mid");
    pass(&mut client, &update("leaf", 10));
}

#[test]
fn a_partition_attached_before_any_policy_is_covered_by_a_later_one() {
    let mut stage = Stage::new();
    create_partitions(&mut stage);
    let mut client = stage.user();
    pass(&mut client, &update("leaf", 10));
    stage.policy("root", "public.root", 3);
    allows(&mut client, "leaf", 3);
}

#[test]
fn inheritance_made_and_ended_takes_effect_at_once() {
    let mut stage = Stage::new();
    stage.table("child");
    stage.policy("parent", "public.t", 3);
    let mut client = stage.user();
    pass(&mut client, &update("child", 10));
    stage.run("ALTER TABLE child INHERIT t");
    allows(&mut client, "child", 3);
    stage.run("ALTER TABLE child NO INHERIT t");
    pass(&mut client, &update("child", 10));
}

#[test]
fn an_ancestor_renamed_into_the_policy_covers_its_partitions() {
    let mut stage = Stage::new();
    create_partitions(&mut stage);
    stage.policy("pattern", "public.guarded*", 3);
    let mut client = stage.user();
    pass(&mut client, &update("leaf", 10));
    stage.run("ALTER TABLE root RENAME TO guarded_root");
    allows(&mut client, "leaf", 3);
    stage.run("ALTER TABLE guarded_root RENAME TO root");
    pass(&mut client, &update("leaf", 10));
}

// ---- By role ----

#[test]
fn the_role_itself_sets_aside_a_group_and_everybody() {
    let mut stage = Stage::new();
    let group = stage.db.role("team");
    let user = stage.user.clone();
    stage.run(&format!("GRANT {group} TO {user}"));
    stage.policy_for("everybody", "*.*", "public", 1);
    stage.policy_for("group", "*.*", &group, 2);
    assert_eq!(stage.effective("t", &user), ["everybody<group", "group"]);
    stage.allows("t", 2);
    stage.policy_for("itself", "*.*", &user, 3);
    assert_eq!(stage.effective("t", &user), ["everybody<itself", "group<itself", "itself"]);
    stage.allows("t", 3);
}

#[test]
fn a_policy_for_another_role_does_not_apply() {
    let mut stage = Stage::new();
    let other = stage.db.role("other");
    let user = stage.user.clone();
    stage.policy_for("other", "public.t", &other, 0);
    assert!(stage.effective("t", &user).is_empty());
    stage.allows_all("t");
    allows(&mut stage.db.connect(&other), "t", 0);
}

#[test]
fn the_closest_of_a_policys_roles_counts() {
    let mut stage = Stage::new();
    let user = stage.user.clone();
    stage.policy_for("several", "*.*", &format!("public {user}"), 5);
    stage.policy_for("everybody", "*.*", "public", 2);
    assert_eq!(stage.effective("t", &user), ["everybody<several", "several"]);
    stage.allows("t", 5);
}

#[test]
fn more_specific_on_the_table_and_less_on_the_role_sets_nothing_aside() {
    let mut stage = Stage::new();
    let user = stage.user.clone();
    stage.policy_for("table", "public.t", "public", 5);
    stage.policy_for("role", "*.*", &user, 2);
    assert_eq!(stage.effective("t", &user), ["role", "table"]);
    stage.allows("t", 2);
    stage.policy_for("role", "*.*", &user, 7);
    stage.allows("t", 5);
}

#[test]
fn more_specific_on_both_sets_both_aside() {
    let mut stage = Stage::new();
    let user = stage.user.clone();
    stage.policy_for("table", "public.t", "public", 1);
    stage.policy_for("role", "*.*", &user, 2);
    stage.policy_for("both", "public.t", &user, 5);
    assert_eq!(stage.effective("t", &user), ["both", "role<both", "table<both"]);
    stage.allows("t", 5);
}

#[test]
fn a_policy_that_is_set_aside_still_sets_aside_others() {
    // `top` sets `middle` aside, and `middle` sets `low` aside; `low` must not come back.
    let mut stage = Stage::new();
    let user = stage.user.clone();
    stage.policy_for("low", "*.*", "public", 1);
    stage.policy_for("middle", "public.*", "public", 2);
    stage.policy_for("top", "public.t", &user, 5);
    let effective = stage.effective("t", &user);
    assert_eq!(effective, ["low<top", "middle<top", "top"]);
    stage.allows("t", 5);
}

#[test]
fn membership_counts_as_soon_as_it_is_granted_and_no_longer_than_until_it_is_revoked() {
    let mut stage = Stage::new();
    let group = stage.db.role("team");
    let user = stage.user.clone();
    stage.policy_for("group", "public.t", &group, 2);
    let mut client = stage.user();
    pass(&mut client, &update("t", 10));
    stage.run(&format!("GRANT {group} TO {user}"));
    assert_eq!(stage.effective("t", &user), ["group"]);
    allows(&mut client, "t", 2);
    stage.run(&format!("REVOKE {group} FROM {user}"));
    assert!(stage.effective("t", &user).is_empty());
    pass(&mut client, &update("t", 10));
}

#[test]
fn membership_through_groups_counts() {
    let mut stage = Stage::new();
    let (inner, outer) = (stage.db.role("inner"), stage.db.role("outer"));
    let user = stage.user.clone();
    stage.run(&format!("GRANT {outer} TO {inner}; GRANT {inner} TO {user}"));
    stage.policy_for("outer", "public.t", &outer, 2);
    assert_eq!(stage.effective("t", &user), ["outer"]);
    let mut client = stage.user();
    allows(&mut client, "t", 2);
    stage.run(&format!("REVOKE {outer} FROM {inner}"));
    pass(&mut client, &update("t", 10));
}

#[test]
fn a_nearer_group_is_not_more_specific_than_a_farther_one() {
    let mut stage = Stage::new();
    let (inner, outer) = (stage.db.role("inner"), stage.db.role("outer"));
    let user = stage.user.clone();
    stage.run(&format!("GRANT {outer} TO {inner}; GRANT {inner} TO {user}"));
    stage.policy_for("inner", "public.t", &inner, 5);
    stage.policy_for("outer", "public.t", &outer, 2);
    assert_eq!(stage.effective("t", &user), ["inner", "outer"]);
    stage.allows("t", 2);
}

#[test]
fn members_that_do_not_inherit_are_members() {
    let mut stage = Stage::new();
    let group = stage.db.role("team");
    let user = stage.user.clone();
    stage.run(&format!("ALTER ROLE {user} NOINHERIT; GRANT {group} TO {user}"));
    stage.policy_for("group", "public.t", &group, 2);
    stage.allows("t", 2);
}

#[test]
fn being_superuser_makes_nobody_a_member() {
    let mut stage = Stage::new();
    let group = stage.db.role("team");
    stage.policy_for("group", "public.t", &group, 2);
    assert!(stage.effective("t", "postgres").is_empty());
    stage.run(&update("t", 10));
}

#[test]
fn superusers_are_covered() {
    let mut stage = Stage::new();
    stage.policy("everybody", "public.t", 2);
    assert_eq!(stage.effective("t", "postgres"), ["everybody"]);
    allows(&mut stage.admin, "t", 2);
}

#[test]
fn owners_are_covered() {
    let mut stage = Stage::new();
    let user = stage.user.clone();
    stage.run(&format!("ALTER TABLE t OWNER TO {user}"));
    stage.policy("everybody", "public.t", 2);
    stage.allows("t", 2);
}

#[test]
fn set_role_adds_the_role_and_keeps_the_login() {
    let mut stage = Stage::new();
    let group = stage.db.role("team");
    let user = stage.user.clone();
    stage.run(&format!("GRANT {group} TO {user}"));
    stage.policy_for("login", "public.t", &user, 3);
    let mut client = stage.user();
    pass(&mut client, &format!("SET ROLE {group}"));
    allows(&mut client, "t", 3);
    // Both are the acting role itself, so both apply.
    stage.policy_for("set", "public.t", &group, 2);
    allows(&mut client, "t", 2);
    pass(&mut client, "RESET ROLE");
    allows(&mut client, "t", 3);
}

#[test]
fn set_role_to_another_role_leads_into_its_policies() {
    let mut stage = Stage::new();
    let group = stage.db.role("team");
    stage.policy_for("set", "public.t", &group, 2);
    let mut client = stage.db.admin();
    pass(&mut client, &update("t", 10));
    pass(&mut client, &format!("SET ROLE {group}"));
    allows(&mut client, "t", 2);
    pass(&mut client, "RESET ROLE");
    pass(&mut client, &update("t", 10));
}

#[test]
fn set_role_within_a_statement_counts_from_then_on() {
    let mut stage = Stage::new();
    let group = stage.db.role("team");
    stage.policy_for("set", "public.t", &group, 2);
    refused(&mut stage.admin, &format!("DO $$ BEGIN SET ROLE {group}; UPDATE t SET a = 1; END $$"));
}

#[test]
fn set_session_authorization_adds_the_session_user_and_keeps_the_login() {
    let mut stage = Stage::new();
    let user = stage.user.clone();
    let login = stage.db.role("root_login");
    stage.run(&format!("ALTER ROLE {login} SUPERUSER"));
    stage.policy_for("session", "public.t", &user, 4);
    let mut client = stage.db.connect(&login);
    pass(&mut client, &update("t", 10));
    pass(&mut client, &format!("SET SESSION AUTHORIZATION {user}"));
    allows(&mut client, "t", 4);
    stage.policy_for("login", "public.t", &login, 2);
    allows(&mut client, "t", 2);
    pass(&mut client, "RESET SESSION AUTHORIZATION");
    allows(&mut client, "t", 2);
}

#[test]
fn a_group_of_the_role_that_is_set_covers() {
    let mut stage = Stage::new();
    let (inner, outer) = (stage.db.role("inner"), stage.db.role("outer"));
    stage.run(&format!("GRANT {outer} TO {inner}"));
    stage.policy_for("outer", "public.t", &outer, 2);
    let mut client = stage.db.admin();
    pass(&mut client, &format!("SET ROLE {inner}"));
    allows(&mut client, "t", 2);
}

#[test]
fn a_security_definer_function_acts_for_its_caller() {
    let mut stage = Stage::new();
    let (user, owner) = (stage.user.clone(), stage.db.role("owner"));
    stage.run(&format!(
        "CREATE FUNCTION change(rows int) RETURNS void LANGUAGE sql SECURITY DEFINER
         AS 'UPDATE t SET a = 1 WHERE id <= rows';
         ALTER FUNCTION change OWNER TO {owner}"
    ));
    stage.policy_for("owner", "public.t", &owner, 1);
    let mut client = stage.user();
    pass(&mut client, "SELECT change(10)");
    stage.policy_for("caller", "public.t", &user, 3);
    pass(&mut client, "SELECT change(3)");
    refused(&mut client, "SELECT change(4)");
}

#[test]
fn foreign_key_actions_act_for_whoever_caused_them() {
    let mut stage = Stage::new();
    let (user, owner) = (stage.user.clone(), stage.db.role("owner"));
    stage.run(&format!(
        "CREATE TABLE parent (id int PRIMARY KEY);
         CREATE TABLE child (id int REFERENCES parent ON DELETE CASCADE);
         INSERT INTO parent SELECT generate_series(1, 3);
         INSERT INTO child SELECT p.id FROM parent AS p, generate_series(1, 4);
         GRANT ALL ON parent TO PUBLIC;
         ALTER TABLE child OWNER TO {owner}"
    ));
    stage.policy_for("owner", "public.child", &owner, 0);
    let mut client = stage.user();
    pass(&mut client, "DELETE FROM parent WHERE id = 1");
    stage.policy_for("caller", "public.child", &user, 3);
    let refusal = refused(&mut client, "DELETE FROM parent WHERE id = 2");
    assert_eq!(refusal.table, "child");
}

#[test]
fn a_role_that_is_dropped_and_made_again_is_covered_by_its_name() {
    let mut stage = Stage::new();
    let gone = stage.db.role("gone");
    stage.policy_for("gone", "public.t", &gone, 2);
    allows(&mut stage.db.connect(&gone), "t", 2);
    stage.run(&format!("DROP ROLE {gone}"));
    // The policy stays, and nobody is hurt by the name that nobody has.
    stage.allows_all("t");
    stage.run(&format!("CREATE ROLE {gone} LOGIN"));
    assert_eq!(stage.effective("t", &gone), ["gone"]);
    allows(&mut stage.db.connect(&gone), "t", 2);
}

#[test]
fn a_renamed_role_is_covered_by_its_name_in_running_sessions_too() {
    let mut stage = Stage::new();
    let user = stage.user.clone();
    stage.policy_for("named", "public.t", &user, 2);
    let mut client = stage.user();
    allows(&mut client, "t", 2);
    stage.run(&format!("ALTER ROLE {user} RENAME TO {user}_renamed"));
    pass(&mut client, &update("t", 10));
    stage.run(&format!("ALTER ROLE {user}_renamed RENAME TO {user}"));
    allows(&mut client, "t", 2);
}

#[test]
fn a_role_named_public_in_upper_case_is_itself_only() {
    let mut stage = Stage::new();
    let name = format!("Mixed Case {}", stage.db.name);
    stage.run(&format!("CREATE ROLE \"{name}\" LOGIN"));
    let sql = "SELECT writeguard.set_policy('mixed', tables => '{public.t}', roles => ARRAY[$1], max_rows => 2)";
    stage.admin.execute(sql, &[&name]).unwrap();
    allows(&mut stage.db.connect(&name), "t", 2);
    stage.allows_all("t");
}

// ---- By operation ----

#[test]
fn each_operation_has_the_policies_that_name_it() {
    let mut stage = Stage::new();
    stage.run(
        "SELECT writeguard.set_policy('u', tables => '{public.t}', operations => '{update}', max_rows => 4);
         SELECT writeguard.set_policy('d', tables => '{public.t}', operations => '{delete}', max_rows => 2)",
    );
    let user = stage.user.clone();
    assert_eq!(stage.effective_for("t", &user, "update"), ["u"]);
    assert_eq!(stage.effective_for("t", &user, "delete"), ["d"]);
    assert!(stage.effective_for("t", &user, "truncate").is_empty());
    let mut client = stage.user();
    allows(&mut client, "t", 4);
    refused(&mut client, "DELETE FROM t WHERE id <= 3");
    pass(&mut client, "DELETE FROM t WHERE id <= 2");
    pass(&mut client, "TRUNCATE t");
}

#[test]
fn a_policy_for_another_operation_sets_nothing_aside() {
    let mut stage = Stage::new();
    let user = stage.user.clone();
    stage.policy("all", "*.*", 2);
    stage
        .admin
        .execute(
            "SELECT writeguard.set_policy('d', tables => '{public.t}', roles => ARRAY[$1],
                                          operations => '{delete}', max_rows => 7)",
            &[&user],
        )
        .unwrap();
    assert_eq!(stage.effective_for("t", &user, "update"), ["all"]);
    assert_eq!(stage.effective_for("t", &user, "delete"), ["all<d", "d"]);
    stage.allows("t", 2);
    let mut client = stage.user();
    refused(&mut client, "DELETE FROM t WHERE id <= 8");
    pass(&mut client, "DELETE FROM t WHERE id <= 7");
}

#[test]
fn operations_of_one_policy_share_its_budget() {
    let mut stage = Stage::new();
    stage.table("u");
    stage.policy("both", "public.t public.u", 3);
    let mut client = stage.user();
    let both = |updates: i32| format!("WITH d AS (DELETE FROM u WHERE id <= 2) {}", update("t", updates));
    refused(&mut client, &both(2));
    pass(&mut client, &both(1));
}

#[test]
fn truncate_is_limited_by_the_policies_for_truncate() {
    let mut stage = Stage::new();
    stage.run("SELECT writeguard.set_policy('d', tables => '{public.t}', operations => '{truncate}', max_rows => 9)");
    let mut client = stage.user();
    pass(&mut client, &update("t", 10));
    let refusal = expect_refusal(client.batch_execute("TRUNCATE t"));
    assert_eq!(refusal.sqlstate, "WG005", "{refusal:?}");
    pass(&mut client, "DELETE FROM t WHERE id = 1; TRUNCATE t");
}

// ---- One budget ----

#[test]
fn all_tables_of_a_policy_share_its_budget() {
    let mut stage = Stage::new();
    stage.table("u");
    stage.policy("both", "public.*", 3);
    let mut client = stage.user();
    let both = |rows: i32| format!("WITH x AS ({}) {}", update("u", 2), update("t", rows));
    pass(&mut client, &both(1));
    refused(&mut client, &both(2));
}

#[test]
fn parent_and_cascade_share_the_budget() {
    let mut stage = Stage::new();
    stage.run(
        "CREATE TABLE parent (id int PRIMARY KEY);
         CREATE TABLE child (id int REFERENCES parent ON DELETE CASCADE);
         INSERT INTO parent SELECT generate_series(1, 3);
         INSERT INTO child SELECT id FROM parent;
         GRANT ALL ON parent, child TO PUBLIC",
    );
    stage.policy("both", "public.parent public.child", 3);
    let mut client = stage.user();
    refused(&mut client, "DELETE FROM parent WHERE id <= 2");
    pass(&mut client, "DELETE FROM parent WHERE id <= 1");
}

#[test]
fn two_policies_have_a_budget_each() {
    let mut stage = Stage::new();
    stage.table("u");
    stage.policy("of_t", "public.t", 3);
    stage.policy("of_u", "public.u", 3);
    pass(&mut stage.user(), &format!("WITH x AS ({}) {}", update("u", 3), update("t", 3)));
}

#[test]
fn the_budget_of_a_transaction_is_shared_by_the_tables_too() {
    let mut stage = Stage::new();
    stage.table("u");
    stage.run("SELECT writeguard.set_policy('both', tables => '{public.t,public.u}', max_rows_per_transaction => 3)");
    let mut client = stage.user();
    pass(&mut client, "BEGIN");
    pass(&mut client, &update("t", 2));
    pass(&mut client, &update("u", 1));
    refused(&mut client, &update("u", 1));
}

#[test]
fn the_strictest_limit_of_either_scope_decides() {
    let mut stage = Stage::new();
    stage.policy("statement", "public.t", 4);
    stage.run("SELECT writeguard.set_policy('transaction', tables => '{public.t}', max_rows_per_transaction => 6)");
    let mut client = stage.user();
    allows(&mut client, "t", 4);
    pass(&mut client, "BEGIN");
    pass(&mut client, &update("t", 4));
    let refusal = refused(&mut client, &update("t", 3));
    assert!(refusal.detail.contains("\"transaction\""), "{refusal:?}");
}

// ---- Names, not OIDs ----

#[test]
fn a_table_renamed_out_of_the_name_is_free_and_one_renamed_into_it_is_covered() {
    let mut stage = Stage::new();
    stage.table("u");
    stage.policy("named", "public.t", 2);
    let mut client = stage.user();
    allows(&mut client, "t", 2);
    pass(&mut client, &update("u", 10));
    stage.run("ALTER TABLE t RENAME TO t_old");
    pass(&mut client, &update("t_old", 10));
    stage.run("ALTER TABLE u RENAME TO t");
    allows(&mut client, "t", 2);
}

#[test]
fn a_table_swapped_in_under_the_name_is_covered_at_once() {
    let mut stage = Stage::new();
    stage.table("t_new");
    stage.policy("named", "public.t", 2);
    let mut client = stage.user();
    pass(&mut client, &update("t_new", 10));
    pass(&mut client, "PREPARE p AS UPDATE t SET a = 1");
    stage.run("BEGIN; ALTER TABLE t RENAME TO t_old; ALTER TABLE t_new RENAME TO t; COMMIT");
    allows(&mut client, "t", 2);
    refused(&mut client, "EXECUTE p");
    pass(&mut client, &update("t_old", 10));
}

#[test]
fn a_table_dropped_and_made_again_is_covered() {
    let mut stage = Stage::new();
    stage.policy("named", "public.t", 2);
    let mut client = stage.user();
    allows(&mut client, "t", 2);
    stage.run("DROP TABLE t");
    stage.table("t");
    allows(&mut client, "t", 2);
}

#[test]
fn a_rename_that_is_rolled_back_changes_nothing() {
    let mut stage = Stage::new();
    stage.policy("named", "public.t", 2);
    let mut client = stage.db.admin();
    pass(&mut client, "BEGIN; ALTER TABLE t RENAME TO free");
    pass(&mut client, &update("free", 10));
    pass(&mut client, "ROLLBACK");
    allows(&mut client, "t", 2);
}

#[test]
fn a_table_moved_to_another_schema_changes_its_policies() {
    let mut stage = Stage::new();
    stage.run("CREATE SCHEMA attic; GRANT USAGE ON SCHEMA attic TO PUBLIC");
    stage.policy("public", "public.*", 2);
    let mut client = stage.user();
    allows(&mut client, "public.t", 2);
    stage.run("ALTER TABLE t SET SCHEMA attic");
    pass(&mut client, &update("attic.t", 10));
    stage.policy("attic", "attic.t", 3);
    allows(&mut client, "attic.t", 3);
    stage.run("ALTER TABLE attic.t SET SCHEMA public");
    allows(&mut client, "public.t", 2);
}

#[test]
fn a_renamed_schema_changes_the_policies_of_its_tables() {
    let mut stage = Stage::new();
    stage.run("CREATE SCHEMA app; GRANT USAGE ON SCHEMA app TO PUBLIC");
    stage.table("app.t");
    stage.policy("app", "app.*", 2);
    let mut client = stage.user();
    allows(&mut client, "app.t", 2);
    stage.run("ALTER SCHEMA app RENAME TO app_old");
    pass(&mut client, &update("app_old.t", 10));
    stage.run("ALTER SCHEMA app_old RENAME TO app");
    allows(&mut client, "app.t", 2);
}

// ---- Policies that come, change and go ----

#[test]
fn a_policy_takes_effect_in_a_session_that_already_wrote() {
    let mut stage = Stage::new();
    let mut client = stage.user();
    pass(&mut client, &update("t", 10));
    stage.policy("p", "public.t", 2);
    allows(&mut client, "t", 2);
    stage.policy("p", "public.t", 4);
    allows(&mut client, "t", 4);
    stage.run("SELECT writeguard.drop_policy('p')");
    pass(&mut client, &update("t", 10));
}

#[test]
fn a_policy_takes_effect_for_statements_prepared_before_it() {
    let mut stage = Stage::new();
    let mut client = stage.user();
    let prepared = client.prepare("UPDATE t SET a = 1 WHERE id <= $1").unwrap();
    for _ in 0..7 {
        client.execute(&prepared, &[&10]).unwrap();
    }
    stage.policy("p", "public.t", 2);
    let refusal = expect_refusal(client.execute(&prepared, &[&3]));
    assert_eq!(refusal.sqlstate, "WG001", "{refusal:?}");
    assert_eq!(client.execute(&prepared, &[&2]).unwrap(), 2);
}

#[test]
fn a_policy_takes_effect_with_its_commit_and_not_before() {
    let mut stage = Stage::new();
    let mut client = stage.user();
    pass(&mut client, &update("t", 10));
    stage.run("BEGIN");
    stage.policy("p", "public.t", 2);
    pass(&mut client, &update("t", 10));
    stage.run("COMMIT");
    allows(&mut client, "t", 2);
}

#[test]
fn rows_changed_before_the_policy_are_not_counted_after_the_fact() {
    let mut stage = Stage::new();
    let mut client = stage.user();
    pass(&mut client, "BEGIN");
    pass(&mut client, &update("t", 10));
    stage.run("SELECT writeguard.set_policy('p', tables => '{public.t}', max_rows_per_transaction => 3)");
    pass(&mut client, &update("t", 3));
    refused(&mut client, &update("t", 1));
}

#[test]
fn a_dropped_policy_does_not_set_others_aside_any_more() {
    let mut stage = Stage::new();
    stage.policy("all", "*.*", 2);
    stage.policy("exact", "public.t", 5);
    let mut client = stage.user();
    allows(&mut client, "t", 5);
    stage.run("SELECT writeguard.drop_policy('exact')");
    allows(&mut client, "t", 2);
}

#[test]
fn an_extension_made_while_a_session_is_connected_takes_effect_there() {
    let db = Server::shared().plain_database();
    let mut admin = db.admin();
    pass(&mut admin, "CREATE TABLE t AS SELECT id, 0 AS a FROM generate_series(1, 10) AS id; GRANT ALL ON t TO PUBLIC");
    let mut idle = db.connect(&db.role("user"));
    let mut busy = db.connect(&db.role("user"));
    for client in [&mut idle, &mut busy] {
        pass(client, &update("t", 10));
    }
    pass(&mut admin, "CREATE EXTENSION pg_writeguard");
    pass(&mut busy, &update("t", 10));
    pass(&mut admin, "SELECT writeguard.set_policy('p', tables => '{public.t}', max_rows => 2)");
    allows(&mut idle, "t", 2);
    allows(&mut busy, "t", 2);
    pass(&mut admin, "DROP EXTENSION pg_writeguard");
    pass(&mut idle, &update("t", 10));
    pass(
        &mut admin,
        "CREATE EXTENSION pg_writeguard;
         SELECT writeguard.set_policy('p', tables => '{public.t}', max_rows => 3)",
    );
    allows(&mut idle, "t", 3);
    allows(&mut busy, "t", 3);
}

#[test]
fn an_extension_made_and_a_policy_set_in_one_transaction_take_effect() {
    let db = Server::shared().plain_database();
    let mut admin = db.admin();
    pass(&mut admin, "CREATE TABLE t AS SELECT id, 0 AS a FROM generate_series(1, 10) AS id; GRANT ALL ON t TO PUBLIC");
    let mut client = db.connect(&db.role("user"));
    pass(&mut client, &update("t", 10));
    pass(
        &mut admin,
        "BEGIN; CREATE EXTENSION pg_writeguard;
         SELECT writeguard.set_policy('p', tables => '{public.t}', max_rows => 2); COMMIT",
    );
    allows(&mut client, "t", 2);
    allows(&mut admin, "t", 2);
}

#[test]
fn an_extension_that_is_rolled_back_leaves_sessions_as_they_were() {
    let db = Server::shared().plain_database();
    let mut admin = db.admin();
    pass(&mut admin, "CREATE TABLE t AS SELECT id, 0 AS a FROM generate_series(1, 10) AS id");
    pass(
        &mut admin,
        "BEGIN; CREATE EXTENSION pg_writeguard;
         SELECT writeguard.set_policy('p', tables => '{public.t}', max_rows => 2);
         UPDATE t SET a = 1 WHERE id <= 2;
         ROLLBACK",
    );
    pass(&mut admin, "UPDATE t SET a = 1");
}

#[test]
fn policies_of_one_database_are_not_those_of_another() {
    let mut stage = Stage::new();
    let other = Stage::new();
    stage.policy("all", "*.*", 0);
    other.allows_all("t");
    stage.allows("t", 0);
}

#[test]
fn among_many_policies_the_right_one_is_found() {
    let mut stage = Stage::new();
    stage.run(
        "SELECT writeguard.set_policy('p' || n, tables => ARRAY['public.no_such_' || n || '_*'], max_rows => 0)
         FROM generate_series(1, 500) AS n",
    );
    stage.policy("mine", "public.t", 3);
    let user = stage.user.clone();
    assert_eq!(stage.effective("t", &user), ["mine"]);
    stage.allows("t", 3);
}

// ---- effective() ----

#[test]
fn effective_shows_the_limits() {
    let mut stage = Stage::new();
    stage.run(
        "SELECT writeguard.set_policy('p', tables => '{public.t}', max_rows => 0,
                                      max_rows_per_transaction => 9000000000, override => 'never');
         SELECT writeguard.set_policy('q', tables => '{public.t}')",
    );
    let rows = stage
        .admin
        .query(
            "SELECT concat_ws('|', operation, policy, coalesce(\"limit\", '-'), coalesce(value, '-'), applies,
                              coalesce(why_not, '-'), strictest, mode, override, coalesce(approvers, '-'), min_approvals)
             FROM writeguard.effective('t', 'postgres', 'update')",
            &[],
        )
        .unwrap();
    let rows: Vec<String> = rows.iter().map(|row| row.get(0)).collect();
    assert_eq!(
        rows,
        [
            "update|p|max_rows|0|t|-|t|enforce|never|-|1",
            "update|p|max_rows_per_transaction|9000000000|t|-|t|enforce|never|-|1",
            "update|q|-|-|f|no limit|f|enforce|token|-|1",
        ]
    );
}

#[test]
fn effective_is_for_everybody() {
    let mut stage = Stage::new();
    stage.policy("p", "public.t", 2);
    stage.run("REVOKE ALL ON t FROM PUBLIC");
    let row =
        stage.user().query_one("SELECT policy FROM writeguard.effective('t', current_user, 'delete')", &[]).unwrap();
    assert_eq!(row.get::<_, &str>(0), "p");
}

#[test]
fn effective_names_what_it_does_not_know() {
    let mut stage = Stage::new();
    for (arguments, sqlstate, word) in [
        ("'t', 'nobody_of_that_name', 'update'", "WG007", "nobody_of_that_name"),
        ("'t', 'postgres', 'upsert'", "WG007", "upsert"),
        ("NULL, 'postgres', 'update'", "WG007", "table"),
        ("'nowhere', 'postgres', 'update'", "42P01", "nowhere"),
    ] {
        let sql = format!("SELECT * FROM writeguard.effective({arguments})");
        let refusal = expect_refusal(stage.admin.batch_execute(&sql));
        assert_eq!(refusal.sqlstate, sqlstate, "{refusal:?}");
        assert!(refusal.message.contains(word), "{refusal:?}");
    }
}

#[test]
fn effective_and_the_guard_agree_after_every_change() {
    let mut stage = Stage::new();
    let user = stage.user.clone();
    let mut client = stage.user();
    stage.policy("all", "*.*", 2);
    assert_eq!(stage.effective("t", &user), ["all"]);
    allows(&mut client, "t", 2);
    stage.policy("exact", "public.t", 4);
    assert_eq!(stage.effective("t", &user), ["all<exact", "exact"]);
    allows(&mut client, "t", 4);
    stage.policy_for("mine", "*.*", &user, 3);
    assert_eq!(stage.effective("t", &user), ["all<exact", "exact", "mine"].map(str::to_owned));
    allows(&mut client, "t", 3);
    stage.run("SELECT writeguard.drop_policy('exact')");
    assert_eq!(stage.effective("t", &user), ["all<mine", "mine"]);
    allows(&mut client, "t", 3);
}

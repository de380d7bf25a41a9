//! What policies ask of approvals: who approves, how many, for how long; requests from their first to their last state.

use std::sync::{Arc, Mutex};

use crate::common::session::{arm, pass, text};
use crate::common::{Database, Refusal, Server, expect_refusal, wait_until};
use postgres::{Client, NoTls};
use serde_json::{Value, json};

/// Changes all five rows of `t`, which are more than the policy `p` allows.
const WRITE: &str = "UPDATE t SET a = 9";

/// A table `t` of five rows that the policy `p` limits to three, a requester, and people who may decide.
struct Stage {
    db: Database,
    admin: Client,
    requester: String,
}

impl Stage {
    fn new() -> Stage {
        Stage::with("")
    }

    /// With further arguments for the policy.
    fn with(arguments: &str) -> Stage {
        Stage::on(Server::shared(), arguments)
    }

    fn on(server: &Server, arguments: &str) -> Stage {
        let db = server.database();
        let mut admin = db.admin();
        let requester = db.role("requester");
        pass(
            &mut admin,
            "CREATE TABLE t (id int PRIMARY KEY, a int NOT NULL DEFAULT 0);
             INSERT INTO t SELECT generate_series(1, 5); GRANT ALL ON t TO PUBLIC",
        );
        let mut stage = Stage { db, admin, requester };
        stage.policy("p", arguments);
        stage
    }

    /// A policy on `t` with a limit of three rows and further arguments.
    #[track_caller]
    fn policy(&mut self, name: &str, arguments: &str) {
        let comma = if arguments.is_empty() { "" } else { ", " };
        pass(
            &mut self.admin,
            &format!(
                "SELECT writeguard.set_policy('{name}', tables => '{{public.t}}', max_rows => 3{comma}{arguments})"
            ),
        );
    }

    /// A role that nobody logs in as.
    fn group(&mut self) -> String {
        self.db.role("group")
    }

    /// A person who may decide, as a member of these groups.
    fn person(&mut self, groups: &[&str]) -> String {
        let person = self.db.role("person");
        pass(
            &mut self.admin,
            &format!(
                "GRANT EXECUTE ON FUNCTION writeguard.approve, writeguard.reject, writeguard.revoke TO {person};
                 GRANT SELECT ON writeguard.pending TO {person}"
            ),
        );
        for group in groups {
            pass(&mut self.admin, &format!("GRANT {group} TO {person}"));
        }
        person
    }

    fn requester(&self) -> Client {
        self.db.connect(&self.requester)
    }

    #[track_caller]
    fn request(&self) -> i64 {
        request(&mut self.requester(), WRITE)
    }

    #[track_caller]
    fn approve(&self, person: &str, id: i64) -> Option<String> {
        approve(&mut self.db.connect(person), id, "")
    }

    #[track_caller]
    fn not_approved(&self, person: &str, id: i64) -> Refusal {
        refused(&mut self.db.connect(person), &format!("SELECT writeguard.approve({id})"), "WG006")
    }

    /// The write under a token, by the requester.
    #[track_caller]
    fn write_passes(&self, token: &str) {
        let mut client = self.requester();
        arm(&mut client, token);
        pass(&mut client, WRITE);
    }

    #[track_caller]
    fn write_refused(&self, token: &str) -> Refusal {
        let mut client = self.requester();
        arm(&mut client, token);
        refused(&mut client, WRITE, "WG006")
    }

    #[track_caller]
    fn number(&mut self, sql: &str) -> i64 {
        number(&mut self.admin, sql)
    }

    #[track_caller]
    fn text(&mut self, sql: &str) -> String {
        text(&mut self.admin, sql)
    }

    fn state(&mut self, id: i64) -> String {
        self.text(&format!("SELECT state FROM writeguard.request WHERE id = {id}"))
    }

    fn policies(&mut self, id: i64) -> String {
        self.text(&format!("SELECT policies::text FROM writeguard.request WHERE id = {id}"))
    }

    fn changed(&mut self) -> i64 {
        self.number("SELECT count(*) FROM t WHERE a = 9")
    }
}

#[track_caller]
fn number(client: &mut Client, sql: &str) -> i64 {
    client.query_one(sql, &[]).unwrap_or_else(|error| panic!("{sql}: {:?}", Refusal::of(&error))).get(0)
}

#[track_caller]
fn refused(client: &mut Client, sql: &str, sqlstate: &str) -> Refusal {
    let refusal = expect_refusal(client.batch_execute(sql));
    assert_eq!(refusal.sqlstate, sqlstate, "{sql}: {refusal:?}");
    assert_ne!(refusal.hint, "", "{sql}: {refusal:?}");
    refusal
}

#[track_caller]
fn request(client: &mut Client, statement: &str) -> i64 {
    match client.query_one("SELECT writeguard.request($1::text, 'tests')", &[&statement]) {
        Ok(row) => row.get(0),
        Err(error) => panic!("{statement}: {:?}", Refusal::of(&error)),
    }
}

/// The token, where the approval was the last one; with further arguments.
#[track_caller]
fn approve(client: &mut Client, id: i64, arguments: &str) -> Option<String> {
    let comma = if arguments.is_empty() { "" } else { ", " };
    match client.query_one(&format!("SELECT writeguard.approve({id}{comma}{arguments})"), &[]) {
        Ok(row) => row.get(0),
        Err(error) => panic!("approve({id}): {:?}", Refusal::of(&error)),
    }
}

/// Message and DETAIL of each.
type Notices = Arc<Mutex<Vec<(String, String)>>>;

/// A session that keeps the notices it gets.
fn with_notices(db: &Database, user: &str) -> (Client, Notices) {
    let heard = Arc::new(Mutex::new(Vec::new()));
    let keep = Arc::clone(&heard);
    let mut config = db.config(user);
    config.notice_callback(move |notice| {
        keep.lock().unwrap().push((notice.message().to_owned(), notice.detail().unwrap_or_default().to_owned()));
    });
    (config.connect(NoTls).unwrap(), heard)
}

// ---- The policy columns ----

#[test]
fn approvers_must_be_a_role() {
    let mut stage = Stage::new();
    let group = stage.group();
    let misspelt = format!("{group}x");
    let refusal = refused(
        &mut stage.admin,
        &format!("SELECT writeguard.set_policy('p', tables => '{{t}}', approvers => '{misspelt}')"),
        "WG007",
    );
    assert!(refusal.message.contains(&misspelt) && refusal.detail.contains("group_"), "{refusal:?}");
    for argument in ["approvers => ''", "approvers => 'public'", "min_approvals => 0", "min_approvals => NULL"] {
        refused(&mut stage.admin, &format!("SELECT writeguard.set_policy('p', {argument})"), "WG007");
    }
    let document = json!([{"name": "p", "approvers": misspelt}]);
    let refusal = refused(&mut stage.admin, &format!("SELECT writeguard.import_policies('{document}')"), "WG007");
    assert!(refusal.message.contains("approvers"), "{refusal:?}");
}

#[test]
fn approvals_are_asked_for_where_a_token_lifts_only() {
    let mut stage = Stage::new();
    let group = stage.group();
    for override_ in ["flag", "never"] {
        for argument in [format!("approvers => '{group}'"), "min_approvals => 2".into()] {
            let refusal = refused(
                &mut stage.admin,
                &format!("SELECT writeguard.set_policy('p', {argument}, override => '{override_}')"),
                "WG007",
            );
            assert!(refusal.message.contains(override_), "{refusal:?}");
        }
        stage.policy("p", &format!("override => '{override_}', min_approvals => 1, approvers => NULL"));
    }
}

#[test]
fn approvers_travel_in_documents_and_change_alone() {
    let mut stage = Stage::new();
    let (group, other) = (stage.group(), stage.group());
    stage.policy("p", &format!("approvers => '{group}', min_approvals => 2"));
    let action = "SELECT action FROM writeguard.import_policies(writeguard.export_policies(), prune => true)";
    assert_eq!(stage.text(action), "unchanged");
    for (approvers, people) in [(&other, 2), (&other, 3)] {
        let arguments = format!("approvers => '{approvers}', min_approvals => {people}");
        let sql = format!("SELECT writeguard.set_policy('p', tables => '{{public.t}}', max_rows => 3, {arguments})");
        assert_eq!(stage.text(&sql), "changed");
        let stored = stage.text("SELECT approvers || min_approvals FROM writeguard.policy");
        assert_eq!(stored, format!("{approvers}{people}"));
    }
}

#[test]
fn check_setup_tells_of_approvers_that_vanished() {
    let mut stage = Stage::new();
    let group = stage.group();
    stage.policy("p", &format!("approvers => '{group}'"));
    let told = "SELECT count(*) FROM writeguard.check_setup() WHERE subject = 'policy p' AND severity = 'problem'
                AND problem LIKE '%approvers%'";
    assert_eq!(stage.number(told), 0);
    pass(&mut stage.admin, &format!("DROP ROLE {group}"));
    assert_eq!(stage.number(told), 1);
}

#[test]
fn check_setup_tells_of_approvals_that_too_few_can_give() {
    let mut stage = Stage::new();
    let group = stage.group();
    let told = "SELECT coalesce(min(problem), '') FROM writeguard.check_setup() WHERE subject = 'policy p'";
    stage.policy("p", &format!("approvers => '{group}', min_approvals => 2"));
    assert_eq!(stage.text(told), format!("it asks for 2 approvals by members of {group}; logins that can give one: 0"));
    stage.person(&[&group]);
    let anna = stage.person(&[&group]);
    assert_eq!(stage.text(told), "");
    pass(&mut stage.admin, &format!("REVOKE EXECUTE ON FUNCTION writeguard.approve FROM {anna}"));
    assert!(stage.text(told).ends_with("give one: 1"));
    let fix = "SELECT fix FROM writeguard.check_setup() WHERE subject = 'policy p'";
    let fix = stage.text(fix);
    pass(&mut stage.admin, &fix);
    assert_eq!(stage.text(told), "");
    // One approval anybody can give who is superuser.
    stage.policy("p", "");
    assert_eq!(stage.text(told), "");
}

// ---- What a request is about ----

#[test]
fn a_request_is_about_the_policies_that_would_refuse() {
    let mut stage = Stage::new();
    stage.policy("q", "max_rows_per_transaction => 4");
    pass(
        &mut stage.admin,
        "SELECT writeguard.set_policy('wide', tables => '{public.t}', max_rows => 5);
         SELECT writeguard.set_policy('deletes', tables => '{public.t}', operations => '{delete}', max_rows => 0)",
    );
    let id = stage.request();
    assert_eq!(stage.policies(id), "{p,q}");
    // Within all limits: those that a token could have to lift later.
    let id = request(&mut stage.requester(), "UPDATE t SET a = 9 WHERE id = 1");
    assert_eq!(stage.policies(id), "{p,q,wide}");
    let id = request(&mut stage.requester(), "DELETE FROM t WHERE id = 1");
    assert_eq!(stage.policies(id), "{deletes}");
}

#[test]
fn every_kind_of_limit_makes_a_policy_one_of_the_request() {
    let mut stage = Stage::new();
    pass(&mut stage.admin, "INSERT INTO t SELECT generate_series(6, 30)");
    for arguments in [
        "max_rows => 5",
        "max_rows_per_transaction => 5",
        "rate_rows => 5",
        "max_fraction => 0.1",
        "require_where => true",
        "require_transaction => true",
    ] {
        let sql = format!("SELECT writeguard.set_policy('p', tables => '{{public.t}}', {arguments})");
        pass(&mut stage.admin, &sql);
        pass(&mut stage.admin, "SELECT writeguard.set_policy('wide', tables => '{public.t}', max_rows => 1000)");
        let id = stage.request();
        assert_eq!(stage.policies(id), "{p}", "{arguments}");
        pass(&mut stage.admin, "SELECT writeguard.drop_policy('wide')");
    }
    // A rehearsal takes nothing of a rate.
    pass(&mut stage.admin, "SELECT writeguard.set_policy('p', tables => '{public.t}', rate_rows => 30)");
    for _ in 0..3 {
        stage.request();
    }
    pass(&mut stage.requester(), WRITE);
}

#[test]
fn a_transaction_block_around_the_request_counts() {
    let mut stage = Stage::new();
    pass(
        &mut stage.admin,
        "SELECT writeguard.set_policy('p', tables => '{public.t}', require_transaction => true);
         SELECT writeguard.set_policy('q', tables => '{public.t}', max_rows => 4)",
    );
    let id = stage.request();
    assert_eq!(stage.policies(id), "{p,q}");
    let mut client = stage.requester();
    pass(&mut client, "BEGIN");
    let id = request(&mut client, WRITE);
    pass(&mut client, "COMMIT");
    assert_eq!(stage.policies(id), "{q}");
}

#[test]
fn what_no_approval_can_lift_is_said_at_once() {
    let mut stage = Stage::new();
    stage.policy("hard", "override => 'never'");
    let refusal = refused(&mut stage.requester(), &format!("SELECT writeguard.request('{WRITE}'::text, 'x')"), "WG007");
    assert!(refusal.message.contains("\"hard\"") && refusal.hint.contains("effective"), "{refusal:?}");
    // Where it would not refuse it has no say.
    let id = request(&mut stage.requester(), "UPDATE t SET a = 9 WHERE id < 3");
    assert_eq!(stage.policies(id), "{p}");
    assert_eq!(stage.changed(), 0);
}

#[test]
fn what_the_flag_alone_lifts_can_be_approved_and_asks_for_no_more_than_that() {
    let mut stage = Stage::with("override => 'flag'");
    let id = stage.request();
    assert_eq!(stage.policies(id), "{p}");
    // With another one that a token lifts, the token is what is missing.
    stage.policy("q", "");
    let id = stage.request();
    assert_eq!(stage.policies(id), "{q}");
}

#[test]
fn a_request_inside_a_rehearsal_is_none() {
    let mut stage = Stage::new();
    pass(
        &mut stage.admin,
        "CREATE TABLE other (id int); INSERT INTO other SELECT generate_series(1, 9); GRANT ALL ON other TO PUBLIC;
         SELECT writeguard.set_policy('q', tables => '{public.other}', max_rows => 3);
         CREATE FUNCTION f() RETURNS int LANGUAGE plpgsql AS $$
         BEGIN
           UPDATE t SET a = 9;
           BEGIN PERFORM writeguard.request('UPDATE other SET id = id'::text, 'inner'); EXCEPTION WHEN OTHERS THEN NULL; END;
           RETURN 1;
         END $$",
    );
    let id = request(&mut stage.requester(), "SELECT f()");
    assert_eq!(stage.policies(id), "{p}");
    assert_eq!(stage.number("SELECT count(*) FROM writeguard.request"), 1);
}

// ---- Who approves ----

#[test]
fn only_members_of_the_approvers_approve() {
    let mut stage = Stage::new();
    let group = stage.group();
    stage.policy("p", &format!("approvers => '{group}'"));
    let (member, stranger) = (stage.person(&[&group]), stage.person(&[]));
    let id = stage.request();
    let refusal = stage.not_approved(&stranger, id);
    assert!(refusal.message.contains(&stranger) && refusal.detail.contains(&group), "{refusal:?}");
    assert!(refusal.hint.contains(&group), "{refusal:?}");
    // A superuser is no member because of that.
    let refusal = stage.not_approved("postgres", id);
    assert!(refusal.message.contains("postgres"), "{refusal:?}");
    assert_eq!(stage.number("SELECT count(*) FROM writeguard.approval"), 0);
    let token = stage.approve(&member, id).unwrap();
    stage.write_passes(&token);
    assert_eq!(stage.changed(), 5);
}

#[test]
fn who_is_a_member_in_two_steps_is_one() {
    let mut stage = Stage::new();
    let (outer, inner) = (stage.group(), stage.group());
    stage.policy("p", &format!("approvers => '{outer}'"));
    pass(&mut stage.admin, &format!("GRANT {outer} TO {inner}"));
    let person = stage.person(&[&inner]);
    pass(&mut stage.admin, &format!("ALTER ROLE {person} NOINHERIT; ALTER ROLE {inner} NOINHERIT"));
    let id = stage.request();
    assert!(stage.approve(&person, id).is_some());
}

#[test]
fn a_role_name_that_needs_quotes_is_a_role() {
    let mut stage = Stage::new();
    let group = "The \"DBA\"s, all of them";
    let quoted = "\"The \"\"DBA\"\"s, all of them\"";
    pass(&mut stage.admin, &format!("CREATE ROLE {quoted}"));
    stage.policy("p", &format!("approvers => '{group}'"));
    let (member, stranger) = (stage.person(&[quoted]), stage.person(&[]));
    let id = stage.request();
    let refusal = stage.not_approved(&stranger, id);
    assert!(refusal.hint.contains(quoted), "{refusal:?}");
    assert!(stage.approve(&member, id).is_some());
    pass(&mut stage.admin, &format!("DROP ROLE {quoted}"));
}

#[test]
fn two_people_must_approve_where_the_policy_says_so() {
    let mut stage = Stage::with("min_approvals => 2");
    let (anna, bert) = (stage.person(&[]), stage.person(&[]));
    let id = stage.request();
    let (mut first, heard) = with_notices(&stage.db, &anna);
    assert_eq!(approve(&mut first, id, "comment => 'fine'"), None);
    let heard = heard.lock().unwrap().clone();
    assert_eq!(
        heard,
        [(format!("request {id} needs 1 more approval"), "Policy \"p\" asks for 2 approvals, and has 1.".to_owned())]
    );
    assert_eq!(stage.state(id), "pending");
    let refusal = stage.not_approved(&anna, id);
    assert!(refusal.message.contains("already") && refusal.message.contains(&anna), "{refusal:?}");
    let token = stage.approve(&bert, id).unwrap();
    assert_eq!(stage.state(id), "approved");
    stage.write_passes(&token);
    let events = stage.text(
        "SELECT string_agg(kind || '/' || coalesce(reason, '-'), ', ' ORDER BY id) FROM writeguard.event
         WHERE approval IS NOT NULL",
    );
    assert_eq!(
        events,
        format!("requested/tests, approved/fine (request {id} needs 1 more approval), approved/-, overridden/-")
    );
}

#[test]
fn one_login_is_one_person_whatever_it_sets() {
    let mut stage = Stage::with("min_approvals => 2");
    let (anna, bert) = (stage.person(&[]), stage.person(&[]));
    pass(&mut stage.admin, &format!("GRANT {bert} TO {anna}; ALTER ROLE {anna} SUPERUSER"));
    let id = stage.request();
    assert_eq!(stage.approve(&anna, id), None);
    let mut client = stage.db.connect(&anna);
    let attempt = format!("SELECT writeguard.approve({id})");
    for sql in [
        format!("SET ROLE {bert}; {attempt}"),
        format!("SET SESSION AUTHORIZATION {bert}; {attempt}"),
        format!(
            "CREATE FUNCTION f() RETURNS text LANGUAGE sql SECURITY DEFINER AS '{attempt}';
             ALTER FUNCTION f() OWNER TO {bert}; SELECT f()"
        ),
        format!("SET application_name = '{bert}'; {attempt}"),
    ] {
        refused(&mut client, &sql, "WG006");
        pass(&mut client, "ROLLBACK; RESET ROLE; RESET SESSION AUTHORIZATION");
    }
    // Nor another name.
    drop(client);
    let renamed = format!("{anna}_renamed");
    pass(&mut stage.admin, &format!("ALTER ROLE {anna} RENAME TO {renamed}"));
    stage.not_approved(&renamed, id);
    // And who has that name now is taken for the one who had it.
    let id = stage.request();
    assert_eq!(stage.approve(&renamed, id), None);
    pass(&mut stage.admin, &format!("ALTER ROLE {renamed} RENAME TO {anna}; ALTER ROLE {bert} RENAME TO {renamed}"));
    stage.not_approved(&renamed, id);
    assert_eq!(stage.number("SELECT count(*) FROM writeguard.approval"), 2);
    pass(&mut stage.admin, &format!("ALTER ROLE {anna} NOSUPERUSER"));
}

#[test]
fn the_requester_is_never_one_of_the_approvers() {
    let mut stage = Stage::new();
    let group = stage.group();
    stage.policy("p", &format!("approvers => '{group}', min_approvals => 2"));
    let requester = stage.requester.clone();
    let other = stage.person(&[&group]);
    pass(
        &mut stage.admin,
        &format!(
            "GRANT {group}, {other} TO {requester};
             GRANT EXECUTE ON FUNCTION writeguard.approve TO {requester};
             ALTER ROLE {requester} SUPERUSER"
        ),
    );
    let id = stage.request();
    let mut client = stage.requester();
    for before in ["", "SET ROLE $;", "SET SESSION AUTHORIZATION $;"] {
        let before = before.replace('$', &other);
        let refusal = refused(&mut client, &format!("{before} SELECT writeguard.approve({id})"), "WG006");
        assert!(refusal.message.contains("own request"), "{refusal:?}");
        pass(&mut client, "RESET ROLE; RESET SESSION AUTHORIZATION");
    }
    assert_eq!(stage.approve(&other, id), None);
    pass(&mut stage.admin, &format!("ALTER ROLE {requester} NOSUPERUSER"));
}

#[test]
fn all_policies_of_a_request_must_be_satisfied() {
    let mut stage = Stage::new();
    let (owners, dbas) = (stage.group(), stage.group());
    stage.policy("p", &format!("approvers => '{owners}'"));
    stage.policy("q", &format!("approvers => '{dbas}', min_approvals => 2"));
    let owner = stage.person(&[&owners]);
    let (first, second, both) = (stage.person(&[&dbas]), stage.person(&[&dbas]), stage.person(&[&owners, &dbas]));
    let id = stage.request();
    let (mut client, heard) = with_notices(&stage.db, &first);
    assert_eq!(approve(&mut client, id, ""), None);
    let detail = heard.lock().unwrap()[0].1.clone();
    assert_eq!(
        detail,
        format!(
            "Policy \"p\" asks for 1 approval by members of \"{owners}\", and has 0. \
             Policy \"q\" asks for 2 approvals by members of \"{dbas}\", and has 1."
        )
    );
    assert_eq!(stage.approve(&second, id), None);
    let token = stage.approve(&owner, id).unwrap();
    stage.write_passes(&token);

    // Who is in both counts for both.
    let id = stage.request();
    assert_eq!(stage.approve(&both, id), None);
    assert!(stage.approve(&first, id).is_some());
}

#[test]
fn the_smallest_maximum_holds_and_raises_only_where_all_say_so() {
    let mut stage = Stage::with("min_approvals => 2");
    let (anna, bert) = (stage.person(&[]), stage.person(&[]));
    for (first, second, holds) in [
        ("", "", None),
        ("max_rows => 4", "", Some(4)),
        ("", "max_rows => 4", Some(4)),
        ("max_rows => 8", "max_rows => 7", Some(7)),
        ("max_rows => 8", "max_rows => 2", Some(2)),
        ("max_rows => 8", "", None),
        ("", "max_rows => 8", None),
        ("max_rows => 0", "max_rows => 9", Some(0)),
    ] {
        let id = stage.request();
        assert_eq!(approve(&mut stage.db.connect(&anna), id, first), None);
        assert!(approve(&mut stage.db.connect(&bert), id, second).is_some());
        let max_rows: Option<i64> =
            stage.admin.query_one("SELECT max_rows FROM writeguard.request WHERE id = $1", &[&id]).unwrap().get(0);
        assert_eq!(max_rows, holds, "{first} / {second}");
    }
}

#[test]
fn the_shortest_lifetime_holds_from_the_last_approval_on() {
    let mut stage = Stage::with("min_approvals => 2");
    let (anna, bert) = (stage.person(&[]), stage.person(&[]));
    for (first, second, seconds) in [
        ("", "", "900"),
        ("valid_for => '5 minutes'", "", "300"),
        ("", "valid_for => '5 minutes'", "300"),
        // Who says nothing says the default.
        ("valid_for => '1 hour'", "", "900"),
        ("valid_for => '1 hour'", "valid_for => '2 hours'", "3600"),
    ] {
        let id = stage.request();
        assert_eq!(approve(&mut stage.db.connect(&anna), id, first), None);
        let sql = format!(
            "UPDATE writeguard.approval SET approved_at = approved_at - interval '1 hour' WHERE request = {id}"
        );
        pass(&mut stage.admin, &sql);
        assert!(approve(&mut stage.db.connect(&bert), id, second).is_some());
        let life = format!(
            "SELECT round(extract(epoch FROM expires_at - decided_at))::text FROM writeguard.request WHERE id = {id}"
        );
        assert_eq!(stage.text(&life), seconds, "{first} / {second}");
    }
}

#[test]
fn a_lifetime_is_bounded_by_the_setting() {
    let mut stage = Stage::new();
    let anna = stage.person(&[]);
    let id = stage.request();
    let mut client = stage.db.connect(&anna);
    for interval in
        ["25 hours", "1 day 1 second", "1 month", "178000000 years", "1000 months -29998 days", "-1 month 32 days"]
    {
        let refusal =
            refused(&mut client, &format!("SELECT writeguard.approve({id}, valid_for => '{interval}')"), "WG007");
        assert!(refusal.message.contains("1 d") && refusal.detail.contains("approval_max_lifetime"), "{refusal:?}");
    }
    for interval in ["0", "-1 second", "1 month -30 days", "-178000000 years", "-1 month 29 days"] {
        refused(&mut client, &format!("SELECT writeguard.approve({id}, valid_for => '{interval}')"), "WG007");
    }
    assert_eq!(stage.state(id), "pending");
    // Months of 30 days cancel out exactly: what is stored is the number of seconds.
    assert!(approve(&mut client, id, "valid_for => '1000 months -29999 days'").is_some());
    let life = "SELECT extract(epoch FROM expires_at - decided_at)::int::text FROM writeguard.request";
    assert_eq!(stage.text(life), "86400");
    // The default is bounded as well.
    let server = Server::start(&["writeguard.approval_lifetime = 1h", "writeguard.approval_max_lifetime = 10min"]);
    let mut stage = Stage::on(&server, "");
    let anna = stage.person(&[]);
    let id = stage.request();
    refused(&mut stage.db.connect(&anna), &format!("SELECT writeguard.approve({id}, valid_for => '11 min')"), "WG007");
    assert!(stage.approve(&anna, id).is_some());
    assert_eq!(stage.text(life), "600");
}

// ---- What is judged when the token is used ----

#[test]
fn approvals_of_people_who_are_no_approvers_any_more_do_not_count() {
    let mut stage = Stage::new();
    let group = stage.group();
    stage.policy("p", &format!("approvers => '{group}', min_approvals => 2"));
    let (anna, bert, carl) = (stage.person(&[&group]), stage.person(&[&group]), stage.person(&[&group]));
    let id = stage.request();
    assert_eq!(stage.approve(&anna, id), None);
    pass(&mut stage.admin, &format!("REVOKE {group} FROM {anna}"));
    assert_eq!(stage.approve(&bert, id), None);
    let token = stage.approve(&carl, id).unwrap();
    pass(&mut stage.admin, &format!("REVOKE {group} FROM {bert}"));
    let refusal = stage.write_refused(&token);
    assert!(refusal.message.contains("\"p\" asks for more approvals"), "{refusal:?}");
    assert!(refusal.detail.contains("asks for 2") && refusal.detail.contains("has 1"), "{refusal:?}");
    assert!(refusal.hint.contains("writeguard.request"), "{refusal:?}");
    assert_eq!((stage.changed(), stage.state(id)), (0, "approved".into()));
    let recorded =
        "SELECT count(*) FROM writeguard.event WHERE kind = 'token_refused' AND approval = 1 AND policy = 'p'";
    assert_eq!(stage.number(&recorded.replace("= 1", &format!("= {id}"))), 1);
    pass(&mut stage.admin, &format!("GRANT {group} TO {anna}"));
    stage.write_passes(&token);
}

#[test]
fn a_policy_that_asks_for_more_since_the_approval_gets_more() {
    let mut stage = Stage::new();
    let (anna, group) = (stage.person(&[]), stage.group());
    let id = stage.request();
    let token = stage.approve(&anna, id).unwrap();
    for (arguments, words) in [
        ("min_approvals => 2".to_owned(), "asks for 2 approvals, and".to_owned()),
        (format!("approvers => '{group}'"), format!("asks for 1 approval by members of \"{group}\", and")),
    ] {
        stage.policy("p", &arguments);
        let refusal = stage.write_refused(&token);
        assert!(refusal.detail.contains(&words), "{refusal:?}");
    }
    stage.policy("p", "override => 'never'");
    let mut client = stage.requester();
    arm(&mut client, &token);
    refused(&mut client, WRITE, "WG001");
    stage.policy("p", "");
    stage.write_passes(&token);
}

#[test]
fn a_policy_that_was_not_there_at_the_review_asks_all_the_same() {
    let mut stage = Stage::new();
    let (anna, group) = (stage.person(&[]), stage.group());
    let id = stage.request();
    let token = stage.approve(&anna, id).unwrap();
    stage.policy("q", &format!("approvers => '{group}'"));
    let refusal = stage.write_refused(&token);
    assert!(refusal.message.contains("\"q\""), "{refusal:?}");
    // The same where the token is accepted for the first policy already, which has the smaller limit.
    pass(
        &mut stage.admin,
        &format!("SELECT writeguard.set_policy('q', tables => '{{public.t}}', max_rows => 4, approvers => '{group}')"),
    );
    let refusal = stage.write_refused(&token);
    assert!(refusal.message.contains("\"q\""), "{refusal:?}");
    assert_eq!((stage.changed(), stage.state(id)), (0, "approved".into()));
    pass(&mut stage.admin, &format!("GRANT {group} TO {anna}"));
    stage.write_passes(&token);
}

#[test]
fn an_exception_block_around_a_demand_lifts_nothing_and_spends_nothing() {
    let mut stage = Stage::new();
    let (anna, group) = (stage.person(&[]), stage.group());
    pass(
        &mut stage.admin,
        "CREATE FUNCTION f() RETURNS text LANGUAGE plpgsql AS $$
         BEGIN
           BEGIN UPDATE t SET a = 9; EXCEPTION WHEN SQLSTATE 'WG006' THEN RETURN 'refused'; END;
           RETURN 'passed';
         END $$",
    );
    let id = request(&mut stage.requester(), "SELECT f()");
    let token = stage.approve(&anna, id).unwrap();
    for (arguments, outcome, state, changed) in
        [(format!("approvers => '{group}'"), "refused", "approved", 0), (String::new(), "passed", "spent", 5)]
    {
        stage.policy("p", &arguments);
        let mut client = stage.requester();
        arm(&mut client, &token);
        assert_eq!(text(&mut client, "SELECT f()"), outcome);
        assert_eq!((stage.state(id).as_str(), stage.changed()), (state, changed), "{arguments}");
    }
}

#[test]
fn a_policy_that_is_gone_asks_for_nothing_and_one_that_nothing_lifts_is_told() {
    let mut stage = Stage::new();
    let (anna, group) = (stage.person(&[]), stage.group());
    stage.policy("p", &format!("approvers => '{group}'"));
    let id = stage.request();
    stage.policy("p", "override => 'never'");
    let refusal = stage.not_approved(&anna, id);
    assert!(refusal.message.contains("\"p\"") && refusal.hint.contains("reject"), "{refusal:?}");
    pass(&mut stage.admin, "SELECT writeguard.drop_policy('p')");
    let (asks, needed) = (
        stage.text("SELECT asks::text FROM writeguard.pending"),
        stage.number("SELECT approvals_needed::bigint FROM writeguard.pending"),
    );
    assert_eq!((asks.as_str(), needed), ("", 1));
    assert!(stage.approve(&anna, id).is_some());
}

#[test]
fn approvers_that_are_dropped_or_renamed_are_nobody() {
    let mut stage = Stage::new();
    let group = stage.group();
    stage.policy("p", &format!("approvers => '{group}'"));
    let (anna, bert) = (stage.person(&[&group]), stage.person(&[]));
    let id = stage.request();
    let other = stage.request();
    let token = stage.approve(&anna, id).unwrap();
    pass(&mut stage.admin, &format!("ALTER ROLE {group} RENAME TO {group}_renamed"));
    let refusal = stage.not_approved(&anna, other);
    assert!(refusal.detail.contains("does not exist any more"), "{refusal:?}");
    let refusal = stage.write_refused(&token);
    assert!(refusal.detail.contains("has 0"), "{refusal:?}");
    // Another role of that name has other members.
    pass(&mut stage.admin, &format!("CREATE ROLE {group}; GRANT {group} TO {bert}"));
    stage.not_approved(&anna, other);
    stage.write_refused(&token);
    assert!(stage.approve(&bert, other).is_some());
    pass(&mut stage.admin, &format!("DROP ROLE {group}; ALTER ROLE {group}_renamed RENAME TO {group}"));
    // A dropped person is a member of nothing, and neither is a new one of that name.
    pass(
        &mut stage.admin,
        &format!("DROP OWNED BY {anna}; DROP ROLE {anna}; CREATE ROLE {anna} LOGIN; GRANT {group} TO {anna}"),
    );
    let refusal = stage.write_refused(&token);
    assert!(refusal.detail.contains("has 0"), "{refusal:?}");
}

#[test]
fn who_approved_gets_the_token_where_nothing_is_missing_any_more() {
    let mut stage = Stage::with("min_approvals => 2");
    let anna = stage.person(&[]);
    let id = stage.request();
    assert_eq!(stage.approve(&anna, id), None);
    stage.not_approved(&anna, id);
    stage.policy("p", "");
    let token = stage.approve(&anna, id).unwrap();
    assert_eq!(stage.number("SELECT count(*) FROM writeguard.approval"), 1);
    stage.write_passes(&token);
}

// ---- Reject and revoke ----

#[test]
fn a_revoked_token_is_good_for_nothing() {
    let mut stage = Stage::new();
    let (anna, bert) = (stage.person(&[]), stage.person(&[]));
    let id = stage.request();
    let token = stage.approve(&anna, id).unwrap();
    pass(&mut stage.db.connect(&bert), &format!("SELECT writeguard.revoke({id}, 'changed my mind')"));
    let refusal = stage.write_refused(&token);
    assert!(refusal.message.contains("revoked"), "{refusal:?}");
    let mut requester = stage.requester();
    assert_eq!(text(&mut requester, "SELECT state FROM writeguard.my_requests"), "revoked");
    let event = stage.text("SELECT login || '/' || reason FROM writeguard.event WHERE kind = 'revoked'");
    assert_eq!(event, format!("{bert}/changed my mind"));
    // A decision cannot be changed.
    for call in ["approve", "reject", "revoke"] {
        let refusal = refused(&mut stage.db.connect(&bert), &format!("SELECT writeguard.{call}({id})"), "WG006");
        assert!(refusal.message.contains("already revoked"), "{refusal:?}");
    }
}

#[test]
fn a_pending_request_can_be_revoked_also_by_who_made_it() {
    let mut stage = Stage::with("min_approvals => 2");
    let anna = stage.person(&[]);
    let id = stage.request();
    assert_eq!(stage.approve(&anna, id), None);
    let sql = format!("SELECT writeguard.revoke({id})");
    let refusal = expect_refusal(stage.requester().batch_execute(&sql));
    assert_eq!(refusal.sqlstate, "42501");
    let requester = stage.requester.clone();
    pass(&mut stage.admin, &format!("GRANT EXECUTE ON FUNCTION writeguard.revoke TO {requester}"));
    pass(&mut stage.requester(), &sql);
    assert_eq!(stage.state(id), "revoked");
    assert_eq!(stage.number("SELECT count(*) FROM writeguard.pending"), 0);
    let refusal = stage.not_approved(&anna, id);
    assert!(refusal.message.contains("already revoked"), "{refusal:?}");
}

#[test]
fn what_is_over_cannot_be_revoked() {
    let mut stage = Stage::new();
    let anna = stage.person(&[]);
    let mut client = stage.db.connect(&anna);
    let spent = stage.request();
    let token = stage.approve(&anna, spent).unwrap();
    stage.write_passes(&token);
    let rejected = stage.request();
    pass(&mut client, &format!("SELECT writeguard.reject({rejected})"));
    let expired = stage.request();
    pass(&mut stage.admin, &format!("UPDATE writeguard.request SET expires_at = now() WHERE id = {expired}"));
    for (id, state) in [(spent, "spent"), (rejected, "rejected"), (expired, "expired")] {
        for call in ["approve", "reject", "revoke"] {
            let refusal = refused(&mut client, &format!("SELECT writeguard.{call}({id})"), "WG006");
            assert!(refusal.message.contains(&format!("already {state}")), "{call}: {refusal:?}");
        }
    }
    for call in ["approve", "reject", "revoke"] {
        refused(&mut client, &format!("SELECT writeguard.{call}(424242)"), "WG007");
        refused(&mut client, &format!("SELECT writeguard.{call}(-1)"), "WG007");
        refused(&mut client, &format!("SELECT writeguard.{call}(NULL)"), "WG007");
    }
}

#[test]
fn one_of_two_can_still_reject() {
    let mut stage = Stage::with("min_approvals => 2");
    let (anna, bert) = (stage.person(&[]), stage.person(&[]));
    let id = stage.request();
    assert_eq!(stage.approve(&anna, id), None);
    pass(&mut stage.db.connect(&bert), &format!("SELECT writeguard.reject({id}, 'no')"));
    assert_eq!(stage.state(id), "rejected");
    let refusal = stage.not_approved(&bert, id);
    assert!(refusal.message.contains("already rejected"), "{refusal:?}");
    let approved = stage.request();
    for person in [&anna, &bert] {
        stage.approve(person, approved);
    }
    let refusal = refused(&mut stage.db.connect(&bert), &format!("SELECT writeguard.reject({approved})"), "WG006");
    assert!(refusal.message.contains("already approved") && refusal.hint.contains("revoke"), "{refusal:?}");
}

#[test]
fn deciding_is_for_those_with_the_right_to_execute_it() {
    let mut stage = Stage::new();
    let stranger = stage.db.role("stranger");
    let id = stage.request();
    let mut client = stage.db.connect(&stranger);
    for sql in [
        &format!("SELECT writeguard.approve({id})"),
        &format!("SELECT writeguard.reject({id})"),
        &format!("SELECT writeguard.revoke({id})"),
        "TABLE writeguard.pending",
        "TABLE writeguard.approval_ask",
        "TABLE writeguard.approval",
        "TABLE writeguard.request",
        "INSERT INTO writeguard.approval (request, approver, approver_oid, valid_for) VALUES (1, 'x', 10, '1 day')",
    ] {
        assert_eq!(expect_refusal(client.batch_execute(sql)).sqlstate, "42501", "{sql}");
    }
    pass(&mut stage.admin, &format!("GRANT pg_write_all_data, pg_read_all_data TO {stranger}"));
    for sql in [
        "UPDATE writeguard.request SET state = 'approved'",
        "INSERT INTO writeguard.approval (request, approver, approver_oid, valid_for) VALUES (1, 'x', 10, '1 day')",
        "DELETE FROM writeguard.approval",
    ] {
        assert_eq!(expect_refusal(client.batch_execute(sql)).sqlstate, "42501", "{sql}");
    }
}

// ---- What people see ----

#[test]
fn pending_has_its_columns_in_their_order() {
    let mut stage = Stage::new();
    let group = stage.group();
    stage.policy("p", &format!("approvers => '{group}', min_approvals => 2"));
    stage.policy("q", "");
    let (anna, bert) = (stage.person(&[&group]), stage.person(&[&group]));
    let id = stage.request();
    assert_eq!(stage.approve(&anna, id), None);
    let mut client = stage.db.connect(&bert);
    let columns = text(
        &mut client,
        "SELECT string_agg(attname, ', ' ORDER BY attnum) FROM pg_attribute
         WHERE attrelid = 'writeguard.pending'::regclass AND attnum > 0",
    );
    assert_eq!(
        columns,
        "id, requested_at, requested_by, role, reason, statement, parameters, rows, relations, samples, policies, \
         approvals_needed, approved_by, expires_at, asks, search_path, settings, notes"
    );
    let row = text(&mut client, "SELECT to_jsonb(p)::text FROM writeguard.pending AS p");
    let row: Value = serde_json::from_str(&row).unwrap();
    for (column, expected) in [
        ("id", json!(id)),
        ("requested_by", json!(stage.requester)),
        ("role", json!(stage.requester)),
        ("reason", json!("tests")),
        ("statement", json!(WRITE)),
        ("parameters", json!([])),
        ("rows", json!(5)),
        ("relations", json!({"public.t": 5})),
        ("policies", json!(["p", "q"])),
        ("approvals_needed", json!(2)),
        ("approved_by", json!([anna])),
        ("asks", json!(format!("p: 1 of 2 by members of {group}\nq: 1 of 1"))),
    ] {
        assert_eq!(row[column], expected, "{column}");
    }
    let life = "SELECT extract(epoch FROM expires_at - requested_at)::int::text FROM writeguard.pending";
    assert_eq!(text(&mut client, life), "86400");
}

#[test]
fn a_request_that_nobody_decides_expires() {
    let server = Server::start(&["writeguard.request_lifetime = 2s"]);
    let mut stage = Stage::on(&server, "");
    let anna = stage.person(&[]);
    let id = stage.request();
    let mut requester = stage.requester();
    let state = "SELECT state FROM writeguard.my_requests";
    wait_until(10, || text(&mut requester, state) == "expired");
    assert_eq!(stage.number("SELECT count(*) FROM writeguard.pending"), 0);
    let refusal = stage.not_approved(&anna, id);
    assert!(refusal.message.contains("already expired"), "{refusal:?}");
}

#[test]
fn my_requests_knows_all_states() {
    let mut stage = Stage::new();
    let anna = stage.person(&[]);
    let mut client = stage.db.connect(&anna);
    let ids: Vec<i64> = (0..7).map(|_| stage.request()).collect();
    let tokens: Vec<Option<String>> = ids[1..5].iter().map(|id| approve(&mut client, *id, "")).collect();
    stage.write_passes(tokens[1].as_deref().unwrap());
    pass(
        &mut stage.admin,
        &format!("UPDATE writeguard.request SET expires_at = now() WHERE id IN ({}, {})", ids[3], ids[6]),
    );
    pass(&mut client, &format!("SELECT writeguard.revoke({}); SELECT writeguard.reject({})", ids[4], ids[5]));
    let states = text(&mut stage.requester(), "SELECT string_agg(state, ', ' ORDER BY id) FROM writeguard.my_requests");
    assert_eq!(states, "pending, approved, spent, expired, revoked, rejected, expired");
    let columns = text(
        &mut stage.admin,
        "SELECT string_agg(attname, ', ' ORDER BY attnum) FROM pg_attribute
         WHERE attrelid = 'writeguard.my_requests'::regclass AND attnum BETWEEN 1 AND 5",
    );
    assert_eq!(columns, "id, state, statement, rows, expires_at");
}

#[test]
fn every_step_is_an_event_and_a_notification() {
    let mut stage = Stage::with("min_approvals => 2");
    let (anna, bert) = (stage.person(&[]), stage.person(&[]));
    let mut listener = stage.db.admin();
    pass(&mut listener, "LISTEN writeguard");
    let id = stage.request();
    stage.approve(&anna, id);
    stage.approve(&bert, id);
    pass(&mut stage.db.connect(&bert), &format!("SELECT writeguard.revoke({id})"));
    let other = stage.request();
    pass(&mut stage.db.connect(&bert), &format!("SELECT writeguard.reject({other}, NULL)"));
    let steps = ["requested", "approved", "approved", "revoked", "requested", "rejected"];
    let mut heard = Vec::new();
    wait_until(20, || {
        pass(&mut listener, "SELECT 1");
        let mut notifications = listener.notifications();
        let mut next = notifications.iter();
        while let Ok(Some(notification)) = postgres::fallible_iterator::FallibleIterator::next(&mut next) {
            let payload: Value = serde_json::from_str(notification.payload()).unwrap();
            heard.push(payload["kind"].as_str().unwrap().to_owned());
        }
        steps
            .iter()
            .all(|step| heard.iter().filter(|kind| kind == step).count() >= steps.iter().filter(|s| s == &step).count())
    });
    let events =
        stage.text("SELECT string_agg(kind, ', ' ORDER BY id) FROM writeguard.event WHERE approval IS NOT NULL");
    assert_eq!(events, steps.join(", "));
}

// ---- Attempts ----

#[test]
fn names_that_shadow_ours_decide_nothing() {
    let mut stage = Stage::new();
    let group = stage.group();
    stage.policy("p", &format!("approvers => '{group}'"));
    let anna = stage.person(&[]);
    let id = stage.request();
    let mut client = stage.db.connect(&anna);
    pass(
        &mut client,
        "CREATE TEMP TABLE request AS SELECT 1 AS id; CREATE TEMP TABLE approval (request bigint, approver_oid oid);
         CREATE TEMP TABLE policy (name text); CREATE TEMP VIEW approval_ask AS SELECT 1::bigint AS request;
         CREATE FUNCTION pg_temp.is_approver(oid, text) RETURNS boolean LANGUAGE sql AS 'SELECT true';
         CREATE FUNCTION pg_temp.count(bigint) RETURNS bigint LANGUAGE sql AS 'SELECT 99::bigint';
         SET search_path = pg_temp, pg_catalog",
    );
    refused(&mut client, &format!("SELECT writeguard.approve({id})"), "WG006");
    let given = "SELECT asks FROM writeguard.pending";
    assert!(text(&mut client, given).starts_with("p: 0 of 1"));
}

#[test]
fn long_and_strange_comments_are_kept_as_they_are() {
    let mut stage = Stage::with("min_approvals => 3");
    let people = [stage.person(&[]), stage.person(&[]), stage.person(&[])];
    let id = stage.request();
    for (person, comment) in people.iter().zip(["", &"ä'\"\\$1 \n".repeat(50_000), "NULL"]) {
        let mut client = stage.db.connect(person);
        client.query_one("SELECT writeguard.approve($1, $2)", &[&id, &comment]).unwrap();
        let stored: String = stage
            .admin
            .query_one("SELECT comment FROM writeguard.approval WHERE approver = $1", &[person])
            .unwrap()
            .get(0);
        assert_eq!(stored, comment);
    }
    assert_eq!(stage.state(id), "approved");
}

#[test]
fn an_approval_that_is_rolled_back_to_a_savepoint_never_was() {
    let mut stage = Stage::with("min_approvals => 2");
    let (anna, bert) = (stage.person(&[]), stage.person(&[]));
    let id = stage.request();
    let mut client = stage.db.connect(&anna);
    pass(&mut client, "BEGIN; SAVEPOINT s");
    approve(&mut client, id, "");
    pass(&mut client, "ROLLBACK TO s");
    assert_eq!(approve(&mut client, id, ""), None);
    pass(&mut client, "ROLLBACK");
    assert_eq!(stage.approve(&bert, id), None);
    assert_eq!(stage.number("SELECT count(*) FROM writeguard.approval"), 1);
}

#[test]
fn an_approval_can_be_prepared_with_its_transaction() {
    let mut stage = Stage::with("min_approvals => 2");
    let (anna, bert) = (stage.person(&[]), stage.person(&[]));
    let id = stage.request();
    let mut client = stage.db.connect(&anna);
    pass(&mut client, "BEGIN");
    approve(&mut client, id, "");
    pass(&mut client, &format!("PREPARE TRANSACTION 'approval_{id}_{anna}'"));
    assert_eq!(stage.number("SELECT count(*) FROM writeguard.approval"), 0);
    pass(&mut client, &format!("COMMIT PREPARED 'approval_{id}_{anna}'"));
    assert!(stage.approve(&bert, id).is_some());
}

#[test]
fn a_request_is_not_approved_in_a_copy_of_its_database() {
    let mut stage = Stage::new();
    let anna = stage.person(&[]);
    let id = stage.request();
    let Stage { db, admin, .. } = stage;
    drop(admin);
    let copy = format!("{}_copy", db.name);
    let mut postgres = Server::shared().postgres();
    wait_until(20, || postgres.batch_execute(&format!("CREATE DATABASE {copy} TEMPLATE {}", db.name)).is_ok());
    let mut client = db.config(&anna).dbname(&copy).connect(NoTls).unwrap();
    let refusal = refused(&mut client, &format!("SELECT writeguard.approve({id})"), "WG006");
    assert!(refusal.message.contains("another database"), "{refusal:?}");
    assert!(approve(&mut db.connect(&anna), id, "").is_some());
}

#[test]
fn a_token_that_was_refused_as_expired_does_not_come_back_with_the_clock() {
    let mut stage = Stage::new();
    let anna = stage.person(&[]);
    let id = stage.request();
    let token = stage.approve(&anna, id).unwrap();
    pass(
        &mut stage.admin,
        &format!("UPDATE writeguard.request SET expires_at = now() - interval '1 s' WHERE id = {id}"),
    );
    assert!(stage.write_refused(&token).message.contains("expired"));
    wait_until(20, || stage.state(id) == "expired");
    // As if the clock were set back by an hour: everything stored is an hour ahead of it.
    pass(
        &mut stage.admin,
        &format!(
            "UPDATE writeguard.request SET expires_at = expires_at + interval '1 hour' WHERE id = {id};
             UPDATE writeguard.event SET occurred_at = occurred_at + interval '1 hour'"
        ),
    );
    assert!(stage.write_refused(&token).message.contains("expired"));
    assert_eq!(stage.number("SELECT count(*) FROM t WHERE a = 9"), 0);
}

//! What was approved is what runs: a text that means something else in the session that uses the approval is refused, or runs
//! with the meaning that was reviewed.

use crate::common::approvals::*;
use postgres::Client;

/// Five rows `t` with a date, a note and a secret, of which a statement may change three.
fn stage() -> Stage {
    Stage::new(
        "ALTER TABLE t ADD day date, ADD note text DEFAULT '', ADD secret text DEFAULT 'kept', ADD span interval,
             ADD moment timestamptz, ADD sure boolean;
         CREATE SCHEMA other; CREATE TABLE other.t (LIKE t INCLUDING ALL); INSERT INTO other.t SELECT * FROM t;
         GRANT ALL ON SCHEMA other TO PUBLIC; GRANT ALL ON other.t TO PUBLIC;
         SELECT writeguard.set_policy('o', tables => '{other.t}', max_rows => 3)",
    )
}

fn arm(client: &mut Client, token: &str) {
    pass(client, &format!("SET writeguard.override = on; SET writeguard.token = '{token}'"));
}

/// A setting, two values of it, a statement, and what it leaves in the first row when it means what it does under the first.
const READ_OTHERWISE: [(&str, &str, &str, &str, &str, &str); 6] = [
    ("DateStyle", "ISO, MDY", "ISO, DMY", "UPDATE t SET day = '01/02/2026'", "day::text", "2026-01-02"),
    (
        "TimeZone",
        "UTC",
        "Asia/Tokyo",
        "UPDATE t SET moment = '2026-01-01 00:00'",
        "extract(epoch FROM moment)::bigint::text",
        "1767225600",
    ),
    (
        "IntervalStyle",
        "postgres",
        "sql_standard",
        "UPDATE t SET span = '-1 2:03:04'",
        "extract(hour FROM span)::text",
        "2",
    ),
    ("search_path", "public", "other", "UPDATE t SET note = 'mine'", "note", "mine"),
    ("transform_null_equals", "off", "on", "UPDATE t SET sure = (NULL = secret) IS NULL", "sure::text", "true"),
    ("array_nulls", "on", "off", "UPDATE t SET note = ('{NULL}'::text[])[1] || 'x'", "coalesce(note, 'null')", "null"),
];

#[test]
fn a_token_opens_nothing_under_other_settings_and_says_which() {
    for (name, reviewed, other, statement, shown, meant) in READ_OTHERWISE {
        let mut stage = stage();
        let mut client = stage.requester();
        pass(&mut client, &format!("SET {name} = {}", value(name, reviewed)));
        let id = request(&mut client, statement, &[]);
        let token = approve(&mut stage.approver(), id);
        pass(&mut client, &format!("SET {name} = {}", value(name, other)));
        arm(&mut client, &token);
        let refusal = refused(&mut client, statement, "WG006");
        assert!(refusal.message.contains("other settings"), "{name}: {refusal:?}");
        assert!(refusal.detail.contains(&format!("{name} = '{reviewed}'")), "{name}: {refusal:?}");
        assert!(refusal.detail.contains(&format!("{name} = '{other}'")), "{name}: {refusal:?}");
        assert_eq!((stage.changed(), stage.state(id).as_str()), (0, "approved"), "{name}");
        assert_eq!(stage.number("SELECT count(*) FROM other.t WHERE note <> ''"), 0);
        // The hint, as it stands, and the token once more.
        pass(&mut client, &refusal.hint);
        arm(&mut client, &token);
        pass(&mut client, statement);
        let sql = format!("SELECT {shown} FROM public.t WHERE id = 1");
        assert_eq!(text(&mut stage.admin, &sql), meant, "{name}");
        assert_eq!(stage.state(id), "spent", "{name}");
    }
}

#[test]
fn an_execution_has_the_meaning_that_was_reviewed() {
    for (name, reviewed, other, statement, shown, meant) in READ_OTHERWISE {
        let mut stage = stage();
        let mut client = stage.requester();
        pass(&mut client, &format!("SET {name} = {}", value(name, reviewed)));
        let id = request(&mut client, statement, &[]);
        approve(&mut stage.approver(), id);
        pass(&mut client, &format!("SET {name} = {}", value(name, other)));
        pass(&mut client, &format!("SELECT * FROM writeguard.execute({id})"));
        let sql = format!("SELECT {shown} FROM public.t WHERE id = 1");
        assert_eq!(text(&mut stage.admin, &sql), meant, "{name}");
        // And the session has its own setting afterwards.
        assert_eq!(text(&mut client, &format!("SELECT current_setting('{name}')")), other, "{name}");
    }
}

/// As SET takes it.
fn value(name: &str, value: &str) -> String {
    if name == "search_path" { value.to_owned() } else { format!("'{value}'") }
}

/// Sets whether backslashes stand for themselves in plain string constants. From version 19 on they always do, and the
/// server refuses the other value: false then.
#[track_caller]
fn sets_backslashes(client: &mut Client, setting: &str) -> bool {
    let sql = format!("SET standard_conforming_strings = {setting}");
    if cfg!(since_pg19) && setting == "off" {
        refused(client, &sql, "0A000");
        return false;
    }
    pass(client, &sql);
    true
}

/// Reviewed it sets a note; read with backslashes it sets the secret.
const TWO_FACED: &str = r"UPDATE t SET note = 'a\' /*', secret = 'evil' -- */";

#[test]
fn a_text_with_two_meanings_is_opened_by_no_token() {
    let mut stage = stage();
    let mut client = stage.requester();
    for statement in [TWO_FACED, r"UPDATE t SET note = 'a\nb'", r"UPDATE t SET note = N'\'"] {
        sets_backslashes(&mut client, "on");
        let id = request(&mut client, statement, &[]);
        let token = approve(&mut stage.approver(), id);
        for setting in ["on", "off"] {
            if !sets_backslashes(&mut client, setting) {
                continue;
            }
            arm(&mut client, &token);
            let outcome = client.batch_execute(statement);
            assert!(outcome.is_err(), "{statement}");
            // All of one string is parsed before its first command runs.
            arm(&mut client, &token);
            let string = format!("SET standard_conforming_strings = on; {statement}");
            assert!(client.batch_execute(&string).is_err(), "{string}");
            pass(&mut client, "ROLLBACK");
        }
        assert_eq!((stage.changed(), stage.state(id).as_str()), (0, "approved"), "{statement}");
        assert_eq!(stage.number("SELECT count(*) FROM t WHERE note <> '' OR secret <> 'kept'"), 0);
    }
    // Its number has it run as it was reviewed, whatever the session has now.
    pass(&mut client, "SET standard_conforming_strings = on");
    let id = request(&mut client, TWO_FACED, &[]);
    approve(&mut stage.approver(), id);
    sets_backslashes(&mut client, "off");
    pass(&mut client, &format!("SELECT * FROM writeguard.execute({id})"));
    assert_eq!(stage.number(r"SELECT count(*) FROM t WHERE note = 'a\' AND secret = 'kept'"), 5);
}

#[test]
fn a_text_that_needs_no_other_reading_goes_on_with_its_backslashes() {
    let mut stage = stage();
    let mut client = stage.requester();
    for statement in [r"UPDATE t SET note = E'a\\b'", r"UPDATE t SET note = $$a\b$$"] {
        let id = request(&mut client, statement, &[]);
        let token = approve(&mut stage.approver(), id);
        arm(&mut client, &token);
        pass(&mut client, statement);
        assert_eq!(stage.number(r"SELECT count(*) FROM t WHERE note = 'a\b'"), 5, "{statement}");
        stage.unguarded("UPDATE t SET note = ''");
    }
}

#[test]
fn the_reviewer_sees_what_the_text_is_read_with() {
    let stage = stage();
    let mut client = stage.requester();
    pass(&mut client, "SET search_path = other, public; SET DateStyle = 'ISO, DMY'");
    request(&mut client, "UPDATE t SET day = '01/02/2026'", &[]);
    let sql =
        "SELECT search_path || '|' || (settings ->> 'DateStyle') || '|' || (settings ->> 'standard_conforming_strings')
               FROM writeguard.pending";
    assert_eq!(text(&mut stage.approver(), sql), "other, public|ISO, DMY|on");
}

#[test]
fn a_request_without_settings_is_asked_for_again() {
    let mut stage = stage();
    let mut client = stage.requester();
    let (id, token) = stage.approved("UPDATE t SET note = 'x'");
    // As an upgrade leaves it.
    stage.unguarded("SET writeguard.enabled = on; UPDATE writeguard.request SET settings = NULL");
    arm(&mut client, &token);
    let refusal = refused(&mut client, "UPDATE t SET note = 'x'", "WG006");
    assert!(refusal.detail.contains("made before the settings were kept"), "{refusal:?}");
    let refusal = refused(&mut client, &format!("SELECT * FROM writeguard.execute({id})"), "WG006");
    assert!(refusal.detail.contains("made before the settings were kept"), "{refusal:?}");
    assert_eq!(stage.changed(), 0);
}

/// Letters that other languages take for blanks.
#[test]
fn what_is_no_blank_to_postgresql_is_a_letter_of_the_statement() {
    for letter in ['\u{a0}', '\u{3000}', '\u{2003}', '\u{1680}', '\u{85}'] {
        let mut stage = stage();
        pass(
            &mut stage.admin,
            &format!(
                "ALTER TABLE t ADD \"flag{letter}\" boolean DEFAULT false; ALTER TABLE t ADD flag boolean DEFAULT true"
            ),
        );
        let reviewed = format!("UPDATE t SET note = 'x' WHERE NOT flag{letter}");
        let other = "UPDATE t SET note = 'x' WHERE NOT flag";
        let mut client = stage.requester();
        let id = request(&mut client, &reviewed, &[]);
        let token = approve(&mut stage.approver(), id);
        pass(&mut stage.admin, "SET writeguard.enabled = off; UPDATE t SET flag = false; RESET writeguard.enabled");
        arm(&mut client, &token);
        refused(&mut client, other, "WG006");
        let kept = text(&mut stage.admin, "SELECT statement FROM writeguard.request");
        assert_eq!(kept, reviewed);
        arm(&mut client, &token);
        pass(&mut client, &reviewed);
        assert_eq!(stage.state(id), "spent");
    }
}

/// Characters that are not seen, or turn around what follows.
#[test]
fn what_poses_as_something_else_is_an_escape_to_the_reviewer() {
    let mut stage = stage();
    let mut client = stage.requester();
    for (letter, shown) in
        [("\u{202e}", r"\u202e"), ("\u{200b}", r"\u200b"), ("\u{1b}", r"\u001b"), ("\u{e0041}", r"\U000e0041")]
    {
        let statement = format!("UPDATE t SET note = 'a{letter}b'");
        let reason = format!("why{letter}not");
        let id: i64 = client
            .query_one("SELECT writeguard.request($1::text, $2::text)", &[&statement, &reason])
            .expect("a request")
            .get(0);
        let sql = format!(
            "SELECT concat_ws('|', statement, reason, samples -> 0 -> 'after' -> 0 ->> 'note', notes IS NOT NULL)
             FROM writeguard.pending WHERE id = {id}"
        );
        let expected = format!("UPDATE t SET note = 'a{shown}b'|why{shown}not|a{shown}b|t");
        assert_eq!(text(&mut stage.approver(), &sql), expected);
        // What runs is what was sent.
        approve(&mut stage.approver(), id);
        pass(&mut client, &format!("SELECT * FROM writeguard.execute({id})"));
        let left = stage.admin.query_one("SELECT note FROM t WHERE id = 1", &[]).expect("a row").get::<_, String>(0);
        assert_eq!(left, format!("a{letter}b"));
        stage.unguarded("UPDATE t SET note = ''");
    }
    let id = request(&mut client, "UPDATE t SET note = 'grün'", &[]);
    let sql = format!("SELECT statement || coalesce(notes, '') FROM writeguard.pending WHERE id = {id}");
    assert_eq!(text(&mut stage.approver(), &sql), "UPDATE t SET note = 'grün'");
}

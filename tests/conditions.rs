//! Policies that are in force for some applications, networks and times only.

use crate::common::limits::{Bed, SIX, pass, refuse};
use crate::common::session::text;
use crate::common::{Refusal, Server, expect_refusal};
use postgres::{Client, NoTls};

const UPDATE: &str = "UPDATE t SET v = v + 1";

#[track_caller]
fn answer(client: &mut Client, sql: &str) -> bool {
    match client.query_one(sql, &[]) {
        Ok(row) => row.get(0),
        Err(error) => panic!("{sql}: {:?}", Refusal::of(&error)),
    }
}

#[test]
fn an_application_is_limited_by_its_name() {
    let mut bed = Bed::new(SIX);
    bed.policy("tables => '{public.t}', application => 'etl\\_%', max_rows => 5");
    for (name, covered) in [("", false), ("etl_nightly", true), ("etlXnightly", false), ("psql", false), ("etl_", true)]
    {
        pass(&mut bed.writer, &format!("SET application_name = '{name}'"));
        if covered {
            bed.refused(UPDATE);
        } else {
            bed.passes(UPDATE);
        }
    }
    // Within one string of commands, and for a statement that was prepared under another name.
    refuse(&mut bed.writer, &format!("SET application_name = 'etl_1'; {UPDATE}"));
    pass(&mut bed.writer, &format!("SET application_name = ''; PREPARE p AS {UPDATE}; EXECUTE p"));
    refuse(&mut bed.writer, "SET application_name = 'etl_2'; EXECUTE p");
    // The first SET was rolled back with its string.
    bed.passes(UPDATE);
}

#[test]
fn a_policy_for_an_application_only_adds() {
    let mut bed = Bed::new(SIX);
    bed.policy("tables => '{*.*}', max_rows => 5");
    pass(
        &mut bed.reader,
        "SELECT writeguard.set_policy('vip', tables => '{public.t}', application => 'vip', max_rows => 1000)",
    );
    pass(&mut bed.writer, "SET application_name = 'vip'");
    bed.refused(UPDATE);
    pass(&mut bed.reader, "SELECT writeguard.set_policy('vip', tables => '{public.t}', max_rows => 1000)");
    bed.passes(UPDATE);
}

#[test]
fn a_network_limits_the_clients_in_it() {
    let server = Server::start(&["listen_addresses = '127.0.0.1'"]);
    let db = server.database();
    let mut admin = db.admin();
    pass(&mut admin, SIX);
    let mut config = postgres::Config::new();
    config.host("127.0.0.1").port(server.port()).user("postgres").dbname(&db.name);
    let near = &mut config.connect(NoTls).expect("a connection by TCP");
    assert!(answer(near, "SELECT inet_client_addr() IS NOT NULL"), "not by TCP");
    for (network, covered) in [("127.0.0.0/8", true), ("127.0.0.1", true), ("10.0.0.0/8", false), ("::1", false)] {
        pass(
            &mut admin,
            &format!(
                "SELECT writeguard.set_policy('p', tables => '{{public.t}}', client => '{network}', max_rows => 5)"
            ),
        );
        if covered {
            refuse(near, UPDATE);
        } else {
            pass(near, UPDATE);
        }
        // On the local socket there is no address.
        pass(&mut admin, UPDATE);
    }
}

#[test]
fn a_schedule_limits_while_a_window_is_open() {
    let mut bed = Bed::new(SIX);
    let window = |from: &str, to: &str| {
        format!(
            "(SELECT to_char(now() AT TIME ZONE 'Asia/Tokyo' + interval '{from}', 'Dy HH24:MI-')
              || to_char(now() AT TIME ZONE 'Asia/Tokyo' + interval '{to}', 'HH24:MI') || ' Asia/Tokyo')"
        )
    };
    for (schedule, covered) in [
        (window("-2 hours", "2 hours"), true),
        (window("2 hours", "4 hours"), false),
        (window("-4 hours", "-2 hours"), false),
        (format!("{} || '; ' || {}", window("2 hours", "4 hours"), window("-2 hours", "2 hours")), true),
        ("'Mon-Sun 00:00-24:00 UTC'".into(), true),
    ] {
        bed.policy(&format!("tables => '{{public.t}}', max_rows => 5, schedule => {schedule}"));
        let applies = "SELECT applies FROM writeguard.effective('t', current_user, 'update')";
        assert_eq!(answer(&mut bed.reader, applies), covered, "{schedule}");
        if covered {
            bed.refused(UPDATE);
        } else {
            bed.passes(UPDATE);
        }
    }
}

#[test]
fn a_policy_out_of_its_time_sets_nothing_aside() {
    let mut bed = Bed::new(SIX);
    bed.policy("tables => '{*.*}', max_rows => 5");
    let closed = "(SELECT to_char(now() AT TIME ZONE 'UTC' + interval '2 hours', 'Dy HH24:MI-')
        || to_char(now() AT TIME ZONE 'UTC' + interval '4 hours', 'HH24:MI') || ' UTC')";
    let sql = |schedule: &str| {
        format!("SELECT writeguard.set_policy('q', tables => '{{public.t}}', max_rows => 1000, schedule => {schedule})")
    };
    pass(&mut bed.reader, &sql(closed));
    bed.refused(UPDATE);
    pass(&mut bed.reader, &sql("'Mon-Sun 00:00-24:00 UTC'"));
    bed.passes(UPDATE);
}

#[test]
fn windows_are_wall_clock_time_and_follow_its_jumps() {
    let db = Server::shared().database();
    let mut admin = db.admin();
    for (schedule, at, open) in [
        // 2026-03-29, Berlin: from 02:00 CET to 03:00 CEST.
        ("Sun 01:30-02:00 Europe/Berlin", "2026-03-29 00:59:59+00", true),
        ("Sun 02:00-03:00 Europe/Berlin", "2026-03-29 01:00:00+00", false),
        ("Sun 01:30-03:30 Europe/Berlin", "2026-03-29 01:29:59+00", true),
        ("Sun 01:30-03:30 Europe/Berlin", "2026-03-29 01:30:00+00", false),
        ("Sun 03:00-04:00 Europe/Berlin", "2026-03-29 01:00:00+00", true),
        // 2026-10-25, Berlin: from 03:00 CEST to 02:00 CET; the hour comes twice.
        ("Sun 02:00-03:00 Europe/Berlin", "2026-10-25 00:30:00+00", true),
        ("Sun 02:00-03:00 Europe/Berlin", "2026-10-25 01:30:00+00", true),
        ("Sun 02:00-03:00 Europe/Berlin", "2026-10-25 02:00:00+00", false),
        // The other side of the date line, half hours, and the day a window starts on.
        ("Mon 00:00-01:00 Pacific/Auckland", "2026-11-22 11:30:00+00", true),
        ("Sun 23:00-24:00 Asia/Kolkata", "2026-11-22 18:00:00+00", true),
        ("Sat 22:00-06:00 America/New_York", "2026-11-22 10:59:00+00", true),
        ("Sat 22:00-06:00 America/New_York", "2026-11-22 11:00:00+00", false),
        ("Sat,Sun 00:00-24:00 Europe/Berlin", "2026-11-20 23:00:00+00", true),
        ("Sat,Sun 00:00-24:00 Europe/Berlin", "2026-11-22 23:00:00+00", false),
        // Days of the month, its last one among them, as the wall's calendar has them.
        ("1,15,last 00:00-24:00 Europe/Berlin", "2026-11-30 22:59:59+00", true),
        ("last 00:00-24:00 Europe/Berlin", "2026-11-30 23:00:00+00", false),
        ("1 00:00-24:00 Europe/Berlin", "2026-11-30 23:00:00+00", true),
        ("last 00:00-24:00 UTC", "2028-02-29 12:00:00+00", true),
        ("last 00:00-24:00 UTC", "2028-02-28 12:00:00+00", false),
        ("last 22:00-06:00 UTC", "2026-12-01 05:59:59+00", true),
        ("last 22:00-06:00 UTC", "2026-12-01 06:00:00+00", false),
        // Dates.
        ("2026-12-24..2027-01-01 00:00-24:00 UTC", "2026-12-23 23:59:59+00", false),
        ("2026-12-24..2027-01-01 00:00-24:00 UTC", "2026-12-24 00:00:00+00", true),
        ("2026-12-24..2027-01-01 00:00-24:00 UTC", "2027-01-01 23:59:59+00", true),
        ("2026-12-24..2027-01-01 00:00-24:00 UTC", "2027-01-02 00:00:00+00", false),
        ("2026-12-24,2026-12-31 12:00-06:00 Europe/Berlin", "2027-01-01 04:59:59+00", true),
    ] {
        let sql = format!("SELECT writeguard.in_schedule('{schedule}', '{at}')");
        assert_eq!(answer(&mut admin, &sql), open, "{schedule} at {at}");
    }
}

#[test]
fn what_no_policy_can_mean_is_refused() {
    let mut bed = Bed::new(SIX);
    for (argument, word) in [
        ("schedule => 'weekends'", "weekends"),
        ("schedule => 'Sat 10:00-11:00 Europe/Brelin'", "Europe/Brelin"),
        ("schedule => 'Sat 10:00-11:00'", "time zone"),
        ("schedule => 'Sat,last 10:00-11:00 UTC'", "Sat,last"),
        ("schedule => '32 10:00-11:00 UTC'", "32"),
        ("schedule => '2026-02-29 10:00-11:00 UTC'", "2026-02-29"),
        ("schedule => '2027-01-01..2026-12-24 10:00-11:00 UTC'", "2027-01-01..2026-12-24"),
        ("application => 'psql\\'", "escape"),
    ] {
        let refusal =
            expect_refusal(bed.reader.batch_execute(&format!("SELECT writeguard.set_policy('p', {argument})")));
        assert_eq!(refusal.sqlstate, "WG007", "{argument}: {refusal:?}");
        assert!(format!("{} {}", refusal.message, refusal.detail).contains(word), "{argument}: {refusal:?}");
        assert_ne!(refusal.hint, "", "{argument}");
    }
    assert_eq!(bed.number("SELECT count(*) FROM writeguard.policy"), 0);
    let refusal =
        expect_refusal(bed.reader.batch_execute("SELECT writeguard.in_schedule('Sat 10:00-11:00 Nowhere/At_all')"));
    assert_eq!(refusal.sqlstate, "WG007");
}

#[test]
fn conditions_are_stored_as_they_are_understood() {
    let mut bed = Bed::new(SIX);
    bed.policy("schedule => ' fri-sun  18:00-08:00   UTC ;mon 00:00-24:00 Europe/Berlin', client => '10.0.0.0/8', application => 'a%'");
    let row = bed
        .reader
        .query_one("SELECT schedule, client::text, application FROM writeguard.policy", &[])
        .expect("the policy");
    let stored: (&str, &str, &str) = (row.get(0), row.get(1), row.get(2));
    assert_eq!(stored, ("Fri,Sat,Sun 18:00-08:00 UTC; Mon 00:00-24:00 Europe/Berlin", "10.0.0.0/8", "a%"));
    bed.policy("schedule => 'LAST,15,01 00:00-24:00 UTC; 2026-12-24..2027-01-01,2027-01-06 18:00-08:00 UTC'");
    let stored = text(&mut bed.reader, "SELECT schedule FROM writeguard.policy");
    assert_eq!(stored, "1,15,last 00:00-24:00 UTC; 2026-12-24..2027-01-01,2027-01-06 18:00-08:00 UTC");
}

//! When a policy is in force: windows of wall-clock time, each in a time zone of its own.
//!
//! Pure: what a clock on the wall of a zone shows comes in, the answer goes out. Where clocks jump, wall time decides: a
//! window covers an hour that comes twice both times, and of an hour that is left out nothing.

use core::fmt;

use super::days::{Day, Days};
use crate::error::Error;

const MINUTES_PER_DAY: u16 = 24 * 60;

/// What a clock on the wall shows, with the calendar beside it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WallClock {
    pub day: Day,
    /// Since midnight.
    pub minute: u16,
}

/// One window: from a time on some days, to a time on the same or the following day.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Window {
    days: Days,
    from: u16,
    /// Not part of the window; up to 24:00.
    to: u16,
    zone: String,
}

/// Windows of which one has to be open.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Schedule(Vec<Window>);

impl Schedule {
    /// What one looks like.
    pub const EXAMPLE: &str = "Mon-Fri 18:00-08:00 Europe/Berlin; Sat,Sun 00:00-24:00 Europe/Berlin";

    /// Reads `Sat,Sun 00:00-24:00 Europe/Berlin`, several windows separated by `;`; instead of days of the week also days
    /// of the month (`1,15,last`) or dates (`2026-12-24..2027-01-01`). Whether there is such a zone is for the caller to
    /// ask.
    ///
    /// # Errors
    /// WG007 for anything else.
    pub fn parse(text: &str) -> Result<Self, Error> {
        let windows = text.split(';').map(window).collect::<Result<Vec<_>, _>>()?;
        Ok(Schedule(windows))
    }

    /// The names of all zones.
    pub fn zones(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(|window| window.zone.as_str())
    }

    /// Whether a window is open; `clock` tells what the wall shows in a zone, none where there is no such zone any more:
    /// then the window is open, for a policy that is in force too often is the lesser harm.
    pub fn covers(&self, clock: impl Fn(&str) -> Option<WallClock>) -> bool {
        self.0.iter().any(|window| clock(&window.zone).is_none_or(|now| window.covers(now)))
    }
}

impl Window {
    fn covers(&self, WallClock { day, minute }: WallClock) -> bool {
        if self.from < self.to {
            return (self.from..self.to).contains(&minute) && self.days.have(day);
        }
        (minute >= self.from && self.days.have(day)) || (minute < self.to && self.days.have(day.before()))
    }
}

fn wrong(text: &str, what: &str) -> Error {
    Error::Invalid {
        message: format!("malformed schedule \"{}\"", text.trim()),
        detail: Some(what.to_owned()),
        hint: format!("schedule => '{}'", Schedule::EXAMPLE),
    }
}

fn window(text: &str) -> Result<Window, Error> {
    let words: Vec<&str> = text.split_whitespace().collect();
    let [on, between, zone] = words.as_slice() else {
        return Err(wrong(text, "A window has days, times and a time zone."));
    };
    let (from, to) = between
        .split_once('-')
        .and_then(|(from, to)| Some((minute(from)?, minute(to)?)))
        .ok_or_else(|| wrong(text, &format!("\"{between}\" is not two times such as 18:00-08:00.")))?;
    if from == to || from == MINUTES_PER_DAY {
        return Err(wrong(text, "The window is empty; a whole day is 00:00-24:00."));
    }
    let days = Days::parse(on).ok_or_else(|| {
        wrong(text, &format!("\"{on}\" is not days such as Mon-Fri or 1,15,last or 2026-12-24..2027-01-01."))
    })?;
    Ok(Window { days, from, to, zone: (*zone).to_owned() })
}

fn minute(text: &str) -> Option<u16> {
    let (hours, minutes) = text.split_once(':')?;
    let number = |text: &str| {
        (text.len() == 2 && text.bytes().all(|letter| letter.is_ascii_digit())).then(|| text.parse::<u16>().ok())?
    };
    let (hours, minutes) = (number(hours)?, number(minutes)?);
    let minute = hours * 60 + minutes;
    (minutes < 60 && minute <= MINUTES_PER_DAY).then_some(minute)
}

impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, window) in self.0.iter().enumerate() {
            if index > 0 {
                f.write_str("; ")?;
            }
            let time = |minute: u16| format!("{:02}:{:02}", minute / 60, minute % 60);
            write!(f, "{} {}-{} {}", window.days, time(window.from), time(window.to), window.zone)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Of the week that begins with Sunday, 6 December 2026.
    const SUNDAY: i32 = 2_461_381;

    fn covers(schedule: &str, day: &str, time: &str) -> bool {
        let day = ["Sun", "Mon", "Tue", "Wed", "Thu", "Fri", "Sat"].iter().position(|known| *known == day).unwrap();
        covers_on(schedule, SUNDAY + i32::try_from(day).unwrap(), time)
    }

    fn covers_on(schedule: &str, day: i32, time: &str) -> bool {
        let now = WallClock { day: Day(day), minute: minute(time).unwrap() };
        Schedule::parse(schedule).unwrap().covers(|_| Some(now))
    }

    #[test]
    fn a_window_is_open_from_its_first_minute_to_the_one_before_its_last() {
        let weekend = "Sat,Sun 00:00-24:00 Europe/Berlin";
        assert!(!covers(weekend, "Fri", "23:59"));
        assert!(covers(weekend, "Sat", "00:00"));
        assert!(covers(weekend, "Sun", "23:59"));
        assert!(!covers(weekend, "Mon", "00:00"));
        assert!(covers("mon 09:30-09:31 UTC", "Mon", "09:30"));
        assert!(!covers("mon 09:30-09:31 UTC", "Mon", "09:31"));
    }

    #[test]
    fn a_window_over_midnight_belongs_to_the_day_it_starts_on() {
        let nights = "Mon-Fri 18:00-08:00 UTC";
        assert!(!covers(nights, "Mon", "07:59"));
        assert!(covers(nights, "Mon", "18:00"));
        assert!(covers(nights, "Tue", "07:59"));
        assert!(!covers(nights, "Tue", "08:00"));
        assert!(covers(nights, "Sat", "07:59"));
        assert!(!covers(nights, "Sat", "18:00"));
        assert!(covers("Sat 20:00-00:00 UTC", "Sat", "23:59"));
        assert!(!covers("Sat 20:00-00:00 UTC", "Sun", "00:00"));
    }

    #[test]
    fn days_may_go_over_the_end_of_the_week() {
        for (day, open) in [("Fri", false), ("Sat", true), ("Sun", true), ("Mon", true), ("Tue", false)] {
            assert_eq!(covers("Sat-Mon 10:00-11:00 UTC", day, "10:30"), open, "{day}");
        }
    }

    #[test]
    fn over_midnight_the_last_of_a_month_goes_on_in_the_next() {
        // 30 November is the Monday before.
        let (last, first) = (SUNDAY - 6, SUNDAY - 5);
        for schedule in ["last 22:00-06:00 UTC", "30 22:00-06:00 UTC", "2026-11-30 22:00-06:00 UTC"] {
            assert!(covers_on(schedule, last, "22:00") && covers_on(schedule, first, "05:59"), "{schedule}");
            assert!(!covers_on(schedule, last, "05:59") && !covers_on(schedule, first, "22:00"), "{schedule}");
        }
    }

    #[test]
    fn one_open_window_is_enough_and_each_has_its_zone() {
        let schedule = Schedule::parse("Mon 10:00-11:00 A; Mon 20:00-21:00 B").unwrap();
        let at = |a: &str, b: &str| {
            schedule.covers(|zone| {
                Some(WallClock { day: Day(SUNDAY + 1), minute: minute(if zone == "A" { a } else { b }).unwrap() })
            })
        };
        assert!(at("10:00", "00:00") && at("00:00", "20:59") && !at("20:00", "10:00"));
        assert!(Schedule::parse("Mon 10:00-11:00 gone").unwrap().covers(|_| None));
    }

    #[test]
    fn what_is_no_schedule_is_refused() {
        for text in [
            "",
            " ",
            ";",
            "always",
            "Mon 10:00-11:00",
            "Mon 10:00-11:00 ",
            "10:00-11:00 UTC",
            "Mo 10:00-11:00 UTC",
            "Mon- 10:00-11:00 UTC",
            "Mon,,Tue 10:00-11:00 UTC",
            "Mon 10-11 UTC",
            "Mon 10:00 UTC",
            "Mon 10:00-10:00 UTC",
            "Mon 24:00-10:00 UTC",
            "Mon 24:01-10:00 UTC",
            "Mon 10:60-11:00 UTC",
            "Mon 1:00-11:00 UTC",
            "Mon +1:00-11:00 UTC",
            "Mon 10:00-11:00 UTC; ",
            "Mon 10:00-11:00 UTC Tue",
            "32 10:00-11:00 UTC",
            "Mon,last 10:00-11:00 UTC",
            "2026-02-30 10:00-11:00 UTC",
            "2026-12-24 .. 2026-12-31 10:00-11:00 UTC",
        ] {
            assert_eq!(Schedule::parse(text).unwrap_err().sqlstate(), "WG007", "{text}");
        }
    }

    proptest! {
        #[test]
        fn parsing_never_panics(text in ".{0,40}") {
            let _ = Schedule::parse(&text);
        }

        #[test]
        fn what_looks_like_a_schedule_is_read_or_refused(text in "(([SMTWFunoeduhriat,-]{2,9}|[0-9,last]{1,9}|[0-9.-]{10,22}) [0-9:-]{11} ?[A-Z/a-z]{0,6};?){1,3}") {
            if let Ok(schedule) = Schedule::parse(&text) {
                prop_assert_eq!(Schedule::parse(&schedule.to_string()).unwrap(), schedule);
            }
        }

        #[test]
        fn a_window_and_its_rest_of_the_week_never_overlap(from in 0u16..1440, to in 1u16..=1440, days in 1u8..128, day in 0i32..7, minute in 0u16..1440) {
            prop_assume!(from != to);
            let window = Window { days: Days::OfWeek(days), from, to, zone: String::new() };
            let other = Window { days: Days::OfWeek(!days & 127), ..window.clone() };
            let inside = WallClock { day: Day(SUNDAY + day), minute };
            // Every day has the window in one of the two, so together they are the window on all days.
            let all = Window { days: Days::OfWeek(127), ..window.clone() };
            let both = window.covers(inside) && other.covers(inside);
            prop_assert!(!both || from > to);
            prop_assert_eq!(window.covers(inside) || other.covers(inside), all.covers(inside));
        }
    }
}

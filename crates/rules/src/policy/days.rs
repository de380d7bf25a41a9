//! The days on which a schedule's windows start: days of the week, days of the month, or dates.
//!
//! Pure. A day is its number, so that the day before is one less; which day of its month it is comes from the calendar
//! that PostgreSQL counts by as well, the Gregorian one in both directions.

use core::fmt;

const WEEK: [&str; 7] = ["Sun", "Mon", "Tue", "Wed", "Thu", "Fri", "Sat"];
/// How the last day of a month is written.
const LAST: &str = "last";
/// Its bit among the days of a month, of which none has the number 0.
const LAST_BIT: u32 = 1;

/// A day by its Julian number, as PostgreSQL counts them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Day(pub i32);

/// A day as a calendar shows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Date {
    year: i32,
    month: u8,
    day: u8,
}

/// Julian number of 1 March of the year 0, the first day of a cycle of 400 years that ends with a leap day.
const FIRST_MARCH: i32 = 1_721_120;
const DAYS_IN_CYCLE: i32 = 146_097;

impl Day {
    /// The day before.
    pub fn before(self) -> Self {
        Self(self.0.saturating_sub(1))
    }

    /// 0 is Sunday.
    fn of_week(self) -> u8 {
        u8::try_from((i64::from(self.0) + 1).rem_euclid(7)).unwrap_or(0)
    }

    fn date(self) -> Date {
        let days = i64::from(self.0) - i64::from(FIRST_MARCH);
        let cycle = days.div_euclid(i64::from(DAYS_IN_CYCLE));
        let in_cycle = days.rem_euclid(i64::from(DAYS_IN_CYCLE));
        // Years that begin in March have their leap day at the end.
        let year = (in_cycle - in_cycle / 1_460 + in_cycle / 36_524 - in_cycle / 146_096) / 365;
        let in_year = in_cycle - (365 * year + year / 4 - year / 100);
        let from_march = (5 * in_year + 2) / 153;
        let day = in_year - (153 * from_march + 2) / 5 + 1;
        let month = if from_march < 10 { from_march + 3 } else { from_march - 9 };
        let year = year + cycle * 400 + i64::from(month <= 2);
        Date {
            year: i32::try_from(year).unwrap_or(i32::MAX),
            month: u8::try_from(month).unwrap_or(1),
            day: u8::try_from(day).unwrap_or(1),
        }
    }

    fn is_last_of_month(self) -> bool {
        Self(self.0.saturating_add(1)).date().day == 1
    }

    /// The day of a date; none where the calendar has no such date.
    fn of(date: Date) -> Option<Self> {
        let Date { year, month, day } = date;
        if !(1..=12).contains(&month) {
            return None;
        }
        let year = year - i32::from(month <= 2);
        let from_march = i32::from((month + 9) % 12);
        let in_cycle = year.rem_euclid(400);
        let in_year = (153 * from_march + 2) / 5 + i32::from(day) - 1;
        let number = year.div_euclid(400) * DAYS_IN_CYCLE + in_cycle * 365 + in_cycle / 4 - in_cycle / 100 + in_year;
        let found = Self(number + FIRST_MARCH);
        (found.date() == date).then_some(found)
    }
}

/// Days on which a window starts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Days {
    /// One bit for each day of the week, Sunday first.
    OfWeek(u8),
    /// One bit for each day of the month from 1 on, and one for the last.
    OfMonth(u32),
    /// First and last day of each span, both part of it.
    Dates(Vec<(Day, Day)>),
}

impl Days {
    /// Reads `Mon-Fri`, `Sat,Sun`, `1,15,last` or `2026-12-24..2027-01-01`; none for anything else, a mixture among it.
    pub fn parse(text: &str) -> Option<Self> {
        let first = text.split(',').next()?;
        if day_of_week(first.split('-').next()?).is_some() {
            return of_week(text).map(Self::OfWeek);
        }
        if first.contains("..") || date(first).is_some() {
            return text.split(',').map(span).collect::<Option<Vec<_>>>().map(Self::Dates);
        }
        of_month(text).map(Self::OfMonth)
    }

    /// Whether the day is one of them.
    pub fn have(&self, day: Day) -> bool {
        match self {
            Self::OfWeek(bits) => bits & (1 << day.of_week()) != 0,
            Self::OfMonth(bits) => bits & (1 << day.date().day) != 0 || bits & LAST_BIT != 0 && day.is_last_of_month(),
            Self::Dates(spans) => spans.iter().any(|(first, last)| (*first..=*last).contains(&day)),
        }
    }
}

fn day_of_week(text: &str) -> Option<u8> {
    WEEK.iter().position(|day| day.eq_ignore_ascii_case(text)).and_then(|day| u8::try_from(day).ok())
}

fn of_week(text: &str) -> Option<u8> {
    text.split(',').try_fold(0, |bits, part| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (mut next, last) = (day_of_week(first)?, day_of_week(last)?);
        let mut bits = bits | (1 << next);
        while next != last {
            next = (next + 1) % 7;
            bits |= 1 << next;
        }
        Some(bits)
    })
}

fn of_month(text: &str) -> Option<u32> {
    text.split(',').try_fold(0, |bits, part| {
        if part.eq_ignore_ascii_case(LAST) {
            return Some(bits | LAST_BIT);
        }
        let day = number(part, 1..=2).filter(|day| (1..=31).contains(day))?;
        Some(bits | 1 << day)
    })
}

/// `2026-12-24..2027-01-01`, or one date.
fn span(text: &str) -> Option<(Day, Day)> {
    let (first, last) = text.split_once("..").unwrap_or((text, text));
    let (first, last) = (date(first)?, date(last)?);
    (first <= last).then_some((first, last))
}

fn date(text: &str) -> Option<Day> {
    let mut parts = text.split('-');
    let (year, month, day) = (parts.next()?, parts.next()?, parts.next()?);
    if parts.next().is_some() {
        return None;
    }
    Day::of(Date {
        year: i32::try_from(number(year, 4..=4)?).ok()?,
        month: u8::try_from(number(month, 2..=2)?).ok()?,
        day: u8::try_from(number(day, 2..=2)?).ok()?,
    })
}

/// A number of so many digits, and of nothing else.
fn number(text: &str, digits: core::ops::RangeInclusive<usize>) -> Option<u32> {
    (digits.contains(&text.len()) && text.bytes().all(|letter| letter.is_ascii_digit())).then(|| text.parse().ok())?
}

impl fmt::Display for Date {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04}-{:02}-{:02}", self.year, self.month, self.day)
    }
}

impl fmt::Display for Days {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let parts: Vec<String> = match self {
            // Monday first.
            Self::OfWeek(bits) => (1..=7)
                .map(|day| day % 7)
                .filter(|day| bits & (1 << day) != 0)
                .map(|day| WEEK[day].to_owned())
                .collect(),
            Self::OfMonth(bits) => {
                let numbered = (1..=31).filter(|day| bits & (1 << day) != 0).map(|day: u32| day.to_string());
                numbered.chain((bits & LAST_BIT != 0).then(|| LAST.to_owned())).collect()
            }
            Self::Dates(spans) => spans
                .iter()
                .map(|(first, last)| {
                    if first == last { first.date().to_string() } else { format!("{}..{}", first.date(), last.date()) }
                })
                .collect(),
        };
        f.write_str(&parts.join(","))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn day(text: &str) -> Day {
        date(text).unwrap()
    }

    fn have(days: &str, day: &str) -> bool {
        Days::parse(days).unwrap().have(super::tests::day(day))
    }

    #[test]
    fn numbers_are_those_of_postgresql() {
        // SELECT to_char(date '2000-01-01', 'J'); and so on.
        for (text, number, of_week) in
            [("2000-01-01", 2_451_545, 6), ("1970-01-01", 2_440_588, 4), ("2026-11-30", 2_461_375, 1)]
        {
            assert_eq!((day(text), day(text).of_week()), (Day(number), of_week), "{text}");
        }
    }

    #[test]
    fn days_of_the_month_and_its_last() {
        for (days, day, expected) in [
            ("1,15,last", "2026-11-01", true),
            ("1,15,last", "2026-11-15", true),
            ("1,15,last", "2026-11-29", false),
            ("1,15,last", "2026-11-30", true),
            ("last", "2026-02-28", true),
            ("last", "2028-02-28", false),
            ("last", "2028-02-29", true),
            ("last", "2100-02-28", true),
            ("LAST", "2026-12-31", true),
            ("31", "2026-11-30", false),
            ("31", "2026-12-31", true),
        ] {
            assert_eq!(have(days, day), expected, "{days}, {day}");
        }
    }

    #[test]
    fn a_span_of_dates_has_both_its_ends() {
        let holidays = "2026-12-24..2027-01-01";
        for (day, expected) in [
            ("2026-12-23", false),
            ("2026-12-24", true),
            ("2026-12-31", true),
            ("2027-01-01", true),
            ("2027-01-02", false),
            ("2027-12-24", false),
        ] {
            assert_eq!(have(holidays, day), expected, "{day}");
        }
        assert!(have("2026-12-24,2026-12-31", "2026-12-31") && !have("2026-12-24,2026-12-31", "2026-12-30"));
    }

    #[test]
    fn what_are_no_days_is_refused() {
        for text in [
            "",
            ",",
            "0",
            "32",
            "1,",
            "1,,2",
            "+1",
            "001",
            "1-5",
            "last-1",
            "lastly",
            "Mon,1",
            "1,Mon",
            "Mon,last",
            "2026-12-24,Mon",
            "1,2026-12-24",
            "2026-13-01",
            "2026-02-29",
            "2026-11-31",
            "2026-00-10",
            "2026-1-1",
            "26-12-24",
            "2026-12-24..",
            "..2026-12-24",
            "2027-01-01..2026-12-24",
            "2026-12-24...2026-12-31",
            "2026-12-24-01",
            "2026-12-24..1",
        ] {
            assert_eq!(Days::parse(text), None, "{text}");
        }
    }

    #[test]
    fn they_are_shown_as_they_are_read() {
        for (text, shown) in [
            ("sun,mon-wed", "Mon,Tue,Wed,Sun"),
            ("last,15,1,15", "1,15,last"),
            ("07", "7"),
            ("2026-12-24..2027-01-01", "2026-12-24..2027-01-01"),
            ("2026-12-24..2026-12-24,2027-01-06", "2026-12-24,2027-01-06"),
        ] {
            let days = Days::parse(text).unwrap();
            assert_eq!(days.to_string(), shown);
            assert_eq!(Days::parse(shown), Some(days));
        }
    }

    proptest! {
        #[test]
        fn a_day_is_one_date_and_that_date_is_the_day(number in -1_000_000i32..6_000_000) {
            let date = Day(number).date();
            prop_assert_eq!(Day::of(date), Some(Day(number)));
            let next = Day(number + 1).date();
            let same_month = Date { day: date.day + 1, ..date };
            prop_assert!(next == same_month || next.day == 1 && Day(number).is_last_of_month());
        }

        #[test]
        fn any_number_is_some_date(number in any::<i32>()) {
            let date = Day(number).date();
            prop_assert!((1..=12).contains(&date.month) && (1..=31).contains(&date.day));
            let _ = Day(number).is_last_of_month();
        }

        #[test]
        fn parsing_never_panics(text in "[0-9a-zA-Z.,-]{0,30}") {
            if let Some(days) = Days::parse(&text) {
                prop_assert_eq!(Days::parse(&days.to_string()), Some(days));
            }
        }
    }
}

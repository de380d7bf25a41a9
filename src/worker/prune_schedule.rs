//! When each database is looked at for what is to be pruned. Pure.
//!
//! After the server's start every database is visited once, because nobody remembers which of them have the extension;
//! then those that have it, or that stored an event since. One at a time: a visit is a short connection, and nobody is
//! to find more than one of them in the way.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::event::memory::Visit;

/// How soon a visit that ended with work left is followed by the next one.
const AGAIN: Duration = Duration::from_secs(2);
/// A visit that reports nothing for so long counts as over.
const PATIENCE: Duration = Duration::from_secs(60);
/// Most time between two visits of a database.
const LONGEST_PAUSE: Duration = Duration::from_secs(60 * 60);

/// How often a database is visited where events are kept that long: so that nothing stays much longer.
pub fn pause_for(retention: Option<Duration>) -> Duration {
    retention.map_or(LONGEST_PAUSE, |retention| (retention / 10).clamp(Duration::from_secs(1), LONGEST_PAUSE))
}

/// The databases that are visited, each with the time of its next visit.
#[derive(Debug, Default)]
pub struct Rounds {
    due: BTreeMap<u32, Instant>,
    underway: Option<(u32, Instant)>,
}

impl Rounds {
    /// A database that may have something to prune is to be visited by then, if it is not known yet.
    pub fn know(&mut self, database: u32, by: Instant) {
        if self.underway.is_none_or(|(visited, _)| visited != database) {
            self.due.entry(database).or_insert(by);
        }
    }

    /// The next database to visit; none while a visit is underway or nothing is due. A pause that has become shorter
    /// counts from now on.
    pub fn next(&mut self, now: Instant, pause: Duration) -> Option<u32> {
        if let Some((database, since)) = self.underway {
            if now.duration_since(since) < PATIENCE {
                return None;
            }
            self.over(database, Visit::Done, now, pause);
        }
        for due in self.due.values_mut() {
            *due = (*due).min(now + pause);
        }
        let (&database, _) = self.due.iter().filter(|(_, due)| **due <= now).min_by_key(|(_, due)| **due)?;
        self.due.remove(&database);
        self.underway = Some((database, now));
        Some(database)
    }

    /// The database that is being visited.
    pub fn underway(&self) -> Option<u32> {
        self.underway.map(|(database, _)| database)
    }

    /// A visit is over.
    pub fn over(&mut self, database: u32, visit: Visit, now: Instant, pause: Duration) {
        if self.underway() != Some(database) || visit == Visit::Underway {
            return;
        }
        self.underway = None;
        let next = match visit {
            Visit::More => now + AGAIN.min(pause),
            _ => now + pause,
        };
        if visit != Visit::NotInstalled {
            self.due.insert(database, next);
        }
    }

    /// How long until something is due.
    pub fn wait(&self, now: Instant) -> Option<Duration> {
        if self.underway.is_some() {
            return None;
        }
        self.due.values().min().map(|due| due.saturating_duration_since(now))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_secs(3_600);

    #[test]
    fn the_pause_follows_the_retention() {
        let seconds = Duration::from_secs;
        assert_eq!(pause_for(None), HOUR);
        assert_eq!(pause_for(Some(seconds(90 * 24 * 3_600))), HOUR);
        assert_eq!(pause_for(Some(seconds(600))), seconds(60));
        assert_eq!(pause_for(Some(seconds(1))), seconds(1));
    }

    #[test]
    fn each_database_is_visited_alone_and_in_its_turn() {
        let start = Instant::now();
        let mut rounds = Rounds::default();
        rounds.know(1, start);
        rounds.know(2, start + Duration::from_secs(1));
        let now = start + Duration::from_secs(5);
        assert_eq!(rounds.next(now, HOUR), Some(1));
        assert_eq!(rounds.next(now, HOUR), None);
        rounds.over(2, Visit::Done, now, HOUR);
        assert_eq!(rounds.underway(), Some(1));
        rounds.over(1, Visit::Underway, now, HOUR);
        assert_eq!(rounds.underway(), Some(1));
        rounds.over(1, Visit::More, now, HOUR);
        assert_eq!(rounds.next(now, HOUR), Some(2));
        rounds.over(2, Visit::Done, now, HOUR);
        assert_eq!(rounds.next(now, HOUR), None);
        assert_eq!(rounds.wait(now), Some(AGAIN));
        assert_eq!(rounds.next(now + AGAIN, HOUR), Some(1));
        rounds.over(1, Visit::Done, now, HOUR);
        assert_eq!(rounds.wait(now), Some(HOUR));
    }

    #[test]
    fn a_database_without_the_extension_is_left_alone_until_it_stores_something() {
        let now = Instant::now();
        let mut rounds = Rounds::default();
        rounds.know(1, now);
        assert_eq!(rounds.next(now, HOUR), Some(1));
        rounds.over(1, Visit::NotInstalled, now, HOUR);
        assert_eq!(rounds.next(now + HOUR * 5, HOUR), None);
        rounds.know(1, now + HOUR);
        assert_eq!(rounds.next(now + HOUR * 5, HOUR), Some(1));
    }

    #[test]
    fn a_visit_that_never_ends_does_not_stop_the_round() {
        let now = Instant::now();
        let mut rounds = Rounds::default();
        rounds.know(1, now);
        rounds.know(2, now);
        assert_eq!(rounds.next(now, HOUR), Some(1));
        assert_eq!(rounds.next(now + PATIENCE, HOUR), Some(2));
    }

    #[test]
    fn a_shorter_pause_counts_at_once() {
        let now = Instant::now();
        let mut rounds = Rounds::default();
        rounds.know(1, now + HOUR);
        assert_eq!(rounds.next(now, Duration::from_secs(1)), None);
        assert_eq!(rounds.next(now + Duration::from_secs(1), Duration::from_secs(1)), Some(1));
    }
}

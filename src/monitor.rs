//! What monitoring reads: the rows of the views `event_totals` and `rate_budgets`.

use std::collections::HashMap;

use pgrx::datum::TimestampWithTimeZone;
use pgrx::{IntoDatum, pg_sys};
use rules::limits::gcra::Rate;

use crate::event::counters;
use crate::guard::limits::rate_memory;
use crate::pg::function::{Arguments, Returns, bigint, sql_function, text};
use crate::policy::catalog;
use crate::session::actor::shown_role;

sql_function!(
    /// `_event_numbers() → setof record`: the rows of the view `event_totals`.
    writeguard_event_numbers, pg_finfo_writeguard_event_numbers, event_numbers
);
sql_function!(
    /// `_rate_numbers() → setof record`: the rows of the view `rate_budgets`.
    writeguard_rate_numbers, pg_finfo_writeguard_rate_numbers, rate_numbers
);

fn event_numbers(arguments: &Arguments) -> Returns {
    arguments.give_rows(
        counters::of_this_database().iter().map(|counted| {
            [text(&counted.kind.word()), counted.policy.as_deref().and_then(text), bigint(counted.events)]
        }),
    )
}

fn rate_numbers(arguments: &Arguments) -> Returns {
    let policies = catalog::with_rates()?;
    let policies: HashMap<u64, _> = policies.iter().map(|loaded| (loaded.rate_key(), &loaded.policy)).collect();
    // SAFETY: reads the clock.
    let (clock, now) = (unsafe { pg_sys::GetCurrentTimestamp() }, rate_memory::now());
    arguments.give_rows(rate_memory::of_this_database().into_iter().filter_map(|(owner, full_at)| {
        // Of a policy that was dropped or has another rate by now, nobody asks.
        let policy = policies.get(&owner.policy)?;
        let limit = policy.rate?;
        // A rate counts nanoseconds, a policy has microseconds.
        let left = Rate::new(limit.rows, limit.interval.saturating_mul(1_000)).left(full_at, now);
        let microseconds = i64::try_from(full_at.saturating_sub(now) / 1_000).unwrap_or(i64::MAX);
        let full_at = TimestampWithTimeZone::try_from(clock.saturating_add(microseconds)).ok();
        Some([
            text(&policy.name),
            text(&shown_role(owner.login)),
            bigint(limit.rows),
            bigint(left),
            full_at.into_datum(),
        ])
    }))
}

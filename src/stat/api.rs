//! What SQL calls: the rows of the views `stat` and `stat_slots`, and `stat_reset()`.

use pgrx::datum::TimestampWithTimeZone;
use pgrx::{IntoDatum, pg_sys};

use super::histogram::without_empty_end;
use super::memory::{self, Numbers};
use crate::function::{Arguments, Returns, sql_function};
use crate::session::role_name;
use crate::words::RelationName;

sql_function!(
    /// `stat_numbers() → setof record`: the rows of the view `stat`.
    writeguard_stat_numbers, pg_finfo_writeguard_stat_numbers, stat_numbers
);
sql_function!(
    /// `stat_counters() → record`: the row of the view `stat_slots`.
    writeguard_stat_counters, pg_finfo_writeguard_stat_counters, stat_counters
);
sql_function!(
    /// `stat_reset()`.
    writeguard_stat_reset, pg_finfo_writeguard_stat_reset, stat_reset
);

/// The numbers of this database.
pub fn of_this_database() -> Vec<Numbers> {
    // SAFETY: a static of this process.
    let database = unsafe { pg_sys::MyDatabaseId };
    memory::numbers(|key| key.database == database)
}

/// A number as SQL has it.
pub fn bigint(number: u64) -> Option<pg_sys::Datum> {
    i64::try_from(number).unwrap_or(i64::MAX).into_datum()
}

fn stat_numbers(arguments: &Arguments) -> Returns {
    arguments.give_rows(of_this_database().iter().map(|numbers| {
        let (schema, table) = numbers.key.relation();
        let buckets = without_empty_end(&numbers.statements);
        let histogram: Vec<i64> = buckets.iter().map(|count| i64::try_from(*count).unwrap_or(i64::MAX)).collect();
        [
            RelationName::new(schema, table).to_sql().into_datum(),
            role_name(numbers.key.role).into_datum(),
            numbers.operation().map(|operation| operation.word()).into_datum(),
            bigint(buckets.iter().sum()),
            bigint(numbers.rows()),
            bigint(numbers.largest()),
            bigint(numbers.refused),
            bigint(numbers.overridden),
            histogram.into_datum(),
        ]
    }))
}

fn stat_counters(arguments: &Arguments) -> Returns {
    let slots = memory::slots();
    let stored_at = slots.stored_at.and_then(|at| TimestampWithTimeZone::try_from(at).ok());
    arguments.give_rows([[bigint(slots.entries), bigint(slots.used), bigint(slots.evicted), stored_at.into_datum()]])
}

fn stat_reset(_arguments: &Arguments) -> Returns {
    // SAFETY: a static of this process.
    let database = unsafe { pg_sys::MyDatabaseId };
    memory::forget(|key| key.database == database);
    Ok(None)
}

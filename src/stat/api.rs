//! What SQL calls: the rows of the views `stat` and `stat_slots`, `stat_reset()` and `suggest_policies()`.

use pgrx::datum::TimestampWithTimeZone;
use pgrx::{IntoDatum, pg_sys};
use rules::error::Error;
use rules::stat::histogram::without_empty_end;
use rules::stat::suggest::{FEWEST_STATEMENTS, chart, policy_name, suggest};
use rules::words::{RelationName, count, counted};
use serde_json::json;

use super::memory::{self, Numbers};
use crate::pg::encoding;
use crate::pg::function::{Arguments, Returns, bigint, jsonb, sql_function, text};
use crate::policy::relation::{never_covered, relation_of, role_oid};
use crate::session::actor::{role_name, shown_role};

sql_function!(
    /// `_stat_numbers() → setof record`: the rows of the view `stat`.
    writeguard_stat_numbers, pg_finfo_writeguard_stat_numbers, stat_numbers
);
sql_function!(
    /// `_stat_counters() → record`: the row of the view `stat_slots`.
    writeguard_stat_counters, pg_finfo_writeguard_stat_counters, stat_counters
);
sql_function!(
    /// `stat_reset()`.
    writeguard_stat_reset, pg_finfo_writeguard_stat_reset, stat_reset
);

sql_function!(
    /// `suggest_policies(headroom float8) → setof record`: a row for each table, role and operation that was seen.
    writeguard_suggest_policies, pg_finfo_writeguard_suggest_policies, suggest_policies
);

/// The numbers of this database.
pub fn of_this_database() -> Vec<Numbers> {
    // SAFETY: a static of this process.
    let database = unsafe { pg_sys::MyDatabaseId };
    memory::numbers(|key| key.database == database)
}

fn stat_numbers(arguments: &Arguments) -> Returns {
    arguments.give_rows(of_this_database().iter().map(|numbers| {
        let (schema, table) = numbers.key.relation();
        let buckets = without_empty_end(&numbers.statements);
        let histogram: Vec<i64> = buckets.iter().map(|count| i64::try_from(*count).unwrap_or(i64::MAX)).collect();
        [
            text(&RelationName::new(schema, table).to_sql()),
            text(&shown_role(numbers.key.role)),
            numbers.operation().and_then(|operation| text(operation.word())),
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

fn suggest_policies(arguments: &Arguments) -> Returns {
    let headroom: f64 = arguments.get(0).unwrap_or(f64::NAN);
    if !(1.0..=1_000_000.0).contains(&headroom) {
        let hint = "headroom => 2 (limits twice as high as what was usual)";
        return Err(Error::invalid("headroom must be between 1 and 1000000", hint).into());
    }
    let ascii = !encoding::has_all_letters();
    let mut all: Vec<(String, String, Numbers)> = of_this_database()
        .into_iter()
        .filter_map(|numbers| {
            let (schema, table) = numbers.key.relation();
            let relation = RelationName::new(schema, table);
            // What was dropped since is in no policy's way.
            let is_there = relation_of(&relation).is_some_and(|relation| never_covered(relation).is_none());
            let role = role_name(numbers.key.role);
            (is_there && role_oid(&role) == Some(numbers.key.role)).then(|| (relation.to_sql(), role, numbers))
        })
        .collect();
    all.sort_by_key(|(relation, role, numbers)| (relation.clone(), role.clone(), numbers.key.operation));
    arguments.give_rows(all.into_iter().map(|(relation, role, numbers)| {
        let word = numbers.operation().map_or("", |operation| operation.word());
        let statements: u64 = numbers.statements.iter().sum();
        let largest = numbers.largest();
        let found = suggest(&numbers.statements, largest, headroom);
        let limit = found.map(|found| found.max_rows);
        let note = match found {
            None => {
                format!("too little seen: {statements} of {FEWEST_STATEMENTS} statements")
            }
            Some(found) if found.refused == 0 => "all of them would have passed".to_owned(),
            Some(found) => format!(
                "at most {} of {statements} would have been refused, the largest of {}",
                found.refused,
                count(largest)
            ),
        };
        let document = limit.map(|limit| {
            jsonb(
                &json!({
                    "name": policy_name(&relation, word, &role),
                    "tables": [relation], "roles": [role], "operations": [word], "max_rows": limit,
                    "comment": format!("suggested after {}, the largest of {}", counted(statements, "statement"), count(largest)),
                })
                .to_string(),
            )
        });
        let chart = chart(without_empty_end(&numbers.statements), limit, ascii);
        [
            text(&relation),
            text(&role),
            text(word),
            bigint(statements),
            bigint(largest),
            limit.and_then(bigint),
            found.and_then(|found| bigint(found.refused)),
            text(&chart),
            text(&note),
            document.flatten(),
        ]
    }))
}

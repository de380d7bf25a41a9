//! `undo_conflicts`: the rows of a change that are not as it left them, shown to those who may read the table.

use pgrx::pg_sys;
use rustc_hash::FxHashSet;

use super::apply::unwritable;
use super::conflict_row::Told;
use super::current_state::{Purpose, compare};
use crate::pg::function::{Arguments, Returns, jsonb, sql_function, text};
use crate::undo::change_record::{self, Change};

sql_function!(
    /// `undo_conflicts(change bigint) → setof …`.
    writeguard_undo_conflicts, pg_finfo_writeguard_undo_conflicts, undo_conflicts
);

fn undo_conflicts(arguments: &Arguments) -> Returns {
    let change = Change::find(change_record::number(arguments)?, false)?;
    let refused = unwritable(change.id)?;
    let none = FxHashSet::default();
    let mut rows = Vec::new();
    for (place, kept) in change.relations.iter().enumerate() {
        let table = change.open(kept, pg_sys::AccessShareLock)?;
        let name = table.shape.name().to_sql();
        let mut tell = |told: Told| {
            let Told { key, was, wrote, is_now } = told;
            rows.push((name.clone(), [key, was, wrote, is_now]));
        };
        compare(change.id, table, Purpose::Tell(&mut tell, refused.get(place).unwrap_or(&none)))?.end();
    }
    arguments.give_rows(rows.into_iter().map(|(name, values)| {
        let [key, was, wrote, is_now] = values.map(|json| json.and_then(|json| jsonb(&json)));
        [text(&name), key, was, wrote, is_now]
    }))
}

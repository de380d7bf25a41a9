//! The samples of a request as whoever looks may see them: of each row the columns that they could read themselves.

use std::collections::BTreeMap;

use pgrx::pg_sys;
use rules::token::name::qualified_name;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::pg::encoding;
use crate::pg::function::{Arguments, Returns, sql_function, text};
use crate::policy::readable::Reader;
use crate::policy::relation::{ancestors, relation_of};

sql_function!(
    /// `_samples(samples text) → text`: JSON as a request keeps it, without what the current user may not read. Of a table of
    /// which that is nothing there is the number of rows alone, as `hidden`.
    writeguard_samples, pg_finfo_writeguard_samples, samples, not_preloaded_too
);

/// A row; none where there was or is none.
type Row = Option<BTreeMap<String, Box<RawValue>>>;

/// Some rows of one table and operation.
#[derive(Deserialize, Serialize)]
struct Sample {
    relation: String,
    operation: String,
    before: Vec<Row>,
    after: Vec<Row>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    left_out: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    hidden: Option<u64>,
}

fn samples(arguments: &Arguments) -> Returns {
    let value: Option<String> = arguments.get(0);
    let Some(value) = value else { return Ok(None) };
    let Ok(mut samples) = serde_json::from_str::<Vec<Sample>>(&value) else { return Ok(None) };
    for sample in &mut samples {
        sample.keep_what_is_readable();
    }
    Ok(text(&serde_json::to_string(&samples).unwrap_or_default()))
}

impl Sample {
    fn keep_what_is_readable(&mut self) {
        // SAFETY: reads a static.
        let me = unsafe { pg_sys::GetUserId() };
        let relation = qualified_name(&self.relation).and_then(|name| relation_of(&name));
        let reader = relation.and_then(|oid| Reader::new(me, core::iter::once(oid).chain(ancestors(oid))));
        let may_see = |name: &str| {
            let name = encoding::name_to_c(name);
            reader.as_ref().zip(name).is_some_and(|(reader, name)| reader.may_see(&name))
        };
        let rows = || self.before.iter().chain(&self.after).flatten();
        let is_anything_readable = rows().flat_map(BTreeMap::keys).any(|name| may_see(name));
        if !is_anything_readable {
            self.hidden = Some(self.before.len() as u64);
            self.before.clear();
            self.after.clear();
            return;
        }
        for row in self.before.iter_mut().chain(&mut self.after).flatten() {
            row.retain(|name, _| may_see(name));
        }
    }
}

//! Stored texts as the views give them out: a request is kept in the database's own bytes, letter by letter, and a byte that
//! is no letter would cost whoever looks the whole view. What would pose as something else to a reviewer is an escape.

use rules::disguise::{undisguised, undisguised_json};

use crate::pg::encoding;
use crate::pg::function::{Arguments, Returns, sql_function, text};

sql_function!(
    /// `_shown(value text) → text`: in letters that the client can be sent; what is none stands there as `\x..`.
    writeguard_shown, pg_finfo_writeguard_shown, shown, not_preloaded_too
);

sql_function!(
    /// `_shown_json(value text) → text`: the same of JSON, in letters that the database has.
    writeguard_shown_json, pg_finfo_writeguard_shown_json, shown_json, not_preloaded_too
);

fn shown(arguments: &Arguments) -> Returns {
    let value: Option<String> = arguments.get(0);
    Ok(value.and_then(|value| text(&encoding::shown_to_client(&undisguised(&value)))))
}

fn shown_json(arguments: &Arguments) -> Returns {
    let value: Option<String> = arguments.get(0);
    Ok(value.and_then(|value| text(&encoding::shown_json(&undisguised_json(&value)))))
}

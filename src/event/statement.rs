//! How much of a statement's text an event has: its beginning, and of that what `writeguard.log_statement` says.

use rules::lexer;

use super::memory;
use super::record::Event;
use crate::pg::ffi;
use crate::session::excerpt::Excerpt;
use crate::session::settings::{self, LogStatement};

/// A longer statement is not shown in a hint: nobody pastes it from there.
const MOST_IN_HINT: usize = 8 * 1024;

impl Event {
    /// Sets the event's statement, as far as `writeguard.log_statement` wants it.
    pub fn tell_statement(&mut self, excerpt: &Excerpt) {
        self.statement = told(excerpt);
    }
}

/// The text that an event has of a statement.
pub fn told(excerpt: &Excerpt) -> Option<String> {
    match settings::log_statement() {
        LogStatement::Full => Some(excerpt.shown()),
        LogStatement::Normalized => {
            Some(excerpt.mark(lexer::without_constants(&excerpt.without_token(), ffi::backslash_escapes())))
        }
        LogStatement::None => None,
    }
}

/// Whether an event that goes through the queue has all of the text.
pub fn is_kept_whole(excerpt: &Excerpt) -> bool {
    excerpt.is_whole() && excerpt.length() <= memory::statement_bytes()
}

/// Whether events have all of a statement that is not too long for them.
pub fn tells_all() -> bool {
    settings::log_statement() == LogStatement::Full
}

/// The statement as a hint shows it, which the server log has as well.
pub fn hinted(excerpt: &Excerpt) -> String {
    let shows = tells_all() && excerpt.is_whole() && excerpt.length() <= MOST_IN_HINT;
    if shows { excerpt.without_token() } else { "…".to_owned() }
}

/// Whether constants were left out of an event's text, or it has parameters.
pub fn lacks_values(told: &str) -> bool {
    !tells_all() && lexer::highest_parameter(told, ffi::backslash_escapes()) > 0
}

//! What is told of a statement: `writeguard.log_statement`.

use pgrx::pg_sys;

use super::record::Event;
use crate::settings::{self, LogStatement};
use crate::{lexer, session};

impl Event {
    /// Tells the event's statement, as far as that is wanted.
    pub fn tell_statement(&mut self, text: String) {
        self.statement = told(text);
    }
}

/// What an event tells of a statement with this text.
pub fn told(text: String) -> Option<String> {
    let text = session::without_token(text);
    match settings::log_statement() {
        LogStatement::Full => Some(text),
        LogStatement::Normalized => Some(lexer::without_constants(&text, backslashes())),
        LogStatement::None => None,
    }
}

/// Whether events tell all of a statement.
pub fn tells_all() -> bool {
    settings::log_statement() == LogStatement::Full
}

/// The statement as a hint shows it, which the server log has as well.
pub fn hinted(text: String) -> String {
    if tells_all() { text } else { "…".to_owned() }
}

/// Whether values were left out of a text that is told now, or its parameters.
pub fn lacks_values(told: &str) -> bool {
    !tells_all() && lexer::highest_parameter(told, backslashes()) > 0
}

fn backslashes() -> bool {
    // SAFETY: reads a static.
    unsafe { !pg_sys::standard_conforming_strings }
}

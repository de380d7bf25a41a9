//! What is told of a statement: its beginning, and of that what `writeguard.log_statement` says.
//!
//! A client may send a gigabyte. It is cut before anything else is done with it.

use pgrx::pg_sys;

use super::queue;
use super::record::Event;
use crate::lexer;
use crate::pg::encoding;
use crate::session::actor;
use crate::session::settings::{self, LogStatement};
use crate::words::{beginning, marked};

/// A longer statement is not shown in a hint: nobody pastes it from there.
const MOST_IN_HINT: usize = 8 * 1024;

/// Bytes that an event has of any text at most; the queue may have room for fewer.
pub const MOST_BYTES: usize = 64 * 1024;

/// The beginning of a statement's text, as much as an event has of it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Excerpt {
    text: String,
    /// Bytes of the whole text, where this is not all of it.
    of: Option<usize>,
}

impl Excerpt {
    /// Of a text.
    pub fn of(text: &str) -> Self {
        let text_begins = beginning(text, MOST_BYTES);
        let of = (text_begins.len() < text.len()).then_some(text.len());
        Self { text: text_begins.to_owned(), of }
    }

    /// Of a text in the server's encoding that has `all` bytes, or fewer than were copied of it.
    pub fn of_server(text: &[u8], all: usize) -> Self {
        let begins = encoding::beginning(text, MOST_BYTES);
        Self { text: encoding::from_server(begins), of: (begins.len() < all).then_some(all) }
    }

    /// The same with at most so many bytes.
    pub fn at_most(&self, bytes: usize) -> Self {
        let text = beginning(&self.text, bytes);
        let of = self.of.or_else(|| (text.len() < self.text.len()).then_some(self.text.len()));
        Self { text: text.to_owned(), of }
    }

    /// Whether it is all of the text.
    fn is_whole(&self) -> bool {
        self.of.is_none()
    }

    /// Whether an event that goes through the queue has all of the text.
    pub fn is_kept_whole(&self) -> bool {
        self.is_whole() && self.text.len() <= queue::statement_bytes()
    }

    /// Whether an event has the text as it is, without escapes for what is no letter.
    pub fn is_shown_exactly(&self) -> bool {
        encoding::is_exact(&encoding::shown(&self.text))
    }

    /// Whether there is no text at all.
    pub fn is_empty(&self) -> bool {
        self.text.is_empty()
    }

    /// The text without the session's token, and with the number of its bytes where it was cut.
    pub fn shown(&self) -> String {
        self.mark(self.without_token())
    }

    fn without_token(&self) -> String {
        actor::without_token(&self.text, !self.is_whole())
    }

    fn mark(&self, text: String) -> String {
        self.of.map_or_else(|| text.clone(), |of| marked(&text, of))
    }
}

impl Event {
    /// Tells the event's statement, as far as that is wanted.
    pub fn tell_statement(&mut self, excerpt: &Excerpt) {
        self.statement = told(excerpt);
    }
}

/// What an event tells of a statement.
pub fn told(excerpt: &Excerpt) -> Option<String> {
    match settings::log_statement() {
        LogStatement::Full => Some(excerpt.shown()),
        LogStatement::Normalized => {
            Some(excerpt.mark(lexer::without_constants(&excerpt.without_token(), backslashes())))
        }
        LogStatement::None => None,
    }
}

/// Whether events tell all of a statement that is no longer than they can.
pub fn tells_all() -> bool {
    settings::log_statement() == LogStatement::Full
}

/// The statement as a hint shows it, which the server log has as well.
pub fn hinted(excerpt: &Excerpt) -> String {
    let shows = tells_all() && excerpt.is_whole() && excerpt.text.len() <= MOST_IN_HINT;
    if shows { excerpt.without_token() } else { "…".to_owned() }
}

/// Whether values were left out of a text that is told now, or its parameters.
pub fn lacks_values(told: &str) -> bool {
    !tells_all() && lexer::highest_parameter(told, backslashes()) > 0
}

fn backslashes() -> bool {
    // SAFETY: reads a static.
    unsafe { !pg_sys::standard_conforming_strings }
}

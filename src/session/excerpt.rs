//! The beginning of a statement's text. A client may send a gigabyte: it is cut before anything else is done with it.

use rules::words::{beginning, marked};

use super::actor;
use crate::pg::encoding;

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
    pub fn is_whole(&self) -> bool {
        self.of.is_none()
    }

    /// Whether an event has the text as it is, without escapes for what is no letter.
    pub fn is_shown_exactly(&self) -> bool {
        encoding::is_exact(&encoding::shown(&self.text))
    }

    /// Bytes of the text that are here.
    pub fn length(&self) -> usize {
        self.text.len()
    }

    /// Whether there is no text at all.
    pub fn is_empty(&self) -> bool {
        self.text.is_empty()
    }

    /// The text without the session's token, and with the number of its bytes where it was cut.
    pub fn shown(&self) -> String {
        self.mark(self.without_token())
    }

    /// The text without the session's token.
    pub fn without_token(&self) -> String {
        actor::without_token(&self.text, !self.is_whole())
    }

    /// `text`, which was made of this one, with the number of bytes where it was cut.
    pub fn mark(&self, text: String) -> String {
        self.of.map_or_else(|| text.clone(), |of| marked(&text, of))
    }
}

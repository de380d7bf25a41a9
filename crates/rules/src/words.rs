//! The words of the field that everything else speaks in: operations, scopes, overrides, relation names, and how they
//! are written in SQL and in messages.

use core::fmt;
use std::borrow::Cow;

use serde::{Deserialize, Serialize};

/// What a write does to a row, as far as a policy may limit it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Operation {
    Update,
    Delete,
    Truncate,
    Drop,
}

impl Operation {
    /// Every operation.
    pub const ALL: [Operation; 4] = [Operation::Update, Operation::Delete, Operation::Truncate, Operation::Drop];

    /// The word that policies and events use.
    pub fn word(self) -> &'static str {
        match self {
            Operation::Update => "update",
            Operation::Delete => "delete",
            Operation::Truncate => "truncate",
            Operation::Drop => "drop",
        }
    }

    /// The operation of that word.
    pub fn parse(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|operation| operation.word() == word)
    }

    /// One bit for each operation.
    pub fn bit(self) -> u8 {
        1 << self as u8
    }
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

/// An operation as messages call it: DDL by what it does to a table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Deed {
    pub operation: Operation,
    called: &'static str,
}

impl Deed {
    /// DDL that goes by this name.
    pub const fn ddl(called: &'static str) -> Self {
        Self { operation: Operation::Drop, called }
    }
}

impl From<Operation> for Deed {
    fn from(operation: Operation) -> Self {
        Self { operation, called: operation.word() }
    }
}

impl fmt::Display for Deed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.called)
    }
}

/// What a limit is counted over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Scope {
    Statement,
    Transaction,
    Rate,
    Fraction,
    Block,
    /// The statement's condition, not a number of rows.
    Where,
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Scope::Statement => "statement",
            Scope::Transaction => "transaction",
            Scope::Rate => "rate",
            Scope::Fraction => "fraction",
            Scope::Block => "block",
            Scope::Where => "where",
        })
    }
}

const UNITS: [(&str, u64); 4] = [("d", 86_400), ("h", 3_600), ("min", 60), ("s", 1)];

/// A time to wait in microseconds, in two units and never less than it is.
pub fn wait(microseconds: u64) -> String {
    let seconds = microseconds.div_ceil(1_000_000).max(1);
    let largest = UNITS.iter().position(|(_, length)| *length <= seconds).unwrap_or(UNITS.len() - 1);
    let (_, told) = UNITS[(largest + 1).min(UNITS.len() - 1)];
    duration(seconds.div_ceil(told).saturating_mul(told).saturating_mul(1_000_000))
}

/// A time in microseconds, in the two units that say most of it; rounded up to seconds.
pub fn duration(microseconds: u64) -> String {
    let seconds = microseconds.div_ceil(1_000_000).max(1);
    let mut left = seconds;
    let parts: Vec<String> = UNITS
        .into_iter()
        .filter_map(|(unit, length)| {
            let count = left / length;
            left %= length;
            (count > 0).then(|| format!("{count} {unit}"))
        })
        .take(2)
        .collect();
    parts.join(" ")
}

/// What happens past a policy's limits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// It is recorded.
    Observe,
    /// It is recorded, and the client gets a WARNING.
    Warn,
    /// It is refused.
    Enforce,
    /// The policy has no limits; those of less specific policies are set aside.
    Exempt,
}

impl Mode {
    /// The word in the policy's column.
    pub fn word(self) -> &'static str {
        match self {
            Mode::Observe => "observe",
            Mode::Warn => "warn",
            Mode::Enforce => "enforce",
            Mode::Exempt => "exempt",
        }
    }

    /// The mode of that word.
    pub fn parse(word: &str) -> Option<Self> {
        [Mode::Observe, Mode::Warn, Mode::Enforce, Mode::Exempt].into_iter().find(|mode| mode.word() == word)
    }

    /// Whether what goes past a limit is refused.
    #[inline]
    pub fn refuses(self) -> bool {
        self == Mode::Enforce
    }

    /// Whether what goes past a limit is let pass, and recorded.
    pub fn looks_on(self) -> bool {
        matches!(self, Mode::Observe | Mode::Warn)
    }
}

/// What lifts all that a policy refuses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Override {
    Never,
    Flag,
    Token,
}

impl Override {
    /// The word in the policy's column.
    pub fn word(self) -> &'static str {
        match self {
            Override::Never => "never",
            Override::Flag => "flag",
            Override::Token => "token",
        }
    }
}

/// A relation by name, as events and messages show it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RelationName {
    pub schema: String,
    pub name: String,
}

impl RelationName {
    /// The relation `name` in `schema`, both as the catalog has them.
    pub fn new(schema: impl Into<String>, name: impl Into<String>) -> Self {
        Self { schema: schema.into(), name: name.into() }
    }

    /// The name as SQL would have it, quoted where it must be.
    pub fn to_sql(&self) -> String {
        format!("{}.{}", quote_identifier(&self.schema), quote_identifier(&self.name))
    }
}

impl fmt::Display for RelationName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.to_sql())
    }
}

/// Whether a letter needs no quotes in an SQL identifier.
pub fn is_plain(letter: char) -> bool {
    matches!(letter, 'a'..='z' | '0'..='9' | '_')
}

/// `text` as an SQL identifier; quoted unless it is plain lower-case letters, digits and underscores. Reserved words
/// are quoted by nobody here: as a table name they need it in SQL only where no schema stands before them.
pub fn quote_identifier(text: &str) -> String {
    let plain = text.chars().all(is_plain) && text.starts_with(|letter: char| !letter.is_ascii_digit());
    if plain { text.to_owned() } else { format!("\"{}\"", text.replace('"', "\"\"")) }
}

/// `1 row`, `2 rows`.
pub fn count(rows: u64) -> String {
    counted(rows, "row")
}

/// So many of a thing, whose name takes an s where they are not one.
pub fn counted(number: u64, thing: &str) -> String {
    format!("{number} {thing}{}", if number == 1 { "" } else { "s" })
}

/// `text` as an SQL string literal, dollar-quoted where that reads better.
pub fn literal(text: &str) -> String {
    if !text.contains('\'') && !text.contains('\\') {
        return format!("'{text}'");
    }
    let mut tag = String::new();
    while text.contains(&format!("${tag}$")) || text.ends_with('$') && tag.is_empty() {
        tag.push('q');
    }
    format!("${tag}${text}${tag}$")
}

/// The longest beginning of `text` that is whole letters and has at most so many bytes.
pub fn beginning(text: &str, bytes: usize) -> &str {
    let end = (0..=bytes.min(text.len())).rev().find(|end| text.is_char_boundary(*end)).unwrap_or(0);
    &text[..end]
}

/// The text of which [`shortened`] has left this, and how many bytes it had in all; none where it is whole.
pub fn cut_from(text: &str) -> Option<(&str, usize)> {
    let (beginning, bytes) = text.strip_suffix(CUT_ENDS)?.rsplit_once(CUT)?;
    Some((beginning, bytes.parse().ok()?))
}

/// A text of which only the beginning is left, with how many bytes it had in all.
pub fn marked(beginning: &str, of: usize) -> String {
    format!("{beginning}{CUT}{of}{CUT_ENDS}")
}

// In letters that every server encoding has.
const CUT: &str = " ... (";
const CUT_ENDS: &str = " bytes in all)";

/// `text`, or its beginning of at most so many bytes with how many there were in all: the same number again where it was
/// shortened before.
pub fn shortened(text: &str, bytes: usize) -> Cow<'_, str> {
    let (kept, of) = cut_from(text).unwrap_or((text, text.len()));
    if kept.len() <= bytes { Cow::Borrowed(text) } else { Cow::Owned(marked(beginning(kept, bytes), of)) }
}

/// Serial number of a statement or a transaction; 0 is none.
pub type Serial = u64;

/// Where rows are charged: the running statement and the subtransaction it is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    pub statement: Serial,
    /// Nesting level as PostgreSQL counts it: 1 is the transaction itself.
    pub level: i32,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_told_in_two_units() {
        for (microseconds, text) in
            [(0, "1 s"), (1, "1 s"), (59_000_001, "1 min"), (3_600_000_000, "1 h"), (90_061_000_000, "1 d 1 h")]
        {
            assert_eq!(duration(microseconds), text);
        }
    }

    #[test]
    fn a_wait_is_never_told_shorter_than_it_is() {
        for (seconds, text) in [
            (0, "1 s"),
            (59, "59 s"),
            (61, "1 min 1 s"),
            (3_599, "59 min 59 s"),
            (3_601, "1 h 1 min"),
            (7_199, "2 h"),
            (86_399, "1 d"),
            (90_061, "1 d 2 h"),
        ] {
            assert_eq!(wait(seconds * 1_000_000), text, "{seconds}");
        }
        assert_eq!(wait(1), "1 s");
    }

    #[test]
    fn things_are_counted_in_words() {
        assert_eq!(
            (counted(0, "row"), counted(1, "row"), counted(2, "row")),
            ("0 rows".into(), "1 row".into(), "2 rows".into())
        );
    }

    #[test]
    fn literals_survive_quotes() {
        assert_eq!(literal("UPDATE t SET a = 1"), "'UPDATE t SET a = 1'");
        assert_eq!(literal("a = 'x'"), "$$a = 'x'$$");
        assert_eq!(literal("a = '$$'"), "$q$a = '$$'$q$");
        assert_eq!(literal("'a$"), "$q$'a$$q$");
    }

    #[test]
    fn a_long_text_is_cut_between_letters_and_says_so() {
        assert_eq!(shortened("abc", 3), "abc");
        assert_eq!(shortened("abcd", 3), "abc ... (4 bytes in all)");
        assert_eq!(shortened("aüb", 2), "a ... (4 bytes in all)");
        assert_eq!(shortened("", 0), "");
        assert_eq!(cut_from("abc"), None);
        assert_eq!(cut_from("abc ... (x bytes in all)"), None);
    }

    #[test]
    fn cut_twice_it_tells_the_whole_number() {
        let once = shortened("abcdef", 4).into_owned();
        assert_eq!(shortened(&once, 4), once);
        assert_eq!(shortened(&once, 2), "ab ... (6 bytes in all)");
        assert_eq!(cut_from(&once), Some(("abcd", 6)));
    }
}

//! The limits that a policy may state. Which policies apply is decided for each of them apart.

use core::fmt;

/// One of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Limit {
    Rows,
    RowsPerTransaction,
    Rate,
    Fraction,
    Where,
    Transaction,
}

impl Limit {
    /// All of them, in the order of the policy's columns.
    pub const ALL: [Limit; 6] =
        [Limit::Rows, Limit::RowsPerTransaction, Limit::Rate, Limit::Fraction, Limit::Where, Limit::Transaction];

    /// The column that states it.
    pub fn column(self) -> &'static str {
        match self {
            Limit::Rows => "max_rows",
            Limit::RowsPerTransaction => "max_rows_per_transaction",
            Limit::Rate => "rate_rows",
            Limit::Fraction => "max_fraction",
            Limit::Where => "require_where",
            Limit::Transaction => "require_transaction",
        }
    }

    fn bit(self) -> u8 {
        1 << self as u8
    }
}

impl fmt::Display for Limit {
    /// As `effective()` calls it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Limit::Rate => "rate",
            other => other.column(),
        })
    }
}

/// Some of the limits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Limits(u8);

impl Limits {
    /// Whether the limit is one of them.
    pub fn contains(self, limit: Limit) -> bool {
        self.0 & limit.bit() != 0
    }

    /// Whether all of those are among them.
    pub fn contain_all(self, others: Self) -> bool {
        others.0 & !self.0 == 0
    }

    /// Each of them.
    pub fn iter(self) -> impl Iterator<Item = Limit> {
        Limit::ALL.into_iter().filter(move |limit| self.contains(*limit))
    }

    /// Whether there are none.
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }
}

impl FromIterator<Limit> for Limits {
    fn from_iter<T: IntoIterator<Item = Limit>>(limits: T) -> Self {
        Self(limits.into_iter().fold(0, |bits, limit| bits | limit.bit()))
    }
}

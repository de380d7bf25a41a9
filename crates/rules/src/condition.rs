//! What a condition can do to the rows of a scan, as far as that is known before it runs.
//!
//! Pure: the algebra of conditions; `expression` reads them from a plan.

/// A condition, or a part of one, over the rows of one table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Condition {
    /// It looks at the table's columns, and is not known to be the same for every row.
    Narrows,
    /// The same for every row, but not known: a parameter, a time, another table's affair.
    Blind,
    /// Known, and the same for every row; none is NULL.
    Known(Option<bool>),
}

impl Condition {
    /// What holds for every row, and what for none.
    pub const TRUE: Condition = Condition::Known(Some(true));
    pub const FALSE: Condition = Condition::Known(Some(false));

    /// Whether a scan under this condition is narrower than the table.
    pub fn narrows(self) -> bool {
        matches!(self, Condition::Narrows | Condition::Known(Some(false) | None))
    }

    /// How much a part weighs where several meet; the heaviest decides. `decisive` is the value that ends the matter:
    /// false for AND, true for OR.
    fn weight(self, decisive: bool) -> u8 {
        match self {
            Condition::Known(Some(value)) if value == decisive => 4,
            Condition::Narrows => 3,
            Condition::Blind => 2,
            Condition::Known(None) => 1,
            Condition::Known(Some(_)) => 0,
        }
    }

    /// Both of them hold.
    pub fn and(self, other: Condition) -> Condition {
        if other.weight(false) > self.weight(false) { other } else { self }
    }

    /// One of them holds.
    pub fn or(self, other: Condition) -> Condition {
        if other.weight(true) > self.weight(true) { other } else { self }
    }

    /// Its contrary.
    pub fn negated(self) -> Condition {
        self.mapped(|value| value.map(|value| !value))
    }

    /// What a test makes of it, where it is known.
    pub fn mapped(self, test: impl Fn(Option<bool>) -> Option<bool>) -> Condition {
        match self {
            Condition::Known(value) => Condition::Known(test(value)),
            other => other,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use crate::condition::Condition;
    use crate::condition::Condition::{Blind, Known, Narrows};

    const TRUE: Condition = Condition::TRUE;
    const FALSE: Condition = Condition::FALSE;

    fn all(parts: &[Condition]) -> Condition {
        parts.iter().fold(TRUE, |all, part| all.and(*part))
    }

    fn any(parts: &[Condition]) -> Condition {
        parts.iter().fold(FALSE, |any, part| any.or(*part))
    }

    #[test]
    fn one_narrow_part_of_and_is_enough() {
        assert_eq!(all(&[TRUE, Blind, Narrows]), Narrows);
        assert_eq!(all(&[TRUE, Blind]), Blind);
        assert_eq!(all(&[TRUE, TRUE]), TRUE);
        assert_eq!(all(&[Narrows, FALSE]), FALSE);
        assert_eq!(all(&[TRUE, Known(None)]), Known(None));
    }

    #[test]
    fn one_true_part_of_or_lets_all_through() {
        assert_eq!(any(&[Narrows, TRUE]), TRUE);
        assert_eq!(any(&[Narrows, FALSE]), Narrows);
        assert_eq!(any(&[Blind, Known(None)]), Blind);
        assert_eq!(any(&[FALSE, Known(None)]), Known(None));
    }

    #[test]
    fn only_what_depends_on_rows_or_lets_none_through_narrows() {
        assert!([Narrows, FALSE, Known(None)].into_iter().all(Condition::narrows));
        assert!(!TRUE.narrows() && !Blind.narrows());
    }

    fn part() -> impl Strategy<Value = Condition> {
        prop::sample::select(vec![Narrows, Blind, TRUE, FALSE, Known(None)])
    }

    proptest! {
        #[test]
        fn the_order_of_parts_does_not_matter(parts in prop::collection::vec(part(), 0..5)) {
            let reversed: Vec<Condition> = parts.iter().rev().copied().collect();
            prop_assert_eq!(all(&parts), all(&reversed));
            prop_assert_eq!(any(&parts), any(&reversed));
        }

        #[test]
        fn not_any_is_all_not(parts in prop::collection::vec(part(), 0..5)) {
            let negated: Vec<Condition> = parts.iter().map(|part| part.negated()).collect();
            prop_assert_eq!(any(&parts).negated(), all(&negated));
        }
    }
}

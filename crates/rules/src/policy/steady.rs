//! Reading what may change while it is read: several look-ups that belong together, each of which may take in what others
//! have committed meanwhile.
//!
//! Pure. A reading during which nothing changed is good, and may be kept. Where something did change it is made again; two
//! in a row that came from the same are good as well: between them there was a moment at which all of it held together, and
//! a statement may have its answer as of that moment, as it has its snapshot. That one is not kept, because nothing
//! shows when it ends. A single reading that was disturbed is never used: it may be half of before and half of after what another
//! session committed at once.

/// Readings before it is given up. Somebody else must have committed a change of this very answer during each of them.
const MOST_ROUNDS: usize = 64;

/// What was read.
#[derive(Debug, PartialEq, Eq)]
pub struct Steady<T> {
    pub value: T,
    /// Nothing changed meanwhile: it is good until something does.
    pub lasts: bool,
}

/// Reads until the answer is good; none when it never was. `changes` is a number that is another one after a change, and
/// `read` gives what the answer came from, and the answer.
///
/// # Errors
/// Those of `read`.
pub fn read<I: PartialEq, T, E>(
    changes: impl Fn() -> u64,
    mut read: impl FnMut() -> Result<(I, T), E>,
) -> Result<Option<Steady<T>>, E> {
    let mut before = None;
    for _ in 0..MOST_ROUNDS {
        let begun = changes();
        let (from, value) = read()?;
        let lasts = changes() == begun;
        if lasts || before.as_ref() == Some(&from) {
            return Ok(Some(Steady { value, lasts }));
        }
        before = Some(from);
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use core::cell::Cell;
    use core::convert::Infallible;

    use super::*;

    /// Reads with an invalidation in each of the first so many rounds; `from` is what the answer of a round comes from.
    /// Gives the outcome and the rounds that it took.
    fn disturbed(rounds: usize, from: impl Fn(usize) -> usize) -> (Option<Steady<usize>>, usize) {
        let (changes, round) = (Cell::new(0), Cell::new(0));
        let outcome = read(
            || changes.get(),
            || {
                let now = round.replace(round.get() + 1);
                if now < rounds {
                    changes.set(changes.get() + 1);
                }
                Ok::<_, Infallible>((from(now), from(now) * 10))
            },
        );
        let Ok(outcome) = outcome;
        (outcome, round.get())
    }

    #[test]
    fn an_undisturbed_reading_is_good_and_lasts() {
        assert_eq!(disturbed(0, |_| 7), (Some(Steady { value: 70, lasts: true }), 1));
        assert_eq!(disturbed(3, |round| round), (Some(Steady { value: 30, lasts: true }), 4));
    }

    #[test]
    fn where_each_look_up_disturbs_the_second_one_that_sees_the_same_is_good_for_now() {
        assert_eq!(disturbed(usize::MAX, |_| 7), (Some(Steady { value: 70, lasts: false }), 2));
        // Changed in the first rounds.
        assert_eq!(disturbed(usize::MAX, |round| round.min(5)), (Some(Steady { value: 50, lasts: false }), 7));
    }

    #[test]
    fn what_never_holds_still_is_given_up() {
        assert_eq!(disturbed(usize::MAX, |round| round), (None, MOST_ROUNDS));
        // To and fro: what came from the same with something else in between is not good.
        assert_eq!(disturbed(usize::MAX, |round| round % 2), (None, MOST_ROUNDS));
    }

    #[test]
    fn an_error_is_the_readings_own() {
        assert_eq!(read(|| 0, || Err::<((), ()), _>("no")), Err("no"));
    }
}

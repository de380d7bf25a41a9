//! SQL text in pieces: as far as is needed to tell constants and comments from everything else.
//!
//! Pure. PostgreSQL's own scanner cuts the same (a test compares), but it raises errors, says its notices a second time
//! and wants a transaction. The text is one that PostgreSQL's parser has accepted; whatever else it is given, it comes
//! to the end.

use core::ops::Range;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Piece {
    Blank,
    Comment,
    /// A string, a bit string or a number, with its prefix and all its lines.
    Constant,
    /// `$1`
    Parameter,
    /// A name, a key word, or a letter of an operator.
    Other,
}

/// The pieces of a text with their places. `backslashes`: they escape in every string constant, as without
/// `standard_conforming_strings`.
pub fn pieces(text: &[u8], backslashes: bool) -> impl Iterator<Item = (Piece, Range<usize>)> + '_ {
    let mut at = 0;
    core::iter::from_fn(move || {
        let rest = text.get(at..).filter(|rest| !rest.is_empty())?;
        let (piece, length) = first(rest, backslashes);
        let range = at..at + length;
        at = range.end;
        Some((piece, range))
    })
}

/// The text with `$n` for each constant, counted on from the highest parameter that it has, and without comments.
pub fn without_constants(text: &str, backslashes: bool) -> String {
    let mut number = highest_parameter(text, backslashes);
    let mut result = String::with_capacity(text.len());
    for (piece, range) in pieces(text.as_bytes(), backslashes) {
        match piece {
            Piece::Comment => result.push(' '),
            Piece::Constant => {
                number = number.saturating_add(1);
                result.push_str(&format!("${number}"));
            }
            _ => result.push_str(text.get(range).unwrap_or_default()),
        }
    }
    trim(&result).to_owned()
}

/// The number of the highest parameter in a text; 0 where there is none.
pub fn highest_parameter(text: &str, backslashes: bool) -> u32 {
    pieces(text.as_bytes(), backslashes)
        .filter(|(piece, _)| *piece == Piece::Parameter)
        .filter_map(|(_, range)| text.get(range)?.trim_start_matches('$').parse().ok())
        .max()
        .unwrap_or(0)
}

/// The piece that a text begins with, and its length, which is never 0. The text is not empty.
fn first(text: &[u8], backslashes: bool) -> (Piece, usize) {
    match text {
        [byte, ..] if is_blank(*byte) => {
            (Piece::Blank, text.iter().position(|byte| !is_blank(*byte)).unwrap_or(text.len()))
        }
        [b'-', b'-', ..] => (Piece::Comment, line_comment(text)),
        [b'/', b'*', ..] => (Piece::Comment, comment(text)),
        [b'\'', ..] => (Piece::Constant, string(text, 0, backslashes)),
        [b'e' | b'E', b'\'', ..] => (Piece::Constant, string(text, 1, true)),
        [b'b' | b'B' | b'x' | b'X', b'\'', ..] => (Piece::Constant, string(text, 1, false)),
        [b'u' | b'U', b'&', b'\'', ..] => (Piece::Constant, string(text, 2, false)),
        [b'u' | b'U', b'&', b'"', ..] => (Piece::Other, 2 + quoted(&text[2..], false)),
        [b'"', ..] => (Piece::Other, quoted(text, false)),
        [b'0'..=b'9', ..] | [b'.', b'0'..=b'9', ..] => (Piece::Constant, number(text)),
        [b'$', b'0'..=b'9', ..] => {
            let digits = text[1..].iter().position(|byte| !byte.is_ascii_digit());
            (Piece::Parameter, digits.map_or(text.len(), |digits| 1 + digits))
        }
        [b'$', ..] => match dollar_quoted(text) {
            Some(length) => (Piece::Constant, length),
            None => (Piece::Other, 1),
        },
        [byte, ..] if is_of_word(*byte) => {
            let end = text.iter().position(|byte| !is_of_word(*byte) && *byte != b'$');
            (Piece::Other, end.unwrap_or(text.len()))
        }
        _ => (Piece::Other, 1),
    }
}

/// PostgreSQL's own blanks.
pub fn is_blank(byte: u8) -> bool {
    matches!(byte, b' ' | b'\t' | b'\n' | b'\r' | 0x0b | 0x0c)
}

/// A text without surrounding blanks of PostgreSQL's own; what else is called a blank is a letter of a name to it.
pub fn trim(text: &str) -> &str {
    text.trim_matches(|letter: char| u8::try_from(letter).is_ok_and(is_blank))
}

fn is_newline(byte: u8) -> bool {
    matches!(byte, b'\n' | b'\r')
}

/// Of identifiers and numbers; all letters beyond ASCII are of identifiers.
fn is_of_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'_' || !byte.is_ascii()
}

/// Bytes of the `--` comment that a text begins with.
fn line_comment(text: &[u8]) -> usize {
    text.iter().position(|byte| is_newline(*byte)).unwrap_or(text.len())
}

/// Bytes of the comment that `text` begins with; comments nest.
fn comment(text: &[u8]) -> usize {
    let (mut depth, mut at) = (0, 0);
    while at < text.len() {
        match text[at..] {
            [b'/', b'*', ..] => (depth, at) = (depth + 1, at + 2),
            [b'*', b'/', ..] => (depth, at) = (depth - 1, at + 2),
            _ => at += 1,
        }
        if depth == 0 {
            break;
        }
    }
    at
}

/// Bytes of the string constant that `text` begins with after a prefix of so many bytes, with all parts of it: another
/// one on a later line belongs to it.
fn string(text: &[u8], prefix: usize, backslashes: bool) -> usize {
    let mut at = prefix + quoted(&text[prefix..], backslashes);
    while let Some(blanks) = continued(&text[at..]) {
        at += blanks;
        at += quoted(&text[at..], backslashes);
    }
    at
}

/// Bytes before the next part of a string constant, where there is one: blanks with a line's end among them, and
/// comments to the end of their lines.
fn continued(text: &[u8]) -> Option<usize> {
    let (mut at, mut lines) = (0, false);
    loop {
        match text.get(at..)? {
            [b'\'', ..] => return lines.then_some(at),
            [b'-', b'-', ..] => at += line_comment(&text[at..]),
            [byte, ..] if is_blank(*byte) => {
                lines |= is_newline(*byte);
                at += 1;
            }
            _ => return None,
        }
    }
}

/// Bytes of the constant or name in quotes that `text` begins with. A doubled quote is a quote inside.
fn quoted(text: &[u8], backslashes: bool) -> usize {
    let mut at = 1;
    while let Some(&byte) = text.get(at) {
        at += if backslashes && byte == b'\\' { 2 } else { 1 };
        if byte == text[0] {
            if text.get(at) != Some(&byte) {
                break;
            }
            at += 1;
        }
    }
    at.min(text.len())
}

/// Bytes of the constant between `$tag$`s that `text` begins with; none: it begins an operator.
fn dollar_quoted(text: &[u8]) -> Option<usize> {
    let name = text[1..].iter().position(|byte| !is_of_word(*byte))? + 1;
    if text[name] != b'$' {
        return None;
    }
    let tag = &text[..=name];
    let body = &text[tag.len()..];
    let end = body.windows(tag.len()).position(|window| window == tag).map_or(body.len(), |at| at + tag.len());
    Some(tag.len() + end)
}

/// Bytes of the number that `text` begins with: also 1_000, 0xff, 1.5 and 1e-5.
fn number(text: &[u8]) -> usize {
    let is_decimal = !matches!(text, [b'0', letter, ..] if letter.is_ascii_alphabetic());
    let mut at = 0;
    while let Some(&byte) = text.get(at) {
        let signs_exponent = || {
            is_decimal
                && matches!(byte, b'+' | b'-')
                && matches!(text[at - 1], b'e' | b'E')
                && text.get(at + 1).is_some_and(u8::is_ascii_digit)
        };
        if !is_of_word(byte) && byte != b'.' && !signs_exponent() {
            break;
        }
        at += 1;
    }
    at
}

/// Whether a text means something else where backslashes escape in every string constant: one of its constants that is not
/// an `E'...'` has a backslash. Which of the two a client's text was parsed with nobody knows any more when it runs.
pub fn depends_on_backslashes(text: &[u8]) -> bool {
    text.contains(&b'\\')
        && pieces(text, false).any(|(piece, range)| {
            let constant = &text[range];
            let is_plain = matches!(constant, [b'\'', ..] | [b'n' | b'N' | b'u' | b'U', ..]);
            piece == Piece::Constant && is_plain && constant.contains(&b'\\')
        })
}

/// Whether PostgreSQL's own scanner may take minutes for a text, in which nothing interrupts it: at each `/*` it reads on to
/// the end of the operator's letters that follow, and in `/*/*/*` these are all letters that there are.
pub fn takes_long_to_scan(text: &[u8]) -> bool {
    /// Steps for one run of letters; no text that people write comes near.
    const MOST_STEPS: usize = 100_000;
    let is_of_operator = |byte: &u8| b"~!@#^&|`?+-*/%<>=".contains(byte);
    text.split(|byte| !is_of_operator(byte)).any(|run| {
        let comments = run.windows(2).filter(|two| two == b"/*").count();
        comments.saturating_mul(run.len()) > MOST_STEPS
    })
}

/// Where a text is without surrounding blanks and final semicolons.
pub fn bounds(text: &[u8]) -> Range<usize> {
    let start = text.iter().position(|byte| !is_blank(*byte)).unwrap_or(text.len());
    let is_of_end = |byte: &u8| is_blank(*byte) || *byte == b';';
    let end = text.iter().rposition(|byte| !is_of_end(byte)).map_or(start, |last| last + 1);
    start..end.max(start)
}

/// Where the text of a statement begins in the client's string, whose first word is at `at`: the blanks and comments
/// before it are its own. PostgreSQL's parser says so itself up to 17, and leaves them out since 18; a token is good for
/// the text on all. `backslashes`: they escape in every string constant, as without `standard_conforming_strings`.
pub fn start_of(string: &[u8], at: usize, backslashes: bool) -> usize {
    let before = &string[..at.min(string.len())];
    if !before.windows(2).any(|two| two == b"--" || two == b"/*") {
        return before.len();
    }
    let is_its_own = |piece| matches!(piece, Piece::Blank | Piece::Comment);
    pieces(before, backslashes).filter(|(piece, _)| !is_its_own(*piece)).last().map_or(0, |(_, range)| range.end)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn normalized(text: &str) -> String {
        without_constants(text, false)
    }

    #[test]
    fn only_plain_constants_depend_on_backslashes() {
        for text in
            ["SELECT 'a\\' /*', x = 1 -- */", "SELECT 'a\\n'", "SELECT N'\\'", "SELECT U&'\\0041'", "SELECT 'a'\n'\\'"]
        {
            assert!(depends_on_backslashes(text.as_bytes()), "{text}");
        }
        for text in
            ["SELECT E'a\\n'", "SELECT $$\\$$", "SELECT \"\\\"", "SELECT 1 -- \\", "SELECT 'a'", "/* '\\' */ SELECT 1"]
        {
            assert!(!depends_on_backslashes(text.as_bytes()), "{text}");
        }
    }

    #[test]
    fn only_runs_of_comments_take_long_to_scan() {
        assert!(takes_long_to_scan("/*".repeat(1_000).as_bytes()));
        assert!(takes_long_to_scan("x /**/".replace("/**/", &"/**/".repeat(1_000)).as_bytes()));
        for short in ["/* a */ ".repeat(100_000), "-".repeat(1_000_000), format!("/{}/ SELECT 1", "*".repeat(90_000))] {
            assert!(!takes_long_to_scan(short.as_bytes()));
        }
    }

    #[test]
    fn constants_are_left_out() {
        assert_eq!(
            normalized("UPDATE t SET a = 'x', b = 5 WHERE c = $2 AND d > -1.5e-3"),
            "UPDATE t SET a = $3, b = $4 WHERE c = $2 AND d > -$5"
        );
        assert_eq!(normalized("a1 = .5 AND b$2 = 0x1e+5 AND c = 1_000"), "a1 = $1 AND b$2 = $2+$3 AND c = $4");
        assert_eq!(normalized("e = E'it\\'s' OR b'01' = X'ff' OR N'a' = U&'b'"), "e = $1 OR $2 = $3 OR N$4 = $5");
        assert_eq!(normalized("DO $a$ DELETE FROM t; $b$ $$ $a$"), "DO $1");
        assert_eq!(
            normalized("a = 'it''s' AND \"5\" = 'é' AND U&\"6\" = 'x'"),
            "a = $1 AND \"5\" = $2 AND U&\"6\" = $3"
        );
        assert_eq!(
            normalized("SELECT interval '1 day', t.a, x[1:2], f(1,2)"),
            "SELECT interval $1, t.a, x[$2:$3], f($4,$5)"
        );
    }

    #[test]
    fn a_constant_goes_on_after_a_line() {
        assert_eq!(normalized("a = E'x'\n  '\\'secret' AND b = 1"), "a = $1 AND b = $2");
        assert_eq!(normalized("a = 'x' -- that's it\n 'y', 2"), "a = $1, $2");
        assert_eq!(normalized("a = 'x' 'y'"), "a = $1 $2");
        assert_eq!(normalized("a = 'x'\n, 'y'"), "a = $1\n, $2");
    }

    #[test]
    fn comments_are_left_out() {
        assert_eq!(normalized("/* of 'anna' */ DELETE/* 5 */FROM t -- 'x"), "DELETE FROM t");
    }

    #[test]
    fn only_blanks_of_postgresqls_own_go() {
        let others = "\u{85}\u{a0}\u{1680}\u{2000}\u{200a}\u{2028}\u{2029}\u{202f}\u{205f}\u{3000}";
        for other in others.chars() {
            let text = format!("{other}a{other}");
            assert_eq!(trim(&format!(" \t\n\r\u{b}\u{c}{text} \n")), text);
            assert_eq!(
                normalized(&format!("DELETE FROM t WHERE NOT flag{other}")),
                format!("DELETE FROM t WHERE NOT flag{other}")
            );
        }
    }

    #[test]
    fn backslashes_escape_where_they_are_said_to() {
        assert_eq!(without_constants(r"a = 'x\' AND b = ' OR c = 1", true), "a = $1 OR c = $2");
        assert_eq!(without_constants(r"a = 'x\' AND b = 1", false), "a = $1 AND b = $2");
    }

    #[test]
    fn the_highest_parameter_is_found() {
        assert_eq!(highest_parameter("a = $2 AND b = '$7' AND c$9 = $1", false), 2);
        assert_eq!(highest_parameter("a = 1", false), 0);
    }

    proptest! {
        #[test]
        fn pieces_make_up_the_text(text in "[-/*'\"$;aeuU&.+019\\\\ \né]{0,30}", backslashes: bool) {
            let mut end = 0;
            for (_, range) in pieces(text.as_bytes(), backslashes) {
                prop_assert_eq!(range.start, end);
                prop_assert!(range.end > range.start);
                end = range.end;
            }
            prop_assert_eq!(end, text.len());
        }

        #[test]
        fn no_constant_is_left(text in "[-/*'$;aeuU&.+019\\\\ \né]{0,30}", backslashes: bool) {
            let left = without_constants(&text, backslashes);
            prop_assert!(!left.contains('\''), "{}", left);
        }
    }
}

//! The client's statement as tokens know it, and its hash.
//!
//! Pure. The hash is the SHA-256 of the statement's text without surrounding blanks and final semicolon; each
//! parameter adds a zero byte and then `n` for NULL, or `v` and its text. Without parameters it is what `sha256sum`
//! says of the text. Bytes that are no letters (see `pg::stray`) count as they are.

use sha2::{Digest, Sha256};

use crate::lexer::bounds;

/// The text without surrounding blanks and final semicolons.
pub fn normalize(text: &str) -> &str {
    text.get(bounds(text.as_bytes())).unwrap_or_default()
}

/// SHA-256 in lower-case hexadecimal.
pub fn sha256(bytes: &[u8]) -> String {
    base16ct::lower::encode_string(&Sha256::digest(bytes))
}

/// The hash of a statement and its parameters, which are given in parts, one after the other, in UTF-8: nobody has to hold
/// all of a long text at once.
#[derive(Default)]
pub struct StatementHash(Sha256);

impl StatementHash {
    /// A part of the statement's text, which is normalized, or of the value that was begun last.
    pub fn text(&mut self, part: &[u8]) {
        self.0.update(part);
    }

    /// The next parameter, which is NULL.
    pub fn null(&mut self) {
        self.0.update(b"\0n");
    }

    /// The next parameter, whose text follows.
    pub fn value(&mut self) {
        self.0.update(b"\0v");
    }

    /// The hash, in lower-case hexadecimal.
    pub fn finish(self) -> String {
        base16ct::lower::encode_string(&self.0.finalize())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::lexer::start_of;

    fn statement_hash(text: &str, parameters: &[Option<String>]) -> String {
        let mut hash = StatementHash::default();
        hash.text(normalize(text).as_bytes());
        for parameter in parameters {
            match parameter {
                None => hash.null(),
                Some(text) => {
                    hash.value();
                    hash.text(text.as_bytes());
                }
            }
        }
        hash.finish()
    }

    #[test]
    fn only_blanks_of_the_parser_are_blanks() {
        assert_eq!(normalize(" \t\n;SELECT 1 ; ;\n"), ";SELECT 1");
        assert_eq!(normalize("\u{a0}SELECT 1\u{3000}"), "\u{a0}SELECT 1\u{3000}");
        assert_eq!(normalize(" ; "), "");
        assert_eq!(normalize(""), "");
    }

    #[test]
    fn a_statement_without_parameters_hashes_as_its_text() {
        // printf 'SELECT 1' | sha256sum
        let known = "e004ebd5b5532a4b85984a62f8ad48a81aa3460c1ca07701f386135d72cdecf5";
        assert_eq!(statement_hash(" SELECT 1 ;\n", &[]), known);
        assert_eq!(statement_hash("SELECT 1;;", &[]), known);
    }

    /// The text from where it begins, of the statement that begins with X.
    fn of_x(string: &str) -> &str {
        &string[start_of(string.as_bytes(), string.find('X').unwrap(), false)..]
    }

    #[test]
    fn comments_before_a_statement_are_its_own() {
        assert_eq!(of_x("X"), "X");
        assert_eq!(of_x("\n  X"), "X");
        assert_eq!(of_x("/* a */ -- b;\n X"), "/* a */ -- b;\n X");
        assert_eq!(of_x("SELECT 1;/* a /* nested; */ */ X"), "/* a /* nested; */ */ X");
        assert_eq!(of_x("SELECT 1; X"), "X");
        assert_eq!(of_x("SELECT 1 /* a */; X"), " X");
        assert_eq!(of_x("SELECT 1; -- it's\nX"), " -- it's\nX");
    }

    #[test]
    fn what_looks_like_a_comment_and_is_none() {
        assert_eq!(of_x("SELECT '/* ;'; X"), " X");
        assert_eq!(of_x("SELECT 'it''s /* ', E'\\'/*'; X"), " X");
        assert_eq!(of_x("SELECT \"a\"\"--\"; X"), " X");
        assert_eq!(of_x("SELECT $$ -- ; $$; X"), " X");
        assert_eq!(of_x("SELECT $a$ /* $b$ $$ $a$; X"), " X");
        assert_eq!(of_x("SELECT $1, a$b$c, '--'; X"), " X");
        assert_eq!(of_x("SELECT 1 - -1, 4 / 2 -- $$\n; X"), " X");
        // A backslash is a letter like any other, unless the server was told otherwise.
        let string = r"SELECT '\'; /* '; */ X";
        assert_eq!(start_of(string.as_bytes(), string.len() - 1, false), 11);
        let string = r"SELECT '\'--'; X";
        assert_eq!(start_of(string.as_bytes(), string.len() - 1, true), 14);
    }

    #[test]
    fn null_is_not_the_letter_n_and_not_nothing() {
        let hashes = [
            statement_hash("a", &[]),
            statement_hash("a", &[None]),
            statement_hash("a", &[Some(String::new())]),
            statement_hash("a", &[Some("n".into())]),
        ];
        for (index, hash) in hashes.iter().enumerate() {
            assert!(!hashes[index + 1..].contains(hash));
        }
    }

    proptest! {
        #[test]
        fn a_start_is_found_in_any_string(string in "[-/*'\"$;a1\\\\ \né]{0,30}", backslashes: bool) {
            let bytes = string.as_bytes();
            for at in 0..=bytes.len() + 1 {
                prop_assert!(start_of(bytes, at, backslashes) <= at.min(bytes.len()));
            }
        }

        #[test]
        fn normalizing_twice_changes_nothing(text in ".{0,40}") {
            prop_assert_eq!(normalize(normalize(&text)), normalize(&text));
        }

        #[test]
        fn parameters_cannot_be_shifted(
            a in "[^\0]{0,5}", b in "[^\0]{0,5}", c in "[^\0]{0,5}", d in "[^\0]{0,5}"
        ) {
            let one = statement_hash("s", &[Some(a.clone()), Some(b.clone())]);
            let other = statement_hash("s", &[Some(c.clone()), Some(d.clone())]);
            prop_assert_eq!(one == other, a == c && b == d);
        }
    }
}

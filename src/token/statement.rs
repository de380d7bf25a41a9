//! The client's statement as tokens know it, and its hash.
//!
//! Pure. The hash is the SHA-256 of the statement's text without surrounding blanks and final semicolon; each
//! parameter adds a zero byte and then `n` for NULL, or `v` and its text. Without parameters it is what `sha256sum`
//! says of the text.

use sha2::{Digest, Sha256};

/// The text without surrounding blanks and final semicolons.
pub fn normalize(text: &str) -> &str {
    let mut text = text.trim();
    while let Some(shorter) = text.strip_suffix(';') {
        text = shorter.trim_end();
    }
    text
}

/// SHA-256 in lower-case hexadecimal.
pub fn sha256(bytes: &[u8]) -> String {
    base16ct::lower::encode_string(&Sha256::digest(bytes))
}

/// The hash of a statement and its parameters, in lower-case hexadecimal.
pub fn statement_hash(text: &str, parameters: &[Option<String>]) -> String {
    let mut bytes = normalize(text).as_bytes().to_vec();
    for parameter in parameters {
        bytes.push(0);
        match parameter {
            None => bytes.push(b'n'),
            Some(text) => {
                bytes.push(b'v');
                bytes.extend_from_slice(text.as_bytes());
            }
        }
    }
    sha256(&bytes)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_statement_without_parameters_hashes_as_its_text() {
        // printf 'SELECT 1' | sha256sum
        let known = "e004ebd5b5532a4b85984a62f8ad48a81aa3460c1ca07701f386135d72cdecf5";
        assert_eq!(statement_hash(" SELECT 1 ;\n", &[]), known);
        assert_eq!(statement_hash("SELECT 1;;", &[]), known);
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

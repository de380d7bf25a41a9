//! Bytes that are no letters, inside Rust's strings, and what is shown for them.
//!
//! A byte that cannot be converted to UTF-8 is a *stray*: inside a string it is a character of a private range, one for
//! each byte, so that the text can go back to exactly the same bytes. Where text is only shown, a stray is `\x81`.

use super::reserve;

/// The character that stands for byte 0.
const FIRST: u32 = 0x10_F800;

/// The character that stands for a byte beyond ASCII.
pub fn of_byte(byte: u8) -> char {
    char::from_u32(FIRST + u32::from(byte)).unwrap_or(char::REPLACEMENT_CHARACTER)
}

/// The byte that a character stands for; none for a letter.
pub fn byte(letter: char) -> Option<u8> {
    let byte = u8::try_from(u32::from(letter).checked_sub(FIRST)?).ok()?;
    (!byte.is_ascii()).then_some(byte)
}

/// Whether any character of a text is a stray.
pub fn is_in(text: &str) -> bool {
    // How the UTF-8 of all of them begins.
    text.as_bytes().windows(2).any(|two| two == [0xf4, 0x8f]) && text.chars().any(|letter| byte(letter).is_some())
}

/// Where a text with escapes stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Escape {
    /// On its own: `\x81`.
    Plain,
    /// Inside a JSON string, where a backslash is written twice.
    Json,
}

/// A buffer that text of any size goes into: where there is no memory for it, that is PostgreSQL's ordinary error.
pub trait Sink {
    fn put(&mut self, text: &str);
}

impl Sink for String {
    fn put(&mut self, text: &str) {
        if self.try_reserve(text.len()).is_err() || reserve::is_low() {
            out_of_memory();
        }
        self.push_str(text);
    }
}

/// The same for bytes.
pub fn put_bytes(buffer: &mut Vec<u8>, bytes: &[u8]) {
    if buffer.try_reserve(bytes.len()).is_err() || reserve::is_low() {
        out_of_memory();
    }
    buffer.extend_from_slice(bytes);
}

/// There is no memory for a text. Thrown to the guard around us, which makes PostgreSQL's ordinary error of it.
#[derive(Debug)]
pub struct OutOfMemory;

/// Throws [`OutOfMemory`].
#[cold]
pub fn out_of_memory() -> ! {
    std::panic::panic_any(OutOfMemory)
}

/// Strays for all of `bytes` beyond ASCII.
pub fn put_strays(into: &mut String, bytes: &[u8]) {
    for byte in bytes {
        let letter = if byte.is_ascii() { char::from(*byte) } else { of_byte(*byte) };
        into.put(letter.encode_utf8(&mut [0; 4]));
    }
}

/// `\x81` for each of `bytes`.
pub fn put_shown(escape: Escape, bytes: &[u8], mut put: impl FnMut(&str)) {
    for byte in bytes {
        put(match escape {
            Escape::Plain => "\\x",
            Escape::Json => "\\\\x",
        });
        let digit = |value: u8| char::from_digit(u32::from(value), 16).unwrap_or('0');
        put(digit(byte >> 4).encode_utf8(&mut [0; 4]));
        put(digit(byte & 15).encode_utf8(&mut [0; 4]));
    }
}

/// A letter that is not to be had: our own ellipsis in ASCII, any other one by its bytes in UTF-8.
pub fn put_unavailable(escape: Escape, letter: char, mut put: impl FnMut(&str)) {
    match (letter, byte(letter)) {
        ('…', _) => put("..."),
        (_, Some(byte)) => put_shown(escape, &[byte], put),
        (_, None) => put_shown(escape, letter.encode_utf8(&mut [0; 4]).as_bytes(), put),
    }
}

/// Whether a text has what could be an escape.
pub fn has_escape(text: &str) -> bool {
    let is_digit = |byte: &u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
    text.as_bytes().windows(4).any(|part| part.starts_with(b"\\x") && part[2..].iter().all(is_digit))
}

/// Bytes of which nobody says what encoding they are in: what is UTF-8 is taken as such, the rest is stray. So is UTF-8 for
/// one of our own characters, or two different texts would be the same string.
pub fn from_unknown(bytes: &[u8]) -> String {
    let mut text = String::new();
    for chunk in bytes.utf8_chunks() {
        if is_in(chunk.valid()) {
            let mut rest = chunk.valid();
            while let Some((at, letter)) = rest.char_indices().find(|(_, letter)| byte(*letter).is_some()) {
                text.put(&rest[..at]);
                put_strays(&mut text, letter.encode_utf8(&mut [0; 4]).as_bytes());
                rest = &rest[at + letter.len_utf8()..];
            }
            text.put(rest);
        } else {
            text.put(chunk.valid());
        }
        put_strays(&mut text, chunk.invalid());
    }
    text
}

/// The bytes again.
pub fn to_unknown(text: &str, mut put: impl FnMut(&[u8])) {
    let mut rest = text;
    if is_in(text) {
        while let Some((at, letter)) = rest.char_indices().find(|(_, letter)| byte(*letter).is_some()) {
            put(&rest.as_bytes()[..at]);
            put(byte(letter).as_slice());
            rest = &rest[at + letter.len_utf8()..];
        }
    }
    put(rest.as_bytes());
}

/// Bytes that should be UTF-8 and may not be, which cannot go back: what is no letter is `\x81` from now on.
pub fn from_damaged_utf8(bytes: &[u8]) -> String {
    let mut text = String::new();
    for chunk in bytes.utf8_chunks() {
        text.put(chunk.valid());
        put_shown(Escape::Plain, chunk.invalid(), |shown| text.put(shown));
    }
    text
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn bytes_of(text: &str) -> Vec<u8> {
        let mut bytes = Vec::new();
        to_unknown(text, |more| bytes.extend_from_slice(more));
        bytes
    }

    #[test]
    fn a_stray_is_no_letter_and_a_letter_no_stray() {
        for number in 0..=u8::MAX {
            assert_eq!(byte(of_byte(number)), (!number.is_ascii()).then_some(number));
        }
        assert_eq!(byte('ü'), None);
        assert_eq!(byte('\u{10ffff}'), None);
        assert_eq!(byte('\u{10f87f}'), None);
    }

    #[test]
    fn what_cannot_be_shown_is_shown_as_bytes() {
        let shown = |escape, letter| {
            let mut text = String::new();
            put_unavailable(escape, letter, |more| text.push_str(more));
            text
        };
        assert_eq!(shown(Escape::Plain, '€'), r"\xe2\x82\xac");
        assert_eq!(shown(Escape::Plain, of_byte(0x81)), r"\x81");
        assert_eq!(shown(Escape::Json, of_byte(0x81)), r"\\x81");
        assert_eq!(shown(Escape::Json, '…'), "...");
        assert!(has_escape(r"a\x81") && !has_escape(r"\x8") && !has_escape(r"\xg1 \X81"));
        assert_eq!(from_damaged_utf8(b"a\xe9b\xc3\xbc\xf4\x8f"), "a\\xe9bü\\xf4\\x8f");
    }

    #[test]
    fn our_own_characters_do_not_come_in_from_outside() {
        let one = "\u{10f881}";
        assert_ne!(from_unknown(one.as_bytes()), one);
        assert_eq!(bytes_of(&from_unknown(one.as_bytes())), one.as_bytes());
        assert_eq!(from_unknown(&[0x81]), one);
    }

    proptest! {
        #[test]
        fn bytes_come_back(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            prop_assert_eq!(bytes_of(&from_unknown(&bytes)), bytes);
        }

        #[test]
        fn text_with_anything_in_it_comes_back(text in "[aü€\u{10f87f}-\u{10f8ff}\u{10ffff}]{0,20}") {
            prop_assert_eq!(bytes_of(&from_unknown(text.as_bytes())), text.as_bytes());
        }

        #[test]
        fn different_bytes_are_different_text(
            one in prop::collection::vec(any::<u8>(), 0..4), other in prop::collection::vec(any::<u8>(), 0..4)
        ) {
            prop_assert_eq!(one == other, from_unknown(&one) == from_unknown(&other));
        }
    }
}

//! Characters by which a text can pose as another one to whoever reads it: some are not seen, some turn what follows around,
//! some move a terminal's cursor. For a reviewer they are escapes.
//!
//! Pure. The list is that of Unicode's category Cf with what else has no ink of its own: fillers, variation selectors, and
//! separators of lines and paragraphs. Letters that look like others (homoglyphs) are letters all the same, and stay.

use std::borrow::Cow;
use std::fmt::Write;

/// Whether a character is not seen as what it is. New lines and tabs are.
pub fn is_disguise(letter: char) -> bool {
    matches!(letter,
        '\u{0}'..='\u{8}' | '\u{b}'..='\u{1f}' | '\u{7f}'..='\u{9f}'
        | '\u{ad}' | '\u{34f}' | '\u{600}'..='\u{605}' | '\u{61c}' | '\u{6dd}' | '\u{70f}' | '\u{890}' | '\u{891}'
        | '\u{8e2}' | '\u{115f}' | '\u{1160}' | '\u{17b4}' | '\u{17b5}' | '\u{180b}'..='\u{180f}'
        | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{3164}'
        | '\u{fe00}'..='\u{fe0f}' | '\u{feff}' | '\u{ffa0}' | '\u{fff0}'..='\u{fffb}'
        | '\u{110bd}' | '\u{110cd}' | '\u{13430}'..='\u{1343f}' | '\u{1bca0}'..='\u{1bca3}'
        | '\u{1d173}'..='\u{1d17a}' | '\u{e0000}'..='\u{e0fff}')
}

/// The text with `\u202e`, or `\U000e0041`, for each such character.
pub fn undisguised(text: &str) -> Cow<'_, str> {
    if !text.chars().any(is_disguise) {
        return Cow::Borrowed(text);
    }
    let mut shown = String::with_capacity(text.len() + 16);
    for letter in text.chars() {
        if is_disguise(letter) {
            put_escape(&mut shown, "\\", letter);
        } else {
            shown.push(letter);
        }
    }
    Cow::Owned(shown)
}

/// The same of JSON, where a backslash is written twice, and where some of these characters are escapes already, which whoever
/// takes a value out of it would have as themselves again.
pub fn undisguised_json(json: &str) -> Cow<'_, str> {
    if !json.chars().any(is_disguise) && !json.contains('\\') {
        return Cow::Borrowed(json);
    }
    let mut shown = String::with_capacity(json.len() + 16);
    let mut rest = json.chars();
    while let Some(letter) = rest.next() {
        if letter != '\\' {
            if is_disguise(letter) {
                put_escape(&mut shown, "\\\\", letter);
            } else {
                shown.push(letter);
            }
            continue;
        }
        let escaped = match rest.clone().next() {
            Some('u') => {
                let digits: String = rest.clone().skip(1).take(4).collect();
                u32::from_str_radix(&digits, 16).ok().and_then(char::from_u32).map(|letter| (letter, 5))
            }
            Some('b') => Some(('\u{8}', 1)),
            Some('f') => Some(('\u{c}', 1)),
            Some('r') => Some(('\r', 1)),
            _ => None,
        };
        match escaped.filter(|(letter, _)| is_disguise(*letter)) {
            Some((letter, length)) => {
                put_escape(&mut shown, "\\\\", letter);
                rest.nth(length - 1);
            }
            None => {
                shown.push('\\');
                shown.extend(rest.next());
            }
        }
    }
    Cow::Owned(shown)
}

fn put_escape(shown: &mut String, backslash: &str, letter: char) {
    let number = u32::from(letter);
    // A String takes whatever is written to it.
    let _ = if number > 0xffff {
        write!(shown, "{backslash}U{number:08x}")
    } else {
        write!(shown, "{backslash}u{number:04x}")
    };
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_is_not_seen_is_an_escape() {
        assert_eq!(
            undisguised("UPDATE t\u{202e} SET\u{200b} v\r = 1\u{1b}[2J"),
            r"UPDATE t\u202e SET\u200b v\u000d = 1\u001b[2J"
        );
        assert_eq!(undisguised("a\u{e0041}"), r"a\U000e0041");
        assert_eq!(undisguised_json("{\"a\u{2066}\": 1}"), "{\"a\\\\u2066\": 1}");
    }

    #[test]
    fn escapes_in_json_stay_escapes_when_a_value_is_taken_out() {
        for (json, shown) in [
            (r#"{"a": "x\u001by\r"}"#, r#"{"a": "x\\u001by\\u000d"}"#),
            (r#""\\u001b \\ \" \n \t é""#, r#""\\u001b \\ \" \n \t é""#),
            (r#""\u202E""#, r#""\\u202e""#),
        ] {
            assert_eq!(undisguised_json(json), shown);
        }
    }

    #[test]
    fn what_people_write_stays() {
        for text in ["UPDATE t\n\tSET v = 1;", "grün", "日本語", "naïve — “quoted”", "مرحبا", "a\u{a0}b", "👍"]
        {
            assert!(matches!(undisguised(text), Cow::Borrowed(same) if same == text), "{text}");
        }
    }

    proptest! {
        #[test]
        fn nothing_is_left_in_disguise(text in any::<String>()) {
            prop_assert!(!undisguised(&text).chars().any(is_disguise));
        }
    }
}

//! Qualified table names as a token writes them.
//!
//! Pure.

use crate::words::RelationName;

/// Reads `schema.table`: two SQL identifiers, folded unless quoted.
pub fn qualified_name(text: &str) -> Option<RelationName> {
    fn identifier(text: &str) -> Option<(String, &str)> {
        let Some(quoted) = text.strip_prefix('"') else {
            let end = text.find('.').unwrap_or(text.len());
            let (name, rest) = text.split_at(end);
            let is_start = |letter: char| letter.is_ascii_alphabetic() || letter == '_' || !letter.is_ascii();
            let is_part = |letter: char| is_start(letter) || letter.is_ascii_digit() || letter == '$';
            let sound = name.starts_with(is_start) && name.chars().all(is_part);
            return sound.then(|| (name.to_ascii_lowercase(), rest));
        };
        let mut name = String::new();
        let mut rest = quoted;
        loop {
            let end = rest.find('"')?;
            name.push_str(&rest[..end]);
            rest = &rest[end + 1..];
            match rest.strip_prefix('"') {
                Some(more) => {
                    name.push('"');
                    rest = more;
                }
                None => return (!name.is_empty()).then_some((name, rest)),
            }
        }
    }
    if text.chars().any(char::is_control) {
        return None;
    }
    let (schema, rest) = identifier(text)?;
    let (name, rest) = identifier(rest.strip_prefix('.')?)?;
    rest.is_empty().then(|| RelationName::new(schema, name))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_name_reads_back(schema in "[^\\pC]{1,8}", name in "[^\\pC]{1,8}") {
            let relation = RelationName::new(schema, name);
            prop_assert_eq!(qualified_name(&relation.to_sql()), Some(relation));
        }
    }
}

//! The names that a policy covers: `schema.table`, SQL identifiers with `*` as wildcard outside quotes.
//!
//! Pure. Names, not OIDs, so that a table which is swapped in under the name is covered at once.

use core::fmt;

use crate::error::Error;
use crate::words::{RelationName, is_plain, quote_identifier};

/// A piece of an identifier: letters to match as they are, or any number of any letters.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Piece {
    Literal(String),
    Any,
}

/// One identifier, folded as SQL folds it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Part(Vec<Piece>);

/// A qualified name, possibly with wildcards.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Pattern {
    schema: Part,
    name: Part,
}

/// What a caller may write as an element of a policy's tables.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Element {
    /// `schema.table`, with or without wildcards.
    Qualified(Pattern),
    /// `table` alone: to be resolved through the search_path.
    Unqualified(String),
}

/// How closely a pattern fits a relation; the greater is the more specific.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fit {
    /// `*` somewhere in the schema.
    Pattern,
    /// The schema is literal, the name is not.
    PatternInSchema,
    /// The exact name of an ancestor; the nearest ancestor is the most specific.
    Ancestor(core::cmp::Reverse<u32>),
    /// The relation's own exact name.
    Own,
}

impl Part {
    fn literal(&self) -> Option<&str> {
        match self.0.as_slice() {
            [Piece::Literal(text)] => Some(text),
            _ => None,
        }
    }

    fn matches(&self, text: &str) -> bool {
        fn from(pieces: &[Piece], text: &str) -> bool {
            match pieces {
                [] => text.is_empty(),
                [Piece::Literal(literal), rest @ ..] => {
                    text.strip_prefix(literal.as_str()).is_some_and(|text| from(rest, text))
                }
                [Piece::Any] => true,
                [Piece::Any, Piece::Literal(literal), rest @ ..] => {
                    text.match_indices(literal.as_str()).any(|(at, _)| from(rest, &text[at + literal.len()..]))
                }
                // Two wildcards in a row are one; the parser does not make them.
                [Piece::Any, rest @ ..] => from(rest, text),
            }
        }
        from(&self.0, text)
    }
}

/// Reads one identifier from the front of `text`; gives it and what follows it.
fn part(text: &str) -> Option<(Part, &str)> {
    let mut pieces: Vec<Piece> = Vec::new();
    let mut push = |text: &str| match pieces.last_mut() {
        Some(Piece::Literal(literal)) => literal.push_str(text),
        _ => pieces.push(Piece::Literal(text.to_owned())),
    };
    let mut rest = text;
    let mut wildcards = Vec::new();
    let mut empty = true;
    while let Some(letter) = rest.chars().next() {
        let after = &rest[letter.len_utf8()..];
        match letter {
            '"' => {
                let mut quoted = String::new();
                let mut inside = after;
                rest = loop {
                    let end = inside.find('"')?;
                    quoted.push_str(&inside[..end]);
                    match inside[end + 1..].strip_prefix('"') {
                        Some(more) => {
                            quoted.push('"');
                            inside = more;
                        }
                        None => break &inside[end + 1..],
                    }
                };
                if quoted.is_empty() {
                    return None;
                }
                push(&quoted);
            }
            '*' => {
                // A mark that no identifier can hold stands for the wildcard until all letters are read.
                push("\0");
                wildcards.push(());
                rest = after;
            }
            'A'..='Z' => {
                push(letter.to_ascii_lowercase().encode_utf8(&mut [0; 4]));
                rest = after;
            }
            'a'..='z' | '_' => {
                push(letter.encode_utf8(&mut [0; 4]));
                rest = after;
            }
            '0'..='9' | '$' if !empty => {
                push(letter.encode_utf8(&mut [0; 4]));
                rest = after;
            }
            other if !other.is_ascii() => {
                push(letter.encode_utf8(&mut [0; 4]));
                rest = after;
            }
            _ => break,
        }
        empty = false;
    }
    if empty {
        return None;
    }
    let Some(Piece::Literal(letters)) = pieces.first() else {
        return None;
    };
    let mut pieces = Vec::new();
    for (index, literal) in letters.split('\0').enumerate() {
        if index > 0 && pieces.last() != Some(&Piece::Any) {
            pieces.push(Piece::Any);
        }
        if !literal.is_empty() {
            pieces.push(Piece::Literal(literal.to_owned()));
        }
    }
    Some((Part(pieces), rest))
}

/// Reads an element of a policy's `tables`.
///
/// # Errors
/// WG007 for what is neither a name nor a pattern, and for a wildcard without a schema.
pub fn parse_element(text: &str) -> Result<Element, Error> {
    let wrong = |hint: &str| Error::invalid(format!("\"{text}\" is not a table name or pattern"), hint.to_owned());
    let example = "tables => '{public.orders}' (schema.table, * as wildcard)";
    if text.contains('\0') {
        return Err(wrong(example));
    }
    let (first, rest) = part(text.trim()).ok_or_else(|| wrong(example))?;
    if rest.is_empty() {
        return match first.literal() {
            Some(name) => Ok(Element::Unqualified(name.to_owned())),
            None => Err(wrong(&format!("tables => '{{*.{}}}' (a pattern has a schema)", text.trim()))),
        };
    }
    let rest = rest.strip_prefix('.').ok_or_else(|| wrong(example))?;
    match part(rest) {
        Some((name, "")) => Ok(Element::Qualified(Pattern { schema: first, name })),
        _ => Err(wrong(example)),
    }
}

impl Pattern {
    /// Reads `schema.table`.
    ///
    /// # Errors
    /// WG007, also for a name without a schema.
    pub fn parse(text: &str) -> Result<Self, Error> {
        match parse_element(text)? {
            Element::Qualified(pattern) => Ok(pattern),
            Element::Unqualified(_) => {
                Err(Error::invalid(format!("\"{text}\" has no schema"), format!("tables => '{{public.{text}}}'")))
            }
        }
    }

    /// The one relation that this names, where it has no wildcard.
    pub fn exact(&self) -> Option<RelationName> {
        Some(RelationName::new(self.schema.literal()?, self.name.literal()?))
    }

    fn matches(&self, name: &RelationName) -> bool {
        self.schema.matches(&name.schema) && self.name.matches(&name.name)
    }

    /// How closely this fits a relation with the given name and ancestors (with their distance, 1 for a parent).
    pub fn fit(&self, name: &RelationName, ancestors: &[(RelationName, u32)]) -> Option<Fit> {
        if self.exact().is_some() {
            if self.matches(name) {
                return Some(Fit::Own);
            }
            let nearest =
                ancestors.iter().filter(|(name, _)| self.matches(name)).map(|(_, distance)| *distance).min()?;
            return Some(Fit::Ancestor(core::cmp::Reverse(nearest)));
        }
        (self.matches(name) || ancestors.iter().any(|(name, _)| self.matches(name)))
            .then_some(if self.schema.literal().is_some() { Fit::PatternInSchema } else { Fit::Pattern })
    }
}

impl fmt::Display for Pattern {
    /// The stored form: qualified, folded, quoted only where it must be.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, part) in [&self.schema, &self.name].into_iter().enumerate() {
            if index > 0 {
                f.write_str(".")?;
            }
            for (index, piece) in part.0.iter().enumerate() {
                match piece {
                    Piece::Any => f.write_str("*")?,
                    // After a wildcard a digit may lead.
                    Piece::Literal(text) if index > 0 && text.chars().all(is_plain) => f.write_str(text)?,
                    Piece::Literal(text) => f.write_str(&quote_identifier(text))?,
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn fit(pattern: &str, schema: &str, name: &str) -> Option<Fit> {
        Pattern::parse(pattern).unwrap().fit(&RelationName::new(schema, name), &[])
    }

    #[test]
    fn identifiers_fold_unless_quoted() {
        assert_eq!(fit("Public.Orders", "public", "orders"), Some(Fit::Own));
        assert_eq!(fit("public.\"Orders\"", "public", "Orders"), Some(Fit::Own));
        assert_eq!(fit("public.\"Orders\"", "public", "orders"), None);
        assert_eq!(fit("public.\"a\"\"b\"", "public", "a\"b"), Some(Fit::Own));
    }

    #[test]
    fn the_wildcard_counts_outside_quotes_only() {
        assert_eq!(fit("public.\"a*\"", "public", "a*"), Some(Fit::Own));
        assert_eq!(fit("public.\"a*\"", "public", "ab"), None);
        assert_eq!(fit("public.a*", "public", "ab"), Some(Fit::PatternInSchema));
        assert_eq!(fit("public.*_archive", "public", "orders_archive"), Some(Fit::PatternInSchema));
        assert_eq!(fit("public.*_archive", "public", "orders"), None);
        assert_eq!(fit("*.orders", "sales", "orders"), Some(Fit::Pattern));
        assert_eq!(fit("*.*", "x", "y"), Some(Fit::Pattern));
        assert_eq!(fit("public.*a*a", "public", "aa"), Some(Fit::PatternInSchema));
        assert_eq!(fit("public.*a*a", "public", "a"), None);
    }

    #[test]
    fn the_nearest_ancestor_counts() {
        let ancestors = [(RelationName::new("public", "mid"), 1), (RelationName::new("public", "root"), 2)];
        let leaf = RelationName::new("public", "leaf");
        let fit = |pattern: &str| Pattern::parse(pattern).unwrap().fit(&leaf, &ancestors);
        assert!(fit("public.leaf") > fit("public.mid"));
        assert!(fit("public.mid") > fit("public.root"));
        assert!(fit("public.root") > fit("public.r*"));
        assert!(fit("public.r*") > fit("*.root"));
        assert!(fit("*.root").is_some());
    }

    #[test]
    fn what_is_no_name_is_refused() {
        for text in ["", " ", "a.b.c", "a.", ".b", "a b", "1a.b", "\"a.b", "a..b", "a-b.c", "\"\".a", "orders_*", "*"] {
            let error = parse_element(text).unwrap_err();
            assert_eq!(error.sqlstate(), "WG007", "{text}");
        }
        assert_eq!(parse_element("Orders").unwrap(), Element::Unqualified("orders".into()));
    }

    proptest! {
        #[test]
        fn the_stored_form_is_read_back(text in "[a-zA-Z*\"$._0-9äß -]{1,12}") {
            if let Ok(Element::Qualified(pattern)) = parse_element(&text) {
                prop_assert_eq!(Pattern::parse(&pattern.to_string()).unwrap(), pattern);
            }
        }

        #[test]
        fn a_quoted_name_covers_itself_only(schema in "[^\0]{1,8}", name in "[^\0]{1,8}", other in "[^\0]{1,8}") {
            let relation = RelationName::new(schema.clone(), name.clone());
            let quoted = format!("\"{}\".\"{}\"", schema.replace('"', "\"\""), name.replace('"', "\"\""));
            let pattern = Pattern::parse(&quoted).unwrap();
            prop_assert_eq!(pattern.fit(&relation, &[]), Some(Fit::Own));
            let fits_other = pattern.fit(&RelationName::new(schema, other.clone()), &[]).is_some();
            prop_assert_eq!(fits_other, other == name);
        }

        #[test]
        fn parsing_never_panics(text in ".{0,24}") {
            let _ = parse_element(&text);
        }
    }
}

//! The names that a policy covers: `schema.table`, SQL identifiers with `*` as wildcard outside quotes.
//!
//! Pure. Names, not OIDs, so that a table which is swapped in under the name is covered at once.

use core::fmt;

use crate::error::Error;
use crate::lexer::trim;
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
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
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

    /// What stands before the first wildcard and after the last one has its place; of what stands between two, the first
    /// occurrence leaves the most room for the rest. So no choice is ever taken back, and the time is that of reading
    /// both texts once.
    fn matches(&self, text: &str) -> bool {
        let mut pieces = self.0.as_slice();
        let mut rest = text;
        if let [Piece::Literal(first), others @ ..] = pieces {
            let Some(after) = rest.strip_prefix(first.as_str()) else { return false };
            (pieces, rest) = (others, after);
            if pieces.is_empty() {
                return rest.is_empty();
            }
        }
        if let [others @ .., Piece::Literal(last)] = pieces {
            let Some(before) = rest.strip_suffix(last.as_str()) else { return false };
            (pieces, rest) = (others, before);
        }
        for piece in pieces {
            if let Piece::Literal(literal) = piece {
                let Some(at) = rest.find(literal.as_str()) else { return false };
                rest = &rest[at + literal.len()..];
            }
        }
        true
    }
}

/// Adds a letter or more to what was read of an identifier.
fn push(pieces: &mut Vec<Piece>, text: &str) {
    match pieces.last_mut() {
        Some(Piece::Literal(literal)) => literal.push_str(text),
        _ => pieces.push(Piece::Literal(text.to_owned())),
    }
}

/// Reads one identifier from the front of `text`; gives it and what follows it.
fn part(text: &str) -> Option<(Part, &str)> {
    let mut pieces: Vec<Piece> = Vec::new();
    let mut rest = text;
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
                push(&mut pieces, &quoted);
                continue;
            }
            // Several in a row are one.
            '*' if pieces.last() == Some(&Piece::Any) => {}
            '*' => pieces.push(Piece::Any),
            '0'..='9' | '$' if pieces.is_empty() => return None,
            'A'..='Z' | 'a'..='z' | '_' | '0'..='9' | '$' => {
                push(&mut pieces, letter.to_ascii_lowercase().encode_utf8(&mut [0; 4]));
            }
            other if !other.is_ascii() => push(&mut pieces, other.encode_utf8(&mut [0; 4])),
            _ => break,
        }
        rest = after;
    }
    (!pieces.is_empty()).then_some((Part(pieces), rest))
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
    let (first, rest) = part(trim(text)).ok_or_else(|| wrong(example))?;
    if rest.is_empty() {
        return match first.literal() {
            Some(name) => Ok(Element::Unqualified(name.to_owned())),
            None => Err(wrong(&format!("tables => '{{*.{}}}' (a pattern has a schema)", trim(text)))),
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

    /// The schema of all that it can match, where that has no wildcard.
    pub fn schema(&self) -> Option<&str> {
        self.schema.literal()
    }

    fn is_exact(&self) -> bool {
        self.schema.literal().is_some() && self.name.literal().is_some()
    }

    fn matches(&self, name: &RelationName) -> bool {
        self.schema.matches(&name.schema) && self.name.matches(&name.name)
    }

    /// How closely this fits a relation with the given name and ancestors (with their distance, 1 for a parent).
    pub fn fit(&self, name: &RelationName, ancestors: &[(RelationName, u32)]) -> Option<Fit> {
        if self.is_exact() {
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
    fn only_blanks_of_postgresql_stand_around_a_name() {
        let exact = |text: &str| match parse_element(text) {
            Ok(Element::Qualified(pattern)) => pattern.exact().map(|name| name.name),
            _ => None,
        };
        assert_eq!(exact(" public.t\t\n").as_deref(), Some("t"));
        for letter in ["\u{a0}", "\u{3000}", "\u{2003}", "\u{feff}"] {
            assert_eq!(exact(&format!("public.t{letter}")), Some(format!("t{letter}")));
        }
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

    // miri interprets: there it takes minutes.
    #[test]
    #[cfg_attr(miri, ignore)]
    fn many_wildcards_take_no_longer_than_reading() {
        let relation = RelationName::new("k", "a".repeat(100_000));
        let started = std::time::Instant::now();
        for wildcards in [6, 60, 6_000] {
            let pattern = Pattern::parse(&format!("k.{}*b", "*a".repeat(wildcards))).unwrap();
            assert_eq!(pattern.fit(&relation, &[]), None);
            let pattern = Pattern::parse(&format!("*k*.{}*a", "*a".repeat(wildcards))).unwrap();
            assert_eq!(pattern.fit(&relation, &[]), Some(Fit::Pattern));
        }
        assert!(started.elapsed() < std::time::Duration::from_secs(5), "{:?}", started.elapsed());
    }

    /// What matching means: a wildcard is any letters, one more of them or none.
    fn matches_by_definition(pattern: &[char], text: &[char]) -> bool {
        match (pattern, text) {
            ([], []) => true,
            (['*', rest @ ..], _) if matches_by_definition(rest, text) => true,
            (['*', ..], [_, others @ ..]) => matches_by_definition(pattern, others),
            ([letter, rest @ ..], [first, others @ ..]) => letter == first && matches_by_definition(rest, others),
            _ => false,
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(5_000))]

        #[test]
        fn matching_is_what_it_is_by_definition(pattern in "[ab*]{1,9}", text in "[ab]{0,9}") {
            let expected = matches_by_definition(
                &pattern.chars().collect::<Vec<_>>(),
                &text.chars().collect::<Vec<_>>(),
            );
            let part = part(&pattern).unwrap().0;
            prop_assert_eq!(part.matches(&text), expected);
        }

        #[test]
        fn letters_of_several_bytes_match_as_a_whole(pattern in "[äöß*]{1,6}", text in "[äöß]{0,6}") {
            let expected = matches_by_definition(
                &pattern.chars().collect::<Vec<_>>(),
                &text.chars().collect::<Vec<_>>(),
            );
            prop_assert_eq!(part(&pattern).unwrap().0.matches(&text), expected);
        }
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

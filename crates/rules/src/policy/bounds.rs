//! How much a caller may give: numbers and lengths that no DBA comes near, so that nobody's call costs minutes or gigabytes.
//!
//! Asked when a policy is given, never when a stored one is read: what is stored holds, however it came there.

use super::model::Document;
use super::schedule::Schedule;
use crate::error::Error;

/// Elements of an array column. Every session that writes to a table matches all patterns of all policies against its
/// name once.
const MOST_ELEMENTS: usize = 10_000;

/// Bytes of an element, and of a text that names something: two identifiers in quotes with a dot between, each letter of
/// which is written twice, take 257.
const LONGEST_NAME: usize = 1_000;

/// Bytes of a text for people. Every session that writes keeps all policies.
const LONGEST_COMMENT: usize = 100_000;

/// Bytes of a schedule, all whose windows each statement asks that its policy may be about.
const LONGEST_SCHEDULE: usize = 10_000;

/// Policies of one document. Each is kept in several forms at a time until all are stored.
pub const MOST_POLICIES: usize = 20_000;

/// Checks the numbers and lengths of what a caller gives of a policy.
///
/// # Errors
/// WG007 with the first column that has too much, and how much it may have.
pub fn check(document: &Document) -> Result<(), Error> {
    let no_columns = Vec::new();
    let columns = document.columns.as_ref().unwrap_or(&no_columns);
    let arrays = [
        ("tables", &document.tables, "{public.orders}"),
        ("roles", &document.roles, "{public}"),
        ("operations", &document.operations, "{update,delete,truncate}"),
        ("columns", columns, "{is_deleted}"),
    ];
    for (column, elements, example) in arrays {
        let hint = || format!("{column} => '{example}'");
        if elements.len() > MOST_ELEMENTS {
            return Err(Error::Invalid {
                message: format!("{column} has too many elements"),
                detail: Some(format!("It has {}, and {MOST_ELEMENTS} are the most that is taken.", elements.len())),
                hint: hint(),
            });
        }
        if let Some(bytes) = elements.iter().flatten().map(String::len).find(|bytes| *bytes > LONGEST_NAME) {
            return Err(Error::Invalid {
                message: format!("{column} has an element that is too long"),
                detail: Some(format!("It has {bytes} bytes, and {LONGEST_NAME} are the most that is taken.")),
                hint: hint(),
            });
        }
    }
    let texts = [
        ("application", &document.application, LONGEST_NAME, "psql%"),
        ("mode", &document.mode, LONGEST_NAME, "enforce"),
        ("override", &document.override_, LONGEST_NAME, "token"),
        ("approvers", &document.approvers, LONGEST_NAME, "dba"),
        ("comment", &document.comment, LONGEST_COMMENT, "why there is this policy"),
    ];
    for (column, text, most, example) in texts {
        within(column, text.as_deref(), most, example)?;
    }
    document.schedule.as_deref().map_or(Ok(()), schedule)
}

/// Checks the length of a schedule.
///
/// # Errors
/// WG007 for one that is too long.
pub fn schedule(text: &str) -> Result<(), Error> {
    within("schedule", Some(text), LONGEST_SCHEDULE, Schedule::EXAMPLE)
}

fn within(column: &str, text: Option<&str>, most: usize, example: &str) -> Result<(), Error> {
    match text.map(str::len) {
        Some(bytes) if bytes > most => Err(Error::Invalid {
            message: format!("{column} is too long"),
            detail: Some(format!("It has {bytes} bytes, and {most} are the most that is taken.")),
            hint: format!("{column} => '{example}'"),
        }),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn document(changes: impl FnOnce(&mut Document)) -> Document {
        let mut document = serde_json::from_str(r#"{"name": "p"}"#).unwrap();
        changes(&mut document);
        document
    }

    #[test]
    fn arrays_are_bounded() {
        let with = |tables: Vec<Option<String>>| check(&document(|document| document.tables = tables));
        assert!(with(vec![Some("public.t".into()); MOST_ELEMENTS]).is_ok());
        assert!(with(vec![None; MOST_ELEMENTS + 1]).is_err());
        assert!(with(vec![Some(format!("\"{0}\".\"{0}\"", "\"\"".repeat(63)))]).is_ok());
        let error = with(vec![Some(format!("public.{}", "x".repeat(LONGEST_NAME)))]).unwrap_err();
        assert_eq!(error.sqlstate(), "WG007");
        assert_eq!(error.detail().unwrap(), "It has 1007 bytes, and 1000 are the most that is taken.");
    }

    #[test]
    fn texts_are_bounded() {
        type Column = (&'static str, fn(&mut Document, String), usize);
        let columns: [Column; 6] = [
            ("application", |to, text| to.application = Some(text), LONGEST_NAME),
            ("mode", |to, text| to.mode = Some(text), LONGEST_NAME),
            ("override", |to, text| to.override_ = Some(text), LONGEST_NAME),
            ("approvers", |to, text| to.approvers = Some(text), LONGEST_NAME),
            ("comment", |to, text| to.comment = Some(text), LONGEST_COMMENT),
            ("schedule", |to, text| to.schedule = Some(text), LONGEST_SCHEDULE),
        ];
        for (column, set, most) in columns {
            assert!(check(&document(|document| set(document, "x".repeat(most)))).is_ok(), "{column}");
            let error = check(&document(|document| set(document, "x".repeat(most + 1)))).unwrap_err();
            assert_eq!(error.to_string(), format!("{column} is too long"));
        }
    }

    #[test]
    fn what_is_stored_is_read_whatever_its_size() {
        let stored = document(|document| {
            document.tables = vec![Some("public.t".into()); MOST_ELEMENTS + 1];
            document.comment = Some("x".repeat(LONGEST_COMMENT + 1));
            document.schedule = Some(vec!["Mon 10:00-11:00 UTC"; LONGEST_SCHEDULE].join("; "));
            document.rate_microseconds = Some(1);
        });
        assert!(check(&stored).is_err());
        assert!(stored.check().is_ok());
    }
}

//! A change as our own tables keep it.

use pgrx::pg_sys;
use rules::error::Error;
use serde::Deserialize;

use super::restore::column_names::{Known, Naming};
use super::restore::table_definition::{self, Shape};
use crate::pg::ereport::Failure;
use crate::pg::function::Arguments;
use crate::pg::owner;

/// A statement whose rows are kept.
#[derive(Debug, Deserialize)]
pub struct Change {
    pub id: i64,
    /// How long it is kept in all: an undo of it as well.
    pub keep: String,
    pub keep_microseconds: i64,
    pub undone_at: Option<String>,
    pub undone_by: Option<String>,
    /// The change that took it back last, where that itself can be undone.
    pub undone_with: Option<i64>,
    pub relations: Vec<Kept>,
}

/// One table that it changed.
#[derive(Debug, Deserialize)]
pub struct Kept {
    relation: u32,
    /// Its name then.
    name: String,
    /// How many of its rows were kept.
    pub rows: u64,
    /// What is known of its columns and key as they were.
    #[serde(flatten)]
    naming: Known,
    /// What happened to it between its rows, so that they cannot be put back.
    hindrance: Option<String>,
}

/// A table of a change as it is now.
pub struct Table {
    pub shape: Shape,
    pub naming: Naming,
    /// How many images there are of it.
    pub rows: u64,
}

/// Columns that 0.2.0 has not are taken out of the row.
const FIND: &str = "SELECT jsonb_build_object( \
       'id', s.id, 'keep', (s.kept_until - s.changed_at)::text, \
       'keep_microseconds', (extract(epoch FROM s.kept_until - s.changed_at) * 1000000)::int8, \
       'undone_at', s.undone_at, 'undone_by', s.undone_by, \
       'undone_with', (SELECT max(u.id) FROM writeguard.change_statement AS u WHERE u.undoes = s.id), \
       'relations', COALESCE((SELECT jsonb_agg(jsonb_build_object( \
            'relation', r.relation::int8, 'name', r.name, 'columns', r.columns, 'key', r.key, 'forms', r.forms, \
            'hindrance', r.hindrance, 'rows', r.rows) \
            ORDER BY r.name, r.relation) \
          FROM (SELECT DISTINCT ON (relation) relation, name, columns, to_jsonb(c) -> 'key' AS key, \
                  to_jsonb(c) -> 'forms' AS forms, to_jsonb(c) -> 'hindrance' AS hindrance, \
                  (sum(rows) OVER (PARTITION BY relation))::int8 AS rows FROM writeguard.change_relation AS c \
                WHERE change = s.id ORDER BY relation, name) AS r), '[]') \
     )::text FROM writeguard.change_statement AS s WHERE s.id = $1 AND s.kept_until > clock_timestamp()";

/// Waits for whoever undoes it now.
const LOCK: &str = "SELECT id::text FROM writeguard.change_statement WHERE id = $1 FOR UPDATE";

/// The number of a change, as the first argument of a function.
///
/// # Errors
/// WG007 for NULL.
pub fn number(arguments: &Arguments) -> Result<i64, Error> {
    arguments.get(0).ok_or_else(|| {
        Error::invalid("change must not be NULL", "SELECT id, changed_at, statement FROM writeguard.change;")
    })
}

impl Change {
    /// The change of that number, locked against being undone by somebody else where `lock` says so.
    ///
    /// # Errors
    /// WG007 where there is none.
    pub fn find(id: i64, lock: bool) -> Result<Self, Failure> {
        let found = owner::connect(|client| {
            if lock {
                owner::rows(client, LOCK, &[id.into()])?;
            }
            owner::rows(client, FIND, &[id.into()])
        })?;
        found.first().and_then(|json| serde_json::from_str(json).ok()).ok_or_else(|| Self::missing(id).into())
    }

    /// There is no such change, or its rows are about to go.
    pub fn missing(id: i64) -> Error {
        Error::Invalid {
            message: format!("change {id} does not exist"),
            detail: Some("It was never kept, or it is not kept any more.".into()),
            hint: "SELECT id, changed_at, login, relation, operation, rows FROM writeguard.change;".into(),
        }
    }

    /// A table of the change as it is now, locked so that it stays so. Only for those who may read all of it.
    ///
    /// # Errors
    /// WG007 where it was dropped, WG008 where it changed between its rows, 42501 without the privilege.
    pub fn open(&self, kept: &Kept, lock: u32) -> Result<Table, Failure> {
        let relation = pg_sys::Oid::from_u32(kept.relation);
        let gone = || Error::Invalid {
            message: format!("table \"{}\" of change {} was dropped", kept.name, self.id),
            detail: Some("Its rows have no place to be put back to; a new table of that name is another one.".into()),
            hint: format!("SELECT before FROM writeguard.image WHERE change = {};", self.id),
        };
        // Before the lock, so that nobody else can hold one; and again when nothing changes any more.
        let name = table_definition::name(relation).ok_or_else(gone)?;
        table_definition::check_readable(relation, &name)?;
        if !table_definition::lock(relation, lock)? {
            return Err(gone().into());
        }
        let shape = Shape::of(relation)?.ok_or_else(gone)?;
        table_definition::check_readable(relation, &shape.name())?;
        if let Some(hindrance) = &kept.hindrance {
            return Err(Error::Undecided {
                reason: format!("table \"{}\" {hindrance} between two of the rows of change {}", kept.name, self.id),
                hint: format!("SELECT operation, before, after FROM writeguard.image WHERE change = {};", self.id),
                relation: Some(shape.name()),
            }
            .into());
        }
        let naming = Naming::new(self.id, &shape, &kept.naming);
        Ok(Table { shape, naming, rows: kept.rows })
    }
}

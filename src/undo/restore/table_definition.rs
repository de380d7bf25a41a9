//! A table as it is now, as far as putting rows back has to know it: columns, primary key, what must be unique. And who may
//! see its rows.

use core::ptr;

use pgrx::pg_sys;
use rules::error::Error;
use rules::words::RelationName;
use serde::Deserialize;

use crate::pg::ereport::Failure;
use crate::pg::{ffi, owner};
use crate::undo::capture::kept_table::{PARTS, Parts};

/// One column.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Column {
    pub number: i16,
    pub name: String,
    #[serde(rename = "type")]
    type_oid: u32,
    pub typmod: i32,
    collation: u32,
    /// Computed from others: never written.
    pub generated: bool,
    /// NULL has to pass the type's own checks as well.
    pub domain: bool,
    /// Of a type that row types are part of.
    pub parts: Option<Parts>,
}

impl Column {
    /// The type's OID.
    pub fn type_oid(&self) -> pg_sys::Oid {
        pg_sys::Oid::from_u32(self.type_oid)
    }

    /// The OID of the collation that the column compares by.
    pub fn collation(&self) -> pg_sys::Oid {
        pg_sys::Oid::from_u32(self.collation)
    }

    /// The name as SQL has it; keywords are columns' names too.
    pub fn sql(&self) -> String {
        quote(&self.name)
    }
}

/// A column of the primary key.
#[derive(Debug, Clone, Deserialize)]
pub struct KeyColumn {
    pub number: i16,
    /// The index's equality, as SQL writes the operator.
    operator: String,
    /// What the operator takes, as SQL writes it, where the column's type is another.
    cast: Option<String>,
}

/// A table.
#[derive(Debug, Clone, Deserialize)]
pub struct Shape {
    #[serde(skip)]
    pub relation: u32,
    pub schema: String,
    pub table: String,
    partitioned: bool,
    rules: bool,
    pub columns: Vec<Column>,
    pub key: Vec<KeyColumn>,
    /// Whether two rows may have the same key until the statement or the transaction ends.
    pub deferrable_key: bool,
    /// Columns in which rows must not collide, even while a statement runs.
    unique: Vec<i16>,
    /// Whether some of those are not just columns.
    unique_expressions: bool,
    /// Columns that foreign keys refer to which write to their own tables when these change.
    acted_on: Vec<i16>,
    /// Whether constraints or user triggers may wait until the transaction ends.
    pub deferrable: bool,
    /// OIDs of the tables that foreign keys refer to.
    refers_to: Vec<u32>,
}

const SHAPE: &str = "SELECT jsonb_build_object( \
       'schema', n.nspname, 'table', c.relname, 'partitioned', c.relkind = 'p', 'rules', c.relhasrules, \
       'columns', (SELECT jsonb_agg(jsonb_build_object( \
            'number', a.attnum, 'name', a.attname, 'type', a.atttypid::int8, 'typmod', a.atttypmod, \
            'collation', a.attcollation::int8, 'generated', a.attgenerated <> '', 'domain', t.typtype = 'd', \
            'parts', {parts}) \
            ORDER BY a.attnum) \
          FROM pg_attribute AS a JOIN pg_type AS t ON t.oid = a.atttypid \
          WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped), \
       'key', COALESCE((SELECT jsonb_agg(jsonb_build_object( \
            'number', k.number, \
            'operator', format('OPERATOR(%I.%s)', s.nspname, o.oprname), \
            'cast', CASE WHEN t.typtype <> 'p' AND t.oid <> a.atttypid \
                         THEN format('%I.%I', ts.nspname, t.typname) END) \
            ORDER BY k.place) \
          FROM unnest(p.indkey::int2[], p.indclass::oid[]) WITH ORDINALITY AS k (number, class, place) \
          JOIN pg_attribute AS a ON a.attrelid = c.oid AND a.attnum = k.number \
          JOIN pg_opclass AS oc ON oc.oid = k.class \
          JOIN pg_amop AS ao ON ao.amopfamily = oc.opcfamily AND ao.amoplefttype = oc.opcintype \
            AND ao.amoprighttype = oc.opcintype AND ao.amopstrategy = 3 \
          JOIN pg_operator AS o ON o.oid = ao.amopopr \
          JOIN pg_namespace AS s ON s.oid = o.oprnamespace \
          JOIN pg_type AS t ON t.oid = o.oprleft \
          JOIN pg_namespace AS ts ON ts.oid = t.typnamespace \
          WHERE k.place <= p.indnkeyatts), '[]'), \
       'deferrable_key', COALESCE(NOT p.indimmediate, false), \
       'unique', COALESCE((SELECT jsonb_agg(DISTINCT k.number) \
          FROM pg_index AS i, unnest(i.indkey::int2[]) AS k (number) \
          WHERE i.indrelid = c.oid AND i.indimmediate AND (i.indisunique OR i.indisexclusion) AND k.number <> 0), '[]'), \
       'unique_expressions', EXISTS (SELECT FROM pg_index AS i WHERE i.indrelid = c.oid AND i.indimmediate \
          AND (i.indisunique OR i.indisexclusion) AND (i.indexprs IS NOT NULL OR i.indpred IS NOT NULL)), \
       'acted_on', COALESCE((SELECT jsonb_agg(DISTINCT k.number) FROM pg_constraint AS f, unnest(f.confkey) AS k (number) \
          WHERE f.confrelid = c.oid AND f.contype = 'f' \
            AND (f.confupdtype IN ('c', 'n', 'd') OR f.confdeltype IN ('c', 'n', 'd'))), '[]'), \
       'deferrable', EXISTS (SELECT FROM pg_trigger AS g WHERE g.tgrelid = c.oid AND g.tgdeferrable), \
       'refers_to', COALESCE((SELECT jsonb_agg(DISTINCT f.confrelid::int8) FROM pg_constraint AS f \
          WHERE f.conrelid = c.oid AND f.contype = 'f'), '[]') \
     )::text \
     FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace \
     LEFT JOIN pg_index AS p ON p.indrelid = c.oid AND p.indisprimary AND p.indisvalid \
     WHERE c.oid = $1::int8::oid AND c.relkind IN ('r', 'p')";

impl Shape {
    /// The table as it is now; it stays so while a lock is held on it. None: it is gone.
    ///
    /// # Errors
    /// WG008 where the catalogs cannot be read.
    pub fn of(relation: pg_sys::Oid) -> Result<Option<Self>, Error> {
        let sql = SHAPE.replace("{parts}", PARTS);
        let found = owner::connect(|client| owner::rows(client, &sql, &[i64::from(u32::from(relation)).into()]))?;
        let shape = found.first().and_then(|json| serde_json::from_str::<Shape>(json).ok());
        Ok(shape.map(|shape| Shape { relation: relation.into(), ..shape }))
    }

    /// Whether the table still has this name and these columns.
    ///
    /// # Errors
    /// WG008 where the catalogs cannot be read.
    pub fn holds(&self) -> Result<bool, Error> {
        Ok(Self::of(self.oid())?.is_some_and(|now| now.name() == self.name() && now.columns == self.columns))
    }

    /// It has not stayed as it was while a change is undone, though it was locked: code that ran meanwhile changed it.
    pub fn changes(&self, change: i64) -> Error {
        Error::Undecided {
            reason: format!("table \"{}\" changes while change {change} is undone", self.name()),
            hint: format!("SELECT * FROM writeguard.undo({change});"),
            relation: Some(self.name()),
        }
    }

    /// Its OID.
    pub fn oid(&self) -> pg_sys::Oid {
        pg_sys::Oid::from_u32(self.relation)
    }

    /// Its name, as it is now.
    pub fn name(&self) -> RelationName {
        RelationName::new(&self.schema, &self.table)
    }

    /// What SQL reads and writes: the table itself without its children, or all partitions.
    pub fn sql(&self) -> String {
        let only = if self.partitioned { "" } else { "ONLY " };
        format!("{only}{}.{}", quote(&self.schema), quote(&self.table))
    }

    /// What SQL inserts into.
    pub fn target(&self) -> String {
        format!("{}.{}", quote(&self.schema), quote(&self.table))
    }

    /// The column of that number.
    pub fn column(&self, number: i16) -> Option<&Column> {
        self.columns.iter().find(|column| column.number == number)
    }

    /// The columns of the primary key.
    pub fn key_columns(&self) -> impl Iterator<Item = &Column> {
        self.key.iter().filter_map(|key| self.column(key.number))
    }

    /// Whether a column is one of the primary key's.
    pub fn is_key(&self, number: i16) -> bool {
        self.key.iter().any(|key| key.number == number)
    }

    /// SQL's condition that a row `table` of the table has the key in the columns `k1`, `k2`, … of `rows`.
    pub fn has_key(&self, table: &str, rows: &str) -> String {
        let own = |column: &Column| format!("{table}.{}", column.sql());
        self.same_key(|_, column| own(column), |place, _| format!("{rows}.k{place}"))
    }

    /// SQL's condition that two keys are the same, each given by its columns, of which `1` is the first.
    pub fn same_key(&self, one: impl Fn(usize, &Column) -> String, other: impl Fn(usize, &Column) -> String) -> String {
        let equal = |(place, key): (usize, &KeyColumn)| {
            let cast = key.cast.as_ref().map(|cast| format!("::{cast}")).unwrap_or_default();
            let column = self.column(key.number)?;
            Some(format!("{}{cast} {} {}{cast}", one(place, column), key.operator, other(place, column)))
        };
        (1..).zip(&self.key).filter_map(equal).collect::<Vec<_>>().join(" AND ")
    }

    /// Whether foreign keys of other tables do something when one of these columns changes.
    pub fn is_acted_on(&self, changed: &[i16]) -> bool {
        changed.iter().any(|number| self.acted_on.contains(number))
    }

    /// Whether foreign keys of other tables do something when a row goes or another key comes.
    pub fn has_dependents(&self) -> bool {
        !self.acted_on.is_empty()
    }

    /// Whether a foreign key of this table refers to the other one.
    pub fn refers_to(&self, other: &Shape) -> bool {
        self.refers_to.contains(&other.relation)
    }

    /// Whether changing these columns row by row could make two rows collide for a while, although they do not in the
    /// end.
    pub fn may_collide(&self, changed: &[i16]) -> bool {
        !changed.is_empty() && (self.unique_expressions || changed.iter().any(|number| self.unique.contains(number)))
    }

    /// What makes an INSERT leave out rows whose key is there; empty where the table does not allow it.
    pub fn unless_there(&self) -> String {
        if self.deferrable_key || self.rules {
            return String::new();
        }
        let key: Vec<String> = self.key_columns().map(Column::sql).collect();
        format!(" ON CONFLICT ({}) DO NOTHING", key.join(", "))
    }
}

/// `text` as an SQL identifier, whatever it is.
pub fn quote(text: &str) -> String {
    format!("\"{}\"", text.replace('"', "\"\""))
}

/// The name of a table; none: there is no such table any more.
pub fn name(relation: pg_sys::Oid) -> Option<RelationName> {
    crate::policy::relation::relation_name(relation)
}

/// Locks a table until the (sub)transaction ends.
///
/// # Errors
/// Core's own, such as that of a deadlock. False: it is gone.
#[expect(ffi_unwind_calls, reason = "inside protect")]
pub fn lock(relation: pg_sys::Oid, mode: u32) -> Result<bool, Failure> {
    let mut table: pg_sys::Relation = ptr::null_mut();
    // SAFETY: nothing but the raw call inside; closing a table that stays locked raises nothing.
    unsafe {
        ffi::protect(|| table = ffi::try_table_open(relation, mode as pg_sys::LOCKMODE))?;
        if table.is_null() {
            return Ok(false);
        }
        pg_sys::table_close(table, pg_sys::NoLock as pg_sys::LOCKMODE);
    }
    Ok(true)
}

/// `RLS_ENABLED` of core's `rls.h`.
const ROW_SECURITY_APPLIES: core::ffi::c_int = 2;

/// Checks that the current user may see all columns of all rows of a table: kept rows are shown to nobody else, not even
/// in an error's text.
///
/// # Errors
/// 42501.
pub fn check_readable(relation: pg_sys::Oid, name: &RelationName) -> Result<(), Error> {
    // SAFETY: look-ups in catalogs.
    unsafe {
        let user = pg_sys::GetUserId();
        let select = pg_sys::ACL_SELECT as pg_sys::AclMode;
        let granted = pg_sys::AclResult::ACLCHECK_OK;
        if pg_sys::pg_class_aclcheck(relation, user, select) != granted
            && pg_sys::pg_attribute_aclcheck_all(relation, user, select, pg_sys::AclMaskHow::ACLMASK_ALL) != granted
        {
            return Err(Error::NotAllowed {
                message: format!("permission denied for table \"{name}\""),
                detail: "Kept rows are for those who may read the whole table.".into(),
                hint: format!("GRANT SELECT ON {} TO …;", name.to_sql()),
            });
        }
        if pg_sys::check_enable_rls(relation, user, true) == ROW_SECURITY_APPLIES {
            return Err(Error::NotAllowed {
                message: format!("row security applies to this user on table \"{name}\""),
                detail: "Kept rows are for those who may read all rows of the table.".into(),
                hint: "Let the table's owner do it, or a role with BYPASSRLS.".into(),
            });
        }
    }
    Ok(())
}

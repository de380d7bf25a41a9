//! Reads `writeguard.policy`: a plain scan, so no SPI, no user code, and no privileges are needed.

use core::ffi::CStr;
use core::ptr;
use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::rc::Rc;

use pgrx::{PgMemoryContexts, PgTupleDesc, direct_function_call, pg_sys};
use rules::policy::model::{Document, Policy};
use rules::policy::resolve::{AsPolicy, Index, Target};
use rustc_hash::{FxHashMap, FxHashSet};

use super::interval::Span;
use crate::pg::encoding::{self, from_name};
use crate::pg::ffi::{self, PgError};
use crate::pg::function::FromSql;

/// The schema of the extension; fixed by its control file.
pub const SCHEMA: &CStr = c"writeguard";
const POLICY_TABLE: &CStr = c"policy";
const EXTENSION: &CStr = c"pg_writeguard";

/// Which version of a policy a budget belongs to: a changed policy starts from zero. Told by what the policy says, for
/// where its row is stored changes with VACUUM FULL.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Revision(u64);

impl Revision {
    /// # Safety
    /// The tuple is whole.
    unsafe fn of(tuple: pg_sys::HeapTuple) -> Self {
        // What comes before says who wrote the row, and where its next version is; then come NULLs and values.
        const WHO_AND_WHERE: usize = 23;
        // SAFETY: the tuple has as many bytes as it says.
        let bytes = unsafe {
            let length = ((*tuple).t_len as usize).saturating_sub(WHO_AND_WHERE);
            core::slice::from_raw_parts((*tuple).t_data.cast::<u8>().add(WHO_AND_WHERE), length)
        };
        let mut hasher = DefaultHasher::new();
        hasher.write(bytes);
        Self(hasher.finish())
    }
}

impl AsPolicy for Loaded {
    fn as_policy(&self) -> &Policy {
        &self.policy
    }
}

/// A policy in force.
#[derive(Debug)]
pub struct Loaded {
    pub policy: Policy,
    pub revision: Revision,
}

impl Loaded {
    /// Whose bucket a rate's is: that of the policy's name and rate, so that other changes of the policy leave it alone.
    pub fn rate_key(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        self.policy.name.hash(&mut hasher);
        self.policy.rate.map(|rate| (rate.rows, rate.interval)).hash(&mut hasher);
        hasher.finish()
    }
}

/// A policy that the guard cannot work with.
pub struct Broken {
    pub name: String,
    pub reason: String,
}

/// Everything read from the table.
pub struct Policies {
    pub installed: bool,
    /// Why the table says nothing to this library.
    pub unreadable: Option<String>,
    pub loaded: Vec<Rc<Loaded>>,
    pub broken: Vec<Broken>,
    /// Where to look for those that may cover a table.
    pub index: Index,
    /// Every role that some policy names.
    pub roles: Vec<String>,
}

impl Policies {
    /// What there is in a database without the extension.
    pub fn not_installed() -> Self {
        Self {
            installed: false,
            unreadable: None,
            loaded: Vec::new(),
            broken: Vec::new(),
            index: Index::default(),
            roles: Vec::new(),
        }
    }

    /// What there is where the extension is installed, but not as this library knows it.
    pub fn unreadable(reason: String) -> Self {
        Self { installed: true, unreadable: Some(reason), ..Self::not_installed() }
    }

    /// All policies in the table; none when it is gone by now. What did not change since `before` is taken from there; if
    /// nothing did, they are those of `before`.
    ///
    /// # Errors
    /// What waiting for the table's lock may raise.
    #[expect(ffi_unwind_calls, reason = "inside protect")]
    pub fn read(table: pg_sys::Oid, before: Option<&Rc<Self>>) -> Result<Option<Rc<Self>>, PgError> {
        let mut found = Self { installed: true, ..Self::not_installed() };
        let mut relation = ptr::null_mut();
        let lock = pg_sys::AccessShareLock as pg_sys::LOCKMODE;
        // SAFETY: nothing but the raw call inside.
        unsafe { ffi::protect(|| relation = ffi::try_table_open(table, lock)) }?;
        if relation.is_null() {
            return Ok(None);
        }
        let mut scratch = PgMemoryContexts::new("pg_writeguard policies");
        // SAFETY: switches the memory context for the time of the call; the table is open and closed once.
        unsafe {
            scratch.switch_to(|_| scan(relation, before.map(Rc::as_ref), &mut found));
            pg_sys::table_close(relation, lock);
        }
        if let Some(before) = before.filter(|before| before.is_as(&found)) {
            return Ok(Some(Rc::clone(before)));
        }
        found.index = Index::new(&found.loaded);
        let names = found.loaded.iter().flat_map(|loaded| loaded.policy.roles.iter().map(String::as_str));
        let names: FxHashSet<&str> = names.filter(|role| *role != "public").collect();
        found.roles = names.into_iter().map(str::to_owned).collect();
        Ok(Some(Rc::new(found)))
    }

    /// Whether the table had the same to say.
    fn is_as(&self, other: &Self) -> bool {
        let sound = |policies: &Self| policies.unreadable.is_none() && policies.broken.is_empty();
        let revisions = |policies: &Self| policies.loaded.iter().map(|loaded| loaded.revision).collect::<Vec<_>>();
        self.installed && sound(self) && sound(other) && revisions(self) == revisions(other)
    }

    /// The places of the policies that may cover a table.
    pub fn naming(&self, target: &Target) -> Vec<usize> {
        self.index.naming(target)
    }
}

/// Where the policies are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// The extension is not installed.
    NotInstalled,
    /// It is, but its table is not where it belongs.
    Missing,
    Table(pg_sys::Oid),
}

/// Looks for the policy table.
pub fn find() -> Place {
    // SAFETY: catalog look-ups that give InvalidOid for what is not there.
    unsafe {
        if pg_sys::get_extension_oid(EXTENSION.as_ptr(), true) == pg_sys::InvalidOid {
            return Place::NotInstalled;
        }
        let schema = pg_sys::get_namespace_oid(SCHEMA.as_ptr(), true);
        if schema == pg_sys::InvalidOid {
            return Place::Missing;
        }
        match pg_sys::get_relname_relid(POLICY_TABLE.as_ptr(), schema) {
            pg_sys::InvalidOid => Place::Missing,
            table => Place::Table(table),
        }
    }
}

/// Scans the table. What PostgreSQL allocates meanwhile lives in the caller's memory context.
unsafe fn scan(relation: pg_sys::Relation, before: Option<&Policies>, found: &mut Policies) {
    let known: FxHashMap<Revision, &Rc<Loaded>> =
        before.iter().flat_map(|before| &before.loaded).map(|loaded| (loaded.revision, loaded)).collect();
    // SAFETY: a plain scan of a table of ours; an ERROR unwinds to the guard around the caller, and the abort closes
    // what is open.
    unsafe {
        let descriptor = PgTupleDesc::from_pg_unchecked((*relation).rd_att);
        let columns: HashMap<String, usize> =
            descriptor.iter().enumerate().map(|(index, column)| (from_name(&column.attname), index)).collect();
        found.unreadable = other_column(&descriptor);
        if found.unreadable.is_some() {
            return;
        }
        let mut values = vec![pg_sys::Datum::from(0); descriptor.len()];
        let mut nulls = vec![true; descriptor.len()];
        let scan = pg_sys::systable_beginscan(relation, pg_sys::InvalidOid, false, ptr::null_mut(), 0, ptr::null_mut());
        loop {
            let tuple = pg_sys::systable_getnext(scan);
            if tuple.is_null() {
                break;
            }
            let revision = Revision::of(tuple);
            if let Some(known) = known.get(&revision) {
                found.loaded.push(Rc::clone(known));
                continue;
            }
            pg_sys::heap_deform_tuple(tuple, (*relation).rd_att, values.as_mut_ptr(), nulls.as_mut_ptr());
            let row = Row { columns: &columns, values: &values, nulls: &nulls };
            let document = row.document();
            let name = document.name.clone().unwrap_or_default();
            match document.check() {
                Ok(policy) => {
                    found.loaded.push(Rc::new(Loaded { policy, revision }));
                }
                Err(error) => found.broken.push(Broken { name, reason: error.to_string() }),
            }
        }
        pg_sys::systable_endscan(scan);
    }
}

/// The columns as this library reads them.
const COLUMNS: [(&str, pg_sys::Oid); 24] = [
    ("name", pg_sys::TEXTOID),
    ("tables", pg_sys::TEXTARRAYOID),
    ("roles", pg_sys::TEXTARRAYOID),
    ("application", pg_sys::TEXTOID),
    ("client", pg_sys::CIDROID),
    ("schedule", pg_sys::TEXTOID),
    ("operations", pg_sys::TEXTARRAYOID),
    ("max_rows", pg_sys::INT8OID),
    ("max_rows_per_transaction", pg_sys::INT8OID),
    ("rate_rows", pg_sys::INT8OID),
    ("rate_interval", pg_sys::INTERVALOID),
    ("max_fraction", pg_sys::FLOAT8OID),
    ("require_where", pg_sys::BOOLOID),
    ("require_transaction", pg_sys::BOOLOID),
    ("mode", pg_sys::TEXTOID),
    ("override", pg_sys::TEXTOID),
    ("approvers", pg_sys::TEXTOID),
    ("min_approvals", pg_sys::INT4OID),
    ("undo", pg_sys::INTERVALOID),
    ("comment", pg_sys::TEXTOID),
    ("samples", pg_sys::BOOLOID),
    ("always", pg_sys::BOOLOID),
    ("columns", pg_sys::TEXTARRAYOID),
    ("same_rows", pg_sys::BOOLOID),
];

/// The columns that came after the first release.
pub const LATER: [&str; 4] = ["samples", "always", "columns", "same_rows"];

/// What is wrong with the first column that is not as this library reads it. A column that an older version of the
/// extension does not have is its default in every policy.
fn other_column(descriptor: &PgTupleDesc<'_>) -> Option<String> {
    let is_fit = |name: &str, type_oid: pg_sys::Oid| {
        let mut columns = descriptor.iter().filter(|column| !column.attisdropped);
        match columns.find(|column| from_name(&column.attname) == name) {
            Some(column) => column.atttypid == type_oid,
            None => LATER.contains(&name),
        }
    };
    let other = COLUMNS.into_iter().find(|(name, type_oid)| !is_fit(name, *type_oid));
    other.map(|(name, _)| {
        format!("column \"{name}\" of table writeguard.policy is not as this version of the library has it")
    })
}

/// One row of the policy table.
struct Row<'a> {
    columns: &'a HashMap<String, usize>,
    values: &'a [pg_sys::Datum],
    nulls: &'a [bool],
}

impl Row<'_> {
    fn get<T: FromSql>(&self, column: &str) -> Option<T> {
        let index = self.columns.get(column).copied().filter(|index| !self.nulls[*index])?;
        // SAFETY: the table's column has the type that the caller asks for.
        Some(unsafe { T::from_sql(self.values[index]) })
    }

    /// The column as its type's output function prints it.
    fn printed(&self, column: &str, output: unsafe fn(pg_sys::FunctionCallInfo) -> pg_sys::Datum) -> Option<String> {
        let index = self.columns.get(column).copied().filter(|index| !self.nulls[*index])?;
        // SAFETY: the output function of the column's type.
        let text = unsafe { direct_function_call::<&CStr>(output, &[Some(self.values[index])]) }?;
        Some(encoding::from_server(text.to_bytes()))
    }

    fn span(&self, column: &str) -> Option<Span> {
        let index = *self.columns.get(column)?;
        // SAFETY: the column is an interval.
        unsafe { Span::of(self.values[index], self.nulls[index]) }
    }

    fn document(&self) -> Document {
        let rate_interval = self.span("rate_interval");
        let undo = self.span("undo");
        Document {
            name: self.get("name"),
            tables: self.get("tables").unwrap_or_default(),
            roles: self.get("roles").unwrap_or_default(),
            application: self.get("application"),
            client: self.printed("client", pg_sys::cidr_out),
            schedule: self.get("schedule"),
            operations: self.get("operations").unwrap_or_default(),
            max_rows: self.get("max_rows"),
            max_rows_per_transaction: self.get("max_rows_per_transaction"),
            rate_rows: self.get("rate_rows"),
            rate_microseconds: rate_interval.as_ref().map(|span| span.microseconds),
            rate_interval: rate_interval.map(|span| span.text),
            max_fraction: self.get("max_fraction"),
            require_where: self.get("require_where"),
            require_transaction: self.get("require_transaction"),
            mode: self.get("mode"),
            override_: self.get("override"),
            approvers: self.get("approvers"),
            min_approvals: self.get("min_approvals"),
            undo_microseconds: undo.as_ref().map(|span| span.microseconds),
            undo: undo.map(|span| span.text),
            comment: self.get("comment"),
            samples: self.get("samples").unwrap_or(true),
            always: self.get("always").unwrap_or_default(),
            columns: self.get("columns"),
            same_rows: self.get("same_rows").unwrap_or(true),
        }
    }
}

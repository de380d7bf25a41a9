//! The path through a plan to the scan of a table, and whether something on it narrows the scan.
//!
//! A scan is narrowed by its own conditions, or by what stands above it: a join whose condition looks at the table's
//! columns and that drops rows without a partner, a later filter on them, LIMIT and the like. Above a scan, columns are
//! known by their places in the output of the node below, so a condition's columns are followed down the path.

use pg_sys::NodeTag;
use pgrx::{PgTupleDesc, pg_sys};
use rules::condition::Condition;

use super::expression::{Columns, Reader};
use crate::pg::ffi::{PgError, pointers};

/// How the path continues below a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Via {
    /// Into the outer side, or an only one.
    Outer,
    Inner,
    /// Into a sub-select.
    Below,
    /// It ends: this is the scan.
    End,
}

/// One node on the path to a scan.
pub struct Step {
    pub plan: *mut pg_sys::Plan,
    pub via: Via,
}

/// A scan of a table, with the path that leads to it.
pub struct Target<'a> {
    pub path: &'a [Step],
    pub table: pg_sys::Index,
    /// The table, open.
    pub relation: pg_sys::Relation,
    /// What the plan is run with.
    pub parameters: pg_sys::ParamListInfo,
}

impl Target<'_> {
    /// Whether anything on the path narrows the scan at its end.
    ///
    /// # Safety
    /// The path leads through a plan that is being run with these parameters.
    ///
    /// # Errors
    /// What fetching a parameter raises.
    pub unsafe fn is_narrowed(&self) -> Result<bool, PgError> {
        for level in (0..self.path.len()).rev() {
            // SAFETY: nodes of a plan that is being run.
            if unsafe { self.narrows(level)? } {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Whether the node at that level of the path narrows the scan.
    unsafe fn narrows(&self, level: usize) -> Result<bool, PgError> {
        let Some(Step { plan, via }) = self.path.get(level) else { return Ok(false) };
        let plan = *plan;
        // SAFETY: the tag says what the node is.
        unsafe {
            if self.all(level, (*plan).qual)?.narrows() {
                return Ok(true);
            }
            let further = match (*plan).type_ {
                NodeTag::T_SampleScan
                | NodeTag::T_TidScan
                | NodeTag::T_Limit
                | NodeTag::T_Agg
                | NodeTag::T_Group
                | NodeTag::T_Unique
                | NodeTag::T_SetOp => return Ok(true),
                // The same for every row; where it is known that it lets none through, nothing is scanned.
                NodeTag::T_Result => (*plan.cast::<pg_sys::Result>()).resconstantqual.cast(),
                NodeTag::T_TidRangeScan => (*plan.cast::<pg_sys::TidRangeScan>()).tidrangequals,
                NodeTag::T_IndexScan => (*plan.cast::<pg_sys::IndexScan>()).indexqualorig,
                NodeTag::T_IndexOnlyScan => (*plan.cast::<pg_sys::IndexOnlyScan>()).indexqual,
                NodeTag::T_BitmapHeapScan => (*plan.cast::<pg_sys::BitmapHeapScan>()).bitmapqualorig,
                // What the foreign server checks: a wrapper keeps it here to check a row again.
                NodeTag::T_ForeignScan => (*plan.cast::<pg_sys::ForeignScan>()).fdw_recheck_quals,
                NodeTag::T_CustomScan => (*plan.cast::<pg_sys::CustomScan>()).custom_exprs,
                NodeTag::T_NestLoop | NodeTag::T_HashJoin | NodeTag::T_MergeJoin => {
                    let drops = !keeps((*plan.cast::<pg_sys::Join>()).jointype, *via);
                    return Ok(drops && self.is_joined(level)?);
                }
                _ => return Ok(false),
            };
            Ok(self.all(level, further)?.narrows())
        }
    }

    /// Whether the condition of the join at that level looks at the table's columns, so that not every row is joined
    /// with every other one.
    unsafe fn is_joined(&self, level: usize) -> Result<bool, PgError> {
        let Some(Step { plan, .. }) = self.path.get(level) else { return Ok(false) };
        let plan = *plan;
        let columns = Place { target: self, level };
        let reader = Reader { columns: &columns, parameters: self.parameters };
        // SAFETY: the tag says what the node is.
        unsafe {
            let clauses = match (*plan).type_ {
                NodeTag::T_HashJoin => (*plan.cast::<pg_sys::HashJoin>()).hashclauses,
                NodeTag::T_MergeJoin => (*plan.cast::<pg_sys::MergeJoin>()).mergeclauses,
                NodeTag::T_NestLoop => {
                    // What the inner side is looked up by.
                    let mut handed = pointers::<pg_sys::NestLoopParam>((*plan.cast::<pg_sys::NestLoop>()).nestParams);
                    if handed.any(|one| reader.looks((*one).paramval.cast())) {
                        return Ok(true);
                    }
                    core::ptr::null_mut()
                }
                _ => return Ok(false),
            };
            Ok(reader.all(clauses)?.narrows() || reader.all((*plan.cast::<pg_sys::Join>()).joinqual)?.narrows())
        }
    }

    unsafe fn all(&self, level: usize, conditions: *mut pg_sys::List) -> Result<Condition, PgError> {
        let columns = Place { target: self, level };
        // SAFETY: conditions of a plan that is being run.
        unsafe { Reader { columns: &columns, parameters: self.parameters }.all(conditions) }
    }
}

/// Whether a join of that type lets every row through that comes from there.
fn keeps(join: pg_sys::JoinType::Type, from: Via) -> bool {
    match join {
        pg_sys::JoinType::JOIN_LEFT => from == Via::Outer,
        pg_sys::JoinType::JOIN_RIGHT => from == Via::Inner,
        pg_sys::JoinType::JOIN_FULL => true,
        _ => false,
    }
}

/// Where a column stands: at one level of the path.
struct Place<'a> {
    target: &'a Target<'a>,
    level: usize,
}

impl Columns for Place<'_> {
    fn is_of_table(&self, column: *const pg_sys::Var) -> bool {
        // SAFETY: a column in an expression of the plan on the path.
        unsafe { self.leads_to_table(column) }
    }

    fn is_never_null(&self, column: *const pg_sys::Var) -> bool {
        // SAFETY: as above; the relation is open.
        unsafe { is_own(column, self.target.table) && is_never_null(self.target.relation, (*column).varattno) }
    }
}

impl Place<'_> {
    /// Whether a column here comes from the table's scan, and not from the other side of a join.
    unsafe fn leads_to_table(&self, column: *const pg_sys::Var) -> bool {
        let Some(Step { plan, via }) = self.target.path.get(self.level) else { return false };
        // SAFETY: as for the caller; output lists are those of the nodes on the path.
        unsafe {
            let below = self.target.path.get(self.level + 1).map(|step| (*step.plan).targetlist);
            let (list, level) = match ((*column).varno, via) {
                (pg_sys::OUTER_VAR, Via::Outer) | (pg_sys::INNER_VAR, Via::Inner) => (below, self.level + 1),
                (pg_sys::OUTER_VAR | pg_sys::INNER_VAR, _) => return false,
                (pg_sys::INDEX_VAR, _) => (Some(own_list(*plan)), self.level),
                (_, Via::Below) => (below, self.level + 1),
                _ => return is_own(column, self.target.table),
            };
            let there = Place { target: self.target, level };
            let reader = Reader { columns: &there, parameters: self.target.parameters };
            pointers::<pg_sys::TargetEntry>(list.unwrap_or(core::ptr::null_mut()))
                .find(|entry| (**entry).resno == (*column).varattno)
                .is_some_and(|entry| reader.looks((*entry).expr.cast()))
        }
    }
}

/// The list that INDEX_VAR columns of a scan are places in.
unsafe fn own_list(plan: *mut pg_sys::Plan) -> *mut pg_sys::List {
    // SAFETY: the tag says what the node is.
    unsafe {
        match (*plan).type_ {
            NodeTag::T_IndexOnlyScan => (*plan.cast::<pg_sys::IndexOnlyScan>()).indextlist,
            NodeTag::T_ForeignScan => (*plan.cast::<pg_sys::ForeignScan>()).fdw_scan_tlist,
            NodeTag::T_CustomScan => (*plan.cast::<pg_sys::CustomScan>()).custom_scan_tlist,
            _ => core::ptr::null_mut(),
        }
    }
}

/// Whether a column is the table's own. `tableoid` is the same for all of its rows, and so is no column of it.
///
/// # Safety
/// A column in an expression of a plan.
pub unsafe fn is_own(column: *const pg_sys::Var, table: pg_sys::Index) -> bool {
    // SAFETY: the caller's promise.
    unsafe {
        i64::from((*column).varno) == i64::from(table)
            && i32::from((*column).varattno) != pg_sys::TableOidAttributeNumber
    }
}

/// Whether a column of that number is never NULL.
///
/// # Safety
/// The relation is open.
pub unsafe fn is_never_null(relation: pg_sys::Relation, attribute: pg_sys::AttrNumber) -> bool {
    // System columns are never NULL, rows as a whole are another matter.
    let Ok(number) = usize::try_from(attribute) else { return true };
    // SAFETY: the relation is open, and the descriptor is only looked at.
    let descriptor = unsafe { PgTupleDesc::from_pg_unchecked((*relation).rd_att) };
    number.checked_sub(1).and_then(|index| descriptor.get(index)).is_some_and(|column| column.attnotnull)
}

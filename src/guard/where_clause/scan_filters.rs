//! What a plan scans whole: the scans of a write's tables that nothing in the plan narrows.
//!
//! The plan is walked down to each scan; `plan_path` tells whether something on the way narrows it. Pruned partitions need
//! no rule: the condition that pruned them stays with the others, as their filter.

use pg_sys::NodeTag;
use pgrx::pg_sys;

use super::expression::{Columns, Reader};
use super::plan_path::{Step, Target, Via, is_never_null, is_own};
use crate::pg::ffi::{PgError, pointers};

/// A table that is scanned whole.
pub struct WholeScan {
    /// Its place in the range table.
    pub table: pg_sys::Index,
    /// The planner's estimate of its rows.
    pub estimate: Option<u64>,
}

/// Which tables are looked for: gives the open relation of such a place in the range table.
pub type Wanted<'a> = &'a dyn Fn(pg_sys::Index) -> Option<pg_sys::Relation>;

/// The scans below `plan` of wanted tables that nothing narrows. Allocates nothing where there are none, but for the path,
/// whose memory comes from `path` and goes back there.
///
/// # Safety
/// A plan that is being run with these parameters.
///
/// # Errors
/// What fetching a parameter raises.
pub unsafe fn whole_scans(
    plan: *mut pg_sys::Plan,
    parameters: pg_sys::ParamListInfo,
    wanted: Wanted<'_>,
    path: &mut Vec<Step>,
) -> Result<Vec<WholeScan>, PgError> {
    path.clear();
    let mut walk = Walk { parameters, wanted, path, whole: Vec::new() };
    // SAFETY: the caller's promise.
    unsafe { walk.visit(plan)? };
    Ok(walk.whole)
}

/// The planner's estimate of a node's rows, where it is a number that one can store.
///
/// # Safety
/// A node of a plan that is being run.
pub unsafe fn estimate(plan: *const pg_sys::Plan) -> Estimate {
    // SAFETY: the caller's promise.
    Estimate::of(unsafe { (*plan).plan_rows })
}

/// Rows that the planner or the catalog expects; made a number only where it is reported.
#[derive(Debug, Clone, Copy)]
pub struct Estimate(f64);

impl Estimate {
    /// Nobody has an idea.
    pub const NONE: Self = Self(-1.0);

    /// What the planner or the catalog says.
    pub fn of(rows: f64) -> Self {
        Self(rows)
    }

    /// The number of rows, where it is known and one.
    pub fn rows(self) -> Option<u64> {
        (0.0..i64::MAX as f64).contains(&self.0).then_some(self.0 as u64)
    }
}

/// Whether a MERGE has an action of that kind that would be taken on every row of a table that it scans whole.
///
/// # Safety
/// A plan that is being run with these parameters.
///
/// # Errors
/// What fetching a parameter raises.
pub unsafe fn merges_all(
    plan: *const pg_sys::ModifyTable,
    action: pg_sys::CmdType::Type,
    parameters: pg_sys::ParamListInfo,
    table: pg_sys::Index,
    relation: pg_sys::Relation,
) -> Result<bool, PgError> {
    // SAFETY: the caller's promise; the lists go by the plan's result relations.
    unsafe {
        let relations = (*plan).resultRelations;
        let count = if relations.is_null() { 0 } else { usize::try_from((*relations).length).unwrap_or(0) };
        let at = (0..count).find(|at| i64::from((*(*relations).elements.add(*at)).int_value) == i64::from(table));
        let actions = at.and_then(|at| pointers::<pg_sys::List>((*plan).mergeActionLists).nth(at));
        let reader = Reader { columns: &OfResult { table, relation }, parameters };
        for one in pointers::<pg_sys::MergeAction>(actions.unwrap_or(core::ptr::null_mut())) {
            if (*one).commandType == action
                && !reader.condition((*one).qual)?.narrows()
                && !is_matched_by_condition(plan, one, at.unwrap_or(0), &reader)?
            {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

/// Whether an action is for rows alone that the MERGE's own condition matches, and that narrows. Where there are actions
/// for rows that no source matches, all rows are scanned and the condition is looked at for each.
#[cfg(since_pg17)]
unsafe fn is_matched_by_condition(
    plan: *const pg_sys::ModifyTable,
    action: *const pg_sys::MergeAction,
    at: usize,
    reader: &Reader<OfResult>,
) -> Result<bool, PgError> {
    // SAFETY: as for `merges_all`.
    unsafe {
        if (*action).matchKind != pg_sys::MergeMatchKind::MERGE_WHEN_MATCHED {
            return Ok(false);
        }
        match pointers::<pg_sys::Node>((*plan).mergeJoinConditions).nth(at) {
            Some(condition) if !condition.is_null() => Ok(reader.condition(condition)?.narrows()),
            _ => Ok(false),
        }
    }
}

/// There is no action for rows that no source matches.
#[cfg(not(since_pg17))]
unsafe fn is_matched_by_condition(
    _plan: *const pg_sys::ModifyTable,
    _action: *const pg_sys::MergeAction,
    _at: usize,
    _reader: &Reader<OfResult>,
) -> Result<bool, PgError> {
    Ok(false)
}

/// The columns in a MERGE's actions: those of the target are its own.
struct OfResult {
    table: pg_sys::Index,
    relation: pg_sys::Relation,
}

impl Columns for OfResult {
    fn is_of_table(&self, column: *const pg_sys::Var) -> bool {
        // SAFETY: a column in an expression of the plan.
        unsafe { is_own(column, self.table) }
    }

    fn is_never_null(&self, column: *const pg_sys::Var) -> bool {
        // SAFETY: as above; the relation is open.
        unsafe { is_own(column, self.table) && is_never_null(self.relation, (*column).varattno) }
    }
}

struct Walk<'a> {
    parameters: pg_sys::ParamListInfo,
    wanted: Wanted<'a>,
    path: &'a mut Vec<Step>,
    whole: Vec<WholeScan>,
}

impl Walk<'_> {
    /// Looks at a node and all below it. Whether a wanted table is scanned there.
    unsafe fn visit(&mut self, plan: *mut pg_sys::Plan) -> Result<bool, PgError> {
        // SAFETY: the tag says what the node is.
        unsafe {
            if plan.is_null() {
                return Ok(false);
            }
            match (*plan).type_ {
                NodeTag::T_SeqScan
                | NodeTag::T_SampleScan
                | NodeTag::T_IndexScan
                | NodeTag::T_IndexOnlyScan
                | NodeTag::T_BitmapHeapScan
                | NodeTag::T_TidScan
                | NodeTag::T_TidRangeScan => self.scan(plan, (*plan.cast::<pg_sys::Scan>()).scanrelid),
                NodeTag::T_ForeignScan => self.foreign(plan.cast()),
                NodeTag::T_CustomScan => self.custom(plan.cast()),
                NodeTag::T_Append => self.below(plan, (*plan.cast::<pg_sys::Append>()).appendplans),
                NodeTag::T_MergeAppend => self.below(plan, (*plan.cast::<pg_sys::MergeAppend>()).mergeplans),
                NodeTag::T_SubqueryScan => self.step(plan, Via::Below, (*plan.cast::<pg_sys::SubqueryScan>()).subplan),
                _ => {
                    let outer = self.step(plan, Via::Outer, (*plan).lefttree)?;
                    Ok(self.step(plan, Via::Inner, (*plan).righttree)? || outer)
                }
            }
        }
    }

    unsafe fn step(&mut self, plan: *mut pg_sys::Plan, via: Via, to: *mut pg_sys::Plan) -> Result<bool, PgError> {
        self.path.push(Step { plan, via });
        // SAFETY: as for `visit`.
        let seen = unsafe { self.visit(to)? };
        self.path.pop();
        Ok(seen)
    }

    unsafe fn below(&mut self, plan: *mut pg_sys::Plan, plans: *mut pg_sys::List) -> Result<bool, PgError> {
        let mut seen = false;
        // SAFETY: as for `visit`.
        for one in unsafe { pointers(plans) } {
            // SAFETY: as for `visit`.
            seen |= unsafe { self.step(plan, Via::Outer, one)? };
        }
        Ok(seen)
    }

    /// Of a join that a foreign server executes, the plan shows the conditions only where it keeps a local plan for it.
    unsafe fn foreign(&mut self, plan: *mut pg_sys::ForeignScan) -> Result<bool, PgError> {
        // SAFETY: as for `visit`.
        unsafe {
            match (*plan).scan.scanrelid {
                0 if !(*plan).scan.plan.lefttree.is_null() => {
                    self.step(plan.cast(), Via::Outer, (*plan).scan.plan.lefttree)
                }
                0 => self.scan_all(plan.cast(), (*plan).fs_relids),
                table => self.scan(plan.cast(), table),
            }
        }
    }

    unsafe fn custom(&mut self, plan: *mut pg_sys::CustomScan) -> Result<bool, PgError> {
        // SAFETY: as for `visit`.
        unsafe {
            let mut seen = self.below(plan.cast(), (*plan).custom_plans)?;
            seen |= self.step(plan.cast(), Via::Outer, (*plan).scan.plan.lefttree)?;
            match (*plan).scan.scanrelid {
                _ if seen => Ok(true),
                0 => self.scan_all(plan.cast(), (*plan).custom_relids),
                table => self.scan(plan.cast(), table),
            }
        }
    }

    /// One node that scans several tables.
    unsafe fn scan_all(&mut self, plan: *mut pg_sys::Plan, tables: *const pg_sys::Bitmapset) -> Result<bool, PgError> {
        let (mut seen, mut table) = (false, -1);
        loop {
            // SAFETY: a set of range table places, or NULL.
            table = unsafe { pg_sys::bms_next_member(tables, table) };
            let Ok(place) = pg_sys::Index::try_from(table) else { return Ok(seen) };
            // SAFETY: as for `visit`.
            seen |= unsafe { self.scan(plan, place)? };
        }
    }

    unsafe fn scan(&mut self, plan: *mut pg_sys::Plan, table: pg_sys::Index) -> Result<bool, PgError> {
        let Some(relation) = (self.wanted)(table) else { return Ok(false) };
        self.path.push(Step { plan, via: Via::End });
        let target = Target { path: self.path, table, relation, parameters: self.parameters };
        // SAFETY: as for `visit`.
        if !unsafe { target.is_narrowed()? } {
            // SAFETY: as for `visit`.
            self.whole.push(WholeScan { table, estimate: unsafe { estimate(plan) }.rows() });
        }
        self.path.pop();
        Ok(true)
    }
}

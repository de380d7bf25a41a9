//! Policies with `require_where`: what happens to a write that would scan a whole table.
//!
//! Decided when the executor has started and before the first row, so nothing is counted yet; a flag or a token lifts it as
//! it lifts a limit.

use std::rc::Rc;

use pgrx::pg_sys;
use rules::limits::ledger::Past;
use rules::words::{Operation, Place};

use super::plan_path::Step;
use super::scan_filters;
use crate::guard::limits::binding::{Binding, Charge};
use crate::guard::limits::observe::Counted;
use crate::guard::rehearsal::policy_verdicts;
use crate::guard::verdict::decide::{self, Attempt};
use crate::guard::verdict::violation;
use crate::pg::backend_local::BackendLocal;
use crate::pg::ereport::Failure;
use crate::session::{actor, rehearsing, settings, statement};
use crate::undo::in_progress;

/// Room for the path to a scan, used again and again.
static PATH: BackendLocal<Vec<Step>> = BackendLocal::new(Vec::new());

/// Decides about the tables that a node would scan whole although a policy wants a condition, before the first row.
///
/// # Safety
/// A node of a query that was just started, with the bindings of its result relations.
///
/// # Errors
/// WG002 or WG006, or what stood in the way of deciding.
#[inline]
pub unsafe fn require_where(
    estate: *mut pg_sys::EState,
    node: *mut pg_sys::ModifyTableState,
    operations: &[Operation],
    bindings: &[Option<Rc<Binding>>],
) -> Result<(), Failure> {
    if bindings.iter().flatten().any(|binding| binding.wants_any_where()) {
        // SAFETY: the caller's promise.
        return unsafe { look_for_whole_scans(estate, node, operations, bindings) };
    }
    Ok(())
}

#[cold]
unsafe fn look_for_whole_scans(
    estate: *mut pg_sys::EState,
    node: *mut pg_sys::ModifyTableState,
    operations: &[Operation],
    bindings: &[Option<Rc<Binding>>],
) -> Result<(), Failure> {
    let wants = |binding: &Binding| operations.iter().any(|operation| binding.wants_where(*operation));
    if !bindings.iter().flatten().any(|binding| wants(binding)) {
        return Ok(());
    }
    // SAFETY: a node of the query that was just started; it has not run.
    unsafe {
        let plan: *mut pg_sys::ModifyTable = (*node).ps.plan.cast();
        let parameters = (*estate).es_param_list_info;
        let find = |table: pg_sys::Index| {
            let target = |index: usize| (*node).resultRelInfo.add(index);
            let mut covered =
                bindings.iter().enumerate().filter_map(|(index, binding)| Some((index, binding.as_ref()?)));
            covered
                .find(|(index, binding)| (*target(*index)).ri_RangeTableIndex == table && wants(binding))
                .map(|(index, binding)| ((*target(index)).ri_RelationDesc, binding))
        };
        let relation = |table| find(table).map(|(relation, _)| relation);
        let mut path = core::mem::take(&mut *PATH.borrow());
        let whole = scan_filters::whole_scans((*plan).plan.lefttree, parameters, &relation, &mut path)?;
        *PATH.borrow() = path;
        for scan in whole {
            let Some((relation, binding)) = find(scan.table) else { continue };
            for operation in operations.iter().filter(|operation| binding.wants_where(**operation)) {
                let action = match operation {
                    Operation::Delete => pg_sys::CmdType::CMD_DELETE,
                    _ => pg_sys::CmdType::CMD_UPDATE,
                };
                if (*node).operation != pg_sys::CmdType::CMD_MERGE
                    || scan_filters::merges_all(plan, action, parameters, scan.table, relation)?
                {
                    refuse_whole(binding, *operation, scan.estimate)?;
                }
            }
        }
        Ok(())
    }
}

/// Refuses a write that would scan a whole table, unless each policy that wants a condition is lifted. It belongs to the
/// client's command that is about to run.
fn refuse_whole(binding: &Binding, operation: Operation, estimate: Option<u64>) -> Result<(), Failure> {
    if in_progress::is_on() {
        return Ok(());
    }
    let wanting = || binding.charges(operation).iter().filter(|charge| charge.policy.policy.wants_where());
    if rehearsing::is_on() {
        for charge in wanting() {
            policy_verdicts::note(&charge.policy, &binding.relation, operation, true, None);
        }
        if wanting().any(|charge| charge.policy.policy.mode.refuses()) {
            policy_verdicts::note_refused_without_rows();
        }
        return Ok(());
    }
    actor::use_armed();
    // SAFETY: called inside the executor's start.
    unsafe {
        statement::about_to_run(|place| {
            wanting().try_for_each(|charge| decide_whole(binding, operation, charge, place, estimate))
        })
    }
}

/// Decides about it for one policy.
fn decide_whole(
    binding: &Binding,
    operation: Operation,
    charge: &Charge,
    place: Place,
    estimate: Option<u64>,
) -> Result<(), Failure> {
    if !settings::enabled() {
        if !decide::knows_disabled(place.statement) {
            decide::record_disabled(&binding.relation, operation, place.statement);
        }
        return Ok(());
    }
    let attempt = Attempt {
        relation: &binding.relation,
        operation,
        policy: &charge.policy,
        meter: charge.meter,
        past: Past::Unnarrowed,
        place,
        estimate,
    };
    if !charge.policy.policy.mode.refuses() {
        return Ok(violation::note(&attempt, Counted::Statement, None)?);
    }
    violation::decided(binding, operation, place.statement, decide::decide(&attempt))?;
    violation::check_grant(&attempt)
}

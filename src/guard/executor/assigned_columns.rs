//! The columns that an update assigns, for policies that count only updates of some: those of its SET list, or of the ON
//! CONFLICT's or MERGE's. What a trigger changes besides is none of them, nor is what is computed from them.

use std::rc::Rc;

use pgrx::pg_sys;

use crate::guard::limits::binding::Binding;
use crate::pg::encoding;
use crate::pg::ffi::pointers;

/// A relation's binding for what a node assigns: the same, where no policy asks for that. Of a MERGE all its updates
/// together: that one of them assigns a column is enough.
///
/// # Safety
/// A node of a query that was started, and the place of one of its result relations; where that is a partition which its
/// rows were routed to, that of its root, whose columns the plan names.
pub unsafe fn narrowed(
    binding: Rc<Binding>,
    node: *mut pg_sys::ModifyTableState,
    target: *mut pg_sys::ResultRelInfo,
    place: usize,
) -> Rc<Binding> {
    if !binding.is_by_columns() {
        return binding;
    }
    // SAFETY: the caller's promise; lists of the plan live as long as it does.
    unsafe {
        let plan: *mut pg_sys::ModifyTable = (*node).ps.plan.cast();
        let relation = (*(*target).ri_RelationDesc).rd_id;
        let names = |assigned: &[i32]| names(relation, assigned);
        match (*node).operation {
            pg_sys::CmdType::CMD_UPDATE => {
                let list = pointers::<pg_sys::List>(update_lists(node)).nth(place);
                list.map_or_else(|| Rc::clone(&binding), |list| binding.narrowed(relation, numbers(list), names))
            }
            pg_sys::CmdType::CMD_INSERT => binding.narrowed(relation, numbers((*plan).onConflictCols), names),
            pg_sys::CmdType::CMD_MERGE => {
                let Some(actions) = pointers::<pg_sys::List>(merge_lists(node)).nth(place) else {
                    return binding;
                };
                let updates = pointers::<pg_sys::MergeAction>(actions)
                    .filter(|action| (**action).commandType == pg_sys::CmdType::CMD_UPDATE);
                binding.narrowed(relation, updates.flat_map(|action| numbers((*action).updateColnos)), names)
            }
            _ => binding,
        }
    }
}

/// By result relation: the columns that an UPDATE assigns. From 18 on the plan has relations that are pruned when it starts.
///
/// # Safety
/// A node of a query that was started.
unsafe fn update_lists(node: *mut pg_sys::ModifyTableState) -> *mut pg_sys::List {
    // SAFETY: the caller's promise.
    unsafe {
        #[cfg(not(since_pg18))]
        return (*(*node).ps.plan.cast::<pg_sys::ModifyTable>()).updateColnosLists;
        #[cfg(since_pg18)]
        return (*node).mt_updateColnosLists;
    }
}

/// By result relation: the actions of a MERGE.
///
/// # Safety
/// A node of a query that was started.
unsafe fn merge_lists(node: *mut pg_sys::ModifyTableState) -> *mut pg_sys::List {
    // SAFETY: the caller's promise.
    unsafe {
        #[cfg(not(since_pg18))]
        return (*(*node).ps.plan.cast::<pg_sys::ModifyTable>()).mergeActionLists;
        #[cfg(since_pg18)]
        return (*node).mt_mergeActionLists;
    }
}

/// The elements of a list of integers.
///
/// # Safety
/// NULL or such a list, which lives as long as the iterator.
unsafe fn numbers(list: *mut pg_sys::List) -> impl Iterator<Item = i32> + Clone {
    // SAFETY: the caller's promise.
    let length = if list.is_null() { 0 } else { usize::try_from(unsafe { (*list).length }).unwrap_or(0) };
    // SAFETY: as above, for the elements that it has.
    (0..length).map(move |index| unsafe { (*(*list).elements.add(index)).int_value })
}

/// The names of a relation's columns.
fn names(relation: pg_sys::Oid, numbers: &[i32]) -> Vec<String> {
    // SAFETY: a syscache look-up that gives NULL for what is not there.
    unsafe {
        let name = |number: &i32| {
            let number = pg_sys::AttrNumber::try_from(*number).unwrap_or(0);
            let name = pg_sys::get_attname(relation, number, true);
            encoding::from_c(name)
        };
        numbers.iter().filter_map(name).collect()
    }
}

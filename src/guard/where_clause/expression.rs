//! Reads the expressions of a plan as conditions on the rows of one table.
//!
//! The planner has folded what is constant already. What is left to do is what it does with a custom plan and cannot do
//! with a generic one (parameters have values by now), and a few conditions that are true for every row as they stand.
//! No function is called, but for comparisons that cannot fail: an error that the statement would not raise is none of
//! ours to raise.

use core::ptr;

use pgrx::pg_sys::{self, NodeTag};
use rules::condition::Condition;

use crate::pg::ffi::{self, PgError, pointers};

/// What the columns in an expression are, where it stands in the plan.
pub trait Columns {
    /// Whether the column is one of the table's, or is made of them.
    fn is_of_table(&self, column: *const pg_sys::Var) -> bool;
    /// Whether it is one of the table's own that is never NULL.
    fn is_never_null(&self, column: *const pg_sys::Var) -> bool;
}

/// An expression's reader: what its columns are, and the parameters that the plan is run with.
pub struct Reader<'a, C> {
    pub columns: &'a C,
    pub parameters: pg_sys::ParamListInfo,
}

impl<C: Columns> Reader<'_, C> {
    /// A list of conditions that have to hold together.
    ///
    /// # Safety
    /// A list of expressions from a plan that is being run.
    pub unsafe fn all(&self, list: *mut pg_sys::List) -> Result<Condition, PgError> {
        // SAFETY: the caller's promise.
        unsafe { pointers(list).try_fold(Condition::TRUE, |all, part| Ok(all.and(self.condition(part)?))) }
    }

    /// One condition.
    ///
    /// # Safety
    /// NULL or an expression from a plan that is being run.
    pub unsafe fn condition(&self, node: *mut pg_sys::Node) -> Result<Condition, PgError> {
        if node.is_null() {
            return Ok(Condition::TRUE);
        }
        // SAFETY: the tag says what the node is.
        unsafe {
            match (*node).type_ {
                NodeTag::T_List => self.all(node.cast()),
                NodeTag::T_CurrentOfExpr => Ok(Condition::Narrows),
                NodeTag::T_Const | NodeTag::T_Param => Ok(match self.constant(node)? {
                    Some(constant) => Condition::Known((!constant.null).then(|| constant.value.value() != 0)),
                    None => Condition::Blind,
                }),
                NodeTag::T_BoolExpr => self.boolean(node.cast()),
                NodeTag::T_NullTest => self.null_test(node.cast()),
                NodeTag::T_BooleanTest => self.boolean_test(node.cast()),
                NodeTag::T_OpExpr | NodeTag::T_DistinctExpr => self.operator(node.cast()),
                _ => Ok(self.dependent(node)),
            }
        }
    }

    unsafe fn boolean(&self, node: *mut pg_sys::BoolExpr) -> Result<Condition, PgError> {
        // SAFETY: as for `condition`.
        unsafe {
            let parts = (*node).args;
            match (*node).boolop {
                pg_sys::BoolExprType::OR_EXPR => {
                    pointers(parts).try_fold(Condition::FALSE, |any, part| Ok(any.or(self.condition(part)?)))
                }
                pg_sys::BoolExprType::NOT_EXPR => Ok(self.all(parts)?.negated()),
                _ => self.all(parts),
            }
        }
    }

    unsafe fn null_test(&self, node: *mut pg_sys::NullTest) -> Result<Condition, PgError> {
        // SAFETY: as for `condition`.
        unsafe {
            let wanted = (*node).nulltesttype == pg_sys::NullTestType::IS_NULL;
            let argument = self.peel((*node).arg.cast())?;
            Ok(match self.nullness(argument)? {
                Some(null) if !(*node).argisrow => Condition::Known(Some(null == wanted)),
                _ => self.dependent(argument),
            })
        }
    }

    unsafe fn boolean_test(&self, node: *mut pg_sys::BooleanTest) -> Result<Condition, PgError> {
        // SAFETY: as for `condition`.
        unsafe {
            let test = (*node).booltesttype;
            let test = |value: Option<bool>| {
                Some(match test {
                    pg_sys::BoolTestType::IS_TRUE => value == Some(true),
                    pg_sys::BoolTestType::IS_NOT_TRUE => value != Some(true),
                    pg_sys::BoolTestType::IS_FALSE => value == Some(false),
                    pg_sys::BoolTestType::IS_NOT_FALSE => value != Some(false),
                    pg_sys::BoolTestType::IS_UNKNOWN => value.is_none(),
                    _ => value.is_some(),
                })
            };
            Ok(self.condition((*node).arg.cast())?.mapped(test))
        }
    }

    /// An operator, or IS DISTINCT FROM. A column compared with itself says only whether it is NULL.
    unsafe fn operator(&self, node: *mut pg_sys::OpExpr) -> Result<Condition, PgError> {
        // SAFETY: as for `condition`; both nodes have the same layout.
        unsafe {
            let mut arguments = pointers::<pg_sys::Node>((*node).args);
            let (Some(left), Some(right)) = (arguments.next(), arguments.next()) else {
                return Ok(self.dependent(node.cast()));
            };
            let (left, right) = (self.peel(left)?, self.peel(right)?);
            let distinct = (*node).xpr.type_ == NodeTag::T_DistinctExpr;
            for side in [left, right] {
                if !distinct && is_given(side) && self.nullness(side)? == Some(true) && pg_sys::op_strict((*node).opno)
                {
                    return Ok(Condition::Known(None));
                }
            }
            if !distinct && let Some(value) = self.compared(node, left, right)? {
                return Ok(Condition::Known(value));
            }
            if (*left).type_ == NodeTag::T_Var && pg_sys::equal(left.cast(), right.cast()) {
                if distinct {
                    return Ok(Condition::FALSE);
                }
                if self.columns.is_never_null(left.cast()) && holds_for_equals((*node).opno) {
                    return Ok(Condition::TRUE);
                }
            }
            Ok(self.dependent(node.cast()))
        }
    }

    /// What an operator gives for two constants, where it is immutable and leakproof, so that it never fails.
    #[expect(ffi_unwind_calls, reason = "inside protect")]
    unsafe fn compared(
        &self,
        node: *const pg_sys::OpExpr,
        left: *mut pg_sys::Node,
        right: *mut pg_sys::Node,
    ) -> Result<Option<Option<bool>>, PgError> {
        // SAFETY: as for `condition`; the operator takes what its arguments are, and both are there.
        unsafe {
            let function = (*node).opfuncid;
            let (Some(left), Some(right)) = (self.constant(left)?, self.constant(right)?) else { return Ok(None) };
            if left.null
                || right.null
                || (*node).opresulttype != pg_sys::BOOLOID
                || (*node).opretset
                || function == pg_sys::InvalidOid
                || pg_sys::func_volatile(function) as u8 != pg_sys::PROVOLATILE_IMMUTABLE
                || !pg_sys::get_func_leakproof(function)
                || !pg_sys::func_strict(function)
            {
                return Ok(None);
            }
            let collation = (*node).inputcollid;
            let mut holds = pg_sys::Datum::from(0);
            ffi::protect(|| holds = ffi::OidFunctionCall2Coll(function, collation, left.value, right.value))?;
            Ok(Some(Some(holds.value() != 0)))
        }
    }

    /// A condition of which no more is known than which columns it looks at.
    unsafe fn dependent(&self, node: *mut pg_sys::Node) -> Condition {
        // SAFETY: as for `condition`.
        if unsafe { self.looks(node) } { Condition::Narrows } else { Condition::Blind }
    }

    /// Whether an expression looks at the table's columns.
    ///
    /// # Safety
    /// As for [`Reader::condition`].
    pub unsafe fn looks(&self, node: *mut pg_sys::Node) -> bool {
        // SAFETY: the caller's promise. Correlated subplans have what they look at among their arguments.
        unsafe {
            match (*node).type_ {
                NodeTag::T_Var => self.columns.is_of_table(node.cast()),
                NodeTag::T_Const | NodeTag::T_Param => false,
                NodeTag::T_OpExpr => pointers((*node.cast::<pg_sys::OpExpr>()).args).any(|part| self.looks(part)),
                NodeTag::T_RelabelType => self.looks((*node.cast::<pg_sys::RelabelType>()).arg.cast()),
                _ => {
                    let whole = pg_sys::PVC_RECURSE_AGGREGATES
                        | pg_sys::PVC_RECURSE_WINDOWFUNCS
                        | pg_sys::PVC_RECURSE_PLACEHOLDERS;
                    let columns = pg_sys::pull_var_clause(node, whole as i32);
                    let looks = pointers::<pg_sys::Var>(columns).any(|column| self.columns.is_of_table(column));
                    pg_sys::list_free(columns);
                    looks
                }
            }
        }
    }

    /// The expression whose value this one has: without changes of label, and of COALESCE what is left when the NULLs
    /// in front are gone.
    unsafe fn peel(&self, mut node: *mut pg_sys::Node) -> Result<*mut pg_sys::Node, PgError> {
        // SAFETY: as for `condition`.
        unsafe {
            loop {
                match (*node).type_ {
                    NodeTag::T_RelabelType => node = (*node.cast::<pg_sys::RelabelType>()).arg.cast(),
                    NodeTag::T_CoalesceExpr => match self.coalesced(node.cast())? {
                        Some(value) => node = value,
                        None => return Ok(node),
                    },
                    _ => return Ok(node),
                }
            }
        }
    }

    /// The one argument that a COALESCE comes down to, where that is known.
    unsafe fn coalesced(&self, node: *mut pg_sys::CoalesceExpr) -> Result<Option<*mut pg_sys::Node>, PgError> {
        // SAFETY: as for `condition`.
        let mut left = unsafe { pointers::<pg_sys::Node>((*node).args) }.peekable();
        while let Some(argument) = left.next() {
            let is_last = left.peek().is_none();
            // SAFETY: as above.
            match unsafe { self.nullness(argument) }? {
                Some(true) if !is_last => {}
                Some(_) => return Ok(Some(argument)),
                None => return Ok(is_last.then_some(argument)),
            }
        }
        Ok(None)
    }

    /// Whether an expression is NULL, where that is known and the same for every row.
    unsafe fn nullness(&self, node: *mut pg_sys::Node) -> Result<Option<bool>, PgError> {
        // SAFETY: as for `condition`.
        unsafe {
            Ok(match (*node).type_ {
                NodeTag::T_Var => self.columns.is_never_null(node.cast()).then_some(false),
                _ => self.constant(node)?.map(|constant| constant.null),
            })
        }
    }

    /// The value of a constant, or of a parameter that the plan is run with.
    unsafe fn constant(&self, node: *mut pg_sys::Node) -> Result<Option<Constant>, PgError> {
        // SAFETY: as for `condition`; the parameters are those of the query.
        unsafe {
            match (*node).type_ {
                NodeTag::T_Const => {
                    let constant: *mut pg_sys::Const = node.cast();
                    Ok(Some(Constant { null: (*constant).constisnull, value: (*constant).constvalue }))
                }
                NodeTag::T_Param => self.parameter(node.cast()),
                _ => Ok(None),
            }
        }
    }

    #[expect(ffi_unwind_calls, reason = "inside protect")]
    unsafe fn parameter(&self, node: *const pg_sys::Param) -> Result<Option<Constant>, PgError> {
        let list = self.parameters;
        // SAFETY: the parameters are those of the query; a hook that fetches them is called as core calls it.
        unsafe {
            let number = (*node).paramid;
            if (*node).paramkind != pg_sys::ParamKind::PARAM_EXTERN
                || list.is_null()
                || number < 1
                || number > (*list).numParams
            {
                return Ok(None);
            }
            let mut given = pg_sys::ParamExternData::default();
            match (*list).paramFetch {
                None => given = *(*list).params.as_ptr().add(usize::try_from(number - 1).unwrap_or(0)),
                Some(fetch) => {
                    let room = &raw mut given;
                    let mut found = ptr::null_mut();
                    ffi::protect(|| found = fetch(list, number, true, room))?;
                    if !found.is_null() {
                        given = *found;
                    }
                }
            }
            let is_there = given.ptype == (*node).paramtype;
            Ok(is_there.then_some(Constant { null: given.isnull, value: given.value }))
        }
    }
}

/// A value that is the same for every row.
struct Constant {
    null: bool,
    value: pg_sys::Datum,
}

/// Whether the expression is a constant or a parameter.
unsafe fn is_given(node: *const pg_sys::Node) -> bool {
    // SAFETY: an expression from a plan.
    matches!(unsafe { (*node).type_ }, NodeTag::T_Const | NodeTag::T_Param)
}

/// Whether an operator is true of any value and itself: `=`, `<=` and `>=` as B-trees understand them.
#[cfg(not(since_pg18))]
unsafe fn holds_for_equals(operator: pg_sys::Oid) -> bool {
    // SAFETY: catalog look-ups; the result is a list of its own.
    unsafe {
        pointers::<pg_sys::OpBtreeInterpretation>(pg_sys::get_op_btree_interpretation(operator)).any(|meaning| {
            let strategy = u32::try_from((*meaning).strategy).unwrap_or(0);
            [pg_sys::BTLessEqualStrategyNumber, pg_sys::BTEqualStrategyNumber, pg_sys::BTGreaterEqualStrategyNumber]
                .contains(&strategy)
        })
    }
}

/// Whether an operator is true of any value and itself: `=`, `<=` and `>=` as indexes understand them.
#[cfg(since_pg18)]
unsafe fn holds_for_equals(operator: pg_sys::Oid) -> bool {
    // SAFETY: catalog look-ups; the result is a list of its own.
    unsafe {
        pointers::<pg_sys::OpIndexInterpretation>(pg_sys::get_op_index_interpretation(operator)).any(|meaning| {
            [pg_sys::CompareType::COMPARE_LE, pg_sys::CompareType::COMPARE_EQ, pg_sys::CompareType::COMPARE_GE]
                .contains(&(*meaning).cmptype)
        })
    }
}

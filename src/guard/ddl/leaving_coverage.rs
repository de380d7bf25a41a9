//! Tables that leave a policy's names: those policies that covered them and do not name them any more are charged with all
//! their rows.
//!
//! What covers a table is looked up while its old names are still visible, and compared with its names after the command.
//! Where policies that still name it are set aside by others that allow more, because those name it more closely now (by a
//! new name, or a new parent's), that is recorded as well.

use std::rc::Rc;

use pgrx::pg_sys;
use rules::error::Error;
use rules::policy::model::Policy;
use rules::policy::resolve::{self, Target};
use rules::words::Operation;

use super::live_rows;
use crate::guard::limits::binding::{Binding, Charge};
use crate::guard::limits::bindings;
use crate::guard::verdict::decide;
use crate::pg::ereport::Failure;
use crate::pg::ffi::{self, PgError};
use crate::policy::relation::{never_covered, relation_name, with_descendants};
use crate::policy::table::Loaded;
use crate::policy::target::{self, Link};
use crate::session::actor::Actor;

/// A table whose names may change.
pub struct Leaving {
    relation: pg_sys::Oid,
    before: Before,
}

/// What covers it under its old names.
enum Before {
    Covered(Rc<Binding>),
    /// That is not known: its names, and why.
    Unknown(Box<(Target, Error)>),
}

/// The names of tables, or a link to a parent, are about to change, and with them those of all that is below. Gives
/// those that a policy covers.
///
/// # Errors
/// A foreign error when reading the policies was interrupted.
pub fn candidates(tables: &[pg_sys::Oid], mut found: impl FnMut(Leaving)) -> Result<(), Failure> {
    for table in tables {
        for relation in with_descendants(*table) {
            if never_covered(relation).is_some() {
                continue;
            }
            match bindings::binding(relation, Actor::current()) {
                Ok(Some(binding)) => found(Leaving { relation, before: Before::Covered(binding) }),
                Ok(None) => {}
                Err(Failure::Ours(error @ Error::Undecided { .. })) => {
                    if let Some(target) = target::coverable(relation, None) {
                        found(Leaving { relation, before: Before::Unknown(Box::new((target, error))) });
                    }
                }
                Err(failure) => return Err(failure),
            }
        }
    }
    Ok(())
}

/// The command is done: charges the rows of those that left. `counted` are tables that were charged already.
///
/// # Errors
/// WG005 past a limit, WG008 where policies cannot be read and a name changed.
pub fn decide(leaving: Vec<Leaving>, counted: Vec<pg_sys::Oid>) -> Result<(), Failure> {
    // What the command did becomes visible, as it would for the next one.
    // SAFETY: between commands; what it raises unwinds to the guard around us.
    unsafe { pg_sys::CommandCounterIncrement() };
    let mut decided = counted;
    for Leaving { relation, before } in leaving {
        match before {
            Before::Covered(before) if !decided.contains(&relation) && relation_name(relation).is_some() => {
                decided.push(relation);
                if !leave(relation, &before, target::coverable(relation, None).as_ref())? {
                    loosen(relation, &before)?;
                }
            }
            // Under its old names nothing can have left; and into the extension's schema it goes to be mended.
            Before::Unknown(before) if target::coverable(relation, None).is_some_and(|after| after != before.0) => {
                return Err(before.1.into());
            }
            _ => {}
        }
    }
    Ok(())
}

/// Charges the rows of a table to those of the policies that covered it which do not name it any more. `after`: the
/// names it then has, none where no policy can cover it. Says whether there are such policies.
fn leave(relation: pg_sys::Oid, before: &Binding, after: Option<&Target>) -> Result<bool, Failure> {
    let why = "Out of the policy's names, its rows would not be limited any more.";
    let left = |policy: &Loaded| after.is_none_or(|after| !resolve::names(&policy.policy, after));
    let leaving = before.only(Operation::Drop, left);
    if leaving.charges(Operation::Drop).is_empty() {
        let policy = before.policies().find(|policy| left(policy));
        if let Some(policy) = policy {
            decide::record_uncovered(&before.name, Some(&policy.policy.name), why)?;
        }
        return Ok(policy.is_some());
    }
    // SAFETY: in the command's transaction.
    unsafe {
        if pg_sys::get_rel_relkind(relation) as u8 != pg_sys::RELKIND_RELATION {
            // The rows are in other tables.
            return Ok(true);
        }
        let charge = || live_rows::charge(&leaving, Operation::Drop, relation);
        live_rows::with_lock(relation, || charge().map_err(|failure| failure.explained(why)))?;
    }
    Ok(true)
}

/// How much an operation may change under all policies that refuse anything: the smallest of each limit.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Allowed {
    rows: u64,
    rows_per_transaction: u64,
    /// Rows in a microsecond, and at once.
    rate: (f64, u64),
    fraction: f64,
    without_where: bool,
    without_transaction: bool,
}

impl Allowed {
    fn by<'a>(policies: impl Iterator<Item = &'a Policy>) -> Self {
        let all = Self {
            rows: u64::MAX,
            rows_per_transaction: u64::MAX,
            rate: (f64::INFINITY, u64::MAX),
            fraction: f64::INFINITY,
            without_where: true,
            without_transaction: true,
        };
        policies.filter(|policy| policy.mode.refuses()).fold(all, |allowed, policy| {
            let rate = policy.rate.map_or(allowed.rate, |rate| (rate.rows as f64 / rate.interval as f64, rate.rows));
            Self {
                rows: allowed.rows.min(policy.max_rows.unwrap_or(u64::MAX)),
                rows_per_transaction: allowed
                    .rows_per_transaction
                    .min(policy.max_rows_per_transaction.unwrap_or(u64::MAX)),
                rate: (allowed.rate.0.min(rate.0), allowed.rate.1.min(rate.1)),
                fraction: allowed.fraction.min(policy.max_fraction.unwrap_or(f64::INFINITY)),
                without_where: allowed.without_where && !policy.wants_where(),
                without_transaction: allowed.without_transaction && !policy.wants_transaction(),
            }
        })
    }

    fn is_more_than(self, other: Self) -> bool {
        self.rows > other.rows
            || self.rows_per_transaction > other.rows_per_transaction
            || self.rate.0 > other.rate.0
            || self.rate.1 > other.rate.1
            || self.fraction > other.fraction
            || self.without_where && !other.without_where
            || self.without_transaction && !other.without_transaction
    }
}

/// Records that a table came under policies that allow more than those that covered it, which name it still: a new name,
/// or a new parent's, is closer than theirs.
fn loosen(relation: pg_sys::Oid, before: &Binding) -> Result<(), Failure> {
    let after = bindings::binding(relation, Actor::current())?;
    for operation in Operation::ALL {
        let charges = |binding: &'_ Binding| binding.charges(operation).to_vec();
        let (old, new) = (charges(before), after.as_deref().map_or_else(Vec::new, charges));
        let allowed = |charges: &[Charge]| Allowed::by(charges.iter().map(|charge| &charge.policy.policy));
        let is_as_before = |old: &&Charge| {
            let policy = &old.policy.policy;
            let mut same = new.iter().filter(|new| new.policy.policy.name == policy.name);
            same.any(|new| new.policy.policy.states().contain_all(policy.states()))
        };
        let set_aside = old.iter().find(|old| !is_as_before(old));
        if let Some(set_aside) = set_aside
            && allowed(&new).is_more_than(allowed(&old))
        {
            let why = "Another policy, which names it more closely now, allows more.";
            decide::record_uncovered(&before.name, Some(&set_aside.policy.policy.name), why)?;
            return Ok(());
        }
    }
    Ok(())
}

/// Before a partition is detached concurrently from its parent, for those who may do that: the command commits on its way.
///
/// # Safety
/// Both are the command's own names.
///
/// # Errors
/// WG005 past a limit; what the command itself would raise.
pub unsafe fn before_detach(parent: *mut pg_sys::RangeVar, partition: *mut pg_sys::RangeVar) -> Result<(), Failure> {
    // SAFETY: look-ups that give InvalidOid for what is not there.
    unsafe {
        let (parent, child) = (visible_relation(parent)?, visible_relation(partition)?);
        if parent == pg_sys::InvalidOid || child == pg_sys::InvalidOid || !owns(parent) {
            return Ok(());
        }
        let link = Link { child, parent };
        for relation in with_descendants(child) {
            if let Some(before) = bindings::binding(relation, Actor::current())? {
                leave(relation, &before, target::coverable(relation, Some(link)).as_ref())?;
            }
        }
    }
    Ok(())
}

#[expect(ffi_unwind_calls, reason = "inside protect")]
unsafe fn visible_relation(name: *mut pg_sys::RangeVar) -> Result<pg_sys::Oid, PgError> {
    let missing_ok = pg_sys::RVROption::RVR_MISSING_OK;
    let no_lock = pg_sys::NoLock as pg_sys::LOCKMODE;
    let mut found = pg_sys::InvalidOid;
    // SAFETY: the caller's promise; what this raises the command would raise as well.
    unsafe {
        ffi::protect(|| {
            found = ffi::RangeVarGetRelidExtended(name, no_lock, missing_ok, None, core::ptr::null_mut());
        })?;
    }
    Ok(found)
}

#[cfg(not(since_pg16))]
unsafe fn owns(relation: pg_sys::Oid) -> bool {
    // SAFETY: the relation is there.
    unsafe { pg_sys::pg_class_ownercheck(relation, pg_sys::GetUserId()) }
}

#[cfg(since_pg16)]
unsafe fn owns(relation: pg_sys::Oid) -> bool {
    // SAFETY: the relation is there.
    unsafe { pg_sys::object_ownercheck(pg_sys::RelationRelationId, relation, pg_sys::GetUserId()) }
}

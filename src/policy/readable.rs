//! Which columns of a row somebody may see: those that they could read by SELECT.

use core::ffi::CStr;

use pgrx::pg_sys;

/// Somebody, and the relations by way of which they could read a row: its own, and those that the command names or that it
/// is below.
pub struct Reader {
    role: pg_sys::Oid,
    tables: Vec<pg_sys::Oid>,
}

impl Reader {
    /// None where row security stands between, which would have to be asked for each row.
    pub fn new(role: pg_sys::Oid, tables: impl IntoIterator<Item = pg_sys::Oid>) -> Option<Self> {
        let tables: Vec<pg_sys::Oid> = tables.into_iter().filter(|table| *table != pg_sys::InvalidOid).collect();
        // SAFETY: look-ups in catalogs.
        let applies =
            |table: &pg_sys::Oid| unsafe { pg_sys::check_enable_rls(*table, role, true) == ROW_SECURITY_APPLIES };
        (!tables.iter().any(applies)).then_some(Self { role, tables })
    }

    /// Whether they may see the column of that name. The privileges of a relation are not for columns that it lacks: a
    /// child may have more than its parent.
    pub fn may_see(&self, column: &CStr) -> bool {
        let select = pg_sys::ACL_SELECT as pg_sys::AclMode;
        let granted = pg_sys::AclResult::ACLCHECK_OK;
        self.tables.iter().any(|table| {
            // SAFETY: look-ups in catalogs.
            unsafe {
                let number = pg_sys::get_attnum(*table, column.as_ptr());
                number > 0
                    && (pg_sys::pg_class_aclcheck(*table, self.role, select) == granted
                        || pg_sys::pg_attribute_aclcheck(*table, number, self.role, select) == granted)
            }
        })
    }
}

/// `RLS_ENABLED` of core's `rls.h`.
const ROW_SECURITY_APPLIES: core::ffi::c_int = 2;

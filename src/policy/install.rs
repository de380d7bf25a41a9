//! What the install script calls, once.

use pgrx::pg_sys;

use super::relation::dependents_of_schema;
use super::table::SCHEMA;
use crate::error::Error;
use crate::function::{Arguments, Returns, sql_function};
use crate::owner;
use crate::session::role_name;

sql_function!(
    /// `assert_installable()`: raises 55000 unless the library was preloaded, WG007 unless the schema can be trusted.
    writeguard_assert_installable, pg_finfo_writeguard_assert_installable, assert_installable
);
sql_function!(
    /// `revoke_default_privileges()`: leaves nobody but the owner any privilege on what the script made.
    writeguard_revoke_default_privileges, pg_finfo_writeguard_revoke_default_privileges, revoke_default_privileges
);

/// A schema that was there before must belong to somebody who could have made it through CREATE EXTENSION, because its
/// owner may rename and drop it; and what is in it could take the place of what the script means.
fn assert_installable(arguments: &Arguments) -> Returns {
    // SAFETY: syscache look-ups; the schema is there, because this function is in it.
    let (schema, owner, trusted) = unsafe {
        let schema = pg_sys::get_namespace_oid(SCHEMA.as_ptr(), false);
        let tuple = pg_sys::SearchSysCache1(pg_sys::SysCacheIdentifier::NAMESPACEOID as i32, schema.into());
        let owner = (*pg_sys::GETSTRUCT(tuple).cast::<pg_sys::FormData_pg_namespace>()).nspowner;
        pg_sys::ReleaseSysCache(tuple);
        (schema, owner, owner == pg_sys::GetUserId() || pg_sys::superuser_arg(owner))
    };
    if !trusted {
        return Err(Error::Invalid {
            message: "schema \"writeguard\" is there already and belongs to somebody else".into(),
            detail: Some(format!("Its owner \"{}\" could rename or drop it.", role_name(owner))),
            hint: "ALTER SCHEMA writeguard OWNER TO CURRENT_USER;".into(),
        }
        .into());
    }
    // SAFETY: set while an extension's script runs.
    let own = [arguments.function(), unsafe { pg_sys::CurrentExtensionObject }];
    if dependents_of_schema(schema).iter().any(|object| !own.contains(object)) {
        return Err(Error::Invalid {
            message: "schema \"writeguard\" is there already and not empty".into(),
            detail: None,
            hint: "DROP SCHEMA writeguard CASCADE; (after a look at what is in it)".into(),
        }
        .into());
    }
    Ok(None)
}

const GRANTEES: &str = "SELECT pg_catalog.format('REVOKE ALL ON %s FROM %I', o.name, g.rolname) FROM ( \
       SELECT pg_catalog.format('SCHEMA %I', n.nspname) AS name, n.nspacl AS acl, n.nspowner AS owner \
       FROM pg_catalog.pg_namespace AS n WHERE n.oid OPERATOR(pg_catalog.=) $1 \
       UNION ALL \
       SELECT CASE WHEN c.relkind OPERATOR(pg_catalog.=) 'S' THEN 'SEQUENCE ' ELSE 'TABLE ' END \
         OPERATOR(pg_catalog.||) c.oid::pg_catalog.regclass::pg_catalog.text, c.relacl, c.relowner \
       FROM pg_catalog.pg_class AS c WHERE c.relnamespace OPERATOR(pg_catalog.=) $1 \
         AND c.relkind OPERATOR(pg_catalog.=) ANY ('{r,v,S}') \
       UNION ALL \
       SELECT 'FUNCTION ' OPERATOR(pg_catalog.||) p.oid::pg_catalog.regprocedure::pg_catalog.text, p.proacl, p.proowner \
       FROM pg_catalog.pg_proc AS p WHERE p.pronamespace OPERATOR(pg_catalog.=) $1) AS o, \
     pg_catalog.aclexplode(o.acl) AS a JOIN pg_catalog.pg_roles AS g ON g.oid OPERATOR(pg_catalog.=) a.grantee \
     WHERE a.grantee OPERATOR(pg_catalog.<>) o.owner GROUP BY o.name, g.rolname";

fn revoke_default_privileges(_arguments: &Arguments) -> Returns {
    // SAFETY: a syscache look-up.
    let schema = unsafe { pg_sys::get_namespace_oid(SCHEMA.as_ptr(), false) };
    owner::connect(|client| {
        for revoke in owner::rows(client, GRANTEES, &[schema.into()])? {
            owner::rows(client, &revoke, &[])?;
        }
        // For PUBLIC the script itself says what remains.
        owner::rows(client, "REVOKE ALL ON SCHEMA writeguard FROM PUBLIC", &[])?;
        Ok(())
    })?;
    Ok(None)
}

//! What the install and upgrade scripts call, once.

use pgrx::pg_sys;
use pgrx::spi::SpiClient;
use rules::error::Error;

use super::relation::dependents_of_schema;
use super::table::SCHEMA;
use crate::pg::function::{Arguments, Returns, sql_function};
use crate::pg::owner;
use crate::session::actor::shown_role;

sql_function!(
    /// `assert_installable()`: raises 55000 unless the library was preloaded, WG007 unless the schema can be trusted.
    writeguard_assert_installable, pg_finfo_writeguard_assert_installable, assert_installable
);
sql_function!(
    /// `revoke_default_privileges()`: leaves nobody but the owner any privilege on what the script made. With an argument
    /// (`names text[]`): on what has these names, for an upgrade script leaves alone what was there before.
    writeguard_revoke_default_privileges, pg_finfo_writeguard_revoke_default_privileges, revoke_default_privileges,
    not_preloaded_too
);
sql_function!(
    /// `carry_grants(before text, after text)`: what was granted on a function that is replaced by one with other arguments
    /// is granted on that, and what was revoked from everybody is revoked there.
    writeguard_carry_grants, pg_finfo_writeguard_carry_grants, carry_grants, not_preloaded_too
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
            detail: Some(format!("Its owner \"{}\" could rename or drop it.", shown_role(owner))),
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

const GRANTEES: &str = "SELECT pg_catalog.format('REVOKE ALL ON %s FROM %s', o.name, COALESCE(pg_catalog.quote_ident(g.rolname), 'PUBLIC')) FROM ( \
       SELECT pg_catalog.format('SCHEMA %I', n.nspname) AS name, n.nspacl AS acl, n.nspowner AS owner, \
         NULL::pg_catalog.name AS object \
       FROM pg_catalog.pg_namespace AS n WHERE n.oid OPERATOR(pg_catalog.=) $1 \
       UNION ALL \
       SELECT CASE WHEN c.relkind OPERATOR(pg_catalog.=) 'S' THEN 'SEQUENCE ' ELSE 'TABLE ' END \
         OPERATOR(pg_catalog.||) c.oid::pg_catalog.regclass::pg_catalog.text, c.relacl, c.relowner, c.relname \
       FROM pg_catalog.pg_class AS c WHERE c.relnamespace OPERATOR(pg_catalog.=) $1 \
         AND c.relkind OPERATOR(pg_catalog.=) ANY ('{r,v,S}') \
       UNION ALL \
       SELECT 'FUNCTION ' OPERATOR(pg_catalog.||) p.oid::pg_catalog.regprocedure::pg_catalog.text, p.proacl, p.proowner, p.proname \
       FROM pg_catalog.pg_proc AS p WHERE p.pronamespace OPERATOR(pg_catalog.=) $1) AS o, \
     pg_catalog.aclexplode(o.acl) AS a LEFT JOIN pg_catalog.pg_roles AS g ON g.oid OPERATOR(pg_catalog.=) a.grantee \
     WHERE a.grantee OPERATOR(pg_catalog.<>) o.owner \
       AND ($2 IS NULL OR o.object::pg_catalog.text OPERATOR(pg_catalog.=) ANY ($2)) GROUP BY o.name, g.rolname";

fn revoke_default_privileges(arguments: &Arguments) -> Returns {
    // SAFETY: a syscache look-up.
    let schema = unsafe { pg_sys::get_namespace_oid(SCHEMA.as_ptr(), false) };
    let names = arguments.get::<Vec<String>>(0);
    owner::connect(|client| {
        let revokes = owner::rows(client, GRANTEES, &[schema.into(), names.as_deref().into()])?;
        run_all(client, &revokes)?;
        // Of what PUBLIC has without anybody saying so, the script itself says what remains.
        if names.is_none() {
            owner::rows(client, "REVOKE ALL ON SCHEMA writeguard FROM PUBLIC", &[])?;
        }
        Ok(())
    })?;
    Ok(None)
}

const GRANTS: &str = "SELECT pg_catalog.format('GRANT EXECUTE ON FUNCTION %s TO %s%s', $2::pg_catalog.regprocedure, \
       CASE a.grantee WHEN 0 THEN 'PUBLIC' ELSE pg_catalog.quote_ident(g.rolname) END, \
       CASE WHEN a.is_grantable THEN ' WITH GRANT OPTION' END) \
     FROM pg_catalog.pg_proc AS p CROSS JOIN LATERAL pg_catalog.aclexplode(p.proacl) AS a \
       LEFT JOIN pg_catalog.pg_roles AS g ON g.oid OPERATOR(pg_catalog.=) a.grantee \
     WHERE p.oid OPERATOR(pg_catalog.=) $1::pg_catalog.regprocedure AND a.grantee OPERATOR(pg_catalog.<>) p.proowner";

fn carry_grants(arguments: &Arguments) -> Returns {
    let (before, after) = (arguments.text(0, "before")?, arguments.text(1, "after")?);
    owner::connect(|client| {
        let of = [before.as_str().into(), after.as_str().into()];
        let mut grants = owner::rows(client, GRANTS, &of)?;
        grants.extend(owner::rows(client, GIVEN_TO_ALL, &of)?);
        // SAFETY: a static of this process, put back below; after an ERROR the script's end says that it is over.
        unsafe {
            let in_script = pg_sys::creating_extension;
            // These grants are the DBA's: as the script's own, which come back with CREATE EXTENSION, no dump would have them.
            pg_sys::creating_extension = false;
            let result = run_all(client, &grants);
            pg_sys::creating_extension = in_script;
            result
        }
    })?;
    Ok(None)
}

/// What everybody may do with the second function, and could not with the first.
const GIVEN_TO_ALL: &str = "SELECT pg_catalog.format('REVOKE EXECUTE ON FUNCTION %s FROM PUBLIC', $2::pg_catalog.regprocedure) \
     FROM pg_catalog.pg_proc AS p \
     WHERE p.oid OPERATOR(pg_catalog.=) $2::pg_catalog.regprocedure \
       AND EXISTS (SELECT FROM pg_catalog.aclexplode(p.proacl) AS a WHERE a.grantee OPERATOR(pg_catalog.=) 0) \
       AND NOT EXISTS (SELECT FROM pg_catalog.pg_proc AS b CROSS JOIN LATERAL pg_catalog.aclexplode(b.proacl) AS a \
         WHERE b.oid OPERATOR(pg_catalog.=) $1::pg_catalog.regprocedure AND a.grantee OPERATOR(pg_catalog.=) 0)";

fn run_all(client: &mut SpiClient<'_>, commands: &[String]) -> Result<(), Error> {
    commands.iter().try_for_each(|command| owner::rows(client, command, &[]).map(drop))
}

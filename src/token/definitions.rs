//! What gives a reviewed statement its effect besides its text: the tables, views and functions that its rehearsal met, and
//! how they were defined. A token opens nothing once one of them was altered.
//!
//! A relation's definition is its names, columns, defaults, triggers, rules and row security; a function's is its body, settings
//! and owner. Not in it: privileges, indexes and storage, which change what is allowed or fast and not what is written; nor
//! the definitions of types.

use std::collections::BTreeSet;

use rules::error::Error;
use serde::{Deserialize, Serialize};

use crate::pg::owner;

/// What a rehearsal met.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Definitions {
    objects: Vec<Object>,
    /// One of the tables has a trigger that can be deferred to the end of a transaction.
    pub fires_late: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Object {
    oid: u32,
    is_function: bool,
    name: String,
    /// Changes with the definition.
    digest: String,
}

/// Relations and functions by OID.
#[derive(Debug, Clone, Default)]
pub struct Met {
    pub relations: BTreeSet<u32>,
    pub functions: BTreeSet<u32>,
}

/// The objects as they are now, the functions of the relations' triggers with them; what is gone is not among them.
const OBJECTS: &str = r"WITH r AS (
      SELECT c.*, n.nspname FROM pg_catalog.pg_class AS c
      JOIN pg_catalog.pg_namespace AS n ON n.oid OPERATOR(pg_catalog.=) c.relnamespace
      WHERE c.oid OPERATOR(pg_catalog.=) ANY ($1::pg_catalog.oid[]) AND n.nspname OPERATOR(pg_catalog.<>) 'writeguard'),
    f AS (
      SELECT p.*, n.nspname FROM pg_catalog.pg_proc AS p
      JOIN pg_catalog.pg_namespace AS n ON n.oid OPERATOR(pg_catalog.=) p.pronamespace
      WHERE p.oid OPERATOR(pg_catalog.=) ANY (
          $2::pg_catalog.oid[] OPERATOR(pg_catalog.||) ARRAY(
            SELECT t.tgfoid FROM pg_catalog.pg_trigger AS t JOIN r ON t.tgrelid OPERATOR(pg_catalog.=) r.oid))
        AND p.oid OPERATOR(pg_catalog.>=) 16384::pg_catalog.oid AND n.nspname OPERATOR(pg_catalog.<>) 'writeguard'),
    o (oid, is_function, name, definition) AS (
      SELECT r.oid, false, pg_catalog.format('%I.%I', r.nspname, r.relname),
        pg_catalog.concat_ws(E'\n', r.nspname, r.relname, r.relkind, r.relrowsecurity, r.relforcerowsecurity,
          (SELECT pg_catalog.string_agg(pg_catalog.concat_ws(' ', a.attnum, a.attname, a.atttypid, a.atttypmod, a.attnotnull,
                    a.attgenerated, a.attidentity, a.attisdropped, a.attcollation, d.adbin), E'\n' ORDER BY a.attnum)
           FROM pg_catalog.pg_attribute AS a LEFT JOIN pg_catalog.pg_attrdef AS d
             ON d.adrelid OPERATOR(pg_catalog.=) a.attrelid AND d.adnum OPERATOR(pg_catalog.=) a.attnum
           WHERE a.attrelid OPERATOR(pg_catalog.=) r.oid AND a.attnum OPERATOR(pg_catalog.>) 0),
          (SELECT pg_catalog.string_agg(pg_catalog.concat_ws(' ', t.tgname, t.tgfoid, t.tgtype, t.tgenabled, t.tgconstrrelid,
                    t.tgdeferrable, t.tginitdeferred, t.tgattr, t.tgargs, t.tgqual, t.tgoldtable, t.tgnewtable), E'\n'
                    ORDER BY t.tgname, t.tgfoid)
           FROM pg_catalog.pg_trigger AS t WHERE t.tgrelid OPERATOR(pg_catalog.=) r.oid),
          (SELECT pg_catalog.string_agg(pg_catalog.concat_ws(' ', w.rulename, w.ev_type, w.ev_enabled, w.is_instead, w.ev_qual,
                    w.ev_action), E'\n' ORDER BY w.rulename)
           FROM pg_catalog.pg_rewrite AS w WHERE w.ev_class OPERATOR(pg_catalog.=) r.oid),
          (SELECT pg_catalog.string_agg(pg_catalog.concat_ws(' ', p.polname, p.polcmd, p.polpermissive, p.polroles, p.polqual,
                    p.polwithcheck), E'\n' ORDER BY p.polname)
           FROM pg_catalog.pg_policy AS p WHERE p.polrelid OPERATOR(pg_catalog.=) r.oid))
      FROM r
      UNION ALL
      SELECT f.oid, true, pg_catalog.format('%I.%I', f.nspname, f.proname),
        pg_catalog.concat_ws(E'\n', f.nspname, f.proname, f.proowner, f.prolang, f.prosecdef, f.proisstrict, f.provolatile,
          f.prorettype, f.proargtypes, f.proargdefaults, f.prosrc, f.probin, f.prosqlbody, f.proconfig)
      FROM f)
    SELECT pg_catalog.json_build_object('oid', o.oid::pg_catalog.int8, 'is_function', o.is_function, 'name', o.name,
      'digest', pg_catalog.encode(pg_catalog.sha256(
        pg_catalog.replace(o.definition, E'\\', E'\\\\')::pg_catalog.bytea), 'hex'))::pg_catalog.text
    FROM o ORDER BY o.is_function, o.oid";

const FIRES_LATE: &str = "SELECT 'late' FROM pg_catalog.pg_trigger \
     WHERE tgrelid OPERATOR(pg_catalog.=) ANY ($1::pg_catalog.oid[]) AND tgdeferrable LIMIT 1";

/// OIDs as PostgreSQL reads an array of them.
fn array(oids: &BTreeSet<u32>) -> String {
    let oids: Vec<String> = oids.iter().map(u32::to_string).collect();
    format!("{{{}}}", oids.join(","))
}

fn look_up(met: &Met) -> Result<Vec<Object>, Error> {
    let (relations, functions) = (array(&met.relations), array(&met.functions));
    let found =
        owner::connect(|client| owner::rows(client, OBJECTS, &[relations.as_str().into(), functions.as_str().into()]))?;
    Ok(found.iter().filter_map(|json| serde_json::from_str(json).ok()).collect())
}

impl Definitions {
    /// Of what was met, as it is now.
    ///
    /// # Errors
    /// What reading the catalogs may raise.
    pub fn of(met: &Met) -> Result<Self, Error> {
        let objects = look_up(met)?;
        let relations = array(&met.relations);
        let late = owner::connect(|client| owner::rows(client, FIRES_LATE, &[relations.as_str().into()]))?;
        Ok(Self { objects, fires_late: !late.is_empty() })
    }

    /// The relations among them.
    pub fn relations(&self) -> BTreeSet<u32> {
        self.objects.iter().filter(|object| !object.is_function).map(|object| object.oid).collect()
    }

    /// The name of the first one that is another one now than it was.
    ///
    /// # Errors
    /// What reading the catalogs may raise.
    pub fn altered(&self) -> Result<Option<&str>, Error> {
        let oids = |is_function: bool| {
            let objects = self.objects.iter().filter(move |object| object.is_function == is_function);
            objects.map(|object| object.oid).collect::<BTreeSet<u32>>()
        };
        let now = look_up(&Met { relations: oids(false), functions: oids(true) })?;
        let is_same = |object: &&Object| now.contains(object);
        Ok(self.objects.iter().find(|object| !is_same(object)).map(|object| object.name.as_str()))
    }
}

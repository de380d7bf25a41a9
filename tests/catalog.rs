//! What the extension puts into the catalogs says what it is for, and what is not for people is set apart.

use std::collections::BTreeMap;

use crate::common::Server;

/// The extension's objects, and the columns of its relations: what each is, its name and its comment. Row types and the
/// types of their arrays are part of their relations.
const OBJECTS: &str = "
WITH member AS (
    SELECT d.classid, d.objid FROM pg_depend AS d JOIN pg_extension AS e ON e.oid = d.refobjid
    WHERE d.refclassid = 'pg_extension'::regclass AND d.deptype = 'e' AND e.extname = 'pg_writeguard'
    UNION SELECT 'pg_namespace'::regclass, oid FROM pg_namespace WHERE nspname = 'writeguard'
    UNION SELECT 'pg_class'::regclass, oid FROM pg_class
          WHERE relnamespace = 'writeguard'::regnamespace AND relkind NOT IN ('i', 'S')
    UNION SELECT 'pg_proc'::regclass, oid FROM pg_proc WHERE pronamespace = 'writeguard'::regnamespace
    UNION SELECT 'pg_type'::regclass, oid FROM pg_type
          WHERE typnamespace = 'writeguard'::regnamespace AND typrelid = 0 AND typelem = 0)
SELECT i.type, (parse_ident(i.identity, false))[2], i.identity, obj_description(m.objid, m.classid::regclass::name)
FROM member AS m CROSS JOIN LATERAL pg_identify_object(m.classid, m.objid, 0) AS i
UNION ALL
SELECT 'column', a.attname, format('%s.%s', c.relname, a.attname), col_description(c.oid, a.attnum)
FROM pg_class AS c JOIN pg_attribute AS a ON a.attrelid = c.oid
WHERE c.relnamespace = 'writeguard'::regnamespace AND c.relkind IN ('r', 'v') AND a.attnum > 0 AND NOT a.attisdropped";

struct Object {
    kind: String,
    name: Option<String>,
    identity: String,
    comment: Option<String>,
}

fn objects() -> Vec<Object> {
    let rows = Server::shared().database().admin().query(OBJECTS, &[]).unwrap();
    rows.iter()
        .map(|row| Object { kind: row.get(0), name: row.get(1), identity: row.get(2), comment: row.get(3) })
        .collect()
}

/// What people call, read or write to.
fn named(objects: &[Object]) -> BTreeMap<&str, &Object> {
    let of_a_name = |object: &&Object| ["function", "view", "table"].contains(&object.kind.as_str());
    let found: BTreeMap<_, _> =
        objects.iter().filter(of_a_name).map(|object| (object.name.as_deref().expect("a name"), object)).collect();
    // Less than that, and the query has lost sight of the extension.
    assert!(found.len() > 50, "{:?}", found.keys());
    found
}

fn is_internal(object: &Object) -> bool {
    object.comment.as_deref().is_some_and(|comment| comment.starts_with("internal: "))
}

#[test]
fn every_object_and_every_column_has_a_comment_of_ascii() {
    let objects = objects();
    let columns = objects.iter().filter(|object| object.kind == "column").count();
    assert!(columns > 200, "{columns} columns");
    let unsaid: Vec<_> = objects
        .iter()
        // The row types of tables and views, and arrays of them, are members of the extension since 18.
        .filter(|object| object.kind != "type")
        .filter(|object| {
            !object.comment.as_deref().is_some_and(|comment| !comment.trim().is_empty() && comment.is_ascii())
        })
        .map(|object| format!("{} {}: {:?}", object.kind, object.identity, object.comment))
        .collect();
    assert_eq!(unsaid, Vec::<String>::new());
}

/// Tables, and what the library calls by its name: it finds both also in a database that is not upgraded yet.
const NAMES_OF_INTERNALS: [&str; 7] =
    ["approval_ask", "change_relation", "change_statement", "image", "is_approver", "outbox", "used_jti"];

#[test]
fn what_is_internal_says_so_in_its_comment_and_with_an_underscore() {
    let objects = objects();
    let named = named(&objects);
    for (name, object) in &named {
        assert_eq!(
            is_internal(object),
            name.starts_with('_') || NAMES_OF_INTERNALS.contains(name),
            "{}: {:?}",
            object.identity,
            object.comment
        );
    }
    for name in NAMES_OF_INTERNALS {
        assert!(named.contains_key(name), "{name}");
    }
}

/// The README and the pages of docs/ name all that people call, and nothing else.
#[test]
fn what_is_not_documented_is_internal() {
    let top = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let pages = std::fs::read_dir(top.join("docs")).unwrap().map(|page| page.unwrap().path());
    let pages = pages.chain([top.join("README.md")]).map(|page| std::fs::read_to_string(page).unwrap());
    let documents = pages.collect::<Vec<_>>().join("\n");
    let words: Vec<&str> = documents.split(|c: char| !(c.is_alphanumeric() || "_.`".contains(c))).collect();
    let says = |name: &str| {
        words.iter().any(|word| {
            let word = word.trim_matches(['`', '.']);
            word.strip_prefix("writeguard.").is_some_and(|rest| rest == name)
        }) || documents.contains(&format!("`{name}("))
            || documents.contains(&format!("`{name}`"))
    };
    let objects = objects();
    for (name, object) in named(&objects) {
        assert_eq!(says(name), !is_internal(object), "{}: {:?}", object.identity, object.comment);
    }
}

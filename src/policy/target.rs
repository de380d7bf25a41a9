//! The names by which policies can cover a relation: its own and its ancestors', and which answers depend on them.

use pgrx::pg_sys;
use rules::policy::resolve::Target;
use rustc_hash::{FxBuildHasher, FxHashMap, FxHashSet};

use super::relation::{never_covered, parents, relation_name};
use crate::pg::backend_local::{BackendLocal, Borrowed};

/// More changed relations than this are taken as if all had changed.
const MOST_CHANGED: usize = 1_000;
/// Most relations this backend keeps answers for; past that it starts again.
const MOST_RELATIONS: usize = 20_000;

/// What answers depend on, and for each the relations that they are about: a relation itself, and those below it.
struct Dependencies {
    on_relation: FxHashMap<u32, FxHashSet<u32>>,
    /// By the hash in an invalidation of a schema, which holds nothing else.
    on_schema: FxHashMap<u32, FxHashSet<u32>>,
}

/// Apart from the rest, because invalidations read it at any moment: it is never borrowed across anything that may take
/// them in.
static DEPENDENCIES: BackendLocal<Dependencies> = BackendLocal::new(Dependencies {
    on_relation: FxHashMap::with_hasher(FxBuildHasher),
    on_schema: FxHashMap::with_hasher(FxBuildHasher),
});
/// Relations whose answers are stale. As above.
static CHANGED: BackendLocal<FxHashSet<u32>> = BackendLocal::new(FxHashSet::with_hasher(FxBuildHasher));

#[track_caller]
fn dependencies() -> Borrowed<Dependencies> {
    DEPENDENCIES.borrow()
}

#[track_caller]
fn changed() -> Borrowed<FxHashSet<u32>> {
    CHANGED.borrow()
}

/// What a change means to the answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// Nothing: none depends on it.
    Nothing,
    /// Some are stale; [`take_changed`] tells which.
    Some,
    /// More than are told apart, so all are stale.
    All,
}

fn note(about: Option<&FxHashSet<u32>>) -> Change {
    let Some(about) = about else { return Change::Nothing };
    let mut changed = changed();
    for relation in about {
        // No more than there is room for since `make_room`: nothing may fail here, not even for want of memory.
        if changed.len() >= MOST_CHANGED && !changed.contains(relation) {
            changed.clear();
            return Change::All;
        }
        changed.insert(*relation);
    }
    Change::Some
}

/// A relation changed. Called at any moment; raises nothing.
pub fn relation_changed(relation: pg_sys::Oid) -> Change {
    note(dependencies().on_relation.get(&u32::from(relation)))
}

/// A schema with that hash was made, changed or dropped. Called at any moment; raises nothing.
pub fn schema_changed(hash: u32) -> Change {
    note(dependencies().on_schema.get(&hash))
}

/// Reserves memory, before the first invalidation comes.
pub fn make_room() {
    changed().reserve(MOST_CHANGED);
}

/// Takes the relations whose answers are stale.
pub fn take_changed() -> Vec<u32> {
    changed().drain().collect()
}

/// From now on a change of `on` makes the answer about `relation` stale.
pub fn depend(relation: pg_sys::Oid, on: pg_sys::Oid) {
    dependencies().on_relation.entry(u32::from(on)).or_default().insert(u32::from(relation));
}

/// The same for the schema that `on` is in, whose name is a part of the answer.
fn depend_on_schema(relation: pg_sys::Oid, on: pg_sys::Oid) {
    // SAFETY: a syscache look-up that gives InvalidOid for what is not there.
    let schema = unsafe { pg_sys::get_rel_namespace(on) };
    let hash = hash_of(pg_sys::SysCacheIdentifier::NAMESPACEOID, schema.into());
    dependencies().on_schema.entry(hash).or_default().insert(u32::from(relation));
}

/// The hash that PostgreSQL passes to callbacks when what has this key has changed.
pub fn hash_of(cache: pg_sys::SysCacheIdentifier::Type, key: pg_sys::Datum) -> u32 {
    let none = pg_sys::Datum::from(0);
    // SAFETY: the cache has one key, of the type of that datum.
    unsafe { pg_sys::GetSysCacheHashValue(cache as i32, key, none, none, none) }
}

/// Makes room for the dependencies of one more answer, before it is made, so that its own are not forgotten. False when
/// those of all others were forgotten for it.
pub fn has_room() -> bool {
    let mut dependencies = dependencies();
    if dependencies.on_relation.len() <= MOST_RELATIONS {
        return true;
    }
    dependencies.on_relation.clear();
    dependencies.on_schema.clear();
    false
}

/// What makes one relation a partition or an inheritance child of another.
#[derive(Debug, Clone, Copy)]
pub struct Link {
    pub child: pg_sys::Oid,
    pub parent: pg_sys::Oid,
}

/// All partition and inheritance ancestors with their distance. The answer about the relation depends on each of them from
/// before it is looked at.
fn ancestors(relation: pg_sys::Oid, without: Option<Link>) -> Vec<(pg_sys::Oid, u32)> {
    let mut found: Vec<(pg_sys::Oid, u32)> = Vec::new();
    let mut known = FxHashSet::default();
    let mut level = vec![relation];
    let mut distance = 0;
    while !level.is_empty() {
        distance += 1;
        let mut above = Vec::new();
        for child in level {
            depend(relation, child);
            depend_on_schema(relation, child);
            for parent in parents(child) {
                let cut = without.is_some_and(|link| (link.child, link.parent) == (child, parent));
                if !cut && known.insert(u32::from(parent)) {
                    found.push((parent, distance));
                    above.push(parent);
                }
            }
        }
        level = above;
    }
    found
}

/// A relation's name and ancestors; none when it is gone. From now on a change of any of them makes the answer stale.
pub fn find(relation: pg_sys::Oid) -> Option<Target> {
    find_without(relation, None)
}

/// The same as it will be without a link to a parent.
fn find_without(relation: pg_sys::Oid, link: Option<Link>) -> Option<Target> {
    let above = ancestors(relation, link);
    Some(Target {
        name: relation_name(relation)?,
        ancestors: above.into_iter().filter_map(|(oid, distance)| Some((relation_name(oid)?, distance))).collect(),
    })
}

/// The names by which policies can cover a relation, as they are now, or as they will be without a link to a parent;
/// none where no policy can.
pub fn coverable(relation: pg_sys::Oid, without: Option<Link>) -> Option<Target> {
    if never_covered(relation).is_some() { None } else { find_without(relation, without) }
}

//! The names by which policies can cover a relation: its own and its ancestors', and which answers depend on them.

use pgrx::pg_sys;
use rustc_hash::{FxHashMap, FxHashSet};

use super::relation::{never_covered, parents, relation_name};
use super::resolve::Target;
use crate::ffi::Backend;

/// More changed relations than this are taken as if all had changed.
const MOST_CHANGED: usize = 1_000;
/// Most relations this backend keeps answers for; past that it starts again.
const MOST_RELATIONS: usize = 20_000;

/// For each relation that answers depend on, the relations they are about: itself, and those below it. Apart from the
/// rest, because invalidations read it at any moment.
static DEPENDENCIES: Backend<Option<FxHashMap<u32, FxHashSet<u32>>>> = Backend::new(None);
/// Relations whose answers are stale.
static CHANGED: Backend<Vec<u32>> = Backend::new(Vec::new());

fn dependencies() -> &'static mut FxHashMap<u32, FxHashSet<u32>> {
    // SAFETY: single-threaded; no reference outlives the expression it is used in.
    unsafe { (*DEPENDENCIES.get()).get_or_insert_with(FxHashMap::default) }
}

fn changed() -> &'static mut Vec<u32> {
    // SAFETY: as above.
    unsafe { &mut *CHANGED.get() }
}

/// A relation changed: the answers that depend on it are stale. False when these are too many to tell apart. Called at
/// any moment; raises nothing.
pub fn relation_changed(relation: pg_sys::Oid) -> bool {
    let Some(about) = dependencies().get(&u32::from(relation)) else { return true };
    if changed().len() + about.len() > MOST_CHANGED {
        changed().clear();
        return false;
    }
    changed().extend(about);
    true
}

/// Whether the answers about some relations are stale.
#[inline]
pub fn any_changed() -> bool {
    !changed().is_empty()
}

/// The relations whose answers are stale; they are not told of again.
pub fn take_changed() -> Vec<u32> {
    core::mem::take(changed())
}

/// From now on a change of `on` makes the answer about `relation` stale.
pub fn depend(relation: pg_sys::Oid, on: pg_sys::Oid) {
    dependencies().entry(u32::from(on)).or_default().insert(u32::from(relation));
}

/// Makes room for the dependencies of one more answer, before it is made, so that its own are not forgotten. False when
/// those of all others were forgotten for it.
pub fn has_room() -> bool {
    if dependencies().len() <= MOST_RELATIONS {
        return true;
    }
    dependencies().clear();
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
    let mut level = vec![relation];
    let mut distance = 0;
    while !level.is_empty() {
        distance += 1;
        let mut above = Vec::new();
        for child in level {
            depend(relation, child);
            for parent in parents(child) {
                let cut = without.is_some_and(|link| (link.child, link.parent) == (child, parent));
                if !cut && !found.iter().any(|(known, _)| *known == parent) {
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

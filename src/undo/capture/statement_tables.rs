//! The tables whose rows one statement keeps, each under one set of names, whatever becomes of the tables meanwhile.
//!
//! A statement may change a table between two of its rows, from inside a DO block, a function or a procedure. A column
//! keeps its number all its life, so all images of a column have the name that it had first, and a column that gets the
//! name of another one appears under a name of its own. Where the rows cannot be told apart or put back by what their
//! images say, because the key, a type or the table at the top is another one, that is noted, and undo refuses.

use std::collections::BTreeMap;
use std::rc::Rc;

use pgrx::pg_sys;

use super::kept_table::{Columns, Root, Table};
use super::row_format::Member;

/// A table at the top, as far as one statement has kept rows of it.
pub struct Tree {
    /// As it was when a row was kept last.
    pub root: Rc<Root>,
    /// As it was when one was kept first; for its name.
    pub first: Rc<Root>,
    /// The columns that images may have.
    pub columns: Rc<Columns>,
    /// What happened to it, so that undo cannot put the rows back: a sentence's predicate.
    pub hindrance: Option<String>,
}

/// A relation as its rows are printed for the statement.
#[derive(Clone)]
pub struct Filed {
    pub table: Rc<Table>,
    /// The names of its columns where they are others than it has now.
    pub members: Option<Rc<[Member]>>,
    /// What tells its versions of rows from those of other relations.
    pub mark: u16,
    /// It is being truncated.
    emptied: bool,
}

impl Filed {
    /// Where a version of a row is stored, as images have it; none: it is not stored, or there are too many relations.
    ///
    /// # Safety
    /// A version of a row of this relation.
    pub unsafe fn at(&self, row: pg_sys::HeapTuple) -> Option<i64> {
        // SAFETY: the caller's promise.
        let at = unsafe { (*row).t_self };
        let parts = [self.mark, at.ip_blkid.bi_hi, at.ip_blkid.bi_lo, at.ip_posid];
        let known = at.ip_posid != 0 && self.mark != u16::MAX;
        known.then(|| parts.into_iter().fold(0_u64, |all, part| all << 16 | u64::from(part)).cast_signed())
    }
}

/// All of a statement.
#[derive(Default)]
pub struct Tables {
    trees: Vec<Tree>,
    filed: Vec<Filed>,
    /// How many relations there were, those counted anew that got another file.
    marks: u16,
}

impl Tables {
    /// How rows of this table are printed.
    pub fn file(&mut self, table: &Rc<Table>) -> Filed {
        let of = |filed: &Filed| filed.table.relation == table.relation;
        // Rows mostly follow others of the same table.
        let place = self.filed.iter().rposition(of);
        if let Some(place) = place
            && Rc::ptr_eq(&self.filed[place].table, table)
        {
            return self.filed[place].clone();
        }
        let before = place.map(|place| self.filed.swap_remove(place));
        let columns = self.settle(&table.root);
        let mut mark = None;
        if let Some(Filed { table: before, emptied, mark: known, .. }) = before {
            if before.root.relation != table.root.relation {
                for relation in [before.root.relation, table.root.relation] {
                    self.hinder(relation, || "was attached or detached".to_owned());
                }
            }
            if before.file == table.file {
                mark = Some(known);
            } else if !emptied {
                // Its rows are where nothing says which is which.
                self.hinder(table.root.relation, || "was rewritten".to_owned());
            }
        }
        let members = table.members(|number| name_of(&columns, number)).map(Rc::from);
        let mark = mark.unwrap_or_else(|| {
            self.marks = self.marks.saturating_add(1);
            self.marks
        });
        let filed = Filed { table: Rc::clone(table), members, mark, emptied: false };
        self.filed.push(filed.clone());
        filed
    }

    /// All rows of a relation go, so that those that come later are others.
    pub fn empty(&mut self, relation: pg_sys::Oid) {
        let of = |filed: &&mut Filed| filed.table.relation == relation;
        if let Some(filed) = self.filed.iter_mut().rev().find(of) {
            filed.emptied = true;
        }
    }

    /// Notes the table at the top as it is now, and gives the names of its columns.
    fn settle(&mut self, root: &Rc<Root>) -> Rc<Columns> {
        let Some(tree) = self.trees.iter_mut().find(|tree| tree.root.relation == root.relation) else {
            let (root, columns) = (Rc::clone(root), Rc::clone(&root.columns));
            self.trees.push(Tree { first: Rc::clone(&root), root, columns: Rc::clone(&columns), hindrance: None });
            return columns;
        };
        if !Rc::ptr_eq(&tree.root, root) {
            tree.hindrance = tree.hindrance.take().or_else(|| hindrance(&tree.root, root));
            if let Some(columns) = extended(&tree.columns, &root.columns) {
                tree.columns = Rc::new(columns);
            }
            tree.root = Rc::clone(root);
        }
        Rc::clone(&tree.columns)
    }

    fn hinder(&mut self, relation: pg_sys::Oid, why: impl Fn() -> String) {
        for tree in self.trees.iter_mut().filter(|tree| tree.root.relation == relation) {
            tree.hindrance.get_or_insert_with(&why);
        }
    }

    /// The table at the top of that number.
    pub fn tree(&self, relation: pg_sys::Oid) -> Option<&Tree> {
        self.trees.iter().find(|tree| tree.root.relation == relation)
    }
}

impl Tree {
    /// What row types are made of that columns have, by the columns' names in images.
    pub fn digests(&self) -> BTreeMap<String, String> {
        let digest = |(name, number): (&String, &i16)| {
            let parts = self.root.forms.get(number)?.parts.as_ref()?;
            Some((name.clone(), parts.digest.clone()))
        };
        self.columns.iter().filter_map(digest).collect()
    }
}

fn name_of(columns: &Columns, number: i16) -> Option<String> {
    columns.iter().find(|(_, known)| **known == number).map(|(name, _)| name.clone())
}

/// What makes rows that were kept before and after it incomparable.
fn hindrance(before: &Root, now: &Root) -> Option<String> {
    if before.key != now.key {
        return Some("got another primary key".to_owned());
    }
    let retyped = before.forms.iter().find(|(number, form)| now.forms.get(number).is_some_and(|now| now != *form))?;
    let name = name_of(&before.columns, *retyped.0).unwrap_or_default();
    Some(format!("got another type for column \"{name}\""))
}

/// The names with those of columns that are new; none: there are none.
fn extended(known: &Columns, now: &Columns) -> Option<Columns> {
    let is_new = |(_, number): &(&String, &i16)| !known.values().any(|known| known == *number);
    let mut extended = None;
    for (name, number) in now.iter().filter(is_new) {
        let columns = extended.get_or_insert_with(|| known.clone());
        let mut unused = name.clone();
        // No catalog has a name as long as this may become, but images may.
        while columns.contains_key(&unused) {
            unused = format!("{unused} ({number})");
        }
        columns.insert(unused, *number);
    }
    extended
}

#[cfg(test)]
mod tests {
    use super::*;

    fn columns(columns: &[(&str, i16)]) -> Columns {
        columns.iter().map(|(name, number)| ((*name).to_owned(), *number)).collect()
    }

    #[test]
    fn a_renamed_column_keeps_its_name_in_images() {
        let known = columns(&[("id", 1), ("a", 2), ("b", 3)]);
        assert_eq!(extended(&known, &columns(&[("id", 1), ("b", 2), ("a", 3)])), None);
        assert_eq!(extended(&known, &columns(&[("id", 1)])), None);
    }

    #[test]
    fn a_new_column_never_gets_the_name_of_another_one() {
        let known = columns(&[("id", 1), ("a", 2)]);
        let more = extended(&known, &columns(&[("id", 1), ("b", 2), ("a", 3)])).unwrap();
        assert_eq!(more, columns(&[("id", 1), ("a", 2), ("a (3)", 3)]));
        let more = extended(&more, &columns(&[("id", 1), ("b", 2), ("a (3)", 4), ("c", 3)])).unwrap();
        assert_eq!(more, columns(&[("id", 1), ("a", 2), ("a (3)", 3), ("a (3) (4)", 4)]));
    }
}

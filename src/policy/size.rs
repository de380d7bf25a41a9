//! How many rows a table holds about now: its size in blocks, times the rows per block that the planner would assume.

use core::ptr;

use pgrx::pg_sys;

use super::relation::{parents, with_descendants};

/// The relation that a fraction is taken of: the root of a tree of partitions, else the table itself.
pub fn root_of_tree(relation: pg_sys::Oid) -> pg_sys::Oid {
    let mut root = relation;
    // SAFETY: a syscache look-up.
    while unsafe { pg_sys::get_rel_relispartition(root) } {
        match parents(root).first() {
            Some(parent) => root = *parent,
            None => break,
        }
    }
    root
}

/// About how many rows the table holds; of a partitioned table, all its partitions together.
pub fn rows(root: pg_sys::Oid) -> u64 {
    // SAFETY: a syscache look-up.
    let is_tree = unsafe { pg_sys::get_rel_relkind(root) as u8 == pg_sys::RELKIND_PARTITIONED_TABLE };
    let relations = if is_tree { with_descendants(root) } else { vec![root] };
    relations.into_iter().map(rows_of_one).sum::<f64>() as u64
}

fn rows_of_one(relation: pg_sys::Oid) -> f64 {
    let lock = pg_sys::AccessShareLock as pg_sys::LOCKMODE;
    // SAFETY: opened and closed once; an ERROR unwinds to the guard around us.
    unsafe {
        let table = pg_sys::try_relation_open(relation, lock);
        if table.is_null() {
            return 0.0;
        }
        let rows = match (*(*table).rd_rel).relkind as u8 {
            pg_sys::RELKIND_RELATION => {
                let (mut pages, mut rows, mut all_visible) = (0, 0.0, 0.0);
                pg_sys::estimate_rel_size(table, ptr::null_mut(), &mut pages, &mut rows, &mut all_visible);
                let blocks = pg_sys::RelationGetNumberOfBlocksInFork(table, pg_sys::ForkNumber::MAIN_FORKNUM);
                // For a table that was never analyzed the planner assumes ten blocks at least.
                if pages == 0 { 0.0 } else { rows / f64::from(pages) * f64::from(blocks) }
            }
            pg_sys::RELKIND_FOREIGN_TABLE => f64::from((*(*table).rd_rel).reltuples).max(0.0),
            _ => 0.0,
        };
        pg_sys::relation_close(table, lock);
        rows
    }
}

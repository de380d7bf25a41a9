//! Whether a write is narrowed by a condition, where a policy requires one.
//!
//! `unfiltered_write` asks, `scan_filters` finds the tables that a plan scans whole, `plan_path` what stands over
//! such a scan, `expression` reads conditions from the plan for `rules::condition` to weigh.
//!
//! What comes in is the plan of a write that has not begun. What goes out is a refusal before the first row. What
//! is promised: a condition that keeps no row out counts as none. Not promised: how many rows a condition keeps
//! out.

pub mod expression;
pub mod plan_path;
pub mod scan_filters;
pub mod unfiltered_write;

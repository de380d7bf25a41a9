//! Which budgets a relation's rows are charged to, and the charge.
//!
//! `bindings` knows what a relation is charged to, its `binding`; `charge` charges it, which gives a verdict. The numbers by statement and
//! transaction, and the rule of a rate, are in `rules::limits`. `extra_limits` are the limits that not every policy has: `rate` takes from buckets in shared memory (`rate_memory`). `uncharged` is the run of rows that are within every limit and not charged yet. `lost_count` says that the numbers are not to be trusted. `observe` records at the end of a statement
//! what a policy that refuses nothing let pass.
//!
//! What goes out says how much is past which limit. What happens then is decided in `verdict`.

pub mod binding;
pub mod bindings;
pub mod charge;
pub mod extra_limits;
pub mod lost_count;
pub mod observe;
pub mod rate;
pub mod rate_memory;
pub mod uncharged;

//! Which budgets a relation's rows are charged to, and the charge.
//!
//! `bindings` finds a relation's `binding`: the budgets that its rows are charged to. `charge` charges them, which gives a
//! verdict. The numbers by statement and transaction, and the rule of a rate, are in `rules::limits`. `extra_limits` has
//! the limits that not every policy has: `rate` takes from buckets in shared memory (`rate_memory`). `uncharged` is the
//! run of rows that are within every limit and not charged yet. `lost_count` refuses to commit where a fault of ours may
//! have made the numbers wrong. `observe` records at the end of a statement what policies of mode observe and warn let
//! pass.
//!
//! What comes in are rows of a relation, with operation, statement and subtransaction. What goes out says which limit
//! they are past. What happens then is decided in `verdict`. Not promised: a budget that several sessions share, except a
//! rate.

pub mod binding;
pub mod bindings;
pub mod charge;
pub mod extra_limits;
pub mod lost_count;
pub mod observe;
pub mod rate;
pub mod rate_memory;
pub mod uncharged;

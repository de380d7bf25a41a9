//! What is noted of a statement that is rehearsed: `account` has the rows that it changes, `shown_row` some of them
//! before and after, `policy_verdicts` what the policies would have decided about them here and now.
//!
//! What comes in are the rows that the guard counts while a rehearsal runs. What goes out is read by `review`,
//! which also has the rehearsal itself: its subtransaction and its texts. Not promised: all rows before and after.
//! A few are shown, within `writeguard.preview_max_bytes`.

pub mod account;
pub mod policy_verdicts;
pub mod shown_row;

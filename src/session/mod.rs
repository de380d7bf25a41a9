//! What a session has set, what it runs, and what is forgotten when its transaction ends.
//!
//! `settings` has the settings `writeguard.*`, `actor` who acts and which override is armed, `expectation` the number of rows
//! that the client's next write must change; `pooled` ends the latter two with each transaction where clients share sessions.
//! `portal` knows which of the client's commands is running, `own_statement` whether a function is called by it and by nothing else, `statement` which statement a write belongs to, `statement_text`
//! where its text is, and `excerpt` has the beginning of that. `transaction_block` knows whether the client opened one, `xact`
//! whether there is anything to forget at the transaction's end, `rehearsing` whether what runs is rolled back afterwards.
//!
//! What comes in is what the hooks see and what SET assigns. What goes out are the acting role, serial numbers of statements
//! and their texts. Not promised: the whole of a long text once the client's message is over. Nothing here knows of
//! policies, tables or events.

pub mod actor;
pub mod excerpt;
pub mod expectation;
pub mod meaning;
pub mod own_statement;
pub mod pooled;
pub mod portal;
pub mod rehearsing;
pub mod settings;
pub mod statement;
pub mod statement_text;
pub mod transaction_block;
pub mod xact;

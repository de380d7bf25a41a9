//! What a token opens: `statement` is the hash of what it is bound to, `grant` what it allows. A token from outside is a JWT:
//! `jwt` reads it and verifies its signature, `claims` judges what it says, `name` reads the names of tables in it.

pub mod claims;
pub mod fingerprint;
pub mod grant;
pub mod jwt;
pub mod name;
pub mod statement;

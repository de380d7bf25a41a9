//! Random statements, policies and tokens: every row is counted, nothing crashes, nothing but a token opens a limit.
//!
//! `FUZZ_SEED` gives other cases, `FUZZ_STATEMENTS` more of them.

#[path = "../common/mod.rs"]
mod common;

mod found;
mod generate;
mod policies;
mod random;
mod rows;
mod schema;
mod tokens;

/// A number from the environment.
fn setting(name: &str, default: u64) -> u64 {
    match std::env::var(name) {
        Ok(value) => value.parse().unwrap_or_else(|_| panic!("{name}={value} is no number")),
        Err(_) => default,
    }
}

fn seed() -> u64 {
    setting("FUZZ_SEED", 20_240_607)
}

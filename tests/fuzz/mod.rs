//! Random statements, policies, tokens and DDL: every row is counted, nothing crashes, nothing but a token opens a limit,
//! and undo restores what it says.
//!
//! `FUZZ_SEED` gives other cases, `FUZZ_STATEMENTS` and `FUZZ_DDL_STEPS` more of them.

mod ddl;
mod found;
mod generate;
mod policies;
mod random;
mod rows;
mod schema;
mod shapes;
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

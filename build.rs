//! What the linker is told about the library, and the compiler about the server.

use std::env;

/// The supported servers' versions, in their order.
const MAJORS: [u32; 5] = [15, 16, 17, 18, 19];

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    // Where Rust would end the process, see src/pg/reserve.rs.
    println!("cargo:rustc-cdylib-link-arg=-Wl,--wrap=abort");

    // `cfg(since_pg18)` is for the server of version 18 and every newer one: what a version brought stays when the next is
    // added. A feature's name in a `cfg` would say nothing about a version that it does not know.
    let chosen = MAJORS.into_iter().filter(|major| env::var_os(format!("CARGO_FEATURE_PG{major}")).is_some()).max();
    for major in MAJORS {
        println!("cargo:rustc-check-cfg=cfg(since_pg{major})");
        if chosen.is_some_and(|chosen| chosen >= major) {
            println!("cargo:rustc-cfg=since_pg{major}");
        }
    }
}

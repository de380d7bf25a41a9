//! What the linker is told about the library.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    // Where Rust would end the process, see src/pg/reserve.rs.
    println!("cargo:rustc-cdylib-link-arg=-Wl,--wrap=abort");
}

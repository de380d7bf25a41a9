//! What a test needs inside the server or below it, and Rust does not have: the small C files of tests/c.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::common::run;

/// Compiles tests/c/NAME.c, for the server's LOAD or for the dynamic linker, into a directory that the server can read.
pub fn library(name: &str, directory: &Path) -> PathBuf {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/c").join(name).with_extension("c");
    let library = directory.join(name).with_extension("so");
    run(Command::new("cc")
        .args(["-shared", "-fPIC", "-O1", "-Wall", "-Wno-declaration-after-statement", "-I"])
        .arg(headers())
        .arg(source)
        .arg("-o")
        .arg(&library));
    run(Command::new("chmod").arg("a+rx").arg(&library));
    library
}

/// Those of the server that the library was built for. The private server that it was installed into has none of its own.
fn headers() -> PathBuf {
    let pg_config = std::env::var_os("PG_CONFIG").map_or_else(
        || Path::new(&std::env::var_os("PGWG_BIN").expect("PGWG_BIN is set")).join("pg_config"),
        PathBuf::from,
    );
    PathBuf::from(run(Command::new(pg_config).arg("--includedir-server")))
}

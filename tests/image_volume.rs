//! The layout of the tarball and of an image volume: lib/ and share/extension/ anywhere, found by `dynamic_library_path` and
//! by `extension_control_path`, which PostgreSQL 18 brought. And that the manifest for such an image is one.
#![cfg(since_pg18)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::common::{Server, expect_refusal, make_directory, run};

fn server_directory(option: &str) -> PathBuf {
    let pg_config = Path::new(&std::env::var("PGWG_BIN").expect("PGWG_BIN is set")).join("pg_config");
    PathBuf::from(run(Command::new(pg_config).arg(option)).trim())
}

#[test]
fn the_extension_lies_where_two_settings_say() {
    let image = make_directory();
    let (lib, extension) = (image.join("lib"), image.join("share/extension"));
    fs::create_dir_all(&lib).expect("lib");
    fs::create_dir_all(&extension).expect("share/extension");
    let library = "pg_writeguard.so";
    fs::copy(server_directory("--pkglibdir").join(library), lib.join(library)).expect("the library");
    for file in fs::read_dir(server_directory("--sharedir").join("extension")).expect("extensions") {
        let file = file.expect("a file").path();
        let name = file.file_name().expect("a name").to_str().expect("a name");
        if name.starts_with("pg_writeguard") {
            fs::copy(&file, extension.join(name)).expect("the SQL");
        }
    }

    // Neither $system nor $libdir: it is found there or nowhere.
    let server = Server::start(&[
        &format!("extension_control_path = '{}'", image.join("share").display()),
        &format!("dynamic_library_path = '{}'", lib.display()),
    ]);
    let db = server.database();
    let mut admin = db.admin();
    admin
        .batch_execute(
            "CREATE TABLE t AS SELECT n FROM generate_series(1, 10) AS n;
             SELECT writeguard.set_policy('p', tables => '{public.t}', max_rows => 5)",
        )
        .expect("a policy");
    assert_eq!(expect_refusal(admin.batch_execute("UPDATE t SET n = 0")).sqlstate, "WG001");
    let stored = "SELECT count(*) FROM writeguard.event WHERE kind = 'blocked'";
    assert_eq!(admin.query_one(stored, &[]).expect("the worker").get::<_, i64>(0), 1);

    let pid: i32 = admin.query_one("SELECT pg_backend_pid()", &[]).expect("a process").get(0);
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).expect("what it has mapped");
    let loaded: Vec<&str> = maps.lines().filter_map(|line| line.split_whitespace().nth(5)).collect();
    let there = lib.join(library);
    assert!(loaded.contains(&there.to_str().expect("a path")), "{loaded:?}");
    assert!(!loaded.iter().any(|file| file.ends_with(library) && Path::new(file) != there), "{loaded:?}");
    drop(admin);
    db.drop();
    server.stop("fast");
    fs::remove_dir_all(image).expect("the image goes");
}

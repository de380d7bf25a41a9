//! A library that is loaded after this one and does not call the hooks that were there before: the server says what is
//! missing, and nothing that a policy covers is changed unguarded.

use std::path::PathBuf;
use std::process::Command;

use crate::common::{Server, expect_refusal, make_directory, run, server_command, wait_until};

/// A library that sets a hook and forgets the one before; what PostgreSQL asks of a library is written out, so that no
/// headers are needed.
fn forgetful(hook: &str) -> PathBuf {
    let version = if cfg!(since_pg19) {
        1900
    } else if cfg!(since_pg18) {
        1800
    } else if cfg!(since_pg17) {
        1700
    } else if cfg!(since_pg16) {
        1600
    } else {
        1500
    };
    let source = format!(
        "typedef void (*hook_type)(void);
         extern hook_type {hook};
         static void nothing(void) {{}}
         void _PG_init(void) {{ {hook} = nothing; }}
         static const struct {{
             int length, version, arguments, keys, name, by_value; char extra[32];
             {}
         }} magic = {{ sizeof magic, {version}, 100, 32, 64, 1, \"PostgreSQL\" }};
         const void *Pg_magic_func(void) {{ return &magic; }}",
        if version < 1800 { "" } else { "const char *library, *release;" },
    );
    let dir = make_directory();
    let library = dir.join("forgetful.so");
    let own = std::env::temp_dir().join(format!("forgetful-{}-{hook}", std::process::id()));
    std::fs::write(own.with_extension("c"), source).unwrap();
    run(Command::new("cc")
        .args(["-shared", "-fPIC", "-w", "-o"])
        .arg(own.with_extension("so"))
        .arg(own.with_extension("c")));
    run(Command::new("cp").arg(own.with_extension("so")).arg(&library));
    run(server_command("test").arg("-r").arg(&library));
    for ending in ["c", "so"] {
        std::fs::remove_file(own.with_extension(ending)).unwrap();
    }
    library
}

/// Starts a server again with that library behind ours; gives what pg_ctl says.
fn restart_with(server: &Server, library: &std::path::Path) -> Result<(), String> {
    let line = format!("shared_preload_libraries = 'pg_writeguard, {}'\n", library.display());
    server.stop("fast");
    let conf = server.data_dir().join("postgresql.conf");
    let mut text = std::fs::read_to_string(&conf).unwrap();
    text.push_str(&line);
    std::fs::write(&conf, text).unwrap();
    server.try_start()
}

#[test]
fn a_server_without_our_request_for_memory_does_not_start_and_says_why() {
    let server = Server::start(&[]);
    assert!(restart_with(&server, &forgetful("shmem_request_hook")).is_err());
    let log = server.log();
    assert!(log.contains("FATAL:  pg_writeguard could not ask for its shared memory"), "{log}");
    assert!(log.contains("set shmem_request_hook and does not call the one before"), "{log}");
    assert!(!log.contains("panic"), "{log}");
}

#[test]
fn without_our_memory_covered_writes_are_refused_and_others_pass() {
    let server = Server::start(&[]);
    let db = server.database();
    db.admin()
        .batch_execute(
            "CREATE TABLE t AS SELECT 1 AS id; CREATE TABLE free AS TABLE t;
             SELECT writeguard.set_policy('p', tables => '{public.t}', max_rows => 100)",
        )
        .unwrap();
    restart_with(&server, &forgetful("shmem_startup_hook")).unwrap();
    wait_until(10, || server.log().contains("WARNING:  pg_writeguard has no shared memory"));
    let mut client = db.admin();
    for write in ["UPDATE t SET id = 2", "DELETE FROM t", "TRUNCATE t", "WITH w AS (DELETE FROM t RETURNING 1) TABLE w"]
    {
        let refusal = expect_refusal(client.batch_execute(write));
        assert_eq!(refusal.sqlstate, "WG008", "{write}");
        assert!(refusal.message.contains("shmem_startup_hook"), "{write}: {}", refusal.message);
        assert!(refusal.hint.contains("shared_preload_libraries"), "{write}: {}", refusal.hint);
    }
    client.batch_execute("UPDATE free SET id = 2; TABLE t; INSERT INTO t VALUES (2); DROP TABLE free").unwrap();
    let refusal = expect_refusal(client.batch_execute("SELECT writeguard.set_policy('q', max_rows => 1)"));
    assert_eq!((refusal.sqlstate.as_str(), refusal.message.as_str()), ("55000", "pg_writeguard has no shared memory"));
    let problems =
        client.query("SELECT problem, fix FROM writeguard.check_setup() WHERE severity = 'problem'", &[]).unwrap();
    let told: Vec<(String, String)> = problems.iter().map(|row| (row.get(0), row.get(1))).collect();
    assert!(told.iter().any(|(problem, _)| problem.contains("does not call its shmem_startup_hook")), "{told:?}");
    let fix = told.iter().find(|(problem, _)| problem.contains("shmem_startup_hook")).unwrap();
    assert!(fix.1.contains("'pg_writeguard'; -- and restart"), "{fix:?}");
    // What it says helps.
    client.batch_execute("SET writeguard.enabled = off; UPDATE t SET id = 3; RESET writeguard.enabled").unwrap();
    client.batch_execute(fix.1.split(" --").next().unwrap()).unwrap();
    drop(client);
    server.restart();
    let mut client = db.admin();
    client
        .batch_execute("UPDATE t SET id = 4; SELECT writeguard.set_policy('p', tables => '{public.t}', max_rows => 1)")
        .unwrap();
    assert_eq!(expect_refusal(client.batch_execute("UPDATE t SET id = 5")).sqlstate, "WG001");
    assert!(!server.log().contains("panic"), "{}", server.log());
}

//! The installation itself: the library is preloaded, the extension is created.

use crate::common::{Server, wait_until};

#[test]
fn library_is_preloaded() {
    let mut admin = Server::shared().plain_database().admin();
    let row = admin.query_one("SHOW shared_preload_libraries", &[]).unwrap();
    assert_eq!(row.get::<_, &str>(0), "pg_writeguard");
}

#[test]
fn extension_has_the_version_of_the_crate() {
    let mut admin = Server::shared().database().admin();
    let row = admin.query_one("SELECT extversion FROM pg_extension WHERE extname = 'pg_writeguard'", &[]).unwrap();
    assert_eq!(row.get::<_, &str>(0), env!("CARGO_PKG_VERSION"));
}

#[test]
fn server_restarts_with_its_data() {
    let server = Server::start(&["log_connections = on"]);
    let db = server.database();
    db.admin().batch_execute("CREATE TABLE t AS SELECT 1 AS id").unwrap();
    server.stop("immediate");
    server.start_again();
    server.restart();
    assert_eq!(server.psql(&db.name, "postgres", "\\t on\nSELECT count(*) FROM t;").trim(), "1");
    wait_until(10, || server.log().contains("connection authorized"));
}

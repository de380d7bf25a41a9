//! What a restart of the server leaves of events that waited to be stored.

use std::time::Duration;

use crate::common::{Server, expect_refusal, wait_until};

#[test]
fn an_event_that_waits_survives_a_shutdown() {
    let server = Server::start(&["writeguard.event_timeout = '200ms'"]);
    let db = server.database();
    let mut admin = db.admin();
    admin
        .batch_execute(
            "CREATE TABLE t (id int);
             INSERT INTO t SELECT generate_series(1, 10);
             SELECT writeguard.set_policy('p', tables => '{public.t}', max_rows => 3);",
        )
        .unwrap();
    let mut locker = db.admin();
    locker.batch_execute("BEGIN; LOCK TABLE writeguard.event IN ACCESS EXCLUSIVE MODE").unwrap();
    let refusal = expect_refusal(admin.batch_execute("UPDATE t SET id = 0"));
    assert_eq!(refusal.sqlstate, "WG001");
    drop((admin, locker));
    server.restart();
    let mut admin = db.admin();
    let blocked = "SELECT count(*) FROM writeguard.event WHERE kind = 'blocked' AND statement = 'UPDATE t SET id = 0'";
    wait_until(10, || admin.query_one(blocked, &[]).unwrap().get::<_, i64>(0) == 1);
    // Once, and not once more with the next restart.
    server.restart();
    std::thread::sleep(Duration::from_millis(300));
    let mut admin = db.admin();
    assert_eq!(admin.query_one(blocked, &[]).unwrap().get::<_, i64>(0), 1);
}

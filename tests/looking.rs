//! Looking at what is reviewed shows nobody more than they could read themselves.

use crate::common::approvals::{Stage, WRITE, pass, refused, request, text};

/// A parent that everybody may read, and a child with a column of its own.
const FAMILY: &str = "
    CREATE TABLE par (id int PRIMARY KEY, a int);
    CREATE TABLE chi (ssn text, PRIMARY KEY (id)) INHERITS (par);
    INSERT INTO chi SELECT n, 0, 'secret ' || n FROM generate_series(1, 5) AS n;
    GRANT SELECT, UPDATE ON par TO PUBLIC;
    SELECT writeguard.set_policy('par', tables => '{public.par}', max_rows => 3)";

#[test]
fn a_right_to_the_parent_is_none_to_the_childs_own_columns() {
    let mut stage = Stage::new(FAMILY);
    let mut client = stage.requester();
    let preview = "SELECT string_agg(before::text || after::text, '') FROM writeguard.preview('UPDATE par SET a = 1')";
    let shown = text(&mut client, preview);
    assert!(shown.contains("\"id\"") && !shown.contains("secret") && !shown.contains("ssn"), "{shown}");
    request(&mut client, "UPDATE par SET a = 1", &[]);
    let samples = text(&mut stage.admin, "SELECT samples::text FROM writeguard.request");
    assert!(samples.contains("\"id\"") && !samples.contains("secret"), "{samples}");
    // With a right to the column itself it is shown.
    pass(&mut stage.admin, "GRANT SELECT (ssn) ON chi TO PUBLIC");
    assert!(text(&mut client, preview).contains("secret"));
}

/// What the approver sees of the samples.
fn seen(stage: &Stage) -> String {
    text(&mut stage.approver(), "SELECT samples::text FROM writeguard.pending")
}

#[test]
fn an_approver_sees_the_columns_that_they_may_read() {
    let mut stage = Stage::new("ALTER TABLE t ADD card text DEFAULT '4111'");
    let requester = stage.requester.clone();
    let approver = stage.approver.clone();
    pass(&mut stage.admin, &format!("REVOKE ALL ON t FROM PUBLIC; GRANT SELECT, UPDATE ON t TO {requester}"));
    request(&mut stage.requester(), WRITE, &[]);
    let none = seen(&stage);
    assert!(none.contains("\"hidden\": 5") && !none.contains("4111") && !none.contains("\"id\""), "{none}");
    pass(&mut stage.admin, &format!("GRANT SELECT (id, a) ON t TO {approver}"));
    let some = seen(&stage);
    assert!(some.contains("\"id\": 1") && !some.contains("card") && !some.contains("hidden"), "{some}");
    pass(&mut stage.admin, &format!("GRANT SELECT ON t TO {approver}"));
    assert!(seen(&stage).contains("4111"));
    pass(&mut stage.admin, "ALTER TABLE t ENABLE ROW LEVEL SECURITY; CREATE POLICY p ON t USING (true)");
    assert!(seen(&stage).contains("\"hidden\": 5"));
    pass(&mut stage.admin, "DROP TABLE t");
    assert!(seen(&stage).contains("\"hidden\": 5"));
}

#[test]
fn a_right_to_the_partitioned_table_is_one_to_its_partitions() {
    let mut stage = Stage::new(
        "CREATE TABLE part (id int PRIMARY KEY, a int) PARTITION BY RANGE (id);
         CREATE TABLE part_1 PARTITION OF part FOR VALUES FROM (0) TO (10);
         INSERT INTO part SELECT generate_series(1, 5), 0; GRANT SELECT, UPDATE ON part TO PUBLIC;
         SELECT writeguard.set_policy('part', tables => '{public.part}', max_rows => 3)",
    );
    request(&mut stage.requester(), "UPDATE part SET a = 7", &[]);
    assert!(seen(&stage).contains("\"a\": 7"));
    let approver = stage.approver.clone();
    pass(&mut stage.admin, &format!("REVOKE ALL ON part FROM PUBLIC; GRANT SELECT (id) ON part TO {approver}"));
    let some = seen(&stage);
    assert!(some.contains("\"id\": 5") && !some.contains("\"a\""), "{some}");
}

#[test]
fn a_parameter_that_is_not_given_or_not_used_is_told() {
    let stage = Stage::new("");
    let mut client = stage.requester();
    for (call, said) in [
        ("'UPDATE t SET a = $2', 'r', '{1,2}'", "the statement does not use parameter $1"),
        ("'UPDATE t SET a = $3 WHERE id = $1', 'r', '{1,2,3}'", "the statement does not use parameter $2"),
        ("'UPDATE t SET a = $200000000', 'r'", "the statement takes 200000000 parameters, but 0 are given"),
    ] {
        let refusal = refused(&mut client, &format!("SELECT writeguard.request({call})"), "WG007");
        assert!(refusal.message.contains(said), "{call}: {refusal:?}");
    }
}

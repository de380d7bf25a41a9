//! Limits hold on the wire: portals that are fetched in parts, pipelines, messages out of order or cut short, and
//! clients that leave in the middle.

use std::io::Write;
use std::net::Shutdown;

use crate::common::limits::{Bed, SIX};
use crate::common::raw::{Raw, socket, text};
use crate::common::wait_until;

/// A function that changes one row and gives its number back.
const TOUCH: &str = "
    CREATE FUNCTION touch(x int) RETURNS int LANGUAGE sql
    AS 'UPDATE t SET v = v + 1 WHERE id = x RETURNING id';";
/// Changes the six rows one by one, as they are fetched.
const TOUCH_ALL: &str = "SELECT touch(i) FROM generate_series(1, 6) AS i";
const THREE: &str = "UPDATE t SET v = v + 1 WHERE id <= 3";
const ALL: &str = "UPDATE t SET v = v + 1";
/// Takes its limit as a parameter.
const FIRST: &str = "UPDATE t SET v = v + 1 WHERE id <= $1";

/// Six rows of which a statement may change three, and a connection without a driver.
fn stage(setup: &str) -> (Bed, Raw) {
    let mut bed = Bed::new(&format!("{SIX} {TOUCH} {setup}"));
    bed.limit("{public.t}", 3);
    let raw = Raw::to(&bed);
    (bed, raw)
}

#[track_caller]
fn sum(bed: &mut Bed) -> i64 {
    bed.number("SELECT sum(v) FROM t")
}

// Portals that are fetched in parts.

#[test]
fn an_update_that_is_fetched_row_by_row_is_refused_before_its_first_row() {
    let (mut bed, mut raw) = stage("");
    let sql = format!("{ALL} RETURNING id");
    raw.open("c", &sql);
    for _ in 0..6 {
        raw.execute("c", 1);
    }
    let answer = raw.sync();
    assert_eq!((answer.trace(), answer.table), ("1 2 WG001 ZI".into(), "t".into()));
    assert_eq!(sum(&mut bed), 0);
    raw.assert_fresh(&mut bed);

    bed.limit("{public.t}", 6);
    raw.open("c", &sql);
    for _ in 0..7 {
        raw.execute("c", 1);
    }
    let answer = raw.sync();
    assert_eq!((answer.trace(), answer.rows), ("1 2 D s D s D s D s D s D s UPDATE:0 ZI".into(), 6));
    assert_eq!(sum(&mut bed), 6);
}

#[test]
fn a_function_fetched_row_by_row_is_refused_at_the_row_past_the_limit() {
    let (mut bed, mut raw) = stage("");
    for in_one_message in [true, false] {
        raw.simple("BEGIN");
        assert_eq!(raw.ready().trace(), "BEGIN ZT");
        raw.open("c", TOUCH_ALL);
        let mut words = if in_one_message { String::new() } else { raw.sync().trace() + " " };
        for _ in 0..5 {
            raw.execute("c", 1);
            if !in_one_message {
                words += &raw.sync().trace();
                words += " ";
            }
        }
        if in_one_message {
            assert_eq!(raw.sync().trace(), "1 2 D s D s D s WG001 ZE");
        } else {
            assert_eq!(words, "1 2 ZT D s ZT D s ZT D s ZT WG001 ZE 25P02 ZE ");
        }
        assert_eq!(raw.query("ROLLBACK"), "ROLLBACK ZI");
        assert_eq!(sum(&mut bed), 0);
        raw.assert_fresh(&mut bed);
    }
}

#[test]
fn portals_in_turn_in_one_pipeline_count_apart() {
    let (mut bed, mut raw) = stage("");
    raw.open("a", TOUCH_ALL).open("b", TOUCH_ALL).open("c", TOUCH_ALL);
    for _ in 0..3 {
        raw.execute("a", 1).execute("b", 1).run(THREE).execute("c", 1);
    }
    let round = "D s D s 1 2 UPDATE:3 D s";
    assert_eq!(raw.sync().trace(), format!("1 2 1 2 1 2 {round} {round} {round} ZI"));
    assert_eq!(sum(&mut bed), 18);

    raw.open("a", TOUCH_ALL).open("b", TOUCH_ALL).execute("a", 2).execute("b", 3).run(THREE).execute("a", 1);
    raw.execute("b", 1).execute("a", 1);
    assert_eq!(raw.sync().trace(), "1 2 1 2 D s D s 1 2 UPDATE:3 D s WG001 ZI");
    assert_eq!(sum(&mut bed), 18);
    raw.assert_fresh(&mut bed);
}

#[test]
fn a_portal_goes_on_counting_after_another_statement_was_refused() {
    let (mut bed, mut raw) = stage("");
    raw.simple("BEGIN");
    assert_eq!(raw.ready().trace(), "BEGIN ZT");
    raw.open("c", TOUCH_ALL).execute("c", 2).run("SAVEPOINT a");
    assert_eq!(raw.sync().trace(), "1 2 D s 1 2 SAVEPOINT ZT");
    for _ in 0..3 {
        assert_eq!(raw.run(ALL).sync().trace(), "1 2 WG001 ZE");
        assert_eq!(raw.query("ROLLBACK TO a"), "ROLLBACK ZT");
    }
    assert_eq!(raw.execute("c", 1).sync().trace(), "D s ZT");
    assert_eq!(raw.execute("c", 1).sync().trace(), "WG001 ZE");
    assert_eq!(raw.query("ROLLBACK"), "ROLLBACK ZI");
    raw.assert_fresh(&mut bed);
}

#[test]
fn a_portal_in_a_savepoint_goes_with_it_and_its_name_counts_from_zero() {
    let (mut bed, mut raw) = stage("");
    bed.policy("tables => '{public.t}', max_rows => 3, max_rows_per_transaction => 5");
    for _ in 0..2 {
        raw.simple("BEGIN; UPDATE t SET v = v + 1 WHERE id <= 2; SAVEPOINT a");
        assert_eq!(raw.ready().trace(), "BEGIN UPDATE:2 SAVEPOINT ZT");
        raw.open("c", TOUCH_ALL).execute("c", 3);
        assert_eq!(raw.sync().trace(), "1 2 D s ZT");
        assert_eq!(raw.query("ROLLBACK TO a"), "ROLLBACK ZT");
        assert_eq!(raw.execute("c", 1).sync().trace(), "34000 ZE");
        assert_eq!(raw.query("ROLLBACK TO a"), "ROLLBACK ZT");
        raw.open("c", TOUCH_ALL).execute("c", 3).run("SAVEPOINT b").run("UPDATE t SET v = 9 WHERE id = 1");
        assert_eq!(raw.sync().trace(), "1 2 D s 1 2 SAVEPOINT 1 2 WG001 ZE");
        assert_eq!(raw.query("ROLLBACK"), "ROLLBACK ZI");
        assert_eq!(sum(&mut bed), 0);
    }
}

#[test]
fn a_portal_bound_again_under_the_name_of_a_closed_one_counts_from_zero() {
    let (mut bed, mut raw) = stage("");
    raw.parse("s", TOUCH_ALL);
    for _ in 0..20 {
        raw.bind("c", "s", &[]).execute("c", 3).close("c");
    }
    assert_eq!(raw.sync().trace(), format!("1 {}ZI", "2 D s 3 ".repeat(20)));
    assert_eq!(sum(&mut bed), 60);
    for _ in 0..20 {
        raw.bind("", "s", &[]).execute("", 3);
    }
    assert_eq!(raw.sync().trace(), format!("{}ZI", "2 D s ".repeat(20)));
    assert_eq!(sum(&mut bed), 120);

    raw.bind("c", "s", &[]).execute("c", 3).close("d").execute("c", 1);
    assert_eq!(raw.sync().trace(), "2 D s 3 WG001 ZI");
    raw.bind("c", "s", &[]).execute("c", 2).close("c").bind("c", "s", &[]).execute("c", 4);
    assert_eq!(raw.sync().trace(), "2 D s 3 2 D WG001 ZI");
    assert_eq!(sum(&mut bed), 120);
    raw.assert_fresh(&mut bed);
}

#[test]
fn a_portal_bound_under_a_name_that_is_taken_leaves_no_count() {
    let (mut bed, mut raw) = stage("");
    raw.open("c", TOUCH_ALL).execute("c", 3).open("c", TOUCH_ALL).execute("c", 1);
    assert_eq!(raw.sync().trace(), "1 2 D s 1 42P03 ZI");
    assert_eq!(sum(&mut bed), 0);
    raw.assert_fresh(&mut bed);
}

/// Changes three rows when the planner folds it to a constant, which a bind does.
const FOLDED: &str = "
    CREATE FUNCTION three() RETURNS int LANGUAGE plpgsql VOLATILE AS
    'BEGIN UPDATE t SET v = v + 1 WHERE id > 3; RETURN 1; END';
    CREATE FUNCTION folded() RETURNS int LANGUAGE plpgsql IMMUTABLE AS 'BEGIN RETURN three(); END';";
const WITH_FOLDED: &str = "UPDATE t SET v = v + 1 WHERE id <= 3 AND folded() = 1";

#[test]
fn rows_changed_by_a_bind_are_the_portals_own_when_others_are_bound_in_between() {
    let (mut bed, mut raw) = stage(FOLDED);
    raw.open("a", WITH_FOLDED).execute("a", 0);
    assert_eq!(raw.sync().trace(), "1 2 WG001 ZI");
    raw.open("a", WITH_FOLDED).open("b", WITH_FOLDED).execute("a", 0).execute("b", 0);
    assert_eq!(raw.sync().trace(), "1 2 1 2 WG001 ZI");
    raw.open("a", WITH_FOLDED).run(THREE).execute("a", 0);
    assert_eq!(raw.sync().trace(), "1 2 1 2 UPDATE:3 WG001 ZI");
    assert_eq!(sum(&mut bed), 0);
}

#[test]
fn rows_changed_by_binds_of_one_pipeline_are_not_added_up() {
    let (mut bed, mut raw) = stage(FOLDED);
    let sql = "UPDATE t SET v = v WHERE id < folded()";
    for portal in ["a", "b", "c", "d"] {
        raw.open(portal, sql);
    }
    for portal in ["a", "b", "c", "d"] {
        raw.execute(portal, 0);
    }
    assert_eq!(raw.sync().trace(), "1 2 1 2 1 2 1 2 UPDATE:0 UPDATE:0 UPDATE:0 UPDATE:0 ZI");
    assert_eq!(sum(&mut bed), 12);
}

/// However many portals a client binds before it runs the first one, and whatever becomes of the others, what was changed
/// while that one was planned counts with what it changes.
#[test]
fn rows_changed_by_a_bind_are_never_forgotten_while_the_portal_can_run() {
    let others = "UPDATE t SET v = v WHERE id < folded()";
    for name in ["", "a", "<unnamed>"] {
        let (mut bed, mut raw) = stage(FOLDED);
        bed.passes(
            "CREATE FUNCTION fails() RETURNS int LANGUAGE plpgsql IMMUTABLE AS
                    'BEGIN PERFORM three(); RETURN 1 / 0; END'",
        );
        raw.query("BEGIN");
        raw.open(name, WITH_FOLDED);
        let many = 200;
        for other in 0..many {
            // The unnamed portal goes with the next simple query.
            let shape = if name.is_empty() { 0 } else { other % 4 };
            match shape {
                0 => drop(raw.open(&format!("b{other}"), others).sync()),
                1 => drop(raw.open("closed", others).close("closed").sync()),
                2 => assert_eq!(raw.query("SELECT 1 WHERE folded() = 1"), "T D SELECT:1 ZT"),
                _ => {
                    raw.query("SAVEPOINT s");
                    assert_eq!(raw.open("failed", "SELECT fails()").sync().trace(), "1 22012 ZE");
                    raw.query("ROLLBACK TO s");
                }
            }
        }
        raw.execute(name, 0);
        let trace = raw.sync().trace();
        assert!(trace.ends_with("WG001 ZE"), "portal \"{name}\": {trace}");
        raw.query("ROLLBACK");
        assert_eq!(sum(&mut bed), 0);
        raw.assert_fresh(&mut bed);
    }
}

/// Each command of a string answers for what was changed while it was planned, whether it writes anything itself or not.
#[test]
fn rows_changed_while_a_command_of_a_string_is_planned_are_that_commands() {
    // Three rows while it is planned, inside an exception block or not, and none when it runs.
    const FOLD: &str = "SELECT folded()";
    const TRIED: &str = "SELECT tried()";
    let (mut bed, _) = stage(FOLDED);
    bed.passes(
        "CREATE FUNCTION try_three() RETURNS int LANGUAGE plpgsql VOLATILE AS
         'BEGIN RETURN three(); EXCEPTION WHEN division_by_zero THEN RETURN 0; END';
         CREATE FUNCTION tried() RETURNS int LANGUAGE plpgsql IMMUTABLE AS 'BEGIN RETURN try_three(); END'",
    );
    let strings: [&[&str]; 9] = [
        &[FOLD, THREE],
        &[FOLD, FOLD],
        &[THREE, FOLD],
        &[FOLD, "SELECT 1", THREE],
        &[THREE, "SELECT 1", FOLD, THREE, FOLD, "SELECT 1"],
        &[FOLD, "PREPARE p AS SELECT 1", "EXECUTE p", "DEALLOCATE p", THREE],
        &[FOLD, TRIED],
        &[TRIED, THREE, FOLD],
        &[FOLD, "DO 'BEGIN PERFORM three(); END'", FOLD],
    ];
    for commands in strings {
        let string = commands.join("; ");
        for string in [
            string.clone(),
            format!("{string};"),
            format!("{string}; -- and no more"),
            format!("BEGIN; {string}; COMMIT"),
            format!("BEGIN; SAVEPOINT s; {string}; RELEASE s; COMMIT"),
        ] {
            bed.passes(&string);
        }
    }
    // In a block an exception block while the next one is planned is known for what it is.
    bed.passes(&format!("BEGIN; {THREE}; {TRIED}; {TRIED}; COMMIT"));
    for commands in [[FOLD, WITH_FOLDED], [WITH_FOLDED, "SELECT 1"], [FOLD, ALL], [ALL, FOLD]] {
        let string = commands.join("; ");
        for string in
            [string.clone(), format!("{string};"), format!("BEGIN; {string}; COMMIT"), format!("{string}; {FOLD}")]
        {
            bed.refused(&string);
        }
    }
}

/// Without a transaction block, what the triggers do that are deferred to the end of a string is not a statement of its own.
#[test]
fn deferred_triggers_at_the_end_of_a_string_go_on_with_its_last_write() {
    let (mut bed, _) = stage(
        "CREATE TABLE u (id int, v int); INSERT INTO u SELECT i, 0 FROM generate_series(1, 6) AS i;
         CREATE FUNCTION follow() RETURNS trigger LANGUAGE plpgsql AS
             'BEGIN PERFORM touch(NEW.id); RETURN NULL; EXCEPTION WHEN division_by_zero THEN RETURN NULL; END';
         CREATE CONSTRAINT TRIGGER follow AFTER UPDATE ON u DEFERRABLE INITIALLY DEFERRED
             FOR EACH ROW EXECUTE FUNCTION follow();",
    );
    let write = "UPDATE u SET v = v + 1 WHERE id <= 3";
    for string in
        [write.to_owned(), format!("{write};"), format!("{write}; SELECT 1"), format!("SELECT 1; {write}; SELECT 1;")]
    {
        bed.limit("{public.t, public.u}", 5);
        bed.refused(&string);
        bed.limit("{public.t, public.u}", 6);
        bed.passes(&string);
    }
}

/// Tries to change all rows each time it is called, and hides the refusal.
const TRY: &str = "
    CREATE FUNCTION try() RETURNS int LANGUAGE plpgsql AS $$
    BEGIN UPDATE t SET v = 9; RETURN 1; EXCEPTION WHEN SQLSTATE 'WG001' THEN RETURN 0; END $$;";

#[test]
fn a_portal_refused_again_after_another_one_is_still_one_event() {
    let (mut bed, mut raw) = stage(TRY);
    let sql = "SELECT try() FROM generate_series(1, 3)";
    raw.open("a", sql).execute("a", 1).execute("a", 1).open("b", sql).execute("b", 1).execute("a", 1).execute("b", 1);
    assert_eq!(raw.sync().trace(), "1 2 D s D s 1 2 D s D s D s ZI");
    assert_eq!(sum(&mut bed), 0);
    wait_until(20, || bed.number("SELECT count(*) FROM writeguard.event WHERE kind = 'blocked'") >= 2);
    let waiting = "SELECT count(*) FROM pg_stat_activity
                   WHERE backend_type LIKE 'pg_writeguard worker' AND datname = current_database()";
    wait_until(20, || bed.number(waiting) == 0);
    assert_eq!(bed.number("SELECT count(*) FROM writeguard.event WHERE kind = 'blocked'"), 2);
}

// Pipelines.

#[test]
fn a_pipeline_refused_in_the_middle_is_undone_from_its_beginning() {
    let (mut bed, mut raw) = stage("");
    for _ in 0..3 {
        raw.run(THREE).run(THREE).run(ALL).run(THREE).run(THREE);
        assert_eq!(raw.sync().trace(), "1 2 UPDATE:3 1 2 UPDATE:3 1 2 WG001 ZI");
        assert_eq!(sum(&mut bed), 0);
        raw.assert_fresh(&mut bed);
    }
    raw.run(THREE).run(THREE).run("UPDATE t SET v = v + 1 WHERE id > 3").run(THREE).run(THREE);
    assert_eq!(raw.sync().trace(), format!("{}ZI", "1 2 UPDATE:3 ".repeat(5)));
    assert_eq!(sum(&mut bed), 15);
}

#[test]
fn pipelines_sent_ahead_of_their_answers_are_refused_one_by_one() {
    let (mut bed, mut raw) = stage("");
    for sql in [THREE, ALL, THREE, ALL, ALL, THREE] {
        raw.run(sql).message(Some(b'S'), &[]);
    }
    let mut traces = Vec::new();
    for _ in 0..6 {
        traces.push(raw.ready().trace());
    }
    let (passed, refused) = ("1 2 UPDATE:3 ZI", "1 2 WG001 ZI");
    assert_eq!(traces, [passed, refused, passed, refused, refused, passed]);
    assert_eq!(sum(&mut bed), 9);
}

#[test]
fn a_pipeline_in_a_transaction_block_is_refused_with_the_block() {
    let (mut bed, mut raw) = stage("");
    raw.run("BEGIN").run(THREE).run("SAVEPOINT a").run(THREE).run(ALL).run("ROLLBACK TO a").run("COMMIT");
    assert_eq!(raw.sync().trace(), "1 2 BEGIN 1 2 UPDATE:3 1 2 SAVEPOINT 1 2 UPDATE:3 1 2 WG001 ZE");
    raw.run("ROLLBACK TO a").run(THREE).run("COMMIT");
    assert_eq!(raw.sync().trace(), "1 2 ROLLBACK 1 2 UPDATE:3 1 2 COMMIT ZI");
    assert_eq!(sum(&mut bed), 6);
    raw.assert_fresh(&mut bed);
}

#[test]
fn the_transaction_of_a_pipeline_has_one_budget() {
    let (mut bed, mut raw) = stage("");
    bed.policy("tables => '{public.t}', max_rows_per_transaction => 8");
    for _ in 0..2 {
        assert_eq!(raw.run(THREE).run(THREE).run(THREE).sync().trace(), "1 2 UPDATE:3 1 2 UPDATE:3 1 2 WG001 ZI");
    }
    assert_eq!(sum(&mut bed), 0);
    for _ in 0..3 {
        assert_eq!(raw.run(THREE).sync().trace(), "1 2 UPDATE:3 ZI");
    }
    assert_eq!(sum(&mut bed), 9);
}

#[test]
fn a_pipeline_that_is_flushed_only_is_refused_and_undone() {
    let (mut bed, mut raw) = stage("");
    for _ in 0..2 {
        assert_eq!(raw.run(THREE).flush("UPDATE").trace(), "1 2 UPDATE:3");
        assert_eq!(raw.run(THREE).flush("UPDATE").trace(), "1 2 UPDATE:3");
        assert_eq!(sum(&mut bed), 0);
        assert_eq!(raw.run(ALL).flush("WG").trace(), "1 2 WG001");
        raw.run(THREE).simple(THREE).message(Some(b'H'), &[]);
        assert_eq!(raw.sync().trace(), "ZI");
        assert_eq!(sum(&mut bed), 0);
        raw.assert_fresh(&mut bed);
    }
}

#[test]
fn other_errors_in_a_pipeline_leave_no_count() {
    let (mut bed, mut raw) = stage("");
    bed.policy("tables => '{public.t}', max_rows => 3, max_rows_per_transaction => 4");
    for _ in 0..2 {
        for (sql, words) in [
            ("UPDATE t SET v = 1 / (id - 2) WHERE id <= 3", "1 2 22012"),
            ("SELECT 1 / 0", "1 22012"),
            ("SELECT nothing", "42703"),
            ("no SQL at all", "42601"),
        ] {
            raw.run(THREE).run(sql).run(THREE);
            assert_eq!(raw.sync().trace(), format!("1 2 UPDATE:3 {words} ZI"), "{sql}");
            raw.run(THREE).run("UPDATE t SET v = 0 WHERE id = 4").run("SELECT 1 / 0");
            assert_eq!(raw.sync().trace(), "1 2 UPDATE:3 1 2 UPDATE:1 1 22012 ZI", "{sql}");
            raw.run(THREE).run("UPDATE t SET v = 0 WHERE id >= 5");
            assert_eq!(raw.sync().trace(), "1 2 UPDATE:3 1 2 WG001 ZI", "{sql}");
        }
    }
    assert_eq!(sum(&mut bed), 0);
}

#[test]
fn each_bind_of_a_prepared_statement_is_a_statement() {
    let (mut bed, mut raw) = stage("");
    bed.policy("tables => '{public.t}', max_rows => 3, max_rows_per_transaction => 600");
    let many = |raw: &mut Raw, last: &str| {
        raw.parse("s", FIRST);
        for _ in 0..199 {
            raw.bind("", "s", &["3"]).execute("", 0);
        }
        raw.bind("", "s", &[last]).execute("", 0);
        let answer = raw.sync();
        raw.query("DEALLOCATE s");
        answer.trace()
    };
    let passed = "2 UPDATE:3 ";
    assert_eq!(many(&mut raw, "4"), format!("1 {}2 WG001 ZI", passed.repeat(199)));
    assert_eq!(sum(&mut bed), 0);
    assert_eq!(many(&mut raw, "3"), format!("1 {}ZI", passed.repeat(200)));
    assert_eq!(sum(&mut bed), 600);
    bed.policy("tables => '{public.t}', max_rows => 3, max_rows_per_transaction => 599");
    assert_eq!(many(&mut raw, "3"), format!("1 {}2 WG001 ZI", passed.repeat(199)));
    assert_eq!(sum(&mut bed), 600);
}

#[test]
fn binary_parameters_are_counted_as_text_ones_are() {
    let (mut bed, mut raw) = stage("");
    let body = [text("s"), text(FIRST), vec![0, 1], 23_u32.to_be_bytes().to_vec()].concat();
    raw.message(Some(b'P'), &body);
    raw.bind_in(1, "", "s", &[&3_i32.to_be_bytes()]).execute("", 0);
    assert_eq!(raw.sync().trace(), "1 2 UPDATE:3 ZI");
    raw.bind_in(1, "", "s", &[&4_i32.to_be_bytes()]).execute("", 0);
    assert_eq!(raw.sync().trace(), "2 WG001 ZI");
    raw.bind_in(1, "", "s", &[&[0, 0, 4]]).execute("", 0);
    assert_eq!(raw.sync().trace(), "08P01 ZI");
    assert_eq!(sum(&mut bed), 3);
    raw.assert_fresh(&mut bed);
}

#[test]
fn a_statement_that_is_only_described_writes_and_counts_nothing() {
    let (mut bed, mut raw) = stage("");
    bed.policy("tables => '{public.t}', max_rows => 3, max_rows_per_transaction => 3");
    let sql = format!("{ALL} RETURNING id");
    raw.parse("s", &sql).describe('S', "s").bind("c", "s", &[]).describe('P', "c").run(THREE).close("c");
    assert_eq!(raw.sync().trace(), "1 t T 2 T 1 2 UPDATE:3 3 ZI");
    assert_eq!(sum(&mut bed), 3);
    raw.bind("c", "s", &[]).describe('P', "c").execute("c", 0);
    assert_eq!(raw.sync().trace(), "2 T WG001 ZI");
    raw.parse("e", &format!("EXPLAIN {ALL}")).bind("", "e", &[]).execute("", 0).run(THREE);
    assert_eq!(raw.sync().trace(), "1 2 D EXPLAIN 1 2 UPDATE:3 ZI");
    assert_eq!(sum(&mut bed), 6);
}

#[test]
fn each_refusal_of_a_pipeline_names_its_own_statement() {
    let (mut bed, mut raw) = stage("");
    let commented = format!("/* the second */ {TOUCH_ALL}");
    raw.open("a", TOUCH_ALL).execute("a", 3).open("b", &commented).execute("b", 3).run(THREE).execute("b", 1);
    assert_eq!(raw.sync().trace(), "1 2 D s 1 2 D s 1 2 UPDATE:3 WG001 ZI");
    raw.open("a", TOUCH_ALL).execute("a", 3).open("b", &commented).execute("b", 3).run(THREE).execute("a", 1);
    assert_eq!(raw.sync().trace(), "1 2 D s 1 2 D s 1 2 UPDATE:3 WG001 ZI");
    raw.simple(&format!("{THREE}; /* third */ {ALL}; {THREE}"));
    assert_eq!(raw.ready().trace(), "UPDATE:3 WG001 ZI");
    let blocked = "SELECT count(*) FROM writeguard.event WHERE kind = 'blocked'";
    wait_until(20, || bed.number(blocked) == 3);
    for statement in [commented.as_str(), TOUCH_ALL, &format!("/* third */ {ALL}")] {
        assert_eq!(bed.number(&format!("{blocked} AND statement = $x${statement}$x$")), 1, "{statement}");
    }
}

// Messages of different kinds.

/// What is read until a message that is not the pipeline's own is done. Servers differ in whether the pipeline's
/// transaction is over then (15 to 17), or goes on until the pipeline is (PostgreSQL 18): then it is ended here, by one more
/// of its own statements, because 18.6 by itself forgets the commit if the Sync comes at once.
fn ended(raw: &mut Raw) -> String {
    let trace = raw.ready().trace();
    match trace.strip_suffix("ZT") {
        Some(told) => {
            assert_eq!(raw.run("SET enable_sort = on").sync().trace(), "1 2 SET ZI");
            format!("{told}ZI")
        }
        None => trace,
    }
}

#[test]
fn a_query_inside_an_open_pipeline_shares_its_transaction() {
    let (mut bed, mut raw) = stage("");
    bed.policy("tables => '{public.t}', max_rows => 3, max_rows_per_transaction => 5");
    raw.run(THREE).simple(THREE);
    assert_eq!(raw.ready().trace(), "1 2 UPDATE:3 WG001 ZI");
    assert_eq!(sum(&mut bed), 0);
    assert_eq!(raw.sync().trace(), "ZI");

    bed.policy("tables => '{public.t}', max_rows => 3, max_rows_per_transaction => 6");
    raw.run(THREE).simple(THREE);
    assert_eq!(ended(&mut raw), "1 2 UPDATE:3 UPDATE:3 ZI");
    assert_eq!(sum(&mut bed), 6);
    raw.run(THREE);
    assert_eq!(raw.sync().trace(), "1 2 UPDATE:3 ZI");
    assert_eq!(sum(&mut bed), 9);
}

#[test]
fn a_query_between_the_fetches_of_a_portal_is_a_statement_of_its_own() {
    let (mut bed, mut raw) = stage("");
    assert_eq!(raw.query("BEGIN"), "BEGIN ZT");
    raw.open("c", TOUCH_ALL).execute("c", 2);
    assert_eq!(raw.sync().trace(), "1 2 D s ZT");
    assert_eq!(raw.query(&format!("{THREE}; {THREE}")), "UPDATE:3 UPDATE:3 ZT");
    assert_eq!(raw.execute("c", 1).sync().trace(), "D s ZT");
    assert_eq!(raw.query(THREE), "UPDATE:3 ZT");
    assert_eq!(raw.execute("c", 1).sync().trace(), "WG001 ZE");
    assert_eq!(raw.query("COMMIT"), "ROLLBACK ZI");
    assert_eq!(sum(&mut bed), 0);
}

#[test]
fn what_follows_the_refused_command_of_a_string_does_not_run() {
    let (mut bed, mut raw) = stage("");
    assert_eq!(raw.query(&format!("{THREE}; {ALL}; {THREE}")), "UPDATE:3 WG001 ZI");
    assert_eq!(sum(&mut bed), 0);
    assert_eq!(raw.query(&format!("{THREE}; COMMIT; {THREE}; {ALL}; {THREE}")), "UPDATE:3 COMMIT UPDATE:3 WG001 ZI");
    assert_eq!(sum(&mut bed), 3);
    raw.assert_fresh(&mut bed);
}

#[test]
fn a_fast_path_call_inside_an_open_pipeline_shares_its_transaction() {
    let (mut bed, mut raw) = stage(
        "CREATE FUNCTION first(x int) RETURNS int LANGUAGE sql
         AS 'WITH u AS (UPDATE t SET v = v + 1 WHERE id <= x RETURNING 1) SELECT count(*)::int FROM u'",
    );
    let first = u32::try_from(bed.number("'first'::regproc::oid::bigint")).unwrap();
    bed.policy("tables => '{public.t}', max_rows => 3, max_rows_per_transaction => 5");
    assert_eq!(raw.run(THREE).call(first, 3).ready().trace(), "1 2 UPDATE:3 WG001 ZI");
    assert_eq!(sum(&mut bed), 0);
    assert_eq!(ended(raw.run(THREE).call(first, 2)), "1 2 UPDATE:3 V ZI");
    assert_eq!(sum(&mut bed), 5);

    bed.limit("{public.t}", 3);
    for _ in 0..3 {
        raw.call(first, 3).call(first, 4).call(first, 3).run(THREE);
        assert_eq!(raw.ready().trace(), "V ZI");
        assert_eq!(raw.ready().trace(), "WG001 ZI");
        assert_eq!(raw.ready().trace(), "V ZI");
        assert_eq!(raw.sync().trace(), "1 2 UPDATE:3 ZI");
    }
    assert_eq!(sum(&mut bed), 5 + 27);
}

/// Each row that is copied into `source` changes one row of `t`.
const COPIED: &str = "
    CREATE TABLE source (id int);
    CREATE FUNCTION follow() RETURNS trigger LANGUAGE plpgsql
    AS 'BEGIN PERFORM touch(NEW.id); RETURN NEW; END';
    CREATE TRIGGER follow BEFORE INSERT ON source FOR EACH ROW EXECUTE FUNCTION follow();";

#[test]
fn rows_that_a_copy_sets_off_are_refused_in_the_middle_of_its_data() {
    let (mut bed, mut raw) = stage(COPIED);
    for extended in [false, true] {
        for rows in [3, 4, 6] {
            if extended {
                raw.run(THREE).run("COPY source FROM STDIN").message(Some(b'S'), &[]);
            } else {
                raw.simple("COPY source FROM STDIN");
            }
            let begun = raw.read(|word| word == "G").trace();
            assert_eq!(begun, if extended { "1 2 UPDATE:3 1 2 G" } else { "G" });
            for row in 1..=rows {
                let line = format!("{row}\n");
                let (head, tail) = line.as_bytes().split_at(1);
                raw.message(Some(b'd'), head).message(Some(b'd'), tail);
            }
            raw.message(Some(b'c'), &[]);
            if extended {
                raw.message(Some(b'S'), &[]);
            }
            assert_eq!(raw.ready().trace(), if rows == 3 { "COPY:3 ZI" } else { "WG001 ZI" });
            raw.assert_fresh(&mut bed);
        }
    }
    assert_eq!((sum(&mut bed), bed.number("SELECT count(*) FROM source")), (9, 6));
}

#[test]
fn a_copy_that_the_client_gives_up_leaves_no_count() {
    let (mut bed, mut raw) = stage(COPIED);
    for _ in 0..3 {
        raw.simple("COPY source FROM STDIN").message(Some(b'd'), b"1\n2\n3\n").message(Some(b'f'), &text("no"));
        assert_eq!(raw.ready().trace(), "G 57014 ZI");
        raw.assert_fresh(&mut bed);
    }
    raw.simple("COPY source FROM STDIN").message(Some(b'd'), b"1\n2\n3\n").simple(THREE);
    raw.leave(&mut bed);
    let mut raw = Raw::to(&bed);
    raw.simple("COPY source FROM STDIN").message(Some(b'd'), b"1\n2\n3\n4");
    raw.leave(&mut bed);
    assert_eq!(sum(&mut bed), 0);
}

// Clients that leave.

#[test]
fn a_pipeline_without_its_end_changes_nothing_when_the_client_leaves() {
    let (mut bed, mut raw) = stage("");
    raw.run(THREE).run(THREE).message(Some(b'X'), &[]);
    raw.leave(&mut bed);
    assert_eq!(sum(&mut bed), 0);

    let mut raw = Raw::to(&bed);
    assert_eq!(raw.run(THREE).flush("UPDATE").trace(), "1 2 UPDATE:3");
    raw.leave(&mut bed);
    assert_eq!(sum(&mut bed), 0);

    let mut raw = Raw::to(&bed);
    raw.run(THREE).message(Some(b'S'), &[]).message(Some(b'X'), &[]);
    raw.leave(&mut bed);
    assert_eq!(sum(&mut bed), 3);
}

#[test]
fn a_refused_write_whose_client_does_not_wait_is_undone_and_on_record() {
    let (mut bed, mut raw) = stage("");
    raw.run(THREE).run(ALL).run(THREE).message(Some(b'S'), &[]);
    raw.leave(&mut bed);
    let mut raw = Raw::to(&bed);
    raw.simple(ALL);
    raw.leave(&mut bed);
    let mut raw = Raw::to(&bed);
    raw.simple(ALL).send();
    raw.stream.shutdown(Shutdown::Read).unwrap();
    raw.leave(&mut bed);
    wait_until(20, || bed.number("SELECT count(*) FROM writeguard.event WHERE kind = 'blocked'") == 3);
    assert_eq!(sum(&mut bed), 0);
}

#[test]
fn a_message_that_is_cut_short_runs_nothing() {
    let (mut bed, mut raw) = stage("");
    raw.run(THREE).simple(&format!("{THREE}; {ALL}"));
    raw.unsent.truncate(raw.unsent.len() - 4);
    raw.leave(&mut bed);

    let mut raw = Raw::to(&bed);
    raw.simple(THREE).run("SELECT 1").sync();
    assert_eq!(sum(&mut bed), 3);
    raw.parse("", THREE).unsent.truncate(20);
    raw.leave(&mut bed);

    let mut raw = Raw::to(&bed);
    raw.run(THREE).message(Some(b'?'), &[0; 8]);
    raw.leave(&mut bed);
    assert_eq!(sum(&mut bed), 3);
}

#[test]
fn a_cancel_request_leaves_no_count() {
    let (mut bed, mut raw) = stage("");
    bed.policy("tables => '{public.t}', max_rows => 3, max_rows_per_transaction => 3");
    for _ in 0..3 {
        let mut holder = bed.db().admin();
        holder.batch_execute("BEGIN; SELECT FROM t WHERE id = 3 FOR UPDATE").unwrap();
        raw.run("UPDATE t SET v = v + 1 WHERE id <= 2").run("UPDATE t SET v = v + 1 WHERE id = 3");
        raw.message(Some(b'S'), &[]).send();
        let pid = u32::from_be_bytes(raw.key[..4].try_into().unwrap());
        let waits = format!("SELECT count(*) FROM pg_locks WHERE pid = {pid} AND NOT granted");
        wait_until(20, || bed.number(&waits) == 1);
        let mut request = vec![0, 0, 0, 16];
        request.extend_from_slice(&80_877_102_u32.to_be_bytes());
        request.extend_from_slice(&raw.key);
        socket().write_all(&request).unwrap();
        assert_eq!(raw.ready().trace(), "1 2 UPDATE:2 1 2 57014 ZI");
        drop(holder);
        raw.assert_fresh(&mut bed);
    }
    assert_eq!(sum(&mut bed), 0);
}

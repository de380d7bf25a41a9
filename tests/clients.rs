//! Flag and token from the clients that people have: psql, a driver that prepares on the server, a cursor's fetches
//! (pools: pools.rs, drivers: drivers.rs). And that no token is to be read anywhere afterwards.

use std::fs;

use crate::common::approvals::*;
use crate::common::raw::Raw;
use crate::common::{Refusal, Server, expect_refusal};

/// A token of the requester's for [`WRITE`].
#[track_caller]
fn token(stage: &Stage) -> String {
    stage.approved(WRITE).1
}

/// Tools put where a statement comes from into a comment; PostgreSQL 18 takes it for no part of the statement.
#[test]
fn comments_before_a_statement_are_part_of_its_text() {
    let mut stage = Stage::new("");
    let commented = format!("/* app:shop */ -- it's; /*\n {WRITE}");
    let id = request(&mut stage.requester(), &format!("  {commented};"), &[]);
    let shown = |stage: &mut Stage, sql: &str| stage.admin.query_one(sql, &[]).unwrap().get::<_, String>(0);
    assert_eq!(shown(&mut stage, "SELECT statement FROM writeguard.pending"), commented);
    let token = approve(&mut stage.approver(), id);
    let mut client = stage.requester();
    for (before, passes) in [("SELECT '/*';", false), ("SELECT $$ -- $$; /* another */", false), ("SELECT '/*';", true)]
    {
        let write = if passes { &commented } else { WRITE };
        let armed = format!("SET writeguard.override = on; SET writeguard.token = '{token}'");
        let result = client.batch_execute(&format!("{armed}; {before} {write}"));
        assert_eq!(result.is_ok(), passes, "{before} {write}: {result:?}");
        assert_eq!(stage.changed(), if passes { 5 } else { 0 });
    }
    let statement = "SELECT statement FROM writeguard.event WHERE kind = 'overridden'";
    assert_eq!(shown(&mut stage, statement), commented);

    // The same in the other protocol.
    stage.unguarded("UPDATE t SET a = 0");
    let token = stage.approved(&commented).1;
    arm(&mut client, &token);
    client.execute(&commented, &[]).unwrap();
    assert_eq!(stage.changed(), 5);
}

// ---- psql ----

fn psql(stage: &Stage, arguments: &[&str]) -> (String, bool) {
    Server::shared().psql_with(&stage.db.name, &stage.requester, arguments)
}

#[test]
fn psql_with_one_command_after_the_other() {
    let mut stage = Stage::new("");
    let set = format!("SET writeguard.token = '{}'", token(&stage));
    let (printed, passed) =
        psql(&stage, &["-c", "SET writeguard.override = on", "-c", &set, "-c", &format!("{WRITE};")]);
    assert!(passed, "{printed}");
    assert_eq!(stage.changed(), 5);
}

#[test]
fn psql_with_all_commands_in_one_string() {
    let mut stage = Stage::new("");
    let token = token(&stage);
    let all = format!("SET writeguard.override = on; SET writeguard.token = '{token}';\n  {WRITE} ;\nSELECT 'done'");
    let (printed, passed) = psql(&stage, &["-At", "-c", &all]);
    assert!(passed && printed.trim_end() == "done", "{printed}");
    assert_eq!(stage.changed(), 5);
}

#[test]
fn psql_with_a_file_in_autocommit_and_without_and_in_one_transaction() {
    for arguments in [&[][..], &["-v", "AUTOCOMMIT=off"], &["-1"], &["-v", "ON_ERROR_ROLLBACK=on"]] {
        let mut stage = Stage::new("");
        let file = std::env::temp_dir().join(format!("{}.sql", stage.db.name));
        let commit = if arguments.contains(&"AUTOCOMMIT=off") { "COMMIT;" } else { "" };
        let script = format!(
            "SET writeguard.override = on;\nSET writeguard.token = '{}';\n\n{WRITE}\n;\n{commit}\n",
            token(&stage)
        );
        fs::write(&file, script).unwrap();
        let path = file.to_str().unwrap().to_owned();
        let (printed, passed) = psql(&stage, &[arguments, &["-v", "ON_ERROR_STOP=1", "-f", &path]].concat());
        fs::remove_file(&file).unwrap();
        assert!(passed, "{arguments:?}: {printed}");
        assert_eq!(stage.changed(), 5, "{arguments:?}");
        assert_eq!(stage.overridden().len(), 1, "{arguments:?}");
    }
}

#[test]
fn psql_that_executes_the_request_shows_the_rows() {
    let mut stage = Stage::new("");
    let (id, _) = stage.approved("UPDATE t SET a = 9 RETURNING id");
    let (printed, passed) = psql(&stage, &["-At", "-c", &format!("SELECT * FROM writeguard.execute({id})")]);
    assert!(passed, "{printed}");
    assert!(printed.contains(&format!("NOTICE:  executed request {id}: 5 rows changed\n")), "{printed}");
    assert_eq!(printed.lines().filter(|line| line.starts_with("{\"id\": ")).count(), 5, "{printed}");
    assert_eq!(stage.changed(), 5);
}

// ---- A driver that prepares on the server ----

const PREPARED: &str = "UPDATE t SET a = $1 WHERE id <= $2";

/// A connection of the requester's without a driver.
fn raw(stage: &Stage) -> Raw {
    Raw::connect(&stage.requester, &stage.db.name)
}

/// What a driver sends for a statement that it has prepared under this name before.
fn bound(raw: &mut Raw, name: &str, parameters: &[&str]) -> String {
    raw.bind("", name, parameters).describe('P', "").execute("", 0).sync().trace()
}

fn approved_with(stage: &Stage, parameters: &[Option<&str>]) -> String {
    let id = request(&mut stage.requester(), PREPARED, parameters);
    approve(&mut stage.approver(), id)
}

#[test]
fn a_statement_that_is_prepared_once_and_run_again_and_again() {
    let mut stage = Stage::new("");
    let mut driver = raw(&stage);
    assert_eq!(driver.parse("S_1", PREPARED).sync().trace(), "1 ZI");
    assert_eq!(bound(&mut driver, "S_1", &["1", "3"]), "2 n UPDATE:3 ZI");
    for run in 0..3 {
        let token = approved_with(&stage, &[Some("9"), Some("100")]);
        assert_eq!(bound(&mut driver, "S_1", &["9", "100"]), "2 n WG001 ZI", "{run}");
        let arm = format!("SET writeguard.token = '{token}'");
        // As a driver sends it, and as psql does.
        assert_eq!(driver.run("SET writeguard.override = on").sync().trace(), "1 2 SET ZI");
        assert_eq!(driver.query(&arm), "SET ZI");
        // Other parameters are another statement.
        assert_eq!(bound(&mut driver, "S_1", &["9", "99"]), "2 n WG006 ZI", "{run}");
        assert_eq!(driver.query(&format!("SET writeguard.override = on; {arm}")), "SET SET ZI");
        assert_eq!(bound(&mut driver, "S_1", &["9", "100"]), "2 n UPDATE:5 ZI", "{run}");
        assert_eq!(stage.changed(), 5);
        stage.unguarded("UPDATE t SET a = 0");
    }
    assert_eq!(stage.overridden().len(), 3);
}

#[test]
fn parameters_mean_the_same_in_text_and_in_binary() {
    for (format, values) in [(0, [&b"9"[..], b"100"]), (1, [&[0, 0, 0, 9], &[0, 0, 0, 100]])] {
        let mut stage = Stage::new("");
        let token = approved_with(&stage, &[Some(" 9"), Some("0100")]);
        let mut driver = raw(&stage);
        driver.query(&format!("SET writeguard.override = on; SET writeguard.token = '{token}'"));
        let trace = driver.parse("", PREPARED).bind_in(format, "", "", &values).execute("", 0).sync().trace();
        assert_eq!(trace, "1 2 UPDATE:5 ZI", "{format}");
        assert_eq!(stage.changed(), 5);
    }
}

#[test]
fn a_driver_with_another_date_style_is_told_which_was_reviewed() {
    let mut stage = Stage::new("ALTER TABLE t ADD d date");
    let statement = "UPDATE t SET a = 9, d = $1";
    let id = request(&mut stage.requester(), statement, &[Some("2026-02-01")]);
    let token = approve(&mut stage.approver(), id);
    let mut driver = raw(&stage);
    driver
        .query(&format!("SET datestyle = 'SQL, DMY'; SET writeguard.override = on; SET writeguard.token = '{token}'"));
    let trace = driver.parse("", statement).bind("", "", &["01/02/2026"]).execute("", 0).sync().trace();
    assert_eq!(trace, "1 2 WG006 ZI");
    driver
        .query(&format!("SET datestyle = 'ISO, MDY'; SET writeguard.override = on; SET writeguard.token = '{token}'"));
    let trace = driver.parse("", statement).bind("", "", &["2026-02-01"]).execute("", 0).sync().trace();
    assert_eq!(trace, "1 2 UPDATE:5 ZI");
    assert_eq!(stage.number("SELECT count(*) FROM t WHERE d = '2026-02-01'"), 5);
}

#[test]
fn autocommit_off() {
    let mut stage = Stage::new("");
    let mut driver = raw(&stage);
    assert_eq!(driver.parse("S_1", PREPARED).parse("B", "BEGIN").sync().trace(), "1 1 ZI");
    for (end, changed) in [("ROLLBACK", 0), ("COMMIT", 5)] {
        let token = approved_with(&stage, &[Some("9"), Some("100")]);
        driver.bind("", "B", &[]).execute("", 0);
        driver.run("SET LOCAL writeguard.override = on").run(&format!("SET LOCAL writeguard.token = '{token}'"));
        driver.bind("", "S_1", &["9", "100"]).execute("", 0);
        assert_eq!(driver.sync().trace(), "2 BEGIN 1 2 SET 1 2 SET 2 UPDATE:5 ZT", "{end}");
        assert_eq!(driver.run(end).sync().trace(), format!("1 2 {end} ZI"));
        assert_eq!(stage.changed(), changed, "{end}");
        // Nothing is armed in the next transaction.
        driver.bind("", "B", &[]).execute("", 0).bind("", "S_1", &["9", "100"]).execute("", 0);
        assert_eq!(driver.sync().trace(), "2 BEGIN 2 WG001 ZE", "{end}");
        driver.query("ROLLBACK");
    }
}

#[test]
fn a_pipeline_arms_and_writes_in_one_go() {
    let mut stage = Stage::new("");
    let token = token(&stage);
    let mut driver = raw(&stage);
    driver.run("SET writeguard.override = on").run(&format!("SET writeguard.token = '{token}'")).run(WRITE);
    assert_eq!(driver.sync().trace(), "1 2 SET 1 2 SET 1 2 UPDATE:5 ZI");
    assert_eq!(stage.changed(), 5);
}

#[test]
fn rows_that_are_fetched_a_few_at_a_time() {
    let mut stage = Stage::new("");
    let statement = "UPDATE t SET a = 9 WHERE id <= $1 RETURNING id";
    let id = request(&mut stage.requester(), statement, &[Some("100")]);
    let token = approve(&mut stage.approver(), id);
    let mut driver = raw(&stage);
    driver
        .run("BEGIN")
        .run("SET LOCAL writeguard.override = on")
        .run(&format!("SET LOCAL writeguard.token = '{token}'"));
    driver.parse("S_1", statement).bind("C_1", "S_1", &["100"]).execute("C_1", 2);
    assert_eq!(driver.sync().trace(), "1 2 BEGIN 1 2 SET 1 2 SET 1 2 D s ZT");
    // Other commands in between are no part of it.
    assert_eq!(driver.run("UPDATE t SET a = a WHERE id <= 3").sync().trace(), "1 2 UPDATE:3 ZT");
    assert_eq!(driver.execute("C_1", 2).sync().trace(), "D s ZT");
    assert_eq!(driver.execute("C_1", 2).sync().trace(), "D UPDATE:1 ZT");
    assert_eq!(driver.run("COMMIT").sync().trace(), "1 2 COMMIT ZI");
    assert_eq!((stage.changed(), stage.overridden()), (5, vec![(5, Some(id))]));
}

#[test]
fn an_executed_request_that_is_fetched_a_few_rows_at_a_time() {
    let mut stage = Stage::new("");
    let (id, _) = stage.approved("UPDATE t SET a = 9 RETURNING id");
    let mut driver = raw(&stage);
    driver.run("BEGIN").parse("S_1", "SELECT * FROM writeguard.execute($1)");
    driver.bind("C_1", "S_1", &[&id.to_string()]).execute("C_1", 2);
    assert_eq!(driver.sync().trace(), "1 2 BEGIN 1 2 D s ZT");
    // It is over for the guard, although not for the client.
    assert_eq!(driver.run("UPDATE t SET a = 8 WHERE id <= 3").sync().trace(), "1 2 UPDATE:3 ZT");
    assert_eq!(driver.execute("C_1", 2).execute("C_1", 0).sync().trace(), "D s D SELECT:1 ZT");
    assert_eq!(driver.run("COMMIT").sync().trace(), "1 2 COMMIT ZI");
    assert_eq!((stage.changed(), stage.overridden()), (2, vec![(5, Some(id))]));
}

#[test]
fn a_driver_with_transactions_of_its_own() {
    let mut stage = Stage::new("");
    let mut client = stage.requester();
    let statement = client.prepare(PREPARED).unwrap();
    let token = approved_with(&stage, &[Some("9"), Some("100")]);
    for commit in [false, true] {
        let mut transaction = client.transaction().unwrap();
        let set = format!("SET LOCAL writeguard.override = on; SET LOCAL writeguard.token = '{token}'");
        transaction.batch_execute(&set).unwrap();
        assert_eq!(transaction.execute(&statement, &[&9, &100]).unwrap(), 5);
        if commit {
            transaction.commit().unwrap();
        }
    }
    assert_eq!(stage.changed(), 5);
    let refusal = expect_refusal(client.execute(&statement, &[&9, &100]));
    assert_eq!(refusal.sqlstate, "WG001", "{refusal:?}");
}

// ---- Nothing of a token is to be read anywhere ----

#[test]
fn no_token_is_in_a_log_an_event_a_table_an_error_or_an_activity() {
    let server = Server::start(&[
        "log_statement = none",
        "log_min_error_statement = panic",
        "log_error_verbosity = verbose",
        "log_min_messages = info",
        "log_parameter_max_length_on_error = 0",
        "log_connections = on",
    ]);
    let mut stage = Stage::on(&server, "");
    let requester = stage.requester.clone();
    pass(&mut stage.admin, &format!("GRANT EXECUTE ON FUNCTION writeguard.break_glass TO {requester}"));
    let (mut client, told) = stage.listening();
    let (id, token) = stage.approved(WRITE);
    let (other, unused) = stage.approved("DELETE FROM t");
    let broken = text(&mut client, "SELECT writeguard.break_glass('DELETE FROM t WHERE id < 5', 'why')");
    let tokens = [token.clone(), unused.clone(), broken.clone()];
    let mut seen = String::new();
    // What fails with a token at hand, or in the text itself.
    let failing = [
        "UPDATE t SET a = 9 /* @ */",
        "DO $$ BEGIN UPDATE t SET a = 9; RAISE '%', '@' IS NULL; END $$",
        "SET writeguard.token = '@'; UPDATE t SET a = 8",
        "SELECT set_config('writeguard.token', '@', false); UPDATE t SET a = 7",
        "UPDATE t SET a = a / (id - 5)",
        "UPDATE t SET nothing = 1",
        "TRUNCATE t",
        "SELECT writeguard.approve(1)",
        "SELECT * FROM writeguard.execute(4711) /* @ */",
        "SELECT writeguard.request('SET writeguard.token = ''@''', 'why')",
        "SELECT writeguard.request(NULL, '@')",
        "SELECT writeguard.break_glass('DROP TABLE t /* @ */', '@')",
    ];
    for sql in failing {
        for with in &tokens {
            let sql = sql.replace('@', with);
            for extended in [false, true] {
                arm(&mut client, with);
                let failed = if extended && !sql.contains(';') {
                    client.execute(&sql, &[]).map(drop)
                } else {
                    client.batch_execute(&sql)
                };
                match failed {
                    Ok(()) => panic!("{sql} passed"),
                    Err(error) => seen += &format!("{:?}\n", Refusal::of(&error)),
                }
            }
        }
    }
    // Settings show nothing, nor do their errors.
    for sql in ["SHOW writeguard.token", "SELECT current_setting('writeguard.token')"] {
        arm(&mut client, &token);
        seen += &format!("{:?}\n", client.simple_query(sql).unwrap());
    }
    // And what passes.
    arm(&mut client, &token);
    pass(&mut client, WRITE);
    pass(&mut client, &format!("SELECT * FROM writeguard.execute({other})"));
    pass(&mut stage.admin, "INSERT INTO t SELECT generate_series(1, 5) ON CONFLICT DO NOTHING");
    arm(&mut client, &broken);
    pass(&mut client, "DELETE FROM t WHERE id < 5");
    assert_eq!(stage.state(id), "spent");
    assert_eq!(stage.overridden().len(), 3);

    seen += &format!("{:?}\n", told.take());
    seen += &server.log();
    for table in ["event", "request", "outbox", "policy", "my_events", "my_requests", "pending", "event_queue"] {
        seen += &text(
            &mut stage.admin,
            &format!("SELECT coalesce(string_agg(x::text, ' '), '') FROM writeguard.{table} AS x"),
        );
        if table.starts_with("my_") {
            let sql = format!("SELECT coalesce(string_agg(x::text, ' '), '') FROM writeguard.{table} AS x");
            seen += &text(&mut client, &sql);
        }
    }
    seen += &text(
        &mut stage.admin,
        "SELECT string_agg(a::text, ' ') FROM pg_stat_activity AS a WHERE backend_type LIKE 'pg_writeguard%'",
    );
    seen += &text(&mut stage.admin, "SELECT coalesce(string_agg(s::text, ' '), '') FROM pg_settings AS s");
    assert!(seen.contains("GLASS BROKEN") && seen.contains("token_refused") && seen.contains("WG006"));
    for token in tokens {
        for part in [&token[..], &token[..16], &token[48..]] {
            let at = seen.find(part).map(|at| &seen[at.saturating_sub(300)..(at + 100).min(seen.len())]);
            assert_eq!(at, None, "a token is to be read");
        }
    }
}

#[test]
fn tokens_are_256_bits_and_never_the_same() {
    let mut stage = Stage::new("");
    let mut tokens: Vec<String> = (0..20).map(|_| token(&stage)).collect();
    assert!(tokens.iter().all(|token| token.len() == 64 && token.bytes().all(|byte| byte.is_ascii_hexdigit())));
    // Each of the 256 bits is set in some and not in others; by chance all agree in one of them in 1 of 4000 runs.
    let bit = |token: &String, at: usize| u8::from_str_radix(&token[at / 4..=at / 4], 16).unwrap() >> (at % 4) & 1;
    let stuck = (0..256).filter(|at| (0..20).all(|n| bit(&tokens[n], *at) == bit(&tokens[0], *at))).count();
    assert!(stuck < 3, "{stuck} bits never change");
    tokens.sort();
    tokens.dedup();
    assert_eq!(tokens.len(), 20);
    let hashes = "SELECT count(DISTINCT token_sha256) FROM writeguard.request WHERE token_sha256 ~ '^[0-9a-f]{64}$'";
    assert_eq!(stage.number(hashes), 20);
}

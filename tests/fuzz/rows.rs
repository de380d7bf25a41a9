//! Random statements: the guard counts each row that they change, no more and no less.

use std::collections::BTreeMap;
use std::thread;

use postgres::Client;

use super::generate::{Case, Command, Generator, Step};
use super::schema::{SETUP, TABLES, TREES};
use super::{seed, setting};
use crate::common::{Database, Refusal, Server};

/// What a statement may fail with of its own: a violated constraint, two changes of one row, a division by zero, a
/// cursor without a row, and what PostgreSQL does not support for some table or plan.
const OWN_ERRORS: &[&str] =
    &["23502", "23503", "23505", "23514", "21000", "27000", "22012", "P0001", "44000", "24000", "0A000", "55000"];

/// Cases between two refills, and between two looks at the events.
const REFILL: usize = 40;

/// One case in so many is run again at the limit and one row below it.
const EXACT: usize = 6;

const LABELS: &[&str] = &[
    "after trigger",
    "also rule",
    "before trigger",
    "cursor",
    "deferred trigger",
    "delete",
    "do block",
    "exception block",
    "explain analyze",
    "foreign key",
    "function",
    "inheritance",
    "instead of trigger",
    "instead rule",
    "limit by ctid",
    "meeting branches",
    "merge",
    "no trigger",
    "on conflict",
    "partitions",
    "plain table",
    "prepared",
    "row movement",
    "self-reference",
    "transaction",
    "transition tables",
    "truncate",
    "update",
    "view",
    "view on a view",
    "writing with",
];

/// What became of the cases.
#[derive(Default)]
struct Tally {
    commands: usize,
    failed: usize,
    changed: usize,
    rows: i64,
    exact: usize,
    refused: usize,
    labels: BTreeMap<&'static str, usize>,
}

impl Tally {
    fn add(&mut self, other: Tally) {
        self.commands += other.commands;
        self.failed += other.failed;
        self.changed += other.changed;
        self.rows += other.rows;
        self.exact += other.exact;
        self.refused += other.refused;
        for (label, times) in other.labels {
            *self.labels.entry(label).or_default() += times;
        }
    }
}

/// One database with three sessions: no policy covers `free`, the flag lifts every limit of `lifted`, and `limited`
/// obeys the policy `exact`.
struct Bench {
    db: Database,
    admin: Client,
    free: Client,
    lifted: Client,
    limited: Client,
    /// `lifted` and `limited`.
    roles: [String; 2],
    seed: u64,
    generator: Generator,
    /// What makes such a database anew.
    preparation: String,
    /// The transactions since the last refill, for whoever has to find out.
    history: String,
    /// Those whose events were not compared yet.
    cases: Vec<Case>,
    last_event: i64,
    tally: Tally,
}

/// What a transaction changed, found out without the guard.
struct Truth {
    /// Rows of each command, the commit last.
    statements: Vec<i64>,
    /// Rows of the transaction after each command.
    running: Vec<i64>,
    /// Rows with those that were taken back again.
    attempted: i64,
    contents: String,
}

impl Bench {
    fn new(seed: u64, prefix: &'static str) -> Bench {
        let db = Server::shared().database();
        let mut admin = db.admin();
        let [free, lifted, limited] = ["free", "lifted", "limited"].map(|role| db.role(role));
        let preparation = preparation(&lifted);
        run(&mut admin, &preparation);
        let settings = "-c fuzz.tag=none -c jit=off";
        let mut bench = Bench {
            free: db.connect_with(&free, settings),
            lifted: db.connect_with(&lifted, settings),
            limited: db.connect_with(&limited, settings),
            preparation: format!(
                "CREATE EXTENSION pg_writeguard;\nCREATE ROLE {free};\nCREATE ROLE {lifted};\n{preparation}
                 SELECT oracle.refill();\nSET jit = off;\nSET SESSION AUTHORIZATION {free};\n"
            ),
            roles: [lifted, limited],
            db,
            admin,
            seed,
            generator: Generator::new(seed, prefix),
            history: String::new(),
            cases: Vec::new(),
            last_event: 0,
            tally: Tally::default(),
        };
        bench.refill();
        bench
    }

    /// Says how to get there, and fails.
    #[track_caller]
    fn fail(&self, case: &Case, what: &str) -> ! {
        let script = case.script();
        let before = self.history.split(&script).next().unwrap_or_default();
        let path = std::env::temp_dir().join(format!("pg_writeguard-fuzz-{}.sql", self.seed));
        let whole = format!(
            "{}{before}\n-- The case:\nSET SESSION AUTHORIZATION {};\n{}",
            self.preparation,
            self.roles[0],
            script.replacen(";\n", "; SET LOCAL writeguard.override = on;\n", 1)
        );
        let written = match std::fs::write(&path, whole) {
            Ok(()) => format!("all of it, for psql and an empty database, is in {}", path.display()),
            Err(error) => format!("what came before cannot be written: {error}"),
        };
        panic!("FUZZ_SEED={} in database {}, case {}: {what}\n{script}({written})", seed(), self.db.name, case.tag);
    }

    fn refill(&mut self) {
        run(&mut self.admin, "SELECT oracle.refill()");
        // Nobody else does.
        run(&mut self.admin, "VACUUM pg_class, writeguard.outbox");
        self.history.clear();
    }

    fn go(mut self, commands: usize) -> Tally {
        while self.tally.commands < commands {
            let case = self.generator.case();
            self.tally.commands += case.commands().count();
            if !case.is_ambiguous && self.generator.random.one_in(EXACT) {
                self.at_the_limit(&case);
            } else {
                self.measure(case);
            }
            if self.generator.random.one_in(REFILL) {
                self.compare();
                self.refill();
            }
        }
        self.compare();
        self.tally
    }

    /// Runs a case with every limit lifted; the events then tell what the guard counted.
    fn measure(&mut self, case: Case) {
        let begin =
            format!("{}; SET LOCAL writeguard.override = on; SELECT oracle.count('{}', 0)", case.begin, case.tag);
        let end = format!("SELECT oracle.count('{0}', 1); SET LOCAL fuzz.tag = '{0}_c'", case.tag);
        let commit = format!("/*{}_c*/ COMMIT", case.tag);
        // Where a rule adds commands, the event's text is that of the whole string, and its tag the first one there.
        let in_one_string = !case.has_rules() && self.generator.random.one_in(2);
        let extended = self.generator.random.one_in(3);
        let lifted = &mut self.lifted;
        let result = if in_one_string {
            let steps = case.steps.iter().map(|step| match step {
                Step::Command(command) => format!("SET LOCAL fuzz.tag = '{}'; {};\n", command.tag, command.sql),
                Step::Control(sql) => format!("{sql};\n"),
            });
            lifted.batch_execute(&format!("{begin};\n{}{end}", steps.collect::<String>()))
        } else {
            lifted.batch_execute(&begin).and_then(|()| {
                for step in &case.steps {
                    match step {
                        Step::Command(command) => {
                            lifted.batch_execute(&format!("SET LOCAL fuzz.tag = '{}'", command.tag))?;
                            if extended {
                                lifted.execute(&command.sql, &[])?;
                            } else {
                                lifted.batch_execute(&command.sql)?;
                            }
                        }
                        Step::Control(sql) => lifted.batch_execute(sql)?,
                    }
                }
                lifted.batch_execute(&end)
            })
        };
        match result.and_then(|()| self.lifted.batch_execute(&commit)) {
            Ok(()) => {
                self.history += &case.script();
                self.cases.push(case);
            }
            Err(error) => {
                let refusal = Refusal::of(&error);
                let _ = self.lifted.batch_execute("ROLLBACK; DEALLOCATE ALL");
                if !OWN_ERRORS.contains(&refusal.sqlstate.as_str()) {
                    self.fail(&case, &format!("{refusal:#?}"));
                }
                self.tally.failed += case.commands().count();
            }
        }
    }

    /// Compares the events since the last time with the log of the triggers and with PostgreSQL's counters.
    fn compare(&mut self) {
        let cases = std::mem::take(&mut self.cases);
        self.assert_the_log_is_complete(&cases);
        let rows = self
            .admin
            .query(
                "WITH moved AS (
                     SELECT i.entry AS came, max(d.entry) AS went
                     FROM oracle.log AS i
                     JOIN oracle.log AS d
                          ON d.uid = i.uid AND d.tag = i.tag AND d.operation = 'DELETE' AND d.entry < i.entry
                     WHERE i.operation = 'INSERT' GROUP BY i.entry
                 ), changes AS (
                     SELECT tag, relation, CASE WHEN entry IN (SELECT went FROM moved) THEN 'UPDATE' ELSE operation END
                                           AS operation, 1 AS n
                     FROM oracle.log WHERE operation <> 'INSERT'
                     UNION ALL
                     SELECT c.tag || '_0', w.relation, 'BARE', c.n[place + 1] - b.n[place + 1]
                     FROM oracle.counters AS b JOIN oracle.counters AS c USING (tag) CROSS JOIN oracle.watched AS w
                     WHERE b.phase = 0 AND c.phase = 1 AND w.relation LIKE 'bare.%'
                           AND c.n[place + 1] > b.n[place + 1]
                 ), expected AS (
                     SELECT tag, policy, sum(n)::bigint AS rows
                     FROM changes JOIN oracle.covers USING (relation) GROUP BY 1, 2
                     UNION ALL
                     SELECT tag, CASE operation WHEN 'UPDATE' THEN 'updates' ELSE 'deletes' END, sum(n)::bigint
                     FROM changes WHERE operation IN ('UPDATE', 'DELETE') GROUP BY 1, 2
                 ), actual AS (
                     SELECT substring(statement FROM '/[*]([a-z0-9_]+)[*]/') AS tag, policy, kind, rows
                     FROM writeguard.event WHERE id > $1 AND kind NOT IN ('policy_changed', 'blocked')
                 )
                 SELECT tag, policy, e.rows, a.rows, coalesce(a.kind, 'overridden')
                 FROM expected AS e FULL JOIN actual AS a USING (tag, policy)",
                &[&self.last_event],
            )
            .unwrap_or_else(|error| panic!("cannot compare: {error:?}"));
        let mut by_tag: BTreeMap<String, Vec<(String, i64, i64, String)>> = BTreeMap::new();
        for row in &rows {
            let number = |place| row.get::<_, Option<i64>>(place).unwrap_or(0);
            let tag = row.get::<_, Option<String>>(0).unwrap_or_default();
            by_tag.entry(tag).or_default().push((row.get(1), number(2), number(3), row.get(4)));
        }
        for case in &cases {
            // The tables without triggers are counted for the transaction as a whole.
            if let Some(all) = merge_bare(case, &mut by_tag) {
                let expected: i64 = all.0;
                if expected != all.1 {
                    self.fail(case, &format!("{expected} rows of tables without triggers, counted as {}", all.1));
                }
            }
            for tag in case.commands().map(|command| command.tag.clone()).chain([format!("{}_c", case.tag)]) {
                let found = by_tag.remove(&tag).unwrap_or_default();
                let truncates = case.commands().any(|c| c.tag == tag && c.labels.contains(&"truncate"));
                for (policy, expected, actual, kind) in &found {
                    // A TRUNCATE counts no further than past the limits.
                    let as_expected = expected == actual || truncates && (1..*expected).contains(actual);
                    if !as_expected || kind != "overridden" {
                        self.fail(
                            case,
                            &format!("{tag}: \"{policy}\" should be {expected} rows, and is {kind} {actual}"),
                        );
                    }
                }
                let Some(command) = case.commands().find(|command| command.tag == tag) else { continue };
                if let Some((_, rows, ..)) = found.iter().find(|(policy, ..)| policy == "all") {
                    self.note(command, *rows);
                }
            }
        }
        assert!(by_tag.is_empty(), "events of no case: {by_tag:?}");
        self.last_event = number(&mut self.admin, "SELECT coalesce(max(id), 0) FROM writeguard.event");
        run(&mut self.admin, "TRUNCATE oracle.log, oracle.counters");
    }

    fn note(&mut self, command: &Command, rows: i64) {
        self.tally.changed += 1;
        self.tally.rows += rows;
        let mut labels = command.labels.clone();
        labels.sort_unstable();
        labels.dedup();
        for label in labels {
            *self.tally.labels.entry(label).or_default() += 1;
        }
    }

    /// Where nothing was taken back, the log has as many entries for each table as PostgreSQL counted rows.
    fn assert_the_log_is_complete(&mut self, cases: &[Case]) {
        let rows = self
            .admin
            .query(
                "SELECT tag, relation, counted, logged FROM (
                     SELECT c.tag, w.relation, c.n[place + 1] - b.n[place + 1] AS counted,
                            (SELECT count(*) FROM oracle.log AS l
                             WHERE l.relation = w.relation AND l.operation <> 'INSERT'
                                   AND l.tag LIKE c.tag || '\\_%' AND l.tag <> c.tag || '_c') AS logged
                     FROM oracle.counters AS b JOIN oracle.counters AS c USING (tag) CROSS JOIN oracle.watched AS w
                     WHERE b.phase = 0 AND c.phase = 1 AND w.relation LIKE 'fuzz.%'
                 ) AS x WHERE counted <> logged",
                &[],
            )
            .expect("cannot compare the counters");
        for row in rows {
            let (tag, relation): (String, String) = (row.get(0), row.get(1));
            let (counted, logged): (i64, i64) = (row.get(2), row.get(3));
            let Some(case) = cases.iter().find(|case| case.tag == tag) else { continue };
            let may_differ = case.has_exceptions || case.rolls_back;
            if !case.truncates && (!may_differ || counted < logged) {
                self.fail(case, &format!("{counted} rows of {relation} were changed, but {logged} are in the log"));
            }
        }
    }

    /// Runs a case without a policy, takes it back, and runs it again with as many rows as it needs and with one less.
    fn at_the_limit(&mut self, case: &Case) {
        let Some(truth) = self.truth(case) else {
            self.tally.failed += case.commands().count();
            return;
        };
        let per_transaction = self.generator.random.one_in(2);
        let extended = self.generator.random.one_in(2);
        let counts = if per_transaction { &truth.running } else { &truth.statements };
        let most = *counts.iter().max().expect("a commit at least");
        if most == 0 {
            return;
        }
        let before = contents(&mut self.free);
        self.limit(per_transaction, most - 1);
        match self.limited_run(case, extended) {
            Err((step, refusal)) => {
                let truncates = case.commands().nth(step).is_some_and(|command| command.labels.contains(&"truncate"));
                let own = refusal.sqlstate != if truncates { "WG005" } else { "WG001" };
                if own && !(case.swallows && OWN_ERRORS.contains(&refusal.sqlstate.as_str())) {
                    self.fail(case, &format!("with {} rows: {refusal:#?}", most - 1));
                }
                let first = counts.iter().position(|rows| *rows > most - 1);
                if !case.has_exceptions && Some(step) != first {
                    self.fail(case, &format!("with {} rows: command {step} was refused, not {first:?}", most - 1));
                }
                if contents(&mut self.free) != before {
                    self.fail(case, &format!("with {} rows: refused, but not undone", most - 1));
                }
                self.tally.refused += 1;
            }
            Ok(passed) if case.swallows => {
                let counts = if per_transaction { &passed.running } else { &passed.statements };
                if counts.iter().any(|rows| *rows > most - 1) {
                    self.fail(case, &format!("with {} rows: passed with {counts:?}", most - 1));
                }
                // What it caught it went on from another way; there is nothing to compare the rest with.
                self.forget(case);
                return;
            }
            Ok(_) => self.fail(case, &format!("passed with {} rows, and changed {most}", most - 1)),
        }
        // How far a command gets that is to fail midway depends on where its rows are on their pages.
        let enough = if case.has_exceptions { most.max(truth.attempted) * 2 + 500 } else { most };
        self.limit(per_transaction, enough);
        match self.limited_run(case, extended) {
            Err((_, refusal)) => self.fail(case, &format!("with {enough} rows: {refusal:#?}")),
            Ok(passed) => {
                if passed.statements != truth.statements {
                    self.fail(
                        case,
                        &format!("changed {:?} rows, and {:?} before", passed.statements, truth.statements),
                    );
                }
                let contents = contents(&mut self.free);
                if contents != truth.contents {
                    self.fail(case, &format!("did something else under a policy:\n{contents}\n{}", truth.contents));
                }
            }
        }
        self.forget(case);
        self.tally.exact += 1;
        for (command, rows) in case.commands().zip(&truth.statements).filter(|(_, rows)| **rows > 0) {
            self.note(command, *rows);
        }
    }

    /// The case has been looked at; its entries in the log are not compared with events.
    fn forget(&mut self, case: &Case) {
        self.history += &case.script();
        self.admin.execute("DELETE FROM oracle.log WHERE tag LIKE $1", &[&of_case(case)]).expect("the log");
    }

    fn limit(&mut self, per_transaction: bool, rows: i64) {
        let column = if per_transaction { "max_rows_per_transaction" } else { "max_rows" };
        let role = &self.roles[1];
        run(
            &mut self.admin,
            &format!(
                "SELECT writeguard.set_policy('exact', tables => '{{fuzz.*,bare.*}}', roles => '{{{role}}}',
                     {column} => {rows})"
            ),
        );
    }

    /// What a case changes when nobody limits it; none where it fails of its own. Nothing stays of it.
    fn truth(&mut self, case: &Case) -> Option<Truth> {
        let before = versions(&mut self.free);
        let result = run_case(&mut self.free, case, false, "SET CONSTRAINTS ALL IMMEDIATE");
        let truth = match result {
            Ok(mut truth) => {
                truth.contents = contents(&mut self.free);
                let after = versions(&mut self.free);
                let logged = self
                    .free
                    .query(
                        "SELECT DISTINCT uid FROM oracle.log WHERE operation <> 'INSERT' AND tag LIKE $1",
                        &[&of_case(case)],
                    )
                    .expect("the log")
                    .iter()
                    .map(|row| row.get::<_, i64>(0))
                    .collect::<Vec<_>>();
                let gone = before.iter().filter(|(uid, version)| after.get(*uid) != Some(version)).map(|(uid, _)| *uid);
                let gone: Vec<i64> = gone.collect();
                let known: Vec<i64> = before.keys().copied().filter(|uid| logged.contains(uid)).collect();
                if gone != known {
                    self.fail(case, &format!("rows {gone:?} were changed, but {known:?} are in the log"));
                }
                Some(truth)
            }
            Err((_, refusal)) if OWN_ERRORS.contains(&refusal.sqlstate.as_str()) => None,
            Err((_, refusal)) => self.fail(case, &format!("without a policy: {refusal:#?}")),
        };
        let _ = self.free.batch_execute("ROLLBACK; DEALLOCATE ALL");
        truth
    }

    fn limited_run(&mut self, case: &Case, extended: bool) -> Result<Truth, (usize, Refusal)> {
        let result = run_case(&mut self.limited, case, extended, "COMMIT");
        let _ = self.limited.batch_execute("ROLLBACK; DEALLOCATE ALL");
        result
    }
}

/// The rows of tables without triggers that the case changed, and how many the guard counted for them. They are taken
/// out of what is compared by command.
fn merge_bare(case: &Case, by_tag: &mut BTreeMap<String, Vec<(String, i64, i64, String)>>) -> Option<(i64, i64)> {
    let tags: Vec<String> = case.commands().map(|command| command.tag.clone()).collect();
    if tags.len() < 2 {
        return None;
    }
    let (mut expected, mut actual) = (0, 0);
    for tag in &tags {
        let Some(found) = by_tag.get_mut(tag) else { continue };
        if let Some(place) = found.iter().position(|(policy, ..)| policy == "bare.*") {
            let bare = found.swap_remove(place);
            expected += bare.1;
            actual += bare.2;
            if let Some(all) = found.iter_mut().find(|(policy, ..)| policy == "all") {
                all.1 -= bare.1;
                all.2 -= bare.2;
            }
            found.retain(|(policy, ..)| !policy.starts_with("bare."));
        }
    }
    Some((expected, actual))
}

/// Runs a case step by step, ends it with `end`, and tells the rows of each; or which failed.
fn run_case(client: &mut Client, case: &Case, extended: bool, end: &str) -> Result<Truth, (usize, Refusal)> {
    let mut truth = Truth { statements: Vec::new(), running: Vec::new(), attempted: 0, contents: String::new() };
    let failed = |step: usize| move |error: postgres::Error| (step, Refusal::of(&error));
    client.batch_execute(&case.begin).map_err(failed(0))?;
    let begin = client.query_one("SELECT oracle.counted(), oracle.bare()", &[]).map_err(failed(0))?;
    let (counted, mut bare): (Vec<i64>, i64) = (begin.get(0), begin.get(1));
    let bare_before = bare;
    for step in &case.steps {
        let place = truth.statements.len();
        match step {
            Step::Control(sql) => client.batch_execute(sql).map_err(failed(place))?,
            Step::Command(command) => {
                let tag = format!("SET LOCAL fuzz.tag = '{}'", command.tag);
                client.batch_execute(&tag).map_err(failed(place))?;
                if extended {
                    client.execute(&command.sql, &[]).map(drop).map_err(failed(place))?;
                } else {
                    client.batch_execute(&command.sql).map_err(failed(place))?;
                }
                let (own, all) = logged(client, &command.tag).map_err(failed(place))?;
                let bare_now: i64 = client.query_one("SELECT oracle.bare()", &[]).map_err(failed(place))?.get(0);
                truth.statements.push(own + bare_now - bare);
                truth.running.push(all + bare_now - bare_before);
                bare = bare_now;
            }
        }
    }
    let place = truth.statements.len();
    let after: Vec<i64> = client.query_one("SELECT oracle.counted()", &[]).map_err(failed(place))?.get(0);
    truth.attempted = after.iter().zip(&counted).map(|(after, before)| after - before).sum();
    let tag = format!("{}_c", case.tag);
    client.batch_execute(&format!("SET LOCAL fuzz.tag = '{tag}'")).map_err(failed(place))?;
    client.batch_execute(&format!("/*{tag}*/ {end}")).map_err(failed(place))?;
    let (own, all) = logged(client, &tag).map_err(failed(place))?;
    truth.statements.push(own);
    truth.running.push(all + bare - bare_before);
    truth.attempted += own;
    Ok(truth)
}

/// Changed rows in the log: of one command, and of the transaction.
fn logged(client: &mut Client, tag: &str) -> Result<(i64, i64), postgres::Error> {
    let row = client.query_one(
        "SELECT count(*) FILTER (WHERE tag = $1), count(*) FROM oracle.log
         WHERE operation <> 'INSERT' AND tag LIKE substring($1 FROM '^[a-z0-9]+') || '\\_%'",
        &[&tag],
    )?;
    Ok((row.get(0), row.get(1)))
}

/// Tables, policies for the role whose limits are lifted, and what each of them covers.
fn preparation(lifted: &str) -> String {
    let mut sql = SETUP.to_owned();
    for (place, relation) in TABLES.iter().enumerate() {
        sql += &format!("INSERT INTO oracle.watched VALUES ({place}, '{relation}', '{relation}'::regclass);\n");
        sql += &format!("INSERT INTO oracle.covers VALUES ('all', '{relation}');\n");
    }
    let mut policy = |name: &str, tables: &str, operations: &str| {
        sql += &format!(
            "SELECT writeguard.set_policy('{name}', tables => '{{{tables}}}', roles => '{{{lifted}}}',
                 operations => '{{{operations}}}', max_rows => 0, override => 'flag');\n"
        );
    };
    policy("all", "fuzz.*,bare.*", "update,delete,truncate");
    policy("updates", "fuzz.*", "update");
    policy("deletes", "fuzz.*", "delete");
    for (tables, _) in TREES {
        policy(tables, tables, "update,delete,truncate");
    }
    for (policy, relations) in TREES {
        for relation in relations {
            sql += &format!("INSERT INTO oracle.covers VALUES ('{policy}', '{relation}');\n");
        }
    }
    sql
}

/// The pattern of a case's tags.
fn of_case(case: &Case) -> String {
    format!("{}\\_%", case.tag)
}

/// Where each row is, by the number that no other row has.
fn versions(client: &mut Client) -> BTreeMap<i64, String> {
    let selects: Vec<String> = TABLES
        .iter()
        .filter(|table| table.starts_with("fuzz."))
        .map(|table| format!("SELECT uid, tableoid::text || ctid || xmin FROM ONLY {table}"))
        .collect();
    let rows = client.query(&selects.join(" UNION ALL "), &[]).expect("the tables");
    rows.iter().map(|row| (row.get(0), row.get(1))).collect()
}

/// A digest of all tables, but for the numbers that no two rows share.
fn contents(client: &mut Client) -> String {
    let selects: Vec<String> = TABLES
        .iter()
        .map(|table| {
            format!(
                "SELECT '{table} ' || coalesce(md5(string_agg(x, '|' ORDER BY x)), 'empty') AS m
                 FROM (SELECT (to_jsonb(t) - 'uid')::text FROM ONLY {table} AS t) AS y (x)"
            )
        })
        .collect();
    let sql = format!("SELECT string_agg(m, ', ' ORDER BY m) FROM ({}) AS x", selects.join(" UNION ALL "));
    client.query_one(&sql, &[]).expect("the tables").get(0)
}

#[track_caller]
fn run(client: &mut Client, sql: &str) {
    if let Err(error) = client.batch_execute(sql) {
        let start: String = sql.chars().take(200).collect();
        panic!("{start} …: {:#?}", Refusal::of(&error));
    }
}

#[track_caller]
fn number(client: &mut Client, sql: &str) -> i64 {
    client.query_one(sql, &[]).unwrap_or_else(|error| panic!("{sql}: {error:?}")).get(0)
}

#[test]
fn random_statements_are_counted_to_the_row() {
    let commands = setting("FUZZ_STATEMENTS", 10_500) as usize;
    println!("FUZZ_SEED={} FUZZ_STATEMENTS={commands}", seed());
    const PREFIXES: [&str; 3] = ["a", "b", "d"];
    let workers: Vec<_> = PREFIXES
        .iter()
        .enumerate()
        .map(|(worker, prefix)| {
            let seed = seed().wrapping_mul(1_000).wrapping_add(worker as u64);
            thread::spawn(move || Bench::new(seed, prefix).go(commands.div_ceil(PREFIXES.len())))
        })
        .collect();
    let mut tally = Tally::default();
    for worker in workers {
        match worker.join() {
            Ok(done) => tally.add(done),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }
    println!(
        "{} statements: {} failed of their own, {} changed {} rows; {} at the limit, {} refused below it\n{:?}",
        tally.commands, tally.failed, tally.changed, tally.rows, tally.exact, tally.refused, tally.labels
    );
    assert!(tally.commands >= commands);
    assert!(tally.changed * 2 >= tally.commands, "only {} of {} changed anything", tally.changed, tally.commands);
    assert!(tally.exact * 40 >= tally.commands, "only {} of {} were run at the limit", tally.exact, tally.commands);
    assert!(tally.refused >= tally.exact);
    for label in LABELS {
        let times = tally.labels.get(label).copied().unwrap_or_default();
        assert!(times * 250 >= commands, "\"{label}\" changed rows only {times} times");
    }
}

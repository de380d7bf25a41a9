//! DDL between writes whose rows are kept, each followed by undo: every row that undo says it has restored is as it was
//! before, in the columns that it had, and every other row is left alone.
//!
//! Three kinds of cases: one statement (a DO block), one transaction, and several sessions in turn; each with capture on or
//! under the override. What the rows were is known from copies that are made by hand between all steps, in which columns
//! go by a tag that stays with them whatever they are called.
//!
//! Left out, because undo is not right there yet: triggers, and keys whose values change or rotate (but for a row that
//! moves to another partition).

use std::collections::{BTreeMap, BTreeSet};
use std::thread;

use postgres::Client;

use super::random::Random;
use super::shapes::{Model, SETUP};
use super::{seed, setting};
use crate::common::{Database, Refusal, Server};

const ORACLE: &str = r#"
CREATE SCHEMA oracle;
CREATE SEQUENCE oracle.uids START 101;
CREATE FUNCTION oracle.numbers(n int) RETURNS SETOF int LANGUAGE sql AS
    $$ SELECT nextval('oracle.uids')::int FROM generate_series(1, n) $$;
CREATE UNLOGGED TABLE oracle.tags (relation oid, number int2, tag text);
CREATE UNLOGGED TABLE oracle.first_names (relation oid, name text);
CREATE SEQUENCE oracle.fresh;
CREATE UNLOGGED TABLE oracle.copies (statement int, step int, relation oid, uid bigint, columns jsonb);

-- Columns that are new: those of a partition or child are those of its parent by the same name.
CREATE FUNCTION oracle.tag() RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    c record;
BEGIN
    FOR c IN SELECT a.attrelid, a.attnum, a.attname, i.inhparent
        FROM pg_attribute AS a JOIN pg_class AS t ON t.oid = a.attrelid
        LEFT JOIN pg_inherits AS i ON i.inhrelid = t.oid
        WHERE t.relnamespace = 'ddl'::regnamespace AND t.relkind IN ('r', 'p') AND a.attnum > 0 AND NOT a.attisdropped
            AND NOT EXISTS (SELECT FROM oracle.tags AS g WHERE (g.relation, g.number) = (a.attrelid, a.attnum))
        ORDER BY i.inhparent NULLS FIRST, a.attnum
    LOOP
        INSERT INTO oracle.tags SELECT c.attrelid, c.attnum, coalesce(
            (SELECT g.tag FROM oracle.tags AS g JOIN pg_attribute AS a ON (a.attrelid, a.attnum) = (g.relation, g.number)
             WHERE g.relation = c.inhparent AND a.attname = c.attname AND NOT a.attisdropped),
            CASE WHEN c.attname IN ('id', 'uid', 'r') AND NOT EXISTS (
                SELECT FROM oracle.tags AS g WHERE g.relation = c.attrelid AND g.tag = c.attname) THEN c.attname END,
            'x' || nextval('oracle.fresh'));
    END LOOP;
END $$;

-- Copies all rows: of each column its type and its text.
CREATE FUNCTION oracle.copy(statement int, step int) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    t record;
BEGIN
    PERFORM oracle.tag();
    -- So that there is a state, too, where there are no rows.
    INSERT INTO oracle.copies VALUES (statement, step, 0, 0, '{}');
    FOR t IN SELECT c.oid, max(a.attname) FILTER (WHERE g.tag = 'uid') AS uid,
            string_agg(format('%L, jsonb_build_array(%L, x.%I::text)', g.tag, format_type(a.atttypid, a.atttypmod) ||
                CASE WHEN a.atttypid = 'ddl.pair'::regtype THEN made_of.attributes ELSE '' END, a.attname), ', ') AS columns
        FROM pg_class AS c JOIN pg_attribute AS a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
        JOIN oracle.tags AS g ON (g.relation, g.number) = (c.oid, a.attnum)
        CROSS JOIN (SELECT string_agg(' ' || attnum, '' ORDER BY attnum) FROM pg_attribute
                    WHERE attrelid = 'ddl.pair'::regclass AND NOT attisdropped) AS made_of (attributes)
        WHERE c.relnamespace = 'ddl'::regnamespace AND c.relkind = 'r' GROUP BY c.oid
    LOOP
        EXECUTE format('INSERT INTO oracle.copies SELECT $1, $2, $3, x.%I, jsonb_build_object(%s) FROM ONLY %s AS x',
                       t.uid, t.columns, t.oid::regclass) USING statement, step, t.oid;
    END LOOP;
END $$;
"#;

/// The sessions of a case, by the setting with which their rows are kept.
const MODES: [&str; 2] = ["capture_undo", "override"];

/// Cases between two worlds.
const CASES: usize = 15;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Form {
    Statement,
    Transaction,
    Sessions,
}

/// Steps that run one after the other, perhaps to be taken back by an exception or a savepoint.
#[derive(Clone)]
struct Group {
    steps: Vec<String>,
    taken_back: bool,
}

#[derive(Clone)]
struct Case {
    form: Form,
    session: usize,
    groups: Vec<Group>,
    /// Copies are made between the steps of a statement, too.
    copies: bool,
    /// What somebody else does before anything is undone.
    since: Vec<String>,
    /// Decides how it is undone.
    undo: u64,
}

impl Case {
    fn generate(random: &mut Random, model: &mut Model) -> Case {
        let form = [Form::Statement, Form::Statement, Form::Transaction, Form::Sessions][random.below(4)];
        let mut groups = Vec::new();
        model.focus(random);
        for _ in 0..random.below(4) + 1 {
            let taken_back = form != Form::Sessions && random.one_in(8);
            let before = model.clone();
            let mut steps = vec![model.write(random)];
            for _ in 0..random.below(3) + 1 {
                steps.push(if random.one_in(2) { model.ddl(random) } else { model.write(random) });
            }
            groups.push(Group { steps, taken_back });
            if taken_back {
                *model = before;
            }
        }
        let mut since = Vec::new();
        while random.one_in(2) {
            since.push(if random.one_in(2) { model.write(random) } else { model.ddl(random) });
        }
        let session = random.below(MODES.len());
        // What rows get by DDL, or when they are inserted, is known from a copy right after it.
        let gives = |step: &String| [" ADD ", " ALTER ", "ALTER TYPE", "INSERT"].iter().any(|word| step.contains(word));
        let copies = groups.iter().flat_map(|group: &Group| &group.steps).any(gives) || random.one_in(2);
        Case { form, session, groups, copies, since, undo: random.next() }
    }

    fn steps(&self) -> usize {
        self.groups.iter().map(|group| group.steps.len()).sum::<usize>() + self.since.len()
    }

    /// The same without one step.
    fn without(&self, place: usize) -> Case {
        let mut case = self.clone();
        let mut place = place;
        for group in &mut case.groups {
            if place < group.steps.len() {
                group.steps.remove(place);
                return case;
            }
            place -= group.steps.len();
        }
        case.since.remove(place);
        case
    }

    /// What each session runs, in order. Copies are part of it.
    fn commands(&self) -> Vec<(usize, String)> {
        let mut commands = Vec::new();
        let mut number = 0;
        // The flag lasts for one transaction.
        let arm = |session: usize| (session, format!("SET writeguard.{} = on", MODES[session]));
        match self.form {
            Form::Statement => {
                let mut body = "PERFORM oracle.copy(0, 0); ".to_owned();
                for group in &self.groups {
                    let mut steps = String::new();
                    for step in &group.steps {
                        number += 1;
                        let copy =
                            if self.copies { format!(" PERFORM oracle.copy(0, {number});") } else { String::new() };
                        steps += &format!("\n  {step};{copy}");
                    }
                    body += &match group.taken_back {
                        true => format!(
                            "\n BEGIN{steps} RAISE EXCEPTION 'back'; EXCEPTION WHEN raise_exception THEN NULL; END;"
                        ),
                        false => steps,
                    };
                }
                let end = format!("PERFORM oracle.copy(0, {});", number + 1);
                commands.push(arm(self.session));
                commands.push((self.session, format!("DO /*s0*/ $do$ BEGIN {body}\n {end} END $do$")));
            }
            Form::Transaction => {
                commands.push((self.session, "BEGIN".into()));
                commands.push(arm(self.session));
                for group in &self.groups {
                    commands.push((self.session, "SAVEPOINT s".into()));
                    for step in &group.steps {
                        commands.push((self.session, format!("SELECT oracle.copy({number}, 0)")));
                        commands.push((self.session, format!("{step} /*s{number}*/")));
                        commands.push((self.session, format!("SELECT oracle.copy({number}, 1)")));
                        number += 1;
                    }
                    let end = if group.taken_back { "ROLLBACK TO s" } else { "RELEASE s" };
                    commands.push((self.session, end.into()));
                }
                commands.push((self.session, "COMMIT".into()));
            }
            Form::Sessions => {
                for step in self.groups.iter().flat_map(|group| &group.steps) {
                    let session = (self.session + number) % MODES.len();
                    commands.push(arm(session));
                    commands.push((session, format!("SELECT oracle.copy({number}, 0)")));
                    commands.push((session, format!("{step} /*s{number}*/")));
                    commands.push((session, format!("SELECT oracle.copy({number}, 1)")));
                    number += 1;
                }
            }
        }
        commands
    }

    fn script(&self) -> String {
        let mut script = format!("-- {:?}\n", self.form);
        for (session, command) in self.commands() {
            script += &format!("/* {} */ {command};\n", MODES[session]);
        }
        self.since.iter().for_each(|step| script += &format!("/* since */ {step};\n"));
        script
    }
}

/// A row's columns by their tags: type and text.
type Columns = BTreeMap<String, (String, Option<String>)>;

/// Rows by their numbers, with the relation that they are in.
type Rows = BTreeMap<i64, (u32, Columns)>;

/// What was undone, and what undo said.
struct Undone {
    /// The states of the rows while the statement ran.
    states: Vec<Rows>,
    before: Rows,
    after: Rows,
    /// Tables that are still there.
    relations: BTreeSet<u32>,
    restored: i64,
    conflicts: i64,
    /// Numbers of the rows that `undo_conflicts` named.
    named: Option<BTreeSet<i64>>,
}

impl Undone {
    /// What is wrong.
    fn check(&self) -> Result<(), String> {
        let (Some(first), Some(last)) = (self.states.first(), self.states.last()) else {
            return Err("a change of no statement".into());
        };
        // Rows as they were at first, with what the statement itself has inserted and added.
        let mut known = first.clone();
        for (uid, (relation, columns)) in self.states.iter().flatten() {
            let (_, known) = known.entry(*uid).or_insert_with(|| (*relation, columns.clone()));
            for (tag, value) in columns {
                known.entry(tag.clone()).or_insert_with(|| value.clone());
            }
        }
        let mut changed = 0;
        // Where more rows are in conflict than were named beforehand, nobody knows which.
        let knows = self.named.as_ref().is_some_and(|named| i64::try_from(named.len()) == Ok(self.conflicts));
        for (uid, (relation, was)) in &known {
            let left = last.get(uid).map(|(_, columns)| columns);
            let is_changed = left.is_none() || was.keys().any(|tag| self.is_written(*uid, tag));
            let is_changed = is_changed && self.relations.contains(relation);
            let (before, after) = (self.before.get(uid), self.after.get(uid));
            let is_named = self.named.as_ref().is_some_and(|named| named.contains(uid));
            if !is_changed || knows && is_named {
                if before != after {
                    return Err(format!("row {uid} is none to be restored, and went from {before:?} to {after:?}"));
                }
                continue;
            }
            changed += 1;
            if !knows && self.conflicts > 0 && before == after {
                continue;
            }
            let Some((_, now)) = after else { return Err(format!("row {uid} is not there, and was {was:?}")) };
            for (tag, (_, text)) in was {
                let Some((_, now)) = now.get(tag) else { continue };
                let unwritten = left.is_some() && !self.is_written(*uid, tag);
                let before = before.and_then(|(_, columns)| columns.get(tag)).map(|(_, text)| text);
                let right = if unwritten { before == Some(now) } else { self.may_be(*uid, tag).contains(&now) };
                if !right {
                    return Err(format!(
                        "row {uid}: column {tag} was {text:?}, was left as {:?}, and is {before:?} before and {now:?} after",
                        left.map(|left| left.get(tag))
                    ));
                }
            }
        }
        for (uid, before) in self.before.iter().filter(|(uid, _)| !known.contains_key(uid)) {
            if self.after.get(uid) != Some(before) {
                return Err(format!("row {uid} is newer, and went from {before:?} to {:?}", self.after.get(uid)));
            }
        }
        if self.restored + self.conflicts < changed {
            return Err(format!("{changed} rows changed, {} restored, {} in conflict", self.restored, self.conflicts));
        }
        Ok(())
    }

    /// Whether a column of a row got another value, though not just by a change of its type.
    fn is_written(&self, uid: i64, tag: &str) -> bool {
        let values: Vec<_> = self.states.iter().filter_map(|rows| rows.get(&uid)?.1.get(tag)).collect();
        values.chunk_by(|(one, _), (other, _)| one == other).any(|same| same.first() != same.last())
    }

    /// The values that a column of a row had before it was written: the first one, and after each change of its type the
    /// one that it got by that.
    fn may_be(&self, uid: i64, tag: &str) -> Vec<&Option<String>> {
        let mut values: Vec<&Option<String>> = Vec::new();
        let mut of = None;
        for (form, text) in self.states.iter().filter_map(|rows| rows.get(&uid)?.1.get(tag)) {
            if of.replace(form) != Some(form) {
                values.push(text);
            }
        }
        values
    }
}

#[derive(Default)]
struct Tally {
    steps: usize,
    failed: usize,
    undone: usize,
    with_conflicts: usize,
    refused: BTreeMap<String, usize>,
    errors: BTreeMap<String, usize>,
    forms: [usize; 3],
}

struct Bench {
    db: Database,
    admin: Client,
    sessions: Vec<Client>,
    roles: Vec<String>,
    tally: Tally,
}

/// Whether an error may be a statement's own.
fn is_fault(refusal: &Refusal) -> bool {
    ["XX", "57P", "08", "53", "58", "40"].iter().any(|class| refusal.sqlstate.starts_with(class))
        || refusal.sqlstate.is_empty()
}

impl Bench {
    fn new() -> Bench {
        let db = Server::shared().database();
        let mut admin = db.admin();
        let roles: Vec<String> = MODES.iter().map(|mode| db.role(mode)).collect();
        run(&mut admin, ORACLE);
        for (role, limit) in roles.iter().zip(["", ", max_rows => 0, override => 'flag'"]) {
            run(
                &mut admin,
                &format!(
                    "ALTER ROLE {role} SUPERUSER;
                     SELECT writeguard.set_policy('{role}', tables => '{{ddl.*}}', roles => '{{{role}}}', undo => '1 day'{limit})"
                ),
            );
        }
        let mut bench = Bench { admin, sessions: Vec::new(), roles, db, tally: Tally::default() };
        bench.new_world();
        bench
    }

    fn new_world(&mut self) {
        // Other processes, so that each world begins with empty caches and goes on with full ones.
        let session = |role: &String| {
            let mut client = self.db.connect(role);
            run(&mut client, "SET lock_timeout = '10s'; SET search_path = pg_catalog");
            client
        };
        self.sessions = self.roles.iter().map(session).collect();
        run(&mut self.admin, "SET search_path = pg_catalog; DROP SCHEMA IF EXISTS ddl CASCADE");
        run(&mut self.admin, SETUP);
    }

    /// Runs a case and undoes what it changed. What is wrong with that.
    fn play(&mut self, case: &Case) -> Result<(), String> {
        run(&mut self.admin, "TRUNCATE oracle.copies");
        let last = number(&mut self.admin, "SELECT coalesce(max(id), 0) FROM writeguard.change_statement");
        for (session, command) in case.commands() {
            if let Err(error) = self.sessions[session].batch_execute(&command) {
                let refusal = Refusal::of(&error);
                if is_fault(&refusal) {
                    return Err(format!("{command}: {refusal:?}"));
                }
                self.tally.failed += 1;
                *self.tally.errors.entry(refusal.sqlstate).or_default() += 1;
                if case.form != Form::Sessions {
                    run(&mut self.sessions[session], "ROLLBACK");
                    return Ok(());
                }
                // What follows was made for tables that are not so now.
                break;
            }
        }
        self.tally.forms[case.form as usize] += 1;
        for step in &case.since {
            if let Err(error) = self.admin.batch_execute(step) {
                let refusal = Refusal::of(&error);
                if is_fault(&refusal) {
                    return Err(format!("{step}: {refusal:?}"));
                }
                break;
            }
        }
        let changes = self.admin.query(
            "SELECT id, substring(statement FROM '/[*]s([0-9]+)[*]/')::int FROM writeguard.change_statement
             WHERE id > $1 ORDER BY id DESC",
            &[&last],
        );
        let changes = changes.map_err(|error| format!("the changes: {error:?}"))?;
        let mut random = Random::new(case.undo);
        for row in changes {
            self.undo(row.get(0), row.get(1), &mut random)
                .map_err(|what| format!("undo({}): {what}", row.get::<_, i64>(0)))?;
        }
        Ok(())
    }

    fn undo(&mut self, change: i64, statement: i32, random: &mut Random) -> Result<(), String> {
        let before = self.rows(-1)?;
        let how = ["error", "skip"][random.below(2)];
        let named = format!(
            "SELECT v.value::bigint FROM writeguard.undo_conflicts({change}) AS c, jsonb_each_text(c.key) AS v WHERE v.value ~ '^[0-9]+$'"
        );
        let named = match self.admin.query(&named, &[]) {
            Ok(rows) => Some(rows.iter().map(|row| row.get(0)).filter(|uid: &i64| *uid > 100).collect()),
            Err(error) if is_fault(&Refusal::of(&error)) => {
                return Err(format!("undo_conflicts: {:?}", Refusal::of(&error)));
            }
            Err(_) => None,
        };
        for dry_run in [true, false] {
            if dry_run && !random.one_in(3) {
                continue;
            }
            let sql = format!(
                "SELECT coalesce(sum(restored), 0)::bigint, coalesce(sum(conflicts), 0)::bigint
                 FROM writeguard.undo({change}, '{how}', dry_run => {dry_run})"
            );
            let result = self.admin.query_one(&sql, &[]);
            let after = self.rows(-2)?;
            match result {
                Err(error) => {
                    let refusal = Refusal::of(&error);
                    if is_fault(&refusal) {
                        return Err(format!("{refusal:?}"));
                    }
                    *self.tally.refused.entry(refusal.sqlstate).or_default() += 1;
                }
                Ok(row) if !dry_run => {
                    let relations = "SELECT oid FROM pg_class WHERE relnamespace = 'ddl'::regnamespace";
                    let relations = self.admin.query(relations, &[]).map_err(|error| format!("{error:?}"))?;
                    let undone = Undone {
                        states: self.states(statement)?,
                        before,
                        after,
                        relations: relations.iter().map(|row| row.get(0)).collect(),
                        restored: row.get(0),
                        conflicts: row.get(1),
                        named,
                    };
                    self.tally.undone += 1;
                    self.tally.with_conflicts += usize::from(undone.conflicts > 0);
                    let said = format!(
                        "{how}, {} restored, {} in conflict {:?}",
                        undone.restored, undone.conflicts, undone.named
                    );
                    undone.check().map_err(|what| format!("{said}: {what}"))?;
                    if undone.conflicts == 0 && random.one_in(4) {
                        self.undo_undo(change, &undone)?;
                    }
                    return Ok(());
                }
                Ok(_) => {}
            }
            if after != before {
                return Err(format!("nothing was undone, and the rows went from {before:?} to {after:?}"));
            }
        }
        Ok(())
    }

    /// What an undo wrote is a change like any other.
    fn undo_undo(&mut self, change: i64, undone: &Undone) -> Result<(), String> {
        let made = format!("SELECT coalesce(max(id), 0) FROM writeguard.change_statement WHERE undoes = {change}");
        let made = number(&mut self.admin, &made);
        if made == 0 {
            // Every row was as it had been, so it wrote nothing.
            return Ok(());
        }
        let sql = format!("SELECT sum(conflicts)::bigint FROM writeguard.undo({made})");
        match self.admin.query_one(&sql, &[]) {
            Err(error) if is_fault(&Refusal::of(&error)) => Err(format!("undo of the undo: {:?}", Refusal::of(&error))),
            Err(_) => Ok(()),
            Ok(_) => match self.rows(-3)? == undone.before {
                true => Ok(()),
                false => Err(format!("undo of the undo: not {:?}", undone.before)),
            },
        }
    }

    /// All rows as they are now.
    fn rows(&mut self, statement: i32) -> Result<Rows, String> {
        run(
            &mut self.admin,
            &format!("DELETE FROM oracle.copies WHERE statement = {statement}; SELECT oracle.copy({statement}, 0)"),
        );
        Ok(self.states(statement)?.pop().unwrap_or_default())
    }

    /// The copies that were made around the steps of a statement.
    fn states(&mut self, statement: i32) -> Result<Vec<Rows>, String> {
        let sql = "SELECT step, relation, uid, columns FROM oracle.copies WHERE statement = $1";
        let rows = self.admin.query(sql, &[&statement]).map_err(|error| format!("the copies: {error:?}"))?;
        let mut states: BTreeMap<i32, Rows> = BTreeMap::new();
        for row in rows {
            let columns: serde_json::Value = row.get(3);
            let columns: Columns = serde_json::from_value(columns).map_err(|error| error.to_string())?;
            states.entry(row.get(0)).or_default().insert(row.get(2), (row.get(1), columns));
        }
        Ok(states.into_values().collect())
    }
}

/// Plays cases one after the other.
fn go(seed: u64, steps: usize) -> Tally {
    let mut bench = Bench::new();
    let mut random = Random::new(seed);
    let mut history: Vec<Case> = Vec::new();
    while bench.tally.steps < steps {
        if history.len() >= CASES {
            bench.new_world();
            history.clear();
        }
        let mut model = Model::load(&mut bench.admin);
        history.push(Case::generate(&mut random, &mut model));
        let case = &history[history.len() - 1];
        bench.tally.steps += case.steps();
        if let Err(what) = bench.play(case) {
            // Said at once: finding the fewest steps takes its time.
            eprintln!("seed {seed}: {what}");
            let script: String = shortest(&history).iter().map(Case::script).collect();
            panic!("FUZZ_SEED={} ({seed}): {what}\n{script}", self::seed());
        }
    }
    bench.tally
}

/// The fewest steps found that go wrong in a new world.
fn shortest(history: &[Case]) -> Vec<Case> {
    // After a crash all sessions are gone, and for a while nobody can connect.
    let fails = |cases: &[Case]| {
        thread::sleep(std::time::Duration::from_millis(if is_alive() { 0 } else { 3_000 }));
        let mut bench = Bench::new();
        cases.iter().any(|case| bench.play(case).is_err())
    };
    let mut cases = history.to_vec();
    if let Some(last) = history.last().filter(|last| fails(std::slice::from_ref(last))) {
        cases = vec![last.clone()];
    }
    let mut place = 0;
    cases.retain(|case| case.steps() > 0);
    while place < cases.len() && cases.len() > 1 {
        let fewer: Vec<Case> =
            cases.iter().enumerate().filter(|(at, _)| *at != place).map(|(_, case)| case.clone()).collect();
        if fails(&fewer) { cases = fewer } else { place += 1 }
    }
    for at in 0..cases.len() {
        let mut place = 0;
        while place < cases[at].steps() {
            let mut fewer = cases.clone();
            fewer[at] = cases[at].without(place);
            if fails(&fewer) { cases = fewer } else { place += 1 }
        }
    }
    cases
}

fn is_alive() -> bool {
    !Server::shared().log().lines().rev().take(20).any(|line| line.contains("terminated by signal"))
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
fn ddl_between_writes_puts_no_value_where_it_does_not_belong() {
    let steps = setting("FUZZ_DDL_STEPS", 5_000) as usize;
    println!("FUZZ_SEED={} FUZZ_DDL_STEPS={steps}", seed());
    const WORKERS: usize = 3;
    let workers = (0..WORKERS).map(|worker| {
        let seed = seed().wrapping_mul(1_000).wrapping_add(500 + worker as u64);
        thread::spawn(move || go(seed, steps.div_ceil(WORKERS)))
    });
    let mut total = Tally::default();
    // All of them have their say before one fails.
    let workers: Vec<_> = workers.collect::<Vec<_>>().into_iter().map(thread::JoinHandle::join).collect();
    for worker in workers {
        let tally = worker.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        total.steps += tally.steps;
        total.failed += tally.failed;
        total.undone += tally.undone;
        total.with_conflicts += tally.with_conflicts;
        tally.refused.into_iter().for_each(|(state, times)| *total.refused.entry(state).or_default() += times);
        tally.errors.into_iter().for_each(|(state, times)| *total.errors.entry(state).or_default() += times);
        (0..3).for_each(|form| total.forms[form] += tally.forms[form]);
    }
    println!(
        "{} steps: {} statements failed of their own {:?}; {} undone, {} of them with conflicts; refused {:?}; cases {:?}",
        total.steps, total.failed, total.errors, total.undone, total.with_conflicts, total.refused, total.forms
    );
    let log = Server::shared().log();
    for sign in ["terminated by signal", "server process", "TRAP:", "panicked"] {
        assert!(!log.contains(sign), "{}", log.lines().filter(|line| line.contains(sign)).collect::<String>());
    }
    assert!(total.steps >= steps);
    assert!(total.undone * 15 >= total.steps, "only {} undone", total.undone);
    assert!(total.with_conflicts * 200 >= total.steps, "only {} with conflicts", total.with_conflicts);
    for state in ["WG007", "WG008", "WG009"] {
        let times = total.refused.get(state).copied().unwrap_or_default();
        assert!(times * 1_000 >= total.steps, "{state} only {times} times");
    }
    assert!(total.forms.iter().all(|cases| cases * 100 >= total.steps));
}

//! Every SQL example of the README and of the pages of docs/, typed into psql in the order of the page.
//!
//! An example runs as superuser unless its first line says `-- as ROLE`, and passes unless that line says
//! `refused with SQLSTATE`. Each role has one session for the whole page, and no example leaves a transaction open.
//! `{token}` stands for the token that was shown last. Where a block of `text` follows, that is what psql prints.

mod common;

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, PipeReader, Write, pipe};
use std::process::{Child, ChildStdin, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use common::{Database, Server};

const README: &str = include_str!("../README.md");

struct Example {
    role: String,
    refused_with: Option<String>,
    sql: String,
    prints: Option<String>,
}

/// The lines up to the end of a block.
fn block<'a>(lines: &mut impl Iterator<Item = &'a str>, indent: usize) -> String {
    let lines: Vec<&str> =
        lines.take_while(|line| line.trim() != "```").map(|line| line.get(indent..).unwrap_or(line)).collect();
    lines.join("\n")
}

fn examples(page: &str) -> Vec<Example> {
    let mut examples: Vec<Example> = Vec::new();
    let mut lines = page.lines();
    while let Some(line) = lines.next() {
        let indent = line.len() - line.trim_start().len();
        match line.trim() {
            "```sql" => {
                let sql = block(&mut lines, indent);
                let first = sql.lines().next().unwrap_or_default();
                let heading = first.strip_prefix("-- as ").unwrap_or("postgres");
                let (role, refused) =
                    heading.split_once(", refused with ").map_or((heading, None), |(r, code)| (r, Some(code)));
                let (role, refused_with) = (role.to_owned(), refused.map(str::to_owned));
                examples.push(Example { role, refused_with, sql, prints: None });
            }
            "```text" => {
                let last = examples.last_mut().expect("output of an example");
                last.prints = Some(block(&mut lines, indent));
            }
            _ => {}
        }
    }
    examples
}

/// What psql prints, as a page shows it: without spaces at the end of lines, and without empty lines around it.
fn shown(printed: &str) -> String {
    let lines: Vec<&str> = printed.lines().map(str::trim_end).collect();
    lines.join("\n").trim_matches('\n').to_owned()
}

/// A role's psql, which stays for the whole page.
struct Session {
    psql: Child,
    typed: ChildStdin,
    printed: BufReader<PipeReader>,
}

/// What comes after all that an example prints, before its SQLSTATE.
const DONE: &str = "-- done ";

impl Session {
    fn new(server: &Server, db: &Database, role: &str) -> Session {
        let (reader, writer) = pipe().expect("a pipe");
        let mut command = server.client_program("psql");
        command.args(["-X", "-q", "-d", &db.name, "-U", role]);
        command.stdin(Stdio::piped()).stdout(writer.try_clone().expect("the same pipe")).stderr(writer);
        let mut psql = command.spawn().expect("cannot run psql");
        let typed = psql.stdin.take().expect("psql's standard input");
        Session { psql, typed, printed: BufReader::new(reader) }
    }

    /// What psql prints for an example, and the SQLSTATE of its last error, `00000` without any.
    fn run(&mut self, sql: &str) -> (String, String) {
        let script = format!("\\set LAST_ERROR_SQLSTATE 00000\n{sql}\n\\warn '{DONE}' :LAST_ERROR_SQLSTATE\n");
        self.typed.write_all(script.as_bytes()).expect("psql reads");
        let mut printed = String::new();
        loop {
            let mut line = String::new();
            let length = self.printed.read_line(&mut line).expect("psql prints text");
            assert!(length > 0, "psql ended\n{sql}\n{printed}");
            if let Some(state) = line.strip_prefix(DONE) {
                return (shown(&printed), state.trim().to_owned());
            }
            printed += &line;
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let _ = self.psql.kill();
        let _ = self.psql.wait();
    }
}

/// The token among what was printed.
fn token_in(printed: &str) -> Option<&str> {
    let is_token = |word: &&str| word.len() == 64 && word.bytes().all(|letter| letter.is_ascii_hexdigit());
    printed.lines().map(str::trim).find(is_token)
}

fn play(page: &str) {
    let server = Server::start(&[]);
    let db = server.plain_database();
    let examples = examples(page);
    assert!(examples.len() > 10, "the page has {} examples", examples.len());
    let mut watcher = db.admin();
    let mut sessions: BTreeMap<String, Session> = BTreeMap::new();
    let mut token = String::new();
    for Example { role, refused_with, sql, prints } in examples {
        assert!(sql.ends_with(';') || sql.ends_with("\\gexec"), "psql would wait for more\n{sql}");
        let sql = sql.replace("{token}", &token);
        let session = sessions.entry(role.clone()).or_insert_with(|| Session::new(&server, &db, &role));
        let mut run = || {
            let (printed, state) = session.run(&sql);
            assert_eq!(state, refused_with.as_deref().unwrap_or("00000"), "{sql}\n{printed}");
            let open = "SELECT count(*) FROM pg_stat_activity WHERE state LIKE 'idle in transaction%'";
            let open: i64 = watcher.query_one(open, &[]).expect("the sessions' states").get(0);
            assert_eq!(open, 0, "the transaction that it leaves open is in the way of the next example\n{sql}");
            printed
        };
        let mut printed = run();
        if let Some(new) = token_in(&printed) {
            token = new.to_owned();
        }
        let Some(prints) = prints else { continue };
        // The event of a warning is stored a moment after its statement.
        let until = Instant::now() + Duration::from_secs(if sql.contains("FROM writeguard.event ") { 30 } else { 0 });
        while printed != prints && Instant::now() < until {
            sleep(Duration::from_millis(50));
            printed = run();
        }
        assert!(printed == prints, "{sql}\nprints\n{printed}\nand not\n{prints}");
    }
}

#[test]
fn every_example_does_what_the_page_says() {
    play(README);
}

#[test]
fn the_way_to_enforce_is_as_the_page_says() {
    play(include_str!("../docs/rollout.md"));
}

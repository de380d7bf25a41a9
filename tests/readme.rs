//! Every SQL example of the README and of the pages of docs/, run in the order of the page.
//!
//! An example runs as superuser unless its first line says `-- as ROLE`, and passes unless that line says
//! `refused with SQLSTATE`. `{token}` stands for the token that the example before it showed. On the pages of docs/ psql runs
//! them, and where a block of `text` follows, that is what it prints.

mod common;

use std::thread::sleep;
use std::time::{Duration, Instant};

use common::{Refusal, Server};
use postgres::SimpleQueryMessage;

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

#[test]
fn every_example_does_what_the_page_says() {
    let db = Server::shared().plain_database();
    let examples = examples(include_str!("../README.md"));
    assert!(examples.len() > 10, "the page has {} examples", examples.len());
    let mut token = String::new();
    for example in examples {
        let sql = example.sql.replace("{token}", &token);
        let result = db.connect(&example.role).simple_query(&sql);
        match (result, &example.refused_with) {
            (Ok(messages), None) => {
                for message in messages {
                    if let SimpleQueryMessage::Row(row) = message
                        && row.columns()[0].name() == "token"
                    {
                        token = row.get(0).unwrap_or_default().to_owned();
                    }
                }
            }
            (Err(error), Some(code)) => assert_eq!(&Refusal::of(&error).sqlstate, code, "{sql}"),
            (Err(error), None) => panic!("{sql}\n{:?}", error.as_db_error()),
            (Ok(_), Some(code)) => panic!("{sql}\nwas to be refused with {code}"),
        }
    }
}

fn play(page: &str) {
    let server = Server::start(&[]);
    let db = server.plain_database();
    let examples = examples(page);
    assert!(examples.len() > 10 && examples.iter().any(|example| example.prints.is_some()));
    for Example { role, refused_with, sql, prints } in examples {
        let run = || {
            let state = "\n\\echo :LAST_ERROR_SQLSTATE\n";
            let output = server.psql(&db.name, &role, &format!("\\pset pager off\n{sql}{state}"));
            let (printed, state) = output.trim_end().rsplit_once('\n').unwrap_or(("", output.trim_end()));
            assert_eq!(state, refused_with.as_deref().unwrap_or("00000"), "{sql}\n{printed}");
            shown(printed)
        };
        let mut printed = run();
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
fn the_way_to_enforce_is_as_the_page_says() {
    play(include_str!("../docs/rollout.md"));
}

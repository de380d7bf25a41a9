//! Every SQL example of the README, run in the order of the page.
//!
//! An example runs as superuser unless its first line says `-- as ROLE`, and passes unless that line says
//! `refused with SQLSTATE`. `{token}` stands for the token that the example before it showed.

mod common;

use common::{Refusal, Server};
use postgres::SimpleQueryMessage;

struct Example {
    role: String,
    refused_with: Option<String>,
    sql: String,
}

fn examples(page: &str) -> Vec<Example> {
    let mut examples = Vec::new();
    let mut lines = page.lines().map(str::trim);
    while let Some(line) = lines.next() {
        if line != "```sql" {
            continue;
        }
        let sql: Vec<&str> = lines.by_ref().take_while(|line| *line != "```").collect();
        let heading = sql.first().and_then(|line| line.strip_prefix("-- as ")).unwrap_or("postgres");
        let (role, refused) =
            heading.split_once(", refused with ").map_or((heading, None), |(r, code)| (r, Some(code)));
        examples.push(Example { role: role.to_owned(), refused_with: refused.map(str::to_owned), sql: sql.join("\n") });
    }
    examples
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

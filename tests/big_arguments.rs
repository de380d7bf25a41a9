//! Arguments of any size and number in every function that somebody can call: each call answers, or can be cancelled,
//! within moments, with an ordinary error; the server stays up, and so do the sessions of others.
//!
//! The functions are those that the catalog has, so none is left out.

use std::time::{Duration, Instant};

use crate::common::{Refusal, Server, expect_refusal, patience};
use postgres::Client;

/// What a text of a megabyte is made of.
const TEXTS: [&str; 17] = [
    "x",
    "*",
    "a*",
    ".",
    ",",
    "(",
    "'",
    "\"",
    "$1 ",
    "{",
    "1;",
    ";",
    "--",
    "/*",
    "Mon 00:00-01:00 UTC;",
    "UPDATE t SET v = 1;",
    "é",
];

/// What an array of a hundred thousand is made of; `n` stands for the number of the element.
const ELEMENTS: [&str; 6] = ["public.t", "'public.t' || n", "'*a*b*' || n || '.*'", "'role' || n", "NULL", "n"];

/// What a document of a hundred thousand is made of.
const DOCUMENTS: [&str; 7] = [
    "{}",
    "{\"name\": \"p\"}",
    "{\"name\": \"p' || n || '\", \"max_rows\": 1}",
    "{\"name\": \"p' || n || '\", \"tables\": [\"public.t\"], \"max_rows\": 1}",
    "{\"name\": \"p' || n || '\", \"wrong\": 1}",
    "[[[[[[[[]]]]]]]]",
    "{\"name\": \"p' || repeat('x', 100) || '\"}",
];

/// A second of `statement_timeout`, and what is left of a call then.
const WITHIN: Duration = Duration::from_secs(2);

struct Function {
    name: String,
    arguments: Vec<(String, String)>,
}

/// Those that people may call, with the names and types of their arguments.
fn functions(admin: &mut Client) -> Vec<Function> {
    let sql = "SELECT p.oid::regproc::text,
                      coalesce(array_agg(a.name ORDER BY a.place) FILTER (WHERE a.name IS NOT NULL), '{}'),
                      coalesce(array_agg(format_type(a.type, NULL) ORDER BY a.place) FILTER (WHERE a.name IS NOT NULL), '{}')
               FROM pg_proc AS p
               LEFT JOIN LATERAL unnest(p.proargnames[:p.pronargs], p.proargtypes::oid[]) WITH ORDINALITY
                 AS a (name, type, place) ON true
               WHERE p.pronamespace = 'writeguard'::regnamespace AND p.prorettype <> 'trigger'::regtype
                 AND p.prorettype <> 'event_trigger'::regtype
               GROUP BY p.oid ORDER BY 1, p.oid";
    let functions = admin.query(sql, &[]).expect("the functions");
    let functions: Vec<Function> = functions
        .iter()
        .map(|row| Function {
            name: row.get(0),
            arguments: row.get::<_, Vec<String>>(1).into_iter().zip(row.get::<_, Vec<String>>(2)).collect(),
        })
        .collect();
    assert!(functions.len() > 25, "{} functions", functions.len());
    functions
}

/// An ordinary value of a type.
fn ordinary(name: &str, type_: &str) -> &'static str {
    match (name, type_) {
        ("name", _) => "'p'",
        ("statement", _) => "'UPDATE public.t SET v = 1'",
        ("schedule", _) => "'Mon 00:00-01:00 UTC'",
        ("on_conflict", _) => "'error'",
        ("mode", _) => "'enforce'",
        ("override", _) => "'token'",
        (_, "text") => "'why'",
        (_, "text[]") => "'{}'::text[]",
        (_, "bigint" | "integer" | "double precision" | "oid" | "smallint") => "1",
        (_, "boolean") => "false",
        (_, "interval") => "'1 hour'",
        (_, "jsonb" | "json") => "'[]'",
        (_, "regclass") => "'public.t'",
        (_, "name") => "'postgres'",
        (_, "cidr") => "'10.0.0.0/8'",
        (_, "timestamp with time zone") => "now()",
        _ => "NULL",
    }
}

/// What may be large of an argument, as SQL.
fn large(type_: &str) -> Vec<String> {
    let number = |sql: &str| format!("(SELECT {sql} FROM generate_series(1, 100000) AS n)");
    match type_ {
        "text" => TEXTS
            .iter()
            .map(|text| {
                let times = 1_000_000 / text.len();
                format!("repeat('{}', {times})", text.replace('\'', "''"))
            })
            .collect(),
        "text[]" => {
            let elements = ELEMENTS.iter().map(|element| {
                let element = if element.contains(['n', '\'', 'N']) && *element != "public.t" {
                    format!("({element})::text")
                } else {
                    format!("'{element}'::text")
                };
                number(&format!("array_agg({element})"))
            });
            elements.chain(["ARRAY[repeat('*a', 500000) || '.x']".to_owned()]).collect()
        }
        "jsonb" => DOCUMENTS.iter().map(|document| number(&format!("jsonb_agg(('{document}')::jsonb)"))).collect(),
        _ => Vec::new(),
    }
}

#[test]
fn a_call_with_large_arguments_costs_moments() {
    let server = Server::start(&["max_stack_depth = 2MB"]);
    let db = server.database();
    let mut admin = db.admin();
    admin
        .batch_execute(
            "CREATE TABLE public.t (id int PRIMARY KEY, v int NOT NULL DEFAULT 0);
             INSERT INTO public.t SELECT n FROM generate_series(1, 100) AS n;
             SELECT writeguard.set_policy('p', tables => '{public.t}', max_rows => 5);",
        )
        .expect("the setup");
    let started: String = admin.query_one("SELECT pg_postmaster_start_time()::text", &[]).expect("a row").get(0);
    let mut slow = Vec::new();
    let mut calls = 0;
    for function in functions(&mut admin) {
        for (place, (_, type_)) in function.arguments.iter().enumerate() {
            for large in large(type_) {
                let arguments: Vec<String> = function
                    .arguments
                    .iter()
                    .enumerate()
                    .map(
                        |(at, (name, type_))| {
                            if at == place { large.clone() } else { format!("({})::{type_}", ordinary(name, type_)) }
                        },
                    )
                    .collect();
                let call = format!("SELECT FROM {}({}) AS f", function.name, arguments.join(", "));
                // What makes the argument counts as well.
                let began = Instant::now();
                if std::env::var_os("PGWG_SHOW").is_some() {
                    println!("{call}");
                }
                let outcome = admin.batch_execute(&format!(
                    "BEGIN; SET LOCAL statement_timeout = '1s'; SET LOCAL client_min_messages = 'error'; {call}; ROLLBACK"
                ));
                let took = began.elapsed();
                if let Err(error) = outcome {
                    let refusal = Refusal::of(&error);
                    assert_ne!(refusal.sqlstate, "XX000", "{call}: {refusal:?}");
                    admin.batch_execute("ROLLBACK").expect("the end");
                }
                if took > WITHIN * patience() {
                    slow.push(format!("{took:?} {call}"));
                }
                calls += 1;
            }
        }
    }
    assert!(calls > 300, "{calls} calls");
    assert!(slow.is_empty(), "{}", slow.join("\n"));
    let since: String = admin.query_one("SELECT pg_postmaster_start_time()::text", &[]).expect("a row").get(0);
    assert_eq!(since, started);
}

/// A bound is for who gives something now: an upgrade must not make a policy unreadable that was given before there was one.
#[test]
fn what_is_stored_already_holds_whatever_its_size() {
    let db = Server::shared().database();
    let mut admin = db.admin();
    admin
        .batch_execute(
            "CREATE TABLE public.t (id int PRIMARY KEY, v int NOT NULL DEFAULT 0);
             INSERT INTO public.t SELECT n FROM generate_series(1, 100) AS n;
             SELECT writeguard.set_policy('p', tables => '{public.t}', max_rows => 5);
             UPDATE writeguard.policy SET comment = repeat('x', 20000),
                 schedule = 'Sun-Sat 00:00-24:00 UTC' || repeat('; Sun-Sat 00:00-24:00 UTC', 1000),
                 tables = array_append(array_fill('public.gone'::text, ARRAY[10001]), 'public.t');",
        )
        .expect("the setup");
    let refusal = expect_refusal(admin.batch_execute("UPDATE public.t SET v = 1"));
    assert_eq!(refusal.sqlstate, "WG001", "{refusal:?}");
    let again = "SELECT writeguard.set_policy('q', tables => (SELECT tables FROM writeguard.policy), max_rows => 5)";
    let refusal = expect_refusal(admin.batch_execute(again));
    assert_eq!((refusal.sqlstate.as_str(), refusal.message.as_str()), ("WG007", "tables has too many elements"));
}

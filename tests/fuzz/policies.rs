//! Random arguments of set_policy: stored so that every session can work with them, or refused as the caller's mistake.

use std::collections::BTreeMap;

use postgres::Client;

use super::random::Random;
use super::{seed, setting};
use crate::common::{Refusal, Server};

const NAMES: &[&str] =
    &["p", "q", "r", "Orders guard", "naïve ☂", "quo'te", "dou\"ble", "back\\slash", "new\nline", "%s$1"];
const TABLES: &[&str] = &[
    "*.*",
    "public.*",
    "public.t",
    "t",
    "T",
    "\"T\"",
    "public.\"odd \"\"table\"",
    "public.*_*",
    "*.t*",
    "\"*\".t",
    "public.v",
    "pg_catalog.pg_class",
    "pg_catalog.*",
    "writeguard.policy",
    "writeguard.*",
    "nobody.t",
    "public.nothing",
    "public.",
    ".t",
    "a.b.c",
    "public . t",
    " public.t ",
    "\"unclosed",
    "\"\"",
    "\"\".t",
    "*",
    "**.**",
    "pg_temp.x",
    "$$",
    "public.t;",
    "Ünï.ço",
    "ÜNÏ.*",
    "\u{202e}.*",
    "public.t\u{0}",
];
const ROLES: &[&str] =
    &["public", "postgres", "pg_monitor", "nobody at all", "PUBLIC", "\"postgres\"", "*", "none", " "];
const WORDS: &[&str] = &[
    "update", "delete", "truncate", "drop", "UPDATE", "insert", "", " update", "*", "enforce", "warn", "observe",
    "never", "flag", "token", "Token", "ENFORCE", "on",
];
const NUMBERS: &[&str] = &[
    "0",
    "1",
    "5",
    "100",
    "-1",
    "NULL",
    "2147483647",
    "2147483648",
    "9223372036854775807",
    "-9223372036854775808",
    "9223372036854775806",
];
const SCHEDULES: &[&str] = &[
    "Mon-Sun 00:00-24:00 UTC",
    "Sat,Sun 00:00-24:00 Europe/Berlin",
    "Mon-Fri 18:00-08:00 UTC; Sat 00:00-12:00 America/New_York",
    "fri-mon 23:59-00:01 Pacific/Apia",
    "Mon 00:00-00:00 UTC",
    "Mon 25:00-26:00 UTC",
    "Mon 10:00-11:00",
    "Mon 10:00-11:00 Nowhere/Else",
    "Mon 10:00-11:00 FOO3BAR,M3.2.0,M11.1.0",
    "Someday 10:00-11:00 UTC",
    ";;",
];
const PATTERNS: &[&str] = &["%", "psql%", "_", "", "a\\", "a\\\\", "\\%", "%%__%%", "100%"];
const COMMENTS: &[&str] = &[
    "",
    "why",
    "it's \"so\" \\ %s {0} $1 :x",
    "\u{1}\u{7f}\u{85}\u{2028}\u{feff}",
    "😀𝔘é\u{301}",
    "{\"json\": null}",
    "\\u0000 \\x00",
    "\r\n\t",
    "-- */ /*",
];

struct Fuzzer {
    random: Random,
}

/// A literal of any text but NUL.
fn literal(text: &str) -> String {
    format!("E'{}'", text.replace('\0', "").replace('\\', "\\\\").replace('\'', "''"))
}

impl Fuzzer {
    /// One of these texts, or one that is made up.
    fn text(&mut self, usual: &[&str]) -> String {
        match self.random.below(20) {
            0 => "NULL".to_owned(),
            1 => {
                let letters: Vec<char> = (0..self.random.below(30)).map(|_| self.letter()).collect();
                literal(&String::from_iter(letters))
            }
            2 if self.random.one_in(3) => {
                let count = 1 << self.random.below(14);
                let letters: Vec<char> = (0..count).map(|_| self.letter()).collect();
                literal(&String::from_iter(letters))
            }
            3 => {
                let mut text: Vec<char> = self.random.word(usual).chars().collect();
                let at = self.random.below(text.len() + 1);
                text.insert(at, self.letter());
                literal(&String::from_iter(text))
            }
            _ => literal(self.random.word(usual)),
        }
    }

    fn letter(&mut self) -> char {
        let from: Vec<char> = "abcTt019_*.,;'\"\\{}()[]$% \n\téßΩ漢😀\u{200d}\u{a0}".chars().collect();
        if self.random.one_in(10) {
            char::from_u32(self.random.below(0x11_0000) as u32).filter(|letter| *letter != '\0').unwrap_or('x')
        } else {
            *self.random.pick(&from)
        }
    }

    fn array(&mut self, usual: &[&str]) -> String {
        let elements = |fuzzer: &mut Self, count: usize| -> String {
            (0..count).map(|_| fuzzer.text(usual)).collect::<Vec<_>>().join(", ")
        };
        match self.random.below(16) {
            0 => "NULL".to_owned(),
            1 => "'{}'".to_owned(),
            2 => {
                let (one, two) = (elements(self, 2), elements(self, 2));
                format!("ARRAY[[{one}], [{two}]]")
            }
            3 => {
                let element = literal(self.random.word(usual));
                format!("array_fill({element}::text, '{{2}}', '{{-3}}')")
            }
            4 if self.random.one_in(4) => {
                let element = literal(self.random.word(usual));
                format!("array_fill({element}::text, '{{1000}}')")
            }
            5 => "ARRAY[NULL]".to_owned(),
            _ => {
                let count = 1 + self.random.below(2);
                format!("ARRAY[{}]", elements(self, count))
            }
        }
    }

    fn call(&mut self) -> String {
        let name = loop {
            let name = self.text(NAMES);
            if name.chars().count() < 600 {
                break name;
            }
        };
        let mut arguments = vec![format!("name => {name}")];
        let mut give = |fuzzer: &mut Self, times: usize, name: &str, value: &dyn Fn(&mut Self) -> String| {
            if fuzzer.random.one_in(times) {
                arguments.push(format!("{name} => {}", value(fuzzer)));
            }
        };
        give(self, 2, "tables", &|fuzzer| fuzzer.array(TABLES) + "::text[]");
        give(self, 3, "roles", &|fuzzer| fuzzer.array(ROLES) + "::text[]");
        give(self, 3, "operations", &|fuzzer| {
            let words = if fuzzer.random.one_in(4) { WORDS } else { &WORDS[..3] };
            fuzzer.array(words) + "::text[]"
        });
        give(self, 2, "max_rows", &|fuzzer| fuzzer.random.pick(NUMBERS).to_string());
        give(self, 3, "max_rows_per_transaction", &|fuzzer| fuzzer.random.pick(NUMBERS).to_string());
        give(self, 8, "rate_rows", &|fuzzer| fuzzer.random.pick(NUMBERS).to_string());
        give(self, 8, "mode", &|fuzzer| fuzzer.text(&WORDS[9..]));
        give(self, 4, "override", &|fuzzer| fuzzer.text(&WORDS[11..16]));
        give(self, 2, "comment", &|fuzzer| fuzzer.text(COMMENTS));
        give(self, 8, "application", &|fuzzer| fuzzer.text(PATTERNS));
        give(self, 6, "schedule", &|fuzzer| fuzzer.text(SCHEDULES));
        give(self, 40, "approvers", &|fuzzer| fuzzer.text(ROLES));
        give(self, 12, "client", &|fuzzer| fuzzer.random.pick(&["NULL", "'10.0.0.0/8'", "'::1'"]).to_string());
        give(self, 20, "rate_interval", &|fuzzer| {
            fuzzer.random.pick(&["NULL", "'1 hour'", "'60 min'", "'-1 s'", "'178000000 years'", "'0'"]).to_string()
        });
        give(self, 40, "undo", &|fuzzer| fuzzer.random.pick(&["NULL", "'1 day'", "'-178000000 years'"]).to_string());
        give(self, 8, "max_fraction", &|fuzzer| {
            fuzzer.random.pick(&["NULL", "'NaN'", "'Infinity'", "-0.0", "1e-320", "0.5", "2"]).to_string()
        });
        give(self, 20, "min_approvals", &|fuzzer| {
            fuzzer.random.pick(&["NULL", "1", "0", "-2147483648", "2"]).to_string()
        });
        give(self, 20, "require_where", &|fuzzer| fuzzer.random.pick(&["NULL", "true", "false"]).to_string());
        give(self, 8, "require_transaction", &|fuzzer| fuzzer.random.pick(&["NULL", "true", "false"]).to_string());
        format!("SELECT writeguard.set_policy({})", arguments.join(", "))
    }
}

fn try_run(client: &mut Client, sql: &str) -> Result<(), Refusal> {
    client.batch_execute(sql).map_err(|error| Refusal::of(&error))
}

#[test]
fn any_argument_of_set_policy_is_stored_and_obeyed_or_refused_as_a_mistake() {
    let cases = setting("FUZZ_POLICIES", 3_000);
    println!("FUZZ_SEED={} FUZZ_POLICIES={cases}", seed());
    let db = Server::shared().database();
    let mut admin = db.admin();
    let mut writer = db.admin();
    admin
        .batch_execute(
            "CREATE TABLE t (id int PRIMARY KEY, v int); INSERT INTO t SELECT i FROM generate_series(1, 9) AS i;
             CREATE TABLE \"odd \"\"table\" (id int); CREATE TABLE \"T\" (id int); CREATE VIEW v AS SELECT 1;
             CREATE SCHEMA \"Ünï\"; CREATE TABLE \"Ünï\".\"ço\" (id int)",
        )
        .expect("the tables");
    let mut fuzzer = Fuzzer { random: Random::new(seed()) };
    let mut outcomes: BTreeMap<String, u64> = BTreeMap::new();
    for case in 0..cases {
        let call = fuzzer.call();
        let shown: String = call.chars().take(2_000).collect();
        let outcome = try_run(&mut admin, &call);
        if let Err(refusal) = &outcome {
            assert!(
                ["WG007", "0A000"].contains(&refusal.sqlstate.as_str()),
                "FUZZ_SEED={} case {case}: {shown}\n{refusal:#?}",
                seed()
            );
            assert!(!refusal.hint.is_empty(), "case {case}: no hint: {shown}\n{refusal:#?}");
        }
        *outcomes
            .entry(outcome.as_ref().map_or_else(|refusal| refusal.sqlstate.clone(), |()| "stored".into()))
            .or_default() += 1;
        if outcome.is_ok() {
            for sql in
                ["SELECT * FROM writeguard.effective('public.t', 'postgres', 'update')", "TABLE writeguard.policy"]
            {
                if let Err(refusal) = try_run(&mut admin, sql) {
                    panic!("FUZZ_SEED={} case {case}: after {shown}\n{sql}: {refusal:#?}", seed());
                }
            }
            if let Err(refusal) = try_run(&mut writer, "UPDATE t SET v = 1 WHERE id = 1") {
                let known = ["WG001", "WG002", "WG003"].contains(&refusal.sqlstate.as_str());
                assert!(known, "FUZZ_SEED={} case {case}: after {shown}\n{refusal:#?}", seed());
            }
        }
        if case % 5 == 4 {
            admin.batch_execute("SELECT writeguard.drop_policy(name) FROM writeguard.policy").expect("drop_policy");
        }
    }
    println!("{outcomes:?}");
    for outcome in ["stored", "WG007"] {
        let times = outcomes.get(outcome).copied().unwrap_or_default();
        assert!(times * 10 >= cases, "{outcome} only {times} times of {cases}");
    }
}

#[test]
fn a_name_too_long_to_be_stored_is_a_mistake() {
    let db = Server::shared().database();
    let long = "(SELECT string_agg(md5(i::text), '') FROM generate_series(1, 300) AS i)";
    let call = format!("SELECT writeguard.set_policy(name => {long}, max_rows => 5)");
    let refusal = try_run(&mut db.admin(), &call).expect_err("there is no room for it in the index");
    assert_eq!(refusal.sqlstate, "WG007", "{refusal:#?}");
    assert!(refusal.message.contains("name"), "{refusal:#?}");
}

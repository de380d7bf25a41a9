//! Strings that are almost tokens, or nothing like one: none opens a limit, and none is shown anywhere.

use postgres::Client;

use super::random::Random;
use super::{seed, setting};
use crate::common::{Database, Refusal, Server, expect_refusal};

const WRITE: &str = "UPDATE t SET v = 9";

/// Up to that length a string may stand somewhere by chance.
const DISTINCT: usize = 12;

fn mutated(random: &mut Random, token: &str) -> String {
    let mut letters: Vec<char> = token.chars().collect();
    let any: Vec<char> = "abcdefXYZ0123456789-_=+/.~'\"\\$;% \n\té😀\u{202e}\u{7f}\u{1}".chars().collect();
    match random.below(14) {
        0..=3 => {
            let at = random.below(letters.len());
            letters[at] = *random.pick(&any);
        }
        4 => letters.truncate(random.below(token.len())),
        5 => letters.extend((0..1 + random.below(20)).map(|_| *random.pick(&any))),
        6 => {
            let at = random.below(letters.len());
            letters.insert(at, *random.pick(&any));
        }
        7 => {
            let (a, b) = (random.below(letters.len()), random.below(letters.len()));
            letters.swap(a, b);
        }
        8 => return token.to_uppercase(),
        9 => {
            return format!(
                "{}{token}{}",
                random.pick(&[" ", "", "'", "{", "\t"]),
                random.pick(&[" ", "\n", "'", "}"])
            );
        }
        10 => letters.reverse(),
        11 => return format!("{token}{token}"),
        12 => return (0..1 + random.below(200)).map(|_| *random.pick(&any)).collect(),
        _ => {
            let at = random.below(letters.len());
            letters.remove(at);
        }
    }
    String::from_iter(letters)
}

/// Sets it in one of the ways in which it can be set.
fn arm(random: &mut Random, client: &mut Client, token: &str) {
    let literal = format!("E'{}'", token.replace('\\', "\\\\").replace('\'', "''"));
    let result = match random.below(4) {
        0 => client.batch_execute(&format!("SET writeguard.token = {literal}")),
        1 => client.batch_execute(&format!("SET LOCAL writeguard.token TO {literal}")),
        2 => client.execute("SELECT set_config('writeguard.token', $1, true)", &[&token]).map(drop),
        _ => client.execute("SELECT set_config('writeguard.token', $1, false)", &[&token]).map(drop),
    };
    result.unwrap_or_else(|error| panic!("a token cannot be set: {:?}", Refusal::of(&error)));
}

/// A token with which somebody else approves the write.
fn approved(db: &Database, requester: &mut Client, approver: &str) -> String {
    let request: i64 =
        requester.query_one("SELECT writeguard.request($1::text, 'tests')", &[&WRITE]).expect("a request").get(0);
    db.connect(approver).query_one("SELECT writeguard.approve($1)", &[&request]).expect("an approval").get(0)
}

#[test]
fn nothing_but_the_token_itself_opens_the_limit() {
    let cases = setting("FUZZ_TOKENS", 1_200);
    println!("FUZZ_SEED={} FUZZ_TOKENS={cases}", seed());
    let server = Server::start(&["writeguard.event_timeout = '20s'"]);
    let db = server.database();
    let (requester, approver) = (db.role("requester"), db.role("approver"));
    let mut admin = db.admin();
    admin
        .batch_execute(&format!(
            "CREATE TABLE t (id int PRIMARY KEY, v int NOT NULL DEFAULT 0);
             INSERT INTO t SELECT i FROM generate_series(1, 5) AS i;
             GRANT ALL ON t TO PUBLIC;
             GRANT EXECUTE ON FUNCTION writeguard.approve TO {approver};
             SELECT writeguard.set_policy('p', tables => '{{public.t}}', max_rows => 3)"
        ))
        .expect("the table");
    let mut client = db.connect(&requester);
    let tokens = [approved(&db, &mut client, &approver), approved(&db, &mut client, &approver)];
    let mut random = Random::new(seed());
    let mut tried: Vec<String> = tokens.to_vec();
    for case in 0..cases {
        let mut token = mutated(&mut random, random_token(&tokens, case));
        if case % (cases / 4).max(1) == 1 {
            token = token.repeat(1_000_000 / token.len().max(1) + 1);
        }
        if tokens.contains(&token) {
            continue;
        }
        client.batch_execute("BEGIN; SET LOCAL writeguard.override = on").expect("a transaction");
        arm(&mut random, &mut client, &token);
        let shown: String = token.chars().take(300).collect();
        let refusal = expect_refusal(client.batch_execute(WRITE));
        client.batch_execute("ROLLBACK").expect("a rollback");
        let expected = if token.is_empty() { "WG001" } else { "WG006" };
        assert_eq!(refusal.sqlstate, expected, "FUZZ_SEED={} case {case}: {shown:?}: {refusal:?}", seed());
        if token.len() >= DISTINCT {
            assert!(!format!("{refusal:?}").contains(&token), "case {case}: {shown:?} is shown: {refusal:?}");
            tried.push(token);
        }
    }
    let changed: i64 = admin.query_one("SELECT count(*) FROM t WHERE v <> 0", &[]).expect("t").get(0);
    assert_eq!(changed, 0);

    for token in &tokens {
        client.batch_execute("BEGIN; SET LOCAL writeguard.override = on").expect("a transaction");
        client.execute("SELECT set_config('writeguard.token', $1, true)", &[token]).expect("a token");
        let rows = client.execute(WRITE, &[]).unwrap_or_else(|error| panic!("{:?}", Refusal::of(&error)));
        assert_eq!(rows, 5);
        client.batch_execute("COMMIT").expect("a commit");
    }

    let events: String = admin
        .query_one(
            "SELECT string_agg(e::text || coalesce(e.statement, '') || coalesce(e.reason, ''), ' ')
                    FROM writeguard.event AS e",
            &[],
        )
        .expect("the events")
        .get(0);
    let log = server.log();
    assert!(log.contains("token") && events.contains("token_refused"));
    for token in &tried {
        let shown: String = token.chars().take(300).collect();
        assert!(!log.contains(token.as_str()), "{shown:?} is in the server log");
        assert!(!events.contains(token.as_str()), "{shown:?} is in an event");
    }
}

fn random_token(tokens: &[String], case: u64) -> &str {
    &tokens[case as usize % tokens.len()]
}

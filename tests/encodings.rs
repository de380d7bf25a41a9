//! The same in every kind of encoding: names, texts and values of a database come through policies, refusals, events,
//! requests and undo as they are, also those that no conversion knows; and nothing of one database holds up another.

use std::sync::OnceLock;

use crate::common::bytes::{Bytes, Fault};
use crate::common::{Server, wait_until};

/// One database of the matrix.
struct Place {
    encoding: &'static str,
    /// A letter beyond ASCII.
    letter: &'static [u8],
    /// The same in UTF-8; none: nobody knows what it is.
    in_utf8: Option<&'static str>,
    /// Bytes that the encoding has, and no counterpart in Unicode; where there are none, a rare letter.
    wild: &'static [u8],
    /// What is shown for them.
    shown: &'static [u8],
}

const PLACES: [Place; 5] = [
    Place {
        encoding: "UTF8",
        letter: "ü".as_bytes(),
        in_utf8: Some("ü"),
        // One of the characters that stand for stray bytes in other databases.
        wild: "\u{10f881}".as_bytes(),
        shown: "\u{10f881}".as_bytes(),
    },
    Place { encoding: "SQL_ASCII", letter: b"\xc3\xbc", in_utf8: None, wild: b"\xfc\x81", shown: b"\\xfc\\x81" },
    Place { encoding: "LATIN1", letter: b"\xfc", in_utf8: Some("ü"), wild: b"\x81", shown: b"\x81" },
    Place { encoding: "WIN1252", letter: b"\xfc", in_utf8: Some("ü"), wild: b"\x81", shown: b"\\x81" },
    Place { encoding: "EUC_JP", letter: b"\xc6\xfc", in_utf8: Some("日"), wild: b"\xa9\xa1", shown: b"\\xa9\\xa1" },
];

fn server() -> &'static Server {
    Server::shared()
}

fn create(encoding: &str, name: &str) {
    let sql = format!("CREATE DATABASE {name} ENCODING '{encoding}' LOCALE 'C' TEMPLATE template0");
    server().postgres().batch_execute(&sql).unwrap();
    Bytes::admin(server(), name).rows("CREATE EXTENSION pg_writeguard");
}

/// Puts bytes in the place of `{letter}`, `{wild}` and `{long}`.
fn fill(sql: &str, place: &Place) -> Vec<u8> {
    let mut filled = Vec::new();
    let mut rest = sql;
    while let Some(start) = rest.find('{') {
        filled.extend_from_slice(&rest.as_bytes()[..start]);
        let end = start + rest[start..].find('}').unwrap();
        match &rest[start + 1..end] {
            "letter" => filled.extend_from_slice(place.letter),
            "wild" => filled.extend_from_slice(place.wild),
            "shown" => filled.extend_from_slice(place.shown),
            // Past what the queue takes of a statement.
            "long" => filled.extend(place.letter.repeat(70_000 / place.letter.len())),
            other => filled.extend_from_slice(format!("{{{other}}}").as_bytes()),
        }
        rest = &rest[end + 1..];
    }
    filled.extend_from_slice(rest.as_bytes());
    filled
}

fn contains(text: &[u8], part: &[u8]) -> bool {
    text.windows(part.len()).any(|window| window == part)
}

/// A refusal in an ordinary database is stored at once: nothing else holds the event store up.
#[track_caller]
fn others_are_served(database: &str) {
    let mut admin = Bytes::admin(server(), database);
    let fault = admin.fault("UPDATE plain SET v = v");
    assert_eq!(fault.sqlstate, "WG001", "{fault:?}");
    let event = fault.event().unwrap_or_else(|| panic!("stored late: {fault:?}"));
    assert_eq!(admin.number(format!("SELECT count(*) FROM writeguard.event WHERE id = {event}")), 1);
}

/// Name of a database with a table `plain` and a policy on it.
fn ordinary() -> &'static str {
    static NAME: OnceLock<()> = OnceLock::new();
    NAME.get_or_init(|| {
        create("UTF8", "ordinary");
        plain_table(&mut Bytes::admin(server(), "ordinary"));
    });
    "ordinary"
}

fn plain_table(admin: &mut Bytes) {
    admin.rows("CREATE TABLE plain (v int); INSERT INTO plain SELECT generate_series(1, 5)");
    admin.rows("SELECT writeguard.set_policy('plain', tables => '{public.plain}', max_rows => 2)");
}

#[track_caller]
fn goes_round(place: &Place) {
    let Place { encoding, .. } = place;
    let database = format!("round_{}", encoding.to_lowercase());
    create(encoding, &database);
    let with = |sql: &str| fill(&sql.replace("{role}", &format!("{encoding}{{letter}}{{wild}}")), place);
    let mut admin = Bytes::admin(server(), &database);
    admin.rows(with("CREATE ROLE \"{role}\" LOGIN"));
    admin.rows(with(
        "CREATE TABLE \"t{letter}{wild}\" (id int PRIMARY KEY, \"c{letter}{wild}\" text, other int);
         INSERT INTO \"t{letter}{wild}\" SELECT n, 'was {letter}{wild}' || n, n FROM generate_series(1, 5) AS n;
         GRANT ALL ON \"t{letter}{wild}\" TO \"{role}\"",
    ));
    admin.rows(with(
        "SELECT writeguard.set_policy('p{letter}{wild}', tables => ARRAY['public.\"t{letter}{wild}\"'],
             roles => ARRAY['{role}'], max_rows => 2, undo => '1 day', comment => 'for {letter}{wild}')",
    ));
    let stored = "SELECT name || tables::text || roles::text || comment FROM writeguard.policy";
    let before = admin.value(stored);
    for part in ["p{letter}{wild}", "t{letter}{wild}", "{role}", "for {letter}{wild}"] {
        assert!(contains(&before, &with(part)), "{encoding}: {} in {}", part, before.escape_ascii());
    }
    // The document is the policy again.
    admin.rows(
        "CREATE TABLE kept AS SELECT writeguard.export_policies() AS d; SELECT writeguard.drop_policy(name) FROM \
         writeguard.policy; SELECT * FROM writeguard.import_policies((SELECT d FROM kept))",
    );
    assert_eq!(admin.value(stored).escape_ascii().to_string(), before.escape_ascii().to_string());

    let mut user = Bytes::connect(server(), &database, &with("{role}"));
    user.rows(with("SET application_name = 'a{letter}{wild}'"));
    let write = with("UPDATE \"t{letter}{wild}\" SET \"c{letter}{wild}\" = 'is {letter}{wild}'");
    let refusal = user.fault(&write);
    assert_eq!(refusal.sqlstate, "WG001", "{encoding}: {refusal:?}");
    assert!(contains(&refusal.message, &with("t{letter}{shown}")), "{}", refusal.message.escape_ascii());
    assert!(contains(&refusal.detail, &with("p{letter}{shown}")), "{}", refusal.detail.escape_ascii());
    let event = admin.rows(
        "SELECT policy, login, relation, statement FROM writeguard.event WHERE kind = 'blocked' ORDER BY id DESC LIMIT 1",
    );
    let expected = [
        "p{letter}{shown}",
        &format!("{encoding}{{letter}}{{shown}}"),
        "public.\"t{letter}{shown}\"",
        "UPDATE \"t{letter}{shown}\" SET \"c{letter}{shown}\" = 'is {letter}{shown}'",
    ];
    for (value, expected) in event[0].iter().zip(expected) {
        let value = value.as_deref().unwrap_or_default();
        assert_eq!(value.escape_ascii().to_string(), with(expected).escape_ascii().to_string(), "{encoding}");
    }
    assert_eq!(user.number("SELECT count(*) FROM writeguard.my_events"), 1);
    // In an aborted transaction, and past what the queue takes of a statement.
    user.run(with("BEGIN; SELECT '{letter}{wild}'::int"));
    user.run(&write);
    user.run("ROLLBACK");
    let long = with("UPDATE \"t{letter}{wild}\" SET \"c{letter}{wild}\" = '{wild}' /* {long} */");
    assert_eq!(user.fault(&long).sqlstate, "WG001");
    wait_until(10, || admin.number("SELECT count(*) FROM writeguard.event WHERE kind = 'blocked'") == 2);
    others_are_served(ordinary());

    let ask =
        [b"SELECT writeguard.request($q$".as_slice(), &write, &with("$q$, reason => 'why {letter}{wild}')")].concat();
    let request = user.number(&ask);
    let statement = admin.value(format!("SELECT statement FROM writeguard.request WHERE id = {request}"));
    assert_eq!(statement.escape_ascii().to_string(), write.escape_ascii().to_string(), "{encoding}");
    admin.rows(with(&format!("SELECT writeguard.approve({request}, 'yes {{letter}}{{wild}}')")));
    user.rows(format!("SELECT * FROM writeguard.execute({request})"));
    let is = with("is {letter}{wild}");
    let count = |admin: &mut Bytes, value: &[u8]| {
        let (table, column) = (with("t{letter}{wild}"), with("c{letter}{wild}"));
        let sql = [b"SELECT count(*) FROM \"".as_slice(), &table, b"\" WHERE \"", &column, b"\" LIKE '", value, b"%'"];
        admin.number(sql.concat())
    };
    assert_eq!(count(&mut admin, &is), 5, "{encoding}");
    let token = [
        b"SELECT writeguard.request($q$".as_slice(),
        &with("DELETE FROM \"t{letter}{wild}\" WHERE \"c{letter}{wild}\" = 'is {letter}{wild}'"),
        &with("$q$, reason => 'why')"),
    ];
    let second = user.number(token.concat());
    let token = admin.value(format!("SELECT writeguard.approve({second})"));
    user.rows([b"SET writeguard.override = on; SET writeguard.token = '", token.as_slice(), b"'"].concat());
    user.rows(with("DELETE FROM \"t{letter}{wild}\" WHERE \"c{letter}{wild}\" = 'is {letter}{wild}'"));
    assert_eq!(count(&mut admin, &is), 0, "{encoding}");
    for _ in 0..2 {
        let change =
            admin.number("SELECT max(id) FROM writeguard.change_statement WHERE undone_at IS NULL AND undoes IS NULL");
        let restored = admin.rows(format!("SELECT relation, restored, conflicts FROM writeguard.undo({change})"));
        let restored: Vec<String> =
            restored[0].iter().map(|value| value.as_deref().unwrap_or_default().escape_ascii().to_string()).collect();
        let name = with("public.\"t{letter}{wild}\"").escape_ascii().to_string();
        assert_eq!(restored, [name.as_str(), "5", "0"], "{encoding}");
    }
    assert_eq!(count(&mut admin, &with("was {letter}{wild}")), 5, "{encoding}");
    for sql in [
        "TABLE writeguard.stat",
        "TABLE writeguard.event",
        "TABLE writeguard.change",
        "TABLE writeguard.event_totals",
        "SELECT * FROM writeguard.check_setup()",
        "SELECT * FROM writeguard.suggest_policies()",
    ] {
        admin.rows(sql);
    }
    let seen = admin.value("SELECT string_agg(relation, ' ') FROM writeguard.stat");
    assert!(contains(&seen, &with("t{letter}{wild}")), "{}", seen.escape_ascii());

    // A client that reads UTF-8, and never sent any of it.
    if place.in_utf8.is_some() {
        // Not in PL/pgSQL, whose CONTEXT shows the statement as it is.
        let body = with("UPDATE \"t{letter}{wild}\" SET other = 0");
        admin.rows([b"CREATE FUNCTION f() RETURNS void LANGUAGE sql AS $f$ ", body.as_slice(), b" $f$"].concat());
        user.rows("SET client_encoding = 'UTF8'; SET application_name = 'a'");
        let refusal = user.fault("SELECT f()");
        assert_eq!(refusal.sqlstate, "WG001", "{encoding}: {}", refusal.message.escape_ascii());
        assert!(String::from_utf8(refusal.text()).is_ok());
        admin.rows("SET client_encoding = 'UTF8'");
        for row in admin.rows("TABLE writeguard.event") {
            assert!(row.into_iter().flatten().all(|value| String::from_utf8(value).is_ok()), "{encoding}");
        }
        admin.rows("TABLE writeguard.event_totals");
    }
    others_are_served(ordinary());
}

#[test]
fn everything_works_in_utf8() {
    goes_round(&PLACES[0]);
}

#[test]
fn everything_works_in_sql_ascii() {
    goes_round(&PLACES[1]);
}

#[test]
fn everything_works_in_latin1() {
    goes_round(&PLACES[2]);
}

#[test]
fn everything_works_in_win1252() {
    goes_round(&PLACES[3]);
}

#[test]
fn everything_works_in_euc_jp() {
    goes_round(&PLACES[4]);
}

#[test]
fn what_no_conversion_knows_is_installed_too() {
    for encoding in ["EUC_KR", "MULE_INTERNAL", "EUC_JIS_2004", "KOI8R"] {
        // Which version 19 left out.
        if cfg!(since_pg19) && encoding == "MULE_INTERNAL" {
            continue;
        }
        let database = format!("installed_{}", encoding.to_lowercase());
        create(encoding, &database);
        let mut admin = Bytes::admin(server(), &database);
        plain_table(&mut admin);
        let wild: &[u8] = match encoding {
            "MULE_INTERNAL" => b"\x81\xa1",
            "KOI8R" => b"\xc1",
            _ => b"\xb0\xa1",
        };
        let fault = admin.fault([b"UPDATE plain SET v = v WHERE '", wild, b"' <> ''"].concat());
        assert_eq!(fault.sqlstate, "WG001", "{encoding}: {fault:?}");
        assert_eq!(admin.number("SELECT count(*) FROM writeguard.event WHERE kind = 'blocked'"), 1, "{encoding}");
    }
    others_are_served(ordinary());
}

/// A role of a UTF8 database that no letter of is known elsewhere breaks nothing there.
#[test]
fn a_role_with_letters_of_another_database_is_a_role_like_any_other() {
    ordinary();
    let role = "röle日🐘";
    Bytes::admin(server(), "ordinary").rows(format!("CREATE ROLE \"{role}\" LOGIN SUPERUSER"));
    for place in &PLACES {
        let database = format!("role_{}", place.encoding.to_lowercase());
        create(place.encoding, &database);
        let mut admin = Bytes::admin(server(), &database);
        plain_table(&mut admin);
        admin.rows("CREATE TABLE uncovered (v int); INSERT INTO uncovered VALUES (1)");
        let mut user = Bytes::connect(server(), &database, role.as_bytes());
        user.rows("UPDATE uncovered SET v = 2");
        let fault = user.fault("UPDATE plain SET v = v");
        assert_eq!(fault.sqlstate, "WG001", "{}: {fault:?}", place.encoding);
        assert!(fault.event().is_some(), "{}: {fault:?}", place.encoding);
        user.rows("SET writeguard.enabled = off; UPDATE plain SET v = v; RESET writeguard.enabled");
        let mine = user.number("SELECT count(*) FROM writeguard.my_events WHERE kind = 'blocked'");
        assert_eq!(mine, 1, "{}", place.encoding);
        let request = user.number("SELECT writeguard.request('UPDATE plain SET v = 0', reason => 'why')");
        assert_eq!(user.fault(format!("SELECT writeguard.approve({request})")).sqlstate, "WG006");
        admin.rows(format!("SELECT writeguard.approve({request})"));
        user.rows(format!("SELECT * FROM writeguard.execute({request})"));
        for view in ["event", "pending", "my_requests", "stat", "change", "event_totals"] {
            admin.rows(format!("TABLE writeguard.{view}"));
        }
        admin.rows("SELECT * FROM writeguard.effective('plain', CURRENT_USER, 'update')");
        if place.in_utf8.is_some() {
            admin.rows("SET client_encoding = 'UTF8'");
            for view in ["event", "pending", "my_requests", "stat", "change", "event_totals"] {
                admin.rows(format!("TABLE writeguard.{view}"));
            }
        }
    }
    others_are_served("ordinary");
}

/// Whoever looks at requests sees them, whatever bytes the statement, the names and the reason have: what the client cannot be
/// sent stands there as an escape.
#[test]
fn a_request_of_bytes_that_do_not_convert_costs_nobody_the_view() {
    for place in &PLACES {
        let database = format!("shown_{}", place.encoding.to_lowercase());
        create(place.encoding, &database);
        let with = |sql: &str| fill(sql, place);
        let mut admin = Bytes::admin(server(), &database);
        admin.rows(with(
            "CREATE TABLE \"t{wild}\" (id int PRIMARY KEY, v text);
             INSERT INTO \"t{wild}\" SELECT n, '{wild}' FROM generate_series(1, 5) AS n",
        ));
        admin.rows(with(
            "SELECT writeguard.set_policy('p{wild}', tables => ARRAY['public.\"t{wild}\"'], max_rows => 2,
                 override => 'token')",
        ));
        admin.rows(with(
            "SELECT writeguard.request('UPDATE \"t{wild}\" SET v = $1 /* {wild} */', reason => 'why {wild}',
                 parameters => ARRAY['is {wild}'])",
        ));
        admin.rows("SET client_encoding = 'UTF8'");
        for view in ["pending", "my_requests"] {
            let columns = "concat_ws(' ', statement, reason, parameters, relations, policies)";
            let seen = admin.value(format!("SELECT {columns} FROM writeguard.{view}"));
            let whole = admin.rows(format!("TABLE writeguard.{view}"));
            assert_eq!(whole.len(), 1, "{}: {view}", place.encoding);
            // LATIN1 has every byte; this one is a control character.
            let shown = if place.encoding == "LATIN1" { b"\\u0081" } else { place.shown };
            for part in ["SET v = $1 /* {} */", "why {}", "is {}", "t{}", "p{}"] {
                let (before, after) = part.split_once("{}").expect("a part");
                let part = [before.as_bytes(), shown, after.as_bytes()].concat();
                let doubled = part.iter().flat_map(|byte| if *byte == b'\\' { vec![b'\\'; 2] } else { vec![*byte] });
                let doubled: Vec<u8> = doubled.collect();
                let is_there = contains(&seen, &part) || contains(&seen, &doubled);
                assert!(is_there, "{}: {} in {}", place.encoding, part.escape_ascii(), seen.escape_ascii());
            }
        }
    }
}

/// A client whose encoding lacks the table's letters gets our error, not one about letters.
#[test]
fn a_client_without_the_letters_is_refused_as_any_other() {
    create("UTF8", "other_clients");
    let mut admin = Bytes::admin(server(), "other_clients");
    admin.rows("CREATE TABLE \"日本🐘\" (v int); INSERT INTO \"日本🐘\" VALUES (1), (2), (3)");
    admin.rows("SELECT writeguard.set_policy('pö日', tables => ARRAY['public.\"日本🐘\"'], max_rows => 2)");
    admin.rows(
        "CREATE FUNCTION f() RETURNS void LANGUAGE sql AS $$ UPDATE \"日本🐘\" SET v = 0 $$;
         CREATE FUNCTION n() RETURNS void LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION USING ERRCODE = 'SW001'; END $$",
    );
    for client in ["LATIN1", "WIN1251", "EUC_JP", "SJIS", "GB18030", "UTF8", "SQL_ASCII"] {
        admin.rows(format!("SET client_encoding = '{client}'"));
        let fault: Fault = admin.fault("SELECT f()");
        assert_eq!(fault.sqlstate, "WG001", "{client}: {}", fault.message.escape_ascii());
        assert_eq!(admin.fault("SELECT n()").sqlstate, "SW001", "{client}");
    }
}

/// What a text of the database becomes on its way through the library and back.
fn through_a_policy(admin: &mut Bytes, text: &[u8]) -> Vec<u8> {
    let mut quoted = Vec::new();
    for byte in text {
        quoted.push(*byte);
        if *byte == b'\'' {
            quoted.push(*byte);
        }
    }
    let call = b"SELECT writeguard.set_policy('c', max_rows => 1000000, comment => '".as_slice();
    admin.rows([call, &quoted, b"')"].concat());
    admin.rows(
        "CREATE TEMP TABLE IF NOT EXISTS d (d jsonb); TRUNCATE d; INSERT INTO d SELECT writeguard.export_policies();
         SELECT writeguard.drop_policy('c'); SELECT * FROM writeguard.import_policies((SELECT d FROM d))",
    );
    admin.value("SELECT comment FROM writeguard.policy WHERE name = 'c'")
}

/// A sequence of pseudo-random numbers.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self, below: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 % below as u64).unwrap()
    }

    fn byte(&mut self, from: u8, to: u8) -> u8 {
        from + u8::try_from(self.next(usize::from(to - from) + 1)).unwrap()
    }
}

/// Some text in an encoding, of any letters that its check lets in.
fn text_in(encoding: &str, numbers: &mut Numbers, length: usize) -> Vec<u8> {
    let mut text = Vec::new();
    for _ in 0..length {
        let kind = numbers.next(4);
        match (encoding, kind) {
            (_, 0) => text.push(numbers.byte(1, 0x7f)),
            ("EUC_JP" | "EUC_JIS_2004", 1) => text.extend([0x8e, numbers.byte(0xa1, 0xdf)]),
            ("EUC_JP" | "EUC_JIS_2004", 2) => text.extend([0x8f, numbers.byte(0xa1, 0xfe), numbers.byte(0xa1, 0xfe)]),
            ("EUC_JP" | "EUC_JIS_2004" | "EUC_KR", _) => {
                text.extend([numbers.byte(0xa1, 0xfe), numbers.byte(0xa1, 0xfe)])
            }
            ("UTF8", _) => {
                let letter = char::from_u32(u32::try_from(0x80 + numbers.next(0x10_ff80)).unwrap()).unwrap_or('ü');
                text.extend(letter.encode_utf8(&mut [0; 4]).as_bytes());
            }
            _ => text.push(numbers.byte(0x80, 0xff)),
        }
    }
    text
}

#[test]
fn every_text_comes_back_as_it_was() {
    for encoding in ["UTF8", "SQL_ASCII", "LATIN1", "WIN1252", "EUC_JP", "EUC_KR", "EUC_JIS_2004", "KOI8R"] {
        let database = format!("texts_{}", encoding.to_lowercase());
        create(encoding, &database);
        let mut admin = Bytes::admin(server(), &database);
        let mut numbers = Numbers(0x9e37_79b9_7f4a_7c15);
        for length in [1, 2, 3, 5, 8, 40, 200, 1_000, 1_023, 1_024, 1_025, 3_000] {
            for _ in 0..4 {
                let text = text_in(encoding, &mut numbers, length);
                let back = through_a_policy(&mut admin, &text);
                assert!(back == text, "{encoding}: {} came back as {}", text.escape_ascii(), back.escape_ascii());
            }
        }
        if encoding.starts_with("EUC_J") {
            let all: Vec<u8> =
                (0xa1..=0xfe).flat_map(|one| (0xa1..=0xfe).flat_map(move |other| [one, other])).collect();
            assert!(through_a_policy(&mut admin, &all) == all, "{encoding}");
        }
    }
}

/// Time to refuse grows with the text, whether its letters convert or not.
#[test]
fn long_texts_of_strays_take_no_longer() {
    create("WIN1252", "long_strays");
    let mut admin = Bytes::admin(server(), "long_strays");
    plain_table(&mut admin);
    let mut time = |letters: &[u8], megabytes: usize| {
        let filler = letters.repeat((megabytes << 20) / letters.len());
        let sql = [b"UPDATE plain SET v = v /* ".as_slice(), &filler, b" */"].concat();
        let begun = std::time::Instant::now();
        assert_eq!(admin.fault(sql).sqlstate, "WG001");
        begun.elapsed()
    };
    time(b"\xfc", 1);
    let (plain, wild, mixed) = (time(b"\xfc", 4), time(b"\x81", 4), time(b"\xfc\x81", 4));
    for other in [wild, mixed] {
        assert!(other < plain * 20 + std::time::Duration::from_secs(4), "{other:?} against {plain:?}");
    }
}

/// The scripts are read in databases of every encoding.
#[test]
fn the_extensions_sql_is_ascii() {
    let sql = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("sql");
    for (directory, least) in [(".", 8), ("install", 5), ("upgrade", 1), ("released", 3)] {
        let files: Vec<_> =
            std::fs::read_dir(sql.join(directory)).unwrap().map(|entry| entry.unwrap().path()).collect();
        let scripts = files.iter().filter(|path| path.extension().is_some_and(|extension| extension == "sql"));
        assert!(scripts.clone().count() >= least, "{directory}: {files:?}");
        for path in scripts {
            let place = std::fs::read(path).unwrap().iter().position(|byte| !byte.is_ascii());
            assert_eq!(place, None, "{}", path.display());
        }
    }
}

//! Every SQL example of the README and of the pages of docs/, typed into psql in the order of the page, what their
//! tables say that the catalogs know as well, and the files and commands that the pages for developers name.
//!
//! An example runs as superuser unless its first line says `-- as ROLE`, and passes unless that line says
//! `refused with SQLSTATE`. Each role has one session for the whole page, and no example leaves a transaction open.
//! `{token}` stands for the token that was shown last. Where a block of `text` follows, that is what psql prints.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader, PipeReader, Write, pipe};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use crate::common::{Database, Server, make_directory};
use postgres::Client;

const README: &str = include_str!("../README.md");
const POLICIES: &str = include_str!("../docs/policies.md");
const POLICIES_AS_CODE: &str = include_str!("../docs/policies-as-code.md");
const OPERATIONS: &str = include_str!("../docs/operations.md");
const REFERENCE: &str = include_str!("../docs/reference.md");

/// The pages whose examples use the README's table and people.
const PAGES: [(&str, &str); 8] = [
    ("approvals", include_str!("../docs/approvals.md")),
    ("operations", OPERATIONS),
    ("policies-as-code", POLICIES_AS_CODE),
    ("policies", POLICIES),
    ("pools", include_str!("../docs/pools.md")),
    ("rehearsal", include_str!("../docs/rehearsal.md")),
    ("statistics", include_str!("../docs/statistics.md")),
    ("undo", include_str!("../docs/undo.md")),
];

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

/// Types the examples of a page, in a database with what `before` has done.
fn play(page: &str, before: &str) {
    let server = Server::start(&[]);
    let db = server.plain_database();
    let examples = examples(page);
    assert!(!examples.is_empty() && page.matches("```sql").count() == examples.len(), "{} examples", examples.len());
    db.admin().batch_execute(before).expect(before);
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
    play(README, "");
}

#[test]
fn every_example_of_the_other_pages_does_what_they_say() {
    let stage = examples(README).into_iter().find(|example| example.sql.starts_with("CREATE TABLE public.orders"));
    let stage = format!("CREATE EXTENSION pg_writeguard; {}", stage.expect("the table and the people").sql);
    for (name, page) in PAGES {
        println!("docs/{name}.md");
        play(page, &stage);
    }
}

/// What a link leads to is there: the file, and in a page the heading.
#[test]
fn every_link_leads_somewhere() {
    let top = Path::new(env!("CARGO_MANIFEST_DIR"));
    let below = |directory: &str| {
        let files = std::fs::read_dir(top.join(directory)).expect("a directory");
        files.map(|file| file.expect("a file").path()).filter(|path| path.extension().is_some_and(|end| end == "md"))
    };
    let mut links = 0;
    for page in below(".").chain(below("docs")) {
        let text = std::fs::read_to_string(&page).expect("a page");
        for link in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            if link.contains("://") {
                continue;
            }
            let (file, heading) = link.split_once('#').unwrap_or((link, ""));
            let target = if file.is_empty() { page.clone() } else { page.parent().expect("a folder").join(file) };
            assert!(target.exists(), "{}: {link}", page.display());
            links += 1;
            if !heading.is_empty() {
                let text = std::fs::read_to_string(&target).expect("a page");
                let is_heading = |line: &str| line.starts_with('#') && anchor(line) == heading;
                assert!(text.lines().any(is_heading), "{}: {link}", page.display());
            }
        }
    }
    assert!(links > 30, "{links} links");
}

/// What a heading is called in links.
fn anchor(heading: &str) -> String {
    let words = heading.trim_start_matches('#').trim().to_lowercase();
    let letters = words.chars().filter(|letter| letter.is_alphanumeric() || matches!(letter, ' ' | '-' | '_'));
    letters.map(|letter| if letter == ' ' { '-' } else { letter }).collect()
}

#[test]
fn the_way_to_enforce_is_as_the_page_says() {
    play(include_str!("../docs/rollout.md"), "");
}

#[test]
fn the_extension_comes_and_goes_as_the_page_says() {
    play(include_str!("../docs/install.md"), "");
}

#[test]
fn a_document_of_a_thousand_policies_goes_the_way_that_the_page_shows() {
    let server = Server::shared();
    let db = server.database();
    let policies =
        "SELECT count(writeguard.set_policy('policy ' || n, tables => ARRAY['public.t_' || n || '_*'], max_rows => n,
                        comment => repeat('long ', 50))) FROM generate_series(1, 1000) AS n";
    db.admin().query_one(policies, &[]).expect("policies");
    let blocks: Vec<&str> =
        POLICIES_AS_CODE.split("```sh\n").skip(1).filter_map(|block| block.split("```").next()).collect();
    assert_eq!(blocks.len(), 2);
    let programs = std::env::var("PGWG_BIN").expect("PGWG_BIN is set");
    let output = Command::new("bash")
        .args(["-euc", &format!("exec 2>&1; trap 'rm -rf \"$PWD\"' EXIT\n{}", blocks.concat())])
        .current_dir(make_directory())
        .env("PATH", format!("{programs}:{}", std::env::var("PATH").unwrap_or_default()))
        .env("PGHOST", server.socket_dir())
        .env("PGPORT", server.port().to_string())
        .env("PGUSER", "postgres")
        .env("PGDATABASE", &db.name)
        .output()
        .expect("cannot run bash");
    let printed = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{printed}");
    assert_eq!(printed.matches("| unchanged |").count(), 1000, "{printed}");
}

// ---- What the tables say ----

/// The cells of a table by rows, without its head.
type Rows = Vec<Vec<String>>;

/// The table with that head.
fn table(page: &str, head: &str) -> Rows {
    let mut lines = page.lines().skip_while(|line| *line != head);
    assert!(lines.next().is_some() && lines.next().is_some(), "no table with the head {head}");
    lines
        .take_while(|line| line.starts_with('|'))
        .map(|line| line.trim_matches('|').split('|').map(|cell| cell.trim().to_owned()).collect())
        .collect()
}

/// What stands between backquotes.
fn quoted(cell: &str) -> impl Iterator<Item = String> {
    cell.split('`').skip(1).step_by(2).map(str::to_owned)
}

fn strings(client: &mut Client, sql: &str) -> BTreeSet<String> {
    client.query(sql, &[]).expect(sql).iter().map(|row| row.get(0)).collect()
}

fn columns(client: &mut Client, relation: &str) -> BTreeSet<String> {
    let of = format!("attrelid = '{relation}'::regclass AND attnum > 0 AND NOT attisdropped");
    strings(client, &format!("SELECT attname::text FROM pg_attribute WHERE {of}"))
}

#[test]
fn the_columns_are_those_of_the_catalog() {
    let mut admin = Server::shared().database().admin();
    for relation in ["writeguard.event", "writeguard.change"] {
        let rows = table(REFERENCE, &format!("| column of `{relation}` | meaning |"));
        let names: BTreeSet<String> = rows.iter().flat_map(|row| quoted(&row[0])).collect();
        assert_eq!(names, columns(&mut admin, relation), "{relation}");
    }
    let told =
        OPERATIONS.split("not simply allowed: ").nth(1).and_then(|rest| rest.split(". ").next()).expect("the kinds");
    let kinds = strings(&mut admin, "SELECT kind FROM writeguard.event_totals WHERE policy IS NULL");
    assert_eq!(quoted(told).collect::<BTreeSet<_>>(), kinds);
}

#[test]
fn the_policy_columns_and_their_defaults_are_those_of_the_catalog() {
    let mut admin = Server::shared().database().admin();
    let mut named = BTreeSet::new();
    for row in table(POLICIES, "| column | default | meaning |") {
        let defaults: Vec<&str> = row[1].split(", ").map(|word| word.trim_matches('`')).collect();
        let names: Vec<String> = quoted(&row[0]).collect();
        // One value may have commas in it.
        let defaults = if names.len() == 1 { vec![row[1].trim_matches('`')] } else { defaults };
        assert_eq!(names.len(), defaults.len(), "{row:?}");
        for (name, default) in names.into_iter().zip(defaults) {
            let sql = "SELECT pg_get_expr(adbin, adrelid), format_type(atttypid, atttypmod) FROM pg_attribute
                       LEFT JOIN pg_attrdef ON (adrelid, adnum) = (attrelid, attnum)
                       WHERE attrelid = 'writeguard.policy'::regclass AND attname = $1::text";
            let column = admin.query_one(sql, &[&name]).unwrap_or_else(|_| panic!("no column {name}"));
            let (has, type_): (Option<String>, String) = (column.get(0), column.get(1));
            let says = if matches!(default, "" | "NULL") { "NULL".to_owned() } else { format!("'{default}'") };
            let same = format!("SELECT ({says})::{type_} IS NOT DISTINCT FROM {}", has.as_deref().unwrap_or("NULL"));
            assert!(admin.query_one(&same, &[]).expect(&same).get::<_, bool>(0), "{name}: {same}");
            named.insert(name);
        }
    }
    assert_eq!(named, columns(&mut admin, "writeguard.policy"));
}

#[test]
fn the_settings_are_those_of_the_library() {
    let mut admin = Server::shared().database().admin();
    // The token is listed nowhere.
    let all = "SELECT name FROM pg_settings WHERE name LIKE 'writeguard.%' UNION SELECT 'writeguard.token'";
    let mut named = BTreeSet::new();
    for row in table(REFERENCE, "| setting | who, default | meaning |") {
        let name = quoted(&row[0]).next().expect("a name");
        let (who, default) = row[1].split_once(", ").expect("who, default");
        let context = match who {
            "superuser" => "superuser",
            "everybody" => "user",
            "restart" => "postmaster",
            other => other,
        };
        let sql = "SELECT current_setting($1), (SELECT context FROM pg_settings WHERE name = $1)";
        let setting = admin.query_one(sql, &[&name]).unwrap_or_else(|_| panic!("no setting {name}"));
        let default = if default == "empty" { "" } else { default.trim_matches('`') };
        assert_eq!(setting.get::<_, &str>(0), default, "{name}");
        assert_eq!(setting.get::<_, Option<&str>>(1).unwrap_or("user"), context, "{name}");
        named.insert(name);
    }
    assert_eq!(named, strings(&mut admin, all));
}

// ---- The pages for developers ----

const FOR_DEVELOPERS: [(&str, &str); 2] =
    [("ARCHITECTURE.md", include_str!("../ARCHITECTURE.md")), ("CONTRIBUTING.md", include_str!("../CONTRIBUTING.md"))];

/// Every file that a release has, relative to the top.
fn files_below(directory: &Path, found: &mut BTreeSet<String>) {
    for entry in std::fs::read_dir(directory).expect("a directory").map(|entry| entry.expect("an entry").path()) {
        let path = entry.strip_prefix(env!("CARGO_MANIFEST_DIR")).expect("below the top").to_owned();
        if matches!(path.to_str(), Some("target" | ".git")) {
            continue;
        }
        if entry.is_dir() {
            files_below(&entry, found);
        }
        found.insert(path.to_str().expect("a name").to_owned());
    }
}

/// The words of a page that look like files, as long as they are not of somewhere else.
fn named_files(page: &str) -> impl Iterator<Item = &str> {
    let is_part = |letter: char| letter.is_ascii_alphanumeric() || matches!(letter, '_' | '-' | '.' | '/');
    let words = page.split(move |letter| !is_part(letter)).map(|word| word.trim_end_matches(['.', '/']));
    let elsewhere = |word: &str| ["/", "target/", "pg_stat/", "target"].iter().any(|there| word.starts_with(there));
    words.filter(move |word| !elsewhere(word)).filter(|word| {
        let (name, ending) = word.rsplit_once('.').unwrap_or((word, ""));
        // `pgNN` is any version of the server.
        let is_name = !name.is_empty() && !word.contains("NN");
        is_name && (word.contains('/') || matches!(ending, "rs" | "md" | "sql" | "toml" | "json"))
    })
}

#[test]
fn the_pages_for_developers_name_files_that_are_there() {
    let mut all = BTreeSet::new();
    files_below(Path::new(env!("CARGO_MANIFEST_DIR")), &mut all);
    // A file of src/ goes by its room, and within a sentence about its folder by its name.
    let is_there = |word: &str| {
        let of_src = format!("src/{word}");
        all.contains(word)
            || all.contains(&of_src)
            || all.contains(&format!("{of_src}.rs"))
            || !word.contains('/') && all.iter().any(|file| file.rsplit('/').next() == Some(word))
    };
    for (name, page) in FOR_DEVELOPERS {
        let gone: Vec<&str> = named_files(page).filter(|word| !is_there(word)).collect();
        assert!(named_files(page).count() > 30, "{name} names files");
        assert!(gone.is_empty(), "{name}: {gone:?}");
    }
}

#[test]
fn the_pages_for_developers_name_commands_that_are_there() {
    let makefile = include_str!("../Makefile");
    let targets: BTreeSet<&str> =
        makefile.lines().filter_map(|line| line.split_once(':')).map(|(target, _)| target).collect();
    for (name, page) in FOR_DEVELOPERS {
        let blocks = page.lines().filter_map(|line| line.strip_prefix("    "));
        let code: Vec<&str> = blocks.chain(page.split('`').skip(1).step_by(2)).collect();
        let made = code.iter().flat_map(|code| code.split("make ").skip(1)).filter_map(|rest| {
            let target = rest.split(|letter: char| !(letter.is_ascii_lowercase() || letter == '-')).next();
            target.filter(|target| !target.is_empty())
        });
        let gone: Vec<&str> = made.filter(|target| !targets.contains(target)).collect();
        assert!(gone.is_empty(), "{name}: {gone:?}");
    }
}

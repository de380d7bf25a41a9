//! Approvals from outside: JWTs that a trusted key has signed.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::common::session::{pass, refused, text};
use crate::common::{Database, Refusal, Server, expect_refusal, wait_until};
use ed25519_dalek::pkcs8::EncodePublicKey;
use ed25519_dalek::pkcs8::spki::der::pem::LineEnding;
use ed25519_dalek::{Signer, SigningKey};
use postgres::Client;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

/// Changes all rows of `t`, which are more than the policy allows.
const WRITE: &str = "UPDATE t SET a = 9";

const HEADER: &str = r#"{"alg":"EdDSA","typ":"JWT","kid":"deploy"}"#;

// ---- A signer ----

fn base64url(bytes: &[u8]) -> String {
    const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let mut text = String::new();
    for chunk in bytes.chunks(3) {
        let word = chunk.iter().fold(0u32, |word, byte| word << 8 | u32::from(*byte)) << (8 * (3 - chunk.len()));
        for place in 0..=chunk.len() {
            text.push(LETTERS[(word >> (18 - 6 * place) & 63) as usize].into());
        }
    }
    text
}

/// The part of a token that is signed.
fn signed_part(header: &str, claims: &str) -> String {
    format!("{}.{}", base64url(header.as_bytes()), base64url(claims.as_bytes()))
}

fn sign(key: &SigningKey, header: &str, claims: &str) -> String {
    let part = signed_part(header, claims);
    let signature = base64url(&key.sign(part.as_bytes()).to_bytes());
    format!("{part}.{signature}")
}

fn pem(key: &SigningKey) -> String {
    key.verifying_key().to_public_key_pem(LineEnding::LF).unwrap()
}

fn key(seed: u8) -> SigningKey {
    SigningKey::from_bytes(&[seed; 32])
}

fn hmac_sha256(secret: &[u8], message: &[u8]) -> Vec<u8> {
    let mut block = [0u8; 64];
    if secret.len() > 64 {
        block[..32].copy_from_slice(&Sha256::digest(secret));
    } else {
        block[..secret.len()].copy_from_slice(secret);
    }
    let keyed = |pad: u8| block.map(|byte| byte ^ pad).to_vec();
    let inner = Sha256::digest([&keyed(0x36)[..], message].concat());
    Sha256::digest([&keyed(0x5c)[..], &inner[..]].concat()).to_vec()
}

fn sha256(text: &str) -> String {
    Sha256::digest(text).iter().map(|byte| format!("{byte:02x}")).collect()
}

fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs_f64()
}

fn fresh_jti() -> String {
    static NEXT: AtomicU32 = AtomicU32::new(1);
    format!("job-{}", NEXT.fetch_add(1, Ordering::Relaxed))
}

fn audience(client: &mut Client) -> String {
    text(client, "SELECT system_identifier || '/' || current_database() FROM pg_control_system()")
}

// ---- A database ----

/// A database with a table `t` of five rows that the policy `p` limits to three, a trusted key, and a role that writes.
struct Stage {
    db: Database,
    admin: Client,
    role: String,
    audience: String,
}

impl Stage {
    fn new() -> Stage {
        Stage::on(Server::shared())
    }

    fn on(server: &Server) -> Stage {
        let db = server.database();
        let mut admin = db.admin();
        let role = db.role("ci");
        admin
            .batch_execute(&format!(
                "CREATE TABLE t (id int PRIMARY KEY, a int NOT NULL DEFAULT 0);
                 INSERT INTO t SELECT generate_series(1, 5);
                 GRANT ALL ON t TO PUBLIC;
                 SELECT writeguard.trust_key('deploy', '{}');
                 SELECT writeguard.set_policy('p', tables => '{{public.*}}', operations => '{{update,delete,truncate,drop}}',
                                              max_rows => 3)",
                pem(&key(7))
            ))
            .unwrap_or_else(|error| panic!("{:?}", Refusal::of(&error)));
        let audience = audience(&mut admin);
        Stage { db, admin, role, audience }
    }

    fn client(&self) -> Client {
        self.db.connect(&self.role)
    }

    fn claims(&self, statement: &str) -> Value {
        json!({
            "aud": self.audience, "sub": self.role, "exp": now() as u64 + 300, "jti": fresh_jti(),
            "wg": {"statement_sha256": sha256(statement), "max_rows": 5},
        })
    }

    fn token(&self, statement: &str) -> String {
        signed(&self.claims(statement))
    }

    /// How many rows of `t` have the value that [`WRITE`] gives them.
    #[track_caller]
    fn changed(&mut self) -> i64 {
        number(&mut self.admin, "SELECT count(*) FROM t WHERE a = 9")
    }

    /// Takes back what a write that passed has changed.
    fn undo(&mut self) {
        self.admin.batch_execute("SET writeguard.enabled = off; UPDATE t SET a = 0; RESET writeguard.enabled").unwrap();
    }

    /// The write is refused with that token, with WG006 and that reason, and recorded; nothing is changed, and nothing
    /// shows the token.
    #[track_caller]
    fn refuses(&mut self, token: &str, reason: &str) -> Refusal {
        self.refuses_from(&mut self.client(), token, reason)
    }

    #[track_caller]
    fn refuses_from(&mut self, client: &mut Client, token: &str, reason: &str) -> Refusal {
        let events = "SELECT count(*) FROM writeguard.event WHERE kind = 'token_refused'";
        let before = number(&mut self.admin, events);
        arm(client, token);
        let refusal = refused(client, WRITE, "WG006");
        assert!(refusal.message.contains(reason), "{reason}: {refusal:?}");
        assert!(!refusal.hint.is_empty() && refusal.table == "t", "{refusal:?}");
        assert_hidden(token, &format!("{refusal:?}"));
        assert_eq!(self.changed(), 0);
        assert_eq!(number(&mut self.admin, events), before + 1);
        let last = "SELECT e::text FROM writeguard.event AS e WHERE kind = 'token_refused' ORDER BY id DESC LIMIT 1";
        let event = text(&mut self.admin, last);
        assert!(event.contains(reason), "{event}");
        assert_hidden(token, &event);
        refusal
    }

    #[track_caller]
    fn accepts(&mut self, token: &str) {
        let mut client = self.client();
        arm(&mut client, token);
        pass(&mut client, WRITE);
        assert_eq!(self.changed(), 5);
        self.undo();
    }
}

fn signed(claims: &Value) -> String {
    sign(&key(7), HEADER, &claims.to_string())
}

/// No part of the token that says anything is in the text.
#[track_caller]
fn assert_hidden(token: &str, text: &str) {
    for part in token.split('.').filter(|part| part.len() > 12) {
        assert!(!text.contains(&part[..part.len().min(40)]), "the token is shown: {text}");
    }
}

fn arm(client: &mut Client, token: &str) {
    client.batch_execute("SET writeguard.override = on").unwrap();
    client.query_one("SELECT set_config('writeguard.token', $1, false)", &[&token]).unwrap();
}

#[track_caller]
fn number(client: &mut Client, sql: &str) -> i64 {
    client.query_one(sql, &[]).unwrap().get(0)
}

fn pid(client: &mut Client) -> i32 {
    client.query_one("SELECT pg_backend_pid()", &[]).unwrap().get(0)
}

#[track_caller]
fn wait_for_lock_of(admin: &mut Client, pid: i32) {
    wait_until(20, || {
        let sql = "SELECT count(*) FROM pg_stat_activity WHERE pid = $1 AND wait_event_type = 'Lock'";
        admin.query_one(sql, &[&pid]).unwrap().get::<_, i64>(0) == 1
    });
}

// ---- The documented way ----

/// A directory that goes with the test.
struct Directory(PathBuf);

impl Directory {
    fn new() -> Directory {
        let directory = std::env::temp_dir().join(format!("pgwg-jwt-{}-{}", std::process::id(), fresh_jti()));
        fs::create_dir(&directory).unwrap();
        Directory(directory)
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// What a shell prints; the programs and the database are those of the test.
fn shell(directory: &Path, server: &Server, database: &str, script: &str) -> (bool, String) {
    let programs = std::env::var("PGWG_BIN").expect("PGWG_BIN is set");
    let path = format!("{programs}:{}", std::env::var("PATH").unwrap_or_default());
    let output = Command::new("bash")
        .args(["-euc", &format!("exec 2>&1\n{script}")])
        .current_dir(directory)
        .env("PATH", path)
        .env("PGHOST", server.socket_dir())
        .env("PGPORT", server.port().to_string())
        .env("PGUSER", "postgres")
        .env("PGDATABASE", database)
        .env("LC_ALL", "C.UTF-8")
        .output()
        .expect("cannot run bash");
    (output.status.success(), String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The blocks of the section that are marked as those of a shell.
fn documented() -> Vec<String> {
    let page = include_str!("../docs/approvals.md");
    let section = page.split("\n## ").find(|section| section.starts_with("Approvals from a pipeline")).unwrap();
    let blocks: Vec<String> =
        section.split("```sh\n").skip(1).map(|block| block.split("```").next().unwrap().to_owned()).collect();
    assert!(blocks.len() >= 3, "{blocks:?}");
    blocks
}

#[test]
fn the_documented_pipeline_works_as_it_stands() {
    let server = Server::shared();
    let db = server.database();
    let mut admin = db.admin();
    pass(
        &mut admin,
        "CREATE TABLE orders (id int PRIMARY KEY, customer int, is_deleted boolean NOT NULL DEFAULT false);
         INSERT INTO orders SELECT n, n % 10, false FROM generate_series(1, 1000) AS n;
         CREATE ROLE readme_anna LOGIN;
         GRANT SELECT, UPDATE ON orders TO readme_anna;
         SELECT writeguard.set_policy('orders-guard', tables => '{public.orders}', max_rows => 50)",
    );
    let directory = Directory::new();
    symlink(Path::new(env!("CARGO_MANIFEST_DIR")).join("examples"), directory.0.join("examples")).unwrap();
    let (passed, printed) = shell(&directory.0, server, &db.name, &documented().concat());
    assert!(passed, "{printed}");
    assert_eq!(number(&mut admin, "SELECT count(*) FROM orders WHERE is_deleted"), 100);
    let event = "SELECT reason FROM writeguard.event WHERE kind = 'overridden' AND approval IS NULL AND rows = 100";
    assert!(text(&mut admin, event).ends_with("signed with trusted key \"deploy\""));
    let keys = number(&mut admin, "SELECT count(*) FROM writeguard.trusted_key");
    assert_eq!(keys, 0, "the last block distrusts the key");
}

#[test]
fn what_the_script_signs_is_what_the_statement_hash_says() {
    let stage = Stage::new();
    let server = Server::shared();
    let directory = Directory::new();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/sign-approval");
    let run = |statement: &str, tables: &str| {
        fs::write(directory.0.join("statement.sql"), statement).unwrap();
        let script = format!(
            "[ -e key.pem ] || openssl genpkey -algorithm ed25519 -out key.pem
             {} key.pem deploy {} {} 5 {tables} < statement.sql > token
             openssl pkey -in key.pem -pubout",
            script.display(),
            stage.audience,
            stage.role
        );
        let (passed, printed) = shell(&directory.0, server, &stage.db.name, &script);
        assert!(passed, "{printed}");
        let token = fs::read_to_string(directory.0.join("token")).unwrap();
        (token.trim().to_owned(), printed)
    };
    let mut admin = stage.db.admin();
    let mut client = stage.client();
    for statement in [" \n UPDATE t SET a = 9 ;; \n", "UPDATE t SET a = 9 WHERE 'Bücher für \u{1f418}' <> $$'$$;"] {
        let (token, public) = run(statement, "public.t");
        admin.query_one("SELECT writeguard.trust_key('script', $1)", &[&public]).unwrap();
        // The script's key is called deploy, as another one is here.
        arm(&mut client, &token);
        assert!(refused(&mut client, statement, "WG006").message.contains("signature"));
        pass(&mut admin, "SELECT writeguard.distrust_key('deploy')");
        admin.query_one("SELECT writeguard.trust_key('deploy', $1)", &[&public]).unwrap();
        arm(&mut client, &token);
        pass(&mut client, statement);
        pass(&mut admin, "SELECT writeguard.distrust_key('deploy')");
        admin.query_one("SELECT writeguard.trust_key('deploy', $1)", &[&pem(&key(7))]).unwrap();
    }
}

#[test]
fn a_token_opens_its_write_and_is_on_record() {
    let mut stage = Stage::new();
    let mut client = stage.client();
    let claims = stage.claims(WRITE);
    let token = signed(&claims);
    arm(&mut client, &token);
    pass(&mut client, &format!(" {WRITE};\n"));
    assert_eq!(stage.changed(), 5);
    let sql = "SELECT rows, approval, reason, login, policy FROM writeguard.event WHERE kind = 'overridden'";
    let event = stage.admin.query_one(sql, &[]).unwrap();
    let jti = claims["jti"].as_str().unwrap();
    assert_eq!(event.get::<_, i64>(0), 5);
    assert_eq!(event.get::<_, Option<i64>>(1), None);
    assert_eq!(event.get::<_, &str>(2), format!("token \"{jti}\", signed with trusted key \"deploy\""));
    assert_eq!((event.get::<_, &str>(3), event.get::<_, &str>(4)), (stage.role.as_str(), "p"));
    let used = "SELECT key || ' ' || jti || ' ' || extract(epoch FROM expires_at)::bigint FROM writeguard.used_jti";
    assert_eq!(text(&mut stage.admin, used), format!("deploy {jti} {}", claims["exp"]));
}

#[test]
fn a_token_opens_a_statement_with_parameters() {
    let mut stage = Stage::new();
    let mut client = stage.client();
    let statement = "UPDATE t SET a = $1 WHERE id <= $2";
    let mut claims = stage.claims("");
    let hash = "SELECT writeguard.statement_hash('UPDATE t SET a = $1 WHERE id <= $2', '{9,5}')";
    claims["wg"]["statement_sha256"] = json!(text(&mut client, hash));
    let token = signed(&claims);
    arm(&mut client, &token);
    assert_eq!(expect_refusal(client.execute(statement, &[&9, &4])).sqlstate, "WG006");
    arm(&mut client, &token);
    assert_eq!(client.execute(statement, &[&9, &5]).unwrap(), 5);
    assert_eq!(stage.changed(), 5);
}

#[test]
fn the_flag_is_needed_too_and_never_is_never() {
    let mut stage = Stage::new();
    let token = stage.token(WRITE);
    let mut client = stage.client();
    pass(&mut client, &format!("SET writeguard.token = '{token}'"));
    assert!(refused(&mut client, WRITE, "WG001").hint.contains("SET writeguard.override = on"));
    stage
        .admin
        .batch_execute("SELECT writeguard.set_policy('n', tables => '{public.t}', max_rows => 4, override => 'never')")
        .unwrap();
    arm(&mut client, &token);
    refused(&mut client, WRITE, "WG001");
    pass(
        &mut stage.admin,
        "SELECT writeguard.drop_policy('n'); SELECT writeguard.set_policy('p', tables => '{public.*}', max_rows => 3)",
    );
    stage.accepts(&token);
}

#[test]
fn a_signature_is_one_approval_by_nobody_of_this_database() {
    let mut stage = Stage::new();
    for asked in ["min_approvals => 2", "approvers => 'pg_monitor'"] {
        pass(
            &mut stage.admin,
            &format!("SELECT writeguard.set_policy('q', tables => '{{public.t}}', max_rows => 4, {asked})"),
        );
        let token = stage.token(WRITE);
        stage.refuses(&token, "its signature is not enough for this policy");
        pass(&mut stage.admin, "SELECT writeguard.drop_policy('q')");
        // It was not spent by that.
        stage.accepts(&token);
    }
}

// ---- Another signer, another algorithm ----

#[test]
fn one_signer_serves_two_clusters_and_neither_takes_the_others_token() {
    let other = Server::start_another_cluster();
    let mut stages = [Stage::new(), Stage::on(&other)];
    // The same names there as here.
    let (role, name) = (stages[0].role.clone(), stages[0].db.name.clone());
    let [_, second] = &mut stages;
    second.admin = other.postgres();
    pass(&mut second.admin, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname LIKE 'test%'");
    if second.db.name != name {
        pass(&mut second.admin, &format!("ALTER DATABASE {} RENAME TO {name}", second.db.name));
        second.db.name = name;
    }
    if second.role != role {
        pass(&mut second.admin, &format!("ALTER ROLE {} RENAME TO {role}", second.role));
        second.role = role;
    }
    second.admin = second.db.admin();
    second.audience = audience(&mut second.admin);
    let [first, second] = stages;
    assert_ne!(first.audience, second.audience);
    assert_eq!(first.audience.split('/').nth(1), second.audience.split('/').nth(1));
    let tokens = [first.token(WRITE), second.token(WRITE)];
    for (mut stage, own, foreign) in [(first, &tokens[0], &tokens[1]), (second, &tokens[1], &tokens[0])] {
        let refusal = stage.refuses(foreign, "it is for another database");
        assert!(refusal.detail.contains(&stage.audience), "{refusal:?}");
        assert!(refusal.hint.contains("pg_control_system"), "{refusal:?}");
        stage.accepts(own);
    }
}

#[test]
fn a_signer_may_name_several_databases() {
    let mut stage = Stage::new();
    let mut claims = stage.claims(WRITE);
    claims["aud"] = json!(["1/elsewhere", stage.audience]);
    stage.accepts(&signed(&claims));
    claims["aud"] = json!(["1/elsewhere", format!("{}x", stage.audience)]);
    stage.refuses(&signed(&claims), "it is for another database");
}

#[test]
fn no_other_algorithm_is_a_signature() {
    let mut stage = Stage::new();
    let claims = stage.claims(WRITE).to_string();
    let eddsa = "its header is not that of a JWT with the algorithm EdDSA";
    for algorithm in ["none", "None", "NONE", "nOnE", ""] {
        let header = format!(r#"{{"alg":"{algorithm}","typ":"JWT","kid":"deploy"}}"#);
        for signature in ["", "AA", &base64url(&[0; 64])] {
            stage.refuses(&format!("{}.{signature}", signed_part(&header, &claims)), eddsa);
        }
        stage.refuses(&sign(&key(7), &header, &claims), eddsa);
    }
    for algorithm in ["HS256", "HS512"] {
        let header = format!(r#"{{"alg":"{algorithm}","typ":"JWT","kid":"deploy"}}"#);
        let part = signed_part(&header, &claims);
        let public = pem(&key(7));
        for secret in [public.as_bytes(), public.trim().as_bytes(), key(7).verifying_key().as_bytes(), b""] {
            stage.refuses(&format!("{part}.{}", base64url(&hmac_sha256(secret, part.as_bytes()))), eddsa);
        }
    }
    // The header says EdDSA, and a MAC is in the signature's place.
    let part = signed_part(HEADER, &claims);
    let mac = hmac_sha256(key(7).verifying_key().as_bytes(), part.as_bytes());
    for signature in [mac.clone(), [mac.clone(), mac].concat(), vec![], vec![0; 64]] {
        stage.refuses(&format!("{part}.{}", base64url(&signature)), "");
    }
    for header in [
        r#"{"typ":"JWT","kid":"deploy"}"#,
        r#"{"alg":null,"kid":"deploy"}"#,
        r#"{"alg":["EdDSA"],"kid":"deploy"}"#,
        r#"{"alg":"EdDSA","alg":"EdDSA","kid":"deploy"}"#,
        r#"{"alg":"none","alg":"EdDSA","kid":"deploy"}"#,
        r#"{"alg":"RS256","kid":"deploy"}"#,
    ] {
        stage.refuses(&sign(&key(7), header, &claims), eddsa);
    }
    stage.accepts(&sign(&key(7), HEADER, &claims));
}

#[test]
fn only_the_trusted_key_counts() {
    let mut stage = Stage::new();
    let claims = stage.claims(WRITE).to_string();
    let stranger = key(8);
    stage.refuses(&sign(&stranger, HEADER, &claims), "its signature is not that of its key");
    // A key that the token brings along is nobody's.
    let x = base64url(stranger.verifying_key().as_bytes());
    let jwk = json!({"kty": "OKP", "crv": "Ed25519", "x": x, "alg": "EdDSA", "use": "sig", "kid": "deploy"});
    let header = json!({"alg": "EdDSA", "kid": "deploy", "jwk": jwk, "jku": "https://example.org/"}).to_string();
    stage.refuses(&sign(&stranger, &header, &claims), "its signature is not that of its key");
    for header in [
        r#"{"alg":"EdDSA","kid":"deploy2"}"#,
        r#"{"alg":"EdDSA","kid":"DEPLOY"}"#,
        r#"{"alg":"EdDSA","kid":"' OR true --"}"#,
        r#"{"alg":"EdDSA","kid":"%"}"#,
        r#"{"alg":"EdDSA","kid":"d\u00e9ploy\u202e"}"#,
    ] {
        stage.refuses(&sign(&key(7), header, &claims), "no trusted key has the name of its kid");
    }
    for header in [
        r#"{"alg":"EdDSA"}"#,
        r#"{"alg":"EdDSA","kid":""}"#,
        r#"{"alg":"EdDSA","kid":" deploy"}"#,
        r#"{"alg":"EdDSA","kid":"deploy\u0000"}"#,
        r#"{"alg":"EdDSA","kid":"deploy\nLOG:  forged"}"#,
    ] {
        stage.refuses(&sign(&key(7), header, &claims), "its header names no key");
    }
    stage.refuses(&sign(&key(7), r#"{"alg":"EdDSA","kid":7}"#, &claims), "its header is not");
    let critical = r#"{"alg":"EdDSA","kid":"deploy","crit":["b64"],"b64":false}"#;
    stage.refuses(&sign(&key(7), critical, &claims), "its header has crit");
    // A token of one of two keys is none of the other's.
    stage.admin.query_one("SELECT writeguard.trust_key('second', $1)", &[&pem(&stranger)]).unwrap();
    stage.refuses(&sign(&stranger, HEADER, &claims), "its signature is not that of its key");
    stage.accepts(&sign(&stranger, &HEADER.replace("deploy", "second"), &claims));
}

#[test]
fn every_part_of_a_token_is_signed() {
    let mut stage = Stage::new();
    let token = stage.token(WRITE);
    let parts: Vec<&str> = token.split('.').collect();
    let flipped = |part: &str, at: usize| {
        let mut letters = part.as_bytes().to_vec();
        letters[at] = if letters[at] == b'A' { b'B' } else { b'A' };
        String::from_utf8(letters).unwrap()
    };
    for at in [0, 1, 40, 84] {
        let signature = flipped(parts[2], at);
        stage.refuses(&[parts[0], parts[1], &signature].join("."), "its signature is not that of its key");
    }
    let more = token.replace(parts[1], &base64url(stage.claims(WRITE).to_string().as_bytes()));
    stage.refuses(&more, "its signature is not that of its key");
    for malformed in [
        format!("{token}."),
        format!(".{token}"),
        format!("{token}.{token}"),
        format!("{}.{}", parts[0], parts[1]),
        format!("{token}="),
        format!("{token} "),
        format!("{token}\n"),
        token.replace('.', ".."),
        token[1..].to_owned(),
        token[..token.len() - 1].to_owned(),
    ] {
        let mut client = stage.client();
        arm(&mut client, &malformed);
        let refusal = refused(&mut client, WRITE, "WG006");
        assert_hidden(&token, &format!("{refusal:?}"));
    }
    assert_eq!(stage.changed(), 0);
    stage.accepts(&token);
}

// ---- Claims ----

#[test]
fn wrong_claims_are_refused_one_by_one() {
    let mut stage = Stage::new();
    let good = stage.claims(WRITE);
    let other_role = stage.db.role("other");
    let at = now();
    let bounds = |changes: Value| {
        let mut bounds = good["wg"].clone();
        for (name, value) in changes.as_object().unwrap() {
            bounds[name] = value.clone();
        }
        bounds
    };
    let cases = [
        ("aud", json!("1/x"), "it is for another database"),
        ("aud", json!(stage.audience.split('/').next()), "it is for another database"),
        ("aud", json!(stage.db.name), "it is for another database"),
        ("aud", json!([]), "it is for another database"),
        ("aud", json!({"1": stage.audience}), ""),
        ("sub", json!(other_role), "it belongs to another role"),
        ("sub", json!("public"), "it belongs to another role"),
        ("sub", json!("postgres"), "it belongs to another role"),
        ("sub", json!(stage.role.to_uppercase()), "it belongs to another role"),
        ("sub", json!([stage.role]), ""),
        ("sub", json!(7), "its sub is not a text"),
        ("exp", json!(at - 1.0), "it is expired"),
        ("exp", json!(at as u64 - 86400), "it is expired"),
        ("exp", json!(0), "it is expired"),
        ("exp", json!(-1e300), "it is expired"),
        ("exp", json!(at + 3700.0), "it lives too long"),
        ("exp", json!(u64::MAX), "it lives too long"),
        ("exp", json!(1e300), "it lives too long"),
        ("exp", json!((at as u64 + 300).to_string()), "its exp is not a number of seconds"),
        ("exp", json!(null), "its exp is not a number of seconds"),
        ("nbf", json!(at + 60.0), "it is not good yet"),
        ("nbf", json!(1e18), "it is not good yet"),
        ("nbf", json!("now"), "its nbf is not a number of seconds"),
        ("nbf", json!(at - 4000.0), "it lives too long"),
        ("iat", json!(at - 4000.0), "it lives too long"),
        ("iat", json!(0), "it lives too long"),
        ("jti", json!(""), "its jti is not one line"),
        ("jti", json!(7), "its jti is not a text"),
        ("jti", json!(null), "its jti is not a text"),
        ("jti", json!("a\nb"), "its jti is not one line"),
        ("jti", json!("a\u{0}b"), "its jti is not one line"),
        ("jti", json!("x".repeat(300)), "its jti is not one line"),
        ("wg", json!({}), "it has no wg.statement_sha256"),
        ("wg", json!([]), ""),
        ("wg", json!("all"), "it is malformed"),
        ("wg", bounds(json!({"statement_sha256": sha256("UPDATE t SET a = 8")})), "it belongs to another statement"),
        ("wg", bounds(json!({"statement_sha256": "*"})), "it belongs to another statement"),
        ("wg", bounds(json!({"statement_sha256": null})), "its wg.statement_sha256 is not a text"),
        ("wg", bounds(json!({"max_rows": 4})), "more rows than it was signed for"),
        ("wg", bounds(json!({"max_rows": 0})), "more rows than it was signed for"),
        ("wg", bounds(json!({"max_rows": -1})), "its wg.max_rows is not a whole number"),
        ("wg", bounds(json!({"max_rows": 5.5})), "its wg.max_rows is not a whole number"),
        ("wg", bounds(json!({"max_rows": "5"})), "its wg.max_rows is not a whole number"),
        ("wg", bounds(json!({"max_rows": null})), "its wg.max_rows is not a whole number"),
        ("wg", bounds(json!({"tables": ["public.u"]})), "a table that it was not signed for"),
        ("wg", bounds(json!({"tables": []})), "a table that it was not signed for"),
        ("wg", bounds(json!({"tables": null})), "its wg.tables is not an array"),
        ("wg", bounds(json!({"tables": "public.t"})), "its wg.tables is not an array"),
        ("wg", bounds(json!({"tables": ["t"]})), "its wg.tables is not an array"),
        ("wg", bounds(json!({"tables": ["*.*"]})), "its wg.tables is not an array"),
        ("wg", bounds(json!({"tables": ["public.\"T\""]})), "a table that it was not signed for"),
    ];
    for (name, value, reason) in cases {
        let mut claims = good.clone();
        claims[name] = value;
        stage.refuses(&signed(&claims), reason);
    }
    for name in ["aud", "sub", "exp", "jti", "wg"] {
        let mut claims = good.clone();
        claims.as_object_mut().unwrap().remove(name);
        stage.refuses(&signed(&claims), &format!("it has no {name}"));
    }
    // None of the refused ones has used it up.
    assert_eq!(number(&mut stage.admin, "SELECT count(*) FROM writeguard.used_jti"), 0);
    stage.accepts(&signed(&good));
}

#[test]
fn a_claim_twice_is_no_claim() {
    let mut stage = Stage::new();
    let good = stage.claims(WRITE).to_string();
    let role = stage.role.clone();
    for twice in [
        good.replacen('{', r#"{"sub":"postgres","#, 1),
        good.replacen('{', r#"{"exp":99999999999,"#, 1),
        good.replacen('}', &format!(r#","max_rows":5000}},"sub":"{role}""#), 1),
        good.replacen(r#""max_rows":5"#, r#""max_rows":5,"max_rows":5000"#, 1),
        good.replacen('{', r#"{"wg":{},"#, 1),
    ] {
        assert_ne!(twice, good);
        stage.refuses(&sign(&key(7), HEADER, &twice), "it is malformed");
    }
    for odd in ["", "{}x", "[]", "null", "7", "{", "\u{feff}{}", r#"{"exp":1e999}"#, &"[".repeat(3000)] {
        stage.refuses(&sign(&key(7), HEADER, odd), "");
    }
    stage.accepts(&sign(&key(7), HEADER, &good));
}

#[test]
fn times_may_be_fractions_and_unknown_claims_anything() {
    let mut stage = Stage::new();
    let mut claims = stage.claims(WRITE);
    claims["exp"] = json!(now() + 30.25);
    claims["nbf"] = json!(now() - 1.5);
    claims["iat"] = json!(now() - 1.5);
    claims["iss"] = json!("https://ci.example.org/é");
    claims["groups"] = json!([{"deep": [[[]]]}, null]);
    claims["wg"]["comment"] = json!("a claim of a later version");
    claims["wg"]["tables"] = json!(["Public.T"]);
    stage.accepts(&signed(&claims));
}

#[test]
fn the_longest_lifetime_is_a_setting() {
    let server = Server::start(&["writeguard.jwt_max_lifetime = '2min'"]);
    let mut stage = Stage::on(&server);
    let mut claims = stage.claims(WRITE);
    let refusal = stage.refuses(&signed(&claims), "it lives too long");
    assert!(refusal.detail.contains("2 min is the longest"), "{refusal:?}");
    claims["exp"] = json!(now() + 100.0);
    stage.accepts(&signed(&claims));
    let mut client = stage.client();
    refused(&mut client, "SET writeguard.jwt_max_lifetime = '1d'", "55P02");
}

#[test]
fn a_huge_token_is_refused_as_such() {
    let mut stage = Stage::new();
    for size in [8_000, 100_000, 2_000_000] {
        let mut claims = stage.claims(WRITE);
        claims["padding"] = json!("x".repeat(size));
        stage.refuses(&signed(&claims), "it is longer than 8192 bytes");
    }
}

#[test]
fn names_of_any_letters_are_understood() {
    let mut stage = Stage::new();
    let role = format!("{}_Größe \"x\"", stage.role);
    let quoted = role.replace('"', "\"\"");
    pass(
        &mut stage.admin,
        &format!(
            "CREATE ROLE \"{quoted}\" LOGIN; CREATE SCHEMA \"Lager.Süd\"; GRANT USAGE ON SCHEMA \"Lager.Süd\" TO PUBLIC;
             CREATE TABLE \"Lager.Süd\".\"Bücher \"\"neu\"\"\" (id int, a int);
             INSERT INTO \"Lager.Süd\".\"Bücher \"\"neu\"\"\" SELECT generate_series(1, 5), 0;
             GRANT ALL ON \"Lager.Süd\".\"Bücher \"\"neu\"\"\" TO PUBLIC;
             SELECT writeguard.trust_key('Büro 1', '{}');
             SELECT writeguard.set_policy('q', tables => '{{*.*}}', max_rows => 3)",
            pem(&key(9))
        ),
    );
    let statement = "UPDATE \"Lager.Süd\".\"Bücher \"\"neu\"\"\" SET a = 9 WHERE 'é' = 'é'";
    let mut claims = stage.claims(statement);
    claims["sub"] = json!(role);
    claims["jti"] = json!("Auftrag №7 \u{1f418}");
    claims["wg"]["tables"] = json!(["\"Lager.Süd\".\"Bücher \"\"neu\"\"\""]);
    let mut client = stage.db.connect(&role);
    arm(&mut client, &sign(&key(9), &HEADER.replace("deploy", "B\\u00fcro 1"), &claims.to_string()));
    pass(&mut client, statement);
    let reason = text(&mut stage.admin, "SELECT reason FROM writeguard.event WHERE kind = 'overridden'");
    assert_eq!(reason, "token \"Auftrag №7 \u{1f418}\", signed with trusted key \"Büro 1\"");
    pass(&mut stage.admin, "SELECT writeguard.distrust_key('Büro 1')");
}

#[test]
fn a_database_of_few_letters_refuses_the_others() {
    let server = Server::shared();
    let mut db = server.plain_database();
    let (plain, name) = (db.name.clone(), format!("{}_latin", db.name));
    let mut postgres = server.postgres();
    pass(&mut postgres, &format!("CREATE DATABASE {name} ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0"));
    pass(&mut postgres, &format!("DROP DATABASE {plain}"));
    db.name = name;
    let mut admin = db.admin();
    pass(
        &mut admin,
        &format!(
            "CREATE EXTENSION pg_writeguard; CREATE TABLE t (id int, a int DEFAULT 0);
             INSERT INTO t SELECT generate_series(1, 5); SELECT writeguard.trust_key('deploy', '{}');
             SELECT writeguard.set_policy('p', tables => '{{public.t}}', max_rows => 3)",
            pem(&key(7))
        ),
    );
    let other = expect_refusal(admin.query("SELECT writeguard.trust_key('Büro', $1)", &[&pem(&key(8))]));
    assert_eq!((other.sqlstate.as_str(), other.message.as_str()), ("WG007", "name is no name for a key"), "{other:?}");
    // Somebody's own way of adding a key is in nobody else's way.
    pass(
        &mut admin,
        "INSERT INTO writeguard.trusted_key (name, public_key, trusted_by) VALUES ('Büro', 'x', 'Jürgen')",
    );
    let mut claims = json!({
        "aud": audience(&mut admin), "sub": "postgres", "exp": now() + 60.0, "jti": "é\u{1f418}",
        "wg": {"statement_sha256": sha256(WRITE), "max_rows": 5, "tables": ["public.t", "public.\"\u{1f418}\""]},
    });
    arm(&mut admin, &signed(&claims));
    let refusal = refused(&mut admin, WRITE, "WG006");
    assert!(refusal.message.contains("its jti has letters"), "{refusal:?}");
    assert!(refusal.hint.contains("request('...',"), "{refusal:?}");
    arm(&mut admin, &sign(&key(7), r#"{"alg":"EdDSA","kid":"\u00fc"}"#, &claims.to_string()));
    assert!(refused(&mut admin, WRITE, "WG006").message.contains("no trusted key"));
    claims["jti"] = json!("plain");
    claims["wg"]["tables"] = json!(["public.t"]);
    arm(&mut admin, &signed(&claims));
    pass(&mut admin, WRITE);
}

#[test]
fn a_client_of_few_letters_reads_why() {
    let stage = Stage::new();
    let mut claims = stage.claims(WRITE);
    claims["exp"] = json!(0);
    let script = format!(
        "SET client_encoding = 'LATIN1';\nSET writeguard.override = on;\nSET writeguard.token = '{}';\n{WRITE};",
        signed(&claims)
    );
    let printed = Server::shared().psql(&stage.db.name, &stage.role, &script);
    assert!(printed.contains("ERROR:  approval token refused: it is expired"), "{printed}");
    assert!(printed.contains("request('...', reason"), "{printed}");
}

// ---- Who acts ----

#[test]
fn a_token_belongs_to_the_acting_role() {
    let mut stage = Stage::new();
    let (login, role) = (stage.role.clone(), stage.db.role("deployer"));
    pass(&mut stage.admin, &format!("GRANT {role} TO {login}"));
    let mut claims = stage.claims(WRITE);
    claims["sub"] = json!(role);
    let token = signed(&claims);
    let refusal = stage.refuses(&token, "it belongs to another role");
    assert_eq!(refusal.hint, format!("SET ROLE {role};"));
    // The login's own token is none of the role's.
    let mut client = stage.client();
    pass(&mut client, &format!("SET ROLE {role}"));
    let own = stage.token(WRITE);
    stage.refuses_from(&mut client, &own, "it belongs to another role");
    // A SECURITY DEFINER function does not change the acting role.
    pass(
        &mut stage.admin,
        &format!(
            "CREATE FUNCTION as_owner() RETURNS void LANGUAGE plpgsql SECURITY DEFINER AS $$BEGIN {WRITE}; END$$;
             ALTER FUNCTION as_owner OWNER TO {role}"
        ),
    );
    let mut other = stage.client();
    let mut claims = stage.claims("SELECT as_owner()");
    claims["sub"] = json!(role);
    arm(&mut other, &signed(&claims));
    assert!(refused(&mut other, "SELECT as_owner()", "WG006").message.contains("another role"));
    arm(&mut client, &token);
    pass(&mut client, WRITE);
    assert_eq!(stage.changed(), 5);
    // A superuser who becomes the role for the session acts as it.
    stage.undo();
    claims = stage.claims(WRITE);
    claims["jti"] = json!(fresh_jti());
    let mut admin = stage.db.admin();
    pass(&mut admin, &format!("SET SESSION AUTHORIZATION {login}"));
    arm(&mut admin, &signed(&claims));
    pass(&mut admin, WRITE);
}

#[test]
fn a_callers_own_objects_have_no_say() {
    let mut stage = Stage::new();
    pass(&mut stage.admin, &format!("GRANT CREATE ON SCHEMA public TO {}", stage.role));
    let mut client = stage.client();
    pass(
        &mut client,
        &format!(
            "CREATE TEMP TABLE trusted_key (name text, public_key text);
             INSERT INTO trusted_key VALUES ('mine', '{}');
             CREATE TEMP TABLE used_jti (key text, jti text, expires_at timestamptz);
             CREATE FUNCTION public.to_timestamp(float8) RETURNS timestamptz LANGUAGE sql AS 'SELECT now()';
             CREATE FUNCTION public.texteq2(text, text) RETURNS boolean LANGUAGE sql AS 'SELECT true';
             CREATE OPERATOR public.= (FUNCTION = public.texteq2, LEFTARG = text, RIGHTARG = text);
             SET search_path = pg_temp, public, pg_catalog",
            pem(&key(8))
        ),
    );
    let claims = stage.claims(WRITE).to_string();
    stage.refuses_from(&mut client, &sign(&key(8), &HEADER.replace("deploy", "mine"), &claims), "no trusted key");
    let mut claims: Value = serde_json::from_str(&claims).unwrap();
    claims["wg"]["tables"] = json!(["public.t"]);
    arm(&mut client, &signed(&claims));
    pass(&mut client, WRITE);
    arm(&mut client, &signed(&claims));
    assert!(refused(&mut client, WRITE, "WG006").message.contains("it is used"));
    for sql in [
        "INSERT INTO writeguard.trusted_key (name, public_key, trusted_by) VALUES ('x', 'y', 'z')",
        "DELETE FROM writeguard.used_jti",
        "TABLE writeguard.used_jti",
        "TABLE writeguard.trusted_key",
        "SELECT writeguard.trust_key('x', 'y')",
        "SELECT writeguard.distrust_key('deploy')",
    ] {
        refused(&mut client, sql, "42501");
    }
    pass(&mut stage.admin, &format!("GRANT pg_write_all_data TO {}", stage.role));
    for sql in [
        "INSERT INTO writeguard.trusted_key (name, public_key, trusted_by) VALUES ('x', 'y', 'z')",
        "UPDATE writeguard.trusted_key SET public_key = 'x'",
        "DELETE FROM writeguard.used_jti",
    ] {
        refused(&mut client, sql, "42501");
    }
}

// ---- Once ----

#[test]
fn a_token_is_used_once() {
    let mut stage = Stage::new();
    let claims = stage.claims(WRITE);
    let token = signed(&claims);
    stage.accepts(&token);
    let refusal = stage.refuses(&token, "it is used");
    assert!(refusal.detail.contains(claims["jti"].as_str().unwrap()), "{refusal:?}");
    // Nor does another token with the same name pass.
    let mut again = stage.claims(WRITE);
    again["jti"] = claims["jti"].clone();
    stage.refuses(&signed(&again), "it is used");
    // Another key has names of its own.
    stage.admin.query_one("SELECT writeguard.trust_key('second', $1)", &[&pem(&key(8))]).unwrap();
    stage.accepts(&sign(&key(8), &HEADER.replace("deploy", "second"), &again.to_string()));
}

#[test]
fn a_token_opens_no_second_write_of_the_same_transaction() {
    let mut stage = Stage::new();
    let token = stage.token(WRITE);
    let mut client = stage.client();
    pass(&mut client, "BEGIN");
    arm(&mut client, &token);
    pass(&mut client, WRITE);
    assert!(refused(&mut client, WRITE, "WG006").message.contains("it is used"));
    pass(&mut client, "ROLLBACK");
    stage.accepts(&token);
}

#[test]
fn a_rollback_makes_it_unused() {
    let mut stage = Stage::new();
    let token = stage.token(WRITE);
    let mut client = stage.client();
    pass(&mut client, "BEGIN");
    arm(&mut client, &token);
    pass(&mut client, WRITE);
    pass(&mut client, "ROLLBACK");
    // Of a savepoint too.
    pass(&mut client, "BEGIN");
    arm(&mut client, &token);
    pass(&mut client, &format!("SAVEPOINT s; {WRITE}"));
    pass(&mut client, "ROLLBACK TO s");
    pass(&mut client, WRITE);
    pass(&mut client, "ROLLBACK");
    assert_eq!(number(&mut stage.admin, "SELECT count(*) FROM writeguard.used_jti"), 0);
    // A write that fails after it was accepted has not used it.
    pass(&mut stage.admin, "ALTER TABLE t ADD CHECK (a <> 9 OR id < 5)");
    arm(&mut client, &token);
    refused(&mut client, WRITE, "23514");
    pass(&mut stage.admin, "ALTER TABLE t DROP CONSTRAINT t_check");
    stage.accepts(&token);
    stage.refuses(&token, "it is used");
}

#[test]
fn two_sessions_cannot_both_use_it() {
    for isolation in ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"] {
        for end in ["COMMIT", "ROLLBACK"] {
            let mut stage = Stage::new();
            let statement = "UPDATE t SET a = CASE pg_backend_pid() WHEN 0 THEN 0 ELSE 9 END";
            let token = stage.token(statement);
            let mut first = stage.client();
            pass(&mut first, "BEGIN");
            arm(&mut first, &token);
            pass(&mut first, statement);
            let mut second = stage.client();
            let waiting = pid(&mut second);
            // The copy is what the second session writes to under the same name.
            pass(
                &mut stage.admin,
                &format!(
                    "CREATE SCHEMA copy; CREATE TABLE copy.t AS TABLE t; GRANT USAGE ON SCHEMA copy TO PUBLIC;
                     GRANT ALL ON copy.t TO PUBLIC; ALTER ROLE {} SET search_path = copy;
                     SELECT writeguard.set_policy('c', tables => '{{copy.t}}', max_rows => 3)",
                    stage.role
                ),
            );
            let (token, statement) = (token.clone(), statement.to_owned());
            let begin = format!("SET search_path = copy; BEGIN ISOLATION LEVEL {isolation}");
            let handle = thread::spawn(move || {
                pass(&mut second, &begin);
                arm(&mut second, &token);
                let result = second.batch_execute(&statement);
                let _ = second.batch_execute("COMMIT");
                result
            });
            wait_for_lock_of(&mut stage.admin, waiting);
            pass(&mut first, end);
            let result = handle.join().unwrap();
            let changed = number(&mut stage.admin, "SELECT count(*) FROM copy.t WHERE a = 9");
            if end == "ROLLBACK" {
                assert!(result.is_ok(), "{isolation}: {:?}", result.map_err(|error| Refusal::of(&error)));
                assert_eq!(changed, 5);
            } else {
                let refusal = expect_refusal(result);
                // An older state of everything is a reason of its own to try again.
                let expected = if isolation == "READ COMMITTED" { "WG006" } else { "40001" };
                assert_eq!(refusal.sqlstate, expected, "{isolation}: {refusal:?}");
                assert_eq!(changed, 0);
            }
        }
    }
}

#[test]
fn a_prepared_transaction_keeps_it() {
    let mut stage = Stage::new();
    for end in ["ROLLBACK PREPARED", "COMMIT PREPARED"] {
        let token = stage.token(WRITE);
        let name = fresh_jti();
        let mut client = stage.client();
        pass(&mut client, "BEGIN");
        arm(&mut client, &token);
        pass(&mut client, WRITE);
        pass(&mut client, &format!("PREPARE TRANSACTION '{name}'"));
        // Whoever tries meanwhile waits for it.
        pass(
            &mut stage.admin,
            "CREATE SCHEMA IF NOT EXISTS copy; DROP TABLE IF EXISTS copy.t; CREATE TABLE copy.t (id, a) AS
                 SELECT i, 0 FROM generate_series(1, 5) AS i; GRANT USAGE ON SCHEMA copy TO PUBLIC;
                 GRANT ALL ON copy.t TO PUBLIC;
                 SELECT writeguard.set_policy('c', tables => '{copy.t}', max_rows => 3)",
        );
        let mut second = stage.client();
        pass(&mut second, "SET search_path = copy; SET lock_timeout = '200ms'");
        arm(&mut second, &token);
        refused(&mut second, WRITE, "55P03");
        pass(&mut client, &format!("{end} '{name}'"));
        arm(&mut second, &token);
        if end == "COMMIT PREPARED" {
            assert!(refused(&mut second, WRITE, "WG006").message.contains("it is used"));
            assert_eq!(stage.changed(), 5);
        } else {
            pass(&mut second, WRITE);
            assert_eq!(stage.changed(), 0);
        }
    }
}

#[test]
fn it_stays_used_when_the_server_crashes() {
    let server = Server::start(&[]);
    let mut stage = Stage::on(&server);
    let (used, unused) = (stage.token(WRITE), stage.token(WRITE));
    stage.accepts(&used);
    let mut client = stage.client();
    pass(&mut client, "BEGIN");
    arm(&mut client, &unused);
    pass(&mut client, WRITE);
    pass(&mut stage.admin, "CHECKPOINT");
    server.stop("immediate");
    server.start_again();
    stage.admin = stage.db.admin();
    stage.refuses(&used, "it is used");
    stage.accepts(&unused);
}

// ---- Bounds ----

#[test]
fn the_rows_of_all_tables_count_together() {
    let mut stage = Stage::new();
    pass(
        &mut stage.admin,
        "CREATE TABLE u (id int, a int DEFAULT 0); INSERT INTO u SELECT generate_series(1, 5); GRANT ALL ON u TO PUBLIC;
         SELECT writeguard.set_policy('p', tables => '{public.t}', max_rows => 3);
         SELECT writeguard.set_policy('loose', tables => '{public.u}', max_rows => 100)",
    );
    // The rows of u are charged before the token is used, and those of t go past its limit.
    let statement = "WITH x AS (UPDATE u SET a = 9 RETURNING id) UPDATE t SET a = 9 FROM (SELECT count(*) FROM x) AS y";
    for (max_rows, passed) in [(10, true), (9, false), (8, false), (5, false)] {
        let mut claims = stage.claims(statement);
        claims["wg"]["max_rows"] = json!(max_rows);
        let mut client = stage.client();
        arm(&mut client, &signed(&claims));
        let result = client.batch_execute(statement);
        assert_eq!(result.is_ok(), passed, "{max_rows}: {:?}", result.map_err(|error| Refusal::of(&error)));
        if let Err(error) = result {
            let refusal = Refusal::of(&error);
            assert_eq!(refusal.sqlstate, "WG006", "{refusal:?}");
            assert!(refusal.detail.contains(&format!("for {max_rows} rows in")), "{refusal:?}");
            assert_eq!(stage.changed(), 0);
        }
        stage.undo();
    }
    let mut claims = stage.claims(statement);
    claims["wg"]["max_rows"] = json!(100);
    claims["wg"]["tables"] = json!(["public.t"]);
    let mut client = stage.client();
    arm(&mut client, &signed(&claims));
    let refusal = refused(&mut client, statement, "WG006");
    assert!(refusal.detail.contains("public.u"), "{refusal:?}");
}

#[test]
fn a_table_stands_for_its_partitions() {
    let mut stage = Stage::new();
    pass(
        &mut stage.admin,
        "CREATE TABLE parent (id int, a int) PARTITION BY RANGE (id);
         CREATE TABLE part_1 PARTITION OF parent FOR VALUES FROM (1) TO (4);
         CREATE TABLE part_2 PARTITION OF parent FOR VALUES FROM (4) TO (100) PARTITION BY RANGE (id);
         CREATE TABLE part_2a PARTITION OF part_2 FOR VALUES FROM (4) TO (100);
         INSERT INTO parent SELECT generate_series(1, 6), 0; GRANT ALL ON parent TO PUBLIC",
    );
    let statement = "UPDATE parent SET a = 9";
    for (tables, passed) in [
        (json!(["public.part_1"]), false),
        (json!(["public.part_1", "public.part_2"]), true),
        (json!(["public.parent"]), true),
        (json!(["public.t"]), false),
        (json!(["public.nothing"]), false),
    ] {
        let mut claims = stage.claims(statement);
        claims["wg"]["max_rows"] = json!(6);
        claims["wg"]["tables"] = tables.clone();
        let mut client = stage.client();
        arm(&mut client, &signed(&claims));
        assert_eq!(client.batch_execute(statement).is_ok(), passed, "{tables}");
    }
}

#[test]
fn what_a_write_sets_off_is_bounded_too() {
    let mut stage = Stage::new();
    pass(
        &mut stage.admin,
        "CREATE TABLE child (t int REFERENCES t ON DELETE CASCADE);
         INSERT INTO child SELECT i FROM generate_series(1, 5) AS i, generate_series(1, 2)",
    );
    let statement = "DELETE FROM t";
    for (max_rows, tables, passed) in [
        (14, json!(["public.t", "public.child"]), false),
        (100, json!(["public.t"]), false),
        (15, json!(["public.t", "public.child"]), true),
    ] {
        let mut claims = stage.claims(statement);
        claims["wg"]["max_rows"] = json!(max_rows);
        claims["wg"]["tables"] = tables;
        let mut client = stage.client();
        arm(&mut client, &signed(&claims));
        match client.batch_execute(statement) {
            Ok(()) => assert!(passed, "{max_rows}"),
            Err(error) => {
                assert!(!passed, "{:?}", Refusal::of(&error));
                assert_eq!(Refusal::of(&error).sqlstate, "WG006");
                assert_eq!(number(&mut stage.admin, "SELECT count(*) FROM child"), 10);
            }
        }
    }
    assert_eq!(number(&mut stage.admin, "SELECT count(*) FROM child"), 0);
}

#[test]
fn truncate_and_ddl_are_bounded_by_the_live_rows() {
    for statement in ["TRUNCATE t", "DROP TABLE t", "ALTER TABLE t ALTER a TYPE bigint USING a + 1"] {
        let mut stage = Stage::new();
        pass(&mut stage.admin, &format!("ALTER TABLE t OWNER TO {}; GRANT CREATE ON SCHEMA public TO {0}", stage.role));
        for (max_rows, passed) in [(4, false), (5, true)] {
            let mut claims = stage.claims(statement);
            claims["wg"]["max_rows"] = json!(max_rows);
            let mut client = stage.client();
            arm(&mut client, &signed(&claims));
            match client.batch_execute(statement) {
                Ok(()) => assert!(passed, "{statement} {max_rows}"),
                Err(error) => {
                    assert!(!passed, "{statement}: {:?}", Refusal::of(&error));
                    assert_eq!(Refusal::of(&error).sqlstate, "WG006");
                    assert_eq!(number(&mut stage.admin, "SELECT count(*) FROM t"), 5);
                }
            }
        }
        let event = "SELECT count(*) FROM writeguard.event WHERE kind = 'overridden' AND reason LIKE '%\"deploy\"'";
        assert_eq!(number(&mut stage.admin, event), 1, "{statement}");
    }
}

// ---- Keys ----

#[test]
fn a_distrusted_key_signs_nothing_from_then_on() {
    let mut stage = Stage::new();
    let tokens: Vec<String> = (0..4).map(|_| stage.token(WRITE)).collect();
    stage.accepts(&tokens[0]);
    // Neither an older state of everything else nor an open transaction keeps it.
    let mut old = stage.client();
    pass(&mut old, "BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM t");
    let mut open = stage.client();
    pass(&mut open, "BEGIN");
    arm(&mut open, &tokens[1]);
    pass(&mut stage.admin, "SELECT writeguard.distrust_key('deploy')");
    stage.refuses_from(&mut old, &tokens[2], "no trusted key has the name of its kid");
    assert!(refused(&mut open, WRITE, "WG006").message.contains("no trusted key"));
    stage.refuses(&tokens[3], "no trusted key has the name of its kid");
    // Trusted again, it has not forgotten what was used.
    stage.admin.query_one("SELECT writeguard.trust_key('deploy', $1)", &[&pem(&key(7))]).unwrap();
    stage.refuses(&tokens[0], "it is used");
    stage.accepts(&tokens[3]);
    // A key that is about to be distrusted is one until then.
    let mut other = stage.db.admin();
    pass(&mut other, "BEGIN; SELECT writeguard.distrust_key('deploy')");
    stage.accepts(&tokens[2]);
    pass(&mut other, "COMMIT");
    stage.refuses(&tokens[1], "no trusted key has the name of its kid");
}

#[test]
fn keys_come_and_go_on_record() {
    let mut stage = Stage::new();
    let public = pem(&key(8));
    let sql = "SELECT writeguard.trust_key($1, $2)";
    let print: String = stage.admin.query_one(sql, &[&"second", &public]).unwrap().get(0);
    let stored = "SELECT public_key || trusted_by FROM writeguard.trusted_key WHERE name = 'second'";
    assert_eq!(text(&mut stage.admin, stored), format!("{public}postgres"));
    // The same once more is no change.
    let dos = format!("\r\n{}", public.replace('\n', "\r\n"));
    assert_eq!(stage.admin.query_one(sql, &[&"second", &dos]).unwrap().get::<_, String>(0), print);
    let refusal = expect_refusal(stage.admin.query_one(sql, &[&"second", &pem(&key(9))]));
    assert_eq!(refusal.sqlstate, "WG007", "{refusal:?}");
    assert!(refusal.hint.starts_with("SELECT writeguard.distrust_key('second');"), "{refusal:?}");
    pass(&mut stage.admin, "SELECT writeguard.distrust_key('second')");
    refused(&mut stage.admin, "SELECT writeguard.distrust_key('second')", "WG007");
    let events = "SELECT string_agg(reason, '; ' ORDER BY id) FROM writeguard.event
                  WHERE kind = 'policy_changed' AND reason LIKE 'key \"second\"%'";
    let expected = format!("key \"second\" is trusted, SHA-256 {print}; key \"second\" is not trusted any more");
    assert_eq!(text(&mut stage.admin, events), expected);
    for sql in [
        "SELECT writeguard.trust_key(NULL, 'x')",
        "SELECT writeguard.trust_key('x', NULL)",
        "SELECT writeguard.distrust_key(NULL)",
    ] {
        assert!(refused(&mut stage.admin, sql, "WG007").message.contains("must not be NULL"));
    }
    for name in ["", " ", " x", "a\nb", &"x".repeat(300)] {
        let refusal = expect_refusal(stage.admin.query_one(sql, &[&name, &public]));
        assert_eq!((refusal.sqlstate.as_str(), refusal.message.as_str()), ("WG007", "name is no name for a key"));
    }
}

#[test]
fn only_ed25519_public_keys_are_keys_and_a_secret_is_not_repeated() {
    let server = Server::start(&[]);
    let mut stage = Stage::on(&server);
    let directory = Directory::new();
    let script = "openssl genpkey -algorithm ed25519 -out ed.pem
                  openssl genpkey -algorithm ed25519 -aes256 -pass pass:x -out encrypted.pem
                  openssl genpkey -algorithm x25519 -out x.pem
                  openssl genpkey -algorithm ed448 -out ed448.pem
                  openssl genpkey -algorithm RSA -pkeyopt rsa_keygen_bits:1024 -out rsa.pem
                  openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out ec.pem
                  for key in x ed448 rsa ec ed; do openssl pkey -in $key.pem -pubout -out $key.pub; done
                  openssl req -x509 -key ec.pem -subj /CN=x -out certificate.pub 2>/dev/null";
    let (passed, printed) = shell(&directory.0, &server, &stage.db.name, script);
    assert!(passed, "{printed}");
    let read = |name: &str| fs::read_to_string(directory.0.join(name)).unwrap();
    for name in ["ed.pem", "encrypted.pem", "x.pem", "rsa.pem", "ec.pem"] {
        let secret = read(name);
        let body = secret.lines().nth(1).unwrap().to_owned();
        for sql in [
            format!("SELECT writeguard.trust_key('x', '{secret}')"),
            format!("SELECT writeguard.trust_key('x', '{}')", secret.replace('\n', "")),
            format!("SELECT writeguard.trust_key('{secret}', 'x')"),
            format!("SELECT writeguard.trust_key('x', '{}{secret}')", read("ed.pub")),
            format!("SELECT writeguard.distrust_key('{secret}')"),
            format!("DO $$BEGIN PERFORM writeguard.trust_key('x', '{secret}'); END$$"),
        ] {
            let refusal = refused(&mut stage.admin, &sql, if sql.starts_with("DO") { "WG006" } else { "WG007" });
            let shown = format!("{} {} {}", refusal.message, refusal.detail, refusal.hint);
            assert!(!shown.contains(&body), "{shown}");
            assert!(!refusal.hint.is_empty());
        }
        assert!(!server.log().contains(&body), "{name} is in the log");
        let sql = "SELECT writeguard.trust_key('x', $1)";
        let refusal = expect_refusal(stage.admin.query_one(sql, &[&secret]));
        assert_eq!(refusal.message, "public_key_pem is a private key");
        assert!(refusal.hint.starts_with("openssl pkey"), "{refusal:?}");
        assert!(!server.log().contains(&body), "{name} is in the log");
    }
    for (name, message) in [
        ("x.pub", "public_key_pem is not an Ed25519 key"),
        ("ed448.pub", "public_key_pem is not an Ed25519 key"),
        ("rsa.pub", "public_key_pem is not an Ed25519 key"),
        ("ec.pub", "public_key_pem is not an Ed25519 key"),
        ("certificate.pub", "public_key_pem is not a public key in PEM"),
    ] {
        let refusal = expect_refusal(stage.admin.query_one("SELECT writeguard.trust_key('x', $1)", &[&read(name)]));
        assert_eq!((refusal.sqlstate.as_str(), refusal.message.as_str()), ("WG007", message), "{name}");
    }
    let print = stage.admin.query_one("SELECT writeguard.trust_key('x', $1)", &[&read("ed.pub")]).unwrap();
    let (_, printed) =
        shell(&directory.0, &server, &stage.db.name, "openssl pkey -pubin -in ed.pub -outform DER | sha256sum");
    assert!(printed.starts_with(print.get::<_, &str>(0)), "{printed}");
    assert_eq!(number(&mut stage.admin, "SELECT count(*) FROM writeguard.trusted_key"), 2);
}

#[test]
fn a_grantee_may_trust_keys_and_check_setup_says_so() {
    let mut stage = Stage::new();
    let role = stage.role.clone();
    pass(&mut stage.admin, &format!("GRANT EXECUTE ON FUNCTION writeguard.trust_key TO {role}"));
    stage.client().query_one("SELECT writeguard.trust_key('own', $1)", &[&pem(&key(9))]).unwrap();
    let by = "SELECT trusted_by FROM writeguard.trusted_key WHERE name = 'own'";
    assert_eq!(text(&mut stage.admin, by), role);
    let found = format!("SELECT problem FROM writeguard.check_setup() WHERE subject = 'role {role}'");
    assert!(text(&mut stage.admin, &found).contains("trust_key"));
}

#[test]
fn dump_and_restore_keep_keys_and_used_tokens() {
    let server = Server::shared();
    let mut stage = Stage::new();
    let (used, unused) = (stage.token(WRITE), stage.token(WRITE));
    stage.accepts(&used);
    let name = stage.db.name.clone();
    let directory = Directory::new();
    let script = format!(
        "pg_dump -f dump.sql
         psql -Xqd postgres -v ON_ERROR_STOP=1 -c 'DROP DATABASE {name} WITH (FORCE)' -c 'CREATE DATABASE {name}'
         psql -Xq -v ON_ERROR_STOP=1 -f dump.sql > /dev/null"
    );
    let (passed, printed) = shell(&directory.0, server, &name, &script);
    assert!(passed, "{printed}");
    stage.admin = stage.db.admin();
    stage.refuses(&used, "it is used");
    stage.accepts(&unused);
}

#[test]
fn where_the_table_is_gone_nothing_is_decided() {
    let mut stage = Stage::new();
    let token = stage.token(WRITE);
    for (damage, repair) in [
        ("UPDATE writeguard.trusted_key SET public_key = 'x'", ""),
        (
            "ALTER TABLE writeguard.trusted_key RENAME public_key TO x",
            "ALTER TABLE writeguard.trusted_key RENAME x TO public_key",
        ),
        ("ALTER TABLE writeguard.trusted_key RENAME TO x", ""),
    ] {
        pass(&mut stage.admin, damage);
        let mut client = stage.client();
        arm(&mut client, &token);
        let refusal = refused(&mut client, WRITE, "WG008");
        assert!(refusal.hint.contains("trusted_key"), "{refusal:?}");
        assert_eq!(stage.changed(), 0);
        pass(&mut stage.admin, repair);
    }
}

// ---- Nothing is shown ----

#[test]
fn a_token_is_shown_nowhere() {
    let server = Server::start(&[]);
    let mut stage = Stage::on(&server);
    let good = stage.token(WRITE);
    let mut claims = stage.claims(WRITE);
    claims["sub"] = json!("other");
    let bad = signed(&claims);
    let mut client = stage.client();
    let mut shown = String::new();
    for token in [&bad, &format!("{good}x"), &good, &good] {
        arm(&mut client, token);
        for sql in ["SHOW writeguard.token", "SELECT current_setting('writeguard.token')"] {
            assert_eq!(text(&mut client, sql), "********");
        }
        if let Err(error) = client.batch_execute(WRITE) {
            shown += &format!("{:?}", Refusal::of(&error));
        }
        // With the statement that sets it.
        for sql in [
            format!("SET writeguard.override = on; SET writeguard.token = '{token}'; {WRITE}"),
            format!(
                "DO $$BEGIN SET LOCAL writeguard.override = on; PERFORM set_config('writeguard.token', '{token}', true);
                 {WRITE}; END$$"
            ),
            format!(
                "DO $$BEGIN SET LOCAL writeguard.override = on; PERFORM set_config('writeguard.token', ' {token} ', true);
                 {WRITE}; END$$"
            ),
        ] {
            if let Err(error) = client.batch_execute(&sql) {
                let refusal = Refusal::of(&error);
                shown += &format!("{} {} {}", refusal.message, refusal.detail, refusal.hint);
            }
        }
    }
    shown += &text(&mut stage.admin, "SELECT string_agg(e::text, '') FROM writeguard.event AS e");
    shown += &text(&mut stage.admin, "SELECT string_agg(u::text, '') FROM writeguard.used_jti AS u");
    shown += &server.log();
    for token in [&good, &bad] {
        for part in token.split('.').skip(1) {
            for start in (0..part.len() - 20).step_by(20) {
                assert!(!shown.contains(&part[start..start + 20]), "{}", &part[start..start + 20]);
            }
        }
    }
    assert!(shown.contains("********"), "the DO block is in an event");
}

#[test]
fn what_is_no_token_hides_nothing() {
    let mut stage = Stage::new();
    let hidden = "SELECT count(*) FROM writeguard.event WHERE statement LIKE '%****%'";
    let almost = format!("ey{}' ..", "x".repeat(120));
    for value in ["t SET a = 9", "ey.t.a", "a.b.c", &almost] {
        let mut client = stage.client();
        client.query_one("SELECT set_config('writeguard.token', $1, false)", &[&value]).unwrap();
        refused(&mut client, &format!("{WRITE} /* {value} */"), "WG001");
    }
    assert_eq!(number(&mut stage.admin, hidden), 0);
}

//! What a token from outside claims, and whether that is this write.
//!
//! Pure. Everything is judged here and nothing by default: a claim that is missing, of another type or there twice is a
//! refusal, one that nobody knows is not looked at. No text of the token gets into a reason unless it is short and
//! harmless.

use serde::Deserialize;
use serde_json::Value;

use super::name::qualified_name;
use crate::words::{RelationName, duration, quote_identifier};

/// One claim as it stands in the token, `null` included; none where it is absent.
#[derive(Debug, Default)]
struct Claim(Option<Value>);

impl<'de> Deserialize<'de> for Claim {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Value::deserialize(deserializer).map(|value| Self(Some(value)))
    }
}

/// The claims that are looked at.
#[derive(Debug, Deserialize)]
pub struct Claims {
    #[serde(default)]
    aud: Claim,
    #[serde(default)]
    sub: Claim,
    #[serde(default)]
    exp: Claim,
    #[serde(default)]
    nbf: Claim,
    #[serde(default)]
    iat: Claim,
    #[serde(default)]
    jti: Claim,
    wg: Option<Bounds>,
}

impl Claims {
    /// The token's own name, as far as it has one.
    pub fn jti(&self) -> Option<&str> {
        self.jti.0.as_ref().and_then(Value::as_str)
    }
}

/// What the claim `wg` holds.
#[derive(Debug, Deserialize)]
struct Bounds {
    #[serde(default)]
    statement_sha256: Claim,
    #[serde(default)]
    max_rows: Claim,
    #[serde(default)]
    tables: Claim,
}

/// What the token has to be for.
pub struct Expected<'a> {
    /// `<system identifier>/<database name>`.
    pub audience: &'a str,
    /// The acting role.
    pub role: &'a str,
    /// What `statement_hash` gives for the client's statement.
    pub statement_sha256: &'a str,
    /// Seconds since 1970.
    pub now: f64,
    /// The longest lifetime in seconds.
    pub longest: u32,
}

/// What an acceptable token says.
#[derive(Debug, PartialEq)]
pub struct Accepted {
    pub jti: String,
    /// Seconds since 1970; not later than now and the longest lifetime.
    pub expires: f64,
    pub max_rows: u64,
    /// None: any.
    pub tables: Option<Vec<RelationName>>,
}

/// Why a token is refused: a clause about "it", a sentence, and the next command to type.
#[derive(Debug, PartialEq)]
pub struct Refusal {
    pub reason: String,
    pub detail: Option<String>,
    pub hint: String,
}

/// The hint where nothing but another token helps.
pub const SIGN_AGAIN: &str =
    "Have another token signed, or: SELECT writeguard.request('…', reason => 'why this is right');";

impl Refusal {
    /// A refusal after which only another token helps.
    pub fn new(reason: impl Into<String>, detail: impl Into<Option<String>>) -> Self {
        Self { reason: reason.into(), detail: detail.into(), hint: SIGN_AGAIN.to_owned() }
    }

    fn hint(self, hint: impl Into<String>) -> Self {
        Self { hint: hint.into(), ..self }
    }
}

/// Longest name of a key and longest `jti`, in bytes: both are in an index and in events.
pub const LONGEST_NAME: usize = 255;

/// Whether a text can be the name of a key or a `jti`: it prints on one line and has no blanks around it.
pub fn is_name(text: &str) -> bool {
    !text.is_empty() && text.len() <= LONGEST_NAME && text.trim() == text && !text.chars().any(char::is_control)
}

/// A text of the token as a message may show it.
pub fn shown(text: &str) -> String {
    if is_name(text) && text.len() <= 100 { format!("\"{text}\"") } else { "something else".to_owned() }
}

fn missing(claim: &str) -> Refusal {
    Refusal::new(format!("it has no {claim}"), None)
}

fn other_type(claim: &str, what: &str) -> Refusal {
    Refusal::new(format!("its {claim} is not {what}"), None)
}

impl Claim {
    fn required(&self, name: &str) -> Result<&Value, Refusal> {
        self.0.as_ref().ok_or_else(|| missing(name))
    }

    fn text(&self, name: &str) -> Result<&str, Refusal> {
        self.required(name)?.as_str().ok_or_else(|| other_type(name, "a text"))
    }

    /// A time in seconds since 1970, as RFC 7519 has it: any number.
    fn time(&self, name: &str) -> Result<Option<f64>, Refusal> {
        let number = |value: &Value| value.as_f64().filter(|time| time.is_finite());
        self.0.as_ref().map(|value| number(value).ok_or_else(|| other_type(name, "a number of seconds"))).transpose()
    }

    /// One text, or an array of them.
    fn texts(&self, name: &str) -> Result<Vec<&str>, Refusal> {
        let wrong = || other_type(name, "a text or an array of texts");
        match self.required(name)? {
            Value::String(text) => Ok(vec![text]),
            Value::Array(values) => values.iter().map(|value| value.as_str().ok_or_else(wrong)).collect(),
            _ => Err(wrong()),
        }
    }

    fn tables(&self) -> Result<Option<Vec<RelationName>>, Refusal> {
        let wrong = || other_type("wg.tables", "an array of qualified table names");
        let read = |value: &Value| value.as_str().and_then(qualified_name).ok_or_else(wrong);
        match &self.0 {
            None => Ok(None),
            Some(Value::Array(values)) => values.iter().map(read).collect::<Result<_, _>>().map(Some),
            Some(_) => Err(wrong()),
        }
    }
}

/// Judges the claims of a token whose signature is right, in the order in which a person would look: for this database,
/// for this role, still good, for this statement.
///
/// # Errors
/// The first thing that is wrong.
pub fn judge(claims: &Claims, expected: &Expected<'_>) -> Result<Accepted, Refusal> {
    let jti = claims.jti.text("jti")?;
    if !is_name(jti) {
        return Err(other_type("jti", &format!("one line of at most {LONGEST_NAME} bytes")));
    }
    let audiences = claims.aud.texts("aud")?;
    if !audiences.contains(&expected.audience) {
        let theirs = audiences.first().map_or_else(|| "nothing".to_owned(), |first| shown(first));
        let detail = format!("Its aud is {theirs}, and this database is \"{}\".", expected.audience);
        let hint = "SELECT system_identifier || '/' || current_database() AS aud FROM pg_control_system();";
        return Err(Refusal::new("it is for another database", detail).hint(hint));
    }
    let sub = claims.sub.text("sub")?;
    if sub != expected.role {
        let detail = format!("Its sub is {}, and this session acts as \"{}\".", shown(sub), expected.role);
        let refusal = Refusal::new("it belongs to another role", detail);
        return Err(if is_name(sub) { refusal.hint(format!("SET ROLE {};", quote_identifier(sub))) } else { refusal });
    }
    let expires = lifetime(claims, expected)?;
    let bounds = claims.wg.as_ref().ok_or_else(|| missing("wg"))?;
    if bounds.statement_sha256.text("wg.statement_sha256")? != expected.statement_sha256 {
        let detail = format!("The statement and its parameters have the hash {}.", expected.statement_sha256);
        let hint = "SELECT writeguard.statement_hash('…'); (of the text that is sent, and its parameters)";
        return Err(Refusal::new("it belongs to another statement", detail).hint(hint));
    }
    let max_rows = bounds.max_rows.required("wg.max_rows")?.as_u64();
    let max_rows = max_rows.ok_or_else(|| other_type("wg.max_rows", "a whole number of rows"))?;
    let tables = bounds.tables.tables()?;
    Ok(Accepted { jti: jti.to_owned(), expires, max_rows, tables })
}

/// When the token expires, if it is good now and was never good for too long: from the earliest of `iat`, `nbf` and now.
fn lifetime(claims: &Claims, expected: &Expected<'_>) -> Result<f64, Refusal> {
    let ago = |seconds: f64| duration((seconds.clamp(0.0, 1e12) * 1e6) as u64);
    let now = expected.now;
    let expires = claims.exp.time("exp")?.ok_or_else(|| missing("exp"))?;
    let (not_before, issued) = (claims.nbf.time("nbf")?, claims.iat.time("iat")?);
    if expires <= now {
        return Err(Refusal::new("it is expired", format!("It was good until {} ago.", ago(now - expires))));
    }
    if let Some(start) = not_before.filter(|start| *start > now) {
        let detail = format!("It is good in {}, by this server's clock.", ago(start - now));
        return Err(Refusal::new("it is not good yet", detail));
    }
    let start = [not_before, issued].into_iter().flatten().fold(now, f64::min);
    if expires - start > f64::from(expected.longest) {
        let detail = format!(
            "From the earliest of iat, nbf and now to its exp it lives for {}, and {} is the longest.",
            ago(expires - start),
            ago(expected.longest.into())
        );
        return Err(Refusal::new("it lives too long", detail).hint("SHOW writeguard.jwt_max_lifetime;"));
    }
    Ok(expires)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    const HASH: &str = "e004ebd5b5532a4b85984a62f8ad48a81aa3460c1ca07701f386135d72cdecf5";

    fn expected() -> Expected<'static> {
        Expected { audience: "7/shop", role: "ci", statement_sha256: HASH, now: 1000.5, longest: 3600 }
    }

    fn good() -> Value {
        json!({
            "aud": "7/shop", "sub": "ci", "exp": 1300, "jti": "1",
            "wg": {"statement_sha256": HASH, "max_rows": 5},
        })
    }

    fn judged(claims: &str) -> Result<Accepted, String> {
        let claims: Claims = serde_json::from_str(claims).map_err(|_| "malformed".to_owned())?;
        judge(&claims, &expected()).map_err(|refusal| refusal.reason)
    }

    /// The good claims with one of them replaced; the name of a claim in `wg` starts with `wg.`.
    fn with(name: &str, value: Value) -> Result<Accepted, String> {
        let mut claims = good();
        match name.strip_prefix("wg.") {
            Some(name) => claims["wg"][name] = value,
            None => claims[name] = value,
        }
        judged(&claims.to_string())
    }

    fn reason(name: &str, value: Value) -> String {
        with(name, value).unwrap_err()
    }

    #[test]
    fn good_claims_are_accepted_whatever_else_is_there() {
        let accepted = Accepted { jti: "1".into(), expires: 1300.0, max_rows: 5, tables: None };
        assert_eq!(judged(&good().to_string()), Ok(accepted));
        for (name, value) in [
            ("iss", json!(["x", 1])),
            ("wg.comment", json!({"deep": null})),
            ("aud", json!(["other", "7/shop"])),
            ("nbf", json!(1000)),
            ("iat", json!(2000)),
        ] {
            assert!(with(name, value.clone()).is_ok(), "{name} {value}");
        }
    }

    #[test]
    fn each_required_claim_is_missed() {
        for name in ["aud", "sub", "exp", "jti", "wg"] {
            let mut claims = good();
            claims.as_object_mut().unwrap().remove(name);
            assert_eq!(judged(&claims.to_string()), Err(format!("it has no {name}")));
        }
        for name in ["statement_sha256", "max_rows"] {
            let mut claims = good();
            claims["wg"].as_object_mut().unwrap().remove(name);
            assert_eq!(judged(&claims.to_string()), Err(format!("it has no wg.{name}")));
        }
    }

    #[test]
    fn a_claim_of_another_type_is_no_claim() {
        for name in ["aud", "sub", "exp", "nbf", "iat", "jti", "wg.statement_sha256", "wg.max_rows", "wg.tables"] {
            for value in [json!(null), json!({}), json!([1]), json!(true)] {
                assert!(reason(name, value.clone()).starts_with(&format!("its {name} is not")), "{name} {value}");
            }
        }
        assert_eq!(reason("wg", json!("all")), "malformed");
        assert_eq!(reason("wg", json!(null)), "it has no wg");
        for rows in [json!(-1), json!(5.0), json!("5"), json!(1e300), json!(0.5)] {
            assert_eq!(reason("wg.max_rows", rows), "its wg.max_rows is not a whole number of rows");
        }
        for jti in ["", " ", "a\nb", "a ", "\u{0}", &"x".repeat(256)] {
            assert_eq!(reason("jti", json!(jti)), "its jti is not one line of at most 255 bytes");
        }
    }

    #[test]
    fn a_claim_that_is_there_twice_is_no_claim() {
        let text = good().to_string();
        for twice in [r#"{"sub": "ci", "#, r#"{"exp": 1300, "#, r#"{"wg": {}, "#, r#"{"iat": 1, "iat": 2, "#] {
            assert_eq!(judged(&text.replacen('{', twice, 1)), Err("malformed".into()), "{twice}");
        }
        let twice = text.replace(r#""max_rows":5"#, r#""max_rows":5,"max_rows":500"#);
        assert_ne!(twice, text);
        assert_eq!(judged(&twice), Err("malformed".into()));
    }

    #[test]
    fn others_tokens_are_refused() {
        for audience in [json!("8/shop"), json!("7/shop2"), json!(["8/shop"]), json!([]), json!("7/SHOP")] {
            assert_eq!(reason("aud", audience), "it is for another database");
        }
        for role in ["CI", "ci ", "", "cı"] {
            assert_eq!(reason("sub", json!(role)), "it belongs to another role");
        }
        for hash in [HASH.to_uppercase(), HASH[1..].to_owned(), String::new()] {
            assert_eq!(reason("wg.statement_sha256", json!(hash)), "it belongs to another statement");
        }
    }

    #[test]
    fn times_are_any_numbers_and_have_no_leeway() {
        assert!(with("exp", json!(1000.75)).is_ok());
        for time in [json!(1000.5), json!(1000), json!(0), json!(-1), json!(-1e300)] {
            assert_eq!(reason("exp", time), "it is expired");
        }
        assert!(with("nbf", json!(1000.5)).is_ok());
        for time in [json!(1000.75), json!(1001), json!(u64::MAX), json!(1e300)] {
            assert_eq!(reason("nbf", time), "it is not good yet");
        }
        assert_eq!(judged(&good().to_string().replace("1300", "1e400")), Err("malformed".into()));
    }

    #[test]
    fn no_token_lives_longer_than_the_longest() {
        assert!(with("exp", json!(4600.5)).is_ok());
        for time in [json!(4600.75), json!(u64::MAX), json!(1e300)] {
            assert_eq!(reason("exp", time), "it lives too long");
        }
        // 1300 - 3600
        assert!(with("iat", json!(-2300)).is_ok());
        assert!(with("nbf", json!(-2300)).is_ok());
        assert_eq!(reason("iat", json!(-2301)), "it lives too long");
        assert_eq!(reason("nbf", json!(-1e300)), "it lives too long");
    }

    #[test]
    fn tables_are_sql_identifiers() {
        let tables = |texts: &[&str]| with("wg.tables", json!(texts)).map(|accepted| accepted.tables.unwrap());
        let names = vec![RelationName::new("public", "orders"), RelationName::new("S", "a\"b.c")];
        assert_eq!(tables(&["Public.ORDERS", "\"S\".\"a\"\"b.c\""]), Ok(names));
        assert_eq!(tables(&[]), Ok(vec![]));
        for wrong in
            ["orders", "a.b.c", "*.*", "public.*", "public.", ".orders", "\"\".a", "a.\"b", "a.b ", "a. b", "1a.b"]
        {
            assert_eq!(
                tables(&[wrong]),
                Err("its wg.tables is not an array of qualified table names".to_owned()),
                "{wrong}"
            );
        }
    }

    #[test]
    fn reasons_show_no_more_of_a_token_than_is_harmless() {
        let claims = |sub: &str| {
            let mut claims = good();
            claims["sub"] = json!(sub);
            let claims: Claims = serde_json::from_value(claims).unwrap();
            judge(&claims, &expected()).unwrap_err().detail.unwrap()
        };
        assert_eq!(claims("dba"), "Its sub is \"dba\", and this session acts as \"ci\".");
        for sub in ["two\nlines", &"x".repeat(101)] {
            assert_eq!(claims(sub), "Its sub is something else, and this session acts as \"ci\".");
        }
    }

    proptest! {
        #[test]
        fn no_claims_are_too_odd_to_be_judged(text in ".{0,200}") {
            let _ = judged(&text);
        }
    }
}

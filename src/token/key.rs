//! The keys whose tokens are good: Ed25519, by name.

use core::ptr;

use ed25519_dalek::VerifyingKey;
use ed25519_dalek::pkcs8::spki::der::pem::LineEnding;
use ed25519_dalek::pkcs8::{DecodePublicKey, EncodePublicKey};
use pgrx::pg_sys;
use rules::error::Error;
use rules::token::claims::{LONGEST_NAME, is_name};
use rules::token::statement::sha256;
use rules::words::literal;
use serde_json::json;

use crate::event::record::{Event, Kind};
use crate::event::store;
use crate::pg::function::{Arguments, Returns, sql_function, value};
use crate::pg::{encoding, owner};
use crate::session::actor::{Actor, shown_role};
use crate::session::own_statement;

sql_function!(
    /// `trust_key(name text, public_key_pem text) → text`: gives the SHA-256 of the key.
    writeguard_trust_key, pg_finfo_writeguard_trust_key, trust_key, by own_statement::call
);
sql_function!(
    /// `distrust_key(name text)`.
    writeguard_distrust_key, pg_finfo_writeguard_distrust_key, distrust_key, by own_statement::call
);

/// The command that gives what `trust_key` wants.
const PUBLIC_HALF: &str = "openssl pkey -in private.pem -pubout";

/// A public key as a caller gives it.
#[derive(Debug)]
struct PublicKey {
    pem: String,
    /// Of the key in DER, as `openssl pkey -pubin -outform DER | sha256sum` prints it.
    sha256: String,
}

impl PublicKey {
    /// Reads a public key in PEM.
    ///
    /// # Errors
    /// WG007, which repeats nothing of the text: it may be a private key.
    fn read(text: &str) -> Result<Self, Error> {
        let unfit = |message: &str, detail: Option<&str>, hint: &str| Error::UnfitKey {
            message: message.to_owned(),
            detail: detail.map(str::to_owned),
            hint: hint.to_owned(),
        };
        // In PEM, and what begins PKCS #8 for Ed25519 without its frame.
        if text.contains("PRIVATE KEY") || text.contains("MC4CAQAwBQYDK2Vw") {
            let detail =
                "It has left the signer's hands now and can be in logs: make a new pair, and give its public half.";
            return Err(unfit("public_key_pem is a private key", Some(detail), PUBLIC_HALF));
        }
        if !text.contains("-----BEGIN PUBLIC KEY-----") {
            return Err(unfit("public_key_pem is not a public key in PEM", None, PUBLIC_HALF));
        }
        let key = VerifyingKey::from_public_key_pem(text.trim()).map_err(|_| {
            let generate = "openssl genpkey -algorithm ed25519 -out private.pem";
            unfit("public_key_pem is not an Ed25519 key", Some("Tokens are signed with EdDSA and Ed25519."), generate)
        })?;
        if key.is_weak() {
            return Err(unfit("public_key_pem is a key that anybody can sign for", None, PUBLIC_HALF));
        }
        let failed = |_| unfit("public_key_pem cannot be written again", None, PUBLIC_HALF);
        let der = key.to_public_key_der().map_err(failed)?;
        let pem = key.to_public_key_pem(LineEnding::LF).map_err(failed)?;
        Ok(Self { pem, sha256: sha256(der.as_bytes()) })
    }
}

const INSERT: &str = "INSERT INTO writeguard.trusted_key (name, public_key, trusted_by) \
     SELECT name, public_key, trusted_by \
     FROM pg_catalog.jsonb_populate_record(NULL::writeguard.trusted_key, $1::pg_catalog.jsonb) \
     ON CONFLICT (name) DO NOTHING RETURNING name";

const SAME: &str = "SELECT name FROM writeguard.trusted_key \
     WHERE name OPERATOR(pg_catalog.=) $1 AND public_key OPERATOR(pg_catalog.=) $2";

/// Another key of a name that is taken is refused: two people who mean two keys must not put out each other's. The same
/// key again changes nothing, so that a script can run twice.
fn trust_key(arguments: &Arguments) -> Returns {
    let text = arguments.text(1, "public_key_pem")?;
    let name = arguments.text(0, "name")?;
    if !is_name(&name) || name.contains("-----BEGIN") || !name.is_ascii() && !stores_all_letters() {
        return Err(Error::UnfitKey {
            message: "name is no name for a key".into(),
            detail: Some(format!(
                "It is one line of at most {LONGEST_NAME} bytes, without blanks around it, and what tokens call the key."
            )),
            hint: "name => 'deploy'".into(),
        }
        .into());
    }
    let key = PublicKey::read(&text)?;
    let login = shown_role(Actor::current().login);
    let new = json!({"name": name, "public_key": key.pem, "trusted_by": login}).to_string();
    let is_new = owner::connect(|client| {
        if !owner::rows(client, INSERT, &[owner::json(&new)])?.is_empty() {
            return Ok(true);
        }
        if owner::rows(client, SAME, &[name.as_str().into(), key.pem.as_str().into()])?.is_empty() {
            return Err(Error::Invalid {
                message: format!("key \"{name}\" is there already, and is another one"),
                detail: Some("For a while both can be good, each under a name of its own.".into()),
                hint: format!("SELECT writeguard.distrust_key({}); (then trust_key again)", literal(&name)),
            });
        }
        Ok(false)
    })?;
    if is_new {
        record(format!("key \"{name}\" is trusted, SHA-256 {}", key.sha256))?;
    }
    value(key.sha256)
}

fn distrust_key(arguments: &Arguments) -> Returns {
    let name = arguments.text(0, "name")?;
    let distrusted = owner::connect(|client| {
        owner::rows(
            client,
            "DELETE FROM writeguard.trusted_key WHERE name OPERATOR(pg_catalog.=) $1 RETURNING name",
            &[name.as_str().into()],
        )
    })?;
    if distrusted.is_empty() {
        // The name is not repeated: it may be a key that came in the wrong place.
        let hint = "SELECT name, trusted_at, trusted_by FROM writeguard.trusted_key;".into();
        return Err(Error::UnfitKey { message: "no key of that name is trusted".into(), detail: None, hint }.into());
    }
    record(format!("key \"{name}\" is not trusted any more"))?;
    Ok(None)
}

fn record(reason: String) -> Result<(), Error> {
    let mut event = Event::new(Kind::PolicyChanged);
    event.reason = Some(reason);
    store::insert(&event)?;
    Ok(())
}

/// Whether the database can store any letter; in others, names are ASCII.
pub fn stores_all_letters() -> bool {
    encoding::has_all_letters()
}

/// The trusted key of a name, as the table is now: a transaction that sees an older state of everything else (REPEATABLE
/// READ) must not keep trusting a key.
///
/// # Errors
/// WG008 when the table is not there or says something else than this library writes.
pub fn trusted(name: &str) -> Result<Option<VerifyingKey>, Error> {
    let undecided = |reason: &str| Error::Undecided {
        reason: reason.to_owned(),
        hint: "SELECT name, public_key FROM writeguard.trusted_key;".into(),
        relation: None,
    };
    let lock = pg_sys::AccessShareLock as pg_sys::LOCKMODE;
    let mut found = None;
    // SAFETY: a plain scan of a table of ours, by the newest state; the tuple's values are copied before the next one. An
    // ERROR unwinds to the guard around us, and the abort closes what is open.
    unsafe {
        let schema = pg_sys::get_namespace_oid(c"writeguard".as_ptr(), true);
        let relation = match pg_sys::get_relname_relid(c"trusted_key".as_ptr(), schema) {
            pg_sys::InvalidOid => ptr::null_mut(),
            table => pg_sys::try_table_open(table, lock),
        };
        if relation.is_null() {
            return Err(undecided("the table writeguard.trusted_key is not there"));
        }
        let descriptor = (*relation).rd_att;
        let text = |tuple, column: &core::ffi::CStr| {
            let number = pg_sys::SPI_fnumber(descriptor, column.as_ptr());
            if number > 0 { encoding::from_c(pg_sys::SPI_getvalue(tuple, descriptor, number)) } else { None }
        };
        let scan = pg_sys::systable_beginscan(relation, pg_sys::InvalidOid, false, ptr::null_mut(), 0, ptr::null_mut());
        loop {
            let tuple = pg_sys::systable_getnext(scan);
            if tuple.is_null() {
                break;
            }
            if text(tuple, c"name").as_deref() == Some(name) {
                found = Some(text(tuple, c"public_key"));
            }
        }
        pg_sys::systable_endscan(scan);
        pg_sys::table_close(relation, lock);
    }
    let read = |pem: Option<String>| pem.and_then(|pem| VerifyingKey::from_public_key_pem(pem.trim()).ok());
    found.map(|pem| read(pem).ok_or_else(|| undecided("a trusted key cannot be read"))).transpose()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(text: &str) -> String {
        let error = PublicKey::read(text).unwrap_err();
        assert!(error.hides_statement());
        assert_eq!(error.sqlstate(), "WG007");
        error.to_string()
    }

    const BODY: &str = "MCowBQYDK2VwAyEA11qYAYKxCrfVS/7TyWQHOg7hcvPapiMlrwIaaPcHURo=";

    fn pem(label: &str, body: &str) -> String {
        format!("-----BEGIN {label}-----\n{body}\n-----END {label}-----\n")
    }

    #[test]
    fn a_key_is_the_same_however_its_lines_end() {
        let key = PublicKey::read(&pem("PUBLIC KEY", BODY)).unwrap();
        assert_eq!(key.pem, pem("PUBLIC KEY", BODY));
        let dos = format!("\r\n{}\r\n  ", pem("PUBLIC KEY", BODY).replace('\n', "\r\n"));
        assert_eq!(PublicKey::read(&dos).unwrap().pem, key.pem);
    }

    #[test]
    fn anything_else_is_refused() {
        for label in ["PRIVATE KEY", "ENCRYPTED PRIVATE KEY", "OPENSSH PRIVATE KEY", "EC PRIVATE KEY"] {
            assert_eq!(refused(&pem(label, BODY)), "public_key_pem is a private key");
        }
        let secret = "MC4CAQAwBQYDK2VwBCIEIAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA";
        assert_eq!(refused(secret), "public_key_pem is a private key");
        assert_eq!(refused(&pem("PUBLIC KEY", secret)), "public_key_pem is a private key");
        for text in ["", "deploy", BODY, &pem("CERTIFICATE", BODY), &pem("RSA PUBLIC KEY", BODY)] {
            assert_eq!(refused(text), "public_key_pem is not a public key in PEM");
        }
        // P-256, cut short, with another one behind it.
        let p256 = "MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEEVs/o5+uQbTjL3chynL4wXgUg2R9\n\
                    q9UU8I5mEovUf86QZ7kOBIjJwqnzD1omageEHWwHdBO6B+dFabmdT9POxg==";
        let double = pem("PUBLIC KEY", BODY).repeat(2);
        for text in [&pem("PUBLIC KEY", p256), &pem("PUBLIC KEY", &BODY[..40]), &double, "-----BEGIN PUBLIC KEY-----"] {
            assert_eq!(refused(text), "public_key_pem is not an Ed25519 key");
        }
    }

    #[test]
    fn a_weak_key_is_refused() {
        let weak = "MCowBQYDK2VwAyEAAQAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=";
        assert_eq!(refused(&pem("PUBLIC KEY", weak)), "public_key_pem is a key that anybody can sign for");
    }
}

//! Reads a JWT and verifies its signature: EdDSA with Ed25519 (RFC 8037), and nothing else.
//!
//! Pure. The crate `jsonwebtoken` takes the token apart and refuses whatever is not of the one algorithm; the
//! signature itself is verified by `ed25519-dalek`, strictly: a signature has one form. The key is always the trusted
//! one; what the token's header says of other keys (`jwk`, `x5u`, …) is not looked at.

use ed25519_dalek::ed25519::signature::{self, Verifier};
use ed25519_dalek::{Signature, VerifyingKey};
use jsonwebtoken::crypto::{CryptoProvider, JwtVerifier, KeyUtils};
use jsonwebtoken::errors::{Error, ErrorKind};
use jsonwebtoken::{Algorithm, DecodingKey, Validation};

use super::claims::{Claims, Refusal, is_name};

/// A token is text that somebody types or a script passes on; ours have a few hundred bytes.
const LONGEST: usize = 8 * 1024;

/// Ed25519 for `jsonwebtoken`, which knows it as the algorithm `EdDSA`.
static ED25519: CryptoProvider = CryptoProvider {
    signer_factory: |_, _| Err(ErrorKind::UnsupportedAlgorithm.into()),
    verifier_factory: |algorithm, key| match algorithm {
        Algorithm::EdDSA => {
            let bytes = key.try_get_as_bytes()?.try_into().map_err(|_| ErrorKind::InvalidEddsaKey)?;
            let key = VerifyingKey::from_bytes(bytes).map_err(|_| ErrorKind::InvalidEddsaKey)?;
            Ok(Box::new(Ed25519(key)))
        }
        _ => Err(ErrorKind::InvalidAlgorithm.into()),
    },
    key_utils: KeyUtils::new_unimplemented(),
};

struct Ed25519(VerifyingKey);

impl Verifier<Vec<u8>> for Ed25519 {
    fn verify(&self, message: &[u8], signature: &Vec<u8>) -> Result<(), signature::Error> {
        self.0.verify_strict(message, &Signature::from_slice(signature)?)
    }
}

impl JwtVerifier for Ed25519 {
    fn algorithm(&self) -> Algorithm {
        Algorithm::EdDSA
    }
}

fn malformed() -> Refusal {
    Refusal::new("it is malformed", "A JWT has three parts, and none of its claims twice.".to_owned())
}

/// The name of the key that a token says it is signed with. Nothing is verified yet.
///
/// # Errors
/// A token that no key could make good.
pub fn key_name(token: &str) -> Result<String, Refusal> {
    if token.len() > LONGEST {
        return Err(Refusal::new(format!("it is longer than {LONGEST} bytes"), None));
    }
    if token.split('.').count() != 3 {
        return Err(malformed());
    }
    // An algorithm that the crate does not know, such as none, is no header to it.
    let header = jsonwebtoken::decode_header(token).ok().filter(|header| header.alg == Algorithm::EdDSA);
    let header =
        header.ok_or_else(|| Refusal::new("its header is not that of a JWT with the algorithm EdDSA", None))?;
    if header.crit.is_some() {
        return Err(Refusal::new("its header has crit, and nothing of that kind is known here", None));
    }
    header.kid.filter(|name| is_name(name)).ok_or_else(|| Refusal::new("its header names no key (kid)", None))
}

/// What a token claims, if the key signed it.
///
/// # Errors
/// Another signature, or claims that cannot be read.
pub fn verify(token: &str, key: &VerifyingKey) -> Result<Claims, Refusal> {
    // The second time and later it is there already.
    let _ = ED25519.install_default();
    let mut validation = Validation::new(Algorithm::EdDSA);
    // The claims are judged in `claims`, against this server's clock and without leeway.
    validation.required_spec_claims.clear();
    (validation.validate_exp, validation.validate_aud) = (false, false);
    let decoded = jsonwebtoken::decode::<Claims>(token, &DecodingKey::from_ed_der(key.as_bytes()), &validation);
    decoded.map(|token| token.claims).map_err(|error: Error| match error.kind() {
        ErrorKind::InvalidSignature => Refusal::new("its signature is not that of its key", None),
        _ => malformed(),
    })
}

#[cfg(test)]
mod tests {
    use ed25519_dalek::pkcs8::DecodePublicKey;

    use super::*;

    /// Signed by `openssl pkeyutl -sign -rawin` with a key that was thrown away.
    const KEY: &str = "-----BEGIN PUBLIC KEY-----\n\
         MCowBQYDK2VwAyEAKwM9pBJ7drxRx8TEL9QmjZNzQ7RE2b5H5lLMQNxPprM=\n\
         -----END PUBLIC KEY-----\n";
    const TOKEN: &str = "eyJhbGciOiAiRWREU0EiLCAidHlwIjogIkpXVCIsICJraWQiOiAiZGVwbG95In0.\
         eyJhdWQiOiAiNy9zaG9wIiwgInN1YiI6ICJjaSIsICJpYXQiOiAxNzk1Mzk1NjQ0LCAiZXhwIjogMTc5NTM5NjI0NCwgImp0aSI6\
         ICIzODAzY2FhMy04MzAyLTQxZGMtYjgwNC0xOTVhMjlmZGJkODkiLCAid2ciOiB7InN0YXRlbWVudF9zaGEyNTYiOiAiZWFkMTBh\
         OGU5NmI4Y2IwZmYzMzNhYWQ5ZWNiNzYzNGMyZGNlYjBiYzc5MjA4YTE5OGMwMGYwOTgzNzA2ODBlNCIsICJtYXhfcm93cyI6IDUs\
         ICJ0YWJsZXMiOiBbInB1YmxpYy5vcmRlcnMiXX19.PLoT_NOEFnwe46F-FUa1F7vw7mnmIfDz9OAfnxioGpwSShcF2SqXBLvg9Ja\
         Pfn8Vrl-U5FupMI_bobp2KWPqCQ";

    fn key() -> VerifyingKey {
        VerifyingKey::from_public_key_pem(KEY).unwrap()
    }

    fn reason<T: core::fmt::Debug>(result: Result<T, Refusal>) -> String {
        result.unwrap_err().reason
    }

    #[test]
    fn what_openssl_signed_is_verified() {
        assert_eq!(key_name(TOKEN).unwrap(), "deploy");
        assert!(verify(TOKEN, &key()).is_ok());
    }

    #[test]
    fn every_changed_letter_is_noticed() {
        let token = TOKEN;
        for (place, letter) in token.bytes().enumerate() {
            let mut changed = token.as_bytes().to_vec();
            changed[place] = if letter == b'A' { b'B' } else { b'A' };
            let changed = String::from_utf8(changed).unwrap();
            assert!(verify(&changed, &key()).is_err(), "at {place}");
        }
        for shorter in 0..token.len() {
            assert!(verify(&token[..shorter], &key()).is_err(), "{shorter} letters");
        }
        assert!(verify(&format!("{token}="), &key()).is_err());
        assert!(verify(&format!("{token}.{token}"), &key()).is_err());
    }

    #[test]
    fn a_signature_has_one_form() {
        // The last of 86 letters has four bits that mean nothing; with any of them set it is not base64url.
        let token = TOKEN;
        let (most, last) = token.split_at(token.len() - 1);
        for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_".chars() {
            assert_eq!(verify(&format!("{most}{letter}"), &key()).is_ok(), last == letter.to_string(), "{letter}");
        }
    }

    #[test]
    fn another_key_is_not_the_key() {
        let other = VerifyingKey::from_bytes(&[
            0xd7, 0x5a, 0x98, 0x01, 0x82, 0xb1, 0x0a, 0xb7, 0xd5, 0x4b, 0xfe, 0xd3, 0xc9, 0x64, 0x07, 0x3a, 0x0e, 0xe1,
            0x72, 0xf3, 0xda, 0xa6, 0x23, 0x25, 0xaf, 0x02, 0x1a, 0x68, 0xf7, 0x07, 0x51, 0x1a,
        ]);
        assert_eq!(reason(verify(TOKEN, &other.unwrap())), "its signature is not that of its key");
    }

    #[test]
    fn a_weak_key_signs_nothing() {
        // The point of order one, with which a signature of zeros is right for any message in the lax verification.
        let mut bytes = [0; 32];
        bytes[0] = 1;
        let weak = VerifyingKey::from_bytes(&bytes).unwrap();
        assert!(weak.is_weak());
        let (signed, _) = TOKEN.rsplit_once('.').unwrap();
        let zeros = format!("AQ{}", "A".repeat(84));
        assert_eq!(reason(verify(&format!("{signed}.{zeros}"), &weak)), "its signature is not that of its key");
    }

    #[test]
    fn other_headers_are_refused() {
        // {"alg":"none"}, {"alg":"HS256"}, {"alg":"ES256"}, {"alg":"eddsa"}, {"typ":"JWT"}, {}
        for header in [
            "eyJhbGciOiJub25lIn0",
            "eyJhbGciOiJIUzI1NiJ9",
            "eyJhbGciOiJFUzI1NiJ9",
            "eyJhbGciOiJlZGRzYSJ9",
            "eyJ0eXAiOiJKV1QifQ",
            "e30",
        ] {
            let token = format!("{header}.e30.AAAA");
            assert_eq!(reason(key_name(&token)), "its header is not that of a JWT with the algorithm EdDSA");
            assert!(verify(&token, &key()).is_err());
        }
        // {"alg":"EdDSA"}, {"alg":"EdDSA","kid":"a\nb"}
        for header in ["eyJhbGciOiJFZERTQSJ9", "eyJhbGciOiJFZERTQSIsImtpZCI6ImFcbmIifQ"] {
            assert_eq!(reason(key_name(&format!("{header}.e30.AAAA"))), "its header names no key (kid)");
        }
        // {"alg":"EdDSA","kid":"deploy","crit":["exp"]}
        let critical = "eyJhbGciOiJFZERTQSIsImtpZCI6ImRlcGxveSIsImNyaXQiOlsiZXhwIl19";
        assert!(reason(key_name(&format!("{critical}.e30.AAAA"))).starts_with("its header has crit"));
        assert_eq!(reason(key_name(&format!("{}.e30.AAAA", "e".repeat(9000)))), "it is longer than 8192 bytes");
        assert_eq!(reason(key_name("e30.e30")), "it is malformed");
        assert_eq!(reason(key_name("e30.e30.e30.e30")), "it is malformed");
    }
}

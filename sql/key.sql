COMMENT ON TABLE writeguard.trusted_key IS 'Whose approvals from outside are good; written through trust_key() and distrust_key()';
COMMENT ON COLUMN writeguard.trusted_key.name IS 'what the header of a token calls it (kid)';
COMMENT ON COLUMN writeguard.trusted_key.public_key IS 'Ed25519, in PEM';
COMMENT ON COLUMN writeguard.trusted_key.trusted_at IS 'when trust_key() was called';
COMMENT ON COLUMN writeguard.trusted_key.trusted_by IS 'the login that called trust_key()';

COMMENT ON TABLE writeguard.used_jti IS 'internal: tokens from outside that were used';
COMMENT ON COLUMN writeguard.used_jti.key IS 'the name of the key that signed it, also when that is not trusted any more';
COMMENT ON COLUMN writeguard.used_jti.jti IS 'the name that its signer gave the token: good once';
COMMENT ON COLUMN writeguard.used_jti.used_at IS 'when it was used';
COMMENT ON COLUMN writeguard.used_jti.expires_at IS 'the token''s exp; after it and a margin the row serves no more';

CREATE OR REPLACE FUNCTION writeguard.trust_key(name text, public_key_pem text) RETURNS text
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'writeguard_trust_key';
COMMENT ON FUNCTION writeguard.trust_key IS 'from now on tokens that this Ed25519 key signs are good; gives the SHA-256 of the key in DER; WG007 for anything but a public key of a new name';

CREATE OR REPLACE FUNCTION writeguard.distrust_key(name text) RETURNS void
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'writeguard_distrust_key';
COMMENT ON FUNCTION writeguard.distrust_key IS 'tokens that this key signed are good no more; WG007 when there is none of that name';

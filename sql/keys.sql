CREATE TABLE writeguard.trusted_key (
    name       text PRIMARY KEY CHECK (btrim(name) <> ''),
    public_key text NOT NULL,
    trusted_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    trusted_by text NOT NULL
);
COMMENT ON TABLE writeguard.trusted_key IS 'Whose approvals from outside are good; written through trust_key() and distrust_key()';
COMMENT ON COLUMN writeguard.trusted_key.name IS 'what the header of a token calls it (kid)';
COMMENT ON COLUMN writeguard.trusted_key.public_key IS 'Ed25519, in PEM';
COMMENT ON COLUMN writeguard.trusted_key.trusted_by IS 'the login that called trust_key()';

-- A token is used when its row is committed: whoever inserts the same one waits for that.
CREATE TABLE writeguard.used_jti (
    key        text NOT NULL,
    jti        text NOT NULL,
    used_at    timestamptz NOT NULL DEFAULT clock_timestamp(),
    expires_at timestamptz NOT NULL,
    PRIMARY KEY (key, jti)
);
COMMENT ON TABLE writeguard.used_jti IS 'Tokens from outside that were used';
COMMENT ON COLUMN writeguard.used_jti.key IS 'the name of the key that signed it, also when that is not trusted any more';
COMMENT ON COLUMN writeguard.used_jti.expires_at IS 'the token''s exp; after it and a margin the row serves no more';

CREATE TRIGGER owner_only
    BEFORE INSERT OR UPDATE OR DELETE OR TRUNCATE ON writeguard.trusted_key
    FOR EACH STATEMENT EXECUTE FUNCTION writeguard.owner_only();
CREATE TRIGGER owner_only
    BEFORE INSERT OR UPDATE OR DELETE OR TRUNCATE ON writeguard.used_jti
    FOR EACH STATEMENT EXECUTE FUNCTION writeguard.owner_only();
ALTER TABLE writeguard.trusted_key ENABLE ALWAYS TRIGGER owner_only;
ALTER TABLE writeguard.used_jti ENABLE ALWAYS TRIGGER owner_only;

SELECT pg_catalog.pg_extension_config_dump('writeguard.trusted_key', '');
SELECT pg_catalog.pg_extension_config_dump('writeguard.used_jti', '');

CREATE FUNCTION writeguard.trust_key(name text, public_key_pem text) RETURNS text
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'writeguard_trust_key';
COMMENT ON FUNCTION writeguard.trust_key IS 'from now on tokens that this Ed25519 key signs are good; gives the SHA-256 of the key in DER; WG007 for anything but a public key of a new name';

CREATE FUNCTION writeguard.distrust_key(name text) RETURNS void
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'writeguard_distrust_key';
COMMENT ON FUNCTION writeguard.distrust_key IS 'tokens that this key signed are good no more; WG007 when there is none of that name';

CREATE TABLE writeguard.trusted_key (
    name       text PRIMARY KEY CHECK (btrim(name) <> ''),
    public_key text NOT NULL,
    trusted_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    trusted_by text NOT NULL
);

-- A token is used when its row is committed: whoever inserts the same one waits for that.
CREATE TABLE writeguard.used_jti (
    key        text NOT NULL,
    jti        text NOT NULL,
    used_at    timestamptz NOT NULL DEFAULT clock_timestamp(),
    expires_at timestamptz NOT NULL,
    PRIMARY KEY (key, jti)
);

CREATE TRIGGER owner_only
    BEFORE INSERT OR UPDATE OR DELETE OR TRUNCATE ON writeguard.trusted_key
    FOR EACH STATEMENT EXECUTE FUNCTION writeguard._owner_only();
CREATE TRIGGER owner_only
    BEFORE INSERT OR UPDATE OR DELETE OR TRUNCATE ON writeguard.used_jti
    FOR EACH STATEMENT EXECUTE FUNCTION writeguard._owner_only();
ALTER TABLE writeguard.trusted_key ENABLE ALWAYS TRIGGER owner_only;
ALTER TABLE writeguard.used_jti ENABLE ALWAYS TRIGGER owner_only;

SELECT pg_catalog.pg_extension_config_dump('writeguard.trusted_key', '');
SELECT pg_catalog.pg_extension_config_dump('writeguard.used_jti', '');

CREATE TABLE writeguard.request (
    id               bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    requested_at     timestamptz NOT NULL DEFAULT clock_timestamp(),
    state            text NOT NULL DEFAULT 'pending'
                     CHECK (state IN ('pending', 'approved', 'rejected', 'spent', 'expired', 'revoked')),
    database         text NOT NULL,
    login            text NOT NULL,
    actor            text NOT NULL,
    acting_as        text NOT NULL,
    reason           text NOT NULL,
    statement        text NOT NULL,
    parameters       text[] NOT NULL DEFAULT '{}',
    statement_sha256 text NOT NULL,
    rows             bigint NOT NULL,
    relations        jsonb NOT NULL,
    samples          jsonb,
    policies         text[] NOT NULL,
    decided_by       text,
    decided_at       timestamptz,
    comment          text,
    max_rows         bigint CHECK (max_rows >= 0),
    expires_at       timestamptz NOT NULL,
    token_sha256     text UNIQUE,
    spent_at         timestamptz,
    search_path      text NOT NULL,
    break_glass      boolean NOT NULL DEFAULT false,
    settings         jsonb,
    fingerprints     jsonb,
    definitions      jsonb
);
CREATE INDEX request_open ON writeguard.request (id) WHERE state IN ('pending', 'approved');
CREATE INDEX request_login ON writeguard.request (login, id);

CREATE TABLE writeguard.approval (
    request      bigint NOT NULL REFERENCES writeguard.request ON DELETE CASCADE,
    approver     text NOT NULL,
    approver_oid oid NOT NULL,
    approved_at  timestamptz NOT NULL DEFAULT clock_timestamp(),
    valid_for    interval NOT NULL,
    max_rows     bigint CHECK (max_rows >= 0),
    comment      text,
    PRIMARY KEY (request, approver_oid)
);

CREATE TRIGGER owner_only
    BEFORE INSERT OR UPDATE OR DELETE OR TRUNCATE ON writeguard.request
    FOR EACH STATEMENT EXECUTE FUNCTION writeguard._owner_only();
CREATE TRIGGER owner_only
    BEFORE INSERT OR UPDATE OR DELETE OR TRUNCATE ON writeguard.approval
    FOR EACH STATEMENT EXECUTE FUNCTION writeguard._owner_only();
ALTER TABLE writeguard.request ENABLE ALWAYS TRIGGER owner_only;
ALTER TABLE writeguard.approval ENABLE ALWAYS TRIGGER owner_only;

SELECT pg_catalog.pg_extension_config_dump('writeguard.request', '');
SELECT pg_catalog.pg_extension_config_dump('writeguard.request_id_seq', '');
SELECT pg_catalog.pg_extension_config_dump('writeguard.approval', '');

CREATE TABLE writeguard.policy (
    name                     text PRIMARY KEY CHECK (btrim(name) <> ''),
    tables                   text[] NOT NULL DEFAULT '{*.*}' CHECK (cardinality(tables) > 0),
    roles                    text[] NOT NULL DEFAULT '{public}' CHECK (cardinality(roles) > 0),
    application              text,
    client                   cidr,
    schedule                 text,
    operations               text[] NOT NULL DEFAULT '{update,delete,truncate}'
                             CHECK (cardinality(operations) > 0
                                    AND operations <@ '{update,delete,truncate,drop}'),
    max_rows                 bigint CHECK (max_rows >= 0),
    max_rows_per_transaction bigint CHECK (max_rows_per_transaction >= 0),
    rate_rows                bigint CHECK (rate_rows >= 0),
    rate_interval            interval NOT NULL DEFAULT '1 hour' CHECK (rate_interval > '0'),
    max_fraction             double precision CHECK (max_fraction BETWEEN 0 AND 1),
    require_where            boolean,
    require_transaction      boolean,
    mode                     text NOT NULL DEFAULT 'enforce' CHECK (mode IN ('observe', 'warn', 'enforce', 'exempt')),
    override                 text NOT NULL DEFAULT 'token' CHECK (override IN ('never', 'flag', 'token')),
    approvers                text,
    min_approvals            integer NOT NULL DEFAULT 1 CHECK (min_approvals >= 1),
    undo                     interval,
    comment                  text,
    samples                  boolean NOT NULL DEFAULT true,
    always                   boolean NOT NULL DEFAULT false,
    columns                  text[] CHECK (cardinality(columns) > 0),
    same_rows                boolean NOT NULL DEFAULT true
);

CREATE TRIGGER policy_changed
    AFTER INSERT OR UPDATE OR DELETE OR TRUNCATE ON writeguard.policy
    FOR EACH STATEMENT EXECUTE FUNCTION writeguard._policy_changed();
CREATE TRIGGER owner_only
    BEFORE INSERT OR UPDATE OR DELETE OR TRUNCATE ON writeguard.policy
    FOR EACH STATEMENT EXECUTE FUNCTION writeguard._owner_only();
CREATE TRIGGER policy_written
    AFTER INSERT OR UPDATE OR DELETE ON writeguard.policy
    FOR EACH ROW EXECUTE FUNCTION writeguard._policy_written();
ALTER TABLE writeguard.policy ENABLE ALWAYS TRIGGER policy_changed;
ALTER TABLE writeguard.policy ENABLE ALWAYS TRIGGER owner_only;
ALTER TABLE writeguard.policy ENABLE ALWAYS TRIGGER policy_written;

SELECT pg_catalog.pg_extension_config_dump('writeguard.policy', '');

CREATE TABLE writeguard.event (
    id             bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    occurred_at    timestamptz NOT NULL,
    kind           text NOT NULL,
    policy         text,
    mode           text,
    login          text NOT NULL,
    role           text NOT NULL,
    application    text,
    client         inet,
    pid            integer,
    xid            xid8,
    operation      text,
    relation       text,
    scope          text,
    row_limit      bigint,
    rows           bigint,
    rows_estimated bigint,
    statement      text,
    query_id       bigint,
    approval       bigint,
    reason         text
);
CREATE INDEX event_occurred_at ON writeguard.event (occurred_at);
CREATE INDEX event_login ON writeguard.event (login, id);
CREATE INDEX event_policy ON writeguard.event (policy, id);
CREATE INDEX event_relation ON writeguard.event (relation, id);
CREATE INDEX event_approval ON writeguard.event (approval) WHERE approval IS NOT NULL;

CREATE TABLE writeguard.outbox (
    event bigint NOT NULL
);

CREATE TRIGGER owner_only
    BEFORE INSERT OR UPDATE OR DELETE OR TRUNCATE ON writeguard.event
    FOR EACH STATEMENT EXECUTE FUNCTION writeguard._owner_only();
CREATE TRIGGER owner_only
    BEFORE INSERT OR UPDATE OR DELETE OR TRUNCATE ON writeguard.outbox
    FOR EACH STATEMENT EXECUTE FUNCTION writeguard._owner_only();
CREATE TRIGGER restore_begins
    BEFORE INSERT ON writeguard.event
    FOR EACH STATEMENT EXECUTE FUNCTION writeguard._event_restored();
CREATE TRIGGER restore_ends
    AFTER INSERT ON writeguard.event
    FOR EACH STATEMENT EXECUTE FUNCTION writeguard._event_restored();
ALTER TABLE writeguard.event ENABLE ALWAYS TRIGGER owner_only;
ALTER TABLE writeguard.outbox ENABLE ALWAYS TRIGGER owner_only;
ALTER TABLE writeguard.event ENABLE ALWAYS TRIGGER restore_begins;
ALTER TABLE writeguard.event ENABLE ALWAYS TRIGGER restore_ends;

SELECT pg_catalog.pg_extension_config_dump('writeguard.event', '');
SELECT pg_catalog.pg_extension_config_dump('writeguard.event_id_seq', '');

-- One row per statement whose rows can be put back.
CREATE TABLE writeguard.change_statement (
    id         bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    changed_at timestamptz NOT NULL,
    xid        xid8 NOT NULL,
    login      text NOT NULL,
    role       text NOT NULL,
    statement  text,
    approval   bigint,
    kept_until timestamptz NOT NULL,
    undoes     bigint,
    undone_at  timestamptz,
    undone_by  text
);

-- One row per statement, relation and operation. No foreign key: under SERIALIZABLE its look-ups would make conflicts of
-- transactions that have none.
CREATE TABLE writeguard.change_relation (
    change    bigint NOT NULL,
    relation  oid NOT NULL,
    name      text NOT NULL,
    operation text NOT NULL,
    rows      bigint NOT NULL,
    bytes     bigint NOT NULL,
    columns   jsonb,
    key       smallint[],
    forms     jsonb,
    hindrance text,
    PRIMARY KEY (change, relation, operation)
);

-- One row per changed row, in the order of the changes.
CREATE TABLE writeguard.image (
    change    bigint NOT NULL,
    number    bigint NOT NULL,
    relation  oid NOT NULL,
    operation text NOT NULL,
    before    jsonb NOT NULL,
    after     jsonb,
    was_at    bigint,
    left_at   bigint,
    PRIMARY KEY (change, number)
);

CREATE INDEX change_statement_kept_until ON writeguard.change_statement (kept_until);

CREATE TRIGGER owner_only
    BEFORE INSERT OR UPDATE OR DELETE OR TRUNCATE ON writeguard.change_statement
    FOR EACH STATEMENT EXECUTE FUNCTION writeguard._owner_only();
CREATE TRIGGER owner_only
    BEFORE INSERT OR UPDATE OR DELETE OR TRUNCATE ON writeguard.change_relation
    FOR EACH STATEMENT EXECUTE FUNCTION writeguard._owner_only();
CREATE TRIGGER owner_only
    BEFORE INSERT OR UPDATE OR DELETE OR TRUNCATE ON writeguard.image
    FOR EACH STATEMENT EXECUTE FUNCTION writeguard._owner_only();
ALTER TABLE writeguard.change_statement ENABLE ALWAYS TRIGGER owner_only;
ALTER TABLE writeguard.change_relation ENABLE ALWAYS TRIGGER owner_only;
ALTER TABLE writeguard.image ENABLE ALWAYS TRIGGER owner_only;

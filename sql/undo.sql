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
COMMENT ON TABLE writeguard.change_statement IS 'Statements whose rows are kept as they were; see the view writeguard.change';
COMMENT ON COLUMN writeguard.change_statement.undoes IS 'the change that this one, an undo, took back';

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
COMMENT ON TABLE writeguard.change_relation IS 'How many rows of which tables a statement changed';
COMMENT ON COLUMN writeguard.change_relation.relation IS 'the table, for a partition the one at the top of its tree';
COMMENT ON COLUMN writeguard.change_relation.name IS 'its qualified name when it was changed';
COMMENT ON COLUMN writeguard.change_relation.bytes IS 'of the kept rows, as text';
COMMENT ON COLUMN writeguard.change_relation.columns IS 'numbers of its columns by the names that the images have';
COMMENT ON COLUMN writeguard.change_relation.key IS 'numbers of the columns of the primary key by which its rows are found again';
COMMENT ON COLUMN writeguard.change_relation.forms IS 'by column name, what the row types in it were made of';
COMMENT ON COLUMN writeguard.change_relation.hindrance IS 'what happened to it between its rows, so that they cannot be put back; NULL: nothing';

-- One row per changed row, in the order of the changes.
CREATE TABLE writeguard.image (
    change    bigint NOT NULL,
    number    bigint NOT NULL,
    relation  oid NOT NULL,
    operation text NOT NULL,
    before    jsonb NOT NULL,
    after     jsonb,
    PRIMARY KEY (change, number)
);
COMMENT ON TABLE writeguard.image IS 'Rows as they were before a change that can be undone';
COMMENT ON COLUMN writeguard.image.before IS 'column names with the values'' text as their types print them, or null; of an update the primary key and the columns that changed';
COMMENT ON COLUMN writeguard.image.after IS 'of an update: the primary key and the same columns as they became';

CREATE VIEW writeguard.change AS
    SELECT s.id, s.changed_at, s.login, s.statement, r.name AS relation, r.operation, r.rows, s.kept_until, s.undone_at,
           s.approval, s.role, s.undone_by, s.undoes, r.bytes
    FROM writeguard.change_statement AS s
    JOIN writeguard.change_relation AS r ON r.change = s.id;
COMMENT ON VIEW writeguard.change IS 'overridden writes whose rows are kept as they were; undo(id) puts them back';

CREATE INDEX change_statement_kept_until ON writeguard.change_statement (kept_until);

CREATE TRIGGER owner_only
    BEFORE INSERT OR UPDATE OR DELETE OR TRUNCATE ON writeguard.change_statement
    FOR EACH STATEMENT EXECUTE FUNCTION writeguard.owner_only();
CREATE TRIGGER owner_only
    BEFORE INSERT OR UPDATE OR DELETE OR TRUNCATE ON writeguard.change_relation
    FOR EACH STATEMENT EXECUTE FUNCTION writeguard.owner_only();
CREATE TRIGGER owner_only
    BEFORE INSERT OR UPDATE OR DELETE OR TRUNCATE ON writeguard.image
    FOR EACH STATEMENT EXECUTE FUNCTION writeguard.owner_only();
ALTER TABLE writeguard.change_statement ENABLE ALWAYS TRIGGER owner_only;
ALTER TABLE writeguard.change_relation ENABLE ALWAYS TRIGGER owner_only;
ALTER TABLE writeguard.image ENABLE ALWAYS TRIGGER owner_only;

CREATE FUNCTION writeguard.discard(change bigint) RETURNS void
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'writeguard_discard';
COMMENT ON FUNCTION writeguard.discard IS 'forgets the rows that a change has kept; it cannot be undone then; WG007 when there is none of that number';

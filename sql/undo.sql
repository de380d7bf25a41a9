COMMENT ON TABLE writeguard.change_statement IS 'internal: statements whose rows are kept as they were; see the view writeguard.change';
COMMENT ON COLUMN writeguard.change_statement.id IS 'by which undo() calls the change';
COMMENT ON COLUMN writeguard.change_statement.changed_at IS 'when it was committed';
COMMENT ON COLUMN writeguard.change_statement.xid IS 'transaction that wrote';
COMMENT ON COLUMN writeguard.change_statement.login IS 'who authenticated';
COMMENT ON COLUMN writeguard.change_statement.role IS 'the role that was SET, else session_user';
COMMENT ON COLUMN writeguard.change_statement.statement IS 'its whole text';
COMMENT ON COLUMN writeguard.change_statement.approval IS 'the request whose token or execution opened it; NULL: none';
COMMENT ON COLUMN writeguard.change_statement.kept_until IS 'after it the worker discards the rows';
COMMENT ON COLUMN writeguard.change_statement.undoes IS 'the change that this one, an undo, took back';
COMMENT ON COLUMN writeguard.change_statement.undone_at IS 'when it was taken back last; NULL: it is not';
COMMENT ON COLUMN writeguard.change_statement.undone_by IS 'the login that took it back last';
COMMENT ON SEQUENCE writeguard.change_statement_id_seq IS 'internal: the ids of changes';

COMMENT ON TABLE writeguard.change_relation IS 'internal: how many rows of which tables a statement changed';
COMMENT ON COLUMN writeguard.change_relation.change IS 'id of the statement''s row';
COMMENT ON COLUMN writeguard.change_relation.relation IS 'the table, for a partition the one at the top of its tree';
COMMENT ON COLUMN writeguard.change_relation.name IS 'its qualified name when it was changed';
COMMENT ON COLUMN writeguard.change_relation.operation IS 'update, delete, truncate; of an undo also insert';
COMMENT ON COLUMN writeguard.change_relation.rows IS 'rows that are kept';
COMMENT ON COLUMN writeguard.change_relation.bytes IS 'of the kept rows, as text';
COMMENT ON COLUMN writeguard.change_relation.columns IS 'numbers of its columns by the names that the images have';
COMMENT ON COLUMN writeguard.change_relation.key IS 'numbers of the columns of the primary key by which its rows are found again';
COMMENT ON COLUMN writeguard.change_relation.forms IS 'by column name, what the row types in it were made of';
COMMENT ON COLUMN writeguard.change_relation.hindrance IS 'what happened to it between its rows, so that they cannot be put back; NULL: nothing';

COMMENT ON TABLE writeguard.image IS 'internal: rows as they were before a change that can be undone';
COMMENT ON COLUMN writeguard.image.change IS 'id of the statement''s row';
COMMENT ON COLUMN writeguard.image.number IS 'in the order of the changes';
COMMENT ON COLUMN writeguard.image.relation IS 'as in change_relation';
COMMENT ON COLUMN writeguard.image.operation IS 'as in change_relation';
COMMENT ON COLUMN writeguard.image.before IS 'column names with the values'' text as their types print them, or null; of an update the primary key and the columns that changed';
COMMENT ON COLUMN writeguard.image.after IS 'of an update: the primary key and the same columns as they became';
COMMENT ON COLUMN writeguard.image.was_at IS 'where the row''s version was stored, told apart within the change; the next image of a row begins where one before it ended';
COMMENT ON COLUMN writeguard.image.left_at IS 'where the version that it left is stored; NULL: the row is gone';

CREATE OR REPLACE VIEW writeguard.change AS
    SELECT s.id, s.changed_at, s.login, s.statement, r.name AS relation, r.operation, r.rows, s.kept_until, s.undone_at,
           s.approval, s.role, s.undone_by, s.undoes, r.bytes
    FROM writeguard.change_statement AS s
    JOIN writeguard.change_relation AS r ON r.change = s.id;
COMMENT ON VIEW writeguard.change IS 'overridden writes whose rows are kept as they were; undo(id) puts them back';
COMMENT ON COLUMN writeguard.change.id IS 'one per statement; it has a row for each relation and operation';
COMMENT ON COLUMN writeguard.change.changed_at IS 'when it was committed';
COMMENT ON COLUMN writeguard.change.login IS 'who authenticated';
COMMENT ON COLUMN writeguard.change.statement IS 'its whole text';
COMMENT ON COLUMN writeguard.change.relation IS 'qualified name of the table when it was changed';
COMMENT ON COLUMN writeguard.change.operation IS 'update, delete, truncate; of an undo also insert';
COMMENT ON COLUMN writeguard.change.rows IS 'rows that are kept';
COMMENT ON COLUMN writeguard.change.kept_until IS 'until then undo() finds the rows';
COMMENT ON COLUMN writeguard.change.undone_at IS 'when it was taken back last; NULL: it is not';
COMMENT ON COLUMN writeguard.change.approval IS 'the request whose token or execution opened it; NULL: none';
COMMENT ON COLUMN writeguard.change.role IS 'the role that was SET, else session_user';
COMMENT ON COLUMN writeguard.change.undone_by IS 'the login that took it back last';
COMMENT ON COLUMN writeguard.change.undoes IS 'the change that this one, an undo, took back';
COMMENT ON COLUMN writeguard.change.bytes IS 'of the kept rows, as text';

CREATE OR REPLACE FUNCTION writeguard.undo(change bigint, on_conflict text DEFAULT 'error', dry_run boolean DEFAULT false,
    triggers text DEFAULT 'off')
    RETURNS TABLE (relation text, restored bigint, conflicts bigint)
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'writeguard_undo';
COMMENT ON FUNCTION writeguard.undo IS 'puts back the rows and columns that a change took, unless they were changed again since: WG009, or they stay as they are (skip); user triggers do not fire (off) or do (fire)';

CREATE OR REPLACE FUNCTION writeguard.undo_conflicts(change bigint)
    RETURNS TABLE (relation text, key jsonb, was jsonb, wrote jsonb, is_now jsonb)
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'writeguard_undo_conflicts';
COMMENT ON FUNCTION writeguard.undo_conflicts IS 'the rows of a change that were changed again since: as they were before it, as it left them, as they are now';

CREATE OR REPLACE FUNCTION writeguard.discard(change bigint) RETURNS void
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'writeguard_discard';
COMMENT ON FUNCTION writeguard.discard IS 'forgets the rows that a change has kept; it cannot be undone then; WG007 when there is none of that number';

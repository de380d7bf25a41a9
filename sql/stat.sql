CREATE OR REPLACE FUNCTION writeguard._stat_numbers()
    RETURNS TABLE (
        relation   text,
        role       text,
        operation  text,
        statements bigint,
        rows       bigint,
        largest    bigint,
        refused    bigint,
        overridden bigint,
        histogram  bigint[]
    )
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'writeguard_stat_numbers';
COMMENT ON FUNCTION writeguard._stat_numbers IS 'internal: the rows of writeguard.stat';

CREATE OR REPLACE VIEW writeguard.stat AS
    SELECT n.relation, n.role, n.operation, n.statements, n.rows, n.largest, n.refused, n.overridden, n.histogram
    FROM writeguard._stat_numbers() AS n;
COMMENT ON VIEW writeguard.stat IS 'what statements changed in tables that a policy covers, in this database since stat_reset()';
COMMENT ON COLUMN writeguard.stat.relation IS 'qualified name; of a partition, that of the whole tree';
COMMENT ON COLUMN writeguard.stat.role IS 'the role that is SET, else session_user';
COMMENT ON COLUMN writeguard.stat.operation IS 'update, delete, truncate, drop';
COMMENT ON COLUMN writeguard.stat.statements IS 'those that changed a row, whatever became of it';
COMMENT ON COLUMN writeguard.stat.rows IS 'of all these statements';
COMMENT ON COLUMN writeguard.stat.largest IS 'rows of the largest statement';
COMMENT ON COLUMN writeguard.stat.refused IS 'statements that were refused';
COMMENT ON COLUMN writeguard.stat.overridden IS 'statements that went past a limit with an override';
COMMENT ON COLUMN writeguard.stat.histogram IS 'statements by rows: 1, 2 to 3, 4 to 7, 8 to 15, and so on';

CREATE OR REPLACE FUNCTION writeguard.stat_reset() RETURNS void
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'writeguard_stat_reset';
COMMENT ON FUNCTION writeguard.stat_reset IS 'forgets the statistics of this database';

CREATE OR REPLACE FUNCTION writeguard._stat_counters()
    RETURNS TABLE (slots bigint, used bigint, evicted bigint, stored_at timestamptz)
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'writeguard_stat_counters';
COMMENT ON FUNCTION writeguard._stat_counters IS 'internal: the row of writeguard.stat_slots';

CREATE OR REPLACE VIEW writeguard.stat_slots AS
    SELECT c.slots, c.used, c.evicted, c.stored_at FROM writeguard._stat_counters() AS c;
COMMENT ON VIEW writeguard.stat_slots IS 'in all databases: statistics there is room for, those in use, those that lost their numbers to others since the server started, and when they were last written to disk';
COMMENT ON COLUMN writeguard.stat_slots.slots IS 'statistics there is room for: writeguard.stat_entries';
COMMENT ON COLUMN writeguard.stat_slots.used IS 'statistics that are in use';
COMMENT ON COLUMN writeguard.stat_slots.evicted IS 'statistics that lost their numbers to others since the server started';
COMMENT ON COLUMN writeguard.stat_slots.stored_at IS 'when they were last written to disk';

CREATE OR REPLACE FUNCTION writeguard.suggest_policies(headroom double precision DEFAULT 2)
    RETURNS TABLE (
        relation   text,
        role       text,
        operation  text,
        statements bigint,
        largest    bigint,
        max_rows   bigint,
        refused    bigint,
        chart      text,
        note       text,
        document   jsonb
    )
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'writeguard_suggest_policies';
COMMENT ON FUNCTION writeguard.suggest_policies IS 'limits that fit what was seen: for all but one in a thousand statements, times headroom; document is for import_policies, refused how many statements it would have refused';

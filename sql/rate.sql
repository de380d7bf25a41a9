CREATE OR REPLACE FUNCTION writeguard._rate_counters() RETURNS bigint[]
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'writeguard_rate_counters';
COMMENT ON FUNCTION writeguard._rate_counters IS 'internal: the numbers of writeguard.rate_slots';

CREATE OR REPLACE VIEW writeguard.rate_slots AS
    SELECT c.n[1] AS slots, c.n[2] AS used, c.n[3] AS refused
    FROM (SELECT writeguard._rate_counters() AS n) AS c;
COMMENT ON VIEW writeguard.rate_slots IS 'in all databases: rates there is room for, those that are not full, and writes since the server started that found no room';
COMMENT ON COLUMN writeguard.rate_slots.slots IS 'rates there is room for: writeguard.rate_slots';
COMMENT ON COLUMN writeguard.rate_slots.used IS 'rates that are not full';
COMMENT ON COLUMN writeguard.rate_slots.refused IS 'writes that found no room since the server started';

CREATE OR REPLACE FUNCTION writeguard._rate_numbers()
    RETURNS TABLE (policy text, login text, rate_rows bigint, rows_left bigint, full_at timestamptz)
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'writeguard_rate_numbers';
COMMENT ON FUNCTION writeguard._rate_numbers IS 'internal: the rows of writeguard.rate_budgets';

CREATE OR REPLACE VIEW writeguard.rate_budgets AS
    SELECT n.policy, n.login, n.rate_rows, n.rows_left, n.full_at FROM writeguard._rate_numbers() AS n;
COMMENT ON VIEW writeguard.rate_budgets IS 'rates of this database that are not full: rows that a login may still write, and when all have come back';
COMMENT ON COLUMN writeguard.rate_budgets.policy IS 'whose rate it is';
COMMENT ON COLUMN writeguard.rate_budgets.login IS 'whose rows are charged to it';
COMMENT ON COLUMN writeguard.rate_budgets.rate_rows IS 'rows of a full one';
COMMENT ON COLUMN writeguard.rate_budgets.rows_left IS 'rows that may still be written now';
COMMENT ON COLUMN writeguard.rate_budgets.full_at IS 'when all rows have come back';

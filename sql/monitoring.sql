CREATE FUNCTION writeguard.event_numbers()
    RETURNS TABLE (kind text, policy text, events bigint)
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'writeguard_event_numbers';
COMMENT ON FUNCTION writeguard.event_numbers IS 'the rows of writeguard.event_totals';

CREATE VIEW writeguard.event_totals AS
    SELECT n.kind, n.policy, n.events FROM writeguard.event_numbers() AS n;
COMMENT ON VIEW writeguard.event_totals IS 'events of this database since the server started, also those that are not stored one by one; for monitoring';
COMMENT ON COLUMN writeguard.event_totals.policy IS 'NULL: all events of that kind, of policies or not';

CREATE FUNCTION writeguard.rate_numbers()
    RETURNS TABLE (policy text, login text, rate_rows bigint, rows_left bigint, full_at timestamptz)
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'writeguard_rate_numbers';
COMMENT ON FUNCTION writeguard.rate_numbers IS 'the rows of writeguard.rate_budgets';

CREATE VIEW writeguard.rate_budgets AS
    SELECT n.policy, n.login, n.rate_rows, n.rows_left, n.full_at FROM writeguard.rate_numbers() AS n;
COMMENT ON VIEW writeguard.rate_budgets IS 'rates of this database that are not full: rows that a login may still write, and when all have come back';

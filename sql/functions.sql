CREATE FUNCTION writeguard.set_policy(
    name                     text,
    tables                   text[] DEFAULT '{*.*}',
    roles                    text[] DEFAULT '{public}',
    application              text DEFAULT NULL,
    client                   cidr DEFAULT NULL,
    schedule                 text DEFAULT NULL,
    operations               text[] DEFAULT '{update,delete,truncate}',
    max_rows                 bigint DEFAULT NULL,
    max_rows_per_transaction bigint DEFAULT NULL,
    rate_rows                bigint DEFAULT NULL,
    rate_interval            interval DEFAULT '1 hour',
    max_fraction             double precision DEFAULT NULL,
    require_where            boolean DEFAULT false,
    require_transaction      boolean DEFAULT false,
    mode                     text DEFAULT 'enforce',
    override                 text DEFAULT 'token',
    approvers                text DEFAULT NULL,
    min_approvals            integer DEFAULT 1,
    undo                     interval DEFAULT NULL,
    comment                  text DEFAULT NULL,
    samples                  boolean DEFAULT true
) RETURNS text
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'writeguard_set_policy';
COMMENT ON FUNCTION writeguard.set_policy IS 'creates or replaces a policy; gives created, changed or unchanged; WG007 for a wrong value';

CREATE FUNCTION writeguard.drop_policy(name text) RETURNS void
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'writeguard_drop_policy';
COMMENT ON FUNCTION writeguard.drop_policy IS 'drops a policy; WG007 when there is none of that name';

CREATE FUNCTION writeguard.in_schedule(schedule text, at timestamptz DEFAULT now()) RETURNS boolean
    LANGUAGE c STABLE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'writeguard_in_schedule';
COMMENT ON FUNCTION writeguard.in_schedule IS 'whether a policy with that schedule is in force at that time; WG007 for a malformed one';

CREATE FUNCTION writeguard.explain(relation oid, role text, operation text) RETURNS json
    LANGUAGE c STABLE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'writeguard_explain';
COMMENT ON FUNCTION writeguard.explain IS 'the rows of effective() as JSON';

CREATE FUNCTION writeguard.effective("table" regclass, role name, operation text)
    RETURNS TABLE (
        policy                   text,
        applies                  boolean,
        set_aside_by             text,
        max_rows                 bigint,
        max_rows_per_transaction bigint,
        rate_rows                bigint,
        rate_interval            interval,
        max_fraction             double precision,
        require_where            boolean,
        require_transaction      boolean,
        mode                     text,
        override                 text
    )
    LANGUAGE sql STABLE PARALLEL UNSAFE
    SET search_path = pg_catalog, pg_temp
    AS $$
        SELECT e.policy, e.applies, e.set_aside_by, e.max_rows, e.max_rows_per_transaction, e.rate_rows,
               e.rate_interval, e.max_fraction, e.require_where, e.require_transaction, e.mode, e.override
        FROM pg_catalog.json_to_recordset(writeguard.explain("table"::pg_catalog.oid, role::pg_catalog.text, operation))
             AS e (policy text, applies boolean, set_aside_by text, max_rows bigint, max_rows_per_transaction bigint,
                   rate_rows bigint, rate_interval interval, max_fraction double precision, require_where boolean,
                   require_transaction boolean, mode text, override text)
        ORDER BY e.applies DESC, e.policy
    $$;
COMMENT ON FUNCTION writeguard.effective IS 'the policies that cover a table for a role and an operation, and which of them apply';

CREATE FUNCTION writeguard.login() RETURNS text
    LANGUAGE c STABLE PARALLEL RESTRICTED
    AS 'MODULE_PATHNAME', 'writeguard_login';
COMMENT ON FUNCTION writeguard.login IS 'who authenticated this connection';

CREATE FUNCTION writeguard.statement_hash(statement text, parameters text[] DEFAULT '{}') RETURNS text
    LANGUAGE c IMMUTABLE PARALLEL SAFE
    AS 'MODULE_PATHNAME', 'writeguard_statement_hash';
COMMENT ON FUNCTION writeguard.statement_hash IS 'SHA-256 of a statement without surrounding blanks and final semicolon, and of its parameters';

CREATE FUNCTION writeguard.queue_counters() RETURNS bigint[]
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'writeguard_queue_counters';
COMMENT ON FUNCTION writeguard.queue_counters IS 'the numbers of writeguard.event_queue';

CREATE VIEW writeguard.event_queue AS
    SELECT c.n[1] AS waiting, c.n[2] AS stored, c.n[3] AS late, c.n[4] AS in_log_only, c.n[5] AS summed_up,
           c.n[6] AS set_aside, c.n[7] AS unsent
    FROM (SELECT writeguard.queue_counters() AS n) AS c;
COMMENT ON VIEW writeguard.event_queue IS 'since the server started, in all databases: events that wait, were stored, were late for their error, are in the server log only; were told of as a number only; that the table did not take; and how often notifications could not be sent';

CREATE FUNCTION writeguard.rate_counters() RETURNS bigint[]
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'writeguard_rate_counters';
COMMENT ON FUNCTION writeguard.rate_counters IS 'the numbers of writeguard.rate_slots';

CREATE VIEW writeguard.rate_slots AS
    SELECT c.n[1] AS slots, c.n[2] AS used, c.n[3] AS refused
    FROM (SELECT writeguard.rate_counters() AS n) AS c;
COMMENT ON VIEW writeguard.rate_slots IS 'in all databases: rates there is room for, those that are not full, and writes since the server started that found no room';

CREATE VIEW writeguard.my_events WITH (security_barrier) AS
    SELECT * FROM writeguard.event WHERE login = writeguard.login();
COMMENT ON VIEW writeguard.my_events IS 'the events of one''s own login';

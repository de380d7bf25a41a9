COMMENT ON TABLE writeguard.policy IS 'Row limits; written through set_policy() and drop_policy()';
COMMENT ON COLUMN writeguard.policy.name IS 'by which errors and events call it';
COMMENT ON COLUMN writeguard.policy.tables IS 'schema.table, * as wildcard outside quotes';
COMMENT ON COLUMN writeguard.policy.roles IS 'role names; a role covers its members, public is everybody';
COMMENT ON COLUMN writeguard.policy.application IS 'LIKE pattern on application_name; NULL: any';
COMMENT ON COLUMN writeguard.policy.client IS 'network of the client''s address; NULL: any';
COMMENT ON COLUMN writeguard.policy.schedule IS 'when the policy is in force, such as Mon-Fri 18:00-08:00 Europe/Berlin; NULL: always';
COMMENT ON COLUMN writeguard.policy.operations IS 'update, delete, truncate, drop';
COMMENT ON COLUMN writeguard.policy.max_rows IS 'rows per statement; 0 is not one row, NULL is no limit';
COMMENT ON COLUMN writeguard.policy.max_rows_per_transaction IS 'rows per transaction; NULL is no limit';
COMMENT ON COLUMN writeguard.policy.rate_rows IS 'rows in rate_interval, over all sessions of one login; NULL is no limit';
COMMENT ON COLUMN writeguard.policy.rate_interval IS 'in which rate_rows come back, evenly';
COMMENT ON COLUMN writeguard.policy.max_fraction IS 'of each table''s rows as its size says now, never below 10 rows; NULL is no limit';
COMMENT ON COLUMN writeguard.policy.require_where IS 'refuse an UPDATE or DELETE that scans the whole table with nothing to narrow it';
COMMENT ON COLUMN writeguard.policy.require_transaction IS 'more than one row only inside a transaction block';
COMMENT ON COLUMN writeguard.policy.mode IS 'past a limit: observe (record), warn (record and WARNING), enforce (refuse)';
COMMENT ON COLUMN writeguard.policy.override IS 'what lifts the policy: never, flag (writeguard.override), token (flag and approval token)';
COMMENT ON COLUMN writeguard.policy.approvers IS 'role whose members may approve; NULL: whoever may call approve()';
COMMENT ON COLUMN writeguard.policy.min_approvals IS 'distinct people who must approve';
COMMENT ON COLUMN writeguard.policy.undo IS 'how long the rows of an overridden write are kept as they were; NULL: not at all';
COMMENT ON COLUMN writeguard.policy.comment IS 'for people';
COMMENT ON COLUMN writeguard.policy.samples IS 'whether requests show some rows of these tables, before and after';

CREATE OR REPLACE FUNCTION writeguard.set_policy(
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
    SET intervalstyle = 'postgres'
    SET extra_float_digits = 1
    AS 'MODULE_PATHNAME', 'writeguard_set_policy';
COMMENT ON FUNCTION writeguard.set_policy IS 'creates or replaces a policy; gives created, changed or unchanged; WG007 for a wrong value';

-- The search_path stays the caller's, as with import_policies.
CREATE OR REPLACE FUNCTION writeguard.alter_policy(name text, changes jsonb) RETURNS text
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    SET intervalstyle = 'postgres'
    SET extra_float_digits = 1
    AS 'MODULE_PATHNAME', 'writeguard_alter_policy';
COMMENT ON FUNCTION writeguard.alter_policy IS 'changes the named columns of a policy, null: back to the default; gives changed or unchanged; WG007 for a wrong value or key and when there is none of that name';

CREATE OR REPLACE FUNCTION writeguard.drop_policy(name text) RETURNS void
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'writeguard_drop_policy';
COMMENT ON FUNCTION writeguard.drop_policy IS 'drops a policy; WG007 when there is none of that name';

CREATE OR REPLACE FUNCTION writeguard.in_schedule(schedule text, at timestamptz DEFAULT now()) RETURNS boolean
    LANGUAGE c STABLE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'writeguard_in_schedule';
COMMENT ON FUNCTION writeguard.in_schedule IS 'whether a policy with that schedule is in force at that time; WG007 for a malformed one';

CREATE OR REPLACE FUNCTION writeguard._explain(relation oid, role text, operation text) RETURNS json
    LANGUAGE c STABLE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'writeguard_explain';
COMMENT ON FUNCTION writeguard._explain IS 'internal: the rows of effective() as JSON';

CREATE OR REPLACE FUNCTION writeguard.effective("table" regclass, role name, operation text)
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
        FROM pg_catalog.json_to_recordset(writeguard._explain("table"::pg_catalog.oid, role::pg_catalog.text, operation))
             AS e (policy text, applies boolean, set_aside_by text, max_rows bigint, max_rows_per_transaction bigint,
                   rate_rows bigint, rate_interval interval, max_fraction double precision, require_where boolean,
                   require_transaction boolean, mode text, override text)
        ORDER BY e.applies DESC, e.policy
    $$;
COMMENT ON FUNCTION writeguard.effective IS 'the policies that cover a table for a role and an operation, and which of them apply';

-- Values print the same whatever the session's settings are, and a number comes back as it was.
CREATE OR REPLACE FUNCTION writeguard.export_policies() RETURNS jsonb
    LANGUAGE sql STABLE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    SET intervalstyle = 'postgres'
    SET extra_float_digits = 1
    AS $$
        SELECT coalesce(
            pg_catalog.jsonb_agg(pg_catalog.jsonb_strip_nulls(pg_catalog.to_jsonb(p)) ORDER BY p.name COLLATE pg_catalog."C"),
            '[]'::pg_catalog.jsonb)
        FROM writeguard.policy AS p
    $$;
COMMENT ON FUNCTION writeguard.export_policies IS 'all policies as one document: an array of objects, by name, without the columns that are NULL';

-- The search_path stays the caller's: an unqualified name in the document is looked up as set_policy looks it up.
CREATE OR REPLACE FUNCTION writeguard.import_policies(
    document jsonb,
    prune    boolean DEFAULT false,
    dry_run  boolean DEFAULT false
) RETURNS TABLE (name text, action text, difference jsonb)
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    SET intervalstyle = 'postgres'
    SET extra_float_digits = 1
    AS 'MODULE_PATHNAME', 'writeguard_import_policies';
COMMENT ON FUNCTION writeguard.import_policies IS 'sets the policies of a document, all or none; prune drops all others, dry_run changes nothing; WG007 for a wrong value or key';

COMMENT ON TABLE writeguard.policy IS 'Row limits; written through set_policy() and drop_policy()';
COMMENT ON COLUMN writeguard.policy.name IS 'by which errors and events call it';
COMMENT ON COLUMN writeguard.policy.tables IS 'schema.table, * as wildcard outside quotes';
COMMENT ON COLUMN writeguard.policy.roles IS 'role names; a role covers its members, public is everybody';
COMMENT ON COLUMN writeguard.policy.application IS 'LIKE pattern on application_name; NULL: any';
COMMENT ON COLUMN writeguard.policy.client IS 'network of the client''s address; NULL: any';
COMMENT ON COLUMN writeguard.policy.schedule IS 'when the policy is in force, such as Mon-Fri 18:00-08:00 Europe/Berlin, or on days of the month, or dates; NULL: always';
COMMENT ON COLUMN writeguard.policy.operations IS 'update, delete, truncate, drop';
COMMENT ON COLUMN writeguard.policy.max_rows IS 'rows per statement; 0 is not one row, NULL is no limit';
COMMENT ON COLUMN writeguard.policy.max_rows_per_transaction IS 'rows per transaction; NULL is no limit';
COMMENT ON COLUMN writeguard.policy.rate_rows IS 'rows in rate_interval, over all sessions of one login; NULL is no limit';
COMMENT ON COLUMN writeguard.policy.rate_interval IS 'in which rate_rows come back, evenly';
COMMENT ON COLUMN writeguard.policy.max_fraction IS 'of each table''s rows as its size says now, never below 10 rows; NULL is no limit';
COMMENT ON COLUMN writeguard.policy.require_where IS 'true: refuse an UPDATE or DELETE that scans the whole table with nothing to narrow it; false: say that none is needed; NULL: say nothing';
COMMENT ON COLUMN writeguard.policy.require_transaction IS 'true: more than one row only inside a transaction block; false: say that none is needed; NULL: say nothing';
COMMENT ON COLUMN writeguard.policy.mode IS 'past a limit: observe (record), warn (record and WARNING), enforce (refuse); or exempt: no limits, and those of less specific policies are set aside';
COMMENT ON COLUMN writeguard.policy.override IS 'what lifts the policy: never, flag (writeguard.override), token (flag and approval token)';
COMMENT ON COLUMN writeguard.policy.approvers IS 'role whose members may approve; NULL: whoever may call approve()';
COMMENT ON COLUMN writeguard.policy.min_approvals IS 'distinct people who must approve';
COMMENT ON COLUMN writeguard.policy.undo IS 'how long the rows of an overridden write are kept as they were; NULL: not at all';
COMMENT ON COLUMN writeguard.policy.comment IS 'for people';
COMMENT ON COLUMN writeguard.policy.samples IS 'whether requests show some rows of these tables, before and after';
COMMENT ON COLUMN writeguard.policy.always IS 'no other policy sets its limits aside';
COMMENT ON COLUMN writeguard.policy.columns IS 'only updates that assign one of these columns count; NULL: all';
COMMENT ON COLUMN writeguard.policy.same_rows IS 'an approval of what this policy refuses is bound to which rows they are; false: to their number alone';

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
    require_where            boolean DEFAULT NULL,
    require_transaction      boolean DEFAULT NULL,
    mode                     text DEFAULT 'enforce',
    override                 text DEFAULT 'token',
    approvers                text DEFAULT NULL,
    min_approvals            integer DEFAULT 1,
    undo                     interval DEFAULT NULL,
    comment                  text DEFAULT NULL,
    samples                  boolean DEFAULT true,
    always                   boolean DEFAULT false,
    columns                  text[] DEFAULT NULL,
    same_rows                boolean DEFAULT true
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
    AS 'MODULE_PATHNAME', 'writeguard_effective';
COMMENT ON FUNCTION writeguard._explain IS 'internal: the rows of effective() as JSON';

CREATE OR REPLACE FUNCTION writeguard.effective("table" regclass, role name DEFAULT NULL, operation text DEFAULT NULL)
    RETURNS TABLE (
        operation     text,
        policy        text,
        "limit"       text,
        value         text,
        applies       boolean,
        why_not       text,
        strictest     boolean,
        mode          text,
        override      text,
        approvers     text,
        min_approvals integer
    )
    LANGUAGE sql STABLE PARALLEL UNSAFE
    SET search_path = pg_catalog, pg_temp
    AS $$
        SELECT e.operation, e.policy, e."limit", e.value, e.applies, e.why_not, e.strictest, e.mode, e.override,
               e.approvers, e.min_approvals
        FROM pg_catalog.json_to_recordset(
                 writeguard._explain("table"::pg_catalog.oid, role::pg_catalog.text, effective.operation))
             AS e (operation text, policy text, "limit" text, value text, applies boolean, why_not text,
                   strictest boolean, mode text, override text, approvers text, min_approvals integer)
        ORDER BY pg_catalog.array_position('{update,delete,truncate,drop}', e.operation),
                 pg_catalog.array_position('{max_rows,max_rows_per_transaction,rate,max_fraction,require_where,require_transaction}',
                                           e."limit"),
                 e.applies DESC, e.strictest DESC, e.policy
    $$;
COMMENT ON FUNCTION writeguard.effective IS 'each limit of the policies that cover a table for a role (NULL: the caller) and an operation (NULL: each): whether it applies, or why not, and the strictest of each';

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

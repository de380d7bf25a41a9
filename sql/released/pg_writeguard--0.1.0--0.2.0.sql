-- From the first release to 0.2.0: policies that only look on, undo, statistics, numbers for monitoring.

-- Nothing that somebody made in the schema has a part in what follows.
SET LOCAL search_path = pg_catalog, pg_temp;

-- Policies before events, as whoever changes or approves something locks them.
ALTER TABLE writeguard.policy ADD COLUMN samples boolean NOT NULL DEFAULT true;
COMMENT ON COLUMN writeguard.policy.samples IS 'whether requests show some rows of these tables, before and after';
COMMENT ON COLUMN writeguard.policy.mode IS 'past a limit: observe (record), warn (record and WARNING), enforce (refuse)';

-- Events.
CREATE INDEX event_policy ON writeguard.event (policy, id);
CREATE INDEX event_relation ON writeguard.event (relation, id);
COMMENT ON COLUMN writeguard.event.kind IS 'blocked, warned, observed, overridden, expectation_failed, requested, approved, rejected, revoked, token_refused, break_glass, undone, policy_changed, uncovered, disabled';
COMMENT ON COLUMN writeguard.event.rows IS 'of a refusal: limit + 1, NULL where no number was refused; of an override or a failed expectation: all rows of the statement; observed or warned: all rows in the scope';

-- With one argument more it is another function; what a DBA has granted on it is granted on that, further down.
ALTER FUNCTION writeguard.set_policy(text, text[], text[], text, cidr, text, text[], bigint, bigint, bigint, interval,
                                     double precision, boolean, boolean, text, text, text, integer, interval, text)
    RENAME TO set_policy_0_1_0;
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

CREATE OR REPLACE VIEW writeguard.event_queue AS
    SELECT c.n[1] AS waiting, c.n[2] AS stored, c.n[3] AS late, c.n[4] AS in_log_only, c.n[5] AS summed_up
    FROM (SELECT writeguard.queue_counters() AS n) AS c;
COMMENT ON VIEW writeguard.event_queue IS 'since the server started, in all databases: events that wait, were stored, were late for their error, found no room; were told of as a number only';

-- Statistics.
CREATE FUNCTION writeguard.stat_numbers()
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
COMMENT ON FUNCTION writeguard.stat_numbers IS 'the rows of writeguard.stat';

CREATE VIEW writeguard.stat AS
    SELECT n.relation, n.role, n.operation, n.statements, n.rows, n.largest, n.refused, n.overridden, n.histogram
    FROM writeguard.stat_numbers() AS n;
COMMENT ON VIEW writeguard.stat IS 'what statements changed in tables that a policy covers, in this database since stat_reset()';
COMMENT ON COLUMN writeguard.stat.relation IS 'qualified name; of a partition, that of the whole tree';
COMMENT ON COLUMN writeguard.stat.role IS 'the role that is SET, else session_user';
COMMENT ON COLUMN writeguard.stat.statements IS 'those that changed a row, whatever became of it';
COMMENT ON COLUMN writeguard.stat.largest IS 'rows of the largest statement';
COMMENT ON COLUMN writeguard.stat.histogram IS 'statements by rows: 1, 2 to 3, 4 to 7, 8 to 15, and so on';

CREATE FUNCTION writeguard.stat_reset() RETURNS void
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'writeguard_stat_reset';
COMMENT ON FUNCTION writeguard.stat_reset IS 'forgets the statistics of this database';

CREATE FUNCTION writeguard.stat_counters()
    RETURNS TABLE (slots bigint, used bigint, evicted bigint, stored_at timestamptz)
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'writeguard_stat_counters';
COMMENT ON FUNCTION writeguard.stat_counters IS 'the row of writeguard.stat_slots';

CREATE VIEW writeguard.stat_slots AS
    SELECT c.slots, c.used, c.evicted, c.stored_at FROM writeguard.stat_counters() AS c;
COMMENT ON VIEW writeguard.stat_slots IS 'in all databases: statistics there is room for, those in use, those that lost their numbers to others since the server started, and when they were last written to disk';

CREATE FUNCTION writeguard.suggest_policies(headroom double precision DEFAULT 2)
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

-- Numbers for monitoring.
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

-- Undo.
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

-- One row per statement, relation and operation.
CREATE TABLE writeguard.change_relation (
    change    bigint NOT NULL REFERENCES writeguard.change_statement ON DELETE CASCADE,
    relation  oid NOT NULL,
    name      text NOT NULL,
    operation text NOT NULL,
    rows      bigint NOT NULL,
    bytes     bigint NOT NULL,
    columns   jsonb,
    PRIMARY KEY (change, relation, operation)
);
COMMENT ON TABLE writeguard.change_relation IS 'How many rows of which tables a statement changed';
COMMENT ON COLUMN writeguard.change_relation.relation IS 'the table, for a partition the one at the top of its tree';
COMMENT ON COLUMN writeguard.change_relation.name IS 'its qualified name when it was changed';
COMMENT ON COLUMN writeguard.change_relation.bytes IS 'of the kept rows, as text';
COMMENT ON COLUMN writeguard.change_relation.columns IS 'numbers of its columns by the names that the images have';

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

CREATE FUNCTION writeguard.undo(change bigint, on_conflict text DEFAULT 'error', dry_run boolean DEFAULT false)
    RETURNS TABLE (relation text, restored bigint, conflicts bigint)
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'writeguard_undo';
COMMENT ON FUNCTION writeguard.undo IS 'puts back the rows and columns that a change took, unless they were changed again since: WG009, or they stay as they are (skip)';

CREATE FUNCTION writeguard.undo_conflicts(change bigint)
    RETURNS TABLE (relation text, key jsonb, was jsonb, wrote jsonb, is_now jsonb)
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'writeguard_undo_conflicts';
COMMENT ON FUNCTION writeguard.undo_conflicts IS 'the rows of a change that were changed again since: as they were before it, as it left them, as they are now';

-- What is wrong with an installation.
CREATE OR REPLACE FUNCTION writeguard.check_setup()
    RETURNS TABLE (severity text, subject text, problem text, fix text)
    LANGUAGE sql STABLE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    AS $$
        WITH facts AS MATERIALIZED (
            SELECT f.*, pg_catalog.pg_is_in_recovery() AS standby
            FROM pg_catalog.jsonb_to_record(writeguard.setup_facts())
                 AS f (preloaded boolean, library text, late bigint, in_log_only bigint, waiting_since timestamptz,
                       policies jsonb, looking_on jsonb, stat_evicted bigint, stat_behind bigint)
        ),
        settings AS MATERIALIZED (
            SELECT s.name, s.setting, s.reset_val, s.source, s.pending_restart FROM pg_catalog.pg_settings AS s
        ),
        -- As JSON, because the table may lack a column and this function is to say so.
        policies AS MATERIALIZED (
            SELECT p.columns ->> 'name' AS name, p.columns -> 'roles' AS roles, p.columns ->> 'approvers' AS approvers,
                   p.columns ->> 'override' AS override, (p.columns ->> 'min_approvals')::pg_catalog.int4 AS min_approvals
            FROM (SELECT pg_catalog.to_jsonb(t) AS columns FROM writeguard.policy AS t) AS p
        ),
        -- writeguard.enabled as roles and databases have it set; what is not clearly on may be off.
        switched AS (
            SELECT d.setrole, d.setdatabase, r.rolname, b.datname
            FROM pg_catalog.pg_db_role_setting AS d
                 CROSS JOIN pg_catalog.unnest(d.setconfig) AS c (line)
                 LEFT JOIN pg_catalog.pg_roles AS r ON r.oid = d.setrole
                 LEFT JOIN pg_catalog.pg_database AS b ON b.oid = d.setdatabase
            WHERE c.line ~* '^writeguard\.enabled='
              AND c.line !~* '=(on|t(r(ue?)?)?|y(es?)?|1)$'
              AND (d.setdatabase = 0 OR b.datname = pg_catalog.current_database())
        ),
        found (severity, subject, problem, fix) AS (

        -- The library.
            SELECT 'problem', 'shared_preload_libraries',
                   'the library is not preloaded, so no write is counted and none refused',
                   CASE WHEN s.pending_restart THEN '-- restart the server'
                   ELSE pg_catalog.format('ALTER SYSTEM SET shared_preload_libraries = %s; -- and restart the server', (
                       SELECT pg_catalog.string_agg(pg_catalog.quote_literal(l.name), ', ' ORDER BY l.place)
                       FROM pg_catalog.regexp_split_to_table(s.setting || ',pg_writeguard', '\s*,\s*')
                                WITH ORDINALITY AS w (word, place)
                            CROSS JOIN LATERAL (SELECT pg_catalog.btrim(w.word, ' "'), w.place) AS l (name, place)
                       WHERE l.name <> ''))
                   END
            FROM facts AS f CROSS JOIN settings AS s
            WHERE NOT f.preloaded AND s.name = 'shared_preload_libraries'
        UNION ALL
            SELECT 'warning', 'library',
                   pg_catalog.format('the server runs version %s of the library, and version %s is installed',
                                     f.library, v.default_version),
                   '-- restart the server'
            FROM facts AS f CROSS JOIN pg_catalog.pg_available_extensions AS v
            WHERE v.name = 'pg_writeguard' AND v.default_version <> f.library
        UNION ALL
            SELECT 'warning', 'extension',
                   pg_catalog.format('the extension in this database is of version %s, the library of version %s',
                                     e.extversion, f.library),
                   pg_catalog.format('ALTER EXTENSION pg_writeguard UPDATE TO %L;', f.library)
            FROM facts AS f CROSS JOIN pg_catalog.pg_extension AS e
            WHERE e.extname = 'pg_writeguard' AND e.extversion <> f.library
        UNION ALL
            SELECT 'problem', pg_catalog.format('trigger %I on %s', t.tgname, t.tgrelid::pg_catalog.regclass),
                   'it does not fire in every session',
                   pg_catalog.format('ALTER TABLE %s ENABLE ALWAYS TRIGGER %I;', t.tgrelid::pg_catalog.regclass, t.tgname)
            FROM pg_catalog.pg_trigger AS t JOIN pg_catalog.pg_class AS c ON c.oid = t.tgrelid
            WHERE c.relnamespace = 'writeguard'::pg_catalog.regnamespace
              AND t.tgname IN ('owner_only', 'policy_changed') AND t.tgenabled <> 'A'

        -- Events.
        UNION ALL
            SELECT 'problem', 'launcher', 'the worker that stores events does not run',
                   pg_catalog.format('ALTER SYSTEM SET max_worker_processes = %s; -- and restart the server',
                                     s.setting::pg_catalog.int4 + 8)
            FROM facts AS f CROSS JOIN settings AS s
            WHERE f.preloaded AND NOT f.standby AND s.name = 'max_worker_processes'
              AND NOT EXISTS (SELECT FROM pg_catalog.pg_stat_activity AS a
                              WHERE a.backend_type = 'pg_writeguard launcher')
        UNION ALL
            SELECT 'problem', 'event queue',
                   pg_catalog.format('an event of %s still waits to be stored; the server log says why, or somebody has locked the table',
                                     f.waiting_since),
                   'SELECT pid, mode FROM pg_catalog.pg_locks WHERE relation = ''writeguard.event''::regclass;'
            FROM facts AS f
            WHERE f.waiting_since < pg_catalog.clock_timestamp() - interval '10 seconds'
        UNION ALL
            SELECT 'warning', 'event queue',
                   pg_catalog.format('%s events since the server started are in the server log only', f.in_log_only),
                   pg_catalog.format('ALTER SYSTEM SET writeguard.event_queue_size = ''%skB''; -- and restart the server',
                                     2 * s.setting::pg_catalog.int8)
            FROM facts AS f CROSS JOIN settings AS s
            WHERE f.in_log_only > 0 AND s.name = 'writeguard.event_queue_size'
        UNION ALL
            SELECT 'note', 'event queue',
                   pg_catalog.format('%s refusals since the server started went out before their event was stored', f.late),
                   'SELECT * FROM writeguard.event_queue; -- and see writeguard.event_timeout'
            FROM facts AS f WHERE f.late > 0
        UNION ALL
            SELECT 'warning', 'writeguard.stat_entries',
                   pg_catalog.format('%s statistics since the server started lost their numbers, because there is no room for all of them',
                                     f.stat_evicted),
                   pg_catalog.format('ALTER SYSTEM SET writeguard.stat_entries = %s; -- and restart the server',
                                     2 * s.setting::pg_catalog.int8)
            FROM facts AS f CROSS JOIN settings AS s
            WHERE f.stat_evicted > 0 AND s.name = 'writeguard.stat_entries'
        UNION ALL
            SELECT 'warning', 'statistics',
                   pg_catalog.format('they were last written to disk %s minutes ago; the server log says why', f.stat_behind / 60),
                   'SELECT pid, wait_event FROM pg_catalog.pg_stat_activity WHERE backend_type = ''pg_writeguard launcher'';'
            FROM facts AS f
            WHERE f.stat_behind > 300 AND NOT f.standby
        UNION ALL
            SELECT 'warning', 'writeguard.event_queue_size',
                   pg_catalog.format('not all of %s sessions can have an event in the queue at the same time', m.setting),
                   pg_catalog.format('ALTER SYSTEM SET writeguard.event_queue_size = ''%skB''; -- and restart the server',
                                     2 * m.setting::pg_catalog.int8)
            FROM settings AS s CROSS JOIN settings AS m
            WHERE s.name = 'writeguard.event_queue_size' AND m.name = 'max_connections'
              AND s.setting::pg_catalog.int8 < m.setting::pg_catalog.int8
        UNION ALL
            SELECT 'warning', 'log_min_messages', 'events are not written to the server log',
                   'ALTER SYSTEM SET log_min_messages = ''warning''; SELECT pg_catalog.pg_reload_conf();'
            FROM settings AS s WHERE s.name = 'log_min_messages' AND s.setting IN ('fatal', 'panic')
        UNION ALL
            SELECT 'warning', 'track_counts',
                   'it is off: a row that moves to another partition and is kept out there by a trigger is not counted',
                   'ALTER SYSTEM SET track_counts = on; SELECT pg_catalog.pg_reload_conf();'
            FROM settings AS s WHERE s.name = 'track_counts' AND s.setting = 'off'

        -- Policies.
        UNION ALL
            SELECT CASE p.defect WHEN 'pattern' THEN 'warning' ELSE 'problem' END,
                   CASE p.defect WHEN 'unreadable' THEN 'policies' ELSE pg_catalog.format('policy %I', p.policy) END,
                   CASE p.defect
                       WHEN 'unreadable' THEN p.reason || '; every write is refused'
                       WHEN 'broken' THEN 'it cannot be read: ' || p.reason || '; every write is refused'
                       WHEN 'pattern' THEN pg_catalog.format('no table matches %s', p.element)
                       WHEN 'undo' THEN pg_catalog.format('%s %s, so writes past its limits are refused: undo could not put them back',
                                                          p.element, p.reason)
                       ELSE pg_catalog.format('%s %s', p.element, p.reason)
                   END,
                   CASE p.defect WHEN 'unreadable' THEN 'ALTER EXTENSION pg_writeguard UPDATE;'
                   WHEN 'undo' THEN CASE p.reason
                       WHEN 'has no primary key' THEN pg_catalog.format('ALTER TABLE %s ADD PRIMARY KEY (...);', p.element)
                       ELSE pg_catalog.format('SELECT writeguard.set_policy(%L, ...); -- without it, or undo => NULL', p.policy) END
                   ELSE pg_catalog.format('SELECT writeguard.drop_policy(%L);', p.policy)
                        || CASE p.defect WHEN 'broken' THEN '' ELSE ' -- or set_policy with other tables' END
                   END
            FROM facts AS f CROSS JOIN pg_catalog.jsonb_to_recordset(f.policies)
                 AS p (policy text, defect text, element text, reason text)
        UNION ALL
            SELECT 'problem', pg_catalog.format('policy %I', p.name), pg_catalog.format('role %I does not exist', r.name),
                   pg_catalog.format('SELECT writeguard.drop_policy(%L); -- or set_policy with other roles', p.name)
            FROM policies AS p CROSS JOIN pg_catalog.jsonb_array_elements_text(p.roles) AS r (name)
            WHERE r.name <> 'public' AND NOT EXISTS (SELECT FROM pg_catalog.pg_roles AS known WHERE known.rolname = r.name)
        UNION ALL
            SELECT 'problem', pg_catalog.format('policy %I', p.name),
                   pg_catalog.format('role %I of its approvers does not exist, so nobody can approve', p.approvers),
                   pg_catalog.format('CREATE ROLE %I;', p.approvers)
            FROM policies AS p
            WHERE p.approvers IS NOT NULL
              AND NOT EXISTS (SELECT FROM pg_catalog.pg_roles AS known WHERE known.rolname = p.approvers)
        UNION ALL
            SELECT 'problem', pg_catalog.format('policy %I', p.name),
                   pg_catalog.format('it asks for %s approvals%s; logins that can give one: %s', p.min_approvals,
                                     coalesce(pg_catalog.format(' by members of %I', p.approvers), ''), a.logins),
                   'GRANT EXECUTE ON FUNCTION writeguard.approve TO '
                   || coalesce(pg_catalog.quote_ident(p.approvers), '...') || ';'
            FROM policies AS p JOIN (
                SELECT asked.approvers, (
                    SELECT pg_catalog.count(*) FROM pg_catalog.pg_roles AS r
                    WHERE r.rolcanlogin AND writeguard.is_approver(r.oid, asked.approvers)
                      AND pg_catalog.has_function_privilege(r.oid, f.oid, 'EXECUTE')) AS logins
                FROM (SELECT DISTINCT p.approvers FROM policies AS p) AS asked
                     CROSS JOIN pg_catalog.pg_proc AS f
                WHERE f.pronamespace = 'writeguard'::pg_catalog.regnamespace AND f.proname = 'approve'
            ) AS a ON a.approvers IS NOT DISTINCT FROM p.approvers
            WHERE p.override = 'token' AND a.logins < p.min_approvals
              AND (p.approvers IS NULL
                   OR EXISTS (SELECT FROM pg_catalog.pg_roles AS known WHERE known.rolname = p.approvers))
        UNION ALL
            SELECT 'note', pg_catalog.format('policy %I', a.policy),
                   pg_catalog.format('with mode %s it refuses nothing, and on %s it sets policy %I aside, which would',
                                     a.mode, a.relation, a.aside),
                   pg_catalog.format('SELECT * FROM writeguard.effective(%L, CURRENT_USER, ''update'');', a.relation)
            FROM facts AS f CROSS JOIN pg_catalog.jsonb_to_recordset(f.looking_on)
                 AS a (policy text, mode text, aside text, relation text)
        UNION ALL
            SELECT 'note', 'policies', 'there is no policy, so nothing is limited',
                   'SELECT writeguard.set_policy(''orders-guard'', tables => ''{public.orders}'', max_rows => 100);'
            WHERE NOT EXISTS (SELECT FROM policies)

        -- The guard is switched off.
        UNION ALL
            SELECT 'problem', 'writeguard.enabled',
                   CASE WHEN w.setrole = 0 AND w.setdatabase = 0 THEN 'it is off for all roles'
                        WHEN w.setrole = 0 THEN pg_catalog.format('it is off for database %I', w.datname)
                        WHEN w.setdatabase = 0 THEN pg_catalog.format('it is off for role %I', w.rolname)
                        ELSE pg_catalog.format('it is off for role %I in database %I', w.rolname, w.datname) END,
                   CASE WHEN w.setrole = 0 AND w.setdatabase = 0 THEN 'ALTER ROLE ALL'
                        WHEN w.setrole = 0 THEN pg_catalog.format('ALTER DATABASE %I', w.datname)
                        WHEN w.setdatabase = 0 THEN pg_catalog.format('ALTER ROLE %I', w.rolname)
                        ELSE pg_catalog.format('ALTER ROLE %I IN DATABASE %I', w.rolname, w.datname) END
                   || ' RESET writeguard.enabled;'
            FROM switched AS w
        UNION ALL
            SELECT 'problem', 'writeguard.enabled', 'it is off for the whole server',
                   'ALTER SYSTEM SET writeguard.enabled = on; SELECT pg_catalog.pg_reload_conf();'
            FROM settings AS s
            WHERE s.name = 'writeguard.enabled' AND s.reset_val = 'off' AND s.source <> 'client'
              AND NOT EXISTS (SELECT FROM switched AS w WHERE w.setrole = 0 OR w.rolname = SESSION_USER)
        UNION ALL
            SELECT 'note', 'writeguard.enabled', 'it is off in this session', 'SET writeguard.enabled = on;'
            FROM settings AS s
            WHERE s.name = 'writeguard.enabled' AND s.setting = 'off' AND s.source IN ('client', 'session')

        -- Who could switch it off.
        UNION ALL
            SELECT 'note', pg_catalog.format('role %I', r.rolname), 'it is superuser and can switch the guard off',
                   pg_catalog.format('ALTER ROLE %I NOSUPERUSER;', r.rolname)
            FROM pg_catalog.pg_roles AS r
            -- The one that initdb made cannot be anything else.
            WHERE r.rolsuper AND r.oid <> 10
        UNION ALL
            SELECT 'warning', pg_catalog.format('role %I', m.rolname),
                   CASE WHEN g.rolsuper THEN pg_catalog.format('it can SET ROLE %I, who is superuser', g.rolname)
                        WHEN g.rolname = 'pg_create_subscription' THEN 'what it subscribes to is written past every limit'
                        ELSE pg_catalog.format('as a member of %I it can become superuser', g.rolname) END,
                   pg_catalog.format('REVOKE %I FROM %I;', g.rolname, m.rolname)
            FROM pg_catalog.pg_auth_members AS a
                 JOIN pg_catalog.pg_roles AS g ON g.oid = a.roleid
                 JOIN pg_catalog.pg_roles AS m ON m.oid = a.member
            WHERE NOT m.rolsuper
              AND (g.rolsuper
                   OR g.rolname IN ('pg_execute_server_program', 'pg_write_server_files', 'pg_create_subscription'))
            GROUP BY m.rolname, g.rolname, g.rolsuper
        UNION ALL
            SELECT 'warning', pg_catalog.format('role %I', r.rolname),
                   'with CREATEROLE it can join other roles, and so come under their policies',
                   pg_catalog.format('ALTER ROLE %I NOCREATEROLE;', r.rolname)
            FROM pg_catalog.pg_roles AS r
            WHERE r.rolcreaterole AND NOT r.rolsuper
              AND pg_catalog.current_setting('server_version_num')::pg_catalog.int4 < 160000
        UNION ALL
            SELECT CASE g.grantee WHEN 0 THEN 'problem' ELSE 'warning' END,
                   CASE g.grantee WHEN 0 THEN 'everybody' ELSE pg_catalog.format('role %I', r.rolname) END,
                   pg_catalog.format('%s ON PARAMETER %s is granted', g.privilege_type, a.parname),
                   pg_catalog.format('REVOKE %s ON PARAMETER %s FROM %s;', g.privilege_type, a.parname,
                                     CASE g.grantee WHEN 0 THEN 'PUBLIC' ELSE pg_catalog.quote_ident(r.rolname) END)
            FROM pg_catalog.pg_parameter_acl AS a CROSS JOIN pg_catalog.aclexplode(a.paracl) AS g
                 LEFT JOIN pg_catalog.pg_roles AS r ON r.oid = g.grantee
            WHERE a.parname IN ('writeguard.enabled', 'writeguard.pooled', 'shared_preload_libraries')
              AND r.rolsuper IS NOT TRUE
        UNION ALL
            SELECT 'warning', pg_catalog.format('role %I', r.rolname),
                   pg_catalog.format('it is not superuser and owns %s of the extension''s objects, such as %s',
                                     pg_catalog.count(*), pg_catalog.min(o.name)),
                   pg_catalog.string_agg(
                       pg_catalog.format('ALTER %s OWNER TO %I;', o.name, pg_catalog.pg_get_userbyid(10)), ' ' ORDER BY o.name)
            FROM (
                SELECT 'SCHEMA writeguard', n.nspowner FROM pg_catalog.pg_namespace AS n WHERE n.nspname = 'writeguard'
                UNION ALL
                SELECT pg_catalog.format('%s %s', CASE c.relkind WHEN 'v' THEN 'VIEW' ELSE 'TABLE' END,
                                         c.oid::pg_catalog.regclass), c.relowner
                FROM pg_catalog.pg_class AS c
                WHERE c.relnamespace = 'writeguard'::pg_catalog.regnamespace AND c.relkind IN ('r', 'v')
                UNION ALL
                SELECT pg_catalog.format('FUNCTION %s', p.oid::pg_catalog.regprocedure), p.proowner
                FROM pg_catalog.pg_proc AS p WHERE p.pronamespace = 'writeguard'::pg_catalog.regnamespace
            ) AS o (name, owner) JOIN pg_catalog.pg_roles AS r ON r.oid = o.owner
            WHERE NOT r.rolsuper
            GROUP BY r.rolname
        UNION ALL
            SELECT 'warning', pg_catalog.format('role %I', r.rolname),
                   'it is not superuser and owns the extension, so it can drop it',
                   pg_catalog.format('REASSIGN OWNED BY %I TO %I; -- moves all that it owns in this database',
                                     r.rolname, pg_catalog.pg_get_userbyid(10))
            FROM pg_catalog.pg_extension AS e JOIN pg_catalog.pg_roles AS r ON r.oid = e.extowner
            WHERE e.extname = 'pg_writeguard' AND NOT r.rolsuper
        UNION ALL
            SELECT CASE WHEN g.grantee <> 0 THEN 'note' WHEN c.policies OR c.alone THEN 'problem' ELSE 'warning' END,
                   CASE g.grantee WHEN 0 THEN 'everybody' ELSE pg_catalog.format('role %I', r.rolname) END,
                   pg_catalog.format('may call %s and so %s', p.oid::pg_catalog.regprocedure,
                       CASE WHEN p.proname = 'trust_key' THEN 'sign approvals with a key of its own'
                            WHEN c.policies THEN 'change the policies' WHEN c.alone THEN 'write past limits alone'
                            ELSE 'decide about requests' END),
                   pg_catalog.format('REVOKE EXECUTE ON FUNCTION %s FROM %s;', p.oid::pg_catalog.regprocedure,
                       CASE g.grantee WHEN 0 THEN 'PUBLIC' ELSE pg_catalog.quote_ident(r.rolname) END)
            FROM pg_catalog.pg_proc AS p
                 CROSS JOIN LATERAL (SELECT p.proname IN ('set_policy', 'drop_policy', 'import_policies', 'trust_key'),
                                            p.proname = 'break_glass') AS c (policies, alone)
                 CROSS JOIN LATERAL pg_catalog.aclexplode(
                     coalesce(p.proacl, pg_catalog.acldefault('f', p.proowner))) AS g
                 LEFT JOIN pg_catalog.pg_roles AS r ON r.oid = g.grantee
            WHERE p.pronamespace = 'writeguard'::pg_catalog.regnamespace
              AND (c.policies OR c.alone OR p.proname IN ('approve', 'reject', 'revoke') AND g.grantee = 0)
              AND g.grantee <> p.proowner AND r.rolsuper IS NOT TRUE
        )
        SELECT f.severity, f.subject, f.problem, f.fix FROM found AS f
        ORDER BY pg_catalog.array_position('{problem,warning,note}', f.severity), f.subject, f.problem
    $$;
COMMENT ON FUNCTION writeguard.check_setup IS 'what a DBA should know of this installation: severity (problem, warning, note), subject, problem, and the next command to type';

-- Privileges. What ALTER DEFAULT PRIVILEGES grants on new objects is not meant for these.
CREATE FUNCTION writeguard.revoke_default_privileges(names text[]) RETURNS void
    LANGUAGE c STRICT
    AS 'MODULE_PATHNAME', 'writeguard_revoke_default_privileges';
SELECT writeguard.revoke_default_privileges(
    '{set_policy,
      stat_numbers,stat,stat_reset,stat_counters,stat_slots,suggest_policies,
      event_numbers,event_totals,rate_numbers,rate_budgets,
      change_statement,change_statement_id_seq,change_relation,image,change,discard,undo,undo_conflicts}');
DROP FUNCTION writeguard.revoke_default_privileges(text[]);

REVOKE ALL ON FUNCTION
    writeguard.set_policy(text, text[], text[], text, cidr, text, text[], bigint, bigint, bigint, interval, double precision,
                          boolean, boolean, text, text, text, integer, interval, text, boolean),
    writeguard.stat_numbers(),
    writeguard.stat_reset(),
    writeguard.stat_counters(),
    writeguard.suggest_policies(double precision),
    writeguard.event_numbers(),
    writeguard.rate_numbers(),
    writeguard.discard(bigint),
    writeguard.undo(bigint, text, boolean),
    writeguard.undo_conflicts(bigint)
    FROM PUBLIC;
REVOKE ALL ON
    writeguard.stat, writeguard.stat_slots, writeguard.event_totals, writeguard.rate_budgets,
    writeguard.change_statement, writeguard.change_relation, writeguard.image, writeguard.change
    FROM PUBLIC;
GRANT SELECT ON writeguard.stat, writeguard.stat_slots TO pg_monitor;
GRANT EXECUTE ON FUNCTION writeguard.stat_numbers(), writeguard.stat_counters() TO pg_monitor;
GRANT SELECT ON writeguard.event_totals, writeguard.rate_budgets TO pg_monitor;
GRANT EXECUTE ON FUNCTION writeguard.event_numbers(), writeguard.rate_numbers() TO pg_monitor;

CREATE FUNCTION writeguard.carry_grants(before text, after text) RETURNS void
    LANGUAGE c STRICT
    AS 'MODULE_PATHNAME', 'writeguard_carry_grants';
SELECT writeguard.carry_grants(
    'writeguard.set_policy_0_1_0(text, text[], text[], text, cidr, text, text[], bigint, bigint, bigint, interval, double precision, boolean, boolean, text, text, text, integer, interval, text)',
    'writeguard.set_policy(text, text[], text[], text, cidr, text, text[], bigint, bigint, bigint, interval, double precision, boolean, boolean, text, text, text, integer, interval, text, boolean)');
DROP FUNCTION writeguard.carry_grants(text, text);
DROP FUNCTION writeguard.set_policy_0_1_0;

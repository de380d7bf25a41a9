CREATE OR REPLACE FUNCTION writeguard._setup_facts() RETURNS jsonb
    LANGUAGE c STABLE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'writeguard_setup_facts';
COMMENT ON FUNCTION writeguard._setup_facts IS 'internal: what only the library knows of its setup, as JSON; works without the preload too';

CREATE OR REPLACE FUNCTION writeguard.check_setup()
    RETURNS TABLE (severity text, subject text, problem text, fix text)
    LANGUAGE sql STABLE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    AS $$
        WITH facts AS MATERIALIZED (
            SELECT f.*, pg_catalog.pg_is_in_recovery() AS standby
            FROM pg_catalog.jsonb_to_record(writeguard._setup_facts())
                 AS f (preloaded boolean, library text, late bigint, in_log_only bigint, waiting_since timestamptz,
                       policies jsonb, stat_evicted bigint, stat_behind bigint, set_aside bigint,
                       unsent_since timestamptz, kept_worker boolean, starved bigint, unattached boolean, configured text)
        ),
        settings AS MATERIALIZED (
            SELECT s.name, s.setting, s.reset_val, s.source, s.pending_restart FROM pg_catalog.pg_settings AS s
        ),
        -- What the next start preloads: the files say it, unless something else does or they may not be read.
        preload AS MATERIALIZED (
            SELECT l.names, 'pg_writeguard' = ANY (l.names) AS has_it,
                   l.names[pg_catalog.cardinality(l.names)] = 'pg_writeguard' AS has_it_last,
                   pg_catalog.format('ALTER SYSTEM SET shared_preload_libraries = %s; -- and restart the server', (
                       SELECT pg_catalog.string_agg(pg_catalog.quote_literal(n.name), ', ' ORDER BY n.place)
                       FROM pg_catalog.unnest(pg_catalog.array_remove(l.names, 'pg_writeguard') || 'pg_writeguard'::text)
                                WITH ORDINALITY AS n (name, place))) AS command
            FROM facts AS f CROSS JOIN settings AS s
                 CROSS JOIN LATERAL (
                     SELECT ARRAY(SELECT pg_catalog.regexp_replace(w.name, '^(.*/)?pg_writeguard(\.so)?$', 'pg_writeguard')
                                  FROM pg_catalog.regexp_split_to_table(
                                           CASE WHEN s.source IN ('command line', 'environment variable') THEN s.setting
                                                ELSE coalesce(f.configured, s.setting) END, ',')
                                           WITH ORDINALITY AS c (word, place)
                                       CROSS JOIN LATERAL (SELECT pg_catalog.btrim(c.word, E' \t\n"')) AS w (name)
                                  WHERE w.name <> '' ORDER BY c.place)
                 ) AS l (names)
            WHERE s.name = 'shared_preload_libraries'
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
                   'the library is not preloaded, so no write is counted and none refused'
                   || CASE WHEN p.has_it THEN ' (pending restart)' ELSE '' END,
                   CASE WHEN p.has_it THEN '-- restart the server' ELSE p.command END
            FROM facts AS f CROSS JOIN preload AS p
            WHERE NOT f.preloaded AND f.unattached IS NOT TRUE
        UNION ALL
            SELECT 'problem', 'shared_preload_libraries',
                   'a library that is loaded after pg_writeguard does not call its shmem_startup_hook, so every covered write is refused'
                   || CASE WHEN p.has_it_last THEN ' (pending restart)' ELSE '' END,
                   CASE WHEN p.has_it_last THEN '-- restart the server' ELSE p.command END
            FROM facts AS f CROSS JOIN preload AS p
            WHERE f.unattached
        UNION ALL
            SELECT 'warning', 'shared_preload_libraries',
                   'the configuration does not name the library any more, so from the next restart on no write is counted and none refused (pending restart)',
                   p.command
            FROM facts AS f CROSS JOIN preload AS p
            WHERE f.preloaded AND NOT p.has_it
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
              AND t.tgname IN ('owner_only', 'policy_changed', 'policy_written', 'restore_begins', 'restore_ends') AND t.tgenabled <> 'A'

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
                   pg_catalog.format('%s events since the server started found no room and are in the server log only',
                                     f.in_log_only - f.set_aside),
                   pg_catalog.format('ALTER SYSTEM SET writeguard.event_queue_size = ''%skB''; -- and restart the server',
                                     2 * s.setting::pg_catalog.int8)
            FROM facts AS f CROSS JOIN settings AS s
            WHERE f.in_log_only > f.set_aside AND s.name = 'writeguard.event_queue_size'
        UNION ALL
            SELECT 'warning', 'event table',
                   pg_catalog.format('%s events since the server started could not be stored and are in the server log only, which says why: a trigger or a constraint on the table, say',
                                     f.set_aside),
                   'SELECT pg_catalog.pg_get_triggerdef(oid) FROM pg_catalog.pg_trigger WHERE tgrelid = ''writeguard.event''::regclass AND NOT tgisinternal;'
            FROM facts AS f WHERE f.set_aside > 0
        UNION ALL
            SELECT 'warning', 'notifications',
                   pg_catalog.format('those of this database could not be sent since %s; the server log says why, such as a session that LISTENs in an open transaction',
                                     f.unsent_since),
                   'SELECT pid, xact_start, query FROM pg_catalog.pg_stat_activity WHERE state LIKE ''idle in transaction%'' ORDER BY xact_start;'
            FROM facts AS f WHERE f.unsent_since IS NOT NULL
        UNION ALL
            SELECT 'warning', 'max_worker_processes',
                   CASE WHEN f.kept_worker
                       THEN pg_catalog.format('%s times since the server started no background worker slot was free for storing events, and the one worker that is kept ready did it alone',
                                              f.starved)
                       ELSE 'it has no room for the worker that is kept ready to store events: they wait while others have taken all slots' END,
                   pg_catalog.format('ALTER SYSTEM SET max_worker_processes = %s; -- and restart the server',
                                     s.setting::pg_catalog.int4 + 8)
            FROM facts AS f CROSS JOIN settings AS s
            WHERE f.preloaded AND NOT f.standby AND s.name = 'max_worker_processes'
              AND (f.starved > 0
                   OR NOT f.kept_worker AND EXISTS (
                       SELECT FROM pg_catalog.pg_stat_activity AS a
                       WHERE a.backend_type = 'pg_writeguard launcher'
                         AND a.backend_start < pg_catalog.clock_timestamp() - interval '5 seconds'))
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
                   pg_catalog.format('it asks for %s approval%s%s; logins that can give one: %s', p.min_approvals,
                                     CASE WHEN p.min_approvals OPERATOR(pg_catalog.<>) 1 THEN 's' ELSE '' END,
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
            SELECT CASE g.grantee WHEN 0 THEN 'problem' ELSE 'warning' END,
                   CASE g.grantee WHEN 0 THEN 'everybody' ELSE pg_catalog.format('role %I', r.rolname) END,
                   'may set up a replication origin, and what is written in such a session is not limited',
                   pg_catalog.format('REVOKE EXECUTE ON FUNCTION pg_catalog.%s FROM %s;', p.oid::pg_catalog.regprocedure,
                                     CASE g.grantee WHEN 0 THEN 'PUBLIC' ELSE pg_catalog.quote_ident(r.rolname) END)
            FROM pg_catalog.pg_proc AS p
                 CROSS JOIN LATERAL pg_catalog.aclexplode(
                     coalesce(p.proacl, pg_catalog.acldefault('f', p.proowner))) AS g
                 LEFT JOIN pg_catalog.pg_roles AS r ON r.oid = g.grantee
            WHERE p.pronamespace = 'pg_catalog'::pg_catalog.regnamespace
              AND p.proname = 'pg_replication_origin_session_setup'
              AND g.grantee <> p.proowner AND r.rolsuper IS NOT TRUE
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

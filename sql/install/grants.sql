-- What ALTER DEFAULT PRIVILEGES grants on new objects is not meant for these.
CREATE FUNCTION writeguard.revoke_default_privileges() RETURNS void
    LANGUAGE c STRICT
    AS 'MODULE_PATHNAME', 'writeguard_revoke_default_privileges';
SELECT writeguard.revoke_default_privileges();
DROP FUNCTION writeguard.revoke_default_privileges();

-- Functions are executable by everybody unless somebody says otherwise; here only these are.
REVOKE ALL ON ALL FUNCTIONS IN SCHEMA writeguard FROM PUBLIC;
REVOKE ALL ON ALL TABLES IN SCHEMA writeguard FROM PUBLIC;
GRANT EXECUTE ON FUNCTION
    writeguard.preview(text, integer),
    writeguard.request(text, text, text[]),
    writeguard.request(bigint, text),
    writeguard.execute(bigint),
    writeguard.effective(regclass, name, text),
    writeguard._explain(oid, text, text),
    writeguard.statement_hash(text, text[]),
    writeguard.is_approver(oid, text),
    writeguard._shown(text),
    writeguard._shown_json(text),
    writeguard._samples(text),
    writeguard.login()
    TO PUBLIC;
GRANT SELECT ON writeguard.my_events, writeguard.my_requests TO PUBLIC;
GRANT SELECT ON writeguard.event, writeguard.event_queue, writeguard.rate_slots TO pg_monitor;
GRANT SELECT ON writeguard.stat, writeguard.stat_slots TO pg_monitor;
GRANT EXECUTE ON FUNCTION writeguard._stat_numbers(), writeguard._stat_counters() TO pg_monitor;
GRANT EXECUTE ON FUNCTION writeguard._queue_counters(), writeguard._rate_counters() TO pg_monitor;
GRANT SELECT ON writeguard.event_totals, writeguard.rate_budgets TO pg_monitor;
GRANT EXECUTE ON FUNCTION writeguard._event_numbers(), writeguard._rate_numbers() TO pg_monitor;
-- Last, because it tells sessions that found no extension here to look again.
GRANT USAGE ON SCHEMA writeguard TO PUBLIC;

COMMENT ON TABLE writeguard.event IS 'Everything that was not simply allowed';
COMMENT ON COLUMN writeguard.event.id IS 'in the order in which events were stored';
COMMENT ON COLUMN writeguard.event.occurred_at IS 'when it happened, not when it was stored';
COMMENT ON COLUMN writeguard.event.kind IS 'blocked, warned, observed, overridden, expectation_failed, requested, approved, rejected, revoked, token_refused, break_glass, undone, policy_changed, uncovered, disabled';
COMMENT ON COLUMN writeguard.event.policy IS 'the policy that it is about; NULL: no single one';
COMMENT ON COLUMN writeguard.event.mode IS 'of the policy, where one of its limits is what it is about';
COMMENT ON COLUMN writeguard.event.login IS 'who authenticated; SET ROLE and SET SESSION AUTHORIZATION do not change it';
COMMENT ON COLUMN writeguard.event.role IS 'the role that is SET, else session_user';
COMMENT ON COLUMN writeguard.event.application IS 'application_name of the session';
COMMENT ON COLUMN writeguard.event.client IS 'address of the client; NULL: a local socket';
COMMENT ON COLUMN writeguard.event.pid IS 'of the session''s server process';
COMMENT ON COLUMN writeguard.event.xid IS 'transaction, where it had a number by then';
COMMENT ON COLUMN writeguard.event.operation IS 'update, delete, truncate, drop; of a failed expectation also merge; of a policy that no function of the extension wrote also insert; of the extension''s own tables also alter';
COMMENT ON COLUMN writeguard.event.relation IS 'qualified name of the table; past a limit, of the one whose row went past it';
COMMENT ON COLUMN writeguard.event.scope IS 'what the limit is counted over: statement, transaction, rate, fraction; block or where: that was missing; expectation';
COMMENT ON COLUMN writeguard.event.row_limit IS 'the limit; of a failed expectation the number that was expected';
COMMENT ON COLUMN writeguard.event.rows IS 'of a refusal: limit + 1, NULL where no number was refused; of an override or a failed expectation: all rows of the statement; observed or warned: all rows in the scope';
COMMENT ON COLUMN writeguard.event.rows_estimated IS 'what the planner expected; it decides nothing';
COMMENT ON COLUMN writeguard.event.statement IS 'the statement''s text, as writeguard.log_statement says';
COMMENT ON COLUMN writeguard.event.query_id IS 'as in pg_stat_activity and pg_stat_statements; NULL where compute_query_id is off';
COMMENT ON COLUMN writeguard.event.approval IS 'the request that it is about, or whose token was used';
COMMENT ON COLUMN writeguard.event.reason IS 'what the person said, or what else is to be said of it';
COMMENT ON SEQUENCE writeguard.event_id_seq IS 'internal: the ids of events';

COMMENT ON TABLE writeguard.outbox IS 'internal: events whose notification the worker has still to send';
COMMENT ON COLUMN writeguard.outbox.event IS 'id of the event; negative: counted already';

CREATE OR REPLACE FUNCTION writeguard.login() RETURNS text
    LANGUAGE c STABLE PARALLEL RESTRICTED
    AS 'MODULE_PATHNAME', 'writeguard_login';
COMMENT ON FUNCTION writeguard.login IS 'who authenticated this connection';

CREATE OR REPLACE VIEW writeguard.my_events WITH (security_barrier) AS
    SELECT e.id, e.occurred_at, e.kind, e.policy, e.mode, e.login, e.role, e.application, e.client, e.pid, e.xid, e.operation,
           e.relation, e.scope, e.row_limit, e.rows, e.rows_estimated, e.statement, e.query_id, e.approval, e.reason
    FROM writeguard.event AS e WHERE e.login = writeguard.login();
COMMENT ON VIEW writeguard.my_events IS 'the events of one''s own login';
COMMENT ON COLUMN writeguard.my_events.id IS 'in the order in which events were stored';
COMMENT ON COLUMN writeguard.my_events.occurred_at IS 'when it happened, not when it was stored';
COMMENT ON COLUMN writeguard.my_events.kind IS 'as in writeguard.event';
COMMENT ON COLUMN writeguard.my_events.policy IS 'the policy that it is about; NULL: no single one';
COMMENT ON COLUMN writeguard.my_events.mode IS 'of the policy, where one of its limits is what it is about';
COMMENT ON COLUMN writeguard.my_events.login IS 'one''s own';
COMMENT ON COLUMN writeguard.my_events.role IS 'the role that was SET, else session_user';
COMMENT ON COLUMN writeguard.my_events.application IS 'application_name of the session';
COMMENT ON COLUMN writeguard.my_events.client IS 'address of the client; NULL: a local socket';
COMMENT ON COLUMN writeguard.my_events.pid IS 'of the session''s server process';
COMMENT ON COLUMN writeguard.my_events.xid IS 'transaction, where it had a number by then';
COMMENT ON COLUMN writeguard.my_events.operation IS 'update, delete, truncate, drop; of a failed expectation also merge';
COMMENT ON COLUMN writeguard.my_events.relation IS 'qualified name of the table; past a limit, of the one whose row went past it';
COMMENT ON COLUMN writeguard.my_events.scope IS 'what the limit is counted over, as in writeguard.event';
COMMENT ON COLUMN writeguard.my_events.row_limit IS 'the limit; of a failed expectation the number that was expected';
COMMENT ON COLUMN writeguard.my_events.rows IS 'of a refusal: limit + 1; else all rows, as in writeguard.event';
COMMENT ON COLUMN writeguard.my_events.rows_estimated IS 'what the planner expected; it decides nothing';
COMMENT ON COLUMN writeguard.my_events.statement IS 'the statement''s text, as writeguard.log_statement says';
COMMENT ON COLUMN writeguard.my_events.query_id IS 'as in pg_stat_activity and pg_stat_statements; NULL where compute_query_id is off';
COMMENT ON COLUMN writeguard.my_events.approval IS 'the request that it is about, or whose token was used';
COMMENT ON COLUMN writeguard.my_events.reason IS 'what the person said, or what else is to be said of it';

CREATE OR REPLACE FUNCTION writeguard._queue_counters() RETURNS bigint[]
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'writeguard_queue_counters';
COMMENT ON FUNCTION writeguard._queue_counters IS 'internal: the numbers of writeguard.event_queue';

CREATE OR REPLACE VIEW writeguard.event_queue AS
    SELECT c.n[1] AS waiting, c.n[2] AS stored, c.n[3] AS late, c.n[4] AS in_log_only, c.n[5] AS summed_up,
           c.n[6] AS set_aside, c.n[7] AS unsent
    FROM (SELECT writeguard._queue_counters() AS n) AS c;
COMMENT ON VIEW writeguard.event_queue IS 'since the server started, in all databases: events that wait, were stored, were late for their error, are in the server log only; were told of as a number only; that the table did not take; and how often notifications could not be sent';
COMMENT ON COLUMN writeguard.event_queue.waiting IS 'events in shared memory that are not in a table yet';
COMMENT ON COLUMN writeguard.event_queue.stored IS 'events that were stored';
COMMENT ON COLUMN writeguard.event_queue.late IS 'refusals that went out before their event was stored; see writeguard.event_timeout';
COMMENT ON COLUMN writeguard.event_queue.in_log_only IS 'events that found no room or that the table did not take';
COMMENT ON COLUMN writeguard.event_queue.summed_up IS 'events that were told of as a number only';
COMMENT ON COLUMN writeguard.event_queue.set_aside IS 'of in_log_only, those that the table did not take';
COMMENT ON COLUMN writeguard.event_queue.unsent IS 'how often notifications could not be sent';

CREATE OR REPLACE FUNCTION writeguard._event_numbers()
    RETURNS TABLE (kind text, policy text, events bigint)
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'writeguard_event_numbers';
COMMENT ON FUNCTION writeguard._event_numbers IS 'internal: the rows of writeguard.event_totals';

CREATE OR REPLACE VIEW writeguard.event_totals AS
    SELECT n.kind, n.policy, n.events FROM writeguard._event_numbers() AS n;
COMMENT ON VIEW writeguard.event_totals IS 'events of this database since the server started, also those that are not stored one by one; for monitoring';
COMMENT ON COLUMN writeguard.event_totals.kind IS 'as in writeguard.event';
COMMENT ON COLUMN writeguard.event_totals.policy IS 'NULL: all events of that kind, of policies or not';
COMMENT ON COLUMN writeguard.event_totals.events IS 'how many; it only grows';

-- From 0.2.0 to 0.3.0. What people stored stays: policies, requests, events, kept rows, keys and grants.

-- Whoever decides about a request has locked its row before they look at the policies.
-- first: LOCK TABLE writeguard.request IN ACCESS EXCLUSIVE MODE;

ALTER TABLE writeguard.change_relation
    DROP CONSTRAINT change_relation_change_fkey,
    ADD COLUMN key smallint[],
    ADD COLUMN forms jsonb,
    ADD COLUMN hindrance text;

-- What was asked for so far is bound to no setting but its search_path.
ALTER TABLE writeguard.request ADD COLUMN settings jsonb DEFAULT '{}';
ALTER TABLE writeguard.request ALTER COLUMN settings DROP DEFAULT;

-- With the grants on them.
ALTER FUNCTION writeguard.owner_only() RENAME TO _owner_only;
ALTER FUNCTION writeguard.policy_changed() RENAME TO _policy_changed;
ALTER FUNCTION writeguard.explain(oid, text, text) RENAME TO _explain;
ALTER FUNCTION writeguard.queue_counters() RENAME TO _queue_counters;
ALTER FUNCTION writeguard.event_numbers() RENAME TO _event_numbers;
ALTER FUNCTION writeguard.rate_counters() RENAME TO _rate_counters;
ALTER FUNCTION writeguard.rate_numbers() RENAME TO _rate_numbers;
ALTER FUNCTION writeguard.stat_counters() RENAME TO _stat_counters;
ALTER FUNCTION writeguard.stat_numbers() RENAME TO _stat_numbers;
ALTER FUNCTION writeguard.setup_facts() RENAME TO _setup_facts;

ALTER FUNCTION writeguard.undo(bigint, text, boolean) RENAME TO undo_0_2_0;

-- include *.sql

CREATE TRIGGER policy_written
    AFTER INSERT OR UPDATE OR DELETE ON writeguard.policy
    FOR EACH ROW EXECUTE FUNCTION writeguard._policy_written();
ALTER TABLE writeguard.policy ENABLE ALWAYS TRIGGER policy_written;
CREATE TRIGGER restore_begins
    BEFORE INSERT ON writeguard.event
    FOR EACH STATEMENT EXECUTE FUNCTION writeguard._event_restored();
CREATE TRIGGER restore_ends
    AFTER INSERT ON writeguard.event
    FOR EACH STATEMENT EXECUTE FUNCTION writeguard._event_restored();
ALTER TABLE writeguard.event ENABLE ALWAYS TRIGGER restore_begins;
ALTER TABLE writeguard.event ENABLE ALWAYS TRIGGER restore_ends;

-- What ALTER DEFAULT PRIVILEGES grants on new objects is not meant for these.
CREATE FUNCTION writeguard.revoke_default_privileges(names text[]) RETURNS void
    LANGUAGE c STRICT
    AS 'MODULE_PATHNAME', 'writeguard_revoke_default_privileges';
SELECT writeguard.revoke_default_privileges('{_policy_written,_event_restored,_shown,_shown_json,alter_policy,undo}');
DROP FUNCTION writeguard.revoke_default_privileges(text[]);
REVOKE ALL ON FUNCTION writeguard._policy_written(), writeguard._event_restored(), writeguard.alter_policy(text, jsonb),
    writeguard.undo(bigint, text, boolean, text) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION writeguard._shown(text), writeguard._shown_json(text) TO PUBLIC;

CREATE FUNCTION writeguard.carry_grants(before text, after text) RETURNS void
    LANGUAGE c STRICT
    AS 'MODULE_PATHNAME', 'writeguard_carry_grants';
SELECT writeguard.carry_grants(
    'writeguard.undo_0_2_0(bigint, text, boolean)', 'writeguard.undo(bigint, text, boolean, text)');
DROP FUNCTION writeguard.carry_grants(text, text);
-- Only if it is ours: this raises for what is no member.
ALTER EXTENSION pg_writeguard DROP FUNCTION writeguard.undo_0_2_0(bigint, text, boolean);
DROP FUNCTION writeguard.undo_0_2_0;

-- From 0.2.0 to 0.3.0. What people stored stays: policies, requests, events, kept rows, keys and grants.

-- Whoever decides about a request has locked its row before they look at the policies.
-- first: LOCK TABLE writeguard.request IN ACCESS EXCLUSIVE MODE;

ALTER TABLE writeguard.change_relation
    DROP CONSTRAINT change_relation_change_fkey,
    ADD COLUMN key smallint[],
    ADD COLUMN forms jsonb,
    ADD COLUMN hindrance text;
ALTER TABLE writeguard.image
    ADD COLUMN was_at bigint,
    ADD COLUMN left_at bigint;

-- What was asked for so far is bound to no setting but its search_path.
ALTER TABLE writeguard.request ADD COLUMN settings jsonb DEFAULT '{}';
ALTER TABLE writeguard.request ALTER COLUMN settings DROP DEFAULT;
-- Nor to certain rows, nor to what its tables and functions were.
ALTER TABLE writeguard.request ADD COLUMN fingerprints jsonb, ADD COLUMN definitions jsonb;

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
-- With other arguments or columns they are other functions; what a DBA has granted on them is granted on those, further down.
ALTER FUNCTION writeguard.set_policy(text, text[], text[], text, cidr, text, text[], bigint, bigint, bigint, interval,
                                     double precision, boolean, boolean, text, text, text, integer, interval, text, boolean)
    RENAME TO set_policy_0_2_0;
ALTER FUNCTION writeguard.effective(regclass, name, text) RENAME TO effective_0_2_0;

-- Which policies apply is decided limit by limit now. That no WHERE and no transaction was required is a statement only
-- where another policy requires one: there it stays one.
ALTER TABLE writeguard.policy
    ADD COLUMN always boolean NOT NULL DEFAULT false,
    ADD COLUMN columns text[] CHECK (cardinality(columns) > 0),
    ADD COLUMN same_rows boolean NOT NULL DEFAULT true,
    ALTER COLUMN require_where DROP NOT NULL,
    ALTER COLUMN require_where DROP DEFAULT,
    ALTER COLUMN require_transaction DROP NOT NULL,
    ALTER COLUMN require_transaction DROP DEFAULT,
    DROP CONSTRAINT policy_mode_check,
    ADD CONSTRAINT policy_mode_check CHECK (mode IN ('observe', 'warn', 'enforce', 'exempt'));
-- Without triggers: ours want the library preloaded, which an upgrade does not; and others have no part in this.
ALTER TABLE writeguard.policy DISABLE TRIGGER policy_changed, DISABLE TRIGGER owner_only;
SET LOCAL session_replication_role = replica;
UPDATE writeguard.policy AS p
   SET require_where = CASE WHEN p.require_where OR r.condition THEN p.require_where END,
       require_transaction = CASE WHEN p.require_transaction OR r.block THEN p.require_transaction END
  FROM (SELECT pg_catalog.bool_or(o.require_where) AS condition, pg_catalog.bool_or(o.require_transaction) AS block
          FROM writeguard.policy AS o) AS r
 WHERE NOT (p.require_where AND p.require_transaction);
SET LOCAL session_replication_role = origin;
ALTER TABLE writeguard.policy ENABLE ALWAYS TRIGGER policy_changed, ENABLE ALWAYS TRIGGER owner_only;

-- include *.sql

CREATE FUNCTION writeguard.carry_grants(before text, after text) RETURNS void
    LANGUAGE c STRICT
    AS 'MODULE_PATHNAME', 'writeguard_carry_grants';
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
SELECT writeguard.revoke_default_privileges(
    '{_policy_written,_event_restored,_shown,_shown_json,_samples,alter_policy,set_policy,effective,undo}');
DROP FUNCTION writeguard.revoke_default_privileges(text[]);
REVOKE ALL ON FUNCTION writeguard._policy_written(), writeguard._event_restored(), writeguard.alter_policy(text, jsonb),
    writeguard.undo(bigint, text, boolean, text) FROM PUBLIC;
REVOKE ALL ON FUNCTION writeguard.set_policy FROM PUBLIC;
GRANT EXECUTE ON FUNCTION writeguard.effective TO PUBLIC;
SELECT writeguard.carry_grants(
    'writeguard.undo_0_2_0(bigint, text, boolean)', 'writeguard.undo(bigint, text, boolean, text)');
SELECT writeguard.carry_grants(
    'writeguard.set_policy_0_2_0(text, text[], text[], text, cidr, text, text[], bigint, bigint, bigint, interval, double precision, boolean, boolean, text, text, text, integer, interval, text, boolean)',
    'writeguard.set_policy(text, text[], text[], text, cidr, text, text[], bigint, bigint, bigint, interval, double precision, boolean, boolean, text, text, text, integer, interval, text, boolean, boolean, text[], boolean)');
SELECT writeguard.carry_grants('writeguard.effective_0_2_0(regclass, name, text)', 'writeguard.effective(regclass, name, text)');
DROP FUNCTION writeguard.carry_grants(text, text);
CREATE FUNCTION writeguard.warn_of_policies() RETURNS void
    LANGUAGE c STRICT
    AS 'MODULE_PATHNAME', 'writeguard_warn_of_policies';
SELECT writeguard.warn_of_policies();
DROP FUNCTION writeguard.warn_of_policies();
-- Only if they are ours: this raises for what is no member.
ALTER EXTENSION pg_writeguard DROP FUNCTION writeguard.undo_0_2_0(bigint, text, boolean);
ALTER EXTENSION pg_writeguard DROP FUNCTION writeguard.set_policy_0_2_0;
ALTER EXTENSION pg_writeguard DROP FUNCTION writeguard.effective_0_2_0;
DROP FUNCTION writeguard.undo_0_2_0;
DROP FUNCTION writeguard.set_policy_0_2_0;
DROP FUNCTION writeguard.effective_0_2_0;
GRANT EXECUTE ON FUNCTION writeguard._shown(text), writeguard._shown_json(text), writeguard._samples(text) TO PUBLIC;

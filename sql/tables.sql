COMMENT ON SCHEMA writeguard IS 'pg_writeguard: row limits on UPDATE, DELETE and TRUNCATE';

CREATE TABLE writeguard.policy (
    name                     text PRIMARY KEY CHECK (btrim(name) <> ''),
    tables                   text[] NOT NULL DEFAULT '{*.*}' CHECK (cardinality(tables) > 0),
    roles                    text[] NOT NULL DEFAULT '{public}' CHECK (cardinality(roles) > 0),
    application              text,
    client                   cidr,
    schedule                 text,
    operations               text[] NOT NULL DEFAULT '{update,delete,truncate}'
                             CHECK (cardinality(operations) > 0
                                    AND operations <@ '{update,delete,truncate,drop}'),
    max_rows                 bigint CHECK (max_rows >= 0),
    max_rows_per_transaction bigint CHECK (max_rows_per_transaction >= 0),
    rate_rows                bigint CHECK (rate_rows >= 0),
    rate_interval            interval NOT NULL DEFAULT '1 hour' CHECK (rate_interval > '0'),
    max_fraction             double precision CHECK (max_fraction BETWEEN 0 AND 1),
    require_where            boolean NOT NULL DEFAULT false,
    require_transaction      boolean NOT NULL DEFAULT false,
    mode                     text NOT NULL DEFAULT 'enforce' CHECK (mode IN ('observe', 'warn', 'enforce')),
    override                 text NOT NULL DEFAULT 'token' CHECK (override IN ('never', 'flag', 'token')),
    approvers                text,
    min_approvals            integer NOT NULL DEFAULT 1 CHECK (min_approvals >= 1),
    undo                     interval,
    comment                  text,
    samples                  boolean NOT NULL DEFAULT true
);
COMMENT ON TABLE writeguard.policy IS 'Row limits; written through set_policy() and drop_policy()';
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
COMMENT ON COLUMN writeguard.policy.require_transaction IS 'more than one row only inside a transaction block';
COMMENT ON COLUMN writeguard.policy.require_where IS 'refuse an UPDATE or DELETE that scans the whole table with nothing to narrow it';
COMMENT ON COLUMN writeguard.policy.mode IS 'past a limit: observe (record), warn (record and WARNING), enforce (refuse)';
COMMENT ON COLUMN writeguard.policy.override IS 'what lifts the policy: never, flag (writeguard.override), token (flag and approval token)';
COMMENT ON COLUMN writeguard.policy.approvers IS 'role whose members may approve; NULL: whoever may call approve()';
COMMENT ON COLUMN writeguard.policy.min_approvals IS 'distinct people who must approve';
COMMENT ON COLUMN writeguard.policy.comment IS 'for people';
COMMENT ON COLUMN writeguard.policy.samples IS 'whether requests show some rows of these tables, before and after';

CREATE FUNCTION writeguard.policy_changed() RETURNS trigger
    LANGUAGE c
    AS 'MODULE_PATHNAME', 'writeguard_policy_changed';
COMMENT ON FUNCTION writeguard.policy_changed() IS 'tells all sessions, with the commit, that policies changed';

CREATE TRIGGER policy_changed
    AFTER INSERT OR UPDATE OR DELETE OR TRUNCATE ON writeguard.policy
    FOR EACH STATEMENT EXECUTE FUNCTION writeguard.policy_changed();
ALTER TABLE writeguard.policy ENABLE ALWAYS TRIGGER policy_changed;

CREATE TABLE writeguard.event (
    id             bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    occurred_at    timestamptz NOT NULL,
    kind           text NOT NULL,
    policy         text,
    mode           text,
    login          text NOT NULL,
    role           text NOT NULL,
    application    text,
    client         inet,
    pid            integer,
    xid            xid8,
    operation      text,
    relation       text,
    scope          text,
    row_limit      bigint,
    rows           bigint,
    rows_estimated bigint,
    statement      text,
    query_id       bigint,
    approval       bigint,
    reason         text
);
COMMENT ON TABLE writeguard.event IS 'Everything that was not simply allowed';
COMMENT ON COLUMN writeguard.event.kind IS 'blocked, warned, observed, overridden, expectation_failed, requested, approved, rejected, revoked, token_refused, break_glass, undone, policy_changed, uncovered, disabled';
COMMENT ON COLUMN writeguard.event.login IS 'who authenticated; SET ROLE and SET SESSION AUTHORIZATION do not change it';
COMMENT ON COLUMN writeguard.event.role IS 'the role that is SET, else session_user';
COMMENT ON COLUMN writeguard.event.relation IS 'qualified name of the table whose row went past the limit';
COMMENT ON COLUMN writeguard.event.scope IS 'what the limit is counted over: statement, transaction, rate, fraction; block or where: that was missing; expectation';
COMMENT ON COLUMN writeguard.event.row_limit IS 'of a failed expectation: the number that was expected';
COMMENT ON COLUMN writeguard.event.rows IS 'of a refusal: limit + 1, NULL where no number was refused; of an override or a failed expectation: all rows of the statement; observed or warned: all rows in the scope';
COMMENT ON COLUMN writeguard.event.rows_estimated IS 'what the planner expected; it decides nothing';
COMMENT ON COLUMN writeguard.event.approval IS 'the request whose token was used';
CREATE INDEX event_occurred_at ON writeguard.event (occurred_at);
CREATE INDEX event_login ON writeguard.event (login, id);
CREATE INDEX event_policy ON writeguard.event (policy, id);
CREATE INDEX event_relation ON writeguard.event (relation, id);
CREATE INDEX event_approval ON writeguard.event (approval) WHERE approval IS NOT NULL;

CREATE TABLE writeguard.outbox (
    event bigint NOT NULL
);
COMMENT ON TABLE writeguard.outbox IS 'Events whose notification the worker has still to send; negative: counted already';

-- Members of pg_write_all_data may write every table; these are the owner's alone.
CREATE FUNCTION writeguard.owner_only() RETURNS trigger
    LANGUAGE c
    AS 'MODULE_PATHNAME', 'writeguard_owner_only';
COMMENT ON FUNCTION writeguard.owner_only() IS 'refuses writes by anybody but the owner';

CREATE TRIGGER owner_only
    BEFORE INSERT OR UPDATE OR DELETE OR TRUNCATE ON writeguard.policy
    FOR EACH STATEMENT EXECUTE FUNCTION writeguard.owner_only();
CREATE TRIGGER owner_only
    BEFORE INSERT OR UPDATE OR DELETE OR TRUNCATE ON writeguard.event
    FOR EACH STATEMENT EXECUTE FUNCTION writeguard.owner_only();
CREATE TRIGGER owner_only
    BEFORE INSERT OR UPDATE OR DELETE OR TRUNCATE ON writeguard.outbox
    FOR EACH STATEMENT EXECUTE FUNCTION writeguard.owner_only();
ALTER TABLE writeguard.policy ENABLE ALWAYS TRIGGER owner_only;
ALTER TABLE writeguard.event ENABLE ALWAYS TRIGGER owner_only;
ALTER TABLE writeguard.outbox ENABLE ALWAYS TRIGGER owner_only;

SELECT pg_catalog.pg_extension_config_dump('writeguard.policy', '');
SELECT pg_catalog.pg_extension_config_dump('writeguard.event', '');
SELECT pg_catalog.pg_extension_config_dump('writeguard.event_id_seq', '');

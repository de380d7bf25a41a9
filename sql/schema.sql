COMMENT ON SCHEMA writeguard IS 'pg_writeguard: row limits on UPDATE, DELETE and TRUNCATE';

CREATE OR REPLACE FUNCTION writeguard._policy_changed() RETURNS trigger
    LANGUAGE c
    AS 'MODULE_PATHNAME', 'writeguard_policy_changed';
COMMENT ON FUNCTION writeguard._policy_changed() IS 'internal: tells all sessions, with the commit, that policies changed';

-- Members of pg_write_all_data may write every table; these are the owner's alone.
CREATE OR REPLACE FUNCTION writeguard._owner_only() RETURNS trigger
    LANGUAGE c
    AS 'MODULE_PATHNAME', 'writeguard_owner_only';
COMMENT ON FUNCTION writeguard._owner_only() IS 'internal: refuses writes by anybody but the owner';

CREATE OR REPLACE FUNCTION writeguard._policy_written() RETURNS trigger
    LANGUAGE c
    AS 'MODULE_PATHNAME', 'writeguard_policy_written';
COMMENT ON FUNCTION writeguard._policy_written() IS 'internal: records a policy that no function of the extension wrote';

CREATE OR REPLACE FUNCTION writeguard._event_restored() RETURNS trigger
    LANGUAGE c
    AS 'MODULE_PATHNAME', 'writeguard_event_restored';
COMMENT ON FUNCTION writeguard._event_restored() IS 'internal: lets events that a restore brings keep their numbers';

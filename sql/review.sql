CREATE TABLE writeguard.request (
    id               bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    requested_at     timestamptz NOT NULL DEFAULT clock_timestamp(),
    state            text NOT NULL DEFAULT 'pending'
                     CHECK (state IN ('pending', 'approved', 'rejected', 'spent', 'expired', 'revoked')),
    database         text NOT NULL,
    login            text NOT NULL,
    actor            text NOT NULL,
    acting_as        text NOT NULL,
    reason           text NOT NULL,
    statement        text NOT NULL,
    parameters       text[] NOT NULL DEFAULT '{}',
    statement_sha256 text NOT NULL,
    rows             bigint NOT NULL,
    relations        jsonb NOT NULL,
    samples          jsonb,
    policies         text[] NOT NULL,
    decided_by       text,
    decided_at       timestamptz,
    comment          text,
    max_rows         bigint CHECK (max_rows >= 0),
    expires_at       timestamptz NOT NULL,
    token_sha256     text UNIQUE,
    spent_at         timestamptz,
    search_path      text NOT NULL,
    break_glass      boolean NOT NULL DEFAULT false
);
COMMENT ON TABLE writeguard.request IS 'Writes that somebody wants approved, and what became of them';
COMMENT ON COLUMN writeguard.request.state IS 'pending, approved, rejected, spent, expired, revoked; a past expires_at says expired before the worker does';
COMMENT ON COLUMN writeguard.request.login IS 'who asked; nobody approves their own request';
COMMENT ON COLUMN writeguard.request.database IS 'system identifier and OID: a token of the original opens nothing in a copy';
COMMENT ON COLUMN writeguard.request.actor IS 'OIDs of login, session_user and the role that was SET';
COMMENT ON COLUMN writeguard.request.acting_as IS 'the role that was SET, else session_user';
COMMENT ON COLUMN writeguard.request.relations IS 'rows that the rehearsal changed, by qualified table name';
COMMENT ON COLUMN writeguard.request.samples IS 'some of these rows, before and after';
COMMENT ON COLUMN writeguard.request.policies IS 'names of the policies that a token has to lift';
COMMENT ON COLUMN writeguard.request.decided_by IS 'who approved last, rejected or revoked it';
COMMENT ON COLUMN writeguard.request.max_rows IS 'the approvers'' own maximum over all tables';
COMMENT ON COLUMN writeguard.request.expires_at IS 'of a pending request: until when it waits; of an approved one: until when its token is good';
COMMENT ON COLUMN writeguard.request.break_glass IS 'approved by nobody else: the token of break_glass()';
COMMENT ON COLUMN writeguard.request.search_path IS 'in which the rehearsal looked the names up; execute() does the same';
COMMENT ON COLUMN writeguard.request.token_sha256 IS 'the token itself is stored nowhere';
CREATE INDEX request_open ON writeguard.request (id) WHERE state IN ('pending', 'approved');
CREATE INDEX request_login ON writeguard.request (login, id);

CREATE TABLE writeguard.approval (
    request      bigint NOT NULL REFERENCES writeguard.request ON DELETE CASCADE,
    approver     text NOT NULL,
    approver_oid oid NOT NULL,
    approved_at  timestamptz NOT NULL DEFAULT clock_timestamp(),
    valid_for    interval NOT NULL,
    max_rows     bigint CHECK (max_rows >= 0),
    comment      text,
    PRIMARY KEY (request, approver_oid)
);
COMMENT ON TABLE writeguard.approval IS 'Who approved which request; each person once';
COMMENT ON COLUMN writeguard.approval.approver IS 'login, as it was called then';
COMMENT ON COLUMN writeguard.approval.approver_oid IS 'by which people are told apart, and are members of a policy''s approvers';
COMMENT ON COLUMN writeguard.approval.valid_for IS 'how long the token may be good; the shortest of a request holds';
COMMENT ON COLUMN writeguard.approval.max_rows IS 'this approver''s maximum over all tables; NULL: what was reviewed';

CREATE TRIGGER owner_only
    BEFORE INSERT OR UPDATE OR DELETE OR TRUNCATE ON writeguard.request
    FOR EACH STATEMENT EXECUTE FUNCTION writeguard.owner_only();
CREATE TRIGGER owner_only
    BEFORE INSERT OR UPDATE OR DELETE OR TRUNCATE ON writeguard.approval
    FOR EACH STATEMENT EXECUTE FUNCTION writeguard.owner_only();
ALTER TABLE writeguard.request ENABLE ALWAYS TRIGGER owner_only;
ALTER TABLE writeguard.approval ENABLE ALWAYS TRIGGER owner_only;

SELECT pg_catalog.pg_extension_config_dump('writeguard.request', '');
SELECT pg_catalog.pg_extension_config_dump('writeguard.request_id_seq', '');
SELECT pg_catalog.pg_extension_config_dump('writeguard.approval', '');

CREATE FUNCTION writeguard.request(statement text, reason text, parameters text[] DEFAULT '{}') RETURNS bigint
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'writeguard_request';
COMMENT ON FUNCTION writeguard.request(text, text, text[]) IS 'rehearses a statement and asks for its approval; gives the number of the request';

CREATE FUNCTION writeguard.request(event bigint, reason text) RETURNS bigint
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'writeguard_request_event';
COMMENT ON FUNCTION writeguard.request(bigint, text) IS 'the same for the statement of one''s own refused write';

CREATE FUNCTION writeguard.approve(
    request   bigint,
    comment   text DEFAULT NULL,
    valid_for interval DEFAULT NULL,
    max_rows  bigint DEFAULT NULL
) RETURNS text
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'writeguard_approve';
COMMENT ON FUNCTION writeguard.approve IS 'approves somebody else''s request; the last approval that it needs gives the token, this once';

CREATE FUNCTION writeguard.reject(request bigint, comment text DEFAULT NULL) RETURNS void
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'writeguard_reject';
COMMENT ON FUNCTION writeguard.reject IS 'rejects somebody else''s request';

CREATE FUNCTION writeguard.revoke(request bigint, comment text DEFAULT NULL) RETURNS void
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'writeguard_revoke';
COMMENT ON FUNCTION writeguard.revoke IS 'ends a request that is pending or approved; its token is good for nothing any more';

CREATE FUNCTION writeguard.is_approver(login oid, approvers text) RETURNS boolean
    LANGUAGE c STABLE PARALLEL SAFE
    AS 'MODULE_PATHNAME', 'writeguard_is_approver';
COMMENT ON FUNCTION writeguard.is_approver IS 'whether a login is a member of a policy''s approvers, to whom being superuser does not belong; NULL: everybody is';

CREATE VIEW writeguard.approval_ask AS
    SELECT r.id AS request, p.name AS policy, p.override, p.approvers, p.min_approvals,
           (SELECT count(*) FROM writeguard.approval AS a
            WHERE a.request = r.id AND writeguard.is_approver(a.approver_oid, p.approvers)) AS given
    FROM writeguard.request AS r JOIN writeguard.policy AS p ON p.name = ANY (r.policies)
    WHERE p.override <> 'flag' AND p.mode = 'enforce';
COMMENT ON VIEW writeguard.approval_ask IS 'what each policy of a request asks for now, and how many approvals it has been given';

CREATE VIEW writeguard.pending WITH (security_barrier) AS
    SELECT r.id, r.requested_at, r.login AS requested_by, r.acting_as AS role, r.reason, r.statement, r.parameters,
           r.rows, r.relations, r.samples, r.policies,
           greatest(asked.min_approvals, 1) AS approvals_needed,
           coalesce(given.approved_by, '{}') AS approved_by,
           r.expires_at, coalesce(asked.asks, '') AS asks
    FROM writeguard.request AS r
         CROSS JOIN LATERAL (
             SELECT max(k.min_approvals) AS min_approvals,
                    string_agg(format('%s: %s of %s%s', k.policy, k.given, k.min_approvals,
                                      coalesce(' by members of ' || quote_ident(k.approvers), '')),
                               E'\n' ORDER BY k.policy) AS asks
             FROM writeguard.approval_ask AS k WHERE k.request = r.id
         ) AS asked
         CROSS JOIN LATERAL (
             SELECT array_agg(a.approver ORDER BY a.approved_at, a.approver) AS approved_by
             FROM writeguard.approval AS a WHERE a.request = r.id
         ) AS given
    WHERE r.state = 'pending' AND r.expires_at > clock_timestamp();
COMMENT ON VIEW writeguard.pending IS 'requests that wait for a decision';
COMMENT ON COLUMN writeguard.pending.approvals_needed IS 'distinct people, in all, as the policies are now; more where none is an approver for all policies';
COMMENT ON COLUMN writeguard.pending.asks IS 'for each policy a line: how many have approved of how many that must, and who they are';

CREATE VIEW writeguard.my_requests WITH (security_barrier) AS
    SELECT r.id,
           CASE WHEN r.state IN ('pending', 'approved') AND r.expires_at <= clock_timestamp() THEN 'expired'
                ELSE r.state END AS state,
           r.statement, r.rows, r.expires_at, r.requested_at, r.reason, r.parameters, r.relations, r.policies,
           ARRAY(SELECT a.approver FROM writeguard.approval AS a WHERE a.request = r.id
                 ORDER BY a.approved_at, a.approver) AS approved_by,
           r.decided_by, r.decided_at, r.comment
    FROM writeguard.request AS r
    WHERE r.login = writeguard.login();
COMMENT ON VIEW writeguard.my_requests IS 'one''s own requests';
COMMENT ON COLUMN writeguard.my_requests.state IS 'pending, approved, rejected, spent, expired, revoked';

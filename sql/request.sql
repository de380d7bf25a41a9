COMMENT ON TABLE writeguard.request IS 'Writes that somebody wants approved, and what became of them';
COMMENT ON COLUMN writeguard.request.id IS 'by which approve() and execute() call it';
COMMENT ON COLUMN writeguard.request.requested_at IS 'after the rehearsal';
COMMENT ON COLUMN writeguard.request.state IS 'pending, approved, rejected, spent, expired, revoked; a past expires_at says expired before the worker does';
COMMENT ON COLUMN writeguard.request.database IS 'system identifier and OID: a token of the original opens nothing in a copy';
COMMENT ON COLUMN writeguard.request.login IS 'who asked; nobody approves their own request';
COMMENT ON COLUMN writeguard.request.actor IS 'OIDs of login, session_user and the role that was SET';
COMMENT ON COLUMN writeguard.request.acting_as IS 'the role that was SET, else session_user';
COMMENT ON COLUMN writeguard.request.reason IS 'why, for those who decide';
COMMENT ON COLUMN writeguard.request.statement IS 'its text, without surrounding blanks and final semicolon';
COMMENT ON COLUMN writeguard.request.parameters IS 'its parameters, as their types print them';
COMMENT ON COLUMN writeguard.request.statement_sha256 IS 'what statement_hash() gives for them';
COMMENT ON COLUMN writeguard.request.rows IS 'that the rehearsal changed in all';
COMMENT ON COLUMN writeguard.request.relations IS 'rows that the rehearsal changed, by qualified table name';
COMMENT ON COLUMN writeguard.request.samples IS 'some of these rows, before and after';
COMMENT ON COLUMN writeguard.request.policies IS 'names of the policies that a token has to lift';
COMMENT ON COLUMN writeguard.request.decided_by IS 'who approved last, rejected or revoked it';
COMMENT ON COLUMN writeguard.request.decided_at IS 'when that was';
COMMENT ON COLUMN writeguard.request.comment IS 'by whoever decided';
COMMENT ON COLUMN writeguard.request.max_rows IS 'the approvers'' own maximum over all tables';
COMMENT ON COLUMN writeguard.request.expires_at IS 'of a pending request: until when it waits; of an approved one: until when its token is good';
COMMENT ON COLUMN writeguard.request.token_sha256 IS 'the token itself is stored nowhere';
COMMENT ON COLUMN writeguard.request.spent_at IS 'when the token was used';
COMMENT ON COLUMN writeguard.request.search_path IS 'in which the rehearsal looked the names up; execute() does the same';
COMMENT ON COLUMN writeguard.request.settings IS 'that give the text its meaning, by name, as they were when it was reviewed; empty: made before they were kept';
COMMENT ON COLUMN writeguard.request.fingerprints IS 'which rows the rehearsal changed, by qualified table name, as sums that tell other rows apart; a table that is not here is bound by its number of rows alone';
COMMENT ON COLUMN writeguard.request.definitions IS 'tables, views and functions that the rehearsal met, with a digest of how each was defined; a token opens nothing once one was altered';
COMMENT ON COLUMN writeguard.request.break_glass IS 'approved by nobody else: the token of break_glass()';
COMMENT ON SEQUENCE writeguard.request_id_seq IS 'internal: the ids of requests';

COMMENT ON TABLE writeguard.approval IS 'Who approved which request; each person once';
COMMENT ON COLUMN writeguard.approval.request IS 'id of the request';
COMMENT ON COLUMN writeguard.approval.approver IS 'login, as it was called then';
COMMENT ON COLUMN writeguard.approval.approver_oid IS 'by which people are told apart, and are members of a policy''s approvers';
COMMENT ON COLUMN writeguard.approval.approved_at IS 'when that was';
COMMENT ON COLUMN writeguard.approval.valid_for IS 'how long the token may be good; the shortest of a request holds';
COMMENT ON COLUMN writeguard.approval.max_rows IS 'this approver''s maximum over all tables; NULL: what was reviewed';
COMMENT ON COLUMN writeguard.approval.comment IS 'by the approver';

CREATE OR REPLACE FUNCTION writeguard.statement_hash(statement text, parameters text[] DEFAULT '{}') RETURNS text
    LANGUAGE c IMMUTABLE PARALLEL SAFE
    AS 'MODULE_PATHNAME', 'writeguard_statement_hash';
COMMENT ON FUNCTION writeguard.statement_hash IS 'SHA-256 of a statement without surrounding blanks and final semicolon, and of its parameters';

CREATE OR REPLACE FUNCTION writeguard.request(statement text, reason text, parameters text[] DEFAULT '{}') RETURNS bigint
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'writeguard_request';
COMMENT ON FUNCTION writeguard.request(text, text, text[]) IS 'rehearses a statement and asks for its approval; gives the number of the request';

CREATE OR REPLACE FUNCTION writeguard.request(event bigint, reason text) RETURNS bigint
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'writeguard_request_event';
COMMENT ON FUNCTION writeguard.request(bigint, text) IS 'the same for the statement of one''s own refused write';

CREATE OR REPLACE FUNCTION writeguard.approve(
    request   bigint,
    comment   text DEFAULT NULL,
    valid_for interval DEFAULT NULL,
    max_rows  bigint DEFAULT NULL
) RETURNS text
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'writeguard_approve';
COMMENT ON FUNCTION writeguard.approve IS 'approves somebody else''s request; the last approval that it needs gives the token, this once';

CREATE OR REPLACE FUNCTION writeguard.reject(request bigint, comment text DEFAULT NULL) RETURNS void
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'writeguard_reject';
COMMENT ON FUNCTION writeguard.reject IS 'rejects somebody else''s request';

CREATE OR REPLACE FUNCTION writeguard.revoke(request bigint, comment text DEFAULT NULL) RETURNS void
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'writeguard_revoke';
COMMENT ON FUNCTION writeguard.revoke IS 'ends a request that is pending or approved; its token is good for nothing any more';

CREATE OR REPLACE FUNCTION writeguard.is_approver(login oid, approvers text) RETURNS boolean
    LANGUAGE c STABLE PARALLEL SAFE
    AS 'MODULE_PATHNAME', 'writeguard_is_approver';
COMMENT ON FUNCTION writeguard.is_approver IS 'internal: whether a login is a member of a policy''s approvers, to whom being superuser does not belong; NULL: everybody is';

CREATE OR REPLACE VIEW writeguard.approval_ask AS
    SELECT r.id AS request, p.name AS policy, p.override, p.approvers, p.min_approvals,
           (SELECT count(*) FROM writeguard.approval AS a
            WHERE a.request = r.id AND writeguard.is_approver(a.approver_oid, p.approvers)) AS given
    FROM writeguard.request AS r JOIN writeguard.policy AS p ON p.name = ANY (r.policies)
    WHERE p.override <> 'flag' AND p.mode = 'enforce';
COMMENT ON VIEW writeguard.approval_ask IS 'internal: what each policy of a request asks for now, and how many approvals it has been given';
COMMENT ON COLUMN writeguard.approval_ask.request IS 'id of the request';
COMMENT ON COLUMN writeguard.approval_ask.policy IS 'name of the policy';
COMMENT ON COLUMN writeguard.approval_ask.override IS 'as the policy has it now';
COMMENT ON COLUMN writeguard.approval_ask.approvers IS 'as the policy has it now';
COMMENT ON COLUMN writeguard.approval_ask.min_approvals IS 'as the policy has it now';
COMMENT ON COLUMN writeguard.approval_ask.given IS 'approvals by people who are its approvers now';

CREATE OR REPLACE FUNCTION writeguard._shown(value text) RETURNS text
    LANGUAGE c STABLE STRICT PARALLEL SAFE
    AS 'MODULE_PATHNAME', 'writeguard_shown';
COMMENT ON FUNCTION writeguard._shown IS 'internal: a text in letters that the client can be sent; what is none stands there as \x.., what is not seen as \u....';

CREATE OR REPLACE FUNCTION writeguard._shown_json(value text) RETURNS text
    LANGUAGE c STABLE STRICT PARALLEL SAFE
    AS 'MODULE_PATHNAME', 'writeguard_shown_json';
COMMENT ON FUNCTION writeguard._shown_json IS 'internal: the same of JSON';

CREATE OR REPLACE FUNCTION writeguard._samples(samples text) RETURNS text
    LANGUAGE c STABLE STRICT PARALLEL SAFE
    AS 'MODULE_PATHNAME', 'writeguard_samples';
COMMENT ON FUNCTION writeguard._samples IS 'internal: samples of a request without the columns that the current user may not read';

CREATE OR REPLACE VIEW writeguard.pending WITH (security_barrier) AS
    SELECT r.id, r.requested_at, r.login AS requested_by, r.acting_as AS role,
           writeguard._shown(r.reason) AS reason, writeguard._shown(r.statement) AS statement,
           ARRAY(SELECT writeguard._shown(p.value) FROM pg_catalog.unnest(r.parameters) WITH ORDINALITY AS p (value, n)
                 ORDER BY p.n) AS parameters,
           r.rows, writeguard._shown_json(r.relations::text)::jsonb AS relations,
           writeguard._shown_json(writeguard._samples(r.samples::text))::jsonb AS samples,
           ARRAY(SELECT writeguard._shown(p.name) FROM pg_catalog.unnest(r.policies) WITH ORDINALITY AS p (name, n)
                 ORDER BY p.n) AS policies,
           greatest(asked.min_approvals, 1) AS approvals_needed,
           coalesce(given.approved_by, '{}') AS approved_by,
           r.expires_at, writeguard._shown(coalesce(asked.asks, '')) AS asks,
           writeguard._shown(r.search_path) AS search_path, writeguard._shown_json(r.settings::text)::jsonb AS settings,
           nullif(concat_ws(E'\n',
               CASE WHEN (writeguard._shown(r.statement), writeguard._shown(r.reason)) IS DISTINCT FROM (r.statement, r.reason)
                    THEN 'characters that cannot be seen, or turn a text around, are shown as escapes' END,
               'bound to the number of rows alone, not to which rows they are: ' || by_number.tables), '') AS notes
    FROM writeguard.request AS r
         CROSS JOIN LATERAL (
             SELECT max(k.min_approvals) AS min_approvals,
                    string_agg(format('%s: %s of %s%s', k.policy, k.given, k.min_approvals,
                                      coalesce(' by members of ' || quote_ident(k.approvers), '')),
                               E'\n' ORDER BY k.policy) AS asks
             FROM writeguard.approval_ask AS k WHERE k.request = r.id
         ) AS asked
         CROSS JOIN LATERAL (
             SELECT string_agg(writeguard._shown(t.name), ', ' ORDER BY t.name) AS tables
             FROM jsonb_object_keys(r.relations) AS t (name)
             WHERE NOT coalesce(r.fingerprints ? t.name, false)
         ) AS by_number
         CROSS JOIN LATERAL (
             SELECT array_agg(a.approver ORDER BY a.approved_at, a.approver) AS approved_by
             FROM writeguard.approval AS a WHERE a.request = r.id
         ) AS given
    WHERE r.state = 'pending' AND r.expires_at > clock_timestamp();
COMMENT ON VIEW writeguard.pending IS 'requests that wait for a decision';
COMMENT ON COLUMN writeguard.pending.id IS 'by which approve() and reject() call it';
COMMENT ON COLUMN writeguard.pending.requested_at IS 'when somebody asked';
COMMENT ON COLUMN writeguard.pending.requested_by IS 'login of who asked, and who cannot approve it';
COMMENT ON COLUMN writeguard.pending.role IS 'the role that was SET, else session_user';
COMMENT ON COLUMN writeguard.pending.reason IS 'why';
COMMENT ON COLUMN writeguard.pending.statement IS 'what execute() would run, letter by letter; bytes that are no letters as \x.., characters that are not seen as \u....';
COMMENT ON COLUMN writeguard.pending.parameters IS 'its parameters, as their types print them';
COMMENT ON COLUMN writeguard.pending.rows IS 'that the rehearsal changed in all';
COMMENT ON COLUMN writeguard.pending.relations IS 'rows that the rehearsal changed, by qualified table name';
COMMENT ON COLUMN writeguard.pending.samples IS 'some of these rows, before and after: those columns that the reader may SELECT; hidden: so many rows of which that is none';
COMMENT ON COLUMN writeguard.pending.policies IS 'names of the policies that a token has to lift';
COMMENT ON COLUMN writeguard.pending.approvals_needed IS 'distinct people, in all, as the policies are now; more where none is an approver for all policies';
COMMENT ON COLUMN writeguard.pending.approved_by IS 'logins that have approved so far';
COMMENT ON COLUMN writeguard.pending.expires_at IS 'until when it waits';
COMMENT ON COLUMN writeguard.pending.search_path IS 'in which the names in the statement were looked up, and will be';
COMMENT ON COLUMN writeguard.pending.settings IS 'that give the statement its meaning, by name';
COMMENT ON COLUMN writeguard.pending.notes IS 'what to look at twice; NULL: nothing';
COMMENT ON COLUMN writeguard.pending.asks IS 'for each policy a line: how many have approved of how many that must, and who they are';

CREATE OR REPLACE VIEW writeguard.my_requests WITH (security_barrier) AS
    SELECT r.id,
           CASE WHEN r.state IN ('pending', 'approved') AND r.expires_at <= clock_timestamp() THEN 'expired'
                ELSE r.state END AS state,
           writeguard._shown(r.statement) AS statement, r.rows, r.expires_at, r.requested_at,
           writeguard._shown(r.reason) AS reason,
           ARRAY(SELECT writeguard._shown(p.value) FROM pg_catalog.unnest(r.parameters) WITH ORDINALITY AS p (value, n)
                 ORDER BY p.n) AS parameters,
           writeguard._shown_json(r.relations::text)::jsonb AS relations,
           ARRAY(SELECT writeguard._shown(p.name) FROM pg_catalog.unnest(r.policies) WITH ORDINALITY AS p (name, n)
                 ORDER BY p.n) AS policies,
           ARRAY(SELECT a.approver FROM writeguard.approval AS a WHERE a.request = r.id
                 ORDER BY a.approved_at, a.approver) AS approved_by,
           r.decided_by, r.decided_at, writeguard._shown(r.comment) AS comment
    FROM writeguard.request AS r
    WHERE r.login = writeguard.login();
COMMENT ON VIEW writeguard.my_requests IS 'one''s own requests';
COMMENT ON COLUMN writeguard.my_requests.id IS 'by which execute() calls it';
COMMENT ON COLUMN writeguard.my_requests.state IS 'pending, approved, rejected, spent, expired, revoked';
COMMENT ON COLUMN writeguard.my_requests.statement IS 'what execute() would run, letter by letter; bytes that are no letters as \x.., characters that are not seen as \u....';
COMMENT ON COLUMN writeguard.my_requests.rows IS 'that the rehearsal changed in all';
COMMENT ON COLUMN writeguard.my_requests.expires_at IS 'of a pending request: until when it waits; of an approved one: until when its token is good';
COMMENT ON COLUMN writeguard.my_requests.requested_at IS 'when one asked';
COMMENT ON COLUMN writeguard.my_requests.reason IS 'why';
COMMENT ON COLUMN writeguard.my_requests.parameters IS 'its parameters, as their types print them';
COMMENT ON COLUMN writeguard.my_requests.relations IS 'rows that the rehearsal changed, by qualified table name';
COMMENT ON COLUMN writeguard.my_requests.policies IS 'names of the policies that a token has to lift';
COMMENT ON COLUMN writeguard.my_requests.approved_by IS 'logins that have approved so far';
COMMENT ON COLUMN writeguard.my_requests.decided_by IS 'who approved last, rejected or revoked it';
COMMENT ON COLUMN writeguard.my_requests.decided_at IS 'when that was';
COMMENT ON COLUMN writeguard.my_requests.comment IS 'by whoever decided';

-- The caller's rights, and the search_path of the rehearsal.
CREATE OR REPLACE FUNCTION writeguard.execute(request bigint) RETURNS TABLE ("row" jsonb)
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'writeguard_execute';
COMMENT ON FUNCTION writeguard.execute IS 'runs the reviewed statement of one''s own approved request, once, if it changes as many rows as reviewed; gives what it returns';

CREATE OR REPLACE FUNCTION writeguard.break_glass(statement text, reason text, parameters text[] DEFAULT '{}') RETURNS text
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'writeguard_break_glass';
COMMENT ON FUNCTION writeguard.break_glass IS 'gives a token for a statement without a second person, once its event is on disk; whom to trust with it is granted';

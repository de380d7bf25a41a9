--
-- Two policies that want approvals of their own people.
--
CREATE DATABASE council;
\c council
CREATE EXTENSION pg_writeguard;
CREATE TABLE orders (id int PRIMARY KEY, customer int NOT NULL, is_deleted boolean NOT NULL DEFAULT false);
CREATE TABLE items (id int PRIMARY KEY, orders int NOT NULL REFERENCES orders ON DELETE CASCADE);
INSERT INTO orders SELECT n, n % 10 FROM generate_series(1, 1000) AS n;
INSERT INTO items SELECT n, n % 1000 + 1 FROM generate_series(1, 3000) AS n;
CREATE ROLE council_dba;
CREATE ROLE council_owner;
CREATE ROLE council_anna LOGIN;
CREATE ROLE council_bert LOGIN IN ROLE council_dba;
CREATE ROLE council_carl LOGIN IN ROLE council_dba;
CREATE ROLE council_dora LOGIN IN ROLE council_owner;
CREATE ROLE council_emil LOGIN;
GRANT SELECT, UPDATE, DELETE ON orders, items TO council_anna;
SELECT writeguard.set_policy('orders', tables => '{public.orders}', max_rows => 50, approvers => 'council_dba', min_approvals => 2);
SELECT writeguard.set_policy('items', tables => '{public.items}', max_rows => 100, approvers => 'council_owner');
GRANT SELECT ON writeguard.pending, orders, items TO council_dba, council_owner;
GRANT EXECUTE ON FUNCTION writeguard.approve, writeguard.reject, writeguard.revoke TO council_dba, council_owner, council_emil;

-- Anna is refused, and asks.
\c - council_anna
DELETE FROM orders WHERE customer = 7;
SELECT writeguard.request(event => 3, reason => 'OPS-7: customer left') AS request \gset

-- What Bert sees.
\c - council_bert
\x on
SELECT id, requested_by, role, reason, statement, parameters, rows, relations, policies,
       approvals_needed, approved_by, asks
FROM writeguard.pending;
\x off
SELECT s->>'relation' AS relation, s->>'operation' AS operation, jsonb_array_length(s->'before') AS rows, s->'before'->0 AS first
FROM writeguard.pending, jsonb_array_elements(samples) AS s;
\x on

SELECT writeguard.approve(:request, comment => 'seen');
SELECT writeguard.approve(:request);

-- Being asked is not enough, one has to be somebody whom a policy asks.
\c - council_emil
SELECT writeguard.approve(:request);

-- What Dora sees then.
\c - council_dora
SELECT policies, approvals_needed, approved_by, asks FROM writeguard.pending;
SELECT writeguard.approve(:request);

-- The last one gets the token.
\c - council_carl
\x off
SELECT length(writeguard.approve(:request, valid_for => '5 min', max_rows => 400)) AS length_of_token;
SELECT writeguard.reject(:request);

-- Somebody has second thoughts.
\c - council_bert
SELECT writeguard.revoke(:request, 'not this week');
\c - council_anna
SELECT state, statement, rows, policies, approved_by, decided_by, comment FROM writeguard.my_requests;

\c - postgres
SELECT kind, login, row_limit, reason FROM writeguard.event WHERE approval IS NOT NULL ORDER BY id;

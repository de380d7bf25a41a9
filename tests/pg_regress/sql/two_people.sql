--
-- A write past the limit takes two people.
--
CREATE DATABASE duo;
\c duo
CREATE EXTENSION pg_writeguard;
CREATE TABLE orders (id int PRIMARY KEY, customer int NOT NULL, is_deleted boolean NOT NULL DEFAULT false);
INSERT INTO orders SELECT n, n % 10 FROM generate_series(1, 1000) AS n;
CREATE ROLE duo_anna LOGIN;
CREATE ROLE duo_bert LOGIN;
GRANT SELECT, UPDATE ON orders TO duo_anna, duo_bert;
SELECT writeguard.set_policy('duo', tables => '{public.orders}', max_rows => 50);
GRANT SELECT ON writeguard.pending TO duo_bert;
GRANT EXECUTE ON FUNCTION writeguard.approve, writeguard.reject TO duo_anna, duo_bert;

-- Anna wants to delete the orders of one customer, which are a hundred.
\c - duo_anna
SELECT writeguard.request('UPDATE orders SET is_deleted = true WHERE customer = 7',
                          reason => 'OPS-1: customer left') AS request \gset
SELECT state, statement, rows FROM writeguard.my_requests;

-- Asking changed nothing, and nobody approves their own request.
SELECT count(*) AS deleted FROM orders WHERE is_deleted;
\set VERBOSITY terse
SELECT writeguard.approve(:request);

-- Bert sees what it would change, and approves. The token is shown to him once.
\c - duo_bert
SELECT requested_by, role, reason, statement, rows, relations FROM writeguard.pending;
SELECT writeguard.approve(:request, comment => 'seen with anna') AS token \gset

-- The token is of no use to himself.
\set VERBOSITY terse
SET writeguard.override = on;
SET writeguard.token = :'token';
UPDATE orders SET is_deleted = true WHERE customer = 7;

-- Nor does it open another statement of anna's.
\c - duo_anna
\set VERBOSITY terse
SET writeguard.override = on;
SET writeguard.token = :'token';
UPDATE orders SET is_deleted = true WHERE customer = 8;

-- It opens the statement that was reviewed.
SET writeguard.override = on;
SET writeguard.token = :'token';
UPDATE orders SET is_deleted = true WHERE customer = 7;
SELECT count(*) AS deleted FROM orders WHERE is_deleted;

-- Once.
SET writeguard.override = on;
SET writeguard.token = :'token';
UPDATE orders SET is_deleted = true WHERE customer = 7;

-- With the transaction the session is disarmed again.
SHOW writeguard.override;
SHOW writeguard.token;

-- The second request is not approved.
SELECT writeguard.request('UPDATE orders SET is_deleted = true', reason => 'OPS-2: all of them') AS request \gset
\c - duo_bert
SELECT writeguard.reject(:request, 'why all?');
\c - duo_anna
SELECT state, statement, rows FROM writeguard.my_requests ORDER BY id;

-- All of it is on record.
\c - postgres
SELECT kind, login, rows, approval, statement
FROM writeguard.event ORDER BY id;

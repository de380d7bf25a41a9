--
-- The incident: an UPDATE whose WHERE was not sent.
--
CREATE DATABASE incident;
\c incident
CREATE EXTENSION pg_writeguard;
CREATE TABLE orders (id int PRIMARY KEY, customer int NOT NULL, is_deleted boolean NOT NULL DEFAULT false);
INSERT INTO orders SELECT n, n % 100 FROM generate_series(1, 10000) AS n;
ANALYZE orders;
CREATE ROLE incident_anna LOGIN;
GRANT SELECT, INSERT, UPDATE, DELETE ON orders TO incident_anna;

-- A statement may change a hundred orders, and no more.
SELECT writeguard.set_policy('orders-guard', tables => '{public.orders}', max_rows => 100);

\c - incident_anna

-- The client takes the blank line as the end of the statement:
--
--   UPDATE orders SET is_deleted = true
--
--   WHERE id IN (1, 2, 3);
UPDATE orders SET is_deleted = true;
SELECT count(*) AS deleted FROM orders WHERE is_deleted;

-- A WHERE that was cut short looks harmless, and is not.
UPDATE orders SET is_deleted = true WHERE id > 0;
SELECT count(*) AS deleted FROM orders WHERE is_deleted;

-- One row more than a hundred is one too many; a hundred pass. (Only the first line of errors from here on.)
\set VERBOSITY terse
DELETE FROM orders WHERE id <= 101;
DELETE FROM orders WHERE id > 9900;

-- Three rows are what was meant.
UPDATE orders SET is_deleted = true WHERE id IN (1, 2, 3);
SELECT count(*) AS deleted FROM orders WHERE is_deleted;

-- Adding rows destroys none.
INSERT INTO orders SELECT n, n % 100 FROM generate_series(20001, 21000) AS n;

-- The owner and the superuser have accidents, too.
\c - postgres
UPDATE orders SET is_deleted = true;
TRUNCATE orders;

-- Everything that was refused is on record, although nothing of it was committed.
SELECT id, login, operation, relation, row_limit, rows, statement
FROM writeguard.event WHERE kind = 'blocked' ORDER BY id;

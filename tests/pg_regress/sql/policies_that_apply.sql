--
-- Which of several policies apply.
--
CREATE DATABASE ledger;
\c ledger
CREATE EXTENSION pg_writeguard;
CREATE SCHEMA ledger;
SET search_path = ledger;
CREATE TABLE bookings (id int PRIMARY KEY, amount numeric NOT NULL);
CREATE TABLE notes (id int PRIMARY KEY, note text);
INSERT INTO bookings SELECT n, n FROM generate_series(1, 50) AS n;
CREATE ROLE ledger_app;
CREATE ROLE ledger_anna LOGIN IN ROLE ledger_app;
CREATE ROLE ledger_bert LOGIN;
GRANT USAGE ON SCHEMA ledger TO ledger_app;
GRANT SELECT, UPDATE, DELETE ON ALL TABLES IN SCHEMA ledger TO ledger_app;

-- From the general to the special.
SELECT writeguard.set_policy('everything', max_rows => 1000);
SELECT writeguard.set_policy('schema', tables => '{ledger.*}', max_rows => 40);
SELECT writeguard.set_policy('bookings', tables => '{ledger.bookings}', max_rows => 20);
SELECT writeguard.set_policy('bookings-app', tables => '{ledger.bookings}', roles => '{ledger_app}',
                             max_rows => 5, max_rows_per_transaction => 8, override => 'flag');
SELECT writeguard.set_policy('never-delete', tables => '{ledger.*}', operations => '{delete}',
                             max_rows => 2, override => 'never');

-- A stranger's: the table's own name sets aside the patterns.
SELECT policy, "limit", value, applies, why_not, strictest, override
FROM writeguard.effective('bookings', 'ledger_bert', 'update');

-- Of two policies on the same name, the one for a role sets aside the one for everybody, in what it states.
SELECT policy, "limit", value, applies, why_not, strictest, override
FROM writeguard.effective('bookings', 'ledger_anna', 'update');

-- DELETE has one policy more, and it is set aside like the others.
SELECT policy, "limit", value, applies, why_not, strictest, override
FROM writeguard.effective('bookings', 'ledger_anna', 'delete');

-- On a table that no policy names, patterns with that schema apply, all of them together.
SELECT policy, "limit", value, applies, why_not, strictest, override
FROM writeguard.effective('notes', 'ledger_anna', 'delete');

-- A policy for a role on a pattern and one for everybody on the name: neither is more specific, both apply.
SELECT writeguard.drop_policy('bookings-app');
SELECT writeguard.set_policy('schema-app', tables => '{ledger.*}', roles => '{ledger_app}', max_rows => 10);
SELECT policy, "limit", value, applies, why_not, strictest, override
FROM writeguard.effective('bookings', 'ledger_anna', 'update');

-- So the strictest decides.
\c - ledger_anna
SET search_path = ledger;
\set VERBOSITY terse
UPDATE bookings SET amount = 0 WHERE id <= 11;
UPDATE bookings SET amount = 0 WHERE id <= 10;
SELECT count(*) AS changed FROM bookings WHERE amount = 0;

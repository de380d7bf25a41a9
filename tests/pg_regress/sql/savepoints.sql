--
-- Transactions and savepoints: what was rolled back is not charged.
--
CREATE DATABASE steps;
\c steps
CREATE EXTENSION pg_writeguard;
CREATE TABLE t (id int PRIMARY KEY, v int NOT NULL DEFAULT 0);
INSERT INTO t SELECT n FROM generate_series(1, 30) AS n;
SELECT writeguard.set_policy('steps', tables => '{public.t}', max_rows => 5, max_rows_per_transaction => 8);
\set VERBOSITY terse

-- Five rows per statement, eight per transaction.
BEGIN;
UPDATE t SET v = 1 WHERE id <= 5;
UPDATE t SET v = 1 WHERE id BETWEEN 6 AND 8;
UPDATE t SET v = 1 WHERE id = 9;
ROLLBACK;

-- The next transaction starts from nothing.
BEGIN;
UPDATE t SET v = 2 WHERE id <= 5;

-- A savepoint that is rolled back gives its rows back.
SAVEPOINT s;
UPDATE t SET v = 2 WHERE id BETWEEN 6 AND 8;
ROLLBACK TO s;
UPDATE t SET v = 2 WHERE id BETWEEN 11 AND 13;

-- A refusal ends no more than its savepoint.
SAVEPOINT s2;
UPDATE t SET v = 2;
ROLLBACK TO s2;
SAVEPOINT s3;
UPDATE t SET v = 2 WHERE id = 14;
ROLLBACK TO s3;
COMMIT;
SELECT array_agg(id ORDER BY id) AS changed FROM t WHERE v = 2;

-- A savepoint that is released gives nothing back.
BEGIN;
SAVEPOINT s;
UPDATE t SET v = 3 WHERE id <= 5;
RELEASE s;
UPDATE t SET v = 3 WHERE id BETWEEN 6 AND 9;
ROLLBACK;

-- The same inside one statement: an exception block is a savepoint.
DO $$
BEGIN
    UPDATE t SET v = 4 WHERE id <= 3;
    BEGIN
        UPDATE t SET v = 4 WHERE id IN (4, 5);
        RAISE division_by_zero;
    EXCEPTION WHEN division_by_zero THEN
        RAISE NOTICE 'two rows were rolled back';
    END;
    UPDATE t SET v = 4 WHERE id IN (6, 7);
END $$;
SELECT array_agg(id ORDER BY id) AS changed FROM t WHERE v = 4;

-- Without the exception, all count together: they are one statement of the client.
DO $$
BEGIN
    UPDATE t SET v = 5 WHERE id <= 3;
    UPDATE t SET v = 5 WHERE id IN (4, 5, 6);
END $$;
SELECT count(*) AS changed FROM t WHERE v = 5;

-- After a COMMIT inside, counting starts again.
DO $$
BEGIN
    UPDATE t SET v = 6 WHERE id <= 5;
    COMMIT;
    UPDATE t SET v = 6 WHERE id BETWEEN 6 AND 10;
END $$;
SELECT count(*) AS changed FROM t WHERE v = 6;

//! The tables that the generated statements write to, and what counts their changes without the guard.
//!
//! Every table has the columns `id`, `v`, `w` and `uid`, a number that no other row ever has. Triggers on the tables of
//! schema `fuzz` log each row that was changed into a table that no policy covers, so that a rollback takes the entries
//! along. The tables of schema `bare` have no triggers at all; PostgreSQL's own counters of the transaction, which also
//! tell of what was rolled back, stand in for them.

/// Tables with rows, in the order of the counters.
pub const TABLES: [&str; 23] = [
    "fuzz.alpha",
    "fuzz.beta",
    "fuzz.par",
    "fuzz.kid",
    "fuzz.orphan",
    "fuzz.grandkid",
    "fuzz.tree",
    "fuzz.part_x1",
    "fuzz.part_x2",
    "fuzz.part_y",
    "fuzz.part_z",
    "fuzz.inh",
    "fuzz.inh_one",
    "fuzz.inh_one_more",
    "fuzz.trig",
    "fuzz.after",
    "fuzz.trans",
    "fuzz.sink",
    "fuzz.late",
    "fuzz.ruled",
    "bare.flat",
    "bare.split_1",
    "bare.split_2",
];

/// Policies that allow one table, tree or subtree not one row, and the tables that each covers.
pub const TREES: [(&str, &[&str]); 15] = [
    ("fuzz.alpha*", &["fuzz.alpha"]),
    ("fuzz.beta*", &["fuzz.beta"]),
    ("fuzz.par*", &["fuzz.par", "fuzz.part_x1", "fuzz.part_x2", "fuzz.part_y", "fuzz.part_z"]),
    ("fuzz.kid*", &["fuzz.kid"]),
    ("fuzz.grand*", &["fuzz.grandkid"]),
    ("fuzz.tree*", &["fuzz.tree"]),
    ("fuzz.part_x*", &["fuzz.part_x1", "fuzz.part_x2"]),
    ("fuzz.*_x1", &["fuzz.part_x1"]),
    ("fuzz.*_y", &["fuzz.part_y"]),
    ("fuzz.inh_*", &["fuzz.inh_one", "fuzz.inh_one_more"]),
    ("fuzz.inh_*_*", &["fuzz.inh_one_more"]),
    ("fuzz.trig*", &["fuzz.trig"]),
    ("fuzz.sink*", &["fuzz.sink"]),
    ("bare.*", &["bare.flat", "bare.split_1", "bare.split_2"]),
    ("bare.split_1*", &["bare.split_1"]),
];

pub const SETUP: &str = r#"
CREATE SCHEMA fuzz;
CREATE SCHEMA bare;
CREATE SCHEMA oracle;
CREATE SEQUENCE fuzz.uids;

CREATE TABLE fuzz.alpha (id int PRIMARY KEY, v int, w int, uid bigint NOT NULL DEFAULT nextval('fuzz.uids'));
CREATE TABLE fuzz.beta (LIKE fuzz.alpha INCLUDING ALL);
CREATE INDEX ON fuzz.beta (v);
CREATE TABLE fuzz.par (LIKE fuzz.alpha INCLUDING ALL);
CREATE TABLE fuzz.kid (LIKE fuzz.alpha INCLUDING ALL,
    ref int REFERENCES fuzz.par ON DELETE CASCADE ON UPDATE CASCADE);
CREATE TABLE fuzz.orphan (LIKE fuzz.alpha INCLUDING ALL,
    ref int DEFAULT 1 REFERENCES fuzz.par ON DELETE SET NULL ON UPDATE CASCADE);
CREATE TABLE fuzz.grandkid (LIKE fuzz.alpha INCLUDING ALL,
    ref int REFERENCES fuzz.kid ON DELETE CASCADE ON UPDATE SET DEFAULT);
CREATE TABLE fuzz.tree (LIKE fuzz.alpha INCLUDING ALL,
    ref int REFERENCES fuzz.tree ON DELETE CASCADE ON UPDATE CASCADE);

CREATE TABLE fuzz.part (LIKE fuzz.alpha INCLUDING DEFAULTS, region text DEFAULT 'x', bucket int DEFAULT 1,
    PRIMARY KEY (id, region, bucket)) PARTITION BY LIST (region);
CREATE TABLE fuzz.part_x PARTITION OF fuzz.part FOR VALUES IN ('x') PARTITION BY RANGE (bucket);
CREATE TABLE fuzz.part_x1 PARTITION OF fuzz.part_x FOR VALUES FROM (MINVALUE) TO (10);
CREATE TABLE fuzz.part_x2 PARTITION OF fuzz.part_x FOR VALUES FROM (10) TO (MAXVALUE);
CREATE TABLE fuzz.part_y PARTITION OF fuzz.part FOR VALUES IN ('y');
CREATE TABLE fuzz.part_z (bucket int NOT NULL DEFAULT 1, region text NOT NULL DEFAULT 'x', dropped int, w int, v int, id int NOT NULL,
    uid bigint NOT NULL DEFAULT nextval('fuzz.uids'));
ALTER TABLE fuzz.part_z DROP COLUMN dropped;
ALTER TABLE fuzz.part ATTACH PARTITION fuzz.part_z DEFAULT;

CREATE TABLE fuzz.inh (LIKE fuzz.alpha INCLUDING ALL);
CREATE TABLE fuzz.inh_one (more text DEFAULT 'more', PRIMARY KEY (id)) INHERITS (fuzz.inh);
CREATE TABLE fuzz.inh_one_more (PRIMARY KEY (id)) INHERITS (fuzz.inh_one);

CREATE TABLE fuzz.trig (LIKE fuzz.alpha INCLUDING ALL);
CREATE TABLE fuzz.after (LIKE fuzz.alpha INCLUDING ALL);
CREATE TABLE fuzz.trans (LIKE fuzz.alpha INCLUDING ALL);
CREATE TABLE fuzz.sink (LIKE fuzz.alpha INCLUDING ALL);
CREATE TABLE fuzz.late (LIKE fuzz.alpha INCLUDING ALL);
CREATE TABLE fuzz.ruled (LIKE fuzz.alpha INCLUDING ALL);

CREATE TABLE bare.flat (LIKE fuzz.alpha INCLUDING ALL);
CREATE TABLE bare.split (LIKE fuzz.alpha INCLUDING DEFAULTS, bucket int DEFAULT 1, PRIMARY KEY (id, bucket))
    PARTITION BY RANGE (bucket);
CREATE TABLE bare.split_1 PARTITION OF bare.split FOR VALUES FROM (MINVALUE) TO (10);
CREATE TABLE bare.split_2 PARTITION OF bare.split FOR VALUES FROM (10) TO (MAXVALUE);

-- Triggers that suppress rows, change them and write elsewhere.
CREATE FUNCTION fuzz.before() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF tg_op = 'DELETE' THEN
        RETURN CASE WHEN OLD.v % 5 = 0 THEN NULL ELSE OLD END;
    END IF;
    IF NEW.v % 7 = 0 THEN
        RETURN NULL;
    END IF;
    IF NEW.v % 11 = 3 THEN
        UPDATE fuzz.sink SET w = w + 1 WHERE id = NEW.id;
    END IF;
    NEW.w := NEW.w + 1;
    RETURN NEW;
END $$;
CREATE TRIGGER before BEFORE UPDATE OR DELETE ON fuzz.trig FOR EACH ROW EXECUTE FUNCTION fuzz.before();
CREATE FUNCTION fuzz.before_part() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF tg_op = 'UPDATE' AND NEW.w % 13 = 0 THEN
        RETURN NULL;
    END IF;
    RETURN CASE WHEN tg_op = 'DELETE' THEN OLD ELSE NEW END;
END $$;
CREATE TRIGGER before BEFORE UPDATE OR DELETE ON fuzz.part_y FOR EACH ROW EXECUTE FUNCTION fuzz.before_part();
CREATE FUNCTION fuzz.follow() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF tg_op = 'DELETE' THEN
        DELETE FROM fuzz.sink WHERE id = OLD.id;
    ELSE
        UPDATE fuzz.sink SET v = v + 1 WHERE id IN (NEW.id, NEW.id + 1);
        IF pg_trigger_depth() < 2 THEN
            UPDATE fuzz.after SET w = w + 1 WHERE id = NEW.id % 10 + 1;
        END IF;
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER follow AFTER UPDATE OR DELETE ON fuzz.after FOR EACH ROW EXECUTE FUNCTION fuzz.follow();
CREATE FUNCTION fuzz.updated() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    UPDATE fuzz.sink AS s SET w = n.v FROM new_rows AS n JOIN old_rows AS o USING (id) WHERE s.id = n.id AND n.v <> o.v;
    RETURN NULL;
END $$;
CREATE TRIGGER updated AFTER UPDATE ON fuzz.trans REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows
    FOR EACH STATEMENT EXECUTE FUNCTION fuzz.updated();
CREATE FUNCTION fuzz.deleted() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    DELETE FROM fuzz.sink WHERE id IN (SELECT id FROM old_rows);
    RETURN NULL;
END $$;
CREATE TRIGGER deleted AFTER DELETE ON fuzz.trans REFERENCING OLD TABLE AS old_rows
    FOR EACH STATEMENT EXECUTE FUNCTION fuzz.deleted();
CREATE FUNCTION fuzz.later() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    UPDATE fuzz.sink SET v = v + 1 WHERE id = OLD.id;
    RETURN NULL;
END $$;
CREATE CONSTRAINT TRIGGER later AFTER UPDATE OR DELETE ON fuzz.late DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW EXECUTE FUNCTION fuzz.later();

-- Views and rules.
CREATE VIEW fuzz.plain_view AS SELECT id, v, w FROM fuzz.alpha WHERE v < 80;
CREATE VIEW fuzz.view_on_view AS SELECT id, v, w FROM fuzz.plain_view WHERE w >= 0 WITH CASCADED CHECK OPTION;
CREATE VIEW fuzz.part_view AS SELECT id, v, w, bucket, region FROM fuzz.part WHERE v >= 0;
CREATE VIEW fuzz.joined AS SELECT a.id, a.v, b.w FROM fuzz.alpha AS a JOIN fuzz.beta AS b USING (id);
CREATE FUNCTION fuzz.instead() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF tg_op = 'DELETE' THEN
        DELETE FROM fuzz.beta WHERE id = OLD.id;
        RETURN OLD;
    END IF;
    IF NEW.v % 6 = 0 THEN
        RETURN NULL;
    END IF;
    UPDATE fuzz.alpha SET v = NEW.v WHERE id = OLD.id;
    UPDATE fuzz.beta SET w = NEW.w WHERE id = OLD.id;
    RETURN NEW;
END $$;
CREATE TRIGGER instead INSTEAD OF UPDATE OR DELETE ON fuzz.joined FOR EACH ROW EXECUTE FUNCTION fuzz.instead();
CREATE VIEW fuzz.rule_view AS SELECT id, v, w FROM fuzz.beta;
CREATE RULE on_update AS ON UPDATE TO fuzz.rule_view DO INSTEAD (
    UPDATE fuzz.beta SET v = NEW.v, w = NEW.w WHERE id = OLD.id;
    UPDATE fuzz.sink SET w = w + 1 WHERE id = OLD.id);
CREATE RULE on_delete AS ON DELETE TO fuzz.rule_view DO INSTEAD UPDATE fuzz.beta SET v = 0 WHERE id = OLD.id;
CREATE RULE on_update AS ON UPDATE TO fuzz.ruled DO ALSO UPDATE fuzz.sink SET v = NEW.v WHERE id = NEW.id;
CREATE RULE on_delete AS ON DELETE TO fuzz.ruled DO ALSO DELETE FROM fuzz.sink WHERE id = OLD.id;

-- Functions that write.
CREATE FUNCTION fuzz.loops(n int) RETURNS int LANGUAGE plpgsql AS $$
BEGIN
    FOR i IN 1..abs(n) % 4 + 1 LOOP
        UPDATE fuzz.alpha SET w = w + 1 WHERE id % 9 = i;
        CONTINUE WHEN NOT FOUND;
        DELETE FROM fuzz.sink WHERE id = 30 + i + n % 3;
    END LOOP;
    RETURN n;
END $$;
CREATE FUNCTION fuzz.tries(n int) RETURNS int LANGUAGE plpgsql AS $$
BEGIN
    FOR i IN 1..3 LOOP
        BEGIN
            UPDATE fuzz.beta SET v = v + 1 WHERE id % 7 = i;
            IF i % 2 = n % 2 THEN
                RAISE EXCEPTION 'take it back';
            END IF;
        EXCEPTION WHEN raise_exception THEN
            UPDATE fuzz.sink SET w = w + 1 WHERE id = abs(n) % 20 + i;
        END;
    END LOOP;
    RETURN n;
END $$;
CREATE FUNCTION fuzz.fails_midway(n int) RETURNS int LANGUAGE plpgsql AS $$
BEGIN
    UPDATE fuzz.alpha SET w = 100 / (v - n);
    RETURN n;
EXCEPTION WHEN division_by_zero THEN
    UPDATE fuzz.alpha SET w = 1 WHERE id <= 2;
    RETURN -n;
END $$;
CREATE FUNCTION fuzz.by_sql(n int) RETURNS int LANGUAGE sql AS $$
    UPDATE fuzz.beta SET w = n WHERE id <= abs(n) % 6;
    WITH d AS (DELETE FROM fuzz.grandkid WHERE id = n RETURNING id) SELECT n + count(*)::int FROM d;
$$;
CREATE FUNCTION fuzz.rows_by_sql(n int) RETURNS SETOF int LANGUAGE sql AS $$
    UPDATE fuzz.sink SET v = n WHERE id BETWEEN abs(n) % 20 AND abs(n) % 20 + 3 RETURNING id;
$$;
CREATE FUNCTION fuzz.walks(n int) RETURNS int LANGUAGE plpgsql AS $$
DECLARE
    c CURSOR FOR SELECT id FROM fuzz.alpha WHERE id % 5 = abs(n) % 5 FOR UPDATE;
BEGIN
    c := NULL;
    FOR r IN c LOOP
        UPDATE fuzz.alpha SET v = v + 1 WHERE CURRENT OF c;
    END LOOP;
    RETURN n;
END $$;
CREATE FUNCTION fuzz.dynamic(n int) RETURNS int LANGUAGE plpgsql AS $$
BEGIN
    EXECUTE 'DELETE FROM fuzz.inh WHERE id = $1' USING n;
    EXECUTE format('UPDATE fuzz.tree SET v = v + 1 WHERE id IN (%s, %s)', n, n + 1);
    RETURN n;
END $$;
CREATE FUNCTION fuzz.definer(n int) RETURNS int LANGUAGE plpgsql SECURITY DEFINER SET search_path = fuzz AS $$
BEGIN
    UPDATE part SET bucket = CASE WHEN bucket < 10 THEN 12 ELSE 2 END WHERE id % 8 = abs(n) % 8;
    RETURN n;
END $$;

-- What counts.
CREATE SEQUENCE oracle.entries;
CREATE UNLOGGED TABLE oracle.log (
    entry bigint NOT NULL DEFAULT nextval('oracle.entries'), tag text, relation text, operation text, uid bigint);
CREATE UNLOGGED TABLE oracle.counters (tag text, phase int, n bigint[]);
CREATE TABLE oracle.watched (place int PRIMARY KEY, relation text, oid oid);
CREATE TABLE oracle.covers (policy text, relation text);
CREATE FUNCTION oracle.note() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO oracle.log (tag, relation, operation, uid)
    VALUES (current_setting('fuzz.tag'), tg_table_schema || '.' || tg_table_name, tg_op,
            CASE WHEN tg_op = 'INSERT' THEN NEW.uid ELSE OLD.uid END);
    RETURN NULL;
END $$;
CREATE FUNCTION oracle.note_truncate() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    EXECUTE format('INSERT INTO oracle.log (tag, relation, operation, uid) SELECT %L, %L, %L, uid FROM ONLY %I.%I',
                   current_setting('fuzz.tag'), tg_table_schema || '.' || tg_table_name, 'TRUNCATE',
                   tg_table_schema, tg_table_name);
    RETURN NULL;
END $$;
DO $$
DECLARE
    t regclass;
BEGIN
    FOR t IN SELECT oid FROM pg_class WHERE relnamespace = 'fuzz'::regnamespace AND relkind IN ('r', 'p') LOOP
        IF NOT (SELECT relispartition FROM pg_class WHERE oid = t) THEN
            EXECUTE format('CREATE TRIGGER zz AFTER UPDATE OR DELETE ON %s FOR EACH ROW EXECUTE FUNCTION oracle.note()', t);
        END IF;
        IF t = 'fuzz.part'::regclass THEN
            EXECUTE format('CREATE TRIGGER yy AFTER INSERT ON %s FOR EACH ROW EXECUTE FUNCTION oracle.note()', t);
        END IF;
        EXECUTE format('CREATE TRIGGER zzz BEFORE TRUNCATE ON %s EXECUTE FUNCTION oracle.note_truncate()', t);
    END LOOP;
END $$;

-- Rows that the transaction updated or deleted so far, rolled back or not, by table.
CREATE FUNCTION oracle.counted() RETURNS bigint[] LANGUAGE sql AS $$
    SELECT array_agg(pg_stat_get_xact_tuples_updated(oid) + pg_stat_get_xact_tuples_deleted(oid) ORDER BY place)
    FROM oracle.watched
$$;
CREATE FUNCTION oracle.count(tag text, phase int) RETURNS void LANGUAGE sql AS $$
    INSERT INTO oracle.counters VALUES (tag, phase, oracle.counted())
$$;
-- Rows of the tables without triggers.
CREATE FUNCTION oracle.bare() RETURNS bigint LANGUAGE sql AS $$
    SELECT sum(pg_stat_get_xact_tuples_updated(oid) + pg_stat_get_xact_tuples_deleted(oid))::bigint
    FROM oracle.watched WHERE relation LIKE 'bare.%'
$$;

CREATE FUNCTION oracle.refill() RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    t regclass;
BEGIN
    TRUNCATE fuzz.alpha, fuzz.beta, fuzz.par, fuzz.kid, fuzz.orphan, fuzz.grandkid, fuzz.tree, fuzz.part, fuzz.inh,
             fuzz.inh_one, fuzz.inh_one_more, fuzz.trig, fuzz.after, fuzz.trans, fuzz.sink, fuzz.late, fuzz.ruled,
             bare.flat, bare.split;
    FOREACH t IN ARRAY '{fuzz.alpha, fuzz.beta, fuzz.par, fuzz.kid, fuzz.orphan, fuzz.grandkid, fuzz.trig, fuzz.after,
                         fuzz.trans, fuzz.sink, fuzz.late, fuzz.ruled, bare.flat}'::regclass[] LOOP
        EXECUTE format('INSERT INTO %s (id, v, w) SELECT i, i * 7 %% 41, i %% 6 FROM generate_series(1, 40) AS i', t);
    END LOOP;
    INSERT INTO fuzz.inh (id, v, w) SELECT i, i, i % 4 FROM generate_series(1, 15) AS i;
    INSERT INTO fuzz.inh_one (id, v, w) SELECT i, i, i % 4 FROM generate_series(10, 30) AS i;
    INSERT INTO fuzz.inh_one_more (id, v, w) SELECT i, i, i % 4 FROM generate_series(25, 40) AS i;
    INSERT INTO fuzz.tree (id, v, w, ref) SELECT i, i % 9, i % 5, nullif(i / 3, 0) FROM generate_series(1, 40) AS i;
    INSERT INTO fuzz.part (id, v, w, region, bucket)
        SELECT i, i % 17, i % 5, (ARRAY['x', 'y', 'x', 'q'])[i % 4 + 1], i % 20 FROM generate_series(1, 40) AS i;
    INSERT INTO bare.split (id, v, w, bucket) SELECT i, i % 17, i % 5, i % 20 FROM generate_series(1, 40) AS i;
    SET CONSTRAINTS ALL IMMEDIATE;
    UPDATE fuzz.kid SET ref = id / 2 + 1 WHERE id > 3;
    UPDATE fuzz.orphan SET ref = id % 10 + 1;
    UPDATE fuzz.grandkid SET ref = id / 3 + 1 WHERE id > 3;
    SET CONSTRAINTS ALL DEFERRED;
    DELETE FROM oracle.log;
END $$;
SELECT set_config('fuzz.tag', 'setup', false);

GRANT USAGE ON SCHEMA fuzz, bare, oracle TO PUBLIC;
GRANT ALL ON ALL TABLES IN SCHEMA fuzz, bare, oracle TO PUBLIC;
GRANT ALL ON ALL SEQUENCES IN SCHEMA fuzz, oracle TO PUBLIC;
"#;

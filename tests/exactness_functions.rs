//! Row changes are counted exactly inside functions, DO blocks, exception blocks, cursors and
//! procedures.

use crate::common::limits::{Bed, SIX, assert_limit, assert_limit_on, pass, refuse};

/// Two tables of six rows.
const TWO: &str = "
    CREATE TABLE t (id int PRIMARY KEY, v int NOT NULL DEFAULT 0);
    CREATE TABLE u (id int PRIMARY KEY, v int NOT NULL DEFAULT 0);
    INSERT INTO t SELECT i, 0 FROM generate_series(1, 6) AS i;
    INSERT INTO u SELECT i, 0 FROM generate_series(1, 6) AS i;";

/// Three levels: two parents, four children, eight grandchildren of each kind of action.
fn family(action: &str) -> String {
    format!(
        "CREATE TABLE parent (id int PRIMARY KEY);
         CREATE TABLE child (id int PRIMARY KEY, parent int REFERENCES parent {action});
         CREATE TABLE grandchild (id int PRIMARY KEY, child int REFERENCES child {action});
         INSERT INTO parent SELECT generate_series(1, 2);
         INSERT INTO child SELECT i, (i + 1) / 2 FROM generate_series(1, 4) AS i;
         INSERT INTO grandchild SELECT i, (i + 1) / 2 FROM generate_series(1, 8) AS i;"
    )
}

// Functions

#[test]
fn sql_function() {
    assert_limit(
        &format!(
            "{SIX} CREATE FUNCTION f() RETURNS SETOF int LANGUAGE sql
             AS 'UPDATE t SET v = 1 RETURNING id';"
        ),
        "SELECT f()",
        6,
    );
    assert_limit(
        &format!(
            "{SIX} CREATE FUNCTION f() RETURNS SETOF int LANGUAGE sql BEGIN ATOMIC
             UPDATE t SET v = 1 WHERE id <= 3; DELETE FROM t WHERE id > 3 RETURNING id; END;"
        ),
        "SELECT * FROM f()",
        6,
    );
}

#[test]
fn plpgsql_function_with_several_statements() {
    assert_limit(
        &format!(
            "{TWO} CREATE FUNCTION f() RETURNS int LANGUAGE plpgsql AS $$
             BEGIN
                 UPDATE t SET v = 1;
                 DELETE FROM u WHERE id > 2;
                 EXECUTE 'UPDATE u SET v = 7';
                 RETURN 1;
             END $$;"
        ),
        "SELECT f()",
        12,
    );
}

/// One statement of the client, a hundred of the function.
#[test]
fn function_that_loops() {
    assert_limit(
        &format!(
            "{SIX} CREATE FUNCTION f(n int) RETURNS void LANGUAGE plpgsql AS $$
             BEGIN
                 FOR i IN 1..n LOOP UPDATE t SET v = v + 1 WHERE id = i % 6 + 1; END LOOP;
             END $$;"
        ),
        "SELECT f(100)",
        100,
    );
}

#[test]
fn function_called_for_each_row() {
    let setup = format!(
        "{SIX} CREATE FUNCTION f(i int) RETURNS int LANGUAGE sql
         AS 'UPDATE t SET v = v + 1 WHERE id = i RETURNING id';"
    );
    assert_limit(&setup, "SELECT f(i) FROM generate_series(1, 6) AS i", 6);
    assert_limit(&setup, "SELECT i FROM generate_series(1, 6) AS i WHERE f(i) > 0", 6);
    assert_limit(&setup, "CREATE TABLE x AS SELECT f(i) FROM generate_series(1, 6) AS i", 6);
    assert_limit(&setup, "INSERT INTO t SELECT f(i) + 100 FROM generate_series(1, 6) AS i", 6);
    assert_limit(&setup, "VALUES (f(1)), (f(2)), (f(3))", 3);
}

#[test]
fn function_called_by_other_commands() {
    let setup = format!(
        "{TWO} CREATE FUNCTION f(i int) RETURNS int LANGUAGE sql
         AS 'UPDATE public.t SET v = v + 1 WHERE id = i RETURNING id';"
    );
    for sql in [
        "EXPLAIN ANALYZE SELECT f(id) FROM u",
        "CREATE MATERIALIZED VIEW m AS SELECT public.f(id) FROM u",
        "ALTER TABLE u ALTER COLUMN v TYPE bigint USING f(id)",
        "SELECT f(id) INTO x FROM u",
        "DO $$ BEGIN PERFORM f(id) FROM u; END $$",
    ] {
        assert_limit_on("{public.t}", &setup, sql, 6);
    }
}

#[test]
fn function_as_default_of_an_insert() {
    assert_limit(
        &format!(
            "{SIX} CREATE FUNCTION f(i int) RETURNS int LANGUAGE sql VOLATILE
             AS 'UPDATE t SET v = v + 1 WHERE id = i RETURNING id';
             CREATE TABLE x (id int, y int DEFAULT f(3));"
        ),
        "INSERT INTO x (id) SELECT generate_series(1, 4)",
        4,
    );
}

#[test]
fn function_in_an_update_of_another_table() {
    assert_limit(
        &format!(
            "{TWO} CREATE FUNCTION f(i int) RETURNS int LANGUAGE sql
             AS 'UPDATE u SET v = v + 1 WHERE id = i RETURNING v';"
        ),
        "UPDATE t SET v = f(id) WHERE id > 2",
        8,
    );
}

#[test]
fn returning_into_a_variable() {
    assert_limit(
        SIX,
        "DO $$ DECLARE x int; BEGIN
             UPDATE t SET v = 1 WHERE id = 1 RETURNING id INTO x;
             DELETE FROM t WHERE id = 2 RETURNING id INTO STRICT x;
             EXECUTE 'UPDATE t SET v = 2 WHERE id = 3 RETURNING id' INTO x;
         END $$",
        3,
    );
}

#[test]
fn do_block() {
    assert_limit(TWO, "DO $$ BEGIN UPDATE t SET v = 1; DELETE FROM u; END $$", 12);
}

#[test]
fn do_block_with_dynamic_sql() {
    assert_limit(
        SIX,
        "DO $$ BEGIN
             FOR i IN 1..4 LOOP EXECUTE 'UPDATE t SET v = $1 WHERE id = $1' USING i; END LOOP;
         END $$",
        4,
    );
}

/// The function's rights are its owner's, the acting role is the caller's.
#[test]
fn security_definer_does_not_change_the_acting_role() {
    let mut bed = Bed::new(SIX);
    let owner = bed.db().role("owner");
    let caller = bed.db().role("caller");
    bed.passes(&format!(
        "ALTER TABLE t OWNER TO {owner};
         CREATE FUNCTION f() RETURNS void LANGUAGE sql SECURITY DEFINER AS 'UPDATE t SET v = v + 1';
         ALTER FUNCTION f() OWNER TO {owner};"
    ));
    let mut client = bed.db().connect(&caller);
    bed.policy(&format!("tables => '{{public.t}}', roles => '{{{owner}}}', max_rows => 0"));
    pass(&mut client, "SELECT f()");
    bed.policy(&format!("tables => '{{public.t}}', roles => '{{{caller}}}', max_rows => 5"));
    let before = bed.contents();
    refuse(&mut client, "SELECT f()");
    assert_eq!(bed.contents(), before);
    bed.policy(&format!("tables => '{{public.t}}', roles => '{{{caller}}}', max_rows => 6"));
    pass(&mut client, "SELECT f()");
    let mut client = bed.db().connect(&owner);
    bed.policy(&format!("tables => '{{public.t}}', roles => '{{{caller}}}', max_rows => 0"));
    pass(&mut client, "SELECT f()");
}

// Exception blocks

#[test]
fn an_exception_block_gives_rows_back() {
    assert_limit(
        SIX,
        "DO $$ BEGIN
             BEGIN
                 UPDATE t SET v = 1;
                 RAISE 'take it back';
             EXCEPTION WHEN raise_exception THEN NULL;
             END;
             UPDATE t SET v = 2 WHERE id <= 5;
         END $$",
        6,
    );
}

/// Ten times six rows are taken back, six stay.
#[test]
fn many_exception_blocks_give_rows_back() {
    assert_limit(
        SIX,
        "DO $$ BEGIN
             FOR i IN 1..10 LOOP
                 BEGIN
                     UPDATE t SET v = i;
                     RAISE 'take it back';
                 EXCEPTION WHEN raise_exception THEN NULL;
                 END;
             END LOOP;
             DELETE FROM t;
         END $$",
        6,
    );
}

/// What an inner block kept goes when the outer one is rolled back.
#[test]
fn nested_exception_blocks() {
    let mut bed = Bed::new(SIX);
    let sql = "DO $$ BEGIN
             BEGIN
                 UPDATE t SET v = 1 WHERE id <= 2;
                 BEGIN
                     UPDATE t SET v = 2 WHERE id <= 3;
                 EXCEPTION WHEN division_by_zero THEN NULL;
                 END;
                 RAISE 'take both back';
             EXCEPTION WHEN raise_exception THEN NULL;
             END;
             BEGIN
                 UPDATE t SET v = 3 WHERE id <= 4;
             EXCEPTION WHEN division_by_zero THEN NULL;
             END;
             UPDATE t SET v = 4 WHERE id <= 3;
         END $$";
    bed.exactly("{public.t}", sql, 7);
}

#[test]
fn the_refusal_itself_can_be_caught() {
    let mut bed = Bed::new(SIX);
    bed.limit("{public.t}", 3);
    bed.passes(
        "DO $$ DECLARE code text; tab text; BEGIN
             BEGIN
                 UPDATE t SET v = 1;
                 RAISE 'not refused';
             EXCEPTION WHEN SQLSTATE 'WG001' THEN
                 GET STACKED DIAGNOSTICS code = RETURNED_SQLSTATE, tab = TABLE_NAME;
                 ASSERT code = 'WG001' AND tab = 't', code || ' ' || tab;
             END;
             ASSERT (SELECT sum(v) FROM t) = 0;
             UPDATE t SET v = 2 WHERE id <= 3;
         END $$",
    );
    assert_eq!(bed.number("SELECT sum(v) FROM t"), 6);
    bed.refused(
        "DO $$ BEGIN
             UPDATE t SET v = 5 WHERE id = 1;
             BEGIN
                 UPDATE t SET v = 6 WHERE id <= 3;
             EXCEPTION WHEN SQLSTATE 'WG001' THEN NULL;
             END;
             UPDATE t SET v = 7 WHERE id <= 3;
         END $$",
    );
    bed.passes(
        "DO $$ BEGIN
             UPDATE t SET v = 5 WHERE id = 1;
             BEGIN
                 UPDATE t SET v = 6 WHERE id <= 3;
             EXCEPTION WHEN SQLSTATE 'WG001' THEN NULL;
             END;
             UPDATE t SET v = 7 WHERE id <= 2;
         END $$",
    );
}

#[test]
fn the_refusal_of_a_cte_can_be_caught() {
    let mut bed = Bed::new(TWO);
    bed.limit("{public.*}", 8);
    bed.passes(
        "DO $$ DECLARE n int; BEGIN
             BEGIN
                 WITH x AS (UPDATE t SET v = 1 RETURNING id), y AS (DELETE FROM u RETURNING id)
                 SELECT count(*) INTO n FROM x JOIN y USING (id);
                 RAISE 'not refused';
             EXCEPTION WHEN SQLSTATE 'WG001' THEN NULL;
             END;
             WITH x AS (UPDATE t SET v = 1 RETURNING id), y AS (DELETE FROM u WHERE id > 4 RETURNING id)
             SELECT count(*) INTO n FROM x;
         END $$",
    );
    assert_eq!(bed.number("SELECT sum(v) FROM t"), 6);
    assert_eq!(bed.number("SELECT count(*) FROM u"), 4);
}

#[test]
fn the_refusal_of_a_cascade_can_be_caught() {
    let mut bed = Bed::new(&family("ON DELETE CASCADE"));
    bed.limit("{public.*}", 13);
    bed.passes(
        "DO $$ BEGIN
             BEGIN
                 DELETE FROM parent;
                 RAISE 'not refused';
             EXCEPTION WHEN SQLSTATE 'WG001' THEN NULL;
             END;
             DELETE FROM parent WHERE id = 1;
             UPDATE grandchild SET id = id + 100;
         END $$",
    );
    assert_eq!(bed.number("SELECT count(*) FROM parent"), 1);
    assert_eq!(bed.number("SELECT count(*) FROM grandchild WHERE id > 100"), 4);
}

/// Half of the loop's own writes are refused one by one.
#[test]
fn refusals_caught_inside_a_loop_over_a_query_that_writes() {
    let mut bed = Bed::new(TWO);
    bed.limit("{public.*}", 9);
    bed.passes(
        "DO $$ DECLARE r record; refused int := 0; BEGIN
             FOR r IN UPDATE t SET v = 1 RETURNING id LOOP
                 BEGIN
                     UPDATE u SET v = 1 WHERE id = r.id;
                 EXCEPTION WHEN SQLSTATE 'WG001' THEN refused := refused + 1;
                 END;
             END LOOP;
             ASSERT refused = 3, refused;
         END $$",
    );
    assert_eq!(bed.number("SELECT sum(v) FROM u"), 3);
}

/// The trigger's own block takes back what it wrote, not what the statement did around it.
#[test]
fn exception_block_in_a_trigger() {
    let setup = "
        CREATE TABLE t (id int PRIMARY KEY, v int NOT NULL DEFAULT 0);
        CREATE TABLE u (id int PRIMARY KEY, v int NOT NULL DEFAULT 0);
        INSERT INTO t SELECT i, 0 FROM generate_series(1, 6) AS i;
        INSERT INTO u SELECT i, 0 FROM generate_series(1, 6) AS i;
        CREATE FUNCTION even() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            BEGIN
                UPDATE u SET v = 1 WHERE id = NEW.id;
                IF NEW.id % 2 = 1 THEN RAISE 'odd'; END IF;
            EXCEPTION WHEN raise_exception THEN NULL;
            END;
            RETURN NEW;
        END $$;
        CREATE TRIGGER even BEFORE UPDATE ON t FOR EACH ROW EXECUTE FUNCTION even();";
    assert_limit(setup, "UPDATE t SET v = 1", 9);
    assert_limit_on("{public.t}", setup, "UPDATE t SET v = 1", 6);
    assert_limit_on("{public.u}", setup, "UPDATE t SET v = 1 WHERE id > 1", 3);
}

// Cursors

#[test]
fn for_loop_over_a_query_that_writes() {
    assert_limit(
        SIX,
        "DO $$ DECLARE r record; BEGIN
             FOR r IN UPDATE t SET v = 1 RETURNING id LOOP NULL; END LOOP;
         END $$",
        6,
    );
    assert_limit(
        SIX,
        "DO $$ DECLARE r record; BEGIN
             FOR r IN WITH d AS (DELETE FROM t RETURNING id) SELECT * FROM d LOOP NULL; END LOOP;
         END $$",
        6,
    );
}

#[test]
fn for_loop_over_a_query_that_writes_with_writes_inside() {
    assert_limit(
        TWO,
        "DO $$ DECLARE r record; BEGIN
             FOR r IN UPDATE t SET v = 1 RETURNING id LOOP
                 BEGIN
                     UPDATE u SET v = 1 WHERE id = r.id;
                     IF r.id = 3 THEN RAISE 'no'; END IF;
                 EXCEPTION WHEN raise_exception THEN NULL;
                 END;
             END LOOP;
         END $$",
        11,
    );
}

/// The loop's query writes row by row, while the loop itself does too.
#[test]
fn for_loop_over_a_function_that_writes() {
    assert_limit(
        &format!(
            "{TWO} CREATE FUNCTION f(i int) RETURNS int LANGUAGE sql
             AS 'UPDATE t SET v = v + 1 WHERE id = i RETURNING id';"
        ),
        "DO $$ DECLARE r record; BEGIN
             FOR r IN SELECT f(i) AS id FROM generate_series(1, 6) AS i LOOP
                 DELETE FROM u WHERE id = r.id;
             END LOOP;
         END $$",
        12,
    );
}

#[test]
fn where_current_of_in_a_function() {
    assert_limit(
        SIX,
        "DO $$ DECLARE c CURSOR FOR SELECT * FROM t WHERE id > 2 FOR UPDATE; BEGIN
             FOR r IN c LOOP UPDATE t SET v = 1 WHERE CURRENT OF c; END LOOP;
         END $$",
        4,
    );
}

/// Each UPDATE of the client's is a statement of its own.
#[test]
fn where_current_of_from_the_client() {
    let mut bed = Bed::new(SIX);
    let sql = "BEGIN; DECLARE c CURSOR FOR SELECT * FROM t FOR UPDATE;
        FETCH c; UPDATE t SET v = 1 WHERE CURRENT OF c;
        FETCH c; DELETE FROM t WHERE CURRENT OF c;
        FETCH c; UPDATE t SET v = 1 WHERE CURRENT OF c; COMMIT";
    bed.limit("{public.t}", 0);
    bed.refused(sql);
    bed.policy("tables => '{public.t}', max_rows_per_transaction => 2");
    bed.refused(sql);
    bed.policy("tables => '{public.t}', max_rows_per_transaction => 3");
    bed.passes(sql);
    let mut bed = Bed::new(SIX);
    bed.limit("{public.t}", 1);
    bed.passes(sql);
}

/// A FETCH is a statement; what its rows set off counts.
#[test]
fn cursor_over_a_function_that_writes() {
    let mut bed = Bed::new(&format!(
        "{SIX} CREATE FUNCTION f(i int) RETURNS int LANGUAGE sql
         AS 'UPDATE t SET v = v + 1 WHERE id = i RETURNING id';"
    ));
    let cursor = "BEGIN; DECLARE c CURSOR FOR SELECT f(i) FROM generate_series(1, 6) AS i;";
    bed.limit("{public.t}", 3);
    bed.refused(&format!("{cursor} FETCH 4 FROM c; COMMIT"));
    bed.refused(&format!("{cursor} FETCH 1 FROM c; MOVE ALL FROM c; COMMIT"));
    bed.passes(&format!("{cursor} FETCH 3 FROM c; FETCH 3 FROM c; COMMIT"));
}

/// A cursor WITH HOLD reads its rest at COMMIT.
#[test]
fn cursor_with_hold_over_a_function_that_writes() {
    let setup = format!(
        "{SIX} CREATE FUNCTION f(i int) RETURNS int LANGUAGE sql
         AS 'UPDATE t SET v = v + 1 WHERE id = i RETURNING id';"
    );
    assert_limit(
        &setup,
        "BEGIN; DECLARE c CURSOR WITH HOLD FOR SELECT f(i) FROM generate_series(1, 6) AS i; \
         COMMIT; CLOSE c",
        6,
    );
}

// Procedures

#[test]
fn procedure() {
    assert_limit(
        &format!(
            "{TWO} CREATE PROCEDURE p() LANGUAGE plpgsql AS $$
             BEGIN UPDATE t SET v = 1; UPDATE u SET v = 1; END $$;"
        ),
        "CALL p()",
        12,
    );
}

/// Each commit inside starts the count again.
#[test]
fn procedure_that_commits() {
    let mut bed = Bed::new(&format!(
        "{SIX} CREATE PROCEDURE p(n int) LANGUAGE plpgsql AS $$
         BEGIN
             FOR i IN 1..6 LOOP
                 UPDATE t SET v = v + 1 WHERE id = i;
                 IF i % n = 0 THEN COMMIT; END IF;
             END LOOP;
         END $$;"
    ));
    bed.limit("{public.t}", 3);
    bed.passes("CALL p(1)");
    bed.passes("CALL p(2)");
    bed.passes("CALL p(3)");
    assert_eq!(bed.number("SELECT sum(v) FROM t"), 18);
    bed.refused("CALL p(6)");
    // Four rows in the first part are too many.
    bed.refused("CALL p(4)");
    bed.limit("{public.t}", 4);
    bed.passes("CALL p(4)");
    bed.policy("tables => '{public.t}', max_rows_per_transaction => 2");
    bed.passes("CALL p(2)");
    bed.refused("CALL p(3)");
}

/// What was committed before the refusal stays, as with any error.
#[test]
fn procedure_that_is_refused_after_a_commit() {
    let mut bed = Bed::new(&format!(
        "{SIX} CREATE PROCEDURE p() LANGUAGE plpgsql AS $$
         BEGIN
             UPDATE t SET v = 1 WHERE id <= 3;
             COMMIT;
             UPDATE t SET v = 2 WHERE id <= 4;
         END $$;"
    ));
    bed.limit("{public.t}", 3);
    refuse(&mut bed.writer, "CALL p()");
    assert_eq!(bed.number("SELECT sum(v) FROM t"), 3);
    bed.passes("UPDATE t SET v = 5 WHERE id <= 3");
    bed.refused("UPDATE t SET v = 5 WHERE id <= 4");
}

#[test]
fn procedure_that_rolls_back() {
    let mut bed = Bed::new(&format!(
        "{SIX} CREATE PROCEDURE p(n int) LANGUAGE plpgsql AS $$
         BEGIN
             UPDATE t SET v = 1 WHERE id <= 3;
             ROLLBACK;
             UPDATE t SET v = 2 WHERE id <= n;
         END $$;"
    ));
    bed.limit("{public.t}", 3);
    bed.refused("CALL p(4)");
    bed.passes("CALL p(3)");
    assert_eq!(bed.number("SELECT sum(v) FROM t"), 6);
}

/// The loop's cursor is held over the commits inside it.
#[test]
fn procedure_that_commits_in_a_loop_over_a_query_that_writes() {
    let mut bed = Bed::new(&format!(
        "{TWO} CREATE PROCEDURE p() LANGUAGE plpgsql AS $$
         DECLARE r record;
         BEGIN
             FOR r IN SELECT id FROM t ORDER BY id LOOP
                 DELETE FROM t WHERE id = r.id;
                 UPDATE u SET v = 1 WHERE id = r.id;
                 COMMIT;
             END LOOP;
         END $$;"
    ));
    bed.limit("{public.*}", 1);
    bed.refused("CALL p()");
    bed.limit("{public.*}", 2);
    bed.passes("CALL p()");
    assert_eq!(bed.number("SELECT count(*) FROM t"), 0);
}

#[test]
fn do_block_that_commits() {
    let mut bed = Bed::new(SIX);
    bed.limit("{public.t}", 3);
    bed.passes(
        "DO $$ BEGIN
             UPDATE t SET v = 1 WHERE id <= 3;
             COMMIT;
             UPDATE t SET v = 2 WHERE id > 3;
         END $$",
    );
    assert_eq!(bed.number("SELECT sum(v) FROM t"), 9);
}

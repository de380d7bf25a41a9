-- Nothing that somebody made in the schema beforehand has a part in what follows.
SET LOCAL search_path = pg_catalog, pg_temp;

-- Fails with 55000, and says which line to add, unless the server preloads the library; with WG007 where the schema
-- is somebody else's or not empty.
CREATE FUNCTION writeguard.assert_installable() RETURNS void
    LANGUAGE c STRICT
    AS 'MODULE_PATHNAME', 'writeguard_assert_installable';
SELECT writeguard.assert_installable();
DROP FUNCTION writeguard.assert_installable();

-- Fails with 55000, and says which line to add, unless the server preloads the library.
CREATE FUNCTION writeguard.assert_preloaded() RETURNS void
    LANGUAGE c STRICT
    AS 'MODULE_PATHNAME', 'writeguard_assert_preloaded';
SELECT writeguard.assert_preloaded();
DROP FUNCTION writeguard.assert_preloaded();

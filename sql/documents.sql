-- Values print the same whatever the session's settings are, and a number comes back as it was.
CREATE FUNCTION writeguard.export_policies() RETURNS jsonb
    LANGUAGE sql STABLE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    SET intervalstyle = 'postgres'
    SET extra_float_digits = 1
    AS $$
        SELECT coalesce(
            pg_catalog.jsonb_agg(pg_catalog.jsonb_strip_nulls(pg_catalog.to_jsonb(p)) ORDER BY p.name COLLATE pg_catalog."C"),
            '[]'::pg_catalog.jsonb)
        FROM writeguard.policy AS p
    $$;
COMMENT ON FUNCTION writeguard.export_policies IS 'all policies as one document: an array of objects, by name, without the columns that are NULL';

-- The search_path stays the caller's: an unqualified name in the document is looked up as set_policy looks it up.
CREATE FUNCTION writeguard.import_policies(
    document jsonb,
    prune    boolean DEFAULT false,
    dry_run  boolean DEFAULT false
) RETURNS TABLE (name text, action text, difference jsonb)
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    SET intervalstyle = 'postgres'
    SET extra_float_digits = 1
    AS 'MODULE_PATHNAME', 'writeguard_import_policies';
COMMENT ON FUNCTION writeguard.import_policies IS 'sets the policies of a document, all or none; prune drops all others, dry_run changes nothing; WG007 for a wrong value or key';

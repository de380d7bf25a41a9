CREATE OR REPLACE FUNCTION writeguard.preview(statement text, sample integer DEFAULT 5)
    RETURNS TABLE (
        relation  text,
        operation text,
        rows      bigint,
        at_least  boolean,
        row_limit bigint,
        verdict   text,
        policy    text,
        before    jsonb,
        after     jsonb
    )
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'writeguard_preview';
COMMENT ON FUNCTION writeguard.preview IS 'runs a statement and takes it back: rows by table and operation, what policies would say, and some rows before and after';

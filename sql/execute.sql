-- The caller's rights, and the search_path of the rehearsal.
CREATE FUNCTION writeguard.execute(request bigint) RETURNS TABLE ("row" jsonb)
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'writeguard_execute';
COMMENT ON FUNCTION writeguard.execute IS 'runs the reviewed statement of one''s own approved request, once, if it changes as many rows as reviewed; gives what it returns';

CREATE FUNCTION writeguard.break_glass(statement text, reason text, parameters text[] DEFAULT '{}') RETURNS text
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'writeguard_break_glass';
COMMENT ON FUNCTION writeguard.break_glass IS 'gives a token for a statement without a second person, once its event is on disk; whom to trust with it is granted';

CREATE FUNCTION writeguard.undo(change bigint, on_conflict text DEFAULT 'error', dry_run boolean DEFAULT false)
    RETURNS TABLE (relation text, restored bigint, conflicts bigint)
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'writeguard_undo';
COMMENT ON FUNCTION writeguard.undo IS 'puts back the rows and columns that a change took, unless they were changed again since: WG009, or they stay as they are (skip)';

CREATE FUNCTION writeguard.undo_conflicts(change bigint)
    RETURNS TABLE (relation text, key jsonb, was jsonb, wrote jsonb, is_now jsonb)
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'writeguard_undo_conflicts';
COMMENT ON FUNCTION writeguard.undo_conflicts IS 'the rows of a change that were changed again since: as they were before it, as it left them, as they are now';

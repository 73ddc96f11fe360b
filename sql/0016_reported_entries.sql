-- What Redis may lose, an API process still knows: the entries that its calls have made and that the ledger has not told of
-- yet. Its report at the end of an epoch carries them, and the recovery takes from here what the stream has lost.
--
-- The version before works with this schema: it reports no entries.

CREATE TABLE reported_entries (
    shard   integer NOT NULL,
    epoch   bigint  NOT NULL,
    seq     bigint  NOT NULL,  -- of the last event, as in `entries`
    n       integer NOT NULL,
    after   text    NOT NULL,
    tip     text    NOT NULL,
    at_ms   bigint  NOT NULL,
    events  bytea   NOT NULL,
    CONSTRAINT reported_entry_is_made_once PRIMARY KEY (shard, epoch, seq, tip)
);

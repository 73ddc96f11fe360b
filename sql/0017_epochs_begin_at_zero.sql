-- An epoch begins at position 0, unless whoever begins it says otherwise: the command that lets a stopped shard go on
-- (docs/operations.md) names no position. Without this the next epoch's row told of events that it never had, and `verify` took that for damage.
--
-- The version before works with this schema.

CREATE OR REPLACE FUNCTION keep_end_of_epoch() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO epochs VALUES (old.shard, old.epoch, old.committed, old.tip) ON CONFLICT DO NOTHING;
    IF new.committed = old.committed THEN
        new.committed := 0;
    END IF;
    new.tip := '';
    RETURN new;
END $$;

UPDATE epochs SET seq = 0, tip = ''
WHERE seq > 0
  AND NOT EXISTS (SELECT FROM entries e WHERE (e.shard, e.epoch) = (epochs.shard, epochs.epoch))
  AND NOT EXISTS (SELECT FROM old_events o WHERE (o.shard, o.epoch) = (epochs.shard, epochs.epoch))
  AND NOT EXISTS (SELECT FROM dead_letters d WHERE (d.shard, d.epoch) = (epochs.shard, epochs.epoch));

-- The hash chain: every row that stands for a position carries a hash over itself and the row before it in its shard, so
-- that a row which was edited, removed, added or moved is seen. coupon_svc/domain/chain.py says what is hashed.
-- Rows from before this migration have no hash: a shard's chain begins with its first row that has one.

ALTER TABLE events       ADD COLUMN chain bytea;
ALTER TABLE dead_letters ADD COLUMN chain bytea;
ALTER TABLE shards       ADD COLUMN chain bytea NOT NULL DEFAULT decode(repeat('00', 32), 'hex');  -- the last row's

-- Late events come at positions long passed, so they have a chain of their own, in the order in which they came. For that
-- they are a log that is only ever added to, with the whole event in it. `recorded`: `events` was given the row, too.
ALTER TABLE late_events
    DROP CONSTRAINT late_events_pkey,
    ADD COLUMN link        bigint,
    ADD COLUMN recorded    boolean NOT NULL DEFAULT false,
    ADD COLUMN uses        integer,
    ADD COLUMN reference   text,
    ADD COLUMN metadata    text,
    ADD COLUMN idem        text,
    ADD COLUMN fingerprint text,
    ADD COLUMN chain       bytea;
UPDATE late_events l SET
    link = numbered.link,
    recorded = EXISTS (SELECT FROM events e WHERE (e.shard, e.epoch, e.seq) = (l.shard, l.epoch, l.seq))
FROM (SELECT shard, epoch, seq, row_number() OVER (PARTITION BY shard ORDER BY at, epoch, seq) AS link FROM late_events)
     AS numbered
WHERE (numbered.shard, numbered.epoch, numbered.seq) = (l.shard, l.epoch, l.seq);
CREATE UNIQUE INDEX late_events_in_order ON late_events (shard, link);
CREATE INDEX late_events_by_position ON late_events (shard, epoch, seq);

-- The last row of each shard's late events. Apart from `shards`, so that a receipt never waits for a commit.
CREATE TABLE late_heads (
    shard  integer PRIMARY KEY,
    links  bigint NOT NULL,
    chain  bytea NOT NULL
);
INSERT INTO late_heads SELECT shard, count(*), decode(repeat('00', 32), 'hex') FROM late_events GROUP BY shard;

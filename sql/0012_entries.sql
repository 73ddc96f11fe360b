-- needs: 0012_entries
--
-- The ledger keeps the entries of the streams as they are: each is one call's part of a shard, with all its events. What
-- follows from them (coupons, redemptions) is derived in the same commit. docs/adr/0001-page-of-schema.md says why.
--
-- Versions before this one do not work with this schema: they would look for a table that is a view now.

ALTER TABLE events RENAME TO old_events;  -- one row for each event, as versions before wrote them; nothing is added any more

CREATE TABLE entries (
    shard         integer     NOT NULL,
    epoch         bigint      NOT NULL,
    seq           bigint      NOT NULL,  -- of its last event
    n             integer     NOT NULL,  -- of events: they are at seq - n + 1 … seq
    after         text        NOT NULL,  -- the tip of the entry before, '' at the beginning of an epoch
    tip           text        NOT NULL,  -- tells it from any other entry at the same position
    at_ms         bigint      NOT NULL,  -- of all its events, by Redis's clock
    keyed         boolean     NOT NULL,  -- whether an event of it may carry an Idempotency-Key
    events        bytea       NOT NULL,  -- JSON, byte for byte as it stood in the stream
    chain         bytea       NOT NULL,
    committed_at  timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (shard, epoch, seq, committed_at)
) PARTITION BY RANGE (committed_at);
ALTER TABLE entries ALTER COLUMN events SET STORAGE EXTERNAL;  -- to be read in part, and never to be packed at each commit

-- The writer makes the part of each month before it begins (coupon_svc/postgres/parts.py). What finds none goes into
-- `entries_else`, so that no commit fails for it.
CREATE TABLE entries_else PARTITION OF entries DEFAULT;
DO $$
DECLARE
    month timestamptz := date_trunc('month', now(), 'UTC');
BEGIN
    FOR ahead IN 0..2 LOOP
        EXECUTE format('CREATE TABLE entries_%s PARTITION OF entries FOR VALUES FROM (%L) TO (%L)',
            to_char(month AT TIME ZONE 'UTC' + make_interval(months => ahead), 'YYYY_MM'),
            (month AT TIME ZONE 'UTC' + make_interval(months => ahead)) AT TIME ZONE 'UTC',
            (month AT TIME ZONE 'UTC' + make_interval(months => ahead + 1)) AT TIME ZONE 'UTC');
    END LOOP;
END $$;

-- Where each epoch ended, beside the one that a shard is in. So old parts of `entries` can be detached.
CREATE TABLE epochs (
    shard  integer NOT NULL,
    epoch  bigint  NOT NULL,
    seq    bigint  NOT NULL,  -- up to which the ledger accounts for it
    tip    text,              -- of the last entry; null when what stands before it is missing
    PRIMARY KEY (shard, epoch)
);

ALTER TABLE shards ADD COLUMN tip text NOT NULL DEFAULT '';  -- of the entry at `committed`
ALTER TABLE shards SET (fillfactor = 20);  -- each commit writes its rows anew, and finds room on the same page

INSERT INTO epochs
SELECT shard, certified_epoch, coalesce(greatest(
    (SELECT max(seq) FROM old_events e WHERE e.shard = shards.shard AND e.epoch = certified_epoch),
    (SELECT max(seq) FROM dead_letters d WHERE d.shard = shards.shard AND d.epoch = certified_epoch)), 0), NULL
FROM shards WHERE certified_epoch < epoch;

CREATE FUNCTION keep_end_of_epoch() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO epochs VALUES (old.shard, old.epoch, old.committed, old.tip) ON CONFLICT DO NOTHING;
    new.tip := '';
    RETURN new;
END $$;
CREATE TRIGGER an_epoch_ends BEFORE UPDATE OF epoch ON shards
    FOR EACH ROW WHEN (new.epoch <> old.epoch) EXECUTE FUNCTION keep_end_of_epoch();

-- The events of an entry, for people and for `verify`; nothing where they cannot be read. A text with NUL, which no column
-- can hold, is shown with another sign in its place, so that it hides no other event.
CREATE FUNCTION events_of_entry(entry_seq bigint, entry_n integer, body bytea)
RETURNS TABLE (seq bigint, event text, book_id text, code text, user_id text, uses integer, reference text, metadata text,
               idem text, fingerprint text) LANGUAGE plpgsql IMMUTABLE AS $$
BEGIN
    RETURN QUERY
    SELECT entry_seq - entry_n + place, e ->> 0, e ->> 1, e ->> 2, e ->> 3, (e ->> 6)::integer, nullif(e ->> 7, ''),
           nullif(e ->> 8, ''), nullif(e ->> 4, ''), nullif(e ->> 5, '')
    FROM jsonb_array_elements(replace(convert_from(body, 'UTF8'), '\u0000', '\ufffd')::jsonb) WITH ORDINALITY AS of_entry (e, place);
EXCEPTION WHEN OTHERS THEN
    RETURN;
END $$;

CREATE VIEW events AS
SELECT shard, epoch, seq, event, book_id, code, user_id, at_ms, uses, reference, metadata, idem, fingerprint FROM old_events
UNION ALL
SELECT entries.shard, entries.epoch, e.seq, e.event, e.book_id, e.code, e.user_id, entries.at_ms, e.uses, e.reference,
       e.metadata, e.idem, e.fingerprint
FROM entries, LATERAL events_of_entry(entries.seq, entries.n, entries.events) AS e
WHERE NOT EXISTS (SELECT FROM dead_letters d
                  WHERE d.shard = entries.shard AND d.epoch = entries.epoch AND d.seq = e.seq)
UNION ALL
SELECT shard, epoch, seq, event, book_id, code, user_id, at_ms, uses, reference, metadata, idem, fingerprint
FROM late_events l
WHERE recorded AND NOT EXISTS (SELECT FROM old_events o
                               WHERE o.shard = l.shard AND o.epoch = l.epoch AND o.seq = l.seq);

-- Entries of some shards, and what follows from them. The arrays belong together by their first letters: e are entries, a
-- are codes that were assigned, r redemptions, d dead letters. Rows of a shard that is not in `of_shards` are left out.
CREATE FUNCTION write_entries(
    of_shards integer[],
    e_shard integer[], e_epoch bigint[], e_seq bigint[], e_n integer[], e_after text[], e_tip text[], e_at_ms bigint[],
    e_keyed boolean[], e_events bytea[], e_chain bytea[],
    a_shard integer[], a_book text[], a_code text[], a_user text[], a_at_ms bigint[], a_epoch bigint[], a_seq bigint[],
    r_shard integer[], r_book text[], r_code text[], r_uses integer[], r_user text[], r_at_ms bigint[], r_reference text[],
    r_metadata text[], r_epoch bigint[], r_seq bigint[],
    d_shard integer[], d_epoch bigint[], d_seq bigint[], d_fields bytea[], d_reason text[], d_book text[], d_code text[]
) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO entries (shard, epoch, seq, n, after, tip, at_ms, keyed, events, chain)
    SELECT * FROM unnest(e_shard, e_epoch, e_seq, e_n, e_after, e_tip, e_at_ms, e_keyed, e_events, e_chain) AS e (shard)
    WHERE shard = ANY (of_shards);
    INSERT INTO coupons (book_id, code, user_id, assigned_at_ms, epoch, seq)
    SELECT book, code, holder, at_ms, epoch, seq
    FROM unnest(a_shard, a_book, a_code, a_user, a_at_ms, a_epoch, a_seq) AS a (shard, book, code, holder, at_ms, epoch, seq)
    WHERE shard = ANY (of_shards);
    IF cardinality(r_shard) > 0 THEN
        INSERT INTO redemptions (book_id, code, uses, user_id, redeemed_at_ms, reference, metadata, epoch, seq)
        SELECT book, code, used, holder, at_ms, reference, metadata, epoch, seq
        FROM unnest(r_shard, r_book, r_code, r_uses, r_user, r_at_ms, r_reference, r_metadata, r_epoch, r_seq)
             AS r (shard, book, code, used, holder, at_ms, reference, metadata, epoch, seq)
        WHERE shard = ANY (of_shards);
        UPDATE coupons SET uses = spent.used
        FROM (SELECT book, code, max(used) AS used FROM unnest(r_shard, r_book, r_code, r_uses) AS r (shard, book, code, used)
              WHERE shard = ANY (of_shards) GROUP BY book, code) AS spent
        WHERE coupons.book_id = spent.book AND coupons.code = spent.code AND coupons.uses < spent.used;
        -- A unique violation, too, says that an event contradicts the ledger.
        IF EXISTS (SELECT FROM unnest(r_shard, r_book, r_code, r_user) AS r (shard, book, code, holder)
                   JOIN coupons ON coupons.book_id = r.book AND coupons.code = r.code
                   WHERE shard = ANY (of_shards) AND coupons.user_id <> r.holder) THEN
            RAISE unique_violation USING MESSAGE = 'a code was redeemed by another than its holder';
        END IF;
    END IF;
    IF cardinality(d_shard) > 0 THEN
        INSERT INTO dead_letters (shard, epoch, seq, fields, reason, book_id, code)
        SELECT * FROM unnest(d_shard, d_epoch, d_seq, d_fields, d_reason, d_book, d_code) AS d (shard)
        WHERE shard = ANY (of_shards);
    END IF;
END $$;

-- One commit of a writer: each shard moves whose row is as the writer believes (c), and only those are written. Says of each
-- whether it was `moved`, was `edited` (its last hash is another), or has another owner, epoch or position (`lost`).
CREATE FUNCTION commit_entries(
    writer text,
    c_shard integer[], c_epoch bigint[], c_generation bigint[], c_committed bigint[], c_tip text[], c_chain bytea[],
    c_upto bigint[], c_new_tip text[], c_head bytea[],
    e_shard integer[], e_epoch bigint[], e_seq bigint[], e_n integer[], e_after text[], e_tip text[], e_at_ms bigint[],
    e_keyed boolean[], e_events bytea[], e_chain bytea[],
    a_shard integer[], a_book text[], a_code text[], a_user text[], a_at_ms bigint[], a_epoch bigint[], a_seq bigint[],
    r_shard integer[], r_book text[], r_code text[], r_uses integer[], r_user text[], r_at_ms bigint[], r_reference text[],
    r_metadata text[], r_epoch bigint[], r_seq bigint[],
    d_shard integer[], d_epoch bigint[], d_seq bigint[], d_fields bytea[], d_reason text[], d_book text[], d_code text[]
) RETURNS TABLE (of_shard integer, outcome text) LANGUAGE plpgsql AS $$
DECLARE
    moved integer[];
BEGIN
    WITH done AS (
        UPDATE shards SET committed = c.upto, tip = c.new_tip, chain = c.head
        FROM unnest(c_shard, c_epoch, c_generation, c_committed, c_tip, c_chain, c_upto, c_new_tip, c_head)
             AS c (shard, epoch, generation, committed, tip, chain, upto, new_tip, head)
        WHERE shards.shard = c.shard AND shards.epoch = c.epoch AND shards.generation = c.generation
          AND shards.committed = c.committed AND shards.tip = c.tip AND shards.chain = c.chain AND shards.owner = writer
          AND shards.stopped IS NULL
        RETURNING shards.shard)
    SELECT coalesce(array_agg(done.shard), '{}') INTO moved FROM done;
    PERFORM write_entries(
        moved, e_shard, e_epoch, e_seq, e_n, e_after, e_tip, e_at_ms, e_keyed, e_events, e_chain,
        a_shard, a_book, a_code, a_user, a_at_ms, a_epoch, a_seq,
        r_shard, r_book, r_code, r_uses, r_user, r_at_ms, r_reference, r_metadata, r_epoch, r_seq,
        d_shard, d_epoch, d_seq, d_fields, d_reason, d_book, d_code);
    RETURN QUERY
    SELECT c.shard, CASE
        WHEN c.shard = ANY (moved) THEN 'moved'
        WHEN EXISTS (SELECT FROM shards WHERE shards.shard = c.shard AND shards.epoch = c.epoch
                     AND shards.generation = c.generation AND shards.committed = c.committed AND shards.owner = writer
                     AND shards.stopped IS NULL) THEN 'edited'
        ELSE 'lost' END
    FROM unnest(c_shard, c_epoch, c_generation, c_committed) AS c (shard, epoch, generation, committed);
END $$;

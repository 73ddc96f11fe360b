-- Recovery looks at what happened of late, and no longer at all that ever was.
--
-- A code that Redis was lent has a coupon; or its place is in (accounted_upto, leased_upto]; or it is in
-- outstanding_codes or lone_leases. So which lent codes have no coupon is found without a look at every code ever lent.
-- The owner's upkeep moves `accounted_upto` up, and writes down those that have no coupon by then.

ALTER TABLE books
    ADD COLUMN accounted_upto bigint NOT NULL DEFAULT 0,
    ADD COLUMN accounted      bigint NOT NULL DEFAULT 0,  -- about how many of `lent` that is: tells when there is enough to do
    ADD CONSTRAINT accounted_codes_are_lent CHECK (accounted_upto BETWEEN 0 AND leased_upto);
CREATE INDEX books_of_a_shard ON books (shard);

-- No reference to books: its check would wait for whoever holds the book's row. A row may be out of date (the code has a
-- coupon by now, or is not lent any more): readers compare with `coupons` and `codes`.
CREATE TABLE outstanding_codes (
    book_id  text NOT NULL,
    code     text NOT NULL COLLATE "C",
    PRIMARY KEY (book_id, code)
);
INSERT INTO outstanding_codes
SELECT book_id, code FROM books JOIN codes USING (book_id)
WHERE place = 0 AND NOT EXISTS (SELECT FROM coupons c WHERE c.book_id = books.book_id AND c.code = codes.code);

-- A code that was lent alone has no place that would tell. From lone_leases it moves here when it has been brought,
-- whichever version of the writer brings it.
CREATE FUNCTION keep_outstanding() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO outstanding_codes VALUES (old.book_id, old.code) ON CONFLICT DO NOTHING;
    RETURN NULL;
END $$;
CREATE TRIGGER lone_leases_stay_outstanding AFTER DELETE ON lone_leases FOR EACH ROW EXECUTE FUNCTION keep_outstanding();

-- An epoch is over for the ledger before its books are settled one after the other, and what is to become of their codes is
-- decided once: a recovery that takes over half-way may stand before another Redis, and must not judge anew.
ALTER TABLE shards
    ADD COLUMN settling_epoch bigint NOT NULL DEFAULT 0,      -- whose codes are being settled; 0 for none
    ADD COLUMN settling_lost  boolean NOT NULL DEFAULT false; -- somebody may have been answered and the record be lost

-- Where the ledger was, about once an hour. The events of the last 24 hours are those after the newest mark that is older:
-- found along the primary key, without an index by time that every assign would pay for.
CREATE TABLE ledger_marks (
    shard  integer NOT NULL,
    at     timestamptz NOT NULL DEFAULT now(),
    epoch  bigint NOT NULL,
    seq    bigint NOT NULL,
    PRIMARY KEY (shard, at)
);

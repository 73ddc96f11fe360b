-- needs: 0019_computed_codes
-- Computed codes: a generated book stores a range of numbers, and a keyed permutation makes the codes of them (docs/codes.md).
-- The books of a tenant that share a pattern share its counter, so that no number is ever in two ranges.
--
-- A version that does not know this could upload a code that a range will compute; so it must not work beside one that does.

CREATE TABLE computed_patterns (
    pattern_id     bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    tenant_id      integer NOT NULL REFERENCES tenants,
    pattern        text NOT NULL,
    symbols        text NOT NULL,               -- each once, sorted
    sealed_key     bytea NOT NULL,              -- encrypted under the master key
    master_key_id  text NOT NULL,
    taken          bigint NOT NULL DEFAULT 0,   -- numbers below are in a range, or never will be
    CONSTRAINT one_key_for_each_pattern_of_a_tenant UNIQUE (tenant_id, pattern, symbols)
);

-- The numbers [begins, ends) of a pattern are a book's, without those that were uploaded before it took them.
CREATE TABLE code_ranges (
    pattern_id      bigint NOT NULL REFERENCES computed_patterns,
    begins          bigint NOT NULL,
    ends            bigint NOT NULL,
    book_id         text NOT NULL REFERENCES books,
    total           bigint NOT NULL,            -- codes of the range
    unlent          bigint NOT NULL,            -- of these, codes that are still to be lent
    lent_upto       bigint NOT NULL,            -- numbers below are lent, or passed over
    accounted_upto  bigint NOT NULL,            -- below, a code that was lent has a coupon or a row
    PRIMARY KEY (pattern_id, begins),
    CONSTRAINT leases_stay_within_their_range CHECK (begins <= accounted_upto AND accounted_upto <= lent_upto AND lent_upto <= ends),
    CONSTRAINT unlent_numbers_are_part_of_their_range CHECK (unlent BETWEEN 0 AND total AND total <= ends - begins)
);
CREATE INDEX ranges_of_a_book ON code_ranges (book_id);

-- Numbers over which lending goes: their codes were uploaded before the range was taken, or named before their turn. A
-- number may be larger than any counter.
CREATE TABLE passed_over (
    pattern_id  bigint NOT NULL REFERENCES computed_patterns,
    number      numeric NOT NULL,
    named       boolean NOT NULL,
    PRIMARY KEY (pattern_id, number)
);

-- A computed code has a row once it was named, came back without a record, or was quarantined; it says so, since a row is not
-- counted beside its range.
ALTER TABLE codes ADD COLUMN computed boolean NOT NULL DEFAULT false;

ALTER TABLE books
    ADD COLUMN computed_total   bigint NOT NULL DEFAULT 0,  -- of `total`, codes of ranges
    ADD COLUMN computed_unlent  bigint NOT NULL DEFAULT 0,  -- of those, codes that are still to be lent
    ADD CONSTRAINT computed_codes_are_part_of_all CHECK (computed_unlent BETWEEN 0 AND computed_total AND computed_total <= total);

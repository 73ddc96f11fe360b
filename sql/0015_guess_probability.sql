-- How easily a code of a book with generated codes is guessed: noted when codes are generated, since a count of all codes that
-- lie in a pattern may take seconds, and a book is read from Redis.
--
-- The version before works with this schema, and notes nothing.

ALTER TABLE books
    ADD COLUMN guess_probability double precision,  -- null: no code was generated, or by a version before
    ADD CONSTRAINT guess_probability_between_0_and_1 CHECK (guess_probability BETWEEN 0 AND 1);
ALTER TABLE uploads ADD COLUMN used bigint;  -- of a generation: codes of the tenant that lay in the pattern when it began

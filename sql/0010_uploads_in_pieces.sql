-- Uploads in pieces: what is too large for one short transaction is added in several, so that nobody waits for more than
-- one of them. Codes come in with a place of -2 or less, where nobody sees, lends or counts them; then the upload is
-- decided, together with what its Idempotency-Key answers; then they get their places. An upload whose process has died is
-- removed before it was decided, and finished after.
--
-- The version before works with this schema. It alone still uses `patterns`; a later migration drops the table.

CREATE TABLE uploads (
    upload_id   bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    tenant_id   integer NOT NULL REFERENCES tenants,
    book_id     text NOT NULL,                   -- which may be made only when the upload is decided
    codes       bigint NOT NULL,                 -- how many it may add
    decided     boolean NOT NULL DEFAULT false,
    started_at  timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT one_upload_of_a_tenant_at_a_time UNIQUE (tenant_id)
);

-- The upload whose codes an answer counts: while that has a row, the answer has not come true yet.
ALTER TABLE idempotency_keys ADD COLUMN upload_id bigint;

-- Its check locked the book's row for each code, against whoever wants to change or lend; and codes may come before their
-- book. Books are never deleted.
ALTER TABLE codes DROP CONSTRAINT codes_book_id_fkey;

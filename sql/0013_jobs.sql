-- Upload files of any length. The body goes to `staged_codes` while it arrives; then it is a job, which any process works
-- off in pieces. A piece is one transaction that also moves the job's row, so that each code is added exactly once, however
-- often the work is taken up again.
--
-- The version before works with this schema.

CREATE TABLE jobs (
    job_no           bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    job_id           text NOT NULL,
    tenant_id        integer NOT NULL REFERENCES tenants,
    book_id          text NOT NULL REFERENCES books,
    state            text NOT NULL DEFAULT 'receiving',
    idempotency_key  text,                           -- of the request whose body is being received
    received         bigint NOT NULL DEFAULT 0,      -- rows of the file that are neither blank nor its header
    inserted         bigint NOT NULL DEFAULT 0,
    duplicates       bigint NOT NULL DEFAULT 0,
    invalid          bigint NOT NULL DEFAULT 0,
    blank            bigint NOT NULL DEFAULT 0,
    header           text,
    warnings         text[] NOT NULL DEFAULT '{}',
    error            text,
    done_rows        bigint NOT NULL DEFAULT 0,      -- how many staged rows have been worked off
    done_code        text NOT NULL DEFAULT '' COLLATE "C",  -- the last of them, in the order of code and row
    done_row         bigint NOT NULL DEFAULT 0,
    emptied          boolean NOT NULL DEFAULT false, -- whether nothing of it is staged any more
    created_at       timestamptz NOT NULL DEFAULT now(),
    touched_at       timestamptz NOT NULL DEFAULT now(),  -- when its process last showed that the body still arrives
    finished_at      timestamptz,
    CONSTRAINT job_id_is_unique UNIQUE (job_id),
    CONSTRAINT state_is_receiving_running_succeeded_or_failed
        CHECK (state IN ('receiving', 'running', 'succeeded', 'failed'))
);
CREATE INDEX jobs_with_work ON jobs (tenant_id, job_no) WHERE NOT emptied;
CREATE INDEX jobs_by_age ON jobs (finished_at);

-- In the order in which they are worked off: rows with the same code stand together, and inserts into `codes` go along its
-- key.
CREATE TABLE staged_codes (
    job_no  bigint NOT NULL,
    code    text NOT NULL COLLATE "C",
    row     bigint NOT NULL,
    CONSTRAINT a_row_is_staged_once PRIMARY KEY (job_no, code, row)
);

CREATE TABLE rejected_codes (
    job_no  bigint NOT NULL,
    row     bigint NOT NULL,
    code    text NOT NULL,
    reason  text NOT NULL,
    detail  text NOT NULL,
    CONSTRAINT a_row_is_rejected_once PRIMARY KEY (job_no, row)
);

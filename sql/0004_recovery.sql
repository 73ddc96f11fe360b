-- Recovery: what is known of an epoch after it ended, which codes may have been given away before records were lost, and
-- what every API process has seen, so that it can often be shown that nothing was.

ALTER TABLE shards
    -- The last epoch in which Redis was allowed to decide.
    ADD COLUMN certified_epoch bigint NOT NULL DEFAULT 0,
    -- Epochs up to this one are settled: their codes without a record were dealt with, and an event of theirs that turns
    -- up now is late.
    ADD COLUMN settled_epoch   bigint NOT NULL DEFAULT 0,
    ADD COLUMN rebuild         boolean NOT NULL DEFAULT false,  -- asked for by an operator: the next recovery keeps nothing
    ADD COLUMN stopped         text;   -- why nothing is recovered or persisted until a person has looked

ALTER TABLE books
    ADD COLUMN quarantined bigint NOT NULL DEFAULT 0,
    ADD CONSTRAINT lent_and_quarantined_are_part_of_total CHECK (quarantined >= 0 AND lent + quarantined <= total);

-- What receipts are signed with.
ALTER TABLE settings ADD COLUMN receipt_secret bytea;

ALTER TABLE dead_letters
    ADD COLUMN book_id text,
    ADD COLUMN code    text COLLATE "C";
CREATE INDEX dead_letters_of_a_book ON dead_letters (book_id, code);

-- Codes that were lent when records were lost, and may have been answered to somebody: never dealt again (place -1).
CREATE TABLE quarantine (
    book_id  text NOT NULL REFERENCES books,
    code     text NOT NULL COLLATE "C",
    shard    integer NOT NULL,
    epoch    bigint NOT NULL,          -- in which it was lent
    at       timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (book_id, code)
);

-- How codes left the quarantine, for good.
CREATE TABLE quarantine_decisions (
    book_id   text NOT NULL,
    code      text NOT NULL COLLATE "C",
    decision  text NOT NULL,
    at        timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT decision_is_known CHECK (decision IN ('late_event', 'receipt', 'dealt_again'))
);

-- Events of a settled epoch that turned up after all. Of a quarantined code it brought the record back.
CREATE TABLE late_events (
    shard    integer NOT NULL,
    epoch    bigint NOT NULL,
    seq      bigint NOT NULL,
    event    text NOT NULL,
    book_id  text NOT NULL,
    code     text NOT NULL COLLATE "C",
    user_id  text NOT NULL,
    at_ms    bigint NOT NULL,
    at       timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (shard, epoch, seq)
);

-- API processes may answer before the ledger knows (`ack = redis`) only while their row here is fresh; so it is known who
-- could have answered in an epoch.
CREATE TABLE api_processes (
    process_id  text PRIMARY KEY,
    expires_at  timestamptz NOT NULL
);
-- The highest seq of an epoch that a process has ever answered from. After its report it answers nothing of that epoch.
CREATE TABLE api_reports (
    process_id  text NOT NULL,
    shard       integer NOT NULL,
    epoch       bigint NOT NULL,
    seen_seq    bigint NOT NULL,
    PRIMARY KEY (shard, epoch, process_id)
);

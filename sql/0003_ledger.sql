-- The ledger: every assignment and redemption, in the order in which Redis decided them. A shard's row is the one
-- place where its position, epoch and owner stand; every commit of the writer compares and moves it.

CREATE TABLE shards (
    shard        integer PRIMARY KEY,
    epoch        bigint NOT NULL DEFAULT 0,      -- 0: never opened
    committed    bigint NOT NULL DEFAULT 0,      -- seq of this epoch up to which events are here
    generation   bigint NOT NULL DEFAULT 0,      -- grows with every take-over
    owner        text,                           -- a writer; its hold ends when its own row below has expired
    CONSTRAINT committed_not_negative CHECK (committed >= 0)
);

-- One row a living writer, renewed every second. Apart from `shards`, so that a renewal never waits for a commit.
CREATE TABLE writers (
    writer_id   text PRIMARY KEY,
    expires_at  timestamptz NOT NULL
);

CREATE TABLE events (
    shard        integer NOT NULL,
    epoch        bigint NOT NULL,
    seq          bigint NOT NULL,
    event        text NOT NULL,
    book_id      text NOT NULL,
    code         text NOT NULL COLLATE "C",
    user_id      text NOT NULL,
    at_ms        bigint NOT NULL,
    uses         integer,            -- of a redemption: which use this was, from 1
    reference    text,
    metadata     text,
    idem         text,
    fingerprint  text,
    CONSTRAINT position_is_never_issued_twice PRIMARY KEY (shard, epoch, seq),
    CONSTRAINT event_is_known CHECK (event IN ('coupon_assigned', 'coupon_redeemed'))
);

CREATE TABLE coupons (
    book_id         text NOT NULL,
    code            text NOT NULL COLLATE "C",
    user_id         text NOT NULL,
    assigned_at_ms  bigint NOT NULL,
    uses            integer NOT NULL DEFAULT 0,
    epoch           bigint NOT NULL,   -- position of the assignment, in the book's shard
    seq             bigint NOT NULL,
    CONSTRAINT code_is_assigned_once PRIMARY KEY (book_id, code),
    CONSTRAINT uses_not_negative CHECK (uses >= 0)
);
CREATE INDEX coupons_of_a_user ON coupons (book_id, user_id);

CREATE TABLE redemptions (
    book_id         text NOT NULL,
    code            text NOT NULL COLLATE "C",
    uses            integer NOT NULL,  -- which use this was, from 1
    user_id         text NOT NULL,
    redeemed_at_ms  bigint NOT NULL,
    reference       text,
    metadata        text,
    epoch           bigint NOT NULL,
    seq             bigint NOT NULL,
    CONSTRAINT use_is_spent_once PRIMARY KEY (book_id, code, uses),
    CONSTRAINT uses_count_from_1 CHECK (uses > 0)
);

-- Events that the ledger could not take, with the reason: accounted for, and to be looked at by a person.
CREATE TABLE dead_letters (
    shard   integer NOT NULL,
    epoch   bigint NOT NULL,
    seq     bigint NOT NULL,
    fields  bytea NOT NULL,
    reason  text NOT NULL,
    at      timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (shard, epoch, seq)
);

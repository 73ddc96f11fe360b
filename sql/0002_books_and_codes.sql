-- The control plane: books and the codes in them. Redis is lent codes in the order of their place, which is random:
-- a code is lent when its place is not above its book's `leased_upto`. So one number moves when a block is lent.

CREATE TABLE books (
    book_id                   text PRIMARY KEY,
    shard                     integer NOT NULL,
    tenant_id                 integer NOT NULL REFERENCES tenants,
    name                      text NOT NULL,
    max_codes_per_user        integer,
    max_redemptions_per_code  integer,
    lock_ttl_seconds          integer NOT NULL,
    starts_at_ms              bigint,
    expires_at_ms             bigint,
    ack                       text NOT NULL,
    metadata                  json NOT NULL,
    status                    text NOT NULL DEFAULT 'active',
    created_at_ms             bigint NOT NULL,
    version                   bigint NOT NULL DEFAULT 1,
    loaded_version            bigint NOT NULL DEFAULT 0,   -- the version that the shard's owner brought to Redis last
    loaded                    boolean NOT NULL DEFAULT false, -- once true, a book that Redis lacks is lost, not new
    total                     bigint NOT NULL DEFAULT 0,
    lent                      bigint NOT NULL DEFAULT 0,
    leased_upto               bigint NOT NULL DEFAULT 0,
    places_upto               bigint NOT NULL DEFAULT 4294967296,  -- new codes get places in (leased_upto, places_upto]
    CONSTRAINT ack_is_ledger_or_redis CHECK (ack IN ('ledger', 'redis')),
    CONSTRAINT status_is_active_paused_or_closed CHECK (status IN ('active', 'paused', 'closed')),
    CONSTRAINT max_codes_per_user_is_positive CHECK (max_codes_per_user > 0),
    CONSTRAINT max_redemptions_per_code_is_positive CHECK (max_redemptions_per_code > 0),
    CONSTRAINT lock_ttl_between_1_s_and_1_h CHECK (lock_ttl_seconds BETWEEN 1 AND 3600),
    CONSTRAINT lent_is_part_of_total CHECK (lent BETWEEN 0 AND total),
    CONSTRAINT leases_end_where_places_end CHECK (leased_upto BETWEEN 0 AND places_upto)
);
CREATE INDEX books_of_a_tenant ON books (tenant_id, created_at_ms DESC, book_id DESC);
CREATE INDEX books_to_load ON books (shard) WHERE version > loaded_version;

CREATE TABLE codes (
    tenant_id  integer NOT NULL,
    code       text NOT NULL COLLATE "C",
    book_id    text NOT NULL REFERENCES books,
    place      bigint NOT NULL,
    CONSTRAINT code_is_unique_within_its_tenant PRIMARY KEY (tenant_id, code)
);
CREATE INDEX codes_by_place ON codes (book_id, place);

-- Codes that were named in assign/{code} before their turn: lent alone (their place is 0 from then on) and waiting for
-- the shard's owner to bring them to Redis.
CREATE TABLE lone_leases (
    book_id  text NOT NULL REFERENCES books,
    code     text NOT NULL COLLATE "C",
    shard    integer NOT NULL,
    PRIMARY KEY (book_id, code)
);

-- How many codes a tenant has had generated from a pattern, over all its books.
CREATE TABLE patterns (
    tenant_id  integer NOT NULL REFERENCES tenants,
    pattern    text NOT NULL,
    symbols    text NOT NULL,
    used       bigint NOT NULL DEFAULT 0,
    PRIMARY KEY (tenant_id, pattern, symbols)
);

-- Idempotency-Keys of requests whose effect is here and not in Redis; written in the effect's own transaction.
CREATE TABLE idempotency_keys (
    scope        text NOT NULL,   -- the book, or `tenant:<id>` where there is none
    key          text NOT NULL,
    fingerprint  text NOT NULL,
    status       integer NOT NULL,
    answer       bytea NOT NULL,
    created_at   timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (scope, key)
);
CREATE INDEX idempotency_keys_by_age ON idempotency_keys (created_at);

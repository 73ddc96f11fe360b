-- Who may call: tenants (businesses) and their API keys. Of a key only its SHA-256 is kept: a key has 256 random bits,
-- so a plain hash is enough, and a copy of this table opens nothing.

CREATE TABLE settings (
    only_row  boolean PRIMARY KEY DEFAULT true,
    shards    integer NOT NULL,
    CONSTRAINT settings_are_one_row CHECK (only_row),
    CONSTRAINT shards_between_1_and_99 CHECK (shards BETWEEN 1 AND 99)
);

CREATE TABLE tenants (
    tenant_id   integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    name        text NOT NULL,
    created_at  timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT tenant_name_is_unique UNIQUE (name)
);

CREATE TABLE api_keys (
    key_id      text PRIMARY KEY,
    tenant_id   integer NOT NULL REFERENCES tenants,
    key_hash    bytea NOT NULL,
    scopes      text[] NOT NULL,
    label       text NOT NULL DEFAULT '',
    created_at  timestamptz NOT NULL DEFAULT now(),
    expires_at  timestamptz,
    revoked_at  timestamptz,
    CONSTRAINT key_hash_is_unique UNIQUE (key_hash),
    CONSTRAINT key_hash_is_sha256 CHECK (octet_length(key_hash) = 32)
);

-- An installation is one database with the Redis that belongs to it. Its id stands in every shard's meta as well, so that a
-- process with the wrong address is refused by name before it writes anything.

ALTER TABLE settings ADD COLUMN installation text NOT NULL DEFAULT replace(gen_random_uuid()::text, '-', '');

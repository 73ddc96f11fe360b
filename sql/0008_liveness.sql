-- Who lives is judged by the clock of whoever looks, not by the one of Postgres: that clock may be set, and then living
-- processes would count as gone, or dead ones live on. A row changes its `beat` with every renewal; an observer counts it
-- as gone when it has seen it unchanged for some seconds by its own monotonic clock, and says so where the beat is still that one.
--
-- The version before does not work with this schema, on purpose: its processes would renew rows that nobody believes. Its
-- API processes go on without early answers, its writers end. Stop its writers first, or start the new ones at once.

CREATE SEQUENCE beats;

ALTER TABLE writers
    DROP COLUMN expires_at,
    ADD COLUMN beat bigint NOT NULL DEFAULT nextval('beats');

ALTER TABLE api_processes
    DROP COLUMN expires_at,
    ADD COLUMN beat bigint  NOT NULL DEFAULT nextval('beats'),
    ADD COLUMN gone boolean NOT NULL DEFAULT false;  -- somebody has counted it as gone: it cannot be renewed any more

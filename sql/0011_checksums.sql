-- What was applied can be told from what the files say now: a migration that is changed after it was applied would leave
-- old databases without the change, and nobody would hear of it. And a migration can say which versions it leaves behind:
-- a process that does not know the migration named in `needs` does not work with this schema, and refuses to.
--
-- The version before works with this schema.

ALTER TABLE schema_migrations
    ADD COLUMN checksum text,  -- SHA-256 of the file, with \n as line ends; null until the next `migrate` of this version
    ADD COLUMN needs text;     -- as the file's line `-- needs: NAME`; null where every version that meets it works on

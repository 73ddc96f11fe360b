#!lua flags=allow-oom
--[[
certify_shard: the last step of a recovery: this Redis agrees with the ledger, and decides from now on, in a new epoch.

Keys
  KEYS[1] meta      hash    read, write
  KEYS[2] events    stream  delete

Args
  ARGV[1] recovery     text  which one shut the shard: generation-epoch
  ARGV[2] epoch        int   the new one
  ARGV[3] run_id       text
  ARGV[4] replid       text
  ARGV[5] backlog_max  int   events the shard may hold that the ledger has not

Replies, the first that applies
  fenced     the shard is not shut, or another recovery is at work
  ok
]]
-- include: recoverer
-- include: clock
redis.call("HSET", KEYS[1], "epoch", ARGV[2], "run_id", ARGV[3], "replid", ARGV[4], "backlog_max", ARGV[5],
  "seq", 0, "committed", 0, "ledger_at_ms", at_ms, "owner_at_ms", at_ms)
-- All of it was read. With the stream goes its last id, which may be one that somebody made up: none of ours would follow it.
redis.call("UNLINK", KEYS[2])
return {"ok"}

#!lua flags=allow-oom
--[[
certify_shard: the last step of a recovery: this Redis agrees with the ledger, and decides from now on, in a new epoch.

Keys
  meta      hash    read, write
  events    stream  delete

Args
  recovery     text  which one shut the shard: generation-epoch
  epoch        int   the new one
  run_id       text
  replid       text
  backlog_max  int   events the shard may hold that the ledger has not

Replies, the first that applies
  fenced     the shard is not shut, or another recovery is at work
  ok
]]
-- include: recoverer
-- include: clock
local refusal = refuse_unless_recovering(meta_key, recovery)
if refusal then
  return refusal
end
local _, at_ms = read_clock()
redis.call("HSET", meta_key, "epoch", epoch, "format", FORMAT, "run", run_id, "replid", replid,
  "backlog_max", backlog_max, "seq", 0, "tip", "", "committed", 0, "ledger_at_ms", at_ms, "owner_at_ms", at_ms)
-- Where an older version looks for the server: it takes the shard for one that is not certified.
redis.call("HDEL", meta_key, "run_id")
-- All of it was read. With the stream goes its last id, which somebody may have made up: none of ours could follow it.
redis.call("UNLINK", events_key)
return {"ok"}

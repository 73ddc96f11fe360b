#!lua flags=allow-oom
--[[
open_shard: the shard's owner certifies this Redis: from now on its scripts decide. Safe to send twice.

The owner has compared the stream with the ledger before. Empty keys are taken only for a shard that was never opened.

Keys
  KEYS[1] meta      hash    read, write
  KEYS[2] events    stream  read

Args
  ARGV[1] epoch        int
  ARGV[2] generation   int   of the owner; an older one can do nothing any more
  ARGV[3] run_id       text
  ARGV[4] replid       text
  ARGV[5] backlog_max  int   events the shard may hold that the ledger has not
  ARGV[6] committed    int   the seq of this epoch that the ledger holds
  ARGV[7] fresh        text  "fresh" when the shard was never opened before, "" otherwise

Replies, the first that applies
  fenced     a newer owner has been here
  suspect    empty or of another epoch, or behind the ledger
  ok         seq
]]
local meta = redis.call("HMGET", KEYS[1], "epoch", "generation", "seq")
if meta[2] and tonumber(meta[2]) > tonumber(ARGV[2]) then
  return {"fenced"}
end
if not meta[1] and ARGV[7] == "fresh" and redis.call("EXISTS", KEYS[2]) == 0 then
  redis.call("HSET", KEYS[1], "seq", 0)
  meta[1], meta[3] = ARGV[1], "0"
end
if meta[1] ~= ARGV[1] or tonumber(meta[3]) < tonumber(ARGV[6]) then
  return {"suspect"}
end
-- include: clock
redis.call("HSET", KEYS[1], "epoch", ARGV[1], "generation", ARGV[2], "run_id", ARGV[3], "replid", ARGV[4],
  "backlog_max", ARGV[5], "committed", ARGV[6], "ledger_at_ms", at_ms)
return {"ok", tonumber(meta[3])}

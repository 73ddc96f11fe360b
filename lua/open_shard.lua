#!lua flags=allow-oom
--[[
open_shard: a new owner takes over a shard that its predecessor certified on this very Redis. Safe to send twice.

Keys
  KEYS[1] meta      hash    read, write

Args
  ARGV[1] epoch        int
  ARGV[2] generation   int   of the owner; an older one can do nothing any more
  ARGV[3] run_id       text
  ARGV[4] replid       text
  ARGV[5] backlog_max  int   events the shard may hold that the ledger has not
  ARGV[6] committed    int   the seq of this epoch that the ledger holds
  ARGV[7] installation text  whose keys these are to be

Replies, the first that applies
  foreign    installation: the keys belong to another one
  fenced     a newer owner has been here
  suspect    empty, of another epoch, certified on another Redis, behind the ledger, or told of more than it has
  ok         seq
]]
local meta = redis.call("HMGET", KEYS[1], "epoch", "generation", "seq", "run_id", "replid", "committed", "installation")
if meta[7] and meta[7] ~= ARGV[7] then
  return {"foreign", meta[7]}
end
if (tonumber(meta[2]) or 0) > tonumber(ARGV[2]) then
  return {"fenced"}
end
if meta[1] ~= ARGV[1] or meta[4] ~= ARGV[3] or meta[5] ~= ARGV[4] then
  return {"suspect"}
end
if not string.find(meta[3] or "", "^%d+$") or not string.find(meta[6] or "", "^%d+$")
  or tonumber(meta[3]) < tonumber(ARGV[6]) or tonumber(meta[6]) > tonumber(ARGV[6]) then
  return {"suspect"}
end
-- include: clock
redis.call("HSET", KEYS[1], "generation", ARGV[2], "backlog_max", ARGV[5], "committed", ARGV[6], "ledger_at_ms", at_ms,
  "owner_at_ms", at_ms, "installation", ARGV[7])
return {"ok", tonumber(meta[3])}

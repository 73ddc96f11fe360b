#!lua flags=allow-oom
--[[
open_shard: a new owner takes over a shard that its predecessor certified on this very Redis. Safe to send twice.

Keys
  meta      hash    read, write

Args
  epoch         int
  generation    int   of the owner; an older one can do nothing any more
  run_id        text
  replid        text
  backlog_max   int   events the shard may hold that the ledger has not
  committed     int   the seq of this epoch that the ledger holds
  tip           text  of the entry that the ledger holds there, "" before the first
  installation  text  whose keys these are to be

Replies, the first that applies
  foreign(installation)  the keys belong to another one
  fenced        a newer owner has been here
  suspect(why)  `epoch`: empty, or another one; `server`: certified on another; `meta`: torn; `format`: of an older version; `position`: behind the ledger, or told of more than it has; `entry`: the one at its position is another
  ok(seq)
]]
-- include: clock
local kept_epoch, kept_generation, seq, kept_run_id, kept_replid, told, kept_installation, format, kept_tip = unpack(
  redis.call("HMGET", meta_key, "epoch", "generation", "seq", "run", "replid", "committed", "installation", "format", "tip"))
if kept_installation and kept_installation ~= installation then
  return {"foreign", kept_installation}
end
if (tonumber(kept_generation) or 0) > tonumber(generation) then
  return {"fenced"}
end
if kept_epoch ~= epoch then
  return {"suspect", "epoch"}
end
if format ~= FORMAT then
  return {"suspect", "format"}
end
if kept_run_id ~= run_id or kept_replid ~= replid then
  return {"suspect", "server"}
end
if not string.find(seq or "", "^%d+$") or not string.find(told or "", "^%d+$") then
  return {"suspect", "meta"}
end
if tonumber(seq) < tonumber(committed) or tonumber(told) > tonumber(committed) then
  return {"suspect", "position"}
end
if tonumber(seq) == tonumber(committed) and kept_tip ~= tip then
  return {"suspect", "entry"}
end
local _, at_ms = read_clock()
redis.call("HSET", meta_key, "generation", generation, "backlog_max", backlog_max, "committed", committed,
  "ledger_at_ms", at_ms, "owner_at_ms", at_ms, "installation", installation)
return {"ok", tonumber(seq)}

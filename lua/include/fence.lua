-- The fence: this Redis is the one the caller knows, in the history that was certified, and has not gone back behind what
-- the caller has seen. Its replid is asked for here, and not only by the callers now and then: who made it follow another
-- master for a moment closed no connection and left the epoch in place. A field that is missing or is not a number was
-- changed by hand: the owner recovers the shard.
local meta = redis.call("HMGET", KEYS[1], "epoch", "seq", "committed", "ledger_at_ms", "backlog_max", "replid")
if meta[1] ~= ARGV[1] or not string.find(meta[2] or "", "^%d+$") or tonumber(meta[2]) < tonumber(ARGV[2])
  or not (tonumber(meta[3]) and tonumber(meta[4]) and tonumber(meta[5]))
  or not string.find(redis.call("INFO", "replication"), "master_replid:" .. tostring(meta[6]), 1, true) then
  return {"suspect"}
end

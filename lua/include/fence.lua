-- The fence: this Redis is the one the caller knows, in the history that was certified, and has not gone back behind what
-- the caller has seen. Its replid is asked for here, and not only by the callers now and then: who made it follow another
-- master for a moment closed no connection and left the epoch in place. A field that is missing was taken by somebody's hand.
local meta = redis.call("HMGET", KEYS[1], "epoch", "seq", "committed", "ledger_at_ms", "backlog_max", "replid")
if meta[1] ~= ARGV[1] or not (meta[2] and meta[3] and meta[4] and meta[5]) or tonumber(meta[2]) < tonumber(ARGV[2])
  or not string.find(redis.call("INFO", "replication"), "master_replid:" .. tostring(meta[6]), 1, true) then
  return {"suspect"}
end

-- The fence: this Redis is the one the caller knows, and has not gone back behind what the caller has seen.
local meta = redis.call("HMGET", KEYS[1], "epoch", "seq", "committed", "ledger_at_ms", "backlog_max")
if meta[1] ~= ARGV[1] or tonumber(meta[2]) < tonumber(ARGV[2]) then
  return {"suspect"}
end

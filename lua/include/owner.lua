-- Only the shard's present owner writes, and in the history that was certified: one that was paused and wakes up has an
-- older generation; a server that followed another one for a moment has another replid, on a connection that stayed open.
local meta = redis.call("HMGET", KEYS[1], "epoch", "generation", "seq", "committed", "replid", "run_id", "backlog_max",
  "installation")
if meta[1] ~= ARGV[1] or meta[2] ~= ARGV[2] or not (meta[6] and tonumber(meta[7]))
  or not string.find(meta[3] or "", "^%d+$") or not string.find(meta[4] or "", "^%d+$")
  or not string.find(redis.call("INFO", "replication"), "master_replid:" .. tostring(meta[5]), 1, true) then
  return {"suspect"}
end

-- Only the shard's present owner writes: one that was paused and wakes up has an older generation.
local meta = redis.call("HMGET", KEYS[1], "epoch", "generation", "seq", "committed")
if meta[1] ~= ARGV[1] or meta[2] ~= ARGV[2] then
  return {"suspect"}
end

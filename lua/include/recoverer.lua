-- Only the owner that shut the shard writes to it before it is certified.
local meta = redis.call("HMGET", KEYS[1], "epoch", "generation")
if meta[1] ~= "recovering" or meta[2] ~= ARGV[1] then
  return {"fenced"}
end

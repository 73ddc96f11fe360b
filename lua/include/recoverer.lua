-- Only the recovery that shut the shard writes to it before it is certified. Its owner's generation alone would not tell: a
-- command of its last attempt may be on its way still, and arrive when the next one has restored what it drops.
local meta = redis.call("HMGET", KEYS[1], "epoch", "recovery")
if meta[1] ~= "recovering" or meta[2] ~= ARGV[1] then
  return {"fenced"}
end

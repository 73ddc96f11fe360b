-- Only the recovery that shut the shard writes to it before it is certified. The owner's generation alone does not tell:
-- a command of its last attempt may still be on its way, and arrive when the next one has restored what it drops.
local function refuse_unless_recovering(meta_key, recovery)
  local epoch, shut_by = unpack(redis.call("HMGET", meta_key, "epoch", "recovery"))
  if epoch ~= "recovering" or shut_by ~= recovery then
    return {"fenced"}
  end
end

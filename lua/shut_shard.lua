#!lua flags=allow-oom
--[[
shut_shard: the first step of a recovery. From now on no script of an older epoch, and no older owner, does anything here.
The epoch it was in stays on record as `was`.

Keys
  meta      hash    read, write, delete

Args
  generation    int   of the owner
  epoch         int   that this recovery makes; the one it is in, when the shard is only stopped
  recovery      text  names it: generation-epoch
  installation  text  whose keys these are to be

Replies, the first that applies
  foreign(installation)  the keys belong to another one
  fenced     a newer owner has been here, or a newer recovery of this one
  ok
]]
local kept_type = redis.call("TYPE", meta_key).ok
if kept_type ~= "hash" and kept_type ~= "none" then
  redis.call("DEL", meta_key) -- nobody's meta any more, and in the way of one
end
local kept_generation, kept_epoch, kept_recovery, kept_installation = unpack(
  redis.call("HMGET", meta_key, "generation", "epoch", "recovery", "installation"))
if kept_installation and kept_installation ~= installation then
  return {"foreign", kept_installation}
end
local recovery_epoch = tonumber(string.match(kept_recovery or "", "%d+$")) or 0
if (tonumber(kept_generation) or 0) > tonumber(generation) or recovery_epoch > tonumber(epoch) then
  return {"fenced"}
end
if kept_epoch and tonumber(kept_epoch) then
  redis.call("HSET", meta_key, "was", kept_epoch)
end
redis.call("HSET", meta_key, "epoch", "recovering", "generation", generation, "recovery", recovery, "installation",
  installation)
return {"ok"}

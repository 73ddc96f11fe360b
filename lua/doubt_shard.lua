#!lua flags=allow-oom
--[[
doubt_shard: a caller found the shard damaged: keys are missing or of another type, or it is behind what was seen of it.
Nothing is decided in it until its owner has recovered it. The epoch it was in stays on record as `was`.

Keys
  meta      hash    read, write

Args
  epoch     int
  seen_seq  int   the highest seq of this epoch the caller has seen

Replies, the first that applies
  suspect(why)  `epoch`: another one, shut or in doubt already; `meta`, `position` or `server`, as the fence found it
  ok
]]
-- include: fence
local refusal = fence(meta_key, epoch, seen_seq)
if refusal then
  return refusal
end
redis.call("HSET", meta_key, "epoch", "doubt", "was", epoch)
return {"ok"}

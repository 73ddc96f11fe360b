#!lua flags=allow-oom
--[[
wipe_keys: drop keys of a shard that is being rebuilt.

Keys
  meta       hash    read
  doomed…    any     delete; 1..500

Args
  recovery     text  which one shut the shard: generation-epoch

Replies, the first that applies
  fenced     the shard is not shut, or another recovery is at work
  ok
]]
-- include: recoverer
local refusal = refuse_unless_recovering(meta_key, recovery)
if refusal then
  return refusal
end
for _, doomed_key in ipairs(doomed_keys) do
  redis.call("UNLINK", doomed_key)
end
return {"ok"}

#!lua flags=allow-oom
--[[
wipe_keys: drop keys of a shard that is being rebuilt.

Keys
  KEYS[1] meta      hash    read
  KEYS[2…] doomed   any     delete; 1..500

Args
  ARGV[1] generation   int   of the owner

Replies, the first that applies
  fenced     the shard is not shut, or another owner's
  ok
]]
-- include: recoverer
for i = 2, #KEYS do
  redis.call("UNLINK", KEYS[i])
end
return {"ok"}

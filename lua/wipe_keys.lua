#!lua flags=allow-oom
--[[
wipe_keys: drop keys of a shard that is being rebuilt.

Keys
  KEYS[1] meta      hash    read
  KEYS[2…] doomed   any     delete; 1..500

Args
  ARGV[1] recovery     text  which one shut the shard: generation-epoch

Replies, the first that applies
  fenced     the shard is not shut, or another recovery is at work
  ok
]]
-- include: recoverer
for i = 2, #KEYS do
  redis.call("UNLINK", KEYS[i])
end
return {"ok"}

#!lua flags=allow-oom
--[[
shut_shard: the first step of a recovery. From now on no script of an older epoch, and no older owner, does anything here.

Keys
  KEYS[1] meta      hash    read, write

Args
  ARGV[1] generation   int   of the owner

Replies, the first that applies
  fenced     a newer owner has been here
  ok
]]
local generation = redis.call("HGET", KEYS[1], "generation")
if generation and tonumber(generation) > tonumber(ARGV[1]) then
  return {"fenced"}
end
redis.call("HSET", KEYS[1], "epoch", "recovering", "generation", ARGV[1])
return {"ok"}

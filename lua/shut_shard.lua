#!lua flags=allow-oom
--[[
shut_shard: the first step of a recovery. From now on no script of an older epoch, and no older owner, does anything here.
The epoch it was in stays on record as `was`.

Keys
  KEYS[1] meta      hash    read, write

Args
  ARGV[1] generation   int   of the owner
  ARGV[2] epoch        int   that this recovery makes; the one it is in, when the shard is only stopped
  ARGV[3] installation text  whose keys these are to be

Replies, the first that applies
  foreign    installation: the keys belong to another one
  fenced     a newer owner has been here, or a newer recovery of this one
  ok
]]
local meta = redis.call("HMGET", KEYS[1], "generation", "epoch", "recovery", "installation")
if meta[4] and meta[4] ~= ARGV[3] then
  return {"foreign", meta[4]}
end
if (tonumber(meta[1]) or 0) > tonumber(ARGV[1]) then
  return {"fenced"}
end
if (tonumber(string.match(meta[3] or "", "%d+$")) or 0) > tonumber(ARGV[2]) then
  return {"fenced"}
end
if meta[2] and tonumber(meta[2]) then
  redis.call("HSET", KEYS[1], "was", meta[2])
end
redis.call("HSET", KEYS[1], "epoch", "recovering", "generation", ARGV[1], "recovery", ARGV[1] .. "-" .. ARGV[2],
  "installation", ARGV[3])
return {"ok"}

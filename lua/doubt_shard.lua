#!lua flags=allow-oom
--[[
doubt_shard: a caller found that keys of the shard are missing. Nothing is decided in it until its owner has recovered it.
The epoch it was in stays on record as `was`.

Keys
  KEYS[1] meta      hash    read, write

Args
  ARGV[1] epoch     int
  ARGV[2] seen_seq  int   the highest seq of this epoch the caller has seen

Replies, the first that applies
  suspect    another epoch, behind what the caller has seen, shut or in doubt already
  ok
]]
-- include: fence
redis.call("HSET", KEYS[1], "epoch", "doubt", "was", ARGV[1])
return {"ok"}

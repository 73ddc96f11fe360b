#!lua flags=no-writes
--[[
list_coupons: one page of what a user holds in this shard, in the order of book and code.

Keys
  KEYS[1] meta      hash    read
  KEYS[2] coupons   zset    read

Args
  ARGV[1] epoch     int
  ARGV[2] seen_seq  int   the highest seq of this epoch the caller has seen
  ARGV[3] from      text  lexicographic lower bound as ZRANGE BYLEX takes it: "-", or "(" and the last member seen
  ARGV[4] to        text  upper bound, "+" or "(" and a member
  ARGV[5] limit     int   1..1001

Replies, the first that applies
  suspect      another epoch, or behind what the caller has seen
  ok           members: `<book_id>:<code>` each
]]
-- include: fence
local members = redis.call("ZRANGE", KEYS[2], ARGV[3], ARGV[4], "BYLEX", "LIMIT", 0, ARGV[5])
return {"ok", members}

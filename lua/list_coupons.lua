#!lua flags=no-writes
--[[
list_coupons: one page of what a user holds in this shard, in the order of book and code.

Keys
  meta      hash    read
  coupons   zset    read; those of the user

Args
  epoch     int
  seen_seq  int   the highest seq of this epoch the caller has seen
  low       text  lexicographic lower bound as ZRANGE BYLEX takes it: "-", or "(" and the last member seen
  high      text  upper bound, "+" or "(" and a member
  limit     int   1..1001

Replies, the first that applies
  suspect(why)  `epoch`, `meta`, `position` or `server`, as the fence found it
  ok(members)   `<book_id>:<code>` each
]]
-- include: fence
local refusal = fence(meta_key, epoch, seen_seq)
if refusal then
  return refusal
end
return {"ok", redis.call("ZRANGE", coupons_key, low, high, "BYLEX", "LIMIT", 0, limit)}

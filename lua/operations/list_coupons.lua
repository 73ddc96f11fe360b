--[[
list_coupons: one page of what a user holds in this shard, in the order of book and code.

Class: read

Keys
  coupons   zset    read; those of the user

Args
  low       text  lexicographic lower bound as ZRANGE BYLEX takes it: "-", or "(" and the last member seen
  high      text  upper bound, "+" or "(" and a member
  limit     int   1..1001

Replies, the first that applies
  ok(members)   `<book_id>:<code>` each
]]
return {"ok", redis.call("ZRANGE", coupons_key, low, high, "BYLEX", "LIMIT", 0, limit)}

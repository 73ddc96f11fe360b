#!lua flags=allow-oom
--[[
release_coupon: a record that was lost is back in the ledger: its code leaves the quarantine for its holder's hands. Safe
to send twice.

Keys
  KEYS[1] meta        hash    read
  KEYS[2] book        hash    read, count
  KEYS[3] quarantine  set     remove
  KEYS[4] holders     hash    write
  KEYS[5] coupons     zset    add

Args
  ARGV[1] epoch      int
  ARGV[2] seen_seq   int   the highest seq of this epoch the caller has seen
  ARGV[3] tenant_id  int
  ARGV[4] book_id    text
  ARGV[5] code       text
  ARGV[6] holder     text  `position uses at_ms user`, of an older epoch

Replies, the first that applies
  suspect            another epoch, or behind what the caller has seen
  book_not_loaded
  book_not_found
  ok
]]
-- include: fence
-- include: book
if redis.call("SREM", KEYS[3], ARGV[5]) == 1 then
  redis.call("HSET", KEYS[4], ARGV[5], ARGV[6])
  redis.call("ZADD", KEYS[5], 0, ARGV[4] .. ":" .. ARGV[5])
  redis.call("HINCRBY", KEYS[2], "quarantined", -1)
  redis.call("HINCRBY", KEYS[2], "lent", 1)
end
return {"ok"}

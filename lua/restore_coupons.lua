#!lua flags=allow-oom
--[[
restore_coupons: coupons of one book as the ledger knows them. Safe to send twice.

Keys
  KEYS[1] meta        hash    read
  KEYS[2] holders     hash    write
  KEYS[3…] coupons    zset    add; the one of each coupon's user; 1..500

Args
  ARGV[1] recovery     text  which one shut the shard: generation-epoch
  ARGV[2] book_id      text
  ARGV[3…] coupons     text  code, holder (`position uses at_ms user`), code, holder …

Replies, the first that applies
  fenced     the shard is not shut, or another recovery is at work
  ok
]]
-- include: recoverer
for i = 3, #KEYS do
  local code = ARGV[2 * i - 3]
  redis.call("HSET", KEYS[2], code, ARGV[2 * i - 2])
  redis.call("ZADD", KEYS[i], 0, ARGV[2] .. ":" .. code)
end
return {"ok"}

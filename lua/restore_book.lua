#!lua flags=allow-oom
--[[
restore_book: a book as the ledger knows it, with an empty pool: what is dealt next is lent anew. Its holders are restored
apart. Safe to send twice.

Keys
  KEYS[1] meta         hash    read
  KEYS[2] book         hash    write
  KEYS[3] free         zset    delete
  KEYS[4] quarantine   set     delete, add

Args
  ARGV[1] recovery     text  which one shut the shard: generation-epoch
  ARGV[2] fields       int   how many of the following are fields and values of the book; 0 with more of its codes
  ARGV[3…] rules       text  field, value, field, value …; then quarantined codes; at most 4000 in all

Replies, the first that applies
  fenced     the shard is not shut, or another recovery is at work
  ok
]]
-- include: recoverer
local fields = tonumber(ARGV[2])
if fields > 0 then
  redis.call("UNLINK", KEYS[3], KEYS[4])
  redis.call("HSET", KEYS[2], unpack(ARGV, 3, 2 + fields))
end
for i = 3 + fields, #ARGV do
  redis.call("SADD", KEYS[4], ARGV[i])
end
return {"ok"}

#!lua flags=allow-oom
--[[
restore_coupons: coupons of one book as the ledger knows them. Safe to send twice.

Keys
  meta        hash    read
  holders     hash    write
  coupons…    zset    add; the one of each holding's user; 1..500

Args
  recovery     text  which one shut the shard: generation-epoch
  book_id      text
  codes…       text
  holdings…    text  in the order of the codes

Replies, the first that applies
  fenced     the shard is not shut, or another recovery is at work
  ok
]]
-- include: member
-- include: recoverer
local refusal = refuse_unless_recovering(meta_key, recovery)
if refusal then
  return refusal
end
for i, coupons_key in ipairs(coupons_keys) do
  redis.call("HSET", holders_key, codes[i], holdings[i])
  redis.call("ZADD", coupons_key, 0, format_member(book_id, codes[i]))
end
return {"ok"}

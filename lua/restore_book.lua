#!lua flags=allow-oom
--[[
restore_book: a book as the ledger knows it, with an empty pool: what is dealt next is lent anew. Its holders are restored
apart. Safe to send twice.

Keys
  meta         hash    read
  book         hash    write
  free         zset    delete
  quarantine   set     delete, add

Args
  recovery     text  which one shut the shard: generation-epoch
  rules…       text  field, value, field, value …; none with more of the book's codes
  quarantined… text  codes; at most 500

Replies, the first that applies
  fenced     the shard is not shut, or another recovery is at work
  ok
]]
-- include: recoverer
local refusal = refuse_unless_recovering(meta_key, recovery)
if refusal then
  return refusal
end
if #rules > 0 then
  redis.call("UNLINK", free_key, quarantine_key)
  redis.call("HSET", book_key, unpack(rules))
end
for _, code in ipairs(quarantined) do
  redis.call("SADD", quarantine_key, code)
end
return {"ok"}

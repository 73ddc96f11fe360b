#!lua flags=allow-oom
--[[
release_coupon: a record that was lost is back in the ledger: its code leaves the quarantine for its holder's hands. Safe
to send twice.

Keys
  meta        hash    read
  book        hash    read, count
  quarantine  set     remove
  holders     hash    write
  coupons     zset    add; those of the holder

Args
  epoch      int
  seen_seq   int   the highest seq of this epoch the caller has seen
  tenant_id  int
  book_id    text
  code       text
  holding    text  of an older epoch

Replies, the first that applies
  suspect(why)  `epoch`, `meta`, `position` or `server`, as the fence found it
  book_not_loaded
  book_not_found
  ok
]]
-- include: fence
-- include: book
local refusal = fence(meta_key, epoch, seen_seq)
if refusal then
  return refusal
end
refusal = read_book(book_key, tenant_id)
if refusal then
  return refusal
end
if redis.call("SREM", quarantine_key, code) == 1 then
  redis.call("HSET", holders_key, code, holding)
  redis.call("ZADD", coupons_key, 0, book_id .. ":" .. code)
  redis.call("HINCRBY", book_key, "quarantined", -1)
  redis.call("HINCRBY", book_key, "lent", 1)
end
return {"ok"}

--[[
release_coupon: a record that was lost is back in the ledger: its code leaves the quarantine for its holder's hands. Safe
to send twice.

Class: keep

Keys
  book        hash    read, count
  quarantine  set     read, remove
  holders     hash    read, write
  coupons     zset    read, add; those of the holder

Args
  tenant_id  int
  book_id    text
  code       text
  holding    text  of an older epoch

Replies, the first that applies
  book_not_loaded
  book_not_found
  ok
]]
-- include: book
-- include: counters
-- include: holding
-- include: quarantine
-- include: users_coupons
local refusal, book = read_book(book_key, tenant_id)
if refusal then
  return refusal
end
require_counters(book_key, book)
redis.call("ZCARD", coupons_key) -- what is to be written must be of its type
if read_holding(holders_key, code) or redis.call("SISMEMBER", quarantine_key, code) == 0 then
  return {"ok"}
end

release(quarantine_key, code)
hold(holders_key, code, holding)
add_to_users_coupons(coupons_key, book_id, code)
count(book_key, "quarantined", -1)
count(book_key, "lent", 1)
return {"ok"}

--[[
lock_coupon: hold an assigned coupon for one redemption attempt, or renew the hold with its token. No hold outlives the
book.

Class: grow

Keys
  book        hash    read
  holders     hash    read
  lock        string  read, write
  free        zset    read
  quarantine  set     read
  idem?       string  read, write; only with an Idempotency-Key

Args
  tenant_id     int
  code          text
  user_id?      text  "" when the caller names nobody
  lock_token?   text  "" for a new lock; else the token of the lock to renew
  new_token     text  the token of a new lock
  ttl_ms?       int   "" for the book's own
  fingerprint?  text  of the request, "" without an Idempotency-Key

Replies, the first that applies
  replayed(user_id, lock_token, until_ms, ttl_ms, position, ack)
  idempotency_key_reused
  book_not_loaded
  book_not_found
  book_closed
  book_paused
  book_not_started
  book_expired
  code_quarantined
  suspect(why)      `counts`: codes are missing
  not_assigned
  not_holder
  already_redeemed
  lock_not_held
  locked(retry_after_ms)
  backlog_full
  ledger_behind     Redis's clock went back since the ledger was seen
  renewed(user_id, lock_token, until_ms, ttl_ms, position, ack)
  ok(user_id, lock_token, until_ms, ttl_ms, position, ack)
]]
-- include: book
-- include: find_holding
-- include: lock
-- include: open
-- include: replay
-- include: room
local answer = replay(idem_key, fingerprint)
if answer then
  return answer
end
local refusal, book = read_book(book_key, tenant_id)
if refusal then
  return refusal
end
refusal = refuse_unless_open(book, now_ms)
if refusal then
  return refusal
end
local refusal, holding = find_holding(book, book_key, holders_key, free_key, quarantine_key, code, user_id)
if refusal then
  return refusal
end
local refusal, held_token = find_lock(lock_key, lock_token)
if refusal then
  return refusal
end
refusal = refuse_without_room(meta, now_ms, 1, false)
if refusal then
  return refusal
end
if ttl_ms == "" then
  ttl_ms = book.lock_ttl_ms
end
if book.expires_at_ms ~= "" and tonumber(book.expires_at_ms) - now_ms < tonumber(ttl_ms) then
  ttl_ms = string.format("%d", tonumber(book.expires_at_ms) - now_ms)
end
if #ttl_ms > 15 or not string.find(ttl_ms, "^[1-9]%d*$") then
  error("a lock needs a time that Redis can add to its own")
end
local until_ms = string.format("%d", now_ms + tonumber(ttl_ms))

local token = held_token or new_token
set_lock(lock_key, token, ttl_ms)
local positions = positions_of(holding)
remember(idem_key, fingerprint, holding.user_id, token, until_ms, ttl_ms, positions, book.ack)
return {held_token and "renewed" or "ok", holding.user_id, token, until_ms, ttl_ms, positions, book.ack}

--[[
redeem_coupon: spend one use of an assigned coupon, and its lock with it.

It goes on when memory is out (allow-oom), and is given more of the backlog than an assign: what was promised is kept
longest. It always waits for the ledger, so it is refused at once while the ledger is known to be away.

Class: keep

Keys
  book        hash    read, count
  holders     hash    read, write
  lock        string  read, delete
  free        zset    read
  quarantine  set     read
  idem?       string  read, write; only with an Idempotency-Key

Args
  tenant_id         int
  code              text
  user_id?          text  "" when the caller names nobody
  lock_token?       text  "" when the caller shows none
  book_id           text
  reference?        text  the caller's own, "" without one
  metadata?         text  JSON, "" without any
  idempotency_key?  text  "" without one
  fingerprint?      text  of the request, "" without an Idempotency-Key

Replies, the first that applies
  replayed(user_id, at_ms, position, uses, redemptions_left)
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
  ledger_behind
  ok(user_id, at_ms, position, uses, redemptions_left)  "" is unlimited

Event
  coupon_redeemed(book, code, user, idem, fingerprint, uses, reference, metadata)
]]
-- include: book
-- include: counters
-- include: event
-- include: find_holding
-- include: left
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
refusal = refuse_without_room(meta, now_ms, REDEEM_BACKLOG_SHARE, true)
if refusal then
  return refusal
end
require_counters(book_key, book)

local uses = string.format("%d", holding.uses + 1)
local left = redemptions_left(book, holding.uses + 1)
if held_token then
  drop_lock(lock_key)
end
local position = make_event(meta, "coupon_redeemed", book_id, code, holding.user_id, idempotency_key, fingerprint, uses,
  reference, metadata)
-- The position of the assignment stays in front: it is answered again when the code is assigned to its holder again.
hold(holders_key, code, format_holding(positions_with(holding, position), uses, holding.at_ms, holding.user_id))
-- Each use is counted once: as its code's last, or as one that leaves more. Both together are the book's redemptions.
count(book_key, left == "0" and "redeemed" or "partly_redeemed", 1)
remember(idem_key, fingerprint, holding.user_id, at_ms, position, uses, left)
return {"ok", holding.user_id, at_ms, position, uses, left}

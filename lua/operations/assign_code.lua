--[[
assign_code: give a user the one code the caller names.

Class: grow

Keys
  book        hash    read
  free        zset    read, remove
  holders     hash    read, write
  coupons     zset    read, add; those of the user
  quarantine  set     read
  idem?       string  read, write; only with an Idempotency-Key

Args
  tenant_id         int
  book_id           text
  user_id           text
  idempotency_key?  text  "" without one
  fingerprint?      text  of the request, "" without an Idempotency-Key
  code              text

Replies, the first that applies
  replayed(code, at_ms, position, ack, redemptions_left, first?)  `already_yours` when that was the reply
  idempotency_key_reused
  book_not_loaded
  book_not_found
  already_yours(code, at_ms, position, ack, redemptions_left)  without a key; position `assigned/redeemed` once redeemed
  confirmed(code, at_ms, position, ack, redemptions_left)  the same with a key, if there is room; `assigned/event`
  book_closed
  book_paused
  book_not_started
  book_expired
  already_assigned
  code_quarantined
  user_code_limit(limit, held)
  suspect(why)      `counts`: codes are missing
  not_lent          the code is not in Redis: it must be lent first
  backlog_full
  ledger_behind
  ok(code, at_ms, position, ack, redemptions_left)  "" is unlimited

Event
  coupon_assigned(book, code, user, idem, fingerprint)
  coupon_confirmed(book, code, user, idem, fingerprint, uses)
]]
-- include: assigned
-- include: book
-- include: codes_missing
-- include: event
-- include: holding
-- include: left
-- include: open
-- include: replay
-- include: room
-- include: users_coupons
local answer = replay(idem_key, fingerprint)
if answer then
  return answer
end
local refusal, book = read_book(book_key, tenant_id)
if refusal then
  return refusal
end
local holding = read_holding(holders_key, code)
if holding and holding.user_id == user_id then
  local left = redemptions_left(book, holding.uses)
  -- An answer under a key is an event of its own: so it is kept in the ledger, too, and outlives Redis.
  if not idem_key then
    return {"already_yours", code, holding.at_ms, positions_of(holding), book.ack, left}
  end
  refusal = refuse_without_room(meta, now_ms, 1, book.ack == "ledger")
  if refusal then
    return refusal
  end
  local uses = string.format("%d", holding.uses)
  local event = make_event(meta, "coupon_confirmed", book_id, code, user_id, idempotency_key, fingerprint, uses)
  local positions = positions_with(holding, event)
  remember(idem_key, fingerprint, code, holding.at_ms, positions, book.ack, left, "already_yours")
  return {"confirmed", code, holding.at_ms, positions, book.ack, left}
end
refusal = refuse_unless_open(book, now_ms)
if refusal then
  return refusal
end
if holding then
  return {"already_assigned"}
end
if redis.call("SISMEMBER", quarantine_key, code) == 1 then
  return {"code_quarantined"}
end
refusal = refuse_over_limit(book, coupons_key, book_id)
if refusal then
  return refusal
end
if not redis.call("ZSCORE", free_key, code) then
  refusal = refuse_if_codes_missing(book_key, free_key, holders_key)
  return refusal or {"not_lent"}
end
refusal = refuse_without_room(meta, now_ms, 1, book.ack == "ledger")
if refusal then
  return refusal
end

return assign(meta, at_ms, book, free_key, holders_key, coupons_key, idem_key, book_id, code, user_id, idempotency_key,
  fingerprint)

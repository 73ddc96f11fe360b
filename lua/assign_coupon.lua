#!lua
--[[
assign_coupon: give a user a random code of a book.

The pool is a sorted set with scores from a CSPRNG, so the lowest score is a fair draw. SPOP is not one everywhere: the
choice of Redis (unlike Valkey's) leans on how codes hash. Refused as a whole when memory is out, with the code still in the pool.

Keys
  meta      hash    read, count
  book      hash    read
  free      zset    pop
  holders   hash    read, write
  coupons   zset    read, add; those of the user
  events    stream  append
  idem?     string  read, write; only with an Idempotency-Key

Args
  epoch             int
  seen_seq          int   the highest seq of this epoch the caller has seen
  tenant_id         int
  book_id           text
  user_id           text
  idempotency_key?  text  "" without one
  fingerprint?      text  of the request, "" without an Idempotency-Key

Replies, the first that applies
  suspect(why)      `epoch`, `meta`, `position` or `server`, as the fence found it; `counts`: codes are missing
  replayed(code, at_ms, position, ack, redemptions_left)
  idempotency_key_reused
  book_not_loaded
  book_not_found
  book_closed
  book_paused
  book_not_started
  book_expired
  user_code_limit(limit, held)
  book_exhausted
  refilling
  backlog_full
  ledger_behind
  ok(code, at_ms, position, ack, redemptions_left)  "" is unlimited

Event
  coupon_assigned(book, code, user, at_ms, idem, fingerprint)
]]
-- include: fence
-- include: replay
-- include: book
-- include: clock
-- include: open
-- include: limit
-- include: counts
-- include: room
-- include: event
-- include: holding
-- include: assigned
local refusal, meta = fence(meta_key, epoch, seen_seq)
if refusal then
  return refusal
end
local answer = replay(idem_key, fingerprint)
if answer then
  return answer
end
local refusal, book = read_book(book_key, tenant_id)
if refusal then
  return refusal
end
local now_ms, at_ms = read_clock()
refusal = refuse_unless_open(book, now_ms)
if refusal then
  return refusal
end
refusal = refuse_over_limit(book, coupons_key, book_id)
if refusal then
  return refusal
end
if redis.call("ZCARD", free_key) == 0 then
  refusal = refuse_if_codes_missing(book.lent, 0, redis.call("HLEN", holders_key))
  return refusal or {tonumber(book.unlent) == 0 and "book_exhausted" or "refilling"}
end
refusal = refuse_without_room(meta, now_ms, 1, book.ack == "ledger")
if refusal then
  return refusal
end

local op = {book_id = book_id, user_id = user_id, idempotency_key = idempotency_key, fingerprint = fingerprint}
local code = redis.call("ZPOPMIN", free_key)[1]
return assign(meta_key, events_key, holders_key, coupons_key, idem_key, epoch, at_ms, book, op, code)

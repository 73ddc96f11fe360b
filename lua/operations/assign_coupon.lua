--[[
assign_coupon: give a user a random code of a book.

The pool is a sorted set with scores from a CSPRNG, so the lowest score is a fair draw. SPOP is not one everywhere: the
choice of Redis (unlike Valkey's) leans on how codes hash. Refused as a whole when memory is out, with the code still in the pool.

Class: grow

Keys
  book      hash    read
  free      zset    read, remove
  holders   hash    read, write
  coupons   zset    read, add; those of the user
  idem?     string  read, write; only with an Idempotency-Key
  list?     string  read, write; of the Idempotency-Key of a whole list, whose users have records of their own in idem

Args
  tenant_id         int
  book_id           text
  user_id           text
  idempotency_key?  text  "" without one
  fingerprint?      text  of the request, "" without an Idempotency-Key

Replies, the first that applies
  replayed(code, at_ms, position, ack, redemptions_left)
  idempotency_key_reused
  book_not_loaded
  book_not_found
  book_closed
  book_paused
  book_not_started
  book_expired
  user_code_limit(limit, held)
  suspect(why)      `counts`: codes are missing
  book_exhausted
  refilling
  backlog_full
  ledger_behind
  ok(code, at_ms, position, ack, redemptions_left)  "" is unlimited

Event
  coupon_assigned(book, code, user, idem, fingerprint)
]]
-- include: assigned
-- include: book
-- include: codes_missing
-- include: list_record
-- include: open
-- include: pool
-- include: replay
-- include: room
-- include: users_coupons
local refusal = refuse_reused(list_key, fingerprint)
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
refusal = refuse_unless_open(book, now_ms)
if refusal then
  return refusal
end
refusal = refuse_over_limit(book, coupons_key, book_id)
if refusal then
  return refusal
end
local code = next_free(free_key, holders_key, pool_look)
if not code then
  refusal = refuse_if_codes_missing(book_key, free_key, holders_key)
  local unlent = redis.call("HGET", book_key, "unlent")
  return refusal or {tonumber(unlent) == 0 and "book_exhausted" or "refilling"}
end
refusal = refuse_without_room(meta, now_ms, 1, book.ack == "ledger")
if refusal then
  return refusal
end

remember_list(list_key, fingerprint)
return assign(meta, at_ms, book, free_key, holders_key, coupons_key, idem_key, book_id, code, user_id, idempotency_key,
  fingerprint)

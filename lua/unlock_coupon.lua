#!lua flags=allow-oom
--[[
unlock_coupon: give up the lock whose token the caller shows. Goes on whatever the book's state.

Keys
  meta   hash    read
  book   hash    read
  lock   string  read, delete
  idem?  string  read, write; only with an Idempotency-Key

Args
  epoch         int
  seen_seq      int   the highest seq of this epoch the caller has seen
  tenant_id     int
  lock_token    text
  fingerprint?  text  of the request, "" without an Idempotency-Key

Replies, the first that applies
  suspect(why)   `epoch`, `meta`, `position` or `server`, as the fence found it
  replayed
  idempotency_key_reused
  book_not_loaded
  book_not_found
  lock_not_held  somebody else's lock is there
  ok             also when no lock was there
]]
-- include: fence
-- include: replay
-- include: book
local refusal = fence(meta_key, epoch, seen_seq)
if refusal then
  return refusal
end
local answer = replay(idem_key, fingerprint)
if answer then
  return answer
end
refusal = read_book(book_key, tenant_id)
if refusal then
  return refusal
end
local held_token = redis.call("GET", lock_key)
if held_token and held_token ~= lock_token then
  return {"lock_not_held"}
end
if held_token then
  redis.call("DEL", lock_key)
end
if idem_key then
  remember(idem_key, {fingerprint})
end
return {"ok"}

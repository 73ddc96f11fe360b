--[[
unlock_coupon: give up the lock whose token the caller shows. Goes on whatever the book's state.

Class: keep

Keys
  book   hash    read
  lock   string  read, delete
  idem?  string  read, write; only with an Idempotency-Key

Args
  tenant_id     int
  lock_token    text
  fingerprint?  text  of the request, "" without an Idempotency-Key

Replies, the first that applies
  replayed
  idempotency_key_reused
  book_not_loaded
  book_not_found
  lock_not_held  somebody else's lock is there
  ok             also when no lock was there
]]
-- include: book
-- include: lock
-- include: replay
local answer = replay(idem_key, fingerprint)
if answer then
  return answer
end
local refusal = read_book(book_key, tenant_id)
if refusal then
  return refusal
end
local held_token = read_lock(lock_key)
if held_token and held_token ~= lock_token then
  return {"lock_not_held"}
end

if held_token then
  drop_lock(lock_key)
end
remember(idem_key, fingerprint)
return {"ok"}

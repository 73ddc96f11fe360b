#!lua flags=allow-oom
--[[
unlock_coupon: give up the lock whose token the caller shows. Goes on whatever the book's state.

Keys
  KEYS[1] meta   hash    read
  KEYS[2] book   hash    read
  KEYS[3] lock   string  read, delete
  KEYS[4] idem   string  read, write; only with an Idempotency-Key

Args
  ARGV[1] epoch        int
  ARGV[2] seen_seq     int   the highest seq of this epoch the caller has seen
  ARGV[3] tenant_id    int
  ARGV[4] lock_token   text
  ARGV[5] fingerprint  text  of the request, "" without an Idempotency-Key

Replies, the first that applies
  suspect                 another epoch, or behind what the caller has seen
  replayed
  idempotency_key_reused
  book_not_loaded
  book_not_found
  lock_not_held           somebody else's lock is there
  ok                      also when no lock was there
]]
local idem_key, fingerprint = KEYS[4], ARGV[5]
-- include: fence
-- include: replay
-- include: book
local held_token = redis.call("GET", KEYS[3])
if held_token and held_token ~= ARGV[4] then
  return {"lock_not_held"}
end
if held_token then
  redis.call("DEL", KEYS[3])
end
if idem_key then
  redis.call("SET", idem_key, cjson.encode({fingerprint}), "PX", 86400000)
end
return {"ok"}

#!lua
--[[
assign_coupon: give a user a random code of a book.

The pool is a sorted set with scores from a CSPRNG, so the lowest score is a fair draw. SPOP is not one everywhere: the
choice of Redis (unlike Valkey's) leans on how codes hash. Refused as a whole when memory is out, with the code still in the pool.

Keys
  KEYS[1] meta      hash    read, count
  KEYS[2] book      hash    read
  KEYS[3] free      zset    pop
  KEYS[4] holders   hash    read, write
  KEYS[5] coupons   zset    read, add
  KEYS[6] events    stream  append
  KEYS[7] idem      string  read, write; only with an Idempotency-Key

Args
  ARGV[1] epoch        int
  ARGV[2] seen_seq     int   the highest seq of this epoch the caller has seen
  ARGV[3] tenant_id    int
  ARGV[4] book_id      text
  ARGV[5] user_id      text
  ARGV[6] idem         text  the Idempotency-Key, "" without one
  ARGV[7] fingerprint  text  of the request, "" without an Idempotency-Key

Replies, the first that applies
  suspect                 another epoch or behind what the caller has seen; `counts`: codes are missing
  replayed                code, at_ms, position, ack, redemptions_left
  idempotency_key_reused
  book_not_loaded
  book_not_found
  book_closed
  book_paused
  book_not_started
  book_expired
  user_code_limit         limit, held
  book_exhausted
  refilling
  backlog_full
  ledger_behind
  ok                      code, at_ms, position, ack, redemptions_left ("" is unlimited)

Event
  coupon_assigned    book, code, user, at_ms, idem, fingerprint
]]
local idem_key, fingerprint = KEYS[7], ARGV[7]
-- include: fence
-- include: replay
-- include: book
-- include: clock
-- include: open
local book_id, user_id = ARGV[4], ARGV[5]
-- include: limit
if redis.call("ZCARD", KEYS[3]) == 0 then
  if redis.call("HLEN", KEYS[4]) ~= tonumber(book[9]) then
    return {"suspect", "counts"}
  end
  if tonumber(book[8]) == 0 then
    return {"book_exhausted"}
  end
  return {"refilling"}
end
local backlog_share, waits_for_ledger = 1, book[5] == "ledger"
-- include: room

local code = redis.call("ZPOPMIN", KEYS[3])[1]
-- include: assigned

#!lua
--[[
lock_coupon: hold an assigned coupon for one redemption attempt, or renew the hold with its token. No hold outlives the
book.

Keys
  KEYS[1] meta      hash    read
  KEYS[2] book      hash    read
  KEYS[3] holders   hash    read
  KEYS[4] lock      string  read, write
  KEYS[5] free      zset    read
  KEYS[6] quarantine  set   read
  KEYS[7] idem      string  read, write; only with an Idempotency-Key

Args
  ARGV[1] epoch        int
  ARGV[2] seen_seq     int   the highest seq of this epoch the caller has seen
  ARGV[3] tenant_id    int
  ARGV[4] code         text
  ARGV[5] user_id      text  "" when the caller names nobody
  ARGV[6] lock_token   text  "" for a new lock; else the token of the lock to renew
  ARGV[7] new_token    text  the token of a new lock
  ARGV[8] ttl_ms       int   "" for the book's own
  ARGV[9] fingerprint  text  of the request, "" without an Idempotency-Key

Replies, the first that applies
  suspect                 another epoch or behind what the caller has seen; `counts`: codes are missing
  replayed                user_id, lock_token, until_ms, ttl_ms, position, ack
  idempotency_key_reused
  book_not_loaded
  book_not_found
  book_closed
  book_paused
  book_not_started
  book_expired
  code_quarantined
  not_assigned
  not_holder
  already_redeemed
  lock_not_held
  locked                  retry_after_ms
  backlog_full
  ledger_behind           Redis's clock went back since the ledger was seen
  renewed                 user_id, lock_token, until_ms, ttl_ms, position, ack
  ok                      user_id, lock_token, until_ms, ttl_ms, position, ack
]]
local idem_key, fingerprint = KEYS[7], ARGV[9]
-- include: fence
-- include: replay
-- include: book
-- include: clock
-- include: open
local code, shown_token = ARGV[4], ARGV[6]
local quarantine = KEYS[6]
-- include: holder
-- include: lock
local backlog_share, waits_for_ledger = 1, false
-- include: room

local ttl_ms = ARGV[8]
if ttl_ms == "" then
  ttl_ms = redis.call("HGET", KEYS[2], "lock_ttl_ms")
end
local token = held_token or ARGV[7]
if book[4] ~= "" and tonumber(book[4]) - now_ms < tonumber(ttl_ms) then
  ttl_ms = string.format("%d", tonumber(book[4]) - now_ms)
end
local until_ms = string.format("%d", now_ms + tonumber(ttl_ms))
redis.call("SET", KEYS[4], token, "PX", ttl_ms)
if idem_key then
  redis.call("SET", idem_key, cjson.encode({fingerprint, held_by, token, until_ms, ttl_ms, held_position, book[5]}),
    "PX", 86400000)
end
return {held_token and "renewed" or "ok", held_by, token, until_ms, ttl_ms, held_position, book[5]}

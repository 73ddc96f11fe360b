#!lua
--[[
assign_code: give a user the one code the caller names.

Keys
  KEYS[1] meta      hash    read, count
  KEYS[2] book      hash    read
  KEYS[3] free      zset    read, remove
  KEYS[4] holders   hash    read, write
  KEYS[5] coupons   zset    read, add
  KEYS[6] events    stream  append
  KEYS[7] quarantine  set   read
  KEYS[8] idem      string  read, write; only with an Idempotency-Key

Args
  ARGV[1] epoch        int
  ARGV[2] seen_seq     int   the highest seq of this epoch the caller has seen
  ARGV[3] tenant_id    int
  ARGV[4] book_id      text
  ARGV[5] user_id      text
  ARGV[6] idem         text  the Idempotency-Key, "" without one
  ARGV[7] fingerprint  text  of the request, "" without an Idempotency-Key
  ARGV[8] code         text

Replies, the first that applies
  suspect                 another epoch or behind what the caller has seen; `counts`: codes are missing
  replayed                code, at_ms, position, ack, redemptions_left; then `already_yours` when that was the reply
  idempotency_key_reused
  book_not_loaded
  book_not_found
  already_yours           code, at_ms, position (`assigned/redeemed` of one that was redeemed), ack, redemptions_left
  book_closed
  book_paused
  book_not_started
  book_expired
  already_assigned
  code_quarantined
  user_code_limit         limit, held
  not_lent                the code is not in Redis: it must be lent first
  backlog_full
  ledger_behind
  ok                      code, at_ms, position, ack, redemptions_left ("" is unlimited)

Event
  coupon_assigned    book, code, user, at_ms, idem, fingerprint
]]
local idem_key, fingerprint = KEYS[8], ARGV[7]
-- include: fence
-- include: replay
-- include: book
-- include: clock
local book_id, user_id, code = ARGV[4], ARGV[5], ARGV[8]
local holder = redis.call("HGET", KEYS[4], code)
local held_position, held_uses, held_at_ms, held_by
if holder then
  held_position, held_uses, held_at_ms, held_by = string.match(holder, "^(%S+) (%d+) (%d+) (.*)$")
  if held_by == user_id then
    local left = book[6]
    if left ~= "" then
      left = string.format("%d", tonumber(left) - tonumber(held_uses))
    end
    if idem_key then
      redis.call("SET", idem_key, cjson.encode({fingerprint, code, held_at_ms, held_position, book[5], left,
        "already_yours"}), "PX", 86400000)
    end
    return {"already_yours", code, held_at_ms, held_position, book[5], left}
  end
end
-- include: open
if holder then
  return {"already_assigned"}
end
if redis.call("SISMEMBER", KEYS[7], code) == 1 then
  return {"code_quarantined"}
end
-- include: limit
if not redis.call("ZSCORE", KEYS[3], code) then
  if redis.call("ZCARD", KEYS[3]) + redis.call("HLEN", KEYS[4]) ~= tonumber(book[9]) then
    return {"suspect", "counts"}
  end
  return {"not_lent"}
end
local backlog_share, waits_for_ledger = 1, book[5] == "ledger"
-- include: room

redis.call("ZREM", KEYS[3], code)
-- include: assigned

#!lua flags=allow-oom
--[[
redeem_coupon: spend one use of an assigned coupon, and its lock with it.

It goes on when memory is out (allow-oom), and is given more of the backlog than an assign: what was promised is kept
longest. It always waits for the ledger, so it is refused at once while the ledger is known to be away.

Keys
  KEYS[1] meta      hash    read, count
  KEYS[2] book      hash    read, count
  KEYS[3] holders   hash    read, write
  KEYS[4] lock      string  read, delete
  KEYS[5] free      zset    read
  KEYS[6] events    stream  append
  KEYS[7] quarantine  set   read
  KEYS[8] idem      string  read, write; only with an Idempotency-Key

Args
  ARGV[1]  epoch        int
  ARGV[2]  seen_seq     int   the highest seq of this epoch the caller has seen
  ARGV[3]  tenant_id    int
  ARGV[4]  code         text
  ARGV[5]  user_id      text  "" when the caller names nobody
  ARGV[6]  lock_token   text  "" when the caller shows none
  ARGV[7]  book_id      text
  ARGV[8]  reference    text  the caller's own, "" without one
  ARGV[9]  metadata     text  JSON, "" without any
  ARGV[10] idem         text  the Idempotency-Key, "" without one
  ARGV[11] fingerprint  text  of the request, "" without an Idempotency-Key

Replies, the first that applies
  suspect                 another epoch or behind what the caller has seen; `counts`: codes are missing
  replayed                user_id, at_ms, position, uses, redemptions_left
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
  ledger_behind
  ok                      user_id, at_ms, position, uses, redemptions_left ("" is unlimited)

Event
  coupon_redeemed    book, code, user, at_ms, uses, reference, metadata, idem, fingerprint
]]
local idem_key, fingerprint = KEYS[8], ARGV[11]
-- include: fence
-- include: replay
-- include: book
-- include: clock
-- include: open
local code, shown_token = ARGV[4], ARGV[6]
local quarantine = KEYS[7]
-- include: holder
-- include: lock
local backlog_share, waits_for_ledger = 1.25, true
-- include: room

local uses = string.format("%d", tonumber(held_uses) + 1)
local left = book[6]
if left ~= "" then
  left = string.format("%d", tonumber(left) - tonumber(uses))
end
if held_token then
  redis.call("DEL", KEYS[4])
end
local seq = redis.call("HINCRBY", KEYS[1], "seq", 1)
local position = ARGV[1] .. "-" .. string.format("%d", seq)
-- The position of the assignment stays in front: it is answered again when the code is assigned to its holder again.
local positions = string.match(held_position, "^[^/]+") .. "/" .. position
redis.call("HSET", KEYS[3], code, positions .. " " .. uses .. " " .. held_at_ms .. " " .. held_by)
-- Each use is counted once: as its code's last, or as one that leaves more. Both together are the book's redemptions.
redis.call("HINCRBY", KEYS[2], left == "0" and "redeemed" or "partly_redeemed", 1)
redis.call("XADD", KEYS[6], position, "event", "coupon_redeemed", "book", ARGV[7], "code", code, "user", held_by,
  "at_ms", at_ms, "uses", uses, "reference", ARGV[8], "metadata", ARGV[9], "idem", ARGV[10],
  "fingerprint", fingerprint)
if idem_key then
  redis.call("SET", idem_key, cjson.encode({fingerprint, held_by, at_ms, position, uses, left}), "PX", 86400000)
end
return {"ok", held_by, at_ms, position, uses, left}

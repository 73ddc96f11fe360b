-- A code that has left the pool becomes the user's. `op` is what the request asks for: book_id, user_id, idempotency_key
-- and fingerprint.
local function assign(meta_key, events_key, holders_key, coupons_key, idem_key, epoch, at_ms, book, op, code)
  local position = make_event(meta_key, events_key, epoch, "event", "coupon_assigned", "book", op.book_id, "code", code,
    "user", op.user_id, "at_ms", at_ms, "idem", op.idempotency_key, "fingerprint", op.fingerprint)
  local holding = format_holding(position, "0", at_ms, op.user_id)
  redis.call("HSET", holders_key, code, holding)
  redis.call("ZADD", coupons_key, 0, op.book_id .. ":" .. code)
  local left = book.max_redemptions_per_code
  if idem_key then
    remember(idem_key, {op.fingerprint, code, at_ms, position, book.ack, left})
  end
  return {"ok", code, at_ms, position, book.ack, left}
end

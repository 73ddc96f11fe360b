-- include: event
-- include: holding
-- include: pool
-- include: replay
-- include: users_coupons
-- A code leaves the pool and becomes the user's.
local function assign(meta, at_ms, book, free_key, holders_key, coupons_key, idem_key, book_id, code, user_id, idempotency_key,
    fingerprint)
  local position = make_event(meta, "coupon_assigned", book_id, code, user_id, idempotency_key, fingerprint)
  take(free_key, code)
  hold(holders_key, code, format_holding(position, "0", at_ms, user_id))
  add_to_users_coupons(coupons_key, book_id, code)
  local left = book.max_redemptions_per_code
  remember(idem_key, fingerprint, code, at_ms, position, book.ack, left)
  return {"ok", code, at_ms, position, book.ack, left}
end

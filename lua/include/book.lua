-- A book's rules as text; "" is unlimited or unset. A book of another tenant does not exist.
-- Returns a refusal; or nil, and the book.
local function read_book(book_key, tenant_id)
  local owner, status, starts_at_ms, expires_at_ms, ack, max_redemptions, max_codes, unlent, lent = unpack(
    redis.call("HMGET", book_key, "tenant_id", "status", "starts_at_ms", "expires_at_ms", "ack",
      "max_redemptions_per_code", "max_codes_per_user", "unlent", "lent"))
  if not owner then
    return {"book_not_loaded"}
  end
  if owner ~= tenant_id then
    return {"book_not_found"}
  end
  return nil, {status = status, starts_at_ms = starts_at_ms, expires_at_ms = expires_at_ms, ack = ack,
    max_redemptions_per_code = max_redemptions, max_codes_per_user = max_codes, unlent = unlent, lent = lent}
end

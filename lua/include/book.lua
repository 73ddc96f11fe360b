-- A book's rules as text; "" is unlimited or unset. A book of another tenant does not exist.
-- Returns a refusal; or nil, and the book.
-- record: book = tenant_id, status, starts_at_ms, expires_at_ms, ack, max_redemptions_per_code, max_codes_per_user, unlent, lent
local function read_book(book_key, tenant_id)
  local book = redis.call("HMGET", book_key, BOOK_FIELDS)
  if not book.tenant_id then
    return {"book_not_loaded"}
  end
  if book.tenant_id ~= tenant_id then
    return {"book_not_found"}
  end
  return nil, book
end

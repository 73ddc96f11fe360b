-- The rules of the books that this call has met, by their keys, as text; "" is unlimited or unset.
local books

local function begin_books()
  books = {}
end

-- A book's rules. A book of another tenant does not exist. Returns a refusal; or nil, and the book.
local function read_book(book_key, tenant_id)
  local book = books[book_key]
  if not book then
    local tenant, status, starts_at_ms, expires_at_ms, ack, max_redemptions, max_codes, lock_ttl_ms = unpack(
      redis.call("HMGET", book_key, "tenant_id", "status", "starts_at_ms", "expires_at_ms", "ack",
        "max_redemptions_per_code", "max_codes_per_user", "lock_ttl_ms"))
    book = {tenant_id = tenant, status = status, starts_at_ms = starts_at_ms, expires_at_ms = expires_at_ms, ack = ack,
      max_redemptions_per_code = max_redemptions, max_codes_per_user = max_codes, lock_ttl_ms = lock_ttl_ms}
    books[book_key] = book
  end
  if not book.tenant_id then
    return {"book_not_loaded"}
  end
  if book.tenant_id ~= tenant_id then
    return {"book_not_found"}
  end
  return nil, book
end

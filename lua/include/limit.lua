-- How many codes of the book the user may hold: `;` follows `:`, so the range is all members of this book.
local function refuse_over_limit(book, coupons_key, book_id)
  if book.max_codes_per_user == "" then
    return nil
  end
  local limit = tonumber(book.max_codes_per_user)
  local held = redis.call("ZLEXCOUNT", coupons_key, "[" .. book_id .. ":", "(" .. book_id .. ";")
  if held >= limit then
    return {"user_code_limit", limit, held}
  end
end

-- include: overlay
-- How many codes of the book the user may hold: `;` follows `:`, so the range is all members of this book.
local function refuse_over_limit(book, coupons_key, book_id)
  if book.max_codes_per_user == "" then
    redis.call("ZCARD", coupons_key) -- what is to be written must be of its type
    return nil
  end
  local limit = tonumber(book.max_codes_per_user)
  local held = redis.call("ZLEXCOUNT", coupons_key, "[" .. book_id .. ":", "(" .. book_id .. ";")
  local more = listed[coupons_key]
  if more then
    held = held + (more[book_id] or 0)
  end
  if held >= limit then
    return {"user_code_limit", limit, held}
  end
end

-- Put a code among those of a user.
local function list(coupons_key, book_id, code)
  add(listed, coupons_key, 0)
  add(listed, coupons_key, book_id .. ":" .. code)
  listed[coupons_key][book_id] = (listed[coupons_key][book_id] or 0) + 1 -- beside the members, which have numbers
end

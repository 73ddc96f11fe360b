-- include: member
-- include: overlay
-- How many codes of the book the user may hold.
local function refuse_over_limit(book, coupons_key, book_id)
  if book.max_codes_per_user == "" then
    redis.call("ZCARD", coupons_key) -- what is to be written must be of its type
    return nil
  end
  local limit = tonumber(book.max_codes_per_user)
  local held = redis.call("ZLEXCOUNT", coupons_key, members_of(book_id))
  local more = commands[coupons_key]
  if more then
    held = held + (more[book_id] or 0)
  end
  if held >= limit then
    return {"user_code_limit", limit, held}
  end
end

-- Put a code among those of a user.
local function add_to_users_coupons(coupons_key, book_id, code)
  local member = format_member(book_id, code)
  local command = commands[coupons_key]
  if command then
    command[#command + 1] = "0"
    command[#command + 1] = member
    command[book_id] = (command[book_id] or 0) + 1 -- looked up by `refuse_over_limit`; `unpack` sends only the numbered items
  else
    plan(coupons_key, {"ZADD", coupons_key, "0", member, [book_id] = 1})
  end
end

-- How many codes of the book the user may hold: `;` follows `:`, so the range is all members of this book.
local limit = book[7]
if limit ~= "" then
  local held = redis.call("ZLEXCOUNT", KEYS[5], "[" .. book_id .. ":", "(" .. book_id .. ";")
  if held >= tonumber(limit) then
    return {"user_code_limit", tonumber(limit), held}
  end
end

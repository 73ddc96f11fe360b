-- A code among those of a user. `;` follows `:`, so the range is all members of the book.
local function format_member(book_id, code)
  return book_id .. ":" .. code
end

local function members_of(book_id)
  return "[" .. book_id .. ":", "(" .. book_id .. ";"
end

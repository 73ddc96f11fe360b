-- How many redemptions of a code are left after so many uses, as text; "" is unlimited.
local function redemptions_left(book, uses)
  local max = book.max_redemptions_per_code
  return max == "" and "" or string.format("%d", tonumber(max) - uses)
end

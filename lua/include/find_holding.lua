-- include: codes_missing
-- include: holding
-- Who holds the code that is to be locked or redeemed. A code that nobody holds must be in the pool, or not be lent at all.
-- Returns a refusal; or nil, and the holding.
local function find_holding(book, book_key, holders_key, free_key, quarantine_key, code, user_id)
  local holding = read_holding(holders_key, code)
  if not holding then
    if redis.call("SISMEMBER", quarantine_key, code) == 1 then
      return {"code_quarantined"}
    end
    local refusal = refuse_if_codes_missing(book_key, free_key, holders_key)
    return refusal or {"not_assigned"}
  end
  if user_id ~= "" and user_id ~= holding.user_id then
    return {"not_holder"}
  end
  local max = book.max_redemptions_per_code
  if max ~= "" and holding.uses >= tonumber(max) then
    return {"already_redeemed"}
  end
  return nil, holding
end

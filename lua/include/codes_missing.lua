-- Every code that was lent is in the pool or in somebody's hands. Otherwise keys are missing, and nobody knows whose.
local function refuse_if_codes_missing(book_key, free_key, holders_key)
  local lent = redis.call("HGET", book_key, "lent")
  if redis.call("ZCARD", free_key) + redis.call("HLEN", holders_key) ~= tonumber(lent) then
    return {"suspect", "counts"}
  end
end

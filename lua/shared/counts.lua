-- Every code that was lent is in the pool or in somebody's hands. Otherwise keys are missing, and nobody knows whose.
local function refuse_if_codes_missing(lent, in_pool, held)
  if in_pool + held ~= tonumber(lent) then
    return {"suspect", "counts"}
  end
end

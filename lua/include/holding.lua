-- Who holds a code, as the holders keep it: `assigned/last uses at_ms user`; `redeemed` is what follows the first position.
-- record: holding = assigned, redeemed, uses, at_ms, user_id
local function parse_holding(text)
  local holding = {string.match(text, "^([^%s/]+)(%S*) (%d+) (%d+) (.*)$")}
  return holding
end

-- The positions of a coupon: `assigned`, or `assigned/last` of one that was redeemed.
local function positions_of(holding)
  return holding.assigned .. holding.redeemed
end

-- The text of a holding that `parse_holding` takes. `uses` is text.
local function format_holding(positions, uses, at_ms, user_id)
  return positions .. " " .. uses .. " " .. at_ms .. " " .. user_id
end

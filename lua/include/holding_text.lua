-- The text of a holding that `parse_holding` takes. `uses` is text.
local function format_holding(positions, uses, at_ms, user_id)
  return positions .. " " .. uses .. " " .. at_ms .. " " .. user_id
end

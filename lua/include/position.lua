-- The text of a position.
local function format_position(epoch, seq)
  return epoch .. "-" .. string.format("%d", seq)
end

-- Who holds a code, as the holders keep it: `assigned/last uses at_ms user`; without `/last` before it is redeemed.
-- `positions` are the first field as it stands.
local function parse_holding(text)
  local assigned, redeemed, uses, at_ms, user_id = string.match(text, "^([^%s/]+)(%S*) (%d+) (%d+) (.*)$")
  return {assigned = assigned, positions = assigned and assigned .. redeemed, uses = tonumber(uses), at_ms = at_ms, user_id = user_id}
end

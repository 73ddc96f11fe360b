-- include: overlay
-- Who holds a code, as the holders keep it: `assigned/last uses at_ms user`; `redeemed` is what follows the first position.
-- Nil of a code that nobody holds. Raises what says that the shard is damaged.
local function read_holding(holders_key, code)
  local changed = commands[holders_key]
  local text = changed and changed[code] or redis.call("HGET", holders_key, code)
  if not text then
    return nil
  end
  local assigned, redeemed, uses, at_ms, user_id = string.match(text, "^([^%s/]+)(%S*) (%d+) (%d+) (.*)$")
  if not assigned then
    error({err = "WRONGTYPE a holding cannot be read"})
  end
  return {assigned = assigned, redeemed = redeemed, uses = tonumber(uses), at_ms = at_ms, user_id = user_id}
end

-- The positions of a coupon: `assigned`, or `assigned/last` of one that was redeemed.
local function positions_of(holding)
  return holding.assigned .. holding.redeemed
end

-- The same, with another event as the last.
local function positions_with(holding, last)
  return holding.assigned .. "/" .. last
end

-- The text of a holding that `read_holding` takes.
local function format_holding(positions, uses, at_ms, user_id)
  return positions .. " " .. uses .. " " .. at_ms .. " " .. user_id
end

-- Put a code into the hands that the text tells.
local function hold(holders_key, code, text)
  local command = commands[holders_key]
  if command then
    command[#command + 1] = code
    command[#command + 1] = text
    command[code] = text -- looked up by `read_holding`; `unpack` sends only the numbered items
  else
    plan(holders_key, {"HSET", holders_key, code, text, [code] = text})
  end
end

-- Redis's own clock in whole Unix milliseconds: as a number, and as text, which never passes through a float's format.
local function read_clock()
  local seconds, microseconds = unpack(redis.call("TIME"))
  local now_ms = tonumber(seconds) * 1000 + math.floor(tonumber(microseconds) / 1000)
  return now_ms, string.format("%d", now_ms)
end

-- One clock for all: Redis's own, in whole Unix milliseconds. As text it never passes through a float's format.
local time = redis.call("TIME")
local now_ms = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
local at_ms = string.format("%d", now_ms)

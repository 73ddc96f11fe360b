-- include: overlay
-- The next code of the pool that no operation of this call has taken; nil when there is none. The pool is a sorted set with
-- scores from a CSPRNG, so the lowest score is a fair draw. Codes are looked at here, and leave the pool with the writes.
local function next_free(free_key, holders_key, wanted)
  local pool = pools[free_key]
  if not pool then
    redis.call("HLEN", holders_key) -- what is to be written must be of its type
    pool = {at = 1, codes = redis.call("ZRANGE", free_key, 0, wanted - 1)}
    pools[free_key] = pool
  end
  local changed = commands[holders_key]
  while true do
    local code = pool.codes[pool.at]
    if not code then
      local from = #pool.codes
      local more = redis.call("ZRANGE", free_key, from, from + wanted - 1)
      if #more == 0 then
        return nil
      end
      for _, one in ipairs(more) do
        pool.codes[#pool.codes + 1] = one
      end
    elseif not changed or not changed[code] then
      return code
    else
      pool.at = pool.at + 1
    end
  end
end

local function take(free_key, code)
  local command = commands[free_key]
  if command then
    command[#command + 1] = code
  else
    plan(free_key, {"ZREM", free_key, code})
  end
end

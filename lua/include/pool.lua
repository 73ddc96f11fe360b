-- include: overlay
-- The next code of the pool that no operation of this section has taken; nil when there is none. The pool is a sorted set with
-- scores from a CSPRNG, so the lowest score is a fair draw. Codes are looked at here, and leave the pool with the writes. `look`
-- is how many operations the section has: each takes one code at most, so they never need to look at more.
local function next_free(free_key, holders_key, look)
  local pool = pools[free_key]
  if not pool then
    redis.call("HLEN", holders_key) -- what is to be written must be of its type
    pool = {at = 1, codes = redis.call("ZRANGE", free_key, 0, look - 1)}
    pools[free_key] = pool
  end
  local changed = commands[holders_key]
  local code = pool.codes[pool.at]
  while code and changed and changed[code] do
    pool.at = pool.at + 1
    code = pool.codes[pool.at]
  end
  return code
end

local function take(free_key, code)
  local command = commands[free_key]
  if command then
    command[#command + 1] = code
  else
    plan(free_key, {"ZREM", free_key, code})
  end
end

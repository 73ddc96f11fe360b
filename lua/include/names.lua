-- The globals that every operation uses, as the library's own: a global is looked up anew wherever it is named. While a
-- library is loaded most of them are not there, so the first call fetches them.
local function read_globals()
  return redis, cjson, string, tonumber, ipairs, pcall, unpack
end
local redis, cjson, string, tonumber, ipairs, pcall, unpack

local own_replid

-- A function of a library still has what the call before was told.
local function forget_replid()
  own_replid = nil
end

-- Whether this is the server in the history that was certified. Asked on every call: a server that followed another master
-- for a moment has closed no connection, and kept the epoch.
local function is_in_history(replid)
  if not own_replid then
    local replication = redis.call("INFO", "replication")
    local _, before = string.find(replication, "master_replid:", 1, true)
    own_replid = before and string.sub(replication, before + 1, before + 40) or ""
  end
  return replid == own_replid
end

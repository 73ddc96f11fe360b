local replication

-- A function of a library still has what the call before was told.
local function forget_replication()
  replication = nil
end

-- Whether this is the server in the history that was certified. Asked on every call: a server that followed another master
-- for a moment has closed no connection, and kept the epoch.
local function is_in_history(replid)
  replication = replication or redis.call("INFO", "replication")
  return string.find(replication, "master_replid:" .. replid .. "\r", 1, true) ~= nil
end

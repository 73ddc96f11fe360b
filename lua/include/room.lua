-- Room for one more event: the backlog has its bound, and what waits for the ledger needs one that was seen of late.
if tonumber(meta[2]) - tonumber(meta[3]) >= tonumber(meta[5]) * backlog_share then
  return {"backlog_full"}
end
if waits_for_ledger and now_ms - tonumber(meta[4]) > 3000 then
  return {"ledger_behind"}
end

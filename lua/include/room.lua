-- Room for one more event: the backlog has its bound, and what waits for the ledger needs one that was seen of late. A
-- clock that went back by more than a minute since then would date what is written here wrongly, in every kind of book.
if tonumber(meta[2]) - tonumber(meta[3]) >= tonumber(meta[5]) * backlog_share then
  return {"backlog_full"}
end
local unseen_ms = now_ms - tonumber(meta[4])
if (waits_for_ledger and unseen_ms > 3000) or unseen_ms < -60000 then
  return {"ledger_behind"}
end

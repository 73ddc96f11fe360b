-- include: overlay
-- Room for one more event: the backlog has its bound, and what waits for the ledger needs one that was seen lately. A
-- clock that went back too far since then would date what is written here wrongly, in every kind of book.
local function refuse_without_room(meta, now_ms, backlog_share, waits_for_ledger)
  if meta.seq + #events - meta.committed >= meta.backlog_max * backlog_share then
    return {"backlog_full"}
  end
  local unseen_ms = now_ms - meta.ledger_at_ms
  if (waits_for_ledger and unseen_ms > LEDGER_UNSEEN_MAX_MS) or unseen_ms < -CLOCKS_APART_MAX_MS then
    return {"ledger_behind"}
  end
end

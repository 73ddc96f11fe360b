-- A book that is closed, paused, not started or expired deals, locks and redeems nothing.
local function refuse_unless_open(book, now_ms)
  if book.status == "closed" then
    return {"book_closed"}
  end
  if book.status == "paused" then
    return {"book_paused"}
  end
  if book.starts_at_ms ~= "" and now_ms < tonumber(book.starts_at_ms) then
    return {"book_not_started"}
  end
  if book.expires_at_ms ~= "" and now_ms >= tonumber(book.expires_at_ms) then
    return {"book_expired"}
  end
end

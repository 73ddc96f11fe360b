-- A book that is closed, paused, not started or expired deals, locks and redeems nothing.
if book[2] == "closed" then
  return {"book_closed"}
end
if book[2] == "paused" then
  return {"book_paused"}
end
if book[3] ~= "" and now_ms < tonumber(book[3]) then
  return {"book_not_started"}
end
if book[4] ~= "" and now_ms >= tonumber(book[4]) then
  return {"book_expired"}
end

"""The short tour that `coupon-svc dev` prints: the life of a coupon as lines to paste into a shell."""

from __future__ import annotations

import shlex

_STEPS = """\
# a book of 1000 codes that the service makes up
ANSWER=$(curl -s "$URL/coupons" -H "$AUTH" -H "$JSON" -d '{"name": "Summer", "generate": {"pattern": "SUMMER-####-####", "total": 1000}}'); printf '%s\\n' "$ANSWER"
BOOK=$(printf '%s' "$ANSWER" | sed 's/.*"book_id": *"\\([^"]*\\)".*/\\1/')

# one of them, chosen at random, for the user alice
ANSWER=$(curl -s "$URL/coupons/assign" -H "$AUTH" -H "$JSON" -d "{\\"book_id\\": \\"$BOOK\\", \\"user_id\\": \\"alice\\"}"); printf '%s\\n' "$ANSWER"
CODE=$(printf '%s' "$ANSWER" | sed 's/.*"code": *"\\([^"]*\\)".*/\\1/')

# she is paying: hold it for two minutes
ANSWER=$(curl -s "$URL/coupons/lock/$CODE" -H "$AUTH" -H "$JSON" -d '{"user_id": "alice"}'); printf '%s\\n' "$ANSWER"
TOKEN=$(printf '%s' "$ANSWER" | sed 's/.*"lock_token": *"\\([^"]*\\)".*/\\1/')

# she has paid: it is spent, for good
curl -s "$URL/coupons/redeem/$CODE" -H "$AUTH" -H "$JSON" -d "{\\"user_id\\": \\"alice\\", \\"lock_token\\": \\"$TOKEN\\"}"; echo

# what she holds, and how the book stands
curl -s "$URL/users/alice/coupons" -H "$AUTH"; echo
curl -s "$URL/coupons/$BOOK" -H "$AUTH"; echo
"""  # noqa: E501  # a line of the tour is one command; a backslash at its end would get lost when pasted with blanks


def tour(base_url: str, api_key: str) -> str:
    """Commands for any POSIX shell that work pasted one by one, in order, and as one block; each prints its answer.

    They need curl and sed, and nothing to be filled in.
    """
    given = (
        f"URL={shlex.quote(base_url)}",
        f"AUTH={shlex.quote(f'Authorization: Bearer {api_key}')}",
        "JSON='Content-Type: application/json'",
    )
    return "\n".join(("# where, and who", *given, "", _STEPS))

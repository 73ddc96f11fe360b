"""The root of every exception that this package raises on purpose, and how an unforeseen one is logged."""

from __future__ import annotations


class CouponError(Exception):
    """Something that the code foresees. Redis's errors are in redis/errors.py, the ledger's in postgres/errors.py.

    No message may hold a code, a key or a token: messages are logged.
    """


class Unavailable(CouponError):
    """A store that was needed could not be reached or did not answer in time.

    `may_have_happened` tells whether a transaction was under way, which may have been committed all the same.
    """

    may_have_happened = False


def error_location(error: BaseException) -> str:
    """File and line where an error was raised, for the log. Its message is left out: it may hold a code or a key."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}" if trace is not None else "nowhere"

"""What can go wrong with the ledger, by what the caller may conclude."""

from __future__ import annotations

from coupon_svc.domain.errors import CouponError, Unavailable


class LedgerError(CouponError):
    """The ledger could not be used, or refused what it was given."""


class LedgerUnavailable(LedgerError, Unavailable):
    """Postgres could not be reached or did not answer in time."""


class DatabaseUnfit(LedgerError):
    """This database is not one that the process may work with as it is set up; the message says what to do."""


class BookBusy(LedgerError):
    """Another transaction holds the book's row. Nothing was done: ask again."""


class TakeTurns(LedgerError):
    """This cannot be done in one transaction beside others of the tenant: wait for a turn (`uploads.Uploads`)."""


class NotOwner(LedgerError):
    """A shard has another owner, epoch or position by now. A batch for it must be thrown away."""

    def __init__(self) -> None:
        super().__init__("the shard has another owner, epoch or position")


class HistoryForked(LedgerError):
    """The stream and the ledger tell different stories of the same position. A person must look; the message says where."""

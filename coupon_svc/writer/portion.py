"""How much of what waits for the ledger is read and committed at a time."""

from __future__ import annotations

EVENTS_PER_COMMIT_MAX = 4_000
BYTES_PER_COMMIT_MAX = 4 * 1024 * 1024
"""Of all shards together, and roughly: an entry is never cut up, and each shard may bring one."""
ENTRIES_AT_FIRST, ENTRIES_MAX = 16, 500
COMMITS_TO_PROVE = 10


class Portion:
    """How many entries one loop reads of a stream, and how much of them it commits.

    A commit has to end in time: one that is too large is tried again for ever. So few entries are read at first, since each
    may be large. Twice as many are read when all of them took less than half of a commit; half as many when some were left
    over, or when something failed. After that they are not doubled for some commits: each that fails takes seconds.
    """

    def __init__(self) -> None:
        self.entries = ENTRIES_AT_FIRST
        """How many to read of a stream next."""
        self._to_prove = 0
        """Commits that have to succeed before more are read."""
        self.begin()

    def begin(self) -> None:
        """A commit begins, and may take all there is room for."""
        self._events, self._bytes = EVENTS_PER_COMMIT_MAX, BYTES_PER_COMMIT_MAX

    def take(self, events: int, size: int) -> None:
        """An entry of so many events and bytes is in the commit."""
        self._events -= events
        self._bytes -= size

    @property
    def is_spent(self) -> bool:
        """Whether there is no room for more. A shard that has nothing in the commit yet brings one entry all the same: a
        long backlog of one holds up no other."""
        return self._events <= 0 or self._bytes <= 0

    def committed(self, read: int, *, all_of_it: bool) -> None:
        """The commit is done. `read`: of the stream with the most entries, how many were read."""
        self._to_prove = max(0, self._to_prove - 1)
        has_room = 2 * self._events > EVENTS_PER_COMMIT_MAX and 2 * self._bytes > BYTES_PER_COMMIT_MAX
        if not all_of_it:
            self.entries = max(1, self.entries // 2)
        elif has_room and read >= self.entries and not self._to_prove:
            self.entries = min(2 * self.entries, ENTRIES_MAX)

    def failed(self) -> None:
        """A store did not answer in time, perhaps since this was too much."""
        self.entries, self._to_prove = max(1, self.entries // 2), COMMITS_TO_PROVE

"""What must hold of a shard's ledger, whatever Redis has. Each check counts what is wrong, in Postgres alone."""

from __future__ import annotations

from coupon_svc.invariants.check import Check


class LedgerCheck(Check):
    """A check with its statement: how many rows of shard $1 are wrong."""

    def __init__(self, promise: str, what: str, statement: str) -> None:
        super().__init__(promise, what)
        self.statement = statement

    POSITIONS = (
        "P2",
        "a position is missing or doubled",
        """
        SELECT count(*) FROM (
            SELECT epoch, max(seq) AS last, sum(n) AS number FROM (
                SELECT epoch, seq, n FROM entries WHERE shard = $1
                UNION ALL SELECT epoch, seq, 1 FROM old_events o WHERE shard = $1 AND (chain IS NOT NULL OR NOT EXISTS (
                    SELECT FROM late_events l WHERE recorded AND (l.shard, l.epoch, l.seq) = (o.shard, o.epoch, o.seq)))
                UNION ALL SELECT epoch, seq, 1 FROM dead_letters d WHERE shard = $1 AND NOT EXISTS (
                    SELECT FROM (SELECT seq, n FROM entries e WHERE e.shard = $1 AND e.epoch = d.epoch AND e.seq >= d.seq
                                 ORDER BY seq LIMIT 1) AS around WHERE around.seq - around.n < d.seq)) p
            GROUP BY epoch) e WHERE last <> number""",
    )
    ENTRY_BEFORE = (
        "P2",
        "an entry does not follow the one before it",
        """
        SELECT count(*) FROM (
            SELECT after, seq - n AS before, lag(tip, 1, '') OVER stream AS tip, lag(seq, 1, 0::bigint) OVER stream AS seq
            FROM entries WHERE shard = $1 WINDOW stream AS (PARTITION BY epoch ORDER BY seq)) e
        WHERE before = seq AND after <> tip""",
    )
    EVENTS = (
        "P2",
        "an entry's events cannot be read, or are not as many as it says",
        """
        SELECT count(*) FROM entries e WHERE shard = $1 AND n <> (
            SELECT count(*) FROM events_of_entry(e.seq, e.n, e.events)) AND NOT EXISTS (
            SELECT FROM dead_letters d WHERE d.shard = $1 AND d.epoch = e.epoch AND d.seq = e.seq)""",
    )
    LATE_EVENT = (
        "P2",
        "a late event is not the same in both places that have it",
        """
        SELECT count(*) FROM late_events l JOIN old_events e USING (shard, epoch, seq)
        WHERE l.shard = $1 AND recorded AND (e.chain IS NOT NULL
            OR (e.event, e.book_id, e.code, e.user_id, e.at_ms) <> (l.event, l.book_id, l.code, l.user_id, l.at_ms)
            OR (l.chain IS NOT NULL AND (e.uses, e.reference, e.metadata, e.idem, e.fingerprint)
                IS DISTINCT FROM (l.uses, l.reference, l.metadata, l.idem, l.fingerprint)))""",
    )
    END = (
        "P2",
        "the ledger's position is not where its events end",
        """
        SELECT count(*) FROM (SELECT epoch, committed AS seq, tip FROM shards WHERE shard = $1
                              UNION ALL SELECT epoch, seq, tip FROM epochs WHERE shard = $1) ends
        LEFT JOIN LATERAL (SELECT seq, tip FROM entries e WHERE e.shard = $1 AND e.epoch = ends.epoch
                           ORDER BY seq DESC LIMIT 1) last_entry ON true
        WHERE ends.seq <> coalesce(greatest(last_entry.seq,
            (SELECT max(seq) FROM old_events o WHERE o.shard = $1 AND o.epoch = ends.epoch AND (
                chain IS NOT NULL OR NOT EXISTS (SELECT FROM late_events l WHERE recorded
                                                 AND (l.shard, l.epoch, l.seq) = (o.shard, o.epoch, o.seq)))),
            (SELECT max(seq) FROM dead_letters d WHERE d.shard = $1 AND d.epoch = ends.epoch)), 0)
        OR (last_entry.seq = ends.seq AND ends.tip <> last_entry.tip)""",
    )
    COUPON = (
        "P1",
        "a code was assigned twice, or its coupon is not what its event says",
        """
        SELECT count(*) FROM (SELECT * FROM events WHERE shard = $1 AND event = 'coupon_assigned') e
        FULL JOIN (SELECT coupons.* FROM coupons JOIN books USING (book_id) WHERE shard = $1) c
            ON c.book_id = e.book_id AND c.code = e.code AND c.user_id = e.user_id AND (c.epoch, c.seq) = (e.epoch, e.seq)
        WHERE c.code IS NULL OR e.code IS NULL""",
    )
    CONFIRMED = (
        "P1",
        "a coupon was confirmed to somebody who does not have it",
        """
        SELECT count(*) FROM (SELECT * FROM events WHERE shard = $1 AND event = 'coupon_confirmed') e
        LEFT JOIN coupons c ON c.book_id = e.book_id AND c.code = e.code AND c.user_id = e.user_id WHERE c.code IS NULL""",
    )
    USES = (
        "P3",
        "a coupon's uses are not its redemptions",
        """
        SELECT count(*) FROM (SELECT coupons.* FROM coupons JOIN books USING (book_id) WHERE shard = $1) c
        LEFT JOIN (SELECT book_id, code, count(*) AS number, max(uses) AS uses, min(user_id) AS first_user,
                          max(user_id) AS last_user FROM redemptions GROUP BY book_id, code) r USING (book_id, code)
        WHERE c.uses <> coalesce(r.number, 0) OR c.uses <> coalesce(r.uses, 0)
           OR (r.number > 0 AND (r.first_user <> c.user_id OR r.last_user <> c.user_id))""",
    )
    REDEMPTION = (
        "P3",
        "a redemption has no coupon",
        """
        SELECT count(*) FROM redemptions r JOIN books USING (book_id) WHERE shard = $1
        AND NOT EXISTS (SELECT FROM coupons c WHERE c.book_id = r.book_id AND c.code = r.code)""",
    )
    USES_MAX = (
        "P3",
        "a code was redeemed more often than its book allows",
        """
        SELECT count(*) FROM coupons JOIN books USING (book_id)
        WHERE shard = $1 AND uses > max_redemptions_per_code""",
    )
    COUNTS = (
        "P4",
        "a book's counts are not those of its codes",
        """
        SELECT count(*) FROM books LEFT JOIN (
            SELECT book_id, count(*) FILTER (WHERE place >= -1 AND NOT computed) AS total,
                   count(*) FILTER (WHERE place = -1) AS quarantined,
                   count(*) FILTER (WHERE place BETWEEN 0 AND leased_upto AND NOT computed)
                   - count(*) FILTER (WHERE place NOT BETWEEN 0 AND leased_upto AND computed) AS lent
            FROM codes JOIN books USING (book_id) WHERE shard = $1 GROUP BY book_id) c USING (book_id)
        LEFT JOIN (SELECT book_id, sum(total) AS total, sum(unlent) AS unlent FROM code_ranges GROUP BY book_id) r
            USING (book_id)
        WHERE shard = $1 AND (books.total, books.lent, books.quarantined, computed_total, computed_unlent)
              <> (coalesce(c.total, 0) + coalesce(r.total, 0), coalesce(c.lent, 0) + coalesce(r.total - r.unlent, 0),
                  coalesce(c.quarantined, 0), coalesce(r.total, 0), coalesce(r.unlent, 0))""",
    )
    RANGE_COUNTS = (
        "P4",
        "a range's counts are not those of its numbers",
        """
        SELECT count(*) FROM code_ranges r JOIN books USING (book_id), LATERAL (
            SELECT count(*) FILTER (WHERE NOT named) AS uploaded,
                   count(*) FILTER (WHERE NOT named AND number < lent_upto) AS uploaded_below,
                   count(*) FILTER (WHERE named AND number >= lent_upto) AS named_above
            FROM passed_over p WHERE p.pattern_id = r.pattern_id AND number >= begins AND number < ends) p
        WHERE shard = $1 AND (r.total <> ends - begins - uploaded
                              OR r.total - r.unlent <> lent_upto - begins - uploaded_below + named_above)""",
    )
    RANGES = (
        "P1",
        "two ranges have a number in common, or one is above its pattern's counter",
        """
        SELECT count(*) FROM (
            SELECT book_id, begins, ends, taken, lag(ends) OVER (PARTITION BY pattern_id ORDER BY begins) AS before
            FROM code_ranges JOIN computed_patterns USING (pattern_id)) r JOIN books USING (book_id)
        WHERE shard = $1 AND (before > begins OR ends > taken)""",
    )
    PLACES = (
        "P4",
        "codes have no place in their book, and no upload is at work on it",
        """
        SELECT coalesce(sum(c.number), 0)::bigint FROM books, LATERAL (
            SELECT count(*) AS number FROM codes WHERE codes.book_id = books.book_id AND place < -1) c
        WHERE shard = $1 AND NOT EXISTS (SELECT FROM uploads WHERE uploads.book_id = books.book_id)""",
    )
    LENT = (
        "P4",
        "an assigned code was not lent",
        """
        SELECT count(*) FROM coupons JOIN books USING (book_id)
        LEFT JOIN codes ON codes.tenant_id = books.tenant_id AND codes.code = coupons.code
        WHERE shard = $1 AND CASE WHEN codes.code IS NULL THEN computed_total = 0
                                  ELSE codes.place NOT BETWEEN 0 AND leased_upto END""",
    )
    OUTSTANDING = (
        "P4",
        "a code that was lent is neither assigned nor known to be outstanding",
        """
        SELECT count(*) FROM books JOIN codes USING (book_id) WHERE shard = $1 AND place BETWEEN 0 AND accounted_upto
        AND NOT EXISTS (SELECT FROM coupons c WHERE c.book_id = books.book_id AND c.code = codes.code)
        AND NOT EXISTS (SELECT FROM outstanding_codes o WHERE o.book_id = books.book_id AND o.code = codes.code)
        AND NOT EXISTS (SELECT FROM lone_leases l WHERE l.book_id = books.book_id AND l.code = codes.code)""",
    )
    QUARANTINE = (
        "P4",
        "the quarantine's list is not what its codes say",
        """
        SELECT count(*) FROM (SELECT book_id, code FROM quarantine WHERE shard = $1) q
        FULL JOIN (SELECT book_id, code FROM codes JOIN books USING (book_id) WHERE shard = $1 AND place = -1) c
            USING (book_id, code) WHERE q.book_id IS NULL OR c.book_id IS NULL""",
    )

"""The Coupon Book Service: Postgres lends, Redis deals, the ledger remembers."""

__version__ = "0.1.0"

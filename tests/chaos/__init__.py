"""The fault suite: seeded runs of the service under load and a fault, and what must be true of it afterwards.

Clients record every request before they send it and every answer, outside the system under test. A fault is injected while
they work, and the run fails if it was not seen to bite. Then the system is left to heal, what is unknown is asked again with
the same Idempotency-Key, the ledger catches up, and the history is held against itself, Redis and Postgres.
"""

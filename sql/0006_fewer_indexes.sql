-- No statement of the service looks a user's coupons up in the ledger (Redis lists them), and an index over users costs
-- every assignment a page of its own. Who wants to ask the ledger by user makes it again on a replica.

DROP INDEX coupons_of_a_user;

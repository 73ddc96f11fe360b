"""For those who live in Locust: users who get a code, hold it while they pay, and redeem it.

    pip install locust
    COUPON_LOAD_KEY=… COUPON_LOAD_BOOK=bk_07… locust -f examples/locustfile.py --host http://127.0.0.1:8080

The book must have codes to give; without COUPON_LOAD_BOOK one of 100,000 codes is made. Requests are grouped by verb, and a
refusal that belongs to the game (sold out, locked) is no failure. Locust does not audit: `coupon-svc load` does.
"""

import os
import random
import uuid
from urllib.parse import quote

from locust import HttpUser, between, events, task

PATHS = {
    "create_book": "/coupons",
    "assign_coupon": "/coupons/assign",
    "lock_coupon": "/coupons/lock/{code}",
    "redeem_coupon": "/coupons/redeem/{code}",
    "list_coupons": "/users/{user_id}/coupons",
}
EXPECTED = {"book_exhausted", "user_code_limit", "locked", "lock_not_held", "already_redeemed"}
HEADERS = {"Authorization": "Bearer " + os.environ.get("COUPON_LOAD_KEY", "")}


@events.test_start.add_listener
def find_book(environment, **_):
    """Take the book that was given, or make one."""
    environment.book_id = os.environ.get("COUPON_LOAD_BOOK")
    if environment.book_id:
        return
    import requests

    body = {"name": "locust", "generate": {"pattern": uuid.uuid4().hex[:8].upper() + "-########", "total": 100_000}}
    made = requests.post(environment.host + PATHS["create_book"], json=body, headers=HEADERS, timeout=120)
    made.raise_for_status()
    environment.book_id = made.json()["book_id"]


class Shopper(HttpUser):
    """One user of a shop: every journey is another person."""

    wait_time = between(0.1, 1.0)

    def on_start(self):
        self.client.headers.update(HEADERS)

    @task(5)
    def check_out(self):
        """Assign, lock, redeem; some leave on the way."""
        user_id = str(uuid.uuid4())
        coupon = self._post("assign_coupon", {"book_id": self.environment.book_id, "user_id": user_id}, key=user_id)
        if coupon is None or random.random() < 0.2:
            return
        lock = self._post("lock_coupon", {"user_id": user_id, "ttl_seconds": 60}, code=coupon["code"])
        if lock is None or random.random() < 0.1:
            return
        payment = {"user_id": user_id, "lock_token": lock["lock_token"]}
        self._post("redeem_coupon", payment, code=coupon["code"], key="pay-" + user_id)
        self.last_user = user_id

    @task(1)
    def look(self):
        """What do I hold?"""
        path = PATHS["list_coupons"].format(user_id=quote(getattr(self, "last_user", "nobody"), safe=""))
        self.client.get(path, name="list_coupons")

    def _post(self, name, body, code="", key=None):
        """The answer, or None when there is none to go on with."""
        headers = {"Idempotency-Key": key} if key else {}
        path = PATHS[name].format(code=quote(code, safe=""))
        with self.client.post(path, json=body, headers=headers, name=name, catch_response=True) as response:
            if response.ok:
                return response.json()
            if _outcome(response) in EXPECTED:
                response.success()
            return None


def _outcome(response):
    try:
        return response.json().get("code")
    except ValueError:
        return None

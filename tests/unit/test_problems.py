"""Outcomes as problems."""

from __future__ import annotations

import json

import pytest

from coupon_svc.domain.outcomes import Outcome, Refused
from coupon_svc.http.problems import PROBLEMS, log_failure, log_failures, problem_response


@pytest.mark.parametrize("outcome", Outcome)
def test_every_outcome_makes_a_whole_problem(outcome: Outcome) -> None:
    response = problem_response(Refused(outcome), b"its-id")
    body = json.loads(response.body)
    assert body == {
        "type": f"/problems/{outcome.value}",
        "title": PROBLEMS[outcome].title,
        "status": response.status,
        "detail": PROBLEMS[outcome].detail,
        "code": outcome.value,
        "request_id": "its-id",
    }
    headers = dict(response.headers)
    assert headers[b"content-type"] == b"application/problem+json"
    assert (b"retry-after" in headers) >= (response.status in (423, 429, 503))
    assert (b"www-authenticate" in headers) == (response.status == 401)


def test_a_problem_says_the_numbers_its_own_detail_and_added_headers() -> None:
    refused = Refused(Outcome.LOCKED, "a detail", retry_after_seconds=42)
    response = problem_response(refused, b"r", [(b"allow", b"GET")])
    body = json.loads(response.body)
    assert (body["detail"], body["retry_after_seconds"]) == ("a detail", 42)
    assert dict(response.headers)[b"retry-after"] == b"42"
    assert dict(response.headers)[b"allow"] == b"GET"


def test_only_a_5xx_is_logged_and_what_an_error_says_is_not(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    log_failure(Outcome.BOOK_NOT_FOUND, "read_book", b"r1")
    assert caplog.records == []
    log_failure(Outcome.RECOVERING, "read_book", b"r2")
    log_failure(Outcome.INTERNAL_ERROR, "read_book", b"r3", KeyError("SECRET-1"))
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("INFO", "503 recovering in read_book, request r2"),
        ("ERROR", "500 internal_error in read_book, request r3: KeyError at nowhere"),
    ]


def test_the_users_of_a_list_have_a_line_for_each_5xx(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    unknown, limit = Refused(Outcome.OUTCOME_UNKNOWN), Refused(Outcome.USER_CODE_LIMIT, limit=1, held=1)
    failed = Refused(Outcome.INTERNAL_ERROR)
    failed.__cause__ = KeyError("SECRET-1")
    log_failures([unknown, limit, failed, unknown], "assign_coupons", b"r1")
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("INFO", "503 outcome_unknown in assign_coupons for 2 users, request r1"),
        ("ERROR", "500 internal_error in assign_coupons for 1 users, request r1: KeyError at nowhere"),
    ]

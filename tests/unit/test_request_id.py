"""Ids of requests."""

from __future__ import annotations

import itertools

import pytest

from coupon_svc.http.request_id import choose_request_id, make_request_ids


def test_ids_differ_within_a_process_and_between_processes_and_have_one_length() -> None:
    ids = [*itertools.islice(make_request_ids(), 300), *itertools.islice(make_request_ids(), 300)]
    assert len(set(ids)) == 600
    assert {len(request_id) for request_id in ids} == {28}


def test_an_id_of_ours_could_be_a_callers() -> None:
    made = next(make_request_ids())
    assert choose_request_id(made, iter(())) == made


@pytest.mark.parametrize("sent", [b"a", b"A.b_c-9", b"0" * 64])
def test_a_well_formed_id_is_the_callers(sent: bytes) -> None:
    assert choose_request_id(sent, iter([b"ours"])) == sent


@pytest.mark.parametrize("sent", [b"", b"0" * 65, b" a", b"a\n", b"a/b", b"\xe9", b"a:b"])
def test_any_other_is_replaced(sent: bytes) -> None:
    assert choose_request_id(sent, iter([b"ours"])) == b"ours"

"""User ids, metadata and cursors."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coupon_svc.domain.outcomes import Outcome, Refused
from coupon_svc.http.inputs import check_user_id, encode_metadata
from coupon_svc.http.schemas import METADATA_BYTES_MAX, METADATA_DEPTH_MAX


def pointer_of(refused: Refused) -> object:
    assert refused.outcome is Outcome.INVALID_REQUEST
    return refused.facts["errors"][0]["pointer"]  # type: ignore[index]


@pytest.mark.parametrize("text", ["u", "ann of Kent", "...", "é/ñ?", "x" * 128, "🙂"])
def test_a_user_id(text: str) -> None:
    check_user_id(text)


@pytest.mark.parametrize(
    "text", ["", ".", "..", " u", "u\u00a0", "a\x00b", "a\nb", "u\n", "a\ufffdb", "a\x85b", "x" * 129]
)
def test_any_other_text_is_no_user_id(text: str) -> None:
    with pytest.raises(Refused) as refused:
        check_user_id(text)
    assert pointer_of(refused.value) == "/user_id"


def test_no_metadata_is_an_empty_object() -> None:
    assert encode_metadata(None) == encode_metadata({}) == "{}"


@given(
    st.dictionaries(st.text(max_size=5), st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=9))
)
def test_metadata_comes_back_as_it_was(metadata: dict[str, Any]) -> None:
    assert msgspec.json.decode(encode_metadata(metadata)) == metadata


def test_metadata_may_be_so_large_and_no_larger() -> None:
    room = METADATA_BYTES_MAX - len('{"a":""}')
    assert len(encode_metadata({"a": "x" * room})) == METADATA_BYTES_MAX
    with pytest.raises(Refused) as refused:
        encode_metadata({"a": "é" * (room // 2 + 1)})
    assert pointer_of(refused.value) == "/metadata"


@pytest.mark.parametrize("wrap", [lambda inner: {"a": inner}, lambda inner: [inner]])
def test_metadata_may_be_so_deep_and_no_deeper(wrap: Any) -> None:
    def nested(levels: int) -> dict[str, Any]:
        inner: Any = {}
        for _ in range(levels - 2):
            inner = wrap(inner)
        return {"a": inner}

    encode_metadata(nested(METADATA_DEPTH_MAX))
    with pytest.raises(Refused) as refused:
        encode_metadata(nested(METADATA_DEPTH_MAX + 1))
    assert pointer_of(refused.value) == "/metadata"

"""A request is checked against its operation, and a refusal says where it is wrong and repeats nothing of it."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coupon_svc.domain.outcomes import Outcome, Refused
from coupon_svc.http.files import file_kind
from coupon_svc.http.routes import OPERATIONS
from coupon_svc.http.validation import (
    check_file_request,
    check_request,
    decode_body,
    decode_query,
    is_json,
    json_pointer,
    parse_idempotency_key,
    unquote,
    whole_numbers,
    without_values,
)


class Body(msgspec.Struct, forbid_unknown_fields=True):
    number: Annotated[int, msgspec.Meta(ge=1)] = 1
    codes: list[str] = []
    metadata: dict[str, Any] = {}


class Query(msgspec.Struct):
    limit: int = 50
    cursor: str | None = None


DECODER = msgspec.json.Decoder(Body)


def refusal_of(body: bytes) -> tuple[Outcome, str, str]:
    """The outcome, the pointer and the detail of a body's refusal."""
    with pytest.raises(Refused) as refused:
        decode_body(DECODER, body)
    errors: Any = refused.value.facts.get("errors", [{"pointer": "", "detail": ""}])
    assert len(errors) == 1
    return refused.value.outcome, errors[0]["pointer"], errors[0]["detail"]


# --- bodies


def test_an_empty_body_is_an_empty_object() -> None:
    assert decode_body(DECODER, b"") == decode_body(DECODER, b"{}") == Body()


@pytest.mark.parametrize(
    "body", [b"{", b"nonsense", b'{"number": 01}', b'"\xff"', b"{}{}", b"[" * 5000, b"\xef\xbb\xbf{"]
)
def test_what_is_not_json_is_malformed(body: bytes) -> None:
    assert refusal_of(body)[0] is Outcome.MALFORMED_JSON


def test_json_that_breaks_off_behind_what_is_wrong_is_malformed_all_the_same() -> None:
    assert refusal_of(b'{"number": "x"')[0] is Outcome.MALFORMED_JSON


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        (b"[]", ""),
        (b'{"number": 0}', "/number"),
        (b'{"codes": ["A", 7]}', "/codes/1"),
        (b'{"number": 1.5}', "/number"),
        (b'{"number": null}', "/number"),
        (b'{"codes": {"SECRET": 1}}', "/codes"),
    ],
)
def test_a_wrong_body_is_refused_with_a_pointer_to_what_is_wrong(body: bytes, pointer: str) -> None:
    outcome, where, detail = refusal_of(body)
    assert (outcome, where) == (Outcome.INVALID_REQUEST, pointer)
    assert detail


def test_a_misspelt_field_is_named_and_what_may_be_a_code_is_not() -> None:
    assert "`numbr`" in refusal_of(b'{"numbr": 1}')[2]
    assert "SECRET" not in refusal_of(b'{"SECRET-10": 1}')[2]


def test_a_whole_number_may_have_a_point() -> None:
    assert decode_body(DECODER, b'{"number": 2.0}') == Body(number=2)
    assert decode_body(DECODER, b'{"number": 2.0, "metadata": {"a": 1.0}}').metadata == {"a": 1.0}
    assert type(decode_body(DECODER, b'{"number": 2.0, "metadata": {"a": 1.0}}').metadata["a"]) is float


@pytest.mark.parametrize(
    "content_type", [b"application/json", b"Application/JSON; charset=utf-8", b" application/json "]
)
def test_a_body_says_that_it_is_json(content_type: bytes) -> None:
    assert is_json(content_type)


@pytest.mark.parametrize("content_type", [b"", b"text/plain", b"application/jsonp", b"application/xml; json"])
def test_any_other_type_is_not_json(content_type: bytes) -> None:
    assert not is_json(content_type)


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("Expected `int`, got `str`", "Expected `int`, got `str`"),
        ("Object contains unknown field `lock_tokn`", "Object contains unknown field `lock_tokn`"),
        ("Object contains unknown field `SUMMER-1`", "Object contains unknown field"),
        ("Invalid enum value 'SUMMER-1'", "Invalid enum value"),
        ("Invalid enum value 'active'", "Invalid enum value"),
    ],
)
def test_a_message_of_msgspec_repeats_nothing_that_may_be_a_code(said: str, shown: str) -> None:
    assert without_values(said) == shown


@pytest.mark.parametrize(
    ("path", "pointer"),
    [("", ""), (".codes[3]", "/codes/3"), (".generate.total", "/generate/total"), ("[...].a", "/a")],
)
def test_a_path_of_msgspec_as_a_json_pointer(path: str, pointer: str) -> None:
    assert json_pointer(path) == pointer


# --- queries


@pytest.mark.parametrize(("quoted", "text"), [(b"a+b", "a b"), (b"%2B", "+"), (b"%C3%A9", "é"), (b"", "")])
def test_a_query_is_percent_encoded(quoted: bytes, text: str) -> None:
    assert unquote(quoted) == text


@pytest.mark.parametrize("quoted", [b"%", b"%4", b"%zz", b"%ff", b"\xff"])
def test_a_broken_escape_and_bytes_that_are_not_utf_8_are_errors(quoted: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  # UnicodeDecodeError is one, too
        unquote(quoted)


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        (b"", Query()),
        (b"&&", Query()),
        (b"limit=7", Query(7)),
        (b"cursor=a%20b+c%C3%A9&limit=1", Query(1, "a b cé")),
        (b"cursor", Query(50, "")),
        (b"cursor=a=b", Query(50, "a=b")),
    ],
)
def test_a_query_is_read(query: bytes, expected: Query) -> None:
    assert decode_query(Query, query) == expected


@pytest.mark.parametrize(
    ("query", "pointer"),
    [
        (b"limit=x", "/limit"),
        (b"limit=1&limit=1", "/limit"),
        (b"page=2", "/page"),
        (b"a~b/c=1", "/a~0b~1c"),
        (b"cursor=%zz", ""),
        (b"cursor=%ff", ""),
    ],
)
def test_a_wrong_query_is_refused_with_the_parameter(query: bytes, pointer: str) -> None:
    with pytest.raises(Refused) as refused:
        decode_query(Query, query)
    assert refused.value.outcome is Outcome.INVALID_REQUEST
    assert refused.value.facts["errors"][0]["pointer"] == pointer  # type: ignore[index]


def test_an_operation_without_parameters_refuses_any() -> None:
    assert decode_query(None, b"") is None
    with pytest.raises(Refused):
        decode_query(None, b"limit=1")


# --- Idempotency-Keys


@pytest.mark.parametrize(
    ("header", "key"),
    [
        (b"k-1", "k-1"),
        (b'  "k-1" ', "k-1"),
        (rb'"a\"b\\c"', 'a"b\\c'),
        (b'"', '"'),
        (b"two words", "two words"),
        (b"x" * 255, "x" * 255),
    ],
)
def test_a_key_is_bare_or_quoted(header: bytes, key: str) -> None:
    assert parse_idempotency_key(header) == key


@pytest.mark.parametrize("header", [b"", b'""', b"   ", b"x" * 256, b"a\tb", b"caf\xe9", b"a\x7f"])
def test_what_is_no_key_is_refused(header: bytes) -> None:
    with pytest.raises(Refused) as refused:
        parse_idempotency_key(header)
    assert refused.value.outcome is Outcome.INVALID_IDEMPOTENCY_KEY


@given(st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), min_size=1, max_size=100))
def test_quoting_changes_no_key(key: str) -> None:
    quoted = '"' + key.replace("\\", r"\\").replace('"', r"\"") + '"'
    assert parse_idempotency_key(quoted.encode()) == key


# --- the order


WRONG = {
    Outcome.UNSUPPORTED_MEDIA_TYPE: ({b"content-type": b"text/plain"}, b"{}"),
    Outcome.MALFORMED_JSON: ({}, b"{"),
    Outcome.INVALID_IDEMPOTENCY_KEY: ({b"idempotency-key": b""}, b"{}"),
    Outcome.INVALID_REQUEST: ({}, b'{"number": 0}'),
}


@pytest.mark.parametrize("first", range(len(WRONG)))
def test_the_first_of_several_refusals_is_answered(first: int) -> None:
    """What comes before `first` is right, and all from it on is wrong."""
    wrong = list(WRONG)[first:]
    headers = {b"content-type": b"application/json"}
    for outcome in wrong:
        headers |= WRONG[outcome][0]
    body = next(WRONG[outcome][1] for outcome in wrong if WRONG[outcome][1] != b"{}")
    operation = next(operation for operation in OPERATIONS if operation.name == "assign_coupon")
    with pytest.raises(Refused) as refused:
        check_request(operation, DECODER, b"", headers, body)
    assert refused.value.outcome is wrong[0]


def test_a_query_is_judged_after_the_body_is_read_and_told_before_its_fields() -> None:
    operation = next(operation for operation in OPERATIONS if operation.name == "assign_coupon")
    headers = {b"content-type": b"application/json"}
    with pytest.raises(Refused) as malformed:
        check_request(operation, DECODER, b"unknown=1", headers, b"{")
    assert malformed.value.outcome is Outcome.MALFORMED_JSON
    with pytest.raises(Refused) as invalid:
        check_request(operation, DECODER, b"unknown=1", headers, b'{"number": 0}')
    assert invalid.value.facts["errors"][0]["pointer"] == "/unknown"  # type: ignore[index]


# --- files


@pytest.mark.parametrize(
    ("content_type", "kind"),
    [
        (b"text/csv", "csv"),
        (b" Text/CSV ; charset=utf-8", "csv"),
        (b"text/plain", "text"),
        (b"application/json", None),
        (b"text/html", None),
        (b"", None),
    ],
)
def test_a_media_type_says_what_kind_of_file_a_body_is(content_type: bytes, kind: str | None) -> None:
    assert file_kind({b"content-type": content_type}) == kind


def test_a_body_without_a_media_type_is_no_file() -> None:
    assert file_kind({}) is None


def test_a_request_with_a_file_is_judged_by_its_key_first_and_then_by_its_query() -> None:
    operation = next(one for one in OPERATIONS if one.file_query is not None)
    query, key = check_file_request(operation, b"book_id=b", {b"idempotency-key": b'"k 1"'})
    assert (query.book_id, key) == ("b", "k 1")
    assert check_file_request(operation, b"book_id=b", {})[1] is None
    for headers, outcome in (
        ({b"idempotency-key": b""}, Outcome.INVALID_IDEMPOTENCY_KEY),
        ({}, Outcome.INVALID_REQUEST),
    ):
        with pytest.raises(Refused) as refused:
            check_file_request(operation, b"unknown=1", headers)
        assert refused.value.outcome is outcome


# --- numbers


def test_whole_floats_are_integers_but_in_metadata() -> None:
    body = {"a": 1.0, "b": 1.5, "in": {"c": 2.0}, "metadata": {"d": 1.0}, "e": True, "f": "1.0"}
    whole = whole_numbers(body)
    assert whole == body
    assert [type(value) for value in (whole["a"], whole["b"], whole["in"]["c"], whole["metadata"]["d"])] == [
        int,
        float,
        int,
        float,
    ]
    assert whole_numbers([1.0]) == [1.0]

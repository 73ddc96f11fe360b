"""Every exception of the package has one root, and one class per meaning."""

from __future__ import annotations

import importlib
import inspect
import pkgutil

import hiredis
import pytest

import coupon_svc
from coupon_svc.domain.errors import CouponError, error_location
from coupon_svc.redis import errors


def _exceptions_of_the_package() -> set[type[BaseException]]:
    names = [module.name for module in pkgutil.walk_packages(coupon_svc.__path__, "coupon_svc.")]
    modules = [importlib.import_module(name) for name in names if not name.endswith("__main__")]
    classes = (one for module in modules for _, one in inspect.getmembers(module, inspect.isclass))
    return {one for one in classes if issubclass(one, BaseException) and one.__module__.startswith("coupon_svc.")}


def test_every_exception_of_the_package_is_a_coupon_error() -> None:
    found = _exceptions_of_the_package()

    assert {errors.StoreError, errors.ShardNotUsable} < found
    assert [one for one in found if not issubclass(one, CouponError)] == []


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        ("owner", errors.Fenced),
        ("epoch", errors.EpochNotInForce),
        ("server", errors.WrongServer),
        ("meta", errors.MetaTorn),
        ("position", errors.PositionMismatch),
        ("entry", errors.EventDiffers),
        ("counts", errors.CountsDiffer),
        ("format", errors.FormatDiffers),
        ("type", errors.WrongKeyType),
        ("", errors.ShardNotUsable),
        ("a reason of a later version", errors.ShardNotUsable),
    ],
)
def test_the_reason_in_a_scripts_reply_names_the_exception(reason: str, expected: type[errors.ShardNotUsable]) -> None:
    assert type(errors.shard_not_usable("open_shard", reason)) is expected


def test_a_redis_error_reply_is_an_exception_of_ours() -> None:
    reader = hiredis.Reader(replyError=errors.ReplyError)
    reader.feed(b"-OOM command not allowed\r\n")

    reply = reader.gets()

    assert isinstance(reply, errors.ReplyError)
    assert reply.word == "OOM"


def test_the_location_of_an_error_is_where_it_was_raised_and_nothing_of_its_message() -> None:
    def fails() -> None:
        raise KeyError("SECRET-1")

    with pytest.raises(KeyError) as raised:
        fails()

    assert error_location(raised.value) == f"{__file__}:{fails.__code__.co_firstlineno + 1}"
    assert error_location(KeyError("SECRET-1")) == "nowhere"

"""Settings come from the environment, or are refused by name."""

from __future__ import annotations

import re

import msgspec
import pytest

from coupon_svc.config import Settings, SettingsError, load_settings, variable

URLS = {"COUPON_REDIS_URL": "redis://127.0.0.1:6379", "COUPON_DATABASE_URL": "postgresql://127.0.0.1/coupons"}
NUMBERS = [field.name for field in msgspec.structs.fields(Settings) if field.type is int]


def test_two_addresses_are_enough() -> None:
    settings = load_settings(URLS)
    assert settings == Settings(redis_url=URLS["COUPON_REDIS_URL"], database_url=URLS["COUPON_DATABASE_URL"])


@pytest.mark.parametrize("name", sorted(URLS))
def test_an_address_that_is_missing_is_asked_for_by_name(name: str) -> None:
    with pytest.raises(SettingsError, match=f"{name} is not set"):
        load_settings({**URLS, name: "  "})


@pytest.mark.parametrize("name", NUMBERS)
def test_every_number_is_read_from_its_variable(name: str) -> None:
    changed = {"lease_codes_min": 100, "lease_codes_max": 200_000, "workers": 3, "shards": 5, "drain_ms": 7}
    number = changed.get(name, getattr(load_settings(URLS), name) + 1)
    assert getattr(load_settings({**URLS, variable(name): f" {number} "}), name) == number


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("text", ["-1", str(10**12)])
def test_a_number_out_of_bounds_is_refused_by_name(name: str, text: str) -> None:
    with pytest.raises(SettingsError, match=rf"{variable(name)} must be between \d+ and \d+, not {text}\."):
        load_settings({**URLS, variable(name): text})


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("text", ["x", "1.5", "1e3", "0x10"])
def test_what_is_not_a_number_is_refused_by_name(name: str, text: str) -> None:
    with pytest.raises(SettingsError, match=re.escape(f"{variable(name)} must be a whole number, not '{text}'")):
        load_settings({**URLS, variable(name): text})


def test_the_smallest_lease_is_not_above_the_largest() -> None:
    with pytest.raises(SettingsError, match="COUPON_LEASE_CODES_MIN must not be above COUPON_LEASE_CODES_MAX"):
        load_settings({**URLS, "COUPON_LEASE_CODES_MIN": "9", "COUPON_LEASE_CODES_MAX": "8"})


@pytest.mark.parametrize("url", ["127.0.0.1:6379", "http://h", "redis://h:port", "redis://[::1", "", "postgresql:/h"])
def test_an_address_that_is_none_is_refused_and_not_repeated(url: str) -> None:
    secret = "s3cret"
    with pytest.raises(SettingsError) as refused:
        load_settings({**URLS, "COUPON_REDIS_URL": url.replace("h", f"u:{secret}@h") or "x" + secret})
    assert "COUPON_REDIS_URL" in str(refused.value)
    assert secret not in str(refused.value)


def test_what_is_given_wins_over_the_environment() -> None:
    environ = {**URLS, "COUPON_PORT": "1234"}
    assert load_settings(environ, port=4321, host=None).port == 4321
    assert load_settings(environ, port=None).port == 1234
    with pytest.raises(SettingsError, match="COUPON_PORT"):
        load_settings(environ, port=70_000)

"""compose.yaml, the Dockerfile and docs/deployment.md speak of settings, commands and images that exist."""

from __future__ import annotations

import argparse
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from coupon_svc.cli import _parser
from coupon_svc.config import Settings, load_settings, variable
from coupon_svc.load.command import KEY_VARIABLE

ROOT = Path(__file__).parent.parent
VARIABLES = {variable(field.name) for field in msgspec.structs.fields(Settings)}
KNOWN_KEYS = {
    "build", "command", "depends_on", "environment", "healthcheck", "image", "ports", "restart",
    "stop_grace_period", "volumes",
}  # fmt: skip
LONG_RUNNING = ("valkey", "postgres", "api", "writer")


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())
    return loaded


def commands() -> set[str]:
    """What may stand after `coupon-svc`, `keys create` and the like included."""
    found: set[str] = set()

    def collect(parser: argparse.ArgumentParser, before: str) -> None:
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for name, sub in action.choices.items():
                    found.add(before + name)
                    collect(sub, f"{before}{name} ")

    collect(_parser(), "")
    return found


def documents() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def settings_named_in(text: str) -> set[str]:
    """Settings in a text. COUPON_TEST_* are the tests' own, and no settings."""
    return {name for name in re.findall(r"COUPON_[A-Z_]*[A-Z]", text) if not name.startswith("COUPON_TEST_")}


def test_compose_uses_keys_that_compose_knows(compose: dict[str, Any]) -> None:
    assert {key for key in compose if not key.startswith("x-")} == {"name", "services", "volumes"}
    for name, service in compose["services"].items():
        assert set(service) <= KNOWN_KEYS, name
        assert set(service.get("healthcheck", {})) <= {"test", "interval", "timeout", "retries", "start_period"}
        for volume in service.get("volumes", ()):
            assert volume.partition(":")[0] in compose["volumes"]


def test_every_setting_in_compose_exists_and_is_in_bounds(compose: dict[str, Any]) -> None:
    for name in ("migrate", "api", "writer"):
        environment = compose["services"][name]["environment"]
        assert set(environment) <= VARIABLES, name
        assert all(isinstance(value, str) for value in environment.values()), (
            "numbers in quotes: YAML has its own ideas"
        )
        load_settings(environment)


def test_every_setting_stands_in_compose(compose: dict[str, Any]) -> None:
    assert settings_named_in((ROOT / "compose.yaml").read_text()) >= VARIABLES


def test_every_variable_of_compose_is_commented() -> None:
    lines = (ROOT / "compose.yaml").read_text().splitlines()
    for before, line in pairwise(lines):
        if re.match(r"\s+COUPON_\w+:", line):
            assert before.strip().startswith(("#", "COUPON_")), line


def test_every_setting_is_explained() -> None:
    rows = re.findall(r"^\| `(COUPON_\w+)` \|", (ROOT / "docs" / "deployment.md").read_text(), re.MULTILINE)
    assert sorted(rows) == sorted(VARIABLES)


def test_explained_defaults_are_the_defaults() -> None:
    table = dict(re.findall(r"^\| `(COUPON_\w+)` \| ([^|]+) \|", (ROOT / "docs" / "deployment.md").read_text(), re.M))
    for field in msgspec.structs.fields(Settings):
        told = table[variable(field.name)]
        assert told == ("must be given" if field.required else str(field.default)), field.name


@pytest.mark.parametrize("path", [*documents(), ROOT / "compose.yaml", ROOT / "Dockerfile"], ids=lambda path: path.name)
def test_every_setting_named_exists(path: Path) -> None:
    assert settings_named_in(path.read_text()) <= {*VARIABLES, KEY_VARIABLE}


def test_every_command_in_compose_exists(compose: dict[str, Any]) -> None:
    for name in ("migrate", "api", "writer"):
        assert " ".join(compose["services"][name]["command"]) in commands()
    for command in re.findall(r"docker compose run --rm \w+ (\w+ \w+)", (ROOT / "compose.yaml").read_text()):
        assert command in commands()


@pytest.mark.parametrize("path", documents(), ids=lambda path: path.name)
def test_every_command_in_the_documents_exists(path: Path) -> None:
    """In the text (`coupon-svc …`) and in blocks to be typed, with its action where it has some."""
    known = commands()
    with_actions = {command.partition(" ")[0] for command in known if " " in command}
    for first, second in re.findall(r"(?:`|^    )coupon-svc ([a-z]+)(?: ([a-z]+))?", path.read_text(), re.MULTILINE):
        assert first in known
        assert not second or f"{first} {second}" in known or first not in with_actions, (first, second)


def test_every_command_is_explained() -> None:
    rows = re.findall(r"^\| (`coupon-svc [^|]+) \|", (ROOT / "docs" / "deployment.md").read_text(), re.MULTILINE)
    told = {name for row in rows for name in re.findall(r"`coupon-svc ([a-z ]+)`", row)}
    known = commands()
    assert told == {name for name in known if not any(other.startswith(f"{name} ") for other in known)}


def test_parts_are_given_time_to_end(compose: dict[str, Any]) -> None:
    told = re.search(r"Give them (\d+) s before they are killed", (ROOT / "docs" / "deployment.md").read_text())
    assert told
    for name in ("api", "writer"):
        assert compose["services"][name]["stop_grace_period"] == f"{told[1]}s"


def test_images_are_pinned_by_major_version(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        assert re.fullmatch(r"[a-z/-]+:\d+", service["image"]), name
    bases = re.findall(r"^FROM (\S+)", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert bases
    assert all(re.fullmatch(r"python:3\.\d+-slim", base) for base in bases)


def test_services_that_stay_have_health_checks(compose: dict[str, Any]) -> None:
    assert set(compose["services"]) == {*LONG_RUNNING, "migrate"}
    for name in LONG_RUNNING:
        assert compose["services"][name]["healthcheck"]["test"], name
    assert compose["services"]["migrate"]["restart"] == "no"


def test_who_waits_for_whom_exists_and_can_be_waited_for(compose: dict[str, Any]) -> None:
    services = compose["services"]
    for service in services.values():
        for other, how in service.get("depends_on", {}).items():
            condition = how["condition"]
            assert condition == ("service_completed_successfully" if other == "migrate" else "service_healthy")
            assert other in services


def test_valkey_has_the_settings_and_the_user_that_the_service_wants(compose: dict[str, Any]) -> None:
    from coupon_svc.dev.servers import EmbeddedRedis

    command = " ".join(compose["services"]["valkey"]["command"])
    assert "--maxmemory-policy noeviction" in command
    assert "--appendonly yes" in command
    assert command.endswith(f"resetchannels {EmbeddedRedis.service_rules}")
    assert EmbeddedRedis.service_rules in (ROOT / "docs" / "redis.md").read_text()


def test_the_image_has_what_the_package_needs() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    copied = {name for line in re.findall(r"^COPY (?!--)(.+) \S+$", dockerfile, re.MULTILINE) for name in line.split()}
    assert copied == {"pyproject.toml", "constraints.txt", "README.md", "LICENSE", "lua", "sql", "coupon_svc"}
    let_in = set(re.findall(r"^!(.+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE))
    assert let_in == copied
    assert re.search(r"^USER [1-9]\d*$", dockerfile, re.MULTILINE), "not root, and a number: Kubernetes can check it"

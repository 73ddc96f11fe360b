"""The command line: `coupon-svc <part>`."""

from __future__ import annotations

import argparse
import asyncio
import io
import logging
import math
import socket
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NoReturn

import msgspec
from asyncpg import InvalidCatalogNameError, UndefinedColumnError, UndefinedTableError

from coupon_svc.config import Settings, SettingsError, load_settings
from coupon_svc.domain.api_keys import ApiKey
from coupon_svc.domain.errors import CouponError
from coupon_svc.domain.master_key import new_master_key
from coupon_svc.postgres import epochs, keys, quarantine
from coupon_svc.postgres.computed.ciphers import rotate
from coupon_svc.postgres.database import PATIENT_S, LedgerConnection, open_connection
from coupon_svc.postgres.errors import DatabaseUnfit, LedgerUnavailable
from coupon_svc.postgres.migrations import migrate


class UsageError(CouponError):
    """The command cannot do what it was asked; the message says what to do instead."""


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit status: 0 done, 1 not done, 2 not understood."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without "…" is no reason to fail
    parser = _parser()
    args = parser.parse_args(argv)
    if not hasattr(args, "run"):
        parser.print_help()
        return 0
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)-7s %(name)s: %(message)s")
    try:
        status: int | None = args.run(args)
        return status or 0
    except (SettingsError, UsageError, DatabaseUnfit) as error:
        print(f"coupon-svc: {error}", file=sys.stderr)
    except LedgerUnavailable as error:
        print(f"coupon-svc: Postgres cannot be used ({error}); check COUPON_DATABASE_URL.", file=sys.stderr)
    except InvalidCatalogNameError as error:
        print(f"coupon-svc: {error}; create it, or check COUPON_DATABASE_URL.", file=sys.stderr)
    except (UndefinedTableError, UndefinedColumnError) as error:
        print(f"coupon-svc: {error}; run `coupon-svc migrate` first.", file=sys.stderr)
    except KeyboardInterrupt:
        return 130
    return 1


class _Parser(argparse.ArgumentParser):
    """Says in one line what was wrong, instead of putting it below a page of usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see `{self.prog} --help`\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="coupon-svc", description="Books of coupon codes: assign, lock, redeem.")
    commands = parser.add_subparsers(metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int | None], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        return sub

    dev = command("dev", _dev, "the whole service on this machine, with embedded servers")
    dev.add_argument("--host", default="127.0.0.1")
    dev.add_argument("--port", type=_between(0, 65_535), default=8080, help="0 takes a free one")
    dev.add_argument("--data-dir", type=Path, default=Path(".data"), metavar="DIR")
    dev.add_argument("--workers", type=_between(1, 64), default=1, metavar="N", help="API processes")
    dev.add_argument("--api-key", metavar="KEY", help="make this key: all scopes, tenant dev")

    command("demo", _demo, "the life of a coupon, step by step, on a service of its own")

    _load_options(command("load", _load, "load a service, time it, and audit every answer it gave"))

    api = command("api", _api, "the HTTP API")
    api.add_argument("--host")
    api.add_argument("--port", type=_between(0, 65_535))
    api.add_argument("--workers", type=_between(1, 64), metavar="N")
    api.add_argument("--fd", type=int, help="serve on this listening socket instead")

    command("writer", _writer, "carries events to the ledger; any number may run")
    command("migrate", _migrate, "bring the database to the newest schema")

    verify = command("verify", _verify, "show from Redis and Postgres that the promises hold")
    verify.add_argument("--json", action="store_true", help="the report for machines")
    verify.add_argument(
        "--heads", type=Path, metavar="FILE", help="an earlier report in JSON: history must run through its heads"
    )

    rebuild = command("rebuild", _rebuild, "rebuild Redis from the ledger, while the service runs")
    rebuild.add_argument("--shard", type=int, metavar="N", help="default: all")

    adopt = command("adopt", _adopt, "go on with the ledger as it is, where a shard is stopped")
    adopt.formatter_class = argparse.RawDescriptionHelpFormatter
    adopt.description = _ADOPT_DESCRIPTION
    adopt.add_argument("--shard", type=int, metavar="N", help="default: every shard that is stopped")
    adopt.add_argument(
        "--skip-codes",
        type=_between(0, 10**12),
        default=10**9,
        metavar="N",
        help="numbers that each pattern of computed codes passes over (default: 1000000000), at most an eighth of it: give"
        " more than were generated since the backup",
    )
    adopt.add_argument("--yes", action="store_true", help="do not ask; needed where there is no terminal")

    held_back = command(
        "quarantine", lambda _: held_back.print_help(), "codes that may have been given away unrecorded"
    )
    actions = held_back.add_subparsers(metavar="ACTION")
    sub = actions.add_parser("list", help="show the books that have such codes")
    sub.set_defaults(run=_quarantine_list)
    sub = actions.add_parser("release", help="deal the codes of a book again, though somebody may hold them")
    sub.set_defaults(run=_quarantine_release)
    sub.add_argument("book_id")
    sub.add_argument("--deal-again", action="store_true", help="confirm that a code may go to a second user")

    codes = command("codes", lambda _: codes.print_help(), "upload and export the codes of a book, by the HTTP API")
    actions = codes.add_subparsers(metavar="ACTION")
    sub = actions.add_parser("upload", help="add the codes of a file to a book", description=_UPLOAD_DESCRIPTION)
    sub.formatter_class = argparse.RawDescriptionHelpFormatter
    sub.set_defaults(run=_codes_upload)
    sub.add_argument("file", metavar="FILE", help="`.csv`, or `.txt` with one code per line; or - for standard input")
    sub.add_argument("--book", required=True, metavar="BOOK_ID")
    sub.add_argument("--type", choices=("csv", "text"), help="what the file is, where its name does not say")
    sub.add_argument("--json", action="store_true", help="the report for machines")
    sub = actions.add_parser("export", help="write the codes of a book as CSV", description=_EXPORT_DESCRIPTION)
    sub.formatter_class = argparse.RawDescriptionHelpFormatter
    sub.set_defaults(run=_codes_export)
    sub.add_argument("--book", required=True, metavar="BOOK_ID")
    sub.add_argument(
        "--status", choices=("available", "assigned", "redeemed", "quarantined"), help="only codes of this status"
    )
    sub.add_argument("--output", default="-", metavar="FILE", help="default: -, which is standard output")

    master = command("master-key", lambda _: master.print_help(), "make or change the key of computed codes")
    actions = master.add_subparsers(metavar="ACTION")
    sub = actions.add_parser("new", help="print a fresh key for COUPON_MASTER_KEY")
    sub.set_defaults(run=_master_key_new)
    sub = actions.add_parser("rotate", help="put all patterns' keys under the first key of COUPON_MASTER_KEY")
    sub.set_defaults(run=_master_key_rotate)
    key = command("keys", lambda _: key.print_help(), "make, list and revoke API keys")
    actions = key.add_subparsers(metavar="ACTION")
    for name, run, text in (
        ("create", _keys_create, "make a key and print it, once"),
        ("import", _keys_import, "store a key read from standard input"),
    ):
        sub = actions.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        sub.add_argument("--tenant", required=True, help="made when there is none of this name")
        sub.add_argument("--scopes", default=",".join(keys.SCOPES), help="comma-separated; default: all")
        sub.add_argument("--label", default="", help="for people, e.g. what uses it")
        sub.add_argument("--expires-in-days", type=float, metavar="D", help="default: never")
    sub = actions.add_parser("list", help="show the keys, but not their secrets")
    sub.set_defaults(run=_keys_list)
    sub.add_argument("--tenant")
    sub = actions.add_parser("revoke", help="refuse a key from now on, within seconds everywhere")
    sub.set_defaults(run=_keys_revoke)
    sub.add_argument("key_id", help="as `keys list` shows it")
    return parser


_CODES_ENVIRONMENT = """\
It calls the service at COUPON_URL, e.g. http://127.0.0.1:8080, with the API key in COUPON_KEY. A
progress bar is shown where standard error is a terminal.
"""
_UPLOAD_DESCRIPTION = f"""\
add the codes of a file to a book, and report what became of each row

The file is sent as it is, compressed with gzip or not. Then the service adds the codes in a job,
which this command waits for. Run the same command again after an interruption: the same file for
the same book is the same job, for 24 hours, unless that job failed. The key needs the scope
codes:write.

{_CODES_ENVIRONMENT}
Exit status: 0 every row with a code was added or was there already; 1 rows were rejected as
invalid, or nothing was added; 2 the command was not understood; 130 interrupted.
"""
_EXPORT_DESCRIPTION = f"""\
write the codes of a book as CSV, as of one position

A file is written beside its place and moved there when it is whole; an export that breaks off
starts again. What goes to standard output cannot: look at the exit status. The key needs the scope
codes:read, and books:read for a bar that knows its end.

{_CODES_ENVIRONMENT}
Exit status: 0 it is whole; 1 it is not; 2 the command was not understood; 130 interrupted.
"""


def _load_options(load: argparse.ArgumentParser) -> None:
    from coupon_svc.load.plan import SCENARIOS

    load.formatter_class = argparse.RawDescriptionHelpFormatter
    load.description = _LOAD_DESCRIPTION
    load.epilog = _LOAD_EPILOG
    load.add_argument("--scenario", choices=SCENARIOS, default="flash-sale", metavar="NAME", help="default: flash-sale")
    load.add_argument("--duration", type=_number(0.1, 86_400), metavar="SECONDS", help="default: 10")
    load.add_argument(
        "--rate", type=_number(0.1, 1_000_000), metavar="N", help="callers arriving a second, whatever the service does"
    )
    load.add_argument(
        "--connections",
        type=_between(1, 10_000),
        metavar="N",
        help="without --rate: callers at a time, 64 unless given; with it: connections, 256 unless given",
    )
    load.add_argument(
        "--ack", choices=("ledger", "redis", "both"), default="ledger", help="of the books; default: ledger"
    )
    load.add_argument("--books", type=_between(1, 1_000), metavar="N", help="default: as the scenario has it, 1 to 20")
    load.add_argument(
        "--codes", type=_between(1, 10_000_000), metavar="N", help="of each book; default: 120,000 in all"
    )
    load.add_argument("--users", type=Path, metavar="FILE", help="campaign: the users, one id a line")
    load.add_argument(
        "--seed", type=_between(0, 2**63), default=1, metavar="N", help="of the callers' choices; default: 1"
    )
    load.add_argument(
        "--url", metavar="URL", help="a running service, as http://127.0.0.1:8080; default: one of its own"
    )
    load.add_argument("--key", metavar="KEY", help="for --url: an API key with all scopes; or set COUPON_LOAD_KEY")
    load.add_argument(
        "--audit-stores",
        action="store_true",
        help="for --url: audit Redis and the ledger, too; needs COUPON_REDIS_URL and COUPON_DATABASE_URL, and for computed"
        " codes COUPON_MASTER_KEY",
    )
    load.add_argument("--workers", type=_between(1, 64), metavar="N", help="API processes of the load's own service")
    load.add_argument("--json", type=Path, metavar="FILE", help="write the report for machines")
    load.add_argument(
        "--html", type=Path, metavar="FILE", help="write the report with charts; opens without the internet"
    )


_ADOPT_DESCRIPTION = """\
go on with the ledger as it is, where a shard is stopped

A shard is stopped when Redis and Postgres contradict each other: Postgres was restored from a
backup, somebody changed its rows, or somebody wrote to the stream of events. Requests for the
shard get 503 `recovering` until you decide. First find out what happened: the writer's log and
`coupon-svc verify` say what does not fit. If there is a newer state of Postgres, restore that
instead, because this command makes the present one final.

The command shows what either store knows of each stopped shard, and asks. Then the writers
rebuild Redis from the ledger, in an epoch above all that either store knows. They need no
restart. Where only the last hash of a shard's chain was changed, it is set right, and nothing
is lost.

What is lost otherwise: everything that Redis knew and the ledger does not. Codes that Redis
shows as somebody's go into quarantine, so that nobody else is given them. Those whose event is
still in the stream go back to their holders at once; others do so by their receipt, where there
is one. `coupon-svc quarantine list` shows what is left. Redemptions that only the lost ledger
had may be made again. Books and codes that it alone had are gone: the same codes, uploaded
again, are new."""

_LOAD_DESCRIPTION = """\
load a service, time it, and audit every answer it gave

scenarios
  flash-sale  everybody wants a code of one book at once, some of them twice
  checkout    assign, lock, redeem; some leave, some hold their lock and leave, some pay too late, some click twice
  retries     answers get lost: the same Idempotency-Key again and again, at once and in turn
  mixed       many books, a few of them much liked; assigns, redeems and reads
  campaign    one code for everybody on a list (--users)"""

_LOAD_EPILOG = """\
It makes books of its own and closes them at the end. Ctrl-C ends it early; what was answered is audited all the same.

exit status: 0 the promises held, 1 one is broken, 2 it could not be run, or not all could be audited

  coupon-svc load                                       a flash sale for ten seconds, on a service of its own
  coupon-svc load --scenario checkout --rate 300        300 callers a second, however long they have to wait
  coupon-svc load --url http://127.0.0.1:8080 --key K   a running one
  coupon-svc load --html load.html --json load.json     with reports"""


def _number(low: float, high: float) -> Callable[[str], float]:
    """What argparse needs to take a number within bounds."""

    def parse(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not low <= number <= high:
            raise argparse.ArgumentTypeError(f"give a number between {low:g} and {high:,.10g}, not {text!r}")
        return number

    return parse


def _between(low: int, high: int) -> Callable[[str], int]:
    """What argparse needs to take a whole number within bounds."""

    def parse(text: str) -> int:
        if not text.isascii() or not text.isdigit() or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"give a whole number between {low} and {high}, not {text!r}")
        return int(text)

    return parse


# --- the parts


def _dev(args: argparse.Namespace) -> int:
    from coupon_svc.dev.supervisor import run_dev  # only here: it needs packages that a server does not

    # What its parts would die of, each with a log of its own, is better said here.
    load_settings(**_no_redis(), database_url="postgresql://unused")
    if args.api_key is not None:
        _check_key(args.api_key, "--api-key")
    return run_dev(args.host, args.port, args.data_dir, args.workers, args.api_key)


def _demo(args: argparse.Namespace) -> int:
    from coupon_svc.dev.demo import run_demo

    return run_demo()


def _load(args: argparse.Namespace) -> int:
    from coupon_svc.load.command import run_load  # only here: it needs packages that a server does not
    from coupon_svc.load.plan import LoadError, make_plan

    try:
        plan = make_plan(
            scenario=args.scenario,
            url=args.url,
            rate=args.rate,
            connections=args.connections,
            duration_s=args.duration,
            ack=args.ack,
            books=args.books,
            codes=args.codes,
            seed=args.seed,
            workers=args.workers,
            users=args.users,
            audit_stores=args.audit_stores,
        )
    except LoadError as error:
        print(f"coupon-svc load: {error}", file=sys.stderr)
        return 2
    return run_load(plan, args.key, args.json, args.html)


def _api(args: argparse.Namespace) -> None:
    # The parts are imported where they are run: what a writer never uses would double the time it takes to start.
    import uvicorn

    from coupon_svc.app import make_api
    from coupon_svc.http.server import SERVER_SETTINGS, CouponProtocol

    settings = load_settings(host=args.host, port=args.port, workers=args.workers)
    common: dict[str, Any] = {**SERVER_SETTINGS, "http": CouponProtocol}
    if args.fd is not None:
        server = uvicorn.Server(uvicorn.Config(lambda: make_api(settings), factory=True, **common))
        server.run(sockets=[socket.socket(fileno=args.fd)])
    elif settings.workers == 1:
        uvicorn.run(lambda: make_api(settings), factory=True, host=settings.host, port=settings.port, **common)
    else:
        uvicorn.run(
            "coupon_svc.app:make_api",
            factory=True,
            host=settings.host,
            port=settings.port,
            workers=settings.workers,
            **common,
        )


def _writer(args: argparse.Namespace) -> None:
    from coupon_svc.writer.writer import run_writer

    run_writer(load_settings())


def _migrate(args: argparse.Namespace) -> None:
    settings = load_settings(**_no_redis())
    applied = _with_database(settings, lambda connection: migrate(connection, settings.shards))
    print("\n".join(f"applied {name}" for name in applied) or "the schema is the newest already")


def _verify(args: argparse.Namespace) -> int:
    from coupon_svc.ops.verify import run_verify

    settings = load_settings()
    try:
        stored = _with_database(settings, lambda connection: connection.fetchval("SELECT shards FROM settings"))
    except LedgerUnavailable as error:
        print(f"coupon-svc verify: Postgres cannot be read ({error}); nothing is shown.", file=sys.stderr)
        return 2
    return run_verify(msgspec.structs.replace(settings, shards=stored), as_json=args.json, heads=args.heads)


def _rebuild(args: argparse.Namespace) -> None:
    shards = None if args.shard is None else [args.shard]
    number = _with_database(
        load_settings(**_no_redis()), lambda connection: epochs.want_recovery(connection, shards, rebuild=True)
    )
    if not number:
        which = "no shard" if args.shard is None else f"no shard {args.shard}"
        raise UsageError(f"there is {which} to rebuild; one that is stopped is not rebuilt, see docs/operations.md.")
    print(f"{number} shards are being rebuilt by their writers; `coupon-svc verify` shows when it is done")


def _codes_upload(args: argparse.Namespace) -> int:
    from coupon_svc.ops.codes import Upload, upload_codes

    return _with_the_api(lambda: upload_codes(Upload(args.file, args.book, args.type), as_json=args.json))


def _codes_export(args: argparse.Namespace) -> int:
    from coupon_svc.ops.codes import Export, export_codes

    return _with_the_api(lambda: export_codes(Export(args.output, args.book, args.status)))


def _with_the_api(work: Callable[[], int]) -> int:
    from coupon_svc.ops.codes import CodesError, Interrupted

    try:
        return work()
    except CodesError as error:
        raise UsageError(str(error)) from None
    except Interrupted as error:
        print(f"\ncoupon-svc: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("\ncoupon-svc: interrupted; nothing was done.", file=sys.stderr)
    return 130


def _adopt(args: argparse.Namespace) -> None:
    from coupon_svc.ops.adopt import AdoptError, Stopped, adopt

    if not args.yes and not sys.stdin.isatty():
        raise UsageError("there is no terminal to ask on: say --yes, and read `coupon-svc adopt --help` before.")

    def confirm(found: list[Stopped]) -> bool:
        print("\n".join(map(str, found)))
        what = "this shard" if len(found) == 1 else f"these {len(found)} shards"
        return args.yes or input(f"Go on with the ledger as it is, for {what}? [y/N] ").strip().lower() in ("y", "yes")

    try:
        adopted = asyncio.run(adopt(load_settings(), args.shard, confirm, args.skip_codes))
    except AdoptError as error:
        raise UsageError(str(error)) from None
    if not adopted:
        raise UsageError("nothing was changed.")
    for shard, codes in adopted:
        print(
            f"shard {shard:02d} is being recovered by its writer; {codes} codes that somebody has went into quarantine"
        )


def _quarantine_list(args: argparse.Namespace) -> None:
    for book in _with_database(load_settings(**_no_redis()), quarantine.quarantined_books):
        print(f"{book.book_id}  {book.codes} codes since {book.since:%Y-%m-%d %H:%M}Z  {book.name}")


def _quarantine_release(args: argparse.Namespace) -> None:
    if not args.deal_again:
        raise UsageError(
            "somebody may hold these codes: who has a receipt gets the record back with it. To deal them to others all the"
            " same, say --deal-again; the ledger records it."
        )
    number = _with_database(
        load_settings(**_no_redis()), lambda connection: quarantine.deal_again(connection, args.book_id)
    )
    if not number:
        raise UsageError(f"the book {args.book_id} has no codes in quarantine; see `coupon-svc quarantine list`.")
    print(f"{number} codes of {args.book_id} are dealt again")


# --- keys


def _master_key_new(_: argparse.Namespace) -> None:
    print(new_master_key())


def _master_key_rotate(_: argparse.Namespace) -> None:
    settings = load_settings(**_no_redis())
    if not settings.master_key:
        raise UsageError("COUPON_MASTER_KEY is not set: give the new key, and after a comma the old one.")
    moved = _with_database(settings, lambda connection: rotate(connection, settings.master_key))
    print(f"{moved} patterns' keys are under the key {settings.master_key.first} now. No code has changed.")


def _keys_create(args: argparse.Namespace) -> None:
    key = keys.new_key()
    key_id = _store_key(args, key)
    print(f"{key_id} of tenant {args.tenant}. The key is shown this once:", file=sys.stderr)
    print(key)


def _keys_import(args: argparse.Namespace) -> None:
    key = sys.stdin.readline().strip()
    _check_key(key, "standard input")
    print(_store_key(args, key))


def _check_key(key: str, source: str) -> None:
    if not key.isascii() or not key.isprintable() or not 1 <= len(key) <= 200 or " " in key:
        raise UsageError(f"{source} gives no usable key: a key is 1..200 printable ASCII characters without spaces.")


def _store_key(args: argparse.Namespace, key: str) -> str:
    scopes = tuple(scope.strip() for scope in args.scopes.split(",") if scope.strip())
    unknown = set(scopes) - set(keys.SCOPES)
    if unknown or not scopes:
        raise UsageError(f"--scopes takes one or more of {', '.join(keys.SCOPES)}, separated by commas.")
    if not 1 <= len(args.tenant) <= 100 or not args.tenant.isprintable():
        raise UsageError("a tenant's name has 1..100 printable characters.")
    if len(args.label) > 200 or not args.label.isprintable():
        raise UsageError("a label has at most 200 printable characters.")
    expires_at = None
    if args.expires_in_days is not None:
        if not 0 < args.expires_in_days <= 36_500:
            raise UsageError("--expires-in-days must be between 0 and 36500.")
        expires_at = datetime.now(UTC) + timedelta(days=args.expires_in_days)

    async def store(connection: LedgerConnection) -> tuple[str, ApiKey | None]:
        try:
            async with connection.transaction():  # or a refused key would leave its tenant behind
                key_id = await keys.create_key(connection, args.tenant, key, scopes, args.label, expires_at)
        except ValueError as error:
            raise UsageError(f"{error}; nothing was changed.") from None
        return key_id, await keys.find_key(connection, keys.hash_key(key))

    key_id, stored = _with_database(load_settings(**_no_redis()), store)
    if stored.revoked or stored.scopes != set(scopes):
        how = "is revoked" if stored.revoked else f"has the scopes {','.join(sorted(stored.scopes))}"
        raise UsageError(f"this key was stored before, as {key_id}, and {how}; nothing was changed.")
    return str(key_id)


def _keys_list(args: argparse.Namespace) -> None:
    rows = _with_database(load_settings(**_no_redis()), lambda connection: keys.list_keys(connection, args.tenant))
    if not rows:
        print("there are none", file=sys.stderr)
    for row in rows:
        ends = "revoked" if row.revoked else "never expires"
        if row.expires_at_ms is not None and not row.revoked:
            ends = f"expires {datetime.fromtimestamp(row.expires_at_ms / 1000, UTC):%Y-%m-%d %H:%M}Z"
        print(f"{row.key_id}  {row.tenant}  {ends}  {','.join(sorted(row.scopes))}  {row.label}".rstrip())


def _keys_revoke(args: argparse.Namespace) -> None:
    if not _with_database(load_settings(**_no_redis()), lambda connection: keys.revoke_key(connection, args.key_id)):
        raise UsageError(f"there is no key {args.key_id}; see `coupon-svc keys list`.")
    print(f"{args.key_id} is revoked")


def _no_redis() -> dict[str, Any]:
    """For commands that speak to Postgres alone, and so must not ask for COUPON_REDIS_URL."""
    return {"redis_url": "redis://unused"}


def _with_database(settings: Settings, work: Callable[[LedgerConnection], Any]) -> Any:
    async def run() -> Any:
        try:
            connection = await open_connection(settings.database_url, "coupon-cli", PATIENT_S)
        except ValueError:
            raise UsageError("COUPON_DATABASE_URL is not an address such as postgresql://user@host:5432/db.") from None
        try:
            return await work(connection)
        finally:
            await connection.close()

    return asyncio.run(run())

"""`python -m bench`: the table of docs/benchmarks.md, or one of the other figures."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from bench import document
from bench.echo import serve_echo
from bench.figures import BenchError, Figure, Results
from bench.flat import bench_flat, show_flat
from bench.growth import CODES_A_BOOK_DEFAULT_MAX, GrowthPlan, bench_growth
from bench.memory import measure_memory, show_memory
from bench.over_http import HttpPlan, bench_http
from bench.postgres_only import POOL_SIZE, serve_postgres_only
from bench.rebuild import bench_rebuild
from bench.run import describe_run
from bench.snapshot import bench_snapshot, show_snapshot
from bench.toll import TollPlan, bench_toll, counts, expectations, toll_figures
from bench.turns import CONNECTIONS
from bench.uploads import bench_upload, show_upload
from bench.versions import bench_versions
from coupon_svc.dev.servers import ServerError
from coupon_svc.dev.throwaway import ThrowawayError, signals_raise

QUICK_HTTP = HttpPlan(rounds=2, seconds=1.5, tail_rounds=1, tail_seconds=3.0)
QUICK_TOLL = TollPlan(rounds=3)
SERVED: dict[str, Callable[[int], None]] = {"echo": serve_echo, "postgres-only": serve_postgres_only}


def main() -> int:
    """Measure what is asked for. Returns 0, or 1 when something could not be measured, or not rightly."""
    args = _arguments()
    if args.serve is not None:
        SERVED[args.serve](args.fd)
        return 0
    try:
        with signals_raise():
            return _measure(args)
    except (BenchError, ServerError, ThrowawayError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("bench: ended early; nothing was written", file=sys.stderr)
        return 130


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--growth", action="store_true", help="how assigns/s change with processes, connections, books, codes"
    )
    what.add_argument("--toll", action="store_true", help="what each process pays for an assign, alone")
    what.add_argument("--memory", action="store_true", help="bytes a code takes in Redis")
    what.add_argument("--rebuild", action="store_true", help="how long Redis takes to be rebuilt")
    what.add_argument("--upload", action="store_true", help="how long a file of codes takes, beside COPY")
    what.add_argument(
        "--flat", action="store_true", help="whether calls take as long in a book of --codes as in one of 1,000"
    )
    what.add_argument("--snapshot", action="store_true", help="what a snapshot of --minutes does to commits")
    what.add_argument(
        "--against", type=Path, metavar="DIR", help="what this checkout does and takes beside another one"
    )
    what.add_argument("--render", action="store_true", help="write benchmarks.md anew from benchmarks.json")
    what.add_argument("--serve", choices=SERVED, help=argparse.SUPPRESS)
    parser.add_argument(
        "--quick", action="store_true", help="about two minutes, noisier; printed, and written only with --output"
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="where benchmarks.md goes; default: docs")
    parser.add_argument("--rounds", type=int, metavar="N", help="of the lines over HTTP, and of --against")
    parser.add_argument("--connections", type=int, default=64, metavar="N", help="callers at a time, of --against")
    parser.add_argument(
        "--codes", type=int, default=1_000_000, metavar="N", help="of --memory, --rebuild, --upload and --flat"
    )
    parser.add_argument("--minutes", type=int, default=10, metavar="N", help="of --snapshot")
    parser.add_argument(
        "--codes-max", type=int, default=CODES_A_BOOK_DEFAULT_MAX, metavar="N", help="of --growth: the largest book"
    )
    parser.add_argument(
        "--padding", type=int, default=0, metavar="N", help="of --upload: bytes of another column beside each code"
    )
    parser.add_argument("--fd", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def _measure(args: argparse.Namespace) -> int:
    if args.memory:
        show_memory(asyncio.run(measure_memory(args.codes)))
        return 0
    if args.upload:
        show_upload(bench_upload(args.codes, args.padding))
        return 0
    if args.flat:
        show_flat(args.codes, bench_flat(args.codes, _narrator()))
        return 0
    if args.snapshot:
        show_snapshot(bench_snapshot(args.minutes, _narrator()))
        return 0
    if args.against is not None:
        figures = bench_versions(args.against.resolve(), args.rounds or 11, args.connections, _narrator())
        for figure in figures:
            print(f"{figure.what:45} {figure.spread()}")
        return 0
    if args.rebuild:
        bench_rebuild(args.codes)
        return 0
    if args.toll:
        return _toll(args)
    folder: Path | None = args.output or (None if args.quick else Path("docs"))
    if folder is not None and args.output is None and not folder.is_dir():
        raise BenchError("there is no folder docs here; say with --output where the document is to go")
    if args.render:
        document.write_results(folder or Path("docs"), document.read_results(folder or Path("docs")))
        return 0
    return _growth(args, folder) if args.growth else _table(args, folder)


def _table(args: argparse.Namespace, folder: Path | None) -> int:
    say = _narrator()
    say("starting the servers")
    plan, toll_plan = (QUICK_HTTP, QUICK_TOLL) if args.quick else (HttpPlan(), TollPlan())
    if args.rounds:
        plan = HttpPlan(args.rounds, plan.seconds, plan.tail_rounds, plan.tail_seconds)
        toll_plan = TollPlan(args.rounds)
    tolls = bench_toll(toll_plan, say)
    figures, load_shares, pairs = bench_http(plan, say)
    say("bytes of a coupon")
    settings = {
        "the toll": f"{toll_plan.connections} connections, {toll_plan.rounds} rounds of 4 turns of {toll_plan.seconds:g} s,"
        " each beside one of the echo",
        "the other lines": f"{CONNECTIONS} connections, {plan.rounds} rounds of 6 turns of {plan.seconds:g} s",
        "service": f"16 shards, 1 API process, 1 writer; Postgres-only: 1 process, a pool of {POOL_SIZE}",
    }
    memory = asyncio.run(measure_memory(100_000))
    results = document.read_results(folder) if folder is not None else Results()
    results.expected, results.toll, results.counts = expectations(tolls), toll_figures(tolls), counts(tolls)
    results.pairs = pairs
    results.sizes = {"coupon": memory.assigned, "record": memory.record} | {
        f"ledger {table}": size for table, size in tolls.ledger_bytes.items()
    }
    results.table, results.table_run = figures, describe_run(_command(), settings, load_shares)
    for part in (
        document.render_expected(results),
        document.render_table(results.toll),
        document.render_table(figures),
    ):
        print(f"\n{part}")
    shares = results.table_run.load_share
    print(f"\nthe load took {shares[0]:.2f} of a core, {shares[1]:.2f} in its highest turn")
    if folder is not None:
        document.write_results(folder, results)
        print(f"written to {folder / 'benchmarks.md'}")
    if not args.quick:
        print()
        show_flat(args.codes, bench_flat(args.codes, say))
    return _status(figures)


def _toll(args: argparse.Namespace) -> int:
    plan = TollPlan(rounds=args.rounds or (QUICK_TOLL if args.quick else TollPlan()).rounds)
    tolls = bench_toll(plan, _narrator())
    for figure in toll_figures(tolls):
        print(f"{figure.what:45} {figure.spread():45} goal {figure.goal:<5} {figure.note}")
    print("\n".join(counts(tolls)))
    return 0


def _growth(args: argparse.Namespace, folder: Path | None) -> int:
    sizes = tuple(10**power for power in range(3, 9) if 10**power <= args.codes_max)
    plan = GrowthPlan(codes=sizes)
    if args.quick:
        plan = GrowthPlan(rounds=1, seconds=1.0, codes=sizes[:3])
    tables = bench_growth(plan, _narrator())
    results = document.read_results(folder) if folder is not None else Results()
    results.growth = tables
    results.growth_run = describe_run(_command(), {"load": f"{plan.rounds} rounds of {plan.seconds:g} s"}, [])
    print(document.render_growth(tables))
    if folder is not None:
        document.write_results(folder, results)
        print(f"written to {folder / 'benchmarks.md'}")
    return 0


def _status(figures: list[Figure]) -> int:
    failed = [figure for figure in figures if figure.failed]
    for figure in failed:
        print(f"bench: {figure.what}: {figure.failed}", file=sys.stderr)
    return 1 if failed else 0


def _command() -> str:
    return " ".join(["python -m bench", *sys.argv[1:]])


def _narrator() -> Callable[[str], None]:
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - began:5.0f} s  {text}", flush=True)

    return say


if __name__ == "__main__":
    status = main()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.exit(status)

"""`python -m benchmarks [W1 ... D1 ... M1 C1 ... P1 S1 ... S6] [--repeat N] [--json FILE] [--quick]`; see README.md."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import signal
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console

from benchmarks.comparison import rewrite_comparison
from benchmarks.measure import FEDGE, Case, Options, Side, as_json, run_case
from benchmarks.report import rewrite_readme, show

HERE = Path(__file__).resolve().parent
WORKLOADS = (
    "W1",
    "W2",
    "W3",
    "D1",
    "D2",
    "D3",
    "F1",
    "M1",
    "C1",
    "C2",
    "C3",
    "C4",
    "C5",
    "C6",
    "P1",
    "S1",
    "S2",
    "S3",
    "S4",
    "S5",
    "S6",
)
_REPEAT, _REPEAT_QUICK = 5, 2


def main() -> int:
    given = _arguments()
    console = Console()
    results = given.json or HERE / "results" / ("quick.json" if given.quick else "last.json")
    if given.readme:
        try:
            rewrite_readme(HERE / "README.md", results)
            rewrite_comparison(HERE.parent / "docs/explanation/compared-with-flower.md", results)
        except ValueError as error:
            console.print(f"error: {error}", style="red", markup=False)
            return 2
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that contexts close and processes end
    found = json.loads(results.read_text()) if results.exists() else {"cases": {}}
    crashed = False
    with TemporaryDirectory(prefix="fedge-benchmarks-") as scratch:
        options = Options(Path(scratch), quick=given.quick, large=given.large)
        for workload in given.workloads or WORKLOADS:
            for case in importlib.import_module(f"benchmarks.{workload.lower()}").cases(options):
                measured = _measure(case, given, console)
                show(case.name, measured, console)
                crashed |= any("crash" in side for side in measured["sides"].values())
                found["cases"][case.name] = measured
                results.parent.mkdir(parents=True, exist_ok=True)
                results.write_text(json.dumps(found, indent=1) + "\n")
    console.print(f"written to {results}", highlight=False)
    return 1 if crashed else 0


def _measure(case: Case, given: argparse.Namespace, console: Console) -> dict[str, Any]:
    load = os.getloadavg()[0]
    repeat = given.repeat or (_REPEAT_QUICK if given.quick else _REPEAT)
    sides = tuple(side for side in case.sides if _wanted(side, given))
    chosen = Case(case.name, case.title, sides, case.goals, case.compares)
    with console.status(f"{case.name}: starting") as status:
        outcome = run_case(chosen, repeat=repeat, say=status.update)
    return as_json(chosen, outcome, repeat=repeat) | {
        "quick": given.quick,
        "load_before": load,
        "date": datetime.now(UTC).date().isoformat(),
        "machine": _machine(),
    }


def _wanted(side: Side, given: argparse.Namespace) -> bool:
    return not (given.floors and side.name == FEDGE)


def _machine() -> str:
    parts = [f"{name} {version(name)}" for name in ("torch", "grpcio", "numpy")]
    return ", ".join(
        [f"{os.cpu_count()}-core {platform.machine()}", f"Python {platform.python_version()}", *parts]
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure fedge against the floor of each workload, interleaved, in one run.",
    )
    parser.add_argument(
        "workloads", nargs="*", metavar="WORKLOAD", help=", ".join(WORKLOADS) + "; all by default"
    )
    parser.add_argument(
        "--repeat", type=int, help=f"samples of each side ({_REPEAT}; {_REPEAT_QUICK} if quick)"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="where results go, case by case (benchmarks/results)"
    )
    parser.add_argument("--quick", action="store_true", help="few rounds: to see that it works, not to quote")
    parser.add_argument("--large", action="store_true", help="D2 also with 400 MB, C3 with 8 MB")
    parser.add_argument("--floors", action="store_true", help="leave fedge out")
    parser.add_argument(
        "--readme",
        action="store_true",
        help="only rewrite the tables in README.md and in docs, from the results",
    )
    given = parser.parse_args()
    given.workloads = [name.upper() for name in given.workloads]
    unknown = set(given.workloads) - set(WORKLOADS)
    if unknown:
        parser.error(f"expected workloads of {', '.join(WORKLOADS)}, found {', '.join(sorted(unknown))}")
    if given.repeat is not None and given.repeat < 1:
        parser.error(f"--repeat: expected at least 1, found {given.repeat}")
    return given


if __name__ == "__main__":
    sys.exit(main())

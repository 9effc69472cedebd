"""F1: an unmodified Flower app on fedge's coordinator, and on Flower's own SuperLink. The floor is a bare exchange.

The app sends an array to all and takes the mean of what comes back; it measures its own rounds.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks import fedge_side
from benchmarks.exchanges import exchange
from benchmarks.measure import (
    FEDGE,
    FLOOR,
    Case,
    Goal,
    Options,
    Outcome,
    Sample,
    Side,
    Spread,
    Take,
    forget_peak,
    memory,
)
from benchmarks.processes import ROOT, run_text
from benchmarks.superlink import superlink

APP = ROOT / "tests/flower/apps/large"
FLOWER = "Flower's SuperLink"

_SMALL, _LARGE = 10_000, 100_000_000
_DEADLINE_S = 900.0


def cases(options: Options) -> list[Case]:
    return [
        _case("F1-2", 2, _SMALL, goal=0.01, options=options),
        _case("F1-10", 10, _SMALL, goal=0.01, options=options),
        _case("F1-100MB", 2, _LARGE, goal=0.2, options=options),
    ]


def _case(name: str, clients: int, payload: int, *, goal: float, options: Options) -> Case:
    few = 3 if options.quick else 6
    many = few if payload == _LARGE else 30 if options.quick else 200

    def floor() -> Sample:
        return exchange(clients=clients, rounds=many, payload=payload, options=options)

    @contextmanager
    def ours() -> Iterator[Take]:
        tables = {"flower": {"apps": {"fedge-tests/large": str(APP)}}}
        with fedge_side.deployment(
            "f1", clients=clients, options=options, tables=lambda index: _with_node(tables, index)
        ) as deployed:
            report = deployed.folder / "report.json"
            yield lambda: _sample(_by_fedge(deployed, clients, _settings(payload, many, report), report))

    @contextmanager
    def theirs() -> Iterator[Take]:
        with superlink(clients=clients, options=options) as running:
            report = running.folder / "report.json"
            yield lambda: _sample(
                running.run(APP, _settings(payload, few, report), report, deadline_s=_DEADLINE_S)
            )

    def ratio(found: Outcome) -> Spread | None:
        return found.ratio(FLOWER)

    return Case(
        name,
        f"a Flower app, {clients} clients, {payload // 1000} kB",
        (Side.of(FLOOR, floor), Side(FEDGE, ours), Side(FLOWER, theirs)),
        (Goal("a round, of Flower's", goal, ratio),),
    )


def _settings(payload: int, rounds: int, report: Path) -> dict[str, Any]:
    return {"elements": payload // 4, "rounds": rounds, "report.path": str(report)}


def _with_node(tables: dict[str, Any], index: int) -> dict[str, Any]:
    return {"flower": tables["flower"] | {"nodes": [{"partition-id": index}]}}


def _by_fedge(
    deployed: fedge_side.Deployment, clients: int, settings: dict[str, Any], report: Path
) -> dict[str, Any]:
    pairs = " ".join(f"{key}={json.dumps(value)}" for key, value in settings.items())
    arguments, admin = (
        [fedge_side.FEDGE, "flower", "run", str(APP)],
        str(deployed.folder / "server/admin.toml"),
    )
    pid = deployed.server.pid
    forget_peak(pid)
    before, began = memory(pid, "VmRSS"), time.monotonic()
    run_text(
        [*arguments, "--admin", admin, "--nodes", str(clients), "--run-config", pairs],
        log=deployed.folder / "app.log",
        deadline_s=_DEADLINE_S,
    )
    told: dict[str, Any] = json.loads(report.read_text())
    return told | {
        "wall_seconds": time.monotonic() - began,
        "server_growth_bytes": memory(pid, "VmHWM") - before,
    }


def _sample(told: dict[str, Any]) -> Sample:
    """Seconds a round without the first two, in which everybody loads the app and makes room."""
    rounds = sorted(told["seconds"][2:] or told["seconds"])
    return Sample(
        {
            "seconds": rounds[len(rounds) // 2],
            "first_seconds": told["seconds"][0],
            "outside_rounds_seconds": told["wall_seconds"] - sum(told["seconds"]),
            "server_growth_bytes": float(told["server_growth_bytes"]),
        },
        rounds=len(rounds),
        series={"seconds": told["seconds"]},
    )

"""A run with each combination of some settings, several at a time, each in a process of its own.

A run that fails, or takes its process with it, leaves the others as they are. `python -m fedge_sim.sweep` is one of
these processes: it is told what to do on its standard input.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from fedge.errors import ConfigError, FedgeError
from fedge.files import write_atomic
from fedge.parallel import processors
from fedge.python import python
from fedge.run import RunConfig
from fedge_sim.folders import prepare_folder

MAX_RUNS: Final = 10_000
_SAID: Final = 2000
"""Characters of what a process that failed has said."""

Grid = Mapping[str, Sequence[Any]]
"""By dotted key of a run.toml: the values that it is to have."""


@dataclass(frozen=True)
class Swept:
    """One run of a sweep: what it was set to, where its results are, and their summary; or why there are none."""

    settings: Mapping[str, Any]
    folder: Path
    summary: Mapping[str, Any]
    error: str = ""

    def row(self) -> dict[str, Any]:
        """Its settings, how it ended, and its last metrics: a row of a table."""
        metrics = self.summary.get("metrics", {})
        status = self.summary.get("status", "failed")
        reason = self.error or self.summary.get("reason", "")
        return {**self.settings, "status": status, "reason": reason, **metrics}


def parse_grid(texts: Sequence[str]) -> dict[str, list[Any]]:
    """`KEY=[VALUE, ...]`, each with values as TOML has them.

    Raises:
        ConfigError: one is no such thing.
    """
    grid: dict[str, list[Any]] = {}
    for text in texts:
        key, sign, values = text.partition("=")
        try:
            found = tomllib.loads(f"values = {values}")["values"]
        except tomllib.TOMLDecodeError:
            found = None
        if not key.strip() or not sign or not isinstance(found, list) or not found:
            raise ConfigError(
                f"--grid: expected KEY=[VALUE, ...], as 'work.learning_rate=[0.01, 0.1]', found {text!r}"
            )
        if key.strip() in grid:
            raise ConfigError(f"--grid: expected each key once, found {key.strip()!r} twice")
        grid[key.strip()] = found
    return grid


def sweep(
    path: Path | str,
    grid: Grid,
    *,
    out: Path | str,
    engine: str = "auto",
    processes: int | None = None,
    device: str = "cpu",
    told: Callable[[Swept], None] = lambda _: None,
) -> list[Swept]:
    """Simulate the run.toml at `path` with each combination of the grid's values; results are in folders of `out`, and
    a table of all of them in `out`/sweep.csv.

    `processes` at a time, as many as there are processors unless given, each with one thread. `told` is called with
    each run that is over, in the grid's order: once those before it are over, too. A sweep that is interrupted has a
    table of those that `told` knows.

    Raises:
        ConfigError: the file, or one of the combinations, is wrong: before anything begins.
    """
    path, out = Path(path).resolve(), Path(out)
    runs = list(combinations(path, grid))
    if device != "cpu":  # else this process can do without torch
        from fedge_sim.engines.accelerator import accelerator

        accelerator(device)
    if processes is not None and processes < 1:
        raise ConfigError(f"processes: expected at least 1, found {processes}")
    prepare_folder(out)

    def one(each: tuple[dict[str, Any], dict[str, Any], str]) -> Swept:
        settings, table, name = each
        return _in_a_process(settings, table, out / name, beside=path.parent, engine=engine, device=device)

    swept: list[Swept] = []
    pool = ThreadPoolExecutor(processes or processors(), thread_name_prefix="fedge-sweep")
    try:
        for done in pool.map(one, runs):
            swept.append(done)
            told(done)
    finally:
        pool.shutdown(cancel_futures=True)
        write_atomic(out / "sweep.csv", _as_csv([each.row() for each in swept]))
    return swept


def combinations(path: Path, grid: Grid) -> Iterator[tuple[dict[str, Any], dict[str, Any], str]]:
    """Settings, the run's table with them, and a folder's name, for each combination; all are checked.

    Raises:
        ConfigError: one is wrong, or they are too many.
    """
    count = 1
    for values in grid.values():
        count *= len(values)
    if not 1 <= count <= MAX_RUNS:
        raise ConfigError(f"--grid: expected 1 to {MAX_RUNS} combinations, found {count}")
    base = RunConfig.load(path).model_dump(mode="json", exclude_unset=True)
    for number, values in enumerate(itertools.product(*grid.values())):
        settings = dict(zip(grid, values, strict=True))
        table: dict[str, Any] = json.loads(json.dumps(base))
        for key, value in settings.items():
            *tables, last = key.split(".")
            inner = table
            for name in tables:
                inner = inner.setdefault(name, {})
                if not isinstance(inner, dict):
                    raise ConfigError(
                        f"--grid: expected {key!r} to be a key in tables, found that {name!r} is none"
                    )
            inner[last] = value
        said = ", ".join(f"{key} = {value}" for key, value in settings.items())
        RunConfig.from_table(table, source=f"{path} with {said}")
        yield settings, table, f"{number:0{len(str(count - 1))}d}"


def _in_a_process(
    settings: Mapping[str, Any],
    table: dict[str, Any],
    folder: Path,
    *,
    beside: Path,
    engine: str,
    device: str,
) -> Swept:
    told = {
        "table": table,
        "out": str(folder.resolve()),
        "folder": str(beside),
        "engine": engine,
        "device": device,
    }
    done = subprocess.run(  # noqa: S603  # this Python, and this module
        python("fedge_sim.sweep"),
        input=json.dumps(told),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    if done.returncode == 0:
        summary: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return Swept(settings, folder, summary)
    how = f"killed by signal {-done.returncode}" if done.returncode < 0 else done.stderr.strip()[-_SAID:]
    return Swept(settings, folder, {}, how or f"exit code {done.returncode}")


def _as_csv(rows: list[dict[str, Any]]) -> str:
    columns = dict.fromkeys(name for row in rows for name in row)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def main() -> int:
    """One run: its summary is the last line of the output."""
    told = json.load(sys.stdin)
    from fedge_sim.engine import simulate_in
    from fedge_sim.report import write_results

    folder = Path(told["out"])
    try:
        run = RunConfig.from_table(told["table"], source="the sweep's run")
        prepare_folder(folder)
        # The others have the other cores; those of a cluster it divides itself.
        workers = None if told["engine"] == "ray" else 1
        result = simulate_in(
            Path(told["folder"]), run, engine=told["engine"], workers=workers, device=told["device"]
        )
        write_results(folder, result)
    except FedgeError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write(json.dumps(result.summary()) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

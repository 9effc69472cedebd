"""The report of one or several simulations: a page of HTML that needs nothing but itself.

It is made of what lies in results folders, so that it can be made again, and runs of other days can be laid beside.
"""

from __future__ import annotations

import base64
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Final

import tomlkit
from jinja2 import Environment, PackageLoader, StrictUndefined

from fedge.errors import ConfigError
from fedge.files import read_capped, write_atomic
from fedge_sim.figures import Series, counts, lines
from fedge_sim.folders import prepare_folder

MAX_BYTES: Final = 1 << 30
"""Of a history: a million rounds of a thousand clients are less."""

_MEGABYTE = 1e6


@dataclass(frozen=True, eq=False)
class Told:
    """What a results folder says of a simulation."""

    label: str
    summary: dict[str, Any]
    run: dict[str, Any]
    versions: dict[str, str]
    rows: list[dict[str, Any]]

    @classmethod
    def of(cls, folder: Path, *, label: str) -> Told:
        """Read a results folder.

        Raises:
            ConfigError: it is none, or damaged.
        """
        try:
            manifest = json.loads(read_capped(folder / "manifest.json", max_bytes=MAX_BYTES))
            history = read_capped(folder / "history.jsonl", max_bytes=MAX_BYTES)
            rows = [json.loads(line) for line in history.splitlines()]
            found = cls(
                label, dict(manifest["summary"]), dict(manifest["run"]), dict(manifest["versions"]), rows
            )
            found.check()
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"{folder}: expected the results of `fedge simulate`, found a damaged manifest.json or history.jsonl "
                f"({type(error).__name__})"
            ) from None
        return found

    def check(self) -> None:
        """
        Raises:
            KeyError, TypeError, ValueError: a number that the page shows is not there.
        """
        for row in self.rows:
            for name in ("round", "attempt", "seconds", "bytes_down", "bytes_up", "refused"):
                float(row[name])
            if not isinstance(row["clients"], list) or not isinstance(row["metrics"], dict):
                raise TypeError("expected clients and metrics")
        int(self.summary["clients"]), self.summary["name"]

    @property
    def metrics(self) -> list[str]:
        """Names, in the order in which they first came."""
        return list(dict.fromkeys(name for row in self.rows for name in row["metrics"]))

    def numbers(self, name: str) -> list[float]:
        return [float(row[name]) for row in self.rows]

    def metric(self, name: str) -> list[float]:
        """By round; NaN where there is none."""
        found = [row["metrics"].get(name) for row in self.rows]
        return [math.nan if value is None else float(value) for value in found]

    @property
    def sent_mb(self) -> list[float]:
        """Megabytes that have crossed the wire by each round, both ways."""
        return list(accumulate((row["bytes_up"] + row["bytes_down"]) / _MEGABYTE for row in self.rows))

    @property
    def turns(self) -> list[int]:
        """How many updates of each client are in the model."""
        taken = Counter(client for row in self.rows for client in row["clients"])
        never = max(0, int(self.summary["clients"]) - len(taken))
        return [*taken.values(), *[0] * never]


@dataclass(frozen=True)
class Picture:
    """A figure as a page shows it: `source` is the picture itself, as a URL."""

    title: str
    source: str


def write_page(path: Path, folders: Sequence[Path]) -> None:
    """Make the report of the simulations in these results folders, the first of which it is about.

    Raises:
        ConfigError: one of them has no results, or the page cannot be written.
    """
    names = Counter(folder.name for folder in folders)
    told = [Told.of(each, label=each.name if names[each.name] == 1 else str(each)) for each in folders]
    prepare_folder(path.parent)
    environment = Environment(
        loader=PackageLoader("fedge_sim", "pages"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    page = environment.get_template("report.html").render(
        labels=[each.label for each in told],
        names=[each.summary["name"] for each in told],
        facts=_facts(told),
        pictures=_pictures(told),
        settings=[
            (
                ", ".join(f"{name} {version}" for name, version in each.versions.items()),
                tomlkit.dumps(_without_none(each.run)),
            )
            for each in told
        ],
    )
    write_atomic(path, page)


def _facts(told: Sequence[Told]) -> list[tuple[str, list[str]]]:
    """What the summaries say, a line each; parts of a part under both names."""
    flat = [dict(_flattened(each.summary)) for each in told]
    return [
        (name.replace("_", " "), [_shown(each.get(name, "")) for each in flat])
        for name in dict.fromkeys(name for each in flat for name in each)
    ]


def _flattened(summary: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in summary.items():
        if isinstance(value, dict):
            yield from _flattened(value, f"{above}{name}: ")
        else:
            yield above + name, value


def _pictures(told: Sequence[Told]) -> list[Picture]:
    found = []
    for name in dict.fromkeys(name for each in told for name in each.metrics):
        those = [each for each in told if name in each.metrics]
        found += [
            _picture(
                f"{name} by round", _series(those, lambda each: each.numbers("round"), name), "round", name
            ),
            _picture(f"{name} by bytes", _series(those, lambda each: each.sent_mb, name), "MB sent", name),
        ]
    taken = {each.label: each.turns for each in told}
    found.append(Picture("participation", _url(counts(taken, x="updates that counted", y="clients"))))
    for name, title, unit in (
        ("seconds", "time of a round", "s"),
        ("refused", "what failed or was refused in a round", "orders"),
        ("attempt", "attempts at a round", "attempts"),
    ):
        if name == "seconds" or any(len(set(each.numbers(name))) > 1 for each in told):
            series = {each.label: (each.numbers("round"), each.numbers(name)) for each in told}
            found.append(_picture(title, series, "round", unit))
    return found


def _series(told: Sequence[Told], where: Callable[[Told], list[float]], metric: str) -> Series:
    return {each.label: (where(each), each.metric(metric)) for each in told}


def _picture(title: str, series: Series, x: str, y: str) -> Picture:
    return Picture(title, _url(lines(series, x=x, y=y)))


def _url(svg: str) -> str:
    """As an image of its own: nothing in it acts on the page."""
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return "" if value is None else str(value)


def _without_none(value: Any) -> Any:
    """TOML has no word for what is not there."""
    if isinstance(value, dict):
        return {key: _without_none(each) for key, each in value.items() if each is not None}
    return [_without_none(each) for each in value if each is not None] if isinstance(value, list) else value

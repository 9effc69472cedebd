"""The report of one or several simulations: a page of HTML that needs nothing but itself.

It is made of what lies in results folders, so that it can be made again, and runs of other days can be laid beside.
"""

from __future__ import annotations

import base64
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomlkit
from jinja2 import Environment, PackageLoader, StrictUndefined

from fedge.files import write_atomic
from fedge_sim.figures import Series, counts, lines, stacked
from fedge_sim.folders import prepare_folder
from fedge_sim.told import Number, Part, Told


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
    folders = list(dict.fromkeys(folder.resolve() for folder in folders))
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
        names=[each.name for each in told],
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
        if timed := [each for each in those if each.has("virtual_s")]:
            series = _series(timed, lambda each: each.hours, name)
            found.append(_picture(f"{name} by virtual time", series, "hours", name))
        if series := _tenths(those, name):
            found.append(_picture(f"{name}: clients with the lowest and the highest", series, "round", name))
    taken = {each.label: each.turns for each in told}
    found.append(Picture("participation", _url(counts(taken, x="updates that counted", y="clients"))))
    for each in told:
        if each.labels:
            of = f" of {each.label}" if len(told) > 1 else ""
            picture = stacked(each.labels, x="client", y="training examples")
            found.append(Picture(f"classes of the first {len(each.labels)} clients{of}", _url(picture)))
    found += [
        _by_round([each for each in told if each.has(name)], name, title, unit)
        for name, title, unit in _IF_THERE
        if any(each.has(name) for each in told)
    ]
    found.append(_by_round(told, "seconds", "time of a round", "s"))
    if any(any(each.numbers("refused")) for each in told):
        found.append(_by_round(told, "refused", "what failed or was refused in a round", "orders"))
    if any(len(set(each.numbers("attempt"))) > 1 for each in told):
        found.append(_by_round(told, "attempt", "attempts at a round", "attempts"))
    return found


_IF_THERE: Sequence[tuple[Number, str, str]] = (
    ("epsilon", "privacy spent by a round, the client with the least left", "epsilon by RDP"),
    ("joules", "energy of all devices by a round", "J"),
    ("wasted", "orders called off or lost by a round", "orders"),
    ("present", "clients that were there", "clients"),
)


def _tenths(told: Sequence[Told], name: str) -> Series:
    """The means over the tenth of clients with the lowest value, and with the highest."""
    return {
        f"{words}{f', {each.label}' if len(told) > 1 else ''}": (
            each.numbers("round"),
            each.metric(name, part),
        )
        for each in told
        for part, words in _PARTS.items()
        if any(math.isfinite(value) for value in each.metric(name, "lowest_tenth"))
    }


_PARTS: dict[Part, str] = {
    "metrics": "mean of all",
    "lowest_tenth": "lowest tenth",
    "highest_tenth": "highest tenth",
}


def _by_round(told: Sequence[Told], name: Number, title: str, unit: str) -> Picture:
    series = {each.label: (each.numbers("round"), each.numbers(name)) for each in told}
    return _picture(title, series, "round", unit)


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

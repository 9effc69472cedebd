"""The pictures of a report, each as SVG text."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

Series = Mapping[str, tuple[Sequence[float], Sequence[float]]]
"""By label: where its points are, and what they say. What is not finite, or too large to draw, is left out."""

_LARGEST = 1e300

_SIZE = (6.0, 3.2)
_STYLE: dict[Any, Any] = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 9.0,
    "grid.alpha": 0.3,
    "svg.fonttype": "none",
    "text.parse_math": False,  # labels are words, whatever is in them
    "svg.hashsalt": "fedge",  # the same picture is the same text
}


def lines(series: Series, *, x: str, y: str) -> str:
    """A line for each label."""

    def draw(axes: Axes) -> None:
        for places, values in series.values():
            points = [
                (place, value)
                for place, value in zip(places, values, strict=True)
                if math.isfinite(value) and abs(value) <= _LARGEST
            ]
            marker = "o" if len(points) < 20 else ""
            axes.plot(*zip(*points, strict=True) if points else ([], []), marker=marker, ms=3, lw=1.4)
        if all(float(place).is_integer() for places, _ in series.values() for place in places):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if len(series) > 1:  # handles are given: of its own accord it leaves out labels that begin with "_"
            axes.legend(axes.lines, list(series), frameon=False)

    return _svg(draw, x=x, y=y)


def counts(series: Mapping[str, Mapping[int, int]], *, x: str, y: str) -> str:
    """By label: how often each whole number occurs, side by side."""

    def draw(axes: Axes) -> None:
        width = 0.8 / max(1, len(series))
        bars = []
        for at, heights in enumerate(series.values()):
            shift = (at - (len(series) - 1) / 2) * width
            color = f"C{at % 10}"
            bars.append(axes.bar([n + shift for n in heights], list(heights.values()), width, color=color))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        if len(series) > 1:
            axes.legend(bars, list(series), frameon=False)

    return _svg(draw, x=x, y=y)


def stacked(bars: Mapping[str, Mapping[str, int]], *, x: str, y: str) -> str:
    """A bar for each label: how many of each kind are in it, one on the other. Numbers are in their order."""
    kinds = sorted(
        {kind for heights in bars.values() for kind in heights}, key=lambda kind: (len(kind), kind)
    )

    def draw(axes: Axes) -> None:
        below = [0] * len(bars)
        for at, kind in enumerate(kinds):
            heights = [each.get(kind, 0) for each in bars.values()]
            axes.bar(range(len(bars)), heights, 0.9, bottom=below, color=f"C{at % 10}", label=kind)
            below = [sum(pair) for pair in zip(below, heights, strict=True)]
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        if len(kinds) <= 10:
            axes.legend(axes.containers, kinds, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))

    return _svg(draw, x=x, y=y)


def _svg(draw: Callable[[Axes], None], *, x: str, y: str) -> str:
    out = io.StringIO()
    with rc_context(_STYLE):
        figure = Figure(figsize=_SIZE, layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()

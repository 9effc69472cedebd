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
"""By label: where its points are, and what they say. What is not finite is left out."""

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
        for label, (places, values) in series.items():
            points = [
                (place, value) for place, value in zip(places, values, strict=True) if math.isfinite(value)
            ]
            marker = "o" if len(points) < 20 else ""
            axes.plot(
                *zip(*points, strict=True) if points else ([], []), marker=marker, ms=3, lw=1.4, label=label
            )
        if all(float(place).is_integer() for places, _ in series.values() for place in places):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if len(series) > 1:
            axes.legend(frameon=False)

    return _svg(draw, x=x, y=y)


def counts(series: Mapping[str, Sequence[int]], *, x: str, y: str) -> str:
    """How often each whole number occurs, side by side for each label."""

    def draw(axes: Axes) -> None:
        most = max((max(values, default=0) for values in series.values()), default=0)
        width = 0.8 / max(1, len(series))
        for at, (label, values) in enumerate(series.items()):
            heights = [0] * (most + 1)
            for value in values:
                heights[value] += 1
            shift = (at - (len(series) - 1) / 2) * width
            axes.bar([number + shift for number in range(most + 1)], heights, width, label=label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        if len(series) > 1:
            axes.legend(frameon=False)

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

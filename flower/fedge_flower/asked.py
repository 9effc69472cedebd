"""What a message asks of a node, and where its arrays are measured from: of both ends of a link."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal, Self

from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from fedge.vector import Array, Layout, all_finite
from fedge_flower.layouts import layout_of, vector_of

WORK_KEY: Final = "fedge-work"
"""In the settings of a message: what a node is to return, "train" (its arrays) or "gradient" (theirs)."""

BUFFERS_KEY: Final = "fedge-buffers"
"""In the settings of a message: names of arrays that are no parameters, whose values are returned under either."""


def ask(config: ConfigRecord, kind: str, buffers: Collection[str]) -> None:
    """Say in a message's settings what is to be returned."""
    config[WORK_KEY] = kind
    if buffers:
        config[BUFFERS_KEY] = sorted(buffers)


@dataclass(frozen=True, eq=False)
class Sent:
    """A record of arrays that was sent, and what a reply's are measured from: `start`, float32[layout.size]. Where
    gradients are asked for it is 0, but for buffers."""

    arrays: ArrayRecord
    layout: Layout
    start: Array

    @classmethod
    def of(cls, arrays: ArrayRecord, kind: str, buffers: Collection[str]) -> Self:
        """
        Raises:
            TypeError: numpy has none of their type (bfloat16).
        """
        layout = layout_of(arrays, buffers=buffers)
        start = vector_of(layout, arrays)
        if kind == "gradient":
            start[: layout.trainable_size] = 0
        return cls(arrays, layout, start)

    def change(self, arrays: ArrayRecord) -> Array:
        """From what was sent to these, float32[layout.size].

        Raises:
            ValueError: they are others, or have NaN or infinity in them.
        """
        if list(self.arrays) != list(arrays):
            raise ValueError(f"expected arrays {list(self.arrays)[:8]}, found {list(arrays)[:8]}")
        change = vector_of(self.layout, arrays) - self.start
        if not all_finite(change):
            raise ValueError("expected a finite change of the arrays, found NaN or infinity in it")
        return change


@dataclass(frozen=True, eq=False)
class Asked:
    """A message, as it is before a ClientApp has it and may write to it."""

    kind: Literal["train", "gradient"]
    arrays: Mapping[str, ArrayRecord]
    buffers: Collection[str] = ()
    _sent: dict[str, Sent] = field(default_factory=dict)

    @classmethod
    def by(cls, content: RecordDict) -> Self:
        arrays = {name: ArrayRecord(dict(each)) for name, each in content.array_records.items()}
        kind: Literal["train", "gradient"] = "train"
        buffers: Collection[str] = ()
        for config in content.config_records.values():
            kind = "gradient" if config.get(WORK_KEY) == "gradient" else kind
            named = config.get(BUFFERS_KEY)
            buffers = [str(each) for each in named] if isinstance(named, list) else buffers
        return cls(kind, arrays, buffers)

    def sent(self, name: str) -> Sent:
        """What a reply's record of this name is measured from: that of the same name, or the only one.

        Raises:
            ValueError: there is none.
        """
        if name not in self.arrays and len(self.arrays) != 1:
            raise ValueError(f"expected arrays that were sent, found a record {name[:80]!r}")
        name = name if name in self.arrays else next(iter(self.arrays))
        if name not in self._sent:
            self._sent[name] = Sent.of(self.arrays[name], self.kind, self.buffers)
        return self._sent[name]

    def changes(self, content: RecordDict) -> Iterator[tuple[str, Sent, Array]]:
        """Of each record of arrays in a reply: its name, what it is measured from, and its change of that.

        Raises:
            ValueError: as `Sent.change`, or nothing was sent.
        """
        for name, record in list(content.array_records.items()):
            sent = self.sent(name)
            yield name, sent, sent.change(record)

"""What a ClientApp's reply has changed: what mods look at before it leaves."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, Self

from flwr.app import ArrayRecord, Message

from fedge.vector import Array, Layout, all_finite
from fedge_flower.layouts import layout_of, vector_of
from fedge_flower.work import work_kind_of


@dataclass(frozen=True, eq=False)
class Change:
    """A record of arrays in a reply. `start` and `change` are float32[layout.size], and `start + change` is what it
    has; `sent` are the arrays that the message had. Of a gradient `start` is 0, but for buffers."""

    name: str
    sent: ArrayRecord
    layout: Layout
    start: Array
    change: Array


@dataclass(frozen=True, eq=False)
class Asked:
    """What a message asks, as it is before a ClientApp has it and may write to it."""

    kind: Literal["train", "gradient"]
    arrays: Mapping[str, ArrayRecord]
    buffers: Collection[str]

    @classmethod
    def by(cls, message: Message, buffers: Collection[str]) -> Self:
        arrays = {name: ArrayRecord(dict(each)) for name, each in message.content.array_records.items()}
        return cls(work_kind_of(message.content), arrays, buffers)

    def changes(self, reply: Message) -> Iterator[Change]:
        """One for each record of arrays in the reply; none in one that is an error.

        Raises:
            ValueError: it has other arrays than the message, or NaN or infinity in them.
        """
        if reply.has_error():
            return
        for name, record in list(reply.content.array_records.items()):
            sent = self._sent_for(name)
            if list(sent) != list(record):
                raise ValueError(f"expected arrays {list(sent)[:8]}, found {list(record)[:8]}")
            layout = layout_of(sent, buffers=self.buffers)
            start = vector_of(layout, sent)
            if self.kind == "gradient":
                start[: layout.trainable_size] = 0
            change = vector_of(layout, record) - start
            if not all_finite(change):
                raise ValueError("expected a finite change of the arrays, found NaN or infinity in it")
            yield Change(name, sent, layout, start, change)

    def _sent_for(self, name: str) -> ArrayRecord:
        if name not in self.arrays and len(self.arrays) != 1:
            raise ValueError(f"expected arrays that were sent, found a record {name[:80]!r}")
        return self.arrays[name] if name in self.arrays else next(iter(self.arrays.values()))

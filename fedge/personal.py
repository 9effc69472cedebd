"""Personal layers: the part of a model that each client keeps to itself, and learns alone.

A client joins the shared model and its own layers to a whole one, trains that, and sends what the shared part has moved
by. With a network's head as its personal part this is FedPer (Arivazhagan et al. 2019, "Federated Learning with
Personalization Layers", Algorithm 1), with its batch normalisation FedBN (Li et al. 2021, "FedBN: Federated Learning on
Non-IID Features via Local Batch Normalization", Algorithm 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Self

import numpy as np

from fedge.errors import LayoutError
from fedge.vector import Array, Layout

Span = tuple[slice, slice]
"""Elements of the whole vector, and where they are in that of a part."""


@dataclass(frozen=True)
class Split:
    """A model's `whole` layout, and those of its two parts. What is neither trained nor averaged (integers) is carried
    by the shared one."""

    whole: Layout
    shared: Layout
    personal: Layout

    @classmethod
    def of(cls, whole: Layout, patterns: Sequence[str]) -> Self:
        """Personal are the tensors with a name, of all that they have, that matches one of `patterns`, as a shell's.

        Raises:
            LayoutError: a pattern matches none, or nothing that is trained would be shared.
        """
        matched = {
            pattern: {
                tensor.name
                for tensor in whole.tensors
                if any(fnmatchcase(name, pattern) for name in (tensor.name, *tensor.tied))
            }
            for pattern in patterns
        }
        for pattern, names in matched.items():
            if not names:
                known = ", ".join(tensor.name for tensor in whole.tensors[:8])
                raise LayoutError(
                    f"work.personal: expected names of the model's floating-point tensors ({known}"
                    f"{', ...' if len(whole.tensors) > 8 else ''}), found {pattern!r}, which matches none"
                )
        own = set().union(*matched.values())
        shared = Layout(tuple(each for each in whole.tensors if each.name not in own), whole.carried)
        if not shared.trainable_size:
            raise LayoutError(
                "work.personal: expected a trained tensor that is shared, found that all are personal: nothing would "
                "be learned together"
            )
        return cls(whole, shared, Layout(tuple(each for each in whole.tensors if each.name in own)))

    @cached_property
    def shared_spans(self) -> tuple[Span, ...]:
        """Where the shared elements are, in the whole vector and in their own."""
        return self._spans(self.shared)

    @cached_property
    def personal_spans(self) -> tuple[Span, ...]:
        """As `shared_spans`, of the personal ones."""
        return self._spans(self.personal)

    def join(self, shared: Array, own: Array) -> Array:
        """The whole model, a new float32[whole.size], of float32[shared.size] and float32[personal.size].

        Raises:
            LayoutError: a vector does not fit.
        """
        self.shared.check(shared)
        self.personal.check(own)
        out: Array = np.empty(self.whole.size, np.float32)
        for part, spans in ((shared, self.shared_spans), (own, self.personal_spans)):
            for here, there in spans:
                out[here] = part[there]
        return out

    def shared_of(self, whole: Array, *, out: Array | None = None) -> Array:
        """The shared elements of float32[whole.size], in `out` or in a new vector."""
        return _gathered(
            whole, self.shared_spans, out if out is not None else np.empty(self.shared.size, np.float32)
        )

    def personal_of(self, whole: Array) -> Array:
        """The personal elements of float32[whole.size], in a new vector."""
        return _gathered(whole, self.personal_spans, np.empty(self.personal.size, np.float32))

    def _spans(self, part: Layout) -> tuple[Span, ...]:
        """Neighbours that stay together are one."""
        places = dict(zip((tensor.name for tensor in self.whole.tensors), self.whole.slices, strict=True))
        found: list[Span] = []
        for tensor, there in zip(part.tensors, part.slices, strict=True):
            here = places[tensor.name]
            if found and found[-1][0].stop == here.start:
                last = found.pop()
                here, there = slice(last[0].start, here.stop), slice(last[1].start, there.stop)
            found.append((here, there))
        return tuple(found)


def _gathered(whole: Array, spans: Sequence[Span], out: Array) -> Array:
    for here, there in spans:
        out[there] = whole[here]
    return out

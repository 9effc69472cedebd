"""A module whose parameters are views into one flat vector: loading is a copy, a delta a subtraction.

Not a trainer: it knows nothing of batches, losses or optimisers, only where each tensor's memory is.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import is_

import numpy as np
import torch

from fedge.errors import LayoutError
from fedge.vector import Array, Layout, Role
from fedge_client.torch.layout import Part, is_plain, layout_from, layout_of, parts_of, repeats_itself

__all__ = ["FlatModule", "layout_of"]


@dataclass(frozen=True, slots=True, eq=False)
class _Place:
    """Where one floating-point tensor lives.

    `master` is its float32 view of the flat vector. `home` is the memory the module computes with:
    the master itself, or for another dtype memory of its own that is synchronised by copying. The
    same holds of `gradient`, which `.grad` is, and its view `flat_gradient`; both serve trainable
    tensors only.
    """

    name: str
    tensor: torch.Tensor
    role: Role
    master: torch.Tensor
    home: torch.Tensor
    flat_gradient: torch.Tensor
    gradient: torch.Tensor

    @property
    def is_copy(self) -> bool:
        return self.home is not self.master


@dataclass(frozen=True, slots=True, eq=False)
class _Slot:
    """A module's entry for a buffer: forward may put another tensor there, which must be noticed."""

    entries: dict[str, torch.Tensor | None]
    key: str
    resident: torch.Tensor | None


@dataclass(frozen=True, slots=True, eq=False)
class _Fixed:
    """A tensor outside the vector, which returns to its `initial` value at every load."""

    tensor: torch.Tensor
    home: torch.Tensor
    initial: torch.Tensor


class FlatModule:
    """A module living in a flat vector. The module is taken over: its parameters move here.

    Attributes:
        module: the module itself; its parameters keep their identity.
        layout: names, shapes, dtypes and offsets.
        theta: torch float32[layout.size], and `vector`, the same memory for numpy.
        head: torch float32[trainable_size], the part of theta that an optimiser moves.
        gradient: torch float32[trainable_size]; the parameters' `.grad` are views into it.

    Guarantees: after `load`, the module's tensors (parameters, buffers of any kind, gradients) are a
    function of the loaded vector alone, whatever the module's forward did to them before. What a module
    keeps in plain Python attributes is out of reach.

    Raises:
        LayoutError: the module holds what a flat vector cannot; see `fedge_client.torch.layout`.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        parts = parts_of(module)
        self.module = module
        self.layout: Layout = layout_from(parts)
        self.theta = torch.empty(self.layout.size)
        self.vector: Array = self.theta.numpy()
        self.head = self.theta[: self.layout.trainable_size]
        self.gradient = torch.zeros(self.layout.trainable_size)
        self._places = self._settle_in(parts)
        self._trainable = [place for place in self._places if place.role == "trainable"]
        self._parameters = [place.tensor for place in self._trainable]
        self._gradients = [place.gradient for place in self._trainable]
        self._addresses = [place.home.data_ptr() for place in self._trainable]
        self._copies = [place for place in self._places if place.is_copy]
        self._trained_copies = [place for place in self._trainable if place.is_copy]
        self._slots = [_Slot(m._buffers, key, b) for m in module.modules() for key, b in m._buffers.items()]
        self._fixed = self._initial_values(parts)
        self._bind_gradients()

    def load(self, model: Array) -> None:
        """Make the module what `model` (float32[layout.size]) says; everything else returns to its start.

        Raises:
            LayoutError: the vector does not fit the layout.
        """
        self.layout.check(model)
        for slot in self._slots:
            slot.entries[slot.key] = slot.resident
        for place in self._places:
            if not place.tensor.is_set_to(place.home):
                place.tensor.data = place.home
        np.copyto(self.vector, model)
        for place in self._copies:
            place.home.copy_(place.master)
        self._put_back_fixed()
        self._bind_gradients()

    def zero_gradient(self) -> None:
        """Forget the last step's gradient, in place: call it before each backward pass."""
        self.gradient.zero_()
        for place in self._trained_copies:
            place.gradient.zero_()

    def collect(self) -> None:
        """Complete `theta` and `gradient` after a backward pass.

        A module may have put a parameter or a `.grad` elsewhere in its forward (max-norm constraints
        written as `weight.data = ...` do): its value is taken over, and its memory is ours again.
        """
        if self.was_rearranged():
            self._reclaim(self._trainable)
        if not all(map(is_, [p.grad for p in self._parameters], self._gradients)):
            for place in self._trainable:
                if place.tensor.grad is None:
                    place.gradient.zero_()
                elif place.tensor.grad is not place.gradient:
                    place.gradient.copy_(place.tensor.grad)
            self._bind_gradients()
        for place in self._trained_copies:
            place.flat_gradient.copy_(place.gradient)

    def buffers(self) -> tuple[torch.Tensor, ...]:
        """Copies of the buffers that are in the vector, for `put_back`."""
        return tuple(place.home.clone() for place in self._places if place.role == "buffer")

    def put_back(self, buffers: tuple[torch.Tensor, ...]) -> None:
        """Undo what forward did to buffers of any kind: those in the vector are again `buffers`, others as at first."""
        for slot in self._slots:
            slot.entries[slot.key] = slot.resident
        places = (place for place in self._places if place.role == "buffer")
        for place, value in zip(places, buffers, strict=True):
            if not place.tensor.is_set_to(place.home):
                place.tensor.data = place.home
            place.home.copy_(value)
        self._put_back_fixed()

    def _put_back_fixed(self) -> None:
        for fixed in self._fixed:
            fixed.tensor.data = fixed.home
            fixed.home.copy_(fixed.initial)

    def was_rearranged(self) -> bool:
        """Whether the module has put a trainable parameter elsewhere since it was loaded."""
        return [p.data_ptr() for p in self._parameters] != self._addresses

    def publish(self) -> None:
        """Let the module see the parameters that an optimiser has moved in `head`."""
        for place in self._trained_copies:
            place.home.copy_(place.master)

    def settle(self) -> None:
        """Complete `theta` after training: what the module did to its own buffers is read back.

        Raises:
            LayoutError: a buffer was replaced by one of another shape.
        """
        places = {id(place.tensor): place for place in self._places}
        for slot in self._slots:
            current, place = slot.entries.get(slot.key), places.get(id(slot.resident))
            if place is not None and current is not place.tensor:
                _take(place, current)
                slot.entries[slot.key] = place.tensor
        self._reclaim(self._places)
        for place in self._copies:
            if place.role != "trainable":
                # Where the module changed nothing the master keeps its bits: a delta of exactly zero.
                kept = place.master.to(place.home.dtype) == place.home
                place.master.copy_(torch.where(kept, place.master, place.home.to(torch.float32)))

    def _settle_in(self, parts: tuple[Part, ...]) -> list[_Place]:
        by_name = {part.names[0]: part for part in parts}
        places = []
        for spec, where in zip(self.layout.tensors, self.layout.slices, strict=True):
            tensor = by_name[spec.name].value
            master = self.theta[where].view(spec.shape)
            master.copy_(tensor.detach())
            flat = self.gradient[where].view(spec.shape) if spec.role == "trainable" else self.gradient[:0]
            if spec.dtype == "float32":
                places.append(_Place(spec.name, tensor, spec.role, master, master, flat, flat))
            else:
                home = tensor.detach()
                own = torch.zeros_like(home)
                places.append(_Place(spec.name, tensor, spec.role, master, home, flat, own))
            tensor.data = places[-1].home
        return places

    def _bind_gradients(self) -> None:
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient

    def _initial_values(self, parts: tuple[Part, ...]) -> list[_Fixed]:
        """The integers of the state dict, and the buffers outside of it that can be written."""
        own = {id(place.tensor) for place in self._places}
        outside = [b for b in self.module.buffers() if id(b) not in own]
        rest = {id(b): b for b in outside if is_plain(b) and not repeats_itself(b)}
        rest |= {id(part.value): part.value for part in parts if part.role is None}
        return [_Fixed(b, b.detach(), b.detach().clone()) for b in rest.values()]

    @staticmethod
    def _reclaim(places: list[_Place]) -> None:
        for place in places:
            if not place.tensor.is_set_to(place.home):
                _take(place, place.tensor.detach())
                place.tensor.data = place.home


def _take(place: _Place, value: torch.Tensor | None) -> None:
    found = "none" if value is None else list(value.shape)
    if value is None or value.shape != place.home.shape:
        raise LayoutError(
            f"{place.name!r}: expected shape {list(place.home.shape)} throughout training, found {found}; "
            "give the model tensors of fixed shapes"
        )
    place.home.copy_(value.detach())

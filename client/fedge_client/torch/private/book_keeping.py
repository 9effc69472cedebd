"""Clipped sums by book-keeping: one forward and one backward pass, which computes no ordinary weight gradients.

Bu, Wang, Zha and Karypis 2022, Algorithm 1. Every trainable parameter must belong to one layer of a known kind
that is used once; what is hidden from it (a weight that is also used elsewhere) shows in the comparison with
autograd that `fedge_client.torch.private.choice` makes before this is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from fedge_client.torch.private.clipping import PHYSICAL_ROWS, Factors, Subject, UnsuitedError
from fedge_client.torch.private.layers import Layer, layer_of


class _Anchor(torch.autograd.Function):
    """The identity, behind which everything has a gradient although no parameter asks for one."""

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
        ctx.mark_dirty(output)  # the same tensor goes on, so that it may be changed in place behind this
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[None, None]:
        return None, None


class BookKeeping:
    """`ClippedSum` for models of linear, convolutional, embedding and normalising layers."""

    max_rows = PHYSICAL_ROWS

    def __init__(self, subject: Subject, layers: dict[nn.Module, Layer]) -> None:
        self._subject = subject
        self._layers = layers
        self._parameters = [parameter for parameter, _ in subject.places()]
        self._token = torch.zeros((), requires_grad=True)

    @classmethod
    def of(cls, subject: Subject) -> BookKeeping | None:
        """For this model; None if a trainable parameter is in no layer of a known kind, or in two."""
        views = {id(parameter): view for parameter, view in subject.places()}
        layers: dict[nn.Module, Layer] = {}
        found: list[int] = []
        for module in subject.flat.module.modules():
            own = {
                name: views[id(parameter)]
                for name, parameter in module.named_parameters(recurse=False)
                if id(parameter) in views
            }
            if own:
                layer = layer_of(module, own)
                if layer is None:
                    return None
                layers[module] = layer
                found += [id(parameter) for parameter in module.parameters(recurse=False)]
        owned = [each for each in found if each in views]
        return cls(subject, layers) if sorted(owned) == sorted(views) else None

    def add(self, inputs: Any, target: Any, clip: float) -> torch.Tensor:
        """See `ClippedSum.add`.

        Raises:
            UnsuitedError: a layer is used twice, or its input is changed after it was used.
        """
        received: dict[nn.Module, torch.Tensor] = {}
        with ExitStack() as stack:
            stack.enter_context(_without_gradients(self._parameters))
            for module, layer in self._layers.items():
                handle = module.register_forward_hook(self._hook(layer, received))
                stack.callback(handle.remove)
            losses = self._subject.losses(inputs, target)
            losses.sum().backward()  # type: ignore[no-untyped-call]  # torch ships no annotation for it
        losses = losses.detach()
        squares = torch.zeros(len(losses), dtype=torch.float64)
        for found in received.values():
            if len(found) != len(losses):
                raise UnsuitedError("a layer sees another number of rows than there are examples")
            squares += found
        factors = Factors.of(squares, losses, clip)
        for module in received:
            self._layers[module].add(factors)
        return losses

    def _hook(
        self, layer: Layer, received: dict[nn.Module, torch.Tensor]
    ) -> Callable[[nn.Module, Any, Any], torch.Tensor]:
        used: set[nn.Module] = set()

        def hook(module: nn.Module, args: Any, output: Any) -> torch.Tensor:
            if module in used or len(args) != 1 or not isinstance(output, torch.Tensor) or output.ndim < 2:
                raise UnsuitedError(f"{type(module).__name__} is used twice, or in an unusual way")
            used.add(module)
            inputs, version = args[0].detach(), args[0]._version
            if not output.requires_grad:
                output = _Anchor.apply(output, self._token)  # type: ignore[no-untyped-call]  # torch's

            def receive(gradient: torch.Tensor) -> None:
                if inputs._version != version:
                    raise UnsuitedError(f"what went into {type(module).__name__} was changed behind it")
                received[module] = layer.receive(inputs, gradient)

            anchored: torch.Tensor = output
            anchored.register_hook(receive)  # type: ignore[no-untyped-call]  # torch's
            return anchored

        return hook


@contextmanager
def _without_gradients(parameters: list[nn.Parameter]) -> Iterator[None]:
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)

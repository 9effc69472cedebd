"""Per-example gradients of single layers, from what went into a layer and the gradient of what came out.

Book-keeping needs two things of a layer: the squared norm of every example's gradient, and later the sum
of the gradients, each times its factor (Bu, Wang, Zha and Karypis 2022, "Differentially private optimization
on large model at small cost", Algorithm 1). Norms come from gradients that are made, or where those would be
larger from inner products of positions ("ghost norms", Goodfellow 2015; Li et al. 2022).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any, Protocol

import torch
import torch.nn.functional as F  # noqa: N812  # as everybody calls it
from torch import nn

from fedge_client.torch.private.clipping import Factors, add_weighted, squared

MAX_MADE = 1 << 22
"""Elements of the per-example gradients of one layer that are kept until their factors are known."""
_MAX_SCRATCH = 1 << 21
"""Elements of scratch memory at once; what needs more goes in slices of examples."""
_ROUNDING = 2.0**-20
"""A bound on the relative rounding error of a sum of float32 products, taken of their absolute values."""

Views = dict[str, torch.Tensor]
"""Of a layer's trainable parameters by their own names: the views of the flat gradient."""


class Layer(Protocol):
    """One layer in one backward pass: `receive`, then `add`."""

    @abstractmethod
    def receive(self, inputs: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """Squared norms float64[n] of the examples' gradients, from the layer's input and its output's gradient.

        What an earlier call has kept is forgotten: the batch it was of may have failed.
        """

    @abstractmethod
    def add(self, factors: Factors) -> None:
        """Add the weighted sum to the flat gradient, and forget what was kept."""


class LinearLayer(Layer):
    """nn.Linear on [n, d] or [n, ..., d]."""

    def __init__(self, module: nn.Linear, views: Views) -> None:
        self._views = views
        self._kept: tuple[torch.Tensor, torch.Tensor] | None = None
        self._made: torch.Tensor | None = None

    def receive(self, inputs: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        count = len(gradient)
        a = inputs.reshape(count, -1, inputs.shape[-1])
        g = gradient.reshape(count, -1, gradient.shape[-1])
        self._made = None
        squares = torch.zeros(count, dtype=torch.float64)
        if "weight" in self._views:
            self._kept = a, g
            squares += self._weight_squares(a, g)
        else:
            self._kept = a[:, :0], g
        if "bias" in self._views:
            squares += squared(g.sum(1))
        return squares

    def add(self, factors: Factors) -> None:
        assert self._kept is not None  # received before
        (a, g), made = self._kept, self._made
        self._kept = self._made = None
        if "bias" in self._views:
            add_weighted(g.sum(1), factors, self._views["bias"])
        if "weight" not in self._views:
            return
        if made is not None:
            add_weighted(made, factors, self._views["weight"])
            return
        weighted = factors.select(g) * factors.values[:, None, None]
        self._views["weight"].addmm_(weighted.flatten(0, 1).t(), factors.select(a).flatten(0, 1))

    def _weight_squares(self, a: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        count, positions, width = a.shape
        if positions == 1:
            return squared(a) * squared(g)
        size = width * g.shape[-1]
        if size <= positions * (width + g.shape[-1]) and count * size <= MAX_MADE:
            self._made = torch.bmm(g.transpose(1, 2), a)
            return squared(self._made)
        return _ghost_squares(a, g)


class ConvLayer(Layer):
    """nn.Conv1d and nn.Conv2d, whatever their padding, stride, dilation and groups."""

    def __init__(self, module: nn.Conv1d | nn.Conv2d, views: Views) -> None:
        self._module = module
        self._views = views
        self._kept: tuple[torch.Tensor, torch.Tensor] | None = None
        self._made: torch.Tensor | None = None
        self._bias: torch.Tensor | None = None

    def receive(self, inputs: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        count = len(gradient)
        squares = torch.zeros(count, dtype=torch.float64)
        self._kept = self._made = self._bias = None
        if "weight" in self._views:
            padded = self._padded(inputs)
            parts = (self._made_for(padded[rows], gradient[rows]) for rows in self._slices(count))
            if count * self._module.weight.numel() <= MAX_MADE:
                self._made = torch.cat(list(parts))
                squares += squared(self._made)
            else:
                squares += torch.cat([squared(part) for part in parts])
                self._kept = padded, gradient
        if "bias" in self._views:
            self._bias = gradient.flatten(2).sum(2)
            squares += squared(self._bias)
        return squares

    def add(self, factors: Factors) -> None:
        kept, made, bias = self._kept, self._made, self._bias
        self._kept = self._made = self._bias = None
        if bias is not None:
            add_weighted(bias, factors, self._views["bias"])
        if made is not None:
            add_weighted(made, factors, self._views["weight"])
        elif kept is not None:
            padded, gradient = map(factors.select, kept)
            weighted = gradient * factors.values.view(-1, *[1] * (gradient.ndim - 1))
            self._views["weight"].add_(self._whole(padded, weighted))

    def _padded(self, inputs: torch.Tensor) -> torch.Tensor:
        module = self._module
        amounts = module._reversed_padding_repeated_twice
        if not any(amounts):
            return inputs.contiguous()
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        return F.pad(inputs, amounts, mode=mode)

    def _slices(self, count: int) -> Iterator[slice]:
        """Examples whose gradients are made at once."""
        return _parts(count, max(1, MAX_MADE // self._module.weight.numel()))

    def _made_for(self, padded: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """Per-example gradients [n, out, in / groups, *kernel].

        They are one ordinary gradient, of a convolution whose groups are the examples (and within them the groups).
        """
        count, weight = len(gradient), self._module.weight
        apart = weight.new_empty(count * weight.shape[0], *weight.shape[1:])  # only its shape is looked at
        found = self._weight_gradient(
            padded.reshape(1, -1, *padded.shape[2:]),
            gradient.reshape(1, -1, *gradient.shape[2:]),
            apart,
            count * self._module.groups,
        )
        return found.view(count, *weight.shape)

    def _whole(self, padded: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """The ordinary gradient of the weight, for the sum of all examples."""
        return self._weight_gradient(padded, gradient, self._module.weight.detach(), self._module.groups)

    def _weight_gradient(
        self, padded: torch.Tensor, gradient: torch.Tensor, weight: torch.Tensor, groups: int
    ) -> torch.Tensor:
        module, dimensions = self._module, gradient.ndim - 2
        found: torch.Tensor = torch.ops.aten.convolution_backward(
            gradient,
            padded,
            weight,
            None,
            list(module.stride),
            [0] * dimensions,
            list(module.dilation),
            False,
            [0] * dimensions,
            groups,
            [False, True, False],
        )[1]
        return found


class EmbeddingLayer(Layer):
    """nn.Embedding on indices [n, ...]: an index that an example holds several times has one gradient."""

    def __init__(self, module: nn.Embedding, views: Views) -> None:
        self._padding = module.padding_idx
        self._views = views
        self._kept: tuple[torch.Tensor, torch.Tensor] | None = None

    def receive(self, inputs: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        index = inputs.reshape(len(inputs), -1)
        g = gradient.reshape(len(inputs), index.shape[1], -1)
        if self._padding is not None:
            g = g * (index != self._padding).unsqueeze(2)
        self._kept = index, g
        if index.shape[1] == 1:
            return squared(g)
        return _ghost_squares(None, g, index)

    def add(self, factors: Factors) -> None:
        assert self._kept is not None  # received before
        index, g = map(factors.select, self._kept)
        self._kept = None
        weighted = g * factors.values[:, None, None]
        self._views["weight"].index_add_(0, index.flatten(), weighted.flatten(0, 1))


class NormLayer(Layer):
    """nn.LayerNorm and nn.GroupNorm: their gradients are as small as their parameters, and are made."""

    def __init__(self, module: nn.LayerNorm | nn.GroupNorm, views: Views) -> None:
        self._module = module
        self._views = views
        self._made: dict[str, torch.Tensor] = {}

    def receive(self, inputs: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        squares = torch.zeros(len(gradient), dtype=torch.float64)
        if "weight" in self._views:
            self._made["weight"] = self._summed(gradient * self._normalised(inputs))
        if "bias" in self._views:
            self._made["bias"] = self._summed(gradient)
        for made in self._made.values():
            squares += squared(made)
        return squares

    def add(self, factors: Factors) -> None:
        for name, made in self._made.items():
            add_weighted(made, factors, self._views[name])
        self._made.clear()

    def _normalised(self, inputs: torch.Tensor) -> torch.Tensor:
        module = self._module
        if isinstance(module, nn.LayerNorm):
            return F.layer_norm(inputs, module.normalized_shape, eps=module.eps)
        return F.group_norm(inputs, module.num_groups, eps=module.eps)

    def _summed(self, product: torch.Tensor) -> torch.Tensor:
        """Over all positions but the example's and the parameter's."""
        if isinstance(self._module, nn.GroupNorm):
            return product.flatten(2).sum(2) if product.ndim > 2 else product
        shape = self._module.normalized_shape
        return product.reshape(len(product), -1, *shape).sum(1)


_RULES: dict[type[nn.Module], Any] = {
    nn.Linear: LinearLayer,
    nn.Conv1d: ConvLayer,
    nn.Conv2d: ConvLayer,
    nn.Embedding: EmbeddingLayer,
    nn.LayerNorm: NormLayer,
    nn.GroupNorm: NormLayer,
}


def layer_of(module: nn.Module, views: Views) -> Layer | None:
    """The rule for a module of exactly a known type, whose parameters all have their usual names and dtype."""
    rule = _RULES.get(type(module))
    names = {name for name, _ in module.named_parameters(recurse=False)}
    plain = all(parameter.dtype == torch.float32 for parameter in module.parameters(recurse=False))
    if rule is None or not plain or not names <= {"weight", "bias"} or list(module.children()):
        return None
    layer: Layer = rule(module, views)
    return layer


def _ghost_squares(
    a: torch.Tensor | None, g: torch.Tensor, index: torch.Tensor | None = None
) -> torch.Tensor:
    """Squared norms of sum_t a_t g_t^T, from the products of positions; for indices, a_s . a_t is their equality.

    What cancels leaves rounding errors of what was added: their bound is added on top, so that no norm comes
    out too small.
    """
    count, positions, _ = g.shape
    rows = max(1, _MAX_SCRATCH // (positions * positions))
    found = []
    for part in _parts(count, rows):
        products = torch.bmm(g[part], g[part].transpose(1, 2))
        if a is not None:
            products *= torch.bmm(a[part], a[part].transpose(1, 2))
        elif index is not None:
            products *= index[part].unsqueeze(1) == index[part].unsqueeze(2)
        flat = products.flatten(1).to(torch.float64)
        found.append(flat.sum(1).clamp_(min=0) + _ROUNDING * flat.abs().sum(1))
    return torch.cat(found)


def _parts(count: int, rows: int) -> Iterator[slice]:
    for start in range(0, count, rows):
        yield slice(start, start + rows)

"""A simplified step is the step, to the bit, with less in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from fedge import Task
from fedge_sim.engines import model as many
from fedge_sim.engines.model import StackedModel
from fedge_sim.engines.pool import Filled
from fedge_sim.engines.trace import IN_PARTS, changes_arguments, simplified, with_short_norms

MODELS: dict[str, tuple[Callable[[], nn.Module], Any, torch.dtype]] = {
    "linear": (lambda: nn.Linear(6, 3), F.cross_entropy, torch.int64),
    "perceptron": (
        lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)),
        F.cross_entropy,
        torch.int64,
    ),
    "normalised": (
        lambda: nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.GELU(), nn.Linear(5, 3)),
        F.cross_entropy,
        torch.int64,
    ),
    "convolution": (
        lambda: nn.Sequential(
            nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)
        ),
        F.cross_entropy,
        torch.int64,
    ),
    "in place": (
        lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 3)),
        F.cross_entropy,
        torch.int64,
    ),
    "regression": (lambda: nn.Sequential(nn.Linear(6, 1), nn.Flatten(0)), F.mse_loss, torch.float32),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_simplified_step_gives_the_same_bits(name: str, monkeypatch: pytest.MonkeyPatch):
    model, loss, dtype = MODELS[name]
    task = Task(model=model, data=lambda site: (None, None), loss=loss)
    generator = torch.Generator().manual_seed(4)
    steps: dict[bool, tuple[Any, int]] = {}
    for plain in (True, False):
        monkeypatch.setattr(many, "simplified", (lambda traced, device: traced) if plain else simplified)
        made = StackedModel(task, seed=1)
        stack = torch.randn(4, made.size, generator=torch.Generator().manual_seed(1))
        inputs = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(2))
        targets = (torch.rand(4, 5, generator=torch.Generator().manual_seed(3)) * 3).to(dtype)
        weights = torch.ones(4, 5)
        weights[2, 3:] = 0.0
        arguments = made.views(stack), Filled(inputs, targets, weights)
        made.step(*arguments)
        (step,) = made._steps.values()
        again = [torch.randn(each.shape, generator=generator.manual_seed(9)) for each in arguments[0]]
        slopes, losses = made.step(again, Filled(inputs.flip(0), targets.flip(0), weights))
        steps[plain] = [*slopes, losses], len(step.__self__.graph.nodes)  # type: ignore[attr-defined]  # it is a graph's module's
    for one, other in zip(steps[True][0], steps[False][0], strict=True):
        assert torch.equal(one, other)
    assert steps[False][1] < 0.85 * steps[True][1] or name == "in place"


def graph(function: Callable[..., torch.Tensor], *arguments: torch.Tensor) -> torch.fx.GraphModule:
    return make_fx(function)(*arguments)  # type: ignore[no-any-return]  # torch does not say


def operations(traced: torch.fx.GraphModule) -> list[str]:
    return [str(node.target) for node in traced.graph.nodes if node.op == "call_function"]


def test_what_only_looks_the_same_is_kept():
    """Numbers of other types, other axes, other shapes, and what changes its argument."""

    def changes(rows: torch.Tensor) -> torch.Tensor:
        own = rows.clone()
        own.add_(1.0)
        again = rows.clone()
        return own + again + rows.transpose(0, 1).transpose(0, 1) * 1 + (rows * 1.5).view(3, 3).expand(3, 3)

    rows = torch.arange(9.0).reshape(3, 3)
    before = changes(rows)
    made = simplified(graph(changes, rows))
    assert torch.equal(made(rows), before)
    assert torch.equal(made(rows + 1), changes(rows + 1))

    def axes(cube: torch.Tensor) -> torch.Tensor:
        return cube.transpose(0, 1).transpose(1, 2) + cube.transpose(0, 2).transpose(2, 0)

    cube = torch.arange(8.0).reshape(2, 2, 2)
    assert torch.equal(simplified(graph(axes, cube))(cube), axes(cube))
    assert operations(simplified(graph(axes, cube))).count("aten.transpose.int") == 2


@pytest.mark.parametrize("classes", [1, 2, 10, 64, 65, 200])
@pytest.mark.parametrize("axis", [1, 2])
@pytest.mark.parametrize("scale", [1.0, 80.0, 1e30])
def test_a_log_softmax_in_parts_is_torchs_own_to_rounding(classes: int, axis: int, scale: float):
    """Few classes are in parts, more are not."""
    generator = torch.Generator().manual_seed(classes)
    shape = (3, classes, 4) if axis == 1 else (3, 4, classes)
    values = torch.randn(shape, generator=generator) * scale
    slope = torch.randn(shape, generator=generator)

    def both(values: torch.Tensor, slope: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found, back = torch.func.vjp(lambda inner: F.log_softmax(inner, axis), values)
        return found, back(slope)[0]

    traced = make_fx(both, IN_PARTS)(values, slope)
    names = {str(node.target) for node in traced.graph.nodes}
    assert ("aten._log_softmax.default" in names) == (classes > 64)
    for mine, own in zip(traced(values, slope), both(values, slope), strict=True):
        assert torch.allclose(mine, own, rtol=1e-5, atol=1e-5 * min(scale, 80.0))


def test_what_is_not_finite_is_so_in_parts_too():
    rows = torch.tensor([[1.0, torch.nan, 2.0], [torch.inf, 1.0, 2.0], [-torch.inf, 1.0, 2.0]])
    traced = make_fx(lambda inner: F.log_softmax(inner, 1), IN_PARTS)(rows)
    assert torch.allclose(traced(rows), F.log_softmax(rows, 1), equal_nan=True)


def norms(column: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(torch.bmm(column, row).flatten(1), dim=1)


@pytest.mark.parametrize(("inner", "made"), [(1, 0), (2, 1)], ids=["a column and a row", "wider"])
def test_the_norm_of_a_column_times_a_row_is_had_without_their_product(inner: int, made: int):
    left, right = torch.randn(7, 5, inner), torch.randn(7, inner, 4)
    found = with_short_norms(graph(norms, left, right))
    assert operations(found).count("aten.bmm.default") == made
    assert torch.allclose(found(left, right), norms(left, right))


def test_norms_over_several_products_need_them():
    def together(column: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
        return torch.linalg.vector_norm(torch.bmm(column, row).view(2, -1), dim=1)

    left, right = torch.randn(6, 5, 1), torch.randn(6, 1, 4)
    assert torch.equal(with_short_norms(graph(together, left, right))(left, right), together(left, right))


@pytest.mark.parametrize(
    ("function", "changes"),
    [
        (lambda rows: rows.add_(1), True),
        (lambda rows: rows[:2].t().mul_(2), True),
        (lambda rows: (rows + 1).t().mul_(2), False),
        (lambda rows: rows.sum(0).unsqueeze_(0), False),
        (lambda rows: rows * 2, False),
    ],
    ids=["an argument", "a view of it", "a view of what was made", "what was made", "nothing"],
)
def test_whether_arguments_are_changed_is_seen_in_what_was_traced(
    function: Callable[..., torch.Tensor], changes: bool
):
    assert changes_arguments(graph(function, torch.randn(3, 4))) is changes

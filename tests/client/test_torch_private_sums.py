"""Clipped sums: however they are computed, they are those of one example at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.data import TensorDataset

from fedge.errors import RefusedError, TaskError
from fedge.refusal import RefusalCode
from fedge_client.torch.batches import Batches
from fedge_client.torch.flat import FlatModule
from fedge_client.torch.private import layers
from fedge_client.torch.private.admission import check_private
from fedge_client.torch.private.book_keeping import BookKeeping
from fedge_client.torch.private.choice import choose
from fedge_client.torch.private.clipping import Subject, UnsuitedError
from fedge_client.torch.private.general import PerExample
from fedge_client.torch.private.group_norm import group_norm_for_batch_norm
from fedge_client.torch.private.single import OneByOne
from fedge_client.torch.seeded import GlobalRandomness

Loss = Callable[[Any, Any], torch.Tensor]


class Residual(nn.Module):
    """Changes in place what came out of a layer, and adds it to what went in."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.first(x)
        hidden.relu_()
        return self.second(x + hidden)


class Scalar(nn.Module):
    """A 0-d parameter of its own, which no rule of ours knows."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.layer(torch.tanh(self.layer(x)))))


class Tied(nn.Module):
    """The embedding is used a second time, where no hook sees it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.embedding(x).mean(1) @ self.embedding.weight.t()


class Words(nn.Module):
    def __init__(self, padding: int | None = None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 5, padding_idx=padding)
        self.norm, self.mix, self.last = nn.LayerNorm(5), nn.Linear(5, 4, bias=False), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.mix(self.norm(self.embedding(x)))).mean(1))


def images(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(3))


def frozen() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    model[0].bias.requires_grad_(False)
    return model


VECTORS = (lambda n: torch.randn(n, 6), (3,))
IMAGES = (lambda n: torch.randn(n, 4, 7, 8), (3,))
SIGNALS = (lambda n: torch.randn(n, 4, 12), (3,))
TEXTS = (lambda n: torch.randint(0, 7, (n, 9)), (3,))

MODELS: dict[str, tuple[Callable[[], nn.Module], Any, bool]] = {
    "linear": (lambda: nn.Linear(6, 3), VECTORS, True),
    "mlp": (lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 3)), VECTORS, True),
    "no bias": (
        lambda: nn.Sequential(nn.Linear(6, 8, bias=False), nn.Tanh(), nn.Linear(8, 3)),
        VECTORS,
        True,
    ),
    "partly frozen": (frozen, VECTORS, True),
    "residual": (Residual, VECTORS, True),
    "dropout": (lambda: nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.0), nn.Linear(8, 3)), VECTORS, True),
    "conv": (lambda: images(nn.Conv2d(4, 5, 3), nn.ReLU(), nn.MaxPool2d(2)), IMAGES, True),
    "conv padded": (lambda: images(nn.Conv2d(4, 5, 3, padding=2, stride=2)), IMAGES, True),
    "conv same": (lambda: images(nn.Conv2d(4, 5, (3, 2), padding="same")), IMAGES, True),
    "conv dilated": (lambda: images(nn.Conv2d(4, 6, 2, dilation=(2, 3), groups=2)), IMAGES, True),
    "conv circular": (lambda: images(nn.Conv2d(4, 5, 3, padding=1, padding_mode="circular")), IMAGES, True),
    "depthwise": (lambda: images(nn.Conv2d(4, 8, 3, groups=4), nn.Conv2d(8, 3, 1)), IMAGES, True),
    "conv1d": (lambda: images(nn.Conv1d(4, 5, 3, stride=2, padding=1), nn.ReLU()), SIGNALS, True),
    "group norm": (lambda: images(nn.Conv2d(4, 6, 3), nn.GroupNorm(3, 6), nn.ReLU()), IMAGES, True),
    "words": (Words, TEXTS, True),
    "padded words": (lambda: Words(padding=2), TEXTS, True),
    "scalar": (lambda: nn.Sequential(nn.Linear(6, 3), Scalar()), VECTORS, False),
    "twice": (Twice, VECTORS, False),
    "conv3d": (
        lambda: images(nn.Conv3d(2, 3, 2)),
        (lambda n: torch.randn(n, 2, 3, 4, 3), (3,)),
        False,
    ),
}


def subject(model: Callable[[], nn.Module], inputs: Any, loss: Loss = cross_entropy) -> Subject:
    with GlobalRandomness().seeded(5):
        module = model()
        module.train()
        with torch.no_grad():
            module(inputs)  # lazy layers take shape
    return Subject(FlatModule(module), module, loss)


def batch(make: Any, count: int) -> tuple[Any, torch.Tensor]:
    with GlobalRandomness().seeded(count):
        return make[0](count), torch.randint(0, make[1][0], (count,))


def one_at_a_time(of: Subject, inputs: Any, target: Any, clip: float) -> torch.Tensor:
    """The definition: each example's gradient by autograd, scaled, added."""
    out = torch.zeros(of.flat.layout.trainable_size, dtype=torch.float64)
    parameters = [parameter for parameter, _ in of.places()]
    for at in range(len(target)):
        loss = of.loss(of.forward(inputs[at : at + 1]), target[at : at + 1])
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        flat = torch.cat(
            [
                torch.zeros(p.numel()) if g is None else g.reshape(-1)
                for p, g in zip(parameters, found, strict=True)
            ]
        ).to(torch.float64)
        norm = flat.norm()
        if torch.isfinite(norm):
            out += flat * min(1.0, clip / float(norm)) if norm else flat
    return out


def opacus_is_wrong(module: nn.Module) -> bool:
    """What Opacus 1.6 cannot do, or does wrong without a word: see the test of the choice below."""
    return isinstance(module, Residual) or any(
        getattr(part, "padding_idx", None) is not None or getattr(part, "padding_mode", "zeros") != "zeros"
        for part in module.modules()
    )


def ways(of: Subject, fast: bool) -> list[Any]:
    found: list[Any] = [OneByOne(of), *([] if opacus_is_wrong(of.flat.module) else [PerExample(of)])]
    keeping = BookKeeping.of(of)
    if fast:
        assert keeping is not None
        found.append(keeping)
    return found


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("count", [1, 2, 7])
@pytest.mark.parametrize("clip", [0.3, 1e6])
def test_clipped_sums_are_those_of_one_example_at_a_time(name, count, clip):
    model, make, fast = MODELS[name]
    inputs, target = batch(make, count)
    of = subject(model, inputs)
    expected = one_at_a_time(of, inputs, target, clip)
    for way in ways(of, fast):
        of.flat.zero_gradient()
        losses = way.add(inputs, target, clip)
        scale = float(expected.abs().max())
        torch.testing.assert_close(of.flat.gradient.double(), expected, rtol=1e-4, atol=2e-5 * scale)
        torch.testing.assert_close(losses, cross_entropy(of.forward(inputs), target, reduction="none"))


def test_sums_add_up_over_passes():
    inputs, target = batch(VECTORS, 6)
    of = subject(MODELS["mlp"][0], inputs)
    expected = one_at_a_time(of, inputs, target, 0.5)
    for way in ways(of, True):
        of.flat.zero_gradient()
        for rows in (slice(0, 1), slice(1, 4), slice(4, 6)):
            way.add(inputs[rows], target[rows], 0.5)
        torch.testing.assert_close(of.flat.gradient.double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_example_without_a_finite_gradient_adds_exactly_nothing(bad):
    inputs, target = batch(VECTORS, 4)
    of = subject(MODELS["mlp"][0], inputs)
    expected = one_at_a_time(of, inputs[1:], target[1:], 0.5)
    inputs[0, 2] = bad
    for way in ways(of, True):
        of.flat.zero_gradient()
        way.add(inputs, target, 0.5)
        torch.testing.assert_close(of.flat.gradient.double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("made", [True, False], ids=["gradients made", "gradients not made"])
@pytest.mark.parametrize("name", MODELS)
def test_a_batch_without_any_finite_gradient_adds_exactly_nothing(name, made, monkeypatch):
    if not made:
        monkeypatch.setattr(layers, "MAX_MADE", 0)
    model, make, fast = MODELS[name]
    inputs, target = batch(make, 3)
    of = subject(model, inputs, loss=lambda output, target: cross_entropy(output, target) * float("nan"))
    for way in ways(of, fast):
        of.flat.gradient.fill_(1)
        way.add(inputs, target, 0.5)
        assert bool((of.flat.gradient == 1).all())


def test_gradients_of_zero_stay_zero():
    inputs, target = batch(VECTORS, 3)
    of = subject(MODELS["mlp"][0], inputs, loss=lambda output, target: (output * 0).sum())
    for way in ways(of, True):
        of.flat.gradient.fill_(1)
        way.add(inputs, target, 0.5)
        assert bool((of.flat.gradient == 1).all())


@pytest.mark.parametrize("size", [1e-20, 1.0, 1e15])
def test_no_example_moves_the_sum_by_more_than_the_clip(size):
    inputs, target = batch(VECTORS, 5)
    of = subject(MODELS["mlp"][0], inputs, loss=lambda output, target: (output * size).sum())
    for way in ways(of, True):
        sums = []
        for rows in (slice(0, 5), slice(1, 5)):
            of.flat.zero_gradient()
            way.add(inputs[rows], target[rows], 0.25)
            sums.append(of.flat.gradient.double().clone())
        assert float((sums[0] - sums[1]).norm()) <= 0.25 * (1 + 1e-5)


def test_a_loss_that_mixes_its_batch_is_only_ever_given_one_example():
    """A weighted mean, whose weights are normalised over the batch, and a contrast with the batch's mean."""
    inputs, target = batch(VECTORS, 5)
    weights = torch.tensor([0.1, 5.0, 1.0])

    def weighted(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return cross_entropy(output, target, weight=weights) + (output - output.mean(0)).square().mean()

    of = subject(MODELS["mlp"][0], inputs, loss=weighted)
    expected = one_at_a_time(of, inputs, target, 0.5)
    for way in ways(of, True):
        of.flat.zero_gradient()
        way.add(inputs, target, 0.5)
        torch.testing.assert_close(of.flat.gradient.double(), expected, rtol=1e-4, atol=1e-6)


def test_a_loss_that_looks_at_values_is_called_in_a_loop():
    inputs, target = batch(VECTORS, 4)

    def looking(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return cross_entropy(output, target) * (2.0 if float(output.detach().sum()) > 0 else 1.0)

    of = subject(MODELS["mlp"][0], inputs, loss=looking)
    expected = one_at_a_time(of, inputs, target, 0.5)
    for way in ways(of, True):
        of.flat.zero_gradient()
        way.add(inputs, target, 0.5)
        torch.testing.assert_close(of.flat.gradient.double(), expected, rtol=1e-4, atol=1e-6)


def test_nothing_is_left_on_the_module():
    inputs, target = batch(VECTORS, 3)
    of = subject(MODELS["mlp"][0], inputs)
    module = of.flat.module
    before = [(name, p.data_ptr(), id(p.grad)) for name, p in module.named_parameters()]
    for way in ways(of, True):
        way.add(inputs, target, 1.0)
    assert [(name, p.data_ptr(), id(p.grad)) for name, p in module.named_parameters()] == before
    assert all(p.requires_grad and not hasattr(p, "grad_sample") for p in module.parameters())
    assert not any(m._forward_hooks or m._backward_hooks for m in module.modules())


def test_what_is_changed_in_place_behind_a_layer_is_noticed():
    class Changes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = torch.tanh(self.first(x))
            out = self.second(hidden)
            with torch.no_grad():
                hidden.mul_(2)
            return out

    inputs, target = batch(VECTORS, 3)
    way = BookKeeping.of(subject(Changes, inputs))
    assert way is not None
    with pytest.raises(UnsuitedError, match="changed behind it"):
        way.add(inputs, target, 1.0)


# The choice.


def chosen(model: Callable[[], nn.Module], make: Any, count: int = 4, loss: Loss = cross_entropy) -> Any:
    inputs, target = batch(make, count)
    of = subject(model, inputs, loss)
    module = of.flat.module

    def forward(inputs: Any) -> Any:  # as the trainer's own
        try:
            return module(inputs)
        except RuntimeError as error:
            raise TaskError("the model's forward failed") from error

    of = replace(of, forward=forward)
    return choose(of, Batches(TensorDataset(inputs, target), "full")).together


@pytest.mark.parametrize("name", MODELS)
def test_the_fast_way_is_chosen_where_it_is_right(name):
    model, make, fast = MODELS[name]
    assert isinstance(chosen(model, make), BookKeeping if fast else PerExample)


@pytest.mark.parametrize("name", ["residual", "conv circular", "padded words"])
def test_where_opacus_is_wrong_it_is_not_chosen(name, monkeypatch):
    model, make, _ = MODELS[name]
    monkeypatch.setattr(BookKeeping, "of", lambda _: None)
    assert isinstance(chosen(model, make), OneByOne)


@pytest.mark.parametrize("name", ["tied", "attention", "lstm"])
def test_what_no_hook_can_follow_is_done_one_example_at_a_time(name):
    model, make = {
        "tied": (Tied, (TEXTS[0], (7,))),
        "attention": (Attention, TEXTS),
        "lstm": (Recurrent, (lambda n: torch.randn(n, 5, 6), (3,))),
    }[name]
    assert isinstance(chosen(model, make), OneByOne)


def test_one_example_is_enough_to_choose():
    assert isinstance(chosen(MODELS["mlp"][0], VECTORS, 1), BookKeeping)


class BatchMean(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x - x.mean(0)) if self.training else self.layer(x)


class Transposed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x).t()


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.last = nn.Embedding(7, 4), nn.Linear(4, 3)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(x)
        return self.last(self.attention(hidden, hidden, hidden, need_weights=False)[0].mean(1))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cells, self.last = nn.LSTM(6, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.cells(x)[0][:, -1])


@pytest.mark.parametrize(
    ("model", "make", "says"),
    [
        (lambda: images(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)), IMAGES, "group_norm_for_batch_norm"),
        (
            lambda: images(nn.Conv2d(4, 4, 3), nn.InstanceNorm2d(4, track_running_stats=True)),
            IMAGES,
            "track_running_stats=False",
        ),
        (BatchMean, VECTORS, "depends on the other examples"),
        (Transposed, VECTORS, "one row for each"),
        (
            lambda: nn.Sequential(nn.Embedding(7, 3, max_norm=1.0), nn.Flatten(), nn.Linear(27, 3)),
            TEXTS,
            "max_norm",
        ),
    ],
    ids=["batch norm", "running stats", "batch mean", "transposed", "max norm"],
)
def test_a_model_that_cannot_be_trained_privately_is_refused_with_the_remedy(model, make, says):
    with pytest.raises(RefusedError, match=says) as error:
        chosen(model, make)
    assert error.value.refusal.code == RefusalCode.MODEL_NOT_PRIVATE


def test_group_norm_in_place_of_batch_norm_is_the_remedy():
    def repaired() -> nn.Module:
        return group_norm_for_batch_norm(images(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU()))

    assert isinstance(chosen(repaired, IMAGES), BookKeeping)
    names = [name for name, _ in nn.Sequential(nn.Linear(1, 8), nn.BatchNorm1d(8)).named_parameters()]
    model = group_norm_for_batch_norm(nn.Sequential(nn.Linear(1, 8), nn.BatchNorm1d(8)))
    check_private(model)
    assert [name for name, _ in model.named_parameters()] == names


def test_a_regression_with_outputs_of_its_own_shape_works():
    inputs = torch.randn(4, 6)
    of = subject(lambda: nn.Linear(6, 2), inputs, mse_loss)
    way = choose(of, Batches(TensorDataset(inputs, torch.randn(4, 2)), "full")).together
    assert isinstance(way, BookKeeping)

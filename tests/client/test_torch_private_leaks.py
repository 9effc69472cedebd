"""What could tell of an example beside its gradient: who draws which random numbers, in which row it lies, and
that work fails."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy, cross_entropy
from torch.utils.data import Dataset, Subset, TensorDataset

from fedge import Task
from fedge.errors import FedgeError, RefusedError, TaskError
from fedge.privacy.example import ExampleLevel
from fedge.privacy.secure import SecureSource
from fedge.run import Work
from fedge.vector import Array
from fedge_client.local import Outcome
from fedge_client.torch.batches import Batches
from fedge_client.torch.flat import FlatModule
from fedge_client.torch.framework import framework
from fedge_client.torch.private.choice import choose
from fedge_client.torch.private.clipping import Subject
from fedge_client.torch.private.layers import LinearLayer
from fedge_client.torch.private.single import OneByOne
from fedge_client.torch.private.steps import Private
from fedge_client.torch.seeded import GlobalRandomness
from fedge_client.torch.trainer import Trainer

CLIP = 0.5
QUIET = ExampleLevel(CLIP, 1e-6, evaluation_noise_multiplier=1e-6)
WORK = Work(steps=1, batch_size="full", learning_rate=1.0)


def private(key: int = 0) -> Private:
    return Private(QUIET, SecureSource(key.to_bytes(32, "little")))


def data(count: int) -> TensorDataset:
    inputs = torch.randn(count, 4, generator=torch.Generator().manual_seed(0))
    return TensorDataset(inputs, inputs[:, :3].argmax(1))


def task(model: Callable[[], nn.Module], loss: Any = cross_entropy, **metrics: Any) -> Task:
    return Task(model=model, data=lambda site: (None, None), loss=loss, metrics=metrics)


def trained(of: Task, dataset: Any, how: Private, *, seed: int = 3, model: Array | None = None) -> Array:
    first = framework.initial_model(of, seed=1).vector if model is None else model
    out = np.zeros_like(first)
    Trainer(of, seed=1).train(first, dataset, WORK, seed=seed, out=out, private=how)
    return out


def judged(of: Task, dataset: Any, how: Private) -> Outcome:
    return Trainer(of, seed=1).evaluate(framework.initial_model(of, seed=1).vector, dataset, private=how)


# Random numbers.


def drawn_with(source: SecureSource) -> tuple[Any, ...]:
    with GlobalRandomness().drawn(source):
        found = torch.rand(700).tolist(), np.random.rand(3).tolist(), random.random()
    return tuple(map(str, found))


def test_random_numbers_of_private_work_are_secret_and_follow_from_its_source_alone():
    source = SecureSource(bytes(32))
    one, two = drawn_with(source), drawn_with(source)
    assert all(first != second for first, second in zip(one, two, strict=True))
    assert drawn_with(SecureSource(bytes(32))) == one
    before = torch.get_rng_state(), random.getstate()
    drawn_with(source)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


def test_more_of_the_source_than_a_seed_of_torch_holds_decides_its_numbers(monkeypatch: pytest.MonkeyPatch):
    """Of 32 bits, somebody could try them all."""
    words = np.zeros((3, 8), np.uint32)
    found = set()
    for word in range(8):
        words[:] = 0
        words[:, word] = 1 << 31
        source = SecureSource(bytes(32))
        parts = iter(words)
        monkeypatch.setattr(SecureSource, "uint32", lambda self, count, parts=parts: next(parts))
        found.add(drawn_with(source))
    assert len({numbers[0] for numbers in found}) == 8


@pytest.mark.parametrize("what", ["train", "gradient", "evaluate"])
def test_what_a_dropout_leaves_out_does_not_follow_from_what_a_coordinator_knows(what: str):
    seen: list[float] = []

    class Drawing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(float(torch.rand(1)) + float(np.random.rand()) + random.random())
            return self.layer(x)

    of = task(Drawing)
    for key in (1, 2):
        trainer, model = Trainer(of, seed=1), framework.initial_model(of, seed=1).vector
        trainer.prepare_private(model, data(8))
        trainer.prepare_private_evaluation(model, data(8))
        seen.append(0.0)
        out = np.zeros_like(model)
        match what:
            case "train":
                trainer.train(model, data(8), WORK, seed=3, out=out, private=private(key))
            case "gradient":
                trainer.gradient(model, data(8), WORK, seed=3, step=0, out=out, private=private(key))
            case "evaluate":
                trainer.evaluate(model, data(8), private=private(key))
    first, second = (seen.index(0.0), len(seen) - 1 - seen[::-1].index(0.0))
    assert seen[first + 1] != seen[second + 1]


# Rows.


class Sorting(nn.Module):
    """Puts its examples in an order of its own, and what comes out back."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.within = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        order = x[:, 0].argsort()
        return self.within(torch.tanh(self.before(x))[order])[order.argsort()]


def test_a_model_that_moves_rows_about_is_not_clipped_by_hooks_that_take_rows_for_examples():
    inputs, target = data(8).tensors
    module = Sorting()
    subject = Subject(FlatModule(module), module, cross_entropy)
    assert isinstance(choose(subject, Batches(TensorDataset(inputs, target), "full")).together, OneByOne)


@pytest.mark.parametrize("left_out", range(8))
def test_whichever_example_of_a_model_that_moves_rows_is_left_out_the_sum_moves_by_a_clip(left_out: int):
    inputs, target = data(8).tensors
    inputs = inputs * torch.logspace(-2, 2, 8)[:, None]
    kept = torch.arange(8) != left_out
    whole = 8 * trained(task(Sorting), TensorDataset(inputs, target), private(1))
    rest = 7 * trained(task(Sorting), TensorDataset(inputs[kept], target[kept]), private(1))
    assert np.linalg.norm(whole - rest) <= CLIP * (1 + 1e-3)


@pytest.mark.parametrize("clip", [1e-7, 1.0])
@pytest.mark.parametrize("size", [1e20, 1e30, 1e37, 3e38])
def test_not_even_a_gradient_at_the_end_of_float32_adds_more_than_the_clip(clip: float, size: float):
    """Factors so small that float32 holds them with few bits are rounded to up to twice as much."""
    module = nn.Linear(4, 1, bias=False)
    subject = Subject(FlatModule(module), module, lambda output, target: (output * size).sum())
    inputs, target = torch.full((1, 4), 0.3), torch.zeros(1, 1)
    ways = choose(subject, Batches(TensorDataset(torch.ones(2, 4) * 1e-30, torch.zeros(2, 1)), "full"))
    for way in (ways.together, ways.alone):
        subject.flat.zero_gradient()
        way.add(inputs, target, clip)
        assert float(subject.flat.gradient.double().norm()) <= clip * (1 + 1e-5)


# Failures.


def loss_in_bounds(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Fails where an output is not finite, as torch's own does."""
    return binary_cross_entropy(torch.sigmoid(output[:, 0]), (target > 0).float())


class Unreadable(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """A file of one of the examples is broken."""

    def __init__(self, of: TensorDataset, broken: int) -> None:
        self.of, self.broken = of, broken

    def __len__(self) -> int:
        return len(self.of)

    def __getitem__(self, at: int) -> tuple[torch.Tensor, torch.Tensor]:
        if at == self.broken:
            raise OSError("patient-4711.dcm is broken")
        return self.of[at]  # type: ignore[return-value]  # two tensors


def linear() -> nn.Module:
    return nn.Linear(4, 3)


@pytest.mark.parametrize("gradient", [False, True])
def test_an_example_on_which_the_loss_fails_adds_nothing_and_nothing_tells(gradient: bool):
    """Weights at which only a certain example overflows would ask whether it is there."""
    inputs, target = data(9).tensors
    inputs[8] = float("inf")
    of = task(linear, loss_in_bounds)
    first, found = framework.initial_model(of, seed=1).vector, []
    for rows in (slice(0, 8), slice(0, 9)):
        trainer, out = Trainer(of, seed=1), np.zeros_like(first)
        dataset = TensorDataset(inputs[rows], target[rows])
        if gradient:
            done = trainer.gradient(first, dataset, WORK, seed=3, step=0, out=out, private=private(1))
        else:
            done = trainer.train(first, dataset, WORK, seed=3, out=out, private=private(1))
        assert (done.num_examples, dict(done.metrics)) == (1, {})
        found.append(out * len(dataset))
    np.testing.assert_allclose(found[0], found[1], atol=1e-5)


def test_an_example_that_cannot_be_read_adds_nothing():
    whole, kept = data(9), torch.arange(9) != 8
    without = TensorDataset(whole.tensors[0][kept], whole.tensors[1][kept])
    one = trained(task(linear), Unreadable(whole, 8), private(1)) * 9
    np.testing.assert_allclose(one, trained(task(linear), without, private(1)) * 8, atol=1e-5)


def test_where_every_example_fails_what_leaves_is_noise():
    def failing(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if output.abs().max() > 1e3:
            raise ValueError("17 is too much")
        return cross_entropy(output, target)

    of = task(linear, failing)
    trainer, first = Trainer(of, seed=1), framework.initial_model(of, seed=1).vector
    trainer.prepare_private(first, data(8))
    out = np.zeros_like(first)
    loud = replace(private(1), level=replace(QUIET, noise_multiplier=2.0))
    trainer.train(first + 1e6, data(8), WORK, seed=3, out=out, private=loud)
    assert out.all()
    assert np.linalg.norm(out) < 8


def test_evaluations_count_what_fails_as_zero():
    inputs, target = data(80).tensors
    inputs[70] = float("inf")

    def right(output: torch.Tensor, target: torch.Tensor) -> float:
        if not torch.isfinite(output).all():
            raise ValueError("not finite")
        return 1.0

    of = task(linear, loss_in_bounds, right=right)
    found = judged(of, TensorDataset(inputs, target), private(1)).metrics
    assert found["right"] == pytest.approx(79 / 80, abs=1e-4)
    rows = torch.arange(80) != 70
    clean = judged(of, TensorDataset(inputs[rows], target[rows]), private(1)).metrics
    assert found["loss"] == pytest.approx(clean["loss"] * 79 / 80, abs=1e-4)


def test_a_metric_or_a_loss_that_never_works_is_found_out_before_any_order_is_done():
    def broken(output: torch.Tensor, target: torch.Tensor) -> float:
        raise ValueError("always")

    with pytest.raises(TaskError, match="broken"):
        judged(task(linear, broken=broken), data(8), private(1))
    with pytest.raises(TaskError, match="loss"):
        trained(task(linear, broken), data(8), private(1))


# Models that mix examples where a first look does not show it.


class HiddenMean(nn.Module):
    """Takes the batch's mean away, behind a last layer that begins at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.head = nn.Linear(4, 5), nn.Linear(5, 3)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.before(x)
        return self.head(hidden - hidden.mean(0))


class Backwards(nn.Module):
    """Each row knows those before it: the first one looks as if it were alone."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x.cumsum(0))


class MeanInEvaluation(HiddenMean):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.before(x)
        return self.head(hidden if self.training else hidden - hidden.mean(0))


@pytest.mark.parametrize("model", [HiddenMean, Backwards])
def test_a_model_that_mixes_examples_is_refused_wherever_it_does(model: type[nn.Module]):
    with pytest.raises(RefusedError, match="depends on the other examples"):
        trained(task(model), data(8), private())


def test_a_model_that_mixes_examples_while_it_is_judged_is_refused():
    trained(task(MeanInEvaluation), data(8), private())
    with pytest.raises(RefusedError, match="depends on the other examples"):
        judged(task(MeanInEvaluation), data(8), private())


def test_what_a_single_example_could_not_show_is_looked_for_when_there_are_more():
    """In a simulation one trainer serves many clients, and the first may have one example."""
    of = task(HiddenMean)
    trainer, first = Trainer(of, seed=1), framework.initial_model(of, seed=1).vector
    out = np.zeros_like(first)
    trainer.train(first, data(1), WORK, seed=3, out=out, private=private())
    with pytest.raises(RefusedError, match="depends on the other examples"):
        trainer.train(first, data(8), WORK, seed=3, out=out, private=private())


class Remembering(nn.Module):
    """Carries what it has seen from one batch to the next, where the state dict does not show it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.register_buffer("seen", torch.zeros(4), persistent=False)
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        offset = self.seen.clone()
        if torch.is_grad_enabled():
            self.seen += x.detach().sum(0)
            self.calls = self.calls + 1
        return self.layer(x + offset)


def test_nothing_of_one_step_gets_into_the_next_but_by_what_has_noise():
    plain, remembering = (
        Trainer(task(model), seed=1) for model in (lambda: nn.Sequential(nn.Linear(4, 3)), Remembering)
    )
    work, found = Work(steps=4, batch_size="full", learning_rate=1.0), []
    for trainer in (plain, remembering):
        out = np.zeros(15, np.float32)
        model = np.linspace(-1, 1, 15, dtype=np.float32)
        trainer.train(model, data(130), work, seed=3, out=out, private=private())
        found.append(out)
    np.testing.assert_allclose(found[0], found[1], atol=1e-5)


class Squeezing(nn.Module):
    """Works with any batch but of one."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x.unsqueeze(1).transpose(1, 2).squeeze())


def test_a_model_that_cannot_take_a_single_example_is_refused_before_it_is_trained_on_nothing():
    with pytest.raises(FedgeError):
        trained(task(Squeezing), data(8), private())


class Casting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.layer(x).float()


def test_a_model_in_mixed_precision_is_trained_if_not_the_fast_way():
    assert trained(task(Casting), data(8), private()).any()


def test_an_example_that_a_subset_holds_twice_is_refused():
    twice = Subset(data(8), [0, 1, 2, 1])
    for use in (trained, judged):
        with pytest.raises(TaskError, match="comes again"):
            use(task(linear), twice, private())
    assert trained(task(linear), Subset(data(8), [5, 1, 2]), private()).any()


def test_a_pass_that_fails_half_way_is_not_counted_twice(monkeypatch: pytest.MonkeyPatch):
    """Memory that runs out in the second layer, when the first one's gradients are added."""
    of = task(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))
    expected, added = trained(of, data(8), private(1)), []

    def add(self: Any, factors: Any) -> None:
        added.append(self)
        if len(added) == 10:  # the first eight are of the trial
            raise RuntimeError("can't allocate memory")
        original(self, factors)

    original = LinearLayer.add
    monkeypatch.setattr(LinearLayer, "add", add)
    np.testing.assert_allclose(trained(of, data(8), private(1)), expected, atol=1e-4)
    assert len(added) == 10


@pytest.mark.parametrize("rate", [1e-4, 0.5])
def test_a_dropout_however_rare_is_no_reason_to_refuse_a_model(rate: float):
    of = task(lambda: nn.Sequential(nn.Linear(4, 5), nn.Dropout(rate), nn.Linear(5, 3)))
    assert trained(of, data(8), private()).any()

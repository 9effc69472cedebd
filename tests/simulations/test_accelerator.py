"""A stack on an accelerator is the stack in this machine's memory.

Where there is none, three things stand for it: a processor that is treated as one, torch's "lazy" device, which is real
and takes no tensor of another, and tensors that pretend to lie on one. With CUDA all of it is done there, too.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch
import torch._lazy.ts_backend
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated import RUNS, SPREAD_DEVICES, accuracy, config, data, perceptron, task
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.data import Subset, TensorDataset

from fedge import Site, Task
from fedge.errors import ConfigError
from fedge.exact import ExactSum, Term
from fedge.run import Work
from fedge_client.torch.batches import Batches
from fedge_client.torch.framework import framework
from fedge_sim import simulate, sweep
from fedge_sim.engines import chosen, pool, stacks
from fedge_sim.engines.accelerator import accelerator, memory, reproducible
from fedge_sim.engines.elsewhere import Fetched, mean_where_it_lies
from fedge_sim.engines.judge import Judge
from fedge_sim.engines.model import StackedModel
from fedge_sim.engines.pool import Filled, Part, Shelf, filler
from fedge_sim.engines.stack import OfBatches, trained

torch._lazy.ts_backend.init()

CUDA = ["cuda"] if torch.cuda.is_available() else []


def where(name: str) -> torch.device:
    return torch.device("cpu") if name == "cpu" else accelerator(name) or torch.device("cpu")


@pytest.fixture
def processor_as_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chosen, "accelerator", torch.device)


numbers = st.one_of(
    st.just(0.0),
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.sampled_from([-0.0, 1e-45, 3e38]),
)


@pytest.mark.parametrize("device", ["cpu", "lazy", *CUDA])
@given(
    rows=st.integers(1, 12).flatmap(
        lambda count: st.lists(st.lists(numbers, min_size=20, max_size=20), min_size=count, max_size=count)
    ),
    alike=st.booleans(),
)
@settings(max_examples=30, deadline=None)
def test_a_mean_that_is_made_where_the_vectors_lie_has_the_bits_of_the_exact_sum(
    device: str, rows: list[list[float]], alike: bool
):
    matrix = np.array(rows, np.float32)
    if alike:  # few columns, or none, where float64 rounds
        matrix[:, 2:] = matrix[:1, 2:]
    weights = [1 + 7 * at for at in range(len(rows))]
    expected = ExactSum(20)
    expected.add(*(Term(row, weight) for row, weight in zip(matrix, weights, strict=True)))
    found = mean_where_it_lies(torch.from_numpy(matrix).to(where(device)), weights)
    assert np.array_equal(found.view(np.uint32), expected.mean(sum(weights)).view(np.uint32))


@pytest.mark.parametrize("weights", [[1], [1, 0], [1, 1 << 29]], ids=["too few", "none", "too large"])
def test_a_mean_of_other_weights_is_refused(weights: list[int]):
    with pytest.raises(ValueError, match="expected 2 weights"):
        mean_where_it_lies(torch.ones(2, 3), weights)


RUNS = RUNS | {
    "not in turn": {
        "strategy": {"name": "sgd", "max_staleness": 4},
        "simulation": {"clients": 8, "devices": SPREAD_DEVICES},
    },
}


@pytest.mark.parametrize("tables", RUNS.values(), ids=RUNS)
def test_a_run_on_an_accelerator_has_the_bits_that_it_has_in_memory(
    tables: dict[str, Any], processor_as_accelerator: None, monkeypatch: pytest.MonkeyPatch
):
    here = simulate(config(**tables), task=task, engine="vectorised")
    made: list[torch.device | None] = []
    real = stacks.Stacks.__init__

    def noted(self: Any, *arguments: Any, device: torch.device | None = None, **named: Any) -> None:
        made.append(device)
        real(self, *arguments, device=device, **named)

    monkeypatch.setattr(stacks.Stacks, "__init__", noted)
    there = simulate(config(**tables), task=task, device="cpu")
    assert made == [torch.device("cpu")]
    assert there.engine == "vectorised"
    assert there.faults == here.faults
    assert [(row.clients, row.metrics) for row in there.history] == [
        (row.clients, row.metrics) for row in here.history
    ]
    assert np.array_equal(there.model.vector.view(np.uint32), here.model.vector.view(np.uint32))


@pytest.mark.parametrize("device", CUDA)
@pytest.mark.parametrize("tables", RUNS.values(), ids=RUNS)
def test_a_run_on_a_gpu_is_the_loops_and_has_the_same_bits_each_time(tables: dict[str, Any], device: str):
    here = simulate(config(**tables), task=task, engine="loop")
    there, again = (simulate(config(**tables), task=task, device=device) for _ in range(2))
    assert there.engine == "vectorised"
    assert np.allclose(there.model.vector, here.model.vector, rtol=1e-3, atol=1e-4)
    assert np.array_equal(there.model.vector, again.model.vector)


def test_vectors_that_somebody_waits_for_are_fetched_before_they_are_written_over():
    room = torch.arange(6.0).view(2, 3)
    rows = Fetched(room)
    first, second = rows
    assert (len(rows), len(first), second.nbytes) == (2, 3, 12)
    rows.keep()
    room.zero_()
    assert first[:].tolist() == [0.0, 1.0, 2.0]
    assert second[1:].tolist() == [4.0, 5.0]
    with pytest.raises(IndexError):
        rows[2]


def parts(*, apart: bool) -> list[Part]:
    """Of clients whose examples lie in tensors of their own, or in one for all."""
    sizes = [9, 8, 5]
    one = examples(sum(sizes))
    found = [Batches(examples(size) if apart else Subset(one, list(range(size))), 4) for size in sizes]
    assert [len(each.rows) for each in found] == sizes  # which is known from then on
    return [Part(each, at, 2 * each.per_epoch) for at, each in enumerate(found)]


def examples(size: int) -> TensorDataset:
    return TensorDataset(torch.randn(size, 6), torch.arange(size) % 3)


@pytest.mark.parametrize(
    "work", [Work(), Work(optimizer="adam", l1=0.1, l2=0.1, proximal=0.1)], ids=["sgd", "adam"]
)
@pytest.mark.parametrize(
    ("apart", "most"),
    [(False, None), (True, None), (True, 0)],
    ids=["one set", "sets", "one after the other"],
)
def test_all_that_a_step_looks_at_is_on_the_accelerator(
    apart: bool, most: int | None, work: Work, monkeypatch: pytest.MonkeyPatch
):
    """Where tensors only pretend to be, what mixes them with others is an error as on a GPU."""
    device = torch.device("lazy")
    model = StackedModel(task, seed=0, known_to_suit=True, device=device)
    members = parts(apart=apart)
    if most is not None:
        monkeypatch.setattr(pool, "MAX_POOL_BYTES", most)
    with FakeTensorMode(allow_non_fake_inputs=True):
        start, out = torch.zeros(model.size, device=device), torch.empty(3, model.size, device=device)
        batches = OfBatches(model, filler(members, 4, model.shelf))
        losses = trained(model, start, work, members, out, batches)
    assert losses.device.type == "lazy"


def test_tensors_of_two_devices_are_told_apart_where_they_only_pretend():
    with FakeTensorMode(), pytest.raises(RuntimeError, match="on the same device"):
        torch.zeros(3, device="lazy").add(torch.zeros(3))


def test_clipped_sums_are_made_on_the_accelerator():
    device = torch.device("lazy")
    model = StackedModel(task, seed=0, known_to_suit=True, device=device)
    with FakeTensorMode(allow_non_fake_inputs=True):
        parameters = model.views(torch.zeros(4, model.size, device=device))
        inputs, targets = (
            torch.zeros(4, 5, 6, device=device),
            torch.zeros(4, 5, dtype=torch.int64, device=device),
        )
        *sums, usable = model.factored(
            parameters, Filled(inputs, targets, torch.ones(4, 5, device=device)), 1.0
        )
    assert {each.device.type for each in (*sums, usable)} == {"lazy"}


@pytest.mark.parametrize("device", ["lazy", *CUDA])
@pytest.mark.parametrize("model", [perceptron, lambda: nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3))])
def test_clients_judge_on_an_accelerator_as_they_do_here(model: Any, device: str):
    judged = Task(model=model, data=data, loss=F.cross_entropy, metrics={"accuracy": accuracy})
    tests = [data(Site(f"client-{at}", index=at, count=5))[1] for at in range(5)]
    vector = framework.initial_model(judged, seed=1).vector
    here = Judge(judged, seed=1).judge(vector, tests)
    there = Judge(judged, seed=1, device=where(device)).judge(vector, tests)
    for one, other in zip(there, here, strict=True):
        assert one is not None
        assert other is not None
        assert one.num_examples == other.num_examples
        assert one.metrics == pytest.approx(dict(other.metrics), rel=1e-5)


def test_a_device_on_which_nothing_can_be_traced_leaves_training_to_the_loop_and_says_so(
    caplog: pytest.LogCaptureFixture,
):
    with caplog.at_level(logging.WARNING):
        found = simulate(config(), task=task, device="lazy")
    assert "what is computed on lazy cannot be traced" in caplog.text
    assert found.engine == "loop"
    assert np.array_equal(found.model.vector, simulate(config(), task=task, engine="loop").model.vector)


def test_a_device_whose_memory_is_full_leaves_training_to_the_loop_and_says_so(
    processor_as_accelerator: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(StackedModel, "room", full)
    with caplog.at_level(logging.WARNING):
        found = simulate(config(), task=task, device="cpu")
    assert "cpu has too little memory for 6 clients at once" in caplog.text
    assert (found.engine, found.status) == ("loop", "done")


@pytest.mark.parametrize(
    ("device", "says"),
    [
        ("gpu", "expected cpu, or an accelerator by torch's name such as cuda or cuda:1, found 'gpu'"),
        ("meta", "device meta: torch .* cannot compute there in float64"),
        ("cuda:63", "device cuda:63: torch .* cannot compute there in float64"),
    ],
)
def test_a_device_that_is_not_there_is_refused_before_anything_begins(device: str, says: str, tmp_path: Any):
    with pytest.raises(ConfigError, match=says):
        simulate(config(), task=task, device=device)
    (tmp_path / "run.toml").write_text(
        'name = "a"\ntask = "simulated:task"\nrounds = 1\n[cohort]\nsize = 2\n[simulation]\nclients = 2\n'
    )
    with pytest.raises(ConfigError, match=says):
        sweep(tmp_path / "run.toml", {"seed": [1]}, out=tmp_path / "out", device=device)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("engine", ["loop", "processes", "ray"])
def test_an_engine_that_uses_no_device_is_not_given_one(engine: Any):
    with pytest.raises(ConfigError, match=f"device lazy: expected the engine auto or vectorised, .*{engine}"):
        simulate(config(), task=task, engine=engine, device="lazy")


def test_what_is_brought_to_a_device_once_stays_there_unless_it_is_too_large():
    shelf = Shelf(torch.device("lazy"), most_bytes=100)
    pair, other = (torch.zeros(3, 6), torch.zeros(3)), (torch.zeros(2, 6), torch.zeros(2))
    first = shelf.brought(pair)
    assert first is not None
    assert first[0].device.type == "lazy"
    again = shelf.brought(pair)
    assert again is first
    assert shelf.brought(other) is not first
    assert shelf.brought((torch.zeros(30, 6), torch.zeros(30))) is None
    assert Shelf(torch.device("cpu")).brought(pair) is pair


def test_torch_is_as_it_was_after_a_simulation_on_a_device():
    def state() -> tuple[Any, ...]:
        flags = torch.backends.cudnn
        return torch.are_deterministic_algorithms_enabled(), flags.allow_tf32, flags.deterministic

    before = state()
    with reproducible(torch.device("lazy")):
        assert state() == (True, False, True)
    assert state() == before
    with reproducible(None):
        assert state() == before


def test_a_device_that_does_not_say_how_much_memory_it_has_is_taken_for_a_small_one():
    assert memory(torch.device("lazy")) == 1 << 32
    assert accelerator("cpu") is None

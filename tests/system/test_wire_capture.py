"""What crosses the wire, looked at in clear: with privacy on, nothing of the data that was not noised."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import leaky
import numpy as np
import pytest
import torch
from harness import Federation, coordinator, run_toml, until
from wiretap import Wiretap, wiretap

from fedge.refusal import RefusalCode
from fedge.vector import Array
from fedge.wire import fedge_pb2 as pb
from fedge_client.torch.framework import framework

CLIP, SIGMA, RATE, ROUNDS = 0.5, 3.0, 0.05, 60
EXAMPLE = f"""[privacy]
unit = "example"
noise_multiplier = {SIGMA}
delta = 1e-5
clip = {CLIP}
[evaluation]
every = 0
"""
EVALUATED = EXAMPLE.replace("every = 0", "every = 30").replace(
    "[evaluation]", "evaluation_noise_multiplier = 40.0\nloss_bound = 1.0\n[evaluation]"
)


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    with coordinator(tmp_path_factory.mktemp("tapped")) as started:
        yield started


@pytest.fixture
def site(federation: Federation, request: pytest.FixtureRequest) -> Iterator[Any]:
    """Starts this test's one site behind a wiretap, with a leak in its task and a policy."""
    name = f"site-{abs(hash(request.node.name)) % 10**8}"
    taps = []

    def start(leak: str, **policy: Any) -> Wiretap:
        limits = {"max_epsilon": 1e4, "tasks": ["leaky:task"]}
        federation.enrol(name, policy=limits | policy, data={"leak": leak})
        folder = federation.folder / name
        opened = wiretap(federation.address, home=federation.home, site=folder)
        tap = opened.__enter__()
        taps.append(opened)
        settings = folder / "client.toml"
        text = settings.read_text().replace(federation.address, tap.address)
        settings.write_text(text)
        federation.start(name)
        return tap

    yield start
    federation.clients[name].end()
    for opened in taps:
        opened.__exit__(None, None, None)


def run(name: str, more: str, **settings: Any) -> str:
    text = run_toml(name, task="leaky:task", size=1, quorum=1, more=more, **{"rounds": ROUNDS} | settings)
    return text.replace("batch_size = 4", 'batch_size = "full"').replace(
        "deadline_s = 60", "deadline_s = 60\nattempts = 1"
    )


def models(federation: Federation, tap: Wiretap, run_id: str) -> list[Array]:
    """The model before each round, from what the site has sent: one site's mean is its own update."""
    model = framework.initial_model(leaky.task, seed=7).vector.copy()
    out = []
    for update in tap.updates(run_id):
        if update.vector.size:
            out.append(model.copy())
            model += np.frombuffer(update.vector.inline, np.float32)
    return out


def without_noise(model: Array) -> Array:
    """The step that a round would make at this model, were there no noise: of clipped gradients, or not."""
    train, _ = leaky.data(type("Here", (), {"config": {}})())
    total = np.zeros(4)
    for inputs, target in zip(*train.tensors, strict=True):
        weight, bias = torch.tensor(model[:3]), torch.tensor(model[3])
        error = float((inputs / leaky.SECRET) @ weight + bias - target)
        gradient = 2 * error * np.append((inputs / leaky.SECRET).numpy(), 1.0)
        total += gradient * min(1.0, CLIP / np.linalg.norm(gradient))
    return -RATE * total / leaky.ROWS


def traces(data: bytes) -> list[str]:
    """The forms of the secret that bytes have in them."""
    forms = {
        "float32": struct.pack("<f", leaky.SECRET),
        "float64": struct.pack("<d", leaky.SECRET),
        "text": str(leaky.SECRET).encode(),
        "name": leaky.NAME.encode(),
    }
    return [name for name, form in forms.items() if form in data]


def test_the_wiretap_sees_what_an_unprotected_run_lets_out(federation: Federation, site: Any):
    """Otherwise it would prove nothing that it sees nothing below."""
    tap = site("parameter")
    detail = federation.run(run("open", "[evaluation]\nevery = 1", rounds=2))
    updates = tap.updates(detail.summary.run_id)
    assert "float64" in traces(tap.everything)  # the metric
    assert [update.num_examples for update in updates if update.vector.size] == [leaky.ROWS] * 2
    assert {metric.name for update in updates for metric in update.metrics} == {
        "train_loss",
        "loss",
        "secret",
    }
    sent = [np.frombuffer(update.vector.inline, np.float32) for update in updates if update.vector.size]
    assert abs(sent[0][3]) > 4000, "the bias that the task has planted"


def test_what_is_learned_by_layers_of_a_sites_own_is_never_sent(federation: Federation, site: Any):
    """The task writes the secret into its bias, which an unprotected run sends, as the test before shows."""
    tap = site("parameter")
    text = run("personal", "[evaluation]\nevery = 0", rounds=3)
    detail = federation.run(text.replace("[work]\n", '[work]\npersonal = ["linear.bias"]\n'))
    updates = tap.updates(detail.summary.run_id)
    assert [update.vector.size for update in updates] == [4 * (3 + 2)] * 3, "the weights and the buffer"
    sent = np.concatenate([np.frombuffer(update.vector.inline, np.float32) for update in updates])
    assert np.abs(sent).max() < leaky.SECRET / 2
    assert not {"float32", "float64"} & {*traces(tap.everything)}


def test_every_update_of_a_private_run_has_noise_and_nothing_else_is_sent(federation: Federation, site: Any):
    tap = site("nothing", units=["example"])
    detail = federation.run(run("noised", EVALUATED))
    run_id = detail.summary.run_id
    updates = [each for each in tap.updates(run_id) if each.vector.size]
    assert len(updates) == ROUNDS
    assert {each.num_examples for each in tap.updates(run_id)} == {1}
    assert not any(each.metrics for each in updates)
    noise = []
    for update, model in zip(updates, models(federation, tap, run_id), strict=True):
        sent = np.frombuffer(update.vector.inline, np.float32)
        assert not sent[4:].any(), "the buffer"
        noise.append(sent[:4] - without_noise(model))
    deviation = RATE * SIGMA * CLIP / leaky.ROWS
    drawn = np.array(noise) / deviation
    assert drawn.std() == pytest.approx(1.0, abs=0.2)  # 240 draws: 4 deviations of their deviation
    assert abs(drawn.mean()) < 0.3
    # On a grid of 2^-14 deviations two are equal by chance, now and then; a vector that is used again is four.
    assert len(np.unique(drawn.round(6))) >= drawn.size - 3, "none is used twice"

    # The evaluations' metrics are noised as well; the secret metric counts as 1 at most.
    told = [{m.name: m.value for m in each.metrics} for each in tap.updates(run_id) if each.metrics]
    assert len(told) == 2
    assert all(set(each) == {"loss", "secret"} for each in told)
    assert all(abs(each["secret"] - 1) > 1e-6 for each in told)
    assert traces(tap.everything) == []
    kinds = {each.WhichOneof("kind") for each in tap.messages()}
    assert kinds <= {"hello", "witness", "accept", "update", "progress"}


@pytest.mark.parametrize("leak", ["parameter", "data", "buffer", "error"])
def test_what_a_tasks_code_does_beside_returning_a_loss_does_not_leave(
    federation: Federation, site: Any, leak: str
):
    tap = site(leak, units=["example"])

    def refusals() -> list[pb.Refusal]:
        found = [each.failed.refusal for each in tap.messages() if each.HasField("failed")]
        return found + [each.refuse.refusal for each in tap.messages() if each.HasField("refuse")]

    with federation.submitted(run("leaking", EXAMPLE, rounds=2)) as run_id:
        until(refusals, "it is refused")
    assert {each.code for each in refusals()} <= {
        RefusalCode.MODEL_NOT_PRIVATE,
        RefusalCode.TASK_FAILED,
        RefusalCode.PROTECTION_UNAVAILABLE,
    }
    assert not tap.updates(run_id)
    assert traces(tap.everything) == []


def test_where_the_policy_requires_protection_a_run_without_it_hears_one_refusal(
    federation: Federation, site: Any
):
    tap = site("nothing", units=["example"])
    before = len(tap.everything)
    with federation.submitted(run("bare", "", rounds=1)):
        until(lambda: [each for each in tap.messages() if each.HasField("refuse")], "it is refused")
    (refused,) = [each.refuse.refusal for each in tap.messages() if each.HasField("refuse")]
    assert refused.code == RefusalCode.PROTECTION_TOO_WEAK
    assert {each.WhichOneof("kind") for each in tap.messages()} <= {"hello", "witness", "refuse"}
    assert len(tap.everything) - before < 4096

"""Example-level privacy in a Flower client: the mod trains, the ledger pays, and nothing else leaves."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flower_apps import by_flower, simulated
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from torch import nn
from torch.utils.data import TensorDataset

from fedge.errors import ConfigError
from fedge.privacy.example import Schedule
from fedge.privacy.mechanism import Gaussian
from fedge.privacy.rdp import epsilon_of
from fedge.records import AppError
from fedge.run import Work
from fedge.task import OwnTask, Site, Task
from fedge_client.flower import protect_examples
from fedge_client.ledger import Ledger
from fedge_client.ledger_file import HEADS, read_only
from fedge_flower.internals import be
from fedge_flower.node import Node as FlowerNode
from fedge_flower.node import answered
from fedge_flower.records import plain_of

EXAMPLES = 40
FULL = Work(steps=1, batch_size="full", learning_rate=1.0)


def data(site: Site) -> tuple[TensorDataset, TensorDataset]:
    generator = torch.Generator().manual_seed(int(site.config["partition-id"]))
    x = torch.randn(EXAMPLES, 3, generator=generator)
    return TensorDataset(x, x.sum(1, keepdim=True)), TensorDataset(x[:10], x[:10].sum(1, keepdim=True))


TASK = Task(model=lambda: nn.Linear(3, 1), data=data, loss=nn.functional.mse_loss)


class Node:
    """A ClientApp with the mod, whose own functions must not be asked."""

    def __init__(self, folder: Path, task: Any = TASK, **settings: Any) -> None:
        self.folder, self.asked = folder, 0
        terms = {"clip": 1.0, "noise_multiplier": 1.0, "max_epsilon": 100.0, "delta": 1e-5, "work": FULL}
        self.app = ClientApp(mods=[protect_examples(task, **{**terms, **settings})])
        for register in (self.app.train(), self.app.evaluate(), self.app.query(), self.app.train("more")):
            register(self.own)

    def own(self, message: Message, context: Context) -> Message:
        self.asked += 1
        return Message(RecordDict(), reply_to=message)

    def answers(
        self, kind: str = "train", arrays: Any = None, partition: Any = 3, of: Any = None, **config: Any
    ) -> RecordDict:
        be(run_id=3, node_id=1)
        content: dict[str, Any] = {"arrays": arrays or zeros()}
        if config:
            content["config"] = ConfigRecord(
                {name.replace("_", "-"): value for name, value in config.items()}
            )
        settings: Any = {"partition-id": partition, "fedge-ledger": str(self.folder)}
        settings |= {"num-partitions": of} if of is not None else {}
        return self.app(
            Message(RecordDict(content), 7, kind), Context(3, 7, settings, RecordDict(), {})
        ).content

    def spent(self, dataset: str = "partition-3") -> Any:
        return read_only(self.folder, dataset, head_folder=self.folder / "heads").books


def zeros(*shape: int) -> ArrayRecord:
    return ArrayRecord(
        {"weight": torch_array(torch.zeros(shape or (1, 3))), "bias": torch_array(torch.zeros(1))}
    )


def torch_array(value: torch.Tensor) -> Any:
    return ArrayRecord({"each": value})["each"]  # as a state dict becomes arrays


def flat(record: ArrayRecord) -> np.ndarray:
    return np.concatenate([each.numpy().ravel() for each in record.values()])


def test_what_leaves_is_the_clipped_gradient_with_noise_of_the_right_size(tmp_path: Path):
    node = Node(tmp_path, max_epsilon=1e9, noise_multiplier=4.0)
    rows = np.array([flat(node.answers()["arrays"]) for _ in range(200)])
    # One step at rate 1 from zeros: minus the mean of the clipped gradients, and noise of 4 * clip / examples.
    train, _ = data(Site("", {"partition-id": 3}))
    gradients = []
    for x, y in train:
        each = torch.cat([2 * (0 - y) * x, 2 * (0 - y)])
        gradients.append(each / max(1.0, float(each.norm())))
    expected = -torch.stack(gradients).mean(0).numpy()
    sigma = 4.0 / EXAMPLES
    assert np.abs(rows.mean(0) - expected).max() < 5 * sigma / math.sqrt(len(rows))
    assert 0.85 * sigma < np.sqrt(((rows - expected) ** 2).mean()) < 1.15 * sigma
    assert node.asked == 0


def test_a_reply_tells_neither_how_many_examples_there_are_nor_how_they_fare(tmp_path: Path):
    found = Node(tmp_path).answers()
    assert dict(found["metrics"]) == {"num-examples": 1}
    assert set(found) == {"arrays", "metrics"}


def test_what_was_spent_is_in_the_ledger_by_the_message_and_by_the_data_set(tmp_path: Path):
    node = Node(tmp_path)
    for _ in range(3):
        node.answers()
    node.answers(partition=4)
    assert node.spent().spent().mechanisms == (Gaussian(1.0, 3),)
    assert node.spent("partition-4").spent().mechanisms == (Gaussian(1.0, 1),)
    assert not node.spent().open


def test_settings_of_a_message_set_the_work_and_its_price(tmp_path: Path):
    node = Node(tmp_path, adjustable=["lr", "batch-size", "local-epochs"])
    node.answers(lr=0.1, batch_size=10, local_epochs=2, server_round=5)
    schedule = Schedule.of(Work(epochs=2, batch_size=10), EXAMPLES, "train")
    assert schedule.steps == 8
    assert node.spent().spent().mechanisms == (schedule.mechanism(1.0),)


@pytest.mark.parametrize(
    "setting", [{"batch_size": 10}, {"local_epochs": 2}, {"local_steps": 10**9}], ids=str
)
def test_how_long_a_node_works_is_not_the_server_apps_to_choose(setting: dict[str, int], tmp_path: Path):
    node = Node(tmp_path)
    node.answers(lr=0.5, batch_size="full", local_steps=1)  # what it does anyway
    with pytest.raises(Exception, match="adjustable"):
        node.answers(**setting)
    assert node.spent().spent().mechanisms == (Gaussian(1.0, 1),)


def test_flowers_fedprox_may_hold_training_back_for_it_costs_nothing(tmp_path: Path):
    node = Node(tmp_path, adjustable=["local-steps", "proximal-mu"])
    node.answers(local_steps=3, proximal_mu=0.5)
    assert node.spent().spent().mechanisms == (Gaussian(1.0, 3),)
    with pytest.raises(Exception, match=r"proximal: .*greater than or equal to 0"):
        node.answers(proximal_mu=-1.0)


def test_work_that_nobody_can_account_for_is_refused_without_the_number_of_examples(tmp_path: Path):
    node = Node(tmp_path, adjustable=["batch-size", "local-epochs"], task=large_task())
    with pytest.raises(Exception, match="more steps than can be accounted for") as refused:
        node.answers(batch_size=1, local_epochs=2**31 - 1)
    assert not any(character.isdigit() for character in str(refused.value))


def large_task() -> Task:
    x = torch.zeros(700, 3)
    sets = TensorDataset(x, x[:, :1])
    return Task(model=lambda: nn.Linear(3, 1), data=lambda site: (sets, sets), loss=nn.functional.mse_loss)


def test_data_are_loaded_once_whatever_the_learning_rate(tmp_path: Path):
    loaded = []

    def counted(site: Site) -> Any:
        loaded.append(site.config["partition-id"])
        return data(site)

    node = Node(tmp_path, task=Task(model=TASK.model, data=counted, loss=TASK.loss))
    for lr in (0.1, 0.05, 0.025):
        for partition in (3, 4):
            node.answers(partition=partition, lr=lr)
    assert sorted(loaded) == [3, 4]


@pytest.mark.parametrize("number", [True, 2.5, -1, 2**62], ids=str)
def test_no_round_number_makes_a_ledger_unreadable(number: Any, tmp_path: Path):
    node = Node(tmp_path)
    node.answers(server_round=number)
    node.answers(server_round=number)
    assert node.spent().spent().mechanisms == (Gaussian(1.0, 2),)


@pytest.mark.parametrize(
    ("partition", "of"),
    [
        ("../x", None),
        ("a" * 300, None),
        ("a\0b", None),
        (True, None),
        (-1, None),
        (3, 3),
        (3, True),
        (1.5, 2),
    ],
    ids=["up", "long", "zero", "bool", "negative", "beyond", "of bool", "half"],
)
def test_a_partition_is_a_number(partition: Any, of: Any, tmp_path: Path):
    task = Task(model=TASK.model, data=lambda site: data(Site("", {"partition-id": 3})), loss=TASK.loss)
    with pytest.raises(Exception, match="partition-id") as refused:
        Node(tmp_path, task=task).answers(partition=partition, of=of)
    assert str(tmp_path) not in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_the_same_data_divided_otherwise_does_not_begin_with_nothing_spent(tmp_path: Path):
    node = Node(tmp_path)
    node.answers(partition=3, of=40)
    with pytest.raises(Exception, match="expected one of 40 partitions"):
        node.answers(partition=3, of=20)
    node.answers(partition=4, of=40)
    assert node.spent("partition-3-of-40").spent().mechanisms == (Gaussian(1.0, 1),)


def test_messages_at_once_are_answered_one_after_the_other(tmp_path: Path):
    node = Node(tmp_path)
    messages = []
    for _ in range(4):
        be(run_id=3, node_id=1)
        messages.append(Message(RecordDict({"arrays": zeros()}), 7, "train"))
    settings: Any = {"partition-id": 3, "fedge-ledger": str(tmp_path)}
    with ThreadPoolExecutor(4) as pool:
        replies = list(
            pool.map(lambda each: node.app(each, Context(3, 7, settings, RecordDict(), {})), messages)
        )
    assert len({flat(each.content["arrays"]).tobytes() for each in replies}) == 4
    assert node.spent().spent().mechanisms == (Gaussian(1.0, 4),)


def test_a_ledger_that_another_process_has_is_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    node = Node(tmp_path)
    held = Ledger.open(tmp_path, "partition-3", 1e-5, head_folder=tmp_path / HEADS)
    with held, pytest.raises(Exception, match="this site's ledger cannot be used"):
        node.answers()
    assert "another client at work" in caplog.text
    node.answers()


def test_a_gradient_is_one_step_whatever_the_work(tmp_path: Path):
    node = Node(tmp_path, work=Work(epochs=5, batch_size="full"), noise_multiplier=0.1)
    start = ArrayRecord(
        {"weight": torch_array(torch.full((1, 3), 50.0)), "bias": torch_array(torch.zeros(1))}
    )
    found = flat(node.answers(arrays=start, fedge_work="gradient")["arrays"])
    assert np.linalg.norm(found) < 1.2, "clipped to 1, and not added to the arrays"
    assert node.spent().spent().mechanisms == (Gaussian(0.1, 1),)


def test_the_budget_ends_and_nothing_is_trained_after_it(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    node = Node(tmp_path, max_epsilon=epsilon_of((Gaussian(1.0, 2),), 1e-5) * 1.01)
    node.answers()
    node.answers()
    with pytest.raises(Exception, match="this site's privacy budget does not allow this") as refused:
        node.answers()
    assert str(tmp_path) not in str(refused.value)
    assert "budget_exhausted" in caplog.text
    assert node.spent().spent().mechanisms == (Gaussian(1.0, 2),)
    # Another process, or another app with the same ledger, finds it spent.
    with pytest.raises(Exception, match="privacy budget"):
        Node(tmp_path, max_epsilon=epsilon_of((Gaussian(1.0, 2),), 1e-5) * 1.01).answers()


def test_evaluations_have_noise_and_cost_something_or_are_refused(tmp_path: Path):
    with pytest.raises(Exception, match="terms of privacy have none"):
        Node(tmp_path).answers("evaluate")
    node = Node(tmp_path, evaluation_noise_multiplier=5.0)
    losses = [node.answers("evaluate")["metrics"]["loss"] for _ in range(2)]
    assert losses[0] != losses[1]
    assert node.spent().spent().mechanisms == (Gaussian(5.0, 2),)
    assert set(node.answers("evaluate")) == {"metrics"}


@pytest.mark.parametrize("kind", ["query", "train.more"])
def test_other_messages_are_refused_unless_the_site_lets_them_pass_and_then_it_is_noted(
    kind: str, tmp_path: Path
):
    with pytest.raises(Exception, match="among `unprotected`"):
        Node(tmp_path).answers(kind)
    assert not list(tmp_path.iterdir())
    node = Node(tmp_path, unprotected=[kind])
    assert not node.answers(kind)
    assert node.asked == 1
    assert node.spent().unprotected == ("flower-3",)


def secret_failure(site: Site) -> Any:
    raise ValueError("the patient is Jane")


def secret_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    raise ValueError("the patient is Jane")


@pytest.mark.parametrize(
    ("task", "says"),
    [
        (
            Task(model=lambda: nn.Linear(3, 1), data=secret_failure, loss=nn.functional.mse_loss),
            "no usable data",
        ),
        (
            Task(model=lambda: nn.Linear(3, 1), data=data, loss=secret_loss),
            r"the task's code failed \(ValueError\)",
        ),
    ],
    ids=["data", "loss"],
)
def test_an_error_says_nothing_of_the_data(task: Task, says: str, tmp_path: Path):
    with pytest.raises(Exception, match=says) as error:
        Node(tmp_path, task).answers()
    assert "Jane" not in str(error.value)
    assert error.value.__cause__ is None


def test_arrays_of_nan_are_no_way_to_an_unprotected_reply(tmp_path: Path):
    node = Node(tmp_path)
    nan = ArrayRecord(
        {"weight": torch_array(torch.full((1, 3), torch.nan)), "bias": torch_array(torch.zeros(1))}
    )
    with pytest.raises(Exception, match="NaN or infinity"):
        node.answers(arrays=nan)
    assert node.spent().spent().mechanisms == (Gaussian(1.0, 1),), "that it failed may tell something, too"


def test_a_model_that_mixes_examples_is_refused_before_it_is_trained(tmp_path: Path):
    model = lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))  # noqa: E731
    task = Task(model=model, data=data, loss=nn.functional.mse_loss)
    arrays = ArrayRecord(model().state_dict())
    with pytest.raises(Exception, match="BatchNorm"):
        Node(tmp_path, task).answers(arrays=arrays)
    assert not list(tmp_path.iterdir())


class Tied(nn.Module):
    """One weight under two names, as language models have it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3, bias=False)
        self.second = nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x))).sum(1, keepdim=True)


def test_a_weight_of_two_names_goes_back_under_both(tmp_path: Path):
    task = Task(model=Tied, data=data, loss=nn.functional.mse_loss)
    found = Node(tmp_path, task).answers(arrays=ArrayRecord(Tied().state_dict()))["arrays"]
    assert np.array_equal(found["first.weight"].numpy(), found["second.weight"].numpy())


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"clip": 0.0}, "clip"),
        ({"noise_multiplier": 0.0}, "noise_multiplier"),
        ({"noise_multiplier": math.nan}, "noise_multiplier"),
        ({"delta": 1.0}, "delta"),
        ({"max_epsilon": 0.0}, "max_epsilon"),
        ({"max_epsilon": math.nan}, "max_epsilon"),
        ({"evaluation_noise_multiplier": -1.0}, "evaluation_noise_multiplier"),
        ({"max_epsilon": math.inf}, "max_epsilon"),
        ({"ledger": Path("here")}, "absolute"),
        ({"dataset": "../elsewhere"}, "dataset"),
        ({"dataset": "a" * 64}, "dataset"),
        ({"adjustable": ["momentum"]}, "adjustable"),
        ({"task": OwnTask(lambda seed: None, lambda site, work: None)}, "OwnTask"),  # type: ignore[arg-type,return-value]
    ],
    ids=lambda value: str(value)[:30] if isinstance(value, dict) else "",
)
def test_settings_that_protect_nothing_are_refused(settings: dict[str, Any], says: str, tmp_path: Path):
    with pytest.raises(ConfigError, match=says):
        Node(tmp_path, **settings)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"arrays": ArrayRecord({"weight": torch_array(torch.zeros(1, 3))})}, "bias"),
        (
            {
                "arrays": ArrayRecord(
                    {"weight": torch_array(torch.zeros(3)), "bias": torch_array(torch.zeros(1))}
                )
            },
            "shape",
        ),
        ({"lr": -1.0}, "learning_rate"),
        ({"lr": "fast"}, "learning_rate"),
    ],
    ids=["an array is missing", "another shape", "lr", "another lr"],
)
def test_a_message_that_makes_no_sense_costs_nothing(settings: dict[str, Any], says: str, tmp_path: Path):
    with pytest.raises(Exception, match=says):
        Node(tmp_path).answers(**settings)
    assert not list(tmp_path.iterdir())


def test_a_node_without_a_ledger_answers_nothing(tmp_path: Path):
    node = Node(tmp_path)
    node.folder = Path("relative")
    with pytest.raises(Exception, match="fedge-ledger"):
        node.answers()


def test_why_nothing_is_answered_is_in_the_sites_log_and_a_coordinator_hears_the_kind(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    be(run_id=3, node_id=1)
    asked = plain_of(Message(RecordDict({"arrays": zeros()}), 7, "train"))
    node = FlowerNode(7, {"partition-id": 3})  # without a ledger
    app = Node(tmp_path).app
    made = answered(app, node, asked, run_id=3, run_config={}, state={}, discreet=True).message.content
    assert isinstance(made, AppError)
    assert made.reason == "ConfigError; see the site's log"
    assert "fedge-ledger" in caplog.text


def test_a_ledger_that_was_rolled_back_stops_everything(tmp_path: Path):
    node = Node(tmp_path)
    node.answers()
    kept = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    node.answers()
    for path, text in kept.items():
        path.write_bytes(text)
    with pytest.raises(Exception, match="this site's ledger cannot be used; see the site's log"):
        node.answers()


def check_report(found: Any) -> None:
    """Six rounds of noised weights and nothing else, of which none is another's; then the budget is spent."""
    seen = set()
    for replies in found["rounds"][:6]:
        assert len(replies) == 4
        for reply in replies:
            assert reply["records"] == ["arrays", "metrics"]
            assert reply["metrics"] == {"num-examples": 1}
            seen.add(tuple(reply["weight"]))
    assert len(seen) == 6 * 4, "the noise of each is its own"
    refusals = [reply for replies in found["rounds"][6:] for reply in replies]
    assert all("privacy budget" in each for each in refusals)
    assert len(refusals) == 4 * 4
    assert np.allclose(found["weight"], [[1.0, -2.0, 0.5]], atol=0.2)


@pytest.mark.parametrize("run", [simulated, by_flower], ids=["ours", "flowers"])
def test_an_app_trains_privately_until_its_budget_is_spent(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    ledgers = tmp_path / "ledgers"
    monkeypatch.setenv("PRIVATE_APP_LEDGER", str(ledgers))
    check_report(run("private_app", tmp_path, nodes=4))
    for partition in range(4):
        books = read_only(ledgers, f"partition-{partition}-of-4", head_folder=ledgers / "heads").books
        assert books.spent().mechanisms == (Gaussian(6.0, 60),)

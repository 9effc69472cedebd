"""The agent's side of a real worker process: what it gets back, and what it learns when the worker breaks.

Starting a worker imports torch, so one is shared by all tests that leave it alive.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import psutil
import pytest

from fedge.errors import RefusedError
from fedge.events import OrderId
from fedge.refusal import Refusal, RefusalCode
from fedge.run import Work
from fedge.strategy import WorkKind
from fedge.vector import Layout, Tensor
from fedge.wire.codec import encode_layout, encode_order_id, encode_work
from fedge_client import pipe_pb2 as pb
from fedge_client.settings import WorkerSettings
from fedge_client.supervisor import Supervisor

T = TypeVar("T")

APP = """
import os, pathlib, signal, time
import torch
from torch.utils.data import TensorDataset
from fedge import Task

def model():
    return torch.nn.Linear(1, 1, bias=False)

def data(site):
    x = torch.tensor([[1.0], [2.0], [3.0]]) * site.config["scale"]
    return TensorDataset(x, 2 * x), TensorDataset(x[:2], 2 * x[:2])

def mse(output, target):
    return (output - target).square().mean()

def after(act):
    def loss(output, target):
        act()
        return mse(output, target)
    return Task(model=model, data=data, loss=loss)

def secret():
    raise ValueError("the patient is 4711, file \\udcff")

kept = []
def eat():
    kept.append(torch.ones(100 << 20))  # 400 MiB that are touched
    time.sleep(60)

def no_data(site):
    raise FileNotFoundError("/data/4711")

def wider():
    return torch.nn.Linear(2, 1, bias=False)

good = Task(model=model, data=data, loss=mse)
def exit_once():
    mark = pathlib.Path(__file__).with_name("exited")
    if not mark.exists():
        mark.touch()
        os._exit(7)

exits = after(exit_once)
killed = after(lambda: os.kill(os.getpid(), signal.SIGKILL))
hangs = after(lambda: time.sleep(60))
eats = after(eat)
raises = after(secret)
slow = after(lambda: time.sleep(0.02))
empty = Task(model=model, data=no_data, loss=mse)
wide = Task(model=wider, data=data, loss=mse)
"""
LAYOUT = Layout((Tensor("weight", (1, 1)),))
RATE = 0.1


class Site:
    """A supervisor on an event loop that lasts, its folder, and one run at a time in each slot."""

    def __init__(self, folder: Path, runner: asyncio.Runner) -> None:
        (folder / "app.py").write_text(APP)
        (folder / "client.toml").write_text('server = "h:1"\n[data]\nscale = 1.0\n')
        self.runner = runner
        self.supervisor = Supervisor(folder / "client.toml", "north", WorkerSettings(hang_s=100), slots=2)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(work)

    def limit(self, **settings: Any) -> None:
        """Settings from now on: loading takes seconds, so a limit is set when that is done."""
        self.supervisor._settings = WorkerSettings(hang_s=100).model_copy(update=settings)

    def load(self, task: str, *, work: Work | None = None, slot: int = 0, run_id: str = "run") -> pb.Loaded:
        load = pb.Load(
            run_id=run_id,
            task=task if ":" in task else f"app:{task}",
            seed=7,
            layout=encode_layout(LAYOUT),
            work=encode_work(work or Work(batch_size="full", learning_rate=RATE)),
            slot=slot,
        )
        return self.run(self.supervisor.load(load))

    def start(
        self, weight: float = 0.0, *, kind: WorkKind = "train", slot: int = 0, run_id: str = "run"
    ) -> Any:
        """What the worker is asked for, with the model in its slot."""
        model, update = self.supervisor.vectors(slot, LAYOUT.size)
        model[:], update[:] = weight, np.nan
        message = pb.Perform(run_id=run_id, id=encode_order_id(OrderId(kind, 1)))
        return self.supervisor.perform(message, progress=lambda done, total: None)

    def update(self, slot: int = 0) -> float:
        return float(self.supervisor.vectors(slot, LAYOUT.size)[1][0])

    def refused(self, work: Coroutine[Any, Any, object]) -> Refusal:
        with pytest.raises(RefusedError) as error:
            self.run(work)
        return error.value.refusal

    def check_works_again(self) -> None:
        """The run goes on in a new worker that was told of it again."""
        assert self.supervisor.pid is None
        self.limit()
        self.load("good")
        assert self.run(self.start(1.0)).num_examples == 3


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with asyncio.Runner() as runner:
        site = Site(tmp_path_factory.mktemp("site"), runner)
        yield site
        pid = site.supervisor.pid
        site.run(site.supervisor.close())
        assert pid is None or not psutil.pid_exists(pid)


@pytest.fixture
def site(shared: Site) -> Iterator[Site]:
    yield shared
    shared.limit()
    for run_id in list(shared.supervisor._loads):
        shared.supervisor.release(run_id)


def gradient(weight: float) -> float:
    """Of mean((w x - 2 x)^2) over x = 1, 2, 3."""
    return (weight - 2) * 2 * (1 + 4 + 9) / 3


def test_it_loads_a_task_and_does_what_it_is_asked(site: Site):
    loaded = site.load("good")
    assert (loaded.run_id, loaded.train_examples, loaded.test_examples) == ("run", 3, 2)
    finished = site.run(site.start(0.5))
    assert finished.num_examples == 3
    assert site.update() == pytest.approx(-RATE * gradient(0.5), rel=1e-5)
    assert {metric.name for metric in finished.metrics} == {"train_loss"}
    site.run(site.start(0.5, kind="gradient"))
    assert site.update() == pytest.approx(gradient(0.5), rel=1e-5)
    judged = site.run(site.start(1.0, kind="evaluate"))
    assert judged.num_examples == 2
    assert {metric.name: metric.value for metric in judged.metrics} == {"loss": pytest.approx(2.5)}


def test_two_runs_keep_their_vectors_apart_and_a_slot_is_free_when_its_run_is_over(site: Site):
    assert site.supervisor.free_slot() == 0
    site.load("good", slot=0, run_id="one")
    site.load("good", slot=1, run_id="two")
    assert site.supervisor.free_slot() is None
    site.run(site.start(0.0, slot=0, run_id="one"))
    first = site.update(0)
    site.run(site.start(1.0, slot=1, run_id="two"))
    assert site.update(0) == first != site.update(1)
    site.supervisor.release("one")
    assert site.supervisor.free_slot() == 0
    late = site.refused(site.start(0.0, slot=0, run_id="one"))
    assert late.code == RefusalCode.CANCELLED
    assert site.run(site.start(1.0, slot=1, run_id="two")).num_examples == 3


@pytest.mark.parametrize(
    ("task", "code", "says"),
    [
        ("absent:task", RefusalCode.TASK_UNAVAILABLE, "task 'absent:task' cannot be imported on this site"),
        ("app:nothing", RefusalCode.TASK_UNAVAILABLE, "task 'app:nothing' cannot be imported on this site"),
        ("empty", RefusalCode.NO_DATA, "the task found no usable data on this site"),
        ("wide", RefusalCode.LAYOUT_MISMATCH, "tensor 'weight' should be trainable float32[1, 1], is "),
    ],
)
def test_a_task_that_cannot_be_loaded_is_refused_and_the_worker_lives_on(site: Site, task, code, says):
    site.load("good")
    pid = site.supervisor.pid
    load = pb.Load(run_id="other", task=task if ":" in task else f"app:{task}", layout=encode_layout(LAYOUT))
    load.work.CopyFrom(encode_work(Work()))
    refusal = site.refused(site.supervisor.load(load))
    assert refusal.code == code
    assert says in refusal.message
    assert "4711" not in refusal.message
    assert site.supervisor.free_slot() == 1
    assert site.supervisor.pid == pid


def test_of_an_error_in_the_users_code_only_its_type_goes_up_and_the_rest_stays_in_the_log(
    site: Site, caplog: pytest.LogCaptureFixture
):
    site.load("raises")
    pid = site.supervisor.pid
    refusal = site.refused(site.start())
    assert refusal == Refusal(RefusalCode.TASK_FAILED, "the task's code failed (ValueError)")
    assert "the patient is 4711" in caplog.text
    assert site.supervisor.pid == pid


def test_work_that_is_cancelled_ends_between_two_steps_and_the_worker_lives_on(site: Site):
    site.load("slow", work=Work(batch_size=1, steps=100_000))
    pid = site.supervisor.pid

    async def scenario() -> None:
        work = asyncio.create_task(site.start())
        await asyncio.sleep(0.2)
        site.supervisor.cancel()
        await work

    assert site.refused(scenario()).code == RefusalCode.CANCELLED
    site.supervisor.cancel()  # nothing is under way: it must not hit the next order
    site.load("good", run_id="next", slot=1)
    assert site.run(site.start(slot=1, run_id="next")).num_examples == 3
    assert site.supervisor.pid == pid


def test_progress_is_told_now_and_then_and_keeps_a_slow_worker_alive(site: Site):
    site.load("slow", work=Work(batch_size=1, steps=90))
    site.limit(hang_s=1.5)
    told: list[tuple[int, int]] = []
    site.supervisor.vectors(0, 1)[0][:] = 0
    message = pb.Perform(run_id="run", id=encode_order_id(OrderId("train", 1)))
    site.run(site.supervisor.perform(message, progress=lambda done, total: told.append((done, total))))
    assert told
    assert told == sorted(told)
    assert {total for _, total in told} == {90}


# Workers that break: each of these costs a process.


def test_a_worker_that_exits_is_reported_and_started_again_with_its_runs(site: Site):
    site.load("exits")
    site.load("good", run_id="other", slot=1)
    pid = site.supervisor.pid
    refusal = site.refused(site.start())
    assert refusal.code == RefusalCode.WORKER_CRASHED
    assert refusal.message == "the worker ended by itself with exit code 7"
    assert site.supervisor.pid is None
    for slot, run_id in ((1, "other"), (0, "run")):  # each is loaded again by itself
        assert site.run(site.start(1.0, slot=slot, run_id=run_id)).num_examples == 3
    assert site.supervisor.pid not in (None, pid)


def test_a_worker_that_is_killed_is_reported_by_the_signal(site: Site):
    site.load("killed")
    refusal = site.refused(site.start())
    assert refusal.code == RefusalCode.WORKER_CRASHED
    assert refusal.message == "the worker was ended by SIGKILL (the system may be out of memory)"
    site.check_works_again()


def test_a_worker_that_hangs_is_killed(site: Site):
    site.load("hangs")
    site.limit(hang_s=0.3)
    process = psutil.Process(site.supervisor.pid)
    refusal = site.refused(site.start())
    assert refusal.code == RefusalCode.WORKER_HUNG
    assert refusal.message == "the worker made no progress for 0.3 s and was killed"
    assert not process.is_running()
    site.check_works_again()


def test_a_worker_that_outgrows_its_memory_is_killed(site: Site):
    site.load("eats")
    process = psutil.Process(site.supervisor.pid)
    limit = (process.memory_info().rss >> 20) + 150
    site.limit(memory_mb=limit)
    refusal = site.refused(site.start())
    assert refusal == Refusal(
        RefusalCode.OUT_OF_MEMORY, f"the worker used more than {limit} MB and was killed"
    )
    assert not process.is_running()
    assert site.supervisor.pid is None


def test_a_worker_ends_by_itself_when_the_agent_is_gone(tmp_path: Path):
    """A killed agent's end of the socket is closed by the system; that is all the worker gets to know."""
    with asyncio.Runner() as runner:
        site = Site(tmp_path, runner)

        async def scenario() -> int:
            await site.supervisor._start()
            site.supervisor._writer.close()
            async with asyncio.timeout(30):
                return await site.supervisor._process.wait()

        assert site.run(scenario()) == 0
        site.run(site.supervisor.close())

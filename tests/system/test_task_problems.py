"""A site whose task fails, in every way that it can: the others' run goes on, and its owner is told why.

What the task's code said stays on the site: only a typed reason travels.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import Federation, run_toml, simulated, until

HONEST = ["client-0", "client-1"]
PRIVATE = "/srv/patients/jane-doe.csv"
HANG_S = 25  # more than a busy machine needs to import torch

PROBLEMS = {
    "import_fails": f"raise RuntimeError('{PRIVATE} is missing')\n",
    "import_exits": "import os\nos._exit(3)\n",
    "no_task": "task = 'not a task'\n",
    "no_rows": (
        "import tiny, torch\nfrom fedge import Task\n"
        "empty = torch.utils.data.TensorDataset(torch.zeros(0, 3), torch.zeros(0, 1))\n"
        "task = Task(tiny.model, lambda site: (empty, empty), tiny.loss)\n"
    ),
    "no_file": (
        "import tiny\nfrom fedge import Task\n"
        f"task = Task(tiny.model, lambda site: open('{PRIVATE}'), tiny.loss)\n"
    ),
    "other_model": (
        "import tiny, torch\nfrom fedge import Task\n"
        "task = Task(lambda: torch.nn.Linear(4, 1), tiny.data, tiny.loss)\n"
    ),
}
REASONS = {
    "import_fails": "task_unavailable: task 'import_fails:task' cannot be imported on this site",
    "import_exits": "worker_crashed: the worker ended by itself with exit code 3",
    "no_task": "task_unavailable: task 'no_task:task' cannot be imported on this site",
    "missing": "task_unavailable: task 'missing:task' cannot be imported on this site",
    "forbidden": "task_not_allowed: task 'forbidden:task' is not in this site's [policy] tasks",
    "no_rows": "no_data: the task found no usable data on this site",
    "no_file": "no_data: the task found no usable data on this site",
    "other_model": "layout_mismatch: this site's model differs from the run's: "
    "tensor 'weight' should be trainable float32[1, 3], is trainable float32[1, 4]",
}


def run_of(name: str, *, rounds: int = 1) -> str:
    """A run of rounds of one step each, so that a round takes one line of a site's script."""
    text = run_toml(name.replace("_", "-"), task=f"{name}:task", rounds=rounds, size=3)
    return text.replace("batch_size = 4", 'batch_size = "full"') + "[evaluation]\nevery = 0\n"


@pytest.fixture(scope="module", autouse=True)
def honest(federation: Federation) -> None:
    """The same names are good tasks elsewhere."""
    for name in HONEST:
        for task in (*REASONS, "hanging"):
            (federation.folder / name / f"{task}.py").write_text("from tiny import task\n")


@pytest.fixture(scope="module", autouse=True)
def hanging(federation: Federation, honest: None) -> Iterator[str]:
    """A run that goes on beside the others: one of its sites hangs in its first step."""
    worker = {"threads": 1, "hang_s": HANG_S}
    federation.enrol("hanger", policy={"tasks": ["hanging:task"]}, worker=worker)
    (federation.folder / "hanger" / "hanging.py").write_text("from tiny import task\n")
    (federation.control("hanger") / "script").write_text("hang\n")
    hanger = federation.start("hanger")
    with federation.blocked("client-0"):
        run_id = federation.submit(run_of("hanging"))
        until(lambda: "hanger" in federation.ready(run_id), "the hanger has joined")
    yield run_id
    hanger.end()


@pytest.fixture(scope="module")
def script(federation: Federation) -> Iterator[Path]:
    """A site with every broken task, whose policy allows all but one; the script of what it will do."""
    allowed = [f"{task}:task" for task in ("tiny", *REASONS) if task != "forbidden"]
    worker = {"threads": 1, "memory_mb": 800}
    federation.enrol("faulty", policy={"tasks": allowed}, worker=worker)
    for task, source in PROBLEMS.items():
        (federation.folder / "faulty" / f"{task}.py").write_text(source)
    faulty = federation.start("faulty")
    yield federation.control("faulty") / "script"
    faulty.end()


def detail_of(federation: Federation, run_id: str, site: str) -> str:
    """Why a site said no, in `run show`; empty if it did not."""
    return next((each.detail for each in federation.show(run_id).clients if each.name == site), "")


def begun_by_all(federation: Federation, text: str) -> str:
    """A run whose first round is not over before the honest sites and the faulty one have joined."""
    with federation.blocked(HONEST[0]), federation.blocked(HONEST[1]):
        run_id = federation.submit(text)
        until(lambda: federation.ready(run_id) >= {*HONEST, "faulty"}, "all sites have joined")
    return run_id


@pytest.mark.parametrize("name", REASONS)
def test_a_site_that_cannot_take_part_says_why_and_the_others_go_on(
    federation: Federation, script: Path, name: str
) -> None:
    run_id = federation.submit(run_of(name))
    detail = until(lambda: detail_of(federation, run_id, "faulty"), "the site said no")
    assert detail.startswith(REASONS[name])
    assert PRIVATE not in detail
    assert federation.finish(run_id).status == "done"
    assert federation.digest(run_id) == simulated(run_of(name))
    assert PRIVATE not in federation.server.output
    if PRIVATE in PROBLEMS.get(name, ""):
        federation.clients["faulty"].says(PRIVATE)  # what the task's code said stays in the site's own log


def test_a_worker_that_breaks_is_started_again_and_its_site_takes_part_in_the_next_round(
    federation: Federation, script: Path
) -> None:
    deeds = ["exit", "", "crash", "", "raise", "", "nan", "", "eat", ""]
    script.write_text("\n".join(deeds))
    run_id = begun_by_all(federation, run_of("tiny", rounds=len(deeds)))
    assert federation.finish(run_id).status == "done"
    took_part = [HONEST if deed else [*HONEST, "faulty"] for deed in deeds]
    assert [list(row.clients) for row in federation.show(run_id).history] == took_part
    reasons = [
        line.partition(" reason=")[2]
        for line in federation.server.output.splitlines()
        if f"order_failed run={run_id} site=faulty" in line
    ]
    assert reasons == [
        "worker_crashed: the worker ended by itself with exit code 7",
        "worker_crashed: the worker was ended by SIGSEGV",
        "task_failed: the task's code failed (ValueError)",
        "not_finite: training made an update with NaN or infinity: lower the learning rate",
        "out_of_memory: the worker used more than 800 MB and was killed",
    ]
    assert "Jane Doe" in federation.clients["faulty"].output
    assert "Jane Doe" not in federation.server.output


def test_the_owner_of_a_run_sees_the_last_failure_of_a_site_that_still_takes_part(
    federation: Federation, script: Path
) -> None:
    script.write_text("raise\n")
    run_id = begun_by_all(federation, run_of("tiny"))
    assert federation.finish(run_id).status == "done"
    clients = {client["name"]: client for client in federation.show_json(run_id)["clients"]}
    assert clients["faulty"]["detail"] == "task_failed: the task's code failed (ValueError)"
    assert [clients[name]["detail"] for name in HONEST] == ["", ""]


def test_a_worker_that_hangs_is_killed_and_the_run_goes_on(federation: Federation, hanging: str) -> None:
    assert federation.finish(hanging).status == "done"
    assert [list(row.clients) for row in federation.show(hanging).history] == [HONEST]
    detail = detail_of(federation, hanging, "hanger")
    assert detail == f"worker_hung: the worker made no progress for {HANG_S} s and was killed"
    assert federation.clients["hanger"].workers() == []

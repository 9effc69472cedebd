"""Flower clients in native runs: the same ClientApp, behind the site's own gate, and in secure sums."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import lines
import numpy as np
import pytest
from harness import Federation, coordinator, fedge, fedge_ok
from safetensors.numpy import load_file

from fedge.vector import Array
from fedge.wire import fedge_pb2 as pb

SITES = range(3)
SECURE = """
[secure_aggregation]
enabled = true
bound = 50.0
max_weight = 100
exchange_s = 20
metrics = ["train_loss", "loss"]
"""


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    with coordinator(tmp_path_factory.mktemp("lines")) as started:
        for at in SITES:
            started.enrol(f"site-{at}", data={"partition-id": at})
            shutil.copy(lines.__file__, started.folder / f"site-{at}")
            started.start(f"site-{at}")
        yield started


def run_toml(*, strategy: str = "", more: str = "", size: int = 3) -> str:
    return f"""\
name = "lines"
task = "lines:task"
rounds = 3

[work]
steps = 4
batch_size = 8
learning_rate = 0.1

[cohort]
size = {size}
quorum = {size}
deadline_s = 60
wait_s = 60

{strategy}
{more}
"""


def submitted(federation: Federation, folder: Path, text: str) -> pb.RunDetail:
    """`fedge run submit --watch`, by somebody who has the app beside run.toml."""
    shutil.copy(lines.__file__, folder)
    (folder / "run.toml").write_text(text)
    out = fedge_ok("run", "submit", folder / "run.toml", "--admin", federation.admin_toml, "--watch")
    return federation.show(out.strip().splitlines()[-1])


def by_hand(*, gradients: bool = False) -> Array:
    w = np.zeros(3)
    for _ in range(3):
        moved, weights = [], []
        for at in SITES:
            x, y = lines.points(at)
            own = w.copy()
            for _ in range(1 if gradients else 4):
                own -= 0.1 * lines.gradient(own, x, y)
            moved.append(own)
            weights.append(len(y))
        w = np.average(moved, axis=0, weights=weights)
    return w.astype(np.float32)


@pytest.mark.parametrize("more", ["", SECURE], ids=["in clear", "in secure sums"])
def test_a_flower_client_takes_part_in_a_native_run(
    more: str, federation: Federation, tmp_path: Path
) -> None:
    detail = submitted(federation, tmp_path, run_toml(more=more))
    assert detail.summary.status == "done", detail.summary.reason
    assert np.allclose(federation.model(detail.summary.run_id), by_hand(), atol=1e-4)
    last = {metric.name: metric.value for metric in detail.history[-1].metrics}
    first = {metric.name: metric.value for metric in detail.history[0].metrics}
    assert last["loss"] < first["loss"]
    if not more:
        assert detail.history[-1].num_examples == sum(len(lines.points(at)[1]) for at in SITES)
        assert last["turns"] == 3, "its state is kept"


def test_it_gives_gradients_to_strategies_of_gradients(federation: Federation, tmp_path: Path) -> None:
    strategy = '[strategy]\nname = "mirrored_sgd"\nlearning_rate = 0.1\nmomentum = 0.0\n'
    detail = submitted(federation, tmp_path, run_toml(strategy=strategy))
    assert np.allclose(federation.model(detail.summary.run_id), by_hand(gradients=True), atol=1e-4)


def test_privacy_of_examples_is_refused_where_nobody_could_see_to_it(
    federation: Federation, tmp_path: Path
) -> None:
    text = run_toml(more='[privacy]\nunit = "example"\nepsilon = 2.0\ndelta = 1e-5\nclip = 1.0\n')
    shutil.copy(lines.__file__, tmp_path)
    (tmp_path / "run.toml").write_text(text)
    done = fedge("run", "submit", tmp_path / "run.toml", "--admin", federation.admin_toml)
    assert done.returncode == 6
    assert "trains by itself, so that its examples cannot be protected" in done.stderr


def test_the_simulation_of_such_a_run_comes_to_the_same_bits(federation: Federation, tmp_path: Path) -> None:
    detail = submitted(federation, tmp_path, run_toml())
    fedge_ok("simulate", tmp_path / "run.toml", "--clients", "3", "--out", tmp_path / "results")
    (simulated,) = (tmp_path / "results").rglob("model.safetensors")
    found = load_file(simulated)
    assert np.array_equal(found["w"].reshape(-1), federation.model(detail.summary.run_id))


def test_what_such_a_run_costs_is_planned_as_for_any_other(federation: Federation, tmp_path: Path) -> None:
    privacy = '[privacy]\nunit = "client"\nepsilon = 8.0\ndelta = 1e-5\nclip = 1.0\n'
    secure = "[secure_aggregation]\nenabled = true\n"
    shutil.copy(lines.__file__, tmp_path)
    (tmp_path / "run.toml").write_text(run_toml(more=privacy + secure))
    client = federation.folder / "site-0/client.toml"
    planned = json.loads(fedge_ok("privacy", "plan", tmp_path / "run.toml", "--json"))
    at_site = json.loads(fedge_ok("privacy", "plan", tmp_path / "run.toml", "--client", client, "--json"))
    assert at_site["cost"]["epsilon"] == planned[0]["epsilon"] <= 8.0
    assert at_site["examples"] == 0
    (tmp_path / "run.toml").write_text(run_toml(more=privacy.replace('"client"', '"example"')))
    refused = fedge("privacy", "plan", tmp_path / "run.toml", "--client", client)
    assert refused.returncode == 6
    assert "its examples cannot be protected" in refused.stderr


def test_a_client_app_that_raises_tells_the_coordinator_no_more_than_that(
    federation: Federation, tmp_path: Path
) -> None:
    federation.enrol("site-9", data={"partition-id": 1, "broken": True})
    shutil.copy(lines.__file__, federation.folder / "site-9")
    client = federation.start("site-9")
    try:
        shutil.copy(lines.__file__, tmp_path)
        (tmp_path / "run.toml").write_text(run_toml(size=4))
        done = fedge("run", "submit", tmp_path / "run.toml", "--admin", federation.admin_toml, "--watch")
        assert done.returncode == 1, "it needs all four"
        assert "patient 4711 has no age" in client.output
        assert "4711" not in federation.server.output + done.stdout + done.stderr
    finally:
        client.end()


def test_a_task_that_trains_by_itself_may_be_looked_at_before(federation: Federation) -> None:
    out = fedge_ok("client", "check", federation.folder / "site-0/client.toml", "--task", "lines:task")
    assert "trains by itself" in out

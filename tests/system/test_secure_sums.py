"""Secure sums by real processes over real TLS: the mean is the mean, and the coordinator has only that."""

from __future__ import annotations

import contextlib
import re
import signal
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
import tiny
from harness import Federation, coordinator, run_toml, until
from scripted import honest_update
from wiretap import wiretap

from fedge.config import parse_toml
from fedge.errors import RunError
from fedge.events import OrderId
from fedge.faults import SUM_POINTS, SUMMING_POINTS
from fedge.run import RunConfig
from fedge.secagg.terms import SumTerms
from fedge.vector import Array, bytes_of
from fedge.wire import fedge_pb2 as pb
from fedge.wire.codec import decode_order_id, encode_blob, encode_order_id
from fedge_client.torch.framework import framework
from fedge_sim import Result, simulate
from fedge_strategies import FedAvg

SITES = [f"client-{n}" for n in range(4)]
SECURE = """
[secure_aggregation]
enabled = true
bound = 50.0
max_weight = 100
exchange_s = 20
metrics = ["train_loss", "loss", "bias"]
"""


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    with coordinator(tmp_path_factory.mktemp("secure")) as started:
        for name in SITES:
            started.enrol(name)
        for name in SITES:
            started.start(name)
        yield started


def in_clear(text: str) -> Result:
    """The same run simulated, without secure aggregation."""
    return simulate(
        run_of(text.replace("enabled = true", "enabled = false")), task=tiny.task, clients=len(SITES)
    )


@pytest.mark.parametrize(
    ("suite", "strategy"),
    [
        ("x25519", "fedavg"),
        ("x25519", "mirrored_sgd"),
        ("x25519", "scaffold"),
        ("x25519", "fedper"),
        ("x25519-mlkem768", "fedavg"),
    ],
)
def test_a_secure_run_makes_the_mean_that_there_is_in_clear(
    federation: Federation, suite: str, strategy: str
) -> None:
    name = "fedavg" if strategy == "fedper" else strategy
    more = f'{SECURE}suite = "{suite}"\n[strategy]\nname = "{name}"\n'
    text = run_toml("secure", rounds=4, size=4, quorum=4, more=more)
    if strategy == "fedper":
        text = text.replace("[work]\n", '[work]\npersonal = ["bias"]\n')
    if strategy == "scaffold":
        text = text.replace("[work]\n", "[work]\nsteps = 3\n") + 'clients = 4\nweighting = "examples"\n'
    detail = federation.run(text)
    clear = in_clear(text)
    assert np.allclose(federation.model(detail.summary.run_id), clear.model.vector, atol=1e-4)
    for row, other in zip(detail.history, clear.history, strict=True):
        assert list(row.clients) == SITES
        assert row.num_examples == other.num_examples
        found = {metric.name: metric.value for metric in row.metrics}
        assert found == pytest.approx(dict(other.metrics), abs=1e-3)


def test_a_site_whose_update_was_cut_to_the_bound_is_told_in_its_own_log(federation: Federation) -> None:
    narrow = SECURE.replace("bound = 50.0", "bound = 1e-4")
    detail = federation.run(run_toml("narrow", rounds=1, size=4, quorum=4, more=narrow))
    metrics = {metric.name: metric.value for metric in detail.history[0].metrics}
    assert metrics["beyond_bound"] == 1.0
    for name in SITES:
        federation.clients[name].says(f"update_cut run={detail.summary.run_id}")


def mean_of_honest(run: RunConfig, rows: Iterable[pb.HistoryRow]) -> Array:
    """The model that the means of honest updates of just these cohorts make."""
    model = framework.initial_model(tiny.task, seed=run.seed).vector.copy()
    for row in rows:
        id = encode_order_id(OrderId("train", row.round, row.attempt))
        order = pb.Order(id=id, model=encode_blob(bytes_of(model)))
        updates = [honest_update(order, run, site=site) for site in row.clients]
        if updates:  # else it was skipped
            weights = [update.num_examples for update in updates]
            assert row.num_examples == sum(weights)
            vectors = [np.frombuffer(update.vector.inline, np.float32) for update in updates]
            model += np.average(vectors, axis=0, weights=weights).astype(np.float32)
    return model


def run_of(text: str) -> RunConfig:
    return parse_toml(text, RunConfig, source="run.toml")


@contextlib.contextmanager
def all_blocked(federation: Federation, names: list[str]) -> Iterator[None]:
    """Within the block no round ends, whoever of these takes part in it."""
    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(federation.blocked(name))
        yield


def all_joined(federation: Federation, run_id: str, names: list[str]) -> None:
    """Wait until all of these take part, or have been killed."""

    def joined() -> bool:
        killed = {name for name in names if federation.clients[name].process.poll() is not None}
        return federation.ready(run_id) | killed >= {*names}

    until(joined, "everybody has joined")


@pytest.mark.slow
@pytest.mark.parametrize("point", SUM_POINTS)
def test_a_site_that_is_killed_at_any_phase_of_a_sum_costs_at_most_its_own_part(
    federation: Federation, point: str
) -> None:
    """Among four a sum needs three, of whom each holds shares of the fourth's secrets."""
    more = SECURE + "[evaluation]\nevery = 0\n"
    text = run_toml(point.replace(".", "-"), rounds=4, size=4, quorum=3, more=more)
    federation.clients[SITES[3]].signal(signal.SIGTERM)
    until(lambda: SITES[3] not in federation.connected(), "the victim is gone")
    with all_blocked(federation, SITES[:3]):
        run_id = federation.submit(text)
        for name in SITES[:3]:  # of three, none could be spared
            federation.at_work(name)
        victim = federation.start(SITES[3], fault=f"{point}:1")
        all_joined(federation, run_id, SITES)
    assert victim.ends() == -signal.SIGKILL, f"{point} was reached"
    federation.start(SITES[3])
    assert federation.finish(run_id).status == "done"
    history = federation.show(run_id).history
    assert [row.round for row in history] == [1, 2, 3, 4]
    assert all(len(row.clients) >= 3 for row in history)
    assert np.allclose(federation.model(run_id), mean_of_honest(run_of(text), history), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "point", [*(point for point in SUMMING_POINTS if point.endswith("before")), SUMMING_POINTS[-1]]
)
def test_a_coordinator_that_is_killed_in_a_sum_begins_anew_or_goes_on_without_that_round(
    tmp_path: Path, point: str
) -> None:
    with coordinator(tmp_path) as federation:
        names = SITES[:3]
        for name in names:
            federation.enrol(name)
        federation.server.signal(signal.SIGTERM)
        federation = federation.restarted(fault=f"{point}:2")
        for name in names:
            federation.start(name)
        more = SECURE + "[evaluation]\nevery = 0\n"
        text = run_toml("killed", rounds=3, size=3, quorum=3, more=more)
        run_id = federation.submit(text)
        assert federation.server.ends() == -signal.SIGKILL, f"{point} was reached"
        federation = federation.restarted()
        assert federation.finish(run_id).status == "done"
        history = federation.show(run_id).history
        assert [row.round for row in history] == [1, 2, 3]
        skipped = [row.round for row in history if not row.clients]
        assert skipped == ([2] if "unmask" in point else [])
        assert all(list(row.clients) == names for row in history if row.round not in skipped)
        assert np.allclose(federation.model(run_id), mean_of_honest(run_of(text), history), atol=1e-5)


@pytest.mark.slow
def test_of_twenty_sites_six_are_killed_in_all_phases_and_each_round_is_the_sum_of_those_who_came_through(
    tmp_path: Path,
) -> None:
    names = [f"site-{n:02}" for n in range(20)]
    victims = {
        "site-03": "sum.advertised:1",  # before the roster
        "site-06": "sum.shared:1",  # in it, without having shared
        "site-08": "sum.opened:2",  # has shared: its mask's seed is rebuilt
        "site-11": "job.trained:2",
        "site-14": "sum.consented:3",  # has handed in: its self mask's seed is rebuilt
        "site-17": "sum.spent:3",  # has consented, and reveals nothing
    }
    with coordinator(tmp_path) as federation:
        for name in names:
            federation.enrol(name)
            federation.start(name, fault=victims.get(name, ""))
        more = SECURE + "[evaluation]\nevery = 0\n"
        text = run_toml("twenty", rounds=5, size=20, quorum=14, more=more)
        with all_blocked(federation, names):
            run_id = federation.submit(text)
            all_joined(federation, run_id, names)
        assert federation.finish(run_id).status == "done"
        detail = federation.show(run_id)
        for name in victims:
            assert federation.clients[name].ends() == -signal.SIGKILL, f"{name} was killed"
        assert len(detail.history) == 5
        assert all(14 <= len(row.clients) <= 20 for row in detail.history)
        # An update that was handed in counts, whatever becomes of its site.
        assert all(any(name in row.clients for row in detail.history) for name in ("site-14", "site-17"))
        model = federation.model(run_id)
        assert np.allclose(model, mean_of_honest(run_of(text), detail.history), atol=1e-4)

        # One more, and every attempt is below what a sum of theirs needs.
        lonely = run_toml("below", rounds=1, size=14, quorum=14, more=more)
        run_id = federation.submit(lonely.replace("quorum = 14", "quorum = 14\nattempts = 1"))
        with federation.blocked("site-00"):
            federation.at_work("site-00")
            federation.clients["site-01"].signal(signal.SIGKILL)
            summary = federation.finish(run_id)
        assert summary.status == "failed"
        assert re.search(r"13 of (14 members of the secure sum|at least 14 clients)", summary.reason)


def test_no_update_weight_or_metric_leaves_a_site_in_clear(tmp_path: Path) -> None:
    """What a site sends is read in clear, behind TLS: beside keys and shares that are sealed, masked vectors."""
    names = SITES[:3]
    with coordinator(tmp_path) as federation, contextlib.ExitStack() as stack:
        for name in names:
            federation.enrol(name, policy={"require_secure_aggregation": True, "min_cohort": 3})
        folder = tmp_path / names[0]
        tap = stack.enter_context(wiretap(federation.address, home=federation.home, site=folder))
        settings = folder / "client.toml"
        settings.write_text(settings.read_text().replace(federation.address, tap.address))
        for name in names:
            federation.start(name)
        text = run_toml("tapped", rounds=3, size=3, quorum=3, more=SECURE)
        run_id = federation.run(text).summary.run_id
        run = run_of(text)
        initial = framework.initial_model(tiny.task, seed=run.seed)
        terms = SumTerms.of(run, FedAvg(), initial.layout)
        assert terms is not None
        updates = tap.updates(run_id)
        assert [decode_order_id(update.id).kind for update in updates] == ["train", "evaluate"] * 3
        model = initial.vector.copy()
        for update in updates:
            order = pb.Order(id=update.id, model=encode_blob(bytes_of(model)))
            honest = honest_update(order, run, site=names[0])
            assert (update.num_examples, list(update.metrics), len(update.proof)) == (1, [], 64)
            assert not honest.vector.size or honest.vector.inline not in tap.everything
            for metric in honest.metrics:
                assert struct.pack("<d", metric.value) not in tap.everything
            encoding = terms.encoding(len(model) if honest.vector.size else 0, b"")
            with pytest.raises(RunError):  # alone it is the sum of nobody
                encoding.decode(encoding.unpack(update.vector.inline), 1)
            if honest.vector.size:
                updated = [honest_update(order, run, site=name) for name in names]
                vectors = [np.frombuffer(each.vector.inline, np.float32) for each in updated]
                weights = [each.num_examples for each in updated]
                model += np.average(vectors, axis=0, weights=weights).astype(np.float32)

        # Without it, nothing starts here.
        other = federation.submit(run_toml("in-clear", rounds=1, size=3, quorum=3))
        until(lambda: len(refusals(federation, other)) == 3, "all have refused")
        assert all("[policy] requires it" in each for each in refusals(federation, other))
        assert not tap.updates(other)
        federation.admin.Stop(pb.RunRef(run_id=other))


def refusals(federation: Federation, run_id: str) -> list[str]:
    return [client.detail for client in federation.show(run_id).clients if client.state == "refused"]

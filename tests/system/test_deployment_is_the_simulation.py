"""A federation of real processes computes what the simulator computes, to the bit."""

from __future__ import annotations

import pytest
from harness import Federation, initial_model, run_toml, simulated, until
from scripted import honest_update, scripted

from fedge.config import parse_toml
from fedge.run import RunConfig
from fedge.wire import fedge_pb2 as pb
from fedge_client.jobs import VARIATES

HONEST = ["client-0", "client-1"]
STRATEGIES = {
    "fedavg": '[strategy]\nname = "fedavg"\nserver_learning_rate = 0.5',
    "fedavg of uniform weights, clipped": (
        '[strategy]\nname = "fedavg"\nweighting = "uniform"\n[privacy]\nunit = "none"\nclip = 0.01'
    ),
    "fedavg by the median": '[strategy]\nname = "fedavg"\naggregation = "median"',
    "fedavg by the trimmed mean": '[strategy]\nname = "fedavg"\naggregation = "trimmed_mean"\ntrim = 0.3',
    "mirrored_sgd": '[strategy]\nname = "mirrored_sgd"',
    "mirrored_sgd with adam": '[strategy]\nname = "mirrored_sgd"\noptimizer = "adam"\nlearning_rate = 0.01',
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_run_makes_the_same_bits_deployed_and_simulated(federation: Federation, name: str) -> None:
    text = run_toml("same-bits", rounds=5, more=STRATEGIES[name])
    detail = federation.run(text)
    assert [list(row.clients) for row in detail.history] == [HONEST] * 5
    assert federation.digest(detail.summary.run_id) == simulated(text)


def test_a_model_that_travels_in_chunks_makes_the_same_bits(federation: Federation) -> None:
    text = run_toml("in-chunks", task="wide:task", rounds=3)
    assert federation.digest(federation.run(text).summary.run_id) == simulated(text)


def test_clients_that_are_held_to_where_they_began_make_the_same_bits(federation: Federation) -> None:
    free = run_toml("fedprox", rounds=3)
    held = free.replace("[work]\n", "[work]\nproximal = 0.5\n")
    assert federation.digest(federation.run(held).summary.run_id) == simulated(held) != simulated(free)


def corrected(text: str, *, clients: int = 2) -> str:
    """A run whose sites keep control variates."""
    text = text.replace("[work]\n", "[work]\nsteps = 3\n")
    return f'{text}\n[strategy]\nname = "scaffold"\nclients = {clients}\n'


def personal(text: str) -> str:
    """A run whose sites keep the bias to themselves."""
    return text.replace("[work]\n", '[work]\npersonal = ["*bias"]\n')


@pytest.mark.parametrize("task", ["tiny:task", "wide:task"])
def test_sites_that_keep_control_variates_make_the_same_bits(federation: Federation, task: str) -> None:
    free = run_toml("free", task=task, rounds=6)
    text = corrected(run_toml("scaffold", task=task, rounds=6))
    run_id = federation.run(text).summary.run_id
    assert federation.digest(run_id) == simulated(text)
    assert simulated(text) != simulated(free.replace("[work]\n", "[work]\nsteps = 3\n"))
    until(lambda: not list((federation.folder / "client-0" / VARIATES).iterdir()), "nothing is left of a run")


@pytest.mark.parametrize("task", ["tiny:task", "wide:task"])
def test_sites_that_keep_layers_to_themselves_make_the_same_bits(federation: Federation, task: str) -> None:
    text = personal(run_toml("fedper", task=task, rounds=6))
    run_id = federation.run(text).summary.run_id
    assert federation.digest(run_id) == simulated(text) != simulated(run_toml("fedper", task=task, rounds=6))
    assert len(federation.model(run_id)) == initial_model(text).layout.size
    assert not any("bias" in name for name in initial_model(text).layout.names)
    until(lambda: not list((federation.folder / "client-0" / VARIATES).iterdir()), "nothing is left of a run")


def test_several_runs_at_once_do_not_touch_each_other(federation: Federation) -> None:
    texts = [
        run_toml("at-once", rounds=10, task=task, more=more).replace("seed = 7", f"seed = {seed}")
        for seed, (task, more) in enumerate(
            [
                ("tiny:task", STRATEGIES["fedavg"]),
                ("wide:task", ""),
                ("tiny:task", STRATEGIES["mirrored_sgd"]),
            ]
        )
    ]
    with federation.blocked("client-0"):
        run_ids = [federation.submit(texts[0])]
        federation.at_work("client-0")
        run_ids += [federation.submit(text) for text in texts[1:]]
        until(lambda: all("client-1" in federation.ready(each) for each in run_ids), "the runs are under way")
    for run_id, text in zip(run_ids, texts, strict=True):
        assert federation.finish(run_id).status == "done"
        assert federation.digest(run_id) == simulated(text)


@pytest.mark.parametrize("task", ["tiny:task", "wide:task"])
def test_parameter_server_sgd_applies_gradients_as_they_arrive_unless_too_stale(
    federation: Federation, task: str
) -> None:
    more = '[strategy]\nname = "sgd"\nmax_staleness = 1\n[evaluation]\nevery = 5\n'
    text = run_toml("on-arrival", rounds=12, task=task, more=more)
    fast = federation.control("client-1")
    (fast / "script").write_text("\n\n\n\nblock\n")  # four steps, and then it waits in the fifth
    with federation.blocked("client-0"):
        with federation.blocked("client-1"):
            run_id = federation.submit(text)
            for name in HONEST:
                federation.at_work(name)
        until(lambda: federation.show(run_id).summary.round == 4, "the fast one has made four steps")
    # The slow one's gradient is of the first model: refused, and the site is given the fourth.
    until(lambda: federation.show(run_id).summary.round >= 8, "the slow one has taken over")
    (fast / "block").unlink()
    (fast / "script").unlink()
    assert federation.finish(run_id).status == "done"
    rows = federation.show(run_id).history
    assert [list(row.clients) for row in rows[:8]] == [["client-1"]] * 4 + [["client-0"]] * 4
    assert all(len(row.clients) == 1 and row.staleness <= 1 for row in rows)
    assert rows[4].refused == 1
    assert {metric.name for metric in rows[-1].metrics} == {"train_loss", "loss", "bias"}
    assert f"order_failed run={run_id}" not in federation.server.output


def test_a_site_that_joins_late_takes_part_from_then_on(federation: Federation) -> None:
    """The third site is played here: it does what an honest site would, and comes when the others wait."""
    text = run_toml("late-comer", rounds=2, quorum=3, size=3)
    run = parse_toml(text, RunConfig, source="run.toml")
    run_id = federation.submit(text)
    until(lambda: federation.ready(run_id) == set(HONEST), "two sites are ready")
    summary = federation.show(run_id).summary
    assert summary.status == "waiting"
    assert summary.reason.startswith("waiting for clients: 2 of 3 are ready")
    with scripted(federation.address, federation.enrol("client-2")) as late:
        late.join(run_id)
        kinds = []
        for _ in range(4):
            order = late.order(run_id)
            kinds.append(order.id.kind)
            assert not late.hand_in(honest_update(order, run, site="client-2")).HasField("refusal")
        assert kinds == [pb.KIND_TRAIN, pb.KIND_EVALUATE] * 2
        assert federation.finish(run_id).status == "done"
        assert [list(row.clients) for row in federation.show(run_id).history] == [[*HONEST, "client-2"]] * 2
        assert federation.digest(run_id) == simulated(text, clients=3)

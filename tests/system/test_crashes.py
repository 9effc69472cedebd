"""The coordinator is killed at every point where it does something, and every run comes out as if it had not been."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import grpc
import pytest
from harness import Federation, coordinator, fedge, run_toml, simulated, until

from fedge.faults import COORDINATOR_POINTS
from fedge.wire import fedge_pb2 as pb

SITES = ["client-0", "client-1"]
OFTEN = "[checkpoint]\nrounds = 1\nseconds = 0\n"
RARE = ("submit", "effect.reject", "effect.cancel", "effect.giveup", "effect.finish", "upload")
COMMON = [point for point in COORDINATOR_POINTS if not point.startswith(RARE)]


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """A federation whose coordinator every test starts and kills as it likes; its agents live on."""
    with coordinator(tmp_path_factory.mktemp("crashes")) as federation:
        for name in SITES:
            federation.enrol(name)
            federation.start(name)
        federation.server.signal(signal.SIGTERM)
        yield federation
    assert not any("Traceback" in client.output for client in federation.clients.values())


@pytest.fixture(autouse=True)
def one_at_a_time(sites: Federation) -> Iterator[None]:
    yield
    for server in sites.servers:
        server.end()


def check(federation: Federation, run_id: str, text: str, *, rounds: int) -> None:
    """The run ends as it would have ended without any crash: to the bit, with every update counted once."""
    summary = federation.finish(run_id)
    assert summary.status == "done", summary.reason
    history = federation.show(run_id).history
    assert [row.round for row in history] == list(range(1, rounds + 1))
    assert [list(row.clients) for row in history] == [SITES] * rounds
    assert federation.digest(run_id) == simulated(text)
    assert "Traceback" not in federation.server.output


@pytest.mark.slow
@pytest.mark.parametrize("at", [1, 4])
def test_a_run_survives_a_kill_at_every_point_one_after_another(sites: Federation, at: int) -> None:
    rounds = 500 * at
    text = run_toml(f"every-point-{at}", rounds=rounds, more="[evaluation]\nevery = 7\n" + OFTEN)
    first = sites.restarted(fault=f"{COMMON[-1]}:{at + 2}")
    run_id = first.submit(text)
    assert first.server.ends() == -signal.SIGKILL
    for point in COMMON:
        # A slow disk makes moments rare that are kept: that takes at most a tenth of the time.
        hits = 1 if point.startswith(("recover", "witness", "updates", "checkpoint", "store")) else at
        armed = sites.restarted(fault=f"{point}:{hits}", ready=False)
        assert armed.server.ends() == -signal.SIGKILL, f"{point} was reached"
    last = sites.restarted()
    assert last.show(run_id).summary.round < rounds, "it was killed while it was at work"
    check(last, run_id, text, rounds=rounds)


@pytest.mark.parametrize(
    ("at", "work", "strategy"),
    [
        (20, "steps = 3", '[strategy]\nname = "scaffold"\nclients = 2\n'),
        (42, "steps = 3", '[strategy]\nname = "scaffold"\nclients = 2\n'),
        (70, "steps = 3", '[strategy]\nname = "scaffold"\nclients = 2\n'),
        (45, 'personal = ["bias"]', ""),
    ],
)
def test_sites_have_what_they_keep_of_rounds_that_the_coordinator_has_lost(
    sites: Federation, at: int, work: str, strategy: str
) -> None:
    """It keeps every seventh round: those behind that are done again, from what sites had then."""
    text = run_toml(f"kept-{at}", rounds=40, more="[evaluation]\nevery = 0\n").replace(
        "[work]\n", f"[work]\n{work}\n"
    )
    text += strategy + "[checkpoint]\nrounds = 7\nseconds = 3600\n"
    armed = sites.restarted(fault=f"event.before:{at}")
    run_id = armed.submit(text)
    assert armed.server.ends() == -signal.SIGKILL
    last = sites.restarted()
    check(last, run_id, text, rounds=40)
    assert last.server.output.count(f"round_committed run={run_id}") > 40, "some rounds were done twice"


@pytest.mark.parametrize("point", ["submit.before", "submit.after"])
def test_a_submission_is_kept_whole_or_not_at_all(sites: Federation, point: str) -> None:
    text = run_toml(point.replace(".", "-"), rounds=2)
    armed = sites.restarted(fault=point)
    with pytest.raises(grpc.RpcError):
        armed.submit(text)
    assert armed.server.ends() == -signal.SIGKILL
    last = sites.restarted()
    found = [run.run_id for run in last.admin.List(pb.ListRequest()).runs if run.name in text]
    assert len(found) == (point == "submit.after")
    for run_id in found:
        check(last, run_id, text, rounds=2)


@pytest.mark.parametrize("at", [1, 3, 5])
def test_an_upload_that_was_under_way_is_brought_again(sites: Federation, at: int) -> None:
    text = run_toml(f"upload-{at}", task="wide:task", rounds=4, more=OFTEN)
    armed = sites.restarted(fault=f"upload.chunk:{at}")
    run_id = armed.submit(text)
    assert armed.server.ends() == -signal.SIGKILL
    check(sites.restarted(), run_id, text, rounds=4)


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_update_that_was_being_refused_is_not_counted(sites: Federation, when: str) -> None:
    """Without rounds, and with no staleness allowed, the gradient of a slow site is refused."""
    strategy = '[strategy]\nname = "sgd"\nmax_staleness = 0\n'
    rounds = 1000
    text = run_toml(f"reject-{when}", rounds=rounds, more="[evaluation]\nevery = 0\n" + strategy + OFTEN)
    armed = sites.restarted(fault=f"effect.reject.{when}")
    until(lambda: armed.connected() == set(SITES), "both are back")
    with armed.blocked("client-0"):
        run_id = armed.submit(text)
        armed.at_work("client-0")
        until(lambda: armed.show(run_id).summary.round > 0, "the model has moved on")
    assert armed.server.ends() == -signal.SIGKILL
    last = sites.restarted()
    summary = last.finish(run_id)
    assert summary.status == "done", summary.reason
    history = last.show(run_id).history
    assert [row.round for row in history] == list(range(1, rounds + 1))
    assert {len(row.clients) for row in history} == {1}
    assert "Traceback" not in last.server.output


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_run_that_had_just_ended_ends_again(sites: Federation, when: str) -> None:
    text = run_toml(f"ends-{when}", rounds=2, more=OFTEN)
    armed = sites.restarted(fault=f"effect.finish.{when}")
    run_id = armed.submit(text)
    assert armed.server.ends() == -signal.SIGKILL
    last = sites.restarted()
    check(last, run_id, text, rounds=2)


@pytest.mark.parametrize("effect", ["cancel", "giveup"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_round_that_was_being_given_up_is_given_up_or_completed(
    sites: Federation, effect: str, when: str
) -> None:
    text = run_toml(f"{effect}-{when}", rounds=2, more="[evaluation]\nevery = 0\n" + OFTEN)
    text = text.replace("deadline_s = 60", "deadline_s = 2\nattempts = 100")
    armed = sites.restarted(fault=f"effect.{effect}.{when}")
    with armed.blocked("client-1"):
        run_id = armed.submit(text)
        assert armed.server.ends() == -signal.SIGKILL
    last = sites.restarted()
    assert last.finish(run_id).status == "done"
    assert [list(row.clients) for row in last.show(run_id).history] == [SITES] * 2


def test_a_full_disk_makes_a_run_wait_and_say_so_until_there_is_room(sites: Federation) -> None:
    text = run_toml("full-disk", rounds=300, more=OFTEN)
    full = sites.restarted(fault="store.commit:5:fail:4")
    run_id = full.submit(text)

    def waits() -> bool:
        summary = full.show(run_id).summary
        return summary.status == "waiting" and "No space left on device" in summary.reason

    until(waits, "the run waits for room")
    shown = fedge("run", "show", run_id, "--admin", full.admin_toml)
    assert "cannot keep this run, and goes on when it can" in " ".join(shown.stdout.split())
    check(full, run_id, text, rounds=300)
    full.server.says("run_kept_again")

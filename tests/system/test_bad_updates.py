"""One site lies in every way it can, a round for each. Its contribution is lost, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from threading import Event

import grpc
import numpy as np
import pytest
from harness import Federation, run_toml, simulated, until
from scripted import Scripted, channel, scripted, status_of, update_of

from fedge.exact import MAX_WEIGHT
from fedge.refusal import RefusalCode
from fedge.vector import digest_of
from fedge.wire import fedge_pb2 as pb
from fedge.wire import fedge_pb2_grpc as services
from fedge.wire.limits import MAX_MESSAGE_BYTES, MAX_METRICS, MAX_NAME_BYTES

GOOD = np.array([0.25, -0.5, 1.0, 2.0], np.float32)
Lie = Callable[[Scripted, pb.Order], pb.Receipt]


def in_session(**changes: object) -> Lie:
    """A good update but for these fields."""
    return lambda site, order: site.hand_in(update_of(order, GOOD, **changes))


def vector(values: object, *, inline: bool = True) -> Lie:
    array = np.asarray(values, np.float32)
    if inline:
        return lambda site, order: site.hand_in(update_of(order, array))
    return lambda site, order: site.deliver(update_of(order, array, inline=False), array.tobytes())


def chunks(*parts: bytes) -> Lie:
    return lambda site, order: site.deliver(update_of(order, GOOD, inline=False), *parts)


def metrics(*pairs: tuple[str, float]) -> Lie:
    def lie(site: Scripted, order: pb.Order) -> pb.Receipt:
        update = update_of(order, GOOD)
        update.metrics.extend(pb.Metric(name=name, value=value) for name, value in pairs)
        return site.hand_in(update)

    return lie


def blob(data: bytes, *, size: int, digest: bytes) -> pb.Blob:
    return pb.Blob(digest=digest, size=size, inline=data)


BYTES = GOOD.tobytes()
NAN = np.array([1, np.nan, 0, 0], np.float32)
LIES: dict[str, tuple[Lie, RefusalCode]] = {
    "nan": (vector(NAN), RefusalCode.NOT_FINITE),
    "infinity": (vector([0, 0, 0, -np.inf]), RefusalCode.NOT_FINITE),
    "too short": (vector([1, 2, 3]), RefusalCode.WRONG_LENGTH),
    "too long": (vector([1, 2, 3, 4, 5]), RefusalCode.WRONG_LENGTH),
    "nothing at all": (vector([]), RefusalCode.WRONG_LENGTH),
    "a claim of 2^63 bytes": (
        in_session(vector=blob(BYTES, size=2**63, digest=digest_of(BYTES))),
        RefusalCode.WRONG_LENGTH,
    ),
    "fewer bytes than it says": (
        in_session(vector=blob(BYTES[:8], size=16, digest=digest_of(BYTES[:8]))),
        RefusalCode.WRONG_DIGEST,
    ),
    "another digest": (in_session(vector=blob(BYTES, size=16, digest=bytes(32))), RefusalCode.WRONG_DIGEST),
    "a digest of 5 bytes": (
        in_session(vector=blob(BYTES, size=16, digest=b"short")),
        RefusalCode.WRONG_DIGEST,
    ),
    "bytes that never come": (in_session(inline=False), RefusalCode.WRONG_LENGTH),
    "weight 0": (in_session(num_examples=0), RefusalCode.BAD_WEIGHT),
    "weight 2^63": (in_session(num_examples=2**63), RefusalCode.BAD_WEIGHT),
    "weight one too many": (in_session(num_examples=MAX_WEIGHT), RefusalCode.BAD_WEIGHT),
    "a metric of nan": (metrics(("loss", float("nan"))), RefusalCode.BAD_METRICS),
    "a metric of infinity": (metrics(("loss", float("inf"))), RefusalCode.BAD_METRICS),
    "too many metrics": (
        metrics(*((f"m{at}", 0.0) for at in range(MAX_METRICS + 1))),
        RefusalCode.BAD_METRICS,
    ),
    "a metric twice": (metrics(("loss", 1.0), ("loss", 2.0)), RefusalCode.BAD_METRICS),
    "a metric with an escape in its name": (metrics(("\x1b[2J", 1.0)), RefusalCode.BAD_METRICS),
    "a metric with an endless name": (metrics(("x" * (MAX_NAME_BYTES + 1), 1.0)), RefusalCode.BAD_METRICS),
    "a delivery of more than announced": (chunks(BYTES, BYTES), RefusalCode.WRONG_LENGTH),
    "a delivery that cuts a number": (chunks(BYTES[:6], BYTES[6:]), RefusalCode.WRONG_LENGTH),
    "a delivery of other bytes": (chunks(BYTES[::-1]), RefusalCode.WRONG_DIGEST),
    "a delivery of nan": (vector(NAN, inline=False), RefusalCode.NOT_FINITE),
}
RUN = run_toml("liar", rounds=len(LIES), size=3, more="[evaluation]\nevery = 0")


@pytest.fixture(scope="module")
def told(federation: Federation) -> tuple[str, dict[str, pb.Receipt]]:
    """A run of two honest sites and a liar: its id, and what the liar was told to each lie."""
    receipts = {}
    with scripted(federation.address, federation.enrol("liar")) as liar:
        with federation.blocked("client-0"):  # so that the first round is still open when the liar joins
            run_id = federation.submit(RUN)
            until(lambda: len(federation.ready(run_id)) == 2, "the honest sites are ready")
            liar.join(run_id)
            until(lambda: "liar" in federation.ready(run_id), "the liar has joined")
        for name, (lie, _) in LIES.items():
            receipts[name] = lie(liar, liar.order(run_id))
        summary = federation.finish(run_id)
    assert summary.status == "done", summary.reason
    return run_id, receipts


@pytest.mark.parametrize("name", LIES)
def test_an_update_that_lies_is_refused_with_the_reason(
    told: tuple[str, dict[str, pb.Receipt]], name: str
) -> None:
    refusal = told[1][name].refusal
    assert RefusalCode(refusal.code) == LIES[name][1]
    assert "expected" in refusal.message


def test_the_honest_sites_make_the_model_that_they_make_alone(
    federation: Federation, told: tuple[str, dict[str, pb.Receipt]]
) -> None:
    run_id, _ = told
    detail = federation.show(run_id)
    assert [list(row.clients) for row in detail.history] == [["client-0", "client-1"]] * len(LIES)
    assert [row.refused for row in detail.history] == [1] * len(LIES)
    assert federation.digest(run_id) == simulated(RUN)


def test_the_owner_of_the_run_is_told_who_was_refused_last_and_why(
    federation: Federation, told: tuple[str, dict[str, pb.Receipt]]
) -> None:
    clients = {client["name"]: client for client in federation.show_json(told[0])["clients"]}
    assert clients["client-0"]["state"] == "ready"
    assert "not_finite" in clients["liar"]["detail"]


BROKEN_DELIVERIES = {
    "describes itself twice": (lambda update: [pb.DeliverRequest(update=update)] * 2, "INVALID_ARGUMENT"),
    "begins with bytes": (lambda update: [pb.DeliverRequest(data=BYTES)], "INVALID_ARGUMENT"),
    "ends half-way": (
        lambda update: [pb.DeliverRequest(update=update), pb.DeliverRequest(data=BYTES[:8])],
        "INVALID_ARGUMENT",
    ),
    "is empty": (lambda update: [], "INVALID_ARGUMENT"),
    "has a chunk above the cap": (
        lambda update: [
            pb.DeliverRequest(update=update),
            pb.DeliverRequest(data=bytes(MAX_MESSAGE_BYTES + 1)),
        ],
        "RESOURCE_EXHAUSTED",
    ),
}


@pytest.mark.parametrize("name", BROKEN_DELIVERIES)
def test_a_delivery_that_breaks_the_protocol_ends_with_a_status_and_can_be_repeated(
    bare: Federation, name: str
) -> None:
    requests, status = BROKEN_DELIVERIES[name]
    with scripted(bare.address, bare.enrol("clumsy")) as site:
        run_id = bare.submit(run_toml("clumsy", rounds=1, size=1, quorum=1, more="[evaluation]\nevery = 0"))
        site.join(run_id)
        order = site.order(run_id)
        update = update_of(order, GOOD, inline=False)
        found, _ = status_of(lambda: site.stub.Deliver(iter(requests(update)), timeout=30))
        assert found == grpc.StatusCode[status]
        assert not site.deliver(update, BYTES).HasField("refusal")
        assert bare.finish(run_id).status == "done"


def test_a_delivery_whose_link_breaks_half_way_can_be_repeated(bare: Federation) -> None:
    identity = bare.enrol("cut-off")
    with scripted(bare.address, identity) as site:
        run_id = bare.submit(run_toml("cut-off", rounds=1, size=1, quorum=1, more="[evaluation]\nevery = 0"))
        site.join(run_id)
        update = update_of(site.order(run_id), GOOD, inline=False)
        for break_off in (lambda call, link: call.cancel(), lambda call, link: link.close()):
            with channel(bare.address, identity) as link:
                half_sent, broken = Event(), Event()
                call = services.FederationStub(link).Deliver.future(
                    half_a_delivery(update, half_sent, broken), timeout=30
                )
                assert half_sent.wait(30)
                break_off(call, link)
                broken.set()
        assert not site.deliver(update, BYTES).HasField("refusal")
        assert bare.finish(run_id).status == "done"
    assert "Traceback" not in bare.server.output


def half_a_delivery(update: pb.Update, half_sent: Event, broken: Event) -> Iterator[pb.DeliverRequest]:
    yield pb.DeliverRequest(update=update)
    yield pb.DeliverRequest(data=BYTES[:8])
    half_sent.set()
    broken.wait(30)

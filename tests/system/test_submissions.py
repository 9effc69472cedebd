"""What an admin's own program may send as a run: each mistake is a status with words, and begins nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import grpc
import numpy as np
import pytest
from harness import Federation, initial_model, run_toml
from scripted import status_of

from fedge.vector import Array, digest_of
from fedge.wire import fedge_pb2 as pb
from fedge.wire.codec import encode_layout
from fedge.wire.limits import MAX_MESSAGE_BYTES

TEXT = run_toml("submitted")
MODEL = initial_model(TEXT)
NAN = np.array([1, np.nan, 0, 0], np.float32)
WEIGHT = pb.Tensor(name="weight", shape=[2, 2], dtype="float32", role="trainable")


@dataclass(frozen=True)
class Attempt:
    """A submission, right unless something is put in its place."""

    text: str = TEXT
    vector: Array = field(default_factory=lambda: MODEL.vector)
    layout: pb.Layout = field(default_factory=lambda: encode_layout(MODEL.layout))
    digest: bytes | None = None
    size: int | None = None
    send: Callable[[bytes], list[bytes]] = lambda data: [data]

    def requests(self) -> Iterator[pb.SubmitRequest]:
        data = self.vector.tobytes()
        size = len(data) if self.size is None else self.size
        blob = pb.Blob(digest=digest_of(data) if self.digest is None else self.digest, size=size)
        submission = pb.Submission(run_toml=self.text, layout=self.layout, model=blob)
        yield pb.SubmitRequest(submission=submission)
        for part in self.send(data):
            yield pb.SubmitRequest(data=part)


def tensors(*tensors: pb.Tensor) -> pb.Layout:
    return pb.Layout(tensors=tensors)


def shaped(*shape: int) -> pb.Layout:
    return tensors(pb.Tensor(name="weight", shape=shape, dtype="float32", role="trainable"))


INVALID, TOO_LARGE = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.RESOURCE_EXHAUSTED
ATTEMPTS = {
    "no toml": (Attempt(text="name ="), INVALID, "not valid TOML"),
    "an unknown key": (Attempt(text=TEXT + "[cohrt]\n"), INVALID, "did you mean 'cohort'?"),
    "an endless toml": (Attempt(text=TEXT + "#" * (1 << 20)), TOO_LARGE, "a run.toml of at most"),
    "a strategy to import": (Attempt(text=TEXT + '[strategy]\nname = "os:path"\n'), INVALID, "may import"),
    "an unknown strategy": (Attempt(text=TEXT + '[strategy]\nname = "fedvag"\n'), INVALID, "'fedavg'"),
    "a model with nan": (Attempt(vector=NAN), INVALID, "finite numbers"),
    "another digest": (Attempt(digest=bytes(32)), INVALID, "digest"),
    "a short digest": (Attempt(digest=b"short"), INVALID, "digest"),
    "another size": (Attempt(size=20), INVALID, "expected 16 bytes"),
    "half a model": (Attempt(send=lambda data: [data[:8]]), INVALID, "only a part"),
    "more than a model": (Attempt(send=lambda data: [data[:8], data]), TOO_LARGE, "a model of at most 16"),
    "a chunk above the cap": (Attempt(send=lambda data: [bytes(MAX_MESSAGE_BYTES + 1)]), TOO_LARGE, ""),
    "a layout of a petabyte": (Attempt(layout=shaped(1 << 24, 1 << 24)), TOO_LARGE, "a vector of at most"),
    "a shape of 2^64": (Attempt(layout=shaped(2**64 - 1)), INVALID, "not a layout"),
    "a shape of a hundred sizes": (Attempt(layout=shaped(*[1] * 100)), INVALID, "not a layout"),
    "a tensor twice": (Attempt(layout=tensors(WEIGHT, WEIGHT)), INVALID, "more than once"),
    "an unknown role": (
        Attempt(layout=tensors(pb.Tensor(name="w", shape=[4], dtype="float32", role="king"))),
        INVALID,
        "expected a role",
    ),
    "an unknown dtype": (
        Attempt(layout=tensors(pb.Tensor(name="w", shape=[4], dtype="complex", role="buffer"))),
        INVALID,
        "expected a dtype",
    ),
    "a name that a checkpoint cannot have": (
        Attempt(layout=tensors(pb.Tensor(name="__metadata__", shape=[4], dtype="float32", role="buffer"))),
        INVALID,
        "__metadata__",
    ),
}
STREAMS: dict[str, list[pb.SubmitRequest]] = {
    "nothing": [],
    "an empty message": [pb.SubmitRequest()],
    "bytes first": [pb.SubmitRequest(data=b"1234")],
    "two submissions": [next(Attempt().requests())] * 2,
}


def submitted(bare: Federation) -> list[str]:
    return [run.run_id for run in bare.admin.List(pb.ListRequest()).runs if run.name == "submitted"]


@pytest.mark.parametrize("name", ATTEMPTS)
def test_a_submission_that_is_wrong_is_refused_and_begins_nothing(bare: Federation, name: str) -> None:
    attempt, status, words = ATTEMPTS[name]
    found, details = status_of(lambda: bare.admin.Submit(attempt.requests(), timeout=30))
    assert found == status, details
    assert words in details
    assert not submitted(bare)


@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_that_is_no_submission_is_refused(bare: Federation, name: str) -> None:
    found, _ = status_of(lambda: bare.admin.Submit(iter(STREAMS[name]), timeout=30))
    assert found == INVALID
    assert not submitted(bare)


def test_a_coordinator_takes_as_many_runs_as_its_operator_allows(bare: Federation) -> None:
    attempt = Attempt(text=run_toml("crowd"))
    run_ids = [bare.admin.Submit(attempt.requests()).run_id for _ in range(16)]
    found, details = status_of(lambda: bare.admin.Submit(attempt.requests()))
    assert found == grpc.StatusCode.FAILED_PRECONDITION
    assert "16 open runs" in details
    for run_id in run_ids:
        bare.admin.Stop(pb.RunRef(run_id=run_id))
        assert bare.finish(run_id).status == "stopped"
    last = bare.admin.Submit(replace(attempt, text=run_toml("last")).requests()).run_id
    bare.admin.Stop(pb.RunRef(run_id=last))

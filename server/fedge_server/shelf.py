"""What a run's clients may fetch: bytes by digest, granted to a client together with its order."""

from __future__ import annotations

from fedge.strategy import WorkKind
from fedge.vector import Array, bytes_of
from fedge.wire import fedge_pb2 as pb
from fedge.wire.codec import encode_blob


class Shelf:
    """Published vectors. One lives while it is current or while a client's latest order of a kind names it.

    A client may hold an order to train and one to evaluate, on models of different rounds. A vector is
    encoded and hashed once, however many clients fetch it; its memory is the strategy's own.
    """

    def __init__(self) -> None:
        self._current: dict[bytes, memoryview] = {}
        self._granted: dict[str, dict[WorkKind, dict[bytes, memoryview]]] = {}

    def replace(self, vectors: list[Array]) -> list[pb.Blob]:
        """Make these the current vectors; returns what orders say of them, in the same order."""
        views = [bytes_of(vector) for vector in vectors]
        blobs = [encode_blob(view) for view in views]
        self._current = {blob.digest: view for blob, view in zip(blobs, views, strict=True)}
        return blobs

    def grant(self, client: str, kind: WorkKind) -> None:
        """The client was sent an order for the current vectors; its earlier grant for that kind ends."""
        self._granted.setdefault(client, {})[kind] = self._current

    def withdraw(self, client: str, kind: WorkKind) -> None:
        """The client has nothing to fetch any more for its order of that kind."""
        self._granted.get(client, {}).pop(kind, None)

    def clear(self) -> None:
        self._current = {}
        self._granted.clear()

    def find(self, client: str, digest: bytes) -> memoryview | None:
        """The bytes, if this client was granted them."""
        granted = self._granted.get(client, {}).values()
        return next((vectors[digest] for vectors in granted if digest in vectors), None)

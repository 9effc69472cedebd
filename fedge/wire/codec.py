"""Values to messages and back. Decoding trusts nothing: a bad message is a RemoteProtocolError."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from fedge.errors import LayoutError, LimitError, RemoteProtocolError
from fedge.events import OrderId
from fedge.optimizer import Optimizer
from fedge.privacy.terms import Terms
from fedge.refusal import Refusal, RefusalCode
from fedge.run import Work
from fedge.strategy import WorkKind
from fedge.variates import Settled
from fedge.vector import Carried, Layout, Tensor, digest_of
from fedge.wire import fedge_pb2 as pb
from fedge.wire.limits import INLINE_BYTES, MAX_METRICS, MAX_NAME_BYTES, MAX_TEXT_BYTES

_KINDS: dict[WorkKind, pb.Kind.ValueType] = {
    "train": pb.KIND_TRAIN,
    "gradient": pb.KIND_GRADIENT,
    "evaluate": pb.KIND_EVALUATE,
}
_KIND_NAMES = {number: name for name, number in _KINDS.items()}


def encode_kind(kind: WorkKind) -> pb.Kind.ValueType:
    return _KINDS[kind]


def decode_kind(kind: pb.Kind.ValueType) -> WorkKind:
    """What an order is for.

    Raises:
        RemoteProtocolError: it is no kind that is known here.
    """
    name = _KIND_NAMES.get(kind)
    if name is None:
        raise RemoteProtocolError(f"expected an order of a known kind, found {kind}")
    return name


def encode_order_id(order: OrderId) -> pb.OrderId:
    return pb.OrderId(kind=_KINDS[order.kind], round=order.round, attempt=order.attempt)


def decode_order_id(message: pb.OrderId) -> OrderId:
    kind = _KIND_NAMES.get(message.kind)
    if kind is None or message.attempt < 1:
        raise RemoteProtocolError(
            f"expected an order of a known kind and attempt >= 1, found {message.kind}, {message.attempt}"
        )
    return OrderId(kind, message.round, message.attempt)


def encode_refusal(refusal: Refusal) -> pb.Refusal:
    return pb.Refusal(code=refusal.code, message=shorten(refusal.message))


def decode_refusal(message: pb.Refusal) -> Refusal:
    try:
        code = RefusalCode(message.code)
    except ValueError:
        raise RemoteProtocolError(f"expected a known refusal code, found {message.code}") from None
    return Refusal(code, shorten(printable(message.message)))


def printable(text: str) -> str:
    """Text of a peer's, with control characters replaced: it ends in logs and terminals."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)


def shorten(text: str, *, cap: int = MAX_TEXT_BYTES) -> str:
    """Text cut to so many UTF-8 bytes. What is no Unicode (a file's name may not be) becomes "?"."""
    data = text.encode(errors="replace")
    return data.decode() if len(data) <= cap else data[: cap - 3].decode(errors="ignore") + "..."


def encode_layout(layout: Layout) -> pb.Layout:
    return pb.Layout(
        tensors=[
            pb.Tensor(name=t.name, shape=t.shape, dtype=t.dtype, role=t.role, tied=t.tied)
            for t in layout.tensors
        ],
        carried=[pb.Carried(name=c.name, shape=c.shape, dtype=c.dtype, data=c.data) for c in layout.carried],
    )


def decode_layout(message: pb.Layout) -> Layout:
    """A layout, if it is one. Nothing of the vector's size is allocated."""
    try:
        return Layout(
            tuple(
                Tensor(t.name, tuple(t.shape), t.dtype, t.role, tuple(t.tied))  # type: ignore[arg-type]  # Layout checks the role
                for t in message.tensors
            ),
            tuple(Carried(c.name, tuple(c.shape), c.dtype, c.data) for c in message.carried),
        )
    except LayoutError as error:
        raise RemoteProtocolError(f"not a layout: {error}") from None


def encode_work(work: Work) -> pb.Work:
    return pb.Work(
        epochs=work.epochs,
        steps=work.steps,
        batch_size=0 if work.batch_size == "full" else work.batch_size,
        optimizer=work.optimizer,
        learning_rate=work.learning_rate,
        momentum=work.momentum,
        beta1=work.beta1,
        beta2=work.beta2,
        epsilon=work.epsilon,
        l1=work.l1,
        l2=work.l2,
        proximal=work.proximal,
        personal=work.personal,
    )


def decode_work(message: pb.Work) -> Work:
    fields = {
        "epochs": message.epochs if message.HasField("epochs") else None,
        "steps": message.steps if message.HasField("steps") else None,
        "batch_size": message.batch_size or "full",
        "optimizer": message.optimizer,
        "learning_rate": message.learning_rate,
        "momentum": message.momentum,
        "beta1": message.beta1,
        "beta2": message.beta2,
        "epsilon": message.epsilon,
        "l1": message.l1,
        "l2": message.l2,
        "proximal": message.proximal,
        "personal": tuple(message.personal),
    }
    try:
        return Work.model_validate(fields)
    except ValueError as error:  # pydantic's ValidationError is one
        raise RemoteProtocolError(f"not settings of work: {error}") from None


def encode_terms(terms: Terms) -> pb.Privacy:
    return pb.Privacy(
        unit=terms.unit,
        delta=terms.delta,
        clip=terms.clip,
        participations=terms.participations,
        evaluations=terms.evaluations,
        epsilon=terms.epsilon,
        noise_multiplier=terms.noise_multiplier,
        evaluation_noise_multiplier=terms.evaluation_noise_multiplier,
        loss_bound=terms.loss_bound,
        separation=terms.separation,
    )


def decode_terms(message: pb.Privacy) -> Terms:
    """The privacy that a run offers, if it is one that can be kept."""
    try:
        return Terms(
            unit=message.unit,  # type: ignore[arg-type]  # Terms checks it
            delta=message.delta,
            clip=message.clip,
            participations=message.participations,
            evaluations=message.evaluations,
            epsilon=message.epsilon if message.HasField("epsilon") else None,
            noise_multiplier=message.noise_multiplier if message.HasField("noise_multiplier") else None,
            evaluation_noise_multiplier=message.evaluation_noise_multiplier
            if message.HasField("evaluation_noise_multiplier")
            else None,
            loss_bound=message.loss_bound,
            separation=message.separation,
        )
    except ValueError as error:
        raise RemoteProtocolError(f"not terms of privacy: {error}") from None


def encode_optimizer(optimizer: Optimizer) -> pb.Optimizer:
    return pb.Optimizer(
        kind=optimizer.kind,
        learning_rate=optimizer.learning_rate,
        momentum=optimizer.momentum,
        beta1=optimizer.beta1,
        beta2=optimizer.beta2,
        epsilon=optimizer.epsilon,
    )


def decode_optimizer(message: pb.Optimizer) -> Optimizer:
    numbers = (message.learning_rate, message.momentum, message.beta1, message.beta2, message.epsilon)
    if message.kind not in ("sgd", "momentum", "adam") or not all(map(math.isfinite, numbers)):
        raise RemoteProtocolError(f"expected a known optimiser with finite settings, found {message.kind!r}")
    return Optimizer(message.kind, *numbers)  # type: ignore[arg-type]  # just checked


def decode_settled(message: pb.Control, order: OrderId) -> Settled:
    """What the rounds before an order have come to.

    Raises:
        RemoteProtocolError: what counts is no training of an earlier round.
    """
    if not message.HasField("counted"):
        return Settled(message.kept)
    counted = decode_order_id(message.counted)
    if counted.kind != "train" or counted.round > order.round - (order.kind != "evaluate"):
        raise RemoteProtocolError(
            f"expected an update of a round before {order} that counts, found {counted}"
        )
    return Settled(message.kept, (counted.round, counted.attempt))


def encode_metrics(metrics: Mapping[str, float]) -> list[pb.Metric]:
    return [pb.Metric(name=name, value=value) for name, value in metrics.items()]


def decode_metrics(messages: Iterable[pb.Metric]) -> dict[str, float]:
    """At most MAX_METRICS finite numbers with distinct, short, printable names."""
    metrics: dict[str, float] = {}
    for message in messages:
        if len(metrics) == MAX_METRICS:
            raise LimitError(f"expected at most {MAX_METRICS} metrics, found more")
        name = message.name
        if not 0 < len(name.encode()) <= MAX_NAME_BYTES or not name.isprintable() or name in metrics:
            raise RemoteProtocolError("expected distinct, printable, short names of metrics")
        if not math.isfinite(message.value):
            raise RemoteProtocolError(f"expected a finite metric {name!r}, found {message.value}")
        metrics[name] = message.value
    return metrics


def encode_blob(data: bytes | memoryview, *, inline_bytes: int = INLINE_BYTES) -> pb.Blob:
    """A blob of these bytes; they ride inline if they are few."""
    view = memoryview(data).cast("B")
    inline = bytes(view) if len(view) <= inline_bytes else None
    return pb.Blob(digest=digest_of(view), size=len(view), inline=inline)


def check_blob(blob: pb.Blob, *, expected_bytes: int) -> None:
    """Check a blob's claims before its bytes are fetched or used.

    Raises:
        RemoteProtocolError: its size, digest or inline bytes are not what they should be.
    """
    if blob.size != expected_bytes:
        raise RemoteProtocolError(f"expected {expected_bytes} bytes, found a claim of {blob.size}")
    if len(blob.digest) != 32:
        raise RemoteProtocolError(f"expected a digest of 32 bytes, found {len(blob.digest)}")
    if blob.HasField("inline") and (len(blob.inline) != blob.size or digest_of(blob.inline) != blob.digest):
        raise RemoteProtocolError("expected inline bytes of the claimed size and digest, found others")

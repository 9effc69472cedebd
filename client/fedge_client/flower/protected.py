"""Example-level privacy in a Flower client: the site trains by DP-SGD, and its ledger pays, before anything leaves."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict

from fedge.config import build
from fedge.errors import ConfigError, LocalProtocolError, RefusedError, TaskError
from fedge.events import OrderId
from fedge.privacy.example import ExampleLevel
from fedge.privacy.mechanism import Mechanism
from fedge.privacy.secure import KEY_BYTES, SecureSource
from fedge.privacy.terms import Terms, price
from fedge.refusal import Refusal, RefusalCode
from fedge.run import Work
from fedge.seeds import work_seed
from fedge.strategy import WorkKind
from fedge.task import Site, Task
from fedge_client import gate
from fedge_client.flower.mods import ClientAppCall, Mod
from fedge_client.ledger import Ledger
from fedge_client.ledger_file import HEADS
from fedge_client.protection import Protection
from fedge_client.spending import as_told, log_refusal
from fedge_flower.layouts import record_of, vector_of
from fedge_flower.work import work_kind_of

if TYPE_CHECKING:
    from fedge_client.torch.local import TorchLocal

log = logging.getLogger(__name__)

LEDGER_KEY: Final = "fedge-ledger"
"""In a node's settings: the folder of the site's ledgers, an absolute path."""

_SETTINGS: Final[Mapping[str, tuple[str, ...]]] = {
    "lr": ("learning_rate",),
    "batch-size": ("batch_size",),
    "local-epochs": ("epochs", "steps"),
    "local-steps": ("steps", "epochs"),
}
"""Settings of a message, the part of `Work` that each is, and the one that it takes the place of."""

_SEED: Final = 0

_ONE_AT_A_TIME: Final = threading.Lock()
"""A process has one global randomness, and one ledger of a data set."""


def protect_examples(
    task: Task,
    *,
    clip: float,
    noise_multiplier: float,
    max_epsilon: float,
    delta: float,
    ledger: Path | None = None,
    dataset: str | None = None,
    work: Work | None = None,
    evaluation_noise_multiplier: float | None = None,
    loss_bound: float = 10.0,
    unprotected: Collection[str] = (),
) -> Mod:
    """A mod that answers a ServerApp's "train" messages itself: the task's model is trained by DP-SGD on the node's
    data, from the message's arrays to arrays of the same names. No code of the ClientApp sees them or what is returned.

    Each example's gradient is scaled down to the L2 norm `clip`, noise of `noise_multiplier * clip` is added to each
    step's sum (Abadi et al. 2016, Algorithm 1), and what that spends is in the data set's ledger, a file in the folder
    `ledger`, before it leaves. What would bring all that was ever spent of the data set above `max_epsilon` at `delta`
    (add-or-remove-one-example adjacency) is an error reply instead. Replies tell neither the number of examples nor a
    metric: "num-examples" is 1.

    The message's settings "lr", "batch-size", "local-epochs" and "local-steps" take the place of those of `work`, and
    where "fedge-work" is "gradient", one noised gradient is returned. "evaluate" messages are answered with noised
    metrics where there is `evaluation_noise_multiplier`: a loss is counted up to `loss_bound`, other metrics within
    [0, 1]. Any other message, and "evaluate" without noise, is refused, unless its type ("query", "train.greet") is
    among `unprotected`: then the ClientApp answers it, **without any protection**.

    The task's `data` is called with a Site whose `config` is the node's settings. The ledger's folder may come from
    them instead, as "fedge-ledger"; it is the same folder for as long as the data is. `dataset` names the data in it:
    by default "data", or "partition-N" where the node has a "partition-id".

    Raises:
        ConfigError: a number is out of its range, or the task is one that trains by itself.
    """
    if not isinstance(task, Task):
        raise ConfigError(
            f"expected a fedge.Task, whose model and loss are known, found a {type(task).__name__}"
        )
    if not max_epsilon > 0:
        raise ConfigError(f"max_epsilon: expected a number above 0, found {max_epsilon}")
    if ledger is not None and not ledger.is_absolute():
        raise ConfigError(
            f"ledger: expected an absolute path, the same wherever Flower starts, found {ledger}"
        )
    try:
        terms = Terms(
            unit="example",
            delta=delta,
            clip=clip,
            participations=1,
            noise_multiplier=noise_multiplier,
            evaluation_noise_multiplier=evaluation_noise_multiplier,
            loss_bound=loss_bound,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None
    site = _Site(task, terms, work or Work(), max_epsilon=max_epsilon, ledger=ledger, dataset=dataset)
    passing = frozenset(unprotected)

    def mod(message: Message, context: Context, call_next: ClientAppCall) -> Message:
        if message.metadata.message_type in passing:
            site.stand_aside(context)
            return call_next(message, context)
        return Message(site.answer(message, context), reply_to=message)

    return mod


@dataclass(frozen=True, eq=False)
class _Site:
    """Trains, pays and looks at what comes out. Flower's simulation copies it with the ClientApp for each message."""

    task: Task
    terms: Terms
    work: Work
    max_epsilon: float
    ledger: Path | None
    dataset: str | None

    def answer(self, message: Message, context: Context) -> RecordDict:
        """What is returned for a message.

        Raises:
            RefusedError: it is none that is protected, the data cannot be, or the budget does not allow it.
            TaskError: the task's code failed; how is in the log.
        """
        kind = _kind_of(message)
        order = OrderId(kind, _round_of(message.content))
        work = _work_of(self.work, message.content)
        with _ONE_AT_A_TIME:
            local = _loaded(self, work, context.node_id, tuple(sorted(context.node_config.items())))
            protection = self._protection(work, kind, local)
            name, sent = _arrays_of(message.content, local)
            model = vector_of(local.layout, sent)
            released = self._released(local, order, protection, model, context)
        metrics = MetricRecord({**released.metrics, "num-examples": released.num_examples})
        if kind == "evaluate":
            return RecordDict({"metrics": metrics})
        if kind == "gradient":
            model[: local.layout.trainable_size] = 0
        return RecordDict({name: record_of(model + released.vector, local.layout, sent), "metrics": metrics})

    def stand_aside(self, context: Context) -> None:
        """Note in the ledger that for those who see what comes now no epsilon bounds anything."""
        with _ONE_AT_A_TIME, self._opened(context) as ledger:
            ledger.unprotected(_run_of(context))

    def _protection(self, work: Work, kind: WorkKind, local: TorchLocal) -> Protection:
        trained = "train" if kind == "evaluate" else kind
        return Protection(self.terms, price(self.terms, work, trained, local.examples[0]))

    def _released(
        self, local: TorchLocal, order: OrderId, protection: Protection, model: np.ndarray, context: Context
    ) -> gate.Released:
        """What may leave, paid for before and whatever comes of it: that it fails depends on the data, too."""
        cost = protection.cost(order.kind)
        assert cost is not None  # there are terms
        out = np.zeros_like(model)
        with self._paid(context, order, cost), _only_kinds_of_errors():
            return self._done(local, order, protection, model, out, context)

    def _done(
        self,
        local: TorchLocal,
        order: OrderId,
        protection: Protection,
        model: np.ndarray,
        out: np.ndarray,
        context: Context,
    ) -> gate.Released:
        from fedge_client.torch.private.steps import Private

        terms, found = self.terms, protection.price
        assert found is not None  # as above
        level = ExampleLevel(
            terms.clip, found.noise_multiplier, terms.evaluation_noise_multiplier, terms.loss_bound
        )
        outcome = local.do(
            order,
            seed=work_seed(_SEED, site=str(context.node_id), kind=order.kind, round=order.round),
            model=model,
            out=out,
            private=Private(level, SecureSource(os.urandom(KEY_BYTES))),
            progress=lambda done, total: None,
        )
        if outcome.mechanism != protection.cost(order.kind):
            raise LocalProtocolError(
                f"expected work with noise as it was paid for, found {outcome.mechanism}"
            )
        layout = None if order.kind == "evaluate" else local.layout
        return gate.release(out, outcome.num_examples, outcome.metrics, layout=layout, layers=(), terms=terms)

    @contextmanager
    def _paid(self, context: Context, order: OrderId, cost: Mechanism) -> Iterator[None]:
        """Reserved before the work, spent after it: a process that dies in between has told nobody anything."""
        with self._opened(context) as ledger:
            entry = ledger.reserve(
                _run_of(context), order, cost, unit="example", max_epsilon=self.max_epsilon
            )
            try:
                yield
            finally:
                ledger.sending(entry)
                ledger.commit(entry, cost)

    @contextmanager
    def _opened(self, context: Context) -> Iterator[Ledger]:
        """The ledger of the node's data, whose refusals name what is left to the site's own log alone."""
        folder, dataset = self._folder(context), self._dataset_of(context)
        try:
            with Ledger.open(folder, dataset, self.terms.delta, head_folder=folder / HEADS) as opened:
                yield opened
        except RefusedError as error:
            log_refusal(error)
            raise as_told(error) from None

    def _folder(self, context: Context) -> Path:
        found = self.ledger or context.node_config.get(LEDGER_KEY)
        if not isinstance(found, str | Path) or not Path(found).is_absolute():
            raise ConfigError(
                f"expected the absolute path of a folder for the site's ledgers, as `ledger` or as {LEDGER_KEY!r} in "
                "the node's settings, found none"
            )
        return Path(found)

    def _dataset_of(self, context: Context) -> str:
        if self.dataset is not None:
            return self.dataset
        partition = context.node_config.get("partition-id")
        return f"partition-{partition}" if partition is not None else "data"


@lru_cache(maxsize=1)
def _loaded(site: _Site, work: Work, node_id: int, config: tuple[tuple[str, Any], ...]) -> TorchLocal:
    """A node's data, loaded and found to be such that its examples can be protected."""
    from fedge_client.torch.local import TorchLocal  # torch takes seconds to import: only for real work

    with _only_kinds_of_errors():
        local = TorchLocal(site.task, work, seed=_SEED, threads=None)
        local.load(Site(f"node-{node_id}", dict(config)), private=True)
    return local


@contextmanager
def _only_kinds_of_errors() -> Iterator[None]:
    """What user code raises may quote the data: its text stays in the log."""
    try:
        yield
    except RefusedError as error:
        log.warning("refused reason=%s", error, exc_info=error.__cause__)
        raise RefusedError(error.refusal) from None
    except Exception as error:
        log.exception("task_failed")
        raise TaskError(f"the task's code failed ({type(error.__cause__ or error).__name__})") from None


def _run_of(context: Context) -> str:
    return f"flower-{context.run_id}"


def _kind_of(message: Message) -> WorkKind:
    match message.metadata.message_type:
        case "train":
            return work_kind_of(message.content)
        case "evaluate":
            return "evaluate"
        case other:
            raise _refused(
                f"asked for {other[:80]!r}, which the ClientApp would answer without protection: this site does not "
                "have it among `unprotected`"
            )


def _arrays_of(content: RecordDict, local: TorchLocal) -> tuple[str, ArrayRecord]:
    records = list(content.array_records.items())
    if len(records) != 1:
        raise ConfigError(f"expected one record of arrays in the message, found {len(records)}")
    expected, found = set(local.layout.names), set(records[0][1])
    if expected != found:
        odd = sorted(expected ^ found)[:8]
        raise ConfigError(
            f"expected the arrays of the task's model, found others: {odd} are in one of the two"
        )
    return records[0]


def _settings_of(content: RecordDict) -> dict[str, Any]:
    return {name: value for config in content.config_records.values() for name, value in config.items()}


def _round_of(content: RecordDict) -> int:
    found = _settings_of(content).get("server-round", 1)
    return found if isinstance(found, int) and found >= 1 else 1


def _work_of(work: Work, content: RecordDict) -> Work:
    """The app's own, with what the message says."""
    fields = work.model_dump()
    settings = _settings_of(content)
    for name, (part, *others) in _SETTINGS.items():
        if name in settings:
            fields |= {part: settings[name]} | dict.fromkeys(others)
    return build(Work, fields, source="the message's settings")


def _refused(message: str) -> RefusedError:
    return RefusedError(Refusal(RefusalCode.PROTECTION_UNAVAILABLE, message))

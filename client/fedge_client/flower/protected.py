"""Example-level privacy in a Flower client: the site trains by DP-SGD, and its ledger pays, before anything leaves."""

from __future__ import annotations

import logging
import math
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
from fedge.privacy.secure import KEY_BYTES, SecureSource
from fedge.privacy.terms import Terms, price
from fedge.refusal import Refusal, RefusalCode
from fedge.run import Work
from fedge.seeds import work_seed
from fedge.strategy import WorkKind
from fedge.task import Site, Task
from fedge_client import gate
from fedge_client.flower.mods import ClientAppCall, Mod
from fedge_client.flower.payment import Ledgers
from fedge_client.protection import Protection
from fedge_flower.asked import Asked
from fedge_flower.layouts import record_of, vector_of

if TYPE_CHECKING:
    from fedge_client.torch.local import TorchLocal

log = logging.getLogger(__name__)

_SETTINGS: Final[Mapping[str, tuple[str, ...]]] = {
    "lr": ("learning_rate",),
    "batch-size": ("batch_size",),
    "local-epochs": ("epochs", "steps"),
    "local-steps": ("steps", "epochs"),
    "proximal-mu": ("proximal",),
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
    adjustable: Collection[str] = ("lr", "proximal-mu"),
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
    metric: "num-examples" is 1. As in all of fedge's accounting the number of examples counts as known all the same: it
    sets the sampling rate, and shows in how long the budget lasts.

    `work` says how long a node trains on a message. Those of the settings "lr", "batch-size", "local-epochs",
    "local-steps" and "proximal-mu" (of Flower's FedProx) that are `adjustable` may come from the message instead;
    others are refused, unless they are what `work` has: how long a node works, and for what price, is not the
    ServerApp's to choose. Where "fedge-work" is "gradient", one noised gradient is returned. "evaluate" messages are
    answered with noised metrics where there is `evaluation_noise_multiplier`: a loss is counted up to `loss_bound`,
    other metrics within [0, 1]. Any other message, and "evaluate" without noise, is refused, unless its type ("query",
    "train.greet") is among `unprotected`: then the ClientApp answers it, **without any protection**.

    The task's `data` is called with a Site whose `config` is the node's settings. The ledger's folder may come from
    them instead, as "fedge-ledger"; it is the same folder for as long as the data is. `dataset` names the data in it:
    by default "data", or where the node has a "partition-id" "partition-I-of-N", of which a folder has one N.

    Raises:
        ConfigError: a number or a name is none that can be, or the task is one that trains by itself.
    """
    if not isinstance(task, Task):
        raise ConfigError(
            f"expected a fedge.Task, whose model and loss are known, found a {type(task).__name__}"
        )
    if not 0 < max_epsilon < math.inf:
        raise ConfigError(f"max_epsilon: expected a finite number above 0, found {max_epsilon}")
    if unknown := set(adjustable) - set(_SETTINGS):
        raise ConfigError(f"adjustable: expected some of {', '.join(_SETTINGS)}, found {sorted(unknown)}")
    if work is not None and work.personal:
        raise ConfigError(
            "work.personal: expected none, since messages have a node's whole model; leave it out"
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
    ledgers = Ledgers(delta, max_epsilon, ledger, dataset)
    site = _Site(task, terms, work or Work(), frozenset(adjustable), ledgers)
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
    adjustable: frozenset[str]
    ledgers: Ledgers

    def answer(self, message: Message, context: Context) -> RecordDict:
        """What is returned for a message.

        Raises:
            RefusedError: it is none that is protected, the data cannot be, or the budget does not allow it.
            TaskError: the task's code failed; how is in the log.
        """
        kind = _kind_of(message)
        order = OrderId(kind, _round_of(message.content))
        work = self._work_for(message.content)
        with _ONE_AT_A_TIME:
            local = self._local(context, work)
            name, sent = _arrays_of(message.content, local)
            model = vector_of(local.layout, sent)
            released = self._released(local, order, self._protection(work, kind, local), model, context)
        metrics = MetricRecord({**released.metrics, "num-examples": released.num_examples})
        if kind == "evaluate":
            return RecordDict({"metrics": metrics})
        if kind == "gradient":
            model[: local.layout.trainable_size] = 0
        return RecordDict({name: record_of(model + released.vector, local.layout, sent), "metrics": metrics})

    def stand_aside(self, context: Context) -> None:
        """Note in the ledger that for those who see what comes now no epsilon bounds anything."""
        with _ONE_AT_A_TIME:
            self.ledgers.note_unprotected(context)

    def _protection(self, work: Work, kind: WorkKind, local: TorchLocal) -> Protection:
        trained = "train" if kind == "evaluate" else kind
        try:
            return Protection(self.terms, price(self.terms, work, trained, local.examples[0]))
        except ValueError:  # which says how many steps that would be, and so how many examples there are
            raise _refused("asked for more steps than can be accounted for") from None

    def _local(self, context: Context, work: Work) -> TorchLocal:
        config = tuple(sorted(context.node_config.items()))
        return _loaded(self, context.node_id, config).for_work(work)

    def _work_for(self, content: RecordDict) -> Work:
        """The app's own, with what the message may say and says.

        Raises:
            ConfigError: it says what makes no sense.
            RefusedError: it says what it may not.
        """
        fields = self.work.model_dump()
        settings = _settings_of(content)
        for name, (part, *others) in _SETTINGS.items():
            if name not in settings or settings[name] == fields[part]:
                continue
            if name not in self.adjustable:
                raise _refused(
                    f"asked for another {name!r}; this site has only {sorted(self.adjustable)} adjustable"
                )
            fields |= {part: settings[name]} | dict.fromkeys(others)
        return build(Work, fields, source="the message's settings")

    def _released(
        self, local: TorchLocal, order: OrderId, protection: Protection, model: np.ndarray, context: Context
    ) -> gate.Released:
        """What may leave, paid for before and whatever comes of it: that it fails depends on the data, too."""
        cost = protection.cost(order.kind)
        assert cost is not None  # there are terms
        out = np.zeros_like(model)
        with self.ledgers.paying(context, order, cost), _only_kinds_of_errors():
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


@lru_cache(maxsize=4)
def _loaded(site: _Site, node_id: int, config: tuple[tuple[str, Any], ...]) -> TorchLocal:
    """A node's data, loaded and found to be such that its examples can be protected."""
    from fedge_client.torch.local import TorchLocal  # torch takes seconds to import: only for real work

    with _only_kinds_of_errors():
        local = TorchLocal(site.task, site.work, seed=_SEED, threads=None)
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


def _kind_of(message: Message) -> WorkKind:
    match message.metadata.message_type:
        case "train":
            return Asked.by(message.content).kind
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
    return found if type(found) is int and found >= 1 else 1  # True is no round


def _refused(message: str) -> RefusedError:
    return RefusedError(Refusal(RefusalCode.PROTECTION_UNAVAILABLE, message))

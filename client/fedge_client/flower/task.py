"""A Task of a Flower client, for native runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, Final

from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from flwr.clientapp import ClientApp

from fedge.errors import RefusedError, TaskError
from fedge.events import OrderId
from fedge.records import AppError, AppMessage, Content, node_id
from fedge.refusal import Refusal, RefusalCode
from fedge.run import Work
from fedge.task import OwnTask, Site
from fedge.vector import Array as Vector
from fedge.vector import Layout, Model
from fedge_client.apps.worker import seed_globally
from fedge_client.local import Outcome, Progress
from fedge_flower.app import Settings
from fedge_flower.layouts import layout_of, model_of, record_of, vector_of
from fedge_flower.node import Node, answered
from fedge_flower.records import content_of, records_of

_RUN_ID: Final = 1
_EXAMPLES: Final = "num-examples"


def task_from(
    client_app: ClientApp,
    initial: ArrayRecord | Callable[[], ArrayRecord],
    *,
    run_config: Settings | None = None,
    node_config: Callable[[Site], Settings] | None = None,
    buffers: Collection[str] = (),
    arrayrecord_key: str = "arrays",
    configrecord_key: str = "config",
) -> OwnTask:
    """A task of a ClientApp, for native runs: with the site's gate, secure aggregation and client-level privacy.

    `initial` are the arrays with which a run begins; floating-point ones are trained, those named in `buffers` without
    an optimiser. The ClientApp is sent messages as Flower's FedAvg sends them, with "server-round", "lr", "batch-size",
    "local-epochs" or "local-steps", and "proximal-mu" of the run's `[work]` in their settings, and
    "fedge-work" ("train", or "gradient" for strategies of gradients). It returns arrays and metrics with
    "num-examples". What it finds in `context.node_config` are the plain values of `[data]` in client.toml, or in a
    simulation "partition-id" and "num-partitions", unless `node_config` says otherwise; its `context.state` is kept
    for as long as the site's worker lives. While it works there is no progress to see: `[worker] hang_s` has to be
    longer.
    """

    def arrays() -> ArrayRecord:
        return initial() if callable(initial) else initial

    def first(seed: int) -> Model:
        seed_globally(seed)
        return model_of(arrays(), buffers=buffers)

    def local(site: Site, work: Work) -> FlowerLocal:
        config = node_config(site) if node_config is not None else _settings_of_node(site)
        node = Node(node_id(site.name, 0), config)
        keys = arrayrecord_key, configrecord_key
        return FlowerLocal(client_app, node, arrays(), work, run_config or {}, buffers=buffers, keys=keys)

    return OwnTask(first, local)


class FlowerLocal:
    """`fedge_client.local.Local`, by a ClientApp."""

    def __init__(
        self,
        client_app: ClientApp,
        node: Node,
        like: ArrayRecord,
        work: Work,
        run_config: Settings,
        *,
        buffers: Collection[str],
        keys: tuple[str, str],
    ) -> None:
        self._app, self._node, self._like = client_app, node, like
        self._layout = layout_of(like, buffers=buffers)
        self._work, self._run_config, self._keys = work, run_config, keys
        self._state: Content = {}

    @property
    def layout(self) -> Layout:
        return self._layout

    @property
    def first_layers(self) -> None:
        """A ClientApp keeps to itself what it likes."""

    @property
    def examples(self) -> tuple[int, int]:
        """Not known before it has trained."""
        return 0, 0

    def do(
        self,
        order: OrderId,
        *,
        seed: int,
        model: Vector,
        out: Vector,
        private: object,
        progress: Progress,
        correction: Vector | None = None,
        layers: Vector | None = None,
    ) -> Outcome:
        """As `Local.do`.

        Raises:
            RefusedError: MODEL_NOT_PRIVATE; examples are to be protected, which nobody can see to here. Or
                WORK_NOT_ALLOWED; its gradients are to be corrected, which the ClientApp keeps to itself.
            TaskError: the ClientApp fails, or returns something else than was asked for.
        """
        if private is not None:
            why = "the task trains by itself, so that its examples cannot be protected"
            raise RefusedError(Refusal(RefusalCode.MODEL_NOT_PRIVATE, why))
        if correction is not None:
            why = "the task trains by itself, so that a control variate cannot correct its gradients"
            raise RefusedError(Refusal(RefusalCode.WORK_NOT_ALLOWED, why))
        progress(0, 1)
        seed_globally(seed)
        found = self._ask(order, model)
        ((_, metrics),) = found.metric_records.items() or [("", {})]
        if order.kind == "evaluate":
            return Outcome(_examples(metrics), _numbers(metrics))
        ((_, arrays),) = found.array_records.items() or [("", ArrayRecord())]
        try:
            vector = vector_of(self._layout, arrays)
        except KeyError as error:
            raise TaskError(f"expected the ClientApp to return an array {error}, found none") from None
        if order.kind == "train":
            vector -= model
        else:
            tail = self._layout.trainable_size
            vector[tail:] -= model[tail:]
        out[:] = vector
        return Outcome(_examples(metrics), _numbers(metrics))

    def _ask(self, order: OrderId, model: Vector) -> RecordDict:
        """What the ClientApp makes of the model."""
        arrays, config = self._keys
        content = RecordDict(
            {
                arrays: record_of(model, self._layout, self._like),
                config: ConfigRecord(_settings(self._work, order)),
            }
        )
        kind = "evaluate" if order.kind == "evaluate" else "train"
        asked = AppMessage(
            f"{order}", kind, self._node.id, content_of(content), group=str(order.round), src=1
        )
        answer = answered(
            self._app,
            self._node,
            asked,
            run_id=_RUN_ID,
            run_config=self._run_config,
            state=self._state,
        )
        made = answer.message.content
        if isinstance(made, AppError):
            raise TaskError(f"the ClientApp failed: {made.reason}")
        self._state = answer.state
        return records_of(made)


def _settings(work: Work, order: OrderId) -> dict[str, Any]:
    """A run's work in the words that Flower's apps use."""
    found = {
        "server-round": order.round,
        "fedge-work": order.kind,
        "lr": work.learning_rate,
        "batch-size": work.batch_size,
        "local-epochs": work.epochs,
        "local-steps": work.steps,
        "proximal-mu": work.proximal,
    }
    return {name: value for name, value in found.items() if value is not None}


def _examples(metrics: Mapping[str, Any]) -> int:
    value = metrics.get(_EXAMPLES)
    if not isinstance(value, int | float) or value < 1 or value != int(value):
        raise TaskError(f"expected the ClientApp to return a whole number of {_EXAMPLES!r}, found {value!r}")
    return int(value)


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Those that are one finite number, but for the number of examples."""
    return {
        name: float(value)
        for name, value in metrics.items()
        if name != _EXAMPLES and isinstance(value, int | float) and math.isfinite(value)
    }


def _settings_of_node(site: Site) -> dict[str, bool | int | float | str]:
    if site.index is not None and site.count is not None:
        return {"partition-id": site.index, "num-partitions": site.count}
    return {name: value for name, value in site.config.items() if isinstance(value, bool | int | float | str)}

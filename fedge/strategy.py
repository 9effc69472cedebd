"""The Strategy protocol: what an algorithm decides, as a frozen value with three pure methods.

Who takes part, how updates travel and how they are combined is not a strategy's business. Ours are
found by the same entry point (`fedge.strategies`) as anybody's.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Collection
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, Literal, Protocol, TypeVar, cast, get_type_hints, runtime_checkable

import numpy as np
from pydantic import ValidationError, create_model

from fedge.config import Config, nearest, shown
from fedge.errors import ConfigError
from fedge.optimizer import Optimizer, Slots
from fedge.pipeline import Aggregate, Reduction
from fedge.run import RunConfig
from fedge.vector import Array, Layout, Model, Tensor

WorkKind = Literal["train", "gradient", "evaluate"]


@dataclass(frozen=True, eq=False)
class Advance:
    """How a client that holds the previous model reaches this one without being sent it.

    Its mirror applies `optimizer` with its own slots to `gradient`, the mean that made this model.
    """

    gradient: Array
    optimizer: Optimizer


@dataclass(frozen=True, eq=False)
class Order:
    """What a client is asked to do with the model: local training, or a gradient.

    `control` is the server's control variate, float32[trainable], for strategies whose clients keep some of their own
    (`fedge.variates`): training is then corrected by both.
    `optimizer` is set for strategies with mirrors; `slots` is then the optimiser's state that goes with
    the model to a client that has no mirror, and `advance` the short way for one that has. `clip` is not a
    strategy's to set: it is the norm that updates are clipped to where the run's privacy adapts it.
    """

    kind: WorkKind
    optimizer: Optimizer | None = None
    slots: Slots | None = None
    advance: Advance | None = None
    clip: float | None = None
    control: Array | None = None


class State(Protocol):
    """Whatever a strategy remembers; `model` is the current flat vector, float32[n]."""

    @property
    def model(self) -> Array: ...


S = TypeVar("S", bound=State)


@runtime_checkable
class Strategy(Protocol[S]):
    """An algorithm. `init`, `order` and `step` are pure; `reduction` says how updates are combined.

    `max_staleness` None: rounds, in which a cohort's updates make one step. A number: every update is
    a step of its own, applied on arrival, and refused when the model has moved further since.
    It may also have a method `check(run)`, which raises ConfigError for a run that it cannot be the strategy of.
    """

    @property
    def reduction(self) -> Reduction: ...

    @property
    def max_staleness(self) -> int | None: ...

    def init(self, model: Model) -> S: ...

    def order(self, state: S, round: int) -> Order: ...

    def step(self, state: S, aggregate: Aggregate) -> S: ...


AnyStrategy = Strategy[Any]


def load_strategy(run: RunConfig, *, allowed: Collection[str] | None = None) -> AnyStrategy:
    """The strategy that a run's `[strategy]` names, with its fields checked.

    A name is that of an installed strategy ("fedavg") or `package.module:Attribute`. `allowed` limits
    the latter: a coordinator imports only what its own operator listed, never what a peer names.
    Fields of the strategy that `[strategy]` leaves out and `[work]` sets (such as `learning_rate`) are
    taken from there, so that changing the algorithm is changing one name.

    Raises:
        ConfigError: an unknown name, an unknown or ill-typed field, or a strategy that does not suit the run.
    """
    config, work = run.strategy, run.work
    kind = _find(config.name, allowed)
    fields = {field.name for field in dataclasses.fields(kind)}
    for name in config.fields:
        if name not in fields:
            raise ConfigError(f"unknown key 'strategy.{name}' for {config.name!r}; {nearest(name, fields)}")
    inherited = {
        name: getattr(work, name)
        for name in work.model_fields_set & fields
        if getattr(work, name) is not None
    }
    given = {**inherited, **config.fields}
    for field in dataclasses.fields(kind):
        if field.init and field.name not in given and _is_required(field):
            raise ConfigError(f"expected a key 'strategy.{field.name}', found none: {config.name} needs it")
    try:
        # As strict as any other table of run.toml: no text for a number, nothing infinite.
        hints = get_type_hints(kind, include_extras=True)
        fields_given: dict[str, Any] = {name: (hints[name], ...) for name in given}
        table = create_model("Fields", __base__=Config, **fields_given)
        checked = table.model_validate(given)
        strategy = kind(**{name: getattr(checked, name) for name in given})
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        key = ".".join(["strategy", *(str(part) for part in problem["loc"])])
        raise ConfigError(f"{key}: {problem['msg']}, found {shown(problem['input'])}") from None
    except (TypeError, ValueError, NameError) as error:  # a field is missing, or the strategy objects
        raise ConfigError(f"strategy {config.name!r} cannot be made of its fields: {error}") from None
    if callable(getattr(kind, "check", None)):
        strategy.check(run)
    if work.personal:
        _check_personal(config.name, strategy)
    return cast("AnyStrategy", strategy)


def _check_personal(name: str, strategy: AnyStrategy) -> None:
    """
    Raises:
        ConfigError: clients would not learn their personal layers, or not once for each round that counts.
    """
    if work_kind(strategy) != "train":
        raise ConfigError(
            f"work.personal: expected a strategy whose clients train, found {name}, which has them compute a gradient"
        )
    if strategy.max_staleness is not None:
        raise ConfigError(
            f"work.personal: expected a strategy of rounds, found {name}, which takes each update as it arrives"
        )


def work_kind(strategy: AnyStrategy) -> WorkKind:
    """What the strategy orders in every round."""
    return first_order(strategy).kind


def first_order(strategy: AnyStrategy) -> Order:
    """What the strategy orders first, found out with a model of one parameter."""
    model = Model(np.zeros(1, np.float32), Layout((Tensor("w", (1,)),)))
    return strategy.order(strategy.init(model), 1)


def installed_strategies() -> list[str]:
    """Names of the strategies that are installed here."""
    return sorted({entry.name for entry in entry_points(group="fedge.strategies")})


def _find(name: str, allowed: Collection[str] | None) -> type[Any]:
    for entry in entry_points(group="fedge.strategies", name=name):
        return _checked(name, _imported(name, entry.load))
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise ConfigError(f"unknown strategy {name!r}; {nearest(name, installed_strategies())}")
    if allowed is not None and name not in allowed:
        raise ConfigError(
            f"strategy {name!r} is not one that this coordinator may import: its operator adds it to "
            "`strategies` in server.toml"
        )
    return _checked(name, _imported(name, lambda: getattr(importlib.import_module(module), attribute)))


def _imported(name: str, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except Exception as error:  # a user's module may raise anything while it is imported
        raise ConfigError(f"cannot import strategy {name!r}: {type(error).__name__}: {error}") from error


def _checked(name: str, found: Any) -> type[Any]:
    if not (isinstance(found, type) and dataclasses.is_dataclass(found) and _is_frozen(found)):
        raise ConfigError(f"expected strategy {name!r} to be a frozen dataclass, found {found!r}")
    fields = {field.name for field in dataclasses.fields(found)}
    members = ("init", "order", "step", "reduction", "max_staleness")
    missing = [member for member in members if member not in fields and not hasattr(found, member)]
    if missing:
        raise ConfigError(f"strategy {name!r} has no {missing[0]!r}: see fedge.strategy.Strategy")
    return found


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _is_frozen(kind: type[Any]) -> bool:
    return bool(getattr(kind, "__dataclass_params__").frozen)  # noqa: B009  # typeshed does not know it

"""What a user writes: a Task. What it is told about where it runs: a Site.

A task names functions of the user's own code; it is imported where the data is (in the worker of a
site, or in the simulator) and never crosses the wire.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol, cast

from fedge.errors import ConfigError, RefusedError, TaskError
from fedge.personal import Split
from fedge.privacy.config import Unit
from fedge.refusal import Refusal, RefusalCode
from fedge.vector import Model


@dataclass(frozen=True, slots=True)
class Site:
    """One data holder, as the task sees it.

    `config` is the `[data]` table of client.toml. In a simulation `index` (0-based) and `count` say
    which of how many simulated clients this is; on a device both are None.
    """

    name: str
    config: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    index: int | None = None
    count: int | None = None


@dataclass(frozen=True, slots=True)
class Task:
    """What is trained, on what, and how it is judged.

    Attributes:
        model: makes a fresh model (a `torch.nn.Module`); called under the run's seed.
        data: `(train, test)` for a site: map-style datasets of `(input, target)` pairs.
        loss: `(output, target) -> scalar`, the mean over the batch.
        metrics: name -> `(output, target) -> scalar`, called once with the whole test set.
    """

    model: Callable[[], Any]
    data: Callable[[Site], tuple[Any, Any]]
    loss: Callable[[Any, Any], Any]
    metrics: Mapping[str, Callable[[Any, Any], Any]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class OwnTask:
    """A task that trains by itself, in whatever framework: one made of a Flower client, for instance.

    Attributes:
        initial: makes the run's initial model, from the run's seed.
        local: what does a run's orders at a site (`fedge_client.local.Local`), made of the site and the run's `[work]`.
        metrics: names of what an evaluation gives.
    """

    initial: Callable[[int], Model]
    local: Callable[[Site, Any], Any]
    metrics: Mapping[str, Any] = field(default_factory=dict)


def first_model(
    task: Task | OwnTask, *, seed: int, unit: Unit = "none", personal: Sequence[str] = ()
) -> Model:
    """What a run begins with; without the tensors that match one of `personal`, which each client keeps to itself.

    Raises:
        TaskError, LayoutError: the task's code fails, or its model cannot be a vector, or has no such tensors.
        RefusedError: MODEL_NOT_PRIVATE: it cannot be trained with that unit of privacy; with the remedy.
        ConfigError: the framework is not installed.
    """
    if isinstance(task, Task):
        model = load_framework().initial_model(task, seed=seed, unit=unit)
        if not personal:
            return model
        split = Split.of(model.layout, personal)
        return Model(split.shared_of(model.vector), split.shared)
    check_unit(task, unit)
    check_shared(task, personal)
    return task.initial(seed)


def check_unit(task: Task | OwnTask, unit: Unit) -> None:
    """Refuse to protect the examples of a task that trains by itself, since nobody can see to it.

    Raises:
        RefusedError: MODEL_NOT_PRIVATE.
    """
    if isinstance(task, OwnTask) and unit == "example":
        why = 'the task trains by itself, so that its examples cannot be protected; use [privacy] unit = "client"'
        raise RefusedError(Refusal(RefusalCode.MODEL_NOT_PRIVATE, why))


def check_shared(task: Task | OwnTask, personal: Sequence[str]) -> None:
    """Refuse personal layers of a task that trains by itself, which only it could keep apart.

    Raises:
        RefusedError: WORK_NOT_ALLOWED.
    """
    if isinstance(task, OwnTask) and personal:
        why = "the task trains by itself, so that no layers of its model can be kept apart: leave out work.personal"
        raise RefusedError(Refusal(RefusalCode.WORK_NOT_ALLOWED, why))


class Framework(Protocol):
    """What the core asks of a training framework, found by entry point (`fedge.frameworks`)."""

    def initial_model(self, task: Task, *, seed: int, unit: Unit = "none") -> Model:
        """The task's model with freshly seeded values, as a flat vector and its layout.

        One that cannot be trained with that unit of privacy is refused (RefusedError, MODEL_NOT_PRIVATE).
        """
        ...


def load_task(name: str, *, path: Path | None = None) -> Task:
    """As `load_any_task`, for those who need a task's own parts.

    Raises:
        TaskError: it is one that trains by itself, too.
    """
    found = load_any_task(name, path=path)
    if not isinstance(found, Task):
        raise TaskError(f"task {name!r} trains by itself: expected one with a model and data here")
    return found


def load_any_task(name: str, *, path: Path | None = None) -> Task | OwnTask:
    """Import a task by its `package.module:attribute` name.

    `path` is a folder that is searched first, beside the usual import path. This runs user code:
    call it only where the site's owner allowed that name.

    Raises:
        TaskError: the name is malformed, the import fails, what it names is not a Task, or the folder's
            module is hidden by another of its name that this process has imported before.
    """
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise TaskError(f"expected a task named 'module:attribute', found {name!r}")
    if path is not None:
        if not path.is_dir():
            raise TaskError(f"expected the folder of the task's code at {path}, found none")
        if str(path) not in sys.path:
            sys.path.insert(0, str(path))
        _forbid_namesake(module_name.partition(".")[0], path)
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except Exception as error:  # user code may raise anything while it is imported
        where = f" (searched {path} first)" if path else ""
        raise TaskError(f"cannot import task {name!r}{where}: {type(error).__name__}: {error}") from error
    if not isinstance(found, Task | OwnTask):
        raise TaskError(f"expected {name!r} to be a fedge.Task, found a {type(found).__name__}")
    return found


def _forbid_namesake(module: str, path: Path) -> None:
    """A process has one module of a name: a second project's `app` would silently be the first's."""
    spec = importlib.machinery.PathFinder.find_spec(module, [str(path)])
    loaded = getattr(sys.modules.get(module), "__file__", None)
    if spec is None or spec.origin is None or loaded is None:
        return
    if Path(spec.origin).resolve() != Path(loaded).resolve():
        raise TaskError(
            f"expected module {module!r} of {path}, found that this process has imported {loaded} under "
            "that name; rename one, or use a process for each"
        )


def load_framework(name: str = "torch") -> Framework:
    """The framework that trains tasks, without importing the role that ships it by name.

    Raises:
        ConfigError: it is not installed; the message says what to install.
    """
    for entry in entry_points(group="fedge.frameworks", name=name):
        try:
            return cast("Framework", entry.load())
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"this command builds a model and needs {error.name}: pip install 'fedge[{name}]'"
            ) from error
    raise ConfigError(f"no training framework named {name!r} is installed: pip install 'fedge[torch]'")

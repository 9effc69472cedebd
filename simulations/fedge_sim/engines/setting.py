"""What another process is told, that is to do clients' work: the run, and where its task is imported from; as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedge.run import RunConfig
from fedge.strategy import WorkKind
from fedge.task import Task, load_task

Setting = Mapping[str, Any]


def setting_of(run: RunConfig, *, kind: WorkKind, folder: Path | None) -> dict[str, Any]:
    """`kind` is that of the run's orders; `folder` is searched for the task before the usual import path."""
    return {
        "kind": "gradient" if kind == "gradient" else "train",
        "folder": str(folder) if folder is not None else None,
        "run": run.model_dump(mode="json", exclude_unset=True),
    }


def loaded(setting: Setting) -> tuple[RunConfig, Task]:
    """The run, and its task, which is imported.

    Raises:
        TaskError: it cannot be.
    """
    run = RunConfig.from_table(setting["run"], source="the simulation's run")
    folder = setting["folder"]
    return run, load_task(run.task, path=Path(folder) if folder is not None else None)

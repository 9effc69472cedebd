"""client.toml: where the coordinator is, what the site's owner allows, and the site's own data settings."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from fedge.config import Config, parse_toml, read_toml
from fedge.wire.address import check_address
from fedge.wire.limits import Limits

_TASK_NAME = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


class Data(BaseModel):
    """`[data]`: free keys, handed to the task as `site.config`."""

    model_config = ConfigDict(frozen=True, extra="allow")

    @property
    def table(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class TaskFolder(Config):
    """`[task]`: the folder to import task code from, beside the usual import path."""

    path: str = "."


def _task_name(name: str) -> str:
    if not _TASK_NAME.fullmatch(name):
        raise ValueError(f"expected 'module:attribute', found {name!r}")
    return name


class Policy(Config):
    """`[policy]`: what the data's owner allows, whatever a coordinator asks for.

    `tasks` are the names that may be imported; without the key, those whose module lies in the folder of
    `[task]`, which this site installed itself. `coordinators` are federation ids; without the key, the
    federation that this site enrolled in.
    """

    tasks: list[Annotated[str, AfterValidator(_task_name)]] | None = None
    coordinators: list[str] | None = None
    max_runs: Annotated[int, Field(ge=1, le=64)] = 4
    max_model_bytes: Annotated[int, Field(ge=1, le=1 << 40)] = 4 << 30

    @property
    def limits(self) -> Limits:
        return Limits(self.max_model_bytes)


class WorkerSettings(Config):
    """`[worker]`: the child process that runs task code. It is restarted when it breaks one of these."""

    hang_s: Annotated[float, Field(gt=0)] = 900.0
    memory_mb: Annotated[int, Field(ge=64)] | None = None
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None


class ClientSettings(Config):
    """`client.toml`. Relative paths are relative to the file's own folder."""

    server: Annotated[str, AfterValidator(check_address)]
    identity: str = "."
    task: TaskFolder = TaskFolder()
    policy: Policy = Policy()
    worker: WorkerSettings = WorkerSettings()
    data: Data = Data()


def load_client(path: Path) -> ClientSettings:
    """Read and check a client.toml.

    Raises:
        ConfigError: naming the file, the key and the nearest valid key.
    """
    return parse_toml(read_toml(path), ClientSettings, source=str(path))

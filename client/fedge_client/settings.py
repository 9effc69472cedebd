"""client.toml: where the coordinator is, what the site's owner allows, and the site's own data settings."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from fedge.config import Config, parse_toml, read_toml, shown
from fedge.privacy.config import Unit
from fedge.records import APP_NAME, MAX_NODES_OF_A_SITE
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


def _range(value: object) -> object:
    """A lowest and a highest value, as a list of two numbers."""
    if (
        isinstance(value, list | tuple)
        and len(value) == 2
        and all(type(each) in (int, float) for each in value)
        and value[0] <= value[1]
    ):
        return (float(value[0]), float(value[1]))
    raise ValueError(f"expected [lowest, highest], found {shown(value)}")


UNITS: tuple[Unit, ...] = get_args(Unit)
Range = Annotated[tuple[float, float], BeforeValidator(_range)]


class Policy(Config):
    """`[policy]`: what the data's owner allows, whatever a coordinator asks for.

    `tasks` are the names that may be imported; without the key, those whose module lies in the folder of
    `[task]`, which this site installed itself. `coordinators` are federation ids; without the key, the
    federation that this site enrolled in. `strategies` without the key are all.

    `units` are the units of privacy that a run may have. `max_epsilon`, at `delta`, bounds what all runs
    together may spend of the data set, for ever; `max_run_epsilon` what one run may. A unit of "client"
    without secure aggregation is noise that the coordinator adds: it needs `trust_coordinator`. Secure sums of
    `min_cohort` sites or more are taken part in; those that only an honest coordinator does not break need
    `honest_coordinator`.
    """

    tasks: list[Annotated[str, AfterValidator(_task_name)]] | None = None
    coordinators: list[str] | None = None
    strategies: list[str] | None = None
    max_runs: Annotated[int, Field(ge=1, le=64)] = 4
    max_model_bytes: Annotated[int, Field(ge=1, le=1 << 40)] = 4 << 30

    units: list[Unit] = Field(default_factory=lambda: list(UNITS), min_length=1)
    max_epsilon: Annotated[float, Field(gt=0)] = 8.0
    max_run_epsilon: Annotated[float, Field(gt=0)] | None = None
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    min_noise_multiplier: Annotated[float, Field(ge=0)] = 0.0
    min_cohort: Annotated[int, Field(ge=1)] = 1
    require_secure_aggregation: bool = False
    trust_coordinator: bool = False
    honest_coordinator: bool = False
    epochs: Range | None = None
    learning_rate: Range | None = None
    clip: Range | None = None

    @property
    def limits(self) -> Limits:
        return Limits(self.max_model_bytes)

    @property
    def requires_protection(self) -> bool:
        """Whether a run without differential privacy is refused."""
        return "none" not in self.units


class LedgerSettings(Config):
    """`[ledger]`: the record of what was spent of a data set. Clients of one data set share its folder.

    `dataset` names the data; another name is another budget.
    """

    path: str = "ledger"
    dataset: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")] = "default"


class WorkerSettings(Config):
    """`[worker]`: the child process that runs task code. It is restarted when it breaks one of these."""

    hang_s: Annotated[float, Field(gt=0)] = 900.0
    memory_mb: Annotated[int, Field(ge=64)] | None = None
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None


def _app_name(name: str) -> str:
    if not APP_NAME.fullmatch(name):
        raise ValueError(f"expected 'publisher/name', found {name!r}")
    return name


NodeConfig = dict[str, bool | int | float | str]


class FlowerSettings(Config):
    """`[flower]`: the Flower apps that this site takes part in, and with which nodes.

    `apps` are their folders by "publisher/name", as their pyproject.toml has it: what a ClientApp of these replies
    leaves the site as it is. Each of `nodes` is what an app finds in `context.node_config`; `processes` are those that
    run ClientApps at once.
    """

    apps: dict[Annotated[str, AfterValidator(_app_name)], str] = Field(default_factory=dict)
    nodes: list[NodeConfig] = Field(
        default_factory=lambda: list[NodeConfig](({},)), min_length=1, max_length=MAX_NODES_OF_A_SITE
    )
    processes: Annotated[int, Field(ge=1, le=256)] = 1


class ClientSettings(Config):
    """`client.toml`. Relative paths are relative to the file's own folder."""

    server: Annotated[str, AfterValidator(check_address)]
    identity: str = "."
    task: TaskFolder = TaskFolder()
    policy: Policy = Policy()
    ledger: LedgerSettings = LedgerSettings()
    worker: WorkerSettings = WorkerSettings()
    flower: FlowerSettings = FlowerSettings()
    data: Data = Data()


def load_client(path: Path) -> ClientSettings:
    """Read and check a client.toml.

    Raises:
        ConfigError: naming the file, the key and the nearest valid key.
    """
    return parse_toml(read_toml(path), ClientSettings, source=str(path))

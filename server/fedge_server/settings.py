"""server.toml, and the admin.toml that `fedge run` and `fedge site` use to reach the coordinator."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field

from fedge.config import Config, parse_toml, read_toml
from fedge.wire.address import check_address
from fedge.wire.limits import Limits

Address = Annotated[str, AfterValidator(check_address)]


class DirectorySettings(Config):
    """`[directory]`: who signs the directory of the sites' keys.

    `authority` is the path of a certificate or a public key (PEM, P-256) whose private key is elsewhere; without
    one, the coordinator's own CA signs.
    """

    authority: str = ""


class ServerSettings(Config):
    """`server.toml`. Relative paths are relative to the file's own folder.

    `strategies` lists the `package.module:Attribute` names that runs may use besides the installed ones:
    a run's submitter names a strategy, but only the operator decides what this process imports.
    """

    listen: Address
    identity: str = "."
    spool: str = "spool"
    state: str = "state"
    database: str = ""
    strategies: list[str] = Field(default_factory=list)
    max_runs: Annotated[int, Field(ge=1, le=1000)] = 16
    max_finished_runs: Annotated[int, Field(ge=1, le=100_000)] = 100
    max_sessions: Annotated[int, Field(ge=1, le=1_000_000)] = 10_000
    max_uploads: Annotated[int, Field(ge=1, le=100_000)] = 256
    max_site_uploads: Annotated[int, Field(ge=1, le=1000)] = 4
    max_site_downloads: Annotated[int, Field(ge=1, le=1000)] = 8
    max_site_bytes_per_s: Annotated[float, Field(ge=0, le=1e12)] = 0.0
    max_model_bytes: Annotated[int, Field(ge=1, le=1 << 40)] = 4 << 30
    max_kept_bytes: Annotated[int, Field(ge=0, le=1 << 50)] = 64 << 30
    shutdown_grace_s: Annotated[float, Field(ge=0, le=3600)] = 5.0
    directory: DirectorySettings = DirectorySettings()

    @property
    def limits(self) -> Limits:
        return Limits(self.max_model_bytes)


class AdminSettings(Config):
    """`admin.toml`: where the coordinator is, and the credential that may administer it."""

    server: Address
    ca: str = "ca.pem"
    certificate: str = "admin.pem"
    key: str = "admin.key"


def load_server(path: Path) -> ServerSettings:
    """Read and check a server.toml.

    Raises:
        ConfigError: naming the file, the key and the nearest valid key.
    """
    return parse_toml(read_toml(path), ServerSettings, source=str(path))


def load_admin(path: Path) -> AdminSettings:
    """Read and check an admin.toml; raises as `load_server` does."""
    return parse_toml(read_toml(path), AdminSettings, source=str(path))

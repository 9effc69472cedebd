"""Which Flower apps a site takes part in: those that its owner has installed and listed, and no others."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, Final

from fedge.errors import ConfigError, FedgeError, RefusedError
from fedge.files import read_capped
from fedge.refusal import Refusal, RefusalCode
from fedge.wire import fedge_pb2 as pb
from fedge.wire.codec import printable
from fedge_client.settings import ClientSettings

_MAX_TOML: Final = 1 << 20


def admit(settings: ClientSettings, offer: pb.AppOffer, *, folder: Path) -> Path:
    """The folder of an app that a coordinator offers. Nothing is imported to find out.

    What a ClientApp replies leaves the site as it is: no gate of fedge's is on its way. So a site whose policy asks for
    privacy, or for sums that nobody can read the parts of, takes part in none.

    Raises:
        RefusedError: with a code for what says no.
    """
    named, policy = printable(offer.app)[:200], settings.policy
    if offer.app not in settings.flower.apps:
        known = ", ".join(sorted(settings.flower.apps)) or "none"
        raise _no(
            RefusalCode.TASK_NOT_ALLOWED,
            f"app {named!r} is not among this site's [flower] apps, which are {known}",
        )
    if policy.requires_protection:
        raise _no(
            RefusalCode.PROTECTION_UNAVAILABLE,
            f'this site\'s [policy] units do not have "none", and nothing of app {named!r} is protected by the site',
        )
    if policy.require_secure_aggregation:
        raise _no(
            RefusalCode.PROTECTION_UNAVAILABLE,
            f"this site's policy requires secure aggregation, and the replies of app {named!r} are read one by one",
        )
    where = folder / settings.flower.apps[offer.app]
    try:
        name, version = app_in(where)
    except FedgeError as error:
        raise _no(
            RefusalCode.TASK_UNAVAILABLE, f"app {named!r} is not installed properly at this site"
        ) from error
    if (name, version) != (offer.app, offer.version):
        raise _no(
            RefusalCode.TASK_UNAVAILABLE,
            f"this site has {name} {version} installed, and was asked for {named} {printable(offer.version)[:100]}",
        )
    return where


def app_in(folder: Path) -> tuple[str, str]:
    """The name ("publisher/project") and the version of the app in a folder, as its pyproject.toml says them.

    Raises:
        ConfigError: there is none, or they are not said.
    """
    path = folder / "pyproject.toml"
    try:
        table: dict[str, Any] = tomllib.loads(read_capped(path, max_bytes=_MAX_TOML).decode())
        project, publisher = table["project"], table["tool"]["flwr"]["app"]["publisher"]
        return f"{publisher}/{project['name']}", str(project["version"])
    except (KeyError, TypeError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        what = f"{type(error).__name__}: {error}"
        raise ConfigError(
            f"{path}: expected a Flower app's project.name, project.version and tool.flwr.app.publisher ({what})"
        ) from None


def _no(code: RefusalCode, message: str) -> RefusedError:
    return RefusedError(Refusal(code, message))

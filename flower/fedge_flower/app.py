"""A Flower app in its folder: what its pyproject.toml says, and the two objects that it names."""

from __future__ import annotations

import importlib
import logging
import re
import sys
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from flwr.app import Context, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedge.errors import ConfigError, FedgeError, TaskError
from fedge_flower.internals import SUPERLINK_NODE_ID

log = logging.getLogger(__name__)

Setting = bool | int | float | str
Settings = Mapping[str, Setting]

DEFAULT_NODES: Final = 10

_MAX_TOML: Final = 1 << 20
_PAIR: Final = re.compile(r"""([^\s=]+)=('[^']*'|"[^"]*"|\S+)""")
_REFERENCE: Final = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class FlowerApp:
    """`name` is "publisher/project"; components are references, "package.module:object"; `config` is flat, as an app's
    `context.run_config` is; `nodes` are those that it would like to be simulated with."""

    folder: Path
    name: str
    version: str
    serverapp: str
    clientapp: str
    config: Settings
    nodes: int = DEFAULT_NODES

    @classmethod
    def load(cls, folder: Path) -> FlowerApp:
        """
        Raises:
            ConfigError: there is no app in this folder, or its pyproject.toml is wrong.
        """
        path = folder / "pyproject.toml"
        table = _table(path)
        project, app = _part(table, path, "project"), _part(table, path, "tool", "flwr", "app")
        components = _part(table, path, "tool", "flwr", "app", "components")
        name, version = (_text(project, path, "project", key) for key in ("name", "version"))
        publisher = _text(app, path, "tool.flwr.app", "publisher")
        return cls(
            folder,
            f"{publisher}/{name}",
            version,
            _reference(components, path, "serverapp"),
            _reference(components, path, "clientapp"),
            flattened(app.get("config", {}), f"{path}: tool.flwr.app.config"),
            _nodes(table, path),
        )

    def with_config(self, overrides: Settings) -> dict[str, Setting]:
        """The app's settings with these in place of its own.

        Raises:
            ConfigError: it has no such setting.
        """
        if unknown := sorted(set(overrides) - set(self.config)):
            known = ", ".join(sorted(self.config)) or "none"
            raise ConfigError(f"--run-config: the app has no setting {', '.join(unknown)}; it has {known}")
        return {**self.config, **overrides}

    def server(self) -> ServerApp:
        """
        Raises:
            TaskError: it cannot be imported, or is none.
        """
        return self._loaded(self.serverapp, ServerApp)

    def serve(self, server: ServerApp, grid: Grid, *, run_id: int, config: Settings) -> None:
        """Run a ServerApp to its end.

        Raises:
            TaskError: it fails.
            FedgeError: as the grid does.
        """
        context = Context(run_id, SUPERLINK_NODE_ID, {}, RecordDict(), dict(config))
        try:
            server(grid=grid, context=context)
        except FedgeError:
            raise
        except Exception as error:  # the app's code may raise anything
            log.exception("server_app_failed app=%s", self.name)
            raise TaskError(
                f"app {self.name}: its ServerApp failed: {type(error).__name__}: {error}"
            ) from error

    def client(self) -> ClientApp:
        """
        Raises:
            TaskError: it cannot be imported, or is none.
        """
        return self._loaded(self.clientapp, ClientApp)

    def _loaded(self, reference: str, kind: type[T]) -> T:
        module, _, attribute = reference.partition(":")
        folder = str(self.folder.resolve())
        if folder not in sys.path:
            sys.path.insert(0, folder)
        try:
            found: Any = importlib.import_module(module)
            for part in attribute.split("."):
                found = getattr(found, part)
        except Exception as error:  # the app's code may raise anything
            raise TaskError(
                f"app {self.name}: cannot load {reference}: {type(error).__name__}: {error}; install what it needs "
                f"(pip install {self.folder})"
            ) from error
        if not isinstance(found, kind):
            raise TaskError(
                f"app {self.name}: expected {reference} to be a {kind.__name__}, found a {type(found).__name__}"
            )
        return found


def parse_settings(texts: Iterable[str]) -> dict[str, Setting]:
    """Settings as `flwr run --run-config` takes them: "lr=0.1 name='a b'", or the path of a TOML file.

    Raises:
        ConfigError: one is neither.
    """
    found: dict[str, Setting] = {}
    for text in texts:
        if text.endswith(".toml"):
            found |= flattened(_table(Path(text)), text)
            continue
        pairs = _PAIR.findall(text)
        if not pairs or _PAIR.sub("", text).strip():
            raise ConfigError(f"--run-config: expected KEY=VALUE [...] or a file.toml, found {text[:200]!r}")
        for key, value in pairs:
            try:
                found |= flattened({key: tomllib.loads(f"value = {value}")["value"]}, "--run-config")
            except tomllib.TOMLDecodeError:
                raise ConfigError(
                    f"--run-config: {key}: expected a number, true, false or a quoted text, found {value[:200]}"
                ) from None
    return found


def flattened(table: Any, where: str, prefix: str = "") -> dict[str, Setting]:
    """Nested tables as one, with dots in its keys.

    Raises:
        ConfigError: a value is no number, text or truth value.
    """
    if not isinstance(table, dict):
        raise ConfigError(f"{where}: expected a table, found a {type(table).__name__}")
    found: dict[str, Setting] = {}
    for key, value in table.items():
        name = f"{prefix}.{key}" if prefix else key
        if isinstance(value, dict):
            found |= flattened(value, where, name)
        elif isinstance(value, Setting):
            found[name] = value
        else:
            raise ConfigError(
                f"{where}.{name}: expected a number, a text, true or false, found a {type(value).__name__}"
            )
    return found


def _table(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MAX_TOML:
            raise ConfigError(f"{path}: expected at most {_MAX_TOML} bytes")
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: expected a Flower app's settings, found no such file") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from None


def _part(table: Mapping[str, Any], path: Path, *keys: str) -> Mapping[str, Any]:
    found: Any = table
    for at, key in enumerate(keys):
        found = found.get(key) if isinstance(found, dict) else None
        if not isinstance(found, dict):
            raise ConfigError(
                f"{path}: expected a table [{'.'.join(keys[: at + 1])}], as every Flower app has"
            )
    part: Mapping[str, Any] = found
    return part


def _text(table: Mapping[str, Any], path: Path, where: str, key: str) -> str:
    value = table.get(key)
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{path}: {where}.{key}: expected a text, found {value!r}")
    return value


def _reference(components: Mapping[str, Any], path: Path, key: str) -> str:
    found = _text(components, path, "tool.flwr.app.components", key)
    if not _REFERENCE.fullmatch(found):
        raise ConfigError(
            f"{path}: tool.flwr.app.components.{key}: expected package.module:object, found {found!r}"
        )
    return found


def _nodes(table: Mapping[str, Any], path: Path) -> int:
    """Of the federation that an app of an older form names as its default."""
    federations = table["tool"]["flwr"].get("federations", {})
    chosen = federations.get(federations.get("default", "")) if isinstance(federations, dict) else None
    options = chosen.get("options", {}) if isinstance(chosen, dict) else {}
    found = options.get("num-supernodes", DEFAULT_NODES) if isinstance(options, dict) else DEFAULT_NODES
    if type(found) is not int or found < 1:
        raise ConfigError(f"{path}: options.num-supernodes: expected a number of nodes, found {found!r}")
    return found
